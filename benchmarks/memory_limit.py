"""Reading a `.beton` that is larger than memory: images/s and bytes read, in random order and in
blocks (`data.order`).

Each epoch runs in a process of its own, in a control group whose memory is limited (needs root),
from an empty cache. `in memory` is a second epoch without a limit, when the system holds the whole
file. What is read is counted by the kernel (/proc/self/io). Our loader alone: decoding without a
network.

    python -m benchmarks.memory_limit    # 4 GB of 192x192 raw images, in 1 GB of memory
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import files
from benchmarks.loader import add_reading_options
from benchmarks.ranks import run_on_ranks
from tdds_dist.data.beton import inspect_beton
from tdds_dist.data.loader import BetonLoader, View, block_rows
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.errors import InputError

ORDERS = ("random", "blocks")
GROUPS = Path("/sys/fs/cgroup")
_SOME = 4096  # images, from whose bytes the number of images follows


@contextmanager
def limited(num_bytes: int) -> Iterator[Path]:
    """Give a control group with so much memory, page cache included; remove it after."""
    is_first = (GROUPS / "memory").is_dir()  # version 1 of control groups
    folder = (GROUPS / "memory" if is_first else GROUPS) / f"tdds-{os.getpid()}"
    try:
        folder.mkdir()
        limit = folder / ("memory.limit_in_bytes" if is_first else "memory.max")
        limit.write_text(str(num_bytes))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made or limited ({error.strerror}); run this as root, where"
            " control groups may be written"
        ) from error
    try:
        yield folder
    finally:
        folder.rmdir()


def noise(side: int, index: int) -> np.ndarray:
    """Return an image, faster than those of the source; as JPEG about 0.7 bytes a pixel."""
    coarse = np.random.default_rng(index).integers(0, 256, (-(-side // 4),) * 2 + (3,), np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[:side, :side].copy()


def write(path: Path, num_samples: int, side: int, write_mode: str) -> int:
    """Write so many images; return the bytes of the file."""
    source = open_source(f"synthetic:{num_samples},10,{side}", "train", None)
    source = replace(source, reader=partial(noise, side))
    write_beton(source, path, write_mode=write_mode, progress=False, overwrite=True)
    return path.stat().st_size


def epoch(path: Path, order: str, batch: int, workers: int, group: Path | None) -> dict[str, float]:
    """Read an epoch in this process; return images/s and the bytes read per byte of images."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    info = inspect_beton(path)
    side = int(info.width_N[0])
    loader = BetonLoader(info, batch, View(side), num_workers=workers)
    rows = block_rows(info) if order == "blocks" else None
    visits = epoch_order(info.num_samples, batch, epoch=1, block_rows=rows)
    first = epoch_order(batch, batch, shuffle=False)
    list(loader.batches(first, rank=0, world_size=1, epoch=1))  # compiles
    before, started = _bytes_read(), time.perf_counter()
    num = sum(
        int((part.index >= 0).sum())
        for part in loader.batches(visits, rank=0, world_size=1, epoch=1)
    )
    seconds = time.perf_counter() - started
    return {
        "images_per_second": num / seconds,
        "read_per_byte": (_bytes_read() - before) / int(info.size_N.sum()),
    }


def _bytes_read() -> int:
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _forget(path: Path) -> None:
    """Take the file out of the system's cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every order in memory and beyond it, with provenance."""
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        limited(int(options.memory_gb * 1e9)) as group,
    ):
        path = Path(name) / "images.beton"
        of_some = write(path, _SOME, options.side, options.write_mode)
        num_samples = int(options.file_gb * 1e9 / of_some * _SOME)
        num_bytes = write(path, num_samples, options.side, options.write_mode)
        for order in ORDERS:
            for memory, limit in (("limited", group), ("whole file", None)):
                found = []
                for repetition in range(options.repetitions + (limit is None)):
                    if limit is not None:
                        _forget(path)
                    (run,) = run_on_ranks(
                        1, epoch, path, order, options.batch, options.workers, limit
                    )
                    if limit is not None or repetition > 0:  # the first fills the cache
                        found.append(run)
                rows.append(
                    {"order": order, "memory": memory}
                    | {key: [run[key] for run in found] for key in found[0]}
                )
                print(rows[-1], file=sys.stderr)
    return {
        "benchmark": "memory_limit",
        "num_samples": num_samples,
        "side": options.side,
        "batch": options.batch,
        "workers": options.workers,
        "write_mode": options.write_mode,
        "file_gb": num_bytes / 1e9,
        "memory_gb": options.memory_gb,
        "repetitions": options.repetitions,
        "rows": rows,
        "provenance": files.provenance(threads=options.workers),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """Return the result page."""
    whole = {
        row["order"]: statistics.median(row["images_per_second"])
        for row in result["rows"]
        if row["memory"] == "whole file"
    }
    table = [["order", "memory", "images/s", "MB/s", "of random in memory", "bytes read per byte"]]
    for row in result["rows"]:
        rate = statistics.median(row["images_per_second"])
        read = statistics.median(row["read_per_byte"])
        table.append(
            [
                row["order"],
                row["memory"],
                f"{rate:,.0f}",
                f"{rate * result['file_gb'] * 1e3 / result['num_samples']:,.0f}",
                f"{rate / whole['random']:.0%}",
                f"{read:.2f}",
            ]
        )
    return "\n".join(
        [
            (
                f"# A file of {result['file_gb']:.1f} GB in {result['memory_gb']:g} GB of memory:"
                f" {result['num_samples']:,} {result['write_mode']} images of"
                f" {result['side']}x{result['side']}"
            ),
            "",
            files.table(table),
            "",
            (
                f"Batches of {result['batch']}, {result['workers']} threads, no network; an epoch"
                " in a process of its own from an empty cache, in memory from a full one; medians"
                f" of {result['repetitions']}."
            ),
            "",
            files.provenance_line(result),
            "",
        ]
    )


def check(options: argparse.Namespace) -> None:
    """Raise InputError for a file that fits."""
    if not 0 < options.memory_gb < options.file_gb:
        raise InputError(
            f"--memory-gb {options.memory_gb:g} must lie between 0 and --file-gb"
            f" {options.file_gb:g}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_limit",
        description="Reading a file that is larger than memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--file-gb", type=float, default=4.0, metavar="GB", help="size of the file")
    parser.add_argument("--memory-gb", type=float, default=1.0, metavar="GB", help="the limit")
    parser.add_argument("--side", type=int, default=192, metavar="S", help="of images, pixels")
    parser.add_argument("--write-mode", default="jpg", choices=("jpg", "raw"), help="of images")
    parser.add_argument("--folder", default=None, metavar="DIR", help="where the file is written")
    add_reading_options(parser)
    files.add_options(parser, "memory_limit")
    options = parser.parse_args(arguments)
    return files.run("memory_limit", options, check, measure, as_markdown)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
