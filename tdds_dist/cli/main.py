"""The command line, and the only place where stages meet processes: `tdds <stage> --help`.

Exit codes: 0 done; 2 bad input, said in one line on standard error; 75 asked to leave by SIGTERM,
SIGUSR2 or SIGINT, saved, the same command goes on; 130 interrupted at once; 1 a rank that is gone,
or a defect with its traceback. torchrun turns any failure of a rank into its own exit code 1 and
adds a report of its own.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout

from tdds_dist.cli.options import UsageError
from tdds_dist.cli.outcome import EXIT_TERMINATED, Outcome
from tdds_dist.cli.parser import Commands, parse
from tdds_dist.cli.surroundings import PatientStream, fill_in_caches, open_standard_streams
from tdds_dist.console import log, paint, speaking
from tdds_dist.distributed.interruption import EXIT_RESUME, Interruption, Preempted
from tdds_dist.errors import InputError, LostRankError
from tdds_dist.text import same_command

_MAIN_SPEAKS_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None, extra_commands: Commands = ()) -> int:
    """Run one command; return the exit code."""
    code, message = outcome(arguments, extra_commands=extra_commands)
    if message and sys.stderr is not None:
        print(
            message.replace(": error: ", f": {paint('error:', 'red', sys.stderr)} ", 1),
            file=sys.stderr,
        )
    return code


def outcome(
    arguments: Sequence[str] | None = None,
    interruption: Interruption | None = None,
    extra_commands: Commands = (),
) -> tuple[int, str]:
    """Run one subcommand; return the exit code, and the line that this rank prints about it (empty
    when done, or when another rank prints it). `interruption` lets the caller see which signals
    came."""
    # libraries make 800,000 objects that stay: to look through them as often as Python does takes a
    # tenth of the CPU time of a short run
    gc.set_threshold(10_000, 10, 10)
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    as_json = "--json" in words and is_main
    try:
        options = parse(words, extra_commands)
        options.interruption = interruption or Interruption()
        code, message = _attempt(options, words, is_main)
    except (UsageError, Exception) as error:
        if as_json:
            if isinstance(error, UsageError):
                _print_error(error.message, 2)
            else:
                _print_error(f"{type(error).__name__}: {error}", 1)
        raise
    if as_json and message:
        _print_error(message, code)
    return code, message


def _print_error(message: str, code: int) -> None:
    print(json.dumps({"error": message, "exit_code": code}), flush=True)


def _attempt(options: argparse.Namespace, words: Sequence[str], is_main: bool) -> tuple[int, str]:
    try:
        return _run_stage(options, is_main)
    except InputError as error:
        if error.shared and not is_main:
            time.sleep(_MAIN_SPEAKS_SECONDS)  # launchers end all ranks when the first leaves
            return 2, ""
        return 2, f"tdds {options.stage}: error: {error}"
    except KeyboardInterrupt:
        return 130, f"tdds {options.stage}: interrupted{_after_interruption(options.stage, words)}"
    except SystemExit as leaving:
        if leaving.code != EXIT_TERMINATED:
            raise
        after = _after_interruption(options.stage, words)
        return leaving.code, f"tdds {options.stage}: SIGTERM{after}"
    except Preempted as leaving:
        # a launcher queues its jobs again
        said = str(leaving) if "TDDS_JOB" in os.environ else _again(str(leaving), words)
        return EXIT_RESUME, f"tdds {options.stage}: {said}" if is_main or not leaving.agreed else ""
    except LostRankError as error:
        return 1, f"tdds {options.stage}: error: {error}"


def _run_stage(options: argparse.Namespace, is_main: bool) -> tuple[int, str]:
    """Run a stage and print its outcome; return the exit code, and the line about it."""
    quiet, as_json = (getattr(options, name, False) for name in ("quiet", "json"))
    if getattr(options, "prints_itself", False):
        is_ours = isinstance(sys.stdout, PatientStream) and sys.__stdout__ is not None
        with redirect_stdout(sys.__stdout__ if is_ours else sys.stdout):
            try:
                return (options.run(options) or Outcome()).exit_code, ""
            except BrokenPipeError:  # `tdds logs RUN | head`: nothing is left to do
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0, ""
    with speaking(quiet or not is_main) as warnings:
        for line in fill_in_caches():
            log.warning(line)
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere if quiet or as_json else sys.stdout),
        ):
            closing: Outcome = options.run(options) or Outcome()
        if is_main and as_json:
            print(json.dumps(closing.as_data(options.stage, warnings)), flush=True)
        elif is_main and (not quiet or closing.is_the_product):
            text = closing.text if quiet else closing.as_text(sys.stdout, len(warnings))
            print(text + "\n" * bool(text), end="", flush=True)
    is_told = closing.failure and is_main and not as_json
    return closing.exit_code, f"tdds {options.stage}: error: {closing.failure}" if is_told else ""


def _after_interruption(stage: str, words: Sequence[str]) -> str:
    """Return what is left, and how to go on."""
    if stage in ("plan", "status", "logs"):
        return ""
    if stage == "submit":
        return "; `tdds status RUN` shows what is queued and what runs"
    if stage in ("collect", "retrain", "train", "experiment"):
        left = (
            "the same command goes on from the last checkpoint, or starts over where there is"
            " none yet"
        )
    else:
        left = "nothing half-written was left; the same command starts over"
    return _again(f"; {left}", words)


def _again(text: str, words: Sequence[str]) -> str:
    """Add the command to a text about "the same command", unless only its launcher knows it."""
    again = same_command(words)
    return f"{text}: {again}" if again.startswith("tdds ") else text


def run(extra_commands: Commands = ()) -> None:
    """Run the program and leave the process without tearing the interpreter down: its order against
    the threads of gloo and FFCV would decide the exit code."""
    # no C++ traces about a rank that is gone: one line says it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    open_standard_streams()
    try:
        code = main(extra_commands=extra_commands)
        sys.stdout.flush()
    except InputError as error:
        print(f"tdds: error: {error}", file=sys.stderr)
        code = 2
    except SystemExit as leaving:  # argparse
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
