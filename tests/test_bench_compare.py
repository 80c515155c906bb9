"""`benchmarks.compare` says what became worse, and does not judge what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import main
from benchmarks.files import metric

PROVENANCE = {"cpu": "a CPU", "num_cpus": 2, "threads": 2, "device": "cpu", "world_size": 1, "load_average": 0.5}


def result(**metrics: Any) -> dict[str, Any]:
    return {"benchmark": "scorer", "settings": {"num_samples": 100}, "metrics": metrics, "provenance": dict(PROVENANCE)}


def run(folder: Path, old: Any, new: Any, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    for name, content in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    code = main([str(folder / "old.json"), str(folder / "new.json"), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


RATE = metric([100, 101, 102], "samples/s", "higher")
TIME = metric([1.0, 1.01, 1.02], "s", "lower")
OVERHEAD = metric([0.98], "ratio", "higher", relative=True)


@pytest.mark.parametrize(("old", "new", "verdict"), [
    (RATE, metric([80, 81, 82], "samples/s", "higher"), "worse"),
    (RATE, metric([120, 121, 122], "samples/s", "higher"), "better"),
    (RATE, metric([97, 98, 99], "samples/s", "higher"), "same"),  # ranges apart, within the tolerance
    (RATE, metric([80, 90, 101], "samples/s", "higher"), "same"),  # beyond the tolerance, ranges overlap
    (TIME, metric([1.2, 1.21, 1.22], "s", "lower"), "worse"),
    (TIME, metric([1.0, 1.2, 1.21], "s", "lower"), "same"),  # the same on the other side
    (TIME, metric([0.8, 0.81, 0.82], "s", "lower"), "better"),
    (OVERHEAD, metric([0.9], "ratio", "higher", relative=True), "worse"),  # single runs: no range to look at
    (metric([0], "B", "lower", relative=True), metric([0], "B", "lower", relative=True), "same"),
    (metric([0], "B", "lower", relative=True), metric([5], "B", "lower", relative=True), "worse"),
    (TIME, metric([1000], "ms", "lower"), "not judged"),
])
def test_a_figure_is_judged_by_tolerance_and_range(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], old: Any, new: Any, verdict: str) -> None:
    code, out, _ = run(tmp_path, result(figure=old), result(figure=new), capsys)
    assert code == (1 if verdict == "worse" else 0)
    assert out.rstrip().endswith(f"1 {verdict}")
    assert f"{verdict} |" in next(line for line in out.splitlines() if line.startswith("| figure ") and "old" not in line)


def test_a_wider_tolerance_lets_more_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = result(figure=RATE), result(figure=metric([80, 81, 82], "samples/s", "higher"))
    assert run(tmp_path, old, new, capsys, "--tolerance", "0.3")[0] == 0
    assert run(tmp_path, old, new, capsys, "--tolerance", "2")[0] == 2


@pytest.mark.parametrize("change", ["cpu", "setting", "load"])
def test_times_of_other_hardware_settings_or_a_busy_machine_are_not_judged_but_ratios_are(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    old = result(rate=RATE, overhead=OVERHEAD)
    new = result(rate=metric([10], "samples/s", "higher"), overhead=OVERHEAD)
    if change == "cpu":
        new["provenance"]["cpu"] = "another"
    elif change == "setting":
        new["settings"]["num_samples"] = 200
    else:
        new["provenance"]["load_average"] = 4.0
    code, out, _ = run(tmp_path, old, new, capsys)
    assert code == 0
    assert "1 same, 1 not judged" in out
    said = {"cpu": "cpu was a CPU, is another", "setting": "num_samples was 100, is 200", "load": "busy during the new"}
    assert said[change] in out
    new["metrics"]["overhead"] = metric([0.5], "ratio", "higher", relative=True)
    assert run(tmp_path, old, new, capsys)[0] == 1


def test_what_is_in_one_result_only_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(tmp_path, result(rate=RATE, gone=TIME), result(rate=RATE, added=TIME), capsys)
    assert code == 0
    assert "only in the old result: gone" in out
    assert "only in the new result: added" in out


def test_what_is_worse_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = metric([80], "samples/s", "higher")
    _, out, _ = run(tmp_path, result(a=RATE, b=RATE), result(a=RATE, b=slow), capsys)
    assert out.index("| b ") < out.index("| a ")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("{", result(rate=RATE), "is not a result"),
    ({"benchmark": "scorer", "rows": []}, result(rate=RATE), "older ones have no metrics"),
    (result(rate=RATE), result(other=RATE), "no figure in common"),
    (result(rate=RATE) | {"benchmark": "loader"}, result(rate=RATE), "give two of one benchmark"),
])
def test_what_cannot_be_compared_is_refused(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], old: Any, new: Any, message: str) -> None:
    code, _, err = run(tmp_path, old, new, capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_folders_are_compared_file_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for kind in ("a", "b"):
            rate = metric([80 if (name, kind) == ("new", "b") else 100], "samples/s", "higher")
            (tmp_path / name / f"scorer_{kind}.json").write_text(json.dumps(result(rate=rate)))
    (tmp_path / "old" / "scorer_alone.json").write_text("not looked at")
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    out = capsys.readouterr().out
    assert out.index("scorer_a") < out.index("1 same") < out.index("scorer_b") < out.index("1 worse")
    assert main([str(tmp_path / "old"), str(tmp_path / "new" / "scorer_a.json")]) == 2
    assert "both be files, or both folders" in capsys.readouterr().err
    for name in ("old", "new"):
        (tmp_path / name / "loader_of_before.json").write_text('{"benchmark": "loader"}')
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1, "the others are compared all the same"
    out = capsys.readouterr().out
    assert "1 worse" in out
    assert "left out: " in out
    assert "loader_of_before.json is not a result" in out
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "old"), str(tmp_path / "empty")]) == 2
    assert "no result file of the same name" in capsys.readouterr().err


def test_folders_in_which_nothing_can_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for kind in ("a", "b"):
            (tmp_path / name / f"{kind}.json").write_text("{}")
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 2
    assert "no two files could be compared" in capsys.readouterr().err
