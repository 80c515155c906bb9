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
from tdds_dist.selection import empty_classes, min_max, num_kept, top, top_per_class

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
TIED_SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30)


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
