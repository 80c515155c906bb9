"""Findings of checks on every rank, and the one table of them.

A check is a function of a `Visit`. It may raise, which is a finding, or hang, which is one as well
when its time is up; the checks after it still run. Ranks tell each other what they found by a
`Board`, which needs no process group.
"""

import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from tdds_dist.errors import InputError
from tdds_dist.text import table

if TYPE_CHECKING:
    import torch

    from tdds_dist.distributed.board import Board
    from tdds_dist.distributed.world import World

State = Literal["OK", "SKIP", "WARN", "FAIL"]
_WIDTHS = (40, 52, 34, 4, 58)  # of the columns, characters
_ERROR_CHARACTERS = 400
_LATE_SECONDS = 60.0  # that ranks wait for one that still does its own checks


@dataclass(frozen=True)
class Finding:
    """One line of the table, as one rank has it. `way_out` counts of what is not OK; `number`: what
    is found as a number, of which the smallest of all ranks is shown."""

    what: str
    state: State
    found: str
    wanted: str = ""
    way_out: str = ""
    number: float | None = None


@dataclass
class Visit:
    """The knowledge of a check: this rank, its device, the config, and the numbers that earlier
    checks left for it."""

    board: "Board"
    config: Any  # a Config; None: only what needs none
    device: "torch.device"
    world: "World | None" = None  # once the ranks have met
    left: dict[str, Any] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)  # to be left when all is well
    is_stuck: bool = False  # a collective did not end: no other can follow it

    @property
    def rank(self) -> int:
        """Return the rank of this process."""
        return self.board.rank

    @property
    def hosts(self) -> list[str]:
        """Return the host of every rank, as far as they have said it."""
        names = self.left.get("hosts", {})
        return [names.get(rank, "?") for rank in range(self.board.world_size)]


@dataclass(frozen=True)
class Check:
    """A check by its name. `seconds`: after which it counts as hanging. `needs`: a config, the
    ranks together (all of them call it at the same time), or nothing."""

    name: str
    function: Callable[[Visit], Iterable[Finding]]
    seconds: float = 30.0
    needs: Literal["", "config", "ranks"] = ""


def examine(visit: Visit, checks: Sequence[Check]) -> list[Finding]:
    """Run the checks in their order, on this rank; raise nothing."""
    found: list[Finding] = []
    for check in checks:
        if check.needs == "config" and visit.config is None:
            continue
        if check.needs == "ranks" and (absent := _absent(visit, check)):
            found.append(Finding(check.name, "SKIP", f"not tried: {absent}"))
            continue
        found += _within_its_time(visit, check)
    return [replace(one, way_out="") if one.state == "OK" else one for one in found]


def _absent(visit: Visit, check: Check) -> str:
    """Say why the ranks cannot do a check together; all of them get the same answer, or wait in
    vain no longer than its time."""
    is_ready = visit.world is not None and not visit.is_stuck
    ready = visit.board.share(f"ready for {check.name}", is_ready, _LATE_SECONDS)
    silent = [rank for rank in range(visit.board.world_size) if rank not in ready]
    unfit = sorted(rank for rank, fit in ready.items() if not fit)
    if silent:
        return f"{_ranks(silent)} did not come"
    return f"{_ranks(unfit)} cannot take part" if unfit else ""


def _within_its_time(visit: Visit, check: Check) -> list[Finding]:
    result: list[Finding] = []

    def run() -> None:
        try:
            if visit.device.type == "cuda" and visit.world is not None:
                import torch

                torch.cuda.set_device(visit.device)
            result.extend(check.function(visit))
        except BaseException as error:
            way_out = ""
            if check.needs == "ranks" and not isinstance(error, InputError):
                from tdds_dist.distributed.world import is_lost_peer

                visit.is_stuck = True  # the others are elsewhere by now
                way_out = (
                    "open all ports between the hosts; see what the other ranks said last"
                    if isinstance(error, RuntimeError) and is_lost_peer(error)
                    else "mend on this rank what the message says; others fail here only since"
                    " this one did"
                )
            result.append(Finding(check.name, "FAIL", words_of(error), way_out=way_out))

    thread = threading.Thread(target=run, name=check.name, daemon=True)
    thread.start()
    thread.join(check.seconds)
    if not thread.is_alive():
        return result
    visit.is_stuck = visit.is_stuck or check.needs == "ranks"
    return [
        Finding(
            check.name,
            "FAIL",
            f"no end after {check.seconds:.0f} s",
            way_out="what it waits for hangs: storage, driver or network of this host",
        )
    ]


def words_of(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    if len(text) > _ERROR_CHARACTERS:
        text = f"{text[: _ERROR_CHARACTERS // 2]} ... {text[-_ERROR_CHARACTERS // 2 :]}"
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


# ---- of all ranks


@dataclass(frozen=True)
class Row:
    """One line of the table, the ranks that it is about, and of how many that have made the
    check."""

    finding: Finding
    ranks: tuple[int, ...]
    num_checked: int


def merge(reports: Mapping[int, Sequence[Finding]], num_ranks: int) -> list[Row]:
    """Bring the findings of all ranks together, a line for each check: all that is wrong with it on
    different ranks, or else what is right, with the smallest number."""
    by_name: dict[str, dict[Finding, list[int]]] = {}
    for rank in sorted(reports):
        for finding in reports[rank]:
            by_name.setdefault(finding.what, {}).setdefault(finding, []).append(rank)
    rows = []
    for ranks_of in by_name.values():
        bad = [finding for finding in ranks_of if finding.state in ("WARN", "FAIL")]
        if not bad:
            good = [finding for finding in ranks_of if finding.state == "OK"] or list(ranks_of)
            bad = [min(good, key=lambda finding: finding.number or 0.0)]
        num_checked = len({rank for ranks in ranks_of.values() for rank in ranks})
        rows += [Row(finding, tuple(ranks_of[finding]), num_checked) for finding in bad]
    silent = [rank for rank in range(num_ranks) if rank not in reports]
    if silent:
        missing = Finding(
            "ranks",
            "FAIL",
            f"{_ranks(silent)} did not report",
            f"a report of all {num_ranks}",
            "see what these ranks said last",
        )
        rows.append(Row(missing, tuple(silent), len(silent)))
    return rows


def as_table(rows: Sequence[Row], hosts: Sequence[str]) -> str:
    """Return the lines that people read; long cells go over several of them."""
    lines = [["check", "found", "wanted", "", "way out"]]
    for row in rows:
        finding = row.finding
        found = finding.found
        if len(row.ranks) < row.num_checked:
            found = f"{_ranks(row.ranks)} on {hosts[row.ranks[0]]}: {found}"
        cells = (finding.what, found, finding.wanted, finding.state, finding.way_out)
        columns = [
            textwrap.wrap(cell, width, break_on_hyphens=False)
            for cell, width in zip(cells, _WIDTHS, strict=True)
        ]
        lines += map(list, zip_longest(*columns, fillvalue=""))
    return "\n".join(table(lines, num_heads=1))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
