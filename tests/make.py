"""Made-up files of every kind that the program writes, for tests that read them; no training behind
any of them.

What is not given is the same in every call: 60 images of 4 classes, three epochs, a window of
three. `finished` in conftest.py is a run that really took place.
"""

import csv
import dataclasses
import html
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tdds_dist.coreset.select import check_place, plan_coreset, put
from tdds_dist.data.beton import HEADER, VERSION
from tdds_dist.data.manifest import Manifest, manifest_path, read_manifest, write_manifest
from tdds_dist.data.sources import open_source, with_corruption, with_label_noise
from tdds_dist.data.writer import write_beton
from tdds_dist.errors import InputError
from tdds_dist.report import charts
from tdds_dist.report.page import build_report
from tdds_dist.runs.artifacts import Coreset, Scores, fingerprint, save_coreset, save_scores
from tdds_dist.runs.directory import RunDir, environment

NUM_IMAGES, NUM_CLASSES = 60, 4
TDDS, SHORT = "tdds_official_T3_K2_beta0.9", "tdds_official_T2_K2_beta0.9"
EVIL_CLASS, EVIL_PATH = (
    '</script><script>alert("class")</script>',
    'a/"><img src=x onerror=alert(1)>.png',
)
ENVIRONMENT = cache(environment)


# ---- programs


def hook(folder: Path, text: str) -> str:
    """Make a folder from which Python runs this text when it starts, after tests/site; return the line
    of bash that puts it before all others."""
    folder.mkdir()
    site = Path(__file__).parent / "site" / "sitecustomize.py"
    (folder / "sitecustomize.py").write_text(f"{site.read_text()}\n\n{text}")
    return f"export PYTHONPATH={folder}${{PYTHONPATH:+:$PYTHONPATH}}"


# ---- coresets


def select(
    source: Path, pruning_rate: float, *, force: bool = False, **options: Any
) -> tuple[Path, list[str]]:
    """Choose a coreset and save it, as `tdds select` does; returns the file and warnings."""
    path, coreset, warnings = plan_coreset(source, pruning_rate, **options)
    check_place(path, coreset, force)
    return path, [*warnings, *put(path, coreset)]


# ---- runs


def config(**changes: dict[str, Any]) -> dict[str, Any]:
    """Return a valid config; `changes` holds keys by section."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "seed": 0},
        "model": {"name": "resnet18"},
        "data": {
            "train": "gone.beton",
            "val": "val.beton",
            "num_classes": NUM_CLASSES,
            "image_size": 32,
            "crop": "pad",
            "mean": [1.0, 1.0, 1.0],
            "std": [1.0, 1.0, 1.0],
        },
        "train": {"epochs": 3, "global_batch_size": 20, "lr": 0.1},
        "score": {"windows": [{"T": 3, "K": 2}]},
    }
    return {section: tree.get(section, {}) | changes.get(section, {}) for section in tree | changes}


def start(
    path: Path,
    train: Path | str = "gone.beton",
    /,
    num_classes: int = NUM_CLASSES,
    stage: dict[str, Any] | None = None,
    **changes: dict[str, Any],
) -> RunDir:
    """Write what a run writes before its first epoch; `stage` is its stage with the stage's
    settings, as in env.json."""
    run, data = RunDir(path), {"train": str(train), "num_classes": num_classes}
    changes["run"] = {"name": path.name, "dir": str(path)} | changes.get("run", {})
    run.write_start(
        config(**changes | {"data": data | changes.get("data", {})}),
        (stage or {"stage": "collect"}) | ENVIRONMENT(2, "cpu"),
    )
    return run


def log(run: RunDir, num_epochs: int = 3, val: bool = True) -> None:
    """Write the metrics of epochs; the first is a slow one."""
    for epoch in range(num_epochs):
        run.append_metrics(
            {
                "epoch": epoch,
                "step": 3 * epoch + 3,
                "lr": 0.1,
                "train_loss": 2.0 / (epoch + 1),
                "train_top1": 50.0,
                "val_loss": 1.0 if val else None,
                "val_top1": 60.0 + epoch if val else None,
                "val_top5": None,
                "images_per_second": 100.0 if epoch == 0 else 4321.0,
                "epoch_seconds": 1.5,
                "scoring_share": 0.0125,
                "memory_bytes": None,
            }
        )


def finish(run: RunDir, num_images: int = NUM_IMAGES, final: float = 90.0, **more: Any) -> None:
    """Write the result of a collection."""
    run.write_result(
        {
            "stage": "collect",
            "num_images": num_images,
            "epochs": 3,
            "epochs_planned": 3,
            "final_top1": final,
            "final_top5": 99.0,
            "best_top1": final + 1,
            "best_epoch": 1,
            "train_seconds": 75.0,
            **more,
        }
    )


def retraining(
    run: RunDir,
    score_key: str,
    rate: float,
    seed: int,
    final: float | None,
    strategy: str = "E",
    importance: str = "none",
    name: str | None = None,
    class_balanced: bool = False,
    **changes: Any,
) -> RunDir:
    """Write a retraining; `final=None` leaves it unfinished after one epoch, its log cut in the
    middle of a line. `changes` are those of its config."""
    method = score_key + ("_balanced" if class_balanced else "")
    asked = {
        "strategy": strategy,
        "importance": importance,
        "score_key": score_key,
        "method": method,
        "pruning_rate": rate,
    }
    sub = start(
        run.retrain / (name or f"{score_key}_p{rate:g}_{strategy}_{importance}_seed{seed}"),
        "train.beton",
        stage={"stage": "retrain", **asked},
        **changes,
    )
    log(sub, 1 if final is None else 3)
    if final is None:
        with sub.metrics_file.open("a") as file:
            file.write('{"epoch": 1, "train_lo')
    else:
        finish(
            sub,
            round((1 - rate) * NUM_IMAGES),
            final,
            stage="retrain",
            **asked,
            best_top1=final + 0.5,
            seed=seed,
            train_seconds=12.0,
        )
    return sub


# ---- scores and coresets


def scores(
    key: str,
    score_N: np.ndarray,
    label_N: np.ndarray,
    num_classes: int = NUM_CLASSES,
    settings: dict[str, Any] | None = None,
    **extra: np.ndarray,
) -> Scores:
    """Return scores of these labels."""
    found = fingerprint(label_N, num_classes)
    return Scores(
        key,
        score_N.astype(np.float32),
        label_N,
        found,
        settings or {"score": key.split("_")[0]},
        extra,
    )


def save(folder: Path, *found: Scores) -> None:
    """Write each of the scores under its key."""
    for each in found:
        save_scores(folder / f"{each.key}.npz", each)


def coreset(
    key: str, rate: float, index_M: np.ndarray, label_N: np.ndarray, num_classes: int = NUM_CLASSES
) -> Coreset:
    """Return a coreset of these samples, all of importance 1."""
    return Coreset(
        index_M,
        np.ones(len(index_M), np.float32),
        key,
        rate,
        fingerprint(label_N, num_classes),
        {"class_balanced": False},
    )


def add_scores(
    run: RunDir,
    key: str,
    label_N: np.ndarray,
    rates: tuple[float, ...] = (),
    score_N: np.ndarray | None = None,
    num_classes: int = NUM_CLASSES,
) -> np.ndarray:
    """Write scores 0, 1/N, 2/N ... by index unless given, and the top of them as coresets."""
    score_N = (
        np.arange(len(label_N), dtype=np.float32) / len(label_N) if score_N is None else score_N
    )
    settings = {"preset": "official", "T": 3, "K": 2}
    save(run.scores, scores(key, score_N, label_N, num_classes, settings))
    for rate in rates:
        index_M = np.sort(
            np.argsort(-score_N, kind="stable")[: len(label_N) - round(rate * len(label_N))]
        )
        save_coreset(
            run.coresets / f"{key}_p{rate:g}.npz", coreset(key, rate, index_M, label_N, num_classes)
        )
    return score_N


# ---- datasets


def write_images(path: Path, side: int = 16, label_noise: float = 0, corrupt: float = 0) -> Path:
    """Write a .beton of random images; the names of the first class and the first image are
    markup."""
    source = open_source(f"synthetic:{NUM_IMAGES},{NUM_CLASSES},{side}")
    source = dataclasses.replace(
        source,
        class_names=[EVIL_CLASS, *source.class_names[1:]],
        path=[EVIL_PATH, *source.path[1:]],
    )
    write_beton(
        with_corruption(with_label_noise(source, label_noise, 0), corrupt, 0),
        path,
        num_workers=1,
        progress=False,
    )
    return path


def write_several_fields(path: Path, num_images: int = 48) -> Path:
    """Write a `.beton` by FFCV's own writer: image i is grey 5 i in `large` and black in `small`;
    its label is i % 2 in `fine`, and i in `row`."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Samples:
        def __len__(self) -> int:
            return num_images

        def __getitem__(self, i: int) -> tuple[object, ...]:
            black = np.zeros((8, 8, 3), np.uint8)
            return i, black, i % 2, np.full((32, 32, 3), 5 * i, np.uint8)

    fields = {"row": IntField(), "small": RGBImageField("raw")}
    fields |= {"fine": IntField(), "large": RGBImageField("raw")}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Samples())
    return path


def manifest_of(path: Path) -> Manifest:
    """Return the manifest of a .beton that has one."""
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest


def write_header(
    path: Path,
    /,
    label_N: np.ndarray,
    num_classes: int = NUM_CLASSES,
    true_label_N: np.ndarray | None = None,
    corruption: list[str] | None = None,
    source: str = "synthetic",
    **changes: Any,
) -> Manifest:
    """Write the header of a .beton and its manifest, which is all that looking needs; no image."""
    num = len(label_N)
    head = np.zeros(1, HEADER)
    head["version"], head["num_samples"] = VERSION, num
    head.tofile(path)
    manifest = Manifest(
        source,
        "train",
        num,
        num_classes,
        [f"class {number}" for number in range(num_classes)],
        [f"{number}.png" for number in range(num)],
        label_N,
        path.stat().st_size,
        fingerprint(label_N, num_classes).labels_sha256,
        {},
        (32, 32),
        true_label_N,
        corruption,
    )
    manifest = dataclasses.replace(manifest, **changes)
    write_manifest(manifest_path(path), manifest)
    return manifest


def table(text: str) -> list[tuple[str, ...]]:
    """Return rows to parametrize with: one a line of the text, with `->` between its cells."""
    return [tuple(cell.strip() for cell in line.split("->")) for line in text.strip().splitlines()]


# ---- reading back


def refused(message: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Check that a call ends in an InputError that says this; `message` is a pattern."""
    with pytest.raises(InputError, match=message):
        call(*arguments, **options)


def page_of(runs: list[RunDir], out: Path, **options: Any) -> "Page":
    """Return the page about runs. Charts keep their texts for the blind, but are not drawn, which
    takes most of the time."""

    def undrawn(draw: object, alt: str, *_: object, **__: object) -> str:
        return f'<svg role="img" aria-label="{html.escape(alt)}"></svg>'

    with mock.patch.object(charts, "_render", undrawn):
        return Page(build_report(runs, out, **options))


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by column."""
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


class Page(HTMLParser):
    """Tags with their attributes, and the cells of every table, of one page."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, start: str, number: int = 0) -> list[str]:
        """Return the cells of a row, by default the first, whose first cell starts with `start`."""
        rows = ([" ".join(cell.split()) for cell in row] for row in self.rows)
        return [row for row in rows if row and row[0].startswith(start)][number]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def check_references(self) -> None:
        """No id stands twice, and what refers to one finds it."""
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        named = {
            (attrs.get(name) or "#").removeprefix("#")
            for _, attrs in self.tags
            for name in ("href", "aria-labelledby")
        }
        assert len(ids) == len(set(ids))
        assert {target for target in named if target and not target.startswith("data:")} <= set(ids)
