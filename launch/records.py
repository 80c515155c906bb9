"""The list of jobs that were submitted for a run, and how their ranks ended; `job_states` finds out
the states of the jobs.

Owns two kinds of files in the log folder. Each holds one JSON object per line, written in one
piece, so that several writers do not mix; a line that is damaged is as if it were not there.

    jobs.jsonl              a line per job, by whoever submits
    <id>_<rank>_end.jsonl   a line each time that a rank leaves other than by success
"""

import json
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tdds_dist.runs.directory import read_objects

JOBS_FILE = "jobs.jsonl"
# in the run directory: one line, the log folder, where that is not jobs/
POINTER_FILE = "jobs.path"
# kinds of ends that are a failure, the most telling first
CAUSES = ("failed", "refused", "gave_up", "lost")


@dataclass(frozen=True)
class JobRecord:
    """One job as it was submitted."""

    id: str  # of SLURM ("12", in an array "12_3"), or the process of submitit's controller
    time: float = 0.0  # unix seconds
    submission: str = ""  # shared by all jobs of one command
    executor: str = "slurm"
    stage: str = ""
    name: str = ""
    title: str = ""
    after: tuple[str, ...] = ()  # ids of the jobs that it waits for
    num_ranks: int = 1
    directory: str = ""  # the run directory that it works in
    host: str = ""  # that submitted it: process ids mean something there only
    log_dir: Path = field(default=Path(), compare=False)  # where it was read from; not in the file

    def as_data(self) -> dict[str, Any]:
        """Return what the file holds."""
        return {key: value for key, value in asdict(self).items() if key != "log_dir"}


@dataclass(frozen=True)
class EndRecord:
    """The end of one rank, or of a job by the rank that ended it."""

    # refused | failed | lost; gave_up: the job, not queued again after so many that were lost;
    # resume: saved, not queued again; requeued; requeue: to be queued again
    kind: str
    rank: int = 0
    time: float = 0.0  # unix seconds
    restart: int = 0  # of the job, by the scheduler
    host: str = ""
    message: str = ""
    traceback: str = ""


_ID = re.compile(r"[\w.+-]+")  # they become arguments of commands, and parts of names
_Record = TypeVar("_Record", JobRecord, EndRecord)
# of values that are no text
_KINDS: dict[str, Any] = {"after": list, "time": (int, float)}
_KINDS |= dict.fromkeys(("num_ranks", "rank", "restart"), int)


# ---- files


def log_dir_of(run: Path) -> Path:
    """Return the log folder of a run or experiment directory."""
    try:
        told = (run / POINTER_FILE).read_text().strip()
    except (OSError, UnicodeDecodeError):
        told = ""
    is_path = told and "\0" not in told  # else of a disk that was full
    return run / (told if is_path else "jobs")


def jobs_of(directory: Path) -> tuple[Path | None, list[JobRecord], list[JobRecord]]:
    """Return the log folder, the jobs of a run or experiment, and all that are listed with them.

    A retraining, or one seed of an experiment, may have been submitted with the directory around
    it.
    """
    for place in (directory, *list(directory.resolve().parents)[:3]):
        log_dir = log_dir_of(place)
        if not (listed := read_jobs(log_dir)):
            continue
        if place == directory:
            return log_dir, listed, listed
        inside = directory.resolve()
        if found := [
            job
            for job in listed
            if job.directory and Path(job.directory).resolve().is_relative_to(inside)
        ]:
            return log_dir, found, listed
    return None, [], []


def append_job(log_dir: Path, job: JobRecord) -> None:
    """Add a job to the list; the host is filled in. OSError when that cannot be written."""
    append_line(log_dir / JOBS_FILE, replace(job, host=job.host or socket.gethostname()).as_data())


def read_jobs(log_dir: Path) -> list[JobRecord]:
    """Read every job in the order of submission; lines that are damaged are left out."""
    return [
        replace(job, after=tuple(map(str, job.after)), log_dir=log_dir)
        for job in _records(JobRecord, log_dir / JOBS_FILE)
        if _ID.fullmatch(job.id)
    ]


def latest_submission(jobs: list[JobRecord]) -> list[JobRecord]:
    """Return the jobs of the command that came last."""
    return [job for job in jobs if job.submission == jobs[-1].submission] if jobs else []


def append_end(log_dir: Path, job_id: str, end: EndRecord) -> None:
    """Record how a rank of a job ended. OSError when that cannot be written."""
    append_line(log_dir / f"{job_id}_{end.rank}_end.jsonl", asdict(end))


def read_ends(log_dir: Path, job_id: str) -> list[EndRecord]:
    """Read how the ranks of a job ended, earliest first; lines that are damaged are left out."""
    files = files_of_ranks(log_dir, job_id, r"end\.jsonl")
    ends = (end for _, file in files for end in _records(EndRecord, file))
    return sorted(ends, key=lambda end: end.time)


def first_cause(ends: Iterable[EndRecord]) -> EndRecord | None:
    """Return what explains a failure: of the last restart, a rank that failed before one that
    refused its input, before the job that gave up, before one that lost another; of those the
    earliest. None when nobody failed."""
    ends = list(ends)
    last = max((end.restart for end in ends), default=0)
    found = [end for end in ends if end.restart == last and end.kind in CAUSES]
    return min(found, key=lambda end: (CAUSES.index(end.kind), end.time), default=None)


def log_files(log_dir: Path, job_id: str, stream: str) -> dict[int, Path]:
    """Return the logs of a job by rank; `stream` is out or err."""
    return dict(files_of_ranks(log_dir, job_id, rf"log\.{stream}"))


def files_of_ranks(log_dir: Path, job_id: str, rest: str) -> list[tuple[int, Path]]:
    pattern = re.compile(rf"{re.escape(job_id)}_(\d+)_{rest}")
    try:
        names = os.listdir(log_dir)
    except OSError:
        return []
    return sorted(
        (int(match[1]), log_dir / name) for name in names if (match := pattern.fullmatch(name))
    )


def last_written(files: Iterable[Path]) -> float:
    """Return when the newest file was written, in unix seconds; 0 when all are gone meanwhile."""
    times = [0.0]
    for file in files:
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


def append_line(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")  # of a writer that was killed: its line stays a line
        os.write(file, (json.dumps(content) + "\n").encode())
    finally:
        os.close(file)


def _records(kind: type[_Record], file: Path) -> Iterator[_Record]:
    """Make records of the lines of a file; unknown keys are left out, a value of another type makes
    a line damaged."""
    names = {field.name for field in fields(kind)} - {"log_dir"}
    for content in read_objects(file):
        known: dict[str, Any] = {name: content[name] for name in names & content.keys()}
        if all(isinstance(value, _KINDS.get(name, str)) for name, value in known.items()):
            with suppress(TypeError):  # without its id or kind
                yield kind(**known)
