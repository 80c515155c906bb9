"""Slow, literal transcriptions of the formulas, for the tests to compare with.

Plain Python over one sample at a time, `math` only, float64 throughout: nothing here is fast,
clever or shared with the package. Epochs count from 0, and `delta[t]` is the loss difference
between epochs t and t + 1.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, permutations

EPSILON = 1e-8  # in both logarithms of the authors' code
# the package floors log-probabilities here; without it two certain epochs would give 0 * log(0 / 0)
FLOOR = -1e4

Row = Sequence[float]  # one sample, one epoch: C logits


# ---- one sample, one epoch


def log_softmax(logits: Row) -> list[float]:
    """log p_c, floored at FLOOR. The floor changes no probability: exp(-1e4) is 0 in float64."""
    largest = max(logits)
    log_total = math.log(sum(math.exp(logit - largest) for logit in logits))
    return [max(logit - largest - log_total, FLOOR) for logit in logits]


def softmax(logits: Row) -> list[float]:
    return [math.exp(logp) for logp in log_softmax(logits)]


def entropy(logits: Row) -> float:
    """H(p) = -sum_c p_c log p_c."""
    return -sum(math.exp(logp) * logp for logp in log_softmax(logits))


def el2n(logits: Row, label: int) -> float:
    """|| p - onehot(y) ||_2."""
    return math.sqrt(sum((p - (c == label)) ** 2 for c, p in enumerate(softmax(logits))))


def margin(values: Row, label: int) -> float:
    """The label's value minus the largest of the other classes: of logits for AUM, of probabilities
    for its variant."""
    return values[label] - max(value for c, value in enumerate(values) if c != label)


def correct(logits: Row, label: int) -> float:
    """1 where the first of the largest logits is the label's."""
    return float(list(logits).index(max(logits)) == label)


# ---- one sample, two adjacent epochs


def loss_difference_official(previous: Row, now: Row) -> float:
    """sum_c | p'_c (log(p'_c + 1e-8) - log(p_c + 1e-8)) |: the absolute value is taken per
    class."""
    return sum(
        abs(p_now * (math.log(p_now + EPSILON) - math.log(p_previous + EPSILON)))
        for p_previous, p_now in zip(softmax(previous), softmax(now), strict=True)
    )


def loss_difference_paper(previous: Row, now: Row) -> float:
    """sum_c p'_c log(p'_c / p_c), Eq. 10, with floored logarithms: a class may have had probability
    0."""
    return sum(
        math.exp(logp_now) * (logp_now - logp_previous)
        for logp_previous, logp_now in zip(log_softmax(previous), log_softmax(now), strict=True)
    )


def loss_difference_ce(previous: Row, now: Row, label: int) -> float:
    """log(p'_y / p_y), section 5.4, with floored logarithms for the same reason."""
    return log_softmax(now)[label] - log_softmax(previous)[label]


# ---- one sample, a whole trajectory


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def squared_deviations(values: Sequence[float]) -> float:
    average = mean(values)
    return sum((value - average) ** 2 for value in values)


def windows(values: Sequence[float], length: int, num_windows: int) -> list[Sequence[float]]:
    """Adjacent windows: values 0..length-1, then 1..length, and so on."""
    return [values[first : first + length] for first in range(num_windows)]


def score_official(delta: Sequence[float], T: int, K: int, beta: float) -> float:
    """sum_k beta (1-beta)^(T-K-k) R_k, the closed form of the authors' code; beta = 0 stands for
    the plain mean.

    R_k, k = 0..T-K, is the root of Eq. 11: window k holds the snapshots k..k+K-1, between which lie
    K-1 differences.
    """
    variability = [
        math.sqrt(squared_deviations(window)) for window in windows(delta, K - 1, T - K + 1)
    ]
    if beta == 0:
        return mean(variability)
    # beta = 1: 0.0 ** 0 is 1
    return sum(beta * (1.0 - beta) ** (T - K - k) * R for k, R in enumerate(variability))


def score_paper(delta: Sequence[float], T: int, K: int, beta: float) -> float:
    """R <- beta R_t + (1-beta) R from R = 0, Eq. 12, over T-K windows of K differences; beta = 0
    stands for the plain mean."""
    variability = [squared_deviations(window) for window in windows(delta, K, T - K)]  # Eq. 11
    if beta == 0:
        return mean(variability)
    average = 0.0
    for R in variability:
        average = beta * R + (1.0 - beta) * average
    return average


def score(delta: Sequence[float], T: int, K: int, beta: float, preset: str) -> float:
    return (score_official if preset == "official" else score_paper)(delta, T, K, beta)


def tdds(logits: Sequence[Row], T: int, K: int, beta: float, preset: str) -> float:
    """TDDS of one sample from its logits by epoch, [>= T][C]."""
    difference = loss_difference_official if preset == "official" else loss_difference_paper
    return score(
        [difference(previous, now) for previous, now in pairwise(logits[:T])], T, K, beta, preset
    )


# ---- baselines: one sample, one value per epoch


def forgetting(correct: Sequence[float], never_learned: str) -> float:
    """Epochs that get wrong what the one before got right; T where no epoch is right and such
    samples rank first."""
    if 1 not in correct and never_learned == "inf":
        return float(len(correct))
    return float(sum(before == 1 and now == 0 for before, now in pairwise(correct)))


def el2n_early(norms: Sequence[float], num_epochs: int) -> float:
    """EL2N averaged over the first epochs."""
    return mean(norms[:num_epochs])


def aum(margins: Sequence[float], keep: str) -> float:
    """Area under the margin; negated where low margins are kept."""
    return -mean(margins) if keep == "hardest" else mean(margins)


def unbiased_std(values: Sequence[float]) -> float:
    return math.sqrt(squared_deviations(values) / (len(values) - 1))


def dyn_unc(p_label: Sequence[float], window: int) -> float:
    """Mean over windows of the unbiased std of the label's probability."""
    return mean(
        [unbiased_std(inside) for inside in windows(p_label, window, len(p_label) - window + 1)]
    )


def dual(p_label: Sequence[float], window: int) -> float:
    """Mean over windows of std * (1 - mean)."""
    return mean(
        [
            unbiased_std(inside) * (1.0 - mean(inside))
            for inside in windows(p_label, window, len(p_label) - window + 1)
        ]
    )


def csl(p_label: Sequence[float]) -> float:
    """Cumulative sample loss, each at most that of 2^-24."""
    return sum(-math.log(max(p, 2.0**-24)) for p in p_label)


def variability(p_label: Sequence[float]) -> float:
    return math.sqrt(squared_deviations(p_label) / len(p_label))


def learning_time(correct: Sequence[float]) -> int:
    """The first epoch from which all are right; their number where none is."""
    return next(t for t in range(len(correct) + 1) if all(correct[t:]))


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation, 0 where either does not vary."""
    length = math.sqrt(squared_deviations(a) * squared_deviations(b))
    if length < 1e-12:
        return 0.0
    of_a, of_b = mean(a), mean(b)
    return sum((x - of_a) * (y - of_b) for x, y in zip(a, b, strict=True)) / length


def cld(p_label: Sequence[float], val_loss: Sequence[float]) -> float:
    """Correlation of changes of a sample's loss and of its class's validation loss."""
    losses = [-math.log(max(p, 2.0**-24)) for p in p_label]
    changes = ([now - before for before, now in pairwise(values)] for values in (losses, val_loss))
    return pearson(*changes)


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number, half-way between the two in the middle."""
    ranked = sorted(values)
    middle = len(ranked) // 2
    return ranked[middle] if len(ranked) % 2 == 1 else (ranked[middle - 1] + ranked[middle]) / 2


def moderate(features: Sequence[Row], labels: Sequence[int], sample: int) -> float:
    """Distance of one sample to the median of its class, which is taken dimension by dimension."""
    of_class = [row for row, label in zip(features, labels, strict=True) if label == labels[sample]]
    return math.sqrt(
        sum(
            (value - median([row[d] for row in of_class])) ** 2
            for d, value in enumerate(features[sample])
        )
    )


# ---- pruning


def num_kept(num_samples: int, pruning_rate: float) -> int:
    """M = N - round(p N)."""
    return num_samples - round(pruning_rate * num_samples)


def centre(scores: Sequence[float], num: int) -> list[float]:
    """The scores that are left after dropping the highest and the lowest in turn."""
    left = sorted(scores)
    drop_highest = True
    while len(left) > num:
        left.pop(-1 if drop_highest else 0)
        drop_highest = not drop_highest
    return left


def centre_published(scores: Sequence[float], kept_share: float) -> list[float]:
    """Moderate's rule by shares: round(N (0.5 - r/2)) are dropped at either end."""
    dropped = round(len(scores) * (0.5 - kept_share / 2))
    return sorted(scores)[dropped : len(scores) - dropped]


def drop_shares(sizes: Sequence[int], recalls: Sequence[float], num: int) -> list[Fraction]:
    """DRoP's Algorithm 1 in exact arithmetic: an excess is spread over the classes that are not
    full, by size times error; by size where no open class has an error."""
    shares, full = [Fraction(0)] * len(sizes), set()
    excess = Fraction(num)
    while excess > 0:
        open_classes = [c for c in range(len(sizes)) if c not in full]
        weights = {c: sizes[c] * (1 - Fraction(recalls[c])) for c in open_classes}
        if not any(weights.values()):
            weights = {c: Fraction(sizes[c]) for c in open_classes}
        total, spread = sum(weights.values()), excess
        excess = Fraction(0)
        for c in open_classes:
            shares[c] += spread * weights[c] / total
            if shares[c] >= sizes[c]:
                excess += shares[c] - sizes[c]
                shares[c] = Fraction(sizes[c])
                full.add(c)
    return shares


def stratum(score: float, low: float, high: float, num_strata: int) -> int:
    """The stratum of equal width between low and high that holds a score, in exact arithmetic; the
    last includes high."""
    if low == high:
        return 0
    width = (Fraction(high) - Fraction(low)) / num_strata
    return min((Fraction(score) - Fraction(low)) // width, num_strata - 1)


def stratum_counts(scores: Sequence[float], low: float, high: float, num_strata: int) -> list[int]:
    """How many of the scores lie in each stratum between low and high."""
    found = [stratum(score, low, high, num_strata) for score in scores]
    return [found.count(s) for s in range(num_strata)]


def stratum_budgets(counts: Sequence[int], num: int) -> list[int]:
    """CCS: from the smallest stratum up, an equal share of what remains, or all there is."""
    budgets = [0] * len(counts)
    by_size = sorted(range(len(counts)), key=lambda s: counts[s])
    for position, s in enumerate(by_size):
        budgets[s] = min(counts[s], (num - sum(budgets)) // (len(counts) - position))
    return budgets


def beta_parameters(
    p_mean: Sequence[float], scores: Sequence[float], pruning_rate: float, c_d: float
) -> tuple[float, float]:
    """DUAL: the Beta distribution whose place follows the ten highest scores (all different) and
    the pruning rate."""
    ranked = sorted(range(len(scores)), key=lambda n: scores[n])
    anchor = mean([p_mean[n] for n in ranked[-10:]])
    beta = 15 * (1 - anchor) * (1 - pruning_rate**c_d)
    return 16 - beta, beta


def beta_density(p: float, alpha: float, beta: float) -> float:
    """p^(alpha-1) (1-p)^(beta-1) / B(alpha, beta)."""
    return (
        p ** (alpha - 1)
        * (1 - p) ** (beta - 1)
        * math.gamma(alpha + beta)
        / (math.gamma(alpha) * math.gamma(beta))
    )


def inclusion_probabilities(weights: Sequence[float], num: int) -> list[float]:
    """How likely each is among `num` drawn one after the other, each time in proportion to the
    weights still there."""
    included = [0.0] * len(weights)
    for order in permutations(range(len(weights)), num):
        probability, remaining = 1.0, sum(weights)
        for drawn in order:
            probability *= weights[drawn] / remaining
            remaining -= weights[drawn]
        for drawn in order:
            included[drawn] += probability
    return included


# ---- pruning inside a training


def infobatch(p_label: Sequence[float], rate: float) -> tuple[list[int], int, float]:
    """The samples of loss below the mean, how many of them stay, and the weight of those."""
    losses = [-math.log(p) for p in p_label]
    average = mean(losses)
    light = [] if len(set(losses)) == 1 else [i for i, loss in enumerate(losses) if loss < average]
    stay = max(1, len(light) - round(rate * len(light)))
    return light, stay, len(light) / stay


def hard_first(p_label: Sequence[float], threshold: float, least: int) -> list[int]:
    """Those below the threshold, or the `least` lowest (of different probabilities)."""
    below = [i for i, p in enumerate(p_label) if p < threshold]
    if len(below) >= min(least, len(p_label)):
        return below
    return sorted(sorted(range(len(p_label)), key=lambda i: p_label[i])[:least])


def largest_losses(p_label: Sequence[float], among: Sequence[int], num: int) -> list[int]:
    """The `num` of largest loss among some samples (of different probabilities)."""
    return sorted(sorted(among, key=lambda i: p_label[i])[:num])
