"""Accuracy against images seen: every method of `tdds train`, its random twin, and a full training
that is shorter by as much.

Runs what is missing; finished runs are left as they are, so it may be stopped and started again.
The shorter training has the epochs whose images come closest to what the method saw, over the
seeds, with the learning rate's schedule over those.

    python -m benchmarks.train_for_less configs/digits.yaml --out runs/train_for_less --seeds 5
    python -m benchmarks.train_for_less --decisions     # seconds of a decision at ImageNet's size
"""

# N samples, T epochs

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tdds_dist.config.run import load_config
from tdds_dist.config.scores import Window
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.pruning.plan import BY_RUN, METHODS, PruningPlan
from tdds_dist.pruning.schedule import PruningSchedule
from tdds_dist.report.accuracy import format_trainings, training_rows
from tdds_dist.report.read import read_facts
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.text import markdown_table


def methods(epochs: int) -> dict[str, tuple[str, ...]]:
    """Return the keys of each method in a training of so many epochs."""
    two_thirds, third, sixth = (max(1, round(epochs * share / 6)) for share in (4, 2, 1))
    return {
        "static, p = 0.3": ("method=static", "rate=0.3", f"start={two_thirds}"),
        "static, p = 0.5": ("method=static", "rate=0.5", f"start={two_thirds}"),
        "static, p = 0.7": ("method=static", "rate=0.7", f"start={two_thirds}"),
        "refresh, p = 0.5": ("method=refresh", "rate=0.5", f"start={third}", f"every={sixth}"),
        "infobatch, r = 0.5": ("method=infobatch", "rate=0.5"),
        "hard first, p_y < 0.9": ("method=hard_first", "threshold=0.9"),
        "progressive, R = 0.75, q = 0.85": ("method=progressive", "rate=0.3625", "drawn=0.75"),
    }


def trained(config: Path, folder: Path, seed: int, *words: str) -> RunDir:
    """Run a training unless it has finished; return its directory."""
    run = RunDir(folder)
    if run.read_result() is None:
        place = (f"run.dir={folder}", f"run.seed={seed}", f"run.name={folder.name}")
        command = [sys.executable, "-m", "tdds_dist", "train", str(config), *words, *place]
        subprocess.run(command, check=True)
    return run


def runs(
    config: Path, out: Path, num_seeds: int, words: list[str], jobs: int, only: list[str]
) -> list[RunDir]:
    """Return the runs of these methods, twins and shorter trainings; `jobs` run at a time."""

    def of_seeds(stem: str, *more: str, twin_of: str = "") -> list[RunDir]:
        def of_seed(seed: int) -> RunDir:
            source = [f"prune.twin_of={out / twin_of}_seed{seed}"] if twin_of else []
            return trained(config, out / f"{stem}_seed{seed}", seed, *words, *more, *source)

        with ThreadPoolExecutor(jobs) as pool:
            return [*pool.map(of_seed, range(num_seeds))]

    found = of_seeds("full")
    for keys in methods(load_config(config, words).train.epochs).values():
        stem, method = "_".join(key.partition("=")[2] for key in keys), keys[0].partition("=")[2]
        if method not in only:
            continue
        prune = [f"prune.{key}" for key in keys]
        found += (own := of_seeds(stem, *prune))
        source = stem if method in BY_RUN else ""
        found += of_seeds(f"{stem}_twin", *prune, "prune.twin=true", twin_of=source)
        results = [run.read_result() or {} for run in own]
        seen = statistics.fmean(result["images_seen"] / result["num_images"] for result in results)
        found += of_seeds(f"shorter{round(seen)}", f"train.epochs={round(seen)}")
    return [*{run.path: run for run in found}.values()]


def write_results(runs: list[RunDir], out: Path) -> None:
    """Write the table of `tdds report`, the same as a figure, and a row per training."""
    found = [read_facts(run) for run in runs]
    rows = training_rows(found)
    commits = sorted({str(facts.env.get("commit")) for facts in found})
    about = f"\n{len(runs)} trainings; commit {', '.join(commits)}, {found[0].env.get('cpu')}.\n"
    (out / "table.md").write_text(f"```\n{format_trainings(rows)}\n```\n{about}")
    with (out / "trainings.csv").open("w") as file:
        print("run,seed,epochs,images_seen,images_of_full,final_top1,train_seconds", file=file)
        for facts in found:
            result = facts.result or {}
            keys = ("seed", "epochs", "images_seen", "images_of_full", "final_top1")
            values = [str(result[key]) for key in keys]
            print(
                facts.run.path.name, *values, f"{result['train_seconds']:.1f}", sep=",", file=file
            )
    draw(rows, out / "figure.svg")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw final top-1 over images seen: a colour per method, its random twin dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, colours = figure.subplots(), dict[str, str]()
    for row in sorted(rows, key=lambda row: row["share"]):
        colours.setdefault(row["family"], f"C{len(colours)}")
    for family, colour in colours.items():
        for is_twin in (False, True):
            line = [row for row in rows if (row["family"], row["is_twin"]) == (family, is_twin)]
            if not line:
                continue
            line.sort(key=lambda row: row["share"])
            axes.errorbar(
                [row["share"] for row in line],
                [row["final_top1"] for row in line],
                [row["final_top1_std"] or 0.0 for row in line],
                color=colour,
                linestyle="--" if is_twin else "-",
                marker="s" if is_twin else "o",
                elinewidth=0.5,
                label=f"{family}: random twin" if is_twin else family,
            )
    axes.set_xlabel("images seen, of a full training (%)")
    axes.set_ylabel("final top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def decisions(num_samples: int, epochs: int = 30) -> str:
    """Return a table of the seconds that `PruningSchedule.decide` takes on one rank: what it needs
    of the scorer, the rule, the hash and the record."""
    scorer = ShardedScorer(
        num_samples, 2, [Window(epochs, 3, 0.9)], device="cpu", partial_epochs=True
    )
    label_N = torch.arange(num_samples) % 2
    for epoch in range(4):
        scorer.expect(order := epoch_order(num_samples, num_samples, epoch=epoch))
        index_N = torch.from_numpy(order.of_rank(0, 1)[1][0].copy())
        scorer.record(index_N, torch.randn(num_samples, 2), label_N[index_N])
        scorer.end_epoch()
    lines = [["", "seconds", "bytes of the record"]]
    for name, keys in methods(epochs).items():
        words = dict(key.split("=") for key in keys)
        method = words.pop("method")
        settings: dict[str, Any] = {key: float(value) for key, value in words.items()}
        settings |= {"start": 4, "every": 1}
        plan = PruningPlan(method, num_samples, epochs, **settings)
        with tempfile.TemporaryDirectory() as folder:
            schedule = PruningSchedule(plan, scorer, window=scorer.windows[0], folder=Path(folder))
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                schedule.decide(4)
                seconds.append(time.perf_counter() - started)
            (record,) = Path(folder).iterdir()
            size = record.stat().st_size
        lines.append([name, f"{statistics.median(seconds):.2f}", f"{size:,}"])
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/train_for_less"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=METHODS[1:])
    parser.add_argument("--decisions", action="store_true", help="time decisions, train nothing")
    options = parser.parse_args()
    if options.decisions:
        print(decisions(1_281_167))
        return
    if options.config is None:
        parser.error("give a config, e.g. configs/digits.yaml, or --decisions")
    words = (options.overrides, options.jobs, options.methods)
    write_results(runs(options.config, options.out, options.seeds, *words), options.out)
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
