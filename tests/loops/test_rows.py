"""Several labels per sample, and sequences: rows of the scorer become samples."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from tdds_dist import InputError, ShardedScorer, Trajectory, Window, load_scores, score_all
from tdds_dist.loops.rows import merge_rows
from tests import oracles

N, L, T = 7, 3, 5
WINDOW = Window(T=T, K=3, beta=0.9)
RNG = np.random.default_rng(0)
LOGITS_TNL = RNG.normal(size=(T, N, L))
LABEL_NL = RNG.integers(0, 2, (N, L))


@pytest.fixture
def binary(tmp_path):
    """The trajectory of a row for each of three labels of seven samples, as docs/own_loop.md has
    it: the logit of a label, and 0."""
    scorer = ShardedScorer(N * L, 2, [WINDOW], device="cpu", trajectory=tmp_path / "rows")
    row_NL = torch.arange(N)[:, None] * L + torch.arange(L)
    label = torch.from_numpy(LABEL_NL).flatten()
    for logits_NL in torch.from_numpy(LOGITS_TNL).float():
        two_NL2 = torch.stack([torch.zeros_like(logits_NL), logits_NL], dim=-1)
        scorer.record(row_NL.flatten(), two_NL2.flatten(0, 1), label)
        scorer.end_epoch()
    return tmp_path / "rows"


def bernoulli(now: float, before: float) -> float:
    """KL divergence of two independent yes or no, by their logits."""
    q, p = (1 / (1 + math.exp(-z)) for z in (now, before))
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def test_differences_of_several_labels_are_sums_of_bernoulli_divergences(binary, tmp_path):
    out = merge_rows(binary, tmp_path / "out", np.arange(N * L) // L)
    found = Trajectory(out)
    assert (found.num_samples, found.num_epochs, found.labels().tolist()) == (N, T, [-1] * N)
    for n in range(N):
        z_TL, sign_L = LOGITS_TNL[:, n], 2 * LABEL_NL[n] - 1
        delta = [
            sum(bernoulli(*pair) for pair in zip(now, before, strict=True))
            for before, now in pairwise(z_TL.tolist())
        ]
        p_TL = 1 / (1 + np.exp(-sign_L * z_TL))
        want = {
            "delta_paper": delta,
            "p_label": p_TL.prod(axis=1),
            "logit_margin": (sign_L * z_TL).min(axis=1),
            "p_margin": (2 * p_TL - 1).min(axis=1),
            "el2n": np.sqrt((2 * (1 - p_TL) ** 2).sum(axis=1)),
            "correct": (sign_L * z_TL > 0).all(axis=1),
        }
        for name, values in want.items():
            read_T = found.read(name)[:, n][1 if name == "delta_paper" else 0 :]
            np.testing.assert_allclose(read_T, values, rtol=1e-4, atol=1e-6, err_msg=name)
    score_all(out, ["tdds", "csl"], out=tmp_path / "scores")
    csl_N = load_scores(tmp_path / "scores" / "csl.npz").score_N
    np.testing.assert_allclose(csl_N, -np.log(found.read("p_label")).sum(axis=0), rtol=1e-5)
    tdds_N = load_scores(tmp_path / "scores" / f"{WINDOW.key('official')}.npz").score_N
    official_TN = found.read("delta_official")[1:]
    want = [oracles.score(d, T, 3, 0.9, "official") for d in official_TN.T.tolist()]
    np.testing.assert_allclose(tdds_N, want, rtol=1e-4)


def test_sequences_are_means_over_their_tokens(binary, tmp_path):
    """Of unequal lengths, their rows in any order."""
    sample_R = np.random.default_rng(1).permutation(np.repeat(np.arange(4), [1, 4, 6, 10]))
    rows, found = (
        Trajectory(binary),
        Trajectory(merge_rows(binary, tmp_path / "o", sample_R, "mean")),
    )
    for name in rows.scalars:
        value_TR, merged_TN = rows.read(name), found.read(name)
        for sample in range(4):
            of_TR = value_TR[:, sample_R == sample]
            want = of_TR.mean(axis=1)
            if name == "p_label":
                want = np.exp(np.log(of_TR).mean(axis=1))
            if name == "correct":
                want = want > 0.5
            np.testing.assert_allclose(merged_TN[:, sample], want, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_merged(binary, tmp_path):
    sample_R = np.arange(N * L) // L
    for arguments, words in (
        ((binary, tmp_path / "o", sample_R, "max"), "how='max' is unknown; use one of sum, mean"),
        (
            (binary, tmp_path / "o", sample_R[1:]),
            r"\(20,\); give the sample of each of the 21 rows",
        ),
        ((binary, tmp_path / "o", sample_R / 2), "float64 .* as integers"),
        ((binary, tmp_path / "o", sample_R + 1), "sample 0 has no row; number the samples from 0"),
        ((binary, tmp_path / "o", sample_R - 1), "sample 0 has no row"),
        ((binary, binary, sample_R), re.escape(str(binary))),
    ):
        with pytest.raises(InputError, match=words):
            merge_rows(*arguments)
    assert not (tmp_path / "o").exists()


def test_a_quarantined_row_takes_its_sample_with_it(binary, tmp_path):
    (binary / "quarantine.json").unlink(missing_ok=True)
    from tdds_dist.scoring.quarantine import write

    write(binary, {4: 3, 5: 1})
    assert Trajectory(merge_rows(binary, tmp_path / "o", np.arange(N * L) // L)).quarantined == {
        1: 1
    }
