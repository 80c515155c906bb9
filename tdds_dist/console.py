"""The messages of a stage while it runs: one bar on a terminal, plain lines elsewhere, messages
above them; and the same messages in the run's log.

Messages go through the logger `tdds`: info, warnings, errors, and debug for the run's log alone.
`tdds` itself shows them by `speaking`; a program that uses the package is free to set the logger up
as it likes.

All of it goes to standard error. Colours are for terminals only; NO_COLOR and TERM=dumb switch them
off. TDDS_PROGRESS_SECONDS (default: 10) is the longest time without a line of progress, and the
shortest between two epochs that are shown.
"""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from tdds_dist.text import duration

LINE_SECONDS = 10.0  # between lines of progress, unless TDDS_PROGRESS_SECONDS says otherwise
_CODES = {"bold": 1, "red": 31, "green": 32, "yellow": 33}
# `extra` of the message that a stage begins with, `stage name: what it is about to do`
HEADING = {"is_heading": True}
log = logging.getLogger("tdds")


class _Console(logging.Handler):
    """Writes messages to standard error, above a bar if there is one, and keeps the warnings."""

    def __init__(self, quiet: bool):
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self.is_quiet = quiet
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno == logging.WARNING:
            self.warnings.append(text)
            text = f"{paint('warning:', 'yellow', sys.stderr)} {text}"
        elif hasattr(record, "is_heading"):
            head, colon, rest = text.partition(":")
            text = paint(head, "bold", sys.stderr) + colon + rest
        _write(text)


class LogFile(logging.Handler):
    """Writes all messages to a file, with the time, and keeps them. A file that cannot be written
    (disk full) stops nothing."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = "warning: " * (record.levelno == logging.WARNING) + record.getMessage()
        self.lines.append(line)
        with suppress(OSError), self._path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


@contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """Give the messages of this process to `handler`, beside those attached before, until left."""
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def speaking(quiet: bool = False) -> Iterator[list[str]]:
    """Show the messages of this process until left; when `quiet`, warnings and errors only. Yield
    the warnings as they come."""
    console, propagate = _Console(quiet), log.propagate
    log.propagate = False  # said once, and by nobody else
    try:
        with attached(console):
            yield console.warnings
    finally:
        log.propagate = propagate


def _write(line: str) -> None:
    """Write a line to standard error, above a bar; nowhere in a program that has closed it."""
    if sys.stderr is not None:
        tqdm.write(line, file=sys.stderr)


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether the stream is a terminal that can show more than lines."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO | None) -> str:
    """Return the text as this stream shows it: coloured (bold, red, green, yellow) or as it is."""
    if os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"\033[{_CODES[colour]}m{text}\033[0m"


class Progress(AbstractContextManager["Progress"]):
    """Progress of a stage: `total` units, `done` of which an earlier start did. Silent unless
    `visible` (rank 0).

    A bar on a terminal, elsewhere a line every LINE_SECONDS, of the same content: share, counts and
    speed unless `unit` is empty, what `note` says, and the time left of the whole stage at the mean
    speed since the first step, which often pays for what is loaded or compiled only once.
    """

    def __init__(
        self, title: str, total: int, unit: str, visible: bool, done: int = 0, note: str = ""
    ):
        self._title, self._total, self._unit = title, total, unit
        self._done = done
        # when it was done, and what was done by then
        self._first_step: tuple[float, int] | None = None
        self._note = note
        self._patience = _line_seconds()
        self._started = self._last_line = time.monotonic()
        self._last_told: float | None = None
        # seconds from one told line to the next, where that is less than a line's time
        self._between = 0.0
        visible = visible and not any(
            isinstance(one, _Console) and one.is_quiet for one in log.handlers
        )
        self._plain = visible and not is_terminal(sys.stderr)
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit=f" {unit}",
            leave=False,
            dynamic_ncols=True,
            smoothing=0,
            bar_format=self._format(),
            disable=not visible or self._plain,
            file=sys.stderr,
        )

    def advance(self, num: int = 1) -> None:
        """Count `num` more units."""
        self._done += num
        self._bar.update(num)
        if self._first_step is None:
            self._first_step = time.monotonic(), self._done
            # speed and time left are those of what comes now
            self._bar.start_t, self._bar.initial = time.time(), self._bar.n
        if self._plain and time.monotonic() - self._last_line >= self._patience + self._between:
            self._last_line = time.monotonic()
            _write(self.line())

    def note(self, text: str, *, now: bool = False) -> None:
        """Set the short state behind the bar; shown `now`, or with the next step."""
        self._note = text
        self._bar.bar_format = self._format()
        if now:
            self._bar.refresh()

    def line(self) -> str:
        """Return all of it in words."""
        parts = [self._note] if self._note else []
        since, done = self._first_step or (self._started, self._done)
        seconds, new = time.monotonic() - since, self._done - done
        if self._unit:
            parts.insert(0, f"{self._done:,} of {self._total:,} {self._unit}")
            if new:
                form = ".3g" if new < 10 * seconds else ",.0f"
                parts.insert(1, f"{new / seconds:{form}} {self._unit}/s")
        parts.insert(0, f"{100 * self._done // max(1, self._total)} %")
        if new:
            parts.append(f"{duration(seconds * max(0, self._total - self._done) / new)} left")
        return f"{self._title}: {', '.join(parts)}"

    def tell(self, line: str, *, always: bool = False) -> None:
        """Write a result on the way (an epoch) to the log; to the screen the first one, those that
        are `always` told, and of others no more than one in LINE_SECONDS."""
        now = time.monotonic()
        is_due = always or self._last_told is None or now - self._last_told >= self._patience
        if is_due:
            since = now - (self._started if self._last_told is None else self._last_told)
            # Short epochs: the next of these lines comes soon enough, and no other is wanted in
            # between.
            self._between = since if since < 2 * self._patience else 0.0
            self._last_told = self._last_line = now
        log.log(logging.INFO if is_due else logging.DEBUG, line)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _format(self) -> str:
        """Return what tqdm fills in."""
        counts = ["{n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}"] if self._unit else []
        note = [self._note.replace("{", "{{").replace("}", "}}")] if self._note else []
        return (
            f"{{desc}} {{percentage:3.0f}} %|{{bar}}| {', '.join(counts + note)}, {{remaining}}"
            " left"
        )


def _line_seconds() -> float:
    """Read TDDS_PROGRESS_SECONDS; take the default where it is no number of seconds."""
    text = os.environ.get("TDDS_PROGRESS_SECONDS", "")
    seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else math.nan
    return seconds if math.isfinite(seconds) else LINE_SECONDS
