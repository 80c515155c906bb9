"""Score every sample of a training by timm's `train.py`, or of a script built like it, which stays
as it is:

    python -m tdds_dist.loops.timm --out runs/mine --window 10 5 0.9 train.py --data-dir DIR ...
"""

# B rows of a batch, C classes, N samples

import argparse
import inspect
import os
import runpy
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import timm.data
import timm.models
import timm.task
import timm.utils
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from tdds_dist.config.scores import PRESETS, Window
from tdds_dist.console import log
from tdds_dist.distributed.partition import PADDING
from tdds_dist.distributed.world import current_world
from tdds_dist.errors import InputError
from tdds_dist.loops.recorder import Recorder, remove_state

_STATES = 2  # epochs whose state is kept: a script may stop before its own checkpoint is written
_NO_LOADER = (
    "nothing can be scored: the script made no training loader by timm.data.create_loader before"
    " its network trained"
)


class Score:
    """Follows the training that a script runs by timm's `create_loader` and `create_model`.

    A batch's indices are those that its sampler drew, its label is what the loader gave, its logits
    are what the network returned for it in training mode. Samples that `DistributedSampler` repeats
    to even out the ranks do not count; the last batch of an epoch is trained on too, which timm
    would leave out, and an image that cannot be read ends the training, where timm would take the
    next one for it. The scorer's state of the last two epochs lies in `OUT/state`, for `--resume`.

    It cannot see: mixed images (Mixup, CutMix), augmentation splits and repeats, streams, images of
    sizes that change, several labels per sample, networks with several outputs, TorchScript.

    Args:
        make: makes the recorder of a number of samples.
        out: directory for the trajectory, the scores and the state.
    """

    def __init__(self, make: Callable[[int], Recorder], out: Path):
        self._make, self._out = make, out
        self._recorder: Recorder | None = None
        self._model: nn.Module | None = None  # the one that is trained
        self._start = 0  # epochs before this process
        self._num_batches = 0
        self._batch: tuple[list[int], Tensor] | None = None  # until its forward pass

    def install(self) -> None:
        """Change what timm gives to scripts, for the rest of this process."""
        create_loader, create_model = timm.data.create_loader, timm.models.create_model
        signature = inspect.signature(create_loader)

        @wraps(create_loader)
        def followed_loader(*arguments: Any, **options: Any) -> Any:
            loader = create_loader(*arguments, **options)
            if signature.bind(*arguments, **options).arguments.get("is_training"):
                self._follow_loader(loader)
            return loader

        @wraps(create_model)
        def followed_model(*arguments: Any, **options: Any) -> nn.Module:
            model = create_model(*arguments, **options)
            model.register_forward_hook(_Hook(self))
            return model

        for place in (timm.data, timm.data.loader):
            place.create_loader = followed_loader
        for place in (timm, timm.models):
            place.create_model = followed_model
        for place in (timm.models, timm.task):
            for name in {"resume_checkpoint", "resume_task_checkpoint"} & {*dir(place)}:
                setattr(place, name, self._noting_start(getattr(place, name)))
        timm.data.dataset._ERROR_RETRY = 1  # the next image would count as the one that is damaged
        timm.data.Mixup.__init__ = partial(
            _refuse, "mixed images have no scores; leave out --mixup, --cutmix, --cutmix-minmax"
        )
        timm.data.create_naflex_loader = partial(
            _refuse, "loaders of NaFlex are not followed; leave out --naflex-loader"
        )
        self._check_saved_epochs()
        self._finish_before_leaving()

    def finish(self) -> None:
        """Compute the scores and write them. A collective."""
        if self._recorder is None:
            raise InputError(_NO_LOADER)
        if self._model is None and (trajectory := self._out / "trajectory").exists():
            log.warning(
                f"no epoch was left to train; `tdds score {trajectory} --all --out"
                f" {self._out / 'scores'}` makes the scores"
            )
        self._recorder.finish()

    def _follow_loader(self, loader: Any) -> None:
        if self._recorder is not None:
            raise InputError("the script makes a second training loader; scores are of one")
        batches, score = loader.batch_sampler, self
        if type(inner := getattr(batches, "sampler", None)) is BatchSampler:
            batches = inner  # with --use-multi-epochs-loader
        indices = _Drawn(_sampler_of(loader, batches), len(loader.dataset))
        rest = len(indices) % batches.batch_size
        if batches.drop_last and rest and os.environ.get("RANK", "0") == "0":
            log.warning(
                f"the last batch of an epoch, {rest} samples on each rank, is trained on too, so"
                " that all are scored; timm would leave it out"
                + "; networks with batch norm need another --batch-size"
                * (rest == 1)
            )
        batches.sampler, batches.drop_last = indices, False
        self._recorder, self._num_batches = self._make(len(loader.dataset)), len(loader)

        class Followed(type(loader)):  # type: ignore[misc]
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                score._begin_pass()
                for image, label in super().__iter__():
                    drawn = [indices.drawn.popleft() for _ in range(len(label))]
                    score._take(drawn, label)
                    yield image, label

        loader.__class__ = Followed

    def _begin_pass(self) -> None:
        assert self._recorder is not None
        if step := self._recorder.step:
            raise InputError(
                f"an epoch ended after {step} of {self._num_batches} batches; scores need each"
                " sample in each epoch"
            )

    def _take(self, drawn: list[int], label: Tensor) -> None:
        if self._batch is not None:
            raise InputError(
                "a batch was asked for before the one before it went through a network of timm's"
                " create_model in training mode, so it cannot be scored"
            )
        self._batch = drawn, label

    def record(self, model: nn.Module, logits_BC: Any) -> None:
        """Record the forward pass of a batch, if it is one, and end the epoch after its last."""
        if not model.training or not torch.is_grad_enabled():
            return
        if self._recorder is None:
            raise InputError(_NO_LOADER)
        if self._batch is None:
            return
        (drawn, label_B), self._batch = self._batch, None
        if self._model not in (None, model):
            raise InputError("two networks of timm's create_model train; scores are of one")
        if not isinstance(logits_BC, Tensor) or logits_BC.ndim != 2 or label_B.ndim != 1:
            found = tuple(getattr(logits_BC, "shape", ())) or type(logits_BC).__name__
            raise InputError(
                f"the network returned {found} for labels {tuple(label_B.shape)}: scores are of one"
                " label per sample, logits [B, C]"
            )
        if getattr(model, "num_classes", logits_BC.shape[1]) != logits_BC.shape[1]:
            raise InputError(
                f"the network returned {tuple(logits_BC.shape)}, and its num_classes="
                f"{model.num_classes}; let create_model(..., num_classes=C) make the head, whose"
                " logits are scored"
            )
        device = logits_BC.device
        with torch.autocast(device.type, enabled=False):
            if self._model is None:
                self._model = model
                self._begin(device)
            self._recorder.record(torch.tensor(drawn), logits_BC.detach(), label_B)
            if self._recorder.step == self._num_batches:
                self._end_epoch(device)

    def _begin(self, device: torch.device) -> None:
        recorder, states = self._recorder, self._out / "state"
        assert recorder is not None
        if not self._start:
            recorder.start_over(device)
            return
        state = states / f"epoch_{self._start}"
        if not state.exists():
            found = ", ".join(sorted(path.name for path in states.glob("epoch_*")))
            raise InputError(
                f"the checkpoint goes on after {self._start} epochs, of which {states} holds no"
                f" state ({found or 'nothing'}); go on from a checkpoint that ends such an epoch"
                " (last.pth.tar), or start over with another --out"
            )
        recorder.load(state, 0, device)

    def _end_epoch(self, device: torch.device) -> None:
        recorder, states = self._recorder, self._out / "state"
        assert recorder is not None
        recorder.end_epoch()
        recorder.save(states / f"epoch_{recorder.epoch}", 0)
        if current_world(device).is_main:
            remove_state(states / f"epoch_{recorder.epoch - _STATES}")

    def _noting_start(self, resume: Callable[..., int | None]) -> Callable[..., int | None]:
        """Return timm's function that goes on from a checkpoint, which also says where to us."""
        signature = inspect.signature(resume)

        @wraps(resume)
        def resumed(*arguments: Any, **options: Any) -> int | None:
            given = signature.bind(*arguments, **options).arguments
            if Path(given.get("checkpoint_path") or "").name.startswith("recovery-"):
                raise InputError(
                    f"{given['checkpoint_path']} was saved within an epoch, which timm does not end"
                    " after it; go on from last.pth.tar"
                )
            epoch = resume(*arguments, **options)
            self._start = epoch or 0
            return epoch

        return resumed

    def _check_saved_epochs(self) -> None:
        save = timm.utils.CheckpointSaver.save_checkpoint

        @wraps(save)
        def checked(saver: Any, epoch: int, *arguments: Any, **options: Any) -> Any:
            scored = 0 if self._recorder is None else self._recorder.epoch
            if self._model is not None and epoch + 1 != scored:
                raise InputError(
                    f"the script saves its checkpoint as of epoch {epoch}, counted from 0, and"
                    f" {scored} epochs are scored; leave out --start-epoch"
                )
            return save(saver, epoch, *arguments, **options)

        timm.utils.CheckpointSaver.save_checkpoint = checked

    def _finish_before_leaving(self) -> None:
        leave = torch.distributed.destroy_process_group

        @wraps(leave)
        def finish_and_leave(group: Any = None) -> None:
            is_end = group is None or group is torch.distributed.group.WORLD
            if is_end and sys.exc_info()[0] is None:
                self.finish()
            leave(group)

        for place in (torch.distributed, torch.distributed.distributed_c10d):
            setattr(place, leave.__name__, finish_and_leave)


class _Hook:
    """Shows each forward pass of a network to what follows it. Copies of the network, also in files
    and other processes, have one that does nothing."""

    def __init__(self, score: Score | None):
        self._record = None if score is None else torch.compiler.disable(score.record)

    def __call__(self, model: nn.Module, images: Any, logits_BC: Any) -> None:
        if self._record is not None:
            self._record(model, logits_BC)

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return _Hook, (None,)


class _Drawn:
    """A sampler that remembers what it drew: `drawn` holds an index per sample, PADDING for what
    was only repeated to even out the ranks."""

    def __init__(self, sampler: Any, num_samples: int):
        self.sampler, self.num_samples = sampler, num_samples
        self.drawn: deque[int] = deque()

    def __iter__(self) -> Iterator[int]:
        at, ranks = 0, 1
        if isinstance(self.sampler, DistributedSampler):
            at, ranks = self.sampler.rank, self.sampler.num_replicas
        for index in self.sampler:
            self.drawn.append(index if at < self.num_samples else PADDING)
            yield index
            at += ranks

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)  # epoch and set_epoch, which timm calls


def _sampler_of(loader: Any, batches: Any) -> Any:
    """Return the sampler of a training loader that gives each sample once per epoch."""
    sampler = getattr(batches, "sampler", None)
    if type(sampler) is RandomSampler:
        once = not sampler.replacement and len(sampler) == len(loader.dataset)
    else:
        once = type(sampler) in (SequentialSampler, DistributedSampler)
    once = once and not isinstance(loader.dataset, timm.data.AugMixDataset)
    if type(batches) is not BatchSampler or not once:
        raise InputError(
            f"a loader of {type(loader.dataset).__name__} with {type(batches).__name__} and"
            f" {type(sampler).__name__} does not give each sample once per epoch; leave out"
            " --aug-repeats, --aug-splits, streams and image sizes that change"
        )
    return sampler


def _refuse(reason: str, *_: Any, **__: Any) -> None:
    raise InputError(reason)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training script of timm, scored."""
    parser = argparse.ArgumentParser(
        prog="python -m tdds_dist.loops.timm",
        description="Score every sample of a training by timm's train.py.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of trajectory and scores"
    )
    parser.add_argument(
        "--window",
        nargs=3,
        action="append",
        required=True,
        metavar=("T", "K", "BETA"),
        help="a window to score: epochs, window size, EMA decay; may be given several times",
    )
    parser.add_argument("--preset", choices=PRESETS, default="official", help="(default: official)")
    parser.add_argument("script", type=Path, help="train.py, unchanged")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the script")
    options = parser.parse_args(arguments)
    try:
        windows = [Window(int(T), int(K), float(beta)) for T, K, beta in options.window]
    except ValueError as error:
        parser.error(f"--window takes two whole numbers and a decay, as in 10 5 0.9: {error}")
    beside = options.script.resolve().parent / "timm"
    if beside.is_dir() and beside != Path(timm.__file__).resolve().parent:
        parser.error(f"{options.script} has a timm of its own beside it; start in {beside.parent}")
    make = partial(Recorder, windows=windows, out=options.out, preset=options.preset)
    try:
        make(1)  # windows that cannot be scored are refused here
        score = Score(make, options.out)
        score.install()
        sys.argv = [str(options.script), *options.options]
        sys.path.insert(0, str(beside.parent))
        try:
            runpy.run_path(str(options.script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        score.finish()
        if torch.distributed.is_initialized():  # threads of gloo may abort a process that ends
            torch.distributed.destroy_process_group()
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
