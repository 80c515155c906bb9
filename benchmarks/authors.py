"""The authors' code and this package on the same images: do scores and accuracies differ by more
than those of two seeds do?

    python -m benchmarks.authors CHECKOUT --no-flip      # scikit-learn's digits on the CPU, 3 seeds
    python -m benchmarks.authors CHECKOUT --data cifar10:DIR --network resnet18 --cifar-stem \\
        --epochs 200 --batch 128 --lr 0.1

CHECKOUT holds github.com/zhangxin-xd/Dataset-Pruning-TDDS. Its train.py, importance_evaluation.py
and train_subset.py run as they are, in processes of their own, in which this module replaces: the
class `torchvision.datasets.CIFAR10` (and CIFAR100) by one that reads the images at hand; the number
50000 in their sources by the number of training images (they take the iterations of the schedule
from it); their `models.resnet` by the network that ours trains; and, without a GPU, the question
whether there is one by True, and `.cuda()` by nothing, so that they run on the CPU. No file of
theirs is changed or copied.

Both sides: one process, the authors' augmentation (flip, unless `--no-flip` makes that nothing for
both, since a mirrored 2 is no 2; crop with padding 4) and normalisation, SGD with Nesterov momentum
0.9 and weight decay 5e-4, cosine per step without warm-up, the same batch on the coreset (no batch
rule), importance: mean of the batch. Each seed scores and retrains by its own scores. The work
folder keeps what is finished; the same command goes on.
"""

# N samples

import argparse
import ast
import itertools
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from benchmarks import files
from tdds_dist.coreset.agreement import centred_ranks, rank_correlation
from tdds_dist.data.beton import inspect_beton, read_images
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import load_scores
from tdds_dist.text import mean_std, plus_minus
from tdds_dist.training.build import build_model

SCRIPTS = ("train.py", "importance_evaluation.py", "train_subset.py")
NEEDED = (*SCRIPTS, "data.py", "data_subset.py", "utils.py")
REPOSITORY = "https://github.com/zhangxin-xd/Dataset-Pruning-TDDS"
CONFIGS = Path(__file__).parents[1] / "configs"
DATASETS = {10: "cifar10", 100: "cifar100"}  # of theirs and of our configs, by number of classes
# what a work folder is of; seeds and rates may be added
SETTINGS = ("data", "no_flip", "network", "cifar_stem", "epochs", "batch", "lr", "window")
NUM_IMAGES = 50_000  # that their sources name
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIDE = 32  # pixels; their random crop
SIDES = ("theirs", "ours")


# ---- in a process of theirs


def run_script(options: argparse.Namespace) -> None:
    """Run the script `options.run` of theirs with `sys.argv` as its arguments."""
    images, network = options.work / "images", options.network
    num_images = len(np.load(images / "train_label.npy"))
    torchvision.datasets.CIFAR10 = torchvision.datasets.CIFAR100 = _images_in(images)
    models = types.ModuleType("models")
    models.resnet = types.SimpleNamespace(  # type: ignore[attr-defined]
        **{
            network: lambda num_class: build_model(
                network, num_class, cifar_stem=options.cifar_stem, channels_last=False
            )
        }
    )
    sys.modules["models"] = models
    if options.no_flip:
        torchvision.transforms.RandomHorizontalFlip = lambda: lambda image: image
    if not torch.cuda.is_available():
        for owner in (torch.Tensor, torch.nn.Module):
            owner.cuda = lambda itself: itself  # type: ignore[method-assign, assignment]
    sys.path.insert(0, str(options.checkout))
    tree = ast.parse((options.checkout / options.run).read_text(), options.run)
    tree = ast.fix_missing_locations(_OnTheseImages(num_images).visit(tree))
    exec(compile(tree, options.run, "exec"), {"__name__": "__main__"})


class _OnTheseImages(ast.NodeTransformer):
    """Put the number of images in place of theirs, and True for "is there a GPU" (without one their
    loop does not look at its batch)."""

    def __init__(self, num_images: int):
        self.num_images = num_images

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        """Replace the number."""
        return ast.Constant(self.num_images) if node.value == NUM_IMAGES else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace the call."""
        if ast.unparse(node) == "torch.cuda.is_available()":
            return ast.Constant(True)
        return self.generic_visit(node)


def _images_in(folder: Path) -> type:
    """Return a class in place of torchvision's CIFAR10."""

    class Images(torchvision.datasets.CIFAR10):
        def __init__(self, root: str, train: bool, transform: Any, download: bool):
            torchvision.datasets.VisionDataset.__init__(self, root, transform=transform)
            split = "train" if train else "val"
            self.data = np.load(folder / f"{split}_image.npy")
            self.targets = np.load(folder / f"{split}_label.npy").tolist()

    return Images


# ---- the two sides


def images(options: argparse.Namespace) -> Path:
    """Write the images as `.beton` files and as arrays, once; return their folder."""
    folder = options.work / "images"
    for split in ("train", "val"):
        beton = folder / f"{split}.beton"
        if not beton.is_file():
            tdds("write", options.data, beton, "--split", split, "--write-mode", "raw")
        label_N = inspect_beton(beton).label_N
        image_N = np.stack(read_images(beton, range(len(label_N))))
        if image_N.shape[1:] != (SIDE, SIDE, 3):
            raise InputError(
                f"images of {options.data} are {image_N.shape[1:]}; their code needs"
                f" ({SIDE}, {SIDE}, 3)"
            )
        np.save(folder / f"{split}_image.npy", image_N)
        np.save(folder / f"{split}_label.npy", label_N)
    return folder


def theirs(options: argparse.Namespace, seed: int, dataset: str) -> dict[str, Any]:
    """Collect, score and retrain with their code; return scores float [N] and top-1, percent."""
    folder = options.work / "theirs" / f"seed{seed}"
    masks = f"{folder}/generated_mask/"
    shared = (
        f"--data_path . --dataset {dataset} --arch {options.network} --epochs {options.epochs}"
        f" --batch-size {options.batch} --learning_rate {options.lr} --workers 0"
        f" --manualSeed {seed}"
    ).split()

    def script(name: str, *words: object) -> None:
        call(
            [
                *("benchmarks.authors", options.checkout, "--run", name, "--work", options.work),
                *("--network", options.network, *["--cifar-stem"] * options.cifar_stem),
                *["--no-flip"] * options.no_flip,
                *("--", *words),
            ]
        )

    def top1(script_name: str, place: Path, *words: object) -> float:
        if not (place / "done").exists():
            script(script_name, *shared, "--save_path", place, *words)
            (place / "done").touch()
        text = (place / f"log_seed_{seed}.txt").read_text()
        return float(re.findall(r"\*\*Test\*\* Prec@1 ([\d.]+)", text)[-1])

    found = {"full": top1("train.py", folder, "--dynamics")}
    name = f"win{options.window}_ep{options.epochs}.npy"
    if not Path(f"{masks}score_{name}").exists():
        script(
            *("importance_evaluation.py", "--dynamics_path", f"{folder}/npy/"),
            *("--mask_path", masks, "--trajectory_len", options.epochs),
            *("--window_size", options.window, "--decay", 0.9),
        )
    pair = [f"{masks}{kind}_{name}" for kind in ("data_mask", "score")]
    for rate in options.rates:
        found[f"{rate:g}"] = top1(
            *("train_subset.py", folder / f"p{rate:g}", "--subset_rate", rate),
            *("--mask_path", pair[0], "--score_path", pair[1]),
        )
    order_N, sorted_N = (np.load(path) for path in pair)
    score_N = np.empty_like(sorted_N)
    score_N[order_N] = sorted_N
    return {"score": score_N, "top1": found}


def ours(options: argparse.Namespace, seed: int, dataset: str) -> dict[str, Any]:
    """Collect, score and retrain with this package; as `theirs`."""
    folder = options.work / "ours" / f"seed{seed}"
    window = f"{{T: {options.epochs}, K: {options.window}, pruning_rates: {options.rates}}}"
    config = [
        CONFIGS / f"{dataset}_resnet18.yaml",
        *(f"data.{split}={options.work}/images/{split}.beton" for split in ("train", "val")),
        *(f"run.dir={folder}", f"run.seed={seed}", f"model.name={options.network}"),
        *(f"model.cifar_stem={str(options.cifar_stem).lower()}", f"train.epochs={options.epochs}"),
        f"data.flip={str(not options.no_flip).lower()}",
        *(f"train.global_batch_size={options.batch}", f"train.lr={options.lr}"),
        *(f"score.windows=[{window}]", "score.final_pass=false", "retrain.batch_size_rule={}"),
    ]
    if not (folder / "result.json").exists():
        tdds("collect", *config)
    found = {"full": _top1(folder)}
    for rate in options.rates:
        coreset, name = folder / "coresets" / f"p{rate:g}.npz", f"p{rate:g}"
        if not coreset.exists():
            tdds("select", folder, "--pruning-rate", rate, "--out", coreset)
        if not (folder / "retrain" / name / "result.json").exists():
            tdds("retrain", *config, "--coreset", coreset, "--strategy", "E", "--name", name)
        found[f"{rate:g}"] = _top1(folder / "retrain" / name)
    (file,) = (folder / "scores").glob("tdds_*.npz")
    return {"score": load_scores(file).score_N, "top1": found}


def _top1(run: Path) -> float:
    return float(json.loads((run / "result.json").read_text())["final_top1"])


def tdds(*words: object) -> None:
    """Run a command of this package."""
    call(["tdds_dist", *words])


def call(words: Sequence[object]) -> None:
    """Run a module in a process of its own; raise InputError with its last lines where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore"},
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        last = " | ".join(done.stdout.strip().splitlines()[-3:])
        raise InputError(f"{words[0]} ended with {done.returncode}: {last}")


# ---- what they give


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Compare the seeds of two sides, each `score` float [N] and `top1` by name: Spearman of all
    pairs within and across, score quantiles and top-1 by seed."""
    rank = {
        side: [centred_ranks(run["score"], np.argsort(run["score"])) for run in runs]
        for side, runs in found.items()
    }
    pairs: dict[str, list[tuple[np.ndarray, ...]]] = {
        f"within {side}": [*itertools.combinations(rank[side], 2)] for side in found
    }
    pairs["across"] = [*itertools.product(*rank.values())]
    return {
        "spearman": {
            name: [float(rank_correlation(a, b)) for a, b in each] for name, each in pairs.items()
        },
        "quantiles": {
            side: [np.quantile(run["score"], QUANTILES).tolist() for run in runs]
            for side, runs in found.items()
        },
        "top1": {
            side: {name: [run["top1"][name] for run in runs] for name in runs[0]["top1"]}
            for side, runs in found.items()
        },
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides for every seed."""
    asked = {name: getattr(options, name) for name in SETTINGS}
    noted = options.work / "settings.json"
    if noted.exists() and json.loads(noted.read_text()) != asked:
        raise InputError(
            f"{options.work} holds a comparison of other settings; give another --work"
        )
    options.work.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(asked))
    folder = images(options)
    num_classes = int(np.load(folder / "train_label.npy").max()) + 1
    if num_classes not in DATASETS:
        raise InputError(f"{options.data} has {num_classes} classes; their code knows 10 and 100")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in options.seeds:
        found["theirs"].append(theirs(options, seed, DATASETS[num_classes]))
        found["ours"].append(ours(options, seed, DATASETS[num_classes]))
        print(f"seed {seed}: {[found[side][-1]['top1'] for side in SIDES]}", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "benchmark": "authors",
        "settings": asked
        | {"rates": options.rates, "seeds": options.seeds, "authors": options.authors_commit},
        "warm_up": "none; no time is measured",
        "repetitions": len(options.seeds),
        "metrics": {},
        "num_images": {
            split: len(np.load(folder / f"{split}_label.npy")) for split in ("train", "val")
        },
        **summary(found),
        "provenance": files.provenance(1, device),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    settings, top1 = result["settings"], result["top1"]
    agreement = [["Spearman of TDDS scores", "mean", "lowest", "highest", "pairs"]] + [
        [name, *(f"{value:.3f}" for value in (np.mean(all_), min(all_), max(all_))), f"{len(all_)}"]
        for name, all_ in result["spearman"].items()
        if all_
    ]
    accuracy = [["top-1, %", *SIDES, "ours - theirs"]] + [
        [
            "full data" if name == "full" else f"p = {name}",
            *(plus_minus(*mean_std(top1[side][name])) for side in SIDES),
            f"{np.mean(top1['ours'][name]) - np.mean(top1['theirs'][name]):+.2f}",
        ]
        for name in top1["ours"]
    ]
    quantiles = [["quantile of scores", *SIDES]] + [
        [f"{quantile:.0%}", *(f"{np.mean(result['quantiles'][side], 0)[i]:.3g}" for side in SIDES)]
        for i, quantile in enumerate(QUANTILES)
    ]
    about = (
        f"{settings['data']} ({result['num_images']['train']:,} images to train on,"
        f" {result['num_images']['val']:,} to evaluate on)"
        f"{', none mirrored' if settings['no_flip'] else ''}, {settings['network']},"
        f" {settings['epochs']} epochs, batch {settings['batch']}, learning rate"
        f" {settings['lr']:g}. TDDS over all epochs with K = {settings['window']}, preset"
        f" `official`; seeds {', '.join(map(str, settings['seeds']))} on each side, mean ± sample"
        " standard deviation. Theirs: train.py, importance_evaluation.py and train_subset.py of"
        f" {REPOSITORY} ({settings['authors']}), run as benchmarks/authors.py says."
    )
    tables = "\n\n".join(map(files.table, (agreement, accuracy, quantiles)))
    return (
        f"# The authors' code and ours on the same images\n\n{about}\n\n{tables}\n\n"
        f"{files.provenance_line(result)}\n"
    )


def check(options: argparse.Namespace) -> None:
    """Raise InputError where the authors' code is not at hand."""
    if missing := [name for name in NEEDED if not (options.checkout / name).is_file()]:
        raise InputError(
            f"{options.checkout} has no {', '.join(missing)}; give a checkout of {REPOSITORY}"
        )
    if not 3 <= options.window <= options.epochs:
        raise InputError(
            f"--window={options.window} must lie in [3, --epochs={options.epochs}]; two outputs"
            " have one loss difference, which varies by nothing"
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.authors", description=(__doc__ or "").split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("checkout", type=Path, help="folder with the authors' code")
    parser.add_argument("--work", type=Path, default=Path("runs/authors"), metavar="DIR")
    parser.add_argument("--data", default="digits", help="source as `tdds write` takes it")
    parser.add_argument("--no-flip", action="store_true", help="mirror no image, on both sides")
    parser.add_argument("--network", default="shufflenet_v2_x0_5", help="a torchvision classifier")
    parser.add_argument("--cifar-stem", action="store_true", help="3 x 3 stem without pooling")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--window", type=int, default=10, help="K")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.8], help="pruning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--authors-commit", default="commit not given", help="what the page says of the checkout"
    )
    parser.add_argument("--run", choices=SCRIPTS, help=argparse.SUPPRESS)
    files.add_options(parser, "authors")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both sides, print the page, write both result files; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, _, script_words = (
        (words[: words.index("--")], "--", words[words.index("--") + 1 :])
        if "--" in words
        else (words, "", [])
    )
    options = build_parser().parse_args(own)
    options.checkout, options.work = options.checkout.resolve(), options.work.resolve()
    if options.run:
        sys.argv = [options.run, *script_words]
        run_script(options)
        return 0
    return files.run("authors", options, check, measure, as_markdown)


if __name__ == "__main__":
    sys.exit(main())
