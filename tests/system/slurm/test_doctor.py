"""`tdds doctor` on a real SLURM: a cluster file that it would refuse, a job on two nodes that is
well, and one with a wrong interface and a clock that is ahead."""

import json
import os
import subprocess
import sys

import pytest

from tests.experiments.test_doctor import AHEAD_SECONDS, clock_ahead
from tests.make import hook
from tests.system.slurm.test_pipeline import CPU_TEST, cluster_file, folder, submit

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]
__all__ = ["clock_ahead", "folder"]  # fixtures


def asked(slurm, cluster):
    """Exit code of `tdds doctor --cluster`, and what it found, by check."""
    done = subprocess.run(
        [sys.executable, "-m", "tdds_dist", "doctor", "--json", "--cluster", str(cluster)],
        env=os.environ | slurm.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    checks = json.loads(done.stdout)["checks"]
    return done.returncode, {check["what"]: check for check in checks}


def test_slurm_is_asked_about_a_cluster_file(slurm, folder):
    code, checks = asked(slurm, CPU_TEST)
    assert code == 0, checks
    for name in ("scheduler", "accounting", "partition", "job of collect", "job of select"):
        assert checks[name]["state"] == "OK", checks[name]
    code, checks = asked(slurm, cluster_file(folder, partition="nowhere"))
    assert (code, checks["partition"]["state"]) == (2, "FAIL")
    assert "partition=nowhere" in checks["partition"]["found"]
    assert checks["partition"]["wanted"].startswith("one of ")
    code, checks = asked(slurm, cluster_file(folder, nodes=3))
    assert (code, checks["partition"]["state"]) == (2, "OK")
    assert checks["job of collect"]["state"] == "FAIL"
    assert checks["job of select"]["state"] == "OK"
    assert not slurm.run("squeue", "-h"), "nothing is queued"


def test_a_job_that_is_well_and_one_that_is_not(slurm, folder, clock_ahead):
    done = submit(slurm, folder, folder / "well", "--stage", "doctor", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    for words in ("2 ranks met", "each way between", "all ranks see it", "images/s"):
        assert words in done.stdout
    text = f"""
import os, sys

if os.environ.get("SLURM_PROCID") == "1" and "LD_PRELOAD" not in os.environ:
    os.environ["LD_PRELOAD"] = {clock_ahead!r}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
"""
    setup = [hook(folder / "hook_clock", text)]
    cluster = cluster_file(folder, interface="no_such0", setup=setup)
    done = submit(slurm, folder, folder / "ill", "--stage", "doctor", "--wait", cluster=cluster)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 0 on " in done.stderr
    assert "interface, process group, clocks" in done.stderr
    assert f"is {AHEAD_SECONDS}.0" in done.stdout
    assert "GLOO_SOCKET_IFNAME=no_such0" in done.stdout
