"""What is installed is what a user needs: contents of the wheel, and program and types from it, far
from this checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.jobs import IN_TURN

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    } | variables
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def done(finished: "subprocess.CompletedProcess[str]") -> str:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def files_of_the_project() -> list[str]:
    listed = done(run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy of the files that belong to the project."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in files_of_the_project():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    done(
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            copy,
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            out,
            cwd=out,
        )
    )
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it; everything else is taken from this one, but not
    this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A plain path: the .pth files in it, that of an editable installation among them, are not read.
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    done(
        run(
            sys.executable,
            "-m",
            "pip",
            "--python",
            folder / "bin/python",
            "install",
            "--no-deps",
            "--ignore-installed",
            "--no-index",
            wheel,
            cwd=folder,
        )
    )
    return folder


def test_the_wheel_holds_the_program_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"tdds_dist"}  # a top-level `launch` would clash with the launch.py of users
    held = {
        name.partition(".data/data/share/tdds/")[2] or name.replace("tdds_dist/launch/", "launch/")
        for name in names
        if ".dist-info/" not in name
    }
    wanted = {
        name
        for name in files_of_the_project()
        if name.split("/")[0] in ("tdds_dist", "launch", "configs")
    }
    # py.typed, templates, configs, cluster files, schemas: whatever is there, and no test
    assert held == wanted


SMALL = """data.train=data/train.beton data.val=data/val.beton data.num_classes=4 train.epochs=3 run.dir=run
 train.global_batch_size=20 train.warmup_epochs=0 run.device=cpu
 'score.windows=[{T: 3, K: 2, pruning_rates: [0.5]}]'""".replace("\n", "")
COMMANDS = f"""
write synthetic:40,4,32 data/val.beton --split val
collect configs/digits.yaml {SMALL}
select run --pruning-rate 0.5
retrain run/config.yaml --coreset run/coresets/tdds_official_T3_K2_beta0.9_p0.5.npz --strategy E
report run
submit configs/digits.yaml {SMALL} --cluster configs/clusters/cpu_test.yaml --dry-run
"""


def test_the_program_runs_far_from_the_checkout(installed, tmp_path):
    """Write, collect, score, select, retrain, report with the installed files only, templates and
    configs included."""
    tdds = installed / "bin/tdds"
    assert (
        done(
            run(
                installed / "bin/python",
                "-c",
                "import tdds_dist.launch as launch, tdds_dist; print(tdds_dist.__file__, launch.__file__)",
                cwd=tmp_path,
            )
        ).count(str(installed))
        == 2
    )
    assert "collect" in done(run(tdds, "--help", cwd=tmp_path))
    assert "--dry-run" in done(
        run(installed / "bin/python", "-m", "tdds_dist", "submit", "--help", cwd=tmp_path)
    )
    (tmp_path / "configs").symlink_to(installed / "share/tdds/configs")
    done(run(tdds, *"write synthetic:40,4,32 data/train.beton".split(), cwd=tmp_path))
    shown = done(
        run(installed / "bin/python", "-c", IN_TURN, COMMANDS, cwd=tmp_path, OMP_NUM_THREADS="1")
    )
    assert "</html>" in (tmp_path / "run/report.html").read_text()
    assert str(installed) in shown.partition("#SBATCH")[2]  # the python of the jobs


PROGRAM = """\
import torch
from tdds_dist import ShardedScorer, Window
scorer = ShardedScorer(num_samples=10, num_classes=2, windows=[Window(T=3, K=2, beta=0.9)])
reveal_type(scorer.gather())
scorer.record("index", torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
"""


def test_a_program_of_a_user_sees_types(installed, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    checked = run(
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        installed / "bin/python",
        "program.py",
        cwd=tmp_path,
    )
    revealed = 'Revealed type is "dict[tdds_dist.config.scores.Window, torch._tensor.Tensor]"'
    assert revealed in checked.stdout.replace("builtins.", "")
    assert (
        'program.py:5: error: Argument 1 to "record" of "ShardedScorer" has incompatible type "str"'
        in checked.stdout
    )
    assert "Found 1 error" in checked.stdout, checked.stdout
