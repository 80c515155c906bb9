"""One rank's block of the per-sample tables, and what a step does to it.

`Shard` holds what a step writes. How the previous epoch's log-probabilities are kept is up to
`DenseRows` (all of them) or `TopKRows` (the largest and what they leave: for classes in the tens of
thousands). `update` is the plain form of a step's work: on the CPU, for `TopKRows`, and as the
oracle of the kernel in `shard_triton`. Nothing here waits for the device.
"""

# B rows of a call, C classes, F scalars, J numbers kept of a row, K classes kept, M rows of this
# rank's shard, R rows received, X numbers of a packed row

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdds_dist.config.scores import parse_storage
from tdds_dist.distributed.partition import PADDING
from tdds_dist.scoring.sample_stats import (
    LOGP_FLOOR,
    SCALARS,
    log_probabilities,
    scalars_overwriting,
)

NEVER = 2**62  # step of the first non-finite row while there is none
_WITHOUT_SIGN = 2**63 - 1
# logits that are worked on at once: the tables of a block stay in the cache
_BLOCK_NUMBERS = 1 << 16
# by size: integers are moved, never changed
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- how log-probabilities are kept


class DenseRows:
    """Log-probabilities of every class."""

    def __init__(self, num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device):
        self.logp_MC = torch.zeros(num_rows, num_classes, dtype=dtype, device=device)

    def load(self, row_R: Tensor) -> Tensor:
        """Return a copy of the rows int64 [R]; float32 [R, C]."""
        return self.logp_MC.index_select(0, row_R).float()

    def store(self, row_R: Tensor, logp_RC: Tensor, label_R: Tensor) -> None:
        """Overwrite rows. `label_R` int64 [R] in [0, C) is for other storages."""
        self.logp_MC.index_copy_(0, row_R, logp_RC.to(self.logp_MC.dtype))

    def tables(self) -> dict[str, Tensor]:
        """Return the tables by name; their first axis is that of the rows."""
        return {"logp": self.logp_MC}


def class_dtype(num_classes: int) -> torch.dtype:
    """Return the smallest integer that holds every class and is known to checkpoints."""
    return torch.int16 if num_classes <= 2**15 else torch.int32


class TopKRows:
    """The K largest log-probabilities, the label's, and the mean of what is left, K + 2 numbers
    instead of C.

    `load` gives every class that was not kept the same share of the remaining probability. The
    label is kept with its class even where it is among the K, so it needs no case of its own. Of
    equal values the lowest class counts as the larger.
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        num_kept: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._num_classes, self._num_kept = num_classes, num_kept
        # the K largest, then the label; after them the log of the mean probability of all other
        # classes
        self.logp_MJ = torch.zeros(num_rows, num_kept + 2, dtype=dtype, device=device)
        self.class_MJ = torch.zeros(
            num_rows, num_kept + 1, dtype=class_dtype(num_classes), device=device
        )

    def load(self, row_R: Tensor) -> Tensor:
        """Return a copy of the rows int64 [R]; float32 [R, C]."""
        logp_RJ = self.logp_MJ.index_select(0, row_R).float()
        class_RJ = self.class_MJ.index_select(0, row_R).long()
        logp_RC = logp_RJ[:, -1:].repeat(1, self._num_classes)
        return logp_RC.scatter_(1, class_RJ, logp_RJ[:, :-1])

    def store(self, row_R: Tensor, logp_RC: Tensor, label_R: Tensor) -> None:
        """Overwrite rows; `label_R` int64 [R] in [0, C)."""
        # A key per class that no other has: how `topk` orders equal values depends on the device
        # and on the batch.
        # from 0 up, so its bits have the order of its value
        distance_RC = (0.0 - logp_RC).view(torch.int32).long()
        key_RC = distance_RC.bitwise_left_shift_(32).add_(
            torch.arange(self._num_classes, device=logp_RC.device)
        )
        largest_RK = key_RC.topk(self._num_kept, dim=1, largest=False).values.bitwise_and_(
            2**32 - 1
        )
        class_RJ = torch.cat([largest_RK, label_R[:, None]], dim=1)
        kept_RJ = logp_RC.gather(1, class_RJ)
        # Summed over what is left, not 1 minus what is kept: never negative, and right where almost
        # nothing is left.
        left_RC = logp_RC.scatter(1, class_RJ, -torch.inf)
        num_left_R = (
            self._num_classes - self._num_kept - (largest_RK != label_R[:, None]).all(dim=1).int()
        )
        rest_R = (
            left_RC.logsumexp(dim=1).sub_(num_left_R.clamp_(min=1).log()).clamp_min_(LOGP_FLOOR)
        )
        logp_RJ = torch.cat([kept_RJ, rest_R[:, None]], dim=1)
        self.logp_MJ.index_copy_(0, row_R, logp_RJ.to(self.logp_MJ.dtype))
        self.class_MJ.index_copy_(0, row_R, class_RJ.to(self.class_MJ.dtype))

    def tables(self) -> dict[str, Tensor]:
        """Return the tables by name; their first axis is that of the rows."""
        return {"topk_logp": self.logp_MJ, "topk_class": self.class_MJ}


# ---- the block of a rank


class Shard:
    """The tables that a step writes for the samples first .. end - 1. Padding rows write into one
    more row, number `num_rows`.

    `storage` as `parse_storage` takes it; `logp_dtype` float32 or float16.
    """

    def __init__(
        self,
        first: int,
        end: int,
        num_classes: int,
        storage: str,
        logp_dtype: torch.dtype,
        device: torch.device,
    ):
        self.first, self.num_rows, self.num_classes, self.storage = (
            first,
            end - first,
            num_classes,
            storage,
        )
        rows = self.num_rows + 1
        num_kept = parse_storage(storage, num_classes)
        self.previous: DenseRows | TopKRows
        if num_kept is None:
            self.previous = DenseRows(rows, num_classes, logp_dtype, device)
        else:
            self.previous = TopKRows(rows, num_classes, num_kept, logp_dtype, device)
        self.scalars_MF = torch.zeros(rows, len(SCALARS), device=device)
        self.label_M = torch.zeros(rows, dtype=torch.int64, device=device)
        self.visits_M = torch.zeros(rows, dtype=torch.int32, device=device)
        self.nonfinite_M = torch.zeros(rows, dtype=torch.int32, device=device)
        # rows that are neither padding nor of this shard
        self.bad_index = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_label = torch.zeros((), dtype=torch.int64, device=device)
        # the first with such a row
        self.nonfinite_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    def tables(self) -> dict[str, Tensor]:
        """Return every table by name, with its last row; the first axis is that of the samples."""
        return self.previous.tables() | {
            "scalars": self.scalars_MF,
            "label": self.label_M,
            "visits": self.visits_M,
            "nonfinite": self.nonfinite_M,
        }

    def begin_epoch(self) -> None:
        """Clear the counts of the epoch before."""
        self.visits_M.zero_()
        self.nonfinite_M.zero_()
        self.nonfinite_step.fill_(NEVER)


# ---- rows on their way


class Arrived(NamedTuple):
    """Packed rows [R, X] of one step, and the dtype of their logits."""

    payload_RX: Tensor
    dtype: torch.dtype
    step: int


def pack(index_B: Tensor, label_B: Tensor, logits_BC: Tensor) -> Tensor:
    """Put index, label (int64 [B]) and logits of each row side by side, as integers of the size of
    a logit; [B, X]."""
    bits = BITS[logits_BC.element_size()]
    header = [
        value_B.unsqueeze(1).view(bits) for value_B in (index_B.contiguous(), label_B.contiguous())
    ]
    return torch.cat([*header, logits_BC.view(bits)], dim=1)


def header_width(dtype: torch.dtype) -> int:
    """Return how many numbers of a packed row come before its logits."""
    return 16 // dtype.itemsize


def unpack(payload_RX: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index_R, label_R, logits_RC) of packed rows; the logits share their memory."""
    width = header_width(dtype)
    # Flatten before the view: a single row counts as contiguous whatever its stride.
    index_R, label_R = payload_RX[:, :width].reshape(-1).view(torch.int64).view(-1, 2).unbind(1)
    return index_R, label_R, payload_RX.view(dtype)[:, width:]


def update(shard: Shard, arrived: Sequence[Arrived], has_previous: bool, quarantines: bool) -> None:
    """Write all rows that arrived into the shard, at once; they have one dtype.

    Per row: log-probabilities, SCALARS against the previous epoch's row (`has_previous`), label,
    visit; whether its logits were finite (`quarantines`: such a row counts as zeros). Each row is
    computed by itself, with the same bits whichever rows arrive with it.
    """
    arrived = [part for part in arrived if len(part.payload_RX)]
    if not arrived:
        return
    device, dtype = arrived[0].payload_RX.device, arrived[0].dtype
    payload_RX = (
        torch.cat([part.payload_RX for part in arrived])
        if len(arrived) > 1
        else arrived[0].payload_RX
    )
    step_R = torch.cat(
        [torch.full((len(part.payload_RX),), part.step, device=device) for part in arrived]
    )
    # many classes of a single row would be summed by all threads, in another order
    if len(payload_RX) == 1:
        payload_RX = torch.cat([payload_RX, torch.full_like(payload_RX, -1)])  # index -1: padding
        step_R = step_R.expand(2)
    parts = num_blocks(len(payload_RX), shard.num_classes)
    for block_RX, step_r in zip(
        payload_RX.tensor_split(parts), step_R.tensor_split(parts), strict=True
    ):
        _update_block(shard, block_RX, dtype, step_r, has_previous, quarantines)


def num_blocks(num_rows: int, num_classes: int) -> int:
    """Return the number of parts in which `update` works, of about the same size and of two rows or
    more where there are so many."""
    return math.ceil(num_rows / max(3, _BLOCK_NUMBERS // num_classes))


def _update_block(
    shard: Shard,
    payload_RX: Tensor,
    dtype: torch.dtype,
    step_R: Tensor,
    has_previous: bool,
    quarantines: bool,
) -> None:
    index_R, label_R, logits_RC = unpack(payload_RX, dtype)
    # Without its sign a negative number is larger than any row, and what is too large goes to the
    # spare row.
    row_R = (index_R - shard.first).bitwise_and_(_WITHOUT_SIGN).clamp_max_(shard.num_rows)
    is_real_R = row_R < shard.num_rows
    shard.bad_index += (is_real_R == (index_R == PADDING)).sum()
    class_R = label_R.clamp(0, shard.num_classes - 1)
    shard.bad_label += ((class_R != label_R) & is_real_R).sum()

    logits_RC = logits_RC.float().contiguous()
    # 0 times a finite number is 0; only NaN and infinity are among the extremes and not finite
    is_finite_R = logits_RC.amax(dim=1).mul_(0.0).add_(logits_RC.amin(dim=1).mul_(0.0)) == 0.0
    nonfinite_R = is_real_R & ~is_finite_R
    shard.nonfinite_M.index_add_(0, row_R, nonfinite_R.int())
    first = torch.where(nonfinite_R, step_R, NEVER).amin()
    torch.minimum(shard.nonfinite_step, first, out=shard.nonfinite_step)
    if quarantines:
        logits_RC.masked_fill_(~is_finite_R[:, None], 0.0)

    logp_RC = log_probabilities(logits_RC)
    previous_RC = shard.previous.load(row_R) if has_previous else None
    shard.scalars_MF.index_copy_(
        0, row_R, scalars_overwriting(logits_RC, logp_RC, previous_RC, class_R)
    )
    shard.previous.store(row_R, logp_RC, class_R)
    shard.label_M.index_copy_(0, row_R, class_R)
    shard.visits_M.index_add_(0, row_R, torch.ones_like(row_R, dtype=torch.int32))
