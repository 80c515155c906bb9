"""Requests to leave: SIGTERM, SIGUSR2 (submitit's time-out and preemption), SIGINT, and the end of
the job's time.

A handler only notes the request: saving inside one corrupts or hangs now and then. The training
loop reads `requested` at step boundaries, agrees with the other ranks, saves, and raises
`Preempted`. Outside of it (start-up, the passes after training) there is nothing to save, and the
signal ends the program at once.

A launcher that knows when the job will be ended says so in TDDS_LEAVE_AT (seconds since 1970): the
run saves and leaves then by itself, whether or not a signal comes in time.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_RESUME = 75  # EX_TEMPFAIL: the run is not finished; the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
# stands in the message of a process that left without agreeing with the others
NOT_SAVED = "not saved here"
TIME_LIMIT = "time limit"  # stands where the name of a signal would
_ONE_KEYSTROKE_SECONDS = 1.0  # a launcher passes on the Ctrl-C that the terminal has sent to all


class Preempted(BaseException):
    """The run was asked to leave. `agreed`: all ranks raise it at the same point, with their state
    saved."""

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


class Interruption:
    """The signals of this process while it is entered (`with`); the main thread only. `received`
    names all that came, `leave_at` is when it is to leave without one (seconds since 1970)."""

    def __init__(self) -> None:
        self.received: set[str] = set()
        self.leave_at = math.inf
        with suppress(ValueError):  # a launcher that is broken must not end runs
            self.leave_at = float(os.environ.get("TDDS_LEAVE_AT", "inf"))
        self._first = ""
        self._is_watched = False
        self._before: dict[signal.Signals, Any] = {}
        self._first_at = 0.0

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def requested(self) -> str:
        """Return the reason to leave: the first signal, or the time limit; empty while there is
        none."""
        return self._first or (TIME_LIMIT if time.time() >= self.leave_at else "")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Say that inside, the program looks at `requested` soon and often."""
        self._is_watched = True
        try:
            yield
        finally:
            self._is_watched = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.received.add(name)
        if not self._is_watched:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Preempted(
                f"{name}: {NOT_SAVED}; run the same command again, and it goes on from its last"
                " checkpoint"
            )
        if not self._first:
            self._first, self._first_at = name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first_at > _ONE_KEYSTROKE_SECONDS:
            raise KeyboardInterrupt
