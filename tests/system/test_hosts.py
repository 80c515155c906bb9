"""Collections over several hosts, and what becomes of them when the network between the hosts, or
one of them, fails (`hosts.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.system import hosts as network
from tests.system.test_faults import Reference, assert_nothing_shows

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
