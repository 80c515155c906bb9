"""Three ways to shuffle: the sample at each position of an epoch. Pure index arithmetic in NumPy.

Up to 16.8 million samples `shuffled` is NumPy's permutation, kept whole in at most 64 MiB; beyond,
a bijection gives the sample at each position by itself, and nothing is kept. `Blocks` shuffles
within pools of contiguous blocks, for files that do not fit into memory.
"""

# C cells, L lanes, N samples, P positions, R rounds or rows

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np

LARGEST_PERMUTATION = 1 << 24  # samples whose order is kept whole, 4 bytes each
# of the bijection; after 4 nothing distinguishes it from a random order (tests/distributed)
_ROUNDS = 6
_MOST_LANES = 64
_BLOCKS_OF_POOL = 4
_TABLES = 3  # that are kept: of the rows of a rank, of those of all, and across two pools
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
        # arithmetic modulo 2^32 wraps
        self._word = np.dtype(np.uint32 if bits <= 32 else np.uint64)
        self._last = self._word.type(num_samples - 1)
        self._half, self._mask = self._word.type((bits + 1) // 2), self._word.type((1 << bits) - 1)
        key_R2 = np.random.default_rng(key).integers(0, 1 << 63, (_ROUNDS, 2)).astype(self._word)
        self._key_R2 = key_R2 | np.array([0, 1], dtype=self._word)

    def __call__(self, position_P: np.ndarray) -> np.ndarray:
        index_P = position_P.astype(self._word)
        self._rounds(index_P)
        while len(beyond := np.flatnonzero(index_P > self._last)):
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

    Blocks of `block_rows` consecutive samples are put into a random order and dealt to L lanes. A
    lane takes its blocks in pools, and shuffles the rows of a pool. Position p of the epoch comes
    from lane p mod L, so on W ranks, where W divides L, each rank reads whole blocks of its own.
    The order depends neither on W nor on the batch. The more blocks, the more lanes (a power of
    two, at most 64) and blocks in a pool (at most 4).
    """

    def __init__(self, num_samples: int, key: list[int], block_rows: int):
        self._num_samples, self._rows, self._key = num_samples, block_rows, key
        num_blocks = -(-num_samples // block_rows)
        self._block_of = np.arange(num_blocks, dtype=np.int32)
        np.random.default_rng(key).shuffle(self._block_of)
        self._short_at = int(np.flatnonzero(self._block_of == num_blocks - 1)[0])
        most = max(1, num_blocks // (2 * _PART_OF_FILE))  # blocks of the pools in use
        self._pool_rows = block_rows * min(_BLOCKS_OF_POOL, most)
        self.num_lanes = 1 << min(_MOST_LANES, max(1, most // _BLOCKS_OF_POOL)).bit_length() - 1
        length_L = [len(range(lane, num_samples, self.num_lanes)) for lane in range(self.num_lanes)]
        self._start_L = np.concatenate([[0], np.cumsum(length_L)])
        # by cells (pool and lane): the indices of their rows, and where each begins
        self._tables: OrderedDict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, position_P: np.ndarray) -> np.ndarray:
        if len(position_P) == 0:
            return position_P
        lane_P = position_P & (self.num_lanes - 1)
        pool_P, within_P = np.divmod(position_P >> self.num_lanes.bit_length() - 1, self._pool_rows)
        cell_P = pool_P * self.num_lanes + lane_P
        lowest = int(cell_P.min())
        cells = np.flatnonzero(np.bincount(cell_P - lowest)) + lowest
        index_R, first_row_C = self._table(tuple(cells.tolist()))
        return index_R[first_row_C[cell_P - lowest] + within_P]

    def pool_at(self, position: int) -> int:
        """Return the lowest pool that positions from `position` on come from."""
        return position // self.num_lanes // self._pool_rows

    def indices(self, lanes: Iterable[int], pool: int) -> np.ndarray:
        """Return the indices of that pool of each lane, int64; lanes that have ended have none."""
        return self._index_at(np.concatenate([self._places(lane, pool) for lane in lanes]))

    def _places(self, lane: int, pool: int) -> np.ndarray:
        """Return the places of a pool in the sequence of blocks, in the order of the file."""
        first = int(self._start_L[lane]) + pool * self._pool_rows
        return np.arange(first, min(first + self._pool_rows, int(self._start_L[lane + 1])))

    def _table(self, cells: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the shuffled indices of the pools of these cells one after the other, and where
        each begins, by cell counted from the lowest."""
        with self._lock:
            if (found := self._tables.get(cells)) is None:
                pools = []
                for cell in cells:
                    pool, lane = divmod(cell, self.num_lanes)
                    places = self._places(lane, pool)
                    np.random.default_rng([*self._key, lane, pool]).shuffle(places)
                    pools.append(places)
                first_row_C = np.zeros(cells[-1] - cells[0] + 1, dtype=np.int64)
                sizes = [len(places) for places in pools]
                first_row_C[np.array(cells) - cells[0]] = np.cumsum([0, *sizes[:-1]])
                found = self._index_at(np.concatenate(pools)), first_row_C
                self._tables[cells] = found
                if len(self._tables) > _TABLES:
                    self._tables.popitem(last=False)
        return found

    def _index_at(self, place_P: np.ndarray) -> np.ndarray:
        """Return the indices at places of the sequence of blocks, of which the last of the file may
        be short."""
        missing = len(self._block_of) * self._rows - self._num_samples
        is_after_P = place_P >= (self._short_at + 1) * self._rows - missing
        block_P, row_P = np.divmod(place_P + missing * is_after_P, self._rows)
        return self._block_of[block_P].astype(np.int64) * self._rows + row_P
