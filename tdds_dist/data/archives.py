"""Data sets that lie in few large files: Parquet as Hugging Face lays it out, and tar shards of
WebDataset.

Owns which of the files are splits, which column or member is the image and which the label, and
reading the stored bytes of one image by index, also in worker processes. `sources` makes pixels of
them. The order is that of the files, in them of the rows or members.
"""

# N images of the split, G row groups

import glob
import json
import multiprocessing
import os
import re
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.data.folders import ImageFiles, split_role
from tdds_dist.data.image_files import KNOWN_EXTENSIONS, some
from tdds_dist.errors import InputError
from tdds_dist.text import printable

MAX_FILES = 1_000_000  # that the braces of a spec may name
# of a row group at a time, so that one of any size fits into memory
ROWS_PER_READ, BYTES_PER_READ = 16, 1 << 20
_SUFFIXES = {suffix.removeprefix(".") for suffix in KNOWN_EXTENSIONS}
# `-00000-of-00002`, `-000123`, `-00000-of-00001-b21c5bd4a1b8c3d0`
_NUMBER = re.compile(r"(^|[-_.])\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16})?$")


# ---- which files, and which of them are a split


def _find_files(spec: str, rest: str, suffix: str) -> tuple[list[Path], bool]:
    """Return the files that a spec names, and whether it names them itself, not by their folder."""
    found: list[Path] = []
    named = _expanded(spec, rest)
    for name in named:
        if Path(name).is_dir():
            inside = sorted(Path(name).rglob(f"*{suffix}"))
            # none that is hidden, or lies in a hidden folder
            files = [path for path in inside if "/." not in f"/{path.relative_to(name)}"]
        elif Path(name).is_file() or not glob.has_magic(name):
            files = [Path(name)]
        else:
            files = sorted(map(Path, glob.glob(name)))
        if not files:
            raise InputError(
                f"{spec}: {name} holds no {suffix} file; give the folder that holds them"
            )
        found += files
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise InputError(
            f"{spec}: {len(missing):,} of {len(found):,} files are not there: {some(missing)};"
            " bring them here, or name only those that are"
        )
    if wrong := [str(path) for path in found if path.suffix != suffix]:
        packed = (
            " unpack it first, since images are read at their place;" if suffix == ".tar" else ""
        )
        raise InputError(
            f"{spec}: {some(wrong)} does not end in {suffix};{packed} give {suffix} files, or the"
            " folder that holds them"
        )
    real = [os.path.realpath(path) for path in found]
    if len({*real}) < len(real):
        twice = next(path for path in found if real.count(os.path.realpath(path)) > 1)
        raise InputError(f"{spec}: {twice} is named twice, also by a link; name it once")
    return found, not (len(named) == 1 and Path(named[0]).is_dir())


def _expanded(spec: str, text: str) -> list[str]:
    """Expand braces as bash does: {000..099} and {train,val}."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    inner = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        low, high = int(numbers[1]), int(numbers[2])
        width = max(map(len, numbers.groups())) if any(n[0] == "0" for n in numbers.groups()) else 0
        if high - low >= MAX_FILES:
            raise InputError(f"{spec}: {match[0]} names more than {MAX_FILES:,} files; name fewer")
        words = [str(number).zfill(width) for number in range(low, high + 1)]
    else:
        words = inner.split(",") if "," in inner else []
    if not words:
        raise InputError(
            f"{spec}: {match[0]} must be a range of numbers that grow, such as {{000..099}}, or"
            " words with commas, such as {train,val}"
        )
    head, tail = text[: match.start()], text[match.end() :]
    return [name for word in words for name in _expanded(spec, f"{head}{word}{tail}")]


def _one_of(
    found: list[tuple[Path, str]], groups: dict[tuple[Path, str], list[Path]], suffix: str
) -> str:
    """Return what names the first of several data sets: its folder, or a pattern of its files."""
    (parent, name), (other, _) = found[:2]
    if parent != other:
        return str(parent.parent if not name and split_role(parent.name) else parent)
    stem = groups[parent, name][0].stem
    number = "" if stem == name else stem[len(name) : len(name) + 1] * bool(name) + "[0-9]*"
    return f"'{parent / f'{name}{number}{suffix}'}'"


def _role(name: str) -> str | None:
    """Return the split that the name of some files says: train, val or test."""
    if whole := split_role(name):
        return whole
    roles = {role for word in re.findall("[a-z]+", name.casefold()) if (role := split_role(word))}
    return roles.pop() if len(roles) == 1 else None


@dataclass(frozen=True)
class _Splits:
    """The files of each split. `files` are those of the one that is read."""

    split: str
    files_of: dict[str, list[Path]]
    folder: Path  # above all of them
    note: str

    @property
    def files(self) -> list[Path]:
        return self.files_of[self.split]

    def named(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def _find_splits(spec: str, rest: str, suffix: str, split: str | None) -> _Splits:
    """Divide the files by the split that their names say, or else the names of their folders."""
    files, is_named = _find_files(spec, rest, suffix)
    folder = Path(os.path.commonpath([path.parent for path in files]))
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        groups.setdefault((path.parent, _NUMBER.sub("", path.stem)), []).append(path)
    by_role: dict[str, list[tuple[Path, str]]] = {}
    for parent, name in groups:
        says = _role(name) or split_role(parent.absolute().name) or ""
        by_role.setdefault(says, []).append((parent, name))
    shown = {
        role: some([str((parent / name).relative_to(folder)) + "*" for parent, name in found])
        for role, found in by_role.items()
    }
    for role, found in by_role.items():
        if len(found) > 1 and not is_named and (role or len(by_role) == 1):
            raise InputError(
                f"{spec}: {shown[role]} are several data sets"
                + (f", or several splits for {role}" if role else "")
                + f"; name one, such as {spec.partition(':')[0]}:{_one_of(found, groups, suffix)}"
            )
    unnamed = by_role.pop("", [])
    if unnamed and by_role and is_named:
        raise InputError(
            f"{spec}: the names of {shown['']} say no split, those of the other files do; name"
            " them apart"
        )
    if not by_role:
        by_role["all"] = unnamed
        if split == "val":
            raise InputError(
                f"{spec}: the names of the files say no split; hold out a part of the images by"
                " --holdout 0.1 --seed 0, the same with --split train and with --split val, or"
                " leave --split out where all of them are for evaluation"
            )
    role_of = {
        split: next((role for role in roles if role in by_role), None)
        for split, roles in (("train", ("train", "all")), ("val", ("val", "test")))
    }
    files_of = {
        split: [path for group in by_role[role] for path in groups[group]]
        for split, role in role_of.items()
        if role is not None
    }
    note = "none in the names of the files"
    if "all" not in by_role:
        note = "; ".join(f"{split} is {shown[role]}" for split, role in role_of.items() if role)
        if unused := [shown[role] for role in shown if role not in role_of.values()]:
            note += f"; not used: {', '.join(unused)}"
    chosen = split or ("train" if "train" in files_of else "val")
    if chosen not in files_of:
        way_out = (
            "hold out a part of it by --holdout 0.1 --seed 0, the same with --split train and with"
            " --split val"
            if chosen == "val"
            else "add it, or leave --split out"
        )
        raise InputError(f"{spec} has {some([*shown.values()])} but no {chosen} split; {way_out}")
    return _Splits(chosen, files_of, folder, f"splits: {note}")


# ---- Parquet


def read_parquet(
    spec: str, rest: str, split: str | None, image_field: str = "", label_field: str = ""
) -> ImageFiles:
    """Find the images of Parquet files: DIR/data/train-*.parquet and the like, or files by name.

    The image is a column of bytes, or of bytes and path as in `datasets`; the label one of whole
    numbers. Names of classes come from what `datasets` wrote into the files, else they are the
    numbers. image_field, label_field: names of these columns, where there are several. Raises
    InputError for columns that are not there, and labels that are null or no class.
    """
    splits = _find_splits(spec, rest, ".parquet", split)
    files = [_ParquetFile(path, image_field, label_field) for path in splits.files]
    first = files[0]
    for other in files:
        if (other.image, other.label, other.names) != (first.image, first.label, first.names):
            raise InputError(
                f"{spec}: {other.path} has other columns or classes than {first.path}; name the"
                " files of one data set"
            )
    label_N = np.concatenate([file.labels() for file in files])
    path = [f"{splits.named(file.path)}#{row}" for file in files for row in range(file.num_rows)]
    if not path:
        raise InputError(
            f"{spec}: {some([str(file.path) for file in files])} holds no row; give others"
        )
    if label_N.min() < 0:
        bad = int(np.argmax(label_N < 0))
        raise InputError(
            f"{spec}: {path[bad]} has label {label_N[bad]}, which is how a label that is not known"
            " is written; take a split with labels"
        )
    names = first.names
    if names is None:  # the same for both splits
        others = [
            _ParquetFile(file, image_field, label_field).labels(all_known=False)
            for role, of_role in splits.files_of.items()
            if role != splits.split
            for file in of_role
        ]
        largest = max(int(part.max(initial=0)) for part in [label_N, *others])
        names = _numbers_to(spec, largest)
    elif label_N.max() >= len(names):
        bad = int(np.argmax(label_N))
        raise InputError(
            f"{spec}: {path[bad]} has label {label_N[bad]}, but {first.path} has {len(names)} names"
            " of classes; write the file again"
        )
    groups = [size for file in files for size in file.group_rows]
    return ImageFiles(
        splits.split,
        tuple(splits.files_of),
        None,  # the same spec
        names,
        path,
        label_N,
        _Rows(files),
        {"image_field": first.image, "label_field": first.label},
        [splits.note],
        part_end=np.unique(np.cumsum(groups)),
    )


def _numbers_to(spec: str, largest: int) -> list[str]:
    """Return the names of classes that have none, up to a largest label."""
    if largest >= 1 << 24:
        raise InputError(
            f"{spec}: label {largest} is no number of a class; count the classes from 0"
        )
    return [str(number) for number in range(largest + 1)]


class _ParquetFile:
    """The columns of one file: which hold image and label, and the names of the classes."""

    def __init__(self, path: Path, image_field: str, label_field: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                metadata, self._schema = file.metadata, file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        self.num_rows = metadata.num_rows
        self.group_rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        features = self._features()
        kinds = {name: type_.get("_type") for name, type_ in features.items()}
        types = {name: self._schema.field(name).type for name in self._schema.names}
        images = [name for name, kind in types.items() if _holds_bytes(kind)]
        labels = [
            name
            for name, kind in types.items()
            if pa.types.is_integer(kind) and not name.startswith("__index")
        ]
        self.image = self._pick("image", images, "Image", kinds, image_field)
        usual = [name for name in labels if name in ("label", "labels")]
        self.label = self._pick("label", labels, "ClassLabel", kinds, label_field, usual)
        self.image_leaf = (
            f"{self.image}.bytes" if pa.types.is_struct(types[self.image]) else self.image
        )
        names = features.get(self.label, {}).get("names")
        if isinstance(names, dict):  # as in the card of a data set
            names = [names[key] for key in sorted(names, key=int)]
        self.names: list[str] | None = None if not names else [str(name) for name in names]

    def _features(self) -> dict[str, dict[str, Any]]:
        """Return what `datasets` says of the columns, by name; nothing where it has not written."""
        try:
            written = json.loads((self._schema.metadata or {})[b"huggingface"])
            features = written["info"]["features"]
            return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
        except (KeyError, ValueError, TypeError, AttributeError):
            return {}

    def _pick(
        self,
        what: str,
        fitting: list[str],
        kind: str,
        kinds: dict[str, Any],
        wanted: str,
        usual: Sequence[str] = (),
    ) -> str:
        """Return the column of this kind: the one that is wanted, else the only one that `datasets`
        calls so, has the usual name, or fits."""
        names = self._schema.names
        there = some([*names])
        needs = (
            "bytes of images, alone or in a struct `bytes`, `path`"
            if what == "image"
            else "whole numbers from 0, one per class"
        )
        if wanted:
            if wanted in fitting:
                return wanted
            found = (
                f"holds {self._schema.field(wanted).type}" if wanted in names else "is not there"
            )
            raise InputError(
                f"{self.path}: column {wanted!r} {found}, and {what}s need {needs}; "
                + (
                    f"give --{what}-field {' or '.join(map(printable, fitting))}"
                    if fitting
                    else f"its columns are {there}: write the files again with such a column"
                )
            )
        for some_of in ([n for n in fitting if kinds.get(n) == kind], usual, fitting):
            if len(some_of) == 1:
                return some_of[0]
            if some_of:
                break
        if not fitting:
            types = {n: self._schema.field(n).type for n in names}
            shown = some([f"{name} ({types[name]})" for name in names])
            raise InputError(
                f"{self.path} has no column for the {what}s, which needs {needs}; its columns are"
                f" {shown}: write the files again with such a column"
            )
        raise InputError(
            f"{self.path} has several columns that may be the {what}: {', '.join(fitting)}; name"
            f" one, such as --{what}-field {fitting[0]}"
        )

    def labels(self, all_known: bool = True) -> np.ndarray:
        """Read the labels, int64 [rows]; -1 where they are null and need not all be known."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                column = file.read(columns=[self.label], use_threads=False).column(0)
            if column.null_count and all_known:
                row = column.is_null().to_numpy().argmax()
                raise InputError(
                    f"{self.path}#{row}: the label is null, like {column.null_count:,} of"
                    f" {len(column):,} in column {self.label}; remove these rows, or take a split"
                    " with labels"
                )
            found: np.ndarray = column.cast(pa.int64()).fill_null(-1).to_numpy()
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        return found

    def _damaged(self, error: Exception) -> InputError:
        text = " ".join(str(error).split())
        return InputError(f"{self.path} is not a whole Parquet file ({text}); copy it again")


def _holds_bytes(kind: Any) -> bool:
    """Say whether a column of this type holds images: bytes, or a struct with them as `bytes`."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class _Rows:
    """Reads the bytes of an image by its row. Rows in order cost one pass over their row group,
    and little memory, however large that is; each process has files of its own."""

    def __init__(self, files: list[_ParquetFile]):
        self._place_G = [(file, g) for file in files for g in range(len(file.group_rows))]
        rows_G = [file.group_rows[g] for file, g in self._place_G]
        self._start_G = np.cumsum(rows_G) - rows_G
        self._at: tuple[int, int] = (0, -1)  # the process, the row group
        self._rows: list[Any] = []  # those that were read last
        self._first = 0  # of them, in the row group
        self._more: Iterator[list[Any]] = iter(())

    def __call__(self, index: int) -> bytes:
        # empty row groups begin where the next one does
        group = int(np.searchsorted(self._start_G, index, side="right")) - 1
        row, at = index - int(self._start_G[group]), (os.getpid(), group)
        if at != self._at or row < self._first:
            self._at, self._rows, self._first = at, [], 0
            self._more = self._read(*self._place_G[group])
        try:
            while row >= self._first + len(self._rows):
                before = len(self._rows)
                self._rows = next(self._more)
                self._first += before
        except Exception:  # the file is damaged there: begin anew for the next row
            self._at = (0, -1)
            raise
        found = self._rows[row - self._first]
        if isinstance(found, dict):
            found = found["bytes"]
        if found is None:
            raise ValueError(
                "it holds no bytes of an image but null; write the files again with the images in"
                " them, not their paths"
            )
        return bytes(found)

    @staticmethod
    def _read(file: _ParquetFile, group: int) -> Iterator[list[Any]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file.path, buffer_size=BYTES_PER_READ, pre_buffer=False) as opened:
            for batch in opened.iter_batches(
                ROWS_PER_READ, row_groups=[group], columns=[file.image_leaf], use_threads=False
            ):
                yield batch.column(0).to_pylist()


# ---- WebDataset


def read_webdataset(
    spec: str, rest: str, split: str | None, image_field: str = "", label_field: str = ""
) -> ImageFiles:
    """Find the images of tar shards, whose members of one name but for the suffix are a sample.

    The image is the member with the suffix of one; the label is the whole number in `.cls`, or that
    of the key "label" in `.json`. image_field: the suffix of the image where there are several.
    label_field: another suffix, or another key of `.json`. The classes are numbers up to the
    largest label in all the shards of the spec. Raises InputError for shards that are damaged, and
    samples without an image or label.
    """
    splits = _find_splits(spec, rest, ".tar", split)
    every = [file for files in splits.files_of.values() for file in files]
    look = partial(_index_shard, image_field=image_field, label_field=label_field)
    num_workers = min(len(os.sched_getaffinity(0)), len(every), 16)
    if num_workers == 1:
        shard_of = dict(zip(every, map(look, every), strict=True))
    else:
        context = multiprocessing.get_context("fork")
        # the parent decides what an interruption is
        quiet = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
        with ProcessPoolExecutor(num_workers, context, *quiet) as pool:
            shard_of = dict(zip(every, pool.map(look, every), strict=True))
    found = [(file, *sample) for file in splits.files for sample in shard_of[file][0]]
    if not found:
        raise InputError(f"{spec}: {some([str(file) for file in splits.files])} hold no sample")
    largest = max(label for samples, _ in shard_of.values() for _, _, label in samples)
    notes = [splits.note]
    unused = sum((shard_of[file][1] for file in splits.files), start=Counter[str]())
    if unused:
        kinds = some([f"{number:,} {printable(kind)}" for kind, number in unused.most_common()])
        notes.append(f"members that are neither image nor label: {kinds}")
    fields = {"image_field": image_field, "label_field": label_field}
    place_N = [(file, *place) for file, _, place, _ in found]
    return ImageFiles(
        splits.split,
        tuple(splits.files_of),
        None,  # the same spec
        _numbers_to(spec, largest),
        [f"{splits.named(file)}/{key}" for file, key, _, _ in found],
        np.array([label for *_, label in found], dtype=np.int64),
        lambda i: _bytes_at(*place_N[i]),
        {name: field for name, field in fields.items() if field},
        notes,
    )


_Place = tuple[int, int]  # of a member in its shard: offset and size, bytes


def _index_shard(
    path: Path, image_field: str, label_field: str
) -> tuple[list[tuple[str, _Place, int]], Counter[str]]:
    """Read the headers of a shard, and its labels: key, place of the image and label of each
    sample, in the order of their first members; and how many other members there are, by suffix."""
    found, unused = list[tuple[str, _Place, int]](), Counter[str]()
    for key, members in _samples(path, unused).items():
        where = f"{path}/{key}"
        image = _image_member(where, members, image_field)
        label, used = _label(path, where, members, label_field)
        found.append((key, members[image], label))
        unused.update(f".{suffix}" for suffix in members if suffix not in (image, used))
    return found, unused


def _samples(path: Path, unused: Counter[str]) -> dict[str, dict[str, _Place]]:
    """Return offset and size of the members of each sample, by key and suffix: as in WebDataset the
    key ends at the first dot of the file's name. Counts in `unused` what is no file."""
    samples: dict[str, dict[str, _Place]] = {}
    try:
        num_bytes = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                if not member.isfile() or member.issparse():
                    unused["links and other kinds"] += 1
                    continue
                stem, _, suffix = name.partition(".")
                if not stem or re.fullmatch("__.*__", stem):
                    unused["hidden"] += 1
                    continue
                of_key = samples.setdefault(f"{folder}{slash}{stem}", {})
                suffix = suffix.lower()
                if suffix in of_key:
                    raise InputError(
                        f"{path} holds {printable(member.name)} twice; give every sample a name of"
                        " its own"
                    )
                if member.offset_data + member.size > num_bytes:
                    raise tarfile.ReadError(f"it ends within {printable(member.name)}")
                of_key[suffix] = member.offset_data, member.size
            # tarfile takes a damaged header for the end
            if any(_bytes_at(path, tar.offset, min(512, max(0, num_bytes - tar.offset)))):
                raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
    except (OSError, tarfile.TarError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not a whole tar file ({error}); copy it again, or unpack it where it is"
            " compressed"
        ) from error
    return samples


def _image_member(where: str, members: dict[str, Any], wanted: str) -> str:
    """Return the suffix of the image of a sample."""
    wanted = wanted.lower().removeprefix(".")
    fitting = {wanted} if wanted else _SUFFIXES
    found = [suffix for suffix in members if suffix in fitting]
    if len(found) == 1:
        return found[0]
    there = some([f".{suffix}" for suffix in members])
    if found:
        raise InputError(
            f"{printable(where)} has several images: {there}; name the suffix of one, such as"
            f" --image-field {found[0]}"
        )
    raise InputError(
        f"{printable(where)} has no "
        + (f"image .{wanted}" if wanted else "image such as .jpg or .png")
        + f", only {there}; give the suffix of the images as --image-field, or take samples without"
        " one out of the shard"
    )


def _label(path: Path, where: str, members: dict[str, _Place], wanted: str) -> tuple[int, str]:
    """Return the label of a sample, and the suffix of the member that holds it."""
    suffix = (wanted or "cls").lower().removeprefix(".")
    if suffix in members:
        text = _bytes_at(path, *members[suffix])
        what = f".{suffix}"
        found: Any = int(text) if re.fullmatch(rb"\s*[+-]?[0-9]{1,18}\s*", text) else text
    elif "json" in members:
        suffix, key = "json", wanted or "label"
        what = f"{key!r} in .json"
        try:
            found = json.loads(_bytes_at(path, *members["json"]))[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{printable(where)} has no {what}; give the key that holds the label as"
                " --label-field"
            ) from None
    else:
        raise InputError(
            f"{printable(where)} has no label .{suffix} or .json, only"
            f" {some([f'.{name}' for name in members])}; give the suffix of the labels as"
            " --label-field, or take samples without one out of the shard"
        )
    if type(found) is not int or found < 0:
        shown = found.decode("utf-8", "replace") if isinstance(found, bytes) else found
        raise InputError(
            f"{printable(where)}: {what} holds {shown!r:.80}, but a label is a whole number from 0;"
            " write numbers, or give another --label-field"
        )
    return found, suffix


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{path} has become shorter since it was looked at; write again")
    return data
