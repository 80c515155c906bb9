"""From scores to a coreset, and the numbers of a training schedule."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdds_dist.coreset.samplers import (
    beta_parameters,
    beta_sample,
    ccs,
    centre,
    default_hard_cutoff,
    drop_shares,
    empty_classes,
    from_strata,
    log_beta_density,
    min_max,
    num_kept,
    per_class,
    stratum_budgets,
    top,
)
from tdds_dist.errors import InputError
from tdds_dist.scoring import baselines
from tdds_dist.training.schedule import batch_size_factor, learning_rate, retrain_epochs
from tests import oracles

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
TIED_SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30)
ANY_SCORES = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=30)
SELECTORS = {  # each as pick(score_N, num, seed)
    "top": top,
    "centre": centre,
    "ccs": lambda score_N, num, seed: ccs(score_N, num, num_strata=7, seed=seed),
    "beta": lambda score_N, num, seed: beta_sample(
        score_N, score_N / (1 + score_N), num, 0.5, seed=seed
    ),
    "s2l": lambda score_N, num, seed: from_strata(score_N.astype(np.int64) % 7, num, seed),
}


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 8)), min_size=1, max_size=6), st.data()
)
def test_classes_of_low_recall_get_more(classes, data):
    """Sizes, and recalls in eighths; also all that there is."""
    sizes, recalls = [size for size, _ in classes], [eighths / 8 for _, eighths in classes]
    num = data.draw(st.integers(1, sum(sizes)))
    found_C = drop_shares(np.array(sizes), np.array(recalls), num)
    np.testing.assert_allclose(
        found_C, [float(share) for share in oracles.drop_shares(sizes, recalls, num)], atol=1e-9
    )
    label_N = np.repeat(np.arange(len(sizes)), sizes)
    kept = per_class(lambda member_m, quota: np.arange(quota), label_N, num, np.array(recalls))
    kept_C = np.bincount(label_N[kept], minlength=len(sizes))
    assert kept_C.sum() == num
    assert (np.abs(kept_C - found_C) < 1 + 1e-9).all()


def test_a_class_without_recall_counts_as_the_mean_of_the_others():
    unknown, known = (
        drop_shares(np.array([30, 30, 30]), np.array([0.9, 0.5, recall]), 30)
        for recall in (np.nan, 0.7)
    )
    np.testing.assert_allclose(unknown, known)


# ---- how many


@PROPERTY
@given(st.integers(1, 2_000_000), st.integers(0, 99))
def test_num_kept_is_what_rounding_leaves(num_samples, percent):
    rate, want = percent / 100, oracles.num_kept(num_samples, percent / 100)
    if want < 1:  # see below
        return
    kept = num_kept(num_samples, rate)
    assert isinstance(kept, int)
    assert kept == want
    assert abs(kept - num_samples * Fraction(100 - percent, 100)) <= Fraction(1, 2)


# ---- which


@PROPERTY
@given(TIED_SCORES, st.data())
def test_top_keeps_the_highest(scores, data):
    num, seed = data.draw(st.integers(1, len(scores))), data.draw(st.integers(0, 5))
    score_N = np.array(scores, dtype=np.float32)
    kept = top(score_N, num, seed)
    assert sorted(score_N[kept]) == sorted(scores)[-num:]
    assert set(top(score_N, num - 1, seed).tolist()) <= set(kept.tolist()), (
        "coresets of one score are nested"
    )


LABELS = st.lists(st.integers(1, 40), min_size=1, max_size=8)  # class sizes, often 1


def test_empty_classes():
    label_N = np.array([4, 4, 0, 7, 2, -1])
    assert empty_classes(np.array([0, 2]), label_N).tolist() == [2, 7]
    assert empty_classes(np.arange(6), label_N).tolist() == []
    assert empty_classes(np.array([5]), label_N).tolist() == [0, 2, 4, 7], (
        "an unknown label is no class"
    )


# ---- any selector


@pytest.mark.parametrize("selector", SELECTORS)
@PROPERTY
@given(st.one_of(TIED_SCORES, ANY_SCORES), st.data())
def test_selectors_keep_exactly_as_many(selector, scores, data):
    num, seed = data.draw(st.integers(1, len(scores))), data.draw(st.integers(0, 5))
    score_N = np.array(scores, dtype=np.float32)
    kept = SELECTORS[selector](score_N, num, seed)
    assert kept.dtype == np.int64
    assert kept.tolist() == sorted(set(kept.tolist()) & set(range(len(scores))))
    assert len(kept) == num
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
        assert member_m.tolist() == np.flatnonzero(label_N == label).tolist(), (
            "whole classes, in order"
        )
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


# ---- centre


@PROPERTY
@given(st.one_of(TIED_SCORES, ANY_SCORES), st.data())
def test_centre_drops_both_ends(scores, data):
    num = data.draw(st.integers(1, len(scores)))
    score_N = np.array(scores, dtype=np.float32)
    assert sorted(score_N[centre(score_N, num)].tolist()) == oracles.centre(scores, num)


@pytest.mark.parametrize(
    ("num_samples", "num"), [(10, 4), (100, 30), (101, 51), (200, 150), (8, 8)]
)
def test_centre_is_the_published_rule(num_samples, num):
    """By shares it is exact where as many are dropped at either end."""
    score_N = np.random.default_rng(1).random(num_samples).astype(np.float32)
    want = oracles.centre_published(score_N.tolist(), num / num_samples)
    assert len(want) == num
    assert sorted(score_N[centre(score_N, num)].tolist()) == want


# ---- CCS


@PROPERTY
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.data())
def test_stratum_budgets(counts, data):
    num = data.draw(st.integers(0, sum(counts)))
    budget_S = stratum_budgets(np.array(counts), num)
    assert budget_S.dtype == np.int64
    assert budget_S.tolist() == oracles.stratum_budgets(counts, num)
    assert budget_S.sum() == num, "nothing is left unassigned"
    assert (budget_S <= counts).all()
    assert stratum_budgets(np.array([1, 5, 20, 3]), 16).tolist() == [1, 5, 7, 3], (
        "by hand: shares 16/4, 15/3, 12/2, then 7"
    )


@PROPERTY
@given(
    st.one_of(TIED_SCORES, ANY_SCORES),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.1, 0.3, 0.6]),
    st.data(),
)
def test_ccs_draws_each_budget_from_its_stratum(scores, num_strata, cutoff, data):
    score_N = np.array(scores, dtype=np.float32)
    rest = sorted(scores)[: len(scores) - round(cutoff * len(scores))]
    if not rest:
        return
    num = data.draw(st.integers(1, len(rest)))
    kept = score_N[ccs(score_N, num, num_strata=num_strata, hard_cutoff_rate=cutoff)].tolist()
    counts = oracles.stratum_counts(rest, rest[0], rest[-1], num_strata)
    assert oracles.stratum_counts(kept, rest[0], rest[-1], num_strata) == oracles.stratum_budgets(
        counts, num
    )


def test_ccs_options_change_the_draw():
    score_N = np.random.default_rng(0).gamma(1.0, size=2000).astype(np.float32)
    draws = [
        ccs(score_N, 400, **options).tobytes()
        for options in (
            {},
            {"seed": 1},
            {"num_strata": 5},
            {"hard_cutoff_rate": 0.1},
            {"num_strata": 50, "hard_cutoff_rate": 0.0, "seed": 0},
        )
    ]
    assert draws[0] == draws[4], "the defaults"
    assert len(set(draws)) == 4


@pytest.mark.parametrize("cutoff", [0.001, 0.2, 0.25, 0.5])
def test_cutoff_drops_exactly_the_hardest(cutoff):
    score_N = np.random.default_rng(0).permutation(1000).astype(np.float32)
    num_rest = 1000 - round(1000 * cutoff)
    for sampler in (ccs, top):
        kept = sampler(score_N, num_rest, hard_cutoff_rate=cutoff)
        assert sorted(score_N[kept].tolist()) == list(range(num_rest))
    kept = top(score_N, 100, hard_cutoff_rate=cutoff)
    assert sorted(score_N[kept].tolist()) == list(range(num_rest - 100, num_rest))


def test_ccs_is_uniform_inside_a_stratum():
    """Six samples in one stratum, also those of equal score, two of them kept: each in a third of
    the draws."""
    score_N = np.array([0, 1, 2, 2, 3, 3], dtype=np.float32)
    draws = [ccs(score_N, 2, num_strata=1, seed=seed) for seed in range(3000)]
    # 4.6 standard deviations
    assert np.bincount(np.concatenate(draws)) / 3000 == pytest.approx(1 / 3, abs=0.04)


@PROPERTY
@given(st.integers(1, 5000), st.integers(0, 99), st.data())
def test_cutoff_that_leaves_too_few_names_one_that_works(num_samples, percent, data):
    cutoff = percent / 100
    num = data.draw(st.integers(1, num_samples))
    score_N = np.arange(num_samples, dtype=np.float32)
    if num <= num_samples - round(cutoff * num_samples):
        assert len(ccs(score_N, num, hard_cutoff_rate=cutoff)) == num
        return
    with pytest.raises(
        InputError, match=rf"hard_cutoff_rate={cutoff} leaves .* of {num_samples} .* {num} to keep"
    ) as error:
        ccs(score_N, num, hard_cutoff_rate=cutoff)
    largest = float(str(error.value).partition("at most ")[2].split()[0])
    assert len(ccs(score_N, num, hard_cutoff_rate=largest)) == num
    assert num_samples * (largest + 1e-4) > num_samples - num, "it is the largest, to four digits"


def test_default_cutoff_and_batch_size_follow_the_pruning_rate():
    """Steps at 0.8 and 0.9, also where a rate is off by a rounding error."""
    rule = {0.9: 0.25, 0.8: 0.5}  # in any order
    wanted = {
        0.0: (0, 1),
        0.7: (0, 1),
        0.799: (0, 1),
        0.8: (0.2, 0.5),
        0.1 + 0.7: (0.2, 0.5),
        0.85: (0.2, 0.5),
        0.9: (0.3, 0.25),
        1 - 0.1: (0.3, 0.25),
        0.99: (0.3, 0.25),
    }
    for rate, values in wanted.items():
        assert (default_hard_cutoff(rate), batch_size_factor(rate, rule)) == values, rate
    assert batch_size_factor(0.95, {}) == 1.0


# ---- DUAL's Beta sampling


@pytest.mark.parametrize(
    ("alpha", "beta"), [(15.0, 1.0), (8.0, 8.0), (15.9, 0.1), (1.0, 15.0), (11.3, 4.7)]
)
def test_density_of_the_beta_distribution(alpha, beta):
    p_N = np.linspace(0.01, 0.99, 99)
    want_N = [oracles.beta_density(p, alpha, beta) for p in p_N.tolist()]
    np.testing.assert_allclose(np.exp(log_beta_density(p_N, alpha, beta)), want_N, rtol=1e-9)
    ends = log_beta_density(np.array([0, 1e-6, 1 - 1e-6, 1], dtype=np.float64), alpha, beta)
    assert np.isfinite(ends).all()
    assert (ends[0], ends[2]) == (ends[1], ends[3])


@PROPERTY
@given(
    st.integers(1, 40),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.sampled_from([1.0, 4.0, 11.0]),
)
def test_beta_parameters(num_samples, seed, rate, c_d):
    rng = np.random.default_rng(seed)
    score_N = rng.permutation(num_samples).astype(np.float32)
    p_mean_N = rng.random(num_samples, dtype=np.float32)
    found = beta_parameters(p_mean_N, score_N, rate, c_d)
    assert found == pytest.approx(
        oracles.beta_parameters(p_mean_N.tolist(), score_N.tolist(), rate, c_d), rel=1e-6
    )
    alpha, beta = beta_parameters(np.ones(num_samples), score_N, rate, c_d)
    assert 0 < beta < 1e-5, "certain samples leave a distribution all the same"
    assert alpha + beta == 16


def test_weighted_draw_meets_its_probabilities():
    """Five samples, two drawn, 4000 times; tolerance 4 standard deviations."""
    score_N = np.array([1.0, 0.5, 2.0, 0.2, 0.7], dtype=np.float32)
    p_mean_N = np.array([0.3, 0.5, 0.4, 0.7, 0.6], dtype=np.float32)
    alpha, beta = oracles.beta_parameters(p_mean_N.tolist(), score_N.tolist(), 0.5, 2.0)
    weights = [
        oracles.beta_density(p, alpha, beta) * score
        for p, score in zip(p_mean_N.tolist(), score_N.tolist(), strict=True)
    ]
    want = oracles.inclusion_probabilities(weights, 2)
    draws = [beta_sample(score_N, p_mean_N, 2, 0.5, c_d=2.0, seed=seed) for seed in range(4000)]
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


# ---- what cannot be chosen


ONES, RAMP, NAN = np.ones(5, dtype=np.float32), np.arange(10.0, dtype=np.float32), float("nan")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *(
            (partial(num_kept, 100, rate), rf"pruning_rate={rate} must lie in \[0, 1\)")
            for rate in (-0.1, 1.0, 1.5, 30, NAN, float("inf"))
        ),
        (partial(num_kept, 4, 0.9), r"pruning_rate=0\.9 keeps none of 4 samples; lower it"),
        (
            partial(per_class, lambda member_m, quota: np.arange(quota), np.array([0, 1, -1]), 2),
            r"needs labels.*--beton",
        ),
        *(
            (partial(ccs, RAMP, 1, hard_cutoff_rate=rate), rf"hard_cutoff_rate={rate} must lie in")
            for rate in (-0.1, 1.0, NAN)
        ),
        *(
            (partial(ccs, RAMP, 1, num_strata=num), rf"num_strata={num} must be at least 1")
            for num in (0, -1)
        ),
        *(
            (
                partial(beta_sample, ONES, ONES / 2, 2, rate),
                rf"pruning_rate={rate} must lie in \[0, 1\)",
            )
            for rate in (1.0, -0.1)
        ),
        *(
            (partial(beta_sample, ONES, ONES / 2, 2, 0.5, c_d=c_d), rf"c_d={c_d} must be positive")
            for c_d in (0.0, -1.0, NAN)
        ),
        (
            partial(beta_sample, ONES - 1.5, ONES / 2, 1, 0.5),
            r"score -0\.5 is below 0.*such as dual",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


# ---- importance and the random score


def test_min_max():
    score_N = np.array([-3, 1, 5, 1], dtype=np.float32)
    scaled = min_max(score_N)
    assert scaled.dtype == np.float32
    assert scaled.tolist() == [0.0, 0.5, 1.0, 0.5]
    assert score_N.tolist() == [-3, 1, 5, 1]
    assert min_max(np.full(4, 7, dtype=np.float32)).tolist() == [1.0] * 4
    assert min_max(np.array([-3e38, 0, 3e38], dtype=np.float32)).tolist() == [0.0, 0.5, 1.0], (
        "the range exceeds float32"
    )


def test_random_is_a_seeded_permutation():
    draw = baselines.random(50, 3)
    assert draw.dtype == np.float32
    assert sorted(draw.tolist()) == list(range(50))
    assert baselines.random(50, 3).tolist() == draw.tolist()
    assert len({baselines.random(50, seed).tobytes() for seed in range(10)}) == 10


# ---- schedule


@pytest.mark.parametrize(
    ("total", "peak", "final"), [(1, 0.1, 0.0), (7, 0.1, 0.0), (300, 0.5, 0.01), (999, 1e-3, 0.0)]
)
def test_learning_rate_is_torchs_cosine(total, peak, final):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=final)
    for step in range(total):
        assert learning_rate(step, total, peak, final=final) == pytest.approx(
            cosine.get_last_lr()[0], abs=1e-9 * peak
        )
        optimizer.step()
        cosine.step()
    for step in (total, 5 * total):
        assert learning_rate(step, total, peak, final=final) == pytest.approx(final), (
            "past the end it stays"
        )
    assert learning_rate(3, 3, 0.1, warmup_steps=3) == pytest.approx(0.1)


@pytest.mark.parametrize(("total", "warmup"), [(100, 1), (100, 10), (100, 99), (1000, 50)])
def test_warm_up_meets_the_cosine(total, warmup):
    rates = [learning_rate(step, total, 0.4, warmup_steps=warmup) for step in range(total)]
    assert rates[:warmup] == pytest.approx([0.4 * step / warmup for step in range(1, warmup + 1)])
    cosine = [learning_rate(step, total - warmup, 0.4) for step in range(total - warmup)]
    assert rates[warmup:] == pytest.approx(cosine), (
        "it fits into what the warm-up left, without a jump"
    )
    assert cosine == sorted(cosine, reverse=True)


def test_strategy_epochs():
    assert [retrain_epochs(200, rate, "E") for rate in (0.0, 0.3, 0.9)] == [200, 200, 200]
    assert [retrain_epochs(200, rate, "P") for rate in (0.0, 0.3, 0.5, 0.7, 0.9)] == [
        200,
        286,
        400,
        667,
        2000,
    ]
    for rate in np.arange(0, 0.96, 0.05):
        assert abs(retrain_epochs(60, rate, "P") * (1 - rate) - 60) <= 0.5
    with pytest.raises(ValueError, match=r"'X' must be one of E, P"):
        retrain_epochs(200, 0.5, "X")
