"""The states of jobs, from `squeue` and `sacct`, and for executor=local from the process table and
the files of the ranks.

Nothing here raises because a scheduler is missing, refuses or hangs: the state is then "unknown",
with the reason.
"""

import os
import pickle
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from .records import CAUSES, JobRecord, files_of_ranks, last_written, log_files, read_ends

FORGOTTEN = "SLURM does not know it any more"
ACTIVE = ("pending", "requeued", "running", "suspended")


@dataclass(frozen=True)
class JobState:
    """The state of a job."""

    # pending requeued running suspended finished failed cancelled timeout node_fail out_of_memory
    # preempted unknown
    state: str
    reason: str = ""  # as the scheduler has it, e.g. Dependency; where the state is unknown, why
    restarts: int = 0
    elapsed: str = ""  # days-hours:minutes:seconds
    nodes: str = ""
    exit_code: int | None = None  # 128 + the signal where one ended it

    @property
    def is_active(self) -> bool:
        """Say whether the job still waits or runs."""
        return self.state in ACTIVE

    @property
    def is_bad(self) -> bool:
        """Say whether the job is over without success."""
        return self.state not in (*ACTIVE, "finished", "unknown")


def job_states(jobs: Iterable[JobRecord], timeout_seconds: float = 10.0) -> dict[str, JobState]:
    """Return the state of every job, by id. Ask SLURM at most once, within the time-out; raise
    nothing."""
    jobs = list(jobs)
    on_slurm = [job for job in jobs if job.executor == "slurm"]
    states = _slurm_states(on_slurm, timeout_seconds) if on_slurm else {}
    states |= {job.id: _local_state(job) for job in jobs if job.executor != "slurm"}
    return states


_SLURM_STATES = {  # by our word for them
    "pending": ("PENDING", "CONFIGURING", "REQUEUE_HOLD", "RESV_DEL_HOLD"),
    "requeued": ("REQUEUED", "REQUEUE_FED"),
    "running": ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"),
    "suspended": ("SUSPENDED", "STOPPED"),
    "finished": ("COMPLETED",),
    "cancelled": ("CANCELLED", "REVOKED"),
    "timeout": ("TIMEOUT", "DEADLINE"),
    "failed": ("FAILED", "SPECIAL_EXIT"),
    "node_fail": ("NODE_FAIL", "BOOT_FAIL"),
    "out_of_memory": ("OUT_OF_MEMORY",),
    "preempted": ("PREEMPTED",),
}
_WORDS = {state: word for word, states in _SLURM_STATES.items() for state in states}
_SQUEUE = [
    "squeue",
    "--noheader",
    "--array",
    "--states=all",
    "--Format=JobArrayID:64|,State:24|,RestartCnt:12|,TimeUsed:24|,exit_code:12|,NodeList:256|,Reason:256",
]
_SACCT = [
    "sacct",
    "--noheader",
    "--parsable2",
    "--allocations",
    "--duplicates",
    "--format=JobID,State,Submit,Elapsed,ExitCode,NodeList",
]
_CLOCK_SKEW = 300.0  # seconds that the clocks of a login node and of the controller may be apart


def _slurm_states(jobs: list[JobRecord], timeout_seconds: float) -> dict[str, JobState]:
    """Ask squeue for what waits and runs, and sacct for what is over; each replaces the other as
    far as it can."""
    which = "--jobs=" + ",".join(sorted({job.id for job in jobs}))
    (queue, queue_error), (account, account_error) = _ask(
        [[*_SQUEUE, which], [*_SACCT, which]], timeout_seconds
    )
    if "Invalid job id" in queue_error:  # what squeue says of jobs that ended a while ago
        queue_error = ""
    queued = _parse_squeue(queue)
    accounted = _parse_sacct(account, {job.id: job.time for job in jobs})
    states = {}
    for job in jobs:
        here, there = queued.get(job.id), accounted.get(job.id)
        known: JobState | None
        if here and there:
            known = here if here.is_active else there
            known = replace(
                known,
                restarts=max(here.restarts, there.restarts),
                reason=known.reason or here.reason,
                nodes=known.nodes or here.nodes,
            )
        elif not (known := here or there):
            # Where squeue answers, a job that it does not list is over; without accounting, only
            # the files of its ranks say how.
            errors = [error for error in (queue_error, account_error) if error]
            reason = "; ".join(errors if queue_error else [FORGOTTEN, *errors])
            known = _by_results(job) or JobState("unknown", reason)
        states[job.id] = known
    return states


def _ask(commands: list[list[str]], timeout_seconds: float) -> list[tuple[str, str]]:
    """Run the commands at the same time; return what each printed, and in a line why it did not
    answer."""
    deadline = time.monotonic() + timeout_seconds
    # Times are compared below; without this, the user's own settings choose their format.
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
    started: list[subprocess.Popen[str] | OSError] = []
    for command in commands:
        try:
            started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env=environment,
                    start_new_session=True,
                )
            )
        except OSError as error:
            started.append(error)
    answers = []
    for command, process in zip(commands, started, strict=True):
        out = problem = ""
        try:
            if isinstance(process, OSError):
                raise process
            out, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            if process.returncode != 0:
                said = [line.strip() for line in errors.splitlines() if line.strip()]
                last = said[-1] if said else f"exit code {process.returncode}"
                problem = f"failed: {last[:200]}"
        except FileNotFoundError:
            problem = "is not here"
        except OSError as error:
            problem = f"cannot run ({error.strerror})"
        except subprocess.TimeoutExpired:
            assert not isinstance(process, OSError)
            _end(process)
            problem = f"did not answer within {timeout_seconds:g} s"
        answers.append((out, problem and f"{command[0]} {problem}"))
    return answers


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill a command and what it started, without waiting: on a file system that hangs it ends only
    when that comes back."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _parse_squeue(text: str) -> dict[str, JobState]:
    found = {}
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|", 6)]
        if len(columns) < 7:
            continue
        job_ids, state, restarts, elapsed, exit_code, nodes, reason = columns
        num_restarts = int(restarts) if restarts.isdigit() else 0
        word = _WORDS.get(state, "unknown")
        why = state if word == "unknown" else "" if reason in ("None", "N/A", "(null)") else reason
        known = _job_state(word, why, num_restarts, elapsed, nodes, exit_code)
        if word == "pending" and num_restarts:
            known = replace(known, state="requeued")
        found.update(dict.fromkeys(_array_ids(job_ids), known))
    return found


def _parse_sacct(text: str, submitted: Mapping[str, float]) -> dict[str, JobState]:
    """Return the last record of each job; the others are its starts before a requeue, or of an
    older job that had its number before SLURM counted from 1 again."""
    records: dict[str, list[tuple[float, JobState]]] = {}
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|")]
        if len(columns) < 6:
            continue
        job_ids, state, submit, elapsed, exit_code, nodes = columns[:6]
        word, _, who = state.partition(" ")  # "CANCELLED by 1000"
        word = _WORDS.get(word.rstrip("+"), "unknown")
        time_ = _seconds(submit)
        why = who if word == "cancelled" else state if word == "unknown" else ""
        known = _job_state(word, why, 0, elapsed, nodes, exit_code)
        for job_id in _array_ids(job_ids):
            if time_ is None or time_ >= submitted.get(job_id, 0.0) - _CLOCK_SKEW:
                records.setdefault(job_id, []).append((time_ or 0.0, known))
    return {
        job_id: replace(sorted(found, key=lambda record: record[0])[-1][1], restarts=len(found) - 1)
        for job_id, found in records.items()
    }


def _job_state(
    word: str, why: str, restarts: int, elapsed: str, nodes: str, exit_code: str
) -> JobState:
    """Make a state of what both programs print."""
    return JobState(
        word,
        why,
        restarts,
        "" if word == "pending" else _elapsed(elapsed),
        "" if nodes in ("None assigned", "None", "(null)", "n/a", "N/A") else nodes,
        None if word in ACTIVE else _exit_code(exit_code),
    )


def _array_ids(text: str) -> list[str]:
    """Return the ids behind one that may stand for several: 12, 12_3, 12_[0-3,7%2], 12_[0-8:4]; cut
    off ("12_[0-3,5-...") too.
    """
    match = re.fullmatch(r"(\d+)_\[([^\]%]*)(%\d+)?(\]?)", text)
    if match is None:
        return [text]
    found = []
    # of a number that is cut off, nothing is known
    for part in match[2].split(",")[: None if match[3] or match[4] else -1]:
        if numbers := re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part.strip()):
            first = int(numbers[1])
            steps = range(first, int(numbers[2] or first) + 1, int(numbers[3] or 1) or 1)
            found += [f"{match[1]}_{number}" for number in steps]
    return found


def _exit_code(text: str) -> int | None:
    """Read an exit code from "code:signal" (sacct), or from the status of wait(2) (squeue)."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        code, signal_number = int(match[1]), int(match[2])
    elif text.isdigit():
        code, signal_number = int(text) >> 8, int(text) & 127
    else:
        return None
    return 128 + signal_number if signal_number else code


def _elapsed(text: str) -> str:
    """Write a duration alike: squeue gives 0:08 and 1:02:03 where sacct gives 00:00:08 and
    01:02:03."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return ""
    clock = ":".join(f"{int(part):02d}" for part in ["0"] * (3 - len(parts)) + parts)
    return f"{days}-{clock}" if days else clock


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # Unknown
        return None


# ---- without a scheduler


def _local_state(job: JobRecord) -> JobState:
    """Find the state of a local job from its process, its results and how its ranks ended."""
    elapsed = _slurm_time(time.time() - job.time)
    if job.host and job.host != socket.gethostname():
        return _by_results(job) or JobState("unknown", f"its process is on {job.host}; ask there")
    if not job.id.isdigit() or not _is_alive(int(job.id), job.time):
        return _by_results(job) or JobState(
            "failed", "its process is gone and left no result", _restarts(job)
        )
    if job.after and not log_files(job.log_dir, job.id, "err"):
        return JobState("pending", "Dependency")
    return JobState("running", "", _restarts(job), elapsed, job.host)


def _by_results(job: JobRecord) -> JobState | None:
    """Find the state from the files that its ranks left: all successes, or any failure; None when
    they do not say."""
    files = dict(files_of_ranks(job.log_dir, job.id, r"result\.pkl"))
    outcomes = [outcome_of(file) for file in files.values()]
    ends = read_ends(job.log_dir, job.id)
    last = max([last_written(files.values()), *(end.time for end in ends)])
    elapsed = _slurm_time(last - job.time) if last and job.time else ""
    if outcomes.count("success") >= job.num_ranks:
        return JobState("finished", "", _restarts(job), elapsed, job.host, 0)
    kinds = {end.kind for end in ends if end.restart == _restarts(job)}
    if "error" not in outcomes and not kinds & {*CAUSES, "resume"}:
        return None
    codes = {"failed": 1, "refused": 2, "resume": 75}  # the first that fits
    exit_code = next((code for kind, code in codes.items() if kind in kinds), 1)
    return JobState("failed", "", _restarts(job), elapsed, job.host, exit_code)


def _restarts(job: JobRecord) -> int:
    return max((end.restart for end in read_ends(job.log_dir, job.id)), default=0)


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that runs nothing: results are read for one word only."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def outcome_of(file: Path) -> str:
    """Return "success" or "error", as submitit writes it; "" when the file says neither."""
    try:
        with file.open("rb") as content:
            outcome = _PlainUnpickler(content).load()[0]
    except Exception:  # a damaged pickle raises anything
        return ""
    return outcome if outcome in ("success", "error") else ""


def _is_alive(pid: int, submitted: float) -> bool:
    """Say whether the process that had this number at that time still runs; a later one with its
    number is another."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(
            float(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime")
        )
    except (OSError, ValueError, StopIteration):
        return False
    started = boot + int(rest[18]) / os.sysconf("SC_CLK_TCK")  # the 22nd field, as proc(5) counts
    return state not in ("Z", "X") and started <= submitted + 10.0


def _slurm_time(seconds: float) -> str:
    """Write a duration as SLURM does: [days-]hours:minutes:seconds."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"
