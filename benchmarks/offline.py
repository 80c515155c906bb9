"""Scoring without training: from a folder of outputs, against the way published code does it, and
from a trajectory.

1. `tdds score` (`scoring.offline.score`) from `{t}_Output.npy` and `{t}_Index.npy` of T epochs,
   against `windowed`: NumPy that holds all epochs and computes every window anew. Each run is a
   process of its own, in turn with the others; time and peak of the resident memory are without
   imports: both start when the program is loaded and has scored a tiny folder. Ours includes the
   writing of the score file. NumPy's element-wise operations use one core, whatever there is; ours
   uses --threads, and is measured with one as well. Outputs are made up (random logits that move a
   little from epoch to epoch): their values cost the same as real ones. They lie in the page cache,
   except for the runs called cold: for these the system was told to drop them, and the page says
   how much storage delivered after that (a host below a virtual machine may still have them).
2. `tdds score --all` from a trajectory of the size of ImageNet-1K, by score key and all at once,
  from the page cache.

    python -m benchmarks.offline    # 0.6, then 1.4 GB in the temporary folder, under 3 GB of memory
"""

# C classes, F scalars, K window, M rows of a block, N samples, T epochs

import argparse
import gc
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import files
from benchmarks.ranks import run_on_ranks
from benchmarks.windowed import windowed_scores
from tdds_dist.distributed.host_memory import peak_bytes, reset_peak
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import fingerprint, load_scores
from tdds_dist.scoring.offline import BASELINES, score, score_all
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.trajectory import TrajectoryWriter

SIZES = (
    "50000x100x30x10",
    "12500x100x30x10",
    "2500x1000x30x10",
    "12500x100x15x10",
    "12500x100x30x20",
)
# those that look at validation by class need a run
KEYS = ("tdds", "random", *(key for key, score in BASELINES.items() if not score.of_classes))
NUM_BLOCKS = 8  # ranks that seem to have written the trajectory
LOGIT_SCALE = 3.0  # spread of made-up logits; a trained network's are of this order
LOGIT_STEP = 0.5  # and how far they move in an epoch


@dataclass(frozen=True)
class Size:
    """One folder of outputs, and the window that is scored."""

    N: int
    C: int
    T: int
    K: int

    @property
    def label(self) -> str:
        """For tables and names of metrics."""
        return f"N={self.N:,} C={self.C:,} T={self.T} K={self.K}"

    @property
    def output_bytes(self) -> int:
        return 4 * self.N * self.C * self.T


TINY = Size(64, 4, 4, 3)


def parse_size(text: str) -> Size:
    """A Size from NxCxTxK; InputError where it is none."""
    try:
        size = Size(*(int(part) for part in text.split("x")))
    except (TypeError, ValueError):
        raise InputError(f"--sizes {text} must be NxCxTxK, for example {SIZES[0]}") from None
    if size.N < 1 or size.C < 2 or not 2 <= size.K <= size.T:
        raise InputError(
            f"--sizes {text} needs N >= 1, C >= 2 and 2 <= K <= T; see `tdds score --help` for T"
            " and K"
        )
    return size


# ---- from a folder of outputs


def write_dynamics(folder: Path, size: Size) -> None:
    """Outputs of T epochs in visit order, float32, and the index of each row; on the disk when this
    returns."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    logits_NC = rng.standard_normal((size.N, size.C), dtype=np.float32) * LOGIT_SCALE
    for epoch in range(size.T):
        index_N = rng.permutation(size.N)
        for name, array in (("Output", logits_NC[index_N]), ("Index", index_N)):
            with (folder / f"{epoch}_{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        logits_NC += rng.standard_normal((size.N, size.C), dtype=np.float32) * LOGIT_STEP


def run_once(side: str, folder: Path, tiny: Path, size: Size, is_cold: bool) -> dict[str, float]:
    """One run in this process, which has done nothing else: seconds, peak of the resident memory
    above what it was before, and what storage had to deliver; bytes. Scores go to
    `folder`/`side`.npy."""
    _score(side, tiny, TINY)
    gc.collect()
    for path in folder.glob("*_*.npy"):
        with path.open("rb") as file:
            if is_cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**20):
                    pass
    has_reset = reset_peak()
    memory, delivered = peak_bytes(has_reset), _delivered_bytes()
    started = time.perf_counter()
    score_N = _score(side, folder, size)
    seconds = time.perf_counter() - started
    found = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(has_reset) - memory,
        "delivered_bytes": _delivered_bytes() - delivered,
    }
    np.save(folder / f"{side}.npy", score_N)
    return found


def _score(side: str, folder: Path, size: Size) -> np.ndarray:
    if side == "windowed":
        return windowed_scores(folder, size.T, size.K)
    (path,) = score(
        folder, preset="official", T=size.T, K=size.K, beta=0.9, out=folder / "ours.npz"
    )
    return load_scores(path).score_N


def _delivered_bytes() -> int:
    """Return what storage has delivered for this process so far; 0 where the system does not
    say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def compare(size: Size, threads: int, repetitions: int, cold_repetitions: int) -> dict[str, Any]:
    """All runs of one size: per side the seconds, bytes and what was read; and how far the scores
    are apart."""
    variants = {"windowed": ("windowed", threads), "tdds score": ("ours", threads)}
    if threads > 1:
        variants["tdds score, 1 thread"] = ("ours", 1)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, tiny = Path(name) / "outputs", Path(name) / "tiny"
        write_dynamics(folder, size)
        write_dynamics(tiny, TINY)
        for repetition in range(max(repetitions, cold_repetitions)):
            for is_cold, number in ((False, repetitions), (True, cold_repetitions)):
                for variant, (side, num_threads) in variants.items():
                    if repetition < number and not (is_cold and num_threads < threads):
                        (run,) = run_on_ranks(
                            1, run_once, side, folder, tiny, size, is_cold, threads=num_threads
                        )
                        found.setdefault(variant + ", cold" * is_cold, []).append(run)
            print(f"{size.label}: run {repetition + 1} done", file=sys.stderr)
        windowed_N, ours_N = (np.load(folder / f"{side}.npy") for side in ("windowed", "ours"))
    difference = float(np.abs(windowed_N - ours_N).max() / np.abs(windowed_N).mean())
    return asdict(size) | {
        "output_bytes": size.output_bytes,
        "runs": found,
        "largest_difference": difference,
    }


# ---- from a trajectory


def write_trajectory(folder: Path, num_samples: int, num_classes: int, num_epochs: int) -> None:
    """Scalars in their usual ranges, for every sample and epoch."""
    bounds, label_N = (
        np.linspace(0, num_samples, NUM_BLOCKS + 1).astype(int),
        np.arange(num_samples) % num_classes,
    )
    rng = np.random.default_rng(0)
    for first, end in itertools.pairwise(bounds):
        writer = TrajectoryWriter(
            folder, SCALARS, num_samples, num_classes, int(first), int(end), is_main=first == 0
        )
        writer.write_labels(label_N[first:end], fingerprint(label_N, num_classes).labels_sha256)
        for epoch in range(num_epochs):
            scalars_FM = rng.random((len(SCALARS), end - first), dtype=np.float32)
            scalars_FM[SCALARS.index("correct")] = scalars_FM[SCALARS.index("correct")] > 0.3
            writer.append(epoch, scalars_FM)


def measure_trajectory(
    num_samples: int, num_classes: int, num_epochs: int, repetitions: int
) -> dict[str, Any]:
    """Seconds by key and for all keys in one call."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "trajectory", Path(name) / "scores"
        write_trajectory(folder, num_samples, num_classes, num_epochs)
        size = sum(path.stat().st_size for path in folder.rglob("*.npy"))
        seconds: dict[str, list[float]] = {key: [] for key in (*KEYS, "all")}
        for repetition in range(1 + repetitions):
            for key, found in seconds.items():
                started = time.perf_counter()
                score_all(folder, () if key == "all" else (key,), out=out)
                if repetition > 0:
                    found.append(time.perf_counter() - started)
    return {
        "num_samples": num_samples,
        "num_classes": num_classes,
        "num_epochs": num_epochs,
        "trajectory_bytes": size,
        "seconds": seconds,
    }


# ---- the program


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, with metrics and provenance."""
    torch.set_num_threads(options.threads)
    where = files.provenance(1, "cpu", options.threads)
    sizes = [parse_size(text) for text in options.sizes]
    rows = []
    for position, size in enumerate(sizes):
        repetitions, cold = (
            (options.repetitions, options.cold_repetitions)
            if position == 0
            else (options.trend_repetitions, 0)
        )
        rows.append(compare(size, options.threads, repetitions, cold))
    trajectory = measure_trajectory(
        options.num_samples, options.num_classes, options.epochs, options.repetitions
    )
    metrics: dict[str, Any] = {}
    for size, row in zip(sizes, rows, strict=True):
        windowed = row["runs"]["windowed"]
        for variant, runs in row["runs"].items():
            seconds, peaks = [run["seconds"] for run in runs], [run["peak_bytes"] for run in runs]
            metrics[f"{variant} {size.label}, s"] = files.metric(seconds, "s", "lower")
            metrics[f"{variant} {size.label}, bytes"] = files.metric(
                peaks, "bytes", "lower", relative=True
            )
            if not variant.startswith("windowed") and not variant.endswith("cold"):
                faster = [
                    other["seconds"] / run["seconds"]
                    for other, run in zip(windowed, runs, strict=True)
                ]
                smaller = [
                    other["peak_bytes"] / max(run["peak_bytes"], 1)
                    for other, run in zip(windowed, runs, strict=True)
                ]
                metrics[f"{variant} {size.label}, times faster"] = files.metric(
                    faster, "x", "higher", relative=True
                )
                metrics[f"{variant} {size.label}, times smaller"] = files.metric(
                    smaller, "x", "higher", relative=True
                )
    for key, found in trajectory["seconds"].items():
        metrics[f"trajectory N={options.num_samples:,} T={options.epochs} {key}, s"] = files.metric(
            found, "s", "lower"
        )
    settings = {
        name: getattr(options, name)
        for name in (
            "sizes",
            "threads",
            "num_samples",
            "num_classes",
            "epochs",
            "cold_repetitions",
            "trend_repetitions",
        )
    }
    return {
        "benchmark": "offline",
        "settings": settings,
        "repetitions": options.repetitions,
        "warm_up": "a folder of 64 samples in every process; one round over the trajectory",
        "metrics": metrics,
        "rows": rows,
        "trajectory": trajectory,
        "provenance": where,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    lines = [["outputs", "program", "seconds", "range", "peak, MB", "faster", "smaller"]]
    for row in result["rows"]:
        label = Size(*(row[name] for name in "NCTK")).label
        for variant, runs in row["runs"].items():
            seconds = [run["seconds"] for run in runs]
            peak = statistics.median(run["peak_bytes"] for run in runs)
            ratios = [
                result["metrics"].get(f"{variant} {label}, times {word}")
                for word in ("faster", "smaller")
            ]
            lines.append(
                [
                    label,
                    variant,
                    f"{statistics.median(seconds):.2f}",
                    f"{min(seconds):.2f} to {max(seconds):.2f}",
                    f"{peak / 1e6:.0f}",
                    *(f"{ratio['value']:.0f} x" if ratio else "" for ratio in ratios),
                ]
            )
    settings, trajectory, first = result["settings"], result["trajectory"], result["rows"][0]
    cold = [
        run for variant, runs in first["runs"].items() if variant.endswith("cold") for run in runs
    ]
    cold_line = ""
    if cold:
        delivered = min(run["delivered_bytes"] for run in cold)
        cold_line = (
            f" Cold: storage delivered at least {delivered / 1e6:.0f} of"
            f" {first['output_bytes'] / 1e6:.0f} MB; runs: {settings['cold_repetitions']}."
        )
    keys = [["score", "seconds", "range"]]
    keys += [
        [key, f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
        for key, found in trajectory["seconds"].items()
    ]
    apart = max(row["largest_difference"] for row in result["rows"])
    return "\n".join(
        [
            "# Scoring what was recorded",
            "",
            "## `tdds score` against windows over all epochs, from a folder of outputs",
            "",
            files.table(lines),
            "",
            (
                f"Medians of {result['repetitions']} runs (first size) or"
                f" {settings['trend_repetitions']} (others), alternating, each a process of its"
                f" own; ratios are medians over pairs. `tdds score` has {settings['threads']}"
                " threads where not said; NumPy's operations use one core. Seconds and peak"
                " resident memory without imports; mapped files count as memory. Outputs in the"
                f" page cache where not called cold.{cold_line} Scores differ by at most"
                f" {apart:.1e} of their mean."
            ),
            "",
            (
                f"## `tdds score --all`, {trajectory['num_samples']:,} images,"
                f" {trajectory['num_epochs']} epochs"
            ),
            "",
            files.table(keys),
            "",
            (
                f"Trajectory of {trajectory['trajectory_bytes'] / 1e9:.2f} GB, in the page cache;"
                f" medians of {result['repetitions']} after one round that does not count."
            ),
            "",
            (
                "Not measured: disks (but for the cold runs), other precisions of outputs, and GPUs"
                " (offline scoring uses none)."
            ),
            "",
            files.provenance_line(result),
            "",
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description="Time and memory of offline scoring.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=list(SIZES),
        metavar="NxCxTxK",
        help="outputs and their window",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch"
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=3,
        metavar="R",
        help="of the first size and the trajectory",
    )
    parser.add_argument(
        "--trend-repetitions", type=int, default=1, metavar="R", help="of the other sizes"
    )
    parser.add_argument(
        "--cold-repetitions",
        type=int,
        default=1,
        metavar="R",
        help="of the first size, no page cache",
    )
    parser.add_argument(
        "--num-samples", type=int, default=1_281_167, metavar="N", help="size of the trajectory"
    )
    parser.add_argument(
        "--num-classes", type=int, default=1000, metavar="C", help="classes of the trajectory"
    )
    parser.add_argument(
        "--epochs", type=int, default=30, metavar="T", help="epochs of the trajectory"
    )
    files.add_options(parser, "offline")
    return parser


def check(options: argparse.Namespace) -> None:
    """InputError for what measures nothing, or does not fit."""
    least = {
        "threads": 1,
        "repetitions": 1,
        "trend_repetitions": 1,
        "cold_repetitions": 0,
        "num_samples": NUM_BLOCKS,
        "num_classes": 2,
        "epochs": 10,
    }
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {bound}"
            )
    if options.cold_repetitions and not hasattr(os, "posix_fadvise"):
        raise InputError(
            f"--cold-repetitions {options.cold_repetitions} needs posix_fadvise, and this system"
            " has none; give 0"
        )
    trajectory_bytes = options.num_samples * options.epochs * len(SCALARS) * 4
    needed = max(trajectory_bytes, *(parse_size(text).output_bytes for text in options.sizes))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > 0.9 * free:
        raise InputError(
            f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free, these sizes need"
            f" {needed / 1e9:.1f}; lower them, or set TMPDIR to another folder"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and Markdown; returns the exit code."""
    return files.run("offline", build_parser().parse_args(arguments), check, measure, as_markdown)


if __name__ == "__main__":
    sys.exit(main())
