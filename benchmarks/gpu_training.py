"""Parts of `benchmarks.gpu_acceptance` that train: optimizer, networks, loaders, loops.

Each part is called with its sizes, a folder to work in, and what to write its findings into.
"""

# B rows of a step, N images

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import bare_loops
from benchmarks.gpu_findings import Findings, Sizes
from benchmarks.paired_loops import SMALL_SIZE, Bench, Setting
from benchmarks.recording import resident_bytes
from benchmarks.throughput import write_images
from tdds_dist.config.run import Config, parse_config
from tdds_dist.data.beton import inspect_beton
from tdds_dist.data.loader import BetonLoader, View, default_workers
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.training.build import build_optimizer

SCORING_SHARE, LOOP_SHARE = 0.995, 0.98  # wanted: with scoring / without, our loop / the bare one
MOST_CREEP = 64e6  # bytes that reserved or host memory may grow after the first passes
RUN_CLASSES, RUN_SIDE, RUN_BATCH = 8, 64, 16


# ---- 4 a first step that overflows


def overflow(sizes: Sizes, work: Path, found: Findings) -> None:
    """SGD as `train.amp=fp16` builds it, whose first step overflows: the next step is as if that
    one had never been."""
    config = small_config(
        sizes, work, "overflow", {"train": {"amp": "fp16", "fused_optimizer": True}}
    )
    gradient = torch.full((64, 64), 0.5)
    weights = []
    for gradients in ([gradient * float("inf"), gradient, gradient], [gradient, gradient]):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64, bias=False).to(sizes.device)
        optimizer = build_optimizer(layer, config)
        scaler = torch.amp.GradScaler(sizes.device, init_scale=2.0, growth_interval=10**6)
        for one in gradients:
            scaler.scale(layer.weight.sum())  # the scaler makes its state at its first use
            layer.weight.grad = one.to(sizes.device) * scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
        weights.append(layer.weight.detach().cpu())
    found.value("fused", str(optimizer.defaults.get("fused")))
    worst = float((weights[0] - weights[1]).abs().max())
    is_met = bool(torch.isfinite(weights[0]).all()) and worst < 1e-6
    found.check("weights after an overflow, furthest from those without", worst, "< 1e-6", is_met)


def small_tree(sizes: Sizes, work: Path, name: str) -> dict[str, dict[str, Any]]:
    """The config of a small run on images that `gpu_commands` writes."""
    return {
        "run": {"name": name, "dir": str(work / name), "device": sizes.device},
        "data": {
            "train": str(work / f"{name}.beton"),
            "val": str(work / f"{name}_val.beton"),
            "num_classes": RUN_CLASSES,
            "image_size": RUN_SIDE,
            "crop": "pad",
            "mean": list(bare_loops.MEAN),
            "std": list(bare_loops.STD),
        },
        "model": {"name": "resnet18" if sizes.on_gpu else "shufflenet_v2_x0_5"},
        "train": {"epochs": 3, "global_batch_size": RUN_BATCH, "lr": 0.02, "amp": "bf16"},
        "score": {"windows": [{"T": 3, "K": 2}], "final_pass": True},
    }


def small_config(sizes: Sizes, work: Path, name: str, changes: dict[str, dict[str, Any]]) -> Config:
    tree = small_tree(sizes, work, name)
    return parse_config({key: part | changes.get(key, {}) for key, part in tree.items()}, name)


# ---- 6 networks, with scoring and without


class Resident(Setting):
    """A network that trains on one batch again and again; the file behind it is small."""

    @property
    def side(self) -> int:
        """Of the stored images, pixels."""
        return SMALL_SIZE


class Cell(Bench):
    """Our loop alone, without the loops that it is compared with elsewhere."""

    def _bare_loops(self, folder: Path) -> dict[str, Callable[[], int]]:
        return {}


@contextmanager
def _cell(sizes: Sizes, work: Path, network: str, batch: int, compiled: bool) -> Iterator[Cell]:
    rows, steps = sizes.cells[batch]
    setting = Resident(
        sizes.networks[network],
        sizes.side,
        rows,
        sizes.num_classes,
        rows * steps,
        rounds=sizes.cell_rounds,
        device=sizes.device,
        compile=compiled,
    )
    name = f"{network}_{batch}_{'compiled' if compiled else 'eager'}_{os.getpid()}"
    folder = work / f"images_{name}"
    write_images(setting, folder, with_tree=False)
    with distributed.session(sizes.device) as world, _compiler(sizes):
        cell = Cell(setting, folder, work / f"run_{name}", world)
        cell.timed("loader")  # gives the resident images
        cell.resident = ("off", "tdds")
        yield cell
        cell.trainer.close()
        del cell


def _compiler(sizes: Sizes) -> AbstractContextManager[object]:
    """Let torch.compile go without its C++ compiler in a toy run: that takes minutes on a CPU, and
    is not what a GPU uses."""
    if sizes.on_gpu:
        return nullcontext()
    return mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))


def compile_ahead(
    sizes: Sizes, work: Path, found: Findings, network: str = "resnet34", batch: int = 256
) -> None:
    """Compile a network for a later part, which finds the kernels in the cache."""
    started = time.perf_counter()
    with _cell(sizes, work, network, batch, True) as cell:
        cell.timed("off")
    found.value(f"{network}, {batch} rows: seconds", f"{time.perf_counter() - started:.0f}")


def network_speed(
    sizes: Sizes,
    work: Path,
    found: Findings,
    network: str = "resnet34",
    batch: int = 256,
    compiled: bool = False,
) -> None:
    """Images/s with scoring and without, launches per step, and the share of a step in which the
    device does nothing."""
    started = time.perf_counter()
    label = f"{network}, {batch} rows, {'compiled' if compiled else 'eager'}"
    with _cell(sizes, work, network, batch, compiled) as cell:
        for variant in ("off", "tdds"):
            cell.timed(variant)
        found.value("ready after, seconds", f"{time.perf_counter() - started:.0f}")
        num_images, steps = cell.setting.num_images, sizes.cells[batch][1]
        seconds: dict[str, list[float]] = {"off": [], "tdds": []}
        for number in range(sizes.cell_rounds):
            for variant in ("off", "tdds") if number % 2 == 0 else ("tdds", "off"):
                seconds[variant].append(cell.timed(variant)["seconds"])
        for variant, text in {"off": "scoring off", "tdds": "with TDDS"}.items():
            rates = [num_images / taken for taken in seconds[variant]]
            found.value(f"images/s, {text}", f"{statistics.median(rates):,.0f}")
            found.metric(f"{label}: images/s, {text}", rates, "images/s", "higher")
        ratios = [a / b for a, b in zip(seconds["off"], seconds["tdds"], strict=True)]
        _judged(sizes, found, "with TDDS / without", ratios, SCORING_SHARE)
        found.metric(f"{label}: with TDDS / without", ratios, "ratio", "higher", relative=True)
        for variant in ("off", "tdds"):
            launches, busy = _device_work(cell, variant)
            per_step = statistics.median(seconds[variant]) / steps
            idle = max(0.0, 1.0 - busy / steps / per_step)
            found.value(f"{variant}: kernels and copies per step", f"{launches / steps:.0f}")
            found.value(f"{variant}: device idle", f"{idle:.1%} of {1e3 * per_step:.2f} ms")
            name = f"{label}, {variant}: launches per step"
            found.metric(name, [launches / steps], "", "lower", relative=True)
        if sizes.on_gpu:
            peak = torch.cuda.max_memory_allocated()
            found.value("most GPU memory allocated", f"{peak / 1e9:.1f} GB")
            found.metric(f"{label}: peak memory", [peak], "bytes", "lower", relative=True)


def _judged(sizes: Sizes, found: Findings, what: str, ratios: list[float], wanted: float) -> None:
    median = statistics.median(ratios)
    text = f"{median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    if sizes.on_gpu:
        found.check(what, text, f"{wanted}", median >= wanted)
    else:
        found.value(what, text)


def _device_work(cell: Cell, variant: str) -> tuple[int, float]:
    """(kernels and copies, seconds in which at least one of them runs) of an epoch; torch calls on
    the CPU."""
    on_gpu = cell.world.device.type == "cuda"
    activities, kind = torch.profiler.ProfilerActivity, torch.profiler.DeviceType
    wanted = kind.CUDA if on_gpu else kind.CPU
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as seen:
        cell.timed(variant)
    results: Any = seen.profiler.kineto_results
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.device_type() == wanted and not event.is_user_annotation()
    )
    busy, free_from = 0, 0
    for start, end in spans:
        busy += max(0, end - max(start, free_from))
        free_from = max(free_from, end)
    return len(spans), busy / 1e9


# ---- 8 memory over many passes


def memory_creep(sizes: Sizes, work: Path, found: Findings) -> None:
    """Reserved and host memory after each pass of two loaders that take turns, as in training."""
    path = work / "creep.beton"
    source = open_source(f"synthetic:{sizes.creep_images},2,{SMALL_SIZE}")
    write_beton(source, path, progress=False)
    device, batch = torch.device(sizes.device), max(8, sizes.creep_images // 16)
    loaders = [
        BetonLoader(inspect_beton(path), batch, view, device=device, num_workers=default_workers(2))
        for view in (View(sizes.side, "resized", flip=True), View(sizes.side, "center"))
    ]
    reserved, host, pinned = [], [], []
    total = torch.zeros((), device=device)
    for number in range(sizes.creep_passes):
        for loader in loaders:
            order = epoch_order(sizes.creep_images, batch, epoch=number)
            for part in loader.batches(order, rank=0, world_size=1, epoch=number):
                total += part.image.float().mean()
        total.item()
        host.append(resident_bytes("VmRSS"))
        if sizes.on_gpu:
            reserved.append(torch.cuda.memory_reserved())
            stats = torch.cuda.host_memory_stats()
            pinned.append(stats.get("allocated_bytes.current", 0))
    settled = min(3, sizes.creep_passes - 1)
    for name, sizes_after in {"reserved": reserved, "host": host, "pinned": pinned}.items():
        if not sizes_after:
            continue
        grown = sizes_after[-1] - sizes_after[settled - 1]
        text = ", ".join(f"{value / 1e6:.0f}" for value in sizes_after[:: max(1, settled)])
        found.value(f"{name} memory after passes, MB", text)
        found.check(
            f"{name} memory grown after pass {settled}",
            f"{grown / 1e6:.0f} MB",
            f"{MOST_CREEP / 1e6:.0f} MB",
            grown <= MOST_CREEP,
        )
        found.metric(
            f"{name} memory of loaders", [sizes_after[-1]], "bytes", "lower", relative=True
        )


# ---- 12 the real loop


class Loop(Bench):
    """Our loop and the shortest one with FFCV, both with their loaders."""

    def _bare_loops(self, folder: Path) -> dict[str, Callable[[], int]]:
        batches = bare_loops.ffcv_batches(self.recipe(), folder / "images.beton")
        minimal = bare_loops.BareLoop(self.recipe(), batches)
        return {"ffcv": lambda: bare_loops.count(batches), "minimal": minimal.epoch}


class Stored(Setting):
    """A network on JPEGs of ImageNet's size (small ones in a toy run)."""

    @property
    def side(self) -> int:
        """Of the stored images, pixels."""
        return super().side if self.device == "cuda" else 80


def loop_setting(sizes: Sizes) -> Setting:
    return Stored(
        sizes.networks["resnet34"],
        sizes.side,
        sizes.loop_rows,
        sizes.num_classes,
        sizes.loop_images,
        rounds=sizes.loop_rounds,
        device=sizes.device,
    )


def images(sizes: Sizes, work: Path, found: Findings) -> None:
    """JPEGs for the parts that load them."""
    started = time.perf_counter()
    setting = loop_setting(sizes)
    folder = work / "loop"
    write_images(setting, folder, with_tree=False)
    source = open_source(f"synthetic:{sizes.num_classes},{sizes.num_classes},{setting.side}", "val")
    write_beton(source, folder / "every_class.beton", progress=False)
    found.value("images", f"{setting.num_images:,} of {setting.side} x {setting.side} pixels")
    found.value("bytes of an image", (folder / "images.beton").stat().st_size // setting.num_images)
    found.value("seconds", f"{time.perf_counter() - started:.0f}")


def loop(sizes: Sizes, work: Path, found: Findings) -> None:
    """Images/s from JPEGs: our loader and FFCV's own, our loop and the bare one, with scoring and
    without, in turns."""
    setting = loop_setting(sizes)
    names = ("loader", "ffcv", "off", "minimal", "tdds", "all")
    with distributed.session(sizes.device) as world:
        bench = Loop(setting, work / "loop", work / "run_loop", world)
        for name in names:
            bench.timed(name)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(setting.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                seconds[name].append(bench.timed(name)["seconds"])
            for name in names:
                rates = [setting.num_images / taken for taken in seconds[name]]
                found.metric(f"loop, {name}: images/s", rates, "images/s", "higher")
        bench.trainer.close()
        del bench
    for name in names:
        rates = [setting.num_images / taken for taken in seconds[name]]
        found.value(f"images/s, {name}", f"{statistics.median(rates):,.0f}")
    for what, one, over, wanted in (
        ("our loader / FFCV's", "loader", "ffcv", LOOP_SHARE),
        ("our loop / the bare one", "off", "minimal", LOOP_SHARE),
        ("with TDDS / without", "tdds", "off", SCORING_SHARE),
        ("with TDDS and trajectory / without", "all", "off", SCORING_SHARE),
    ):
        ratios = [a / b for a, b in zip(seconds[over], seconds[one], strict=True)]
        _judged(sizes, found, what, ratios, wanted)
        found.metric(f"loop, {what}", ratios, "ratio", "higher", relative=True)
