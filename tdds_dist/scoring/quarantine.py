"""Samples with NaN or infinite logits: scored lowest, and in no coreset."""
from collections.abc import Sequence

import numpy as np

from tdds_dist.errors import InputError

# ---- what a coreset leaves out, and how its samples are weighted


def set_lowest(score_N: np.ndarray, quarantined: Sequence[int]) -> np.ndarray:
    """Return a copy in which `quarantined` samples (global indices) have the lowest score of all others.

    Whatever they had before, finite or not; a ranking then prunes them first.

    Raises:
        InputError: an index outside [0, N), or no other samples.
    """
    score_N = score_N.copy()
    rest_n = not_quarantined(len(score_N), quarantined)
    if len(rest_n) < len(score_N):
        score_N[list(quarantined)] = score_N[rest_n].min()
    return score_N


def not_quarantined(num_samples: int, quarantined: Sequence[int]) -> np.ndarray:
    """Return the other samples' global indices, int64 [n], sorted; raise InputError as `set_lowest` does."""
    if outside := [index for index in quarantined if not 0 <= index < num_samples]:
        raise InputError(f"quarantined sample {outside[0]} is not in [0, {num_samples}); the list is of another dataset, "
                         "score again")
    is_left_N = np.ones(num_samples, dtype=bool)
    is_left_N[list(quarantined)] = False
    if not is_left_N.any():
        raise InputError(f"all {num_samples} samples are quarantined: each gave logits that are not finite, so no score says "
                         "anything; look for what made training diverge")
    return np.flatnonzero(is_left_N)
