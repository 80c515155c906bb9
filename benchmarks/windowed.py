"""TDDS as published code computes it, in NumPy: what `benchmarks.offline` compares `tdds score`
with.

All outputs of all epochs are held, and every window starts from the logits again: softmax, order by
index, K - 1 loss differences, their deviations from the mean. Windows overlap in all but one epoch,
so each epoch is done up to K times. It is neither slowed down nor tuned, and shares no code with
the package. Preset `official`.
"""

# T epochs, K epochs of a window, N samples, C classes, D = K - 1 differences

import itertools
from pathlib import Path

import numpy as np

EPSILON = 1e-8


def windowed_scores(folder: Path, T: int, K: int, beta: float = 0.9) -> np.ndarray:
    """Score by global index, float32 [N], from `{t}_Output.npy` (logits [N, C] in visit order) and
    `{t}_Index.npy`."""
    logits_TNC = np.array([np.load(folder / f"{t}_Output.npy") for t in range(T)])
    index_TN = np.array([np.load(folder / f"{t}_Index.npy").reshape(-1) for t in range(T)])
    weighted = []
    for first in range(T - K + 1):
        window = slice(first, first + K)
        variability_N = _variability(logits_TNC[window], index_TN[window])
        weighted.append(variability_N * beta * (1.0 - beta) ** (T - K - first))
    return np.array(weighted).sum(axis=0)


def _variability(logits_KNC: np.ndarray, index_KN: np.ndarray) -> np.ndarray:
    """Norm of the deviations of one window's loss differences from their mean, float32 [N]."""
    p_KNC = _softmax(logits_KNC)
    by_index_KNC = []
    for p_NC, index_N in zip(p_KNC, index_KN, strict=True):
        by_index_NC = np.empty_like(p_NC)
        by_index_NC[index_N] = p_NC
        by_index_KNC.append(by_index_NC)
    delta = []
    for previous_NC, now_NC in itertools.pairwise(by_index_KNC):
        log_ratio_NC = np.log(now_NC + EPSILON) - np.log(previous_NC + EPSILON)
        delta.append(np.abs(now_NC * log_ratio_NC).sum(axis=1))
    delta_DN = np.array(delta)
    return np.linalg.norm(delta_DN - delta_DN.mean(axis=0), axis=0)


def _softmax(logits_KNC: np.ndarray) -> np.ndarray:
    exp_KNC = np.exp(logits_KNC - logits_KNC.max(axis=2, keepdims=True))
    return exp_KNC / exp_KNC.sum(axis=2, keepdims=True)
