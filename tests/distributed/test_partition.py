"""Visit order, ownership and routing: every sample exactly once, at every world size, checked by
looping over ranks."""

import re
import time
import tracemalloc
from itertools import chain, pairwise, product

import numpy as np
import pytest

from tdds_dist.distributed import orders
from tdds_dist.distributed.partition import (
    PADDING,
    EpochOrder,
    SplitSizes,
    class_owners,
    epoch_order,
    routing_counts,
    rows_per_shard,
    shard_bounds,
)
from tdds_dist.errors import InputError
from tdds_dist.training.schedule import per_rank_batch
from tests.make import refused

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


@pytest.mark.usefixtures("both_kinds")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_union_over_ranks_is_every_sample_once(world_size, shuffle):
    """Padding is in the last step only, spread evenly over the ranks, and reads a sample that
    exists."""
    W = world_size
    for N, B in product(sizes(W), PER_RANK_BATCHES):
        order = epoch_order(N, W * B, seed=3, epoch=5, shuffle=shuffle)
        assert order.num_steps == -(-N // (W * B))
        sample_SG, index_SG = order.of_rank(0, 1)
        assert (index_SG[:-1] != PADDING).all()
        real_S = [order.num_real(step) for step in range(order.num_steps)]
        assert real_S == (index_SG != PADDING).sum(axis=1).tolist()
        assert ((sample_SG >= 0) & (sample_SG < N)).all()
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
        want = sorted(order.of_rank(0, 1)[1][step].tolist())
        for W in (1, 2, 3, 4, 6, 8):
            met = [order.of_rank(rank, W)[1][step].tolist() for rank in range(W)]
            assert sorted(chain.from_iterable(met)) == want
            assert all(len(rows) == 24 // W for rows in met)


def test_every_seed_and_epoch_has_its_own_order():
    """Also epoch 0 of different seeds, and pairs with equal products or sums; the global batch
    plays no part."""

    def visited(batch, **options):
        return epoch_order(97, batch, **options).of_rank(0, 1)[0].reshape(-1)[:97]

    found = {key: visited(8, seed=key[0], epoch=key[1]) for key in product(range(5), range(5))}
    assert len({index_N.tobytes() for index_N in found.values()}) == len(found)
    for (seed, epoch), index_N in found.items():
        for batch in (1, 8, 96, 97, 98, 1000):
            np.testing.assert_array_equal(visited(batch, seed=seed, epoch=epoch), index_N)
    np.testing.assert_array_equal(visited(97, shuffle=False), np.arange(97))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_kept", [1, 7, 8, 9, 41])
def test_subset_is_visited_once_and_nothing_else(num_kept, shuffle):
    subset = np.sort(np.random.default_rng(0).permutation(100)[:num_kept])
    order = epoch_order(num_kept, 8, seed=1, shuffle=shuffle, subset=subset)
    sample_SG, index_SG = order.of_rank(0, 1)
    real = index_SG[index_SG != PADDING]
    np.testing.assert_array_equal(np.sort(real), subset)
    assert np.isin(sample_SG, subset).all()
    if not shuffle:
        np.testing.assert_array_equal(real, subset)


@pytest.mark.usefixtures("both_kinds")
def test_any_steps_come_without_the_others():
    order = epoch_order(97, 8, seed=1, epoch=3)
    whole = order.of_rank(1, 2)
    for first, end in product(range(order.num_steps + 1), repeat=2):
        if first <= end:
            for part, all_steps in zip(order.of_rank(1, 2, first, end), whole, strict=True):
                np.testing.assert_array_equal(part, all_steps[first:end])


# ---- orders that are kept whole, and those of which nothing is kept


@pytest.fixture(params=["permutation", "bijection"])
def both_kinds(request, monkeypatch):
    """Both ways to make an order, whatever its length."""
    if request.param == "bijection":
        monkeypatch.setattr(orders, "LARGEST_PERMUTATION", 0)


def test_orders_up_to_16_million_samples_are_numpys_permutations():
    """Runs of all versions resume with the order that they were started with."""
    for num_samples, seed, epoch in [(1, 0, 0), (1437, 2, 7), (70_000, 0, 1)]:
        want = np.random.default_rng([seed, epoch]).permutation(num_samples)
        order = epoch_order(num_samples, num_samples, seed=seed, epoch=epoch)
        np.testing.assert_array_equal(order.of_rank(0, 1)[0][0], want)
    assert orders.LARGEST_PERMUTATION * 4 == 64 << 20


@pytest.mark.parametrize(
    ("num_samples", "want"),
    [
        (1 << 32, None),
        (10**9, [547574584, 148777142, 564132153, 704258890]),
        (10**11, [10434523859, 89291047786, 78132052168, 74484002497]),
    ],
)
def test_longer_orders_stay_as_they_are(num_samples, want):
    """In 32 and in 64 bits; a run goes on with the order that it was started with."""
    order = epoch_order(num_samples, 4, seed=1, epoch=2)
    found = order.of_rank(0, 1, 7, 8)[0].tolist()
    assert found == [want] or (want is None and max(found[0]) < num_samples)


def bijection(num_samples: int, *key: int) -> np.ndarray:
    return orders._Bijection(num_samples, [*key])(np.arange(num_samples))


def test_the_bijection_is_one_to_one_at_every_length():
    for num_samples in [*range(1, 70), 1023, 1024, 1025, 100_003]:
        for epoch in range(3):
            index_N = bijection(num_samples, num_samples, epoch)
            assert index_N.dtype == np.int64
            np.testing.assert_array_equal(np.sort(index_N), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [1000, 1 << 14, 40_009])
def test_the_bijection_looks_like_a_random_order(num_samples):
    """Of 200 epochs each statistic has the mean and spread that random permutations have: index
    against position, against the next position, and against the next epoch; the same for odd and
    even; a table of 16 x 16 stretches of positions and indices; fixed points."""
    found = [bijection(num_samples, seed, epoch) for seed in range(2) for epoch in range(100)]
    position_N = np.arange(num_samples)

    def correlations(pairs):
        return [np.corrcoef(*pair)[0, 1] * np.sqrt(num_samples) for pair in pairs]

    def stretches(index_N):
        cell_N = position_N * 16 // num_samples * 16 + index_N * 16 // num_samples
        expected = num_samples / 256
        found = np.bincount(cell_N, minlength=256)
        return (((found - expected) ** 2 / expected).sum() - 225) / np.sqrt(450)

    for values in (
        correlations((position_N, index_N) for index_N in found),
        correlations((index_N[:-1], index_N[1:]) for index_N in found),
        correlations(pairwise(found)),
        correlations((position_N % 2, index_N % 2) for index_N in found),
        correlations((index_N[:-1] % 2, index_N[1:] % 2) for index_N in found),
        [stretches(index_N) for index_N in found],
    ):
        assert abs(np.mean(values)) < 4 / np.sqrt(len(values))
        assert 0.8 < np.std(values) < 1.2
    fixed = sum(int((index_N == position_N).sum()) for index_N in found)
    assert abs(fixed - len(found)) < 4 * np.sqrt(len(found))


# ---- orders in blocks

# samples, global batch, rows of a block: one block, fewer than a pool, lanes that end unevenly
BLOCKS = [(1, 4, 3), (97, 8, 100), (97, 12, 5), (1000, 12, 1), (1000, 48, 3), (4999, 96, 7)]


@pytest.mark.parametrize(("num_samples", "batch", "rows"), BLOCKS)
def test_blocks_visit_every_sample_once_in_an_order_of_every_epoch(num_samples, batch, rows):
    """The order is that of any other batch: accumulation may change at a resume."""

    def visited(epoch, batch=batch):
        order = epoch_order(num_samples, batch, seed=1, epoch=epoch, block_rows=rows)
        index_SG = order.of_rank(0, 1)[1]
        return index_SG[index_SG != PADDING]

    for index_N in (visited(0), visited(1)):
        assert index_N.dtype == np.int64
        np.testing.assert_array_equal(np.sort(index_N), np.arange(num_samples))
    assert num_samples == 1 or (visited(0) != visited(1)).any()
    for other in (1, 7, 5 * batch):
        np.testing.assert_array_equal(visited(1), visited(1, other))


@pytest.mark.parametrize(("num_samples", "batch", "rows"), BLOCKS)
@pytest.mark.parametrize("W", [1, 2, 3, 4])
def test_a_rank_finds_its_rows_in_its_pools(num_samples, batch, rows, W):
    subset = np.sort(np.random.default_rng(0).permutation(2 * num_samples)[:num_samples])
    order = epoch_order(num_samples, batch, seed=1, subset=subset, block_rows=rows)
    for rank in range(W):
        for step in range(order.num_steps):
            held = np.concatenate([order.pool(rank, W, each) for each in order.pools_at(step)[:-1]])
            index_B = order.of_rank(rank, W, step, step + 1)[1][0]
            assert np.isin(index_B[index_B != PADDING], held).all()
        whole = range(order.pools_at(order.num_steps)[-1])
        read = np.concatenate([order.pool(rank, W, number) for number in whole])
        assert len(np.unique(read)) == len(read)
        if order.place_at.num_lanes % W == 0 and batch % W == 0:
            assert len(read) == (order.of_rank(rank, W)[1] != PADDING).sum(), "nothing of others"


def test_the_longer_the_file_the_more_lanes_and_no_rank_reads_anothers_blocks():
    order = epoch_order(1_281_167, 1024, seed=1, block_rows=150)  # ImageNet in 16 MB
    assert order.place_at.num_lanes == 64
    step = order.num_steps // 2
    pools = [order.pool(rank, 8, order.pools_at(step)[0]) for rank in range(8)]
    assert [len(pool) for pool in pools] == [8 * 4 * 150] * 8
    assert len(np.unique(np.concatenate(pools))) == 64 * 4 * 150
    for pool in pools:
        runs = np.split(np.sort(pool), np.flatnonzero(np.diff(np.sort(pool)) > 1) + 1)
        assert len(runs) <= 8 * 5, "whole blocks, cut where lanes meet"


def test_rows_of_a_pool_are_mixed():
    """Neighbours in the order are no neighbours in the file, and every lane has blocks from all
    over it."""
    order = epoch_order(64_000, 64, seed=3, block_rows=10)
    index_SG = order.of_rank(0, 1)[0]
    lanes = order.place_at.num_lanes
    lane_S = index_SG[:, ::lanes].reshape(-1)
    assert (np.abs(np.diff(lane_S)) == 1).mean() < 0.15, "1 of 20 rows, and 2 of its 4 blocks"
    assert abs(np.corrcoef(np.arange(len(lane_S)), lane_S)[0, 1]) < 0.3
    places = index_SG.mean(axis=1) / 64_000
    assert abs(places.mean() - 0.5) < 0.01
    assert places.std() < 0.08


def test_a_billion_samples_need_no_memory_and_no_time():
    """A step in the middle of the epoch, of the rows of 1,024 ranks; the limits are loose, the
    numbers are in benchmarks/scaling.py."""
    order = epoch_order(10**9, 32 * 1024, seed=1, epoch=2)
    tracemalloc.start()
    started = time.perf_counter()
    sample_1B, _ = order.of_rank(5, 1024, order.num_steps // 2, order.num_steps // 2 + 1)
    routing_counts(order, 5, 1024, 10**9, None, order.num_steps - 1)
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6
    assert seconds < 1.0
    assert sample_1B.shape == (1, 32)
    assert len(set(sample_1B[0])) == 32
    assert sample_1B.max() > 1 << 24


@pytest.mark.parametrize(("num_samples", "global_batch_size"), [(0, 4), (-1, 4), (4, 0)])
def test_nothing_to_order(num_samples, global_batch_size):
    said = f"num_samples={num_samples} and global_batch_size={global_batch_size}"
    with pytest.raises(ValueError, match=said):
        epoch_order(num_samples, global_batch_size)


# ---- who owns what


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_shards_tile_the_dataset(world_size):
    for N in [*sizes(world_size), 1000]:
        bounds = [shard_bounds(N, world_size, rank) for rank in range(world_size)]
        assert [0, *(end for _, end in bounds)] == [*(first for first, _ in bounds), N]
        rows = rows_per_shard(N, world_size)
        assert all(0 <= end - first <= rows for first, end in bounds)
        assert all(owner_of(index, N, world_size) == index // rows for index in range(N))


@pytest.mark.parametrize("W", WORLD_SIZES)
def test_classes_are_dealt_evenly(W):
    generator = np.random.default_rng(W)
    drawn = (generator.geometric(0.02, 12) for _ in range(20))
    for size_C in ([1], [100, 1, 1, 1], [7] * 10, [0, 5, 0, 3, 9], *drawn):
        label_N = generator.permutation(np.repeat(np.arange(len(size_C)), size_C))
        owner_C = class_owners(label_N, W)
        assert (owner_C.shape, owner_C.dtype) == ((len(size_C),), np.int64)
        load_W = np.bincount(owner_C, weights=size_C, minlength=W)
        assert len(load_W) == W
        assert load_W.sum() == len(label_N)
        assert max(load_W) - min(load_W) <= max(size_C), "within the largest class"
        # every rank computes the same
        np.testing.assert_array_equal(class_owners(label_N[::-1], W), owner_C)


# ---- what is sent where


def counted_by_hand(order: EpochOrder, W: int, N: int, owner_N: np.ndarray | None) -> np.ndarray:
    """Rows that go from rank s to rank d at each step, [S, W, W], row by row; to their shard, or to
    given owners."""
    sent_SWW = np.zeros((order.num_steps, W, W), dtype=np.int64)
    for source in range(W):
        for step, index_B in enumerate(order.of_rank(source, W)[1]):
            for index in index_B.tolist():
                owner = source
                if index != PADDING:
                    owner = owner_of(index, N, W) if owner_N is None else owner_N[index]
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
            half = order.num_steps // 2
            rest_SW = routing_counts(order, rank, W, N, owner_N, half)[1]
            np.testing.assert_array_equal(rest_SW, receives_SW[half:])


@pytest.mark.parametrize("group", [1, 3, 100])
def test_split_sizes_of_groups_are_sums_over_their_steps(group, monkeypatch):
    """Also when a group ends early, as before a checkpoint; three steps are counted at a time."""
    monkeypatch.setattr("tdds_dist.distributed.partition._POSITIONS_AT_ONCE", 3 * 8)
    order = epoch_order(97, 8, seed=1)
    sends_SW, receives_SW = routing_counts(order, 1, 4, 97)
    sizes_of = SplitSizes(order, 1, 4, 97)
    step = 0
    while step < order.num_steps:
        end = min(step + (1 if step == 4 else group), order.num_steps)
        found = sizes_of.take(step, end, end + group)
        sums = [counts[step:end].sum(axis=0).tolist() for counts in (sends_SW, receives_SW)]
        assert [*found] == sums
        step = end


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
        below = batch - batch % parts
        fitting = [number for number in (below, below + parts) if number]
        assert [int(number) for number in re.findall(r"\d+", batches)] == fitting
        sizes = range(1, 2 * world_size + 1)
        fitting = [size for size in sizes if batch % (size * accumulation) == 0]
        assert [int(number) for number in re.findall(r"\d+", ranks)] == fitting


def test_a_scaled_batch_names_values_of_the_key_itself():
    """At p = 0.9 a quarter of the batch must still be dealt out evenly."""
    assert per_rank_batch(128, 8, factor=0.25) == 4
    rule = r"batch_size=40 x 0\.25 \(retrain\.batch_size_rule\) .* world_size=8"
    ranks = r"or start 1 or 2 or 5 or 10 ranks \(a run that goes on keeps its batch\)$"
    refused(f"{rule}; use 32 or 64, {ranks}", per_rank_batch, 40, 8, factor=0.25)
    assert per_rank_batch(32, 8, factor=0.25) == 1
