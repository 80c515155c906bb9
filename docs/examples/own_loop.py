"""TDDS in a training loop of your own: plain PyTorch, scikit-learn's digits, no FFCV. Runs alone or under torchrun.

    python docs/examples/own_loop.py
    torchrun --nproc-per-node 2 docs/examples/own_loop.py

With a directory behind it, the per-epoch numbers of every image go there, and every other score comes from them:

    python docs/examples/own_loop.py my_trajectory
    tdds score my_trajectory --all --out my_scores
"""

import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from tdds_dist import ShardedScorer, Window, epoch_order

if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

digits = load_digits()
image, label = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
if dist.is_initialized():
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

window = Window(T=12, K=5, beta=0.9)
scorer = ShardedScorer(num_samples=len(label), num_classes=10, windows=[window], device="cpu",
                       trajectory=sys.argv[1] if len(sys.argv) > 1 else None)
for epoch in range(12):
    for index in epoch_order(len(label), 64, epoch=epoch).of_rank(rank, world_size)[1]:  # -1 fills the last batch
        index = torch.tensor(index)
        logits = model(image[index])
        scorer.record(index, logits.detach(), label[index])
        loss = (nn.functional.cross_entropy(logits, label[index], reduction="none") * (index >= 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scorer.end_epoch()
scores = scorer.gather()[window]

if rank == 0:
    print(f"scored {len(scores)} images; kept first: {scores.argsort(descending=True)[:5].tolist()}")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # DDP leaves threads of gloo behind, which now and then abort Python's own way out
