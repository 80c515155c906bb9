"""`tdds compare`, `report` and `suspects`: tables and pages about finished runs. `tdds export` and
`import`: scores and coresets as files of other tools."""

import argparse
from pathlib import Path
from typing import Any

from tdds_dist.cli.options import Parsers
from tdds_dist.cli.outcome import Outcome
from tdds_dist.cli.scores import USUAL_RATE
from tdds_dist.config.scores import DEFAULT_RATES, DEFAULT_SUSPICION, SUSPICIONS
from tdds_dist.console import log
from tdds_dist.errors import InputError
from tdds_dist.text import command

# ---- compare


def add_compare(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "compare",
        help="how scores, windows and seeds agree",
        description=(
            "Rank correlation and overlap between the scores of a run, and of one score between"
            " runs; what is kept of each class, and of images known to be mislabelled or corrupted."
        ),
    )
    stage.takes("runs RUN", Path, "run directories", nargs="+")
    stage.takes(
        "--pruning-rates P",
        float,
        f"of the coresets that are compared (default: {' '.join(map(str, DEFAULT_RATES))})",
        nargs="+",
        default=[*DEFAULT_RATES],
    )
    stage.takes("--out FILE.csv", Path, "default: compare.csv of the first run")
    stage.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.compare import COLUMNS
    from tdds_dist.coreset.compare import compare as compare_runs

    _check_out(options.out, ",".join(COLUMNS))
    text = compare_runs(options.runs, pruning_rates=options.pruning_rates, out=options.out)
    if options.quiet or options.json:  # where the text does not show them
        for line in text.rpartition("\n\n")[2].splitlines():
            if line.startswith("note: "):
                log.warning(line.removeprefix("note: "))
    return Outcome([options.out or options.runs[0] / "compare.csv"], text=text, says_all=True)


# ---- report


def add_report(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "report",
        help="a page and a table of what came out",
        description=(
            "Write one HTML page that needs no network: accuracy against pruning rate, learning"
            " curves, scores, the images that go first and last, throughput. Runs of the same"
            " images share a headline, with the seeds of a setting averaged. Prints the table."
        ),
    )
    stage.takes("runs RUN", Path, "run directories, or those of experiments", nargs="+")
    stage.takes("--out FILE.html", Path, "default: report.html in the first directory")
    stage.set_defaults(run=report)


def report(options: argparse.Namespace) -> Outcome:
    from tdds_dist.report.accuracy import format_trainings, training_rows
    from tdds_dist.report.page import build_report
    from tdds_dist.report.read import read_facts
    from tdds_dist.report.results import find_runs, format_summary, pools, summary_tables

    _check_out(options.out, "Written by <code>tdds report</code>")
    runs = find_runs(options.runs)
    path = build_report(runs, options.out or options.runs[0] / runs[0].report_file.name)
    found = summary_tables(facts := [*map(read_facts, runs)])
    trained = [
        ([str(each.run.path) for each in pool], rows)
        for pool in pools(facts)
        if (rows := training_rows(pool))
    ]
    tables = [f"\n{title}\n{format_summary(rows)}" for title, rows in found]
    tables += [
        f"\nby images seen, {len(paths)} runs from {paths[0]} on\n{format_trainings(rows)}"
        for paths, rows in trained
    ]
    return Outcome(
        [path],
        {"retrainings": sum(row["name"] != "collect" for _, rows in found for row in rows)},
        f"open {path} in a browser",
        text="\n".join([*tables, ""]),
        rows=[
            {
                "about": title.splitlines(),
                **row,
                "published": row["published"] and row["published"]._asdict(),
            }
            for title, rows in found
            for row in rows
        ]
        + [{"about": paths, **row} for paths, rows in trained for row in rows],
    )


# ---- suspects


def add_suspects(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "suspects",
        help="images by how likely their label is wrong, and a page to review them",
        description=(
            "Rank the images of a finished collection by how likely their label is wrong, from what"
            " it recorded. Writes suspects.csv, all of them, and review.html, the first ones with"
            " pictures, where decisions are made and saved for `tdds write --relabel`."
        ),
    )
    stage.takes(
        "runs RUN",
        Path,
        "a finished collection; of several on the same images, ranks are averaged",
        nargs="+",
    )
    stage.choice(
        "--score",
        SUSPICIONS,
        f"what is suspicious when it is high (default: {DEFAULT_SUSPICION})",
        default=DEFAULT_SUSPICION,
    )
    stage.takes("--num N", int, "images in the page (default: 200)", default=200)
    stage.takes("--out DIR", Path, "default: suspects/ of the first run")
    stage.set_defaults(run=suspects)


def suspects(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.suspects import COLUMNS, find_suspects
    from tdds_dist.report.review import write_review
    from tdds_dist.runs.directory import RunDir, write_keeping

    if options.num < 1:
        raise InputError(f"--num={options.num} must be at least 1: it is the images in the page")
    run = RunDir(options.runs[0])
    folder = options.out or run.suspects
    table, page = folder / "suspects.csv", folder / "review.html"
    _check_out(table, ",".join(COLUMNS) + "\n1,")  # with a column more it is somebody's work
    _check_out(page, "tdds suspects")
    found = find_suspects(options.runs, options.score)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = found.table().encode("utf-8", "replace")
        for note in write_keeping(table, lambda file: file.write(text)):
            log.warning(note)
        said = write_review(found, run, page, options.num, options.score)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}); choose a folder by --out") from error
    for note in said:
        log.warning(note)
    notes = []
    numbers: dict[str, Any] = {"images": len(found.order)}
    if found.wrong_N is not None:
        numbers["called_wrong"] = int(found.wrong_N.sum())
    if not found.guess:
        then = command("score", run.path, "--final-pass")
        notes.append(f"what the network takes images for is not recorded; `{then}` adds it")
    return Outcome([table, page], numbers, f"open {page} in a browser", notes)


# ---- export


def add_export(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "export",
        help="scores, coresets and trajectories for other tools",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write scores, a coreset or a trajectory in a form that other tools read.",
        epilog=(
            "parquet, csv   index, path, label, every score, its ranks, keep flags per pruning"
            " rate\npaths          the kept images, one path per line\nofficial      "
            " data_mask_*.npy and score_*.npy of the authors' code\ntorch-subset   a .pt with the"
            " indices for torch.utils.data.Subset, and importances\ncard           a folder for a"
            " hub: README.md, the table as Parquet, the indices of every coreset\ntrajectory    "
            " what was recorded, one row per sample and epoch: trajectory.parquet, croissant.json"
        ),
    )
    stage.takes(
        "source RUN|DIR|SCORES.npz|CORESET.npz",
        Path,
        "what to write in another form (DIR: a trajectory)",
    )
    stage.choice(
        "--format",
        ("parquet", "csv", "paths", "official", "torch-subset", "card", "trajectory"),
        "what to write, see below",
        required=True,
    )
    stage.takes(
        "--pruning-rates P",
        float,
        "of the keep flags (default: those of the run's config, else 0.3 0.5 0.7 0.8 0.9)",
        nargs="+",
        default=[],
    )
    stage.add_argument(
        "--no-ranks",
        dest="ranks",
        action="store_false",
        help="leave ranks out of tables, a third smaller as Parquet: they follow from the scores",
    )
    stage.takes("--beton FILE", Path, "take paths and labels from the manifest of this file")
    stage.takes("--out PATH", Path, "default: beside the source, or export/ of the run")
    stage.set_defaults(run=export)


def export(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.export import export as write_for_others

    paths, notes = write_for_others(
        options.source,
        options.format,
        options.out,
        pruning_rates=options.pruning_rates,
        ranks=options.ranks,
        beton=options.beton,
    )
    return Outcome(paths, notes=[f"note: {note}" for note in notes])


# ---- import


def add_import(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "import",
        help="scores from other tools",
        description=(
            "Make a score file from a CSV (index or path, score), or from score_*.npy and"
            " data_mask_*.npy of the authors' code."
        ),
    )
    stage.takes("source FILE.csv|score_*.npy", Path, "what to read")
    stage.takes("--key NAME", str, "name of the score (default: from the file)")
    stage.takes(
        "--column NAME", str, "column of the CSV that holds it (default: the key, else score)"
    )
    stage.takes("--data-mask FILE.npy", Path, "default: data_mask_*.npy beside score_*.npy")
    stage.takes("--beton FILE", Path, "the dataset they belong to: labels, paths, checks")
    stage.takes("--run RUN", Path, "a run of that dataset, to put them into", dest="run_directory")
    stage.takes("--out FILE.npz", Path, "default: scores/ of the run, or beside the source")
    stage.set_defaults(run=import_)


def import_(options: argparse.Namespace) -> Outcome:
    from tdds_dist.coreset.import_scores import import_scores

    path = import_scores(
        options.source,
        key=options.key,
        column=options.column,
        data_mask=options.data_mask,
        beton=options.beton,
        run=options.run_directory,
        out=options.out,
    )
    return Outcome([path], next=command("select", path, "--pruning-rate", USUAL_RATE))


def _check_out(out: Path | None, holds: str) -> None:
    """Raise InputError where `--out` names a file that is no earlier one of this stage, all of
    which hold the text `holds`."""
    if out is not None and out.is_file() and holds.encode() not in out.read_bytes():
        raise InputError(
            f"--out={out} is there and was not written by this stage; choose another name, or move"
            " it away"
        )
