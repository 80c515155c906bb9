"""Every key of a run and of an experiment, each with its sentence; strict about unknown keys,
overridable by `key=value`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tdds_dist.config.grid import Pipeline
from tdds_dist.config.prune import READS, Prune
from tdds_dist.config.schema import (
    NameText,
    PathText,
    Section,
    apply_override,
    parse_tree,
    read_tree,
    sequences_as,
)
from tdds_dist.config.scores import Window, check_window, parse_storage
from tdds_dist.errors import InputError


class Run(Section):
    """The name of the run, and the place where it happens."""

    name: NameText = Field(description="Name of the run, as in reports and queues.")
    dir: PathText = Field("", description="Run directory; empty means runs/<name>.")
    seed: int = Field(0, ge=0, description="Seed of weights, visit order and augmentation.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train; auto takes CUDA when there is any."
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="Longest wait in a collective before the job is ended, seconds."
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",),
        description=(
            "Where the numbers of epochs go besides metrics.jsonl, e.g. [tensorboard, mlflow]."
            " wandb and mlflow have to be installed; their own variables say where they are"
            " (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI)."
        ),
    )

    @property
    def directory(self) -> Path:
        """Return the run directory."""
        return Path(self.dir or f"runs/{self.name}")


class Progressive(Section):
    """Progressive resizing, as FFCV's recipe for ImageNet does it: small images at first."""

    start_size: int = Field(
        ge=8,
        description=(
            "Side of the first epochs' images, pixels; data.image_size is the last epochs'."
        ),
    )
    from_epoch: int = Field(
        ge=0, description="Epoch, counted from 0, up to which images have start_size."
    )
    to_epoch: int = Field(
        ge=1,
        description=(
            "Epoch, counted from 0, from which images have data.image_size; linear in between."
        ),
    )
    multiple: int = Field(
        32, ge=1, description="Sizes in between are rounded to a multiple of this, pixels."
    )


class Data(Section):
    """The images and how they are cut."""

    train: PathText = Field(description="Training .beton.")
    val: PathText = Field(description="Evaluation .beton.")
    image_field: str = Field(
        "", description="Field of both files that holds the images; empty: the only image field."
    )
    label_field: str = Field(
        "",
        description=(
            "Field of both files that holds the labels; empty: the only int field, or of several"
            " the one called label."
        ),
    )
    num_classes: int = Field(ge=2, description="Number of classes C; labels lie in [0, C).")
    image_size: int = Field(ge=8, description="Side of the square the model sees, pixels.")
    crop: Literal["center", "pad", "resized"] = Field(
        description=(
            "Training crop: center (none), pad (shift within a black border, CIFAR), resized"
            " (ImageNet)."
        )
    )
    padding: int = Field(4, ge=0, description="Width of the border of crop=pad, pixels.")
    scale_min: float = Field(0.08, gt=0, le=1, description="Smallest area share of crop=resized.")
    flip: bool = Field(True, description="Flip training images horizontally half of the time.")
    progressive: Progressive | None = Field(
        None,
        description=(
            "Training images grow from start_size to data.image_size, e.g. {start_size: 160,"
            " from_epoch: 35, to_epoch: 39}; empty: one size. Epochs are those of train.epochs and"
            " stretch with the training: a retraining of other length goes through the same sizes"
            " at the same shares of it."
        ),
    )
    eval_size: int = Field(
        0,
        ge=0,
        description="Side of the square that evaluation sees, pixels; 0 means data.image_size.",
    )
    eval_crop_ratio: float = Field(
        1.0, gt=0, le=1, description="Share of the shorter side that evaluation sees."
    )
    mean: tuple[float, float, float] = Field(description="Mean per channel on 0..255.")
    std: tuple[float, float, float] = Field(description="Standard deviation per channel on 0..255.")
    cache: str = Field(
        "",
        description=(
            "Folder on each node's own disk, to which both files are copied before training, once"
            " per node, and where they stay; variables are those of the node, as in '$TMPDIR'"
            " (quoted). Empty: files are read where they lie."
        ),
    )
    order: Literal["random", "blocks"] = Field(
        "random",
        description=(
            "Order of training images: random, or blocks: contiguous blocks of about 16 MB in"
            " random order, shuffled within pools of them that are read ahead, for files larger"
            " than memory; pools hold an eighth of the file, at most 8.6 GB in all. Each image once"
            " per epoch in either."
        ),
    )
    num_workers: int = Field(
        0,
        ge=0,
        description="Decoding threads per rank; 0 shares the CPUs among the ranks of a node.",
    )

    def check_files(self) -> None:
        """Raise InputError when one of the two files is missing; they are not opened."""
        for key in ("train", "val"):
            if Path(path := getattr(self, key)).is_dir():
                raise InputError(
                    f"data.{key}={path} is a folder; `tdds write imagefolder:{path} data/NAME.beton"
                    f" --split {key}` first, and give that file"
                )
            if not Path(path).is_file():
                raise InputError(
                    f"data.{key}={path} does not exist; write it with `tdds write SOURCE {path}"
                    f" --split {key}`"
                )


class Model(Section):
    """The network."""

    name: str = Field(
        description="torchvision name, e.g. resnet18, resnet34, swin_t, shufflenet_v2_x0_5."
    )
    cifar_stem: bool = Field(
        False,
        description=(
            "Network for small images: first convolution 3x3 stride 1, no max-pool; of VGG, one"
            " linear layer in place of the classifier for ImageNet."
        ),
    )
    channels_last: bool = Field(
        True, description="channels_last memory format (faster convolutions on GPUs)."
    )
    compile: bool = Field(
        False,
        description=(
            "torch.compile the network and its input for training steps: fused kernels, after up to"
            " minutes at the start and at every new size of data.progressive. Rounds otherwise and"
            " draws other numbers for dropout than without it. Evaluation and score.view=clean stay"
            " as they are. Needs a C++ compiler on the CPU."
        ),
    )


class Train(Section):
    """Optimisation."""

    epochs: int = Field(ge=1, description="Epochs of the schedule.")
    global_batch_size: int = Field(
        ge=1, description="Images per optimizer step over all ranks; a multiple of the ranks."
    )
    accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW.")
    fused_optimizer: bool | None = Field(
        None,
        description=(
            "Optimizer step in one kernel per kind of parameter, which rounds otherwise; empty: on"
            " CUDA only."
        ),
    )
    lr: float = Field(gt=0, description="Peak learning rate; cosine per step from here.")
    final_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(True, description="Nesterov momentum.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Betas of AdamW.")
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay.")
    decay_norm_and_bias: bool = Field(True, description="Decay one-dimensional parameters as well.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing.")
    mixup: float = Field(
        0.0,
        ge=0,
        description="Alpha of MixUp; 0 switches it off. Needs score.view=clean in collect.",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="Alpha of CutMix; 0 switches it off. Needs score.view=clean in collect.",
    )
    clip_norm: float = Field(0.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    amp: Literal["none", "bf16", "fp16"] = Field(
        "none", description="Mixed precision on CUDA; the CPU trains in float32."
    )
    eval_every: int = Field(
        1, ge=1, description="Epochs between evaluations; the last epoch is always evaluated."
    )
    log_every: int = Field(
        50, ge=1, description="Steps between looks at the device: progress line, check for NaN."
    )
    deterministic: bool = Field(
        False,
        description=(
            "Only algorithms that give the same bits every time: with the same seed, ranks and"
            " threads, weights and scores are bitwise the same, interrupted or not. Slower on GPUs."
        ),
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description=(
            "Of float32 matrix products: high takes TF32 on CUDA, faster where train.amp=none and"
            " linear layers prevail (Swin, ViT); convolutions take TF32 in any case."
        ),
    )
    sync_batch_norm: bool = Field(
        False,
        description=(
            "Batch norm over the images of all ranks, CUDA only: for few images per rank and"
            " forward pass, say under 16. Every layer waits for an exchange of its statistics."
        ),
    )
    compress_gradients: bool = Field(
        False,
        description=(
            "Gradients travel between ranks as bfloat16: half the bytes, where steps wait for the"
            " network between nodes. Rounds the sums."
        ),
    )
    static_graph: bool = Field(
        False,
        description=(
            "Promise DDP that all steps use the same parameters: for a network that leaves some"
            " unused, always the same; no other gain has been measured."
        ),
    )


class ScoreWindow(Section):
    """One setting of TDDS and the pruning rates it serves."""

    T: int = Field(ge=1, description="Trajectory length, epochs.")
    K: int = Field(ge=1, description="Window size, as the paper counts.")
    beta: float | None = Field(None, ge=0, le=1, description="EMA decay; empty means score.beta.")
    pruning_rates: tuple[float, ...] = Field(
        (), description="Pruning rates for which `tdds select` takes this setting."
    )


class Baselines(Section):
    """Options of the scores that TDDS is compared with."""

    el2n_epochs: int = Field(10, ge=1, description="EL2N averages the first so many epochs.")
    never_learned: Literal["inf", "0"] = Field(
        "inf",
        description=(
            "Forgetting of samples that were never right: inf ranks them first (data-diet), 0 last"
            " (CCS)."
        ),
    )
    aum_of: Literal["logit", "probability"] = Field(
        "logit", description="AUM's margin of logits, or of probabilities (CCS)."
    )
    aum_keep: Literal["hardest", "easiest"] = Field(
        "hardest", description="Which end of AUM is kept."
    )
    uncertainty_window: int = Field(10, ge=2, description="Window J of Dyn-Unc and DUAL, epochs.")
    num_epochs: int = Field(
        0,
        ge=0,
        description=(
            "Epochs that the scores other than TDDS and EL2N look at; 0 means all that were"
            " recorded."
        ),
    )
    num_clusters: int = Field(
        100, ge=2, description="Clusters of loss trajectories that S2L draws from."
    )

    @field_validator("never_learned", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            return {0: "0", math.inf: "inf"}.get(value, value)
        return value


class Score(Section):
    """The scores that a collection gives."""

    preset: Literal["official", "paper"] = Field(
        "official", description="official: the authors' code; paper: the equations."
    )
    beta: float = Field(0.9, ge=0, le=1, description="EMA decay over windows; 0 averages them.")
    windows: tuple[ScoreWindow, ...] = Field(
        min_length=1, description="Settings (T, K) and the pruning rates they serve."
    )
    view: Literal["train", "clean"] = Field(
        "train",
        description=(
            "train: the forward pass that trains. clean: one more, without gradient, in evaluation"
            " mode on the un-mixed image (about a third more compute)."
        ),
    )
    logp_dtype: Literal["float32", "float16"] = Field(
        "float32", description="Precision of stored log-probabilities."
    )
    storage: str = Field(
        "dense",
        description=(
            "Stored log-probabilities: dense, of all classes; topk:K (e.g. topk:64), the K largest,"
            " the label's, and the mean of the others. For classes in the tens of thousands; scores"
            " are close."
        ),
    )
    trajectory: bool = Field(
        True, description="Write the per-epoch scalars, so that scores can be recomputed."
    )
    trajectory_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description=(
            "Precision of the per-epoch scalars; float16 halves the disk, recomputed scores are"
            " close."
        ),
    )
    route_every: int = Field(
        0,
        ge=0,
        description=(
            "Steps whose rows travel to their owners together; 0: as few as keep a rank at 8"
            " messages per step, 1 up to 9 ranks. No score depends on it."
        ),
    )
    final_pass: bool = Field(
        True,
        description=(
            "After training, one pass over the training images in evaluation view, for Entropy and"
            " Moderate."
        ),
    )
    on_nan: Literal["stop", "quarantine"] = Field(
        "stop",
        description=(
            "NaN or infinite logits: stop the run, or quarantine the samples (listed, scored"
            " lowest, in no coreset, steps whose gradient they spoil left out); more than 1 % of"
            " all samples always stop."
        ),
    )
    baselines: Baselines = Baselines()


class Collect(Section):
    """The end of collection."""

    stop_after: Literal["schedule", "last_window"] = Field(
        "schedule",
        description=(
            "last_window ends once the largest T is scored, leaving the schedule as configured."
        ),
    )


class Retrain(Section):
    """Training on coresets."""

    epochs: int = Field(
        0,
        ge=0,
        description=(
            "Epochs of Strategy-E (Strategy-P divides them by 1 - p); 0 means train.epochs."
        ),
    )
    importance: Literal["none", "batch", "sample"] = Field(
        "batch",
        description=(
            "Weight of the loss: none; batch, the batch's mean importance (authors' code); sample,"
            " each its own (Eq. 13)."
        ),
    )
    batch_size_rule: dict[float, float] = Field(
        {0.8: 0.5, 0.9: 0.25},
        description="Factor on train.global_batch_size from this pruning rate on.",
    )
    schedule_of: Literal["coreset", "full"] = Field(
        "coreset",
        description=(
            "Whose steps the learning rate's warm-up and cosine span: coreset, so that it reaches"
            " train.final_lr; full, those of all images in as many epochs, and training ends before"
            " (older commits of the authors' code)."
        ),
    )


class Checkpoint(Section):
    """The state that a stopped run goes on from."""

    every_epochs: int = Field(
        1,
        ge=0,
        description="Epochs between checkpoints; 0 saves only by time and when asked to leave.",
    )
    every_seconds: float = Field(
        900.0,
        ge=0,
        description="Seconds between checkpoints, also within an epoch; 0 ignores time.",
    )
    keep: int = Field(
        2, ge=2, description="How many of the latest stay; all go when the run has finished."
    )
    asynchronous: bool = Field(
        True, description="Write in the background; takes the state again in host memory."
    )
    on_error: Literal["continue", "stop"] = Field(
        "continue",
        description=(
            "A checkpoint that cannot be written (disk full): warn and go on without it, or stop."
        ),
    )


class Config(Section):
    """One run."""

    run: Run
    data: Data
    model: Model
    train: Train
    score: Score
    collect: Collect = Collect()
    retrain: Retrain = Retrain()
    checkpoint: Checkpoint = Checkpoint()
    pipeline: Pipeline = Pipeline()
    prune: Prune = Prune()

    def changed(self, section: str, **values: Any) -> "Config":
        """Return the config with other values in a section, which are not checked."""
        part = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: part})

    def windows(self) -> list[Window]:
        """Return the settings to score."""
        return [self.window_of(setting) for setting in self.score.windows]

    def window_of(self, setting: ScoreWindow) -> Window:
        """Return a setting with its beta filled in."""
        return Window(
            setting.T, setting.K, self.score.beta if setting.beta is None else setting.beta
        )

    @property
    def served_rates(self) -> tuple[float, ...]:
        """Return the pruning rates that score.windows serve, in order; 0 among them stands for the
        whole dataset."""
        return tuple(
            sorted({rate for setting in self.score.windows for rate in setting.pruning_rates})
        )

    def window_for(self, pruning_rate: float) -> Window:
        """Return the setting that serves a pruning rate; raise InputError when none says so."""
        for setting in self.score.windows:
            if any(math.isclose(rate, pruning_rate) for rate in setting.pruning_rates):
                return self.window_of(setting)
        raise InputError(
            f"no window of score.windows serves pruning_rate={pruning_rate} (served:"
            f" {list(self.served_rates)}); add the rate to a window, or name a score with --score"
        )

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for setting in self.score.windows:
            check_window(self.window_of(setting), self.score.preset)
            if bad := [rate for rate in setting.pruning_rates if not 0.0 <= rate < 1.0]:
                raise InputError(f"score.windows: pruning_rates={bad} must lie in [0, 1)")
        rates = [rate for setting in self.score.windows for rate in setting.pruning_rates]
        if twice := sorted({rate for rate in rates if rates.count(rate) > 1}):
            raise InputError(
                f"score.windows: pruning_rates={twice} stand in more than one window; leave each"
                " in one"
            )
        try:
            parse_storage(self.score.storage, self.data.num_classes)
        except InputError as error:
            raise InputError(f"score.{error}") from None
        rule = self.retrain.batch_size_rule
        if wrong := {
            rate: factor for rate, factor in rule.items() if not (0 < factor <= 1 and 0 <= rate < 1)
        }:
            raise InputError(
                f"retrain.batch_size_rule={wrong} must map pruning rates in [0, 1) to factors in"
                " (0, 1]"
            )
        if self.train.nesterov and self.train.optimizer == "sgd" and self.train.momentum == 0:
            raise InputError(
                "train.nesterov=true needs momentum; set train.momentum=0.9 or train.nesterov=false"
            )
        for section in ("train", "retrain"):
            epochs = getattr(self, section).epochs
            if epochs and self.train.warmup_epochs >= epochs:
                raise InputError(
                    f"train.warmup_epochs={self.train.warmup_epochs:g} must be less than "
                    f"{section}.epochs={epochs}; lower the first, e.g. train.warmup_epochs=0"
                )
        if min(self.data.std) <= 0:
            raise InputError(f"data.std={self.data.std} must be positive")
        if 0 < self.data.eval_size < 8:
            raise InputError(
                f"data.eval_size={self.data.eval_size} must be at least 8, or 0 for"
                f" data.image_size={self.data.image_size}"
            )
        if self.data.progressive is not None:
            self._check_progressive(self.data.progressive)
        return self

    def _check_progressive(self, sizes: Progressive) -> None:
        if self.data.crop == "pad":
            raise InputError(
                "data.progressive resizes images, and data.crop=pad does not; use"
                " data.crop=resized, or leave data.progressive out"
            )
        if sizes.start_size > self.data.image_size:
            raise InputError(
                f"data.progressive: start_size={sizes.start_size} is larger than"
                f" data.image_size={self.data.image_size}, the size of the last epochs; lower the"
                " first or raise the second"
            )
        if sizes.from_epoch >= sizes.to_epoch:
            raise InputError(
                f"data.progressive: from_epoch={sizes.from_epoch} must be less than"
                f" to_epoch={sizes.to_epoch}; images grow between the two"
            )
        if sizes.to_epoch >= self.train.epochs:
            raise InputError(
                f"data.progressive: to_epoch={sizes.to_epoch} must be less than"
                f" train.epochs={self.train.epochs} (the last epoch is {self.train.epochs - 1}), so"
                " that training ends at data.image_size; lower it"
            )

    def check_collect(self) -> None:
        """Check the rules that matter to collection only."""
        for setting in self.score.windows:
            if self.train.epochs < setting.T:
                raise InputError(
                    f"score.windows: T={setting.T} is longer than train.epochs={self.train.epochs};"
                    " lower T or train longer"
                )
        self._check_view()

    def _check_view(self) -> None:
        if (self.train.mixup or self.train.cutmix) and self.score.view == "train":
            raise InputError(
                "train.mixup and train.cutmix change the images that are scored; set"
                " score.view=clean (one more forward pass per step) or switch both off"
            )

    def check_train(self) -> None:
        """Check the rules that matter to a pruned training only."""
        self._check_view()
        given = self.prune.model_dump(exclude_defaults=True, exclude={"method"})
        if unread := sorted(given.keys() - {*READS[self.prune.method]}):
            raise InputError(
                f"prune.{unread[0]}={json.dumps(given[unread[0]])} means nothing with"
                f" prune.method={self.prune.method}; leave it out"
            )
        if self.score.on_nan == "quarantine":
            raise InputError(
                "score.on_nan=quarantine keeps images out of scores, and a pruned training has no"
                " rule for them; set score.on_nan=stop"
            )


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML); raise
    InputError for anything wrong."""
    tree = read_tree(Path(path), overrides, f"the sections {', '.join(Config.model_fields)}")
    if "executor" in tree and "train" not in tree:
        raise InputError(
            f"{path} is a cluster file, not the config of a run; `tdds submit CONFIG.yaml --cluster"
            f" {path}` takes it"
        )
    if "methods" in tree and "train" not in tree:
        raise InputError(
            f"{path} is an experiment, not the config of a run; `tdds experiment {path}` runs it"
        )
    return parse_config(tree, str(path))


def parse_config(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Build a Config from plain data; raise InputError naming key, value and rule for the first
    thing wrong."""
    return parse_tree(Config, tree, where)


def parse_baselines(base: Baselines, overrides: Sequence[str]) -> Baselines:
    """Return `base` with `key=value` overrides (values are YAML; `score.baselines.` before the key
    may be left out)."""
    tree = base.model_dump()
    for override in overrides:
        apply_override(tree, override.removeprefix("score.baselines."))
    return parse_tree(Baselines, tree, "option")


def to_dict(config: Section) -> dict[str, Any]:
    """Return the resolved config as plain data for YAML."""
    return sequences_as(list, config.model_dump())
