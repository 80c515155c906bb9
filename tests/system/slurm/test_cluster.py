"""The throw-away SLURM does what tests expect of a cluster, disturbs nothing, and leaves nothing
behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.slurm import cluster as cluster_module
from tests.system.slurm.cluster import (
    NODES,
    SlurmCluster,
    SlurmError,
    missing_programs,
    remove_stale,
)

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[3]
ELSEWHERE = [
    "/etc/slurm",
    "/etc/munge",
    "/run/munge",
    "/run/mysqld",
    "/run/slurm",
    "/var/lib/mysql",
    "/var/lib/munge",
    "/var/lib/slurm",
    "/var/log/munge",
    "/var/log/mysql",
    "/var/log/slurm",
    "/var/spool/slurm",
]
needs_programs = pytest.mark.skipif(
    bool(missing_programs()), reason="tests/system/slurm/install.sh installs them"
)


def submit(slurm, folder, script, *options):
    """Number of a job that runs lines of bash."""
    path = folder / f"job{len(list(folder.glob('job*')))}.sh"
    path.write_text(f"#!/bin/bash\n{script}\n")
    return slurm.run(
        *f"sbatch --parsable --output={folder}/%j.log --open-mode=append".split(),
        *options,
        str(path),
    )


def until(is_true, deadline=60):
    end = time.monotonic() + deadline
    while not is_true():
        assert time.monotonic() < end, f"waited {deadline} s in vain"
        time.sleep(0.1)


def mentioning(directory):
    """Processes that have a directory in their command, their environment or their open files,
    other than this one."""
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


def test_wait_for_tells_what_it_knows(slurm, tmp_path):
    job = submit(slurm, tmp_path, "echo out of luck; exit 3")
    with pytest.raises(
        AssertionError,
        match=rf"job {job} is FAILED .*instead of COMPLETED(.|\n)*out of luck(.|\n)*slurmctld",
    ):
        slurm.wait_for(job, "COMPLETED")
    assert slurm.state(10**6) == "UNKNOWN"


# ---- beside others, and afterwards


@needs_programs
def test_two_clusters_side_by_side_leave_nothing_behind(tmp_path):
    before = [sorted(str(path) for path in Path(folder).rglob("*")) for folder in ELSEWHERE]
    hosts = Path("/etc/hosts").read_text()
    clusters = SlurmCluster(), SlurmCluster()
    with ThreadPoolExecutor(2) as pool:
        try:
            list(pool.map(SlurmCluster.start, clusters))
            jobs = [submit(cluster, tmp_path, "srun sleep 300", "-N2") for cluster in clusters]
            for cluster, job in zip(clusters, jobs, strict=True):
                until(
                    lambda cluster=cluster, job=job: all(
                        cluster.task_pids(node, job) for node in NODES
                    )
                )
            begin = time.monotonic()
            clusters[0].stop()
            assert time.monotonic() - begin < 30
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
def test_killed_run_leaves_nothing_behind(victim):
    program = (
        "import sys, time; from tests.system.slurm.cluster import *; c = SlurmCluster(); c.start();"
        " c.run('sbatch', '-o', '/dev/null', '--wrap', 'sleep 300'); print(c.directory,"
        " flush=True); time.sleep(300)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
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
    until(lambda: not directory.exists() and mentioning(directory) == [])


@needs_programs
def test_start_that_fails_says_why_and_cleans_up(tmp_path, monkeypatch):
    broken = tmp_path / "slurmctld"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cluster_module, "_PATH", f"{tmp_path}{os.pathsep}{cluster_module._PATH}")
    cluster = SlurmCluster()
    with pytest.raises(SlurmError, match=r"slurmctld ended with 3 at its start(.|\n)*out of order"):
        cluster.start()
    assert not cluster.directory.exists()
    assert mentioning(cluster.directory) == []


def test_directory_of_others_is_left_alone(tmp_path, monkeypatch):
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
