"""Distributed dataset pruning: train once, get every pruning score of every sample, cut a coreset,
retrain on it.

What a program of yours may use stands in `_MODULES`. Names are loaded on first use, so that
importing the package is free; the scorer needs torch and NumPy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdds_dist.config.scores import Window as Window
    from tdds_dist.coreset.select import choose as choose
    from tdds_dist.coreset.select import make_coreset as make_coreset
    from tdds_dist.distributed.partition import EpochOrder as EpochOrder
    from tdds_dist.distributed.partition import epoch_order as epoch_order
    from tdds_dist.errors import InputError as InputError
    from tdds_dist.pruning.plan import PruningPlan as PruningPlan
    from tdds_dist.pruning.schedule import PruningSchedule as PruningSchedule
    from tdds_dist.runs.artifacts import Coreset as Coreset
    from tdds_dist.runs.artifacts import Scores as Scores
    from tdds_dist.runs.artifacts import load_coreset as load_coreset
    from tdds_dist.runs.artifacts import load_scores as load_scores
    from tdds_dist.runs.checkpoint import Checkpoints as Checkpoints
    from tdds_dist.scoring.offline import score_all as score_all
    from tdds_dist.scoring.scorer import ShardedScorer as ShardedScorer
    from tdds_dist.scoring.trajectory import Trajectory as Trajectory

_MODULES = {
    "Checkpoints": "runs.checkpoint",
    "Coreset": "runs.artifacts",
    "EpochOrder": "distributed.partition",
    "InputError": "errors",
    "PruningPlan": "pruning.plan",
    "PruningSchedule": "pruning.schedule",
    "Scores": "runs.artifacts",
    "ShardedScorer": "scoring.scorer",
    "Trajectory": "scoring.trajectory",
    "Window": "config.scores",
    "choose": "coreset.select",
    "epoch_order": "distributed.partition",
    "load_coreset": "runs.artifacts",
    "load_scores": "runs.artifacts",
    "make_coreset": "coreset.select",
    "score_all": "scoring.offline",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"tdds_dist.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
