"""The report page and the terminal table, from a synthetic run directory."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tdds_dist import charts
from tdds_dist.artifacts import Coreset, Scores, fingerprint, save_coreset, save_scores
from tdds_dist.beton import Manifest, read_manifest
from tdds_dist.beton_writer import write_beton
from tdds_dist.config import load_config, to_dict
from tdds_dist.console import speaking
from tdds_dist.errors import InputError
from tdds_dist.facts import read_facts
from tdds_dist.published import base_key, find_table
from tdds_dist.report import build_report, format_summary, summary_table
from tdds_dist.rundir import RunDir
from tdds_dist.sources import open_source, with_corruption, with_label_noise

NUM_IMAGES, NUM_CLASSES = 60, 4
TDDS = "tdds_official_T3_K2_beta0.9"
EVIL_CLASS, EVIL_PATH = '<script>alert("class")</script>', 'a/"><img src=x onerror=alert(1)>.png'
TDDS = "tdds_official_T3_K2_beta0.9"


class Page(HTMLParser):
    """Tags with their attributes, and the cells of every table, of one page."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, start: str, number: int = 0) -> list[str]:
        """Cells of a row, by default the first, whose first cell starts with `start`."""
        rows = ([" ".join(cell.split()) for cell in row] for row in self.rows)
        return [row for row in rows if row and row[0].startswith(start)][number]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.beton"
    source = open_source(f"synthetic:{NUM_IMAGES},{NUM_CLASSES},16")
    names = [EVIL_CLASS, *source.class_names[1:]]
    write_beton(dataclasses.replace(source, class_names=names, path=[EVIL_PATH, *source.path[1:]]), path,
                num_workers=1, progress=False)
    return path


@pytest.fixture
def label_N() -> np.ndarray:
    return open_source(f"synthetic:{NUM_IMAGES},{NUM_CLASSES},16").label_N


def start(path: Path, beton: Path | str, num_classes: int = NUM_CLASSES, model: str = "resnet18",
          stage: dict[str, object] | None = None) -> RunDir:
    run = RunDir(path)
    run.start({"run": {"name": path.name, "dir": str(path), "seed": 0}, "model": {"name": model},
               "data": {"train": str(beton), "val": "val.beton", "num_classes": num_classes},
               "train": {"epochs": 3, "global_batch_size": 20, "lr": 0.1},
               "retrain": {"epochs": 0, "importance": "batch"}}, stage or {"stage": "collect"}, world_size=2, device="cpu")
    return run


def log(run: RunDir, num_epochs: int = 3, val: bool = True) -> None:
    for epoch in range(num_epochs):
        run.append_metrics({
            "epoch": epoch, "step": 3 * epoch + 3, "lr": 0.1, "train_loss": 2.0 / (epoch + 1), "train_top1": 50.0,
            "val_loss": 1.0 if val else None, "val_top1": 60.0 + epoch if val else None, "val_top5": None,
            "images_per_second": 100.0 if epoch == 0 else 4321.0, "epoch_seconds": 1.5, "scoring_share": 0.0125,
            "memory_bytes": None,
        })


def finish_collect(run: RunDir, num_images: int, final: float = 90.0) -> None:
    run.write_result({"stage": "collect", "num_images": num_images, "epochs": 3, "epochs_planned": 3,
                      "final_top1": final, "final_top5": 99.0, "best_top1": final + 1, "best_epoch": 1,
                      "train_seconds": 75.0})


def retrain(run: RunDir, score_key: str, rate: float, seed: int, final: float | None, strategy: str = "E",
            importance: str = "none", name: str | None = None, class_balanced: bool = False) -> RunDir:
    """A retraining run; `final=None` leaves it unfinished after one epoch, its log cut in the middle of a line."""
    asked = {"strategy": strategy, "importance": importance, "score_key": score_key, "pruning_rate": rate}
    sub = start(run.retrain / (name or f"{score_key}_p{rate:g}_{strategy}_{importance}_seed{seed}"), "train.beton",
                stage={"stage": "retrain", **asked})
    if final is None:
        log(sub, 1)
        with sub.metrics_file.open("a") as file:
            file.write('{"epoch": 1, "train_lo')
        return sub
    log(sub)
    sub.write_result({"stage": "retrain", **asked, "coreset_settings": {"class_balanced": class_balanced}, "seed": seed,
                      "num_images": round((1 - rate) * NUM_IMAGES), "epochs": 3, "final_top1": final,
                      "final_top5": 99.0, "best_top1": final + 0.5, "best_epoch": 1, "train_seconds": 12.0})
    return sub


def add_scores(run: RunDir, key: str, label_N: np.ndarray, rates: tuple[float, ...], score_N: np.ndarray | None = None,
               num_classes: int = NUM_CLASSES) -> np.ndarray:
    """Scores 0, 1/N, 2/N ... by index unless given, and the top of them as coresets."""
    score_N = np.arange(len(label_N), dtype=np.float32) / len(label_N) if score_N is None else score_N
    found = fingerprint(label_N, num_classes)
    save_scores(run.scores / f"{key}.npz", Scores(key, score_N, label_N, found, {"preset": "official", "T": 3, "K": 2}))
    for rate in rates:
        index_M = np.sort(np.argsort(-score_N, kind="stable")[: len(label_N) - round(rate * len(label_N))])
        save_coreset(run.coresets / f"{key}_p{rate:g}.npz",
                     Coreset(index_M, np.ones(len(index_M), np.float32), key, rate, found, {"class_balanced": False}))
    return score_N


@pytest.fixture
def run(tmp_path: Path, beton: Path, label_N: np.ndarray) -> RunDir:
    run = start(tmp_path / "demo", beton)
    log(run)
    finish_collect(run, NUM_IMAGES)
    add_scores(run, TDDS, label_N, (0.5, 0.8))
    add_scores(run, "random", label_N, (0.5,), np.random.default_rng(0).random(NUM_IMAGES, np.float32))
    retrain(run, TDDS, 0, 0, 91.5)
    for seed, final in enumerate((80.0, 81.0, 85.0)):
        retrain(run, TDDS, 0.5, seed, final, importance="batch")
    retrain(run, "random", 0.5, 0, 77.25)
    retrain(run, TDDS, 0.8, 0, None, importance="batch")
    return run


def test_page_loads_nothing_and_is_small(run: RunDir, tmp_path: Path) -> None:
    out = build_report([run], tmp_path / "report.html")
    page = Page(out)
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset", "data") if name in attrs]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.text))
    assert "@import" not in page.text
    assert not re.search(r"https?://", page.text)
    assert "default-src 'none'" in page.text
    assert all("src" not in attrs for tag, attrs in page.tags if tag == "script")
    assert out.stat().st_size < 400_000


def test_ids_are_unique_and_references_resolve(run: RunDir, tmp_path: Path) -> None:
    page = Page(build_report([run, start(tmp_path / "other", "gone.beton")], tmp_path / "report.html"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in ("href", "aria-labelledby"):
            target = (attrs.get(name) or "").removeprefix("#")
            assert not target or target.startswith("data:") or target in ids
    assert page.count("article") == 2
    assert page.count("h1") == 1


def test_numbers_come_from_results(run: RunDir, tmp_path: Path) -> None:
    page = Page(build_report([run], tmp_path / "report.html"))
    assert page.row("full data collection run")[1:5] == ["0 %", "90.00", "−1.50", "91.00"]
    assert page.row("full data retrained", 1)[1:5] == ["0 %", "91.50", "reference", "92.00"]
    # mean of 80, 81, 85 is 82; sample standard deviation sqrt((4 + 1 + 9) / 2) = 2.6458
    assert page.row("tdds E, batch")[1:] == ["82.00 ± 2.65 −9.50", "1 of 3 epochs"]  # the matrix
    assert page.row("tdds E, batch", 1)[1:] == ["50 %", "82.00 ± 2.65", "−9.50", "82.50 ± 2.65", "30", "3", "0, 1, 2"]
    assert page.row("random E, none")[1:] == ["77.25 −14.25 1 seed", "–"]
    assert page.row("random E, none", 1)[1:5] == ["50 %", "77.25", "−14.25", "77.75"]
    assert [page.row("tdds E, batch", number)[1:5] for number in (3, 4, 5)] == [  # each by itself
        ["50 %", "0", "80.00", "80.50"], ["50 %", "1", "81.00", "81.50"], ["50 %", "2", "85.00", "85.50"]]
    assert "costs 9.50 points with tdds (importance batch), down to 82.00\N{NO-BREAK SPACE}%" in page.text
    speed = next(row for row in page.rows if row[0] == "collect")
    assert speed == ["collect", "4,321", "1 min 15 s", "–", "1.25 %", "1.5 s", "3", "2", "0"]  # first epoch left out
    assert "Published" not in page.text


def test_unfinished_runs_are_shown(run: RunDir, tmp_path: Path) -> None:
    page = Page(build_report([run], tmp_path / "report.html"))
    assert "tdds E, batch | 80 % | unfinished, 1 of 3 epochs" in [" | ".join(row[:3]) for row in page.rows]
    assert "tdds 80 %, E, batch, seed 0 (unfinished)" in page.text
    row = summary_table(run)[-1]
    assert (row["name"], row["final_top1"]) == (f"{TDDS}_p0.8_E_batch_seed0", None)
    retrain(run, "el2n", 0.8, 0, None, name="mine")  # a name that says nothing
    page = Page(build_report([run], tmp_path / "report.html"))
    assert page.row("el2n E, none", 1)[1:3] == ["80 %", "unfinished, 1 of 3 epochs"]


def test_names_are_escaped_and_images_shown(run: RunDir, tmp_path: Path) -> None:
    page = Page(build_report([run], tmp_path / "report.html", num_thumbnails=4))
    assert EVIL_CLASS not in page.text
    assert "&lt;script&gt;alert(&#34;class&#34;)&lt;/script&gt;" in page.text
    assert EVIL_PATH not in page.text
    assert any(attrs.get("title") == EVIL_PATH for _, attrs in page.tags)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 4 + 4 + 2 + 2  # highest, lowest, below and above the cut at the largest pruning rate
    assert all(image["class"] == "pixelated" and image["src"].startswith("data:image/png") for image in images)
    numbers = [int(re.match(r"Image (\d+),", image["alt"])[1]) for image in images]
    assert numbers == [59, 58, 57, 56, 0, 1, 2, 3, 46, 47, 48, 49]  # 80 % of 60 removed: 0..47


def test_missing_beton_is_said(run: RunDir, tmp_path: Path) -> None:
    config = run.config_file.read_text()
    run.config_file.write_text(re.sub(r"train: .*\.beton", "train: moved/train.beton", config))
    page = Page(build_report([run], tmp_path / "report.html"))
    assert "moved/train.beton is no longer there" in page.text
    assert page.count("img") == 0
    assert page.row("class 0")  # the class table stands without names


def test_foreign_beton_shows_no_images(run: RunDir, tmp_path: Path, label_N: np.ndarray) -> None:
    add_scores(run, TDDS, (label_N + 1) % NUM_CLASSES, (0.5, 0.8))
    page = Page(build_report([run], tmp_path / "report.html"))
    assert "belongs to another dataset" in page.text
    assert page.count("img") == 0


def test_class_table_and_cuts(run: RunDir, tmp_path: Path, label_N: np.ndarray) -> None:
    found = fingerprint(label_N, NUM_CLASSES)
    odd = np.arange(1, NUM_IMAGES, 2)
    save_coreset(run.coresets / "odd.npz", Coreset(odd, np.ones(30, np.float32), TDDS, 0.7, found))
    page = Page(build_report([run], tmp_path / "report.html"))
    kept = 100 * np.mean(np.flatnonzero(label_N == 1) >= 30)
    head = next(row for row in page.rows if row[0] == "Class")
    row = next(row for row in page.rows if row[0] == open_source(f"synthetic:60,{NUM_CLASSES},16").class_names[1])
    assert row[1] == str(int((label_N == 1).sum()))
    assert row[head.index("tdds 50 %")] == f"{kept:.1f}"
    assert page.row(f"{TDDS}_p0.5")[3] == "0.5"  # the lowest kept score
    assert page.row("odd")[3] == "not a plain cut"
    assert 'aria-label="Histogram of 60' in page.text
    assert "Cuts: 50 % removed below 0.5, 80 % removed below 0.8." in page.text


def write_noisy(path: Path, label_noise: float, corrupt: float) -> Manifest:
    source = open_source(f"synthetic:{NUM_IMAGES},{NUM_CLASSES},16")
    write_beton(with_corruption(with_label_noise(source, label_noise, 0), corrupt, 0), path, num_workers=1, progress=False)
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest


def known_noise(page: Page) -> list[str]:
    return re.findall(r"<dt>Known noise</dt><dd>(.*?)</dd>", page.text)


def test_known_noise_is_said_and_shown(tmp_path: Path) -> None:
    manifest = write_noisy(tmp_path / "noisy.beton", 0.2, 0.3)
    assert manifest.true_label_N is not None
    assert manifest.corruption is not None
    run = start(tmp_path / "noisy", tmp_path / "noisy.beton")
    said = ["12 of 60 labels changed, 18 images corrupted"]
    assert known_noise(Page(build_report([run], tmp_path / "report.html"))) == said, "before there are scores"
    add_scores(run, TDDS, manifest.label_N, ())
    page = Page(build_report([run], tmp_path / "report.html", num_thumbnails=NUM_IMAGES))
    assert known_noise(page) == said, "before there are coresets"
    assert "Wrong labels kept" not in page.text
    expected, captions = [], []
    for number, (label, true_label, kind) in enumerate(zip(manifest.label_N, manifest.true_label_N, manifest.corruption,
                                                           strict=True)):
        shown = manifest.class_names[label] + (f", really {manifest.class_names[true_label]}" if label != true_label else "")
        corrupted = f", corrupted ({kind.replace('_', ' ')})" if kind else ""
        expected.append(f"Image {number}, {shown}{corrupted}, score {np.float32(number) / np.float32(NUM_IMAGES):.4g}")
        captions += [shown] if label != true_label else []
        captions += [kind.replace("_", " ")] if kind else []
    shown = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert shown == expected[::-1]  # the lowest are the same: said, not shown
    assert page.text.count("shown above") == NUM_IMAGES
    shown_as_bad = re.findall(r'<span class="bad"[^>]*>(.*?)</span>', page.text)
    assert shown_as_bad[len(captions):] == captions  # of the sheet of the lowest
    assert len(captions) == 12 + 18

    add_scores(run, TDDS, manifest.label_N, (0.5,))
    page = Page(build_report([run], tmp_path / "report.html"))
    assert known_noise(page) == said
    head, row = page.row("Coreset"), page.row(f"{TDDS}_p0.5")
    kept_wrong = int((manifest.label_N != manifest.true_label_N)[30:].sum())
    kept_corrupted = sum(map(bool, manifest.corruption[30:]))
    assert row[head.index("Wrong labels kept")] == f"{100 * kept_wrong / 12:.4g} %"
    assert row[head.index("Corrupted kept")] == f"{100 * kept_corrupted / 18:.4g} %"


@pytest.mark.parametrize(("label_noise", "corrupt", "said"), [
    (0.2, 0, ["12 of 60 labels changed"]), (0, 0.3, ["18 of 60 images corrupted"]), (0, 0, []),
])
def test_only_known_noise_is_said(label_noise: float, corrupt: float, said: list[str], tmp_path: Path) -> None:
    manifest = write_noisy(tmp_path / "train.beton", label_noise, corrupt)
    run = start(tmp_path / "run", tmp_path / "train.beton")
    add_scores(run, TDDS, manifest.label_N, (0.5,))
    page = Page(build_report([run], tmp_path / "report.html"))
    assert known_noise(page) == said
    assert ("What the manifest knows" in page.text, "what the manifest knows" in page.text) == (bool(said), bool(said))
    assert (", really " in page.text, ", corrupted (" in page.text) == (label_noise > 0, corrupt > 0)


def test_noise_of_other_labels_is_not_said(tmp_path: Path) -> None:
    manifest = write_noisy(tmp_path / "train.beton", 0.2, 0.3)
    run = start(tmp_path / "run", tmp_path / "train.beton")
    add_scores(run, TDDS, (manifest.label_N + 1) % NUM_CLASSES, (0.5,))
    page = Page(build_report([run], tmp_path / "report.html"))
    assert known_noise(page) == []
    assert "anifest knows" not in page.text
    assert ", really " not in page.text


def test_damaged_files_are_named(run: RunDir, tmp_path: Path) -> None:
    (run.scores / "el2n.npz").write_bytes(b"not a zip file")
    other = fingerprint(np.zeros(7, np.int64), 1)
    save_coreset(run.coresets / "foreign.npz", Coreset(np.arange(3), np.ones(3, np.float32), "tdds", 0.5, other))
    page = Page(build_report([run], tmp_path / "report.html"))
    assert "el2n.npz is not a scores file" in page.text
    assert "foreign.npz belongs to another dataset" in page.text


@pytest.mark.parametrize("content", [None, b"{}", b"[1]", b"{\"epoch\": 0}", b"\xff{"])
@pytest.mark.parametrize("names", [("env.json", "train.manifest.json"), ("metrics.jsonl", "result.json")])
def test_records_may_be_missing_or_damaged(names: tuple[str, str], content: bytes | None, run: RunDir, beton: Path,
                                           tmp_path: Path) -> None:
    for suffix in (".beton", ".manifest.json"):
        (tmp_path / f"train{suffix}").write_bytes(beton.with_name(f"train{suffix}").read_bytes())
    run.config_file.write_text(run.config_file.read_text().replace(str(beton), str(tmp_path / "train.beton")))
    folders = [tmp_path, run.path, *(sub.path for sub in run.retrain_runs())]
    for path in [folder / name for folder in folders for name in names if (folder / name).exists()]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    page = Page(build_report([run], tmp_path / "report.html"))
    assert page.row(f"{TDDS}_p0.5")
    is_damaged = content in (b"[1]", b"\xff{")
    said = {name: f"{name} is damaged" in page.text for name in ("env.json", "metrics.jsonl", "result.json")}
    assert said == {"env.json": is_damaged and "env.json" in names, "metrics.jsonl": False,
                    "result.json": is_damaged and "result.json" in names}
    assert ("train.manifest.json is not a whole" in page.text) == (content is not None and "train.manifest.json" in names)
    assert "Undefined" not in page.text


def test_scores_of_other_images_are_left_out(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_scores(run, "aum", np.arange(40) % NUM_CLASSES, (0.5,))
    with speaking(quiet=True) as warnings:
        page = Page(build_report([run], tmp_path / "report.html"))
    assert [sentence.split(" belongs")[0] for sentence in warnings] == [str(run.scores / "aum.npz"),
                                                                       str(run.coresets / "aum_p0.5.npz")]
    assert capsys.readouterr().err.count("warning: ") == 2
    assert page.text.count("num_samples 40 instead of 60") == 2
    assert page.row(f"{TDDS}_p0.5")
    assert not any(row[0].startswith("aum") for row in page.rows if row)


def test_of_two_scores_the_one_of_the_run_stays(tmp_path: Path, beton: Path, label_N: np.ndarray) -> None:
    run = start(tmp_path / "run", beton)
    add_scores(run, TDDS, np.arange(40) % NUM_CLASSES, ())
    add_scores(run, "aum", label_N, (0.5,))
    assert [*read_facts(run).scores] == ["aum"], "the manifest decides"
    run.config_file.write_text(run.config_file.read_text().replace(str(beton), "gone.beton"))
    finish_collect(run, 40)
    assert [*read_facts(run).scores] == [TDDS], "the result decides"


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    source = open_source(f"synthetic:{NUM_IMAGES},{NUM_CLASSES},16")
    source = dataclasses.replace(source, class_names=[name, *source.class_names[1:]], name=f"imagefolder:/data/{name}")
    write_beton(source, tmp_path / "train.beton", num_workers=1, progress=False)
    run = start(tmp_path / "run", tmp_path / "train.beton")
    add_scores(run, TDDS, source.label_N, (0.5,))
    page = Page(build_report([run], tmp_path / "report.html"))
    assert page.row("caf?")
    assert "imagefolder: caf?" in page.text


def test_progress_is_shown_where_it_takes_long(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TDDS_PROGRESS_SECONDS", "0")
    build_report([run], tmp_path / "report.html")
    lines = capsys.readouterr().err.splitlines()
    assert any(re.match(r"report: \d+ %, demo: images", line) for line in lines)
    monkeypatch.delenv("TDDS_PROGRESS_SECONDS")
    build_report([run], tmp_path / "report.html")
    assert capsys.readouterr().err == ""


def test_the_command_is_told_with_its_ranks(run: RunDir, tmp_path: Path) -> None:
    def told() -> bool:
        return "<small>on 2 ranks, by torchrun</small>" in build_report([run], tmp_path / "report.html").read_text()

    assert told()
    run.write_env(run.read_env() | {"world_size": 1})
    assert not told()


def test_scores_are_in_one_order(tmp_path: Path, beton: Path, label_N: np.ndarray) -> None:
    run = start(tmp_path / "run", beton)
    first, second = (f"tdds_official_T{num_epochs}_K10_beta0.9" for num_epochs in (30, 20))  # as this config has them
    config = to_dict(load_config(Path(__file__).parents[1] / "configs/digits.yaml"))
    config["data"] |= {"train": str(beton), "num_classes": NUM_CLASSES}
    run.write_start(config, run.read_env())
    rng = np.random.default_rng(0)
    for key, rates in ((first, (0.5,)), (second, (0.5, 0.8)), ("aum", ())):
        add_scores(run, key, label_N, rates, rng.random(NUM_IMAGES, np.float32))
    text = build_report([run], tmp_path / "report.html").read_text()
    histograms = re.findall(r"<figcaption><b>(\S+)</b>: lowest", text)
    maps = [*dict.fromkeys(re.findall(r'aria-label="Map of 60 images by (\S+) score', text))]
    matrix = re.findall(rf'<th scope="row"[^>]*title="({TDDS[:4]}\S+)"', text)[:2]
    assert histograms == [*maps, "aum"]
    assert matrix == maps == [first, second], "by the windows of the config"


def test_a_random_rank_is_no_score(run: RunDir, tmp_path: Path) -> None:
    assert Page(build_report([run], tmp_path / "report.html")).row("random_p0.5")[3] == "–"


def test_a_run_that_only_started(tmp_path: Path) -> None:
    run = start(tmp_path / "new", "train.beton")
    page = Page(build_report([run], tmp_path / "report.html"))
    assert page.row("full data collection")[1] == "unfinished, 0 of 3 epochs"
    assert page.row("full data collection run")[2] == "unfinished, 0 of 3 epochs"
    for sentence in ("No epoch has finished yet", "No scores have been written yet", "No scores yet"):
        assert sentence in page.text
    log(run, val=False)  # epochs without validation
    page = Page(build_report([run], tmp_path / "report.html"))
    assert ("training loss by epoch" in page.text, "validation top-1 (%) by epoch" in page.text) == (True, False)


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tdds report"):
        build_report([], tmp_path / "report.html")
    with pytest.raises(InputError, match="not a run directory"):
        build_report([RunDir(tmp_path)], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.filterwarnings("error")
def test_large_runs_embed_nothing_per_sample(tmp_path: Path) -> None:
    label_N = np.arange(400_000) % 1000
    run = start(tmp_path / "large", "gone.beton", 1000)
    finish_collect(run, len(label_N))
    score_N = np.random.default_rng(0).gamma(1.0, 1.0, len(label_N)).astype(np.float32)
    score_N[:3] = np.inf
    rates = tuple(np.arange(1, 13) / 16)
    add_scores(run, "tdds", label_N, rates, score_N, 1000)
    add_scores(run, "forgetting", label_N, rates, np.round(score_N), 1000)
    out = build_report([run], tmp_path / "report.html")
    text = out.read_text()
    assert out.stat().st_size < 1_500_000
    assert "Counts are binned over all 400,000 images" in text
    assert "3 images have a score that is not finite" in text
    assert "only coresets of tdds are listed" in text


def test_summary_table_text(run: RunDir) -> None:
    rows = summary_table(run)
    assert [row["score_name"] for row in rows] == ["full data", "full data", "tdds", "random", "tdds"]
    assert [row["score"] for row in rows] == ["full data", "full data", TDDS, "random", TDDS]
    assert [row["is_reference"] for row in rows] == [False, True, False, False, False]
    lines = format_summary(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "published" not in lines[0]
    assert re.split(r"  +", lines[4]) == ["retrain", "tdds", "E", "batch", "50 %", "30", "3", "3", "82.00 ± 2.65",
                                          "82.50 ± 2.65", "-9.50", "finished"]
    right = {line.index("%") for line in lines[2:]}
    assert len(right) == 1  # aligned
    json.dumps(rows)  # plain values


def test_collection_run_is_the_reference_without_a_full_retraining(tmp_path: Path) -> None:
    run = start(tmp_path / "run", "train.beton")
    finish_collect(run, NUM_IMAGES, 95.0)
    retrain(run, TDDS, 0.5, 0, 94.0, strategy="strategy_p")
    rows = summary_table(run)
    assert rows[0]["is_reference"]
    assert rows[0]["difference"] is None
    assert (rows[1]["difference"], rows[1]["strategy"]) == (-1.0, "P")
    assert "status" not in format_summary(rows).splitlines()[0]
    run.write_result(run.read_result() | {"epochs_planned": 200})  # collection ended with the last window
    rows = summary_table(run)
    assert rows[0]["status"] == "stopped after 3 of 200 epochs"
    assert not any(row["is_reference"] for row in rows)
    assert Page(build_report([run], tmp_path / "report.html")).row("full data", 1)[2:5] == [
        "95.00", "stopped after 3 of 200 epochs", "96.00"]


def test_settings_that_compete_keep_their_full_names(tmp_path: Path) -> None:
    run = start(tmp_path / "run", "train.beton")
    retrain(run, TDDS, 0.5, 0, 80.0)
    retrain(run, TDDS.replace("T3", "T2"), 0.7, 0, 70.0)  # the paper's way: another window for another pruning rate
    assert [row["score_name"] for row in summary_table(run)[1:]] == ["tdds", "tdds"]
    retrain(run, TDDS, 0.5, 0, 82.0, name="balanced", class_balanced=True)  # no second seed of the first
    assert [row["score_name"] for row in summary_table(run)[1:]] == ["tdds", "tdds_balanced", "tdds"]
    assert [row["final_top1"] for row in summary_table(run)[1:]] == [80.0, 82.0, 70.0]
    retrain(run, TDDS.replace("official", "paper"), 0.5, 0, 81.0)
    names = [row["score_name"] for row in summary_table(run)[1:]]
    assert names == [TDDS, "tdds_balanced", TDDS.replace("official", "paper"), TDDS.replace("T3", "T2")]
    assert Page(build_report([run], tmp_path / "report.html")).row(TDDS)


@pytest.mark.parametrize(("name", "num_classes", "model", "expected"), [
    ("cifar10_train.beton", 10, "resnet18", "CIFAR-10"),
    ("data/CIFAR-100/train.beton", 100, "resnet18", "CIFAR-100"),
    ("cifar100.beton", 10, "resnet18", "CIFAR-10"),  # the number of classes decides
    ("imagenet.beton", 1000, "resnet34", "ResNet-34"),
    ("imagenet.beton", 1000, "swin_t", "Swin-T"),
    ("imagenette.beton", 10, "resnet34", None),
    ("digits.beton", 10, "resnet18", None),
])
def test_published_table_of_a_dataset(name: str, num_classes: int, model: str, expected: str | None) -> None:
    table = find_table([name], num_classes, model)
    if expected is None:
        assert table is None
    else:
        assert table is not None
        assert expected in (table.dataset, table.network)


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    run = start(tmp_path / "run", "data/cifar10.beton", 10)
    finish_collect(run, 50_000)
    retrain(run, "tdds", 0.9, 0, 12.34, importance="batch")
    retrain(run, "tdds", 0.9, 0, 23.45, strategy="P", importance="batch")
    retrain(run, "tdds", 0.9, 0, 11.0)  # the paper weighs
    retrain(run, "tdds_official_T30_K10_beta0.9_ce", 0.9, 0, 10.0, importance="batch")  # an ablation is not the method
    rows = summary_table(run)
    by_score = {(row["score"], row["strategy"], row["importance"]): row["published"] for row in rows}
    assert by_score == {("full data", None, None): 95.23, ("tdds", "E", "batch"): 85.46, ("tdds", "P", "batch"): None,
                        ("tdds", "E", "none"): None, ("tdds_official_T30_K10_beta0.9_ce", "E", "batch"): None}
    assert "published" in format_summary(rows).splitlines()[0]
    page = Page(build_report([run], tmp_path / "report.html"))
    assert page.row("tdds E, batch")[1:] == ["12.34 −77.66 paper 85.46"]
    assert page.row("tdds E, batch", 1)[1:6] == ["90 %", "12.34", "−77.66", "12.84", "85.46"]
    assert "published, not ours" in page.text
    part = start(tmp_path / "part", "data/cifar10.beton", 10)
    finish_collect(part, NUM_IMAGES)
    assert [row["published"] for row in summary_table(part)] == [None], "on a part of the images"
    assert base_key("tdds_T90_K10") == "tdds"
    assert base_key("tddsx") == "tddsx"


def test_charts_are_clean_svg_in_the_colours_of_the_page() -> None:
    lines = [charts.Line("a <b> & $x$", (0, 1, 2), (1.0, 10.0, 100.0), 3, error=(0, 0.1, 0), marker="s")]
    svg = charts.line_chart(lines, "y", "x", 'an "alt"', full=50.0, may_be_log=True)
    ElementTree.fromstring(svg)
    assert "a &lt;b&gt; &amp; $x$" in svg  # the title of the line
    assert 'aria-label="an &quot;alt&quot;"' in svg
    assert "(log axis)" in svg
    assert "var(--s3)" in svg
    assert not re.search(r"#0c0|font-family|http|<style", svg)
    ElementTree.fromstring(charts.line_chart([charts.Line("l", range(9999), range(9999), 1)], "y", "x", ""))


def test_import_is_light() -> None:
    code = ("import sys, tdds_dist.report; "
            "sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2', 'PIL', 'ffcv', 'torch')))")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
