"""Score every sample of a training by timm's `train.py`, or of a script built like it, which stays
as it is:

    python -m tdds_dist.loops.timm --out runs/mine --window 10 5 0.9 train.py --data-dir DIR ...
"""

# B rows of a batch, C classes, N samples

import argparse
import os
import runpy
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import timm.data
import timm.models
import timm.task
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from tdds_dist.config.scores import PRESETS, Window
from tdds_dist.console import log
from tdds_dist.distributed.partition import PADDING
from tdds_dist.distributed.world import current_world
from tdds_dist.errors import InputError
from tdds_dist.loops.recorder import Recorder

_STATES = 2  # epochs whose state is kept: a script may stop before its own checkpoint is written


class Score:
    """Follows the training that a script runs by timm's `create_loader` and `create_model`.

    A batch's indices are those that its sampler drew, its label is what the loader gave, its logits
    are what the network returned for it in training mode. Samples that `DistributedSampler` repeats
    to even out the ranks do not count; the last batch of an epoch is trained on too, which timm
    would leave out. The scorer's state of the last two epochs lies in `OUT/state`, for `--resume`.

    It cannot see: mixed images (Mixup, CutMix), augmentation splits and repeats, streams, images of
    sizes that change, several labels per sample, networks with several outputs, TorchScript.

    Args:
        make: makes the recorder of a number of samples.
        out: directory for the trajectory, the scores and the state.
    """

    def __init__(self, make: Callable[[int], Recorder], out: Path):
        self._make, self._states = make, out / "state"
        self._recorder: Recorder | None = None
        self._start = 0  # epochs before this process
        self._batch: tuple[list[int], Tensor] | None = None  # until its forward pass

    def install(self) -> None:
        """Change what timm gives to scripts, for the rest of this process."""
        create_loader, create_model = timm.data.create_loader, timm.models.create_model

        @wraps(create_loader)
        def followed_loader(dataset: Any, *arguments: Any, **options: Any) -> Any:
            loader = create_loader(dataset, *arguments, **options)
            if options.get("is_training"):
                self._follow_loader(loader)
            return loader

        @wraps(create_model)
        def followed_model(*arguments: Any, **options: Any) -> nn.Module:
            model = create_model(*arguments, **options)
            model.register_forward_hook(torch.compiler.disable(self._record))
            return model

        def start_noted(resume: Callable[..., int | None]) -> Callable[..., int | None]:
            @wraps(resume)
            def resumed(*arguments: Any, **options: Any) -> int | None:
                epoch = resume(*arguments, **options)
                self._start = epoch or 0
                return epoch

            return resumed

        def refuse_mixed(mixup: Any, *_: Any, **__: Any) -> None:
            raise InputError(
                "mixed images have no scores of their own; leave out --mixup, --cutmix and"
                " --cutmix-minmax"
            )

        leave = torch.distributed.destroy_process_group

        @wraps(leave)
        def finish_and_leave(group: Any = None) -> None:
            if group is None:
                self.finish()
            leave(group)

        timm.data.create_loader = followed_loader
        timm.models.create_model = timm.create_model = followed_model
        timm.models.resume_checkpoint = start_noted(timm.models.resume_checkpoint)
        timm.task.resume_task_checkpoint = start_noted(timm.task.resume_task_checkpoint)
        timm.data.Mixup.__init__ = refuse_mixed
        torch.distributed.destroy_process_group = finish_and_leave

    def finish(self) -> None:
        """Compute the scores and write them. A collective."""
        if self._recorder is None:
            raise InputError(
                "nothing was scored: the script made no training loader by timm.data.create_loader"
                " (NaFlex has another)"
            )
        self._recorder.finish()

    def _follow_loader(self, loader: Any) -> None:
        batches, score = loader.batch_sampler, self
        if type(inner := getattr(batches, "sampler", None)) is BatchSampler:
            batches = inner  # with --use-multi-epochs-loader
        indices = _Drawn(_sampler_of(loader, batches), len(loader.dataset))
        if batches.drop_last and (rest := len(indices) % batches.batch_size) and _is_first():
            log.warning(
                f"the last batch of an epoch, {rest} samples, is trained on too, so that all are"
                " scored; timm would leave it out"
            )
        batches.sampler, batches.drop_last = indices, False
        self._recorder = self._make(len(loader.dataset))

        class Followed(type(loader)):  # type: ignore[misc]
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                for image, label in super().__iter__():
                    score._require_recorded()
                    drawn = [indices.drawn.popleft() for _ in range(len(label))]
                    score._batch = drawn, label
                    yield image, label
                score._require_recorded()
                score._end_epoch(label.device)

        loader.__class__ = Followed

    def _require_recorded(self) -> None:
        if self._batch is not None:
            raise InputError(
                "no network made by timm's create_model saw a batch in training mode, so that it"
                " cannot be scored"
            )

    def _record(self, model: nn.Module, images: Any, logits_BC: Any) -> None:
        if not model.training or not torch.is_grad_enabled() or self._batch is None:
            return
        (index, label_B), self._batch = self._batch, None
        recorder = self._recorder
        assert recorder is not None
        if not isinstance(logits_BC, Tensor) or logits_BC.ndim != 2 or label_B.ndim != 1:
            found = tuple(getattr(logits_BC, "shape", ())) or type(logits_BC).__name__
            raise InputError(
                f"the network returned {found} for labels {tuple(label_B.shape)}: scores are of one"
                " label per sample, logits [B, C]"
            )
        if not recorder.is_recording:
            self._begin(logits_BC.device)
        index_B = torch.tensor(index, device=logits_BC.device)
        recorder.record(index_B, logits_BC.detach(), label_B.to(logits_BC.device))

    def _begin(self, device: torch.device) -> None:
        recorder = self._recorder
        assert recorder is not None
        if not self._start:
            recorder.start_over(device)
            return
        state = self._states / f"epoch_{self._start}"
        if not state.exists():
            found = ", ".join(sorted(path.name for path in self._states.glob("epoch_*")))
            raise InputError(
                f"the checkpoint goes on after {self._start} epochs, of which {self._states} holds"
                f" no state ({found or 'nothing'}); go on from a checkpoint that ends such an epoch"
                " (last.pth.tar), or start over with another --out"
            )
        recorder.load(state, 0, device)

    def _end_epoch(self, device: torch.device) -> None:
        recorder = self._recorder
        assert recorder is not None
        recorder.end_epoch()
        recorder.save(self._states / f"epoch_{recorder.epoch}", 0)
        if current_world(device).is_main:
            shutil.rmtree(self._states / f"epoch_{recorder.epoch - _STATES}", ignore_errors=True)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


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
    if any(option.startswith("--start-epoch") for option in options.options):
        parser.error(
            "--start-epoch counts epochs that were not scored; leave it out, --resume knows"
        )
    make = partial(Recorder, windows=windows, out=options.out, preset=options.preset)
    try:
        make(1)  # windows that cannot be scored are refused here
        score = Score(make, options.out)
        score.install()
        sys.argv = [str(options.script), *options.options]
        sys.path.insert(0, str(options.script.resolve().parent))
        try:
            runpy.run_path(str(options.script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        score.finish()
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
