"""Small pictures of the images of a `.beton`, as data URIs that together fit into a number of bytes.

Owns sizes and encodings; which images are wanted, and in which order of need, is the caller's to say.
"""

import base64
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tdds_dist.beton import BetonInfo, evenly_spaced, read_images
from tdds_dist.errors import InputError

SIDES = (224, 112, 80)  # longest side in pixels: for dense screens, as large as they are shown, readable
PIXELATED_UP_TO = 64  # images up to this size are embedded as they are and shown with their pixels
JPEG_QUALITY = 80
PROBES = 8  # images that tell how many bytes a thumbnail takes
IMAGES_PER_BATCH = 64


def is_pixelated(info: BetonInfo, index: int) -> bool:
    """Whether an image is so small that it is embedded as it is."""
    return max(int(info.width_N[index]), int(info.height_N[index])) <= PIXELATED_UP_TO


def thumbnails(info: BetonInfo, index: Iterable[int], budget_bytes: int,
               sides: Sequence[int] = SIDES) -> tuple[dict[int, str], list[int]]:
    """Data URIs by global index, as many as fit into `budget_bytes` from the front of `index`; and the indices of images
    that cannot be decoded.

    The longest side of all of them is the first of `sides` (descending, pixels) at which they are likely to fit, else the last.
    Raises OSError when the file cannot be read.
    """
    wanted = list(index)
    side = _side(info, wanted, budget_bytes, sides)
    found: dict[int, str] = {}
    bad: list[int] = []
    used = 0
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:  # decoding and encoding let others run
        for first in range(0, len(wanted), IMAGES_PER_BATCH):
            batch = wanted[first : first + IMAGES_PER_BATCH]
            for number, uri in zip(batch, pool.map(lambda number: _read(info, number, side), batch), strict=True):
                if uri is None:
                    bad.append(number)
                    continue
                used += len(uri)
                if used > budget_bytes:
                    return found, bad
                found[number] = uri
    return found, bad


def data_uri(image: np.ndarray, side: int) -> str:
    """A picture (uint8 [H, W, 3]) for an <img>: tiny ones as they are, larger ones as a JPEG of at most `side` pixels."""
    from PIL import Image

    picture, file = Image.fromarray(image), io.BytesIO()
    if max(image.shape[:2]) <= PIXELATED_UP_TO:
        picture.save(file, "png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    picture.thumbnail((side, side))
    picture.save(file, "jpeg", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _side(info: BetonInfo, index: Sequence[int], budget_bytes: int, sides: Sequence[int]) -> int:
    probes = [index[place] for place in evenly_spaced(len(index), PROBES)] if index else []
    for side in sides[:-1]:
        sizes = [len(uri) for uri in (_read(info, number, side) for number in probes) if uri is not None]
        if sum(sizes) * len(index) <= budget_bytes * len(sizes):
            return side
    return sides[-1]


def _read(info: BetonInfo, index: int, side: int) -> str | None:
    """The data URI of one image; None where it cannot be decoded."""
    try:
        image, = read_images(info.path, [index], info)
    except InputError:
        return None
    return data_uri(image, side)
