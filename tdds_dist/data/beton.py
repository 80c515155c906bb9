"""`.beton` files: check one, read single images back. `writer` makes them, `manifest` reads the
file beside them.

Uses NumPy on the file format, not FFCV: importing FFCV costs seconds, and its reader takes
truncated and corrupted files without an error. The content of the images is not checked here but in
`check`, which reads them by `stored_bytes`.
"""

# N samples, A entries of the allocation table

import fcntl
import hashlib
import io
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tdds_dist.config.run import Config
from tdds_dist.console import Progress
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Fingerprint, fingerprint
from tdds_dist.text import printable, size_text

JPG, RAW = 0, 1  # FFCV's storage modes of an image

# The file format, version 2: header, field descriptors, metadata [N], pages of data, allocation
# table [A].
VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
DESCRIPTOR = np.dtype(
    [("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
INT_TYPE, IMAGE_TYPE = 1, 2
FIELD_TYPES = {
    0: np.dtype("<f8"),
    INT_TYPE: np.dtype("<i8"),
    IMAGE_TYPE: IMAGE,
    3: BYTES,
    4: np.dtype("<u8"),
    5: BYTES,
    6: np.dtype("<u8"),
}  # float, int, image, bytes, array, JSON, tensor
# all other fields have one entry per sample in the allocation table
FIXED_SIZE_TYPES = (0, INT_TYPE)

CONTENT_IMAGES = 256  # whose bytes go into `content_sha256`
IMAGES_PER_READ = 1024  # that one thread takes at a time
_PIECE_BYTES = 64 << 20  # of a copy; what is copied again after a crash


# --- inspecting ---


@dataclass(frozen=True, eq=False)
class BetonInfo:
    """The checked metadata of a `.beton`; arrays are by global index."""

    path: Path
    num_samples: int
    num_bytes: int
    field_names: list[str]
    image_field: str
    label_field: str
    label_N: np.ndarray  # int64
    width_N: np.ndarray  # uint16, pixels
    height_N: np.ndarray  # uint16, pixels
    mode_N: np.ndarray  # uint8, JPG or RAW
    data_ptr_N: np.ndarray  # uint64, offset of the image in the file, bytes
    size_N: np.ndarray  # uint64, bytes of the image in the file


def inspect_beton(path: Path, image_field: str = "", label_field: str = "") -> BetonInfo:
    """Check the structure of a `.beton` and return its metadata, without FFCV and without reading
    image data.

    image_field, label_field: the names of the fields that hold them; "" is the only image field,
    and the only int field or the one called label. Raises InputError when the file is missing,
    truncated, of another version, has no such field, or when metadata and allocation table
    contradict each other.
    """
    path = Path(path)
    header, num_bytes = _read_header(path)
    num_samples, num_fields, table_ptr = (
        int(header[key]) for key in ("num_samples", "num_fields", "alloc_table_ptr")
    )
    start = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
    if min(table_ptr, num_bytes) < start or num_samples == 0 or num_fields == 0:
        raise _damaged(
            path,
            f"{num_bytes} bytes, {num_samples} samples, {num_fields} fields and an allocation table"
            f" at {table_ptr} are not a finished file",
        )
    names, types = _read_fields(path, num_fields)
    image = _pick_field(path, names, types, IMAGE_TYPE, image_field)
    label = _pick_field(path, names, types, INT_TYPE, label_field)
    metadata_type = np.dtype([("", FIELD_TYPES[type_id]) for type_id in types], align=True)
    data_start = start + num_samples * metadata_type.itemsize
    num_allocations = num_samples * sum(type_id not in FIXED_SIZE_TYPES for type_id in types)
    expected = table_ptr + num_allocations * ALLOCATION.itemsize
    if table_ptr < data_start or num_bytes != expected:
        raise _damaged(
            path,
            f"{num_bytes} bytes instead of {max(expected, data_start)} for {num_samples} samples: "
            "truncated, or header corrupted",
        )
    metadata_N = np.fromfile(path, metadata_type, num_samples, offset=start)
    table_A = np.fromfile(path, ALLOCATION, num_allocations, offset=table_ptr)
    image_N = metadata_N[f"f{image}"]
    size_N = _allocated_bytes(path, image_N["data_ptr"], table_A, data_start, table_ptr)
    _check_images(path, image_N, size_N)
    label_N = metadata_N[f"f{label}"].astype(np.int64)
    stored = {
        f"{key}_N": np.ascontiguousarray(image_N[key])
        for key in ("width", "height", "mode", "data_ptr")
    }
    of_image, of_label = names[image], names[label]
    return BetonInfo(
        path, num_samples, num_bytes, names, of_image, of_label, label_N, size_N=size_N, **stored
    )


def inspect_split(config: Config, split: str) -> BetonInfo:
    """Inspect the file `train` or `val` of a config, with the fields that it names."""
    data = config.data
    return inspect_beton(Path(getattr(data, split)), data.image_field, data.label_field)


def dataset_fingerprint(
    info: BetonInfo, num_classes: int, class_names: Sequence[str] = ()
) -> Fingerprint:
    """Return the fingerprint that ties scores and coresets to this file's samples; `class_names`
    where its manifest knows them."""
    return fingerprint(info.label_N, num_classes, class_names)


def content_sha256(info: BetonInfo) -> str:
    """Hash all labels, sizes and modes, and the bytes of up to 256 images, to tell whether a file
    is still the same.

    Where in the file an image lies is left out: it differs between two writes of the same images by
    several workers. Cheap, but no proof that all images are the same; that is `tdds check`.
    """
    digest = hashlib.sha256(f"tdds-content-1 {info.num_samples}".encode())
    for array_N, kind in (
        (info.label_N, "<i8"),
        (info.width_N, "<u2"),
        (info.height_N, "<u2"),
        (info.mode_N, "<u1"),
        (info.size_N, "<u8"),
    ):
        digest.update(array_N.astype(kind).tobytes())
    chosen = evenly_spaced(info.num_samples, CONTENT_IMAGES)
    stored = dict(stored_bytes(info, chosen))
    for i in chosen.tolist():
        digest.update(stored[i])
    return digest.hexdigest()


def evenly_spaced(num_samples: int, num: int) -> np.ndarray:
    """Return at most `num` global indices from the first to the last, sorted int64."""
    return np.unique(
        np.linspace(0, num_samples - 1, max(1, min(num, num_samples))).astype(np.int64)
    )


def stored_bytes(info: BetonInfo, index: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Yield (global index, the bytes of that image in the file), in the order of `index`; the order
    of `data_ptr_N` is fast.

    Reads rather than maps, because a file that shrinks under a map ends the process. Raises
    InputError for a file that cannot be read, or is no longer as long as it was.
    """
    try:
        with info.path.open("rb", buffering=0) as file:
            for i in map(int, index):
                ptr, size = int(info.data_ptr_N[i]), int(info.size_N[i])
                data = os.pread(file.fileno(), size, ptr)
                while len(data) < size and (
                    more := os.pread(file.fileno(), size - len(data), ptr + len(data))
                ):
                    data += more  # one call reads 2 GiB at most
                if len(data) != size:
                    raise _damaged(
                        info.path,
                        f"it ends within image {i}, so it has changed since it was opened",
                    )
                yield i, data
    except OSError as error:
        raise InputError(
            f"{info.path} cannot be read ({error}); check the disk, or copy it again"
        ) from error


def crc32_of_images(info: BetonInfo, num_threads: int = 1, progress: bool = False) -> np.ndarray:
    """Compute the CRC-32 of the stored bytes of every image, uint32 [N], read in the order of the
    file."""
    crc32_N = np.empty(info.num_samples, np.uint32)
    order_N = np.argsort(info.data_ptr_N, kind="stable")

    def of_part(first: int) -> int:
        part = order_N[first : first + IMAGES_PER_READ]
        for i, data in stored_bytes(info, part):
            crc32_N[i] = zlib.crc32(data)
        return len(part)

    with (
        Progress("checksums", info.num_samples, "images", progress) as bar,
        ThreadPoolExecutor(num_threads) as pool,
    ):
        # reading and CRC let others run
        for num in pool.map(of_part, range(0, info.num_samples, IMAGES_PER_READ)):
            bar.advance(num)
    return crc32_N


def read_images(
    path: Path, index: Iterable[int], info: BetonInfo | None = None
) -> list[np.ndarray]:
    """Decode the images at the global indices `index` straight from the file, each uint8 [H, W, 3]
    RGB.

    `info` saves inspecting the file again. Raises InputError for an index outside the file and a
    damaged image.
    """
    from PIL import Image  # the report asks for images only when it draws them

    from tdds_dist.data.pixels import own_files

    info = inspect_beton(path) if info is None else info
    images = []
    with Path(path).open("rb") as file, own_files:
        for i in map(int, index):
            if not 0 <= i < info.num_samples:
                raise InputError(
                    f"index {i} is outside [0, {info.num_samples}) of {path}; use indices of this"
                    " file"
                )
            shape = (int(info.height_N[i]), int(info.width_N[i]), 3)
            file.seek(int(info.data_ptr_N[i]))
            data = file.read(int(info.size_N[i]))
            try:
                if info.mode_N[i] == RAW:
                    image = np.frombuffer(data, np.uint8).reshape(shape)
                else:
                    image = np.asarray(
                        Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB")
                    )
            except (OSError, ValueError, SyntaxError) as error:
                raise _damaged(path, f"image {i} cannot be decoded ({error})") from error
            if image.shape != shape:
                raise _damaged(
                    path, f"image {i} is {image.shape[:2]}, its metadata says {shape[:2]}"
                )
            images.append(image)
    return images


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} is not a whole .beton file: {what}; copy it again, or write it again with `tdds"
        " write`"
    )


def _read_header(path: Path) -> tuple[np.void, int]:
    """Return header and size in bytes of a file of the right version."""
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; `tdds write` makes .beton files")
    try:
        num_bytes = path.stat().st_size
        header = np.fromfile(path, HEADER, 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); check its permissions") from error
    if len(header) == 0:
        raise _damaged(path, f"{num_bytes} bytes do not hold a header")
    if header[0]["version"] != VERSION:
        raise _damaged(path, f"format version {header[0]['version']} instead of {VERSION}")
    return header[0], num_bytes


def _read_fields(path: Path, num_fields: int) -> tuple[list[str], list[int]]:
    """Return name and type id of every field, in the order of the metadata's columns."""
    descriptors = np.fromfile(path, DESCRIPTOR, num_fields, offset=HEADER.itemsize)
    names = [
        bytes(name).split(b"\0")[0].decode("ascii", "backslashreplace")
        for name in descriptors["name"]
    ]
    types = [int(type_id) for type_id in descriptors["type_id"]]
    for name, type_id in zip(names, types, strict=True):
        if type_id not in FIELD_TYPES:
            raise InputError(
                f"{path}: field {name!r} has the custom type {type_id}; only FFCV's own fields can"
                " be read, write the file again with an image and a label field"
            )
    return names, types


def _pick_field(path: Path, names: list[str], types: list[int], type_id: int, wanted: str) -> int:
    """Return the position of the field of this type that is called `wanted`; where that is empty,
    of the only one, or of several int fields of the one called label."""
    kind, option = ("image", "image") if type_id == IMAGE_TYPE else ("int", "label")
    found = [i for i, other in enumerate(types) if other == type_id]
    if not found:
        raise InputError(
            f"{path}: fields {names} hold no {kind} field; write the file again with `tdds write`"
        )
    of_type = ", ".join(printable(names[i]) for i in found)
    chosen = found
    if wanted or (type_id == INT_TYPE and len(found) > 1):
        chosen = [i for i in found if names[i] == (wanted or "label")]
    if wanted and not chosen:
        raise InputError(
            f"{path} has no {kind} field {wanted!r}; set data.{option}_field (of `tdds check`:"
            f" --{option}-field) to one of {of_type}, or leave it out where there is one"
        )
    if len(chosen) != 1:
        first = printable(names[found[0]])
        raise InputError(
            f"{path} has {len(found)} {kind} fields: {of_type}; say in the config which one is"
            f" meant, such as data.{option}_field={first} (of `tdds check`: --{option}-field"
            f" {first})"
        )
    return chosen[0]


def _allocated_bytes(
    path: Path, data_ptr_N: np.ndarray, table_A: np.ndarray, start: int, end: int
) -> np.ndarray:
    """Look up the size of each image in the allocation table, uint64 [N]; all regions must lie in
    [start, end)."""
    table_A = table_A[table_A["size"] > 0]
    table_A = table_A[np.argsort(table_A["ptr"], kind="stable")]
    ptr_A, size_A = np.ascontiguousarray(table_A["ptr"]), np.ascontiguousarray(table_A["size"])
    if len(ptr_A) == 0 or ptr_A[0] < start or ptr_A[-1] >= end or (size_A > end - ptr_A).any():
        raise _damaged(
            path, f"its allocation table points outside the data region [{start}, {end})"
        )
    entry_N = np.minimum(np.searchsorted(ptr_A, data_ptr_N), len(ptr_A) - 1)
    unknown = np.flatnonzero(ptr_A[entry_N] != data_ptr_N)
    if unknown.size:
        raise _damaged(
            path,
            f"{unknown.size} images, the first of them {unknown[0]}, are not in the allocation"
            " table",
        )
    if np.count_nonzero(np.bincount(entry_N)) != len(data_ptr_N):
        raise _damaged(path, "two samples share one image")
    return size_A[entry_N]


def _check_images(path: Path, image_N: np.ndarray, size_N: np.ndarray) -> None:
    pixels_N = image_N["width"].astype(np.uint64) * image_N["height"]
    wrong = (
        (pixels_N == 0)
        | (image_N["mode"] > RAW)
        | ((image_N["mode"] == RAW) & (size_N != pixels_N * 3))
    )
    if wrong.any():
        first = int(np.argmax(wrong))
        raise _damaged(
            path,
            f"image {first} has mode {image_N['mode'][first]}, {image_N['width'][first]} x "
            f"{image_N['height'][first]} pixels and {size_N[first]} bytes, which cannot be",
        )


# --- a copy on the node's own disk ---


def local_copy(info: BetonInfo, folder: Path) -> BetonInfo:
    """Return the file as a copy in a folder of this node, made where it is not there yet.

    Every process of the node may call it at once: one copies, the others wait for it. A copy that
    was stopped goes on behind the last piece whose SHA-256 still fits, and every piece is read back
    from the disk before it counts. Copies stay, for the next run; one of a file that has changed
    since has another name.

    Raises:
        InputError: the folder cannot be written, has too little space, or the file changed
        meanwhile.
    """
    path, about = info.path, info.path.stat()
    name = f"{path.stem}-{content_sha256(info)[:16]}-{about.st_mtime_ns}{path.suffix}"
    copy = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(f"{copy}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.exists() or copy.stat().st_size != about.st_size:
                partial, sums = Path(f"{copy}.partial"), Path(f"{copy}.sums")
                _copy_pieces(path, partial, sums)
                now = path.stat()
                if (now.st_size, now.st_mtime_ns) != (about.st_size, about.st_mtime_ns):
                    raise InputError(f"{path} changed while it was copied; start the run again")
                os.replace(partial, copy)
                sums.unlink()
    except OSError as error:
        raise InputError(
            f"data.cache={folder}: {error}; give a folder on the node's own disk that you may write"
            " and that has room, or leave data.cache out"
        ) from error
    return replace(info, path=copy)


def _copy_pieces(path: Path, partial: Path, sums: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as source, open(partial, "a+b") as target, open(sums, "a+") as noted:
        noted.seek(0)
        target.seek(0)
        done = 0
        for line in noted.read().split():
            if _sha256(target.read(min(_PIECE_BYTES, size - done))) != line:
                break
            done = min(done + _PIECE_BYTES, size)
        noted.truncate(len(_sha256(b"") + "\n") * -(-done // _PIECE_BYTES))
        target.truncate(done)
        source.seek(done)
        free = shutil.disk_usage(partial.parent).free
        if free < size - done:
            raise InputError(
                f"data.cache: the copy of {path} takes {size_text(size - done)} more, and"
                f" {partial.parent} has {size_text(free)} free; give it more room, remove copies"
                " there that no run needs, or leave data.cache out"
            )
        with Progress(f"copy {path.name}", size, "bytes", visible=True, done=done) as progress:
            while piece := source.read(min(_PIECE_BYTES, size - done)):
                target.write(piece)
                target.flush()
                os.fsync(target.fileno())
                os.posix_fadvise(target.fileno(), done, len(piece), os.POSIX_FADV_DONTNEED)
                found = _sha256(piece)
                if _sha256(os.pread(target.fileno(), len(piece), done)) != found:
                    raise InputError(
                        f"data.cache: {partial} does not hold what was written to it; the disk is"
                        " damaged, use another one"
                    )
                noted.write(found + "\n")
                noted.flush()
                done += len(piece)
                progress.advance(len(piece))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content_of(files: tuple[BetonInfo, BetonInfo]) -> dict[str, str]:
    """Return the content of the images of a run as hashes, for `setting["data"]`."""
    return {key: content_sha256(file) for key, file in zip(("train", "val"), files, strict=True)}


def content_here(config: Config) -> dict[str, dict[str, str]]:
    """Return `content_of` the files of a config as `data`, or nothing where one of them is not on
    this machine."""
    paths = Path(config.data.train), Path(config.data.val)
    if not all(path.is_file() for path in paths):
        return {}
    return {"data": content_of((inspect_split(config, "train"), inspect_split(config, "val")))}
