"""Stage `collect`: train on everything once, and leave the scores of every sample behind."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tdds_dist.config.run import Config
from tdds_dist.config.scores import differences_per_window, window_settings
from tdds_dist.console import HEADING, log
from tdds_dist.distributed.collectives import together
from tdds_dist.distributed.interruption import Interruption
from tdds_dist.distributed.world import World
from tdds_dist.runs.artifacts import Fingerprint, Scores
from tdds_dist.runs.checkpoint import Checkpoint
from tdds_dist.runs.directory import RunDir, put_scores
from tdds_dist.runs.entry import Start, entered
from tdds_dist.scoring import quarantine
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.scoring.trajectory import whole_epochs
from tdds_dist.text import size_text
from tdds_dist.training.build import build_scorer, checked_files, on_this_node
from tdds_dist.training.engine import fit
from tdds_dist.training.final_pass import score_weights
from tdds_dist.training.training import Training


def _warn(config: Config, num_samples: int) -> None:
    """Warn of settings that are allowed and rarely meant."""
    for window in config.windows():
        if differences_per_window(window, config.score.preset) == 1:
            log.warning(
                f"K={window.K} leaves one loss difference per window in preset"
                f" {config.score.preset}, so scores of T={window.T} will be 0; raise K"
            )
    if config.train.global_batch_size > num_samples:
        log.warning(
            f"train.global_batch_size={config.train.global_batch_size} is larger than the"
            f" {num_samples} images and repeats some to fill up; lower it"
        )


def collect(
    config: Config,
    world: World,
    *,
    settings: dict[str, Any] | None = None,
    fresh: bool = False,
    force: bool = False,
    interruption: Interruption | None = None,
) -> list[Path]:
    """Run the stage, or go on with it; return the score files: one per window of the config, and
    those of the final pass.

    Every rank calls it. Bad input is found before the first training step and raised on every rank.
    `settings` are added to the record of how the run was started. A run with a checkpoint goes on,
    a finished one is left as it is; `fresh` starts over (`force`: also where there is a run).

    Raises:
        Preempted: `interruption` asked for it; the state is saved.
    """
    run = RunDir(config.run.directory)
    with together(world):
        config.check_collect()
        files, fingerprint, data = checked_files(config, world)
    setting = {"stage": "collect"} | (settings or {}) | data
    refuse = partial(lacks_trajectory, run) if config.score.trajectory else lambda found: ""
    with entered(run, config, setting, world, fresh=fresh, force=force, refuse=refuse) as start:
        if start.result is not None:
            return [run.scores / name for name in start.result["scores"]]
        train_file, val_file = on_this_node(config, files, world, start.pulse)
        training = Training(
            config,
            world,
            run,
            train_file,
            val_file,
            config.train.epochs,
            config.train.global_batch_size,
            interruption=interruption or Interruption(),
        )
        return _collect(training, fingerprint, start)


def observed(training: Training, scorer: ShardedScorer) -> Training:
    """Return the training with a scorer as its observer, as the config asks for it."""
    config = training.config
    stops_early = config.collect.stop_after == "last_window"
    return replace(
        training,
        observer=scorer,
        clean_view=config.score.view == "clean",
        tolerates_nonfinite=config.score.on_nan == "quarantine",
        stops_after=max(window.T for window in config.windows()) if stops_early else None,
    )


def _collect(training: Training, fingerprint: Fingerprint, start: Start) -> list[Path]:
    """Train and score, with the run directory locked."""
    config, world, run, train_file = (
        training.config,
        training.world,
        training.run,
        training.train_file,
    )
    scorer = build_scorer(
        config,
        train_file.num_samples,
        world.device,
        trajectory=run.trajectory if config.score.trajectory else None,
        resume=start.resume is not None,
    )
    if world.is_main:
        log.info(
            f"collect {config.run.name}: {train_file.num_samples} images, {config.data.num_classes}"
            f" classes, {config.model.name}, {config.train.epochs} epochs, {world.world_size}"
            f" rank(s) on {world.device.type}, scorer state {size_text(scorer.state_bytes())} per"
            " rank",
            extra=HEADING,
        )
        _warn(config, train_file.num_samples)
    result = fit(observed(training, scorer), start)

    score_of_window = scorer.gather()
    label_N = scorer.gather_labels().numpy()
    quarantined = scorer.quarantined()
    noted = quarantine.noted(quarantined)
    paths = [run.scores / f"{window.key(config.score.preset)}.npz" for window in score_of_window]
    with together(world):
        if world.is_main:
            start.guard()
            for warning in quarantine.warning(quarantined):
                log.warning(warning)
            of_run = {
                "source": "live",
                "epochs": result["epochs"],
                "seed": config.run.seed,
                "world_size": world.world_size,
            }
            for path, (window, score_N) in zip(paths, score_of_window.items(), strict=True):
                key = window.key(config.score.preset)
                settings = window_settings(window, config.score.preset) | of_run | noted
                put_scores(path, Scores(key, score_N.numpy(), label_N, fingerprint, settings))
    del scorer  # its table is large, and the final pass needs the device
    if config.score.final_pass:
        start.pulse.beat("scoring")
        if result["epochs"] < result["epochs_planned"]:
            log.info(
                f"entropy and moderate are those of the model after {result['epochs']} of "
                f"{result['epochs_planned']} epochs"
            )
        paths += score_weights(config, world, run, train_file, fingerprint, result | noted)
    start.finish({"stage": "collect", "scores": [path.name for path in paths], **result, **noted})
    return paths


def lacks_trajectory(run: RunDir, found: Checkpoint) -> str:
    """Say what a checkpoint needs of the trajectory and does not find."""
    num_epochs, reason = whole_epochs(run.trajectory)
    if num_epochs >= found.record["epoch"]:
        return ""
    return (
        f"the trajectory is whole for {num_epochs} epochs only, not for its {found.record['epoch']}"
        f" ({reason}); restore it, or go on without one by score.trajectory=false"
    )
