"""Tables of an experiment: mean and standard deviation per cell beside the published numbers, as
Markdown and CSV.

Owns averaging and layout. A cell that is missing or failed stays visible; nothing is left out
because it is bad.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdds_dist.config.experiment import Experiment
from tdds_dist.config.grid import Method
from tdds_dist.config.run import Config, load_config
from tdds_dist.data.manifest import Manifest, read_manifest
from tdds_dist.errors import InputError
from tdds_dist.experiments.grid import Cell
from tdds_dist.report.published import Printed, footnotes, images_of, lookup
from tdds_dist.runs.artifacts import write_atomically
from tdds_dist.runs.directory import RunDir, read_objects
from tdds_dist.text import MISSING, duration, markdown_table, mean_std, percent, plus_minus
from tdds_dist.training.schedule import batch_size_factor

CSV_COLUMNS = (
    "method",
    "score",
    "sampler",
    "importance",
    "variant",
    "strategy",
    "pruning_rate",
    "seed",
    "num_images",
    "epochs",
    "final_top1",
    "best_top1",
    "train_seconds",
    "published_top1",
    "published_std",
    "published_table",
    "wrong_labels_kept",
    "corrupted_kept",
)
NOISE = {
    "wrong_labels_kept": "Wrong labels in the coreset",
    "corrupted_kept": "Corrupted images in the coreset",
}


@dataclass(frozen=True)
class CellResult:
    """The outcome of one retraining of an experiment; `result` is None until it is done.

    `key` is its coreset's score and way of choosing (`Coreset.method`), empty while there is none.
    Of images known to be mislabelled or corrupted, the shares that the coreset keeps. `printed` is
    filled in by `write_tables`.
    """

    cell: Cell
    result: dict[str, Any] | None
    key: str = ""
    wrong_labels_kept: float | None = None
    corrupted_kept: float | None = None
    printed: Printed | None = None


def write_tables(
    experiment: Experiment, outcomes: Sequence[CellResult], collections: dict[int, RunDir]
) -> str:
    """Write table.md and cells.csv into the experiment's directory; return the Markdown.
    `collections` is by seed."""
    config = load_config(experiment.config, experiment.overrides)
    outcomes, printed = _beside(experiment, config, outcomes)
    full = {seed: run.read_result() for seed, run in collections.items()}
    parts = [_heading(experiment, config, outcomes, collections), _full_data(full, printed)]
    for variant in dict.fromkeys(outcome.cell.variant_name for outcome in outcomes):
        for strategy in experiment.strategies:
            group = [
                outcome
                for outcome in outcomes
                if (outcome.cell.variant_name, outcome.cell.strategy) == (variant, strategy)
            ]
            where = f"Strategy-{strategy}" + (f", retrained with {variant}" if variant else "")
            parts.append(f"## {where}\n\n{_table(experiment, group)}")
    parts.append("\n".join(footnotes([printed, *(outcome.printed for outcome in outcomes)])))
    parts += [_noise_table(experiment, outcomes, key) for key in NOISE]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(experiment.directory / "table.md", lambda file: file.write(text.encode()))
    rows = _csv(outcomes)
    write_atomically(experiment.directory / "cells.csv", lambda file: file.write(rows.encode()))
    return text


def manifest_of(config: Config) -> Manifest | None:
    """Return the manifest of the training images, where there is one."""
    try:
        return read_manifest(Path(config.data.train))
    except InputError:  # the file is gone, or another
        return None


def _beside(
    experiment: Experiment, config: Config, outcomes: Sequence[CellResult]
) -> tuple[list[CellResult], Printed | None]:
    """Return the outcomes with what the paper prints for each, and its number of the full data."""
    data, model = config.data, config.model.model_dump()
    images = images_of(data.train, data.num_classes, manifest_of(config))
    variants = {"": config} | {
        variant.name: load_config(experiment.config, [*experiment.overrides, *variant.overrides])
        for variant in experiment.variants
    }

    def printed(outcome: CellResult) -> Printed | None:
        own, rate = variants[outcome.cell.variant_name], outcome.cell.pruning_rate
        factor = batch_size_factor(rate, own.retrain.batch_size_rule)
        return lookup(
            images,
            model,
            own.model.model_dump(),
            strategy=outcome.cell.strategy,
            key=outcome.key,
            pruning_rate=rate,
            batch_size=round(own.train.global_batch_size * factor),
            importance=outcome.cell.importance,
        )

    full = lookup(images, model, model)
    return [replace(outcome, printed=printed(outcome)) for outcome in outcomes], full


def _at(outcomes: Sequence[CellResult], method: Method, rate: float) -> list[CellResult]:
    return [
        outcome
        for outcome in outcomes
        if (outcome.cell.method, outcome.cell.pruning_rate) == (method, rate)
    ]


def _cell(outcomes: Sequence[CellResult]) -> str:
    """Write a cell, 97.22 ± 0.31 over seeds; say so when some are missing."""
    done = [outcome.result["final_top1"] for outcome in outcomes if outcome.result is not None]
    text = plus_minus(*mean_std(done))
    return text if len(done) in (0, len(outcomes)) else f"{text} ({len(done)} of {len(outcomes)})"


def _table(experiment: Experiment, outcomes: Sequence[CellResult]) -> str:
    """Write methods in rows and pruning rates in columns; below a method what the paper prints,
    where it does."""
    lines = [["final top-1 (%), images removed", *map(percent, experiment.pruning_rates)]]
    for method in experiment.methods:
        mine = [_at(outcomes, method, rate) for rate in experiment.pruning_rates]
        importance = next(outcome.cell.importance for found in mine for outcome in found)
        label = method.name + (f", importance {importance}" if importance != "none" else "")
        lines.append([label, *map(_cell, mine)])
        printed = [found[0].printed if found else None for found in mine]
        if any(printed):
            values = (MISSING if number is None else f"*{number.text}*" for number in printed)
            lines.append([f"*{method.name}, published*", *values])
    return markdown_table(lines)


def _noise_table(experiment: Experiment, outcomes: Sequence[CellResult], key: str) -> str:
    """Write the share kept in percent over seeds, methods in rows and rates in columns; empty where
    nothing is known."""
    first = [
        outcome
        for outcome in outcomes  # strategies and variants share their coresets
        if (outcome.cell.variant_name, outcome.cell.strategy)
        == (outcomes[0].cell.variant_name, outcomes[0].cell.strategy)
    ]
    if all(getattr(outcome, key) is None for outcome in first):
        return ""
    lines = [["percent of them kept, images removed", *map(percent, experiment.pruning_rates)]]
    for method in experiment.methods:
        kept = [
            [
                100 * share
                for outcome in _at(first, method, rate)
                if (share := getattr(outcome, key)) is not None
            ]
            for rate in experiment.pruning_rates
        ]
        lines.append([method.name, *(plus_minus(*mean_std(shares), digits=1) for shares in kept)])
    return f"## {NOISE[key]}\n\n{markdown_table(lines)}"


def _full_data(full: dict[int, dict[str, Any] | None], printed: Printed | None) -> str:
    whole = [
        result
        for result in full.values()
        if result is not None and result["epochs"] == result["epochs_planned"]
    ]
    paper = f"; published: {printed.text}" if printed else ""
    if not whole:
        stopped = (
            "Collections stopped before the end of their schedule, so they give no accuracy on the"
            " full data"
        )
        return f"{stopped}{paper}." if any(full.values()) else ""
    seeds = f"{len(whole)} seed{'s' if len(whole) > 1 else ''}"
    return (
        f"Full data: {plus_minus(*mean_std(result['final_top1'] for result in whole))}"
        f" ({seeds}{paper})."
    )


def _heading(
    experiment: Experiment,
    config: Config,
    outcomes: Sequence[CellResult],
    collections: dict[int, RunDir],
) -> str:
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    envs = [run.read_env() for run in collections.values()]
    copies = [str(Path(env["copy_of"]).parent) for env in envs if "copy_of" in env]
    collected = [
        result
        for run, env in zip(collections.values(), envs, strict=True)
        if "copy_of" not in env and (result := run.read_result()) is not None
    ]
    env = next(filter(None, envs), {})
    training = sum(result["train_seconds"] for result in [*results, *collected])
    seconds = sum(
        record["seconds"] for record in read_objects(experiment.directory / "times.jsonl")
    )
    versions = env.get("versions", {})
    retrained = f" (retrainings {epochs})" if (epochs := config.retrain.epochs) else ""
    lines = [
        f"# {experiment.name}",
        "",
        (
            f"{config.model.name}, {config.train.epochs} epochs{retrained}, batch"
            f" {config.train.global_batch_size}, {config.data.train}; seeds"
            f" {', '.join(map(str, experiment.seeds))}; {len(results)} of {len(outcomes)}"
            " retrainings done. Mean ± standard deviation over seeds: each seed is a collection of"
            " its own, and the retraining from it."
            + "".join(
                f" {copies.count(source)} of the collections are copied from {source}."
                for source in dict.fromkeys(copies)
            )
        ),
        "",
        (
            f"{env.get('cpu', '?')} ({env.get('num_cpus', '?')} CPUs), {env.get('device', '?')},"
            f" {env.get('world_size', '?')} rank(s) per run, torch {versions.get('torch', '?')},"
            f" commit {env.get('commit', '?')}; {duration(training)} of training in"
            f" {duration(seconds)}."
        ),
    ]
    return "\n".join(lines)


def _csv(outcomes: Sequence[CellResult]) -> str:
    """Write one line per retraining, also those that are not done."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for outcome in outcomes:
        cell, result = outcome.cell, outcome.result or {}
        paper = outcome.printed
        of_paper = (paper.top1, paper.std, paper.table) if paper else (None,) * 3
        values = [
            cell.method.name,
            cell.method.score_key,
            cell.method.sampler or "",
            cell.importance,
            cell.variant_name,
            cell.strategy,
            cell.pruning_rate,
            cell.seed,
            *(result.get(key, "") for key in CSV_COLUMNS[8:13]),
            *of_paper,
            outcome.wrong_labels_kept,
            outcome.corrupted_kept,
        ]
        writer.writerow(values)
    return text.getvalue()
