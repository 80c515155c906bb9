"""`status.json` of a run directory: where its stage is, for those who look from outside (`tdds status`, a launcher).

Written by the main rank every few seconds. It decides nothing: a run that goes on never reads it, and it is not synced.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

BEAT_SECONDS = 5.0


class Pulse:
    """Of one stage in one run directory; silent on other ranks than the main one."""

    def __init__(self, path: Path, stage: str, world_size: int, is_main: bool):
        self._path, self._is_main = path, is_main
        self._record: dict[str, Any] = {
            "stage": stage, "state": "starting", "epoch": 0, "epochs": 0, "step": 0, "steps": 0, "images_per_second": None,
            "eta_seconds": None, "updated": 0.0, "host": socket.gethostname(), "pid": os.getpid(), "world_size": world_size,
            "job": os.environ.get("TDDS_JOB", ""), "message": ""}
        self._last = -BEAT_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether somebody who looks would see something old."""
        return self._is_main and time.monotonic() - self._last >= BEAT_SECONDS

    def beat(self, state: str, **fields: Any) -> None:
        """Write now. `state`: starting, training, scoring, finished, failed, or stopped: asked to leave, and able to go on.
        `epoch` counts finished epochs."""
        if not self._is_main:
            return
        self._last = time.monotonic()
        self._record |= {"state": state, "updated": time.time(), **fields}
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a full disk ends nothing here
            try:
                temporary.write_text(json.dumps(self._record) + "\n")
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
