"""The accuracy table of one or several runs: by setting, seeds averaged, unfinished runs included.

Owns which runs belong together, averaging, and numbers as text; `read` does the reading, `page`
makes the page.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdds_dist.config.scores import score_order
from tdds_dist.errors import InputError
from tdds_dist.report.published import Printed, footnotes, lookup
from tdds_dist.report.read import FULL_DATA, Facts, Retrained, grouped, score_names
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.identity import setting_of
from tdds_dist.text import MISSING, count, mean_std, percent, plus_minus, signed, table

_VALUE_KEYS = ("run", "name", "seed", "final_top1", "best_top1", "train_seconds")
# what two retrainings that agree in what a row names may differ in
_OF_A_RETRAINING = ("model.", "data.", "train.", "retrain.")


def find_runs(paths: Sequence[Path]) -> list[RunDir]:
    """Return the run directories at `paths`, each once; an experiment stands for the collections in
    it, by seed.

    Raises InputError where there is no run.
    """
    found: dict[Path, RunDir] = {}
    for path in paths:
        runs = sorted(
            (file.parent for file in path.glob("seed*/config.yaml")),
            key=lambda run: (len(run.name), run.name),
        )
        if (path / "config.yaml").is_file() or not runs:
            if (path / "times.jsonl").is_file():
                raise InputError(
                    f"{path} is an experiment in which no collection has started; run `tdds"
                    " experiment` again"
                )
            RunDir(path).read_config()  # says so when it is no run directory
            runs = [path]
        for run in runs:
            found.setdefault(run.resolve(), RunDir(run))
    return [*found.values()]


def experiment_name(runs: Sequence[RunDir]) -> str | None:
    """Return the name of the experiment whose collections `runs` are, or None."""
    parents = {run.path.resolve().parent for run in runs}
    if len(parents) > 1 or not all(run.path.name.removeprefix("seed").isdigit() for run in runs):
        return None
    return parents.pop().name


def pools(found: Sequence[Facts]) -> list[list[Facts]]:
    """Group runs that trained and evaluated on the same images, in the order of their first."""

    def images(facts: Facts) -> str:
        data = facts.config.get("data", {})
        content = facts.env.get("data") or [data.get("train"), data.get("val")]
        return json.dumps([content, data.get("num_classes")], sort_keys=True)

    return [*grouped(found, images).values()]


def run_name(facts: Facts) -> str:
    """Name a run."""
    return str(facts.config.get("run", {}).get("name") or facts.run.path.name)


def by_setting(pool: Sequence[Facts]) -> list[tuple[str, list[Facts]]]:
    """Group runs that differ in nothing but their seed, each group with a label: their names, or ""
    where all are alike."""
    groups = grouped(pool, lambda facts: tuple(sorted(setting_of(facts.config).items())))
    if len(groups) == 1:
        return [("", [*pool])]
    are_told_apart = len({run_name(facts) for facts in pool}) == len(pool)
    name = run_name if are_told_apart else lambda facts: str(facts.run.path)
    return [(", ".join(map(name, group)), group) for group in groups.values()]


def summary_tables(found: Sequence[Facts]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return a table for each collection, or one for those of the same data together; with the
    directories it is about."""
    return [
        ("\n".join(str(facts.run.path) for facts in pool), summary_rows(pool))
        for pool in pools([facts for facts in found if not facts.is_pruned_training])
    ]


def summary_rows(pool: Sequence[Facts]) -> list[dict[str, Any]]:
    """Return accuracy by setting, seeds averaged: the collection run, then one row per setting,
    then what has not finished.

    `pool` are runs of the same data. Those that differ in nothing but their seed are averaged;
    others have rows and a reference of their own.

    Keys of a row: `score` (key) and `score_name` (what to show for it), `strategy` ("E", "P" or
    None), `importance`, `variant` (settings that tell it from a row that is alike in these, else
    ""), `pruning_rate`, `num_images`, `epochs`, `seeds` (list), `final_top1`, `best_top1` (means,
    percent), `final_top1_std`, `best_top1_std` (sample standard deviation over seeds, None for
    one), `difference` (final top-1 minus the reference row's), `is_reference`, `published` (what
    the paper prints, or None), `status` ("finished" or how far it got), `name` ("collect",
    "retrain", or that of an unfinished run), `runs` (the collections' names where several runs are
    summed up and their settings differ, else ""), `values` (a dict per training: `run`, `name`,
    `seed`, `final_top1`, `best_top1`, `train_seconds`).

    The reference is the retraining on the full data, and where there is none the collection run,
    unless that was stopped before the end of its schedule.
    """
    names = score_names(pool)
    return [
        row | {"runs": label}
        for label, group in by_setting(pool)
        for row in _rows_of_one_setting(group, names)
    ]


def variants(group: Sequence[Facts]) -> dict[tuple[Path, str], str]:
    """Return what distinguishes retrainings beyond score, strategy, importance, pruning rate and
    epochs, "" for most.

    Settings in which they differ, where they are not the collection's: `train.lr=0.02`. Of those
    that agree in everything, the seed and the collection included, the first stands for them and
    the others say `repeated as NAME`. Keys are the collection's directory and the retraining's
    name.
    """
    found: dict[tuple[Path, str], list[str]] = {}
    rows: dict[tuple[Any, ...], list[tuple[Facts, Retrained]]] = {}
    networks: dict[str | None, list[tuple[Facts, Retrained]]] = {}
    for facts in group:
        for sub in facts.retrained:
            found[facts.run.path, sub.name] = []
            networks.setdefault(sub.setting.get("network"), []).append((facts, sub))
            rows.setdefault(_row_key(sub), []).append((facts, sub))
    own = _decisive(group[0].config)
    batch = "train.global_batch_size"  # may follow from the pruning rate
    for network, members in networks.items():
        _name_differences(members, found, {} if network else own, skipped=(batch,))
    for members in rows.values():
        _name_differences(members, found, own, only=batch)
    seen = set()
    for facts in group:
        for sub in sorted(
            facts.retrained, key=lambda sub: (sub.result is None, str(sub.env.get("started") or ""))
        ):
            seed, variant = sub.setting.get("seed"), found[facts.run.path, sub.name]
            key = (facts.run.path, seed, *_row_key(sub), *variant)
            if key in seen and seed is not None and sub.setting.get("pruning_rate") is not None:
                variant.append(f"repeated as {sub.name}")
            seen.add(key)
    return {key: ", ".join(parts) for key, parts in found.items()}


def _name_differences(
    members: list[tuple[Facts, Retrained]],
    found: dict[tuple[Path, str], list[str]],
    own: dict[str, str],
    skipped: tuple[str, ...] = (),
    only: str | None = None,
) -> None:
    """Add `key=value` where a retraining is unlike the others: unlike the collection, or where none
    is like it, unlike most.

    A key that a config lacks, being of another version, is no difference.
    """
    configs = [_decisive(sub.config) for _, sub in members]
    for key in (
        [only]
        if only
        else dict.fromkeys(key for config in configs for key in config if key not in skipped)
    ):
        values = Counter(config[key] for config in configs if key in config)
        if len(values) > 1:
            usual = own[key] if own.get(key) in values else values.most_common(1)[0][0]
            for (facts, sub), config in zip(members, configs, strict=True):
                if config.get(key, usual) != usual:
                    found[facts.run.path, sub.name].append(f"{key}={config[key]}")


def _decisive(config: dict[str, Any]) -> dict[str, str]:
    """Return what of a config decides a retraining's result, but for the seed and what its row
    names: section.key -> value."""
    return {
        key: value
        for key, value in setting_of(config, "retrain").items()
        if key.startswith(_OF_A_RETRAINING) and key != "train.epochs"
    }


def _row_key(sub: Retrained) -> tuple[Any, ...]:
    return (
        sub.score,
        sub.strategy,
        *(sub.setting.get(key) for key in ("importance", "pruning_rate", "epochs")),
    )


def _rows_of_one_setting(group: Sequence[Facts], names: dict[str, str]) -> list[dict[str, Any]]:
    collected = _collect_rows(group)
    trained: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    unfinished = []
    variant = variants(group)
    for facts in group:
        for sub in facts.retrained:
            key = (*_row_key(sub), variant[facts.run.path, sub.name])
            value = {
                "run": run_name(facts),
                "name": sub.name,
                "seed": sub.setting.get("seed"),
                "published": _published(facts, sub),
                **(sub.result or {}),
            }
            if sub.result is not None:
                trained.setdefault(key, []).append(value)
            else:
                status = _progress(sub.metrics, sub.setting.get("epochs"))
                unfinished.append(_row(names, sub.name, key, [value], status))
    rows = sorted(
        (_row(names, "retrain", key, results) for key, results in trained.items()),
        key=_row_order,
    )
    known = [row for row in [*rows, *collected] if row["final_top1"] is not None]
    full = min(
        (row for row in known if row["score"] == FULL_DATA and row["status"] == "finished"),
        key=lambda row: (
            row in collected,
            row["variant"] != "",
            row["importance"] not in (None, "none"),
        ),
        default=None,
    )
    if full is not None:
        full["is_reference"] = True
        for row in known:
            if row is not full and " on " not in row["score"]:
                row["difference"] = row["final_top1"] - full["final_top1"]
    return [*collected, *rows, *unfinished]


def _collect_rows(group: Sequence[Facts]) -> list[dict[str, Any]]:
    """Return one row for the collections that came to the end of their schedule, one for each of
    the others."""
    by_status: dict[Any, list[dict[str, Any]]] = {}
    for facts in group:
        result = facts.result or {}
        epochs, planned = result.get("epochs"), result.get("epochs_planned", result.get("epochs"))
        value = {
            "run": run_name(facts),
            "name": "collect",
            "seed": facts.config.get("run", {}).get("seed"),
            "published": _published(facts),
            **result,
        }
        if facts.result is None:
            status = _progress(facts.metrics, facts.config.get("train", {}).get("epochs"))
        elif epochs == planned:
            status = "finished"
        else:
            status = f"stopped after {epochs} of {planned} epochs"
        of_one = "" if status == "finished" else value["run"]
        by_status.setdefault((status, of_one), []).append(value)
    key = (FULL_DATA, None, None, 0.0, group[0].config.get("train", {}).get("epochs"), "")
    rows = [_row({}, "collect", key, values, status) for (status, _), values in by_status.items()]
    return sorted(rows, key=lambda row: row["status"] != "finished")


def format_summary(rows: list[dict[str, Any]]) -> str:
    """Write the rows of `summary_rows` as an aligned plain-text table. Top-1 in percent; "best" is
    over epochs."""
    columns: list[tuple[str, str, Any]] = [
        ("stage", "<", lambda row: row["name"] if row["name"] == "collect" else "retrain"),
        ("score", "<", lambda row: row["score_name"]),
        ("strategy", "<", lambda row: row["strategy"]),
        ("importance", "<", lambda row: row["importance"]),
        ("pruned", ">", lambda row: percent(row["pruning_rate"])),
        ("images", ">", lambda row: count(row["num_images"])),
        ("epochs", ">", lambda row: count(row["epochs"])),
        ("seeds", ">", lambda row: len(row["seeds"])),
        ("final top-1", ">", lambda row: plus_minus(row["final_top1"], row["final_top1_std"])),
        ("best top-1", ">", lambda row: plus_minus(row["best_top1"], row["best_top1_std"])),
        (
            "vs full",
            ">",
            lambda row: "reference" if row["is_reference"] else signed(row["difference"]),
        ),
        ("published", ">", lambda row: row["published"] and row["published"].text),
        ("status", "<", lambda row: row["status"]),
    ]
    if all(row["published"] is None for row in rows):
        columns = [column for column in columns if column[0] != "published"]
    if all(row["status"] == "finished" for row in rows):
        columns = [column for column in columns if column[0] != "status"]
    if any(row["variant"] for row in rows):
        columns.insert(4, ("settings", "<", lambda row: row["variant"] or None))
    if any(row["runs"] for row in rows):
        columns.insert(1, ("runs", "<", lambda row: row["runs"]))
    cells = [
        [MISSING if (cell := show(row)) is None else str(cell) for _, _, show in columns]
        for row in rows
    ]
    right = [number for number, (_, side, _) in enumerate(columns) if side == ">"]
    text = "\n".join(
        [
            *table([[name for name, _, _ in columns], *cells], right, num_heads=1),
            *footnotes(row["published"] for row in rows),
        ]
    )
    return text.translate(str.maketrans("–−", "--"))


# --------------------------------------------------------------------------------------------------


def _row(
    names: dict[str, str],
    name: str,
    key: tuple[Any, ...],
    results: list[dict[str, Any]],
    status: str = "finished",
) -> dict[str, Any]:
    """Return one row of the table from the results of all seeds of one setting."""
    score, strategy, importance, rate, epochs, variant = key
    final, final_std = mean_std(result.get("final_top1") for result in results)
    best, best_std = mean_std(result.get("best_top1") for result in results)
    return {
        "name": name,
        "score": score,
        "score_name": names.get(score, score),
        "strategy": strategy,
        "importance": importance,
        "variant": variant,
        "pruning_rate": rate,
        "num_images": results[0].get("num_images"),
        "epochs": results[0].get("epochs", epochs),
        "seeds": sorted(result["seed"] for result in results if result.get("seed") is not None),
        "final_top1": final,
        "final_top1_std": final_std,
        "best_top1": best,
        "best_top1_std": best_std,
        "difference": None,
        "is_reference": False,
        "status": status,
        "published": results[0]["published"],
        "values": [{key: result.get(key) for key in _VALUE_KEYS} for result in results],
    }


def _published(facts: Facts, sub: Retrained | None = None) -> Printed | None:
    """Return what the paper prints for a retraining, or for the collection."""
    model = facts.config.get("model", {})
    if sub is None:
        return lookup(facts.images, model, model)
    return lookup(
        facts.images,
        model,
        sub.config.get("model", {}),
        key=sub.setting.get("method", sub.score),
        pruning_rate=sub.setting.get("pruning_rate"),
        strategy=sub.strategy,
        batch_size=sub.config.get("train", {}).get("global_batch_size"),
        importance=sub.setting.get("importance"),
    )


def _row_order(row: dict[str, Any]) -> tuple[Any, ...]:
    rate, order = row["pruning_rate"] or 0, score_order(row["score"])
    setting = row["score"], str(row["strategy"]), str(row["importance"])
    return rate, *order, *setting, row["epochs"] or 0, row["variant"]


def _progress(metrics: list[dict[str, Any]], epochs: int | None) -> str:
    return f"unfinished, {len(metrics)} of {'?' if epochs is None else epochs} epochs"
