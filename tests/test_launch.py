"""Submission of stages: cluster files, what SLURM is asked for, a real job of two ranks, torchrun.sh."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch.cluster import Cluster, load_cluster
from launch.submit import build_parser, check, freeze, main, submit, wait
from launch.task import StageTask
from tdds_dist.artifacts import load_scores
from tdds_dist.config import load_config
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTERS = REPOSITORY / "configs" / "clusters"
CORESET = ["--coreset", __file__, "--strategy", "E"]  # any file that exists
ONE_RANK = "{executor: local, time_minutes: 5}"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- cluster files


@pytest.mark.parametrize("name", ["gpu", "local"])
def test_shipped_cluster_files_load(name: str) -> None:
    cluster = load_cluster(CLUSTERS / f"{name}.yaml")
    assert cluster.executor == {"gpu": "slurm", "local": "local"}[name]


def test_every_key_of_a_cluster_file_has_its_sentence() -> None:
    assert all(field.description for field in Cluster.model_fields.values())


@pytest.mark.parametrize(("text", "message"), [
    ("{executor: slurm, time_minutes: 5, partion: gpu}", "unknown key 'partion'; the nearest valid key is 'partition'"),
    ("{executor: slurm}", "key 'time_minutes' is missing; Time limit of the job"),
    ("{executor: pbs, time_minutes: 5}", "executor='pbs': input should be 'slurm' or 'local'; slurm: sbatch and srun"),
    ("{executor: slurm, time_minutes: 5, nodes: '2'}", "nodes='2': input should be a valid integer; Nodes of the job"),
    ("{executor: slurm, time_minutes: 5, ranks_per_node: 0}", "ranks_per_node=0: input should be greater than"),
    ("{executor: slurm, time_minutes: 5, partition: a b}", "partition='a b': "),
    ("{executor: slurm, time_minutes: 5, setup: export A=1}", "setup='export A=1': input should be a valid tuple"),
    ("{executor: slurm, time_minutes: 5, setup: [1]}", "setup=1: input should be a valid string"),
    ("{executor: local, time_minutes: 5, nodes: 2}", "nodes=2 needs executor=slurm"),
    ("{executor: slurm, time_minutes: 5, ranks_per_node: 4, gpus_per_node: 2}",
     "gpus_per_node=2 is fewer than ranks_per_node=4"),
    ("[slurm]", "must hold keys of a cluster: executor, "),
    ("{executor: [", "is not plain YAML"),
])
def test_bad_cluster_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_cluster(write(tmp_path / "cluster.yaml", text))
    assert "\n" not in str(caught.value)


# ---- checks before submission


@pytest.mark.parametrize(("cluster", "arguments", "message"), [
    ("{executor: local, time_minutes: 5, ranks_per_node: 5}", ["--stage", "collect"],
     "train.global_batch_size=24 is not divisible by world_size=5; use 20 or 25"),
    ("{executor: slurm, time_minutes: 5, nodes: 2, ranks_per_node: 8}", ["--stage", "collect"],
     "train.global_batch_size=24 is not divisible by world_size=16"),
    (ONE_RANK, ["--stage", "collect", "train.leraning_rate=1"], "unknown key 'train.leraning_rate'"),
    (ONE_RANK, ["--stage", "collect", "train.epochs=2"], "T=3 is longer than train.epochs=2"),
    (ONE_RANK, ["--stage", "collect", "--strategy", "E"], "--strategy belongs to --stage retrain"),
    (ONE_RANK, ["--stage", "retrain", "--strategy", "E"], "--stage retrain needs --coreset"),
    (ONE_RANK, ["--stage", "retrain", "--coreset", "no.npz", "--strategy", "E"], "--coreset no.npz does not exist"),
    (ONE_RANK, ["--stage", "collect", "run.device=cuda"], "the cluster file asks for no GPU"),
    (ONE_RANK, ["--stage", "retrain", *CORESET, "train.accumulation=7"], "is not divisible by world_size=1 x "),
])
def test_bad_input_is_refused_before_anything_is_written(
        config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster: str, arguments: list[str],
        message: str) -> None:
    cluster_file = write(tmp_path / "cluster.yaml", cluster)
    assert main([str(config_file), "--cluster", str(cluster_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch.submit: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_retrain_batch_may_fit_by_the_batch_size_rule(config_file: Path) -> None:
    """24 is not divisible by 18 ranks, but a coreset at 0.8 may bring it down to 18."""
    config = load_config(config_file, ["retrain.batch_size_rule={0.8: 0.75}"])
    cluster = Cluster(executor="slurm", time_minutes=5, ranks_per_node=18)
    arguments = [str(config_file), "--cluster", "cluster.yaml", "--stage"]
    check(config, cluster, build_parser().parse_args([*arguments, "retrain", *CORESET]))
    with pytest.raises(InputError, match="not divisible"):
        check(config, cluster, build_parser().parse_args([*arguments, "collect"]))


def test_frozen_config_is_the_config(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["train.lr=0.5"])
    assert load_config(freeze(config, "collect", tmp_path / "jobs")) == config


def test_a_job_that_is_about_to_end_is_not_queued_again() -> None:
    assert StageTask(["collect"]).checkpoint() is None


# ---- SLURM: what it is asked for, with stand-ins for its programs


def stand_in_for_slurm(folder: Path, sbatch: str) -> str:
    """A PATH whose `sbatch` does this."""
    folder.mkdir()
    for name, body in {"srun": "exit 1", "sbatch": sbatch, "sacct": "exit 1"}.items():
        write(folder / name, f"#!/bin/sh\n{body}\n").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_sbatch_file_of_the_gpu_cluster(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", stand_in_for_slurm(tmp_path / "bin", "echo Submitted batch job 4242"))
    arguments = ["--cluster", str(CLUSTERS / "gpu.yaml"), "--stage", "collect", "train.lr=0.2"]
    assert main([str(config_file), *arguments]) == 0
    jobs = tmp_path / "run" / "jobs"
    text = (jobs / "4242_submission.sh").read_text()
    for flag in ("job-name=tiny-collect", "partition=gpu", "nodes=1", "ntasks-per-node=8", "gpus-per-node=8",
                 "cpus-per-task=8", "mem=256GB", "time=1440", "no-requeue"):
        assert f"#SBATCH --{flag}\n" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    for flag in ("--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=8"):
        assert f" {flag} " in srun
    assert "--account" not in text  # not set, not asked for

    (frozen,) = jobs.glob("collect-*.yaml")
    assert load_config(frozen).train.lr == 0.2
    assert load_config(frozen).data.num_workers == 8  # the CPUs that SLURM gives each rank, not a share of them
    out = capsys.readouterr().out
    assert "submitted tiny-collect as job 4242: 1 node(s) x 8 rank(s)" in out
    assert f"tail -F {jobs}/4242_0_log.err" in out
    assert "scancel 4242" in out


def test_sbatch_file_has_setup_and_the_rest(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", stand_in_for_slurm(tmp_path / "bin", "echo Submitted batch job 7"))
    cluster = {"executor": "slurm", "nodes": 2, "ranks_per_node": 3, "time_minutes": 30, "account": "acc",
               "qos": "high", "constraint": "a100&ib", "setup": ["export GLOO_SOCKET_IFNAME=lo"],
               "log_dir": str(tmp_path / "logs")}
    cluster_file = write(tmp_path / "cluster.yaml", yaml.safe_dump(cluster))
    assert main([str(config_file), "--cluster", str(cluster_file), "--stage", "retrain", *CORESET]) == 0
    text = (tmp_path / "logs" / "7_submission.sh").read_text()
    for flag in ("job-name=tiny-retrain", "nodes=2", "ntasks-per-node=3", "account=acc", "qos=high",
                 "constraint='a100&ib'"):
        assert f"#SBATCH --{flag}\n" in text
    assert "\nexport GLOO_SOCKET_IFNAME=lo\n" in text
    assert "gpus" not in text
    assert "mem=" not in text


@pytest.mark.parametrize(("sbatch", "message"), [
    ("echo 'invalid partition specified: gpu' >&2; exit 1", "the scheduler refused the job (invalid partition"),
    (None, "executor=slurm needs srun and sbatch"),
])
def test_no_slurm_or_its_refusal_is_bad_input(
        config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        sbatch: str | None, message: str) -> None:
    path = str(tmp_path) if sbatch is None else stand_in_for_slurm(tmp_path / "bin", sbatch)
    monkeypatch.setenv("PATH", path)
    assert main([str(config_file), "--cluster", str(CLUSTERS / "gpu.yaml"), "--stage", "collect"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]  # submitit passes on what sbatch said


# ---- real jobs


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True,
                          timeout=150)


def launch_submit(config_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    cluster = str(CLUSTERS / "local.yaml")
    return run(sys.executable, "-m", "launch.submit", str(config_file), "--cluster", cluster, *arguments, "--wait",
               OMP_WAIT_POLICY="PASSIVE", MASTER_PORT="1")  # a leftover of the shell that must not reach the job


@pytest.mark.distributed
@pytest.mark.slow
def test_local_job_collects_on_two_ranks(config_file: Path, tmp_path: Path) -> None:
    overrides = ["train.epochs=2", "score.windows=[{T: 2, K: 2}]"]
    done = launch_submit(config_file, "--stage", "collect", *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("collect is done\n")
    rundir = RunDir(tmp_path / "run")
    scores = load_scores(rundir.scores / "tdds_official_T2_K2_beta0.9.npz")
    assert scores.score_N.shape == (120,)
    assert np.isfinite(scores.score_N).all()
    assert rundir.read_env()["world_size"] == 2
    result = rundir.read_result()
    assert result is not None
    assert result["epochs"] == 2
    assert len(list((rundir.path / "jobs").glob("*_log.err"))) == 2


@pytest.mark.distributed
def test_wait_shows_the_rank_that_failed_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:  # rank 1 has the cause, rank 0 notices later
        import os
        import time

        if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "0":
            time.sleep(2)
            raise RuntimeError("connection closed by peer")
        raise ZeroDivisionError("the cause")

    job = submit(fail, Cluster(executor="local", time_minutes=1, ranks_per_node=2), "fails", tmp_path)
    assert wait(job, "collect") == 1
    error = capfd.readouterr().err
    assert "collect failed: Job (task=1)" in error
    assert "ZeroDivisionError: the cause" in error
    assert "connection closed" not in error


@pytest.mark.distributed
def test_wait_leaves_with_bad_input_that_the_job_found(config_file: Path, tmp_path: Path,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    task = StageTask(["collect", str(config_file), "train.epochs=x"])
    job = submit(task, Cluster(executor="local", time_minutes=1), "refused", tmp_path)
    assert wait(job, "collect") == 2
    error = capfd.readouterr().err
    assert error.startswith(f"tdds collect: error: {config_file}: train.epochs='x'")
    assert error.count("\n") == 1


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
