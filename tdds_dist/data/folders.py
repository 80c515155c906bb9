"""A folder of images: which of its folders are splits, and which are classes.

The images of a split are in the order of torchvision.datasets.ImageFolder: classes by name, in them
files by name, subfolders included. `image_files` says which files are images.
"""

# N images of the split

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.data.image_files import FORMATS, Scan, has_image, some, subfolders
from tdds_dist.errors import InputError
from tdds_dist.text import printable

SPLITS = ("train", "val")
# how a split is called; around it may stand digits, signs, and the words of _BESIDE
_TRAIN = "training|trainval|train|trn"
_VAL = "validation|validate|valid|val|development|devel|dev|evaluation|eval|holdout|heldout"
_TEST = "testing|tests|test|tst"
_BESIDE = (
    "dataset|data|set|split|images|image|imgs|img|pictures|photos|files|folder|dir|samples|ilsvrc"
    "|imagenet|seg|my"
)
_MAX_LOOKS = 20  # headers that are looked at to tell what a folder holds
_SPLIT_NAMES = {
    role: re.compile(f"(?:{_BESIDE})*(?:{names})(?:{_BESIDE})*")
    for role, names in (("train", _TRAIN), ("val", _VAL), ("test", _TEST))
}


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The image files of one split of a source, and what a person should know about them."""

    split: str  # the one that was asked for, or that a flat folder is named after
    splits: tuple[str, ...]  # those that the source holds
    other: str | None  # the spec of the other split where it is another one; it may lie beside
    class_names: list[str]
    path: list[str]  # [N], relative to the folder of the spec; in archives file#row or shard/key
    label_N: np.ndarray  # int64
    stored: Callable[[int], Path | bytes]  # the file of an image, or its bytes in an archive
    settings: dict[str, Any]
    notes: list[str]
    num_left_out: int | None = None  # files of a folder
    # int64, ascending to N: the parts that one process reads in order, faster than others beside it
    part_end: np.ndarray | None = None


def read_folder(
    spec: str, folder: Path, split: str | None, formats: str = "pillow", strict: bool = False
) -> ImageFiles:
    """Find the images of `folder`: DIR/<split>/<class>/<image> where it has folders named after
    splits that hold class folders, else DIR/<class>/<image>.

    split: "train" or "val"; None is train, whose folder must then have this name. formats:
    "pillow", every file that Pillow reads; "torchvision", by the suffixes of its ImageFolder.
    strict: refuse when a file is left out or is there twice. Raises InputError for a folder that
    can be read in two ways, a split that is not there, classes without images, and links that would
    put images into two classes.
    """
    if formats not in FORMATS:
        raise InputError(f"formats={formats!r} is unknown; use one of {', '.join(FORMATS)}")
    if not folder.is_dir():
        raise InputError(
            f"{spec}: {folder} is not a directory; give a folder with one folder per class"
        )
    try:
        return _read_folder(spec, folder, split, formats, strict)
    except OSError as error:
        raise InputError(
            f"{spec}: cannot read the folder ({error}); make it readable, or move it away"
        ) from error


def _read_folder(
    spec: str, folder: Path, split: str | None, formats: str, strict: bool
) -> ImageFiles:
    layout = _find_layout(spec, folder)
    if split is None:
        layout.require_plain_names()
    split = split or "train"
    root = layout.require(split)
    class_names = _class_names(layout, root)
    scan = Scan(spec, folder, [*layout.roots.values()], formats == "torchvision")
    images = scan.images(root, class_names)
    path = [scan.named(file) for files in images for file in files]
    label_N = np.repeat(np.arange(len(images)), [len(files) for files in images])
    notes = [layout.note, *scan.notes()]
    if without := [name for name, files in zip(class_names, images, strict=True) if not files]:
        where = root / without[0]
        if root == layout.roots.get("train", root):
            raise InputError(
                f"{spec}: class folder {where} holds no image{scan.instead(where)}; add images, or"
                f" remove the folder{layout.also_remove(without[0])}"
            )
        notes.append(f"classes without an image in {split}: {some(without)}")
    scan.warn_of_two_labels(label_N)
    if strict and (said := scan.faults()):
        raise InputError(
            f"{spec}: --strict, but {'; '.join(said)}; remove these files, or leave --strict out"
        )
    if layout.is_flat:
        (split,) = layout.roots
    return ImageFiles(
        split,
        tuple(layout.roots),
        layout.other(split),
        class_names,
        path,
        label_N.astype(np.int64),
        lambda i: folder / path[i],
        {} if formats == "pillow" else {"formats": formats},
        notes,
        scan.num_left_out,
    )


# --- which folders are splits ---


def split_role(name: str) -> str | None:
    """Return "train", "val" or "test" where a folder of this name usually is that split, else None:
    Train, training, train2017, val_images, Validation Set."""
    letters = "".join(re.findall("[a-z]+", name.casefold()))
    return next((role for role, names in _SPLIT_NAMES.items() if names.fullmatch(letters)), None)


@dataclass(frozen=True)
class _Layout:
    """Places of the splits of a folder. `roots`: the folder with the class folders of each split; a
    flat folder is its own only split, val where it is named so, else train."""

    spec: str
    folder: Path
    roots: dict[str, Path]
    note: str
    is_flat: bool = False
    why_not: dict[str, str] = field(default_factory=dict)  # by split that is not there

    def require_plain_names(self) -> None:
        """Raise InputError where a folder is the train split by its name, and that is not train."""
        root = self.roots.get("train", self.folder)
        if not self.is_flat and root.name not in ("train", self.folder.name):
            raise InputError(
                f"{self.spec}: {_names(self.folder, [*self.roots.values()])} look like splits; give"
                f" {' or '.join(f'--split {split}' for split in self.roots)} to read one of them,"
                f" or imagefolder:{root} for the classes in it alone"
            )

    def require(self, split: str) -> Path:
        """Return the folder of the classes; raise InputError where the split is not there."""
        if split in self.roots:
            return self.roots[split]
        if self.is_flat and split == "train":
            return self.folder  # all there is, whatever its name
        here = f"{self.spec}: {self.folder} has"
        there = _names(self.folder, [*self.roots.values()])
        why = self.why_not.get(split, f"{there} but no {split}/")
        if split == "train":
            raise InputError(
                f"{here} {why}; add it, or give the folder of the classes itself, such as"
                f" imagefolder:{self.roots['val']}"
            )
        if (beside := self._beside("val")) is not None:
            raise InputError(f"{here} the train split only; give imagefolder:{beside} for val")
        raise InputError(
            f"{here} {why}; hold out a part of its images by --holdout 0.1 --seed 0, the same with"
            " --split train and with --split val, or "
            + (
                "leave --split out where all of them are for evaluation"
                if self.is_flat
                else "write another folder of images without --split"
            )
        )

    def other(self, split: str) -> str | None:
        """Return the spec of the other split, which may lie beside a flat folder; None where there
        is none."""
        other = "val" if split == "train" else "train"
        if not self.is_flat:
            return self.spec if other in self.roots else None
        beside = self._beside(other)
        return None if beside is None else f"imagefolder:{beside}"

    def also_remove(self, name: str) -> str:
        """Name the folder of this class in val, which must go together with that of train."""
        val = self.roots.get("val", self.folder) / name
        return f" together with {val}" if len(self.roots) == 2 and val.is_dir() else ""

    def _beside(self, wanted: str) -> Path | None:
        """Return the split that lies beside a flat folder which is named after the other one."""
        here = self.folder.absolute()
        role = split_role(here.name)
        if not self.is_flat or role is None or (role == "train") == (wanted == "train"):
            return None
        for name in ("train",) if wanted == "train" else ("val", "test"):
            found = [
                entry
                for entry in subfolders(here.parent)
                if split_role(entry.name) == name and _holds(entry) == "folders"
            ]
            if len(found) == 1:
                return self.folder.parent / found[0].name if self.folder.name else found[0]
        return None


def _find_layout(spec: str, folder: Path) -> _Layout:
    """Tell splits from classes by their names and by what lies in them: a split holds class
    folders, a class holds images."""
    everything = {entry: _holds(entry) for entry in subfolders(folder)}
    holds = {entry: found for entry, found in everything.items() if found}
    role_of = {entry: role for entry in holds if (role := split_role(entry.name)) is not None}
    splits = [entry for entry in role_of if holds[entry] == "folders"]
    if not splits:
        return _flat_layout(spec, folder, holds, role_of)
    others = [entry for entry in holds if entry not in role_of]
    by_role: dict[str, list[Path]] = {}
    for entry in splits:
        by_role.setdefault(role_of[entry], []).append(entry)
    if "val" in by_role:
        by_role.pop("test", None)
    elif "test" in by_role:
        by_role["val"] = by_role.pop("test")
    for split, found in by_role.items():
        if len(found) > 1:
            raise InputError(
                f"{spec}: {_names(folder, found)} can each be the {split} split; move all but one"
                f" out of {folder}, or give the folder of the classes itself, such as"
                f" imagefolder:{found[0]}"
            )
    if len(by_role) == 1 and others:
        raise InputError(
            f"{spec}: {_names(folder, splits)} is named like a split and holds folders, but"
            f" {_names(folder, others)} beside it holds images too; give imagefolder:{splits[0]} to"
            f" read the split alone, or rename {splits[0]} where it is a class"
        )
    roots = {split: by_role[split][0] for split in SPLITS if split in by_role}
    if len(roots) == 2 and os.path.samefile(*roots.values()):
        raise InputError(
            f"{spec}: {_names(folder, [*roots.values()])} are the same folder; remove the link, and"
            " hold out a part of the images for val by --holdout 0.1 --seed 0"
        )
    note = "; ".join(f"{split} is {_in(folder, root)}" for split, root in roots.items())
    if unused := [entry for entry in holds if entry not in roots.values()]:
        note += f"; not used: {_names(folder, unused)}"
    why_not = {
        "train" if role == "train" else "val": f"{_in(folder, entry)} without class folders that"
        " hold images"
        for entry, found in everything.items()
        if found != "folders" and (role := split_role(entry.name))
    }
    return _Layout(spec, folder, roots, f"splits: {note}", why_not=why_not)


def _flat_layout(
    spec: str, folder: Path, holds: dict[Path, str], role_of: dict[Path, str]
) -> _Layout:
    """Return the layout of a folder of class folders; raise InputError where they look like
    something else."""
    if len({*role_of.values()}) > 1 or (role_of and len(role_of) == len(holds)):
        raise InputError(
            f"{spec}: {_names(folder, [*role_of])} hold images but no class folders, so that splits"
            f" would be taken for classes; sort the images into {next(iter(role_of))}/<class>/, or"
            " rename the folders where they are classes"
        )
    nested = [entry for entry in holds if holds[entry] == "folders"]
    words = {entry: re.findall("[a-z]+", entry.name.casefold()) for entry in nested}
    loose = {role: entry for entry in nested for role in map(split_role, words[entry]) if role}
    if len(loose) > 1:
        raise InputError(
            f"{spec}: {_names(folder, [*loose.values()])} look like splits; name them train/ and"
            f" val/, or give the folder of the classes itself, such as"
            f" imagefolder:{next(iter(loose.values()))}"
        )
    if len(holds) == 1 and nested:
        raise InputError(
            f"{spec}: {folder} holds one folder only, {_names(folder, nested)}, and that holds"
            f" folders; give imagefolder:{nested[0]}"
        )
    for entry in nested:
        inner = {role: sub for sub in subfolders(entry) if (role := split_role(sub.name))}
        if "train" in inner and len(inner) > 1:
            raise InputError(
                f"{spec}: class folder {entry} holds splits, {_names(entry, [*inner.values()])},"
                f" which would become one; move them outside of the classes, to"
                f" {folder / 'train' / entry.name} and so on"
            )
    inside = {tuple(sub.name for sub in subfolders(entry)) for entry in nested}
    note = "one folder per class, no splits"
    if 1 < len(nested) == len(holds) and len(inside) == 1:
        note += f"; each holds {some([*inside.pop()])}, which are read as one"
    if role_of:
        note += f"; {_names(folder, [*role_of])} is a class, since no class folders lie in it"
    split = "val" if split_role(folder.absolute().name) in ("val", "test") else "train"
    why_not = {"val": "folders of classes but no val split"}
    return _Layout(spec, folder, {split: folder}, note, True, why_not)


def _in(folder: Path, entry: Path) -> str:
    return printable(f"{os.path.relpath(entry, folder)}/")


def _names(folder: Path, entries: list[Path]) -> str:
    return some([_in(folder, entry) for entry in entries])


def _holds(folder: Path) -> str:
    """Return "folders" where a subfolder holds images, "images" where only the folder itself does,
    else ""."""
    if any(has_image(sub, _MAX_LOOKS) for sub in subfolders(folder)):
        return "folders"
    return "images" if has_image(folder, _MAX_LOOKS, deep=False) else ""


def _class_names(layout: _Layout, root: Path) -> list[str]:
    """Return the classes of a split: the folders of train, where there is a train split."""
    spec, reference = layout.spec, layout.roots.get("train", root)
    folders = subfolders(reference)
    if not folders:
        raise InputError(
            f"{spec}: {reference} has no class folders; expected {reference}/<class>/<image>"
        )
    if not layout.is_flat and len(folders) == 1 and _holds(folders[0]) == "folders":
        raise InputError(
            f"{spec}: {reference} holds one folder only, {_names(reference, folders)}, and that"
            f" holds folders; give imagefolder:{folders[0]}"
        )
    names = [entry.name for entry in folders]
    if len(layout.roots) < 2:
        return names
    val, known = layout.roots["val"], set(names)
    more = [entry for entry in subfolders(val) if entry.name not in known and has_image(entry)]
    if more:
        raise InputError(
            f"{spec}: {_in(layout.folder, reference)} has no {_names(val, more)} which"
            f" {_in(layout.folder, val)} has; put images of it into {reference / more[0].name}, or"
            f" move {more[0]} out of {val}"
        )
    if root == val and (empty := next((sub for sub in folders if not has_image(sub)), None)):
        raise InputError(
            f"{spec}: class folder {empty} holds no image; add images, or remove the"
            f" folder{layout.also_remove(empty.name)}"
        )
    return names
