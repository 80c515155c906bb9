"""Pruning inside a training: which samples each epoch visits, and with which weight.

An epoch's set is a function of what the scorer holds (`rules`, NumPy only), decided on all ranks
alike and recorded (`schedule`). The training loop asks a `Schedule` for it and knows no method. May
import `coreset`, `training` and below. Start with `plan`, then `rules`.
"""

__all__ = ["plan", "rules", "schedule", "train"]  # that other rooms may import
