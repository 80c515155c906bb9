"""The programs and names that the documentation shows are real."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tdds_dist.artifacts import load_scores
from tdds_dist.score import score, score_all

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_the_example_loop_runs_and_leaves_every_score(launcher, tmp_path):
    trajectory, scores = tmp_path / "trajectory", tmp_path / "scores"
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "docs/examples/own_loop.py"), str(trajectory)], capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.search(r"scored 1797 images; kept first: \[(\d+(?:, \d+){4})\]", done.stdout)
    assert found
    paths, skipped = score_all(trajectory, out=scores)
    assert {path.stem for path in paths} == {"tdds_official_T12_K5_beta0.9", "random", "forgetting", "el2n", "aum", "dyn_unc",
                                             "dual"}
    assert [reason.split(":")[0] for reason in skipped] == ["entropy", "moderate"]
    (live,) = score(trajectory, T=12, K=5, beta=0.9, out=tmp_path / "live.npz")
    kept_first = np.argsort(-load_scores(live).score_N, kind="stable")[:5]
    assert kept_first.tolist() == [int(index) for index in found[1].split(", ")]


@pytest.mark.distributed
@pytest.mark.parametrize("stop_after", [1, 6, 9])
def test_the_example_that_resumes_gives_what_it_gives_uninterrupted(stop_after, tmp_path):
    def run(folder, **variables):
        return subprocess.run([sys.executable, str(ROOT / "docs/examples/resume.py"), str(tmp_path / folder)], text=True,
                              capture_output=True, timeout=120, env=os.environ | variables)

    assert run("stopped", STOP_AFTER=str(stop_after)).returncode == 1
    resumed, straight = run("stopped"), run("straight")
    assert resumed.returncode == straight.returncode == 0, resumed.stderr + straight.stderr
    first, said = re.match(r"trained from epoch (\d+); (.*)", resumed.stdout).groups()
    assert stop_after - 3 <= int(first) <= stop_after  # the last save may still have been under way
    assert said in straight.stdout


def test_links_and_files_named_in_the_docs_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs/experiments/README.md",
                 *(ROOT / "docs").glob("*.md")]:
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


def test_the_reference_of_config_keys_is_that_of_the_schema():
    printed = subprocess.run(
        [sys.executable, "scripts/config_reference.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    assert (ROOT / "docs/configs.md").read_text() == printed.stdout, (
        "run `python scripts/config_reference.py > docs/configs.md`")


def test_the_examples_in_the_reference_of_config_keys_load(tmp_path, monkeypatch):
    from tdds_dist.cells import check_plan
    from tdds_dist.cli import parse
    from tdds_dist.config import Experiment, load_config, load_experiment

    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/configs.md").read_text()
    plans: list[Experiment] = []
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 6
    for line in commands:
        program, *words = shlex.split(line)
        options = parse(words)
        assert program == "tdds"
        assert options.overrides
        if options.stage == "experiment":
            plans.append(load_experiment(options.config, options.overrides))
        else:
            config = load_config(options.config, options.overrides)
            if options.stage == "collect":
                config.check_collect()
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        plans.append(load_experiment(file))
    assert len(plans) == 4
    for plan in plans:
        check_plan(plan)
    added, replaced = plans[1], plans[2]
    file_has = load_experiment("configs/experiments/digits_table1.yaml").overrides
    assert added.overrides == (*file_has, "retrain.epochs=20", "train.warmup_epochs=1")
    assert replaced.overrides == ("model.name=shufflenet_v2_x1_0",)
