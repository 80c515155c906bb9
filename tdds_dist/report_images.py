"""Section of the report with the images themselves: which ones are shown, and their thumbnails from the `.beton`.

Owns what that section shows; gives plain values to `page/images.html.j2`.
"""

# N dataset

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.artifacts import require_same_dataset
from tdds_dist.errors import InputError
from tdds_dist.report_scores import Origins, class_name, known_noise
from tdds_dist.summary import Facts

THUMBNAIL_PIXELS = 112
PIXELATED_UP_TO = 64  # images up to this size are embedded as they are and shown with their pixels


def sheets(facts: Facts, main: str | None, origins: Origins, num_thumbnails: int) -> dict[str, Any]:
    """Images with the highest and lowest scores and around the largest cut; `note` says why there are none."""
    if main is None or num_thumbnails < 1:
        return {"sheets": [], "note": "No images were asked for." if main else "No scores yet, so no images to show."}
    score_N = facts.scores[main].score_N
    order = np.argsort(score_N, kind="stable")
    order = order[~np.isnan(score_N[order])]
    picks = {"highest": order[::-1][:num_thumbnails], "lowest": order[:num_thumbnails]}
    cuts = [(facts.coresets[coreset].pruning_rate, cut, facts.coresets[coreset])
            for coreset, (name, cut) in origins.items() if name == main and cut is not None]
    rate, cut, border = max(cuts, key=lambda item: item[0], default=(None, None, None))
    if border is not None:
        kept_N = np.isin(order, border.index_M)
        half = (num_thumbnails + 1) // 2
        picks |= {"below": order[~kept_N][-half:], "above": order[kept_N][:half]}
    try:
        pictures = _pictures(facts, main, sorted({int(index) for pick in picks.values() for index in pick}))
    except (InputError, OSError, ImportError) as error:
        return {"sheets": [], "note": f"The images cannot be shown: {error}"}
    sheets = [{"kind": kind, "pictures": [pictures[int(index)] for index in pick]} for kind, pick in picks.items()]
    return {"sheets": sheets, "note": None, "rate": rate, "cut": cut}


def _pictures(facts: Facts, main: str, index: list[int]) -> dict[int, dict[str, Any]]:
    """Thumbnail and captions of each global index. InputError when the `.beton` is gone or holds other images."""
    beton = Path(str(facts.config.get("data", {}).get("train", "")))
    if not beton.is_file():
        raise InputError(f"{beton} is no longer there.")
    from tdds_dist.beton import dataset_fingerprint, inspect_beton, read_images

    scores, info = facts.scores[main], inspect_beton(beton)
    found = dataset_fingerprint(info, scores.fingerprint.num_classes)
    require_same_dataset(scores.fingerprint, found, f"score {main!r}")
    images = read_images(beton, index, info)
    paths = getattr(facts.manifest, "path", None)
    noisy_N, corrupted_N = known_noise(facts)

    def bad(bad_N: np.ndarray | None, number: int) -> bool:
        return bad_N is not None and bool(bad_N[number])

    return {
        number: {"src": _data_uri(image), "pixelated": max(image.shape[:2]) <= PIXELATED_UP_TO, "index": number,
                 "path": str(paths[number]) if paths else f"image {number}", "score": f"{scores.score_N[number]:.4g}",
                 "class_name": class_name(facts, int(scores.label_N[number])),
                 "true_class": class_name(facts, int(facts.manifest.true_label_N[number])) if bad(noisy_N, number) else None,
                 "corruption": facts.manifest.corruption[number].replace("_", " ") if bad(corrupted_N, number) else None}
        for number, image in zip(index, images, strict=True)
    }


def _data_uri(image: np.ndarray) -> str:
    """A picture (uint8 HWC) for an <img>: tiny ones as they are, larger ones as a small JPEG."""
    from PIL import Image

    picture, file = Image.fromarray(image), io.BytesIO()
    if max(image.shape[:2]) <= PIXELATED_UP_TO:
        picture.save(file, "png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    picture.thumbnail((2 * THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    picture.save(file, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
