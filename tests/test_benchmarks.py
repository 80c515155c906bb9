"""The benchmarks run and say what they must; no number is judged."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.loader import main as loader


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """The benchmark sets the number of torch's threads, which other tests share."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_loader_benchmark_compares_with_the_stock_loader(tmp_path: Path) -> None:
    tiny = ["--num-samples", "60", "--side", "48", "--size", "32", "--batch", "20", "--workers", "1", "--repetitions", "2"]
    assert loader([*tiny, "--out", str(tmp_path), "--name", "tiny"]) == 0
    result = json.loads((tmp_path / "loader_tiny.json").read_text())
    assert all(len(rates) == 2 and min(rates) > 0 for rates in result["images_per_second"].values())
    assert result["ratio_min"] <= result["ratio"] <= result["ratio_max"]
    assert "| FFCV's |" in (tmp_path / "loader_tiny.md").read_text()


def test_checkpoint_benchmark_measures_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--num-samples", "500", "--num-classes", "10",
               "--repetitions", "1", "--out", str(tmp_path), "--name", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr  # a process of its own: it makes a process group
    result = json.loads((tmp_path / "checkpoint_tiny.json").read_text())
    assert min(result["seconds"].values()) > 0
    assert result["checkpoint_bytes"] > result["state_bytes"] > 500 * 10 * 4
