"""The state of a run: status.json, which its job writes, and what its directory says to people and
launchers that look.

They may be on any machine that sees the files; they write nothing and take no lock. Any file may be
missing, old or cut off: what can be known without it is told. Imports no torch, since an answer is
expected at once.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tdds_dist.errors import InputError
from tdds_dist.runs.directory import RunDir, complete_steps, read_object
from tdds_dist.runs.lock import holder_of
from tdds_dist.text import duration

BEAT_SECONDS = 5.0  # between updates of status.json
STALE_SECONDS = 120.0  # without an update a job is looked for that still holds the run
ACTIVE = ("starting", "copying", "training", "scoring")
_TAIL_BYTES = 1 << 16


# ---- writing, by the job itself


class Pulse:
    """Keeps status.json of one stage up to date; does nothing on ranks other than the main one."""

    def __init__(self, path: Path, stage: str, world_size: int, is_main: bool):
        self._path, self._is_main = path, is_main
        self._record: dict[str, Any] = {
            "stage": stage,
            "state": "starting",
            "epoch": 0,
            "epochs": 0,
            "step": 0,
            "steps": 0,
            "images_per_second": None,
            "eta_seconds": None,
            "updated": 0.0,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": world_size,
            "job": os.environ.get("TDDS_JOB", ""),
            "message": "",
        }
        self._last = -BEAT_SECONDS

    @property
    def is_due(self) -> bool:
        """Say whether status.json is old enough to be written again."""
        return self._is_main and time.monotonic() - self._last >= BEAT_SECONDS

    def beat(self, state: str, **fields: Any) -> None:
        """Write status.json now. `state`: starting, copying, training, scoring, finished, failed,
        or stopped: asked to leave, and able to go on. `epoch` counts finished epochs."""
        if not self._is_main:
            return
        self._last = time.monotonic()
        self._record |= {"state": state, "updated": time.time(), **fields}
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a full disk ends nothing here
            try:
                temporary.write_text(json.dumps(self._record) + "\n")
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)


# ---- reading, from outside


@dataclass(frozen=True)
class LastCheckpoint:
    """The checkpoint that a stopped run goes on from, unless it is damaged, which shows when it is
    used."""

    step: int
    epoch: int | None
    age_seconds: float


@dataclass(frozen=True)
class RunStatus:
    """The state of one run directory. None and "" stand for what no file says."""

    directory: str
    stage: str  # collect | retrain | train
    # new starting copying training scoring finished stopped failed, or lost: nobody works on it,
    # and it did not say why
    state: str
    epoch: int | None = None  # epochs finished
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    updated_seconds_ago: float | None = None
    world_size: int | None = None
    num_resumes: int = 0
    host: str = ""
    job: str = ""
    command: tuple[str, ...] = ()  # that started it, without its launcher
    why: str = ""  # it stopped
    checkpoint: LastCheckpoint | None = None
    final_top1: float | None = None
    best_top1: float | None = None
    warnings: tuple[str, ...] = ()
    retrainings: tuple["RunStatus", ...] = field(default=())

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return Path(self.directory).name

    @property
    def is_active(self) -> bool:
        """Say whether a job works on it."""
        return self.state in ACTIVE


def find_runs(directory: Path) -> list[Path]:
    """Return the run directory itself, or the collections of an experiment directory.

    Raises:
        InputError: it is neither.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise InputError(
            f"{directory} {what}; give the directory of a run or an experiment, e.g. runs/NAME"
        )
    if _is_run(directory):
        return [directory]
    if seeds := sorted(
        (path for path in directory.glob("seed*") if _is_run(path)),
        key=lambda path: (len(path.name), path),
    ):
        return seeds
    if _has_jobs(directory):
        return [directory]
    raise InputError(
        f"{directory} holds neither a run (no config.yaml, env.json or jobs) nor an experiment (no"
        " seed*/); give the directory that `tdds collect`, `retrain` or `experiment` wrote to"
    )


def _is_run(directory: Path) -> bool:
    run = RunDir(directory)
    files = (run.config_file, run.env_file, run.status_file, run.metrics_file, run.result_file)
    return any(file.is_file() for file in (*files, directory / "run.lock")) or (
        directory.name.startswith("seed") and _has_jobs(directory)
    )


def _has_jobs(directory: Path) -> bool:
    return (directory / "jobs.path").is_file() or (directory / "jobs" / "jobs.jsonl").is_file()


def read_status(directory: Path, *, with_retrainings: bool = True) -> RunStatus:
    """Read what the files of a run directory say now; damaged ones raise nothing."""
    run, now = RunDir(directory), time.time()
    pulse, env, result = (
        read_object(file) for file in (run.status_file, run.env_file, run.result_file)
    )
    inside = run.retrain_runs() if with_retrainings else []
    retrainings = tuple(read_status(sub.path, with_retrainings=False) for sub in inside)
    resumes = env.get("resumes")
    resumes = resumes if isinstance(resumes, list) else []
    last_start = resumes[-1] if resumes and isinstance(resumes[-1], dict) else env
    known: dict[str, Any] = {
        "directory": str(directory),
        "stage": _text(result, "stage") or _text(env, "stage") or _text(pulse, "stage"),
        "world_size": _whole(pulse, "world_size") or _whole(last_start, "world_size"),
        "num_resumes": len(resumes),
        "command": _command(last_start) or _command(env),
        "host": _text(pulse, "host"),
        "job": _text(pulse, "job"),
        "retrainings": retrainings,
    }
    if result:
        return RunStatus(
            **known,
            state="finished",
            epoch=_whole(result, "epochs"),
            epochs=_whole(result, "epochs"),
            final_top1=_number(result, "final_top1"),
            best_top1=_number(result, "best_top1"),
        )
    updated = _number(pulse, "updated")
    age = None if updated is None else max(0.0, now - updated)
    num_epochs = _num_lines(run.metrics_file)
    state, why, warnings = _state(run, pulse, age, started=bool(env) or num_epochs > 0)
    epochs, is_active = _whole(pulse, "epochs"), state in ACTIVE
    if run.status_file.is_file() and not pulse:
        warnings.append(f"{run.status_file} is damaged; what follows is from the other files")
    return RunStatus(
        **known,
        state=state,
        epoch=max(_whole(pulse, "epoch") or 0, num_epochs),
        epochs=epochs or _planned_epochs(run),
        step=_whole(pulse, "step"),
        steps=_whole(pulse, "steps") or None,
        images_per_second=_number(pulse, "images_per_second") if is_active else None,
        eta_seconds=_number(pulse, "eta_seconds") if is_active else None,
        updated_seconds_ago=age,
        why=why,
        checkpoint=_last_checkpoint(run.checkpoints, now),
        warnings=tuple(warnings),
    )


def _state(
    run: RunDir, pulse: dict[str, Any], age: float | None, *, started: bool
) -> tuple[str, str, list[str]]:
    """Return the state, why it stopped, and warnings."""
    told, holder, is_alive, is_certain = _text(pulse, "state"), *holder_of(run.path, STALE_SECONDS)
    if told in ACTIVE:
        is_old, since = age is None or age > STALE_SECONDS, duration(age or 0)
        if is_alive or not (is_old or (holder and is_certain)):
            warning = f"no update for {since}, but {holder} still holds the run"
            return told, "", [warning] * is_old
        gone = f"{holder} is dead" if holder else "no job holds it"
        warning = f"{run.path} says {told}, but its last update came {since} ago and {gone}"
        return "lost", "", [warning]
    if is_alive:  # between two starts, or on a disk that is too full for status.json
        return "training" if told == "" and run.metrics_file.is_file() else "starting", "", []
    if told in ("stopped", "failed", "finished"):
        return told, _text(pulse, "message") or _last_reason(run.log_file), []
    if not started:
        return "new", "", []
    why = _last_reason(run.log_file)
    return "stopped" if why else "lost", why, []


def _last_checkpoint(folder: Path, now: float) -> LastCheckpoint | None:
    steps = complete_steps(folder)
    if not steps:
        return None
    file = steps[max(steps)] / "checkpoint.json"
    try:
        record = read_object(file).get("record")
        epoch = _whole(record, "epoch") if isinstance(record, dict) else None
        return LastCheckpoint(max(steps), epoch, max(0.0, now - file.stat().st_mtime))
    except OSError:  # removed meanwhile
        return None


def _planned_epochs(run: RunDir) -> int | None:
    if read_object(run.env_file).get("stage") == "retrain":
        return None  # strategy and coreset decide it
    try:
        return int(run.read_config()["train"]["epochs"])
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        RecursionError,
        yaml.YAMLError,
    ):
        return None


def _last_reason(log: Path) -> str:
    """Return the last line about why the run stopped, unless it went on after it."""
    for line in reversed(_tail(log)):
        text = line[20:] if line[:4].isdigit() else line  # without its time
        if text.startswith("stopped: "):
            return text.removeprefix("stopped: ")
        if text.startswith(("resumes ", "finished")):
            break
    return ""


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _num_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    return " ".join(value.split()) if isinstance(value, str) else ""


def _command(record: dict[str, Any]) -> tuple[str, ...]:
    words = record.get("command")
    is_sound = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return tuple(words or ()) if is_sound else ()


def _whole(record: dict[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    # no NaN either
    is_number = (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    )
    return float(value) if is_number and value is not None else None
