"""The messages of a stage while it runs: one bar on a terminal, plain lines elsewhere, messages above them; and the same
messages in the run's log.

All of it goes to standard error. Colours are for terminals only; NO_COLOR and TERM=dumb switch them off.
TDDS_PROGRESS_SECONDS (default: 10) is the longest time without a line of progress, and the shortest between two epochs that are
shown.
"""

import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from tdds_dist.text import duration

LINE_SECONDS = 10.0  # between lines of progress, unless TDDS_PROGRESS_SECONDS says otherwise
_CODES = {"bold": 1, "red": 31, "green": 32, "yellow": 33}
_HEADS = {"warning: ": "yellow", "error: ": "red"}


class _Manner:
    """The manner in which this process writes messages."""

    quiet = False
    warnings: list[str] = []  # noqa: RUF012 - one per process, replaced by `speaking`


_manner = _Manner()


@contextmanager
def speaking(quiet: bool = False) -> Iterator[list[str]]:
    """Until left, this process says only warnings and errors when `quiet`. Yields the warnings, as they come."""
    before = _manner.quiet, _manner.warnings
    _manner.quiet, _manner.warnings = quiet, []
    try:
        yield _manner.warnings
    finally:
        _manner.quiet, _manner.warnings = before


def is_terminal(stream: TextIO) -> bool:
    """Say whether the stream is a terminal that can show more than lines."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """Return the text as this stream shows it: coloured (bold, red, green, yellow) or as it is."""
    if os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"\033[{_CODES[colour]}m{text}\033[0m"


def say(message: str, log: Path | None = None, *, urgent: bool = False) -> None:
    """Write one line to the screen (standard error, above a bar if there is one) and to the log file.

    One that starts with `warning: ` is counted, and said also when this process is quiet, as `urgent` ones are.
    """
    head = next((head for head in _HEADS if message.startswith(head)), "")
    if head == "warning: ":
        _manner.warnings.append(message.removeprefix(head))
    if head or urgent or not _manner.quiet:
        shown = paint(head.rstrip(), _HEADS[head], sys.stderr) + " " + message.removeprefix(head) if head else message
        tqdm.write(shown, file=sys.stderr)
    if log is not None:
        note(message, log)


def announce(message: str, log: Path | None = None) -> None:
    """Write the line that a stage begins with, `stage name: what it is about to do`."""
    if not _manner.quiet:
        head, colon, rest = message.partition(":")
        tqdm.write(paint(head, "bold", sys.stderr) + colon + rest, file=sys.stderr)
    if log is not None:
        note(message, log)


def note(message: str, log: Path) -> None:
    """Write one line to the log file alone. A log that cannot be written (disk full) stops nothing."""
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


class Progress:
    """Progress of a stage: `total` units, `done` of which an earlier start did. Silent unless `visible` (rank 0).

    A bar on a terminal, elsewhere a line every LINE_SECONDS, of the same content: share, counts and speed unless `unit` is
    empty, what `note` says, and the time left of the whole stage at the mean speed since the first step, which often pays for
    what is loaded or compiled only once.
    """

    def __init__(self, title: str, total: int, unit: str, visible: bool, done: int = 0, note: str = ""):
        self._title, self._total, self._unit = title, total, unit
        self._done = done
        self._first_step: tuple[float, int] | None = None  # when it was done, and what was done by then
        self._note = note
        self._patience = _line_seconds()
        self._started = self._last_line = time.monotonic()
        self._last_told: float | None = None
        self._between = 0.0  # seconds from one told line to the next, where that is less than a line's time
        visible = visible and not _manner.quiet
        self._plain = visible and not is_terminal(sys.stderr)
        counts = "{n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}{postfix}" if unit else "{note}"
        self._bar = _Bar(note, total=total, initial=done, desc=title, unit=f" {unit}", leave=False, dynamic_ncols=True,
                         smoothing=0, bar_format=f"{{desc}} {{percentage:3.0f}} %|{{bar}}| {counts}, {{remaining}} left",
                         disable=not visible or self._plain, file=sys.stderr)

    def advance(self, num: int = 1) -> None:
        """Count `num` more units."""
        self._done += num
        self._bar.update(num)
        if self._first_step is None:
            self._first_step = time.monotonic(), self._done
            self._bar.measure_from_here()
        if self._plain and time.monotonic() - self._last_line >= self._patience + self._between:
            self._last_line = time.monotonic()
            say(self.line())

    def note(self, text: str, *, now: bool = False) -> None:
        """Set the short state behind the bar; shown `now`, or with the next step."""
        self._note = text
        self._bar.note = text
        self._bar.set_postfix_str(text, refresh=now)

    def line(self) -> str:
        """Return all of it in words."""
        parts = [self._note] if self._note else []
        since, done = self._first_step or (self._started, self._done)
        seconds, new = time.monotonic() - since, self._done - done
        if self._unit:
            parts.insert(0, f"{self._done:,} of {self._total:,} {self._unit}")
            if new:
                parts.insert(1, f"{new / seconds:.3g} {self._unit}/s" if new < 10 * seconds else
                             f"{new / seconds:,.0f} {self._unit}/s")
        parts.insert(0, f"{100 * self._done // max(1, self._total)} %")
        if new:
            parts.append(f"{duration(seconds * max(0, self._total - self._done) / new)} left")
        return f"{self._title}: {', '.join(parts)}"

    def tell(self, line: str, log: Path | None, *, always: bool = False) -> None:
        """Write a result on the way (an epoch) to the log; to the screen the first one, those that are `always` told, and of
        others no more than one in LINE_SECONDS."""
        now = time.monotonic()
        is_due = always or self._last_told is None or now - self._last_told >= self._patience
        if is_due:
            since = now - (self._started if self._last_told is None else self._last_told)
            # Short epochs: the next of these lines comes soon enough, and no other is wanted in between.
            self._between = since if since < 2 * self._patience else 0.0
            self._last_told = self._last_line = now
            say(line, log)
        elif log is not None:
            note(line, log)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Bar(tqdm):
    """A bar that shows the text of `Progress.note` where the format wants it, without the comma that tqdm puts before it."""

    def __init__(self, note: str, **options: Any):
        self.note = note
        super().__init__(**options)

    def measure_from_here(self) -> None:
        """Let speed and time left be those of what comes now."""
        if not self.disable:
            self.start_t, self.initial = time.time(), self.n

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "note": self.note}


def _line_seconds() -> float:
    """Read TDDS_PROGRESS_SECONDS; take the default where it is no number of seconds."""
    text = os.environ.get("TDDS_PROGRESS_SECONDS", "")
    seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else math.nan
    return seconds if math.isfinite(seconds) else LINE_SECONDS
