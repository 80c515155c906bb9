"""The schema of an experiment: a table of retrainings from one collection per seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tdds_dist.config.grid import BUILT_IN_METHODS, Method, check_axes, options_of_sampler
from tdds_dist.config.run import Config
from tdds_dist.config.schema import NameText, PathText, Section, parse_tree, read_tree
from tdds_dist.errors import InputError


class Variant(Section):
    """A way to retrain, such as another network or batch; the coresets stay those of the
    collection."""

    name: NameText = Field(description="Name of the variant in files and tables.")
    overrides: tuple[str, ...] = Field(
        description="Changes to the config, e.g. model.name=vgg16_bn; [] for none."
    )


class Experiment(Section):
    """A table of retrainings: methods x pruning rates x strategies x seeds (x variants), one
    collection per seed."""

    name: NameText = Field(description="Name of the experiment.")
    config: PathText = Field(description="Config of every run.")
    overrides: tuple[str, ...] = Field(
        (), description="Changes to that config, e.g. train.epochs=20."
    )
    dir: PathText = Field("", description="Where everything goes; empty means runs/<name>.")
    collections: PathText = Field(
        "",
        description=(
            "Directory of another experiment, whose finished collections are taken over, seed by"
            " seed; they must be of the same settings and images. Empty: every seed is collected"
            " here."
        ),
    )
    methods: tuple[Method, ...] = Field(
        min_length=1, description="Names of methods, or methods with options."
    )
    pruning_rates: tuple[float, ...] = Field(min_length=1, description="Fractions to remove.")
    strategies: tuple[Literal["E", "P"], ...] = Field(
        ("E",), min_length=1, description="Strategy-E, Strategy-P."
    )
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="One collection, and one retraining per cell, for each."
    )
    variants: tuple[Variant, ...] = Field(
        (),
        description=(
            "Ways to retrain on the same coresets, e.g. with other networks; empty means the"
            " config's."
        ),
    )

    @property
    def directory(self) -> Path:
        """Return the directory of the experiment."""
        return Path(self.dir or f"runs/{self.name}")

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "architectures" in tree:
            raise InputError("architectures is called variants now; rename the key")
        return tree

    @field_validator("methods", mode="before")
    @classmethod
    def _built_in(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise InputError(f"methods={value!r} must be a list, e.g. [tdds, random]")
        for name in value:
            if isinstance(name, str) and name not in BUILT_IN_METHODS:
                raise InputError(
                    f"methods: {name!r} is not known by name ({', '.join(BUILT_IN_METHODS)});"
                    f" describe it, e.g. {{name: {name}, score: el2n}}"
                )
        return tuple(BUILT_IN_METHODS[item] if isinstance(item, str) else item for item in value)

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        for key in ("methods", "variants"):
            names = [item.name for item in getattr(self, key)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise InputError(f"{key}: the names {sorted(twice)} stand twice; give each another")
        check_axes(
            "",
            "the full data is trained on in the collection",
            pruning_rates=self.pruning_rates,
            strategies=self.strategies,
            seeds=self.seeds,
        )
        if self.collections and Path(self.collections).resolve() == self.directory.resolve():
            raise InputError(
                f"collections={self.collections} is the experiment's own directory; name another,"
                " or leave it out"
            )
        for method in self.methods:
            if other := [rate for rate in method.pruning_rates if rate not in self.pruning_rates]:
                raise InputError(
                    f"methods: {method.name} has pruning_rates={other}, which the experiment's"
                    f" pruning_rates={list(self.pruning_rates)} lack; add them there, or leave them"
                    " out"
                )
            tdds_only = ("preset", "T", "K", "beta", "delta")
            given = [key for key in tdds_only if getattr(method, key) not in (None, "kl")]
            if method.score_key != "tdds" and given:
                raise InputError(
                    f"methods: {method.name} has {given[0]}, which belongs to score tdds; set"
                    " score: tdds, or leave it out"
                )
            if method.score_key == "tdds" and method.options:
                raise InputError(
                    f"methods: {method.name} has options={list(method.options)}, which belong to"
                    " other scores; use preset, delta, T, K, beta"
                )
            fitting = options_of_sampler(method.sampler, method.score_key)
            if wrong := [key for key in method.selector_options if key not in fitting]:
                raise InputError(
                    f"methods: {method.name} has {wrong[0]}, which does nothing with sampler"
                    f" {method.sampler or 'top'}; set sampler:"
                    f" {'beta' if wrong[0] == 'c_d' else 'ccs'}, or leave it out"
                )
            if (method.T is None) != (method.K is None):
                raise InputError(
                    f"methods: {method.name} has one of T and K; give both, or neither"
                )
        return self


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment from YAML, with `key=value` overrides; those of the config's keys, such as
    train.lr=0.1, are added to its `overrides`. Raise InputError for anything wrong."""
    path = Path(path)
    of_config = [
        override for override in overrides if override.partition(".")[0] in Config.model_fields
    ]
    own = [override for override in overrides if override not in of_config]
    tree = read_tree(path, own, f"the keys {', '.join(Experiment.model_fields)}")
    if "train" in tree and "methods" not in tree:
        raise InputError(
            f"{path} is the config of a run, not an experiment; `tdds collect {path}` runs it"
        )
    if of_config and isinstance(known := tree.get("overrides", []), list):
        tree["overrides"] = [*known, *of_config]
    return parse_tree(Experiment, tree, str(path))
