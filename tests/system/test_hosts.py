"""Collections over several hosts, and what becomes of them when the network between the hosts, or
one of them, fails (`hosts.py`)."""

import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tdds_dist.runs.directory import RunDir
from tests import jobs, make
from tests.jobs import at_call, at_step, clock_ahead, nap
from tests.system import hosts as network
from tests.system.test_faults import LAUNCHED, WRITE, Reference, assert_nothing_shows, wait_for

reason = network.why_not()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason), reason=f"no hosts here: {reason}"),
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]


@pytest.fixture(scope="session")
def words(betons):
    """`tdds collect` in seconds."""
    return [
        "collect",
        Path(__file__).parents[2] / "configs" / "digits.yaml",
        f"data.train={betons['train']}",
        f"data.val={betons['val']}",
        "model.name=shufflenet_v2_x0_5",
        "train.epochs=3",
        "train.global_batch_size=24",
        "train.deterministic=true",
        "score.windows=[{T: 3, K: 3, pruning_rates: [0.5]}]",
        "checkpoint.every_epochs=1",
        "checkpoint.asynchronous=false",
        "run.device=cpu",
    ]


@pytest.fixture(scope="session")
def on_one_host(words, tmp_path_factory):
    """What a run came to whose ranks are all on one host, by number of ranks."""
    found = {}

    def of(ranks):
        if ranks not in found:
            folder = tmp_path_factory.mktemp(f"one_host{ranks}")
            codes, text = jobs.run([*words, f"run.dir={folder}/run"], ranks, folder)
            assert codes == [0] * ranks, text
            found[ranks] = Reference(ranks, folder / "run", jobs.state_of(folder / "run"), {})
        return found[ranks]

    return of


@pytest.fixture
def two(tmp_path):
    with network.hosts(2, tmp_path) as hosts:
        yield hosts


@pytest.fixture
def start(words, tmp_path):
    """Start the command, always on the same run directory, with an inject for each rank."""
    numbers = itertools.count()

    def started(ranks, *injects, settings=()):
        folder = tmp_path / f"start{next(numbers)}"
        inject = jobs.all_of(*injects)
        return jobs.Job([*words, f"run.dir={tmp_path}/run", *settings], ranks, folder, inject)

    return started


def ends(job, codes):
    found = job.wait(120)
    assert found == codes, job.text
    return [output.read_text() for output in job.outputs]


def torchrun(hosts, *words, options=()):
    """Start torchrun with a rank on each host."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[1].name}:29400"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    return [
        subprocess.Popen(
            host.command(*TORCHRUN, "--nnodes", len(hosts.all), *rendezvous, *options, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for host in hosts.all
    ]


def test_torchrun_on_two_hosts(two, words, on_one_host, tmp_path):
    started = torchrun(two, "-m", "tdds_dist", *words, f"run.dir={tmp_path}/run")
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert_nothing_shows(tmp_path / "run", on_one_host(2))


# ---- hosts that are slow, or silent for a while


def test_three_hosts_of_which_one_stands_still(tmp_path, start, on_one_host):
    flag = tmp_path / "asleep"
    with network.hosts(3, tmp_path) as hosts:
        job = start(3, hosts.enters(), at_step(8, nap(flag, 60), [0]))
        wait_for(flag)
        job.kill(1, signal.SIGSTOP)
        flag.unlink()
        time.sleep(3)
        assert len(job.steps()) <= 8
        job.kill(1, signal.SIGCONT)
        ends(job, [0, 0, 0])
    assert_nothing_shows(tmp_path / "run", on_one_host(3))


def test_a_cable_is_cut_in_one_direction_for_5_s(two, tmp_path, start, on_one_host):
    """While a checkpoint is written, and within the epoch after it."""
    flag = tmp_path / "asleep"
    moments = at_call(WRITE, 1, nap(flag, 60), [0]), at_step(8, nap(flag, 60), [0])
    job = start(2, two.enters(), *moments)
    for last in (5, 8):
        wait_for(flag)
        two.cables[1, 2].is_cut = True
        flag.unlink()
        time.sleep(5)
        assert max(job.steps()) <= last
        two.cables[1, 2].is_cut = False
    ends(job, [0, 0])
    assert_nothing_shows(tmp_path / "run", on_one_host(2))


NETWORKS = {
    "whole": {},
    "5 ms": {"delay_seconds": 0.005},
    "50 ms": {"delay_seconds": 0.05},
    "1 % lost": {"loss": 0.01},
    "100 Mbit/s": {"bytes_per_second": 100e6 / 8},
}


def epoch_seconds(run):
    """Of all epochs but the first, in which everything is loaded."""
    return [each["epoch_seconds"] for each in RunDir(run).read_metrics()[1:]]


@pytest.mark.parametrize("name", NETWORKS)
def test_slow_networks(two, tmp_path, words, start, on_one_host, name):
    """What recording costs there is printed (`pytest -s`): the same epochs without it are those of
    a retraining on all images."""
    run, every = tmp_path / "run", tmp_path / "all.npz"
    two.set(**NETWORKS[name])
    few = ["checkpoint.every_epochs=3"]  # not part of what an epoch takes
    ends(start(2, two.enters(), settings=few), [0, 0])
    assert_nothing_shows(run, on_one_host(2))
    make.select(run, 0.0, score="random", out=every)
    options = ["--coreset", every, "--strategy", "E", "--name", "all", f"run.dir={run}", *few]
    job = jobs.Job(["retrain", *words[1:], *options], 2, tmp_path / "plain", two.enters())
    ends(job, [0, 0])
    recorded, plain = epoch_seconds(run), epoch_seconds(run / "retrain" / "all")
    said = f"{statistics.median(recorded):.2f} s an epoch, {statistics.median(plain):.2f} s"
    print(f"\n{name}: {said} without recording")
    assert min(recorded) < 3 * min(plain)  # TCP waits 0.2 s for one packet: half of an epoch


# ---- hosts that are gone


CUTS = {
    "epoch": (partial(at_step, 8), [(1, 2)], 2),
    "checkpoint": (partial(at_call, WRITE, 2), [(2, 1)], 2),
    "both ways, of three": (partial(at_step, 8), [(1, 3), (3, 1), (2, 3), (3, 2)], 3),
    "end": (partial(at_call, "tdds_dist.distributed.world:barrier", 1), [(1, 2), (2, 1)], 2),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cable_is_cut_for_ever(tmp_path, start, on_one_host, name):
    """Every rank ends within twice the time-out and says who is not heard, and where; the run goes
    on without that host, although its clock is 90 s ahead of the others'."""
    inject, cut, ranks = CUTS[name]
    flag = tmp_path / "asleep"
    with network.hosts(ranks, tmp_path) as hosts:
        hurt = inject(nap(flag, 60), [0]), clock_ahead(90, [0])
        job = start(ranks, hosts.enters(), *hurt, settings=["run.timeout_seconds=8"])
        wait_for(flag)
        for pair in cut:
            hosts.cables[pair].is_cut = True
        since = time.monotonic()
        flag.unlink()
        said = ends(job, [1] * ranks)
        assert time.monotonic() - since < 2 * 8 + 20  # and a busy machine
        assert "Traceback" not in job.text
        if name == "epoch":  # what host2 says still arrives
            assert (
                "all still answer: is the network whole between the ranks 0 on host1; 1" in said[0]
            )
        else:
            assert f"rank {ranks - 1} on host{ranks} did not answer within 8 s" in said[0]
        assert (
            f"rank {ranks - 1} on host{ranks}, epoch {3 if name == 'end' else 2}, step" in said[-1]
        )
        assert "rank 0 on host1 did not answer within 8 s (run.timeout_seconds)" in said[-1]
        text = "".join(ends(start(ranks, hosts.enters(*[2] * ranks)), [0] * ranks))
    assert ("is finished already" if name == "end" else "resumes at epoch 2, step 5") in text
    assert_nothing_shows(tmp_path / "run", on_one_host(ranks))


def test_names_and_interfaces_that_lead_nowhere(two, tmp_path, start, on_one_host):
    short = ["run.timeout_seconds=3"]
    two[2].know({"host2": two[2].address})
    said = ends(start(2, two.enters(), settings=short), [2, 2])
    assert "2 ranks could not meet at MASTER_ADDR=host1" in said[0]
    assert re.search(r"MASTER_ADDR=host1 MASTER_PORT=\d+ does not resolve on host2", said[1])
    for host in two.all:  # names itself by an address that the other cannot reach
        own = host.add_dead_interface()
        host.know({each.name: own if each is host else each.address for each in two.all})
    address = two[1].address
    for text in ends(start(2, two.enters(MASTER_ADDR=address), settings=short), [2, 2]):
        assert f"the ranks 0 on host1; 1 on host2 met at MASTER_ADDR={address}" in text
        assert "GLOO_SOCKET_IFNAME on each host to the interface that leads to" in text
    ends(start(2, two.enters(MASTER_ADDR=address, GLOO_SOCKET_IFNAME="eth0")), [0, 0])
    assert_nothing_shows(tmp_path / "run", on_one_host(2))


def test_torchrun_starts_lost_ranks_again_on_two_hosts(
    two, tmp_path, words, on_one_host, monkeypatch
):
    """Its agents keep the store between restarts, and count them differently, unless told not to."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    program = tmp_path / "launched.py"
    text = LAUNCHED.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    program.write_text(text.replace("jobs.all_of(jobs.quick, kill)", "kill"))
    options = ["--max-restarts", "2"]
    settings = [f"run.dir={tmp_path}/run", "run.timeout_seconds=30"]
    started = torchrun(two, program, *words, *settings, options=options)
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "resumes at epoch 2, step 5" in "".join(said)
    assert_nothing_shows(tmp_path / "run", on_one_host(2))
