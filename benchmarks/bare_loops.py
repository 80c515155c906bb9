"""Training loops without any of our code, for `benchmarks.throughput` to compare with: plain DDP,
SGD with momentum and cross-entropy, fed by FFCV's own loader, or by torchvision's ImageFolder and
torch's DataLoader.

They do what examples of these libraries do, and nothing for exactness, scoring, resuming or errors:
FFCV's own augmentation is unseeded, its random order on several ranks repeats images where they do
not divide evenly (the benchmark's do).
"""

# B rows of a rank and step

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the others abort with two loaders, or after a fork
os.environ.setdefault("NUMBA_THREADING_LAYER", "tbb")

import torch
import torch.nn.functional as F
import torchvision
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import (
    RandomHorizontalFlip,
    RandomTranslate,
    Squeeze,
    ToDevice,
    ToTensor,
    ToTorchImage,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler
from torchvision import transforms

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, on 0..255
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
# of images that are stored at the size the network sees; others are cut out at random and resized
PADDING = 2


@dataclass(frozen=True)
class Recipe:
    """What all loops of a setting have in common. `rows`, `workers` (decoding) and `device` are of
    one rank."""

    network: str
    num_classes: int
    size: int
    is_padded: bool
    rows: int
    workers: int
    channels_last: bool
    compile: bool
    device: torch.device
    rank: int
    world_size: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def ffcv_batches(recipe: Recipe, beton: Path) -> Loader:
    """FFCV's loader with its own operations: uint8 images and labels of this rank.

    Images are normalised in the step: torch operations in FFCV's thread would have a pool of
    threads of their own, and two pools on the same CPUs cost a small network half of its speed.
    """
    decode = (
        [SimpleRGBImageDecoder(), RandomTranslate(padding=PADDING)]
        if recipe.is_padded
        else [RandomResizedCropRGBImageDecoder((recipe.size, recipe.size))]
    )
    to_device = [ToDevice(recipe.device, non_blocking=True)] if recipe.on_gpu else []
    # Operations that FFCV compiles come before those of torch: the other way round its constructor
    # does not return.
    image = [
        *decode,
        RandomHorizontalFlip(),
        ToTensor(),
        *to_device,
        ToTorchImage(channels_last=recipe.channels_last),
    ]
    label = [IntDecoder(), ToTensor(), *to_device, Squeeze(1)]
    return Loader(
        str(beton),
        batch_size=recipe.rows,
        num_workers=recipe.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        distributed=recipe.world_size > 1,
        seed=0,
        drop_last=False,
        pipelines={"image": image, "label": label},
    )


class FolderBatches:
    """The usual ImageFolder and DataLoader, one pass over `num_images` (the folder as often as that
    takes) per iteration."""

    def __init__(self, recipe: Recipe, folder: Path, num_images: int):
        cut = (
            transforms.RandomCrop(recipe.size, padding=PADDING)
            if recipe.is_padded
            else transforms.RandomResizedCrop(recipe.size)
        )
        to_floats = transforms.Normalize(
            [value / 255 for value in MEAN], [value / 255 for value in STD]
        )
        images = torchvision.datasets.ImageFolder(
            str(folder),
            transforms.Compose(
                [cut, transforms.RandomHorizontalFlip(), transforms.ToTensor(), to_floats]
            ),
        )
        assert num_images % len(images) == 0, (num_images, len(images))
        repeated: Any = ConcatDataset([images] * (num_images // len(images)))
        self._sampler: Any = DistributedSampler(repeated, recipe.world_size, recipe.rank)
        self._loader = DataLoader(
            repeated,
            recipe.rows,
            sampler=self._sampler,
            num_workers=recipe.workers,
            pin_memory=recipe.on_gpu,
            persistent_workers=True,
            multiprocessing_context="fork",
        )
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self._sampler.set_epoch(self._epoch)
        self._epoch += 1
        return iter(self._loader)


class BareLoop:
    """A network under DDP with its optimizer, and the shortest loop that trains it."""

    def __init__(self, recipe: Recipe, batches: Iterable[Any]):
        self._recipe, self._batches = recipe, batches
        self._format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self._mean = torch.tensor(MEAN, device=recipe.device).view(1, 3, 1, 1)
        self._scale = 1.0 / torch.tensor(STD, device=recipe.device).view(1, 3, 1, 1)
        network = torchvision.models.get_model(
            recipe.network, weights=None, num_classes=recipe.num_classes
        )
        network = network.to(recipe.device, memory_format=self._format)
        self._model = DistributedDataParallel(
            network,
            device_ids=[recipe.device] if recipe.on_gpu else None,
            gradient_as_bucket_view=True,
        )
        if recipe.compile:
            self._model.compile()
        self._optimizer = torch.optim.SGD(
            network.parameters(),
            lr=LR,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=WEIGHT_DECAY,
            fused=recipe.on_gpu,
        )

    def epoch(self) -> int:
        """One pass over the batches; returns the images of this rank."""
        device, num_images = self._recipe.device, 0
        self._model.train()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            for image, label in self._batches:
                image = image.to(device, non_blocking=True)
                if image.dtype == torch.uint8:
                    image = (image.float() - self._mean) * self._scale
                image = image.contiguous(memory_format=self._format)
                label = label.to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=self._recipe.on_gpu):
                    logits_BC = self._model(image)
                F.cross_entropy(logits_BC.float(), label).backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
                num_images += len(label)
        return num_images


def count(batches: Iterable[Any]) -> int:
    """One pass over the batches without training; returns the images of this rank."""
    return sum(len(label) for _, label in batches)
