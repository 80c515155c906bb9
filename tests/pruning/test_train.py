"""The stage `train`: nothing skipped is plain training, what is skipped is counted, and a run that
is stopped ends as one that was not."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml

from tdds_dist.cli.main import main
from tdds_dist.config.run import load_config, to_dict
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.interruption import Interruption, Preempted
from tdds_dist.errors import InputError
from tdds_dist.pruning.train import train
from tdds_dist.report.accuracy import training_rows
from tdds_dist.report.read import read_facts
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.identity import DECIDES, PLACE, differences, kind_of
from tdds_dist.scoring.trajectory import Trajectory
from tdds_dist.training import engine
from tdds_dist.training.collect import collect
from tdds_dist.training.schedule import learning_rate
from tests.ranks import catch, run_ranks
from tests.training.test_engine import tiny_model

EPOCHS, BATCH = 6, 28  # of 120 images: the last step is padded
BASE = [
    f"train.epochs={EPOCHS}",
    "train.eval_every=2",
    "train.deterministic=true",
    f"train.global_batch_size={BATCH}",
    "train.accumulation=2",
    "score.final_pass=false",
    "train.lr=0.5",
    "score.windows=[{T: 3, K: 3, pruning_rates: [0.0, 0.5]}]",
]
WITHOUT = {  # methods that prune nothing
    "none": [],
    "static": ["prune.rate=0.0"],
    "refresh": ["prune.rate=0.0"],
    "infobatch": ["prune.rate=0.0"],
    "hard_first": ["prune.threshold=1.1"],
    "progressive": ["prune.rate=0.0", "prune.drawn=1.0"],
}
PRUNED = {
    "static": ["prune.rate=0.5", "prune.importance=sample", "prune.start=3"],
    "unweighted": ["prune.method=static", "prune.rate=0.5", "prune.start=3"],
    "refresh": ["prune.rate=0.5", "prune.start=3", "prune.every=2", "prune.twin=true"],
    "infobatch": ["prune.rate=0.5"],
    "infobatch_twin": ["prune.method=infobatch", "prune.rate=0.5", "prune.twin=true"],
    "hard_first": ["prune.threshold=0.6", "train.warmup_epochs=2"],
    "progressive": ["prune.rate=0.35", "prune.schedule_by=images"],
}


def settings(config_file, directory, method, more):
    return load_config(
        config_file, [f"run.dir={directory}", f"prune.method={method}", *BASE, *more]
    )


def outcome(run):
    weights = torch.load(run.models / "final.pt", weights_only=True)
    trajectory = Trajectory(run.trajectory)
    return (
        {name: value.numpy().tobytes() for name, value in weights.items()},
        {name: trajectory.read(name).tobytes() for name in trajectory.scalars},
        {path.name: path.read_bytes() for path in sorted(run.pruning.glob("*.npz"))},
        [
            {key: record.get(key) for key in ("epoch", "step", "lr", "train_loss", "images")}
            for record in run.read_metrics()
        ],
    )


def _without(rank, config_file, folder):
    engine.build_model = tiny_model
    world = distributed.current_world("cpu")
    plain = settings(config_file, folder / "plain", "none", [])
    collect(plain, world)
    found = {"plain": outcome(RunDir(folder / "plain"))}
    for method, more in WITHOUT.items():
        found[method] = outcome(train(settings(config_file, folder / method, method, more), world))
    return found


@pytest.mark.distributed
def test_where_nothing_is_skipped_it_is_plain_training_bit_for_bit(config_file, tmp_path):
    """Weights, recorded scalars and learning rates."""
    found = run_ranks(2, _without, config_file, tmp_path, deadline=280.0)[0]
    weights, scalars, _, records = found.pop("plain")
    for method, (own_weights, own_scalars, files, own_records) in found.items():
        assert own_weights == weights, method
        visited = np.frombuffer(own_scalars.pop("visited"), np.float32)
        assert (visited == 1.0).all()
        assert own_scalars == scalars, method
        assert files == {}
        for record, own in zip(records, own_records, strict=True):
            assert own == record | {"images": 120}, method


def _pruned(rank, config_file, folder, stop):
    """Train; `stop` leaves every run at these (epoch, forward pass), one after the other, and
    starts it again."""
    engine.build_model = tiny_model
    world = distributed.current_world("cpu")
    found = {}
    for method, more in PRUNED.items():
        if method.endswith("_twin"):
            more = [*more, f"prune.twin_of={folder / method.removesuffix('_twin')}"]
        config = settings(config_file, folder / method, method, more)
        for place in stop:
            _leave(config, world, *place)
        run = train(config, world)
        found[method] = outcome(run), run.read_result()
    return found


def _leave(config, world, epoch=4, micro=2):
    interruption, update = Interruption(), engine.Trainer._update

    def until(trainer):
        if (trainer.epoch, trainer.micro) == (epoch, micro):
            interruption._first = "SIGUSR1"
        return update(trainer)

    engine.Trainer._update = until
    with pytest.raises(Preempted):
        train(config, world, interruption=interruption)
    engine.Trainer._update = update


@pytest.fixture(scope="module")
def pruned(betons, tmp_path_factory):
    from tests.conftest import write_config

    folder = tmp_path_factory.mktemp("pruned")
    config_file = write_config(betons, folder)
    return run_ranks(1, _pruned, config_file, folder, (), deadline=280.0)[0], folder, config_file


@pytest.mark.distributed
def test_what_is_skipped_is_counted(pruned):
    found, folder, _ = pruned
    for method, ((_, scalars, _, records), result) in found.items():
        visited_TN = np.frombuffer(scalars["visited"], np.float32).reshape(EPOCHS, 120)
        images = [record["images"] for record in records]
        assert images == visited_TN.sum(axis=1).tolist(), method
        assert images[0] == 120
        assert min(images) < 120
        assert result["images_seen"] == sum(images)
        assert result["images_of_full"] == EPOCHS * 120
        steps = np.cumsum([math.ceil(number / BATCH) for number in images]).tolist()
        assert [record["step"] for record in records] == steps
        for epoch in range(EPOCHS):
            path = folder / method / "pruning" / f"epoch_{epoch:04d}.npz"
            assert path.exists() == (images[epoch] < 120), (method, epoch)
            if images[epoch] == 120:
                continue
            with np.load(path) as file:
                kept = np.unpackbits(file["kept"], count=120)
            assert kept.tolist() == visited_TN[epoch].tolist(), (method, epoch)
    # the same images in every epoch, but for the weights of their losses
    assert found["static"][0][1]["visited"] == found["unweighted"][0][1]["visited"]
    losses = [[r["train_loss"] for r in found[name][0][3]] for name in ("static", "unweighted")]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3:] != losses[1][3:]
    counts = {method: [r["images"] for r in found[method][0][3]] for method in PRUNED}
    assert counts["static"] == [120] * 3 + [60] * 3
    assert counts["refresh"] == [120] * 3 + [60] * 3
    assert counts["progressive"] == [120] + [78] * 5
    assert counts["infobatch_twin"] == counts["infobatch"]
    assert counts["infobatch"][-1] == counts["hard_first"][-1] == 120, "full at the end"


@pytest.mark.distributed
def test_learning_rates_follow_epochs_or_images(pruned):
    """The rate of an epoch's last step: by epochs the same share of a shorter epoch is the same
    place in the schedule."""
    for method, ((_, _, _, records), _) in pruned[0].items():
        seen = 0
        for record in records:
            num_steps = math.ceil(record["images"] / BATCH)
            position = 5 * (record["epoch"] + (num_steps - 1) / num_steps)
            if method == "progressive":
                done = seen + (num_steps - 1) * BATCH
                position = EPOCHS * 5 * done / (120 + 5 * 78)
            warmup = 10 if method == "hard_first" else 0
            expected = learning_rate(position, EPOCHS * 5, 0.5, warmup_steps=warmup)
            assert record["lr"] == pytest.approx(expected, abs=1e-12), (method, record)
            seen += record["images"]


@pytest.mark.distributed
def test_stopped_in_mid_schedule_it_ends_as_if_it_was_not(pruned, tmp_path):
    found, _, config_file = pruned
    resumed = run_ranks(1, _pruned, config_file, tmp_path, [(4, 2)], deadline=280.0)[0]
    for method, (outcome_of_one, result) in found.items():
        assert resumed[method][1]["resumes"] == 1
        assert resumed[method][1]["images_seen"] == result["images_seen"]
        assert resumed[method][0] == outcome_of_one, method


@pytest.mark.slow
@pytest.mark.distributed
def test_stopped_in_random_epochs_on_two_ranks(pruned, tmp_path):
    draws, folders = np.random.default_rng(18), (tmp_path / "whole", tmp_path / "stopped")
    epochs = sorted(draws.choice(EPOCHS, 3, replace=False).tolist())
    places = [(epoch, 2) for epoch in epochs]
    whole, stopped = (
        run_ranks(2, _pruned, pruned[2], folder, stop, deadline=560.0)
        for folder, stop in zip(folders, ((), places), strict=True)
    )
    for of_whole, of_stopped in zip(whole, stopped, strict=True):
        for method, (outcome_of_one, result) in of_whole.items():
            assert of_stopped[method][1]["resumes"] == 3
            assert of_stopped[method][1]["images_seen"] == result["images_seen"]
            assert of_stopped[method][0] == outcome_of_one, (method, places)


def _with_another_set(rank, config_file, folder):
    engine.build_model = tiny_model
    world = distributed.current_world("cpu")
    config = settings(config_file, folder, "infobatch", [*PRUNED["infobatch"], "checkpoint.keep=2"])
    _leave(config, world)
    path = folder / "pruning/epoch_0004.npz"
    path.write_bytes((folder / "pruning/epoch_0003.npz").read_bytes())
    for old in sorted((folder / "checkpoints").glob("step_*"))[:-1]:
        old.rename(folder / old.name)
    return catch(train, config, world)


@pytest.mark.distributed
def test_another_set_than_the_checkpoints_is_refused(config_file, tmp_path):
    kind, text = run_ranks(1, _with_another_set, config_file, tmp_path / "run")[0]
    assert kind == "InputError"
    assert "epoch_0004.npz holds another set" in text
    assert "where that of epoch 5 should be" in text


# ---- before anything runs


def test_the_schedule_alone(config_file, tmp_path, capsys):
    words = ["prune.method=static", "prune.rate=0.5", *BASE, "train.epochs=10"]
    assert main(["train", str(config_file), *words, "--schedule-only", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == [120] * 3 + [60] * 7, "T of the window that serves the rate"
    assert (said["total"], said["full"]) == (780, 1200)
    assert main(["train", str(config_file), *words, "--schedule-only"]) == 0
    text = capsys.readouterr().out
    assert "1 to 3" in text
    assert "65.0 % of a full training" in text
    assert main(["train", str(config_file), "prune.method=infobatch", "--schedule-only"]) == 0
    assert "at most 120" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=infobatch", "rate=0.5", "schedule_by=images"], "use prune.schedule_by=epochs"),
        (
            ["method=infobatch", "every=3"],
            "prune.every=3 means nothing with prune.method=infobatch",
        ),
        (["method=static", "rate=0.3"], "prune.rate=0.3: no window of score.windows serves it"),
        (["method=static", "rate=0.5", "start=9"], "prune.start=9 leaves no epoch to prune"),
        (["method=static", "rate=0.5", "start=2"], "prune.start=2 must be at least 3"),
        (["method=refresh", "rate=0.5", "score=el2n"], 'prune.score="el2n" means nothing'),
        (
            ["method=static", "rate=0.5", "sampler=beta"],
            "prune.sampler=beta needs method=static and score=dual",
        ),
        (
            ["method=static", "rate=0.5", "score=el2n"],
            "el2n_epochs=10 is longer than the 3 recorded epochs; lower that in score.baselines",
        ),
        (
            ["method=static", "rate=0.5", "score=aum", "sampler=ccs"],
            "aum_keep=easiest ranks easy samples first; set it to hardest",
        ),
        (["method=static", "rate=0.5", "score=aum"], "set score.trajectory=true"),
        (["method=progressive", "rate=0.1"], "prune.drawn=0.75 must be at least"),
        (["twin=true"], "prune.twin=true means nothing with prune.method=none"),
        (
            ["method=infobatch", "rate=0.5", "twin=true"],
            "give its run directory as prune.twin_of",
        ),
        (["method=infobatch", "rate=0.5", "twin_of=x"], "set prune.twin=true, or leave it out"),
        (["method=static", "rate=0.5", "twin_of=x"], 'prune.twin_of="x" means nothing'),
    ],
)
def test_what_is_refused(config_file, words, expected):
    more = ["score.trajectory=false", "score.baselines.aum_keep=easiest"]
    config = load_config(config_file, [*BASE, *more, *(f"prune.{word}" for word in words)])
    from tdds_dist.pruning.train import plan_of

    with pytest.raises(InputError) as caught:
        plan_of(config, 120)
    assert expected in str(caught.value)
    with pytest.raises(InputError, match=r"score\.on_nan=quarantine"):
        plan_of(load_config(config_file, ["score.on_nan=quarantine"]), 120)


@pytest.mark.distributed
def test_a_twin_takes_its_numbers_from_a_training_of_the_same_settings(pruned, tmp_path, capsys):
    _, folder, config_file = pruned
    twin = [*BASE, "prune.method=infobatch", "prune.twin=true", f"run.dir={tmp_path}"]
    leave_out = shutil.ignore_patterns("pruning")
    shutil.copytree(folder / "infobatch", folder / "without", ignore=leave_out)
    for other, rate, said in [
        ("infobatch", 0.4, "is a training with rate=0.5, this one has 0.4"),
        ("infobatch_twin", 0.5, "is a training with twin=True, this one has False"),
        ("progressive", 0.5, "is a training with method=progressive, this one has infobatch"),
        ("", 0.5, "must be the run directory of a finished training of infobatch"),
        ("without", 0.5, "without/pruning does not hold the decisions of"),
    ]:
        words = [*twin, f"prune.rate={rate}", f"prune.twin_of={folder / other}"]
        assert main(["train", str(config_file), *words]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _starts_over(rank, config_file, folder):
    engine.build_model = tiny_model
    source = f"prune.twin_of={folder / 'infobatch'}"
    config = settings(
        config_file, folder / "infobatch_twin", "infobatch", [*PRUNED["infobatch_twin"], source]
    )
    run = train(config, distributed.current_world("cpu"), fresh=True, force=True)
    return [record["images"] for record in run.read_metrics()]


@pytest.mark.distributed
def test_a_finished_twin_starts_over(pruned, tmp_path):
    found, folder, config_file = pruned
    for name in ("infobatch", "infobatch_twin"):
        shutil.copytree(folder / name, tmp_path / name)
    images = run_ranks(1, _starts_over, config_file, tmp_path)[0]
    assert images == [record["images"] for record in found["infobatch"][0][3]]


def test_without_a_score_any_number_of_epochs_will_do(config_file):
    """K of the config's windows is 3."""
    from tdds_dist.pruning.train import plan_of

    short = [*BASE, "train.epochs=2"]
    assert plan_of(load_config(config_file, short), 120).epochs == 2
    with pytest.raises(InputError, match=r"score\.windows: K=3 must lie in \[2, 2\]"):
        plan_of(load_config(config_file, [*short, "prune.method=static", "prune.start=1"]), 120)


def test_what_decides_a_pruned_training(config_file, tmp_path):
    run = RunDir(tmp_path / "run")
    was, now = (
        load_config(config_file, [f"score.windows=[{{T: 3, K: 3, pruning_rates: [{rate}]}}]"])
        for rate in (0.5, 0.3)
    )
    for stage, is_another in (("train", True), ("collect", False)):  # the T of the rate
        run.start(to_dict(was), {"stage": stage}, 1, "cpu")
        assert any("score.windows" in key for key in differences(run, now, {"stage": stage})) == (
            is_another
        )
    assert kind_of("prune", "rate", "train") == kind_of("score", "baselines", "train") == DECIDES
    assert kind_of("collect", "stop_after", "train") == PLACE
    assert kind_of("prune", "rate", "collect") == kind_of("prune", "rate", "retrain") == PLACE


# ---- in the report and in a plan


@pytest.mark.distributed
def test_accuracy_against_images_seen(pruned, tmp_path):
    """Of two seeds of a method, its twin, a full training and a shorter one; as a table, in JSON
    and on the page."""
    top1 = {}

    def run(name, copied, *keys, **result):
        folder = shutil.copytree(pruned[1] / copied, tmp_path / name)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        for key, value in keys:
            section, _, name_of = key.partition(".")
            config[section][name_of] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        found = json.loads((folder / "result.json").read_text()) | result
        (folder / "result.json").write_text(json.dumps(found))
        top1[name] = found["final_top1"]
        return found

    own = run("own", "unweighted", final_top1=50.0)
    run("seed1", "unweighted", ("run.seed", 1), final_top1=60.0, seed=1)
    run("twin", "unweighted", ("prune.twin", True), final_top1=58.0)
    none = [("prune.method", "none"), ("prune.rate", 0.0), ("prune.start", None)]
    run("full", "unweighted", *none, images_seen=720, final_top1=70.0)
    shorter = [*none, ("train.epochs", 4), ("train.eval_every", 4)]
    run("shorter", "unweighted", *shorter, images_seen=535, images_of_full=480, final_top1=61.0)
    assert (own["images_seen"], own["images_of_full"]) == (540, 720)
    names = ["own", "seed1", "twin", "full", "shorter"]
    facts = [read_facts(RunDir(tmp_path / name)) for name in names]
    rows = {row["name"]: row for row in training_rows(facts)}
    assert {
        name: (row["share"], row["final_top1"], row["to_twin"]) for name, row in rows.items()
    } == {
        "all images, 6 epochs": (100.0, 70.0, None),
        "all images, 4 epochs": (pytest.approx(100 * 535 / 720), 61.0, None),
        "static, start 3, rate 0.5": (75.0, 55.0, -3.0),
        "static, start 3, rate 0.5: random twin": (75.0, 58.0, None),
    }
    static = rows["static, start 3, rate 0.5"]
    assert (static["seeds"], static["to_full"]) == ([0, 1], -6.0)
    alone = training_rows([facts[0], facts[2], facts[4]])
    assert [row["share"] for row in alone] == [pytest.approx(100 * 535 / 720), 75.0, 75.0]
    other = run("other", "unweighted", *none, ("train.lr", 0.1), images_seen=540, final_top1=1.0)
    rows = {
        row["name"]: row for row in training_rows([*facts, read_facts(RunDir(tmp_path / "other"))])
    }
    assert rows["all images, 6 epochs, train.lr=0.1"]["final_top1"] == other["final_top1"]
    assert rows["static, start 3, train.lr=0.5, rate 0.5"]["to_full"] == -6.0
    page = tmp_path / "report.html"
    code = main(["report", *(str(tmp_path / name) for name in names), "--out", str(page), "--json"])
    assert code == 0
    text = page.read_text()
    assert "Accuracy against images seen" in text
    assert "static, start 3, rate 0.5: random twin" in text


def test_what_a_plan_says(config_file, capsys):
    words = ["prune.method=static", "prune.rate=0.5", *BASE, "train.epochs=10", "run.device=cpu"]
    options = ["--num-samples", "120", "--images-per-second", "0.1", "--json"]
    assert main(["plan", str(config_file), *words, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    (training,) = said["trainings"]
    assert (training["name"], training["images_seen"]) == ("train, static", 780)
    assert training["hours"] == pytest.approx(780 / 0.1 / 3600)
    assert said["disk"]["sets_of_epochs_bytes"] == 7 * 2 * 120 // 8
    weighed = [*words, "prune.importance=batch"]
    assert main(["plan", str(config_file), *weighed, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["disk"]["sets_of_epochs_bytes"] == 7 * (2 + 32) * 120 // 8
    assert main(["train", str(config_file), *words, "--schedule-only", *options[2:4]]) == 0
    assert "2.17 (full training 3.33)" in capsys.readouterr().out
