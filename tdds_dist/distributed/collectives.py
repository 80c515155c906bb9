"""Exchange of data between ranks: agreement, sums, rows by owner, gathered shards."""

# B rows of a call, F flags, M rows per shard, N dataset, R rows received, W world size, X numbers
# of a row

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from tdds_dist.distributed.partition import rows_per_shard
from tdds_dist.distributed.world import _CONTROL_SHARE, TIMEOUT_SECONDS, Group, World, current_world
from tdds_dist.distributed.world import barrier as barrier  # one of the collectives
from tdds_dist.errors import InputError

# ---- ranks that agree


@contextmanager
def together(world: World) -> Iterator[None]:
    """Run a block that may find bad input, or a full disk, on some ranks only; then all ranks raise
    an InputError with the first rank's message.

    Protocol: every rank enters and leaves the block; inside it there is no collective.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as caught:
        error = caught
    except OSError as caught:
        error = InputError(
            f"cannot read or write ({caught}); free space, or choose another run.dir"
        )
        error.__cause__ = caught
    messages = gather_objects(None if error is None else str(error), world)
    first = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if first is not None:
        if error is not None and world.rank == first:
            error.shared = True
            raise error
        raise InputError(f"{messages[first]} (found on rank {first})", shared=True)


def gather_objects(value: Any, world: World, group: Group | None = None) -> list[Any]:
    """Return the small `value` of every rank, by rank, on every rank; blocks. Only for values of
    our own ranks: it pickles."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def control_group(timeout_seconds: float = TIMEOUT_SECONDS) -> Group | None:
    """Make a group of all ranks on the CPU, for messages beside the collectives of training; None
    without a process group.

    A collective. `release_group` ends it.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(
        backend="gloo", timeout=timedelta(seconds=_CONTROL_SHARE * timeout_seconds)
    )
    dist.barrier(group)  # one that ends it at once would cut connections that others still make
    return group


def limit_collectives(seconds: float) -> None:
    """Give the collectives of training, from the next on, another time limit; every rank calls
    it."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def ends_in_time(group: Group | None, seconds: float) -> bool:
    """Say whether gloo ends a sum over the ranks of a control group with an error after `seconds`.

    One rank calls it while the others do not, and the group is of no use afterwards.
    """
    assert group is not None
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=seconds)
    try:
        group.allreduce([torch.zeros(1)], options).wait()
    except RuntimeError:
        return True
    return False


def release_group(group: Group | None) -> None:
    """End a control group; every rank calls it, after its last use."""
    if group is not None:
        dist.destroy_process_group(group)


class Consensus:
    """Agree on the largest of every flag over all ranks, one call late: a step starts the exchange
    and the next one reads it, so that no rank waits for a message that was sent just now. All ranks
    get the same answers at the same call."""

    def __init__(self, num_flags: int, group: Group | None):
        self._group = group
        self._nothing = torch.zeros(num_flags, dtype=torch.int64), None
        self._pending: tuple[Tensor, dist.Work | None] = self._nothing

    def exchange(self, flags: list[int]) -> list[int]:
        """Give this rank's flags; return the agreed ones of the call before (zeros at first)."""
        agreed = self._read()
        flag_F = torch.tensor(flags, dtype=torch.int64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(flag_F, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag_F, work)
        return agreed

    def settle(self, flags: list[int]) -> list[int]:
        """Do as `exchange`, but wait, and count what was under way as well."""
        before = self.exchange(flags)
        return [max(pair) for pair in zip(before, self._read(), strict=True)]

    def _read(self) -> list[int]:
        (flag_F, work), self._pending = self._pending, self._nothing
        if work is not None:
            work.wait()
        return flag_F.tolist()


def as_shard(local: Tensor, num_samples: int, world: World, dim: int = 0) -> Tensor:
    """Present this rank's block of a table, whose axis `dim` is the sample axis, as a DTensor over
    all ranks (shares memory).

    Without a process group it is the whole table, and comes back as it is.
    """
    if not dist.is_initialized():
        return local
    from torch.distributed.tensor import Shard

    shape = torch.Size([*local.shape[:dim], num_samples, *local.shape[dim + 1 :]])
    return _as_dtensor(local, torch.empty(shape, device="meta"), [Shard(dim)])


def own_rows(table: Tensor) -> Tensor:
    """Return the local block of what `as_shard` made."""
    return table.to_local() if hasattr(table, "to_local") else table


def copy_to_host(tensor: Tensor, host: Tensor) -> Tensor:
    """Copy this rank's rows into `host`, which is as large; return it sharded as `tensor` is.

    On CUDA the copy is under way when this returns.
    """
    local = own_rows(tensor)
    host.copy_(local, non_blocking=True)
    return host if local is tensor else _as_dtensor(host, tensor, tensor.placements)  # type: ignore[attr-defined]


def _as_dtensor(local: Tensor, whole: Tensor, placements: Any) -> Tensor:
    """Present this rank's part as a DTensor over all ranks, of the shape of `whole`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    everyone = dist.group.WORLD
    assert everyone is not None
    mesh = DeviceMesh.from_group(everyone, local.device.type)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows under way between ranks, started by `exchange_rows`; `wait` gives what this rank
    received."""

    received_RX: Tensor
    work: dist.Work | None
    sent_BX: Tensor  # must outlive the transfer

    def wait(self) -> Tensor:
        """Return the received rows [R, X], ordered by sending rank. On CUDA this orders streams and
        does not block the host."""
        if self.work is not None:
            self.work.wait()
        return self.received_RX


def exchange_rows(rows_BX: Tensor, sends: list[int], receives: list[int]) -> Exchange:
    """Start sending the first sends[0] rows to rank 0, the next sends[1] to rank 1, and so on.

    Protocol: every rank calls it equally often, also with nothing to send; `receives` must be what
    the others send. One rank has received what it sends: NCCL would copy it on a stream of its own,
    where gloo, which is for tests, takes the way of many ranks.
    """
    if not dist.is_initialized() or (rows_BX.is_cuda and dist.get_world_size() == 1):
        return Exchange(rows_BX, None, rows_BX)
    received_RX = rows_BX.new_empty((sum(receives), rows_BX.shape[1]))
    work = dist.all_to_all_single(received_RX, rows_BX.contiguous(), receives, sends, async_op=True)
    return Exchange(received_RX, work, rows_BX)


def exchange_counts(sends_W: Tensor) -> list[int]:
    """Return the number of rows that each rank will send to this one, given those that it sends to
    each (int64 [W]); blocks."""
    if not dist.is_initialized():
        return sends_W.tolist()
    receives_W = torch.empty_like(sends_W)
    dist.all_to_all_single(receives_W, sends_W)
    return receives_W.tolist()


def all_gather_shards(shard_MX: Tensor, num_samples: int, world: World) -> Tensor:
    """Gather the rows of all shards in global order, [N, ...], on every rank; `shard_MX` holds this
    rank's rows only."""
    if not dist.is_initialized():
        return shard_MX
    rows = rows_per_shard(num_samples, world.world_size)
    padded_MX = shard_MX.new_zeros((rows, *shard_MX.shape[1:]))
    padded_MX[: len(shard_MX)] = shard_MX
    gathered = shard_MX.new_empty((world.world_size * rows, *shard_MX.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded_MX)
    return gathered[:num_samples]


def sum_over_ranks(value_X: Tensor) -> Tensor:
    """Sum `value_X` over ranks, in place, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(value_X)
    return value_X


def min_over_ranks(value_X: Tensor) -> Tensor:
    """Take the minimum of `value_X` over ranks, in place, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(value_X, op=dist.ReduceOp.MIN)
    return value_X


def average_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers (batch-norm statistics) by their mean over ranks, so that
    replicas agree."""
    if not dist.is_initialized():
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])  # one exchange, not one for each
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = flat.split([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view_as(buffer))


def data_parallel(
    model: nn.Module,
    world: World,
    num_compiled: int = 0,
    *,
    static_graph: bool = False,
    compress: bool = False,
) -> nn.parallel.DistributedDataParallel:
    """Wrap the model for gradient averaging; buffers stay local during an epoch (see
    `average_buffers`).

    num_compiled: shapes of input for each of which calls of the wrapper are compiled
    (torch.compile, in place: names of parameters stay, the model inside stays as it is); 0 compiles
    nothing. The graph is cut where DDP's buckets end, so that gradients travel during backward all
    the same. Compiled kernels give other last bits than eager ones, and the same bits again on the
    same machine. static_graph: every step uses the same parameters. compress: gradients travel as
    bfloat16.
    """
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    replicas = nn.parallel.DistributedDataParallel(
        model,
        device_ids=device_ids,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
    )
    if compress:
        replicas.register_comm_hook(None, default_hooks.bf16_compress_hook)
    if num_compiled:
        limits = torch._dynamo.config
        # beyond it, torch goes on uncompiled
        limits.recompile_limit = max(limits.recompile_limit, 8 + num_compiled)
        replicas.compile(dynamic=False)  # kernels for a size are faster than kernels for any
    return replicas


# ---- rehearsals


@contextmanager
def fake_session(rank: int, world_size: int) -> Iterator[World]:
    """Be one rank, on the CPU, of many that are not there: collectives return at once and move
    nothing."""
    import torch.testing._internal.distributed.fake_pg as fake  # registers its backend

    if dist.is_initialized():
        raise InputError("there is a process group already; rehearse in a process without one")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=world_size)
    try:
        yield current_world("cpu")
    finally:
        dist.destroy_process_group()


COLLECTIVES = (
    "all_to_all_single",
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather_object",
    "barrier",
)  # that are called here


@contextmanager
def counted(deliver: Callable[[Tensor], object] = lambda received: None) -> Iterator[Counter[str]]:
    """Count the calls of each collective inside, at torch.distributed.

    Of all-to-alls of rows also the `bytes` that are handed over, those `sent` to other ranks, and
    the `messages`: ranks that get some. `deliver` is called with the tensor that rows arrive in,
    for a process group that moves nothing.
    """
    from unittest.mock import patch

    counts: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            if name == "all_to_all_single" and len(arguments) > 2:
                received_RX, rows_BX, _, sends = arguments
                others = [rows for rank, rows in enumerate(sends) if rank != dist.get_rank()]
                counts["bytes"] += rows_BX.nbytes
                counts["sent"] += sum(others) * rows_BX.shape[1] * rows_BX.element_size()
                counts["messages"] += sum(rows > 0 for rows in others)
                deliver(received_RX)
            return real(*arguments, **options)

        return call

    replaced: dict[str, Any] = {name: counting(name) for name in COLLECTIVES}
    with patch.multiple(dist, **replaced):
        yield counts
