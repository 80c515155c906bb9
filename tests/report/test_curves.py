"""Accuracy, curves, throughput and provenance on the report page, of one run, several runs and
experiments."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tdds_dist.cli.main import main
from tdds_dist.report.accuracy import (
    accuracy_chart,
    finding,
    images_chart,
    matrix,
    training_rows,
)
from tdds_dist.report.curves import curve_charts, speed_charts
from tdds_dist.report.page import build_report
from tdds_dist.report.read import read_facts
from tdds_dist.report.results import find_runs, format_summary, pools, summary_rows, summary_tables
from tdds_dist.runs.directory import RunDir
from tests import make
from tests.make import NUM_IMAGES, TDDS, Page, finish, log, refused, retraining, start

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as BrowserPage


def learn(run: RunDir, num_epochs: int, final: float, seed: int, speed: float = 600.0) -> None:
    """Metrics of a training that ends at `final`."""
    random = np.random.default_rng([seed, num_epochs, int(final)])
    for epoch in range(num_epochs):
        share = 1 - math.exp(-6 * (epoch + 1) / num_epochs)
        run.append_metrics(
            {"epoch": epoch, "step": epoch, "lr": 0.1, "epoch_seconds": 2.0}
            | {
                "train_loss": 2.3 * (1.02 - share) + 0.02 * random.random(),
                "val_top1": final * share + random.normal(0, 0.4),
                "images_per_second": speed * (0.3 if epoch == 0 else 1) + 9 * random.random(),
                "scoring_share": 0.01 + 0.002 * random.random(),
                "memory_bytes": 10**9 + epoch * 10**6,
            }
        )


def write_experiment(
    path: Path,
    methods: tuple[str, ...] = ("tdds", "random"),
    rates: tuple[float, ...] = (0.5, 0.8),
    seeds: tuple[int, ...] = (0, 1, 2),
    num_epochs: int = 3,
) -> Path:
    """An experiment directory as `tdds experiment` leaves it; final top-1 is 90 + seed - method's
    number - 10 rate."""
    for seed in seeds:
        named = {"name": f"{path.name}_seed{seed}", "seed": seed}
        run = start(path / f"seed{seed}", "train.beton", run=named)
        learn(run, num_epochs, 95.0, seed)
        finish(run, final=95.0 + seed)
        for number, method in enumerate(methods):
            for rate in rates:
                final = 90.0 + seed - number - 10 * rate
                setting = {"stage": "retrain", "strategy": "E", "pruning_rate": rate}
                setting |= dict.fromkeys(("score_key", "row", "method"), method)
                setting["importance"] = "batch" if method == "tdds" else "none"
                folder = run.retrain / f"{method}_p{rate:g}_E_none_seed{seed}"
                sub = start(folder, "train.beton", stage=setting)
                learn(sub, num_epochs, final, seed, 400 * (1.2 - rate))
                result = {"seed": seed, "best_top1": final + 0.5, "epochs": num_epochs}
                finish(sub, round(60 * (1 - rate)), final, **setting, **result)
    (path / "times.jsonl").write_text('{"finished": "2026-01-01", "seconds": 60}\n')
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment. Never changed."""
    return write_experiment(tmp_path_factory.mktemp("experiment") / "table")


@pytest.fixture
def experiment(table: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(table, tmp_path / "table")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about an experiment of which one retraining is missing."""
    folder = tmp_path_factory.mktemp("report")
    experiment = write_experiment(folder / "table")
    shutil.rmtree(experiment / "seed0/retrain/random_p0.8_E_none_seed0")
    return build_report(find_runs([experiment]), folder / "report.html")


def page_of(paths: list[Path], out: Path) -> Page:
    return make.page_of(find_runs(paths), out)


# ---- which runs belong together


def test_an_experiment_is_its_collections_by_seed(tmp_path):
    path = tmp_path / "table"
    for seed in (0, 2, 10):
        start(path / f"seed{seed}")
    (path / "times.jsonl").touch()
    assert [run.path.name for run in find_runs([path])] == ["seed0", "seed2", "seed10"]
    found = [run.path.name for run in find_runs([path / "seed2", path])]
    assert found == ["seed2", "seed0", "seed10"], "each once"


def test_errors_name_the_way_out(tmp_path):
    refused("does not exist; `tdds collect` makes one", find_runs, [tmp_path / "nowhere"])
    refused("not a run directory", find_runs, [tmp_path])
    (tmp_path / "times.jsonl").touch()
    refused("no collection has started; run `tdds experiment` again", find_runs, [tmp_path])


def test_seeds_are_averaged_over_the_runs_of_an_experiment(table, tmp_path):
    page = page_of([table], tmp_path / "report.html")
    # 90 + seed - number - 10 rate for seeds 0, 1, 2; the full data gives 95, 96, 97
    assert page.row("full data collection")[1] == "96.00 ± 1.00 the reference, 3 trainings"
    assert page.row("tdds E, batch")[1:] == ["86.00 ± 1.00 −10.00", "83.00 ± 1.00 −13.00"]
    assert page.row("random E, none")[1:] == ["85.00 ± 1.00 −11.00", "82.00 ± 1.00 −14.00"]
    assert "Removing 80\N{NO-BREAK SPACE}% of the images costs 13.00 points with tdds" in page.text
    assert page.count("h1") == 1
    assert "<h1>table</h1>" in page.text
    # below it, those of one seed alone
    assert page.row("tdds E, batch", 9)[1:] == ["85.00 −10.00", "82.00 −13.00"]
    by_itself = [page.row("tdds E, batch", number) for number in range(3, 6)]
    assert [(row[2], row[3], row[6]) for row in by_itself] == [
        (str(seed), f"{85 + seed}.00", f"table_seed{seed}/retrain/tdds_p0.5_E_none_seed{seed}")
        for seed in range(3)
    ]
    page.check_references()
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert sum(link.startswith("#") for link in links) > 20
    assert page.text.count('<details class="run">') == 3


def test_a_cell_says_what_is_missing(experiment, tmp_path):
    (experiment / "seed2/retrain/tdds_p0.5_E_none_seed2/result.json").unlink()
    for seed in range(3):
        (experiment / f"seed{seed}/retrain/random_p0.5_E_none_seed{seed}/result.json").unlink()
    shutil.rmtree(experiment / "seed1/retrain/random_p0.8_E_none_seed1")
    page = page_of([experiment], tmp_path / "report.html")
    assert page.row("tdds E, batch")[1] == "85.50 ± 0.71 −10.50 2 seeds, 1 unfinished"
    assert page.row("random E, none")[1:] == ["3 of 3 epochs", "82.00 ± 1.41 −14.00 2 seeds"]
    assert "over 3 seeds; a cell with fewer says so" in page.text


def test_runs_of_other_settings_are_not_averaged(experiment, tmp_path):
    run = RunDir(experiment / "seed1")
    config = run.read_config()
    run.config_file.write_text(json.dumps(config | {"train": config["train"] | {"lr": 0.7}}))
    rows = summary_rows([read_facts(run) for run in find_runs([experiment])])
    found = {
        (row["runs"], row["score"], row["pruning_rate"]): (row["final_top1"], row["difference"])
        for row in rows
    }
    assert found["table_seed0, table_seed2", "tdds", 0.5] == (86.0, -10.0)
    assert found["table_seed1", "tdds", 0.5] == (86.0, -10.0)
    assert found["table_seed1", "full data", 0.0][0] == 96.0
    assert [line["name"] for line in matrix(rows)["lines"]] == ["tdds", "random", "tdds", "random"]
    page = page_of([experiment], tmp_path / "report.html")
    assert "differ in more than the seed, so they are not averaged" in page.text
    assert page.row("tdds E, batch, table_seed1")[1] == "86.00 −10.00 1 seed"
    assert format_summary(rows).splitlines()[0].split()[1] == "runs"


def test_runs_of_other_images_stay_apart(tmp_path):
    runs = [start(tmp_path / name, f"{name}.beton") for name in ("a", "b")]
    assert [len(pool) for pool in pools([read_facts(run) for run in runs])] == [1, 1]
    page = make.page_of(runs, tmp_path / "report.html")
    assert "2 runs" in page.text
    assert 'id="p0"' not in page.text
    for run in runs:  # the same content under other names
        run.write_env(run.read_env() | {"data": {"train": "12", "val": "34"}})
    assert [len(pool) for pool in pools([read_facts(run) for run in runs])] == [2]
    # another evaluation
    runs[1].write_env(runs[1].read_env() | {"data": {"train": "12", "val": "56"}})
    assert [len(pool) for pool in pools([read_facts(run) for run in runs])] == [1, 1]


def test_the_terminal_shows_one_table_per_data_set(table, tmp_path):
    runs = [*find_runs([table]), start(tmp_path / "other", "other.beton")]
    tables = summary_tables([*map(read_facts, runs)])
    assert [title.count("\n") for title, _ in tables] == [2, 0]
    assert [len(rows) for _, rows in tables] == [5, 1]
    assert "86.00 ± 1.00" in format_summary(tables[0][1])


def test_the_command_takes_an_experiment(experiment, capsys):
    assert main(["report", str(experiment)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("86.00 ± 1.00") == 1
    assert f"wrote {experiment / 'report.html'}" in printed
    assert "<h1>table</h1>" in (experiment / "report.html").read_text()
    for seed in range(3):
        (experiment / f"seed{seed}/config.yaml").unlink()
    assert main(["report", str(experiment)]) == 2
    assert "no collection has started" in capsys.readouterr().err


# ---- the matrix and its sentence


def row(
    score: str, rate: float, final: float | None, strategy: str = "E", epochs: int = 30, **others
) -> dict[str, object]:
    found = {"name": "retrain", "score": score, "score_name": score, "strategy": strategy}
    found |= {"importance": "none", "variant": "", "pruning_rate": rate, "num_images": 10}
    found |= {"epochs": epochs, "seeds": [0], "final_top1": final, "best_top1": final}
    found |= dict.fromkeys(("final_top1_std", "best_top1_std", "difference", "published"))
    found |= {"is_reference": False, "status": "finished", "runs": "", "values": [{"seed": 0}]}
    return found | others


def test_the_best_of_a_column_is_marked_among_its_like():
    rows = [row("tdds", 0.5, 80.001), row("random", 0.5, 80.004), row("el2n", 0.5, 70.0)]
    rows += [row("tdds", 0.5, 90.0, "P"), row("aum", 0.5, 95.0, "P")]
    rows += [row("tdds on other", 0.5, 99.0), row("aum", 0.8, 50.0)]
    found = matrix(rows)
    assert found["rates"] == [0.5, 0.8]
    best = [[cell and cell["is_best"] for cell in line["cells"]] for line in found["lines"]]
    names = [f"{line['name']}, {line['detail'][0]}" for line in found["lines"]]
    assert [*zip(names, best, strict=True)] == [
        ("tdds, E", [True, None]),
        ("random, E", [True, None]),
        ("el2n, E", [False, None]),
        ("tdds, P", [False, None]),
        ("aum, P", [True, None]),
        ("tdds on other, E", [False, None]),
        ("aum, E", [None, False]),
    ]


def test_other_epochs_are_another_line():
    rows = [row("tdds", 0.5, 85.0, epochs=60), row("tdds", 0.8, 70.0, epochs=60)]
    shown = {
        line["detail"]: [cell and cell["final_top1"] for cell in line["cells"]]
        for line in matrix([row("tdds", 0.5, 80.0), *rows])["lines"]
    }
    assert shown == {
        "E, none, 30 epochs": [80.0, None],
        "E, none, 60 epochs": [85.0, None],
        "E, none": [None, 70.0],
    }


@pytest.mark.parametrize(("rates", "asked"), [((0.3, 0.8, 0.9), "80"), ((0.3, 0.5), "50")])
def test_the_sentence_is_about_80_percent_where_it_can_be(rates, asked):
    full = row("full data", 0.0, 95.0, is_reference=True)
    rows = [
        full,
        *(
            row(score, rate, 95 + change, difference=change)
            for rate in rates
            for score, change in (("tdds", 0.25), ("random", -4.5))
        ),
    ]
    first = "The full data gives a top-1 of 95.00 %."
    gain = f"Removing {asked} % of the images gains 0.25 points with tdds, up to 95.25 %"
    cost = "it costs 4.50 points with random, down to 90.50 %."
    assert sentence(rows) == f"{first} {gain}; {cost}"
    many = [*rows, *(row(score, rates[-1], 1.0) for score in ("aum", "el2n", "dual"))]
    assert "aum" not in sentence(many)
    assert finding([full]) is None


def sentence(rows: list[dict[str, object]]) -> str:
    text = finding(rows) or ""
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{NON-BREAKING HYPHEN}", "-")


def test_the_sentence_never_leaves_out_random():
    many = [
        row("tdds", 0.8, 70.0, strategy, importance=importance)
        for strategy in "EP"
        for importance in ("batch", "none", "sample")
    ]
    many = [row("tdds_official_T9_K9_beta0.9_ce", 0.8, 60.0), *many, row("random", 0.8, 75.0)]
    with_tdds = [f"70.00 % with tdds (importance {name})" for name in ("batch", "none", "sample")]
    found = "; ".join([*with_tdds, "75.00 % with random."])
    assert sentence(many) == f"With 80 % of the images removed, top-1 is {found}"
    rows = [row(f"el2n_T{number}", 0.8, 70.0, score_name="el2n") for number in range(5)]
    assert "with el2n" in sentence(rows)


def test_the_sentence_names_what_differs_alone():
    rows = [
        row("full data", 0.0, 95.0, is_reference=True),
        row("tdds", 0.8, 95.001, difference=0.001),
        row("tdds", 0.8, 90.0, "P", difference=-5.0),
        row("tdds", 0.8, 91.0, "P", 60, difference=-4.0),
        row("tdds", 0.8, 85.0, difference=-10.0, variant="train.lr=0.02"),
    ]
    assert sentence(rows).split(". ", 1)[1].split("; ") == [
        "Removing 80 % of the images costs nothing with tdds (Strategy-E), at 95.00 %",
        "it costs 5.00 points with tdds (Strategy-P, 30 epochs), down to 90.00 %",
        "it costs 4.00 points with tdds (Strategy-P, 60 epochs), down to 91.00 %",
        "it costs 10.00 points with tdds (Strategy-E, train.lr=0.02), down to 85.00 %.",
    ]


def test_no_images_are_a_share_of_a_training_that_has_not_finished(tmp_path):
    """Beside one that prunes inside; the images of a retraining are known already."""
    run = start(tmp_path / "run")
    log(run)
    finish(run)
    retraining(run, TDDS, 0.5, 0, 80.0)
    training = start(tmp_path / "training", stage={"stage": "train"})
    rows = training_rows([*map(read_facts, (run, training))])
    assert [row["images"] for row in rows if row["final_top1"] == 80.0] == [4.5 * NUM_IMAGES]
    assert [row["share"] for row in rows] == [None, None]
    assert images_chart(rows) is None


# ---- trainings that are no seeds of each other


def change(sub: RunDir, section: str = "train", **train: object) -> None:
    """Another setting of a retraining, as if it had been asked for."""
    config = sub.read_config()
    changed = config.get(section, {}) | train
    sub.config_file.write_text(json.dumps(config | {section: changed}))
    if "epochs" in train:
        sub.write_result((sub.read_result() or {}) | {"epochs": train["epochs"]})


def test_other_settings_and_repeated_seeds_are_no_seeds(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    log(run)
    finish(run)
    trained = (("a", 0, 80.0), ("b", 1, 82.0), ("other", 0, 60.0), ("again", 0, 70.0))
    for name, seed, final in trained:
        sub = retraining(run, TDDS, 0.5, seed, final, name=name)
        sub.write_env(sub.read_env() | {"started": f"2026-01-0{2 if name == 'again' else 1}"})
    change(RunDir(run.retrain / "other"), lr=0.02)
    # follows from the pruning rate
    change(retraining(run, TDDS, 0.8, 0, 50.0, name="less"), global_batch_size=10)
    rows = summary_rows([read_facts(run)])[1:]
    columns = ("pruning_rate", "variant", "seeds", "final_top1")
    assert [[row[column] for column in columns] for row in rows] == [
        [0.5, "", [0, 1], 81.0],
        [0.5, "repeated as again", [0], 70.0],
        [0.5, "train.lr=0.02", [0], 60.0],
        [0.8, "", [0], 50.0],
    ]
    details = ["E, none", "E, none, repeated as again", "E, none, train.lr=0.02"]
    assert [line["detail"] for line in matrix(rows)["lines"]] == details
    assert re.search(r"none +train.lr=0.02 +50 %", format_summary(rows))
    chart = accuracy_chart(rows, {"tdds": 1})
    assert [(line.label, line.y, line.marker) for line in chart["legend"]] == [
        ("tdds (Strategy-E)", [81.0, 50.0], "o"),
        ("tdds (Strategy-E, repeated as again)", [70.0], "s"),
        ("tdds (Strategy-E, train.lr=0.02)", [60.0], "^"),
    ]
    curves = curve_charts([read_facts(run)], {"tdds": 1})
    assert "tdds (E, none): mean of 2" in curves["charts"][0]
    labels = {"full data, collection", *(f"tdds ({detail})" for detail in details)}
    assert {line.label for line in curves["legend"]} == labels
    page = make.page_of([run], tmp_path / "report.html")
    assert page.row("tdds E, none, train.lr=0.02")[1] == "60.00 −30.00 1 seed"
    change(retraining(run, TDDS, 0.9, 0, 40.0, name="full"), "retrain", schedule_of="full")
    assert summary_rows([read_facts(run)])[-1]["variant"] == "retrain.schedule_of=full"


def test_other_epochs_are_other_lines_in_the_charts(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    log(run)
    retraining(run, TDDS, 0.5, 0, 80.0, name="short")
    change(retraining(run, TDDS, 0.5, 0, 60.0, name="long"), epochs=6)
    chart = accuracy_chart(summary_rows([read_facts(run)]), {"tdds": 1})
    curves = curve_charts([read_facts(run)], {"tdds": 1})
    epochs = [f"tdds (Strategy-E, {num} epochs)" for num in (3, 6)]
    assert [(line.label, line.x) for line in chart["legend"]] == [(line, [50.0]) for line in epochs]
    epochs = [f"tdds (E, none, {num} epochs)" for num in (6, 3)]
    assert [line.label for line in curves["legend"]] == ["full data, collection", *epochs]
    assert not curves["has_seeds"]


def test_a_retraining_of_unknown_rate_is_not_the_full_data(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    finish(run)
    for name in ("mine", "yours"):
        sub = retraining(run, TDDS, 0.5, 0, None, name=name)
        sub.write_env({})
    found = matrix(summary_rows([read_facts(run)]))
    unknown = [(row["name"], row["variant"]) for row in found["unknown"]]
    assert unknown == [("mine", ""), ("yours", "")]
    assert [row["name"] for row in found["full"]] == ["collect"]
    page = make.page_of([run], tmp_path / "report.html")
    assert page.row("mine")[1] == "1 of 3 epochs; no file says its pruning rate"
    assert "retrained" not in page.row("mine")[0]
    charts = speed_charts(read_facts(run))
    assert [line.label for line in charts["legend"]] == ["pruning rate not known (mean of 2)"]


# ---- curves


def drawn(svg: str) -> dict[str, int]:
    """How many lines each series has."""
    found = re.findall(r'data-series="(\w+)"', svg)
    return {series: found.count(series) for series in found}


def test_curves_count_from_one_and_are_grouped_by_rate(table):
    found = [read_facts(run) for run in find_runs([table])]
    curves = curve_charts(found, {"tdds": 1, "random": 0})
    labels = ["full data, collection", "tdds (E, batch)", "random (E, none)"]
    assert [line.label for line in curves["legend"]] == labels
    assert [list(line.x) for line in curves["legend"]] == [[1, 2, 3]] * 3
    assert curves["legend"][0].slot not in [line.slot for line in curves["legend"][1:]]
    assert len(curves["charts"]) == 4  # two rates, top-1 and loss
    # three seeds and their mean
    assert [drawn(svg) for svg in curves["charts"]] == [{"c0": 4, "c1": 4, "c2": 4}] * 4
    value = [read_facts(RunDir(table / f"seed{seed}")).retrained for seed in range(3)]
    ends = [
        next(sub for sub in subs if sub.name.startswith("tdds_p0.5")).metrics[-1]["val_top1"]
        for subs in value
    ]
    assert f"tdds (E, batch) {np.mean(ends):.4g}" in curves["charts"][0]
    assert curves["has_seeds"]
    single = curve_charts(found[:1], {"tdds": 1, "random": 0})
    assert [drawn(svg) for svg in single["charts"]] == [{"c0": 1, "c1": 1, "c2": 1}] * 4


def test_unfinished_trainings_are_not_in_the_mean(experiment):
    sub = RunDir(experiment / "seed2/retrain/tdds_p0.5_E_none_seed2")
    sub.result_file.unlink()
    sub.metrics_file.write_text(sub.metrics_file.read_text().splitlines()[0] + "\n")
    found = [read_facts(run) for run in find_runs([experiment])]
    curves = curve_charts(found, {"tdds": 1, "random": 0})
    assert [list(line.x) for line in curves["legend"]][1] == [1, 2, 3]
    assert "tdds (E, batch): mean of 2" in curves["charts"][0]
    assert "tdds (E, batch): mean of 3" in curves["charts"][2]


def test_settings_that_look_alike_get_markers(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    for importance in ("batch", "none"):
        retraining(run, "tdds", 0.5, 0, 80.0, importance=importance)
    retraining(run, "random", 0.5, 0, 80.0)
    curves = curve_charts([read_facts(run)], {"tdds": 1, "random": 0})
    assert {line.label: line.marker for line in curves["legend"]} == {
        "tdds (E, batch)": "s",
        "tdds (E, none)": "o",
        "random (E, none)": "",
    }


# ---- throughput and provenance


def test_memory_is_in_powers_of_1000_in_table_and_chart(table, tmp_path):
    run = find_runs([table])[0]
    charts = "".join(speed_charts(read_facts(run))["charts"])
    assert "memory (GB) by epoch. Medians: collection 1.001," in charts
    page = make.page_of([run], tmp_path / "report.html")
    (head,) = [row for row in page.rows if "Memory, GB" in row]
    at = page.rows.index(head) + 1
    assert page.rows[at][head.index("Memory, GB")] == "1.00"


def test_throughput_by_epoch_with_resumes_marked(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    log(run)
    retraining(run, TDDS, 0.5, 0, 80.0)
    retraining(run, TDDS, 0.5, 1, 81.0)
    charts = speed_charts(read_facts(run))
    assert [line.label for line in charts["legend"]] == ["collection", "50 % removed (mean of 2)"]
    assert [list(line.y) for line in charts["legend"]] == [[100.0, 4321.0, 4321.0]] * 2
    assert len(charts["charts"]) == 2, "no memory was recorded"
    share = "scoring share of the collection (%) by epoch. Medians: collection 1.25."
    assert share in charts["charts"][1]
    unmarked = charts["charts"][0]
    started = {"started": "2026-02-03T04:05:06+0000"}
    resume = started | {"epoch": 1, "step": 7, "world_size": 4, "device": "cpu", "commit": "abc"}
    resume["notes"] = ["rank 1 was <lost>"]
    run.write_env(run.read_env() | {"resumes": [resume, started]})
    charts = speed_charts(read_facts(run))
    assert charts["resumes"] == [2], "of the other entry it is not known"
    assert charts["charts"][0].count("<path") > unmarked.count("<path")
    page = make.page_of([run], tmp_path / "report.html")
    assert "stopped and went on in epoch 2." in page.text
    assert page.row("2026-02-03 04:05")[1:] == ["2", "7", "4", "cpu", "abc", "rank 1 was <lost>"]
    assert "<lost>" not in page.text
    assert next(row for row in page.rows if row[0] == "collect")[-1] == "2"


def test_provenance_can_be_read(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    command = ["tdds", "collect", "my config.yaml"]
    run.write_env(run.read_env() | {"command": command, "commit": "abc"})
    sub = retraining(run, TDDS, 0.5, 0, 80.0)
    sub.write_env(sub.read_env() | {"commit": "def"})
    page = make.page_of([run], tmp_path / "report.html")
    assert "<code>tdds collect &#39;my config.yaml&#39;</code>" in page.text
    assert re.search(r"<dt>Commit</dt><dd>abc</dd>", page.text)
    assert f"Retrained at another commit than the collection: {sub.path.name}." in page.text
    assert "other versions" not in page.text
    assert re.search(r"<dt>global_batch_size</dt><dd>20</dd>", page.text)
    sub.write_env(sub.read_env() | {"commit": "abc"})
    assert "another commit" not in make.page_of([run], tmp_path / "report.html").text


# ---- in a browser


@pytest.fixture
def opened(report: Path, browser: "Browser") -> "Iterator[BrowserPage]":
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report.as_uri())
    yield page
    page.close()


def column(opened: "BrowserPage", table: str, number: int) -> list[str]:
    """The first words of a column's cells, from top to bottom."""
    texts = opened.locator(
        f"{table} tbody:not(.whole-data) tr > :nth-child({number + 1})"
    ).all_inner_texts()
    return [text.split()[0] for text in texts]


@pytest.mark.browser
def test_tables_sort_below_the_full_data_by_what_cells_mean(opened):
    matrix, seed0, singles = "#p0 .matrix", "#r0 .matrix", "#p0 details table >> nth=0"
    assert column(opened, matrix, 2) == ["83.00", "82.50"]
    head = opened.locator(f"{matrix} thead button").nth(2)
    head.focus()
    opened.keyboard.press("Enter")
    assert column(opened, matrix, 2) == ["82.50", "83.00"]
    assert opened.locator(f"{matrix} th[aria-sort=ascending]").count() == 1
    head.click()
    assert column(opened, matrix, 2) == ["83.00", "82.50"]
    assert opened.locator(f"{matrix} th[aria-sort=descending]").inner_text().startswith("80")
    assert opened.locator(f"{matrix} tbody tr").first.inner_text().startswith("full data")
    opened.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    for _ in range(2):  # what is missing comes last, both ways
        opened.locator(f"{seed0} thead button").nth(2).click()
        assert column(opened, seed0, 2) == ["82.00", "–"]
    for table in opened.locator(".matrix").all():
        assert (
            table.evaluate(
                "table => table.parentElement.scrollWidth - table.parentElement.clientWidth"
            )
            == 0
        )
    opened.locator(singles).locator("thead button").first.click()
    assert opened.locator(singles).locator("tbody th").first.inner_text().startswith("full data")
    order = opened.evaluate(
        """cells => {
      const table = document.createElement("table");
      table.append(document.createElement("tbody"));
      for (const cell of cells) table.tBodies[0].insertRow().insertCell().textContent = cell;
      sort(table, 0, false);
      return [...table.rows].map(row => row.textContent);
    }""",
        ["1,000", "−2.5", "9.5 ± 0.1", "–", "", "12 %", "+0.5"],
    )
    assert order == ["−2.5", "+0.5", "9.5 ± 0.1", "12 %", "1,000", "–", ""]


@pytest.mark.browser
def test_a_name_in_a_legend_shows_its_curves_alone(opened):
    def shown(place: str) -> set[str]:
        return set(
            opened.locator(f"{place} [data-series]").evaluate_all(
                "found => found.filter(curve => curve.style.display !== 'none').map(curve =>"
                " curve.dataset.series)"
            )
        )

    names, curves = opened.locator("#p0-curves ~ figure .legend button"), "#p0-curves ~ figure svg"
    assert shown(curves) == {"c0", "c1", "c2"}
    for press, left, pressed in (
        (1, {"c1"}, ["false", "true", "false"]),
        (2, {"c1", "c2"}, ["false", "true", "true"]),
        (1, {"c2"}, ["false", "false", "true"]),
    ):
        names.nth(press).click()
        assert shown(curves) == left
        assert [names.nth(number).get_attribute("aria-pressed") for number in range(3)] == pressed
    names.nth(2).click()  # the last one: all are back
    assert shown(curves) == {"c0", "c1", "c2"}
    figure = opened.locator("#p0 figure.chart").first  # accuracy
    assert figure.get_by_text("Press a name").is_visible()
    assert figure.locator("svg[role=img] [data-series]").count() > 2, "lines and their error bars"
    figure.locator(".legend button").first.click()
    assert shown("#p0 figure.chart >> nth=0 >> svg[role=img]") == {"a0"}
    assert figure.locator(".legend button[aria-pressed=false]").count() == 1


@pytest.mark.browser
def test_without_scripts_nothing_invites_a_press(report, browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto(report.as_uri())
    assert page.get_by_text("Press a name").count() == 2
    assert not any(
        found.is_visible()
        for found in page.get_by_text(re.compile("[Pp]ress a (name|column)")).all()
    )
    button = page.locator("#p0 .matrix thead button").first
    style = button.evaluate(
        "button => [getComputedStyle(button, '::after').content, getComputedStyle(button).cursor]"
    )
    assert style[0] in ("none", "normal")
    assert style[1] != "pointer"
    page.close()


@pytest.mark.browser
def test_a_link_opens_what_it_leads_to(opened):
    assert not opened.locator("#r2-speed").is_visible()
    opened.evaluate("location.hash = '#r2-speed'")
    opened.locator("#r2-speed").wait_for(state="visible")  # a function would need eval to poll
    opened.locator(".toc a[href='#r1']").click()
    opened.locator("#r1 details").first.and_(opened.locator("[open]")).wait_for()
    assert not opened.evaluate("document.querySelector('#r0 details').open")
