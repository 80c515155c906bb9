"""TDDS: window variability and its average over windows (arXiv 2311.13613, Eq. 11 and 12), in both presets.

`official` is what the authors' released code computes (it produced the published numbers); `paper` is what the
equations say. Loss differences (Eq. 10) are in `scalars`. Sums over epochs are written as loops on purpose: a library
reduction over the first axis changes its summation order with the number of columns, and scores must not depend on
how many samples share a shard.
"""

# M samples (any number of columns), m some of them, D differences per window, T trajectory length in epochs, K window size

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tdds_dist.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor  # settings are checked without torch, which takes seconds to load

PRESETS = ("official", "paper")
DELTA_OF_PRESET = {"official": "delta_official", "paper": "delta_paper"}
# What stands in the place of the loss difference in the ablations of section 5.4: scalar of the trajectory, absolute or not.
# `el2n` ("EL2N + outer") puts the EL2N of epoch t where the difference into epoch t would be.
ABLATIONS = {"kl_signed": ("delta_paper", False), "ce": ("delta_ce", False), "ce_absolute": ("delta_ce", True),
             "el2n": ("el2n", False)}
DELTA_KINDS = ("kl", *ABLATIONS)  # kl: what the preset says
SIMPLE_AVERAGE = 0.0  # beta = 0 stands for the plain mean over windows (Fig. 5)
_COLUMNS = 2**14  # samples scored at once, so that a window's arrays stay in the cache


@dataclass(frozen=True)
class Window:
    """One setting of TDDS: trajectory length T (epochs), window size K, EMA decay beta (0: mean over windows).

    K counts as in the paper's tables; the preset says whether that means snapshots (`official`, so K - 1 loss
    differences) or loss differences (`paper`).
    """

    T: int
    K: int
    beta: float = 0.9

    def key(self, preset: str, delta: str = "kl") -> str:
        """Name of this setting in files, e.g. `tdds_official_T30_K10_beta0.9`, with the ablation behind it if it is one."""
        return f"tdds_{preset}_T{self.T}_K{self.K}_beta{self.beta:g}" + ("" if delta == "kl" else f"_{delta}")


def differences_per_window(window: Window, preset: str) -> int:
    """Loss differences in one window."""
    return window.K - 1 if preset == "official" else window.K


def check_window(window: Window, preset: str, num_epochs: int | None = None) -> None:
    """InputError unless the window can be computed, in a run of `num_epochs` epochs where that is given."""
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r} is unknown; use one of {', '.join(PRESETS)}")
    if not 0.0 <= window.beta <= 1.0:
        raise InputError(f"beta={window.beta} must lie in [0, 1]; the paper uses 0.9, and 0 means a plain average")
    low, high = (2, window.T) if preset == "official" else (1, window.T - 1)
    if not low <= window.K <= high:
        raise InputError(f"K={window.K} must lie in [{low}, {high}] for T={window.T} and preset {preset!r}; "
                         "lower K or raise T")
    if num_epochs is not None and num_epochs < window.T:
        raise InputError(f"T={window.T} is longer than the {num_epochs} epochs there are; lower T or train longer")


def window_variability(delta_DM: "Sequence[Tensor]", preset: str) -> "Tensor":
    """Variability of the loss differences in one window, Eq. 11; float32 [M].

    `paper`: sum of squared deviations from the mean. `official`: its square root. `delta_DM` is in time order.
    """
    num_differences = len(delta_DM)
    total_M = delta_DM[0].clone()
    for delta_M in delta_DM[1:]:
        total_M += delta_M
    mean_M = total_M * (1.0 / num_differences)  # CUDA divides this way; the CPU must round alike
    squares_M = (delta_DM[0] - mean_M) ** 2
    for delta_M in delta_DM[1:]:
        squares_M += (delta_M - mean_M) ** 2
    return squares_M.sqrt() if preset == "official" else squares_M


def average_windows(average_M: "Tensor", variability_M: "Tensor", beta: float, num_windows: int) -> None:
    """Fold the `num_windows`-th window (counted from 1) into the running average, in place, Eq. 12.

    R <- beta R_t + (1 - beta) R, started at 0; with beta = 0 the plain mean over windows.
    """
    weight = 1.0 / num_windows if beta == SIMPLE_AVERAGE else beta
    average_M.mul_(1.0 - weight).add_(variability_M * weight)


def score_trajectory(delta_TM: np.ndarray, window: Window, preset: str) -> np.ndarray:
    """Score of each sample from its recorded loss differences; float32 [M].

    `delta_TM` float32 [>= T, M]: row t is the difference between epochs t - 1 and t; row 0 is not read. The same
    operations in the same order as the live accumulators of `scorer`, hence bitwise equal to them.
    """
    import torch

    check_window(window, preset, len(delta_TM))
    num_differences = differences_per_window(window, preset)
    score_M = np.zeros(delta_TM.shape[1], dtype=np.float32)
    for first in range(0, len(score_M), _COLUMNS):
        part = slice(first, first + _COLUMNS)
        delta = [torch.from_numpy(np.ascontiguousarray(row[part])) for row in delta_TM[: window.T]]
        average_m = torch.from_numpy(score_M[part])
        for num_windows, last in enumerate(range(num_differences, window.T), start=1):
            variability_m = window_variability(delta[last - num_differences + 1 : last + 1], preset)
            average_windows(average_m, variability_m, window.beta, num_windows)
    return score_M


def delta_scalar(delta: str, preset: str) -> tuple[str, bool]:
    """The scalar of the trajectory that `delta` stands for, and whether its absolute value is taken."""
    if delta == "kl":
        return DELTA_OF_PRESET[preset], False  # official: absolute per class already
    if delta not in ABLATIONS:
        raise InputError(f"delta={delta!r} is unknown; use one of {', '.join(DELTA_KINDS)}")
    return ABLATIONS[delta]


def window_settings(window: Window, preset: str, delta: str = "kl") -> dict[str, object]:
    """The setting as it stands in score files."""
    setting = {"score": "tdds", "preset": preset, "T": window.T, "K": window.K, "beta": window.beta}
    return setting if delta == "kl" else setting | {"delta": delta}
