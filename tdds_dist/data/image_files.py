"""The files of a folder: which of them are images, and what is left out or reached by links.

An image is what Pillow reads; for speed a file with the usual suffix of one is not looked at until
it is written. Keeps account of every other file, of links, and of images that are there twice.
"""

# N images of the split

import errno
import os
import stat
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tdds_dist.console import log
from tdds_dist.errors import InputError
from tdds_dist.text import printable

FORMATS = ("pillow", "torchvision")
# torchvision's list
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# taken by their name as well; of all other files the header is looked at
KNOWN_EXTENSIONS = (
    *IMAGE_EXTENSIONS,
    *(".gif", ".jfif", ".jpe", ".avif", ".jp2", ".pbm", ".pnm"),
)
# not looked at: raw photographs, of which Pillow reads the small preview, and copies that other
# programs leave
_NOT_LOOKED_AT = (
    *(".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".pef", ".srw", ".raf"),
    *("~", ".bak", ".old", ".orig", ".tmp", ".part", ".partial", ".crdownload", ".download"),
)
# formats of which Pillow reads the header but no pixels, or needs another program for them
_WITHOUT_PIXELS = {"BUFR", "GRIB", "HDF5", "WMF", "EPS", "MPEG"}
# files and folders that systems and file servers make, in lower case; hidden ones begin with a dot
_SYSTEM_NAMES = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__"),
    *("system volume information", "thumbs.db", "desktop.ini"),
}
# of a link that leads nowhere: the target is gone, below a file, the link itself, or no name at all
_LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_MAX_KINDS = 12  # of files left out, which are named


def some(names: list[str]) -> str:
    """Name the first three, and count the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more


def _files(num: int) -> str:
    return f"{num:,} file{'s' * (num != 1)}"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _ids_above(folder: str) -> set[tuple[int, int]]:
    """Identify the folder and all above it."""
    real = Path(os.path.realpath(folder))
    return {_id(os.stat(path)) for path in (real, *real.parents)}


def _is(test: Callable[[], bool]) -> bool:
    """Say what a test of a directory entry finds; False for a link that leads nowhere."""
    try:
        return test()
    except OSError as error:
        if error.errno not in _LEADS_NOWHERE:
            raise
        return False


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in it by name, without those of the system and links to a folder above."""
    above = _ids_above(str(folder))
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if _is(entry.is_dir)
            and not _is_hidden(entry.name)
            and not (entry.is_symlink() and _id(entry.stat()) in above)
        )


def has_image(folder: Path, max_looks: int | None = None, deep: bool = True) -> bool:
    """Say whether an image lies in the folder, or below it. Of files without the name of an image
    no more than `max_looks` are looked at."""
    unknown: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is(entry.is_dir) or _is_hidden(entry.name):
                continue
            if entry.name.lower().endswith(KNOWN_EXTENSIONS):
                return True
            unknown.append(entry.path)
    return any(_look(path) == "image" for path in unknown[:max_looks]) or (
        deep and any(has_image(sub, max_looks) for sub in subfolders(folder))
    )


def _look(path: str) -> str:
    """Return "image" where the header of the file is one that Pillow reads, else what it is."""
    kind = _kind(path)
    if path.lower().endswith(_NOT_LOOKED_AT):
        return kind
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "no file"
        if status.st_size == 0:
            return "empty"
        with Image.open(path, formats=_formats_of(kind)):
            return "image"
    except Image.DecompressionBombError:
        return "image"  # too large, which the writer says
    except PermissionError:
        return "unreadable"
    except Exception as error:  # decoders raise many kinds over a header that they cannot read
        nowhere = isinstance(error, OSError) and error.errno in _LEADS_NOWHERE
        return "broken link" if nowhere else kind


def _kind(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without suffix"


@cache
def _formats_of(suffix: str) -> list[str]:
    """Return the formats to try. Where nothing at the beginning of a file tells the format, its
    suffix must."""
    Image.init()
    return [
        name
        for name, (_, is_told) in Image.OPEN.items()
        if name not in _WITHOUT_PIXELS and (is_told or Image.EXTENSION.get(suffix) == name)
    ]


@dataclass(frozen=True)
class _Folder:
    """A folder below a class folder: its files that are images by name, each with a number that two
    names of one file share, and those whose header has to be looked at."""

    path: str
    known: list[tuple[str, int]]
    unknown: list[str]


class Scan:
    """Finds the images of one split, and keeps account of what it leaves out and follows."""

    def __init__(self, spec: str, folder: Path, roots: list[Path], by_suffix: bool):
        self._spec, self._by_suffix = spec, by_suffix
        self._prefix = "" if folder == Path() else os.path.join(folder, "")
        self._known = IMAGE_EXTENSIONS if by_suffix else KNOWN_EXTENSIONS
        self._roots = [os.path.join(os.path.realpath(root), "") for root in roots]
        self._left_out: dict[str, list[str]] = {}  # by kind
        self._by_content: list[str] = []
        self._links: dict[str, list[str]] = {"folders": [], "files": []}
        self._broken: list[str] = []
        self._file_ids: list[int] = []  # [N], in the order of the images
        self._path: list[str] = []  # [N]
        self._twice: list[tuple[int, int]] = []  # images that are one file
        self._seen: dict[tuple[int, int], str] = {}  # the folders so far

    def images(self, root: Path, class_names: list[str]) -> list[list[str]]:
        """Return the paths of the images of each class, in the order of torchvision."""
        self._look_beside(root)
        walked: list[list[_Folder]] = []
        for name in class_names:
            found: list[_Folder] = []
            if (root / name).is_dir():
                self._walk(str(root / name), _ids_above(str(root)), found)
            walked.append(sorted(found, key=lambda folder: folder.path))
        if self._broken:
            raise InputError(
                f"{self._spec}: links to files that are not there: {some(self._broken)}; bring the"
                " files back, or remove the links"
            )
        folders = [folder for found in walked for folder in found]
        ids = self._look_at(
            [os.path.join(folder.path, name) for folder in folders for name in folder.unknown]
        )
        classes: list[list[str]] = []
        for found in walked:
            paths: list[str] = []
            for folder in found:
                asked = {name: os.path.join(folder.path, name) for name in folder.unknown}
                more = [(name, ids[path]) for name, path in asked.items() if path in ids]
                files = sorted([*folder.known, *more])
                paths += [os.path.join(folder.path, name) for name, _ in files]
                self._file_ids += [number for _, number in files]
            classes.append(paths)
        self._find_twice([path for paths in classes for path in paths])
        return classes

    @property
    def num_left_out(self) -> int:
        return sum(map(len, self._left_out.values()))

    def faults(self) -> list[str]:
        """Say what `--strict` refuses."""
        said = []
        if self._left_out:
            by_kind = sorted(self._left_out.items(), key=lambda kind: -len(kind[1]))
            kinds = ", ".join(
                f"{len(paths):,} {printable(kind)}" for kind, paths in by_kind[:_MAX_KINDS]
            )
            if len(by_kind) > _MAX_KINDS:
                kinds += f", {sum(len(paths) for _, paths in by_kind[_MAX_KINDS:]):,} others"
            named = some([paths[0] for _, paths in by_kind])
            said.append(f"left out {_files(self.num_left_out)}: {kinds} (such as {named})")
        if self._twice:
            first, second = (printable(self._path[i]) for i in self._twice[0])
            said.append(
                f"images that are there twice, by a link: {len(self._twice):,} (such as {first} and"
                f" {second})"
            )
        return said

    def notes(self) -> list[str]:
        """Say what a person should know."""
        said = self.faults()
        if self._by_content:
            said.append(
                f"took {_files(len(self._by_content))} for images by content, not by name (such as"
                f" {some(sorted(self._by_content))})"
            )
        for what, links in self._links.items():
            if links:
                such = printable(f"{self.named(links[0])} -> {os.readlink(links[0])}")
                said.append(f"followed links to {what}: {len(links):,} (such as {such})")
        return said

    def instead(self, folder: Path) -> str:
        """Say how many files of a folder were left out, for a message about it."""
        inside = os.path.join(self.named(str(folder)), "")
        kinds = {
            kind: number
            for kind, paths in self._left_out.items()
            if (number := sum(path.startswith(inside) for path in paths))
        }
        said = ", ".join(f"{number} {printable(kind)}" for kind, number in kinds.items())
        return f" (left out: {said})" if said else ""

    def warn_of_two_labels(self, label_N: np.ndarray) -> None:
        """Warn where one file has two labels."""
        both = [(a, b) for a, b in self._twice if label_N[a] != label_N[b]]
        if both:
            first, second = (printable(self._path[i]) for i in both[0])
            log.warning(
                f"links put one file into two classes, {len(both):,} times (such as {first} and"
                f" {second}); remove the links that are wrong"
            )

    def _leave_out(self, kind: str, path: str) -> None:
        self._left_out.setdefault(kind, []).append(self.named(path))

    def named(self, path: str) -> str:
        """Return a path relative to the folder of the spec."""
        return path.removeprefix(self._prefix)

    def _look_beside(self, root: Path) -> None:
        """Account for images and folders beside the class folders that belong to no class."""
        with os.scandir(root) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if _is(entry.is_dir):
                    if _is_hidden(entry.name):
                        self._leave_out("hidden", entry.path)
                    elif entry.is_symlink() and _id(entry.stat()) in _ids_above(str(root)):
                        self._leave_out("link to a folder above it", entry.path)
                elif not _is_hidden(entry.name) and entry.name.lower().endswith(KNOWN_EXTENSIONS):
                    self._leave_out("outside of the class folders", entry.path)

    def _walk(self, folder: str, above: set[tuple[int, int]], found: list[_Folder]) -> None:
        """Append the folder and all below it to `found`. `above`: the folders that lead to it."""
        own = _id(os.stat(folder))
        if own in above:
            self._leave_out("link to a folder above it", folder)
            return
        if os.path.islink(folder):
            self._follow(folder)
        if own in self._seen:
            raise self._same_twice(folder, self._seen[own])
        self._seen[own] = folder
        known: list[tuple[str, int]] = []
        unknown: list[str] = []
        below: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if _is_hidden(name):
                    self._leave_out("hidden", entry.path)
                elif _is(entry.is_dir):
                    below.append(entry.path)
                elif not name.lower().endswith(self._known):
                    unknown.append(name)
                elif not entry.is_symlink():
                    if entry.is_file():
                        known.append((name, hash((own[0], entry.inode()))))
                    else:
                        self._leave_out("no file", entry.path)
                elif _is(entry.is_file):
                    known.append((name, hash(_id(entry.stat()))))
                    self._links["files"].append(entry.path)
                else:
                    self._broken.append(self.named(entry.path))
        found.append(_Folder(folder, known, unknown))
        for path in sorted(below):
            self._walk(path, above | {own}, found)

    def _follow(self, folder: str) -> None:
        """Account for a link to a folder; raise InputError where it leads to another class or
        split."""
        real = os.path.realpath(folder)
        for root in self._roots:
            if real.startswith(root) and not _is_hidden(real[len(root) :].split(os.sep)[0]):
                raise self._same_twice(folder, real)
        self._links["folders"].append(folder)

    def _same_twice(self, folder: str, other: str) -> InputError:
        return InputError(
            f"{self._spec}: {folder} and {other} are one folder, by a link, so that its images"
            " would be in two classes or splits, or twice in one; remove the link"
        )

    def _look_at(self, paths: list[str]) -> dict[str, int]:
        """Look at the header of files whose name does not say that they are images; return those
        that are, each with the number of its file."""
        if self._by_suffix:
            kinds = [_kind(path) for path in paths]
        else:
            with warnings.catch_warnings(), ThreadPoolExecutor(16) as pool:
                warnings.simplefilter("ignore")  # of Pillow, about the size
                kinds = list(pool.map(_look, paths))
        images = {}
        for path, kind in zip(paths, kinds, strict=True):
            if kind == "image":
                images[path] = hash(_id(os.stat(path)))
                self._by_content.append(self.named(path))
            else:
                self._leave_out(kind, path)
        return images

    def _find_twice(self, paths: list[str]) -> None:
        """Find images that are one file, by links."""
        self._path = [self.named(path) for path in paths]
        id_N = np.array(self._file_ids, dtype=np.int64)
        order_N = np.argsort(id_N, kind="stable")
        same = np.flatnonzero(id_N[order_N][1:] == id_N[order_N][:-1])
        for a, b in zip(order_N[same].tolist(), order_N[same + 1].tolist(), strict=True):
            if os.path.samefile(paths[a], paths[b]):  # not only the same number
                self._twice.append((a, b))
        self._twice.sort()
