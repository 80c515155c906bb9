"""The report stage: run directories in, one HTML page out that loads nothing from anywhere.

Reads what the other stages left behind and computes nothing that a stage should have computed. What is missing (no
scores yet, a `.beton` that moved, an unfinished retraining) is said on the page instead of failing.

Nothing is embedded per sample except the thumbnails: histograms are binned and class tables are counts, so that
1.28 million samples give a page of the same size as a thousand.
"""

# N dataset, M kept samples, C classes

import base64
import io
import json
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from tdds_dist import charts
from tdds_dist.agreement import noise_kept
from tdds_dist.artifacts import Coreset, require_same_dataset, write_atomically
from tdds_dist.errors import InputError
from tdds_dist.published import base_key, is_plain
from tdds_dist.rundir import RunDir
from tdds_dist.summary import (
    FULL_DATA,
    Facts,
    Retrained,
    count,
    decimal,
    format_summary,
    percent,
    plus_minus,
    read_facts,
    signed,
    summary_rows,
    summary_table,
)

__all__ = ["build_report", "format_summary", "summary_table"]

THUMBNAIL_PIXELS = 112
PIXELATED_UP_TO = 64  # images up to this size are embedded as they are and shown with their pixels
MAX_CLASS_CELLS = 20_000  # of the per-class table; beyond it only the main score's coresets are listed
MAX_LEGEND = 12  # curves; beyond it the legend names scores and strategies instead of runs

FULL_SLOT = 99  # colour of the full data: the ink of the page
_SLOTS = {"random": 0, "tdds": 1, "entropy": 2, "forgetting": 3, "el2n": 4, "aum": 5, "moderate": 6, "dyn_unc": 7,
          "dual": 8, "ccs": 9}
Origins = dict[str, tuple[str | None, float | None]]  # coreset -> (score file it was cut from, lowest kept score)
_MARKERS = {"batch": "s", "sample": "^"}  # by importance, else a dot


def build_report(runs: list[RunDir], out: Path, num_thumbnails: int = 24) -> Path:
    """Write one self-contained HTML page about `runs` to `out`, with at most `num_thumbnails` images per sheet.

    Raises InputError when there is no run, or one of them is not a run directory.
    """
    if not runs:
        raise InputError("report got no run directory; name at least one, e.g. `tdds report runs/demo`")
    import jinja2

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"count": count, "percent": percent, "decimal": decimal, "signed": signed, "plus_minus": plus_minus,
                     "duration": duration}
    template = page.from_string(files("tdds_dist").joinpath("report.html.j2").read_text(encoding="utf-8"))
    sections = [_section(read_facts(run), num_thumbnails) for run in runs]
    text = template.render(sections=sections, written=time.strftime("%Y-%m-%d %H:%M"))

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    write_atomically(Path(out), write)
    return Path(out)


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 10 s, 5 h 12 min."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _section(facts: Facts, num_thumbnails: int) -> dict[str, Any]:
    """Everything the template shows about one run."""
    rows = summary_rows(facts)
    slots = _colour_slots([*facts.names.values()])
    origins = {name: _origin(facts, coreset) for name, coreset in facts.coresets.items()}
    main = _main_score(facts, origins)
    data, result = facts.config.get("data", {}), facts.result or {}
    sizes = [result.get("num_images"), *(scores.fingerprint.num_samples for scores in facts.scores.values())]
    return {
        "name": facts.config.get("run", {}).get("name") or facts.run.path.name,
        "dataset": _dataset_name(str(getattr(facts.manifest, "source", "")), str(data.get("train", "?"))),
        "num_images": next((size for size in sizes if size is not None), None), "num_classes": data.get("num_classes"),
        "model": facts.config.get("model", {}).get("name", "?"), "train": facts.config.get("train", {}),
        "seed": facts.config.get("run", {}).get("seed"), "env": facts.env, "result": facts.result,
        "rows": rows, "finding": _finding(rows), "published": facts.published, "problems": facts.problems,
        "accuracy": _accuracy_chart(rows, slots), "curves": _curve_charts(facts, slots),
        "scores": [_score_facts(facts, name, origins, slots[facts.names[name]]) for name in facts.scores], "main": main,
        "coresets": [(name, coreset, *origins[name], _noise_kept(facts, coreset)) for name, coreset in facts.coresets.items()],
        "noise": _noise(facts),
        "sheets": _sheets(facts, main, origins, num_thumbnails), "classes": _class_table(facts, main, origins),
        "speed": _speed(facts),
        "config_text": yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True),
        "env_text": json.dumps(facts.env, indent=2, ensure_ascii=False),
    }


def _dataset_name(source: str, beton: str) -> str:
    """The source's name without the folders above it, or the file's."""
    kind, _, folder = source.partition(":")
    return f"{kind}: {Path(folder).name}" if "/" in folder else source or Path(beton).name


def _finding(rows: list[dict[str, Any]]) -> str | None:
    """One sentence about the largest pruning rate: always that rate and the same scores, so nothing is picked."""
    done = [row for row in rows if row["pruning_rate"] and row["final_top1"] is not None]
    rate = max((row["pruning_rate"] for row in done), default=None)
    done = [row for row in done if row["pruning_rate"] == rate]
    if len(done) > 4:
        done = [row for row in done if base_key(row["score"]) in ("tdds", "random")]
    if not done:
        return None
    parts = [f"{row['final_top1']:.2f} % with {_setting(row['score_name'], row['strategy'], row['importance'])}"
             for row in done]
    full = next((f" The full data gives {row['final_top1']:.2f} %." for row in rows if row["is_reference"]), "")
    text = f"With {percent(rate)} of the images removed, top-1 is {'; '.join(parts)}.{full}"
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace("top-1", "top\N{NON-BREAKING HYPHEN}1")


def _setting(score: str, strategy: str | None, importance: str | None) -> str:
    """tdds (Strategy-E, importance batch)."""
    weighted = f", importance {importance}" if importance not in (None, "none") else ""
    return f"{score} (Strategy-{strategy or '?'}{weighted})"


# ---------------------------------------------------------------------------------------------------------- charts


def _colour_slots(keys: Sequence[str]) -> dict[str, int]:
    """A colour per score: the well-known ones keep theirs, variants (`tdds_balanced`) take what is left."""
    slots = {FULL_DATA: FULL_SLOT} | {key: _SLOTS[key] for key in keys if key in _SLOTS}
    for key in keys:
        if key not in slots:
            free = [slot for slot in (_SLOTS.get(base_key(key), 1), *range(1, 10)) if slot not in slots.values()]
            slots[key] = free[0] if free else 1 + len(slots) % 9
    return slots


def _accuracy_chart(rows: list[dict[str, Any]], slots: dict[str, int]) -> dict[str, Any] | None:
    """Final top-1 against the pruning rate, one line per score, strategy and importance."""
    groups: dict[tuple[str, str | None, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        if row["score"] != FULL_DATA and row["pruning_rate"] is not None and row["final_top1"] is not None:
            groups.setdefault((row["score_name"], row["strategy"], row["importance"]), []).append(row)
    lines = []
    for (score, strategy, importance), group in groups.items():
        lines.append(charts.Line(
            _setting(score, strategy, importance), slot=slots[score],
            x=[100 * row["pruning_rate"] for row in group], y=[row["final_top1"] for row in group],
            error=[row["final_top1_std"] or 0 for row in group],
            dashed=strategy == "P", marker=_MARKERS.get(importance or "", "o"),
        ))
    if not lines:
        return None
    full = next((row["final_top1"] for row in rows if row["is_reference"]), None)
    alt = "Final top-1 against pruning rate. " + "; ".join(
        f"{line.label}: " + ", ".join(f"{y:.2f} % at {x:g} %" for x, y in zip(line.x, line.y, strict=True))
        for line in lines) + (f"; full data {full:.2f} %." if full is not None else ".")
    svg = charts.line_chart(lines, "final top-1 (%)", "images removed", alt, full, percent_x=True)
    return {"svg": svg, "legend": lines, "full": full}


def _curve_charts(facts: Facts, slots: dict[str, int]) -> dict[str, Any] | None:
    """Validation top-1 and training loss by epoch, of the collection run and every retraining."""
    runs = [("collect (full data)", FULL_SLOT, 1.0, False, facts.metrics)]
    for sub in facts.retrained:
        rate = sub.setting.get("pruning_rate") or 0.0
        slot, opacity = slots[facts.names[sub.score]], 1 - 0.6 * rate if rate else 0.55
        runs.append((_run_label(facts, sub), slot, opacity, sub.strategy == "P", sub.metrics))
    found: dict[str, Any] = {}
    for key, title in (("val_top1", "validation top-1 (%)"), ("train_loss", "training loss")):
        lines = []
        for label, slot, opacity, dashed, metrics in runs:
            points = [(record["epoch"], record[key]) for record in metrics if record.get(key) is not None]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(charts.Line(label, x, y, slot, dashed=dashed, opacity=opacity))
        if lines:
            last = ", ".join(f"{line.label} {line.y[-1]:.4g}" for line in lines)
            alt = f"{title} by epoch. Last values: {last}."
            svg = charts.line_chart(lines, title, "epoch", alt, may_be_log=key == "train_loss")
            found[key] = {"svg": svg, "legend": lines}
    if not found:
        return None
    legend = max((chart["legend"] for chart in found.values()), key=len)
    if len(legend) > MAX_LEGEND:
        names = {slot: key for key, slot in slots.items()}
        groups = dict.fromkeys((line.slot, line.dashed) for line in legend)
        legend = [charts.Line(names[slot] + (", Strategy-P" if dashed else ""), (), (), slot, dashed=dashed)
                  for slot, dashed in groups]
    return {"charts": list(found.values()), "legend": legend}


def _run_label(facts: Facts, sub: Retrained) -> str:
    """tdds 50 %, E, batch, seed 0. The name of the directory where nothing else is known."""
    rate, importance, seed = (sub.setting.get(key) for key in ("pruning_rate", "importance", "seed"))
    pruned = f" {percent(rate)}" if rate else ""
    label = f"{facts.names[sub.score]}{pruned}, {sub.strategy}, {importance}, seed {seed}"
    return (sub.name if None in (rate, sub.strategy) else label) + ("" if sub.result else " (unfinished)")


def _coreset_labels(facts: Facts) -> dict[str, str]:
    """A short heading for each coreset, its file name where two would share one."""
    labels = {}
    for name, coreset in facts.coresets.items():
        balanced = " balanced" if coreset.settings.get("class_balanced") else ""
        method = coreset.method.removesuffix("_balanced")
        labels[name] = f"{facts.names.get(method, method)} {percent(coreset.pruning_rate)}{balanced}"
    taken = list(labels.values())
    return {name: label if taken.count(label) == 1 else name for name, label in labels.items()}


def _score_facts(facts: Facts, name: str, origins: Origins, slot: int) -> dict[str, Any]:
    """Histogram and key numbers of one score file."""
    from tdds_dist.select import default_sampler

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


# ------------------------------------------------------------------------------------------------ scores and coresets


def _cut(score_N: np.ndarray, index_M: np.ndarray) -> float | None:
    """The lowest kept score, if the coreset is exactly the top of this score; None for any other selection."""
    kept_N = np.zeros(len(score_N), dtype=bool)
    kept_N[index_M] = True
    lowest = float(score_N[kept_N].min())
    return lowest if kept_N.all() or lowest >= float(score_N[~kept_N].max()) else None


def _origin(facts: Facts, coreset: Coreset) -> tuple[str | None, float | None]:
    """The score file a coreset was cut from, and where. Of several files with its key the one that explains it."""
    fits = [(name, _cut(scores.score_N, coreset.index_M)) for name, scores in facts.scores.items()
            if coreset.score_key in (name, scores.key) and scores.fingerprint == coreset.fingerprint]
    return min(fits, key=lambda fit: fit[1] is None, default=(None, None))


def _main_score(facts: Facts, origins: Origins) -> str | None:
    """The score whose images are shown: TDDS before others, of several the one cut at the largest pruning rate."""
    largest: dict[str | None, float] = {}
    for coreset, (name, _) in origins.items():
        largest[name] = max(largest.get(name, 0), facts.coresets[coreset].pruning_rate)
    names = [name for name in facts.scores if base_key(name) != "random"]
    return max(names, key=lambda name: (base_key(name) == "tdds", is_plain(name), largest.get(name, -1)), default=None)


def _known_noise(facts: Facts) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which images have a wrong label, and which are corrupted, bool [N]; None where the manifest does not say, or is of
    other labels than those that were scored."""
    manifest = facts.manifest
    if manifest is None:
        return None, None
    if any(scores.fingerprint != manifest.fingerprint for scores in facts.scores.values()):
        return None, None
    return manifest.noisy_N, manifest.corrupted_N


def _noise(facts: Facts) -> dict[str, Any] | None:
    """How many images are known to have a wrong label, how many to be corrupted, and a line that says it; None where no
    image is known to have either."""
    labels, images = (0 if bad_N is None else int(bad_N.sum()) for bad_N in _known_noise(facts))
    if not labels and not images:
        return None
    parts = [f"{num:,} {what}" for num, what in ((labels, "labels changed"), (images, "images corrupted")) if num]
    text = ", ".join(parts).replace(" ", f" of {facts.manifest.num_samples:,} ", 1)
    return {"labels": labels, "images": images, "text": text}


def _noise_kept(facts: Facts, coreset: Coreset) -> list[float | None]:
    """Shares of the wrong labels and of the corrupted images that the coreset keeps; None where none are known."""
    return [None if bad_N is None or not bad_N.any() else noise_kept(coreset.index_M, bad_N)[0]
            for bad_N in _known_noise(facts)]


def _class_table(facts: Facts, main: str | None, origins: Origins) -> dict[str, Any] | None:
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
    rows = [(_class_name(facts, label), int(total_C[label]), [round(float(share[name][label]), 1) for name in share])
            for label in range(num_classes)]
    heads = _coreset_labels(facts)
    return {"coresets": [(name, heads[name]) for name in coresets], "rows": rows, "shortened": shortened}


def _class_name(facts: Facts, label: int) -> str:
    names = getattr(facts.manifest, "class_names", None) or ()
    return str(names[label]) if 0 <= label < len(names) else f"class {label}"


# ------------------------------------------------------------------------------------------------------- thumbnails


def _sheets(facts: Facts, main: str | None, origins: Origins, num_thumbnails: int) -> dict[str, Any]:
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
    noisy_N, corrupted_N = _known_noise(facts)

    def bad(bad_N: np.ndarray | None, number: int) -> bool:
        return bad_N is not None and bool(bad_N[number])

    return {
        number: {"src": _data_uri(image), "pixelated": max(image.shape[:2]) <= PIXELATED_UP_TO, "index": number,
                 "path": str(paths[number]) if paths else f"image {number}", "score": f"{scores.score_N[number]:.4g}",
                 "class_name": _class_name(facts, int(scores.label_N[number])),
                 "true_class": _class_name(facts, int(facts.manifest.true_label_N[number])) if bad(noisy_N, number) else None,
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


# ------------------------------------------------------------------------------------------------------- throughput


def _speed(facts: Facts) -> list[dict[str, Any]]:
    """Medians over epochs, without the first one where there are others: it pays for compilation and cold caches."""
    runs: list[tuple[str, dict[str, Any] | None, list[dict[str, Any]], dict[str, Any]]] = [
        ("collect", facts.result, facts.metrics, facts.env)]
    runs += [(_run_label(facts, sub), sub.result, sub.metrics, sub.env) for sub in facts.retrained]
    rows = []
    for name, result, metrics, env in runs:
        warm = metrics[1:] or metrics

        def median(key: str, warm: list[dict[str, Any]] = warm) -> float | None:
            values = [record[key] for record in warm if record.get(key) is not None]
            return float(np.median(values)) if values else None

        rows.append({
            "name": name, "epochs": len(metrics), "world_size": env.get("world_size"),
            "images_per_second": median("images_per_second"), "epoch_seconds": median("epoch_seconds"),
            "scoring_share": median("scoring_share") if name == "collect" else None,
            "memory_bytes": median("memory_bytes"),
            "train_seconds": (result or {}).get("train_seconds"),
        })
    return rows
