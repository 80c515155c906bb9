"""Score every sample of a training by `transformers.Trainer`, by one line before `train`:
`recorder = record(trainer, [Window(T=5, K=3, beta=0.9)], out="runs/mine")`.
"""

# B rows of a batch, C classes, N samples

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tdds_dist.config.scores import Window, check_window, differences_per_window
from tdds_dist.distributed.partition import PADDING
from tdds_dist.errors import InputError
from tdds_dist.loops.recorder import Recorder

INDEX = "tdds_index"  # the column that is added to the training set


def record(
    trainer: Trainer,
    windows: Sequence[Window],
    out: Path | str | None = None,
    preset: str = "official",
) -> Recorder:
    """Let a trainer score every sample of its training set; return what will hold the scores.

    The training set gets a column with the sample's row in it, which goes through samplers and
    collators and never reaches the network. What is recorded is the forward pass that trains:
    logits [B, C] in any floating point type, and the trainer's label column, int64 [B]. Repeats
    that accelerate adds to even out the ranks do not count. The scorer's state lies in each
    checkpoint of the trainer, and `train(resume_from_checkpoint=...)` goes on from there, in the
    middle of an epoch and on another number of ranks too, as far as the trainer does.

    It cannot see: samples of streams (no length), logits of tokens, regression, several labels per
    sample, and losses that the trainer computes without the model's outputs (sequence
    parallelism).

    Raises:
        InputError: settings of the trainer with which not every sample comes once per epoch.
    """
    for window in windows:
        check_window(window, preset)
        if differences_per_window(window, preset) == 1:
            raise InputError(
                f"{window}: one loss difference per window in preset {preset}, so that all scores"
                " are 0; raise K"
            )
    _require_each_sample_once(trainer, windows)
    recorder = Recorder(len(trainer.train_dataset), windows, out, preset)
    trainer.train_dataset = _indexed(trainer.train_dataset)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append(INDEX)
    events = _Events(trainer, recorder)
    trainer.add_callback(events)
    compute_loss, train = trainer.compute_loss, trainer.train

    def compute_and_record(
        model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **more: Any
    ) -> Any:
        if not model.training:
            return compute_loss(model, inputs, return_outputs=return_outputs, **more)
        if INDEX not in inputs:
            raise InputError(
                f"the batch has no {INDEX!r} (it has {', '.join(inputs)}): data_collator must keep"
                " this column of the training set"
            )
        inputs, label = dict(inputs), inputs.get(trainer.label_names[0])
        index_B = inputs.pop(INDEX)
        loss, outputs = compute_loss(model, inputs, return_outputs=True, **more)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        events.record(index_B, logits, label)
        return (loss, outputs) if return_outputs else loss

    def train_from(resume_from_checkpoint: str | bool | None = None, **more: Any) -> Any:
        if resume_from_checkpoint is True:
            events.resume_from = get_last_checkpoint(trainer.args.output_dir)
        else:
            events.resume_from = resume_from_checkpoint or None
        return train(resume_from_checkpoint, **more)

    trainer.compute_loss, trainer.train = compute_and_record, train_from
    return recorder


class _Events(TrainerCallback):
    """Epochs and checkpoints of the trainer, and which rows of a batch count."""

    def __init__(self, trainer: Trainer, recorder: Recorder):
        self.trainer, self.recorder = trainer, recorder
        self.resume_from: str | None = None

    @property
    def _rows_of_all(self) -> int:
        return self.trainer._train_batch_size * self.trainer.args.world_size

    def record(self, index_B: Tensor, logits: Tensor, label: Tensor | None) -> None:
        if logits.ndim != 2 or label is None or label.shape != index_B.shape:
            shape = None if label is None else tuple(label.shape)
            raise InputError(
                f"logits {tuple(logits.shape)} and labels {shape} of {len(index_B)} samples:"
                " scores are of one label per sample, logits [B, C]; this task has no score here"
            )
        first = self.recorder.step * self._rows_of_all
        # accelerate deals whole batches to the ranks in turn
        first += self.trainer.args.process_index * self.trainer._train_batch_size
        row_B = first + torch.arange(len(index_B), device=index_B.device)
        is_repeat_B = row_B >= self.recorder.num_samples
        self.recorder.record(
            index_B.masked_fill(is_repeat_B, PADDING), logits.detach(), label.long()
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.resume_from is None:
            return
        self.recorder.load(Path(self.resume_from), args.device)
        if self.recorder.step == self._num_batches:  # saved after its last step
            self.recorder.end_epoch()

    @property
    def _num_batches(self) -> int:
        return -(-self.recorder.num_samples // self._rows_of_all)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder.step == self._num_batches:
            self.recorder.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = self.trainer._get_output_dir(trial=None)
        self.recorder.save(Path(folder) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recorder.finish()


class _Indexed(torch.utils.data.Dataset):
    """A map-style dataset of dicts, with the row of each."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], INDEX: index}


def _indexed(dataset: Any) -> Any:
    if hasattr(dataset, "add_column"):  # datasets.Dataset, whose columns the trainer looks at
        return dataset.add_column(INDEX, range(len(dataset)))
    return _Indexed(dataset)


def _require_each_sample_once(trainer: Trainer, windows: Sequence[Window]) -> None:
    args = trainer.args
    if not hasattr(trainer.train_dataset, "__len__"):
        raise InputError("train_dataset must have a length: the samples of a stream have no index")
    found = {
        "dataloader_drop_last": (args.dataloader_drop_last, False),
        "train_sampling_strategy": (
            "batch_rebalance" if args.train_sampling_strategy == "batch_rebalance" else "",
            "",
        ),
        "auto_find_batch_size": (args.auto_find_batch_size, False),
        "ignore_data_skip": (args.ignore_data_skip, False),
        "accelerator_config.split_batches": (args.accelerator_config.split_batches, False),
        "accelerator_config.dispatch_batches": (
            bool(args.accelerator_config.dispatch_batches),
            False,
        ),
        "accelerator_config.even_batches": (args.accelerator_config.even_batches, True),
    }
    for key, (value, needed) in found.items():
        if value != needed:
            raise InputError(
                f"{key}={value}: samples would not come once per epoch, in batches dealt out in"
                " turn, as scores need; leave it at its default"
            )
    epochs, T = args.num_train_epochs, max(window.T for window in windows)
    if args.max_steps <= 0 and epochs < T:
        raise InputError(
            f"num_train_epochs={epochs:g} ends before the longest window, T={T}; train longer, or"
            " give a window of fewer epochs"
        )
