"""The FFCV loader: exact coverage, pixels that depend on nothing but (seed, epoch, index), and
faults that surface."""

import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from tdds_dist.data import decode
from tdds_dist.data.beton import IMAGE, JPG, RAW, inspect_beton, read_images
from tdds_dist.data.check import check
from tdds_dist.data.loader import (
    BATCHES_AHEAD,
    THREAD_NAME,
    BetonLoader,
    View,
    _ReadAhead,
    find_undecodable,
)
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed.partition import PADDING, epoch_order
from tests.make import refused
from tests.ranks import run_ranks


def loader_of(path, *arguments, **options):
    return BetonLoader(inspect_beton(path), *arguments, **options)


def begin(loader, order, epoch=0, **options):
    """A pass on a rank that is alone."""
    return loader.batches(order, rank=0, world_size=1, epoch=epoch, **options)


def images_of(batches):
    return [batch.image.clone() for batch in batches]


def read_epoch(
    path,
    view,
    *,
    global_batch=12,
    world_size=1,
    epoch=0,
    seed=0,
    workers=1,
    shuffle=True,
    subset=None,
):
    """Images and labels by global index, and how often each was seen, over all ranks in turn."""
    info = inspect_beton(path)
    num = info.num_samples if subset is None else len(subset)
    order = epoch_order(num, global_batch, seed=seed, epoch=epoch, shuffle=shuffle, subset=subset)
    images = np.zeros((info.num_samples, view.size, view.size, 3), dtype=np.uint8)
    labels, seen = np.full(info.num_samples, -1), np.zeros(info.num_samples, dtype=int)
    for rank in range(world_size):
        loader = BetonLoader(info, global_batch // world_size, view, num_workers=workers, seed=seed)
        for batch in loader.batches(order, rank=rank, world_size=world_size, epoch=epoch):
            real = (batch.index >= 0).numpy()
            index = batch.index.numpy()[real]
            images[index] = batch.image.permute(0, 2, 3, 1).numpy()[real]
            labels[index] = batch.label.numpy()[real]
            np.add.at(seen, index, 1)
    return images, labels, seen


@pytest.mark.parametrize(
    ("world_size", "per_rank", "epoch"),
    [(1, 1, 0), (1, 32, 1), (2, 5, 1), (3, 1, 1), (3, 32, 0), (3, 100, 0)],
)
def test_every_index_exactly_once(betons, world_size, per_rank, epoch):
    _, labels, seen = read_epoch(
        betons["raw"],
        View(32),
        global_batch=per_rank * world_size,
        world_size=world_size,
        epoch=epoch,
    )
    assert (seen == 1).all()
    assert np.array_equal(labels, inspect_beton(betons["raw"]).label_N)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4))]
)
def test_every_index_exactly_once_on_real_ranks(betons, world_size):
    """N below, at and around multiples of the number of ranks, and a batch larger than the data."""
    for cases in run_ranks(world_size, _indices_of_rank, world_size, betons["raw"]):
        assert len(cases) >= 8
        for num, per_rank, num_batches, index in cases:
            assert num_batches == math.ceil(num / (per_rank * world_size))
            assert sorted(index) == list(range(num)), (num, per_rank)


def _indices_of_rank(rank, world_size, path):
    """On this rank, for each case: (N, rows per rank, batches seen, indices gathered from all
    ranks)."""
    from tdds_dist.distributed import collectives, world

    cases = []
    sizes = {1, max(1, world_size - 1), world_size, world_size + 1, 5 * world_size - 1, 97}
    for num in sorted(sizes):
        for per_rank in (1, 10):
            order = epoch_order(num, per_rank * world_size, epoch=4, subset=np.arange(num))
            loader = loader_of(path, per_rank, View(32))
            batches = [
                batch.index
                for batch in loader.batches(order, rank=rank, world_size=world_size, epoch=4)
            ]
            gathered = collectives.gather_objects(
                torch.cat(batches).tolist(), world.current_world("cpu")
            )
            found = [index for part in gathered for index in part if index >= 0]
            cases.append((num, per_rank, len(batches), found))
    return cases


def test_a_subset_is_visited_once_and_nothing_else(betons):
    subset = np.array([3, 4, 50, 96, 11])
    _, _, seen = read_epoch(
        betons["raw"], View(32), global_batch=4, world_size=2, subset=np.sort(subset)
    )
    assert np.flatnonzero(seen).tolist() == sorted(subset)
    assert seen.max() == 1


def test_without_augmentation_pixels_are_those_of_the_file(betons):
    images, _, _ = read_epoch(betons["raw"], View(32))
    assert np.array_equal(images, np.stack(read_images(betons["raw"], range(97))))


VIEWS = {"pad": View(32, "pad", flip=True, padding=4), "resized": View(24, "resized", flip=True)}


@pytest.mark.parametrize("crop", VIEWS)
def test_augmentation_depends_on_seed_epoch_and_index_only(betons, crop):
    path = betons["raw" if crop == "pad" else "big"]
    images, _, _ = read_epoch(path, VIEWS[crop])
    for other in (
        {"workers": 2},
        {"world_size": 3},
        {"global_batch": 50, "world_size": 2, "workers": 2},
    ):
        assert np.array_equal(images, read_epoch(path, VIEWS[crop], **other)[0]), other
    for other in ({"epoch": 1}, {"seed": 1}):
        differ = (images != read_epoch(path, VIEWS[crop], **other)[0]).any(axis=(1, 2, 3))
        assert differ.mean() > 0.8, other


def test_pad_crop_is_a_shift_with_black_border_and_a_fair_flip(betons):
    originals = np.stack(read_images(betons["raw"], range(97)))
    padded = np.pad(originals, ((0, 0), (4, 4), (4, 4), (0, 0)))
    # [N, 9, 9, 3, 32, 32]
    views = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(1, 2))
    found = []
    for epoch in range(3):
        images, _, _ = read_epoch(betons["raw"], VIEWS["pad"], epoch=epoch, global_batch=97)
        for image, view in zip(images.transpose(0, 3, 1, 2), views, strict=True):
            places = [
                (*place, flip)
                for flip in (1, -1)
                for place in np.argwhere((view == image[..., ::flip]).all(axis=(2, 3, 4)))
            ]
            assert len(places) == 1
            found += places
    # 291 draws, both ends included
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == set(range(9))
    assert 0.35 < np.mean([flip == 1 for *_, flip in found]) < 0.65


def test_random_resized_crop_follows_torchvision(betons):
    areas, ratios = [], []
    for index in range(4000):
        key = np.uint64(decode.sample_key(0, 0, index))
        top, left, h, w = decode.random_resized_crop(key, 300, 400, 0.08, 1.0)
        assert 0 <= top <= 300 - h
        assert 0 <= left <= 400 - w
        areas.append(h * w / (300 * 400))
        ratios.append(w / h)
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.zeros(3, 300, 400)
    boxes = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    for ours, theirs in [
        (areas, [h * w / 120_000 for _, _, h, w in boxes]),
        (ratios, [w / h for _, _, h, w in boxes]),
    ]:
        for quantile in (0.1, 0.5, 0.9):
            assert np.quantile(ours, quantile) == pytest.approx(
                np.quantile(theirs, quantile), abs=0.03
            )


SHAPES = [(1, 1), (1, 60), (60, 1), (2, 2), (2, 1), (3, 3000), (3000, 3), (1, 65500), (65500, 1)]


@pytest.fixture(scope="module")
def slivers(tmp_path_factory):
    """A raw file and a JPEG file of images of `SHAPES`, image i in the one colour i."""
    folder, source = tmp_path_factory.mktemp("slivers"), open_source(f"synthetic:{len(SHAPES)},2,8")
    source = replace(source, reader=lambda i: np.full((*SHAPES[i], 3), 20 * i, np.uint8))
    for mode in ("raw", "jpg"):
        write_beton(
            source, folder / f"{mode}.beton", write_mode=mode, num_workers=1, progress=False
        )
    return folder


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize(
    "view",
    [
        View(9, "center", ratio=0.875),
        View(224, "center", ratio=0.01),
        View(9, "resized", flip=True),
        View(1, "resized", scale=(1e-6, 1e-6)),
    ],
)
def test_a_side_of_one_pixel_gives_an_image_and_does_not_end_the_process(slivers, mode, view):
    """OpenCV raises where a crop is empty, and an exception of C++ in a kernel is an abort."""
    info = inspect_beton(slivers / f"{mode}.beton")
    assert check(info.path, progress=False).faults == {}
    for epoch in range(3):
        images, _, seen = read_epoch(info.path, view, global_batch=4, epoch=epoch)
        assert (seen == 1).all()
        for i, image in enumerate(images):
            assert np.abs(image.astype(int) - 20 * i).max() <= (0 if mode == "raw" else 1)


@pytest.mark.parametrize(
    ("height", "width", "ratio", "box"),
    [
        (256, 256, 0.875, (16, 16, 224, 224)),
        (40, 48, 0.875, (2, 6, 35, 35)),
        (40, 48, 1.0, (0, 4, 40, 40)),
        (1, 60, 0.875, (0, 29, 1, 1)),
        (60, 1, 0.875, (29, 0, 1, 1)),
        (1, 1, 0.01, (0, 0, 1, 1)),
        (3000, 3, 0.3, (1499, 1, 1, 1)),
        (2, 2, 0.875, (0, 0, 1, 1)),
        (5, 9, 1.5, (0, 2, 5, 5)),
    ],
)
def test_a_center_crop_lies_in_the_image_and_is_not_empty(height, width, ratio, box):
    assert decode.center_crop(height, width, ratio) == box


def test_one_huge_image_among_thumbnails_costs_its_size_per_thread_not_per_image():
    small, large = 500, 3000 * 2000 * 3
    image_B = np.zeros(small + 1, IMAGE)
    image_B["mode"], image_B["width"], image_B["height"] = RAW, 1, 1
    image_B["width"][7], image_B["height"][7] = 3000, 2000
    size_B = image_B["width"].astype(np.uint64) * image_B["height"] * np.uint64(3)
    image_B["data_ptr"] = np.cumsum(size_B) - size_B
    data = np.zeros(int(size_B.sum()), np.uint8)
    tracemalloc.start()
    try:
        assert not find_undecodable(data, image_B, size_B, num_workers=2).any()
        assert tracemalloc.get_traced_memory()[1] < 3 * large
    finally:
        tracemalloc.stop()


def test_a_row_whose_bytes_lie_outside_the_file_fails_and_is_not_read():
    image_B = np.zeros(4, IMAGE)
    image_B["width"] = image_B["height"] = 2
    image_B["mode"], image_B["data_ptr"] = [RAW, RAW, JPG, RAW], [0, 12, 24, 36]
    record_B = np.zeros(4, np.dtype([("", IMAGE), ("", "<i8")], align=True))
    record_B["f0"] = image_B
    record_B.setflags(write=False)
    data, failed_B = np.zeros(24, np.uint8), np.empty(4, np.uint8)  # the last two are not there
    data.setflags(write=False)
    size_B = np.array([12, 12, 2**40, 12], np.uint64)
    scratch, images = np.empty((2, 12), np.uint8), np.empty((4, 1, 1, 3), np.uint8)
    blocks = (image_B["data_ptr"].copy(), size_B)
    choices = (decode.CENTER, False, 0, 1.0, 0.08, 1.0, 0, 0)
    decode.load_batch(
        np.arange(4), images, scratch, failed_B, record_B["f0"], data, *blocks, *choices
    )
    assert failed_B.tolist() == [0, 0, 1, 1]


def test_numbas_own_limit_of_threads_is_kept(betons):
    """NUMBA_NUM_THREADS below the CPUs: numba refuses more."""
    code = f"""
from pathlib import Path
from tests.data.test_loader import *
path = Path({str(betons["raw"])!r})
assert check(path, num_workers=2, progress=False).faults == {{}}
assert loader_of(path, 4, View(32), num_workers=2).num_workers == 1
assert (read_epoch(path, View(32), workers=2)[2] == 1).all()
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"NUMBA_NUM_THREADS": "1"}
    )


def test_batches_are_channels_last_and_the_last_one_is_full(betons):
    batches = list(begin(loader_of(betons["raw"], 20, View(32)), epoch_order(97, 20)))
    assert len(batches) == 5
    for batch in batches:
        assert batch.image.shape == (20, 3, 32, 32)
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        assert batch.index.dtype == batch.label.dtype == torch.int64
    assert (batches[-1].index == -1).sum() == 3


def test_an_epoch_can_start_in_the_middle(betons):
    order = epoch_order(97, 10, epoch=3)
    loader = loader_of(betons["raw"], 10, VIEWS["pad"])
    whole, rest = list(_copies(loader, order)), list(_copies(loader, order, first_step=6))
    assert len(rest) == 4
    for found, expected in zip(rest, whole[6:], strict=True):
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.image, expected.image)


@pytest.mark.parametrize(("free", "block_rows"), [(0, 2), (1 << 60, 2), (0, None), (1 << 60, None)])
def test_bytes_are_asked_for_ahead(betons, monkeypatch, free, block_rows):
    """Every byte of an image once: in blocks, also where memory is given back, and in any order of
    a file that memory may not hold; the images are the same."""
    found, asked, given_back = [], [], []
    find, advise = _ReadAhead._find, os.posix_fadvise

    def note_found(pages, number):
        found.extend(ranges := find(pages, number))
        return ranges

    def note_advice(file, start, length, advice):
        notes = asked if advice == os.POSIX_FADV_WILLNEED else given_back
        notes.append((start, start + length))
        advise(file, start, length, advice)

    monkeypatch.setattr("tdds_dist.data.loader.available_bytes", lambda: free)
    monkeypatch.setattr("tdds_dist.data.loader._GAP_BYTES", 0)
    monkeypatch.setattr(_ReadAhead, "_find", note_found)
    monkeypatch.setattr(os, "posix_fadvise", note_advice)
    loader = loader_of(betons["raw"], 10, VIEWS["pad"])
    batches = list(_copies(loader, epoch_order(97, 10, epoch=3, block_rows=block_rows)))
    info = inspect_beton(betons["raw"])
    is_asked = block_rows is not None or free == 0
    times_N = np.bincount(epoch_order(97, 10, epoch=3).of_rank(0, 1)[0].ravel())  # with padding
    for index in range(97):
        first, size = int(info.data_ptr_N[index]), int(info.size_N[index])
        times = times_N[index] if block_rows is None else 1
        num = sum(start <= first and first + size <= end for start, end in found)
        assert num == times * is_asked
    assert set(asked) <= set(found), "in the same pieces, as these are small"
    assert bool(asked) == is_asked
    assert bool(given_back) == (block_rows is not None and free == 0)
    assert set(given_back) < set(found) or not is_asked
    wanted = {
        int(index): image
        for batch in _copies(loader, epoch_order(97, 10, epoch=3))
        for index, image in zip(batch.index, batch.image, strict=True)
    }
    for batch in batches:
        for index, image in zip(batch.index, batch.image, strict=True):
            assert index == PADDING or torch.equal(image, wanted[int(index)])


def test_of_a_large_file_no_page_brings_others(betons, monkeypatch):
    """Also when one pass ends within another; afterwards the system may read around again."""

    def is_random():
        with open("/proc/self/smaps") as file:
            maps = file.read().split(str(betons["raw"]))[1:]
        return any(re.search(r"^VmFlags:.* rr\b", text, re.MULTILINE) for text in maps)

    monkeypatch.setattr("tdds_dist.data.loader.available_bytes", lambda: 0)
    monkeypatch.setattr("tdds_dist.data.loader.BATCHES_AHEAD", 1)
    loader = loader_of(betons["raw"], 10, VIEWS["pad"])
    first, second = (begin(loader, epoch_order(97, 10, epoch=epoch), epoch) for epoch in (0, 1))
    next(second)
    assert is_random()
    list(first)
    for _ in range(4):
        next(second)
    assert is_random()
    list(second)
    first.close()
    second.close()
    assert not is_random()


def _copies(loader, order, **options):
    for batch in begin(loader, order, 3, **options):
        yield replace(batch, image=batch.image.clone(), index=batch.index.clone())


@pytest.mark.parametrize("view", [View(24, "resized", flip=True), View(24, "center", ratio=0.9)])
def test_a_size_of_its_own_is_that_of_a_loader_made_for_it(betons, view):
    """Buffers follow, back as well, and also while another pass of the same loader is under way."""
    order = epoch_order(61, 10, epoch=1)
    loader = loader_of(betons["big"], 10, view)
    under_way = begin(loader, order, 1)
    first = next(under_way).image.clone()
    for size in (40, 9, None):
        same = loader_of(betons["big"], 10, replace(view, size=size or 24))
        whole = images_of(begin(same, order, 1))
        found = images_of(begin(loader, order, 1, size=size))
        assert found[0].shape == (10, 3, size or 24, size or 24)
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))
    rest = [first, *images_of(under_way)]
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def test_two_epochs_of_one_loader_at_once(betons):
    """The next epoch is started before this one is over: each keeps its own augmentation."""
    loader = loader_of(betons["raw"], 10, VIEWS["pad"])
    orders = [epoch_order(97, 10, epoch=epoch) for epoch in (0, 1)]
    alone = [images_of(begin(loader, order, epoch)) for epoch, order in enumerate(orders)]
    both = [begin(loader, order, epoch) for epoch, order in enumerate(orders)]
    for expected in zip(*alone, strict=True):
        for image, batches in zip(expected, both, strict=True):
            assert torch.equal(image, next(batches).image)
    assert [next(batches, None) for batches in both] == [None, None]


def test_decoding_starts_before_the_first_batch_is_asked_for(betons, monkeypatch):
    """As many batches as fit, and no more until one is taken."""
    started, load_batch = [], decode.load_batch
    monkeypatch.setattr(
        decode, "load_batch", lambda *arguments: (started.append(1), load_batch(*arguments))
    )
    batches = begin(loader_of(betons["raw"], 10, View(32)), epoch_order(97, 10))
    _wait_for(lambda: len(started) == BATCHES_AHEAD + 1)
    time.sleep(0.3)
    assert len(started) == BATCHES_AHEAD + 1
    next(batches)
    _wait_for(lambda: len(started) == BATCHES_AHEAD + 2)
    batches.close()


def test_what_is_closed_has_no_more_batches(betons):
    batches = begin(loader_of(betons["raw"], 10, View(32)), epoch_order(97, 10))
    first = next(batches).index.clone()
    assert (first >= 0).all()
    before = _decoding_threads()
    batches.close()
    assert len(before) == 1
    assert not before[0].is_alive()
    assert list(batches) == []
    batches.close()


def test_buffers_are_kept_from_pass_to_pass_and_never_shared(betons):
    """The pass that follows begins while a batch of the one before is still in use: on the CPU that
    batch lies in the buffers."""
    loader = loader_of(betons["raw"], 10, View(32))

    orders = [epoch_order(40, 10, seed=1, epoch=epoch) for epoch in range(3)]
    first = begin(loader, orders[0])
    used = [next(first).image.data_ptr() for _ in range(3)]
    last = next(first).image
    before = last.clone()
    _wait_for(lambda: not _decoding_threads())
    images = [batch.image.data_ptr() for batch in begin(loader, orders[1], 1)]
    assert torch.equal(last, before)
    assert next(first, None) is None
    again = [batch.image.data_ptr() for batch in begin(loader, orders[2], 2)]
    assert not set(images) & {*used, last.data_ptr()}
    assert again == [*used, last.data_ptr()]


def _decoding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def _wait_for(is_so):
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- faults


def test_a_corrupt_image_is_named_by_its_index(betons, tmp_path):
    info = inspect_beton(betons["big"])
    damaged = tmp_path / "damaged.beton"
    content = bytearray(betons["big"].read_bytes())
    start, size = int(info.data_ptr_N[17]), int(info.size_N[17])
    content[start : start + size] = bytes(size)
    damaged.write_bytes(content)
    refused(r"global indices \[17\] cannot be decoded", read_epoch, damaged, VIEWS["resized"])


def test_an_exception_in_the_loading_thread_reaches_the_consumer_at_once(betons, monkeypatch):
    def fail(*arguments):
        raise ValueError("boom")

    monkeypatch.setattr(decode, "load_batch", fail)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="boom"):
        read_epoch(betons["raw"], View(32))
    assert time.monotonic() - started < 5


def test_a_stall_is_an_error(betons, monkeypatch):
    monkeypatch.setattr("tdds_dist.data.loader.STALL_SECONDS", 1.0)
    monkeypatch.setattr(decode, "load_batch", lambda *arguments: time.sleep(1.5))
    with pytest.raises(RuntimeError, match="no batch for 1 s"):
        read_epoch(betons["raw"], View(32))


def test_leaving_early_ends_the_thread(betons):
    before = threading.active_count()
    loader = loader_of(betons["raw"], 2, View(32))
    for _ in range(3):
        for batch in begin(loader, epoch_order(97, 2)):
            assert batch.image.shape[0] == 2
            break
    _wait_for(lambda: threading.active_count() == before)


def test_the_thread_count_of_torch_is_left_alone(betons):
    torch.set_num_threads(2)
    read_epoch(betons["raw"], View(32), workers=1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_pad_crop_of_other_sizes_is_refused(betons):
    said = r"needs images of exactly 32x32.*crop=resized"
    refused(said, loader_of, betons["big"], 4, View(32, "pad"))


# ---- on a GPU


def cuda_tests(function):
    return pytest.mark.cuda(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(function)
    )


@cuda_tests
def test_on_cuda_nobody_waits_and_nothing_is_overwritten(betons):
    """The device lags seconds behind the host, which may not wait for it while it takes all batches
    of an epoch: copies run beside the computation, and what a step reads is not written over, on
    the host or on the device."""
    expected = torch.from_numpy(np.stack(read_images(betons["raw"], range(97))))
    order = epoch_order(97, 4)
    loader = loader_of(betons["raw"], 4, View(32), device="cuda")
    sums, large = [], torch.randn(4000, 4000, device="cuda")
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in itertools.chain.from_iterable(
            begin(loader, order)
            for _ in range(2)  # the second pass fills the buffers of the first
        ):
            for _ in range(20):
                large = large @ large * 1e-4
            # Freed at once on the host, and used by what is queued.
            sums.append(
                (batch.index.clone(), batch.label.clone(), batch.image.double().sum(dim=(1, 2, 3)))
            )
            del batch
        done.record()
        assert not done.query(), "the host waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seen = torch.cat([index for index, _, _ in sums]).cpu()
    assert sorted(seen[seen >= 0].tolist()) == sorted([*range(97)] * 2)
    label_N = torch.from_numpy(inspect_beton(betons["raw"]).label_N)
    for index, label, total in sums:
        real = (index >= 0).cpu()
        assert torch.equal(label.cpu()[real], label_N[index.cpu()[real]].long())
        assert torch.equal(
            total.cpu()[real], expected[index.cpu()[real]].double().sum(dim=(1, 2, 3))
        )


@cuda_tests
def test_on_cuda_batches_are_on_the_device_as_the_network_wants_them(betons):
    order = epoch_order(97, 10, epoch=3)
    on_cpu = list(_copies(loader_of(betons["raw"], 10, VIEWS["pad"]), order))
    on_gpu = list(_copies(loader_of(betons["raw"], 10, VIEWS["pad"], device="cuda"), order))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.image.is_cuda
        assert b.image.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.image, b.image.cpu())
        assert torch.equal(a.label, b.label.cpu())
        assert torch.equal(a.index, b.index.cpu())


@cuda_tests
def test_on_cuda_buffers_are_pinned(betons):
    batches = begin(loader_of(betons["raw"], 10, View(32), device="cuda"), epoch_order(97, 10))
    next(batches)
    ring = batches._underway._ring
    for buffer in [ring.index_slots, *itertools.chain(*ring._memory.values())]:
        assert torch.from_numpy(buffer).is_pinned()
    batches.close()
