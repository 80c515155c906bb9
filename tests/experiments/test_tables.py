"""Tables of an experiment from outcomes made by hand, against numbers worked out by hand."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tdds_dist.config.experiment import Experiment, Variant
from tdds_dist.config.grid import BUILT_IN_METHODS, Method
from tdds_dist.experiments.grid import Cell, check_experiment
from tdds_dist.experiments.tables import CSV_COLUMNS, CellResult, write_tables
from tdds_dist.report import published
from tdds_dist.runs.directory import RunDir
from tdds_dist.text import mean_std
from tests.make import config as make_config
from tests.make import csv_rows, write_header

TDDS, RANDOM, CCS = (BUILT_IN_METHODS[name] for name in ("tdds", "random", "ccs"))


def make_plan(
    tmp_path: Path,
    train: str = "data/cifar10_train.beton",
    network: str = "resnet18",
    num_classes: int = 10,
    batch: int = 128,
    **changes: object,
) -> Experiment:
    config = make_config(
        run={"name": "c"},
        model={"name": network, "cifar_stem": num_classes < 1000},
        data={"train": train, "num_classes": num_classes},
        train={"epochs": 30, "global_batch_size": batch},
        score={"windows": [{"T": 30, "K": 10}]},
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    plan = {"name": "hand", "config": str(tmp_path / "c.yaml"), "dir": str(tmp_path / "hand")}
    plan |= {"overrides": ("train.epochs=20",), "methods": (TDDS, RANDOM)}
    plan |= {"pruning_rates": (0.3, 0.5), "seeds": (0, 1, 2)}
    return Experiment.model_validate(plan | changes)


# What `Coreset.method` says of the methods below; the others are called as their score.
KEYS = {
    "half": "ccs_aum_strata20",
    "ccs": "ccs_aum",
    "tdds_ce": "tdds_official_T70_K10_beta0.9_ce",
    "el2n_slow": "el2n_T20",
    "tdds_other": "tdds_official_T30_K10_beta0.9",
    "tdds_theirs": "tdds_official_T70_K10_beta0.9",
}


def outcomes_of(
    plan: Experiment, top1: dict[tuple[str, float], list[float | None]], **changes: Any
) -> list[CellResult]:
    """One outcome per method, rate and seed; None where there is no result. Cells that `top1`
    leaves out are not done."""
    found, nothing = [], [None] * len(plan.seeds)
    for method, rate in itertools.product(plan.methods, plan.pruning_rates):
        importance = "batch" if method.score_key == "tdds" else "none"
        fields = {"strategy": "E", "variant": None, "importance": importance} | changes
        key = KEYS.get(method.name, method.name)
        values = top1.get((method.name, rate), nothing)
        for seed, value in zip(plan.seeds, values, strict=True):
            result = {"num_images": round(50000 * (1 - rate)), "epochs": 20, "train_seconds": 360.0}
            if value is not None:
                result |= {"final_top1": value, "best_top1": value + 1}
            done = None if value is None else result
            run = RunDir(plan.directory / f"seed{seed}")
            cell = Cell(method, rate, seed=seed, collection=run, **fields)
            found.append(CellResult(cell, done, key))
    return found


def collections_of(
    plan: Experiment, top1: list[float | None], epochs: int = 20
) -> dict[int, RunDir]:
    """A collection per seed with this accuracy; None where it is not done."""
    runs = {seed: RunDir(plan.directory / f"seed{seed}") for seed in plan.seeds}
    for run, value in zip(runs.values(), top1, strict=True):
        if value is not None:
            run.start({}, {"stage": "collect"}, world_size=2, device="cpu")
            result = {"epochs": epochs, "epochs_planned": 20, "train_seconds": 720.0}
            run.write_result({"final_top1": value} | result)
    return runs


def lines_of(text: str) -> list[list[str]]:
    """Cells of every table line, without the rules."""
    lines = re.findall(r"^\|(?!--)(.*)\|$", text, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def rows_of(plan: Experiment) -> list[dict[str, str]]:
    return csv_rows(plan.directory / "cells.csv")


def test_mean_and_sample_standard_deviation():
    assert mean_std([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5))
    assert mean_std([5.0, 7.0]) == (6.0, pytest.approx(2**0.5))
    assert mean_std([5.0]) == (5.0, None)
    assert mean_std(iter([5.0, 5.0])) == (5.0, 0.0)


def test_the_table(tmp_path):
    """90, 92, 97: mean 93, deviations -3, -1, 4, so sqrt(26 / 2) = 3.61. Published numbers below
    their method."""
    plan = make_plan(tmp_path)
    top1 = {("tdds", 0.3): [90.0, 92.0, 97.0], ("tdds", 0.5): [80.0, None, 81.0]}
    outcomes = outcomes_of(plan, top1 | {("random", 0.3): [None, None, 50.254]})
    text = write_tables(plan, outcomes, collections_of(plan, [94.0, 95.0, 96.5]))
    assert text == (plan.directory / "table.md").read_text()
    assert lines_of(text) == [
        ["final top-1 (%), images removed", "30 %", "50 %"],
        ["tdds, importance batch", "93.00 ± 3.61", "80.50 ± 0.71 (2 of 3)"],
        ["*tdds, published*", "*95.47 ± 0.06*", "*95.21 ± 0.04*"],
        ["random", "50.25 (1 of 3)", "–"],
        ["*random, published*", "*94.58 ± 0.04*", "*93.38 ± 0.17*"],
    ]
    # deviations -7/6, -1/6, 8/6: sqrt(114/36/2)
    assert "Full data: 95.17 ± 1.26 (3 seeds; published: 95.23)." in text
    assert text.startswith("# hand\n")
    shorter = plan.model_copy(update={"overrides": (*plan.overrides, "retrain.epochs=15")})
    assert "resnet18, 20 epochs (retrainings 15), batch" in write_tables(shorter, outcomes, {})
    settings = "resnet18, 20 epochs, batch 128, data/cifar10_train.beton; seeds 0, 1, 2"
    assert f"{settings}; 6 of 12 retrainings done." in text
    assert "cpu, 2 rank(s) per run" in text
    assert "1 h 12 min of training in 0 s" in text  # 6 x 360 s + 3 x 720 s
    assert "## Strategy-E\n" in text
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_method_with_rates_of_its_own_is_in_the_grid_at_those(tmp_path):
    """EL2N at 50 % only, at which TDDS has no window: the grid has neither, the table dashes."""
    methods = [TDDS.model_copy(update={"pruning_rates": (0.3,)}), RANDOM]
    methods.append(Method(name="el2n", pruning_rates=(0.5,)))
    windows = "score.windows=[{T: 30, K: 10, pruning_rates: [0.3]}]"
    plan = make_plan(tmp_path, methods=tuple(methods), overrides=(windows,))
    _, cells = check_experiment(plan)
    found = {(cell.method.name, cell.pruning_rate) for cell in cells}
    assert found == {("tdds", 0.3), ("random", 0.3), ("random", 0.5), ("el2n", 0.5)}
    outcomes = [
        outcome
        for outcome in outcomes_of(plan, {("el2n", 0.5): [70.0, 72.0, None]})
        if (outcome.cell.method.name, outcome.cell.pruning_rate) in found
    ]
    text = write_tables(plan, outcomes, collections_of(plan, [None] * 3))
    assert lines_of(text)[-2:] == [
        ["el2n", "–", "71.00 ± 1.41 (2 of 3)"],
        ["*el2n, published*", "–", "*95.06 ± 0.04*"],
    ]
    assert len(rows_of(plan)) == 4 * 3


def test_hours_of_all_invocations_and_what_is_not_done_yet(tmp_path):
    """Also when no collection got as far as a directory."""
    plan = make_plan(tmp_path)
    text = write_tables(plan, outcomes_of(plan, {}), collections_of(plan, [None, None, None]))
    assert "0 of 12 retrainings done" in text
    assert "Full data" not in text
    assert lines_of(text)[1] == ["tdds, importance batch", "–", "–"]
    assert [row["final_top1"] for row in rows_of(plan)] == [""] * 12
    (plan.directory / "times.jsonl").write_text('{"seconds": 3600}\n{"seconds": 1800}\n')
    text = write_tables(plan, outcomes_of(plan, {}), collections_of(plan, [94.0, None, None]))
    assert "12 min 0 s of training in 1 h 30 min" in text
    assert "Full data: 94.00 (1 seed; published: 95.23)." in text


def test_collections_that_stopped_early_say_nothing_about_the_full_data(tmp_path):
    plan = make_plan(tmp_path)
    runs = collections_of(plan, [94.0, 95.0, None], epochs=15)
    text = write_tables(plan, outcomes_of(plan, {}), runs)
    stopped = "Collections stopped before the end of their schedule"
    nothing = "so they give no accuracy on the full data; published: 95.23."
    assert f"{stopped}, {nothing}" in text
    assert "Full data" not in text


def test_csv_has_one_line_per_retraining(tmp_path):
    half = Method(name="half", score="aum", sampler="ccs", num_strata=20)
    plan = make_plan(tmp_path, methods=(TDDS, half), seeds=(0, 1), pruning_rates=(0.3,))
    outcomes = outcomes_of(plan, {("tdds", 0.3): [90.0, None], ("half", 0.3): [70.5, 71.5]})
    write_tables(plan, outcomes, collections_of(plan, [None, None]))
    assert (plan.directory / "cells.csv").read_text() == "\n".join(
        [
            ",".join(CSV_COLUMNS),
            "tdds,tdds,,batch,,E,0.3,0,35000,20,90.0,91.0,360.0,95.47,0.06,1,,",
            "tdds,tdds,,batch,,E,0.3,1,,,,,,95.47,0.06,1,,",
            "half,aum,ccs,none,,E,0.3,0,35000,20,70.5,71.5,360.0,,,,,",
            "half,aum,ccs,none,,E,0.3,1,35000,20,71.5,72.5,360.0,,,,,",
            "",
        ]
    )
    columns = """method score sampler importance variant strategy pruning_rate seed num_images
        epochs final_top1 best_top1 train_seconds published_top1 published_std published_table
        wrong_labels_kept corrupted_kept"""
    assert (*columns.split(),) == CSV_COLUMNS


# ---- what stands beside ours


def published_rows(plan: Experiment, **changes: str) -> set[str]:
    runs = collections_of(plan, [None] * len(plan.seeds))
    text = write_tables(plan, outcomes_of(plan, {}, **changes), runs)
    found = {line[0] for line in lines_of(text) if "published" in line[0]}
    assert bool(found) == any(row["published_top1"] for row in rows_of(plan))
    return found


def test_variants_have_no_published_row(tmp_path):
    """Whatever a row is called, its coresets say what it is. The paper's window at 30 % is (70,
    10), and it weighs."""
    methods = [
        Method(name=name, score="tdds" if name.startswith("tdds") else "el2n")
        for name in ("tdds_ce", "el2n_slow", "tdds_other", "tdds_theirs")
    ]
    plan = make_plan(tmp_path, methods=(*methods, CCS, Method(name="aum")), pruning_rates=(0.3,))
    assert published_rows(plan) == {"*aum, published*", "*tdds_theirs, published*"}
    assert published_rows(make_plan(tmp_path), importance="none") == {"*random, published*"}


def test_strategy_p_has_its_own_numbers(tmp_path):
    methods = (TDDS, CCS, BUILT_IN_METHODS["el2n"])
    plan = make_plan(tmp_path, methods=methods, strategies=("P",), pruning_rates=(0.5, 0.9))
    text = write_tables(plan, outcomes_of(plan, {}, strategy="P"), collections_of(plan, [None] * 3))
    assert "## Strategy-P\n" in text
    printed = [line for line in lines_of(text) if "published" in line[0]]
    assert printed == [
        ["*tdds, published*", "*95.66 ± 0.08*", "–"],
        ["*ccs, published*", "*95.04 ± 0.37*", "–"],
        ["*el2n, published*", "*94.61 ± 0.20*", "–"],
    ]


IMAGENET = {"train": "imagenet.beton", "num_classes": 1000, "network": "resnet34", "batch": 256}


# which number belongs to what: tests/report/test_published.py
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": "data/cifar100.beton", "num_classes": 100}, True),
        ({"num_classes": 100}, False),
        ({"network": "vgg16_bn"}, False),
        ({"batch": 256}, False),
        (IMAGENET | {"pruning_rates": (0.7,)}, True),
    ],
)
def test_published_rows_are_for_the_papers_images_and_network(tmp_path, changes, expected):
    published = {"*tdds, published*", "*random, published*"} if expected else set()
    assert published_rows(make_plan(tmp_path, **changes)) == published


def test_variants_have_tables_and_published_numbers_of_their_own(tmp_path):
    """Coresets of ResNet-18: Table 1, Table 6 for the full batch, Table 7 for another network."""
    changes = {
        "full": ["retrain.batch_size_rule={}"],
        "vgg16": ["model.name=vgg16_bn"],
        "resnet34": ["model.name=resnet34"],
        "half": ["train.global_batch_size=64"],
        "usual": [],
    }
    variants = [Variant(name=name, overrides=tuple(words)) for name, words in changes.items()]
    of_random = {"methods": (RANDOM,), "pruning_rates": (0.7, 0.8)}
    plan = make_plan(tmp_path, **of_random, variants=tuple(variants))
    outcomes = [
        replace(outcome, result=outcome.result and {**outcome.result, "final_top1": 60.0 + number})
        for number, variant in enumerate(variants)
        for outcome in outcomes_of(plan, {("random", 0.7): [0, 0, 0]}, variant=variant)
    ]
    text = write_tables(plan, outcomes, collections_of(plan, [None] * 3))
    parts = text.split("## Strategy-E, retrained with ")[1:]
    found = {part.split()[0]: lines_of(part)[1:] for part in parts}
    assert found == {
        "full": [
            ["random", "60.00 ± 0.00", "–"],
            ["*random, published*", "*90.61 ± 0.44*", "*86.92 ± 0.28*"],
        ],
        "vgg16": [["random", "61.00 ± 0.00", "–"], ["*random, published*", "*88.55*", "–"]],
        "resnet34": [["random", "62.00 ± 0.00", "–"]],
        "half": [["random", "63.00 ± 0.00", "–"]],
        "usual": [
            ["random", "64.00 ± 0.00", "–"],
            ["*random, published*", "*90.61 ± 0.44*", "*88.87 ± 0.47*"],
        ],
    }
    assert "Published: Tables 1, 6, 7 of arXiv 2311.13613, not ours.\nTables 7 to 10 name" in text
    rows = [row for row in rows_of(plan) if row["published_table"]]
    numbers = {f"{row['variant']} {row['pruning_rate']}": row["published_table"] for row in rows}
    usual = {"usual 0.7": "1", "usual 0.8": "1"}
    assert numbers == {"full 0.7": "1", "full 0.8": "6", "vgg16 0.7": "7"} | usual


@pytest.mark.parametrize("kind", ["clean", "labels", "images", "part"])
def test_images_that_were_changed_or_left_out_have_no_published_row(tmp_path, kind, monkeypatch):
    size = 21 if kind == "part" else 20
    monkeypatch.setitem(published.DATASETS, "cifar10", ("CIFAR-10", size, 10))
    path, label_N = tmp_path / "some_train.beton", np.arange(20) % 10
    other_label_N = np.where(np.arange(20) < 5, (label_N + 1) % 10, label_N)
    true_label_N = other_label_N if kind == "labels" else None
    corruption = ["fog"] * 2 + [""] * 18 if kind == "images" else None
    write_header(path, label_N, 10, true_label_N, corruption, source="cifar10")
    assert bool(published_rows(make_plan(tmp_path, train=str(path)))) == (kind == "clean")


def test_the_papers_noise_has_its_own_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(published.DATASETS, "cifar100", ("CIFAR-100", 20, 100))
    path, label_N = tmp_path / "some_train.beton", np.arange(20)
    true_N = np.where(np.arange(20) < 4, (label_N + 1) % 100, label_N)
    write_header(path, label_N, 100, true_N, source="cifar100")
    plan = make_plan(tmp_path, train=str(path), num_classes=100, methods=(RANDOM, CCS))
    text = write_tables(plan, outcomes_of(plan, {}), collections_of(plan, [94.0, None, None]))
    assert "Full data: 94.00 (1 seed; published: 65.48)." in text
    assert ["*ccs, published*", "*53.38 ± 0.86*", "*40.59 ± 0.21*"] in lines_of(text)
    assert "Published: Table 10 of arXiv 2311.13613, not ours.\nTables 7 to 10 name" in text


def test_noise_that_coresets_keep_is_a_table_of_its_own(tmp_path):
    vgg16 = Variant(name="vgg16", overrides=())
    plan = make_plan(tmp_path, variants=(vgg16,))
    outcomes = outcomes_of(plan, {})
    assert "Wrong labels" not in write_tables(plan, outcomes, collections_of(plan, [None] * 3))
    shares = {("tdds", 0.3): [0.5, 0.6, 0.7], ("tdds", 0.5): [0.25] * 3}
    shares |= {("random", 0.3): [0.7, None, None], ("random", 0.5): [None] * 3}

    def share(cell):
        return shares[cell.method.name, cell.pruning_rate][cell.seed]

    outcomes = [replace(each, wrong_labels_kept=share(each.cell)) for each in outcomes]
    other = [
        replace(outcome, cell=replace(outcome.cell, variant=vgg16), wrong_labels_kept=0.99)
        for outcome in outcomes
    ]
    text = write_tables(plan, outcomes + other, collections_of(plan, [None] * 3))
    table = lines_of(text.split("## Wrong labels in the coreset")[1])
    assert table == [
        ["percent of them kept, images removed", "30 %", "50 %"],
        ["tdds", "60.0 ± 10.0", "25.0 ± 0.0"],
        ["random", "70.0", "–"],
    ]
    assert "Corrupted" not in text
    assert [row["wrong_labels_kept"] for row in rows_of(plan)][:3] == ["0.5", "0.6", "0.7"]
    assert {row["corrupted_kept"] for row in rows_of(plan)} == {""}
