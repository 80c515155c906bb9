"""`tdds submit CONFIG.yaml --cluster CLUSTER.yaml`: a stage, or the whole pipeline, as jobs.

Checks what can be checked without the data before anything is queued, freezes the config into the
log folder (so that editing it while jobs wait changes nothing), skips what is done, submits the
rest, each stage to start when the one before has succeeded, and says where to look. With
executor=local the same jobs run here, stage by stage, while this command waits.

Exit codes: 0 submitted, or with `--wait` done; 2 bad input, found here or by a job; 1 a job failed.
"""

import argparse
import fcntl
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tdds_dist.cli.options import Parsers
from tdds_dist.cli.outcome import Outcome
from tdds_dist.config.run import Config, load_config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.text import command
from tdds_dist.training.schedule import batch_size_factor, per_rank_batch

from . import records as job_list
from . import scheduler
from .cluster import Cluster, load_cluster
from .job_states import FORGOTTEN, job_states, outcome_of
from .task import StageTask

if TYPE_CHECKING:
    from tdds_dist.experiments.grid import PlannedJob, PlannedStage

_TRAINS = ("doctor", "collect", "retrain", "train")  # stages on the ranks of a training
_POLL_SECONDS = 5.0
_RECHECK_SECONDS = 1.0
# without an answer of SLURM about the jobs that are left, after which `--wait` ends
_SILENT_SECONDS = 120.0


def add_submit(stages: Parsers) -> None:
    """Add the subcommand `submit`."""
    stage = stages.add_parser(
        "submit",
        help="a stage or the whole pipeline as SLURM jobs",
        description=(
            "Submit jobs to a cluster, or to this machine (see configs/clusters/). pipeline: the"
            " collection, then the coresets, then an array of retrainings, then the report, each"
            " when the one before has succeeded; the section pipeline of the config says which."
            " Submitted again, it goes on: what is done is skipped."
        ),
    )
    stage.takes("config CONFIG.yaml", Path, "one of configs/, or your own")
    stage.takes("overrides key=value", str, "change a key of the config: train.lr=0.05", nargs="*")
    stage.takes("--cluster CLUSTER.yaml", Path, "what the jobs ask for", required=True)
    stage.choice(
        "--stage",
        ("doctor", "collect", "retrain", "pipeline", "train"),
        "what to submit; doctor: `tdds doctor` with what collect asks for; train: `tdds train`"
        " (default: pipeline)",
        dest="part",
        default="pipeline",
    )
    stage.flag("--dry-run", "print the plan and the sbatch files, submit nothing")
    stage.flag("--wait", "stay until the jobs are over, and leave with their outcome")
    retrain = stage.add_argument_group("of --stage retrain")
    retrain.add_argument(
        "--coreset", type=Path, metavar="FILE.npz", help="that `tdds select` wrote"
    )
    retrain.add_argument("--strategy", choices=("E", "P"), help="as in `tdds retrain`")
    retrain.add_argument(
        "--importance",
        choices=("none", "batch", "sample"),
        help="weight of the loss (default: the config's)",
    )
    retrain.add_argument(
        "--name", help="folder under retrain/ (default: coreset file, strategy, importance, seed)"
    )
    stage.set_defaults(run=run)


def run(options: argparse.Namespace) -> Outcome:
    """Submit what the command line says, and print it; return the exit code, and what `tdds submit
    --json` prints.

    Raises:
        InputError: it cannot run as asked, or the scheduler refuses it; nothing stays queued.
    """
    cluster = load_cluster(options.cluster)
    config = load_config(options.config, options.overrides)
    usual = config.run.directory / "jobs"
    log_dir = (Path(cluster.log_dir) / config.run.name if cluster.log_dir else usual).absolute()
    if "%" in str(log_dir):
        raise InputError(
            f"log_dir={log_dir}: SLURM takes % in paths of logs for its own; choose a path without"
        )
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    frozen = log_dir / f"{options.part}-{digest}.yaml"  # the name that its content decides
    stages = plan(config, cluster, options, frozen)
    waiting = [stage for stage in stages if stage.waiting]
    warnings = _warnings(config)
    collects = any(stage.name == "collect" for stage in waiting)
    needs = ""
    if collects and not warnings and (options.dry_run or cluster.gpu_memory):
        needs = _needs(config, cluster)

    def outcome(records: Sequence[job_list.JobRecord] = (), exit_code: int = 0) -> Outcome:
        """Return the object for `--json`; the same has been printed for people already."""
        data = {
            "stage": "submit",
            "stages": [
                {"name": stage.name, "jobs": len(stage.waiting), "done": stage.num_done}
                for stage in stages
            ],
            "jobs": [record.id for record in records],
            "log_dir": str(log_dir),
            "warnings": warnings,
            "next": command("status", config.run.directory),
            "exit_code": exit_code,
        }
        return Outcome(exit_code=exit_code, data=data)

    if options.dry_run:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        parts = [
            *([f"{needs}\n"] if needs else []),
            describe(stages, cluster, config.run.name),
            *_file_texts(waiting, cluster, config.run.name, log_dir),
        ]
        return replace(outcome(), text="\n".join(parts), is_the_product=True)
    if not waiting:
        done = [f"{len(stage.jobs)} x {stage.name}".removeprefix("1 x ") for stage in stages]
        print(f"everything is done: {', '.join(done)}{_page(stages, config)}")
        return outcome()
    with _alone(config.run.directory):
        before = (job_list.log_dir_of(config.run.directory), usual)
        _refuse_twice(waiting, {log_dir, *(folder.absolute() for folder in before)})
        _write(frozen, text, log_dir, config, cluster)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(describe(stages, cluster, config.run.name), flush=True)
        on_slurm = cluster.executor == "slurm"
        records = _submit_all(waiting, cluster, config, log_dir) if on_slurm else []
    if on_slurm:
        where = config.run.directory
        has_arrays = any("_" in record.id for record in records)
        tasks = f" ({len(records)} with the elements of arrays)" if has_arrays else ""
        print(
            f"submitted jobs {_ids(records)}{tasks}\nwatch:  {command('status', where)}\nlogs:  "
            f" {command('logs', where)}{' --out' * (options.part == 'doctor')}\nstop:   scancel"
            f" {_ids(records).replace(',', '')}",
            flush=True,
        )
        code = _wait_for(records, log_dir) if options.wait else 0
    else:
        code = _run_here(stages, cluster, config, log_dir, options)
    if options.part == "doctor" and options.wait:
        _show_output(log_dir)
    return outcome(records, code)


# ---- before submission


def plan(
    config: Config, cluster: Cluster, options: argparse.Namespace, frozen: Path
) -> "list[PlannedStage]":
    """Return the stages; raise InputError for what would otherwise fail only after jobs have waited
    in the queue."""
    from tdds_dist.experiments.grid import (
        PlannedJob,
        PlannedStage,
        check_what_is_done,
        one_run,
        pipeline_stages,
    )

    of_retrain = ("coreset", "strategy", "importance", "name")
    given = [key for key in of_retrain if getattr(options, key) is not None]
    if options.part != "retrain" and given:
        raise InputError(
            f"--{given[0]} belongs to --stage retrain; leave it out of --stage {options.part}"
        )
    if options.part == "retrain":
        stages = [_one_retraining(config, options, frozen, given)]
    elif options.part == "doctor":
        where = str(config.run.directory)
        stages = [
            PlannedStage("doctor", (PlannedJob("doctor", (("doctor", str(frozen)),), where),))
        ]
    elif options.part == "pipeline":
        stages = pipeline_stages(config, frozen)
    else:
        stages = [one_run(options.part, config, frozen)]
    trains = {stage.name for stage in stages} & {*_TRAINS}
    on_gpus = {name for name in trains if cluster.for_stage(name).gpus_per_node}
    if config.run.device == "cuda" and on_gpus != trains:
        raise InputError(
            "run.device='cuda' but the cluster file asks for no GPU; set gpus_per_node or"
            " run.device=auto"
        )
    check_batch(config, cluster, stages)
    check_what_is_done(config, stages)
    if config.run.device == "auto":
        return [_on_gpus(stage) if stage.name in on_gpus else stage for stage in stages]
    return stages


def _on_gpus(stage: "PlannedStage") -> "PlannedStage":
    """Return the stage with jobs that fail where torch cannot use the GPUs that they have, and do
    not train on the CPU beside them."""
    jobs = tuple(
        replace(job, commands=tuple((*words, "run.device=cuda") for words in job.commands))
        for job in stage.jobs
    )
    return replace(stage, jobs=jobs)


def _one_retraining(
    config: Config, options: argparse.Namespace, frozen: Path, given: list[str]
) -> "PlannedStage":
    from tdds_dist.experiments.grid import PlannedStage, Task, retrain_job
    from tdds_dist.runs.artifacts import load_coreset
    from tdds_dist.runs.directory import RunDir, retrain_name

    if missing := [f"--{key}" for key in ("coreset", "strategy") if key not in given]:
        raise InputError(f"--stage retrain needs {' and '.join(missing)}; see `tdds submit --help`")
    coreset = load_coreset(options.coreset)
    importance = options.importance or config.retrain.importance
    name = options.name or retrain_name(
        options.coreset, options.strategy, importance, config.run.seed
    )
    task = Task(
        name,
        RunDir(config.run.directory).retrain_run(name).path,
        config,
        options.coreset.absolute(),
        options.strategy,
        importance,
        coreset.pruning_rate,
    )
    return PlannedStage("retrain", (retrain_job(task, frozen),))


def _needs(config: Config, cluster: Cluster) -> str:
    """Return what the collection takes, as `tdds plan` says it; raise InputError when that cannot
    fit."""
    from tdds_dist.experiments.forecast import parse_bytes
    from tdds_dist.experiments.forecast import plan as plan_resources

    part = cluster.for_stage("collect")
    device = "cuda" if part.gpus_per_node else "cpu"
    on_nodes = config.changed("run", device=device)
    # a plan is for one number of ranks
    strategies = None if cluster.for_stage("retrain").num_ranks == part.num_ranks else ()
    memory = parse_bytes(part.gpu_memory, "gpu_memory") if part.gpus_per_node else None
    return plan_resources(
        on_nodes, num_ranks=part.num_ranks, gpu_memory_bytes=memory, strategies=strategies
    ).as_text()


def check_batch(config: Config, cluster: Cluster, stages: "Sequence[PlannedStage]") -> None:
    """Raise InputError when the ranks of a stage cannot share its batch evenly."""
    for stage in stages:
        if stage.name not in _TRAINS:
            continue
        num_ranks = cluster.for_stage(stage.name).num_ranks
        rates = {job.task.pruning_rate for job in stage.jobs if job.task is not None}
        for rate in sorted(rates):
            factor, at = 1.0, ""
            if stage.name == "retrain":
                factor = batch_size_factor(rate, config.retrain.batch_size_rule)
                at = f" at pruning rate {rate:g}"
            try:
                per_rank_batch(
                    config.train.global_batch_size, num_ranks, config.train.accumulation, factor
                )
            except InputError as error:
                raise InputError(f"{stage.name}{at} on {num_ranks} ranks: {error}") from error


def _warnings(config: Config) -> list[str]:
    """Warn of files that are missing here and may be there on the nodes."""
    files = {key: getattr(config.data, key) for key in ("train", "val")}
    missing = [f"data.{key}={file}" for key, file in files.items() if not Path(file).is_file()]
    said = f"{' and '.join(missing)} not found on this machine; the nodes must have it"
    return [said] if missing else []


def _write(frozen: Path, text: str, log_dir: Path, config: Config, cluster: Cluster) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        frozen.write_text(text)
        pointer = config.run.directory / job_list.POINTER_FILE
        if cluster.log_dir:
            pointer.parent.mkdir(parents=True, exist_ok=True)
            pointer.write_text(f"{log_dir}\n")
        else:
            pointer.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to log_dir={log_dir} ({error}); choose a writable directory"
        ) from error


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Keep a second submission of the run out until this one has said what it queued."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".submit.lock").open("w")
    except OSError as error:
        raise InputError(
            f"cannot write to run.dir={run} ({error}); choose a writable directory"
        ) from error
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_twice(stages: "list[PlannedStage]", log_dirs: set[Path]) -> None:
    """Raise InputError when jobs of an earlier submission are to do the same."""
    wanted = {
        (stage.name, os.path.abspath(job.directory)) for stage in stages for job in stage.waiting
    }
    before = [
        job
        for log_dir in log_dirs
        for job in job_list.read_jobs(log_dir)
        if (job.stage, os.path.abspath(job.directory)) in wanted
    ]
    states = job_states(before)
    if active := [job for job in before if states[job.id].is_active]:
        stop = "scancel" if active[0].executor == "slurm" else "kill -TERM"
        raise InputError(
            f"{len(active)} jobs of this run are queued or running ({_ids(active)}); wait for them,"
            f" or stop them with {stop} {_ids(active).replace(',', '')}"
        )
    asked = [states[job.id] for job in before if job.executor == "slurm"]
    if unknown := [
        state.reason
        for state in asked
        if state.state == "unknown" and not state.reason.startswith(FORGOTTEN)
    ]:
        raise InputError(
            f"cannot tell whether jobs of this run are still queued ({unknown[0]}); submit when"
            " SLURM answers"
        )


# ---- what it will be


def describe(stages: "list[PlannedStage]", cluster: Cluster, name: str) -> str:
    """Return the plan as a table."""
    lines = [f"{'stage':9} {'jobs':>5} {'done':>5}  each"]
    for stage in stages:
        part = cluster.for_stage(stage.name)
        gpus = f", {part.gpus_per_node} GPUs per node" if part.gpus_per_node else ""
        lines.append(
            f"{stage.name:9} {len(stage.waiting):5} {stage.num_done:5} "
            f" {part.nodes} node(s) x {part.ranks_per_node} rank(s){gpus}, at most"
            f" {part.time_minutes} minutes"
        )
    return "\n".join([f"{name}:", *lines])


def _page(stages: "list[PlannedStage]", config: Config) -> str:
    return (
        f"; the page: {config.run.directory / 'report.html'}" if stages[-1].name == "report" else ""
    )


def _file_texts(
    stages: "list[PlannedStage]", cluster: Cluster, name: str, log_dir: Path
) -> list[str]:
    before, texts = "", list[str]()
    for stage in stages:
        texts.append(f"\n# ---- {stage.name}: {', '.join(job.title for job in stage.waiting)}")
        texts += [f"#      {command(*words)}" for job in stage.waiting for words in job.commands]
        if cluster.executor == "slurm":
            after = [f"<id of {before}>"] if before else []
            part = cluster.for_stage(stage.name)
            texts.append(
                scheduler.sbatch_text(
                    part, f"{stage.name}-{name}", log_dir, len(stage.waiting), after
                )
            )
        before = stage.name
    return texts


# ---- submission and after


def _submit_all(
    stages: "list[PlannedStage]", cluster: Cluster, config: Config, log_dir: Path
) -> list[job_list.JobRecord]:
    """Queue the stages, and return their jobs; when one is refused, cancel those before."""
    records: list[job_list.JobRecord] = []
    after: list[str] = []
    submission = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        for stage in stages:
            found = _queue(stage, stage.waiting, cluster, config, log_dir, submission, after)
            records += [record for _, record in found]
            after = list(dict.fromkeys(record.id.split("_")[0] for _, record in found))
        for record in records:
            job_list.append_job(log_dir, record)
    except BaseException as error:
        scheduler.cancel([record.id for record in records])
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write to log_dir={log_dir} ({error}); nothing stays queued, choose a"
                " writable directory"
            ) from error
        raise
    return records


def _queue(
    stage: "PlannedStage",
    planned: "Sequence[PlannedJob]",
    cluster: Cluster,
    config: Config,
    log_dir: Path,
    submission: str,
    after: Sequence[str] = (),
) -> list[tuple[Any, job_list.JobRecord]]:
    """Hand jobs of a stage to the scheduler; return submitit's job of each, with its record."""
    part, name = cluster.for_stage(stage.name), f"{stage.name}-{config.run.name}"
    tasks = [
        StageTask(
            each.commands,
            log_dir,
            time_minutes=part.time_minutes,
            grace_seconds=part.grace_seconds,
            cpus_per_rank=part.cpus_per_rank if part.executor == "slurm" else 0,
            interface=part.interface,
        )
        for each in planned
    ]
    jobs = scheduler.submit(tasks, part, name, log_dir, after)
    records = [
        job_list.JobRecord(
            id=str(job.job_id),
            time=time.time(),
            submission=submission,
            executor=part.executor,
            stage=stage.name,
            name=name,
            title=each.title,
            after=tuple(after),
            num_ranks=part.num_ranks,
            directory=os.path.abspath(each.directory),
        )
        for each, job in zip(planned, jobs, strict=True)
    ]
    return list(zip(jobs, records, strict=True))


def _run_here(
    stages: "list[PlannedStage]",
    cluster: Cluster,
    config: Config,
    log_dir: Path,
    options: argparse.Namespace,
) -> int:
    """Run the stages in turn; a single one without `--wait` goes on in the background."""
    submission = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    waits = options.wait or options.part == "pipeline"
    for stage in stages:
        left, at_once = list(stage.waiting), cluster.for_stage(stage.name).array_parallelism
        running: list[tuple[Any, job_list.JobRecord]] = []
        while left or running:
            while left and len(running) < at_once:
                ((job, record),) = _queue(
                    stage, [left.pop(0)], cluster, config, log_dir, submission
                )
                job_list.append_job(log_dir, record)
                print(
                    f"{stage.name}: {record.title} is process {record.id}, log"
                    f" {job.task(0).paths.stderr}",
                    flush=True,
                )
                running.append((job, record))
            if not waits:
                return 0
            for job, record in [pair for pair in running if pair[0].done()]:
                running.remove((job, record))
                if code := _outcome_here(job, record, log_dir):
                    for _, other in running:
                        # submitit's controller passes it on, and the ranks save
                        os.kill(int(other.id), signal.SIGTERM)
                    return code
            time.sleep(_RECHECK_SECONDS)
    print(f"done{_page(stages, config)}")
    return 0


def _outcome_here(job: Any, record: job_list.JobRecord, log_dir: Path) -> int:
    """Return 0 when all ranks of a local job left a result; else the exit code, and print why."""
    ends = job_list.read_ends(log_dir, record.id)
    if all(
        outcome_of(job.task(rank).paths.result_pickle) == "success" for rank in range(job.num_tasks)
    ):
        print(f"{record.stage}: {record.title} is done", flush=True)
        return 0
    cause = job_list.first_cause(ends) or (ends[-1] if ends else None)
    said = (
        f"rank {cause.rank}: {cause.message}"
        if cause
        else "its ranks ended without a word; see the log"
    )
    print(f"{record.stage} failed: {record.title}: {said}", file=sys.stderr, flush=True)
    if cause and cause.traceback:
        print(cause.traceback, file=sys.stderr)
    return 2 if cause and cause.kind == "refused" else 1


def _wait_for(records: list[job_list.JobRecord], log_dir: Path) -> int:
    """Wait until all jobs are over; print why the first failed, and return the exit code."""
    said: dict[str, str] = {}
    silent_since: float | None = None
    while True:
        states = job_states(records)
        for record in records:
            state = states[record.id].state
            if said.get(record.id) != state:
                said[record.id] = state
                print(f"{record.name} {record.id} ({record.title}): {state}", flush=True)
        if any(states[record.id].is_active for record in records):
            silent_since = None
        elif not any(states[record.id].state == "unknown" for record in records):
            break
        else:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > _SILENT_SECONDS:
                break
        time.sleep(_POLL_SECONDS)
    failed = [record for record in records if states[record.id].state != "finished"]
    if not failed:
        return 0
    causes = [
        cause
        for record in failed
        if (cause := job_list.first_cause(job_list.read_ends(log_dir, record.id)))
    ]
    if causes:
        print(f"rank {causes[0].rank} on {causes[0].host}: {causes[0].message}", file=sys.stderr)
    return 2 if causes and causes[0].kind == "refused" else 1


def _show_output(log_dir: Path) -> None:
    """Print what rank 0 of the last job has printed: the table of a doctor."""
    last = job_list.read_jobs(log_dir)[-1]
    if (file := job_list.log_files(log_dir, last.id, "out").get(0)) is not None:
        print(file.read_text(errors="replace"), end="", flush=True)


def _ids(records: Sequence[job_list.JobRecord]) -> str:
    """Write ids as people do: those of an array once."""
    return ", ".join(dict.fromkeys(record.id.split("_")[0] for record in records))
