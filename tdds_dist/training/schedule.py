"""Schedules: learning rate by step, epochs of Strategy-E and -P, batch size by pruning rate, image
size by epoch."""

import math
from collections.abc import Mapping

from tdds_dist.config.run import Config
from tdds_dist.errors import InputError

STRATEGIES = ("E", "P")


def learning_rate(
    step: float, total_steps: int, peak: float, *, warmup_steps: int = 0, final: float = 0.0
) -> float:
    """Return the learning rate of optimizer step `step` (from 0): linear warm-up, then a cosine
    from `peak` to `final`.

    Without warm-up this is torch's CosineAnnealingLR stepped once per batch, as the authors train.
    """
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)  # step: between two of them by images
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def retrain_epochs(epochs: int, pruning_rate: float, strategy: str) -> int:
    """Return the epochs on a coreset: Strategy-E keeps those of the full data, Strategy-P as many
    images seen (epochs / (1 - p))."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    return epochs if strategy == "E" else round(epochs / (1.0 - pruning_rate))


def batch_size_factor(pruning_rate: float, rule: Mapping[float, float]) -> float:
    """Return the factor on the batch size: that of the largest rate in `rule` not above
    `pruning_rate`, 1 below all of them.

    The paper halves the batch at p = 0.8 and quarters it at p = 0.9.
    """
    reached = [rate for rate in rule if rate <= pruning_rate + 1e-9]
    return rule[max(reached)] if reached else 1.0


def per_rank_batch(
    global_batch_size: int, world_size: int, accumulation: int = 1, factor: float = 1.0
) -> int:
    """Return the rows per rank and forward pass of a global batch of `global_batch_size * factor`.

    Raises InputError when it cannot be dealt out evenly, naming the nearest values of
    train.global_batch_size that can.
    """
    parts = world_size * accumulation

    def fits(size: int) -> bool:
        batch = size * factor
        return batch >= parts and abs(batch - round(batch)) < 1e-9 and round(batch) % parts == 0

    if fits(global_batch_size):
        return round(global_batch_size * factor) // parts
    end = 2 * global_batch_size + math.ceil(parts / factor) * 100
    below = next(filter(fits, range(global_batch_size - 1, 0, -1)), None)
    above = next(filter(fits, range(global_batch_size + 1, end)), None)
    nearest = " or ".join(str(size) for size in (below, above) if size is not None)
    divisor = f"world_size={world_size}" + (
        f" x train.accumulation={accumulation}" if accumulation > 1 else ""
    )
    scaled = f" x {factor:g} (retrain.batch_size_rule)" if factor != 1 else ""
    rows = round(global_batch_size * factor)
    sizes = [
        size
        for size in range(1, 2 * world_size + 1)
        if rows >= size * accumulation and rows % (size * accumulation) == 0
    ]
    ranks = (
        f", or start {' or '.join(str(size) for size in sizes)} ranks (a run that goes on keeps its"
        " batch)"
        if sizes
        else ""
    )
    raise InputError(
        f"train.global_batch_size={global_batch_size}{scaled} is not divisible by {divisor}; use"
        f" {nearest}{ranks}"
    )


def training_size(config: Config, epoch: int, epochs: int) -> int:
    """Return the side of the training images in `epoch` (from 0) of `epochs`, pixels:
    libffcv/ffcv-imagenet's `get_resolution`.

    Where `epochs` is not train.epochs (a coreset's), its first epoch stands for the first, its last
    for the last, and those in between lie evenly.
    """
    final, sizes = config.data.image_size, config.data.progressive
    if sizes is None:
        return final
    at = epoch * (config.train.epochs - 1) / (epochs - 1) if epochs > 1 else config.train.epochs - 1
    if at <= sizes.from_epoch:
        return sizes.start_size
    if at >= sizes.to_epoch:
        return final
    exact = sizes.start_size + (final - sizes.start_size) * (at - sizes.from_epoch) / (
        sizes.to_epoch - sizes.from_epoch
    )
    return min(max(round(exact / sizes.multiple) * sizes.multiple, sizes.start_size), final)


def training_sizes(config: Config) -> list[int]:
    """Return all that `training_size` may give, for any number of epochs; ascending."""
    final, sizes = config.data.image_size, config.data.progressive
    if sizes is None:
        return [final]
    between = range(-(-sizes.start_size // sizes.multiple) * sizes.multiple, final, sizes.multiple)
    return sorted({sizes.start_size, *between, final})
