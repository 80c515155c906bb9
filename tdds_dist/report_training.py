"""Sections of the report about training runs: accuracy, learning curves, throughput.

Owns what those sections show; files were read by `summary`. Gives plain values and SVG to the templates in `page/`.
"""

from typing import Any

import numpy as np

from tdds_dist import charts
from tdds_dist.summary import FULL_DATA, Facts, Retrained, percent

MAX_LEGEND = 12  # curves; beyond it the legend names scores and strategies instead of runs
FULL_SLOT = 99  # colour of the full data: the ink of the page
_MARKERS = {"batch": "s", "sample": "^"}  # by importance, else a dot


def accuracy_chart(rows: list[dict[str, Any]], slots: dict[str, int]) -> dict[str, Any] | None:
    """Final top-1 against the pruning rate, one line per score, strategy and importance."""
    groups: dict[tuple[str, str | None, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        if row["score"] != FULL_DATA and row["pruning_rate"] is not None and row["final_top1"] is not None:
            groups.setdefault((row["score_name"], row["strategy"], row["importance"]), []).append(row)
    lines = []
    for (score, strategy, importance), group in groups.items():
        lines.append(charts.Line(
            setting(score, strategy, importance), slot=slots[score],
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


def setting(score: str, strategy: str | None, importance: str | None) -> str:
    """tdds (Strategy-E, importance batch)."""
    weighted = f", importance {importance}" if importance not in (None, "none") else ""
    return f"{score} (Strategy-{strategy or '?'}{weighted})"


def curve_charts(facts: Facts, slots: dict[str, int]) -> dict[str, Any] | None:
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


def speed(facts: Facts) -> list[dict[str, Any]]:
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
