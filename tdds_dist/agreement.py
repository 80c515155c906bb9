"""How much two scores or coresets agree, and what a coreset keeps of classes and of noise. Pure NumPy."""

# N dataset, M kept samples, C classes

import numpy as np

from tdds_dist.errors import InputError


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their average rank; nan where a side is constant or holds a nan.

    Raises InputError for lengths that differ.
    """
    if a_N.shape != b_N.shape or a_N.ndim != 1:
        raise InputError(f"scores of shapes {a_N.shape} and {b_N.shape} cannot be correlated; both must be [N]")
    if np.isnan(a_N).any() or np.isnan(b_N).any():
        return float("nan")
    return rank_correlation(centred_ranks(a_N, np.argsort(a_N)), centred_ranks(b_N, np.argsort(b_N)))


def overlap(index_a: np.ndarray, index_b: np.ndarray) -> float:
    """Share of the (larger) coreset that both have in common; each int64 [M], no index twice. Nan for no samples."""
    larger = max(len(index_a), len(index_b))
    return len(np.intersect1d(index_a, index_b, assume_unique=True)) / larger if larger else float("nan")


def keep_rates(index_M: np.ndarray, label_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Share of each class that is kept, float64 [C]; nan for a class without samples. Unknown labels (-1) do not count.

    Raises InputError for a label that is not below `num_classes`.
    """
    if len(label_N) and label_N.max() >= num_classes:
        raise InputError(f"label {label_N.max()} is outside [0, {num_classes}); score again with --beton FILE")

    def sizes(label: np.ndarray) -> np.ndarray:
        return np.bincount(label[label >= 0], minlength=num_classes)

    total_C = sizes(label_N)
    return np.divide(sizes(label_N[index_M]), total_C, out=np.full(num_classes, np.nan), where=total_C > 0)


def noise_kept(index_M: np.ndarray, noisy_N: np.ndarray) -> tuple[float, float]:
    """Share of the noisy samples (bool [N]) that is kept, and share of the coreset that is noisy; nan for a share of none."""
    kept, noisy = int(np.count_nonzero(noisy_N[index_M])), int(np.count_nonzero(noisy_N))
    return (kept / noisy if noisy else float("nan")), (kept / len(index_M) if len(index_M) else float("nan"))


def centred_ranks(score_N: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """Twice the average rank minus twice the mean rank, int32 [N]: whole numbers, in sum 0. `order_N` sorts the scores."""
    sorted_N = score_N[order_N]
    first = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))  # where each group of ties starts
    end = np.append(first[1:], len(score_N))
    rank_N = np.empty(len(score_N), dtype=np.int32)
    rank_N[order_N] = np.repeat(first + end - len(score_N), end - first)
    return rank_N


def rank_correlation(rank_a_N: np.ndarray, rank_b_N: np.ndarray) -> float:
    """Pearson's correlation of two results of `centred_ranks`."""
    a_N, b_N = rank_a_N.astype(np.float64), rank_b_N.astype(np.float64)
    squares = float(a_N @ a_N) * float(b_N @ b_N)
    return float(a_N @ b_N) / squares**0.5 if squares else float("nan")
