"""TDDS from loss differences and from logits: values against the literal oracles and the golden vectors.

Values, not ranks: at beta = 0.9 the last two windows decide the ranking almost alone, so ranks would hide a wrong EMA.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdds_dist.errors import InputError
from tdds_dist.scalars import DELTAS, SCALARS, log_probabilities, sample_scalars
from tdds_dist.tdds import (
    DELTA_OF_PRESET,
    PRESETS,
    Window,
    average_windows,
    check_window,
    differences_per_window,
    score_trajectory,
    window_settings,
    window_variability,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
GOLDEN = Path(__file__).parent / "golden" / "tdds_official_digits.npz"
GOLDEN_SETTINGS = [
    Window(30, 10, 0.9), Window(20, 10, 0.9), Window(10, 5, 0.9), Window(30, 20, 0.85), Window(12, 10, 0.95),
]
BETAS = [0.0, 0.5, 0.85, 0.9, 1.0]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads and lose much to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def cases(draw):
    """A preset and a window that it can compute, often at the ends of the range of K."""
    preset = draw(st.sampled_from(PRESETS))
    T = draw(st.integers(2, 12))
    low, high = (2, T) if preset == "official" else (1, T - 1)
    K = draw(st.one_of(st.sampled_from([low, high, min(2, high)]), st.integers(low, high)))
    return preset, Window(T, K, draw(st.sampled_from(BETAS)))


@st.composite
def logits_TNC(draw, num_epochs: int):
    """Logits of up to 4 samples, 8 classes: calm, spread out, extreme, one class certain, or the same every epoch."""
    shape = (num_epochs, draw(st.integers(1, 4)), draw(st.integers(2, 8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["calm", "spread", "extreme", "certain", "identical"]))
    logits = rng.normal(size=shape) * {"calm": 1.0, "spread": 6.0, "extreme": 1e4}.get(kind, 2.0)
    if kind == "extreme":
        logits = logits.clip(-1e4, 1e4)
    if kind == "certain":
        logits[..., rng.integers(shape[2])] += 40.0
    if kind == "identical":
        logits[:] = logits[0]
    return logits.astype(np.float32)


def deltas(logits: np.ndarray, preset: str) -> np.ndarray:
    """delta_TM of one preset by way of `scalars`; logits by global index."""
    rows, previous = [], None
    label_N = torch.zeros(logits.shape[1], dtype=torch.int64)
    for logits_NC in torch.from_numpy(logits):
        logp_NC = log_probabilities(logits_NC)
        found = sample_scalars(logits_NC, logp_NC, previous, label_N)
        rows.append(found[SCALARS.index(DELTA_OF_PRESET[preset])].numpy())
        previous = logp_NC
    return np.stack(rows)


@PROPERTY
@given(cases(), st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1e-3, 1.0, 1e3]), st.integers(0, 3))
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


@PROPERTY
@given(st.data())
def test_score_from_logits(data):
    preset, window = data.draw(cases())
    logits = data.draw(logits_TNC(window.T))
    delta_TM = deltas(logits, preset)
    found = score_trajectory(delta_TM, window, preset)
    for n in range(logits.shape[1]):
        want = oracles.tdds(logits[:, n].tolist(), window.T, window.K, window.beta, preset)
        # a loss difference of size s carries a float32 error of about 1e-6 s; `paper` squares it
        size = 1.0 + float(delta_TM[1:, n].max())
        assert found[n] == pytest.approx(want, rel=1e-4, abs=2e-6 * (size if preset == "official" else size**2))


def test_hand_computed_windows():
    """Differences 1, 3, 2, 6; two per window: deviations +-1, +-0.5, +-2 from their means."""
    delta_TM = np.array([[np.nan], [1], [3], [2], [6]], dtype=np.float32)
    squares = [2.0, 0.5, 8.0]
    roots = [value**0.5 for value in squares]
    for beta in (0.25, 1.0):
        weights = [beta * (1 - beta) ** 2, beta * (1 - beta), beta]
        want = sum(weight * root for weight, root in zip(weights, roots, strict=True))
        assert score_trajectory(delta_TM, Window(5, 3, beta), "official")[0] == pytest.approx(want, rel=1e-6)
        want = sum(weight * square for weight, square in zip(weights, squares, strict=True))
        assert score_trajectory(delta_TM, Window(5, 2, beta), "paper")[0] == pytest.approx(want, rel=1e-6)
    assert score_trajectory(delta_TM, Window(5, 3, 0.0), "official")[0] == pytest.approx(sum(roots) / 3, rel=1e-6)
    assert score_trajectory(delta_TM, Window(5, 2, 0.0), "paper")[0] == pytest.approx(sum(squares) / 3, rel=1e-6)


def test_a_window_of_one_difference_has_no_variability():
    """K = 2 snapshots in `official`, K = 1 difference in `paper`: one value never deviates from its mean."""
    delta_TM = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    assert not score_trajectory(delta_TM, Window(6, 2), "official").any()
    assert not score_trajectory(delta_TM, Window(6, 1), "paper").any()


def test_the_first_window_starts_the_average_at_zero():
    """R <- beta R_t + (1-beta) R from 0, so that a single window counts beta times."""
    variability_M = torch.tensor([2.0, 4.0])
    average_M = torch.zeros(2)
    average_windows(average_M, variability_M, 0.9, 1)
    assert average_M.tolist() == pytest.approx([1.8, 3.6])
    average_windows(average_M, variability_M, 0.9, 2)
    assert average_M.tolist() == pytest.approx([1.98, 3.96])


@pytest.mark.parametrize("preset", PRESETS)
def test_variability_leaves_its_differences_alone(preset):
    delta_DM = [torch.rand(3) for _ in range(4)]
    copies = [delta_M.clone() for delta_M in delta_DM]
    window_variability(delta_DM, preset)
    assert all(torch.equal(a, b) for a, b in zip(delta_DM, copies, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("beta", BETAS)
def test_columns_are_bitwise_independent_of_their_number(preset, beta):
    """A sample scores the same alone, in a shard of any size, and at any place in it."""
    num_samples = 40_001
    delta_TM = np.random.default_rng(3).gamma(1.0, size=(12, num_samples)).astype(np.float32)
    window = Window(12, 5, beta)
    together_M = score_trajectory(delta_TM, window, preset).view(np.int32)
    for num in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 1000, 35_000):
        for first in (0, 1, 5, num_samples - num):
            shard_M = score_trajectory(delta_TM[:, first : first + num], window, preset).view(np.int32)
            np.testing.assert_array_equal(shard_M, together_M[first : first + num], err_msg=f"{num} from {first}")


# ---- the authors' code


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.fixture(scope="module")
def golden_delta_TN(golden) -> np.ndarray:
    by_index = np.empty_like(golden["logits"])
    for by_index_NC, logits_NC, index_N in zip(by_index, golden["logits"], golden["index"], strict=True):
        by_index_NC[index_N] = logits_NC
    return deltas(by_index, "official")


@pytest.mark.parametrize("window", GOLDEN_SETTINGS, ids=str)
def test_golden_vectors_of_the_authors_code(golden, golden_delta_TN, window):
    want = golden[f"score_T{window.T}_K{window.K}_beta{window.beta:g}"]
    found = score_trajectory(golden_delta_TN, window, "official")
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).mean())


def test_golden_file_holds_no_other_setting(golden):
    names = {f"score_T{window.T}_K{window.K}_beta{window.beta:g}" for window in GOLDEN_SETTINGS}
    assert {name for name in golden if name.startswith("score_")} == names


def test_oracle_meets_the_golden_vectors(golden):
    """The oracle itself, on a few samples: otherwise it could share a misreading with the package."""
    order = np.argsort(golden["index"], axis=1)
    for window in GOLDEN_SETTINGS:
        want = golden[f"score_T{window.T}_K{window.K}_beta{window.beta:g}"]
        for n in (0, 17, 599):
            logits = [golden["logits"][t, order[t, n]].tolist() for t in range(window.T)]
            found = oracles.tdds(logits, window.T, window.K, window.beta, "official")
            assert found == pytest.approx(want[n], abs=1e-5 * float(np.abs(want).mean()))


# ---- settings that cannot be computed


@pytest.mark.parametrize(("preset", "low", "high"), [("official", 2, 10), ("paper", 1, 9)])
def test_range_of_the_window(preset, low, high):
    for K in range(-1, 14):
        if low <= K <= high:
            check_window(Window(10, K), preset)
            assert differences_per_window(Window(10, K), preset) == (K - 1 if preset == "official" else K)
        else:
            with pytest.raises(InputError, match=rf"K={K} .*\[{low}, {high}\].*T=10.*(lower K|raise T)"):
                check_window(Window(10, K), preset)


@pytest.mark.parametrize(("T", "preset"), [(1, "official"), (1, "paper"), (0, "official"), (-3, "paper")])
def test_trajectory_too_short_for_any_window(T, preset):
    with pytest.raises(InputError, match=rf"T={T}\b"):
        check_window(Window(T, 1), preset)


def test_trajectory_longer_than_the_run():
    check_window(Window(30, 10), "official", 30)
    with pytest.raises(InputError, match=r"T=30 .*29 epochs.*(lower T|train longer)"):
        check_window(Window(30, 10), "official", 29)
    with pytest.raises(InputError, match=r"T=30 .*29 epochs"):
        score_trajectory(np.zeros((29, 3), dtype=np.float32), Window(30, 10), "official")


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), float("inf")])
def test_range_of_beta(beta):
    with pytest.raises(InputError, match=rf"beta={beta}.*\[0, 1\]"):
        check_window(Window(10, 5, beta), "official")


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(InputError, match=r"'papre'.*official, paper"):
        check_window(Window(10, 5), "papre")


def test_names_and_settings_of_a_window():
    window = Window(30, 10, 0.85)
    assert window.key("official") == "tdds_official_T30_K10_beta0.85"
    assert Window(30, 10, 1.0).key("paper") == "tdds_paper_T30_K10_beta1"
    assert window_settings(window, "paper") == {"score": "tdds", "preset": "paper", "T": 30, "K": 10, "beta": 0.85}
    assert set(DELTA_OF_PRESET) == set(PRESETS)
    assert set(DELTA_OF_PRESET.values()) <= set(DELTAS)
