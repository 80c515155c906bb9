"""Section of the report with the images themselves: which ones are in the page, in which sheets,
and what is said of each.

Owns what that section shows; gives plain values to `images.html.j2` and one JSON store to
`images.js`. The main score's sheets are HTML, for readers without scripts; the script draws every
sheet anew from the store, so that another score, another cut and the filters need no second copy of
a thumbnail. Thumbnails have a budget in bytes: what does not fit is left out, the last picture of
every sheet first, and the page says how many images it holds.
"""

# N dataset, M kept samples, C classes

import base64
import io
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.scores import base_key
from tdds_dist.coreset.select import choose, default_sampler
from tdds_dist.data.beton import (
    BetonInfo,
    dataset_fingerprint,
    evenly_spaced,
    inspect_beton,
    read_images,
)
from tdds_dist.errors import InputError
from tdds_dist.report.read import Facts
from tdds_dist.report.scores import Origins, class_name, known_noise, valid_utf8
from tdds_dist.runs.artifacts import require_same_dataset
from tdds_dist.text import percent

BUDGET_BYTES = 12_000_000  # of the thumbnails of a page, as they stand in it
SHEETS_SHARE = 0.5  # of the budget, at most; the sample has the rest
# images of the sample: per class, in all
SAMPLE_PER_CLASS, SAMPLE_LEAST, SAMPLE_MOST = 4, 400, 4000
# longest side in pixels: for dense screens, as large as they are shown, readable
SIDES = (224, 112, 80)
PIXELATED_UP_TO = 64  # images up to this size are embedded as they are and shown with their pixels
JPEG_QUALITY = 80
PROBES = 8  # images that tell how many bytes a thumbnail takes
IMAGES_PER_BATCH = 64
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly however many are taken


@dataclass(frozen=True)
class Sheet:
    """Images by one score: the `highest`, the `lowest`, or those just `below` and `above` the cut
    at a pruning rate."""

    kind: str
    index: list[int]  # global indices in the order shown
    rate: float | None = None
    cut: float | None = None  # the lowest kept score

    def text(self, num: int, keeps_centre: bool) -> dict[str, str]:
        """Return heading and note over the `num` images of this sheet that are in the page."""
        images = "1 image" if num == 1 else f"{num} images"
        if self.kind in ("highest", "lowest"):
            end = {"highest": "kept longest", "lowest": "removed first"}[self.kind]
            head = f"{self.kind.capitalize()} scores" + ("" if keeps_centre else f": {end}")
            return {"head": head, "note": f"{images}, the {self.kind} score first."}
        side = "the last to be removed" if self.kind == "below" else "the first to be kept"
        return {
            "head": f"Just {self.kind} the cut: {side} at {percent(self.rate)}",
            "note": f"{images} by rising score; the lowest kept score is {self.cut:.4g}.",
        }


def sheets(
    facts: Facts,
    main: str | None,
    origins: Origins,
    num_thumbnails: int,
    budget_bytes: int = BUDGET_BYTES,
) -> dict[str, Any]:
    """Return what the section shows: `num_thumbnails` images of every kind per score and cut, and a
    sample of all images.

    `sheets` are those of the main score, with their pictures; `store` is everything for the script,
    without the thumbnails that stand in `sheets`. `note` says why there are none, where there are
    none.
    """
    if main is None or num_thumbnails < 1:
        return {
            "sheets": [],
            "note": "No images were asked for." if main else "No scores yet, so no images to show.",
        }
    try:
        info = _open(facts, main)
        # those that rank images, of the main score's
        same = facts.scores[main].fingerprint
        others = [
            name
            for name, scores in facts.scores.items()
            if base_key(name) != "random" and scores.fingerprint == same
        ]
        by_score = {
            name: score_sheets(facts, name, origins, num_thumbnails)
            for name in dict.fromkeys([main, *others])
        }
        wanted = by_need(itertools.chain(*by_score.values()))
        sample = spread(facts.scores[main].score_N, info.label_N)
        uris, bad = thumbnails(info, wanted, int(SHEETS_SHARE * budget_bytes), SIDES[:-1])
        rest = budget_bytes - sum(map(len, uris.values()))
        done = {*uris, *bad}
        more, more_bad = thumbnails(info, (index for index in sample if index not in done), rest)
        uris |= more
        if not uris:
            raise InputError(
                f"none of those wanted can be decoded; `tdds check {info.path}` names the bad ones."
            )
    except (InputError, OSError, ImportError) as error:
        facts.problems.append(f"{facts.run.path}: the page has no images: {error}")
        return {"sheets": [], "note": f"The images cannot be shown: {error}"}
    order = [number for number in dict.fromkeys([*sample, *uris]) if number in uris]
    pictures = _pictures(facts, info, order, list(by_score))
    static, in_html = _static_sheets(by_score[main], pictures, uris, _keeps_centre(facts, main))
    for number in order:
        pictures[number]["src"] = None if number in in_html else uris[number]
    kinds = {
        kind: sum(bool(picture[kind]) for picture in pictures.values())
        for kind in ("true_class", "corruption")
    }
    store = {
        "images": [pictures[number] for number in order],
        "known": [kind for kind, num in kinds.items() if num],
        "scores": [_stored_score(facts, name, found, uris) for name, found in by_score.items()],
    }
    return {
        "sheets": static,
        "note": None,
        "store": store,
        "num_images": len(order),
        "num_samples": info.num_samples,
        "num_bad": len(bad) + len(more_bad),
    }


def score_sheets(facts: Facts, name: str, origins: Origins, num: int) -> list[Sheet]:
    """Return the sheets of one score: its ends, and both sides of every plain cut, the largest
    pruning rate first.

    Cuts are at the pruning rates of all coresets: where none was made by this score, its own
    sampler says what it would keep.
    """
    scores, score_N = facts.scores[name], facts.scores[name].score_N
    order = np.argsort(score_N, kind="stable")
    order = order[~np.isnan(score_N[order])]
    found = [Sheet("highest", order[::-1][:num].tolist()), Sheet("lowest", order[:num].tolist())]
    cuts = {
        facts.coresets[coreset].pruning_rate: (cut, facts.coresets[coreset].index_M)
        for coreset, (source, cut) in origins.items()
        if source == name and cut is not None
    }
    asked = {coreset.pruning_rate for coreset in facts.coresets.values()} - {0, *cuts}
    if asked and np.isfinite(score_N).all() and not _keeps_centre(facts, name):
        for rate in asked:
            if round(rate * len(score_N)) < len(score_N):
                index_M = choose(scores, rate)
                cuts[rate] = float(score_N[index_M].min()), index_M
    half = (num + 1) // 2
    for rate, (cut, index_M) in sorted(cuts.items(), reverse=True):
        if rate > 0:
            kept = np.isin(order, index_M)
            found.append(Sheet("below", order[~kept][-half:].tolist(), rate, cut))
            found.append(Sheet("above", order[kept][:half].tolist(), rate, cut))
    return found


def by_need(found: Iterable[Sheet]) -> list[int]:
    """Return the images of all sheets: those nearest to the end or to the cut of every sheet, then
    the next of every sheet, and so on; each once."""
    nearest_first = (sheet.index[::-1] if sheet.kind == "below" else sheet.index for sheet in found)
    rounds = itertools.zip_longest(*nearest_first)
    return list(
        dict.fromkeys(number for numbers in rounds for number in numbers if number is not None)
    )


def spread(score_N: np.ndarray, label_N: np.ndarray) -> list[int]:
    """Return the global indices of a sample over classes and, within each, over the ranks of its
    scores.

    The order is by need: one image of every class, then a second of every class elsewhere in its
    ranking, and so on. Classes are shuffled, always in the same way, so that what is cut off at the
    end falls on no particular ones.
    """
    order_N = np.lexsort((score_N, label_N))
    _, first_C, num_C = np.unique(label_N[order_N], return_index=True, return_counts=True)
    class_C = np.arange(len(first_C))
    shuffled_C = np.random.default_rng(0).permutation(class_C)
    per_class = max(SAMPLE_PER_CLASS, -(-SAMPLE_LEAST // len(class_C)))
    found: dict[int, None] = {}
    for number in range(per_class):
        place_C = ((class_C + number) * GOLDEN % 1 * num_C).astype(np.int64)
        found |= dict.fromkeys(order_N[first_C + place_C][shuffled_C].tolist())
    return list(found)[:SAMPLE_MOST]


# ---- what is said of the images


def _open(facts: Facts, main: str) -> BetonInfo:
    """Open the training file; raise InputError when it is gone or holds other images."""
    data = facts.config.get("data", {})
    beton = Path(str(data.get("train", "")))
    if not beton.is_file():
        raise InputError(f"{beton} is no longer there.")
    scores = facts.scores[main]
    info = inspect_beton(beton, data.get("image_field", ""), data.get("label_field", ""))
    found = dataset_fingerprint(info, scores.fingerprint.num_classes)
    require_same_dataset(scores.fingerprint, found, f"score {main!r}")
    return info


def _keeps_centre(facts: Facts, name: str) -> bool:
    return default_sampler(facts.scores[name]) == "centre"


def _pictures(
    facts: Facts, info: BetonInfo, index: list[int], names: list[str]
) -> dict[int, dict[str, Any]]:
    """Return what is known of each image, by global index; `scores` are texts in the order of
    `names`."""
    paths = facts.manifest and facts.manifest.path
    noisy_N, corrupted_N = known_noise(facts)
    scores = [facts.scores[name].score_N for name in names]

    def picture(number: int) -> dict[str, Any]:
        is_noisy, is_corrupted = (
            bad_N is not None and bool(bad_N[number]) for bad_N in (noisy_N, corrupted_N)
        )
        label = int(info.label_N[number])
        name = class_name(facts, label)
        true_class = (
            class_name(facts, int(facts.manifest.true_label_N[number])) if is_noisy else None
        )
        corruption = facts.manifest.corruption[number].replace("_", " ") if is_corrupted else None
        caption = name if true_class is None else f"{name}, really {true_class}"
        return {
            "index": number,
            "pixelated": bool(max(info.width_N[number], info.height_N[number]) <= PIXELATED_UP_TO),
            "label": label,
            "class_name": name,
            "true_class": true_class,
            "corruption": corruption,
            "caption": caption,
            "alt": (
                f"Image {number}, {caption}" + (f", corrupted ({corruption})" if corruption else "")
            ),
            "path": valid_utf8(paths[number]) if paths else f"image {number}",
            "scores": [f"{score_N[number]:.4g}" for score_N in scores],
        }

    return {number: picture(number) for number in index}


def _static_sheets(
    found: list[Sheet],
    pictures: dict[int, dict[str, Any]],
    uris: dict[int, str],
    keeps_centre: bool,
) -> tuple[list[dict[str, Any]], set[int]]:
    """Return the sheets that need no script: both ends of the main score and its largest cut; and
    the images in them. Only where an image comes first it has its `src`."""
    largest = max((sheet.rate for sheet in found if sheet.rate is not None), default=None)
    static, in_html = [], set[int]()
    for sheet in found:
        shown = [number for number in sheet.index if number in uris]
        if shown and sheet.rate in (None, largest):
            placed = [
                {**pictures[number], "src": None if number in in_html else uris[number]}
                for number in shown
            ]
            static.append({**sheet.text(len(shown), keeps_centre), "pictures": placed})
            in_html.update(shown)
    return static, in_html


def _stored_score(
    facts: Facts, name: str, found: list[Sheet], uris: dict[int, str]
) -> dict[str, Any]:
    """Return a score for the script: its sheets, those with a cut under their pruning rate."""
    keeps_centre, stored = _keeps_centre(facts, name), []
    for sheet in found:
        shown = [number for number in sheet.index if number in uris]
        rate = None if sheet.rate is None else percent(sheet.rate)
        stored.append({**sheet.text(len(shown), keeps_centre), "rate": rate, "index": shown})
    return {"name": name, "sheets": [sheet for sheet in stored if sheet["index"]]}


# ---- thumbnails


def thumbnails(
    info: BetonInfo, index: Iterable[int], budget_bytes: int, sides: Sequence[int] = SIDES
) -> tuple[dict[int, str], list[int]]:
    """Return data URIs by global index, as many as fit into `budget_bytes` from the front of
    `index`; and the indices of images that cannot be decoded.

    The longest side of all of them is the first of `sides` (descending, pixels) at which they are
    likely to fit, else the last. Raises OSError when the file cannot be read.
    """
    wanted = list(index)
    side = _side(info, wanted, budget_bytes, sides)
    found: dict[int, str] = {}
    bad: list[int] = []
    used = 0
    # decoding and encoding let others run
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        for first in range(0, len(wanted), IMAGES_PER_BATCH):
            batch = wanted[first : first + IMAGES_PER_BATCH]
            for number, uri in zip(
                batch, pool.map(lambda number: _read(info, number, side), batch), strict=True
            ):
                if uri is None:
                    bad.append(number)
                    continue
                used += len(uri)
                if used > budget_bytes:
                    return found, bad
                found[number] = uri
    return found, bad


def data_uri(image: np.ndarray, side: int) -> str:
    """Encode a picture (uint8 [H, W, 3]) for an <img>: tiny ones as they are, larger ones as a JPEG
    of at most `side` pixels.
    """
    from PIL import Image

    picture, file = Image.fromarray(image), io.BytesIO()
    kind = "png" if max(image.shape[:2]) <= PIXELATED_UP_TO else "jpeg"
    if kind == "jpeg":
        picture.thumbnail((side, side))
    picture.save(file, kind, quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def _side(info: BetonInfo, index: Sequence[int], budget_bytes: int, sides: Sequence[int]) -> int:
    probes = [index[place] for place in evenly_spaced(len(index), PROBES)] if index else []
    for side in sides[:-1]:
        sizes = [
            len(uri) for uri in (_read(info, number, side) for number in probes) if uri is not None
        ]
        if sum(sizes) * len(index) <= budget_bytes * len(sizes):
            return side
    return sides[-1]


def _read(info: BetonInfo, index: int, side: int) -> str | None:
    """Return the data URI of one image; None where it cannot be decoded."""
    try:
        (image,) = read_images(info.path, [index], info)
    except InputError:
        return None
    return data_uri(image, side)
