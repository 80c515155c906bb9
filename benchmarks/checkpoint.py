"""What a checkpoint of the scorer costs: how long training stands still, how long until it is on
disk, how long to come back.

One process; the scorer's tables are filled, so nothing is sparse. `stall` is the time until
training may go on: copying the state to host memory where the save is asynchronous, all of it where
it is not. `durable` is until the checkpoint is hashed, synced and visible. `find` checks every
hash, `load` reads the state back. A plain copy of as many bytes with fsync, in the same run, tells
what the disk does. Medians.

    python -m benchmarks.checkpoint                    # 200,000 samples of 1,000 classes: 0.8 GB
"""

# N samples, C classes

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import files
from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.runs.checkpoint import Checkpoints


def measure(
    num_samples: int, num_classes: int, repetitions: int, folder: Path | None
) -> dict[str, Any]:
    """Seconds of every part, with provenance."""
    seconds: dict[str, list[float]] = {
        key: []
        for key in (
            "stall_asynchronous",
            "durable_asynchronous",
            "stall_synchronous",
            "find",
            "load",
            "plain_write",
        )
    }
    with tempfile.TemporaryDirectory(dir=folder) as name, distributed.session("cpu") as world:
        scorer = ShardedScorer(num_samples, num_classes, [Window(30, 10, 0.9)], device="cpu")
        state = scorer.state_dict()
        for table in state.values():
            local = collectives.own_rows(table)
            if local.is_floating_point():
                local.normal_()
        checkpoints = Checkpoints(
            Path(name) / "checkpoints", world, asynchronous=True, stop_on_error=True
        )
        for repetition in range(repetitions):
            started = time.perf_counter()
            checkpoints.save(2 * repetition, scorer.state_dict(), {})
            seconds["stall_asynchronous"].append(time.perf_counter() - started)
            checkpoints.finish()
            seconds["durable_asynchronous"].append(time.perf_counter() - started)
            started = time.perf_counter()
            checkpoints.save(2 * repetition + 1, scorer.state_dict(), {}, wait=True)
            seconds["stall_synchronous"].append(time.perf_counter() - started)
            started = time.perf_counter()
            found = checkpoints.latest()
            seconds["find"].append(time.perf_counter() - started)
            assert found is not None
            started = time.perf_counter()
            target = scorer.state_dict()
            checkpoints.load(found, target)
            scorer.load_state_dict(target)
            seconds["load"].append(time.perf_counter() - started)
            num_bytes = sum(path.stat().st_size for path in found.path.iterdir())
            seconds["plain_write"].append(_plain_write(Path(name) / "plain", num_bytes))
        state_bytes = scorer.state_bytes()
        checkpoints.close()
    return {
        "benchmark": "checkpoint",
        "num_samples": num_samples,
        "num_classes": num_classes,
        "repetitions": repetitions,
        "state_bytes": state_bytes,
        "checkpoint_bytes": num_bytes,
        "seconds": {key: statistics.median(found) for key, found in seconds.items()},
        "all_seconds": seconds,
        "provenance": files.provenance(),
    }


def _plain_write(path: Path, num_bytes: int) -> float:
    """Seconds to write and sync as many bytes."""
    block = os.urandom(1 << 22)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(-(-num_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - started
    path.unlink()
    return taken


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    seconds, plain = result["seconds"], result["seconds"]["plain_write"]
    rows = {
        "training stands still, asynchronous save": "stall_asynchronous",
        "... until it is durable": "durable_asynchronous",
        "training stands still, synchronous save": "stall_synchronous",
        "finding the newest and checking its hashes": "find",
        "loading it": "load",
        "writing as many bytes to one file": "plain_write",
    }
    lines = [
        (
            f"# Checkpoint of the scorer, {result['num_samples']:,} samples,"
            f" {result['num_classes']:,} classes, one process"
        ),
        "",
        (
            f"{result['state_bytes'] / 1e9:.2f} GB of state, {result['checkpoint_bytes'] / 1e9:.2f}"
            f" GB on disk. Medians of {result['repetitions']}."
        ),
        "",
        "| | seconds | of a plain write |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {text} | {seconds[key]:.2f} | {seconds[key] / plain:.2f} |"
        for text, key in rows.items()
    ]
    return "\n".join([*lines, "", files.provenance_line(result), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description="Time of checkpoints of the scorer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--num-samples", type=int, default=200_000, metavar="N", help="size of the dataset"
    )
    parser.add_argument(
        "--num-classes", type=int, default=1000, metavar="C", help="number of classes"
    )
    parser.add_argument(
        "--repetitions", type=int, default=3, metavar="R", help="saves of each kind"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where to write checkpoints (default: temporary folder)",
    )
    files.add_options(parser, "checkpoint")
    options = parser.parse_args(arguments)
    result = measure(options.num_samples, options.num_classes, options.repetitions, options.folder)
    files.save(options.out, options.name or files.default_name(result), result, as_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
