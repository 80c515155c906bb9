"""The central idea: logits of every step become a trajectory and the scores of every sample,
exactly, on sharded state.

Each rank owns a block of global indices (a shard) and keeps one row of log-probabilities per sample
of it. Rows travel to their owner (`scorer`), are compared with those of the epoch before (`shard`,
Eq. 10), and windows and averages advance (`tdds`, Eq. 11 and 12). May import `data`, `runs`,
`config`, `distributed` and the ground. Start with `tdds`, then `scorer`.
"""

__all__ = [
    "baselines",
    "kernel_check",
    "official_outputs",
    "offline",
    "quarantine",
    "sample_stats",
    "scorer",
    "shard",
    "shard_triton",
    "tdds",
    "trajectory",
    "trajectory_table",
]  # that other rooms may import
