"""What the training loop is asked to do, and who may watch it: words between `engine` and the stages."""

# B rows of this rank and forward pass, C classes, G rows of a forward pass over all ranks, N dataset, M trained samples,
# S forward passes of an epoch, W ranks

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from tdds_dist.beton import BetonInfo
from tdds_dist.checkpoint import Checkpoint, Checkpoints
from tdds_dist.config import Config
from tdds_dist.distributed import World
from tdds_dist.loader import BetonLoader, default_workers
from tdds_dist.partition import EpochOrder
from tdds_dist.preemption import Interruption
from tdds_dist.prepare import build_views
from tdds_dist.pulse import Pulse
from tdds_dist.rundir import RunDir


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
        """Images trained on."""
        return self.train_file.num_samples if self.subset_M is None else len(self.subset_M)


def build_loaders(job: Job, rows: int) -> tuple[BetonLoader, BetonLoader]:
    """Training and evaluation loaders of this rank."""
    data, world = job.config.data, job.world
    workers = data.num_workers or default_workers(world.local_world_size)
    train_view, eval_view = build_views(job.config)
    seed = job.config.run.seed
    return tuple(  # type: ignore[return-value]
        BetonLoader(file.path, rows, view, device=world.device, num_workers=workers, seed=seed)
        for file, view in ((job.train_file, train_view), (job.val_file, eval_view)))


def step_weights(job: Job, order: EpochOrder) -> list[float]:
    """Factor on the sum of losses of each forward pass: W / rows of its optimizer step, times the batch importance.

    DDP averages gradients over ranks, hence the W.
    """
    step_of_S = np.arange(order.num_steps) // job.config.train.accumulation
    rows_S = np.bincount(step_of_S, weights=order.num_real_S())[step_of_S]
    factor_S = job.world.world_size / rows_S
    if job.importance == "batch":
        assert job.importance_N is not None
        importance_SG = np.where(order.index_SG >= 0, job.importance_N[order.index_SG], 0.0)
        total_S = np.bincount(step_of_S, weights=importance_SG.sum(axis=1))[step_of_S]
        factor_S = factor_S * total_S / rows_S
    return factor_S.tolist()
