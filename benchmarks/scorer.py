"""What scoring costs: time and memory of `ShardedScorer` on the CPU, one process, and its share of a training step.

Measured: `record` for every batch of an epoch and `end_epoch` (which also applies the last batch), each on its own,
on outputs made in advance; the state in bytes against the formula; the resident memory. Then, with a real network,
training steps with `record` and without, in alternating blocks of one process, so that whatever else the machine does
hits both alike. All in a process group of one (gloo), as `tdds collect` without torchrun.

Not measured: rows between ranks (one process keeps all of its own), the trajectory on disk, loading of images, GPUs,
and `end_epoch` within the training step (its own column says what it adds per epoch). Epoch 0 has no previous epoch
to compare with, is cheaper, and is not timed.
"""

# B batch, C classes, N samples, P batches of outputs made in advance, S steps of an epoch

import argparse
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import files
from tdds_dist.distributed import session
from tdds_dist.errors import InputError
from tdds_dist.models import build_model
from tdds_dist.partition import EpochOrder, epoch_order
from tdds_dist.rundir import environment
from tdds_dist.scalars import SCALARS
from tdds_dist.scorer import ShardedScorer
from tdds_dist.tdds import Window

LARGEST_K = 10  # window of the paper's ImageNet setting
NUM_BATCHES = 8  # distinct batches of outputs, so that they are not all in the cache
LOGIT_SCALE = 3.0  # spread of made-up logits; a trained network's are of this order
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    num_samples: int
    num_classes: int
    batch: int
    epochs: int
    logp_dtype: str

    @property
    def window(self) -> Window:
        """Full at the last epoch, so that the last `end_epoch` does all of its work."""
        return Window(self.epochs, min(LARGEST_K, self.epochs))

    def scorer(self) -> ShardedScorer:
        return ShardedScorer(self.num_samples, self.num_classes, [self.window], "official", "cpu",
                             logp_dtype=DTYPES[self.logp_dtype])

    def order(self, epoch: int) -> EpochOrder:
        return epoch_order(self.num_samples, self.batch, epoch=epoch)

    def formula_bytes(self) -> int:
        """State by arithmetic.

        Per sample: a row of log-probabilities, the scalars, label (int64), two counters and the quarantine (int32),
        ring and average (float32). The tables that a step writes have one row more, for padding.
        """
        per_step = self.num_classes * DTYPES[self.logp_dtype].itemsize + 4 * len(SCALARS) + 8 + 4 + 4
        per_epoch = 4 * (self.window.K - 1) + 4 + 4
        return (self.num_samples + 1) * per_step + self.num_samples * per_epoch


class Outputs:
    """Made-up outputs of a network: logits [P, B, C] used in turn, labels by global index."""

    def __init__(self, setting: Setting):
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_BATCHES, setting.batch, setting.num_classes)
        self._logits_PBC = torch.randn(shape, generator=generator) * LOGIT_SCALE
        self._label_N = torch.randint(setting.num_classes, (setting.num_samples,), generator=generator)

    def epoch(self, order: EpochOrder) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(index_B, logits_BC, label_B) of every step."""
        index_SB = torch.from_numpy(order.index_SG)
        sample_SB = torch.from_numpy(order.sample_SG)
        for step, (index_B, sample_B) in enumerate(zip(index_SB, sample_SB, strict=True)):
            yield index_B, self._logits_PBC[step % NUM_BATCHES], self._label_N[sample_B]


# ---- the scorer alone


def measure_alone(setting: Setting, repetitions: int) -> dict[str, Any]:
    """Times per sample and memory; medians over `repetitions` scorers after one that is not counted."""
    outputs = Outputs(setting)
    resident = resident_bytes()
    record_seconds, end_seconds, state = [], [], 0
    for repetition in range(1 + repetitions):
        scorer = setting.scorer()
        state = scorer.state_bytes()
        record, end = _one_run(scorer, setting, outputs)
        if repetition > 0:
            record_seconds.append(record)
            end_seconds.append(end)
        del scorer
        gc.collect()
    record_us = [1e6 * seconds / setting.num_samples for seconds in record_seconds]
    return {
        "record_us_per_sample": statistics.median(record_us),
        "record_us_per_sample_min": min(record_us),
        "record_us_per_sample_max": max(record_us),
        "record_samples_per_second": 1e6 / statistics.median(record_us),
        "end_epoch_us_per_sample": 1e6 * statistics.median(end_seconds) / setting.num_samples,
        "repetitions": repetitions,
        "state_bytes": state,
        "formula_bytes": setting.formula_bytes(),
        "resident_before_bytes": resident,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _one_run(scorer: ShardedScorer, setting: Setting, outputs: Outputs) -> tuple[float, float]:
    """Seconds of an epoch's `record` calls (mean over the epochs after the first), and of the last `end_epoch`."""
    record_seconds, end_seconds = 0.0, 0.0
    for epoch in range(setting.epochs):
        order = setting.order(epoch)
        scorer.expect(order)
        seconds = 0.0
        for batch in outputs.epoch(order):
            started = time.perf_counter()
            scorer.record(*batch)
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        scorer.end_epoch()
        end_seconds = time.perf_counter() - started
        record_seconds += seconds if epoch > 0 else 0.0
    return record_seconds / (setting.epochs - 1), end_seconds


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


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
        for batch in Outputs(setting).epoch(setting.order(0)):  # from here on there is a previous epoch
            self._scorer.record(*batch)
        self._scorer.end_epoch()
        self._index_SB = torch.from_numpy(setting.order(1).index_SG[:-1])  # the last step may hold padding
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


def measure_share(setting: Setting, model_name: str, image_size: int, pairs: int, block: int) -> dict[str, Any]:
    """Step time with `record` over that without, as the median over pairs of neighbouring blocks."""
    steps = Steps(setting, model_name, image_size)
    for record in (False, True):
        steps.seconds_per_step(block, record)
    with_seconds: list[float] = []
    without_seconds: list[float] = []
    for pair in range(pairs):
        for record in (False, True) if pair % 2 == 0 else (True, False):
            (with_seconds if record else without_seconds).append(steps.seconds_per_step(block, record))
    ratios = [a / b for a, b in zip(with_seconds, without_seconds, strict=True)]
    return {
        "model": model_name, "image_size": image_size, "pairs": pairs, "steps_per_block": block,
        "step_ms_without": 1e3 * statistics.median(without_seconds),
        "step_ms_with": 1e3 * statistics.median(with_seconds),
        "step_ratio": statistics.median(ratios), "step_ratio_min": min(ratios), "step_ratio_max": max(ratios),
    }


# ---- the program


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scorer", description="Time and memory of scoring on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=50_000, metavar="N", help="size of the dataset")
    parser.add_argument("--num-classes", type=int, nargs="+", default=[100, 1000], metavar="C", help="one row for each")
    parser.add_argument("--logp-dtype", choices=tuple(DTYPES), nargs="+", default=["float32", "float16"],
                        help="precision of stored log-probabilities, one row for each")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="rows of a call")
    parser.add_argument("--epochs", type=int, default=3, metavar="E", help="epochs per repetition, the first not timed")
    parser.add_argument("--repetitions", type=int, default=5, metavar="R", help="counted, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--model", default="shufflenet_v2_x0_5", help="network of the training step")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS", help="its images")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of blocks with and without record; 0: none")
    parser.add_argument("--block", type=int, default=8, metavar="STEPS", help="training steps of a block")
    files.add_options(parser, "scorer")
    return parser


def check(options: argparse.Namespace) -> None:
    """InputError for sizes that measure nothing."""
    least = {"num_samples": 1, "batch": 1, "epochs": 2, "repetitions": 1, "threads": 1, "pairs": 0, "block": 1}
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {bound}")
    if options.pairs and options.num_samples < 2 * options.batch:
        raise InputError(f"--num-samples {options.num_samples} must hold two batches of {options.batch}; lower "
                         "--batch, or leave the training step out with --pairs 0")
    if options.pairs:
        build_model(options.model, 2)  # an unknown name is said now, not after minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write both result files; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        check(options)
        torch.set_num_threads(options.threads)
        result = measure(options)
    except InputError as error:
        print(f"benchmarks.scorer: error: {error}", file=sys.stderr)
        return 2
    files.save(options.out, options.name or files.default_name(result), result, as_markdown(result))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows with their provenance."""
    load = os.getloadavg()[0]
    settings = [Setting(options.num_samples, num_classes, options.batch, options.epochs, dtype)
                for num_classes in options.num_classes for dtype in options.logp_dtype]
    settings.sort(key=Setting.formula_bytes)  # a peak is that of the process so far: ascending, each row shows its own
    rows = []
    with session("cpu"):
        for setting in settings:
            alone = measure_alone(setting, options.repetitions)
            rows.append(asdict(setting) | {"window_K": setting.window.K} | alone)
            print(f"record, C = {setting.num_classes}, {setting.logp_dtype}: done", file=sys.stderr)
        for setting, row in zip(settings, rows, strict=True):
            if options.pairs:
                row |= measure_share(setting, options.model, options.image_size, options.pairs, options.block)
                print(f"training step, C = {setting.num_classes}, {setting.logp_dtype}: done", file=sys.stderr)
    provenance = environment(1, "cpu") | {"threads": options.threads, "load_average_before": load,
                                          "load_average_after": os.getloadavg()[0]}
    return {"benchmark": "scorer", "rows": rows, "provenance": provenance}


# ---- presentation


COLUMNS = {
    "classes": "num_classes", "stored as": "logp_dtype", "record, us/sample": "record_us_per_sample",
    "samples/s": "record_samples_per_second", "end_epoch, us/sample": "end_epoch_us_per_sample",
    "state, MiB": "state_bytes", "formula, MiB": "formula_bytes", "peak RSS, MiB": "peak_resident_bytes",
    "step, ms": "step_ms_without", "with record, ms": "step_ms_with", "ratio": "step_ratio",
}


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown table, padded so that it reads well on a terminal too."""
    columns = {title: key for title, key in COLUMNS.items() if key in rows[0]}
    cells = [list(columns), *[[_cell(key, row[key]) for key in columns.values()] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def _cell(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{value / 2**20:.1f}"
    if key == "record_samples_per_second":
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:.3f}" if key == "step_ratio" or value < 1 else f"{value:.1f}"
    return str(value)


def as_markdown(result: dict[str, Any]) -> str:
    """The result page: table, spread, provenance."""
    rows, where = result["rows"], result["provenance"]
    first = rows[0]
    spread = max(row["record_us_per_sample_max"] / row["record_us_per_sample_min"] for row in rows)
    text = [
        "# Cost of scoring, one process on the CPU", "", as_table(rows), "",
        f"N = {first['num_samples']:,}, batch {first['batch']}, window K = {first['window_K']}. `record`: median of "
        f"{first['repetitions']} repetitions after one warm-up, each the mean of epochs 1 to {first['epochs'] - 1} "
        f"(largest over smallest repetition: at most {spread:.2f}). `end_epoch`: the same of the last epoch. Peak RSS: "
        f"of the process with torch loaded ({first['resident_before_bytes'] / 2**20:.0f} MiB before the first scorer)."]
    if "model" in first:
        ratios = ", ".join(f"{row['step_ratio_min']:.3f} to {row['step_ratio_max']:.3f}" for row in rows)
        text.append(
            f"Step: forward, backward and SGD of {first['model']} at {first['image_size']} pixels, without data "
            f"loading. Ratio: median over {first['pairs']} pairs of alternating blocks of {first['steps_per_block']} "
            f"steps (by row: {ratios}).")
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    text += [
        "", f"{where['cpu']}, {where['num_cpus']} CPUs, {where['threads']} threads, load average "
        f"{where['load_average_before']:.1f} before and {where['load_average_after']:.1f} after; Python "
        f"{where['python']}, {versions}; commit {where['commit']}; {where['started'][:10]}.", "",
        "Again: `python -m benchmarks.scorer`; its docstring says what is measured and what is not.", ""]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
