"""Benchmarks refuse what measures nothing, and `benchmarks.compare` judges only what can be
compared; no time is judged.

In the default tier one benchmark runs; those of the other files are slow.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loader, offline, precision, report, scaling, scorer, throughput
from benchmarks.compare import main as compare
from benchmarks.files import metric


def test_smoke_one_benchmark_runs_and_writes_its_result(tmp_path: Path) -> None:
    command = [
        sys.executable,
        *f"-m benchmarks.checkpoint --num-samples 500 --num-classes 10 --repetitions 1 --out {tmp_path} --name tiny".split(),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr  # a process of its own: it makes a process group
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
    scorer: (
        "--num-samples 300 --num-classes 7 --batch 32 --wide-samples 1000 --wide-classes 40"
        " --wide-shards 4 --wide-rows 64 --ranks-samples 100 --ranks-classes 7 --threads 1"
    ),
    precision: (
        "--num-samples 40 --num-classes 50 --wide-samples 20 --wide-classes 90 --epochs 5 --threads"
        " 1 --imagenet-stored topk:5 --wide-stored topk:9 --digits-stored topk:2 --digits-override"
        " train.epochs=4 'score.windows=[{T: 4, K: 3}]'"
    ),
    throughput: "--device cpu",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        (offline, "--epochs 5", "--epochs 5 must be at least 10"),
        (offline, "--repetitions 0", "--repetitions 0 must be at least 1"),
        (offline, "--sizes 50x10", "--sizes 50x10 must be NxCxTxK, for example 50000x100x30x10"),
        (offline, "--sizes 50x10x5x6", "--sizes 50x10x5x6 needs N >= 1, C >= 2 and 2 <= K <= T"),
        (offline, "--num-samples 90000000000000", "GB free, these sizes need"),
        (report, "--num-samples 5", "--num-samples 5 must be at least 20"),
        (report, "--repetitions 0", "--repetitions 0 must be at least 1"),
        (
            report,
            "--num-pictures 100",
            "--num-pictures 100 cannot make 1281167 images; give at least 118",
        ),
        (
            report,
            "--num-samples 90000000000000 --num-pictures 90000000000000",
            "GB free, this size needs",
        ),
        (scaling, "--ranks 2 0", "--ranks 0 must be at least 1"),
        (scaling, "--num-classes 1", "--num-classes 1 must be at least 2"),
        (scaling, "--steps 1", "--steps 1 must be at least 2"),
        (scaling, "--network-gb-per-s 0", "--network-gb-per-s 0.0 must be a number above 0"),
        (scaling, "--step-ms nan", "--step-ms nan must be a number above 0"),
        (scorer, "--passes 0", "--passes 0 must be at least 1"),
        (scorer, "--ranks 2 0", "--ranks 0 must be at least 1"),
        (scorer, "--stored topk:3/int8", "stored as 'topk:3/int8' is unknown"),
        (scorer, "--stored topk:7", "stored as topk:7 keeps all of 7 classes"),
        (scorer, "--wide-stored topk:40", "stored as topk:40 keeps all of 40 classes"),
        (scorer, "--wide-rows 251", "--wide-rows 251 is more than the 250 samples of a shard"),
        (scorer, "--batch 60", "--ranks-samples 100 must hold two batches of 60"),
        (scorer, "--model resnet99", "resnet99"),
        (precision, "--epochs 3", "--epochs 3 must be at least 4"),
        (
            precision,
            "--imagenet-stored float16 float16",
            "--imagenet-stored float16 float16 must name each way once",
        ),
        (
            precision,
            "--wide-stored float32",
            "--wide-stored float32 must name each way once, and not float32",
        ),
        (precision, "--digits-stored topk:10", "--digits-stored topk:10 keeps all of 10 classes"),
        (
            precision,
            "--digits-override train.epochs=3 'score.windows=[{T: 3, K: 2}]'",
            "train.epochs=3 must be at least 4",
        ),
        (precision, "--digits-override train.epoch=3", "train.epoch"),
        (
            throughput,
            "--setting resnet34,224",
            "--setting resnet34,224 must be NETWORK,SIZE,ROWS,CLASSES,IMAGES",
        ),
        (throughput, "--setting resnet18,32,1,5,16", "ROWS=1 of resnet18 must be at least 2"),
        (throughput, "--setting resnet18,32,4,1,16", "CLASSES=1"),
        (
            throughput,
            "--setting resnet18,32,4,5,17",
            "IMAGES=17 of resnet18 must be a multiple of the 4 rows of a step",
        ),
        (
            throughput,
            "--setting resnet18,32,4,5,20 --ranks 2",
            "on 2 rank(s)), so that all loops see the same images; use 16",
        ),
        (
            throughput,
            "--setting resnet35,32,4,5,16",
            "model.name='resnet35' is not a torchvision classifier",
        ),
        (
            throughput,
            "--setting alexnet,16,4,5,16",
            "model.name=alexnet cannot train on 4 images of 16x16",
        ),
        (throughput, "--rounds 0", "--rounds 0 must be at least 1"),
        (throughput, "--ranks 1 -3", "--ranks -3 must be at least 1"),
    ],
)
def test_options_that_measure_nothing_are_refused(
    benchmark: Any, options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        benchmark.main(
            [*shlex.split(SMALL.get(benchmark, "") + " " + options), "--out", str(tmp_path / "new")]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"{benchmark.__name__}: error: ")
    assert message in error
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("benchmark", "option", "words"),
    [
        (scorer, "--only", "--only cuda needs a CUDA device"),
        (throughput, "--device", "no CUDA device is visible; use --device cpu"),
    ],
)
def test_a_gpu_that_is_not_there_is_said(
    benchmark: Any, option: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([option, "cuda", "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


# ---- compare


PROVENANCE = {
    "cpu": "a CPU",
    "num_cpus": 2,
    "threads": 2,
    "device": "cpu",
    "world_size": 1,
    "load_average": 0.5,
}
RATE = metric([100, 101, 102], "samples/s", "higher")
SLOW = metric([80, 81, 82], "samples/s", "higher")
TIME = metric([1.0, 1.01, 1.02], "s", "lower")
OVERHEAD = metric([0.98], "ratio", "higher", relative=True)


def result(**metrics: Any) -> dict[str, Any]:
    return {
        "benchmark": "scorer",
        "settings": {"num_samples": 100},
        "metrics": metrics,
        "provenance": dict(PROVENANCE),
    }


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
        (RATE, metric([120, 121, 122], "samples/s", "higher"), "better"),
        # ranges apart, within the tolerance
        (RATE, metric([97, 98, 99], "samples/s", "higher"), "same"),
        # beyond the tolerance, ranges overlap
        (RATE, metric([80, 90, 101], "samples/s", "higher"), "same"),
        (TIME, metric([1.2, 1.21, 1.22], "s", "lower"), "worse"),
        (TIME, metric([1.0, 1.2, 1.21], "s", "lower"), "same"),  # the same on the other side
        (TIME, metric([0.8, 0.81, 0.82], "s", "lower"), "better"),
        # single runs: no range to look at
        (OVERHEAD, metric([0.9], "ratio", "higher", relative=True), "worse"),
        (
            metric([0], "B", "lower", relative=True),
            metric([0], "B", "lower", relative=True),
            "same",
        ),
        (
            metric([0], "B", "lower", relative=True),
            metric([5], "B", "lower", relative=True),
            "worse",
        ),
        (TIME, metric([1000], "ms", "lower"), "not judged"),
    ],
)
def test_a_figure_is_judged_by_tolerance_and_range(
    compared: Any, old: Any, new: Any, verdict: str
) -> None:
    code, out = compared(result(figure=old), result(figure=new))
    assert code == (1 if verdict == "worse" else 0)
    assert out.rstrip().endswith(f"1 {verdict}")
    assert f"{verdict} |" in next(
        line for line in out.splitlines() if line.startswith("| figure ") and "old" not in line
    )


def test_a_wider_tolerance_lets_more_pass(compared: Any) -> None:
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
    compared: Any, part: str, key: str, value: Any, said: str
) -> None:
    old, new = (
        result(rate=RATE, overhead=OVERHEAD),
        result(rate=metric([10], "samples/s", "higher"), overhead=OVERHEAD),
    )
    new[part][key] = value
    code, out = compared(old, new)
    assert code == 0
    assert "1 same, 1 not judged" in out
    assert said in out
    new["metrics"]["overhead"] = metric([0.5], "ratio", "higher", relative=True)
    assert compared(old, new)[0] == 1


def test_what_is_worse_comes_first_and_what_is_in_one_result_only_is_named(compared: Any) -> None:
    code, out = compared(result(a=RATE, b=RATE, gone=TIME), result(a=RATE, b=SLOW, added=TIME))
    assert code == 1
    assert out.index("| b ") < out.index("| a ")
    assert "only in the old result: gone" in out
    assert "only in the new result: added" in out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", result(rate=RATE), "is not a result"),
        ({"benchmark": "scorer", "rows": []}, result(rate=RATE), "older ones have no metrics"),
        (result(rate=RATE), result(other=RATE), "no figure in common"),
        (
            result(rate=RATE) | {"benchmark": "loader"},
            result(rate=RATE),
            "give two of one benchmark",
        ),
        ({"a.json": "{}"}, result(rate=RATE), "both be files, or both folders"),
        ({"a.json": "{}"}, {"b.json": "{}"}, "no result file of the same name"),
        (
            {"a.json": "{}", "b.json": "{}"},
            {"a.json": "{}", "b.json": "{}"},
            "no two files could be compared",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    compared: Any, old: Any, new: Any, message: str
) -> None:
    code, error = compared(old, new)
    assert code == 2
    assert message in error


def test_folders_are_compared_file_by_file(compared: Any) -> None:
    """Also beside a file that is no result; one that has no partner is not looked at."""
    old = {
        "scorer_a.json": result(rate=RATE),
        "scorer_b.json": result(rate=RATE),
        "scorer_alone.json": "not looked at",
        "loader_of_before.json": {"benchmark": "loader"},
    }
    new = {
        "scorer_a.json": result(rate=RATE),
        "scorer_b.json": result(rate=SLOW),
        "loader_of_before.json": "{}",
    }
    code, out = compared(old, new)
    assert code == 1
    assert (
        out.index("scorer_a") < out.index("1 same") < out.index("scorer_b") < out.index("1 worse")
    )
    assert "left out: " in out
    assert "loader_of_before.json is not a result" in out
