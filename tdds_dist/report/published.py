"""Top-1 accuracies that the paper prints (Tables 1 to 10 of arXiv 2311.13613), shown beside our own
numbers and marked as the paper's.

Owns the numbers, what each of them is of, and the question which one belongs to a training; not how
they are shown.
"""

import csv
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from tdds_dist.config.scores import base_key, is_plain
from tdds_dist.text import percent, plus_minus

if TYPE_CHECKING:
    from tdds_dist.data.manifest import Manifest


class Images(NamedTuple):
    """Training images of the paper."""

    dataset: str
    noise: str = ""  # "corrupted images", "wrong labels" or none


class Printed(NamedTuple):
    """One number of the paper and what it is of; empty or None where the paper does not say."""

    table: int
    dataset: str
    score_network: str
    train_network: str
    strategy: str  # E or P
    method: str  # `full`: all data
    pruning_rate: float
    batch_size: int | None  # in retraining
    top1: float  # percent
    std: float | None  # percent

    @property
    def images(self) -> Images:
        """Return what was trained on."""
        return Images(self.dataset, {9: "corrupted images", 10: "wrong labels"}.get(self.table, ""))

    @property
    def text(self) -> str:
        """Write the number, with its standard deviation where the paper has one."""
        return plus_minus(self.top1, self.std)


# a word in the name of the training file or its source -> dataset, training images, classes
DATASETS = {
    "cifar10": ("CIFAR-10", 50_000, 10),
    "cifar100": ("CIFAR-100", 50_000, 100),
    "imagenet": ("ImageNet-1K", 1_281_167, 1000),
}
# our network -> as the paper's tables call it. Of ShuffleNet they name no width, of VGG-16 no batch
# norm.
_NETWORKS = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "swin_t": "swin_t",
    "vgg16_bn": "vgg16",
    "mobilenet_v2": "mobilenet_v2",
    "shufflenet_v2_x1_0": "shufflenet_v2",
}
# of TDDS, by dataset and network: pruning rate -> (T, K)
_WINDOWS = {
    ("CIFAR-10", "resnet18"): {
        0.3: (70, 10),
        0.5: (90, 10),
        0.7: (80, 10),
        0.8: (30, 10),
        0.9: (10, 5),
    },
    ("CIFAR-100", "resnet18"): {
        0.3: (90, 10),
        0.5: (70, 10),
        0.7: (60, 20),
        0.8: (20, 10),
        0.9: (10, 5),
    },
    ("ImageNet-1K", "resnet34"): {0.7: (30, 20), 0.8: (30, 20), 0.9: (30, 20)},
    ("ImageNet-1K", "swin_t"): {0.25: (200, 10), 0.3: (180, 10), 0.4: (150, 10), 0.5: (100, 10)},
}


@cache
def paper_rows() -> tuple[Printed, ...]:
    """Return every number of the paper's Tables 1 to 10, table by table."""
    text = (files("tdds_dist.report") / "paper.csv").read_text(encoding="utf-8")
    rows = [
        Printed(
            int(row["table"]),
            row["dataset"],
            row["score_network"],
            row["train_network"],
            row["strategy"],
            row["method"],
            float(row["pruning_rate"]),
            int(row["batch_size"]) if row["batch_size"] else None,
            float(row["top1"]),
            float(row["std"]) if row["std"] else None,
        )
        for row in csv.DictReader(text.splitlines())
    ]
    return tuple(sorted(rows, key=lambda row: row.table))


def images_of(
    train: str,
    num_classes: int,
    manifest: "Manifest | None" = None,
    num_images: int | None = None,
) -> Images | None:
    """Return the paper's images that the training file or its source is called after; None when the
    paper has none like them.

    The numbers of classes and, where known, of training images must agree, so that neither
    `imagenette` nor `imagenet100` nor a part of it passes for ImageNet-1K; and where the manifest
    knows of noise, it must be the paper's.
    """
    noise = _noise(manifest)
    source, num_images = (manifest.source, manifest.num_samples) if manifest else ("", num_images)
    name = "".join(filter(str.isalnum, f"{train} {source}")).lower()  # cifar10 of CIFAR-10
    for word, (dataset, size, classes) in DATASETS.items():
        if word in name and num_classes == classes and num_images in (None, size):
            return None if noise is None else Images(dataset, noise)
    return None


def _noise(manifest: "Manifest | None") -> str | None:
    """Name the noise of the paper that the images have, "" for none; None for noise of another
    kind or amount: 20 % of the labels, or five kinds of corruption with 4 % of the images each."""
    if manifest is None or (manifest.noisy_N is None and manifest.corruption is None):
        return ""
    kinds = [round(float(kind_N.mean()), 3) for kind_N in manifest.corruption_kinds.values()]
    if manifest.noisy_N is None:
        return "corrupted images" if kinds == [0.04] * 5 else None
    share = round(float(manifest.noisy_N.mean()), 3)
    return "wrong labels" if share == 0.2 and manifest.corruption is None else None


def lookup(
    images: Images | None,
    score_model: Mapping[str, Any],
    train_model: Mapping[str, Any],
    *,
    key: str = "",
    pruning_rate: float | None = 0.0,
    strategy: str | None = None,
    batch_size: int | None = None,
    importance: str | None = None,
) -> Printed | None:
    """Return what the paper prints for a training, from the first table that has it; None where it
    prints nothing.

    `score_model` and `train_model` are sections `model` of configs, of the collection and of the
    training; `key` names score and sampler as `Coreset.method` does. Everything must agree but what
    the paper leaves open: a number without a strategy is for both. TDDS was retrained with
    importance `batch` and the T and K of its pruning rate, the other scores without importance
    (where it is 1 and does nothing). At pruning rate 0 it is the number of the full data.
    """
    networks = [_network(images, model) for model in (score_model, train_model)]
    if images is None or pruning_rate is None or None in networks:
        return None
    rate = round(pruning_rate, 4)
    window = _WINDOWS.get((images.dataset, networks[0] or ""), {}).get(rate)
    method = _method(key, window, importance) if rate else "full"
    for row in paper_rows():
        if (
            (row.images, [row.score_network, row.train_network]) == (images, networks)
            and (row.method, row.pruning_rate) == (method, rate)
            and row.strategy in ("", strategy)
            and row.batch_size in (None, batch_size)
        ):
            return row
    return None


def _network(images: Images | None, model: Mapping[str, Any]) -> str | None:
    """Return the paper's name of a network: on CIFAR of one for small images, else of the usual."""
    is_small = images is not None and images.dataset.startswith("CIFAR")
    fits = bool(model.get("cifar_stem")) == is_small
    return _NETWORKS.get(str(model.get("name"))) if fits else None


def _method(key: str, window: tuple[int, int] | None, importance: str | None) -> str | None:
    """Return the paper's name of a method; None for a variant of it. `window` is the (T, K) that
    the paper has for TDDS, and also for EL2N in place of its inner depth (Table 5)."""
    if base_key(key) != "tdds":
        return base_key(key) if is_plain(key) else None
    plain = key.removesuffix("_el2n")
    named = {part[0]: int(part[1:]) for part in plain.split("_") if part[1:].isdigit()}
    if not is_plain(plain) or importance != "batch":
        return None
    if named and (named.get("T"), named.get("K")) != window:
        return None
    return "tdds" if plain == key else "el2n_outer"


# ---- what stands beside the numbers

_NOTES: tuple[tuple[Callable[[Printed], bool], str], ...] = (
    (
        lambda row: row.table == 3 and row.pruning_rate in (0.8, 0.9),
        "The batch sizes of Table 3 at 80 and 90 % (128 and 64) follow from the rule of section 5.1"
        " and are not stated for ImageNet.",
    ),
    (
        lambda row: (
            row.table == 5 and row.pruning_rate == 0.8 and row.method in ("el2n_outer", "tdds")
        ),
        "Table 5 prints a gain of 1.80 from 58.21 to 63.01, which is 4.80.",
    ),
    (
        lambda row: row.table >= 7 and row.method != "full",
        "Tables 7 to 10 name no strategy, so that their numbers stand beside both.",
    ),
    (
        lambda row: row.table == 7 and row.train_network == "resnet50",
        "The numbers of ResNet-50 in Table 7 are those of ResNet-18 with Strategy-P in Table 2, for"
        " every method that both have.",
    ),
    (
        lambda row: row.train_network in ("vgg16", "shufflenet_v2"),
        "Tables 7 and 8 name VGG-16 and ShuffleNet and no more; beside them stand ours, with batch"
        " norm and of width 1.0.",
    ),
)


def footnotes(shown: Iterable[Printed | None]) -> list[str]:
    """Return where the numbers that are shown are from, and what is odd about them; nothing where
    none is."""
    found = [row for row in shown if row is not None]
    tables = sorted({row.table for row in found})
    if not tables:
        return []
    names = ", ".join(map(str, tables))
    source = f"Published: Table{'s' * (len(tables) > 1)} {names} of arXiv 2311.13613, not ours."
    return [source, *(note for applies, note in _NOTES if any(map(applies, found)))]


class PrintedTable(NamedTuple):
    """A table of the paper, or the part of it that is about one network and strategy."""

    title: str
    columns: list[str]
    lines: dict[str, list[Printed | None]]  # by method


def printed_tables(shown: Iterable[Printed | None]) -> list[PrintedTable]:
    """Return the tables that the numbers shown are from."""
    parts = {row[:4] for row in shown if row is not None}
    found: dict[tuple[Any, ...], list[Printed]] = {}
    for row in paper_rows():
        if row[:4] in parts:
            found.setdefault(row[:4], []).append(row)
    return [_printed_table(rows) for rows in found.values()]


def _printed_table(rows: list[Printed]) -> PrintedTable:
    full = [row.text for row in rows if row.method == "full"]
    rows = [row for row in rows if row.method != "full"]
    at = sorted(
        {(row.pruning_rate, row.batch_size) for row in rows},
        key=lambda column: (column[0], -(column[1] or 0)),
    )
    rates = [rate for rate, _ in at]
    columns = [
        percent(rate) + (f", batch {batch}" if rates.count(rate) > 1 else "") for rate, batch in at
    ]
    lines: dict[str, list[Printed | None]] = {row.method: [None] * len(at) for row in rows}
    for row in rows:
        lines[row.method][at.index((row.pruning_rate, row.batch_size))] = row
    first = rows[0]
    parts = [
        f"Table {first.table}: {first.dataset}",
        f"20 % {first.images.noise}" if first.images.noise else "",
        first.score_network,
        f"trained on {first.train_network}" if first.train_network != first.score_network else "",
        f"Strategy-{first.strategy}" if first.strategy else "",
        f"full data {full[0]}" if full else "",
    ]
    return PrintedTable(", ".join(part for part in parts if part), columns, lines)
