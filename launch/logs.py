"""The log of a run that a person wants to see, and its last lines.

submitit writes `<id>_<rank>_log.out` and `.err` into the log folder (of arrays
`<id>_<task>_<rank>_log.err`); a run that was not submitted has `log.txt`.
"""

import codecs
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tdds_dist.errors import InputError
from tdds_dist.runs.status import find_runs

from .job_states import JobState, job_states
from .records import (
    JobRecord,
    first_cause,
    jobs_of,
    last_written,
    latest_submission,
    log_files,
    read_ends,
)

_LOOK_SECONDS = 0.5  # between looks at a log that is followed
_BLOCK_BYTES = 1 << 16


def choose_log(
    directory: Path, job_id: str | None, rank: int | None, stream: str
) -> tuple[Path, str]:
    """Return the log file, and what to say about the choice. `stream` is out or err.

    Raises:
        InputError: no such run, job, rank or log; names those there are.
    """
    runs = find_runs(directory)
    _, jobs, _ = jobs_of(directory)
    if not jobs:
        return _own_log(directory, runs, job_id, rank), ""
    job, state = _choose_job(directory, jobs, job_id, stream)
    files = log_files(job.log_dir, job.id, stream)
    said = [f"job {job.id}{f' {job.name}' if job.name else ''}"]
    if rank is None:
        cause = None if state.is_active else first_cause(read_ends(job.log_dir, job.id))
        if cause is not None and cause.rank in files:
            lost = "lost another"
            words = {"refused": "refused its input", "gave_up": lost, "lost": lost}
            rank, how = cause.rank, words.get(cause.kind, cause.kind)
            said.append(f"rank {rank} {how} first: {' '.join(cause.message.split())}")
        else:
            rank = min(files, default=0)
    if rank not in files:
        there = f"has written no .{stream}"
        if files:
            there = f"has .{stream} of ranks {_ranges(list(files))}"
        raise InputError(
            f"--rank {rank} is none of job {job.id}, which {there}; choose among these"
        )
    if len(said) == 1:
        said.append(f"rank {rank} of ranks {_ranges(list(files))}")
    return files[rank], f" ({', '.join(said)})"


def _choose_job(
    directory: Path, jobs: list[JobRecord], job_id: str | None, stream: str
) -> tuple[JobRecord, JobState]:
    """Return the one asked for; else one that runs, else the one that wrote last."""
    look = f"`tdds status {directory}`"
    if job_id is not None:
        found = [job for job in jobs if job.id == job_id]
        if not found:
            latest = ", ".join(job.id for job in latest_submission(jobs)[:8])
            raise InputError(
                f"--job {job_id} is no job of {directory}; the latest are {latest}, {look} says"
                " more"
            )
        return found[-1], job_states(found[-1:])[job_id]
    started = [job for job in jobs if log_files(job.log_dir, job.id, stream)]
    if not started:
        raise InputError(
            f"no job of {directory} has written a log yet; {look} says what they wait for"
        )
    states = job_states(started)
    running = [job for job in started if states[job.id].state == "running"]
    logs = {job.id: log_files(job.log_dir, job.id, stream).values() for job in started}
    job = running[-1] if running else max(started, key=lambda job: last_written(logs[job.id]))
    return job, states[job.id]


def _own_log(directory: Path, runs: list[Path], job_id: str | None, rank: int | None) -> Path:
    """Return log.txt, where there are no jobs."""
    if job_id is not None:
        raise InputError(
            f"--job {job_id}: {directory} has no jobs (it was not submitted); leave it out to see"
            " log.txt"
        )
    if runs != [directory]:
        raise InputError(
            f"{directory} is an experiment without jobs; give one of its runs, e.g. {runs[0]}"
        )
    if rank not in (None, 0):
        raise InputError(
            f"--rank {rank}: {directory} has no jobs, and log.txt is written by rank 0 alone; leave"
            " --rank out"
        )
    path = directory / "log.txt"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: the run has said nothing yet; `tdds status {directory}` says"
            " where it is"
        )
    return path


def _ranges(numbers: list[int]) -> str:
    """Write numbers as ranges: 0-3, 5."""
    texts: list[str] = []
    first = previous = None
    for number in [*sorted(numbers), None]:
        if first is not None and previous is not None and number != previous + 1:
            texts.append(f"{first}-{previous}" if previous > first else str(first))
            first = number
        first, previous = number if first is None else first, number
    return ", ".join(texts)


# ---- reading


def print_tail(path: Path, num_lines: int, out: IO[str]) -> int:
    """Write the last lines of a file (0: all of them); return the byte where it ended. Reads no
    more than it needs."""
    with path.open("rb") as file:
        end = start = file.seek(0, 2)
        blocks: list[bytes] = []
        newlines = 0
        # one more: the end of the line before
        while start and (num_lines == 0 or newlines <= num_lines):
            size = min(_BLOCK_BYTES, start)
            start -= size
            file.seek(start)
            blocks.append(file.read(size))
            newlines += blocks[-1].count(b"\n")
    text = b"".join(reversed(blocks)).decode(errors="replace")
    lines = text.split("\n")
    last = [] if lines[-1] else [lines.pop()]  # no line, but the end of the one before
    out.write("\n".join([*lines[-num_lines:], *last]))
    out.flush()
    return end


def follow(
    path: Path, position: int, out: IO[str], is_over: Callable[[], bool] = lambda: False
) -> None:
    """Write what is appended from `position` on, until `is_over`. A file that became shorter is
    begun again."""
    # a character may come in two parts
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        over = is_over()  # asked first, so that the last lines are not lost
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) < position:
                    position = 0
                file.seek(position)
                content = file.read()
        except OSError:  # a server that does not answer, or a file that is being replaced
            content = b""
        position += len(content)
        out.write(decoder.decode(content))
        out.flush()
        if over:
            return
        time.sleep(_LOOK_SECONDS)
