"""Wrong labels, found by one training that was done anyway, and by confident learning on five.

On images with labels changed on purpose: AUROC, and precision among as many as were changed, of
every recorded score, of combinations, of AUM with threshold samples as its paper has it (two
trainings), and of cleanlab on 5-fold out-of-sample probabilities (five trainings). Cells are saved
one by one, so it may be stopped and started again.

cleanlab is in .venv/loops, which tests/system/loops/install.sh makes.

    .venv/loops/bin/python -m benchmarks.wrong_labels
    .venv/loops/bin/python -m benchmarks.wrong_labels --sets digits --seeds 3
"""

# N samples, C classes, B rows of a batch, H height and width, T epochs

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import files
from tdds_dist import ShardedScorer, Trajectory, Window
from tdds_dist.coreset.suspects import THRESHOLD_PERCENTILE, ranks
from tdds_dist.data.sources import open_source
from tdds_dist.runs.artifacts import write_atomically
from tdds_dist.scoring import baselines

RATES = (0.05, 0.1, 0.2, 0.4)
KINDS = ("uniform", "class-dependent")
FOLDS = 5
BATCH = 64
MEAN_RANKS = {
    "aum + csl": ("aum", "csl"),
    "aum + learning time": ("aum", "learning_time"),
    "csl + learning time": ("csl", "learning_time"),
    "aum + csl + learning time": ("aum", "csl", "learning_time"),
}


@dataclass(frozen=True)
class Images:
    """A small real dataset."""

    spec: str
    subset: int | None
    side: int
    epochs: int
    learning_rate: float = 0.05


SETS = {
    "digits": Images("digits", None, 8, 30),
    "fashion_mnist": Images("idx:/usr/share/datasets/fashion-mnist", 3_000, 28, 15),
}


def read(images: Images) -> tuple[Tensor, np.ndarray]:
    """Return greys, float32 [N, 1, H, H] of mean 0 and deviation 1, and labels, int64 [N]."""
    source = open_source(images.spec, "train", images.subset)
    grey = np.stack([source.read(index)[:, :, 0] for index in range(len(source))])
    image_N1HH = torch.from_numpy(grey).float()[:, None]
    image_N1HH = F.adaptive_avg_pool2d(image_N1HH, images.side)
    return (image_N1HH - image_N1HH.mean()) / image_N1HH.std(), source.label_N


def with_noise(label_N: np.ndarray, kind: str, rate: float, seed: int) -> np.ndarray:
    """Change round(rate N) labels: to any other class, or each class to the one after it."""
    rng, num_classes = np.random.default_rng([7, seed]), int(label_N.max()) + 1
    changed = rng.permutation(len(label_N))[: round(rate * len(label_N))]
    shift = rng.integers(1, num_classes, len(changed)) if kind == "uniform" else 1
    noisy_N = label_N.copy()
    noisy_N[changed] = (noisy_N[changed] + shift) % num_classes
    return noisy_N


def network(num_classes: int) -> nn.Module:
    """Make a small convolutional network."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(1, 16), *block(16, 32), *block(32, 64)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def train(
    image_N1HH: Tensor,
    label_N: np.ndarray,
    num_classes: int,
    images: Images,
    seed: int,
    see: Callable[[int, Tensor, Tensor, Tensor], None] = lambda *_: None,
    end_epoch: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, float]:
    """Train with random shifts by up to a tenth; `see(epoch, index, logits, label)` is called for
    each batch. Return the network and the seconds of CPU time."""
    torch.manual_seed(seed)
    model, label = network(num_classes), torch.from_numpy(label_N)
    steps = images.epochs * -(-len(label) // BATCH)
    optimizer = torch.optim.SGD(
        model.parameters(), images.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    reach, started = max(1, images.side // 10), time.process_time()
    for epoch in range(images.epochs):
        for index_B in torch.randperm(len(label)).split(BATCH):
            dx, dy = torch.randint(-reach, reach + 1, (2,)).tolist()
            logits_BC = model(image_N1HH[index_B].roll((dx, dy), (2, 3)))
            see(epoch, index_B, logits_BC.detach(), label[index_B])
            optimizer.zero_grad()
            F.cross_entropy(logits_BC, label[index_B]).backward()
            optimizer.step()
            schedule.step()
        end_epoch()
    return model, time.process_time() - started


def record(
    image_N1HH: Tensor, label_N: np.ndarray, num_classes: int, images: Images, seed: int
) -> tuple[dict[str, np.ndarray], float]:
    """Train with a scorer beside; return the recorded scalars, float32 [T, N] each, and the
    seconds."""
    with tempfile.TemporaryDirectory() as folder:
        window = Window(images.epochs, min(10, images.epochs // 2), 0.9)
        scorer = ShardedScorer(
            len(label_N), num_classes, [window], device="cpu", trajectory=f"{folder}/trajectory"
        )
        _, seconds = train(
            image_N1HH,
            label_N,
            num_classes,
            images,
            seed,
            lambda _, index_B, logits_BC, label_B: scorer.record(index_B, logits_BC, label_B),
            scorer.end_epoch,
        )
        recorded = Trajectory(f"{folder}/trajectory")
        keys = ("logit_margin", "p_label", "correct", "el2n", "p_margin")
        found = {key: recorded.read(key) for key in keys}
        return found | {"tdds": scorer.gather()[window].numpy()}, seconds


def recorded_scores(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what is higher the likelier a label is wrong, by score; float [N] each."""
    scores = {
        "aum": baselines.aum(of["logit_margin"]),
        "aum of probabilities": baselines.aum(of["p_margin"]),
        "csl": baselines.csl(of["p_label"]),
        "learning_time": baselines.learning_time(of["correct"]),
        "correctness": baselines.correctness(of["correct"]),
        "confidence": baselines.confidence(of["p_label"]),
        "el2n": baselines.el2n(of["el2n"], len(of["el2n"])),
        "forgetting": baselines.forgetting(of["correct"]),
        "dual": baselines.dual(of["p_label"]),
        "tdds": of["tdds"],
    }
    means = {
        name: np.mean([ranks(scores[key]) for key in keys], axis=0)
        for name, keys in MEAN_RANKS.items()
    }
    return scores | means


def by_threshold_samples(
    image_N1HH: Tensor, label_N: np.ndarray, num_classes: int, images: Images, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """AUM as in its paper: N / (C + 1) samples get a class of their own, and what lies below the
    99th percentile of their margins is called wrong; a second training with others of them looks
    at the first ones. Return minus the AUM [N], what is called wrong, bool [N], the seconds."""
    order = np.random.default_rng([8, seed]).permutation(len(label_N))
    num = len(label_N) // (num_classes + 1)
    aum_N, wrong_N, total = np.zeros(len(label_N)), np.zeros(len(label_N), dtype=bool), 0.0
    for part, threshold in enumerate((order[:num], order[num : 2 * num])):
        changed_N = label_N.copy()
        changed_N[threshold] = num_classes
        found, seconds = record(image_N1HH, changed_N, num_classes + 1, images, seed + 100 * part)
        margin_N = -baselines.aum(found["logit_margin"])
        cut = np.percentile(margin_N[threshold], THRESHOLD_PERCENTILE)
        mine = np.setdiff1d(order, threshold) if part == 0 else order[:num]
        aum_N[mine], wrong_N[mine] = margin_N[mine] - cut, margin_N[mine] < cut
        total += seconds
    return -aum_N, wrong_N, total


def out_of_sample(
    image_N1HH: Tensor, label_N: np.ndarray, num_classes: int, images: Images, seed: int
) -> tuple[np.ndarray, float]:
    """Return the probabilities of each sample by a network that did not train on it, [N, C], and
    the seconds of the five trainings."""
    from sklearn.model_selection import StratifiedKFold

    p_NC, total = np.zeros((len(label_N), num_classes)), 0.0
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for fold, (own, held) in enumerate(folds.split(label_N, label_N)):
        model, seconds = train(image_N1HH[own], label_N[own], num_classes, images, seed + 10 * fold)
        with torch.no_grad():
            p_NC[held] = model.eval()(image_N1HH[held]).softmax(dim=1).numpy()
        total += seconds
    return p_NC, total


def measure(name: str, kind: str, rate: float, seed: int) -> dict[str, Any]:
    """Return AUROC and precision at the true number of each method, precision and recall of what
    is called wrong, and the CPU seconds of trainings."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.metrics import roc_auc_score

    images = SETS[name]
    image_N1HH, true_N = read(images)
    num_classes = int(true_N.max()) + 1
    label_N = with_noise(true_N, kind, rate, seed)
    is_wrong_N = label_N != true_N
    found, recorded_seconds = record(image_N1HH, label_N, num_classes, images, seed)
    scores = recorded_scores(found)
    below_N, called_N, threshold_seconds = by_threshold_samples(
        image_N1HH, label_N, num_classes, images, seed
    )
    p_NC, fold_seconds = out_of_sample(image_N1HH, label_N, num_classes, images, seed)
    scores["aum, threshold samples"] = below_N
    for method in ("self_confidence", "normalized_margin"):
        quality_N = get_label_quality_scores(label_N, p_NC, method=method)
        scores[f"cleanlab, {method.replace('_', ' ')}"] = -quality_N
    issues_N = find_label_issues(label_N, p_NC, n_jobs=1)

    def ranked(score_N: np.ndarray) -> list[float]:
        first = np.argsort(-score_N, kind="stable")[: is_wrong_N.sum()]
        return [roc_auc_score(is_wrong_N, score_N), is_wrong_N[first].mean()]

    def called(set_N: np.ndarray) -> list[float]:
        both = (set_N & is_wrong_N).sum()
        return [both / max(1, set_N.sum()), both / is_wrong_N.sum()]

    return {
        "set": name,
        "noise": kind,
        "rate": rate,
        "seed": seed,
        "ranked": {key: ranked(score_N) for key, score_N in scores.items()},
        "called": {"aum, threshold samples": called(called_N), "cleanlab": called(issues_N)},
        "seconds": {
            "recorded": recorded_seconds,
            "aum, threshold samples": threshold_seconds,
            "cleanlab": fold_seconds,
        },
    }


def page(cells: list[dict[str, Any]]) -> str:
    """Write AUROC / precision per set, kind and rate (mean over seeds), and the costs."""
    text = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = [cell for cell in cells if cell["set"] == name]
        columns = [(kind, rate) for kind in KINDS for rate in RATES]
        seeds = len({cell["seed"] for cell in own})
        text.append(f"## {name}, {seeds} seed{'s' * (seeds > 1)}\n")
        text.append("AUROC / precision among as many as are wrong (%).\n")
        rows = [["", *(f"{kind} {rate:.0%}" for kind, rate in columns), "mean"]]
        for method in own[0]["ranked"]:
            values = defaultdict[tuple[str, float], list[list[float]]](list)
            for cell in own:
                values[cell["noise"], cell["rate"]].append(cell["ranked"][method])
            means = [np.mean(values[column], axis=0) for column in columns if values[column]]
            shown = [_cell(np.mean(values[c], axis=0)) if values[c] else "" for c in columns]
            rows.append([method, *shown, _cell(np.mean(means, axis=0))])
        text.append(files.table(rows) + "\n")
        text.append("Called wrong by themselves: precision / recall (%).\n")
        rows = [["", *(f"{kind} {rate:.0%}" for kind, rate in columns)]]
        for method in own[0]["called"]:
            line = [method]
            for column in columns:
                of_cell = [
                    cell["called"][method]
                    for cell in own
                    if (cell["noise"], cell["rate"]) == column
                ]
                line.append(
                    "/".join(f"{100 * v:.0f}" for v in np.mean(of_cell, axis=0)) if of_cell else ""
                )
            rows.append(line)
        text.append(files.table(rows) + "\n")
        cost = {
            key: statistics.fmean(cell["seconds"][key] for cell in own) for key in own[0]["seconds"]
        }
        said = ", ".join(
            f"{key} {value:.0f} s ({value / cost['recorded']:.1f} x)" for key, value in cost.items()
        )
        text.append(f"CPU time of the trainings, mean over cells: {said}.\n")
    return "\n".join(text)


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _cell(values: np.ndarray) -> str:
    return f"{values[0]:.3f}/{100 * values[1]:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/wrong_labels"))
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed, name, kind, rate in itertools.product(
        range(options.seeds), options.sets, KINDS, options.rates
    ):
        path = options.out / f"{name}_{kind}_{rate:g}_seed{seed}.json"
        if not path.is_file():
            cell = measure(name, kind, rate, seed) | {"provenance": files.provenance(threads=1)}
            numbers = json.dumps(cell).encode() + b"\n"
            write_atomically(path, partial(_write, numbers))
            print(f"{path.name}: {_cell(np.array(cell['ranked']['aum']))}", flush=True)
    cells = [json.loads(path.read_text()) for path in sorted(options.out.glob("*_seed*.json"))]
    line = files.provenance_line({"provenance": cells[0]["provenance"]})
    (options.out / "table.md").write_text(f"# Wrong labels\n\n{page(cells)}\n{line}\n")
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
