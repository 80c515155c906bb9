"""The kernel against the plain update: run by Triton's interpreter, on a GPU, and compiled for GPUs
that need not be here.

The interpreter is chosen before Triton is imported, hence processes of their own, which call the
functions of this file.
"""

import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.scoring.kernel_check import disagreement, failures, hard_rows, kernel_works
from tdds_dist.scoring.shard import Arrived, Shard

pytest.importorskip("triton")
from benchmarks.kernel import compiled, disassembled, table  # load Triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIRST = 10  # the shard's first index


def agree(C, dtype, logp_dtype, quarantines):
    assert disagreement(C, dtype, logp_dtype, quarantines, "cpu", 8, 2e-5) is None, (C, dtype)


def company(C, dtype, num_rows=8, device="cpu"):
    """The same rows together, one by one, some at a time, and behind others: the same bits."""
    from tdds_dist.scoring import shard_triton

    everything = torch.cat([part.payload_RX for part in hard_rows(C, dtype, 1, num_rows, device)])
    logp_MC = -torch.rand(num_rows + 1, C, generator=torch.Generator().manual_seed(3))
    found = []
    for parts in ([everything], [everything.flip(0)], everything.split(1), everything.split(7)):
        shard = Shard(FIRST, FIRST + num_rows, C, "dense", torch.float32, torch.device(device))
        shard.previous.logp_MC.copy_(logp_MC)
        shard_triton.update(shard, [Arrived(part, dtype, 0) for part in parts], True, True)
        found.append(
            {
                name: table[:num_rows].contiguous().view(torch.uint8)
                for name, table in shard.tables().items()
            }
        )
    for tables in found[1:]:
        assert all(torch.equal(table, found[0][name]) for name, table in tables.items())


def whole_scorer(is_fused):
    """Scores and labels of a whole scorer, with or without the kernel put in."""
    scorer = ShardedScorer(23, 6, [Window(4, 3, 0.9)], device="cpu", on_nan="stop")
    scorer._is_fused = is_fused
    for epoch in range(4):
        generator = torch.Generator().manual_seed(epoch)
        logits, label = torch.randn(23, 6, generator=generator), torch.arange(23) % 6
        order = epoch_order(23, 8, epoch=epoch)
        scorer.expect(order)
        for sample, index in zip(*map(torch.from_numpy, order.of_rank(0, 1)), strict=True):
            scorer.record(index, logits[sample], label[sample])
        scorer.end_epoch()
    return scorer.gather()[Window(4, 3, 0.9)], scorer.gather_labels()


# ---- by the interpreter


def small():
    """Run in the interpreter: few classes, every dtype of logits and of rows, with and without
    quarantine; a whole scorer."""
    cases = [*itertools.product(DTYPES, DTYPES[:2], (True, False))]
    for C, some in ((10, cases), (2, cases[::5])):
        for case in some:
            agree(C, *case)
    for logp_dtype, quarantines in itertools.product(DTYPES[:2], (True, False)):
        shard = Shard(FIRST, FIRST + 3, 7, "dense", logp_dtype, torch.device("cpu"))
        assert list(failures(shard, quarantines).values()) == [None] * 6
        assert not any(table[:3].any() for table in shard.tables().values()), "a trace is left"
    company(3, torch.float32)
    company(10, torch.bfloat16)
    (found, label), (expected, label_too) = whole_scorer(True), whole_scorer(False)
    assert len(found) == 23
    assert torch.equal(label, label_too)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def large():
    for dtype, logp_dtype, quarantines in itertools.product(DTYPES, DTYPES[:2], (True, False)):
        agree(1000, dtype, logp_dtype, quarantines)
    company(1000, torch.float32)


def largest():
    """More classes than one block: each dtype, though not all together."""
    cases = list(itertools.product(DTYPES, DTYPES[:2], (True, False)))
    for C, number in itertools.product((4096, 4999), (0, 3, 5, 10)):
        agree(C, *cases[number])
    company(4097, torch.float16)


@pytest.mark.parametrize(
    "program",
    [
        "small",
        pytest.param("large", marks=pytest.mark.slow),
        pytest.param("largest", marks=pytest.mark.slow),
    ],
)
def test_the_interpreted_kernel_gives_what_the_plain_update_gives(program):
    done = subprocess.run(
        [sys.executable, "-m", "tests.scoring.test_shard_triton", program],
        timeout=280,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{program} done\n"


# ---- on a GPU


def gpu(test):
    return pytest.mark.cuda(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test)
    )


@gpu
@pytest.mark.parametrize("quarantines", [True, False])
@pytest.mark.parametrize("logp_dtype", DTYPES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [2, 10, 999, 1000, 4096, 4097, 21841, 65536])
def test_the_kernel_on_a_gpu_gives_what_the_plain_update_gives(
    num_classes, dtype, logp_dtype, quarantines
):
    assert disagreement(num_classes, dtype, logp_dtype, quarantines, "cuda") is None


@gpu
@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(10, torch.float32), (1000, torch.bfloat16), (9001, torch.float32)]
)
def test_no_company_changes_a_bit_of_what_the_kernel_gives_on_a_gpu(num_classes, dtype):
    company(num_classes, dtype, 60, "cuda")


# ---- compiled for GPUs that are not here


@pytest.mark.parametrize(
    ("num_classes", "dtype", "logp_dtype"),
    [
        (1000, torch.float32, torch.float32),
        (1000, torch.bfloat16, torch.float16),
        (4096, torch.float32, torch.float32),
        (21841, torch.bfloat16, torch.float32),
    ],
)
def test_the_kernel_takes_the_functions_of_libdevice_and_wide_loads(num_classes, dtype, logp_dtype):
    """Up to 4,096 classes each of the two rows is read once, 16 bytes at a time."""
    from tdds_dist.scoring import shard_triton

    ptx = compiled(num_classes, dtype, logp_dtype).asm["ptx"]
    assert "lg2.approx" not in ptx, "Triton's own log"
    if num_classes <= shard_triton.ONE_BLOCK:
        block, num_warps = shard_triton.blocks(num_classes)
        is_wide = [line for line in ptx.splitlines() if "ld.global" in line and ".v" in line]
        bytes_per_thread = block // num_warps // 32 * (dtype.itemsize + logp_dtype.itemsize)
        assert len(is_wide) == bytes_per_thread // 16


def row_traffic(text):
    """From PTX or disassembled machine code: (bytes of a thread that are loaded of the previous row
    and stored of the new one, whether a store may follow a load with no barrier between).

    Which load and store is meant is said by the line of the source that the compiler notes.
    """
    from tdds_dist.scoring import shard_triton

    path = Path(shard_triton.__file__)
    letter_of_line = {
        number: letter
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for letter, call in {"L": "tl.load(previous_ptr", "S": "tl.store(previous_ptr"}.items()
        if call in line
    }
    assert sorted(letter_of_line.values()) == ["L", "S"]
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "(.*)"', text, re.MULTILINE))  # of PTX
    steps, place_of_label, sizes = [], {}, {"L": 0, "S": 0}
    letter, is_noted = None, False
    for line in text.splitlines():
        noted = re.match(r'\s*(?:\.loc\s+(\d+) |//## File "(.*?)", line )(\d+)', line)
        if noted and not is_noted:  # of several notes the first is the innermost function's
            name = files[noted[1]] if noted[1] else noted[2]
            letter = letter_of_line.get(int(noted[3])) if Path(name).name == path.name else None
        is_noted = bool(noted)
        kind, target = "", None
        if label := re.match(r"([.$]L\w+):", line):
            place_of_label[label[1]] = len(steps)
        elif branch := re.search(r"\b(?:bra|BRA)\b.*?([.$]L\w+)", line):
            target = branch[1]
            kind = "" if re.search(r"@|BRA\.|BRA !?U?P|BRA.*,", line) else "end"
        elif re.search(r"\b(?:ret;|EXIT\b|RET\b)", line) and "@" not in line:
            kind = "end"
        elif re.search(r"\bbar\.sync\s+0;|\bBAR\.SYNC\S*\s+0x0\b", line):
            kind = "B"
        elif letter and (
            access := re.search(r"\b(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", line)
            or re.search(r"\b(?:LDG|STG)\.E()(?:\.U?(\d+))?\b", line)
        ):
            kind = letter
            sizes[letter] += int(access[1] or 1) * int(access[2] or 32) // 8
        steps.append((kind, target))
    ahead, seen = [place + 1 for place, step in enumerate(steps) if step[0] == "L"], set()
    while ahead:
        place = ahead.pop()
        if place in seen or place == len(steps):
            continue
        seen.add(place)
        kind, target = steps[place]
        if kind == "S":
            return sizes, True
        if target:
            ahead.append(place_of_label[target])
        if kind not in ("B", "end"):
            ahead.append(place + 1)
    return sizes, False


def check_barriers(C, dtype, logp_dtype, has_previous, quarantines, **options):
    from tdds_dist.scoring import shard_triton

    kernel = compiled(C, dtype, logp_dtype, has_previous, quarantines, **options)
    block = shard_triton.blocks(C)[0]
    per_thread = max(1, block // (32 * kernel.metadata.num_warps)) * logp_dtype.itemsize
    per_thread *= 2 if block < C else 1  # the first block, and the others in a loop
    expected = {"L": per_thread * has_previous, "S": per_thread}, False
    assert row_traffic(kernel.asm["ptx"]) == expected
    assert row_traffic(disassembled(kernel)) == expected


# in a first epoch no row is read; float16 logits are compiled as bfloat16 ones are
VARIANTS = [
    (C, dtype, logp_dtype, True, quarantines)
    for C, dtype, logp_dtype, quarantines in itertools.product(
        (10, 100, 1000, 4096, 21848), DTYPES, DTYPES[:2], (True, False)
    )
    if dtype != torch.float16 or C in (1000, 21848)
] + [(C, torch.bfloat16, torch.float32, False, False) for C in (1000, 21848)]


def is_quick(C, dtype, logp_dtype, has_previous, quarantines):
    """Those of ImageNet's default, and every size of numbers with one block and with several."""
    usual = dtype == torch.bfloat16 and logp_dtype == torch.float32
    return (
        (usual or (C in (1000, 21848) and dtype != torch.float16))
        and has_previous
        and not quarantines
    )


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=() if is_quick(*variant) else pytest.mark.slow)
        for variant in VARIANTS
    ],
    ids=lambda variant: "-".join(str(part).removeprefix("torch.") for part in variant),
)
def test_no_thread_overwrites_a_row_that_another_one_still_reads(variant):
    """In PTX and in machine code a barrier stands between the last load of the previous row and
    the first store of the new one: the compiler may divide the two over the threads differently."""
    check_barriers(*variant)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"capability": 80}, {"capability": 100}, {"num_warps": 2}])
def test_the_barrier_stands_there_for_other_gpus_and_warps(options):
    for variant in VARIANTS:
        if is_quick(*variant):
            check_barriers(*variant, **options)


def test_loads_and_stores_of_a_row_are_divided_differently():
    """Else the barrier would do nothing, and the test above would prove nothing."""
    text = compiled(1000, torch.bfloat16, torch.float32).asm["ttgir"]
    load, store = (
        re.search(rf"tt\.{name} %previous.*tensor<1024x!tt\.ptr<f32>, (#\w+)>", text)[1]
        for name in ("load", "store")
    )
    assert load != store


@pytest.mark.slow
def test_the_page_has_the_table_of_this_compiler():
    import triton

    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    if f"Triton {triton.__version__} " not in page:
        pytest.skip(f"the table of docs/performance.md is not of Triton {triton.__version__}")
    assert table() in page, "put in what `python -m benchmarks.kernel` prints"


# ---- where it fails


def test_where_the_kernel_fails_the_plain_update_is_taken_and_said():
    """Here it does fail: there is no device for it."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine where Triton finds no device")
    shard = Shard(0, 5, 7, "dense", torch.float32, torch.device("cpu"))
    found = failures(shard, False)
    assert list(found) == [
        f"{dtype} logits, {epoch} epoch"
        for dtype in ("float32", "float16", "bfloat16")
        for epoch in ("the first", "a later")
    ]
    assert all(found.values())
    assert "\n" not in "".join(found.values())
    assert not any(table[:5].any() for table in shard.tables().values())
    with warnings.catch_warnings(action="error"):
        assert not kernel_works(shard, False), "nothing is tried on the CPU"
    with FakeTensorMode():
        shard, compact = (
            Shard(0, 5, 7, storage, torch.float32, torch.device("cuda"))
            for storage in ("dense", "topk:3")
        )
        with pytest.warns(UserWarning, match="by plain torch.*fails for float32 logits, the first"):
            assert not kernel_works(shard, False)
        with warnings.catch_warnings(action="error"):
            assert not kernel_works(compact, False), "the kernel knows dense rows only"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # NumPy about infinity minus infinity
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
    print(sys.argv[1], "done")
