"""Do the scores choose well where the data are no images? Tables, series and mails, each with a
small network: TDDS and its rivals, a random choice, and a shorter training on everything.

One training on all samples records every score, in a plain loop. A coreset is trained on for as
many epochs (Strategy-E) from other initial weights; the loss of a batch is multiplied with its mean
importance, which is 1 for all but TDDS. "shorter" trains on all samples for as many steps. All
settings are the same for all methods and were fixed before the first coreset was trained on: AdamW
with one cycle of the learning rate; T two thirds of the epochs; K, and the epochs that EL2N,
Dyn-Unc and DUAL look at, 10.

Runs what is missing; a finished cell is left as it is, so it may be stopped and started again.

    scripts/fetch_beyond_images.sh data/beyond_images
    python -m benchmarks.beyond_images --jobs 2
"""

# N samples, M kept samples, B rows of a batch, C classes

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import files
from benchmarks.small_sets import SETS, Split, load
from tdds_dist import Coreset, ShardedScorer, Window, load_scores, make_coreset, score_all
from tdds_dist.config.grid import BUILT_IN_METHODS
from tdds_dist.coreset.select import random_scores
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import write_atomically

SCORES = ("tdds", "el2n", "forgetting", "aum", "dyn_unc", "dual", "csl")
METHODS = (*SCORES, "ccs", "dual_beta", "random", "shorter")
RATES = (0.5, 0.8)
CELLS = ("all", *(f"{method}_p{rate:g}" for rate in RATES for method in METHODS))
LEAST_EPOCHS = 5


def train(
    data: Split,
    index_M: Tensor,
    weight_M: Tensor,
    num_steps: int,
    seed: int,
    scorer: ShardedScorer | None = None,
) -> float:
    """Train on these samples; return top-1 (%) on the test part."""
    torch.manual_seed(seed)
    network = data.network()
    optimizer = torch.optim.AdamW(network.parameters(), data.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, data.lr, total_steps=num_steps)
    step = 0
    while step < num_steps:
        for row_B in torch.randperm(len(index_M)).split(data.batch)[: num_steps - step]:
            index_B = index_M[row_B]
            logits_BC = network(data.x[index_B])
            if scorer is not None:
                scorer.record(index_B, logits_BC.detach(), data.y[index_B])
            loss = cross_entropy(logits_BC, data.y[index_B]) * weight_M[row_B].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        if scorer is not None:
            scorer.end_epoch()
    network.eval()
    with torch.inference_mode():
        right = torch.cat([network(x).argmax(1) for x in data.test_x.split(256)]) == data.test_y
    return 100 * right.float().mean().item()


def run_seed(folder: Path, archives: Path, name: str, seed: int, epochs: int) -> None:
    """Train what is missing of one set and one seed, each cell into a file of its own."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    data, commit = load(name, archives, seed), files.provenance()["commit"]
    all_N, one_N = torch.arange(len(data.y)), torch.ones(len(data.y))

    def cell(stem: str, *how: Any) -> None:
        started = time.perf_counter()
        found = {"top1": train(data, *how), "samples": len(how[0]), "steps": how[2]}
        found |= {"seconds": time.perf_counter() - started, "commit": commit}
        text = json.dumps(found | {"num_train": len(data.y), "num_test": len(data.test_y)})
        write_atomically(folder / f"{stem}.json", lambda file: file.write(text.encode()))

    if not (folder / "scores.json").is_file():
        looked_at = min(10, epochs)
        options = [f"el2n_epochs={looked_at}", f"uncertainty_window={looked_at}"]
        num_classes, steps = int(data.y.max()) + 1, epochs * math.ceil(len(data.y) / data.batch)
        with tempfile.TemporaryDirectory() as trajectory:
            scorer = ShardedScorer(
                len(data.y), num_classes, [window_of(epochs)], device="cpu", trajectory=trajectory
            )
            cell("all", all_N, one_N, steps, seed, scorer)
            paths, _ = score_all(Path(trajectory), SCORES, options=options, out=folder)
        names = json.dumps([path.name for path in paths])
        write_atomically(folder / "scores.json", lambda file: file.write(names.encode()))
    names = json.loads((folder / "scores.json").read_text())
    scores = {key: load_scores(folder / name) for key, name in zip(SCORES, names, strict=True)}

    def coreset(method: str, rate: float) -> Coreset:
        rule = BUILT_IN_METHODS[method]
        by = random_scores(scores["tdds"], seed) if method == "random" else scores[rule.score_key]
        return make_coreset(by, rate, sampler=rule.sampler, seed=seed)[0]

    for rate in RATES:
        for method in METHODS:
            if (folder / f"{method}_p{rate:g}.json").is_file():
                continue
            kept = coreset("random" if method == "shorter" else method, rate)
            how = torch.from_numpy(kept.index_M), torch.from_numpy(kept.importance_M)
            steps = epochs * math.ceil(len(kept.index_M) / data.batch)
            how = (all_N, one_N) if method == "shorter" else how
            cell(f"{method}_p{rate:g}", *how, steps, 1000 + seed)


def window_of(epochs: int) -> Window:
    T = round(epochs * 2 / 3)
    return Window(T=T, K=min(10, T), beta=0.9)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, with metrics and provenance; the longest trainings first."""
    where, epochs, seeds = files.provenance(threads=1), options.epochs, range(options.seeds)
    folders = {
        name: [options.work / f"{name}_epochs{epochs}_seed{seed}" for seed in seeds]
        for name in reversed(SETS)
        if name in options.sets
    }
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [
            pool.submit(run_seed, folders[name][seed], options.data, name, seed, epochs)
            for name in folders
            for seed in seeds
        ]
        for each in waiting:
            each.result()
    cells = {
        f"{name} {stem}": [
            json.loads((folder / f"{stem}.json").read_text()) for folder in folders[name]
        ]
        for name in options.sets
        for stem in CELLS
    }
    runs = [run for of_seeds in cells.values() for run in of_seeds]
    top1 = {name: [run["top1"] for run in of_seeds] for name, of_seeds in cells.items()}
    settings = {"sets": options.sets, "epochs": epochs, "window": str(window_of(epochs))}
    return {
        "benchmark": "beyond_images",
        "settings": settings,
        "repetitions": options.seeds,
        "warm_up": "none: nothing is timed",
        "metrics": {
            name: files.metric(values, "%", "higher", relative=True)
            for name, values in top1.items()
        },
        "top1_of_seeds": top1,
        "samples": {name: cells[f"{name} all"][0]["num_train"] for name in options.sets},
        "test_samples": {name: cells[f"{name} all"][0]["num_test"] for name in options.sets},
        "num_trainings": len(runs),
        "training_seconds": sum(run["seconds"] for run in runs),
        "commits": sorted({run["commit"] for run in runs}),
        "provenance": where,
    }


def against(mine: Sequence[float], other: Sequence[float]) -> int:
    """Return 1 where the mean difference, seed by seed, is above its standard error, -1 where it is
    as far below zero, else 0. Where one seed alone differs, both are the same number."""
    differences = [a - b for a, b in zip(mine, other, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return 0 if abs(mean) <= 1.001 * error else 1 if mean > 0 else -1  # but for rounding


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    names, top1 = result["settings"]["sets"], result["top1_of_seeds"]

    def row(stem: str) -> list[str]:
        values = [top1[f"{name} {stem}"] for name in names]
        return [f"{statistics.fmean(each):.2f} ± {statistics.stdev(each):.2f}" for each in values]

    def count(method: str, other: str, rate: float) -> str:
        signs = [
            against(*(top1[f"{name} {each}_p{rate:g}"] for each in (method, other)))
            for name in names
        ]
        return "" if method == other else f"{signs.count(1)} / {signs.count(-1)}"

    rows = [["removed", "method", *names, "random", "shorter"]]
    rows += [["0 %", "all", *row("all"), "", ""]]
    rows += [
        [f"{100 * rate:g} %", method, *row(f"{method}_p{rate:g}")]
        + [count(method, other, rate) for other in ("random", "shorter")]
        for rate in RATES
        for method in METHODS
    ]
    samples, test = result["samples"], result["test_samples"]
    lines = [
        "# Scores beyond images",
        "",
        f"Top-1 (%) on the test part, mean ± standard deviation of {result['repetitions']} seeds;"
        f" {result['settings']['epochs']} epochs, {result['settings']['window']}. The last two"
        " columns: in how many sets the method is above / below the random choice, and the shorter"
        " training on all samples, by more than one standard error of the difference seed by seed.",
        "",
        files.table(rows),
        "",
        "Samples for training / test: "
        + ", ".join(f"{name} {samples[name]:,} / {test[name]:,}" for name in names)
        + f". {result['num_trainings']} trainings, {result['training_seconds'] / 60:.0f} minutes"
        f" of a core, at commit {', '.join(result['commits'])}.",
        "",
        "`python -m benchmarks.beyond_images`; its docstring says how.",
        "",
        files.provenance_line(result),
    ]
    return "\n".join(lines) + "\n"


def check(options: argparse.Namespace) -> None:
    if options.epochs < LEAST_EPOCHS or options.seeds < 2:
        raise InputError(
            f"--epochs {options.epochs} must be at least {LEAST_EPOCHS}, and --seeds"
            f" {options.seeds} at least 2: a window needs two differences, a deviation two seeds"
        )
    for name in options.sets:
        load(name, options.data, seed=0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beyond_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files.add_options(parser, "beyond_images")
    parser.set_defaults(out=files.RESULTS / "beyond_images")
    parser.add_argument("--data", type=Path, default=Path("data/beyond_images"), metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/beyond_images"), metavar="DIR")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    return files.run("beyond_images", parser.parse_args(arguments), check, measure, as_markdown)


if __name__ == "__main__":
    raise SystemExit(main())
