"""Networks by name, from torchvision, with an input stage and the small-image stem."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as zoo

from tdds_dist.errors import InputError

_FIRST_CONVOLUTION = {"resnet": "conv1", "shufflenet": "conv1.0", "mobilenet": "features.0.0"}


class InputStage(nn.Module):
    """uint8 images to normalised floats on the device (a quarter of the bytes travel, and it fuses into the model).

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


def build_model(name: str, num_classes: int, *, cifar_stem: bool = False, channels_last: bool = True) -> nn.Module:
    """A torchvision classifier with fresh weights (from torch's global generator).

    Raises:
        InputError: unknown name, or a stem that the network does not have.
    """
    if name not in zoo.list_models(module=zoo):
        raise InputError(f"model.name={name!r} is not a torchvision classifier; e.g. resnet18, resnet34, resnet50, swin_t, "
                         "vgg16_bn, mobilenet_v2, shufflenet_v2_x0_5")
    model = zoo.get_model(name, weights=None, num_classes=num_classes)
    if cifar_stem:
        _use_cifar_stem(model, name)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def build_on_meta(name: str, num_classes: int, *, cifar_stem: bool = False) -> nn.Module:
    """The network on torch's meta device: shapes, and no memory for its weights. InputError as `build_model`."""
    try:
        with torch.device("meta"):
            return build_model(name, num_classes, cifar_stem=cifar_stem, channels_last=False)
    except NotImplementedError:  # RegNets read numbers from tensors while they are built
        return build_model(name, num_classes, cifar_stem=cifar_stem, channels_last=False).to("meta")


def classifier_layer(model: nn.Module, num_classes: int) -> nn.Linear | None:
    """The last linear layer, whose input are the penultimate features; None where the classifier is something else."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and linear[-1].out_features == num_classes else None


def _use_cifar_stem(model: Any, name: str) -> None:
    """3x3 stride-1 first convolution and no max-pool, as ResNets on CIFAR have it."""
    family = next((family for family in _FIRST_CONVOLUTION if name.startswith(family)), None)
    if family is None:
        raise InputError(f"model.cifar_stem=true is not known for {name!r}; it is for {', '.join(_FIRST_CONVOLUTION)}")
    path = _FIRST_CONVOLUTION[family]
    old = model.get_submodule(path)
    new = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    if hasattr(model, "maxpool"):
        model.maxpool = nn.Identity()
