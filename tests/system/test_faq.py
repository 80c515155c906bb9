"""The errors that docs/faq.md explains are those that the program gives."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADINGS = re.findall(r"^### `(.*)`$", (ROOT / "docs/faq.md").read_text(), flags=re.MULTILINE)


@cache
def texts() -> list[str]:
    """Every string of the program as it stands there, `…` for what is put in."""
    found = []
    for path in [*(ROOT / "tdds_dist").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_there_are_errors_to_explain():
    assert len(HEADINGS) >= 20


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_heading_is_an_error_of_the_program(heading):
    wanted = re.compile(".*".join(re.escape(piece.strip()) for piece in heading.split("…")))
    assert any(wanted.search(text) for text in texts()), "no string of the program reads like this"
