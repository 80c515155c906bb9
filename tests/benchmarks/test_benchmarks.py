"""Benchmarks refuse what measures nothing, and `benchmarks.compare` judges only what can be
compared; no time is judged.

In the default tier one benchmark runs; those of the other files are slow.
"""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loader
from benchmarks.compare import main as compare
from benchmarks.files import metric
from tests.make import table


def test_smoke_one_benchmark_runs_and_writes_its_result(tmp_path: Path) -> None:
    words = "-m benchmarks.checkpoint --num-samples 500 --num-classes 10 --repetitions 1"
    command = [sys.executable, *words.split(), "--out", str(tmp_path), "--name", "tiny"]
    root = Path(__file__).parents[2]
    # a process of its own: it makes a process group
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "checkpoint_tiny.json").read_text())
    assert min(result["seconds"].values()) > 0
    assert result["checkpoint_bytes"] > result["state_bytes"] > 500 * 10 * 4


@pytest.mark.slow
def test_loader_benchmark_compares_with_the_stock_loader(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    tiny = "--num-samples 60 --side 48 --size 32 --batch 20 --workers 1 --repetitions 2".split()
    assert loader.main([*tiny, "--out", str(tmp_path), "--name", "tiny"]) == 0
    torch.set_num_threads(threads)  # which other tests share
    result = json.loads((tmp_path / "loader_tiny.json").read_text())
    assert all(len(rates) == 2 and min(rates) > 0 for rates in result["images_per_second"].values())
    assert result["ratio_min"] <= result["ratio"] <= result["ratio_max"]
    assert "| FFCV's |" in (tmp_path / "loader_tiny.md").read_text()


# ---- options that measure nothing


SMALL = {  # options that each case below adds to
    "scorer": (
        "--num-samples 300 --num-classes 7 --batch 32 --wide-samples 1000 --wide-classes 40"
        " --wide-shards 4 --wide-rows 64 --ranks-samples 100 --ranks-classes 7 --threads 1"
    ),
    "precision": (
        "--num-samples 40 --num-classes 50 --wide-samples 20 --wide-classes 90 --epochs 5 --threads"
        " 1 --imagenet-stored topk:5 --wide-stored topk:9 --digits-stored topk:2 --digits-override"
        " train.epochs=4 'score.windows=[{T: 4, K: 3}]'"
    ),
    "throughput": "--device cpu",
}
NO_CUDA = "no CUDA device is visible; use --device cpu"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        *table("""
        offline -> --epochs 5 -> --epochs 5 must be at least 10
        offline -> --repetitions 0 -> --repetitions 0 must be at least 1
        offline -> --sizes 50x10 -> --sizes 50x10 must be NxCxTxK, for example 50000x100x30x10
        offline -> --sizes 50x10x5x6 -> --sizes 50x10x5x6 needs N >= 1, C >= 2 and 2 <= K <= T
        offline -> --num-samples 90000000000000 -> GB free, these sizes need
        report -> --num-samples 5 -> --num-samples 5 must be at least 20
        report -> --repetitions 0 -> --repetitions 0 must be at least 1
        report -> --num-pictures 100 -> --num-pictures 100 cannot make 1281167 images; give at least 118
        report -> --num-samples 90000000000000 --num-pictures 90000000000000 -> GB free, this size needs
        scaling -> --ranks 2 0 -> --ranks 0 must be at least 1
        scaling -> --num-classes 1 -> --num-classes 1 must be at least 2
        scaling -> --steps 1 -> --steps 1 must be at least 2
        scaling -> --network-gb-per-s 0 -> --network-gb-per-s 0.0 must be a number above 0
        scaling -> --step-ms nan -> --step-ms nan must be a number above 0
        scorer -> --passes 0 -> --passes 0 must be at least 1
        scorer -> --ranks 2 0 -> --ranks 0 must be at least 1
        scorer -> --stored topk:3/int8 -> stored as 'topk:3/int8' is unknown
        scorer -> --stored topk:7 -> stored as topk:7 keeps all of 7 classes
        scorer -> --wide-stored topk:40 -> stored as topk:40 keeps all of 40 classes
        scorer -> --wide-rows 251 -> --wide-rows 251 is more than the 250 samples of a shard
        scorer -> --batch 60 -> --ranks-samples 100 must hold two batches of 60
        scorer -> --model resnet99 -> resnet99
        precision -> --epochs 3 -> --epochs 3 must be at least 4
        precision -> --imagenet-stored float16 float16 -> --imagenet-stored float16 float16 must name each way once
        precision -> --wide-stored float32 -> --wide-stored float32 must name each way once, and not float32
        precision -> --digits-stored topk:10 -> --digits-stored topk:10 keeps all of 10 classes
        precision -> --digits-override train.epochs=3 'score.windows=[{T: 3, K: 2}]' -> train.epochs=3 must be at least 4
        precision -> --digits-override train.epoch=3 -> train.epoch
        throughput -> --setting resnet34,224 -> --setting resnet34,224 must be NETWORK,SIZE,ROWS,CLASSES,IMAGES
        throughput -> --setting resnet18,32,1,5,16 -> ROWS=1 of resnet18 must be at least 2
        throughput -> --setting resnet18,32,4,1,16 -> CLASSES=1
        throughput -> --setting resnet18,32,4,5,17 -> IMAGES=17 of resnet18 must be a multiple of the 4 rows of a step
        throughput -> --setting resnet18,32,4,5,20 --ranks 2 -> on 2 rank(s)), so that all loops see the same images; use 16
        throughput -> --setting resnet35,32,4,5,16 -> model.name='resnet35' is not a torchvision classifier
        throughput -> --setting alexnet,16,4,5,16 -> model.name=alexnet cannot train on 4 images of 16x16
        throughput -> --rounds 0 -> --rounds 0 must be at least 1
        throughput -> --ranks 1 -3 -> --ranks -3 must be at least 1
        """),
        pytest.param("scorer", "--only cuda", "--only cuda needs a CUDA device", marks=NO_GPU),
        pytest.param("throughput", "--device cuda", NO_CUDA, marks=NO_GPU),
    ],
)
def test_options_that_measure_nothing_are_refused(benchmark, options, message, tmp_path, capsys):
    words = shlex.split(f"{SMALL.get(benchmark, '')} {options} --out {tmp_path}/new")
    assert importlib.import_module(f"benchmarks.{benchmark}").main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.{benchmark}: error: ")
    assert message in error
    assert not (tmp_path / "new").exists()


# ---- compare


def rate(*values: float) -> dict[str, Any]:
    return metric([*values], "samples/s", "higher")


def seconds(*values: float) -> dict[str, Any]:
    return metric([*values], "s", "lower")


def overhead(value: float) -> dict[str, Any]:
    return metric([value], "ratio", "higher", relative=True)


def num_bytes(value: float) -> dict[str, Any]:
    return metric([value], "B", "lower", relative=True)


RATE, SLOW = rate(100, 101, 102), rate(80, 81, 82)
TIME, OVERHEAD = seconds(1.0, 1.01, 1.02), overhead(0.98)


def result(**metrics: Any) -> dict[str, Any]:
    machine = {"cpu": "a CPU", "num_cpus": 2, "threads": 2, "device": "cpu", "world_size": 1}
    found = {"benchmark": "scorer", "settings": {"num_samples": 100}, "metrics": metrics}
    return found | {"provenance": machine | {"load_average": 0.5}}


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Compare two results, or two folders of {file name: result}: exit code, and what is
    printed."""

    def write(path: Path, content: Any) -> Path:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def run(old: Any, new: Any, *options: str) -> tuple[int, str]:
        paths = []
        for name, content in (("old", old), ("new", new)):
            if isinstance(content, dict) and any(key.endswith(".json") for key in content):
                (tmp_path / name).mkdir(exist_ok=True)
                for file, inside in content.items():
                    write(tmp_path / name / file, inside)
                paths.append(tmp_path / name)
            else:
                paths.append(write(tmp_path / f"{name}.json", content))
        code = compare([*map(str, paths), *options])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.err if code == 2 else captured.out

    return run


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (RATE, SLOW, "worse"),
        (RATE, rate(120, 121, 122), "better"),
        (RATE, rate(97, 98, 99), "same"),  # ranges apart, within the tolerance
        (RATE, rate(80, 90, 101), "same"),  # beyond the tolerance, ranges overlap
        (TIME, seconds(1.2, 1.21, 1.22), "worse"),
        (TIME, seconds(1.0, 1.2, 1.21), "same"),  # the same on the other side
        (TIME, seconds(0.8, 0.81, 0.82), "better"),
        (OVERHEAD, overhead(0.9), "worse"),  # single runs: no range to look at
        (num_bytes(0), num_bytes(0), "same"),
        (num_bytes(0), num_bytes(5), "worse"),
        (TIME, metric([1000], "ms", "lower"), "not judged"),
    ],
)
def test_a_figure_is_judged_by_tolerance_and_range(compared, old, new, verdict):
    code, out = compared(result(figure=old), result(figure=new))
    assert code == (1 if verdict == "worse" else 0)
    assert out.rstrip().endswith(f"1 {verdict}")
    rows = [line for line in out.splitlines() if line.startswith("| figure ") and "old" not in line]
    assert f"{verdict} |" in rows[0]


def test_a_wider_tolerance_lets_more_pass(compared):
    assert compared(result(figure=RATE), result(figure=SLOW), "--tolerance", "0.3")[0] == 0
    assert compared(result(figure=RATE), result(figure=SLOW), "--tolerance", "2")[0] == 2


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("provenance", "cpu", "another", "cpu was a CPU, is another"),
        ("settings", "num_samples", 200, "num_samples was 100, is 200"),
        ("provenance", "load_average", 4.0, "busy during the new"),
    ],
)
def test_times_of_other_hardware_settings_or_a_busy_machine_are_not_judged_but_ratios_are(
    compared, part, key, value, said
):
    old, new = (result(rate=found, overhead=OVERHEAD) for found in (RATE, rate(10)))
    new[part][key] = value
    code, out = compared(old, new)
    assert code == 0
    assert "1 same, 1 not judged" in out
    assert said in out
    new["metrics"]["overhead"] = overhead(0.5)
    assert compared(old, new)[0] == 1


def test_what_is_worse_comes_first_and_what_is_in_one_result_only_is_named(compared):
    code, out = compared(result(a=RATE, b=RATE, gone=TIME), result(a=RATE, b=SLOW, added=TIME))
    assert code == 1
    assert out.index("| b ") < out.index("| a ")
    assert "only in the old result: gone" in out
    assert "only in the new result: added" in out


USUAL, TWO_FILES = result(rate=RATE), {"a.json": "{}", "b.json": "{}"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", USUAL, "is not a result"),
        ({"benchmark": "scorer", "rows": []}, USUAL, "older ones have no metrics"),
        (USUAL, result(other=RATE), "no figure in common"),
        (USUAL | {"benchmark": "loader"}, USUAL, "give two of one benchmark"),
        ({"a.json": "{}"}, USUAL, "both be files, or both folders"),
        ({"a.json": "{}"}, {"b.json": "{}"}, "no result file of the same name"),
        (TWO_FILES, TWO_FILES, "no two files could be compared"),
    ],
)
def test_what_cannot_be_compared_is_refused(compared, old, new, message):
    code, error = compared(old, new)
    assert code == 2
    assert message in error


def test_folders_are_compared_file_by_file(compared):
    """Also beside a file that is no result; one that has no partner is not looked at."""
    old = {f"scorer_{name}.json": USUAL for name in "ab"}
    new = {"scorer_a.json": USUAL, "scorer_b.json": result(rate=SLOW)}
    old |= {"scorer_alone.json": "not looked at", "loader_of_before.json": {"benchmark": "loader"}}
    code, out = compared(old, new | {"loader_of_before.json": "{}"})
    assert code == 1
    places = [out.index(part) for part in ("scorer_a", "1 same", "scorer_b", "1 worse")]
    assert places == sorted(places)
    assert "left out: " in out
    assert "loader_of_before.json is not a result" in out
