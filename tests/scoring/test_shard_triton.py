"""The kernel against the plain update: run by Triton's interpreter, on a GPU, and compiled for GPUs
that need not be here.

The interpreter is chosen before Triton is imported, hence processes of their own, which call the
functions of this file.
"""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.scoring import scorer
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.shard import Arrived, Shard, pack, update

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIRST = 10  # the shard's first index


def rows_of(C, dtype, epoch, num_rows=8, device="cpu"):
    """Packed rows of an epoch: ties, certain rows, bad labels and indices, padding, and (rows 5 to
    7) no finite numbers."""
    generator = torch.Generator().manual_seed(100 * C + epoch)
    logits = torch.randn(num_rows + 3, C, generator=generator) * 4
    logits[1] = logits[1].round()
    logits[2] = 0.5
    logits[3, C // 2] = 2e4
    logits[5, C // 2], logits[6, C - 1], logits[7, 0] = torch.nan, -torch.inf, torch.inf
    logits[num_rows:] = torch.nan
    label = torch.randint(C, (num_rows + 3,), generator=generator)
    label[1], label[2], label[3], label[5], label[6] = (
        logits[1].argmax(),
        epoch * C // 2,
        C // 2,
        C + 2,
        -1,
    )
    index = torch.tensor([*range(FIRST, FIRST + num_rows), -1, FIRST - 1, FIRST + num_rows])
    order = torch.randperm(num_rows + 3, generator=generator)
    return [
        Arrived(
            pack(index[part].to(device), label[part].to(device), logits.to(dtype)[part].to(device)),
            dtype,
            step,
        )
        for step, part in ((7, order[:4]), (8, order[4:4]), (9, order[4:]))
    ]


def compare(C, dtype, logp_dtype, quarantines, num_rows=8, device="cpu", close=2e-5):
    """Two epochs by the kernel and by the plain update: the same tables and counters."""
    from tdds_dist.scoring import shard_triton

    plain, kernel = (
        Shard(FIRST, FIRST + num_rows, C, "dense", logp_dtype, torch.device(device))
        for _ in range(2)
    )
    is_judged = torch.tensor(
        [quarantines or row not in (5, 6, 7) for row in range(num_rows)], device=device
    )
    for epoch in range(2):
        arrived = rows_of(C, dtype, epoch, num_rows, device)
        kept = [part.payload_RX.clone() for part in arrived]
        shard_triton.update(kernel, arrived, epoch > 0, quarantines)
        assert all(
            torch.equal(part.payload_RX, before) for part, before in zip(arrived, kept, strict=True)
        ), "input changed"
        update(plain, arrived, epoch > 0, quarantines)
        for name in ("bad_index", "bad_label", "nonfinite_step"):
            assert getattr(kernel, name) == getattr(plain, name), (name, C)
        expected = plain.tables()
        for name, table in kernel.tables().items():
            found, wanted = table[:num_rows], expected[name][:num_rows]
            if name not in ("logp", "scalars"):
                assert torch.equal(found, wanted), (name, C)
                continue
            # float16 rows may round to the neighbour; a float32 logarithm is known to some 1e-7 of
            # the largest logit
            tolerance = 1e-3 if logp_dtype == torch.float16 and (name == "logp" or epoch) else close
            torch.testing.assert_close(
                found[is_judged].float(),
                wanted[is_judged].float(),
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda text: f"{name} {C} {epoch} {text}",  # noqa: B023
            )
        correct = SCALARS.index("correct")
        assert torch.equal(
            kernel.scalars_MF[:num_rows, correct][is_judged],
            plain.scalars_MF[:num_rows, correct][is_judged],
        )
        for shard in (plain, kernel):
            shard.begin_epoch()


def company(C, dtype, num_rows=8, device="cpu"):
    """The same rows together, one by one, some at a time, and behind others: the same bits."""
    from tdds_dist.scoring import shard_triton

    everything = torch.cat([part.payload_RX for part in rows_of(C, dtype, 1, num_rows, device)])
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
        for sample, index in zip(
            torch.from_numpy(order.sample_SG), torch.from_numpy(order.index_SG), strict=True
        ):
            scorer.record(index, logits[sample], label[sample])
        scorer.end_epoch()
    return scorer.gather()[Window(4, 3, 0.9)], scorer.gather_labels()


# ---- by the interpreter


def small():
    """Run in the interpreter: few classes, every dtype of logits and of rows, with and without
    quarantine; a whole scorer."""
    for C, dtype, logp_dtype, quarantines in itertools.product(
        (2, 10), DTYPES, DTYPES[:2], (True, False)
    ):
        compare(C, dtype, logp_dtype, quarantines)
    company(3, torch.float32)
    company(10, torch.bfloat16)
    (found, label), (expected, label_too) = whole_scorer(True), whole_scorer(False)
    assert len(found) == 23
    assert torch.equal(label, label_too)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def large():
    for dtype, logp_dtype, quarantines in itertools.product(DTYPES, DTYPES[:2], (True, False)):
        compare(1000, dtype, logp_dtype, quarantines)
    company(1000, torch.float32)


def largest():
    """More classes than one block: each dtype, though not all together."""
    cases = list(itertools.product(DTYPES, DTYPES[:2], (True, False)))
    for C, number in itertools.product((4096, 4999), (0, 3, 5, 10)):
        compare(C, *cases[number])
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
    compare(num_classes, dtype, logp_dtype, quarantines, 120, "cuda", 5e-5)


@gpu
@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(10, torch.float32), (1000, torch.bfloat16), (9001, torch.float32)]
)
def test_no_company_changes_a_bit_of_what_the_kernel_gives_on_a_gpu(num_classes, dtype):
    company(num_classes, dtype, 60, "cuda")


# ---- compiled, or not


@pytest.mark.parametrize(
    ("num_classes", "dtype", "logp_dtype"),
    [
        (1000, "fp32", "fp32"),
        (1000, "bf16", "fp16"),
        (4096, "fp32", "fp32"),
        (21841, "bf16", "fp32"),
    ],
)
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(num_classes, dtype, logp_dtype):
    """With libdevice's functions, vector loads where rows are aligned, one read and one write of a
    row up to 4,096 classes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tdds_dist.scoring import shard_triton

    pieces, block, num_warps = (2 if dtype == "fp32" else 4), *shard_triton.blocks(num_classes)
    tables = {
        "previous_ptr": f"*{logp_dtype}",
        "scalars_ptr": "*fp32",
        "label_ptr": "*i64",
        "visits_ptr": "*i32",
        "nonfinite_ptr": "*i32",
        "bad_index_ptr": "*i64",
        "bad_label_ptr": "*i64",
        "nonfinite_step_ptr": "*i64",
    }
    constants = {
        "C": num_classes,
        "BLOCK": block,
        "PIECES": pieces,
        "HAS_PREVIOUS": True,
        "QUARANTINES": True,
    }
    signature = {
        "header_ptr": "*i32" if pieces == 2 else "*i16",
        "logits_ptr": f"*{dtype}",
        **tables,
        "first": "i32",
        "num_rows": "i32",
        "step": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(
        shard_triton._update_row,
        signature,
        constants,
        {(place,): [["tt.divisibility", 16]] for place in range(10)},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}
    )
    ptx = compiled.asm["ptx"]
    assert "lg2.approx" not in ptx, "Triton's own log"
    assert compiled.asm["cubin"]
    if num_classes <= shard_triton.ONE_BLOCK:
        is_wide = [line for line in ptx.splitlines() if "ld.global" in line and ".v" in line]
        bytes_per_thread = block // num_warps // 32 * (int(dtype[-2:]) + int(logp_dtype[-2:])) // 8
        assert len(is_wide) == bytes_per_thread // 16, (
            "each of the two rows is read once, 16 bytes at a time"
        )


def test_where_the_kernel_fails_the_plain_update_is_taken_and_said(monkeypatch):
    """Here it does fail: there is no device for it."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine where Triton finds no device")
    cpu = torch.device("cpu")
    shard = Shard(0, 5, 7, "dense", torch.float32, cpu)
    problem = scorer._kernel_problem(shard, cpu)
    assert problem
    assert "\n" not in problem
    assert not any(table[:5].any() for table in shard.tables().values())
    assert not scorer._has_kernel(shard, cpu), "nothing is tried on the CPU"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(scorer, "_kernel_problem", lambda shard, device: problem)
    with pytest.warns(UserWarning, match="by plain torch operations.*the kernel fails"):
        assert not scorer._has_kernel(shard, torch.device("cuda"))
    monkeypatch.setattr(scorer, "_kernel_problem", lambda shard, device: None)
    assert scorer._has_kernel(shard, torch.device("cuda"))
    assert not scorer._has_kernel(
        Shard(0, 5, 7, "topk:3", torch.float32, cpu), torch.device("cuda")
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # NumPy about infinity minus infinity
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
    print(sys.argv[1], "done")
