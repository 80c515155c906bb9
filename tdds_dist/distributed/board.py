"""Messages between ranks through the store of the launcher, where the process group itself is in
doubt.

The store is plain TCP to one host (MASTER_ADDR:MASTER_PORT); no interface of gloo or NCCL has a
part in it, nothing hangs longer than it is told to, and a rank that is late or gone is left out of
an answer. For programs that look for faults; training talks by `collectives`.
"""

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_POLL_SECONDS = 0.05
_SILENT_SECONDS = 1.0  # for a rank that was waited for in vain before
_ROUNDS = 8  # of messages to and fro, of which the fastest tells the difference of two clocks


class Board:
    """A board with what every rank has said, by topic. Without a launcher: a board of one rank.

    Where the ranks do not find each other within `seconds`, `problem` says why, and the others are
    silent. So they are where the store is lost later on, with the host that has it.

    Protocol: all ranks make it, and then ask for the same topics in the same order.
    """

    def __init__(self, seconds: float):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.problem = ""
        self._silent: set[int] = set()
        self._store: dist.Store = dist.HashStore()
        if "RANK" not in os.environ:
            return
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        except (dist.DistError, RuntimeError, ValueError) as error:
            where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            self.problem = (
                f"not all {self.world_size} ranks came to {where} within {seconds:.0f} s"
                f" ({' '.join(str(error).split())[:200]}); start all of them, on hosts that reach"
                " each other"
            )
            self._stay_alone()
            return
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"tdds/board/{restart}", store)

    @property
    def is_main(self) -> bool:
        """Say whether this is rank 0."""
        return self.rank == 0

    def share(self, topic: str, value: Any, seconds: float) -> dict[int, Any]:
        """Put up this rank's value (as JSON); return those of all ranks that came within `seconds`,
        by rank."""
        self.put(topic, value)
        return dict(sorted(({self.rank: value} | self.collect(topic, seconds)).items()))

    def put(self, topic: str, value: Any) -> None:
        """Put up this rank's value and wait for nobody."""
        try:
            self._store.set(f"{topic}/{self.rank}", json.dumps(value))
        except (dist.DistError, RuntimeError):
            self._stay_alone()

    def collect(
        self, topic: str, seconds: float, ranks: Iterable[int] | None = None
    ) -> dict[int, Any]:
        """Return what these ranks, by default all, have put up, by rank; only what comes within
        `seconds`."""
        started, found = time.monotonic(), dict[int, Any]()
        waiting = list(range(self.world_size) if ranks is None else ranks)
        while waiting:
            passed = time.monotonic() - started
            for rank in list(waiting):
                if (text := self._look(f"{topic}/{rank}")) is not None:
                    found[rank] = json.loads(text)
                    self._silent.discard(rank)
                    waiting.remove(rank)
                elif passed > (min(seconds, _SILENT_SECONDS) if rank in self._silent else seconds):
                    self._silent.add(rank)
                    waiting.remove(rank)
            time.sleep(_POLL_SECONDS * bool(waiting))
        return dict(sorted(found.items()))

    def _look(self, key: str) -> bytes | None:
        """Return what the store has by now; None where it has nothing, or is lost."""
        try:
            return self._store.get(key) if self._store.check([key]) else None
        except (dist.DistError, RuntimeError):
            self._stay_alone()
            return None

    def _stay_alone(self) -> None:
        """Go on with a board of this rank's own, on which nobody else will say anything."""
        self._silent = set(range(self.world_size))  # its own values of before are lost, too
        self._store = dist.HashStore()

    def clock_offsets(self, seconds: float) -> dict[int, tuple[float, float]]:
        """Measure how far the clock of every rank is ahead of rank 0's; return (seconds, give or
        take seconds) by rank, on rank 0. The time of a message to and fro bounds the error.

        Protocol: every rank calls it; rank 0 asks one rank after the other, but for those that did
        not come.
        """
        present, end = self.share("clock", True, seconds), timedelta(seconds=seconds)
        if self.rank != 0:
            for number in range(_ROUNDS):
                self._store.wait([f"clock/{self.rank}/{number}/asked"], end)
                self._store.set(f"clock/{self.rank}/{number}/said", repr(time.time()))
            return {}
        offsets = {0: (0.0, 0.0)}
        for rank in sorted(present.keys() - {0}):
            rounds = []
            for number in range(_ROUNDS):
                before = time.time()
                self._store.set(f"clock/{rank}/{number}/asked", "")
                self._store.wait([f"clock/{rank}/{number}/said"], end)
                after = time.time()
                theirs = float(self._store.get(f"clock/{rank}/{number}/said"))
                rounds.append(((after - before) / 2, theirs - (before + after) / 2))
            around, offset = min(rounds)
            offsets[rank] = offset, around
        return offsets
