"""Ablations on the report page: which retrainings make a figure, over what, and what it draws."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdds_dist.report import charts
from tdds_dist.report.figures import ablations
from tdds_dist.report.read import read_facts
from tdds_dist.runs.artifacts import save_coreset
from tdds_dist.runs.directory import RunDir
from tests import make
from tests.make import NUM_IMAGES, finish, log, retraining, start

LABEL_N = np.arange(NUM_IMAGES) % make.NUM_CLASSES


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = start(tmp_path / "seed0", "train.beton")
    log(found)
    finish(found)
    return found


def retrain(
    run: RunDir,
    rate: float,
    top1: float,
    seed: int = 0,
    importance: str = "batch",
    first: int = 0,
    strategy: str = "E",
    **settings: Any,
) -> None:
    """Write a retraining as an experiment leaves it, on the M samples from `first` on; by default
    of TDDS with T = 10, K = 5."""
    known: dict[str, Any] = {"score": "tdds", "preset": "official", "T": 10, "K": 5, "beta": 0.9}
    known = known if settings.get("score", "tdds") == "tdds" else {}
    settings = known | {"sampler": "top", "class_balanced": False} | settings
    name = "-".join(f"{value}" for value in settings.values())
    file = run.coresets / f"{name}_p{rate:g}.npz"
    index_M = np.arange(first, first + NUM_IMAGES - round(rate * NUM_IMAGES))
    save_coreset(
        file, dataclasses.replace(make.coreset(name, rate, index_M, LABEL_N), settings=settings)
    )
    sub = retraining(
        run,
        name,
        rate,
        seed,
        top1,
        strategy,
        importance,
        name=f"{file.stem}_{strategy}_{importance}_seed{seed}",
    )
    record = {"coreset": str(file), "coreset_settings": settings}
    sub.write_result((sub.read_result() or {}) | record)


def found(*runs: RunDir) -> list[dict[str, Any]]:
    return ablations([read_facts(run) for run in runs])


def drawn(*runs: RunDir) -> dict[str, list[str]]:
    """The figures by title: what each chart says to the blind, from its own title on."""
    texts = {}
    for figure in found(*runs):
        labels = [re.search('aria-label="([^"]*)"', svg) for svg in figure["charts"]]
        told = [label[1] for label in labels if label is not None]
        assert all(text.startswith(figure["title"] + ", ") for text in told)
        texts[figure["title"]] = [text.removeprefix(figure["title"] + ", ") for text in told]
    return texts


# ---- TDDS at several (T, K)


def test_a_grid_of_windows_is_drawn_over_T_with_a_line_per_K(run, tmp_path):
    other = start(tmp_path / "seed1", "train.beton", run={"seed": 1})
    for T, K, rate, top1 in (
        (10, 5, 0.5, 80.0),
        (20, 5, 0.5, 82.0),
        (20, 10, 0.5, 84.0),
        (30, 10, 0.5, 85.0),
        (10, 5, 0.8, 60.0),
        (20, 5, 0.8, 61.0),
        (20, 5, 0.9, 50.0),  # one (T, K) only
    ):
        retrain(run, rate, top1, T=T, K=K)
    retrain(other, 0.5, 86.0, 1, T=20, K=10)
    assert drawn(run, other) == {
        "Trajectory length T and window K (tdds)": [
            "50 % removed: final top-1 (%) by T (epochs)."
            " K = 5: 80.00 at 10, 82.00 at 20; K = 10: 85.00 at 20, 85.00 at 30.",
            "80 % removed: final top-1 (%) by T (epochs). K = 5: 60.00 at 10, 61.00 at 20.",
        ]
    }
    (figure,) = found(run, other)
    assert [(line.label, line.x) for line in figure["legend"]] == [
        ("K = 5", [10, 20]),
        ("K = 10", [20, 30]),
    ]
    assert figure["legend"][1].error == pytest.approx([2**0.5, 0])  # of 84 and 86
    assert figure["has_seeds"]
    assert len({(line.slot, line.marker, line.series) for line in figure["legend"]}) == 2


def test_windows_that_share_no_K_are_drawn_over_K(run):
    for K, top1 in ((5, 80.0), (10, 81.0)):
        retrain(run, 0.5, top1, T=20, K=K)
    assert drawn(run) == {
        "Trajectory length T and window K (tdds)": [
            "50 % removed: final top-1 (%) by K (epochs). T = 20: 80.00 at 5, 81.00 at 10."
        ]
    }


def test_a_window_of_each_rate_is_no_ablation(run):
    retrain(run, 0.5, 80.0, T=20, K=10)
    retrain(run, 0.8, 70.0, T=10, K=5)
    retrain(run, 0.8, 70.0, T=30, K=10)  # differs from the other one in T and in K
    assert not found(run)


# ---- any other setting


def test_beta_is_drawn_over_the_rate_with_the_overlap_of_the_coresets(run, tmp_path):
    other = start(tmp_path / "seed1", "train.beton", run={"seed": 1})
    for rate, T, top1 in ((0.5, 20, 80.0), (0.8, 10, 60.0)):  # a T of each rate
        retrain(run, rate, top1, T=T)
        retrain(run, rate, top1 - 4, beta=0.0, first=6, T=T)
        retrain(other, rate, top1 - 2, 1, beta=0.0, first=3, T=T)
        retrain(other, rate, top1 + 2, 1, T=T)
    retrain(run, 0.9, 40.0, T=10)  # nothing to compare it with
    # of 30 images 24 and 27 are in common, of 12 images 6 and 9
    assert drawn(run, other) == {
        "Average over windows (tdds)": [
            "final top-1 (%) by images removed."
            " simple average: 77.00 at 50 %, 57.00 at 80 %; beta = 0.9: 81.00 at 50 %, 61.00 at 80 %.",
            "coreset in common with beta = 0.9 (%) by images removed."
            " simple average: 85.00 at 50 %, 62.50 at 80 %; by chance: 50.00 at 50 %, 20.00 at 80 %.",
        ]
    }
    (figure,) = found(run, other)
    assert [line.label for line in figure["legend"]] == [
        "simple average",
        "beta = 0.9",
        "by chance",
    ]
    assert figure["reference"] == "beta = 0.9"


def test_without_its_coreset_a_retraining_has_no_overlap(run):
    for beta in (0.9, 0.85):
        retrain(run, 0.5, 80.0, beta=beta)
    (figure,) = found(run)
    assert (len(figure["charts"]), figure["reference"]) == (2, "beta = 0.9")
    file = next(run.coresets.glob("*0.85*"))
    save_coreset(  # chosen anew in another way
        file, dataclasses.replace(make.coreset("other", 0.5, np.arange(30), LABEL_N))
    )
    (figure,) = found(run)
    assert (len(figure["charts"]), figure["reference"]) == (1, None)


def test_each_delta_is_compared_with_the_usual_one(run):
    for delta, top1 in ((None, 80.0), ("ce", 70.0), ("kl_signed", 75.0)):
        retrain(run, 0.5, top1, **({"delta": delta} if delta else {}))
    texts = drawn(run)
    assert [*texts] == [
        "What varies in a window: absolute KL against signed KL (tdds)",
        "What varies in a window: absolute KL against signed CE (tdds)",
    ]
    assert [text[0].rsplit(". ", 1)[1] for text in texts.values()] == [
        "absolute KL: 80.00 at 50 %; signed KL: 75.00 at 50 %.",
        "absolute KL: 80.00 at 50 %; signed CE: 70.00 at 50 %.",
    ]


def test_importance_leaves_the_coresets_as_they_are(run):
    for importance, top1 in (("sample", 70.0), ("none", 75.0), ("batch", 80.0)):
        retrain(run, 0.5, top1, importance=importance)
    (texts,) = drawn(run).values()
    assert texts == [
        "final top-1 (%) by images removed. importance batch: 80.00 at 50 %;"
        " importance none: 75.00 at 50 %; importance sample: 70.00 at 50 %."
    ]


def test_options_of_other_scores_are_settings_too(run):
    for T in (10, 100):
        retrain(run, 0.5, 80.0, importance="none", score="el2n", T=T, el2n_epochs=T)
    for cutoff in (None, 0.2):
        own = {} if cutoff is None else {"own_hard_cutoff_rate": cutoff}
        retrain(run, 0.5, 80.0, importance="none", score="aum", sampler="ccs", **own)
    assert [
        (title, [line.label for line in figure["legend"]])
        for figure in found(run)
        for title in [figure["title"]]
    ] == [
        ("Hard cutoff (aum, sampler ccs)", ["cutoff = 0.2", "cutoff of the rate", "by chance"]),
        (
            "Epochs that the score looks at (el2n)",
            ["first 10 epochs", "first 100 epochs", "by chance"],
        ),
    ]


def test_what_differs_in_two_settings_is_not_compared(run):
    retrain(run, 0.5, 80.0)
    retrain(run, 0.5, 80.0, beta=0.0, importance="none")
    retrain(run, 0.8, 80.0, beta=0.0)  # another rate
    retrain(run, 0.5, 80.0, importance="none", score="aum")
    retrain(run, 0.5, 80.0, importance="none", score="aum", sampler="ccs")  # a method of its own
    assert not found(run)


def test_the_title_tells_figures_of_one_setting_apart(run):
    for strategy in "EP":
        for beta in (0.0, 0.9):
            retrain(run, 0.5, 80.0, beta=beta, strategy=strategy)
    for T in (20, 30):  # with T = 10 a grid
        for beta in (0.0, 0.9):
            retrain(run, 0.5, 80.0, beta=beta, T=T)
    assert {*drawn(run)} == {
        "Trajectory length T and window K (tdds)",
        "Trajectory length T and window K (tdds, simple average)",
        "Average over windows (tdds, T = 10, K = 5)",
        "Average over windows (tdds, T = 20, K = 5)",
        "Average over windows (tdds, T = 30, K = 5)",
        "Average over windows (tdds, Strategy-P)",
    }


def test_what_has_not_finished_is_left_out(run):
    retrain(run, 0.5, 80.0)
    retrain(run, 0.5, 81.0, beta=0.0)
    assert len(found(run)) == 1
    next(sub for sub in run.retrain_runs() if "-0.0-" in sub.path.name).result_file.unlink()
    assert not found(run)


# ---- on the page


def test_the_page_has_a_section_where_there_are_ablations(run, tmp_path):
    retrain(run, 0.5, 80.0)
    assert "Ablations" not in make.page_of([run], tmp_path / "none.html").text
    retrain(run, 0.5, 81.0, beta=0.0)
    one = make.page_of([run], tmp_path / "one.html")
    one.check_references()
    assert one.text.count('<a href="#r0-ablations">Ablations</a>') == 1
    assert one.text.count('id="r0-ablations"') == 1
    assert "Bars: standard deviation" not in one.text, "one seed"
    other = start(tmp_path / "seed1", "train.beton", run={"seed": 1})
    finish(other)
    retrain(other, 0.5, 83.0, 1)
    several = make.page_of([run, other], tmp_path / "several.html")
    several.check_references()
    assert several.text.count(">Ablations</a>") == 1, "of both together"
    assert 'id="p0-ablations"' in several.text


def test_only_values_that_occur_are_labelled():
    line = charts.Line("K = 5", [10, 20, 70], [80.0, 81.0, 82.0], 1)
    svg = charts.line_chart([line], "top-1", "T", "", ticks="{:g} epochs")
    assert re.findall(r">(\d+ epochs)<", svg) == ["10 epochs", "20 epochs", "70 epochs"]


def test_error_bars_stand_side_by_side_and_within_the_chart():
    lines = [
        charts.Line(name, [1, 2], [50.0, 50.0], 1, error=[30.0, 0.0], series=name) for name in "ab"
    ]
    svg = charts.line_chart(lines, "top-1", "T", "")
    bars = re.findall(r'<g data-series="(\w)"> <path d="M ([\d.]+) ([\d.]+) L [\d.]+ ([\d.]+)', svg)
    assert [name for name, *_ in bars] == ["a", "b"]
    (left, low, high), (right, *_) = ([float(number) for number in rest] for _, *rest in bars)
    assert right - left == pytest.approx(charts.BAR_STEP, abs=0.01)
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])
    assert 20 < high < low < height - 20
    assert low - high > height / 2
