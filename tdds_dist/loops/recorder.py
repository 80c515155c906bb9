"""`Recorder`: a scorer that begins with the first batch, is saved beside the checkpoints of another
library, and ends with score files."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdds_dist.config.scores import (
    Window,
    check_window,
    differences_per_window,
    window_settings,
)
from tdds_dist.console import log
from tdds_dist.distributed.collectives import together
from tdds_dist.distributed.world import current_world
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Scores, fingerprint, save_scores
from tdds_dist.runs.checkpoint import Checkpoints
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.scoring.trajectory import require_no_trajectory

_FOLDER = "tdds"  # within a checkpoint of the library
_TRAJECTORY = "trajectory"


class Recorder:
    """Scores every sample of a training that another library runs. All ranks make one and call it
    alike.

    Args:
        num_samples: N, size of the training set.
        windows: the settings (T, K, beta) to score.
        out: directory for `trajectory/`, of which `tdds score` makes all other scores, and
            `scores/`, a file per window; None keeps neither.
        preset: as of `ShardedScorer`.

    `scores` holds the result when training has ended: by window float32 [N] on the CPU, on every
    rank; nothing when it ended before the last window did.
    """

    def __init__(
        self,
        num_samples: int,
        windows: Sequence[Window],
        out: Path | str | None = None,
        preset: str = "official",
    ):
        for window in windows:
            check_window(window, preset)
            if differences_per_window(window, preset) == 1:
                raise InputError(
                    f"{window}: one loss difference per window in preset {preset}, so that all"
                    " scores are 0; raise K"
                )
        self.num_samples, self.windows, self.preset = num_samples, tuple(windows), preset
        self.out = None if out is None else Path(out)
        self.scores: dict[Window, Tensor] = {}
        self._scorer: ShardedScorer | None = None

    @property
    def step(self) -> int:
        """Return the number of batches that are recorded of this epoch."""
        return 0 if self._scorer is None else self._scorer.step

    @property
    def epoch(self) -> int:
        """Return the number of epochs that are recorded."""
        return 0 if self._scorer is None else self._scorer.epoch

    @property
    def is_recording(self) -> bool:
        """Say whether there is a state to save: not before the first batch, nor after the end."""
        return self._scorer is not None

    def start_over(self, device: torch.device) -> None:
        """Forget what was recorded. A collective.

        Raises:
            InputError: `out` holds a trajectory already.
        """
        self._scorer, self.scores = None, {}
        with together(world := current_world(device)):
            if world.is_main and self.out is not None:
                require_no_trajectory(self.out / _TRAJECTORY)

    def record(self, index_B: Tensor, logits_BC: Tensor, label_B: Tensor) -> None:
        """Record one batch, as `ShardedScorer.record`."""
        if self._scorer is None:
            self._scorer = self._begin(logits_BC.shape[-1], logits_BC.device)
        self._scorer.record(index_B, logits_BC, label_B)

    def end_epoch(self) -> None:
        """End the epoch; raise CoverageError unless each sample was recorded once."""
        assert self._scorer is not None
        self._scorer.end_epoch()

    def save(self, checkpoint: Path, rows: int) -> None:
        """Save beside a checkpoint of the library, which lies there; `rows` are those of a forward
        pass over all ranks. A collective."""
        assert self._scorer is not None
        scorer = self._scorer
        with together(scorer.world):
            if scorer.world.is_main:  # of an earlier training into the same folder
                remove_state(checkpoint)
        checkpoints = Checkpoints(checkpoint / _FOLDER, scorer.world, stop_on_error=True)
        about = {"num_classes": scorer.num_classes, "rows": rows}
        checkpoints.save(scorer.epoch, scorer.state_dict(), about, wait=True)
        checkpoints.close()

    def load(self, checkpoint: Path, rows: int, device: torch.device) -> None:
        """Go on from what `save` left there. A collective.

        Raises:
            InputError: nothing is there, or it is damaged, of other windows, or of another number
            of rows in a forward pass over all ranks.
        """
        checkpoints = Checkpoints(checkpoint / _FOLDER, current_world(device))
        found = checkpoints.latest()
        if found is None:
            raise InputError(
                f"{checkpoint} holds no {_FOLDER}/, the state of the scores: training was not"
                " recorded up to there; go on from another checkpoint, or start over",
                shared=True,
            )
        if found.record["rows"] != rows:
            raise InputError(
                f"{checkpoint} was saved with {found.record['rows']} samples in a forward pass over"
                f" all ranks, now there are {rows}, and Trainer would go on at another place of the"
                " epoch; go on with as many (ranks x batch of each), or start over",
                shared=True,
            )
        self._scorer = self._begin(found.record["num_classes"], device, resume=True)
        state = self._scorer.state_dict()
        checkpoints.load(found, state)
        checkpoints.close()
        self._scorer.load_state_dict(state)

    def finish(self) -> None:
        """Compute the scores and write them, if training was long enough; lets go of the process
        group. A collective."""
        scorer, self._scorer = self._scorer, None
        if scorer is None:
            return
        longest = max(window.T for window in self.windows)
        if scorer.epoch < longest:
            if scorer.world.is_main:
                log.warning(
                    f"training ended after {scorer.epoch} whole epochs, before the longest window"
                    f" of T={longest}: no scores"
                )
            return
        if current_world(scorer.world.device).world_size != scorer.world.world_size:
            raise InputError(
                "the process group was destroyed before scores were gathered; leave it until then"
            )
        self.scores = scorer.gather()
        label_N = scorer.gather_labels().numpy()
        if self.out is not None:
            with together(scorer.world):
                if scorer.world.is_main:
                    self._write(label_N, scorer)

    def _write(self, label_N: np.ndarray, scorer: ShardedScorer) -> None:
        assert self.out is not None
        about = fingerprint(label_N, scorer.num_classes)
        for window, score_N in self.scores.items():
            settings = window_settings(window, self.preset)
            settings |= {"source": "live", "epochs": scorer.epoch}
            key = window.key(self.preset)
            path = self.out / "scores" / f"{key}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_scores(path, Scores(key, score_N.numpy(), label_N, about, settings))

    def _begin(self, num_classes: int, device: torch.device, resume: bool = False) -> ShardedScorer:
        return ShardedScorer(
            self.num_samples,
            num_classes,
            self.windows,
            self.preset,
            device,
            trajectory=None if self.out is None else self.out / _TRAJECTORY,
            resume=resume,
        )


def remove_state(checkpoint: Path) -> None:
    """Remove what `save` left beside a checkpoint, and its folder unless it holds more."""
    shutil.rmtree(checkpoint / _FOLDER, ignore_errors=True)
    with suppress(OSError):
        checkpoint.rmdir()
