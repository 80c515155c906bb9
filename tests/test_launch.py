"""Submission: cluster files, what is checked before, what SLURM is handed, and real jobs of this machine.

No SLURM is needed: stand-ins for its commands keep what they are given. `tests/golden/sbatch_<cluster>.txt` holds the sbatch
files of a pipeline for each cluster file that is shipped. After a change that is meant,

    TDDS_WRITE_GOLDEN=1 .venv/bin/pytest tests/test_launch.py -k golden

writes them anew; read the diff, then commit it.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import yaml
from submitit.core.utils import DelayedSubmission

import launch.submit
from launch.cluster import STAGES, Cluster, load_cluster
from launch.jobs import append_end, log_dir_of, read_ends, read_jobs
from launch.submit import main
from launch.task import StageTask
from tdds_dist import cli
from tdds_dist.artifacts import Coreset, Fingerprint, load_coreset, load_scores, save_coreset
from tdds_dist.config import load_config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.retrain import resolve
from tdds_dist.rundir import RunDir

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTERS = REPOSITORY / "configs" / "clusters"
GOLDEN = REPOSITORY / "tests" / "golden"
SHIPPED = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
ON_SLURM = [name for name in SHIPPED if yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())["executor"] == "slurm"]
ONE_RANK = "{executor: local, time_minutes: 5}"
SLURM = "{executor: slurm, time_minutes: 5}"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def coreset(tmp_path: Path) -> Path:
    """At pruning rate 0.8."""
    path = tmp_path / "mine.npz"
    save_coreset(path, Coreset(np.arange(24), np.ones(24, np.float32), "random", 0.8, Fingerprint(120, 10, "")))
    return path


# ---- cluster files


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cluster_files_load_for_every_stage(name: str, stage: str) -> None:
    cluster = load_cluster(CLUSTERS / f"{name}.yaml")
    part = cluster.for_stage(stage)
    assert part.stages == {}
    if stage in ("select", "report"):
        assert (part.num_ranks, part.gpus_per_node) == (1, 0)
    else:
        assert part.gpus_per_node in (0, part.ranks_per_node)
    for key, value in cluster.stages.get(stage, {}).items():
        assert getattr(part, key) == value
    assert f"configs/clusters/{name}.yaml" in (CLUSTERS / f"{name}.yaml").read_text()  # how to use it


def test_every_key_of_a_cluster_file_has_its_sentence() -> None:
    assert all(field.description and field.description.endswith(".") for field in Cluster.model_fields.values())


def test_a_stage_takes_what_is_its_own_and_the_rest_from_the_others(tmp_path: Path) -> None:
    text = """{executor: slurm, time_minutes: 60, nodes: 4, ranks_per_node: 8, gpus_per_node: 8, setup: [a], extra: {nice: 1},
               stages: {retrain: {nodes: 1, setup: [b, c], time_minutes: 30}, select: {ranks_per_node: 2, extra: {}}}}"""
    cluster = load_cluster(write(tmp_path / "cluster.yaml", text))
    collect, select, retrain, report = (cluster.for_stage(stage) for stage in STAGES)
    assert (collect.num_ranks, retrain.num_ranks, select.num_ranks, report.num_ranks) == (32, 8, 2, 1)
    assert (collect.setup, retrain.setup, report.setup) == (("a",), ("b", "c"), ("a",))
    assert (collect.extra, select.extra) == ({"nice": 1}, {})
    assert [part.gpus_per_node for part in (collect, select, retrain, report)] == [8, 0, 8, 0]
    assert [part.time_minutes for part in (collect, select, retrain, report)] == [60, 60, 30, 60]


BAD_CLUSTERS = [
    ("{executor: slurm, time_minutes: 5, partion: gpu}", "unknown key 'partion'; the nearest valid key is 'partition'"),
    ("{executor: slurm}", "key 'time_minutes' is missing; Time limit of a job"),
    ("{executor: pbs, time_minutes: 5}", "executor='pbs': input should be 'slurm' or 'local'; slurm: sbatch and srun"),
    ("{executor: slurm, time_minutes: 5, nodes: '2'}", "nodes='2': input should be a valid integer; Nodes of the job"),
    ("{executor: slurm, time_minutes: 5, ranks_per_node: 0}", "ranks_per_node=0: input should be greater than"),
    ("{executor: slurm, time_minutes: 5, partition: a b}", "partition='a b': "),
    ("{executor: slurm, time_minutes: 5, setup: export A=1}", "setup='export A=1': input should be a valid tuple"),
    ("{executor: slurm, time_minutes: 5, setup: [1]}", "setup=1: input should be a valid string"),
    ("{executor: local, time_minutes: 5, nodes: 2}", "nodes=2 needs executor=slurm; executor=local is this machine, set"),
    ("{executor: slurm, time_minutes: 5, ranks_per_node: 4, gpus_per_node: 2}",
     "gpus_per_node=2 is fewer than ranks_per_node=4; every rank needs its own, set ranks_per_node=2"),
    ("{executor: slurm, time_minutes: 2, grace_seconds: 60}",
     "grace_seconds=60 leaves less than a minute of time_minutes=2; lower the first or raise the second"),
    ("{executor: slurm, time_minutes: 2}", "grace_seconds=90 leaves less than a minute of time_minutes=2"),
    ("{executor: slurm, time_minutes: 5, grace_seconds: 9}", "grace_seconds=9: input should be greater than"),
    ("{executor: slurm, time_minutes: 5, log_dir: 3}", "log_dir=3: input should be a valid string; Where logs"),
    ("{executor: slurm, time_minutes: 5, memory_gb: 0}", "memory_gb=0: input should be greater than 0; Memory per node"),
    ("{executor: slurm, time_minutes: 5, requeue_failures: -1}", "requeue_failures=-1: input should be greater"),
    *((f"{{executor: slurm, time_minutes: 5, extra: {{{key}: x}}}}", f"extra: {key} is set by tdds; leave it out")
      for key in ("output", "--error", "job-name", "array", "dependency", "signal", "requeue", "no-requeue", "open-mode")),
    ("{executor: slurm, time_minutes: 5, extra: [exclusive]}", "extra=('exclusive',): input should be a valid dictionary"),
    ("{executor: slurm, time_minutes: 5, extra: {gres: [gpu]}}", "extra=['gpu']: input should be a valid"),
    ("{executor: slurm, time_minutes: 5, stages: {train: {nodes: 1}}}", "stages='train': input should be 'collect', 'select'"),
    ("{executor: slurm, time_minutes: 5, stages: {select: 3}}", "stages=3: input should be a valid dictionary"),
    ("{executor: slurm, time_minutes: 5, stages: {retrain: {node: 1}}}", "stages.retrain: unknown key 'node'; the nearest"),
    ("{executor: slurm, time_minutes: 5, stages: {retrain: {nodes: 0}}}", "stages.retrain: nodes=0: input should be greater"),
    ("{executor: slurm, time_minutes: 5, stages: {report: {time_minutes: 1}}}", "stages.report: grace_seconds=90 leaves less"),
    ("{executor: slurm, time_minutes: 5, stages: {select: {gpus_per_node: 1, ranks_per_node: 2}}}",
     "stages.select: gpus_per_node=1 is fewer than ranks_per_node=2"),
    ("{executor: local, time_minutes: 5, stages: {retrain: {nodes: 2}}}", "stages.retrain: nodes=2 needs executor=slurm"),
    *((f"{{executor: slurm, time_minutes: 5, stages: {{retrain: {{{key}: {value}}}}}}}",
       f"stages.retrain: {key} is the same for all stages; set it outside of stages")
      for key, value in (("executor", "local"), ("log_dir", "x"), ("stages", "{}"))),
    ("{executor: slurm, time_minutes: 5, stages: {retrain: {extra: {signal: x}}}}", "stages.retrain: extra: signal is set by"),
    ("[slurm]", "must hold keys of a cluster: executor, "),
    ("{executor: [", "is not plain YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CLUSTERS)
def test_bad_cluster_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_cluster(write(tmp_path / "cluster.yaml", text))
    assert message in str(caught.value)
    assert str(tmp_path / "cluster.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["job_name", "no_requeue", "kill_on_invalid_dep", "nodes", "time", "ntasks_per_node", "mem"])
def test_extra_does_not_take_back_what_the_file_says(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=key):
        load_cluster(write(tmp_path / "cluster.yaml", f"{{executor: slurm, time_minutes: 5, extra: {{{key}: 7}}}}"))


def test_cluster_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; configs/clusters/ holds examples"):
        load_cluster(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not plain YAML"):
        load_cluster(tmp_path / "binary.yaml")


# ---- checks before submission


BAD_INPUT = [
    ("{executor: local, time_minutes: 5, ranks_per_node: 5}", ["--stage", "collect"],
     "collect on 5 ranks: train.global_batch_size=24 is not divisible by world_size=5; use 20 or 25"),
    ("{executor: slurm, time_minutes: 5, nodes: 2, ranks_per_node: 8}", ["--stage", "collect"],
     "collect on 16 ranks: train.global_batch_size=24 is not divisible by world_size=16"),
    ("{executor: slurm, time_minutes: 5, ranks_per_node: 8}", ["--stage", "pipeline"],
     "retrain at pruning rate 0.8 on 8 ranks: train.global_batch_size=24 x 0.5 (retrain.batch_size_rule)"),
    ("{executor: slurm, time_minutes: 5, stages: {retrain: {ranks_per_node: 7}}}", [],
     "retrain at pruning rate 0.5 on 7 ranks: train.global_batch_size=24 is not"),
    ("{executor: slurm, time_minutes: 5, ranks_per_node: 8}", ["--stage", "retrain", "--coreset", "CORESET", "--strategy", "E"],
     "retrain at pruning rate 0.8 on 8 ranks"),
    (ONE_RANK, ["--stage", "collect", "train.leraning_rate=1"], "unknown key 'train.leraning_rate'"),
    (ONE_RANK, ["--stage", "collect", "train.lr"], "must look like section.key=value"),
    (ONE_RANK, ["--stage", "collect", "train.epochs=2"], "T=3 is longer than train.epochs=2"),
    (ONE_RANK, ["train.epochs=2"], "T=3 is longer than train.epochs=2"),
    (ONE_RANK, ["--stage", "collect", "--strategy", "E"], "--strategy belongs to --stage retrain; leave it out of --stage"),
    (ONE_RANK, ["--name", "x"], "--name belongs to --stage retrain; leave it out of --stage pipeline"),
    (ONE_RANK, ["--stage", "retrain", "--strategy", "E"], "--stage retrain needs --coreset; see `tdds submit --help`"),
    (ONE_RANK, ["--stage", "retrain"], "--stage retrain needs --coreset"),
    (ONE_RANK, ["--stage", "retrain", "--coreset", "CORESET"], "--stage retrain needs --strategy"),
    (ONE_RANK, ["--stage", "retrain", "--coreset", "no.npz", "--strategy", "E"], "no.npz does not exist"),
    (ONE_RANK, ["--stage", "retrain", "--coreset", __file__, "--strategy", "E"], __file__),
    (ONE_RANK, ["--stage", "collect", "run.device=cuda"], "the cluster file asks for no GPU; set gpus_per_node or run.device"),
    ("{executor: slurm, time_minutes: 5, gpus_per_node: 1, stages: {retrain: {gpus_per_node: 0}}}", ["run.device=cuda"],
     "the cluster file asks for no GPU"),
    (ONE_RANK, ["--stage", "retrain", "--coreset", "CORESET", "--strategy", "E", "train.accumulation=7"],
     "is not divisible by world_size=1 x "),
    (ONE_RANK, ["pipeline.scores=[moderate]", "score.final_pass=false"], "moderate needs score.final_pass=true; switch it on"),
    (ONE_RANK, ["pipeline.scores=[el2n]", "score.trajectory=false"], "el2n is scored from the trajectory; set score.traject"),
    (ONE_RANK, ["score.windows=[{T: 3, K: 2}]"], "no window of score.windows serves a pruning rate; set pipeline.pruning_"),
    (ONE_RANK, ["pipeline.pruning_rates=[0.7]"], "pipeline.pruning_rates has 0.7, which no window of score.windows serves"),
    ("{executor: slurm}", [], "key 'time_minutes' is missing"),
]


@pytest.mark.parametrize(("cluster", "arguments", "message"), BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(
        config_file: Path, coreset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster: str,
        arguments: list[str], message: str) -> None:
    cluster_file = write(tmp_path / "cluster.yaml", cluster)
    words = [str(coreset) if word == "CORESET" else word for word in arguments]
    for also in ([], ["--dry-run"]):
        assert main([str(config_file), "--cluster", str(cluster_file), *words, *also]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("launch.submit: error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert not (tmp_path / "run").exists()


def test_retrain_batch_may_fit_by_the_batch_size_rule(config_file: Path, coreset: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """24 is not divisible by 18 ranks, but a coreset at 0.8 may bring it down to 18."""
    cluster_file = write(tmp_path / "cluster.yaml", "{executor: slurm, time_minutes: 5, ranks_per_node: 18}")
    arguments = [str(config_file), "--cluster", str(cluster_file), "--dry-run", "retrain.batch_size_rule={0.8: 0.75}"]
    assert main([*arguments, "--stage", "retrain", "--coreset", str(coreset), "--strategy", "P"]) == 0
    assert main([*arguments, "--stage", "collect"]) == 2


def test_a_log_folder_that_cannot_be_written_is_one_line(config_file: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    cluster_file = write(tmp_path / "cluster.yaml", f"{{executor: local, time_minutes: 5, log_dir: {tmp_path}/file}}")
    assert main([str(config_file), "--cluster", str(cluster_file)]) == 2
    error = capsys.readouterr().err
    assert f"cannot write to log_dir={tmp_path}/file/tiny" in error
    assert "choose a writable directory" in error
    assert error.count("\n") == 1


# ---- what SLURM is handed, with stand-ins for its commands


class Slurm:
    """Commands of SLURM that keep what they are given. Jobs are numbered from 4242."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.queue("")
        for name, body in {
            "srun": "exit 1", "scontrol": "exit 1", "sacct": "exit 1", "scancel": 'echo "$@" >>scancel.txt',
            "squeue": "cat squeue.txt",
            "sbatch": 'n=$(($(cat number.txt 2>/dev/null || echo 0) + 1)); echo $n >number.txt; env >$n.env\n'
                      'if [ "$n" = "$(cat refused.txt 2>/dev/null)" ]; then cat said.txt >&2; exit 1; fi\n'
                      'cp "$1" $n.sh; echo "Submitted batch job $((4241 + n))"',
        }.items():
            write(folder / name, f"#!/bin/sh\ncd {folder}\n{body}\n").chmod(0o755)

    def refuse(self, number: int, said: str) -> None:
        """The sbatch of this number, from 1."""
        write(self.folder / "refused.txt", str(number))
        write(self.folder / "said.txt", f"{said}\n")

    def queue(self, text: str) -> None:
        """What squeue says: per job `id STATE`."""
        lines = [f"{job}|{state}|0|0:01|0||Priority" for job, state in (line.split() for line in text.splitlines())]
        write(self.folder / "squeue.txt", "\n".join(lines))

    @property
    def handed(self) -> list[str]:
        """The sbatch files, in order."""
        return [path.read_text() for path in sorted(self.folder.glob("*.sh"))]

    @property
    def cancelled(self) -> list[str]:
        path = self.folder / "scancel.txt"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, number: int) -> dict[str, str]:
        """Of the sbatch of this number."""
        lines = (self.folder / f"{number}.env").read_text().splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    stand_in = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{stand_in.folder}:{os.environ['PATH']}")
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))]:
        monkeypatch.delenv(key)
    return stand_in


def printed_files(text: str) -> dict[str, str]:
    """The sbatch files that `--dry-run` printed, by stage."""
    parts = re.split(r"^# ---- (\w+): .*\n(?:#      tdds .*\n)*", text, flags=re.M)[1:]
    return {stage: file.strip("\n") for stage, file in zip(parts[::2], parts[1::2], strict=True)}


EIGHT_RANKS = "train.global_batch_size=32"  # half of it at pruning rate 0.8


@pytest.mark.parametrize("name", ON_SLURM)
def test_golden_sbatch_files(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arguments = [str(config_file), "--cluster", str(CLUSTERS / f"{name}.yaml"), "--dry-run", EIGHT_RANKS,
                 "pipeline.scores=[tdds, random, ccs]"]
    assert main(arguments) == 0
    files = printed_files(capsys.readouterr().out)
    assert list(files) == list(STAGES)
    text = "".join(f"======== {stage}\n{file}\n" for stage, file in files.items())
    text = text.replace(str(tmp_path / "run" / "jobs"), "FOLDER").replace(sys.executable, "PYTHON")
    golden = GOLDEN / f"sbatch_{name}.txt"
    if os.environ.get("TDDS_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_golden_file_is_of_a_cluster_that_is_shipped() -> None:
    assert sorted(path.name for path in GOLDEN.glob("sbatch_*.txt")) == [f"sbatch_{name}.txt" for name in ON_SLURM]


EVERYTHING = {
    "executor": "slurm", "nodes": 2, "ranks_per_node": 3, "cpus_per_rank": 5, "memory_gb": 0.5, "time_minutes": 30,
    "partition": "p1", "account": "acc", "qos": "high", "constraint": "a100&ib", "grace_seconds": 77, "requeue_failures": 9,
    "extra": {"exclusive": True, "reservation": "main tenance", "overcommit": False, "--nice": 100}, "array_parallelism": 1,
    "setup": ["module load 'cuda 12'", "export A=\"$HOME\""], "venv": "/envs/t d", "container": "apptainer exec --nv x.sif",
    "interface": "ib0", "cpu_bind": "cores",
    "stages": {"retrain": {"nodes": 1, "setup": [], "memory_gb": 3}, "select": {"partition": "cpu", "extra": {}}}}


@pytest.mark.parametrize("cluster", [*ON_SLURM, "everything", "plain"])
def test_what_is_printed_is_what_is_handed_over(config_file: Path, tmp_path: Path, slurm: Slurm,
                                                capsys: pytest.CaptureFixture[str], cluster: str) -> None:
    """The ids of jobs, which only SLURM knows, aside."""
    texts = {"everything": yaml.safe_dump(EVERYTHING), "plain": SLURM}
    path = write(tmp_path / "cluster.yaml", texts[cluster]) if cluster in texts else CLUSTERS / f"{cluster}.yaml"
    batch = "train.global_batch_size=48" if cluster == "everything" else EIGHT_RANKS
    scores = [] if cluster == "plain" else ["pipeline.scores=[tdds, random]"]  # two retrainings, or four
    arguments = [str(config_file), "--cluster", str(path), batch, *scores]
    assert main([*arguments, "--dry-run"]) == 0
    printed = printed_files(capsys.readouterr().out)
    assert slurm.handed == []
    assert not (tmp_path / "run").exists()
    assert main(arguments) == 0
    before = None
    for number, (stage, handed) in enumerate(zip(STAGES, slurm.handed, strict=True)):
        told = printed[stage]
        if before is not None:
            assert f"#SBATCH --dependency='afterok:<id of {before}>'" in told
            told = told.replace(f"'afterok:<id of {before}>'", f"afterok:{4242 + number - 1}")
        assert handed.strip("\n") == told
        assert ("--array=" in handed) == (stage == "retrain")
        assert ("kill-on-invalid-dep=yes" in handed) == ("--dependency" in handed) == (number > 0)
        before = stage


def flags_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_sbatch_file_has_everything_that_the_cluster_file_says(config_file: Path, tmp_path: Path, slurm: Slurm) -> None:
    cluster_file = write(tmp_path / "cluster.yaml", yaml.safe_dump(EVERYTHING))
    assert main([str(config_file), "--cluster", str(cluster_file), "train.global_batch_size=48"]) == 0
    collect, select, retrain, _ = slurm.handed
    folder = tmp_path / "run" / "jobs"
    python = "apptainer exec --nv x.sif '/envs/t d/bin/python'"
    assert sorted(flags_of(collect)) == sorted([
        "account=acc", "constraint='a100&ib'", "cpus-per-task=5", f"error={folder}/%j_0_log.err", "exclusive",
        "job-name=collect-tiny", "mem=512MB", "nice=100", "nodes=2", "ntasks-per-node=3", "open-mode=append",
        f"output={folder}/%j_0_log.out", "partition=p1", "qos=high", "requeue", "reservation='main tenance'",
        "signal=USR2@77", "time=30"])
    assert "\nexport TDDS_JOB_STARTED=$(date +%s)\nmodule load 'cuda 12'\nexport A=\"$HOME\"\nset +eu  # " in collect
    (srun,) = (line for line in collect.splitlines() if line.startswith("srun "))
    for word in ("--kill-on-bad-exit=1", "--cpus-per-task=5", "--cpu-bind=cores"):
        assert f" {word} " in srun
    assert re.search(r" --wait=[1-9]\d* ", srun)
    assert srun.endswith(f" {python} -u -m submitit.core._submit {folder}")
    assert f"\ncode=$?\n{python} -m launch.after {folder} $code 6 9; code=$?\nif [ $code -eq 75 ]; then\n" in collect
    assert collect.endswith('\nfi\n[ $code -ne 77 ] || scontrol requeue "$SLURM_JOB_ID"\nexit $code')
    assert {"nodes=1", "ntasks-per-node=3", "mem=3GB", "array=0-1%1",
            f"output={folder}/%A_%a_0_log.out"} <= set(flags_of(retrain))
    assert "module load" not in retrain
    assert {"nodes=1", "ntasks-per-node=1", "partition=cpu", "mem=512MB"} <= set(flags_of(select))
    assert "exclusive" not in flags_of(select)


def test_sbatch_file_asks_for_nothing_that_is_not_said(config_file: Path, tmp_path: Path, slurm: Slurm) -> None:
    assert main([str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), "--stage", "collect"]) == 0
    (text,) = slurm.handed
    folder = tmp_path / "run" / "jobs"
    assert sorted(flags_of(text)) == sorted([
        "cpus-per-task=1", f"error={folder}/%j_0_log.err", "job-name=collect-tiny", "nodes=1", "ntasks-per-node=1",
        "open-mode=append", f"output={folder}/%j_0_log.out", "requeue", "signal=USR2@90", "time=5"])
    assert f" {sys.executable} -u -m submitit" in text
    assert "wckey" not in text


@pytest.mark.parametrize(("venv", "container", "python"), [
    (None, None, sys.executable), ("/e", None, "/e/bin/python"), (None, "docker run x", "docker run x python3"),
    ("/e", "docker run x", "docker run x /e/bin/python")])
def test_the_python_of_the_jobs(venv: str | None, container: str | None, python: str) -> None:
    assert Cluster(executor="slurm", time_minutes=5, venv=venv, container=container).python == python


@pytest.mark.parametrize("venv", ["~/env", "$HOME/env"])
def test_a_venv_below_home_is_found(venv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert Cluster(executor="slurm", time_minutes=5, venv=venv).python == "/home/x/env/bin/python"


def test_folders_with_spaces(config_file: Path, tmp_path: Path, slurm: Slurm) -> None:
    cluster_file = write(tmp_path / "c.yaml", SLURM)
    assert main([str(config_file), "--cluster", str(cluster_file), "--stage", "collect", f"run.dir={tmp_path}/a b"]) == 0
    (text,) = slurm.handed
    assert f"-m launch.after '{tmp_path}/a b/jobs' $code" in text
    assert f"-m submitit.core._submit '{tmp_path}/a b/jobs'\n" in text


def test_every_stage_waits_for_the_one_before_and_is_listed(config_file: Path, tmp_path: Path, slurm: Slurm,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(config_file), "--cluster", str(CLUSTERS / "gpu.yaml"), EIGHT_RANKS]
    assert main(arguments) == 0
    run, listed = tmp_path / "run", read_jobs(tmp_path / "run" / "jobs")
    assert [(job.id, job.stage, job.after, job.num_ranks) for job in listed] == [
        ("4242", "collect", (), 8), ("4243", "select", ("4242",), 1), ("4244_0", "retrain", ("4243",), 8),
        ("4244_1", "retrain", ("4243",), 8), ("4245", "report", ("4244",), 1)]
    assert len({job.submission for job in listed}) == 1
    assert {(job.executor, job.host) for job in listed} == {("slurm", socket.gethostname())}
    assert [Path(job.directory) for job in listed] == [
        run, run, run / "retrain" / "tdds_p0.5_E_batch_seed0", run / "retrain" / "tdds_p0.8_E_batch_seed0", run]
    assert [job.title for job in listed if job.stage == "retrain"] == ["tdds_p0.5_E_batch_seed0", "tdds_p0.8_E_batch_seed0"]
    out = capsys.readouterr().out
    assert "submitted jobs 4242, 4243, 4244, 4245 (5 with the elements of arrays)\n" in out
    assert f"tdds status {run}\n" in out
    assert "scancel 4242 4243 4244 4245\n" in out
    assert re.search(r"retrain +2 +0  1 node\(s\) x 8 rank\(s\), 8 GPUs per node, at most 1440 minutes", out)
    (frozen,) = (run / "jobs").glob("*.yaml")
    for job in listed:  # what each job will run is there, under its id
        task = DelayedSubmission.load(run / "jobs" / f"{job.id}_submitted.pkl")
        assert (task._timeout_min, task._timeout_countdown) == (load_cluster(CLUSTERS / "gpu.yaml").for_stage(
            job.stage).time_minutes, 100)
        assert isinstance(task.function, StageTask)
        assert task.function.cpus_per_rank == 8
        assert task.function.commands[0][0] in (job.stage, "score")
        if job.stage in ("collect", "retrain"):
            assert task.function.commands[0][1] == str(frozen)


def finish(config_file: Path, *overrides: str, coreset: Path | None = None, name: str = "") -> None:
    """What a collection leaves that is done, or a retraining on this coreset."""
    config = load_config(config_file, overrides)
    run, setting = RunDir(config.run.directory), {"stage": "collect"}
    if coreset is not None:
        importance = "batch" if name.startswith("tdds") else "none"
        run, config, setting = resolve(config, load_coreset(coreset), coreset, "E", importance, name)
    run.start(to_dict(config), setting, 1, "cpu")
    write(run.result_file, "{}")


def test_what_is_done_is_not_submitted_and_nothing_waits_for_it(config_file: Path, tmp_path: Path, slurm: Slurm,
                                                                capsys: pytest.CaptureFixture[str], coreset: Path) -> None:
    run = tmp_path / "run"
    finish(config_file)
    finish(config_file, coreset=coreset, name="tdds_p0.8_E_batch_seed0")
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]
    assert main(arguments) == 0
    assert [(job.stage, job.after) for job in read_jobs(run / "jobs")] == [
        ("select", ()), ("retrain", ("4242",)), ("report", ("4243",))]
    assert "--array" not in "".join(slurm.handed)
    slurm.queue("4242 COMPLETED\n4243 COMPLETED\n4244 COMPLETED")
    finish(config_file, coreset=coreset, name="tdds_p0.5_E_batch_seed0")
    (run / "report.html").touch()
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == (f"everything is done: collect, select, 2 x retrain, report; the page: "
                                       f"{run}/report.html\n")
    assert len(slurm.handed) == 3


@pytest.mark.parametrize(("override", "message"), [
    ("train.lr=0.5", "train.lr was 0.05, now 0.5"), ("retrain.epochs=7", "train.epochs was 3, now 7"),
    ("train.log_every=3", ""), ("pipeline.seeds=[0, 1]", ""), ("score.on_nan=quarantine", ""), ("run.timeout_seconds=9.0", "")])
def test_what_is_done_with_other_settings_is_not_taken_for_done(
        config_file: Path, tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str], coreset: Path, override: str,
        message: str) -> None:
    run, name = tmp_path / "run", "tdds_p0.8_E_batch_seed0"
    finish(config_file)
    (run / "coresets").mkdir()
    shutil.copy(coreset, run / "coresets" / "tdds_p0.8.npz")
    finish(config_file, coreset=run / "coresets" / "tdds_p0.8.npz", name=name)
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), override]
    assert main(arguments) == (2 if message else 0)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == bool(message)
    assert bool(slurm.handed) != bool(message)


def test_a_retraining_from_before_the_collection_is_not_taken_for_done(
        config_file: Path, tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str], coreset: Path) -> None:
    run, name = tmp_path / "run", "tdds_p0.8_E_batch_seed0"
    finish(config_file)
    (run / "coresets").mkdir()
    shutil.copy(coreset, run / "coresets" / "tdds_p0.8.npz")
    finish(config_file, coreset=run / "coresets" / "tdds_p0.8.npz", name=name)
    os.utime(run / "retrain" / name / "result.json", (1e9, 1e9))
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{run}/retrain/{name} was trained before the collection that is there now had finished; remove it" in error
    assert slurm.handed == []
    shutil.rmtree(run / "retrain" / name)
    assert main(arguments) == 0


def test_one_retraining(config_file: Path, tmp_path: Path, slurm: Slurm, coreset: Path) -> None:
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), "--stage", "retrain", "--coreset",
                 str(coreset), "--strategy", "P"]
    assert main(arguments) == 0
    assert main([*arguments, "--importance", "sample", "--name", "other", "run.seed=4"]) == 0
    first, second = read_jobs(tmp_path / "run" / "jobs")
    assert first.directory == str(tmp_path / "run" / "retrain" / "mine_P_batch_seed0")
    assert second.directory == str(tmp_path / "run" / "retrain" / "other")
    for job, expected in ((first, ["batch", "mine_P_batch_seed0"]), (second, ["sample", "other"])):
        task = DelayedSubmission.load(tmp_path / "run" / "jobs" / f"{job.id}_submitted.pkl").function
        options = cli.parse(task.commands[0])
        assert [options.importance, options.name] == expected
        assert (options.coreset, options.strategy) == (coreset, "P")
        assert load_config(options.config, options.overrides).run.seed == (4 if job is second else 0)


@pytest.mark.parametrize("overrides", [["train.lr=0.5"], ["score.beta=0.25", "pipeline.seeds=[1, 2]", "train.lr=1e-3"]])
def test_frozen_config_is_the_config(config_file: Path, tmp_path: Path, slurm: Slurm, overrides: list[str]) -> None:
    """Under a name that its content decides: what is edited while jobs wait changes nothing."""
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), "--stage", "collect", *overrides]
    config = load_config(config_file, overrides)
    assert main(arguments) == 0
    (frozen,) = (tmp_path / "run" / "jobs").glob("collect-*.yaml")
    assert load_config(frozen) == config
    slurm.queue("4242 CANCELLED")
    config_file.write_text(config_file.read_text().replace("epochs: 3", "epochs: 4"))
    assert main(arguments) == 0
    assert load_config(frozen) == config
    assert len(list((tmp_path / "run" / "jobs").glob("collect-*.yaml"))) == 2


# ---- refusals of SLURM


@pytest.mark.parametrize(("number", "cancelled"), [(1, []), (2, ["4242"]), (4, ["4242 4243 4244"])])
def test_a_stage_that_is_refused_takes_those_before_with_it(
        config_file: Path, tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str], number: int,
        cancelled: list[str]) -> None:
    slurm.refuse(number, "sbatch: error: something first\nsbatch: error: Batch job submission failed: Invalid qos")
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]
    assert main(arguments) == 2
    name = f"{STAGES[number - 1]}-tiny"
    *passed_on, ours = capsys.readouterr().err.splitlines()
    assert ours == (f"launch.submit: error: the scheduler refused {name} (something first; Batch job submission failed: "
                    "Invalid qos); adapt the cluster file")
    assert all(line.startswith("sbatch: error: ") for line in passed_on)  # by submitit
    assert slurm.cancelled == cancelled
    assert read_jobs(tmp_path / "run" / "jobs") == []  # so that the next try is not refused
    assert main(arguments) == 0


@pytest.mark.parametrize("said", ["", "no colon here", "sbatch: error: \tspaces   and\n\n\n"])
def test_a_refusal_is_one_line_whatever_sbatch_says(config_file: Path, tmp_path: Path, slurm: Slurm,
                                                    capsys: pytest.CaptureFixture[str], said: str) -> None:
    slurm.refuse(1, said)
    assert main([str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("launch.submit: error: the scheduler refused collect-tiny (")
    assert lines[-1].endswith("); adapt the cluster file")
    assert lines[:-1] in ([], said.splitlines()[:1])  # passed on by submitit


def test_no_slurm_is_one_line(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = [str(config_file), "--cluster", str(CLUSTERS / "gpu.yaml"), EIGHT_RANKS]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch.submit: error: executor=slurm needs srun and sbatch")
    assert "submit from a login node, or use executor=local" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--dry-run"]) == 0  # what would be queued can be seen anywhere


def test_half_a_slurm_is_one_line(config_file: Path, tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    """A compute node may have srun and no sbatch."""
    (slurm.folder / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(slurm.folder))
    assert main([str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_submission_from_inside_a_job_says_nothing_of_that_job(config_file: Path, tmp_path: Path, slurm: Slurm,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch would take SBATCH_* for options, and pass SLURM_* on."""
    inside = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "64", "SBATCH_PARTITION": "debug", "SLURM_CONF": "/etc/x.conf", "RANK": "3"}
    for key, value in inside.items():
        monkeypatch.setenv(key, value)
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), "--stage", "collect"]
    assert main(arguments) == 0
    told = slurm.environment(1)
    assert told["SLURM_CONF"] == "/etc/x.conf"
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "RANK"} & told.keys()
    assert os.environ["SLURM_JOB_ID"] == "7"
    monkeypatch.delenv("SLURM_JOB_ID")  # a login node: what its user set is meant
    slurm.queue("4242 CANCELLED")
    assert main(arguments) == 0
    assert slurm.environment(2)["SBATCH_PARTITION"] == "debug"


# ---- submitted twice


@pytest.mark.parametrize(("queue", "is_refused"), [
    ("4242 RUNNING\n4243 PENDING\n4244_[0-1] PENDING\n4245 PENDING", True), ("4242 PENDING", True),
    ("4242 FAILED\n4243 PENDING", True), ("4242 COMPLETING", True),
    ("4242 FAILED\n4243 CANCELLED\n4244_0 CANCELLED\n4244_1 CANCELLED\n4245 CANCELLED", False)])
def test_a_run_whose_jobs_are_queued_or_running_is_not_submitted_again(
        config_file: Path, tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str], queue: str,
        is_refused: bool) -> None:
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]
    assert main(arguments) == 0
    slurm.queue(queue)
    capsys.readouterr()
    assert main(arguments) == (2 if is_refused else 0)
    error = capsys.readouterr().err
    assert len(slurm.handed) == (4 if is_refused else 8)
    if is_refused:
        num = 5 if "[0-1]" in queue else 1
        assert error.startswith(f"launch.submit: error: {num} jobs of this run are queued or running (424")
        assert "wait for them, or stop them with scancel 424" in error
        assert error.count("\n") == 1


def test_a_collection_that_is_done_and_still_leaving_keeps_nobody_waiting(config_file: Path, tmp_path: Path,
                                                                          slurm: Slurm) -> None:
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]
    assert main([*arguments, "--stage", "collect"]) == 0
    slurm.queue("4242 COMPLETING")
    assert main(arguments) == 2
    finish(config_file)
    assert main(arguments) == 0


def test_other_work_in_the_same_run_may_be_submitted(config_file: Path, tmp_path: Path, slurm: Slurm, coreset: Path) -> None:
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM))]
    retrain = [*arguments, "--stage", "retrain", "--coreset", str(coreset), "--strategy"]
    assert main([*retrain, "E"]) == 0
    slurm.queue("4242 RUNNING")
    assert main([*retrain, "E"]) == 2
    assert main([*retrain, "P"]) == 0
    assert main([*arguments, "--stage", "collect"]) == 0


def test_jobs_in_another_log_folder_count_too(config_file: Path, tmp_path: Path, slurm: Slurm) -> None:
    elsewhere = write(tmp_path / "a.yaml", f"{{executor: slurm, time_minutes: 5, log_dir: {tmp_path}/logs}}")
    assert main([str(config_file), "--cluster", str(elsewhere)]) == 0
    slurm.queue("4242 RUNNING")
    assert main([str(config_file), "--cluster", str(write(tmp_path / "b.yaml", SLURM))]) == 2


# ---- where things go


def test_a_log_folder_elsewhere_is_found_from_the_run(config_file: Path, tmp_path: Path, slurm: Slurm,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_file = write(tmp_path / "c.yaml", f"{{executor: slurm, time_minutes: 5, log_dir: {tmp_path}/logs}}")
    assert main([str(config_file), "--cluster", str(cluster_file), "--stage", "collect"]) == 0
    run, logs = tmp_path / "run", tmp_path / "logs" / "tiny"
    assert (run / "jobs.path").read_text() == f"{logs}\n"
    assert log_dir_of(run) == logs
    assert [job.id for job in read_jobs(logs)] == ["4242"]
    assert not (run / "jobs").exists()
    assert f"--output={logs}/%j_0_log.out" in slurm.handed[0]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.yaml", "{executor: slurm, time_minutes: 5, log_dir: other}")
    slurm.queue("4242 CANCELLED")
    assert main([str(config_file), "--cluster", str(cluster_file), "--stage", "collect"]) == 0
    assert log_dir_of(run) == tmp_path / "other" / "tiny"  # from wherever one looks


def test_a_later_submission_without_log_dir_is_the_one_that_is_found(config_file: Path, tmp_path: Path, slurm: Slurm) -> None:
    elsewhere = write(tmp_path / "a.yaml", f"{{executor: slurm, time_minutes: 5, log_dir: {tmp_path}/logs}}")
    assert main([str(config_file), "--cluster", str(elsewhere)]) == 0
    slurm.queue("4242 CANCELLED\n4243 CANCELLED\n4244_[0-1] CANCELLED\n4245 CANCELLED")
    assert main([str(config_file), "--cluster", str(write(tmp_path / "b.yaml", SLURM))]) == 0
    assert log_dir_of(tmp_path / "run") == tmp_path / "run" / "jobs"


def test_missing_data_is_a_warning(config_file: Path, tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    """The nodes may see what the login node does not."""
    arguments = [str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), "--stage", "collect"]
    missing = [*arguments, "data.train=/scratch/no.beton"]
    for also in (["--dry-run"], []):
        assert main([*missing, *also]) == 0
        assert capsys.readouterr().err == ("warning: data.train=/scratch/no.beton not found on this machine; the nodes must "
                                           "have it\n")
    slurm.queue("4242 CANCELLED")
    assert main([*missing, "data.val=/scratch/neither.beton"]) == 0
    assert ("warning: data.train=/scratch/no.beton and data.val=/scratch/neither.beton not found" in
            capsys.readouterr().err)
    slurm.queue("4242 CANCELLED\n4243 CANCELLED")
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("through", ["launch.submit", "tdds submit"])
def test_overrides_stand_before_and_after_options(config_file: Path, tmp_path: Path, slurm: Slurm, through: str) -> None:
    cluster_file = write(tmp_path / "c.yaml", SLURM)
    words = [str(config_file), "train.lr=0.5", "--cluster", str(cluster_file), "train.epochs=4", "--stage", "collect",
             "run.seed=9", "pipeline.seeds=[1, 2]"]
    orders = (words, [words[2], words[3], words[0], words[1], *words[4:]], [words[0], *words[2:4], *words[5:7], words[1],
                                                                            words[4], *words[7:]])
    for number, order in enumerate(orders):
        order = [*order, f"run.dir={tmp_path}/{number}"]
        code = main(order) if through == "launch.submit" else cli.main(["submit", *order])
        assert code == 0
        (frozen,) = (tmp_path / str(number) / "jobs").glob("collect-*.yaml")
        config = load_config(frozen)
        assert (config.train.lr, config.train.epochs, config.run.seed, config.pipeline.seeds) == (0.5, 4, 9, (1, 2))


def test_tdds_submit_refuses_in_its_own_name(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", str(config_file), "--cluster", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == (f"tdds submit: error: {tmp_path}/no.yaml does not exist; configs/clusters/ holds "
                                       "examples\n")


# ---- waiting


@pytest.fixture
def patient(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], object]]]:
    """What happens between two looks of `--wait`, one after the other."""
    happens: list[Callable[[], object]] = []
    clock = SimpleNamespace(time=time.time, strftime=time.strftime, sleep=lambda seconds: happens.pop(0)())
    monkeypatch.setattr(launch.submit, "time", clock)
    yield happens
    assert happens == []


def test_wait_follows_the_jobs(config_file: Path, tmp_path: Path, slurm: Slurm, patient: list[Callable[[], object]],
                               capsys: pytest.CaptureFixture[str]) -> None:
    slurm.queue("4242 PENDING")
    patient += [lambda: slurm.queue("4242 RUNNING"), lambda: slurm.queue("4242 RUNNING"), lambda: slurm.queue("4242 COMPLETED")]
    assert main([str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), "--stage", "collect", "--wait"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("collect-tiny")] == [
        f"collect-tiny 4242 (collect): {state}" for state in ("pending", "running", "finished")]


@pytest.mark.parametrize(("kinds", "code", "said"), [
    ((("refused", 0),), 2, "rank 0 on node0: refused it said"),
    ((("lost", 0), ("failed", 1), ("lost", 2)), 1, "rank 1 on node1: failed it said"),
    ((("lost", 2),), 1, "rank 2 on node2: lost it said"), ((), 1, "")])
def test_wait_leaves_with_the_outcome_and_names_the_rank_that_failed(
        config_file: Path, tmp_path: Path, slurm: Slurm, patient: list[Callable[[], object]],
        capsys: pytest.CaptureFixture[str], kinds: tuple[tuple[str, int], ...], code: int, said: str) -> None:
    def fail() -> None:
        slurm.queue("4242 FAILED\n4243 CANCELLED\n4244_0 CANCELLED\n4244_1 CANCELLED\n4245 CANCELLED")
        for kind, rank in kinds:
            append_end(tmp_path / "run" / "jobs", "4242", {
                "kind": kind, "rank": rank, "time": time.time(), "host": f"node{rank}", "message": f"{kind} it said"})

    slurm.queue("4242 RUNNING\n4243 PENDING\n4244_[0-1] PENDING\n4245 PENDING")
    patient.append(fail)
    assert main([str(config_file), "--cluster", str(write(tmp_path / "c.yaml", SLURM)), "--wait"]) == code
    captured = capsys.readouterr()
    assert captured.err == (f"{said}\n" if said else "")
    assert "retrain-tiny 4244_1 (tdds_p0.8_E_batch_seed0): cancelled\n" in captured.out


# ---- real jobs of this machine


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few cores are shared; and a leftover of the shell that must not reach the job."""
    for key, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SUBMITIT_", "TDDS_"))]:
        monkeypatch.delenv(key)


LOCAL = str(CLUSTERS / "local.yaml")
SHORT = ["train.epochs=2", "score.windows=[{T: 2, K: 2, pruning_rates: [0.5]}]"]


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_input_of_a_job_comes_back_with_wait(config_file: Path, tmp_path: Path, quiet: None,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    cluster_file = write(tmp_path / "c.yaml", "{executor: local, time_minutes: 5, setup: [export A=1]}")
    arguments = [str(config_file), "--cluster", str(cluster_file), "--stage", "collect", "--wait",
                 f"data.train={tmp_path}/no.beton"]
    assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("warning: ")
    assert re.fullmatch(rf"collect failed: collect: rank 0: tdds collect: error: .*{tmp_path}/no\.beton.*", lines[1])
    assert len(lines) == 2
    (job,) = read_jobs(tmp_path / "run" / "jobs")
    assert [end.kind for end in read_ends(tmp_path / "run" / "jobs", job.id)] == ["refused"]


@pytest.mark.distributed
def test_the_rank_that_failed_is_named_and_not_those_that_lost_it(
        config_file: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 loses the others before they have written why."""
    class Hurt(StageTask):
        def __call__(self) -> None:
            import time

            from tdds_dist import cli

            def outcome(command: list[str], interruption: object) -> tuple[int, str]:
                if self.rank == 0:
                    return 1, "tdds collect: error: rank 1 ended"
                time.sleep(0.3 * self.rank)
                raise ZeroDivisionError(f"the cause, on {self.rank}")

            cli.outcome = outcome
            super().__call__()

    monkeypatch.setattr(launch.submit, "StageTask", Hurt)
    cluster_file = write(tmp_path / "c.yaml", "{executor: local, time_minutes: 5, ranks_per_node: 3}")
    assert main([str(config_file), "--cluster", str(cluster_file), "--stage", "collect", "--wait"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("collect failed: collect: rank 1: ZeroDivisionError: the cause, on 1\nTraceback")
    assert error.count("Traceback") == 1
    assert "rank 1 ended" not in error


@pytest.mark.distributed
def test_a_rank_that_cannot_even_start_is_a_failure(config_file: Path, tmp_path: Path, quiet: None,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit writes a result of exceptions too."""
    class Broken(StageTask):
        def __call__(self) -> None:
            raise ImportError("no module named tdds_dist")

    monkeypatch.setattr(launch.submit, "StageTask", Broken)
    cluster_file = write(tmp_path / "c.yaml", ONE_RANK)
    assert main([str(config_file), "--cluster", str(cluster_file), "--stage", "collect", "--wait"]) == 1


@pytest.mark.distributed
def test_a_local_job_in_the_background_is_not_submitted_again(config_file: Path, tmp_path: Path, quiet: None,
                                                              capfd: pytest.CaptureFixture[str]) -> None:
    cluster_file = write(tmp_path / "c.yaml", "{executor: local, time_minutes: 5, setup: [exec sleep 60]}")
    arguments = [str(config_file), "--cluster", str(cluster_file), "--stage", "collect"]
    assert main(arguments) == 0
    (job,) = read_jobs(tmp_path / "run" / "jobs")
    try:
        assert f"collect: collect is process {job.id}, log " in capfd.readouterr().out
        assert main(arguments) == 2
        assert f"1 jobs of this run are queued or running ({job.id}); wait for them, or stop them with kill -TERM {job.id}" in (
            capfd.readouterr().err)
    finally:
        deadline = time.monotonic() + 30
        while (tmp_path / "run" / "jobs").exists() and time.monotonic() < deadline:
            os.kill(int(job.id), signal.SIGTERM)  # early, its rank may not be there yet
            if os.waitpid(int(job.id), os.WNOHANG)[0]:
                break
            time.sleep(0.1)
    assert main([*arguments, "--dry-run"]) == 0


def submitted(config_file: Path, *arguments: str, deadline: float = 240.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tdds_dist", "submit", str(config_file), "--cluster", LOCAL, *arguments],
                          cwd=REPOSITORY, capture_output=True, text=True, timeout=deadline)


@pytest.mark.distributed
@pytest.mark.slow
def test_local_job_collects_on_two_ranks(config_file: Path, tmp_path: Path, quiet: None) -> None:
    done = submitted(config_file, "--stage", "collect", "--wait", *SHORT)
    assert done.returncode == 0, done.stderr
    rundir = RunDir(tmp_path / "run")
    assert done.stdout.endswith("collect: collect is done\ndone\n")
    scores = load_scores(rundir.scores / "tdds_official_T2_K2_beta0.9.npz")
    assert scores.score_N.shape == (120,)
    assert np.isfinite(scores.score_N).all()
    assert rundir.read_env()["world_size"] == 2
    result = rundir.read_result()
    assert result is not None
    assert result["epochs"] == 2
    (job,) = read_jobs(rundir.path / "jobs")
    logs = sorted(path.name for path in (rundir.path / "jobs").glob("*_log.err"))
    assert logs == [f"{job.id}_{rank}_log.err" for rank in (0, 1)]
    assert read_ends(rundir.path / "jobs", job.id) == []
    status = json.loads(rundir.status_file.read_text())
    assert (status["state"], status["job"]) == ("finished", job.id)
    again = submitted(config_file, "--stage", "collect", "--wait", *SHORT)
    assert (again.returncode, again.stdout) == (0, "everything is done: collect\n")


@pytest.mark.distributed
@pytest.mark.slow
def test_the_whole_pipeline_here_and_again(config_file: Path, tmp_path: Path, quiet: None,
                                           capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(config_file), "--cluster", LOCAL, "pipeline.scores=[tdds, random]", *SHORT]
    run = tmp_path / "run"
    assert main(arguments) == 0, capfd.readouterr().err
    captured = capfd.readouterr()
    names = ["tdds_p0.5_E_batch_seed0", "random_p0.5_E_none_seed0"]
    assert [line for line in captured.out.splitlines() if line.endswith(" is done")] == [
        "collect: collect is done", "select: 2 coresets is done", *(f"retrain: {name} is done" for name in names),
        "report: report is done"]
    assert [(job.stage, job.num_ranks) for job in read_jobs(run / "jobs")] == [
        ("collect", 2), ("select", 1), ("retrain", 2), ("retrain", 2), ("report", 1)]
    for name in names:
        assert (run / "retrain" / name / "result.json").is_file()
    assert sorted(path.name for path in (run / "coresets").iterdir()) == ["random_p0.5.npz", "tdds_p0.5.npz"]
    assert (run / "report.html").is_file()

    assert main(arguments) == 0
    assert capfd.readouterr().out == f"everything is done: collect, select, 2 x retrain, report; the page: {run}/report.html\n"
    assert len(read_jobs(run / "jobs")) == 5

    other, report = run / "retrain" / names[1] / "result.json", (run / "report.html").stat().st_mtime_ns
    before = other.read_text(), (run / "result.json").stat().st_mtime_ns
    shutil.rmtree(run / "retrain" / names[0])
    assert main(arguments) == 0, capfd.readouterr().err
    assert [line for line in capfd.readouterr().out.splitlines() if line.endswith(" is done")] == [
        f"retrain: {names[0]} is done", "report: report is done"]
    assert (run / "retrain" / names[0] / "result.json").is_file()
    assert (other.read_text(), (run / "result.json").stat().st_mtime_ns) == before
    assert (run / "report.html").stat().st_mtime_ns > report
    assert len(read_jobs(run / "jobs")) == 7


# ---- asked to leave


LONG = ["train.deterministic=true", "train.epochs=6", "score.windows=[{T: 6, K: 3}]", "score.final_pass=false",
        "data.num_workers=1"]


def status_of(run: Path) -> dict[str, object]:
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def until_epoch(run: Path, epoch: int, is_alive: Callable[[], bool], deadline: float = 90.0) -> int:
    """Wait until a run trains and has finished so many epochs; the pid of its rank 0."""
    end = time.monotonic() + deadline
    while (found := status_of(run)).get("state") != "training" or int(str(found["epoch"])) < epoch:
        assert is_alive(), found
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return int(str(found["pid"]))


def straight(config_file: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    path = tmp_path / "straight"
    done = submitted(config_file, "--stage", "collect", "--wait", *LONG, f"run.dir={path}")
    assert done.returncode == 0, done.stderr
    return jobs.state_of(path)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_local_job_that_is_preempted_is_queued_again_and_comes_to_the_same(config_file: Path, tmp_path: Path,
                                                                             quiet: None) -> None:
    """submitit's local controller starts it again on exit code 144."""
    run = tmp_path / "run"
    arguments = ["submit", str(config_file), "--cluster", LOCAL, "--stage", "collect", "--wait", *LONG]
    process = subprocess.Popen([sys.executable, "-m", "tdds_dist", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        pid = until_epoch(run, 2, lambda: process.poll() is None)
        os.kill(pid, signal.SIGUSR2)
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
    assert result is not None
    assert (result["epochs"], result["resumes"]) == (6, 1)
    assert jobs.differences(straight(config_file, tmp_path), jobs.state_of(run)) == []


class Ranks:
    """The ranks of a submitted job as the local controller starts them, in our hands: their exit codes can be seen."""

    def __init__(self, task: StageTask, folder: Path, job_id: str, num_ranks: int):
        folder.mkdir(parents=True, exist_ok=True)
        submission = DelayedSubmission(task)
        submission.set_timeout(60, 3)
        if not (folder / f"{job_id}_submitted.pkl").exists():
            submission.dump(folder / f"{job_id}_submitted.pkl")
        environment = os.environ | {
            "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": job_id, "SUBMITIT_LOCAL_NTASKS": str(num_ranks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1", "SUBMITIT_LOCAL_NODEID": "0", "CUDA_VISIBLE_DEVICES": "",
            "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.logs = [folder / f"rank{rank}.txt" for rank in range(num_ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("a") as file:
                self.processes.append(subprocess.Popen(
                    [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)], cwd=REPOSITORY, stdout=file,
                    stderr=file, env=environment | {"SUBMITIT_LOCAL_LOCALID": str(rank), "SUBMITIT_LOCAL_GLOBALID": str(rank)}))

    def is_alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait(self, deadline: float = 90.0) -> list[int]:
        end = time.monotonic() + deadline
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    @property
    def text(self) -> str:
        return "".join(log.read_text() for log in self.logs)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("signals", "codes", "kind"), [
    ([signal.SIGTERM], [75, 0], "resume"), ([signal.SIGTERM, signal.SIGUSR2], [144, 0], "requeued")])
def test_a_job_that_is_cancelled_is_not_queued_again(config_file: Path, tmp_path: Path, quiet: None,
                                                     signals: list[signal.Signals], codes: list[int], kind: str) -> None:
    """SIGTERM alone is a cancellation; with SIGUSR2 a few seconds later, a preemption. Saved in both cases."""
    run, folder = tmp_path / "run", tmp_path / "jobs"
    job_id = str(os.getpid())
    task = StageTask([["collect", str(config_file), *LONG]], folder, time_minutes=60, grace_seconds=90)
    ranks = Ranks(task, folder, job_id, 2)
    pid = until_epoch(run, 1, ranks.is_alive)
    assert pid == ranks.processes[0].pid
    for process in ranks.processes:  # all of them, as a scheduler does
        process.send_signal(signals[0])
    if len(signals) > 1:
        until = time.monotonic() + 30
        while ranks.processes[1].poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        ranks.processes[0].send_signal(signals[1])
    assert ranks.wait() == codes, ranks.text
    (end,) = read_ends(folder, job_id)
    assert (end.kind, end.rank) == (kind, 0)
    assert "SIGTERM: saved at epoch" in end.message
    assert not list(folder.glob("*_result.pkl"))
    assert status_of(run)["state"] == "stopped"
    assert list((run / "checkpoints").glob("step_*"))
    again = Ranks(task, folder, job_id, 2)  # submitted, or started, again: it goes on
    assert again.wait() == [0, 0], again.text
    assert len(list(folder.glob("*_result.pkl"))) == 2
    assert len(RunDir(run).read_env()["resumes"]) == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_dies_in_the_middle_is_named_by_the_others_or_itself(config_file: Path, tmp_path: Path, quiet: None,
                                                                         monkeypatch: pytest.MonkeyPatch,
                                                                         capfd: pytest.CaptureFixture[str]) -> None:
    """A real one: rank 1 raises in a step, rank 0 loses it."""
    class Hurt(StageTask):
        def __call__(self) -> None:
            from tdds_dist.engine import Trainer

            update = Trainer._update

            def hurt(trainer: Trainer) -> float:
                if trainer.step + 1 == 3 and trainer.job.world.rank == 1:
                    raise ZeroDivisionError("the cause")
                return update(trainer)

            Trainer._update = hurt
            super().__call__()

    monkeypatch.setattr(launch.submit, "StageTask", Hurt)
    assert main([str(config_file), "--cluster", LOCAL, "--stage", "collect", "--wait", *SHORT]) == 1
    error = capfd.readouterr().err
    assert "collect failed: collect: rank 1: ZeroDivisionError: the cause\n" in error
    (job,) = read_jobs(tmp_path / "run" / "jobs")
    ends = read_ends(tmp_path / "run" / "jobs", job.id)
    assert {(end.rank, end.kind) for end in ends} == {(0, "lost"), (1, "failed")}


# ---- launch/torchrun.sh


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True,
                          timeout=150)


@pytest.mark.distributed
def test_torchrun_script_starts_a_stage(tmp_path: Path) -> None:
    script = str(REPOSITORY / "launch" / "torchrun.sh")
    done = run(script, "collect", "--help", RANKS="1")
    assert done.returncode == 0, done.stderr
    assert "usage: tdds collect" in done.stdout
    assert run(script).returncode == 2


def test_torchrun_script_counts_gpus(tmp_path: Path) -> None:
    """One rank per visible GPU: stand-ins for nvidia-smi and torchrun."""
    script = write(tmp_path / "torchrun.sh", (REPOSITORY / "launch" / "torchrun.sh").read_text())  # away from .venv
    gpus = "printf 'GPU 0: A\\n  MIG 1g: x\\nGPU 1: A\\nGPU 2: A\\n'"
    for name, body in {"nvidia-smi": gpus, "torchrun": 'echo "$OMP_NUM_THREADS" "$@"', "nproc": "echo 12"}.items():
        write(tmp_path / name, f"#!/bin/sh\n{body}\n").chmod(0o755)
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("RANKS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"

    def started(**changes: str) -> str:
        return subprocess.run(["bash", str(script), "collect", "a b"], env=environment | changes, capture_output=True,
                              text=True, timeout=20, check=True).stdout.strip()

    assert started() == "4 --standalone --nproc-per-node 3 -m tdds_dist collect a b"
    assert started(CUDA_VISIBLE_DEVICES="0,2") == "6 --standalone --nproc-per-node 2 -m tdds_dist collect a b"
    assert started(CUDA_VISIBLE_DEVICES="") == "12 --standalone --nproc-per-node 1 -m tdds_dist collect a b"
    assert started(RANKS="4", OMP_NUM_THREADS="2") == "2 --standalone --nproc-per-node 4 -m tdds_dist collect a b"
