"""`tdds plan` and `doctor`: what a run will take, and what would stop it on these machines."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tdds_dist.cli.options import Parsers, add_config, config_of, shared_errors
from tdds_dist.cli.outcome import Outcome
from tdds_dist.console import log
from tdds_dist.errors import InputError
from tdds_dist.text import command

if TYPE_CHECKING:
    from tdds_dist.config.run import Config

_RANKS_OF_A_NODE = 8  # of more, a command that comes next is for a cluster


# ---- plan


def add_plan(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "plan",
        help="what a run will take, before it runs",
        description=(
            "Memory, disk, network and hours of a collection and its retrainings, from the config"
            " alone; no GPU is needed. What does not fit is refused (exit code 2), with the options"
            " that make it fit."
        ),
    )
    add_config(stage)
    ranks = stage.add_mutually_exclusive_group()
    ranks.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="G",
        help="number of ranks, on all nodes together (default: 1)",
    )
    ranks.add_argument(
        "--rehearse",
        type=int,
        metavar="W",
        help=(
            "instead, be the first, the middle and the last of W ranks in turn, without the others,"
            " and count what they send, hold and compute for scores"
        ),
    )
    stage.takes(
        "--gpu-memory SIZE",
        str,
        "of one GPU, e.g. 80GB or 79.6GiB (default: that of a visible GPU, if any)",
    )
    stage.takes(
        "--disk SIZE", str, "room for the run directory, e.g. 500GB (default: what is free there)"
    )
    stage.takes("--num-samples N", int, "training images (default: as in data.train)")
    stage.takes("--images-per-second X", float, "training speed of all ranks together")
    stage.takes(
        "--from RUN",
        Path,
        "take the speed from this run, scaled by ranks (default: the config's own, where there is"
        " one)",
        dest="measured_in",
    )
    stage.choice(
        "--strategies",
        ("E", "P"),
        "of the retrainings, which are those of the config's section pipeline (default: as there,"
        " else E)",
        nargs="+",
        metavar="E|P",
    )
    stage.set_defaults(run=plan)


def plan(options: argparse.Namespace) -> Outcome:
    from tdds_dist.experiments.forecast import parse_bytes
    from tdds_dist.experiments.forecast import plan as plan_resources

    config = config_of(options)
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
    images = {line.key: line.value for line in found.sections["run"][1]}.get("images")
    if images and config.train.global_batch_size > images:
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


# ---- doctor


def add_doctor(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "doctor",
        help="what would stop or slow a run here",
        description=(
            "Check, within a minute, what a run needs of these machines: devices, the network"
            " between the ranks, the kernel, decoding, the run directory, clocks. Alone, under"
            " torchrun, or as a job (tdds submit --stage doctor). Rank 0 prints one table; exit"
            " code 2 when something fails. Without CONFIG: what needs none."
        ),
    )
    stage.takes(
        "config CONFIG.yaml",
        Path,
        "one of configs/, or your own: its files, run directory, network and batch as well",
        nargs="?",
    )
    stage.takes("overrides key=value", str, "change a key of the config: train.lr=0.05", nargs="*")
    stage.set_defaults(run=doctor, more_checks=lambda options: [])


def doctor(options: argparse.Namespace) -> Outcome | None:
    """`options.more_checks`: of the options, the checks of a launcher."""
    if options.config is not None and "=" in str(options.config):
        raise InputError(f"{options.config} changes a key of a config; give CONFIG.yaml before it")
    config = config_of(options) if options.config else None
    with shared_errors():
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
