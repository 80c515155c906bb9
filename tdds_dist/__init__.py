"""Distributed dataset pruning: train once, get every pruning score of every sample, cut a coreset,
retrain on it.

What a program of yours may use stands in `__all__`. Names are loaded on first use, so that
importing the package is free; the scorer needs torch and NumPy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdds_dist.config.scores import Window
    from tdds_dist.coreset.select import choose, make_coreset
    from tdds_dist.distributed.partition import EpochOrder, epoch_order
    from tdds_dist.errors import InputError
    from tdds_dist.pruning.plan import PruningPlan
    from tdds_dist.pruning.schedule import PruningSchedule
    from tdds_dist.runs.artifacts import Coreset, Scores, load_coreset, load_scores
    from tdds_dist.runs.checkpoint import Checkpoints
    from tdds_dist.scoring.offline import score_all
    from tdds_dist.scoring.scorer import ShardedScorer
    from tdds_dist.scoring.trajectory import Trajectory

__all__ = [
    "Checkpoints",
    "Coreset",
    "EpochOrder",
    "InputError",
    "PruningPlan",
    "PruningSchedule",
    "Scores",
    "ShardedScorer",
    "Trajectory",
    "Window",
    "choose",
    "epoch_order",
    "load_coreset",
    "load_scores",
    "make_coreset",
    "score_all",
]
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


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"tdds_dist.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
