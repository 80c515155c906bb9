"""Stage `retrain`: train on a coreset, weighted by importance, for as long as the strategy says."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.run import Config
from tdds_dist.console import HEADING, log
from tdds_dist.distributed.collectives import together
from tdds_dist.distributed.interruption import Interruption
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Coreset, load_coreset, require_same_dataset
from tdds_dist.runs.directory import RunDir, retrain_name
from tdds_dist.runs.entry import entered
from tdds_dist.training.build import checked_files, on_this_node
from tdds_dist.training.engine import fit
from tdds_dist.training.schedule import batch_size_factor, per_rank_batch, retrain_epochs
from tdds_dist.training.training import Training


def retrain(
    config: Config,
    world: World,
    coreset_file: Path,
    strategy: str,
    *,
    importance: str | None = None,
    name: str | None = None,
    settings: dict[str, Any] | None = None,
    fresh: bool = False,
    force: bool = False,
    interruption: Interruption | None = None,
) -> RunDir:
    """Run the stage, or go on with it; return its run directory, `<run.dir>/retrain/<name>`.

    Every rank calls it. `importance` defaults to the config's; `name` is the coreset file's with
    strategy, importance and seed by default. `settings` are added to the record of how the run was
    started and of what came out. A run with a checkpoint goes on, a finished one is left as it is;
    `fresh` starts over (`force`: also where there is a run).

    Raises:
        Preempted: `interruption` asked for it; the state is saved.
    """
    importance = importance or config.retrain.importance
    with together(world):
        coreset = load_coreset(Path(coreset_file))
        _check_importance(coreset, importance, coreset_file)
        run, resolved, setting = resolve(
            config, coreset, coreset_file, strategy, importance, name, world.world_size
        )
        files, fingerprint, data = checked_files(resolved, world)
        require_same_dataset(coreset.fingerprint, fingerprint, str(coreset_file))
    setting |= settings or {}
    with entered(run, resolved, setting | data, world, fresh=fresh, force=force) as start:
        if start.result is not None:
            return run
        train_file, val_file = on_this_node(config, files, world, start.pulse)
        importance_N = np.zeros(train_file.num_samples, dtype=np.float32)
        importance_N[coreset.index_M] = coreset.importance_M
        training = Training(
            config,
            world,
            run,
            train_file,
            val_file,
            resolved.train.epochs,
            resolved.train.global_batch_size,
            subset_M=coreset.index_M,
            importance_N=importance_N,
            importance=importance,
            interruption=interruption or Interruption(),
        )
        if world.is_main:
            _announce(training, coreset, strategy)
        start.finish(setting | fit(training, start))
    return run


def resolve(
    config: Config,
    coreset: Coreset,
    coreset_file: Path,
    strategy: str,
    importance: str,
    name: str | None = None,
    world_size: int = 1,
) -> tuple[RunDir, Config, dict[str, Any]]:
    """Return the directory of a retraining, its config with the epochs of the strategy and the
    batch of the pruning rate, and what else decides its result. Raise InputError when the ranks
    cannot share the batch, or the name is not a folder's."""
    rate = coreset.pruning_rate
    factor = batch_size_factor(rate, config.retrain.batch_size_rule)
    rows = per_rank_batch(
        config.train.global_batch_size, world_size, config.train.accumulation, factor
    )
    epochs = retrain_epochs(config.retrain.epochs or config.train.epochs, rate, strategy)
    name = name or retrain_name(Path(coreset_file), strategy, importance, config.run.seed)
    run = RunDir(config.run.directory).retrain_run(name)
    setting = {
        "stage": "retrain",
        "strategy": strategy,
        "importance": importance,
        "score_key": coreset.score_key,
        "pruning_rate": rate,
        "coreset": str(coreset_file),
        "coreset_settings": coreset.settings,
        # of the parts that decide a retraining
        "coreset_sha256": hashlib.sha256(
            coreset.index_M.tobytes() + coreset.importance_M.tobytes()
        ).hexdigest(),
        "method": coreset.method,
        "model": config.model.name,
    }
    changes = {"epochs": epochs, "global_batch_size": rows * world_size * config.train.accumulation}
    resolved = config.changed("train", **changes).changed("run", dir=str(run.path))
    return run, resolved, setting


def _announce(training: Training, coreset: Coreset, strategy: str) -> None:
    """Announce the training, and warn of what may surprise about it."""
    config, num, num_all = training.config, training.num_samples, training.train_file.num_samples
    base = f"train.epochs={config.train.epochs}"
    if config.retrain.epochs:
        base = f"retrain.epochs={config.retrain.epochs}"
    is_full = config.retrain.schedule_of == "full"
    log.info(
        f"retrain {training.run.path.name}: {num} of {num_all} images, {training.epochs} epochs"
        f" (Strategy-{strategy} of {base}), batch {training.global_batch_size}, importance"
        f" {training.importance}, {training.world.world_size} rank(s)"
        + (f", learning rate as for all {num_all} images" if is_full else ""),
        extra=HEADING,
    )
    mean = float(coreset.importance_M.mean())
    if training.importance != "none" and mean > 2.0:
        log.warning(
            f"importances average {mean:.1f}, and the loss grows with them; lower train.lr, retrain"
            " with --importance none, or select by a score of preset official"
        )
    if training.global_batch_size > num:
        log.warning(
            f"a batch of {training.global_batch_size} is larger than the {num} images and repeats"
            " some to fill up; lower train.global_batch_size"
        )


def _check_importance(coreset: Coreset, importance: str, path: Path) -> None:
    if importance == "none":
        return
    values = coreset.importance_M
    if not np.isfinite(values).all() or values.min() < 0 or values.max() <= 0:
        raise InputError(
            f"{path}: importance must be finite, not negative, and somewhere positive; "
            "retrain with --importance none or select again"
        )
