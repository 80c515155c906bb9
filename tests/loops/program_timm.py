"""A training script in the shape of timm's train.py, on a folder of images whose grey says which
they are; it knows nothing of scores, and keeps every row that its network saw.

program_timm.py FOLDER KIND STOP_AT_EPOCH(0: never) [resume]
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm import utils
from timm.data import create_dataset, create_loader
from timm.models import create_model, register_model, resume_checkpoint
from timm.optim import create_optimizer_v2
from torch import nn

N, C, BATCH, EPOCHS = 43, 5, 4, 4
folder, kind, stop_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ranks = int(os.environ.get("WORLD_SIZE", "1"))
rank = int(os.environ.get("RANK", "0"))
label_N = np.sort(np.random.default_rng(0).integers(C, size=N))
if rank == 0:
    for index, label in enumerate(label_N):
        path = folder / "data" / "train" / f"class{label}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index * 5,) * 3).save(path)
utils.random_seed(0, 0)
if ranks > 1:
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()


class Head(nn.Module):
    """Learns something of one grey value."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, C))

    def forward(self, image):
        return self.layers(image.mean((1, 2, 3))[:, None])


@register_model
def head(**_):
    return Head()


model = inner = create_model("head")
average = utils.ModelEmaV2(model)
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.5)
first = 0
if "resume" in sys.argv[4:]:
    first = resume_checkpoint(model, folder / "last.pth.tar", optimizer)
if ranks > 1:
    model = nn.parallel.DistributedDataParallel(model)
if "compiled" in kind:
    model = torch.compile(model, backend="eager")
dataset = create_dataset("", root=folder / "data", split="train", is_training=True)
loader, tests = (
    create_loader(
        dataset,
        (3, 8, 8),
        batch_size=BATCH,
        is_training=is_training,
        no_aug=True,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        num_workers=int("workers" in kind),
        distributed=ranks > 1,
        device=torch.device("cpu"),
        use_prefetcher="prefetcher" in kind,
        use_multi_epochs_loader="workers" in kind,
    )
    for is_training in (True, False)
)
for batches in (loader.batch_sampler, loader.batch_sampler.sampler):
    if hasattr(batches, "drop_last"):  # as it is while scored
        batches.drop_last = False
saver = utils.CheckpointSaver(inner, optimizer, checkpoint_dir=str(folder)) if rank == 0 else None
for epoch in range(first, EPOCHS):
    torch.manual_seed(epoch)
    if ranks > 1:
        loader.sampler.set_epoch(epoch)
    model.train()
    for step, (image, label) in enumerate(loader):
        # of dropout: a loader that goes on draws other numbers than a new one
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in kind):
            logits = model(image)
            loss = nn.functional.cross_entropy(logits.float(), label)
        index = (image[:, 0, 0, 0] * 51).round().long()
        assert label.tolist() == label_N[index].tolist()
        name = f"seen_{epoch:02d}_{step:03d}_{rank}.npz"
        np.savez(folder / name, index=index.numpy(), logits=logits.detach().float().numpy())
        loss.backward()
        if step % 2 or step == len(loader) - 1:  # accumulates
            optimizer.step()
            optimizer.zero_grad()
        average.update(inner)
    assert step == len(loader) - 1
    model.eval()
    with torch.no_grad():
        for image, _label in tests:
            model(image), average.module(image)
    if stop_at == epoch and stop_at:
        ranks > 1 and torch.distributed.barrier()
        os._exit(7)
    if saver:
        saver.save_checkpoint(epoch, metric=epoch)
if rank == 0:
    weights = torch.cat([value.flatten() for value in inner.state_dict().values()])
    np.savez(folder / "result.npz", weights=weights.detach().numpy(), label=label_N)
if ranks > 1:
    torch.distributed.distributed_c10d.destroy_process_group(torch.distributed.group.WORLD)
