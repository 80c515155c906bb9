"""The report page and the terminal table, from a made-up run directory."""

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from tdds_dist.config.run import load_config, to_dict
from tdds_dist.config.scores import base_key
from tdds_dist.console import speaking
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.report import charts
from tdds_dist.report.charts import Bins
from tdds_dist.report.page import build_report
from tdds_dist.report.published import footnotes
from tdds_dist.report.read import read_facts
from tdds_dist.report.results import format_summary, summary_rows
from tdds_dist.runs.artifacts import save_coreset
from tdds_dist.runs.directory import RunDir
from tests import make
from tests.make import (
    NUM_CLASSES,
    NUM_IMAGES,
    TDDS,
    Page,
    add_scores,
    finish,
    log,
    refused,
    retraining,
    start,
)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.write_images(tmp_path_factory.mktemp("data") / "train.beton")


@pytest.fixture(scope="module")
def label_N(beton: Path) -> np.ndarray:
    return make.manifest_of(beton).label_N


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, beton: Path, label_N: np.ndarray) -> RunDir:
    """A run with everything in it. Never changed."""
    run = start(tmp_path_factory.mktemp("runs") / "demo", beton)
    log(run)
    finish(run)
    add_scores(run, TDDS, label_N, (0.5, 0.8))
    add_scores(
        run, "random", label_N, (0.5,), np.random.default_rng(0).random(NUM_IMAGES, np.float32)
    )
    save_coreset(
        run.coresets / "odd.npz", make.coreset(TDDS, 0.7, np.arange(1, NUM_IMAGES, 2), label_N)
    )
    retraining(run, TDDS, 0, 0, 91.5)
    for seed, final in enumerate((80.0, 81.0, 85.0)):
        retraining(run, TDDS, 0.5, seed, final, importance="batch")
    retraining(run, "random", 0.5, 0, 77.25)
    retraining(run, TDDS, 0.8, 0, None, importance="batch")
    retraining(run, "el2n", 0.8, 0, None, name="mine")  # a name that says nothing
    return run


@pytest.fixture(scope="module")
def page(demo: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page about `demo` and a run that only started."""
    folder = tmp_path_factory.mktemp("page")
    return Page(
        build_report([demo, start(folder / "other")], folder / "report.html", num_thumbnails=4)
    )


@pytest.fixture
def run(demo: RunDir, tmp_path: Path) -> RunDir:
    """A copy of `demo`, to be changed."""
    return RunDir(shutil.copytree(demo.path, tmp_path / "demo"))


def page_of(tmp_path: Path, *runs: RunDir) -> Page:
    return make.page_of([*runs], tmp_path / "report.html")


# ---- one page, looked at from all sides


def test_the_page_loads_nothing_is_small_and_refers_to_itself(page):
    links = [
        attrs[name]
        for _, attrs in page.tags
        for name in ("src", "href", "srcset", "data")
        if name in attrs
    ]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.text))
    assert "@import" not in page.text
    assert not re.search(r"https?://", page.text)
    assert "default-src 'none'" in page.text
    assert all("src" not in attrs for tag, attrs in page.tags if tag == "script")
    assert len(page.text.encode()) < 500_000
    page.check_references()
    assert (page.count("article"), page.count("h1")) == (2, 1)


def check_svg(svg):
    ElementTree.fromstring(svg)
    assert "var(--s" in svg
    assert not re.search(r"#0c0|font-family|http|<style", svg)


def test_numbers_come_from_results(page):
    assert page.row("full data collection run")[1:5] == ["0 %", "90.00", "−1.50", "91.00"]
    assert page.row("full data retrained", 1)[1:5] == ["0 %", "91.50", "reference", "92.00"]
    # mean of 80, 81, 85 is 82; sample standard deviation sqrt((4 + 1 + 9) / 2) = 2.6458
    assert page.row("tdds E, batch")[1:] == ["82.00 ± 2.65 −9.50", "1 of 3 epochs"]  # the matrix
    cells = ["50 %", "82.00 ± 2.65", "−9.50", "82.50 ± 2.65", "30", "3", "0, 1, 2"]
    assert page.row("tdds E, batch", 1)[1:] == cells
    assert page.row("random E, none")[1:] == ["77.25 −14.25 1 seed", "–"]
    assert page.row("random E, none", 1)[1:5] == ["50 %", "77.25", "−14.25", "77.75"]
    assert [page.row("tdds E, batch", number)[1:5] for number in (3, 4, 5)] == [  # each by itself
        ["50 %", "0", "80.00", "80.50"],
        ["50 %", "1", "81.00", "81.50"],
        ["50 %", "2", "85.00", "85.50"],
    ]
    assert (
        "costs 9.50 points with tdds (importance batch), down to 82.00\N{NO-BREAK SPACE}%"
        in page.text
    )
    speed = next(row for row in page.rows if row[0] == "collect")
    # first epoch left out
    assert speed == ["collect", "4,321", "1 min 15 s", "–", "1.25 %", "1.5 s", "3", "2", "0"]
    assert "Published" not in page.text
    assert "expected at random" not in page.text  # the images are clean
    assert "<small>on 2 ranks, by torchrun</small>" in page.text


def test_unfinished_runs_are_shown(page, demo):
    assert "tdds E, batch | 80 % | unfinished, 1 of 3 epochs" in [
        " | ".join(row[:3]) for row in page.rows
    ]
    assert page.row("el2n E, none", 1)[1:3] == ["80 %", "unfinished, 1 of 3 epochs"]
    assert "tdds 80 %, E, batch, seed 0 (unfinished)" in page.text
    row = next(
        row
        for row in summary_rows([read_facts(demo)])
        if row["name"] == f"{TDDS}_p0.8_E_batch_seed0"
    )
    assert row["final_top1"] is None


def test_names_are_escaped_and_images_shown(page):
    assert make.EVIL_CLASS not in page.text
    # table; what loses most
    assert page.text.count("&lt;script&gt;alert(&#34;class&#34;)&lt;/script&gt;") >= 2
    assert make.EVIL_PATH not in page.text
    assert any(attrs.get("title") == make.EVIL_PATH for _, attrs in page.tags)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    # highest, lowest, below and above the cut at the largest pruning rate
    assert len(images) == 4 + 4 + 2 + 2
    assert all(
        image["class"] == "pixelated" and image["src"].startswith("data:image/png")
        for image in images
    )
    numbers = [int(re.match(r"Image (\d+),", image["alt"])[1]) for image in images]
    assert numbers == [59, 58, 57, 56, 0, 1, 2, 3, 46, 47, 48, 49]  # 80 % of 60 removed: 0..47


def test_class_table_and_cuts(page, beton, label_N):
    kept = 100 * np.mean(np.flatnonzero(label_N == 1) >= 30)
    head = next(row for row in page.rows if row[0] == "Class")
    row = next(row for row in page.rows if row[0] == make.manifest_of(beton).class_names[1])
    assert row[1] == str(int((label_N == 1).sum()))
    assert row[head.index("tdds 50 %")] == f"{kept:.1f}"
    # the lowest kept score; another choice than the top; a random rank is no score
    assert [page.row(name)[3] for name in (f"{TDDS}_p0.5", "odd", "random_p0.5")] == [
        "0.5",
        "not a plain cut",
        "–",
    ]
    assert 'aria-label="Histogram of 60' in page.text
    assert "Cuts: 50 % removed below 0.5, 80 % removed below 0.8." in page.text


def test_made_up_files_are_like_those_of_a_real_run(finished_run, demo, tmp_path):
    """So that what is tested with them holds; and the page of the real run has all its parts."""
    real, sub = RunDir(finished_run.run), RunDir(finished_run.retrained)
    made = RunDir(next(demo.retrain.glob(f"{TDDS}_p0.5_*")))
    assert {*demo.read_env()} <= {*real.read_env()}
    assert {*made.read_env()} <= {*sub.read_env()}
    for known, stage in ((demo, real), (made, sub)):
        assert {*known.read_result()} <= {*stage.read_result()}
        assert {*known.read_metrics()[0]} <= {*stage.read_metrics()[0]}
        assert {*known.read_config()} <= {*stage.read_config()}
    page = Page(build_report([real], tmp_path / "report.html"))
    page.check_references()
    for svg in re.findall(r"<svg.*?</svg>", page.text, re.DOTALL):
        check_svg(svg)
    final = sub.read_result()["final_top1"]
    assert page.row("tdds E, batch", 1)[1:3] == ["80 %", f"{final:.2f}"]
    assert "No scores" not in page.text
    assert "warning" not in page.text.split("</style>")[1].split("<script")[0]
    assert page.count("img") > 20


# ---- known noise


def known_noise(page: Page) -> list[str]:
    return re.findall(r"<dt>Known noise</dt><dd>(.*?)</dd>", page.text)


def test_known_noise_is_said_and_shown(tmp_path):
    manifest = make.manifest_of(
        make.write_images(tmp_path / "noisy.beton", label_noise=0.2, corrupt=0.3)
    )
    run = start(tmp_path / "noisy", tmp_path / "noisy.beton")
    said = ["12 of 60 labels changed, 18 images corrupted"]
    assert known_noise(page_of(tmp_path, run)) == said, "before there are scores"
    add_scores(run, TDDS, manifest.label_N, ())
    page = make.page_of([run], tmp_path / "report.html", num_thumbnails=NUM_IMAGES)
    assert known_noise(page) == said, "before there are coresets"
    assert "Wrong labels kept" not in page.text
    expected, captions = [], []
    for number, (label, true_label, kind) in enumerate(
        zip(manifest.label_N, manifest.true_label_N, manifest.corruption, strict=True)
    ):
        shown = manifest.class_names[label] + (
            f", really {manifest.class_names[true_label]}" if label != true_label else ""
        )
        corrupted = f", corrupted ({kind.replace('_', ' ')})" if kind else ""
        expected.append(
            f"Image {number}, {shown}{corrupted}, score"
            f" {np.float32(number) / np.float32(NUM_IMAGES):.4g}"
        )
        captions += [shown] if label != true_label else []
        captions += [kind.replace("_", " ")] if kind else []
    shown = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert shown == expected[::-1]  # the lowest are the same: said, not shown
    assert page.text.count("shown above") == NUM_IMAGES
    shown_as_bad = [
        html.unescape(text)
        for text in re.findall(r'<span class="bad"[^>]*>(.*?)</span>', page.text)
    ]
    assert shown_as_bad[len(captions) :] == captions  # of the sheet of the lowest
    assert len(captions) == 12 + 18

    add_scores(run, TDDS, manifest.label_N, (0.5,))
    page = page_of(tmp_path, run)
    assert known_noise(page) == said
    head, row = page.row("Coreset"), page.row(f"{TDDS}_p0.5")
    kept_wrong = int((manifest.label_N != manifest.true_label_N)[30:].sum())
    kept_corrupted = sum(map(bool, manifest.corruption[30:]))
    assert row[head.index("Wrong labels kept")] == f"{100 * kept_wrong / 12:.4g} %"
    assert row[head.index("Corrupted kept")] == f"{100 * kept_corrupted / 18:.4g} %"


@pytest.mark.parametrize(
    ("label_noise", "corrupt", "shift", "said"),
    [
        (0.2, 0, 0, ["12 of 60 labels changed"]),
        (0, 0.3, 0, ["18 of 60 images corrupted"]),
        (0.2, 0.3, 1, []),
    ],
)
def test_only_known_noise_of_the_same_labels_is_said(label_noise, corrupt, shift, said, tmp_path):
    manifest = make.manifest_of(
        make.write_images(tmp_path / "train.beton", label_noise=label_noise, corrupt=corrupt)
    )
    run = start(tmp_path / "run", tmp_path / "train.beton")
    add_scores(run, TDDS, (manifest.label_N + shift) % NUM_CLASSES, (0.5,))
    page = page_of(tmp_path, run)
    assert known_noise(page) == said
    assert page.text.lower().count("what the manifest knows") == 2 * bool(said)
    assert (", really " in page.text) == bool(said and label_noise)
    assert (", corrupted (" in page.text) == bool(said and corrupt)


# ---- what is damaged, missing or of other images


@pytest.mark.parametrize(
    ("shift", "train", "said"),
    [
        (0, "moved/train.beton", "moved/train.beton is no longer there"),
        (1, None, "belongs to another dataset"),
    ],
)
def test_images_that_are_not_those_of_the_scores_are_not_shown(
    shift, train, said, run, beton, tmp_path, label_N
):
    run.config_file.write_text(run.config_file.read_text().replace(str(beton), train or str(beton)))
    if shift:
        add_scores(run, TDDS, (label_N + shift) % NUM_CLASSES, (0.5, 0.8))
    with speaking(quiet=True) as warnings:
        page = page_of(tmp_path, run)
    assert said in page.text
    assert train is None or any("the page has no images" in text for text in warnings)
    assert page.count("img") == 0
    assert page.row("class 0" if train else make.EVIL_CLASS)  # the class table stands without names


def test_damaged_files_and_those_of_other_images_are_named_and_left_out(run, tmp_path, capsys):
    (run.scores / "el2n.npz").write_bytes(b"not a zip file")
    add_scores(run, "aum", np.arange(40) % NUM_CLASSES, (0.5,))
    with speaking(quiet=True) as warnings:
        page = page_of(tmp_path, run)
    assert [re.split(" belongs| is", sentence)[0] for sentence in warnings] == [
        str(run.path / name)
        for name in ("scores/el2n.npz", "scores/aum.npz", "coresets/aum_p0.5.npz")
    ]
    assert capsys.readouterr().err.count("warning: ") == 3
    assert "el2n.npz is not a scores file" in page.text
    assert page.text.count("num_samples 40 instead of 60") == 2
    assert page.row(f"{TDDS}_p0.5")
    assert not any(row[0].startswith("aum") for row in page.rows if row)


@pytest.mark.parametrize("content", [None, b"{}", b"[1]", b'{"epoch": 0}', b"\xff{"])
def test_records_may_be_missing_or_damaged(content, run, beton, tmp_path):
    names = ("env.json", "train.manifest.json", "metrics.jsonl", "result.json")
    for suffix in (".beton", ".manifest.json"):
        (tmp_path / f"train{suffix}").write_bytes(beton.with_name(f"train{suffix}").read_bytes())
    run.config_file.write_text(
        run.config_file.read_text().replace(str(beton), str(tmp_path / "train.beton"))
    )
    folders = [tmp_path, run.path, *(sub.path for sub in run.retrain_runs())]
    for path in [folder / name for folder in folders for name in names if (folder / name).exists()]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    page = page_of(tmp_path, run)
    assert page.row(f"{TDDS}_p0.5")
    is_damaged = content in (b"[1]", b"\xff{")
    for name in ("env.json", "result.json"):
        assert (f"{name} is damaged" in page.text) == is_damaged
    assert "metrics.jsonl is damaged" not in page.text
    assert ("train.manifest.json is not a whole" in page.text) == (content is not None)
    assert "Undefined" not in page.text


def test_of_two_scores_the_one_of_the_run_stays(tmp_path, beton, label_N):
    run = start(tmp_path / "run", beton)
    add_scores(run, TDDS, np.arange(40) % NUM_CLASSES, ())
    add_scores(run, "aum", label_N, (0.5,))
    assert [*read_facts(run).scores] == ["aum"], "the manifest decides"
    run.config_file.write_text(run.config_file.read_text().replace(str(beton), "gone.beton"))
    finish(run, 40)
    assert [*read_facts(run).scores] == [TDDS], "the result decides"


def test_names_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    source = open_source(f"synthetic:{NUM_IMAGES},{NUM_CLASSES},16")
    source = dataclasses.replace(
        source, class_names=[name, *source.class_names[1:]], name=f"imagefolder:/data/{name}"
    )
    write_beton(source, tmp_path / "train.beton", num_workers=1, progress=False)
    run = start(tmp_path / "run", tmp_path / "train.beton")
    add_scores(run, TDDS, source.label_N, (0.5,))
    page = page_of(tmp_path, run)
    assert page.row("caf?")
    assert "imagefolder: caf?" in page.text


def test_progress_is_shown_where_it_takes_long(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDDS_PROGRESS_SECONDS", "0")
    page_of(tmp_path, run)
    lines = capsys.readouterr().err.splitlines()
    assert any(re.match(r"report: \d+ %, demo: images", line) for line in lines)
    monkeypatch.delenv("TDDS_PROGRESS_SECONDS")
    run.write_env(run.read_env() | {"world_size": 1})
    assert "by torchrun" not in page_of(tmp_path, run).text
    assert capsys.readouterr().err == ""


def test_scores_are_in_one_order(tmp_path, beton, label_N):
    run = start(tmp_path / "run", beton)
    # as this config has them
    first, second = (f"tdds_official_T{num_epochs}_K10_beta0.9" for num_epochs in (30, 20))
    config = to_dict(load_config(Path(__file__).parents[2] / "configs/digits.yaml"))
    config["data"] |= {"train": str(beton), "num_classes": NUM_CLASSES}
    run.write_start(config, run.read_env())
    rng = np.random.default_rng(0)
    for key, rates in ((first, (0.5,)), (second, (0.5, 0.8)), ("aum", ())):
        add_scores(run, key, label_N, rates, rng.random(NUM_IMAGES, np.float32))
    text = page_of(tmp_path, run).text
    histograms = re.findall(r"<figcaption><b>(\S+)</b>: lowest", text)
    maps = [*dict.fromkeys(re.findall(r'aria-label="Map of 60 images by (\S+) score', text))]
    matrix = re.findall(rf'<th scope="row"[^>]*title="({TDDS[:4]}\S+)"', text)[:2]
    assert histograms == [*maps, "aum"]
    assert matrix == maps == [first, second], "by the windows of the config"


def test_a_run_that_only_started(tmp_path):
    run = start(tmp_path / "new", "train.beton")
    page = page_of(tmp_path, run)
    assert page.row("full data collection")[1] == "unfinished, 0 of 3 epochs"
    assert page.row("full data collection run")[2] == "unfinished, 0 of 3 epochs"
    for missing in ("epoch has finished yet", "scores have been written yet", "scores yet"):
        assert f"No {missing}" in page.text
    log(run, val=False)  # epochs without validation
    text = page_of(tmp_path, run).text
    assert "training loss by epoch" in text
    assert "validation top-1 (%) by epoch" not in text


def test_errors_name_the_way_out(tmp_path):
    refused("tdds report", build_report, [], tmp_path / "report.html")
    refused("not a run directory", build_report, [RunDir(tmp_path)], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_summary_table_text(demo):
    rows = summary_rows([read_facts(demo)])
    names = ["full data", "full data", "tdds", "random", "tdds", "el2n"]
    assert [row["score_name"] for row in rows] == names
    full_names = [TDDS if name == "tdds" else name for name in names]
    assert [row["score"] for row in rows] == full_names
    assert [row["is_reference"] for row in rows] == [False, True, False, False, False, False]
    lines = format_summary(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "published" not in lines[0]
    cells = "retrain, tdds, E, batch, 50 %, 30, 3, 3, 82.00 ± 2.65, 82.50 ± 2.65, -9.50, finished"
    assert re.split(r"  +", lines[4]) == cells.split(", ")
    right = {line.index("%") for line in lines[2:]}
    assert len(right) == 1  # aligned
    json.dumps(rows)  # plain values


def test_collection_run_is_the_reference_without_a_full_retraining(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    finish(run, final=95.0)
    retraining(run, TDDS, 0.5, 0, 94.0, strategy="P")
    rows = summary_rows([read_facts(run)])
    assert rows[0]["is_reference"]
    assert rows[0]["difference"] is None
    assert (rows[1]["difference"], rows[1]["strategy"]) == (-1.0, "P")
    assert "status" not in format_summary(rows).splitlines()[0]
    # collection ended with the last window
    run.write_result(run.read_result() | {"epochs_planned": 200})
    rows = summary_rows([read_facts(run)])
    assert rows[0]["status"] == "stopped after 3 of 200 epochs"
    assert not any(row["is_reference"] for row in rows)
    cells = page_of(tmp_path, run).row("full data", 1)
    assert cells[2:5] == ["95.00", "stopped after 3 of 200 epochs", "96.00"]


def test_settings_that_compete_keep_their_full_names(tmp_path):
    run = start(tmp_path / "run", "train.beton")
    retraining(run, TDDS, 0.5, 0, 80.0)
    # the paper's way: another window for another pruning rate
    retraining(run, make.SHORT, 0.7, 0, 70.0)
    assert [row["score_name"] for row in summary_rows([read_facts(run)])[1:]] == ["tdds", "tdds"]
    # no second seed of the first
    retraining(run, TDDS, 0.5, 0, 82.0, name="balanced", class_balanced=True)
    rows = summary_rows([read_facts(run)])[1:]
    assert [row["score_name"] for row in rows] == ["tdds", "tdds_balanced", "tdds"]
    assert [row["final_top1"] for row in rows] == [80.0, 82.0, 70.0]
    retraining(run, TDDS.replace("official", "paper"), 0.5, 0, 81.0)
    names = [row["score_name"] for row in summary_rows([read_facts(run)])[1:]]
    assert names == [TDDS, "tdds_balanced", TDDS.replace("official", "paper"), make.SHORT]
    assert page_of(tmp_path, run).row(TDDS)


SMALL_RESNET = {"name": "resnet18", "cifar_stem": True}


def test_published_numbers_stand_beside_ours(tmp_path):
    run = start(tmp_path / "run", "data/cifar10.beton", 10, model=SMALL_RESNET)
    finish(run, 50_000)
    settings = {"model": SMALL_RESNET, "train": {"global_batch_size": 32}}
    retraining(run, "tdds", 0.9, 0, 12.34, importance="batch", **settings)
    retraining(run, "tdds", 0.9, 0, 23.45, strategy="P", importance="batch", **settings)
    retraining(run, "tdds", 0.9, 0, 11.0, **settings)  # the paper weighs
    # an ablation is not the method
    ce = "tdds_official_T10_K5_beta0.9_ce"
    retraining(run, ce, 0.9, 0, 10.0, importance="batch", **settings)
    settings["train"] = {"global_batch_size": 128}
    retraining(run, "random", 0.9, 0, 9.0, **settings)  # of Table 6
    other = settings | {"model": {"name": "resnet50", "cifar_stem": True}}
    retraining(run, "random", 0.7, 0, 8.0, strategy="P", **other)
    rows = summary_rows([read_facts(run)])
    by_score = {
        (row["score"], row["strategy"], row["importance"]): (
            row["published"] and (row["published"].table, row["published"].text)
        )
        for row in rows
    }
    assert by_score == {
        ("full data", None, None): (1, "95.23"),
        ("tdds", "E", "batch"): (1, "85.46 ± 0.21"),
        ("tdds", "P", "batch"): None,
        ("tdds", "E", "none"): None,
        (ce, "E", "batch"): None,
        ("random", "E", "none"): (6, "76.71 ± 0.15"),
        ("random", "P", "none"): (7, "90.94"),
    }
    text = format_summary(rows)
    assert "published" in text.splitlines()[0]
    page = page_of(tmp_path, run)
    assert page.row("tdds E, batch")[1:] == ["–", "12.34 −77.66 paper 85.46 ± 0.21"]
    assert page.row("tdds E, batch", 1)[1:6] == ["90 %", "12.34", "−77.66", "12.84", "85.46 ± 0.21"]
    assert "published, not ours" in page.text
    for note in footnotes(row["published"] for row in rows):
        assert note in page.text
        assert note in text
    assert "Tables 1, 6, 7 of arXiv 2311.13613" in text
    part = start(tmp_path / "part", "data/cifar10.beton", 10, model=SMALL_RESNET)
    finish(part)
    assert [row["published"] for row in summary_rows([read_facts(part)])] == [None], (
        "on a part of the images"
    )
    assert base_key("tdds_T90_K10") == "tdds"
    assert base_key("tddsx") == "tddsx"


def test_a_variant_of_the_same_network_is_told_by_what_it_changes(tmp_path):
    """One with another network is called after it, as in runs of 0.1.0, which say `network`."""
    run = start(tmp_path / "run", model=SMALL_RESNET)
    finish(run)
    for variant, changes in [
        ("usual", {}),
        ("small", {"train": {"global_batch_size": 10}}),
        ("large", {"model": {"name": "resnet50"}}),
    ]:
        changes = {"model": SMALL_RESNET} | changes
        sub = retraining(run, "random", 0.5, 0, 80.0, name=variant, **changes)
        env = sub.read_env() | {"variant": variant, "model": changes["model"]["name"]}
        sub.env_file.write_text(json.dumps(env))
    sub = retraining(run, "random", 0.5, 0, 80.0, name="older")
    sub.env_file.write_text(json.dumps(sub.read_env() | {"network": "vgg"}))
    rows = summary_rows([read_facts(run)])[1:]
    assert {(row["score"], row["variant"]) for row in rows} == {
        ("random", ""),
        ("random", "train.global_batch_size=10"),
        ("random on large", ""),
        ("random on vgg", ""),
    }


def test_texts_of_charts_are_escaped_and_odd_charts_drawn():
    lines = [
        charts.Line("a <b> & $x$", (0, 1, 2), (1.0, 10.0, 100.0), 3, error=(0, 0.1, 0), marker="s")
    ]
    svg = charts.line_chart(lines, "y", "x", 'an "alt"', full=50.0, may_be_log=True)
    assert "a &lt;b&gt; &amp; $x$" in svg  # the title of the line
    assert 'aria-label="an &quot;alt&quot;"' in svg
    assert "(log axis)" in svg
    two, one = Bins(np.array([0.0, 1.0, 2.0])), Bins(np.array([0.0, 1.0]))
    density = charts.density_map(
        np.eye(2),
        charts.Axis("x", two, [("<80 %>", 1.0)]),
        charts.Axis("y", two, [("50 %", 2)]),
        3,
        'an "alt"',
    )
    assert "&lt;80 %&gt;" in density
    assert 'aria-label="an &quot;alt&quot;"' in density
    for each in (
        svg,
        density,
        charts.histogram(np.array([3]), one, [], 3, "score", "alt"),
        charts.histogram(
            np.ones(2), two, [charts.Strip("all", np.array([np.nan, 1]))], 3, "score", "alt"
        ),
        charts.line_chart([charts.Line("l", range(9999), range(9999), 1)], "y", "x", ""),
    ):
        check_svg(each)


def test_import_is_light():
    code = (
        "import sys, tdds_dist.report.page; sys.exit(any(name in sys.modules for name in"
        " ('matplotlib', 'jinja2', 'PIL', 'ffcv', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
