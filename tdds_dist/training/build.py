"""The parts of a training run, built and checked from its config: files, views, network, optimizer,
mixing.

`open_files` and `preflight` find what would fail at the first step, before anything is written.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.transforms import v2

from tdds_dist.config.run import Config
from tdds_dist.config.schema import expand_path
from tdds_dist.config.scores import Window
from tdds_dist.console import log
from tdds_dist.data.beton import (
    BetonInfo,
    content_of,
    dataset_fingerprint,
    inspect_split,
    local_copy,
)
from tdds_dist.data.check import quick_check
from tdds_dist.data.loader import View, check_view
from tdds_dist.data.manifest import Manifest, check_classes, num_shared, read_manifest
from tdds_dist.distributed.collectives import gather_objects, together
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Fingerprint
from tdds_dist.runs.status import Pulse
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.training.schedule import per_rank_batch, training_sizes
from tdds_dist.training.trackers import check_trackers


def preflight(
    config: Config, train_file: BetonInfo, val_file: BetonInfo, rows: int, device_type: str
) -> None:
    """Raise InputError for a network or a view that would fail at the first step of `rows` images
    per rank, on `cpu` or `cuda`.

    The network runs on shapes alone (torch's meta device), which costs no memory: once for every
    size that it may see.
    """
    if config.train.sync_batch_norm and (device_type != "cuda" or config.model.compile):
        raise InputError(
            "train.sync_batch_norm=true works on CUDA only, and without model.compile; set it to"
            " false"
        )
    check_trackers(config)
    views = build_views(config)
    for file, view in zip((train_file, val_file), views, strict=True):
        check_view(file, view)
    name = config.model.name
    model = build_on_meta(name, config.data.num_classes, cifar_stem=config.model.cifar_stem)
    for size in training_sizes(config):
        key = "data.image_size" if size == config.data.image_size else "data.progressive"
        output = _try(model.train(), rows, size, f"model.name={name} cannot train on", key)
        if not isinstance(output, torch.Tensor):
            raise InputError(
                f"model.name={name} gives several outputs in training; use a network with one"
            )
        # Of the operations for which torch.use_deterministic_algorithms raises on CUDA, the only
        # one in torchvision's classifiers of one output (AlexNet, VGG). Pooling to one pixel is a
        # mean, another operation.
        pools = [layer for layer in model.modules() if isinstance(layer, nn.AdaptiveAvgPool2d)]
        if (
            config.train.deterministic
            and device_type == "cuda"
            and any(pool.output_size not in (1, (1, 1)) for pool in pools)
        ):
            raise InputError(
                f"train.deterministic=true: on CUDA, the gradient of the adaptive average pooling"
                f" of model.name={name} is not deterministic; set train.deterministic=false, or"
                " use a network that averages over the whole image, e.g. resnet34"
            )
    if views[1].size != config.data.image_size:
        _try(
            model.eval(),
            rows,
            views[1].size,
            f"model.name={name} cannot evaluate",
            "data.eval_size",
        )


_COPY_POLL_SECONDS = 1.0


def _try(model: nn.Module, rows: int, size: int, what: str, key: str) -> Any:
    """Return the output on images of this size; raise an InputError that says `what` fails, and the
    key to change."""
    try:
        return model(torch.empty(rows, 3, size, size, device="meta"))
    except Exception as error:  # torchvision's networks say in many ways that an image is too small
        raise InputError(
            f"{what} {rows} images of {size}x{size} per rank and step ({error}); use another {key},"
            " network, or a larger train.global_batch_size"
        ) from error


def open_files(
    config: Config, decode_some: bool = False
) -> tuple[BetonInfo, BetonInfo, Fingerprint]:
    """Open the training and evaluation files, check them against the config, and return them with
    the fingerprint of the labels.

    With `decode_some` a sample of the images is checked as well (one rank is enough for that).

    Raises:
        InputError: file missing or damaged, label outside [0, C), another number of classes.
    """
    config.data.check_files()
    files, manifests = [], []
    for split in ("train", "val"):
        files.append(inspect_split(config, split))
        manifests.append(read_manifest(files[-1].path))
    names = [manifest.class_names if manifest is not None else [] for manifest in manifests]
    if all(names) and names[0] != names[1]:
        raise InputError(
            f"data.train={config.data.train} and data.val={config.data.val} have other classes"
            f" ({_first_difference(*names)}); give two splits of one dataset"
        )
    splits = list(zip(files, manifests, strict=True))
    check_classes(splits, config.data.num_classes)
    if decode_some:
        for info, manifest in splits:
            quick_check(info, manifest)
        _warn_of_splits(config, files[0].label_N, names[0], *manifests)
    found = dataset_fingerprint(files[0], config.data.num_classes, names[0])
    return files[0], files[1], found


def checked_files(
    config: Config, world: World
) -> tuple[tuple[BetonInfo, BetonInfo], Fingerprint, dict[str, Any]]:
    """Do `open_files` and `preflight` for a stage on these ranks; return the files, the fingerprint
    of the labels, and on the main rank what the files hold, as `data` for the setting of a run.

    Raises:
        InputError: as those, or the ranks cannot share the batch.
    """
    train = config.train
    rows = per_rank_batch(train.global_batch_size, world.world_size, train.accumulation)
    train_file, val_file, found = open_files(config, decode_some=world.is_main)
    preflight(config, train_file, val_file, rows, world.device.type)
    files = train_file, val_file
    return files, found, {"data": content_of(files)} if world.is_main else {}


def on_this_node(
    config: Config, files: Sequence[BetonInfo], world: World, pulse: Pulse | None = None
) -> list[BetonInfo]:
    """Return the files, or where the config has `data.cache` their copies on this node's disk. A
    collective.

    Raises:
        InputError: as `local_copy`; on every rank.
    """
    if not config.data.cache:
        return [*files]
    with together(world):
        folder = Path(expand_path(config.data.cache))
        if not folder.is_absolute():
            raise InputError(
                f"data.cache={config.data.cache} is {str(folder)!r} here; give a folder of the"
                " node's own disk as a whole path, or a variable that holds one"
            )
    if pulse is not None:
        pulse.beat("copying")
    thread = ThreadPoolExecutor(1)
    try:
        copies = [thread.submit(local_copy, info, folder) for info in files]
        # nodes may take longer than each other by more than the time-out of a collective
        while not all(gather_objects(all(copy.done() for copy in copies), world)):
            wait(copies, timeout=_COPY_POLL_SECONDS)
            if pulse is not None and pulse.is_due:
                pulse.beat("copying")
        with together(world):
            copied = [copy.result() for copy in copies]
    finally:
        # a signal ends the program at once; the next start goes on with the copy
        thread.shutdown(wait=False, cancel_futures=True)
    if pulse is not None:
        pulse.beat("starting")
    return copied


def build_scorer(
    config: Config,
    num_samples: int,
    device: torch.device,
    windows: Sequence[Window] = (),
    **options: Any,
) -> ShardedScorer:
    """Make a scorer as the config asks for it, by default with its windows. A collective.

    `options`: what no config decides, `trajectory`, `resume` and `partial_epochs` of
    `ShardedScorer`.
    """
    score = config.score
    return ShardedScorer(
        num_samples,
        config.data.num_classes,
        windows or config.windows(),
        score.preset,
        device,
        logp_dtype=getattr(torch, score.logp_dtype),
        storage=score.storage,
        trajectory_dtype=getattr(torch, score.trajectory_dtype),
        on_nan=score.on_nan,
        route_every=score.route_every or None,
        **options,
    )


def _warn_of_splits(
    config: Config,
    label_N: np.ndarray,
    names: Sequence[str],
    train: Manifest | None,
    val: Manifest | None,
) -> None:
    """Say which classes have no training image, and whether the evaluation has seen its images in
    training."""
    num_classes = config.data.num_classes
    absent = np.flatnonzero(np.bincount(label_N, minlength=num_classes) == 0).tolist()
    if absent:
        named = ", ".join(names[i] if names else str(i) for i in absent[:5])
        log.warning(
            f"data.train={config.data.train} has no image of {len(absent)} of {num_classes} classes"
            f" ({named}{', ...' if len(absent) > 5 else ''}); no network learns them"
        )
    if train is None or val is None:
        return
    shared = num_shared(train, val)
    # with many images some CRCs are equal by chance, and large datasets hold some twins
    if shared >= max(1, val.num_samples / 100):
        log.warning(
            f"{shared} of the {val.num_samples} images of data.val={config.data.val} are in"
            f" data.train={config.data.train} too, so that accuracy is partly that on training"
            " images; write another split, or hold one out by --holdout of `tdds write`, with the"
            " same share and seed for both files"
        )


def _first_difference(train: Sequence[str], val: Sequence[str]) -> str:
    """Say where two lists of class names part."""
    if len(train) != len(val):
        return f"{len(train)} and {len(val)} of them"
    label = next(label for label, name in enumerate(train) if name != val[label])
    return f"label {label} is {train[label]!r} in the first and {val[label]!r} in the second"


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build SGD or AdamW; one-dimensional parameters (norms, biases) without weight decay when the
    config says so."""
    train = config.train
    everything = list(model.parameters())
    if train.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": everything, "weight_decay": train.weight_decay}]
    else:
        groups = [
            {"params": [p for p in everything if p.ndim > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in everything if p.ndim <= 1], "weight_decay": 0.0},
        ]
    fused = everything[0].is_cuda if train.fused_optimizer is None else train.fused_optimizer
    kind = {"fused": True} if fused else {}  # torch chooses among the others itself
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, **kind)
    optimizer = torch.optim.SGD(
        groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov, **kind
    )
    if fused and train.momentum:
        # torch 2.11 takes uninitialised memory as momentum and lets the first step fill it; with
        # loss scaling a first step that overflows fills nothing, and the next is no longer the
        # first. From zeros the first step gives the same momentum.
        for parameter in everything:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter).detach()
    return optimizer


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: `train.amp` on CUDA, float32 elsewhere."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.amp]
    is_plain = dtype is None or device.type != "cuda"
    return nullcontext() if is_plain else torch.autocast("cuda", dtype=dtype)


def build_mix(config: Config) -> Any:
    """Build MixUp and/or CutMix on (image, label), or None."""
    classes = config.data.num_classes
    mixes: list[Any] = []
    if config.train.mixup:
        mixes.append(v2.MixUp(alpha=config.train.mixup, num_classes=classes))
    if config.train.cutmix:
        mixes.append(v2.CutMix(alpha=config.train.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if mixes else None


def build_views(config: Config) -> tuple[View, View]:
    """Build the views of an image in training (from data.progressive's last epoch on) and in
    evaluation."""
    data = config.data
    train_view = View(
        data.image_size,
        data.crop,
        flip=data.flip,
        padding=data.padding,
        scale=(data.scale_min, 1.0),
    )
    return train_view, View(data.eval_size or data.image_size, "center", ratio=data.eval_crop_ratio)


def set_deterministic(wanted: bool) -> None:
    """Let torch use only algorithms that give the same bits every time, or any."""
    if wanted:
        # read when CUDA's linear algebra starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # would only cost
    # tries algorithms and takes the fastest, which may differ from run to run
    torch.backends.cudnn.benchmark = not wanted


_FIRST_CONVOLUTION = {"resnet": "conv1", "shufflenet": "conv1.0", "mobilenet": "features.0.0"}


class InputStage(nn.Module):
    """uint8 images to normalised floats on the device (a quarter of the bytes travel, and it fuses
    into the model).

    `mean` and `std` are per channel on 0..255.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", 1.0 / torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, image: Tensor) -> Tensor:
        """Normalise uint8 [B, 3, H, W]; float32, in the configured memory format."""
        return ((image.float() - self.mean) * self.scale).contiguous(memory_format=self._format)


def build_model(
    name: str, num_classes: int, *, cifar_stem: bool = False, channels_last: bool = True
) -> nn.Module:
    """Build a torchvision classifier with fresh weights (from torch's global generator).

    Raises:
        InputError: unknown name, or a stem that the network does not have.
    """
    if name not in zoo.list_models(module=zoo):
        raise InputError(
            f"model.name={name!r} is not a torchvision classifier; e.g. resnet18, resnet34,"
            " resnet50, swin_t, vgg16_bn, mobilenet_v2, shufflenet_v2_x0_5"
        )
    model = zoo.get_model(name, weights=None, num_classes=num_classes)
    if cifar_stem:
        _use_cifar_stem(model, name)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def build_on_meta(name: str, num_classes: int, *, cifar_stem: bool = False) -> nn.Module:
    """Build the network on torch's meta device: shapes, and no memory for its weights. Raise
    InputError as `build_model`."""
    try:
        with torch.device("meta"):
            return build_model(name, num_classes, cifar_stem=cifar_stem, channels_last=False)
    except NotImplementedError:  # RegNets read numbers from tensors while they are built
        return build_model(name, num_classes, cifar_stem=cifar_stem, channels_last=False).to("meta")


def classifier_layer(model: nn.Module, num_classes: int) -> nn.Linear | None:
    """Return the last linear layer, whose input are the penultimate features; None where the
    classifier is something else."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and linear[-1].out_features == num_classes else None


def _use_cifar_stem(model: Any, name: str) -> None:
    """Replace the first convolution by one of 3x3 and stride 1, and drop the max-pool, as ResNets
    on CIFAR have it. VGG begins like that: in place of its classifier for ImageNet it gets one
    linear layer on the mean of the last feature map, which is one pixel for 32x32 images."""
    if name.startswith("vgg"):
        head = nn.Linear(512, model.classifier[-1].out_features)
        nn.init.normal_(head.weight, 0, 0.01)  # as torchvision begins linear layers of VGG
        nn.init.zeros_(head.bias)
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), head
        return
    family = next((family for family in _FIRST_CONVOLUTION if name.startswith(family)), None)
    if family is None:
        raise InputError(
            f"model.cifar_stem=true is not known for {name!r}; it is for"
            f" {', '.join(_FIRST_CONVOLUTION)}, vgg"
        )
    path = _FIRST_CONVOLUTION[family]
    old = model.get_submodule(path)
    new = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        kernel_size=3,
        stride=1,
        padding=1,
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    if hasattr(model, "maxpool"):
        model.maxpool = nn.Identity()
