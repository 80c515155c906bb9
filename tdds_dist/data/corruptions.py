"""Corruptions of training images, for the robustness experiments: which images get one is
`sources`'.

The five kinds of the paper. Rectangles, clouds and motions are shares of the image's sides, so that
images of 32 and of 500 pixels are changed alike. Noise and resolution are in the image's own
pixels: scaling it down afterwards weakens them.
"""

# H, W height and width of an image in pixels

from collections.abc import Callable

import numpy as np
from PIL import Image

from tdds_dist.errors import InputError

MIN_SIDE = 8  # pixels; below that a coarser image or a blur can leave everything as it is
NOISE_LEVELS = 40.0  # standard deviation, of 255
# copies that a motion blur adds up; more would cost seconds on the largest photographs
MAX_TAPS = 128


def corrupt(image_HW3: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a copy of a uint8 [H, W, 3] image with the corruption `kind`, of the same shape and
    type.

    All that is random is drawn from `rng`. The copy differs wherever neighbouring pixels of the
    image do by more than a few levels; `gaussian_noise` and `occlusion` change every image. Raises
    InputError for an unknown kind and a side below MIN_SIDE pixels.
    """
    if kind not in CORRUPTION:
        raise InputError(f"corruption {kind!r} is unknown; use one of {', '.join(KINDS)}")
    height, width = image_HW3.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"an image of {width} x {height} pixels is too small to corrupt; both sides must have"
            f" at least {MIN_SIDE}, remove it or write the file without corruption"
        )
    return CORRUPTION[kind](image_HW3, rng)


def _gaussian_noise(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise_HW3 = rng.standard_normal(image_HW3.shape, dtype=np.float32) * np.float32(NOISE_LEVELS)
    return _to_uint8(image_HW3 + noise_HW3)


def _occlusion(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cover a rectangle of 30 to 60 % of either side with one colour."""
    height, width = image_HW3.shape[:2]
    tall, wide = (round(side * rng.uniform(0.3, 0.6)) for side in (height, width))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    out_HW3 = image_HW3.copy()
    covered = out_HW3[top : top + tall, left : left + wide]
    # at least 64 levels from the mean of what it covers: a black rectangle on a black margin would
    # hide nothing
    covered[:] = (covered.mean(axis=(0, 1)).astype(np.int64) + rng.integers(64, 193, 3)) % 256
    return out_HW3


def _resolution(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale down to pixels that are five to eight of the image's own on a side, and up again."""
    height, width = image_HW3.shape[:2]
    share = rng.uniform(1 / 8, 1 / 5)
    small = Image.fromarray(image_HW3).resize(
        (max(2, round(width * share)), max(2, round(height * share))), Image.Resampling.BOX
    )
    # not nearest: it would give an image of large pixels back unchanged
    return np.array(small.resize((width, height), Image.Resampling.BILINEAR))


def _fog(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay a light grey over the image, in clouds that hide 40 to 80 % of what is behind them."""
    height, width = image_HW3.shape[:2]
    cloud = Image.fromarray(rng.random((4, 4), dtype=np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    density_HW1 = 0.4 + 0.4 * np.clip(np.asarray(cloud), 0, 1)[:, :, None]
    return _to_uint8(image_HW3 * (1 - density_HW1) + rng.integers(190, 241) * density_HW1)


def _motion_blur(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Average along a straight line in any direction, of 15 to 25 % of the shorter side."""
    length = max(2.0, rng.uniform(0.15, 0.25) * min(image_HW3.shape[:2]))  # three pixels at least
    angle = rng.uniform(0, np.pi)
    for turn in range(4):
        out_HW3 = _smear(image_HW3, length, angle + turn * np.pi / 4)
        if (out_HW3 != image_HW3).any():  # stripes along the motion stay as they are
            break
    return out_HW3


def _smear(image_HW3: np.ndarray, length: float, angle: float) -> np.ndarray:
    """Average copies moved along a line of `length` pixels at `angle` radians; the border pixels go
    on outside."""
    height, width = image_HW3.shape[:2]
    reach = int(np.ceil(length / 2))
    num_taps = min(2 * reach + 1, MAX_TAPS)
    step = np.linspace(-length / 2, length / 2, num_taps)
    padded = np.pad(image_HW3, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    sum_HW3 = np.full(image_HW3.shape, num_taps // 2, dtype=np.uint32)  # of the division's rounding
    for down, right in zip(
        np.rint(step * np.sin(angle)).astype(int),
        np.rint(step * np.cos(angle)).astype(int),
        strict=True,
    ):
        sum_HW3 += padded[
            reach + down : reach + down + height, reach + right : reach + right + width
        ]
    return (sum_HW3 // num_taps).astype(np.uint8)


def _to_uint8(image_HW3: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image_HW3), 0, 255).astype(np.uint8)


CORRUPTION: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "occlusion": _occlusion,
    "resolution": _resolution,
    "fog": _fog,
    "motion_blur": _motion_blur,
}
KINDS = tuple(CORRUPTION)
