"""Page to review suspects: a card per sample with its picture, both classes, and typical images of
them; decisions are saved from the page as a CSV file for `tdds write --relabel`.

Owns what the page shows; which samples are suspects is `coreset.suspects`'. One file, nothing
loaded from elsewhere, as the report.
"""

# N dataset

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.coreset.suspects import Suspects
from tdds_dist.data.beton import dataset_fingerprint, inspect_beton
from tdds_dist.errors import InputError
from tdds_dist.report.images import BUDGET_BYTES, PIXELATED_UP_TO, thumbnails
from tdds_dist.report.page import render
from tdds_dist.report.scores import valid_utf8
from tdds_dist.runs.artifacts import require_same_dataset, write_atomically
from tdds_dist.runs.directory import RunDir

NUM_TYPICAL = 3  # images of a class beside a card
SIDES = (160, 96)  # of the pictures, pixels


def write_review(suspects: Suspects, run: RunDir, out: Path, num: int, score: str) -> list[str]:
    """Write the page about the `num` most suspicious samples to `out`; return what is not in it.

    Pictures come from the training file of `run`; a page without them says why.
    """
    shown = suspects.order[:num].tolist()
    typical = _typical(suspects, shown)
    notes, pictures, pixelated = [], dict[int, str](), False
    try:
        data = run.read_config()["data"]
        beton = run.train_file()
        info = inspect_beton(beton, data.get("image_field", ""), data.get("label_field", ""))
        images = dataset_fingerprint(info, suspects.fingerprint.num_classes)
        require_same_dataset(images, suspects.fingerprint, str(beton))
        wanted = dict.fromkeys([*shown, *(index for of in typical.values() for index in of)])
        pictures, bad = thumbnails(info, wanted, BUDGET_BYTES, SIDES)
        pixelated = bool(max(info.height_N.max(), info.width_N.max()) <= PIXELATED_UP_TO)
        if missing := sum(index not in pictures and index not in bad for index in shown):
            notes.append(f"{missing} pictures do not fit into the page; lower --num")
        if bad:
            notes.append(f"{len(bad)} pictures cannot be decoded; `tdds check` names them")
        if not suspects.path:
            notes.append(
                "the training file has no manifest: classes are numbers, and threshold samples, if"
                " there are any, are judged as the others"
            )
    except (InputError, OSError) as error:
        notes.append(f"the page has no pictures: {error}")
    names = list(map(valid_utf8, suspects.class_names))
    cards = [_card(suspects, rank, pictures) for rank in range(len(shown))]
    text = render(
        "review.html.j2",
        ("style.css", "review.css"),
        ("review.js",),
        run=valid_utf8(run.path.name),
        score=score,
        cards=cards,
        num_judged=len(suspects.order),
        num_wrong=None if suspects.wrong_N is None else int(suspects.wrong_N.sum()),
        store={
            "key": _key(suspects),
            "classes": names,
            "typical": {
                names[label]: [pictures[index] for index in of if index in pictures]
                for label, of in typical.items()
            },
        },
        notes=notes,
        pixelated=pixelated,
    )
    write_atomically(out, lambda file: file.write(text.encode("utf-8", "replace")))
    return notes


def _key(suspects: Suspects) -> str:
    """Return a name for the images and labels, under which a browser keeps decisions."""
    words = "\n".join([*suspects.class_names, *suspects.path]).encode("utf-8", "surrogateescape")
    return hashlib.sha256(suspects.label_N.tobytes() + words).hexdigest()[:16]


def _card(suspects: Suspects, rank: int, pictures: dict[int, str]) -> dict[str, Any]:
    row = suspects.row(rank)
    return {
        "rank": rank + 1,
        "index": int(row["index"]),
        "path": valid_utf8(row["path"]),
        "label": valid_utf8(row["label"]),
        "other": valid_utf8(row.get("other", "")),
        "p_label": row.get("p_label", ""),
        "p_other": row.get("p_other", ""),
        "wrong": row.get("wrong", "") == "yes",
        "src": pictures.get(int(row["index"])),
    }


def _typical(suspects: Suspects, shown: list[int]) -> dict[int, list[int]]:
    """Return the least suspicious samples of every class that a card names, as global indices by
    label."""
    labels = {int(suspects.label_N[index]) for index in shown}
    if suspects.guess:
        other = suspects.guess["other"][shown]
        labels |= {*other[~np.isnan(other)].astype(int).tolist()}
    least_N = suspects.order[::-1]
    of_least_N = suspects.label_N[least_N]
    return {
        label: least_N[np.flatnonzero(of_least_N == label)[:NUM_TYPICAL]].tolist()
        for label in sorted(labels)
    }
