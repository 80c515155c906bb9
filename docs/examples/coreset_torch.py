"""A coreset in plain PyTorch: what is kept of a dataset, and how much each sample weighs."""

import torch
from torch.utils.data import Dataset, Subset


def coreset_of(dataset: Dataset, file: str) -> tuple[Subset, torch.Tensor]:
    """The kept samples of a dataset in the order in which it was written (that of torchvision's ImageFolder), and
    importance float32 [N] by global index, 0 where removed. `file` is of `tdds export CORESET.npz --format torch-subset`."""
    kept = torch.load(file, weights_only=True)
    assert len(dataset) == kept["num_samples"]
    importance_N = torch.zeros(len(dataset)).index_put((kept["index"],), kept["importance"])
    return Subset(dataset, kept["index"].tolist()), importance_N
