"""Skip images on the way with timm: its network, optimizer and schedule, a plain DataLoader. Runs alone or under torchrun.

    python docs/examples/pruning_timm.py
    torchrun --nproc-per-node 2 docs/examples/pruning_timm.py
"""

import os

import timm
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from tdds_dist import PruningPlan, PruningSchedule, ShardedScorer, Window, epoch_order

EPOCHS, BATCH, C = 6, 128, 10  # images of a step, over all ranks
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

digits = load_digits()
N, image = len(digits.target), torch.tensor(digits.images[:, None], dtype=torch.float32) / 16
dataset = TensorDataset(interpolate(image, scale_factor=2), torch.tensor(digits.target))

torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=16, patch_size=4, in_chans=1, num_classes=C)
network = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3)
scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS)

scorer = ShardedScorer(N, C, [Window(T=EPOCHS, K=3, beta=0.9)], device="cpu", partial_epochs=True)
schedule = PruningSchedule(PruningPlan("progressive", N, EPOCHS, rate=0.5), scorer)
seen = 0
for epoch in range(EPOCHS):
    visits = schedule.decide(epoch)  # the same on every rank
    num = N if visits.subset_M is None else len(visits.subset_M)
    order = epoch_order(num, BATCH, epoch=epoch, subset=visits.subset_M)
    scorer.expect(order)
    weight = torch.ones(N) if visits.weight_N is None else torch.from_numpy(visits.weight_N)
    samples, indices = order.of_rank(rank, world_size)  # of each step; an index of -1 fills the last batch
    loader = DataLoader(dataset, batch_sampler=samples.tolist())
    for (image, label), index in zip(loader, torch.from_numpy(indices.copy()), strict=True):
        logits = network(image)
        scorer.record(index, logits.detach(), label)
        loss = (cross_entropy(logits, label, reduction="none") * weight[index] * (index >= 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step(epoch + 1)
    scorer.end_epoch()
    seen += num
if rank == 0:
    print(f"loss {loss:.3f}; saw {seen} of {EPOCHS * N} images", flush=True)
os._exit(0)  # DDP leaves threads of gloo behind, which now and then abort Python's own way out
