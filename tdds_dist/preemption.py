"""Signals that ask a run to leave: SIGTERM, SIGUSR2 (submitit's time-out and preemption) and SIGINT.

A handler does nothing but note the request: saving inside one corrupts or hangs now and then. Whoever trains looks at
`requested` at step boundaries, agrees with the other ranks, saves, and raises `Preempted`. Where nobody looks (start-up, the
passes after training) there is nothing to save either, and the signal ends the program at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_RESUME = 75  # EX_TEMPFAIL: the run is not finished; the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_ONE_KEYSTROKE_SECONDS = 1.0  # a launcher passes on the Ctrl-C that the terminal has sent to all


class Preempted(BaseException):
    """The run was asked to leave. `agreed`: all ranks raise it at the same point, with their state saved."""

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


class Interruption:
    """The signals of this process while it is entered (`with`); the main thread only. `requested` names the first one."""

    def __init__(self) -> None:
        self.requested = ""
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

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, somebody looks at `requested` soon and often."""
        self._is_watched = True
        try:
            yield
        finally:
            self._is_watched = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._is_watched:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Preempted(f"{name}: not saved here; run the same command again, and it goes on from its last checkpoint")
        if not self.requested:
            self.requested, self._first_at = name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first_at > _ONE_KEYSTROKE_SECONDS:
            raise KeyboardInterrupt
