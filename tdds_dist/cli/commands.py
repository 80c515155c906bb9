"""The commands: each function takes the parsed options, runs a stage, and returns its `Outcome`, on
the main rank.

Stages are imported when they run: `tdds --help` and a wrong path should not wait for torch.
"""

import argparse
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdds_dist.cli.outcome import Outcome
from tdds_dist.console import log
from tdds_dist.errors import InputError
from tdds_dist.text import command, printable

if TYPE_CHECKING:
    from tdds_dist.config.run import Config
    from tdds_dist.data.sources import Source
    from tdds_dist.distributed.interruption import Interruption
    from tdds_dist.distributed.world import World
    from tdds_dist.runs.directory import RunDir

_USUAL_RATE = "0.5"  # in a command that comes next, where nothing says which
EXIT_TERMINATED = 143  # by SIGTERM, where there is nothing to save
_RANKS_OF_A_NODE = 8  # of more, a command that comes next is for a cluster


@contextmanager
def _shared() -> Iterator[None]:
    """Mark an InputError raised inside as shared by all ranks, which read the same files and
    options."""
    try:
        yield
    except InputError as error:
        error.shared = True
        raise


@contextmanager
def _ranks(options: argparse.Namespace, config: "Config") -> "Iterator[tuple[World, Interruption]]":
    """Join the ranks of a stage; signals ask it to leave."""
    from tdds_dist.distributed.world import session

    with (
        options.interruption as interruption,
        session(config.run.device, config.run.timeout_seconds) as world,
    ):
        yield world, interruption


def _load_config(options: argparse.Namespace) -> "Config":
    from tdds_dist.config.run import load_config

    with _shared():
        return load_config(options.config, options.overrides)


def _is_alone() -> bool:
    """Say whether this process is the only rank."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


# ---- images


def write(options: argparse.Namespace) -> Outcome:
    from tdds_dist.data.corruptions import KINDS
    from tdds_dist.data.manifest import manifest_path
    from tdds_dist.data.pixels import pixel_rules, summary
    from tdds_dist.data.sources import (
        open_source,
        with_corruption,
        with_label_noise,
        with_new_labels,
        with_threshold_samples,
    )
    from tdds_dist.data.writer import write_beton

    # an exception, so that temporary files go
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    started = time.perf_counter()
    source = open_source(
        options.source,
        options.split,
        options.subset,
        holdout=options.holdout,
        seed=options.seed,
        formats=options.formats,
        strict=options.strict,
        pixels=pixel_rules(options.exif, options.background, options.grey_range),
        image_field=options.image_field,
        label_field=options.label_field,
    )
    source = with_corruption(
        with_label_noise(source, options.label_noise, options.seed), options.corrupt, options.seed
    )
    if options.relabel:
        source = with_new_labels(source, options.relabel)
    if options.threshold_samples is not None:
        source = with_threshold_samples(source, options.threshold_samples, options.seed)
    noisy = options.label_noise > 0 or source.corruption is not None
    if noisy and source.split == "val":
        log.warning(
            "images for evaluation should stay clean; leave out --label-noise and --corrupt with"
            " --split val"
        )
    manifest = write_beton(
        source,
        options.out,
        max_resolution=options.max_resolution,
        write_mode=options.write_mode,
        quality=options.quality,
        num_workers=options.num_workers,
        overwrite=options.overwrite,
    )
    seconds = time.perf_counter() - started
    numbers: dict[str, Any] = {
        "images": manifest.num_samples,
        "classes": manifest.num_classes,
        "left_out": source.num_left_out,
        "seconds": seconds,
        "images_per_second": manifest.num_samples / seconds,
    }
    notes = [
        f"classes: {_first_and_last(manifest.class_names)}",
        *source.notes,
        *summary(source.tally, manifest.settings),
    ]
    if noisy:
        corruption = manifest.corruption or []
        numbers |= {
            "changed_labels": 0 if manifest.noisy_N is None else int(manifest.noisy_N.sum()),
            "corrupted_images": len(corruption) - corruption.count(""),
        }
        by_kind = ", ".join(f"{corruption.count(kind)} {kind}" for kind in KINDS)
        notes.append(
            f"noise (seed {options.seed}): {numbers['changed_labels']} labels changed,"
            f" {numbers['corrupted_images']} images corrupted ({by_kind})"
        )
    if options.relabel:
        numbers["relabelled"] = manifest.settings["relabelled"]
        files = ", ".join(map(str, options.relabel))
        notes.append(f"labels of {numbers['relabelled']} images are those of {files}")
    then, more = _after_write(options, source)
    return Outcome([options.out, manifest_path(options.out)], numbers, then, [*notes, *more])


def _first_and_last(names: list[str]) -> str:
    """List names; of many the first three and the last."""
    shown = [printable(name) for name in names]
    return ", ".join(shown if len(shown) <= 10 else [*shown[:3], "...", shown[-1]])


def _after_write(options: argparse.Namespace, source: "Source") -> tuple[str, list[str]]:
    """Return the command for the other split, or for the collection when both are there; and notes
    about it."""
    other = "val" if source.split == "train" else "train"
    name = options.out.name
    file = options.out.with_name(
        name.replace(source.split, other)
        if source.split in name
        else f"{options.out.stem}_{other}.beton"
    )
    usual = {"max_resolution": None, "write_mode": "jpg", "quality": 90, "formats": "pillow"}
    usual |= {"exif": "turn", "background": "white", "grey_range": None}
    usual |= {"image_field": "", "label_field": "", "threshold_samples": None}
    given = _given(options, usual)
    if file.is_file():
        files = {source.split: options.out, other: file}
        settings = [
            f"data.train={files['train']}",
            f"data.val={files['val']}",
            f"data.num_classes={len(source.class_names)}",
        ]
        return command("collect", "CONFIG.yaml", *settings), [
            "CONFIG.yaml: one of configs/, or a copy of it with your settings"
        ]
    if options.holdout:
        given += ["--holdout", options.holdout, "--seed", options.seed]
    if options.holdout or source.other or other in source.splits:
        spec = source.other or options.source
        return command("write", spec, file, "--split", other, *given), []
    if other == "train":
        return "", [f"no train split here: write the images for training to {file}"]
    if len(source) <= len(source.class_names):
        return "", [f"no val split here: write images for evaluation to {file}"]
    given += _given(options, {"subset": None, "label_noise": 0, "corrupt": 0, "seed": 0})
    return command("write", options.source, options.out, *given, "--holdout", 0.1, "--overwrite"), [
        "no val split here: write another folder with images of the same classes to"
        f" {file}, or hold a part of these out:"
    ]


def _given(options: argparse.Namespace, usual: dict[str, Any]) -> list[Any]:
    """Return the options that are not as usual, as words of a command."""
    words = []
    for name, usual_value in usual.items():
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value != usual_value:
            # argparse takes a word that begins with a dash for an option
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, value]
    return words


def check(options: argparse.Namespace) -> Outcome:
    from tdds_dist.data.check import check as check_file

    result = check_file(
        options.beton,
        quick=options.quick,
        num_workers=options.num_workers,
        image_field=options.image_field,
        label_field=options.label_field,
    )
    show = log.error if options.quiet or options.json else print
    for line in result.fault_lines():
        show(line)
    if result.faults and show is print:
        print(result.summary())
    result.require_sound()
    return Outcome(
        numbers={
            "checked": result.num_checked,
            "seconds": result.seconds,
            "images_per_second": result.num_checked / max(result.seconds, 1e-9),
        },
        text=result.summary(),
        says_all=True,
    )


# ---- trainings


def plan(options: argparse.Namespace) -> Outcome:
    from tdds_dist.experiments.forecast import parse_bytes
    from tdds_dist.experiments.forecast import plan as plan_resources

    config = _load_config(options)
    if options.rehearse is not None:
        return _rehearse(options, config)
    found = plan_resources(
        config,
        num_ranks=options.gpus,
        num_samples=options.num_samples,
        strategies=options.strategies,
        gpu_memory_bytes=parse_bytes(options.gpu_memory, "--gpu-memory"),
        disk_bytes=parse_bytes(options.disk, "--disk"),
        images_per_second=options.images_per_second,
        measured_in=options.measured_in,
    )
    if (
        images := next(
            (line.value for line in found.sections["run"][1] if line.key == "images"), None
        )
    ) and (config.train.global_batch_size > images):
        step = options.gpus * config.train.accumulation
        fits = (
            f"; train.global_batch_size={int(images) // step * step} fits"
            if images >= step
            else "; lower it"
        )
        log.warning(
            f"train.global_batch_size={config.train.global_batch_size} is larger than the"
            f" {int(images)} images and repeats some to fill up{fits}"
        )
    stage = "collect" if config.prune.method == "none" else "train"
    if options.gpus <= _RANKS_OF_A_NODE:
        then = command(stage, options.config, *options.overrides, ranks=options.gpus)
    else:
        only = ("--stage", stage) if stage == "train" else ()
        words = (options.config, *options.overrides, "--cluster", "CLUSTER.yaml")
        then = command("submit", *words, *only)
    return Outcome(next=then, text=found.as_text(), data=found.as_json(), is_the_product=True)


def _rehearse(options: argparse.Namespace, config: "Config") -> Outcome:
    from tdds_dist.experiments.rehearsal import rehearse

    for name in ("gpu_memory", "disk", "images_per_second", "measured_in", "strategies"):
        if getattr(options, name) is not None:
            option = "--from" if name == "measured_in" else f"--{name.replace('_', '-')}"
            raise InputError(f"{option} means nothing with --rehearse; leave one of them out")
    found = rehearse(config, options.rehearse, options.num_samples)
    return Outcome(text=found.as_text(), data=found.as_json(), is_the_product=True)


def doctor(options: argparse.Namespace) -> Outcome | None:
    """`options.more_checks`: of the options, the checks of a launcher."""
    if options.config is not None and "=" in str(options.config):
        raise InputError(f"{options.config} changes a key of a config; give CONFIG.yaml before it")
    config = _load_config(options) if options.config else None
    with _shared():
        more = options.more_checks(options)

    from tdds_dist.experiments.doctor import doctor as examine_all

    table, data, failed = examine_all(config, more)
    return Outcome(
        text=table,
        data=data,
        is_the_product=True,
        failure=f"{', '.join(failed)} failed; the table has the way out" if failed else "",
        exit_code=2 if failed else 0,
    )


def collect(options: argparse.Namespace) -> Outcome | None:
    config = _load_config(options)
    with _shared():
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


def train(options: argparse.Namespace) -> Outcome | None:
    config = _load_config(options)
    with _shared():
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


def select_command(config: "Config", directory: Path, score: str = "") -> str:
    """Return the command that makes coresets of a run at every rate that a window serves, by a
    score; without one by the windows, or by the first of them where none serves a rate."""
    served = [f"{rate:g}" for rate in config.served_rates if rate]
    if not served:
        score = score or config.windows()[0].key(config.score.preset)
    return command(
        "select",
        directory,
        "--pruning-rate",
        *(served or [_USUAL_RATE]),
        *(["--score", score] if score else []),
    )


def retrain(options: argparse.Namespace) -> Outcome | None:
    config = _load_config(options)
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


def experiment(options: argparse.Namespace) -> Outcome | None:
    from tdds_dist.config.experiment import load_experiment
    from tdds_dist.config.run import load_config

    with _shared():
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


# ---- scores and coresets


def score(options: argparse.Namespace) -> Outcome | None:
    many = options.all or options.score
    of_tdds = [name for name in ("preset", "T", "K", "beta") if getattr(options, name) is not None]
    of_tdds += ["delta"] * (options.delta != "kl")
    if options.all and options.score:
        raise InputError("--all and --score exclude each other; leave one out")
    if options.final_pass:
        names = ("all", "score", *of_tdds, "beton", "out")
        given = [f"--{name}" for name in names if name in of_tdds or getattr(options, name)]
        if others := [*given, *options.overrides]:
            raise InputError(
                f"--final-pass stands alone, without {others[0]}; run the other command separately"
            )
        return _final_pass(options)
    if many and of_tdds:
        raise InputError(
            f"--{of_tdds[0]} belongs to `tdds score` without --all and --score, which take the"
            " windows of the run's config; run it separately"
        )
    if options.overrides and not many:
        raise InputError(
            f"{options.overrides[0]} is an option of --all and --score KEY; TDDS alone takes --T,"
            " --K, --beta, --preset, --delta"
        )

    from tdds_dist.scoring.offline import score as score_tdds
    from tdds_dist.scoring.offline import score_all

    started, skipped = time.perf_counter(), list[str]()
    if many:
        paths, skipped = score_all(
            options.source,
            options.score,
            options=options.overrides,
            beton=options.beton,
            out=options.out,
        )
        for reason in skipped:
            log.warning(f"not computed: {reason}")
    else:
        paths = score_tdds(
            options.source,
            preset=options.preset,
            T=options.T,
            K=options.K,
            beta=options.beta,
            delta=options.delta,
            beton=options.beton,
            out=options.out,
        )
    return Outcome(
        paths,
        {"scores": len(paths), "seconds": time.perf_counter() - started},
        _after_score(options, paths),
    )


def _after_score(options: argparse.Namespace, paths: list[Path]) -> str:
    """Return the command for coresets by the new scores, at the rates of the run's config; "" while
    the run is not finished."""
    from tdds_dist.config.run import parse_config
    from tdds_dist.runs.directory import RunDir

    run, ranked = RunDir(options.source), [path for path in paths if path.stem != "random"]
    if not ranked:
        return ""
    if not run.config_file.is_file() or options.out is not None:
        return command("select", ranked[0], "--pruning-rate", _USUAL_RATE)
    if not run.result_file.is_file():
        return ""
    config = parse_config(run.read_config(), str(run.config_file))
    if {window.key(config.score.preset) for window in config.windows()} <= {
        path.stem for path in ranked
    }:
        return select_command(config, run.path)
    return select_command(config, run.path, ranked[0].stem)


def _final_pass(options: argparse.Namespace) -> Outcome | None:
    from tdds_dist.config.run import parse_config
    from tdds_dist.runs.directory import RunDir

    run = RunDir(options.source)
    with _shared():
        config = parse_config(run.read_config(), str(run.config_file))

    from tdds_dist.distributed.world import session
    from tdds_dist.training.final_pass import final_pass

    started = time.perf_counter()
    with session(config.run.device, config.run.timeout_seconds) as world:
        paths = final_pass(options.source, world)
        if not world.is_main:
            return None
    return Outcome(
        paths,
        {"scores": len(paths), "seconds": time.perf_counter() - started},
        command("select", options.source, "--pruning-rate", _USUAL_RATE, "--score", paths[0].stem),
    )


def select(options: argparse.Namespace) -> Outcome:
    from tdds_dist.config.grid import options_of_sampler
    from tdds_dist.coreset.select import changes, check_place, plan_coreset, put

    sampler = "ccs" if options.score == "ccs" else options.sampler
    given = {
        key: value
        for key in ("num_strata", "hard_cutoff_rate", "c_d")
        if (value := getattr(options, key)) is not None
    }
    if wrong := [key for key in given if key not in options_of_sampler(sampler, options.score)]:
        raise InputError(
            f"--{wrong[0].replace('_', '-')} does nothing with sampler {sampler or 'top'}; leave it"
            f" out, or choose --sampler {'beta' if wrong[0] == 'c_d' else 'ccs'}"
        )
    rates = list(dict.fromkeys(options.pruning_rate))
    if options.out is not None and len(rates) > 1:
        raise InputError(
            f"--out={options.out} names one file, and there are {len(rates)} pruning rates; leave"
            " it out, or give one rate"
        )
    given |= {
        "sampler": options.sampler,
        "class_balanced": options.class_balanced,
        "seed": options.seed,
        "out": options.out,
    }
    # all, before one is written
    made = [plan_coreset(options.source, rate, score=options.score, **given) for rate in rates]
    for path, coreset, _ in made:
        check_place(path, coreset, options.force)
    there = [path for path, coreset, _ in made if path.exists() and not changes(path, coreset)]
    rows, notes = list[dict[str, Any]](), list[str]()
    for path, coreset, warnings in made:
        for warning in [*warnings, *put(path, coreset)]:
            log.warning(
                warning + (f" (pruning rate {coreset.pruning_rate:g})" if len(rates) > 1 else "")
            )
        kept, images = len(coreset.index_M), coreset.fingerprint.num_samples
        rows.append(
            {
                "path": str(path),
                "method": coreset.method,
                "pruning_rate": coreset.pruning_rate,
                "kept": kept,
                "images": images,
            }
        )
        notes.append(
            f"kept at {coreset.pruning_rate:g}: {kept} of {images} images by {coreset.method}"
        )
    paths = [path for path, _, _ in made]
    return Outcome(
        [path for path in paths if path not in there],
        {"coresets": len(paths)},
        _retrain_command(options.source, paths[0]),
        notes,
        rows=rows,
        there=there,
    )


def _retrain_command(source: Path, coreset: Path) -> str:
    """Return the command that retrains with the config of the run, on as many ranks as it was
    collected on."""
    from tdds_dist.runs.directory import RunDir

    directory = source if source.is_dir() else source.parent.parent
    run = RunDir(directory)
    if not run.config_file.is_file():
        return command("retrain", "CONFIG.yaml", "--coreset", coreset, "--strategy", "E")
    ranks = run.read_env().get("world_size", 1)
    return command("retrain", run.config_file, "--coreset", coreset, "--strategy", "E", ranks=ranks)


# ---- results, and other tools


def check_out(out: Path | None, holds: str) -> None:
    """Raise InputError where `--out` names a file that is no earlier one of this stage, all of
    which hold the text `holds`."""
    if out is not None and out.is_file() and holds.encode() not in out.read_bytes():
        raise InputError(
            f"--out={out} is there and was not written by this stage; choose another name, or move"
            " it away"
        )


def compare(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.compare import COLUMNS
    from tdds_dist.coreset.compare import compare as compare_runs

    check_out(options.out, ",".join(COLUMNS))
    text = compare_runs(options.runs, pruning_rates=options.pruning_rates, out=options.out)
    if options.quiet or options.json:  # where the text does not show them
        for line in text.rpartition("\n\n")[2].splitlines():
            if line.startswith("note: "):
                log.warning(line.removeprefix("note: "))
    return Outcome([options.out or options.runs[0] / "compare.csv"], text=text, says_all=True)


def suspects(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.suspects import COLUMNS, find_suspects
    from tdds_dist.report.review import write_review
    from tdds_dist.runs.artifacts import write_atomically
    from tdds_dist.runs.directory import RunDir

    if options.num < 1:
        raise InputError(f"--num={options.num} must be at least 1: it is the images in the page")
    run = RunDir(options.runs[0])
    folder = options.out or run.suspects
    table, page = folder / "suspects.csv", folder / "review.html"
    check_out(table, ",".join(COLUMNS) + "\n1,")  # with a column more it is somebody's work
    check_out(page, "tdds suspects")
    found = find_suspects(options.runs, options.score)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(table, lambda file: file.write(found.table().encode("utf-8", "replace")))
        said = write_review(found, run, page, options.num, options.score)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}); choose a folder by --out") from error
    for note in said:
        log.warning(note)
    notes = []
    numbers: dict[str, Any] = {"images": len(found.order)}
    if found.wrong_N is not None:
        numbers["called_wrong"] = int(found.wrong_N.sum())
    if not found.guess:
        then = command("score", run.path, "--final-pass")
        notes.append(f"what the network takes images for is not recorded; `{then}` adds it")
    return Outcome([table, page], numbers, f"open {page} in a browser", notes)


def export(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.export import export as write_for_others

    paths, notes = write_for_others(
        options.source,
        options.format,
        options.out,
        pruning_rates=options.pruning_rates,
        ranks=options.ranks,
        beton=options.beton,
    )
    return Outcome(paths, notes=[f"note: {note}" for note in notes])


def import_(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.import_scores import import_scores

    path = import_scores(
        options.source,
        key=options.key,
        column=options.column,
        data_mask=options.data_mask,
        beton=options.beton,
        run=options.run_directory,
        out=options.out,
    )
    return Outcome([path], next=command("select", path, "--pruning-rate", _USUAL_RATE))


def report(options: argparse.Namespace) -> Outcome:
    from tdds_dist.report.accuracy import format_trainings, training_rows
    from tdds_dist.report.page import build_report
    from tdds_dist.report.read import read_facts
    from tdds_dist.report.results import find_runs, format_summary, pools, summary_tables

    check_out(options.out, "Written by <code>tdds report</code>")
    runs = find_runs(options.runs)
    path = build_report(runs, options.out or options.runs[0] / runs[0].report_file.name)
    found = summary_tables(facts := [*map(read_facts, runs)])
    trained = [
        ([str(each.run.path) for each in pool], rows)
        for pool in pools(facts)
        if (rows := training_rows(pool))
    ]
    tables = [f"\n{title}\n{format_summary(rows)}" for title, rows in found]
    tables += [
        f"\nby images seen, {len(paths)} runs from {paths[0]} on\n{format_trainings(rows)}"
        for paths, rows in trained
    ]
    return Outcome(
        [path],
        {"retrainings": sum(row["name"] != "collect" for _, rows in found for row in rows)},
        f"open {path} in a browser",
        text="\n".join([*tables, ""]),
        rows=[
            {
                "about": title.splitlines(),
                **row,
                "published": row["published"] and row["published"]._asdict(),
            }
            for title, rows in found
            for row in rows
        ]
        + [{"about": paths, **row} for paths, rows in trained for row in rows],
    )
