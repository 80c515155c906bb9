"""A scorer fed with made-up outputs: what `benchmarks.scorer` measures, each function in a process
of its own.

Scorers start as in the middle of training: every table is written (uniform predictions), all
windows are full. The first pass, block or step is not counted.
"""

# B rows of a call, C classes, N samples, P batches of outputs made in advance, W ranks

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tdds_dist.config.scores import Window
from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import EpochOrder, epoch_order, rows_per_shard
from tdds_dist.errors import InputError
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.training.build import build_model

DTYPES = {"float32": torch.float32, "float16": torch.float16}
K = 10  # window of the paper's ImageNet setting
NUM_BATCHES = 4  # distinct batches of outputs, so that they are not all in the cache
LOGIT_SCALE = 3.0  # spread of made-up logits; a trained network's are of this order
LOGIT_BYTES, HEADER_BYTES = 4, 16  # float32 outputs; index and label of a routed row
Batch = tuple[Tensor, Tensor, Tensor]  # index, logits, label
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


@dataclass(frozen=True)
class Stored:
    """How the previous epoch is kept: `float32` and `float16` (all classes), `topk:K` (float32) or
    `topk:K/float16`."""

    name: str

    def __post_init__(self) -> None:
        kind, _, dtype = self.name.partition("/")
        number = kind.removeprefix("topk:")
        is_topk = number != kind and number.isascii() and number.isdigit() and int(number) > 0
        if not (self.name in DTYPES or (is_topk and (kind == self.name or dtype in DTYPES))):
            raise InputError(
                f"stored as {self.name!r} is unknown; use float32, float16, topk:K or"
                " topk:K/float16"
            )

    @property
    def num_kept(self) -> int | None:
        """K of topk; None where all classes are kept."""
        return (
            int(self.name.partition("/")[0].removeprefix("topk:"))
            if self.name.startswith("topk:")
            else None
        )

    @property
    def dtype(self) -> torch.dtype:
        return (
            DTYPES[self.name.partition("/")[2] or "float32"] if self.num_kept else DTYPES[self.name]
        )

    def options(self) -> dict[str, Any]:
        """Arguments of ShardedScorer."""
        return {
            "logp_dtype": self.dtype,
            "storage": f"topk:{self.num_kept}" if self.num_kept else "dense",
        }

    def row_bytes(self, num_classes: int) -> int:
        """Bytes of one sample's log-probabilities: all, or those kept with their classes, the
        label's and the rest's."""
        if self.num_kept is None:
            return num_classes * self.dtype.itemsize
        class_bytes = 2 if num_classes <= 2**15 else 4
        return (self.num_kept + 2) * self.dtype.itemsize + (self.num_kept + 1) * class_bytes


@dataclass(frozen=True)
class Setting:
    """A scorer and what it is fed with; `batch` is that of one rank, `logits` the dtype of
    outputs."""

    num_samples: int
    num_classes: int
    batch: int
    stored: Stored
    logits: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"N={self.num_samples} C={self.num_classes} {self.stored.name}"

    def scorer(self, device: str = "cpu") -> ShardedScorer:
        """In the middle of training: tables written (uniform predictions), windows full at every
        end of an epoch."""
        window = Window(10**6, K, 0.9)
        scorer = ShardedScorer(
            self.num_samples,
            self.num_classes,
            [window],
            "official",
            device,
            **self.stored.options(),
        )
        state = scorer.state_dict()
        for name, table in state.items():
            rows = collectives.own_rows(table)
            if rows.is_floating_point() and name != "settings":
                rows.fill_(-math.log(self.num_classes))
        scorer.load_state_dict(state | {"position": torch.tensor([K, 0])})
        return scorer

    def formula_bytes(self) -> int:
        """State of a rank that owns all samples, by arithmetic.

        Per sample: log-probabilities, the scalars, label (int64), two counters and the quarantine
        (int32), ring and average (float32). The tables that a step writes have one row more, for
        padding.
        """
        per_step = self.stored.row_bytes(self.num_classes) + 4 * len(SCALARS) + 8 + 4 + 4
        return (self.num_samples + 1) * per_step + self.num_samples * (4 * (K - 1) + 4 + 4)

    def moved_bytes(self) -> int:
        """Return what the update of one sample reads and writes at least: header, logits, both
        rows, scalars, label, two counters."""
        rows = 2 * self.stored.row_bytes(self.num_classes)
        return (
            HEADER_BYTES
            + self.num_classes * self.logits.itemsize
            + rows
            + 4 * len(SCALARS)
            + 8
            + 2 * (4 + 4)
        )


class Outputs:
    """Made-up outputs of a network: logits [P, B, C] used in turn, labels by global index."""

    def __init__(self, setting: Setting, device: str = "cpu"):
        generator = torch.Generator(device).manual_seed(0)
        shape = (NUM_BATCHES, setting.batch, setting.num_classes)
        logits_PBC = torch.randn(shape, generator=generator, device=device).mul_(LOGIT_SCALE)
        self._logits_PBC = logits_PBC.to(setting.logits)
        self._label_N = torch.randint(
            setting.num_classes, (setting.num_samples,), generator=generator, device=device
        )

    def epoch(self, order: EpochOrder, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """(index_B, logits_BC, label_B) of every step of a rank."""
        device = self._label_N.device
        sample_SB, index_SB = (
            torch.from_numpy(part.copy()).to(device) for part in order.of_rank(rank, world_size)
        )
        for step, (index_B, sample_B) in enumerate(zip(index_SB, sample_SB, strict=True)):
            yield index_B, self._logits_PBC[step % NUM_BATCHES], self._label_N[sample_B]


def record_seconds(scorer: ShardedScorer, outputs: Outputs, order: EpochOrder) -> float:
    """Seconds in `record` over all batches of an order, on this rank."""
    scorer.expect(order)
    seconds = 0.0
    for batch in outputs.epoch(order, scorer.world.rank, scorer.world.world_size):
        started = time.perf_counter()
        scorer.record(*batch)
        seconds += time.perf_counter() - started
    return seconds


def copy_bandwidth(device: str, repetitions: int = 9) -> float:
    """Bytes/s, read and written, of copying a large tensor."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    spans = []
    for _ in range(repetitions):
        keep_busy(device)
        started = mark(device)
        target.copy_(source)
        spans.append((started, mark(device)))
    return 2 * COPY_BYTES[device] / statistics.median(seconds_between(*span) for span in spans)


def keep_busy(device: str) -> None:
    """Let a GPU wait for some milliseconds, so that what is queued meanwhile runs without gaps."""
    if device == "cuda":
        torch.cuda._sleep(10_000_000)  # clock cycles


def mark(device: str) -> Any:
    """This point in the work of the device."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Between two marks; waits for the device."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def resident_bytes(field: str) -> int:
    """Resident memory of this process, now (VmRSS) or at its highest (VmHWM; that of getrusage
    includes the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


# ---- one rank, or one shard


def _places(
    place_at: Callable[[np.ndarray], np.ndarray], subset: np.ndarray, position_P: np.ndarray
) -> np.ndarray:
    return subset[place_at(position_P)]


def measure_table(setting: Setting, passes: int, rows: int | None = None) -> dict[str, Any]:
    """Time and memory of a process that owns all samples; `passes` timed, all of them or `rows`
    random ones in each."""
    with distributed.session("cpu"):
        outputs = Outputs(setting)
        subset = (
            None
            if rows is None
            else np.random.default_rng(0).choice(setting.num_samples, rows, replace=False)
        )
        before = resident_bytes("VmRSS")
        scorer = setting.scorer()
        seconds, end_seconds = [], []
        for number in range(1 + passes):
            order = epoch_order(rows or setting.num_samples, setting.batch, epoch=number)
            if subset is not None:  # the epoch never ends, so nothing counts who is missing
                order = replace(order, place_at=partial(_places, order.place_at, subset))
            seconds.append(record_seconds(scorer, outputs, order))
            if rows is None:
                started = time.perf_counter()
                scorer.end_epoch()
                end_seconds.append(time.perf_counter() - started)
        peak, state_bytes = resident_bytes("VmHWM"), scorer.state_bytes()
        bandwidth = copy_bandwidth("cpu")  # only now: its tensors would be part of the peak
    per_sample = [taken / (rows or setting.num_samples) for taken in seconds[1:]]
    return {
        "record_us_per_sample": [1e6 * value for value in per_sample],
        "end_epoch_ms": [1e3 * s for s in end_seconds[1:]],
        "rows_per_pass": rows or setting.num_samples,
        "moved_bytes_per_sample": setting.moved_bytes(),
        "copy_bandwidth": bandwidth,
        "share_of_copy_bandwidth": [
            setting.moved_bytes() / value / bandwidth for value in per_sample
        ],
        "state_bytes": state_bytes,
        "formula_bytes": setting.formula_bytes(),
        "resident_before_bytes": before,
        "peak_resident_bytes": peak,
        "net_resident_bytes": peak - before,
    }


# ---- several ranks


class Traffic:
    """Counts the bytes that this rank gives to all-to-all, and those of them that leave it."""

    def __init__(self) -> None:
        self.calls = self.num_bytes = self.off_rank_bytes = 0
        self._send = dist.all_to_all_single

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        receives: list[int] | None = None,
        sends: list[int] | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        num_bytes = input.numel() * input.element_size()
        share = sends[dist.get_rank()] / max(1, sum(sends)) if sends else 1 / dist.get_world_size()
        self.calls += 1
        self.num_bytes += num_bytes
        self.off_rank_bytes += num_bytes - round(share * num_bytes)
        return self._send(output, input, receives, sends, *arguments, **options)


def measure_ranks(settings: list[Setting], passes: int) -> list[dict[str, Any]]:
    """Seconds of each whole epoch on this rank and what it sent, by setting; settings take
    turns."""
    with distributed.session("cpu") as world:
        scorers = [setting.scorer() for setting in settings]
        outputs = [Outputs(setting) for setting in settings]
        found: list[dict[str, Any]] = [{"seconds": []} for _ in settings]
        for number in range(1 + passes):
            for setting, scorer, output, row in zip(settings, scorers, outputs, found, strict=True):
                order = epoch_order(
                    setting.num_samples, setting.batch * world.world_size, epoch=number
                )
                collectives.barrier()
                with mock.patch.object(dist, "all_to_all_single", Traffic()) as traffic:
                    started = time.perf_counter()
                    record_seconds(scorer, output, order)
                    scorer.end_epoch()
                    row["seconds"].append(time.perf_counter() - started)
                row |= {
                    "num_steps": order.num_steps,
                    "calls": traffic.calls,
                    "bytes_sent": traffic.num_bytes,
                    "off_rank_bytes": traffic.off_rank_bytes,
                }
        del scorer, scorers
    return found


def summarise_ranks(
    setting: Setting, world_size: int, by_rank: list[dict[str, Any]]
) -> dict[str, Any]:
    """One line of the table: an epoch takes as long as its slowest rank."""
    slowest = [
        max(of_epoch) for of_epoch in zip(*(row["seconds"] for row in by_rank), strict=True)
    ][1:]
    steps, calls = by_rank[0]["num_steps"], by_rank[0]["calls"]
    sent, off_rank = (
        statistics.mean(row[key] / steps for row in by_rank)
        for key in ("bytes_sent", "off_rank_bytes")
    )
    rows = rows_per_shard(setting.num_samples, world_size)
    return {
        "world_size": world_size,
        "us_per_sample_and_rank": [1e6 * taken / rows for taken in slowest],
        "calls_per_step": calls / steps,
        "bytes_sent_per_step": sent,
        "off_rank_bytes_per_step": off_rank,
        "formula_bytes_per_step": (
            setting.batch * (setting.num_classes * LOGIT_BYTES + HEADER_BYTES)
        ),
    }


# ---- the owner's update alone


def measure_update(setting: Setting, device: str, steps: int) -> list[dict[str, Any]]:
    """Time of writing received rows into the tables, without a process group, by path: the fused
    kernel where the scorer has chosen it, and plain torch. The paths take turns step by step."""
    bandwidth = copy_bandwidth(device)
    outputs = Outputs(setting, device)
    on_cuda = device == "cuda"
    before = torch.cuda.memory_allocated() if on_cuda else 0
    scorer = setting.scorer(device)
    # the last may hold padding
    batches = list(outputs.epoch(epoch_order(setting.num_samples, setting.batch)))[:-1]
    paths = update_paths(scorer)
    rows = []
    spans: dict[str, list[tuple[Any, Any]]] = {path: [] for path in paths}
    for step in range(1 + steps):
        for path, choose in paths.items():
            choose()
            keep_busy(device)
            scorer.record(*batches[step % len(batches)])
            started = mark(device)
            scorer._apply_pending()
            spans[path].append((started, mark(device)))
        if on_cuda:
            torch.cuda.synchronize()
    for path, choose in paths.items():
        choose()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        launches = _launches_per_step(scorer, batches, device)
        seconds = [seconds_between(*span) for span in spans[path][1:]]
        moved = setting.moved_bytes() * setting.batch
        rows.append(
            {
                "path": path,
                "update_us": [1e6 * value for value in seconds],
                "copy_bandwidth": bandwidth,
                "share_of_copy_bandwidth": [moved / value / bandwidth for value in seconds],
                "launches_per_step": launches,
                "state_bytes": scorer.state_bytes(),
                "peak_memory_bytes": (
                    torch.cuda.max_memory_allocated() - before
                    if on_cuda
                    else resident_bytes("VmHWM")
                ),
            }
        )
    return rows


def update_paths(scorer: ShardedScorer) -> dict[str, Callable[[], None]]:
    """The ways in which this scorer can do its update: what chooses each."""
    names = ("fused", "plain") if scorer._is_fused else ("plain",)
    return {name: partial(setattr, scorer, "_is_fused", name == "fused") for name in names}


def _launches_per_step(
    scorer: ShardedScorer, batches: list[Batch], device: str, steps: int = 8
) -> float:
    """Kernels and copies on the device in a whole `record`; on the CPU the torch calls."""
    activity = (
        torch.profiler.ProfilerActivity.CUDA
        if device == "cuda"
        else torch.profiler.ProfilerActivity.CPU
    )
    kind = torch.profiler.DeviceType.CUDA if device == "cuda" else torch.profiler.DeviceType.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        for step in range(steps):
            scorer.record(*batches[step % len(batches)])
        if device == "cuda":
            torch.cuda.synchronize()
    return (
        sum(event.device_type == kind and event.cpu_parent is None for event in profile.events())
        / steps
    )


# ---- its share of a training step


class Steps:
    """Training steps of a network on random images, recorded or not."""

    def __init__(self, setting: Setting, model_name: str, image_size: int):
        torch.manual_seed(0)
        self._model = build_model(model_name, setting.num_classes).train()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9)
        image_B3HW = torch.randn(setting.batch, 3, image_size, image_size)
        self._image_B3HW = image_B3HW.contiguous(memory_format=torch.channels_last)
        self._scorer = setting.scorer()
        # no padding
        self._index_SB = torch.from_numpy(
            epoch_order(setting.num_samples, setting.batch).of_rank(0, 1)[1][:-1]
        )
        self._label_N = torch.randint(setting.num_classes, (setting.num_samples,))
        self._step = 0

    def seconds_per_step(self, num_steps: int, record: bool) -> float:
        """Mean over a block of steps. Visits of the epoch are never checked: it is not ended."""
        started = time.perf_counter()
        for _ in range(num_steps):
            index_B = self._index_SB[self._step % len(self._index_SB)]
            label_B = self._label_N[index_B]
            self._step += 1
            logits_BC = self._model(self._image_B3HW)
            if record:
                self._scorer.record(index_B, logits_BC, label_B)
            F.cross_entropy(logits_BC, label_B).backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - started) / num_steps


def measure_share(
    setting: Setting, model_name: str, image_size: int, pairs: int, block: int
) -> dict[str, Any]:
    """Step time with `record` over that without, for pairs of neighbouring blocks."""
    with distributed.session("cpu"):
        steps = Steps(setting, model_name, image_size)
        for record in (False, True):
            steps.seconds_per_step(block, record)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for pair in range(pairs):
            for record in (False, True) if pair % 2 == 0 else (True, False):
                seconds[record].append(steps.seconds_per_step(block, record))
        del steps
    return {
        "model": model_name,
        "image_size": image_size,
        "steps_per_block": block,
        "step_ms_without": [1e3 * value for value in seconds[False]],
        "step_ms_with": [1e3 * value for value in seconds[True]],
        "step_ratio": [a / b for a, b in zip(seconds[True], seconds[False], strict=True)],
    }
