"""Scores that TDDS is compared with. Pure NumPy; by global index, float32, higher = keep.

Sums over epochs are loops of elementwise operations, in float64: a sample scores bitwise the same
alone and in a shard of any size (see `tdds`), and a trajectory never exists in float64 as a whole.
"""

# T epochs, N samples (any number of columns), n some of them, M rows with features, m rows of one
# class, D features

from collections.abc import Callable, Iterator

import numpy as np

from tdds_dist.errors import InputError

NEVER_LEARNED = ("inf", "0")
AUM_KEEP = ("hardest", "easiest")
_SMALLEST = 2.0**-24  # probability in a loss
_NO_CHANGE = 1e-12  # of losses, by rounding alone
_COLUMNS = 2**14  # samples looked at together in every window, so that they stay in the cache


def random(num_samples: int, seed: int) -> np.ndarray:
    """Return a seeded permutation of 0..N-1 as scores, float32 [N]: every top-M of it is a uniform
    draw, nested over M."""
    return np.random.default_rng([seed, num_samples]).permutation(num_samples).astype(np.float32)


def forgetting(correct_TN: np.ndarray, never_learned: str = "inf") -> np.ndarray:
    """Count forgetting events (Toneva et al., ICLR 2019, arXiv 1812.05159): epochs that get wrong
    what the one before got right.

    `correct_TN` float32 [T, N], 1 or 0; returns float32 [N]. Samples that no epoch gets right have
    no event to count: `inf` ranks them above all others, as data-diet does, with the finite score T
    (a count never exceeds T / 2); `0` leaves them at 0, as CCS does.

    Raises:
        InputError: fewer than 2 epochs, unknown `never_learned`.
    """
    num_epochs = len(correct_TN)
    if never_learned not in NEVER_LEARNED:
        raise InputError(
            f"never_learned={never_learned!r} is unknown; use one of {', '.join(NEVER_LEARNED)}"
        )
    if num_epochs < 2:
        raise InputError(
            f"forgetting needs at least 2 epochs to compare, and there are {num_epochs}; train"
            " longer"
        )
    count_N = np.zeros(correct_TN.shape[1], dtype=np.float32)  # counts are exact
    learned_N = correct_TN[0] > 0
    for t in range(1, num_epochs):
        count_N += correct_TN[t - 1] > correct_TN[t]
        learned_N |= correct_TN[t] > 0
    if never_learned == "inf":
        count_N[~learned_N] = num_epochs
    return count_N


def el2n(el2n_TN: np.ndarray, num_epochs: int = 10) -> np.ndarray:
    """Compute EL2N (Paul et al., NeurIPS 2021, arXiv 2107.07075): mean of || p - onehot(y) ||_2
    over the first epochs.

    `el2n_TN` float32 [>= num_epochs, N], the norm by epoch; returns float32 [N].

    Raises:
        InputError: fewer epochs than `num_epochs`, or `num_epochs` below 1.
    """
    if not 1 <= num_epochs <= len(el2n_TN):
        raise InputError(
            f"num_epochs={num_epochs} must lie in [1, {len(el2n_TN)}], the epochs there are for"
            " EL2N; lower it or train longer"
        )
    return _mean_over_epochs(el2n_TN[:num_epochs]).astype(np.float32)


def aum(margin_TN: np.ndarray, keep: str = "hardest") -> np.ndarray:
    """Compute the area under the margin (Pleiss et al., NeurIPS 2020, arXiv 2001.10528): mean over
    epochs of the margin.

    `margin_TN` float32 [T, N], the label's value minus the largest other; returns float32 [N]. A
    low margin is hard: `hardest` negates the mean, so that the lowest margins are kept, and
    `easiest` does not.

    Raises:
        InputError: no epoch, unknown `keep`.
    """
    if keep not in AUM_KEEP:
        raise InputError(f"keep={keep!r} is unknown; use one of {', '.join(AUM_KEEP)}")
    mean_N = _mean_over_epochs(margin_TN)
    return (mean_N if keep == "easiest" else -mean_N).astype(np.float32)


def dyn_unc(p_label_TN: np.ndarray, window: int = 10) -> np.ndarray:
    """Compute Dyn-Unc (He et al., CVPR 2024 Workshops, arXiv 2306.05175): mean over windows of the
    unbiased std of the label's probability.

    `p_label_TN` float32 [T, N]; `window` is J, in epochs, and T - J + 1 windows are averaged (the
    code of its authors leaves out the last); returns float32 [N].

    Raises:
        InputError: `window` below 2 or above T.
    """
    return _mean_over_windows(p_label_TN, window, lambda mean_n, std_n: std_n)


def dual(p_label_TN: np.ndarray, window: int = 10) -> np.ndarray:
    """Compute DUAL (Cho et al., ICML 2025, arXiv 2502.06905): mean over windows of std (1 - mean)
    of the label's probability.

    Uncertainty times difficulty; the std is unbiased. Shapes, `window` and errors as in `dyn_unc`.
    """
    return _mean_over_windows(p_label_TN, window, lambda mean_n, std_n: std_n * (1.0 - mean_n))


def mean_probability(p_label_TN: np.ndarray) -> np.ndarray:
    """Average the label's probability over epochs, in [0, 1], float32 [N]: what DUAL's Beta
    sampling looks at."""
    return _mean_over_epochs(p_label_TN).astype(np.float32)


def csl(p_label_TN: np.ndarray) -> np.ndarray:
    """Compute the cumulative sample loss (Ravikumar et al., ICML 2025): the sum over epochs of -log
    p of the label, float32 [N]; high where a sample is memorized, or its label wrong.

    A loss counts at most 16.6 nats: 2^-24 is the smallest probability that a recording in float16
    holds.
    """
    return sum(map(loss, p_label_TN), np.zeros(p_label_TN.shape[1])).astype(np.float32)


def loss(p_label_N: np.ndarray) -> np.ndarray:
    """Return -log p of the label, at most 16.6, float64 of the same shape."""
    return -np.log(np.maximum(p_label_N.astype(np.float64), _SMALLEST))


def confidence(p_label_TN: np.ndarray) -> np.ndarray:
    """Compute minus the confidence of dataset cartography (Swayamdipta et al., EMNLP 2020, arXiv
    2009.10795), the mean over epochs of p of the label, float32 [N]: hard samples rank first."""
    return (-_mean_over_epochs(p_label_TN)).astype(np.float32)


def variability(p_label_TN: np.ndarray) -> np.ndarray:
    """Compute the variability of dataset cartography: the standard deviation over epochs (divided
    by T) of p of the label, float32 [N]. Ambiguous samples rank first."""
    mean_N = _mean_over_epochs(p_label_TN)
    squares_N = np.zeros_like(mean_N)
    for p_N in p_label_TN:
        squares_N += np.square(p_N - mean_N)
    return np.sqrt(squares_N / len(p_label_TN)).astype(np.float32)


def correctness(correct_TN: np.ndarray) -> np.ndarray:
    """Compute minus the correctness of dataset cartography, the number of epochs that get a sample
    right, float32 [N]: those that few get right rank first."""
    return (-correct_TN.sum(axis=0, dtype=np.float64)).astype(np.float32)


def learning_time(correct_TN: np.ndarray) -> np.ndarray:
    """Return the first epoch from which a sample is right in every epoch, counted from 0, float32
    [N]; T where the last one gets it wrong: what is learned late, or never, ranks first.

    First-split learning time of Maini et al. (NeurIPS 2022, arXiv 2210.15031).
    """
    time_N = np.zeros(correct_TN.shape[1], dtype=np.float32)
    for t, correct_N in enumerate(correct_TN):
        time_N[correct_N == 0] = t + 1
    return time_N


def cld(p_label_EN: np.ndarray, label_N: np.ndarray, val_loss_EC: np.ndarray) -> np.ndarray:
    """Compute CLD (Nagaraj et al., TMLR 2025): Pearson's correlation over epochs of the change of a
    sample's loss with the change of the mean validation loss of its class, float32 [N].

    `p_label_EN` float32 [E, N] and `val_loss_EC` [E, C] are of the same E epochs, `label_N` int64.
    0 where either never changes, or the validation file has no sample of the class (NaN).

    Raises:
        InputError: fewer than 3 epochs, or samples without a label.
    """
    if len(p_label_EN) < 3:
        raise InputError(
            f"cld correlates changes between epochs, and of {len(p_label_EN)} epochs with"
            " validation there are too few; 3 are the least, so train longer or lower"
            " train.eval_every"
        )
    if (label_N < 0).any():
        raise InputError(
            f"cld compares samples with their class, and {int((label_N < 0).sum())} of"
            f" {len(label_N)} samples have no label; take labels from the dataset"
        )
    change_DC = np.diff(val_loss_EC.astype(np.float64), axis=0)
    change_DC -= change_DC.mean(axis=0)
    num_changes, num_samples = len(change_DC), p_label_EN.shape[1]
    # the changes of a sample add up to last minus first
    mean_N = (loss(p_label_EN[-1]) - loss(p_label_EN[0])) / num_changes
    product_N, square_N = np.zeros(num_samples), np.zeros(num_samples)
    before_N = loss(p_label_EN[0])
    for p_N, change_C in zip(p_label_EN[1:], change_DC, strict=True):
        now_N = loss(p_N)
        own_N = now_N - before_N - mean_N
        product_N += own_N * change_C[label_N]
        square_N += own_N**2
        before_N = now_N
    length_C = np.zeros(change_DC.shape[1])
    for change_C in change_DC:
        length_C += change_C**2
    length_N = np.sqrt(square_N * length_C[label_N])
    moves_N = length_N > _NO_CHANGE
    return np.divide(product_N, length_N, out=np.zeros(num_samples), where=moves_N).astype(
        np.float32
    )


def moderate(feature_MD: np.ndarray, label_M: np.ndarray) -> np.ndarray:
    """Compute the Moderate score (Xia et al., ICLR 2023): Euclidean distance to the median of the
    class, dimension by dimension.

    `feature_MD` [M, D], `label_M` int64 [M]: rows in any order, of complete classes, as the median
    is taken over the rows given. Returns the distance of each row, float32 [M]; the samples to keep
    are those in the centre of its ranking (`centre` in `coreset.samplers`).

    Raises:
        InputError: rows without a label.
    """
    if (label_M < 0).any():
        raise InputError(
            f"moderate measures the distance to a class, and {int((label_M < 0).sum())} of"
            f" {len(label_M)} samples have no label; take labels from the dataset"
        )
    distance_M = np.empty(len(label_M), dtype=np.float32)
    by_class_M = np.argsort(label_M, kind="stable")
    _, size = np.unique(label_M, return_counts=True)
    for member_m in np.split(by_class_M, np.cumsum(size)[:-1]):
        if len(member_m):
            feature_mD = feature_MD[member_m].astype(np.float64)
            feature_mD -= np.median(feature_mD, axis=0)
            distance_M[member_m] = np.sqrt(np.square(feature_mD).sum(axis=1))
    return distance_M


def _mean_over_epochs(value_TN: np.ndarray) -> np.ndarray:
    """Average over all rows, float64 [N]."""
    if len(value_TN) == 0:
        raise InputError("a mean over epochs needs at least 1 epoch, and there are 0; train longer")
    total_N = value_TN[0].astype(np.float64)
    for value_N in value_TN[1:]:
        total_N += value_N
    return total_N / len(value_TN)


def _mean_over_windows(
    value_TN: np.ndarray, window: int, of_window: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Average over windows a function of their (mean, unbiased std), float32 [N]."""
    total_N = np.zeros(value_TN.shape[1])
    for first in range(0, len(total_N), _COLUMNS):
        part = slice(first, first + _COLUMNS)
        for mean_n, std_n in _windows(value_TN[:, part], window):
            total_N[part] += of_window(mean_n, std_n)
    return (total_N / (len(value_TN) - window + 1)).astype(np.float32)


def _windows(value_TN: np.ndarray, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (mean, unbiased std) of each run of `window` epochs, float64 [N] each.

    Deviations are taken from the window's own mean: running sums of squares would cancel where a
    probability hardly moves.
    """
    if not 2 <= window <= len(value_TN):
        raise InputError(
            f"window={window} must lie in [2, {len(value_TN)}], the epochs there are; lower it or"
            " train longer"
        )
    for first in range(len(value_TN) - window + 1):
        mean_N = _mean_over_epochs(value_TN[first : first + window])
        squares_N = np.zeros_like(mean_N)
        for value_N in value_TN[first : first + window]:
            squares_N += np.square(value_N - mean_N)
        yield mean_N, np.sqrt(squares_N / (window - 1))
