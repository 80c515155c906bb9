"""Agreement of scores, and the make-up of their coresets, as numbers: for `compare` and the
report, which show them.

Owns ranks, the coresets at a few pruning rates, pairs within a run and between runs, shares of
classes and of noise, and short names. Of a score only its ranks and one bit per sample and pruning
rate stay in memory. Which samples a score keeps is decided by `select`.
"""

# N dataset, M kept samples, P pruning rates, B bytes of N bits

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tdds_dist.config.run import parse_config
from tdds_dist.config.scores import base_key, score_order
from tdds_dist.coreset.samplers import num_kept
from tdds_dist.coreset.select import choose, default_sampler, is_balanced
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Scores
from tdds_dist.scoring import quarantine

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Ranked:
    """The part of a score file that stays in memory."""

    rank_N: np.ndarray  # of `centred_ranks`
    kept_PB: np.ndarray  # uint8, the coreset of each pruning rate as N bits

    def kept(self, position: int) -> np.ndarray:
        """Mark the samples in the coreset of one pruning rate, bool [N]."""
        return np.unpackbits(self.kept_PB[position], count=len(self.rank_N)).astype(bool)

    def index(self, position: int) -> np.ndarray:
        """Return the coreset of one pruning rate, sorted int64 [M]."""
        return np.flatnonzero(self.kept(position))

    def overlap(self, other: "Ranked") -> list[float]:
        """Return the share of another score's coreset of the same size that both keep, by pruning
        rate."""
        sizes = np.bitwise_count(self.kept_PB).sum(axis=1, dtype=np.int64)
        return (
            np.bitwise_count(self.kept_PB & other.kept_PB).sum(axis=1, dtype=np.int64) / sizes
        ).tolist()

    def agreement(self, other: "Ranked") -> list[float]:
        """Return Spearman's rank correlation (nan for a constant score), then the overlap at each
        pruning rate; [1 + P]."""
        return [rank_correlation(self.rank_N, other.rank_N), *self.overlap(other)]


def rank(scores: Scores, rates: Sequence[float]) -> Ranked:
    """Sort once for all rates; `choose` decides where that is not enough: another sampler, or ties
    at the cut.

    Raises:
        InputError: a rate that is out of range or keeps nothing.
    """
    score_N, num_samples = scores.score_N, len(scores.score_N)
    order_N = np.argsort(score_N)
    takes_top = default_sampler(scores) == "top" and not is_balanced(scores)
    takes_top &= not quarantine.noted_in(scores.settings)
    kept = []
    for rate in rates:
        cut = num_samples - num_kept(num_samples, rate)
        clear = cut == 0 or score_N[order_N[cut - 1]] != score_N[order_N[cut]]
        kept_N = np.zeros(num_samples, dtype=bool)
        kept_N[order_N[cut:] if takes_top and clear else choose(scores, rate)] = True
        kept.append(np.packbits(kept_N))
    return Ranked(centred_ranks(score_N, order_N), np.stack(kept))


def in_order(found: Mapping[str, _T], config: dict[str, Any]) -> dict[str, _T]:
    """Return the scores of a run by name: the first TDDS window of the config that has been scored,
    then the others in the order of `score_order`."""
    try:
        parsed = parse_config(config)
        configured = [window.key(parsed.score.preset) for window in parsed.windows()]
    except InputError:  # the config of another version; its scores can still be compared
        configured = []
    main = [key for key in configured if key in found][:1]
    others = sorted(found, key=lambda key: (score_order(key), key))
    return {key: found[key] for key in dict.fromkeys([*main, *others])}


def within_run(ranked: Mapping[str, Ranked]) -> dict[tuple[str, str], list[float]]:
    """Return `agreement` of each pair of scores of one run, in the order of `ranked`."""
    return {(a, b): ranked[a].agreement(ranked[b]) for a, b in itertools.combinations(ranked, 2)}


def between_runs(
    runs: Sequence[Mapping[str, Ranked]],
) -> dict[str, dict[tuple[int, int], list[float]]]:
    """Return `agreement` of each pair of runs, named by their positions, for every score that two
    runs or more have."""
    found = {}
    for key in dict.fromkeys(key for ranked in runs for key in ranked):
        having = [position for position, ranked in enumerate(runs) if key in ranked]
        if len(having) > 1:
            found[key] = {
                (a, b): runs[a][key].agreement(runs[b][key])
                for a, b in itertools.combinations(having, 2)
            }
    return found


def over_pairs(reduce: Callable[..., Any], values: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean, smallest or largest of each column; nan (a constant score) where no pair has
    a number."""
    columns = (
        [value for value in column if value == value] for column in zip(*values, strict=True)
    )
    return [float(reduce(column)) if column else float("nan") for column in columns]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return a name to show for each key: without the settings that all variants of its score
    share.

    `tdds_official_T90_K10_beta0.9` and `tdds_official_T70_K10_beta0.9` -> `tdds_T90` and
    `tdds_T70`.
    """
    variants: dict[str, list[str]] = {}
    for key in dict.fromkeys(keys):
        variants.setdefault(base_key(key), []).append(key)
    short: dict[str, str] = {}
    for base, group in variants.items():
        settings = [key[len(base) :].split("_") for key in group]
        common = set(settings[0]).intersection(*settings)
        names = [
            base + "".join(f"_{part}" for part in parts if part not in common) for parts in settings
        ]
        short |= dict(zip(group, names if len(set(names)) == len(group) else group, strict=True))
    return short


# ---- ranks


def centred_ranks(score_N: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """Return twice the average rank minus twice the mean rank, int32 [N]: whole numbers, in sum 0.
    `order_N` sorts the scores.
    """
    sorted_N = score_N[order_N]
    # where each group of ties starts
    first = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
    end = np.append(first[1:], len(score_N))
    rank_N = np.empty(len(score_N), dtype=np.int32)
    rank_N[order_N] = np.repeat(first + end - len(score_N), end - first)
    return rank_N


def rank_correlation(rank_a_N: np.ndarray, rank_b_N: np.ndarray) -> float:
    """Return Pearson's correlation of two results of `centred_ranks`."""
    a_N, b_N = rank_a_N.astype(np.float64), rank_b_N.astype(np.float64)
    squares = float(a_N @ a_N) * float(b_N @ b_N)
    return float(a_N @ b_N) / squares**0.5 if squares else float("nan")


# ---- shares of a coreset


def keep_rates(index_M: np.ndarray, label_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the share of each class that is kept, float64 [C]; nan for a class without samples.
    Unknown labels (-1) do not count.

    Raises InputError for a label that is not below `num_classes`.
    """
    if len(label_N) and label_N.max() >= num_classes:
        raise InputError(
            f"label {label_N.max()} is outside [0, {num_classes}); score again with --beton FILE"
        )

    def sizes(label: np.ndarray) -> np.ndarray:
        return np.bincount(label[label >= 0], minlength=num_classes)

    total_C = sizes(label_N)
    return np.divide(
        sizes(label_N[index_M]), total_C, out=np.full(num_classes, np.nan), where=total_C > 0
    )


def noise_kept(index_M: np.ndarray, noisy_N: np.ndarray) -> tuple[float, float]:
    """Return the share of the noisy samples (bool [N]) that is kept, and the share of the coreset
    that is noisy; nan for a share of none."""
    kept, noisy = int(np.count_nonzero(noisy_N[index_M])), int(np.count_nonzero(noisy_N))
    return (kept / noisy if noisy else float("nan")), (
        kept / len(index_M) if len(index_M) else float("nan")
    )
