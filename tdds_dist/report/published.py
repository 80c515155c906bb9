"""Top-1 accuracies that the paper prints (arXiv 2311.13613), shown beside our own numbers and
marked as the paper's.

Owns the numbers and the question which of them belong to a dataset; not how they are shown.
"""

import csv
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from tdds_dist.config.scores import _bare, base_key, is_plain

if TYPE_CHECKING:
    from tdds_dist.data.manifest import Manifest

# tables of clean images whose networks were trained on coresets of their own scores
_CLEAN = ("1", "2", "3", "4")


@cache
def paper_rows() -> list[dict[str, str]]:
    """Return every number of the paper's Tables 1 to 10, a row per cell, by the columns of
    paper.csv (top-1 and its standard deviation in percent)."""
    text = (files("tdds_dist.report") / "paper.csv").read_text(encoding="utf-8")
    return [*csv.DictReader(text.splitlines())]


class Cell(NamedTuple):
    """One number of the paper: top-1 and, where it is printed, its standard deviation; percent."""

    top1: float
    std: float | None


@dataclass(frozen=True)
class PublishedTable:
    """The numbers of one network on the clean images of one dataset: Tables 1 to 4."""

    dataset: str
    network: str
    num_images: int
    num_classes: int
    windows: dict[float, tuple[int, int]]  # pruning rate -> (T, K) that the paper used for TDDS

    @cached_property
    def cells(self) -> dict[str, dict[str, dict[float, Cell]]]:
        """Return what is printed by strategy (`E`, `P`; none of the full data), score key and
        pruning rate."""
        found: dict[str, dict[str, dict[float, Cell]]] = {}
        for row in paper_rows():
            if (
                row["table"] in _CLEAN
                and row["dataset"] == self.dataset
                and _bare(row["train_network"]) == _bare(self.network)
            ):
                of_key = found.setdefault(row["strategy"], {}).setdefault(row["method"], {})
                std = float(row["std"]) if row["std"] else None
                of_key[float(row["pruning_rate"])] = Cell(float(row["top1"]), std)
        return found

    @property
    def full_top1(self) -> float:
        """Return the top-1 of the full data, percent."""
        return self.cells[""]["full"][0.0].top1

    def lookup(
        self,
        strategy: str | None,
        score_key: str,
        pruning_rate: float | None,
        importance: str | None = None,
    ) -> float | None:
        """Return the published number of one setting, or None when the paper prints none.

        TDDS was retrained with importance `batch`, the other scores without (where importance is 1,
        it does nothing). A key that names T and K must name those of the paper.
        """
        if pruning_rate == 0:
            return self.full_top1
        if pruning_rate is None or not is_plain(score_key):
            return None
        if base_key(score_key) == "tdds":
            named = {part[0]: int(part[1:]) for part in score_key.split("_") if part[0] in "TK"}
            window = named.get("T"), named.get("K")
            if importance != "batch" or (
                named and window != self.windows.get(round(pruning_rate, 4))
            ):
                return None
        of_key = self.cells.get(strategy or "", {}).get(base_key(score_key), {})
        cell = of_key.get(round(pruning_rate, 4))
        return None if cell is None else cell.top1


def find_table(
    train: str,
    num_classes: int,
    model: str,
    manifest: "Manifest | None" = None,
    num_images: int | None = None,
) -> PublishedTable | None:
    """Return the table of the network on the dataset that the training file or its source is called
    after; None when the paper has none, or where labels or images were changed.

    The numbers of classes and, where known, of training images must agree, so that neither
    `imagenette` nor `imagenet100` nor a part of it passes for ImageNet-1K.
    """
    if manifest is not None and (
        manifest.true_label_N is not None or manifest.corruption is not None
    ):
        return None
    source, num_images = (manifest.source, manifest.num_samples) if manifest else ("", num_images)
    text, network = _bare(f"{train} {source}"), _bare(model)
    for word, table in (
        ("cifar100", CIFAR100),
        ("cifar10", CIFAR10),
        ("imagenet", IMAGENET_RESNET34),
        ("imagenet", IMAGENET_SWIN_T),
    ):
        is_whole = num_images in (None, table.num_images)
        if (
            word in text
            and is_whole
            and num_classes == table.num_classes
            and network == _bare(table.network)
        ):
            return table
    return None


CIFAR10 = PublishedTable(
    "CIFAR-10",
    "ResNet-18",
    50_000,
    10,
    {0.3: (70, 10), 0.5: (90, 10), 0.7: (80, 10), 0.8: (30, 10), 0.9: (10, 5)},
)
CIFAR100 = PublishedTable(
    "CIFAR-100",
    "ResNet-18",
    50_000,
    100,
    {0.3: (90, 10), 0.5: (70, 10), 0.7: (60, 20), 0.8: (20, 10), 0.9: (10, 5)},
)
IMAGENET_RESNET34 = PublishedTable(
    "ImageNet-1K",
    "ResNet-34",
    1_281_167,
    1000,
    {0.3: (20, 10), 0.5: (20, 10), 0.7: (30, 20), 0.8: (30, 20), 0.9: (30, 20)},
)
IMAGENET_SWIN_T = PublishedTable(
    "ImageNet-1K",
    "Swin-T",
    1_281_167,
    1000,
    {0.25: (200, 10), 0.3: (180, 10), 0.4: (150, 10), 0.5: (100, 10)},
)
