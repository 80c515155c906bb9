"""From a full score vector to a coreset. Pure NumPy; every selector returns sorted global indices.

Ties are broken by a seeded draw: by index they would favour whatever the dataset happens to list
first. A selector takes the number to keep, which `num_kept` derives from the pruning rate, and
keeps exactly so many.
"""

# N samples, M kept, m samples of one class, S strata

import math
from collections.abc import Callable

import numpy as np

from tdds_dist.errors import InputError

# from this pruning rate on; 0.3 at 0.9 is the command in CCS's README (CIFAR-10)
HARD_CUTOFF_OF_RATE = {0.8: 0.2, 0.9: 0.3}
BETA_SUM = 16.0  # alpha + beta of DUAL's Beta distribution; beta itself is at most 15
NUM_ANCHORS = 10  # highest-scored samples that place it
EDGE = 1e-6  # the Beta density is looked up this far inside (0, 1), and its beta is no smaller


def num_kept(num_samples: int, pruning_rate: float) -> int:
    """Return M = N - round(p N), the number of samples kept at pruning rate p in [0, 1)."""
    if not 0.0 <= pruning_rate < 1.0:
        raise InputError(
            f"pruning_rate={pruning_rate} must lie in [0, 1): it is the fraction that is removed"
        )
    kept = num_samples - round(pruning_rate * num_samples)
    if kept < 1:
        raise InputError(
            f"pruning_rate={pruning_rate} keeps none of {num_samples} samples; lower it"
        )
    return kept


def top(score_N: np.ndarray, num: int, seed: int = 0, hard_cutoff_rate: float = 0.0) -> np.ndarray:
    """Take the `num` samples of highest score, after the round(hard_cutoff_rate N) highest of all
    were dropped as too hard (double-end pruning of ELFS, Zheng et al., ICLR 2025, arXiv
    2406.04273); sorted int64 [num].

    Raises:
        InputError: `hard_cutoff_rate` outside [0, 1) or so large that fewer than `num` are left.
    """
    first = _num_hardest(len(score_N), num, hard_cutoff_rate) if hard_cutoff_rate else 0
    return np.sort(descending(score_N, seed)[first : first + num]).astype(np.int64)


def _num_hardest(num_samples: int, num: int, hard_cutoff_rate: float) -> int:
    if not 0.0 <= hard_cutoff_rate < 1.0:
        raise InputError(
            f"hard_cutoff_rate={hard_cutoff_rate} must lie in [0, 1): it is the fraction dropped as"
            " too hard"
        )
    num_hardest = round(hard_cutoff_rate * num_samples)
    if num > num_samples - num_hardest:
        largest = 10_000 * (num_samples - num) // num_samples / 10_000
        raise InputError(
            f"hard_cutoff_rate={hard_cutoff_rate} leaves {num_samples - num_hardest} of"
            f" {num_samples} samples, fewer than the {num} to keep; use at most {largest:g} or"
            " prune more"
        )
    return num_hardest


def descending(score_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the indices from the highest score to the lowest, equal scores in a seeded order;
    [N]."""
    tie_N = np.random.default_rng([seed, 0]).permutation(len(score_N))
    by_tie_N = np.empty_like(tie_N)
    by_tie_N[tie_N] = np.arange(len(tie_N))
    # lexsort((tie_N, -score_N)) in half the time
    return by_tie_N[np.argsort(-score_N[by_tie_N], kind="stable")]


def centre(score_N: np.ndarray, num: int, seed: int = 0) -> np.ndarray:
    """Take the `num` samples in the middle of the ranking; sorted int64 [num].

    Moderate coreset (ICLR 2023): as many are dropped at the low end as at the high end, one more
    there if odd.
    """
    low = (len(score_N) - num) // 2
    return np.sort(descending(-score_N, seed)[low : low + num]).astype(np.int64)


def per_class(
    pick: Callable[[np.ndarray, int], np.ndarray],
    label_N: np.ndarray,
    num: int,
    recall_C: np.ndarray | None = None,
) -> np.ndarray:
    """Apply any selector to each class by itself, in proportion to class sizes, or with the quotas
    of `drop_shares` where `recall_C` is given; sorted int64 [num].

    `pick(member_m, quota)` gets the global indices of one class, ascending, and returns which
    `quota` of them to keep, as positions in `member_m`. Class quotas are rounded by largest
    remainder so that they add up to exactly `num`; a class with quota 0 is not asked.

    Raises:
        InputError: samples without a label.
    """
    classes, size = np.unique(label_N, return_counts=True)
    if classes[0] < 0:
        raise InputError(
            "class-balanced selection needs labels, and these scores have none; "
            "score again with --beton FILE to take labels from the dataset"
        )
    exact = num * size / len(label_N)
    if recall_C is not None:
        exact = drop_shares(size, recall_C[classes], num)
    quota = np.floor(exact).astype(np.int64)
    largest_remainder = np.argsort(-(exact - quota), kind="stable")
    quota[largest_remainder[: num - quota.sum()]] += 1
    members = np.split(np.argsort(label_N, kind="stable"), np.cumsum(size)[:-1])
    kept = [
        member_m[pick(member_m, int(class_quota))]
        for member_m, class_quota in zip(members, quota, strict=True)
        if class_quota
    ]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def drop_shares(size_C: np.ndarray, recall_C: np.ndarray, num: int) -> np.ndarray:
    """Divide `num` draws among classes by DRoP (Vysogorets et al., ICLR 2025, arXiv 2404.05579): in
    proportion to class size times 1 - recall, no class more than it has; float64 [C], in all `num`.

    What a full class cannot take goes to the others by the same rule, and once none of them has an
    error, by size. A class without recall (NaN) counts as the mean of the others.
    """
    recall_C = np.where(np.isnan(recall_C), np.nanmean(recall_C), recall_C)
    share_C = np.zeros(len(size_C))
    is_open_C = np.ones(len(size_C), dtype=bool)
    while (left := num - share_C[~is_open_C].sum()) > 0:
        weight_C = np.where(is_open_C, size_C * (1.0 - recall_C), 0.0)
        if not weight_C.any():
            weight_C = np.where(is_open_C, size_C, 0.0)
        share_C[is_open_C] = (left * weight_C / weight_C.sum())[is_open_C]
        is_full_C = is_open_C & (share_C >= size_C)
        if not is_full_C.any():
            break
        share_C[is_full_C] = size_C[is_full_C]
        is_open_C &= ~is_full_C
    return share_C


# ---- CCS: coverage-centric coreset selection


def default_hard_cutoff(pruning_rate: float) -> float:
    """Return the fraction of hardest samples that `ccs` drops first unless told otherwise: 0.3 from
    pruning rate 0.9 on, 0.2 from 0.8 on, 0 below."""
    reached = [rate for rate in HARD_CUTOFF_OF_RATE if rate <= pruning_rate + 1e-9]
    return HARD_CUTOFF_OF_RATE[max(reached)] if reached else 0.0


def stratum_budgets(count_S: np.ndarray, num: int) -> np.ndarray:
    """Share `num` draws out over strata of `count_S` samples, int64 [S]; fewer in all if there are
    not so many samples.

    From the smallest stratum up, each gets an equal share of what is still to be given, or all it
    has; ties by position.
    """
    budget_S = np.zeros(len(count_S), dtype=np.int64)
    remaining = num
    for place, stratum in enumerate(np.argsort(count_S, kind="stable")):
        budget_S[stratum] = min(int(count_S[stratum]), remaining // (len(count_S) - place))
        remaining -= int(budget_S[stratum])
    return budget_S


def ccs(
    score_N: np.ndarray,
    num: int,
    *,
    num_strata: int = 50,
    hard_cutoff_rate: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Draw evenly over the range of scores, as CCS does (Zheng et al., ICLR 2023, arXiv
    2210.15809); sorted int64 [num].

    The round(hard_cutoff_rate N) samples of highest score (higher = harder here) are dropped. The
    range of the others is cut into `num_strata` strata of equal width, each gets its budget
    (`stratum_budgets`), drawn uniformly inside it.

    Raises:
        InputError: `num_strata` below 1, `hard_cutoff_rate` outside [0, 1) or so large that fewer
        than `num` are left.
    """
    num_samples = len(score_N)
    if num_strata < 1:
        raise InputError(f"num_strata={num_strata} must be at least 1; CCS uses 50")
    num_hardest = _num_hardest(num_samples, num, hard_cutoff_rate)
    rest_m = np.setdiff1d(np.arange(num_samples), top(score_N, num_hardest, seed))
    stratum_m = _strata(score_N[rest_m], num_strata)
    return rest_m[from_strata(stratum_m, num, seed)]


def from_strata(stratum_N: np.ndarray, num: int, seed: int = 0) -> np.ndarray:
    """Draw `num` of N samples uniformly inside strata (int64 [N], from 0) with `stratum_budgets`;
    sorted int64 [num].

    Over clusters of loss trajectories it is the sampler of S2L (Yang et al., NeurIPS 2024, arXiv
    2403.07384).
    """
    budget_S = stratum_budgets(np.bincount(stratum_N), num)
    generator = np.random.default_rng([seed, 1])
    kept = [
        generator.choice(np.flatnonzero(stratum_N == stratum), budget, replace=False)
        for stratum, budget in enumerate(budget_S)
        if budget
    ]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def _strata(score_N: np.ndarray, num_strata: int) -> np.ndarray:
    """Return the stratum of each score, of `num_strata` of equal width between the lowest and the
    highest; int64 [N].

    A stratum holds its lower end; the last holds the highest score too. Equal scores are all in
    stratum 0.
    """
    low, high = float(score_N.min()), float(score_N.max())
    if high == low:
        return np.zeros(len(score_N), dtype=np.int64)
    position_N = (score_N.astype(np.float64) - low) * num_strata / (high - low)
    return np.minimum(np.floor(position_N).astype(np.int64), num_strata - 1)


# ---- DUAL: a draw weighted by a Beta distribution that moves with the pruning rate


def beta_parameters(
    p_mean_N: np.ndarray, score_N: np.ndarray, pruning_rate: float, c_d: float
) -> tuple[float, float]:
    """Return (alpha, beta) of DUAL's Beta distribution (ICML 2025, arXiv 2502.06905, section on
    ratio-adaptive sampling).

    beta = 15 (1 - anchor) (1 - r^c_d), alpha = 16 - beta, with r the pruning rate and anchor the
    mean of `p_mean_N` over the 10 samples of highest score: the more is pruned, the closer to 1
    (easy samples) lies the peak. As in the code for CIFAR; beta is kept above 0, which the density
    needs.

    Raises:
        InputError: `pruning_rate` outside [0, 1), `c_d` not above 0.
    """
    if not 0.0 <= pruning_rate < 1.0:
        raise InputError(
            f"pruning_rate={pruning_rate} must lie in [0, 1): it is the fraction that is removed"
        )
    if not 0.0 < c_d < math.inf:
        raise InputError(f"c_d={c_d} must be positive; 4 is what DUAL's authors use on CIFAR-100")
    anchor = float(p_mean_N[top(score_N, NUM_ANCHORS)].astype(np.float64).mean())
    beta = max((BETA_SUM - 1.0) * (1.0 - anchor) * (1.0 - pruning_rate**c_d), EDGE)
    return BETA_SUM - beta, beta


def beta_sample(
    score_N: np.ndarray,
    p_mean_N: np.ndarray,
    num: int,
    pruning_rate: float,
    *,
    c_d: float = 4.0,
    seed: int = 0,
) -> np.ndarray:
    """Draw without replacement as DUAL does, weighted by the Beta density of `p_mean_N` times
    score; sorted int64 [num].

    `p_mean_N` float32 [N] in [0, 1] (`baselines.mean_probability`); Beta as in `beta_parameters`.
    Taking the highest of log weight + Gumbel noise is the same as drawing one after the other;
    samples of weight 0 come last, in a seeded order.

    Raises:
        InputError: negative scores, or what `beta_parameters` raises.
    """
    if not (lowest := score_N.min()) >= 0:
        raise InputError(
            f"score {lowest:g} is below 0, and a Beta draw weighs by the score; use one that never"
            " is, such as dual"
        )
    alpha, beta = beta_parameters(p_mean_N, score_N, pruning_rate, c_d)
    log_score_N = np.full(len(score_N), -np.inf)
    np.log(score_N, out=log_score_N, where=score_N > 0, dtype=np.float64)
    noise_N = np.random.default_rng([seed, 2]).gumbel(size=len(score_N))
    return top(log_beta_density(p_mean_N, alpha, beta) + log_score_N + noise_N, num, seed)


def log_beta_density(p_N: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Return the log of the density of Beta(alpha, beta) at `p_N`, which is moved off 0 and 1;
    float64 [N]."""
    p_N = p_N.astype(np.float64).clip(EDGE, 1.0 - EDGE)
    log_normaliser = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    return (alpha - 1.0) * np.log(p_N) + (beta - 1.0) * np.log1p(-p_N) - log_normaliser


def empty_classes(index_M: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Return the classes of the dataset of which the coreset keeps nothing."""
    present = np.unique(label_N)
    return np.setdiff1d(present[present >= 0], np.unique(label_N[index_M]))


def min_max(score_N: np.ndarray) -> np.ndarray:
    """Scale scores to [0, 1] over all N, the importance of the authors' code; all 1 when every
    score is equal."""
    low, high = float(score_N.min()), float(score_N.max())
    if high == low:
        return np.ones_like(score_N, dtype=np.float32)
    return ((score_N.astype(np.float64) - low) / (high - low)).astype(np.float32)
