"""The command line, and the only place where stages meet processes: `tdds <stage> --help`.

Exit codes: 0 done; 2 bad input, said in one line on standard error; 1 a defect, with its traceback. torchrun turns any
failure of a rank into its own exit code 1 and adds a report of its own.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tdds_dist.errors import InputError

if TYPE_CHECKING:
    from tdds_dist.config import Config

# Stages are imported when they run: `tdds --help` should not wait for torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    options = parse(arguments)
    try:
        options.run(options)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0" or not error.shared:
            print(f"tdds {options.stage}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tdds {options.stage}: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed options; `key=value` may stand before or after them (argparse alone only takes them in one place)."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    stray = [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}; see `tdds {options.stage} --help`")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def run() -> None:
    """Entry point of the program. Leaves without interpreter teardown, whose order against the threads of gloo and
    FFCV would decide the exit code otherwise."""
    try:
        code = main()
    except SystemExit as leaving:  # argparse
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def build_parser() -> argparse.ArgumentParser:
    """All subcommands."""
    parser = argparse.ArgumentParser(
        prog="tdds", description="Find out which images matter: pruning scores, coresets and retraining.",
        epilog="The usual order: write, collect, select, retrain, report. `tdds STAGE --help` explains one.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    _add_write(stages)
    _add_collect(stages)
    _add_score(stages)
    _add_select(stages)
    _add_retrain(stages)
    _add_report(stages)
    return parser


# ---- subcommands: options, then what they call


def _add_write(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "write", help="images -> .beton and its manifest", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write images to an FFCV file (.beton) and a manifest (index -> path, label) beside it.\n\n"
                    "SOURCE is one of\n"
                    "  imagefolder:DIR          DIR/<split>/<class>/<image>, or DIR/<class>/<image>\n"
                    "  cifar10:DIR, cifar100:DIR  the extracted archive of the python version in DIR\n"
                    "  digits                   scikit-learn's digits at 32x32, a fixed stratified 80/20 split\n"
                    "  synthetic:N,CLASSES,SIZE random images for benchmarks")
    stage.add_argument("source", metavar="SOURCE")
    stage.add_argument("out", metavar="OUT.beton", type=Path)
    stage.add_argument("--split", choices=("train", "val"), default="train", help="which part of the source (default: train)")
    stage.add_argument("--max-resolution", type=int, metavar="N", help="shrink images to a longer side of N pixels")
    stage.add_argument("--write-mode", choices=("jpg", "proportion", "raw"), default="jpg",
                       help="jpg: all compressed; raw: none, loads faster; proportion: half of them (default: jpg)")
    stage.add_argument("--quality", type=int, default=90, metavar="Q", help="JPEG quality, 1 to 100 (default: 90)")
    stage.add_argument("--num-workers", type=int, metavar="W", help="processes (default: one per CPU, at most 16)")
    stage.add_argument("--subset", type=int, metavar="N", help="only N images, classes in proportion")
    stage.add_argument("--overwrite", action="store_true", help="replace an existing file")
    stage.set_defaults(run=_write)


def _write(options: argparse.Namespace) -> None:
    from tdds_dist.beton import manifest_path
    from tdds_dist.beton_writer import write_beton
    from tdds_dist.sources import open_source

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files go
    source = open_source(options.source, options.split, options.subset)
    manifest = write_beton(
        source, options.out, max_resolution=options.max_resolution, write_mode=options.write_mode, quality=options.quality,
        num_workers=options.num_workers, overwrite=options.overwrite)
    print(f"wrote {options.out} ({manifest.num_samples} images, {manifest.num_classes} classes, "
          f"{manifest.beton_bytes / 2**20:.1f} MiB) and {manifest_path(options.out).name}")
    print("next: put both splits into a config (see configs/) and run `tdds collect CONFIG.yaml`")


def _add_config(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("config", metavar="CONFIG.yaml", type=Path)
    stage.add_argument("overrides", metavar="key=value", nargs="*", help="change a key of the config, e.g. train.lr=0.05")


def _add_collect(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "collect", help="train once, score every sample",
        description="Train on all images and score each of them on the way. Under torchrun, or alone. Ends with scores/*.npz "
                    "in the run directory.")
    _add_config(stage)
    stage.set_defaults(run=_collect)


def _load_config(options: argparse.Namespace) -> "Config":
    from tdds_dist.config import load_config

    try:
        return load_config(options.config, options.overrides)
    except InputError as error:
        error.shared = True  # every rank reads the same file
        raise


def _collect(options: argparse.Namespace) -> None:
    config = _load_config(options)

    from tdds_dist.collect import collect
    from tdds_dist.distributed import session

    with session(config.run.device, config.run.timeout_seconds) as world:
        paths = collect(config, world)
        if world.is_main:
            print(f"wrote {', '.join(str(path) for path in paths)}")
            served = [rate for window in config.score.windows for rate in window.pruning_rates if rate > 0]
            print(f"next: tdds select {config.run.directory} --pruning-rate {min(served, default='P --score KEY')}")


def _add_score(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "score", help="compute scores again from what was recorded",
        description="Recompute TDDS from a run's trajectory, or from a folder of {epoch}_Output.npy and {epoch}_Index.npy as "
                    "the authors' code writes it. No image is read.")
    stage.add_argument("source", metavar="RUN|DIR", type=Path)
    stage.add_argument("--preset", choices=("official", "paper"), help="default: the run's, else official")
    stage.add_argument("--T", type=int, help="trajectory length in epochs (default: the run's windows, else all epochs)")
    stage.add_argument("--K", type=int, help="window size (default: the run's windows, else 10)")
    stage.add_argument("--beta", type=float, help="EMA decay, 0 averages the windows (default: the run's, else 0.9)")
    stage.add_argument("--beton", type=Path, metavar="FILE", help="take labels from this file (dynamics folders have none)")
    stage.add_argument("--out", type=Path, metavar="FILE.npz", help="default: scores/ of the run, or DIR")
    stage.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    from tdds_dist.score import score

    paths = score(options.source, preset=options.preset, T=options.T, K=options.K, beta=options.beta, beton=options.beton,
                  out=options.out)
    print(f"wrote {', '.join(str(path) for path in paths)}")
    print(f"next: tdds select {paths[0]} --pruning-rate 0.5")


def _add_select(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "select", help="scores -> coreset",
        description="Keep the highest-scored images. In a run directory the config says which window serves which rate.")
    stage.add_argument("source", metavar="RUN|SCORES.npz", type=Path)
    stage.add_argument("--pruning-rate", type=float, required=True, metavar="P", help="fraction to remove, in [0, 1)")
    stage.add_argument("--score", default="tdds", metavar="KEY", help="tdds (default), random, or a name in scores/")
    stage.add_argument("--class-balanced", action="store_true", help="keep the same share of every class")
    stage.add_argument("--seed", type=int, default=0, help="of the random score and of ties (default: 0)")
    stage.add_argument("--out", type=Path, metavar="FILE.npz", help="default: coresets/ of the run, or beside the scores")
    stage.set_defaults(run=_select)


def _select(options: argparse.Namespace) -> None:
    from tdds_dist.artifacts import load_coreset
    from tdds_dist.select import select

    path, warnings = select(options.source, options.pruning_rate, score=options.score, class_balanced=options.class_balanced,
                            seed=options.seed, out=options.out)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    coreset = load_coreset(path)
    print(f"wrote {path} ({len(coreset.index_M)} of {coreset.fingerprint.num_samples} images by {coreset.score_key})")
    config = options.source / "config.yaml" if options.source.is_dir() else "CONFIG.yaml"
    print(f"next: tdds retrain {config} --coreset {path} --strategy E")


def _add_retrain(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "retrain", help="train on a coreset",
        description="Train on a coreset. Under torchrun, or alone. Writes a run directory under retrain/ of the config's run.")
    _add_config(stage)
    stage.add_argument("--coreset", type=Path, required=True, metavar="FILE.npz")
    stage.add_argument("--strategy", choices=("E", "P"), required=True,
                       help="E: as many epochs as on the full data; P: as many images seen, epochs / (1 - p)")
    stage.add_argument("--importance", choices=("none", "batch", "sample"), help="weight of the loss (default: the config's)")
    stage.add_argument("--name", help="folder under retrain/ (default: coreset file, strategy, importance, seed)")
    stage.set_defaults(run=_retrain)


def _retrain(options: argparse.Namespace) -> None:
    config = _load_config(options)

    from tdds_dist.distributed import session
    from tdds_dist.retrain import retrain

    with session(config.run.device, config.run.timeout_seconds) as world:
        run = retrain(config, world, options.coreset, options.strategy, importance=options.importance, name=options.name)
        if world.is_main:
            result = run.read_result() or {}
            print(f"wrote {run.path} (final top-1 {result['final_top1']:.2f} %, best {result['best_top1']:.2f} %)")
            print(f"next: tdds report {config.run.directory}")


def _add_report(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "report", help="a page and a table of what came out",
        description="Write one HTML page that needs no network: curves, score histogram, sheets of the highest- and "
                    "lowest-scored images, accuracy against pruning rate. Prints the table.")
    stage.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    stage.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html of the first run")
    stage.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from tdds_dist.report import build_report
    from tdds_dist.rundir import RunDir
    from tdds_dist.summary import format_summary, summary_table

    runs = [RunDir(path) for path in options.runs]
    for run in runs:
        run.read_config()  # says so when it is no run directory
    path = build_report(runs, options.out or runs[0].report_file)
    for run in runs:
        print(f"\n{run.path}\n{format_summary(summary_table(run))}")
    print(f"\nwrote {path}")
