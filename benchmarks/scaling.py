"""How recording grows with ranks and samples: bytes and time of routing measured on this machine,
and a model on paper beyond.

Measured, with `ShardedScorer` alone (no network, made-up outputs, gloo on one machine):
* bytes that a rank hands to the all-to-all of a step, against B (C x bytes of a logit + 16), what
  of it leaves the rank and in how many messages, and the number of collectives: counted at
  torch.distributed, in every step of the last epoch;
* time of `record` per step, the part of it spent waiting for rows, the exchange alone, `expect` and
  `end_epoch`. With more ranks than cores these say what an oversubscribed machine does; they are no
  forecast of a cluster, and the model does not use them;
* time and memory of an epoch's order and split sizes, which every rank computes for itself, step by
  step.

Modelled: everything under that heading, from arithmetic and the assumptions that the page lists
(options change them). Not measured: NCCL, networks between machines, and what a network's backward
pass hides.

    python -m benchmarks.scaling
"""

# B rows per rank and step, C classes, G global batch, N samples, S steps, W ranks

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import files
from benchmarks.ranks import run_on_ranks
from tdds_dist.config.scores import Window
from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.collectives import COLLECTIVES
from tdds_dist.distributed.host_memory import peak_bytes, reset_peak
from tdds_dist.distributed.partition import epoch_order, routing_counts
from tdds_dist.errors import InputError
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.scorer import ShardedScorer, steps_together

DTYPES = {"float32": torch.float32, "float16": torch.float16}
HEADER_BYTES = 16  # global index and label of a row
LOGIT_SCALE = 3.0
NUM_BATCHES = 4  # distinct batches of outputs
NUM_ORDER_STEPS = 20  # of an order that are timed
MODELLED = (
    (8, 1_281_167, 1000),
    (64, 1_281_167, 1000),
    (64, 14_200_000, 21_841),
    (256, 100_000_000, 1000),
    (1024, 1_000_000_000, 1000),
)  # ranks, samples, classes


@dataclass(frozen=True)
class Setting:
    """What the ranks record; `rows` is B."""

    num_classes: int
    logits: str
    rows: int
    steps: int
    epochs: int

    @property
    def window(self) -> Window:
        return Window(self.epochs, min(10, self.epochs))

    def num_samples(self, world_size: int) -> int:
        """The last step is one row short, so padding is there as well."""
        return world_size * self.rows * self.steps - 1


def payload_bytes(rows: int, num_classes: int, logit_bytes: int) -> int:
    """Return what a rank hands to a step's all-to-all: index, label and logits of its rows, its own
    shard's among them."""
    return rows * (num_classes * logit_bytes + HEADER_BYTES)


def row_bytes(num_classes: int, logp_bytes: int, window: Window) -> int:
    """State per sample in preset `official`, one window: log-probabilities, scalars, label, three
    marks, ring and average."""
    return num_classes * logp_bytes + 4 * len(SCALARS) + 8 + 4 + 4 + 4 + 4 * (window.K - 1) + 4


# ---- measured


@contextmanager
def _waits() -> Iterator[list[float]]:
    """List the seconds that exchanged rows are waited for."""
    seconds: list[float] = []

    def waiting(exchange: collectives.Exchange, real: Any = collectives.Exchange.wait) -> Any:
        started = time.perf_counter()
        received = real(exchange)
        seconds.append(time.perf_counter() - started)
        return received

    with mock.patch.object(collectives.Exchange, "wait", waiting):
        yield seconds


def record_epochs(settings: list[Setting]) -> list[dict[str, Any]]:
    """On one rank, for each setting: counts per step and seconds by epoch, without the first."""
    with distributed.session("cpu") as world:
        return [_record(setting, world) for setting in settings]


def _record(setting: Setting, world: distributed.World) -> dict[str, Any]:
    num_samples = setting.num_samples(world.world_size)
    scorer = ShardedScorer(num_samples, setting.num_classes, [setting.window], "official", "cpu")
    generator = torch.Generator().manual_seed(world.rank)
    logits_PBC = (
        torch.randn((NUM_BATCHES, setting.rows, setting.num_classes), generator=generator)
        * LOGIT_SCALE
    )
    logits_PBC = logits_PBC.to(DTYPES[setting.logits])
    steps: dict[str, int] = {}
    at_end: dict[str, int] = {}
    per_epoch: dict[str, list[float]] = {
        name: [] for name in ("expect", "record", "wait", "end_epoch", "exchange")
    }
    for epoch in range(setting.epochs):
        order = epoch_order(num_samples, world.world_size * setting.rows, epoch=epoch)
        dealt = order.of_rank(world.rank, world.world_size)
        sample_SB, index_SB = (torch.from_numpy(np.ascontiguousarray(part_SB)) for part_SB in dealt)
        dist.barrier()
        started = time.perf_counter()
        scorer.expect(order)
        expected = time.perf_counter()
        with collectives.counted() as counts, _waits() as waits:
            for step in range(setting.steps):
                scorer.record(
                    index_SB[step],
                    logits_PBC[step % NUM_BATCHES],
                    sample_SB[step] % setting.num_classes,
                )
            recorded, waited = time.perf_counter(), sum(waits)
            names = (*COLLECTIVES, "bytes", "sent", "messages")
            steps = {name: counts[name] for name in names}
            scorer.end_epoch()
            at_end = {name: counts[name] - steps[name] for name in COLLECTIVES}
        ended = time.perf_counter()
        if epoch > 0:
            found = {
                "expect": expected - started,
                "record": recorded - expected,
                "wait": waited,
                "end_epoch": ended - recorded,
                "exchange": _exchange_alone(setting, world, order),
            }
            for name, value in found.items():
                per_epoch[name].append(value)
    return {
        "steps": steps,
        "at_epoch_end": at_end,
        "seconds": per_epoch,
        "state_bytes": scorer.state_bytes(),
    }


def _exchange_alone(setting: Setting, world: distributed.World, order: Any) -> float:
    """Seconds to send the rows of an epoch and wait for each step's, doing nothing else."""
    sends_SW, receives_SW = routing_counts(
        order, world.rank, world.world_size, setting.num_samples(world.world_size)
    )
    row = payload_bytes(1, setting.num_classes, DTYPES[setting.logits].itemsize)
    payload_BX = torch.zeros(setting.rows, row, dtype=torch.uint8)
    dist.barrier()
    started = time.perf_counter()
    for sends, receives in zip(sends_SW.tolist(), receives_SW.tolist(), strict=True):
        collectives.exchange_rows(payload_BX, sends, receives).wait()
    return time.perf_counter() - started


def measure_order(num_samples: int, global_batch: int, world_size: int) -> dict[str, float]:
    """Seconds and bytes of an epoch's order and split sizes for one rank, in this process, that
    begins in the middle of the epoch."""
    routing_counts(epoch_order(1000, 100), 0, 2, 1000)
    gc.collect()
    has_reset = reset_peak()
    memory, started = peak_bytes(has_reset), time.perf_counter()
    order = epoch_order(num_samples, global_batch, epoch=1)
    first = min(order.num_steps // 2, order.num_steps - 1)
    order.of_rank(0, world_size, first, first + 1)
    begin_seconds = time.perf_counter() - started
    own, counts = [], []
    for step in range(first, min(first + NUM_ORDER_STEPS, order.num_steps)):
        started = time.perf_counter()
        order.of_rank(0, world_size, step, step + 1)
        dealt = time.perf_counter()
        routing_counts(order, 0, world_size, num_samples, None, step, step + 1)
        own.append(dealt - started)
        counts.append(time.perf_counter() - dealt)
    return {
        "begin_seconds": begin_seconds,
        "own_seconds": statistics.median(own),
        "counts_seconds": statistics.median(counts),
        "peak_bytes": peak_bytes(has_reset) - memory,
    }


# ---- modelled


@dataclass(frozen=True)
class Assumptions:
    """What the model is told. Bandwidths are per rank and direction."""

    rows: int  # B
    logit_bytes: int
    logp_bytes: int
    node_ranks: int
    node_gb_per_s: float
    network_gb_per_s: float
    call_us: float
    node_message_us: float
    network_message_us: float
    step_ms: float


def model(
    world_size: int, num_samples: int, num_classes: int, given: Assumptions, together: int = 1
) -> dict[str, float]:
    """Bytes and seconds of one rank, by arithmetic; rows of `together` steps travel at once.

    Owners of a batch's rows are uniform over ranks. An exchange costs one call, the messages one
    after the other (nothing overlaps: pessimistic) and the bytes over each kind of link. With B
    rows for W ranks, a share (1 - 1/W)^(B together) of its messages is empty.
    """
    window = Window(30, 10)
    row = payload_bytes(1, num_classes, given.logit_bytes)
    rows_per_peer = given.rows / world_size
    in_node = min(given.node_ranks, world_size)
    node_peers, network_peers = in_node - 1, world_size - in_node
    is_sent = 1.0 - (1.0 - 1.0 / world_size) ** (given.rows * together)
    node_bytes, network_bytes = (
        peers * rows_per_peer * row for peers in (node_peers, network_peers)
    )
    messages = (node_peers + network_peers) * is_sent / together
    seconds = (1e-6 / together) * (
        given.call_us
        + is_sent * (node_peers * given.node_message_us + network_peers * given.network_message_us)
    )
    seconds += node_bytes / (1e9 * given.node_gb_per_s) + network_bytes / (
        1e9 * given.network_gb_per_s
    )
    shard = -(-num_samples // world_size)
    state = shard * row_bytes(num_classes, given.logp_bytes, window)
    steps = -(-num_samples // (given.rows * world_size))
    return {
        "world_size": world_size,
        "num_samples": num_samples,
        "num_classes": num_classes,
        "steps": steps,
        "together": together,
        "state_bytes": state,
        "step_bytes": given.rows * row,
        "sent_bytes": node_bytes + network_bytes,
        "network_bytes": network_bytes,
        "pair_bytes": rows_per_peer * row * together,
        "messages": messages,
        "step_seconds": seconds,
        "share_of_step": seconds / (1e-3 * given.step_ms),
        "checkpoint_bytes": num_samples * row_bytes(num_classes, given.logp_bytes, window),
    }


# ---- the program


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, with metrics and provenance."""
    where = files.provenance(max(options.ranks), "cpu", 1)
    settings = [
        Setting(num_classes, logits, options.rows, options.steps, 1 + options.repetitions)
        for num_classes in options.num_classes
        for logits in options.logits
    ]
    rows = []
    metrics: dict[str, Any] = {}
    for world_size in options.ranks:
        by_rank = run_on_ranks(world_size, record_epochs, settings, threads=1)
        for number, setting in enumerate(settings):
            rows.append(
                _summary(setting, world_size, [found[number] for found in by_rank], metrics)
            )
        print(f"{world_size} ranks: done", file=sys.stderr)
    orders = []
    for num_samples in options.orders:
        for world_size in options.order_ranks:
            found = [
                run_on_ranks(1, measure_order, num_samples, options.rows * world_size, world_size)[
                    0
                ]
                for _ in range(options.repetitions)
            ]
            order = {name: statistics.median(run[name] for run in found) for name in found[0]}
            orders.append({"num_samples": num_samples, "world_size": world_size} | order)
            label = f"order N={num_samples:,} W={world_size}"
            for name in ("begin", "own", "counts"):
                seconds = [run[f"{name}_seconds"] for run in found]
                metrics[f"{label}, {name}, s"] = files.metric(seconds, "s", "lower")
            peaks = [run["peak_bytes"] for run in found]
            metrics[f"{label}, peak bytes"] = files.metric(peaks, "bytes", "lower", relative=True)
    given = assumptions(options)
    return {
        "benchmark": "scaling",
        "repetitions": options.repetitions,
        "warm_up": "the first epoch of each setting",
        "settings": {
            name: getattr(options, name)
            for name in (
                "ranks",
                "num_classes",
                "logits",
                "rows",
                "steps",
                "orders",
                "order_ranks",
            )
        },
        "metrics": metrics,
        "rows": rows,
        "orders": orders,
        "assumptions": asdict(given),
        "modelled": [
            model(*case, given, together)
            for case in MODELLED
            for together in dict.fromkeys((1, steps_together(case[0], given.rows, case[2])))
        ],
        "provenance": where,
    }


def _summary(
    setting: Setting, world_size: int, by_rank: list[dict[str, Any]], metrics: dict[str, Any]
) -> dict[str, Any]:
    """Means over ranks, of steps and of each repetition's seconds; bytes are those of the busiest
    rank. Adds to `metrics`."""
    logit_bytes = DTYPES[setting.logits].itemsize
    formula = payload_bytes(setting.rows, setting.num_classes, logit_bytes)
    handed = max(found["steps"]["bytes"] for found in by_rank) / setting.steps
    sent, messages = (
        statistics.mean(found["steps"][name] / setting.steps for found in by_rank)
        for name in ("sent", "messages")
    )
    seconds = {
        name: [
            statistics.mean(values)
            for values in zip(*(found["seconds"][name] for found in by_rank), strict=True)
        ]
        for name in by_rank[0]["seconds"]
    }
    label = f"W={world_size} C={setting.num_classes:,} {setting.logits}"
    metrics[f"{label}, bytes per step over formula"] = files.metric(
        [handed / formula], "x", "lower", relative=True
    )
    for name in ("record", "wait", "exchange"):
        metrics[f"{label}, {name}, ms per step"] = files.metric(
            [1e3 * value / setting.steps for value in seconds[name]], "ms", "lower"
        )
    shard = -(-setting.num_samples(world_size) // world_size)
    return asdict(setting) | {
        "world_size": world_size,
        "bytes_per_step": handed,
        "formula_bytes": formula,
        "sent_bytes": sent,
        "messages": messages,
        "seconds": seconds,
        "calls_per_step": {
            name: max(found["steps"][name] for found in by_rank) / setting.steps
            for name in COLLECTIVES
        },
        "calls_at_epoch_end": {
            name: max(found["at_epoch_end"][name] for found in by_rank) for name in COLLECTIVES
        },
        "state_bytes": by_rank[0]["state_bytes"],
        "modelled_state_bytes": shard * row_bytes(setting.num_classes, 4, setting.window),
    }


def assumptions(options: argparse.Namespace) -> Assumptions:
    """Those of the command line."""
    return Assumptions(
        options.model_rows,
        options.logit_bytes,
        options.logp_bytes,
        options.node_ranks,
        options.node_gb_per_s,
        options.network_gb_per_s,
        options.call_us,
        options.node_message_us,
        options.network_message_us,
        options.step_ms,
    )


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    given, where = result["assumptions"], result["provenance"]
    routing = [
        [
            "ranks",
            "classes",
            "logits",
            "bytes per step",
            "of formula",
            "to others",
            "messages",
            "all-to-all",
            "other",
            "record, ms",
            "waiting",
            "exchange alone, ms",
            "expect, ms",
            "end_epoch, ms",
            "its collectives",
        ]
    ]
    for row in result["rows"]:
        median = {name: 1e3 * statistics.median(values) for name, values in row["seconds"].items()}
        calls = row["calls_per_step"]
        routing.append(
            [
                str(row["world_size"]),
                f"{row['num_classes']:,}",
                row["logits"],
                f"{row['bytes_per_step']:,.0f}",
                f"{row['bytes_per_step'] / row['formula_bytes']:.3f}",
                f"{row['sent_bytes']:,.0f}",
                f"{row['messages']:.1f}",
                f"{calls['all_to_all_single']:.2f}",
                f"{sum(calls.values()) - calls['all_to_all_single']:.2f}",
                f"{median['record'] / row['steps']:.2f}",
                f"{median['wait'] / median['record']:.0%}",
                f"{median['exchange'] / row['steps']:.2f}",
                f"{median['expect']:.1f}",
                f"{median['end_epoch']:.1f}",
                str(sum(row["calls_at_epoch_end"].values())),
            ]
        )
    orders = [["samples", "ranks", "begin, s", "own rows, ms", "split sizes, ms", "peak, MB"]]
    orders += [
        [
            f"{order['num_samples']:,}",
            f"{order['world_size']:,}",
            f"{order['begin_seconds']:.2f}",
            f"{1e3 * order['own_seconds']:.2f}",
            f"{1e3 * order['counts_seconds']:.2f}",
            f"{order['peak_bytes'] / 1e6:,.0f}",
        ]
        for order in result["orders"]
    ]
    modelled = [
        [
            "ranks",
            "samples",
            "classes",
            "steps together",
            "state per rank, GB",
            "sent per step, kB",
            "off the node, kB",
            "per pair, bytes",
            "messages",
            "step, ms",
            "of a step",
            "checkpoint, GB",
        ]
    ]
    modelled += [
        [
            f"{case['world_size']:,}",
            f"{case['num_samples']:,}",
            f"{case['num_classes']:,}",
            str(case["together"]),
            f"{case['state_bytes'] / 1e9:.2f}",
            f"{case['sent_bytes'] / 1e3:,.0f}",
            f"{case['network_bytes'] / 1e3:,.0f}",
            f"{case['pair_bytes']:,.0f}",
            f"{case['messages']:,.1f}",
            f"{1e3 * case['step_seconds']:.2f}",
            f"{case['share_of_step']:.1%}",
            f"{case['checkpoint_bytes'] / 1e9:,.0f}",
        ]
        for case in result["modelled"]
    ]
    first, most = result["rows"][0], max(row["world_size"] for row in result["rows"])
    state = max(
        abs(row["state_bytes"] / row["modelled_state_bytes"] - 1.0) for row in result["rows"]
    )
    return "\n".join(
        [
            "# Recording on many ranks",
            "",
            "## Measured: routing on this machine",
            "",
            files.table(routing),
            "",
            (
                f"B = {first['rows']} rows per rank, {first['steps']} steps per epoch, gloo, one"
                f" thread per rank, {where['num_cpus']} CPUs for up to {most} ranks. Times are"
                f" medians of {result['repetitions']} epochs after one, per step as the mean over"
                " ranks. Formula: B (C x bytes of a logit + 16), the rank's own rows among them;"
                " `to others` is what leaves the rank. Calls per step: one all-to-all and no other"
                " collective (the order was announced by `expect`). `waiting` is the share of"
                " `record` spent on rows of other ranks; the exchange alone sends the same rows"
                " and does nothing else."
            ),
            "",
            "## Measured: the order of an epoch, on the host, by every rank",
            "",
            files.table(orders),
            "",
            (
                "`begin`: from nothing to the rows of a step in the middle of the epoch, once per"
                " epoch in the thread that decodes. Then, for every step: the rows of this rank in"
                " that thread, and the split sizes of the exchange (from the rows of all ranks:"
                f" {result['settings']['rows']} each) in another, a group of steps ahead of need."
                " Up to 16.8 million samples the order is a permutation that is kept; beyond, a"
                " bijection, of which nothing is kept."
            ),
            "",
            "## Modelled, not measured",
            "",
            files.table(modelled),
            "",
            (
                f"Arithmetic: B = {given['rows']}, {given['logit_bytes']}-byte logits,"
                f" log-probabilities of {given['logp_bytes']} bytes, one window of K = 10; state as"
                f" allocated (its formula is within {state:.2%} of what the runs above allocated)."
                " Owners of a batch are uniform over ranks. The rows of one step travel at once, or"
                " those of as many as `score.route_every` chooses. Time of an exchange: one call"
                f" ({given['call_us']:g} us), then its messages one after the other"
                f" ({given['node_message_us']:g} us within a node of {given['node_ranks']},"
                f" {given['network_message_us']:g} us beyond), then the bytes at"
                f" {given['node_gb_per_s']:g} GB/s within and {given['network_gb_per_s']:g} GB/s"
                " beyond the node, per rank and direction; a step has its share of it. Nothing"
                " overlaps, no two ranks share a link, and none of it is hidden behind backward."
                f" `of a step`: of {given['step_ms']:g} ms of training. Where there are more ranks"
                " than rows in an exchange, most messages are empty, and the number of the others"
                " sets the time, not their bytes. Memory of the network and its activations is not"
                " in it."
            ),
            "",
            (
                "Where the assumptions come from: 450 GB/s is one direction of NVLink's 900 on H100"
                " and H200 (secondary source); 3.6 us is an NCCL kernel at 1 KB on four H800"
                " (github.com/NVIDIA/nccl/issues/1984); 130 us is the fastest 0.5 MB all-reduce"
                " seen from PyTorch on eight H100, whose mean was 300 us"
                " (github.com/IBM/pytorch-communication-benchmarks/issues/1). 50 GB/s and 10 us"
                " between nodes (one 400 Gbit/s adapter per GPU) and the step time are assumed,"
                " with no source. No all-to-all of this size has been found measured."
            ),
            "",
            files.provenance_line(result),
            "",
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Routing over ranks, measured and modelled.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        metavar="W",
        help="gloo ranks to measure",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        nargs="+",
        default=[100, 1000],
        metavar="C",
        help="classes to measure",
    )
    parser.add_argument(
        "--logits",
        choices=tuple(DTYPES),
        nargs="+",
        default=list(DTYPES),
        help="precisions to measure",
    )
    parser.add_argument("--rows", type=int, default=256, metavar="B", help="rows per rank and step")
    parser.add_argument("--steps", type=int, default=24, metavar="S", help="steps of an epoch")
    parser.add_argument(
        "--repetitions",
        type=int,
        default=3,
        metavar="R",
        help="epochs, after one that is not counted",
    )
    parser.add_argument(
        "--orders",
        type=int,
        nargs="+",
        default=[1_281_167, 14_197_122, 10**9],
        metavar="N",
        help="orders to measure",
    )
    parser.add_argument(
        "--order-ranks",
        type=int,
        nargs="+",
        default=[8, 1024],
        metavar="W",
        help="ranks of those orders",
    )
    told = parser.add_argument_group("assumptions of the model")
    told.add_argument(
        "--model-rows", type=int, default=256, metavar="B", help="rows per rank and step"
    )
    told.add_argument(
        "--logit-bytes", type=int, default=2, metavar="BYTES", help="of a logit; autocast gives 2"
    )
    told.add_argument(
        "--logp-bytes", type=int, default=4, metavar="BYTES", help="of a stored log-probability"
    )
    told.add_argument("--node-ranks", type=int, default=8, metavar="W", help="ranks of a node")
    told.add_argument(
        "--node-gb-per-s", type=float, default=450.0, metavar="GB/S", help="per rank, within a node"
    )
    told.add_argument(
        "--network-gb-per-s",
        type=float,
        default=50.0,
        metavar="GB/S",
        help="per rank, between nodes",
    )
    told.add_argument(
        "--call-us",
        type=float,
        default=130.0,
        metavar="US",
        help="of a collective, whatever it sends",
    )
    told.add_argument(
        "--node-message-us",
        type=float,
        default=3.6,
        metavar="US",
        help="of a message within a node",
    )
    told.add_argument(
        "--network-message-us",
        type=float,
        default=10.0,
        metavar="US",
        help="of a message between nodes",
    )
    told.add_argument(
        "--step-ms", type=float, default=35.0, metavar="MS", help="of training without recording"
    )
    files.add_options(parser, "scaling")
    return parser


def check(options: argparse.Namespace) -> None:
    """InputError for what cannot be measured or modelled."""
    least = {
        "ranks": 1,
        "num_classes": 2,
        "rows": 1,
        "steps": 2,
        "repetitions": 1,
        "orders": 1,
        "order_ranks": 1,
        "model_rows": 1,
        "logit_bytes": 1,
        "logp_bytes": 1,
        "node_ranks": 1,
    }
    for name, bound in least.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < bound:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least {bound}")
    for name in (
        "node_gb_per_s",
        "network_gb_per_s",
        "call_us",
        "node_message_us",
        "network_message_us",
        "step_ms",
    ):
        value = getattr(options, name)
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} {value} must be a number above 0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, model, print, write JSON and Markdown; returns the exit code."""
    return files.run("scaling", build_parser().parse_args(arguments), check, measure, as_markdown)


if __name__ == "__main__":
    sys.exit(main())
