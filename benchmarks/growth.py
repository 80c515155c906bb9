"""How the cost grows: seconds, bytes and memory per sample of recording, scoring, selecting and
reporting, against samples N, classes C, epochs T, and the work of the network.

Each point runs in a process of its own, on one thread. Outputs, trajectories, scores and runs are
made up, as in the benchmarks `scorer`, `offline` and `report`; networks train on random images.
10^9 samples are a rehearsal of 1,024 ranks (`tdds plan --rehearse`). The slope of a line is that of
log cost over log size, of the whole line: 1 is a cost per sample that stays.

    python -m benchmarks.growth    # 6 GB in the temporary folder, 4 GB of memory
"""

# B rows, C classes, N samples, T epochs

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import files, report
from benchmarks.offline import write_trajectory
from benchmarks.ranks import run_on_ranks
from benchmarks.recording import Setting, Stored, measure_table
from tdds_dist.config.run import load_config
from tdds_dist.coreset.select import choose
from tdds_dist.distributed.host_memory import peak_bytes, reset_peak
from tdds_dist.errors import InputError
from tdds_dist.experiments.rehearsal import rehearse
from tdds_dist.runs.artifacts import Scores, fingerprint
from tdds_dist.scoring.offline import score_all
from tdds_dist.training.build import build_model

CLASSES, EPOCHS = 10, 10  # where they do not grow
CLASSES_GROW = (10, 100, 1_000, 21_841)
EPOCHS_GROW = (10, 30, 90)
FIXED = 8_192  # samples while classes grow, a hundredth of the largest while epochs do
BATCH = 256
# name, side of its images, images of a step: from 14 to 93,000 million operations per image
NETWORKS = (
    ("shufflenet_v2_x0_5", 32, 64),
    ("resnet18", 32, 64),
    ("shufflenet_v2_x1_0", 224, 16),
    ("resnet34", 224, 8),
    ("vgg16", 224, 4),
)
IMAGENET = Path(__file__).resolve().parent.parent / "configs" / "imagenet_resnet34.yaml"
REHEARSED = (1_024, 10**9)  # ranks, samples
WORK = "operations of a training step per image"
# of the page: what is measured, against what, key of the rows, unit
LINES = (
    ("recording", "N", "record_us", "us per sample and epoch"),
    ("scoring", "N", "score_us", "us per sample"),
    ("selecting", "N", "select_us", "us per sample"),
    ("reporting", "N", "report_us", "us per sample"),
    ("recording", "C", "record_us", "us per sample and epoch"),
    ("scoring", "T", "score_us", "us per sample"),
    ("recording over a training step", WORK, "share", "% of the step"),
)


# ---- one point, in a process of its own


def record(num_samples: int, num_classes: int, passes: int) -> dict[str, float]:
    """Record whole epochs."""
    setting = Setting(num_samples, num_classes, min(BATCH, num_samples), Stored("float32"))
    found = measure_table(setting, passes)
    return {
        "record_us": statistics.median(found["record_us_per_sample"]),
        "state_bytes": found["state_bytes"] / num_samples,
        "record_peak_bytes": found["net_resident_bytes"] / num_samples,
    }


def score_and_select(
    num_samples: int, num_epochs: int, folder: Path, passes: int
) -> dict[str, float]:
    """Score by TDDS from a trajectory, and keep half."""
    trajectory = folder / f"trajectory_{num_samples}_{num_epochs}"
    write_trajectory(trajectory, num_samples, CLASSES, num_epochs)
    label_N = np.arange(num_samples) % CLASSES
    about = fingerprint(label_N, CLASSES)
    values_N = np.random.default_rng(0).random(num_samples, dtype=np.float32)
    scores = Scores("tdds", values_N, label_N, about, {"score": "tdds"})
    found: dict[str, float] = {}
    steps: dict[str, Callable[[], object]] = {
        "score": lambda: score_all(trajectory, ("tdds",), out=trajectory / "scores"),
        "select": lambda: choose(scores, 0.5),
    }
    for name, step in steps.items():
        seconds = []
        has_reset = reset_peak()
        before = peak_bytes(has_reset)
        for _ in range(1 + passes):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        found[f"{name}_us"] = 1e6 * statistics.median(seconds[1:]) / num_samples
        found[f"{name}_peak_bytes"] = (peak_bytes(has_reset) - before) / num_samples
    stored = sum(file.stat().st_size for file in trajectory.rglob("*.npy"))
    return found | {"trajectory_bytes": stored / num_samples}


def make_report(num_samples: int, folder: Path, passes: int) -> dict[str, float]:
    """Write the page of a finished run."""
    # each picture of the made-up file serves so many images at most
    pictures = max(20, -(-num_samples // report.MAX_ROWS))
    (folder := folder / f"report_{num_samples}").mkdir()
    run = report.write_run(folder, num_samples, CLASSES, pictures, EPOCHS)
    pages = [report.build(run, folder / "page.html") for _ in range(passes)]
    return {
        "report_us": 1e6 * statistics.median(page["seconds"] for page in pages) / num_samples,
        "report_peak_bytes": statistics.median(page["peak_bytes"] for page in pages) / num_samples,
        "page_bytes": (folder / "page.html").stat().st_size / num_samples,
    }


def train_step(name: str, side: int, batch: int, passes: int) -> dict[str, float]:
    """Make training steps, and record their outputs."""
    model = build_model(name, 1_000).train()
    image = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    label_B = torch.zeros(batch, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(image), label_B).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {
        "operations": counter.get_total_flops() / batch,
        "train_us": 1e6 * statistics.median(seconds) / batch,
    }


def rehearse_rows(num_ranks: int, num_samples: int) -> dict[str, float]:
    """Return the host's part of the rank in the middle of so many."""
    rows = BATCH * num_ranks
    overrides = [f"data.num_classes={CLASSES}", f"train.global_batch_size={rows}"]
    found = rehearse(load_config(IMAGENET, overrides), num_ranks, num_samples)
    numbers = found.by_rank[num_ranks // 2]
    return {
        "record_us": 1e3 * (numbers["order_ms"] + numbers["record_ms"]) / BATCH,
        "state_bytes": numbers["state_bytes"] * num_ranks / num_samples,
    }


# ---- the program


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All points, with slopes, metrics and provenance."""
    rows: list[dict[str, Any]] = []

    def point(function: Callable[..., dict[str, float]], *arguments: Any, **about: Any) -> None:
        (found,) = run_on_ranks(1, function, *arguments)
        rows.append(about | found)
        print(rows[-1], file=sys.stderr)

    passes = options.passes
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for num in options.samples:
            point(record, num, CLASSES, passes, grows="N", at=num)
            point(score_and_select, num, EPOCHS, folder, passes, grows="N", at=num)
            if num <= options.most_reported:
                point(make_report, num, folder, passes, grows="N", at=num)
        for num in options.classes:
            point(record, options.fixed, num, passes, grows="C", at=num)
        for num in EPOCHS_GROW:
            most = max(options.samples) // 100
            point(score_and_select, most, num, folder, passes, grows="T", at=num)
    for network, side, batch in options.networks:
        point(train_step, network, side, batch, passes, grows=WORK, network=f"{network}, {side} px")
    at_1000 = next(row for row in rows if row["grows"] == "C" and row["at"] == 1_000)
    for row in rows:
        if row["grows"] == WORK:
            row |= {
                "at": row["operations"],
                "share": 100 * at_1000["record_us"] / row["train_us"],
            }
    if options.rehearse:
        ranks, num = REHEARSED
        point(rehearse_rows, ranks, num, grows="N", at=num, ranks=ranks)
    slopes = {f"{what} against {grows}": slope(rows, grows, key) for what, grows, key, _ in LINES}
    metrics = {
        f"{name}, slope": files.metric([value], "", "lower", relative=True)
        for name, value in slopes.items()
    }
    settings = {key: getattr(options, key) for key in ("samples", "classes", "fixed", "networks")}
    return {
        "benchmark": "growth",
        "settings": settings,
        "warm_up": "one pass of each point",
        "repetitions": passes,
        "metrics": metrics,
        "slopes": slopes,
        "rows": rows,
        "provenance": files.provenance(threads=1),
    }


def line(rows: Sequence[dict[str, Any]], grows: str, key: str) -> tuple[list[float], list[float]]:
    """Return sizes and costs of a line, without what is rehearsed."""
    on_it = [row for row in rows if row["grows"] == grows and key in row and "ranks" not in row]
    return [row["at"] for row in on_it], [row[key] for row in on_it]


def slope(rows: Sequence[dict[str, Any]], grows: str, key: str) -> float:
    """Return d log(whole cost) / d log(size): costs per sample are multiplied by N where it
    grows."""
    size, cost = (np.log(values) for values in line(rows, grows, key))
    return float(np.polyfit(size, cost, 1)[0]) + (grows == "N")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the lines, cost per sample over size, both on logarithmic axes."""
    from matplotlib.figure import Figure

    groups = {"N": "samples", "C": "classes", "T": "epochs", WORK: WORK}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (grows, title) in zip(figure.subplots(2, 2).flat, groups.items(), strict=True):
        for what, its_grows, key, unit in LINES:
            if its_grows == grows:
                label = f"{what}, slope {result['slopes'][f'{what} against {grows}']:.2f}"
                axes.loglog(*line(result["rows"], grows, key), marker="o", label=label)
                axes.set_ylabel(unit if grows != "N" else "us per sample")
        for row in result["rows"]:
            if row["grows"] == grows and "ranks" in row:
                axes.loglog([row["at"]], [row["record_us"]], "x", label="recording, rehearsed")
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def as_markdown(result: dict[str, Any]) -> str:
    """Return the result page."""
    cells = [["what", "against", "from", "to", "unit", "slope"]]
    for what, grows, key, unit in LINES:
        sizes, costs = line(result["rows"], grows, key)
        ends = [f"{costs[end]:.3g} at {sizes[end]:.3g}" for end in (0, -1)]
        slope_text = f"{result['slopes'][f'{what} against {grows}']:.2f}"
        cells.append([what, grows, *ends, unit, slope_text])
    parts = []
    for key, what in (
        ("state_bytes", "state of the scorer"),
        ("trajectory_bytes", "trajectory on disk"),
        ("record_peak_bytes", "memory to record"),
        ("score_peak_bytes", "memory to score"),
        ("select_peak_bytes", "memory to select"),
        ("report_peak_bytes", "memory to report"),
        ("page_bytes", "page of the report"),
    ):
        sizes, costs = line(result["rows"], "N", key)
        parts.append([what, *(f"{costs[end]:,.0f} at {sizes[end]:.0e}" for end in (0, -1))])
    rehearsed = [row for row in result["rows"] if "ranks" in row]
    return "\n".join(
        [
            "# How the cost grows with samples, classes, epochs and network",
            "",
            files.table(cells),
            "",
            files.table([["bytes per sample", "smallest", "largest"], *parts]),
            "",
            *(
                f"Rehearsed, {row['at']:.0e} samples on {row['ranks']:,} ranks: recording"
                f" {row['record_us']:.3g} us per sample (order of the epoch included), state"
                f" {row['state_bytes']:,.0f} bytes per sample.\n"
                for row in rehearsed
            ),
            (
                f"{CLASSES} classes and {EPOCHS} epochs where they do not grow;"
                f" {result['settings']['fixed']:,} samples while classes grow; 1,000 classes beside"
                f" the networks. Medians of {result['repetitions']} after one pass; one thread. The"
                " slope is that of the whole cost: 1 where a sample costs the same at any size."
            ),
            "",
            files.provenance_line(result),
            "",
        ]
    )


def check(options: argparse.Namespace) -> None:
    """Raise InputError for points without a slope."""
    for key in ("samples", "classes"):
        if len(set(getattr(options, key))) < 2:
            raise InputError(f"--{key} {getattr(options, key)} must be two sizes or more")
    if 1_000 not in options.classes:
        raise InputError(f"--classes {options.classes} must hold 1000, for the networks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON, Markdown and SVG."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description="How the cost grows with samples, classes, epochs and network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], metavar="N"
    )
    parser.add_argument(
        "--most-reported", type=int, default=10**6, metavar="N", help="largest N of a report"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[*CLASSES_GROW], metavar="C")
    parser.add_argument(
        "--fixed", type=int, default=FIXED, metavar="N", help="samples while classes grow"
    )
    parser.add_argument("--passes", type=int, default=3, help="that are measured of each point")
    parser.add_argument("--folder", default=None, metavar="DIR", help="where files are written")
    parser.add_argument("--no-rehearsal", dest="rehearse", action="store_false")
    parser.add_argument("--toy", action="store_true", help="the smallest two networks only")
    files.add_options(parser, "growth")
    options = parser.parse_args(arguments)
    options.networks = NETWORKS[: 2 if options.toy else None]

    def draw_too(result: dict[str, Any]) -> str:
        name = options.name or files.default_name(result)
        options.out.mkdir(parents=True, exist_ok=True)
        draw(result, options.out / f"growth_{name}.svg")
        return as_markdown(result)

    return files.run("growth", options, check, measure, draw_too)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
