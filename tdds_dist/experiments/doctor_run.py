"""Checks of one config: its files, its run directory, the network and the kernel on this device."""

# B rows of this rank and forward pass, C classes, N images, W ranks

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tdds_dist.data.beton import content_sha256
from tdds_dist.data.loader import BetonLoader
from tdds_dist.distributed.collectives import limit_collectives
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.experiments.findings import Finding, Visit, words_of
from tdds_dist.experiments.forecast import plan
from tdds_dist.runs.artifacts import sync_folder
from tdds_dist.scoring import kernel_check
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.text import size_text
from tdds_dist.training.build import (
    InputStage,
    autocast,
    build_model,
    build_optimizer,
    build_scorer,
    build_views,
    open_files,
    preflight,
)
from tdds_dist.training.schedule import per_rank_batch

_ANSWER_SECONDS = 30.0  # for other ranks to come to the same check
_SIGHT_SECONDS = 10.0  # until a file that one rank has written is to be seen by the others
_SLOW_SECONDS = 2.0  # of writing a small file to the disk
_FILE_TIME_SECONDS = 10.0  # that the clock of the file system may be apart from ours
_MEASURE_SECONDS = 3.0
COMPILE_SECONDS = 120.0  # of NCCL, while ranks compile kernels: some take far longer than others
_CAPABILITY = 90  # of H100 and H200, for which the kernel is compiled where there is no GPU
_CPU_ROWS = 16  # most rows of a measured step on the CPU, where a whole batch may take minutes
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


# ---- files


def data_files(visit: Visit) -> Iterator[Finding]:
    """Open the files of the config as a collection does, and compare their content on all ranks."""
    config, W = visit.config, visit.board.world_size
    config.check_collect()
    rows = per_rank_batch(config.train.global_batch_size, W, config.train.accumulation)
    files: dict[str, list[Any]] = {}
    try:
        train, val, labels = open_files(config)
        preflight(config, train, val, rows, visit.device.type)
        visit.left |= {"train": train, "rows": rows}
        files = {
            "data.train": [train.num_bytes, content_sha256(train), labels.labels_sha256],
            "data.val": [val.num_bytes, content_sha256(val)],
        }
    finally:
        everyones = visit.board.share("data files", files, _ANSWER_SECONDS)
    first = everyones.get(0) or {}
    for key, content in files.items():
        path = getattr(config.data, key.removeprefix("data."))
        same = not first or first[key] == content
        yield Finding(
            key,
            "OK" if same else "FAIL",
            f"{path}, {size_text(content[0])}, content {content[1][:12]}"
            + ("" if same else f", on rank 0 {size_text(first[key][0])}, {first[key][1][:12]}"),
            "readable, the same on all nodes",
            f"copy the file of rank 0 ({visit.hosts[0]}) to this node",
        )


def room(visit: Visit) -> Iterator[Finding]:
    """Compare what `tdds plan` says with the memory and the disk that there are."""
    if visit.rank != 0:
        return
    config = visit.config
    on_here = config.changed("run", device=visit.device.type)
    planned = plan(on_here, num_ranks=visit.board.world_size)
    rows, gradients = (line.value or 0.0 for line in planned.sections["network_per_rank"][1])
    visit.left["sent_bytes"] = rows + gradients / config.train.accumulation
    needs = {line.key: line.value or 0.0 for line in planned.sections["disk"][1]}
    yield Finding(
        "room",
        "OK",
        f"{size_text(needs['there_is_bytes'])} free on the disk of {config.run.directory}",
        f"{size_text(needs['total_when_fullest_bytes'])} when fullest (tdds plan)",
    )


def run_directory(visit: Visit) -> Iterator[Finding]:
    """Do in the run directory what a run does there: rename, link, sync, on all ranks at once."""
    wanted = visit.config.run.directory.absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    names = visit.board.share("scratch", f".tdds-doctor-{os.getpid()}", _ANSWER_SECONDS)
    folder = there / names.get(0, f".tdds-doctor-{os.getpid()}")
    try:
        try:
            written = _write(folder, visit.rank)
        except OSError as error:
            written = {"error": f"{folder.parent}: {error.strerror} (errno {error.errno})"}
        yield from _judged(visit, there, folder, written)
    finally:
        visit.board.share("scratch done", True, _ANSWER_SECONDS)
        if visit.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, rank: int) -> dict[str, Any]:
    """Write a file of this rank in the way of a checkpoint; return what came of it."""
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    aside, path = folder / f"aside-{rank}", folder / f"rank-{rank}"
    with aside.open("w") as file:
        file.write(f"rank {rank}")
        file.flush()
        os.fsync(file.fileno())
    path.write_text("older")
    aside.replace(path)
    sync_folder(folder)
    seconds = time.perf_counter() - started
    ahead = path.stat().st_mtime - time.time()
    won, kind = True, "link"
    try:
        try:
            os.link(path, folder / "lock")
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            kind = "exclusive file, no hard links here"
            (folder / "lock").touch(exist_ok=False)
    except FileExistsError:
        won = False
    renamed = path.read_text() == f"rank {rank}" and not aside.exists()
    return {"won": won, "kind": kind, "seconds": seconds, "ahead": ahead, "renamed": renamed}


def _judged(visit: Visit, there: Path, folder: Path, mine: dict[str, Any]) -> Iterator[Finding]:
    what, elsewhere = "run directory", "choose another run.dir, on a file system of all nodes"
    everyones = visit.board.share("written", mine, _ANSWER_SECONDS)
    if "error" in mine:
        way_out = "choose another run.dir, or mount this one to be written"
        yield Finding(what, "FAIL", mine["error"], "files can be written", way_out)
        return
    unseen = _unseen(folder, [rank for rank, said in everyones.items() if "error" not in said])
    winners = [rank for rank, said in everyones.items() if said.get("won")]
    if unseen:
        yield Finding(
            what,
            "FAIL",
            f"{folder.parent}: no file of rank {unseen[0]} ({visit.hosts[unseen[0]]}) after"
            f" {_SIGHT_SECONDS:.0f} s",
            "the same directory on all nodes",
            elsewhere,
        )
    elif not mine["renamed"] or len(winners) != 1:
        found = "a rename left the older file"
        if mine["renamed"]:
            found = f"{len(winners)} ranks made the same {mine['kind']}"
        wanted = "atomic rename, exclusive link"
        yield Finding(what, "FAIL", f"{folder.parent}: {found}", wanted, elsewhere)
    else:
        is_slow = mine["seconds"] > _SLOW_SECONDS
        yield Finding(
            what,
            "WARN" if is_slow else "OK",
            f"{there}: rename, {mine['kind']}, fsync in {mine['seconds']:.2f} s; all ranks see it",
            f"the same on all nodes, less than {_SLOW_SECONDS:g} s",
            "a slow file system makes slow checkpoints; choose another run.dir",
            number=-mine["seconds"],
        )
    apart = abs(mine["ahead"])
    bad = apart > _FILE_TIME_SECONDS
    yield Finding(
        "file times",
        "FAIL" if bad else "OK",
        f"the file system is {apart:.1f} s {'ahead of' if mine['ahead'] > 0 else 'behind'} this"
        " host",
        f"less than {_FILE_TIME_SECONDS:g} s",
        "set the clocks of file server and host by NTP (`chronyc tracking`)",
        number=-apart,
    )


def _unseen(folder: Path, ranks: list[int]) -> list[int]:
    """List the ranks whose files are not here within the time."""
    deadline = time.monotonic() + _SIGHT_SECONDS
    while True:
        missing = [
            rank
            for rank in ranks
            if not (path := folder / f"rank-{rank}").is_file() or path.read_text() != f"rank {rank}"
        ]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


# ---- the kernel


def kernel(visit: Visit) -> Iterator[Finding]:
    """Run the variants of the kernel that the config needs against the plain update; without a GPU
    compile them only. Nothing that was compiled before is used."""
    config = visit.config
    if config is not None and config.score.storage != "dense":
        yield Finding(
            "kernel", "SKIP", f"score.storage={config.score.storage} is done by plain operations"
        )
        return
    C = config.data.num_classes if config else 1000
    amp = config.train.amp if config else "bf16"
    dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    rows = getattr(torch, config.score.logp_dtype) if config else torch.float32
    quarantines = config is not None and config.score.on_nan == "quarantine"
    on_gpu, usual = visit.device.type == "cuda", os.environ.get("TRITON_CACHE_DIR")
    what = f"{C} classes, {str(dtype).removeprefix('torch.')} logits, the first and a later epoch"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            if on_gpu:
                wrong = kernel_check.disagreement(C, dtype, rows, quarantines, visit.device)
            else:
                from tdds_dist.scoring.shard_triton import compiled  # loads Triton

                for has_previous in (False, True):
                    compiled(C, dtype, rows, has_previous, quarantines, capability=_CAPABILITY)
                wrong = None
        except Exception as error:  # Triton's, the compiler's, the driver's: all kinds
            wrong = words_of(error)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            os.environ |= {} if usual is None else {"TRITON_CACHE_DIR": usual}
    did = "compiled, and as the plain update" if on_gpu else f"compiled for sm_{_CAPABILITY}"
    yield Finding(
        "kernel",
        "OK" if wrong is None else "FAIL" if on_gpu else "WARN",
        f"{what}: {did}" if wrong is None else wrong,
        "the scores of the plain update" if on_gpu else "compiles (no GPU here to run it on)",
        "unset TRITON_PTXAS_PATH, or `pip install --force-reinstall triton`; without the"
        " kernel scores are updated by plain operations, several times slower",
    )


# ---- speed


def network_speed(visit: Visit) -> Iterator[Finding]:
    """Measure images/s of a training step of this rank alone, without loading them."""
    config, device = visit.config, visit.device
    rows = visit.left.get("rows") or per_rank_batch(
        config.train.global_batch_size, visit.board.world_size, config.train.accumulation
    )
    B = rows if device.type == "cuda" else min(rows, _CPU_ROWS)
    if device.type == "cpu":
        torch.set_num_threads(visit.left.get("torch_threads", 1))
    step = _step(visit, B)
    step()
    started, num = time.perf_counter(), 0
    while num == 0 or time.perf_counter() - started < _MEASURE_SECONDS:
        step()
        num += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    speed = num * B / (time.perf_counter() - started)
    visit.left["images_per_second"] = speed
    compiles = config.model.compile
    yield Finding(
        "training",
        "WARN" if compiles else "OK",
        f"{speed:,.0f} images/s on each rank ({config.model.name}, eager, {B} at a time,"
        f" {device.type}, without loading)",
        "model.compile=true, which is not measured" if compiles else "",
        "the compiled network is faster: leave room in decoding and in the network of the hosts",
        number=speed,
    )


def traffic(visit: Visit) -> Iterator[Finding]:
    """Compare what a rank sends while it trains with the slowest link that was measured."""
    left = visit.left
    if visit.rank != 0 or not {"sent_bytes", "images_per_second", "link"} <= left.keys():
        return
    needed = left["sent_bytes"] * left["images_per_second"] / left["rows"]
    slow = needed > left["link"]
    yield Finding(
        "traffic",
        "WARN" if slow else "OK",
        f"{size_text(left['link'])}/s on the slowest link",
        f"{size_text(needed)}/s: {size_text(left['sent_bytes'])} with each forward pass",
        "check that the fast interface is used (`interface` of the cluster file); larger batches or"
        " train.accumulation send gradients less often",
    )


def _step(visit: Visit, B: int, scorer: ShardedScorer | None = None) -> Any:
    """Return a training step on made-up images, shown to the scorer where there is one."""
    config, device = visit.config, visit.device
    data, C = config.data, config.data.num_classes
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    network = config.model
    model = build_model(
        network.name, C, cifar_stem=network.cifar_stem, channels_last=network.channels_last
    )
    model = model.to(device).train()
    optimizer = build_optimizer(model, config)
    stage = InputStage(data.mean, data.std, config.model.channels_last).to(device)
    image = torch.zeros(B, 3, data.image_size, data.image_size, dtype=torch.uint8, device=device)
    label = torch.zeros(B, dtype=torch.int64, device=device)

    def step(index_B: torch.Tensor | None = None) -> None:
        with autocast(config, device):
            logits = model(stage(image))
        if scorer is not None and index_B is not None:
            scorer.record(index_B, logits.detach(), label)
        F.cross_entropy(logits.float(), label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def waits(visit: Visit) -> Iterator[Finding]:
    """Run training steps with the scorer in which torch refuses to wait for the device."""
    if visit.config is None:
        return
    if visit.device.type != "cuda":
        yield Finding("no wait in a step", "SKIP", "the CPU is not waited for")
        return
    config, W = visit.config, visit.board.world_size
    rows = per_rank_batch(config.train.global_batch_size, W, config.train.accumulation)
    num_steps = 4
    order = epoch_order(num_steps * rows * W, rows * W)
    scorer = build_scorer(config, num_steps * rows * W, visit.device)
    scorer.expect(order)
    step = _step(visit, rows, scorer)
    limit_collectives(COMPILE_SECONDS)
    index_SB = torch.from_numpy(order.of_rank(visit.rank, W)[1].copy()).to(visit.device)
    step(index_SB[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index_B in index_SB[1:]:
            step(index_B)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scorer.end_epoch()
    yield Finding("no wait in a step", "OK", f"{num_steps - 1} steps with the scorer never waited")


def decoding(visit: Visit) -> Iterator[Finding]:
    """Measure images/s of decoding the config's own file, all ranks at once."""
    config, W = visit.config, visit.board.world_size
    if "train" not in visit.left:
        yield Finding("decoding", "SKIP", "no training file")
        return
    info, rows = visit.left["train"], visit.left["rows"]
    workers = visit.left.get("workers", 1)
    loader = BetonLoader(
        info, rows, build_views(config)[0], device=visit.device, num_workers=workers
    )
    num, epoch, started = 0, 0, 0.0
    while not started or time.perf_counter() - started < _MEASURE_SECONDS:
        order = epoch_order(info.num_samples, rows * W, seed=config.run.seed, epoch=epoch)
        batches = loader.batches(order, rank=visit.rank, world_size=W, epoch=epoch)
        for batch in batches:
            num += len(batch.index) * bool(started)
            started = started or time.perf_counter()  # the first one may wait for compilation
            if time.perf_counter() - started > _MEASURE_SECONDS:
                break
        batches.close()
        epoch += 1
    speed = num / (time.perf_counter() - started)
    needed = visit.left.get("images_per_second")
    slow = needed is not None and speed < needed
    yield Finding(
        "decoding",
        "WARN" if slow else "OK",
        f"{speed:,.0f} images/s on each rank with {workers} thread{'s' * (workers > 1)}",
        f"{needed:,.0f} images/s, as the network takes them" + ", or more" * config.model.compile
        if needed
        else "",
        "give each rank more CPUs (cpus_per_rank), or write smaller images (tdds write"
        " --max-resolution 256) or raw ones (--write-mode raw)",
        number=speed,
    )
