"""The headline of the report: final top-1 against the pruning rate, as a matrix, a chart and a
sentence.

Owns what is shown of the rows of `results`; reads nothing. A cell that is missing or unfinished
stays visible.
"""

from typing import Any

from tdds_dist.config.scores import base_key, is_plain
from tdds_dist.report import charts
from tdds_dist.report.published import footnotes
from tdds_dist.report.read import FULL_DATA
from tdds_dist.text import percent

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
    several = _several_epochs(rows)
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if not row["pruning_rate"]:
            continue
        key, epochs = _setting(row), _told_epochs(row, several)
        line = lines.setdefault(
            (*key, epochs),
            {
                "score": row["score"],
                "name": row["score_name"] if row["score"] != "?" else row["name"],
                "detail": _detail(row, epochs),
                "cells": {},
            },
        )
        line["cells"].setdefault(row["pruning_rate"], []).append(row)
    rates = sorted({rate for line in lines.values() for rate in line["cells"]})
    for line in lines.values():
        line["cells"] = [_cell(line["cells"].get(rate, [])) for rate in rates]
    for column in range(len(rates)):
        _mark_best([line["cells"][column] for line in lines.values()])
    num_seeds = [
        len(cell["values"])
        for line in lines.values()
        for cell in line["cells"]
        if cell and not cell["is_open"]
    ]
    return {
        "rates": rates,
        "full": [row for row in rows if row["pruning_rate"] == 0],
        "lines": [*lines.values()],
        "unknown": [row for row in rows if row["pruning_rate"] is None],
        "num_seeds": max(num_seeds, default=0),
        "notes": footnotes(row["published"] for row in rows),
    }


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    name = row["score_name"] if row["score"] != "?" else row["name"]
    return name, row["strategy"], row["importance"], row["variant"], row["runs"]


def _several_epochs(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Return the settings and rates that were retrained for different numbers of epochs, which get
    lines of their own."""
    found: dict[tuple[Any, ...], set[Any]] = {}
    for row in rows:
        if row["status"] == "finished":
            found.setdefault((*_setting(row), row["pruning_rate"]), set()).add(row["epochs"])
    return {key for key, epochs in found.items() if len(epochs) > 1}


def _told_epochs(row: dict[str, Any], several: set[tuple[Any, ...]]) -> int | None:
    """Return the epochs of a row where they distinguish it from another."""
    return row["epochs"] if (*_setting(row), row["pruning_rate"]) in several else None


def _detail(row: dict[str, Any], epochs: int | None) -> str:
    """Describe a setting: E, batch, train.lr=0.02, 60 epochs, seed0 and seed1."""
    parts = [
        row["strategy"],
        row["strategy"] and (row["importance"] or "none"),
        row["variant"],
        epochs and f"{epochs} epochs",
        row["runs"],
    ]
    return ", ".join(part for part in parts if part)


def _cell(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return one place of the matrix: the finished row, or how far the others got."""
    if not rows:
        return None
    done = [row for row in rows if row["final_top1"] is not None]
    cell = (done or rows)[0]
    return cell | {"is_best": False, "is_open": not done, "num_unfinished": len(rows) - len(done)}


def _mark_best(cells: list[dict[str, Any] | None]) -> None:
    """Mark the highest of each strategy and network, where there is a choice; cells that show the
    same number are marked too.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell and not cell["is_open"]:
            groups.setdefault((cell["strategy"], *cell["score"].split(" on ")[1:]), []).append(cell)
    for group in groups.values():
        best = max(round(cell["final_top1"], 2) for cell in group)
        for cell in group:
            cell["is_best"] = len(group) > 1 and round(cell["final_top1"], 2) == best


def accuracy_chart(rows: list[dict[str, Any]], slots: dict[str, int]) -> dict[str, Any] | None:
    """Draw final top-1 against the pruning rate, one line per score, strategy, importance and
    whatever else they differ in."""
    several = _several_epochs(rows)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if (
            row["score"] != FULL_DATA
            and row["pruning_rate"] is not None
            and row["final_top1"] is not None
        ):
            groups.setdefault(
                (row["score_name"], *_setting(row), _told_epochs(row, several)), []
            ).append(row)
    lines = list[charts.Line]()
    for (score, _, strategy, importance, variant, runs, epochs), group in groups.items():
        group.sort(key=lambda row: row["pruning_rate"])
        look = (slots[score], strategy == "P")
        label = setting(score, strategy, importance, variant, epochs and f"{epochs} epochs")
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
    alt = (
        "Final top-1 against pruning rate. "
        + "; ".join(
            f"{line.label}: "
            + ", ".join(f"{y:.2f} % at {x:g} %" for x, y in zip(line.x, line.y, strict=True))
            for line in lines
        )
        + (f"; full data {full:.2f} %." if full is not None else ".")
    )
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
    parts = [_cost(row, _name_among(row, done)) for row in done]
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
    epochs = _told_epochs(row, _several_epochs(rows))
    is_told = (
        row["importance"] not in (None, "none")
        or [other["score"] for other in rows].count(row["score"]) > 1
    )
    parts = [
        strategy and f"Strategy-{row['strategy'] or '?'}",
        importance and is_told and f"importance {row['importance'] or 'none'}",
        row["variant"],
        epochs and f"{epochs} epochs",
    ]
    told = ", ".join(part for part in parts if part)
    return (
        row["score_name"]
        + (f" ({told})" if told else "")
        + (f" in {row['runs']}" if row["runs"] else "")
    )


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
