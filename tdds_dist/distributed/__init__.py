"""Ranks and what they exchange.

Owns the process group, every collective, who owns which global index, the visit order of an epoch,
signals that ask to leave, and host memory that a GPU copies from and to. May import the ground
only. Start with `partition` (index arithmetic, NumPy only), then `world` and `collectives`.
"""

# modules that other rooms may import
__all__ = ["board", "collectives", "host_memory", "interruption", "partition", "world"]
