"""Submission: cluster files, what is checked before, what SLURM is handed, and real jobs of this
machine.

No SLURM is needed: stand-ins for its commands keep what they are given.
`tests/golden/sbatch_<cluster>.txt` holds the sbatch files of a pipeline for each cluster file that
is shipped. After a change that is meant,

    TDDS_WRITE_GOLDEN=1 .venv/bin/pytest tests/launch/test_submit.py -k golden

writes them anew; read the diff, then commit it.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from submitit.core.utils import DelayedSubmission

from tdds_dist import __main__ as program
from tdds_dist.cli import parser
from tdds_dist.config.run import load_config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.launch import submit as submit_module
from tdds_dist.launch.cluster import Cluster, load_cluster
from tdds_dist.launch.records import (
    EndRecord,
    append_end,
    log_dir_of,
    log_files,
    read_ends,
    read_jobs,
)
from tdds_dist.launch.task import StageTask
from tdds_dist.runs.artifacts import Coreset, Fingerprint, load_coreset, load_scores, save_coreset
from tdds_dist.runs.directory import RunDir
from tdds_dist.training.retrain import resolve
from tests import jobs
from tests.make import table

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("collect", "select", "retrain", "report")
CLUSTERS = REPOSITORY / "configs" / "clusters"
GOLDEN = REPOSITORY / "tests" / "golden"
SHIPPED = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
SETTINGS = {name: yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text()) for name in SHIPPED}
ON_SLURM = [name for name in SHIPPED if SETTINGS[name]["executor"] == "slurm"]
ONE_RANK = "{executor: local, time_minutes: 5}"
SLURM = "{executor: slurm, time_minutes: 5}"


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def submit(config_file, tmp_path, capfd):
    """`tdds submit` of the small config: a function that returns the exit code and keeps what it
    printed as `out` and `err`."""

    def submit(*words, cluster=SLURM):
        path = cluster if isinstance(cluster, Path) else write(tmp_path / "cluster.yaml", cluster)
        capfd.readouterr()
        code = program.main(["submit", str(config_file), "--cluster", str(path), *map(str, words)])
        submit.out, submit.err = capfd.readouterr()
        return code

    return submit


@pytest.fixture
def coreset(tmp_path):
    """At pruning rate 0.8."""
    path, ones_M = tmp_path / "mine.npz", np.ones(24, np.float32)
    save_coreset(path, Coreset(np.arange(24), ones_M, "random", 0.8, Fingerprint(120, 10, "")))
    return path


# ---- cluster files


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cluster_files_load_for_every_stage(name):
    cluster = load_cluster(CLUSTERS / f"{name}.yaml")
    for stage in STAGES:
        part = cluster.for_stage(stage)
        assert part.stages == {}
        if stage in ("select", "report"):
            assert (part.num_ranks, part.gpus_per_node) == (1, 0)
        else:
            assert part.gpus_per_node in (0, part.ranks_per_node)
        for key, value in cluster.stages.get(stage, {}).items():
            assert getattr(part, key) == value
    # how to use it
    assert f"configs/clusters/{name}.yaml" in (CLUSTERS / f"{name}.yaml").read_text()


def test_every_key_of_a_cluster_file_has_its_sentence():
    assert all(
        field.description and field.description.endswith(".")
        for field in Cluster.model_fields.values()
    )


def test_a_stage_takes_what_is_its_own_and_the_rest_from_the_others(tmp_path):
    text = """{executor: slurm, time_minutes: 60, nodes: 4, ranks_per_node: 8, gpus_per_node: 8, setup: [a], extra: {nice: 1},
               grace_seconds: 900, stages: {retrain: {nodes: 1, setup: [b, c], time_minutes: 30}, select: {ranks_per_node: 2, extra: {}}}}"""
    cluster = load_cluster(write(tmp_path / "cluster.yaml", text))
    collect, select, retrain, report = (cluster.for_stage(stage) for stage in STAGES)
    assert [part.num_ranks for part in (collect, retrain, select, report)] == [32, 8, 2, 1]
    assert (collect.setup, retrain.setup, report.setup) == (("a",), ("b", "c"), ("a",))
    assert (collect.extra, select.extra) == ({"nice": 1}, {})
    assert [part.gpus_per_node for part in (collect, select, retrain, report)] == [8, 0, 8, 0]
    assert [part.time_minutes for part in (collect, select, retrain, report)] == [60, 60, 30, 60]
    doctor = cluster.for_stage("doctor")
    assert (doctor.num_ranks, doctor.gpus_per_node) == (32, 8)
    assert (doctor.time_minutes, doctor.grace_seconds) == (10, 60), "however long a save takes"


# a whole file, or keys beside executor=slurm and time_minutes=5 -> words of the message
BAD_CLUSTERS = table("""
partion: gpu -> unknown key 'partion'; the nearest valid key is 'partition'
{executor: slurm} -> key 'time_minutes' is missing; Time limit of a job
{executor: pbs, time_minutes: 5} -> executor='pbs': input should be 'slurm' or 'local'; slurm: sbatch and srun
nodes: '2' -> nodes='2': input should be a valid integer; Nodes of the job
ranks_per_node: 0 -> ranks_per_node=0: input should be greater than
partition: a b -> partition='a b': string should match pattern
setup: export A=1 -> setup='export A=1': input should be a valid tuple
setup: [1] -> setup.0=1: must be text; put it in quotes
{executor: local, time_minutes: 5, nodes: 2} -> nodes=2 needs executor=slurm; executor=local is this machine, set
ranks_per_node: 4, gpus_per_node: 2 -> gpus_per_node=2 is fewer than ranks_per_node=4; every rank needs its own, set ranks_per_node=2
{executor: slurm, time_minutes: 2, grace_seconds: 60} -> grace_seconds=60 leaves less than a minute of time_minutes=2; lower the first or raise the second
{executor: slurm, time_minutes: 2} -> grace_seconds=90 leaves less than a minute of time_minutes=2
grace_seconds: 9 -> grace_seconds=9: input should be greater than
log_dir: 3 -> log_dir=3: must be text; put it in quotes
memory_gb: 0 -> memory_gb=0: input should be greater than 0; Memory per node
requeue_failures: -1 -> requeue_failures=-1: input should be greater
extra: [exclusive] -> extra=('exclusive',): input should be a valid dictionary
extra: {gres: [gpu]} -> extra.gres.str=('gpu',): input should be a valid
stages: {training: {nodes: 1}} -> stages.training='training': input should be 'collect', 'select'
stages: {select: 3} -> stages.select=3: input should be a valid dictionary
stages: {retrain: {node: 1}} -> stages.retrain: unknown key 'node'; the nearest
stages: {retrain: {nodes: 0}} -> stages.retrain: nodes=0: input should be greater
stages: {report: {time_minutes: 1}} -> stages.report: grace_seconds=90 leaves less
stages: {select: {gpus_per_node: 1, ranks_per_node: 2}} -> stages.select: gpus_per_node=1 is fewer than ranks_per_node=2
{executor: local, time_minutes: 5, stages: {retrain: {nodes: 2}}} -> stages.retrain: nodes=2 needs executor=slurm
stages: {retrain: {executor: local}} -> stages.retrain: executor is the same for all stages; set it outside of stages
stages: {retrain: {log_dir: x}} -> stages.retrain: log_dir is the same for all stages; set it outside of stages
stages: {retrain: {stages: {}}} -> stages.retrain: stages is the same for all stages; set it outside of stages
stages: {retrain: {extra: {signal: x}}} -> stages.retrain: extra: signal is set by
[slurm] -> must hold keys of a cluster: executor, nodes
{executor: [ -> is not plain YAML
""")
SET_BY_TDDS = "output --error job-name array dependency signal requeue no-requeue open-mode".split()
# would take back what the file says
OWN_KEYS = "job_name no_requeue kill_on_invalid_dep nodes time ntasks_per_node mem".split()
BAD_CLUSTERS += [
    (f"extra: {{{key}: x}}", f"extra: {key} is set by tdds; leave it out") for key in SET_BY_TDDS
]
BAD_CLUSTERS += [(f"extra: {{{key}: 7}}", key) for key in OWN_KEYS]


@pytest.mark.parametrize(("text", "message"), BAD_CLUSTERS)
def test_bad_cluster_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "cluster.yaml"
    text = text if text[0] in "{[" else f"{{executor: slurm, time_minutes: 5, {text}}}"
    with pytest.raises(InputError) as caught:
        load_cluster(write(path, text))
    said = str(caught.value)
    assert message in said
    assert str(path) in said
    assert "\n" not in said


def test_cluster_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="does not exist; configs/clusters/ holds examples"):
        load_cluster(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not plain YAML"):
        load_cluster(tmp_path / "binary.yaml")


# ---- checks before submission


RETRAIN = "--stage retrain --coreset CORESET --strategy E"
COLLECT = ["--stage", "collect"]
ON_CPU = "gpus_per_node: 1, stages: {retrain: {gpus_per_node: 0}}"
# keys of a cluster file with executor: slurm, or all of it -> words -> what is said
BAD_INPUT = table(f"""
nodes: 2, ranks_per_node: 8 -> --stage collect -> collect on 16 ranks: train.global_batch_si
ranks_per_node: 8 -> --stage pipeline -> retrain at pruning rate 0.8 on 8 ranks: train.global_batch_size=24 x 0.5 (retrain.batch_size_rule)
stages: {{retrain: {{ranks_per_node: 7}}}} -> -> retrain at pruning rate 0.5 on 7 ranks: train
ranks_per_node: 8 -> {RETRAIN} -> retrain at pruning rate 0.8 on 8 ranks
{ON_CPU} -> run.device=cuda -> the cluster file asks for no GPU
{ONE_RANK} -> train.epochs=2 -> T=3 is longer than train.epochs=2
{ONE_RANK} -> --stage collect --strategy E -> --strategy belongs to --stage retrain; leave it out
{ONE_RANK} -> --name x -> --name belongs to --stage retrain; leave it out of --stage pipeline
{ONE_RANK} -> --stage retrain --strategy E -> --stage retrain needs --coreset; see `tdds submit --help`
{ONE_RANK} -> --stage retrain --coreset CORESET -> --stage retrain needs --strategy
{ONE_RANK} -> --stage retrain --coreset no.npz --strategy E -> no.npz does not exist
{ONE_RANK} -> --stage retrain --coreset {__file__} --strategy E -> {__file__}
{ONE_RANK} -> --stage collect run.device=cuda -> no GPU; set gpus_per_node or run.device
{ONE_RANK} -> {RETRAIN} --name ../other -> --name='../other' must be letters, digits and
{ONE_RANK} -> {RETRAIN} train.accumulation=7 -> is not divisible by world_size=1 x train.accumulation=7
{ONE_RANK} -> pipeline.pruning_rates=[0.7] -> pipeline.pruning_rates has 0.7, which no window of score.windows serves
""")


@pytest.mark.parametrize(("cluster", "words", "message"), BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(
    submit, coreset, tmp_path, cluster, words, message
):
    words = shlex.split(words.replace("CORESET", str(coreset)))
    if not cluster.startswith("{"):
        cluster = f"{{executor: slurm, time_minutes: 5, {cluster}}}"
    for also in ([], ["--dry-run"]):
        assert submit(*words, *also, cluster=cluster) == 2
        assert submit.err.startswith("tdds submit: error: ")
        assert message in submit.err
        assert (submit.err.count("\n"), submit.out) == (1, "")
    assert not (tmp_path / "run").exists()


def test_a_log_folder_that_cannot_be_written_is_one_line(submit):
    assert submit(cluster="{executor: local, time_minutes: 5, log_dir: /dev/null}") == 2
    assert "cannot write to log_dir=/dev/null/tiny" in submit.err
    assert "choose a writable directory" in submit.err
    assert submit.err.count("\n") == 1


def test_retrain_batch_may_fit_by_the_batch_size_rule(submit, coreset):
    """24 is not divisible by 18 ranks, but a coreset at 0.8 may bring it down to 18."""
    cluster = "{executor: slurm, time_minutes: 5, ranks_per_node: 18}"
    words = ["--dry-run", "retrain.batch_size_rule={0.8: 0.75}"]
    retrain = f"--stage retrain --coreset {coreset} --strategy P".split()
    assert submit(*words, *retrain, cluster=cluster) == 0
    assert submit(*words, *COLLECT, cluster=cluster) == 2


# ---- what SLURM is handed, with stand-ins for its commands


class Slurm:
    """Commands of SLURM that keep what they are given. Jobs are numbered from 4242."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.queue("")
        for name, body in {
            "srun": "exit 1",
            "scontrol": "exit 1",
            "sacct": "exit 1",
            "scancel": 'echo "$@" >>scancel.txt',
            "squeue": "cat squeue.txt",
            "sbatch": (
                "n=$(($(cat number.txt 2>/dev/null || echo 0) + 1)); echo $n >number.txt; env"
                ' >$n.env\nif [ "$n" = "$(cat refused.txt 2>/dev/null)" ]; then cat said.txt >&2;'
                ' exit 1; fi\ncp "$1" $n.sh; echo "Submitted batch job $((4241 + n))"'
            ),
        }.items():
            write(folder / name, f"#!/bin/sh\ncd {folder}\n{body}\n").chmod(0o755)

    def refuse(self, number, said):
        """The sbatch of this number, from 1."""
        write(self.folder / "refused.txt", str(number))
        write(self.folder / "said.txt", f"{said}\n")

    def queue(self, text):
        """What squeue says: per job `id STATE`."""
        lines = [
            f"{job}|{state}|0|0:01|0||Priority"
            for job, state in (line.split() for line in text.splitlines())
        ]
        write(self.folder / "squeue.txt", "\n".join(lines))

    @property
    def handed(self):
        """The sbatch files, in order."""
        return [path.read_text() for path in sorted(self.folder.glob("*.sh"))]

    @property
    def cancelled(self):
        path = self.folder / "scancel.txt"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, number):
        """Of the sbatch of this number."""
        lines = (self.folder / f"{number}.env").read_text().splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    stand_in = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{stand_in.folder}:{os.environ['PATH']}")
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))]:
        monkeypatch.delenv(key)
    return stand_in


def printed_files(text):
    """The sbatch files that `--dry-run` printed, by stage."""
    parts = re.split(r"^# ---- (\w+): .*\n(?:#      tdds .*\n)*", text, flags=re.M)[1:]
    return {stage: file.strip("\n") for stage, file in zip(parts[::2], parts[1::2], strict=True)}


EIGHT_RANKS = "train.global_batch_size=32"  # half of it at pruning rate 0.8


@pytest.mark.parametrize("name", ON_SLURM)
def test_golden_sbatch_files(submit, tmp_path, name):
    words = ["--dry-run", EIGHT_RANKS, "pipeline.scores=[tdds, random, ccs]"]
    assert submit(*words, cluster=CLUSTERS / f"{name}.yaml") == 0
    files = printed_files(submit.out)
    assert list(files) == list(STAGES)
    text = "".join(f"======== {stage}\n{file}\n" for stage, file in files.items())
    text = text.replace(str(tmp_path / "run" / "jobs"), "FOLDER").replace(sys.executable, "PYTHON")
    golden = GOLDEN / f"sbatch_{name}.txt"
    if os.environ.get("TDDS_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_golden_file_is_of_a_cluster_that_is_shipped():
    names = sorted(path.name for path in GOLDEN.glob("sbatch_*.txt"))
    assert names == [f"sbatch_{name}.txt" for name in ON_SLURM]


EVERYTHING = """
{executor: slurm, nodes: 2, ranks_per_node: 3, cpus_per_rank: 5, memory_gb: 0.5, time_minutes: 30,
 partition: p1, account: acc, qos: high, constraint: a100&ib, grace_seconds: 77, requeue_failures: 9,
 extra: {exclusive: true, reservation: main tenance, overcommit: false, --nice: 100},
 array_parallelism: 1, setup: ["module load 'cuda 12'", 'export A="$HOME"'], venv: /envs/t d,
 container: apptainer exec --nv x.sif, interface: ib0, cpu_bind: cores,
 stages: {retrain: {nodes: 1, setup: [], memory_gb: 3}, select: {partition: cpu, extra: {}}}}
"""


def flags_of(text):
    return sorted(re.findall("^#SBATCH (?:--)?(.*)", text, re.M))


def test_sbatch_file_has_everything_that_the_cluster_file_says(submit, tmp_path, slurm):
    """And what is printed is what is handed over, but for the ids of jobs, which only SLURM
    knows."""
    words = ["train.global_batch_size=48", "pipeline.scores=[tdds, random]"]
    assert submit(*words, "--dry-run", cluster=EVERYTHING) == 0
    assert slurm.handed == []
    assert not (tmp_path / "run").exists()
    printed = printed_files(submit.out)
    assert submit(*words, cluster=EVERYTHING) == 0
    for number, (stage, handed) in enumerate(zip(STAGES, slurm.handed, strict=True)):
        before = f"--dependency='afterok:<id of {STAGES[number - 1]}>'"
        after = f"--dependency=afterok:{4242 + number - 1}"
        assert (before in printed[stage]) == (number > 0)
        assert handed.strip("\n") == printed[stage].replace(before, after)
        assert ("--array=" in handed) == (stage == "retrain")
        assert ("kill-on-invalid-dep=yes" in handed) == ("--dependency" in handed) == (number > 0)
    collect, select, retrain, _ = slurm.handed
    folder = tmp_path / "run" / "jobs"
    python = "apptainer exec --nv x.sif '/envs/t d/bin/python'"
    asked = f"""account=acc constraint='a100&ib' cpus-per-task=5 error={folder}/%j_0_log.err exclusive
        job-name=collect-tiny mem=512MB nice=100 nodes=2 ntasks-per-node=3 open-mode=append
        output={folder}/%j_0_log.out partition=p1 qos=high requeue signal=USR2@77 time=30"""
    assert flags_of(collect) == sorted([*asked.split(), "reservation='main tenance'"])
    setup = "module load 'cuda 12'\nexport A=\"$HOME\"\n"
    assert f"\nexport TDDS_JOB_STARTED=$(date +%s)\n{setup}set +eu  # " in collect
    (srun,) = (line for line in collect.splitlines() if line.startswith("srun "))
    for word in ("--kill-on-bad-exit=1", "--cpus-per-task=5", "--cpu-bind=cores"):
        assert f" {word} " in srun
    assert re.search(r" --wait=[1-9]\d* ", srun)
    assert srun.endswith(f" {python} -u -m submitit.core._submit {folder}")
    assert (
        f"\ncode=$?\nkill $watch\n{python} -m tdds_dist.launch.requeue {folder} $code 6 9; code=$?\nif [ $code -eq 75 ];"
        " then\n" in collect
    )
    requeued = '[ $code -ne 77 ] || scontrol requeue "$SLURM_JOB_ID"'
    assert collect.endswith(f"\nfi\n{requeued}\nexit $code")
    asked = f"nodes=1 ntasks-per-node=3 mem=3GB array=0-3%1 output={folder}/%A_%a_0_log.out"
    assert {*asked.split()} <= set(flags_of(retrain))
    assert "module load" not in retrain
    assert {"nodes=1", "ntasks-per-node=1", "partition=cpu", "mem=512MB"} <= set(flags_of(select))
    assert "exclusive" not in flags_of(select)


def test_sbatch_file_asks_for_nothing_that_is_not_said(submit, tmp_path, slurm):
    """In a folder whose name has a space."""
    folder = f"{tmp_path}/a b/jobs"
    assert submit(*COLLECT, f"run.dir={tmp_path}/a b", "--dry-run") == 0
    printed = printed_files(submit.out)
    assert submit(*COLLECT, f"run.dir={tmp_path}/a b") == 0
    (text,) = slurm.handed
    assert text.strip("\n") == printed["collect"]
    asked = "cpus-per-task=1 job-name=collect-tiny nodes=1 ntasks-per-node=1 open-mode=append requeue signal=USR2@90 time=5"
    logs = [f"error='{folder}/%j_0_log.err'", f"output='{folder}/%j_0_log.out'"]
    assert flags_of(text) == sorted([*asked.split(), *logs])
    assert f" {sys.executable} -u -m submitit.core._submit '{folder}'\n" in text
    assert f"-m tdds_dist.launch.requeue '{folder}' $code" in text
    assert "wckey" not in text


@pytest.mark.parametrize(
    ("venv", "container", "python"),
    [
        (None, None, sys.executable),
        ("/e", None, "/e/bin/python"),
        (None, "docker run x", "docker run x python3"),
        ("/e", "docker run x", "docker run x /e/bin/python"),
        ("~/env", None, "/home/x/env/bin/python"),
        ("$HOME/env", None, "/home/x/env/bin/python"),
    ],
)
def test_the_python_of_the_jobs(monkeypatch, venv, container, python):
    monkeypatch.setenv("HOME", "/home/x")
    cluster = Cluster(executor="slurm", time_minutes=5, venv=venv, container=container)
    assert cluster.python == python


def test_every_stage_waits_for_the_one_before_and_is_listed(submit, tmp_path, slurm):
    assert submit(EIGHT_RANKS, "run.device=auto", cluster=CLUSTERS / "gpu.yaml") == 0
    run, listed = tmp_path / "run", read_jobs(tmp_path / "run" / "jobs")
    names = ["tdds_p0.5_E_batch_seed0", "tdds_p0.8_E_batch_seed0"]
    assert [(job.id, job.stage, job.after, job.num_ranks) for job in listed] == [
        ("4242", "collect", (), 8),
        ("4243", "select", ("4242",), 1),
        ("4244_0", "retrain", ("4243",), 8),
        ("4244_1", "retrain", ("4243",), 8),
        ("4245", "report", ("4244",), 1),
    ]
    assert len({job.submission for job in listed}) == 1
    assert {(job.executor, job.host) for job in listed} == {("slurm", socket.gethostname())}
    retrained = [run / "retrain" / name for name in names]
    assert [Path(job.directory) for job in listed] == [run, run, *retrained, run]
    assert [job.title for job in listed if job.stage == "retrain"] == names
    assert "submitted jobs 4242, 4243, 4244, 4245 (5 with the elements of arrays)\n" in submit.out
    assert f"tdds status {run}\n" in submit.out
    assert "scancel 4242 4243 4244 4245\n" in submit.out
    size = r"1 node\(s\) x 8 rank\(s\), 8 GPUs per node, at most 1440 minutes"
    assert re.search(rf"retrain +2 +0  {size}", submit.out)
    (frozen,) = (run / "jobs").glob("*.yaml")
    cluster = load_cluster(CLUSTERS / "gpu.yaml")
    for job in listed:  # what each job will run is there, under its id
        task = DelayedSubmission.load(run / "jobs" / f"{job.id}_submitted.pkl")
        assert task._timeout_min == cluster.for_stage(job.stage).time_minutes
        assert task._timeout_countdown == 100
        assert isinstance(task.function, StageTask)
        assert task.function.cpus_per_rank == 8
        assert task.function.commands[0][0] in (job.stage, "score")
        if job.stage in ("collect", "retrain"):
            assert task.function.commands[0][1] == str(frozen)
            # a node whose driver is too old fails, and does not train on its CPU
            assert task.function.commands[0][-1] == "run.device=cuda"
        else:
            assert "run.device=cuda" not in task.function.commands[0]


@pytest.fixture
def finish(config_file):
    """Leaves what a collection leaves that is done, or a retraining on this coreset."""

    def finish(coreset=None, name=""):
        config = load_config(config_file)
        run, setting = RunDir(config.run.directory), {"stage": "collect"}
        if coreset is not None:
            found = load_coreset(coreset)
            run, config, setting = resolve(config, found, coreset, "E", "batch", name)
        run.start(to_dict(config), setting, 1, "cpu")
        write(run.result_file, "{}")

    return finish


def test_what_is_done_is_not_submitted_and_nothing_waits_for_it(
    submit, tmp_path, slurm, coreset, finish
):
    run = tmp_path / "run"
    finish()
    finish(coreset, "tdds_p0.8_E_batch_seed0")
    assert submit() == 0
    assert [(job.stage, job.after) for job in read_jobs(run / "jobs")] == [
        ("select", ()),
        ("retrain", ("4242",)),
        ("report", ("4243",)),
    ]
    assert "--array" not in "".join(slurm.handed)
    slurm.queue("4242 COMPLETED\n4243 COMPLETED\n4244 COMPLETED")
    finish(coreset, "tdds_p0.5_E_batch_seed0")
    (run / "report.html").touch()
    assert submit() == 0
    done = "everything is done: collect, select, 2 x retrain, report; the page:"
    assert submit.out == f"{done} {run}/report.html\n"
    assert len(slurm.handed) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    table("""
    train.lr=0.5 -> train.lr was 0.05, now 0.5
    retrain.epochs=7 -> train.epochs was 3, now 7
    -> tdds_p0.8_E_batch_seed0 was trained before the collection that is there now had finished; remove it
    train.log_every=3 ->
    pipeline.seeds=[0, 1] ->
    score.on_nan=quarantine ->
    run.timeout_seconds=9.0 ->
    """),
)
def test_what_is_done_with_other_settings_is_not_taken_for_done(
    submit, tmp_path, slurm, coreset, finish, override, message
):
    run, name = tmp_path / "run", "tdds_p0.8_E_batch_seed0"
    finish()
    (run / "coresets").mkdir()
    shutil.copy(coreset, run / "coresets" / "tdds_p0.8.npz")
    finish(run / "coresets" / "tdds_p0.8.npz", name)
    if not override:
        os.utime(run / "retrain" / name / "result.json", (1e9, 1e9))
    assert submit(*override.split("\n") if override else ()) == (2 if message else 0)
    assert message in submit.err
    assert submit.err.count("\n") == bool(message)
    assert bool(slurm.handed) != bool(message)
    if not override:
        shutil.rmtree(run / "retrain" / name)
        assert submit() == 0


def test_one_retraining(submit, tmp_path, slurm, coreset):
    words = ["--stage", "retrain", "--coreset", coreset, "--strategy", "P"]
    assert submit(*words) == 0
    assert submit(*words, "--importance", "sample", "--name", "other", "run.seed=4") == 0
    run = tmp_path / "run"
    expected = [("batch", "mine_P_batch_seed0", 0), ("sample", "other", 4)]
    for job, (importance, name, seed) in zip(read_jobs(run / "jobs"), expected, strict=True):
        assert job.directory == str(run / "retrain" / name)
        task = DelayedSubmission.load(run / "jobs" / f"{job.id}_submitted.pkl").function
        options = parser.parse(task.commands[0])
        assert (options.importance, options.name) == (importance, name)
        assert (options.coreset, options.strategy) == (coreset, "P")
        assert load_config(options.config, options.overrides).run.seed == seed


def test_frozen_config_is_the_config(submit, config_file, tmp_path, slurm):
    """Under a name that its content decides: what is edited while jobs wait changes nothing."""
    overrides = ["score.beta=0.25", "pipeline.seeds=[1, 2]", "train.lr=1e-3"]
    config = load_config(config_file, overrides)
    assert submit(*COLLECT, *overrides) == 0
    (frozen,) = (tmp_path / "run" / "jobs").glob("collect-*.yaml")
    assert load_config(frozen) == config
    slurm.queue("4242 CANCELLED")
    config_file.write_text(config_file.read_text().replace("epochs: 3", "epochs: 4"))
    assert submit(*COLLECT, *overrides) == 0
    assert load_config(frozen) == config
    assert len(list((tmp_path / "run" / "jobs").glob("collect-*.yaml"))) == 2


# ---- refusals of SLURM


@pytest.mark.parametrize(("number", "cancelled"), [(1, []), (2, ["4242"]), (4, ["4242 4243 4244"])])
def test_a_stage_that_is_refused_takes_those_before_with_it(
    submit, tmp_path, slurm, number, cancelled
):
    failed = "Batch job submission failed: Invalid qos"
    slurm.refuse(number, f"sbatch: error: something first\nsbatch: error: {failed}")
    assert submit() == 2
    *passed_on, ours = submit.err.splitlines()
    refused = f"the scheduler refused {STAGES[number - 1]}-tiny (something first; {failed})"
    assert ours == f"tdds submit: error: {refused}; adapt the cluster file"
    assert all(line.startswith("sbatch: error: ") for line in passed_on)  # by submitit
    assert slurm.cancelled == cancelled
    assert read_jobs(tmp_path / "run" / "jobs") == []  # so that the next try is not refused
    assert submit() == 0


@pytest.mark.parametrize("said", ["", "no colon here", "sbatch: error: \tspaces   and\n\n\n"])
def test_a_refusal_is_one_line_whatever_sbatch_says(submit, slurm, said):
    slurm.refuse(1, said)
    assert submit() == 2
    *passed_on, ours = submit.err.splitlines()
    refused = r"the scheduler refused collect-tiny \(.*\); adapt the cluster file"
    assert re.fullmatch(rf"tdds submit: error: {refused}", ours)
    assert passed_on in ([], said.splitlines()[:1])  # by submitit


def test_without_slurm_or_with_half_of_it_is_one_line(submit, slurm, monkeypatch):
    """A compute node may have srun and no sbatch."""
    (slurm.folder / "sbatch").unlink()
    for path in (slurm.folder, "/nowhere"):
        monkeypatch.setenv("PATH", str(path))
        assert submit() == 2
        assert submit.err.startswith("tdds submit: error: executor=slurm needs srun and sbatch")
        assert "submit from a login node, or use executor=local" in submit.err
        assert submit.err.count("\n") == 1
    assert submit("--dry-run") == 0  # what would be queued can be seen anywhere


def test_a_submission_from_inside_a_job_says_nothing_of_that_job(submit, slurm, monkeypatch):
    """sbatch would take SBATCH_* for options, and pass SLURM_* on."""
    inside = "SLURM_JOB_ID=7 SLURM_NTASKS=64 SBATCH_PARTITION=debug SLURM_CONF=/etc/x.conf RANK=0"
    for word in inside.split():
        monkeypatch.setenv(*word.split("="))
    assert submit(*COLLECT) == 0
    told = slurm.environment(1)
    assert told["SLURM_CONF"] == "/etc/x.conf"
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "RANK"} & told.keys()
    assert os.environ["SLURM_JOB_ID"] == "7"
    monkeypatch.delenv("SLURM_JOB_ID")  # a login node: what its user set is meant
    slurm.queue("4242 CANCELLED")
    assert submit(*COLLECT) == 0
    assert slurm.environment(2)["SBATCH_PARTITION"] == "debug"


# ---- submitted twice


@pytest.mark.parametrize(
    ("queue", "num_active"),
    [
        ("4242 RUNNING\n4243 PENDING\n4244_[0-1] PENDING\n4245 PENDING", 5),
        ("4242 PENDING", 1),
        ("4242 FAILED\n4243 PENDING", 1),
        ("4242 COMPLETING", 1),
        ("4242 FAILED\n4243 CANCELLED\n4244_0 CANCELLED\n4244_1 CANCELLED\n4245 CANCELLED", 0),
        ("", 0),  # squeue has forgotten them, and there is no accounting
    ],
)
def test_a_run_whose_jobs_are_queued_or_running_is_not_submitted_again(
    submit, slurm, queue, num_active
):
    assert submit() == 0
    slurm.queue(queue)
    assert submit() == (2 if num_active else 0)
    assert len(slurm.handed) == (4 if num_active else 8)
    if num_active:
        busy = f"{num_active} jobs of this run are queued or running (424"
        assert submit.err.startswith(f"tdds submit: error: {busy}")
        assert "wait for them, or stop them with scancel 424" in submit.err
        assert submit.err.count("\n") == 1


def test_a_collection_that_is_done_and_still_leaving_keeps_nobody_waiting(submit, slurm, finish):
    assert submit(*COLLECT) == 0
    slurm.queue("4242 COMPLETING")
    assert submit() == 2
    finish()
    assert submit() == 0


def test_other_work_in_the_same_run_may_be_submitted(submit, slurm, coreset):
    retrain = ["--stage", "retrain", "--coreset", coreset, "--strategy"]
    assert submit(*retrain, "E") == 0
    slurm.queue("4242 RUNNING")
    assert submit(*retrain, "E") == 2
    assert submit(*retrain, "P") == 0
    assert submit(*COLLECT) == 0


# ---- where things go


def test_a_log_folder_elsewhere_is_found_from_the_run(submit, tmp_path, slurm, monkeypatch):
    run, logs = tmp_path / "run", tmp_path / "logs" / "tiny"
    cluster = f"{{executor: slurm, time_minutes: 5, log_dir: {tmp_path}/logs}}"
    assert submit(*COLLECT, cluster=cluster) == 0
    assert (run / "jobs.path").read_text() == f"{logs}\n"
    assert log_dir_of(run) == logs
    assert [job.id for job in read_jobs(logs)] == ["4242"]
    assert not (run / "jobs").exists()
    assert f"--output={logs}/%j_0_log.out" in slurm.handed[0]
    slurm.queue("4242 RUNNING")
    assert submit(*COLLECT) == 2  # its jobs count wherever they are listed
    slurm.queue("4242 CANCELLED")
    monkeypatch.chdir(tmp_path)
    assert submit(*COLLECT, cluster="{executor: slurm, time_minutes: 5, log_dir: other}") == 0
    assert log_dir_of(run) == tmp_path / "other" / "tiny"  # from wherever one looks
    slurm.queue("4242 CANCELLED\n4243 CANCELLED")
    assert submit(*COLLECT) == 0
    assert log_dir_of(run) == run / "jobs"


def test_missing_data_is_a_warning(submit, slurm):
    """The nodes may see what the login node does not."""
    train, val = "data.train=/scratch/no.beton", "data.val=/scratch/neither.beton"
    for words, files in (([train, "--dry-run"], train), ([train, val], f"{train} and {val}")):
        assert submit(*COLLECT, *words) == 0
        assert submit.err == f"warning: {files} not found on this machine; the nodes must have it\n"
    slurm.queue("4242 CANCELLED")
    assert submit(*COLLECT) == 0
    assert submit.err == ""


def test_overrides_stand_before_and_after_options(config_file, tmp_path, slurm):
    cluster = ["--cluster", str(write(tmp_path / "c.yaml", SLURM))]
    config, late = ["train.lr=0.5", str(config_file)], ["run.seed=9", "pipeline.seeds=[1, 2]"]
    orders = [
        [*reversed(config), *cluster, "train.epochs=4", *COLLECT, *late],
        [*cluster, *reversed(config), "train.epochs=4", *COLLECT, *late],
        [config[1], *cluster, *COLLECT, config[0], "train.epochs=4", *late],
    ]
    for number, order in enumerate(orders):
        run = tmp_path / str(number)
        assert program.main(["submit", *order, f"run.dir={run}"]) == 0
        (frozen,) = (run / "jobs").glob("collect-*.yaml")
        found = load_config(frozen)
        assert (found.train.lr, found.train.epochs) == (0.5, 4)
        assert (found.run.seed, found.pipeline.seeds) == (9, (1, 2))


# ---- waiting


@pytest.fixture
def patient(slurm, monkeypatch):
    """What happens between two looks of `--wait`, one after the other."""
    happens = []
    clock = {"time": time.time, "strftime": time.strftime, "sleep": lambda _: happens.pop(0)()}
    monkeypatch.setattr(submit_module, "time", SimpleNamespace(**clock))
    yield happens
    assert happens == []


def test_wait_follows_the_jobs(submit, slurm, patient):
    slurm.queue("4242 PENDING")
    for state in ("RUNNING", "RUNNING", "COMPLETED"):
        patient.append(partial(slurm.queue, f"4242 {state}"))
    assert submit(*COLLECT, "--wait") == 0
    assert [line for line in submit.out.splitlines() if line.startswith("collect-tiny")] == [
        f"collect-tiny 4242 (collect): {state}" for state in ("pending", "running", "finished")
    ]


@pytest.mark.parametrize(
    ("kinds", "code", "said"),
    [
        (["refused"], 2, "rank 0 on node0: refused it said\n"),
        (["lost", "failed", "lost"], 1, "rank 1 on node1: failed it said\n"),
        (["", "", "lost"], 1, "rank 2 on node2: lost it said\n"),
        ([], 1, ""),
    ],
)
def test_wait_leaves_with_the_outcome_and_names_the_rank_that_failed(
    submit, tmp_path, slurm, patient, kinds, code, said
):
    def fail():
        slurm.queue(
            "4242 FAILED\n4243 CANCELLED\n4244_0 CANCELLED\n4244_1 CANCELLED\n4245 CANCELLED"
        )
        for rank, kind in enumerate(kinds):
            if kind:
                told = {"host": f"node{rank}", "message": f"{kind} it said"}
                end = EndRecord(kind, rank, time.time(), **told)
                append_end(tmp_path / "run" / "jobs", "4242", end)

    slurm.queue("4242 RUNNING\n4243 PENDING\n4244_[0-1] PENDING\n4245 PENDING")
    patient.append(fail)
    assert submit("--wait") == code
    assert submit.err == said
    assert "retrain-tiny 4244_1 (tdds_p0.8_E_batch_seed0): cancelled\n" in submit.out


# ---- real jobs of this machine


@pytest.fixture
def quiet(monkeypatch):
    """Few cores are shared; and a leftover of the shell that must not reach the job."""
    for word in "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 MASTER_PORT=1".split():
        monkeypatch.setenv(*word.split("="))
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SUBMITIT_", "TDDS_"))]:
        monkeypatch.delenv(key)


LOCAL = CLUSTERS / "local.yaml"
SHORT = ["train.epochs=2", "score.windows=[{T: 2, K: 2, pruning_rates: [0.5]}]"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "code", "said"),
    [
        (1, 2, "rank 0: tdds collect: error: bad\n"),
        # rank 0 loses the others before they have written why
        (3, 1, "rank 1: ZeroDivisionError: the cause, on 1\nTraceback"),
    ],
)
def test_the_rank_that_failed_is_named_and_not_those_that_lost_it(
    submit, quiet, monkeypatch, num_ranks, code, said
):
    class Hurt(StageTask):
        def __call__(self):
            import time
            from pathlib import Path

            from tdds_dist.cli import main as cli
            from tdds_dist.launch.records import read_ends

            def outcome(command, interruption):
                while len(read_ends(Path(self.log_dir), self.job_id)) < self.rank:
                    time.sleep(0.05)
                if self.rank == 0:
                    return (
                        (1, "tdds collect: error: rank 1 ended")
                        if num_ranks > 1
                        else (2, "tdds collect: error: bad")
                    )
                raise ZeroDivisionError(f"the cause, on {self.rank}")

            cli.outcome = outcome
            super().__call__()

    monkeypatch.setattr(submit_module, "StageTask", Hurt)
    more = f"ranks_per_node: {num_ranks}, setup: [export A=1]"
    cluster = f"{{executor: local, time_minutes: 5, {more}}}"
    assert submit(*COLLECT, "--wait", cluster=cluster) == code
    assert submit.err.startswith(f"collect failed: collect: {said}")
    assert submit.err.count("Traceback") == num_ranks // 3
    assert "rank 1 ended" not in submit.err


@pytest.mark.distributed
def test_a_rank_that_cannot_even_start_is_a_failure(submit, quiet, monkeypatch):
    """submitit writes a result of exceptions too."""

    class Broken(StageTask):
        def __call__(self):
            raise ImportError("no module named tdds_dist")

    monkeypatch.setattr(submit_module, "StageTask", Broken)
    assert submit(*COLLECT, "--wait", cluster=ONE_RANK) == 1


@pytest.mark.distributed
def test_a_local_job_in_the_background_is_not_submitted_again(submit, tmp_path, quiet):
    cluster = "{executor: local, time_minutes: 5, setup: [exec sleep 60]}"
    assert submit(*COLLECT, cluster=cluster) == 0
    (job,) = read_jobs(tmp_path / "run" / "jobs")
    try:
        assert f"collect: collect is process {job.id}, log " in submit.out
        assert submit(*COLLECT, cluster=cluster) == 2
        busy = f"1 jobs of this run are queued or running ({job.id})"
        assert f"{busy}; wait for them, or stop them with kill -TERM {job.id}" in submit.err
    finally:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            os.kill(int(job.id), signal.SIGTERM)  # early, its rank may not be there yet
            if os.waitpid(int(job.id), os.WNOHANG)[0]:
                break
            time.sleep(0.1)
    assert submit(*COLLECT, "--dry-run", cluster=cluster) == 0


@pytest.mark.distributed
@pytest.mark.slow
def test_the_whole_pipeline_here_and_what_is_missing_again(submit, tmp_path, quiet):
    run, name = tmp_path / "run", "tdds_p0.5_E_batch_seed0"

    def submitted(*more):
        """Lines about what was done."""
        words = ["pipeline.scores=[tdds]", *SHORT, *more]
        assert submit(*words, cluster=LOCAL) == 0, submit.err
        lines = [line for line in submit.out.splitlines() if line.endswith(" is done")]
        return [line.removesuffix(" is done") for line in lines]

    def listed():
        return [(job.stage, job.num_ranks) for job in read_jobs(run / "jobs")]

    done = ["collect: collect", "select: 1 coreset", f"retrain: {name}", "report: report"]
    assert submitted() == done
    assert listed() == [("collect", 2), ("select", 1), ("retrain", 2), ("report", 1)]
    for folder in (run, run / "retrain" / name):
        assert json.loads((folder / "result.json").read_text())["epochs"] == 2
        assert RunDir(folder).read_env()["world_size"] == 2
    scores = load_scores(run / "scores" / "tdds_official_T2_K2_beta0.9.npz").score_N
    assert scores.shape == (120,)
    assert np.isfinite(scores).all()
    assert [path.name for path in (run / "coresets").iterdir()] == ["tdds_p0.5.npz"]
    collect = read_jobs(run / "jobs")[0].id
    assert list(log_files(run / "jobs", collect, "err")) == [0, 1]
    assert read_ends(run / "jobs", collect) == []
    assert (status_of(run)["state"], status_of(run)["job"]) == ("finished", collect)

    assert submitted() == []
    done_before = "everything is done: collect, select, retrain, report; the page:"
    assert submit.out == f"{done_before} {run}/report.html\n"
    before = [(run / file).stat().st_mtime_ns for file in ("result.json", "report.html")]
    shutil.rmtree(run / "retrain" / name)
    assert submitted() == done[2:]
    assert listed()[4:] == [("retrain", 2), ("report", 1)]
    after = [(run / file).stat().st_mtime_ns for file in ("result.json", "report.html")]
    assert (after[0], after[1] > before[1]) == (before[0], True)


# ---- asked to leave


LONG = "train.deterministic=true train.epochs=6 score.final_pass=false data.num_workers=1".split()
# with a network that is slow enough to be stopped
LONG += ["score.windows=[{T: 6, K: 3}]", "model.name=slow_network"]


def status_of(run):
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def until_epoch(run, epoch, is_alive, deadline=90.0):
    """Wait until a run trains and has finished so many epochs; the pid of its rank 0."""
    end = time.monotonic() + deadline
    while (found := status_of(run)).get("state") != "training" or found["epoch"] < epoch:
        assert is_alive(), found
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found["pid"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_local_job_that_is_preempted_is_queued_again_and_comes_to_the_same(
    config_file, tmp_path, quiet
):
    """submitit's local controller starts it again on exit code 144."""
    run = tmp_path / "run"
    words = ["submit", str(config_file), "--cluster", str(LOCAL), *COLLECT, "--wait", *LONG]
    command = [sys.executable, "-m", "tdds_dist", *words]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=REPOSITORY, **piped)
    try:
        os.kill(until_epoch(run, 2, lambda: process.poll() is None), signal.SIGUSR2)
        out, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, out
    (job,) = read_jobs(run / "jobs")
    (end,) = read_ends(run / "jobs", job.id)
    assert (end.kind, end.rank) == ("requeued", 0)
    assert "SIGUSR2: saved at epoch" in end.message
    assert len(RunDir(run).read_env()["resumes"]) == 1
    result = RunDir(run).read_result()
    assert (result["epochs"], result["resumes"]) == (6, 1)
    straight = tmp_path / "straight"
    words = ["collect", config_file, *LONG, f"run.dir={straight}"]
    codes, said = jobs.run(words, 2, tmp_path / "said")
    assert codes == [0, 0], said
    assert jobs.differences(jobs.state_of(straight), jobs.state_of(run)) == []


# ---- launch/torchrun.sh


def test_torchrun_script_starts_a_stage(tmp_path):
    """On one rank per visible GPU: stand-ins for nvidia-smi and torchrun."""
    # away from .venv
    script = write(tmp_path / "torchrun.sh", (REPOSITORY / "launch" / "torchrun.sh").read_text())
    gpus = "printf 'GPU 0: A\\n  MIG 1g: x\\nGPU 1: A\\nGPU 2: A\\n'"
    for name, body in {
        "nvidia-smi": gpus,
        "torchrun": 'echo "$OMP_NUM_THREADS" "$@"',
        "nproc": "echo 12",
    }.items():
        write(tmp_path / name, f"#!/bin/sh\n{body}\n").chmod(0o755)
    ours = ("RANKS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"

    def started(*words, **changes):
        command, env = ["bash", str(script), *words], environment | changes
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout.strip()

    for changes, threads, ranks in (
        ({}, 4, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 6, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 12, 1),
        ({"RANKS": "4", "OMP_NUM_THREADS": "2"}, 2, 4),
    ):
        said = f"{threads} --standalone --nproc-per-node {ranks} -m tdds_dist collect a b"
        assert started("collect", "a b", **changes) == (0, said)
    assert started() == (2, "")


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_script_of_this_checkout():
    script = str(REPOSITORY / "launch" / "torchrun.sh")
    command, env = [script, "collect", "--help"], os.environ | {"RANKS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: tdds collect" in done.stdout


def test_a_pruned_training_is_one_job(submit):
    words = ("--stage", "train", "--dry-run", "prune.method=infobatch", "prune.rate=0.5")
    assert submit(*words) == 0
    assert "#SBATCH --job-name=train-" in submit.out
    assert re.search(r"tdds train \S+/train-\w+\.yaml", submit.out)
    assert submit(*words, "prune.every=3") == 2
    assert "prune.every=3 means nothing with prune.method=infobatch" in submit.err
