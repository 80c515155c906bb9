"""The programs and names that the documentation shows are real."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_the_example_loop_runs(launcher):
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "docs/examples/own_loop.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"scored 1797 images; kept first: \[\d+(, \d+){4}\]", done.stdout)


def test_links_and_files_named_in_the_docs_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)
        for name in re.findall(r"`((?:configs|docs|launch|tests|benchmarks|scripts)/[\w./-]*\w)`", text):
            assert (ROOT / name).exists(), (page.name, name)


def test_the_commands_in_the_readme_parse():
    from tdds_dist.cli import parse

    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if re.search(r"(^|-m )tdds(_dist)? ", line)]
    assert len(commands) >= 5
    for line in commands:
        words = re.split(r"(?:^|-m )tdds(?:_dist)? ", line, maxsplit=1)[1].split("#")[0].split()
        parse(words)
