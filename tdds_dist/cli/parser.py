"""The commands, and what `tdds --help` says of them."""

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, TypeAlias

from tdds_dist.cli import dataset, planning, results, scores, training
from tdds_dist.cli.options import Parser, Parsers

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
        dataset.add_write,
        dataset.add_check,
        planning.add_plan,
        planning.add_doctor,
        training.add_collect,
        scores.add_score,
        scores.add_select,
        training.add_retrain,
        training.add_train,
        results.add_compare,
        training.add_experiment,
        results.add_export,
        results.add_import,
        results.add_report,
        results.add_suspects,
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
