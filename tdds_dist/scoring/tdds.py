"""TDDS: window variability and its average over windows (arXiv 2311.13613, Eq. 11 and 12), in both
presets.

`official` is what the authors' code computes; `paper` is what the equations say. Loss differences
(Eq. 10) are in `sample_stats`. Sums over epochs are written as loops on purpose: a library
reduction over the first axis changes its summation order with the number of columns, and scores
must not depend on how many samples share a shard.
"""

# M samples (any number of columns), m some of them, D differences per window, S slots of the ring,
# T trajectory length in epochs, K window size

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


# ---- epochs that skip samples: each sample has windows over its own visits


def put_own_difference(delta_SM: Tensor, delta_M: Tensor, num_visits_M: Tensor) -> None:
    """Put the difference into visit v, counted from 0, in slot v mod S of each sample, after
    `num_visits_M` = v visits; the first visit has none. That of a sample which was skipped stands
    where no window looks, until its next visit replaces it."""
    slot_1M = (num_visits_M % len(delta_SM)).long()[None]
    delta_1M = torch.where(num_visits_M > 0, delta_M, 0.0)[None]
    delta_SM.scatter_(0, slot_1M, delta_1M)


def average_own_window(
    average_M: Tensor,
    delta_SM: Tensor,
    num_visits_M: Tensor,
    is_visited_M: Tensor,
    window: Window,
    preset: str,
) -> None:
    """Fold the window that ends with this visit into the average of each visited sample that has
    one, in place; the others keep theirs. For a sample that was always visited, bit for bit
    `average_windows`."""
    num_differences = differences_per_window(window, preset)
    num_windows_M = num_visits_M - num_differences + 1
    # in time order; of a sample without a full window any numbers, which are not used
    variability_M = window_variability(
        [
            delta_SM.gather(0, ((num_windows_M + back) % len(delta_SM)).long()[None])[0]
            for back in range(num_differences)
        ],
        preset,
    )
    weight_M = torch.tensor(window.beta, dtype=torch.float64)
    if window.beta == SIMPLE_AVERAGE:
        weight_M = 1.0 / num_windows_M.clamp_min(1).double()
    # rounded as torch rounds a weight that is a number
    new_M = average_M * (1.0 - weight_M).float() + variability_M * weight_M.float()
    average_M.copy_(torch.where(is_visited_M & (num_windows_M >= 1), new_M, average_M))


def _score_own_visits(
    delta_TM: np.ndarray, visited_TM: np.ndarray, window: Window, preset: str
) -> np.ndarray:
    num_slots, num_samples = differences_per_window(window, preset), delta_TM.shape[1]
    delta_SM, average_M = torch.zeros(num_slots, num_samples), torch.zeros(num_samples)
    num_visits_M = torch.zeros(num_samples, dtype=torch.int32)
    for delta_M, visited_M in zip(delta_TM[: window.T], visited_TM, strict=False):
        is_visited_M = torch.from_numpy(visited_M > 0)
        put_own_difference(delta_SM, torch.from_numpy(np.ascontiguousarray(delta_M)), num_visits_M)
        average_own_window(average_M, delta_SM, num_visits_M, is_visited_M, window, preset)
        num_visits_M += is_visited_M
    return average_M.numpy()


# ---- from what was recorded


def score_trajectory(
    delta_TM: np.ndarray, window: Window, preset: str, visited_TM: np.ndarray | None = None
) -> np.ndarray:
    """Compute the score of each sample from its recorded loss differences; float32 [M].

    `delta_TM` float32 [>= T, M]: row t is the difference between epochs t - 1 and t; row 0 is not
    read. `visited_TM` says where samples were visited, when some were not. The same operations in
    the same order as those of `scorer` during training, hence the same bits.
    """
    check_window(window, preset, len(delta_TM))
    if visited_TM is not None:
        return _score_own_visits(delta_TM, visited_TM, window, preset)
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
