"""What storing less than float32 log-probabilities of all classes does to loss differences, scores
and coresets.

One stream of outputs is recorded into several scorers side by side, which differ only in how they
keep the previous epoch: float32 (the reference), float16, and the K largest log-probabilities with
the remaining mass (`topk:K`). Streams:

* digits: training on scikit-learn's digits as configs/digits.yaml says, by the training loop of the
  package.
* imagenet: synthetic trajectories over 1,000 classes that look like training: from noise to
  confident, each sample in its own time, with confusable classes, augmentation noise between
  epochs, a share of hard samples and one of wrong labels.
* wide: the same over 21,841 classes, with few samples.

An error is that of one loss difference, over all samples and epochs: absolute (nats) and relative
to max(|value|, floor). For float16 the largest error of a `paper` loss difference is also given
over (entropy + loss difference) x 2^-11, which is what rounding to nearest can do at most (sum p'
|log p| 2^-11; 1e-6 added for float32 sums). Scores and kept sets are those of one window.

Rows are independent, so synthetic ones are made and scored in blocks; only Spearman and the kept
sets look at all of them.

    python -m benchmarks.precision --only imagenet --num-samples 1281167
"""

# B rows of a call, C classes, J confusable classes of a sample, M rows of a block, N samples, T
# epochs

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import files
from benchmarks.ranks import run_on_ranks
from benchmarks.recording import Stored
from tdds_dist.config.run import load_config
from tdds_dist.config.scores import DELTA_OF_PRESET, Window
from tdds_dist.coreset.agreement import centred_ranks, rank_correlation
from tdds_dist.coreset.samplers import num_kept, top
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import EpochOrder
from tdds_dist.errors import InputError
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring.scorer import ShardedScorer
from tdds_dist.scoring.tdds import score_trajectory
from tdds_dist.scoring.trajectory import Trajectory
from tdds_dist.training.build import open_files
from tdds_dist.training.engine import fit
from tdds_dist.training.training import Training

PARTS = ("digits", "imagenet", "wide")
REFERENCE = "float32"
RATES = (0.5, 0.9)  # pruning rates at which kept sets are compared
# nats; smaller loss differences do not move a score, their relative error means nothing
FLOOR = 1e-3
K = 10  # window
DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
BLOCK_BYTES = 1 << 25  # logits of a block of synthetic rows
BATCH = 256  # rows of a call

Scalars = dict[str, np.ndarray]  # by name, float32 [T, N]


class SideBySide:
    """An observer that shows everything to several scorers, each with a trajectory in a folder of
    its name."""

    def __init__(
        self,
        stored: Sequence[str],
        num_samples: int,
        num_classes: int,
        num_epochs: int,
        folder: Path,
    ):
        self.folders = {name: folder / name.replace("/", "-").replace(":", "") for name in stored}
        window = Window(num_epochs, min(K, num_epochs - 1))
        self.scorers = [
            ShardedScorer(
                num_samples,
                num_classes,
                [window],
                device="cpu",
                trajectory=self.folders[name],
                **Stored(name).options(),
            )
            for name in stored
        ]

    def expect(self, order: EpochOrder, first_step: int = 0) -> None:
        for scorer in self.scorers:
            scorer.expect(order, first_step)

    def record(self, index_B: Tensor, logits_BC: Tensor, label_B: Tensor) -> None:
        for scorer in self.scorers:
            scorer.record(index_B, logits_BC, label_B)

    def check(self) -> None:
        for scorer in self.scorers:
            scorer.check()

    def end_epoch(self) -> None:
        for scorer in self.scorers:
            scorer.end_epoch()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...

    def read(self) -> dict[str, Scalars]:
        """Return what each way of storing led to; of the reference also what describes the
        stream."""
        found: dict[str, Scalars] = {}
        for name, folder in self.folders.items():
            trajectory = Trajectory(folder)
            scalars = [
                *DELTA_OF_PRESET.values(),
                *(("p_label", "entropy", "correct") if name == REFERENCE else ()),
            ]
            found[name] = {scalar: trajectory.read(scalar) for scalar in scalars}
        return found


# ---- streams


def train_on_digits(
    folder: Path, stored: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """Train on `train.beton` and `val.beton` of a folder with all scorers watching; the part
    `digits`, in a process of its own."""
    with distributed.session("cpu") as world:
        config = load_config(
            DIGITS,
            [
                f"data.train={folder / 'train.beton'}",
                f"data.val={folder / 'val.beton'}",
                f"run.dir={folder / 'run'}",
                "run.device=cpu",
                *overrides,
            ],
        )
        run = RunDir(config.run.directory)
        run.path.mkdir()
        train_file, val_file, _ = open_files(config)
        epochs, num_classes = config.train.epochs, config.data.num_classes
        watching = SideBySide(stored, train_file.num_samples, num_classes, epochs, folder)
        fit(
            Training(
                config,
                world,
                run,
                train_file,
                val_file,
                epochs,
                config.train.global_batch_size,
                observer=watching,
            )
        )
        found = watching.read()
    return {"stream": describe(found, num_classes), "rows": compare_storage(found, num_classes)}


@dataclass(frozen=True)
class Synthetic:
    """Made-up training: what a network of `num_classes` classes says about `num_samples` samples
    over `num_epochs` epochs.

    A logit is what the network makes of this sample for no good reason (normal; it drifts from
    epoch to epoch, less and less) + the signal of what the image shows + noise of this epoch's
    augmentation. The signal of each sample rises in its own time; that of `hard` samples late, to
    less, and beside a few classes that look alike. Samples with a wrong label are first taken for
    what they are, and learnt by heart at the end, if at all.
    """

    num_samples: int
    num_classes: int
    num_epochs: int
    hard: float = 0.25
    wrong: float = 0.05
    seed: int = 0

    def epochs(self, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits [M, C], label [M]) of the rows first .. end - 1 in every epoch: a function of the
        seed and `first`."""
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, first]).generate_state(1)[0])
        )
        normal = partial(torch.randn, generator=generator)
        uniform = partial(torch.rand, generator=generator)
        rows, classes = end - first, self.num_classes
        label_M = torch.randint(classes, (rows,), generator=generator)
        kind_M = uniform(rows)
        is_hard_M, is_wrong_M = kind_M < self.hard, kind_M > 1.0 - self.wrong
        # what is in the image
        shown_M = torch.where(
            is_wrong_M, torch.randint(classes, (rows,), generator=generator), label_M
        )
        alike_MJ = torch.randint(classes, (rows, min(5, classes)), generator=generator)
        alike_gain_MJ = uniform(rows, alike_MJ.shape[1]) * torch.where(is_hard_M, 0.9, 0.5)[:, None]
        belief_MC = normal(rows, classes)
        # log C more signal is needed for the same confidence among more classes
        strength_M = np.log(classes) + torch.where(is_hard_M, 4.0, 8.0) + 1.5 * normal(rows)
        start_M = torch.where(is_hard_M, 0.6, 0.35) + 0.12 * normal(rows)
        by_heart_M = torch.where(is_wrong_M, 0.8 + 0.15 * normal(rows), torch.inf)
        for epoch in range(self.num_epochs):
            progress = (epoch + 0.5) / self.num_epochs
            stays = 0.5 + 0.48 * progress  # correlation of beliefs between epochs
            belief_MC.mul_(stays).add_(normal(rows, classes), alpha=(1.0 - stays**2) ** 0.5)
            gain_M = strength_M * torch.sigmoid((progress - start_M) / 0.12) + 0.8 * normal(rows)
            memory_M = strength_M * torch.sigmoid((progress - by_heart_M) / 0.06)
            logits_MC = belief_MC * (1.0 + progress)
            logits_MC.add_(normal(rows, classes), alpha=0.4)
            logits_MC.scatter_add_(1, alike_MJ, alike_gain_MJ * gain_M[:, None])
            logits_MC.scatter_add_(1, shown_M[:, None], gain_M[:, None])
            logits_MC.scatter_add_(1, label_M[:, None], memory_M[:, None])
            yield logits_MC, label_M

    def record(self, stored: Sequence[str]) -> dict[str, Scalars]:
        """Scalars of all rows by way of storing, block by block."""
        rows = max(1, BLOCK_BYTES // (4 * self.num_classes))
        blocks = []
        for first in range(0, self.num_samples, rows):
            end = min(first + rows, self.num_samples)
            with tempfile.TemporaryDirectory() as name:
                watching = SideBySide(
                    stored, end - first, self.num_classes, self.num_epochs, Path(name)
                )
                for logits_MC, label_M in self.epochs(first, end):
                    for index_B in torch.arange(end - first).split(BATCH):
                        part = slice(int(index_B[0]), int(index_B[-1]) + 1)
                        watching.record(index_B, logits_MC[part], label_M[part])
                    watching.end_epoch()
                blocks.append(watching.read())
        return {
            name: {
                scalar: np.concatenate([block[name][scalar] for block in blocks], axis=1)
                for scalar in blocks[0][name]
            }
            for name in stored
        }


# ---- what they show


def compare_storage(found: dict[str, Scalars], num_classes: int) -> list[dict[str, Any]]:
    """One row for each way of storing but the reference, and preset."""
    reference = found[REFERENCE]
    num_epochs, num_samples = reference["entropy"].shape
    rows = []
    for name, scalars in found.items():
        if name == REFERENCE:
            continue
        for preset, scalar in DELTA_OF_PRESET.items():
            right_TN, stored_TN = (
                reference[scalar][1:].astype(np.float64),
                scalars[scalar][1:].astype(np.float64),
            )
            error_TN = np.abs(stored_TN - right_TN)
            relative_TN = error_TN / np.maximum(np.abs(right_TN), FLOOR)
            window = Window(num_epochs, min(K, num_epochs - 1))
            right_N, score_N = (
                score_trajectory(delta_TN, window, preset)
                for delta_TN in (reference[scalar], scalars[scalar])
            )
            ranks = [
                centred_ranks(values_N, np.argsort(values_N)) for values_N in (right_N, score_N)
            ]
            sizes = {str(rate): num_kept(num_samples, rate) for rate in RATES}
            kept = {
                rate: len(np.intersect1d(top(right_N, num), top(score_N, num))) / num
                for rate, num in sizes.items()
            }
            row = {
                "stored": name,
                "preset": preset,
                "bytes_per_sample": Stored(name).row_bytes(num_classes),
                "max_relative": float(relative_TN.max()),
                "median_relative": float(np.median(relative_TN)),
                "p99_relative": float(np.quantile(relative_TN, 0.99)),
                "max_absolute": float(error_TN.max()),
                "median_absolute": float(np.median(error_TN)),
                "spearman": rank_correlation(*ranks),
                "overlap": kept,
            }
            if name == "float16" and preset == "paper":
                row["of_bound"] = float(
                    (error_TN / ((reference["entropy"][1:] + right_TN) * 2.0**-11 + 1e-6)).max()
                )
            rows.append(row)
    return rows


def describe(found: dict[str, Scalars], num_classes: int) -> dict[str, Any]:
    """Return what the stream looks like, epoch by epoch, over all samples."""
    reference = found[REFERENCE]
    num_epochs, num_samples = reference["entropy"].shape
    return {
        "num_samples": num_samples,
        "num_classes": num_classes,
        "num_epochs": num_epochs,
        "top1_percent": [100.0 * float(value) for value in reference["correct"].mean(axis=1)],
        "mean_p_label": [float(value) for value in reference["p_label"].mean(axis=1)],
        "mean_entropy": [float(value) for value in reference["entropy"].mean(axis=1)],
        "median_delta": {
            preset: float(np.median(reference[scalar][1:]))
            for preset, scalar in DELTA_OF_PRESET.items()
        },
    }


def run_digits(stored: Sequence[str], overrides: Sequence[str], threads: int) -> dict[str, Any]:
    """The part `digits`."""
    with tempfile.TemporaryDirectory() as name:
        for split in ("train", "val"):
            write_beton(
                open_source("digits", split, None), Path(name) / f"{split}.beton", progress=False
            )
        return run_on_ranks(1, train_on_digits, Path(name), stored, overrides, threads=threads)[0]


def record_synthetic(stream: Synthetic, stored: Sequence[str]) -> dict[str, Any]:
    """The parts `imagenet` and `wide`, in processes of their own."""
    found = stream.record(stored)
    return {
        "stream": describe(found, stream.num_classes),
        "rows": compare_storage(found, stream.num_classes),
    }


# ---- the program


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description="Errors of compact storage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="streams")
    parser.add_argument(
        "--digits-stored",
        nargs="+",
        default=["float16", "topk:5", "topk:3", "topk:1"],
        help="beside float32: float16, topk:K or topk:K/float16",
    )
    parser.add_argument(
        "--digits-override",
        nargs="+",
        default=["train.epochs=20", "score.windows=[{T: 20, K: 10}]"],
        metavar="KEY=VALUE",
        help="changes to configs/digits.yaml",
    )
    parser.add_argument(
        "--imagenet-stored", nargs="+", default=["float16", "topk:128", "topk:32", "topk:8"]
    )
    parser.add_argument("--num-samples", type=int, default=50_000, metavar="N", help="of imagenet")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="C", help="of imagenet")
    parser.add_argument(
        "--wide-stored", nargs="+", default=["float16", "topk:512", "topk:128", "topk:32"]
    )
    parser.add_argument("--wide-samples", type=int, default=1500, metavar="N")
    parser.add_argument("--wide-classes", type=int, default=21_841, metavar="C")
    parser.add_argument(
        "--epochs", type=int, default=12, metavar="T", help="of synthetic trajectories"
    )
    parser.add_argument("--seed", type=int, default=0, help="of synthetic trajectories")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of torch; training sets its own",
    )
    files.add_options(parser, "precision")
    return parser


def check(options: argparse.Namespace) -> None:
    """InputError for what shows nothing."""
    least = {
        "num_samples": 10,
        "num_classes": 2,
        "wide_samples": 10,
        "wide_classes": 2,
        "epochs": 4,
        "threads": 1,
        "seed": 0,
    }
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {bound}"
            )
    num_classes = {"digits": 10, "imagenet": options.num_classes, "wide": options.wide_classes}
    for part in options.only:
        names = getattr(options, f"{part}_stored")
        if REFERENCE in names or len(set(names)) < len(names):
            raise InputError(
                f"--{part}-stored {' '.join(names)} must name each way once, and not {REFERENCE},"
                " with which all are compared"
            )
        for stored in map(Stored, names):
            if stored.num_kept is not None and stored.num_kept >= num_classes[part]:
                raise InputError(
                    f"--{part}-stored {stored.name} keeps all of {num_classes[part]} classes;"
                    " lower K"
                )
    if "digits" in options.only:
        open_source("digits", "train", 1)
        if (epochs := load_config(DIGITS, options.digits_override).train.epochs) < 4:
            raise InputError(f"--digits-override: train.epochs={epochs} must be at least 4")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All streams, their metrics and provenance."""
    provenance = files.provenance(1, "cpu", options.threads)
    parts = {}
    for part in options.only:
        started = time.perf_counter()
        stored = [REFERENCE, *getattr(options, f"{part}_stored")]
        if part == "digits":
            parts[part] = run_digits(stored, options.digits_override, options.threads)
        else:
            sizes = (
                (options.num_samples, options.num_classes)
                if part == "imagenet"
                else (options.wide_samples, options.wide_classes)
            )
            stream = Synthetic(*sizes, options.epochs, seed=options.seed)
            parts[part] = run_on_ranks(
                1, record_synthetic, stream, stored, threads=options.threads
            )[0]
        print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "name")}
    return {
        "benchmark": "precision",
        "settings": settings | {"floor": FLOOR, "window_K": K},
        "repetitions": 1,
        "warm_up": "none: nothing is timed",
        "metrics": metrics_of(parts),
        "parts": parts,
        "provenance": provenance,
    }


def metrics_of(parts: dict[str, Any]) -> dict[str, Any]:
    """Return what `benchmarks.compare` reads; none depends on the machine but by rounding."""
    found: dict[str, Any] = {}
    for part, content in parts.items():
        sizes = f"{part} N={content['stream']['num_samples']} C={content['stream']['num_classes']}"
        for row in content["rows"]:
            name = f"{sizes} {row['stored']} {row['preset']}"
            for title, key, unit in (
                ("largest relative error", "max_relative", ""),
                ("median relative error", "median_relative", ""),
                ("largest absolute error", "max_absolute", "nats"),
            ):
                found[f"{name}: {title}"] = files.metric([row[key]], unit, "lower", relative=True)
            found[f"{name}: Spearman"] = files.metric(
                [row["spearman"]], "", "higher", relative=True
            )
            found |= {
                f"{name}: kept in common at {rate}": files.metric(
                    [share], "", "higher", relative=True
                )
                for rate, share in row["overlap"].items()
            }
        found |= {
            f"{sizes} {row['stored']}: bytes per sample": files.metric(
                [row["bytes_per_sample"]], "bytes", "lower", relative=True
            )
            for row in content["rows"]
        }
    return found


# ---- presentation


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    text = [
        "# Errors of compact storage",
        "",
        (
            "Against float32 log-probabilities of all classes, from the same outputs. Errors of"
            " one loss difference, over all samples and epochs; relative: to max(|value|,"
            f" {FLOOR:g} nats). Scores and kept sets of one window over all epochs, K = {K} (in"
            " fewer epochs one less than there are)."
        ),
    ]
    for part, content in result["parts"].items():
        stream, rows = content["stream"], content["rows"]
        top1, entropy = stream["top1_percent"], stream["mean_entropy"]
        text += [
            "",
            (
                f"## {part}: N = {stream['num_samples']:,}, C = {stream['num_classes']:,},"
                f" {stream['num_epochs']} epochs"
            ),
            "",
            _table(rows),
            "",
            (
                f"float32 takes {Stored(REFERENCE).row_bytes(stream['num_classes']):,} bytes per"
                " sample. From the first epoch to the last, top-1 of the samples goes from"
                f" {top1[0]:.1f} to {top1[-1]:.1f} %, their mean entropy from {entropy[0]:.2f} to"
                f" {entropy[-1]:.2f} nats; median loss difference"
                f" {stream['median_delta']['paper']:.3g} (paper),"
                f" {stream['median_delta']['official']:.3g} (official)."
            ),
            "",
            *_meaning(rows),
        ]
    text += [
        "",
        "`python -m benchmarks.precision`; its docstring says how the streams are made.",
        "",
        files.provenance_line(result),
        "",
    ]
    return "\n".join(text)


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            "stored as, preset",
            "bytes/sample",
            "largest rel.",
            "99 %",
            "median rel.",
            "largest abs.",
            "Spearman",
            *(f"kept in common, p = {rate}" for rate in RATES),
        ]
    ]
    cells += [
        [
            f"{row['stored']}, {row['preset']}",
            f"{row['bytes_per_sample']:,}",
            f"{row['max_relative']:.2g}",
            f"{row['p99_relative']:.2g}",
            f"{row['median_relative']:.2g}",
            f"{row['max_absolute']:.2g}",
            f"{row['spearman']:.6f}",
            *(f"{share:.2%}" for share in row["overlap"].values()),
        ]
        for row in rows
    ]
    return files.table(cells)


def _meaning(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the table says, in words."""
    said = []
    for name in dict.fromkeys(row["stored"] for row in rows):
        both = [row for row in rows if row["stored"] == name]
        common = [min(row["overlap"][str(rate)] for row in both) for rate in RATES]
        bound = "".join(
            f"; it reaches {row['of_bound']:.0%} of what rounding can do at most"
            for row in both
            if "of_bound" in row
        )
        stay = " and ".join(
            f"{share:.2%} stay at a pruning rate of {rate}"
            for rate, share in zip(RATES, common, strict=True)
        )
        said.append(
            f"* {name} changes a loss difference by {max(row['max_absolute'] for row in both):.2g}"
            f" nats at most and by {max(row['median_relative'] for row in both):.2%} in the"
            f" median{bound}. Of a coreset, {stay} (the worse of the two presets)."
        )
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, compare, print the page, write both result files; returns the exit code."""
    return files.run("precision", build_parser().parse_args(arguments), check, measure, as_markdown)


if __name__ == "__main__":
    sys.exit(main())
