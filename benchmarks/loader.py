"""What augmentation by (seed, epoch, index) costs: images/s of our loader and of FFCV's own, on the
same file.

Both decode, crop at random (areas 0.08 to 1), flip, and give uint8 batches. FFCV's operations draw
from generators of their own threads, so its images differ from run to run. Epochs alternate between
the loaders; medians, after one epoch of each that is not counted (it compiles).

    python -m benchmarks.loader    # 2,000 images of 400x400, written to a temporary folder
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import files
from tdds_dist.data.beton import inspect_beton
from tdds_dist.data.loader import BetonLoader, View
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed.partition import epoch_order


def ours(path: Path, batch: int, size: int, workers: int) -> Callable[[int], int]:
    """One epoch of our loader; returns the images seen."""
    loader = BetonLoader(
        inspect_beton(path), batch, View(size, "resized", flip=True), num_workers=workers
    )
    num_samples = len(loader.indices)

    def epoch(number: int) -> int:
        order = epoch_order(num_samples, batch, epoch=number)
        return sum(
            len(part.index) for part in loader.batches(order, rank=0, world_size=1, epoch=number)
        )

    return epoch


def stock(path: Path, batch: int, size: int, workers: int) -> Callable[[int], int]:
    """One epoch of FFCV's loader with its own operations."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        drop_last=False,
        os_cache=True,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((size, size)),
                RandomHorizontalFlip(),
                ToTensor(),
            ],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    return lambda number: sum(len(image) for image, _ in loader)


def measure(
    num_samples: int,
    side: int,
    size: int,
    batch: int,
    workers: int,
    repetitions: int,
    write_mode: str,
) -> dict[str, Any]:
    """Images/s of both, with provenance."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "images.beton"
        source = open_source(f"synthetic:{num_samples},10,{side}", "train", None)
        write_beton(source, path, write_mode=write_mode, progress=False)
        loaders = {
            "ours": ours(path, batch, size, workers),
            "ffcv": stock(path, batch, size, workers),
        }
        rates: dict[str, list[float]] = {key: [] for key in loaders}
        for repetition in range(1 + repetitions):
            for key, epoch in loaders.items():
                started = time.perf_counter()
                seen = epoch(repetition)
                if repetition > 0:
                    rates[key].append(seen / (time.perf_counter() - started))
    median = {key: statistics.median(found) for key, found in rates.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["ffcv"], strict=True)]
    return {
        "benchmark": "loader",
        "num_samples": num_samples,
        "side": side,
        "size": size,
        "batch": batch,
        "workers": workers,
        "write_mode": write_mode,
        "repetitions": repetitions,
        "images_per_second": rates,
        "median": median,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "provenance": files.provenance(threads=workers),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    median = result["median"]
    return "\n".join(
        [
            (
                f"# Loader: {result['num_samples']:,} images of {result['side']}x{result['side']}"
                f" ({result['write_mode']}) to {result['size']}x{result['size']},"
                f" {result['workers']} threads"
            ),
            "",
            "| loader | images/s (median) | augmentation |",
            "|---|---:|---|",
            f"| ours | {median['ours']:.0f} | a function of seed, epoch and index |",
            f"| FFCV's | {median['ffcv']:.0f} | unseeded generators of its threads |",
            "",
            (
                f"Ours / FFCV's, epoch by epoch: {result['ratio']:.3f} ({result['ratio_min']:.3f}"
                f" to {result['ratio_max']:.3f}), {result['repetitions']} pairs."
            ),
            "",
            files.provenance_line(result),
            "",
        ]
    )


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all that read a file alone."""
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="images per batch")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="W",
        help="decoding threads",
    )
    parser.add_argument(
        "--repetitions", type=int, default=5, metavar="R", help="counted epochs of each kind"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description="Images/s of our loader and FFCV's own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--num-samples", type=int, default=2000, metavar="N", help="images in the file"
    )
    parser.add_argument(
        "--side", type=int, default=400, metavar="S", help="side of the stored images, pixels"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        metavar="S",
        help="side of the images that come out, pixels",
    )
    parser.add_argument(
        "--write-mode", choices=("jpg", "raw"), default="jpg", help="how images are stored"
    )
    add_reading_options(parser)
    files.add_options(parser, "loader")
    options = parser.parse_args(arguments)
    result = measure(
        options.num_samples,
        options.side,
        options.size,
        options.batch,
        options.workers,
        options.repetitions,
        options.write_mode,
    )
    files.save(
        options.out,
        options.name or f"{files.default_name(result)}_{options.write_mode}",
        result,
        as_markdown(result),
    )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
