"""The schema of a cluster file: what a job asks the scheduler for, and how that is told to submitit.

A cluster file says nothing about training and a config nothing about the scheduler, so any run goes to any cluster.
"""

import difflib
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from tdds_dist.config import Section
from tdds_dist.errors import InputError

END_TOGETHER = ("--kill-on-bad-exit=1", "--wait=60")  # one rank down: all down, not a job that waits for its time limit
_GIVEN_AS_TEXT = r"^\S*$"


class Cluster(Section):
    """What one job gets. Counts are per job, per node or per rank, as the names say."""

    executor: Literal["slurm", "local"] = Field(description="slurm: sbatch and srun. local: processes on this machine.")
    nodes: int = Field(1, ge=1, description="Nodes of the job; executor=local has one.")
    ranks_per_node: int = Field(1, ge=1, description="Processes per node; one per GPU, or any number on the CPU.")
    gpus_per_node: int = Field(
        0, ge=0, description="GPUs per node, visible to all its ranks; 0 trains on the CPU. executor=local takes the "
                             "first ones, whatever CUDA_VISIBLE_DEVICES says.")
    cpus_per_rank: int = Field(
        1, ge=1, description="CPU cores per rank, for decoding images; executor=local limits nothing.")
    memory_gb: float | None = Field(None, gt=0, description="Memory per node in GB; empty takes SLURM's default.")
    time_minutes: int = Field(ge=1, description="Time limit of the job in minutes; the job is ended shortly before it.")
    partition: str | None = Field(None, pattern=_GIVEN_AS_TEXT, description="SLURM partition; empty takes the default.")
    account: str | None = Field(None, pattern=_GIVEN_AS_TEXT, description="SLURM account that pays.")
    qos: str | None = Field(None, pattern=_GIVEN_AS_TEXT, description="SLURM quality of service.")
    constraint: str | None = Field(None, description="SLURM node features, e.g. a100&ib.")
    setup: tuple[str, ...] = Field(
        (), description="Lines of bash before the ranks start, e.g. export GLOO_SOCKET_IFNAME=lo.")
    log_dir: str | None = Field(
        None, description="Where logs and job files go; empty means jobs/ of the run directory. All nodes must see it.")

    @property
    def num_ranks(self) -> int:
        """World size of the job."""
        return self.nodes * self.ranks_per_node

    @model_validator(mode="after")
    def _check(self) -> "Cluster":
        if self.executor == "local" and self.nodes > 1:
            raise InputError(f"nodes={self.nodes} needs executor=slurm; executor=local is this machine, set nodes=1")
        if 0 < self.gpus_per_node < self.ranks_per_node:
            raise InputError(f"gpus_per_node={self.gpus_per_node} is fewer than ranks_per_node={self.ranks_per_node}; "
                             f"every rank needs its own, set ranks_per_node={self.gpus_per_node}")
        return self

    def executor_options(self) -> dict[str, Any]:
        """Arguments of submitit's AutoExecutor other than the folder."""
        if self.executor == "slurm":
            return {"cluster": "slurm"}
        if not self.setup:
            return {"cluster": "local"}
        # submitit's own `setup` of its local executor takes the parent of its controller for the shell that it started;
        # where sh is a bash that replaces itself by its last command, that is this process, and the job is never found.
        lines = "\n".join([*self.setup, 'exec "$0" "$@"'])
        return {"cluster": "local", "local_python": shlex.join(["bash", "-c", lines, sys.executable])}

    def job_parameters(self, name: str) -> dict[str, Any]:
        """Arguments of AutoExecutor.update_parameters; None leaves a parameter out."""
        return {
            "name": name,
            "nodes": self.nodes,
            "tasks_per_node": self.ranks_per_node,
            "gpus_per_node": self.gpus_per_node or None,
            "cpus_per_task": self.cpus_per_rank,
            "mem_gb": self.memory_gb,
            "timeout_min": self.time_minutes,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_setup": list(self.setup) or None,
            # Since SLURM 22.05 srun does not take the number of CPUs over from sbatch: each rank would get one.
            "slurm_srun_args": [*END_TOGETHER, f"--cpus-per-task={self.cpus_per_rank}"],
            "slurm_additional_parameters": {"no-requeue": True},
        }


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file; InputError naming file, key and rule for the first thing wrong."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; configs/clusters/ holds examples")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold keys of a cluster: {', '.join(Cluster.model_fields)}")
    if isinstance(tree.get("setup"), list):
        tree["setup"] = tuple(tree["setup"])
    try:
        return Cluster.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {_one_line(error)}") from error


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":  # ours, complete
        return str(first["ctx"]["error"])
    key, fields = str(first["loc"][0]), Cluster.model_fields
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
        return f"unknown key {key!r}; the nearest valid key is {near[0]!r} (valid: {', '.join(fields)})"
    if first["type"] == "missing":
        return f"key {key!r} is missing; {fields[key].description}"
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}; {fields[key].description}"
