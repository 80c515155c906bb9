"""The schema of a cluster file: what a job asks the scheduler for, and how its ranks are started.

A cluster file says nothing about training and a config nothing about the scheduler, so any run goes
to any cluster.
"""

import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tdds_dist.config.schema import PathText, Section, parse_tree, read_tree
from tdds_dist.errors import InputError

_ON_ONE_RANK = ("select", "report")
_DOCTOR_MINUTES, _DOCTOR_GRACE_SECONDS = 10, 60  # it ends after one, and saves nothing
_GIVEN_AS_TEXT = r"^\S*$"
_OURS = (
    "array",
    "dependency",
    "error",
    "job-name",
    "kill-on-invalid-dep",
    "no-requeue",
    "open-mode",
    "output",
    "requeue",
    "signal",
)
_HAVE_KEYS = (
    "account",
    "constraint",
    "cpu-bind",
    "cpus-per-task",
    "gpus-per-node",
    "mem",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "partition",
    "qos",
    "time",
)
_OF_THE_WHOLE = ("executor", "log_dir", "stages")  # the same for every stage

StageName = Literal["collect", "select", "retrain", "report", "train", "doctor"]


class Cluster(Section):
    """The resources of one job. Counts are per job, per node or per rank, as the names say."""

    executor: Literal["slurm", "local"] = Field(
        description="slurm: sbatch and srun. local: processes on this machine."
    )
    nodes: int = Field(1, ge=1, description="Nodes of the job; executor=local has one.")
    ranks_per_node: int = Field(
        1, ge=1, description="Processes per node; one per GPU, or any number on the CPU."
    )
    gpus_per_node: int = Field(
        0,
        ge=0,
        description=(
            "GPUs per node, visible to all its ranks; 0 trains on the CPU. executor=local takes the"
            " first ones, whatever CUDA_VISIBLE_DEVICES says."
        ),
    )
    gpu_memory: str | None = Field(
        None,
        description=(
            "Memory of one GPU, e.g. 80GB: what cannot fit is then refused before it is queued"
            " (tdds plan)."
        ),
    )
    cpus_per_rank: int = Field(
        1,
        ge=1,
        description="CPU cores per rank, for decoding images; executor=local limits nothing.",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="Memory per node in GB; empty takes SLURM's default."
    )
    time_minutes: int = Field(
        ge=1,
        description=(
            "Time limit of a job in minutes. A job that meets it saves, and is queued again to"
            " go on."
        ),
    )
    partition: str | None = Field(
        None, pattern=_GIVEN_AS_TEXT, description="SLURM partition; empty takes the default."
    )
    account: str | None = Field(
        None, pattern=_GIVEN_AS_TEXT, description="SLURM account that pays."
    )
    qos: str | None = Field(None, pattern=_GIVEN_AS_TEXT, description="SLURM quality of service.")
    constraint: str | None = Field(None, description="SLURM node features, e.g. a100&ib.")
    extra: dict[str, str | int | bool] = Field(
        {},
        description=(
            "Other options of sbatch by their long names, e.g. {exclusive: true, reservation:"
            " maintenance}."
        ),
    )
    setup: tuple[str, ...] = Field(
        (),
        description=(
            "Lines of bash before the ranks start, on the first node, e.g. module load cuda."
        ),
    )
    venv: PathText | None = Field(
        None,
        description=(
            "Virtual environment whose python runs the job, on the nodes; empty means the one that"
            " submits."
        ),
    )
    container: str | None = Field(
        None,
        description=(
            "What starts a command in a container, e.g. apptainer exec --nv tdds.sif; python3, or"
            " that of venv, runs in it."
        ),
    )
    interface: str | None = Field(
        None,
        pattern=_GIVEN_AS_TEXT,
        description=(
            "Network interface of gloo and NCCL, e.g. ib0; empty takes the one that "
            "leads to the first node."
        ),
    )
    cpu_bind: str | None = Field(
        None,
        pattern=_GIVEN_AS_TEXT,
        description="srun's --cpu-bind, e.g. cores; empty leaves it to SLURM.",
    )
    array_parallelism: int = Field(8, ge=1, description="Retrainings at a time.")
    grace_seconds: int = Field(
        90,
        ge=10,
        description=(
            "How long before its time limit a job is asked to save and leave; more for large"
            " checkpoints."
        ),
    )
    requeue_time_limits: int = Field(
        100,
        ge=0,
        description=(
            "How often a job that met its time limit is queued again. Preemption and lost nodes do"
            " not count (but with time_minutes up to 10, submitit takes preemption for a time"
            " limit)."
        ),
    )
    requeue_failures: int = Field(
        3,
        ge=0,
        description=(
            "How often in a row, without a new checkpoint in between, a job that lost a rank is"
            " queued again."
        ),
    )
    log_dir: PathText | None = Field(
        None,
        description=(
            "Where logs and job files go, in a folder of the run's name; empty means jobs/ of the"
            " run directory. All nodes must see it."
        ),
    )
    stages: dict[StageName, dict[str, Any]] = Field(
        {},
        description=(
            "Other values of these keys for a stage, e.g. {retrain: {nodes: 1}}. select and report"
            " have one rank and no GPU unless it is said here; doctor has what collect has, for"
            " 10 minutes at most."
        ),
    )

    @property
    def num_ranks(self) -> int:
        """Return the world size of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def python(self) -> str:
        """Return the command that runs python on the nodes, as shell text."""
        usual = "python3" if self.container else sys.executable
        python = f"{self.venv}/bin/python" if self.venv else usual
        return f"{self.container} {shlex.quote(python)}" if self.container else shlex.quote(python)

    def for_stage(self, stage: str) -> "Cluster":
        """Return what the jobs of a stage get."""
        values = {key: getattr(self, key) for key in Cluster.model_fields if key != "stages"}
        if stage in _ON_ONE_RANK:
            values |= {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0}
        of_stages: dict[Any, dict[str, Any]] = self.stages
        changes = of_stages.get(stage, {})
        if stage == "doctor":
            values |= of_stages.get("collect", {})
            values["time_minutes"] = min(values["time_minutes"], _DOCTOR_MINUTES)
            values["grace_seconds"] = min(values["grace_seconds"], _DOCTOR_GRACE_SECONDS)
        return parse_tree(Cluster, values | changes, f"stages.{stage}")

    @model_validator(mode="after")
    def _check(self) -> "Cluster":
        if self.executor == "local" and self.nodes > 1:
            raise InputError(
                f"nodes={self.nodes} needs executor=slurm; executor=local is this machine, set"
                " nodes=1"
            )
        if 0 < self.gpus_per_node < self.ranks_per_node:
            raise InputError(
                f"gpus_per_node={self.gpus_per_node} is fewer than"
                f" ranks_per_node={self.ranks_per_node}; every rank needs its own, set"
                f" ranks_per_node={self.gpus_per_node}"
            )
        if self.grace_seconds >= 60 * self.time_minutes - 60:
            raise InputError(
                f"grace_seconds={self.grace_seconds} leaves less than a minute of time_minutes="
                f"{self.time_minutes}; lower the first or raise the second"
            )
        for key in self.extra:
            name = key.lstrip("-").replace("_", "-")
            if name in _OURS:
                raise InputError(f"extra: {key} is set by tdds; leave it out")
            if name in _HAVE_KEYS:
                raise InputError(f"extra: {key} has a key of its own in this file; set that")
        for stage, changes in self.stages.items():
            if fixed := [key for key in changes if key in _OF_THE_WHOLE]:
                raise InputError(
                    f"stages.{stage}: {fixed[0]} is the same for all stages; set it outside of"
                    " stages"
                )
            self.for_stage(stage)
        return self


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file; raise InputError naming file, key and rule for the first thing wrong."""
    must_hold = f"keys of a cluster: {', '.join(Cluster.model_fields)}"
    return parse_tree(Cluster, read_tree(path, (), must_hold, "configs/clusters/"), str(path))
