"""What `tdds score --all` costs at the size of ImageNet-1K: seconds per score key from a trajectory on disk.

The trajectory is made up (its values cost the same as real ones) and written in blocks as several ranks would, into a
temporary folder. Each key is timed by itself, reading included, then all of them at once; medians over repetitions. The
first, uncounted repetition also brings the files into the page cache, so disks are not measured.

    python -m benchmarks.offline                       # 1,281,167 images, 30 epochs: 1.4 GB in the temporary folder
"""

# F scalars, M rows of a block, N samples

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import files
from tdds_dist.rundir import environment
from tdds_dist.scalars import SCALARS
from tdds_dist.score import score_all
from tdds_dist.trajectory import TrajectoryWriter

KEYS = ("tdds", "forgetting", "el2n", "aum", "dyn_unc", "dual", "random")
NUM_BLOCKS = 8  # ranks that seem to have written it


def write_trajectory(folder: Path, num_samples: int, num_classes: int, num_epochs: int) -> None:
    """Scalars in their usual ranges, for every sample and epoch."""
    bounds = np.linspace(0, num_samples, NUM_BLOCKS + 1).astype(int)
    rng = np.random.default_rng(0)
    for first, end in itertools.pairwise(bounds):
        writer = TrajectoryWriter(folder, SCALARS, num_samples, num_classes, int(first), int(end), is_main=first == 0)
        writer.write_labels(np.arange(first, end) % num_classes)
        for epoch in range(num_epochs):
            scalars_FM = rng.random((len(SCALARS), end - first), dtype=np.float32)
            scalars_FM[SCALARS.index("correct")] = scalars_FM[SCALARS.index("correct")] > 0.3
            writer.append(epoch, scalars_FM)


def measure(num_samples: int, num_classes: int, num_epochs: int, repetitions: int) -> dict[str, Any]:
    """Seconds by key and for all keys in one call, with provenance."""
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
    rows = [{"key": key, "seconds": statistics.median(found), "seconds_min": min(found), "seconds_max": max(found)}
            for key, found in seconds.items()]
    return {"benchmark": "offline", "num_samples": num_samples, "num_classes": num_classes, "num_epochs": num_epochs,
            "repetitions": repetitions, "trajectory_bytes": size, "rows": rows,
            "provenance": environment(1, "cpu") | {"threads": torch.get_num_threads()}}


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    where = result["provenance"]
    lines = [f"# `tdds score --all`, {result['num_samples']:,} images, {result['num_epochs']} epochs", "",
             f"Trajectory of {result['trajectory_bytes'] / 1e9:.2f} GB, in the page cache. Medians of {result['repetitions']}.",
             "",
             "| score | seconds | smallest | largest |", "|---|---:|---:|---:|"]
    lines += [f"| {row['key']} | {row['seconds']:.2f} | {row['seconds_min']:.2f} | {row['seconds_max']:.2f} |"
              for row in result["rows"]]
    lines += ["", f"{where['cpu']}, {where['num_cpus']} CPUs, Python {where['python']}, NumPy {where['versions']['numpy']}, "
                  f"torch {where['versions']['torch']}, commit {where['commit']}, {where['started']}.", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description="Time of scoring from a trajectory.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=1_281_167, metavar="N", help="size of the dataset")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="C", help="number of classes")
    parser.add_argument("--epochs", type=int, default=30, metavar="T", help="epochs in the trajectory")
    parser.add_argument("--repetitions", type=int, default=3, metavar="R", help="counted, after one that is not")
    files.add_options(parser, "offline")
    options = parser.parse_args(arguments)
    if options.epochs < 10 or options.num_samples < NUM_BLOCKS or options.repetitions < 1:
        print("benchmarks.offline: error: --epochs must be at least 10 (the windows), --num-samples at least 8, --repetitions "
              "at least 1", file=sys.stderr)
        return 2
    result = measure(options.num_samples, options.num_classes, options.epochs, options.repetitions)
    files.save(options.out, options.name or files.default_name(result), result, as_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
