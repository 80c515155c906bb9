"""How a stage enters its run directory: new, resumed, finished, refused; and what never becomes a
checkpoint."""

import json
import re
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tdds_dist import Checkpoints
from tdds_dist.config.run import Config, load_config, to_dict
from tdds_dist.distributed import world
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.entry import entered
from tdds_dist.runs.identity import KINDS, differences, setting_of
from tests import jobs
from tests.make import refused, table

SETTING = {"stage": "collect", "data": {"train": "a", "val": "b"}}


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def config(config_file):
    return load_config(config_file)


def enter(run, config, setting=SETTING, **options):
    with entered(run, config, setting, world.current_world("cpu"), **options) as start:
        return start


def stopped_after(run, config, num_epochs, *, had_checkpoint):
    """A run that was stopped, with metrics and a trajectory of so many epochs, and no checkpoint
    there now."""
    enter(run, config)
    for epoch in range(num_epochs):
        run.append_metrics({"epoch": epoch})
    (run.trajectory / "epoch_0000").mkdir(parents=True)
    if had_checkpoint:
        run.write_env(run.read_env() | {"has_checkpoints": True})


def saved(run, config):
    """A run that was left with a checkpoint of step 3."""
    with entered(run, config, SETTING, world.current_world("cpu")) as start:
        record = {"epoch": 0, "step": 3, "world_size": 1}
        start.checkpoints.save(3, {"a": torch.ones(2)}, record, wait=True)


@pytest.mark.parametrize("every_epochs", [0, 1, 5])
def test_a_run_without_a_checkpoint_yet_starts_over(run, config, config_file, every_epochs):
    """Also after several epochs: the first save may have been under way."""
    stopped_after(run, config, 3, had_checkpoint=False)
    run.pruning.mkdir()
    (run.pruning / "epoch_0001.npz").touch()
    start = enter(run, load_config(config_file, [f"checkpoint.every_epochs={every_epochs}"]))
    assert start.resume is None
    assert start.result is None
    assert run.read_metrics() == []
    assert not run.trajectory.exists()
    assert "starts over" in run.read_env()["notes"][0]
    (aside,) = run.path.glob("before-*")
    assert f"the epochs that it had recorded are moved aside to {aside}" in run.read_env()["notes"]
    assert len(RunDir(aside).read_metrics()) == 3
    assert (aside / "trajectory" / "epoch_0000").is_dir()
    assert (aside / "pruning" / "epoch_0001.npz").is_file()


@pytest.mark.parametrize("every_epochs", [0, 1, 5])
@pytest.mark.parametrize("left", ["nothing", "damaged", "abandoned"])
def test_a_run_that_lost_its_checkpoints_keeps_the_rest(
    run, config, config_file, every_epochs, left
):
    stopped_after(run, config, 3, had_checkpoint=True)
    if left != "nothing":
        (run.checkpoints / f"step_0000000010.{left}").mkdir(parents=True)
    changed = load_config(config_file, [f"checkpoint.every_epochs={every_epochs}"])
    unfinished = "3 epochs of an unfinished run, and no checkpoint.*restore checkpoints/"
    refused(unfinished, enter, run, changed)
    assert len(run.read_metrics()) == 3
    assert run.trajectory.exists()
    assert not list(run.path.glob("run.lock"))


@pytest.mark.parametrize(("count", "goes_on"), [("0", False), ("1", True)])
def test_fresh_is_said_to_the_first_start_only(run, config, monkeypatch, count, goes_on):
    saved(run, config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert (enter(run, config, fresh=True, force=True).resume is not None) == goes_on


def test_fresh_where_there_is_no_run_removes_nothing(run, config):
    run.scores.mkdir(parents=True)
    (run.scores / "imported.npz").touch()
    enter(run, config, fresh=True)
    assert (run.scores / "imported.npz").exists()


def test_starting_over_moves_what_was_there_aside(run, config):
    left = {"config.yaml", "env.json", "log.txt", "status.json", "coresets", "retrain"}
    for _ in range(2):  # perhaps in one second
        stopped_after(run, config, 3, had_checkpoint=True)
        for folder in (run.scores, run.coresets, run.retrain):
            folder.mkdir(exist_ok=True)
        enter(run, config, fresh=True, force=True)
        folders = sorted(run.path.glob("before-*"))
        assert {path.name for path in run.path.iterdir()} - {path.name for path in folders} == left
    assert str(folders[0]) in run.log_file.read_text() + (folders[-1] / "log.txt").read_text()
    for folder in folders:
        assert len(RunDir(folder).read_metrics()) == 3
        names = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "env.json", "trajectory", "scores"} <= names
    assert len(folders) == 2


def test_a_cut_last_line_of_the_metrics_is_forgotten_and_a_damaged_one_is_not(run, config):
    enter(run, config)
    run.metrics_file.write_text('{"epoch": 0}\n{"epoch": 1}\n{"ep')
    assert [record["epoch"] for record in run.read_metrics()] == [0, 1]
    run.metrics_file.write_text('{"epoch": 0}\n{"ep\n{"epoch": 2}\n')
    refused("line 2", run.read_metrics)


def test_a_record_is_what_comes_back(tmp_path):
    """JSON turns integer keys into text; the hash is of what is read."""
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"a": torch.ones(2)}, {"accuracy": {9: 0.5, 10: 0.7}}, wait=True)
    assert checkpoints.latest().record == {"accuracy": {"9": 0.5, "10": 0.7}}
    bad, state = Checkpoints(tmp_path / "d", stop_on_error=True), {"a": torch.ones(2)}
    refused("not JSON serializable", bad.save, 1, state, {"path": Path("x")}, wait=True)


# ---- what a key of the config decides


def test_the_table_names_keys_that_exist():
    for section, kinds in KINDS.items():
        known = Config.model_fields[section].annotation.model_fields
        assert isinstance(kinds, str) or kinds.keys() <= known.keys()


@pytest.mark.parametrize("stage", ["collect", "retrain"])
@pytest.mark.parametrize(
    ("override", "changed"),
    table("""
    train.log_every=10 ->
    checkpoint.every_seconds=9.0 ->
    train.eval_every=3 ->
    train.accumulation=2 ->
    score.on_nan=quarantine ->
    score.trajectory=false ->
    score.windows=[{T: 3, K: 2, pruning_rates: [0.3]}] ->
    run.name=other ->
    data.num_workers=3 ->
    retrain.epochs=3 ->
    pipeline.seeds=[1] ->
    train.lr=0.07 -> train.lr was 0.05, now 0.07
    run.seed=3 -> run.seed was 0, now 3
    model.compile=true -> model.compile was False, now True
    score.beta=0.5 -> score.beta was 0.9, now 0.5
    collect.stop_after=last_window -> collect.stop_after was 'schedule', now 'last_window'
    retrain.schedule_of=full -> retrain.schedule_of was 'coreset', now 'full'
    """),
)
def test_what_a_run_may_go_on_with_and_count_as(run, config_file, stage, override, changed):
    windows = "score.windows=[{T: 3, K: 2, pruning_rates: [0.5]}]"
    tree = to_dict(load_config(config_file, [windows]))
    # keys that the version before did not have
    del tree["model"]["compile"], tree["retrain"]["schedule_of"]
    run.start(tree, {"stage": stage}, 1, "cpu")
    other_stages = {"collect": "retrain.", "retrain": ("score.", "collect.")}
    if override.startswith(other_stages[stage]):
        changed = ""  # decides nothing there
    now = load_config(config_file, [windows, override])
    assert differences(run, now, {"stage": stage}) == ([changed] if changed else [])


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ("a", "a", ""),
        ("a", "b", "it was started with other images than data.train=elsewhere.beton holds now"),
        ("a", None, "data.train was '"),
        (None, "a", "data.train was '"),
    ],
)
def test_images_are_compared_by_content_and_by_name_where_it_is_not_known(
    run, config_file, was, now, told
):
    def setting(content):
        return {"stage": "collect"} | ({"data": {"train": content, "val": "v"}} if content else {})

    run.start(to_dict(load_config(config_file)), setting(was), 1, "cpu")
    moved = load_config(config_file, ["data.train=elsewhere.beton"])
    found = differences(run, moved, setting(now))
    assert [text.startswith(told) for text in found] == [True] * bool(told)


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (
            "run.seed=3 run.dir=x train.log_every=9 checkpoint.keep=3 score.baselines.el2n_epochs=1",
            True,
        ),
        ("train.accumulation=2", False),
        ("train.eval_every=3", False),
        ("score.on_nan=quarantine", False),
        ("train.lr=0.07", False),
        ("collect.stop_after=last_window", False),
    ],
)
def test_seeds_of_one_setting(config, config_file, overrides, same):
    other = to_dict(load_config(config_file, overrides.split()))
    del other["model"]["compile"]
    assert (setting_of(other) == setting_of(to_dict(config))) == same


def test_random_controls_of_several_runs_are_seeds_of_one_setting(config_file):
    words = ["prune.twin_of=runs/seed0", "prune.twin_of=runs/seed1", "prune.rate=0.5"]
    found = [setting_of(to_dict(load_config(config_file, [word])), "train") for word in words]
    assert found[0] == found[1] != found[2]


# ---- with training


BASE = ("train.deterministic=true", "train.epochs=4", "score.windows=[{T: 4, K: 3}]")
BASE += ("score.final_pass=false",)


def _nan_gradient(step, rank):
    from tdds_dist.training.engine import Trainer

    update = Trainer._update

    def hurt(trainer):
        if trainer.step + 1 == step:
            for parameter in trainer.model.parameters():
                parameter.grad.fill_(float("nan"))
        return update(trainer)

    Trainer._update = hurt


@pytest.mark.distributed
@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(config_file, tmp_path):
    """NaN in the last step of an epoch: its outputs were fine, what would be saved is not."""
    command = ["collect", config_file, *BASE]
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    assert jobs.run([*command, f"run.dir={straight}"], 1, tmp_path / "a")[0] == [0]
    command += [f"run.dir={hurt}"]
    codes, text = jobs.run(command, 1, tmp_path / "b", partial(_nan_gradient, 10))
    assert codes == [2]
    assert "NaN or infinite" in text or "not finite" in text
    kept = [path.name for path in (hurt / "checkpoints").glob("step_*")]
    assert kept == ["step_0000000005"]
    codes, text = jobs.run(command, 1, tmp_path / "c")
    assert codes == [0], text
    assert jobs.differences(jobs.state_of(straight), jobs.state_of(hurt)) == []


def _lose_lock_after_training(rank):
    from tdds_dist.runs.lock import RunLock
    from tdds_dist.training import collect

    fit = collect.fit

    def fit_and_lose(job, start):
        result = fit(job, start)
        RunLock.lost = property(lambda lock: True)
        return result

    collect.fit = fit_and_lose


@pytest.mark.distributed
@pytest.mark.slow
def test_a_job_whose_directory_was_taken_over_writes_nothing_more(config_file, tmp_path):
    folder = tmp_path / "run"
    command = ["collect", config_file, *BASE, f"run.dir={folder}"]
    codes, text = jobs.run(command, 2, tmp_path / "out", _lose_lock_after_training)
    assert codes == [2, 2], text
    assert "taken over by another job" in text
    assert not (folder / "result.json").exists()
    assert not list((folder / "scores").glob("*.npz"))
    assert list((folder / "checkpoints").glob("step_*"))
    json.loads((folder / "env.json").read_text())


@pytest.mark.distributed
@pytest.mark.slow
def test_a_checkpoint_by_time_is_one_and_a_trajectory_that_was_given_up_is_not_scored(
    config_file, tmp_path
):
    """Saves by time come at least two steps apart: the flag that asks for one is a step old."""
    from tdds_dist.scoring.offline import score_all

    folder = tmp_path / "run"
    by_time = ["checkpoint.every_seconds=0.001", "checkpoint.every_epochs=0"]
    command = ["collect", config_file, *BASE, f"run.dir={folder}", *by_time]
    stop = jobs.at_step(12, jobs.signal_self(signal.SIGTERM), [0])
    assert jobs.run(command, 2, tmp_path / "a", stop)[0] == [75, 75]
    text = (folder / "log.txt").read_text()
    steps = [int(step) for step in re.findall(r"checkpoint at step (\d+) saved", text)]
    assert len(steps) >= 4
    # at epoch ends, and at the signal, anew
    assert all(b - a >= 2 or b % 5 == 0 for a, b in pairwise(steps[:-1])), steps
    assert "stopped: SIGTERM: saved" in text
    codes, text = jobs.run([*command, "score.trajectory=false"], 2, tmp_path / "b")
    assert codes == [0, 0], text
    refused("holds 2 of the 4 epochs of this run, which gave it up", score_all, folder)


def test_a_checkpoint_is_remembered_with_what_it_is_of_and_one_of_other_images_is_refused(
    run, config
):
    saved(run, config)
    assert run.read_env()["has_checkpoints"] is True
    found = enter(run, config).resume
    assert (found.step, found.about["data"]) == (3, SETTING["data"])
    assert found.about["config"]["train"]["lr"] == config.train.lr
    # as if the folder had been copied here from another run
    env = run.read_env() | {"data": {"train": "c", "val": "b"}}
    run.write_env(env)
    refused("it was made from other images", enter, run, config, SETTING | {"data": env["data"]})
