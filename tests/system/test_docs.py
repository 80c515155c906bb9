"""The programs and names that the documentation shows are real."""

import argparse
import inspect
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import yaml

from tdds_dist.runs.artifacts import load_scores
from tdds_dist.scoring.offline import BASELINES, score, score_all
from tests.ranks import forkserver

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "configs").rglob("*.md"),
    ]
)
WITH_COMMANDS = sorted(
    [*PAGES, *(ROOT / "docs/examples").glob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
)
SCHEMAS = {"run": "configs", "experiment": "configs/experiments", "cluster": "configs/clusters"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# not ours
OPTIONS_OF_OTHERS = {
    *(
        "--nproc-per-node",
        "--max-restarts",
        "--subset_rate",
        "--cpu-bind",
        "--gpus-per-task",
        "--nv",
    ),
    *("--gpus", "--ipc", "--user", "--rm", "--shm-size", "--tmpfs", "--read-only", "--network"),
    *("--bind", "--fakeroot", "--standalone"),  # of docker, apptainer and torchrun
    # of tdds_dist.loops.timm, and of timm's train.py
    *(
        "--window",
        "--aug-splits",
        "--aug-repeats",
        "--recovery-interval",
        "--start-epoch",
        "--resume",
        "--batch-size",
    ),
    *("--budget-seconds", "--only", "--page-only"),  # of benchmarks.gpu_acceptance
}


def example_run(
    name: str, *words: object, launcher: Sequence[str] = (), code: int = 0, **variables: str
) -> str:
    """Standard output of a program of docs/examples."""
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "docs/examples" / name), *map(str, words)],
        timeout=120,
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher", [[], pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["alone", "torchrun"]
)
def test_the_example_loop_runs_and_leaves_every_score(launcher, tmp_path):
    trajectory, scores = tmp_path / "trajectory", tmp_path / "scores"
    found = re.search(
        r"scored 1797 images; kept first: \[(\d+(?:, \d+){4})\]",
        example_run("own_loop.py", trajectory, launcher=launcher),
    )
    assert found
    paths, skipped = score_all(trajectory, out=scores)
    scored = {path.stem for path in paths}
    assert scored == {"tdds_official_T12_K5_beta0.9", "random", *BASELINES} - {"cld"}
    assert [reason.split(":")[0] for reason in skipped] == ["cld", "entropy", "moderate"]
    (live,) = score(trajectory, T=12, K=5, beta=0.9, out=tmp_path / "live.npz")
    kept_first = np.argsort(-load_scores(live).score_N, kind="stable")[:5]
    assert kept_first.tolist() == [int(index) for index in found[1].split(", ")]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher", [[], pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["alone", "torchrun"]
)
def test_the_example_that_skips_images_sees_as_many_as_planned(launcher):
    """1,797 images in the first epoch, 899 in each of 11 others."""
    said = example_run("pruning_loop.py", "progressive", launcher=launcher)
    assert "saw 11686 of 21564 images" in said


@pytest.mark.slow
@pytest.mark.distributed
def test_the_example_that_resumes_gives_what_it_gives_uninterrupted(tmp_path):
    said = tmp_path / "said.txt"
    # as many threads as the others: sums depend on it
    straight = example_run("resume.py", tmp_path / "straight", OMP_NUM_THREADS="1")
    for stop_after in (1, 6, 9):
        for stop in (stop_after, 0):
            arguments = (tmp_path / f"stopped{stop_after}", stop, said)
            process = forkserver.Process(target=_resume, args=arguments)
            process.start()
            process.join(120)
            assert process.exitcode == bool(stop)
        first, rest = re.match(r"trained from epoch (\d+); (.*)", said.read_text()).groups()
        # the last save may still have been under way
        assert stop_after - 3 <= int(first) <= stop_after
        assert rest in straight


def _resume(run, stop_after, said):
    """Be that program, in a process that has torch already."""
    torch.set_num_threads(1)
    os.environ["STOP_AFTER"] = str(stop_after)
    sys.argv = ["resume.py", str(run)]
    with said.open("w") as sys.stdout:
        runpy.run_path(str(ROOT / "docs/examples/resume.py"), run_name="__main__")


def test_links_and_files_named_in_the_docs_exist():
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "configs/experiments/README.md",
        *(ROOT / "docs").glob("*.md"),
    ]:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)
        for name in re.findall(
            r"`((?:configs|docs|launch|tests|benchmarks|scripts)/[\w./-]*\w)`", text
        ):
            assert (ROOT / name).exists(), (page.name, name)


def test_functions_named_in_the_docs_exist_and_the_page_on_the_paper_has_no_empty_cell():
    rooms = "|".join(path.parent.name for path in (ROOT / "tdds_dist").glob("*/__init__.py"))
    named = {
        name
        for page in PAGES
        for name in re.findall(rf"`((?:{rooms})\.[a-z]\w*\.\w[\w.]*)`", page.read_text())
    }
    assert "scoring.tdds.average_windows" in named
    for name in named:
        pkgutil.resolve_name(f"tdds_dist.{name}")
    for line in (ROOT / "docs/paper.md").read_text().splitlines():
        assert not re.search(r"\|\s*\|", line), line


# ---- commands and options


def commands_of(text: str) -> list[list[str]]:
    """Words after `tdds` (or `-m tdds_dist`) of every command that stands in a block of code, up to
    a pipe or the like."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^(?:    |#   )(.*)$", text, flags=re.MULTILINE)
    lines = "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines()
    found = (
        re.match(r"(?:[A-Z_]+=\S+ )?(?:tdds|(?:\S*torchrun|python|srun) .*-m tdds_dist) (.*)", line)
        for line in lines
    )
    commands = []
    for words in (
        shlex.split(match[1], comments=True) for match in found if match and " [--" not in match[1]
    ):
        ends = [
            place for place, word in enumerate(words) if word in ("|", ">", "&&", ";", "||", "&")
        ]
        commands.append(words[: min(ends, default=len(words))])
    return commands


def inline_code(text: str) -> str:
    """A page without its blocks, in which `code` stands between backticks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def stages() -> dict[str, argparse.ArgumentParser]:
    from tdds_dist.__main__ import COMMANDS
    from tdds_dist.cli.parser import build_parser

    (found,) = (
        action
        for action in build_parser(COMMANDS)._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(found.choices)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def parses(words: list[str]) -> bool:
    from tdds_dist.__main__ import COMMANDS
    from tdds_dist.cli.parser import parse

    try:
        parse(words, COMMANDS)
    except SystemExit as leaving:
        return not leaving.code  # --help and --version leave as well
    return True


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_parse(page):
    for words in commands_of(page.read_text()):
        # GPUS and the like stand for numbers
        numbered = ["1" if re.fullmatch(r"[A-Z]+", word) else word for word in words]
        assert parses(words) or parses(numbered), words


def test_commands_are_found():
    commands = {
        str(page.relative_to(ROOT)): commands_of(page.read_text()) for page in WITH_COMMANDS
    }
    assert {words[0] for words in commands["README.md"]} >= {
        "write",
        "collect",
        "select",
        "retrain",
        "report",
        "submit",
    }
    assert {words[0] for words in commands["docs/interchange.md"]} == {"export", "import"}
    assert commands["docs/examples/own_loop.py"] == [
        ["score", "my_trajectory", "--all", "--out", "my_scores"]
    ]
    assert [words[0] for words in commands["configs/imagefolder.yaml"]][:3] == [
        "write",
        "write",
        "collect",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_stages_and_options_named_in_the_docs_exist(page):
    known, text = stages(), inline_code(page.read_text())
    of_any = set.union(*map(options_of, known.values())) | OPTIONS_OF_OTHERS | {"--version"}
    for code in re.findall(r"`([^`]+)`", text):
        named = re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code)
        assert set(named) <= of_any, code
        if match := re.match(r"tdds (?P<stage>[a-z]+)\b", code):
            assert match["stage"] in known, code
            assert set(named) <= options_of(known[match["stage"]]) | OPTIONS_OF_OTHERS, code
    for names, stage in re.findall(r"((?:`--[^`]+`(?:,? and |, | or )?)+) of `tdds ([a-z]+)", text):
        assert set(re.findall(r"`(--[\w-]+)", names)) <= options_of(known[stage]), (names, stage)


def test_every_stage_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [stage for stage in stages() if f"tdds {stage} " not in text] == []


@pytest.mark.parametrize(
    ("made", "program", "words"),
    [
        ("docs/commands.md", "command_reference.py", []),
        ("docs/configs.md", "config_reference.py", []),
        *(
            (f"{folder}/schema.json", "config_schema.py", [kind])
            for kind, folder in SCHEMAS.items()
        ),
    ],
)
def test_references_and_schemas_are_those_of_the_program(made, program, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, *words])
    runpy.run_path(str(ROOT / "scripts" / program), run_name="__main__")
    assert (ROOT / made).read_text() == capsys.readouterr().out, (
        f"run `{shlex.join(['python', f'scripts/{program}', *words])} > {made}`"
    )


def test_defaults_in_the_help_are_those_of_the_parser():
    """Both ways: what is quoted is true, and what is not obvious is quoted."""
    from tdds_dist.coreset.samplers import beta_sample, ccs

    behind = {
        "num_strata": inspect.signature(ccs).parameters["num_strata"].default,
        # None in the parser: only given ones are passed
        "c_d": inspect.signature(beta_sample).parameters["c_d"].default,
    }
    num_checked = 0
    for stage, parser in stages().items():
        for action in parser._actions:
            default = behind.get(action.dest, parser.get_default(action.dest))
            if not action.option_strings or default in (None, "", False, argparse.SUPPRESS, []):
                continue
            quoted = re.search(r"default: ([^;)]+)", (action.help or "") % vars(action))
            if isinstance(action, argparse._StoreConstAction):
                assert ("default" in (action.help or "")) == (action.const == default), (
                    stage,
                    action.dest,
                )
                continue
            assert quoted, (
                f"tdds {stage} --help does not say that {action.option_strings[0]} is {default} by"
                " default"
            )
            values = default if isinstance(default, list) else [default]
            said = " ".join(
                f"{value:g}" if isinstance(value, float) else str(value) for value in values
            )
            assert quoted[1] == said, (stage, action.option_strings)
            num_checked += 1
    assert num_checked > 10


# ---- keys


def test_the_examples_in_the_reference_of_config_keys_load(tmp_path, monkeypatch):
    from tdds_dist.cli.parser import parse
    from tdds_dist.config.experiment import Experiment, load_experiment
    from tdds_dist.config.run import load_config
    from tdds_dist.experiments.grid import check_experiment

    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/configs.md").read_text()
    plans: list[Experiment] = []
    commands = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
    ]
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
        check_experiment(plan)
    added, replaced = plans[1], plans[2]
    file_has = load_experiment("configs/experiments/digits_table1.yaml").overrides
    assert added.overrides == (*file_has, "retrain.epochs=20", "train.warmup_epochs=1")
    assert replaced.overrides == ("model.name=shufflenet_v2_x1_0",)


# ---- schemas for editors

SHIPPED = [
    (kind, file)
    for kind, folder in SCHEMAS.items()
    for file in sorted((ROOT / folder).glob("*.yaml"))
]


@cache
def validator(kind):
    schema = json.loads((ROOT / SCHEMAS[kind] / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(("kind", "file"), SHIPPED, ids=[file.name for _, file in SHIPPED])
def test_shipped_files_name_their_schema_and_follow_it(kind, file):
    first, rest = file.read_text().split("\n", 1)
    assert re.match(r"# yaml-language-server: \$schema=schema\.json(?: |$)", first)
    tree = yaml.safe_load(rest)  # to the letter of YAML 1.1, in which 5e-4 is text
    assert list(validator(kind).iter_errors(tree)) == []


def test_the_schema_takes_what_the_loader_takes(tmp_path):
    from tdds_dist.config.experiment import load_experiment
    from tdds_dist.config.run import load_config
    from tdds_dist.launch.cluster import load_cluster

    loads = {"run": load_config, "experiment": load_experiment, "cluster": load_cluster}
    texts = {
        "run": (
            (ROOT / "configs/digits.yaml").read_text()
            + "\nretrain: {batch_size_rule: {0.5: 0.5}}\n"
        ),
        "experiment": (
            "{name: a, config: b, methods: [tdds, {name: x, score: el2n, T: null}], pruning_rates:"
            " [3e-1]}"
        ),
        "cluster": (
            "{executor: slurm, time_minutes: 60, memory_gb: 4.5, extra: {nice: 1}, stages:"
            " {retrain: {nodes: 2}}}"
        ),
    }
    for kind, text in texts.items():
        file = tmp_path / f"{kind}.yaml"
        file.write_text(text)
        loads[kind](file)
        assert list(validator(kind).iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    ("kind", "keys", "value"),
    [
        ("run", ("train", "learning_rate"), 0.1),
        ("run", ("runs",), {}),
        ("run", ("train", "epochs"), 0),
        ("run", ("train", "lr"), "fast"),
        ("run", ("data", "mean"), [78.0, 78.0]),
        ("run", ("score", "windows"), []),
        ("run", ("score", "windows", 0, "t"), 3),
        ("run", ("run", "name"), "a b"),
        ("run", ("train", "amp"), "fp8"),
        ("experiment", ("methods", 0), "tdd"),
        ("experiment", ("methods", 0), {"name": "x", "scores": "el2n"}),
        ("experiment", ("rates",), [0.5]),
        ("experiment", ("strategies",), ["Q"]),
        ("cluster", ("gpus",), 8),
        ("cluster", ("stages",), {"collection": {}}),
        ("cluster", ("stages",), {"retrain": {"gpus": 1}}),
        ("cluster", ("stages",), {"retrain": {"executor": "local"}}),
        ("cluster", ("time_minutes",), "1:00"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(kind, keys, value):
    name = {"run": "digits", "experiment": "digits_table1", "cluster": "gpu"}[kind]
    tree = yaml.safe_load((ROOT / SCHEMAS[kind] / f"{name}.yaml").read_text())
    assert validator(kind).is_valid(tree)
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    assert not validator(kind).is_valid(tree)
