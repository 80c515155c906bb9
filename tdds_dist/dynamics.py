"""Dynamics folders of the authors' code, read as if they were a trajectory: `{epoch}_Output.npy` (logits in visit order) and
`{epoch}_Index.npy` for every epoch.

They are streamed: two to three epochs of outputs are in memory, and the scalars that were asked for.
"""

# F scalars, T epochs, N dataset, n rows computed at once, C classes

import re
from pathlib import Path

import numpy as np
import torch

from tdds_dist.artifacts import UNKNOWN_LABEL
from tdds_dist.errors import InputError
from tdds_dist.scalars import SCALARS, log_probabilities, sample_scalars

_ROWS = 2**14  # computed at once, so that temporary arrays stay small beside the outputs
_OUTPUT = re.compile(r"(\d+)_Output\.npy")
_NEED_NO_LABEL = ("delta_official", "delta_paper", "entropy")


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
        self.num_samples, self.num_classes = self._read_epoch(0).shape
        self._label_N = label_N
        self._cache: dict[str, np.ndarray] = {}

    def labels(self) -> np.ndarray:
        """Label by global index, int64 [N]; UNKNOWN_LABEL where none were given."""
        return np.full(self.num_samples, UNKNOWN_LABEL, dtype=np.int64) if self._label_N is None else self._label_N

    def prepare(self, scalars: tuple[str, ...], num_epochs: int) -> None:
        """Compute these scalars in one pass over the files; `read` is then a look-up."""
        if self._label_N is None and (unknown := [name for name in scalars if name not in _NEED_NO_LABEL]):
            raise InputError(f"{self.directory} holds no labels, which {', '.join(unknown)} needs; give the dataset with "
                             "--beton FILE")
        label_N = torch.from_numpy(self.labels()).clamp_min(0)
        rows = [SCALARS.index(name) for name in scalars]
        values_FTN = np.empty((len(scalars), num_epochs, self.num_samples), dtype=np.float32)
        previous_NC: torch.Tensor | None = None
        for epoch in range(num_epochs):
            logits_NC = self._read_epoch(epoch)
            if previous_NC is not None and previous_NC.shape != logits_NC.shape:
                raise InputError(f"{self.directory}: epoch {epoch} has outputs {tuple(logits_NC.shape)}, the one before "
                                 f"{tuple(previous_NC.shape)}; the folder mixes runs")
            for first in range(0, self.num_samples, _ROWS):
                part = slice(first, first + _ROWS)
                logp_nC = log_probabilities(logits_NC[part])
                previous_nC = None if previous_NC is None else previous_NC[part]
                values_FTN[:, epoch, part] = sample_scalars(logits_NC[part], logp_nC, previous_nC, label_N[part])[rows].numpy()
                logits_NC[part] = logp_nC
            previous_NC = logits_NC
        self._cache = dict(zip(scalars, values_FTN, strict=True))

    def read(self, scalar: str, num_epochs: int | None = None) -> np.ndarray:
        """One scalar of the first `num_epochs` epochs (default all), float32 [T, N]."""
        num_epochs = self.num_epochs if num_epochs is None else num_epochs
        if scalar not in self._cache or len(self._cache[scalar]) < num_epochs:
            self.prepare((scalar,), num_epochs)
        return self._cache[scalar][:num_epochs]

    def _read_epoch(self, epoch: int) -> torch.Tensor:
        """Logits of an epoch by global index, float32 [N, C]."""
        arrays = []
        for name in ("Output", "Index"):
            path = self.directory / f"{epoch}_{name}.npy"
            try:
                arrays.append(np.load(path, allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path} cannot be read ({error}); T epochs need 0_{name}.npy to (T-1)_{name}.npy") from error
        output_NC, index_N = arrays[0], arrays[1].astype(np.int64).reshape(-1)
        where = self.directory / f"{epoch}_Output.npy"
        if output_NC.ndim != 2 or not np.issubdtype(output_NC.dtype, np.floating):
            raise InputError(f"{where} is {output_NC.dtype} {output_NC.shape}, expected floating-point logits [N, C]")
        if not np.array_equal(np.sort(index_N), np.arange(len(output_NC))):
            raise InputError(f"{self.directory / f'{epoch}_Index.npy'} does not hold every index 0..{len(output_NC) - 1} once; "
                             "an epoch must record every sample exactly once")
        if not np.isfinite(output_NC).all():
            bad = index_N[~np.isfinite(output_NC).all(axis=1)][:8].tolist()
            raise InputError(f"{where} holds NaN or infinite logits (global indices {bad})")
        by_index_NC = np.empty(output_NC.shape, dtype=np.float32)
        by_index_NC[index_N] = output_NC
        return torch.from_numpy(by_index_NC)



