"""Sections of the report about scores and coresets: histograms and cuts, shares of the classes and
of known noise.

Owns what those sections show; files were read by `read`. Gives plain values and SVG to the
templates in `templates/`.
"""

# N dataset, n samples with a finite score, M kept samples, C classes, B bins

from typing import Any

import numpy as np

from tdds_dist.config.scores import base_key, is_plain
from tdds_dist.coreset.agreement import keep_rates, noise_kept
from tdds_dist.coreset.select import default_sampler
from tdds_dist.report import charts
from tdds_dist.report.charts import bins_of
from tdds_dist.report.read import Facts
from tdds_dist.runs.artifacts import Coreset, Scores
from tdds_dist.text import percent

NUM_BINS = 80
# of the per-class table; beyond it only the main score's coresets are listed
MAX_CLASS_CELLS = 20_000
MAX_CLASS_COLUMNS = 8  # of one table; more coresets get a table per pruning rate
NOISE = ("wrong labels", "corrupted images")
NUM_EXTREMES = 3  # classes named at each end
MAX_LOST = 8  # classes named that lose everything
# coreset -> (score file it was cut from, lowest kept score)
Origins = dict[str, tuple[str | None, float | None]]


def origin(facts: Facts, coreset: Coreset) -> tuple[str | None, float | None]:
    """Return the score file a coreset was cut from, and where. Of several files with its key the
    one that explains it."""
    fits = [
        (name, _cut(scores.score_N, coreset.index_M))
        for name, scores in facts.scores.items()
        if coreset.score_key in (name, scores.key) and scores.fingerprint == coreset.fingerprint
    ]
    return min(fits, key=lambda fit: fit[1] is None, default=(None, None))


def _cut(score_N: np.ndarray, index_M: np.ndarray) -> float | None:
    """Return the lowest kept score, if the coreset is exactly the top of this score; None for any
    other selection."""
    low, high = kept_range(score_N, index_M) or (0.0, 0.0)
    return low if high == float("inf") else None


def main_score(facts: Facts, origins: Origins) -> str | None:
    """Return the score whose images are shown: TDDS before others, of several the one cut at the
    largest pruning rate."""
    largest: dict[str | None, float] = {}
    for coreset, (name, _) in origins.items():
        largest[name] = max(largest.get(name, 0), facts.coresets[coreset].pruning_rate)
    names = [name for name in facts.scores if base_key(name) != "random"]
    return max(
        names,
        key=lambda name: (base_key(name) == "tdds", is_plain(name), largest.get(name, -1)),
        default=None,
    )


def score_facts(facts: Facts, name: str, origins: Origins, slot: int) -> dict[str, Any]:
    """Return histogram and key numbers of one score file."""
    scores = facts.scores[name]
    finite_N = np.isfinite(scores.score_N)
    score_n = scores.score_N[finite_N]
    keeps_centre = default_sampler(scores) == "centre"
    found: dict[str, Any] = {
        "name": name,
        "scores": scores,
        "chart": None,
        "is_random": base_key(name) == "random",
        "keeps_centre": keeps_centre,
        "num_infinite": len(scores.score_N) - len(score_n),
    }
    if not len(score_n) or found["is_random"]:
        return found
    cut_from = [
        facts.coresets[coreset]
        for coreset, (source, _) in origins.items()
        if source == name and facts.coresets[coreset].pruning_rate > 0
    ]
    cut_from.sort(key=lambda coreset: (coreset.settings.get("sampler", ""), coreset.pruning_rate))
    bins = bins_of(score_n, NUM_BINS)
    bin_N = bins.place(scores.score_N)
    count_B = np.bincount(bin_N[finite_N], minlength=len(bins))
    strips = [_strip(coreset, scores.score_N, finite_N, bin_N, count_B) for coreset in cut_from]
    low, middle, high = (f"{value:.3g}" for value in np.quantile(score_n, [0, 0.5, 1]))
    cuts = [
        f"{strip.label} "
        + (
            f"removed below {strip.cuts[0]:.3g}"
            if len(strip.cuts) == 1
            else f"keeps {strip.cuts[0]:.3g} to {strip.cuts[1]:.3g}"
        )
        for strip in strips
        if strip.cuts
    ]
    alt = (
        f"Histogram of {len(score_n):,} {name} scores from {low} to {high}, median {middle}. "
        f"Cuts: {', '.join(cuts) or 'none'}."
        + (" The centre of the ranking is kept by default." if keeps_centre else "")
    )
    keep = "centre of the ranking" if keeps_centre else "higher"
    title = f"{name} score ({keep} = keep)" + (", log axis" if bins.is_log else "")
    below, above = bins.beyond(score_n)
    return found | {
        "chart": charts.histogram(count_B, bins, strips, slot, title, alt),
        "range": [low, middle, high],
        "has_strips": bool(strips),
        "has_draws": any(not strip.cuts for strip in strips),
        "below": (below, f"{bins.edge[0]:.3g}"),
        "above": (above, f"{bins.edge[-1]:.3g}"),
    }


def _strip(
    coreset: Coreset,
    score_N: np.ndarray,
    finite_N: np.ndarray,
    bin_N: np.ndarray,
    count_B: np.ndarray,
) -> charts.Strip:
    """Return the share of each bin that the coreset keeps, and its cut."""
    index_M = coreset.index_M[finite_N[coreset.index_M]]
    kept_B = np.bincount(bin_N[index_M], minlength=len(count_B))
    share_B = np.divide(kept_B, count_B, out=np.full(len(count_B), np.nan), where=count_B > 0)
    ends = kept_range(score_N, coreset.index_M)
    cuts = [] if ends is None else [end for end in ends if np.isfinite(end)]
    sampler = coreset.settings.get("sampler")
    words = [
        sampler if sampler not in ("top", "centre") else None,
        "balanced" if coreset.settings.get("class_balanced") else None,
        percent(coreset.pruning_rate),
    ]
    return charts.Strip(" ".join(filter(None, words)), share_B, cuts)


def kept_range(score_N: np.ndarray, index_M: np.ndarray) -> tuple[float, float] | None:
    """Return the lowest kept score, and the highest where higher ones are removed (else inf), if
    the coreset is all that lies between them, images equal to an end aside; None for any other
    selection."""
    kept_N = np.zeros(len(score_N), dtype=bool)
    kept_N[index_M] = True
    low, high = float(score_N[kept_N].min()), float(score_N[kept_N].max())
    removed_m = score_N[~kept_N]
    if not len(removed_m) or low >= float(removed_m.max()):
        return low, float("inf")
    return (low, high) if ((removed_m <= low) | (removed_m >= high)).all() else None


def known_noise(facts: Facts) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Mark the images with a wrong label, and those that are corrupted, bool [N]; None where the
    manifest does not say, or is of other labels than those that were scored or chosen."""
    manifest = facts.manifest
    own: list[Scores | Coreset] = [*facts.scores.values(), *facts.coresets.values()]
    if manifest is None or any(each.fingerprint != manifest.fingerprint for each in own):
        return None, None
    return manifest.noisy_N, manifest.corrupted_N


def noise(facts: Facts) -> dict[str, Any] | None:
    """Count the images that are known to have a wrong label and to be corrupted, and say it in a
    line; None where no image is known to have either."""
    labels, images = (0 if bad_N is None else int(bad_N.sum()) for bad_N in known_noise(facts))
    if not labels and not images:
        return None
    parts = [
        f"{num:,} {what}"
        for num, what in ((labels, "labels changed"), (images, "images corrupted"))
        if num
    ]
    text = ", ".join(parts).replace(" ", f" of {facts.manifest.num_samples:,} ", 1)
    return {"labels": labels, "images": images, "text": text}


def known_noise_kept(facts: Facts, coreset: Coreset) -> list[float | None]:
    """Return the shares of the wrong labels and of the corrupted images that the coreset keeps;
    None where none are known."""
    return [
        None if bad_N is None or not bad_N.any() else noise_kept(coreset.index_M, bad_N)[0]
        for bad_N in known_noise(facts)
    ]


def noise_table(facts: Facts, slots: dict[str, int]) -> dict[str, Any] | None:
    """Return how much of the known noise every coreset keeps, by kind, beside what a random one is
    expected to keep; None where there is no coreset, or no image is known to be noisy."""
    heads = coreset_labels(facts)
    coresets = {
        name: coreset for name, coreset in facts.coresets.items() if coreset.pruning_rate > 0
    }
    kinds = _kinds_of_noise(facts)
    if not kinds or not coresets:
        return None
    kept = {
        name: {kind: noise_kept(coreset.index_M, bad_N) for kind, bad_N in kinds.items()}
        for name, coreset in coresets.items()
    }
    rows = [
        (
            name,
            heads[name],
            coreset.pruning_rate,
            len(coreset.index_M) / coreset.fingerprint.num_samples,
            [kept[name][kind] for kind in kinds],
        )
        for name, coreset in coresets.items()
    ]
    columns = [
        (kind, int(bad_N.sum()), float(bad_N.mean()), kind in NOISE)
        for kind, bad_N in kinds.items()
    ]
    drawn = [_noise_chart(facts, kind, kept, slots) for kind in kinds if kind in NOISE]
    return {"columns": columns, "rows": rows, "charts": drawn}


def _kinds_of_noise(facts: Facts) -> dict[str, np.ndarray]:
    """Mark noisy samples, bool [N], by what is wrong with them; each kind of corruption after all
    corrupted ones. Kinds without any are left out."""
    noisy_N, corrupted_N = known_noise(facts)
    kinds = dict(zip(NOISE, (noisy_N, corrupted_N), strict=True))
    if corrupted_N is not None and len(by_kind := facts.manifest.corruption_kinds) > 1:
        kinds |= {name.replace("_", " "): bad_N for name, bad_N in by_kind.items()}
    return {kind: bad_N for kind, bad_N in kinds.items() if bad_N is not None and bad_N.any()}


def _noise_chart(
    facts: Facts, kind: str, kept: dict[str, dict[str, tuple[float, float]]], slots: dict[str, int]
) -> dict[str, Any]:
    """Draw the share kept of one kind of noise against the pruning rate, a line per way of
    choosing; several draws are averaged."""
    # (method, colour, another sampler than the score's)
    groups: dict[tuple[str, int, bool], dict[float, list[float]]] = {}
    for name, of_kind in kept.items():
        coreset = facts.coresets[name]
        method = facts.names.get(coreset.method, coreset.method)
        slot = slots.get(
            method, slots.get(facts.names.get(coreset.score_key, coreset.score_key), 0)
        )
        line = groups.setdefault((method, slot, coreset.method != coreset.score_key), {})
        line.setdefault(coreset.pruning_rate, []).append(100 * of_kind[kind][0])
    rates = sorted({rate for by_rate in groups.values() for rate in by_rate})
    lines = [
        charts.Line(
            method,
            [100 * rate for rate in sorted(by_rate)],
            [float(np.mean(by_rate[rate])) for rate in sorted(by_rate)],
            slot,
            dashed=dashed,
            marker="o",
        )
        for (method, slot, dashed), by_rate in groups.items()
    ]
    expected = charts.Line(
        "expected at random",
        [100 * rate for rate in rates],
        [100 * (1 - rate) for rate in rates],
        99,
        dashed=True,
    )
    title = f"{kind} kept (%)"
    numbers = charts.points_text([*lines, expected], "{:.3g} % at {:g} %")
    alt = f"{title} against pruning rate. {numbers}."
    return {
        "svg": charts.line_chart([expected, *lines], title, "images removed", alt, ticks="{:g} %"),
        "legend": [*lines, expected],
    }


def class_table(facts: Facts, main: str | None, origins: Origins) -> dict[str, Any] | None:
    """Return the share of each class that each coreset keeps, in percent, None for a class without
    images: `panels` of a title, coresets (name and heading) and rows, and per coreset the classes
    at either end."""
    labels = next(
        (scores.label_N for scores in facts.scores.values() if scores.fingerprint.labels_sha256),
        None,
    )
    if labels is None or not facts.coresets:
        return None
    num_classes = max(facts.config.get("data", {}).get("num_classes") or 0, int(labels.max()) + 1)
    shortened = num_classes * len(facts.coresets) > MAX_CLASS_CELLS
    coresets = {
        name: coreset
        for name, coreset in facts.coresets.items()
        if coreset.pruning_rate > 0 and (not shortened or origins[name][0] in (main, None))
    }
    heads, names = coreset_labels(facts), [class_name(facts, label) for label in range(num_classes)]
    total_C = np.bincount(labels, minlength=num_classes).tolist()
    share = {
        name: 100 * keep_rates(coreset.index_M, labels, num_classes)
        for name, coreset in coresets.items()
    }
    if len(coresets) > MAX_CLASS_COLUMNS:
        rates = sorted({coreset.pruning_rate for coreset in coresets.values()})
        panels = [
            (percent(rate), [name for name in coresets if coresets[name].pruning_rate == rate])
            for rate in rates
        ]
    else:
        panels = [("", [*coresets])] if coresets else []
    cells = {
        name: [None if np.isnan(value) else round(value, 1) for value in share[name].tolist()]
        for name in coresets
    }
    return {
        "num_classes": num_classes,
        "shortened": shortened,
        "panels": [
            (
                title,
                [(name, heads[name]) for name in members],
                list(
                    zip(
                        names,
                        total_C,
                        zip(*(cells[name] for name in members), strict=True),
                        strict=True,
                    )
                ),
            )
            for title, members in panels
        ],
        "extremes": [
            _extremes(heads[name], coreset, share[name], names)
            for name, coreset in coresets.items()
        ],
    }


def _extremes(head: str, coreset: Coreset, share_C: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Return the classes that lose most and least of theirs by one coreset; ties in the order of
    the labels."""
    order = np.argsort(share_C, kind="stable")
    order = order[~np.isnan(share_C[order])]
    lost = [names[label] for label in order if share_C[label] == 0]
    low, middle, high = np.quantile(share_C[order], [0, 0.5, 1]).tolist()
    left = order[len(lost) :]  # those that keep something
    end = max(len(left) - NUM_EXTREMES, NUM_EXTREMES)  # no class stands at both ends
    return {
        "head": head,
        "kept": 100 * len(coreset.index_M) / coreset.fingerprint.num_samples,
        "num_lost": len(lost),
        "lost": lost[:MAX_LOST],
        "low": low,
        "middle": middle,
        "high": high,
        "least": [(names[label], share_C[label]) for label in left[:NUM_EXTREMES]],
        "most": [(names[label], share_C[label]) for label in left[end:][::-1]],
    }


def coreset_labels(facts: Facts) -> dict[str, str]:
    """Return a short heading for each coreset, its file name where two would share one."""
    labels = {}
    for name, coreset in facts.coresets.items():
        balanced = " balanced" if coreset.settings.get("class_balanced") else ""
        method = coreset.method.removesuffix("_balanced")
        labels[name] = (
            f"{facts.names.get(method, method)} {percent(coreset.pruning_rate)}{balanced}"
        )
    taken = list(labels.values())
    return {name: label if taken.count(label) == 1 else name for name, label in labels.items()}


def class_name(facts: Facts, label: int) -> str:
    names = getattr(facts.manifest, "class_names", None) or ()
    return valid_utf8(str(names[label])) if 0 <= label < len(names) else f"class {label}"


def valid_utf8(name: str) -> str:
    """Return a file's or folder's name with "?" for bytes that are no UTF-8."""
    return name.encode("utf-8", "replace").decode()
