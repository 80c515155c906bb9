"""Sections of the report about scores and coresets: histograms and cuts, shares of the classes and of known noise.

Owns what those sections show; files were read by `summary`. Gives plain values and SVG to the templates in `page/`.
"""

# N dataset, M kept samples, C classes

from typing import Any

import numpy as np

from tdds_dist import charts
from tdds_dist.agreement import noise_kept as share_kept
from tdds_dist.artifacts import Coreset
from tdds_dist.published import base_key, is_plain
from tdds_dist.summary import Facts, percent

MAX_CLASS_CELLS = 20_000  # of the per-class table; beyond it only the main score's coresets are listed
Origins = dict[str, tuple[str | None, float | None]]  # coreset -> (score file it was cut from, lowest kept score)


def origin(facts: Facts, coreset: Coreset) -> tuple[str | None, float | None]:
    """The score file a coreset was cut from, and where. Of several files with its key the one that explains it."""
    fits = [(name, _cut(scores.score_N, coreset.index_M)) for name, scores in facts.scores.items()
            if coreset.score_key in (name, scores.key) and scores.fingerprint == coreset.fingerprint]
    return min(fits, key=lambda fit: fit[1] is None, default=(None, None))


def _cut(score_N: np.ndarray, index_M: np.ndarray) -> float | None:
    """The lowest kept score, if the coreset is exactly the top of this score; None for any other selection."""
    kept_N = np.zeros(len(score_N), dtype=bool)
    kept_N[index_M] = True
    lowest = float(score_N[kept_N].min())
    return lowest if kept_N.all() or lowest >= float(score_N[~kept_N].max()) else None


def main_score(facts: Facts, origins: Origins) -> str | None:
    """The score whose images are shown: TDDS before others, of several the one cut at the largest pruning rate."""
    largest: dict[str | None, float] = {}
    for coreset, (name, _) in origins.items():
        largest[name] = max(largest.get(name, 0), facts.coresets[coreset].pruning_rate)
    names = [name for name in facts.scores if base_key(name) != "random"]
    return max(names, key=lambda name: (base_key(name) == "tdds", is_plain(name), largest.get(name, -1)), default=None)


def score_facts(facts: Facts, name: str, origins: Origins, slot: int) -> dict[str, Any]:
    """Histogram and key numbers of one score file."""
    from tdds_dist.select import default_sampler  # brings torch

    scores = facts.scores[name]
    score_N = scores.score_N[np.isfinite(scores.score_N)]
    keeps_centre = default_sampler(scores) == "centre"
    found = {"name": name, "scores": scores, "chart": None, "is_random": base_key(name) == "random",
             "keeps_centre": keeps_centre, "num_infinite": len(scores.score_N) - len(score_N)}
    if len(score_N) and not found["is_random"]:
        cuts = {(facts.coresets[coreset].pruning_rate, cut) for coreset, (source, cut) in origins.items()
                if source == name and cut is not None and np.isfinite(cut)}
        flags = [(percent(rate), cut) for rate, cut in sorted(cuts) if rate > 0]
        low, middle, high = (f"{value:.3g}" for value in np.quantile(score_N, [0, 0.5, 1]))
        alt = (f"Histogram of {len(score_N):,} {name} scores from {low} to {high}, median {middle}. Cuts: "
               + (", ".join(f"{rate} removed below {cut:.3g}" for rate, cut in flags) or "none") + "."
               + (" The centre of the ranking is kept by default." if keeps_centre else ""))
        keep = "centre of the ranking" if keeps_centre else "higher"
        chart = charts.histogram(score_N, flags, slot, f"{name} score ({keep} = keep)", alt)
        found |= {"chart": chart, "range": [low, middle, high], "has_flags": bool(flags)}
    return found


def known_noise(facts: Facts) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which images have a wrong label, and which are corrupted, bool [N]; None where the manifest does not say, or is of
    other labels than those that were scored."""
    manifest = facts.manifest
    if manifest is None:
        return None, None
    if any(scores.fingerprint != manifest.fingerprint for scores in facts.scores.values()):
        return None, None
    return manifest.noisy_N, manifest.corrupted_N


def noise(facts: Facts) -> dict[str, Any] | None:
    """How many images are known to have a wrong label, how many to be corrupted, and a line that says it; None where no
    image is known to have either."""
    labels, images = (0 if bad_N is None else int(bad_N.sum()) for bad_N in known_noise(facts))
    if not labels and not images:
        return None
    parts = [f"{num:,} {what}" for num, what in ((labels, "labels changed"), (images, "images corrupted")) if num]
    text = ", ".join(parts).replace(" ", f" of {facts.manifest.num_samples:,} ", 1)
    return {"labels": labels, "images": images, "text": text}


def noise_kept(facts: Facts, coreset: Coreset) -> list[float | None]:
    """Shares of the wrong labels and of the corrupted images that the coreset keeps; None where none are known."""
    return [None if bad_N is None or not bad_N.any() else share_kept(coreset.index_M, bad_N)[0]
            for bad_N in known_noise(facts)]


def class_table(facts: Facts, main: str | None, origins: Origins) -> dict[str, Any] | None:
    """Share of each class that each coreset keeps."""
    labels = next((scores.label_N for scores in facts.scores.values() if scores.fingerprint.labels_sha256), None)
    if labels is None or not facts.coresets:
        return None
    num_classes = max(facts.config.get("data", {}).get("num_classes") or 0, int(labels.max()) + 1)
    shortened = num_classes * len(facts.coresets) > MAX_CLASS_CELLS
    coresets = {name: coreset for name, coreset in facts.coresets.items()
                if coreset.pruning_rate > 0 and (not shortened or origins[name][0] in (main, None))}
    total_C = np.bincount(labels, minlength=num_classes)
    share = {name: np.bincount(labels[coreset.index_M], minlength=num_classes) / np.maximum(total_C, 1) * 100
             for name, coreset in coresets.items()}
    rows = [(class_name(facts, label), int(total_C[label]), [round(float(share[name][label]), 1) for name in share])
            for label in range(num_classes)]
    heads = coreset_labels(facts)
    return {"coresets": [(name, heads[name]) for name in coresets], "rows": rows, "shortened": shortened}


def coreset_labels(facts: Facts) -> dict[str, str]:
    """A short heading for each coreset, its file name where two would share one."""
    labels = {}
    for name, coreset in facts.coresets.items():
        balanced = " balanced" if coreset.settings.get("class_balanced") else ""
        method = coreset.method.removesuffix("_balanced")
        labels[name] = f"{facts.names.get(method, method)} {percent(coreset.pruning_rate)}{balanced}"
    taken = list(labels.values())
    return {name: label if taken.count(label) == 1 else name for name, label in labels.items()}


def class_name(facts: Facts, label: int) -> str:
    names = getattr(facts.manifest, "class_names", None) or ()
    return str(names[label]) if 0 <= label < len(names) else f"class {label}"
