"""A coreset in timm: a training script that keeps the images that a list names.

    tdds export CORESET.npz --format paths --out kept.txt
    python docs/examples/coreset_timm.py DIR kept.txt

timm numbers images and classes in natural order (2 before 10), so indices would name other images: paths do not. `DIR` is the
folder that was written, with train/<class>/<image>. A removed class keeps its number.
"""

import sys
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2


def keep(dataset: torch.utils.data.Dataset, directory: str, paths: str) -> None:
    """Drop all images of timm's folder dataset but those in the file `paths`, which are relative to `directory`."""
    kept = {Path(directory, line).resolve() for line in Path(paths).read_text().splitlines()}
    found = [(file, label) for file, label in dataset.reader.samples if Path(file).resolve() in kept]
    assert len(found) == len(kept), f"{len(kept) - len(found)} paths are not in the dataset"
    dataset.reader.samples = found


if __name__ == "__main__":
    directory, paths = sys.argv[1:]
    dataset = create_dataset("", root=directory, split="train", is_training=True)
    num_all, num_classes = len(dataset), len(dataset.reader.class_to_idx)
    keep(dataset, directory, paths)
    batch = min(32, len(dataset))  # timm drops what does not fill the last one
    loader = create_loader(dataset, (3, 64, 64), batch_size=batch, is_training=True, num_workers=1, use_prefetcher=False)
    model = timm.create_model("test_resnet", num_classes=num_classes)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
    for image, label in loader:
        loss = torch.nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained on {len(dataset)} of {num_all} images; loss {loss:.3f}")
