"""How long, how fast, how much at once: learning rate by step, epochs of Strategy-E and -P, batch size by pruning rate."""

import math
from collections.abc import Mapping

STRATEGIES = ("E", "P")


def learning_rate(step: int, total_steps: int, peak: float, *, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then a cosine from `peak` to `final`.

    Without warm-up this is torch's CosineAnnealingLR stepped once per batch, as the authors train.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def retrain_epochs(epochs: int, pruning_rate: float, strategy: str) -> int:
    """Epochs on a coreset: Strategy-E keeps those of the full data, Strategy-P as many images seen (epochs / (1 - p))."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    return epochs if strategy == "E" else round(epochs / (1.0 - pruning_rate))


def batch_size_factor(pruning_rate: float, rule: Mapping[float, float]) -> float:
    """Factor on the batch size: that of the largest rate in `rule` not above `pruning_rate`, 1 below all of them.

    The paper halves the batch at p = 0.8 and quarters it at p = 0.9.
    """
    reached = [rate for rate in rule if rate <= pruning_rate + 1e-9]
    return rule[max(reached)] if reached else 1.0
