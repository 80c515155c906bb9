"""`benchmarks.report` makes the run that it says, and reports what it measured; no time is
judged."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from benchmarks.report import KEYS, RATES, main, open_page, write_images, write_run
from tdds_dist.data.beton import dataset_fingerprint, inspect_beton, read_images
from tdds_dist.report.page import build_report
from tdds_dist.report.read import read_facts
from tdds_dist.report.scores import origin
from tests.make import manifest_of
from tests.system.browser.chromium import find

pytestmark = pytest.mark.slow
SMALL = "--num-samples 400 --num-classes 8 --num-pictures 16 --epochs 3 --repetitions".split()


def test_images_share_pixels_but_not_bytes(tmp_path: Path) -> None:
    label_N = np.arange(103) % 8
    write_images(tmp_path / "train.beton", label_N, 16)
    info = inspect_beton(tmp_path / "train.beton")
    np.testing.assert_array_equal(info.label_N, label_N)
    assert len(set(info.data_ptr_N.tolist())) == 103
    images = read_images(info.path, range(103), info)
    assert {image.shape for image in images} == {(256, 256, 3)}
    assert [image.tobytes() for image in images] == [
        images[number % 16].tobytes() for number in range(103)
    ]
    assert min(image.std() for image in images) > 50, "noise"


def test_the_run_has_what_the_report_reads(tmp_path: Path) -> None:
    facts = read_facts(write_run(tmp_path, 400, 8, 16, 3))
    assert facts.problems == []
    assert set(facts.scores) == set(KEYS)
    path = tmp_path / "train.beton"
    of_file, manifest = dataset_fingerprint(inspect_beton(path), 8), manifest_of(path)
    found = {scores.fingerprint for scores in facts.scores.values()}
    assert found == {of_file} == {manifest.fingerprint}
    assert manifest.noisy_N.any()
    cuts = [(*origin(facts, coreset), coreset) for coreset in facts.coresets.values()]
    assert len(cuts) == len(KEYS) * len(RATES)
    assert all(name == coreset.score_key and cut is not None for name, cut, coreset in cuts)
    assert [len(sub.metrics) for sub in facts.retrained] == [3] * 2 * len(RATES)
    assert all(sub.result["final_top1"] for sub in facts.retrained)


def test_benchmark_measures_the_command_and_the_page(tmp_path, monkeypatch):
    times = {"load": 0.5, "sheets": 0.75, "filter": 0.125}
    monkeypatch.setattr(report, "open_page", lambda page, repetitions: [times])
    assert main([*SMALL, "1", "--out", str(tmp_path), "--name", "small"]) == 0
    result = json.loads((tmp_path / "report_small.json").read_text())
    metrics, held = result["metrics"], result["held"]
    assert metrics["build, s"]["min"] > 0
    assert 50e6 < metrics["build, bytes"]["value"] < 4e9
    assert metrics["load, s"]["value"] == 0.5
    assert held["classes"] == 8
    assert 100 < held["images"] <= 400
    assert 0 < held["thumbnail_bytes"] < metrics["page, bytes"]["value"]
    page = (tmp_path / "report_small.md").read_text()
    assert f"The page holds {held['images']} images of 8 classes" in page
    assert "0.75|0.75|" in page.replace(" ", ""), "columns are as wide as the slowest figure"
    result["metrics"] = {
        name: found for name, found in metrics.items() if name.startswith(("build", "page"))
    }
    assert "No Chromium" in report.as_markdown(result)
    assert "No Chromium" not in page


@pytest.mark.browser
def test_a_page_is_opened(tmp_path: Path) -> None:
    if find() is None:
        pytest.skip("no Chromium found: tests/system/browser/install.sh")
    page = build_report([write_run(tmp_path, 400, 8, 16, 3)], tmp_path / "report.html")
    # Playwright allows one browser in a thread, and that of other tests is open
    with ThreadPoolExecutor(1) as thread:
        runs = thread.submit(open_page, page, 2).result()
    assert len(runs) == 2
    assert all(0 < run["load"] <= run["sheets"] for run in runs)
    assert all(run["filter"] > 0 for run in runs)


def test_a_report_that_fails_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, 40, 4, 4, 2)
    run.config_file.unlink()
    with pytest.raises(report.InputError, match="exit code 2"):
        report.build(run, tmp_path / "report.html")
    assert "is not a run directory" in capfd.readouterr().err
