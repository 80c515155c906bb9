"""Python runs this when it starts, where this folder is in PYTHONPATH: `tests/conftest.py` puts it
there, for the programs that tests start. torchvision then has two networks more: one that costs a
twentieth of its smallest one, and the same with pauses, for tests that do something to a training
that must last. They are made when torchvision is loaded, not before.

Also, garbage is looked for less often than Python does: what libraries load is none, and looking
takes a tenth of the CPU time of a short program."""

import atexit
import gc
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

gc.set_threshold(10_000, 10, 10)
atexit.register(gc.freeze)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "torchvision.models" else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_add(module: ModuleType) -> None:
                load(module)
                _add_networks()

            spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


def _add_networks() -> None:
    from torch import Tensor, nn
    from torchvision.models._api import register_model

    class Pause(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                time.sleep(0.03)
            return x

    def tiny_network(*, weights: None = None, num_classes: int = 10) -> nn.Sequential:
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

    def slow_network(*, weights: None = None, num_classes: int = 10) -> nn.Sequential:
        """Build a tiny network whose training steps take 30 ms, most of which leave the CPU idle."""
        return tiny_network(num_classes=num_classes).append(Pause())

    for build in (tiny_network, slow_network):
        build.__module__ = "torchvision.models.tiny"  # as far as `list_models` knows
        register_model()(build)


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
