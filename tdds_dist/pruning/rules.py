"""Samples that an epoch visits, and the weight of each in the loss: one function per method. Pure
NumPy.

Each returns (kept bool [N], weight float32 [N]) from numbers of each sample's last visit. Draws
depend on `key` alone, (seed, epoch). `plan` says in which epochs a rule is asked, and which of
these functions belongs to which method.
"""

# N samples, M kept

import numpy as np

from tdds_dist.coreset.samplers import top

Kept = tuple[np.ndarray, np.ndarray]
# What a draw is for. The orders of (seed, epoch) have 0 here, or the numbers of lanes.
_CHOICE, _EXPLORED, _TWIN = 1001, 1002, 1003
_SMALLEST = 2.0**-149  # a probability that float32 knows; smaller ones count as this


def _generator(key: list[int], purpose: int) -> np.random.Generator:
    return np.random.default_rng([*key, purpose])


def _tie_seed(key: list[int]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def everyone(num_samples: int) -> Kept:
    """Keep all, each with weight 1."""
    return np.ones(num_samples, dtype=bool), np.ones(num_samples, dtype=np.float32)


def infobatch(p_label_N: np.ndarray, rate: float, key: list[int]) -> Kept:
    """Drop `rate` of the samples whose loss is below the mean, at random, and weigh the others of
    them so that their weights add up to their number (InfoBatch, ICLR 2024, arXiv 2303.04947).

    The loss is -log p of the label, without label smoothing or mixing. The authors' code keeps
    int((1 - rate) n) of the n, with weight 1 / (1 - rate) and at least a tenth; here n - round(rate
    n), at least one, with weight n / number kept: the same in the mean, and exact. Theirs shares
    the set out to ranks and drops a tail; here all of it is visited.
    """
    loss_N = -np.log(np.maximum(p_label_N.astype(np.float64), _SMALLEST))
    # the mean of equal losses may round to above them
    light = np.flatnonzero((loss_N < loss_N.mean()) & (loss_N < loss_N.max()))
    kept_N, weight_N = everyone(len(loss_N))
    if not len(light):
        return kept_N, weight_N
    num = max(1, len(light) - round(rate * len(light)))
    chosen = _generator(key, _CHOICE).choice(light, num, replace=False)
    kept_N[light] = False
    kept_N[chosen] = True
    weight_N[chosen] = len(light) / num
    return kept_N, weight_N


def hard_first(p_label_N: np.ndarray, threshold: float, least: int, key: list[int]) -> Kept:
    """Keep the samples whose label had a probability below the threshold (Progressive Data Dropout,
    arXiv 2505.22342: difficulty-based, DBPD); if those are fewer than `least`, the hardest.

    The authors' code decides in each batch by an extra forward pass over everything, and skips a
    batch that keeps nothing; here the probability is that of the sample's last visit, and only kept
    samples are read and pass through the network. A sample at or above the threshold comes back in
    the last, full epochs.
    """
    kept_N = p_label_N < threshold
    least = min(least, len(kept_N))
    if kept_N.sum() < least:
        kept_N = _mask(top(-p_label_N, least, _tie_seed(key)), len(kept_N))
    return kept_N, everyone(len(kept_N))[1]


def progressive(p_label_N: np.ndarray, rate: float, drawn: float, key: list[int]) -> Kept:
    """Draw a share `drawn` of the samples at random and keep those of largest loss among them, N -
    round(rate N) in all (OrderDP, ICLR 2026, arXiv 2606.08574).

    The authors' code draws int(R N) and keeps int(q R N), with shares R and q (by default 0.75 and
    0.85); here the number kept is that of the rate, q = (1 - rate) / R. A sample of probability 0
    is tied with others such, and ties are drawn.
    """
    num_samples = len(p_label_N)
    num = max(1, num_samples - round(rate * num_samples))
    num_drawn = max(num, round(drawn * num_samples))
    among = np.sort(_generator(key, _CHOICE).choice(num_samples, num_drawn, replace=False))
    kept = among[top(-p_label_N[among], num, _tie_seed(key))]
    return _mask(kept, num_samples), everyone(num_samples)[1]


def explored(kept_N: np.ndarray, num: int, key: list[int]) -> np.ndarray:
    """Add `num` of the samples that are not kept, drawn at random; bool [N]."""
    others = np.flatnonzero(~kept_N)
    return kept_N | _mask(
        _generator(key, _EXPLORED).choice(others, num, replace=False), len(kept_N)
    )


def twin(kept_N: np.ndarray, weight_N: np.ndarray, key: list[int]) -> Kept:
    """Return a set and weights that are dealt out anew at random: as many samples, the same
    weights."""
    place_N = _generator(key, _TWIN).permutation(len(kept_N))
    return kept_N[place_N], weight_N[place_N]


def _mask(index_M: np.ndarray, num_samples: int) -> np.ndarray:
    mask_N = np.zeros(num_samples, dtype=bool)
    mask_N[index_M] = True
    return mask_N
