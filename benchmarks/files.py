"""What all benchmarks share: their result files, their metrics (which `benchmarks.compare` reads),
their provenance.

A result is a dictionary with `benchmark` (its kind), `settings`, `warm_up` (in words),
`repetitions`, `metrics` (by name, each made by `metric`), `provenance`, and whatever else the page
shows.
"""

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import write_atomically
from tdds_dist.runs.directory import environment
from tdds_dist.text import markdown_table

RESULTS = Path(__file__).parent / "results"


def add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """--out and --name of a benchmark whose files are called `<kind>_NAME`."""
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the result files"
    )
    parser.add_argument(
        "--name", default="", help=f"of the result files, {kind}_NAME; default from the hardware"
    )


def metric(
    values: Sequence[float],
    unit: str,
    better: Literal["higher", "lower"],
    *,
    relative: bool = False,
) -> dict[str, Any]:
    """One figure of a result: median and range of its repetitions.

    `relative`: a ratio within the run, or a size, which another machine should give as well.
    """
    return {
        "value": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
        "unit": unit,
        "better": better,
        "relative": relative,
    }


def provenance(
    world_size: int = 1, device: str = "cpu", threads: int | None = None
) -> dict[str, Any]:
    """Hardware, versions, commit, command, and how busy the machine was."""
    found = environment(world_size, device) | {
        "threads": threads or torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    found.pop("folder", None)  # results are published: no places of the machine
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def provenance_line(result: dict[str, Any]) -> str:
    """The provenance as a sentence for the page."""
    where = result["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    gpu = f"{where['gpu']}, " if "gpu" in where else ""
    return (
        f"{gpu}{where['cpu']}, {where['num_cpus']} CPUs, {where['threads']} threads, Python"
        f" {where['python']}, {versions}; commit {where['commit']}, {where['started']}, load"
        f" average {where['load_average']:.1f}."
    )


def default_name(result: dict[str, Any]) -> str:
    """Hardware and threads; says nothing about the host."""
    where = result["provenance"]
    hardware = re.sub(r"[^a-z0-9]+", "-", where.get("gpu", where["cpu"]).lower()).strip("-")
    return hardware or "gpu" if "gpu" in where else f"{hardware or 'cpu'}_{where['threads']}threads"


table = markdown_table


def save(folder: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write the numbers as JSON and the page as Markdown, and print the page."""
    stem = folder / f"{result['benchmark']}_{name}"
    numbers = json.dumps(result, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(f"{stem}.json"), lambda file: file.write(numbers.encode()))
    write_atomically(Path(f"{stem}.md"), lambda file: file.write(text.encode()))
    print(text)


def run(
    program: str,
    options: argparse.Namespace,
    check: Callable[[argparse.Namespace], object],
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    as_markdown: Callable[[dict[str, Any]], str],
) -> int:
    """Check the options, measure, print the page, write both result files; the exit code, 2 with
    one line for bad input."""
    try:
        check(options)
        result = measure(options)
    except InputError as error:
        print(f"benchmarks.{program}: error: {error}", file=sys.stderr)
        return 2
    save(options.out, options.name or default_name(result), result, as_markdown(result))
    return 0
