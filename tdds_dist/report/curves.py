"""Sections of the report about training runs: learning curves, throughput and memory over time.

Owns what those sections show; files were read by `read`. Gives plain values and SVG to the
templates in `templates/`. Epochs are counted from 1 here, as everywhere a person reads them; files
count from 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.report import charts
from tdds_dist.report.accuracy import free_marker
from tdds_dist.report.read import FULL_DATA, Facts, Retrained, grouped, score_names, with_several
from tdds_dist.report.results import by_setting, run_name, variants
from tdds_dist.text import percent

FULL_RETRAINED_SLOT = 98  # colour of a retraining on the full data, a grey
# line widths: one of the trainings behind a mean; what lies below a line that may be the same
_THIN, _WIDE = 0.6, 3.5
_UNKNOWN = 2.0  # in place of a pruning rate that no file says


@dataclass(frozen=True)
class _Run:
    """One training for the charts; `rate` is None for the full data, which every chart shows."""

    series: str
    label: str
    slot: int
    where: str  # in which collections, where settings differ
    is_finished: bool
    metrics: list[dict[str, Any]]
    more: str = ""  # what tells it from others of its series
    rate: float | None = None
    epochs: int | None = None
    dashed: bool = False
    width: float = 1.5
    importance: str = "none"


def curve_charts(pool: Sequence[Facts], slots: dict[str, int]) -> dict[str, Any] | None:
    """Draw validation top-1 and training loss by epoch, a pair of charts per pruning rate; seeds of
    one setting as their mean.

    `charts`: SVG, pair after pair; `legend`: a line per series; `has_seeds`: whether means are
    drawn.
    """
    names = score_names(pool)
    runs = _told_apart(
        [
            run
            for label, group in by_setting(pool)
            for variant in [variants(group)]
            for facts in group
            for run in _runs(facts, slots, names, variant, label, say_run=len(pool) > 1)
        ]
    )
    series = dict.fromkeys(run.series for run in runs)
    keys = {name: f"c{number}" for number, name in enumerate(series)}
    pruned = sorted({run.rate for run in runs if run.rate is not None})
    rates: list[float | None] = [*pruned] or [None]
    found, legend, has_seeds = [], dict[str, charts.Line](), False
    for rate in rates:
        for key, title in (("val_top1", "validation top-1 (%)"), ("train_loss", "training loss")):
            values = [value for run in runs for value in _by_epoch(run.metrics, key).values()]
            lines = _lines([run for run in runs if run.rate in (None, rate)], key, keys)
            if not lines:
                continue
            legend |= {
                line.label: line
                for line in lines
                if line.width != _THIN and line.label not in legend
            }
            has_seeds = has_seeds or any(line.width == _THIN for line in lines)
            last = ", ".join(
                f"{line.label} {line.y[-1]:.4g}" for line in lines if line.width != _THIN
            )
            head = title if rate is None else f"{percent(rate)} removed: {title}"
            svg = charts.line_chart(
                lines,
                head,
                "epoch",
                f"{head} by epoch. Last values: {last}.",
                may_be_log=key == "train_loss",
                y_range=(min(values), max(values)),
            )
            found.append(svg)
    if not found:
        return None
    return {
        "charts": found,
        "has_seeds": has_seeds,
        "legend": sorted(legend.values(), key=lambda line: [*keys.values()].index(line.series)),
    }


def _told_apart(runs: list[_Run]) -> list[_Run]:
    """Add to the name of each series what distinguishes it from the others, its epochs too where
    these differ at a rate."""
    setting = attrgetter("series", "more", "where", "rate")
    several = with_several((setting(run), run.epochs) for run in runs if run.epochs is not None)

    def named(run: _Run) -> _Run:
        is_told = setting(run) in several and run.epochs is not None
        epochs = f", {run.epochs} epochs" if is_told else ""
        told = (f", {run.more}" if run.more else "") + epochs
        series = f"{run.series[:-1]}{told})" if run.series.endswith(")") else run.series + told
        return replace(run, series=series + run.where, label=run.label + epochs)

    return [named(run) for run in runs]


def _runs(
    facts: Facts,
    slots: dict[str, int],
    names: dict[str, str],
    variant: Mapping[tuple[Path, str], str],
    label: str,
    say_run: bool,
) -> Iterable[_Run]:
    """List the collection and every retraining of a run directory."""
    where = f" in {label}" if label else ""
    name = f", {run_name(facts)}" if say_run else ""
    series, slot, is_finished = f"{FULL_DATA}, collection", charts.FULL_SLOT, bool(facts.result)
    yield _Run(series, f"collection{name}", slot, where, is_finished, facts.metrics)
    for sub in facts.retrained:
        rate = sub.setting.get("pruning_rate")
        importance = sub.setting.get("importance") or "none"
        more = variant[facts.run.path, sub.name]
        slot = FULL_RETRAINED_SLOT if rate == 0 else slots[names[sub.score]]
        series = f"{names[sub.score]} ({sub.strategy}, {importance})"
        if rate == 0:
            series = f"{FULL_DATA}, retrained"
        elif None in (sub.strategy, rate):
            series = sub.name
        yield _Run(
            series,
            _run_label(sub, names, more) + name,
            slot,
            where,
            sub.result is not None,
            sub.metrics,
            more,
            rate or None,
            sub.setting.get("epochs"),
            sub.strategy == "P",
            _WIDE if rate == 0 else 1.5,
            importance,
        )


def _lines(runs: list[_Run], key: str, keys: dict[str, str]) -> list[charts.Line]:
    """Make a line per series; of several trainings the mean, and each by itself as a thin line."""
    known = [(run, value) for run in runs if (value := _by_epoch(run.metrics, key))]
    by_series = grouped(known, lambda member: member[0].series)
    looks = [(members[0][0].slot, members[0][0].dashed) for members in by_series.values()]
    lines, markers = list[charts.Line](), dict[tuple[int, bool], list[str]]()

    def line(run: _Run, value: dict[int, float], **look: Any) -> charts.Line:
        return charts.Line(
            run.series,
            [*value],
            [*value.values()],
            run.slot,
            dashed=run.dashed,
            series=keys[run.series],
            **look,
        )

    for series, members in by_series.items():
        first = members[0][0]
        look = (first.slot, first.dashed)
        taken = markers.setdefault(look, [])
        marker = free_marker(first.importance, taken) if looks.count(look) > 1 else ""
        taken.append(marker)
        title, mean = first.label, members[0][1]
        if len(members) > 1:
            finished = [value for run, value in members if run.is_finished]
            title, mean = f"{series}: mean of {len(finished)}", _mean(finished, of_all=True)
            width, opacity = (_THIN, 0.35) if mean else (first.width, 1.0)
            for run, value in members:
                lines.append(line(run, value, title=run.label, width=width, opacity=opacity))
        if mean:
            lines.append(line(first, mean, marker=marker, title=title, width=first.width))
    # means lie on top
    return sorted(lines, key=lambda line: (line.width != _THIN, line.width != _WIDE))


def _by_epoch(metrics: list[dict[str, Any]], key: str) -> dict[int, float]:
    """Return what is recorded under a key, by epoch."""
    return {record["epoch"] + 1: record[key] for record in metrics if record.get(key) is not None}


def _mean(values: list[dict[int, float]], of_all: bool = False) -> dict[int, float]:
    """Average at each epoch over those that have a value there, or over the epochs that `of_all`
    have one."""
    by_epoch = {
        epoch: [value[epoch] for value in values if epoch in value]
        for epoch in sorted({epoch for value in values for epoch in value})
    }
    return {
        epoch: float(np.mean(found))
        for epoch, found in by_epoch.items()
        if not of_all or len(found) == len(values)
    }


def _run_label(sub: Retrained, names: dict[str, str], more: str = "") -> str:
    """Name a run: tdds 50 %, E, batch, train.lr=0.02, seed 0; by its directory where nothing else
    is known."""
    rate, importance, seed = (
        sub.setting.get(key) for key in ("pruning_rate", "importance", "seed")
    )
    pruned = f" {percent(rate)}" if rate else ""
    label = (
        f"{names[sub.score]}{pruned}, {sub.strategy}, {importance}{', ' if more else ''}{more},"
        f" seed {seed}"
    )
    return (sub.name if None in (rate, sub.strategy) else label) + (
        "" if sub.result else " (unfinished)"
    )


def speed(facts: Facts) -> list[dict[str, Any]]:
    """Return medians over epochs, without the first one where there are others, which includes
    compilation and cold caches."""
    variant = variants([facts])
    labels = [
        _run_label(sub, facts.names, variant[facts.run.path, sub.name]) for sub in facts.retrained
    ]
    runs: list[Facts | Retrained] = [facts, *facts.retrained]
    rows = []
    for name, run in zip(["collect", *labels], runs, strict=True):
        median = partial(_median, run.metrics[1:] or run.metrics)
        rows.append(
            {
                "name": name,
                "epochs": len(run.metrics),
                "world_size": run.env.get("world_size"),
                "resumes": len(run.env.get("resumes", [])),
                "images_per_second": median("images_per_second"),
                "epoch_seconds": median("epoch_seconds"),
                "scoring_share": median("scoring_share") if name == "collect" else None,
                "memory_bytes": median("memory_bytes"),
                "train_seconds": (run.result or {}).get("train_seconds"),
            }
        )
    return rows


def _median(metrics: list[dict[str, Any]], key: str) -> float | None:
    values = [*_by_epoch(metrics, key).values()]
    return float(np.median(values)) if values else None


def speed_charts(facts: Facts) -> dict[str, Any] | None:
    """Draw images per second, memory and scoring share by epoch: the collection, and the mean of
    the retrainings at each rate.

    `charts`: SVG; `legend`: lines; `resumes`: epochs in which the collection went on after a stop,
    marked in the charts.
    """
    groups: dict[float | None, list[list[dict[str, Any]]]] = {None: [facts.metrics]}
    for sub in facts.retrained:
        rate = sub.setting.get("pruning_rate")
        groups.setdefault(_UNKNOWN if rate is None else rate, []).append(sub.metrics)
    groups = dict(sorted(groups.items(), key=lambda item: -1.0 if item[0] is None else item[0]))
    resumes = [
        entry["epoch"] + 1
        for entry in facts.env.get("resumes", [])
        if entry.get("epoch") is not None
    ]
    found, legend = [], dict[str, charts.Line]()
    for key, title, scale in (
        ("images_per_second", "images per second", 1.0),
        ("memory_bytes", "memory (GB)", 1e9),
        ("scoring_share", "scoring share of the collection (%)", 0.01),
    ):
        lines = []
        for number, (rate, members) in enumerate(groups.items()):
            if key == "scoring_share" and rate is not None:
                continue
            mean = _mean([_by_epoch(metrics, key) for metrics in members])
            if mean:
                slot = charts.FULL_SLOT if rate is None else FULL_RETRAINED_SLOT
                lines.append(
                    charts.Line(
                        _rate_label(rate, len(members)),
                        [*mean],
                        [value / scale for value in mean.values()],
                        slot if not rate else 1 + (number - 1) % 9,
                        series=f"t{number}",
                    )
                )
        if lines:
            typical = ", ".join(f"{line.label} {float(np.median(line.y)):.4g}" for line in lines)
            found.append(
                charts.line_chart(
                    lines,
                    title,
                    "epoch",
                    f"{title} by epoch. Medians: {typical}.",
                    marks=resumes,
                    from_zero=True,
                )
            )
            legend = {line.label: line for line in lines} | legend
    return {"charts": found, "legend": [*legend.values()], "resumes": resumes} if found else None


def _rate_label(rate: float | None, num_runs: int) -> str:
    """Name the runs of a pruning rate: "collection", or "50 % removed (mean of 10)"."""
    if rate is None:
        return "collection"
    text = f"{percent(rate)} removed" if rate else f"{FULL_DATA}, retrained"
    return ("pruning rate not known" if rate == _UNKNOWN else text) + (
        f" (mean of {num_runs})" if num_runs > 1 else ""
    )
