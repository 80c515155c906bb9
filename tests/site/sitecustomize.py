"""Python runs this when it starts, where this folder is in PYTHONPATH: `tests/conftest.py` puts it
there, for the programs that tests start. torchvision then has one network more, which costs a
twentieth of its smallest one; it is made when torchvision is loaded, not before."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "torchvision.models" else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_add(module: ModuleType) -> None:
                load(module)
                _add_tiny_network()

            spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


def _add_tiny_network() -> None:
    from torch import nn
    from torchvision.models._api import register_model

    def tiny_network(*, weights: None = None, num_classes: int = 10) -> nn.Module:
        """Build a network of 314 parameters, so that checkpoints are small."""
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, num_classes),
        )

    tiny_network.__module__ = "torchvision.models.tiny"  # as far as `list_models` knows
    register_model()(tiny_network)


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
