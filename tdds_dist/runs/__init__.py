"""One run directory: which files lie where, who may write there, and what a stopped run goes on
from.

Owns `RunDir`, the formats of scores and coresets, the lock, checkpoints, status, and which settings
decide a result (`identity`). May import `config`, `distributed` and the ground. Start with
`directory`, then `entry`: how a stage enters one.
"""

# that other rooms may import
__all__ = ["artifacts", "checkpoint", "directory", "entry", "identity", "lock", "status"]
