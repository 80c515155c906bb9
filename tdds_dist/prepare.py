"""What a training run is made of, built and checked from its config: files, views, network, optimizer, mixing.

`open_files` and `preflight` find what would fail at the first step, before anything is written.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

from tdds_dist.artifacts import Fingerprint
from tdds_dist.beton import BetonInfo, check_labels, dataset_fingerprint, inspect_beton, read_manifest
from tdds_dist.check import quick_check
from tdds_dist.config import Config
from tdds_dist.errors import InputError
from tdds_dist.loader import View, check_view
from tdds_dist.models import build_on_meta


def preflight(config: Config, train_file: BetonInfo, val_file: BetonInfo, rows: int) -> None:
    """InputError for a network or a view that would fail at the first step of `rows` images per rank.

    The network runs on shapes alone (torch's meta device), which costs no memory: once for every size that it may see.
    """
    views = build_views(config)
    for file, view in zip((train_file, val_file), views, strict=True):
        check_view(file, view)
    name = config.model.name
    model = build_on_meta(name, config.data.num_classes, cifar_stem=config.model.cifar_stem)
    for size in training_sizes(config):
        key = "data.image_size" if size == config.data.image_size else "data.progressive"
        output = _try(model.train(), rows, size, f"model.name={name} cannot train on", key)
        if not isinstance(output, torch.Tensor):
            raise InputError(f"model.name={name} gives several outputs in training; use a network with one")
    if views[1].size != config.data.image_size:
        _try(model.eval(), rows, views[1].size, f"model.name={name} cannot evaluate", "data.eval_size")


def _try(model: nn.Module, rows: int, size: int, what: str, key: str) -> Any:
    """Output on images of this size; an InputError that says `what` fails, and the key to change."""
    try:
        return model(torch.empty(rows, 3, size, size, device="meta"))
    except Exception as error:  # torchvision's networks say in many ways that an image is too small
        raise InputError(f"{what} {rows} images of {size}x{size} per rank and step ({error}); use another {key}, network, or a "
                         "larger train.global_batch_size") from error


def open_files(config: Config, decode_some: bool = False) -> tuple[BetonInfo, BetonInfo, Fingerprint]:
    """The training and evaluation files, checked against the config, and the fingerprint of the training labels.

    With `decode_some` a sample of the images is checked as well (one rank is enough for that).

    Raises:
        InputError: file missing or damaged, label outside [0, C), another number of classes.
    """
    config.data.check_files()
    files, manifests = [], []
    for path in (Path(config.data.train), Path(config.data.val)):
        files.append(inspect_beton(path))
        manifests.append(read_manifest(path))
    classes = [manifest.num_classes for manifest in manifests if manifest is not None]
    if len(classes) == 2 and classes[0] != classes[1]:
        raise InputError(f"data.train={config.data.train} has {classes[0]} classes, data.val={config.data.val} {classes[1]}; "
                         "give two splits of one dataset")
    for info, manifest in zip(files, manifests, strict=True):
        check_labels(info, config.data.num_classes, manifest, complete=info is files[0])
        if decode_some:
            quick_check(info.path, info, manifest)
    return files[0], files[1], dataset_fingerprint(files[0], config.data.num_classes)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD or AdamW; one-dimensional parameters (norms, biases) without weight decay when the config says so."""
    train = config.train
    everything = list(model.parameters())
    if train.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": everything, "weight_decay": train.weight_decay}]
    else:
        groups = [{"params": [p for p in everything if p.ndim > 1], "weight_decay": train.weight_decay},
                  {"params": [p for p in everything if p.ndim <= 1], "weight_decay": 0.0}]
    fused = everything[0].is_cuda if train.fused_optimizer is None else train.fused_optimizer
    kind = {"fused": True} if fused else {}  # torch chooses among the others itself
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, **kind)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov, **kind)


def build_mix(config: Config) -> Any:
    """MixUp and/or CutMix on (image, label), or None."""
    classes = config.data.num_classes
    mixes: list[Any] = []
    if config.train.mixup:
        mixes.append(v2.MixUp(alpha=config.train.mixup, num_classes=classes))
    if config.train.cutmix:
        mixes.append(v2.CutMix(alpha=config.train.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if mixes else None


def build_views(config: Config) -> tuple[View, View]:
    """How training (from data.progressive's last epoch on) and evaluation see an image."""
    data = config.data
    train_view = View(data.image_size, data.crop, flip=data.flip, padding=data.padding, scale=(data.scale_min, 1.0))
    return train_view, View(data.eval_size or data.image_size, "center", ratio=data.eval_crop_ratio)


def training_size(config: Config, epoch: int, epochs: int) -> int:
    """Side of the training images in `epoch` (from 0) of `epochs`, pixels: libffcv/ffcv-imagenet's `get_resolution`.

    Where `epochs` is not train.epochs (a coreset's), its first epoch stands for the first, its last for the last, and those
    in between lie evenly.
    """
    final, sizes = config.data.image_size, config.data.progressive
    if sizes is None:
        return final
    at = epoch * (config.train.epochs - 1) / (epochs - 1) if epochs > 1 else config.train.epochs - 1
    if at <= sizes.from_epoch:
        return sizes.start_size
    if at >= sizes.to_epoch:
        return final
    exact = sizes.start_size + (final - sizes.start_size) * (at - sizes.from_epoch) / (sizes.to_epoch - sizes.from_epoch)
    return min(max(round(exact / sizes.multiple) * sizes.multiple, sizes.start_size), final)


def training_sizes(config: Config) -> list[int]:
    """All that `training_size` may give, for any number of epochs; ascending."""
    final, sizes = config.data.image_size, config.data.progressive
    if sizes is None:
        return [final]
    between = range(-(-sizes.start_size // sizes.multiple) * sizes.multiple, final, sizes.multiple)
    return sorted({sizes.start_size, *between, final})


def set_deterministic(wanted: bool) -> None:
    """Let torch use only algorithms that give the same bits every time, or any."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's linear algebra starts
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # would only cost
    torch.backends.cudnn.benchmark = not wanted  # tries algorithms and takes the fastest, which may differ from run to run
