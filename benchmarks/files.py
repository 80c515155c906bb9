"""Result files of the benchmarks: where they go, what they are called."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tdds_dist.artifacts import write_atomically

RESULTS = Path(__file__).parent / "results"


def add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """--out and --name of a benchmark whose files are called `<kind>_NAME`."""
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the result files")
    parser.add_argument("--name", default="", help=f"of the result files, {kind}_NAME; default from CPU and threads")


def default_name(result: dict[str, Any]) -> str:
    """CPU and threads; says nothing about the host."""
    cpu = re.sub(r"[^a-z0-9]+", "-", result["provenance"]["cpu"].lower()).strip("-")
    return f"{cpu or 'cpu'}_{result['provenance']['threads']}threads"


def save(folder: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write the numbers as JSON and the page as Markdown, and print the page."""
    stem = folder / f"{result['benchmark']}_{name}"
    numbers = json.dumps(result, indent=2) + "\n"
    write_atomically(Path(f"{stem}.json"), lambda file: file.write(numbers.encode()))
    write_atomically(Path(f"{stem}.md"), lambda file: file.write(text.encode()))
    print(text)
