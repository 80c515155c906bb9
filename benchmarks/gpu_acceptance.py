"""What only a GPU can show, settled by one command in at most ten minutes.

Each part runs in a process of its own with a time limit of its own; what it found is a line of
`gpu_acceptance.jsonl` in --out before the next one starts (also of a part that fails, or is ended
in the middle). The largest risks come first. Parts that measure no speed run beside each other, as
many as the CPUs allow; the others have the machine to themselves. What does not fit into
--budget-seconds any more is listed as "no time". At the end, or of what there is by --page-only,
comes a page like those of the other benchmarks.

    python -m benchmarks.gpu_acceptance                    # on one GPU
    python -m benchmarks.gpu_acceptance --toy --out DIR    # checks the script, measures nothing

Exit codes: 0 everything as wanted; 1 something is not, or was not tried for want of time; 2 no
GPU, or bad options.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import files
from benchmarks.gpu_findings import REAL, TOY, Findings

ROOT = Path(__file__).parents[1]
LINES = "gpu_acceptance.jsonl"
PASSED, FAILED, ENDED, BROKEN = "as wanted", "NOT as wanted", "ENDED by its limit", "BROKE OFF"
UNTRIED, MISSING = "no time", "not run"
LEAST_SECONDS = 15.0  # with less left, no part is started
POLL_SECONDS = 0.1
TOY_FACTOR = 4.0  # of the limits in a toy run, on whatever machine that is
CPUS_PER_PART = 2  # of parts that run beside each other
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Part:
    """One part: its function (module:name) and the options of that, its limit in seconds, and the
    parts it runs beside (those of the same number; 0: alone)."""

    name: str
    title: str
    function: str
    limit: float
    beside: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def _speed(network: str, batch: int, compiled: bool, limit: float) -> Part:
    kind = "compiled" if compiled else "eager"
    return Part(
        f"{network}_{batch}_{kind}",
        f"{network}, {batch} rows, {kind}",
        "benchmarks.gpu_training:network_speed",
        limit,
        options={"network": network, "batch": batch, "compiled": compiled},
    )


def _ahead(network: str, batch: int) -> Part:
    return Part(
        f"compile_{network}_{batch}",
        f"Compiling {network} for {batch} rows, beside other parts",
        "benchmarks.gpu_training:compile_ahead",
        200.0,
        1,
        {"network": network, "batch": batch},
    )


# largest risks first
PARTS = (
    Part("versions", "What is here", "benchmarks.gpu_scoring:versions", 60.0, 2),
    Part("race", "The kernel under load", "benchmarks.gpu_scoring:race", 70.0, 2),
    Part("overflow", "A first step that overflows", "benchmarks.gpu_training:overflow", 60.0, 1),
    Part("doctor", "tdds doctor", "benchmarks.gpu_commands:doctor", 90.0, 1),
    Part("tests", "pytest -m cuda", "benchmarks.gpu_commands:cuda_tests", 170.0, 1),
    _ahead("swin_t", 256),
    _ahead("resnet34", 256),
    Part("codes", "Exit codes of the command line", "benchmarks.gpu_commands:exit_codes", 150.0, 1),
    Part("same", "Deterministic runs", "benchmarks.gpu_commands:deterministic", 150.0, 1),
    Part("two_ranks", "Two ranks on one GPU", "benchmarks.gpu_scoring:two_ranks", 90.0, 1),
    Part("creep", "Memory over many passes", "benchmarks.gpu_training:memory_creep", 90.0, 1),
    Part(
        "images", "JPEGs for the parts that load them", "benchmarks.gpu_training:images", 120.0, 1
    ),
    _ahead("swin_t", 32),
    _ahead("resnet34", 32),
    Part(
        "scorer",
        "All of ImageNet on one rank, NCCL",
        "benchmarks.gpu_scoring:whole_scorer",
        130.0,
        1,
    ),
    _speed("resnet34", 256, False, 50.0),
    Part("kernel", "The kernel against a plain copy", "benchmarks.gpu_scoring:kernel_share", 50.0),
    Part("loop", "Loaders and loops on JPEGs", "benchmarks.gpu_training:loop", 110.0),
    _speed("swin_t", 256, False, 75.0),
    _speed("resnet34", 256, True, 90.0),
    _speed("swin_t", 256, True, 120.0),
    Part("collect", "tdds collect on JPEGs", "benchmarks.gpu_commands:collect_run", 120.0),
    _speed("resnet34", 32, False, 40.0),
    _speed("swin_t", 32, False, 40.0),
    _speed("resnet34", 32, True, 80.0),
    _speed("swin_t", 32, True, 100.0),
)
NAMES = [part.name for part in PARTS]


# ---- parts in processes of their own


@dataclass
class Running:
    """A part under way."""

    part: Part
    process: subprocess.Popen[bytes]
    found: Path
    output: Path
    started: float
    limit: float

    def is_over(self) -> bool:
        """Say whether it has ended; a part beyond its limit is killed, with all that it started."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() < self.started + self.limit:
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def line(self) -> dict[str, Any]:
        """Return what it has found, and how it ended."""
        seconds = time.monotonic() - self.started
        found = json.loads(self._text(self.found)) if self.found.exists() else {"rows": []}
        code, error = self.process.returncode, ""
        if code != 0:
            error = self._text(self.output)[-3000:]
        if code == -signal.SIGKILL and seconds >= self.limit:
            outcome = ENDED
        elif code != 0:
            outcome = BROKEN
        else:
            is_met = all(row["is_met"] is not False for row in found["rows"])
            outcome = PASSED if is_met else FAILED
        return _line(self.part, outcome, seconds, error) | found

    def _text(self, path: Path) -> str:
        """A file of this part, without the places of this machine."""
        text, work = path.read_text(errors="replace"), path.parents[1]
        return text.replace(f"{work}/", "").replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")


def _line(part: Part, outcome: str, seconds: float, error: str = "") -> dict[str, Any]:
    return {
        "part": part.name,
        "title": part.title,
        "outcome": outcome,
        "seconds": round(seconds, 1),
        "error": error,
        "rows": [],
    }


def start(part: Part, work: Path, toy: bool, seconds: float) -> Running:
    """Start a part in a session of its own, so that all of it can be ended."""
    folder = work / part.name
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    call = json.dumps([part.name, part.function, part.options])
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--part", call]
    command += ["--work", str(work), *(["--toy"] if toy else [])]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(work, toy),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    limit = min(part.limit * (TOY_FACTOR if toy else 1.0), seconds)
    return Running(part, process, folder / "found.json", output, time.monotonic(), limit)


def environment(work: Path, toy: bool) -> dict[str, str]:
    """The environment of a part: caches of compilers in the work folder, nothing of a launcher."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    changed = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TDDS_PROGRESS_SECONDS": "1000",
    }
    if toy:
        changed |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return kept | changed


def run_part(call: str, work: Path, toy: bool) -> None:
    """Run one part in this process; `call` is what `start` gave it."""
    name, target, options = json.loads(call)
    module, _, function = target.partition(":")
    found = Findings(work / name / "found.json")
    getattr(importlib.import_module(module), function)(TOY if toy else REAL, work, found, **options)


def run_parts(parts: Sequence[Part], out: Path, work: Path, toy: bool, budget: float) -> None:
    """Run them in order, those with the same `beside` together, and write a line for each."""
    deadline = time.monotonic() + budget
    waiting, running = list(parts), list[Running]()
    most = max(2, len(os.sched_getaffinity(0)) // CPUS_PER_PART)
    try:
        while waiting or running:
            for over in [one for one in running if one.is_over()]:
                running.remove(over)
                _write(out, over.line(), toy)
            while waiting and _may_start(waiting[0], running, most):
                part, left = waiting.pop(0), deadline - time.monotonic()
                if left < LEAST_SECONDS:
                    _write(out, _line(part, UNTRIED, 0.0), toy)
                else:
                    running.append(start(part, work, toy, left))
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.kill()


def _may_start(part: Part, running: list[Running], most: int) -> bool:
    if not running:
        return True
    together = {other.part.beside for other in running} == {part.beside}
    return part.beside > 0 and together and len(running) < most


def _write(out: Path, line: dict[str, Any], toy: bool) -> None:
    """Append a line, on disk when this returns."""
    with (out / LINES).open("a") as file:
        file.write(json.dumps(line | {"toy": toy}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(f"{line['title']}: {line['outcome']} ({line['seconds']:.0f} s)", file=sys.stderr)


# ---- the page


def read_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of parts, the last of each; one that was cut off is left out."""
    found: dict[str, dict[str, Any]] = {}
    for text in (out / LINES).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["part"]] = line
    return list(found.values())


def result_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """All parts as one result, those that have no line included."""
    have, toy = {line["part"]: line for line in lines}, any(line["toy"] for line in lines)
    ordered = [have.pop(part.name, _line(part, MISSING, 0.0)) for part in PARTS]
    metrics: dict[str, Any] = {}
    for line in lines:
        metrics |= line.get("metrics", {})
    given = [line["provenance"] for line in lines if "provenance" in line]
    return {
        "benchmark": "gpu_acceptance",
        "settings": {"toy": toy},
        "warm_up": "one epoch, pass or step of each kind is not counted",
        "repetitions": (TOY if toy else REAL).cell_rounds,
        "metrics": {} if toy else metrics,
        "parts": [*ordered, *have.values()],
        "provenance": given[0] if given else files.provenance(),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    parts = result["parts"]
    toy = result["settings"]["toy"]
    cells = [["part", "outcome", "seconds"]]
    cells += [[part["title"], part["outcome"], f"{part['seconds']:.0f}"] for part in parts]
    text = ["# Acceptance on a GPU" + (", toy run on a CPU: measures nothing" if toy else "")]
    text += ["", files.table(cells)]
    for part in parts:
        if not part["rows"] and not part["error"]:
            continue
        text += ["", f"## {part['title']}", ""]
        rows = [["what", "found", "wanted", ""]]
        rows += [
            [
                _cell(row["what"]),
                _cell(row["found"]),
                _cell(row["wanted"]),
                {True: "yes", False: "NO", None: ""}[row["is_met"]],
            ]
            for row in part["rows"]
        ]
        if part["rows"]:
            text.append(files.table(rows))
        if part["error"]:
            text += ["", "It ended with:", "", *(f"    {line}" for line in _last(part["error"]))]
    text += [
        "",
        "`python -m benchmarks.gpu_acceptance`; its docstring says how parts run. Idle: the share"
        " of a step, timed without the profiler, in which by the profiler no kernel or copy runs."
        " Networks were compiled, and their kernels chosen, beside other parts.",
        "",
        files.provenance_line(result),
        "",
    ]
    return "\n".join(text)


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _last(error: str) -> list[str]:
    return error.strip().splitlines()[-12:]


# ---- the program


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_acceptance",
        description="What only a GPU can show.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=570.0, metavar="S", help="for all parts together"
    )
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, metavar="PART", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for what parts write, 25 GB; default: temporary"
    )
    parser.add_argument(
        "--page-only", action="store_true", help=f"the page of the lines in --out/{LINES}"
    )
    parser.add_argument(
        "--toy",
        action="store_true",
        help="runs every part on the CPU at toy size; checks the script, measures nothing",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    files.add_options(parser, "gpu_acceptance")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, write lines and page; returns the exit code."""
    options = build_parser().parse_args(arguments)
    if options.part:
        run_part(options.part, options.work, options.toy)
        return 0
    if options.toy and options.out == files.RESULTS:
        return _refused("--toy measures nothing; give another --out than the folder of results")
    if options.page_only and not (options.out / LINES).is_file():
        return _refused(f"{options.out / LINES} does not exist; run without --page-only")
    if not options.page_only:
        if not options.toy and not _has_gpu():
            return _refused("no CUDA device is visible, so there is nothing to accept; see --toy")
        try:  # now, and not after minutes
            options.out.mkdir(parents=True, exist_ok=True)
            if not options.only:  # else its lines count beside those of before
                (options.out / LINES).unlink(missing_ok=True)
            (options.out / LINES).touch()
        except OSError as error:
            return _refused(f"--out {options.out} cannot be written ({error}); give another folder")
        parts = [part for part in PARTS if not options.only or part.name in options.only]
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the parts as well
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
                work = (options.work or Path(name)).resolve()
                run_parts(parts, options.out, work, options.toy, options.budget_seconds)
        finally:
            signal.signal(signal.SIGTERM, before)
    lines = read_lines(options.out)
    result = result_of(lines)
    name = options.name or ("toy" if result["settings"]["toy"] else files.default_name(result))
    files.save(options.out, name, result, as_markdown(result))
    return 0 if lines and all(line["outcome"] == PASSED for line in lines) else 1


def _refused(why: str) -> int:
    print(f"benchmarks.gpu_acceptance: error: {why}", file=sys.stderr)
    return 2


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
