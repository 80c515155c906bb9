"""Checks of a `.beton` before it costs a training run: structure, manifest, and every image, by
global index.

Two tests per image. The CRC-32 of its stored bytes against the manifest finds every change since it
was written. The decoder of training, with the size that the JPEG itself states, finds what cannot
be read at all, also without a manifest, but misses two of three single changed bytes in a JPEG, and
all changed raw pixels.
"""

# B images of a chunk, N samples of the file

import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tdds_dist.console import Progress
from tdds_dist.data.beton import IMAGE, JPG, BetonInfo, evenly_spaced, inspect_beton, stored_bytes
from tdds_dist.data.loader import View, check_view, default_workers, find_undecodable
from tdds_dist.data.manifest import Manifest, check_labels, manifest_path, read_manifest
from tdds_dist.errors import InputError

QUICK_IMAGES = 256
# stored and decoded bytes, and images, that are in memory at a time
CHUNK_BYTES, CHUNK_IMAGES = 64 << 20, 512
MAX_LINES, MAX_NAMED = 50, 8  # bad images that are listed; those that stand in the error itself


@dataclass(frozen=True, eq=False)
class CheckResult:
    """The result of a check. `faults`: reasons by global index, of `crc` (the bytes are not those
    that were written), `size` (the JPEG has another size than the metadata says) and `decode` (the
    decoder refuses it)."""

    info: BetonInfo
    manifest: Manifest | None
    num_checked: int
    faults: dict[int, list[str]]
    seconds: float

    @property
    def has_crc(self) -> bool:
        return self.manifest is not None and self.manifest.crc32_N is not None

    def summary(self) -> str:
        """Say in one line how much was checked, and how fast."""
        count = Counter(reason for reasons in self.faults.values() for reason in reasons)
        if self.has_crc:
            crc = f"{self.num_checked - count['crc']} with the CRC-32 of the manifest"
        else:
            which = "no" if self.manifest is None else "older"
            crc = f"no CRC-32 to compare with ({which} manifest)"
        return (
            f"{self.info.path}: {self.num_checked} of {self.info.num_samples} images checked in"
            f" {self.seconds:.1f} s ({self.num_checked / max(self.seconds, 1e-9):.0f} images/s):"
            f" {self.num_checked - count['decode'] - count['size']} decoded, {crc}"
        )

    def fault_lines(self) -> list[str]:
        """List global index, reasons and path of each bad image, separated by tabs; after 50 a
        count."""
        bad = sorted(self.faults)
        paths = None if self.manifest is None else self.manifest.path
        lines = [
            f"{i}\t{','.join(self.faults[i])}\t{'-' if paths is None else paths[i]}"
            for i in bad[:MAX_LINES]
        ]
        return lines + ([f"... and {len(bad) - MAX_LINES} more"] if len(bad) > MAX_LINES else [])

    def require_sound(self) -> None:
        """Raise InputError when an image is bad."""
        if not self.faults:
            return
        path, bad = self.info.path, sorted(self.faults)
        if (
            self.num_checked > 1
            and len(bad) == self.num_checked
            and all(self.faults[i] == ["crc"] for i in bad)
        ):
            raise InputError(
                f"{path}: none of {self.num_checked} images has the CRC-32 of"
                f" {manifest_path(path)}, yet all can be decoded: it is the manifest of another"
                " file; copy both again, or write the .beton again with `tdds write`"
            )
        by_reason = Counter(reason for reasons in self.faults.values() for reason in reasons)
        whole = self.num_checked == self.info.num_samples
        way_out = (
            "copy the file again, or repair these images in the source and write it again with"
            " `tdds write`"
        )
        if not whole:
            way_out += f"; `tdds check {path}` names all"
        raise InputError(
            f"{path}: {len(bad)} of {self.num_checked} {'' if whole else 'checked '}images are"
            f" damaged, at global indices {bad[:MAX_NAMED]}{' ...' if len(bad) > MAX_NAMED else ''}"
            f" ({', '.join(f'{num} by {reason}' for reason, num in sorted(by_reason.items()))});"
            f" {way_out}"
        )


def check(
    path: Path,
    *,
    quick: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    image_field: str = "",
    label_field: str = "",
) -> CheckResult:
    """Check structure, manifest, labels and every image; with `quick` only some hundred images,
    evenly spaced.

    num_workers: decoding threads; by default the CPUs this process may use. image_field,
    label_field: as for `inspect_beton`. Raises InputError for all but bad images, which are in the
    result.
    """
    if num_workers is not None and num_workers < 1:
        raise InputError(
            f"num_workers={num_workers} must be at least 1; choose a number up to that of the CPUs"
        )
    info = inspect_beton(path, image_field, label_field)
    index = np.arange(info.num_samples)
    if quick:
        index = evenly_spaced(info.num_samples, QUICK_IMAGES)
    return _check_images(info, read_manifest(path), index, num_workers, progress)


def quick_check(info: BetonInfo, manifest: Manifest | None) -> None:
    """Check labels and some hundred images, evenly spaced, with the first and the last, of an
    inspected file. Raise InputError if bad.
    """
    index = evenly_spaced(info.num_samples, QUICK_IMAGES)
    _check_images(info, manifest, index, None, progress=False).require_sound()


def _check_images(
    info: BetonInfo,
    manifest: Manifest | None,
    index: np.ndarray,
    num_workers: int | None,
    progress: bool,
) -> CheckResult:
    check_view(info, View(1))
    num_classes = max(1, int(info.label_N.max()) + 1) if manifest is None else manifest.num_classes
    check_labels(info, num_classes, manifest)
    crc32_N = None if manifest is None else manifest.crc32_N
    num_workers = num_workers or default_workers(1)
    started, faults = time.perf_counter(), dict[int, list[str]]()
    chunks = _read_chunks(info, crc32_N, index)
    with Progress("check", len(index), "images", progress) as bar, ThreadPoolExecutor(1) as reader:
        # reads and sums the next chunk while this one is decoded
        pending = reader.submit(next, chunks, None)
        while (chunk := pending.result()) is not None:
            pending = reader.submit(next, chunks, None)
            for i in chunk.undecodable(info, num_workers):
                chunk.faults.setdefault(i, []).append("decode")
            faults |= chunk.faults
            bar.advance(chunk.num_images)
    return CheckResult(info, manifest, len(index), faults, time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Images read together, and what is known of them before decoding."""

    num_images: int
    faults: dict[int, list[str]]
    index_B: np.ndarray  # int64, those that are worth decoding
    stored: list[bytes]  # of these

    def undecodable(self, info: BetonInfo, num_workers: int) -> list[int]:
        if len(self.index_B) == 0:
            return []
        size_B = info.size_N[self.index_B]
        image_B = np.zeros(len(self.index_B), IMAGE)
        image_B["mode"] = info.mode_N[self.index_B]
        image_B["width"] = info.width_N[self.index_B]
        image_B["height"] = info.height_N[self.index_B]
        image_B["data_ptr"] = np.cumsum(size_B) - size_B
        data = np.frombuffer(b"".join(self.stored), np.uint8)
        return [int(i) for i in self.index_B[find_undecodable(data, image_B, size_B, num_workers)]]


def _read_chunks(
    info: BetonInfo, crc32_N: np.ndarray | None, index: np.ndarray
) -> Iterator[_Chunk]:
    """Yield the images at `index`, in the order of the file."""
    index = index[np.argsort(info.data_ptr_N[index], kind="stable")]
    bytes_M = (
        info.size_N[index].astype(np.int64)
        + 3 * info.width_N[index].astype(np.int64) * info.height_N[index]
    )
    budget_M = np.cumsum(bytes_M) // CHUNK_BYTES + np.arange(len(index)) // CHUNK_IMAGES
    for index_B in np.split(index, np.flatnonzero(np.diff(budget_M)) + 1):
        faults: dict[int, list[str]] = {}
        decodable, stored = [], []
        for i, data in stored_bytes(info, index_B):
            if crc32_N is not None and zlib.crc32(data) != crc32_N[i]:
                faults[i] = ["crc"]
            stated = (
                jpeg_size(data) if info.mode_N[i] == JPG else (info.height_N[i], info.width_N[i])
            )
            if stated == (info.height_N[i], info.width_N[i]):
                decodable.append(i)
                stored.append(data)
            else:  # the decoder would leave part of the image as it was in memory, and not say so
                faults.setdefault(i, []).append("decode" if stated is None else "size")
        yield _Chunk(len(index_B), faults, np.array(decodable, np.int64), stored)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width that a JPEG states; None when it has no readable header."""
    at = 2
    while data.startswith(b"\xff\xd8") and at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        if marker == 0xFF:
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:  # without a length
            at += 2
        else:
            at += 2 + max(2, struct.unpack_from(">H", data, at + 2)[0])
    return None
