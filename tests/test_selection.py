"""From scores to a coreset, and the numbers of a training schedule."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdds_dist import baselines
from tdds_dist.errors import InputError
from tdds_dist.schedule import batch_size_factor, learning_rate, retrain_epochs
from tdds_dist.selection import (
    beta_parameters,
    beta_sample,
    ccs,
    centre,
    default_hard_cutoff,
    empty_classes,
    log_beta_density,
    min_max,
    num_kept,
    per_class,
    stratum_budgets,
    top,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
TIED_SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30)
ANY_SCORES = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=30)
SELECTORS = {  # each as pick(score_N, num, seed)
    "top": top,
    "centre": centre,
    "ccs": lambda score_N, num, seed: ccs(score_N, num, num_strata=7, seed=seed),
    "beta": lambda score_N, num, seed: beta_sample(score_N, score_N / (1 + score_N), num, 0.5, seed=seed),
}


def top_per_class(score_N, label_N, num, seed=0):
    return per_class(lambda member_m, quota: top(score_N[member_m], quota, seed), label_N, num)


# ---- how many


@PROPERTY
@given(st.integers(1, 2_000_000), st.integers(0, 99))
def test_num_kept_is_what_rounding_leaves(num_samples, percent):
    rate = percent / 100
    exact = num_samples * Fraction(100 - percent, 100)
    if oracles.num_kept(num_samples, rate) < 1:
        with pytest.raises(InputError, match=f"pruning_rate={rate} keeps none of {num_samples}"):
            num_kept(num_samples, rate)
        return
    kept = num_kept(num_samples, rate)
    assert isinstance(kept, int)
    assert kept == oracles.num_kept(num_samples, rate)
    assert abs(kept - exact) <= Fraction(1, 2)


@pytest.mark.parametrize(("num_samples", "rate", "kept"), [
    (50_000, 0.3, 35_000), (50_000, 0.9, 5_000), (1_281_167, 0.7, 384_350), (1_281_167, 0.25, 960_875),
    (1_281_167, 0.0, 1_281_167), (3, 0.5, 1), (5, 0.5, 3), (1, 0.49, 1),
])
def test_num_kept_of_known_sizes(num_samples, rate, kept):
    assert num_kept(num_samples, rate) == kept


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, 30, float("nan"), float("inf")])
def test_pruning_rate_is_a_fraction(rate):
    with pytest.raises(InputError, match=rf"pruning_rate={rate} must lie in \[0, 1\)"):
        num_kept(100, rate)


def test_pruning_rate_that_keeps_nothing():
    with pytest.raises(InputError, match=r"pruning_rate=0\.9 keeps none of 4 samples; lower it"):
        num_kept(4, 0.9)


# ---- which


@PROPERTY
@given(TIED_SCORES, st.data())
def test_top_keeps_the_highest(scores, data):
    num, seed = data.draw(st.integers(1, len(scores))), data.draw(st.integers(0, 5))
    score_N = np.array(scores, dtype=np.float32)
    kept = top(score_N, num, seed)
    assert kept.dtype == np.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == num
    assert sorted(score_N[kept]) == sorted(scores)[-num:]
    assert top(score_N, num, seed).tolist() == kept.tolist()
    assert set(top(score_N, num - 1, seed).tolist()) <= set(kept.tolist()), "coresets of one score are nested"


def test_ties_are_drawn_by_the_seed():
    score_N = np.zeros(1000, dtype=np.float32)
    draws = [top(score_N, 300, seed) for seed in range(20)]
    assert len({draw.tobytes() for draw in draws}) == 20
    kept_of = np.bincount(np.concatenate(draws), minlength=1000)
    assert abs(kept_of[:500].sum() - 3000) < 300, "no place in the dataset is favoured"


def test_ties_are_drawn_only_among_equals():
    score_N = np.array([5, 1, 1, 1, 1, 0], dtype=np.float32)
    draws = {tuple(top(score_N, 3, seed).tolist()) for seed in range(50)}
    assert all(draw[0] == 0 and 5 not in draw for draw in draws)
    assert len(draws) == 6  # 2 of 4


LABELS = st.lists(st.integers(1, 40), min_size=1, max_size=8)  # class sizes, often 1


@PROPERTY
@given(LABELS, st.data())
def test_class_quotas(class_sizes, data):
    """Add up to exactly num, never above a class's size, and within one sample of the proportional share."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    label_N = rng.permutation(np.repeat(np.arange(len(class_sizes)) * 3, class_sizes))  # class numbers with gaps
    score_N = rng.integers(0, 5, len(label_N)).astype(np.float32)
    num = data.draw(st.integers(1, len(label_N)))
    kept = top_per_class(score_N, label_N, num, seed=1)
    assert kept.dtype == np.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == num
    for position, size in enumerate(class_sizes):
        of_class = label_N == 3 * position
        mine = kept[of_class[kept]]
        share = Fraction(num * size, len(label_N))
        assert math.floor(share) <= len(mine) <= math.ceil(share)
        assert len(mine) <= size
        if 0 < len(mine) < size:
            dropped = np.setdiff1d(np.flatnonzero(of_class), mine)
            assert score_N[mine].min() >= score_N[dropped].max(), "the best of each class stay"


def test_class_quotas_by_hand():
    """Sizes 6, 3, 1 and num 5 give shares 3, 1.5 and 0.5: one sample is left for the first largest remainder."""
    label_N = np.array([0] * 6 + [1] * 3 + [2])
    score_N = np.array([0, 1, 2, 3, 4, 5, 9, 8, 7, 6], dtype=np.float32)
    assert top_per_class(score_N, label_N, 5).tolist() == [3, 4, 5, 6, 7]
    assert top(score_N, 5).tolist() == [5, 6, 7, 8, 9]


def test_class_balance_with_one_sample_classes():
    label_N = np.arange(20)
    score_N = np.arange(20, dtype=np.float32)
    assert len(top_per_class(score_N, label_N, 7)) == 7
    assert top_per_class(score_N, label_N, 20).tolist() == list(range(20))


@pytest.mark.parametrize("unknown", [1, 10])
def test_class_balance_needs_all_labels(unknown):
    label_N = np.arange(10) % 3
    label_N[:unknown] = -1
    with pytest.raises(InputError, match=r"needs labels.*--beton"):
        top_per_class(np.zeros(10, dtype=np.float32), label_N, 5)


def test_empty_classes():
    label_N = np.array([4, 4, 0, 7, 2, -1])
    assert empty_classes(np.array([0, 2]), label_N).tolist() == [2, 7]
    assert empty_classes(np.arange(6), label_N).tolist() == []
    assert empty_classes(np.array([5]), label_N).tolist() == [0, 2, 4, 7], "an unknown label is no class"


# ---- any selector


@pytest.mark.parametrize("selector", SELECTORS)
@PROPERTY
@given(st.one_of(TIED_SCORES, ANY_SCORES), st.data())
def test_selectors_keep_exactly_as_many(selector, scores, data):
    num, seed = data.draw(st.integers(1, len(scores))), data.draw(st.integers(0, 5))
    score_N = np.array(scores, dtype=np.float32)
    kept = SELECTORS[selector](score_N, num, seed)
    assert kept.dtype == np.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == num
    assert kept[0] >= 0
    assert kept[-1] < len(scores)
    assert SELECTORS[selector](score_N, num, seed).tolist() == kept.tolist()
    assert score_N.tolist() == scores


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors_draw_by_the_seed(selector):
    """All scores equal, so that nothing but the draw decides."""
    draws = [SELECTORS[selector](np.ones(1000, dtype=np.float32), 300, seed) for seed in range(20)]
    assert len({draw.tobytes() for draw in draws}) == 20
    kept_of = np.bincount(np.concatenate(draws), minlength=1000)
    assert abs(kept_of[:500].sum() - 3000) < 300, "no place in the dataset is favoured"


@pytest.mark.parametrize("selector", SELECTORS)
@PROPERTY
@given(LABELS, st.data())
def test_per_class_asks_each_class_for_its_quota(selector, class_sizes, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    label_N = rng.permutation(np.repeat(np.arange(len(class_sizes)) * 3, class_sizes))
    score_N = rng.integers(0, 5, len(label_N)).astype(np.float32)
    num = data.draw(st.integers(1, len(label_N)))
    wanted = []

    def pick(member_m, quota):
        positions = SELECTORS[selector](score_N[member_m], quota, 1)
        (label,) = set(label_N[member_m].tolist())
        assert member_m.tolist() == np.flatnonzero(label_N == label).tolist(), "whole classes, in order"
        assert quota > 0
        wanted.extend(member_m[positions].tolist())
        return positions

    kept = per_class(pick, label_N, num)
    assert kept.dtype == np.int64
    assert kept.tolist() == sorted(wanted) == sorted(set(wanted))
    assert len(kept) == num
    for position, size in enumerate(class_sizes):
        share = Fraction(num * size, len(label_N))
        assert math.floor(share) <= (label_N[kept] == 3 * position).sum() <= math.ceil(share)


def test_per_class_needs_all_labels():
    with pytest.raises(InputError, match=r"needs labels.*--beton"):
        per_class(lambda member_m, quota: np.arange(quota), np.array([0, 1, -1]), 2)


# ---- centre


@PROPERTY
@given(st.one_of(TIED_SCORES, ANY_SCORES), st.data())
def test_centre_drops_both_ends(scores, data):
    num = data.draw(st.integers(1, len(scores)))
    score_N = np.array(scores, dtype=np.float32)
    assert sorted(score_N[centre(score_N, num)].tolist()) == oracles.centre(scores, num)


@pytest.mark.parametrize(("num_samples", "num"), [(10, 4), (100, 30), (101, 51), (200, 150), (8, 8)])
def test_centre_is_the_published_rule(num_samples, num):
    """By shares it is exact where as many are dropped at either end."""
    score_N = np.random.default_rng(1).random(num_samples).astype(np.float32)
    want = oracles.centre_published(score_N.tolist(), num / num_samples)
    assert len(want) == num
    assert sorted(score_N[centre(score_N, num)].tolist()) == want


def test_centre_by_hand():
    score_N = np.array([5, 0, 3, 1, 4, 2], dtype=np.float32)
    assert centre(score_N, 2).tolist() == [2, 5]
    assert centre(score_N, 3).tolist() == [2, 3, 5], "the odd one is dropped at the high end"


# ---- CCS


def test_stratum_budgets_by_hand():
    """From the smallest up: 1 has 1 (its share is 16 // 4 = 4), 3 has 3 (15 // 3 = 5), 5 has 5 (12 // 2 = 6), 7 are left."""
    assert stratum_budgets(np.array([1, 5, 20, 3]), 16).tolist() == [1, 5, 7, 3]
    assert stratum_budgets(np.array([10, 10, 10]), 10).tolist() == [3, 3, 4]  # 10 // 3, 7 // 2, 4 // 1
    assert stratum_budgets(np.array([0, 9, 0, 2]), 2).tolist() == [0, 1, 0, 1]
    assert stratum_budgets(np.array([4, 4, 4]), 2).tolist() == [0, 1, 1]


@PROPERTY
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.data())
def test_stratum_budgets(counts, data):
    num = data.draw(st.integers(0, sum(counts)))
    budget_S = stratum_budgets(np.array(counts), num)
    assert budget_S.dtype == np.int64
    assert budget_S.tolist() == oracles.stratum_budgets(counts, num)
    assert budget_S.sum() == num, "nothing is left unassigned"
    assert (budget_S <= counts).all()


@PROPERTY
@given(st.one_of(TIED_SCORES, ANY_SCORES), st.integers(1, 8), st.sampled_from([0.0, 0.1, 0.3, 0.6]), st.data())
def test_ccs_draws_each_budget_from_its_stratum(scores, num_strata, cutoff, data):
    score_N = np.array(scores, dtype=np.float32)
    rest = sorted(scores)[: len(scores) - round(cutoff * len(scores))]
    if not rest:
        return
    num = data.draw(st.integers(1, len(rest)))
    kept = score_N[ccs(score_N, num, num_strata=num_strata, hard_cutoff_rate=cutoff)].tolist()
    counts = oracles.stratum_counts(rest, rest[0], rest[-1], num_strata)
    assert oracles.stratum_counts(kept, rest[0], rest[-1], num_strata) == oracles.stratum_budgets(counts, num)


def test_ccs_on_known_strata():
    """0..9 and 100 in 2 strata: all but the last are in the first. Without the hardest, 0..4 and 5..9."""
    score_N = np.array([*range(10), 100], dtype=np.float32)
    for seed in range(10):
        kept = ccs(score_N, 6, num_strata=2, seed=seed)
        assert len(kept) == 6
        assert kept[-1] == 10
        kept = ccs(score_N, 6, num_strata=2, hard_cutoff_rate=0.1, seed=seed)
        assert np.bincount(kept // 5).tolist() == [3, 3]
        kept = ccs(score_N, 5, num_strata=5, hard_cutoff_rate=0.1, seed=seed)
        assert np.bincount(kept // 2).tolist() == [1] * 5


def test_ccs_options_change_the_draw():
    score_N = np.random.default_rng(0).gamma(1.0, size=2000).astype(np.float32)
    draws = [ccs(score_N, 400), ccs(score_N, 400, seed=1), ccs(score_N, 400, num_strata=5),
             ccs(score_N, 400, hard_cutoff_rate=0.1)]
    assert len({draw.tobytes() for draw in draws}) == 4
    assert ccs(score_N, 400, num_strata=50, hard_cutoff_rate=0.0, seed=0).tolist() == draws[0].tolist()
    assert score_N[draws[2]].mean() < score_N[draws[0]].mean(), "fewer strata reach less far into the thin end"


@pytest.mark.parametrize("cutoff", [0.001, 0.2, 0.25, 0.5])
def test_cutoff_drops_exactly_the_hardest(cutoff):
    score_N = np.random.default_rng(0).permutation(1000).astype(np.float32)
    num_rest = 1000 - round(1000 * cutoff)
    kept = ccs(score_N, num_rest, hard_cutoff_rate=cutoff)
    assert sorted(score_N[kept].tolist()) == list(range(num_rest))


def test_ccs_is_uniform_inside_a_stratum():
    """Six samples in one stratum, also those of equal score, two of them kept: each in a third of the draws."""
    score_N = np.array([0, 1, 2, 2, 3, 3], dtype=np.float32)
    draws = [ccs(score_N, 2, num_strata=1, seed=seed) for seed in range(3000)]
    assert np.bincount(np.concatenate(draws)) / 3000 == pytest.approx(1 / 3, abs=0.04)  # 4.6 standard deviations


@PROPERTY
@given(st.integers(1, 5000), st.integers(0, 99), st.data())
def test_cutoff_that_leaves_too_few_names_one_that_works(num_samples, percent, data):
    cutoff = percent / 100
    num = data.draw(st.integers(1, num_samples))
    score_N = np.arange(num_samples, dtype=np.float32)
    if num <= num_samples - round(cutoff * num_samples):
        assert len(ccs(score_N, num, hard_cutoff_rate=cutoff)) == num
        return
    with pytest.raises(InputError, match=rf"hard_cutoff_rate={cutoff} leaves .* of {num_samples} .* {num} to keep") as error:
        ccs(score_N, num, hard_cutoff_rate=cutoff)
    largest = float(str(error.value).partition("at most ")[2].split()[0])
    assert len(ccs(score_N, num, hard_cutoff_rate=largest)) == num
    assert num_samples * (largest + 1e-4) > num_samples - num, "it is the largest, to four digits"


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_range_of_the_cutoff(rate):
    with pytest.raises(InputError, match=rf"hard_cutoff_rate={rate} must lie in \[0, 1\)"):
        ccs(np.arange(10.0), 1, hard_cutoff_rate=rate)


@pytest.mark.parametrize("num_strata", [0, -1])
def test_range_of_the_strata(num_strata):
    with pytest.raises(InputError, match=rf"num_strata={num_strata} must be at least 1"):
        ccs(np.arange(10.0), 1, num_strata=num_strata)


def test_default_cutoff_follows_the_pruning_rate():
    wanted = {0.0: 0, 0.7: 0, 0.799: 0, 0.8: 0.2, 0.1 + 0.7: 0.2, 0.85: 0.2, 0.9: 0.3, 1 - 0.1: 0.3, 0.99: 0.3}
    for rate, cutoff in wanted.items():
        assert default_hard_cutoff(rate) == cutoff, rate


# ---- DUAL's Beta sampling


@pytest.mark.parametrize(("alpha", "beta"), [(15.0, 1.0), (8.0, 8.0), (15.9, 0.1), (1.0, 15.0), (11.3, 4.7)])
def test_density_of_the_beta_distribution(alpha, beta):
    p_N = np.linspace(0.01, 0.99, 99)
    log_density_N = log_beta_density(p_N, alpha, beta)
    want = torch.distributions.Beta(torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64))
    np.testing.assert_allclose(log_density_N, want.log_prob(torch.from_numpy(p_N)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.exp(log_density_N), [oracles.beta_density(p, alpha, beta) for p in p_N.tolist()], rtol=1e-9)
    ends = log_beta_density(np.array([0, 1e-6, 1 - 1e-6, 1], dtype=np.float64), alpha, beta)
    assert np.isfinite(ends).all()
    assert ends[0] == ends[1]
    assert ends[2] == ends[3]


@PROPERTY
@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.sampled_from([1.0, 4.0, 11.0]))
def test_beta_parameters(num_samples, seed, rate, c_d):
    rng = np.random.default_rng(seed)
    score_N = rng.permutation(num_samples).astype(np.float32)
    p_mean_N = rng.random(num_samples, dtype=np.float32)
    found = beta_parameters(p_mean_N, score_N, rate, c_d)
    assert found == pytest.approx(oracles.beta_parameters(p_mean_N.tolist(), score_N.tolist(), rate, c_d), rel=1e-6)


def test_beta_parameters_by_hand():
    """The ten highest scores have p = 0.4, and 0.5^2 = 0.25: 15 * 0.6 * 0.75 = 6.75."""
    score_N = np.array([9] * 10 + [1] * 5, dtype=np.float32)
    p_mean_N = np.array([0.4] * 10 + [1.0] * 5)
    assert beta_parameters(p_mean_N, score_N, 0.5, 2.0) == pytest.approx((9.25, 6.75))
    alpha, beta = beta_parameters(np.ones(15), score_N, 0.5, 2.0)
    assert 0 < beta < 1e-5, "certain samples leave a distribution all the same"
    assert alpha + beta == 16


def test_weighted_draw_meets_its_probabilities():
    """Five samples, two drawn, 4000 times; tolerance 4 standard deviations."""
    score_N = np.array([1.0, 0.5, 2.0, 0.2, 0.7], dtype=np.float32)
    p_mean_N = np.array([0.3, 0.5, 0.4, 0.7, 0.6], dtype=np.float32)
    alpha, beta = oracles.beta_parameters(p_mean_N.tolist(), score_N.tolist(), 0.5, 4.0)
    weights = [oracles.beta_density(p, alpha, beta) * score
               for p, score in zip(p_mean_N.tolist(), score_N.tolist(), strict=True)]
    want = oracles.inclusion_probabilities(weights, 2)
    draws = [beta_sample(score_N, p_mean_N, 2, 0.5, seed=seed) for seed in range(4000)]
    frequency = np.bincount(np.concatenate(draws), minlength=5) / 4000
    np.testing.assert_allclose(frequency, want, atol=0.032)
    assert max(want) - min(want) > 0.3, "the weights differ enough to tell"


def test_samples_of_weight_zero_come_last():
    score_N = np.array([0] * 50 + [1, 1e-20], dtype=np.float32)
    p_mean_N = np.linspace(0, 1, 52, dtype=np.float32)
    assert beta_sample(score_N, p_mean_N, 2, 0.5).tolist() == [50, 51]
    draws = [beta_sample(score_N, p_mean_N, 10, 0.5, seed=seed) for seed in range(10)]
    assert all({50, 51} <= set(draw.tolist()) for draw in draws)
    assert len({draw.tobytes() for draw in draws}) == 10


def test_pruning_more_keeps_easier_samples():
    rng = np.random.default_rng(0)
    p_mean_N = rng.random(5000, dtype=np.float32)
    score_N = (p_mean_N * (1 - p_mean_N) + 0.01).astype(np.float32)
    kept_p = [p_mean_N[beta_sample(score_N, p_mean_N, 300, rate)].mean() for rate in (0.1, 0.5, 0.7, 0.9)]
    assert all(low < high for low, high in pairwise(kept_p))
    assert kept_p[-1] > kept_p[0] + 0.1
    later = p_mean_N[beta_sample(score_N, p_mean_N, 300, 0.9, c_d=11.0)].mean()
    assert later < kept_p[-1], "a larger c_d turns to easy samples only at larger rates"


def test_beta_sampling_weighs_by_scores_that_are_not_negative():
    with pytest.raises(InputError, match=r"score -0\.5 is below 0.*such as dual"):
        beta_sample(np.array([1, -0.5, 0], dtype=np.float32), np.zeros(3, dtype=np.float32), 1, 0.5)


@pytest.mark.parametrize(("rate", "c_d", "message"), [
    (1.0, 4.0, r"pruning_rate=1\.0 must lie in \[0, 1\)"), (-0.1, 4.0, r"pruning_rate=-0\.1"), (0.5, 0.0, r"c_d=0\.0 must be"),
    (0.5, -1.0, r"c_d=-1\.0 must be positive"), (0.5, float("nan"), "c_d=nan must be positive"),
])
def test_range_of_the_beta_parameters(rate, c_d, message):
    with pytest.raises(InputError, match=message):
        beta_sample(np.ones(5, dtype=np.float32), np.full(5, 0.5, dtype=np.float32), 2, rate, c_d=c_d)


# ---- importance and the random score


def test_min_max():
    score_N = np.array([-3, 1, 5, 1], dtype=np.float32)
    scaled = min_max(score_N)
    assert scaled.dtype == np.float32
    assert scaled.tolist() == [0.0, 0.5, 1.0, 0.5]
    assert score_N.tolist() == [-3, 1, 5, 1]
    assert min_max(np.full(4, 7, dtype=np.float32)).tolist() == [1.0] * 4
    huge = np.array([-3e38, 0, 3e38], dtype=np.float32)
    assert min_max(huge).tolist() == [0.0, 0.5, 1.0], "the range exceeds float32"


def test_random_is_a_seeded_permutation():
    draw = baselines.random(50, 3)
    assert draw.dtype == np.float32
    assert sorted(draw.tolist()) == list(range(50))
    assert baselines.random(50, 3).tolist() == draw.tolist()
    assert len({baselines.random(50, seed).tobytes() for seed in range(10)}) == 10


# ---- schedule


@pytest.mark.parametrize(("total", "peak", "final"), [(1, 0.1, 0.0), (7, 0.1, 0.0), (300, 0.5, 0.01), (999, 1e-3, 0.0)])
def test_learning_rate_is_torchs_cosine(total, peak, final):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=final)
    for step in range(total):
        assert learning_rate(step, total, peak, final=final) == pytest.approx(cosine.get_last_lr()[0], abs=1e-9 * peak)
        optimizer.step()
        cosine.step()
    assert learning_rate(total, total, peak, final=final) == pytest.approx(final)


@pytest.mark.parametrize(("total", "warmup"), [(100, 1), (100, 10), (100, 99), (1000, 50)])
def test_warm_up_meets_the_cosine(total, warmup):
    peak = 0.4
    rates = [learning_rate(step, total, peak, warmup_steps=warmup) for step in range(total)]
    assert rates[0] == pytest.approx(peak / warmup)
    assert rates[warmup - 1] == pytest.approx(peak)
    assert np.allclose(np.diff(rates[:warmup]), peak / warmup)
    after = rates[warmup:]
    assert after[0] == pytest.approx(peak), "no jump at the end of the warm-up"
    assert all(a >= b for a, b in pairwise(after))
    shorter = [learning_rate(step, total - warmup, peak) for step in range(total - warmup)]
    assert after == pytest.approx(shorter), "the cosine fits into what the warm-up left"


def test_learning_rate_past_the_end_stays():
    assert learning_rate(500, 100, 0.1, warmup_steps=5, final=0.001) == pytest.approx(0.001)
    assert learning_rate(3, 3, 0.1, warmup_steps=3) == pytest.approx(0.1)


def test_strategy_epochs():
    assert [retrain_epochs(200, rate, "E") for rate in (0.0, 0.3, 0.9)] == [200, 200, 200]
    assert [retrain_epochs(200, rate, "P") for rate in (0.0, 0.3, 0.5, 0.7, 0.9)] == [200, 286, 400, 667, 2000]
    for rate in np.arange(0, 0.96, 0.05):
        assert abs(retrain_epochs(60, rate, "P") * (1 - rate) - 60) <= 0.5
    with pytest.raises(ValueError, match=r"'X' must be one of E, P"):
        retrain_epochs(200, 0.5, "X")


def test_batch_size_factor():
    rule = {0.9: 0.25, 0.8: 0.5}  # in any order
    wanted = {0.0: 1, 0.7: 1, 0.799: 1, 0.8: 0.5, 0.1 + 0.7: 0.5, 0.85: 0.5, 0.9: 0.25, 1 - 0.1: 0.25, 0.99: 0.25}
    for rate, factor in wanted.items():
        assert batch_size_factor(rate, rule) == factor, rate
    assert batch_size_factor(0.95, {}) == 1.0
