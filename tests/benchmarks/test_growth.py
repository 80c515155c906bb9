"""`benchmarks.growth`: slopes of known lines, and a tiny run; no time is judged."""

import json

import pytest

from benchmarks.growth import WORK, main, slope


def test_a_slope_is_that_of_the_whole_cost():
    rows = [{"grows": "N", "at": n, "us": 3.0 * n**0.5} for n in (10, 100, 10_000)]
    rows += [{"grows": "C", "at": c, "us": 7.0 * c} for c in (10, 1_000)]
    rehearsed = {"grows": "N", "at": 10**9, "us": 1e9, "ranks": 1_024}  # not of the line
    rows.append(rehearsed)
    assert slope(rows, "N", "us") == pytest.approx(1.5)  # a cost per sample, times N
    assert slope(rows, "C", "us") == pytest.approx(1.0)


def test_sizes_without_a_slope_are_refused(tmp_path, capsys):
    assert main(["--samples", "100", "--out", str(tmp_path)]) == 2
    assert main(["--classes", "10", "100", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "--samples [100] must be two sizes or more" in said
    assert "--classes [10, 100] must hold 1000, for the networks" in said


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_it_measures_and_draws_every_line(tmp_path):
    tiny = "--samples 1000 4000 --classes 10 1000 --fixed 512 --passes 1 --toy --no-rehearsal"
    assert main([*tiny.split(), "--out", str(tmp_path), "--name", "tiny"]) == 0
    result = json.loads((tmp_path / "growth_tiny.json").read_text())
    assert len(result["slopes"]) == 7
    works = [row for row in result["rows"] if row["grows"] == WORK]
    assert 0 < works[0]["operations"] < works[1]["operations"]
    scored = [row for row in result["rows"] if row["grows"] == "N" and "score_us" in row]
    assert len(scored) == 2
    assert scored[0]["trajectory_bytes"] > 9 * 4 * 10  # all scalars of each sample and epoch
    assert (tmp_path / "growth_tiny.svg").read_text().count("<svg") == 1
