"""Samples and ranks: which one visits a sample at which step, and which one owns it. Pure index
arithmetic in NumPy.

The order of an epoch is a function of (seed, epoch) alone, cut into global batches; the world size
only decides how each global batch is dealt to ranks. Hence the same samples meet in the same step
at every world size, and every rank can compute what all others send without asking. The last step
of an epoch is filled up with repeats of the epoch's first samples so that all ranks see full
batches; such a padding row carries index -1 and reaches no score.

Any steps can be asked for without those before: `orders` gives the sample at each position.
"""

# G global batch, B rows per rank and step (G = W B), W world size, S steps, N samples, M rows per
# shard (ceil(N / W))

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tdds_dist.distributed.orders import Blocks, shuffled

_POSITIONS_AT_ONCE = 1 << 18  # of an epoch, whose ranks and owners are counted together
ALL = "all"  # digest of the visits to every sample, each with weight 1
PADDING = -1  # global index of a padding row; negative, since loops test `index >= 0`


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The visit order of one epoch, all ranks together; `epoch_order` makes it.

    `place_at` gives the samples at the given positions of the epoch, int64 [P] -> int64 [P]; of a
    `subset` (int64, global indices) those are places in it. Row g of step s is at position s G + g
    and belongs to rank g mod W, so that the real rows of a short last step spread evenly.
    """

    num_samples: int
    global_batch_size: int
    place_at: Callable[[np.ndarray], np.ndarray]
    subset: np.ndarray | None = None

    @property
    def num_steps(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def of_rank(
        self, rank: int, world_size: int, first_step: int = 0, end_step: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (sample_SB, index_SB) of one rank in steps [first_step, end_step), int64
        [S, G / W] each: the samples to read, and the same with PADDING in padding rows. Rank 0 of 1
        has the rows of all."""
        end_step = self.num_steps if end_step is None else end_step
        step_S = np.arange(first_step, end_step, dtype=np.int64)
        row_B = np.arange(rank, self.global_batch_size, world_size)
        position_SB = step_S[:, None] * self.global_batch_size + row_B
        has_padding = end_step >= self.num_steps
        real_SB = position_SB % self.num_samples if has_padding else position_SB
        sample_SB = self._of_subset(self.place_at(real_SB.reshape(-1))).reshape(real_SB.shape)
        if not has_padding:
            return sample_SB, sample_SB
        return sample_SB, np.where(position_SB < self.num_samples, sample_SB, PADDING)

    def pools_at(self, step: int) -> range | None:
        """Return the numbers of the pools that the rows of a step come from, and the next; None
        when the order has no pools."""
        if not isinstance(self.place_at, Blocks):
            return None
        first, last = (
            self.place_at.pool_at(number * self.global_batch_size) for number in (step, step + 1)
        )
        return range(first, last + 2)

    def pool(self, rank: int, world_size: int, number: int) -> np.ndarray:
        """Return the samples of the pools of that number that a rank takes rows from, int64."""
        assert isinstance(self.place_at, Blocks)
        apart = math.gcd(world_size, self.place_at.num_lanes)
        lanes = range(rank % apart, self.place_at.num_lanes, apart)
        return self._of_subset(self.place_at.indices(lanes, number))

    def _of_subset(self, place_P: np.ndarray) -> np.ndarray:
        return place_P if self.subset is None else self.subset[place_P]

    def num_real(self, step: int) -> int:
        """Return the rows of a step that are not padding, over all ranks."""
        return min(self.global_batch_size, self.num_samples - step * self.global_batch_size)


@dataclass(frozen=True, eq=False)
class Visits:
    """The samples that an epoch visits: `subset_M` int64, sorted (None: all), the weight of each in
    the loss by global index, `weight_N` float32 (None: 1), and a hash of both."""

    subset_M: np.ndarray | None = None
    weight_N: np.ndarray | None = None
    digest: str = ALL


def epoch_order(
    num_samples: int,
    global_batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    subset: np.ndarray | None = None,
    block_rows: int | None = None,
) -> EpochOrder:
    """Return the visit order of one epoch over [0, num_samples), or over the global indices
    `subset` (int64 [num_samples], sorted).

    `block_rows`: shuffle within pools of blocks of so many consecutive samples, for files that do
    not fit into memory (`orders.Blocks`).
    """
    if num_samples < 1 or global_batch_size < 1:
        raise ValueError(
            f"num_samples={num_samples} and global_batch_size={global_batch_size} must be at"
            " least 1"
        )
    assert subset is None or len(subset) == num_samples, (num_samples, len(subset))
    place_at: Callable[[np.ndarray], np.ndarray] = np.asarray
    if shuffle and block_rows is not None:
        place_at = Blocks(num_samples, [seed, epoch], block_rows)
    elif shuffle:
        place_at = shuffled(num_samples, [seed, epoch])
    return EpochOrder(num_samples, global_batch_size, place_at, subset)


def rows_per_shard(num_samples: int, world_size: int) -> int:
    """Return M = ceil(N / W), the block length of every shard but the last ones, which may be short
    or empty."""
    return -(-num_samples // world_size)


def shard_bounds(num_samples: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the half-open range of global indices that `rank` owns."""
    rows = rows_per_shard(num_samples, world_size)
    return min(rank * rows, num_samples), min((rank + 1) * rows, num_samples)


def class_owners(label_N: np.ndarray, world_size: int) -> np.ndarray:
    """Return the rank that keeps each class as a whole, int64 [C]: large classes first, each to the
    rank with the fewest samples."""
    size_C = np.bincount(label_N)
    owner_C = np.zeros(len(size_C), dtype=np.int64)
    load_W = np.zeros(world_size, dtype=np.int64)
    for label in np.argsort(-size_C, kind="stable"):
        owner_C[label] = rank = int(load_W.argmin())
        load_W[rank] += size_C[label]
    return owner_C


def routing_counts(
    order: EpochOrder,
    rank: int,
    world_size: int,
    num_samples: int,
    owner_N: np.ndarray | None = None,
    first_step: int = 0,
    end_step: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that `rank` sends to, and receives from, each rank at every step of
    [first_step, end_step): two int64 [S, W].

    A real row goes to the owner of its index (that of its shard, or `owner_N` int64 [N]); a padding
    row stays where it is.
    """
    index_SG = order.of_rank(0, 1, first_step, end_step)[1]
    num_steps = len(index_SG)
    sent_SB = index_SG[:, rank::world_size]
    if owner_N is None:
        first, end = shard_bounds(num_samples, world_size, rank)
        owner_SB = sent_SB // rows_per_shard(num_samples, world_size)
        is_mine_SG = (index_SG >= first) & (index_SG < end)
    else:
        owner_SB, is_mine_SG = owner_N[sent_SB], owner_N[index_SG] == rank
    is_padding_SB = sent_SB == PADDING
    owner_SB[is_padding_SB] = rank
    is_mine_SG[index_SG == PADDING] = False
    is_mine_SG[:, rank::world_size] |= is_padding_SB

    def count(step_R: np.ndarray, rank_R: np.ndarray) -> np.ndarray:
        cell_R = (step_R * world_size + rank_R).reshape(-1)
        return np.bincount(cell_R, minlength=num_steps * world_size).reshape(num_steps, world_size)

    step_R, row_R = np.nonzero(is_mine_SG)
    step_SB = np.arange(num_steps)[:, None]
    return count(step_SB, owner_SB), count(step_R, row_R % world_size)


class SplitSizes:
    """Rows that this rank sends to, and receives from, each rank, in groups of steps that follow
    one another; a thread computes those of the next group meanwhile."""

    def __init__(self, order: EpochOrder, rank: int, world_size: int, num_samples: int):
        self.num_steps = order.num_steps
        self.num_rows = len(range(rank, order.global_batch_size, world_size))  # per step
        self._arguments = (order, rank, world_size, num_samples, None)
        self._thread = ThreadPoolExecutor(1, "split sizes")
        self._next: tuple[tuple[int, int], Future[tuple[list[int], list[int]]]] | None = None

    def take(self, first_step: int, end_step: int, next_end: int) -> tuple[list[int], list[int]]:
        """Return (sends, receives) of steps [first_step, end_step), and begin with those of
        [end_step, next_end)."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == (first_step, end_step):
            found = ahead[1].result()
        else:
            found = self._of(first_step, end_step)
        self.begin(end_step, next_end)
        return found

    def begin(self, first_step: int, end_step: int) -> None:
        """Begin with steps [first_step, end_step), as far as there are such."""
        if first_step < (end_step := min(end_step, self.num_steps)):
            steps = first_step, end_step
            self._next = steps, self._thread.submit(self._of, *steps)

    def _of(self, first_step: int, end_step: int) -> tuple[list[int], list[int]]:
        """Count a few steps at a time: hundreds of many ranks would take gigabytes at once."""
        at_once = max(1, _POSITIONS_AT_ONCE // self._arguments[0].global_batch_size)
        sums_2W = np.zeros((2, self._arguments[2]), dtype=np.int64)
        for step in range(first_step, end_step, at_once):
            counts = routing_counts(*self._arguments, step, min(step + at_once, end_step))
            sums_2W += [counts_SW.sum(axis=0) for counts_SW in counts]
        sends, receives = sums_2W.tolist()
        return sends, receives
