"""Submit one stage as a job: `python -m launch.submit CONFIG.yaml --cluster CLUSTER.yaml --stage collect`.

Checks what can be checked without the data before anything is queued, freezes the config into the log folder (so that
editing it while the job waits changes nothing), submits, and says where to look. `--wait` stays until the job is over.

There is no requeue: a job that is preempted, or that meets its time limit, saves its state and ends; submitted again, on
any number of ranks that divides the batch, it goes on from its last checkpoint. Stages do not wait for each other.
With executor=local nothing ends the other ranks when one fails before it joins them; they give up after
run.timeout_seconds.

Exit codes: 0 submitted, or with `--wait` done; 2 bad input, found here or by the job; 1 the job failed.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.cluster import Cluster, load_cluster
from launch.task import StageTask
from tdds_dist.config import Config, load_config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.partition import per_rank_batch

if TYPE_CHECKING:
    from submitit import Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit what the command line says; returns the exit code."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
        cluster = load_cluster(options.cluster)
        config = _for_cluster(load_config(options.config, options.overrides), cluster)
        check(config, cluster, options)
        log_dir = Path(cluster.log_dir or config.run.directory / "jobs").absolute()
        task = StageTask([options.stage, str(freeze(config, options.stage, log_dir)), *stage_options(options)])
        job = submit(task, cluster, f"{config.run.name}-{options.stage}", log_dir)
    except InputError as error:
        print(f"launch.submit: error: {error}", file=sys.stderr)
        return 2
    _say_where(job, cluster, f"{config.run.name}-{options.stage}", log_dir)
    try:
        return wait(job, options.stage) if options.wait else 0
    except KeyboardInterrupt:
        print("launch.submit: no longer waiting", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Options of this program; those of the stages have the names they have in `tdds`."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit",
        description="Submit one stage to a cluster, or to this machine (see configs/clusters/).",
        epilog="A preempted job is not queued again; submitted again it goes on from its last checkpoint.")
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a key of the config: train.lr=0.05")
    parser.add_argument("--cluster", metavar="CLUSTER.yaml", type=Path, required=True, help="what the job asks for")
    parser.add_argument("--stage", choices=("collect", "retrain"), required=True)
    parser.add_argument("--wait", action="store_true", help="stay until the job is over, and leave with its outcome")
    retrain = parser.add_argument_group("of --stage retrain")
    retrain.add_argument("--coreset", type=Path, metavar="FILE.npz")
    retrain.add_argument("--strategy", choices=("E", "P"))
    retrain.add_argument("--importance", choices=("none", "batch", "sample"))
    retrain.add_argument("--name", help="folder under retrain/")
    return parser


# ---- before submission


def check(config: Config, cluster: Cluster, options: argparse.Namespace) -> None:
    """InputError for what would otherwise fail only after the job has waited in the queue."""
    given = [key for key in ("coreset", "strategy", "importance", "name") if getattr(options, key) is not None]
    if options.stage == "collect":
        if given:
            raise InputError(f"--{given[0]} belongs to --stage retrain; leave it out of --stage collect")
        config.check_collect()
    else:
        for key in ("coreset", "strategy"):
            if key not in given:
                raise InputError(f"--stage retrain needs --{key}; see `tdds retrain --help`")
        if not options.coreset.is_file():
            raise InputError(f"--coreset {options.coreset} does not exist; `tdds select` writes one")
    if config.run.device == "cuda" and not cluster.gpus_per_node:
        raise InputError("run.device='cuda' but the cluster file asks for no GPU; set gpus_per_node or run.device=auto")
    _check_batch(config, cluster.num_ranks, options.stage)


def _check_batch(config: Config, num_ranks: int, stage: str) -> None:
    """InputError when the ranks cannot share the batch evenly.

    Retraining scales the batch by a factor that depends on the coreset: refused only when none of the factors helps.
    """
    factors = [1.0, *(config.retrain.batch_size_rule.values() if stage == "retrain" else ())]
    errors = []
    for factor in factors:
        try:
            per_rank_batch(config.train.global_batch_size, num_ranks, config.train.accumulation, factor)
        except InputError as error:
            errors.append(error)
    if len(errors) == len(factors):
        raise errors[0]


def _for_cluster(config: Config, cluster: Cluster) -> Config:
    """The config with what only the cluster file knows.

    data.num_workers=0 divides the CPUs that a process may use by the ranks of its node. SLURM has divided them already.
    """
    if cluster.executor != "slurm" or config.data.num_workers:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"num_workers": cluster.cpus_per_rank})})


def freeze(config: Config, stage: str, log_dir: Path) -> Path:
    """Write the resolved config into the log folder, under a name that its content decides."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    path = log_dir / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write to log_dir={log_dir} ({error}); choose a writable directory") from error
    return path


def stage_options(options: argparse.Namespace) -> list[str]:
    """The stage's own options as `tdds` takes them; the coreset by a path that holds anywhere."""
    values = {"coreset": options.coreset and options.coreset.absolute(), "strategy": options.strategy,
              "importance": options.importance, "name": options.name}
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]


# ---- submission and after


def submit(task: Callable[[], None], cluster: Cluster, name: str, log_dir: Path) -> "Job[Any]":
    """Hand the task to submitit; InputError when there is no SLURM here or it refuses the job."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        executor = submitit.AutoExecutor(folder=log_dir, **cluster.executor_options())
    except RuntimeError as error:
        raise InputError(f"executor=slurm needs srun and sbatch ({error}); submit from a login node, or use "
                         "executor=local") from error
    executor.update_parameters(**cluster.job_parameters(name))
    try:
        return executor.submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the scheduler refused the job ({reason}); adapt the cluster file") from error


def _say_where(job: "Job[Any]", cluster: Cluster, name: str, log_dir: Path) -> None:
    is_slurm = cluster.executor == "slurm"
    print(f"submitted {name} as {'job' if is_slurm else 'process'} {job.job_id}: {cluster.nodes} node(s) x "
          f"{cluster.ranks_per_node} rank(s), at most {cluster.time_minutes} minutes")
    print(f"logs:   {log_dir}/{job.job_id}_RANK_log.out and .err")
    print(f"follow: tail -F {job.task(0).paths.stderr}")
    if is_slurm:
        print(f"state:  squeue --job {job.job_id}")
    print(f"stop:   {'scancel' if is_slurm else 'kill -INT'} {job.job_id}", flush=True)


def wait(job: "Job[Any]", stage: str) -> int:
    """Wait for the end of the job; returns the exit code and prints why it failed."""
    job.wait()
    ranks = [job.task(rank) for rank in range(job.num_tasks)]
    lines = [line for rank in ranks for line in (rank.stderr() or "").splitlines()]
    bad_input = [line for line in lines if line.startswith(f"tdds {stage}: error: ")]
    if bad_input:
        print(bad_input[0], file=sys.stderr)
        return 2
    # The rank that failed first has the cause; the others lost their peer, or were killed and left no result.
    written = sorted((rank for rank in ranks if rank.paths.result_pickle.exists()),
                     key=lambda rank: rank.paths.result_pickle.stat().st_mtime)
    for rank in written + [rank for rank in ranks if rank not in written]:
        error = rank.exception()
        if error is not None:
            print(f"launch.submit: {stage} failed: {error}", file=sys.stderr)
            return 1
    print(f"{stage} is done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
