"""Prints docs/configs.md, made from the schema: `python scripts/config_reference.py >
docs/configs.md`."""

import types
import typing
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from tdds_dist.config.experiment import Experiment
from tdds_dist.config.grid import BUILT_IN_METHODS, Method
from tdds_dist.config.run import Config
from tdds_dist.config.schema import Section
from tdds_dist.launch.cluster import Cluster

HEAD = """\
# Every key of a config

<!-- Made by `python scripts/config_reference.py > docs/configs.md`. Change the descriptions in tdds_dist/config/run.py. -->

[A run](#a-run) is one YAML file, as in `configs/`. [An experiment](#an-experiment) is another, as in `configs/experiments/`,
and names the config of its runs. [A cluster](#a-cluster) is a third, as in `configs/clusters/`: what jobs ask for, and nothing
of what they train. Unknown keys are errors. Where a description says "empty", the default is meant: `''`,
`null` or `[]`.

## Changing keys without editing a file

`key=value` words of a command change keys of its config. The value is YAML; one with spaces, brackets or braces goes in single
quotes, so that the shell leaves it alone. A list or a mapping is replaced as a whole (`score.windows.0.T` does not work).

```bash
tdds collect configs/digits.yaml train.lr=0.02 run.name=digits_slow
tdds collect configs/digits.yaml 'score.windows=[{T: 12, K: 5, pruning_rates: [0.3]}]'
tdds retrain configs/imagenet_swin_t.yaml --coreset FILE.npz --strategy E retrain.epochs=20 train.warmup_epochs=1
```

* `score.windows`: no T above `train.epochs`; K from 2 to T (in preset `paper` from 1 to T - 1); each pruning rate in one window
  only.
* `retrain.epochs`: 0, the default, means `train.epochs`. Warm-up is the same in collection and retraining, and
  `train.warmup_epochs` must be less than both, so a short retraining may need a shorter one.

In an experiment file such words are items of `overrides:`. One with braces goes in double quotes as a whole, because of its
colons:

```yaml
name: short
config: configs/digits.yaml
overrides:
  - train.epochs=15
  - "score.windows=[{T: 12, K: 5, pruning_rates: [0.3, 0.5]}]"
  - retrain.epochs=20
  - train.warmup_epochs=1
methods:
  - tdds
  - random
  - {name: tdds_unweighted, score: tdds, importance: none}
  - {name: el2n_first_5, score: el2n, options: [el2n_epochs=5]}
  - {name: ccs_probability, score: aum, sampler: ccs, num_strata: 20, options: [aum_of=probability]}
pruning_rates: [0.3, 0.5]
```

`tdds experiment` takes keys of the experiment and of the config. Those of the config are added to its `overrides`, after what
the file has; `overrides=[...]` replaces the whole list. Runs that were finished with other settings are refused, so these need
another `name`; more seeds, methods or rates do not. The experiment itself sets `run.name`, `run.seed` and `run.dir`.

```bash
tdds experiment configs/experiments/digits_table1.yaml 'methods=[tdds, {name: el2n_5, score: el2n, options: [el2n_epochs=5]}]'
tdds experiment configs/experiments/digits_table1.yaml name=digits_short retrain.epochs=20 train.warmup_epochs=1
tdds experiment configs/experiments/digits_table1.yaml name=digits_x1 'overrides=[model.name=shufflenet_v2_x1_0]'
```
"""

NOTES = {
    "score.baselines": (
        """\
`options` of a method, and words after `tdds score RUN --all`, are these keys without `score.baselines.`. What they do to names
of files is said in [scores.md](scores.md#every-score).
"""
    ),
    "methods": (
        """\
A method is a name, or a mapping with the keys below; scores and samplers are explained in [scores.md](scores.md#every-score).
"""
    ),
}


def page() -> str:
    """The text of docs/configs.md."""
    parts = [HEAD, "## A run\n"]
    for name, field in Config.model_fields.items():
        parts += _section(_section_of(field), name)
    parts += ["## An experiment\n", *_section(Experiment), "## A cluster\n", *_section(Cluster)]
    return "\n".join(parts)


def _section(section: type[Section], name: str = "", in_list: bool = False) -> Iterator[str]:
    """Heading, text and table of a section; then the same for those in it."""
    if name:
        yield f"### `{name}`{', each item' if in_list else ''}\n"
    yield f"{_about(section)}\n"
    if name in NOTES:
        yield NOTES[name]
    if section is Method:
        yield _built_in_methods()
    prefix = f"{name}." if name else ""
    yield _table(section, "" if in_list else prefix)
    for key, field in section.model_fields.items():
        if typing.get_origin(field.annotation) is tuple and _is_section(
            item := typing.get_args(field.annotation)[0]
        ):
            yield from _section(item, f"{prefix}{key}", in_list=True)
        elif _is_section(field.annotation):
            yield from _section(_section_of(field), f"{prefix}{key}")


def _built_in_methods() -> str:
    plain = [name for name, method in BUILT_IN_METHODS.items() if method == Method(name=name)]
    lines = [f"Known by name: {', '.join(f'`{name}`' for name in plain)}, and", ""]
    lines += [
        f"* `{name}`, which is `{_yaml(method.model_dump(exclude_defaults=True))}`"
        for name, method in BUILT_IN_METHODS.items()
        if name not in plain
    ]
    return "\n".join(lines) + "\n"


def _about(section: type[Section]) -> str:
    return _text(" ".join((section.__doc__ or "").split()))


def _table(section: type[Section], prefix: str = "") -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        about = field.description or _about(_section_of(field))
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {_default(field)} | {_text(about)} |")
    return "\n".join(rows) + "\n"


def _text(words: str) -> str:
    """Plain text as Markdown: outside of backticks `<name>` is no tag; a bar ends no cell."""
    parts = words.replace("|", "\\|").split("`")
    return "`".join(
        part if inside % 2 else part.replace("<", "\\<") for inside, part in enumerate(parts)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "see below" if isinstance(value, Section) else f"`{_yaml(value)}`"


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists."""


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def _yaml(value: Any) -> str:
    """A value as it stands in a config, on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").rstrip()


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _section_of(field: FieldInfo) -> type[Section]:
    assert _is_section(field.annotation)
    return typing.cast(type[Section], field.annotation)


def _type(field: FieldInfo) -> str:
    """The type in plain words, with its limits."""
    kind, optional = field.annotation, False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
        optional = True
    limits = {
        key: limit
        for rule in field.metadata
        for key in ("ge", "gt", "le", "lt", "min_length", "pattern")
        if (limit := getattr(rule, key, None)) is not None
    }
    words = _words(kind)
    if pattern := limits.pop("pattern", None):
        words += PATTERNS[pattern]
    if least := limits.pop("min_length", None):
        words += f", at least {least}"
    if {"ge", "le"} <= limits.keys():
        words += f" from {limits.pop('ge'):g} to {limits.pop('le'):g}"
    bounds = [f"{SIGNS[key]} {limit:g}" for key, limit in limits.items()]
    return " ".join((words, ", ".join(bounds))).rstrip() + (", or `null`" if optional else "")


SIGNS = {"gt": "\\>", "ge": "≥", "lt": "\\<", "le": "≤"}
PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": " of letters, digits, `.`, `_`, `-`",
    r"^\S*$": " without spaces",
}
NAMES = {str: "text", int: "whole number", float: "number", Method: "name or mapping"}


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return "`true` or `false`"
    if kind in NAMES:
        return NAMES[kind]
    if origin is typing.Annotated:
        return _words(parts[0])
    if kind is typing.Any:
        return "`value`"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is typing.Literal:
        *others, last = (f"`{part}`" for part in parts)
        return f"{', '.join(others)} or {last}"
    if origin is tuple:
        return (
            f"list of {_plural(parts[0])}"
            if parts[-1] is Ellipsis
            else f"list of {len(parts)} {_plural(parts[0])}"
        )
    if origin is dict:
        return f"mapping of {_plural(parts[0])} to {_plural(parts[1])}"
    if _is_section(kind):
        return "mapping"
    raise TypeError(f"no words for {kind}; add them here")


def _plural(kind: Any) -> str:
    words = _words(kind)
    return words if "`" in words else " or ".join(f"{word}s" for word in words.split(" or "))


if __name__ == "__main__":
    print(page(), end="")
