"""Stage `train`: one training that skips samples while it runs."""

from functools import partial
from pathlib import Path

from tdds_dist.config.run import Config, parse_config
from tdds_dist.config.scores import Window, check_window
from tdds_dist.console import HEADING, log
from tdds_dist.distributed.collectives import together
from tdds_dist.distributed.interruption import Interruption
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.pruning.plan import BY_SCORE, PruningPlan
from tdds_dist.pruning.schedule import PruningSchedule, check_score, images_in, record_problem
from tdds_dist.runs.checkpoint import Checkpoint
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.entry import entered
from tdds_dist.text import table
from tdds_dist.training.build import build_scorer, checked_files, on_this_node
from tdds_dist.training.collect import lacks_trajectory
from tdds_dist.training.engine import fit
from tdds_dist.training.training import Training


def train(
    config: Config,
    world: World,
    *,
    fresh: bool = False,
    force: bool = False,
    interruption: Interruption | None = None,
) -> RunDir:
    """Run the stage, or go on with it; return its run directory.

    Every rank calls it. Bad input is found before the first training step and raised on every rank.
    A run with a checkpoint goes on, a finished one is left as it is; `fresh` starts over (`force`:
    also where there is a run).

    Raises:
        Preempted: `interruption` asked for it; the state is saved.
    """
    run = RunDir(config.run.directory)
    with together(world):
        files, _, data = checked_files(config, world)
        plan = plan_of(config, files[0].num_samples)
        is_left_alone = run.read_result() is not None and not fresh
        twin_of = None if is_left_alone else _twin_of(config, plan)
    setting = {"stage": "train"} | data
    refuse = partial(_lacks, run, config, plan)
    with entered(run, config, setting, world, fresh=fresh, force=force, refuse=refuse) as start:
        if start.result is not None:
            return run
        train_file, val_file = on_this_node(config, files, world, start.pulse)
        window = window_of(config)
        scorer = build_scorer(
            config,
            train_file.num_samples,
            world.device,
            windows=[window],
            trajectory=run.trajectory if config.score.trajectory else None,
            resume=start.resume is not None,
            partial_epochs=True,
        )
        if world.is_main:
            total = plan.total_images
            seen = "" if total is None else f", {_share(total, plan)} of the images of a full one"
            log.info(
                f"train {config.run.name}: {plan.num_samples} images, {plan.epochs} epochs,"
                f" {plan.method}{' (random twin)' if plan.twin else ''}{seen},"
                f" {world.world_size} rank(s) on {world.device.type}",
                extra=HEADING,
            )
        by_epochs = (
            config.prune.schedule_by == "epochs"
            or plan.total_images == plan.epochs * plan.num_samples
        )
        training = Training(
            config,
            world,
            run,
            train_file,
            val_file,
            config.train.epochs,
            config.train.global_batch_size,
            observer=scorer,
            clean_view=config.score.view == "clean",
            importance=plan.loss_weights,
            schedule=PruningSchedule(
                plan,
                scorer,
                window=window,
                baselines=config.score.baselines,
                folder=run.pruning,
                twin_of=twin_of,
            ),
            # by epochs too where nothing is skipped: to the bit that of a plain training
            total_images=None if by_epochs else plan.total_images,
            interruption=interruption or Interruption(),
        )
        method = {"method": plan.method, "twin": plan.twin, "rate": plan.rate}
        start.finish(setting | method | fit(training, start))
    return run


def plan_of(config: Config, num_samples: int) -> PruningPlan:
    """Return what a config's training prunes of so many images; raise InputError for what does not
    fit."""
    config.check_train()
    prune, batch = config.prune, config.train.global_batch_size
    settings = prune.model_dump(exclude={"schedule_by", "twin_of"})
    if prune.method in BY_SCORE and prune.start is None:
        try:
            settings["start"] = config.window_for(prune.rate).T
        except InputError:
            raise InputError(
                f"prune.rate={prune.rate}: no window of score.windows serves it, whose T would be"
                " the first epoch to prune; set prune.start, or add the rate to a window"
            ) from None
    try:
        check_window(window := window_of(config), config.score.preset)
    except InputError as error:
        raise InputError(f"score.windows: {error}") from None
    try:
        plan = PruningPlan(
            num_samples=num_samples,
            epochs=config.train.epochs,
            seed=config.run.seed,
            least=batch,
            **settings,
        )
        check_score(plan, window, config.score.preset, config.score.baselines)
    except InputError as error:
        raise InputError(f"prune.{error}") from None
    if plan.takes_numbers and prune.twin_of is None:
        raise InputError(
            f"prune.twin=true: how many images {plan.method} skips follows from its own training;"
            " run that first, and give its run directory as prune.twin_of"
        )
    if prune.twin_of is not None and not prune.twin:
        raise InputError(
            f"prune.twin_of={prune.twin_of} is for a random control; set prune.twin=true, or leave"
            " it out"
        )
    if plan.score != "tdds" and not config.score.trajectory:
        raise InputError(
            f"prune.score={plan.score} is computed from the trajectory; set score.trajectory=true"
        )
    if prune.schedule_by == "images" and plan.total_images is None:
        raise InputError(
            f"prune.schedule_by=images needs the images of the whole training in advance, and"
            f" method={prune.method} decides them on the way; use prune.schedule_by=epochs"
        )
    return plan


def _twin_of(config: Config, plan: PruningPlan) -> Path | None:
    """Return the decisions that a random control takes its numbers from, if from any; raise
    InputError unless they are those of a finished training of the same method."""
    if config.prune.twin_of is None:
        return None
    other = RunDir(config.prune.twin_of)
    where, result = f"prune.twin_of={config.prune.twin_of}", other.read_result()
    if result is None or result.get("stage") != "train":
        raise InputError(
            f"{where} must be the run directory of a finished training of {plan.method}; run `tdds"
            " train` without prune.twin first"
        )
    wanted = config.prune.model_dump() | {"twin": False, "twin_of": None}
    wanted |= {"epochs": plan.epochs, "images": plan.num_samples}
    found = parse_config(other.read_config(), str(other.config_file)).prune.model_dump()
    found |= {"epochs": result["epochs_planned"], "images": result["num_images"]}
    for key, value in wanted.items():
        if found[key] != value:
            raise InputError(
                f"{where} is a training with {key}={found[key]}, this one has {value}: give it the"
                " same settings but prune.twin and prune.twin_of"
            )
    if other.path.resolve() == RunDir(config.run.directory).path.resolve():
        raise InputError(f"{where} is this very run; set another run.name or run.dir")
    if images_in(other.pruning, plan.epochs, plan.num_samples) != result["images_seen"]:
        raise InputError(
            f"{other.pruning} does not hold the decisions of {result['images_seen']:,} images that"
            " the training saw; restore it, or run that training again"
        )
    return other.pruning


def schedule_table(plan: PruningPlan, images_per_second: float | None = None) -> str:
    """Return epochs and images of a training, and the hours at a speed, before it runs, as lines
    for a person."""
    rows, first = [["epochs", "images each"]], 0
    for epoch in range(1, plan.epochs + 1):
        if epoch == plan.epochs or _said(plan, epoch) != _said(plan, first):
            rows.append([f"{first + 1} to {epoch}", _said(plan, first)])
            first = epoch
    total = sum(plan.most_images(epoch) for epoch in range(plan.epochs))
    most = "at most " if plan.total_images is None else ""
    rows.append(["all", f"{most}{total:,} ({most}{_share(total, plan)} of a full training)"])
    if images_per_second is not None:
        hours, full = (
            images / images_per_second / 3600 for images in (total, plan.epochs * plan.num_samples)
        )
        rows.append(["hours", f"{most}{hours:,.2f} (full training {full:,.2f})"])
    return "\n".join(table(rows, right=(1,)))


def _said(plan: PruningPlan, epoch: int) -> str:
    num = plan.num_images(epoch)
    return f"at most {plan.num_samples:,}" if num is None else f"{num:,}"


def _share(total: int, plan: PruningPlan) -> str:
    return f"{100 * total / (plan.epochs * plan.num_samples):.1f} %"


def window_of(config: Config) -> Window:
    """Return K and beta of the window that serves the rate, or of the first, over the whole
    training; K as far as it fits where nothing is pruned by this score."""
    try:
        window = config.window_for(config.prune.rate)
    except InputError:
        window = config.windows()[0]
    epochs, K = config.train.epochs, window.K
    if config.prune.method not in BY_SCORE or config.prune.score != "tdds":
        K = min(K, epochs if config.score.preset == "official" else epochs - 1)
    return Window(epochs, K, window.beta)


def _lacks(run: RunDir, config: Config, plan: PruningPlan, found: Checkpoint) -> str:
    """Say what a checkpoint needs of the run directory and does not find."""
    epoch = found.record["epoch"]
    if config.score.trajectory and (problem := lacks_trajectory(run, found)):
        return problem
    if epoch >= plan.epochs:
        return ""
    return record_problem(run.pruning, epoch, found.record["visits"], plan.num_samples)
