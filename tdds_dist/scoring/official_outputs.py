"""Dynamics folders of the authors' code, read as if they were a trajectory: `{epoch}_Output.npy`
(logits in visit order) and `{epoch}_Index.npy` for every epoch.

They are streamed: in memory are two epochs' (log-)probabilities in visit order, the scalars that
were asked for, and a few rows per thread; the system reads the next epoch while this one is
computed. Blocks of rows go to as many threads as torch has, each of which works alone: they meet
once per epoch and not in every operation, which costs little even where other programs use the
cores.
"""

# F scalars, T epochs, N dataset, n rows computed at once, C classes

import math
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

from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import UNKNOWN_LABEL
from tdds_dist.scoring.sample_stats import (
    OFFICIAL_EPSILON,
    SCALARS,
    log_probabilities,
    loss_difference_paper,
    sample_scalars,
)

# logits that a thread computes at once: of fewer, threads wait for the interpreter between
# operations
_BLOCK = 400_000
_OUTPUT = re.compile(r"(\d+)_Output\.npy")
_NEED_NO_LABEL = ("delta_official", "delta_paper", "entropy")
_OFFICIAL = ("delta_official",)
_NUM_NAMED = 8  # samples that an error lists


def is_dynamics(folder: Path) -> bool:
    """Say whether the folder holds any `{epoch}_Output.npy`."""
    return any(_OUTPUT.fullmatch(path.name) for path in folder.iterdir())


class Dynamics:
    """A dynamics folder, read by global index as `trajectory.Trajectory` is.

    `label_N` int64 [N] are the labels, which the folder does not hold; without them only scalars
    that need none can be read.

    Raises:
        InputError: epochs missing.
    """

    def __init__(self, folder: Path, label_N: np.ndarray | None = None):
        self.directory = folder
        epochs = {
            int(match[1]) for path in folder.iterdir() if (match := _OUTPUT.fullmatch(path.name))
        }
        if missing := sorted(set(range(max(epochs))) - epochs):
            raise InputError(
                f"{folder} holds no {missing[0]}_Output.npy but later epochs; restore it or remove"
                " the later ones"
            )
        self.num_epochs = len(epochs)
        self.num_samples, self.num_classes = self._outputs(0).shape
        if label_N is None:
            label_N = np.full(self.num_samples, UNKNOWN_LABEL, dtype=np.int64)
        self._label_N = label_N
        self._cache: dict[str, np.ndarray] = {}

    def labels(self) -> np.ndarray:
        """Return the label by global index, int64 [N]; UNKNOWN_LABEL where none were given."""
        return self._label_N

    def prepare(self, scalars: tuple[str, ...], num_epochs: int) -> None:
        """Compute these scalars in one pass over the files; `read` is then a look-up.

        While it works, torch's operations in other threads of the program may run on one core each.
        """
        unknown = [name for name in scalars if name not in _NEED_NO_LABEL]
        if unknown and (self._label_N == UNKNOWN_LABEL).any():
            raise InputError(
                f"{self.directory} holds no labels, which {', '.join(unknown)} needs; give the"
                " dataset with --beton FILE"
            )
        values_FTN = np.empty((len(scalars), num_epochs, self.num_samples), dtype=np.float32)
        # what the next epoch compares with
        kept_NC, previous_NC = torch.empty(2, self.num_samples, self.num_classes)
        place_N = np.zeros(self.num_samples, dtype=np.int64)  # of each sample in `previous_NC`
        with _workers() as (pool, num_workers):
            num_rounds = math.ceil(self.num_samples * self.num_classes / (_BLOCK * num_workers))
            # the same work for each of them
            num_rows = math.ceil(self.num_samples / (num_rounds * num_workers))
            for epoch in range(num_epochs):
                outputs, index_N = self._read_epoch(epoch)
                if outputs.shape != kept_NC.shape:
                    raise InputError(
                        f"{self.directory}: epoch {epoch} has outputs {outputs.shape}, the one"
                        f" before {tuple(kept_NC.shape)}; the folder mixes runs"
                    )
                self._read_ahead(epoch + 1)
                # each worker takes the next one
                firsts = iter(range(0, self.num_samples, num_rows))
                before = (previous_NC, place_N) if epoch > 0 else None
                running = [
                    pool.submit(
                        self._compute,
                        scalars,
                        outputs,
                        index_N,
                        firsts,
                        num_rows,
                        before,
                        kept_NC,
                        values_FTN[:, epoch],
                    )
                    for _ in range(num_workers)
                ]
                if bad := sorted(place for worker in running for place in worker.result()):
                    raise InputError(
                        f"{self.directory / f'{epoch}_Output.npy'} holds NaN or infinite logits"
                        f" (global indices {index_N[bad[:_NUM_NAMED]].tolist()})"
                    )
                kept_NC, previous_NC = previous_NC, kept_NC
                place_N[index_N] = np.arange(self.num_samples)
        self._cache = dict(zip(scalars, values_FTN, strict=True))

    def read(self, scalar: str, num_epochs: int | None = None) -> np.ndarray:
        """Return one scalar of the first `num_epochs` epochs (default all), float32 [T, N]."""
        num_epochs = self.num_epochs if num_epochs is None else num_epochs
        if scalar not in self._cache or len(self._cache[scalar]) < num_epochs:
            self.prepare((scalar,), num_epochs)
        return self._cache[scalar][:num_epochs]

    def _compute(
        self,
        scalars: tuple[str, ...],
        outputs: "_Outputs",
        index_N: np.ndarray,
        firsts: Iterator[int],
        num_rows: int,
        before: tuple[Tensor, np.ndarray] | None,
        kept_NC: Tensor,
        values_FN: np.ndarray,
    ) -> list[int]:
        """Do one worker's part of an epoch: fill `values_FN` and `kept_NC` at the rows it takes;
        return those with NaN or infinity."""
        bad: list[int] = []
        # used again: fresh memory costs
        logits_RC, previous_RC = torch.empty(2, num_rows, self.num_classes)
        for first in firsts:
            index_n = index_N[first : first + num_rows]
            logits_nC, kept_nC = logits_RC[: len(index_n)], kept_NC[first : first + num_rows]
            outputs.read(first, logits_nC.numpy())
            # One sum is cheaper than a look at each number, and misses none; it may only run over.
            if not math.isfinite(logits_nC.sum()):
                is_bad_n = ~logits_nC.isfinite().all(dim=1)
                bad += (first + is_bad_n.nonzero()[:, 0]).tolist()
            previous_nC = None
            if before is not None:
                previous_NC, place_N = before
                previous_nC = torch.index_select(
                    previous_NC,
                    0,
                    torch.from_numpy(place_N[index_n]),
                    out=previous_RC[: len(index_n)],
                )
            if scalars == _OFFICIAL:
                value_Fn = _official_alone(logits_nC, previous_nC, kept_nC)
            else:
                kept_nC.copy_(log_probabilities(logits_nC))
                label_n = torch.from_numpy(self._label_N[index_n].clip(0))  # some class or other
                value_Fn = _scalars(scalars, logits_nC, kept_nC, previous_nC, label_n)
            values_FN[:, index_n] = value_Fn.numpy()
        return bad

    def _read_epoch(self, epoch: int) -> tuple["_Outputs", np.ndarray]:
        """Return the logits of an epoch in visit order, [N, C] of any floating-point type, and
        their indices, int64 [N]."""
        outputs = self._outputs(epoch)
        num_samples = outputs.shape[0]
        index_N = self._load(epoch, "Index", None).astype(np.int64).reshape(-1)
        is_there_N = np.zeros(num_samples, dtype=bool)
        is_there_N[index_N[(index_N >= 0) & (index_N < num_samples)]] = True
        if len(index_N) != num_samples or not is_there_N.all():
            raise InputError(
                f"{self.directory / f'{epoch}_Index.npy'} does not hold every index"
                f" 0..{num_samples - 1} once; an epoch must record every sample exactly once"
            )
        return outputs, index_N

    def _outputs(self, epoch: int) -> "_Outputs":
        output_NC = self._load(epoch, "Output", "r")
        path = self.directory / f"{epoch}_Output.npy"
        if output_NC.ndim != 2 or not np.issubdtype(output_NC.dtype, np.floating):
            raise InputError(
                f"{path} is {output_NC.dtype} {output_NC.shape}, expected floating-point logits"
                " [N, C]"
            )
        return _Outputs(path, output_NC)

    def _load(self, epoch: int, name: str, mmap_mode: Literal["r"] | None) -> np.ndarray:
        path = self.directory / f"{epoch}_{name}.npy"
        try:
            return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); T epochs need 0_{name}.npy to (T-1)_{name}.npy"
            ) from error

    def _read_ahead(self, epoch: int) -> None:
        """Have the system read an epoch's outputs, if there are any, in the background."""
        if epoch < self.num_epochs and hasattr(os, "posix_fadvise"):
            with (self.directory / f"{epoch}_Output.npy").open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class _Outputs:
    """One epoch's file, in blocks of rows. Read and not mapped: giving mapped pages back stops all
    threads for a moment."""

    def __init__(self, path: Path, mapped_NC: np.ndarray):
        self.shape: tuple[int, ...] = mapped_NC.shape
        self._mapped_NC = mapped_NC
        self._is_plain = (
            isinstance(mapped_NC, np.memmap)
            and mapped_NC.dtype == np.float32
            and mapped_NC.flags.c_contiguous
        )
        self._file = path.open("rb") if self._is_plain else None
        self._path = path

    def read(self, first: int, into_nC: np.ndarray) -> None:
        """Return the rows from `first` on as float32; values that are too large for it become
        infinite."""
        if self._file is None:  # another precision or order of the axes
            with np.errstate(over="ignore"):
                np.copyto(
                    into_nC, self._mapped_NC[first : first + len(into_nC)], casting="same_kind"
                )
            return
        assert isinstance(self._mapped_NC, np.memmap)
        buffer = memoryview(into_nC).cast("B")  # type: ignore[arg-type]
        offset = self._mapped_NC.offset + first * into_nC.shape[1] * into_nC.itemsize
        while buffer:
            num_read = os.preadv(self._file.fileno(), [buffer], offset)
            if num_read == 0:
                raise InputError(f"{self._path} became shorter while it was read; restore it")
            buffer, offset = buffer[num_read:], offset + num_read


def _official_alone(logits_nC: Tensor, previous_nC: Tensor | None, kept_nC: Tensor) -> Tensor:
    """Compute `delta_official` of some rows, float32 [1, n], which is all that TDDS needs;
    overwrite the arguments.

    `kept_nC` gets p + epsilon, which is what the next epoch divides by: the time goes into passes
    over memory, so the way from logits to probabilities is shorter here than in `sample_stats`, and
    the last bits differ.
    """
    p_nC = logits_nC.sub_(logits_nC.amax(dim=1, keepdim=True)).exp_()
    p_nC.mul_(p_nC.sum(dim=1, keepdim=True).reciprocal_())
    torch.add(p_nC, OFFICIAL_EPSILON, out=kept_nC)
    if previous_nC is None:
        return torch.full((1, len(p_nC)), torch.nan)
    return (
        torch.div(kept_nC, previous_nC, out=previous_nC).log_().mul_(p_nC).abs_().sum(dim=1)[None]
    )


def _scalars(
    names: tuple[str, ...],
    logits_nC: Tensor,
    logp_nC: Tensor,
    previous_nC: Tensor | None,
    label_n: Tensor,
) -> Tensor:
    """Compute these scalars of some rows, float32 [F, n]."""
    if names != ("delta_paper",):
        return sample_scalars(logits_nC, logp_nC, previous_nC, label_n)[
            [SCALARS.index(name) for name in names]
        ]
    if previous_nC is None:
        return torch.full((1, len(logp_nC)), torch.nan)
    return loss_difference_paper(previous_nC, logp_nC)[None]


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Start as many threads as torch uses, and let torch use one in each of them."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that start from now on
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            yield pool, num_threads
    finally:
        torch.set_num_threads(num_threads)
