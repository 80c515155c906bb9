"""Epochs that visit a part of the samples: a skipped epoch does not exist for a sample."""

import numpy as np
import pytest
import torch

from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.errors import CoverageError
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring import offline
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.trajectory import Trajectory
from tests import oracles
from tests.ranks import catch, run_ranks
from tests.scoring.test_scorer import random_stream

N, CLASSES, BATCH, EPOCHS = 23, 5, 6, 8
# K as large as it goes, plain mean, a window that ends before the last epoch
WINDOWS = [Window(8, 3, 0.9), Window(8, 2, 0.0), Window(6, 3, 0.5)]
PRESETS = ("official", "paper")


def subset_of(epoch, share=0.5):
    """About half of the samples at random; none but sample 7 once; all in the first and the
    fifth."""
    if epoch in (0, 4):
        return None
    if epoch == 2:
        return np.array([7])
    return np.flatnonzero(np.random.default_rng([9, epoch]).random(N) < share)


def is_visited(epoch, index):
    return subset_of(epoch) is None or index in subset_of(epoch)


def order_of(epoch, subset=subset_of):
    chosen = subset(epoch)
    size = N if chosen is None else len(chosen)
    return epoch_order(size, BATCH, seed=3, epoch=epoch, subset=chosen)


def record(scorer, epoch, rank=0, world_size=1, steps=slice(None), subset=subset_of):
    """Record an epoch of the stream, or the steps of a slice."""
    logits_TNC, label_N = random_stream(N, CLASSES, EPOCHS)
    order = order_of(epoch, subset)
    samples, indices = order.of_rank(rank, world_size)
    if steps.start in (None, 0) or scorer._split_sizes is None:
        scorer.expect(order, steps.start or 0)
    for sample_B, index_B in zip(samples[steps], indices[steps], strict=True):
        sample_B = torch.from_numpy(sample_B.copy())
        scorer.record(
            torch.from_numpy(index_B.copy()), logits_TNC[epoch][sample_B], label_N[sample_B]
        )


def scored(rank, world_size, preset, trajectory=None, subset=subset_of, **options):
    options = {"partial_epochs": True} | options
    scorer = ShardedScorer(N, CLASSES, WINDOWS, preset, "cpu", trajectory=trajectory, **options)
    for epoch in range(EPOCHS):
        record(scorer, epoch, rank, world_size, subset=subset)
        scorer.end_epoch()
    return {window: score.numpy() for window, score in scorer.gather().items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_scores_are_those_of_each_samples_own_visits(preset):
    logits_TNC, _ = random_stream(N, CLASSES, EPOCHS)
    for window, score_N in scored(0, 1, preset).items():
        num_epochs = window.K if preset == "official" else window.K + 1  # that a window needs
        for index in range(N):
            rows = [
                logits_TNC[epoch][index].tolist()
                for epoch in range(window.T)
                if is_visited(epoch, index)
            ]
            expected = (
                oracles.tdds(rows, len(rows), window.K, window.beta, preset)
                if len(rows) >= num_epochs
                else 0.0
            )
            assert score_N[index] == pytest.approx(expected, rel=2e-4, abs=2e-5), (window, index)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_skipped_sample_not_a_bit_changes(preset):
    plain = scored(0, 1, preset, subset=lambda epoch: None, partial_epochs=False)
    found = scored(0, 1, preset, subset=lambda epoch: None)
    everyone = scored(0, 1, preset, subset=lambda epoch: np.arange(N) if epoch else None)
    for window, score_N in plain.items():
        assert found[window].tobytes() == everyone[window].tobytes() == score_N.tobytes()


def _of_all_kinds(rank, world_size, folder):
    plain = [scored(rank, world_size, preset, folder / preset) for preset in PRESETS]
    return plain, _resumed(rank, world_size)


def _resumed(rank, world_size):
    """Scores of a scorer that goes on in the middle of each epoch from the state of another."""
    scorer = None
    for epoch in range(EPOCHS):
        half = order_of(epoch).num_steps // 2
        other = ShardedScorer(N, CLASSES, WINDOWS, device="cpu", partial_epochs=True)
        if scorer is not None:
            other.load_state_dict(scorer.state_dict())
        record(other, epoch, rank, world_size, slice(0, half))
        scorer = ShardedScorer(N, CLASSES, WINDOWS, device="cpu", partial_epochs=True)
        scorer.load_state_dict(other.state_dict())
        record(scorer, epoch, rank, world_size, slice(half, None))
        scorer.end_epoch()
    return {window: score.numpy() for window, score in scorer.gather().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_are_the_same_bits_on_any_ranks_resumed_and_offline(world_size, tmp_path):
    alone = [scored(0, 1, preset) for preset in PRESETS]
    for scores, resumed in run_ranks(world_size, _of_all_kinds, world_size, tmp_path):
        for window in WINDOWS:
            assert resumed[window].tobytes() == alone[0][window].tobytes()
            for found, expected in zip(scores, alone, strict=True):
                assert found[window].tobytes() == expected[window].tobytes()
    for preset, expected in zip(PRESETS, alone, strict=True):
        offline.score(tmp_path / preset)
        for window in WINDOWS:
            with np.load(tmp_path / preset / f"{window.key(preset)}.npz") as file:
                assert file["score"].tobytes() == expected[window].tobytes()


def test_the_trajectory_says_who_was_visited_and_other_scores_refuse_it(tmp_path):
    scored(0, 1, "official", tmp_path)
    trajectory = Trajectory(tmp_path)
    visited_TN, p_label_TN = trajectory.read("visited"), trajectory.read("p_label")
    for epoch in range(EPOCHS):
        expected = [is_visited(epoch, index) for index in range(N)]
        assert visited_TN[epoch].tolist() == expected
        skipped = ~np.array(expected)
        if epoch:
            assert (p_label_TN[epoch] == p_label_TN[epoch - 1])[skipped].all()
            assert (p_label_TN[epoch] != p_label_TN[epoch - 1])[~skipped].all()
    for key in ("aum", "forgetting", "dual", "el2n"):
        kind, text = catch(offline.score_all, tmp_path, [key], options=())
        assert kind == "InputError", key
        assert "longer than" in text or "from epoch 2 on samples were skipped" in text
    assert RunDir(tmp_path).scores.exists() is False


def test_what_the_last_visits_say():
    """Numbers by global index between epochs, for those that were skipped as well."""
    logits_TNC, label_N = random_stream(N, CLASSES, EPOCHS)
    scorer = ShardedScorer(N, CLASSES, WINDOWS, device="cpu", partial_epochs=True)
    for epoch in range(4):
        record(scorer, epoch)
        scorer.end_epoch()
    found = scorer.gather_last("p_label", "entropy")
    for index in range(N):
        last = max(epoch for epoch in range(4) if is_visited(epoch, index))
        row = logits_TNC[last][index].tolist()
        expected = oracles.softmax(row)[label_N[index]], oracles.entropy(row)
        assert found[index].tolist() == pytest.approx(expected, rel=1e-4)
    early = ShardedScorer(N, CLASSES, [Window(4, 3, 0.9)], device="cpu", partial_epochs=True)
    for epoch in range(4):
        record(early, epoch)
        early.end_epoch()
    assert torch.equal(scorer.gather_so_far(WINDOWS[0]), early.gather()[Window(4, 3, 0.9)])


def test_exactly_the_scheduled_samples_count():
    """One that is missing, one that is not scheduled, one that comes twice."""
    for extra, words in (
        ([1, 2], "of 3 samples 1 were not recorded and 0 more than once"),
        ([1, 2, 4, 9], "0 were not recorded and 1 more than once or though not scheduled"),
        ([1, 2, 4, 4], "0 were not recorded and 1 more than once"),
    ):
        scorer = ShardedScorer(10, 3, [Window(2, 2)], device="cpu", partial_epochs=True)
        scorer.record(torch.arange(10), torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))
        scorer.end_epoch()
        scorer.expect(epoch_order(3, 3, subset=np.array([1, 2, 4]), epoch=1))
        scorer._split_sizes = None  # so that other rows than announced may come
        index = torch.tensor(extra)
        scorer.record(index, torch.zeros(len(index), 3), torch.zeros_like(index))
        with pytest.raises(CoverageError, match=words):
            scorer.end_epoch()


def test_what_is_refused():
    subset = epoch_order(3, 3, subset=np.array([1, 2, 12]))
    scorer = ShardedScorer(10, 3, [Window(2, 2)], device="cpu", partial_epochs=True)
    assert "epoch 1 visits 3 of 10 samples" in catch(scorer.expect, subset)[1]
    state = scorer.state_dict()
    plain = ShardedScorer(10, 3, [Window(2, 2)], device="cpu")
    assert "partial_epochs=True" in catch(plain.load_state_dict, state)[1]
    assert "num_visits" in catch(scorer.load_state_dict, plain.state_dict())[1]
    for each in (scorer, plain):
        each.record(torch.arange(10), torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))
        each.end_epoch()
    assert "outside [0, 10)" in catch(scorer.expect, subset)[1]
    assert "with partial_epochs=True" in catch(plain.expect, subset)[1]
    assert scorer.state_bytes() == plain.state_bytes() + 10 * 4
    assert SCALARS[-1] == "correct", "what was recorded before stays in its place"
