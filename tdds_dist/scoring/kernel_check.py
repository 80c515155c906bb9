"""A check of the kernel of `shard_triton` on a device: each variant of it runs, and gives what
the plain `shard.update` gives. Triton is loaded only where a function needs it.
"""

# C classes, M rows of a shard, R rows received

import itertools
import warnings
from collections.abc import Sequence

import torch

from tdds_dist.distributed.partition import PADDING
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.shard import Arrived, DenseRows, Shard, pack, update

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the kernel reads
_NOT_FINITE = (5, 6, 7)  # rows of `hard_rows` with NaN or infinite logits
_FIRST = 10  # index of their first row


def kernel_works(shard: Shard, quarantines: bool) -> bool:
    """Say whether steps may be written by the kernel: on CUDA, for `DenseRows`, where every variant
    of `failures` runs. Warns with the reason where one does not.
    """
    if (
        shard.label_M.device.type != "cuda"
        or torch.version.cuda is None
        or not isinstance(shard.previous, DenseRows)
    ):
        return False
    for variant, problem in failures(shard, quarantines).items():
        if problem is not None:
            warnings.warn(
                "scores are updated by plain torch operations, several times slower: the kernel"
                f" fails for {variant} ({problem})",
                stacklevel=3,
            )
            return False
    return True


def failures(
    shard: Shard, quarantines: bool, dtypes: Sequence[torch.dtype] = LOGIT_DTYPES
) -> dict[str, str | None]:
    """Run every variant of the kernel that this shard may need on a padding row, which changes
    nothing in the shard; return the error of each in one line, or None, by its name.

    A variant is compiled for the dtype of logits and for the first epoch or a later one; the number
    of classes, the dtype of rows and `quarantines` are the same for all. The first run of each
    takes about half a second, later ones of the same machine find it compiled. What goes wrong on
    the device after the launch shows when somebody waits for it, as `disagreement` does.
    """
    found: dict[str, str | None] = {}
    device = shard.label_M.device
    padding_1 = torch.full((1,), PADDING, dtype=torch.int64, device=device)
    for dtype, has_previous in itertools.product(dtypes, (False, True)):
        logits_1C = torch.zeros(1, shard.num_classes, dtype=dtype, device=device)
        arrived = Arrived(pack(padding_1, padding_1.clamp(0), logits_1C), dtype, 0)
        when = "a later" if has_previous else "the first"
        name = f"{str(dtype).removeprefix('torch.')} logits, {when} epoch"
        try:
            from tdds_dist.scoring import shard_triton  # loads Triton

            shard_triton.update(shard, [arrived], has_previous, quarantines)
            found[name] = None
        except Exception as error:  # Triton's, the compiler's, the driver's: all kinds
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def disagreement(
    num_classes: int,
    dtype: torch.dtype,
    logp_dtype: torch.dtype,
    quarantines: bool,
    device: torch.device | str,
    num_rows: int = 120,
    tolerance: float = 5e-5,
) -> str | None:
    """Compare the kernel with `shard.update` over two epochs of `hard_rows`; return the first
    difference in a line, or None. Waits for the device.

    Integer tables, counters and `correct` must be equal, other numbers within `tolerance`, relative
    and absolute: a float32 logarithm is known to some 1e-7 of the largest logit. Float16 rows may
    round to the neighbour. Errors of Triton and of the device are raised.
    """
    from tdds_dist.scoring import shard_triton

    plain, kernel = (
        Shard(_FIRST, _FIRST + num_rows, num_classes, "dense", logp_dtype, torch.device(device))
        for _ in range(2)
    )
    # rows that are not finite have some value or other where nothing sets them to zeros
    is_judged_M = torch.ones(num_rows, dtype=torch.bool, device=device)
    is_judged_M[list(_NOT_FINITE)] = quarantines
    correct = SCALARS.index("correct")
    for epoch in range(2):
        arrived = hard_rows(num_classes, dtype, epoch, num_rows, device)
        kept = [part.payload_RX.clone() for part in arrived]
        shard_triton.update(kernel, arrived, epoch > 0, quarantines)
        if not all(
            torch.equal(part.payload_RX, before) for part, before in zip(arrived, kept, strict=True)
        ):
            return f"epoch {epoch + 1}: the kernel changes its input"
        update(plain, arrived, epoch > 0, quarantines)
        for counter in ("bad_index", "bad_label", "nonfinite_step"):
            found, wanted = (int(getattr(shard, counter)) for shard in (kernel, plain))
            if found != wanted:
                return f"epoch {epoch + 1}: {counter} is {found} instead of {wanted}"
        expected = plain.tables()
        for name, table in kernel.tables().items():
            found_M, wanted_M = table[:num_rows], expected[name][:num_rows]
            if name in ("logp", "scalars"):
                rounds = logp_dtype == torch.float16 and (name == "logp" or epoch > 0)
                allowed = 1e-3 if rounds else tolerance
                found_M, wanted_M = found_M[is_judged_M].float(), wanted_M[is_judged_M].float()
                same_M = found_M.isclose(wanted_M, rtol=allowed, atol=allowed, equal_nan=True)
                if name == "scalars":
                    same_M[:, correct] &= found_M[:, correct] == wanted_M[:, correct]
            else:
                same_M = found_M == wanted_M
            if not bool(same_M.all()):
                largest = float((found_M.double() - wanted_M.double()).abs()[~same_M].max())
                return (
                    f"epoch {epoch + 1}: {int((~same_M).sum())} of {same_M.numel()} numbers of"
                    f" {name} differ, by up to {largest:.2g}"
                )
        for shard in (plain, kernel):
            shard.begin_epoch()
    return None


def hard_rows(
    num_classes: int,
    dtype: torch.dtype,
    epoch: int,
    num_rows: int,
    device: torch.device | str = "cpu",
) -> list[Arrived]:
    """Make the packed rows of an epoch for a shard that begins at `_FIRST`, 8 or more, in three
    steps of which the second is empty: ties, certain rows, bad labels and indices, padding, and
    (`_NOT_FINITE`) NaN and infinite logits.
    """
    generator = torch.Generator().manual_seed(100 * num_classes + epoch)
    logits_RC = torch.randn(num_rows + 3, num_classes, generator=generator) * 4
    logits_RC[1] = logits_RC[1].round()
    logits_RC[2] = 0.5
    logits_RC[3, num_classes // 2] = 2e4
    logits_RC[5, num_classes // 2] = torch.nan
    logits_RC[6, num_classes - 1] = -torch.inf
    logits_RC[7, 0] = torch.inf
    logits_RC[num_rows:] = torch.nan
    label_R = torch.randint(num_classes, (num_rows + 3,), generator=generator)
    label_R[1], label_R[2], label_R[3] = (
        logits_RC[1].argmax(),
        epoch * num_classes // 2,
        num_classes // 2,
    )
    label_R[5], label_R[6] = num_classes + 2, -1
    index_R = torch.tensor(
        [*range(_FIRST, _FIRST + num_rows), PADDING, _FIRST - 1, _FIRST + num_rows]
    )
    order = torch.randperm(num_rows + 3, generator=generator)
    return [
        Arrived(
            pack(
                index_R[part].to(device),
                label_R[part].to(device),
                logits_RC.to(dtype)[part].to(device),
            ),
            dtype,
            step,
        )
        for step, part in ((7, order[:4]), (8, order[4:4]), (9, order[4:]))
    ]
