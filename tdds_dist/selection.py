"""From a full score vector to a coreset. Pure NumPy; every selector returns sorted global indices.

Ties are broken by a seeded draw: by index they would favour whatever the dataset happens to list first.
"""

# N samples, M kept

import numpy as np

from tdds_dist.errors import InputError


def num_kept(num_samples: int, pruning_rate: float) -> int:
    """M = N - round(p N), the number of samples kept at pruning rate p in [0, 1)."""
    if not 0.0 <= pruning_rate < 1.0:
        raise InputError(f"pruning_rate={pruning_rate} must lie in [0, 1): it is the fraction that is removed")
    kept = num_samples - round(pruning_rate * num_samples)
    if kept < 1:
        raise InputError(f"pruning_rate={pruning_rate} keeps none of {num_samples} samples; lower it")
    return kept


def top(score_N: np.ndarray, num: int, seed: int = 0) -> np.ndarray:
    """The `num` samples of highest score; sorted int64 [num]."""
    tie_N = np.random.default_rng([seed, 0]).permutation(len(score_N))
    return np.sort(np.lexsort((tie_N, -score_N))[:num]).astype(np.int64)


def top_per_class(score_N: np.ndarray, label_N: np.ndarray, num: int, seed: int = 0) -> np.ndarray:
    """The highest-scored samples of each class, in proportion to class sizes; sorted int64 [num].

    Class quotas are rounded by largest remainder so that they add up to exactly `num`.
    """
    classes, size = np.unique(label_N, return_counts=True)
    if classes[0] < 0:
        raise InputError("class-balanced selection needs labels, and these scores have none; "
                         "score again with --beton FILE to take labels from the dataset")
    exact = num * size / len(label_N)
    quota = np.floor(exact).astype(np.int64)
    largest_remainder = np.argsort(-(exact - quota), kind="stable")
    quota[largest_remainder[: num - quota.sum()]] += 1
    kept = []
    for class_id, class_quota in zip(classes, quota, strict=True):
        member_m = np.flatnonzero(label_N == class_id)
        kept.append(member_m[top(score_N[member_m], int(class_quota), seed)])
    return np.sort(np.concatenate(kept))


def empty_classes(index_M: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Classes of the dataset of which the coreset keeps nothing."""
    present = np.unique(label_N)
    return np.setdiff1d(present[present >= 0], np.unique(label_N[index_M]))


def min_max(score_N: np.ndarray) -> np.ndarray:
    """Scores scaled to [0, 1] over all N, the importance of the authors' code; all 1 when every score is equal."""
    low, high = float(score_N.min()), float(score_N.max())
    if high == low:
        return np.ones_like(score_N, dtype=np.float32)
    return ((score_N.astype(np.float64) - low) / (high - low)).astype(np.float32)
