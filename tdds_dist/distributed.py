"""The process group and the few collectives of the package. Nothing else calls torch.distributed.

The launcher is known here only, through the env:// variables that torchrun and SLURM scripts set (RANK, LOCAL_RANK,
WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Without them a process group of one is made, so that world size 1 runs
the same code. A foreign loop brings its own group, or none: then the collectives are identities.
"""

# W world size, N dataset, M rows per shard, R rows received

import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdds_dist.errors import InputError, LostRankError
from tdds_dist.partition import rows_per_shard, shard_bounds
from tdds_dist.preemption import SIGNALS, Preempted

TIMEOUT_SECONDS = 600.0  # of a collective; the first step may wait for compilation on other ranks
_ROLL_CALL_SECONDS = 10.0  # ranks that time out together do so within that
_HOST_STAYS_SECONDS = 1.0  # that rank 0 leaves later
_CONTROL_SHARE = 0.9  # of the time-out: control groups speak up before NCCL's watchdog ends the process without a word

Group = dist.ProcessGroup
_position = "before the first step"  # where this process is, for messages about lost ranks


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes files that are not shards, and prints."""
        return self.rank == 0


def current_world(device: torch.device | str | None = None) -> World:
    """The world of the already initialised default group; a world of one when there is none."""
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        return World(0, 0, 1, 1, device)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), local_rank, dist.get_world_size(), local_world_size, device)


@contextmanager
def session(device: str = "auto", timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """Join the process group that the environment describes, and leave it in order.

    A clean exit is: all ranks meet at a barrier, then destroy the group (gloo aborts processes that leave a
    collective behind). After an exception nobody waits, not even for the group's shutdown: the program says what is
    wrong and leaves (`cli.run`), and the launcher ends the other ranks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device='cuda' but no CUDA device is visible; use run.device=cpu or run.device=auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"LOCAL_RANK={local_rank} needs {local_rank + 1} visible CUDA devices, there are "
                             f"{torch.cuda.device_count()}; start fewer processes per node or show more devices")
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
    dist.barrier()
    dist.destroy_process_group()
    if preempted is not None:
        raise preempted


def _join(backend: str, timeout: timedelta) -> None:
    """Make the default group; InputError when ranks cannot meet."""
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun on one node; on several, nodes count restarts differently
            # It keeps the store when it restarts ranks, and there the addresses of those that are gone.
            store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        text = " ".join(str(error).split())[:200]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise InputError(f"{where} is in use by another program; set another MASTER_PORT, or start with `torchrun "
                             "--standalone`, which finds a free one") from error
        seconds = timeout.total_seconds()
        raise InputError(f"{os.environ.get('WORLD_SIZE')} ranks could not meet at {where} within {seconds:.0f} s ({text}); "
                         "start all of them, on hosts that reach each other") from error


# ---- who is missing


def set_position(text: str) -> None:
    """Where this process is in its work, for messages about ranks that are gone."""
    global _position
    _position = text


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or silent."""
    text = str(error).lower()
    signs = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "broken pipe",
             "gloo", "nccl", "socket")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _roll_call(world: World, error: RuntimeError, timeout_seconds: float) -> str:
    """Name the ranks that do not answer: every rank whose collective failed says so in the store and counts the others."""
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
        return f"rank {world.rank}, {_position}: ranks lost each other ({first_line}); run the same command again to go on"
    who = f"rank {min(missing)}"
    if len(missing) > 1:  # one that is gone can keep others from noticing in time
        who = f"at least one of the ranks {', '.join(str(rank) for rank in sorted(missing))}"
    waited = f" within {timeout_seconds:g} s (run.timeout_seconds)" if kind == "did not answer" else ""
    return (f"rank {world.rank}, {_position}: {who} {kind}{waited} ({first_line}); see what that rank said last, and run "
            "the same command again to go on")


# ---- ranks that agree


@contextmanager
def together(world: World) -> Iterator[None]:
    """Run a block that may find bad input, or a full disk, on some ranks only; then all ranks raise an InputError with
    the first rank's message.

    Protocol: every rank enters and leaves the block; inside it there is no collective.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as caught:
        error = caught
    except OSError as caught:
        error = InputError(f"cannot read or write ({caught}); free space, or choose another run.dir")
        error.__cause__ = caught
    messages = gather_objects(None if error is None else str(error), world)
    first = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if first is not None:
        if error is not None and world.rank == first:
            error.shared = True
            raise error
        raise InputError(f"{messages[first]} (found on rank {first})", shared=True)


def gather_objects(value: Any, world: World, group: Group | None = None) -> list[Any]:
    """The small `value` of every rank, by rank, on every rank; blocks. Only for values of our own ranks: it pickles."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def control_group(timeout_seconds: float = TIMEOUT_SECONDS) -> Group | None:
    """A group of all ranks on the CPU, for talk that must not get between training's collectives; None without ranks.

    A collective. `release_group` ends it.
    """
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=_CONTROL_SHARE * timeout_seconds))


def release_group(group: Group | None) -> None:
    """End a control group; every rank calls it, after its last use."""
    if group is not None:
        dist.destroy_process_group(group)


class Agreement:
    """The largest of every flag over all ranks, one call late: a step starts the exchange, the next one reads it, so that
    nobody waits for a message that was sent just now. All ranks see the same answers at the same call."""

    def __init__(self, num_flags: int, group: Group | None):
        self._num_flags, self._group = num_flags, group
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def exchange(self, flags: list[int]) -> list[int]:
        """Give this rank's flags; returns the agreed ones of the call before (zeros at first)."""
        agreed = self._read()
        flag_F = torch.tensor(flags, dtype=torch.int64)
        work = None if self._group is None else dist.all_reduce(flag_F, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag_F, work)
        return agreed

    def settle(self, flags: list[int]) -> list[int]:
        """As `exchange`, but waits, and counts what was under way as well."""
        before = self.exchange(flags)
        return [max(pair) for pair in zip(before, self._read(), strict=True)]

    def _read(self) -> list[int]:
        if self._pending is None:
            return [0] * self._num_flags
        flag_F, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return flag_F.tolist()


def as_shard(local: Tensor, num_samples: int, world: World, dim: int = 0) -> Tensor:
    """This rank's block of a table whose axis `dim` is the sample axis, as a DTensor over all ranks (shares memory).

    Without a process group it is the whole table, and comes back as it is.
    """
    if not dist.is_initialized():
        return local
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    everyone = dist.group.WORLD
    assert everyone is not None
    mesh = DeviceMesh.from_group(everyone, world.device.type)
    shape = torch.Size([*local.shape[:dim], num_samples, *local.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)


def own_rows(table: Tensor) -> Tensor:
    """The local block of what `as_shard` made."""
    return table.to_local() if hasattr(table, "to_local") else table


def copy_to_host(tensor: Tensor, buffer: Tensor | None = None) -> Tensor:
    """A copy on the CPU, sharded as `tensor` is; into `buffer`, an earlier copy of the same tensor, where it fits.

    On CUDA the copy is under way when this returns.
    """
    local = own_rows(tensor)
    host = None if buffer is None else own_rows(buffer)
    if host is None or (host.shape, host.dtype) != (local.shape, local.dtype):
        host = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    host.copy_(local, non_blocking=True)
    if local is tensor:
        return host
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    everyone = dist.group.WORLD
    assert everyone is not None
    mesh = DeviceMesh.from_group(everyone, "cpu")
    assert isinstance(tensor, DTensor)
    return DTensor.from_local(host, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


class Exchange:
    """Rows under way between ranks, started by `exchange_rows`; `wait` gives what this rank received."""

    def __init__(self, received_RX: Tensor, work: dist.Work | None, sent_BX: Tensor):
        self._received_RX = received_RX
        self._work = work
        self._sent_BX = sent_BX  # must outlive the transfer

    def wait(self) -> Tensor:
        """Received rows [R, X], ordered by sending rank. On CUDA this orders streams and does not block the host."""
        if self._work is not None:
            self._work.wait()
        return self._received_RX


def exchange_rows(rows_BX: Tensor, sends: list[int], receives: list[int]) -> Exchange:
    """Start sending the first sends[0] rows to rank 0, the next sends[1] to rank 1, and so on.

    Protocol: every rank calls it equally often, also with nothing to send; `receives` must be what the others send.
    """
    if not dist.is_initialized():
        return Exchange(rows_BX, None, rows_BX)
    received_RX = rows_BX.new_empty((sum(receives), rows_BX.shape[1]))
    work = dist.all_to_all_single(received_RX, rows_BX.contiguous(), receives, sends, async_op=True)
    return Exchange(received_RX, work, rows_BX)


def exchange_counts(sends_W: Tensor) -> list[int]:
    """How many rows each rank will send to this one, given how many this one sends to each (int64 [W]); blocks."""
    if not dist.is_initialized():
        return sends_W.tolist()
    receives_W = torch.empty_like(sends_W)
    dist.all_to_all_single(receives_W, sends_W)
    return receives_W.tolist()


def all_gather_shards(shard_MX: Tensor, num_samples: int, world: World) -> Tensor:
    """Rows of all shards in global order, [N, ...], on every rank; `shard_MX` holds this rank's rows only."""
    if not dist.is_initialized():
        return shard_MX
    rows = rows_per_shard(num_samples, world.world_size)
    padded_MX = shard_MX.new_zeros((rows, *shard_MX.shape[1:]))
    padded_MX[: len(shard_MX)] = shard_MX
    gathered = shard_MX.new_empty((world.world_size * rows, *shard_MX.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded_MX)
    return gathered[:num_samples]


def all_gather_same(value_X: Tensor, world: World) -> Tensor:
    """The equally shaped `value_X` of every rank, [W, ...]."""
    gathered_WX = value_X.new_empty((world.world_size, *value_X.shape))
    if not dist.is_initialized():
        gathered_WX[0] = value_X
    else:
        dist.all_gather_into_tensor(gathered_WX.view(-1), value_X.contiguous().view(-1))
    return gathered_WX


def sum_over_ranks(value_X: Tensor) -> Tensor:
    """Sum of `value_X` over ranks, in place, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(value_X)
    return value_X


def min_over_ranks(value_X: Tensor) -> Tensor:
    """Minimum of `value_X` over ranks, in place, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(value_X, op=dist.ReduceOp.MIN)
    return value_X


def average_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers (batch-norm statistics) by their mean over ranks, so that replicas agree."""
    if not dist.is_initialized():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def data_parallel(model: nn.Module, world: World, num_compiled: int = 0) -> nn.parallel.DistributedDataParallel:
    """The model wrapped for gradient averaging; buffers stay local during an epoch (see `average_buffers`).

    num_compiled: shapes of input for each of which calls of the wrapper are compiled (torch.compile, in place: names of
    parameters stay, the model inside stays as it is); 0 compiles nothing. The graph is cut where DDP's buckets end, so that
    gradients travel during backward all the same. Compiled kernels give other last bits than eager ones, and the same bits
    again on the same machine.
    """
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    replicas = nn.parallel.DistributedDataParallel(
        model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    if num_compiled:
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 8 + num_compiled)  # beyond it, torch goes on uncompiled
        replicas.compile(dynamic=False)  # kernels for a size are faster than kernels for any
    return replicas


def own_shard(num_samples: int, world: World) -> tuple[int, int]:
    """Half-open range of global indices that this rank owns."""
    return shard_bounds(num_samples, world.world_size, world.rank)
