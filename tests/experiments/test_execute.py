"""Experiments: what their files may say, and what a tiny one leaves behind, done once, again, in
part, and badly."""

import fcntl
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tdds_dist.cli.main import main
from tdds_dist.config.experiment import load_experiment
from tdds_dist.config.grid import BUILT_IN_METHODS, Method
from tdds_dist.config.run import load_config, parse_config, to_dict
from tdds_dist.data.manifest import read_manifest
from tdds_dist.data.sources import open_source, with_label_noise
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed.world import session
from tdds_dist.errors import InputError
from tdds_dist.experiments import execute as experiment_module
from tdds_dist.experiments.execute import experiment
from tdds_dist.experiments.grid import check_experiment
from tdds_dist.runs.artifacts import (
    fingerprint,
    load_coreset,
    load_scores,
    save_coreset,
    save_scores,
)
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.identity import setting_of
from tests.golden.make_runs_of_0_1_0 import in_this_process
from tests.make import csv_rows, select, table

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
assert SHIPPED
SEEDS, RATES = (0, 1), (0.5, 0.8)

SMALL = "{name: small, config: base.yaml, methods: [tdds, random], pruning_rates: [0.5]}"


# ---- what the file of an experiment may say


@pytest.fixture
def plan_file(tmp_path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(SMALL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_experiment(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_built_in_names_stand_for_methods(plan_file):
    plan = load_experiment(plan_file, [f"methods=[{', '.join(BUILT_IN_METHODS)}]"])
    assert plan.methods == tuple(BUILT_IN_METHODS.values())
    by_name = {method.name: (method.score_key, method.sampler) for method in plan.methods}
    assert by_name["tdds"] == ("tdds", None)
    assert by_name["ccs"] == ("aum", "ccs")
    assert by_name["dual_beta"] == ("dual", "beta")


def test_defaults_and_overrides(plan_file):
    plan = load_experiment(plan_file)
    assert (plan.seeds, plan.strategies, plan.variants) == ((0,), ("E",), ())
    assert plan.directory == Path("runs/small")
    words = "seeds=[3,1] dir=/elsewhere overrides=[train.lr=0.2] strategies=[P]"
    plan = load_experiment(plan_file, words.split())
    assert (plan.seeds, plan.directory) == ((3, 1), Path("/elsewhere"))
    assert (plan.overrides, plan.strategies) == (("train.lr=0.2",), ("P",))


@pytest.mark.parametrize(
    ("override", "words"),
    table("""
    methods=[tdds, nonsense] -> 'nonsense' is not known by name (tdds, random, entropy,
    methods=[tdds, random, tdds] -> the names ['tdds'] stand twice
    methods=[tdds, {name: tdds, beta: 0.5}] -> the names ['tdds'] stand twice
    methods=tdds -> methods='tdds' must be a list, e.g. [tdds, random]
    methods= -> methods=None must be a list
    methods=[] -> methods
    methods=[5] -> methods.0=5
    methods=[{score: el2n}] -> key 'methods.0.name' is missing
    methods=[tdds, {name: x, scroe: el2n}] -> unknown key 'methods.1.scroe'; the nearest valid key is 'methods.1.score'
    methods=[{name: ../x, score: el2n}] -> methods.0.name='../x'
    methods=[{name: x, score: el2n, T: 5, K: 3}] -> x has T, which belongs to score tdds
    methods=[{name: x, score: el2n, preset: paper}] -> x has preset, which belongs to score tdds
    methods=[{name: x, score: el2n, beta: 0.5}] -> x has beta, which belongs to score tdds
    methods=[{name: x, score: el2n, delta: ce}] -> x has delta, which belongs to score tdds
    methods=[{name: x, score: tdds, options: [el2n_epochs=3]}] -> options=['el2n_epochs=3'], which belong to other scores
    methods=[{name: x, score: tdds, T: 5}] -> x has one of T and K; give both, or neither
    methods=[{name: x, score: tdds, K: 5}] -> x has one of T and K
    methods=[{name: x, score: aum, num_strata: 20}] -> x has num_strata, which does nothing with sampler top
    methods=[{name: x, score: aum, sampler: ccs, c_d: 2.0}] -> x has c_d, which does nothing with sampler ccs; set sampler: beta
    methods=[tdds, {name: el2n, pruning_rates: [0.5, 0.7]}] -> el2n has pruning_rates=[0.7], which the experiment's pruning_rates=[0.5] lack; add
    pruning_rates=[0.0, 0.5] -> pruning_rates=[0.0] must lie between 0 and 1
    pruning_rates=[0.5, 1.0] -> pruning_rates=[1.0] must lie between 0 and 1
    pruning_rates=[-0.5] -> pruning_rates=[-0.5] must lie between 0 and 1
    pruning_rates=[0.5, 0.5] -> holds a value twice
    pruning_rates=[0.5, 0.5000000001] -> holds a value twice
    pruning_rates=[] -> pruning_rates
    seeds=[1, 1] -> holds a value twice
    seeds=[-1] -> must not be negative
    strategies=[E, Q] -> strategies.1='Q'
    variants=[{name: a, overrides: []}, {name: a, overrides: []}] -> variants: the names ['a'] stand twice
    variants=[{name: a, override: []}] -> the nearest valid key is 'variants.0.overrides'
    architectures=[] -> architectures is called variants now; rename the key
    seed=[1] -> unknown key 'seed'; the nearest valid key is 'seeds'
    name=a/b -> name='a/b'
    """),
)
def test_what_an_experiment_may_not_say(plan_file, override, words):
    assert words in refused(plan_file, override)


def test_the_command_line_overrides_and_refuses(plan_file, capsys):
    for override, words in [
        ("seeds=[1, 1]", "holds a value twice"),
        ("seeds=[5]", "base.yaml does not exist"),
    ]:
        assert main(["experiment", str(plan_file), override]) == 2
        assert words in capsys.readouterr().err


# ---- shipped experiments


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiment(path, monkeypatch):
    """It loads with its config, its overrides and its networks, and every run of it can be
    planned."""
    monkeypatch.chdir(ROOT)
    assert path.read_text().startswith("# ")
    plan = load_experiment(path)
    collections, cells = check_experiment(plan)
    assert list(collections) == list(plan.seeds)
    num = sum(method.is_at(rate) for method in plan.methods for rate in plan.pruning_rates)
    num *= len(plan.strategies) * len(plan.seeds) * max(1, len(plan.variants))
    assert len(cells) == num
    assert len({cell.run.path for cell in cells}) == len(cells)
    config = load_config(plan.config, plan.overrides)
    if plan.collections:  # of the other experiment, and as this one's are
        other = load_experiment(path.with_name(f"{Path(plan.collections).name}.yaml"))
        assert Path(plan.collections) == other.directory
        theirs = load_config(other.config, other.overrides)
        assert setting_of(to_dict(config)) == setting_of(to_dict(theirs))
        assert (config.data.train, {*plan.seeds}) == (theirs.data.train, {*other.seeds})
    for method in plan.methods:
        if method.score_key == "tdds" and method.T is None:
            for rate in filter(method.is_at, plan.pruning_rates):
                assert config.train.epochs >= config.window_for(rate).T


# ---- a tiny experiment


def write_plan(
    folder: Path, betons: dict[str, Path], name: str = "tiny", **changes: object
) -> Path:
    """A config and an experiment on it, of two methods, two rates and two seeds; everything goes to
    `folder`/name."""
    base = folder / "base.yaml"
    base.write_text(f"""
run: {{name: base, device: cpu}}
data: {{train: {betons["train"]}, val: {betons["val"]}, num_classes: 10, image_size: 32, crop: pad, padding: 2, flip: false,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: tiny_network}}
train: {{epochs: 5, global_batch_size: 24, lr: 0.05, eval_every: 3}}
score: {{windows: [{{T: 3, K: 3, pruning_rates: [0.5]}}, {{T: 3, K: 2, pruning_rates: [0.8, 0.95]}}]}}
""")
    plan = {"name": name, "config": str(base), "dir": str(folder / name)}
    plan |= {"overrides": ["train.epochs=3"], "methods": ["tdds", "moderate"]}
    plan |= {"pruning_rates": [*RATES], "seeds": [*SEEDS]}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plan | changes))
    return path


@pytest.fixture(scope="module")
def finished(betons, tmp_path_factory) -> tuple[Path, Path]:
    """The file of an experiment and its directory, once run by two worker processes."""
    path = write_plan(tmp_path_factory.mktemp("experiment"), betons)
    plan = load_experiment(path)
    table, failed = experiment(plan, jobs=2)
    assert failed == []
    assert table == plan.directory / "table.md"
    return path, plan.directory


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    """The same in a copy, to be changed; names of directories are no settings."""
    path, directory = finished
    shutil.copytree(directory, tmp_path / "tiny")
    copy = tmp_path / "tiny.yaml"
    moved = yaml.safe_load(path.read_text()) | {"dir": str(tmp_path / "tiny")}
    copy.write_text(yaml.safe_dump(moved))
    return copy, tmp_path / "tiny"


@pytest.fixture
def no_workers(monkeypatch):
    """Fails the test when anything is run."""

    def refuse(*_, **__):
        raise AssertionError("a worker process was started")

    monkeypatch.setattr(experiment_module, "run_in_processes", refuse)


def rows_of(directory: Path) -> list[dict[str, str]]:
    return csv_rows(directory / "cells.csv")


def cell_runs(directory: Path) -> dict[str, RunDir]:
    """Retrainings by name of their folder."""
    return {path.name: RunDir(path) for path in sorted(directory.glob("seed*/retrain/*"))}


def table_of(directory: Path) -> list[str]:
    """table.md without the line that counts hours, which includes those of later invocations."""
    lines = (directory / "table.md").read_text().splitlines()
    return [line for line in lines if " of training in " not in line]


def expect_refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        experiment(load_experiment(path, overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_collection_per_seed_serves_every_cell(finished):
    _, directory = finished
    stages = [json.loads(file.read_text())["stage"] for file in directory.rglob("env.json")]
    assert sorted(stages) == ["collect"] * 2 + ["retrain"] * 8
    for seed in SEEDS:
        run = RunDir(directory / f"seed{seed}")
        assert run.read_result()["seed"] == run.read_config()["run"]["seed"] == seed
        assert run.read_config()["train"]["epochs"] == 3, "overrides of the experiment"
        assert sorted(path.stem for path in run.coresets.iterdir()) == [
            f"{method}_p{rate}" for method in ("moderate", "tdds") for rate in RATES
        ]
        assert len(run.read_metrics()) == 3
    assert sorted(cell_runs(directory)) == sorted(
        f"{method}_p{rate}_E_{importance}_seed{seed}"
        for method, importance in (("tdds", "batch"), ("moderate", "none"))
        for rate in RATES
        for seed in SEEDS
    )


def test_the_table_is_what_lies_on_disk(finished):
    _, directory = finished
    runs = cell_runs(directory)
    rows = rows_of(directory)
    assert len(rows) == len(runs) == 8
    by_cell: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        name = f"{row['method']}_p{row['pruning_rate']}_{row['strategy']}_{row['importance']}_seed{row['seed']}"
        result = runs[name].read_result()
        for key in ("num_images", "epochs", "final_top1", "best_top1", "train_seconds"):
            assert float(row[key]) == result[key], key
        assert int(row["num_images"]) == round(120 * (1 - float(row["pruning_rate"])))
        assert (row["score"], row["variant"], row["published_top1"]) == (row["method"], "", "")
        cell = row["method"], float(row["pruning_rate"])
        by_cell.setdefault(cell, []).append(result["final_top1"])
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (directory / "table.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert lines[0] == ["final top-1 (%), images removed", "50 %", "80 %"]
    labels = ("tdds, importance batch", "moderate")
    for line, method, label in zip(lines[2:], ("tdds", "moderate"), labels, strict=True):
        cells = [by_cell[method, rate] for rate in RATES]
        found = [f"{np.mean(both):.2f} ± {np.std(both, ddof=1):.2f}" for both in cells]
        assert line == [label, *found]
    full = [RunDir(directory / f"seed{seed}").read_result()["final_top1"] for seed in SEEDS]
    text = (directory / "table.md").read_text()
    assert f"Full data: {np.mean(full):.2f} ± {np.std(full, ddof=1):.2f} (2 seeds)." in text
    assert "8 of 8 retrainings done" in text


def test_a_second_invocation_runs_nothing(finished, no_workers):
    path, directory = finished
    before = table_of(directory), (directory / "cells.csv").read_bytes()
    assert experiment(load_experiment(path), jobs=2)[1] == []
    assert (table_of(directory), (directory / "cells.csv").read_bytes()) == before
    records = (directory / "times.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in records]
    assert len(seconds) >= 2, "one record per start"
    assert seconds[0] > seconds[1] > 0


def test_what_is_missing_is_run_again_with_the_same_result(copied):
    """One cell removed, one without its result and its checkpoints: that is refused, and with
    --force moved aside."""
    path, directory = copied
    runs = cell_runs(directory)
    before = {name: run.read_result() for name, run in runs.items()}
    table = table_of(directory)
    removed, stopped = "tdds_p0.5_E_batch_seed0", "moderate_p0.8_E_none_seed1"
    shutil.rmtree(runs[removed].path)
    runs[stopped].result_file.unlink()
    (runs[stopped].path / "left_behind").touch()
    written = {
        name: run.result_file.stat().st_mtime_ns
        for name, run in runs.items()
        if name not in (removed, stopped)
    }
    unfinished = "holds 3 epochs of an unfinished run, and no checkpoint to go on from; restore"
    assert f"{stopped} {unfinished}" in expect_refusal(path)
    assert (runs[stopped].path / "left_behind").exists()
    assert experiment(load_experiment(path), jobs=2, force=True)[1] == []
    assert {name: runs[name].result_file.stat().st_mtime_ns for name in written} == written
    (aside,) = (directory / "seed1/retrain").glob(f"before-*/{stopped}")
    assert (aside / "left_behind").exists()
    assert len(RunDir(aside).read_metrics()) == len(runs[stopped].read_metrics()) == 3
    for name in (removed, stopped):
        for key in ("final_top1", "final_loss", "best_top1", "steps"):
            assert runs[name].read_result()[key] == before[name][key], (name, key)
    assert table_of(directory)[3:] == table[3:]  # below the heading
    found = [run.path.name for run in RunDir(directory / "seed1").retrain_runs()]
    assert found == sorted(name for name in runs if name.endswith("seed1"))


@pytest.mark.slow
def test_settings_that_change_no_result_keep_the_epochs_of_a_stopped_collection(
    betons, tmp_path, monkeypatch
):
    from tdds_dist.distributed.interruption import Interruption, Preempted
    from tdds_dist.training.collect import collect

    class AfterTwoEpochs(Interruption):
        requested = property(lambda _: "SIGTERM" if len(run.read_metrics()) == 2 else "")

    path = write_plan(tmp_path, betons, methods=["random"], pruning_rates=[0.95], seeds=[0])
    run = RunDir(tmp_path / "tiny/seed0")
    config = check_experiment(load_experiment(path))[0][0].config
    with session("cpu") as world, pytest.raises(Preempted):
        collect(config, world, interruption=AfterTwoEpochs())
    recorded = run.metrics_file.read_bytes()
    changes = "train.log_every=10 checkpoint.keep=3 train.eval_every=1 train.accumulation=2 score.on_nan=quarantine"
    monkeypatch.setattr(experiment_module, "run_in_processes", in_this_process)
    assert experiment(load_experiment(path, changes.split()))[1] == []
    assert run.metrics_file.read_bytes().startswith(recorded)
    assert len(run.read_metrics()) == 3
    assert [resume["epoch"] for resume in run.read_env()["resumes"]] == [2]


@pytest.mark.slow
def test_stages_by_hand_give_the_same_and_a_rate_may_be_added_without_collecting_again(
    betons, tmp_path, monkeypatch
):
    from tdds_dist.training.collect import collect
    from tdds_dist.training.retrain import retrain

    path = write_plan(tmp_path, betons, seeds=[1], pruning_rates=[0.5])
    plan = load_experiment(path)
    assert experiment(plan, jobs=2)[1] == []
    ours = RunDir(plan.directory / "seed1")
    cpus = os.sched_getaffinity(0)
    # as many as a worker had: sums over threads depend on their number
    os.sched_setaffinity(0, sorted(cpus)[::2])
    try:
        hand = RunDir(tmp_path / "hand")
        overrides = [*plan.overrides, "run.seed=1", f"run.dir={hand.path}"]
        config = load_config(plan.config, overrides)
        with session("cpu") as world:
            collect(config, world)
        for file in hand.scores.iterdir():
            by_hand, of_experiment = load_scores(file), load_scores(ours.scores / file.name)
            assert by_hand.score_N.tobytes() == of_experiment.score_N.tobytes(), file.name
        for method, importance in [("tdds", "batch"), ("moderate", "none")]:
            out = tmp_path / f"{method}.npz"
            coreset, _ = select(hand.path, 0.5, score=method, seed=1, out=out)
            theirs = load_coreset(ours.coresets / f"{method}_p0.5.npz")
            assert np.array_equal(load_coreset(coreset).index_M, theirs.index_M)
            with session("cpu") as world:
                result = retrain(config, world, coreset, "E", importance=importance).read_result()
            wanted = RunDir(ours.retrain / f"{method}_p0.5_E_{importance}_seed1").read_result()
            for key in ("final_top1", "final_loss", "best_top1"):
                assert result[key] == wanted[key], (method, key)
    finally:
        os.sched_setaffinity(0, cpus)

    collected = ours.result_file.stat().st_mtime_ns
    windows = "[{T: 3, K: 3, pruning_rates: [0.5]}, {T: 3, K: 2, pruning_rates: [0.8, 0.9]}]"
    overrides = f'overrides=["train.epochs=3", "score.windows={windows}"]'
    more = load_experiment(path, [overrides, "pruning_rates=[0.5, 0.9]", "methods=[tdds]"])
    monkeypatch.setattr(experiment_module, "run_in_processes", in_this_process)
    assert experiment(more)[1] == []
    assert ours.result_file.stat().st_mtime_ns == collected
    rows = rows_of(plan.directory)
    assert [row["pruning_rate"] for row in rows if row["final_top1"]] == ["0.5", "0.9"]


def test_collections_of_another_experiment_are_taken_over(finished, betons, tmp_path, no_workers):
    """Nothing is collected again, and what this experiment adds does not change the other."""
    source = finished[1]
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    path = write_plan(tmp_path, betons, "other", collections=str(source), methods=["random"])
    with pytest.raises(AssertionError, match="a worker process was started"):
        experiment(load_experiment(path), jobs=2)  # a retraining: the collections are there
    for seed in SEEDS:
        run, of = RunDir(tmp_path / "other" / f"seed{seed}"), RunDir(source / f"seed{seed}")
        own = {"name": f"other_seed{seed}", "dir": str(run.path)}
        assert run.read_config()["run"] == of.read_config()["run"] | own
        assert run.read_env() == of.read_env() | {"copy_of": str(of.path)}
        assert run.read_result() == of.read_result()
        names = [file.name for file in run.coresets.iterdir()]
        assert names == [f"random_p{rate}.npz" for rate in RATES]
        assert not run.retrain.exists()
        text = (tmp_path / "other/table.md").read_text()
        assert f"2 of the collections are copied from {source}." in text
        assert "; 0 s of training in " in text, "that of the collections took place elsewhere"
        (array,) = run.trajectory.glob("epoch_0000/*.npy")
        assert array.samefile(of.trajectory / "epoch_0000" / array.name)
    RunDir(tmp_path / "other/seed0").append_metrics({"epoch": 3})
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_collections_of_other_settings_are_refused(finished, betons, tmp_path, no_workers):
    path = write_plan(tmp_path, betons, "other", collections=str(finished[1]))
    message = expect_refusal(path, "train.lr=0.06")
    other = f"{finished[1]}/seed0 holds a run of other"
    assert message.startswith(f"collections={finished[1]}: {other}")
    changed = "(train.lr was 0.05, now 0.06)"
    assert message.endswith(f"{changed}; keep those settings, or leave collections out")
    assert not (tmp_path / "other/seed0").exists()
    assert "is the experiment's own directory" in expect_refusal(path, f"dir={finished[1]}")


def test_collections_that_are_not_there_are_run(betons, tmp_path, failing_workers):
    path = write_plan(tmp_path, betons, "other", collections=str(tmp_path / "gone"))
    failed = [f"collect, seed {seed}: no such file" for seed in SEEDS]
    assert experiment(load_experiment(path))[1] == failed


# ---- refused before anything runs


def test_other_settings_are_refused(copied, no_workers):
    path, directory = copied
    coreset = (directory / "seed0/coresets/moderate_p0.5.npz").read_bytes()
    message = expect_refusal(path, "train.lr=0.06")
    changed = "(train.lr was 0.05, now 0.06)"
    assert f"seed0 holds a run of other settings {changed}; go on with those" in message
    assert "choose another name or dir, or give --force, which moves it aside" in message
    message = expect_refusal(path, "methods=[tdds, {name: moderate, class_balanced: true}]")
    assert "moderate_p0.5_E_none_seed0 was trained on " in message
    assert "by moderate (class_balanced was False, now True); choose" in message
    assert (directory / "seed0/coresets/moderate_p0.5.npz").read_bytes() == coreset
    assert "(train.epochs was 3, now 2)" in expect_refusal(path, "retrain.epochs=2")


@pytest.fixture
def no_runs(monkeypatch):
    """Runs nothing, and says that all went well."""
    monkeypatch.setattr(experiment_module, "_in_processes", lambda tasks, jobs: {})


def test_a_damaged_coreset_is_made_again_and_its_retrainings_stay(copied, no_workers):
    path, directory = copied
    coreset = directory / "seed1/coresets/moderate_p0.5.npz"
    before, rows = load_coreset(coreset), rows_of(directory)
    coreset.write_bytes(coreset.read_bytes()[:100])
    experiment(load_experiment(path))
    assert np.array_equal(load_coreset(coreset).index_M, before.index_M)
    assert rows_of(directory) == rows
    assert [file.stat().st_size for file in coreset.parent.glob("before-*/*")] == [100]


def test_with_force_other_settings_are_moved_aside(copied, no_runs, caplog):
    """Of a collection all of its directory, of a method its coreset and retrainings; nothing finds them as runs any more."""
    caplog.set_level("INFO", "tdds")
    from tdds_dist.report import results
    from tdds_dist.runs import status

    path, directory = copied
    coreset = directory / "seed1/coresets/moderate_p0.5.npz"
    before = {file.relative_to(directory): file.read_bytes() for file in directory.rglob("*.npz")}
    balanced = "methods=[tdds, {name: moderate, class_balanced: true}]"
    experiment(load_experiment(path, [balanced]), force=True)
    (moved,) = coreset.parent.glob("before-*/moderate_p0.5.npz")
    assert moved.read_bytes() == before[coreset.relative_to(directory)] != coreset.read_bytes()
    assert [path.name for path in (directory / "seed1/retrain").glob("before-*/*")] == [
        "moderate_p0.5_E_none_seed1",
        "moderate_p0.8_E_none_seed1",
    ]
    assert len(RunDir(directory / "seed1").retrain_runs()) == 2
    change = ["seeds=[0]", "train.lr=0.06"]
    shutil.copytree(directory / "seed0", kept := directory.parent / "kept")
    experiment(load_experiment(path, change), force=True)
    (moved,) = directory.glob("before-*/seed0")
    assert f"now 0.06); it is moved aside to {moved.parent}" in caplog.text
    for file in (file for file in kept.rglob("*") if file.is_file()):
        assert (moved / file.relative_to(kept)).read_bytes() == file.read_bytes()
    assert [run.path.name for run in results.find_runs([directory])] == ["seed1"]
    assert [run.name for run in status.find_runs(directory)] == ["seed1"]


def test_noise_of_another_file_is_not_said_of_these_coresets(copied, betons, tmp_path):
    """The training file was written again with wrong labels after everything had finished."""
    path, _ = copied
    plan = load_experiment(path)
    noisy = with_label_noise(open_source("digits", "train", 120), 0.3, 0)
    write_beton(noisy, tmp_path / "noisy.beton", num_workers=1, progress=False)
    _, cells = check_experiment(plan)
    manifest = read_manifest(tmp_path / "noisy.beton")
    outcome = experiment_module._outcome(cells[0], None, manifest)
    assert (outcome.wrong_labels_kept, outcome.corrupted_kept) == (None, None)
    coreset = load_coreset(cells[0].coreset_file)
    of_noisy = replace(coreset, fingerprint=fingerprint(manifest.label_N, 10))
    save_coreset(cells[0].coreset_file, of_noisy)
    kept = manifest.noisy_N[coreset.index_M].sum() / manifest.noisy_N.sum()
    outcome = experiment_module._outcome(cells[0], None, manifest)
    assert outcome.wrong_labels_kept == pytest.approx(kept)


def test_scores_computed_again_are_no_other_settings(copied, no_workers):
    path, directory = copied
    for file in (directory / "seed0/scores").glob("tdds*.npz"):
        scores = load_scores(file)
        scores.settings["source"] = "recorded"  # as `tdds score RUN` leaves them
        save_scores(file, scores)
    assert experiment(load_experiment(path))[1] == []


def test_two_at_a_time_are_refused(betons, tmp_path, no_workers):
    path = write_plan(tmp_path, betons)
    (tmp_path / "tiny").mkdir()
    with (tmp_path / "tiny/.seed1.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is at work on seed 1" in expect_refusal(path)


@pytest.mark.parametrize(
    ("override", "words"),
    table("""
    pruning_rates=[0.5, 0.6] -> methods: tdds: no window of score.windows serves pruning_rate=0.6
    methods=[{name: x, score: el2nn}] -> methods: x: score 'el2nn' is unknown; use one of tdds, random, entropy
    methods=[{name: x, score: ccs}] -> ccs means score: aum, sampler: ccs
    methods=[{name: x, score: random, options: [el2n_epochs=1]}] -> do nothing for score random
    methods=[el2n] -> methods: el2n: el2n_epochs=10 is longer than the 3 recorded epochs
    methods=[{name: x, score: el2n, options: [el2n_epoch=1]}] -> the nearest valid key is 'el2n_epochs'
    methods=[dual] -> methods: dual: uncertainty_window=10 is longer than the 3 epochs
    methods=[{name: x, score: tdds, T: 9, K: 2}] -> methods: x: T=9 is longer than the 3 epochs
    methods=[{name: x, score: tdds, T: 3, K: 4}] -> methods: x: K=4 must lie in [2, 3]
    overrides=[train.epochs=3, score.final_pass=false] -> methods ['moderate'] need score.final_pass=true
    overrides=[train.epochs=3, score.trajectory=false] -> set score.trajectory=true
    variants=[{name: a, overrides: [model.nam=vgg11]}] -> unknown key 'model.nam'
    """),
)
def test_what_cannot_work_is_said_before_anything_runs(
    betons, tmp_path, no_workers, override, words
):
    path = write_plan(tmp_path, betons)
    assert words in expect_refusal(path, override)
    assert not (tmp_path / "tiny").exists()


def test_jobs_below_one(betons, tmp_path, capsys):
    assert main(["experiment", str(write_plan(tmp_path, betons)), "--jobs", "0"]) == 2
    assert "--jobs=0 must be at least 1" in capsys.readouterr().err


def test_a_file_of_a_score_with_other_options_is_not_taken_for_it(copied):
    """The config's EL2N looks at one epoch, a method's own at two."""
    _, directory = copied
    run = RunDir(directory / "seed0")
    tree = run.read_config()
    tree["score"]["baselines"]["el2n_epochs"] = 1
    run.config_file.write_text(yaml.safe_dump(tree))
    recorded = {}
    for name, options in [("two", ("el2n_epochs=2",)), ("el2n", ()), ("again", ("el2n_epochs=1",))]:
        method = Method(name=name, score="el2n", options=options)
        scores = experiment_module._scores_of(run, parse_config(tree), method, 0.5)
        assert scores.settings["el2n_epochs"] == (2 if name == "two" else 1)
        recorded[name] = scores.score_N.tobytes()
    assert recorded["el2n"] == recorded["again"] != recorded["two"]


# ---- failures


FAILING = yaml.safe_load("""
methods: [random, {name: balanced, score: random, class_balanced: true}]
pruning_rates: [0.95]
seeds: [0]
variants: [{name: same, overrides: []}, {name: bad, overrides: [train.lr=1e30]}]
""")


def check_failing(directory: Path) -> None:
    """6 images cannot hold 10 classes, lr=1e30 diverges, and the one cell that can work did."""
    rows = {(row["method"], row["variant"]): row["final_top1"] for row in rows_of(directory)}
    assert {key for key, top1 in rows.items() if top1} == {("random", "same")}
    assert len(rows) == 4
    text = (directory / "table.md").read_text()
    assert "1 of 4 retrainings done" in text
    assert text.count("–") == 3
    assert "## Strategy-E, retrained with bad" in text


def test_a_cell_that_fails_stops_no_other(finished, betons, tmp_path, capsys):
    path = write_plan(tmp_path, betons, "failing", **FAILING)
    ignore = shutil.ignore_patterns("retrain", "coresets")
    shutil.copytree(finished[1] / "seed0", tmp_path / "failing/seed0", ignore=ignore)
    assert main(["experiment", str(path), "--jobs", "2"]) == 2
    captured = capsys.readouterr()
    assert "2 runs failed (coreset " in captured.err.splitlines()[-1]
    assert "balanced_p0.95.npz: FAILED: pruning_rate=0.95: " in captured.err
    assert "random p=0.95 E bad, seed 0: FAILED: epoch " in captured.err
    assert "1 of 4 retrainings done" in captured.out
    check_failing(tmp_path / "failing")


@pytest.fixture
def failing_workers(monkeypatch):
    """Every run fails at once."""

    def fail(tasks, jobs):
        return {task.directory: f"{task.title}: no such file" for task in tasks}

    monkeypatch.setattr(experiment_module, "_in_processes", fail)


def test_collections_that_fail_are_named(betons, tmp_path, capsys, failing_workers):
    assert main(["experiment", str(write_plan(tmp_path, betons))]) == 2
    captured = capsys.readouterr()
    failed = "2 runs failed (collect, seed 0: no such file); correct the cause and run"
    assert failed in captured.err.splitlines()[-1]
    assert "0 of 8 retrainings done" in captured.out
    assert [row["final_top1"] for row in rows_of(tmp_path / "tiny")] == [""] * 8


def test_a_failed_collection_stops_its_own_seed_only(copied, failing_workers):
    path, directory = copied
    shutil.rmtree(directory / "seed1")
    assert experiment(load_experiment(path))[1] == ["collect, seed 1: no such file"]
    assert [row["seed"] for row in rows_of(directory) if row["final_top1"]] == ["0"] * 4
    assert "(1 of 2)" in (directory / "table.md").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_several_ranks_work_on_one_run_after_the_other(betons, tmp_path):
    """Cells that fail leave no rank behind; started again, only those are tried again."""
    from tests.ranks import run_ranks

    path = write_plan(tmp_path, betons, "failing", **FAILING)
    outcomes = run_ranks(2, _experiment_on_ranks, path)
    for failed in (failed for of_rank in outcomes for failed in of_rank):
        assert len(failed) == 2
        file = tmp_path / "failing/seed0/coresets/balanced_p0.95.npz"
        assert failed[0].startswith(f"coreset {file}: ")
        assert failed[1].startswith("random p=0.95 E bad, seed 0: epoch ")
        assert "not finite" in failed[1]
    directory = tmp_path / "failing"
    check_failing(directory)
    assert RunDir(directory / "seed0").read_env()["world_size"] == 2
    assert len((directory / "times.jsonl").read_text().splitlines()) == 2


def _experiment_on_ranks(rank, path):
    from tdds_dist.distributed.world import current_world

    return [experiment(load_experiment(path), world=current_world("cpu"))[1] for _ in range(2)]


@pytest.mark.distributed
def test_ranks_refuse_alike(betons, tmp_path):
    from tests.ranks import run_ranks

    path = write_plan(tmp_path, betons, methods=["el2n"])
    for kind, text in run_ranks(2, _refused_on_ranks, path):
        assert kind == "InputError"
        assert "el2n_epochs=10 is longer than the 3 recorded epochs" in text


def _refused_on_ranks(rank, path):
    from tdds_dist.distributed.world import current_world
    from tests.ranks import catch

    return catch(functools.partial(experiment, load_experiment(path), world=current_world("cpu")))


# ---- ends before its time


def children_of(pid: int) -> dict[int, str]:
    """Command lines of the processes whose parent is `pid`."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit():
                continue
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # gone meanwhile
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 90.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.parametrize(
    "end",
    [
        *(pytest.param(end, marks=pytest.mark.slow) for end in ("a worker is killed", "Ctrl-C")),
        "the parent is killed",
    ],
)
def test_nothing_is_left_running(betons, tmp_path, end):
    path = write_plan(tmp_path, betons, overrides=["train.epochs=9999"])
    command = [sys.executable, "-m", "tdds_dist", "experiment", str(path), "--jobs", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    piped = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, cwd=ROOT, **piped)
    started: dict[int, str] = {}
    try:

        def workers() -> list[int]:
            children = children_of(process.pid).items()
            return [pid for pid, command in children if "spawn_main" in command]

        if end == "the parent is killed":  # while its workers start
            assert wait_for(lambda: len(workers()) == 2), "never started"
        else:
            files = [tmp_path / f"tiny/seed{seed}/config.yaml" for seed in SEEDS]
            assert wait_for(lambda: all(file.exists() for file in files)), "never started"
        started = children_of(process.pid)
        assert len(workers()) == 2
        if end == "a worker is killed":
            os.kill(workers()[0], signal.SIGKILL)
        else:
            process.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL)
        _, error = process.communicate(timeout=60)
        assert wait_for(lambda: not any(map(is_running, started)), 30), "processes are left running"
    finally:
        for pid in [process.pid, *started]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    codes = {"a worker is killed": 2, "Ctrl-C": 130, "the parent is killed": -signal.SIGKILL}
    assert process.returncode == codes[end]
    assert "Traceback" not in error
    if end == "a worker is killed":
        (line,) = re.findall("^tdds experiment: error: .*", error, re.M)
        assert "a worker process was killed" in line
        assert "run the same command again" in line
    if end == "Ctrl-C":
        # and nothing of leaked semaphores
        assert error.splitlines()[-1].startswith("tdds experiment: interrupted; ")
        assert "0 of 8 retrainings done" in (tmp_path / "tiny/table.md").read_text()
        assert len((tmp_path / "tiny/times.jsonl").read_text().splitlines()) == 1
    assert not RunDir(tmp_path / "tiny/seed0").result_file.exists()
