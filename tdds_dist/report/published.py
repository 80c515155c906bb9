"""Top-1 accuracies that the paper prints (arXiv 2311.13613), shown beside our own numbers and
marked as the paper's.

Owns the numbers and the question which of them belong to a dataset; not how they are shown.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tdds_dist.config.scores import _bare, base_key, is_plain

if TYPE_CHECKING:
    from tdds_dist.data.manifest import Manifest


@dataclass(frozen=True)
class PublishedTable:
    """One table: top-1 in percent by strategy, score key and pruning rate."""

    dataset: str
    network: str
    num_images: int
    num_classes: int
    full_top1: float
    windows: dict[float, tuple[int, int]]  # pruning rate -> (T, K) that the paper used for TDDS
    # strategy "E" | "P" -> score key -> pruning rate -> top-1
    top1: dict[str, dict[str, dict[float, float]]]

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
        return (
            self.top1.get(strategy or "", {})
            .get(base_key(score_key), {})
            .get(round(pruning_rate, 4))
        )


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


def _by_rate(rates: tuple[float, ...], **rows: str) -> dict[str, dict[float, float]]:
    return {
        key: dict(zip(rates, map(float, row.split()), strict=True)) for key, row in rows.items()
    }


IMAGENET_RESNET34 = PublishedTable(
    "ImageNet-1K",
    "ResNet-34",
    1_281_167,
    1000,
    73.54,
    {0.3: (20, 10), 0.5: (20, 10), 0.7: (30, 20), 0.8: (30, 20), 0.9: (30, 20)},
    {
        "E": _by_rate(
            (0.7, 0.8, 0.9),
            tdds="64.69 62.56 53.91",
            random="64.19 60.76 52.63",
            entropy="62.34 56.80 43.39",
            forgetting="64.29 62.01 52.14",
            el2n="46.92 32.68 15.90",
            aum="39.34 23.64 11.70",
            moderate="64.04 61.35 52.45",
        ),
    },
)

IMAGENET_SWIN_T = PublishedTable(
    "ImageNet-1K",
    "Swin-T",
    1_281_167,
    1000,
    79.58,
    {0.25: (200, 10), 0.3: (180, 10), 0.4: (150, 10), 0.5: (100, 10)},
    {
        "E": _by_rate(
            (0.25, 0.3, 0.4, 0.5),
            tdds="79.76 79.57 79.09 78.33",
            random="77.82 77.18 75.93 74.54",
            forgetting="78.70 78.27 77.55 74.32",
            moderate="77.74 77.06 75.94 74.98",
            dyn_unc="79.54 79.14 78.49 77.64",
        ),
    },
)

CIFAR10 = PublishedTable(
    "CIFAR-10",
    "ResNet-18",
    50_000,
    10,
    95.23,
    {0.3: (70, 10), 0.5: (90, 10), 0.7: (80, 10), 0.8: (30, 10), 0.9: (10, 5)},
    {
        "E": _by_rate(
            (0.3, 0.5, 0.7, 0.8, 0.9),
            tdds="95.47 95.21 93.03 91.30 85.46",
            random="94.58 93.38 90.61 88.87 83.77",
            entropy="94.45 91.90 86.24 83.49 72.06",
            forgetting="95.45 95.05 89.14 76.18 45.87",
            el2n="95.43 95.06 86.69 68.64 31.89",
            aum="95.44 95.19 91.19 69.60 34.74",
            moderate="93.96 92.34 89.71 87.75 83.61",
            dyn_unc="95.08 94.03 89.40 79.76 37.12",
        ),
        "P": _by_rate(
            (0.3, 0.5, 0.7),
            tdds="95.50 95.66 93.92",
            random="94.33 93.40 90.94",
            ccs="95.40 95.04 93.00",
        ),
    },
)

CIFAR100 = PublishedTable(
    "CIFAR-100",
    "ResNet-18",
    50_000,
    100,
    78.21,
    {0.3: (90, 10), 0.5: (70, 10), 0.7: (60, 20), 0.8: (20, 10), 0.9: (10, 5)},
    {
        "E": _by_rate(
            (0.3, 0.5, 0.7, 0.8, 0.9),
            tdds="77.56 74.04 67.78 63.01 54.51",
            random="75.53 71.95 64.59 57.79 46.68",
            entropy="72.39 64.44 50.73 42.86 29.56",
            forgetting="77.38 70.76 49.92 38.42 25.82",
            el2n="76.89 67.57 36.45 17.31 9.10",
            aum="77.35 68.17 31.69 18.43 9.29",
            moderate="74.60 70.29 62.81 56.52 41.82",
            dyn_unc="73.36 65.90 50.16 39.19 15.20",
        ),
        "P": _by_rate(
            (0.3, 0.5, 0.7),
            tdds="77.95 74.98 69.46",
            random="74.59 71.07 65.30",
            ccs="77.14 74.45 68.92",
        ),
    },
)
