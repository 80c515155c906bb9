"""The task of the training loop (`Job`), and the interface of what watches it (`Observer`); between `engine` and the stages."""

# B rows of this rank and forward pass, C classes, G rows of a forward pass over all ranks, N dataset, M trained samples,
# S forward passes of an epoch, W ranks

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from tdds_dist.config.run import Config
from tdds_dist.data.beton import BetonInfo
from tdds_dist.distributed.interruption import Interruption
from tdds_dist.distributed.partition import EpochOrder
from tdds_dist.distributed.world import World
from tdds_dist.runs.checkpoint import Checkpoint, Checkpoints
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.status import Pulse


class Observer(Protocol):
    """Sees the outputs of training. Every rank calls every method equally often."""

    def begin_epoch(self, order: EpochOrder, first_step: int) -> None:
        """An epoch of this order starts, at `first_step` when it is resumed."""

    def record(self, index_B: Tensor, logits_BC: Tensor, label_B: Tensor) -> None:
        """One forward pass; index -1 marks padding. Must not wait for the device."""

    def check(self) -> None:
        """Raise what is wrong with the values seen so far; may wait for the device."""

    def end_epoch(self) -> bool:
        """The epoch is over; True lets training stop here."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, sharded or replicated. A collective; raises as `check` does."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""


class Nobody:
    """The observer of a run that is not observed."""

    def begin_epoch(self, order: EpochOrder, first_step: int) -> None: ...

    def record(self, index_B: Tensor, logits_BC: Tensor, label_B: Tensor) -> None: ...

    def check(self) -> None: ...

    def end_epoch(self) -> bool:
        return False

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Job:
    """One training run.

    `subset_M` int64 restricts it to these global indices. `importance_N` float32 by global index weighs the loss as
    `importance` says: `sample` weighs each sample by its own, `batch` by the mean over its global batch.
    """

    config: Config
    world: World
    run: RunDir
    train_file: BetonInfo
    val_file: BetonInfo
    epochs: int
    global_batch_size: int
    observer: Observer = field(default_factory=Nobody)
    subset_M: np.ndarray | None = None
    importance_N: np.ndarray | None = None
    importance: str = "none"
    stops_after: int | None = None  # epochs after which the observer will end the run, for the time left
    checkpoints: Checkpoints | None = None
    resume: Checkpoint | None = None
    interruption: Interruption = field(default_factory=Interruption)
    pulse: Pulse | None = None
    guard: Callable[[], None] = lambda: None  # asked on the main rank before an epoch's results are written; raises InputError

    @property
    def num_samples(self) -> int:
        """Return the number of images trained on."""
        return self.train_file.num_samples if self.subset_M is None else len(self.subset_M)
