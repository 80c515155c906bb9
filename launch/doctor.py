"""The part of `tdds doctor` that knows the scheduler: its programs, and what it says to a cluster
file."""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tdds_dist.cli.options import Parsers
from tdds_dist.experiments.findings import Check, Finding, Visit, words_of

from . import scheduler
from .cluster import Cluster, load_cluster

_PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sacct")
_ANSWER_SECONDS = 20.0
_STAGES = ("collect", "select", "retrain", "report")


def extend_doctor(stages: Parsers) -> None:
    """Add `--cluster` to the subcommand `doctor`, which is there already."""
    stage = stages.choices["doctor"]
    stage.takes(
        "--cluster CLUSTER.yaml", Path, "ask SLURM what it says to this file as well, on rank 0"
    )
    stage.set_defaults(more_checks=cluster_checks)


def cluster_checks(options: argparse.Namespace) -> list[Check]:
    """Return the checks of a cluster file, none without one; raise InputError for a bad file."""
    if options.cluster is None:
        return []
    cluster = load_cluster(options.cluster)

    def check(visit: Visit) -> Iterator[Finding]:
        if visit.rank == 0:
            yield from _of_cluster(cluster, options.cluster)

    return [Check("cluster", check, 6 * _ANSWER_SECONDS)]


def _of_cluster(cluster: Cluster, path: Path) -> Iterator[Finding]:
    if cluster.executor == "local":
        yield Finding("scheduler", "SKIP", f"{path}: executor=local takes none")
        return
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    yield Finding(
        "scheduler",
        "FAIL" if missing else "OK",
        f"no {', '.join(missing)} here" if missing else ", ".join(_PROGRAMS),
        "the commands of SLURM",
        "submit from a login node, or use executor=local",
    )
    if "sbatch" in missing:
        return
    if "sacct" not in missing:
        yield _accounting()
    partition = _partition(cluster, path)
    yield partition
    if partition.state != "FAIL":
        parts = {stage: cluster.for_stage(stage) for stage in _STAGES}
        for stage, part in parts.items():
            if part not in [parts[name] for name in _STAGES[: _STAGES.index(stage)]]:
                yield _limits(part, stage, path)


def _accounting() -> Finding:
    try:
        said = _ask("sacct", "--noheader", "--allocations", "--starttime=now", "--format=jobid")
    except (OSError, subprocess.SubprocessError) as error:
        said = words_of(error)
    return Finding(
        "accounting",
        "WARN" if said.strip() else "OK",
        said.strip() or "sacct answers",
        "an answer, for the state of jobs that are over",
        "`tdds status` then says less; ask the administrators for accounting",
    )


def _partition(cluster: Cluster, path: Path) -> Finding:
    text = _ask("scontrol", "show", "partition", "--oneliner")
    states = dict(re.findall(r"PartitionName=(\S+).*? State=(\S+)", text))
    default = re.findall(r"PartitionName=(\S+).*? Default=YES", text)
    names = cluster.partition.split(",") if cluster.partition else default
    unknown = [name for name in names if name not in states]
    if unknown or not names:
        return Finding(
            "partition",
            "FAIL",
            f"{path}: "
            + (f"partition={unknown[0]} is none" if names else "empty, and SLURM has no default"),
            f"one of {', '.join(states) or text}",
            "set partition in the cluster file to one of these",
        )
    down = [name for name in names if states[name] != "UP"]
    return Finding(
        "partition",
        "WARN" if down else "OK",
        ", ".join(f"{name} {states[name]}" for name in names),
        "UP",
        "choose another partition, or wait",
    )


def _limits(part: Cluster, stage: str, path: Path) -> Finding:
    accepted, said = scheduler.would_take(part, f"{stage}-doctor", _ANSWER_SECONDS)
    gpus = f", {part.gpus_per_node} GPUs" if part.gpus_per_node else ""
    return Finding(
        f"job of {stage}",
        "OK" if accepted else "FAIL",
        said,
        f"{part.nodes} x ({part.ranks_per_node} ranks of {part.cpus_per_rank} CPUs{gpus}) for"
        f" {part.time_minutes} min",
        f"adapt {path} to the limits (`sinfo -o '%P %l %D %c %m %G'`)",
    )


def _ask(*command: str) -> str:
    """Return what a command of SLURM prints, its errors too."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
    )
    return done.stdout + done.stderr
