"""The process group: joining it, leaving it, and naming the ranks that are gone. `collectives` uses
it.

The launcher is known here only, through the env:// variables that torchrun and SLURM scripts set
(RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Without them a process
group of one is made, so that world size 1 runs the same code. A foreign loop brings its own group,
or none: then the collectives are identities.
"""

import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tdds_dist.distributed.interruption import SIGNALS, Preempted
from tdds_dist.errors import InputError, LostRankError

TIMEOUT_SECONDS = 600.0  # of a collective; the first step may wait for compilation on other ranks
_ROLL_CALL_SECONDS = 10.0  # ranks that time out together do so within that
_HOST_STAYS_SECONDS = 1.0  # that rank 0 leaves later
# of the time-out: control groups raise before NCCL's watchdog ends the process without a message
_CONTROL_SHARE = 0.9

Group = dist.ProcessGroup
_position = "before the first step"  # where this process is, for messages about lost ranks


@dataclass(frozen=True)
class World:
    """The place of this process among all ranks."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

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
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), local_rank, dist.get_world_size(), local_world_size, device)


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
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "run.device='cuda' but no CUDA device is visible; use run.device=cpu or run.device=auto"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK={local_rank} needs {local_rank + 1} visible CUDA devices, there are "
                f"{torch.cuda.device_count()}; start fewer processes per node or show more devices"
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    _join(backend, timedelta(seconds=timeout_seconds))
    world = current_world(torch.device(device, local_rank) if device == "cuda" else device)
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
        if world.world_size > 1 and _is_lost_peer(error):
            raise LostRankError(_roll_call(world, error, timeout_seconds)) from error
        raise
    gc.collect()
    try:
        dist.barrier()
    # a rank that is through it may have left before this one hears of it
    except RuntimeError as error:
        if "closed by peer" not in str(error).lower():
            raise
    dist.destroy_process_group()
    if preempted is not None:
        raise preempted


def _join(backend: str, timeout: timedelta) -> None:
    """Make the default group; raise InputError when the ranks cannot meet."""
    if "RANK" not in os.environ:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun on one node; on several, nodes count restarts differently
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # It keeps the store when it restarts ranks, and there the addresses of those that are
            # gone.
            store = dist.PrefixStore(
                f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
            )
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = (
            f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}"
            f" MASTER_PORT={os.environ.get('MASTER_PORT')}"
        )
        text = " ".join(str(error).split())[:200]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise InputError(
                f"{where} is in use by another program; set another MASTER_PORT, or start with"
                " `torchrun --standalone`, which finds a free one"
            ) from error
        seconds = timeout.total_seconds()
        raise InputError(
            f"{os.environ.get('WORLD_SIZE')} ranks could not meet at {where} within {seconds:.0f} s"
            f" ({text}); start all of them, on hosts that reach each other"
        ) from error


# ---- who is missing


def set_position(text: str) -> None:
    """Note how far this process is in its work, for messages about ranks that are gone."""
    global _position
    _position = text


def _is_lost_peer(error: RuntimeError) -> bool:
    """Say whether a collective failed because another rank is gone or silent."""
    text = str(error).lower()
    signs = (
        "timed out",
        "timeout",
        "connection closed",
        "connection reset",
        "connection refused",
        "broken pipe",
        "gloo",
        "nccl",
        "socket",
    )
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _roll_call(world: World, error: RuntimeError, timeout_seconds: float) -> str:
    """Name the ranks that do not answer: every rank whose collective failed says so in the store
    and counts the others."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the launcher ends us soon; first say why
    kind = "did not answer" if "time" in str(error).lower() else "ended"
    missing = {rank for rank in range(world.world_size) if rank != world.rank}
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"tdds/lost/{world.rank}", _position)
        deadline = time.monotonic() + min(_ROLL_CALL_SECONDS, max(1.0, timeout_seconds))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"tdds/lost/{rank}"])}
            time.sleep(0.1)
        if world.is_main:
            time.sleep(_HOST_STAYS_SECONDS)  # with plain env:// the store ends with this process
    except (dist.DistError, RuntimeError):
        missing = {0} & missing or missing  # with plain env:// it is rank 0 that hosts the store
    first_line = " ".join(str(error).split())[:200]
    if not missing:
        return (
            f"rank {world.rank}, {_position}: ranks lost each other ({first_line}); run the same"
            " command again to go on"
        )
    who = f"rank {min(missing)}"
    if len(missing) > 1:  # a rank that is gone can delay others in noticing it
        who = f"at least one of the ranks {', '.join(str(rank) for rank in sorted(missing))}"
    waited = (
        f" within {timeout_seconds:g} s (run.timeout_seconds)" if kind == "did not answer" else ""
    )
    return (
        f"rank {world.rank}, {_position}: {who} {kind}{waited} ({first_line}); see what that rank"
        " said last, and run the same command again to go on"
    )
