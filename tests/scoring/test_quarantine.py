"""Samples whose logits were not finite: no sampler keeps one, and the others are chosen as if these
were not there."""

import math

import numpy as np
import pytest
import torch

from tdds_dist.coreset import samplers
from tdds_dist.coreset.select import choose, make_coreset, random_scores
from tdds_dist.data.beton import BetonInfo
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Scores, fingerprint, load_scores
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring.quarantine import not_quarantined, set_lowest
from tdds_dist.training.final_pass import write_scores
from tests import oracles

N, C = 200, 4
QUARANTINED = [0, 7, 50, 51, 120, 199]
OTHERS = [i for i in range(N) if i not in QUARANTINED]
SAMPLERS = ["top", "centre", "ccs", "beta"]
LONE = World(0, 0, 1, 1, torch.device("cpu"))


def some_scores(
    seed: int = 0, key: str = "dual", quarantined: list[int] | None = None, **settings: object
) -> Scores:
    """Random scores in which the quarantined would be kept by anyone: the highest there are."""
    rng = np.random.default_rng(seed)
    score_N = rng.random(N).astype(np.float32)
    quarantined = QUARANTINED if quarantined is None else quarantined
    score_N[quarantined] = 5.0
    label_N = rng.integers(0, C, N)
    listed = {"quarantined": quarantined} if quarantined else {}
    return Scores(
        key,
        score_N,
        label_N,
        fingerprint(label_N, C),
        {"score": "dual"} | settings | listed,
        {"p_mean": rng.random(N).astype(np.float32)},
    )


# ---- the rule for scores


def test_set_lowest_by_hand():
    score_N = np.array([3, -2, 5, -7, 4], dtype=np.float32)
    found = set_lowest(score_N, [3, 0])
    assert found.tolist() == [-2, -2, 5, -2, 4]
    assert found.dtype == np.float32
    assert score_N.tolist() == [3, -2, 5, -7, 4], "a copy"
    assert set_lowest(score_N, ()).tolist() == score_N.tolist()
    assert set_lowest(score_N, ()) is not score_N
    assert set_lowest(np.array([np.nan, 2, -np.inf, 1], dtype=np.float32), (0, 2)).tolist() == [
        1,
        2,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "rule", [set_lowest, lambda score_N, quarantined: not_quarantined(len(score_N), quarantined)]
)
def test_quarantine_that_cannot_be(rule):
    with pytest.raises(
        InputError, match=r"all 3 samples are quarantined: .* look for what made training diverge"
    ):
        rule(np.ones(3, dtype=np.float32), [2, 0, 1])
    for outside in (3, -1):
        with pytest.raises(
            InputError, match=rf"quarantined sample {outside} is not in \[0, 3\); .* score again"
        ):
            rule(np.ones(3, dtype=np.float32), [0, outside])


# ---- every sampler


def literal_choice(
    sampler: str, scores: Scores, members: list[int], num: int, rate: float, seed: int
) -> list[int]:
    """What the sampler draws from a dataset of these samples alone."""
    if sampler in ("top", "centre"):
        first = 0 if sampler == "top" else (len(members) - num + 1) // 2
        return sorted(sorted(members, key=lambda i: -scores.score_N[i])[first : first + num])
    score_n, p_mean_n = scores.score_N[members], scores.extra["p_mean"][members]
    if sampler == "ccs":
        cutoff = 0.3 if rate >= 0.9 else 0.2 if rate >= 0.8 else 0.0
        kept = samplers.ccs(score_n, num, num_strata=50, hard_cutoff_rate=cutoff, seed=seed)
    else:
        kept = samplers.beta_sample(score_n, p_mean_n, num, rate, c_d=4.0, seed=seed)
    return [members[k] for k in kept]


def literal_quotas(label_N: np.ndarray, members: list[int], num: int) -> dict[int, int]:
    """Largest remainder over the sizes of what is left of the classes."""
    sizes = {
        c: sum(int(label_N[i]) == c for i in members)
        for c in sorted({int(label_N[i]) for i in members})
    }
    quotas = {c: num * size // len(members) for c, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda c: -(num * sizes[c] % len(members)))
    for c in by_remainder[: num - sum(quotas.values())]:
        quotas[c] += 1
    return quotas


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.035, 0.3, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_others_are_chosen_as_if_alone(sampler, rate):
    scores, seed = some_scores(1), 1
    num = min(oracles.num_kept(N, rate), len(OTHERS))
    kept = choose(scores, rate, sampler=sampler, seed=seed)
    assert kept.dtype == np.int64
    assert kept.tolist() == literal_choice(sampler, scores, OTHERS, num, rate, seed)
    assert len(kept) == num
    want = []
    for label, quota in literal_quotas(scores.label_N, OTHERS, num).items():
        members = [i for i in OTHERS if scores.label_N[i] == label]
        class_seed = int(np.random.SeedSequence([seed, label]).generate_state(1)[0])
        want += literal_choice(sampler, scores, members, quota, rate, class_seed)
    assert choose(scores, rate, sampler=sampler, seed=seed, class_balanced=True).tolist() == sorted(
        want
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_quarantine_nothing_changes(sampler):
    scores = some_scores(2, quarantined=[])
    assert "quarantined" not in scores.settings
    listed_as_none = Scores(**vars(scores) | {"settings": scores.settings | {"quarantined": []}})
    for class_balanced in (True, False):
        options = {"sampler": sampler, "class_balanced": class_balanced, "seed": 4}
        kept = choose(scores, 0.3, **options).tolist()
        assert choose(listed_as_none, 0.3, **options).tolist() == kept
        assert class_balanced or kept == literal_choice(
            sampler, scores, list(range(N)), 140, 0.3, 4
        )
    assert make_coreset(scores, 0.3, sampler=sampler)[1] == []


def test_quarantined_scores_need_not_be_finite_others_do():
    scores = some_scores()
    scores.score_N[QUARANTINED] = np.nan
    assert choose(scores, 0.5).tolist() == literal_choice("top", scores, OTHERS, 100, 0.5, 0)
    scores.score_N[3] = np.inf
    with pytest.raises(InputError, match="'dual' holds 1 values that are not finite"):
        choose(scores, 0.5)
    with pytest.raises(InputError, match=r"quarantined sample 200 is not in \[0, 200\)"):
        choose(Scores(**vars(scores) | {"settings": {"quarantined": [200]}}), 0.5)


def test_importance_is_scaled_over_the_others():
    for extreme in (5.0, -5.0):
        scores = some_scores(key="tdds", score="tdds", preset="official")
        scores.score_N[QUARANTINED] = extreme
        coreset, _ = make_coreset(scores, 0.2)
        low, high = (pick(float(scores.score_N[i]) for i in OTHERS) for pick in (min, max))
        want = [(float(scores.score_N[i]) - low) / (high - low) for i in coreset.index_M]
        np.testing.assert_allclose(coreset.importance_M, want, rtol=1e-6)
        assert math.isclose(coreset.importance_M.max(), 1.0)
    paper, _ = make_coreset(some_scores(key="tdds", score="tdds", preset="paper"), 0.2)
    np.testing.assert_array_equal(paper.importance_M, some_scores().score_N[paper.index_M])
    plain, _ = make_coreset(some_scores(), 0.2)
    assert plain.importance_M.tolist() == [1.0] * 160


def test_warnings_say_what_was_left_out():
    coreset, warnings = make_coreset(some_scores(), 0.5)
    assert warnings == ["6 quarantined samples (NaN logits) are in no coreset"]
    assert coreset.settings["quarantined"] == QUARANTINED
    assert make_coreset(some_scores(quarantined=[3]), 0.5)[1] == [
        "1 quarantined sample (NaN logits) is in no coreset"
    ]
    constant = some_scores()
    constant.score_N[OTHERS] = 2.0
    assert (
        make_coreset(constant, 0.1)[1][1]
        == "all 194 scores of dual are 2, so the choice is a random draw"
    )
    drawn = random_scores(some_scores(), seed=3)
    assert drawn.settings == {"score": "random", "quarantined": QUARANTINED}
    assert choose(drawn, 0.0).tolist() == OTHERS
    assert random_scores(some_scores(quarantined=[]), seed=3).settings == {"score": "random"}


def test_a_class_of_which_nothing_is_left():
    label_N = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    scores = Scores(
        "mine",
        np.arange(10, dtype=np.float32),
        label_N,
        fingerprint(label_N, 3),
        {"quarantined": [4, 5]},
    )
    for class_balanced, want in ((True, [1, 2, 3, 8, 9]), (False, [3, 6, 7, 8, 9])):
        coreset, warnings = make_coreset(scores, 0.5, class_balanced=class_balanced)
        assert coreset.index_M.tolist() == want
        assert warnings[1] == "all samples of 1 classes are quarantined (first: [1])"
    assert make_coreset(scores, 0.7)[1][2].startswith(
        "1 of 2 classes keep no sample (first: [0]); --class-balanced"
    )


# ---- scores of the final model


def saved(tmp_path, value_of: dict[int, float], quarantined: list[int]) -> Scores:
    score_N = np.arange(10, 10 + N, dtype=np.float32)
    for index, value in value_of.items():
        score_N[index] = value
    label_N = np.arange(N) % C
    info = BetonInfo.__new__(BetonInfo)
    object.__setattr__(info, "label_N", label_N)
    given = {"source": "final_pass"}
    [path] = write_scores(
        RunDir(tmp_path),
        LONE,
        {"entropy": score_N},
        info,
        fingerprint(label_N, C),
        given,
        quarantined,
    )
    assert given == {"source": "final_pass"}
    return load_scores(path)


def test_final_scores_of_quarantined_samples(tmp_path):
    found = saved(tmp_path, {0: math.nan, 50: math.inf, 7: -100.0}, [50, 0, 7])
    assert found.settings == {"score": "entropy", "source": "final_pass", "quarantined": [0, 7, 50]}
    assert found.score_N.tolist() == [11.0 if i in (0, 7, 50) else 10.0 + i for i in range(N)]
    assert saved(tmp_path, {7: -100.0}, []).settings == {"score": "entropy", "source": "final_pass"}
    assert saved(tmp_path, {7: -100.0}, []).score_N[7] == -100.0


def test_final_scores_of_others_must_be_finite(tmp_path):
    with pytest.raises(
        InputError, match=r"entropy is not finite for 2 samples \(global indices \[8, 60\]\)"
    ):
        saved(tmp_path, {0: math.nan, 8: math.inf, 60: math.nan}, [0])
    assert not (tmp_path / "scores").exists()
