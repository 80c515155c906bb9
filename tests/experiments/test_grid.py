"""What a submission consists of: names, commands, what is done already. No job is started, no file
of a run is real."""

import json
import os
import shlex
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdds_dist.cli import parser
from tdds_dist.config.grid import BUILT_IN_METHODS
from tdds_dist.config.run import load_config
from tdds_dist.errors import InputError
from tdds_dist.experiments.grid import PlannedJob, PlannedStage, Task, one_run, pipeline_stages
from tdds_dist.launch.cluster import Cluster
from tdds_dist.launch.submit import check_batch
from tdds_dist.runs.artifacts import Coreset, Fingerprint, save_coreset
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring.offline import BASELINES
from tests.make import refused, table

FROZEN = Path("frozen.yaml")
TEXT = """
run: {{name: tiny, dir: {run}, seed: 3}}
data: {{train: t.beton, val: v.beton, num_classes: 10, image_size: 32, crop: pad, mean: [78.0, 78.0, 78.0],
       std: [90.0, 90.0, 90.0]}}
model: {{name: resnet18}}
train: {{epochs: 12, global_batch_size: 24, lr: 0.05}}
score: {{windows: [{{T: 12, K: 3, pruning_rates: [0.0, 0.5]}}, {{T: 6, K: 2, pruning_rates: [0.8, 0.3]}}]}}
"""


def config_of(run, *overrides):
    path = run.parent / "config.yaml"
    path.write_text(TEXT.format(run=run))
    return load_config(path, overrides)


def plan(run, *overrides):
    return {stage.name: stage for stage in pipeline_stages(config_of(run, *overrides), FROZEN)}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def finish(job):
    """What a run that is done leaves in its directory."""
    Path(job.directory).mkdir(parents=True, exist_ok=True)
    (Path(job.directory) / "result.json").write_text(json.dumps({"epochs": 12}))
    RunDir(job.directory).append_val_classes(11, np.ones(2), np.ones(2))


def coresets(select):
    """Files that a select stage writes."""
    commands = [command for command in select.jobs[0].commands if command[0] == "select"]
    return [Path(command[command.index("--out") + 1]) for command in commands]


def make_coresets(select):
    for path in coresets(select):
        options = {"aum_of": "logit"} if path.name.startswith(("aum", "ccs")) else {}
        what = (np.arange(2), np.ones(2, np.float32), "any", 0.5, Fingerprint(4, 2, "0"), options)
        save_coreset(path, Coreset(*what))


def finish_all(stages):
    finish(stages["collect"].jobs[0])
    make_coresets(stages["select"])
    for job in stages["retrain"].jobs:
        finish(job)
    (Path(stages["report"].jobs[0].directory) / "report.html").touch()


def waiting(stages):
    return {name: len(stage.waiting) for name, stage in stages.items() if stage.waiting}


# ---- names and commands


def test_the_plain_pipeline(run):
    """TDDS at the rates that the windows serve, one seed, Strategy-E."""
    stages, config = plan(run), config_of(run)
    assert list(stages) == ["collect", "select", "retrain", "report"]
    command = ("collect", "frozen.yaml")
    collect = PlannedJob("collect", (command,), str(run), task=Task("collect", run, config))
    assert stages["collect"].jobs == (collect,)
    assert stages["report"].jobs == (PlannedJob("report", (("report", str(run)),), str(run)),)
    (select,) = stages["select"].jobs
    assert (select.title, select.directory) == ("3 coresets", str(run))
    first, second = "tdds_official_T12_K3_beta0.9", "tdds_official_T6_K2_beta0.9"
    file, name = f"{run}/coresets/tdds_p0.5.npz", "tdds_p0.5_E_batch_seed3"
    words = f"select {run} --pruning-rate 0.5 --score {first} --seed 3 --out {file}"
    assert select.commands[1] == (*words.split(),)
    assert [command[5] for command in select.commands] == [second, first, second]
    retrain, rates = stages["retrain"], [0.3, 0.5, 0.8]
    assert [job.title for job in retrain.jobs] == [f"tdds_p{rate}_E_batch_seed3" for rate in rates]
    assert [job.task.pruning_rate for job in retrain.jobs] == rates
    words = f"retrain frozen.yaml --coreset {file} --strategy E --importance batch --name {name} run.seed=3"
    place, method = run / "retrain" / name, BUILT_IN_METHODS["tdds"]
    how = (Path(file), "E", "batch", 0.5, method, {"row": "tdds"})
    task = Task("tdds p=0.5 E, seed 3", place, config, *how)
    assert retrain.jobs[1] == PlannedJob(name, ((*words.split(),),), str(place), task=task)


def test_scores_rates_strategies_and_seeds_multiply(run):
    words = "scores=[tdds,random,ccs] pruning_rates=[0.5,0.8] strategies=[E,P] seeds=[0,7]".split()
    stages = plan(run, *(f"pipeline.{word}" for word in words))
    names = [job.title for job in stages["retrain"].jobs]
    assert len(names) == len(set(names)) == 24
    importance = {"tdds": "batch", "random": "none", "ccs": "none"}
    assert set(names) == {
        f"{score}_p{rate}_{strategy}_{importance[score]}_seed{seed}"
        for score, rate, strategy, seed in product(importance, (0.5, 0.8), "EP", (0, 7))
    }
    assert stages["select"].jobs[0].title == "6 coresets"
    commands = [command for job in stages["retrain"].jobs for command in job.commands]
    used = {command[command.index("--coreset") + 1] for command in commands}
    assert used == {str(path) for path in coresets(stages["select"])}
    for job in stages["retrain"].jobs:
        assert job.commands[0][-1] == f"run.seed={job.title[-1]}"
        assert job.directory == f"{run}/retrain/{job.title}"


@pytest.mark.parametrize("importance", ["none", "batch", "sample"])
def test_importance_is_for_tdds_alone(run, importance):
    words = f"pipeline.scores=[tdds,el2n,random,ccs] pipeline.pruning_rates=[0.5] retrain.importance={importance}"
    stages = plan(run, *words.split())
    said = {
        job.title.split("_")[0]: job.commands[0][job.commands[0].index("--importance") + 1]
        for job in stages["retrain"].jobs
    }
    assert said == {"tdds": importance, "el2n": "none", "random": "none", "ccs": "none"}


def test_scores_that_look_at_classes_need_a_collection_that_recorded_them(run):
    short = ("pipeline.scores=[cld]", "score.baselines.num_epochs=4", "train.eval_every=2")
    refused("cld correlates .*, and 2 in 4 epochs are too few; lower", plan, run, *short)
    finish(plan(run)["collect"].jobs[0])
    RunDir(run).val_classes_file.unlink()
    missing = "which the collection in .*run has not recorded; leave it out"
    for name in ("cld", "drop"):
        what = f"pipeline.scores: {name} looks at validation by class, {missing}"
        refused(what, plan, run, f"pipeline.scores=[{name}]")


def test_every_score_is_computed_once_and_only_where_it_is_not_there(run):
    """tdds comes with the collection, random from a seed, entropy and moderate with the final
    pass."""
    rates = "pipeline.pruning_rates=[0.5, 0.8]"
    stages = plan(run, f"pipeline.scores=[{', '.join(BUILT_IN_METHODS)}]", rates)
    (select,) = stages["select"].jobs
    scores = [command for command in select.commands if command[0] == "score"]
    assert [command[3] for command in scores] == [*BASELINES]
    assert scores[1][2:] == ("--score", "el2n", "el2n_epochs=10")
    assert len(select.commands) == len(scores) + 2 * len(BUILT_IN_METHODS)
    ccs = next(command for command in select.commands if "ccs_p0.5" in command[-1])
    assert ccs[ccs.index("--score") : ccs.index("--seed")] == ("--score", "aum", "--sampler", "ccs")
    (select,) = plan(run, "pipeline.scores=[tdds, random, moderate]")["select"].jobs
    assert "score" not in [command[0] for command in select.commands]


SETTINGS = [
    (),
    ("pipeline.scores=[tdds, random]",),
    (f"pipeline.scores=[{', '.join(BUILT_IN_METHODS)}]",),
    ("pipeline.pruning_rates=[0.5]", "pipeline.strategies=[P, E]", "pipeline.seeds=[0, 1, 2]"),
    ("score.preset=paper", "pipeline.scores=[tdds, dual_beta]"),
    ("pipeline.scores=[random]", "pipeline.pruning_rates=[0.05, 0.333, 0.999]"),
    ("retrain.importance=sample", "pipeline.seeds=[123456789]"),
]


@pytest.mark.parametrize("overrides", SETTINGS)
def test_every_command_parses(run, overrides):
    for stage in plan(run, *overrides).values():
        for job in stage.jobs:
            for command in job.commands:
                options = parser.parse(command)
                assert options.stage == command[0]
                assert options.stage in ("collect", "score", "select", "retrain", "report")
                if options.stage == "retrain":
                    assert options.overrides == [command[-1]]
                    name = f"{options.config.parent / options.name}"
                    assert name.endswith(Path(job.directory).name)
                if options.stage == "select":
                    assert options.out in coresets(PlannedStage("select", (job,)))
                    assert 0 < options.pruning_rate[0] < 1


def test_options_of_scores_are_those_of_this_config_and_not_of_the_collection(run):
    settings = ["pipeline.scores=[aum, ccs]", "pipeline.pruning_rates=[0.5]"]
    stages = plan(run, *settings)
    finish(stages["collect"].jobs[0])
    make_coresets(stages["select"])
    assert waiting(plan(run, *settings)) == {"retrain": 2, "report": 1}
    other = plan(run, *settings, "score.baselines.aum_of=probability")
    assert waiting(other) == {"select": 1, "retrain": 2, "report": 1}
    commands = other["select"].jobs[0].commands
    assert commands[0][2:5] == ("--score", "aum", "aum_of=probability")
    scores = [command[command.index("--score") + 1] for command in commands[1:]]
    assert scores == ["aum_probability"] * 2
    # those that are there are of other options
    assert all("--force" in command for command in commands[1:])
    coresets(stages["select"])[0].unlink()
    again = plan(run, *settings)["select"].jobs[0].commands[1:]
    # one is missing, the other is what is asked for
    assert not any("--force" in command for command in again)


def test_a_rate_that_no_window_serves_is_for_other_scores(run):
    stages = plan(run, "pipeline.scores=[random]", "pipeline.pruning_rates=[0.6]")
    assert len(stages["retrain"].jobs) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    table("""
    'score.windows=[{T: 3, K: 2}]' -> no window of score.windows serves a pruning rate; set pipeline.pruning_rates
    'score.windows=[{T: 3, K: 2, pruning_rates: [0.0]}]' -> no window of score.windows serves a pruning rate
    'score.windows=[{T: 13, K: 2, pruning_rates: [0.5]}]' -> T=13 is longer than train.epochs=12
    pipeline.pruning_rates=[0.6] -> pipeline.pruning_rates has 0.6, which no window of score.windows serves; add it
    pipeline.scores=[moderate] score.final_pass=false -> moderate needs score.final_pass=true; switch it on
    pipeline.scores=[tdds,entropy] score.final_pass=false -> entropy needs score.final_pass=true
    pipeline.scores=[ccs] score.trajectory=false -> ccs is scored from the trajectory; set score.trajectory=true
    pipeline.scores=[dual_beta] score.trajectory=false -> dual_beta is scored from the trajectory
    pipeline.scores=[tdds,el2n] score.baselines.el2n_epochs=13 -> pipeline.scores: el2n: el2n_epochs=13 is longer than the 12 recorded epochs
    pipeline.scores=[dyn_unc] score.baselines.uncertainty_window=13 -> pipeline.scores: dyn_unc: uncertainty_window=13 is longer than the 12 epochs
    pipeline.scores=[tdss] -> pipeline.scores: 'tdss' is not known; use some of tdds, random
    pipeline.scores=[] -> pipeline.scores
    pipeline.strategies=[Q] -> pipeline.strategies
    pipeline.pruning_rates=[0.0] -> must lie between 0 and 1
    pipeline.pruning_rates=[1.0] -> must lie between
    pipeline.seeds=[-1] -> must not be negative
    pipeline.seeds=[1,1] -> holds a value twice
    pipeline.scores=[tdds,tdds] -> holds a value twice
    pipeline.strategies=[E,E] -> holds a value twice
    pipeline.scores=[random] pipeline.pruning_rates=[0.3,0.30000001] -> holds a value twice
    """),
)
def test_what_cannot_run_is_refused_in_one_line(run, overrides, message):
    with pytest.raises(InputError) as caught:
        plan(run, *shlex.split(overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_needs_nothing_is_not_refused(run):
    plan(run, "pipeline.scores=[tdds, random]", "score.final_pass=false", "score.trajectory=false")


# ---- what is done


def test_a_new_run_has_everything_before_it(run):
    stages = plan(run, "pipeline.scores=[tdds, random]", "pipeline.seeds=[0, 1]")
    assert waiting(stages) == {"collect": 1, "select": 1, "retrain": 12, "report": 1}


@pytest.mark.parametrize("content", ["", "{", "not json", '{"epochs": 1'])
def test_a_damaged_result_is_none(run, content):
    stages = plan(run)
    finish_all(stages)
    (run / "result.json").write_text(content)
    assert "collect" in waiting(plan(run))
    finish(stages["collect"].jobs[0])
    make_coresets(stages["select"])  # older ones are of another collection
    (Path(stages["retrain"].jobs[0].directory) / "result.json").write_text(content)
    assert waiting(plan(run)) == {"retrain": 1, "report": 1}


RETRAININGS = {"none": (), "some": (0, 2), "all": (0, 1, 2)}
REPORTS = ("none", "old", "new")


@pytest.mark.parametrize(
    ("has_result", "has_coresets", "retrained", "report"),
    list(product((False, True), ("none", "some", "all"), RETRAININGS, REPORTS)),
)
def test_what_is_done_is_skipped(run, has_result, has_coresets, retrained, report):
    stages = plan(run)
    run.mkdir()
    if has_result:
        finish(stages["collect"].jobs[0])
    if has_coresets != "none":
        make_coresets(stages["select"])
    if has_coresets == "some":
        coresets(stages["select"])[1].unlink()
    for number in RETRAININGS[retrained]:
        finish(stages["retrain"].jobs[number])
    if report != "none":
        (run / "report.html").touch()
        when = 1e9 if report == "old" else 4e9
        os.utime(run / "report.html", (when, when))
    left = waiting(plan(run))
    assert ("collect" in left) == (not has_result)
    # with every retraining done nobody needs the coresets; while the collection is to run, they are
    # of something else
    is_chosen = has_result and "all" in (has_coresets, retrained)
    assert ("select" in left) == (not is_chosen)
    assert left.get("retrain", 0) == 3 - len(RETRAININGS[retrained])
    everything = has_result and retrained == "all"
    assert ("report" in left) == (not (everything and report == "new"))


def test_a_report_is_made_anew_when_any_result_is_newer(run):
    stages = plan(run)
    finish_all(stages)
    assert waiting(plan(run)) == {}
    for job in (*stages["collect"].jobs, *stages["retrain"].jobs):
        result = Path(job.directory) / "result.json"
        before = result.stat()
        os.utime(result, (4e9, 4e9))
        assert waiting(plan(run)) == {"report": 1}
        os.utime(result, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert waiting(plan(run)) == {}


def test_more_seeds_later_run_only_those(run):
    finish_all(plan(run))
    later = plan(run, "pipeline.seeds=[3, 4]")
    assert [job.title for job in later["retrain"].waiting] == [
        f"tdds_p{rate}_E_batch_seed4" for rate in (0.3, 0.5, 0.8)
    ]
    assert waiting(later) == {"retrain": 3, "report": 1}
    another = plan(run, "pipeline.scores=[tdds, random]")
    assert waiting(another) == {"select": 1, "retrain": 3, "report": 1}


@st.composite
def pipelines(draw):
    def some(values, least=1):
        return draw(st.lists(st.sampled_from(values), unique=True, min_size=least, max_size=3))

    return [
        f"pipeline.scores=[{', '.join(some(list(BUILT_IN_METHODS)))}]",
        f"pipeline.pruning_rates={some([0.3, 0.5, 0.8], 0)}",
        f"pipeline.strategies=[{', '.join(some(['E', 'P']))}]",
        f"pipeline.seeds={some([0, 1, 5], 0)}",
        f"retrain.importance={draw(st.sampled_from(['none', 'batch', 'sample']))}",
    ]


@settings(deadline=None, max_examples=40)
@given(overrides=pipelines(), data=st.data())
def test_planning_again_plans_what_is_missing_and_after_that_nothing(overrides, data):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        stages = plan(run, *overrides)
        directories = [job.directory for job in stages["retrain"].jobs]
        assert len(set(directories)) == len(directories)
        finish(stages["collect"].jobs[0])
        make_coresets(stages["select"])
        done = data.draw(st.sets(st.integers(0, len(directories) - 1)))
        for number in done:
            finish(stages["retrain"].jobs[number])
        again = plan(run, *overrides)
        left = [directories[number] for number in range(len(directories)) if number not in done]
        assert [job.directory for job in again["retrain"].waiting] == left
        commands = [job.commands for job in stages["retrain"].jobs]
        assert [job.commands for job in again["retrain"].jobs] == commands
        assert again["report"].waiting
        assert not again["collect"].waiting
        assert not again["select"].waiting
        finish_all(again)
        assert waiting(plan(run, *overrides)) == {}


# ---- batches


def test_every_stage_and_rate_must_be_able_to_share_its_batch(run):
    """24 images a step; 12 at pruning rate 0.8."""
    stages = list(plan(run).values())
    config = config_of(run)

    def check(ranks=1, nodes=1, stages=stages, **of_stages):
        own = {stage: {"ranks_per_node": num} for stage, num in of_stages.items()}
        size = {"nodes": nodes, "ranks_per_node": ranks, "stages": own}
        check_batch(config, Cluster(executor="slurm", time_minutes=5, **size), stages)

    for ranks in (1, 2, 3, 4, 6, 12):
        check(ranks)
    collect = "collect on 5 ranks: train.global_batch_size=24 is not divisible by world_size=5"
    refused(collect, check, 5)
    refused("retrain at pruning rate 0.8 on 8 ranks: train.global_batch_size=24 x 0.5", check, 8)
    check(8, retrain=4)
    check(8, stages=[one_run("collect", config, FROZEN)])
    refused(r"retrain at pruning rate 0\.3 on 10 ranks", check, 4, nodes=2, retrain=5)
    check(select=7, report=7)
