"""What only a GPU can show: the same scores as on the CPU, and no wait for the device in a step.

The kernel's own tests are in tests/scoring/test_shard_triton.py.
"""

import numpy as np
import pytest
import torch

from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed.partition import epoch_order

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def scores_on(device, dtype=torch.float32, forbid_sync=False, storage="dense", fused=True):
    generator = torch.Generator().manual_seed(0)
    logits_TNC = (torch.randn(6, 500, 100, generator=generator) * 3).to(dtype)
    label_N = torch.randint(100, (500,), generator=generator)
    window = Window(6, 4, 0.9)
    scorer = ShardedScorer(500, 100, [window], device=device, storage=storage)
    scorer._is_fused &= fused
    for epoch in range(6):
        order = epoch_order(500, 64, epoch=epoch)
        scorer.expect(order)
        rows = [torch.from_numpy(index_B) for index_B in order.of_rank(0, 1)[1]]
        batches = [
            (index.to(device), logits_TNC[epoch, index].to(device), label_N[index].to(device))
            for index in rows
        ]
        if forbid_sync:
            torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            scorer.record(*batch)
        torch.cuda.set_sync_debug_mode("default")
        scorer.end_epoch()
    return scorer.gather()[window].numpy()


@pytest.mark.parametrize(
    ("storage", "fused"), [("dense", True), ("dense", False), ("topk:10", False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gpu_gives_the_scores_of_the_cpu(dtype, storage, fused):
    found = scores_on("cuda", dtype, storage=storage, fused=fused)
    np.testing.assert_allclose(
        found, scores_on("cpu", dtype, storage=storage), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("storage", ["dense", "topk:10"])
def test_a_step_does_not_wait_for_the_device(storage):
    scores_on("cuda", forbid_sync=True, storage=storage)


def test_a_step_is_two_kernels():
    """One packs the rows of this step, one updates those of the step before."""
    from torch.profiler import ProfilerActivity, profile

    scorer = ShardedScorer(512, 1000, [Window(3, 2)], device="cuda")
    logits_BC, label_B = (
        torch.randn(64, 1000, device="cuda"),
        torch.zeros(64, dtype=torch.int64, device="cuda"),
    )
    for _ in range(2):
        batches = [index_B.cuda() for index_B in torch.arange(512).split(64)]
        scorer.expect(epoch_order(512, 64, shuffle=False))
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for index_B in batches:
                scorer.record(index_B, logits_BC, label_B)
            torch.cuda.synchronize()
        scorer.end_epoch()
    kernels = [
        event.name
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert sum("_update_row" in name for name in kernels) == 7, (
        "the last step waits for the next call"
    )
    assert len(kernels) <= 2 * 8, kernels


def test_the_loader_hands_over_intact_images_while_the_gpu_is_busy(betons):
    """The GPU lags behind; a decoding buffer that is overwritten before its copy ran would show."""
    from tdds_dist.data.beton import inspect_beton, read_images
    from tdds_dist.data.loader import BetonLoader, View

    expected = torch.from_numpy(np.stack(read_images(betons["raw"], range(97))))
    order = epoch_order(97, 4)
    loader = BetonLoader(inspect_beton(betons["raw"]), 4, View(32), device="cuda")
    sleep = torch.randn(3000, 3000, device="cuda")
    kept = []
    for batch in loader.batches(order, rank=0, world_size=1, epoch=0):
        for _ in range(20):
            sleep = sleep @ sleep * 1e-4
        kept.append((batch.index, batch.image))
    for index, image in kept:
        real = index >= 0
        assert torch.equal(image.permute(0, 2, 3, 1)[real].cpu(), expected[index[real].cpu()])
