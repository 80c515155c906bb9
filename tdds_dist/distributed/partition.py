"""Which rank visits which sample at which step, and which rank owns it. Pure index arithmetic in
NumPy.

The order of an epoch is a function of (seed, epoch) alone, cut into global batches; the world size
only decides how each global batch is dealt to ranks. Hence the same samples meet in the same step
at every world size, and every rank can compute what all others send without asking. The last step
of an epoch is filled up with repeats of the epoch's first samples so that all ranks see full
batches; such a padding row carries index -1 and reaches no score.

Any steps can be asked for without those before. Up to 16.8 million samples the order is NumPy's
permutation, kept whole in at most 64 MiB; beyond, a bijection gives the sample at each position
by itself, and nothing is kept.
"""

# G global batch, B rows per rank and step (G = W B), W world size, S steps, N samples, M rows per
# shard (ceil(N / W)), R rounds

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

PADDING = -1  # global index of a padding row; negative, since loops test `index >= 0`
LARGEST_PERMUTATION = 1 << 24  # samples whose order is kept whole, 4 bytes each
# of the bijection; after 4 nothing distinguishes it from a random order (tests/distributed)
_ROUNDS = 6


@dataclass(frozen=True)
class EpochOrder:
    """The visit order of one epoch, all ranks together; `epoch_order` makes it.

    `index_at` gives the global indices at the given positions of the epoch, int64 [P] -> int64 [P].
    Row g of step s is at position s G + g and belongs to rank g mod W, so that the real rows of a
    short last step spread evenly.
    """

    num_samples: int
    global_batch_size: int
    index_at: Callable[[np.ndarray], np.ndarray]

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
        if end_step < self.num_steps:
            sample_SB = self.index_at(position_SB.reshape(-1)).reshape(position_SB.shape)
            return sample_SB, sample_SB
        sample_SB = self.index_at((position_SB % self.num_samples).reshape(-1))
        sample_SB = sample_SB.reshape(position_SB.shape)
        return sample_SB, np.where(position_SB < self.num_samples, sample_SB, PADDING)

    def num_real(self, step: int) -> int:
        """Return the rows of a step that are not padding, over all ranks."""
        return min(self.global_batch_size, self.num_samples - step * self.global_batch_size)


def epoch_order(
    num_samples: int,
    global_batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    subset: np.ndarray | None = None,
) -> EpochOrder:
    """Return the visit order of one epoch over [0, num_samples), or over the global indices
    `subset` (int64 [num_samples])."""
    if num_samples < 1 or global_batch_size < 1:
        raise ValueError(
            f"num_samples={num_samples} and global_batch_size={global_batch_size} must be at"
            " least 1"
        )
    assert subset is None or len(subset) == num_samples, (num_samples, len(subset))
    if not shuffle:
        index_at: Callable[[np.ndarray], np.ndarray] = np.asarray
    elif num_samples <= LARGEST_PERMUTATION:
        index_at = _Permutation(num_samples, [seed, epoch])
    else:
        index_at = _Bijection(num_samples, [seed, epoch])
    if subset is None:
        return EpochOrder(num_samples, global_batch_size, index_at)
    return EpochOrder(
        num_samples, global_batch_size, lambda position_P: subset[index_at(position_P)]
    )


class _Permutation:
    """NumPy's `default_rng(key).permutation(num_samples)`, made when it is first asked for: by the
    thread that decodes, while the loop is still in the epoch before."""

    def __init__(self, num_samples: int, key: list[int]):
        self._num_samples, self._key, self._lock = num_samples, key, threading.Lock()
        self._index_N: np.ndarray | None = None

    def __call__(self, position_P: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._index_N is None:
                self._index_N = np.arange(self._num_samples, dtype=np.int32)
                np.random.default_rng(self._key).shuffle(self._index_N)
        return self._index_N[position_P].astype(np.int64)


class _Bijection:
    """A keyed bijection on [0, num_samples), for positions one by one.

    Rounds of an addition and a multiplication by an odd number modulo a power of two, and a shift
    of the upper half onto the lower: each can be undone, so no two positions meet. The power of two
    is at most twice the number of samples; what lands beyond goes through the rounds again (cycle
    walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """

    def __init__(self, num_samples: int, key: list[int]):
        bits = max(2, (num_samples - 1).bit_length())
        self._word = np.dtype(
            np.uint32 if bits <= 32 else np.uint64
        )  # arithmetic modulo 2^32 wraps
        self._end, self._half, self._mask = (
            self._word.type(number) for number in (num_samples, (bits + 1) // 2, (1 << bits) - 1)
        )
        key_R2 = np.random.default_rng(key).integers(0, 1 << 63, (_ROUNDS, 2)).astype(self._word)
        self._key_R2 = key_R2 | np.array([0, 1], dtype=self._word)

    def __call__(self, position_P: np.ndarray) -> np.ndarray:
        index_P = position_P.astype(self._word)
        self._rounds(index_P)
        while len(beyond := np.flatnonzero(index_P >= self._end)):
            again = index_P[beyond]
            self._rounds(again)
            index_P[beyond] = again
        return index_P.astype(np.int64)

    def _rounds(self, word_P: np.ndarray) -> None:
        shifted_P = np.empty_like(word_P)
        for add, multiply in self._key_R2:
            word_P += add
            word_P *= multiply
            word_P &= self._mask
            np.right_shift(word_P, self._half, out=shifted_P)
            word_P ^= shifted_P


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
        if end_step < (next_end := min(next_end, self.num_steps)):
            steps = end_step, next_end
            self._next = steps, self._thread.submit(self._of, *steps)
        return found

    def _of(self, first_step: int, end_step: int) -> tuple[list[int], list[int]]:
        sends_SW, receives_SW = routing_counts(*self._arguments, first_step, end_step)
        return sends_SW.sum(axis=0).tolist(), receives_SW.sum(axis=0).tolist()
