"""The trajectory: a few numbers per sample and epoch on disk, from which every score can be computed again.

    <dir>/meta.json                                   what the columns are, N, C, dtype
    <dir>/labels/<first>-<end>.npy                    int64 [end - first], once
    <dir>/epoch_0007/<first>-<end>.npy                float32 [F, end - first], one block per rank

A block is keyed by the range of global indices it covers, so readers need not know the world size that wrote it, and
may mix several. NumPy only.
"""

# F scalars, N dataset, T epochs, M rows of a block

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.artifacts import write_atomically
from tdds_dist.errors import InputError

FORMAT = "tdds-trajectory-1"
_BLOCK = re.compile(r"(\d{10})-(\d{10})\.npy")
_EPOCH = re.compile(r"epoch_(\d{4,})")


def require_no_trajectory(directory: Path) -> None:
    """InputError when there is one already: epochs of two runs must not mix."""
    if (directory / "meta.json").exists() or any(directory.glob("epoch_*")):
        raise InputError(f"{directory} already holds a trajectory; choose another directory or remove it")


class TrajectoryWriter:
    """Appends the blocks of one rank. All ranks may create it; they write different files."""

    def __init__(self, directory: Path | str, scalars: tuple[str, ...], num_samples: int, num_classes: int,
                 first: int, end: int, is_main: bool):
        self._directory = Path(directory)
        self._scalars = scalars
        self._block = f"{first:010d}-{end:010d}.npy"
        self._rows = end - first
        self._meta = {"format": FORMAT, "scalars": list(scalars), "num_samples": num_samples, "num_classes": num_classes,
                      "dtype": "float32"}
        self._is_main = is_main  # nothing is written before the first epoch ends

    def write_labels(self, label_M: np.ndarray) -> None:
        """Labels of the owned samples, int64 [M]; once per run, before the first `append`. Rank 0 adds meta.json."""
        if self._is_main:
            text = json.dumps(self._meta, indent=2)
            write_atomically(self._directory / "meta.json", lambda file: file.write(text.encode()))
        self._write(self._directory / "labels" / self._block, label_M.astype(np.int64))

    def append(self, epoch: int, scalars_FM: np.ndarray) -> None:
        """The scalars of one epoch for the owned samples, float32 [F, M]."""
        assert scalars_FM.shape == (len(self._scalars), self._rows), scalars_FM.shape
        self._write(self._directory / f"epoch_{epoch:04d}" / self._block, scalars_FM.astype(np.float32))

    def _write(self, path: Path, array: np.ndarray) -> None:
        if self._rows:  # an empty shard has no block
            write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


class Trajectory:
    """Read access by global index."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        meta = self._read_meta()
        self.scalars: tuple[str, ...] = tuple(meta["scalars"])
        self.num_samples: int = meta["num_samples"]
        self.num_classes: int = meta["num_classes"]
        epochs = [int(match[1]) for path in self.directory.iterdir() if (match := _EPOCH.fullmatch(path.name))]
        if sorted(epochs) != list(range(len(epochs))):
            raise InputError(f"{self.directory} holds epochs {sorted(epochs)}, expected 0, 1, 2, ... without a gap; "
                             "restore the missing folders or collect again")
        self.num_epochs = len(epochs)

    def read(self, scalar: str, num_epochs: int | None = None) -> np.ndarray:
        """One scalar of the first `num_epochs` epochs (default all), float32 [T, N]."""
        if scalar not in self.scalars:
            raise InputError(f"{self.directory} has no scalar {scalar!r}; it has {', '.join(self.scalars)}")
        num_epochs = self.num_epochs if num_epochs is None else num_epochs
        if num_epochs > self.num_epochs:
            raise InputError(f"{self.directory} holds {self.num_epochs} epochs, {num_epochs} are needed; "
                             "lower T or collect longer")
        row = self.scalars.index(scalar)
        values_TN = np.empty((num_epochs, self.num_samples), dtype=np.float32)
        for epoch in range(num_epochs):
            for first, end, path in self._blocks(self.directory / f"epoch_{epoch:04d}"):
                values_TN[epoch, first:end] = self._load(path, (len(self.scalars), end - first), np.float32)[row]
        return values_TN

    def labels(self) -> np.ndarray:
        """Label by global index, int64 [N]."""
        label_N = np.empty(self.num_samples, dtype=np.int64)
        for first, end, path in self._blocks(self.directory / "labels"):
            label_N[first:end] = self._load(path, (end - first,), np.int64)
        return label_N

    def _read_meta(self) -> dict[str, Any]:
        path = self.directory / "meta.json"
        if not path.is_file():
            raise InputError(f"{self.directory} holds no trajectory (no meta.json); "
                             "`tdds collect`, or ShardedScorer(trajectory=...), writes one")
        try:
            meta = json.loads(path.read_text())
            found = meta["format"]
            if found == FORMAT and (missing := [key for key in ("scalars", "num_samples", "num_classes") if key not in meta]):
                raise KeyError(*missing)
        except (ValueError, TypeError, KeyError) as error:  # not text, not JSON, not these keys
            raise InputError(f"{path} is damaged ({error!r}); restore it or collect again") from error
        if found != FORMAT:
            raise InputError(f"{path} has format {found!r}, this version reads {FORMAT!r}")
        return meta

    def _blocks(self, folder: Path) -> list[tuple[int, int, Path]]:
        """Blocks of a folder in order; InputError unless they tile [0, N)."""
        found = sorted((int(match[1]), int(match[2]), path) for path in folder.glob("*.npy")
                       if (match := _BLOCK.fullmatch(path.name)))
        expected = 0
        for first, end, path in found:
            if first != expected:
                problem = "overlap" if first < expected else "leave a gap"
                raise InputError(f"blocks in {folder} {problem} at index {min(first, expected)} (next block {path.name}); "
                                 "remove what does not belong there or collect again")
            expected = end
        if expected != self.num_samples:
            raise InputError(f"blocks in {folder} cover {expected} of {self.num_samples} samples; "
                             "restore the missing blocks or collect again")
        return found

    def _load(self, path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is damaged ({error}); restore it or collect again") from error
        if array.shape != shape or array.dtype != dtype:
            raise InputError(f"{path} holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; "
                             "restore it or collect again")
        return array
