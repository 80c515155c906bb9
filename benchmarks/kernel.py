"""What compilers make of the kernel of `scoring/shard_triton.py`, for GPUs that need not be here:
registers, spills and barriers. Prints the table of docs/performance.md: `python -m
benchmarks.kernel`.
"""

# C classes

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from tdds_dist.scoring.shard_triton import compiled

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
_ROWS: tuple[tuple[int, torch.dtype, torch.dtype, int | None], ...] = (
    (10, torch.bfloat16, torch.float32, None),
    (100, torch.bfloat16, torch.float32, None),
    (1000, torch.bfloat16, torch.float32, None),
    (1000, torch.bfloat16, torch.float32, 2),
    (1000, torch.bfloat16, torch.float16, None),
    (1000, torch.float32, torch.float32, None),
    (4096, torch.bfloat16, torch.float32, None),
    (21841, torch.bfloat16, torch.float32, None),
)


class Usage(NamedTuple):
    """Of a program: registers of a thread, bytes of a thread that are spilled from registers, and
    barriers in the code."""

    registers: int
    spilled_bytes: int
    barriers: int


def disassembled(kernel: Any) -> str:
    """Return the machine code of a compiled kernel as text, with the lines of the source."""
    return _tool(triton.knobs.nvidia.nvdisasm.path, kernel, "-g", "-c")


def usage(kernel: Any) -> Usage:
    """Return what a compiled kernel needs."""
    text = _tool(triton.knobs.nvidia.cuobjdump.path, kernel, "--dump-resource-usage")
    sizes = dict(re.findall(r"(\w+):(\d+)", text))
    barriers = len(re.findall(r"\bBAR\.", disassembled(kernel)))
    return Usage(int(sizes["REG"]), int(sizes["STACK"]) + int(sizes["LOCAL"]), barriers)


def _tool(program: str, kernel: Any, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        done = subprocess.run(
            [program, *options, str(path)], capture_output=True, text=True, check=True
        )
    return done.stdout


def table() -> str:
    """Return the page's table: a line for each of `_ROWS`, the figures of `CAPABILITIES` side by
    side."""
    names = ", ".join(f"sm_{capability}" for capability in CAPABILITIES)
    lines = [
        f"| classes | logits | rows | warps | registers per thread ({names}) | spilled bytes"
        " | barriers |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for num_classes, dtype, logp_dtype, num_warps in _ROWS:
        kernels = [
            compiled(num_classes, dtype, logp_dtype, num_warps=num_warps, capability=capability)
            for capability in CAPABILITIES
        ]
        columns = zip(*(usage(kernel) for kernel in kernels), strict=True)
        warps = f"{kernels[0].metadata.num_warps}{' (not used)' * (num_warps is not None)}"
        cells = [f"{num_classes:,}", *(str(kind)[6:] for kind in (dtype, logp_dtype)), warps]
        cells += [", ".join(map(str, column)) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"Triton {triton.__version__}\n\n{table()}")
