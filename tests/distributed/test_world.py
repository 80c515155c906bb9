"""The end of a process group."""

from contextlib import nullcontext

import pytest
import torch.distributed as dist

from tdds_dist.distributed.world import session


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:62114", nullcontext()),
        (
            "[unbound_buffer.cc:81] Timed out waiting 60000ms",
            pytest.raises(RuntimeError, match="Timed out"),
        ),
    ],
)
def test_ranks_that_leave_first_are_no_failure_of_the_last(monkeypatch, said, outcome):
    """A rank may be through the last barrier, and gone, before another hears of it; one that hangs
    is another matter."""

    def barrier():
        raise RuntimeError(said)

    monkeypatch.setattr(dist, "barrier", barrier)
    try:
        with outcome, session("cpu"):
            pass
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
