"""The state of training as named tensors, for a checkpoint, and back: network, optimizer, observer,
and what differs by rank.

Names: `model/...` and `optimizer/<parameter>/...` are the same on all ranks, `observer/...` may be
sharded, `rank00001/...` is of one rank alone. What is not a tensor goes into the checkpoint's
record (`engine`).
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdds_dist.distributed.world import World
from tdds_dist.runs.artifacts import write_atomically
from tdds_dist.runs.checkpoint import Checkpoint, Checkpoints

Replicas = nn.parallel.DistributedDataParallel


def tensors_of(
    model: Replicas,
    optimizer: torch.optim.Optimizer,
    observed: dict[str, Tensor],
    totals: Tensor,
    world: World,
) -> dict[str, Tensor]:
    """Return everything between two steps. `observed` is the observer's state, `totals` are sums of
    this rank."""
    tensors = {}
    for name, parameter in model.module.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{name}/{key}"] = value
    tensors |= {f"observer/{name}": value for name, value in observed.items()}
    return tensors | _of_rank(world.rank, model, totals, world)


def _of_rank(rank: int, model: Replicas, totals: Tensor, world: World) -> dict[str, Tensor]:
    """Return the state that differs between ranks within an epoch: batch-norm statistics, random
    numbers, sums of metrics."""
    own = {f"buffer/{name}": buffer for name, buffer in model.module.named_buffers()}
    own |= {"random": torch.get_rng_state(), "totals": totals}
    if world.device.type == "cuda":
        own["random_cuda"] = torch.cuda.get_rng_state()
    return {f"rank{rank:05d}/{name}": value for name, value in own.items()}


def restore(
    checkpoints: Checkpoints,
    checkpoint: Checkpoint,
    model: Replicas,
    optimizer: torch.optim.Optimizer,
    observed: dict[str, Tensor],
    totals: Tensor,
    world: World,
    new_seed: int,
) -> None:
    """Put the state of a checkpoint in place, made on this number of ranks or another; also into
    `observed`. A collective.

    On another number of ranks everybody gets the mean of the batch-norm statistics (as at the end
    of an epoch), the main rank all sums, and every rank random numbers from its `new_seed`.

    Raises:
        InputError: the checkpoint is of another network, optimizer or observer; on every rank.
    """
    kept = checkpoints.describe(checkpoint)
    parameters = dict(model.module.named_parameters())
    tensors = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, like in kept.items():
        kind, _, rest = name.partition("/")
        parameter_name, _, key = rest.rpartition("/")
        if kind == "optimizer" and parameter_name in parameters:
            parameter = parameters[parameter_name]
            # Step counters stay on the CPU, but for fused kernels.
            on_cpu = not like.ndim and not optimizer.defaults["fused"]
            device = torch.device("cpu") if on_cpu else parameter.device
            shaped = parameter.detach() if like.shape == parameter.shape else like
            tensors[name] = optimizer.state[parameter][key] = torch.empty_like(
                shaped, dtype=like.dtype, device=device
            )
    tensors |= {f"observer/{name}": value for name, value in observed.items()}
    num_ranks = checkpoint.record["world_size"]
    same_ranks = num_ranks == world.world_size
    parts = []
    for rank in [world.rank] if same_ranks else range(num_ranks):
        own = _of_rank(rank, model, totals, world)
        part = {name: value.clone() for name, value in own.items() if name in kept}
        tensors |= part
        parts.append({name.partition("/")[2]: value for name, value in part.items()})
    checkpoints.load(checkpoint, tensors)
    for name, buffer in model.module.named_buffers():
        buffer.copy_(_mean([part[f"buffer/{name}"] for part in parts]))
    if same_ranks:
        totals.copy_(parts[0]["totals"])
        torch.set_rng_state(parts[0]["random"])
        if world.device.type == "cuda" and "random_cuda" in parts[0]:
            torch.cuda.set_rng_state(parts[0]["random_cuda"])
    else:
        totals.copy_(torch.stack([part["totals"] for part in parts]).sum(dim=0) * world.is_main)
        torch.manual_seed(new_seed)


def _mean(values: list[Tensor]) -> Tensor:
    first, *others = values
    return sum(others, start=first) / len(values) if first.is_floating_point() else first


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a plain state dict of CPU tensors, which `torch.load(weights_only=True)` reads on any
    machine."""
    weights = module.state_dict()
    for name, value in weights.items():
        weights[name] = value.cpu()
    write_atomically(path, lambda file: torch.save(weights, file))


def settle_buckets(model: Replicas, sample: Tensor, autocast: AbstractContextManager[Any]) -> None:
    """Make a forward and backward pass without effect on `sample` (at least two images), forward
    under `autocast`.

    DDP sorts its buckets anew after the first backward pass, which changes the order of sums from
    three ranks on; so that a resumed run sums as an uninterrupted one does, no run trains with
    unsorted buckets.
    """
    kept = [buffer.clone() for buffer in model.module.buffers()]
    model.train()
    with torch.random.fork_rng([sample.device] * sample.is_cuda):
        for _ in range(1 + model.static_graph):  # which sorts them one pass later
            with autocast:
                logits_BC = model(sample)
            (logits_BC.float().sum() * 0.0).backward()
            model.zero_grad(set_to_none=True)
    for buffer, value in zip(model.module.buffers(), kept, strict=True):
        buffer.copy_(value)
