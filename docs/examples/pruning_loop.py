"""Skip images on the way in a training loop of your own: plain PyTorch, scikit-learn's digits. Runs alone or under torchrun.

    python docs/examples/pruning_loop.py infobatch
    torchrun --nproc-per-node 2 docs/examples/pruning_loop.py progressive
"""

import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from tdds_dist import PruningPlan, PruningSchedule, ShardedScorer, Window, epoch_order

if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

digits = load_digits()
image, label = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
if dist.is_initialized():
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

N, C, EPOCHS = len(label), 10, 12
plan = PruningPlan(sys.argv[1] if len(sys.argv) > 1 else "infobatch", N, EPOCHS, rate=0.5)
scorer = ShardedScorer(N, C, [Window(T=EPOCHS, K=5, beta=0.9)], device="cpu", partial_epochs=True)
schedule = PruningSchedule(plan, scorer)
seen = 0
for epoch in range(EPOCHS):
    visits = schedule.decide(epoch)  # the same on every rank
    subset, num = visits.subset_M, N if visits.subset_M is None else len(visits.subset_M)
    weight = torch.ones(N) if visits.weight_N is None else torch.from_numpy(visits.weight_N)
    order = epoch_order(num, 64, epoch=epoch, subset=subset)
    scorer.expect(order)
    for index in order.of_rank(rank, world_size)[1]:  # -1 fills the last batch
        index = torch.tensor(index)
        logits = model(image[index])
        scorer.record(index, logits.detach(), label[index])
        loss = nn.functional.cross_entropy(logits, label[index], reduction="none") * weight[index]
        loss = (loss * (index >= 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scorer.end_epoch()
    seen += num

if rank == 0:
    correct = (model(image).argmax(1) == label).double().mean().item()
    print(f"saw {seen} of {EPOCHS * N} images; {100 * correct:.1f} % of them are learned")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # DDP leaves threads of gloo behind, which now and then abort Python's own way out
