"""Shared by the commands: the parser that takes their options, and CONFIG.yaml, which many of them
take."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from tdds_dist.config.schema import expand_path
from tdds_dist.errors import InputError

if TYPE_CHECKING:
    from tdds_dist.config.run import Config

Parsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class UsageError(SystemExit):
    """Words that no stage takes; already printed, with the usage."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


class Parser(argparse.ArgumentParser):
    """A parser that leaves by UsageError. It takes no abbreviations, which another option may make
    ambiguous later."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.register("type", Path, expanded_path)  # of every argument that says type=Path

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


def expanded_path(text: str) -> Path:
    """Read a path; `~` and variables in it are expanded."""
    try:
        return Path(expand_path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_config(stage: Parser) -> None:
    """Add the config of a run, and the keys that are changed in it."""
    stage.takes("config CONFIG.yaml", Path, "one of configs/, or your own")
    stage.takes(
        "overrides key=value", str, "change a key of the config, e.g. train.lr=0.05", nargs="*"
    )


def config_of(options: argparse.Namespace) -> "Config":
    """Load the config that `add_config` takes."""
    from tdds_dist.config.run import load_config

    with shared_errors():
        return load_config(options.config, options.overrides)


@contextmanager
def shared_errors() -> Iterator[None]:
    """Mark an InputError raised inside as shared by all ranks, which read the same files and
    options."""
    try:
        yield
    except InputError as error:
        error.shared = True
        raise
