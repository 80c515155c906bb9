"""Writing a `.beton` and its manifest from a source.

Uses FFCV's own page allocator and encoders under worker processes of our own, because FFCV's wait
for ever when a sample raises or a worker dies. A file appears under its name only after it was
written, checked and synced.
"""

# N samples

import ctypes
import multiprocessing
import os
import shlex
import signal
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.console import Progress
from tdds_dist.data.beton import RAW, crc32_of_images, inspect_beton
from tdds_dist.data.manifest import Manifest, check_paths, manifest_path, not_utf8, write_manifest
from tdds_dist.data.sources import Source
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import fingerprint, new_file_beside, sync

WRITE_MODES = ("jpg", "proportion", "raw")
JPG_PROPORTION, PROPORTION_SEED = 0.5, 23
SAMPLES_PER_CLAIM = 32
# writing goes on after a bad image, to name them all, but not for a folder full of them
MAX_BAD_SAMPLES = 100
MIB = 1 << 20
# of a stored image: of a JPEG, of FFCV's metadata, of one call of the system that writes
JPEG_SIDE, SIDE, IMAGE_BYTES = 65500, 65535, (1 << 31) - 64 * MIB
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def write_beton(
    source: Source,
    out: Path,
    *,
    max_resolution: int | None = None,
    write_mode: str = "jpg",
    quality: int = 90,
    num_workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Write `source` to `out` (fields `image` and `label`, sample i is the source's i) and its
    manifest beside it.

    write_mode: "jpg"; "raw" pixels; "proportion", a fixed random half of the images as jpg, the
    rest raw. quality: of the jpg, 1..100. max_resolution: longest side in pixels, larger images are
    scaled down. num_workers: processes; by default the CPUs this process may use, at most 16.
    Raises InputError, and leaves nothing behind, when an image cannot be read (all of them are
    named, up to a limit), a worker is killed, the disk is full, or `out` exists and `overwrite` is
    not set.
    """
    out = Path(out)
    _check_request(source, out, max_resolution, write_mode, quality, num_workers, overwrite)
    settings = {
        "write_mode": write_mode,
        "quality": quality,
        "max_resolution": max_resolution,
    } | source.settings
    num_workers = num_workers or min(len(os.sched_getaffinity(0)), 16)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file_beside(out, ".beton") as file:
            temporary = Path(file.name)
        _write_file(source, temporary, settings, num_workers, progress)
        info = inspect_beton(temporary)
        if not np.array_equal(info.label_N, source.label_N):
            raise RuntimeError(f"the labels in {temporary} are not those of {source.name}")
        manifest = Manifest(
            source.name,
            source.split,
            len(source),
            len(source.class_names),
            source.class_names,
            source.path,
            source.label_N,
            info.num_bytes,
            fingerprint(source.label_N, len(source.class_names)).labels_sha256,
            settings,
            (int(info.height_N.max()), int(info.width_N.max())),
            source.true_label_N,
            source.corruption,
            crc32_of_images(info, num_workers, progress),
        )
        write_manifest(manifest_path(temporary), manifest)
        _publish(temporary, out)
    except OSError as error:
        if str(error.filename).startswith("/psm_"):  # memory that the workers share
            raise InputError(
                f"cannot write /dev/shm ({error.strerror}); mount it to be written, in a container"
                " by --shm-size=1g"
            ) from error
        raise InputError(
            f"cannot write {out} ({error}); free space there, or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
            manifest_path(temporary).unlink(missing_ok=True)
    return manifest


def _check_request(
    source: Source,
    out: Path,
    max_resolution: int | None,
    write_mode: str,
    quality: int,
    num_workers: int | None,
    overwrite: bool,
) -> None:
    if out.suffix != ".beton":
        raise InputError(f"{out} must end in .beton; name it {out}.beton")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out} exists; remove it, choose another name, or give --overwrite")
    if write_mode not in WRITE_MODES:
        raise InputError(
            f"write_mode={write_mode!r} is unknown; use one of {', '.join(WRITE_MODES)}"
        )
    for name, value, limit in (
        ("max_resolution", max_resolution, 65535),
        ("quality", quality, 100),
        ("num_workers", num_workers, 1024),
    ):
        if value is not None and not 1 <= value <= limit:
            raise InputError(
                f"{name}={value} must be between 1 and {limit}; choose a number in that range"
            )
    try:
        check_paths(source.path)
    except ValueError as error:
        raise InputError(f"{source.name}: {error}; rename the file") from error
    if names := not_utf8(source.path):
        folder = shlex.quote(source.name.removeprefix("imagefolder:"))
        raise InputError(
            f"{source.name}: names that are not UTF-8: {len(names)} (such as"
            f" {', '.join(names[:3])}); rename them, from Windows's usual encoding by"
            f" `convmv -f cp1252 -t utf8 -r --notest {folder}`"
        )


def _publish(temporary: Path, out: Path) -> None:
    """Sync both files and rename them. An old manifest goes first, so that it never stands beside a
    new .beton."""
    with temporary.open("rb") as file:
        sync(file)
    manifest_path(out).unlink(missing_ok=True)
    os.replace(temporary, out)
    os.replace(manifest_path(temporary), manifest_path(out))


def _write_file(
    source: Source, file: Path, settings: dict[str, Any], num_workers: int, progress: bool
) -> None:
    """Fill `file` by FFCV's own steps, with `_work` in the place of its workers."""
    from tdds_dist.data import decode  # noqa: F401  before FFCV

    # isort: split
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.writer import DatasetWriter

    assert IMAGE_MODES["raw"] == RAW
    image_field = RGBImageField(
        settings["write_mode"], settings["max_resolution"], jpeg_quality=settings["quality"]
    )
    page_size = _page_bytes(source, settings["max_resolution"])
    writer = DatasetWriter(
        str(file), {"image": image_field, "label": IntField()}, page_size, num_workers
    )
    writer.num_samples = len(source)
    writer.prepare()
    try:
        allocator = _pages(file, writer.data_region_start, page_size)
        with Progress("write", len(source), "images", progress) as bar:
            allocations, bad = _run_workers(writer, allocator, source, bar)
        if bad:
            named = "; ".join(f"{source.path[i]!r}: {bad[i]}" for i in sorted(bad)[:5])
            raise InputError(
                f"{source.name}: {len(bad)}{'+' if len(bad) >= MAX_BAD_SAMPLES else ''} images"
                f" cannot be written ({named}{'; ...' if len(bad) > 5 else ''}); repair or remove"
                " them, or do what is said of them"
            )
        written = allocator.offset + allocator.next_page_written.value * page_size
        if file.stat().st_size != written:  # a short write that nothing reported
            raise OSError(f"{file.stat().st_size} bytes arrived of {written}")
        writer.finalize(allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()


def _page_bytes(source: Source, max_resolution: int | None) -> int:
    """Return FFCV's page size, a power of two, by the usual size of some images: every worker holds
    a page, and ends with one partly empty."""
    num_bytes = [0]
    for i in np.unique(np.linspace(0, len(source) - 1, 16).astype(int)):
        try:
            height, width = source.read(int(i)).shape[:2]
        except Exception:  # the worker that meets this image again reports it
            continue
        scale = min(1.0, max_resolution / max(height, width)) if max_resolution else 1.0
        num_bytes.append(int(height * width * 3 * scale**2))
    usual = sorted(num_bytes)[len(num_bytes) // 2]
    page = 2 * MIB if 16 * usual <= 2 * MIB else 8 * MIB
    while page < min(4 * usual, 64 * MIB):
        page *= 2
    return page


def _pages(file: Path, start: int, page_size: int) -> Any:
    """Return FFCV's allocator, where an image that is larger than a page takes several in a row.

    Readers find an image by its place and size, as this package and FFCV with `os_cache=True` do;
    FFCV with `os_cache=False` reads images of one page only.
    """
    from ffcv.memory_allocator import MemoryAllocator

    class Pages(MemoryAllocator):
        def malloc(self, size: int) -> tuple[int, np.ndarray]:
            if size <= self.page_size:
                return super().malloc(size)
            self.flush_page()
            num_pages = -(-size // self.page_size)
            with self.next_page_allocated.get_lock():
                self.my_page = self.next_page_allocated.value
                self.next_page_allocated.value += num_pages
            self.page_data = np.zeros(num_pages * self.page_size, np.uint8)
            self.page_offset = self.page_size  # full: the next image takes another page
            at = self.offset + self.my_page * self.page_size
            self.allocations.append((self.current_sample_id, at, size))
            return at, self.page_data[:size]

        def flush_page(self) -> None:
            super().flush_page()
            if (num_pages := len(self.page_data) // self.page_size) > 1:
                with self.next_page_written.get_lock():
                    self.next_page_written.value += num_pages - 1
                self.page_data = np.zeros(self.page_size, np.uint8)

    return Pages(str(file), start, page_size)


def _run_workers(
    writer: Any, allocator: Any, source: Source, progress: Progress
) -> tuple[list[Any], dict[int, str]]:
    """Encode all samples; return FFCV's allocations and the reason of each bad sample, and count in
    the source's tally.

    One pipe per worker, with its only write end in that worker: a worker that dies closes it,
    whatever lock it held.
    """
    # sources and the allocator's counters pass by inheritance
    context = multiprocessing.get_context("fork")
    next_sample = context.Value("q", 0)
    source.tally.clear()  # of the images that told the page size
    workers: dict[Any, Any] = {}
    allocations: list[Any] = []
    bad: dict[int, str] = {}
    try:
        for _ in range(min(writer.num_workers, -(-len(source) // SAMPLES_PER_CLAIM))):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(writer, allocator, source, next_sample, sender), daemon=True
            )
            worker.start()
            sender.close()
            workers[receiver] = worker
        waiting = set(workers)
        while waiting and len(bad) < MAX_BAD_SAMPLES:
            ready: list[Any] = wait(list(waiting))
            for receiver in ready:
                try:
                    message = receiver.recv()
                except (EOFError, OSError):  # OSError: it died within a message
                    raise _worker_died(workers[receiver]) from None
                if isinstance(message, OSError):
                    raise message
                if isinstance(message, tuple) and isinstance(message[0], list):
                    allocations += message[0]
                    source.tally.update(message[1])
                    waiting.remove(receiver)
                else:
                    num_done, new_bad = message
                    bad |= new_bad
                    progress.advance(num_done)
    finally:
        for receiver, worker in workers.items():
            worker.kill()
            worker.join()
            receiver.close()
    return allocations, bad


def _worker_died(worker: Any) -> Exception:
    worker.join(10)
    if worker.exitcode is None or worker.exitcode >= 0:
        return RuntimeError(
            f"a writing worker ended early with exit code {worker.exitcode}; its traceback is above"
        )
    name = signal.Signals(-worker.exitcode).name
    return InputError(
        f"a writing worker was killed by {name}; SIGKILL often means too little memory (use fewer "
        "workers), SIGBUS a full /dev/shm"
    )


def _work(writer: Any, allocator: Any, source: Source, next_sample: Any, sender: Any) -> None:
    """Work as one process: claim samples in order, encode them, report (number done, bad samples),
    then the allocations and what was done to images."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    # a killed parent takes its workers along (Linux)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    cv2.setNumThreads(1)  # threads of its pool do not exist after the fork
    metadata_N = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
    image_field = writer.fields["image"]
    write_mode, max_resolution = image_field.write_mode, image_field.max_resolution
    image_field.max_resolution = None  # FFCV shrinks slivers to no pixel
    try:
        with allocator:
            while claimed := _claim(source, next_sample):
                for first in claimed[::SAMPLES_PER_CLAIM]:
                    part, bad = range(first, min(first + SAMPLES_PER_CLAIM, claimed.stop)), {}
                    for i in part:
                        if write_mode == "proportion":  # FFCV's own draw differs from run to run
                            draw = np.random.default_rng([PROPORTION_SEED, i]).random()
                            image_field.write_mode = "jpg" if draw < JPG_PROPORTION else "raw"
                        reason = _encode_sample(
                            writer, allocator, source, metadata_N, i, max_resolution
                        )
                        if reason is not None:
                            bad[i] = reason
                    sender.send((len(part), bad))
        sender.send((allocator.allocations, source.tally))
    except OSError as error:  # of the output: the disk is full
        sender.send(error)


def _claim(source: Source, next_sample: Any) -> range:
    """Take the next samples for this process: its part of the source, where it has parts."""
    with next_sample.get_lock():
        first = last = next_sample.value
        if source.part_end is None:
            last = min(first + SAMPLES_PER_CLAIM, len(source))
        elif first < len(source):
            last = int(source.part_end[np.searchsorted(source.part_end, first, side="right")])
        next_sample.value = last
    return range(first, last)


def _encode_sample(
    writer: Any,
    allocator: Any,
    source: Source,
    metadata_N: np.ndarray,
    index: int,
    max_resolution: int | None,
) -> str | None:
    """Encode one sample into the current page; return the reason when that fails. An OSError comes
    from the output file."""
    from ffcv.writer import handle_sample

    try:
        image = shrunk(source.read(index), max_resolution)
        _check_size(image, writer.fields["image"].write_mode)
    except Exception as error:
        return _reason(error)
    try:
        sample = (image, source.label_N[index])
        handle_sample(sample, index, metadata_N.dtype.names, metadata_N, allocator, writer.fields)
    except OSError:
        raise
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """Say in one line what went wrong; sentences of ours stand for themselves."""
    text = " ".join(str(error).split())
    ours = type(error) in (ValueError, InputError) and text
    return text if ours else f"{type(error).__name__}: {text}"


def shrunk(image: np.ndarray, max_resolution: int | None) -> np.ndarray:
    """Scale an image [H, W, 3] down to `max_resolution` pixels at the longer side, as FFCV does,
    but to at least one pixel."""
    import cv2

    height, width = image.shape[:2]
    if max_resolution is None or max(height, width) <= max_resolution:
        return image
    ratio = max_resolution / max(height, width)
    size = (max(int(ratio * width), 1), max(int(ratio * height), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _check_size(image: np.ndarray, write_mode: str) -> None:
    """Raise ValueError where an image cannot be stored, with the size that can."""
    height, width = image.shape[:2]
    longer, side = max(height, width), JPEG_SIDE if write_mode == "jpg" else SIDE
    if longer <= side and image.nbytes <= IMAGE_BYTES:
        return
    fits = min(side, int(longer * (IMAGE_BYTES / image.nbytes) ** 0.5))
    raise ValueError(
        f"{width} x {height} pixels are too large for {write_mode} in a .beton; give"
        f" --max-resolution {fits} or less"
    )
