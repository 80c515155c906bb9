"""One training run (`Training`), and the interface of what watches it (`Observer`); between
`engine` and the stages."""

# B rows of this rank and forward pass, C classes, G rows of a forward pass over all ranks, N
# dataset, M trained samples, S forward passes of an epoch, W ranks

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from tdds_dist.config.run import Config
from tdds_dist.data.beton import BetonInfo
from tdds_dist.distributed.interruption import Interruption
from tdds_dist.distributed.partition import EpochOrder, Visits
from tdds_dist.distributed.world import World
from tdds_dist.runs.checkpoint import Checkpoint, Checkpoints
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.status import Pulse
from tdds_dist.training.schedule import per_rank_batch


class Observer(Protocol):
    """Sees the outputs of training. Every rank calls every method equally often."""

    def expect(self, order: EpochOrder, first_step: int = 0) -> None:
        """Start an epoch of this order, at `first_step` when it is resumed."""

    def record(self, index_B: Tensor, logits_BC: Tensor, label_B: Tensor) -> None:
        """Take the outputs of one forward pass; index -1 marks padding. Must not wait for the
        device."""

    def check(self) -> None:
        """Raise what is wrong with the values seen so far; may wait for the device."""

    def end_epoch(self) -> None:
        """Close the epoch."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of it, sharded or replicated. A collective; raises as
        `check` does."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there. A collective."""


class Schedule(Protocol):
    """Says which samples each epoch visits, where that changes during training. Every rank calls
    every method equally often."""

    def decide(self, epoch: int) -> Visits:
        """Return the samples of the epoch that comes next. A collective."""

    def recall(self, epoch: int, digest: str) -> Visits:
        """Return those of the epoch to go on in, whose `digest` a checkpoint has. A collective."""

    def most_images(self, epoch: int) -> int:
        """Return the number of samples of an epoch, or the most that it can be."""


@dataclass(frozen=True)
class Training:
    """One training run.

    `subset_M` int64 restricts it to these global indices. `importance_N` float32 by global index
    weighs the loss as `importance` says: `sample` weighs each sample by its own, `batch` by the
    mean over its global batch. A `schedule` says both anew for each epoch; then learning rates
    follow the images seen, of `total_images`, or where that is None the epochs.
    """

    config: Config
    world: World
    run: RunDir
    train_file: BetonInfo
    val_file: BetonInfo
    epochs: int
    global_batch_size: int
    observer: Observer | None = None
    # the observer is shown outputs of the unmixed images in evaluation mode
    clean_view: bool = False
    tolerates_nonfinite: bool = False  # rows and steps that are not finite are left out of training
    subset_M: np.ndarray | None = None
    importance_N: np.ndarray | None = None
    importance: str = "none"
    schedule: Schedule | None = None
    total_images: int | None = None
    stops_after: int | None = None  # epochs after which to end, short of the schedule's `epochs`
    checkpoints: Checkpoints | None = None
    resume: Checkpoint | None = None
    interruption: Interruption = field(default_factory=Interruption)
    pulse: Pulse | None = None
    # asked on the main rank before an epoch's results are written; raises InputError
    guard: Callable[[], None] = lambda: None

    @property
    def epochs_run(self) -> int:
        """Return the number of epochs after which training ends."""
        return self.stops_after or self.epochs

    @property
    def rows(self) -> int:
        """Return the rows per rank and forward pass."""
        return per_rank_batch(
            self.global_batch_size, self.world.world_size, self.config.train.accumulation
        )

    @property
    def num_samples(self) -> int:
        """Return the number of images trained on."""
        return self.train_file.num_samples if self.subset_M is None else len(self.subset_M)

    @property
    def schedule_steps_per_epoch(self) -> int:
        """Return the optimizer steps per epoch that the learning rate's schedule spans: those of
        the images trained on, or of all images where retrain.schedule_of is full."""
        of_all = self.config.retrain.schedule_of == "full"
        images = self.train_file.num_samples if of_all else self.num_samples
        return math.ceil(images / self.global_batch_size)
