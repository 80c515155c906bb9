"""The benchmarks run and say what they must; no number is judged."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.loader import main as loader
from benchmarks.offline import KEYS
from benchmarks.offline import main as offline
from benchmarks.scorer import main

TINY = ["--num-samples", "200", "--num-classes", "10", "5", "--logp-dtype", "float32", "--batch", "32", "--epochs", "3",
        "--repetitions", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """The benchmark sets the number of torch's threads, which other tests share."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_scorer_benchmark_writes_numbers_with_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--pairs", "1", "--block", "1", "--out", str(tmp_path), "--name", "tiny"]) == 0
    result = json.loads((tmp_path / "scorer_tiny.json").read_text())
    assert [row["num_classes"] for row in result["rows"]] == [5, 10]
    for row in result["rows"]:
        assert row["state_bytes"] == row["formula_bytes"]
        for key in ("record_us_per_sample", "record_samples_per_second", "end_epoch_us_per_sample",
                    "peak_resident_bytes", "resident_before_bytes", "step_ms_with", "step_ms_without", "step_ratio"):
            assert row[key] > 0
        assert (row["batch"], row["epochs"], row["repetitions"], row["window_K"]) == (32, 3, 2, 3)
        assert (row["model"], row["image_size"], row["pairs"]) == ("shufflenet_v2_x0_5", 32, 1)
    known = set(result["provenance"])
    assert {"commit", "cpu", "num_cpus", "versions", "python", "threads", "load_average_before"} <= known

    page = (tmp_path / "scorer_tiny.md").read_text()
    assert "us/sample" in page
    assert "us/sample" in capsys.readouterr().out
    files = [path.read_text() for path in tmp_path.iterdir()]
    assert len(files) == 2
    assert not any(f" {socket.gethostname()} " in text or f'"{socket.gethostname()}"' in text for text in files)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--epochs", "1"], "--epochs 1 must be at least 2"),
    (["--batch", "150", "--pairs", "1"], "--num-samples 200 must hold two batches of 150"),
])
def test_scorer_benchmark_refuses_sizes_that_measure_nothing(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([*TINY, "--out", str(tmp_path / "new"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_offline_benchmark_times_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num-samples", "500", "--num-classes", "5", "--epochs", "12", "--repetitions", "1", "--out", str(tmp_path)]
    assert offline([*arguments, "--name", "tiny"]) == 0
    result = json.loads((tmp_path / "offline_tiny.json").read_text())
    assert [row["key"] for row in result["rows"]] == [*KEYS, "all"]
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert result["trajectory_bytes"] > 500 * 9 * 12 * 4
    assert "| dual |" in capsys.readouterr().out
    assert offline([*arguments, "--epochs", "5"]) == 2


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
