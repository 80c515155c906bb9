"""Visit order, ownership and routing: every sample exactly once, at every world size, checked by
looping over ranks."""

import re
from itertools import chain, product

import numpy as np
import pytest

from tdds_dist.distributed.partition import (
    PADDING,
    EpochOrder,
    class_owners,
    epoch_order,
    routing_counts,
    rows_per_shard,
    shard_bounds,
)
from tdds_dist.errors import InputError
from tdds_dist.training.schedule import per_rank_batch

WORLD_SIZES = range(1, 9)
PER_RANK_BATCHES = (1, 2, 3, 7)


def sizes(world_size: int) -> list[int]:
    """Dataset sizes around multiples of the world size, including fewer samples than ranks."""
    W = world_size
    return sorted({n for n in (1, W - 1, W, W + 1, 5 * W - 1, 5 * W, 97) if n >= 1})


def owner_of(index: int, num_samples: int, world_size: int) -> int:
    """The one rank whose bounds hold the index, by looking at all of them."""
    bounds = [shard_bounds(num_samples, world_size, rank) for rank in range(world_size)]
    (found,) = (rank for rank, (first, end) in enumerate(bounds) if first <= index < end)
    return found


# ---- the visit order of an epoch


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_union_over_ranks_is_every_sample_once(world_size, shuffle):
    """Padding is in the last step only, spread evenly over the ranks, and reads a sample that
    exists."""
    W = world_size
    for N, B in product(sizes(W), PER_RANK_BATCHES):
        order = epoch_order(N, W * B, seed=3, epoch=5, shuffle=shuffle)
        assert order.num_steps == -(-N // (W * B))
        assert (order.index_SG[:-1] != PADDING).all()
        assert order.num_real_S().tolist() == [W * B] * (order.num_steps - 1) + [
            N - W * B * (order.num_steps - 1)
        ]
        assert ((order.sample_SG >= 0) & (order.sample_SG < N)).all()
        real, real_in_last_step = [], []
        for rank in range(W):
            sample_SB, index_SB = order.of_rank(rank, W)
            assert sample_SB.shape == index_SB.shape == (order.num_steps, B)
            assert sample_SB.dtype == index_SB.dtype == np.int64
            is_real_SB = index_SB != PADDING
            np.testing.assert_array_equal(sample_SB[is_real_SB], index_SB[is_real_SB])
            real += index_SB[is_real_SB].tolist()
            real_in_last_step.append(int(is_real_SB[-1].sum()))
        assert sorted(real) == list(range(N)), (N, B)
        assert max(real_in_last_step) - min(real_in_last_step) <= 1


@pytest.mark.parametrize("num_samples", [1, 23, 24, 25, 47, 97, 240])
def test_the_same_samples_meet_at_every_world_size(num_samples):
    order = epoch_order(num_samples, 24, seed=7, epoch=2)
    for step in range(order.num_steps):
        want = sorted(order.index_SG[step].tolist())
        for W in (1, 2, 3, 4, 6, 8):
            met = [order.of_rank(rank, W)[1][step].tolist() for rank in range(W)]
            assert sorted(chain.from_iterable(met)) == want
            assert all(len(rows) == 24 // W for rows in met)


def test_every_seed_and_epoch_has_its_own_order():
    """Also epoch 0 of different seeds, and pairs with equal products or sums; the global batch
    plays no part."""
    orders = {
        (seed, epoch): epoch_order(97, 8, seed=seed, epoch=epoch)
        for seed in range(5)
        for epoch in range(5)
    }
    assert len({order.sample_SG.tobytes() for order in orders.values()}) == len(orders)
    for (seed, epoch), order in orders.items():
        again = epoch_order(97, 8, seed=seed, epoch=epoch)
        np.testing.assert_array_equal(again.sample_SG, order.sample_SG)
        for batch in (1, 8, 96, 97, 98, 1000):
            other = epoch_order(97, batch, seed=seed, epoch=epoch)
            np.testing.assert_array_equal(
                other.index_SG.reshape(-1)[:97], order.index_SG.reshape(-1)[:97]
            )
    np.testing.assert_array_equal(epoch_order(97, 97, shuffle=False).sample_SG[0], np.arange(97))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_kept", [1, 7, 8, 9, 41])
def test_subset_is_visited_once_and_nothing_else(num_kept, shuffle):
    subset = np.sort(np.random.default_rng(0).permutation(100)[:num_kept])
    order = epoch_order(num_kept, 8, seed=1, shuffle=shuffle, subset=subset)
    real = order.index_SG[order.index_SG != PADDING]
    np.testing.assert_array_equal(np.sort(real), subset)
    assert np.isin(order.sample_SG, subset).all()
    if not shuffle:
        np.testing.assert_array_equal(real, subset)


def test_resume_continues_the_same_order():
    order = epoch_order(97, 8, seed=1, epoch=3)
    for step in range(order.num_steps + 1):
        rest = order.from_step(step)
        assert rest.num_steps == order.num_steps - step
        np.testing.assert_array_equal(rest.sample_SG, order.sample_SG[step:])
        np.testing.assert_array_equal(rest.index_SG, order.index_SG[step:])


@pytest.mark.parametrize(("num_samples", "global_batch_size"), [(0, 4), (-1, 4), (4, 0)])
def test_nothing_to_order(num_samples, global_batch_size):
    with pytest.raises(
        ValueError, match=f"num_samples={num_samples} and global_batch_size={global_batch_size}"
    ):
        epoch_order(num_samples, global_batch_size)


# ---- who owns what


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_shards_tile_the_dataset(world_size):
    for N in [*sizes(world_size), 1000]:
        bounds = [shard_bounds(N, world_size, rank) for rank in range(world_size)]
        assert [0, *(end for _, end in bounds)] == [*(first for first, _ in bounds), N]
        assert all(0 <= end - first <= rows_per_shard(N, world_size) for first, end in bounds)
        assert all(
            owner_of(index, N, world_size) == index // rows_per_shard(N, world_size)
            for index in range(N)
        )


@pytest.mark.parametrize("W", WORLD_SIZES)
def test_classes_are_dealt_evenly(W):
    generator = np.random.default_rng(W)
    for size_C in (
        [1],
        [100, 1, 1, 1],
        [7] * 10,
        [0, 5, 0, 3, 9],
        *(generator.geometric(0.02, 12) for _ in range(20)),
    ):
        label_N = generator.permutation(np.repeat(np.arange(len(size_C)), size_C))
        owner_C = class_owners(label_N, W)
        assert (owner_C.shape, owner_C.dtype) == ((len(size_C),), np.int64)
        load_W = np.bincount(owner_C, weights=size_C, minlength=W)
        assert len(load_W) == W
        assert load_W.sum() == len(label_N)
        assert max(load_W) - min(load_W) <= max(size_C), "within the largest class"
        np.testing.assert_array_equal(
            class_owners(label_N[::-1], W), owner_C, "every rank computes the same"
        )


# ---- what is sent where


def counted_by_hand(order: EpochOrder, W: int, N: int, owner_N: np.ndarray | None) -> np.ndarray:
    """Rows that go from rank s to rank d at each step, [S, W, W], row by row; to their shard, or to
    given owners."""
    sent_SWW = np.zeros((order.num_steps, W, W), dtype=np.int64)
    for source in range(W):
        for step, index_B in enumerate(order.of_rank(source, W)[1]):
            for index in index_B.tolist():
                owner = (
                    source
                    if index == PADDING
                    else owner_of(index, N, W)
                    if owner_N is None
                    else owner_N[index]
                )
                sent_SWW[step, source, owner] += 1
    return sent_SWW


@pytest.mark.parametrize("owners", ["shards", "drawn"])
@pytest.mark.parametrize("W", WORLD_SIZES)
def test_routing_counts(W, owners):
    """Against counting by hand, and that senders and receivers agree, on every row including
    padding.

    Where owners are drawn some ranks own much and some nothing, and the last sample's is not the
    default."""
    for N, B in product(sizes(W), (1, 3)):
        owner_N = np.random.default_rng([W, N, B]).integers(0, W, N) if owners == "drawn" else None
        order = epoch_order(N, W * B, seed=N, epoch=B)
        want_SWW = counted_by_hand(order, W, N, owner_N)
        counts = [routing_counts(order, rank, W, N, owner_N) for rank in range(W)]
        for rank, (sends_SW, receives_SW) in enumerate(counts):
            np.testing.assert_array_equal(sends_SW, want_SWW[:, rank, :])
            np.testing.assert_array_equal(receives_SW, want_SWW[:, :, rank])
            assert (sends_SW.sum(axis=1) == B).all(), "each row goes to one place"
            rest_SW = routing_counts(order.from_step(order.num_steps // 2), rank, W, N, owner_N)[1]
            np.testing.assert_array_equal(rest_SW, receives_SW[order.num_steps // 2 :])


def test_routing_counts_of_a_subset_use_owners_of_the_full_dataset():
    order = epoch_order(6, 4, seed=1, subset=np.array([0, 1, 2, 3, 98, 99]))
    received = [routing_counts(order, rank, 4, 100)[1].sum() for rank in range(4)]
    padding = [(order.of_rank(rank, 4)[1] == PADDING).sum() for rank in range(4)]
    assert (np.array(received) - padding).tolist() == [4, 0, 0, 2]


# ---- the rows of a rank


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 48])
def test_uneven_batch_names_the_nearest_even_ones(world_size, accumulation):
    parts = world_size * accumulation
    assert per_rank_batch(5 * parts, world_size, accumulation) == 5
    for batch in (1, parts - 1, parts + 1, 2 * parts - 1, 1000, 1001):
        if batch % parts == 0:
            continue
        with pytest.raises(InputError) as caught:
            per_rank_batch(batch, world_size, accumulation)
        message = str(caught.value)
        assert message.startswith(f"train.global_batch_size={batch} ")
        assert f"world_size={world_size}" in message
        assert ("accumulation" in message) == (accumulation > 1)
        batches, _, ranks = message.split("; use ")[1].partition(", or start ")
        numbers = [
            [int(number) for number in re.findall(r"\d+", part)] for part in (batches, ranks)
        ]
        below = batch - batch % parts
        assert numbers[0] == [number for number in (below, below + parts) if number]
        assert numbers[1] == [
            size for size in range(1, 2 * world_size + 1) if batch % (size * accumulation) == 0
        ]


def test_a_scaled_batch_names_values_of_the_key_itself():
    """At p = 0.9 a quarter of the batch must still be dealt out evenly."""
    assert per_rank_batch(128, 8, factor=0.25) == 4
    with pytest.raises(
        InputError,
        match=r"batch_size=40 x 0\.25 \(retrain\.batch_size_rule\) .* world_size=8; use 32 or 64, "
        r"or start 1 or 2 or 5 or 10 ranks \(a run that goes on keeps its batch\)$",
    ):
        per_rank_batch(40, 8, factor=0.25)
    assert per_rank_batch(32, 8, factor=0.25) == 1
