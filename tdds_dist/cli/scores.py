"""`tdds score` and `select`: what was recorded to scores, and scores to coresets."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdds_dist.cli.options import Parsers, shared_errors
from tdds_dist.cli.outcome import Outcome
from tdds_dist.config.scores import SAMPLERS
from tdds_dist.console import log
from tdds_dist.errors import InputError
from tdds_dist.text import command

if TYPE_CHECKING:
    from tdds_dist.config.run import Config

USUAL_RATE = "0.5"  # in a command that comes next, where nothing says which


# ---- score


def add_score(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "score",
        help="scores from what was recorded",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Compute scores from a run's trajectory, from one that ShardedScorer(trajectory=DIR)"
            " wrote, from one as\nParquet (`tdds export --format trajectory`), or from a folder of"
            " {epoch}_Output.npy and {epoch}_Index.npy\nas the authors' code writes it. No image is"
            " read.\n\nWithout --all or --score: TDDS, with --T, --K,"
            " --beta, --preset, --delta.\nWith --final-pass, alone or under torchrun: entropy and"
            " moderate, by one pass over the images."
        ),
    )
    stage.takes(
        "source RUN|DIR|FILE.parquet", Path, "a run directory, or what was recorded elsewhere"
    )
    stage.takes(
        "overrides key=value",
        str,
        "option of --all and --score, e.g. el2n_epochs=20 never_learned=0 aum_of=probability"
        " uncertainty_window=5",
        nargs="*",
    )
    stage.flag("--all", "every score that needs no final model")
    stage.takes(
        "--score KEY",
        str,
        "only this one (again for more): tdds, random, forgetting, el2n, aum, dyn_unc, dual, csl,"
        " confidence, variability, correctness, learning_time, cld, s2l",
        action="append",
        default=[],
    )
    stage.flag("--final-pass", "entropy and moderate, from the run's final weights")
    stage.choice("--preset", ("official", "paper"), "default: the run's, else official")
    stage.takes(
        "--T", int, "trajectory length in epochs (default: the run's windows, else all epochs)"
    )
    stage.takes("--K", int, "window size (default: the run's windows, else 10)")
    stage.takes("--beta", float, "EMA decay, 0 averages the windows (default: the run's, else 0.9)")
    stage.choice(
        "--delta",
        ("kl", "kl_signed", "ce", "ce_absolute", "el2n"),
        "what varies in a window: the preset's loss difference, or an ablation (default: kl)",
        default="kl",
    )
    stage.takes("--beton FILE", Path, "take labels from this file (dynamics folders have none)")
    stage.takes(
        "--out FILE.npz|DIR",
        Path,
        "a directory with --all and --score, else a file (default: scores/ of the run, DIR, or"
        " beside FILE)",
    )
    stage.set_defaults(run=score)


def score(options: argparse.Namespace) -> Outcome | None:
    many = options.all or options.score
    tdds_only = ("preset", "T", "K", "beta", "delta")
    of_tdds = [name for name in tdds_only if getattr(options, name) not in (None, "kl")]
    if options.all and options.score:
        raise InputError("--all and --score exclude each other; leave one out")
    if options.final_pass:
        names = ("all", "score", *of_tdds, "beton", "out")
        given = [f"--{name}" for name in names if name in of_tdds or getattr(options, name)]
        if others := [*given, *options.overrides]:
            raise InputError(
                f"--final-pass stands alone, without {others[0]}; run the other command separately"
            )
        return _final_pass(options)
    if many and of_tdds:
        raise InputError(
            f"--{of_tdds[0]} belongs to `tdds score` without --all and --score, which take the"
            " windows of the run's config; run it separately"
        )
    if options.overrides and not many:
        raise InputError(
            f"{options.overrides[0]} is an option of --all and --score KEY; TDDS alone takes --T,"
            " --K, --beta, --preset, --delta"
        )

    from tdds_dist.scoring.offline import score as score_tdds
    from tdds_dist.scoring.offline import score_all

    started = time.perf_counter()
    if many:
        paths, skipped = score_all(
            options.source,
            options.score,
            options=options.overrides,
            beton=options.beton,
            out=options.out,
        )
        for reason in skipped:
            log.warning(f"not computed: {reason}")
    else:
        paths = score_tdds(
            options.source,
            preset=options.preset,
            T=options.T,
            K=options.K,
            beta=options.beta,
            delta=options.delta,
            beton=options.beton,
            out=options.out,
        )
    return Outcome(
        paths,
        {"scores": len(paths), "seconds": time.perf_counter() - started},
        _after_score(options, paths),
    )


def _after_score(options: argparse.Namespace, paths: list[Path]) -> str:
    """Return the command for coresets by the new scores, at the rates of the run's config; "" while
    the run is not finished."""
    from tdds_dist.config.run import parse_config
    from tdds_dist.runs.directory import RunDir

    run, ranked = RunDir(options.source), [path for path in paths if path.stem != "random"]
    if not ranked:
        return ""
    if not run.config_file.is_file() or options.out is not None:
        return command("select", ranked[0], "--pruning-rate", USUAL_RATE)
    if not run.result_file.is_file():
        return ""
    config = parse_config(run.read_config(), str(run.config_file))
    if {window.key(config.score.preset) for window in config.windows()} <= {
        path.stem for path in ranked
    }:
        return select_command(config, run.path)
    return select_command(config, run.path, ranked[0].stem)


def _final_pass(options: argparse.Namespace) -> Outcome | None:
    from tdds_dist.config.run import parse_config
    from tdds_dist.runs.directory import RunDir

    run = RunDir(options.source)
    with shared_errors():
        config = parse_config(run.read_config(), str(run.config_file))

    from tdds_dist.distributed.world import session
    from tdds_dist.training.final_pass import final_pass

    started = time.perf_counter()
    with session(config.run.device, config.run.timeout_seconds) as world:
        paths = final_pass(options.source, world)
        if not world.is_main:
            return None
    return Outcome(
        paths,
        {"scores": len(paths), "seconds": time.perf_counter() - started},
        command("select", options.source, "--pruning-rate", USUAL_RATE, "--score", paths[0].stem),
    )


# ---- select


def add_select(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "select",
        help="scores -> coreset",
        description=(
            "Keep the images that a score ranks first, or another choice by --sampler. In a run"
            " directory the config says which TDDS window serves which rate."
        ),
    )
    stage.takes("source RUN|SCORES.npz", Path, "a run directory, or one score file")
    stage.takes(
        "--pruning-rate P",
        float,
        "fraction to remove, in [0, 1); of several, a coreset for each",
        nargs="+",
        required=True,
    )
    stage.takes(
        "--score KEY",
        str,
        "tdds, random, ccs (AUM in strata), or a name in scores/ (default: tdds)",
        default="tdds",
    )
    stage.choice(
        "--sampler",
        SAMPLERS,
        "top: the highest; ccs: from all strata alike, without the hardest; centre: the middle of"
        " the ranking; beta: DUAL's weighted draw; s2l: from clusters of loss trajectories alike;"
        " drop: the top of each class, of classes of low recall more (default: top; of moderate:"
        " centre; of s2l: s2l)",
    )
    stage.add_argument(
        "--class-balanced",
        action=argparse.BooleanOptionalAction,
        help="keep the same share of every class (default: of cld yes, of other scores no)",
    )
    stage.takes("--seed S", int, "of draws and ties (default: 0)", default=0)
    stage.takes("--num-strata S", int, "of sampler ccs (default: 50)")
    stage.takes(
        "--hard-cutoff-rate R",
        float,
        "of samplers ccs and top: share of all images of highest score that is dropped as too hard"
        " (default of ccs: 0.2 from P = 0.8, 0.3 from 0.9; of top: 0)",
    )
    stage.takes("--c-d C", float, "of sampler beta: its exponent (default: 4)")
    stage.takes("--out FILE.npz", Path, "default: coresets/ of the run, or beside the scores")
    stage.flag(
        "--force", "move another coreset that has the name aside, into before-<time>/ beside it"
    )
    stage.set_defaults(run=select)


def select(options: argparse.Namespace) -> Outcome:
    from tdds_dist.config.grid import options_of_sampler
    from tdds_dist.coreset.select import changes, check_place, plan_coreset, put

    sampler = "ccs" if options.score == "ccs" else options.sampler
    given = {
        key: value
        for key in ("num_strata", "hard_cutoff_rate", "c_d")
        if (value := getattr(options, key)) is not None
    }
    if wrong := [key for key in given if key not in options_of_sampler(sampler, options.score)]:
        raise InputError(
            f"--{wrong[0].replace('_', '-')} does nothing with sampler {sampler or 'top'}; leave it"
            f" out, or choose --sampler {'beta' if wrong[0] == 'c_d' else 'ccs'}"
        )
    rates = list(dict.fromkeys(options.pruning_rate))
    if options.out is not None and len(rates) > 1:
        raise InputError(
            f"--out={options.out} names one file, and there are {len(rates)} pruning rates; leave"
            " it out, or give one rate"
        )
    given |= {
        "sampler": options.sampler,
        "class_balanced": options.class_balanced,
        "seed": options.seed,
        "out": options.out,
    }
    # all, before one is written
    made = [plan_coreset(options.source, rate, score=options.score, **given) for rate in rates]
    for path, coreset, _ in made:
        check_place(path, coreset, options.force)
    there = [path for path, coreset, _ in made if path.exists() and not changes(path, coreset)]
    rows, notes = list[dict[str, Any]](), list[str]()
    for path, coreset, warnings in made:
        for warning in [*warnings, *put(path, coreset)]:
            log.warning(
                warning + (f" (pruning rate {coreset.pruning_rate:g})" if len(rates) > 1 else "")
            )
        kept, images = len(coreset.index_M), coreset.fingerprint.num_samples
        rows.append(
            {
                "path": str(path),
                "method": coreset.method,
                "pruning_rate": coreset.pruning_rate,
                "kept": kept,
                "images": images,
            }
        )
        notes.append(
            f"kept at {coreset.pruning_rate:g}: {kept} of {images} images by {coreset.method}"
        )
    paths = [path for path, _, _ in made]
    return Outcome(
        [path for path in paths if path not in there],
        {"coresets": len(paths)},
        _retrain_command(options.source, paths[0]),
        notes,
        rows=rows,
        there=there,
    )


def _retrain_command(source: Path, coreset: Path) -> str:
    """Return the command that retrains with the config of the run, on as many ranks as it was
    collected on."""
    from tdds_dist.runs.directory import RunDir

    run = RunDir(source if source.is_dir() else source.parent.parent)
    if not run.config_file.is_file():
        return command("retrain", "CONFIG.yaml", "--coreset", coreset, "--strategy", "E")
    ranks = run.read_env().get("world_size", 1)
    return command("retrain", run.config_file, "--coreset", coreset, "--strategy", "E", ranks=ranks)


def select_command(config: "Config", directory: Path, score: str = "") -> str:
    """Return the command that makes coresets of a run at every rate that a window serves, by a
    score; without one by the windows, or by the first of them where none serves a rate."""
    served = [f"{rate:g}" for rate in config.served_rates if rate]
    if not served:
        score = score or config.windows()[0].key(config.score.preset)
    return command(
        "select",
        directory,
        "--pruning-rate",
        *(served or [USUAL_RATE]),
        *(["--score", score] if score else []),
    )
