"""The process group: joining it, leaving it, and naming the ranks that are gone. `collectives` uses
it.

The launcher is known here only, through the env:// variables that torchrun and SLURM scripts set
(RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Without them a process
group of one is made, so that world size 1 runs the same code. A foreign loop brings its own group,
or none: then the collectives are identities.
"""

import gc
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tdds_dist.distributed.interruption import SIGNALS, Preempted
from tdds_dist.errors import InputError, LostRankError

TIMEOUT_SECONDS = 600.0  # of a collective; the first step may wait for compilation on other ranks
_ROLL_CALL_SECONDS = 10.0  # ranks that time out together do so within that
_HOST_STAYS_SECONDS = 1.0  # that rank 0 leaves later
# of the time-out: control groups raise before NCCL's watchdog ends the process without a message
_CONTROL_SHARE = 0.9

_DRIVER = (Path("/proc/driver/nvidia"), Path("/dev/nvidia0"))  # where there is an NVIDIA GPU
Group = dist.ProcessGroup
log = logging.getLogger("tdds")
_position = "before the first step"  # where this process is, for messages about lost ranks


@dataclass(frozen=True)
class World:
    """The place of this process among all ranks. `ranks_per_cpu`: how many ranks may run on each of
    the CPUs that this one may use, 1 where its launcher has bound it to CPUs of its own."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    ranks_per_cpu: int = 1

    @property
    def is_main(self) -> bool:
        """Say whether this is rank 0, which prints, and writes all files that are not shards."""
        return self.rank == 0


def current_world(device: torch.device | str | None = None) -> World:
    """Return the world of the already initialised default group; a world of one when there is
    none."""
    device = torch.device(
        device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if not dist.is_initialized():
        return World(0, 0, 1, 1, device)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), local_rank, dist.get_world_size(), num_local, device, num_local)


@contextmanager
def session(device: str = "auto", timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """Join the process group that the environment describes, and leave it in order.

    A clean exit is: all ranks meet at a barrier, then destroy the group (gloo aborts processes that
    leave a collective behind). After an exception no rank waits, not even for the group's shutdown:
    the program says what is wrong and leaves (`run` in `cli.main`), and the launcher ends the other
    ranks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            _warn_of_idle_gpu()
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"run.device='cuda' but no CUDA device is visible ({_why_no_cuda()}); use"
            " run.device=cpu or run.device=auto"
        )
    place: dict[str, Any] = {"host": socket.gethostname(), "cpus": [*os.sched_getaffinity(0)]}
    if device == "cuda":
        own = torch.device("cuda", _device_index())
        torch.cuda.set_device(own)
        place["gpu"] = str(torch.cuda.get_device_properties(own).uuid)
        places = _join("cpu:gloo,cuda:nccl", timedelta(seconds=timeout_seconds), place, own)
    else:
        own = torch.device("cpu")
        places = _join("gloo", timedelta(seconds=timeout_seconds), place)
    world = replace(current_world(own), ranks_per_cpu=ranks_per_cpu(place, places))
    hosts = [each["host"] for each in places]
    preempted = None
    try:
        yield world
    except Preempted as leaving:
        if not leaving.agreed:
            raise
        preempted = leaving
    except InputError:
        if world.world_size == 1:
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if world.world_size > 1 and is_lost_peer(error):
            raise LostRankError(_roll_call(world, error, timeout_seconds, hosts)) from error
        raise
    gc.collect()
    try:
        barrier()
    # a rank that is through it may have left before this one hears of it
    except RuntimeError as error:
        if "closed by peer" not in str(error).lower():
            raise LostRankError(_roll_call(world, error, timeout_seconds, hosts)) from error
    dist.destroy_process_group()
    if preempted is not None:
        raise preempted


def barrier() -> None:
    """Wait for all ranks, on the CPU where the group has a backend for it: gloo says which rank is
    gone, where NCCL ends the process.

    No tensor takes part: gloo's thread may drop the last reference to one a moment after the wait,
    for which it needs Python's lock, and whoever holds that while the group is destroyed waits for
    the thread.
    """
    if not dist.is_initialized():
        return
    if "cpu:" not in dist.get_backend_config():
        dist.barrier()
        return
    options = dist.BarrierOptions()
    options.device = torch.device("cpu")  # where a GPU is bound, `dist.barrier` would take NCCL
    work = dist.distributed_c10d._get_default_group().barrier(opts=options)
    if work is not None:
        work.wait()


# ---- the place of this process


def _device_index() -> int:
    """Return the number of this rank's GPU among those that it sees: LOCAL_RANK, or the only
    one."""
    count = torch.cuda.device_count()
    if count == 1:
        return 0  # its launcher shows each rank its own
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"RANK is set and LOCAL_RANK is not, so that this rank cannot know which of {count}"
            " visible GPUs is its own; set LOCAL_RANK, or start with `torchrun`, or show each rank"
            " one GPU (CUDA_VISIBLE_DEVICES)"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= count:
        raise InputError(
            f"LOCAL_RANK={local_rank} needs {local_rank + 1} visible CUDA devices, there are "
            f"{count}; start fewer processes per node or show more devices"
        )
    return local_rank


def _why_no_cuda() -> str:
    """Return what CUDA says when it cannot be used."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split(". ")[0].split())[:200]
    return "CUDA starts, with no device"


def gpus_are_hidden() -> bool:
    """Say whether CUDA_VISIBLE_DEVICES leaves no GPU to this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")


def _warn_of_idle_gpu() -> None:
    """Say on the main rank that the CPU is used although this machine has a GPU: its driver is too
    old, or broken."""
    if gpus_are_hidden() or os.environ.get("RANK", "0") != "0" or not torch.version.cuda:
        return
    if any(path.exists() for path in _DRIVER):
        log.warning(
            "this machine has an NVIDIA GPU that torch cannot use, so the CPU is used"
            f" ({_why_no_cuda()}); torch {torch.__version__} needs a driver for CUDA"
            f" {torch.version.cuda}, and `nvidia-smi` says what the driver is for: install a newer"
            " driver or a torch for an older CUDA, or say run.device=cpu"
        )


def ranks_per_cpu(place: dict[str, Any], places: list[dict[str, Any]]) -> int:
    """Return how many ranks may run on each CPU of the rank at `place`, where they differ the most,
    from the host and the CPUs of all ranks."""
    on_host = [other["cpus"] for other in places if other["host"] == place["host"]]
    return max(sum(cpu in cpus for cpus in on_host) for cpu in place["cpus"])


def check_gpus(places: list[dict[str, Any]]) -> None:
    """Raise InputError, on every rank, when two ranks have one GPU between them."""
    first: dict[str, int] = {}
    for rank, place in enumerate(places):
        other = first.setdefault(place.get("gpu", f"none of {rank}"), rank)
        if other != rank:
            raise InputError(
                f"ranks {other} and {rank} have the same GPU ({place['gpu']} on {place['host']});"
                " NCCL needs one for each: start fewer processes per node, or show each rank a GPU"
                " of its own (CUDA_VISIBLE_DEVICES)",
                shared=True,
            )


def _join(
    backend: str,
    timeout: timedelta,
    place: dict[str, Any],
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Make the default group, on CUDA with NCCL bound to `device` from the start; return what every
    rank gave as its place.

    Raises:
        InputError: the ranks cannot meet, or two have one GPU.
    """
    join = partial(dist.init_process_group, backend, timeout=timeout, device_id=device)
    if "RANK" not in os.environ:
        join(store=dist.HashStore(), rank=0, world_size=1)
        return [place]
    where = " ".join(f"{key}={os.environ.get(key)}" for key in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun on one node; on several, nodes count restarts differently
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # It keeps the store when it restarts ranks, and there the addresses of those that are
            # gone.
            store = dist.PrefixStore(
                f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
            )
        # not a collective: without knowing that each has a GPU of its own there is no group
        store.set(f"tdds/place/{rank}", json.dumps(place))
        texts = store.multi_get([f"tdds/place/{other}" for other in range(world_size)])
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise InputError(
                f"{where} is in use by another program; set another MASTER_PORT, or start with"
                " `torchrun --standalone`, which finds a free one"
            ) from error
        try:
            socket.getaddrinfo(os.environ.get("MASTER_ADDR"), None)
        except OSError as unknown:
            raise InputError(
                f"{where} does not resolve on {socket.gethostname()} ({unknown}); give a name or an"
                " address that all hosts know"
            ) from error
        raise InputError(
            f"{os.environ.get('WORLD_SIZE')} ranks could not meet at {where} within"
            f" {timeout.total_seconds():.0f} s ({' '.join(str(error).split())[:200]}); start all of"
            " them, on hosts that reach each other"
        ) from error
    places: list[dict[str, Any]] = [json.loads(text) for text in texts]
    try:
        check_gpus(places)
    except InputError:
        if rank == 0:
            time.sleep(_HOST_STAYS_SECONDS)  # with plain env:// the store ends with it
        raise
    try:
        join(store=store, rank=rank, world_size=world_size)
    except (dist.DistError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if device is not None:  # NCCL starts here; its cause comes last
            raise LostRankError(
                f"rank {rank}: NCCL could not start ({text[-300:]}); NCCL_DEBUG=INFO says more; run"
                " the same command again to go on"
            ) from error
        text, everyone = (
            text[:200],
            _with_hosts(range(world_size), [each["host"] for each in places]),
        )
        if "by peer" in text:
            raise LostRankError(
                f"rank {rank}: one of the ranks {everyone} ended at the start ({text}); see what it"
                " said last, and run the same command again to go on"
            ) from error
        raise InputError(
            f"the ranks {everyone} met at {where} and could not connect to each other ({text}); set"
            " GLOO_SOCKET_IFNAME on each host to the interface that leads to the others"
            " (`ip address`)"
        ) from error
    return places


# ---- who is missing


def set_position(text: str) -> None:
    """Note how far this process is in its work, for messages about ranks that are gone."""
    global _position
    _position = text


def is_lost_peer(error: RuntimeError) -> bool:
    """Say whether a collective failed because another rank is gone or silent."""
    signs = r"time(d )?out|connection (closed|reset|refused)|broken pipe|gloo|nccl|socket"
    return isinstance(error, dist.DistError) or bool(re.search(signs, str(error).lower()))


def _roll_call(world: World, error: RuntimeError, timeout_seconds: float, hosts: list[str]) -> str:
    """Name the ranks that do not answer: every rank whose collective failed says so in the store
    and counts the others. `hosts` by rank."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the launcher ends us soon; first say why
    kinds = {"did not answer" if "time" in str(error).lower() else "ended"}
    missing = {rank for rank in range(world.world_size) if rank != world.rank}
    seconds = min(_ROLL_CALL_SECONDS, max(1.0, timeout_seconds))
    is_over = threading.Event()

    def call() -> None:
        with suppress(dist.DistError, RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            store.set(f"tdds/lost/{world.rank}", *kinds)
            deadline = time.monotonic() + seconds
            while missing and time.monotonic() < deadline:
                for rank in [rank for rank in missing if store.check([f"tdds/lost/{rank}"])]:
                    missing.remove(rank)
                    kinds.add(store.get(f"tdds/lost/{rank}").decode())
                time.sleep(0.1)
            is_over.set()

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(seconds + _HOST_STAYS_SECONDS)  # behind a cut cable the store never answers
    # connections are closed by those, too, who leave because others did not answer
    kind = "did not answer" if "did not answer" in kinds else "ended"
    lost = sorted(missing)
    if not is_over.is_set() and 0 in missing:
        lost = [0]  # with plain env:// it is rank 0 that hosts the store
    if world.is_main:
        time.sleep(_HOST_STAYS_SECONDS)  # with plain env:// the store ends with this process
    first_line = " ".join(str(error).split())[:200]
    me = f"rank {_with_hosts([world.rank], hosts)}, {_position}"
    if not lost:
        everyone = _with_hosts(range(world.world_size), hosts)
        network = f" and all still answer: is the network whole between the ranks {everyone}?"
        return (
            f"{me}: ranks lost each other{network if len({*hosts}) > 1 else ''} ({first_line});"
            " run the same command again to go on"
        )
    who = f"rank {_with_hosts(lost, hosts)}"
    if len(lost) > 1:  # a rank that is gone can delay others in noticing it
        who = f"at least one of the ranks {_with_hosts(lost, hosts)}"
    waited = (
        f" within {timeout_seconds:g} s (run.timeout_seconds)" if kind == "did not answer" else ""
    )
    return (
        f"{me}: {who} {kind}{waited} ({first_line}); see what that rank said last, and run the"
        " same command again to go on"
    )


def _with_hosts(ranks: Iterable[int], hosts: list[str]) -> str:
    """Return these ranks as text, with their hosts where there are several."""
    if len({*hosts}) == 1:
        return ", ".join(map(str, ranks))
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    return "; ".join(f"{', '.join(found)} on {host}" for host, found in by_host.items())
