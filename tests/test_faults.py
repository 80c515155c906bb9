"""What a run survives, as commands on real ranks with real signals: hurt it, start it again, and nothing may show.

Training is deterministic, with random augmentation. "Nothing may show": weights, best weights, scores and the trajectory are
bitwise those of a run that nobody touched (`nobody_touched`), every epoch stands once in metrics.jsonl, and no file of a
checkpoint, lock or half-written file stays. With TDDS_FAULT_TABLE=<file> a table of all faults is written there.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from jobs import at_call, at_step, signal_self

from tdds_dist.cli import main
from tdds_dist.rundir import RunDir

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow

EPOCHS, STEPS_PER_EPOCH = 4, 5
STEPS = EPOCHS * STEPS_PER_EPOCH
SCORE = "tdds_official_T4_K3_beta0.9"
KILL, TERM = signal_self(signal.SIGKILL), signal_self(signal.SIGTERM)

_rows: list[tuple[str, str, str]] = []  # fault, what is lost, seconds


@pytest.fixture(scope="session", autouse=True)
def table():
    yield
    if path := os.environ.get("TDDS_FAULT_TABLE"):
        lines = ["| fault | lost | seconds to the next step |", "|---|---|---|"]
        longest = {}
        for fault, lost, seconds in _rows:
            longest[fault, lost] = max(longest.get((fault, lost), ""), seconds, key=lambda text: (len(text), text))
        lines += [f"| {fault} | {lost} | {seconds} |" for (fault, lost), seconds in longest.items()]
        Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def config(betons, tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "config.yaml"
    path.write_text(f"""
run: {{name: tiny, device: cpu}}
data: {{train: {betons["train"]}, val: {betons["val"]}, num_classes: 10, image_size: 32, crop: pad, padding: 2, flip: true,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: shufflenet_v2_x0_5}}
train: {{epochs: {EPOCHS}, global_batch_size: 24, lr: 0.05, deterministic: true}}
score: {{windows: [{{T: 4, K: 3, pruning_rates: [0.5]}}]}}
""")
    return path


@dataclass
class Run:
    """A run directory, and the commands that were started on it one after the other."""

    config: Path
    folder: Path
    starts: list[jobs.Job] = field(default_factory=list)
    done: int = 0  # steps that were trained so far

    @property
    def path(self):
        return self.folder / "run"

    @property
    def checkpoints(self):
        return sorted(path.name for path in (self.path / "checkpoints").glob("*"))

    def start(self, ranks, *settings, inject=None, stage="collect", port=None):
        words = [stage, self.config, f"run.dir={self.path}", *settings]
        job = jobs.Job(words, ranks, self.folder / f"start{len(self.starts)}", jobs.all_of(jobs.quick, inject), port)
        self.starts.append(job)
        return job

    def ends(self, codes, *settings, inject=None, stage="collect", deadline=90.0):
        """Start a rank per exit code and wait for them; what they said."""
        return self.ended(codes, self.start(len(codes), *settings, inject=inject, stage=stage), deadline)

    def ended(self, codes, job, deadline=90.0):
        found = job.wait(deadline)
        assert all(code in (wanted if isinstance(wanted, tuple) else (wanted,))
                   for code, wanted in zip(found, codes, strict=True)), (found, codes, job.text)
        self.done = max([self.done, *job.steps()])
        return job.text

    def goes_on(self, reference, *settings, fault=None, path=None, stage="collect", deadline=90.0, inject=None):
        """The same command again ends, and nothing shows. Adds a row to the table when it has a name for the fault."""
        before = self.done
        text = self.ends([0] * reference.ranks, *settings, stage=stage, deadline=deadline, inject=inject)
        if fault:
            add_row(fault, before, self.starts[-1])
        assert_nothing_shows(path or self.path, reference)
        return text


@dataclass(frozen=True)
class Reference:
    """What an uninterrupted run came to."""

    ranks: int
    path: Path
    state: dict[str, np.ndarray]
    visits: dict[int, list[int]]


def add_row(fault, done, job):
    """`done`: the last step before the fault; `job`: what went on after it."""
    steps = job.steps()
    lost = done - min(steps) + 1 if steps else 0
    assert lost >= 0, "steps were left out"
    lost = "nothing" if lost == 0 else f"{lost} step{'s' * (lost > 1)}, trained again"
    _rows.append((fault, lost, f"{steps[min(steps)][0]:.1f}" if steps else "none left"))


def assert_nothing_shows(path, reference):
    assert jobs.differences(jobs.state_of(path), reference.state) == []
    records = RunDir(path).read_metrics()
    assert [record["epoch"] for record in records] == list(range(len(RunDir(reference.path).read_metrics())))
    assert [record["step"] for record in records] == [record["step"] for record in RunDir(reference.path).read_metrics()]
    assert not (path / "checkpoints").exists()
    assert not (path / "run.lock").exists()
    assert [file.name for file in path.rglob(".*")] == []


def the_error(text, stage="collect"):
    """The one line that bad input gives, whatever the number of ranks."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith(f"tdds {stage}: error: ")]
    assert len(lines) == 1, text
    return lines[0]


def snapshot(path, *but):
    """All that lies in a directory, but the log, the lock, and files called `but`."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*"))
            if file.is_file() and file.name not in ("log.txt", "run.lock", *but)}


def is_finite(state):
    """Weights and scores; the scalars of the first epoch have no difference to the one before."""
    return all(np.isfinite(value).all() for name, value in state.items() if not name.startswith("trajectory/"))


@pytest.fixture
def run(config, tmp_path):
    return Run(config, tmp_path)


@pytest.fixture(scope="session")
def nobody_touched(config, tmp_path_factory):
    """References by number of ranks."""
    found = {}

    def of(ranks):
        if ranks not in found:
            run = Run(config, tmp_path_factory.mktemp(f"reference{ranks}"))
            run.ends([0] * ranks)
            found[ranks] = Reference(ranks, run.path, jobs.state_of(run.path), run.starts[0].visits())
            assert len(found[ranks].visits) == STEPS
            assert np.unique(found[ranks].state[f"{SCORE}/score"]).size > 100
        return found[ranks]

    return of


@pytest.fixture(scope="session")
def stopped(config, tmp_path_factory):
    """A run on 2 ranks that was killed before step 18, with checkpoints at steps 5, 10 and 15."""
    run = Run(config, tmp_path_factory.mktemp("stopped"))
    run.ends([-9, -9], "checkpoint.keep=4", "checkpoint.asynchronous=false", inject=at_step(18, KILL))
    assert run.checkpoints == [f"step_{step:010d}" for step in (5, 10, 15)]
    return run


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of that run to hurt."""
    run = Run(stopped.config, tmp_path, done=stopped.done)
    shutil.copytree(stopped.path, run.path)
    return run


# ---- killed


@pytest.mark.parametrize(("ranks", "killed"), [
    pytest.param(2, (0,), marks=slow), (2, (1,)), pytest.param(3, (2,), marks=slow),
    pytest.param(2, (0, 1), marks=slow), pytest.param(1, (0,), marks=slow)])
def test_kill_within_an_epoch(run, nobody_touched, ranks, killed):
    codes = [-9 if rank in killed else 1 for rank in range(ranks)]
    run.ends(codes, "checkpoint.asynchronous=false", inject=at_step(9, KILL, killed), deadline=60)
    for rank in set(range(ranks)) - set(killed):
        said = run.starts[0].outputs[rank].read_text()
        assert f"rank {rank}, epoch 2, step" in said
        assert re.search(rf"(: rank {killed[0]}|at least one of the ranks [\d, ]*\b{killed[0]}\b[\d, ]*) ended", said)
        assert "run the same command again" in said
        assert "Traceback" not in said
    who = "all ranks" if len(killed) == ranks else f"rank {killed[0]}"
    text = run.goes_on(nobody_touched(ranks), fault=f"SIGKILL of {who} within an epoch ({ranks} ranks)")
    assert "took over the lock of a job that died" in text or 0 not in killed
    assert "resumes at epoch 2, step 5" in text


# What dies in the middle of it: target, which call, of which ranks, when; the step of the checkpoint that is used then.
CRASHES = {
    "between config.yaml and env.json": (at_call("tdds_dist.rundir:RunDir._write_json", 1, KILL, [0]), None),
    "before the first checkpoint": (at_step(4, KILL), None),
    "while a checkpoint's tensors are written": (
        at_call("torch.distributed.checkpoint:FileSystemWriter.write_data", 2, KILL), 5),
    "while one rank's tensors are written": (
        at_call("torch.distributed.checkpoint:FileSystemWriter.write_data", 2, KILL, [1], after=True), 5),
    "before a checkpoint is published": (at_call("tdds_dist.checkpoint:Checkpoints._publish", 2, KILL, [0]), 5),
    "after a checkpoint is published": (at_call("tdds_dist.checkpoint:Checkpoints._publish", 2, KILL, [0], after=True), 10),
    "while an old checkpoint is removed": (at_call("tdds_dist.checkpoint:_retire", 1, KILL, [0], after=True), 15),
    "while a trajectory block is written": (jobs.torn("numpy:save", 3, [1]), 5),
    "after one rank's trajectory block": (at_call("numpy:save", 3, KILL, [0], after=True), 5),
    "between trajectory and metrics": (at_call("tdds_dist.rundir:RunDir.append_metrics", 2, KILL, [0]), 5),
    "between metrics and checkpoint": (at_call("tdds_dist.engine:Trainer._end_of_epoch", 2, KILL), 5),
    "while best.pt is written": (
        at_call("tdds_dist.engine:Trainer.save_model", 2, partial(jobs.torn("torch:save", 1), 0), [0]), 5),
    "after best.pt is written": (at_call("tdds_dist.engine:Trainer.save_model", 2, KILL, after=True), 5),
    "after final.pt is written": (at_call("tdds_dist.engine:Trainer.save_model", 4, KILL, after=True), 15),
    "between training and scores": (at_call("tdds_dist.engine:Trainer._result", 1, KILL), 20),
    "after the first score file": (at_call("tdds_dist.collect:save_scores", 1, KILL, [0], after=True), 20),
    "during the final pass": (at_call("tdds_dist.final_pass:log_probabilities", 3, KILL), 20),
    "before result.json": (at_call("tdds_dist.rundir:RunDir.write_result", 1, KILL, [0]), 20),
}


@slow
@pytest.mark.parametrize("where", CRASHES)
def test_kill_at_the_worst_moment(run, nobody_touched, where):
    inject, step = CRASHES[where]
    run.ends([(-9, 1), (-9, 1)], "checkpoint.asynchronous=false", inject=inject)
    text = run.goes_on(nobody_touched(2), fault=f"SIGKILL {where}")
    if step is None:
        assert "resumes" not in text
    else:
        where = f"at epoch {step // STEPS_PER_EPOCH + 1}, step {step}" if step < STEPS else "after the last epoch"
        assert f"resumes {where}" in text


@slow
def test_kill_while_a_checkpoint_is_written_in_the_background(run, nobody_touched):
    run.ends([(-9, 1), (-9, 1)], inject=at_call("torch.distributed.checkpoint:FileSystemWriter.write_data", 2, KILL))
    text = run.goes_on(nobody_touched(2), fault="SIGKILL while a checkpoint is written in the background")
    assert "resumes at epoch 2, step 5" in text


@slow
def test_kill_between_the_result_and_the_removal_of_checkpoints(run, nobody_touched):
    run.ends([-9, 1], inject=at_call("tdds_dist.checkpoint:Checkpoints.remove_all", 1, KILL, [0]))
    assert "is finished already" in run.goes_on(nobody_touched(2), fault="SIGKILL after result.json")


@slow
@pytest.mark.parametrize("inject", [
    at_call("tdds_dist.rundir:RunDir.rewind", 1, KILL, [0]),
    at_call("tdds_dist.checkpoint:Checkpoints.load", 1, KILL, [0], after=True),
    at_call("tdds_dist.scorer:resume_trajectory", 1, KILL, [0]),
    at_call("shutil:rmtree", 1, KILL, [0], after=True),
])
def test_kill_while_resuming(copy, nobody_touched, inject):
    shutil.rmtree(copy.path / "checkpoints" / "step_0000000015")  # so that an epoch is to be forgotten
    copy.ends([-9, 1], inject=inject)
    assert "resumes at epoch 3, step 10" in copy.goes_on(nobody_touched(2), fault="SIGKILL while a run resumes")


# ---- asked to leave


@pytest.mark.parametrize(("number", "asked", "step"), [
    pytest.param("SIGTERM", (0, 1), 8, marks=slow), ("SIGTERM", (1,), 8), pytest.param("SIGUSR2", (0,), 8, marks=slow),
    pytest.param("SIGINT", (0, 1), 9, marks=slow), pytest.param("SIGTERM", (1,), 10, marks=slow)])
def test_a_signal_saves_and_the_same_command_goes_on(run, nobody_touched, number, asked, step):
    text = run.ends([75, 75], inject=at_step(step, signal_self(signal.Signals[number]), asked))
    saved = run.done
    assert saved in (step, step + 1)
    assert text.count(f"tdds collect: {number}: saved at epoch {saved // STEPS_PER_EPOCH + 1}, step {saved}; run the same "
                      "command again to go on") == 1
    assert "error" not in text
    who = "all ranks" if len(asked) == 2 else "one rank"
    text = run.goes_on(nobody_touched(2), fault=f"{number} to {who}")
    assert f"step {saved}" in text
    for rank in (0, 1):  # no step twice, none left out
        assert [step for job in run.starts for step in job.steps(rank)] == list(range(1, STEPS + 1))


@slow
def test_random_numbers_of_training_go_on(run, tmp_path):
    """Mixing draws from each rank's own generator, within an epoch."""
    settings = ["train.mixup=0.4", "score.view=clean"]
    straight = Run(run.config, tmp_path / "straight")
    straight.ends([0, 0], *settings)
    reference = Reference(2, straight.path, jobs.state_of(straight.path), straight.starts[0].visits())
    run.ends([75, 75], *settings, inject=at_step(8, TERM, [0]))
    run.goes_on(reference, *settings)


@slow
@pytest.mark.parametrize("inject", [
    at_call("tdds_dist.engine:Trainer.evaluate", 2, TERM, [1]),
    at_call("tdds_dist.engine:Trainer.save_model", 2, TERM, [0]),
    at_call("torch.distributed.checkpoint:FileSystemWriter.write_data", 1, TERM, [0]),
    at_call("numpy:save", 3, TERM, [1]),
])
def test_a_signal_between_two_epochs(run, nobody_touched, inject):
    assert "SIGTERM: saved at epoch" in run.ends([75, 75], inject=inject)
    run.goes_on(nobody_touched(2), fault="SIGTERM during evaluation, or while something is written")
    assert [step for job in run.starts for step in job.steps()] == list(range(1, STEPS + 1))


@slow
def test_a_signal_in_the_last_step(run, nobody_touched):
    assert f"SIGTERM: saved at epoch {EPOCHS}, step {STEPS}" in run.ends([75, 75], inject=at_step(STEPS, TERM, [1]))
    run.goes_on(nobody_touched(2), fault="SIGTERM in the last step")
    assert list(run.starts[1].steps()) == []


@slow
@pytest.mark.parametrize(("asked", "codes"), [((0, 1), (75, 75)), ((0,), (75, 1))])
def test_a_signal_in_the_final_pass(run, nobody_touched, asked, codes):
    run.ends([(0, code) for code in codes], inject=at_call("tdds_dist.final_pass:log_probabilities", 3, TERM, asked))
    run.goes_on(nobody_touched(2), fault="SIGTERM during the final pass")


@slow
@pytest.mark.parametrize("target", ["tdds_dist.collect:open_files", "tdds_dist.rundir:RunDir.write_start",
                                    "tdds_dist.snapshot:settle_buckets"])
def test_a_signal_during_start_up(run, nobody_touched, target):
    text = run.ends([75, 1], inject=at_call(target, 1, TERM, [0]))
    assert "SIGTERM: not saved here; run the same command again" in text
    run.goes_on(nobody_touched(2), fault="SIGTERM during start-up")


@slow
def test_ctrl_c_twice_does_not_wait(run, nobody_touched, tmp_path):
    flag = tmp_path / "asleep"
    job = run.start(2, inject=at_step(8, jobs.nap(flag, 60)))
    wait_for(flag)
    for _ in range(2):
        job.kill(0, signal.SIGINT), job.kill(1, signal.SIGINT)
        time.sleep(0.2)  # what a launcher passes on does not count as the second
    assert all(process.is_alive() for process in job.processes)
    time.sleep(1.0)
    job.kill(0, signal.SIGINT), job.kill(1, signal.SIGINT)
    asked = time.monotonic()
    assert run.ended([130, 130], job).count("tdds collect: interrupted") == 2
    assert time.monotonic() - asked < 5
    run.goes_on(nobody_touched(2), fault="SIGINT twice while a step hangs")


def wait_for(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


# ---- other numbers of ranks, launchers


@slow
def test_ranks_come_and_go(run, nobody_touched):
    """2 -> 1 -> 3 ranks: the samples of every step stay, and so does their order."""
    run.ends([75, 75], inject=at_step(6, TERM, [0]))
    assert "on 1 instead of 2 ranks" in run.ends([75], inject=at_step(12, TERM))
    before = run.done
    assert "on 3 instead of 1 ranks" in run.ends([0, 0, 0])
    add_row("SIGTERM, 2 -> 1 -> 3 ranks", before, run.starts[-1])
    visits = [(step, seen) for job in run.starts for step, seen in job.visits().items()]
    assert visits == list(nobody_touched(2).visits.items()) == list(nobody_touched(1).visits.items())
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        assert sorted(index for step in steps for index in visits[step][1]) == list(range(120))
    state = jobs.state_of(run.path)
    assert is_finite(state)
    assert state.keys() == nobody_touched(2).state.keys()


@slow
def test_ranks_that_do_not_divide_the_batch(run):
    setting = "train.global_batch_size=20"
    run.ends([75], setting, inject=at_step(8, TERM))
    before = snapshot(run.path)
    line = the_error(run.ends([2, 2, 2], setting))
    assert "train.global_batch_size=20 is not divisible by world_size=3; use 18 or 21" in line
    assert snapshot(run.path) == before
    run.ends([0], setting)


LAUNCHED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import jobs
rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
folder = Path({folder!r}) / f"attempt{{attempt}}"
folder.mkdir(exist_ok=True)
kill = jobs.at_step(9, jobs.signal_self(), [1]) if attempt == "0" else None
jobs.begin(sys.argv[1:], rank, folder, jobs.all_of(jobs.quick, kill))
"""


@slow
def test_torchrun_starts_lost_ranks_again(run, nobody_touched, tmp_path):
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
         program, "collect", run.config, f"run.dir={run.path}", "checkpoint.asynchronous=false"],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    assert "resumes at epoch 2, step 5" in done.stderr
    assert_nothing_shows(run.path, nobody_touched(2))
    logs = [(tmp_path / f"attempt{attempt}" / "steps0.txt").read_text().splitlines() for attempt in (0, 1)]
    when = [[float(line.split()[1]) for line in log] for log in logs]
    assert [len(log) for log in logs] in ([8, STEPS - 5], [9, STEPS - 5])
    lost = f"{len(logs[0]) - 5} steps, trained again"
    _rows.append(("SIGKILL of one rank under torchrun --max-restarts (torch is loaded anew)", lost,
                  f"{when[1][0] - when[0][-1]:.1f}"))


# ---- disks


def no_room(call):
    """From this checkpoint on rank 0 cannot write files as large as its part of one; models (1.55 MB) still fit."""
    return at_call("torch.distributed.checkpoint:FileSystemWriter.write_data", call, jobs.limit_file_size(1_700_000), [0])


@slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_no_room_for_checkpoints_does_not_stop_a_run(run, nobody_touched, asynchronous):
    text = run.goes_on(nobody_touched(2), f"checkpoint.asynchronous={asynchronous}", inject=no_room(1))
    assert text.count("warning: checkpoint at step") == EPOCHS
    assert "warning: checkpoint at step 5 failed (" in text
    assert "File too large" in text


@slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_no_room_for_checkpoints_stops_a_run_that_wants_it(run, nobody_touched, asynchronous):
    settings = ["checkpoint.on_error=stop", f"checkpoint.asynchronous={asynchronous}"]
    line = the_error(run.ends([2, 2], *settings, inject=no_room(2)))
    assert "checkpoint at step 10 failed (" in line
    assert "make room" in line
    run.goes_on(nobody_touched(2), *settings, fault=f"no room for a checkpoint, on_error=stop (asynchronous={asynchronous})")


@slow
def test_leaving_without_room_says_that_nothing_was_saved(run, nobody_touched):
    text = run.ends([75, 75], inject=jobs.all_of(no_room(2), at_step(8, TERM)))
    assert "SIGTERM: NOT saved (see the warning) at epoch 2" in text
    run.goes_on(nobody_touched(2), fault="SIGTERM without room for a checkpoint")


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_no_room_for_the_trajectory(run, nobody_touched, rank):
    full = jobs.fail(OSError(28, "No space left on device"))
    line = the_error(run.ends([2, 2], inject=at_call("numpy:save", 3, full, [rank])))
    assert "No space left on device" in line
    assert "free space" in line
    run.goes_on(nobody_touched(2), fault=f"disk full at the trajectory of rank {rank}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB of one's own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@slow
@pytest.mark.parametrize("target", ["tdds_dist.trajectory:TrajectoryWriter.append", "tdds_dist.rundir:RunDir.append_metrics",
                                    "tdds_dist.engine:Trainer.save_model"])
def test_a_full_disk(config, small_disk, nobody_touched, target):
    run = Run(config, small_disk)
    full = at_call(target, 2, jobs.fill_disk(small_disk), [0])
    line = the_error(run.ends([2, 2], "checkpoint.asynchronous=false", inject=full))
    assert "No space left on device" in line
    (small_disk / "filler").unlink()
    run.goes_on(nobody_touched(2), fault=f"disk full ({target.partition(':')[2]})")


@slow
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(config, small_disk, nobody_touched):
    run = Run(config, small_disk)
    full = at_call("tdds_dist.checkpoint:Checkpoints._write", 2, jobs.fill_disk(small_disk), [0])
    line = the_error(run.ends([2, 2], "checkpoint.on_error=stop", inject=full))
    assert "No space left on device" in line
    (small_disk / "filler").unlink()
    run.goes_on(nobody_touched(2), "checkpoint.on_error=stop", fault="disk full while a checkpoint is written")


@slow
def test_a_directory_that_cannot_be_written(run):
    run.path.write_text("a file")
    assert "cannot" in the_error(run.ends([2, 2]))
    run.path.unlink()
    if os.getuid() == 0:  # root may write anywhere
        run.path.mkdir(mode=0o555)
        nobody = at_call("tdds_dist.lock:RunLock.acquire", 1, partial(os.seteuid, 65534), [0])
        assert "Permission denied" in the_error(run.ends([2, 2], inject=nobody))
        assert list(run.path.iterdir()) == []
    assert run.done == 0


# ---- damaged files


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("name", "hurt", "said"), [
    pytest.param("__0_0.distcp", cut, "__0_0.distcp has", marks=slow),
    ("__1_0.distcp", flip_bit, "__1_0.distcp is damaged"),
    pytest.param("__1_0.distcp", Path.unlink, "__1_0.distcp is missing", marks=slow),
    pytest.param(".metadata", flip_bit, ".metadata is damaged", marks=slow),
    pytest.param("checkpoint.json", flip_bit, "checkpoint.json", marks=slow),
    pytest.param("checkpoint.json", Path.unlink, "checkpoint.json is missing", marks=slow),
    pytest.param("best.pt", flip_bit, "best.pt is damaged", marks=slow)])
def test_a_damaged_checkpoint_is_passed_over(copy, nobody_touched, name, hurt, said):
    newest = copy.path / "checkpoints" / "step_0000000015"
    hurt(newest / name)
    text = copy.goes_on(nobody_touched(2), fault=f"newest checkpoint: {name} {hurt.__name__}")
    assert f"warning: checkpoint step_0000000015: {said}" in text or name == "checkpoint.json"
    assert "the one before it is used" in text
    assert "resumes at epoch 3, step 10" in text


@slow
def test_weights_and_metrics_that_are_gone_come_back(copy, nobody_touched):
    """best.pt is of the epoch before, and the last one is no better."""
    shutil.rmtree(copy.path / "models")
    with (copy.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')  # cut off
    assert "resumes at epoch 4, step 15" in copy.goes_on(nobody_touched(2), fault="models/ gone, metrics.jsonl cut off")


@slow
def test_no_checkpoint_is_whole(copy):
    for number, path in enumerate(sorted((copy.path / "checkpoints").iterdir())):
        (cut, flip_bit, Path.unlink)[number](path / f"__{number % 2}_0.distcp")
    before = snapshot(copy.path, "status.json")  # which says that this start failed
    line = the_error(copy.ends([2, 2]))
    assert all(f"step_{step:010d}: __" in line for step in (5, 10, 15))
    assert "none of the 3 checkpoints" in line
    assert "--fresh --force" in line
    assert snapshot(copy.path, "status.json") == before


def block(run, epoch, suffix="npy"):
    return sorted((run.path / "trajectory" / f"epoch_{epoch:04d}").glob(f"*.{suffix}"))[0]


def from_the_epoch_before(path):
    other = path.parent.with_name(f"epoch_{int(path.parent.name[-4:]) - 1:04d}") / path.name
    shutil.copy(other, path)


def whole_epoch_before(path):
    for suffix in (".npy", ".json"):
        from_the_epoch_before(path.with_suffix(suffix))


@slow
@pytest.mark.parametrize("hurt", [cut, flip_bit, Path.unlink, from_the_epoch_before, whole_epoch_before])
def test_a_damaged_trajectory_is_recorded_again(copy, nobody_touched, hurt):
    hurt(block(copy, 2))
    text = copy.goes_on(nobody_touched(2), fault=f"trajectory block damaged ({hurt.__name__})")
    assert "the trajectory is whole for 2 epochs only, not for its 3" in text
    assert "resumes at epoch 3, step 10" in text


@slow
@pytest.mark.parametrize("hurt", [flip_bit, shutil.rmtree])
def test_a_trajectory_damaged_from_the_start(copy, nobody_touched, hurt):
    hurt(block(copy, 0) if hurt is flip_bit else copy.path / "trajectory")
    before = snapshot(copy.path, "status.json")  # which says that this start failed
    line = the_error(copy.ends([2, 2]))
    assert "none of the 3 checkpoints" in line
    assert "the trajectory is whole for 0 epochs only" in line
    assert "score.trajectory=false" in line
    if hurt is flip_bit:
        assert str(block(copy, 0)) in line
    assert snapshot(copy.path, "status.json") == before
    done = copy.done
    copy.ends([0, 0], "score.trajectory=false")
    add_row("trajectory damaged from the first epoch on; score.trajectory=false", done, copy.starts[-1])
    shutil.rmtree(copy.path / "trajectory", ignore_errors=True)
    expected = {name: value for name, value in nobody_touched(2).state.items() if not name.startswith("trajectory/")}
    assert jobs.differences(jobs.state_of(copy.path), expected) == []


@slow
def test_clocks_play_no_part(copy, nobody_touched):
    files = [*copy.path.rglob("*"), copy.path]
    year = 365 * 86400
    for number, path in enumerate(sorted(files)):
        when = time.time() + (year if number % 2 else -year)
        os.utime(path, (when, when))
    assert "resumes at epoch 4, step 15" in copy.goes_on(nobody_touched(2), fault="all file times moved by a year")


# ---- two jobs


@slow
def test_a_second_job_is_refused(run, nobody_touched, tmp_path):
    flag = tmp_path / "asleep"
    first = run.start(2, inject=at_step(8, jobs.nap(flag, 12)))
    wait_for(flag)
    line = the_error(run.ends([2, 2]))
    assert f"is in use by pid {first.processes[0].pid} on {socket.gethostname()} since 2" in line
    assert "wait for it" in line
    line = the_error(run.ends([2, 2], "--fresh", "--force"))
    assert "is in use by pid" in line
    run.ended([0, 0], first)
    assert_nothing_shows(run.path, nobody_touched(2))


# ---- other settings, other data


def test_other_settings_are_refused_by_name(copy):
    before = snapshot(copy.path)
    line = the_error(copy.ends([2], "train.lr=0.07", "run.seed=3", "score.windows=[{T: 4, K: 4}]",
                               "model.name=shufflenet_v2_x1_0", "train.global_batch_size=12"))
    for part in ("train.lr was 0.05, now 0.07", "run.seed was 0, now 3", "'K': 3", "'K': 4", "score.windows was",
                 "model.name was 'shufflenet_v2_x0_5', now 'shufflenet_v2_x1_0'", "train.global_batch_size was 24, now 12",
                 "only run.name, run.dir, run.device, run.timeout_seconds", "checkpoint.*", "data.num_workers",
                 "train.accumulation, train.log_every", "--fresh --force"):
        assert part in line, (part, line)
    assert snapshot(copy.path) == before


@slow
def test_what_may_change(copy, nobody_touched):
    copy.goes_on(nobody_touched(2), "data.num_workers=1", "train.log_every=2", "checkpoint.keep=3", "run.timeout_seconds=300",
                 "run.name=other", "checkpoint.every_epochs=2", "score.windows=[{T: 4, K: 3, pruning_rates: [0.3]}]")


@slow
def test_smaller_forward_passes_go_on(copy):
    assert "resumes at epoch 4, step 15" in copy.ends([0, 0], "train.accumulation=2")
    assert list(copy.starts[-1].steps()) == list(range(16, STEPS + 1))
    jobs.state_of(copy.path)


@slow
def test_other_images_are_refused(copy, betons, tmp_path, nobody_touched):
    from tdds_dist.beton_writer import write_beton
    from tdds_dist.sources import open_source, with_corruption, with_label_noise

    data = tmp_path / "data.beton"
    source = open_source("digits", "train", 120)
    for other in (with_corruption(source, 0.5, 0), with_label_noise(source, 0.2, 0)):
        write_beton(other, data, num_workers=1, progress=False, overwrite=True)
        line = the_error(copy.ends([2], f"data.train={data}"))
        assert f"was started with other images than data.train={data}" in line
    write_beton(source, data, num_workers=1, progress=False, overwrite=True)
    copy.goes_on(nobody_touched(2), f"data.train={data}")  # the same ones elsewhere


@slow
def test_starting_over(copy, nobody_touched):
    before = snapshot(copy.path)
    assert "already holds an unfinished run of 3 epochs" in the_error(copy.ends([2, 2], "--fresh"))
    assert "give both, or neither" in the_error(copy.ends([2, 2], "--force"))
    assert snapshot(copy.path) == before
    copy.goes_on(nobody_touched(2), "--fresh", "--force")
    assert list(copy.starts[-1].steps()) == list(range(1, STEPS + 1))
    before = snapshot(copy.path)
    assert "is finished already" in copy.ends([0, 0])
    assert "already holds a finished run" in the_error(copy.ends([2, 2], "--fresh"))
    assert snapshot(copy.path) == before


# ---- NaN


@slow
def test_nan_stops_a_run(run, nobody_touched):
    bad = nobody_touched(2).visits[8][:3]
    line = the_error(run.ends([2, 2], inject=jobs.nan_logits(8, bad)))
    assert "epoch 2, step 2: NaN or infinite logits for 3 samples" in line
    assert all(str(index) in line for index in bad)
    run.goes_on(nobody_touched(2), fault="NaN logits, on_nan=stop")


@slow
def test_nan_in_quarantine(run, nobody_touched):
    bad = nobody_touched(2).visits[8][5]
    settings = ["score.on_nan=quarantine"]
    fault = jobs.nan_logits(8, [bad])
    run.ends([75, 75], *settings, inject=jobs.all_of(fault, at_step(12, TERM, [0])))
    text = run.ends([0, 0], *settings)
    assert f"1 samples are in quarantine (NaN or infinite logits), scored lowest: global indices [{bad}]" in text
    from tdds_dist.artifacts import load_scores

    assert RunDir(run.path).read_result()["quarantined"] == [bad]
    for path in (run.path / "scores").iterdir():
        scores = load_scores(path)
        assert scores.settings["quarantined"] == [bad]
        assert scores.score_N[bad] == scores.score_N.min()
    state = jobs.state_of(run.path)
    assert is_finite(state)
    straight = Run(run.config, run.folder / "straight")
    straight.ends([0, 0], *settings, inject=fault)
    assert jobs.differences(state, jobs.state_of(straight.path)) == []


# ---- ranks that hang, ranks that fail


@slow
@pytest.mark.parametrize(("ranks", "hanging"), [(2, 1), (3, 0)])
def test_a_rank_that_hangs_is_named(run, nobody_touched, tmp_path, ranks, hanging):
    flag = tmp_path / "asleep"
    job = run.start(ranks, "run.timeout_seconds=6", inject=at_step(8, jobs.nap(flag, 120), [hanging]))
    wait_for(flag)
    asleep = time.monotonic()
    others = [rank for rank in range(ranks) if rank != hanging]
    for rank in others:
        job.processes[rank].join(30)
        assert job.processes[rank].exitcode == 1, job.text
    assert time.monotonic() - asleep < 20
    job.kill(hanging)
    run.ended([-9 if rank == hanging else 1 for rank in range(ranks)], job)
    for rank in others:
        said = job.outputs[rank].read_text()
        who = rf"(: rank {hanging}|at least one of the ranks [\d, ]*\b{hanging}\b[\d, ]*)"
        assert re.search(rf"{who} did not answer within 6 s \(run\.timeout_seconds\)", said)
        assert "Traceback" not in said
    run.goes_on(nobody_touched(ranks), "run.timeout_seconds=60", fault=f"rank {hanging} of {ranks} hangs, is killed")


@slow
def test_a_defect_on_one_rank_before_the_first_collective(run, nobody_touched):
    defect = at_call("tdds_dist.collect:open_files", 1, jobs.fail(RuntimeError("a defect")), [1])
    run.ends([1, 1], inject=defect, deadline=60)
    assert "RuntimeError: a defect" in run.starts[0].outputs[1].read_text()
    assert "rank 1 ended" in run.starts[0].outputs[0].read_text()
    run.goes_on(nobody_touched(2))


@slow
def test_a_defect_on_one_rank_in_training(run, nobody_touched):
    run.ends([1, 1], inject=at_step(9, jobs.fail(RuntimeError("a defect")), [0]), deadline=60)
    assert "RuntimeError: a defect" in run.starts[0].outputs[0].read_text()
    assert "rank 0 ended" in run.starts[0].outputs[1].read_text()
    run.goes_on(nobody_touched(2), fault="defect on one rank")


@slow
def test_a_port_in_use(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        job = run.start(2, "run.timeout_seconds=6", port=taken.getsockname()[1])
        job.processes[0].join(30)
        job.kill(1)  # it waits for an answer of the other program; launchers end it
        run.ended([2, -9], job)
        assert "is in use by another program; set another MASTER_PORT" in the_error(job.text)


# ---- retrain


@pytest.fixture(scope="session")
def coreset(nobody_touched):
    path = nobody_touched(2).path / "coresets" / "half.npz"
    assert main(["select", str(nobody_touched(2).path), "--pruning-rate", "0.5", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def retrained(config, coreset, tmp_path_factory):
    """References of retrainings by strategy."""
    found = {}

    def of(strategy):
        if strategy not in found:
            run = Run(config, tmp_path_factory.mktemp(f"retrained{strategy}"))
            run.ends([0, 0], *of_coreset(coreset, strategy), stage="retrain")
            path = run.path / "retrain" / "again"
            found[strategy] = Reference(2, path, jobs.state_of(path), run.starts[0].visits())
        return found[strategy]

    return of


def of_coreset(coreset, strategy):
    return ["--coreset", coreset, "--strategy", strategy, "--name", "again"]


@slow
@pytest.mark.parametrize(("strategy", "inject", "codes", "name"), [
    ("E", at_step(5, TERM, [1]), (75, 75), "SIGTERM"), ("P", at_step(17, KILL, [0]), (-9, 1), "SIGKILL of rank 0")])
def test_retraining(run, coreset, retrained, strategy, inject, codes, name):
    reference = retrained(strategy)
    assert len(reference.visits) == {"E": 12, "P": 24}[strategy]
    text = run.ends(codes, *of_coreset(coreset, strategy), stage="retrain", inject=inject)
    assert "tdds retrain: " in text
    path = run.path / "retrain" / "again"
    text = run.goes_on(reference, *of_coreset(coreset, strategy), stage="retrain", path=path,
                       fault=f"{name}, retraining by strategy {strategy}")
    assert "resumes at epoch" in text


@slow
def test_retraining_on_another_coreset(run, coreset, tmp_path):
    run.ends([75], *of_coreset(coreset, "E"), stage="retrain", inject=at_step(5, TERM))
    other = tmp_path / "other.npz"
    source = coreset.parent.parent
    assert main(["select", str(source), "--pruning-rate", "0.5", "--score", "entropy", "--out", str(other)]) == 0
    line = the_error(run.ends([2], *of_coreset(other, "E"), stage="retrain"), "retrain")
    assert "coreset_sha256 was" in line
    assert "strategy was 'E', now 'P'" in the_error(run.ends([2], *of_coreset(coreset, "P"), stage="retrain"), "retrain")
    line = the_error(run.ends([2], "--coreset", coreset, "--strategy", "E", "--name", "../x", stage="retrain"), "retrain")
    assert "--name='../x' must be letters, digits" in line


# ---- everything at once


@slow
def test_recording_leaves_the_weights_alone(run, nobody_touched):
    run.ends([2, 2], inject=jobs.no_recording)  # nothing was recorded, so there is nothing to score
    for name in ("final", "best"):
        found, expected = (torch.load(path / "models" / f"{name}.pt", weights_only=True)
                           for path in (run.path, nobody_touched(2).path))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


@slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ten_interruptions(run, nobody_touched, ranks):
    chance = random.Random(ranks)
    at = 0  # the step that the next start goes on from
    for _ in range(10):
        step = min(at + chance.randint(1, 4), STEPS - 2)
        kind, rank = chance.choice(("leave", "kill one", "kill all")), chance.randrange(ranks)
        if kind == "leave":
            run.ends([75] * ranks, inject=at_step(step, TERM, [rank]))
        elif kind == "kill one":
            run.ends([-9 if other == rank else 1 for other in range(ranks)], inject=at_step(step, KILL, [rank]))
        else:
            run.ends([-9] * ranks, inject=at_step(step, KILL))
        published = [int(name[5:]) for name in run.checkpoints if name.startswith("step_")]
        at = max(published, default=0)
    run.goes_on(nobody_touched(ranks), fault=f"ten interruptions at random steps ({ranks} ranks)")


# ---- exit codes


@slow
def test_exit_codes_are_those_of_the_protocol_in_100_of_100_runs(tmp_path):
    programs = [(jobs.returns, 0), (jobs.refuses, 2), (jobs.leaves, 75), (jobs.fails, 1), (jobs.is_interrupted, 130)]
    wrong = []
    for number in range(100):
        function, code = programs[number % len(programs)]
        codes, text = jobs.run([], 2, tmp_path / function.__name__, jobs.program(function), deadline=60)
        if codes != [code, code] or ("Traceback" in text) != (function is jobs.fails):
            wrong.append((number, function.__name__, codes, text))
    assert wrong == []
    assert "found on one rank (found on rank 1)" in (tmp_path / "refuses" / "rank0.txt").read_text()
