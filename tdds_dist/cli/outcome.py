"""The last lines of a stage: files, numbers, warnings, and the command that comes next; for people,
or as JSON.

Lines that others look for: `wrote PATH`, `next: COMMAND`.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tdds_dist.console import paint
from tdds_dist.text import duration, size_text

EXIT_TERMINATED = 143  # by SIGTERM, where there is nothing to save
_WIDTH = 110
_JOINED = "\xa0"  # a space that breaks no line, between a number and its words


# Every number that a stage may close with: its name in the JSON, and how it reads.
_WORDS: dict[str, Callable[[Any], str]] = {
    "images": "{:,} images".format,
    "kept": "{:,} kept".format,
    "classes": "{:,} classes".format,
    "left_out": lambda num: f"{num:,} file{'s' * (num != 1)} left out",
    "changed_labels": "{:,} labels changed".format,
    "relabelled": "{:,} images relabelled".format,
    "corrupted_images": "{:,} images corrupted".format,
    "called_wrong": "{:,} labels called wrong".format,
    "checked": "{:,} images checked".format,
    "scores": "{} scores".format,
    "coresets": lambda num: f"{num} coresets" if num > 1 else "",
    "retrainings": "{} retrainings".format,
    "failed": "{} failed".format,
    "jobs": "{} jobs".format,
    "epochs": "{} epochs".format,
    "images_seen": "{:,} images seen".format,
    "images_of_full": "{:,} of a full training".format,
    "seconds": duration,
    "images_per_second": "{:,.0f} images/s".format,
    "final_top1": "final top-1 {:.2f} %".format,
    "best_top1": "best {:.2f} %".format,
    "memory_bytes": lambda num: f"peak memory {size_text(num)}",
    "scoring_share": lambda share: f"scoring {100 * share:.1f} % of training",
}


@dataclass(frozen=True)
class Outcome:
    """The end of a stage. `there`: files of an earlier run, left as they are. `numbers` by the
    names above. `text` is shown before the lines of files and numbers, or in their place where it
    `says_all`; also by a stage that is quiet where it is all that was asked for (`is_the_product`).
    `rows` is the table of the text or the notes, for JSON. `data` is what JSON holds in the place
    of all this, where a stage has an object of its own. `failure` says in one line why a stage that
    has said everything leaves with another exit code than 0."""

    wrote: Sequence[Path] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    next: str = ""
    notes: Sequence[str] = ()
    text: str = ""
    says_all: bool = False
    is_the_product: bool = False
    there: Sequence[Path] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    data: Mapping[str, Any] | None = None
    exit_code: int = 0
    failure: str = ""

    def as_text(self, stream: TextIO, num_warnings: int = 0) -> str:
        """Return the lines that people read; empty when there is nothing to say."""
        lines = [self.text] if self.text else []
        if not self.says_all:
            lines += [
                f"{paint('wrote', 'green', stream)} {path} ({size_text(_size(path))})"
                for path in self.wrote
            ]
            lines += [f"there is {path} ({size_text(_size(path))})" for path in self.there]
            said = [
                _WORDS[name](number) for name, number in self.numbers.items() if number is not None
            ]
            words = [word for word in said if word]
            if num_warnings:
                words.append(f"{num_warnings} warning{'s' * (num_warnings > 1)}, see above")
            text = ", ".join(word.replace(" ", _JOINED) for word in words)
            text = textwrap.fill(
                text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            )
            lines += [text.replace(_JOINED, " ")] if words else []
        lines += self.notes
        if self.next:
            lines.append(f"{paint('next:', 'bold', stream)} {self.next}")
        return "\n".join(lines)

    def as_data(self, stage: str, warnings: Sequence[str] = ()) -> dict[str, Any]:
        """Return what `--json` prints."""
        if self.data is not None:
            return dict(self.data) | (
                {"warnings": list(warnings)} if warnings and "warnings" not in self.data else {}
            )
        wrote, there = (
            [{"path": str(path), "bytes": _size(path)} for path in paths]
            for paths in (self.wrote, self.there)
        )
        more: dict[str, Any] = {"there": there} if there else {}
        more |= {"rows": [dict(row) for row in self.rows]} if self.rows else {}
        return {
            "stage": stage,
            "wrote": wrote,
            "numbers": dict(self.numbers),
            **more,
            "notes": list(self.notes),
            "warnings": list(warnings),
            "next": self.next,
            "exit_code": self.exit_code,
        }


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; 0 where it has gone already."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
