"""The report stage: run directories in, one HTML page out that loads nothing from anywhere.

Reads what the other stages left behind and computes nothing that a stage should have computed. What is missing (no
scores yet, a `.beton` that moved, an unfinished retraining) is said on the page instead of failing.

Nothing is embedded per sample except the thumbnails: histograms are binned and class tables are counts, so that
1.28 million samples give a page of the same size as a thousand.
"""

import json
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import yaml

from tdds_dist.artifacts import write_atomically
from tdds_dist.errors import InputError
from tdds_dist.published import base_key
from tdds_dist.report_images import sheets
from tdds_dist.report_scores import class_table, main_score, noise, noise_kept, origin, score_facts
from tdds_dist.report_training import FULL_SLOT, accuracy_chart, curve_charts, setting, speed
from tdds_dist.rundir import RunDir
from tdds_dist.summary import (
    FULL_DATA,
    Facts,
    count,
    decimal,
    format_summary,
    percent,
    plus_minus,
    read_facts,
    signed,
    summary_rows,
    summary_table,
)

__all__ = ["build_report", "format_summary", "summary_table"]

_SLOTS = {"random": 0, "tdds": 1, "entropy": 2, "forgetting": 3, "el2n": 4, "aum": 5, "moderate": 6, "dyn_unc": 7,
          "dual": 8, "ccs": 9}


def build_report(runs: list[RunDir], out: Path, num_thumbnails: int = 24) -> Path:
    """Write one self-contained HTML page about `runs` to `out`, with at most `num_thumbnails` images per sheet.

    Raises InputError when there is no run, or one of them is not a run directory.
    """
    if not runs:
        raise InputError("report got no run directory; name at least one, e.g. `tdds report runs/demo`")
    import jinja2

    page = jinja2.Environment(loader=jinja2.PackageLoader("tdds_dist", "page"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"count": count, "percent": percent, "decimal": decimal, "signed": signed, "plus_minus": plus_minus,
                     "duration": duration}
    sections = [_section(read_facts(run), num_thumbnails) for run in runs]
    style, script = (files("tdds_dist").joinpath("page", name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    text = page.get_template("page.html.j2").render(
        sections=sections, style=style, script=script, written=time.strftime("%Y-%m-%d %H:%M"))

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    write_atomically(Path(out), write)
    return Path(out)


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 10 s, 5 h 12 min."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _section(facts: Facts, num_thumbnails: int) -> dict[str, Any]:
    """Everything the template shows about one run."""
    rows = summary_rows(facts)
    slots = _colour_slots([*facts.names.values()])
    origins = {name: origin(facts, coreset) for name, coreset in facts.coresets.items()}
    main = main_score(facts, origins)
    data, result = facts.config.get("data", {}), facts.result or {}
    sizes = [result.get("num_images"), *(scores.fingerprint.num_samples for scores in facts.scores.values())]
    return {
        "name": facts.config.get("run", {}).get("name") or facts.run.path.name,
        "dataset": _dataset_name(str(getattr(facts.manifest, "source", "")), str(data.get("train", "?"))),
        "num_images": next((size for size in sizes if size is not None), None), "num_classes": data.get("num_classes"),
        "model": facts.config.get("model", {}).get("name", "?"), "train": facts.config.get("train", {}),
        "seed": facts.config.get("run", {}).get("seed"), "env": facts.env, "result": facts.result,
        "rows": rows, "finding": _finding(rows), "published": facts.published, "problems": facts.problems,
        "accuracy": accuracy_chart(rows, slots), "curves": curve_charts(facts, slots),
        "scores": [score_facts(facts, name, origins, slots[facts.names[name]]) for name in facts.scores], "main": main,
        "coresets": [(name, coreset, *origins[name], noise_kept(facts, coreset)) for name, coreset in facts.coresets.items()],
        "noise": noise(facts),
        "sheets": sheets(facts, main, origins, num_thumbnails), "classes": class_table(facts, main, origins),
        "speed": speed(facts),
        "config_text": yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True),
        "env_text": json.dumps(facts.env, indent=2, ensure_ascii=False),
    }


def _dataset_name(source: str, beton: str) -> str:
    """The source's name without the folders above it, or the file's."""
    kind, _, folder = source.partition(":")
    return f"{kind}: {Path(folder).name}" if "/" in folder else source or Path(beton).name


def _finding(rows: list[dict[str, Any]]) -> str | None:
    """One sentence about the largest pruning rate: always that rate and the same scores, so nothing is picked."""
    done = [row for row in rows if row["pruning_rate"] and row["final_top1"] is not None]
    rate = max((row["pruning_rate"] for row in done), default=None)
    done = [row for row in done if row["pruning_rate"] == rate]
    if len(done) > 4:
        done = [row for row in done if base_key(row["score"]) in ("tdds", "random")]
    if not done:
        return None
    parts = [f"{row['final_top1']:.2f} % with {setting(row['score_name'], row['strategy'], row['importance'])}"
             for row in done]
    full = next((f" The full data gives {row['final_top1']:.2f} %." for row in rows if row["is_reference"]), "")
    text = f"With {percent(rate)} of the images removed, top-1 is {'; '.join(parts)}.{full}"
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace("top-1", "top\N{NON-BREAKING HYPHEN}1")


def _colour_slots(keys: Sequence[str]) -> dict[str, int]:
    """A colour per score: the well-known ones keep theirs, variants (`tdds_balanced`) take what is left."""
    slots = {FULL_DATA: FULL_SLOT} | {key: _SLOTS[key] for key in keys if key in _SLOTS}
    for key in keys:
        if key not in slots:
            free = [slot for slot in (_SLOTS.get(base_key(key), 1), *range(1, 10)) if slot not in slots.values()]
            slots[key] = free[0] if free else 1 + len(slots) % 9
    return slots
