"""A coreset in Hugging Face datasets: by row, or by path for a folder of images."""

import os
from pathlib import Path

import numpy as np
from datasets import Dataset, Image


def select(dataset: Dataset, coreset: str) -> Dataset:
    """The kept rows, where the global index is the row number: scores of a training loop of your own on this dataset."""
    return dataset.select(np.load(coreset)["index"])


def select_paths(dataset: Dataset, directory: str, paths: str) -> Dataset:
    """The kept rows of load_dataset("imagefolder", data_dir=directory), whatever its order; `paths` is a file of
    `tdds export CORESET.npz --format paths`."""
    kept = {os.path.realpath(os.path.join(directory, line)) for line in Path(paths).read_text().splitlines()}
    files = dataset.cast_column("image", Image(decode=False))["image"]
    return dataset.select([row for row, file in enumerate(files) if os.path.realpath(file["path"]) in kept])
