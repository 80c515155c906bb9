"""`update` of `shard` as one kernel for CUDA: one program per row that arrived, which reads logits
and the previous row once and writes the new row once.

A program sees its own row only, in an order that depends on C alone, so a row gets the same bits
whichever rows arrive with it. Up to `ONE_BLOCK` classes everything between the reads and the write
stays in registers; of more classes the first block does, and the logits of the others are read
three times.
"""

# C classes, R rows received, X numbers of a packed row
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import libdevice

from tdds_dist.distributed.partition import PADDING
from tdds_dist.scoring.sample_stats import LOGP_FLOOR, OFFICIAL_EPSILON, SCALARS
from tdds_dist.scoring.shard import Arrived, DenseRows, Shard, header_width

ONE_BLOCK = 4096  # most classes that are held in registers
# 8 per thread take about 95 registers, 16 take 165 (docs/performance.md): then hardly any warps fit
# beside each other that could work while one waits
_CLASSES_PER_WARP = 256
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_FLOOR: tl.constexpr = tl.constexpr(LOGP_FLOOR)
_EPSILON: tl.constexpr = tl.constexpr(OFFICIAL_EPSILON)
_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
_PADDING: tl.constexpr = tl.constexpr(PADDING)
_NUM_SCALARS: tl.constexpr = tl.constexpr(len(SCALARS))
# Triton's own exp is a few parts in 10^7 off, as much as a small loss difference. Where NumPy
# interprets the kernel there is no libdevice.
_math = tl.math if triton.knobs.runtime.interpret else libdevice


def blocks(num_classes: int) -> tuple[int, int]:
    """Return (classes at once, warps) of a program."""
    if num_classes > ONE_BLOCK:
        return 2048, 16  # sums are kept beside the block: half as many per thread
    block = triton.next_power_of_2(num_classes)
    return block, max(1, block // _CLASSES_PER_WARP)


def update(shard: Shard, arrived: Sequence[Arrived], has_previous: bool, quarantines: bool) -> None:
    """Do as `shard.update`, for `DenseRows` and logits of `LOGIT_DTYPES` in `kernel_check`; one
    launch per step that arrived."""
    assert isinstance(shard.previous, DenseRows)
    num_classes = shard.num_classes
    block, num_warps = blocks(num_classes)
    for payload_RX, dtype, step in arrived:
        if not len(payload_RX):
            continue
        with torch.cuda.device_of(payload_RX):
            _update_row[(len(payload_RX),)](
                payload_RX,
                payload_RX.view(dtype),
                shard.previous.logp_MC,
                shard.scalars_MF,
                shard.label_M,
                shard.visits_M,
                shard.nonfinite_M,
                shard.bad_index,
                shard.bad_label,
                shard.nonfinite_step,
                shard.first,
                shard.num_rows,
                step,
                C=num_classes,
                BLOCK=block,
                PIECES=header_width(dtype) // 2,
                HAS_PREVIOUS=has_previous,
                QUARANTINES=quarantines,
                num_warps=num_warps,
            )


@triton.jit
def _int64(pointer, PIECES: tl.constexpr):
    """Read an int64 that is stored in pieces of the size of a logit, the low ones first; rows need
    not be aligned to 8 bytes.
    """
    bits: tl.constexpr = 64 // PIECES
    value = tl.load(pointer).to(tl.int64) & ((1 << bits) - 1)
    for piece in tl.static_range(1, PIECES):
        value |= (tl.load(pointer + piece).to(tl.int64) & ((1 << bits) - 1)) << (bits * piece)
    return value


@triton.jit
def _load(logits_ptr, c, C: tl.constexpr):
    return tl.load(logits_ptr + c, mask=c < C, other=-float("inf")).to(tl.float32)


@triton.jit
def _block(
    x,
    c,
    previous_ptr,
    largest,
    log_total,
    share,
    label,
    other,
    C: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
):
    """Write a block of the row; return the summands of its scalars. Beyond the last class
    probabilities are 0."""
    logp = x - largest - log_total
    logp = tl.where(logp < _FLOOR, _FLOOR, logp)
    p = _math.exp(x - largest) * share
    is_label = c == label
    official, paper, ce = p * 0.0, p * 0.0, p * 0.0
    if HAS_PREVIOUS:
        previous = tl.load(previous_ptr + c, mask=c < C, other=_FLOOR).to(tl.float32)
        official = p * tl.abs(_math.log(tl.div_rn(p + _EPSILON, _math.exp(previous) + _EPSILON)))
        paper = p * (logp - previous)
        ce = tl.where(is_label, logp - previous, 0.0)
        # The compiler may give a thread other classes to store than it loaded, and does for 16-bit
        # logits and float32 rows: without a barrier it would overwrite what another thread has yet
        # to read. In a single warp this keeps the compiler from moving the store before the load.
        tl.debug_barrier()
    tl.store(previous_ptr + c, logp.to(previous_ptr.dtype.element_ty), mask=c < C)
    error = p - is_label.to(tl.float32)
    return (
        official,
        paper,
        ce,
        tl.where(is_label, p, 0.0),
        tl.where(c == other, p, 0.0),
        p * logp,
        error * error,
    )


@triton.jit(do_not_specialize=["first", "num_rows", "step"])
def _update_row(
    header_ptr,
    logits_ptr,
    previous_ptr,
    scalars_ptr,
    label_ptr,
    visits_ptr,
    nonfinite_ptr,
    bad_index_ptr,
    bad_label_ptr,
    nonfinite_step_ptr,
    first,
    num_rows,
    step,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    QUARANTINES: tl.constexpr,
):
    start_of_row = tl.program_id(0).to(tl.int64) * (2 * PIECES + C)
    index = _int64(header_ptr + start_of_row, PIECES)
    given_label = _int64(header_ptr + start_of_row + PIECES, PIECES)
    logits_ptr += start_of_row + 2 * PIECES
    row = index - first
    is_real = (row >= 0) & (row < num_rows)
    row = tl.where(is_real, row, num_rows)  # the spare one
    label = tl.minimum(tl.maximum(given_label, 0), C - 1)
    tl.atomic_add(bad_index_ptr, 1, mask=(index != _PADDING) & (is_real == 0), sem="relaxed")
    tl.atomic_add(bad_label_ptr, 1, mask=(label != given_label) & is_real, sem="relaxed")
    tl.atomic_add(visits_ptr + row, 1, sem="relaxed")
    tl.store(label_ptr + row, label)

    # 1 extremes; of equal logits the first class counts
    c = tl.arange(0, BLOCK)
    x = _load(logits_ptr, c, C)
    is_strange = (c < C) & ((tl.abs(x) <= _LARGEST) == 0)
    largest_B, at_label_B = x, tl.where(c == label, x, 0.0)
    best_B, best_class_B = tl.where(c == label, -float("inf"), x), c
    if C > BLOCK:
        for start in range(BLOCK, C, BLOCK):
            d = start + c
            y = _load(logits_ptr, d, C)
            is_strange |= (d < C) & ((tl.abs(y) <= _LARGEST) == 0)
            largest_B = tl.maximum(largest_B, y)
            at_label_B += tl.where(d == label, y, 0.0)
            rival = tl.where(d == label, -float("inf"), y)
            best_class_B = tl.where(rival > best_B, d, best_class_B)
            best_B = tl.maximum(best_B, rival)
    is_nonfinite = tl.max(is_strange.to(tl.int32), axis=0) > 0
    largest, logit = tl.max(largest_B, axis=0), tl.sum(at_label_B, axis=0)
    other_logit = tl.max(best_B, axis=0)
    other = tl.min(tl.where(best_B == other_logit, best_class_B, C), axis=0)
    tl.atomic_add(nonfinite_ptr + row, 1, mask=is_nonfinite & is_real, sem="relaxed")
    tl.atomic_min(nonfinite_step_ptr, step.to(tl.int64), mask=is_nonfinite & is_real, sem="relaxed")
    if QUARANTINES:  # a row of zeros
        x = tl.where(is_nonfinite & (c < C), 0.0, x)
        largest = tl.where(is_nonfinite, 0.0, largest)
        logit = tl.where(is_nonfinite, 0.0, logit)
        other_logit = tl.where(is_nonfinite, 0.0, other_logit)
        other = tl.where(is_nonfinite, (label == 0).to(tl.int32), other)

    # 2 the sum under the softmax
    total_B = _math.exp(x - largest)
    if C > BLOCK:
        for start in range(BLOCK, C, BLOCK):
            y = _load(logits_ptr, start + c, C)
            if QUARANTINES:
                y = tl.where(is_nonfinite & (start + c < C), 0.0, y)
            total_B += _math.exp(y - largest)
    total = tl.sum(total_B, axis=0)
    log_total, share = _math.log(total), tl.div_rn(1.0, total)

    # 3 the new row and its scalars
    previous_ptr += row * C
    official_B, paper_B, ce_B, p_label_B, p_other_B, entropy_B, error_B = _block(
        x, c, previous_ptr, largest, log_total, share, label, other, C, HAS_PREVIOUS
    )
    if C > BLOCK:
        for start in range(BLOCK, C, BLOCK):
            y = _load(logits_ptr, start + c, C)
            if QUARANTINES:
                y = tl.where(is_nonfinite & (start + c < C), 0.0, y)
            official, paper, ce, p_label, p_other, entropy, error = _block(
                y, start + c, previous_ptr, largest, log_total, share, label, other, C, HAS_PREVIOUS
            )
            official_B += official
            paper_B += paper
            ce_B += ce
            p_label_B += p_label
            p_other_B += p_other
            entropy_B += entropy
            error_B += error
    scalars_ptr += row * _NUM_SCALARS
    if HAS_PREVIOUS:
        tl.store(scalars_ptr, tl.sum(official_B, axis=0))
        tl.store(scalars_ptr + 1, tl.sum(paper_B, axis=0))
        tl.store(scalars_ptr + 2, tl.sum(ce_B, axis=0))
    else:
        for delta in tl.static_range(3):
            tl.store(scalars_ptr + delta, float("nan"))
    p_label = tl.sum(p_label_B, axis=0)
    is_correct = (logit > other_logit) | ((logit == other_logit) & (label < other))
    tl.store(scalars_ptr + 3, p_label)
    tl.store(scalars_ptr + 4, logit - other_logit)
    tl.store(scalars_ptr + 5, p_label - tl.sum(p_other_B, axis=0))
    tl.store(scalars_ptr + 6, -tl.sum(entropy_B, axis=0))
    tl.store(scalars_ptr + 7, tl.sqrt_rn(tl.sum(error_B, axis=0)))
    tl.store(scalars_ptr + 8, is_correct.to(tl.float32))


# ---- compiled only


def compiled(
    num_classes: int,
    dtype: torch.dtype,
    logp_dtype: torch.dtype,
    has_previous: bool = True,
    quarantines: bool = True,
    num_warps: int | None = None,
    capability: int = 90,
) -> Any:
    """Compile a variant as a launch with aligned rows does, for a GPU that need not be here
    (`capability`: 90 is sm_90); return Triton's kernel, whose `asm` has the texts `ttgir` and `ptx`
    and the bytes `cubin`. Raises what the compilers raise."""
    block, usual_warps = blocks(num_classes)
    pieces = header_width(dtype) // 2
    constants = {
        "C": num_classes,
        "BLOCK": block,
        "PIECES": pieces,
        "HAS_PREVIOUS": has_previous,
        "QUARANTINES": quarantines,
    }
    pointers = {
        "header_ptr": "*i32" if pieces == 2 else "*i16",
        "logits_ptr": f"*{_TYPES[dtype]}",
        "previous_ptr": f"*{_TYPES[logp_dtype]}",
        "scalars_ptr": "*fp32",
        "label_ptr": "*i64",
        "visits_ptr": "*i32",
        "nonfinite_ptr": "*i32",
        "bad_index_ptr": "*i64",
        "bad_label_ptr": "*i64",
        "nonfinite_step_ptr": "*i64",
    }
    signature = {
        **pointers,
        **dict.fromkeys(("first", "num_rows", "step"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}
    source = ASTSource(_update_row, signature, constants, aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps or usual_warps},
    )
