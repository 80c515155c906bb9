"""`tdds plan`: every number against the real thing, and every way out of a refusal taken."""

import itertools
import json
import math
import re
import shutil
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tdds_dist import ShardedScorer
from tdds_dist.cli.main import main
from tdds_dist.config.grid import Pipeline
from tdds_dist.config.run import load_config
from tdds_dist.config.scores import Window
from tdds_dist.data.beton import inspect_beton
from tdds_dist.data.loader import BetonLoader, View
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed import host_memory
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import epoch_order, routing_counts, rows_per_shard
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.experiments import memory as footprint
from tdds_dist.experiments import needs as budget
from tdds_dist.experiments.forecast import _deals_out, parse_bytes, plan
from tdds_dist.experiments.grid import pipeline_cells
from tdds_dist.experiments.needs import Case, Images, list_trainings, size
from tdds_dist.runs.checkpoint import Checkpoints
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.scorer import WAITING_NUMBERS
from tdds_dist.training.build import InputStage, build_model, build_optimizer
from tdds_dist.training.collect import collect
from tdds_dist.training.final_pass import _ByClass
from tdds_dist.training.schedule import per_rank_batch
from tests.make import refused
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
IMAGENET = 1_281_167
CPU, GPU = ["run.device=cpu"], ["run.device=cuda"]


@pytest.fixture
def tiny(config_file):
    """The config of `conftest` with a network of torchvision, and overrides."""
    network = "model.name=shufflenet_v2_x0_5"
    return lambda *overrides: load_config(config_file, (network, *overrides))


def imagenet(*overrides, network="resnet34"):
    return load_config(ROOT / f"configs/imagenet_{network}.yaml", overrides)


def case_of(config, num_samples, num_ranks=1, **pipeline):
    """Without retrainings unless `pipeline` says of what."""
    asked = config.model_copy(update={"pipeline": Pipeline(**pipeline)})
    cells = tuple(pipeline_cells(asked)) if pipeline else ()
    return Case(config, Images(num_samples, "given", 100), num_ranks, cells)


def value(lines, label):
    (found,) = [line.value for line in lines if line.label == label]
    return found


def storage_bytes(tensors):
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def tables_of(scorer):
    """All tensors of a scorer, also those in what it consists of."""
    owners = [scorer, scorer._shard, scorer._shard.previous]
    items = [item for owner in owners for item in vars(owner).values()]
    return [item for item in items if isinstance(item, torch.Tensor)]


# ---- the scorer


ONE_WINDOW = "score.windows=[{T: 3, K: 2}]"
TWO_WINDOWS = "score.windows=[{T: 3, K: 3}, {T: 2, K: 2}]"
SAME_WINDOW_TWICE = (
    "score.windows=[{T: 3, K: 2, pruning_rates: [0.5]}, {T: 3, K: 2, pruning_rates: [0.8]}]"
)


@pytest.mark.parametrize(
    "overrides",
    [
        [ONE_WINDOW],
        [TWO_WINDOWS],
        [SAME_WINDOW_TWICE],
        [ONE_WINDOW, "score.preset=paper"],
        [TWO_WINDOWS, "score.logp_dtype=float16"],
        [ONE_WINDOW, "score.storage=topk:3"],
        [ONE_WINDOW, "score.storage=topk:9", "data.num_classes=40000", "score.logp_dtype=float16"],
        [ONE_WINDOW, "data.num_classes=257", "score.on_nan=quarantine"],
        [ONE_WINDOW, "prune.method=infobatch"],
    ],
)
@pytest.mark.parametrize(("num_samples", "world_size"), [(97, 1), (97, 3), (10, 3), (5, 4), (1, 1)])
def test_scorer_bytes_are_those_of_a_real_scorer(
    tiny, monkeypatch, overrides, num_samples, world_size
):
    config = tiny(*overrides)
    for rank in range(world_size):
        world = World(rank, rank, world_size, world_size, torch.device("cpu"))
        monkeypatch.setattr(distributed, "current_world", lambda device=None, world=world: world)
        scorer = ShardedScorer(
            num_samples,
            config.data.num_classes,
            config.windows(),
            config.score.preset,
            "cpu",
            logp_dtype=getattr(torch, config.score.logp_dtype),
            on_nan=config.score.on_nan,
            storage=config.score.storage,
            partial_epochs=config.prune.method != "none",
        )
        real = storage_bytes(tables_of(scorer))
        predicted = footprint.scorer_bytes(config, num_samples, world_size, rank)
        assert sum(predicted.values()) == real == scorer.state_bytes() + 3 * 8
        for name, tensors in {
            "previous log-probabilities": [*scorer._shard.previous.tables().values()],
            "ring of loss differences": [scorer._delta_KM],
            "averages over windows": [scorer._average_AM],
            "scalars of this epoch": [scorer._shard.scalars_MF],
        }.items():
            assert predicted[name] == storage_bytes(tensors)


def pending_bytes(rank, world_size, rows, num_classes, dtype):
    """Buffers of one routed step."""
    scorer = ShardedScorer(200, num_classes, [Window(3, 2)], device="cpu")
    index_B = torch.arange(rank, 200, world_size)[:rows]
    logits_BC = torch.zeros(rows, num_classes, dtype=dtype)
    scorer.record(index_B, logits_BC, torch.zeros(rows, dtype=torch.int64))
    exchange = scorer._pending[0]
    return exchange.sent_BX.nbytes, exchange.received_RX.nbytes


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_buffers_are_those_of_a_real_step(dtype):
    found = run_ranks(2, pending_bytes, 2, 12, 33, dtype)
    payload = footprint.payload_bytes(12, 33, dtype.itemsize)
    assert [sent for sent, _ in found] == [payload, payload]
    assert sum(received for _, received in found) == 2 * payload
    assert footprint.recording_bytes(12, 33, dtype.itemsize) > 2 * payload


@pytest.mark.parametrize("kind", ["dense", "topk"])
@pytest.mark.parametrize(
    ("rows", "num_classes", "together"),
    [(64, 1000, 1), (256, 100, 1), (1024, 10, 1), (24, 10, 1), (8, 9000, 1), (16, 1000, 5)],
)
def test_recording_takes_no_more_than_planned(rows, num_classes, together, kind):
    storage = kind if kind == "dense" else f"topk:{max(1, num_classes // 10)}"
    num_samples = rows * max(4 * together, 2 * WAITING_NUMBERS // (rows * num_classes))
    options = {"device": "cpu", "storage": storage, "route_every": together}
    scorer = ShardedScorer(num_samples, num_classes, [Window(3, 2)], **options)

    def batch(first):
        index_B = torch.arange(first, first + rows)
        return index_B, torch.randn(rows, num_classes), torch.zeros(rows, dtype=torch.int64)

    batches = [batch(first) for first in range(0, num_samples, rows)]
    for arguments in batches:
        scorer.record(*arguments)
    scorer.end_epoch()
    given = [tensor for arguments in batches for tensor in arguments]
    with footprint._Alive([*tables_of(scorer), *given]) as alive:
        for arguments in batches:
            scorer.record(*arguments)
        scorer._apply_pending()
    planned = footprint.recording_bytes(rows, num_classes, 4, storage, together)
    assert 0.7 * planned < alive.peak_bytes <= planned


# ---- the network


def network_and_batch(name, rows, image_size, device="cpu", num_classes=10):
    with torch.device(device):
        model = build_model(name, num_classes, channels_last=False)
        image = torch.zeros(rows, 3, image_size, image_size)
        return model, image, torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "rows", "image_size"),
    [("resnet18", 3, 64), ("shufflenet_v2_x0_5", 8, 32), ("swin_t", 2, 64)],
)
def test_activations_on_shapes_are_those_of_a_real_step(name, rows, image_size):
    saved, peak, output = footprint.step_bytes(*network_and_batch(name, rows, image_size))
    on_meta = footprint.step_bytes(*network_and_batch(name, rows, image_size, "meta"))
    assert on_meta[:2] == (saved, peak)
    assert on_meta[2].shape == output.shape
    assert peak > saved > rows * 3 * image_size**2 * 4


class Small(nn.Sequential):
    """8 -> 16 -> ReLU -> 4."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_mixed_precision_keeps_16_bits_for_backward():
    rows = 5
    image = torch.empty(rows, 8, device="meta")
    # the first layer's weight is not needed for backward
    kept = {"input": rows * 8, "relu": rows * 16, "weights": 16 * 4}
    plain = footprint._saved_on_cuda(Small().to("meta"), image, amp=False)
    mixed = footprint._saved_on_cuda(Small().to("meta"), image, amp=True)
    # the input is no activation, and weights lie in the parameters
    assert plain == (4 * kept["relu"], 4)
    assert mixed == (2 * sum(kept.values()), 2)
    assert not torch.is_autocast_enabled("cuda")


def test_on_cuda_dropout_keeps_a_byte_per_value(tiny):
    config = tiny("model.name=alexnet", "data.image_size=64", "train.global_batch_size=4")
    on_cpu = footprint.network_of(config, 4)
    on_gpu = footprint.network_of(tiny("model.name=alexnet", "data.image_size=64", *GPU), 4)
    assert on_cpu.activations - on_gpu.activations == 4 * (4096 + 9216) * 3
    assert on_cpu.parameters == on_gpu.parameters


@pytest.mark.parametrize(
    ("overrides", "per_parameter"),
    [([], 1), (["train.momentum=0.0", "train.nesterov=false"], 0), (["train.optimizer=adamw"], 2)],
)
def test_parameters_gradients_and_optimizer_state_are_those_after_a_real_step(
    tiny, overrides, per_parameter
):
    config = tiny(*overrides)
    model, image, label = network_and_batch(config.model.name, 4, 32)
    optimizer = build_optimizer(model, config)
    nn.functional.cross_entropy(model(image), label).backward()
    gradients = storage_bytes(parameter.grad for parameter in model.parameters())
    optimizer.step()
    items = [item for entry in optimizer.state.values() for item in entry.values()]
    state = storage_bytes(item for item in items if item is not None and item.ndim)
    network = footprint.network_of(config, 4)
    assert network.parameters == gradients == storage_bytes(model.parameters())
    assert network.buffers == storage_bytes(model.buffers())
    assert state == per_parameter * gradients
    assert footprint.optimizer_bytes(config.train, network.parameters) == state
    lines = budget.memory_lines(case_of(config, 100))
    assert value(lines, "gradients") == value(lines, "parameters") == gradients
    assert value(lines, "optimizer state") == state
    whole_batch = torch.zeros(24, 3, 32, 32, dtype=torch.uint8)
    normalised = InputStage((0.0,) * 3, (1.0,) * 3, channels_last=True)(whole_batch)
    assert value(lines, "images of a batch") == normalised.nbytes + 2 * whole_batch.nbytes


def test_a_network_that_reads_numbers_while_it_is_built_gets_a_plan(tiny):
    found = plan(tiny("model.name=regnet_y_400mf", *GPU, "train.amp=bf16"), disk_bytes=1e12)
    real = build_model("regnet_y_400mf", 10, channels_last=False)
    numbers = found.as_json()["memory_per_rank"]
    assert numbers["parameters_bytes"] == storage_bytes(real.parameters())
    assert numbers["activations_kept_for_backward_bytes"] > 1e6


# ---- sums


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_memory_is_the_sum_of_its_lines(tiny, device):
    lines = budget.memory_lines(case_of(tiny(f"run.device={device}"), 50_000, 2))
    *parts, total = [line.value for line in lines]
    assert total == sum(parts)
    assert len(parts) == 14 + 2 * (device == "cuda")
    if device == "cuda":
        assert value(lines, "CUDA, NCCL, workspaces") == 1_000_000_000
        rest = total - value(lines, "margin") - 1_000_000_000
        assert value(lines, "margin") == math.ceil(0.05 * rest)
    else:
        assert "margin" not in [line.label for line in lines]
        # keeps good buffers
        good = budget.memory_lines(case_of(tiny("score.on_nan=quarantine"), 50_000, 2))
        assert value(good, "network's buffers") == 2 * value(lines, "network's buffers") > 0


def test_what_is_needed_outside_of_steps_counts_where_it_is_more(tiny):
    config = tiny("model.name=vgg11", "train.global_batch_size=2", "score.final_pass=false")
    lines = budget.memory_lines(case_of(config, 100))
    step = value(lines, "images of a batch") + value(lines, "activations kept for backward")
    step += value(lines, "work of forward and backward")
    step += value(lines, "routing buffers and recording")
    more = max(0, value(lines, "parameters") - step)
    assert value(lines, "more than that outside of steps") == more
    many = budget.memory_lines(case_of(tiny("train.global_batch_size=2"), 3_000_000))
    assert value(many, "more than that outside of steps") > 36 * 3_000_000
    # The final pass: 12 bytes per image of all ranks, where the others' state was.
    spread = budget.memory_lines(case_of(tiny("train.global_batch_size=256"), 30_000_000, 128))
    network = footprint.network_of(tiny(), 2)
    without = sum(footprint.scorer_bytes(tiny(), 30_000_000, 128).values())
    without += 2 * network.parameters + network.buffers
    assert value(spread, "more than that outside of steps") == 12 * 30_000_000 - without


def test_imagenet_numbers():
    lines = budget.memory_lines(case_of(imagenet(), IMAGENET, 8))
    assert round(lines[0].value / 1e6) == 641
    half = budget.memory_lines(case_of(imagenet("score.logp_dtype=float16"), IMAGENET, 8))
    assert round(value(half, "previous log-probabilities") / 1e6) == 320
    assert rows_per_shard(IMAGENET, 8) == 160_146


# ---- a real run


def collect_keeping_checkpoints(rank, config_file, overrides):
    """A collection whose checkpoints stay; returns the bytes that it allocates for copies of
    them."""
    Checkpoints.remove_all = lambda self: None
    staged, allocate, blocks = Checkpoints._staged, host_memory.allocate, []

    def look(sizes, device):
        pieces = allocate(sizes, device)
        blocks.append(pieces[0].base.nbytes)
        return pieces

    def with_a_look(self, tensors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_memory, "allocate", look)
            return staged(self, tensors)

    Checkpoints._staged = with_a_look
    collect(load_config(config_file, overrides), distributed.current_world("cpu"))
    (only,) = blocks  # kept from one checkpoint to the next
    return only


@pytest.fixture(scope="module")
def raw_config(betons, tmp_path_factory):
    """A config on raw images; run directory `run` beside it."""
    folder = tmp_path_factory.mktemp("planned")
    path = folder / "config.yaml"
    path.write_text(f"""
run: {{name: tiny, dir: {folder / "run"}, device: cpu}}
data: {{train: {betons["raw"]}, val: {betons["raw"]}, num_classes: 5, image_size: 32, crop: pad, padding: 2,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: shufflenet_v2_x0_5}}
train: {{epochs: 3, global_batch_size: 24, lr: 0.05}}
score: {{windows: [{{T: 3, K: 2, pruning_rates: [0.0, 0.5]}}, {{T: 2, K: 2, pruning_rates: [0.8]}}]}}
""")
    return path


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def collected(request, raw_config, tmp_path_factory):
    """A finished collection: its run directory, the number of ranks, and the most bytes that one
    copied to host memory."""
    run, num_ranks = tmp_path_factory.mktemp("collected") / "run", request.param
    arguments = str(raw_config), [f"run.dir={run}"]
    if num_ranks > 1:
        return run, num_ranks, max(run_ranks(num_ranks, collect_keeping_checkpoints, *arguments))
    with pytest.MonkeyPatch.context() as patch, distributed.session("cpu", 60.0):
        for name in ("remove_all", "_staged"):
            patch.setattr(Checkpoints, name, getattr(Checkpoints, name))  # put back afterwards
        staged = collect_keeping_checkpoints(0, *arguments)
    return run, num_ranks, staged


@pytest.mark.distributed
def test_files_of_a_real_run_are_as_large_as_planned(raw_config, collected):
    folder, num_ranks, staged = collected
    config = load_config(raw_config)
    case = Case(config, budget.read_images(config, None), num_ranks, tuple(pipeline_cells(config)))
    assert case.images.num_samples == 97
    lines = budget.disk_lines(case)
    blocks = list((folder / "trajectory").rglob("*.npy"))
    assert len(blocks) == num_ranks * (3 + 1)
    in_blocks = sum(block.stat().st_size for block in blocks) - 128 * len(blocks)
    assert in_blocks == value(lines, "trajectory")
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert len(checkpoints) == 2  # checkpoint.keep
    for checkpoint in checkpoints:
        real = sum(file.stat().st_size for file in checkpoint.iterdir())
        assert real == pytest.approx(value(lines, "checkpoints while collecting") / 3, rel=0.03)
    models = sum((folder / "models" / name).stat().st_size for name in ("final.pt", "best.pt"))
    assert models == pytest.approx(value(lines, "models"), rel=0.03)
    scores = list((folder / "scores").iterdir())
    headers = 2500 * len(scores) + 3 * 500  # three arrays more stand beside entropy
    assert sum(file.stat().st_size for file in scores) - value(lines, "scores") < headers
    assert 12 * 97 * (len(scores) + 1) == value(lines, "scores")
    copied = footprint.staged_bytes(config, case.network, 97, num_ranks) - 40_000_000
    # random numbers, sums of metrics, 64 bytes at the ends
    assert staged == pytest.approx(copied, abs=20_000)


def test_the_total_on_disk_is_what_lies_there_at_once(raw_config):
    config = load_config(raw_config)
    case = case_of(config, 0, 2, strategies=("E", "P"), seeds=(0, 1))
    case = replace(case, images=budget.read_images(config, None))
    lines = budget.disk_lines(case)
    get = partial(value, lines)
    assert get("models of retrainings") == 8 * get("models")
    assert get("coresets") == 4 * 12 * (97 - 48) + 4 * 12 * (97 - 78)
    collecting = get("checkpoints while collecting")
    retraining = get("coresets") + get("models of retrainings")
    retraining += get("checkpoints while retraining")
    always = get("trajectory") + get("scores") + get("models")
    assert lines[-1].value == always + max(collecting, retraining)
    few = budget.disk_lines(replace(case, cells=()))
    assert value(few, "checkpoints while retraining") == 0
    assert few[-1].value < lines[-1].value
    # takes the largest table to host memory, not all
    at_once = load_config(raw_config, ["checkpoint.asynchronous=false"])
    assert footprint.staged_bytes(at_once, footprint.network_of(at_once, 12), 97, 2) == 49 * 5 * 4


def test_every_rank_has_statistics_of_its_own_in_a_checkpoint(tiny):
    network = footprint.network_of(tiny(), 12)
    one, eight = (footprint.checkpoint_bytes(tiny(), network, 1000, num) for num in (1, 8))
    # random numbers and sums, and its rows of eight tables
    own_tensors = network.num_buffers + 2 + 8
    assert eight - one == 7 * (network.buffers + 5056 + own_tensors * footprint._TENSOR_FILE_BYTES)


def test_trajectory_and_checkpoint_follow_the_config(tiny):
    def planned(*overrides, num_samples=100_000):
        lines = budget.disk_lines(case_of(tiny(*overrides), num_samples))
        return value(lines, "trajectory"), value(lines, "checkpoints while collecting")

    plain, checkpoints = planned()
    assert plain == 100_000 * (3 * len(SCALARS) * 4 + 8)
    assert planned("score.trajectory_dtype=float16")[0] == 100_000 * (3 * len(SCALARS) * 2 + 8)
    assert planned("score.trajectory=false")[0] == 0
    assert planned("train.epochs=9")[0] == 100_000 * (9 * len(SCALARS) * 4 + 8)
    assert planned("train.epochs=9", "collect.stop_after=last_window")[0] == plain
    assert planned("checkpoint.keep=4")[1] == checkpoints / 3 * 5
    assert checkpoints - planned("score.logp_dtype=float16")[1] == 3 * 100_000 * 10 * 2
    # 10 float32 become 3 + 2 and 3 + 1 classes of 2 bytes, in one more table
    saved = 3 * (100_000 * (10 * 4 - 5 * 4 - 4 * 2) - footprint._TENSOR_FILE_BYTES)
    assert checkpoints - planned("score.storage=topk:3")[1] == saved


# ---- host memory


def test_index_of_the_images_is_what_loader_and_order_take(tmp_path):
    num_samples, path = 4_000, tmp_path / "many.beton"
    source = open_source(f"synthetic:{num_samples},10,8", "train", None)
    write_beton(source, path, write_mode="raw", num_workers=1, progress=False)
    view = View(8)
    BetonLoader(inspect_beton(path), 16, view)  # what is imported on the way does not count
    tracemalloc.start()
    kept = (inspect_beton(path), BetonLoader(inspect_beton(path), 16, view))  # noqa: F841
    order = epoch_order(num_samples, 256, seed=1)
    order.of_rank(0, 8, 0, 1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.85 < peak_bytes / num_samples / budget.INDEX_BYTES_PER_IMAGE <= 1.1


def test_host_memory(tiny, betons):
    config = tiny("data.num_workers=1")
    case = replace(case_of(config, 1000, 2), images=budget.read_images(config, None))
    lines = budget.host_lines(case)
    get = partial(value, lines)
    loader = BetonLoader(inspect_beton(betons["train"]), 12, View(32, "pad"))
    order = epoch_order(24, 24, shuffle=False)
    passes = [loader.batches(order, rank=0, world_size=2, epoch=epoch) for epoch in (0, 1)]
    ring = passes[0]._underway._ring
    buffers = ring.index_slots.base.nbytes + ring.scratch_WX.nbytes
    assert get("decoded batches") == pytest.approx(2 * buffers, abs=4 * 2 * 64)
    # an epoch after the other: both have some
    more = budget.host_lines(case.with_config("train", eval_every=2))
    assert value(more, "decoded batches") == 1.5 * get("decoded batches")
    assert passes[1]._underway._ring is not ring
    label_N = inspect_beton(betons["train"]).label_N
    worlds = [World(rank, rank, 2, 2, torch.device("cpu")) for rank in range(2)]
    most = max(len(_ByClass(label_N, world).index_M) for world in worlds)
    assert get("features of the final pass") == most * 1024 * 4
    assert get("memory of training") == budget.memory_lines(case)[-1].value
    always = "process", "index of the images", "decoded batches", "memory of training"
    more = max(get("checkpoint under way"), get("features of the final pass"))
    assert get("total") == sum(map(get, always)) + more
    on_gpu = budget.host_lines(case.with_config("run", device="cuda"))
    assert "memory of training" not in [line.label for line in on_gpu]
    without = budget.host_lines(case.with_config("score", final_pass=False))
    assert value(without, "features of the final pass") == 0


# ---- network, time


def test_bytes_over_the_network():
    alone, eight = (budget.network_lines(case_of(imagenet(), IMAGENET, num)) for num in (1, 8))
    assert [line.value for line in alone] == [0, 0]
    assert eight[0].value == 32 * (1000 * 2 + 16) * 7 // 8  # logits in bfloat16
    assert eight[1].value == round(2 * 7 / 8 * footprint.network_of(imagenet(), 32).parameters)
    plain = budget.network_lines(case_of(imagenet("train.amp=none"), IMAGENET, 8))
    assert plain[0].value == 32 * (1000 * 4 + 16) * 7 // 8


def test_expected_routing_is_that_of_real_orders():
    num_samples, batch, num_ranks = 5000, 40, 4
    sends_SW, _ = routing_counts(epoch_order(num_samples, batch, seed=0), 1, num_ranks, num_samples)
    others = sends_SW.sum() - sends_SW[:, 1].sum()
    expected = batch / num_ranks * (num_ranks - 1) / num_ranks
    assert others / len(sends_SW) == pytest.approx(expected, rel=0.05)


def test_trainings_follow_strategies_rates_and_seeds():
    pipeline = {"pruning_rates": (0.5, 0.9), "strategies": ("E", "P"), "seeds": (0, 1)}
    collection, *rest = list_trainings(case_of(imagenet(), IMAGENET, 8, **pipeline))
    assert (collection.num_images, collection.epochs) == (IMAGENET, 30)
    assert collection.global_batch_size == 256
    assert len(rest) == 8
    by_name = {training.name: training for training in rest}
    half, tenth = by_name["retrain p=0.5 E seed 1"], by_name["retrain p=0.9 P seed 0"]
    assert (half.num_images, half.epochs) == (640_583, 60)
    assert (tenth.epochs, tenth.global_batch_size) == (600, 64)
    assert tenth.images_seen == 600 * 128_117
    assert list_trainings(case_of(imagenet("collect.stop_after=schedule"), 100))[0].epochs == 90


def test_retrainings_are_those_of_the_pipeline(tiny):
    def names(*overrides, **more):
        return [training.name for training in plan(tiny(*overrides), **more).trainings]

    # p = 0 is served, and collected
    assert names() == ["collect", "retrain p=0.5 E", "retrain p=0.8 E"]
    assert names(strategies=["P"]) == ["collect", "retrain p=0.5 P", "retrain p=0.8 P"]
    assert names("pipeline.strategies=[P]") == names(strategies=["P"])
    scores, seeds = "pipeline.scores=[tdds, random]", "pipeline.seeds=[3, 5]"
    assert names(scores, "pipeline.pruning_rates=[0.7]", seeds) == [
        "collect",
        *(f"retrain {key} p=0.7 E seed {seed}" for seed in (3, 5) for key in ("tdds", "random")),
    ]


def test_hours_from_a_given_speed():
    given = {"num_samples": IMAGENET, "images_per_second": 10_000, "disk_bytes": 1e12}
    found = plan(imagenet(), num_ranks=8, **given).as_json()
    collection, *rest = found["trainings"]
    assert collection["hours"] == pytest.approx(IMAGENET * 30 / 10_000 / 3600)
    assert collection["rank_hours"] == pytest.approx(8 * collection["hours"])
    names = [f"retrain p={rate} E" for rate in (0.3, 0.5, 0.7, 0.8, 0.9)]
    assert [training["name"] for training in rest] == names
    assert found["run"]["steps_per_epoch"] == 5005
    assert found["run"]["rows_per_rank_and_forward_pass"] == 32


@pytest.mark.distributed
def test_hours_from_an_earlier_run(raw_config, collected):
    folder, num_ranks, _ = collected
    config = load_config(raw_config, [f"run.dir={folder}"])
    speeds = [record["images_per_second"] for record in RunDir(folder).read_metrics()]
    median = float(np.median(speeds))
    own = plan(config, num_ranks=num_ranks)
    given = plan(load_config(raw_config), num_ranks=2 * num_ranks, measured_in=folder)
    assert own.as_json()["time"]["images_per_second"] == pytest.approx(median)
    assert given.as_json()["time"]["images_per_second"] == pytest.approx(2 * median)
    assert f"times {2 * num_ranks} / {num_ranks} ranks" in given.as_text()
    assert "times" not in own.as_text().split("images per second")[1].split("\n")[0]
    other = load_config(raw_config, [f"run.dir={folder}", "model.name=resnet18"])
    measured = "was measured with model.name=shufflenet_v2_x0_5"
    refused(f"{measured}; give a run of this config", plan, other, measured_in=folder)
    text = plan(other).as_text()
    assert re.search(f"images per second +unknown +.*/run {measured}", text)


def test_without_a_speed_it_says_how_to_give_one(tiny):
    found = plan(tiny())
    give = "images per second +unknown +give --images-per-second X, or --from RUN"
    assert re.search(give, found.as_text())
    assert found.as_json()["trainings"][0]["hours"] is None


# ---- what it is about


ALEXNET = "model.name=alexnet data.image_size=16"
INCEPTION = "model.name=inception_v3 data.image_size=299"
BATCH, PER_STEP = "train.global_batch_size", "per rank and step"
ALONE, NOTHING = "1 images of 32x32", "means nothing with"
BAD_INPUT = [
    (ALEXNET, {}, f"alexnet cannot train on 24 images of 16x16 {PER_STEP}"),
    (f"{INCEPTION} train.global_batch_size=2", {"num_samples": 10}, "several outputs"),
    ("", {"images_per_second": 1.0, "measured_in": Path("x")}, "exclude each other"),
    *(("", {"images_per_second": x}, "must be positive") for x in (0.0, -1.0, math.inf, math.nan)),
    ("data.num_classes=11", {}, "data.num_classes=11, but .* has 10 classes"),
    ("data.train=a.beton", {}, "data.train=a.beton does not exist.*give --num-samples N"),
    *(("", {"num_samples": num}, "--num-samples") for num in (0, -1)),
    ("", {"num_ranks": 0}, "--gpus=0 must be at least 1"),
    ("train.epochs=2", {}, "T=3 is longer than train.epochs=2"),
    ("", {"num_ranks": 5}, f"{BATCH}=24 is not divisible by world_size=5; use 20 or 25"),
    # that of p = 0.8 is 12
    ("", {"num_ranks": 8}, r"x 0.5 \(retrain.batch_size_rule\) is not divisible by world_size=8"),
    ("", {"num_ranks": 12}, rf"cannot train on {ALONE} {PER_STEP} \(Expected more than 1 value"),
    ("run.device=cpu", {"gpu_memory_bytes": 8e9}, rf"--gpu-memory=\d+ {NOTHING} run.device=cpu"),
    ("run.device=cpu", {"disk_bytes": 1e4}, r"of disk, more than 10 kB \(--disk\)"),
    ("", {"measured_in": Path("nowhere")}, "nowhere does not exist"),
]


@pytest.mark.parametrize(("overrides", "arguments", "message"), BAD_INPUT)
def test_what_has_no_plan_is_one_line(tiny, overrides, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        plan(tiny(*overrides.split()), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "num_ranks"),
    [
        ("retrain.batch_size_rule={}", 8),
        ("pipeline.pruning_rates=[0.5]", 8),
        ("pipeline.pruning_rates=[0.5]", 12),
    ],
)
def test_what_the_retrainings_of_this_pipeline_need_is_all_that_is_asked(tiny, override, num_ranks):
    assert plan(tiny(override), num_ranks=num_ranks).num_ranks == num_ranks


def test_the_beton_says_the_number_of_images(tiny):
    assert plan(tiny()).as_json()["run"]["images"] == 120
    assert plan(tiny(), num_samples=77).as_json()["run"]["images"] == 77
    assert plan(tiny("data.train=missing.beton"), num_samples=7).as_json()["run"]["images"] == 7


@pytest.mark.parametrize(
    ("batch", "accumulation", "rates"),
    [(24, 1, (0.5, 0.8)), (48, 2, (0.9,)), (10, 1, ()), (7, 1, (0.8,))],
)
def test_the_short_test_of_batches_agrees_with_the_long_one(tiny, batch, accumulation, rates):
    config = tiny(f"train.global_batch_size={batch}", f"train.accumulation={accumulation}")
    for num_ranks in range(1, batch + 2):
        case = case_of(config, 100, num_ranks, pruning_rates=rates)
        try:
            list_trainings(case)
            fits = True
        except InputError:
            fits = False
        assert _deals_out(case) == fits, num_ranks
        if fits:
            assert case.rows == per_rank_batch(batch, num_ranks, accumulation)


# ---- refusals


def check_refusal(tiny, *overrides, **arguments):
    """None when it fits; else how an error names options, and these, after each was tried as it is
    typed."""
    try:
        plan(tiny(*overrides), **arguments)
        return None
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    kind, _, part = message.partition("; ")[2].partition(" ")
    if kind == "no":
        part, largest = part.split(" the largest part is ")
        assert re.search(r"^[a-zA-Z ,-]+ \([\d.]+ [kMGT]?B\)", largest)
        several = "option makes it fit alone, several may together: "
        kind = "together" if part.startswith(several) else "none"
        part = part.removeprefix(several)
    ways = re.findall(r"(score[^ ]+|--gpus \d+|train[^ ]+|checkpoint[^ ]+) \(([^()]+)\)", part)
    assert bool(ways) == (kind != "none"), message
    there_is = {} if kind == "use" else {"gpu_memory_bytes": 1e15, "disk_bytes": 1e15}
    for option, numbers in ways:
        name, _, num = option.partition(" ")
        gpus = {"num_ranks": int(num)} if name == "--gpus" else {}
        config = tiny(*overrides, *([] if gpus else [option]))
        found = plan(config, **arguments | there_is | gpus).as_json()
        planned = {"GPU": found["memory_per_rank"]["total_bytes"]}
        planned["disk"] = found["disk"]["total_when_fullest_bytes"]
        for number in numbers.split(", "):
            assert number.startswith(size(planned[number.split()[-1]]) + " "), (number, planned)
    return kind, [re.split("[= ]", option)[0] for option, _ in ways]


@pytest.mark.slow
def test_every_way_out_of_too_little_memory_fits(tiny):
    """Also the mildest: fewer GPUs or forward passes would not do."""
    named, outcomes = set(), {"fits": 0, "use": 0, "together": 0}
    for num_samples, num_ranks, memory, amp in itertools.product(
        (10_000, 400_000, 3_000_000),
        (1, 2, 4),
        (1.02e9, 1.24e9, 1.3e9, 1.6e9, 4e9),
        ("none", "bf16"),
    ):
        overrides = f"model.name=resnet18 data.image_size=96 train.global_batch_size=48 train.amp={amp} data.num_classes=400"
        given = {"num_ranks": num_ranks, "num_samples": num_samples, "disk_bytes": 1e13}
        given["gpu_memory_bytes"] = memory
        found = check_refusal(tiny, *GPU, *overrides.split(), **given)
        outcomes[found[0] if found else "fits"] += 1
        named.update(found[1] if found else [])
    assert named == {"score.logp_dtype", "--gpus", "train.accumulation", "train.amp"}
    assert min(outcomes.values()) >= 5, outcomes


def test_the_smallest_number_of_gpus_is_named(tiny):
    overrides = "model.name=resnet18 train.global_batch_size=48 data.num_classes=1000 retrain.batch_size_rule={}"
    config = tiny(*GPU, *overrides.split())
    arguments = {"num_samples": 3_000_000, "disk_bytes": 1e13}
    needs = {
        num: budget.memory_lines(case_of(config, 3_000_000, num))[-1].value
        for num in (1, 2, 3, 4, 6, 8, 12, 16, 24)
    }
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    for num, less in ((1, 2), (8, 12)):
        with pytest.raises(InputError) as caught:
            plan(config, gpu_memory_bytes=needs[num] - 1, **arguments)
        assert f"--gpus {less} (" in str(caught.value)
        # exactly enough is enough
        plan(config, num_ranks=num, gpu_memory_bytes=needs[num], **arguments)


@pytest.mark.slow
def test_a_batch_too_small_for_a_retraining_is_no_way_out(tiny):
    """On 12 GPUs the batch of p = 0.8 leaves one row each, of which batch norm knows no
    variance."""
    config = tiny(*GPU, "data.num_classes=1000")
    needs = {num: budget.memory_lines(case_of(config, 9_000_000, num))[-1].value for num in (8, 12)}
    arguments = {"num_ranks": 6, "num_samples": 9_000_000, "disk_bytes": 1e13}
    arguments["gpu_memory_bytes"] = sum(needs.values()) / 2
    with pytest.raises(InputError) as caught:
        plan(config, **arguments)
    assert "--gpus" not in str(caught.value)
    with pytest.raises(InputError, match="--gpus 12"):
        plan(tiny(*GPU, "data.num_classes=1000", "pipeline.pruning_rates=[0.5]"), **arguments)


def test_every_way_out_of_too_little_disk_fits(tiny):
    named, outcomes = set(), {"fits": 0, "use": 0, "together": 0}
    for num_samples, disk, keep, dtype in itertools.product(
        (1000, 1_000_000), (4e7, 4e8, 6e8, 7.5e8, 9e8, 1.2e9), (2, 5), ("float32", "float16")
    ):
        overrides = f"checkpoint.keep={keep} score.trajectory_dtype={dtype} train.epochs=12"
        given = {"num_samples": num_samples, "disk_bytes": disk}
        found = check_refusal(tiny, *GPU, *overrides.split(), **given)
        outcomes[found[0] if found else "fits"] += 1
        named.update(found[1] if found else [])
    ways = "score.trajectory_dtype score.trajectory checkpoint.keep score.logp_dtype"
    assert named == {*ways.split()}
    taken = "score.logp_dtype=float16", "score.trajectory=false"
    assert check_refusal(tiny, *GPU, *taken, disk_bytes=1e6) == ("none", [])
    assert min(outcomes.values()) >= 2, outcomes


def test_too_little_of_both_is_mended_together(tiny):
    windows = "score.windows=[{T: 3, K: 2, pruning_rates: [0.5]}]"
    overrides = [*GPU, "model.name=resnet18", "data.num_classes=1000", windows]
    arguments = {"num_samples": 1_000_000, "gpu_memory_bytes": 4e9, "disk_bytes": 12.2e9}
    both = r"[\d.]+ GB per GPU, more than 4 GB \(--gpu-memory\) and [\d.]+ GB of disk, m"
    refused(f"needs {both}", plan, tiny(*overrides), **arguments)
    assert check_refusal(tiny, *overrides, **arguments) == ("use", ["score.logp_dtype"])


def test_on_the_cpu_there_is_no_gpu_to_fill(tiny):
    found = plan(tiny(*CPU), num_ranks=2)
    text = found.as_text()
    assert "on 2 ranks" in text
    assert "memory per rank" in text
    assert "rank-hours" in text
    assert "GPU" not in text
    assert "CUDA" not in text


def test_a_visible_gpu_and_the_free_disk_are_the_limits(tiny, monkeypatch):
    class Properties:
        total_memory, name = 1_000_000, "Small GPU"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    with pytest.raises(InputError, match=r"more than 1 MB \(Small GPU here"):
        plan(tiny(*GPU, "model.name=resnet18"))
    given = plan(tiny(*GPU), gpu_memory_bytes=8e9).as_json()
    assert given["memory_per_rank"]["there_is_bytes"] == 8e9
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(InputError, match=r"of disk, more than 1 kB \(free in"):
        plan(tiny(*CPU))


# ---- text, JSON, command line


@pytest.mark.parametrize(
    "options", [{"num_ranks": 2}, {"images_per_second": 321.5, "strategies": ("E", "P")}]
)
def test_text_and_json_have_the_same_numbers(tiny, options):
    found = plan(tiny(*GPU), **options)
    numbers, text = json.loads(json.dumps(found.as_json())), found.as_text()
    shown = re.findall(r"^  (\S.*?) {2,}([\d.,]+ ?[kMGT]?B?|unknown)(?:   |$)", text, flags=re.M)
    sections = [section for section in numbers.values() if isinstance(section, dict)]
    in_json = {key: number for section in sections for key, number in section.items()}
    factors = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    num_compared = 0
    for label, number in shown:
        if label in ("total", "all", *(training["name"] for training in numbers["trainings"])):
            continue  # stands twice, or below
        words = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
        expected = in_json.get(f"{words}_bytes", in_json.get(words, "missing"))
        if expected is None:
            assert number == "unknown"
        elif label != "there is":
            digits, unit = re.fullmatch(r"([\d.,]+) ?(\w*)", number).groups()
            printed = float(digits.replace(",", "")) * factors[unit]
            assert printed == pytest.approx(expected, rel=6e-4, abs=0.5), label
        num_compared += 1
    assert num_compared > 30
    for training in numbers["trainings"]:
        row = next(line for line in text.splitlines() if line.startswith(f"  {training['name']} "))
        words = row.removeprefix(f"  {training['name']} ").split()
        columns = ("num_images", "epochs", "global_batch_size", "images_seen")
        assert [int(word.replace(",", "")) for word in words[:4]] == [
            training[column] for column in columns
        ]
        hours = [training["hours"], training["rank_hours"]]
        assert words[4:] == ["unknown" if number is None else f"{number:,.2f}" for number in hours]


def test_sizes_are_read_strictly():
    for text, number in (
        *(("80GB", 80e9), ("80000MB", 80e9), ("80000000000", 80e9), ("5kB", 5e3), ("7B", 7)),
        *(("79.6GiB", 79.6 * 2**30), ("1 TiB", 2**40), ("2KiB", 2048), ("3MiB", 3 * 2**20)),
        (None, None),
    ):
        assert parse_bytes(text, "--disk") == number
    for bad in ("", "GB", "80gb", "80 Gigs", *"-5GB 0 0GB 1e9 80GB! 8,0GB 80Gb nan".split()):
        refused("--disk=.* is not a size; write it like 80GB", parse_bytes, bad, "--disk")


def test_sizes_for_people():
    found = [size(number) for number in (0, 999, 1000, 640_588_000, 80e9, 2.5e12)]
    assert found == ["0 B", "999 B", "1 kB", "640.6 MB", "80 GB", "2.5 TB"]


def test_the_command(config_file, capsys):
    assert main(f"plan {config_file} run.device=cuda --gpus 2 --gpu-memory 8GB --json".split()) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["run"]["ranks"] == 2
    assert numbers["memory_per_rank"]["there_is_bytes"] == 8e9
    assert main(f"plan {config_file} --strategies E P --images-per-second 100".split()) == 0
    printed = capsys.readouterr().out
    assert "retrain p=0.8 P" in printed
    assert "retrain p=0 " not in printed  # the collection trains on everything
    for words, part in (
        (["run.device=cuda", "--gpu-memory", "lots"], "--gpu-memory='lots' is not a size"),
        (["run.device=cuda", "--gpu-memory", ""], "--gpu-memory='' is not a size"),
        (["--disk", "10kB"], "of disk, more than 10 kB (--disk)"),
        (["--gpus", "7"], "world_size=7"),
        (["--from", "nowhere"], "nowhere does not exist"),
    ):
        assert main(["plan", str(config_file), *words]) == 2
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1
    assert not (config_file.parent / "run").exists()
