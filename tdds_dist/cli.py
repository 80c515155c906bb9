"""The command line, and the only place where stages meet processes: `tdds <stage> --help`.

Exit codes: 0 done; 2 bad input, said in one line on standard error; 75 asked to leave by SIGTERM, SIGUSR2 or SIGINT, saved, the
same command goes on; 130 interrupted at once; 1 a rank that is gone, or a defect with its traceback. torchrun turns any failure
of a rank into its own exit code 1 and adds a report of its own.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tdds_dist.errors import InputError, LostRankError
from tdds_dist.preemption import EXIT_RESUME, Interruption, Preempted

if TYPE_CHECKING:
    from tdds_dist.config import Config

_MAIN_SPEAKS_SECONDS = 2.0

# Stages are imported when they run: `tdds --help` should not wait for torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    code, message = outcome(arguments)
    if message:
        print(message, file=sys.stderr)
    return code


def outcome(arguments: Sequence[str] | None = None, interruption: Interruption | None = None) -> tuple[int, str]:
    """Run one subcommand; returns the exit code, and the line that this rank has to say about it (empty when done, or when
    another rank says it). `interruption` lets the caller see which signals came."""
    options = parse(arguments)
    options.interruption = interruption or Interruption()
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        code = options.run(options) or 0  # a subcommand may have an outcome of its own
    except InputError as error:
        if error.shared and not is_main:
            time.sleep(_MAIN_SPEAKS_SECONDS)  # launchers end all ranks when the first leaves
            return 2, ""
        return 2, f"tdds {options.stage}: error: {error}"
    except KeyboardInterrupt:
        return 130, f"tdds {options.stage}: interrupted"
    except Preempted as leaving:
        return EXIT_RESUME, f"tdds {options.stage}: {leaving}" if is_main or not leaving.agreed else ""
    except BrokenPipeError:  # `tdds logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    except LostRankError as error:
        return 1, f"tdds {options.stage}: error: {error}"
    return code, ""


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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stack traces of C++ about a peer that is gone; we say it in a line
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
        epilog="The usual order: write, collect, score, select, retrain, report. `tdds STAGE --help` explains one.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    _add_write(stages)
    _add_check(stages)
    _add_plan(stages)
    _add_collect(stages)
    _add_score(stages)
    _add_select(stages)
    _add_retrain(stages)
    _add_compare(stages)
    _add_experiment(stages)
    _add_export(stages)
    _add_import(stages)
    _add_report(stages)
    # Of the launcher, which the package itself does not know: nothing else imports it.
    from launch.show import add_logs, add_status
    from launch.submit import add_submit

    add_submit(stages)
    add_status(stages)
    add_logs(stages)
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
    stage.add_argument("--label-noise", type=float, default=0.0, metavar="R",
                       help="change this share of the labels to another class, for robustness experiments (default: 0)")
    stage.add_argument("--corrupt", type=float, default=0.0, metavar="R",
                       help="corrupt this share of the images, in equal parts by noise, occlusion, low resolution, fog and "
                            "motion blur (default: 0)")
    stage.add_argument("--seed", type=int, default=0, metavar="S", help="of --label-noise and --corrupt only (default: 0)")
    stage.add_argument("--overwrite", action="store_true", help="replace an existing file")
    stage.set_defaults(run=_write)


def _write(options: argparse.Namespace) -> None:
    from tdds_dist.beton import manifest_path
    from tdds_dist.beton_writer import write_beton
    from tdds_dist.corruptions import KINDS
    from tdds_dist.sources import open_source, with_corruption, with_label_noise

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files go
    source = open_source(options.source, options.split, options.subset)
    source = with_corruption(with_label_noise(source, options.label_noise, options.seed), options.corrupt, options.seed)
    noisy = source.true_label_N is not None or source.corruption is not None
    if noisy and options.split == "val":
        print("warning: images for evaluation should stay clean; leave out --label-noise and --corrupt with --split val",
              file=sys.stderr)
    manifest = write_beton(
        source, options.out, max_resolution=options.max_resolution, write_mode=options.write_mode, quality=options.quality,
        num_workers=options.num_workers, overwrite=options.overwrite)
    print(f"wrote {options.out} ({manifest.num_samples} images, {manifest.num_classes} classes, "
          f"{manifest.beton_bytes / 2**20:.1f} MiB) and {manifest_path(options.out).name}")
    print("next: put both splits into a config (see configs/) and run `tdds collect CONFIG.yaml`")
    if noisy:
        num_changed = 0 if manifest.noisy_N is None else int(manifest.noisy_N.sum())
        corruption = manifest.corruption or []
        by_kind = ", ".join(f"{corruption.count(kind)} {kind}" for kind in KINDS)
        print(f"noise (seed {options.seed}): {num_changed} labels changed, {len(corruption) - corruption.count('')} images "
              f"corrupted ({by_kind})")


def _add_check(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "check", help="whether every image of a .beton is sound",
        description="Check the structure of an FFCV file, its manifest, and every image: that its bytes are those that were "
                    "written (CRC-32 in the manifest), and that it decodes. Bad images are listed: global index, reason "
                    "(crc, decode, size), path. Exit code 2 when something is wrong.")
    stage.add_argument("beton", metavar="FILE.beton", type=Path, help="its manifest is looked for beside it")
    stage.add_argument("--quick", action="store_true", help="only 256 images, evenly spaced")
    stage.add_argument("--num-workers", type=int, metavar="W", help="decoding threads (default: one per CPU)")
    stage.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> None:
    from tdds_dist.check import check

    result = check(options.beton, quick=options.quick, num_workers=options.num_workers)
    for line in result.fault_lines():
        print(line)
    print(result.summary())
    result.require_sound()


def _add_config(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("config", metavar="CONFIG.yaml", type=Path)
    stage.add_argument("overrides", metavar="key=value", nargs="*", help="change a key of the config, e.g. train.lr=0.05")


def _add_plan(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "plan", help="what a run will take, before it runs",
        description="Memory, disk, network and hours of a collection and its retrainings, from the config alone; no GPU is "
                    "needed. What does not fit is refused (exit code 2), with the options that make it fit.")
    _add_config(stage)
    stage.add_argument("--gpus", type=int, default=1, metavar="G", help="number of ranks, on all nodes together (default: 1)")
    stage.add_argument("--gpu-memory", metavar="SIZE",
                       help="of one GPU, e.g. 80GB or 79.6GiB (default: that of a visible GPU, if any)")
    stage.add_argument("--disk", metavar="SIZE", help="room for the run directory, e.g. 500GB (default: what is free there)")
    stage.add_argument("--num-samples", type=int, metavar="N", help="training images (default: as in data.train)")
    stage.add_argument("--images-per-second", type=float, metavar="X", help="training speed of all ranks together")
    stage.add_argument("--from", type=Path, metavar="RUN", dest="measured_in",
                       help="take the speed from this run, scaled by ranks (default: from the config's own, if it is there)")
    stage.add_argument("--strategies", nargs="+", choices=("E", "P"), metavar="E|P",
                       help="of the retrainings, which are those of the config's section pipeline (default: as there, else E)")
    stage.add_argument("--json", action="store_true", help="print the numbers as JSON")
    stage.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    import json

    from tdds_dist.plan import parse_bytes, plan

    config = _load_config(options)
    found = plan(
        config, num_ranks=options.gpus, num_samples=options.num_samples, strategies=options.strategies,
        gpu_memory_bytes=parse_bytes(options.gpu_memory, "--gpu-memory"), disk_bytes=parse_bytes(options.disk, "--disk"),
        images_per_second=options.images_per_second, measured_in=options.measured_in)
    print(json.dumps(found.as_json(), indent=2) if options.json else found.as_text())


def _add_collect(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "collect", help="train once, score every sample",
        description="Train on all images and score each of them on the way. Under torchrun, or alone. Ends with scores/*.npz "
                    "in the run directory. Stopped, by a signal or a crash, it goes on from its last checkpoint when started "
                    "again, on any number of ranks that divides the batch.")
    _add_config(stage)
    _add_fresh(stage)
    stage.set_defaults(run=_collect)


def _add_fresh(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--fresh", action="store_true",
                       help="start over instead of going on from the last checkpoint; refused where there is a run")
    stage.add_argument("--force", action="store_true", help="with --fresh: remove the run that is there")


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

    with options.interruption as interruption, session(config.run.device, config.run.timeout_seconds) as world:
        paths = collect(config, world, fresh=options.fresh, force=options.force, interruption=interruption)
        if world.is_main:
            print(f"wrote {', '.join(str(path) for path in paths)}")
            served = [rate for window in config.score.windows for rate in window.pruning_rates if rate > 0]
            print(f"next: tdds select {config.run.directory} --pruning-rate {min(served, default='P --score KEY')}")


def _add_score(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "score", help="scores from what was recorded", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compute scores from a run's trajectory, from one that ShardedScorer(trajectory=DIR) wrote, or from\n"
                    "a folder of {epoch}_Output.npy and {epoch}_Index.npy as the authors' code writes it. No image is read.\n\n"
                    "Without --all or --score: TDDS, with --T, --K, --beta, --preset, --delta.\n"
                    "With --final-pass, alone or under torchrun: entropy and moderate, by one pass over the images.")
    stage.add_argument("source", metavar="RUN|DIR", type=Path)
    stage.add_argument("overrides", metavar="key=value", nargs="*",
                       help="option of --all and --score, e.g. el2n_epochs=20 never_learned=0 aum_of=probability "
                            "uncertainty_window=5")
    stage.add_argument("--all", action="store_true", help="every score that needs no final model")
    stage.add_argument("--score", action="append", default=[], metavar="KEY",
                       help="only this one (again for more): tdds, forgetting, el2n, aum, dyn_unc, dual, random")
    stage.add_argument("--final-pass", action="store_true", help="entropy and moderate, from the run's final weights")
    stage.add_argument("--preset", choices=("official", "paper"), help="default: the run's, else official")
    stage.add_argument("--T", type=int, help="trajectory length in epochs (default: the run's windows, else all epochs)")
    stage.add_argument("--K", type=int, help="window size (default: the run's windows, else 10)")
    stage.add_argument("--beta", type=float, help="EMA decay, 0 averages the windows (default: the run's, else 0.9)")
    stage.add_argument("--delta", choices=("kl", "kl_signed", "ce", "ce_absolute", "el2n"), default="kl",
                       help="what varies in a window: the preset's loss difference, or an ablation (default: kl)")
    stage.add_argument("--beton", type=Path, metavar="FILE", help="take labels from this file (dynamics folders have none)")
    stage.add_argument("--out", type=Path, metavar="FILE.npz|DIR",
                       help="a directory with --all and --score, else a file (default: scores/ of the run, or DIR)")
    stage.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    many = options.all or options.score
    tdds_only = ("preset", "T", "K", "beta")
    if options.all and options.score:
        raise InputError("--all and --score exclude each other; leave one out")
    if options.final_pass:
        others = [f"--{name}" for name in ("all", "score", *tdds_only, "beton", "out") if getattr(options, name)]
        if others := [*others, *options.overrides, *([] if options.delta == "kl" else ["--delta"])]:
            raise InputError(f"--final-pass stands alone, without {others[0]}; run the other command separately")
        _final_pass(options)
        return
    if many and (given := [name for name in tdds_only if getattr(options, name) is not None] + (
            [] if options.delta == "kl" else ["delta"])):
        raise InputError(f"--{given[0]} belongs to `tdds score` without --all and --score, which take the windows of the run's "
                         "config; run it separately")
    if options.overrides and not many:
        raise InputError(f"{options.overrides[0]} is an option of --all and --score KEY; TDDS alone takes --T, --K, --beta, "
                         "--preset, --delta")

    from tdds_dist.score import score, score_all

    if many:
        paths, skipped = score_all(options.source, options.score, options=options.overrides, beton=options.beton,
                                   out=options.out)
        for reason in skipped:
            print(f"not computed: {reason}", file=sys.stderr)
    else:
        paths = score(options.source, preset=options.preset, T=options.T, K=options.K, beta=options.beta,
                      delta=options.delta, beton=options.beton, out=options.out)
    print(f"wrote {', '.join(str(path) for path in paths)}")
    print(f"next: tdds select {paths[0]} --pruning-rate 0.5")


def _final_pass(options: argparse.Namespace) -> None:
    from tdds_dist.config import parse_config
    from tdds_dist.distributed import session
    from tdds_dist.final_pass import final_pass
    from tdds_dist.rundir import RunDir

    run = RunDir(options.source)
    try:
        config = parse_config(run.read_config(), str(run.config_file))
    except InputError as error:
        error.shared = True
        raise
    with session(config.run.device, config.run.timeout_seconds) as world:
        paths = final_pass(options.source, world)
        if world.is_main:
            print(f"wrote {', '.join(str(path) for path in paths)}")


def _add_select(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "select", help="scores -> coreset",
        description="Keep the images that a score ranks first, or another choice by --sampler. In a run directory the config "
                    "says which TDDS window serves which rate.")
    stage.add_argument("source", metavar="RUN|SCORES.npz", type=Path)
    stage.add_argument("--pruning-rate", type=float, required=True, metavar="P", help="fraction to remove, in [0, 1)")
    stage.add_argument("--score", default="tdds", metavar="KEY",
                       help="tdds (default), random, ccs (AUM in strata), or a name in scores/")
    stage.add_argument("--sampler", choices=("top", "ccs", "centre", "beta"),
                       help="top: the highest (default); ccs: from all strata alike, without the hardest; centre: the middle "
                            "of the ranking (default of moderate); beta: DUAL's weighted draw")
    stage.add_argument("--class-balanced", action="store_true", help="keep the same share of every class")
    stage.add_argument("--seed", type=int, default=0, help="of draws and ties (default: 0)")
    stage.add_argument("--num-strata", type=int, metavar="S", help="of sampler ccs (default: 50)")
    stage.add_argument("--hard-cutoff-rate", type=float, metavar="R",
                       help="of sampler ccs: share of all images dropped as too hard (default: 0.2 from P = 0.8, 0.3 from 0.9)")
    stage.add_argument("--c-d", type=float, metavar="C", help="of sampler beta: its exponent (default: 4)")
    stage.add_argument("--out", type=Path, metavar="FILE.npz", help="default: coresets/ of the run, or beside the scores")
    stage.set_defaults(run=_select)


def _select(options: argparse.Namespace) -> None:
    from tdds_dist.artifacts import load_coreset
    from tdds_dist.select import select

    sampler = "ccs" if options.score == "ccs" else options.sampler
    given = {key: value for key in ("num_strata", "hard_cutoff_rate", "c_d") if (value := getattr(options, key)) is not None}
    fitting = {"ccs": {"num_strata", "hard_cutoff_rate"}, "beta": {"c_d"}}.get(sampler or "", set())
    if wrong := sorted(set(given) - fitting):
        raise InputError(f"--{wrong[0].replace('_', '-')} does nothing with sampler {sampler or 'top'}; leave it out, or "
                         f"choose --sampler {'beta' if wrong[0] == 'c_d' else 'ccs'}")
    path, warnings = select(options.source, options.pruning_rate, score=options.score, sampler=options.sampler,
                            class_balanced=options.class_balanced, seed=options.seed, out=options.out, **given)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    coreset = load_coreset(path)
    print(f"wrote {path} ({len(coreset.index_M)} of {coreset.fingerprint.num_samples} images by {coreset.method})")
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
    _add_fresh(stage)
    stage.set_defaults(run=_retrain)


def _retrain(options: argparse.Namespace) -> None:
    config = _load_config(options)

    from tdds_dist.distributed import session
    from tdds_dist.retrain import retrain

    with options.interruption as interruption, session(config.run.device, config.run.timeout_seconds) as world:
        run = retrain(config, world, options.coreset, options.strategy, importance=options.importance, name=options.name,
                      fresh=options.fresh, force=options.force, interruption=interruption)
        if world.is_main:
            result = run.read_result() or {}
            print(f"wrote {run.path} (final top-1 {result['final_top1']:.2f} %, best {result['best_top1']:.2f} %)")
            print(f"next: tdds report {config.run.directory}")


def _add_compare(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "compare", help="how scores, windows and seeds agree",
        description="Rank correlation and overlap between the scores of a run, and of one score between runs; what is kept of "
                    "each class, and of images known to be mislabelled or corrupted.")
    stage.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    stage.add_argument("--pruning-rates", type=float, nargs="+", metavar="P", default=[0.3, 0.5, 0.7, 0.8, 0.9],
                       help="of the coresets that are compared (default: 0.3 0.5 0.7 0.8 0.9)")
    stage.add_argument("--out", type=Path, metavar="FILE.csv", help="default: compare.csv of the first run")
    stage.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> None:
    from tdds_dist.compare import compare

    print(compare(options.runs, pruning_rates=options.pruning_rates, out=options.out))


def _add_experiment(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "experiment", help="a table: methods x pruning rates x seeds",
        description="Run a table of retrainings from one collection per seed, several at a time (--jobs), or one after the "
                    "other on all ranks under torchrun. Started again, it goes on where it was. Writes table.md, cells.csv.")
    stage.add_argument("config", metavar="EXPERIMENT.yaml", type=Path)
    stage.add_argument("overrides", metavar="key=value", nargs="*", help="change a key of the experiment, e.g. seeds=[0]")
    stage.add_argument("--jobs", type=int, default=1, metavar="J",
                       help="runs at a time, each with its share of CPUs and GPUs (default: 1)")
    stage.set_defaults(run=_experiment)


def _experiment(options: argparse.Namespace) -> None:
    from tdds_dist.config import load_config, load_experiment

    try:
        plan = load_experiment(options.config, options.overrides)
        config = load_config(plan.config, plan.overrides)
    except InputError as error:
        error.shared = True
        raise

    from tdds_dist.distributed import session
    from tdds_dist.experiment import experiment

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if options.jobs != 1:
            raise InputError(f"--jobs={options.jobs} under torchrun, where all ranks work on one run after the other; leave it "
                             "out", shared=True)
        with options.interruption as interruption, session(config.run.device, config.run.timeout_seconds) as world:
            table, failed = experiment(plan, world=world, interruption=interruption)
            is_main = world.is_main
    else:
        table, failed = experiment(plan, jobs=options.jobs)
        is_main = True
    if is_main:
        print(f"\n{table.read_text()}\nwrote {table} and cells.csv")
    if failed:
        raise InputError(f"{len(failed)} runs failed ({failed[0]}); correct the cause and run the same command again",
                         shared=True)


def _add_export(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "export", help="scores and coresets for other tools", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write scores or a coreset in a form that other tools read.",
        epilog="parquet, csv   index, path, label, every score, its ranks, keep flags per pruning rate\n"
               "paths          the kept images, one path per line\n"
               "official       data_mask_*.npy and score_*.npy of the authors' code\n"
               "torch-subset   a .pt with the indices for torch.utils.data.Subset, and importances")
    stage.add_argument("source", metavar="RUN|SCORES.npz|CORESET.npz", type=Path)
    stage.add_argument("--format", required=True, choices=("parquet", "csv", "paths", "official", "torch-subset"),
                       help="what to write, see below")
    stage.add_argument("--pruning-rates", type=float, nargs="+", metavar="P", default=[],
                       help="of the keep flags (default: those of the run's config, else 0.3 0.5 0.7 0.8 0.9)")
    stage.add_argument("--beton", type=Path, metavar="FILE", help="take paths and labels from the manifest of this file")
    stage.add_argument("--out", type=Path, metavar="PATH", help="default: beside the source, or export/ of the run")
    stage.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from tdds_dist.export import export

    paths, notes = export(options.source, options.format, options.out, pruning_rates=options.pruning_rates, beton=options.beton)
    print(f"wrote {', '.join(str(path) for path in paths)}")
    for note in notes:
        print(f"note: {note}")


def _add_import(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stage = stages.add_parser(
        "import", help="scores from other tools",
        description="Make a score file from a CSV (index or path, score), or from score_*.npy and data_mask_*.npy of the "
                    "authors' code.")
    stage.add_argument("source", metavar="FILE.csv|score_*.npy", type=Path)
    stage.add_argument("--key", metavar="NAME", help="name of the score (default: from the file)")
    stage.add_argument("--column", metavar="NAME", help="column of the CSV that holds it (default: the key, else score)")
    stage.add_argument("--data-mask", type=Path, metavar="FILE.npy", help="default: data_mask_*.npy beside score_*.npy")
    stage.add_argument("--beton", type=Path, metavar="FILE", help="the dataset they belong to: labels, paths, checks")
    stage.add_argument("--run", type=Path, metavar="RUN", dest="run_directory", help="a run of that dataset, to put them into")
    stage.add_argument("--out", type=Path, metavar="FILE.npz", help="default: scores/ of the run, or beside the source")
    stage.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> None:
    from tdds_dist.ingest import import_scores

    path = import_scores(options.source, key=options.key, column=options.column, data_mask=options.data_mask,
                         beton=options.beton, run=options.run_directory, out=options.out)
    print(f"wrote {path}")
    print(f"next: tdds select {path} --pruning-rate 0.5")


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
