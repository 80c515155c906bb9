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

    The network runs once on shapes alone (torch's meta device), which costs no memory.
    """
    for file, view in zip((train_file, val_file), build_views(config), strict=True):
        check_view(file, view)
    size, name = config.data.image_size, config.model.name
    try:
        model = build_on_meta(name, config.data.num_classes, cifar_stem=config.model.cifar_stem)
        output = model(torch.empty(rows, 3, size, size, device="meta"))
    except InputError:
        raise
    except Exception as error:  # torchvision's networks say in many ways that an image is too small
        raise InputError(f"model.name={name} cannot train on {rows} images of {size}x{size} per rank and step "
                         f"({error}); use another data.image_size, network, or a larger train.global_batch_size") from error
    if not isinstance(output, torch.Tensor):
        raise InputError(f"model.name={name} gives several outputs in training; use a network with one")


def open_files(config: Config, decode_some: bool = False) -> tuple[BetonInfo, BetonInfo, Fingerprint]:
    """The training and evaluation files, checked against the config, and the fingerprint of the training labels.

    With `decode_some` a sample of the images is checked as well (one rank is enough for that).

    Raises:
        InputError: file missing or damaged, label outside [0, C), another number of classes.
    """
    files, manifests = [], []
    for key in ("train", "val"):
        path = Path(getattr(config.data, key))
        if not path.is_file():
            raise InputError(f"data.{key}={path} does not exist; write it with `tdds write SOURCE {path}`")
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
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov)


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
    """How training and evaluation see an image."""
    data = config.data
    train_view = View(data.image_size, data.crop, flip=data.flip, padding=data.padding, scale=(data.scale_min, 1.0))
    return train_view, View(data.image_size, "center", ratio=data.eval_crop_ratio)


def set_deterministic(wanted: bool) -> None:
    """Let torch use only algorithms that give the same bits every time, or any."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's linear algebra starts
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # would only cost
    torch.backends.cudnn.benchmark = False
