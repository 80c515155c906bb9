"""Host memory that copies to and from a GPU go through, threads that use the GPU, and what this
process holds.

torch's page-locked memory is rounded up to powers of two and stays with the process for good. Here
it is exact to the page, and goes back to the system with the last array or tensor that is made of
it.
"""

import itertools
import logging
import mmap
import resource
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

_ALIGNMENT_BYTES = 64
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every CUDA context
log = logging.getLogger("tdds")


class DeviceThread(threading.Thread):
    """A daemon that runs `work` on a device, as every thread of ours that may use CUDA does.

    A thread begins on device 0 otherwise, and the first that it asks of CUDA makes a context there:
    half a gigabyte on the GPU of another rank.
    """

    def __init__(self, work: Callable[[], object], device: torch.device, name: str):
        super().__init__(name=name, daemon=True)
        self._work = work
        # one without a number is the device of the thread that asks
        self._index = (
            (torch.cuda.current_device() if device.index is None else device.index)
            if device.type == "cuda"
            else None
        )

    def run(self) -> None:
        """Choose the device, then do the work."""
        if self._index is not None:
            torch.cuda.set_device(self._index)
        self._work()


def allocate(sizes: Sequence[int], device: torch.device) -> list[np.ndarray]:
    """Return fresh memory in pieces of so many bytes, uint8 arrays, from one block; page-locked for
    a CUDA device.

    Where the system refuses to lock it, a warning says so, and copies take longer.
    """
    starts = [
        0,
        *itertools.accumulate(-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes),
    ]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, max(1, starts[-1]), flags=flags)
    block = np.frombuffer(pages, np.uint8)
    if device.type == "cuda":
        pages.madvise(mmap.MADV_DONTFORK)  # the device keeps writing to these very pages
        _lock(block, device)
    return [block[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _lock(block: np.ndarray, device: torch.device) -> None:
    address = block.ctypes.data
    error = int(torch.cuda.cudart().cudaHostRegister(address, block.nbytes, _PORTABLE))
    if error:
        with suppress(RuntimeError):
            torch.zeros(1, device=device)  # the launch of a kernel reports the error, and clears it
        log.warning(
            f"{block.nbytes:,} bytes of host memory could not be page-locked (CUDA error {error});"
            " copies to and from the GPU take longer"
        )
        return
    # All pieces refer to `block`, so it is still there while any of them is, and goes before its
    # pages do.
    weakref.finalize(block, _unlock, address, device).atexit = False


def _unlock(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)


def reset_peak() -> bool:
    """Let the kernel count the peak of the resident memory from now on; return False where it does
    not, with or without saying so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_bytes(True) <= resident_bytes() + 10_000_000  # both are counted in lots


def peak_bytes(has_reset: bool) -> int:
    """Return the peak of the resident memory since the reset, or of all the process."""
    if has_reset:
        return resident_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(key: str = "VmRSS") -> int:
    """Return what the kernel says of this process' resident memory: now, or its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
