"""The reasons that a job waits or has ended, in words: from its state, from those of the jobs that
it waits for, and from what its ranks wrote."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .job_states import JobState
from .records import JobRecord, first_cause, read_ends

_WAITING = {
    "Priority": "waiting for its turn",
    "Resources": "waiting for free nodes",
    "BeginTime": "waiting for its start time",
    "JobArrayTaskLimit": "waiting for others of its array",
    "JobHeldUser": "held, `scontrol release` frees it",
    "JobHeldAdmin": "held by an administrator",
    "PartitionDown": "waiting for a partition that is down",
}
_ENDED = {
    "timeout": "met its time limit",
    "node_fail": "lost a node",
    "out_of_memory": "ran out of memory",
    "preempted": "was preempted",
    "cancelled": "was cancelled",
}


def explain(
    job: JobRecord, jobs: Iterable[JobRecord], states: Mapping[str, JobState]
) -> tuple[str, JobRecord | None]:
    """Return the state of a job in words, and the job whose end explains it: itself when it failed,
    the first of those that it waited for when it never started because of that, else None. `jobs`
    are all there are, `states` what is known of them."""
    state, by_id = states[job.id], {other.id: other for other in jobs}
    root = _failed_parent(job, by_id, states)
    if state.state in ("pending", "requeued"):
        again = "requeued, " if state.state == "requeued" else ""
        if state.reason == "DependencyNeverSatisfied" or (root and state.reason == "Dependency"):
            why = f"a job that it waits for failed ({state.reason})"
            why = _how(root, states[root.id]) if root else why
            return f"{again}never starts because {why}", root
        if state.reason == "Dependency":
            active = {
                parent: other
                for parent in job.after
                for other in reversed(_parents(parent, by_id))
                if other.id in states and states[other.id].is_active
            }
            # an array by the number of all
            waits = [_named(replace(other, id=parent)) for parent, other in active.items()]
            named = ", ".join(waits[:3]) or "others"
            return f"{again}waiting for {named}{' and more' if len(waits) > 3 else ''}", None
        words = _WAITING.get(state.reason, "waiting")
        return again + words + (f" ({state.reason})" if state.reason else ""), None
    if state.state == "cancelled":
        if root is not None:
            return f"cancelled because {_how(root, states[root.id])}", root
        return f"cancelled {state.reason.replace('by ', 'by user ')}".strip(), None
    if state.state == "unknown":
        return f"unknown ({state.reason})", None
    if not state.is_bad:
        return state.state, None
    return _bad_end(job, state), job


def _bad_end(job: JobRecord, state: JobState, *, with_code: bool = True) -> str:
    """Say how a job failed: by what its ranks wrote rather than by the exit code, which srun takes
    from any of them."""
    code = f" (exit code {state.exit_code})" if state.exit_code and with_code else ""
    if state.state != "failed":
        return _ENDED[state.state]
    ends = read_ends(job.log_dir, job.id)
    cause, last = first_cause(ends), max((end.restart for end in ends), default=0)
    kinds = {end.kind for end in ends if end.restart == last}
    if (cause.kind if cause else "") == "refused" or (cause is None and state.exit_code == 2):
        return f"refused its input{code}"
    if cause is None and ("resume" in kinds or state.exit_code == 75):
        return f"left when it was asked to, its state is saved{code}"
    if state.exit_code is not None and state.exit_code > 128 and with_code:
        code = f" (signal {state.exit_code - 128})"
    if state.exit_code == 128 + 53 and not ends:  # SLURM's own, for files
        return f"failed{code}: its log files could not be written where it ran"
    return f"failed{f', {state.reason}' if state.reason and state.exit_code is None else ''}{code}"


def _how(job: JobRecord, state: JobState) -> str:
    return f"job {_named(job)} {_bad_end(job, state, with_code=False)}"


def _named(job: JobRecord) -> str:
    return f"{job.id} ({job.name})" if job.name else job.id


def _parents(parent: str, by_id: Mapping[str, JobRecord]) -> list[JobRecord]:
    """Return the jobs behind one id that another waits for; the number of an array stands for all
    in it."""
    return [
        other for other in by_id.values() if other.id == parent or other.id.startswith(f"{parent}_")
    ]


def _failed_parent(
    job: JobRecord, by_id: Mapping[str, JobRecord], states: Mapping[str, JobState]
) -> JobRecord | None:
    """Return the job that made this one impossible: one that failed, before one that was cancelled
    itself."""
    parents = [
        other for parent in job.after for other in _parents(parent, by_id) if other.id != job.id
    ]
    bad = [other for other in parents if other.id in states and states[other.id].is_bad]
    bad.sort(key=lambda other: states[other.id].state == "cancelled")
    for other in bad:
        if states[other.id].state != "cancelled":
            return other
        return (
            _failed_parent(
                other, {key: value for key, value in by_id.items() if key != job.id}, states
            )
            or other
        )
    return None
