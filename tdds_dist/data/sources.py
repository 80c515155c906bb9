"""Sources of images: folders, Parquet files, tar shards, CIFAR archives, IDX files as of MNIST,
scikit-learn's digits, synthetic images; and noise on purpose.

Owns the order of a dataset's samples (the global index of a sample is its position here, for ever),
their labels, class names and paths, and reading one image by index. `writer` writes them to a file.
A reader runs in forked worker processes, so it keeps no open files and draws its random numbers
from a seed and the index alone.
"""

# N samples of the source, C classes

import csv
import gzip
import hashlib
import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tdds_dist.data.archives import read_parquet, read_webdataset
from tdds_dist.data.corruptions import KINDS, corrupt
from tdds_dist.data.folders import SPLITS, ImageFiles, read_folder
from tdds_dist.data.image_files import some
from tdds_dist.data.pixels import PixelRules, read_rgb
from tdds_dist.errors import InputError

FORMS = (
    "imagefolder:DIR, parquet:DIR, webdataset:SHARDS, cifar10:DIR, cifar100:DIR, idx:DIR, digits,"
    " synthetic:N,CLASSES,SIZE"
)
_ARCHIVES = {"parquet": read_parquet, "webdataset": read_webdataset}
SPLIT_SEED, SUBSET_SEED, SYNTHETIC_SEED = 20, 21, 22
# which labels, which images, what is done to an image
LABEL_NOISE_SEED, CORRUPTED_SEED, CORRUPTION_SEED = 24, 25, 26
HOLDOUT_SEED, THRESHOLD_SEED = 27, 28
THRESHOLD_CLASS = "threshold samples"


@dataclass(frozen=True, eq=False)
class Source:
    """N labelled images, read one at a time."""

    name: str  # the spec it was opened with
    split: str
    class_names: list[str]
    # per sample: relative to the folder of the spec, or a stable made-up name such as digits/0017
    path: list[str]
    label_N: np.ndarray  # int64, in [0, C)
    reader: Callable[[int], np.ndarray]
    # what else decided which samples these are
    settings: dict[str, Any] = field(default_factory=dict)
    true_label_N: np.ndarray | None = None  # int64, before label noise; None without
    # per sample: one of corruptions.KINDS, "" where clean; None without
    corruption: list[str] | None = None
    splits: tuple[str, ...] = SPLITS  # those that the source has
    other: str | None = None  # the spec of the other split; None where nothing tells
    notes: list[str] = field(default_factory=list)  # what a person should know
    num_left_out: int | None = None  # files; None where the source is no folder
    # what was done to the pixels of images, by the words of `pixels`: counted as they are read, and
    # by `writer` over all of them
    tally: Counter[str] = field(default_factory=Counter)
    # int64, ascending to N: parts that are fast when one process reads them in order; None without
    part_end: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label_N)

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 [H, W, 3], RGB. Raises whatever the file's decoder raises
        when it is damaged."""
        return self.reader(index)


def open_source(
    spec: str,
    split: str | None = "train",
    subset: int | None = None,
    *,
    holdout: float = 0.0,
    seed: int = 0,
    formats: str = "pillow",
    strict: bool = False,
    pixels: PixelRules | None = None,
    image_field: str = "",
    label_field: str = "",
) -> Source:
    """Open the source that `spec` names; `subset` keeps that many samples, drawn class by class
    with a fixed seed.

    split: "train" or "val"; None is train, where no folder's name has to be guessed. holdout: of a
    source with one split, the share of each class that is its val split; `seed` draws it. formats:
    which files of a folder are images, "pillow" or "torchvision". strict: refuse a folder of which
    a file is left out. pixels: what becomes of the pixels of image files, by default
    `PixelRules()`. image_field, label_field: which column or member of an archive they are. Raises
    InputError for an unknown spec or split, missing or contradictory data, and a subset larger than
    the source.
    """
    kind, _, rest = spec.partition(":")
    if split not in (None, *SPLITS):
        raise InputError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    if formats != "pillow" and kind != "imagefolder":
        raise InputError(f"formats={formats} is for imagefolder:DIR, not for {spec}; leave it out")
    if pixels not in (None, PixelRules()) and kind not in ("imagefolder", *_ARCHIVES):
        raise InputError(
            f"exif, background and grey_range are for files of images, not for {spec}; leave them"
            " out"
        )
    if (image_field or label_field) and kind not in _ARCHIVES:
        raise InputError(
            "image_field and label_field are for parquet:DIR and webdataset:SHARDS, not for"
            f" {spec}; leave them out"
        )
    # the whole of its only split; one that has two is refused
    part = "train" if holdout else split
    if kind == "imagefolder" and rest:
        found = read_folder(spec, Path(rest), part, formats, strict)
        source = _of_files(spec, found, pixels or PixelRules())
    elif kind in _ARCHIVES and rest:
        # of one that has no split of this kind, all of it
        part = None if holdout else split
        found = _ARCHIVES[kind](spec, rest, part, image_field, label_field)
        source = _of_files(spec, found, pixels or PixelRules())
    elif kind in ("cifar10", "cifar100") and rest:
        source = _cifar(spec, kind, rest, part or "train")
    elif kind == "idx" and rest:
        source = _idx(spec, Path(rest), part)
    elif kind == "synthetic" and rest:
        source = _synthetic(spec, rest, part or "train")
    elif spec == "digits":
        source = _digits(spec, part or "train")
    else:
        raise InputError(f"source {spec!r} is unknown; use one of {FORMS}")
    if holdout:
        source = _hold_out(source, holdout, seed, split or "train")
    return source if subset is None else _take_subset(source, subset)


def stratified_pick(
    label_N: np.ndarray, count: int, seed: int | list[int], leave: int = 0
) -> np.ndarray:
    """Draw sorted int64 [count] indices with the class shares of `label_N`, at least one per class
    where count allows. At least `leave` of each class are not drawn.

    Class counts are rounded by largest remainder. With the same seed a class's picks for a smaller
    share are among its picks for a larger one.
    """
    num_C = np.bincount(label_N)
    most_C = np.maximum(num_C - leave, 0)
    quota_C = count * num_C / len(label_N)
    floor_C = (
        (most_C > 0).astype(np.int64) if count >= np.count_nonzero(most_C) else np.zeros_like(num_C)
    )
    take_C = np.clip(quota_C.astype(np.int64), floor_C, most_C)
    while take_C.sum() < count:
        take_C[np.argmax(np.where(take_C < most_C, quota_C - take_C, -np.inf))] += 1
    while take_C.sum() > count:
        take_C[np.argmax(np.where(take_C > floor_C, take_C - quota_C, -np.inf))] -= 1
    rng = np.random.default_rng(seed)
    order_C = [rng.permutation(np.flatnonzero(label_N == label)) for label in range(len(num_C))]
    return np.sort(
        np.concatenate([order[:take] for order, take in zip(order_C, take_C, strict=True)])
    ).astype(np.int64)


def _hold_out(source: Source, share: float, seed: int, split: str) -> Source:
    """Divide a source that has one split: about `share` of each class are val, the others train.

    Every class keeps one image for training, and has one in val where it has two.
    """
    if not 0 < share < 1:
        raise InputError(
            f"holdout={share} must be a share between 0 and 1; use 0.1 for a tenth of the images"
        )
    _check_seed(seed, "holdout")
    if len(source.splits) > 1:
        way_out = "leave --holdout out"
        if source.name.startswith("imagefolder:"):
            train = source.path[0].split("/")[0]
            way_out += f", or give {source.name.rstrip('/')}/{train}"
        raise InputError(
            f"holdout={share} makes a val split, but {source.name} has its own; {way_out}"
        )
    num_samples, num_C = len(source), np.bincount(source.label_N)
    most = int(np.maximum(num_C - 1, 0).sum())
    count = max(1, round(share * num_samples))
    if count > most:
        raise InputError(
            f"holdout={share} of the {num_samples} images of {source.name} are {count}, but each of"
            f" the {np.count_nonzero(num_C)} classes needs one for training; "
            + (
                f"hold out at most {int(1000 * most / num_samples) / 1000:g}"
                if most
                else "add images"
            )
        )
    val = stratified_pick(source.label_N, count, [HOLDOUT_SEED, seed], leave=1)
    index = val if split == "val" else np.setdiff1d(np.arange(num_samples), val)
    note = f"holdout: {count:,} of {num_samples:,} images are val (seed {seed})"
    missing = int((np.bincount(source.label_N[val], minlength=len(num_C)) == 0).sum())
    if missing:
        note += f"; classes with too few images to be in it: {missing:,}"
    return replace(
        _pick(source, index, {"holdout": share, "holdout_seed": seed}),
        split=split,
        splits=SPLITS,
        other=source.name,
        notes=[*source.notes, note],
    )


def _check_seed(seed: int, name: str) -> None:
    # a larger one takes two words of NumPy's seed, which another (seed, index) may have
    if not 0 <= seed < 2**32:
        raise InputError(
            f"seed={seed} of {name} must be between 0 and {2**32 - 1}; choose a number in that"
            " range"
        )


def _take_subset(source: Source, subset: int) -> Source:
    if not 1 <= subset <= len(source):
        raise InputError(
            f"subset={subset} must be between 1 and the {len(source)} samples of {source.name} "
            f"({source.split}); choose a number in that range or leave it out"
        )
    index = stratified_pick(source.label_N, subset, SUBSET_SEED)
    return _pick(source, index, {"subset": subset})


def _pick(source: Source, index: np.ndarray, settings: dict[str, Any]) -> Source:
    """Return the samples at `index` of a source, with the settings that chose them."""
    return replace(
        source,
        path=[source.path[i] for i in index],
        label_N=source.label_N[index],
        part_end=None
        if source.part_end is None
        else np.unique(np.searchsorted(index, source.part_end)),
        reader=lambda i: source.reader(int(index[i])),
        settings=source.settings | settings,
        true_label_N=None if source.true_label_N is None else source.true_label_N[index],
        corruption=None if source.corruption is None else [source.corruption[i] for i in index],
    )


# --- noise on purpose ---


def with_label_noise(source: Source, rate: float, seed: int) -> Source:
    """Return `source` with round(rate * N) labels changed to another class, uniformly (symmetric
    noise).

    With the same seed the changes at a lower rate are among those at a higher one. A rate of 0
    gives `source` itself. Raises InputError for a rate outside [0, 1), a seed outside [0, 2**32), a
    single class, and noise upon noise.
    """
    _check_noise(source, "label_noise", rate, seed)
    if rate == 0:
        return source
    num_samples, num_classes = len(source), len(source.class_names)
    if num_classes < 2:
        raise InputError(
            f"label_noise={rate} needs another class to change to, but {source.name} has"
            f" {num_classes}; use a source with at least 2, or leave label noise out"
        )
    rng = np.random.default_rng([LABEL_NOISE_SEED, seed])
    changed = rng.permutation(num_samples)[: round(rate * num_samples)]
    # one for every sample, so that none depends on the rate
    shift_N = rng.integers(1, num_classes, num_samples)
    label_N = source.label_N.copy()
    label_N[changed] = (label_N + shift_N)[changed] % num_classes
    return replace(
        source,
        label_N=label_N,
        true_label_N=source.label_N,
        settings=source.settings | {"label_noise": rate, "noise_seed": seed},
    )


def with_corruption(source: Source, rate: float, seed: int) -> Source:
    """Return `source` with round(rate * N) images corrupted, the kinds of `corruptions.KINDS` in
    equal shares up to rounding.

    With the same seed the corruptions at a lower rate are among those at a higher one; they have
    nothing to do with the changed labels. A rate of 0 gives `source` itself. Raises InputError for
    a rate outside [0, 1), a seed outside [0, 2**32), and corruption upon corruption.
    """
    _check_noise(source, "corrupt", rate, seed)
    if rate == 0:
        return source
    order = np.random.default_rng([CORRUPTED_SEED, seed]).permutation(len(source))
    corruption = [""] * len(source)
    for place, index in enumerate(order[: round(rate * len(source))]):
        corruption[index] = KINDS[place % len(KINDS)]

    def read(index: int) -> np.ndarray:
        image = source.reader(index)
        if not corruption[index]:
            return image
        return corrupt(
            image, corruption[index], np.random.default_rng([CORRUPTION_SEED, seed, index])
        )

    return replace(
        source,
        reader=read,
        corruption=corruption,
        settings=source.settings | {"corrupt": rate, "noise_seed": seed},
    )


def with_threshold_samples(source: Source, part: int, seed: int) -> Source:
    """Return `source` with round(N / (C + 1)) samples in a class of their own, the last: the
    threshold samples of AUM (Pleiss et al., NeurIPS 2020, section 3.2), whose margins say how low
    those of wrong labels are.

    `part` 1 and 2 draw different samples. A val split gets the name of the class alone.
    """
    if part not in (1, 2):
        raise InputError(f"threshold_samples={part} must be 1 or 2, two draws without overlap")
    if THRESHOLD_CLASS in source.class_names:
        raise InputError(f"{source.name} has a class {THRESHOLD_CLASS!r} already; rename it")
    num_classes, label_N = len(source.class_names), source.label_N.copy()
    order = np.random.default_rng([THRESHOLD_SEED, seed]).permutation(len(source))
    num = round(len(source) / (num_classes + 1)) if source.split == "train" else 0
    if source.split == "train" and num < 1:
        raise InputError(
            f"threshold_samples={part} takes 1 in {num_classes + 1} images, and {source.name} has"
            f" {len(source)}; leave it out"
        )
    label_N[order[(part - 1) * num : part * num]] = num_classes
    return replace(
        source,
        class_names=[*source.class_names, THRESHOLD_CLASS],
        label_N=label_N,
        true_label_N=source.label_N if source.true_label_N is None else source.true_label_N,
        settings=source.settings | {"threshold_samples": part, "threshold_seed": seed},
    )


def with_new_labels(source: Source, decisions: Sequence[Path]) -> Source:
    """Return `source` with the labels of CSV files, one after the other: their columns `index`,
    `label` and `new_label` hold the global index and names of classes, as the page of `tdds
    suspects` saves them.

    Raises:
        InputError: no such file or column, an index outside the source or twice, a label that is
        not the one there, a path (column `path`, where there is one) of another image, an unknown
        class.
    """
    label_N, digests = source.label_N.copy(), []
    number = {name: label for label, name in enumerate(source.class_names)}
    for path in decisions:
        where, way_out = f"relabel={path}", "give decisions of `tdds suspects` on this source"
        try:
            content = Path(path).read_bytes()
            table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
            rows = [*table]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{where} cannot be read ({error}); {way_out}") from error
        if missing := {"index", "label", "new_label"} - {*(table.fieldnames or ())}:
            raise InputError(f"{where} has no column {', '.join(sorted(missing))}; {way_out}")
        seen = set[int]()
        for line, row in enumerate(rows, start=2):
            text = row["index"] or ""
            index = int(text) if text.isascii() and text.isdigit() else -1
            problem = ""
            if not 0 <= index < len(source):
                problem = f"index {row['index']!r} is not in [0, {len(source)})"
            elif index in seen:
                problem = f"image {index} is there twice"
            elif row.get("path", source.path[index]) != source.path[index]:
                problem = f"image {index} is {source.path[index]!r} here, not {row['path']!r}"
            elif row["new_label"] == (here := source.class_names[label_N[index]]) and (
                row["label"] == source.class_names[source.label_N[index]]
            ):
                pass  # as another file decided
            elif row["label"] != here:
                problem = f"image {index} has label {here!r} here, not {row['label']!r}"
            elif row["new_label"] not in number:
                problem = f"class {row['new_label']!r} is unknown"
            if problem:
                raise InputError(f"{where}, line {line}: {problem}; {way_out}")
            seen.add(index)
            label_N[index] = number[row["new_label"]]
        digests.append(hashlib.sha256(content).hexdigest())
    lineage = {
        "relabel": [Path(path).name for path in decisions],
        "relabel_sha256": digests,
        "relabelled": int((label_N != source.label_N).sum()),
    }
    return replace(source, label_N=label_N, settings=source.settings | lineage)


def _check_noise(source: Source, name: str, rate: float, seed: int) -> None:
    if not 0 <= rate < 1:
        raise InputError(
            f"{name}={rate} must be a share in [0, 1); use 0.2 for a fifth of the samples"
        )
    _check_seed(seed, name)
    if name in source.settings:
        raise InputError(
            f"{name}={rate} comes on top of {name}={source.settings[name]}, but a source takes it"
            " once; start from the clean source"
        )
    if rate and source.settings.get("noise_seed", seed) != seed:
        raise InputError(
            f"seed={seed} of {name} must be the noise_seed={source.settings['noise_seed']} that the"
            " source already has, since a manifest holds one; use that seed for both"
        )


# --- image files ---


def _of_files(spec: str, found: ImageFiles, pixels: PixelRules) -> Source:
    """Read the image files that lie in folders (see `folders`), or in Parquet files or tar shards
    (see `archives`)."""
    tally: Counter[str] = Counter()

    def read(index: int) -> np.ndarray:
        stored = found.stored(index)
        if isinstance(stored, Path):
            return read_rgb(stored, pixels, tally)
        try:
            return read_rgb(io.BytesIO(stored), pixels, tally)
        except UnidentifiedImageError:
            raise ValueError(f"{len(stored):,} bytes that are no image Pillow reads") from None

    return Source(
        spec,
        found.split,
        found.class_names,
        found.path,
        found.label_N,
        read,
        settings=pixels.settings | found.settings,
        splits=found.splits,
        other=found.other,
        notes=found.notes,
        num_left_out=found.num_left_out,
        tally=tally,
        part_end=found.part_end,
    )


# --- CIFAR ---


def _cifar(spec: str, kind: str, folder: str, split: str) -> Source:
    """Read the archive's own training or test (`val`) images, in the archive's order."""
    from torchvision import datasets

    dataset_class = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    try:
        dataset = dataset_class(folder, train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{spec}: {Path(folder) / dataset_class.base_folder} is missing or damaged; download"
            f" {dataset_class.url} and unpack it with `tar -xzf {dataset_class.filename} -C"
            f" {folder}`"
        ) from error
    image_N, label_N = dataset.data, np.array(dataset.targets, dtype=np.int64)
    path = [f"{kind}/{split}/{i:05d}" for i in range(len(label_N))]
    return Source(
        spec,
        split,
        list(dataset.classes),
        path,
        label_N,
        lambda i: np.ascontiguousarray(image_N[i]),
    )


# --- IDX, the format of MNIST ---

_IDX_IMAGES = re.compile(r"(?P<set>.*?)[-_.]?(?P<role>train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_IDX_SPLIT = {"train": "train", "t10k": "val", "test": "val"}


def _idx(spec: str, place: Path, split: str | None) -> Source:
    """Read the grey images of MNIST, Fashion-MNIST, KMNIST or EMNIST, made RGB by repetition, in
    the order of the file.

    `place`: the folder, or of several data sets in a folder DIR/NAME, the beginning of their files'
    names, such as gzip/emnist-letters.
    """
    folder, wanted = (place, None) if place.is_dir() else (place.parent, place.name)
    name, file_of = _idx_files(spec, folder, wanted)
    split = split or "train"
    if split not in file_of:
        raise InputError(
            f"{spec}: no {split} split here, only {file_of.popitem()[1].name}; put the images and"
            f" labels of {split} beside it, named as they were published"
            f"{', or use --holdout' if split == 'val' else ''}"
        )
    image_file = file_of[split]
    image_N = _read_idx(spec, image_file, 3)
    # of both splits, since a class may be in one of them only
    label_of = {
        part: _read_idx(spec, _idx_labels(spec, path), 1).astype(np.int64)
        for part, path in file_of.items()
    }
    label_N = label_of[split]
    if len(image_N) != len(label_N):
        raise InputError(
            f"{spec}: {image_file.name} holds {len(image_N):,} images, but its file of labels"
            f" {len(label_N):,} labels; get both from the same place"
        )
    if name.startswith("emnist"):
        image_N = image_N.swapaxes(1, 2)  # stored column by column
    every_label = np.concatenate([*label_of.values()])
    class_names, first, note = _idx_classes(name, folder, every_label.min(), every_label.max())
    stem = image_file.name.removesuffix(".gz")
    return Source(
        spec,
        split,
        class_names,
        [f"{stem}#{i:05d}" for i in range(len(label_N))],
        label_N - first,
        lambda i: np.repeat(image_N[i][:, :, None], 3, axis=2),
        splits=tuple(part for part in SPLITS if part in file_of),
        notes=[note],
    )


def _idx_files(spec: str, folder: Path, wanted: str | None) -> tuple[str, dict[str, Path]]:
    """Return the name of a data set, lower case and empty for files named train- and t10k- only,
    and its file of images by split."""
    if not folder.is_dir():
        raise InputError(
            f"{spec}: {folder} is not a directory; give the folder that holds"
            " train-images-idx3-ubyte or train-images-idx3-ubyte.gz"
        )
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _IDX_IMAGES.fullmatch(path.name)
        if match is None or wanted not in (None, match["set"]):
            continue
        file_of, part = found.setdefault(match["set"], {}), _IDX_SPLIT[match["role"]]
        if part in file_of:
            raise InputError(
                f"{spec}: {file_of[part].name} and {path.name} are both images of {part}; move one"
                " of them away"
            )
        file_of[part] = path
    if not found:
        below = sorted({path.parent for path in folder.glob("*/*-images[-.]idx3-ubyte*")})
        here = folder if wanted is None else folder / wanted
        raise InputError(
            f"{spec}: no file {here}{'/' if wanted is None else '-'}train-images-idx3-ubyte or .gz;"
            f" give {f'idx:{below[0]}' if below else 'the folder that holds it'}"
        )
    if len(found) > 1:
        names = [f"idx:{folder / name}" for name in found if name]
        raise InputError(f"{spec}: {len(found)} data sets lie here; name one: {some(names)}")
    ((name, file_of),) = found.items()
    return name.casefold(), file_of


def _idx_labels(spec: str, images: Path) -> Path:
    """Return the file of labels beside a file of images, packed or not, whichever is there."""
    stem = images.name.removesuffix(".gz")
    name = stem.replace("-images", "-labels").replace("idx3", "idx1")
    there = [
        path for path in (images.with_name(name), images.with_name(f"{name}.gz")) if path.is_file()
    ]
    if len(there) > 1:
        raise InputError(
            f"{spec}: {there[0].name} and {there[1].name} are both there; move one of them away"
        )
    if not there:
        raise InputError(f"{spec}: {images.name} has no labels; put {name} or {name}.gz beside it")
    return there[0]


def _read_idx(spec: str, path: Path, num_dimensions: int) -> np.ndarray:
    """Read an IDX file of bytes, packed by gzip or not: uint8, of the shape that it states."""
    again = "get it again, and compare its checksum with the publisher's"
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{spec}: {path} cannot be unpacked ({error}); {again}") from error
    except OSError as error:
        raise InputError(f"{spec}: cannot read {path} ({error}); make it readable") from error
    start = 4 + 4 * num_dimensions
    magic = bytes([0, 0, 8, num_dimensions])  # 8: unsigned bytes
    if content[:4] != magic or len(content) < start:
        raise InputError(
            f"{spec}: {path} begins with {content[:4].hex() or 'nothing'}, and an IDX file of"
            f" {'images' if num_dimensions == 3 else 'labels'} with {magic.hex()} and its"
            f" {start - 4} bytes of sizes; {again}"
        )
    shape = tuple(np.frombuffer(content, ">u4", num_dimensions, 4).tolist())
    if len(content) - start != math.prod(shape) or 0 in shape:
        raise InputError(
            f"{spec}: {path} states {' x '.join(f'{side:,}' for side in shape)} bytes, and holds"
            f" {len(content) - start:,}; {again}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _idx_classes(name: str, folder: Path, lowest: int, highest: int) -> tuple[list[str], int, str]:
    """Return class names, the label of the first, and what tells them.

    The files hold numbers only. EMNIST is known by its files' names; Fashion-MNIST and KMNIST,
    whose files have the names of MNIST's, by that of their folder. Of all others, and where a label
    does not fit, classes are called by their numbers.
    """
    from torchvision.datasets import EMNIST, KMNIST, FashionMNIST

    known: dict[str, list[str]] = {
        f"emnist{split}": names for split, names in EMNIST.classes_split_dict.items()
    } | {"fashionmnist": FashionMNIST.classes, "kmnist": KMNIST.classes}
    around = folder.absolute()
    for said in (name, around.name, around.parent.name if around.name == "raw" else ""):
        names = known.get("".join(re.findall("[a-z0-9]+", said.casefold())), [])
        first = int(names[:1] == ["N/A"])  # EMNIST's letters are 1 to 26
        if first <= lowest and highest < len(names):
            return names[first:], first, f"class names: those of {said}"
    return [str(i) for i in range(highest + 1)], 0, "class names: the numbers in the file"


# --- digits ---


def _digits(spec: str, split: str) -> Source:
    """Take scikit-learn's 1,797 handwritten digits, 8 x 8 greys made 32 x 32 RGB: 1,437 train and
    360 val, disjoint.

    A path's number is the sample's row in scikit-learn's array, so that it is unique over both
    splits.
    """
    from sklearn.datasets import load_digits  # half a second

    digits = load_digits()
    grey_N, label_N = digits.images, digits.target.astype(np.int64)
    val = stratified_pick(label_N, -(-len(label_N) // 5), SPLIT_SEED)
    row = val if split == "val" else np.setdiff1d(np.arange(len(label_N)), val)

    def read(index: int) -> np.ndarray:
        grey = np.rint(grey_N[row[index]] * (255 / 16)).astype(np.uint8)
        return np.asarray(
            Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        )

    return Source(
        spec,
        split,
        [str(name) for name in digits.target_names],
        [f"digits/{i:04d}" for i in row],
        label_N[row],
        read,
    )


# --- synthetic images ---


def _synthetic(spec: str, rest: str, split: str) -> Source:
    """Make N square images with the spectrum of photographs: coarse colours of the class, finer
    random fields, noise.

    An image depends on (split, index) and its class only; labels go round, index i has class i mod
    CLASSES.
    """
    try:
        num_samples, num_classes, size = (int(part) for part in rest.split(","))
    except ValueError as error:
        raise InputError(
            f"source {spec!r} must be synthetic:N,CLASSES,SIZE with three whole numbers, "
            "such as synthetic:10000,10,64"
        ) from error
    if not (1 <= num_classes <= num_samples and 8 <= size <= 4096):
        raise InputError(
            f"source {spec!r} needs 1 <= CLASSES <= N and 8 <= SIZE <= 4096, "
            "such as synthetic:10000,10,64"
        )

    def read(index: int) -> np.ndarray:
        rng = np.random.default_rng([SYNTHETIC_SEED, 1 + SPLITS.index(split), index])
        of_class = np.random.default_rng([SYNTHETIC_SEED, 0, index % num_classes])
        image = _field(of_class, 4, size) * 0.5
        for cells, share in ((8, 0.6), (max(size // 8, 1), 0.3), (max(size // 3, 1), 0.2)):
            image += _field(rng, cells, size) * share
        image += rng.integers(-6, 7, image.shape, dtype=np.int8)
        return np.clip(image + 128, 0, 255).astype(np.uint8)

    label_N = np.arange(num_samples, dtype=np.int64) % num_classes
    path = [f"synthetic/{split}/{i:07d}" for i in range(num_samples)]
    return Source(spec, split, [f"class_{i:04d}" for i in range(num_classes)], path, label_N, read)


def _field(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Return a smooth random field in [-128, 127], float32 [size, size, 3], that varies over
    `cells` cells per side."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) - 128
