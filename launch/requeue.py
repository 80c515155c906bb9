"""Decide what becomes of a SLURM job whose ranks have ended: `python -m tdds_dist.launch.requeue
LOG_DIR CODE NUM_RANKS REQUEUE_FAILURES`, at the end of its sbatch file.

Reads how the ranks left. srun's exit code alone does not tell: it is 0 after some aborted steps,
and another one when a node's slurmstepd was killed and all ranks finished all the same. A rank that
failed or refused its input ends the job, and its message (and traceback) is printed in one place,
without those of all the others that lost it. Where ranks only lost each other or ended without a
message (killed, out of memory, a node that is gone), the job is queued again, but not for ever:
only so often in a row without a new checkpoint.

Exit codes: that of the job; 77 to have the job queued again (the sbatch file does it: python may
run in a container).
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tdds_dist.runs.directory import RunDir, complete_steps, read_objects

from .job_states import outcome_of
from .records import EndRecord, append_end, append_line, first_cause, read_ends, read_jobs
from .scheduler import REQUEUE

_NOT_DONE = 1
# as tdds_dist.distributed.interruption has it; that a preempted job leaves with it the sbatch file
# looks at
EXIT_RESUME = 75
_VISIBLE_SECONDS = 30.0  # a file of another node may take that long to be seen


def main(arguments: Sequence[str]) -> int:
    """Decide, and return the exit code of the job."""
    log_dir, (code, num_ranks, requeue_failures) = Path(arguments[0]), map(int, arguments[1:])
    job_id, restart = _job_id(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if _all_done(log_dir, job_id, num_ranks, patience=_VISIBLE_SECONDS if code == 0 else 0.0):
        return 0
    code = code or _NOT_DONE
    broken = [rank for rank in range(num_ranks) if _outcome(log_dir, job_id, rank) == "error"]
    found = read_ends(log_dir, job_id)
    ends = [end for end in found if end.restart == restart and end.kind != "gave_up"]
    cause = first_cause(ends)
    if any(end.kind == "requeued" for end in ends):
        return code  # by rank 0, through submitit
    if cause is not None and cause.kind != "lost":
        _tell(job_id, f"{cause.kind} on rank {cause.rank} ({cause.host}): {cause.message}")
        if cause.traceback:
            print(cause.traceback, file=sys.stderr)
        return code
    if any(end.kind == "requeue" for end in ends):
        return REQUEUE
    if cause is None and any(end.kind == "resume" for end in ends):
        return EXIT_RESUME
    if broken:
        _tell(
            job_id,
            f"failed on rank {broken[0]} before it could say more than its log has; see `tdds"
            " logs`",
        )
        return code
    return _again(log_dir, job_id, restart, requeue_failures, cause, code)


def _all_done(log_dir: Path, job_id: str, num_ranks: int, patience: float) -> bool:
    """Say whether every rank has left its result, which it writes when its commands are done."""
    end = time.monotonic() + patience
    while (outcomes := {_outcome(log_dir, job_id, rank) for rank in range(num_ranks)}) != {
        "success"
    }:
        if "error" in outcomes or time.monotonic() >= end:
            return False
        time.sleep(1.0)
    return True


def _outcome(log_dir: Path, job_id: str, rank: int) -> str:
    return outcome_of(log_dir / f"{job_id}_{rank}_result.pkl")


def _again(
    log_dir: Path,
    job_id: str,
    restart: int,
    requeue_failures: int,
    cause: EndRecord | None,
    code: int,
) -> int:
    """Queue the job again if it came further since the last failures."""
    what = f"ranks ended without a word (srun: {code})"
    if cause is not None:
        what = f"rank {cause.rank} ({cause.host}): {cause.message}"
    progress = _progress(log_dir, job_id)
    file = log_dir / f"{job_id}_failures.jsonl"
    failure = {"time": time.time(), "restart": restart, "progress": progress, "what": what}
    try:
        append_line(file, failure)
    except OSError as error:
        _tell(
            job_id,
            f"{what}; it is not queued again, because {file}, where its failures are counted,"
            f" cannot be written ({error}); see to that, and submit again to go on",
        )
        return code
    in_a_row = 0
    for record in reversed(read_objects(file)):
        if record.get("progress") != progress:
            break
        in_a_row += 1
    if in_a_row > requeue_failures:
        message = (
            f"gave up: {what}. That is failure {in_a_row} in a row without a new checkpoint "
            f"(requeue_failures={requeue_failures}); submit again to go on"
        )
        _tell(job_id, message)
        by = (cause.rank, cause.host) if cause else (0, "")
        end = EndRecord("gave_up", by[0], time.time(), restart, by[1], message)
        append_end(log_dir, job_id, end)
        return code
    _tell(job_id, f"queued again: {what}")
    return REQUEUE


def _progress(log_dir: Path, job_id: str) -> str:
    """Return the newest checkpoint of the run that the job works on, by name; empty when there is
    none."""
    directory = next((job.directory for job in read_jobs(log_dir) if job.id == job_id), "")
    found = [path.name for path in complete_steps(RunDir(directory).checkpoints).values()]
    return found[-1] if directory and found else ""


def _job_id() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def _tell(job_id: str, message: str) -> None:
    print(f"tdds: job {job_id} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
