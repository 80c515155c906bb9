"""Where the numbers of epochs go: MLflow's file store is real, as is TensorBoard."""

import importlib.util
import socket
import threading
import time

import pytest

from tdds_dist.config.run import load_config
from tdds_dist.runs.directory import RunDir
from tdds_dist.training import trackers
from tdds_dist.training.trackers import Trackers, check_trackers
from tests.make import refused

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    return mlflow.MlflowClient(f"file:{tmp_path}/mlruns")


def test_epochs_of_a_resumed_run_are_one_run_of_mlflow(client, config_file, tmp_path):
    config = load_config(config_file, ["run.trackers=[tensorboard, mlflow]"])
    run = RunDir(tmp_path / "run")
    for epochs in ([0, 1], [2]):
        with_all = Trackers(config, run)
        for epoch in epochs:
            with_all.write({"epoch": epoch, "val_top1": 10.0 * epoch, "lr": 0.1, "best": None})
        with_all.close()
    experiment = client.get_experiment_by_name("tdds")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == config.run.name
    assert found.info.status == "FINISHED"
    assert found.data.params["train.epochs"] == str(config.train.epochs)
    history = client.get_metric_history(found.info.run_id, "val_top1")
    assert [(each.step, each.value) for each in history] == [(0, 0.0), (1, 10.0), (2, 20.0)]
    assert len([*run.tensorboard.iterdir()]) == 2


def test_ids_of_trackers_that_begin_together_are_all_kept(tmp_path, monkeypatch):
    run, read = RunDir(tmp_path), trackers.read_object

    def read_slowly(path):
        found = read(path)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(trackers, "read_object", read_slowly)
    begun = [
        threading.Thread(target=trackers._remember, args=(run, name, f"{name}-1"))
        for name in ("wandb", "mlflow")
    ]
    for thread in begun:
        thread.start()
    for thread in begun:
        thread.join()
    assert read(run.trackers_file) == {"wandb": "wandb-1", "mlflow": "mlflow-1"}


def test_a_tracker_that_fails_ends_no_run(client, config_file, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    config = load_config(config_file, ["run.trackers=[mlflow]"])
    without = Trackers(config, RunDir(tmp_path / "run"))
    for epoch in range(2):
        without.write({"epoch": epoch, "lr": 0.1})
    without.close()
    assert caplog.text.count("MLflow failed") == 1
    assert "the run goes on without it" in caplog.text


def test_a_tracker_that_does_not_answer_keeps_nobody_waiting(
    client, config_file, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.5)
    config = load_config(config_file, ["run.trackers=[mlflow]"])
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        waiting = Trackers(config, RunDir(tmp_path / "run"))
        started = time.monotonic()
        waiting.write({"epoch": 0, "lr": 0.1})
        waiting.close()
        assert time.monotonic() - started < 5
    assert "MLflow does not answer within 0.5 s" in caplog.text


def test_a_tracker_that_is_not_installed_is_refused(config_file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_config(config_file, ["run.trackers=[wandb]"])
    refused(r"run\.trackers names wandb, .*`pip install wandb`", check_trackers, config)
    check_trackers(load_config(config_file, ["run.trackers=[]"]))
