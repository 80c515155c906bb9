"""Accuracy against images seen: every method of `tdds train`, its random twin, and a full training
that is shorter by as much.

Runs what is missing, one after the other; finished runs are left as they are, so it may be stopped
and started again. The shorter training has the epochs whose images come closest to what the method
saw with the same seed, with the learning rate's schedule over those.

    python -m benchmarks.train_for_less configs/digits.yaml --out runs/train_for_less --seeds 5
"""

# T epochs

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdds_dist.runs.directory import RunDir
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


def rows(config: Path, out: Path, num_seeds: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the name of each row of the table, and a result per seed."""
    seeds = range(num_seeds)
    full = [trained(config, out / f"full_seed{seed}", seed) for seed in seeds]
    yield "full training", full
    for name, keys in METHODS.items():
        stem = "_".join(key.partition("=")[2] for key in keys)
        words = [f"prune.{key}" for key in keys]
        own = [trained(config, out / f"{stem}_seed{seed}", seed, *words) for seed in seeds]
        yield name, own
        yield (
            f"{name}: random twin",
            [
                trained(config, out / f"{stem}_twin_seed{seed}", seed, *words, "prune.twin=true")
                for seed in seeds
            ],
        )
        shorter = []
        for seed, result in zip(seeds, own, strict=True):
            epochs = round(result["images_seen"] / result["num_images"])
            folder = out / f"shorter{epochs}_seed{seed}"
            shorter.append(trained(config, folder, seed, f"train.epochs={epochs}"))
        yield f"{name}: shorter full training", shorter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    lines = [["", "images seen, % of a full training", "final top-1, %"]]
    full_images = 0.0
    for name, results in rows(options.config, options.out, options.seeds):
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
