"""Host memory for copies, and threads that use a GPU. What CUDA is told is recorded: no GPU is
needed to see it."""

import gc
import mmap
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tdds_dist.distributed import host_memory
from tdds_dist.distributed.host_memory import DeviceThread, allocate

CPU, SECOND_GPU = torch.device("cpu"), torch.device("cuda", 1)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_is_as_large_as_asked_for_and_goes_back_with_its_last_user():
    sizes = [0, 3, 33_000_000, 10]
    before = resident_bytes()
    pieces = allocate(sizes, CPU)
    assert [piece.nbytes for piece in pieces] == sizes
    assert all(piece.ctypes.data % 64 == 0 for piece in pieces)
    for value, piece in enumerate(pieces):
        piece[:] = value
    assert [np.unique(piece).tolist() for piece in pieces] == [[], [1], [2], [3]]
    table = torch.from_numpy(pieces[2]).view(torch.bfloat16)
    assert table.untyped_storage().nbytes() == 33_000_000  # else torch's writer would copy it
    del pieces, piece
    assert resident_bytes() - before > 32_000_000
    del table
    gc.collect()
    assert resident_bytes() - before < 3_000_000


class Cuda:
    """Records what is asked of CUDA's runtime."""

    def __init__(self, monkeypatch, error=0):
        self.calls, self.error = [], error
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: self.note("device", index))
        monkeypatch.setattr(torch.cuda, "device", lambda device: _On(self, device))

    def note(self, *call):
        self.calls.append((*call, threading.current_thread().name))

    def cudaHostRegister(self, address, num_bytes, flags):
        self.note("lock", address, num_bytes, flags)
        return self.error

    def cudaHostUnregister(self, address):
        # the pages are still there
        assert any(
            int(low, 16) <= address < int(high, 16)
            for low, high in re.findall(
                r"^(\w+)-(\w+) ", Path("/proc/self/maps").read_text(), re.MULTILINE
            )
        )
        self.note("unlock", address)
        return 0


class _On:
    def __init__(self, cuda, device):
        self.cuda, self.device = cuda, device

    def __enter__(self):
        self.cuda.note("on", self.device)

    def __exit__(self, *_):
        pass


def test_memory_for_a_gpu_is_locked_once_as_a_whole_and_as_long_as_it_is_used(monkeypatch):
    cuda = Cuda(monkeypatch)
    pieces = allocate([100, 1000], SECOND_GPU)
    address = pieces[0].ctypes.data
    assert cuda.calls == [("lock", address, 128 + 1024, 1, "MainThread")]
    table = torch.from_numpy(pieces[1]).view(torch.float32)
    del pieces
    gc.collect()
    assert len(cuda.calls) == 1
    del table
    gc.collect()
    assert [call[:2] for call in cuda.calls[1:]] == [("on", SECOND_GPU), ("unlock", address)]


def test_memory_that_cannot_be_locked_is_used_as_it_is(monkeypatch, caplog):
    cuda = Cuda(monkeypatch, error=2)
    pieces = allocate([1000], SECOND_GPU)
    pieces[0][:] = 1
    assert "1,024 bytes of host memory could not be page-locked (CUDA error 2)" in caplog.text
    del pieces
    gc.collect()
    assert len(cuda.calls) == 1


@pytest.mark.parametrize(("device", "chosen"), [(SECOND_GPU, [("device", 1, "reader")]), (CPU, [])])
def test_a_thread_chooses_its_device_before_anything_else(monkeypatch, device, chosen):
    cuda = Cuda(monkeypatch)
    thread = DeviceThread(lambda: cuda.note("work"), device, "reader")
    thread.start()
    thread.join()
    assert cuda.calls == [*chosen, ("work", "reader")]


def test_every_other_thread_is_named_here():
    """A plain thread begins on GPU 0: it may not use CUDA before it has chosen its own."""
    root = Path(host_memory.__file__).parents[2]
    plain = {
        str(path.relative_to(root))
        for folder in ("tdds_dist", "launch")
        for path in (root / folder).rglob("*.py")
        if re.search(r"\bThread\(|\(threading\.Thread\)", path.read_text())
    }
    assert plain <= {
        "tdds_dist/distributed/host_memory.py",
        "tdds_dist/experiments/findings.py",  # chooses it itself, once there is one
        "tdds_dist/distributed/world.py",  # asks the store
        "tdds_dist/runs/lock.py",  # the sign of life
        "tdds_dist/training/trackers.py",  # is given numbers, never a tensor
    }


def test_peak_of_memory_counts_from_the_reset() -> None:
    with mmap.mmap(-1, 64_000_000) as large:  # what malloc frees may stay with the process
        large.write(bytes(len(large)))
        with_large = host_memory.peak_bytes(True)
    assert abs(host_memory.peak_bytes(True) - with_large) < 5_000_000, (
        "a peak stays; the kernel counts in lots"
    )
    if not host_memory.reset_peak():
        pytest.skip("this system does not reset the peak")
    assert host_memory.peak_bytes(True) < with_large - 50_000_000
