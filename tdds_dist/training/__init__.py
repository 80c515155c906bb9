"""The DDP training loop and the stages that run it: collect, retrain, and the final pass over the
images.

Owns the network, optimizer, schedule and epoch loop. The loop (`engine`) sees an `Observer` and
knows nothing of scores. May import `scoring` and below, and sees nothing of `coreset`. Start with
`engine`, then `collect`.
"""

__all__ = [
    "build",
    "collect",
    "engine",
    "feed",
    "final_pass",
    "metrics",
    "retrain",
    "schedule",
    "state",
    "training",
]  # that other rooms may import
