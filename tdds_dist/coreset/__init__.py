"""Scores to coresets: samplers, agreement of scores, and exchange with other tools.

Owns which samples are kept and with which importance. May import `scoring` and below, and sees
nothing of `training`. Start with `samplers` (NumPy only), then `select`.
"""

# that other rooms may import
__all__ = ["agreement", "compare", "export", "import_scores", "samplers", "select", "suspects"]
