"""A coreset in FFCV: the loader of a .beton, with the kept samples only."""

import numpy as np
from ffcv.loader import Loader, OrderOption


def loader_of(beton: str, coreset: str, batch_size: int, **options: object) -> Loader:
    """Each kept sample of the file once per epoch, in random order. `options` are FFCV's: pipelines, num_workers, ..."""
    kept = np.load(coreset)["index"].astype(np.uint64)  # the type of FFCV's own indices
    return Loader(beton, batch_size, indices=kept, order=OrderOption.RANDOM, drop_last=False, **options)
