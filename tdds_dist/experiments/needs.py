"""The needs of a planned run, line by line: on the device, in host memory, on disk, over the
network. Numbers, no decisions.

`memory` counts bytes; here they are added up for a config on so many ranks, with what follows the
collection. What was not measured is a named constant, and said by `assumptions`.
"""

# B rows per rank and forward pass, C classes, M rows of a shard, N dataset, W world size (number of
# ranks)

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.run import Config, ScoreWindow
from tdds_dist.config.scores import DENSE
from tdds_dist.coreset.samplers import num_kept
from tdds_dist.data.beton import inspect_split
from tdds_dist.data.manifest import check_classes, read_manifest
from tdds_dist.distributed.partition import class_owners, rows_per_shard
from tdds_dist.errors import InputError
from tdds_dist.experiments import memory
from tdds_dist.experiments.grid import Cell
from tdds_dist.experiments.memory import Network
from tdds_dist.pruning.plan import PruningPlan
from tdds_dist.pruning.train import plan_of, window_of
from tdds_dist.scoring.scorer import steps_together
from tdds_dist.text import size_text as size
from tdds_dist.training.schedule import batch_size_factor, per_rank_batch, retrain_epochs

# assumed, per process: CUDA's context, NCCL's buffers, workspaces of cuDNN and cuBLAS
CONTEXT_BYTES = 1_000_000_000
MARGIN = 0.05  # assumed, of all else: what the caching allocator cannot use between its blocks
# assumed, in host memory: Python, torch and its libraries
PROCESS_BYTES = {"cuda": 3_000_000_000, "cpu": 900_000_000}
# in host memory: what the loader knows of each image, and the order of an epoch; measured
INDEX_BYTES_PER_IMAGE = 170
LARGEST_SIDE = 400  # assumed where the .beton is not there: side of the largest image, pixels
BATCHES_IN_FLIGHT = 5  # of a pass through the images: 3 ahead, and those at both ends
ROW_BYTES = 17  # in these buffers beside the image: label, index, whether it was decoded
DECODING_THREADS = 16  # assumed of a rank where data.num_workers does not say
# as they came; on CUDA those in flight, and two because the host runs ahead
BATCHES_ON_DEVICE = {"cuda": 7, "cpu": 2}

_ASSUMED = (
    (
        "retrainings have no scorer and no larger batch, so they take less memory; they run one"
        " after another"
    ),
    "hours are those of training: evaluation, the final pass and start-up come on top",
    f"a rank decodes with {DECODING_THREADS} threads where data.num_workers does not say",
)
_ASSUMED_OF_GPUS = (
    (
        f"CUDA, NCCL, cuDNN and cuBLAS take {CONTEXT_BYTES / 1e9:g} GB per process, and"
        f" {MARGIN:.0%} of all else is lost between blocks of the allocator (neither is measured)"
    ),
    "attention counts unfused, and work in backward as in float32: upper bounds",
)


@dataclass(frozen=True)
class Images:
    """The training images, as far as they are known."""

    num_samples: int
    source: str  # where that is known from
    largest_pixels: int  # width times height of the largest
    label_N: np.ndarray | None = None

    def largest_share(self, num_ranks: int) -> int:
        """Return the most images whose classes one rank keeps in the final pass."""
        if self.label_N is None:
            return rows_per_shard(self.num_samples, num_ranks)
        owner_C = class_owners(self.label_N, num_ranks)
        return int(np.bincount(owner_C[self.label_N]).max())


@dataclass(frozen=True)
class Training:
    """A collection or a retraining, or one that prunes inside. `hours` on all ranks together, None
    where the speed is not known; `pruned_to`: images of all epochs where those skip some, at
    most."""

    name: str
    num_images: int
    epochs: int
    global_batch_size: int
    hours: float | None = None
    pruned_to: int | None = None

    @property
    def images_seen(self) -> int:
        """Return the number of images seen in all epochs."""
        return self.num_images * self.epochs if self.pruned_to is None else self.pruned_to


@dataclass(frozen=True)
class Line:
    """One number: bytes, or a count; None where it is not known."""

    label: str
    value: float | None
    note: str = ""
    unit: str = "bytes"

    @property
    def key(self) -> str:
        """Return its name in JSON."""
        words = re.sub(r"[^a-z0-9]+", "_", self.label.lower()).strip("_")
        return f"{words}_{self.unit}" if self.unit else words

    @property
    def text(self) -> str:
        """Return its number for people."""
        if self.value is None:
            return "unknown"
        return size(self.value) if self.unit == "bytes" else f"{self.value:,.0f}"


@dataclass(frozen=True)
class Case:
    """A config on so many ranks, and what is to follow the collection."""

    config: Config
    images: Images
    num_ranks: int
    cells: tuple[Cell, ...] = ()

    @cached_property
    def rows(self) -> int:
        """Return B, the rows per rank and forward pass."""
        train = self.config.train
        return per_rank_batch(train.global_batch_size, self.num_ranks, train.accumulation)

    @property
    def route_every(self) -> int:
        """Return the passes whose rows travel to their owners together."""
        return self.config.score.route_every or steps_together(
            self.num_ranks, self.rows, self.config.data.num_classes
        )

    @cached_property
    def pruning(self) -> PruningPlan | None:
        """Return what the training prunes inside, if it does."""
        if self.config.prune.method == "none":
            return None
        return plan_of(self.config, self.images.num_samples)

    @cached_property
    def network(self) -> Network:
        """Return the network at B rows."""
        return memory.network_of(self.config, self.rows)

    @property
    def is_cpu(self) -> bool:
        """Say whether ranks train on the CPU; run.device=auto is planned for GPUs, wherever the
        plan is made."""
        return self.config.run.device == "cpu"

    @property
    def unit(self) -> str:
        """Return the word for a rank: GPU, or rank on the CPU."""
        return "rank" if self.is_cpu else "GPU"

    def with_config(self, section: str, **values: Any) -> "Case":
        """Return the same case with other values in a section of the config."""
        return replace(self, config=self.config.changed(section, **values))


def total(lines: Sequence[Line]) -> float:
    """Sum lines."""
    return sum(line.value or 0 for line in lines)


# ---- what it is about


def read_images(config: Config, num_samples: int | None) -> Images:
    """Return the training images: their number as given, else what the .beton says; raise
    InputError when neither is there."""
    if num_samples is not None:
        if num_samples < 1:
            raise InputError(
                f"--num-samples={num_samples} must be at least 1: it is the number of training"
                " images"
            )
        return Images(num_samples, "--num-samples", LARGEST_SIDE**2)
    path = Path(config.data.train)
    if not path.is_file():
        raise InputError(
            f"data.train={path} does not exist, so the number of images is not known; give"
            f" --num-samples N, or write it with `tdds write SOURCE {path}`"
        )
    info = inspect_split(config, "train")
    if info.label_N.min() < 0 or info.label_N.max() + 1 != config.data.num_classes:
        # a class may be known from the manifest only, or from the other file
        there = [info]
        if Path(config.data.val).is_file():
            there.append(inspect_split(config, "val"))
        check_classes([(file, read_manifest(file.path)) for file in there], config.data.num_classes)
    pixels = int((info.width_N.astype(np.int64) * info.height_N).max())
    return Images(info.num_samples, str(path), pixels, info.label_N)


def as_trained(config: Config, num_samples: int) -> Config:
    """Return the config with the windows that its run really scores: one over all epochs of a
    training that prunes inside, which has no final pass."""
    prune, window = config.prune, window_of(config)
    if prune.method == "none":
        return config
    start = plan_of(config, num_samples).first_pruned
    one = ScoreWindow(T=window.T, K=window.K, beta=window.beta, pruning_rates=(prune.rate,))
    return config.changed("score", windows=(one,), final_pass=False).changed("prune", start=start)


def list_trainings(case: Case) -> list[Training]:
    """List the collection, then the retrainings; only the training where that prunes inside.

    Raises:
        InputError: a batch that cannot be dealt out evenly.
    """
    config, num_images = case.config, case.images.num_samples
    train, pruning = config.train, case.pruning
    batch = case.rows * case.num_ranks * train.accumulation
    if pruning is not None:
        seen = sum(map(pruning.most_images, range(train.epochs)))
        name = f"train, {config.prune.method}"
        return [Training(name, num_images, train.epochs, batch, pruned_to=seen)]
    stops_early = config.collect.stop_after == "last_window"
    epochs = max(window.T for window in config.windows()) if stops_early else train.epochs
    found = [Training("collect", num_images, epochs, batch)]
    has_methods = len({cell.method for cell in case.cells}) > 1
    has_seeds = len({cell.seed for cell in case.cells}) > 1
    for cell in case.cells:
        rate = cell.pruning_rate
        factor = batch_size_factor(rate, config.retrain.batch_size_rule)
        rows = per_rank_batch(train.global_batch_size, case.num_ranks, train.accumulation, factor)
        name = (
            (f"{cell.method.name} " if has_methods else "")
            + f"p={rate:g} {cell.strategy}"
            + (f" seed {cell.seed}" if has_seeds else "")
        )
        epochs = retrain_epochs(config.retrain.epochs or train.epochs, rate, cell.strategy)
        batch = rows * case.num_ranks * train.accumulation
        found.append(Training(f"retrain {name}", num_kept(num_images, rate), epochs, batch))
    return found


def check_batches(case: Case) -> None:
    """Raise InputError when a training leaves a rank fewer rows than the network can train on
    (batch norm needs some)."""
    batches = [training.global_batch_size for training in list_trainings(case)]
    for batch in (batches[0], min(batches)):
        memory.network_of(case.config, batch // (case.num_ranks * case.config.train.accumulation))


def assumptions(case: Case) -> list[str]:
    """Return the assumptions behind the numbers, as sentences."""
    unknown = case.pruning is not None and case.pruning.total_images is None
    later = _ASSUMED if case.pruning is None else _ASSUMED[1:]  # no retrainings
    seen = [f"images seen are at most so many: {case.config.prune.method} decides them on the way"]
    return [*(() if case.is_cpu else _ASSUMED_OF_GPUS), *(seen if unknown else ()), *later]


# ---- the lines; in those of memory and disk the last one is what must fit


def run_lines(case: Case) -> list[Line]:
    """List the sizes of the collection."""
    collection, train = list_trainings(case)[0], case.config.train
    is_cut = collection.epochs < train.epochs
    schedule = f"of a schedule of {train.epochs}; collect.stop_after=last_window" if is_cut else ""
    batch, passes = collection.global_batch_size, f"{train.accumulation} forward pass(es) per step"
    counts = (
        ("images", collection.num_images, case.images.source),
        ("classes", case.config.data.num_classes, ""),
        ("epochs", collection.epochs, schedule),
        ("steps per epoch", math.ceil(collection.num_images / batch), ""),
        ("global batch", batch, ""),
        ("ranks", case.num_ranks, "run.device=cpu" if case.is_cpu else "one per GPU"),
        ("rows per rank and forward pass", case.rows, passes),
    )
    return [Line(*count, unit="") for count in counts]


def memory_lines(case: Case) -> list[Line]:
    """List the memory on the device of rank 0, which has the longest shard, at the worst moment."""
    config, network, rows = case.config, case.network, case.rows
    num_images = case.images.num_samples
    scorer = memory.scorer_bytes(config, num_images, case.num_ranks)
    shard = rows_per_shard(num_images, case.num_ranks)
    optimizer = memory.optimizer_bytes(config.train, network.parameters)
    keeps_buffers = config.score.on_nan == "quarantine"
    lasting = [
        *(Line(label, value) for label, value in scorer.items()),
        Line("parameters", network.parameters),
        Line("gradients", network.parameters, "in the buckets of DDP, all the time"),
        Line("optimizer state", optimizer, config.train.optimizer),
        Line(
            "network's buffers",
            network.buffers * (1 + keeps_buffers),
            "twice for quarantine" if keeps_buffers else "",
        ),
    ]
    as_they_came = BATCHES_ON_DEVICE["cpu" if case.is_cpu else "cuda"]
    kept = "[M, C]" if config.score.storage == DENSE else config.score.storage
    lasting[0] = replace(lasting[0], note=f"{kept} {config.score.logp_dtype}, M = {shard:,}")
    step = [
        Line(
            "images of a batch",
            3 * config.data.image_size**2 * rows * (4 + as_they_came),
            f"normalised, and {as_they_came} batches as they came",
        ),
        Line(
            "activations kept for backward",
            network.activations,
            "" if case.is_cpu else f"train.amp={config.train.amp}",
        ),
        Line("work of forward and backward", network.working),
        Line(
            "routing buffers and recording",
            memory.recording_bytes(
                rows,
                config.data.num_classes,
                network.logit_bytes,
                config.score.storage,
                case.route_every,
            ),
        ),
    ]
    elsewhere = max(  # than in forward and backward
        network.parameters,  # the optimizer's step works on a copy
        # an epoch's end: scalars on their way out, the labels of all
        36 * shard + 8 * (num_images + shard),
        # the final pass, with the network alone
        12 * num_images + total(step) - (total(lasting) - network.parameters),
    )
    lines = [
        *lasting,
        *step,
        Line("more than that outside of steps", max(0, elsewhere - total(step))),
    ]
    if not case.is_cpu:
        lines += [
            Line("margin", math.ceil(MARGIN * total(lines)), f"{MARGIN:.0%}, assumed"),
            Line("CUDA, NCCL, workspaces", CONTEXT_BYTES, "assumed"),
        ]
    return [*lines, Line("total", total(lines))]


def host_lines(case: Case) -> list[Line]:
    """List the host memory of one rank's process; on the CPU the memory of training is there as
    well."""
    config, network, num_images = case.config, case.network, case.images.num_samples
    staged = memory.staged_bytes(config, network, num_images, case.num_ranks)
    kept = case.images.largest_share(case.num_ranks) if config.score.final_pass else 0
    features = kept * network.num_features * 4
    # Both loaders keep their buffers. An epoch that follows another without evaluation between them
    # begins while that one still has some.
    passes = [config.data.image_size] * (1 + (config.train.eval_every > 1))
    passes.append(config.data.eval_size or config.data.image_size)
    threads = config.data.num_workers or min(DECODING_THREADS, case.rows)
    decoded = sum(
        BATCHES_IN_FLIGHT * case.rows * (3 * side**2 + ROW_BYTES)
        + threads * 3 * case.images.largest_pixels
        for side in passes
    )
    locked = "" if case.is_cpu else ", page-locked"
    held = [
        Line(
            "process",
            PROCESS_BYTES["cpu" if case.is_cpu else "cuda"],
            "Python and libraries, assumed",
        ),
        Line(
            "index of the images",
            INDEX_BYTES_PER_IMAGE * num_images,
            "in the loader, and the order of an epoch",
        ),
        Line(
            "decoded batches",
            decoded,
            f"of training and evaluation{locked}; largest image"
            f" {case.images.largest_pixels:,} pixels, in each of {threads} threads"
            + (", assumed" if case.images.label_N is None else ""),
        ),
        *(
            [Line("memory of training", memory_lines(case)[-1].value, "as above")]
            if case.is_cpu
            else []
        ),
    ]
    writes = (
        f"a copy{locked}, written in the background"
        if config.checkpoint.asynchronous
        else "one table at a time"
    )
    either = [
        Line("checkpoint under way", staged, writes),
        Line("features of the final pass", features, "later, when no checkpoint is under way"),
    ]
    needed = total(held) + max(staged, features)
    return [
        *held,
        *either,
        Line(
            "total", needed, f"{size(needed * case.num_ranks)} for {case.num_ranks} such processes"
        ),
    ]


def disk_lines(case: Case) -> list[Line]:
    """List the disk use of the run directory, when it is fullest; the checkpoints of a training go
    when it has finished."""
    config, network, num_images = case.config, case.network, case.images.num_samples
    trainings, keep = list_trainings(case), config.checkpoint.keep
    epoch_bytes = memory.trajectory_bytes(config, num_images)
    checkpoint = memory.checkpoint_bytes(config, network, num_images, case.num_ranks)
    of_retraining = (
        memory.checkpoint_bytes(config, network, 0, case.num_ranks) if len(trainings) > 1 else 0
    )
    num_scores = len(dict.fromkeys(config.windows())) + config.score.final_pass * (
        1 + (network.num_features > 0)
    )
    models = 2 * memory.model_file_bytes(network)
    coresets = sum(12 * training.num_images for training in trainings[1:])
    first = [
        Line(
            "trajectory",
            (epoch_bytes * trainings[0].epochs + 8 * num_images) if epoch_bytes else 0,
            (
                f"{size(epoch_bytes)} per epoch, {config.score.trajectory_dtype}"
                if epoch_bytes
                else "score.trajectory=false"
            ),
        ),
        # with entropy lies what the final network takes an image for, three numbers more
        Line(
            "scores",
            12 * num_images * (num_scores + config.score.final_pass),
            f"{num_scores} files",
        ),
        Line("models", models, "final.pt, best.pt"),
    ]
    kept = f"{keep + 1} x {size(checkpoint)}: checkpoint.keep={keep}, and one being written"
    if (pruning := case.pruning) is not None:
        # of epochs that skip images: two bits an image, and weights
        num_sets = sum(not pruning.is_full(epoch) for epoch in range(trainings[0].epochs))
        bits = 2 + 32 * (pruning.loss_weights != "none")
        sets = num_sets * bits * num_images // 8
        first.append(Line("sets of epochs", sets, "uncompressed, at most"))
        during = [Line("checkpoints while training", (keep + 1) * checkpoint, kept)]
        fullest = total(first) + total(during)
        return [*first, *during, Line("total when fullest", fullest, "checkpoints go at the end")]
    later = [
        Line("coresets", coresets),
        Line("models of retrainings", models * (len(trainings) - 1)),
    ]
    during = [
        Line("checkpoints while collecting", (keep + 1) * checkpoint, kept),
        Line("checkpoints while retraining", (keep + 1) * of_retraining),
    ]
    fullest = total(first) + max(during[0].value or 0, total(later) + (during[1].value or 0))
    return [
        *first,
        *later,
        *during,
        Line("total when fullest", fullest, "checkpoints go when a training has finished"),
    ]


def network_lines(case: Case) -> list[Line]:
    """List what each rank sends."""
    share = (case.num_ranks - 1) / case.num_ranks
    rows = memory.payload_bytes(case.rows, case.config.data.num_classes, case.network.logit_bytes)
    return [
        Line(
            "rows to their owners, per forward pass",
            round(rows * share),
            "all-to-all; expected, as the order is random"
            + (f"; those of {case.route_every} passes together" if case.route_every > 1 else ""),
        ),
        Line(
            "gradients, per step",
            round(2 * share * case.network.parameters),
            "all-reduce in a ring",
        ),
    ]
