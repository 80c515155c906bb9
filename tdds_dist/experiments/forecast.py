"""Stage `plan`: what a collection and its retrainings will take, before anything runs, and which
option makes it fit.

`needs` says what is needed; this stage compares it with what there is. Nothing is written. An
option that an error names was planned with in full.
"""

import math
import re
import shutil
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from tdds_dist.config.run import Config, parse_config
from tdds_dist.errors import InputError
from tdds_dist.experiments.grid import pipeline_cells
from tdds_dist.experiments.needs import (
    Case,
    Line,
    Training,
    as_trained,
    assumptions,
    check_batches,
    disk_lines,
    host_lines,
    list_trainings,
    memory_lines,
    network_lines,
    read_images,
    run_lines,
    size,
)
from tdds_dist.runs.directory import RunDir
from tdds_dist.training.schedule import batch_size_factor

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")
_UNITS = {
    "": 1,
    "B": 1,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_LEAST_WITHOUT_UNIT = 1e6  # bytes; a smaller number was probably meant in gigabytes

Way = tuple[str, Case]  # an option as it is typed, and the case with it


@dataclass(frozen=True)
class Plan:
    """All numbers of a plan."""

    title: str
    sections: dict[str, tuple[str, list[Line]]]  # name in JSON -> heading, lines
    trainings: list[Training]
    num_ranks: int
    unit: str  # what a rank is called
    assumed: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the numbers of the text, by name."""
        numbers = {
            name: {line.key: line.value for line in lines}
            for name, (_, lines) in self.sections.items()
        }
        trainings = [
            asdict(training)
            | {
                "images_seen": training.images_seen,
                "rank_hours": self._rank_hours(training.hours),
            }
            for training in self.trainings
        ]
        return {"plan": self.title, **numbers, "trainings": trainings, "assumptions": self.assumed}

    def as_text(self) -> str:
        """Return tables for people."""
        rows = [self.title]
        for heading, lines in self.sections.values():
            rows += ["", heading]
            rows += [f"  {line.label:<40}{line.text:>12}   {line.note}".rstrip() for line in lines]
        width = max(len(training.name) for training in self.trainings)

        def row(name: str, sizes: str, seen: int, hours: float | None) -> str:
            times = f"{_hours(hours):>10}{_hours(self._rank_hours(hours)):>12}"
            return f"  {name:<{width}}{sizes:>28}{seen:>16,}{times}"

        heads = f"{'images':>12}{'epochs':>8}{'batch':>8}{'images seen':>16}{'hours':>10}"
        rows += ["", f"  {'':<{width}}{heads}{self.unit + '-hours':>12}"]
        for one in self.trainings:
            sizes = f"{one.num_images:>12,}{one.epochs:>8}{one.global_batch_size:>8}"
            rows.append(row(one.name, sizes, one.images_seen, one.hours))
        seen = sum(training.images_seen for training in self.trainings)
        hours = [training.hours for training in self.trainings if training.hours is not None]
        rows.append(row("all", "", seen, sum(hours) if hours else None))
        return "\n".join([*rows, "", "assumed", *(f"  {text}" for text in self.assumed)])

    def _rank_hours(self, hours: float | None) -> float | None:
        return None if hours is None else hours * self.num_ranks


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:,.2f}"


def plan(
    config: Config,
    *,
    num_ranks: int = 1,
    num_samples: int | None = None,
    gpu_memory_bytes: float | None = None,
    disk_bytes: float | None = None,
    images_per_second: float | None = None,
    measured_in: Path | None = None,
    strategies: Sequence[str] | None = None,
) -> Plan:
    """Forecast what `config` takes on `num_ranks` ranks.

    Args:
        num_samples: N; by default the training .beton says it.
        gpu_memory_bytes: of one GPU; by default that of a visible one, and no limit where there is
            none.
        disk_bytes: by default what is free where the run directory lies.
        images_per_second: over all ranks; by default as measured in the run `measured_in`, or in
            the config's own.
        strategies: of the retrainings, which are those of the config's section `pipeline`; by
            default its own.

    Raises:
        InputError: the config cannot be run so, or something does not fit; names options with which
        it does.
    """
    if num_ranks < 1:
        raise InputError(
            f"--gpus={num_ranks} must be at least 1: it is the number of ranks on all nodes"
            " together"
        )
    if config.prune.method == "none":
        config.check_collect()
        images = read_images(config, num_samples)
        case = Case(config, images, num_ranks, tuple(pipeline_cells(config, strategies)))
    elif strategies:
        raise InputError(
            f"--strategies means nothing with prune.method={config.prune.method}, of which `tdds"
            " train` is planned; leave it out, or set prune.method=none"
        )
    else:
        images = read_images(config, num_samples)
        case = Case(as_trained(config, images.num_samples), images, num_ranks)
    trainings = list_trainings(case)
    check_batches(case)
    limits = find_limits(case, gpu_memory_bytes, disk_bytes)
    if exceeded := _exceeded(case, limits):
        raise InputError(_refusal(case, limits, exceeded))
    speed, source = find_speed(config, num_ranks, images_per_second, measured_in)
    if speed is not None:
        trainings = [
            replace(training, hours=training.images_seen / speed / 3600) for training in trainings
        ]
    of_memory = [*memory_lines(case), *filter(None, [limits.get("memory")])]
    sections = {
        "run": ("run", run_lines(case)),
        "memory_per_rank": (f"memory per {case.unit}", of_memory),
        "host_memory_per_rank": (f"host memory per {case.unit}", host_lines(case)),
        "disk": (f"disk, in {config.run.directory}", [*disk_lines(case), limits["disk"]]),
        "network_per_rank": (f"network, sent by each {case.unit}", network_lines(case)),
        "time": ("time", [Line("images per second", speed, source, "")]),
    }
    title = (
        f"plan of {config.run.name}: {config.model.name} on {num_ranks}"
        f" {case.unit}{'s' if num_ranks > 1 else ''}"
    )
    return Plan(title, sections, trainings, num_ranks, case.unit, assumptions(case))


# ---- what there is


def parse_bytes(text: str | None, option: str) -> float | None:
    """Return the bytes of a size such as 80GB, 79.6GiB or 80000MB, or of a plain number; None of
    None. Raise InputError for anything else."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    num_bytes = float(match[1]) * _UNITS.get(match[2], 0) if match else 0.0
    if match and not match[2] and 0 < num_bytes < _LEAST_WITHOUT_UNIT:
        raise InputError(f"{option}={text} has no unit; write {text}GB")
    if not num_bytes > 0:
        raise InputError(
            f"{option}={text!r} is not a size; write it like 80GB (10^9 bytes), 79.6GiB (2^30),"
            " 80000MB or 80000000000"
        )
    return num_bytes


def find_limits(
    case: Case, gpu_memory_bytes: float | None, disk_bytes: float | None
) -> dict[str, Line]:
    """Return memory per GPU and disk, as given, else as found on this machine, in bytes; memory is
    missing where there is no GPU."""
    if case.is_cpu and gpu_memory_bytes is not None:
        raise InputError(
            f"--gpu-memory={gpu_memory_bytes:.0f} means nothing with run.device=cpu; leave it out,"
            " or set run.device=cuda"
        )
    limits = {}
    if gpu_memory_bytes is not None:
        limits["memory"] = Line("there is", gpu_memory_bytes, "--gpu-memory")
    elif not case.is_cpu:
        import torch

        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(0)
            source = f"{device.name} here; --gpu-memory plans for another"
            limits["memory"] = Line("there is", device.total_memory, source)
    source = "--disk"
    if disk_bytes is None:
        folder = case.config.run.directory.absolute()
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        disk_bytes = shutil.disk_usage(there).free
        source = f"free in {there}; --disk plans for another"
    return limits | {"disk": Line("there is", disk_bytes, source)}


def find_speed(
    config: Config, num_ranks: int, images_per_second: float | None, measured_in: Path | None
) -> tuple[float | None, str]:
    """Return images per second over all ranks, and the source of that number; None where it is not
    known."""
    if images_per_second is not None:
        if measured_in is not None:
            raise InputError("--images-per-second and --from exclude each other; leave one out")
        if not (images_per_second > 0 and math.isfinite(images_per_second)):
            raise InputError(f"--images-per-second={images_per_second} must be positive")
        return images_per_second, "--images-per-second"
    run = RunDir(measured_in or config.run.directory)
    if measured_in is None and not run.metrics_file.is_file():
        return None, "give --images-per-second X, or --from RUN with a run of this network"
    was = parse_config(run.read_config(), str(run.config_file))
    others = [
        f"{key}={old}"
        for key, old, new in (
            ("model.name", was.model.name, config.model.name),
            ("model.cifar_stem", was.model.cifar_stem, config.model.cifar_stem),
            ("data.image_size", was.data.image_size, config.data.image_size),
            ("data.progressive", was.data.progressive, config.data.progressive),
            ("train.amp", was.train.amp, config.train.amp),
            ("model.compile", was.model.compile, config.model.compile),
            ("train.fused_optimizer", was.train.fused_optimizer, config.train.fused_optimizer),
        )
        if old != new
    ]
    key = "images_per_second"
    speeds = [record[key] for record in run.read_metrics() if key in record]
    if others or not speeds:
        what = f"was measured with {', '.join(others)}" if others else "has no finished epoch"
        if measured_in is not None:
            raise InputError(
                f"--from={measured_in} {what}; give a run of this config, or --images-per-second X"
            )
        return None, f"{run.path} {what}; give --images-per-second X"
    env = run.read_env()
    then = (env.get("resumes") or [env])[-1]
    ranks = then.get("world_size", num_ranks)
    scaled = f", times {num_ranks} / {ranks} ranks as if linear" if ranks != num_ranks else ""
    source = (
        f"median of {len(speeds)} epochs of {run.path} on {ranks} x"
        f" {then.get('device', 'unknown')}{scaled}"
    )
    return median(speeds) * num_ranks / ranks, source


# ---- what does not fit, and what would


_LINES = {"memory": memory_lines, "disk": disk_lines}


def _needs(case: Case, key: str) -> float:
    return _LINES[key](case)[-1].value or 0


def _exceeded(case: Case, limits: dict[str, Line]) -> list[str]:
    return [key for key, limit in limits.items() if _needs(case, key) > (limit.value or 0)]


def _refusal(case: Case, limits: dict[str, Line], exceeded: list[str]) -> str:
    """Say in one line what is needed, what there is, and the options that make it fit, or with
    which less is needed."""
    where = {"memory": f"per {case.unit}", "disk": "of disk"}
    needed = " and ".join(
        f"{size(_needs(case, key))} {where[key]}, more than {limits[key].text} ({limits[key].note})"
        for key in exceeded
    )
    start = (
        f"{case.config.run.name} on {case.num_ranks} {case.unit}{'s' if case.num_ranks > 1 else ''}"
        f" needs {needed}"
    )
    ways = [
        way
        for settings in _options(case, exceeded)
        if (way := _mildest(settings, limits)) is not None
        and any(_needs(way[1], key) < _needs(case, key) for key in exceeded)
    ]
    fitting = [way for way in ways if not _exceeded(way[1], limits)]
    named = [
        f"{words} ({', '.join(f'{size(_needs(changed, key))} {where[key]}' for key in exceeded)})"
        for words, changed in fitting or ways
    ]
    if fitting:
        return f"{start}; use {', or '.join(named)}"
    largest = [max(_LINES[key](case)[:-1], key=lambda line: line.value or 0) for key in exceeded]
    parts = ", ".join(f"{line.label} ({line.text})" for line in largest)
    out = {
        "memory": "a GPU with more memory, another network or data.image_size",
        "disk": "a run.dir on a larger file system",
    }
    together = f" alone, several may together: {', '.join(named)};" if named else ","
    return (
        f"{start}; no option makes it fit{together} the largest part is {parts}; use "
        f"{', and '.join(out[key] for key in exceeded)}"
    )


def _mildest(settings: list[Way], limits: dict[str, Line]) -> Way | None:
    """Return of an option's settings, each of which takes less than the one before, the first with
    which everything fits, else the last with which the network can train; None where it can with
    none."""

    def can_train(way: Way) -> bool:
        try:
            check_batches(way[1])
            return True
        except InputError:
            return False

    first = bisect_left(
        settings, True, key=lambda way: not can_train(way) or not _exceeded(way[1], limits)
    )
    return next(filter(can_train, reversed(settings[max(0, first - 1) : first + 1])), None)


def _options(case: Case, exceeded: list[str]) -> list[list[Way]]:
    """Return the settings of each option, mild ones first, as they are typed and with the case that
    they make."""

    def setting(section: str, key: str, value: Any) -> Way:
        return f"{section}.{key}={str(value).lower()}", case.with_config(section, **{key: value})

    train = case.config.train
    ranks = range(case.num_ranks + 1, train.global_batch_size // train.accumulation + 1)
    passes = range(train.accumulation + 1, train.global_batch_size // case.num_ranks + 1)
    of_memory = [
        *(
            [way for way in ways if _deals_out(way[1])]
            for ways in (
                [(f"--gpus {num}", replace(case, num_ranks=num)) for num in ranks],
                [setting("train", "accumulation", num) for num in passes],
            )
        ),
        [setting("train", "amp", "bf16")],
    ]
    of_disk = [
        [setting("score", "trajectory_dtype", "float16")],
        [setting("score", "trajectory", False)],
        # 2 is the fewest
        [
            setting("checkpoint", "keep", keep)
            for keep in range(case.config.checkpoint.keep - 1, 1, -1)
        ],
    ]
    return [
        [setting("score", "logp_dtype", "float16")],
        *(of_memory if "memory" in exceeded else []),
        *(of_disk if "disk" in exceeded else []),
    ]


def _deals_out(case: Case) -> bool:
    """Say whether ranks and forward passes divide the batches of all trainings. `per_rank_batch`
    also looks for better ones."""
    train, parts = case.config.train, case.num_ranks * case.config.train.accumulation
    rule = case.config.retrain.batch_size_rule
    factors = {1.0, *(batch_size_factor(cell.pruning_rate, rule) for cell in case.cells)}
    batches = [train.global_batch_size * factor for factor in factors]
    return all(batch >= parts and batch % parts == 0 for batch in batches)
