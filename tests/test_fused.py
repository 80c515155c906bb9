"""The kernel against the plain update: run by Triton's interpreter, and compiled for GPUs that need not be here.

The interpreter is chosen before Triton is imported, hence processes of their own. What only a GPU shows is in test_cuda.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdds_dist import scorer
from tdds_dist.rows import Shard

pytest.importorskip("triton")

CASES = """
import itertools, json, sys, warnings
import torch
from tdds_dist import ShardedScorer, Window, fused
from tdds_dist.partition import epoch_order
from tdds_dist.rows import Arrived, Shard, pack, update
from tdds_dist.scalars import SCALARS

warnings.simplefilter("ignore")  # NumPy about infinity minus infinity
torch.set_num_threads(1)
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FIRST, ROWS = 10, 8


def rows_of(C, dtype, epoch):
    '''Packed rows of an epoch: ties, certain rows, bad labels and indices, padding, and (rows 5 to 7) no finite numbers.'''
    generator = torch.Generator().manual_seed(100 * C + epoch)
    logits = torch.randn(ROWS + 3, C, generator=generator) * 4
    logits[1] = logits[1].round()
    logits[2] = 0.5
    logits[3, C // 2] = 2e4
    logits[5, C // 2], logits[6, C - 1], logits[7, 0] = torch.nan, -torch.inf, torch.inf
    logits[ROWS:] = torch.nan
    label = torch.randint(C, (ROWS + 3,), generator=generator)
    label[1], label[2], label[3], label[5], label[6] = logits[1].argmax(), epoch * C // 2, C // 2, C + 2, -1
    index = torch.tensor([*range(FIRST, FIRST + ROWS), -1, FIRST - 1, FIRST + ROWS])
    order = torch.randperm(ROWS + 3, generator=generator)
    return [Arrived(pack(index[part], label[part], logits.to(dtype)[part]), dtype, step)
            for step, part in ((7, order[:4]), (8, order[4:4]), (9, order[4:]))]


def compare(C, dtype, logp_dtype, quarantines):
    plain, kernel = (Shard(FIRST, FIRST + ROWS, C, "dense", logp_dtype, CPU) for _ in range(2))
    finite = slice(0, ROWS if quarantines else 5)
    for epoch in range(2):
        arrived = rows_of(C, dtype, epoch)
        kept = [part.payload_RX.clone() for part in arrived]
        fused.update(kernel, arrived, epoch > 0, quarantines)
        assert all(torch.equal(part.payload_RX, before) for part, before in zip(arrived, kept)), "input changed"
        update(plain, arrived, epoch > 0, quarantines)
        for name in ("bad_index", "bad_label", "nonfinite_step"):
            assert getattr(kernel, name) == getattr(plain, name), (name, C)
        expected = plain.tables()
        for name, table in kernel.tables().items():
            found, wanted = table[finite].float(), expected[name][finite].float()
            if name not in ("logp", "scalars"):
                found, wanted = table[:ROWS], expected[name][:ROWS]
                assert torch.equal(found, wanted), (name, C)
            # float16 rows may round to the neighbour; a float32 logarithm is known to some 1e-7 of the largest logit
            tolerance = 1e-3 if logp_dtype == torch.float16 and (name == "logp" or epoch) else 2e-5
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True,
                                       msg=lambda text: f"{name} {C} {epoch} {text}")
        correct = SCALARS.index("correct")
        assert torch.equal(kernel.scalars_MF[finite, correct], plain.scalars_MF[finite, correct])
        for shard in (plain, kernel):
            shard.begin_epoch()


def company(C, dtype):
    '''The same rows one by one, and behind others: the same bits.'''
    arrived = rows_of(C, dtype, 1)
    shards = []
    for way in ("together", "alone", "backwards"):
        shard = Shard(FIRST, FIRST + ROWS, C, "dense", torch.float32, CPU)
        shard.previous.logp_MC.copy_(-torch.rand(ROWS + 1, C, generator=torch.Generator().manual_seed(3)))
        everything = torch.cat([part.payload_RX for part in arrived])
        parts = {"together": [everything], "backwards": [everything.flip(0)],
                 "alone": [everything[row : row + 1] for row in range(len(everything))]}[way]
        fused.update(shard, [Arrived(part, dtype, 0) for part in parts], True, True)
        shards.append({name: table[:ROWS].contiguous().view(torch.uint8) for name, table in shard.tables().items()})
    for shard in shards[1:]:
        assert all(torch.equal(table, shards[0][name]) for name, table in shard.items())


def scores(fused_too):
    '''A whole scorer, with the kernel put in.'''
    scorer = ShardedScorer(23, 6, [Window(4, 3, 0.9)], device="cpu", on_nan="stop")
    scorer._is_fused = fused_too
    for epoch in range(4):
        generator = torch.Generator().manual_seed(epoch)
        logits, label = torch.randn(23, 6, generator=generator), torch.arange(23) % 6
        order = epoch_order(23, 8, epoch=epoch)
        scorer.expect(order)
        for sample, index in zip(torch.from_numpy(order.sample_SG), torch.from_numpy(order.index_SG)):
            scorer.record(index, logits[sample], label[sample])
        scorer.end_epoch()
    return scorer.gather()[Window(4, 3, 0.9)], scorer.gather_labels()

"""


def interpreted(program):
    """Run under the interpreter; the program has the names of CASES."""
    done = subprocess.run([sys.executable, "-c", CASES + program], capture_output=True, text=True, timeout=280, check=False,
                          cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("classes", [(2, 10), (1000,), (4096, 4999)])
def test_the_kernel_gives_what_the_plain_update_gives(classes):
    """Every dtype of logits and of rows, with and without a previous epoch and quarantine."""
    interpreted(f"""
for C, (number, (dtype, logp_dtype, quarantines)) in itertools.product({classes}, enumerate(itertools.product(
        DTYPES.values(), (torch.float32, torch.float16), (True, False)))):
    if C < 4000 or number in (0, 3, 5, 10):  # all of them, though not together
        compare(C, dtype, logp_dtype, quarantines)
""")


def test_no_company_changes_a_bit_of_what_the_kernel_gives():
    interpreted("""
for C, dtype in ((3, torch.float32), (10, torch.bfloat16), (1000, torch.float32), (4097, torch.float16)):
    company(C, dtype)
""")


def test_a_scorer_with_the_kernel():
    out = interpreted("""
(found, label), (expected, label_too) = scores(True), scores(False)
assert torch.equal(label, label_too)
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
print(len(found))
""")
    assert out == "23"


@pytest.mark.parametrize(("num_classes", "dtype", "logp_dtype"), [
    (1000, "fp32", "fp32"), (1000, "bf16", "fp16"), (4096, "fp32", "fp32"), (21841, "bf16", "fp32")])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(num_classes, dtype, logp_dtype):
    """With libdevice's functions, vector loads where rows are aligned, one read and one write of a row up to 4,096 classes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tdds_dist import fused

    pieces, block, num_warps = (2 if dtype == "fp32" else 4), *fused.blocks(num_classes)
    tables = {"previous_ptr": f"*{logp_dtype}", "scalars_ptr": "*fp32", "label_ptr": "*i64", "visits_ptr": "*i32",
              "nonfinite_ptr": "*i32", "bad_index_ptr": "*i64", "bad_label_ptr": "*i64", "nonfinite_step_ptr": "*i64"}
    constants = {"C": num_classes, "BLOCK": block, "PIECES": pieces, "HAS_PREVIOUS": True, "QUARANTINES": True}
    signature = {"header_ptr": "*i32" if pieces == 2 else "*i16", "logits_ptr": f"*{dtype}", **tables, "first": "i32",
                 "num_rows": "i32", "step": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fused._update_row, signature, constants, {(place,): [["tt.divisibility", 16]] for place in range(10)})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    assert "lg2.approx" not in ptx, "Triton's own log"
    assert compiled.asm["cubin"]
    if num_classes <= fused.ONE_BLOCK:
        is_wide = [line for line in ptx.splitlines() if "ld.global" in line and ".v" in line]
        bytes_per_thread = block // num_warps // 32 * (int(dtype[-2:]) + int(logp_dtype[-2:])) // 8
        assert len(is_wide) == bytes_per_thread // 16, "each of the two rows is read once, 16 bytes at a time"


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
    assert not scorer._has_kernel(Shard(0, 5, 7, "topk:3", torch.float32, cpu), torch.device("cuda"))
