"""Decoding and augmentation of one batch, compiled: what FFCV's decoders do, with randomness that
is a function.

Every random choice is a hash of (seed, epoch, global index, counter), so an image of an epoch looks
the same whatever rank, worker or resume produced it (FFCV's own operations draw from unseeded
per-thread generators). Decoder return codes are kept, where FFCV drops them. The kernels are cached
on disk by numba: a second process starts in a fraction of the time that compilation takes. They
call FFCV's C library for JPEG decoding and resizing. No exception may leave a kernel or that
library, since it would end the process: what a kernel takes is checked in it, and a row that is
unfit counts as failed.
"""

# B rows of the batch, S output side, W threads

import llvmlite.binding
import numba
import numba.typed
import numpy as np
from numba import types

# FFCV keeps the numbers of its two image modes in a dictionary of numba, for which numba compiles
# for 4 seconds in every process. Only Python code reads them, so that a plain one does. Whoever
# imports FFCV imports this module first.
_compiled = numba.typed.Dict
numba.typed.Dict = dict
try:
    import ffcv.libffcv
finally:
    numba.typed.Dict = _compiled

CENTER, PAD, RESIZED = 0, 1, 2  # ways to crop
JPEG = 0  # FFCV's image mode; 1 is raw

llvmlite.binding.load_library_permanently(ffcv.libffcv.lib._name)
_pointer, _side = types.uintp, types.uint32
_imdecode = types.ExternalFunction(
    "imdecode",
    types.int32(
        _pointer, types.uint64, _side, _side, _pointer, *[_side] * 6, types.boolean, types.boolean
    ),
)
_resize = types.ExternalFunction("resize", types.void(*[types.int64] * 11))


@numba.njit(cache=True)
def _mix(x):  # type: ignore[no-untyped-def]
    """Mix 64 bits by the finaliser of SplitMix64, a bijection whose results look random."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True)
def sample_key(seed, epoch, index):  # type: ignore[no-untyped-def]
    """Return the key of one image in one epoch; uint64."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mix(np.uint64(seed) + golden)
    key = _mix(key ^ (np.uint64(epoch) + golden))
    return _mix(key ^ (np.uint64(index) + golden))


@numba.njit(cache=True)
def uniform(key, counter):  # type: ignore[no-untyped-def]
    """Return the `counter`-th number of a key, uniform in [0, 1)."""
    bits = _mix(key + np.uint64(counter + 1) * np.uint64(0x9E3779B97F4A7C15))
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True)
def random_resized_crop(key, height, width, scale_low, scale_high):  # type: ignore[no-untyped-def]
    """Draw the box (top, left, height, width) of torchvision's RandomResizedCrop, aspect ratio in
    [3/4, 4/3]."""
    log_low, log_high = np.log(3.0 / 4.0), np.log(4.0 / 3.0)
    for attempt in range(10):
        area = height * width * (scale_low + (scale_high - scale_low) * uniform(key, 4 * attempt))
        ratio = np.exp(log_low + (log_high - log_low) * uniform(key, 4 * attempt + 1))
        w = int(round(np.sqrt(area * ratio)))
        h = int(round(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(key, 4 * attempt + 2) * (height - h + 1))
            left = int(uniform(key, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    ratio = width / height
    h, w = height, width
    if ratio < 3.0 / 4.0:
        h = int(round(width / (3.0 / 4.0)))
    elif ratio > 4.0 / 3.0:
        w = int(round(height * (4.0 / 3.0)))
    return (height - h) // 2, (width - w) // 2, h, w


@numba.njit(cache=True)
def center_crop(height, width, ratio):  # type: ignore[no-untyped-def]
    """Return the box (top, left, height, width) of `ratio` of the shorter side in the middle, at
    least one pixel."""
    shorter = min(height, width)
    side = min(max(int(ratio * shorter), 1), shorter)
    return (height - side) // 2, (width - side) // 2, side, side


_FLIP_COUNTER, _SHIFT_COUNTER = 1000, 1001  # beyond what a crop draws


@numba.njit(parallel=True, nogil=True, cache=True)
def load_batch(  # type: ignore[no-untyped-def]
    index_B,
    image_BSS3,
    scratch_WX,
    failed_B,
    field_N,
    file_bytes,
    block_start,
    block_size,
    crop,
    flip,
    padding,
    center_ratio,
    scale_low,
    scale_high,
    seed,
    epoch,
):
    """Decode, crop and flip the images of a batch into `image_BSS3` (uint8); `failed_B` gets 1
    where decoding failed.

    `scratch_WX` has a row for each thread that numba may use, as long as the largest image decoded;
    `field_N` is the image column of the metadata; `block_start` (sorted) and `block_size` are the
    file's allocations.
    """
    side = image_BSS3.shape[1]
    for row in numba.prange(len(index_B)):
        index = index_B[row]
        field = field_N[index]
        height, width = np.int64(field.height), np.int64(field.width)
        block = np.searchsorted(block_start, field.data_ptr)
        failed_B[row] = 1
        if block >= len(block_start) or block_start[block] != field.data_ptr:
            image_BSS3[row] = 0
            continue
        start = np.int64(field.data_ptr)
        size = np.int64(block_size[block])
        scratch = scratch_WX[numba.get_thread_id()]
        if not (0 <= start <= start + size <= len(file_bytes)) or not (
            0 < height * width * 3 <= len(scratch)
        ):
            image_BSS3[row] = 0
            continue
        source = file_bytes[start : start + size]
        if field.mode == JPEG:
            code = _imdecode(
                source.ctypes.data,
                size,
                height,
                width,
                scratch.ctypes.data,
                height,
                width,
                0,
                0,
                1,
                1,
                False,
                False,
            )
            pixels = scratch[: height * width * 3]
        else:
            code = 0 if size == height * width * 3 else 1
            pixels = source
        if code != 0:
            image_BSS3[row] = 0
            continue

        failed_B[row] = 0
        key = sample_key(seed, epoch, index)
        target = image_BSS3[row]
        if crop == PAD:
            whole = pixels.reshape(height, width, 3)
            top = int(uniform(key, _SHIFT_COUNTER) * (2 * padding + 1)) - padding
            left = int(uniform(key, _SHIFT_COUNTER + 1) * (2 * padding + 1)) - padding
            for y in range(side):
                for x in range(side):
                    inside = 0 <= y + top < height and 0 <= x + left < width
                    for c in range(3):
                        target[y, x, c] = whole[y + top, x + left, c] if inside else 0
        else:
            if crop == RESIZED:
                top, left, h, w = random_resized_crop(key, height, width, scale_low, scale_high)
            else:
                top, left, h, w = center_crop(height, width, center_ratio)
            _resize(
                0,
                pixels.ctypes.data,
                height,
                width,
                top,
                top + h,
                left,
                left + w,
                target.ctypes.data,
                side,
                side,
            )
        if flip and uniform(key, _FLIP_COUNTER) < 0.5:
            for y in range(side):
                for x in range(side // 2):
                    for c in range(3):
                        other = target[y, side - 1 - x, c]
                        target[y, side - 1 - x, c] = target[y, x, c]
                        target[y, x, c] = other
