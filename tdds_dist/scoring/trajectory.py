"""The trajectory: a few numbers per sample and epoch on disk, from which every score can be
computed again.

    <dir>/meta.json                       what the columns are, N, C, dtype, hash of the labels
    <dir>/labels/<first>-<end>.npy        int64 [end - first], once
    <dir>/epoch_0007/<first>-<end>.npy    float32 or float16 [F, end - first], a block per rank
    <dir>/epoch_0007/<first>-<end>.json   its place and a CRC-32 per row; also in labels/
    <dir>/quarantine.json                 samples kept out of scores; absent when there are none

A block is keyed by the range of global indices it covers, so readers need not know the world size
that wrote it, and may mix several: a run that resumes on another number of ranks appends to what is
there. A row is compared with its checksum before it is used. NumPy only.
"""

# F scalars, N dataset, T epochs, M rows of a block, R rows that are read

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Fingerprint, fingerprint, write_atomically
from tdds_dist.scoring import quarantine

FORMAT = "tdds-trajectory-1"
DTYPES = ("float32", "float16")
_LARGEST_FLOAT16 = 65504.0
# what may not change when a run goes on
_OF_ONE_RUN = ("scalars", "num_samples", "num_classes", "dtype")
_LABELS = "labels"  # their folder, and what their blocks have in the place of an epoch
_BLOCK = re.compile(r"(\d{10})-(\d{10})\.npy")
_BLOCK_OR_SIDECAR = re.compile(r"\d{10}-\d{10}\.(npy|json)")
# of a killed writer
_LEFTOVER = re.compile(r"\.(\d{10}-\d{10}\.(npy|json)|(meta|quarantine)\.json)\.\w+\.tmp")
_EPOCH = re.compile(r"epoch_(\d{4,})")


def require_no_trajectory(directory: Path) -> None:
    """Raise InputError when there is one already, or part of one: epochs of two runs must not
    mix."""
    if any(directory.glob("epoch_*")) or not _holds_nothing(directory):
        raise InputError(
            f"{directory} already holds a trajectory; choose another directory or remove it"
        )


def whole_epochs(directory: Path | str) -> tuple[int, str]:
    """Count the epochs, from 0 on without a gap, that are there and undamaged, and say why the next
    one is not.

    Reads everything. The reason is "" when no further epoch was begun, or when there is no
    trajectory at all. Without undamaged labels and meta.json (and quarantine.json, where there is
    one) no epoch counts.
    """
    directory = Path(directory)
    if _holds_nothing(directory):
        return 0, ""
    num_whole = 0
    try:
        Trajectory(directory, 0).verify()
        for num_whole in range(len(_epochs(directory))):
            Trajectory(directory, num_whole + 1).verify_epoch(num_whole)
    except InputError as error:
        return num_whole, str(error)
    return len(_epochs(directory)), ""


class TrajectoryWriter:
    """Appends the blocks of one rank. All ranks may create it; they write different files.

    Beside each block lies a sidecar with its checksums, which is written first: a block without one
    was not written here.

    `scored` is what was scored live (preset, windows), for those who score again. `dtype` is
    `float32`, or `float16` for half the disk: then values beyond +-65504 are clipped to that (NaN
    stays NaN).
    """

    def __init__(
        self,
        directory: Path | str,
        scalars: tuple[str, ...],
        num_samples: int,
        num_classes: int,
        first: int,
        end: int,
        is_main: bool,
        dtype: str = "float32",
        scored: dict[str, Any] | None = None,
    ):
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        self.directory = Path(directory)
        self._scalars = scalars
        self._num_samples = num_samples
        self._first, self._end = first, end
        self._rows = end - first
        self._dtype = dtype
        self._meta = {
            "format": FORMAT,
            "scalars": scalars,
            "num_samples": num_samples,
            "num_classes": num_classes,
            "dtype": dtype,
            "checksums": True,
        } | ({} if scored is None else {"scored": scored})
        self._is_main = is_main  # nothing is written before the first epoch ends

    def resume(self, next_epoch: int, labels_sha256: str | None) -> None:
        """Make what an earlier start wrote ready for `append` of epoch `next_epoch` and later ones.

        Epochs 0 .. next_epoch - 1 must be whole (`whole_epochs`) and stay; later ones were not
        finished, or their training is lost, and are removed, and samples that were quarantined in
        them are free again. For `next_epoch` 0 labels, meta.json and quarantine.json are removed
        too, as they are written again with epoch 0. What a killed writer left half-written is
        removed everywhere. Nothing is removed unless all checks pass.

        Protocol: one rank calls it, and the others wait before they append; shards may be others
        than before.

        Args:
            labels_sha256: of `artifacts.fingerprint`; None when the labels are not known.

        Raises:
            InputError: the trajectory is of another dataset, other scalars or another dtype, or not
            whole up to there.
        """
        assert next_epoch >= 0, next_epoch
        directory = self.directory
        if next_epoch > 0 or (directory / "meta.json").exists():
            before = Trajectory(directory, next_epoch)
            differs = [
                f"{name} {have!r} instead of {self._meta[name]!r}"
                for name in _OF_ONE_RUN
                if (have := getattr(before, name)) != self._meta[name]
            ]
            if differs:
                raise InputError(
                    f"{directory} holds the trajectory of another run ({'; '.join(differs)});"
                    " resume with the dataset and config it was recorded with"
                )
            if next_epoch > 0:
                quarantined = before.quarantined
                found = before.verify().labels_sha256
                if labels_sha256 and found != labels_sha256:
                    raise InputError(
                        f"{directory} holds labels of another dataset; they hash to {found[:12]},"
                        f" those of this run to {labels_sha256[:12]}; resume with the .beton it was"
                        " recorded from"
                    )
        # the last first: no gap when this is interrupted
        for epoch, folder in reversed(_epochs(directory)):
            if epoch >= next_epoch:
                shutil.rmtree(folder)
        for path in [path for path in directory.rglob(".*.tmp") if _LEFTOVER.fullmatch(path.name)]:
            path.unlink()
        if next_epoch == 0:
            for path in [
                *_label_files(directory),
                directory / quarantine.FILE,
                directory / "meta.json",
            ]:
                path.unlink(missing_ok=True)
        elif any(epoch >= next_epoch for epoch in quarantined.values()):
            quarantine.write(
                directory,
                {index: epoch for index, epoch in quarantined.items() if epoch < next_epoch},
            )

    def write_labels(self, label_M: np.ndarray, labels_sha256: str) -> None:
        """Write the labels of the owned samples, int64 [M]; once per run, before the first
        `append`. Rank 0 adds meta.json.

        `labels_sha256` is that of `artifacts.fingerprint` over all N labels; readers compare what
        they find with it.
        """
        if self._is_main:
            text = json.dumps(self._meta | {"labels_sha256": labels_sha256}, indent=2)
            write_atomically(self.directory / "meta.json", lambda file: file.write(text.encode()))
        self._write(_LABELS, label_M.astype(np.int64))

    def append(self, epoch: int, scalars_FM: np.ndarray) -> None:
        """Write the scalars of one epoch for the owned samples, float32 [F, M]."""
        assert scalars_FM.shape == (len(self._scalars), self._rows), scalars_FM.shape
        if self._dtype == "float16":
            scalars_FM = np.clip(scalars_FM, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
        block_FM = scalars_FM.astype(self._dtype, order="C")  # a scalar is one stretch of the file
        self._write(epoch, block_FM)

    def write_quarantine(self, epoch_of_index: dict[int, int]) -> None:
        """Write all samples that are kept out of scores so far: global index -> first epoch in
        which its logits were not finite.

        Rank 0 calls it, before the first block in which one of them is a placeholder. An empty list
        leaves no file.
        """
        assert self._is_main
        assert all(
            0 <= index < self._num_samples and epoch >= 0 for index, epoch in epoch_of_index.items()
        )
        quarantine.write(self.directory, epoch_of_index)

    def _write(self, place: int | str, array: np.ndarray) -> None:
        if not self._rows:  # an empty shard has no block
            return
        path = self.directory / _folder_name(place) / f"{self._first:010d}-{self._end:010d}.npy"
        sidecar = {
            "epoch": place,
            "first": self._first,
            "end": self._end,
            "crc32": [_crc32(row_M) for row_M in np.atleast_2d(array)],
        }
        write_atomically(
            path.with_suffix(".json"), lambda file: file.write(json.dumps(sidecar).encode())
        )
        write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


class Trajectory:
    """Read access by global index, to all epochs there are or to the first `num_epochs`.

    Raises:
        InputError: no trajectory, a damaged meta.json, missing epochs. Blocks are checked when they
        are read.
    """

    def __init__(self, directory: Path | str, num_epochs: int | None = None):
        self.directory = Path(directory)
        meta = self._read_meta()
        self.scalars: tuple[str, ...] = tuple(meta["scalars"])
        self.num_samples: int = meta["num_samples"]
        self.num_classes: int = meta["num_classes"]
        self.dtype: str = meta["dtype"]
        self._labels_sha256: str = meta["labels_sha256"]
        # {"preset", "windows": [{T, K, beta}]}
        self.scored: dict[str, Any] | None = meta.get("scored")
        epochs = [
            epoch
            for epoch, _ in _epochs(self.directory)
            if num_epochs is None or epoch < num_epochs
        ]
        if epochs != list(range(len(epochs) if num_epochs is None else num_epochs)):
            expected = "0, 1, 2, ..." if num_epochs is None else f"0 to {num_epochs - 1}"
            raise InputError(
                f"{self.directory} holds epochs {epochs}, expected {expected} without a gap; "
                "restore the missing folders or collect again"
            )
        self.num_epochs = len(epochs)

    def read(
        self, scalar: str, num_epochs: int | None = None, rows: range | None = None
    ) -> np.ndarray:
        """Return one scalar of the first `num_epochs` epochs (default all), float32 [T, N], or of
        these rows only."""
        if scalar not in self.scalars:
            raise InputError(
                f"{self.directory} has no scalar {scalar!r}; it has {', '.join(self.scalars)}"
            )
        num_epochs = self.num_epochs if num_epochs is None else num_epochs
        if num_epochs > self.num_epochs:
            raise InputError(
                f"{self.directory} holds {self.num_epochs} epochs, {num_epochs} are needed; "
                "lower T or collect longer"
            )
        row = self.scalars.index(scalar)
        rows = range(self.num_samples) if rows is None else rows
        values_TN = np.empty((num_epochs, len(rows)), dtype=np.float32)
        for epoch in range(num_epochs):
            for first, end, (block_M,) in self._read_blocks(epoch, (row,), rows):
                start, stop = max(first, rows.start), min(end, rows.stop)
                into_M = values_TN[epoch, start - rows.start : stop - rows.start]
                into_M[:] = block_M[start - first : stop - first]
        return values_TN

    def read_epoch(self, epoch: int) -> np.ndarray:
        """Return all scalars of one epoch, of the recorded dtype, [F, N]."""
        scalars_FN = np.empty((len(self.scalars), self.num_samples), dtype=self.dtype)
        for first, end, block_FM in self._read_blocks(epoch, range(len(self.scalars))):
            scalars_FN[:, first:end] = block_FM
        return scalars_FN

    def labels(self) -> np.ndarray:
        """Return the label by global index, int64 [N]; raise InputError when they are not those
        that were recorded."""
        label_N = np.empty(self.num_samples, dtype=np.int64)
        for first, end, block_RM in self._read_blocks(_LABELS, (0,)):
            label_N[first:end] = block_RM[0]
        found = fingerprint(label_N, self.num_classes).labels_sha256
        if found != self._labels_sha256:
            raise InputError(
                f"{self.directory} holds labels of another dataset; they hash to {found[:12]},"
                f" meta.json says {self._labels_sha256[:12]}; restore labels/ and meta.json of one"
                " run or collect again"
            )
        return label_N

    def fingerprint(self) -> Fingerprint:
        """Compute the fingerprint of the dataset from the labels."""
        return fingerprint(self.labels(), self.num_classes)

    def verify(self) -> Fingerprint:
        """Return the fingerprint of the dataset; raise InputError unless everything is there and
        undamaged. Reads all of it."""
        for epoch in range(self.num_epochs):
            self.verify_epoch(epoch)
        _ = self.quarantined
        return self.fingerprint()

    def verify_epoch(self, epoch: int) -> None:
        """Raise InputError unless all blocks of this epoch are there and undamaged."""
        for _ in self._read_blocks(epoch, range(len(self.scalars))):
            pass

    @property
    def quarantined(self) -> dict[int, int]:
        """Return the quarantined samples, as `quarantine.read` does."""
        return quarantine.read(self.directory, self.num_samples)

    def _read_meta(self) -> dict[str, Any]:
        path = self.directory / "meta.json"
        if not path.is_file():
            raise InputError(
                f"{self.directory} holds no trajectory (no meta.json); "
                "`tdds collect`, or ShardedScorer(trajectory=...), writes one"
            )
        try:
            meta = json.loads(path.read_text())
            found = meta["format"]
            if found == FORMAT:
                sizes = (meta["num_samples"], meta["num_classes"])
                texts = (meta["dtype"], meta["labels_sha256"])
                if not isinstance(meta["scalars"], list) or not all(
                    isinstance(size, int) and size > 0 for size in sizes
                ):
                    raise TypeError(
                        "scalars must be a list, num_samples and num_classes positive integers"
                    )
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError("dtype and labels_sha256 must be text")
        # not readable, not text, not JSON, not these keys
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is damaged ({error!r}); restore it or collect again"
            ) from error
        if found != FORMAT:
            raise InputError(f"{path} has format {found!r}, this version reads {FORMAT!r}")
        if meta["dtype"] not in DTYPES:
            raise InputError(
                f"{path} has dtype {meta['dtype']!r}, this version reads {', '.join(DTYPES)}"
            )
        return meta

    def _read_blocks(
        self, place: int | str, rows: Sequence[int], samples: range | None = None
    ) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        """Yield first and end index of each block of an epoch, or of the labels (one row), and
        these rows of it, mapped and verified: R arrays [end - first]; of all blocks, or those that
        hold some of the samples."""
        shape, dtype = (
            ((), np.dtype(np.int64))
            if place == _LABELS
            else ((len(self.scalars),), np.dtype(self.dtype))
        )
        for first, end, path in self._blocks(self.directory / _folder_name(place)):
            if samples is not None and (end <= samples.start or samples.stop <= first):
                continue
            block_FM = np.atleast_2d(self._load(path, (*shape, end - first), dtype))
            crc32_F = self._read_sidecar(path, place, first, end, len(block_FM))
            for row in rows:
                if (found := _crc32(block_FM[row])) != crc32_F[row]:
                    name = "" if place == _LABELS else f" of {self.scalars[row]}"
                    raise InputError(
                        f"{path} is damaged (CRC-32{name} is {found:08x}, {path.stem}.json says "
                        f"{crc32_F[row]:08x}); restore it or collect again"
                    )
            yield first, end, [block_FM[row] for row in rows]

    def _read_sidecar(
        self, path: Path, place: int | str, first: int, end: int, num_rows: int
    ) -> list[int]:
        """Return the checksum of each row of a block; raise InputError when there are none, or they
        are of another block."""
        sidecar = path.with_suffix(".json")
        try:
            content = json.loads(sidecar.read_bytes())
            found = content["epoch"], content["first"], content["end"]
            crc32_F = content["crc32"]
            if [type(value) for value in crc32_F] != [int] * num_rows:
                raise ValueError(f"{num_rows} checksums are needed")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{sidecar} is missing or damaged ({error!r}), so {path.name} cannot be trusted;"
                " restore both or collect again"
            ) from error
        if found != (place, first, end):
            wrong, right = (
                f"{epoch if epoch == _LABELS else f'epoch {epoch}'} [{start}, {stop})"
                for epoch, start, stop in (found, (place, first, end))
            )
            raise InputError(
                f"{sidecar} is of {wrong}, where {right} should be; restore it and {path.name}, or"
                " collect again"
            )
        return crc32_F

    def _blocks(self, folder: Path) -> list[tuple[int, int, Path]]:
        """List the blocks of a folder in order; raise InputError unless they tile [0, N)."""
        found = sorted(
            (int(match[1]), int(match[2]), path)
            for path in folder.glob("*.npy")
            if (match := _BLOCK.fullmatch(path.name))
        )
        expected = 0
        for first, end, path in found:
            if first != expected or end <= first:
                problem = "leave a gap" if first > expected else "overlap"
                raise InputError(
                    f"blocks in {folder} {problem} at index {min(first, expected)} (next block"
                    f" {path.name}); remove what does not belong there or collect again"
                )
            expected = end
        if expected != self.num_samples:
            way_out = (
                "restore the missing blocks"
                if expected < self.num_samples
                else "remove what does not belong there"
            )
            raise InputError(
                f"blocks in {folder} cover {expected} of {self.num_samples} samples; {way_out} or"
                " collect again"
            )
        return found

    def _load(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        try:
            # pages that are not used are not read
            array = np.lib.format.open_memmap(path, mode="r")
        # the last two from a damaged header
        except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:
            raise InputError(f"{path} is damaged ({error}); restore it or collect again") from error
        if array.shape != shape or array.dtype != dtype:
            raise InputError(
                f"{path} holds {array.dtype} {array.shape}, expected {dtype} {shape}; "
                "restore it or collect again"
            )
        if (found := path.stat().st_size) != (expected := array.offset + array.nbytes):
            raise InputError(
                f"{path} is damaged ({found} bytes instead of {expected}); restore it or collect"
                " again"
            )
        return array


def _epochs(directory: Path) -> list[tuple[int, Path]]:
    """List numbers and folders of the epochs there are, in order."""
    if not directory.is_dir():
        return []
    return sorted(
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := _EPOCH.fullmatch(path.name))
    )


def _label_files(directory: Path) -> list[Path]:
    """List the blocks of labels and their sidecars."""
    files = (directory / _LABELS).glob("*")
    return [path for path in files if _BLOCK_OR_SIDECAR.fullmatch(path.name)]


def _holds_nothing(directory: Path) -> bool:
    """Say whether there is no part of a trajectory."""
    files = (directory / "meta.json", directory / quarantine.FILE)
    return (
        not any(path.exists() for path in files)
        and not _epochs(directory)
        and not _label_files(directory)
    )


def _folder_name(place: int | str) -> str:
    return place if isinstance(place, str) else f"epoch_{place:04d}"


def _crc32(row_M: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(row_M).data)
