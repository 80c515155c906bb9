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

from tdds_dist.config.scores import Window
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
    middle of an epoch too, with as many samples in a forward pass over all ranks.

    It cannot see: samples of streams (no length), logits of tokens, regression, several labels per
    sample, and losses that the trainer computes without the model's outputs (sequence
    parallelism).

    Raises:
        InputError: settings of the trainer with which not every sample comes once per epoch.
    """
    _require_each_sample_once(trainer)
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
                f"the batch has no {INDEX!r} (it has {', '.join(inputs)}): data_collator, and"
                " transforms of the training set, must keep this column"
            )
        inputs = dict(inputs)
        index_B, label = inputs.pop(INDEX), inputs.get((trainer.label_names or ["labels"])[0])
        # the trainer then computes the loss itself, and the network gives none
        takes_label = trainer.label_smoother is not None or trainer.compute_loss_func is not None
        loss, outputs = compute_loss(model, dict(inputs), return_outputs=True, **more)
        if isinstance(outputs, dict):
            logits = outputs.get("logits")
        elif isinstance(outputs, Tensor):
            logits = outputs
        else:
            logits = outputs[0 if takes_label and "labels" in inputs else 1]
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

    @property
    def _num_batches(self) -> int:
        return -(-self.recorder.num_samples // self._rows_of_all)

    def record(self, index_B: Tensor, logits: Any, label: Tensor | None) -> None:
        logits_shape, label_shape = (
            tuple(value.shape) if isinstance(value, Tensor) else None for value in (logits, label)
        )
        if len(logits_shape or ()) != 2 or label is None or label_shape != tuple(index_B.shape):
            raise InputError(
                f"logits {logits_shape} and labels {label_shape} of {len(index_B)} samples: scores"
                " are of one label per sample, logits [B, C]; this task has no score here"
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
        """Begin, or go on where the checkpoint was saved."""
        accumulation = args.gradient_accumulation_steps
        rows = self.trainer.get_total_train_batch_size(args)
        if rows != self._rows_of_all * accumulation:
            raise InputError(
                f"{rows} samples in a step of the optimizer are not {args.world_size} ranks x"
                f" {self.trainer._train_batch_size} x gradient_accumulation_steps={accumulation}:"
                " scores need ranks that each have samples of their own"
            )
        longest = max(window.T for window in self.recorder.windows)
        epochs = state.max_steps // -(-self._num_batches // accumulation)
        if epochs < longest:
            raise InputError(
                f"the {state.max_steps} steps of this training are {epochs} whole epochs, fewer"
                f" than the longest window's T={longest}; train longer, or give a window of fewer"
            )
        if self.resume_from is None:
            self.recorder.start_over(args.device)
            return
        self.recorder.load(Path(self.resume_from), self._rows_of_all, args.device)
        if self.recorder.step == self._num_batches:  # saved after its last step
            self.recorder.end_epoch()
        if self.recorder.step and args.train_sampling_strategy == "group_by_length":
            raise InputError(
                "train_sampling_strategy=group_by_length gives no order again in the middle of an"
                " epoch; go on from a checkpoint at the end of one (save_strategy=epoch)"
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder.step == self._num_batches:
            self.recorder.end_epoch()
        elif not control.should_training_stop:
            raise InputError(
                f"an epoch ended after {self.recorder.step} of {self._num_batches} batches, and"
                " scores need each sample in each epoch; leave out what ends epochs early, or"
                " draws other samples"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(self.trainer._get_output_dir(trial=None))
        self.recorder.save(folder / f"checkpoint-{state.global_step}", self._rows_of_all)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recorder.finish()


class _Indexed(torch.utils.data.Dataset):
    """A map-style dataset of dicts, with the row of each."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        if hasattr(dataset, "set_epoch"):
            self.set_epoch = dataset.set_epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if hasattr(self.dataset, "__getitems__"):
            rows = self.dataset.__getitems__(indices)
        else:
            rows = [self.dataset[index] for index in indices]
        if not isinstance(rows[0], dict):
            raise InputError(
                f"the training set gives a {type(rows[0]).__name__} for a sample; it must give a"
                " dict, to which the sample's row can be added"
            )
        return [{**row, INDEX: index} for row, index in zip(rows, indices, strict=True)]


def _indexed(dataset: Any) -> Any:
    # of datasets.Dataset the trainer looks at the columns; one that is a choice of another's rows
    # would be written anew, and a transform of its own sees no column of ours
    has_columns = hasattr(dataset, "add_column") and dataset._indices is None
    if has_columns and dataset.format["type"] != "custom":
        return dataset.add_column(INDEX, range(len(dataset)))
    return _Indexed(dataset)


def _require_each_sample_once(trainer: Trainer) -> None:
    args, dataset = trainer.args, trainer.train_dataset
    if any(isinstance(callback, _Events) for callback in trainer.callback_handler.callbacks):
        raise InputError("this trainer is recorded already; call record once, with all windows")
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not hasattr(dataset, "__len__"):
        raise InputError(
            f"train_dataset is a {type(dataset).__name__}; it must have a length and rows by index:"
            " the samples of a stream have no index"
        )
    config = args.accelerator_config
    found: dict[str, tuple[Any, Any]] = {
        "dataloader_drop_last": (args.dataloader_drop_last, False),
        "dataloader_in_order": (args.dataloader_in_order, True),
        "auto_find_batch_size": (args.auto_find_batch_size, False),
        "enable_jit_checkpoint": (getattr(args, "enable_jit_checkpoint", False), False),
        "ignore_data_skip": (args.ignore_data_skip, False),
        "accelerator_config.split_batches": (config.split_batches, False),
        "accelerator_config.dispatch_batches": (bool(config.dispatch_batches), False),
        "accelerator_config.even_batches": (config.even_batches, True),
        "accelerator_config.use_seedable_sampler": (config.use_seedable_sampler, True),
    }
    if args.train_sampling_strategy == "batch_rebalance":
        found["train_sampling_strategy"] = ("batch_rebalance", "random")
    for key, (value, needed) in found.items():
        if value != needed:
            raise InputError(
                f"{key}={value} must be {needed}: scores need each sample once per epoch, in"
                " batches dealt out in turn, and their state with each checkpoint"
            )
