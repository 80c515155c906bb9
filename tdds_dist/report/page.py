"""The report stage: run directories in, one HTML page out that loads nothing from anywhere.

Reads what the other stages left behind and computes nothing that a stage should have computed. What
is missing (no scores yet, a `.beton` that moved, an unfinished retraining) is said on the page
instead of failing.

Of single samples only the thumbnails are embedded, with path, label and scores, as many as a budget
of bytes allows. All else is binned or counted, so that 1.28 million samples give a page as small as
a thousand do.
"""

import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tdds_dist.config.scores import base_key
from tdds_dist.console import Progress, log
from tdds_dist.errors import InputError
from tdds_dist.report.accuracy import (
    accuracy_chart,
    finding,
    images_chart,
    matrix,
    training_rows,
)
from tdds_dist.report.agreement import agreement_section, between_section
from tdds_dist.report.charts import FULL_SLOT
from tdds_dist.report.curves import curve_charts, speed, speed_charts
from tdds_dist.report.figures import ablations
from tdds_dist.report.images import BUDGET_BYTES, sheets
from tdds_dist.report.published import printed_tables
from tdds_dist.report.read import FULL_DATA, Facts, read_facts, score_names
from tdds_dist.report.results import by_setting, experiment_name, pools, run_name, summary_rows
from tdds_dist.report.scores import (
    Origins,
    class_table,
    known_noise_kept,
    main_score,
    noise,
    noise_table,
    origin,
    score_facts,
    valid_utf8,
)
from tdds_dist.runs.artifacts import Coreset, write_atomically
from tdds_dist.runs.directory import RunDir
from tdds_dist.text import count, decimal, duration, percent, plus_minus, signed

_SLOTS = {
    "random": 0,
    "tdds": 1,
    "entropy": 2,
    "forgetting": 3,
    "el2n": 4,
    "aum": 5,
    "moderate": 6,
    "dyn_unc": 7,
    "dual": 8,
    "ccs": 9,
}
# of a run, with progress
_PARTS = ("scores", "known noise", "agreement of scores", "images", "classes", "accuracy and speed")


def build_report(runs: list[RunDir], out: Path, num_thumbnails: int = 24) -> Path:
    """Write one self-contained HTML page about `runs` to `out`, with at most `num_thumbnails`
    images per sheet.

    Raises InputError when there is no run, or one of them is not a run directory.
    """
    if not runs:
        raise InputError(
            "report got no run directory; name at least one, e.g. `tdds report runs/demo`"
        )
    with Progress(
        "report", len(runs) * (1 + len(_PARTS)) + 1, "", visible=os.environ.get("RANK", "0") == "0"
    ) as progress:
        every = []
        for run in runs:
            progress.note(f"reading {run.path.name}", now=True)
            every.append(read_facts(run))
            progress.advance(1 + len(_PARTS) * every[-1].is_pruned_training)
        trainings = [part for pool in pools(every) if (part := _trainings(pool))["rows"]]
        found = [facts for facts in every if not facts.is_pruned_training]
        together = [pool for pool in pools(found) if len(pool) > 1]
        pooled = {facts.run.path for pool in together for facts in pool}
        budget_bytes = BUDGET_BYTES // max(1, len(found))
        sections = [
            _section(facts, num_thumbnails, budget_bytes, facts.run.path in pooled, progress)
            for facts in found
        ]
        text = render(
            "page.html.j2",
            ("style.css", "scores.css", "images.css"),
            ("page.js", "scores.js", "images.js"),
            title=run_name(every[0])
            if len(runs) == 1
            else experiment_name(runs) or f"{len(runs)} runs",
            num_runs=len(runs),
            trainings=trainings,
            sections=sections,
            pools=[_pool(pool, found, sections) for pool in together],
            between=between_section(
                [(section["name"], section["agreement"]) for section in sections]
            ),
            written=time.strftime("%Y-%m-%d %H:%M"),
        )
    for facts in every:
        for problem in facts.problems:
            log.warning(problem)

    # the names of files may hold bytes that are no UTF-8
    write_atomically(Path(out), lambda file: file.write(text.encode("utf-8", "replace")))
    return Path(out)


def render(template: str, styles: Sequence[str], scripts: Sequence[str], **context: Any) -> str:
    """Return a page in one file: the template with these styles and scripts inside it."""
    import jinja2

    page = jinja2.Environment(
        loader=jinja2.PackageLoader("tdds_dist.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (count, percent, decimal, signed, plus_minus, duration)
    page.filters |= {each.__name__: each for each in filters}
    folder = files("tdds_dist.report") / "templates"
    style, script = (
        "".join((folder / name).read_text(encoding="utf-8") for name in names)
        for names in (styles, scripts)
    )
    return page.get_template(template).render(
        style=style, script=script, version=version("tdds-dist"), **context
    )


def _trainings(pool: list[Facts]) -> dict[str, Any]:
    """Return what the template shows of the trainings that prune inside, by images seen."""
    rows = training_rows(pool)
    own = [facts for facts in pool if facts.is_pruned_training]
    return {
        "dataset": _dataset_of(pool[0]),
        "rows": rows,
        "chart": images_chart(rows),
        "runs": [(run_name(facts), _provenance(facts)) for facts in own],
        "problems": [problem for facts in own for problem in facts.problems],
    }


def _pool(
    pool: list[Facts], found: list[Facts], sections: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the template shows about several runs of the same data together; `images_of` is
    the section to see them in.
    """
    rows, slots = summary_rows(pool), _colour_slots([*score_names(pool).values()])
    numbers = [
        number for number, facts in enumerate(found) if any(facts is other for other in pool)
    ]
    return {
        "dataset": sections[numbers[0]]["dataset"],
        "model": ", ".join(dict.fromkeys(sections[n]["model"] for n in numbers)),
        "runs": numbers,
        "seeds": list(dict.fromkeys(sections[number]["seed"] for number in numbers)),
        "differ": len(by_setting(pool)) > 1,
        "images_of": next((n for n in numbers if sections[n]["sheets"]["sheets"]), None),
        "rows": rows,
        "matrix": matrix(rows),
        "finding": finding(rows),
        "published": printed_tables(row["published"] for row in rows),
        "accuracy": accuracy_chart(rows, slots),
        "ablations": ablations(pool),
        "curves": curve_charts(pool, slots),
    }


def _section(
    facts: Facts, num_thumbnails: int, budget_bytes: int, is_pooled: bool, progress: Progress
) -> dict[str, Any]:
    """Return everything the template shows about one run. Of one that is pooled, charts of accuracy
    and learning are with the pool."""
    rows = summary_rows([facts])
    slots = _colour_slots([*facts.names.values()])
    origins = {name: origin(facts, coreset) for name, coreset in facts.coresets.items()}
    main = main_score(facts, origins)
    computed: dict[str, Any] = {}
    work: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {
            "scores": [
                score_facts(facts, name, origins, slots[facts.names[name]]) for name in facts.scores
            ]
        },
        lambda: {
            "coresets": [_coreset(facts, name, origins) for name in facts.coresets],
            "noise": noise(facts),
            "noise_kept": noise_table(facts, slots),
        },
        lambda: {"agreement": agreement_section(facts, main, slots)},
        lambda: {"sheets": sheets(facts, main, origins, num_thumbnails, budget_bytes)},
        lambda: {"classes": class_table(facts, main, origins)},
        lambda: {
            "accuracy": None if is_pooled else accuracy_chart(rows, slots),
            "ablations": [] if is_pooled else ablations([facts]),
            "curves": None if is_pooled else curve_charts([facts], slots),
            "speed": speed(facts),
            "speed_charts": speed_charts(facts),
        },
    )
    for part, compute in zip(_PARTS, work, strict=True):
        progress.note(f"{run_name(facts)}: {part}", now=True)
        computed |= compute()
        progress.advance()
    return computed | {
        "name": run_name(facts),
        "is_pooled": is_pooled,
        "dataset": _dataset_of(facts),
        "num_classes": facts.config.get("data", {}).get("num_classes"),
        "model": facts.config.get("model", {}).get("name", "?"),
        "train": facts.config.get("train", {}),
        "seed": facts.config.get("run", {}).get("seed"),
        "facts": facts,
        "rows": rows,
        "matrix": matrix(rows),
        "finding": finding(rows),
        "published": [] if is_pooled else printed_tables(row["published"] for row in rows),
        "main": main,
        "provenance": _provenance(facts),
    }


def _coreset(
    facts: Facts, name: str, origins: Origins
) -> tuple[str, Coreset, str | None, float | None, list[float | None]]:
    """Return a row of the coresets' table, with the score it was cut from and where, unless that is
    a random rank."""
    coreset = facts.coresets[name]
    source, cut = (None, None) if base_key(coreset.score_key) == "random" else origins[name]
    return name, coreset, source, cut, known_noise_kept(facts, coreset)


def _provenance(facts: Facts) -> dict[str, Any]:
    """Return how the run came about; `differences` are sentences about retrainings of another
    commit or other versions."""
    env = facts.env
    content = {
        f"Content of the {split} images, SHA-256": text[:16]
        for split, text in env.get("data", {}).items()
    }
    known = {
        "Run directory": str(facts.run.path),
        "Commit": env.get("commit"),
        "Processor": env.get("cpu"),
        "CPUs": env.get("num_cpus"),
        "Device": env.get("device"),
        "Ranks": env.get("world_size"),
        "Python": env.get("python"),
        **env.get("versions", {}),
        **content,
    }
    differences = []
    for key, what in (
        ("commit", "at another commit"),
        ("versions", "with other versions of packages"),
    ):
        others = [
            sub.name for sub in facts.retrained if sub.env.get(key, env.get(key)) != env.get(key)
        ]
        if others:
            rest = f" and {len(others) - 3} more" if len(others) > 3 else ""
            differences.append(
                f"Retrained {what} than the collection: {', '.join(others[:3])}{rest}."
            )
    return {
        "facts": [(term, value) for term, value in known.items() if value is not None],
        "command": shlex.join(map(str, env.get("command", []))),
        "num_ranks": env.get("world_size") or 1,
        "resumes": env.get("resumes", []),
        "differences": differences,
        "config": [
            (section, [(key, _config_text(value)) for key, value in values.items()])
            for section, values in facts.config.items()
            if isinstance(values, dict)
        ],
        "config_text": yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True),
        "env_text": json.dumps(env, indent=2, ensure_ascii=False),
    }


def _config_text(value: Any) -> str:
    """Write a value as YAML does on one line."""
    return str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _dataset_of(facts: Facts) -> str:
    """Return the name of the images' source without the folders above it, or of their file."""
    source = str(getattr(facts.manifest, "source", ""))
    beton = str(facts.config.get("data", {}).get("train", "?"))
    kind, _, folder = source.partition(":")
    return valid_utf8(
        f"{kind}: {Path(folder).name}" if "/" in folder else source or Path(beton).name
    )


def _colour_slots(keys: Sequence[str]) -> dict[str, int]:
    """Give each score a colour: the well-known ones keep theirs, variants (`tdds_balanced`) take
    what is left."""
    slots = {FULL_DATA: FULL_SLOT} | {key: _SLOTS[key] for key in keys if key in _SLOTS}
    for key in keys:
        if key not in slots:
            free = [
                slot
                for slot in (_SLOTS.get(base_key(key), 1), *range(1, 10))
                if slot not in slots.values()
            ]
            slots[key] = free[0] if free else 1 + len(slots) % 9
    return slots
