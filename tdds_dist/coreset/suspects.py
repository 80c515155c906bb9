"""Samples ranked by how likely their label is wrong, from what a collection recorded.

A wrong label shows in training: the network tells the sample from its given class late, with a low
margin, and at a high loss. Owns how scores are combined; the review page is in `report.review`.
"""

# N dataset

from collections.abc import Mapping

import numpy as np

from tdds_dist.scoring.baselines import aum, csl, learning_time

# chosen by `benchmarks.wrong_labels`, docs/wrong_labels.md
COMBINED = ("aum", "csl", "learning_time")


def ranks(value_N: np.ndarray) -> np.ndarray:
    """Return the rank of each value over N, float64 in (0, 1], equal values alike."""
    _, place_N, count = np.unique(value_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place_N] / len(value_N)


def suspicion(scalar_TN: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return how suspicious each label is, the mean rank by AUM, CSL and learning time; float64 [N]
    in (0, 1].

    `scalar_TN`: the recorded `logit_margin`, `p_label` and `correct`, each float32 [T, N].
    """
    values = (
        aum(scalar_TN["logit_margin"]),
        csl(scalar_TN["p_label"]),
        learning_time(scalar_TN["correct"]),
    )
    return np.mean([ranks(value_N) for value_N in values], axis=0)
