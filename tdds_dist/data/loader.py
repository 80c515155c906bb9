"""Batches of (image, label, global index) from any `.beton` with an image and a label field,
through FFCV.

This module works around what FFCV's own loader does otherwise. Order: the stock orders pad with
unmarked duplicates or drop tails, so the order comes from `partition`, also from the middle of an
epoch. Errors: an exception in FFCV's thread leaves the consumer waiting for ever, so ours carries
it over and watches for stalls. Corrupt images: the return code of the decoder is checked and the
index named. Buffers: a batch is valid only until the next one, so what is yielded is either copied
to the device or valid until the next iteration, as said below. Memory: the stock memory manager
builds Python sets per sample (646 MB at ImageNet size) that this access pattern never reads.
Threads: FFCV sets torch's thread count for the whole process in every epoch; ours does not
(importing FFCV sets it to 1; `training.engine` chooses it then). GPU: FFCV copies when a batch is
asked for; ours copies ahead of that, from page-locked buffers that are kept from pass to pass, on
one stream (FFCV makes five for every pass, and torch keeps the memory of each to itself).
"""

# B rows per rank and step, S steps, N samples of the file, W threads

import math
import mmap
import os
import queue
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

# the others abort with two loaders, or after a fork
os.environ.setdefault("NUMBA_THREADING_LAYER", "tbb")

from tdds_dist.data import decode  # before FFCV

# isort: split
import ffcv
import numba
import numpy as np
import torch
from ffcv.memory_managers import OSCacheManager
from ffcv.memory_managers.os_cache import OSCacheContext
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from torch import Tensor

from tdds_dist.data.beton import IMAGE, BetonInfo
from tdds_dist.data.pixels import available_bytes
from tdds_dist.distributed import host_memory
from tdds_dist.distributed.partition import EpochOrder
from tdds_dist.errors import InputError

BATCHES_AHEAD = 3  # decoded before they are asked for
BLOCK_BYTES = 16 << 20  # of an order in blocks
_MOST_BLOCK_ROWS = 1 << 12  # bounds the tables of orders.Blocks to 17 MB each
_GAP_BYTES = 1 << 16  # between images; what is read along rather than left out
_STEPS_AHEAD = 4  # of which images are asked for, in an order without blocks
_ASKED_BYTES = 1 << 17  # no system cuts a request to read ahead below that
THREAD_NAME = "decoding"  # of a pass, before the number of its epoch
# no batch for that long is an error; the first batch may wait for compilation
STALL_SECONDS = 300.0


@dataclass(frozen=True)
class View:
    """The way an image becomes a square of `size` pixels.

    `center` cuts `ratio` of the shorter side; `pad` shifts by up to `padding` pixels with a black
    border (CIFAR); `resized` is RandomResizedCrop with areas in `scale` (ImageNet). Aspect ratios
    as in torchvision.
    """

    size: int
    crop: Literal["center", "pad", "resized"] = "center"
    flip: bool = False
    padding: int = 4
    ratio: float = 1.0
    scale: tuple[float, float] = (0.08, 1.0)

    @property
    def choices(self) -> tuple[int, bool, int, float, float, float]:
        """Return crop, flip, padding, ratio and scale as `decode.load_batch` takes them."""
        crop = {"center": decode.CENTER, "pad": decode.PAD, "resized": decode.RESIZED}[self.crop]
        return (crop, self.flip, self.padding, self.ratio, *self.scale)


@dataclass(frozen=True)
class Batch:
    """One step of one rank. `image` uint8 [B, 3, size, size] in channels_last memory; on the CPU it
    is valid only until the next batch, or the end of its pass. `label` and `index` int64 [B] are
    copies; `index` is -1 in padding rows."""

    image: Tensor
    label: Tensor
    index: Tensor


def check_view(info: BetonInfo, view: View) -> None:
    """Raise InputError when the file cannot be read in this view, or not at all on this machine."""
    sides = np.concatenate([info.width_N, info.height_N])
    if view.crop == "pad" and not (sides == view.size).all():
        raise InputError(
            f"data.crop='pad' needs images of exactly {view.size}x{view.size}, {info.path} has"
            f" sides {sides.min()}..{sides.max()}; use data.crop=resized, or write the file at that"
            " size"
        )
    if os.environ["NUMBA_THREADING_LAYER"] == "tbb" and not has_tbb():
        raise InputError(
            "numba cannot load Intel TBB (libtbb.so.12), which decodes images in parallel; install"
            " Debian's libtbb12 or conda-forge's tbb, or set NUMBA_THREADING_LAYER=omp"
        )


def has_tbb() -> bool:
    """Say whether numba finds Intel TBB."""
    try:
        import numba.np.ufunc.tbbpool  # noqa: F401
    except ImportError:
        return False
    return True


def find_undecodable(
    data: np.ndarray, image_B: np.ndarray, size_B: np.ndarray, num_workers: int = 1
) -> np.ndarray:
    """Mark the images that the decoder of training refuses, bool [B].

    data: uint8, read-only, the stored bytes of the images one after the other. image_B: their
    records (`beton.IMAGE`), with `data_ptr` the place in `data`. size_B: uint64, bytes of each.
    """
    assert int(size_B.sum()) == len(data), (size_B.sum(), len(data))
    num = len(image_B)
    # as in the files of `tdds write`: one kernel
    record_B = np.zeros(num, np.dtype([("", IMAGE), ("", "<i8")], align=True))
    record_B["f0"] = image_B
    pixels = int((image_B["width"].astype(np.int64) * image_B["height"]).max()) * 3
    num_threads = usable_threads(num_workers)
    corner_BSS3, scratch_WX, failed_B = (
        np.empty(shape, np.uint8) for shape in ((num, 1, 1, 3), (num_threads, pixels), num)
    )
    record_B.setflags(write=False)
    before = numba.get_num_threads()
    numba.set_num_threads(num_threads)
    try:
        # The crop that costs least: one pixel of each image is kept.
        stored = (record_B["f0"], data, image_B["data_ptr"].copy(), size_B)
        choices = View(1, "pad", padding=0).choices
        decode.load_batch(
            np.arange(num), corner_BSS3, scratch_WX, failed_B, *stored, *choices, 0, 0
        )
    finally:
        numba.set_num_threads(before)
    return failed_B.astype(bool)


class BetonLoader(ffcv.Loader):
    """Reads one `.beton` for one rank.

    Args:
        info: the file, as `inspect_beton` found it; any names for its one image and one label
            field.
        batch_size: rows per step of this rank.
        view: what is done to images.
        device: where batches go.
        num_workers: decoding threads.
        seed: of the augmentation.

    Raises:
        InputError: the file is unfit for the view.
    """

    def __init__(
        self,
        info: BetonInfo,
        batch_size: int,
        view: View,
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 1,
        seed: int = 0,
    ):
        # The stock constructor is replaced, not called: see "Memory" and "Threads" above.
        check_view(info, view)
        self.view = view
        self.device = torch.device(device)
        self.fname, self.batch_size, self.batches_ahead = str(info.path), batch_size, BATCHES_AHEAD
        self.num_workers = usable_threads(num_workers)
        self.drop_last, self.distributed, self.recompile, self.seed = False, False, False, seed
        self.reader = Reader(self.fname)
        self._info = info
        self.indices = np.arange(self.reader.num_samples, dtype=np.int64)
        self.memory_manager = _Blocks(self.reader)
        self.next_epoch = 0
        self._free_rings: list[_Ring] = []
        self._copies = _copy_stream(self.device) if self.device.type == "cuda" else None
        self._image_operation = _LoadImage(view, seed, self.memory_manager)
        self.field_name_to_f_ix = {name: at for at, name in enumerate(self.reader.handlers)}
        self.pipeline_specs = {
            "image": PipelineSpec(info.image_field, decoder=self._image_operation),
            "label": PipelineSpec(info.label_field, decoder=_LoadLabel()),
        }
        self.graph = Graph(
            self.pipeline_specs,
            self.reader.handlers,
            self.field_name_to_f_ix,
            self.reader.metadata,
            None,
        )
        Compiler.set_enabled(False)  # our operations are compiled already (`decode`), FFCV need not
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(True)

    def batches(
        self,
        order: EpochOrder,
        *,
        rank: int,
        world_size: int,
        epoch: int,
        first_step: int = 0,
        size: int | None = None,
    ) -> "Batches":
        """Start decoding the batches of `rank` in `order`, one per step from `first_step` on;
        return their iterator.

        size: side of the images where it is not the view's (never with crop=pad).

        Iterating raises:
            InputError: an image that cannot be decoded, naming its global index.
            RuntimeError: the loading thread failed or stalled.
        """
        assert size in (None, self.view.size) or self.view.crop != "pad", (size, self.view)
        assert order.global_batch_size == self.batch_size * world_size, (order, self.batch_size)
        ring = self._take_ring(size or self.view.size)

        rows = self._rows(order, rank, world_size, first_step)
        return Batches(_Pass(self, ring, rows, epoch))

    def _rows(
        self, order: EpochOrder, rank: int, world_size: int, first_step: int
    ) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """Yield of each step the samples to read, and their global indices; int64 [B] both."""
        pages = _ReadAhead(self._info, self.memory_manager.context, order, rank, world_size)
        with pages if pages.is_of_use else nullcontext():
            for step in range(first_step, order.num_steps):
                if pages.is_of_use:
                    pages.begin(step)
                sample_1B, index_1B = order.of_rank(rank, world_size, step, step + 1)
                yield sample_1B[0], index_1B[0]

    def release(self) -> None:
        """Give back the memory of passes that are over; a later pass takes new memory."""
        self._free_rings.clear()

    def _take_ring(self, side: int) -> "_Ring":
        """Return buffers that no pass uses; those of another size go."""
        while self._free_rings:
            ring = self._free_rings.pop()
            if ring.side == side:
                return ring
        return _Ring(self, side)


class Batches(Iterator[Batch]):
    """An epoch under way. Its thread ends with the last batch, by `close`, or when the iterator is
    garbage-collected; on the CPU its last image is gone then."""

    def __init__(self, underway: "_Pass"):
        self._underway = underway

    def __next__(self) -> Batch:
        return self._underway.take()

    def close(self) -> None:
        """End the thread; may be called again."""
        self._underway.stop()

    def __del__(self) -> None:
        self.close()


class _Blocks(OSCacheManager):
    """Places of the file's data blocks: two sorted arrays, and the file as a memory map."""

    def __init__(self, reader: Reader):
        # an empty entry of another field lies where the next image begins
        table = reader.alloc_table[reader.alloc_table["size"] > 0]
        table = table[np.argsort(table["ptr"], kind="stable")]
        self.reader = reader
        self.ptrs, self.sizes = (np.ascontiguousarray(table[key]) for key in ("ptr", "size"))
        self.context = OSCacheContext(self)


class _ReadAhead:
    """A thread that asks the system for what comes next of an order, before it is needed.

    Of an order in blocks these are pools; where the file is larger than half of the free memory
    they are given back after. Of another order these are the images of the next steps, and only of
    such a file: left alone, the system reads as much around every page as its disk's settings say,
    often megabytes for one image.
    """

    def __init__(
        self,
        info: BetonInfo,
        context: OSCacheContext,
        order: EpochOrder,
        rank: int,
        world_size: int,
    ):
        self._info, self._context = info, context
        self._order, self._ranks = order, (rank, world_size)
        self._ranges: dict[int, list[tuple[int, int]]] = {}  # of parts that are held: first, end
        self._reads: list[Future[None]] = []
        self._is_large = info.num_bytes > available_bytes() / 2
        self._has_pools = order.pools_at(0) is not None
        self._is_over = False
        self.is_of_use = self._has_pools or self._is_large

    def __enter__(self) -> "_ReadAhead":
        self._file = os.open(self._info.path, os.O_RDONLY)
        self._thread = ThreadPoolExecutor(1, "reading ahead")
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.shutdown(cancel_futures=True)
        os.close(self._file)
        if self._is_large:  # a later pass may find more memory, and ask for nothing
            self._context.mmap._mmap.madvise(mmap.MADV_NORMAL)

    def begin(self, step: int) -> None:
        """Say that the rows of a step are needed now."""
        if self._is_large:  # in each step, as a pass that ends takes it back
            self._context.mmap._mmap.madvise(mmap.MADV_RANDOM)
        parts = self._order.pools_at(step)
        if parts is None:
            parts = range(step, min(step + _STEPS_AHEAD, self._order.num_steps))
        for number in parts:
            if number not in self._ranges:
                self._ranges[number] = self._find(number)
                self._reads.append(self._thread.submit(self._ask_for, self._ranges[number]))
        for number in [number for number in self._ranges if number < parts.start]:
            held = self._ranges.pop(number)
            if self._is_large and self._has_pools:
                for first, end in held:
                    start = first - first % mmap.PAGESIZE
                    self._context.mmap._mmap.madvise(mmap.MADV_DONTNEED, start, end - start)
                    os.posix_fadvise(self._file, first, end - first, os.POSIX_FADV_DONTNEED)
        while self._reads and self._reads[0].done():
            self._reads.pop(0).result()  # raises what the read did

    def _find(self, number: int) -> list[tuple[int, int]]:
        """Return the bytes of a pool, or of a step, as few ranges, in the order of the file."""
        if self._has_pools:
            index_P = self._order.pool(*self._ranks, number)
        else:
            index_P = self._order.of_rank(*self._ranks, number, number + 1)[0][0]
        if len(index_P) == 0:
            return []
        first_P = self._info.data_ptr_N[index_P].astype(np.int64)
        by_place_P = np.argsort(first_P)
        first_P, size_P = first_P[by_place_P], self._info.size_N[index_P][by_place_P]
        end_P = first_P + size_P.astype(np.int64)
        gap = _GAP_BYTES if self._has_pools else 0
        cut = np.flatnonzero(first_P[1:] > end_P[:-1] + gap)
        firsts, ends = first_P[[0, *cut + 1]], end_P[[*cut, -1]]
        return list(zip(firsts.tolist(), ends.tolist(), strict=True))

    def _ask_for(self, ranges: list[tuple[int, int]]) -> None:
        for first, end in ranges:
            for start in range(first, end, _ASKED_BYTES):
                if self._is_over:
                    return
                size = min(_ASKED_BYTES, end - start)
                os.posix_fadvise(self._file, start, size, os.POSIX_FADV_WILLNEED)


class _LoadImage(Operation):
    """Decoder of the image field: (image, failed) by `decode.load_batch`."""

    def __init__(self, view: View, seed: int, blocks: _Blocks):
        super().__init__()
        self.view, self.seed, self.blocks = view, seed, blocks
        self.size = view.size  # of the buffers that are allocated next

    def largest_bytes(self) -> int:
        """Return the bytes of the largest decoded image."""
        return int((self.metadata["width"].astype(np.int64) * self.metadata["height"]).max()) * 3

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        shape, bytes_type = (self.size, self.size, 3), np.dtype("u1")
        memory = (AllocationQuery(shape, bytes_type), AllocationQuery((), bytes_type))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=bytes_type), memory

    def generate_code(self) -> Any:
        choices = self.view.choices

        def load(index_B: np.ndarray, memory: Any, metadata: np.ndarray, storage_state: Any) -> Any:
            image, failed = memory
            file_bytes, block_start, block_size, scratch, epoch = storage_state
            stored = (metadata, np.asarray(file_bytes), block_start, block_size)
            decode.load_batch(index_B, image, scratch, failed, *stored, *choices, self.seed, epoch)
            return image, failed

        return load


class _LoadLabel(Operation):
    """Decoder of the label field, int64 [B, 1]."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        kind = np.dtype("<i8")
        return replace(previous_state, jit_mode=True, shape=(1,), dtype=kind), AllocationQuery(
            (1,), kind
        )

    def generate_code(self) -> Any:
        def load(
            index_B: np.ndarray, memory: np.ndarray, metadata: np.ndarray, storage_state: Any
        ) -> np.ndarray:
            memory[:, 0] = metadata[index_B]
            return memory

        return load


class _Ring:
    """Buffers of a pass: a slot for each batch that is decoded and not yet used. Page-locked where
    batches go to a GPU."""

    def __init__(self, loader: BetonLoader, side: int):
        self.side, rows = side, loader.batch_size
        loader._image_operation.size = side  # FFCV asks it for the shapes
        queries = {
            node: query if isinstance(query, tuple) else (query,)
            for node, query in loader.graph.collect_requirements()[0]["operation"].items()
            if query is not None
        }
        # one is with the consumer, one is being filled
        self.num_slots = loader.batches_ahead + 2
        layouts = [
            ((self.num_slots, rows, *query.shape), np.dtype(query.dtype))
            for found in queries.values()
            for query in found
        ]
        layouts.append(((self.num_slots, rows), np.dtype("<i8")))
        # what each thread decodes into and cuts out of; no copy is made of it
        scratch = (loader.num_workers, loader._image_operation.largest_bytes())
        sizes = [math.prod(shape) * kind.itemsize for shape, kind in layouts]
        self.scratch_WX = np.empty(scratch, np.uint8)
        pieces = host_memory.allocate(sizes, loader.device)
        parts = [
            piece.view(kind).reshape(shape)
            for piece, (shape, kind) in zip(pieces, layouts, strict=True)
        ]
        self.index_slots = parts.pop()
        self._memory = {node: tuple(parts.pop(0) for _ in query) for node, query in queries.items()}

    def arguments(self, slot: int) -> dict[str, Any]:
        """Return what FFCV's compiled stages take of a slot."""
        found: dict[str, Any] = {}
        for node, buffers in self._memory.items():
            parts = tuple(buffer[slot] for buffer in buffers)
            found |= {
                f"memory_{node}": parts if len(parts) > 1 else parts[0],
                f"shared_memory_{node}": None,
            }
        return found


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of this process on which batches travel to a device: torch's allocator
    keeps memory that was used on one stream for that stream."""
    return torch.cuda.Stream(device)


class _Pass:
    """A pass under way: a thread that decodes and passes its errors on to the consumer.

    On CUDA the thread starts the copy of each batch and waits for it before it fills the slot
    again. The consumer's stream waits for the copy by an event, the consumer's host for nothing but
    a batch that is not decoded yet. The ring goes back to the loader when the thread has ended, all
    copies are done, and the consumer has said that it needs no more.
    """

    def __init__(
        self,
        loader: BetonLoader,
        ring: _Ring,
        rows: Generator[tuple[np.ndarray, np.ndarray]],
        epoch: int,
    ):
        self.error: BaseException | None = None
        self._loader, self._ring, self._epoch = loader, ring, epoch
        self._rows = rows  # of `BetonLoader._rows`
        with loader.memory_manager.context as context:  # it stays open
            self._file = context.state
        self._queue: queue.Queue[tuple[Batch, torch.cuda.Event | None] | None] = queue.Queue(
            loader.batches_ahead
        )
        self._consumer_left, self._is_over = threading.Event(), False
        self._thread = host_memory.DeviceThread(self._run, loader.device, f"{THREAD_NAME} {epoch}")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._load_all()
        except BaseException as error:
            self.error = error
        self._offer(None)

    def _load_all(self) -> None:
        numba.set_num_threads(self._loader.num_workers)
        stream, num_slots = self._loader._copies, self._ring.num_slots
        copied: list[torch.cuda.Event | None] = [None] * num_slots
        try:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                for step, (sample_B, index_B) in enumerate(self._rows):
                    slot = step % num_slots
                    if (event := copied[slot]) is not None:
                        event.synchronize()
                    batch = self._load(sample_B, slot, index_B)
                    if stream is not None:
                        batch = Batch(
                            *(
                                part.to(self._loader.device, non_blocking=True)
                                for part in (batch.image, batch.label, batch.index)
                            )
                        )
                        copied[slot] = stream.record_event()
                    if not self._offer((batch, copied[slot])):
                        break
        finally:
            self._rows.close()
            for event in filter(None, copied):
                event.synchronize()  # the next pass fills the same slots

    def _load(self, sample_B: np.ndarray, slot: int, index_B: np.ndarray) -> Batch:
        ring = self._ring
        arguments = {
            "batch_indices": sample_B,
            "metadata": self._loader.reader.metadata,
            "storage_state": (*self._file, ring.scratch_WX, self._epoch),
            **ring.arguments(slot),
        }
        stages, outputs = self._loader.code
        for stage, nodes in stages:
            arguments.update(
                zip((f"result_{node}" for node in nodes), stage(**arguments), strict=True)
            )
        (image, failed), label = (arguments[f"result_{node}"] for node in outputs)
        if failed.any():
            bad = sample_B[np.flatnonzero(failed)][:8].tolist()
            raise InputError(
                f"{self._loader.fname}: the images at global indices {bad} cannot be decoded; "
                "the file is damaged, write it again with `tdds write`"
            )
        if self._loader._copies is not None:
            ring.index_slots[slot] = index_B  # copied to the device from where it is page-locked
            label_B, index_B = label[:, 0], ring.index_slots[slot]
        else:
            label_B = label[:, 0].copy()
        return Batch(
            torch.from_numpy(image).permute(0, 3, 1, 2),
            torch.from_numpy(label_B),
            torch.from_numpy(index_B),
        )

    def _offer(self, item: "tuple[Batch, torch.cuda.Event | None] | None") -> bool:
        """Put an item into the queue; return False when the consumer has left."""
        while not self._consumer_left.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    # ---- the consumer's side

    def take(self) -> Batch:
        """Return the next batch; raise StopIteration after the last one."""
        item = self._next_item()
        if item is None:
            self.stop()
            if isinstance(self.error, InputError):
                raise self.error
            if self.error is not None:
                raise RuntimeError(
                    f"loading from {self._loader.fname} failed: {self.error}"
                ) from self.error
            raise StopIteration
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._loader.device)
            stream.wait_event(copied)
            for part in (batch.image, batch.label, batch.index):
                part.record_stream(stream)  # the memory belongs to the stream of the copies
        return batch

    def _next_item(self) -> "tuple[Batch, torch.cuda.Event | None] | None":
        deadline = time.monotonic() + STALL_SECONDS
        while not self._consumer_left.is_set():
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the loading thread died without a word") from self.error
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{self._loader.fname}: no batch for {STALL_SECONDS:.0f} s; the storage or"
                        " a decoding thread hangs"
                    ) from None
        return None

    def stop(self) -> None:
        """End the thread and give up the last batch; may be called again."""
        self._consumer_left.set()
        if threading.current_thread() is not self._thread:  # garbage is collected in any thread
            self._thread.join(timeout=5.0)
        if not self._thread.is_alive() and not self._is_over:
            self._is_over = True
            self._loader._free_rings.append(self._ring)


def block_rows(info: BetonInfo) -> int:
    """Return the images of a file that make a block of about BLOCK_BYTES."""
    return max(1, min(_MOST_BLOCK_ROWS, BLOCK_BYTES * info.num_samples // info.num_bytes))


def usable_threads(num_workers: int) -> int:
    """Return how many threads decode: at most `num_workers`, the CPUs this process may use, and
    numba's own limit, which the user may set with NUMBA_NUM_THREADS."""
    limit: int = numba.config.NUMBA_NUM_THREADS
    return max(1, min(num_workers, len(os.sched_getaffinity(0)), limit))


def default_workers(ranks_per_cpu: int) -> int:
    """Return the decoding threads per rank: the CPUs this process may use, shared among so many
    ranks.

    A launcher that has shared them already says how many a rank has in TDDS_CPUS_PER_RANK.
    """
    if (given := os.environ.get("TDDS_CPUS_PER_RANK", "")).isdecimal() and int(given):
        return int(given)
    return max(1, math.floor(len(os.sched_getaffinity(0)) / ranks_per_cpu))


def torch_threads(ranks_per_cpu: int) -> int:
    """Return torch's threads of a rank on the CPU: OMP_NUM_THREADS where it is set, else those that
    decode.

    The 1 that torchrun sets for several ranks of a node is nobody's choice and does not count.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    is_default = (
        given == "1"
        and "TORCHELASTIC_RUN_ID" in os.environ
        and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    )
    if given.isdecimal() and int(given) and not is_default:
        return int(given)
    return default_workers(ranks_per_cpu)
