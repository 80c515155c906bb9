"""Run directories of version 0.1.0 are gone on with, and read; golden/make_runs_of_0_1_0.py says
what they hold."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tdds_dist.__main__ import COMMANDS
from tdds_dist.cli.main import outcome
from tdds_dist.experiments import execute
from tdds_dist.runs.artifacts import load_scores
from tdds_dist.runs.directory import RunDir, environment
from tests.golden.make_runs_of_0_1_0 import CORESET, in_this_process
from tests.jobs import differences, state_of
from tests.make import csv_rows

GOLDEN = Path(__file__).parents[1] / "golden"
FINISHED, UNFINISHED, TABLE = Path("runs/finished"), Path("runs/unfinished"), Path("runs/table")


@pytest.fixture(autouse=True)
def unpacked(tmp_path, monkeypatch):
    """A folder with the runs, as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TDDS_CPUS_PER_RANK", "1")
    with tarfile.open(GOLDEN / "runs_of_0_1_0.tar.xz") as archive:
        archive.extractall(**({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def run(*words: object) -> None:
    assert outcome([str(word) for word in words], extra_commands=COMMANDS) == (0, "")


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tolerance() -> float:
    """Return 0 on a machine like the one that made the runs; others add floats in another order."""
    then, now = RunDir(FINISHED).read_env(), environment(1, "cpu")
    is_alike = (
        then["cpu"] == now["cpu"]
        and then["versions"]["torch"] == now["versions"]["torch"]
        and json.loads(Path("expected.json").read_text())["cpu_capability"]
        == torch.backends.cpu.get_cpu_capability()
    )
    return 0.0 if is_alike else 1e-3


def test_a_collection_goes_on_and_gives_the_same_scores():
    run("collect", "config.yaml", f"run.dir={UNFINISHED}")
    assert [
        (start["epoch"], start["step"]) for start in RunDir(UNFINISHED).read_env()["resumes"]
    ] == [(2, 11)]
    run("score", UNFINISHED, "--score", "el2n", "el2n_epochs=2")
    assert content(UNFINISHED / "scores").keys() == {
        UNFINISHED / "scores" / file.name for file in content(FINISHED / "scores")
    }
    if tolerance() == 0.0:
        assert differences(state_of(UNFINISHED), state_of(FINISHED)) == []
    for file in content(FINISHED / "scores"):
        found, wanted = load_scores(UNFINISHED / "scores" / file.name), load_scores(file)
        assert np.allclose(found.score_N, wanted.score_N, rtol=tolerance(), atol=tolerance()), file


def test_a_retraining_goes_on():
    run("retrain", "config.yaml", f"run.dir={FINISHED}", "--coreset", CORESET, "--strategy", "P")
    retraining = RunDir(FINISHED / "retrain" / f"{Path(CORESET).stem}_P_batch_seed0")
    assert [start["step"] for start in retraining.read_env()["resumes"]] == [6]
    assert [record["epoch"] for record in retraining.read_metrics()] == list(range(8))
    assert retraining.read_result()["steps"] == 16


def test_what_is_finished_stays_as_it_is(capsys):
    before = content(FINISHED)
    run("collect", "config.yaml", f"run.dir={FINISHED}")
    assert "runs/finished is finished already" in capsys.readouterr().err
    run("select", FINISHED, "--pruning-rate", "0.5")
    run("retrain", "config.yaml", f"run.dir={FINISHED}", "--coreset", CORESET, "--strategy", "E")
    assert content(FINISHED) == before


def test_runs_are_read(capsys):
    run("report", FINISHED, TABLE)
    assert "  4 retrainings\n" in capsys.readouterr().out
    assert "tiny_network" in (FINISHED / "report.html").read_text()
    run("export", FINISHED, "--format", "csv")
    (file,) = (FINISHED / "export").iterdir()
    score_N = load_scores(FINISHED / "scores/tdds_official_T4_K3_beta0.9.npz").score_N
    assert [float(row["tdds_official_T4_K3_beta0.9"]) for row in csv_rows(file)] == pytest.approx(
        score_N
    )
    run("compare", FINISHED)
    assert csv_rows(FINISHED / "compare.csv")
    capsys.readouterr()
    run("status", FINISHED)
    run("status", UNFINISHED)
    said = capsys.readouterr().out
    assert "finished" in said
    assert "SIGTERM: saved at epoch 3, step 11" in said


def test_an_experiment_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(execute, "run_in_processes", in_this_process)
    retrain = TABLE / "seed0/retrain"
    done, stopped, missing = (
        retrain / f"{name}_seed0"
        for name in ("tdds_p0.5_E_batch", "moderate_p0.5_E_none", "random_p0.5_E_none")
    )
    assert (done / "result.json").is_file()
    assert not missing.exists()
    (stopped / "a-note-of-mine.txt").touch()
    before = content(TABLE / "seed0")
    run("experiment", "table.yaml")
    after = content(TABLE / "seed0")
    assert {path: after.get(path) for path in before if stopped not in path.parents} == {
        path: data for path, data in before.items() if stopped not in path.parents
    }
    assert stopped / "a-note-of-mine.txt" in after
    assert [start["step"] for start in RunDir(stopped).read_env()["resumes"]] == [2]
    wanted = json.loads(Path("expected.json").read_text())["final_loss"]
    found = {
        path.name: RunDir(path).read_result()["final_loss"] for path in (done, stopped, missing)
    }
    assert found == pytest.approx(wanted, rel=tolerance(), abs=0)
    assert len(csv_rows(TABLE / "cells.csv")) == 3
