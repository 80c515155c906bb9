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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tdds_dist.config.scores import Window
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.pruning.plan import PruningPlan
from tdds_dist.pruning.schedule import PruningSchedule
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.text import markdown_table, mean_std, plus_minus

METHODS = {
    "static, p = 0.3": ("method=static", "rate=0.3", "start=20"),
    "static, p = 0.5": ("method=static", "rate=0.5", "start=20"),
    "static, p = 0.7": ("method=static", "rate=0.7", "start=20"),
    "refresh, p = 0.5, every 5": ("method=refresh", "rate=0.5", "start=10", "every=5"),
    "infobatch, r = 0.5": ("method=infobatch", "rate=0.5"),
    "hard first, p_y < 0.9": ("method=hard_first", "threshold=0.9"),
    "progressive, R = 0.75, q = 0.85": ("method=progressive", "rate=0.3625", "drawn=0.75"),
}


def trained(config: Path, folder: Path, seed: int, *words: str) -> dict[str, Any]:
    """Return the result of a training, and run it first unless it has finished."""
    run = RunDir(folder)
    if (result := run.read_result()) is None:
        place = (f"run.dir={folder}", f"run.seed={seed}", f"run.name={folder.name}")
        command = [sys.executable, "-m", "tdds_dist", "train", str(config), *words, *place]
        subprocess.run(command, check=True)
        result = run.read_result()
    assert result is not None
    return result


def rows(
    config: Path, out: Path, num_seeds: int, words: list[str], jobs: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the name of each row of the table, and a result per seed; `jobs` runs at a time."""

    def of_seeds(stem: str, *more: str) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(jobs) as pool:
            return [
                *pool.map(
                    lambda seed: trained(config, out / f"{stem}_seed{seed}", seed, *words, *more),
                    range(num_seeds),
                )
            ]

    yield "full training", of_seeds("full")
    for name, keys in METHODS.items():
        stem = "_".join(key.partition("=")[2] for key in keys)
        prune = [f"prune.{key}" for key in keys]
        own = of_seeds(stem, *prune)
        yield name, own
        yield f"{name}: random twin", of_seeds(f"{stem}_twin", *prune, "prune.twin=true")
        seen = statistics.fmean(result["images_seen"] / result["num_images"] for result in own)
        epochs = round(seen)
        yield (
            f"{name}: shorter full training",
            of_seeds(f"shorter{epochs}", f"train.epochs={epochs}"),
        )


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
    for name, keys in METHODS.items():
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
    parser.add_argument("--decisions", action="store_true", help="time decisions, train nothing")
    options = parser.parse_args()
    if options.decisions:
        print(decisions(1_281_167))
        return
    if options.config is None:
        parser.error("give a config, e.g. configs/digits.yaml, or --decisions")
    lines = [["", "images seen, % of a full training", "final top-1, %"]]
    full_images = 0.0
    for name, results in rows(
        options.config, options.out, options.seeds, options.overrides, options.jobs
    ):
        seen = [result["images_seen"] for result in results]
        full_images = full_images or statistics.fmean(seen)
        top1 = [result["final_top1"] for result in results]
        lines.append(
            [
                name,
                f"{100 * statistics.fmean(seen) / full_images:.1f}",
                plus_minus(*mean_std(top1)),
            ]
        )
        text = markdown_table(lines) + "\n"
        (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
