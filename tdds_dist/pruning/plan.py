"""The plan of a pruned training: the settings of a method for one training, and what is known of
its epochs in advance."""

# N samples

import math
from dataclasses import dataclass
from typing import get_args

from tdds_dist.config.prune import MethodName, ScoreName
from tdds_dist.errors import InputError

METHODS: tuple[str, ...] = get_args(MethodName)
BY_SCORE = ("static", "refresh")  # the others prune by the last visit's probability
BY_RUN = ("infobatch", "hard_first")  # whose numbers follow from the run
SCORES: tuple[str, ...] = get_args(ScoreName)
_INFOBATCH_SHARE = 0.875  # of the epochs, which are pruned


@dataclass(frozen=True)
class PruningPlan:
    """A method and its settings, for `epochs` epochs over `num_samples` samples.

    Epochs are counted from 0. Those from `start` on skip samples, but for the last `full_last`. By
    default (None) `start` is 1, and `full_last` is what the source of the method says: one eighth
    for infobatch, one epoch for hard_first, none for the others. `least`: samples that hard_first
    keeps at least, a batch. The other settings are the keys of the config section `prune`.

    Raises:
        InputError: settings that do not fit.
    """

    method: str
    num_samples: int
    epochs: int
    seed: int = 0
    rate: float = 0.0
    threshold: float = 0.3
    drawn: float = 0.75
    start: int | None = None
    full_last: int | None = None
    every: int = 1
    explore: float = 0.1
    score: str = "tdds"
    sampler: str = "top"
    class_balanced: bool = False
    importance: str = "none"
    twin: bool = False
    least: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method={self.method!r} must be one of {', '.join(METHODS)}")
        if not 0.0 <= self.rate < 1.0:
            raise InputError(
                f"rate={self.rate} must lie in [0, 1): it is the share that is skipped"
            )
        if self.method == "progressive" and self.drawn < 1.0 - self.rate - 1e-9:
            raise InputError(
                f"drawn={self.drawn:g} must be at least 1 - rate={1.0 - self.rate:g}, the share"
                " that is kept of it; raise one of them"
            )
        if self.score not in (SCORES if self.method == "static" else SCORES[:1]):
            raise InputError(
                f"score={self.score!r} must be one of {', '.join(SCORES)}, and tdds but for static:"
                " the others say nothing of samples that epochs skipped"
            )
        if self.sampler == "beta" and self.score != "dual":
            raise InputError(
                f"sampler=beta needs method=static and score=dual, not method={self.method} and"
                f" score={self.score}; choose another sampler, or these"
            )
        first, last = self.first_pruned, self.epochs - self.num_full_last
        if self.method != "none" and not 1 <= first < last:
            raise InputError(
                f"start={first} leaves no epoch to prune: those from start on are pruned, the first"
                f" and the last {self.num_full_last} of {self.epochs} are not; lower start (to 1 at"
                " least) or full_last, or train longer"
            )

    @property
    def is_by_tdds(self) -> bool:
        """Say whether TDDS decides which samples are kept."""
        return self.method in BY_SCORE and self.score == "tdds"

    @property
    def takes_numbers(self) -> bool:
        """Say whether this is a random control whose numbers only the method's own training
        tells."""
        return self.twin and self.method in BY_RUN

    @property
    def first_pruned(self) -> int:
        """Return the first epoch that may skip samples."""
        return 1 if self.start is None else self.start

    @property
    def num_full_last(self) -> int:
        """Return the number of last epochs that visit all samples."""
        if self.full_last is not None:
            return self.full_last
        usual = {"infobatch": self.epochs - math.floor(_INFOBATCH_SHARE * self.epochs)}
        return usual.get(self.method, int(self.method == "hard_first"))

    def is_full(self, epoch: int) -> bool:
        """Say whether an epoch visits all samples whatever they look like."""
        return (
            self.method == "none"
            or epoch < self.first_pruned
            or epoch >= self.epochs - self.num_full_last
        )

    def is_decided_anew(self, epoch: int) -> bool:
        """Say whether a pruned epoch has a set of its own, and not that of the epoch before."""
        since = epoch - self.first_pruned
        every = {"static": self.epochs, "refresh": self.every}.get(self.method, 1)
        return since % every == 0

    def num_images(self, epoch: int) -> int | None:
        """Return the number of samples that an epoch visits, None where only the run will tell."""
        if self.is_full(epoch):
            return self.num_samples
        if self.method in BY_RUN:
            return None
        return max(1, self.num_samples - round(self.rate * self.num_samples))

    def most_images(self, epoch: int) -> int:
        """Return `num_images`, or the most that it can be."""
        num = self.num_images(epoch)
        return self.num_samples if num is None else num

    @property
    def total_images(self) -> int | None:
        """Return the images of all epochs, None where only the run will tell."""
        counts = [self.num_images(epoch) for epoch in range(self.epochs)]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def loss_weights(self) -> str:
        """Return how the training uses importance in its loss: sample, batch or none."""
        if self.method == "infobatch":
            return "sample"
        return self.importance if self.method in BY_SCORE else "none"
