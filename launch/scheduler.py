"""Jobs by submitit: the parameters of a job, its sbatch file, and its submission. The only user of
submitit's executors.

A stage is one or several jobs; several go as one array. Their sbatch file runs the ranks by srun
and then `requeue`, which queues a job again when a rank was lost, or says what ended it.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdds_dist.errors import InputError

from .cluster import Cluster
from .task import StageTask

if TYPE_CHECKING:
    from submitit import Job

REQUEUE = 77  # exit code of `requeue`: queue this job again
# one rank down: all down, not a job that waits for its time limit
_END_TOGETHER = ("--kill-on-bad-exit=1", "--wait=30")
# for srun to end the other ranks: more than that wait, and than SLURM's usual KillWait of 30
_SRUN_SECONDS = 60


def submit(
    tasks: Sequence[StageTask],
    cluster: Cluster,
    name: str,
    log_dir: Path,
    after: Sequence[str] = (),
) -> "list[Job[Any]]":
    """Hand tasks to the scheduler, several as one array; they start when the jobs `after` have
    succeeded.

    Raises:
        InputError: there is no SLURM here, or it refuses the job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if cluster.executor == "local":
        executor = _local(cluster, log_dir)
        return [executor.submit(task) for task in tasks]
    from submitit import SlurmExecutor

    try:
        if shutil.which("sbatch") is None:
            raise RuntimeError("no sbatch here")
        slurm = SlurmExecutor(
            folder=log_dir, max_num_timeout=cluster.requeue_time_limits, python=cluster.python
        )
    except RuntimeError as error:
        raise InputError(
            f"executor=slurm needs srun and sbatch ({error}); submit from a login node, or use "
            "executor=local"
        ) from error
    slurm.update_parameters(**_parameters(cluster, name, log_dir, after))
    try:
        with _outside_of_jobs():
            return slurm.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise InputError(
            f"the scheduler refused {name} ({_said(error)}); adapt the cluster file"
        ) from error


def cancel(job_ids: Sequence[str]) -> None:
    """Take jobs out of the queue; raise nothing where that fails."""
    if job_ids:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                ["scancel", *dict.fromkeys(job_id.split("_")[0] for job_id in job_ids)],
                timeout=30,
                capture_output=True,
                check=False,
            )


def sbatch_text(
    cluster: Cluster, name: str, log_dir: Path, num_tasks: int, after: Sequence[str] = ()
) -> str:
    """Return the sbatch file of such a job, as submitit writes it; also where there is no SLURM."""
    from submitit import SlurmExecutor

    class Anywhere(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    slurm = Anywhere(
        folder=log_dir, max_num_timeout=cluster.requeue_time_limits, python=cluster.python
    )
    slurm.update_parameters(**_parameters(cluster, name, log_dir, after))
    if num_tasks > 1:
        slurm.parameters["map_count"] = num_tasks
    return slurm._make_submission_file_text(slurm._submitit_command_str, "")


def would_take(cluster: Cluster, name: str, timeout_seconds: float) -> tuple[bool, str]:
    """Ask SLURM whether it would take such a job, which is not queued; return that, and what it
    said."""
    with tempfile.TemporaryDirectory() as folder, _outside_of_jobs():
        done = subprocess.run(
            ["sbatch", "--test-only"],
            input=sbatch_text(cluster, name, Path(folder), 1),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    said = " ".join((done.stdout + done.stderr).replace("sbatch:", "").split())
    return done.returncode == 0, said.removeprefix("error: ")


def _parameters(cluster: Cluster, name: str, log_dir: Path, after: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of SlurmExecutor.update_parameters."""
    memory = None
    if cluster.memory_gb is not None:
        whole = cluster.memory_gb == int(cluster.memory_gb)
        memory = f"{int(cluster.memory_gb)}GB" if whole else f"{int(cluster.memory_gb * 1024)}MB"
    # Since SLURM 22.05 srun does not take the number of CPUs over from sbatch: each rank would get
    # one.
    srun = [*_END_TOGETHER, f"--cpus-per-task={cluster.cpus_per_rank}"]
    if cluster.cpu_bind:
        srun.append(f"--cpu-bind={cluster.cpu_bind}")
    given = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": memory,
        "gpus_per_node": cluster.gpus_per_node or None,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
    }
    options: dict[str, Any] = {
        key.lstrip("-"): value for key, value in cluster.extra.items() if value is not False
    }
    options["requeue"] = True  # also where the cluster's default is another: a lost node
    if after:
        options["kill-on-invalid-dep"] = "yes"  # else the rest waits for ever when a stage fails
    folder = shlex.quote(str(log_dir))
    return {key: value for key, value in given.items() if value is not None} | {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_rank,
        "time": cluster.time_minutes,
        "signal_delay_s": cluster.grace_seconds,
        "array_parallelism": cluster.array_parallelism,
        "wckey": None,
        "srun_args": srun,
        "additional_parameters": options,
        "setup": [
            "export TDDS_JOB_STARTED=$(date +%s)",
            *cluster.setup,
            "set +eu  # what follows the ranks is to run",
            *_watch_srun(folder),
        ],
        "teardown": [
            "code=$?",
            "kill $watch",
            (
                f"{cluster.python} -m tdds_dist.launch.requeue {folder} $code {cluster.num_ranks}"
                f" {cluster.requeue_failures}; code=$?"
            ),
            # Preempted with a warning, it has saved and left before SLURM would have queued it
            # again.
            "if [ $code -eq 75 ]; then",
            (
                r'    preempted=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/.*'
                r' PreemptTime=\([0-9][^ ]*\).*/\1/p")'
            ),
            (
                '    [ -z "$preempted" ] || [ "$(date -d "$preempted" +%s)" -lt'
                f' "$TDDS_JOB_STARTED" ] || code={REQUEUE}'
            ),
            "fi",
            f'[ $code -ne {REQUEUE} ] || scontrol requeue "$SLURM_JOB_ID"',
            "exit $code",
        ],
    }


def _watch_srun(folder: str) -> list[str]:
    """Return lines that end srun a while after a rank has said why it left: srun waits for hours to
    hear of the ranks on a host that it no longer reaches, although the controller has ended
    them."""
    job = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    return [
        "# ranks that srun no longer hears of are not waited for",
        f"ends() {{ cat {folder}/{job}_*_end.jsonl 2>/dev/null | wc -l; }}",
        "before=$(ends)",
        "(while sleep 20 && kill -0 $$; do",
        f"    [ $(ends) -eq $before ] || {{ sleep {_SRUN_SECONDS}; pkill -P $$ -x srun; }}",
        "done) >/dev/null 2>&1 &",
        "watch=$!; disown",
    ]


def _local(cluster: Cluster, log_dir: Path) -> Any:
    from submitit import LocalExecutor

    python = cluster.python
    if cluster.setup:
        # submitit's own `setup` of its local executor takes the parent of its controller for the
        # shell that it started; where sh is a bash that replaces itself by its last command, that
        # is this process, and the job is never found.
        lines = "\n".join([*cluster.setup, 'exec "$0" "$@"'])
        python = f"{shlex.join(['bash', '-c', lines])} {python}"
    executor = LocalExecutor(
        folder=log_dir, max_num_timeout=cluster.requeue_time_limits, python=python
    )
    executor.update_parameters(
        tasks_per_node=cluster.ranks_per_node,
        gpus_per_node=cluster.gpus_per_node,
        timeout_min=cluster.time_minutes,
        signal_delay_s=cluster.grace_seconds,
    )
    return executor


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the variables of the job that this process may be part of, which sbatch would take for
    options."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    from submitit.helpers import clean_env

    where = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    with clean_env():
        os.environ.update(where)
        yield


def _said(error: Exception) -> str:
    """Return what sbatch said: its lines `sbatch: error: ...`, without the command and the
    traceback around them."""
    mark = "sbatch: error: "
    lines = dict.fromkeys(
        line.partition(mark)[2].strip() for line in str(error).splitlines() if mark in line
    )
    return "; ".join(lines) or " ".join(str(error).split())
