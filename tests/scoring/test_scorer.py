"""ShardedScorer: the authors' numbers, bitwise the same at every world size, and errors that all
ranks raise."""

import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tdds_dist import ShardedScorer, Window
from tdds_dist.config.scores import DELTA_OF_PRESET, PRESETS
from tdds_dist.distributed import collectives
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.tdds import score_trajectory
from tdds_dist.scoring.trajectory import Trajectory
from tests import oracles
from tests.ranks import WORLDS, catch, run_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "tdds_official_digits.npz"


def golden_scores():
    with np.load(GOLDEN) as file:
        found = {}
        for key in file:
            if match := re.fullmatch(r"score_T(\d+)_K(\d+)_beta([\d.]+)", key):
                found[Window(int(match[1]), int(match[2]), float(match[3]))] = file[key]
    assert len(found) == 5
    return found


def record_golden(rank, world_size, batch=50, scorer=None, **options):
    """Feed the golden stream: global batches of the recorded order, dealt to ranks."""
    with np.load(GOLDEN) as file:
        logits, index, labels = (
            torch.from_numpy(file[name]) for name in ("logits", "index", "labels")
        )
    scorer = scorer or ShardedScorer(600, 10, list(golden_scores()), device="cpu", **options)
    for epoch in range(30):
        for start in range(0, 600, batch):
            rows = slice(start + rank, min(start + batch, 600), world_size)
            scorer.record(index[epoch, rows], logits[epoch, rows], labels[index[epoch, rows]])
        scorer.end_epoch()
    return {window: score.numpy() for window, score in scorer.gather().items()}


def random_stream(num_samples, num_classes, epochs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(num_samples, num_classes, generator=generator) * 3
    logits = [
        (base + torch.randn(num_samples, num_classes, generator=generator)).to(dtype)
        for _ in range(epochs)
    ]
    return logits, torch.randint(num_classes, (num_samples,), generator=generator)


STREAM_WINDOWS = [Window(6, 3, 0.9), Window(5, 4, 0.0)]
# (samples, classes, global batch), and what differs from float32 logits, preset `official` and
# dense storage
STREAMS = [
    ((97, 257, 24), {"preset": "paper"}),
    ((48, 3, 48), {"dtype": torch.bfloat16}),
    ((2, 5, 12), {}),
    ((25, 1000, 12), {"dtype": torch.float16}),
    ((1, 2, 12), {"preset": "paper"}),
    ((61, 30, 24), {"storage": "topk:4"}),
    ((61, 30, 24), {"storage": "topk:4", "logp_dtype": torch.float16}),
]
# order announced, steps whose rows travel together: pairs, one less than all, all
TOGETHER = [(False, 2), (True, 2), (True, 4), (True, 64)]


def record_stream(
    rank,
    world_size,
    num_samples,
    num_classes,
    global_batch,
    *,
    known,
    preset="official",
    dtype=torch.float32,
    windows=STREAM_WINDOWS,
    **options,
):
    """Feed a random stream in the order of `partition`, with or without announcing it."""
    logits_TNC, label_N = random_stream(num_samples, num_classes, 6, dtype)
    scorer = ShardedScorer(num_samples, num_classes, windows, preset, "cpu", **options)
    for epoch, logits_NC in enumerate(logits_TNC):
        order = epoch_order(num_samples, global_batch, seed=3, epoch=epoch)
        if known:
            scorer.expect(order)
        for sample_B, index_B in zip(*order.of_rank(rank, world_size), strict=True):
            sample_B = torch.from_numpy(sample_B.copy())
            scorer.record(torch.from_numpy(index_B.copy()), logits_NC[sample_B], label_N[sample_B])
        scorer.end_epoch()
    return {
        window: score.numpy() for window, score in scorer.gather().items()
    }, scorer.gather_labels().numpy()


def same_bits(a, b):
    return {window: score.tobytes() for window, score in a.items()} == {
        window: score.tobytes() for window, score in b.items()
    }


# ---- parity and invariance


@pytest.fixture(scope="module")
def golden_alone():
    """The scores of a foreign loop without process group."""
    return record_golden(0, 1)


@pytest.fixture(scope="module")
def streams_alone():
    return [record_stream(0, 1, *sizes, known=False, **options) for sizes, options in STREAMS]


def test_scores_of_one_process_meet_the_authors_numbers(golden_alone, streams_alone):
    for window, expected in golden_scores().items():
        assert np.abs(golden_alone[window] - expected).max() <= 1e-5 * expected.mean(), window
    for scores, _ in streams_alone:
        assert np.isfinite(scores[Window(6, 3, 0.9)]).all()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLDS)
def test_world_size_batch_and_announced_order_do_not_change_a_bit(
    world_size, golden_alone, streams_alone
):
    for golden, streams in run_ranks(world_size, _all_streams, world_size):
        for scores in golden:
            assert same_bits(scores, golden_alone), "the authors' stream, in batches of 60 and 37"
        for (scores, labels), (expected, expected_labels) in zip(
            streams, (2 + len(TOGETHER)) * streams_alone, strict=True
        ):
            assert same_bits(scores, expected)
            assert np.array_equal(labels, expected_labels)


def _all_streams(rank, world_size):
    return (
        [record_golden(rank, world_size, batch) for batch in (60, 37)],
        [
            record_stream(rank, world_size, *sizes, known=known, route_every=every, **options)
            for known, every in ((False, None), (True, None), *TOGETHER)
            for sizes, options in STREAMS
        ],
    )


@pytest.mark.distributed
def test_offline_scores_from_the_trajectory_are_bitwise_the_live_ones(tmp_path):
    windows = [Window(6, 3, 0.9), Window(5, 4, 0.0), Window(6, 5, 0.3)]
    for preset, (live, label_N) in run_ranks(3, _with_trajectories, windows, tmp_path)[0].items():
        trajectory = Trajectory(tmp_path / preset)
        assert trajectory.num_epochs == 6
        assert np.array_equal(trajectory.labels(), label_N)
        delta_TN = trajectory.read(DELTA_OF_PRESET[preset])
        assert np.isnan(delta_TN[0]).all()
        for window in windows:
            assert score_trajectory(delta_TN, window, preset).tobytes() == live[window].tobytes()


def _with_trajectories(rank, windows, folder):
    return {
        preset: record_stream(
            rank,
            3,
            31,
            12,
            6,
            known=True,
            preset=preset,
            trajectory=folder / preset,
            windows=windows,
        )
        for preset in PRESETS
    }


def test_what_a_float16_trajectory_costs(tmp_path, golden_alone):
    """The numbers in docs/formats.md: relative error against the authors' scores, rank correlation,
    the kept 30 %."""
    live = record_golden(0, 1, batch=600, trajectory=tmp_path, trajectory_dtype=torch.float16)
    assert same_bits(live, golden_alone), "only the trajectory is rough"
    delta_TN = Trajectory(tmp_path).read("delta_official")
    assert delta_TN.dtype == np.float32
    for window, expected in golden_scores().items():
        found = score_trajectory(delta_TN, window, "official")
        error = np.abs(found - expected) / expected
        assert 1e-5 < error.max() < 2e-3, window
        assert error.mean() < 3e-4
        ranks = [
            np.argsort(np.argsort(score, kind="stable"), kind="stable")
            for score in (found, expected)
        ]
        assert np.corrcoef(*ranks)[0, 1] > 0.999998
        assert (ranks[0] >= 420).tolist() == (ranks[1] >= 420).tolist()


def test_labels_are_gathered_once_and_not_by_record(tmp_path, monkeypatch):
    gathered = []
    real = collectives.all_gather_shards
    monkeypatch.setattr(
        collectives, "all_gather_shards", lambda *args: gathered.append(args[0]) or real(*args)
    )
    logits_TNC, label_N = random_stream(8, 3, 3)
    scorer = ShardedScorer(8, 3, [Window(3, 2)], device="cpu", trajectory=tmp_path)
    for epoch, logits_NC in enumerate(logits_TNC):
        scorer.record(torch.arange(8), logits_NC, label_N)
        assert len(gathered) == min(epoch, 1)
        scorer.end_epoch()
        assert len(gathered) == 1
    assert torch.equal(gathered[0], label_N)


def hard_stream(num_samples, num_classes, epochs, seed):
    """Random logits with the cases that break formulas: a certain class, extreme logits, epochs
    that repeat."""
    generator = np.random.default_rng(seed)
    spread_1N1 = generator.choice([0.1, 3.0, 30.0], (1, num_samples, 1))
    logits_TNC = generator.normal(0, spread_1N1, (epochs, num_samples, num_classes))
    logits_TNC[:, 0] = [[60.0] + [0.0] * (num_classes - 1)] * epochs
    logits_TNC[epochs // 2, num_samples // 2] *= 1000.0
    logits_TNC[-1, num_samples - 1] = logits_TNC[-2, num_samples - 1]
    return torch.from_numpy(logits_TNC.astype(np.float32))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLDS)
def test_live_scores_against_a_literal_oracle(world_size):
    """N around multiples of W and below it, K = 2, K as large as it goes, several settings in one
    run."""
    for preset, case, rows, scores in run_ranks(world_size, _oracle_rank, world_size)[0]:
        for window, score_N in scores.items():
            expected = [oracles.tdds(row, window.T, window.K, window.beta, preset) for row in rows]
            np.testing.assert_allclose(
                score_N, expected, rtol=2e-4, atol=2e-5, err_msg=f"{preset} {case} {window}"
            )


def _oracle_rank(rank, world_size):
    W, cases = world_size, []
    sizes = {max(1, W - 1), W, W + 1, 5 * W - 1, 5 * W}
    for (seed, num_samples), preset in itertools.product(enumerate(sizes), PRESETS):
        num_classes, epochs = 2 + seed, 4 + seed
        largest = epochs if preset == "official" else epochs - 1
        windows = [Window(epochs, 2, 0.9), Window(epochs, largest, 0.5), Window(epochs - 1, 2, 0.0)]
        logits_TNC = hard_stream(num_samples, num_classes, epochs, seed)
        scorer = ShardedScorer(num_samples, num_classes, windows, preset, "cpu")
        for epoch in range(epochs):
            order = epoch_order(num_samples, 2 * W, seed=seed, epoch=epoch)
            if seed % 2:
                scorer.expect(order)
            for index_B in order.of_rank(rank, W)[1]:
                index_B = torch.from_numpy(index_B.copy())
                scorer.record(
                    index_B, logits_TNC[epoch, index_B], index_B.clamp_min(0) % num_classes
                )
            scorer.end_epoch()
        scores = {window: score.numpy() for window, score in scorer.gather().items()}
        cases.append(
            (preset, (num_samples, num_classes), logits_TNC.transpose(0, 1).tolist(), scores)
        )
    return cases


def test_float16_log_probabilities_stay_close():
    exact, _ = record_stream(0, 1, 200, 50, 20, known=True)
    rough, _ = record_stream(0, 1, 200, 50, 20, known=True, logp_dtype=torch.float16)
    for window, score_N in exact.items():
        assert 0 < np.abs(rough[window] - score_N).max() < 5e-3 * score_N.mean()


def test_a_window_keeps_its_score_after_its_last_epoch():
    short, _ = record_stream(
        0, 1, 40, 6, 10, known=True, windows=[Window(4, 3, 0.9), Window(6, 3, 0.9)]
    )
    logits_TNC, label_N = random_stream(40, 6, 6)
    scorer = ShardedScorer(40, 6, [Window(4, 3, 0.9)], device="cpu")
    for logits_NC in logits_TNC[:4]:
        scorer.record(torch.arange(40), logits_NC, label_N)
        scorer.end_epoch()
    assert torch.equal(
        scorer.gather()[Window(4, 3, 0.9)], torch.from_numpy(short[Window(4, 3, 0.9)])
    )


# ---- the step


class Forbid(TorchDispatchMode):
    """Fails on operations that make the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not re.search(
            r"_local_scalar_dense|nonzero|masked_select|unique|is_nonzero|equal", name
        ), name
        is_indexing = name.startswith("aten.index.Tensor")
        assert not (
            is_indexing and any(part is not None and part.dtype == torch.bool for part in args[1])
        ), "boolean indexing"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("known", [True, False])
def test_record_never_reads_from_the_device(known):
    scorer = ShardedScorer(12, 4, [Window(3, 2, 0.9)], device="cpu")
    logits_TNC, label_N = random_stream(12, 4, 3)
    for epoch, logits_NC in enumerate(logits_TNC):
        order = epoch_order(12, 4, epoch=epoch)
        if known:
            scorer.expect(order)
        with Forbid():
            for sample_B in torch.from_numpy(order.of_rank(0, 1)[0]):
                scorer.record(sample_B, logits_NC[sample_B], label_N[sample_B])
        scorer.end_epoch()
    for read in (
        lambda: torch.ones(2).sum().item(),
        lambda: torch.ones(2)[torch.tensor([True, False])],
    ):
        with pytest.raises(AssertionError), Forbid():  # the guard itself
            read()


@pytest.mark.distributed
def test_one_collective_per_step_no_byte_more_than_needed_and_the_announced_order_only():
    for (calls, num_bytes), (kind, text) in run_ranks(2, _traffic_and_wrong_order):
        assert calls == 5  # 17 samples in global batches of 4
        assert num_bytes == 5 * 2 * (11 * 4 + 16)
        assert kind == "InputError"
        assert "epoch 1: " in text
        assert "do not follow the order given to expect()" in text


def _traffic_and_wrong_order(rank):
    return _count_traffic(rank), _other_rows_than_announced(rank)


def _count_traffic(rank):
    """Collective calls and bytes of the steps of an epoch."""
    calls = []

    def counted(name, real, *args, **kwargs):
        calls.append(args[1].nbytes if name == "all_to_all_single" else 0)
        return real(*args, **kwargs)

    scorer = ShardedScorer(17, 11, [Window(2, 2, 0.9)], device="cpu")
    order = epoch_order(17, 4)
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "all_to_all_single",
            "all_reduce",
            "all_gather_into_tensor",
            "broadcast",
            "all_gather_object",
        ):
            patch.setattr(dist, name, partial(counted, name, getattr(dist, name)))
        scorer.expect(order)
        for index_B in order.of_rank(rank, 2)[1]:
            B = len(index_B)
            scorer.record(
                torch.from_numpy(index_B.copy()),
                torch.zeros(B, 11),
                torch.zeros(B, dtype=torch.int64),
            )
        return len(calls), sum(calls)


def test_state_is_what_the_design_says():
    """Per row of the shard (one more for padding) log-probabilities, scalars, label and counters;
    per sample averages."""
    for storage, logp_bytes in (("dense", 100 * 4), ("topk:64", 66 * 4 + 65 * 2)):
        scorer = ShardedScorer(
            10_000, 100, [Window(30, 10, 0.9), Window(20, 10, 0.9)], device="cpu", storage=storage
        )
        per_row, per_sample = logp_bytes + len(SCALARS) * 4 + 8 + 4 + 4, 4 + 9 * 4 + 2 * 4
        assert scorer.state_bytes() == 10_001 * per_row + 10_000 * per_sample


@pytest.mark.parametrize(
    ("rows", "num_classes", "expected"),
    [(24, 10, [0] * 137 + [1]), (64, 100, [0] * 6 + [1]), (64, 1000, [0, 1])],
)
def test_small_steps_are_written_together(rows, num_classes, expected, monkeypatch):
    """As many updates after each `record` as there are rows for: one call for many steps, where
    each is worth little."""
    from tdds_dist.scoring import scorer as module

    updates, real = [], module.update
    monkeypatch.setattr(module, "update", lambda *args: updates.append(args[1]) or real(*args))
    scorer = ShardedScorer(rows * len(expected), num_classes, [Window(2, 2)], device="cpu")
    found = []
    for index_B in torch.arange(rows * len(expected)).split(rows):
        scorer.record(index_B, torch.zeros(rows, num_classes), torch.zeros(rows, dtype=torch.int64))
        found.append(len(updates))
    assert found == expected
    scorer.end_epoch()
    assert [part.step for arrived in updates for part in arrived] == list(range(len(expected))), (
        "each once, in order"
    )


def test_logits_may_change_their_dtype_from_step_to_step():
    """As when mixed precision is switched: rows that wait for each other are of one dtype."""
    logits_TNC, label_N = random_stream(12, 4, 2)
    plain, mixed = (ShardedScorer(12, 4, [Window(2, 2)], device="cpu") for _ in range(2))
    for logits_NC in logits_TNC:
        logits_NC = logits_NC.to(torch.bfloat16)
        plain.record(torch.arange(12), logits_NC, label_N)
        for rows, dtype in (
            (slice(0, 3), torch.float32),
            (slice(3, 7), torch.bfloat16),
            (slice(7, 9), torch.float64),
            (slice(9, 12), torch.float32),
        ):
            mixed.record(torch.arange(12)[rows], logits_NC[rows].to(dtype), label_N[rows])
        plain.end_epoch()
        mixed.end_epoch()
    assert torch.equal(
        *(scorer._shard.scalars_MF[:12, 1:].nan_to_num() for scorer in (plain, mixed))
    )


def _other_rows_than_announced(rank):
    scorer = ShardedScorer(8, 3, [Window(2, 2)], device="cpu")
    order = epoch_order(8, 8)
    scorer.expect(order)
    (index_B,) = order.of_rank(1 - rank, 2)[1]  # what the other rank should have
    scorer.record(
        torch.from_numpy(index_B.copy()), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    )
    return catch(scorer.end_epoch)


# ---- what is refused


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_raises_the_same_error(world_size):
    by_rank = run_ranks(world_size, _faulty_epochs, world_size)
    for fault, (kind, words) in FAULTS.items():
        outcomes = {found[fault] for found in by_rank}
        assert len(outcomes) == 1, outcomes
        ((name, text),) = outcomes
        assert name == kind
        for word in words:
            assert word in text, (fault, word, text)


FAULTS = {
    "missing": (
        "CoverageError",
        ["epoch 2", "of 9 samples 1 were not recorded", "0 more than once", "5"],
    ),
    "repeated": (
        "CoverageError",
        ["epoch 2", "0 were not recorded", "1 more than once", "index -1"],
    ),
    "out_of_range": ("InputError", ["epoch 2", "1 recorded indices", "[0, 9)"]),
    "label": ("InputError", ["epoch 2", "1 recorded labels", "[0, 4)"]),
    "nan": ("NonFiniteLogitsError", ["epoch 2", "step 2", "1 samples", "global indices 5"]),
    "inf": ("NonFiniteLogitsError", ["epoch 2", "step 2", "global indices 5"]),
}


def _faulty_epochs(rank, world_size):
    return {fault: _faulty_epoch(rank, world_size, fault) for fault in FAULTS}


def _faulty_epoch(rank, world_size, fault):
    """The error of a second epoch in which sample 5, visited last, is what the fault says."""
    scorer = ShardedScorer(9, 4, [Window(2, 2, 0.9)], device="cpu")
    for epoch in range(2):
        for visited in torch.tensor([[0, 1, 2], [3, 4, 6], [5, 7, 8]]):
            index = visited[rank::world_size].clone()
            logits, label = torch.zeros(len(index), 4), torch.zeros(len(index), dtype=torch.int64)
            if epoch == 1:
                is_hit = index == 5
                index[is_hit] = {"missing": -1, "out_of_range": 9}.get(fault, 5)
                label[is_hit] = 4 if fault == "label" else 0
                logits[is_hit] = float(fault) if fault in ("nan", "inf") else 0.0
            scorer.record(index, logits, label)
        if epoch == 1 and fault == "repeated":
            extra = torch.tensor([5] if rank == 0 else [], dtype=torch.int64)
            scorer.record(
                extra, torch.zeros(len(extra), 4), torch.zeros(len(extra), dtype=torch.int64)
            )
        if epoch == 1:
            return catch(scorer.end_epoch)
        scorer.end_epoch()
    return None


def test_padding_rows_leave_no_trace_even_when_they_hold_nonsense():
    plain, padded = (ShardedScorer(6, 3, [Window(3, 2, 0.9)], device="cpu") for _ in range(2))
    logits_TNC, label_N = random_stream(6, 3, 3)
    for logits_NC in logits_TNC:
        plain.record(torch.arange(6), logits_NC, label_N)
        padded.record(
            torch.tensor([-1, 0, 1, 2, -1, 3, 4, 5]),
            torch.cat(
                [
                    torch.full((1, 3), torch.nan),
                    logits_NC[:3],
                    torch.full((1, 3), torch.inf),
                    logits_NC[3:],
                ]
            ),
            torch.tensor([99, *label_N[:3], -7, *label_N[3:]]),
        )
        plain.end_epoch()
        padded.end_epoch()
    assert torch.equal(plain.gather()[Window(3, 2, 0.9)], padded.gather()[Window(3, 2, 0.9)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"windows": [Window(3, 4, 0.9)]}, "K=4"),
        ({"preset": "authors"}, "preset"),
        ({"windows": []}, "windows"),
        *(
            (
                {name: torch.bfloat16},
                f"{name}=torch.bfloat16 must be torch.float32 or torch.float16",
            )
            for name in ("logp_dtype", "trajectory_dtype")
        ),
    ],
)
def test_settings_are_checked_at_once(options, words):
    kind, text = catch(
        ShardedScorer, 5, 3, **{"windows": [Window(3, 2, 0.9)], "device": "cpu"} | options
    )
    assert kind in ("InputError", "ValueError")
    assert words in text


def test_shapes_are_checked_at_once():
    scorer = ShardedScorer(5, 3, [Window(3, 2, 0.9)], device="cpu")
    good = (torch.arange(2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    for position, wrong in [
        (1, torch.zeros(2, 4)),
        (1, torch.zeros(2, 3, dtype=torch.int64)),
        (0, torch.arange(3)),
        (0, torch.zeros(2)),
        (2, torch.zeros(2)),
    ]:
        assert (
            catch(scorer.record, *good[:position], wrong, *good[position + 1 :])[0] == "ValueError"
        )
    name, text = catch(scorer.gather)
    assert name == "InputError"
    assert "needs 3 epochs, 0 are recorded" in text
    scorer.expect(epoch_order(5, 4))
    assert "does not follow the order" in catch(scorer.record, *good)[1]
