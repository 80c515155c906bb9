"""The manifest beside a .beton: the path, label, checksum and known noise of every global index."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.run import Config
from tdds_dist.data.beton import BetonInfo, _read_header, dataset_fingerprint, inspect_beton
from tdds_dist.data.corruptions import KINDS
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Fingerprint, fingerprint, write_atomically

MANIFEST_FORMAT = "tdds-manifest-1"
_COLUMNS = ("path", "label_N", "true_label_N", "corruption", "crc32_N")  # of the samples

_CONTROL_BYTES = bytes(range(32))

# --- manifest ---


@dataclass(frozen=True, eq=False)
class Manifest:
    """The origin of a `.beton`: class names, and path, label and known noise of every global
    index."""

    source: str
    split: str
    num_samples: int
    num_classes: int
    class_names: list[str]
    path: list[str]  # [N], relative: never absolute, no `..`
    label_N: np.ndarray  # int64
    beton_bytes: int  # size of the .beton
    labels_sha256: str
    settings: dict[str, Any]  # write_mode, quality, max_resolution, and those of the source
    image_size: tuple[int, int]  # largest height and largest width in the file, pixels
    true_label_N: np.ndarray | None = None  # int64, before label noise; None where label_N is clean
    # [N], one of corruptions.KINDS, "" where clean; None without corruption
    corruption: list[str] | None = None
    # uint32, of the bytes of each image in the .beton; None in older manifests
    crc32_N: np.ndarray | None = None

    @property
    def noisy_N(self) -> np.ndarray | None:
        """Mark the samples whose label is not the true one, bool [N]; None without label noise."""
        return None if self.true_label_N is None else self.true_label_N != self.label_N

    @cached_property
    def corrupted_N(self) -> np.ndarray | None:
        """Mark the images that were corrupted, bool [N]; None without corruption."""
        return (
            None if self.corruption is None else np.array([kind != "" for kind in self.corruption])
        )

    @property
    def corruption_kinds(self) -> dict[str, np.ndarray]:
        """Return which images are corrupted in which way, bool [N], by the kinds that occur; empty
        without corruption."""
        kind_N = np.array(self.corruption or (), dtype=np.str_)
        return {kind: kind_N == kind for kind in np.unique(kind_N).tolist() if kind}

    @property
    def fingerprint(self) -> Fingerprint:
        """Compute the fingerprint of the labels in the file."""
        return fingerprint(self.label_N, self.num_classes, self.class_names)


def manifest_path(beton: Path) -> Path:
    """Return the path of the manifest of a `.beton`: X.beton -> X.manifest.json."""
    return Path(beton).with_suffix(".manifest.json")


def read_manifest(beton: Path) -> Manifest | None:
    """Read the manifest beside a `.beton`; None when there is none.

    Raises InputError when it is damaged, holds unsafe paths, or contradicts the size or sample
    count of the file.
    """
    beton, path = Path(beton), manifest_path(beton)
    if not path.is_file():
        return None
    header, beton_bytes = _read_header(beton)
    try:
        record = json.loads(path.read_bytes())
        columns = record.pop("columns")
        if record.pop("format") != MANIFEST_FORMAT:
            raise ValueError(f"format is not {MANIFEST_FORMAT}")
        max_height, max_width = record.pop("image_size")
        true_label, crc32 = columns.get("true_label"), columns.get("crc32")
        manifest = Manifest(
            **record,
            path=columns["path"],
            label_N=np.array(columns["label"], dtype=np.int64),
            image_size=(int(max_height), int(max_width)),
            corruption=columns.get("corruption"),
            true_label_N=None if true_label is None else np.array(true_label, dtype=np.int64),
            crc32_N=None if crc32 is None else _crc32_column(crc32),
        )
        _check_manifest(manifest)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{path} is not a whole manifest ({error}); remove it, or write the .beton again with "
            "`tdds write`"
        ) from error
    if (manifest.num_samples, manifest.beton_bytes) != (int(header["num_samples"]), beton_bytes):
        raise InputError(
            f"{path} describes {manifest.num_samples} samples in {manifest.beton_bytes} bytes, but "
            f"{beton} has {header['num_samples']} in {beton_bytes}; remove the manifest, or write "
            "the .beton again with `tdds write`"
        )
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless the fields agree with each other."""
    names, label_N = manifest.class_names, manifest.label_N
    if not (
        isinstance(manifest.path, list)
        and isinstance(manifest.num_samples, int)
        and manifest.num_samples > 0
        and label_N.shape == (len(manifest.path),) == (manifest.num_samples,)
    ):
        raise ValueError(
            f"{len(manifest.path)} paths and {label_N.size} labels for {manifest.num_samples!r}"
            " samples"
        )
    if not (
        isinstance(names, list)
        and len(names) == manifest.num_classes
        and isinstance(manifest.settings, dict)
        and all(isinstance(text, str) for text in (manifest.source, manifest.split, *names))
    ):
        raise ValueError(
            f"class_names are not {manifest.num_classes!r} names, or another field has a wrong type"
        )
    if not (label_N.min() >= 0 and label_N.max() < manifest.num_classes):
        raise ValueError(f"labels outside [0, {manifest.num_classes})")
    if fingerprint(label_N, manifest.num_classes).labels_sha256 != manifest.labels_sha256:
        raise ValueError("labels do not have the recorded sha256")
    true_N, corruption = manifest.true_label_N, manifest.corruption
    if true_N is not None and not (
        true_N.shape == label_N.shape and true_N.min() >= 0 and true_N.max() < manifest.num_classes
    ):
        raise ValueError(
            f"true labels are not {manifest.num_samples} numbers in [0, {manifest.num_classes})"
        )
    if corruption is not None and not (
        isinstance(corruption, list)
        and len(corruption) == manifest.num_samples
        and all(kind in ("", *KINDS) for kind in corruption)
    ):
        raise ValueError(
            f"corruption is not {manifest.num_samples} of {', '.join(KINDS)} or nothing"
        )
    if manifest.crc32_N is not None and manifest.crc32_N.shape != label_N.shape:
        raise ValueError(f"{manifest.crc32_N.size} CRCs for {manifest.num_samples} samples")
    check_paths(manifest.path)


def _crc32_column(column: Any) -> np.ndarray:
    """Return the column as uint32; raise ValueError for anything but numbers of 32 bits."""
    crc32_N = np.array(column)
    if crc32_N.dtype.kind != "i" or crc32_N.min() < 0 or crc32_N.max() >= 2**32:
        raise ValueError("crc32 holds other things than integers in [0, 2^32)")
    return crc32_N.astype(np.uint32)


def check_paths(paths: Sequence[str]) -> None:
    """Raise ValueError for a path that leads out of its folder or cannot stand on a line of its
    own."""
    # looked at as a whole first: a million paths one by one take two seconds
    lines = "\n" + "\n".join(paths) + "\n"
    coded = lines.encode("utf-8", "surrogatepass")
    is_plain = len(coded.translate(None, _CONTROL_BYTES)) == len(coded) - len(paths) - 1
    if is_plain and not any(sign in lines for sign in ("\\", "..", ":", "\n/", "\n\n")):
        return
    unsafe = re.compile(r"^/|^[A-Za-z]:|\\|(^|/)\.\.(/|$)|[\x00-\x1f]|^$")
    bad = next((path for path in paths if unsafe.search(path)), None)
    if bad is not None:
        raise ValueError(
            f"path {bad!r} must be relative, without `..`, backslashes and control characters"
        )


def not_utf8(paths: Sequence[str]) -> list[str]:
    """Return the paths that are not UTF-8, as bytes are written; no table or text can hold them."""

    surrogate = re.compile("[\ud800-\udfff]")  # in the place of a byte
    if not surrogate.search("\n".join(paths)):
        return []
    return [repr(os.fsencode(path))[1:] for path in paths if surrogate.search(path)]


def write_manifest(path: Path, manifest: Manifest) -> None:
    record = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    columns = {key.removesuffix("_N"): record.pop(key) for key in _COLUMNS}
    columns = {name: values for name, values in columns.items() if values is not None}
    record = {"format": MANIFEST_FORMAT, **record, "columns": columns}
    text = json.dumps(record, default=np.ndarray.tolist)
    write_atomically(path, lambda file: file.write(text.encode()))


def check_labels(
    info: BetonInfo, num_classes: int, manifest: Manifest | None = None, complete: bool = True
) -> None:
    """Raise InputError unless the labels are those of the manifest, if any, and those of
    `num_classes` classes.

    Without a manifest the largest label tells the number of classes, where the file is `complete`
    (the training file; an evaluation file may lack classes).
    """
    if (
        manifest is not None
        and fingerprint(info.label_N, num_classes).labels_sha256 != manifest.labels_sha256
    ):
        raise InputError(
            f"{info.path}: labels are not those of {manifest_path(info.path)}; remove the manifest,"
            " or write the .beton again with `tdds write`"
        )
    outside = np.flatnonzero((info.label_N < 0) | (info.label_N >= num_classes))
    if outside.size:
        first = int(outside[0])
        raise InputError(
            f"{info.path}: sample {first} has label {info.label_N[first]}, outside [0,"
            f" {num_classes}) ({outside.size} such samples); set data.num_classes to the number of"
            " classes of the file, or write it again with labels from 0"
        )
    if manifest is None and not complete:
        return
    present = manifest.num_classes if manifest is not None else int(info.label_N.max()) + 1
    if present != num_classes:
        where = manifest_path(info.path) if manifest is not None else info.path
        raise InputError(
            f"data.num_classes={num_classes}, but {where} has {present} classes; "
            f"set data.num_classes={present}"
        )


def check_classes(files: Sequence[tuple[BetonInfo, Manifest | None]], num_classes: int) -> None:
    """Raise InputError unless the labels of all files, which are splits of one dataset, are those
    of `num_classes` classes. Without a manifest the largest label in any file tells how many there
    are: each may lack classes."""
    stated = [manifest for _, manifest in files if manifest is not None]
    for info, manifest in files:
        largest = int(info.label_N.max())
        if manifest is None and stated and stated[0].num_classes == num_classes <= largest:
            raise InputError(
                f"{info.path}: a sample has label {largest}, but the other split has {num_classes}"
                " classes by its manifest; give two splits of one dataset, or write this one again"
                " with `tdds write`"
            )
        check_labels(info, num_classes, manifest, complete=False)
    present = max(int(info.label_N.max()) for info, _ in files) + 1
    if not stated and present != num_classes:
        raise InputError(
            f"data.num_classes={num_classes}, but {files[0][0].path} has {present} classes; set"
            f" data.num_classes={present}"
        )


def num_shared(train: Manifest, val: Manifest) -> int:
    """Count the images of `val` that are in `train` too: by the CRC-32 of their bytes, or, where a
    manifest has none, by their path in the same source."""
    if train.crc32_N is not None and val.crc32_N is not None:
        return int(np.isin(val.crc32_N, train.crc32_N).sum())
    return len({*train.path} & {*val.path}) if train.source == val.source else 0


# ---- datasets


@dataclass(frozen=True, eq=False)
class Dataset:
    """The samples as far as they are known, and the file that tells."""

    where: Path
    label_N: np.ndarray  # int64, UNKNOWN_LABEL where not recorded
    fingerprint: Fingerprint
    manifest: Manifest | None


def read_dataset(beton: Path, num_classes: int = 0, config: Config | None = None) -> Dataset:
    """Read the samples of a .beton. `num_classes`: 0 where nothing but the file can tell. `config`
    names the fields that hold image and label."""
    fields = ("", "") if config is None else (config.data.image_field, config.data.label_field)
    info, manifest = inspect_beton(beton, *fields), read_manifest(beton)
    is_known = num_classes > 0
    num_classes = (
        manifest.num_classes if manifest is not None else num_classes or int(info.label_N.max()) + 1
    )
    check_labels(info, num_classes, manifest, complete=not is_known)
    names = () if manifest is None else manifest.class_names
    return Dataset(beton, info.label_N, dataset_fingerprint(info, num_classes, names), manifest)
