"""TDDS: window variability and its average over windows (arXiv 2311.13613, Eq. 11 and 12), in both
presets.

`official` is what the authors' code computes; `paper` is what the equations say. Loss differences
(Eq. 10) are in `sample_stats`. Sums over epochs are written as loops on purpose: a library
reduction over the first axis changes its summation order with the number of columns, and scores
must not depend on how many samples share a shard.
"""

# M samples (any number of columns), m some of them, D differences per window, T trajectory length
# in epochs, K window size

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tdds_dist.config.scores import SIMPLE_AVERAGE, Window, check_window, differences_per_window

_COLUMNS = 2**14  # samples scored at once, so that a window's arrays stay in the cache


def window_variability(delta_DM: Sequence[Tensor], preset: str) -> Tensor:
    """Compute the variability of the loss differences in one window, Eq. 11; float32 [M].

    `paper`: sum of squared deviations from the mean. `official`: its square root. `delta_DM` is in
    time order.
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


def average_windows(
    average_M: Tensor, variability_M: Tensor, beta: float, num_windows: int
) -> None:
    """Fold the `num_windows`-th window (counted from 1) into the running average, in place, Eq. 12.

    R <- beta R_t + (1 - beta) R, started at 0; with beta = 0 the plain mean over windows.
    """
    weight = 1.0 / num_windows if beta == SIMPLE_AVERAGE else beta
    average_M.mul_(1.0 - weight).add_(variability_M * weight)


def score_trajectory(delta_TM: np.ndarray, window: Window, preset: str) -> np.ndarray:
    """Compute the score of each sample from its recorded loss differences; float32 [M].

    `delta_TM` float32 [>= T, M]: row t is the difference between epochs t - 1 and t; row 0 is not
    read. The same operations in the same order as those of `scorer` during training, hence the same
    bits.
    """
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
