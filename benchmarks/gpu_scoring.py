"""Parts of `benchmarks.gpu_acceptance` about the scorer and its kernel, without training.

Each part is called with its sizes, a folder to work in, and what to write its findings into.
"""

# C classes, M rows of a shard, N samples, R rows of an update

import importlib.util
import os
import re
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import files, recording
from benchmarks.gpu_findings import Findings, Sizes
from benchmarks.ranks import run_on_ranks
from benchmarks.recording import Outputs, Stored, resident_bytes
from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed import collectives, host_memory
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.runs.checkpoint import Checkpoints
from tdds_dist.scoring import kernel_check, shard_triton
from tdds_dist.scoring import scorer as scorer_module
from tdds_dist.scoring.shard import Arrived, DenseRows, Shard, pack

PACKAGES = (
    *("torch", "torchvision", "triton", "ffcv", "numba", "numpy", "pydantic", "submitit"),
    *("pytest", "pytest-xdist", "pytest-timeout", "matplotlib", "tensorboard", "pyarrow"),
)
KERNEL_SHARE = 0.6  # wanted of copy bandwidth
MOST_PINNED = 1.25  # wanted of the state's bytes
RANKS_SAMPLES, RANKS_EPOCHS = 997, 4
SECOND_STREAM_SIDE = 2048  # of the matrices that keep the GPU busy


# ---- 1 what is here


def versions(sizes: Sizes, work: Path, found: Findings) -> None:
    """Versions, room, and whether the kernel runs."""
    provenance = files.provenance(1, sizes.device, len(os.sched_getaffinity(0)))
    found.keep("provenance", provenance | {"command": ["benchmarks.gpu_acceptance"]})
    for package in PACKAGES:
        found.value(package, _version(package))
    found.value("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    if sizes.on_gpu:
        found.value("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        about = torch.cuda.get_device_properties(0)
        found.value("GPU", f"{about.name}, sm_{about.major}{about.minor}")
        found.value("free, total GPU memory", [_gb(part) for part in torch.cuda.mem_get_info()])
        found.value("GPUs visible", torch.cuda.device_count())
    found.value("CPUs of this process", len(os.sched_getaffinity(0)))
    found.value("free in the work folder", _gb(shutil.disk_usage(work).free))
    shard = Shard(0, 64, sizes.num_classes, "dense", torch.float32, torch.device(sizes.device))
    failures = kernel_check.failures(shard, quarantines=False)
    for variant, problem in failures.items():
        found.check(f"kernel for {variant}", problem or "runs", "runs", problem is None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


# ---- 3 threads that overwrite what others read


def race(sizes: Sizes, work: Path, found: Findings) -> None:
    """The kernel again and again while another stream is busy: always the same bits, and those of
    the plain update but for rounding. Then its time with the barrier and without."""
    without = _kernel_without_barrier(work)
    runs = f"in {sizes.race_repetitions} runs of {sizes.race_rows} rows"
    for num_classes in sizes.race_classes:
        for dtype in (torch.bfloat16, torch.float16):
            name = f"C={num_classes}, {str(dtype).removeprefix('torch.')}"
            different = _repeated(sizes, shard_triton, num_classes, dtype)
            found.check(f"{name}: numbers with other bits", different, f"0 {runs}", different == 0)
            problem = kernel_check.disagreement(
                num_classes, dtype, torch.float32, False, sizes.device, min(sizes.race_rows, 120)
            )
            found.check(
                f"{name}: against the plain update", problem or "equal", "equal", not problem
            )
        if without is None:
            found.skipped("the build without the barrier", "the kernel has no barrier")
            continue
        different = _repeated(sizes, without, num_classes, torch.bfloat16)
        found.value(f"C={num_classes}, no barrier: numbers with other bits", different)
        for rows in sizes.kernel_rows:
            for kind, module in {"with": shard_triton, "without": without}.items():
                taken = _update_us(sizes, module, num_classes, rows)
                found.value(f"C={num_classes}, {rows} rows, {kind} barrier, us", _span(taken))
                found.metric(
                    f"kernel C={num_classes} B={rows} {kind} barrier", taken, "us", "lower"
                )


def _kernel_without_barrier(work: Path) -> ModuleType | None:
    """The kernel's module, its barriers taken out; None where it has none."""
    text = Path(str(shard_triton.__file__)).read_text()
    changed = re.sub(r"^ *tl\.debug_barrier\(\)\n", "", text, flags=re.MULTILINE)
    if changed == text:
        return None
    path = work / "kernel_without_barrier.py"
    path.write_text(changed)
    spec = importlib.util.spec_from_file_location("kernel_without_barrier", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _rows(sizes: Sizes, num_rows: int, num_classes: int, dtype: torch.dtype) -> Arrived:
    """Packed rows 0 .. R - 1 in another order, of made-up logits."""
    generator = torch.Generator().manual_seed(num_classes)
    logits_RC = (torch.randn(num_rows, num_classes, generator=generator) * 3).to(dtype)
    index_R = torch.randperm(num_rows, generator=generator)
    label_R = torch.randint(num_classes, (num_rows,), generator=generator)
    parts = (index_R, label_R, logits_RC)
    return Arrived(pack(*(part.to(sizes.device) for part in parts)), dtype, 0)


def _repeated(sizes: Sizes, module: ModuleType, num_classes: int, dtype: torch.dtype) -> int:
    """Numbers whose bits differ from those of the first run, over all runs."""
    num_rows, device = sizes.race_rows, torch.device(sizes.device)
    arrived = _rows(sizes, num_rows, num_classes, dtype)
    generator = torch.Generator().manual_seed(1)
    previous_MC = torch.randn(num_rows + 1, num_classes, generator=generator).to(device)
    previous_MC = torch.log_softmax(previous_MC * 3, dim=1)

    def run() -> dict[str, Tensor]:
        assert isinstance(shard.previous, DenseRows)
        shard.previous.logp_MC.copy_(previous_MC)
        shard.begin_epoch()
        module.update(shard, [arrived], True, False)
        tables = shard.tables()
        return {name: tables[name][:num_rows] for name in ("logp", "scalars")}

    shard = Shard(0, num_rows, num_classes, "dense", torch.float32, device)
    first = {name: table.clone() for name, table in run().items()}
    different = torch.zeros((), dtype=torch.int64, device=device)
    load = _load(sizes)
    for _ in range(sizes.race_repetitions):
        load()
        for name, table in run().items():
            different += (table.view(torch.int32) != first[name].view(torch.int32)).sum()
    return int(different)


def _load(sizes: Sizes) -> Callable[[], None]:
    """Return what puts a matrix product and a copy on another stream of the GPU."""
    if not sizes.on_gpu:
        return lambda: None
    stream, side = torch.cuda.Stream(), SECOND_STREAM_SIDE
    large = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    product, copy = torch.empty_like(large), torch.empty_like(large)
    torch.cuda.synchronize()

    def load() -> None:
        with torch.cuda.stream(stream):
            torch.mm(large, large, out=product)
            copy.copy_(product)

    return load


def _update_us(sizes: Sizes, module: ModuleType, num_classes: int, rows: int) -> list[float]:
    """Microseconds of each update of so many rows, none of them in the cache."""
    num_samples = max(4 * rows, min(sizes.num_samples, 100_000))
    shard = Shard(0, num_samples, num_classes, "dense", torch.float32, torch.device(sizes.device))
    generator = torch.Generator().manual_seed(2)
    arrived = []
    for _ in range(4):
        part = _rows(sizes, rows, num_classes, torch.bfloat16)
        index_R = torch.randperm(num_samples, generator=generator)[:rows].to(sizes.device)
        part.payload_RX[:, :4] = index_R.unsqueeze(1).view(torch.int16)
        arrived.append(part)
    spans = []
    for step in range(sizes.kernel_steps + 3):
        recording.keep_busy(sizes.device)
        started = recording.mark(sizes.device)
        module.update(shard, [arrived[step % 4]], True, False)
        spans.append((started, recording.mark(sizes.device)))
    return [1e6 * recording.seconds_between(*span) for span in spans[3:]]


def _span(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


# ---- 5 all of ImageNet on one rank, with NCCL


def whole_scorer(sizes: Sizes, work: Path, found: Findings) -> None:
    """A scorer that owns everything, in the middle of training: an epoch without any wait for the
    device, two checkpoints in the background, and loading them: the same bits."""
    setting = recording.Setting(
        sizes.num_samples,
        sizes.num_classes,
        sizes.batch,
        Stored("float32"),
        torch.bfloat16,
    )
    with distributed.session(sizes.device), _kernel(sizes):
        backend = str(dist.get_backend_config())
        found.check("process group", backend, "nccl", not sizes.on_gpu or "nccl" in backend)
        outputs = Outputs(setting, sizes.device)
        scorer = setting.scorer(sizes.device)
        found.check("kernel in use", scorer._is_fused, "yes", scorer._is_fused)
        for number in range(2):
            scorer = _epoch(sizes, found, setting, scorer, outputs, number)
        _checkpoints(sizes, work, found, scorer)


def _epoch(
    sizes: Sizes,
    found: Findings,
    setting: recording.Setting,
    scorer: ShardedScorer,
    outputs: Outputs,
    number: int,
) -> ShardedScorer:
    """Record an epoch; the first (number 0) compiles and joins NCCL, later ones must not wait for
    the device. Return the scorer, another one where this one was left in the middle."""
    order = epoch_order(setting.num_samples, setting.batch, epoch=number)
    scorer.expect(order)
    batches = list(outputs.epoch(order))
    _wait(sizes)
    started = time.perf_counter()
    try:
        with _no_wait(sizes) if number else nullcontext():
            for batch in batches:
                scorer.record(*batch)
    except RuntimeError as error:
        place = traceback.format_exc(limit=-4)
        found.check("an epoch without a wait for the device", place, "no wait in a step", False)
        if "synchroniz" not in str(error):
            raise
        return setting.scorer(sizes.device)
    queued = time.perf_counter() - started
    _wait(sizes)
    taken = time.perf_counter() - started
    scorer.end_epoch()
    if number:
        name = "an epoch without a wait for the device"
        found.check(name, f"{order.num_steps} steps", "no wait in a step", True)
        found.value("host, us per step", f"{1e6 * queued / len(batches):.0f}")
        found.value("recorded, samples/s", f"{setting.num_samples / taken:,.0f}")
        rate = [setting.num_samples / taken]
        found.metric("scorer with NCCL to itself", rate, "samples/s", "higher")
    return scorer


@contextmanager
def _kernel(sizes: Sizes) -> Iterator[None]:
    """Let scorers on the CPU take the kernel as well, by Triton's interpreter, in a toy run."""
    if sizes.on_gpu:
        yield
        return
    with mock.patch.object(scorer_module, "kernel_works", return_value=True):
        yield


@contextmanager
def _no_wait(sizes: Sizes) -> Iterator[None]:
    """Raise where the host waits for the device."""
    if not sizes.on_gpu:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _wait(sizes: Sizes) -> None:
    if sizes.on_gpu:
        torch.cuda.synchronize()


def _checkpoints(sizes: Sizes, work: Path, found: Findings, scorer: ShardedScorer) -> None:
    started = time.perf_counter()
    state = scorer.state_dict()
    found.value("state_dict, seconds", f"{time.perf_counter() - started:.3f}")
    state_bytes = scorer.state_bytes()
    found.value("state", _gb(state_bytes))
    before = resident_bytes("VmRSS")
    checkpoints = Checkpoints(work / "checkpoints", scorer.world, stop_on_error=True)
    locked: list[int] = []
    lock = host_memory._lock

    def count(block: np.ndarray, device: torch.device) -> None:
        locked.append(block.nbytes)
        lock(block, device)

    for step in (1, 2):
        started = time.perf_counter()
        with mock.patch.object(host_memory, "_lock", count):
            checkpoints.save(step, scorer.state_dict(), {})
        stall = time.perf_counter() - started
        checkpoints.finish()
        found.metric(f"checkpoint {step}: training stands still", [stall], "s", "lower")
        found.value(f"checkpoint {step}: training stands still, seconds", f"{stall:.2f}")
        durable = time.perf_counter() - started
        found.value(f"checkpoint {step}: on disk after, seconds", f"{durable:.2f}")
    stats = torch.cuda.host_memory_stats() if sizes.on_gpu else {}
    pinned = sum(locked) + stats.get("allocated_bytes.peak", 0)
    limit = MOST_PINNED * state_bytes
    found.check("page-locked at most", _gb(pinned), _gb(limit), pinned <= limit)
    found.metric("page-locked for checkpoints", [pinned], "bytes", "lower", relative=True)
    found.value("host memory more than before", _gb(resident_bytes("VmRSS") - before))
    latest = checkpoints.latest()
    assert latest is not None
    fresh = ShardedScorer(
        scorer.num_samples,
        scorer.num_classes,
        scorer.windows,
        scorer.preset,
        scorer.world.device,
    )
    started = time.perf_counter()
    target = fresh.state_dict()
    checkpoints.load(latest, target)
    fresh.load_state_dict(target)
    found.value("load, seconds", f"{time.perf_counter() - started:.2f}")
    loaded = fresh.state_dict()
    other = [name for name, table in state.items() if not _same_bits(table, loaded[name])]
    found.check("tables with other bits after loading", other or "none", "none", not other)
    checkpoints.close()
    shutil.rmtree(work / "checkpoints", ignore_errors=True)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    pair = [collectives.own_rows(table).contiguous() for table in (one, other)]
    return torch.equal(*(table.reshape(-1).view(torch.uint8) for table in pair))


# ---- 7 how much of the memory's bandwidth the kernel takes


def kernel_share(sizes: Sizes, work: Path, found: Findings) -> None:
    """The owner's update against a plain copy: 16-bit outputs, few and many rows, by the number of
    warps."""
    usual, chosen = shard_triton.blocks(sizes.num_classes)
    for rows in sizes.kernel_rows:
        setting = recording.Setting(
            min(sizes.num_samples, 400_000),
            sizes.num_classes,
            rows,
            Stored("float32"),
            torch.bfloat16,
        )
        for num_warps in (2, 4):
            blocks = mock.patch.object(shard_triton, "blocks", return_value=(usual, num_warps))
            with _kernel(sizes), blocks:
                measured = recording.measure_update(setting, sizes.device, sizes.kernel_steps)
            row = measured[0]
            share = row["share_of_copy_bandwidth"]
            name = f"{rows} rows, {num_warps} warps" + " (default)" * (num_warps == chosen)
            is_judged = rows == max(sizes.kernel_rows) and num_warps == chosen
            text = f"{statistics.median(share):.1%} of {row['copy_bandwidth'] / 1e12:.2f} TB/s"
            if is_judged and sizes.on_gpu:
                met = statistics.median(share) >= KERNEL_SHARE
                found.check(f"{name}: of copy bandwidth", text, f"{KERNEL_SHARE:.0%}", met)
            else:
                found.value(f"{name}: of copy bandwidth", text)
            found.value(f"{name}: update, us", _span(row["update_us"]))
            key = f"kernel {rows} rows {num_warps} warps"
            found.metric(f"{key}: share of copy bandwidth", share, "", "higher", relative=True)
            found.metric(f"{key}: update", row["update_us"], "us", "lower")
        found.value(f"{rows} rows: launches per record", measured[0]["launches_per_step"])


# ---- 10 two ranks on one GPU


def two_ranks(sizes: Sizes, work: Path, found: Findings) -> None:
    """Scores of two gloo ranks that share a GPU against those of one: the same bits."""
    alone = run_on_ranks(1, _scores, sizes)[0]
    both = run_on_ranks(2, _scores, sizes)
    for rank, answer in enumerate(both):
        if isinstance(answer, str):
            found.skipped("two ranks on one GPU", f"gloo refuses on rank {rank}: {answer}")
            return
    is_same = all(alone.tobytes() == part.tobytes() for part in both)
    found.check(
        "scores on two ranks", "the same bits" if is_same else "others", "as on one", is_same
    )


def _scores(sizes: Sizes) -> np.ndarray | str:
    """Scores of made-up outputs on this rank; words where gloo cannot."""
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    device = torch.device("cuda", 0) if sizes.on_gpu else torch.device("cpu")
    if world_size > 1:
        dist.init_process_group("gloo")
    try:
        return _trained(sizes, rank, world_size, device)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if world_size > 1 and (
            any(word in text.lower() for word in ("gloo", "support", "device type"))
        ):
            return text[:300]
        raise
    finally:
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def _trained(sizes: Sizes, rank: int, world_size: int, device: torch.device) -> np.ndarray:
    window = Window(RANKS_EPOCHS, RANKS_EPOCHS - 1, 0.9)
    scorer = ShardedScorer(RANKS_SAMPLES, sizes.num_classes, [window], device=device)
    for epoch in range(RANKS_EPOCHS):
        generator = torch.Generator().manual_seed(epoch)
        logits_NC = torch.randn(RANKS_SAMPLES, sizes.num_classes, generator=generator) * 3
        logits_NC = logits_NC.to(device, torch.bfloat16)
        label_N = (torch.arange(RANKS_SAMPLES) % sizes.num_classes).to(device)
        order = epoch_order(RANKS_SAMPLES, 32 * world_size, epoch=epoch)
        scorer.expect(order)
        for parts in zip(*order.of_rank(rank, world_size), strict=True):
            sample_B, index_B = (torch.from_numpy(part.copy()).to(device) for part in parts)
            scorer.record(index_B, logits_NC[sample_B], label_N[sample_B])
        scorer.end_epoch()
    return scorer.gather()[window].numpy()  # a tensor would stay with this process
