"""`benchmarks.offline` and what it compares with: the same scores by both ways; no time is
judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.offline import KEYS, Size, main, write_dynamics
from benchmarks.windowed import windowed_scores
from tdds_dist.runs.artifacts import load_scores
from tdds_dist.scoring.offline import score

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parents[1] / "golden" / "tdds_official_digits.npz"
TINY = "--num-samples 500 --num-classes 5 --epochs 12 --repetitions 1 --cold-repetitions 1".split()


@pytest.mark.parametrize(
    "size",
    [Size(300, 20, 12, 5), Size(50, 3, 4, 4), Size(200, 40, 6, 2), Size(1, 2, 3, 3)],
    ids=str,
)
def test_windowed_scores_are_ours(tmp_path: Path, size: Size) -> None:
    folder = tmp_path / "outputs"
    write_dynamics(folder, size)
    (path,) = score(
        folder, preset="official", T=size.T, K=size.K, beta=0.9, out=tmp_path / "ours.npz"
    )
    ours_N = load_scores(path).score_N
    windowed_N = windowed_scores(folder, size.T, size.K)
    assert windowed_N.dtype == np.float32
    np.testing.assert_allclose(
        windowed_N, ours_N, rtol=0, atol=1e-5 * max(float(np.abs(ours_N).mean()), 1.0)
    )
    assert (size.K == 2) == (not ours_N.any()), "one difference does not vary, others do"


@pytest.mark.parametrize(("T", "K", "beta"), [(30, 10, 0.9), (30, 20, 0.85), (10, 5, 0.9)])
def test_windowed_scores_are_the_authors(tmp_path: Path, T: int, K: int, beta: float) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        for epoch in range(T):
            np.save(tmp_path / f"{epoch}_Output.npy", golden["logits"][epoch])
            np.save(tmp_path / f"{epoch}_Index.npy", golden["index"][epoch])
        want_N = golden[f"score_T{T}_K{K}_beta{beta:g}"]
    np.testing.assert_allclose(
        windowed_scores(tmp_path, T, K, beta), want_N, rtol=0, atol=1e-5 * float(want_N.mean())
    )


def test_benchmark_runs_both_ways_and_every_key(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    words = f"--threads 2 --sizes 2000x50x6x4 300x20x5x5 --out {tmp_path} --name tiny"
    assert main([*TINY, *words.split()]) == 0
    torch.set_num_threads(threads)  # which other tests share
    result = json.loads((tmp_path / "offline_tiny.json").read_text())
    first, second = result["rows"]
    warm = ["windowed", "tdds score", "tdds score, 1 thread"]
    assert list(first["runs"]) == [*warm, "windowed, cold", "tdds score, cold"]
    assert list(second["runs"]) == warm
    for row in (first, second):
        assert all(len(runs) == 1 and runs[0]["seconds"] > 0 for runs in row["runs"].values())
        assert row["largest_difference"] < 1e-5
    assert first["output_bytes"] == 2000 * 50 * 6 * 4
    (windowed,), (ours,) = first["runs"]["windowed"], first["runs"]["tdds score"]
    assert windowed["peak_bytes"] > first["output_bytes"], "it holds all epochs"
    metrics, label = result["metrics"], "tdds score N=2,000 C=50 T=6 K=4"
    faster = windowed["seconds"] / ours["seconds"]
    smaller = windowed["peak_bytes"] / max(ours["peak_bytes"], 1)
    assert metrics[f"{label}, times faster"]["value"] == pytest.approx(faster)
    assert metrics[f"{label}, times smaller"]["value"] == pytest.approx(smaller)
    assert {f"trajectory N=500 T=12 {key}, s" for key in (*KEYS, "all")} <= metrics.keys()
    assert result["trajectory"]["trajectory_bytes"] > 500 * 9 * 12 * 4
    page = (tmp_path / "offline_tiny.md").read_text()
    known = ("NumPy's operations use one core", "page cache", "storage delivered at least")
    for said in ("| dual ", *known, "Not measured"):
        assert said in page, said
