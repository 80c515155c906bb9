"""The layer table: who may import whom, who alone may touch which dependency, and what importing the package costs.

Imports are read from the syntax tree, so those inside functions and under TYPE_CHECKING count as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tdds_dist"

# A module imports from rows above its own, and within its row from what stands to its left.
LAYERS = [
    ("errors", "partition", "scalars", "tdds", "baselines", "selection", "schedule", "storage", "agreement", "binning",
     "published"),
    ("schema", "config", "preemption", "distributed", "artifacts", "lock", "rundir", "identity", "pulse", "console",
     "closing", "workers"),
    ("corruptions", "sources", "beton", "beton_writer", "imaging", "loader", "check", "models", "trajectory",
     "dynamics", "checkpoint"),
    ("rows", "fused", "scorer"),
    ("prepare", "snapshot", "job", "feed", "metrics", "engine"),
    ("select", "final_pass", "footprint", "budget", "plan", "start", "collect", "score", "retrain", "rankings",
     "facts", "summary", "status", "compare", "export", "ingest", "tables", "cells", "experiment", "charts",
     "report_accuracy", "report_training", "report_scores", "report_agreement", "thumbnails", "report_images", "report"),
    ("stages", "cli", "__main__"),
]
PLACE = {module: place for place, module in enumerate(module for layer in LAYERS for module in layer)}
PURE = LAYERS[0]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
IMPORTABLE = [module for module in MODULES if module != "__init__"]  # that one lends out names lazily

# dependency: the modules that may import it
ONLY_IN = {
    "ffcv": {"beton_writer", "loader", "imaging"},
    "numba": {"loader", "imaging"},
    "matplotlib": {"charts"},
    "pyarrow": {"export"},
    "torch.distributed": {"distributed", "checkpoint"},
    "torch.distributed.checkpoint": {"checkpoint"},
    "triton": {"fused"},
    "submitit": set(),  # launch/ only
    "launch": {"cli"},
}


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every imported module or name, dotted and absolute; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["tdds_dist" if node.level else "", node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def imported_modules(tree: ast.AST) -> set[str]:
    """Modules of the package that a module imports."""
    parts = (name.split(".") for name in imported_names(tree))
    return {part[1] for part in parts if part[0] == "tdds_dist" and len(part) > 1 and part[1] in MODULES}


def uses(tree: ast.AST, dependency: str) -> bool:
    """Whether a dependency is imported or, like `torch.distributed`, reached as an attribute."""
    if any(f"{name}.".startswith(f"{dependency}.") for name in imported_names(tree)):
        return True
    prefixes = (f"{dependency}.", "dist.") if dependency == "torch.distributed" else (f"{dependency}.",)
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(f"{text}.".startswith(prefixes) for text in attributes)


# ---- the checks themselves


def test_the_checks_see_every_kind_of_import():
    tree = ast.parse("""
from typing import TYPE_CHECKING
import tdds_dist.config
if TYPE_CHECKING:
    from tdds_dist.scorer import ShardedScorer
def function():
    from tdds_dist import charts, tdds as t
    from . import report
    from .select import select
    import tdds_dist.retrain as r
    __import__("tdds_dist.score")
""")
    assert imported_modules(tree) == {"config", "scorer", "charts", "tdds", "report", "select", "retrain", "score"}


@pytest.mark.parametrize(("source", "dependency"), [
    ("import ffcv", "ffcv"), ("from ffcv.fields import IntField", "ffcv"), ("import ffcv.libffcv as x", "ffcv"),
    ("def f():\n  import numba", "numba"), ("import torch.distributed as d", "torch.distributed"),
    ("from torch import distributed", "torch.distributed"), ("from torch.distributed import x", "torch.distributed"),
    ("import torch\ntorch.distributed.barrier()", "torch.distributed"), ("dist.barrier()", "torch.distributed"),
])
def test_the_checks_see_every_kind_of_use(source, dependency):
    assert uses(ast.parse(source), dependency)
    others = "import ffcvx, numba_, torch.distributions\nfrom tdds_dist import distributed\ndistributed.barrier()"
    assert not uses(ast.parse(others), dependency)


# ---- the layer table


def test_every_module_has_one_place_in_the_table():
    placed = [module for layer in LAYERS for module in layer]
    assert sorted(placed) == sorted(set(placed))
    assert sorted([*placed, "__init__"]) == MODULES, "a new module needs a place in LAYERS, a removed one leaves it"
    assert not list(PACKAGE.glob("*/__init__.py")), "the package is flat"


@pytest.mark.parametrize("module", IMPORTABLE)
def test_imports_point_upwards(module):
    wrong = {other for other in imported_modules(tree_of(module)) if PLACE[other] >= PLACE[module]}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_the_package_itself_imports_nothing_at_once():
    at_once = [node for node in tree_of("__init__").body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not imported_modules(ast.Module(at_once, []))


# ---- dependencies and the outside world


@pytest.mark.parametrize("dependency", ONLY_IN)
def test_dependency_stays_where_it_belongs(dependency):
    users = {module for module in MODULES if uses(tree_of(module), dependency)}
    assert users <= ONLY_IN[dependency]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_reads_the_variables_of_slurm(module):
    assert "SLURM_" not in (PACKAGE / f"{module}.py").read_text()


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_touch_nothing_outside(module):
    """No files, no processes, no process group, no environment."""
    names = {name.split(".")[0] for name in imported_names(tree_of(module))}
    assert names <= {"collections", "dataclasses", "math", "typing", "numpy", "torch", "tdds_dist"}
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    assert not {name for name in called if name.split(".")[-1] in
                {"open", "print", "load", "save", "savez", "fromfile", "tofile", "exec", "eval", "__import__"}}


def printed_by(program: str) -> str:
    """What a fresh interpreter prints; the package is the one beside these tests."""
    command = [sys.executable, "-c", f"import sys; {program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_scorer_is_cheap():
    """Only torch and NumPy: a foreign training loop should not pay for, or need, anything else."""
    heavy = {"ffcv", "numba", "submitit", "pydantic", "yaml", "matplotlib", "torchvision", "jinja2", "PIL", "cv2"}
    assert printed_by(f"from tdds_dist import ShardedScorer, Window; print({heavy} & sys.modules.keys())") == "set()"


def test_importing_the_command_line_does_not_load_torch():
    assert printed_by("from tdds_dist import cli; cli.build_parser(); print('torch' in sys.modules)") == "False"
