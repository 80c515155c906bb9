"""The start and the end of a process group, and which device and CPUs a rank has."""

import os
import signal
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tdds_dist.data.loader import default_workers
from tdds_dist.distributed import collectives, world
from tdds_dist.distributed.interruption import SIGNALS
from tdds_dist.distributed.world import check_gpus, ranks_per_cpu, session
from tdds_dist.errors import InputError, LostRankError
from tests import ranks
from tests.jobs import free_port

TIMED_OUT = pytest.raises(LostRankError, match="Timed out")


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:62114", nullcontext()),
        ("[unbound_buffer.cc:81] Timed out waiting 60000ms", TIMED_OUT),
    ],
)
def test_ranks_that_leave_first_are_no_failure_of_the_last(monkeypatch, said, outcome):
    """A rank may be through the last barrier, and gone, before another hears of it; one that hangs
    is another matter."""

    def barrier():
        raise RuntimeError(said)

    monkeypatch.setattr(world, "barrier", barrier)
    try:
        with outcome, session("cpu"):
            pass
    finally:
        # a process that lost a rank blocks them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- its device


@pytest.mark.parametrize(
    ("count", "variables", "index"),
    [
        (8, {"LOCAL_RANK": "3", "WORLD_SIZE": "16"}, 3),
        (1, {"LOCAL_RANK": "3", "WORLD_SIZE": "16"}, 0),  # srun --gpus-per-task=1
        (1, {"WORLD_SIZE": "2"}, 0),
        (8, {}, 0),
        (8, {"WORLD_SIZE": "1"}, 0),
        (8, {"WORLD_SIZE": "2"}, "LOCAL_RANK is not, .* which of 8 visible GPUs"),
        (2, {"LOCAL_RANK": "3", "WORLD_SIZE": "4"}, "needs 4 visible CUDA devices, there are 2"),
    ],
)
def test_which_gpu_is_that_of_a_rank(monkeypatch, count, variables, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=index) if isinstance(index, str) else nullcontext():
        assert world._device_index() == index


def test_two_ranks_on_one_gpu_are_refused():
    def places(*gpus):
        return [{"host": "node", "gpu": gpu} for gpu in gpus]

    check_gpus(places("a", "b", "c"))
    check_gpus([{"host": "node"}] * 3)  # on the CPU
    with pytest.raises(InputError, match=r"ranks 0 and 2 have the same GPU \(a on node\)"):
        check_gpus(places("a", "b", "a"))


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch, tmp_path, caplog):
    """`nvidia-smi` works and torch does not: the driver is older than torch's CUDA."""
    if torch.cuda.is_available():
        pytest.skip("torch can use it")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    for there, hidden in ((False, None), (True, ""), (True, None)):
        assert caplog.text == ""
        monkeypatch.setattr(world, "_DRIVER", (tmp_path if there else tmp_path / "none",))
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with session() as found:
            assert found.device.type == "cpu"
    assert "torch cannot use, so the CPU is used (Found no NVIDIA driver" in caplog.text
    assert f"needs a driver for CUDA {torch.version.cuda}" in caplog.text


def test_one_rank_on_a_gpu_sends_itself_nothing():
    """NCCL would copy the rows, gloo does."""
    with session("cpu"):
        with FakeTensorMode():
            rows = torch.empty(3, 5, device="cuda")
            assert collectives.exchange_rows(rows, [3], [3]).wait() is rows
        rows = torch.ones(3, 5)
        received = collectives.exchange_rows(rows, [3], [3]).wait()
        assert received.data_ptr() != rows.data_ptr()
        assert torch.equal(received, rows)


# ---- its CPUs


@pytest.mark.parametrize(
    ("cpus_W", "shared_W"),
    [
        ([{0, 1, 2, 3}] * 4, [4, 4, 4, 4]),  # torchrun
        ([{0, 1}, {2, 3}], [1, 1]),  # srun binds each task
        ([{0, 1}, {0, 1}, {2, 3}, {2, 3}], [2, 2, 2, 2]),  # two to a socket
        ([{0, 1}, {1, 2}, {3}], [2, 2, 1]),
    ],
)
def test_ranks_that_may_run_on_the_same_cpus(cpus_W, shared_W):
    places = [{"host": "one", "cpus": sorted(cpus)} for cpus in cpus_W]
    elsewhere = [place | {"host": "two"} for place in places]
    assert [ranks_per_cpu(place, places + elsewhere) for place in places] == shared_W


def test_nccl_that_does_not_start_is_no_bad_input(monkeypatch):
    """So that a job is queued again; the cause stands at the end of NCCL's text."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, text in (environment | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, text)

    def fail(*_, **__):
        raise dist.DistBackendError("NCCL error in: " + "x" * 400 + " the cause")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(LostRankError, match=r"rank 0: NCCL could not start \(.*the cause\)"):
        world._join("gloo", timedelta(seconds=20), {}, torch.device("cuda", 0))


@pytest.mark.distributed
@pytest.mark.parametrize("is_bound", [True, False])
def test_cpus_are_divided_only_among_ranks_that_share_them(is_bound):
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    cpus_W = [cpus[rank::2] if is_bound else cpus for rank in range(2)]
    results, port = ranks.forkserver.Queue(), free_port()
    told = [(rank, own, port, results) for rank, own in enumerate(cpus_W)]
    processes = [
        ranks.forkserver.Process(target=_count_cpus, args=each, daemon=True) for each in told
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(10)
    expected = [(1, len(own)) if is_bound else (2, len(own) // 2) for own in cpus_W]
    assert [found[rank] for rank in range(2)] == expected


def _count_cpus(rank, cpus, port, results):
    os.sched_setaffinity(0, cpus)
    os.environ.pop("TDDS_CPUS_PER_RANK", None)
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    with session("cpu", 30.0) as found:
        results.put((rank, (found.ranks_per_cpu, default_workers(found.ranks_per_cpu))))


def _lost(rank):
    if rank == 2:
        return ""  # hangs elsewhere
    said = ["Connection closed by peer [10.0.0.2]:57502", "Timed out waiting 8000ms for recv"][rank]
    hosts = ["host1", "host2", "host3"]
    return world._roll_call(world.current_world("cpu"), RuntimeError(said), 8.0, hosts)


@pytest.mark.distributed
def test_a_silent_rank_has_not_ended_although_others_left_because_of_it():
    found = ranks.run_ranks(3, _lost)
    for me in (0, 1):
        assert f"rank {me} on host{me + 1}" in found[me]
        assert ": rank 2 on host3 did not answer within 8 s (run.timeout_seconds) (" in found[me]
