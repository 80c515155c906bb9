"""The rooms: which may import which, who alone may touch which dependency, and what importing the
package costs.

Imports are read from the syntax tree, so those inside functions and under TYPE_CHECKING count as
well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "tdds_dist"
GROUND = ("errors", "console", "text")  # modules of the package itself, which every room may import
# A room imports rooms of the lines above its own, and of these only modules that their `__all__`
# names.
ROOMS = (
    ("config", "distributed"),
    ("runs",),
    ("data",),
    ("scoring",),
    ("coreset", "training", "loops"),
    ("pruning",),
    ("report",),
    ("experiments",),
    ("cli",),
    ("launch",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
UNSEEN = {"report": {"training"}}  # rooms above that it may not import all the same
# dependency: the modules or rooms that may import it
ONLY_IN = {
    "ffcv": {"data.writer", "data.loader", "data.decode"},
    "numba": {"data.loader", "data.decode"},
    "matplotlib": {"report.charts"},
    "pyarrow": {
        "coreset.export",
        "coreset.sample_table",
        "data.archives",
        "scoring.trajectory_table",
    },
    "torch.distributed": {
        "distributed.world",
        "distributed.collectives",
        "distributed.board",
        "runs.checkpoint",
        "loops.timm",
    },
    "torch.distributed.checkpoint": {"runs.checkpoint"},
    "triton": {"scoring.shard_triton"},
    "transformers": {"loops.hugging_face"},
    "lightning": {"loops.lightning"},
    "timm": {"loops.timm"},
    "submitit": {"launch"},
    "launch": {"launch", "__main__"},
}
# NumPy and torch in, NumPy and torch out
PURE = (
    "distributed.partition",
    "scoring.sample_stats",
    "scoring.tdds",
    "scoring.baselines",
    "coreset.samplers",
    "pruning.rules",
    "pruning.plan",
)


def modules() -> dict[str, Path]:
    """Every module by its dotted name without the package: `errors`, `runs.lock`, `launch.task`; a
    room by its own."""
    found = {}
    for path in sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == PACKAGE else parts  # launch/ is imported as a room
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every imported module or name, dotted; `from a import b` gives a and a.b. Relative imports
    are those of `launch`, which the type checker knows under no other name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [f"{PACKAGE}.launch"] * node.level + [node.module] * bool(node.module)
            yield (base := ".".join(parts))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            yield from (
                argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)
            )


def imported_modules(tree: ast.AST, known: Iterable[str] = MODULES) -> set[str]:
    """Modules of ours that a module imports; a name of a package that is no module counts as the
    package."""
    names = {
        name.removeprefix(f"{PACKAGE}.")
        for name in imported_names(tree)
        if name.split(".")[0] == PACKAGE
    }
    names &= set(known)
    return {
        name for name in names if name and not any(other.startswith(f"{name}.") for other in names)
    }


def uses(tree: ast.AST, dependency: str) -> bool:
    """Say whether a dependency is imported or, like `torch.distributed`, reached as an
    attribute."""
    if any(f"{name}.".startswith(f"{dependency}.") for name in imported_names(tree)):
        return True
    prefixes = (
        (f"{dependency}.", "dist.") if dependency == "torch.distributed" else (f"{dependency}.",)
    )
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(f"{text}.".startswith(prefixes) for text in attributes)


def faults(module: str, tree: ast.AST) -> list[str]:
    """What is wrong with the imports of a module. Relative ones are for `launch` alone: what they
    name would not be followed."""
    room, found = module.split(".")[0], list[str]()
    if room != "launch" and any(getattr(node, "level", 0) for node in ast.walk(tree)):
        found.append(f"{module} has a relative import")
    for other in imported_modules(tree) - {module}:
        target = other.split(".")[0]
        if target in GROUND or target == room:
            continue
        if (
            room not in FLOOR
            or FLOOR.get(target, 99) >= FLOOR[room]
            or target in UNSEEN.get(room, ())
        ):
            found.append(f"{module} may not import {other}")
        elif target != "launch" and (other == target or other.split(".")[1] not in doors(target)):
            found.append(
                f"{module} may not import {other}, which `__all__` of {target} does not name"
            )
    return found


def doors(room: str) -> list[str]:
    """The modules that a room lets others import."""
    (listed,) = (
        node.value
        for node in TREES[room].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return ast.literal_eval(listed)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle among modules, or an empty list."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        found = next(
            filter(None, (walk(other, (*path, module)) for other in sorted(edges[module]))), []
        )
        done.add(module)
        return found

    return next(filter(None, (walk(module, ()) for module in sorted(edges))), [])


# ---- the checks themselves


def test_the_checks_see_every_kind_of_import():
    tree = ast.parse("""
from typing import TYPE_CHECKING
import tdds_dist.config.run
if TYPE_CHECKING:
    from tdds_dist.scoring.scorer import ShardedScorer
def function():
    from tdds_dist.report import charts, page as t
    import tdds_dist.training.retrain as r
    __import__("tdds_dist.coreset.select")
from tdds_dist import console
from tdds_dist.launch import task
""")
    assert imported_modules(tree) == {
        "config.run",
        "scoring.scorer",
        "report.charts",
        "report.page",
        "training.retrain",
        "coreset.select",
        "console",
        "launch.task",
    }


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        (
            "report.page",
            "from tdds_dist.training.engine import fit",
            "may not import training.engine",
        ),
        ("runs.lock", "from tdds_dist.data.beton import BetonInfo", "may not import data.beton"),
        ("training.training", "import tdds_dist.coreset.select", "may not import coreset.select"),
        (
            "cli.main",
            "def f():\n    from tdds_dist.launch.submit import add_submit",
            "may not import launch.submit",
        ),
        ("coreset.select", "from tdds_dist.data.decode import uniform", "does not name"),
        ("errors", "from tdds_dist.runs import lock", "may not import runs.lock"),
        ("coreset.samplers", "from .select import choose", "relative"),
    ],
)
def test_the_checks_see_what_is_wrong(module, source, words):
    (fault,) = faults(module, ast.parse(source))
    assert words in fault


@pytest.mark.parametrize(
    ("source", "dependency"),
    [
        ("import ffcv", "ffcv"),
        ("from ffcv.fields import IntField", "ffcv"),
        ("import ffcv.libffcv as x", "ffcv"),
        ("def f():\n  import numba", "numba"),
        ("import torch.distributed as d", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("from torch.distributed import x", "torch.distributed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("dist.barrier()", "torch.distributed"),
    ],
)
def test_the_checks_see_every_kind_of_use(source, dependency):
    assert uses(ast.parse(source), dependency)
    others = (
        "import ffcvx, numba_, torch.distributions\nfrom tdds_dist import"
        " distributed\ndistributed.barrier()"
    )
    assert not uses(ast.parse(others), dependency)


# ---- the rooms


def test_imports_point_to_rooms_below():
    assert [
        fault for module, tree in TREES.items() if module for fault in faults(module, tree)
    ] == []


def test_no_circle():
    edges = {module: imported_modules(tree) - {module} for module, tree in TREES.items() if module}
    assert circle(edges) == []
    assert circle(edges | {"errors": {"runs.lock"}}) != []


def test_rooms_are_few_and_small():
    top = {path.name for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"}
    rooms = {name for name in top if (ROOT / PACKAGE / name).is_dir()}
    assert rooms == FLOOR.keys() - {"launch", "__main__"}
    assert len(rooms) <= 12
    assert len(top - rooms) <= 6
    for room in (*rooms, "launch"):
        names = {module.split(".")[1] for module in MODULES if module.startswith(f"{room}.")}
        assert len(names) <= 12, room
        assert ast.get_docstring(TREES[room]), room
        assert room == "launch" or set(doors(room)) <= names, room


def test_the_package_itself_imports_nothing_at_once():
    at_once = [node for node in TREES[""].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not imported_modules(ast.Module(at_once, []))


def test_every_public_name_is_there():
    import tdds_dist

    assert all(getattr(tdds_dist, name).__name__ == name for name in tdds_dist.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tdds_dist.no_such_name


# ---- dependencies and the outside world


@pytest.mark.parametrize("dependency", ONLY_IN)
def test_dependency_stays_where_it_belongs(dependency):
    users = {module for module, tree in TREES.items() if uses(tree, dependency)}
    assert {
        module for module in users if not {module, module.split(".")[0]} & ONLY_IN[dependency]
    } == set()


def test_nothing_in_the_package_reads_the_variables_of_slurm():
    of_the_package = (path for module, path in MODULES.items() if not module.startswith("launch"))
    assert [path.name for path in of_the_package if "SLURM_" in path.read_text()] == []


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_touch_nothing_outside(module):
    """No files, no processes, no process group, no environment."""
    names = {name.split(".")[0] for name in imported_names(TREES[module])}
    pure = {"collections", "concurrent", "dataclasses", "math", "threading", "typing"}
    assert names <= pure | {"numpy", "torch", "tdds_dist"}
    called = {
        ast.unparse(node.func) for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)
    }
    assert not {
        name
        for name in called
        if name.split(".")[-1]
        in {
            "open",
            "print",
            "load",
            "save",
            "savez",
            "fromfile",
            "tofile",
            "exec",
            "eval",
            "__import__",
        }
    }


def printed_by(program: str) -> str:
    """Return what a fresh interpreter prints; the package is the one beside these tests."""
    command = [sys.executable, "-c", f"import sys; {program}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_scorer_is_cheap():
    """Only torch and NumPy: a foreign training loop should not pay for, or need, anything else."""
    heavy = {
        "ffcv",
        "numba",
        "submitit",
        "pydantic",
        "yaml",
        "matplotlib",
        "torchvision",
        "jinja2",
        "PIL",
        "cv2",
    }
    assert (
        printed_by(
            f"from tdds_dist import ShardedScorer, Window; print({heavy} & sys.modules.keys())"
        )
        == "set()"
    )


def test_importing_the_command_line_does_not_load_torch():
    program = (
        "from tdds_dist.__main__ import COMMANDS; from tdds_dist.cli.parser import build_parser;"
        " build_parser(COMMANDS)"
    )
    assert printed_by(f"{program}; print('torch' in sys.modules)") == "False"
