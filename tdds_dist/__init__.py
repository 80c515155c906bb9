"""Distributed dataset pruning: train once, get the TDDS score of every sample, cut a coreset, retrain on it.

The scorer alone needs torch and NumPy only; names are loaded on first use so that importing the package is free.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdds_dist.checkpoint import Checkpoints
    from tdds_dist.scorer import ShardedScorer
    from tdds_dist.tdds import Window

__all__ = ["Checkpoints", "ShardedScorer", "Window"]


def __getattr__(name: str) -> object:
    if name == "Checkpoints":
        from tdds_dist.checkpoint import Checkpoints

        return Checkpoints
    if name == "ShardedScorer":
        from tdds_dist.scorer import ShardedScorer

        return ShardedScorer
    if name == "Window":
        from tdds_dist.tdds import Window

        return Window
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
