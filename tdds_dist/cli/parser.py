"""Options of every command."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from tdds_dist.cli import commands
from tdds_dist.config.schema import expand_path
from tdds_dist.config.scores import DEFAULT_SUSPICION, SAMPLERS, SUSPICIONS
from tdds_dist.errors import InputError

Parsers: TypeAlias = "argparse._SubParsersAction[Parser]"
Commands: TypeAlias = Sequence[Callable[[Parsers], None]]  # each adds one command

# What `tdds --help` lists, in this order.
_GROUPS = {
    "in the usual order": (
        "write",
        "check",
        "plan",
        "collect",
        "score",
        "select",
        "retrain",
        "report",
    ),
    "wrong labels": ("suspects",),
    "pruning during one training": ("train",),
    "several runs": ("experiment", "compare"),
    "other tools": ("export", "import"),
    "jobs": ("doctor", "submit", "status", "logs"),
}

_EXAMPLES = """\
examples:
  tdds write imagefolder:DIR data/my_train.beton --split train --max-resolution 256
  tdds collect my.yaml train.lr=0.05                            alone, or on the CPU
  torchrun --nproc-per-node 8 -m tdds_dist collect my.yaml      on all GPUs of this node
  tdds score runs/my --all
  tdds select runs/my --pruning-rate 0.5 0.8
  tdds retrain my.yaml --coreset runs/my/coresets/FILE.npz --strategy E
  tdds report runs/my

`tdds STAGE --help` explains a stage. Environment: TDDS_PROGRESS_SECONDS=N, a line of progress every
N seconds where there is no terminal (default: 10); NO_COLOR=1, no colours. Exit codes: 0 done,
2 bad input, 75 stopped and saved, 130 interrupted."""


class UsageError(SystemExit):
    """Words that no stage takes; already printed, with the usage."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


def _path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _source(text: str) -> str:
    kind, colon, rest = text.partition(":")
    return f"{kind}{colon}{_path(rest) if rest else ''}"


class Parser(argparse.ArgumentParser):
    """A parser that leaves by UsageError. It takes no abbreviations, which another option may make
    ambiguous later."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.register("type", Path, _path)  # of every argument that says type=Path

    def takes(self, name: str, kind: Callable[[str], object], help: str, **more: Any) -> None:
        """Add an option or an argument with a value of that kind; `name` is as people read it, such
        as `--out FILE`."""
        word, _, metavar = name.partition(" ")
        self.add_argument(word, type=kind, metavar=metavar or None, help=help, **more)

    def choice(self, name: str, choices: Sequence[Any], help: str, **more: Any) -> None:
        """Add an option that takes one of these values."""
        self.add_argument(name, choices=choices, help=help, **more)

    def flag(self, name: str, help: str, **more: Any) -> None:
        """Add an option that is given or not."""
        self.add_argument(name, action="store_true", help=help, **more)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        near = difflib.get_close_matches(str(value), map(str, action.choices or ()), 1)
        if near and near[0] != str(value):
            known = ", ".join(map(str, action.choices or ()))
            raise argparse.ArgumentError(
                action, f"{value!r} is none of {known}; the nearest is {near[0]}"
            )
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        text = f"{self.prog}: error: {InputError(message)}"  # one line, whatever the words hold
        print(text, file=sys.stderr)
        raise UsageError(text)


class _Version(argparse.Action):
    """The option `--version`, which looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            print(f"tdds {version('tdds-dist')}")
        except PackageNotFoundError:
            print("tdds, not installed")
        parser.exit()


def parse(
    arguments: Sequence[str] | None = None, extra_commands: Commands = ()
) -> argparse.Namespace:
    """Parse the options; `key=value` may stand before or after them (argparse alone only takes them
    in one place)."""
    parser = build_parser(extra_commands)
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    stray = [
        word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word
    ]
    if stray:
        parser.error(
            f"unrecognized arguments: {' '.join(stray)}; see `tdds {options.stage} --help`"
        )
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser(extra_commands: Commands = ()) -> Parser:
    """Build the parser of all commands: those of this package, and the `extra_commands` of a
    launcher."""
    parser = Parser(
        prog="tdds",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="tdds [options] STAGE ...",
        description="Find out which images matter: pruning scores, coresets and retraining.",
    )
    parsers = parser.add_subparsers(
        dest="stage", required=True, metavar="STAGE", help=argparse.SUPPRESS, prog="tdds"
    )
    adders: Commands = [
        _add_write,
        _add_check,
        _add_plan,
        _add_doctor,
        _add_collect,
        _add_score,
        _add_select,
        _add_retrain,
        _add_train,
        _add_compare,
        _add_experiment,
        _add_export,
        _add_import,
        _add_report,
        _add_suspects,
        *extra_commands,
    ]
    for add in adders:
        add(parsers)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    _add_manner(parser, False)
    for stage in parsers.choices.values():
        _add_manner(stage, argparse.SUPPRESS)  # before the stage or behind it
    summary = {action.dest: action.help for action in parsers._choices_actions}
    groups = [
        "\n".join(
            [f"{title}:", *(f"  {name:<11} {summary[name]}" for name in names if name in summary)]
        )
        for title, names in _GROUPS.items()
        if summary.keys() & set(names)
    ]
    parser.epilog = "\n\n".join([*groups, _EXAMPLES])
    return parser


def _add_manner(parser: argparse.ArgumentParser, default: object) -> None:
    group = parser.add_argument_group("what is said")
    group.add_argument(
        "--quiet", action="store_true", default=default, help="warnings and errors only"
    )
    # its own help says what the object is
    if (own := parser._option_string_actions.get("--json")) is not None:
        own.default = default
        return
    group.add_argument(
        "--json",
        action="store_true",
        default=default,
        help="one JSON object on standard output, also for errors, and nothing else there",
    )


# ---- subcommands and their options; what they do is in `commands`


def _add_write(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "write",
        help="images -> .beton and its manifest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write images to an FFCV file (.beton) and a manifest (index -> path, label) beside"
            " it.\n\nSOURCE is one of\n  imagefolder:DIR          DIR/<split>/<class>/<image>, or"
            " DIR/<class>/<image> with --holdout\n  parquet:DIR              Hugging Face image"
            " data sets: DIR/data/train-*.parquet and so on\n  webdataset:SHARDS        tar shards,"
            " such as webdataset:'{train,val}-{000..099}.tar'\n  cifar10:DIR, cifar100:DIR  the"
            " extracted archive of the python version in DIR\n  idx:DIR                  MNIST,"
            " Fashion-MNIST, KMNIST, EMNIST: *-images-idx3-ubyte[.gz] and its labels in DIR\n"
            "  digits                  "
            " scikit-learn's digits at 32x32, a fixed stratified 80/20 split"
            "\n  synthetic:N,CLASSES,SIZE random images for benchmarks"
        ),
    )
    stage.takes("source SOURCE", _source, "where the images are, see above")
    stage.takes("out OUT.beton", Path, "the file to write")
    stage.choice(
        "--split",
        ("train", "val"),
        "which part of the source (default: train; folders named otherwise, such as Training/,"
        " want it given)",
    )
    stage.takes(
        "--holdout R",
        float,
        "where there is no val split: this share of each class is val, the rest train; give it"
        " with both (default: 0)",
        default=0.0,
    )
    stage.choice(
        "--formats",
        ("pillow", "torchvision"),
        "which files of DIR are images: those that Pillow reads, or those with a suffix of"
        " torchvision's ImageFolder (default: pillow)",
        default="pillow",
    )
    stage.flag("--strict", "refuse DIR when a file in it is left out, or is there twice")
    stage.takes(
        "--image-field NAME",
        str,
        "of parquet: the column of the images; of webdataset: their suffix (default: the only one"
        " there is)",
        default="",
    )
    stage.takes(
        "--label-field NAME",
        str,
        "of parquet: the column of the labels (default: the only one, or label); of webdataset:"
        " their suffix, or the key of .json (default: cls, then the key label)",
        default="",
    )
    stage.takes(
        "--max-resolution N",
        int,
        "shrink images to a longer side of N pixels (default: as they are)",
    )
    stage.choice(
        "--exif",
        ("turn", "ignore"),
        "turn: photos stand upright, as EXIF says and every viewer shows them; ignore: they stay"
        " as stored, as torchvision reads them (default: turn)",
        default="turn",
    )
    stage.takes(
        "--background COLOUR",
        str,
        "under transparent pixels: white, black, #rrggbb, or none, which drops transparency as"
        " torchvision does (default: white)",
        default="white",
    )
    stage.takes(
        "--grey-range LOW,HIGH",
        str,
        "greys of 16 and 32 bits and floats from LOW to HIGH become 0 to 255; write"
        " --grey-range=-1024,3071 where LOW is negative (default: 0,65535, floats 0,1)",
    )
    stage.choice(
        "--write-mode",
        ("jpg", "proportion", "raw"),
        "jpg: all compressed; raw: none, loads faster; proportion: half of them (default: jpg)",
        default="jpg",
    )
    stage.takes("--quality Q", int, "JPEG quality, 1 to 100 (default: 90)", default=90)
    stage.takes("--num-workers W", int, "processes (default: one per CPU, at most 16)")
    stage.takes("--subset N", int, "only N images, classes in proportion (default: all)")
    stage.takes(
        "--label-noise R",
        float,
        "change this share of the labels to another class, for robustness experiments (default: 0)",
        default=0.0,
    )
    stage.takes(
        "--relabel FILE.csv",
        Path,
        "take other labels from this file (again for more, in their order), the decisions of a"
        " review (`tdds suspects`): columns index, label, new_label; the manifest says so",
        action="append",
    )
    stage.choice(
        "--threshold-samples",
        (1, 2),
        "put 1 in C + 1 images into a class of their own, by which `tdds suspects` tells how low"
        " margins of wrong labels are; PART 1 and 2 draw different ones, give it for both splits",
        type=int,
        metavar="PART",
    )
    stage.takes(
        "--corrupt R",
        float,
        "corrupt this share of the images, in equal parts by noise, occlusion, low resolution, fog"
        " and motion blur (default: 0)",
        default=0.0,
    )
    stage.takes(
        "--seed S",
        int,
        "of --holdout, --label-noise, --corrupt and --threshold-samples only; the same for both"
        " parts of the last (default: 0)",
        default=0,
    )
    stage.flag("--overwrite", "replace an existing file")
    stage.set_defaults(run=commands.write)


def _add_check(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "check",
        help="whether every image of a .beton is sound",
        description=(
            "Check the structure of an FFCV file, its manifest, and every image: that its bytes are"
            " those that were written (CRC-32 in the manifest), and that it decodes. Bad images are"
            " listed: global index, reason (crc, decode, size), path. Exit code 2 when something is"
            " wrong."
        ),
    )
    stage.takes("beton FILE.beton", Path, "its manifest is looked for beside it")
    stage.flag("--quick", "only 256 images, evenly spaced")
    stage.takes("--num-workers W", int, "decoding threads (default: one per CPU)")
    for field, usual in (("image", "the only one"), ("label", "the only int field, or label")):
        stage.takes(
            f"--{field}-field NAME",
            str,
            f"which field holds the {field}s, in a file with several (default: {usual})",
            default="",
        )
    stage.set_defaults(run=commands.check)


def _add_config(stage: Parser) -> None:
    stage.takes("config CONFIG.yaml", Path, "one of configs/, or your own")
    stage.takes(
        "overrides key=value", str, "change a key of the config, e.g. train.lr=0.05", nargs="*"
    )


def _add_plan(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "plan",
        help="what a run will take, before it runs",
        description=(
            "Memory, disk, network and hours of a collection and its retrainings, from the config"
            " alone; no GPU is needed. What does not fit is refused (exit code 2), with the options"
            " that make it fit."
        ),
    )
    _add_config(stage)
    ranks = stage.add_mutually_exclusive_group()
    ranks.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="G",
        help="number of ranks, on all nodes together (default: 1)",
    )
    ranks.add_argument(
        "--rehearse",
        type=int,
        metavar="W",
        help=(
            "instead, be the first, the middle and the last of W ranks in turn, without the others,"
            " and count what they send, hold and compute for scores"
        ),
    )
    stage.takes(
        "--gpu-memory SIZE",
        str,
        "of one GPU, e.g. 80GB or 79.6GiB (default: that of a visible GPU, if any)",
    )
    stage.takes(
        "--disk SIZE", str, "room for the run directory, e.g. 500GB (default: what is free there)"
    )
    stage.takes("--num-samples N", int, "training images (default: as in data.train)")
    stage.takes("--images-per-second X", float, "training speed of all ranks together")
    stage.takes(
        "--from RUN",
        Path,
        "take the speed from this run, scaled by ranks (default: the config's own, where there is"
        " one)",
        dest="measured_in",
    )
    stage.choice(
        "--strategies",
        ("E", "P"),
        "of the retrainings, which are those of the config's section pipeline (default: as there,"
        " else E)",
        nargs="+",
        metavar="E|P",
    )
    stage.set_defaults(run=commands.plan)


def _add_doctor(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "doctor",
        help="what would stop or slow a run here",
        description=(
            "Check, within a minute, what a run needs of these machines: devices, the network"
            " between the ranks, the kernel, decoding, the run directory, clocks. Alone, under"
            " torchrun, or as a job (tdds submit --stage doctor). Rank 0 prints one table; exit"
            " code 2 when something fails. Without CONFIG: what needs none."
        ),
    )
    stage.takes(
        "config CONFIG.yaml",
        Path,
        "one of configs/, or your own: its files, run directory, network and batch as well",
        nargs="?",
    )
    stage.takes("overrides key=value", str, "change a key of the config: train.lr=0.05", nargs="*")
    stage.set_defaults(run=commands.doctor, more_checks=lambda options: [])


def _add_collect(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "collect",
        help="train once, score every sample",
        description=(
            "Train on all images and score each of them on the way. Under torchrun, or alone. Ends"
            " with scores/*.npz in the run directory. Stopped, by a signal or a crash, it goes on"
            " from its last checkpoint when started again, on any number of ranks that divides the"
            " batch."
        ),
    )
    _add_config(stage)
    _add_fresh(stage)
    stage.set_defaults(run=commands.collect)


def _add_train(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "train",
        help="one training that skips images on the way",
        description=(
            "Train once, and skip in each epoch the images that the section prune of the config"
            " says: by their scores, losses or probabilities so far. Under torchrun, or alone. Ends"
            " with models/ and result.json in the run directory, which says how many images were"
            " seen; pruning/ has the images of each epoch. Stopped, by a signal or a crash, it goes"
            " on from its last checkpoint when started again, on any number of ranks that divides"
            " the batch."
        ),
    )
    _add_config(stage)
    stage.flag(
        "--schedule-only", "print epochs and images, against a full training, and do nothing"
    )
    stage.takes(
        "--images-per-second X", float, "print hours as well, at this speed of all ranks together"
    )
    _add_fresh(stage)
    stage.set_defaults(run=commands.train)


def _add_fresh(stage: Parser) -> None:
    stage.flag(
        "--fresh",
        "start over instead of going on from the last checkpoint; refused where there is a run",
    )
    stage.flag(
        "--force", "with --fresh: move the run that is there aside, into before-<time>/ in it"
    )


def _add_score(parsers: Parsers) -> None:
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
    stage.set_defaults(run=commands.score)


def _add_select(parsers: Parsers) -> None:
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
    stage.set_defaults(run=commands.select)


def _add_suspects(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "suspects",
        help="images by how likely their label is wrong, and a page to review them",
        description=(
            "Rank the images of a finished collection by how likely their label is wrong, from what"
            " it recorded. Writes suspects.csv, all of them, and review.html, the first ones with"
            " pictures, where decisions are made and saved for `tdds write --relabel`."
        ),
    )
    stage.takes(
        "runs RUN",
        Path,
        "a finished collection; of several on the same images, ranks are averaged",
        nargs="+",
    )
    stage.choice(
        "--score",
        SUSPICIONS,
        f"what is suspicious when it is high (default: {DEFAULT_SUSPICION})",
        default=DEFAULT_SUSPICION,
    )
    stage.takes("--num N", int, "images in the page (default: 200)", default=200)
    stage.takes("--out DIR", Path, "default: suspects/ of the first run")
    stage.set_defaults(run=commands.suspects)


def _add_retrain(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "retrain",
        help="train on a coreset",
        description=(
            "Train on a coreset. Under torchrun, or alone. Writes a run directory under retrain/ of"
            " the config's run."
        ),
    )
    _add_config(stage)
    stage.takes("--coreset FILE.npz", Path, "that `tdds select` wrote", required=True)
    stage.choice(
        "--strategy",
        ("E", "P"),
        "E: as many epochs as on the full data; P: as many images seen, epochs / (1 - p)",
        required=True,
    )
    stage.choice(
        "--importance", ("none", "batch", "sample"), "weight of the loss (default: the config's)"
    )
    stage.takes(
        "--name", str, "folder under retrain/ (default: coreset file, strategy, importance, seed)"
    )
    _add_fresh(stage)
    stage.set_defaults(run=commands.retrain)


def _add_compare(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "compare",
        help="how scores, windows and seeds agree",
        description=(
            "Rank correlation and overlap between the scores of a run, and of one score between"
            " runs; what is kept of each class, and of images known to be mislabelled or corrupted."
        ),
    )
    stage.takes("runs RUN", Path, "run directories", nargs="+")
    stage.takes(
        "--pruning-rates P",
        float,
        "of the coresets that are compared (default: 0.3 0.5 0.7 0.8 0.9)",
        nargs="+",
        default=[0.3, 0.5, 0.7, 0.8, 0.9],
    )
    stage.takes("--out FILE.csv", Path, "default: compare.csv of the first run")
    stage.set_defaults(run=commands.compare)


def _add_experiment(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "experiment",
        help="a table: methods x pruning rates x seeds",
        description=(
            "Run a table of retrainings from one collection per seed, several at a time (--jobs),"
            " or one after the other on all ranks under torchrun. Started again, it goes on where"
            " it was. Writes table.md, cells.csv."
        ),
    )
    stage.takes("config EXPERIMENT.yaml", Path, "one of configs/experiments/, or your own")
    stage.takes(
        "overrides key=value", str, "change a key of the experiment, e.g. seeds=[0]", nargs="*"
    )
    stage.takes(
        "--jobs J",
        int,
        "runs at a time, each with its share of CPUs and GPUs (default: 1)",
        default=1,
    )
    stage.flag(
        "--force",
        "move runs that are there and of other settings aside, into before-<time>/ beside them",
    )
    stage.set_defaults(run=commands.experiment)


def _add_export(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "export",
        help="scores, coresets and trajectories for other tools",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write scores, a coreset or a trajectory in a form that other tools read.",
        epilog=(
            "parquet, csv   index, path, label, every score, its ranks, keep flags per pruning"
            " rate\npaths          the kept images, one path per line\nofficial      "
            " data_mask_*.npy and score_*.npy of the authors' code\ntorch-subset   a .pt with the"
            " indices for torch.utils.data.Subset, and importances\ncard           a folder for a"
            " hub: README.md, the table as Parquet, the indices of every coreset\ntrajectory    "
            " what was recorded, one row per sample and epoch: trajectory.parquet, croissant.json"
        ),
    )
    stage.takes(
        "source RUN|DIR|SCORES.npz|CORESET.npz",
        Path,
        "what to write in another form (DIR: a trajectory)",
    )
    stage.choice(
        "--format",
        ("parquet", "csv", "paths", "official", "torch-subset", "card", "trajectory"),
        "what to write, see below",
        required=True,
    )
    stage.takes(
        "--pruning-rates P",
        float,
        "of the keep flags (default: those of the run's config, else 0.3 0.5 0.7 0.8 0.9)",
        nargs="+",
        default=[],
    )
    stage.add_argument(
        "--no-ranks",
        dest="ranks",
        action="store_false",
        help="leave ranks out of tables, a third smaller as Parquet: they follow from the scores",
    )
    stage.takes("--beton FILE", Path, "take paths and labels from the manifest of this file")
    stage.takes("--out PATH", Path, "default: beside the source, or export/ of the run")
    stage.set_defaults(run=commands.export)


def _add_import(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "import",
        help="scores from other tools",
        description=(
            "Make a score file from a CSV (index or path, score), or from score_*.npy and"
            " data_mask_*.npy of the authors' code."
        ),
    )
    stage.takes("source FILE.csv|score_*.npy", Path, "what to read")
    stage.takes("--key NAME", str, "name of the score (default: from the file)")
    stage.takes(
        "--column NAME", str, "column of the CSV that holds it (default: the key, else score)"
    )
    stage.takes("--data-mask FILE.npy", Path, "default: data_mask_*.npy beside score_*.npy")
    stage.takes("--beton FILE", Path, "the dataset they belong to: labels, paths, checks")
    stage.takes("--run RUN", Path, "a run of that dataset, to put them into", dest="run_directory")
    stage.takes("--out FILE.npz", Path, "default: scores/ of the run, or beside the source")
    stage.set_defaults(run=commands.import_)


def _add_report(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "report",
        help="a page and a table of what came out",
        description=(
            "Write one HTML page that needs no network: accuracy against pruning rate, learning"
            " curves, scores, the images that go first and last, throughput. Runs of the same"
            " images share a headline, with the seeds of a setting averaged. Prints the table."
        ),
    )
    stage.takes("runs RUN", Path, "run directories, or those of experiments", nargs="+")
    stage.takes("--out FILE.html", Path, "default: report.html in the first directory")
    stage.set_defaults(run=commands.report)
