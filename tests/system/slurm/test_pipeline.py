"""Jobs on a real SLURM: a pipeline from one command, and collections that are hurt in the middle
and must come out as if not.

What is compared is bitwise: weights, scores, recorded scalars of the run that was hurt, and of one
that was not.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tdds_dist.launch.records import read_ends
from tdds_dist.runs.directory import RunDir
from tests.jobs import differences, state_of
from tests.make import hook
from tests.system import hosts as network
from tests.system.slurm.cluster import SlurmCluster, missing_programs
from tests.system.slurm.test_cluster import until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]
no_hosts = network.why_not()

REPOSITORY = Path(__file__).resolve().parents[3]
EPOCHS = 12
CPU_TEST = REPOSITORY / "configs" / "clusters" / "cpu_test.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits and a config: 400 images, two ranks with one thread each, deterministic, some seconds
    of training."""
    from tdds_dist.data.sources import open_source
    from tdds_dist.data.writer import write_beton

    folder = tmp_path_factory.mktemp("slurm")
    for split, num in (("train", 400), ("val", 100)):
        write_beton(
            open_source("digits", split, num),
            folder / f"{split}.beton",
            num_workers=1,
            progress=False,
        )
    (folder / "config.yaml").write_text(f"""
run: {{name: hurt, device: cpu, timeout_seconds: 60}}
data: {{train: {folder}/train.beton, val: {folder}/val.beton, num_classes: 10, image_size: 32, crop: pad, padding: 2,
       flip: false, mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: slow_network}}
train: {{epochs: {EPOCHS}, global_batch_size: 20, lr: 0.05, deterministic: true}}
score: {{windows: [{{T: 10, K: 5, pruning_rates: [0.5]}}, {{T: 5, K: 3, pruning_rates: [0.3]}}]}}
""")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The same collection under torchrun, on as many ranks, with nothing done to it."""
    return run_here(folder, "collect", folder / "undisturbed")


def run_here(folder, stage, run, *settings):
    """Run a stage under torchrun, on two ranks; return its directory."""
    environment = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TDDS_CPUS_PER_RANK": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torchrun = Path(sys.executable).with_name("torchrun")
    words = (
        f"--standalone --nproc-per-node 2 -m tdds_dist {stage} {folder}/config.yaml run.dir={run}"
    )
    command = [str(torchrun), *words.split(), *settings]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=500)
    return run


def submit(slurm, folder, run, *arguments, cluster=CPU_TEST, config="config.yaml"):
    """`tdds submit` on the cluster, from the command line."""
    command = slurm.command(
        str(Path(sys.executable).with_name("tdds")),
        *f"submit {folder / config} --cluster {cluster} run.dir={run}".split(),
        *arguments,
    )
    environment = os.environ | slurm.environment | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def slow_first_start(folder):
    """Setup lines that make the first start of a job take its time, as training does that SLURM has
    time to watch."""
    text = """
import os, sys, time

if "submitit.core._submit" in " ".join(sys.orig_argv) and "SLURM_RESTART_COUNT" not in os.environ:
    from tdds_dist.training import engine

    update = engine.Trainer._update
    engine.Trainer._update = lambda self: (time.sleep(0.2 if self.step > 40 else 0), update(self))[1]
"""
    return [hook(folder / "slow", text)]


def cluster_file(folder, **changes):
    """The cluster file for tries with some keys changed."""
    import yaml

    path = folder / f"cluster{abs(hash(str(changes)))}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(CPU_TEST.read_text()) | changes))
    return path


def job_ids(run):
    """Ids of the jobs that were submitted for a run, by stage."""
    found: dict[str, list[str]] = {}
    for line in (run / "jobs" / "jobs.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["stage"], []).append(record["id"])
    return found


def until_epoch(run, num, deadline=240.0):
    """Wait until so many epochs are done, and the next has begun."""
    end = time.monotonic() + deadline
    while len(RunDir(run).read_metrics()) < num:
        assert time.monotonic() < end, log_text(run)
        time.sleep(0.05)
    time.sleep(0.2)


def log_text(run):
    return "\n".join(
        f"==> {path.name}\n{path.read_text()[-3000:]}"
        for path in sorted((run / "jobs").glob("*_log.*"))
    )


def check_as_if_nothing_happened(run, undisturbed):
    assert differences(state_of(run), state_of(undisturbed)) == []
    assert [record["epoch"] for record in RunDir(run).read_metrics()] == list(range(EPOCHS))
    recorded = sorted(path.name for path in (run / "trajectory").glob("epoch_*"))
    assert recorded == [f"epoch_{epoch:04}" for epoch in range(EPOCHS)]
    assert not list((run / "checkpoints").glob("*"))


# ---- the whole pipeline


def test_pipeline_from_one_command(slurm, folder, undisturbed):
    run = folder / "pipeline"
    settings = [
        "pipeline.scores=[tdds,random]",
        "pipeline.strategies=[E,P]",
        "pipeline.pruning_rates=[0.5]",
        "retrain.epochs=2",
    ]
    printed = submit(slurm, folder, run, *settings, "--dry-run").stdout
    assert not run.exists()
    done = submit(slurm, folder, run, *settings)
    assert done.returncode == 0, done.stderr
    assert "retrain       4     0  1 node(s) x 1 rank(s)" in done.stdout
    ids = job_ids(run)
    assert {stage: len(of_stage) for stage, of_stage in ids.items()} == {
        "collect": 1,
        "select": 1,
        "retrain": 4,
        "report": 1,
    }
    assert (run / "jobs" / f"{ids['collect'][0]}_submission.sh").read_text().strip() in printed
    names = slurm.run("squeue", "-h", "-o", "%j").split()
    assert {"collect-hurt", "select-hurt", "retrain-hurt", "report-hurt"} >= set(names)

    twice = submit(slurm, folder, run, *settings)
    assert twice.returncode == 2
    assert "jobs of this run are queued or running" in twice.stderr

    slurm.wait_for(ids["report"][0], "COMPLETED", 500)
    assert {slurm.state(job) for of_stage in ids.values() for job in of_stage} == {"COMPLETED"}
    # two nodes with a rank each give the bits that torchrun gives
    check_as_if_nothing_happened(run, undisturbed)
    assert RunDir(run).read_env()["world_size"] == 2
    assert {path.name for path in (run / "retrain").iterdir()} == {
        f"{score}_p0.5_{strategy}_{importance}_seed0"
        for score, importance in (("tdds", "batch"), ("random", "none"))
        for strategy in "EP"
    }
    results = {
        path.parent.name: json.loads(path.read_text()) for path in run.glob("retrain/*/result.json")
    }
    assert results["tdds_p0.5_E_batch_seed0"]["epochs"] == 2
    assert results["tdds_p0.5_P_batch_seed0"]["epochs"] == 4
    assert "tdds_p0.5" in (run / "report.html").read_text()

    shown = submit(slurm, folder, run, *settings, "--dry-run")
    assert "everything" not in shown.stdout
    assert "#SBATCH" not in shown.stdout
    again = submit(slurm, folder, run, *settings)
    assert (again.returncode, again.stdout.startswith("everything is done")) == (0, True)

    shutil.rmtree(run / "retrain" / "random_p0.5_P_none_seed0")
    missing = submit(slurm, folder, run, *settings, "--wait")
    assert missing.returncode == 0, missing.stderr
    # one retraining and the report more
    assert sorted(map(len, job_ids(run).values())) == [1, 1, 2, 5]
    assert (run / "retrain" / "random_p0.5_P_none_seed0" / "result.json").is_file()


# ---- hurt in the middle


Hurt = Callable[[SlurmCluster, str, Path], None]


def send_usr2(slurm, job_id, run):
    slurm.run("scancel", "--signal=USR2", job_id)


def send_usr2_in_a_container(slurm, job_id, run):
    """Where python finds no scontrol (PATH stands for the container): the job is queued again from
    outside."""
    send_usr2(slurm, job_id, run)


def kill_stepd_of_the_second_node(slurm, job_id, run):
    slurm.kill_stepd(slurm.nodes[1], job_id)


def kill_a_rank(slurm, job_id, run):
    (pid,) = slurm.task_pids(slurm.nodes[1], job_id)
    os.kill(pid, signal.SIGKILL)


def requeue_and_kill_a_rank_that_starts(slurm, job_id, run):
    """Before training srun's SIGTERM finds the other rank unprepared."""
    slurm.run("scontrol", "requeue", job_id)
    slurm.wait_for(job_id, "PENDING")
    slurm.wait_for(job_id, "RUNNING")
    time.sleep(2.0)
    kill_a_rank(slurm, job_id, run)


def kill_slurmd(slurm, job_id, run):
    slurm.kill_slurmd(slurm.nodes[1])
    slurm.wait_for(job_id, {"PENDING", "REQUEUED", "COMPLETED"})
    slurm.start_slurmd(slurm.nodes[1])


def lose_a_node(slurm, job_id, run):
    slurm.lose_node(slurm.nodes[0])
    slurm.wait_for(job_id, {"PENDING", "REQUEUED", "COMPLETED"})
    slurm.start_slurmd(slurm.nodes[0])


def preempt(slurm, job_id, run):
    """A job of the partition that goes first takes both nodes for a moment."""
    slurm.run(
        *"sbatch --parsable -p main -N2 --exclusive -o /dev/null --wrap".split(), "srun sleep 1"
    )


def preempt_with_sigterm_alone(slurm, job_id, run):
    """As clusters do that give grace and send no other signal: the job leaves before SLURM would
    have queued it again."""
    config = slurm.directory / "slurm.conf"
    usual = config.read_text()
    without = usual.replace("SlurmctldParameters=preempt_send_user_signal\n", "")
    config.write_text(without.replace("GraceTime=3", "GraceTime=60"))
    try:
        slurm.run("scontrol", "reconfigure")
        preempt(slurm, job_id, run)
        slurm.wait_for(job_id, "PENDING")
    finally:
        config.write_text(usual)
        slurm.run("scontrol", "reconfigure")


@pytest.mark.parametrize(
    ("hurts", "changes"),
    [
        ([send_usr2, kill_a_rank, requeue_and_kill_a_rank_that_starts], {}),
        ([send_usr2_in_a_container], {"container": "/usr/bin/env PATH=/nowhere"}),
        ([preempt, preempt_with_sigterm_alone], {"partition": "scavenger"}),
        # what SLURM notices late
        ([kill_stepd_of_the_second_node], {"setup": "slow_first_start"}),
        ([kill_slurmd], {"setup": "slow_first_start"}),
        ([lose_a_node], {"setup": "slow_first_start"}),
    ],
    ids=lambda value: "+".join(hurt.__name__ for hurt in value) if isinstance(value, list) else "",
)
def test_a_collection_that_is_hurt_goes_on(slurm, folder, undisturbed, hurts, changes, request):
    """One hurt every three epochs."""
    run = folder / hurts[0].__name__
    if "setup" in changes:
        changes = {"setup": request.getfixturevalue(changes["setup"])}
    if "container" in changes:
        changes = changes | {"venv": str(Path(sys.executable).parents[1])}
    cluster = cluster_file(folder, **{"partition": "main", "setup": ["set -e"]} | changes)
    done = submit(slurm, folder, run, "--stage", "collect", cluster=cluster)
    assert done.returncode == 0, done.stderr
    (job_id,) = job_ids(run)["collect"]
    for number, hurt in enumerate(hurts):
        until_epoch(run, 3 * number + 3)
        before = slurm.restarts(job_id)
        hurt(slurm, job_id, run)
        if hurt is not hurts[-1]:
            until(lambda before=before: slurm.restarts(job_id) > before)
            slurm.wait_for(job_id, "RUNNING")
    slurm.wait_for(job_id, "COMPLETED", 400)
    # without it the ranks go on, and may be done before SLURM misses it
    if hurts != [kill_stepd_of_the_second_node]:
        num_starts = len(hurts) + (requeue_and_kill_a_rank_that_starts in hurts)
        assert slurm.restarts(job_id) >= num_starts, log_text(run)
        assert len(RunDir(run).read_env()["resumes"]) >= len(hurts)
    check_as_if_nothing_happened(run, undisturbed)


def test_a_run_leaves_before_its_time_limit_and_is_queued_again(slurm, folder, undisturbed):
    """The job believes that it started 3 minutes ago: its last of 4 minutes, less the grace, is
    near."""
    run = folder / "short"
    cluster = cluster_file(
        folder,
        time_minutes=4,
        grace_seconds=30,
        setup=['[ -n "$SLURM_RESTART_COUNT" ] || export TDDS_JOB_STARTED=$(($(date +%s) - 200))'],
    )
    assert submit(slurm, folder, run, "--stage", "collect", cluster=cluster).returncode == 0
    (job_id,) = job_ids(run)["collect"]
    slurm.wait_for(job_id, "COMPLETED", 400)
    assert slurm.restarts(job_id) == 1
    assert "time limit: saved at" in (run / "log.txt").read_text()
    check_as_if_nothing_happened(run, undisturbed)


def test_a_pruned_training_is_queued_again_in_mid_schedule(slurm, folder):
    settings = ["prune.method=infobatch", "prune.rate=0.5"]
    run = folder / "pruned"
    done = submit(slurm, folder, run, *settings, "--stage", "train")
    assert done.returncode == 0, done.stderr
    (job_id,) = job_ids(run)["train"]
    until_epoch(run, 5)
    send_usr2(slurm, job_id, run)
    slurm.wait_for(job_id, "COMPLETED", 400)
    assert slurm.restarts(job_id) == 1
    undisturbed = run_here(folder, "train", folder / "pruned_here", *settings)
    check_as_if_nothing_happened(run, undisturbed)
    sets, others = (
        {path.name: path.read_bytes() for path in sorted(RunDir(each).pruning.glob("*.npz"))}
        for each in (run, undisturbed)
    )
    assert sets == others
    assert len(sets) == 9, "1 to 9 of 12: the last eighth, and more, visits all"


def test_a_cancelled_job_is_not_queued_again(slurm, folder):
    run = folder / "cancelled"
    assert submit(slurm, folder, run, "--stage", "collect").returncode == 0
    (job_id,) = job_ids(run)["collect"]
    until_epoch(run, 2)
    slurm.run("scancel", job_id)
    slurm.wait_for(job_id, "CANCELLED")
    time.sleep(8)
    assert slurm.state(job_id) == "CANCELLED"
    assert "SIGTERM: saved at epoch" in (run / "log.txt").read_text()


def test_time_limits_do_not_go_on_for_ever(slurm, folder):
    run = folder / "limited"
    cluster = cluster_file(folder, requeue_time_limits=0, time_minutes=4)
    assert submit(slurm, folder, run, "--stage", "collect", cluster=cluster).returncode == 0
    (job_id,) = job_ids(run)["collect"]
    until_epoch(run, 2)
    slurm.run("scancel", "--signal=USR2", job_id)
    slurm.wait_for(job_id, "FAILED")
    assert "timed-out too many times" in log_text(run)
    assert list((run / "checkpoints").glob("step_*"))


# ---- without submitit


def test_sbatch_example_with_srun_and_torchrun(slurm, folder, undisturbed):
    """It leaves at its time limit, which it believes to be near, is queued again, and finishes."""
    run = folder / "example"
    script = (REPOSITORY / "launch" / "sbatch_example.sh").read_text()
    assert script.count(" - 120))") == 1
    # the first start has 10 s of its day
    soon = " - (${SLURM_RESTART_COUNT:-0} ? 0 : 86400 - 10)))"
    (folder / "sbatch_example.sh").write_text(script.replace(" - 120))", soon))
    command = [
        "sbatch",
        "--parsable",
        f"--export=ALL,PYTHON={sys.executable},TDDS_CPUS_PER_RANK=1",
        f"--chdir={folder}",
        str(folder / "sbatch_example.sh"),
        str(run),
        "collect",
        str(folder / "config.yaml"),
        f"run.dir={run}",
    ]
    job_id = slurm.run(*command)
    slurm.wait_for(job_id, "COMPLETED", 500)
    assert slurm.restarts(job_id) == 1
    assert "time limit: saved at" in (run / "log.txt").read_text()
    check_as_if_nothing_happened(run, undisturbed)


# ---- on hosts with a network of their own


@pytest.mark.skipif(bool(missing_programs()), reason="tests/system/slurm/install.sh installs them")
@pytest.mark.skipif(bool(no_hosts), reason=f"no hosts here: {no_hosts}")
def test_hosts_that_cannot_reach_each_other(folder, undisturbed, slow_first_start, tmp_path):
    """The ranks are on two hosts. First these lose each other, while both reach the controller on a
    third (what srun never hears of, its job does not wait for); then one of them loses everybody
    for ever, and a fourth takes its place."""
    run = folder / "hosts"
    sooner = "sleep() { command sleep $(($1 / 10)); }"  # in the sbatch file, which waits for srun
    more = {"extra": {"exclude": "host1"}, "setup": [*slow_first_start, sooner]}

    def cut(*pairs):
        for pair in pairs:
            hosts.cables[pair].is_cut = True
        return time.time()

    with (
        network.hosts(4, tmp_path) as hosts,
        SlurmCluster(nodes={host.name: host.command() for host in hosts.all}) as slurm,
    ):
        done = submit(
            slurm,
            folder,
            run,
            *("--stage", "collect", "run.timeout_seconds=12"),
            cluster=cluster_file(folder, **more),
        )
        assert done.returncode == 0, done.stderr
        (job_id,) = job_ids(run)["collect"]

        until_epoch(run, 3)
        cut((2, 3), (3, 2))
        until(lambda: slurm.restarts(job_id) == 1, 240)
        assert f"job {job_id} queued again: rank " in log_text(run)
        hosts.set(is_cut=False)

        until_epoch(run, 6)
        since = cut(*(pair for pair in hosts.cables if 3 in pair))
        until(lambda: slurm.restarts(job_id) == 2, 240)
        ends = {end.rank: end for end in read_ends(run / "jobs", job_id) if end.restart == 1}
        for rank, host, other in ((0, "host2", "rank 1 on host3"), (1, "host3", "rank 0 on host2")):
            assert re.search(
                rf"rank {rank} on {host}, epoch \d+, step \d+: {other} did not answer within 12 s",
                ends[rank].message,
            )
            assert ends[rank].time - since < 2 * 12 + 2

        slurm.wait_for(job_id, "COMPLETED", 400)
        ended = ["REQUEUED|host[2-3]", "NODE_FAIL|host[2-3]", "COMPLETED|host[2,4]"]
        asks = ["sacct", "-D", "-X", "-n", "-P", "-j", job_id, "-o", "State,NodeList"]
        until(lambda: slurm.run(*asks).split() == ended, 60)  # accounts follow a little later
    check_as_if_nothing_happened(run, undisturbed)
