"""What cannot work on a real SLURM: said at submission in a line, or at the top of the log, and by
`tdds status`."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.make import hook
from tests.system.slurm.test_pipeline import cluster_file, folder, job_ids, log_text, submit

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]
__all__ = ["folder"]  # a fixture


def hurt_rank(folder, name, rank, fail):
    """Setup lines that put the function `fail` in the place of the optimizer step on one rank."""
    text = f"""
import os, sys

if os.environ.get("SLURM_PROCID") == "{rank}" and "submitit.core._submit" in " ".join(sys.orig_argv):
    from tdds_dist.training import engine

    {fail}
    engine.Trainer._update = fail
"""
    return [hook(folder / f"hook_{name}", text)]


def status(slurm, run, *arguments):
    return slurm.run(str(Path(sys.executable).with_name("tdds")), "status", str(run), *arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"memory_gb": 10000}, "Memory specification can not be satisfied"),
        (
            {"stages": {"retrain": {"nodes": 1, "partition": "nowhere"}}},
            "refused retrain-hurt .*invalid partition",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_the_scheduler_refuses_is_one_line_and_leaves_nothing(slurm, folder, changes, said):
    run = folder / "refused"
    done = submit(
        slurm, folder, run, "pipeline.pruning_rates=[0.5]", cluster=cluster_file(folder, **changes)
    )
    assert done.returncode == 2, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tdds submit: error: ")]
    assert done.stderr.count("Traceback") == 0
    assert re.search(said, line), line
    assert line.endswith("adapt the cluster file")
    assert not slurm.run("squeue", "-h", "-t", "PENDING,RUNNING")
    assert not (run / "jobs" / "jobs.jsonl").exists()


def test_data_that_the_nodes_lack_is_the_top_of_the_log_and_cancels_the_rest(slurm, folder):
    run = folder / "lacks"
    done = submit(
        slurm,
        folder,
        run,
        "pipeline.pruning_rates=[0.5]",
        f"data.train={folder}/gone.beton",
        "--wait",
    )
    assert (
        f"warning: data.train={folder}/gone.beton not found on this machine; the nodes must have it"
        in done.stderr
    )
    assert done.returncode == 2
    (collect,), (select,), (retrain,), (report,) = (
        job_ids(run)[stage] for stage in ("collect", "select", "retrain", "report")
    )
    first = (run / "jobs" / f"{collect}_0_log.err").read_text().splitlines()[0]
    assert first.startswith("tdds collect: error: ")
    assert "gone.beton" in first
    assert [slurm.state(job) for job in (collect, select, retrain, report)] == [
        "FAILED",
        *["CANCELLED"] * 3,
    ]
    text = status(slurm, run)
    assert text.count(f"cancelled because job {collect} (collect-hurt) refused its input") == 3
    assert "gone.beton" in text
    data = json.loads(status(slurm, run, "--json"))
    assert [
        job["state"]["state"] for job in data["jobs"]
    ] == "failed cancelled cancelled cancelled".split()


def test_a_rank_that_fails_is_named_with_its_traceback(slurm, folder):
    """And not the three that lost it; 4 ranks on 2 nodes."""
    run = folder / "fails"
    fails = "def fail(*a): raise ZeroDivisionError('the cause')"
    cluster = cluster_file(folder, ranks_per_node=2, setup=hurt_rank(folder, "fails", 2, fails))
    done = submit(slurm, folder, run, "--stage", "collect", "--wait", cluster=cluster)
    assert done.returncode == 1
    assert "rank 2 on " in done.stderr
    assert "ZeroDivisionError: the cause" in done.stderr
    (job_id,) = job_ids(run)["collect"]
    assert slurm.state(job_id) == "FAILED"
    assert slurm.restarts(job_id) == 0
    summary = (run / "jobs" / f"{job_id}_0_log.err").read_text()
    assert f"tdds: job {job_id} failed on rank 2" in summary
    assert "in fail\n" in summary.partition(f"tdds: job {job_id} failed")[2], log_text(run)
    assert "rank 2 on" in status(slurm, run)
    shown = slurm.run(str(Path(sys.executable).with_name("tdds")), "logs", str(run))
    assert "ZeroDivisionError: the cause" in shown
    assert f"{job_id}_2_log.err" in shown


def test_a_job_that_dies_at_the_same_place_again_and_again_is_given_up(slurm, folder):
    run = folder / "dies"
    dies = "def fail(*a): os.kill(os.getpid(), 9)"
    cluster = cluster_file(folder, requeue_failures=1, setup=hurt_rank(folder, "dies", 1, dies))
    done = submit(slurm, folder, run, "--stage", "collect", "--wait", cluster=cluster)
    (job_id,) = job_ids(run)["collect"]
    assert done.returncode == 1
    assert (slurm.state(job_id), slurm.restarts(job_id)) == ("FAILED", 1)
    assert "gave up: " in log_text(run)
    shown = status(slurm, run)
    assert "failure 2 in a row without a new checkpoint (requeue_failures=1)" in shown, shown
