"""What a run survives, as commands on real ranks with real signals: hurt it, start it again, and
nothing may show.

Training is deterministic, with random augmentation. Faults come in chains: each start goes on after
the fault before it, from the step that is written beside that fault, and is hurt in its turn.
"Nothing may show" at the end of a chain: weights, best weights, scores and the trajectory are
bitwise those of a run that nobody touched (`nobody_touched`), every epoch stands once in
metrics.jsonl, and no file of a checkpoint, lock or half-written file stays. With
TDDS_FAULT_TABLE=<file> a table of all faults is written there.
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

import numpy as np
import pytest

from tdds_dist.cli.main import main
from tdds_dist.runs.directory import RunDir
from tests import jobs
from tests.jobs import at_call, at_step, in_turn, pause, signal_self

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # chains of a dozen starts
slow = pytest.mark.slow

EPOCHS, STEPS_PER_EPOCH = 4, 5
STEPS = EPOCHS * STEPS_PER_EPOCH
SCORE = "tdds_official_T4_K3_beta0.9"
KILL, TERM = signal_self(signal.SIGKILL), signal_self(signal.SIGTERM)
KILLED = [(-9, 1), (-9, 1)]  # of two ranks one is killed, or both
SYNC = "checkpoint.asynchronous=false"
WRITE, SAVE, PUBLISH = (
    "torch.distributed.checkpoint:FileSystemWriter.write_data",
    "tdds_dist.training.engine:Trainer.save_model",
    "tdds_dist.runs.checkpoint:Checkpoints._publish",
)
PASS = "tdds_dist.training.final_pass:log_probabilities"

_rows: list[tuple[str, str, str]] = []  # fault, what is lost, seconds


@pytest.fixture(scope="session", autouse=True)
def table():
    yield
    if path := os.environ.get("TDDS_FAULT_TABLE"):
        lines = ["| fault | lost | seconds to the next step |", "|---|---|---|"]
        longest = {}
        for fault, lost, seconds in _rows:
            longest[fault, lost] = max(
                longest.get((fault, lost), ""), seconds, key=lambda text: (len(text), text)
            )
        lines += [f"| {fault} | {lost} | {seconds} |" for (fault, lost), seconds in longest.items()]
        Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def config(betons, tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "config.yaml"
    path.write_text(f"""
run: {{name: tiny, device: cpu}}
data: {{train: {betons["train"]}, val: {betons["val"]}, num_classes: 10, image_size: 32, crop: pad, padding: 2, flip: true,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: tiny_network}}
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
    done: int = 0  # the last step that was trained
    resumes: int | None = None  # the step that the next start must go on after, where that is known
    faults: list[str] = field(default_factory=list)  # since a step was trained

    @property
    def path(self):
        return self.folder / "run"

    @property
    def checkpoints(self):
        return sorted(
            path.name for path in (self.path / "checkpoints").glob("step_*") if path.suffix == ""
        )

    def start(self, ranks, *settings, inject=None, stage="collect", port=None):
        words = [stage, self.config, f"run.dir={self.path}", *settings]
        job = jobs.Job(
            words,
            ranks,
            self.folder / f"start{len(self.starts)}",
            jobs.all_of(jobs.quick, inject),
            port,
        )
        self.starts.append(job)
        return job

    def ends(self, codes, *settings, inject=None, stage="collect", deadline=90.0, **then):
        """Start a rank per exit code and wait for them; what they said."""
        return self.ended(
            codes, self.start(len(codes), *settings, inject=inject, stage=stage), deadline, **then
        )

    def ended(self, codes, job, deadline=90.0, fault=None, resumes=None):
        """Wait for a start. `fault`: what happened to it, for the table; `resumes`: the step after
        which the next goes on."""
        found = job.wait(deadline)
        assert all(
            code in (wanted if isinstance(wanted, tuple) else (wanted,))
            for code, wanted in zip(found, codes, strict=True)
        ), (found, codes, job.text)
        steps = job.steps()
        if self.resumes == STEPS:
            assert "resumes after the last epoch" in job.text
        elif self.resumes is not None and steps:
            assert min(steps) == self.resumes + 1, (self.resumes, job.text)
            where = f"resumes at epoch {self.resumes // STEPS_PER_EPOCH + 1}, step {self.resumes}"
            assert where in job.text if self.resumes else "resumes at epoch" not in job.text
        if steps or not any(found):
            for name in self.faults:
                add_row(name, self.done, job)
            self.faults = []
        self.done = max(steps, default=self.done)
        self.faults += [fault] if fault else []
        self.resumes = resumes
        return job.text

    def goes_on(self, reference, *settings, path=None, stage="collect", inject=None):
        """The same command again ends, and nothing shows."""
        text = self.ends([0] * reference.ranks, *settings, stage=stage, inject=inject)
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
    assert [record["epoch"] for record in records] == list(
        range(len(RunDir(reference.path).read_metrics()))
    )
    assert [record["step"] for record in records] == [
        record["step"] for record in RunDir(reference.path).read_metrics()
    ]
    assert not [name for name in ("checkpoints", "run.lock") if (path / name).exists()]
    assert [file.name for file in path.rglob(".*")] == []


def the_error(text, stage="collect"):
    """The one line that bad input gives, whatever the number of ranks."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith(f"tdds {stage}: error: ")]
    assert len(lines) == 1, text
    return lines[0]


def snapshot(path, *but):
    """All that lies in a directory, but the log, the lock, and files called `but`."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in ("log.txt", "run.lock", *but)
    }


def is_finite(state):
    """Weights and scores; the scalars of the first epoch have no difference to the one before."""
    return all(
        np.isfinite(value).all()
        for name, value in state.items()
        if not name.startswith("trajectory/")
    )


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
            found[ranks] = Reference(
                ranks, run.path, jobs.state_of(run.path), run.starts[0].visits()
            )
            assert len(found[ranks].visits) == STEPS
            assert np.unique(found[ranks].state[f"{SCORE}/score"]).size > 100
        return found[ranks]

    return of


def wait_for(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


@pytest.fixture(scope="session")
def stopped(config, tmp_path_factory):
    """A run on 2 ranks that was killed before step 18, with checkpoints at steps 5, 10 and 15."""
    run = Run(config, tmp_path_factory.mktemp("stopped"))
    run.ends([-9, -9], "checkpoint.keep=4", SYNC, inject=at_step(18, KILL))
    assert run.checkpoints == [f"step_{step:010d}" for step in (5, 10, 15)]
    return run


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of that run to hurt."""
    run = Run(stopped.config, tmp_path, done=stopped.done)
    shutil.copytree(stopped.path, run.path)
    return run


# ---- killed


def assert_named(job, lost, where, what):
    """The other ranks say who did not come along, and where that was."""
    for rank in set(range(job.world_size)) - {lost}:
        said = job.outputs[rank].read_text()
        assert where.format(rank=rank) in said
        assert re.search(
            rf"(: rank {lost}|at least one of the ranks [\d, ]*\b{lost}\b[\d, ]*) {what}", said
        )
        assert "Traceback" not in said


def test_the_same_command_goes_on_after_a_kill_a_damaged_checkpoint_and_a_signal(
    run, nobody_touched
):
    run.ends([1, -9], SYNC, "checkpoint.keep=4", inject=at_step(13, KILL, [1]), resumes=5)
    assert_named(run.starts[0], 1, "rank {rank}, epoch 3, step", "ended")
    assert "run the same command again" in run.starts[0].text
    flip_bit(run.path / "checkpoints" / "step_0000000010" / "__1_0.distcp")
    before = snapshot(run.path)
    line = the_error(
        run.ends(
            [2],
            "train.lr=0.07",
            "run.seed=3",
            "score.windows=[{T: 4, K: 4}]",
            "model.name=shufflenet_v2_x0_5",
            "train.global_batch_size=12",
            resumes=5,
        )
    )
    for part in (
        "train.lr was 0.05, now 0.07",
        "run.seed was 0, now 3",
        "'K': 3",
        "'K': 4",
        "score.windows was",
        "model.name was 'tiny_network', now 'shufflenet_v2_x0_5'",
        "train.global_batch_size was 24, now 12",
        "only run.name, run.dir, run.device, run.timeout_seconds",
        "checkpoint.*",
        "data.num_workers",
        "train.accumulation, train.log_every",
        "--fresh --force",
    ):
        assert part in line, (part, line)
    assert snapshot(run.path) == before
    text = run.ends([75, 75], inject=at_step(8, TERM, [1]))
    assert "warning: checkpoint step_0000000010: __1_0.distcp is damaged" in text
    assert "the one before it is used" in text
    assert_saved(text, "SIGTERM", run.done, (8, 9))
    saved = run.done
    run.goes_on(nobody_touched(2))
    # no step twice, none left out
    assert list(run.starts[-1].steps(1)) == list(range(saved + 1, STEPS + 1))


# What dies in the middle of it: target, which call of that start, of which ranks, when; the step
# that is gone on after.
KILLS = {
    "checkpoints and results": [
        (
            "between config.yaml and env.json",
            at_call("tdds_dist.runs.directory:RunDir._write_json", 1, KILL, [0]),
            0,
        ),
        ("before the first checkpoint", at_step(4, KILL), 0),
        ("while a checkpoint's tensors are written", at_call(WRITE, 2, KILL), 5),
        ("while one rank's tensors are written", at_call(WRITE, 1, KILL, [1], after=True), 5),
        ("before a checkpoint is published", at_call(PUBLISH, 1, KILL, [0]), 5),
        ("after a checkpoint is published", at_call(PUBLISH, 1, KILL, [0], after=True), 10),
        (
            "while an old checkpoint is removed",
            at_call("tdds_dist.runs.checkpoint:_retire", 1, KILL, [0], after=True),
            15,
        ),
        ("after final.pt is written", at_call(SAVE, 1, KILL, after=True), 15),
        (
            "between training and scores",
            at_call("tdds_dist.training.engine:Trainer._result", 1, KILL),
            STEPS,
        ),
        (
            "after the first score file",
            at_call("tdds_dist.training.collect:put_scores", 1, KILL, [0], after=True),
            STEPS,
        ),
        ("during the final pass", at_call(PASS, 3, KILL), STEPS),
        (
            "before result.json",
            at_call("tdds_dist.runs.directory:RunDir.write_result", 1, KILL, [0]),
            STEPS,
        ),
        (
            "after result.json",
            at_call("tdds_dist.runs.checkpoint:Checkpoints.remove_all", 1, KILL, [0]),
            None,
        ),
    ],
    "the files of an epoch, resumes": [
        ("of rank 0 within an epoch (2 ranks)", at_step(9, KILL, [0]), 5),
        ("of all ranks within an epoch (2 ranks)", at_step(9, KILL), 5),
        ("while a trajectory block is written", jobs.torn("numpy:save", 1, [1]), 5),
        ("after one rank's trajectory block", at_call("numpy:save", 1, KILL, [0], after=True), 5),
        (
            "while best.pt is written",
            at_call(SAVE, 1, partial(jobs.torn("torch:save", 1), 0), [0]),
            5,
        ),
        ("after best.pt is written", at_call(SAVE, 1, KILL, after=True), 5),
        (
            "between trajectory and metrics",
            at_call("tdds_dist.runs.directory:RunDir.append_metrics", 1, KILL, [0]),
            5,
        ),
        (
            "between metrics and checkpoint",
            at_call("tdds_dist.training.engine:Trainer._end_of_epoch", 1, KILL),
            5,
        ),
        ("while a run resumes", at_call("tdds_dist.runs.directory:RunDir.rewind", 1, KILL, [0]), 5),
        (
            "while a run resumes",
            at_call("tdds_dist.runs.checkpoint:Checkpoints.load", 1, KILL, [0], after=True),
            5,
        ),
        (
            "while a run resumes",
            at_call("tdds_dist.scoring.trajectory:TrajectoryWriter.resume", 1, KILL, [0]),
            5,
        ),
        ("while a run resumes", at_call("shutil:rmtree", 1, KILL, [0], after=True), 5),
    ],
}


@slow
@pytest.mark.parametrize("chain", KILLS)
def test_kill_at_the_worst_moments(run, nobody_touched, chain):
    for name, inject, step in KILLS[chain]:
        run.ends(KILLED, SYNC, inject=inject, fault=f"SIGKILL {name}", resumes=step)
    if step == 5:
        name = "SIGKILL while a checkpoint is written in the background"
        run.ends(KILLED, inject=at_call(WRITE, 1, KILL), fault=name, resumes=5)
        assert "took over the lock of a job that died" in run.starts[1].text
    text = run.goes_on(nobody_touched(2))
    assert ("is finished already" in text) == (step is None)


# ---- asked to leave

SIGNALS = {
    "start-up, evaluation, last step": [
        ("during start-up", at_call("tdds_dist.training.build:open_files", 1, TERM, [0])),
        ("during start-up", at_call("tdds_dist.runs.directory:RunDir.write_start", 1, TERM, [0])),
        ("during start-up", at_call("tdds_dist.training.state:settle_buckets", 1, TERM, [0])),
        ("to all ranks", at_step(3, TERM)),
        (
            "during evaluation, or while something is written",
            at_call("tdds_dist.training.engine:Trainer.evaluate", 1, TERM, [1]),
        ),
        ("SIGUSR2 to one rank", at_step(8, signal_self(signal.SIGUSR2), [0])),
        ("during evaluation, or while something is written", at_call("numpy:save", 1, TERM, [1])),
        ("SIGINT to all ranks", at_step(14, signal_self(signal.SIGINT))),
        ("in the last step", at_step(STEPS, TERM, [1])),
        ("during the final pass", at_call(PASS, 3, TERM)),
    ],
    "a checkpoint in the background": [
        ("while a thread writes", at_call(WRITE, 1, in_turn(TERM, pause(1.0)), [0]))
    ],
    "checkpoint, end of an epoch, best.pt": [
        ("during evaluation, or while something is written", at_call(WRITE, 1, TERM, [0]), SYNC),
        ("to one rank", at_step(10, TERM, [1])),
        ("during evaluation, or while something is written", at_call(SAVE, 1, TERM, [0])),
        ("during the final pass", at_call(PASS, 3, TERM, [0])),
    ],
}


def assert_saved(text, signal_name, saved, allowed):
    assert saved in allowed
    epoch = min(saved // STEPS_PER_EPOCH + 1, EPOCHS)
    line = (
        f"tdds collect: {signal_name}: saved at epoch {epoch}, step {saved}; run the same command"
        " again to go on"
    )
    assert text.count(line) == 1, text
    assert "error" not in text


@slow
@pytest.mark.parametrize("chain", SIGNALS)
def test_a_signal_saves_and_the_same_command_goes_on(run, nobody_touched, chain):
    for name, inject, *settings in SIGNALS[chain]:
        who = name.split()[0] if name.startswith("SIG") else "SIGTERM"
        fault = name if name.startswith("SIG") else f"SIGTERM {name}"
        if "start-up" in name:
            text = run.ends([75, 1], inject=inject, fault=fault, resumes=0)
            assert "SIGTERM: not saved here; run the same command again" in text
        elif "final pass" in name:
            run.ends([(0, 75), (0, 75, 1)], inject=inject, fault=fault)
        else:
            text = run.ends([75, 75], *settings, inject=inject, fault=fault)
            assert_saved(text, who, run.done, range(1, STEPS + 1))
            run.resumes = run.done
    run.goes_on(nobody_touched(2))
    for rank in (0, 1):  # no step twice, none left out
        assert [step for job in run.starts for step in job.steps(rank)] == list(range(1, STEPS + 1))


@slow
def test_random_numbers_of_training_go_on(run, tmp_path):
    """Mixing draws from each rank's own generator, within an epoch."""
    settings = ["train.mixup=0.4", "score.view=clean"]
    straight = Run(run.config, tmp_path / "straight")
    straight.ends([0, 0], *settings)
    run.ends([75, 75], *settings, inject=at_step(8, TERM, [0]))
    run.goes_on(
        Reference(2, straight.path, jobs.state_of(straight.path), straight.starts[0].visits()),
        *settings,
    )


@slow
def test_ctrl_c_twice_does_not_wait(run, tmp_path):
    flag = tmp_path / "asleep"
    job = run.start(2, SYNC, inject=at_step(8, jobs.nap(flag, 60)))
    wait_for(flag)
    for _ in range(2):
        job.kill(0, signal.SIGINT), job.kill(1, signal.SIGINT)
        time.sleep(0.2)  # what a launcher passes on does not count as the second
    assert all(process.is_alive() for process in job.processes)
    time.sleep(1.0)
    job.kill(0, signal.SIGINT), job.kill(1, signal.SIGINT)
    asked = time.monotonic()
    assert (
        run.ended([130, 130], job, fault="SIGINT twice while a step hangs", resumes=5).count(
            "tdds collect: interrupted"
        )
        == 2
    )
    assert time.monotonic() - asked < 5
    run.ends([75, 75], inject=at_step(6, TERM))


# ---- other numbers of ranks, launchers


@slow
def test_ranks_come_and_go(run, nobody_touched):
    """2 -> 1 -> 3 ranks: the samples of every step stay, and so does their order."""
    run.ends([75, 75], inject=at_step(6, TERM, [0]))
    assert "on 1 instead of 2 ranks" in run.ends([75], inject=at_step(12, TERM))
    before = snapshot(run.path, "status.json")
    line = the_error(run.ends([2] * 5))
    assert "train.global_batch_size=24 is not divisible by world_size=5; use 20 or 25" in line
    assert snapshot(run.path, "status.json") == before
    run.faults = ["SIGTERM, 2 -> 1 -> 3 ranks"]
    assert "on 3 instead of 1 ranks" in run.ends([0, 0, 0])
    visits = [(step, seen) for job in run.starts for step, seen in job.visits().items()]
    assert visits == list(nobody_touched(2).visits.items())
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        assert sorted(index for step in steps for index in visits[step][1]) == list(range(120))
    state = jobs.state_of(run.path)
    assert is_finite(state)
    assert state.keys() == nobody_touched(2).state.keys()


LAUNCHED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests import jobs
rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
folder = Path({folder!r}) / f"attempt{{attempt}}"
folder.mkdir(exist_ok=True)
kill = jobs.at_step(9, jobs.signal_self(), [1]) if attempt == "0" else None
jobs.begin(sys.argv[1:], rank, folder, jobs.all_of(jobs.quick, kill))
"""


@slow
def test_torchrun_starts_lost_ranks_again(run, nobody_touched, tmp_path):
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "2",
            program,
            "collect",
            run.config,
            f"run.dir={run.path}",
            "checkpoint.asynchronous=false",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    assert "resumes at epoch 2, step 5" in done.stderr
    assert_nothing_shows(run.path, nobody_touched(2))
    logs = [
        (tmp_path / f"attempt{attempt}" / "steps0.txt").read_text().splitlines()
        for attempt in (0, 1)
    ]
    when = [[float(line.split()[1]) for line in log] for log in logs]
    assert [len(log) for log in logs] in ([8, STEPS - 5], [9, STEPS - 5])
    lost = f"{len(logs[0]) - 5} steps, trained again"
    _rows.append(
        (
            "SIGKILL of one rank under torchrun --max-restarts (torch is loaded anew)",
            lost,
            f"{when[1][0] - when[0][-1]:.1f}",
        )
    )


# ---- disks


def no_room(call):
    """From this checkpoint on rank 0 cannot write files as large as its part of one (44 kB); models
    (5 kB) still fit."""
    return at_call(
        "torch.distributed.checkpoint:FileSystemWriter.write_data",
        call,
        jobs.limit_file_size(30_000),
        [0],
    )


@slow
def test_no_room(run, nobody_touched):
    stop = "checkpoint.on_error=stop"
    for call, settings, step, name in (
        (2, [stop], 10, "asynchronous=true"),
        (1, [stop, SYNC], 10, "asynchronous=false"),
    ):
        fault = f"no room for a checkpoint, on_error=stop ({name})"
        line = the_error(run.ends([2, 2], *settings, inject=no_room(call), fault=fault, resumes=5))
        assert f"checkpoint at step {step} failed (" in line
        assert "make room" in line
    text = run.ends(
        [75, 75],
        inject=jobs.all_of(no_room(1), at_step(8, TERM)),
        fault="SIGTERM without room for a checkpoint",
        resumes=5,
    )
    assert "SIGTERM: NOT saved (see the warning) at epoch 2" in text
    for rank in (0, 1):
        full = at_call("numpy:save", 1, jobs.fail(OSError(28, "No space left on device")), [rank])
        line = the_error(
            run.ends(
                [2, 2], inject=full, fault=f"disk full at the trajectory of rank {rank}", resumes=5
            )
        )
        assert "No space left on device" in line
        assert "free space" in line
    text = run.goes_on(nobody_touched(2), inject=no_room(1))  # checkpoint.on_error=continue
    assert text.count("warning: checkpoint at step") == EPOCHS - 1
    assert "warning: checkpoint at step 10 failed (" in text
    assert "File too large" in text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB of one's own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@slow
def test_a_full_disk(config, small_disk, nobody_touched):
    run = Run(config, small_disk)
    for call, target, resumes in (
        (2, "tdds_dist.scoring.trajectory:TrajectoryWriter.append", 5),
        (2, "tdds_dist.runs.directory:RunDir.append_metrics", 10),
        (2, SAVE, 15),
        (1, "tdds_dist.runs.checkpoint:Checkpoints._write", 15),
    ):
        settings = ["checkpoint.on_error=stop"] if "checkpoint" in target else [SYNC]
        full = at_call(target, call, jobs.fill_disk(small_disk), [0])
        fault = f"disk full ({target.partition(':')[2]})"
        line = the_error(run.ends([2, 2], *settings, inject=full, fault=fault, resumes=resumes))
        assert "No space left on device" in line
        (small_disk / "filler").unlink()
    run.goes_on(nobody_touched(2))


@slow
def test_a_directory_that_cannot_be_written(run):
    run.path.write_text("a file")
    assert "cannot" in the_error(run.ends([2, 2]))
    run.path.unlink()
    if os.getuid() == 0:  # root may write anywhere
        run.path.mkdir(mode=0o555)
        nobody = at_call("tdds_dist.runs.lock:RunLock.acquire", 1, partial(os.seteuid, 65534), [0])
        assert "Permission denied" in the_error(run.ends([2, 2], inject=nobody))
        assert list(run.path.iterdir()) == []
    assert run.done == 0


# ---- damaged files


def cut(path):
    replace(path, path.read_bytes()[:-100])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    replace(path, data)


def replace(path, data):
    path.unlink()  # a linked file has another name elsewhere
    path.write_bytes(data)


def block(run, epoch):
    return sorted((run.path / "trajectory" / f"epoch_{epoch:04d}").glob("*.npy"))[0]


def from_the_epoch_before(path):
    other = path.parent.with_name(f"epoch_{int(path.parent.name[-4:]) - 1:04d}") / path.name
    shutil.copy(other, path)


def whole_epoch_before(path):
    for suffix in (".npy", ".json"):
        from_the_epoch_before(path.with_suffix(suffix))


@slow
def test_what_is_damaged_is_passed_over(copy, betons, nobody_touched, tmp_path):
    """Each start sees two damaged checkpoints, or a damaged epoch, and writes them anew. All kinds of
    damage: tests/runs/test_checkpoint.py, tests/scoring/test_trajectory.py."""

    def ends(resumes, *faults):
        for path in (copy.path / "checkpoints").glob("step_*"):  # what is left of before
            if path.name not in ("step_0000000005", "step_0000000010", "step_0000000015"):
                shutil.rmtree(path)
        copy.faults, copy.resumes = [*faults], resumes
        return copy.ends([75, 75], "checkpoint.keep=4", inject=at_step(16, TERM))

    older, newest = (copy.path / "checkpoints" / name for name in copy.checkpoints[1:])
    for damages in (
        [("__0_0.distcp", cut, "__0_0.distcp has"), ("checkpoint.json", flip_bit, "")],
        [
            ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
            (".metadata", flip_bit, ".metadata is damaged"),
        ],
        [
            ("checkpoint.json", Path.unlink, "checkpoint.json is missing"),
            ("best.pt", flip_bit, "best.pt is damaged"),
        ],
    ):
        for path, (name, hurt, _) in zip((newest, older), damages, strict=True):
            hurt(path / name)
        text = ends(5, *(f"newest checkpoint: {name} {hurt.__name__}" for name, hurt, _ in damages))
        for path, (_, _, said) in zip((newest, older), damages, strict=True):
            assert f"warning: checkpoint {path.name}: {said}" in text
        assert text.count("the one before it is used") == 2
        assert len(copy.checkpoints) == 4
    for hurt in (flip_bit, whole_epoch_before):
        hurt(block(copy, 2))
        text = ends(10, f"trajectory block damaged ({hurt.__name__})")
        assert "the trajectory is whole for 2 epochs only, not for its 3" in text
    # best.pt is of the epoch before, and the last one is no better
    shutil.rmtree(copy.path / "models")
    with (copy.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')  # cut off
    copy.faults, copy.resumes = ["models/ gone, metrics.jsonl cut off"], copy.done
    copy.ends([75, 75], inject=at_step(18, TERM))
    copy.faults, copy.resumes = ["all file times moved by a year"], copy.done
    year = 365 * 86400
    for number, path in enumerate(sorted([*copy.path.rglob("*"), copy.path])):
        when = time.time() + (year if number % 2 else -year)
        os.utime(path, (when, when))
    # the last start has all settings that may change
    data = shutil.copy(betons["train"], tmp_path / "elsewhere.beton")
    copy.goes_on(
        nobody_touched(2),
        f"data.train={data}",
        "data.num_workers=1",
        "train.log_every=2",
        "checkpoint.keep=3",
        "run.timeout_seconds=300",
        "run.name=other",
        "checkpoint.every_epochs=2",
        "score.windows=[{T: 4, K: 3, pruning_rates: [0.3]}]",
    )


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


@slow
def test_a_trajectory_damaged_from_the_start(copy, nobody_touched):
    for hurt in (flip_bit, lambda path: shutil.rmtree(copy.path / "trajectory")):
        first = block(copy, 0)
        hurt(first)
        before = snapshot(copy.path, "status.json")  # which says that this start failed
        line = the_error(copy.ends([2, 2]))
        assert "none of the 3 checkpoints" in line
        assert "the trajectory is whole for 0 epochs only" in line
        assert "score.trajectory=false" in line
        assert str(first) in line or hurt is not flip_bit
        assert snapshot(copy.path, "status.json") == before
    copy.faults = ["trajectory damaged from the first epoch on; score.trajectory=false"]
    copy.ends([0, 0], "score.trajectory=false")
    expected = {
        name: value
        for name, value in nobody_touched(2).state.items()
        if not name.startswith("trajectory/")
    }
    assert jobs.differences(jobs.state_of(copy.path), expected) == []


# ---- two jobs


@slow
def test_a_second_job_is_refused(run, nobody_touched, tmp_path):
    flag = tmp_path / "asleep"
    first = run.start(2, inject=at_step(8, jobs.nap(flag, 60)))
    wait_for(flag)
    line = the_error(run.ends([2, 2]))
    assert f"is in use by pid {first.processes[0].pid} on {socket.gethostname()} since 2" in line
    assert "wait for it" in line
    assert "is in use by pid" in the_error(run.ends([2, 2], "--fresh", "--force"))
    flag.unlink()
    run.ended([0, 0], first)
    assert_nothing_shows(run.path, nobody_touched(2))


# ---- other images, other forward passes, starting over


@slow
def test_starting_over(copy, nobody_touched, tmp_path):
    from tdds_dist.data.sources import open_source, with_corruption, with_label_noise
    from tdds_dist.data.writer import write_beton

    data = tmp_path / "data.beton"
    source = open_source("digits", "train", 120)
    for other in (with_corruption(source, 0.5, 0), with_label_noise(source, 0.2, 0)):
        write_beton(other, data, num_workers=1, progress=False, overwrite=True)
        line = the_error(copy.ends([2], f"data.train={data}"))
        assert f"was started with other images than data.train={data}" in line
    before = snapshot(copy.path)
    assert "already holds an unfinished run of 3 epochs" in the_error(copy.ends([2, 2], "--fresh"))
    assert "give both, or neither" in the_error(copy.ends([2, 2], "--force", resumes=15))
    assert snapshot(copy.path) == before
    # smaller forward passes go on
    copy.ends([75, 75], "train.accumulation=2", inject=at_step(17, TERM), resumes=0)
    left = snapshot(copy.path / "checkpoints")
    copy.ends([0, 0], "--fresh", "--force")
    [aside] = copy.path.glob("before-*")
    assert snapshot(aside / "checkpoints") == left, "what was there is moved aside"
    shutil.rmtree(aside)
    assert_nothing_shows(copy.path, nobody_touched(2))
    before = snapshot(copy.path)
    assert "is finished already" in copy.ends([0, 0])
    assert "already holds a finished run" in the_error(copy.ends([2, 2], "--fresh"))
    assert snapshot(copy.path) == before


# ---- ranks that fail, ranks that hang, NaN


@slow
def test_defects_nan_and_a_rank_that_hangs(run, nobody_touched, tmp_path):
    defect = jobs.fail(RuntimeError("a defect"))
    for inject, lost, fault, resumes in (
        # before the first collective
        (at_call("tdds_dist.training.build:open_files", 1, defect, [1]), 1, None, 0),
        (at_step(9, defect, [0]), 0, "defect on one rank", 5),
    ):
        run.ends([1, 1], SYNC, inject=inject, deadline=60, fault=fault, resumes=resumes)
        assert "RuntimeError: a defect" in run.starts[-1].outputs[lost].read_text()
        assert f"rank {lost} ended" in run.starts[-1].outputs[1 - lost].read_text()
    bad = nobody_touched(2).visits[8][:3]
    line = the_error(
        run.ends([2, 2], inject=jobs.nan_logits(8, bad), fault="NaN logits, on_nan=stop", resumes=5)
    )
    assert "epoch 2, step 2: NaN or infinite logits for 3 samples" in line
    assert all(str(index) in line for index in bad)
    hangs(run, 2, 1, tmp_path)
    run.goes_on(nobody_touched(2))


@slow
def test_three_ranks_of_which_one_hangs_one_is_killed_and_five_interruptions(
    run, nobody_touched, tmp_path
):
    hangs(run, 3, 0, tmp_path)
    run.ends(
        [1, 1, -9],
        SYNC,
        inject=at_step(9, KILL, [2]),
        fault="SIGKILL of rank 2 within an epoch (3 ranks)",
        resumes=5,
    )
    assert_named(run.starts[-1], 2, "rank {rank}, epoch 2, step", "ended")
    chance = random.Random(3)
    at = 5  # the step that the next start goes on from
    for _ in range(5):
        step = min(at + chance.randint(1, 4), STEPS - 2)
        kind, rank = chance.choice(("leave", "kill one", "kill all")), chance.randrange(3)
        if kind == "leave":
            run.ends([75] * 3, inject=at_step(step, TERM, [rank]))
        elif kind == "kill one":
            run.ends(
                [-9 if other == rank else 1 for other in range(3)],
                inject=at_step(step, KILL, [rank]),
            )
        else:
            run.ends([-9] * 3, inject=at_step(step, KILL))
        at = max((int(name[5:]) for name in run.checkpoints), default=0)
    run.faults = ["five interruptions at random steps (3 ranks)"]
    run.goes_on(nobody_touched(3))


def hangs(run, ranks, hanging, tmp_path):
    """One rank sleeps before step 8: the others name it at the time-out."""
    flag = tmp_path / "asleep"
    job = run.start(
        ranks, "run.timeout_seconds=6", SYNC, inject=at_step(8, jobs.nap(flag, 120), [hanging])
    )
    wait_for(flag)
    asleep = time.monotonic()
    for rank in set(range(ranks)) - {hanging}:
        job.processes[rank].join(30)
        assert job.processes[rank].exitcode == 1, job.text
    assert time.monotonic() - asleep < 20
    job.kill(hanging)
    fault = f"rank {hanging} of {ranks} hangs, is killed"
    run.ended([-9 if rank == hanging else 1 for rank in range(ranks)], job, fault=fault, resumes=5)
    assert_named(job, hanging, "", r"did not answer within 6 s \(run\.timeout_seconds\)")


@slow
def test_nan_in_quarantine(run, nobody_touched):
    from tdds_dist.runs.artifacts import load_scores

    bad = nobody_touched(2).visits[8][5]
    settings = ["score.on_nan=quarantine"]
    fault = jobs.nan_logits(8, [bad])
    run.ends([75, 75], *settings, inject=jobs.all_of(fault, at_step(12, TERM, [0])))
    text = run.ends([0, 0], *settings)
    assert (
        "1 samples are in quarantine (NaN or infinite logits), scored lowest: global indices"
        f" [{bad}]" in text
    )
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
    assert (
        main(["select", str(nobody_touched(2).path), "--pruning-rate", "0.5", "--out", str(path)])
        == 0
    )
    return path


@slow
@pytest.mark.parametrize(
    ("strategy", "num_steps", "inject", "codes", "name"),
    [
        ("E", 12, at_step(5, TERM, [1]), (75, 75), "SIGTERM"),
        ("P", 24, at_step(17, KILL, [0]), (-9, 1), "SIGKILL of rank 0"),
    ],
)
def test_retraining(run, coreset, tmp_path, strategy, num_steps, inject, codes, name):
    def options(coreset, strategy, name="again"):
        schedule = f"retrain.schedule_of={'full' if strategy == 'P' else 'coreset'}"
        return ["--coreset", coreset, "--strategy", strategy, "--name", name, schedule]

    straight = Run(run.config, tmp_path / "straight")
    straight.ends([0, 0], *options(coreset, strategy), stage="retrain")
    path = straight.path / "retrain" / "again"
    reference = Reference(2, path, jobs.state_of(path), straight.starts[0].visits())
    assert len(reference.visits) == num_steps
    text = run.ends(
        codes,
        *options(coreset, strategy),
        stage="retrain",
        inject=inject,
        fault=f"{name}, retraining by strategy {strategy}",
    )
    assert "tdds retrain: " in text
    if strategy == "E":
        other = tmp_path / "other.npz"
        source = coreset.parent.parent
        assert (
            main(
                [
                    "select",
                    str(source),
                    "--pruning-rate",
                    "0.5",
                    "--score",
                    "entropy",
                    "--out",
                    str(other),
                ]
            )
            == 0
        )
        for wrong, said in (
            (options(other, "E"), "coreset_sha256 was"),
            (options(coreset, "P"), "strategy was 'E', now 'P'"),
            (options(coreset, "E", "../x"), "--name='../x' must be letters, digits"),
        ):
            assert said in the_error(run.ends([2], *wrong, stage="retrain"), "retrain")
    text = run.goes_on(
        reference, *options(coreset, strategy), stage="retrain", path=run.path / "retrain" / "again"
    )
    assert "resumes at epoch" in text


# ---- exit codes


@slow
def test_exit_codes_are_those_of_the_protocol_each_time(tmp_path):
    programs = [
        (jobs.returns, 0),
        (jobs.refuses, 2),
        (jobs.leaves, 75),
        (jobs.fails, 1),
        (jobs.is_interrupted, 130),
    ]
    wrong = []
    for number in range(10):
        function, code = programs[number % len(programs)]
        codes, text = jobs.run(
            [], 2, tmp_path / function.__name__, jobs.program(function), deadline=60
        )
        if codes != [code, code] or ("Traceback" in text) != (function is jobs.fails):
            wrong.append((number, function.__name__, codes, text))
    assert wrong == []
    assert "found on one rank (found on rank 1)" in (tmp_path / "refuses" / "rank0.txt").read_text()
