"""Which rank visits which sample at which step, and which rank owns it. Pure index arithmetic in
NumPy.

The order of an epoch is a function of (seed, epoch) alone, cut into global batches; the world size
only decides how each global batch is dealt to ranks. Hence the same samples meet in the same step
at every world size, and every rank can compute what all others send without asking. The last step
of an epoch is filled up with repeats of the epoch's first samples so that all ranks see full
batches; such a padding row carries index -1 and reaches no score.
"""

# G global batch, B rows per rank and step (G = W B), W world size, S steps, N samples, M rows per
# shard (ceil(N / W))

from dataclasses import dataclass

import numpy as np

PADDING = -1  # global index of a padding row; negative, since loops test `index >= 0`


@dataclass(frozen=True)
class EpochOrder:
    """The visit order of one epoch, all ranks together.

    `sample_SG` holds the sample read at each row (padding rows hold a repeat), `index_SG` the same
    with PADDING in padding rows. Row g of a step belongs to rank g mod W, so that the real rows of
    a short last step spread evenly.
    """

    sample_SG: np.ndarray  # int64
    index_SG: np.ndarray  # int64

    @property
    def num_steps(self) -> int:
        return len(self.sample_SG)

    def of_rank(self, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (sample_SB, index_SB) of one rank, int64 [S, G / W] each."""
        return self.sample_SG[:, rank::world_size], self.index_SG[:, rank::world_size]

    def num_real_S(self) -> np.ndarray:
        """Return the rows per step that are not padding, over all ranks; int64 [S]."""
        return (self.index_SG != PADDING).sum(axis=1)

    def from_step(self, step: int) -> "EpochOrder":
        """Return the rest of the epoch, for a resume at `step`."""
        return EpochOrder(self.sample_SG[step:], self.index_SG[step:])


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
    index_N = (
        np.random.default_rng([seed, epoch]).permutation(num_samples)
        if shuffle
        else np.arange(num_samples)
    )
    if subset is not None:
        index_N = subset[index_N]
    num_steps = -(-num_samples // global_batch_size)
    shape = (num_steps, global_batch_size)
    sample_SG = np.resize(index_N.astype(np.int64), shape)  # np.resize repeats from the start
    index_SG = sample_SG.copy()
    index_SG.reshape(-1)[num_samples:] = PADDING
    return EpochOrder(sample_SG, index_SG)


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
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that `rank` sends to, and receives from, each rank at every step: two int64
    [S, W].

    A real row goes to the owner of its index (that of its shard, or `owner_N` int64 [N]); a padding
    row stays where it is.
    """
    num_steps, global_batch_size = order.index_SG.shape
    rows = rows_per_shard(num_samples, world_size)
    visitor_G = np.arange(global_batch_size) % world_size
    owner_of_row_SG = order.index_SG // rows if owner_N is None else owner_N[order.index_SG]
    owner_SG = np.where(order.index_SG == PADDING, visitor_G, owner_of_row_SG)
    step_SG = np.broadcast_to(np.arange(num_steps)[:, None], owner_SG.shape)

    def count(cell: np.ndarray) -> np.ndarray:
        return np.bincount(cell, minlength=num_steps * world_size).reshape(num_steps, world_size)

    mine_S_B = (step_SG * world_size + owner_SG)[:, rank::world_size]
    to_me_SG = owner_SG == rank
    cell_SG = step_SG * world_size + visitor_G
    return count(mine_S_B.reshape(-1)), count(cell_SG[to_me_SG])
