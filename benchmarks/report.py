"""Size of the report and time to write and open it, for a run of ImageNet's size whose pictures do
not compress.

The run directory is made up: scores of the usual shapes, coresets at five pruning rates for each,
metrics, finished retrainings; and a `.beton` with as many images as there are scores. Its pictures
are squares of noise as large as a pixel of a thumbnail, the worst case for these, stored as JPEG;
the images are different regions of the file that share the pixels of --num-pictures of them, or it
would take 60 GB. The manifest knows a path for each, and wrong labels.

1. `tdds report`: a process of its own; seconds with imports, peak of the resident memory.
2. Opening the page in a headless Chromium, if there is one: until the load event; until the
   pictures of the first sheet are decoded, after scrolling there; and what the choice of a class
   takes.

    python -m benchmarks.report             # 0.6 GB in the temporary folder, under 2 GB of memory
"""

# N images, M kept images, C classes, P pictures, R rows of one picture

import argparse
import importlib.util
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import files
from tdds_dist.data.beton import (
    ALLOCATION,
    DESCRIPTOR,
    FIELD_TYPES,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    VERSION,
)
from tdds_dist.data.manifest import Manifest, manifest_path, write_manifest
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    Coreset,
    Fingerprint,
    Scores,
    fingerprint,
    save_coreset,
    save_scores,
)
from tdds_dist.runs.directory import RunDir

WINDOWS = (
    "tdds_official_T90_K10_beta0.9",
    "tdds_official_T60_K10_beta0.9",
    "tdds_official_T30_K10_beta0.9",
)
KEYS = (*WINDOWS, "el2n", "aum", "forgetting")
RATES = (0.3, 0.5, 0.7, 0.8, 0.9)
SIDE, SQUARE = 256, 4  # pixels, of a picture and of the squares in it
QUALITY = 90
SOI, COMMENT = b"\xff\xd8", b"\xff\xfe"  # JPEG's first marker, and the marker of a comment
ROW_BYTES = 6  # of the markers by which one more row begins in a picture
MAX_ROWS = (65535 - 2) // ROW_BYTES  # of a picture: a comment cannot be longer
WRONG_LABELS = 0.05
ROOT = Path(__file__).resolve().parent.parent
# Ends with its peak in kilobytes: the one in a parent's resource usage would count the parent's
# memory as well.
COMMAND = """
import re, sys
from tdds_dist.cli.main import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


# ---- the run


def write_run(
    folder: Path, num_images: int, num_classes: int, num_pictures: int, num_epochs: int
) -> RunDir:
    """A finished run with everything that the report reads, and its images, in `folder`."""
    beton = folder / "train.beton"
    label_N = np.arange(num_images) % num_classes
    found = fingerprint(label_N, num_classes)
    write_images(beton, label_N, num_pictures)
    _write_manifest(beton, label_N, found)
    run = RunDir(folder / "run")
    _start(run, beton, num_classes, num_epochs, {"stage": "collect"})
    _finish(
        run,
        num_epochs,
        {"stage": "collect", "num_images": num_images, "epochs_planned": num_epochs},
    )
    for place, key in enumerate(KEYS):
        score_N = made_up_scores(key, num_images, place, num_epochs)
        save_scores(
            run.scores / f"{key}.npz",
            Scores(key, score_N, label_N, found, {"score": key.split("_")[0]}),
        )
        order = np.argsort(-score_N, kind="stable")
        for rate in RATES:
            index_M = np.sort(order[: num_images - round(rate * num_images)])
            save_coreset(
                run.coresets / f"{key}_p{rate:g}.npz",
                Coreset(
                    index_M, np.ones(len(index_M), np.float32), key, rate, found, {"sampler": "top"}
                ),
            )
    for key in (WINDOWS[0], "el2n"):
        for rate in RATES:
            asked = {
                "stage": "retrain",
                "strategy": "E",
                "importance": "none",
                "score_key": key,
                "pruning_rate": rate,
            }
            sub = RunDir(run.retrain / f"{key}_p{rate:g}_E_none_seed0")
            _start(sub, beton, num_classes, num_epochs, asked)
            _finish(
                sub,
                num_epochs,
                asked | {"seed": 0, "num_images": num_images - round(rate * num_images)},
            )
    return run


def write_images(beton: Path, label_N: np.ndarray, num_pictures: int) -> None:
    """A `.beton` of JPEG images: image i has the pixels of picture i % P.

    A picture begins with one start marker per row, each followed by a comment that skips those of
    the later rows, so that every image has a place and bytes of its own, as in any `.beton`.
    """
    num_images, rng = len(label_N), np.random.default_rng(0)
    num_rows = math.ceil(num_images / num_pictures)
    starts = b"".join(
        SOI + COMMENT + (2 + ROW_BYTES * left).to_bytes(2, "big")
        for left in range(num_rows - 1, -1, -1)
    )
    metadata_N = np.zeros(
        num_images,
        np.dtype([("", FIELD_TYPES[IMAGE_TYPE]), ("", FIELD_TYPES[INT_TYPE])], align=True),
    )
    image_N, metadata_N["f1"] = metadata_N["f0"], label_N
    image_N["width"] = image_N["height"] = SIDE
    descriptors = np.zeros(2, DESCRIPTOR)
    for descriptor, type_id, name in zip(
        descriptors, (IMAGE_TYPE, INT_TYPE), (b"image", b"label"), strict=True
    ):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name, np.uint8)
    table_N = np.zeros(num_images, ALLOCATION)
    table_N["sample_id"] = np.arange(num_images)
    header = np.zeros(1, HEADER)
    with beton.open("wb") as file:
        file.seek(header.nbytes + descriptors.nbytes + metadata_N.nbytes)
        for picture in range(num_pictures):
            squares = rng.integers(0, 256, (SIDE // SQUARE, SIDE // SQUARE, 3), dtype=np.uint8)
            body = io.BytesIO()
            Image.fromarray(squares.repeat(SQUARE, 0).repeat(SQUARE, 1)).save(
                body, "jpeg", quality=QUALITY
            )
            data = starts + body.getvalue().removeprefix(SOI)
            index_R = np.arange(picture, num_images, num_pictures)
            offset_R = ROW_BYTES * np.arange(len(index_R))
            table_N["ptr"][index_R], table_N["size"][index_R] = (
                file.tell() + offset_R,
                len(data) - offset_R,
            )
            file.write(data)
        image_N["data_ptr"] = table_N["ptr"]
        header[0] = (VERSION, 2, 2**21, num_images, file.tell())
        file.write(table_N.tobytes())
        file.seek(0)
        file.write(header.tobytes() + descriptors.tobytes() + metadata_N.tobytes())


def made_up_scores(key: str, num_images: int, seed: int, num_epochs: int) -> np.ndarray:
    """Scores of the shape that `key` usually has, float32 [N]."""
    rng = np.random.default_rng(seed)
    if key == "forgetting":
        return rng.binomial(num_epochs, 0.1, num_images).astype(np.float32)
    values_N = rng.normal(2, 4, num_images) if key == "aum" else rng.gamma(1.5, 1.0, num_images)
    return values_N.astype(np.float32)


def _write_manifest(beton: Path, label_N: np.ndarray, found: Fingerprint) -> None:
    names = [f"n{label:08d}" for label in range(found.num_classes)]
    is_wrong_N = np.random.default_rng(1).random(len(label_N)) < WRONG_LABELS
    true_label_N = np.where(is_wrong_N, (label_N + 1) % found.num_classes, label_N)
    paths = [
        f"train/{names[label]}/{names[label]}_{number}.JPEG"
        for number, label in enumerate(label_N.tolist())
    ]
    write_manifest(
        manifest_path(beton),
        Manifest(
            "imagefolder:ImageNet",
            "train",
            len(label_N),
            found.num_classes,
            names,
            paths,
            label_N,
            beton.stat().st_size,
            found.labels_sha256,
            {"label_noise": WRONG_LABELS},
            (SIDE, SIDE),
            true_label_N,
        ),
    )


def _start(
    run: RunDir, beton: Path, num_classes: int, num_epochs: int, stage: dict[str, Any]
) -> None:
    run.start(
        {
            "run": {"name": run.path.name, "dir": str(run.path), "seed": 0},
            "model": {"name": "resnet34"},
            "data": {"train": str(beton), "val": "val.beton", "num_classes": num_classes},
            "train": {"epochs": num_epochs, "global_batch_size": 1024, "lr": 0.1},
            "retrain": {"epochs": 0, "importance": "none"},
        },
        stage,
        world_size=8,
        device="cuda",
    )


def _finish(run: RunDir, num_epochs: int, result: dict[str, Any]) -> None:
    for epoch in range(num_epochs):
        run.append_metrics(
            {
                "epoch": epoch,
                "step": epoch + 1,
                "lr": 0.1,
                "train_loss": 7 / (epoch + 1),
                "train_top1": 60.0,
                "val_loss": 7 / (epoch + 1),
                "val_top1": 70 - 60 / (epoch + 1),
                "val_top5": 90.0,
                "images_per_second": 8000.0 + epoch,
                "epoch_seconds": 160.0,
                "scoring_share": 0.01,
                "memory_bytes": 20_000_000_000,
            }
        )
    run.write_result(
        result
        | {
            "epochs": num_epochs,
            "final_top1": 68.0,
            "final_top5": 89.0,
            "best_top1": 68.5,
            "best_epoch": 1,
            "train_seconds": 160.0 * num_epochs,
        }
    )


# ---- what is measured


def build(run: RunDir, page: Path) -> dict[str, float]:
    """`tdds report` once, in a process of its own: seconds, and peak of the resident memory in
    bytes."""
    command = [sys.executable, "-c", COMMAND, "report", str(run.path), "--out", str(page)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise InputError(
            f"`tdds report` left with exit code {done.returncode}; what it said stands above"
        )
    return {"seconds": seconds, "peak_bytes": float(done.stdout.splitlines()[-1]) * 1024}


def open_page(page: Path, repetitions: int) -> list[dict[str, float]]:
    """Seconds to open a page, each time in a fresh tab; empty without Playwright or without a
    Chromium."""
    from tests.system.browser import chromium

    if importlib.util.find_spec("playwright") is None or chromium.find() is None:
        return []
    found = []
    with chromium.launched() as browser:
        for _ in range(1 + repetitions):  # the first warms up
            tab = browser.new_page()
            started = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="load", timeout=120_000)
            load = time.perf_counter() - started
            tab.evaluate(
                """() => { const sheet = document.querySelector(".images .sheet");
                           sheet.scrollIntoView();
                           const images = [...sheet.querySelectorAll("img")];
                           return Promise.all(images.map(image => image.decode())); }"""
            )
            sheets = time.perf_counter() - started
            started = time.perf_counter()
            tab.select_option(".filter-class", index=1)
            tab.evaluate(
                "() => new Promise(done => requestAnimationFrame(() =>"
                " requestAnimationFrame(done)))"
            )
            found.append({"load": load, "sheets": sheets, "filter": time.perf_counter() - started})
            tab.close()
    return found[1:]


def count_images(page: Path) -> dict[str, int]:
    """Return how many images the page holds, and the bytes of their thumbnails."""
    text = page.read_text()
    store = json.loads(text.split('class="image-store">', 1)[1].split("</script>", 1)[0])
    return {
        "images": len(store["images"]),
        "classes": len({image["label"] for image in store["images"]}),
        "thumbnail_bytes": sum(
            len(part.split('"', 1)[0]) for part in text.split('"data:image/')[1:]
        ),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, with metrics and provenance."""
    where = files.provenance()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "report.html"
        run = write_run(
            folder, options.num_samples, options.num_classes, options.num_pictures, options.epochs
        )
        print(
            f"wrote {sum(path.stat().st_size for path in folder.rglob('*.*')) / 1e6:.0f} MB",
            file=sys.stderr,
        )
        builds = [build(run, page) for _ in range(options.repetitions)]
        opened = open_page(page, options.repetitions)
        page_bytes, held = page.stat().st_size, count_images(page)
    metrics = {
        "build, s": files.metric([run["seconds"] for run in builds], "s", "lower"),
        "build, bytes": files.metric(
            [run["peak_bytes"] for run in builds], "bytes", "lower", relative=True
        ),
        "page, bytes": files.metric([page_bytes], "bytes", "lower", relative=True),
    }
    for what in ("load", "sheets", "filter") if opened else ():
        metrics[f"{what}, s"] = files.metric([once[what] for once in opened], "s", "lower")
    settings = {
        name: getattr(options, name)
        for name in ("num_samples", "num_classes", "num_pictures", "epochs")
    }
    return {
        "benchmark": "report",
        "settings": settings,
        "repetitions": options.repetitions,
        "warm_up": "none for the command; one tab for the browser",
        "metrics": metrics,
        "held": held,
        "provenance": where,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    metrics, settings, held = result["metrics"], result["settings"], result["held"]

    def row(what: str, name: str, unit: float, digits: int) -> list[str]:
        found = metrics[name]
        return [what, *(f"{found[key] / unit:.{digits}f}" for key in ("value", "min", "max"))]

    is_opened = "load, s" in metrics
    rows = [
        ["", "median", "least", "most"],
        row("`tdds report`, s", "build, s", 1, 1),
        row("peak resident memory, MB", "build, bytes", 1e6, 0),
        row("page, MB", "page, bytes", 1e6, 2),
    ]
    if is_opened:
        rows += [
            row("until the load event, s", "load, s", 1, 2),
            row("until the first sheet is decoded, s", "sheets, s", 1, 2),
            row("choice of a class, s", "filter, s", 1, 2),
        ]
    return "\n".join(
        [
            "# The report of a large run",
            "",
            (
                f"{settings['num_samples']:,} images of {settings['num_classes']:,} classes,"
                f" {len(KEYS)} scores, {len(KEYS) * len(RATES)} coresets, {2 * len(RATES)}"
                f" retrainings of {settings['epochs']} epochs."
            ),
            "",
            files.table(rows),
            "",
            f"The page holds {held['images']:,} images of {held['classes']:,} classes,"
            f" {held['thumbnail_bytes'] / 1e6:.1f} MB of thumbnails. The images are {SIDE} x {SIDE}"
            " pixels, squares of noise as large as a thumbnail's pixels: of pictures that compress"
            f" it holds more in as many bytes. Repetitions: {result['repetitions']}; the command"
            " with imports, files in the page cache; a fresh tab each time, a warm browser."
            + ("" if is_opened else " No Chromium to open the page with."),
            "",
            files.provenance_line(result),
            "",
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Size and time of the report of a large run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--num-samples", type=int, default=1_281_167, metavar="N", help="images")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="C", help="classes")
    parser.add_argument(
        "--num-pictures",
        type=int,
        default=1000,
        metavar="P",
        help="different pictures among the images",
    )
    parser.add_argument(
        "--epochs", type=int, default=30, metavar="T", help="epochs of every training"
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=3,
        metavar="R",
        help="of the command and of opening the page",
    )
    files.add_options(parser, "report")
    return parser


def check(options: argparse.Namespace) -> None:
    """InputError for what cannot be made."""
    least = {"num_samples": 20, "num_classes": 2, "num_pictures": 1, "epochs": 1, "repetitions": 1}
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {bound}"
            )
    needed = math.ceil(options.num_samples / MAX_ROWS)
    if options.num_pictures < needed:
        raise InputError(
            f"--num-pictures {options.num_pictures} cannot make {options.num_samples} images; "
            f"give at least {needed}"
        )
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if (wanted := options.num_samples * 500 + options.num_pictures * 120_000) > 0.9 * free:
        raise InputError(
            f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free, this size needs"
            f" {wanted / 1e9:.1f}; lower it, or set TMPDIR to another folder"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and Markdown; returns the exit code."""
    return files.run("report", build_parser().parse_args(arguments), check, measure, as_markdown)


if __name__ == "__main__":
    sys.exit(main())
