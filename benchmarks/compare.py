"""Two results of the same benchmark side by side: what became slower, larger or less exact.

A figure counts as worse when its median is worse by more than the tolerance and the two ranges of
its repetitions do not overlap (figures of a single run: by the tolerance alone). On other hardware,
with other settings or on a busy machine only ratios and sizes are judged; times and rates are
shown.

    python -m benchmarks.compare OLD.json NEW.json    # or two folders; exit code 1 if worse
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import files
from tdds_dist.errors import InputError

TOLERANCE = 0.05
_HARDWARE = ("cpu", "num_cpus", "gpu", "threads", "device", "world_size")
_BUSY_LOAD_PER_CPU = 1.5


@dataclass(frozen=True)
class Change:
    """One figure of both results."""

    name: str
    unit: str
    old: float
    new: float
    verdict: str  # worse, better, same, not judged

    @property
    def ratio(self) -> float:
        """New over old; of two zeros 1."""
        if self.old == 0.0:
            return 1.0 if self.new == 0.0 else float("inf")
        return self.new / self.old


def compare(
    old: dict[str, Any], new: dict[str, Any], tolerance: float = TOLERANCE
) -> tuple[list[Change], list[str]]:
    """The figures that both results have, and remarks: what differs, what is in one of them only.

    Raises:
        InputError: results of two benchmarks, or without a figure in common.
    """
    if old["benchmark"] != new["benchmark"]:
        raise InputError(
            f"results of {old['benchmark']} and of {new['benchmark']} have nothing in common; give"
            " two of one benchmark"
        )
    remarks = _differences(old, new)
    is_same_machine = not remarks
    if missing := [name for name in old["metrics"] if name not in new["metrics"]]:
        remarks.append(f"only in the old result: {', '.join(missing)}")
    if added := [name for name in new["metrics"] if name not in old["metrics"]]:
        remarks.append(f"only in the new result: {', '.join(added)}")
    both = [name for name in old["metrics"] if name in new["metrics"]]
    if not both:
        raise InputError("the two results have no figure in common; give two of the same settings")
    changes = []
    for name in both:
        before, after = old["metrics"][name], new["metrics"][name]
        verdict = (
            _verdict(before, after, tolerance)
            if is_same_machine or after["relative"]
            else "not judged"
        )
        changes.append(Change(name, after["unit"], before["value"], after["value"], verdict))
    return changes, remarks


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return why times of the two cannot be compared."""
    was, now = old["provenance"], new["provenance"]
    remarks = [
        f"{key} was {was.get(key)}, is {now.get(key)}"
        for key in _HARDWARE
        if was.get(key) != now.get(key)
    ]
    settings = sorted(old["settings"].keys() & new["settings"].keys())
    remarks += [
        f"setting {key} was {old['settings'][key]}, is {new['settings'][key]}"
        for key in settings
        if old["settings"][key] != new["settings"][key]
    ]
    remarks += [
        f"busy during the {name} run (load average {where['load_average']:.1f} on"
        f" {where['num_cpus']} CPUs)"
        for name, where in (("old", was), ("new", now))
        if where["load_average"] > _BUSY_LOAD_PER_CPU * where["num_cpus"]
    ]
    return remarks


def _verdict(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> str:
    """Say whether a figure moved by more than the tolerance, and beyond the range of its
    repetitions."""
    if new["unit"] != old["unit"] or new["better"] != old["better"]:
        return "not judged"
    is_higher_better = new["better"] == "higher"
    low, high = (1.0 - tolerance) * old["value"], (1.0 + tolerance) * old["value"]
    if new["value"] > high and (
        new["min"] > old["max"] or 1 in (old["repetitions"], new["repetitions"])
    ):
        return "better" if is_higher_better else "worse"
    if new["value"] < low and (
        new["max"] < old["min"] or 1 in (old["repetitions"], new["repetitions"])
    ):
        return "worse" if is_higher_better else "better"
    return "same"


def read(path: Path) -> dict[str, Any]:
    """A result file. InputError when it is none."""
    try:
        result = json.loads(path.read_text())
        if not isinstance(result["metrics"], dict) or not isinstance(result["benchmark"], str):
            raise TypeError("metrics or benchmark are of another kind")
        for key in ("settings", "provenance"):
            result[key].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a result of these benchmarks ({error!r}); give a JSON file that one of"
            " them wrote (older ones have no metrics: measure again)"
        ) from error
    return result


def pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """The two files, or the files of the same name in two folders. InputError when there is
    none."""
    if old.is_dir() != new.is_dir():
        raise InputError(f"{old} and {new} must both be files, or both folders")
    if not old.is_dir():
        return [(old, new)]
    names = sorted(
        {path.name for path in old.glob("*.json")} & {path.name for path in new.glob("*.json")}
    )
    if not names:
        raise InputError(f"{old} and {new} have no result file of the same name; give two files")
    return [(old / name, new / name) for name in names]


def as_text(title: str, changes: list[Change], remarks: list[str]) -> str:
    """Table of one pair, what is worse first."""
    order = ("worse", "better", "same", "not judged")
    rows = [
        (
            change.name,
            f"{change.old:.4g}",
            f"{change.new:.4g}",
            change.unit,
            f"{change.ratio:.3f}",
            change.verdict,
        )
        for change in sorted(changes, key=lambda change: order.index(change.verdict))
    ]
    count = {verdict: sum(change.verdict == verdict for change in changes) for verdict in order}
    summary = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
    return "\n".join(
        [
            f"## {title}",
            "",
            *(f"* {remark}" for remark in remarks),
            *([""] if remarks else []),
            files.table([("figure", "old", "new", "unit", "new/old", "verdict"), *rows]),
            "",
            summary,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 when anything is worse, 2 when nothing can be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="What became slower or larger.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="result file, or folder of them")
    parser.add_argument("new", type=Path, help="the same, newer")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="change of a median that counts"
    )
    options = parser.parse_args(arguments)
    try:
        if not 0.0 <= options.tolerance < 1.0:
            raise InputError(
                f"--tolerance={options.tolerance:g} must lie in [0, 1), e.g. 0.05 for five percent"
            )
        is_worse, left_out = False, []
        found = pairs(options.old, options.new)
        for old, new in found:
            try:
                results = read(old), read(new)
            except InputError as error:
                if len(found) == 1:
                    raise
                left_out.append(str(error))
                continue
            changes, remarks = compare(*results, options.tolerance)
            print(as_text(new.stem, changes, remarks))
            is_worse = is_worse or any(change.verdict == "worse" for change in changes)
        for message in left_out:
            print(f"left out: {message}")
        if found and len(left_out) == len(found):
            raise InputError("no two files could be compared; see above")
    except InputError as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        return 2
    return int(is_worse)


if __name__ == "__main__":
    sys.exit(main())
