"""status.json, and what a launcher tells a run by variables: when to leave, how long to wait for
the one before, its CPUs."""

import json
import math
import os
import shutil
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tdds_dist.config.run import load_config
from tdds_dist.data import loader
from tdds_dist.distributed import interruption, world
from tdds_dist.distributed.interruption import TIME_LIMIT, Interruption, Preempted
from tdds_dist.errors import InputError
from tdds_dist.runs import entry
from tdds_dist.runs import status as pulse
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.entry import entered
from tdds_dist.runs.lock import RunLock
from tdds_dist.runs.status import Pulse
from tdds_dist.training import engine
from tests import jobs

KEYS = {*"stage state epoch epochs step steps images_per_second eta_seconds updated".split()}
KEYS |= {"host", "pid", "world_size", "job", "message"}
SETTING = {"stage": "collect", "data": {"train": "a", "val": "b"}}
BASE = ("train.deterministic=true", "train.epochs=4", "score.windows=[{T: 4, K: 3}]")
BASE += ("score.final_pass=false",)
SHORT = ("train.epochs=2", "score.windows=[{T: 2, K: 2}]")
STEPS = 5  # per epoch: 120 images, 24 at a time


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    for key in [key for key in os.environ if key.startswith("TDDS_")]:
        monkeypatch.delenv(key)


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def config(config_file):
    return load_config(config_file)


def status(folder):
    return json.loads((Path(folder) / "status.json").read_text())


# ---- the file


def test_a_beat_is_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TDDS_JOB", "12_3")
    pulse = Pulse(tmp_path / "status.json", "retrain", 4, True)
    pulse.beat("starting")
    first = status(tmp_path)
    expected = {"stage": "retrain", "state": "starting", "job": "12_3", "message": ""}
    expected |= {"world_size": 4, "host": socket.gethostname(), "pid": os.getpid()}
    expected |= {"images_per_second": None, "eta_seconds": None, "updated": first["updated"]}
    assert first == dict.fromkeys(("epoch", "epochs", "step", "steps"), 0) | expected
    assert abs(first["updated"] - time.time()) < 60
    known = {"epoch": 2, "epochs": 9, "step": 11, "steps": 45}
    known |= {"images_per_second": 10.5, "eta_seconds": 60.0}
    pulse.beat("training", **known)
    pulse.beat("stopped", message="why")
    last = status(tmp_path)
    assert last["updated"] >= first["updated"]
    told = {"state": "stopped", "message": "why", "updated": last["updated"]}
    assert last == first | known | told
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_other_ranks_are_silent(tmp_path):
    pulse = Pulse(tmp_path / "status.json", "collect", 2, False)
    pulse.beat("training")
    assert not pulse.is_due
    assert list(tmp_path.iterdir()) == []


def test_a_beat_is_due_every_few_seconds(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(pulse, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    beating = Pulse(tmp_path / "status.json", "collect", 1, True)
    clock[0] = 0.0  # of a host that has just been started
    assert Pulse(tmp_path / "status.json", "collect", 1, True).is_due
    clock[0] = 100.0
    assert beating.is_due
    beating.beat("starting")
    for later, is_due in ((0.0, False), (4.9, False), (5.1, True)):
        clock[0] = 100.0 + later
        assert beating.is_due == is_due


@pytest.mark.parametrize("trouble", ["no folder", "a folder", "full"])
def test_a_file_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, trouble):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    path = tmp_path / "folder" / "status.json"
    if trouble == "a folder":
        (path / "x").mkdir(parents=True)
    elif trouble == "full":
        path.parent.mkdir()
        path.write_text("before")
        monkeypatch.setattr(Path, "write_text", fail)
    beating = Pulse(path, "collect", 1, True)
    beating.beat("training")
    beating.beat("finished")
    assert not beating.is_due
    if trouble == "full":
        assert path.read_text() == "before"
    assert not list(tmp_path.rglob("*.tmp"))


# ---- how a stage leaves


def enter(run, config, **options):
    return entered(run, config, SETTING, world.current_world("cpu"), **options)


def test_a_stage_says_starting_and_then_how_it_ended(run, config):
    with enter(run, config) as found:
        assert status(run.path)["state"] == "starting"
        found.pulse.beat("training", epoch=1, eta_seconds=5.0)
    assert (status(run.path)["state"], status(run.path)["eta_seconds"]) == ("finished", None)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (Preempted("SIGTERM: saved", agreed=True), "stopped", "SIGTERM: saved"),
        (InputError("NaN at step 3"), "failed", "NaN at step 3"),
        (ZeroDivisionError("division"), "failed", "ZeroDivisionError: division"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
        (RuntimeError("[gloo] closed"), "failed", "RuntimeError: [gloo] closed"),
    ],
)
def test_a_stage_that_does_not_finish_says_why(run, config, error, state, message):
    """stopped: asked to leave, and able to go on."""

    def train():
        with enter(run, config) as found:
            found.pulse.beat("training", epoch=2, eta_seconds=5.0)
            raise error

    with pytest.raises(type(error)):
        train()
    told = {"state": state, "message": message, "epoch": 2, "eta_seconds": None}
    assert status(run.path).items() >= told.items()


def test_a_stage_that_is_not_let_in_leaves_the_file_of_the_other(run, config):
    other = RunLock(run.path)
    with enter(run, config):
        pass
    before = run.status_file.read_bytes()
    other.acquire()
    try:
        with pytest.raises(InputError, match="in use by"), enter(run, config):
            pass
    finally:
        other.release()
    changed = config.model_copy(update={"train": config.train.model_copy(update={"lr": 9.0})})
    with pytest.raises(InputError, match=r"train\.lr"), enter(run, changed):
        pass
    with pytest.raises(InputError, match="already holds"), enter(run, config, fresh=True):
        pass
    assert run.status_file.read_bytes() == before


def test_a_run_that_was_finished_before_is_still_said_to_be(run, config):
    with enter(run, config):
        run.result_file.write_text("{}")
    before = run.status_file.read_bytes()
    with enter(run, config) as found:
        assert found.result == {}
    assert run.status_file.read_bytes() == before


def test_starting_over_starts_the_file_over(run, config):
    with enter(run, config) as found:
        found.pulse.beat("training", epoch=7)
    run.result_file.write_text("{}")
    with enter(run, config, fresh=True, force=True):
        assert (status(run.path)["state"], status(run.path)["epoch"]) == ("starting", 0)


# ---- the time to leave


@pytest.mark.parametrize("text", ["", "soon", "12:00", "inf", "nan"])
def test_a_time_that_is_none_is_never(monkeypatch, text):
    monkeypatch.setenv("TDDS_LEAVE_AT", text)
    assert Interruption().requested == ""


def test_the_time_to_leave(monkeypatch):
    assert Interruption().leave_at == math.inf
    clock = SimpleNamespace(monotonic=time.monotonic)
    monkeypatch.setattr(interruption, "time", clock)
    monkeypatch.setenv("TDDS_LEAVE_AT", "1060.5")
    asked = Interruption()
    for now, is_time in (
        (1000, False),
        (1060.4, False),
        (1060.5, True),
        (1059, False),
        (5000, True),
    ):
        clock.time = lambda now=now: now
        assert asked.requested == (TIME_LIMIT if is_time else "")
    with asked, asked.watched():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR2)
    assert asked.requested == "SIGTERM"  # the first signal counts, all of them are known
    assert asked.received == {"SIGTERM", "SIGUSR2"}


# ---- waiting for the job before


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(entry.log, "info", lines.append)
    monkeypatch.setattr(entry, "_LOOK_AGAIN_SECONDS", 0.05)
    return lines


def test_a_holder_that_ends_is_waited_for(run, config, said, monkeypatch):
    monkeypatch.setenv("TDDS_LOCK_WAIT_SECONDS", "60")
    holder = RunLock(run.path)
    holder.acquire()
    threading.Timer(0.4, holder.release).start()
    started = time.monotonic()
    with enter(run, config):
        assert 0.3 < time.monotonic() - started < 20
        assert not holder._held
    waiting = [line for line in said if line.startswith("waiting, because ")]
    assert waiting
    assert f"in use by pid {os.getpid()} on " in waiting[0]


@pytest.mark.parametrize(
    ("text", "least"), [("1", 1.0), ("0", 0.0), ("", 0.0), ("long", 0.0), ("-5", 0.0)]
)
def test_a_holder_that_stays_is_not_waited_for_longer_than_that(
    run, config, said, monkeypatch, text, least
):
    monkeypatch.setenv("TDDS_LOCK_WAIT_SECONDS", text)
    holder = RunLock(run.path)
    holder.acquire()
    started = time.monotonic()
    with pytest.raises(InputError, match="in use by pid"), enter(run, config):
        pass
    assert least <= time.monotonic() - started < least + 0.9
    assert not run.status_file.exists()
    assert bool(said) == bool(least)
    assert RunLock(run.path).lost is False
    holder.release()


# ---- CPUs


@pytest.mark.parametrize(
    ("text", "num"),
    [("6", 6), ("1", 1), ("", None), ("0", None), ("two", None), ("-3", None), ("1.5", None)],
)
def test_cpus_that_the_launcher_has_shared_out(monkeypatch, text, num):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(9))
    monkeypatch.setenv("TDDS_CPUS_PER_RANK", text)
    assert loader.default_workers(4) == (num or 2)


def test_cpus_that_nobody_has_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(9))
    assert [loader.default_workers(ranks) for ranks in (1, 2, 4, 9, 16)] == [9, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("given", "launcher", "num"),
    [
        ("6", {}, 6),
        ("1", {}, 1),
        ("", {}, 3),
        ("6", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "3"}, 6),
        ("1", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "3"}, 3),  # torchrun's own
        ("1", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 1),  # it sets none for one
    ],
)
def test_threads_that_the_user_sets_are_those_of_torch(monkeypatch, given, launcher, num):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(9))
    for name, value in ({"OMP_NUM_THREADS": given} | launcher).items():
        monkeypatch.setenv(name, value)
    assert loader.torch_threads(3) == num


# ---- real collections


def _keep(source, target):
    shutil.copy(source, target)


def _tell(variables, rank):
    os.environ |= variables


def _beat_at_every_step(rank):
    pulse.BEAT_SECONDS = 0.0


def _clock_goes_on(seconds):
    """From now on this process thinks that it is so much later when it looks whether to leave."""
    interruption.time = SimpleNamespace(
        time=lambda: time.time() + seconds, monotonic=time.monotonic
    )


def _epochs_take(seconds, rank):
    engine.Trainer._epoch_seconds = lambda trainer: seconds


@pytest.mark.distributed
def test_a_collection_says_where_it_is(config_file, tmp_path):
    folder, kept = tmp_path / "run", tmp_path / "kept.json"
    inject = jobs.all_of(
        partial(_tell, {"TDDS_JOB": "77"}),
        _beat_at_every_step,
        jobs.at_step(STEPS + 3, partial(_keep, folder / "status.json", kept), [0]),
    )
    before = time.time()
    command = ["collect", config_file, *BASE, *SHORT, f"run.dir={folder}"]
    codes, text = jobs.run(command, 1, tmp_path / "out", inject)
    assert codes == [0], text
    middle, left = json.loads(kept.read_text()), status(folder)
    assert middle.keys() == left.keys() == KEYS
    always = {"stage": "collect", "epochs": 2, "steps": 2 * STEPS, "world_size": 1, "job": "77"}
    then = always | {"state": "training", "epoch": 1, "step": STEPS + 2}
    assert middle.items() >= then.items()
    assert middle["images_per_second"] > 0
    assert 0 < middle["eta_seconds"] < 600
    now = always | {"state": "finished", "epoch": 2, "step": 2 * STEPS, "eta_seconds": None}
    assert left.items() >= now.items()
    assert before < middle["updated"] <= left["updated"] <= time.time()
    assert middle["pid"] == left["pid"] != os.getpid()
    assert left["host"] == socket.gethostname()
    assert not list(folder.glob(".status*"))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_collection_that_waits_for_another_leaves_its_file_alone_and_goes_on(
    config_file, tmp_path
):
    """The first naps in a step; the second waits, until the first is killed."""
    folder, flag = tmp_path / "run", tmp_path / "napping"
    command = ["collect", config_file, *BASE, f"run.dir={folder}"]
    first = jobs.Job(command, 1, tmp_path / "a", jobs.at_step(STEPS + 3, jobs.nap(flag, 80.0)))
    try:
        deadline = time.monotonic() + 60
        while not flag.exists():
            assert time.monotonic() < deadline, first.text
            time.sleep(0.05)
        before = (folder / "status.json").read_bytes()
        patient = partial(_tell, {"TDDS_LOCK_WAIT_SECONDS": "60"})
        second = jobs.Job(command, 1, tmp_path / "b", patient)
        second.until("waiting, because")
        assert (folder / "status.json").read_bytes() == before
    finally:
        first.kill(0)
        first.wait()
    assert second.wait() == [0], second.text
    left = status(folder)
    assert (left["state"], left["epoch"]) == ("finished", 4)
    assert left["pid"] == second.processes[0].pid
    assert len(RunDir(folder).read_env()["resumes"]) == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_leaves_before_its_time_limit_and_goes_on_bitwise(config_file, tmp_path):
    """Whichever rank's clock is first, rank 1's here and then rank 0's; no signal comes."""
    straight, folder = tmp_path / "straight", tmp_path / "run"
    command = ["collect", config_file, *BASE, "checkpoint.every_epochs=0"]
    assert jobs.run([*command, f"run.dir={straight}"], 2, tmp_path / "s")[0] == [0, 0]
    command += [f"run.dir={folder}"]
    limit = partial(_tell, {"TDDS_LEAVE_AT": str(time.time() + 3600)})
    for rank, at in ((1, STEPS + 2), (0, 2 * STEPS + 2)):
        past = jobs.at_step(at, partial(_clock_goes_on, 4000.0), [rank])
        codes, text = jobs.run(command, 2, tmp_path / f"a{rank}", jobs.all_of(limit, past))
        assert codes == [75, 75], text
        epoch = at // STEPS + 1
        assert text.count(f"tdds collect: time limit: saved at epoch {epoch}, step ") == 1  # rank 0
        left = status(folder)
        assert (left["state"], left["epoch"], left["eta_seconds"]) == ("stopped", epoch - 1, None)
        assert left["message"].startswith(f"time limit: saved at epoch {epoch}")
        step = int(left["message"].split("step ")[1].split(";")[0])
        assert at <= step <= at + 2  # soon: the ranks agree a step later
        assert (folder / "checkpoints" / f"step_{step:010}").is_dir()
    codes, text = jobs.run(command, 2, tmp_path / "b", limit)
    assert codes == [0, 0], text
    now = {"state": "finished", "epoch": 4, "step": 4 * STEPS, "world_size": 2, "message": ""}
    assert status(folder).items() >= now.items()
    assert jobs.differences(jobs.state_of(straight), jobs.state_of(folder)) == []


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("leave_in", "epoch_seconds", "saves"),
    [(3600.0, 4000.0, True), (3600.0, 10.0, False), (None, 1e9, False)],
)
def test_what_would_not_fit_before_the_time_limit_is_saved_before_it(
    config_file, tmp_path, leave_in, epoch_seconds, saves
):
    """Although nothing else asks for a checkpoint; the run is killed in the third epoch."""
    folder = tmp_path / "run"
    told = {} if leave_in is None else {"TDDS_LEAVE_AT": str(time.time() + leave_in)}
    inject = jobs.all_of(
        partial(_tell, told),
        partial(_epochs_take, epoch_seconds),
        jobs.at_step(2 * STEPS + 4, jobs.signal_self(signal.SIGKILL)),
    )
    never = "checkpoint.every_epochs=0 checkpoint.every_seconds=0 checkpoint.asynchronous=false"
    command = ["collect", config_file, *BASE, *never.split(), f"run.dir={folder}"]
    codes, text = jobs.run(command, 2, tmp_path / "out", inject)
    assert codes == [-9, -9], text
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert saved == ([f"step_{STEPS:010}", f"step_{2 * STEPS:010}"] if saves else [])
