"""The throw-away SLURM does what tests expect of a cluster, disturbs nothing, and leaves nothing behind."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slurm import cluster as cluster_module
from slurm.cluster import NODES, SlurmCluster, SlurmError, missing_programs, remove_stale

pytestmark = pytest.mark.slurm

TESTS = Path(__file__).resolve().parents[1]
ELSEWHERE = ["/etc/slurm", "/etc/munge", "/run/munge", "/run/mysqld", "/run/slurm", "/var/lib/mysql", "/var/lib/munge",
             "/var/lib/slurm", "/var/log/munge", "/var/log/mysql", "/var/log/slurm", "/var/spool/slurm"]
needs_programs = pytest.mark.skipif(bool(missing_programs()), reason="tests/slurm/install.sh installs what a cluster needs")


def submit(slurm: SlurmCluster, folder: Path, script: str, *options: str) -> str:
    """Number of a job that runs lines of bash; `$OUT` is a file for what it has to say."""
    lines = f"#!/bin/bash\nOUT={shlex.quote(str(folder / 'said'))}\n{script}\n"
    path = folder / f"job{len(list(folder.glob('job*')))}.sh"
    path.write_text(lines)
    return slurm.run("sbatch", "--parsable", f"--output={folder}/%j.log", "--open-mode=append", *options, str(path))


def until(is_true: object, deadline: float = 20) -> None:
    assert callable(is_true)
    end = time.monotonic() + deadline
    while not is_true():
        assert time.monotonic() < end, f"waited {deadline} s in vain"
        time.sleep(0.1)


def said(folder: Path) -> list[str]:
    path = folder / "said"
    return path.read_text().splitlines() if path.exists() else []


def mentioning(directory: Path) -> list[str]:
    """Processes that have a directory in their command, their environment or their open files, other than this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            texts = []
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    texts.append((entry / name).read_text(errors="replace"))
            with contextlib.suppress(OSError):
                texts += [os.readlink(path) for path in (entry / "fd").iterdir()]
            if any(str(directory) in text for text in texts):
                found.append(f"{entry.name} {texts[0]}")
    return found


# ---- jobs


def test_two_nodes_with_names_that_resolve(slurm: SlurmCluster) -> None:
    names = slurm.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME").splitlines()
    assert sorted(names) == sorted(slurm.nodes) == sorted(NODES)
    assert len({socket.gethostbyname(name) for name in names}) == 2
    assert slurm.run("scontrol", "show", "hostnames", "127.0.0.[1-2]").splitlines() == list(NODES)


def test_array(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "echo $SLURM_ARRAY_TASK_ID >> $OUT; exit $((SLURM_ARRAY_TASK_ID == 2))", "--array=0-2")
    assert [slurm.wait_for(f"{job}_{i}", ["COMPLETED", "FAILED"]) for i in range(3)] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert sorted(said(tmp_path)) == ["0", "1", "2"]


def test_dependant_runs_after_success_only(slurm: SlurmCluster, tmp_path: Path) -> None:
    good = submit(slurm, tmp_path, "sleep 1; echo good >> $OUT")
    bad = submit(slurm, tmp_path, "sleep 1; exit 3")
    after_good = submit(slurm, tmp_path, "echo after good >> $OUT", f"--dependency=afterok:{good}")
    after_bad = submit(slurm, tmp_path, "echo after bad >> $OUT", f"--dependency=afterok:{bad}", "--kill-on-invalid-dep=yes")
    slurm.wait_for(after_good, "COMPLETED")
    slurm.wait_for(after_bad, "CANCELLED")
    assert said(tmp_path) == ["good", "after good"]


def test_accounting_knows_how_jobs_ended(slurm: SlurmCluster, tmp_path: Path) -> None:
    jobs = {"COMPLETED": submit(slurm, tmp_path, "true"), "FAILED": submit(slurm, tmp_path, "exit 3"),
            "CANCELLED": submit(slurm, tmp_path, "sleep 300")}
    slurm.wait_for(jobs["CANCELLED"], "RUNNING")
    slurm.run("scancel", jobs["CANCELLED"])
    for state, job in jobs.items():
        slurm.wait_for(job, state)
        until(lambda state=state, job=job: slurm.history(job) == [state])
    assert slurm.run("sacct", "-n", "-P", "-X", "-o", "ExitCode", "-j", jobs["FAILED"]) == "3:0"


def test_wait_for_tells_what_it_knows(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "echo out of luck; exit 3")
    with pytest.raises(AssertionError, match=rf"job {job} is FAILED .*instead of COMPLETED(.|\n)*out of luck(.|\n)*slurmctld"):
        slurm.wait_for(job, "COMPLETED")
    assert slurm.state(10**6) == "UNKNOWN"


# ---- interruptions


def test_requeued_job_runs_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "echo ${SLURM_RESTART_COUNT-none} >> $OUT; sleep $((SLURM_RESTART_COUNT ? 0 : 300))")
    until(lambda: said(tmp_path) == ["none"])
    begin = time.monotonic()
    slurm.run("scontrol", "requeue", job)
    until(lambda: said(tmp_path) == ["none", "1"])
    assert time.monotonic() - begin < 20
    slurm.wait_for(job, "COMPLETED")
    assert slurm.restarts(job) == 1


def test_killed_daemon_fails_its_node_and_requeues(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "echo $SLURMD_NODENAME ${SLURM_RESTART_COUNT-none} >> $OUT; sleep 300")
    until(lambda: len(said(tmp_path)) == 1)
    node = said(tmp_path)[0].split()[0]
    slurm.kill_slurmd(node)
    until(lambda: "NODE_FAIL" in slurm.history(job), 60)
    other, = set(NODES) - {node}
    until(lambda: said(tmp_path)[1:] == [f"{other} 1"])  # while the daemon was away, the task of the first run has gone on
    assert slurm.slurmd_pid(node) is None
    slurm.start_slurmd(node)
    until(lambda: slurm.run("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T") == "idle")


def test_lost_node_requeues_a_job_of_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "srun bash -c 'echo $SLURM_PROCID ${SLURM_RESTART_COUNT-none} >> '$OUT'; sleep 300'", "-N2")
    until(lambda: len(said(tmp_path)) == 2)
    slurm.lose_node(NODES[1])
    slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=lost")  # SLURM would take half a minute
    until(lambda: "NODE_FAIL" in slurm.history(job))
    until(lambda: slurm.state(job) == "PENDING" and slurm.job_pids() == [])
    slurm.start_slurmd(NODES[1])
    until(lambda: sorted(said(tmp_path)[2:]) == ["0 1", "1 1"])


def test_main_preempts_scavenger(slurm: SlurmCluster, tmp_path: Path) -> None:
    low = submit(slurm, tmp_path, "echo low ${SLURM_RESTART_COUNT-none} >> $OUT; sleep $((SLURM_RESTART_COUNT ? 0 : 300))",
                 "--partition=scavenger", "--nodes=2", "--exclusive")
    until(lambda: said(tmp_path) == ["low none"])
    high = submit(slurm, tmp_path, "echo high >> $OUT", "--nodes=2", "--exclusive")
    slurm.wait_for(high, "COMPLETED")
    slurm.wait_for(low, "COMPLETED")
    assert said(tmp_path) == ["low none", "high", "low 1"]
    until(lambda: slurm.history(low) == ["PREEMPTED", "COMPLETED"])


def test_processes_of_a_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = "srun --kill-on-bad-exit=1 sleep 300; code=$?; echo $code >> $OUT; exit $code"
    job = submit(slurm, tmp_path, script, "--nodes=2", "--ntasks-per-node=2")
    until(lambda: len(slurm.task_pids(NODES[0], job)) == len(slurm.task_pids(NODES[1], job)) == 2)
    assert len(slurm.stepd_pids(NODES[0], job)) == 2
    assert len(slurm.stepd_pids(NODES[0], job, "batch")) == len(slurm.stepd_pids(NODES[1], job)) == 1
    os.kill(slurm.task_pids(NODES[1], job)[0], signal.SIGKILL)
    slurm.wait_for(job, "FAILED")
    assert said(tmp_path)[0] in ("137", "143")  # of the killed task, or of those that srun then ended

    job = submit(slurm, tmp_path, script, "--nodes=2")
    tasks = (slurm.kill_stepd(NODES[1], job), slurm.task_pids(NODES[0], job))
    assert all(tasks)
    assert slurm.stepd_pids(NODES[1], job) == []
    slurm.cancel_all()
    assert slurm.job_pids() == []


# ---- beside others, and afterwards


@needs_programs
def test_two_clusters_side_by_side_leave_nothing_behind(tmp_path: Path) -> None:
    before = [sorted(str(path) for path in Path(folder).rglob("*")) for folder in ELSEWHERE]
    hosts = Path("/etc/hosts").read_text()
    clusters = SlurmCluster(), SlurmCluster()
    with ThreadPoolExecutor(2) as pool:
        try:
            list(pool.map(SlurmCluster.start, clusters))
            jobs = [submit(cluster, tmp_path, "srun sleep 300", "-N2") for cluster in clusters]
            for cluster, job in zip(clusters, jobs, strict=True):
                until(lambda cluster=cluster, job=job: all(cluster.task_pids(node, job) for node in NODES))
            begin = time.monotonic()
            clusters[0].stop()
            assert time.monotonic() - begin < 10
            assert not clusters[0].directory.exists()
            assert clusters[1].run("srun", "-N2", "echo", "well").splitlines() == ["well"] * 2
        finally:
            list(pool.map(SlurmCluster.stop, clusters))
    for cluster in clusters:
        assert mentioning(cluster.directory) == []
        assert not cluster.directory.exists()
    assert before == [sorted(str(path) for path in Path(folder).rglob("*")) for folder in ELSEWHERE]
    assert hosts == Path("/etc/hosts").read_text()


@needs_programs
@pytest.mark.parametrize("victim", ["owner", "keeper"])
def test_killed_run_leaves_nothing_behind(victim: str) -> None:
    program = ("import sys, time; from slurm.cluster import *; c = SlurmCluster(); c.start(); "
               "c.run('sbatch', '-o', '/dev/null', '--wrap', 'sleep 300'); print(c.directory, flush=True); time.sleep(300)")
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=TESTS, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    directory = Path(owner.stdout.readline().strip())
    until(lambda: any("sleep" in line for line in mentioning(directory)))
    keeper = int((directory / "keeper").read_text().split()[0])
    try:
        if victim == "keeper":
            os.kill(keeper, signal.SIGKILL)
            until(lambda: not any(line.startswith(f"{keeper} ") for line in mentioning(directory)))
            assert mentioning(directory)  # nobody is left to clean up, but the next start does
            remove_stale()
    finally:
        owner.kill()
        owner.wait()
    until(lambda: not directory.exists() and mentioning(directory) == [], 10)


@needs_programs
def test_start_that_fails_says_why_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "slurmctld"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cluster_module, "_PATH", f"{tmp_path}{os.pathsep}{cluster_module._PATH}")
    cluster = SlurmCluster()
    with pytest.raises(SlurmError, match=r"slurmctld ended with 3 at its start(.|\n)*out of order"):
        cluster.start()
    assert not cluster.directory.exists()
    assert mentioning(cluster.directory) == []


def test_directory_of_others_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Path("/tmp") / f"mine-{os.getpid()}"
    directory.mkdir()
    try:
        (directory / "thesis").touch()
        monkeypatch.setattr(cluster_module, "missing_programs", list)
        with pytest.raises(SlurmError, match="is not empty"):
            SlurmCluster(directory).start()
        SlurmCluster(directory).stop()
        remove_stale(directory)
        assert (directory / "thesis").exists()
    finally:
        (directory / "thesis").unlink()
        directory.rmdir()
