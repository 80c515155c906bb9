"""The rule of each method against a literal loop, on random numbers and on those that break rules;
what a plan knows in advance."""

import numpy as np
import pytest

from tdds_dist.distributed.partition import epoch_order
from tdds_dist.pruning import rules
from tdds_dist.pruning.plan import METHODS, PruningPlan
from tests import oracles
from tests.ranks import catch

KEY = [5, 3]
RATES = (0.0, 0.3, 0.5, 0.999)


def probabilities(num, seed=0):
    """Of different samples different, some close to 1 and to 0."""
    p = np.random.default_rng(seed).beta(0.5, 0.3, num).astype(np.float32)
    return np.unique(np.clip(p, 1e-30, 1.0 - 1e-6))


CASES = [probabilities(num, num) for num in (1, 2, 7, 100, 3001)]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("p_label_N", CASES, ids=len)
def test_infobatch(p_label_N, rate):
    light, stay, weight = oracles.infobatch(p_label_N.tolist(), rate)
    kept_N, weight_N = rules.infobatch(p_label_N, rate, KEY)
    heavy = np.setdiff1d(np.arange(len(p_label_N)), light)
    assert kept_N[heavy].all()
    assert (weight_N[heavy] == 1.0).all()
    if len(light):
        chosen = np.flatnonzero(kept_N[light])
        assert len(chosen) == stay
        assert weight_N[np.array(light)[chosen]] == pytest.approx(weight)
        assert weight_N[kept_N].sum() == pytest.approx(len(p_label_N), rel=1e-5), "in the mean"
    if rate == 0.0:
        assert kept_N.all()
        assert (weight_N == 1.0).all()


def test_infobatch_drops_each_light_sample_as_often():
    p_label_N = np.array([0.01] * 3 + [0.9, 0.91, 0.92, 0.93] * 2, dtype=np.float32)
    drawn = sum(
        rules.infobatch(p_label_N, 0.5, [0, epoch])[0][3:].astype(int) for epoch in range(4000)
    )
    assert drawn / 4000 == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("num", [1, 3, 10, 1001])
def test_where_all_losses_are_equal_there_is_nothing_to_tell_them_apart_by(value, num):
    """None is below their mean, however that rounds; others draw."""
    p_label_N = np.full(num, value, dtype=np.float32)
    kept_N, weight_N = rules.infobatch(p_label_N, 0.999, KEY)
    assert kept_N.all()
    assert (weight_N == 1.0).all()
    assert rules.hard_first(p_label_N, 0.3, 1, KEY)[0].sum() == (num if value < 0.3 else 1)
    assert rules.progressive(p_label_N, 0.999, 0.5, KEY)[0].sum() == max(
        1, num - round(0.999 * num)
    )
    counts = sum(
        rules.progressive(np.full(10, value, np.float32), 0.7, 1.0, [1, e])[0].astype(int)
        for e in range(2000)
    )
    assert counts / 2000 == pytest.approx(0.3, abs=0.05), "ties are drawn"


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.9, 1.1])
@pytest.mark.parametrize("least", [1, 48])
@pytest.mark.parametrize("p_label_N", CASES, ids=len)
def test_hard_first(p_label_N, threshold, least):
    """Also where fewer are left than a batch, or than there are samples."""
    kept_N, weight_N = rules.hard_first(p_label_N, threshold, least, KEY)
    expected = oracles.hard_first(p_label_N.tolist(), threshold, least)
    assert np.flatnonzero(kept_N).tolist() == expected
    assert (weight_N == 1.0).all()
    assert kept_N.all() or threshold < 1.0


@pytest.mark.parametrize(("rate", "drawn"), [(0.0, 1.0), (0.3, 0.75), (0.5, 0.5), (0.999, 0.1)])
@pytest.mark.parametrize("p_label_N", CASES, ids=len)
def test_progressive(p_label_N, rate, drawn):
    num_samples = len(p_label_N)
    num = max(1, num_samples - round(rate * num_samples))
    among = np.random.default_rng([*KEY, rules._CHOICE]).choice(
        num_samples, max(num, round(drawn * num_samples)), replace=False
    )
    kept_N, weight_N = rules.progressive(p_label_N, rate, drawn, KEY)
    expected = oracles.largest_losses(p_label_N.tolist(), among.tolist(), num)
    assert np.flatnonzero(kept_N).tolist() == expected
    assert (weight_N == 1.0).all()


def test_what_is_explored_and_the_twin():
    kept_N = np.arange(100) < 40
    weight_N = np.linspace(0.5, 2.0, 100, dtype=np.float32)
    more_N = rules.explored(kept_N, 15, KEY)
    assert more_N.sum() == 55
    assert more_N[:40].all()
    assert rules.explored(kept_N, 0, KEY).tolist() == kept_N.tolist()
    twin_N, twin_weight_N = rules.twin(kept_N, weight_N, KEY)
    assert twin_N.sum() == 40
    assert np.sort(twin_weight_N[twin_N]).tolist() == np.sort(weight_N[kept_N]).tolist()
    often = sum(rules.twin(kept_N, weight_N, [0, epoch])[0].astype(int) for epoch in range(3000))
    assert often / 3000 == pytest.approx(0.4, abs=0.05), "whatever the method thinks of it"


def test_draws_depend_on_seed_and_epoch_alone():
    p_label_N = CASES[-1]
    found = {
        key: rules.infobatch(p_label_N, 0.5, [*key])[0].tobytes()
        for key in ((0, 1), (0, 2), (1, 1), (1, 0))
    }
    assert len(set(found.values())) == 4
    order = epoch_order(2000, 10, seed=5, epoch=3).of_rank(0, 1)[0].reshape(-1)
    place = rules.twin(np.ones(2000, bool), np.arange(2000, dtype=np.float32), KEY)[1]
    assert (order == place).sum() < 10, "the order of an epoch is another draw"
    assert rules.infobatch(p_label_N, 0.5, [0, 1])[0].tobytes() == found[0, 1]


# ---- plans


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "none"}, [100] * 8),
        ({"method": "static", "rate": 0.3, "start": 3}, [100] * 3 + [70] * 5),
        ({"method": "static", "rate": 0.999, "start": 7}, [100] * 7 + [1]),
        (
            {"method": "refresh", "rate": 0.5, "start": 2, "full_last": 1},
            [100] * 2 + [50] * 5 + [100],
        ),
        ({"method": "infobatch", "rate": 0.5}, [100] + [None] * 6 + [100]),
        ({"method": "hard_first"}, [100] + [None] * 6 + [100]),
        ({"method": "progressive", "rate": 0.4}, [100] + [60] * 7),
    ],
)
def test_the_images_of_each_epoch(settings, expected):
    plan = PruningPlan(num_samples=100, epochs=8, **settings)
    assert [plan.num_images(epoch) for epoch in range(8)] == expected
    assert plan.total_images == (None if None in expected else sum(expected))
    most = [100 if num is None else num for num in expected]
    assert [plan.most_images(epoch) for epoch in range(8)] == most


def test_when_a_plan_decides_anew():
    def epochs(method, **more):
        plan = PruningPlan(method, 100, 9, rate=0.3, start=2, **more)
        return [e for e in range(9) if not plan.is_full(e) and plan.is_decided_anew(e)]

    assert epochs("static") == [2]
    assert epochs("refresh", every=3) == [2, 5, 8]
    assert epochs("progressive") == [2, 3, 4, 5, 6, 7, 8]
    # of 200 epochs the authors' code prunes the first 175
    assert PruningPlan("infobatch", 100, 200, rate=0.5).num_full_last == 25


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "all"}, "method='all' must be one of none, static"),
        ({"method": "infobatch", "rate": 1.0}, "rate=1.0 must lie in [0, 1)"),
        ({"method": "progressive", "rate": 0.1, "drawn": 0.5}, "drawn=0.5 must be at least"),
        ({"method": "static", "rate": 0.1, "start": 9}, "start=9 leaves no epoch to prune"),
        ({"method": "static", "rate": 0.1, "start": 0}, "lower start (to 1 at least)"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    kind, text = catch(PruningPlan, num_samples=100, epochs=8, **settings)
    assert kind == "InputError"
    assert words in text


def test_the_weights_of_which_method_reach_the_loss():
    """InfoBatch's always, each by its sample: they keep the mean gradient as it was."""
    found = {
        method: PruningPlan(method, 100, 8, rate=0.5, importance="batch").loss_weights
        for method in METHODS
    }
    assert found == {
        "none": "none",
        "static": "batch",
        "refresh": "batch",
        "infobatch": "sample",
        "hard_first": "none",
        "progressive": "none",
    }
