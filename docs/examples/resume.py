"""TDDS in a training loop of your own that may be stopped at any time: the same command goes on, on any number of ranks.

    python docs/examples/resume.py my_run
    torchrun --nproc-per-node 2 docs/examples/resume.py my_run

Model, optimizer and scorer are saved every other epoch. The scorer's tables are cut along the sample axis; loading cuts them
anew for the ranks there are. The trajectory loses the epochs that are trained again.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from tdds_dist import Checkpoints, ShardedScorer, Window, epoch_order

EPOCHS = 12
run = Path(sys.argv[1])
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

digits = load_digits()
image, label = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
model = nn.parallel.DistributedDataParallel(network) if dist.is_initialized() else network
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

window = Window(T=EPOCHS, K=5, beta=0.9)
checkpoints = Checkpoints(run / "checkpoints")
found = checkpoints.latest()  # the newest that is whole, or None
scorer = ShardedScorer(num_samples=len(label), num_classes=10, windows=[window], device="cpu", trajectory=run / "trajectory",
                       resume=True)  # what is recorded there goes on, or goes
first_epoch = 0
scored = scorer.state_dict()
if found is not None:
    state = {f"model/{name}": value for name, value in network.state_dict().items()}
    checkpoints.load(found, state | {f"scorer/{name}": value for name, value in scored.items()})  # in place
    scorer.load_state_dict(scored)
    first_epoch = found.record["epoch"]

for epoch in range(first_epoch, EPOCHS):
    for index in epoch_order(len(label), 60, epoch=epoch).of_rank(rank, world_size)[1]:  # -1 fills the last batch
        index = torch.tensor(index)
        logits = model(image[index])
        scorer.record(index, logits.detach(), label[index])
        loss = (nn.functional.cross_entropy(logits, label[index], reduction="none") * (index >= 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scorer.end_epoch()
    if epoch % 2 == 1:
        state = {f"model/{name}": value for name, value in network.state_dict().items()}
        state |= {f"scorer/{name}": value for name, value in scorer.state_dict().items()}
        checkpoints.save(epoch + 1, state, {"epoch": epoch + 1})  # in the background
    if epoch + 1 == int(os.environ.get("STOP_AFTER", "0")):
        os._exit(1)  # as if the power went off

checkpoints.close()
scores = scorer.gather()[window]
if rank == 0:
    kept_first = scores.argsort(descending=True)[:5].tolist()
    print(f"trained from epoch {first_epoch}; kept first: {kept_first}; sum {scores.sum():.6f}")
if dist.is_initialized():
    del model, optimizer, scorer, checkpoints, scored, state  # what holds the group: its threads must end before Python does
    dist.barrier()
    dist.destroy_process_group()
