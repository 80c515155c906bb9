"""`tdds plan --rehearse W`: some of W ranks, one after the other in this process, doing what the
host does for scores, counted.

Real: the visit order and split sizes of W ranks, `ShardedScorer` with its state, and the planning
of a checkpoint. The process group is torch's `fake` one, in which nothing travels: rows that would
arrive have the indices that other ranks would send, labels and logits made up. There is no
network, no image and no GPU: state lies in host memory, and `record` computes on the CPU what a
GPU does there.
"""

# B rows per rank and forward pass, R rows that arrive, W world size

import gc
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tdds_dist.config.prune import Prune
from tdds_dist.config.run import Config
from tdds_dist.data.beton import inspect_split
from tdds_dist.data.pixels import available_bytes
from tdds_dist.distributed import collectives, host_memory
from tdds_dist.distributed.partition import (
    PADDING,
    EpochOrder,
    SplitSizes,
    epoch_order,
    shard_bounds,
)
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.experiments import memory
from tdds_dist.experiments.needs import Case, network_lines, read_images
from tdds_dist.runs.checkpoint import plan_of_rank, planned_bytes
from tdds_dist.scoring.shard import pack
from tdds_dist.text import size_text as size
from tdds_dist.training.build import build_on_meta, build_optimizer, build_scorer
from tdds_dist.training.state import Replicas, tensors_of

MIN_PASSES = 24
MIN_EXCHANGES = 2
_EPOCH = 1  # the second: losses are compared with those of the first

_LINES = (
    ("all-to-alls per forward pass", "all_to_alls_per_pass", "{:,.4f}"),
    ("other collectives per forward pass", "others_per_pass", "{:,.4f}"),
    ("messages per forward pass", "messages_per_pass", "{:,.1f}"),
    ("messages per all-to-all", "messages_per_exchange", "{:,.1f}"),
    ("sent per forward pass", "sent_bytes_per_pass", ""),
    ("sent per all-to-all", "sent_bytes_per_exchange", ""),
    ("state of the scorer", "state_bytes", ""),
    ("tensors of a checkpoint", "checkpoint_bytes", ""),
    ("resident memory of this process, before", "resident_bytes_before", ""),
    ("  with the state", "resident_bytes_with_state", ""),
    ("  at most, in the forward passes", "resident_bytes_at_most", ""),
    ("ms per forward pass: order", "order_ms", "{:,.3f}"),
    ("  split sizes, in a thread of their own", "split_sizes_ms", "{:,.3f}"),
    ("  record", "record_ms", "{:,.3f}"),
)
_NOTE = (
    "planned is for rank 0; ms are those that a CPU of this machine is busy, and record has the"
    " arithmetic that a GPU does"
)


@dataclass(frozen=True)
class Rehearsal:
    """Counts of a rehearsal: numbers by rank, and those that the plan has for rank 0."""

    title: str
    num_ranks: int
    num_passes: int
    planned: dict[str, float]
    by_rank: dict[int, dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Return the numbers of the text, by name."""
        return {
            "ranks": self.num_ranks,
            "forward_passes": self.num_passes,
            "planned": self.planned,
            "by_rank": {str(rank): numbers for rank, numbers in self.by_rank.items()},
        }

    def as_text(self) -> str:
        """Return a table for people."""
        columns = [self.planned, *self.by_rank.values()]
        heads = ["planned", *(f"rank {rank:,}" for rank in self.by_rank)]
        rows = [self.title, "", f"  {'':<42}" + "".join(f"{head:>14}" for head in heads)]
        for label, key, form in _LINES:
            numbers = [
                "" if key not in each else form.format(each[key]) if form else size(each[key])
                for each in columns
            ]
            rows.append(f"  {label:<42}" + "".join(f"{number:>14}" for number in numbers))
        return "\n".join([*rows, "", f"  {_NOTE}"])


def rehearse(config: Config, num_ranks: int, num_samples: int | None = None) -> Rehearsal:
    """Rehearse the first, the middle and the last of `num_ranks` ranks in forward passes from the
    middle of an epoch.

    `num_samples` as in `plan`. Leaves the process as it was, without a process group.

    Raises:
        InputError: the config cannot be run so, or a rank's state does not fit into free memory.
    """
    if num_ranks < 1:
        raise InputError(f"--rehearse={num_ranks} must be at least 1: it is the number of ranks")
    config.check_collect()
    config = config.model_copy(update={"prune": Prune()})  # the collection is rehearsed
    case = Case(config, read_images(config, num_samples), num_ranks)
    _check_memory(case)
    order = _order(case, blocks := _block_rows(config, num_samples))
    num_steps = order.num_steps
    exchanges = _exchanges(num_steps, case.route_every)
    ranks = sorted({0, num_ranks // 2, num_ranks - 1})
    arriving = _arriving(order, ranks, num_ranks, exchanges)
    del order
    by_rank, plans, there = {}, {}, {*threading.enumerate()}
    for rank in ranks:
        with collectives.fake_session(rank, num_ranks) as world:
            by_rank[rank], tensors = _rehearse(
                case, world, _order(case, blocks), exchanges, arriving[rank]
            )
            plans[rank] = plan_of_rank(tensors, world)
            del tensors
        _end_threads(there)
    for rank, num_bytes in planned_bytes(plans, num_ranks).items():
        by_rank[rank]["checkpoint_bytes"] = num_bytes
    first, end = exchanges[0][0], exchanges[-1][-1] + 1
    planned = {
        "all_to_alls_per_pass": 1 / len(exchanges[0]),
        "others_per_pass": 0,
        "sent_bytes_per_pass": network_lines(case)[0].value or 0,
        "state_bytes": sum(
            memory.scorer_bytes(config, case.images.num_samples, num_ranks).values()
        ),
        "checkpoint_bytes": memory.share_bytes(
            config, case.network, case.images.num_samples, num_ranks
        ),
    }
    title = (
        f"rehearsal of {config.run.name} on {num_ranks:,} ranks, {case.rows} rows each: forward"
        f" passes {first:,} to {end - 1:,} of an epoch of {num_steps:,}, {len(exchanges[0])} to an"
        " all-to-all"
    )
    return Rehearsal(title, num_ranks, end - first, planned, by_rank)


def _block_rows(config: Config, num_samples: int | None) -> int | None:
    """Return the images of a block; None where each image is drawn by itself."""
    if config.data.order != "blocks":
        return None
    if num_samples is not None:
        raise InputError(
            f"--num-samples={num_samples} does not say the blocks of data.order=blocks, which"
            " data.train has; leave it out, or rehearse data.order=random"
        )
    from tdds_dist.data.loader import block_rows  # loads FFCV

    return block_rows(inspect_split(config, "train"))


def _order(case: Case, blocks: int | None = None) -> EpochOrder:
    return epoch_order(
        case.images.num_samples,
        case.rows * case.num_ranks,
        seed=case.config.run.seed,
        epoch=_EPOCH,
        block_rows=blocks,
    )


def _exchanges(num_steps: int, together: int) -> list[range]:
    """Return the steps of each all-to-all, from the middle of an epoch of `num_steps`."""
    num = max(MIN_EXCHANGES, -(-MIN_PASSES // together)) * together
    first = max(0, (num_steps - num) // 2)
    end = min(first + num, num_steps)
    return [range(step, min(step + together, end)) for step in range(first, end, together)]


def _arriving(
    order: EpochOrder, ranks: Sequence[int], num_ranks: int, exchanges: Sequence[range]
) -> dict[int, list[np.ndarray]]:
    """Return the global indices that each of `ranks` receives in each exchange, int64 [R]."""
    bounds = {rank: shard_bounds(order.num_samples, num_ranks, rank) for rank in ranks}
    found: dict[int, list[np.ndarray]] = {rank: [] for rank in ranks}
    for steps in exchanges:
        parts: dict[int, list[np.ndarray]] = {rank: [] for rank in ranks}
        for step in steps:
            index_G = order.of_rank(0, 1, step, step + 1)[1][0]
            for rank, (first, end) in bounds.items():
                own_B = index_G[rank::num_ranks]  # padding stays where it is
                parts[rank] += [
                    index_G[(index_G >= first) & (index_G < end)],
                    own_B[own_B == PADDING],
                ]
        for rank in ranks:
            found[rank].append(np.concatenate(parts[rank]))
    return found


def _rehearse(
    case: Case,
    world: World,
    order: EpochOrder,
    exchanges: Sequence[range],
    arriving: Sequence[np.ndarray],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Be one rank; return its numbers, and the tensors of its checkpoint."""
    config, num_samples = case.config, case.images.num_samples
    gc.collect()
    has_reset, before = host_memory.reset_peak(), host_memory.resident_bytes()
    scorer = build_scorer(config, num_samples, world.device)
    for table in scorer.state_dict().values():
        collectives.own_rows(table).add_(0)  # a page of zeros takes memory when it is written
    with_state = host_memory.resident_bytes()

    dtype = torch.float32 if case.network.logit_bytes == 4 else torch.bfloat16
    generator = torch.Generator().manual_seed(world.rank)
    logits_BC = torch.randn(case.rows, config.data.num_classes, generator=generator).to(dtype)
    waiting = iter(arriving)
    delivering = 0.0

    def deliver(received_RX: Tensor) -> None:
        nonlocal delivering
        started = time.thread_time()
        index_R = torch.from_numpy(next(waiting))
        assert len(index_R) == len(received_RX), "the split sizes do not follow the order"
        no_logits = torch.empty(len(index_R), 0, dtype=dtype)
        header_RX = pack(index_R, index_R % config.data.num_classes, no_logits).view(torch.uint8)
        received_RX.zero_()
        received_RX[:, : header_RX.shape[1]] = header_RX
        delivering += time.thread_time() - started

    scorer.epoch = _EPOCH
    scorer.expect(order, exchanges[0][0])
    seconds: dict[str, list[float]] = {"order": [], "record": []}
    with collectives.counted(deliver) as counts:
        for steps in exchanges:
            in_order, in_record, delivering = 0.0, 0.0, 0.0
            for step in steps:
                started = time.thread_time()
                sample_1B, index_1B = order.of_rank(world.rank, world.world_size, step, step + 1)
                index_B, sample_B = (torch.from_numpy(part[0]) for part in (index_1B, sample_1B))
                ordered = time.thread_time()
                scorer.record(index_B, logits_BC, sample_B % config.data.num_classes)
                in_order += ordered - started
                in_record += time.thread_time() - ordered
            seconds["order"].append(in_order / len(steps))
            seconds["record"].append((in_record - delivering) / len(steps))
    if len(exchanges) > 1:  # the first waits for its split sizes
        seconds = {name: values[1:] for name, values in seconds.items()}
    started = time.thread_time()
    SplitSizes(order, world.rank, world.world_size, num_samples).take(steps[0], steps[-1] + 1, 0)
    seconds["split_sizes"] = [(time.thread_time() - started) / len(steps)]
    num_passes, num_exchanges = sum(map(len, exchanges)), counts["all_to_all_single"]
    assert num_exchanges == len(exchanges), (num_exchanges, len(exchanges))
    observed = scorer.state_dict()  # would say which rows are not of this shard
    numbers = {
        "all_to_alls_per_pass": num_exchanges / num_passes,
        "others_per_pass": sum(
            counts[name] for name in collectives.COLLECTIVES if name != "all_to_all_single"
        )
        / num_passes,
        "messages_per_pass": counts["messages"] / num_passes,
        "messages_per_exchange": counts["messages"] / num_exchanges,
        "sent_bytes_per_pass": counts["sent"] / num_passes,
        "sent_bytes_per_exchange": counts["sent"] / num_exchanges,
        "state_bytes": scorer.state_bytes(),
        "resident_bytes_before": before,
        "resident_bytes_with_state": with_state,
        "resident_bytes_at_most": host_memory.peak_bytes(has_reset),
        **{f"{name}_ms": 1e3 * median(values) for name, values in seconds.items()},
    }
    return numbers, _tensors(config, observed, world)


def _tensors(config: Config, observed: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint; those of network and optimizer are shapes only."""
    model = build_on_meta(
        config.model.name, config.data.num_classes, cifar_stem=config.model.cifar_stem
    )
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    replicas = cast(Replicas, SimpleNamespace(module=model))
    return tensors_of(replicas, optimizer, observed, torch.zeros(3, dtype=torch.float64), world)


def _check_memory(case: Case) -> None:
    """Raise InputError where the state of a rank does not fit, with a number of ranks at which it
    does."""

    def needed(case: Case) -> int:
        return sum(
            memory.scorer_bytes(case.config, case.images.num_samples, case.num_ranks).values()
        ) + memory.recording_bytes(
            case.rows,
            case.config.data.num_classes,
            case.network.logit_bytes,
            case.config.score.storage,
            case.route_every,
        )

    free, num_ranks = available_bytes(), case.num_ranks
    if needed(case) <= free:
        return
    rows, way = case.rows * case.config.train.accumulation, ""
    while not way and num_ranks < case.images.num_samples:
        num_ranks *= 2
        larger = case.with_config("train", global_batch_size=rows * num_ranks)
        if (less := needed(replace(larger, num_ranks=num_ranks))) <= free:
            way = (
                f"more ranks (--rehearse {num_ranks} train.global_batch_size={rows * num_ranks}:"
                f" {size(less)}), or "
            )
    raise InputError(
        f"--rehearse={case.num_ranks}: a rank's state and the rows on their way take"
        f" {size(needed(case))}, more than the {size(free)} of memory that are free here; rehearse"
        f" {way}on a machine with more memory"
    )


def _end_threads(others: set[threading.Thread]) -> None:
    """Wait for the threads that compute split sizes of steps that do not come: what they hold would
    count as the next rank's."""
    gc.collect()
    for thread in {*threading.enumerate()} - others:
        thread.join()
