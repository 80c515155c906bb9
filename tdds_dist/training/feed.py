"""Batches of training and evaluation for the loop, decoded ahead of need also across the borders of epochs.

An epoch that is started keeps its first few batches ready until it is asked for, so that neither evaluation nor the next epoch
begins with a wait for images. What is read does not depend on that: orders and sizes are functions of config and epoch.
"""

from typing import Literal

from tdds_dist.data.loader import Batches, BetonLoader, default_workers
from tdds_dist.distributed.partition import EpochOrder, epoch_order
from tdds_dist.training.build import build_views
from tdds_dist.training.job import Job
from tdds_dist.training.schedule import training_size

Pass = tuple[Literal["train", "val"], int]  # through the images of training or evaluation, in an epoch


class Feed:
    """The loaders of a job on this rank, at `rows` images per rank and forward pass."""

    def __init__(self, job: Job, rows: int):
        self.train_loader, self.val_loader = build_loaders(job, rows)
        self._job, self._global_rows = job, rows * job.world.world_size
        self._started: dict[Pass, tuple[EpochOrder, Batches]] = {}
        self._taken: Batches | None = None

    def start(self, which: Pass) -> None:
        """Let decoding begin; `take` gives the batches."""
        order = self._order(which)
        self._started[which] = order, self._batches(which, order)

    def take(self, which: Pass, first_step: int = 0) -> tuple[EpochOrder, Batches]:
        """Return the order of a whole pass, and its batches (from `first_step` on, of one that was not started). End the pass
        that was taken before."""
        if self._taken is not None:
            self._taken.close()
        found = self._started.pop(which, None)
        if found is None:
            order = self._order(which)
            found = order, self._batches(which, order.from_step(first_step))
        self._taken = found[1]
        return found

    def close(self) -> None:
        """End the loading threads."""
        for batches in [self._taken, *(batches for _, batches in self._started.values())]:
            if batches is not None:
                batches.close()
        self._started, self._taken = {}, None

    def _order(self, which: Pass) -> EpochOrder:
        job, (kind, epoch) = self._job, which
        if kind == "val":
            return epoch_order(job.val_file.num_samples, self._global_rows, shuffle=False)
        return epoch_order(job.num_samples, self._global_rows, seed=job.config.run.seed, epoch=epoch, subset=job.subset_M)

    def _batches(self, which: Pass, order: EpochOrder) -> Batches:
        job, (kind, epoch) = self._job, which
        loader, size = self.val_loader, None
        if kind == "train":
            loader, size = self.train_loader, training_size(job.config, epoch, job.epochs)
        return loader.batches(order, rank=job.world.rank, world_size=job.world.world_size, epoch=epoch, size=size)


def build_loaders(job: Job, rows: int) -> tuple[BetonLoader, BetonLoader]:
    """Training and evaluation loaders of this rank."""
    data, world = job.config.data, job.world
    workers = data.num_workers or default_workers(world.local_world_size)
    train_view, eval_view = build_views(job.config)
    seed = job.config.run.seed
    return tuple(  # type: ignore[return-value]
        BetonLoader(file.path, rows, view, device=world.device, num_workers=workers, seed=seed)
        for file, view in ((job.train_file, train_view), (job.val_file, eval_view)))
