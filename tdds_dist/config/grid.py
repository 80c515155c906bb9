"""Methods by name, and what a pipeline runs after its collection."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from tdds_dist.config.schema import NameText, Section
from tdds_dist.config.scores import SAMPLER_OF_SCORE, SCORE_KEYS
from tdds_dist.errors import InputError


def options_of_sampler(sampler: str | None, score_key: str) -> tuple[str, ...]:
    """Return the options of a sampler; without one of that which the score is meant for."""
    options = {
        "top": ("hard_cutoff_rate",),
        "ccs": ("num_strata", "hard_cutoff_rate"),
        "beta": ("c_d",),
    }
    return options.get(sampler or SAMPLER_OF_SCORE.get(score_key, "top"), ())


class Method(Section):
    """One row of an experiment: a score, how samples are chosen by it, and how they are weighted in
    retraining."""

    name: NameText = Field(description="Name of the row, in files too.")
    score: str = Field(
        "",
        description=(
            "Score key; empty means the name. tdds takes the window that serves the pruning rate."
        ),
    )
    sampler: Literal["top", "ccs", "centre", "beta", "s2l", "drop"] | None = Field(
        None, description="Empty: what the score is meant for."
    )
    class_balanced: bool | None = Field(
        None, description="The same share of every class; empty: as the score is meant, cld only."
    )
    importance: Literal["none", "batch", "sample"] | None = Field(
        None,
        description=(
            "Weight of the loss; empty means retrain.importance for tdds and none for other scores."
        ),
    )
    preset: Literal["official", "paper"] | None = Field(
        None, description="Of tdds; empty means score.preset."
    )
    delta: Literal["kl", "kl_signed", "ce", "ce_absolute", "el2n"] = Field(
        "kl", description="Of tdds: what varies."
    )
    T: int | None = Field(
        None, ge=1, description="Of tdds: trajectory length at every pruning rate."
    )
    K: int | None = Field(None, ge=1, description="Of tdds: window size at every pruning rate.")
    beta: float | None = Field(
        None, ge=0, le=1, description="Of tdds: EMA decay; empty means that of the window."
    )
    options: tuple[str, ...] = Field(
        (), description="Of other scores: keys of score.baselines, e.g. el2n_epochs=20."
    )
    num_strata: int | None = Field(None, ge=1, description="Of sampler ccs.")
    hard_cutoff_rate: float | None = Field(None, ge=0, lt=1, description="Of samplers ccs and top.")
    c_d: float | None = Field(None, gt=0, description="Of sampler beta.")
    pruning_rates: tuple[float, ...] = Field(
        (), description="Those of the experiment at which this row is trained; empty means all."
    )

    @property
    def score_key(self) -> str:
        """Return the score this method ranks by."""
        return self.score or self.name

    @property
    def selector_options(self) -> dict[str, Any]:
        """Return the options of the sampler that were given."""
        return self.model_dump(include={"num_strata", "hard_cutoff_rate", "c_d"}, exclude_none=True)

    def is_at(self, pruning_rate: float) -> bool:
        """Say whether the row is trained at a pruning rate of its experiment."""
        return not self.pruning_rates or pruning_rate in self.pruning_rates


BUILT_IN_METHODS = {
    method.name: method
    for method in (
        *(Method(name=name) for name in SCORE_KEYS if name != "ccs"),
        Method(name="ccs", score="aum", sampler="ccs"),
        Method(name="dual_beta", score="dual", sampler="beta"),
        Method(name="drop", score="random", sampler="drop"),
    )
}


def check_axes(
    section: str,
    why_not_all: str,
    *,
    pruning_rates: Sequence[float],
    seeds: Sequence[int],
    **others: Sequence[str],
) -> None:
    """Raise InputError when the values that a grid multiplies are impossible, or stand twice in one
    list. `section` is what their keys begin with, `why_not_all` says why nothing is retrained at
    pruning rate 0."""
    if bad := [rate for rate in pruning_rates if not 0.0 < rate < 1.0]:
        raise InputError(f"{section}pruning_rates={bad} must lie between 0 and 1; {why_not_all}")
    if bad_seeds := [seed for seed in seeds if seed < 0]:
        raise InputError(f"{section}seeds={bad_seeds} must not be negative")
    for key, values in {"pruning_rates": pruning_rates, "seeds": seeds, **others}.items():
        # as files say them
        names = [f"{value:g}" if key == "pruning_rates" else value for value in values]
        if len(set(names)) != len(names):
            raise InputError(
                f"{section}{key}={list(values)} holds a value twice; leave each in once"
            )


class Pipeline(Section):
    """The runs of `tdds submit --stage pipeline` after the collection: scores x pruning rates x
    strategies x seeds."""

    scores: tuple[str, ...] = Field(
        ("tdds",),
        min_length=1,
        description=(
            "What coresets are chosen by: tdds, random, entropy, forgetting, el2n, aum, "
            "moderate, dyn_unc, dual, csl, confidence, variability, correctness, learning_time, "
            "cld, s2l, ccs (AUM in strata), dual_beta (DUAL's weighted draw), drop (random, by "
            "DRoP's class quotas)."
        ),
    )
    pruning_rates: tuple[float, ...] = Field(
        (), description="Fractions to remove; empty means those that score.windows serve."
    )
    strategies: tuple[Literal["E", "P"], ...] = Field(
        ("E",), min_length=1, description="Strategy-E, Strategy-P."
    )
    seeds: tuple[int, ...] = Field(
        (), description="Seeds of the retrainings; empty means run.seed."
    )

    @model_validator(mode="after")
    def _check(self) -> "Pipeline":
        if unknown := [name for name in self.scores if name not in BUILT_IN_METHODS]:
            raise InputError(
                f"pipeline.scores: {unknown[0]!r} is not known; use some of"
                f" {', '.join(BUILT_IN_METHODS)}"
            )
        check_axes(
            "pipeline.",
            "the collection trains on everything",
            scores=self.scores,
            pruning_rates=self.pruning_rates,
            strategies=self.strategies,
            seeds=self.seeds,
        )
        return self
