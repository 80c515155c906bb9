"""Bins along the axis of a score, for charts: long tails and counting scores stay readable. Pure NumPy."""

# N samples, B bins

import math
from dataclasses import dataclass

import numpy as np

SKEWED = 0.1  # the median lies below this part of the range, tails aside: the axis is made logarithmic
LARGEST_RATIO = 1e6  # between the ends of a logarithmic axis, unless MOST_BELOW of the samples would be below it
MOST_BELOW = 0.05
TAIL = 0.001  # share of the samples that may be put into each end bin where they would stretch the axis


@dataclass(frozen=True, eq=False)
class Bins:
    """Edges of B bins; the end bins hold what lies beyond them too."""

    edge: np.ndarray  # float64 [B + 1], ascending
    is_log: bool = False  # of equal width in the logarithm
    is_whole: bool = False  # around whole numbers

    def __len__(self) -> int:
        return len(self.edge) - 1

    def place(self, score_N: np.ndarray) -> np.ndarray:
        """The bin of each score, int64 [N]. A bin holds its lower edge; the last one its upper edge as well."""
        return np.clip(np.searchsorted(self.edge, score_N, side="right") - 1, 0, len(self) - 1)

    def beyond(self, score_N: np.ndarray) -> tuple[int, int]:
        """How many scores lie below the first edge, and above the last one."""
        return int(np.count_nonzero(score_N < self.edge[0])), int(np.count_nonzero(score_N > self.edge[-1]))


def bins_of(score_N: np.ndarray, num_bins: int) -> Bins:
    """About `num_bins` bins for finite scores [N], at least one of them.

    Scores from 0 up most of which are small (TDDS late in training) get a logarithmic axis over about LARGEST_RATIO. On any
    other axis, TAIL of the samples at either end goes into the end bin where it would take half of the axis. Counting scores
    (forgetting) get bins around whole numbers, or every other bin would be empty.
    """
    score_N = score_N.astype(np.float64)
    low, *inner, middle, high = (float(value) for value in np.quantile(score_N, [0, TAIL, 1 - TAIL, 0.5, 1]))
    if low == high:
        return Bins(np.linspace(low - 0.5, low + 0.5, num_bins + 1))
    whole = bool((score_N == np.round(score_N)).all())
    if low >= 0 and middle - low < SKEWED * (inner[1] - low) and not whole:
        least, few = (float(value) for value in np.quantile(score_N[score_N > 0], [TAIL, MOST_BELOW]))
        first = max(least, min(few, high / LARGEST_RATIO))
        if first < high:
            edge = np.geomspace(first, high, num_bins + 1)
            edge[[0, -1]] = first, high
            return Bins(edge, is_log=True)
    if 0 < inner[1] - inner[0] < (high - low) / 2:
        low, high = inner
    if whole:
        low, high = math.floor(low), math.ceil(high)
        step = math.ceil((high - low) / num_bins)
        return Bins(np.arange(low - 0.5, high + step, step), is_whole=True)
    return Bins(np.linspace(low, high, num_bins + 1))
