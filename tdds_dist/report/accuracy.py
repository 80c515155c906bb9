"""The headlines of the report: final top-1 against the pruning rate, as a matrix, a chart and a
sentence, and against the images seen.

Owns what is shown of the rows of `results`, and of the trainings that prune inside; reads nothing.
A cell that is missing or unfinished stays visible.
"""

from collections.abc import Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any

from tdds_dist.config.prune import READS, Prune
from tdds_dist.config.scores import base_key, is_plain
from tdds_dist.report import charts
from tdds_dist.report.published import footnotes
from tdds_dist.report.read import FULL_DATA, Facts, grouped, with_several
from tdds_dist.report.results import run_name, summary_rows
from tdds_dist.runs.identity import DECIDES, kind_of, setting_of
from tdds_dist.text import MISSING, count, mean_std, percent, plus_minus, signed, table

# the sentence is about this pruning rate where it was retrained at, else about the largest
ASKED_RATE = 0.8
MAX_NAMED = 4  # settings in the sentence; of more, TDDS and random
MAX_TDDS = 3  # of these, so that random has a place
MARKERS = {"batch": "s", "sample": "^"}  # by importance, else a dot


def matrix(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Arrange the rows of `summary_rows` as settings in rows and pruning rates in columns.

    `rates`: the columns; `full`: the rows of the full data; `unknown`: those of which the rate is
    not known; `lines`: a dict per setting with `score`, `name`, `detail` (strategy, importance) and
    `cells`, one per rate: None, or the row with `is_best` (highest of its column, strategy and
    network) and `num_unfinished`; `num_seeds`: the largest number of trainings behind a cell;
    `notes`: where the numbers of the paper are from.
    """
    rows = _told_apart(rows)
    pruned = [row for row in rows if row["pruning_rate"]]
    rates = sorted({row["pruning_rate"] for row in pruned})
    lines = []
    for (name, *_), group in grouped(pruned, _setting).items():
        at_rate = grouped(group, itemgetter("pruning_rate"))
        lines.append(
            {
                "score": group[0]["score"],
                "name": name,
                "detail": _detail(group[0]),
                "cells": [_cell(at_rate.get(rate, [])) for rate in rates],
            }
        )
    columns = list(zip(*(line["cells"] for line in lines), strict=True))
    for cells in columns:
        _mark_best(cells)
    num_seeds = [
        len(cell["values"]) for cells in columns for cell in cells if cell and not cell["is_open"]
    ]
    return {
        "rates": rates,
        "full": [row for row in rows if row["pruning_rate"] == 0],
        "lines": lines,
        "unknown": [row for row in rows if row["pruning_rate"] is None],
        "num_seeds": max(num_seeds, default=0),
        "notes": footnotes(row["published"] for row in rows),
    }


def _told_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `told_epochs`: the epochs of a row where they alone distinguish it from another."""
    setting = itemgetter("score_name", "strategy", "importance", "variant", "runs", "pruning_rate")
    several = with_several(
        (setting(row), row["epochs"]) for row in rows if row["status"] == "finished"
    )
    return [
        row | {"told_epochs": row["epochs"] if setting(row) in several else None} for row in rows
    ]


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the name of a row, and what is told with it."""
    name = row["score_name"] if row["score"] != "?" else row["name"]
    epochs = row["told_epochs"] and f"{row['told_epochs']} epochs"
    return name, row["strategy"], row["importance"], row["variant"], epochs, row["runs"]


def _detail(row: dict[str, Any]) -> str:
    """Describe a setting: E, batch, train.lr=0.02, 60 epochs, seed0 and seed1."""
    _, strategy, importance, *more = _setting(row)
    return ", ".join(filter(None, [strategy, strategy and (importance or "none"), *more]))


def _cell(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return one place of the matrix: the finished row, or how far the others got."""
    if not rows:
        return None
    done = [row for row in rows if row["final_top1"] is not None]
    cell = (done or rows)[0]
    return cell | {"is_best": False, "is_open": not done, "num_unfinished": len(rows) - len(done)}


def _mark_best(cells: Sequence[dict[str, Any] | None]) -> None:
    """Mark the highest of each strategy and network, where there is a choice; cells that show the
    same number are marked too.
    """
    closed = [cell for cell in cells if cell and not cell["is_open"]]
    rivals = grouped(closed, lambda cell: (cell["strategy"], *cell["score"].split(" on ")[1:]))
    for group in rivals.values():
        best = max(round(cell["final_top1"], 2) for cell in group)
        for cell in group:
            cell["is_best"] = len(group) > 1 and round(cell["final_top1"], 2) == best


def accuracy_chart(rows: list[dict[str, Any]], slots: dict[str, int]) -> dict[str, Any] | None:
    """Draw final top-1 against the pruning rate, one line per score, strategy, importance and
    whatever else they differ in."""
    drawn = [
        row
        for row in _told_apart(rows)
        if row["score"] != FULL_DATA and None not in (row["pruning_rate"], row["final_top1"])
    ]
    lines = list[charts.Line]()
    for (_, strategy, importance, *more, runs), group in grouped(drawn, _setting).items():
        group.sort(key=lambda row: row["pruning_rate"])
        score = group[0]["score_name"]
        look = (slots[score], strategy == "P")
        label = setting(score, strategy, importance, *more)
        lines.append(
            charts.Line(
                label + (f" in {runs}" if runs else ""),
                slot=slots[score],
                series=f"a{len(lines)}",
                x=[100 * row["pruning_rate"] for row in group],
                y=[row["final_top1"] for row in group],
                error=[row["final_top1_std"] or 0 for row in group],
                dashed=strategy == "P",
                marker=free_marker(
                    importance, [line.marker for line in lines if (line.slot, line.dashed) == look]
                ),
            )
        )
    if not lines:
        return None
    references = [row["final_top1"] for row in rows if row["is_reference"]]
    full = references[0] if len(references) == 1 else None
    numbers = charts.points_text(lines, "{:.2f} % at {:g} %")
    numbers += f"; full data {full:.2f} %" if full is not None else ""
    alt = f"Final top-1 against pruning rate. {numbers}."
    svg = charts.line_chart(lines, "final top-1 (%)", "images removed", alt, full, ticks="{:g} %")
    return {"svg": svg, "legend": lines, "full": full}


def free_marker(importance: str | None, taken: list[str]) -> str:
    """Return the marker of an importance, or another one where a line of the same colour and dash
    has it already."""
    wanted = MARKERS.get(importance or "", "o")
    return next(
        (marker for marker in (wanted, "o", *MARKERS.values()) if marker not in taken), wanted
    )


def setting(
    score: str, strategy: str | None, importance: str | None, *more: str | int | None
) -> str:
    """Describe a setting: tdds (Strategy-E, importance batch, train.lr=0.02, 60 epochs)."""
    weighted = f"importance {importance}" if importance not in (None, "none") else ""
    parts = [f"Strategy-{strategy or '?'}", weighted, *more]
    return f"{score} ({', '.join(str(part) for part in parts if part)})"


def finding(rows: list[dict[str, Any]]) -> str | None:
    """Say in a sentence what one pruning rate costs: 80 % where it was retrained at, else the
    largest.

    The rate and the scores do not depend on the numbers, so the choice favours none.
    """
    done = [row for row in rows if row["pruning_rate"] and row["final_top1"] is not None]
    rates = {row["pruning_rate"] for row in done}
    rate = ASKED_RATE if ASKED_RATE in rates else max(rates, default=None)
    done = [row for row in done if row["pruning_rate"] == rate]
    if len(done) > MAX_NAMED:
        done = _most_asked(done)
    if not done:
        return None
    full = [row["final_top1"] for row in rows if row["is_reference"]]
    parts = [_cost(row, _name_among(row, done)) for row in _told_apart(done)]
    if len(full) == 1:
        text = (
            f"The full data gives a top-1 of {full[0]:.2f} %. Removing {percent(rate)} of the"
            f" images {'; it '.join(parts)}."
        )
    else:
        text = f"With {percent(rate)} of the images removed, top-1 is {'; '.join(parts)}."
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace("top-1", "top\N{NON-BREAKING HYPHEN}1")


def _most_asked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose of many rows TDDS, as the paper has it where there is one, and random; where neither
    is there, the first."""
    tdds, random = (
        [row for row in rows if base_key(row["score"]) == score] for score in ("tdds", "random")
    )
    main = min(
        [*tdds, *random] or rows, key=lambda row: (not is_plain(row["score"]), row["variant"] != "")
    )

    def order(row: dict[str, Any]) -> tuple[bool, ...]:
        return (
            not is_plain(row["score"]),
            row["variant"] != "",
            *(row[key] != main[key] for key in ("runs", "strategy", "importance")),
        )

    named = sorted(tdds, key=order)[: MAX_TDDS if random else MAX_NAMED]
    return [*named, *sorted(random, key=order)[: MAX_NAMED - len(named)]] or rows[:MAX_NAMED]


def _name_among(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Name a row among others: tdds (importance batch, 60 epochs) in seed0, with what differs among
    the rows."""
    strategy, importance = (
        len({other[key] for other in rows}) > 1 for key in ("strategy", "importance")
    )
    *_, variant, epochs, runs = _setting(row)
    is_told = (
        row["importance"] not in (None, "none")
        or [other["score"] for other in rows].count(row["score"]) > 1
    )
    parts = [
        strategy and f"Strategy-{row['strategy'] or '?'}",
        importance and is_told and f"importance {row['importance'] or 'none'}",
        variant,
        epochs,
    ]
    told = ", ".join(part for part in parts if part)
    return row["score_name"] + (f" ({told})" if told else "") + (f" in {runs}" if runs else "")


def _cost(row: dict[str, Any], name: str) -> str:
    """Write a cost: "costs 2.50 points with tdds, down to 96.67 %"."""
    final, change = f"{row['final_top1']:.2f} %", row["difference"]
    if change is None:
        return f"{final} with {name}"
    if round(abs(change), 2) == 0:
        return f"costs nothing with {name}, at {final}"
    if change < 0:
        return f"costs {-change:.2f} points with {name}, down to {final}"
    return f"gains {change:.2f} points with {name}, up to {final}"


# ---- against the images seen


SAME_BUDGET = 3.0  # percentage points of images between trainings that are compared with each other
_ALL_IMAGES = "all images"


def training_rows(pool: Sequence[Facts]) -> list[dict[str, Any]]:
    """Return a row for each setting of `tdds train` among the runs of the same data, seeds
    averaged, and for each setting of retrainings of a collection, with the images that all of it
    saw; [] where nothing was pruned inside a training.

    Keys of a row: `family` (name without the rate, the epochs, or that it is the random twin),
    `name`, `is_twin`, `images` (mean over seeds; of a retraining with the T epochs of the
    collection that its score looks at), `share` (percent of the longest of these trainings, had it
    seen all images in each epoch), `epochs`, `seeds`, `final_top1`, `final_top1_std`, `to_twin` and
    `to_full` (difference of final top-1 to the random twin, and to the training on all images whose
    share is nearest, at most SAME_BUDGET away; None without one), `num_unfinished`.
    """
    groups = grouped(
        (facts for facts in pool if facts.is_pruned_training),
        lambda facts: tuple(sorted(setting_of(facts.config, "train").items())),
    )
    if not groups:
        return []
    settings = [dict(key) for key in groups]
    differing = [
        name
        for name in sorted({name for own in settings for name in own})
        for section, _, key_of in [name.partition(".")]
        if section != "prune"
        and name != "train.epochs"
        and kind_of(section, key_of, "train") == DECIDES  # not how often it evaluates
        and len({own.get(name) for own in settings}) > 1
    ]
    rows = {}
    for own, (key, group) in zip(settings, groups.items(), strict=True):
        rest = "".join(f", {name}={own.get(name)}" for name in differing)
        rows[key] = _training_row(group, rest) | {"rest": rest}
    for key, row in rows.items():
        twin = rows.get(tuple(sorted((dict(key) | {"prune.twin": "true"}).items())))
        row["to_twin"] = None if row["is_twin"] else _to(row, twin)
    full = max(row["of_full"] for row in rows.values())
    found = [*rows.values(), *_retraining_rows(pool)]
    for row in found:
        row["share"] = 100 * row["images"] / full if row["images"] and full else None
    whole = [row for row in rows.values() if row["family"].startswith(_ALL_IMAGES)]
    for row in found:
        near = [
            other
            for other in whole
            if row["share"]
            and other["share"]
            and other["rest"] == row.get("rest", "")
            and abs(other["share"] - row["share"]) <= SAME_BUDGET
        ]
        rival = min(near, key=lambda other: abs(other["share"] - row["share"]), default=None)
        row["to_full"] = None if row in whole else _to(row, rival)
    return sorted(found, key=lambda row: (row not in whole, row["family"]))


def _to(row: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    if other is None or None in (row["final_top1"], other["final_top1"]):
        return None
    return float(row["final_top1"] - other["final_top1"])


def _training_row(group: Sequence[Facts], rest: str) -> dict[str, Any]:
    """Return the row of one setting; `rest` is what it has besides `prune.*` and epochs, where
    others have something else."""
    prune = group[0].config.get("prune", {})
    method, epochs = prune.get("method", "none"), group[0].config.get("train", {}).get("epochs")
    usual = Prune(method=method).model_dump() if method in READS else {}
    # a key that the config of an older version lacks has its default
    own = {
        key: prune[key] for key in READS.get(method, ()) if prune.get(key, usual[key]) != usual[key]
    }
    is_twin, rate = bool(own.pop("twin", False)), own.pop("rate", None)
    own.pop("twin_of", None)
    family = method + "".join(f", {key} {value}" for key, value in own.items()) + rest
    name = f"{family}, rate {rate:g}" if rate is not None else family
    if method == "none":
        family, name = _ALL_IMAGES + rest, f"{_ALL_IMAGES}, {epochs} epochs{rest}"
    results = {
        facts.result.get("seed"): facts.result  # of a copied run only one
        for facts in group
        if facts.result is not None and {"images_seen", "images_of_full"} <= {*facts.result}
    }
    seen = [result["images_seen"] for result in results.values()]
    final, final_std = mean_std(result.get("final_top1") for result in results.values())
    return {
        "family": family,
        "name": f"{name}: random twin" if is_twin else name,
        "is_twin": is_twin,
        "epochs": epochs,
        "seeds": sorted(result["seed"] for result in results.values() if "seed" in result),
        "final_top1": final,
        "final_top1_std": final_std,
        "images": fmean(seen) if seen else None,
        "of_full": max((result["images_of_full"] for result in results.values()), default=0),
        "num_unfinished": sum(facts.result is None for facts in group),
    }


def _retraining_rows(pool: Sequence[Facts]) -> list[dict[str, Any]]:
    """Return the rows of the accuracy table that are of a part of the images, with the images that
    the coreset's score was collected from; random coresets need no collection."""
    collections = [facts for facts in pool if not facts.is_pruned_training]
    images = {}
    for facts in collections:
        for sub in facts.retrained:
            collected, result = facts.result or {}, sub.result or {}
            if all({"num_images", "epochs"} <= {*each} for each in (collected, result)):
                usual = 0 if base_key(sub.score) == "random" else collected["epochs"]
                T = result.get("coreset_settings", {}).get("T", usual)
                own = result["epochs"] * result["num_images"]
                images[run_name(facts), sub.name] = T * collected["num_images"] + own
    rows = []
    for row in summary_rows(collections):
        if not row["pruning_rate"]:
            continue
        how = "retrain" if base_key(row["score"]) == "random" else "collect and retrain"
        more = [row["variant"], row["runs"]]
        family = f"{how}: {setting(row['score_name'], row['strategy'], row['importance'], *more)}"
        seen = [images.get((value["run"], value["name"])) for value in row["values"]]
        found = [number for number in seen if number is not None]
        rows.append(
            {key: row[key] for key in ("epochs", "seeds", "final_top1", "final_top1_std")}
            | {
                "family": family,
                "name": f"{family}, rate {row['pruning_rate']:g}",
                "is_twin": False,
                "images": fmean(found) if found else None,
                "to_twin": None,
                "num_unfinished": len(seen) * (row["status"] != "finished"),
            }
        )
    return rows


def format_trainings(rows: list[dict[str, Any]]) -> str:
    """Write the rows of `training_rows` as an aligned plain-text table."""
    head = ["training", "epochs", "images seen", "of full", "seeds", "final top-1", "vs twin"]
    lines = [
        [
            row["name"],
            count(row["epochs"]),
            count(row["images"] and round(row["images"])),
            MISSING if row["share"] is None else f"{row['share']:.1f} %",
            str(len(row["seeds"])),
            plus_minus(row["final_top1"], row["final_top1_std"]),
            signed(row["to_twin"]),
            signed(row["to_full"]),
        ]
        for row in rows
    ]
    cells = table([[*head, "vs shorter"], *lines], range(1, 8), num_heads=1)
    return "\n".join(cells).translate(str.maketrans("–−", "--"))


def images_chart(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Draw final top-1 against the images seen, a line per family, random twins dashed."""
    known = [row for row in rows if None not in (row["final_top1"], row["share"])]
    groups = grouped(known, itemgetter("family", "is_twin"))
    slots = {family: number for number, family in enumerate(dict.fromkeys(f for f, _ in groups))}
    lines = []
    for (family, is_twin), group in groups.items():
        group.sort(key=lambda row: row["share"])
        lines.append(
            charts.Line(
                f"{family}: random twin" if is_twin else family,
                slot=charts.FULL_SLOT if family == _ALL_IMAGES else 1 + slots[family] % 9,
                series=f"b{slots[family]}",
                x=[row["share"] for row in group],
                y=[row["final_top1"] for row in group],
                error=[row["final_top1_std"] or 0 for row in group],
                dashed=is_twin,
                marker="s" if is_twin else "o",
            )
        )
    if not lines:
        return None
    numbers = charts.points_text(lines, "{:.2f} % at {:.0f} %")
    alt = f"Final top-1 against images seen. {numbers}."
    title = "images seen, of a full training (%)"
    return {"svg": charts.line_chart(lines, "final top-1 (%)", title, alt), "legend": lines}
