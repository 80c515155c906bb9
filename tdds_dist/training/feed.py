"""Batches of training and evaluation for the loop, decoded ahead of need also across the borders of
epochs.

An epoch that is started keeps its first few batches ready until it is asked for, so that neither
evaluation nor the next epoch begins with a wait for images. What is read does not depend on that:
orders and sizes are functions of config and epoch.
"""

from collections.abc import Iterator
from typing import Literal

from tdds_dist.data.loader import Batch, Batches, BetonLoader, block_rows, default_workers
from tdds_dist.distributed.partition import EpochOrder, Visits, epoch_order
from tdds_dist.training.build import build_views
from tdds_dist.training.schedule import training_size
from tdds_dist.training.training import Training

# through the images of training or evaluation, in an epoch
Pass = tuple[Literal["train", "val"], int]


class Feed:
    """Give this rank the batches of a training. `visits`: the samples of the pass over the training
    images that is asked for next."""

    def __init__(self, training: Training):
        data, world = training.config.data, training.world
        workers = data.num_workers or default_workers(world.ranks_per_cpu)
        files = {"train": training.train_file, "val": training.val_file}
        self._loaders = {
            kind: BetonLoader(
                file,
                training.rows,
                view,
                device=world.device,
                num_workers=workers,
                seed=training.config.run.seed,
            )
            for (kind, file), view in zip(files.items(), build_views(training.config), strict=True)
        }
        self._training, self._global_rows = training, training.rows * world.world_size
        self.visits = Visits(training.subset_M)
        self._started: dict[Pass, tuple[EpochOrder, Batches]] = {}
        self._taken: Batches | None = None

    def start(self, which: Pass) -> None:
        """Let decoding begin; `take` gives the batches."""
        self._started[which] = self._begin(which)

    def take(self, which: Pass, first_step: int = 0) -> tuple[EpochOrder, Iterator[Batch]]:
        """Return the order of a whole pass, and its batches (from `first_step` on, of one that was
        not started).

        End the pass that was taken before.
        """
        if self._taken is not None:
            self._taken.close()
        found = self._started.pop(which, None) or self._begin(which, first_step)
        self._taken = found[1]
        return found

    def close(self) -> None:
        """End the loading threads, and give back their buffers."""
        for batches in [self._taken, *(batches for _, batches in self._started.values())]:
            if batches is not None:
                batches.close()
        self._started, self._taken = {}, None
        for loader in self._loaders.values():
            loader.release()

    def order(self, which: Pass) -> EpochOrder:
        """Return the order of a whole pass, all ranks together."""
        training, (kind, epoch) = self._training, which
        by_blocks = training.config.data.order == "blocks"
        if kind == "val":
            return epoch_order(training.val_file.num_samples, self._global_rows, shuffle=False)
        subset_M = self.visits.subset_M
        return epoch_order(
            training.train_file.num_samples if subset_M is None else len(subset_M),
            self._global_rows,
            seed=training.config.run.seed,
            epoch=epoch,
            subset=subset_M,
            block_rows=block_rows(training.train_file) if by_blocks else None,
        )

    def _begin(self, which: Pass, first_step: int = 0) -> tuple[EpochOrder, Batches]:
        training, (kind, epoch), order = self._training, which, self.order(which)
        size = training_size(training.config, epoch, training.epochs) if kind == "train" else None
        return order, self._loaders[kind].batches(
            order,
            rank=training.world.rank,
            world_size=training.world.world_size,
            epoch=epoch,
            first_step=first_step,
            size=size,
        )
