"""Score every sample of a training by `lightning.Trainer`: the callback
`Score([Window(T=5, K=3, beta=0.9)], out="runs/mine")`, and a `training_step` that says what it saw.
"""

# B rows of a batch, C classes, N samples

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tdds_dist.config.scores import Window
from tdds_dist.distributed.partition import PADDING
from tdds_dist.errors import InputError
from tdds_dist.loops.recorder import Recorder, remove_state

KEYS = ("index", "logits", "label")  # of what training_step returns, beside loss


class Score(Callback):
    """Scores every sample of the training set; `scores` holds the result when training has ended,
    by window float32 [N], on every rank.

    `training_step` returns a dict with `loss`, `index` (int64 [B], the sample's row in the training
    set), `logits` [B, C] in any floating point type, and `label` (int64 [B]). Repeats that
    Lightning's sampler adds to even out the ranks do not count. The scorer's state lies beside each
    checkpoint of the trainer, in `<checkpoint>.scores`, and goes when that goes; `fit(...,
    ckpt_path=...)` goes on from there.

    It cannot see: samples of streams, several training loaders, logits of tokens, several labels
    per sample; nor, from the process that started them, the scores of processes that Lightning
    forks or spawns (`out` holds them). It does not go on in the middle of an epoch, where Lightning
    itself begins the order of the samples anew.

    Args:
        windows, out, preset: as of `loops.recorder.Recorder`.

    Raises:
        InputError: a trainer or loader with which not every sample comes once per epoch.
    """

    def __init__(
        self, windows: Sequence[Window], out: Path | str | None = None, preset: str = "official"
    ):
        self._make = partial(Recorder, windows=windows, out=out, preset=preset)
        self._make(1)  # windows that cannot be scored are refused here
        self._recorder: Recorder | None = None
        self._followed: Trainer | None = None
        self._batch_size = 0

    @property
    def scores(self) -> dict[Window, Tensor]:
        """Return the scores by window; none before training has ended."""
        return {} if self._recorder is None else self._recorder.scores

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on where the checkpoint was saved."""
        if sum(isinstance(callback, Score) for callback in trainer.callbacks) > 1:
            raise InputError("this trainer has two callbacks Score; give one, with all windows")
        for callback in trainer.checkpoint_callbacks:
            if "://" in str(folder := getattr(callback, "dirpath", None)):
                raise InputError(
                    f"checkpoints go to {folder}, and the state of scores beside them needs a"
                    " folder; give a dirpath of the file system"
                )
        num_samples, self._batch_size = _samples_of(trainer)
        recorder = self._recorder = self._make(num_samples)
        longest = max(window.T for window in recorder.windows)
        if 0 < (trainer.max_epochs or 0) < longest:
            raise InputError(
                f"max_epochs={trainer.max_epochs} are fewer than the longest window's T={longest};"
                " train longer, or give a window of fewer"
            )
        rows = self._batch_size * trainer.world_size
        if trainer.ckpt_path is None:
            recorder.start_over(pl_module.device)
        else:
            self._load(trainer, Path(os.path.realpath(trainer.ckpt_path)), rows, pl_module)
        if self._followed is not trainer:
            self._follow_checkpoints(trainer, rows)

    def _load(self, trainer: Trainer, checkpoint: Path, rows: int, module: LightningModule) -> None:
        recorder, num_batches = self._recorder, int(trainer.num_training_batches)
        assert recorder is not None
        recorder.load(Path(f"{checkpoint}.scores"), rows, module.device)
        if recorder.step not in (0, num_batches):
            raise InputError(
                f"{checkpoint} was saved in the middle of an epoch, whose samples Lightning would"
                " begin anew; go on from a checkpoint at the end of one, by ckpt_path"
            )
        seen = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if (recorded := recorder.epoch * num_batches + recorder.step) != seen:
            raise InputError(
                f"{checkpoint}.scores is the state after {recorded} batches, and {checkpoint} that"
                f" after {seen}: training was not scored up to there; go on from another"
                " checkpoint, or start over"
            )

    def _follow_checkpoints(self, trainer: Trainer, rows: int) -> None:
        """Save and remove the state with the trainer's checkpoints; where none is live, none stays
        that is of an older checkpoint."""
        self._followed = trainer
        save, remove = trainer.save_checkpoint, trainer.strategy.remove_checkpoint

        def forget(filepath: Any) -> None:
            if trainer.is_global_zero:
                remove_state(Path(f"{filepath}.scores"))

        def save_too(filepath: Any, *arguments: Any, **more: Any) -> None:
            forget(filepath)
            save(filepath, *arguments, **more)
            if self._recorder is not None and self._recorder.is_recording:
                self._recorder.save(Path(f"{filepath}.scores"), rows)

        def remove_too(filepath: Any) -> None:
            remove(filepath)
            forget(filepath)

        trainer.save_checkpoint = save_too
        trainer.strategy.remove_checkpoint = remove_too

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record one batch."""
        recorder = self._recorder
        assert recorder is not None
        step = dict(outputs or {})
        if missing := [key for key in KEYS if key not in step]:
            raise InputError(
                f"training_step returned {', '.join(step) or 'nothing'}; it must return a dict with"
                f" loss, {', '.join(KEYS)}, so that its samples can be scored"
                f" ({', '.join(missing)} missing)"
            )
        index_B, logits_BC, label_B = (step[key].detach() for key in KEYS)
        if logits_BC.ndim != 2 or index_B.shape != label_B.shape or index_B.ndim != 1:
            raise InputError(
                f"logits {tuple(logits_BC.shape)}, index {tuple(index_B.shape)} and label"
                f" {tuple(label_B.shape)}: scores are of one label per sample, logits [B, C]"
            )
        if recorder.step == trainer.num_training_batches:  # saved after the last step of an epoch
            recorder.end_epoch()
        # Lightning deals single samples to the ranks in turn
        row_B = torch.arange(len(index_B), device=index_B.device)
        row_B = (row_B + recorder.step * self._batch_size) * trainer.world_size
        is_repeat_B = row_B + trainer.global_rank >= recorder.num_samples
        recorder.record(index_B.masked_fill(is_repeat_B, PADDING), logits_BC, label_B)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch, unless training stops within it."""
        assert self._recorder is not None
        if self._recorder.step == trainer.num_training_batches:
            self._recorder.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the scores and write them."""
        assert self._recorder is not None
        self._recorder.finish()


def _samples_of(trainer: Trainer) -> tuple[int, int]:
    """Return the number of samples of the training loader and its batch size."""
    loader = trainer.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)
    batch_size = getattr(loader, "batch_size", None)
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not hasattr(dataset, "__len__") or not isinstance(batch_size, int):
        raise InputError(
            f"the training loader is a {type(loader).__name__} of a {type(dataset).__name__}; give"
            " one DataLoader with a batch size, whose dataset has a length"
        )
    num_samples = len(dataset)
    expected = -(-num_samples // (trainer.world_size * batch_size))
    if trainer.num_training_batches != expected:
        raise InputError(
            f"{trainer.num_training_batches} batches of {batch_size} on {trainer.world_size} ranks"
            f" are not the {num_samples} samples of the training set once; leave out drop_last,"
            " limit_train_batches, overfit_batches and samplers that draw again"
        )
    return num_samples, batch_size
