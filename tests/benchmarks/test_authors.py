"""The comparison with the authors' code. Where a folder with it is at hand, TDDS_AUTHORS_CODE names
it, and the comparison runs, too."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.authors import SCRIPTS, main, summary


def test_what_is_missing_of_the_authors_code_is_said(tmp_path, capsys):
    for name in SCRIPTS:
        (tmp_path / name).touch()
    assert main([str(tmp_path), "--work", str(tmp_path / "work")]) == 2
    assert "has no data.py, data_subset.py, utils.py; give a checkout of" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_seeds_are_compared_within_and_across_the_sides():
    rng = np.random.default_rng(0)
    runs = {
        side: [
            {"score": rng.random(50).round(1), "top1": {"full": 90.0 + seed, "0.5": 80.0}}
            for seed in range(num)
        ]
        for side, num in (("theirs", 3), ("ours", 2))
    }
    found = summary(runs)
    theirs, ours = ([run["score"] for run in runs[side]] for side in ("theirs", "ours"))
    assert found["spearman"] == {
        name: pytest.approx([spearmanr(a, b).statistic for a, b in pairs])
        for name, pairs in {
            "within theirs": [
                (theirs[0], theirs[1]),
                (theirs[0], theirs[2]),
                (theirs[1], theirs[2]),
            ],
            "within ours": [(ours[0], ours[1])],
            "across": [(a, b) for a in theirs for b in ours],
        }.items()
    }
    assert found["quantiles"]["ours"][1][2] == np.median(ours[1])
    assert found["top1"]["theirs"] == {"full": [90.0, 91.0, 92.0], "0.5": [80.0] * 3}


@pytest.mark.slow
@pytest.mark.skipif("TDDS_AUTHORS_CODE" not in os.environ, reason="the authors' code is not here")
def test_both_train_score_and_retrain_on_the_same_images(tmp_path):
    words = f"--work {tmp_path}/work --out {tmp_path} --name tiny --epochs 3 --window 3 --rates 0.5"
    assert main([os.environ["TDDS_AUTHORS_CODE"], *words.split(), "--seeds", "0", "1"]) == 0
    result = json.loads((tmp_path / "authors_tiny.json").read_text())
    assert [len(pairs) for pairs in result["spearman"].values()] == [1, 1, 4]
    # far from what chance gives on ten classes, and the scores of both say something of each other
    assert min(min(top1["full"]) for top1 in result["top1"].values()) > 40
    assert min(result["spearman"]["across"]) > 0.1
    assert Path(tmp_path / "authors_tiny.md").read_text().startswith("# The authors' code and ours")
