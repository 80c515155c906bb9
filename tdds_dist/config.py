"""The schema of a run: every key with its sentence, strict about unknown keys, overridable by `key=value`.

A config is one YAML file (`yaml.safe_load`, so no tag can execute anything). Errors are one line: value, rule, way out.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tdds_dist.errors import InputError
from tdds_dist.tdds import Window, check_window

Positive = Field(gt=0)


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    """What the run is called and where it happens."""

    name: str = Field(description="Name of the run, as in reports and queues.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: str = Field("", description="Run directory; empty means runs/<name>.")
    seed: int = Field(0, ge=0, description="Seed of weights, visit order and augmentation.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto takes CUDA when there is any.")
    timeout_seconds: float = Field(600.0, gt=0, description="Longest wait in a collective before the job is ended, seconds.")

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.dir or f"runs/{self.name}")


class Data(Section):
    """The images and how they are cut."""

    train: str = Field(description="Training .beton.")
    val: str = Field(description="Evaluation .beton.")
    num_classes: int = Field(ge=2, description="Number of classes C; labels lie in [0, C).")
    image_size: int = Field(ge=8, description="Side of the square the model sees, pixels.")
    crop: Literal["center", "pad", "resized"] = Field(
        description="Training crop: center (none), pad (shift within a black border, CIFAR), resized (ImageNet).")
    padding: int = Field(4, ge=0, description="Width of the border of crop=pad, pixels.")
    scale_min: float = Field(0.08, gt=0, le=1, description="Smallest area share of crop=resized.")
    flip: bool = Field(True, description="Flip training images horizontally half of the time.")
    eval_crop_ratio: float = Field(1.0, gt=0, le=1, description="Share of the shorter side that evaluation sees.")
    mean: tuple[float, float, float] = Field(description="Mean per channel on 0..255.")
    std: tuple[float, float, float] = Field(description="Standard deviation per channel on 0..255.")
    num_workers: int = Field(0, ge=0, description="Decoding threads per rank; 0 shares the CPUs among the ranks of a node.")


class Model(Section):
    """The network."""

    name: str = Field(description="torchvision name, e.g. resnet18, resnet34, swin_t, shufflenet_v2_x0_5.")
    cifar_stem: bool = Field(False, description="Small-image stem: first convolution 3x3 stride 1, no max-pool.")
    channels_last: bool = Field(True, description="channels_last memory format (faster convolutions on GPUs).")


class Train(Section):
    """Optimisation."""

    epochs: int = Field(ge=1, description="Epochs of the schedule.")
    global_batch_size: int = Field(ge=1, description="Images per optimizer step over all ranks; a multiple of the ranks.")
    accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW.")
    lr: float = Field(gt=0, description="Peak learning rate; cosine per step from here.")
    final_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(True, description="Nesterov momentum.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Betas of AdamW.")
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay.")
    decay_norm_and_bias: bool = Field(True, description="Decay one-dimensional parameters as well.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing.")
    mixup: float = Field(0.0, ge=0, description="Alpha of MixUp; 0 switches it off. Needs score.view=clean in collect.")
    cutmix: float = Field(0.0, ge=0, description="Alpha of CutMix; 0 switches it off. Needs score.view=clean in collect.")
    clip_norm: float = Field(0.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    amp: Literal["none", "bf16", "fp16"] = Field("none", description="Mixed precision on CUDA; the CPU trains in float32.")
    eval_every: int = Field(1, ge=1, description="Epochs between evaluations; the last epoch is always evaluated.")
    log_every: int = Field(50, ge=1, description="Steps between looks at the device: progress line, check for NaN.")


class ScoreWindow(Section):
    """One setting of TDDS and the pruning rates it serves."""

    T: int = Field(ge=1, description="Trajectory length, epochs.")
    K: int = Field(ge=1, description="Window size, as the paper counts.")
    beta: float | None = Field(None, ge=0, le=1, description="EMA decay; empty means score.beta.")
    pruning_rates: tuple[float, ...] = Field((), description="Pruning rates for which `tdds select` takes this setting.")


class Score(Section):
    """What is scored during collection."""

    preset: Literal["official", "paper"] = Field("official", description="official: the authors' code; paper: the equations.")
    beta: float = Field(0.9, ge=0, le=1, description="EMA decay over windows; 0 averages them.")
    windows: tuple[ScoreWindow, ...] = Field(min_length=1, description="Settings (T, K) and the pruning rates they serve.")
    view: Literal["train", "clean"] = Field(
        "train", description="train: the forward pass that trains. clean: one more, without gradient, in evaluation mode "
                             "on the un-mixed image (about a third more compute).")
    logp_dtype: Literal["float32", "float16"] = Field("float32", description="Precision of stored log-probabilities.")
    trajectory: bool = Field(True, description="Write the per-epoch scalars, so that scores can be recomputed.")


class Collect(Section):
    """When collection ends."""

    stop_after: Literal["schedule", "last_window"] = Field(
        "schedule", description="last_window ends once the largest T is scored, leaving the schedule as configured.")


class Retrain(Section):
    """How coresets are trained on."""

    epochs: int = Field(0, ge=0, description="Epochs of Strategy-E (Strategy-P divides them by 1 - p); 0 means train.epochs.")
    importance: Literal["none", "batch", "sample"] = Field(
        "batch", description="Weight of the loss: none; batch, the batch's mean importance (authors' code); sample, each its "
                             "own (Eq. 13).")
    batch_size_rule: dict[float, float] = Field(
        {0.8: 0.5, 0.9: 0.25}, description="Factor on train.global_batch_size from this pruning rate on.")


class Config(Section):
    """One run."""

    run: Run
    data: Data
    model: Model
    train: Train
    score: Score
    collect: Collect = Collect()
    retrain: Retrain = Retrain()

    def windows(self) -> list[Window]:
        """The settings to score."""
        return [self.window_of(setting) for setting in self.score.windows]

    def window_of(self, setting: ScoreWindow) -> Window:
        """A setting with its beta filled in."""
        return Window(setting.T, setting.K, self.score.beta if setting.beta is None else setting.beta)

    def window_for(self, pruning_rate: float) -> Window:
        """The setting that serves a pruning rate; InputError when none says so."""
        for setting in self.score.windows:
            if any(math.isclose(rate, pruning_rate) for rate in setting.pruning_rates):
                return self.window_of(setting)
        known = sorted({rate for setting in self.score.windows for rate in setting.pruning_rates})
        raise InputError(f"no window of score.windows serves pruning_rate={pruning_rate} (served: {known}); add the rate to "
                         "a window, or name a score with --score")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for setting in self.score.windows:
            check_window(self.window_of(setting), self.score.preset)
            bad = [rate for rate in setting.pruning_rates if not 0.0 <= rate < 1.0]
            if bad:
                raise InputError(f"score.windows: pruning_rates={bad} must lie in [0, 1)")
        rates = [rate for setting in self.score.windows for rate in setting.pruning_rates]
        if twice := sorted({rate for rate in rates if rates.count(rate) > 1}):
            raise InputError(f"score.windows: pruning_rates={twice} stand in more than one window; leave each in one")
        rule = self.retrain.batch_size_rule
        if wrong := {rate: factor for rate, factor in rule.items() if not (0 < factor <= 1 and 0 <= rate < 1)}:
            raise InputError(f"retrain.batch_size_rule={wrong} must map pruning rates in [0, 1) to factors in (0, 1]")
        if self.train.nesterov and self.train.optimizer == "sgd" and self.train.momentum == 0:
            raise InputError("train.nesterov=true needs momentum; set train.momentum=0.9 or train.nesterov=false")
        if self.train.warmup_epochs >= self.train.epochs:
            raise InputError(f"train.warmup_epochs={self.train.warmup_epochs} must be less than "
                             f"train.epochs={self.train.epochs}")
        if self.retrain.epochs and self.train.warmup_epochs >= self.retrain.epochs:
            raise InputError(f"train.warmup_epochs={self.train.warmup_epochs} must be less than "
                             f"retrain.epochs={self.retrain.epochs}")
        if min(self.data.std) <= 0:
            raise InputError(f"data.std={self.data.std} must be positive")
        return self

    def check_collect(self) -> None:
        """Rules that matter to collection only."""
        for setting in self.score.windows:
            if self.train.epochs < setting.T:
                raise InputError(f"score.windows: T={setting.T} is longer than train.epochs={self.train.epochs}; "
                                 "lower T or train longer")
        if (self.train.mixup or self.train.cutmix) and self.score.view == "train":
            raise InputError("train.mixup and train.cutmix change the images that are scored; set score.view=clean "
                             "(one more forward pass per step) or switch both off")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML); InputError for anything wrong."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; configs/ holds examples")
    try:
        tree = _read_yaml(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not text, or a date that does not exist
        raise InputError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold the sections {', '.join(Config.model_fields)}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Build a Config from plain data; InputError naming key, value and rule for the first thing wrong."""
    try:
        return Config.model_validate(_tuples(tree))
    except ValidationError as error:
        raise InputError(f"{where}: {_one_line(error)}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain data for YAML."""
    return _lists(config.model_dump())


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override {override!r} must look like section.key=value, e.g. train.lr=0.1")
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise InputError(f"override {key!r} goes through something that is not a section; keys look like train.lr")
    try:
        node[leaf] = _read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"override {override!r}: the value is not YAML") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 5e-4 is a number; YAML 1.1 wants 5.0e-4 and takes the rest for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789"))


def _read_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        tree = loader.get_single_data()
    finally:
        loader.dispose()
    json.dumps(tree, default=str)  # an anchor that holds itself ends here
    return tree


def _tuples(value: Any) -> Any:
    """YAML lists as tuples (frozen fields)."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _one_line(error: ValidationError) -> str:
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")  # a typo explains what is missing
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section, name = _section(first["loc"][:-1]), str(first["loc"][-1])
        near = _nearest(name, section)
        return f"unknown key {key!r}; the nearest valid key is {near!r} (valid: {', '.join(section)})"
    if first["type"] == "missing":
        return f"key {key!r} is missing; {_describe(first['loc'])}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}; {_describe(first['loc'])}"


def _nearest(name: str, section: Sequence[str]) -> str:
    """The valid key most like `name`; initials count, so that learning_rate finds lr."""
    initials = "".join(word[:1] for word in name.lower().split("_"))
    if len(initials) > 1 and initials in section:
        return initials
    return max(section, key=lambda valid: difflib.SequenceMatcher(None, valid.lower(), name.lower()).ratio())


def _section(location: Sequence[str | int]) -> list[str]:
    """Valid keys below a location of the schema."""
    model: Any = Config
    for part in location:
        if isinstance(part, str):
            model = ScoreWindow if part == "windows" else model.model_fields[part].annotation
    return list(model.model_fields)


def _describe(location: Sequence[str | int]) -> str:
    names = [part for part in location if isinstance(part, str)]
    model: Any = Config
    for position, part in enumerate(names):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            break
        if position == len(names) - 1:
            if fields[part].description:
                return f"{part}: {fields[part].description}"
            return f"it has the keys {', '.join(fields[part].annotation.model_fields)}"
        model = ScoreWindow if part == "windows" else fields[part].annotation
    return "see `configs/` for examples"
