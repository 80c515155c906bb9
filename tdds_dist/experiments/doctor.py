"""Stage `doctor`: what would stop or slow a run on these ranks, found in a minute and before it
starts.

Every rank makes the same checks in the same order and reports; rank 0 has the table. Checks of the
network come first, since they are the likeliest to fail and others build on them.
"""

import logging
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from tdds_dist.config.run import Config
from tdds_dist.distributed.board import Board
from tdds_dist.errors import InputError
from tdds_dist.experiments import doctor_machine as machine
from tdds_dist.experiments import doctor_run as of_run
from tdds_dist.experiments.findings import (
    Check,
    Finding,
    Visit,
    as_table,
    examine,
    merge,
)

_REPORT_SECONDS = 90.0  # that rank 0 waits for the last report
# that the others stay when they have found no rank 0, which may be at its own checks
_STAY_SECONDS = 2 * _REPORT_SECONDS
_LEAVE_SECONDS = 2.0  # that rank 0 has to print before a launcher sees others leave

log = logging.getLogger("tdds")

CHECKS = (
    Check("versions", machine.versions),
    Check("interface", machine.interface),
    Check("process group", machine.meeting, 2 * machine.MEETING_SECONDS),
    Check("collectives", machine.exchanges, 1.5 * machine.MEETING_SECONDS, "ranks"),
    Check("links", machine.links, 1.5 * machine.MEETING_SECONDS, "ranks"),
    Check("time limits", machine.time_limits, 1.5 * machine.MEETING_SECONDS, "ranks"),
    Check("clocks", machine.clocks),
    Check("device", machine.devices),
    Check("contexts", machine.contexts),
    Check("CPUs", machine.processors),
    Check("host memory", machine.host_memory),
    Check("C compiler", machine.compiler, 40.0),
    Check("kernel", of_run.kernel, 90.0),
    Check("data files", of_run.data_files, 60.0, "config"),
    Check("run directory", of_run.run_directory, 60.0, "config"),
    Check("room", of_run.room, 30.0, "config"),
    Check("training", of_run.network_speed, 60.0, "config"),
    Check("traffic", of_run.traffic, 10.0, "config"),
    Check("no wait in a step", of_run.waits, 1.5 * of_run.COMPILE_SECONDS, "ranks"),
    Check("decoding", of_run.decoding, 60.0, "config"),
)


def doctor(
    config: Config | None, more: Iterable[Check] = ()
) -> tuple[str, dict[str, Any], list[str]]:
    """Check everything; return the table, the same for programs, and the names of the checks that
    failed on any rank (on rank 0; on others the last only).

    `more`: checks of the caller, after all others; the same on every rank.
    """
    device = config.run.device if config is not None else "auto"
    has_cuda = torch.cuda.is_available() and device != "cpu"
    # the one that the process group will give it
    here = torch.device("cuda" if has_cuda else "cpu")
    board = Board(machine.COMING_SECONDS)
    if board.problem and not board.is_main:
        # Rank 0, which has the table, will not hear of this one, and launchers end all ranks when
        # the first leaves.
        log.warning(
            f"rank {board.rank} on {socket.gethostname()}: {board.problem}; stays"
            f" {_STAY_SECONDS:.0f} s, so that rank 0 can print what it finds"
        )
        time.sleep(_STAY_SECONDS)
        raise InputError(board.problem, shared=True)  # it has been said
    visit = Visit(board, config, here)
    visit.left["hosts"] = board.share("host", socket.gethostname(), machine.MEETING_SECONDS)
    started = time.perf_counter()
    return _report(visit, examine(visit, (*CHECKS, *more)), started)


def _report(
    visit: Visit, found: list[Finding], started: float
) -> tuple[str, dict[str, Any], list[str]]:
    board = visit.board
    board.put("report", [asdict(finding) for finding in found])
    if not board.is_main:
        failed = board.collect("verdict", 2 * _REPORT_SECONDS, [0]).get(0)
        _leave(visit)
        time.sleep(_LEAVE_SECONDS)
        return "", {}, ["rank 0"] if failed is None else failed
    reports = board.collect("report", _REPORT_SECONDS)
    rows = merge(
        {rank: [Finding(**line) for line in lines] for rank, lines in reports.items()},
        board.world_size,
    )
    failed = list(dict.fromkeys(row.finding.what for row in rows if row.finding.state == "FAIL"))
    board.put("verdict", failed)
    _leave(visit)
    data = {
        "stage": "doctor",
        "num_ranks": board.world_size,
        "hosts": visit.hosts,
        "checks": [asdict(row.finding) | {"ranks": list(row.ranks)} for row in rows],
        "failed": failed,
        "seconds": round(time.perf_counter() - started, 1),
        "exit_code": 2 if failed else 0,
    }
    return as_table(rows, visit.hosts), data, failed


def _leave(visit: Visit) -> None:
    """Leave the process group in order, where every rank can."""
    fit = visit.board.share("leave", visit.world is not None and not visit.is_stuck, _LEAVE_SECONDS)
    if len(fit) == visit.board.world_size and all(fit.values()):
        examine(visit, [Check("leaving", _close, _REPORT_SECONDS)])


def _close(visit: Visit) -> list[Finding]:
    visit.stack.close()
    return []
