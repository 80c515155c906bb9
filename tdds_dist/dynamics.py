"""Dynamics folders of the authors' code, read as if they were a trajectory: `{epoch}_Output.npy` (logits in visit order) and
`{epoch}_Index.npy` for every epoch.

They are streamed: in memory are one epoch's log-probabilities by global index, the scalars that were asked for, and a few
rows per thread. Files are mapped and given back as they are read; the system reads the next epoch while this one is
computed. Blocks of rows go to as many threads as torch has, each of which works alone: they meet once per epoch and not in
every operation, which costs little even where other programs use the cores.
"""

# F scalars, T epochs, N dataset, n rows computed at once, C classes

import math
import mmap
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tdds_dist.artifacts import UNKNOWN_LABEL
from tdds_dist.errors import InputError
from tdds_dist.scalars import (
    SCALARS,
    log_probabilities,
    loss_difference_official,
    loss_difference_paper,
    sample_scalars,
)

_BLOCK = 2**16  # logits that a thread computes at once: a few such arrays fit into its core's cache
_OUTPUT = re.compile(r"(\d+)_Output\.npy")
_NEED_NO_LABEL = ("delta_official", "delta_paper", "entropy")
_ALONE = {"delta_official": loss_difference_official, "delta_paper": loss_difference_paper}
_NUM_NAMED = 8  # samples that an error lists


def is_dynamics(folder: Path) -> bool:
    """Whether the folder holds any `{epoch}_Output.npy`."""
    return any(_OUTPUT.fullmatch(path.name) for path in folder.iterdir())


class Dynamics:
    """Read access by global index, as `trajectory.Trajectory` gives it.

    `label_N` int64 [N] are the labels, which the folder does not hold; without them only scalars that need none can be
    read.

    Raises:
        InputError: epochs missing.
    """

    def __init__(self, folder: Path, label_N: np.ndarray | None = None):
        self.directory = folder
        epochs = {int(match[1]) for path in folder.iterdir() if (match := _OUTPUT.fullmatch(path.name))}
        if missing := sorted(set(range(max(epochs))) - epochs):
            raise InputError(f"{folder} holds no {missing[0]}_Output.npy but later epochs; restore it or remove the later ones")
        self.num_epochs = len(epochs)
        self.num_samples, self.num_classes = self._outputs(0).shape
        self._label_N = label_N
        self._cache: dict[str, np.ndarray] = {}

    def labels(self) -> np.ndarray:
        """Label by global index, int64 [N]; UNKNOWN_LABEL where none were given."""
        return np.full(self.num_samples, UNKNOWN_LABEL, dtype=np.int64) if self._label_N is None else self._label_N

    def prepare(self, scalars: tuple[str, ...], num_epochs: int) -> None:
        """Compute these scalars in one pass over the files; `read` is then a look-up.

        While it works, torch's operations in other threads of the program may run on one core each.
        """
        if self._label_N is None and (unknown := [name for name in scalars if name not in _NEED_NO_LABEL]):
            raise InputError(f"{self.directory} holds no labels, which {', '.join(unknown)} needs; give the dataset with "
                             "--beton FILE")
        values_FTN = np.empty((len(scalars), num_epochs, self.num_samples), dtype=np.float32)
        kept_NC = torch.empty(self.num_samples, self.num_classes)  # what the next epoch compares with, by global index
        num_rows = min(max(1, _BLOCK // self.num_classes), self.num_samples)
        with _workers() as (pool, num_workers):
            for epoch in range(num_epochs):
                output_NC, index_N = self._read_epoch(epoch)
                if output_NC.shape != kept_NC.shape:
                    raise InputError(f"{self.directory}: epoch {epoch} has outputs {output_NC.shape}, the one before "
                                     f"{tuple(kept_NC.shape)}; the folder mixes runs")
                self._read_ahead(epoch + 1)
                firsts = iter(range(0, self.num_samples, num_rows))  # each worker takes the next one
                running = [pool.submit(self._compute, scalars, output_NC, index_N, firsts, num_rows, kept_NC, epoch > 0,
                                       values_FTN[:, epoch]) for _ in range(num_workers)]
                if not all(worker.result() for worker in running):
                    raise InputError(f"{self.directory / f'{epoch}_Output.npy'} holds NaN or infinite logits (global indices "
                                     f"{_nonfinite_rows(output_NC, index_N, num_rows)})")
        self._cache = dict(zip(scalars, values_FTN, strict=True))

    def read(self, scalar: str, num_epochs: int | None = None) -> np.ndarray:
        """One scalar of the first `num_epochs` epochs (default all), float32 [T, N]."""
        num_epochs = self.num_epochs if num_epochs is None else num_epochs
        if scalar not in self._cache or len(self._cache[scalar]) < num_epochs:
            self.prepare((scalar,), num_epochs)
        return self._cache[scalar][:num_epochs]

    def _compute(self, scalars: tuple[str, ...], output_NC: np.ndarray, index_N: np.ndarray, firsts: Iterator[int],
                 num_rows: int, kept_NC: Tensor, has_previous: bool, values_FN: np.ndarray) -> bool:
        """One worker's part of an epoch: fills `values_FN` and `kept_NC` at the rows it takes; False at NaN or infinity."""
        logits_RC, previous_RC = (torch.empty(num_rows, self.num_classes) for _ in range(2))  # used again: fresh memory costs
        for first in firsts:
            index_n = index_N[first : first + num_rows]
            rows = torch.from_numpy(index_n)
            logits_nC = logits_RC[: len(index_n)]
            with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is found
                np.copyto(logits_nC.numpy(), output_NC[first : first + num_rows], casting="same_kind")
            # One sum is cheaper than a look at each number, and misses none; it may only run over.
            if not math.isfinite(logits_nC.sum()) and not logits_nC.isfinite().all():
                return False
            logp_nC = log_probabilities(logits_nC)
            previous_nC = torch.index_select(kept_NC, 0, rows, out=previous_RC[: len(index_n)]) if has_previous else None
            label_n = torch.zeros_like(rows) if self._label_N is None else torch.from_numpy(self._label_N[index_n])
            values_FN[:, index_n] = _scalars(scalars, logits_nC, logp_nC, previous_nC, label_n).numpy()
            kept_NC.numpy()[index_n] = logp_nC.numpy()
            _give_back(output_NC, first, num_rows)
        return True

    def _read_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits of an epoch in visit order, [N, C] of any floating-point type, mapped; and their indices, int64 [N]."""
        output_NC = self._outputs(epoch)
        index_N = self._load(epoch, "Index", None).astype(np.int64).reshape(-1)
        is_there_N = np.zeros(len(output_NC), dtype=bool)
        is_there_N[index_N[(index_N >= 0) & (index_N < len(output_NC))]] = True
        if len(index_N) != len(output_NC) or not is_there_N.all():
            raise InputError(f"{self.directory / f'{epoch}_Index.npy'} does not hold every index 0..{len(output_NC) - 1} once; "
                             "an epoch must record every sample exactly once")
        return output_NC, index_N

    def _outputs(self, epoch: int) -> np.ndarray:
        output_NC = self._load(epoch, "Output", "r")
        if output_NC.ndim != 2 or not np.issubdtype(output_NC.dtype, np.floating):
            raise InputError(f"{self.directory / f'{epoch}_Output.npy'} is {output_NC.dtype} {output_NC.shape}, expected "
                             "floating-point logits [N, C]")
        return output_NC

    def _load(self, epoch: int, name: str, mmap_mode: Literal["r"] | None) -> np.ndarray:
        path = self.directory / f"{epoch}_{name}.npy"
        try:
            return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} cannot be read ({error}); T epochs need 0_{name}.npy to (T-1)_{name}.npy") from error

    def _read_ahead(self, epoch: int) -> None:
        """Have the system read an epoch's outputs, if there are any, in the background."""
        if epoch < self.num_epochs and hasattr(os, "posix_fadvise"):
            with (self.directory / f"{epoch}_Output.npy").open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _scalars(names: tuple[str, ...], logits_nC: Tensor, logp_nC: Tensor, previous_nC: Tensor | None, label_n: Tensor) -> Tensor:
    """These scalars of some rows, float32 [F, n]. One loss difference alone, which is all that TDDS needs, costs no other."""
    if len(names) > 1 or names[0] not in _ALONE:
        return sample_scalars(logits_nC, logp_nC, previous_nC, label_n)[[SCALARS.index(name) for name in names]]
    if previous_nC is None:
        return torch.full((1, len(logp_nC)), torch.nan)
    return _ALONE[names[0]](previous_nC, logp_nC)[None]


def _give_back(output_NC: np.ndarray, first: int, num_rows: int) -> None:
    """Unmap rows that were read, so that they stop counting as this process's memory; the page cache keeps them."""
    if isinstance(mapped := output_NC.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        row_bytes = output_NC.nbytes // len(output_NC)
        start = first * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, min(num_rows * row_bytes, len(mapped) - start))


def _nonfinite_rows(output_NC: np.ndarray, index_N: np.ndarray, num_rows: int) -> list[int]:
    """The first few samples, in visit order, whose logits are NaN or infinite as float32."""
    bad: list[int] = []
    for first in range(0, len(index_N), num_rows):
        with np.errstate(over="ignore"):
            is_bad_n = ~np.isfinite(output_NC[first : first + num_rows].astype(np.float32)).all(axis=1)
        bad += index_N[first : first + num_rows][is_bad_n].tolist()
        if len(bad) >= _NUM_NAMED:
            break
    return bad[:_NUM_NAMED]


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """As many threads as torch uses, in each of which torch uses one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that start from now on
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            yield pool, num_threads
    finally:
        torch.set_num_threads(num_threads)
