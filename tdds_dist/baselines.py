"""Scores that TDDS is compared with. Pure NumPy; by global index, higher = keep."""

import numpy as np


def random(num_samples: int, seed: int) -> np.ndarray:
    """A seeded permutation of 0..N-1 as scores, float32 [N]: every top-M of it is a uniform draw, nested over M."""
    return np.random.default_rng([seed, num_samples]).permutation(num_samples).astype(np.float32)
