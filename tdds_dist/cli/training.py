"""`tdds collect`, `train`, `retrain` and `experiment`: what trains, on one rank or on all."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdds_dist.cli.options import Parser, Parsers, add_config, config_of, shared_errors
from tdds_dist.cli.outcome import Outcome
from tdds_dist.cli.scores import select_command
from tdds_dist.errors import InputError
from tdds_dist.text import command

if TYPE_CHECKING:
    from tdds_dist.config.run import Config
    from tdds_dist.distributed.interruption import Interruption
    from tdds_dist.distributed.world import World
    from tdds_dist.runs.directory import RunDir


# ---- collect


def add_collect(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "collect",
        help="train once, score every sample",
        description=(
            "Train on all images and score each of them on the way. Under torchrun, or alone. Ends"
            " with scores/*.npz in the run directory. Stopped, by a signal or a crash, it goes on"
            " from its last checkpoint when started again, on any number of ranks that divides the"
            " batch."
        ),
    )
    add_config(stage)
    _add_fresh(stage)
    stage.set_defaults(run=collect)


def collect(options: argparse.Namespace) -> Outcome | None:
    config = config_of(options)
    with shared_errors():
        config.check_collect()
    if _is_alone():
        config.data.check_files()

    from tdds_dist.runs.directory import RunDir
    from tdds_dist.training.collect import collect as run_collect

    run = RunDir(config.run.directory)
    was_finished = run.result_file.is_file() and not options.fresh
    with _ranks(options, config) as (world, interruption):
        paths = run_collect(
            config, world, fresh=options.fresh, force=options.force, interruption=interruption
        )
        if not world.is_main:
            return None
    files = [path for path in (*paths, run.models / "final.pt") if path.is_file()]
    wrote, there = ([], files) if was_finished else (files, [])
    return Outcome(wrote, _training_numbers(run), select_command(config, run.path), there=there)


# ---- train


def add_train(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "train",
        help="one training that skips images on the way",
        description=(
            "Train once, and skip in each epoch the images that the section prune of the config"
            " says: by their scores, losses or probabilities so far. Under torchrun, or alone. Ends"
            " with models/ and result.json in the run directory, which says how many images were"
            " seen; pruning/ has the images of each epoch. Stopped, by a signal or a crash, it goes"
            " on from its last checkpoint when started again, on any number of ranks that divides"
            " the batch."
        ),
    )
    add_config(stage)
    stage.flag(
        "--schedule-only", "print epochs and images, against a full training, and do nothing"
    )
    stage.takes(
        "--images-per-second X", float, "print hours as well, at this speed of all ranks together"
    )
    _add_fresh(stage)
    stage.set_defaults(run=train)


def train(options: argparse.Namespace) -> Outcome | None:
    config = config_of(options)
    with shared_errors():
        config.check_train()
    if _is_alone():
        config.data.check_files()

    from tdds_dist.pruning.train import plan_of, schedule_table
    from tdds_dist.pruning.train import train as run_train

    if options.schedule_only:
        from tdds_dist.data.beton import inspect_split
        from tdds_dist.experiments.forecast import find_speed

        plan = plan_of(config, inspect_split(config, "train").num_samples)
        speed = options.images_per_second
        if speed is not None:
            speed, _ = find_speed(config, 1, speed, None)  # refuses what is none
        counts = [plan.num_images(epoch) for epoch in range(plan.epochs)]
        data = {
            "images": counts,
            "total": plan.total_images,
            "most": sum(plan.most_images(epoch) for epoch in range(plan.epochs)),
            "full": plan.epochs * plan.num_samples,
        }
        data["hours"] = None if speed is None else data["most"] / speed / 3600
        text = schedule_table(plan, speed)
        return Outcome(text=text, data=data, is_the_product=True)
    if options.images_per_second is not None:
        raise InputError(
            "--images-per-second belongs to --schedule-only; leave it out", shared=True
        )

    was_finished = config.run.directory.joinpath("result.json").is_file() and not options.fresh
    with _ranks(options, config) as (world, interruption):
        run = run_train(
            config, world, fresh=options.fresh, force=options.force, interruption=interruption
        )
        if not world.is_main:
            return None
    result = run.read_result() or {}
    seen = {key: result.get(key) for key in ("images_seen", "images_of_full")}
    files = [path for path in (run.result_file, run.models / "final.pt") if path.is_file()]
    wrote, there = ([], files) if was_finished else (files, [])
    return Outcome(wrote, _training_numbers(run) | seen, there=there)


# ---- retrain


def add_retrain(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "retrain",
        help="train on a coreset",
        description=(
            "Train on a coreset. Under torchrun, or alone. Writes a run directory under retrain/ of"
            " the config's run."
        ),
    )
    add_config(stage)
    stage.takes("--coreset FILE.npz", Path, "that `tdds select` wrote", required=True)
    stage.choice(
        "--strategy",
        ("E", "P"),
        "E: as many epochs as on the full data; P: as many images seen, epochs / (1 - p)",
        required=True,
    )
    stage.choice(
        "--importance", ("none", "batch", "sample"), "weight of the loss (default: the config's)"
    )
    stage.takes(
        "--name", str, "folder under retrain/ (default: coreset file, strategy, importance, seed)"
    )
    _add_fresh(stage)
    stage.set_defaults(run=retrain)


def retrain(options: argparse.Namespace) -> Outcome | None:
    config = config_of(options)
    if _is_alone():
        from tdds_dist.runs.artifacts import load_coreset

        load_coreset(options.coreset)
        config.data.check_files()

    from tdds_dist.training.retrain import retrain as run_retrain

    with _ranks(options, config) as (world, interruption):
        run = run_retrain(
            config,
            world,
            options.coreset,
            options.strategy,
            importance=options.importance,
            name=options.name,
            fresh=options.fresh,
            force=options.force,
            interruption=interruption,
        )
        if not world.is_main:
            return None
    return Outcome([run.path], _training_numbers(run), command("report", config.run.directory))


# ---- experiment


def add_experiment(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "experiment",
        help="a table: methods x pruning rates x seeds",
        description=(
            "Run a table of retrainings from one collection per seed, several at a time (--jobs),"
            " or one after the other on all ranks under torchrun. Started again, it goes on where"
            " it was. Writes table.md, cells.csv."
        ),
    )
    stage.takes("config EXPERIMENT.yaml", Path, "one of configs/experiments/, or your own")
    stage.takes(
        "overrides key=value", str, "change a key of the experiment, e.g. seeds=[0]", nargs="*"
    )
    stage.takes(
        "--jobs J",
        int,
        "runs at a time, each with its share of CPUs and GPUs (default: 1)",
        default=1,
    )
    stage.flag(
        "--force",
        "move runs that are there and of other settings aside, into before-<time>/ beside them",
    )
    stage.set_defaults(run=experiment)


def experiment(options: argparse.Namespace) -> Outcome | None:
    from tdds_dist.config.experiment import load_experiment
    from tdds_dist.config.run import load_config

    with shared_errors():
        table_of = load_experiment(options.config, options.overrides)
        config = load_config(table_of.config, table_of.overrides)

    from tdds_dist.experiments.execute import experiment as run_experiment

    started = time.perf_counter()
    if not _is_alone():
        if options.jobs != 1:
            raise InputError(
                f"--jobs={options.jobs} under torchrun, where all ranks work on one run after the"
                " other; leave it out",
                shared=True,
            )
        with _ranks(options, config) as (world, interruption):
            table, failed = run_experiment(
                table_of, force=options.force, world=world, interruption=interruption
            )
            is_main = world.is_main
    else:
        table, failed = run_experiment(table_of, jobs=options.jobs, force=options.force)
        is_main = True
    files = [table, table.with_name("cells.csv")]
    if failed:
        if is_main and not options.json and not options.quiet:
            print(Outcome(files, text=f"\n{table.read_text()}").as_text(sys.stdout))
        raise InputError(
            f"{len(failed)} runs failed ({failed[0]}); correct the cause and run the same command"
            " again",
            shared=True,
        )
    if not is_main:
        return None
    num_cells = len(files[1].read_text().splitlines()) - 1
    return Outcome(
        files,
        {"retrainings": num_cells, "seconds": time.perf_counter() - started},
        command("report", table.parent),
        text=f"\n{table.read_text()}",
    )


# ---- what several of them share


def _add_fresh(stage: Parser) -> None:
    stage.flag(
        "--fresh",
        "start over instead of going on from the last checkpoint; refused where there is a run",
    )
    stage.flag(
        "--force", "with --fresh: move the run that is there aside, into before-<time>/ in it"
    )


def _is_alone() -> bool:
    """Say whether this process is the only rank."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextmanager
def _ranks(options: argparse.Namespace, config: "Config") -> "Iterator[tuple[World, Interruption]]":
    """Join the ranks of a stage; signals ask it to leave."""
    from tdds_dist.distributed.world import session

    with (
        options.interruption as interruption,
        session(config.run.device, config.run.timeout_seconds) as world,
    ):
        yield world, interruption


def _training_numbers(run: "RunDir") -> dict[str, Any]:
    """Return the numbers of a finished collection or retraining."""
    result, records = run.read_result() or {}, run.read_metrics()
    shares = [
        record["scoring_share"] for record in records if record.get("scoring_share") is not None
    ]
    return {
        "images": result.get("num_images"),
        "epochs": result.get("epochs"),
        "seconds": result.get("train_seconds"),
        "images_per_second": result.get("median_images_per_second"),
        "final_top1": result.get("final_top1"),
        "best_top1": result.get("best_top1"),
        "memory_bytes": max((record.get("memory_bytes") or 0 for record in records), default=None),
        "scoring_share": (
            statistics.median(shares) if shares and result.get("stage") == "collect" else None
        ),
    }
