"""The scores that TDDS is compared with: values against the literal oracles."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdds_dist.config.scores import PRESETS, Window
from tdds_dist.scoring import baselines
from tdds_dist.scoring.tdds import score_trajectory
from tests import oracles
from tests.make import refused

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)

OF_PROBABILITIES = {
    "dyn_unc": lambda p_TN: baselines.dyn_unc(p_TN, 5),
    "dual": lambda p_TN: baselines.dual(p_TN, 5),
    "mean_probability": baselines.mean_probability,
    "csl": baselines.csl,
    "cld": lambda p_TN: baselines.cld(
        p_TN,
        np.zeros(p_TN.shape[1], dtype=np.int64),
        np.random.default_rng(1).random((len(p_TN), 1)),
    ),
    "variability": baselines.variability,
    "el2n": lambda p_TN: baselines.el2n(p_TN, 7),
    "aum": lambda p_TN: baselines.aum(p_TN - np.float32(0.5)),
    "forgetting": lambda p_TN: baselines.forgetting((p_TN > 0.6).astype(np.float32)),
    **{
        f"tdds {preset} {beta}": lambda p_TN, preset=preset, beta=beta: score_trajectory(
            p_TN, Window(12, 5, beta), preset
        )
        for preset in PRESETS
        for beta in (0.0, 0.5, 0.9, 1.0)
    },
}


@st.composite
def p_label_TN(draw, num_epochs: int):
    """Probabilities of up to 5 samples: anything, all but certain, equal in every epoch, 0 or 1."""
    shape = (num_epochs, draw(st.integers(1, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["uniform", "certain", "identical", "binary"]))
    p_TN = rng.random(shape)
    if kind == "certain":
        p_TN = 1.0 - 1e-5 * p_TN
    if kind == "identical":
        p_TN[:] = p_TN[0]
    if kind == "binary":
        p_TN = p_TN.round()
    return p_TN.astype(np.float32)


def check(found: np.ndarray, want: list[float], smallest: float = 1e-9) -> None:
    assert found.dtype == np.float32
    assert found.shape == (len(want),)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=smallest)


# ---- forgetting


@PROPERTY
@given(
    st.integers(2, 12),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_forgetting(num_epochs, num_samples, seed, accuracy):
    correct_TN = (np.random.default_rng(seed).random((num_epochs, num_samples)) < accuracy).astype(
        np.float32
    )
    for never_learned in baselines.NEVER_LEARNED:
        found = baselines.forgetting(correct_TN, never_learned)
        assert found.dtype == np.float32
        assert found.tolist() == [
            oracles.forgetting(column, never_learned) for column in correct_TN.T.tolist()
        ]
    assert found.max() <= num_epochs / 2, "so that T ranks above every count"
    assert (
        baselines.forgetting(correct_TN).tolist()
        == baselines.forgetting(correct_TN, "inf").tolist()
    )


def test_forgetting_by_hand():
    """Never learned, learned at the end, forgotten once, twice (most possible), always right,
    learned and forgotten once."""
    correct_TN = np.array(
        [[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0]],
        dtype=np.float32,
    )
    assert baselines.forgetting(correct_TN, "0").tolist() == [0, 0, 1, 2, 0, 1]
    assert baselines.forgetting(correct_TN, "inf").tolist() == [4, 0, 1, 2, 0, 1]


# ---- means over epochs


@PROPERTY
@given(st.integers(1, 15), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_el2n_is_the_mean_of_the_first_epochs(num_epochs, num_samples, seed, num_later):
    """Later rows are NaN here: none may be read."""
    norm_TN = (
        np.random.default_rng(seed)
        .uniform(0, 2**0.5, (num_epochs + num_later, num_samples))
        .astype(np.float32)
    )
    norm_TN[num_epochs:] = np.nan
    found = baselines.el2n(norm_TN, num_epochs)
    check(found, [oracles.el2n_early(column, num_epochs) for column in norm_TN.T.tolist()])


def test_ten_epochs_by_default():
    norm_TN = np.random.default_rng(0).random((20, 3)).astype(np.float32)
    assert baselines.el2n(norm_TN).tolist() == baselines.el2n(norm_TN, 10).tolist()
    assert baselines.dyn_unc(norm_TN).tolist() == baselines.dyn_unc(norm_TN, 10).tolist()
    assert baselines.dual(norm_TN).tolist() == baselines.dual(norm_TN, 10).tolist()


@PROPERTY
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_aum(num_epochs, num_samples, seed, scale):
    margin_TN = (np.random.default_rng(seed).normal(size=(num_epochs, num_samples)) * scale).astype(
        np.float32
    )
    for keep in baselines.AUM_KEEP:
        want = [oracles.aum(column, keep) for column in margin_TN.T.tolist()]
        check(baselines.aum(margin_TN, keep), want, 1e-9 * scale)
    assert baselines.aum(margin_TN).tolist() == baselines.aum(margin_TN, "hardest").tolist()


# ---- means over windows


@PROPERTY
@given(st.data())
def test_means_of_probabilities(data):
    """DynUnc, DUAL (any window that fits, often as long as the run) and the mean probability."""
    num_epochs = data.draw(st.integers(2, 14))
    window = data.draw(st.one_of(st.just(num_epochs), st.integers(2, num_epochs)))
    p_TN = data.draw(p_label_TN(num_epochs))
    columns = p_TN.T.tolist()
    check(baselines.dyn_unc(p_TN, window), [oracles.dyn_unc(column, window) for column in columns])
    check(baselines.dual(p_TN, window), [oracles.dual(column, window) for column in columns], 1e-13)
    found = baselines.mean_probability(p_TN)
    check(found, [oracles.mean(column) for column in columns])
    assert 0 <= found.min() <= found.max() <= 1
    check(baselines.confidence(p_TN), [-oracles.mean(column) for column in columns])
    check(baselines.variability(p_TN), [oracles.variability(column) for column in columns])
    check(baselines.csl(p_TN), [oracles.csl(column) for column in columns])
    right_TN = (p_TN > 0.5).astype(np.float32)
    right = right_TN.T.tolist()
    check(baselines.correctness(right_TN), [-sum(column) for column in right])
    check(baselines.learning_time(right_TN), [oracles.learning_time(column) for column in right])


@PROPERTY
@given(st.data())
def test_cld(data):
    """Classes whose validation loss varies, stays, or is not known."""
    num_epochs = data.draw(st.integers(3, 14))
    p_EN = data.draw(p_label_TN(num_epochs))
    rng = np.random.default_rng(num_epochs)
    val_loss_EC = rng.random((num_epochs, 4), dtype=np.float32)
    val_loss_EC[:, 2] = 0.7
    val_loss_EC[:, 3] = np.nan
    label_N = np.arange(p_EN.shape[1]) % 4
    want = [
        0.0 if label == 3 else oracles.cld(column, val_loss_EC[:, label].tolist())
        for column, label in zip(p_EN.T.tolist(), label_N, strict=True)
    ]
    check(baselines.cld(p_EN, label_N, val_loss_EC), want, 1e-5)


def test_windows_by_hand():
    """0.2, 0.4, 0.6 in windows of 2: both deviate by 0.1 from means 0.3 and 0.5, unbiased std 0.1
    sqrt(2)."""
    p_TN = np.array([[0.2], [0.4], [0.6]], dtype=np.float32)
    assert baselines.dyn_unc(p_TN, 2)[0] == pytest.approx(0.1 * 2**0.5, rel=1e-6)
    assert baselines.dual(p_TN, 2)[0] == pytest.approx(0.1 * 2**0.5 * (0.7 + 0.5) / 2, rel=1e-6)
    assert baselines.dyn_unc(p_TN, 3)[0] == pytest.approx(0.2, rel=1e-6)
    assert baselines.dual(p_TN, 3)[0] == pytest.approx(0.2 * 0.6, rel=1e-6)


# ---- Moderate


@PROPERTY
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_moderate(class_sizes, num_features, seed):
    """Classes of odd, even and one sample, in any order, with gaps between their numbers."""
    rng = np.random.default_rng(seed)
    label_M = rng.permutation(np.repeat(np.arange(len(class_sizes)) * 3 + 1, class_sizes))
    feature_MD = (rng.normal(size=(len(label_M), num_features)) + label_M[:, None]).astype(
        np.float32
    )
    before = feature_MD.copy()
    found = baselines.moderate(feature_MD, label_M)
    features, labels = feature_MD.tolist(), label_M.tolist()
    check(found, [oracles.moderate(features, labels, sample) for sample in range(len(labels))])
    assert np.array_equal(feature_MD, before)
    for position, size in enumerate(class_sizes):
        of_class = label_M == 3 * position + 1
        alone = baselines.moderate(feature_MD[of_class], label_M[of_class])
        np.testing.assert_array_equal(alone.view(np.int32), found[of_class].view(np.int32))
        if size == 1:
            assert not alone.any(), "a single sample is its own median"


# ---- any number of samples, in any number of shards


@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_columns_are_bitwise_independent_of_their_number(name):
    """A sample scores the same alone, in a shard of any size, and at any place in it."""
    num_samples = 20_001
    p_TN = np.random.default_rng(3).random((12, num_samples), dtype=np.float32)
    score = OF_PROBABILITIES[name]
    together_N = score(p_TN).view(np.int32)
    for num in (1, 2, 3, 7, 8, 9, 16, 17, 64, 15_000):
        for first in (0, 1, 5, num_samples - num):
            shard_N = score(p_TN[:, first : first + num]).view(np.int32)
            np.testing.assert_array_equal(
                shard_N, together_N[first : first + num], err_msg=f"{num} from {first}"
            )
    assert score(p_TN[:, :0]).shape == (0,)


def peak_bytes(call, *arguments) -> int:
    tracemalloc.start()
    call(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "name", ["dyn_unc", "dual", "mean_probability", "el2n", "csl", "cld", "variability"]
)
def test_no_trajectory_in_float64(name):
    p_TN = np.random.default_rng(0).random((100, 10_000), dtype=np.float32)
    assert peak_bytes(OF_PROBABILITIES[name], p_TN) < p_TN.size * 8 / 6


def test_one_class_of_features_in_float64():
    feature_MD = np.random.default_rng(0).random((4000, 64), dtype=np.float32)
    assert (
        peak_bytes(baselines.moderate, feature_MD, np.arange(4000) % 40) < feature_MD.size * 8 / 4
    )


# ---- what cannot be computed


ONES = np.ones((10, 3), dtype=np.float32)
WINDOWS = [
    (score, window) for score in (baselines.dyn_unc, baselines.dual) for window in (-1, 0, 1, 11)
]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: baselines.forgetting(ONES[:0]), "at least 2 epochs .* there are 0; train longer"),
        (lambda: baselines.forgetting(ONES[:1]), "at least 2 epochs .* there are 1; train longer"),
        (lambda: baselines.forgetting(ONES, "infinity"), r"'infinity'.*inf, 0"),
        (
            lambda: baselines.el2n(ONES[:9]),
            r"num_epochs=10 must lie in \[1, 9\].*EL2N.*(lower it|train longer)",
        ),
        (lambda: baselines.el2n(ONES, 0), r"num_epochs=0 must lie in \[1, 10\]"),
        (lambda: baselines.aum(ONES, "hard"), r"'hard'.*hardest, easiest"),
        (lambda: baselines.aum(ONES[:0]), "at least 1 epoch"),
        (lambda: baselines.mean_probability(ONES[:0]), "at least 1 epoch"),
        *(
            (
                partial(score, ONES, window),
                rf"window={window} must lie in \[2, 10\].*(lower it|train longer)",
            )
            for score, window in WINDOWS
        ),
        (
            lambda: baselines.moderate(ONES[:3], np.array([-1, 0, -1])),
            r"2 of 3 samples have no label",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(call, words):
    refused(words, call)
