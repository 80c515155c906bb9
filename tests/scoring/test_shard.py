"""How previous log-probabilities are kept, rows on their way, and the plain update: against literal
loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from tdds_dist import ShardedScorer, Window
from tdds_dist.config.run import load_config
from tdds_dist.config.scores import parse_storage
from tdds_dist.distributed import collectives
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.errors import InputError
from tdds_dist.runs.checkpoint import Checkpoints
from tdds_dist.scoring.sample_stats import LOGP_FLOOR, SCALARS, log_probabilities
from tdds_dist.scoring.shard import Arrived, DenseRows, Shard, TopKRows, pack, unpack, update
from tests.ranks import catch, run_ranks

CPU = torch.device("cpu")


def some_logp(num_rows, num_classes, spread=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return log_probabilities(torch.randn(num_rows, num_classes, generator=generator) * spread)


def literal_topk(logp, label, num_kept):
    """One row as TopKRows should give it back, in float64: kept values, and the mean probability of
    the others."""
    by_size = sorted(range(len(logp)), key=lambda c: (-logp[c], c))
    kept = {*by_size[:num_kept], label}
    left = [c for c in range(len(logp)) if c not in kept]
    row = list(logp)
    if left:
        largest = max(logp[c] for c in left)
        rest = largest + math.log(sum(math.exp(logp[c] - largest) for c in left) / len(left))
        for c in left:
            row[c] = max(rest, LOGP_FLOOR)
    return row


# ---- storage


@pytest.mark.parametrize("num_classes", [2, 3, 10, 300])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_topk_gives_back_what_a_literal_loop_keeps(num_classes, share):
    num_kept = max(1, round(share * (num_classes - 1)))
    logp_RC = some_logp(40, num_classes)
    label_R = torch.arange(40) % num_classes
    label_R[0] = logp_RC[0].argmax()  # among the K
    label_R[1] = logp_RC[1].argmin()  # not among them
    logp_RC[2] = math.log(1 / num_classes)  # nothing but ties
    rows = TopKRows(50, num_classes, num_kept, torch.float32, CPU)
    row_R = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:40]
    rows.store(row_R, logp_RC, label_R)
    found_RC = rows.load(row_R)
    expected = [
        literal_topk(logp, label, num_kept)
        for logp, label in zip(logp_RC.tolist(), label_R.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found_RC.numpy(), np.array(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(found_RC.gather(1, label_R[:, None]), logp_RC.gather(1, label_R[:, None])), (
        "the label's is exact"
    )
    assert torch.allclose(found_RC.exp().sum(dim=1), torch.ones(40), atol=1e-5), (
        "no probability is lost"
    )
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[row_R] = False
    assert not rows.logp_MJ[untouched].any()


def test_all_but_one_class_are_all():
    """One class is left, and what is left is its own: bit for bit what `DenseRows` keeps, in the
    deep tail as well."""
    for spread in (1.0, 30.0, 3000.0):
        logp_RC, label_R, row_R = some_logp(30, 7, spread), torch.arange(30) % 7, torch.arange(30)
        for dtype in (torch.float32, torch.float16):
            dense, topk = DenseRows(31, 7, dtype, CPU), TopKRows(31, 7, 6, dtype, CPU)
            for rows in (dense, topk):
                rows.store(row_R, logp_RC, label_R)
            assert torch.equal(topk.load(row_R), dense.load(row_R)), (spread, dtype)


def test_rows_without_remaining_probability_stay_finite():
    """A certain row: all others are at the floor, and so is their mean; nothing is infinite, also
    in float16.

    Of equal classes the lowest are kept."""
    logits_RC = torch.tensor(
        [[1e4, 0, 0, 0, -1e4], [3e38, -3e38, 0, 0, 0], [200.0, 0, 0, 0, 0], [3, 3, 1, 3, 3]]
    )
    logp_RC, label_R = log_probabilities(logits_RC), torch.tensor([0, 1, 4, 2])
    for dtype in (torch.float32, torch.float16):
        rows = TopKRows(4, 5, 2, dtype, CPU)
        rows.store(torch.arange(4), logp_RC, label_R)
        found_RC = rows.load(torch.arange(4))
        assert torch.isfinite(found_RC).all()
        assert found_RC.min() >= LOGP_FLOOR
        assert found_RC[2, 1:].tolist() == pytest.approx([-200.0] * 4, rel=1e-3)
        assert rows.class_MJ[2:].tolist() == [[0, 1, 4], [0, 1, 2]]


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(2, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)]
)
def test_classes_take_the_smallest_integer_that_holds_them(num_classes, dtype):
    rows = TopKRows(2, num_classes, 1, torch.float32, CPU)
    logp_RC, first = torch.full((1, num_classes), -20.0), torch.zeros(1, dtype=torch.int64)
    logp_RC[0, -1] = -0.1
    rows.store(first, logp_RC, torch.tensor([num_classes - 2]))
    assert rows.class_MJ.dtype == dtype
    assert rows.class_MJ[0].tolist() == [num_classes - 1, num_classes - 2]
    assert rows.load(first)[0, -1] == pytest.approx(-0.1)


@pytest.mark.parametrize("storage", ["dense", "topk:3"])
def test_what_is_loaded_is_the_callers_own(storage):
    for dtype in (torch.float32, torch.float16):
        shard, row_R = Shard(0, 4, 6, storage, dtype, CPU), torch.arange(4)
        shard.previous.store(row_R, some_logp(4, 6), torch.zeros(4, dtype=torch.int64))
        first = shard.previous.load(row_R).clone()
        shard.previous.load(row_R).fill_(7.0)
        assert torch.equal(shard.previous.load(row_R), first)
        assert first.dtype == torch.float32


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        *(
            (storage, "is unknown; use 'dense', or 'topk:K'")
            for storage in (
                "sparse",
                "topk",
                "topk:",
                "topk:-1",
                "topk:1.5",
                "topk: 3",
                "topk:٣",
                "",
                "topk:" + "9" * 5000,
            )
        ),
        ("topk:0", "K must be at least 1 and less than the 10 classes"),
        ("topk:10", "less than the 10 classes"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(storage, words):
    kind, text = catch(ShardedScorer, 5, 10, [Window(3, 2)], device="cpu", storage=storage)
    assert kind == "InputError"
    assert words in text
    assert "storage=" in text
    assert "\n" not in text


def test_the_config_names_its_key(config_file):
    assert parse_storage("topk:9", 10) == 9
    assert parse_storage("dense", 10) is None
    assert load_config(config_file).score.storage == "dense"
    assert load_config(config_file, ["score.storage=topk:9"]).score.storage == "topk:9"
    with pytest.raises(InputError, match=r"score\.storage='topk:10'.* use 'dense'"):
        load_config(config_file, ["score.storage=topk:10"])


# ---- rows on their way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_packed_rows_come_out_as_they_went_in(dtype):
    """Also from tensors that are not contiguous."""
    table_XX = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    table_XX[0, 0] = torch.nan
    every_index, every_label = (
        torch.tensor([2**62 + 5, -1, 0, 2**31, -(2**40)]),
        torch.tensor([-3, 2**33 + 1, 0, 5, 7]),
    )
    for num_classes, num_rows in itertools.product((2, 3, 8), (0, 1, 5)):
        logits_BC = table_XX[: 2 * num_rows : 2, : 3 * num_classes : 3]
        index_B, label_B = (
            every_index.repeat_interleave(2)[: 2 * num_rows : 2],
            every_label[:num_rows],
        )
        payload_BX = pack(index_B, label_B, logits_BC)
        assert payload_BX.nbytes == num_rows * (16 + num_classes * dtype.itemsize)
        if num_rows:
            index_R, label_R, logits_RC = unpack(payload_BX, dtype)
            assert torch.equal(index_R, index_B)
            assert torch.equal(label_R, label_B)
            assert torch.equal(
                logits_RC.contiguous().view(torch.uint8), logits_BC.contiguous().view(torch.uint8)
            )


# ---- the plain update


def tables_after(parts, num_rows, num_classes, has_previous, storage="dense", quarantines=False):
    """Tables of a shard over indices 100 .. 100 + num_rows - 1 after an epoch of the same rows, and
    these parts."""
    shard = Shard(100, 100 + num_rows, num_classes, storage, torch.float32, CPU)
    if has_previous:
        row_R = torch.arange(num_rows)
        shard.previous.store(row_R, some_logp(num_rows, num_classes, seed=5), row_R % num_classes)
    for group in parts:
        update(shard, group, has_previous, quarantines)
    return shard, {name: table[:num_rows].clone() for name, table in shard.tables().items()}


@pytest.mark.parametrize("storage", ["dense", "topk:3"])
@pytest.mark.parametrize(("num_classes", "num_rows"), [(4, 90), (1000, 30), (40_000, 4)])
@pytest.mark.parametrize("has_previous", [True, False])
def test_no_company_changes_a_bit(num_classes, num_rows, has_previous, storage):
    """Rows alone, together, as parts of several steps, in blocks, by two threads, with padding
    between them.

    A block of rows never shrinks to one: of more than 2^15 classes a single row would be summed by
    threads."""
    generator = torch.Generator().manual_seed(2)
    logits_BC = torch.randn(num_rows, num_classes, generator=generator) * 4
    index_B, label_B = torch.arange(100, 100 + num_rows), torch.arange(num_rows) % num_classes

    def part(rows, step=0):
        return Arrived(pack(index_B[rows], label_B[rows], logits_BC[rows]), torch.float32, step)

    padding = Arrived(
        pack(torch.tensor([-1]), torch.tensor([9]), torch.full((1, num_classes), torch.nan)),
        torch.float32,
        0,
    )
    half = num_rows // 2
    ways = {
        "together": [[part(slice(None))]],
        "alone": [[part(slice(row, row + 1))] for row in range(num_rows)],
        "steps": [[part(slice(0, 1), 3), part(slice(1, half), 4), part(slice(half, None), 5)]],
        "padded": [
            [padding, part(slice(0, half)), padding],
            [padding],
            [part(slice(half, None)), padding],
        ],
        "backwards": [[part(torch.arange(num_rows - 1, -1, -1))]],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = {
            name: tables_after(parts, num_rows, num_classes, has_previous, storage)[1]
            for name, parts in ways.items()
        }
    finally:
        torch.set_num_threads(threads)
    together = found["together"]
    for name, tables in found.items():
        for table, expected in together.items():
            assert torch.equal(tables[table].view(torch.uint8), expected.view(torch.uint8)), (
                name,
                table,
            )
    assert together["visits"].tolist() == [1] * num_rows
    assert together["scalars"][:, :3].isnan().all() == (not has_previous)
    if storage == "dense":
        assert torch.equal(together["logp"], log_probabilities(logits_BC))


def test_what_is_counted_as_bad():
    logits_BC = torch.zeros(9, 4)
    logits_BC[3, 1], logits_BC[4, 3], logits_BC[5, 0], logits_BC[8, 2] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.nan,
    )
    logits_BC[1, 0] = torch.nan  # padding, in an earlier step than any other
    logits_BC[2] = torch.tensor([3e38, 3e38, -3e38, 3e38])  # finite, though its sum is not
    index_B = torch.tensor([100, -1, 101, 102, 103, 104, 99, 106, -1])  # the shard is 100 .. 105
    label_B = torch.tensor([4, 7, 3, -1, 0, 0, 9, 9, 9])
    group = [
        Arrived(pack(index_B[rows], label_B[rows], logits_BC[rows]), torch.float32, step)
        for rows, step in ((slice(0, 3), 11), (slice(3, 5), 12), (slice(5, 9), 13))
    ]
    shard, tables = tables_after([group], 6, 4, has_previous=False)
    assert (shard.bad_index.item(), shard.bad_label.item(), shard.nonfinite_step.item()) == (
        2,
        2,
        12,
    )
    assert tables["nonfinite"].tolist() == [0, 0, 1, 1, 1, 0]
    assert tables["visits"].tolist() == [1, 1, 1, 1, 1, 0]
    assert tables["label"].tolist() == [3, 3, 0, 0, 0, 0]
    assert tables["scalars"][:2, 3:].isfinite().all()
    _, quarantined = tables_after([group], 6, 4, has_previous=False, quarantines=True)
    assert quarantined["scalars"][2:5, 3].tolist() == [0.25] * 3, "as a row of zeros"
    assert torch.equal(quarantined["scalars"][:2, 3:], tables["scalars"][:2, 3:])
    shard.begin_epoch()
    assert not shard.visits_M.any()
    assert not shard.nonfinite_M.any()
    assert shard.nonfinite_step > 10**18


def test_labels_and_extremes_have_no_order_of_their_own():
    """`correct` and margins where logits are equal: the first of the largest is the prediction."""
    logits_BC = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 1, 1], [2, 2, 2], [2, 2, 2]])
    parts = [
        [
            Arrived(
                pack(torch.arange(100, 105), torch.tensor([0, 1, 2, 0, 2]), logits_BC),
                torch.float32,
                0,
            )
        ]
    ]
    _, tables = tables_after(parts, 5, 3, has_previous=True)
    assert tables["scalars"][:, SCALARS.index("correct")].tolist() == [1, 0, 0, 1, 0]
    assert tables["scalars"][:, SCALARS.index("logit_margin")].tolist() == [0, 0, 0, 0, 0]
    assert tables["scalars"][:, SCALARS.index("p_margin")].tolist() == [0, 0, 0, 0, 0]


# ---- the scorer with topk


WINDOWS = [Window(5, 3, 0.9), Window(4, 4, 0.0)]


def trained_stream(num_samples, num_classes, epochs):
    """Logits of a network that learns: the label's rises, some classes stay close to it, noise on
    all."""
    generator = torch.Generator().manual_seed(7)
    label_N = torch.randint(num_classes, (num_samples,), generator=generator)
    base_NC = torch.randn(num_samples, num_classes, generator=generator) * 2
    pace_N = torch.rand(num_samples, generator=generator) * 3
    logits = []
    for epoch in range(epochs):
        now_NC = base_NC + 0.5 * torch.randn(num_samples, num_classes, generator=generator)
        now_NC[torch.arange(num_samples), label_N] += pace_N * epoch
        logits.append(now_NC)
    return logits, label_N


def scored(storage):
    logits_TNC, label_N = trained_stream(61, 30, 5)
    scorer = ShardedScorer(61, 30, WINDOWS, "official", "cpu", storage=storage)
    for epoch, logits_NC in enumerate(logits_TNC):
        record_epoch(scorer, 0, 1, epoch, logits_NC, label_N)
    return torch.stack(list(scorer.gather().values())).numpy()


def record_epoch(
    scorer, rank, world_size, epoch, logits_NC, label_N, known=True, steps=slice(None)
):
    order = epoch_order(len(label_N), 24, seed=3, epoch=epoch)
    if known:
        scorer.expect(order, first_step=steps.start or 0)
    for sample_B, index_B in list(zip(*order.of_rank(rank, world_size), strict=True))[steps]:
        sample_B = torch.from_numpy(sample_B.copy())
        scorer.record(torch.from_numpy(index_B.copy()), logits_NC[sample_B], label_N[sample_B])
    if steps.stop is None:
        scorer.end_epoch()


def test_fewer_kept_classes_cost_more_and_all_but_one_cost_nothing():
    exact_AN = scored("dense")
    errors = {
        num_kept: np.abs(scored(f"topk:{num_kept}") - exact_AN).mean()
        for num_kept in (1, 3, 6, 12, 20, 29)
    }
    assert list(errors.values()) == sorted(errors.values(), reverse=True), errors
    assert errors[29] <= 1e-6 * exact_AN.mean()
    assert 1e-3 * exact_AN.mean() < errors[12] < 0.1 * exact_AN.mean()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (3, 1),
        *(pytest.param(*worlds, marks=pytest.mark.slow) for worlds in ((1, 3), (2, 4), (4, 2))),
    ],
)
def test_topk_goes_on_in_the_middle_of_an_epoch_on_other_ranks(saved, resumed, tmp_path):
    """That world sizes give the same bits is tested in test_scorer.py."""
    alone = scored("topk:4")
    run_ranks(saved, _save_in_epoch_3, saved, tmp_path)
    for found in run_ranks(resumed, _resume_in_epoch_3, tmp_path):
        assert found.tobytes() == alone.tobytes()


def _save_in_epoch_3(rank, world_size, folder):
    logits_TNC, label_N = trained_stream(61, 30, 5)
    scorer = ShardedScorer(61, 30, WINDOWS, "official", "cpu", storage="topk:4")
    for epoch in range(4):
        record_epoch(
            scorer,
            rank,
            world_size,
            epoch,
            logits_TNC[epoch],
            label_N,
            steps=slice(0, 2 if epoch == 3 else None),
        )
    checkpoints = Checkpoints(folder, scorer.world, asynchronous=False)
    checkpoints.save(1, scorer.state_dict(), {})
    checkpoints.close()


def _resume_in_epoch_3(rank, folder):
    logits_TNC, label_N = trained_stream(61, 30, 5)
    scorer = ShardedScorer(61, 30, WINDOWS, "official", "cpu", storage="topk:4")
    checkpoints, state = Checkpoints(folder, scorer.world), scorer.state_dict()
    checkpoints.load(checkpoints.latest(), state)
    scorer.load_state_dict(state)
    assert (scorer.epoch, scorer.step) == (3, 2)
    for epoch in (3, 4):
        steps = slice(2 if epoch == 3 else 0, None)
        record_epoch(
            scorer, rank, scorer.world.world_size, epoch, logits_TNC[epoch], label_N, steps=steps
        )
    checkpoints.close()
    collectives.barrier()
    return torch.stack(list(scorer.gather().values())).numpy()


@pytest.mark.parametrize(
    ("saved", "resumed", "words"),
    [
        ("dense", "topk:2", "another storage than 'topk:2'; resume with the one it was saved with"),
        ("topk:2", "dense", "another storage than 'dense'"),
        ("topk:2", "topk:3", "(9, 4), not torch.float32 (9, 5); resume with the num_samples"),
    ],
)
def test_a_state_of_another_storage_is_refused(saved, resumed, words):
    first, second = (
        ShardedScorer(9, 6, [Window(3, 2)], device="cpu", storage=storage)
        for storage in (saved, resumed)
    )
    kind, text = catch(second.load_state_dict, first.state_dict())
    assert kind == "InputError"
    assert words in text
    assert "storage" in text
    assert "\n" not in text


def test_quarantine_and_padding_with_topk():
    """One sample is not finite in one epoch, padding holds nonsense: the others' scores are those
    of a stream without both."""
    logits_TNC, label_N = trained_stream(200, 12, 5)
    plain, hurt = (
        ShardedScorer(200, 12, WINDOWS, device="cpu", storage="topk:3", on_nan="quarantine")
        for _ in range(2)
    )
    for epoch, logits_NC in enumerate(logits_TNC):
        record_epoch(plain, 0, 1, epoch, logits_NC, label_N)
        broken_NC = logits_NC.clone()
        broken_NC[17, 5] = torch.nan if epoch == 2 else broken_NC[17, 5]
        hurt.record(torch.tensor([-1, -1]), torch.full((2, 12), torch.nan), torch.tensor([99, 3]))
        record_epoch(hurt, 0, 1, epoch, broken_NC, label_N, known=False)
    assert hurt.quarantined() == {17: 2}
    others = torch.arange(200) != 17
    for window, score_N in plain.gather().items():
        assert torch.equal(hurt.gather()[window][others], score_N[others])
