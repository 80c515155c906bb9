"""TDDS from loss differences: values against the literal oracles and the golden vectors (from
logits: test_scorer.py).

Values, not ranks: at beta = 0.9 the last two windows decide the ranking almost alone, so ranks
would hide a wrong EMA.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdds_dist.config.scores import (
    PRESETS,
    Window,
    check_window,
    differences_per_window,
)
from tdds_dist.errors import InputError
from tdds_dist.scoring.tdds import score_trajectory
from tests import oracles
from tests.scoring.test_scorer import GOLDEN, golden_scores

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
BETAS = [0.0, 0.5, 0.85, 0.9, 1.0]


@st.composite
def cases(draw):
    """A preset and a window that it can compute, often at the ends of the range of K."""
    preset = draw(st.sampled_from(PRESETS))
    T = draw(st.integers(2, 12))
    low, high = (2, T) if preset == "official" else (1, T - 1)
    K = draw(st.one_of(st.sampled_from([low, high, min(2, high)]), st.integers(low, high)))
    return preset, Window(T, K, draw(st.sampled_from(BETAS)))


@PROPERTY
@given(
    cases(),
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.integers(0, 3),
)
def test_score_from_loss_differences(case, seed, num_samples, scale, num_later):
    """Row 0 and rows from T on are NaN here: neither may be read."""
    preset, window = case
    shape = (window.T + num_later, num_samples)
    delta_TM = (np.random.default_rng(seed).gamma(1.0, size=shape) * scale).astype(np.float32)
    delta_TM[0] = np.nan
    delta_TM[window.T :] = np.nan
    found = score_trajectory(delta_TM, window, preset)
    assert found.dtype == np.float32
    assert found.shape == (num_samples,)
    for m in range(num_samples):
        want = oracles.score(delta_TM[1:, m].tolist(), window.T, window.K, window.beta, preset)
        power = 1 if preset == "official" else 2
        assert found[m] == pytest.approx(want, rel=1e-4, abs=1e-6 * scale**power)


def test_hand_computed_windows():
    """Differences 1, 3, 2, 6; two per window: deviations +-1, +-0.5, +-2 from their means."""
    delta_TM = np.array([[np.nan], [1], [3], [2], [6]], dtype=np.float32)
    squares = np.array([2.0, 0.5, 8.0])
    for beta in (0.25, 1.0, 0.0):
        weights = (
            np.array([beta * (1 - beta) ** 2, beta * (1 - beta), beta])
            if beta
            else np.full(3, 1 / 3)
        )
        for K, preset, variability in ((3, "official", squares**0.5), (2, "paper", squares)):
            assert score_trajectory(delta_TM, Window(5, K, beta), preset)[0] == pytest.approx(
                weights @ variability, rel=1e-6
            )


def test_a_window_of_one_difference_has_no_variability_and_inputs_stay():
    """K = 2 snapshots in `official`, K = 1 difference in `paper`: one value never deviates from its
    mean."""
    delta_TM = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    before_TM = delta_TM.copy()
    assert not score_trajectory(delta_TM, Window(6, 2), "official").any()
    assert not score_trajectory(delta_TM, Window(6, 1), "paper").any()
    np.testing.assert_array_equal(delta_TM, before_TM)


# ---- the authors' code


def test_the_oracle_gives_the_authors_numbers():
    """Otherwise the package, which meets them in test_offline.py, and the oracle could share a
    misreading."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        logits_TNC, order_TN = file["logits"], np.argsort(file["index"], axis=1)
    for window, want_N in golden_scores().items():
        for n in (0, 17, 599):
            logits = [logits_TNC[t, order_TN[t, n]].tolist() for t in range(window.T)]
            found = oracles.tdds(logits, window.T, window.K, window.beta, "official")
            assert found == pytest.approx(want_N[n], abs=1e-5 * float(np.abs(want_N).mean()))


# ---- settings that cannot be computed


@pytest.mark.parametrize(("preset", "low", "high"), [("official", 2, 10), ("paper", 1, 9)])
def test_range_of_the_window(preset, low, high):
    for K in range(-1, 14):
        if low <= K <= high:
            check_window(Window(10, K), preset)
            assert differences_per_window(Window(10, K), preset) == (
                K - 1 if preset == "official" else K
            )
        else:
            with pytest.raises(
                InputError, match=rf"K={K} .*\[{low}, {high}\].*T=10.*(lower K|raise T)"
            ):
                check_window(Window(10, K), preset)


@pytest.mark.parametrize(
    ("window", "preset", "num_epochs", "words"),
    [
        (Window(1, 1), "official", None, "T=1 is too short .* at least 2 epochs"),
        (Window(1, 1), "paper", None, "T=1 is too short .* at least 2 epochs"),
        (Window(0, 1), "official", None, r"T=0\b"),
        (Window(-3, 1), "paper", None, r"T=-3\b"),
        (Window(30, 10), "official", 29, r"T=30 .*29 epochs.*(lower T|train longer)"),
        *(
            (Window(10, 5, beta), "official", None, rf"beta={beta}.*\[0, 1\]")
            for beta in (-0.1, 1.1, float("nan"), float("inf"))
        ),
        (Window(10, 5), "papre", None, r"'papre'.*official, paper"),
    ],
)
def test_windows_that_cannot_be_are_refused(window, preset, num_epochs, words):
    with pytest.raises(InputError, match=words):
        check_window(window, preset, num_epochs)
    if num_epochs:
        check_window(window, preset, num_epochs + 1)
        with pytest.raises(InputError, match=words):
            score_trajectory(np.zeros((num_epochs, 3), dtype=np.float32), window, preset)
