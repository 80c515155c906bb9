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
asked for; ours copies ahead of that, from pinned buffers, on a stream of its own.
"""

# B rows per rank and step, S steps, N samples of the file

import math
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

# the others abort with two loaders, or after a fork
os.environ.setdefault("NUMBA_THREADING_LAYER", "tbb")

import ffcv
import numba
import numpy as np
import torch
from ffcv.loader.epoch_iterator import EpochIterator, select_buffer
from ffcv.memory_managers import OSCacheManager
from ffcv.memory_managers.os_cache import OSCacheContext
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from torch import Tensor

from tdds_dist.data import decode
from tdds_dist.data.beton import IMAGE, BetonInfo
from tdds_dist.distributed.partition import EpochOrder
from tdds_dist.errors import InputError

BATCHES_AHEAD = 3  # decoded before they are asked for
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


@dataclass(frozen=True)
class Batch:
    """One step of one rank. `image` uint8 [B, 3, size, size] in channels_last memory; on the CPU it
    is valid until the next batch only. `label` and `index` int64 [B] are copies; `index` is -1 in
    padding rows."""

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
    if os.environ["NUMBA_THREADING_LAYER"] == "tbb" and not _has_tbb():
        raise InputError(
            "numba cannot load Intel TBB (libtbb.so.12), which decodes images in parallel; install"
            " Debian's libtbb12 or conda-forge's tbb, or set NUMBA_THREADING_LAYER=omp"
        )


def _has_tbb() -> bool:
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
    corner_BSS3, scratch_BX, failed_B = (
        np.empty(shape, np.uint8) for shape in ((num, 1, 1, 3), (num, pixels), num)
    )
    record_B.setflags(write=False)
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(num_workers, len(os.sched_getaffinity(0)))))
    try:
        # The crop that costs least: one pixel of each image is kept.
        decode.load_batch(
            np.arange(num),
            corner_BSS3,
            scratch_BX,
            failed_B,
            record_B["f0"],
            data,
            image_B["data_ptr"].copy(),
            size_B,
            decode.PAD,
            False,
            0,
            1.0,
            0.08,
            1.0,
            0,
            0,
        )
    finally:
        numba.set_num_threads(before)
    return failed_B.astype(bool)


class BetonLoader(ffcv.Loader):
    """Reads one `.beton` for one rank.

    Args:
        info: the file, as `inspect_beton` found it; any names for its one image and one label
        field. batch_size: rows per step of this rank. view: what is done to images. device: where
        batches go. num_workers: decoding threads. seed: of the augmentation.

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
        self.num_workers = max(1, min(num_workers, len(os.sched_getaffinity(0))))
        self.drop_last, self.distributed, self.recompile, self.seed = False, False, False, seed
        self.reader = Reader(self.fname)
        self.indices = np.arange(self.reader.num_samples, dtype=np.int64)
        self.memory_manager = _Blocks(self.reader)
        self.next_epoch = 0
        self._image_operation = _LoadImage(view, seed, self.memory_manager)
        self.field_name_to_f_ix = {
            name: position for position, name in enumerate(self.reader.handlers)
        }
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
        self, order: EpochOrder, *, rank: int, world_size: int, epoch: int, size: int | None = None
    ) -> "Batches":
        """Start decoding the batches of `rank` in `order`, one per step; return their iterator.

        size: side of the images where it is not the view's (never with crop=pad).

        Iterating raises:
            InputError: an image that cannot be decoded, naming its global index.
            RuntimeError: the loading thread failed or stalled.
        """
        assert size in (None, self.view.size) or self.view.crop != "pad", (size, self.view)
        sample_SB, index_SB = (
            np.ascontiguousarray(part) for part in order.of_rank(rank, world_size)
        )
        assert sample_SB.shape[1] == self.batch_size, (sample_SB.shape, self.batch_size)
        # FFCV asks for it when the thread allocates its buffers
        self._image_operation.size = size or self.view.size
        return Batches(_EpochThread(self, sample_SB, index_SB, epoch))


class Batches(Iterator[Batch]):
    """An epoch under way. Its thread ends with the last batch, by `close`, or when the iterator is
    garbage-collected."""

    def __init__(self, thread: "_EpochThread"):
        self._thread = thread

    def __next__(self) -> Batch:
        return next(self._thread)

    def close(self) -> None:
        """End the thread; may be called again."""
        self._thread.stop()

    def __del__(self) -> None:
        self.close()


class _Blocks(OSCacheManager):
    """Where the file's data blocks lie: two sorted arrays, and the file as a memory map."""

    def __init__(self, reader: Reader):
        order = np.argsort(reader.alloc_table["ptr"], kind="stable")
        self.reader = reader
        self.ptrs = np.ascontiguousarray(reader.alloc_table["ptr"][order])
        self.sizes = np.ascontiguousarray(reader.alloc_table["size"][order])
        self.context = OSCacheContext(self)


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
        view, crop = (
            self.view,
            {"center": decode.CENTER, "pad": decode.PAD, "resized": decode.RESIZED}[self.view.crop],
        )

        def load(index_B: np.ndarray, memory: Any, metadata: np.ndarray, storage_state: Any) -> Any:
            image, failed = memory
            file_bytes, block_start, block_size, scratch, epoch = storage_state
            decode.load_batch(
                index_B,
                image,
                scratch,
                failed,
                metadata,
                np.asarray(file_bytes),
                block_start,
                block_size,
                crop,
                view.flip,
                view.padding,
                view.ratio,
                view.scale[0],
                view.scale[1],
                self.seed,
                epoch,
            )
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


class _EpochThread(EpochIterator):
    """FFCV's loading thread, which also passes its errors on to the consumer, and can be ended.

    It fills a ring of buffers, two more than its queue holds: one is with the consumer, one is
    being filled. On CUDA they are pinned; this thread starts the copy of each on a stream of its
    own and waits for it before it fills the buffer again. The consumer's stream waits for the copy
    by an event, the consumer's host for nothing but a batch that is not decoded yet.
    """

    def __init__(
        self, loader: BetonLoader, sample_SB: np.ndarray, index_SB: np.ndarray, epoch: int
    ):
        self.error: BaseException | None = None
        self._epoch, self._on_gpu = epoch, loader.device.type == "cuda"
        self._index_SB = (
            torch.from_numpy(index_SB).pin_memory() if self._on_gpu else torch.from_numpy(index_SB)
        )
        # One batch is decoded at a time, so what is cut out of may be overwritten by the next.
        self._scratch_BX = np.empty(
            (loader.batch_size, loader._image_operation.largest_bytes()), np.uint8
        )
        super().__init__(loader, sample_SB.reshape(-1))

    def run(self) -> None:
        try:
            self._load_all()
        except BaseException as error:
            self.error = error
        self._offer(None)

    def _load_all(self) -> None:
        numba.set_num_threads(self.loader.num_workers)
        stream = torch.cuda.Stream(self.loader.device) if self._on_gpu else None
        copied: list[torch.cuda.Event | None] = [None] * (self.loader.batches_ahead + 2)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for step, sample_B in enumerate(self.iter_ixes):
                slot = step % len(copied)
                if (event := copied[slot]) is not None:
                    event.synchronize()
                batch = self._load(sample_B, slot, self._index_SB[step])
                if stream is not None:
                    batch = Batch(
                        *(
                            part.to(self.loader.device, non_blocking=True)
                            for part in (batch.image, batch.label, batch.index)
                        )
                    )
                    copied[slot] = stream.record_event()
                if not self._offer((batch, copied[slot])):
                    break
        for event in filter(None, copied):
            event.synchronize()  # the buffers go with this thread

    def _load(self, sample_B: np.ndarray, slot: int, index_B: Tensor) -> Batch:
        arguments = {
            "batch_indices": sample_B,
            "metadata": self.metadata,
            "storage_state": (*self.storage_state, self._scratch_BX, self._epoch),
            **{
                f"memory_{node}": select_buffer(buffer, slot, len(sample_B))
                for node, buffer in self.memory_allocations["operation"].items()
            },
            **{f"shared_memory_{node}": None for node in self.memory_allocations["shared"]},
        }
        stages, outputs = self.loader.code
        for stage, nodes in stages:
            arguments.update(
                zip((f"result_{node}" for node in nodes), stage(**arguments), strict=True)
            )
        (image, failed), label = (arguments[f"result_{node}"] for node in outputs)
        if failed.any():
            bad = sample_B[np.flatnonzero(failed)][:8].tolist()
            raise InputError(
                f"{self.loader.fname}: the images at global indices {bad} cannot be decoded; "
                "the file is damaged, write it again with `tdds write`"
            )
        label_B = label[:, 0] if self._on_gpu else label[:, 0].copy()
        return Batch(
            torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(label_B), index_B
        )

    def _offer(self, item: "tuple[Batch, torch.cuda.Event | None] | None") -> bool:
        """Put an item into the queue; return False when the consumer has left."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Batch:
        item = self._take()
        if item is None:
            self.stop()
            if isinstance(self.error, InputError):
                raise self.error
            if self.error is not None:
                raise RuntimeError(
                    f"loading from {self.loader.fname} failed: {self.error}"
                ) from self.error
            raise StopIteration
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self.loader.device)
            stream.wait_event(copied)
            for part in (batch.image, batch.label, batch.index):
                part.record_stream(stream)  # the memory belongs to the stream of the copies
        return batch

    def _take(self) -> "tuple[Batch, torch.cuda.Event | None] | None":
        deadline = time.monotonic() + STALL_SECONDS
        while True:
            try:
                return self.output_queue.get(timeout=1.0)
            except queue.Empty:
                if not self.is_alive() and self.output_queue.empty():
                    if self.terminate_event.is_set():
                        return None
                    raise RuntimeError("the loading thread died without a word") from self.error
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{self.loader.fname}: no batch for {STALL_SECONDS:.0f} s; the storage or a"
                        " decoding thread hangs"
                    ) from None

    def stop(self) -> None:
        """End the thread, from the consumer's side."""
        self.terminate_event.set()
        if threading.current_thread() is not self:  # the garbage collector runs in any thread
            self.join(timeout=5.0)
        self.close()


def default_workers(local_world_size: int) -> int:
    """Return the decoding threads per rank: the CPUs this process may use, shared among the ranks
    of the node.

    A launcher that has shared them already says how many a rank has in TDDS_CPUS_PER_RANK.
    """
    if (given := os.environ.get("TDDS_CPUS_PER_RANK", "")).isdecimal() and int(given):
        return int(given)
    return max(1, math.floor(len(os.sched_getaffinity(0)) / local_world_size))
