"""Machinery of configs: strict YAML, frozen sections, `key=value` overrides, and one-line errors:
value, rule, way out.

Knows no key; `run`, `experiment` and `grid` hold those. A config is one YAML file
(`yaml.safe_load`, so no tag can execute anything).
"""

import difflib
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tdds_dist.errors import InputError


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Root = TypeVar("Root", bound=Section)


def expand_path(text: str) -> str:
    """Return a path with `~`, `~user`, `$VAR` and `${VAR}` replaced, as a shell does.

    Raises:
        InputError: a variable that is not set, or a user without a home.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if left := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise InputError(
            f"{text}: the environment variable {left[0]} is not set; set it, or write the path out"
        )
    if path.startswith("~"):
        raise InputError(
            f"{text}: {path.split('/')[0]} has no home directory; write the path out, as ./~... if"
            " the name begins with a tilde"
        )
    return path


PathText = Annotated[str, AfterValidator(expand_path)]  # of a key that holds a path
# of a run, an experiment, a method: it becomes part of files' names
NameText = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def read_tree(
    path: Path, overrides: Sequence[str], must_hold: str, examples: str = "configs/"
) -> dict[str, Any]:
    """Read the YAML file at `path` as plain data, with `key.key=value` overrides applied (values
    are YAML)."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; {examples} holds examples")
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    # ValueError: not text, or a date that does not exist
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        quotes = "; an item that holds `: ` needs quotes" if "mapping values" in str(error) else ""
        raise InputError(
            f"{path} is not plain YAML: {' '.join(str(error).split())}{quotes}"
        ) from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold {must_hold}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def parse_tree(root: type[Root], tree: Mapping[str, Any], where: str) -> Root:
    """Build `root` from plain data; raise InputError naming key, value and rule for the first thing
    wrong."""
    try:
        return root.model_validate(sequences_as(tuple, tree))
    except ValidationError as error:
        raise InputError(f"{where}: {_one_line(root, error)}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in plain data."""
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(
            f"override {override!r} must look like section.key=value, e.g. train.lr=0.1"
        )
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise InputError(
            f"override {key!r} goes through something that is not a section; keys look like"
            " train.lr"
        )
    try:
        node[leaf] = _read_yaml(text)
    except _Ambiguous as error:
        raise InputError(f"override {override!r}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"override {override!r}: the value is not YAML") from error


class _Ambiguous(yaml.MarkedYAMLError):
    """Text that YAML 1.1 reads as something else than it says."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without the traps of version 1.1: 5e-4 is a number, a date is text, a key stands
    once, and 010 (octal) and 4:30 (base 60) are refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise _Ambiguous(
                    problem=f"the key {key!r} stands twice, in lines {seen[key]} and {line}; keep"
                    " one"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = node.value.lstrip("+-").replace("_", "")
        if ":" in text:
            meant = "a number of base 60; write minutes or seconds as one number, or quote it"
        elif re.fullmatch(r"0\d+", text):
            meant = f"the octal number {int(text, 8)}; write it without the leading zero"
        elif node.tag.endswith("int"):
            return self.construct_yaml_int(node)
        else:
            return self.construct_yaml_float(node)
        raise _Ambiguous(problem=f"{node.value}, in line {node.start_mark.line + 1}, is {meant}")


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith("timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _read_yaml(text: str) -> Any:
    tree = yaml.load(text, _Loader)  # a SafeLoader
    json.dumps(tree, default=str)  # an anchor that holds itself ends here
    return tree


def sequences_as(kind: type[list[Any]] | type[tuple[Any, ...]], value: Any) -> Any:
    """Return plain data with all its sequences as lists (for YAML) or tuples (frozen fields)."""
    if isinstance(value, Mapping):
        return {key: sequences_as(kind, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return kind(sequences_as(kind, item) for item in value)
    return value


def _one_line(root: type[Section], error: ValidationError) -> str:
    # a typo explains what is missing
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    # what pydantic adds where the key is the fault
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        valid, name = list(_model_at(root, first["loc"][:-1]).model_fields), str(first["loc"][-1])
        near = ".".join([*map(str, first["loc"][:-1]), nearest(name, valid)])
        return f"unknown key {key!r}; the nearest valid key is {near!r} (valid: {', '.join(valid)})"
    if first["type"] == "missing":
        return f"key {key!r} is missing; {_describe(root, first['loc'], key)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        is_word = isinstance(first["input"], bool)
        read = " (yes, no, on and off are true and false to YAML)" if is_word else ""
        return (
            f"{key}={first['input']!r}: must be text{read}; put it in quotes, on a command line in"
            f""" two: {key}="'TEXT'\""""
        )
    return (
        f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]};"
        f" {_describe(root, first['loc'], key)}"
    )


def nearest(name: str, section: Sequence[str]) -> str:
    """Return the valid key most like `name`; initials count, so that learning_rate finds lr."""
    initials = "".join(word[:1] for word in name.lower().split("_"))
    if len(initials) > 1 and initials in section:
        return initials
    return max(
        section,
        key=lambda valid: difflib.SequenceMatcher(None, valid.lower(), name.lower()).ratio(),
    )


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Return the sections that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections_in(part)


def _model_at(root: type[Section], location: Sequence[str | int]) -> type[Section]:
    """Return the section at a location of the schema; positions in lists and names of alternatives
    lead nowhere new."""
    model = root
    for part in location:
        if part in model.model_fields:
            model = next(_sections_in(model.model_fields[str(part)].annotation), model)
    return model


def _describe(root: type[Section], location: Sequence[str | int], key: str) -> str:
    """Say what the innermost field at a location is for, under its name where that is not `key`,
    which was said just before."""
    names = [part for part in location if isinstance(part, str)]
    for length in range(len(names), 0, -1):
        field = _model_at(root, names[: length - 1]).model_fields.get(names[length - 1])
        if field is None:
            continue
        if field.description:
            name = "" if names[length - 1] == key else f"{names[length - 1]}: "
            return name + field.description
        section = next(_sections_in(field.annotation), root)
        return f"it has the keys {', '.join(section.model_fields)}"
    return "see `configs/` for examples"
