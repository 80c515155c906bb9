"""The benchmarks of scoring and of compact storage: they measure what they say. No speed is
judged."""

import json
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import files, precision, recording, scorer
from benchmarks.recording import Outputs, Setting, Stored
from tdds_dist.distributed.partition import epoch_order

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("forked_ranks")]
STORED = ["float32", "float16", "topk:3", "topk:1/float16", "topk:9/float32"]
TINY = (
    "--num-samples 300 --num-classes 7 --stored float16 --batch 32 --passes 2 --threads 1"
    " --wide-samples 1000 --wide-classes 40 --wide-shards 4 --wide-rows 64 --wide-stored topk:5"
    " --ranks 2 --ranks-samples 100 --ranks-classes 7 --pairs 2 --block 1"
)


def run(benchmark: Any, words: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Run a benchmark with these options; its result and its page."""
    assert benchmark.main([*shlex.split(words), "--out", str(folder), "--name", "tiny"]) == 0
    path = folder / f"{benchmark.__name__.rpartition('.')[2]}_tiny.json"
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


# ---- scorer


def test_every_part_writes_numbers_with_provenance(tmp_path: Path) -> None:
    result, page = run(scorer, f"{TINY} --only imagenet wide ranks step", tmp_path)
    provenance = {"commit", "cpu", "num_cpus", "versions", "threads", "load_average"}
    assert provenance <= result["provenance"].keys()
    (alone,), (shard,), (routed,), (step,) = result["parts"].values()
    assert (alone["rows_per_pass"], shard["rows_per_pass"], shard["num_samples"]) == (300, 64, 250)
    for row in (alone, shard):
        assert row["state_bytes"] == row["formula_bytes"]
        before_bytes = row["peak_resident_bytes"] - row["net_resident_bytes"]
        assert before_bytes == row["resident_before_bytes"] > 1e8
        most = row["moved_bytes_per_sample"] / row["copy_bandwidth"]
        shares = [most / (taken * 1e-6) for taken in row["record_us_per_sample"]]
        assert row["share_of_copy_bandwidth"] == pytest.approx(shares)
    assert alone["moved_bytes_per_sample"] == 16 + 7 * 4 + 2 * 7 * 2 + 9 * 4 + 8 + 16
    assert shard["moved_bytes_per_sample"] == 16 + 40 * 4 + 2 * (7 * 4 + 6 * 2) + 9 * 4 + 8 + 16
    # 100 samples in steps of 2 x 32: two steps of 32 rows from each rank
    assert routed["calls_per_step"] == 1.0
    assert routed["bytes_sent_per_step"] == routed["formula_bytes_per_step"] == 32 * (7 * 4 + 16)
    assert 0 < routed["off_rank_bytes_per_step"] < routed["bytes_sent_per_step"]
    assert len(step["step_ratio"]) == 2

    metrics = result["metrics"]
    rate = metrics["imagenet N=300 C=7 float16: record, samples/s"]
    assert (rate["better"], rate["relative"], rate["repetitions"]) == ("higher", False, 2)
    assert rate["max"] == pytest.approx(1e6 / min(alone["record_us_per_sample"]))
    assert {
        "wide N=250 C=40 topk:5: peak RSS",
        "ranks W=2 N=100 C=7 float16: sent per step and rank",
        "step N=100 C=7 float16: with record over without",
    } <= metrics.keys()
    assert "the process stayed under 4 GB of RSS" in page
    assert "The part `cuda` was not run" in page
    for path in tmp_path.iterdir():
        assert not re.search(rf"[ \"]{re.escape(socket.gethostname())}[ \"]", path.read_text())


def test_a_shard_that_does_not_fit_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(scorer, "available_bytes", lambda: 10**9)
    result, page = run(scorer, f"{TINY} --only wide --wide-stored float32", tmp_path)
    assert result["metrics"] == {}
    assert "Left out: stored as float32 (needs 1.5 GB, 1.0 GB are available)." in page


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("num_classes", [11, 2**15 + 1])
def test_the_formula_is_what_the_scorer_takes(name: str, num_classes: int) -> None:
    setting = Setting(5, num_classes, 2, Stored(name))
    assert setting.scorer().state_bytes() == setting.formula_bytes()


def test_the_copy_bandwidth_counts_what_is_read_and_written(monkeypatch):
    """A clock by which every copy takes 4 seconds."""
    monkeypatch.setitem(recording.COPY_BYTES, "cpu", 4000)
    marks = iter(np.arange(0.0, 1000.0, 4.0))
    monkeypatch.setattr(recording, "mark", lambda device: float(next(marks)))
    assert recording.copy_bandwidth("cpu") == 2 * 4000 / 4.0


def test_a_scorer_is_measured_in_the_middle_of_training() -> None:
    """From the first epoch on there is a previous one, and every end of an epoch folds a full
    window."""
    setting = Setting(64, 5, 32, Stored("float32"))
    table, outputs = setting.scorer(), Outputs(setting)
    averages = [table.state_dict()["average"].clone()]
    for epoch in range(2):
        assert recording.record_seconds(table, outputs, epoch_order(64, 32, epoch=epoch)) > 0
        table.end_epoch()
        averages.append(table.state_dict()["average"].clone())
    assert table.epoch == recording.K + 2
    # in a first epoch the loss differences are NaN
    assert table.state_dict()["scalars"].isfinite().all()
    assert (averages[0] != averages[1]).all()
    assert (averages[1] != averages[2]).all()


def test_the_update_alone_is_measured_on_any_device() -> None:
    setting = Setting(200, 30, 64, Stored("float16"))
    (row,) = recording.measure_update(setting, "cpu", 3)
    assert (row["path"], len(row["update_us"])) == ("plain", 3)
    assert row["state_bytes"] == setting.formula_bytes()
    assert row["launches_per_step"] > 1
    # what the page of a GPU says, from the figures of this device
    parts, label = {"cuda": [scorer._row(setting, row)]}, "cuda N=200 C=30 float16 B=64 plain"
    metrics = scorer.metrics_of(parts)
    assert metrics[f"{label}: update"]["repetitions"] == 3
    assert metrics[f"{label}: launches per step"]["value"] == row["launches_per_step"]
    result = {"parts": parts, "settings": {"only": ["cuda"], "cuda_steps": 3}, "repetitions": 3}
    page = scorer.as_markdown(result | {"provenance": files.provenance()})
    assert "| float16, 64, plain" in page


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_and_plain_torch_take_turns_on_a_gpu() -> None:
    setting = Setting(20_000, 1000, 1024, Stored("float32"))
    kernel, plain = recording.measure_update(setting, "cuda", 5)
    assert (kernel["path"], plain["path"]) == ("fused", "plain")
    assert kernel["launches_per_step"] < plain["launches_per_step"]
    for row in (kernel, plain):
        assert row["peak_memory_bytes"] >= row["state_bytes"] == setting.formula_bytes()
        assert 0 < min(row["share_of_copy_bandwidth"]) <= max(row["share_of_copy_bandwidth"]) < 1.5


# ---- precision


def rows_of(found: dict[str, precision.Scalars]) -> dict[tuple[str, str], dict]:
    rows = precision.compare_storage(found, num_classes=200)
    return {(row["stored"], row["preset"]): row for row in rows}


def test_float16_stays_within_what_rounding_can_do() -> None:
    """A stored log-probability is off by its 2^-11 at most, so an Eq. 10 difference by the
    cross-entropy x 2^-11."""
    stream = precision.Synthetic(num_samples=60, num_classes=200, num_epochs=6)
    found = stream.record([precision.REFERENCE, "float16"])
    exact, rounded = found["float32"], found["float16"]
    error_TN = np.abs(rounded["delta_paper"] - exact["delta_paper"])[1:]
    bound_TN = (exact["entropy"] + exact["delta_paper"])[1:] * 2.0**-11 + 1e-6
    assert (error_TN <= bound_TN).all()
    row = rows_of(found)["float16", "paper"]
    assert row["of_bound"] == pytest.approx((error_TN / bound_TN).max(), rel=1e-5)
    assert 0.1 < row["of_bound"] <= 1.0
    assert row["max_absolute"] == error_TN.max() > 1e-5
    assert row["bytes_per_sample"] == 400


@pytest.mark.parametrize(
    ("right", "stored", "absolute", "relative"),
    # the last one counts against the floor
    [(2.0, 2.5, 0.5, 0.25), (-2.0, -1.5, 0.5, 0.25), (1e-5, 3e-3 + 1e-5, 3e-3, 3.0)],
)
def test_errors_are_counted_as_stated(right, stored, absolute, relative):
    """One wrong difference among many right ones; what is said of the first epoch, where there is
    none, does not count."""
    exact_TN = np.ones((5, 10), np.float32)
    exact_TN[2, 3] = right
    other_TN = exact_TN.copy()
    other_TN[2, 3] = stored
    other_TN[0] = np.nan
    right_one = {"delta_official": exact_TN}
    reference = right_one | {"delta_paper": exact_TN, "entropy": np.full_like(exact_TN, 3.0)}
    rows = rows_of({"float32": reference, "float16": right_one | {"delta_paper": other_TN}})
    row = rows["float16", "paper"]
    assert row["max_absolute"] == pytest.approx(absolute, rel=1e-4)
    assert row["max_relative"] == pytest.approx(relative, rel=1e-4)
    assert row["of_bound"] == pytest.approx(absolute / ((3.0 + right) * 2.0**-11 + 1e-6), rel=1e-4)
    assert row["median_absolute"] == row["median_relative"] == 0.0
    assert rows["float16", "official"]["max_absolute"] == 0.0


SMALL = (
    "--num-samples 40 --num-classes 50 --imagenet-stored float16 topk:5 --wide-samples 20"
    " --wide-classes 90 --wide-stored topk:9/float16 --epochs 5 --threads 1 --digits-stored topk:2"
    " --digits-override train.epochs=4 'score.windows=[{T: 4, K: 3}]'"
    " model.name=shufflenet_v2_x0_5 train.global_batch_size=120"
)


def test_precision_of_made_up_outputs(tmp_path: Path) -> None:
    result, page = run(precision, f"{SMALL} --only imagenet wide", tmp_path)
    stored = [row["stored"] for row in result["parts"]["imagenet"]["rows"]]
    assert stored == ["float16", "float16", "topk:5", "topk:5"]
    metrics = result["metrics"]
    assert metrics["imagenet N=40 C=50 float16: bytes per sample"]["value"] == 100
    assert metrics["wide N=20 C=90 topk:9/float16: bytes per sample"]["value"] == 11 * 2 + 10 * 2
    assert {
        "imagenet N=40 C=50 topk:5 official: largest relative error",
        "imagenet N=40 C=50 float16 paper: Spearman",
        "wide N=20 C=90 topk:9/float16 paper: kept in common at 0.9",
    } <= metrics.keys()
    assert "* topk:5 changes a loss difference by" in page


def test_precision_of_a_training_run(tmp_path: Path) -> None:
    result, _ = run(precision, f"{SMALL} --only digits --digits-stored topk:9 topk:2", tmp_path)
    digits = result["parts"]["digits"]
    assert (digits["stream"]["num_samples"], digits["stream"]["num_epochs"]) == (1437, 4)
    assert digits["stream"]["top1_percent"][-1] > digits["stream"]["top1_percent"][0]
    errors = {(row["stored"], row["preset"]): row["max_absolute"] for row in digits["rows"]}
    assert errors["topk:9", "official"] < 1e-4 < errors["topk:2", "official"]
