"""What a person sees while a stage runs: a bar on a terminal, plain lines elsewhere, and the same lines in the run's log."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0  # between progress lines when there is no terminal


def say(message: str, log: Path | None = None) -> None:
    """One line to the screen (standard error, above a bar if there is one) and to the log file."""
    tqdm.write(message, file=sys.stderr)
    if log is not None:
        note(message, log)


def note(message: str, log: Path) -> None:
    """One line to the log file alone. A log that cannot be written (disk full) stops nothing."""
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


class Progress:
    """Progress of `total` units. Silent unless `visible` (rank 0)."""

    def __init__(self, title: str, total: int, unit: str, visible: bool):
        self._title, self._total, self._unit = title, total, unit
        self._done, self._last_line = 0, time.monotonic()
        self._plain = visible and not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=title, unit=unit, leave=False, dynamic_ncols=True,
                         disable=not visible or self._plain, file=sys.stderr)

    def advance(self, num: int = 1) -> None:
        """Count `num` more units."""
        self._done += num
        self._bar.update(num)
        if self._plain and time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            say(f"{self._title}: {self._done} of {self._total} {self._unit} ({100 * self._done // max(1, self._total)} %)")

    def note(self, text: str) -> None:
        """Short state behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
