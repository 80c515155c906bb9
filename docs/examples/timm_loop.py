"""TDDS with timm: its network, optimizer, schedule and Mixup, a plain DataLoader. Runs alone or under torchrun.

    python docs/examples/timm_loop.py
    torchrun --nproc-per-node 2 docs/examples/timm_loop.py
"""

import os

import timm
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tdds_dist import ShardedScorer, Window

EPOCHS, BATCH = 6, 64  # images per rank and step; timm's Mixup wants even batches
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

digits = load_digits()
N = len(digits.target) - 1  # even, so that the last batch is
image = torch.nn.functional.interpolate(torch.tensor(digits.images[:N, None], dtype=torch.float32) / 16, scale_factor=2)
dataset = TensorDataset(image, torch.tensor(digits.target[:N]), torch.arange(N))  # the third is the global index
sampler = DistributedSampler(dataset, world_size, rank)
loader = DataLoader(dataset, BATCH, sampler=sampler)

torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=16, patch_size=4, in_chans=1, num_classes=10)
network = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3)
scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS)
mixup, loss_of = timm.data.Mixup(mixup_alpha=0.2, num_classes=10), SoftTargetCrossEntropy()

window = Window(T=EPOCHS, K=3, beta=0.9)
scorer = ShardedScorer(num_samples=N, num_classes=10, windows=[window], device="cpu")
for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for step, (image, label, index) in enumerate(loader):
        row = torch.arange(len(index)) + step * BATCH
        index[row * world_size + rank >= N] = -1  # the sampler repeats samples so that all ranks have as many
        with torch.no_grad():  # mixed images are no sample's: score the clean ones, in evaluation mode
            scorer.record(index, model.eval()(image), label)
        model.train()
        mixed, target = mixup(image, label)
        loss = loss_of(network(mixed), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step(epoch + 1)
    scorer.end_epoch()
scores = scorer.gather()[window]
if rank == 0:
    print(f"loss {loss:.3f}; scored {len(scores)} images; kept first: {scores.argsort(descending=True)[:5].tolist()}")
