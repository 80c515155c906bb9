"""Visit order, ownership and routing: every sample exactly once, at every world size, checked by looping over ranks."""

import re
from itertools import chain, pairwise

import numpy as np
import pytest

from tdds_dist.errors import InputError
from tdds_dist.partition import (
    PADDING,
    EpochOrder,
    class_owners,
    epoch_order,
    per_rank_batch,
    routing_counts,
    rows_per_shard,
    shard_bounds,
)

WORLD_SIZES = range(1, 9)
PER_RANK_BATCHES = (1, 2, 3, 7)


def sizes(world_size: int) -> list[int]:
    """Dataset sizes around multiples of the world size, including fewer samples than ranks."""
    W = world_size
    return sorted({n for n in (1, W - 1, W, W + 1, 5 * W - 1, 5 * W, 97) if n >= 1})


CASES = [(N, W, B) for W in WORLD_SIZES for N in sizes(W) for B in PER_RANK_BATCHES]


def owner_of(index: int, num_samples: int, world_size: int) -> int:
    """The one rank whose bounds hold the index, by looking at all of them."""
    found = []
    for rank in range(world_size):
        first, end = shard_bounds(num_samples, world_size, rank)
        if first <= index < end:
            found.append(rank)
    assert len(found) == 1, (index, found)
    return found[0]


# ---- the visit order of an epoch


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_union_over_ranks_is_every_sample_once(world_size, shuffle):
    for N in sizes(world_size):
        for B in PER_RANK_BATCHES:
            order = epoch_order(N, world_size * B, seed=3, epoch=5, shuffle=shuffle)
            real = []
            for rank in range(world_size):
                sample_SB, index_SB = order.of_rank(rank, world_size)
                assert sample_SB.shape == index_SB.shape == (order.num_steps, B)
                assert sample_SB.dtype == index_SB.dtype == np.int64
                is_real_SB = index_SB != PADDING
                np.testing.assert_array_equal(sample_SB[is_real_SB], index_SB[is_real_SB])
                real += index_SB[is_real_SB].tolist()
            assert sorted(real) == list(range(N)), (N, B)
            assert order.num_steps == -(-N // (world_size * B))


@pytest.mark.parametrize(("N", "W", "B"), CASES)
def test_padding_is_in_the_last_step_only_and_spread_evenly(N, W, B):
    order = epoch_order(N, W * B, seed=1)
    assert (order.index_SG[:-1] != PADDING).all()
    assert order.num_real_S().tolist() == [W * B] * (order.num_steps - 1) + [N - W * B * (order.num_steps - 1)]
    assert order.num_real_S()[-1] >= 1
    assert ((order.sample_SG >= 0) & (order.sample_SG < N)).all(), "padding rows read a sample that exists"
    real_of_rank = [int((order.of_rank(rank, W)[1][-1] != PADDING).sum()) for rank in range(W)]
    assert max(real_of_rank) - min(real_of_rank) <= 1


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
    """Also epoch 0 of different seeds, and pairs with equal products or sums."""
    orders = {(seed, epoch): epoch_order(97, 8, seed=seed, epoch=epoch) for seed in range(5) for epoch in range(5)}
    assert len({order.sample_SG.tobytes() for order in orders.values()}) == len(orders)
    for (seed, epoch), order in orders.items():
        again = epoch_order(97, 8, seed=seed, epoch=epoch)
        np.testing.assert_array_equal(again.sample_SG, order.sample_SG)
        np.testing.assert_array_equal(again.index_SG, order.index_SG)


def test_order_does_not_depend_on_the_global_batch():
    orders = [epoch_order(97, batch, seed=1, epoch=4).index_SG.reshape(-1)[:97] for batch in (1, 8, 96, 97, 98, 1000)]
    assert all(np.array_equal(orders[0], other) for other in orders)


def test_shuffled_order_is_no_identity_and_unshuffled_is():
    assert not np.array_equal(epoch_order(97, 97).sample_SG[0], np.arange(97))
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
    with pytest.raises(ValueError, match=f"num_samples={num_samples} and global_batch_size={global_batch_size}"):
        epoch_order(num_samples, global_batch_size)


# ---- who owns what


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_shards_tile_the_dataset(world_size):
    for N in [*sizes(world_size), 1000]:
        bounds = [shard_bounds(N, world_size, rank) for rank in range(world_size)]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == N
        assert all(a[1] == b[0] for a, b in pairwise(bounds))
        assert all(0 <= end - first <= rows_per_shard(N, world_size) for first, end in bounds)
        for index in range(N):
            assert owner_of(index, N, world_size) == index // rows_per_shard(N, world_size)


def test_owners_of_classes_by_hand():
    """Sizes 3, 5, 4, 3, 3: the 5 to rank 0, the 4 to rank 1, then 3 to 1 (4 < 5), 3 to 0 (5 < 7), 3 to 1 (7 < 8)."""
    label_N = np.repeat([0, 1, 2, 3, 4], [3, 5, 4, 3, 3])
    assert class_owners(label_N, 2).tolist() == [1, 0, 1, 0, 1]
    assert class_owners(label_N, 1).tolist() == [0, 0, 0, 0, 0]
    assert sorted(class_owners(label_N, 5).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(class_owners(label_N, 8).tolist()) == [0, 1, 2, 3, 4], "three ranks keep nothing"


@pytest.mark.parametrize("W", WORLD_SIZES)
def test_classes_are_dealt_evenly(W):
    generator = np.random.default_rng(W)
    for size_C in ([1], [100, 1, 1, 1], [7] * 10, [0, 5, 0, 3, 9], *(generator.geometric(0.02, 12) for _ in range(20))):
        label_N = generator.permutation(np.repeat(np.arange(len(size_C)), size_C))
        owner_C = class_owners(label_N, W)
        assert owner_C.shape == (len(size_C),)
        assert owner_C.dtype == np.int64
        assert ((owner_C >= 0) & (owner_C < W)).all()
        load = [sum(int(size) for size, owner in zip(size_C, owner_C, strict=True) if owner == rank) for rank in range(W)]
        assert sum(load) == len(label_N)
        assert max(load) - min(load) <= max(size_C), "within the largest class"
        np.testing.assert_array_equal(class_owners(label_N[::-1], W), owner_C, "every rank computes the same")


# ---- what is sent where


def counted_by_hand(order: EpochOrder, W: int, N: int, owners: list[int] | None = None) -> np.ndarray:
    """Rows that go from rank s to rank d at each step, [S, W, W], row by row; to their shard, or to `owners`."""
    sent_SWW = np.zeros((order.num_steps, W, W), dtype=np.int64)
    for source in range(W):
        for step, index_B in enumerate(order.of_rank(source, W)[1]):
            for index in index_B.tolist():
                if index == PADDING:
                    destination = source
                else:
                    destination = owner_of(index, N, W) if owners is None else owners[index]
                sent_SWW[step, source, destination] += 1
    return sent_SWW


@pytest.mark.parametrize("W", WORLD_SIZES)
def test_routing_counts(W):
    """Against counting by hand, and that senders and receivers agree, on every row including padding."""
    for N in sizes(W):
        for B in (1, 3):
            order = epoch_order(N, W * B, seed=N, epoch=B)
            want_SWW = counted_by_hand(order, W, N)
            counts = [routing_counts(order, rank, W, N) for rank in range(W)]
            for rank, (sends_SW, receives_SW) in enumerate(counts):
                assert sends_SW.shape == receives_SW.shape == (order.num_steps, W)
                np.testing.assert_array_equal(sends_SW, want_SWW[:, rank, :])
                np.testing.assert_array_equal(receives_SW, want_SWW[:, :, rank])
                assert (sends_SW.sum(axis=1) == B).all(), "each row goes to one place"
                for other in range(W):
                    np.testing.assert_array_equal(sends_SW[:, other], counts[other][1][:, rank])
            assert sum(receives_SW.sum() for _, receives_SW in counts) == order.index_SG.size


@pytest.mark.parametrize("W", WORLD_SIZES)
def test_routing_counts_to_given_owners(W):
    """As to shards; owners are drawn, so some ranks own much and some nothing, and the last sample's is not the default."""
    for N in sizes(W):
        for B in (1, 3):
            owner_N = np.random.default_rng([W, N, B]).integers(0, W, N)
            order = epoch_order(N, W * B, seed=N, epoch=B)
            want_SWW = counted_by_hand(order, W, N, owner_N.tolist())
            for rank in range(W):
                sends_SW, receives_SW = routing_counts(order, rank, W, N, owner_N)
                np.testing.assert_array_equal(sends_SW, want_SWW[:, rank, :])
                np.testing.assert_array_equal(receives_SW, want_SWW[:, :, rank])


def test_routing_counts_of_the_rest_of_an_epoch():
    order = epoch_order(97, 12, seed=1)
    for rank in range(3):
        whole, rest = routing_counts(order, rank, 3, 97), routing_counts(order.from_step(4), rank, 3, 97)
        for whole_SW, rest_SW in zip(whole, rest, strict=True):
            np.testing.assert_array_equal(whole_SW[4:], rest_SW)


def test_routing_counts_of_a_subset_use_owners_of_the_full_dataset():
    subset = np.array([0, 1, 2, 3, 98, 99])
    order = epoch_order(6, 4, seed=1, subset=subset)
    received = [routing_counts(order, rank, 4, 100)[1].sum() for rank in range(4)]
    padding = [(order.of_rank(rank, 4)[1] == PADDING).sum() for rank in range(4)]
    assert (np.array(received) - padding).tolist() == [4, 0, 0, 2]


# ---- the rows of a rank


def test_per_rank_batch_divides_evenly():
    for W in WORLD_SIZES:
        for accumulation in (1, 2, 3):
            for rows in (1, 5):
                assert per_rank_batch(W * accumulation * rows, W, accumulation) == rows


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 48])
def test_uneven_batch_names_the_nearest_even_ones(world_size, accumulation):
    parts = world_size * accumulation
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
        named = [int(number) for number in re.findall(r"\d+", batches)]
        valid = [number for number in range(1, batch + parts + 1) if number % parts == 0]
        below, above = [n for n in valid if n < batch][-1:], [n for n in valid if n > batch][:1]
        assert named == below + above
        for number in named:
            assert per_rank_batch(number, world_size, accumulation) * parts == number
        sizes = [int(number) for number in re.findall(r"\d+", ranks)]
        assert sizes == [size for size in range(1, 2 * world_size + 1) if batch % (size * accumulation) == 0]
        for size in sizes:
            assert per_rank_batch(batch, size, accumulation) * size * accumulation == batch


def test_a_scaled_batch_names_values_of_the_key_itself():
    """At p = 0.9 a quarter of the batch must still be dealt out evenly."""
    assert per_rank_batch(128, 8, factor=0.25) == 4
    with pytest.raises(InputError, match=r"batch_size=40 x 0\.25 \(retrain\.batch_size_rule\) .* world_size=8; use 32 or 64, "
                       r"or start 1 or 2 or 5 or 10 ranks \(a run that goes on keeps its batch\)$"):
        per_rank_batch(40, 8, factor=0.25)
    assert per_rank_batch(32, 8, factor=0.25) == 1
