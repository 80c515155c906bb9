"""Numbers, sizes, durations and small tables as text for people."""
import os
import shlex
import sys
from collections.abc import Iterable, Sequence

import numpy as np

MISSING = "–"


# ------------------------------------------------------------------------------- numbers as text, for page and terminal


def count(value: float | None) -> str:
    """Write 1281167 as 1,281,167."""
    return MISSING if value is None else f"{value:,.0f}"


def percent(rate: float | None) -> str:
    """Write a fraction as percent: 0.7 as 70 %."""
    return MISSING if rate is None else f"{100 * rate:.4g} %"


def decimal(value: float | None, digits: int = 2) -> str:
    """Write a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """Write two decimals with their sign."""
    return MISSING if value is None else f"{value:+.2f}".replace("-", "−")


def plus_minus(mean: float | None, std: float | None) -> str:
    """Write a mean, with its standard deviation where there is one."""
    return decimal(mean) if std is None else f"{decimal(mean)} ± {decimal(std)}"


def mean_std(values: Iterable[float]) -> tuple[float, float | None]:
    """Return the mean, and the sample standard deviation where there are two values or more."""
    known = np.array(list(values), dtype=np.float64)
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else None


def markdown_table(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(cell.ljust(width) if number == 0 else cell.rjust(width)
                              for number, (cell, width) in enumerate(zip(line, widths, strict=True))) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) if number == 0 else "-" * (width + 1) + ":"
                          for number, width in enumerate(widths)) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def size_text(num_bytes: float) -> str:
    """Write a number of bytes in the unit that keeps it short."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"


def command(*words: object, ranks: int = 1) -> str:
    """Return a command of ours, ready to be typed; on several ranks by torchrun, on one node."""
    start = ("torchrun", "--nproc-per-node", str(ranks), "-m", "tdds_dist") if ranks > 1 else ("tdds",)
    return shlex.join([*start, *map(str, words)])


def same_command(arguments: Sequence[str] | None) -> str:
    """Return what was typed to get here: the command, or, where a launcher has started this process, that it was this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "the same command on every rank"
    return command(*(sys.argv[1:] if arguments is None else arguments))


def duration(seconds: float) -> str:
    """Write a duration: 0.4 s, 32 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
