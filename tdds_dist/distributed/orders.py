"""Which sample is at a position of an epoch: three ways to shuffle. Pure index arithmetic in NumPy.

Up to 16.8 million samples `shuffled` is NumPy's permutation, kept whole in at most 64 MiB; beyond,
a bijection gives the sample at each position by itself, and nothing is kept. `Blocks` shuffles
within pools of contiguous blocks, for files that do not fit into memory.
"""

# G rows of a step over all ranks, L lanes, N samples, P positions, R rounds

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

LARGEST_PERMUTATION = 1 << 24  # samples whose order is kept whole, 4 bytes each
# of the bijection; after 4 nothing distinguishes it from a random order (tests/distributed)
_ROUNDS = 6
_MOST_LANES = 64
_BLOCKS_OF_POOL = 4
_PART_OF_FILE = 8  # pools in use, and as many that are read ahead, are at most this part of it


def shuffled(num_samples: int, key: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from positions to indices of a random order of [0, num_samples), int64
    [P] -> int64 [P]."""
    kind = _Permutation if num_samples <= LARGEST_PERMUTATION else _Bijection
    return kind(num_samples, key)


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


class Blocks:
    """A random order that reads a file block by block.

    Blocks of `block_rows` consecutive samples are put into a random order and dealt to lanes. A
    lane takes its blocks in pools, and shuffles the rows of a pool. Row g of every step comes from
    lane g mod L, so on W ranks, where W divides L, each rank reads whole blocks of its own. The
    order itself does not depend on W. The more blocks, the more lanes (at most 64, a divisor of G)
    and blocks in a pool (at most 4).
    """

    def __init__(self, num_samples: int, global_batch_size: int, key: list[int], block_rows: int):
        self._num_samples, self._rows, self._key = num_samples, block_rows, key
        num_blocks = -(-num_samples // block_rows)
        self._block_of = np.random.default_rng(key).permutation(num_blocks)
        self._short_at = int(np.flatnonzero(self._block_of == num_blocks - 1)[0])
        # blocks of all pools
        most = num_blocks // (2 * _PART_OF_FILE)
        most_lanes = max(1, min(_MOST_LANES, most // _BLOCKS_OF_POOL))
        self.num_lanes = max(n for n in range(1, most_lanes + 1) if global_batch_size % n == 0)
        self._global_batch_size = global_batch_size
        self._rows_per_step = global_batch_size // self.num_lanes  # of a lane
        # a step takes rows of two pools at most
        of_pool = max(min(_BLOCKS_OF_POOL, most), -(-self._rows_per_step // block_rows))
        self._pool_rows = block_rows * of_pool
        steps, rest = divmod(num_samples, global_batch_size)
        length_L = [
            steps * self._rows_per_step + len(range(lane, rest, self.num_lanes))
            for lane in range(self.num_lanes)
        ]
        self._start_L = np.concatenate([[0], np.cumsum(length_L)])
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, position_P: np.ndarray) -> np.ndarray:
        step_P, row_P = np.divmod(position_P, self._global_batch_size)
        lane_P = row_P % self.num_lanes
        pool_P, within_P = np.divmod(
            step_P * self._rows_per_step + row_P // self.num_lanes, self._pool_rows
        )
        place_P = np.empty_like(position_P)
        many = int(pool_P.max(initial=0)) + 1
        for cell in np.unique(lane_P * many + pool_P):
            lane, pool = divmod(int(cell), many)
            is_here_P = (lane_P == lane) & (pool_P == pool)
            first, order = self._pool(lane, pool)
            place_P[is_here_P] = first + order[within_P[is_here_P]]
        return self._index_at(place_P)

    def pool_at(self, step: int) -> int:
        """Return which of its pools each lane takes its first row of a step from."""
        return step * self._rows_per_step // self._pool_rows

    def indices(self, rank: int, world_size: int, pool: int) -> np.ndarray:
        """Return the indices of that pool of every lane that the rows of a rank come from, int64;
        lanes that have ended have none."""
        row_B = np.arange(rank, self._global_batch_size, world_size)
        places = []
        for lane in np.unique(row_B % self.num_lanes):
            first = self._start_L[lane] + pool * self._pool_rows
            places.append(np.arange(first, min(first + self._pool_rows, self._start_L[lane + 1])))
        return self._index_at(np.concatenate(places))

    def _pool(self, lane: int, pool: int) -> tuple[int, np.ndarray]:
        """Return where a pool begins in the sequence of blocks, and the order of its rows."""
        first = int(self._start_L[lane]) + pool * self._pool_rows
        with self._lock:
            if (order := self._orders.get((lane, pool))) is None:
                size = min(self._pool_rows, int(self._start_L[lane + 1]) - first)
                order = np.arange(size, dtype=np.int32)
                np.random.default_rng([*self._key, lane, pool]).shuffle(order)
                self._orders[lane, pool] = order
                if len(self._orders) > 2 * self.num_lanes:
                    self._orders.popitem(last=False)
        return first, order

    def _index_at(self, place_P: np.ndarray) -> np.ndarray:
        """Return the indices at places of the sequence of blocks, of which the last of the file may
        be short."""
        missing = len(self._block_of) * self._rows - self._num_samples
        is_after_P = place_P >= (self._short_at + 1) * self._rows - missing
        block_P, row_P = np.divmod(place_P + missing * is_after_P, self._rows)
        return self._block_of[block_P] * self._rows + row_P
