"""Numbers, sizes, durations, commands and tables as text for people: one form of each, for
terminal, page and files."""

import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence

import numpy as np

MISSING = "–"  # a number that is not known


# ---- numbers


def count(value: float | None) -> str:
    """Write 1281167 as 1,281,167."""
    return MISSING if value is None else f"{value:,.0f}"


def percent(rate: float | None) -> str:
    """Write a fraction as percent: 0.7 as 70 %."""
    return MISSING if rate is None else f"{100 * rate:.4g} %"


def decimal(value: float | None, digits: int = 2) -> str:
    """Write a fixed number of decimals; a nan is missing, and what rounds to zero has no sign."""
    return MISSING if value is None or value != value else f"{value:z.{digits}f}"


def signed(value: float | None) -> str:
    """Write two decimals with their sign."""
    return MISSING if value is None else f"{value:+.2f}".replace("-", "−")


def plus_minus(mean: float | None, std: float | None, digits: int = 2) -> str:
    """Write a mean, with its standard deviation where there is one."""
    text = decimal(mean, digits)
    return text if std is None else f"{text} ± {decimal(std, digits)}"


def mean_std(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Return the mean of the values that are known, and their sample standard deviation where there
    are two or more; else None.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    mean = float(known.mean()) if len(known) else None
    return mean, float(known.std(ddof=1)) if len(known) > 1 else None


def size_text(num_bytes: float) -> str:
    """Write bytes in powers of 1000: 999 B, 640.6 MB, 80 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """Write a duration: 0.4 s, 32 s, 4 min 10 s, 2 h 5 min."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def printable(name: str) -> str:
    """Return a name with what no terminal can show as escapes: line feeds, bytes that are no
    UTF-8."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name)


# ---- tables


def table(
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    *,
    gap: str = "  ",
    num_heads: int = 0,
) -> list[str]:
    """Align the cells of rows; the columns `right` stand at their right side. A rule follows
    `num_heads` rows, if any."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if num_heads:
        rows = [*rows[:num_heads], ["-" * width for width in widths], *rows[num_heads:]]
    return [
        gap.join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown with one head; all columns but the first stand at their right
    side."""
    head, *lines = (f"| {line} |" for line in table(rows, range(1, len(rows[0])), gap=" | "))
    first, *others = re.sub(r"[^|]", "-", head).strip("|").split("|")
    rule = "|".join(["", first, *(f"{dashes[:-1]}:" for dashes in others), ""])
    return "\n".join([head, rule, *lines])


# ---- commands


def command(*words: object, ranks: int = 1) -> str:
    """Return a `tdds` command, ready to be typed; on several ranks by torchrun, on one node."""
    start = (
        ("torchrun", "--nproc-per-node", str(ranks), "-m", "tdds_dist") if ranks > 1 else ("tdds",)
    )
    return shlex.join([*start, *map(str, words)])


def same_command(arguments: Sequence[str] | None) -> str:
    """Return what was typed to get here: the command, or, where a launcher has started this
    process, that it was this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "the same command on every rank"
    return command(*(sys.argv[1:] if arguments is None else arguments))
