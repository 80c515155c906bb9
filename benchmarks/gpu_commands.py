"""Parts of `benchmarks.gpu_acceptance` that run programs: `tdds doctor`, the tests, `tdds collect`.

Each part is called with its sizes, a folder to work in, and what to write its findings into.
"""

import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks import bare_loops
from benchmarks.gpu_findings import Findings, Sizes
from benchmarks.gpu_training import RUN_CLASSES, RUN_SIDE, loop_setting, small_tree
from benchmarks.paired_loops import Setting
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton

ROOT = Path(__file__).parents[1]
TEST_SECONDS = 100  # the longest that a test may take
TEST_PROCESSES = 6  # each has a context of its own on the GPU
LEAVE_SECONDS = 60.0  # until a run that was asked to leave has done so


# ---- 2 what the program says of this machine, and the tests


def doctor(sizes: Sizes, work: Path, found: Findings) -> None:
    """Record what `tdds doctor` says of this machine."""
    command = [sys.executable, "-m", "tdds_dist", "doctor", "--json"]
    # its kernel is compiled, or run, never interpreted
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    print(done.stderr)
    for row in json.loads(done.stdout)["checks"]:
        text = f"{row['state']}: {row['found']}"
        if row["state"] == "SKIP":
            found.value(row["what"], text)
        else:
            found.check(row["what"], text, row["wanted"], row["state"] != "FAIL")
    found.check("exit code", done.returncode, "0", done.returncode == 0)


def cuda_tests(sizes: Sizes, work: Path, found: Findings) -> None:
    """The tests that need a CUDA device, several files at a time."""
    if importlib.util.find_spec("pytest") is None:
        found.skipped("pytest -m cuda", "pytest is not installed here")
        return
    tests = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    chosen = [path for path in tests if re.search(r"mark\.cuda\b", Path(path).read_text())]
    options = ["-v", "-m", "cuda", "-p", "no:cacheprovider", f"--basetemp={work / 'pytest'}"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(TEST_PROCESSES, len(os.sched_getaffinity(0))))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += [f"--timeout={TEST_SECONDS}"]
    else:  # whose options are then unknown
        options += ["-o", "addopts=--strict-markers --import-mode=importlib -ra"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", *chosen],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    last = "no output"
    for line in process.stdout:  # shown at once: this part may be ended in the middle
        print(line, end="", flush=True)
        last = line.strip() or last
        if line.startswith(("FAILED", "ERROR")):
            found.value("test", line.strip()[:300])
    is_met = process.wait() == 0
    found.check("pytest -m cuda", last.strip("= "), "none failed", is_met)


# ---- 9, 11, 12 runs


@dataclass
class Started:
    """A command under way, its output in a file."""

    process: subprocess.Popen[bytes]
    output: Path
    run: Path

    def text(self) -> str:
        """Return what it has said so far."""
        return self.output.read_text(errors="replace")

    def code(self, seconds: float) -> int | str:
        """Its exit code; words when it does not end in time, and then it is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"none after {seconds:.0f} s"

    def epochs(self) -> list[dict[str, Any]]:
        """The records of the epochs that it has ended."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def await_epochs(self, count: int, seconds: float) -> bool:
        """Wait until so many epochs are over; whether they are."""
        deadline = time.monotonic() + seconds
        while len(self.epochs()) < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True


def _write_config(
    sizes: Sizes, work: Path, name: str, changes: dict[str, dict[str, Any]] | None = None
) -> Path:
    """The config file of a small run, and its images."""
    for split, path, count in (
        ("train", work / f"{name}.beton", sizes.run_images),
        ("val", work / f"{name}_val.beton", 2 * RUN_CLASSES),
    ):
        source = open_source(f"synthetic:{count},{RUN_CLASSES},{RUN_SIDE}", split)
        write_beton(source, path, num_workers=2, progress=False)
    tree = small_tree(sizes, work, name)
    path = work / f"{name}.yaml"
    merged = {key: part | (changes or {}).get(key, {}) for key, part in tree.items()}
    path.write_text(yaml.safe_dump(merged))
    return path


def _collect(config: Path, run: Path, *more: str) -> Started:
    """Start `tdds collect` with a run directory of its own."""
    output = run.with_name(f"{run.name}_{time.monotonic_ns()}.txt")
    command = [sys.executable, "-m", "tdds_dist", "collect", str(config), f"run.dir={run}", *more]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    return Started(process, output, run)


def deterministic(sizes: Sizes, work: Path, found: Findings) -> None:
    """Two runs with `train.deterministic=true`: the same bits. What cannot be so is refused."""
    config = _write_config(sizes, work, "same", {"train": {"deterministic": True}})
    runs = [_collect(config, work / f"same{number}") for number in range(2)]
    vgg = _collect(
        config, work / "vgg", f"model.name={'vgg11' if sizes.on_gpu else 'squeezenet1_1'}"
    )
    codes = [run.code(sizes.start_seconds) for run in runs]
    found.check("exit codes", codes, "[0, 0]", codes == [0, 0])
    if codes != [0, 0]:
        found.value("said", runs[0].text()[-1500:])
        return
    one, other = (_results(run.run) for run in runs)
    different = sorted(name for name in one if not np.array_equal(one[name], other[name]))
    found.check("of two runs other bits in", different or "none", "none", not different)
    found.value("compared", f"{len(one)} arrays of scores and weights")
    weights = torch.load(runs[0].run / "models" / "final.pt", weights_only=True)
    devices = sorted({str(value.device) for value in weights.values()})
    found.check("final.pt holds tensors on", devices, "cpu", devices == ["cpu"])
    code = vgg.code(sizes.start_seconds)
    said = " ".join(vgg.text().split())[-300:]
    if sizes.on_gpu:
        found.check("VGG: exit code", f"{code}: {said}", "2", code == 2)
    else:
        found.value("VGG: exit code", code)


def _results(run: Path) -> dict[str, np.ndarray]:
    """Scores and weights of a run, as bytes."""
    found: dict[str, np.ndarray] = {}
    for path in sorted((run / "scores").glob("*.npz")):
        with np.load(path) as arrays:
            found |= {
                f"{path.name}: {key}": arrays[key]
                for key in arrays.files
                if arrays[key].dtype.kind in "fiu"
            }
    weights: dict[str, Tensor] = torch.load(
        run / "models" / "final.pt", weights_only=True, map_location="cpu"
    )
    for name, value in weights.items():
        found[name] = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def exit_codes(sizes: Sizes, work: Path, found: Findings) -> None:
    """0 when done, 2 for bad input, 75 after SIGTERM with the state saved, and the run goes on."""
    config = _write_config(sizes, work, "codes")
    good = _collect(config, work / "good", "train.amp=fp16")
    bad = _collect(config, work / "bad", "train.lr=-1")
    endless = ("train.epochs=100000", "score.final_pass=false", "checkpoint.every_epochs=0")
    first = _collect(config, work / "left", *endless)
    code = bad.code(sizes.start_seconds)
    found.check("bad input", code, "2", code == 2)
    found.value("said", " ".join(bad.text().split())[-300:])
    code = good.code(sizes.start_seconds)
    found.check("done, with fp16", code, "0", code == 0)
    if code != 0:
        found.value("said by the run with fp16", good.text()[-1500:])
    code = _left(sizes, first, 1)
    found.check("left after SIGTERM", code, "75", code == 75)
    epochs = len(first.epochs())
    again = _collect(config, work / "left", *endless)
    code = _left(sizes, again, epochs + 1)
    found.check("left again after going on", code, "75", code == 75)
    numbers = [record["epoch"] for record in again.epochs()]
    is_whole = numbers == list(range(len(numbers))) and len(numbers) > epochs
    found.check("epochs on record", len(numbers), f"each once, more than {epochs}", is_whole)
    if not is_whole:
        found.value("said last", again.text()[-1500:])


def _left(sizes: Sizes, run: Started, epochs: int) -> int | str:
    """The exit code after SIGTERM, sent when so many epochs are over."""
    if not run.await_epochs(epochs, sizes.start_seconds):
        code = run.code(0.1)
        return f"{code} before {epochs} epochs: {run.text()[-1500:]}"
    run.process.send_signal(signal.SIGTERM)
    return run.code(LEAVE_SECONDS)


def collect_run(sizes: Sizes, work: Path, found: Findings) -> None:
    """`tdds collect` itself on these JPEGs until its time is over; then SIGTERM."""
    setting, folder = loop_setting(sizes), work / "loop"
    tree = _loop_tree(setting, folder, work / "collect", sizes.num_classes)
    config = work / "collect.yaml"
    config.write_text(yaml.safe_dump(tree))
    started = time.perf_counter()
    run = _collect(config, work / "collect")
    is_running = run.await_epochs(1, sizes.start_seconds)
    taken, wanted = time.perf_counter() - started, f"within {sizes.start_seconds:.0f} s"
    found.check("first epoch over after", f"{taken:.0f} s", wanted, is_running)
    deadline = started + sizes.loop_seconds
    while run.process.poll() is None and time.perf_counter() < deadline:
        time.sleep(0.2)
    run.process.send_signal(signal.SIGTERM)
    code = run.code(LEAVE_SECONDS)
    found.check("exit code after SIGTERM", code, "75", code == 75)
    records = run.epochs()
    rates = [record["images_per_second"] for record in records[1:] or records]
    if not rates:
        found.value("said last", run.text()[-1500:])
        return
    found.value("epochs", len(records))
    found.value("images/s of an epoch, median", f"{statistics.median(rates):,.0f}")
    found.metric("tdds collect: images/s", rates, "images/s", "higher")
    found.value("memory of an epoch's record", f"{records[-1]['memory_bytes'] / 1e9:.1f} GB")


def _loop_tree(setting: Setting, folder: Path, run: Path, num_classes: int) -> dict[str, Any]:
    """The config of `tdds collect` on the images of a setting."""
    return {
        "run": {"name": "collect", "dir": str(run), "device": setting.device},
        "data": {
            "train": str(folder / "images.beton"),
            "val": str(folder / "every_class.beton"),
            "num_classes": num_classes,
            "image_size": setting.size,
            "crop": "resized",
            "mean": list(bare_loops.MEAN),
            "std": list(bare_loops.STD),
        },
        "model": {"name": setting.network, "channels_last": setting.channels_last},
        "train": {
            "epochs": 100_000,
            "global_batch_size": setting.rows,
            "lr": bare_loops.LR,
            "amp": "bf16",
            "eval_every": 100_000,
        },
        "score": {"windows": [{"T": 100_000, "K": 10}], "final_pass": False},
    }
