"""The text of a dataset card: what a folder of exported scores and index lists holds, for people
who find it on a hub."""

from collections.abc import Mapping
from typing import Any

from tdds_dist.data.manifest import Manifest
from tdds_dist.runs.artifacts import Coreset, Fingerprint
from tdds_dist.text import markdown_table

_NUM_NAMED = 10  # classes that are named
_PLACES = ("file", "draw_seed")  # settings that say nothing to others


def card_text(
    name: str,
    table: str,
    found: Fingerprint,
    manifest: Manifest | None,
    settings: Mapping[str, Mapping[str, Any]],
    coresets: Mapping[str, Coreset],
) -> str:
    """Return the README.md of a folder with `table` (Parquet, one row per sample) and
    `indices/<coreset>.txt` for each of `coresets`.

    settings: of each score, by name. The front matter is that of dataset cards of the Hugging Face
    hub; what only the publisher knows (licence, home page) is left to them.
    """
    parts = [
        f"---\npretty_name: Scores and coresets of {name}\ntags: [dataset-pruning, coreset]\n"
        f"configs:\n- config_name: default\n  data_files: {table}\n---",
        f"# Scores and coresets of {name}",
        "Which samples of a dataset matter for training: a score per sample, and the samples that"
        " are kept at each pruning rate. Made with tdds_dist. The images are not here.",
        "## Dataset",
        markdown_table(_dataset_rows(found, manifest)),
        "The rows of the table, and the indices, are in the order of the dataset as it was written:"
        " for folders of images that of `torchvision.datasets.ImageFolder`.",
    ]
    if settings:
        rows = [["score", "settings"], *([key, _words(given)] for key, given in settings.items())]
        parts += ["## Scores", markdown_table(rows), "Higher means keep."]
    if coresets:
        rows = [["indices", "method", "pruned", "kept"]]
        rows += [
            [
                f"`indices/{file}.txt`",
                coreset.method,
                f"{100 * coreset.pruning_rate:g} %",
                f"{len(coreset.index_M):,}",
            ]
            for file, coreset in coresets.items()
        ]
        parts += ["## Coresets", markdown_table(rows)]
    parts += ["## How to load it", _example(table, next(iter(coresets), None))]
    parts += [
        "## Citation",
        'TDDS: Zhang et al., "Spanning Training Progress: Temporal Dual-Depth Scoring (TDDS) for'
        ' Enhanced Dataset Pruning", CVPR 2024, arXiv 2311.13613. Other scores: see the'
        " documentation of tdds_dist.",
    ]
    return "\n\n".join(parts) + "\n"


def _dataset_rows(found: Fingerprint, manifest: Manifest | None) -> list[list[str]]:
    rows = [
        ["property", "value"],
        ["samples", f"{found.num_samples:,}"],
        ["classes", f"{found.num_classes:,}"],
    ]
    if manifest is not None:
        names = manifest.class_names
        more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
        rows += [["class names", ", ".join(names[:_NUM_NAMED]) + more], ["split", manifest.split]]
    return [*rows, ["SHA-256 of the labels", f"`{found.labels_sha256 or 'unknown'}`"]]


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items() if key not in _PLACES)


def _example(table: str, coreset: str | None) -> str:
    lines = ["from pyarrow import parquet", f'samples = parquet.read_table("{table}")']
    if coreset is not None:
        lines += [
            "",
            "import numpy as np",
            "from torch.utils.data import Subset",
            f'index = np.loadtxt("indices/{coreset}.txt", dtype=np.int64)',
            "kept = Subset(dataset, index)  # of the dataset in the order of the table",
        ]
    return "\n".join(["```python", *lines, "```"])
