"""The acceptance run for GPUs, on the CPU: every part runs at toy size, and whatever happens to
parts, each has its line and there is a page."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_acceptance as gpu
from benchmarks.gpu_acceptance import PARTS, PASSED, Part, as_markdown, main, read_lines, result_of
from benchmarks.gpu_findings import TOY, Findings, Sizes

ME = "tests.benchmarks.test_gpu_acceptance"


def breaks(sizes: Sizes, work: Path, found: Findings) -> None:
    """A part that finds something and then fails."""
    found.value("size", sizes.num_samples)
    raise ValueError("as planned | here")


def hangs(sizes: Sizes, work: Path, found: Findings) -> None:
    """A part that never ends, nor does the program that it starts."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found.value("child", child.pid)
    time.sleep(600)


def is_wrong(sizes: Sizes, work: Path, found: Findings) -> None:
    """A part that ends, and finds something else than wanted."""
    found.metric("speed", [1.0, 3.0], "images/s", "higher")
    found.check("sky", "green", "blue", False)


def is_alive(pid: int) -> bool:
    """Whether a process runs (an orphan that has ended may wait for its new parent)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_parts_that_fail_hang_or_find_no_time_have_their_lines(tmp_path: Path) -> None:
    work = tmp_path / "work"
    parts = [
        Part("breaks", "Breaks", f"{ME}:breaks", 30.0, 1),
        Part("hangs", "Hangs", f"{ME}:hangs", 4.0, 1),
        Part("wrong", "Wrong", f"{ME}:is_wrong", 30.0),
    ]
    gpu.run_parts(parts, tmp_path, work, True, 300.0)
    lines = {line["part"]: line for line in read_lines(tmp_path)}
    outcomes = {name: line["outcome"] for name, line in lines.items()}
    assert outcomes == {"breaks": gpu.BROKEN, "hangs": gpu.ENDED, "wrong": gpu.FAILED}
    assert lines["breaks"]["rows"][0]["found"] == TOY.num_samples
    assert "as planned" in lines["breaks"]["error"]
    assert not is_alive(lines["hangs"]["rows"][0]["found"]), "its child was left behind"
    gpu.run_parts([PARTS[0]], tmp_path, work, True, 1.0)
    page = as_markdown(result_of(read_lines(tmp_path)))
    words = " ".join(page.split())
    assert f"| {PARTS[0].title} | {gpu.UNTRIED}" in words
    assert f"| {PARTS[1].title} | {gpu.MISSING}" in words
    assert "    ValueError: as planned | here" in page
    assert "| sky | green | blue | NO |" in words


@pytest.mark.slow
def test_two_parts_run_and_a_page_comes_of_what_there_is(tmp_path, capsys):
    words = ["--toy", "--out", str(tmp_path)]
    assert main([*words, "--only", "versions", "overflow"]) == 0
    lines = (tmp_path / gpu.LINES).read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == [PASSED, PASSED]
    result = json.loads((tmp_path / "gpu_acceptance_toy.json").read_text())
    assert {"commit", "cpu", "versions"} <= result["provenance"].keys()
    assert result["metrics"] == {}, "of a toy run there is nothing to compare"
    (tmp_path / gpu.LINES).write_text(lines[0] + "\n" + lines[1][:40])  # cut off in the middle
    capsys.readouterr()
    assert main(["--page-only", "--out", str(tmp_path)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert f"| {PARTS[0].title} | {PASSED} |" in page
    assert f"| {PARTS[2].title} | {gpu.MISSING} |" in page


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert main(["--out", str(tmp_path)]) == 2
    assert main(["--toy"]) == 2
    assert main(["--toy", "--out", "/proc/nowhere"]) == 2
    assert main(["--page-only", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "no CUDA device is visible" in said[0]
    assert "cannot be written" in said[2]
    assert not list(tmp_path.iterdir())


EVERY_PART = """
import json, multiprocessing, sys
from pathlib import Path
from benchmarks import gpu_commands, gpu_scoring, gpu_training
from benchmarks.gpu_acceptance import PARTS, run_part
work = Path(sys.argv[1])
for part in PARTS:
    if part.name in sys.argv[2:]:
        (work / part.name).mkdir(exist_ok=True)
        call = json.dumps([part.name, part.function, part.options]), work, True
        process = multiprocessing.get_context("fork").Process(target=run_part, args=call)
        process.start()
        process.join()
        assert process.exitcode == 0, part.name
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_parts_run_at_toy_size(tmp_path: Path) -> None:
    """All but those that do the same for another batch or network, those of whole commands, which
    have tests of their own, and two that run above; `--toy` runs them all, and loads torch anew for
    each."""
    elsewhere = {"doctor", "tests", "codes", "same", "two_ranks", "versions", "overflow"}
    chosen = [
        part.name
        for part in PARTS
        if part.name not in elsewhere and "_32" not in part.name and "swin_t" not in part.name
    ]
    words, env = [sys.executable, "-c", EVERY_PART, str(tmp_path)], gpu.environment(tmp_path, True)
    told = {"cwd": gpu.ROOT, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([*words, *chosen], **told)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in chosen:
        rows = json.loads((tmp_path / name / "found.json").read_text())["rows"]
        assert rows, name
        assert not [row for row in rows if row["is_met"] is False], name
