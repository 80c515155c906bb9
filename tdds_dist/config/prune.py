"""The keys of the section `prune`: what `tdds train` skips."""

from typing import Literal

from pydantic import Field

from tdds_dist.config.schema import Section

MethodName = Literal["none", "static", "refresh", "infobatch", "hard_first", "progressive"]
ScoreName = Literal[
    "tdds",
    "forgetting",
    "el2n",
    "aum",
    "dyn_unc",
    "dual",
    "csl",
    "confidence",
    "variability",
    "correctness",
    "learning_time",
]
# of a method, the keys that it reads
_ALL = ("start", "full_last", "schedule_by", "twin")
READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "static": (*_ALL, "rate", "score", "sampler", "class_balanced", "importance"),
    "refresh": (*_ALL, "rate", "sampler", "class_balanced", "importance", "every", "explore"),
    "infobatch": (*_ALL, "twin_of", "rate"),
    "hard_first": (*_ALL, "twin_of", "threshold"),
    "progressive": (*_ALL, "rate", "drawn"),
}


class Prune(Section):
    """Samples that a training skips while it runs (`tdds train`). Epochs are counted from 0."""

    method: MethodName = Field(
        "none",
        description=(
            "none: every image in every epoch. static: from epoch start on those of highest score."
            " refresh: those of highest TDDS, chosen again every few epochs. infobatch: a share of"
            " those of loss below the mean is dropped, the others of them weigh more. hard_first:"
            " those that the network is not sure of. progressive: those of largest loss in a random"
            " share."
        ),
    )
    rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Share of the images that a pruned epoch skips; of infobatch, of those of loss below"
            " the mean."
        ),
    )
    threshold: float = Field(
        0.3,
        gt=0,
        description=(
            "hard_first keeps images whose label had a probability below this; above 1: all."
        ),
    )
    drawn: float = Field(
        0.75,
        gt=0,
        le=1,
        description="Share of the images that progressive draws at random, before it chooses.",
    )
    start: int | None = Field(
        None,
        ge=1,
        description=(
            "First epoch that skips images; empty: of static and refresh the T of the window that"
            " serves the rate, of the others 1."
        ),
    )
    full_last: int | None = Field(
        None,
        ge=0,
        description=(
            "Last epochs that visit every image; empty: an eighth of all for infobatch, 1 for"
            " hard_first, 0 for the others."
        ),
    )
    every: int = Field(1, ge=1, description="Epochs after which refresh chooses again.")
    explore: float = Field(
        0.1,
        ge=0,
        le=1,
        description=(
            "Share of the images that refresh visits, which are drawn at random from those that it"
            " would skip, so that their scores stay alive; in place of as many of lowest score."
        ),
    )
    score: ScoreName = Field(
        "tdds",
        description=(
            "What static chooses by; all but tdds are computed from the trajectory, with the"
            " options of score.baselines."
        ),
    )
    sampler: Literal["top", "centre", "ccs", "beta"] = Field(
        "top",
        description="How static and refresh choose, as in `tdds select`; beta by dual only.",
    )
    class_balanced: bool = Field(
        False, description="static and refresh choose from each class by itself."
    )
    importance: Literal["none", "batch", "sample"] = Field(
        "none", description="Weight of the loss in static and refresh, as retrain.importance."
    )
    schedule_by: Literal["epochs", "images"] = Field(
        "epochs",
        description=(
            "What the learning rate follows: epochs, each of which spans as much of it whatever it"
            " skips, or images seen, of those of the whole training."
        ),
    )
    twin: bool = Field(
        False,
        description=(
            "The random control: whenever the method chooses, as many images at random, and its"
            " weights dealt out at random."
        ),
    )
    twin_of: str | None = Field(
        None,
        description=(
            "Run directory of the finished training whose images per epoch and weights a random"
            " control takes; infobatch and hard_first need it, whose numbers follow from the run."
        ),
    )
