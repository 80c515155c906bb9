"""Per-sample scalars: values against the literal oracles, and rows that do not feel their
neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from tdds_dist.scoring.sample_stats import (
    DELTAS,
    LOGP_FLOOR,
    SCALARS,
    log_probabilities,
    loss_difference_paper,
    sample_scalars,
)
from tests import oracles

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
EPS = float(np.finfo(np.float32).eps)

LOGIT = st.one_of(
    st.floats(-8, 8, width=32),
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, -0.0, 20.0, -20.0, 88.0, -104.0, 1e4, -1e4]),
)


@st.composite
def problems(draw):
    """(previous logits, logits, labels): up to 3 samples, 2 to 8 classes; some epochs identical,
    some rows certain."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 8)))
    previous_BC = draw(arrays(np.float32, shape, elements=LOGIT))
    now_BC = draw(st.one_of(st.just(previous_BC), arrays(np.float32, shape, elements=LOGIT)))
    label_B = draw(arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
    return previous_BC, now_BC, label_B


def computed(
    previous_BC: np.ndarray, now_BC: np.ndarray, label_B: np.ndarray
) -> dict[str, np.ndarray]:
    now, previous = torch.from_numpy(now_BC), torch.from_numpy(previous_BC)
    result = sample_scalars(
        now, log_probabilities(now), log_probabilities(previous), torch.from_numpy(label_B)
    )
    assert result.dtype == torch.float32
    assert result.shape == (len(SCALARS), len(now_BC))
    return dict(zip(SCALARS, result.numpy(), strict=True))


def expected(previous: list[float], now: list[float], label: int) -> dict[str, float]:
    p = oracles.softmax(now)
    return {
        "delta_official": oracles.loss_difference_official(previous, now),
        "delta_paper": oracles.loss_difference_paper(previous, now),
        "delta_ce": oracles.loss_difference_ce(previous, now, label),
        "p_label": p[label],
        "logit_margin": oracles.margin(now, label),
        "p_margin": oracles.margin(p, label),
        "entropy": oracles.entropy(now),
        "el2n": oracles.el2n(now, label),
        "correct": oracles.correct(now, label),
    }


@PROPERTY
@given(problems())
def test_every_scalar_has_the_value_of_its_formula(problem):
    previous_BC, now_BC, label_B = problem
    found = computed(*problem)
    logp = [log_probabilities(torch.from_numpy(logits)) for logits in problem[:2]]
    np.testing.assert_array_equal(
        loss_difference_paper(*logp).numpy(), found["delta_paper"], "alone"
    )
    for row, label in enumerate(label_B.tolist()):
        previous, now = previous_BC[row].tolist(), now_BC[row].tolist()
        for name, value in expected(previous, now, label).items():
            # a float32 log-probability is known to EPS of its own size, and the two log ratios
            # inherit that
            size = max(map(abs, oracles.log_softmax(previous) + oracles.log_softmax(now)))
            atol = 4 * EPS * (size if name in ("delta_paper", "delta_ce") else 8.0)
            assert found[name][row] == pytest.approx(value, rel=1e-4, abs=max(atol, 1e-6)), (
                name,
                row,
            )


def test_hand_computed_three_classes():
    """p = (1/2, 1/4, 1/4), then p' = (1/4, 1/2, 1/4), label 1."""
    previous_BC = np.log(np.array([[2, 1, 1]], dtype=np.float32))
    now_BC = np.log(np.array([[1, 2, 1]], dtype=np.float32))
    found = computed(previous_BC, now_BC, np.array([1]))
    log2 = np.log(2.0)
    want = {
        "delta_official": 0.25 * log2 + 0.5 * log2,
        "delta_paper": -0.25 * log2 + 0.5 * log2,
        "delta_ce": log2,
        "p_label": 0.5,
        "logit_margin": log2,
        "p_margin": 0.25,
        "entropy": 1.5 * log2,
        "el2n": np.sqrt(2 * 0.25**2 + 0.5**2),
        "correct": 1.0,
    }
    assert set(want) == set(SCALARS)
    for name, value in want.items():
        assert found[name][0] == pytest.approx(value, abs=1e-6), name


def test_first_epoch_has_no_loss_difference_and_all_else():
    logits_BC, label_B = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    logp_BC = log_probabilities(logits_BC)
    first = sample_scalars(logits_BC, logp_BC, None, label_B)
    later = sample_scalars(logits_BC, logp_BC, logp_BC, label_B)
    assert first[: len(DELTAS)].isnan().all()
    assert torch.equal(first[len(DELTAS) :], later[len(DELTAS) :])


def test_certain_rows_stay_finite():
    """Probability 0 in one epoch and 1 in the next, where log(0) would give inf and 0 * log(0)
    NaN."""
    certain_BC = np.array([[1e4, -1e4, 0], [3e38, -3e38, 0]], dtype=np.float32)
    found = computed(certain_BC, certain_BC[:, ::-1].copy(), np.array([0, 0]))
    for name in SCALARS:
        assert np.isfinite(found[name]).all() or name == "logit_margin", name
    floored = log_probabilities(torch.from_numpy(certain_BC))
    assert floored.min() == LOGP_FLOOR == oracles.FLOOR
    assert torch.isfinite(floored.half()).all()
    assert floored.exp().sum(dim=1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32_and_inputs_are_not_changed(dtype):
    logits_BC, label_B = torch.randn(6, 5).to(dtype), torch.arange(6) % 5
    logp_BC, wide_BC = log_probabilities(logits_BC), log_probabilities(logits_BC.float())
    assert logp_BC.dtype == torch.float32
    assert torch.equal(logp_BC, wide_BC)
    previous_BC = log_probabilities(torch.randn(6, 5))
    inputs = (logits_BC, logp_BC, previous_BC, label_B)
    copies = [value.clone() for value in inputs]
    found = sample_scalars(*inputs)
    assert torch.equal(found, sample_scalars(logits_BC.float(), wide_BC, previous_BC, label_B))
    assert all(torch.equal(value, copy) for value, copy in zip(inputs, copies, strict=True))


# ---- rows do not feel their neighbours


@pytest.mark.parametrize("num_classes", [2, 3, 10, 17, 100, 257, 1000])
def test_a_row_is_bitwise_the_same_in_any_company(num_classes):
    """The same rows alone, in slices (at other alignments), permuted, and computed by another
    number of threads."""
    generator = torch.Generator().manual_seed(num_classes)
    num_rows = 300 if num_classes > 100 else 130
    previous_NC, now_NC = (
        4 * torch.randn(num_rows, num_classes, generator=generator) for _ in range(2)
    )
    label_N = torch.randint(num_classes, (num_rows,), generator=generator)

    def scalars_of(rows: Tensor | slice) -> Tensor:
        logits, previous = now_NC[rows], log_probabilities(previous_NC[rows])
        found_FN = sample_scalars(logits, log_probabilities(logits), previous, label_N[rows])
        return found_FN.contiguous().view(torch.int32)

    together_FN = scalars_of(slice(None))
    for num in (1, 2, 3, 5, 8, 16, 33, 64, 128):
        for first in range(0, num_rows - num + 1, max(1, num_rows // 6)):
            assert torch.equal(
                scalars_of(slice(first, first + num)), together_FN[:, first : first + num]
            ), (num, first)
        chosen = torch.randperm(num_rows, generator=generator)[:num]
        assert torch.equal(scalars_of(chosen), together_FN[:, chosen]), num
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads < 3 else 1)
    try:
        assert torch.equal(scalars_of(slice(None)), together_FN)
    finally:
        torch.set_num_threads(threads)
