"""The command line as a user meets it: the whole flow under torchrun, and one clear line with exit
code 2 for bad input."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdds_dist.__main__ import COMMANDS, main
from tdds_dist.cli.parser import build_parser
from tdds_dist.coreset.samplers import min_max, top
from tdds_dist.data.manifest import read_manifest
from tdds_dist.runs.artifacts import load_coreset, load_scores
from tdds_dist.runs.directory import RunDir
from tests import jobs, make
from tests.make import table, write_several_fields


def done(*arguments):
    """Run `tdds` in this process; it must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments):
    """The one line that `tdds` prints for bad input."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("tdds ")]
    assert len(lines) == 1, captured.err
    return lines[0]


WINDOWS = ["tdds_official_T3_K2_beta0.9", "tdds_official_T4_K3_beta0.9"]


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """A collection on 2 ranks through torchrun, as it was before anything else was done with it;
    its run directory, its config, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    kept = {f"{name}.npz" for name in (*WINDOWS, "entropy", "moderate", "val_classes")}
    left_out = {path.name for path in finished_run.run.rglob("*.npz")} - kept
    ignore = shutil.ignore_patterns("retrain", "coresets", *left_out)
    shutil.copytree(finished_run.run, folder / "run", ignore=ignore)
    for source, target in (
        (finished_run.config, folder / "config.yaml"),
        (finished_run.run / "config.yaml", folder / "run/config.yaml"),
    ):
        target.write_text(source.read_text().replace(str(finished_run.run), str(folder / "run")))
    return folder / "run", folder / "config.yaml", finished_run.said


# ---- the flow


@pytest.mark.distributed
def test_collect_leaves_scores_records_and_the_next_command(finished):
    folder, _, said = finished
    run = RunDir(folder)
    assert [path.stem for path in sorted(run.scores.iterdir())] == ["entropy", "moderate", *WINDOWS]
    for name in WINDOWS:
        scores = load_scores(run.scores / f"{name}.npz")
        assert scores.key == name
        assert (scores.score_N.dtype, scores.score_N.shape) == (np.float32, (120,))
        assert np.isfinite(scores.score_N).all()
        assert sorted(np.unique(scores.label_N)) == list(range(10))
    # ended after the last window, not after the 5 epochs of the schedule
    assert len(run.read_metrics()) == 4
    assert run.read_result()["epochs_planned"] == 5
    assert run.read_env()["world_size"] == 2
    assert "epoch   4/5" in run.log_file.read_text()
    assert said["stdout"].count("next: tdds select") == 1, "only rank 0 speaks"
    assert said["stderr"].count("epoch   4/5") == 1
    assert "\x1b" not in said["stdout"] + said["stderr"]
    assert "\r" not in said["stderr"]


@pytest.mark.distributed
def test_score_recomputes_the_live_scores_bitwise_or_another_preset(finished, tmp_path):
    folder, _, _ = finished
    live = {name: load_scores(RunDir(folder).scores / f"{name}.npz").score_N for name in WINDOWS}
    done("score", folder)
    done("score", folder, "--T", "3", "--K", "2", "--out", tmp_path / "again.npz")
    paths = [*sorted(RunDir(folder).scores.glob("tdds*")), tmp_path / "again.npz"]
    for name, path in zip([*WINDOWS, WINDOWS[0]], paths, strict=True):
        again = load_scores(path)
        assert (again.key, again.settings["source"]) == (name, "recorded")
        assert again.score_N.tobytes() == live[name].tobytes()
    done("score", folder, *"--preset paper --T 4 --K 3 --beta 0 --out".split(), tmp_path / "p.npz")
    scores = load_scores(tmp_path / "p.npz")
    assert scores.key == "tdds_paper_T4_K3_beta0"
    assert (scores.score_N >= 0).all()


@pytest.mark.distributed
def test_select_takes_the_window_of_the_rate(finished, tmp_path):
    folder, _, _ = finished
    for rate, name in zip((0.5, 0.8), WINDOWS, strict=True):
        out = tmp_path / f"{rate}.npz"
        done("select", folder, "--pruning-rate", rate, "--out", out)
        coreset, scores = load_coreset(out), load_scores(RunDir(folder).scores / f"{name}.npz")
        assert coreset.score_key == name
        assert np.array_equal(coreset.index_M, top(scores.score_N, round(120 * (1 - rate))))
        assert np.array_equal(coreset.importance_M, min_max(scores.score_N)[coreset.index_M])


@pytest.mark.distributed
def test_class_balanced_and_random_coresets(finished, tmp_path):
    folder, _, _ = finished
    select = ["select", folder, "--pruning-rate", "0.5", "--out"]
    label_N = load_scores(next(RunDir(folder).scores.iterdir())).label_N
    done(*select, tmp_path / "b.npz", "--class-balanced")
    kept = np.bincount(label_N[load_coreset(tmp_path / "b.npz").index_M])
    assert np.abs(kept - np.bincount(label_N) / 2).max() <= 1
    for seed in "01":
        done(*select, tmp_path / f"r{seed}.npz", "--score", "random", "--seed", seed)
    done(*select, tmp_path / "d.npz", "--score", "random", "--sampler", "drop")
    assert load_coreset(tmp_path / "d.npz").method == "drop_random"
    first, second = (load_coreset(tmp_path / f"r{seed}.npz").index_M for seed in "01")
    assert len(first) == 60
    assert not np.array_equal(first, second)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", "EP")
def test_retrain_on_a_coreset(finished, finished_run, strategy):
    """Of 24 images: Strategy-E keeps 5 epochs, Strategy-P the steps of one; both halve the batch."""
    folder, config, _ = finished
    run = finished_run.retrained
    if strategy == "P":
        options = "--strategy P retrain.epochs=1 train.eval_every=100".split()
        done("retrain", config, "--coreset", finished_run.coreset, *options)
        run = RunDir(folder).retrain / f"{finished_run.coreset.stem}_P_batch_seed0"
    expected = {"epochs": 5, "global_batch_size": 12}
    assert expected.items() <= RunDir(run).read_config()["train"].items()
    expected |= {"num_images": 24, "importance": "batch", "steps": 10}
    assert expected.items() <= RunDir(run).read_result().items()


@pytest.mark.distributed
def test_score_all_and_score_key(finished, tmp_path, capsys):
    """What does not fit into 4 epochs is said, and can be had with options; nothing in the run
    changes."""
    folder, _, _ = finished
    always = {*WINDOWS, "random", "forgetting", "aum"}
    always |= {"csl", "confidence", "variability", "correctness", "learning_time", "cld", "s2l"}
    more = always | {"el2n_T3", "dyn_unc_J3", "dual_J3"}
    for name, options, keys in (
        ("all", "--all", always),
        ("two", "--score aum --score forgetting", {"aum", "forgetting"}),
        ("more", "--all el2n_epochs=3 uncertainty_window=3", more),
    ):
        done("score", folder, *options.split(), "--out", tmp_path / name)
        said = capsys.readouterr()
        assert {path.stem for path in (tmp_path / name).iterdir()} == keys
        if name == "all":
            assert "not computed: el2n: el2n_epochs=10 is longer than the 4" in said.err
            assert f"`tdds score {folder} --all el2n_epochs=4 uncertainty_window=2`" in said.err
            assert f"next: tdds select {tmp_path}/all/{WINDOWS[0]}.npz --pruning-rate" in said.out
    for key in ("aum", "forgetting"):
        one, other = (load_scores(tmp_path / name / f"{key}.npz") for name in ("two", "all"))
        assert one.score_N.tobytes() == other.score_N.tobytes()
    done("score", folder, "--all", "--json", "--out", tmp_path / "all")
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any(text.startswith("not computed: el2n") for text in warnings)


@pytest.mark.distributed
def test_export_import_and_compare(finished, tmp_path, capsys):
    """Scores go out as a table and come back bitwise; what is kept goes out as paths."""
    folder, _, _ = finished
    done("export", folder, "--format", "csv", "--out", tmp_path / "scores.csv")
    done("import", tmp_path / "scores.csv", "--key", WINDOWS[0], "--out", tmp_path / "back.npz")
    scores = load_scores(RunDir(folder).scores / f"{WINDOWS[0]}.npz")
    assert load_scores(tmp_path / "back.npz").score_N.tobytes() == scores.score_N.tobytes()
    done("select", folder, "--pruning-rate", "0.5", "--out", tmp_path / "half.npz")
    images = RunDir(folder).read_config()["data"]["train"]
    done(
        *f"export {tmp_path}/half.npz --format paths --beton {images} --out {tmp_path}/half.txt".split()
    )
    assert len((tmp_path / "half.txt").read_text().split()) == 60
    capsys.readouterr()
    done("compare", folder, "--pruning-rates", "0.5", "--out", tmp_path / "compare.csv")
    assert "moderate" in capsys.readouterr().out
    assert (tmp_path / "compare.csv").read_text().count("\n") > 3


def test_every_reader_takes_the_fields_that_the_config_names(config_file, tmp_path, capsys):
    beton, run = write_several_fields(tmp_path / "x.beton"), tmp_path / "run"
    assert "say in the config" in refused(capsys, "check", beton)
    done("check", beton, "--label-field", "fine", "--image-field", "large")
    data = [f"data.train={beton}", f"data.val={beton}", "data.num_classes=2"]
    fields = ["data.label_field=fine", "data.image_field=large"]
    assert "say in the config" in refused(capsys, "plan", config_file, *data)
    for command in ("plan", "collect"):
        done(command, config_file, *data, *fields)
    done("score", run, "--beton", beton, "--T", 3, "--K", 2, "--out", tmp_path / "s.npz")
    done("export", run, "--format", "csv", "--beton", beton)
    rows = (run / "export/scores.csv").read_text().splitlines()
    label = rows[0].split(",").index("label")
    assert [row.split(",")[label] for row in rows[1:]] == ["0", "1"] * 24
    done("import", run / "export/scores.csv", "--column", WINDOWS[0], "--key", "x", "--run", run)
    capsys.readouterr()
    done("report", run, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("data:image") > 20
    assert refused(capsys, "collect", config_file, *data, "data.label_field=row")


# ---- bad input: exit code 2, one line, before training


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "said"),
    # the data and the network of a config; what is no run; options that do not fit the run, exclude
    # each other or do nothing
    table("""
    collect CONFIG train.accumulation=7 -> train.accumulation=7; use 21 or 28
    collect CONFIG data.train=SHORT -> short.beton
    collect CONFIG data.train=BIG -> data.
    collect CONFIG data.train=BIG data.val=BIG data.num_classes=5 -> data.crop=resized
    collect CONFIG model.name=alexnet -> cannot train on 24 images of 32x32
    collect CONFIG model.name=googlenet -> several outputs
    collect CONFIG train.global_batch_size=1 model.name=shufflenet_v2_x0_5 -> cannot train on 1 images
    score FOLDER/none -> not a directory
    score FOLDER -> no meta.json
    select FOLDER --pruning-rate 1.0 -> [0, 1)
    select FOLDER --pruning-rate 0.5 -> not a run directory
    report FOLDER -> not a run directory
    write nonsense FOLDER/x.beton -> synthetic:N,CLASSES,SIZE
    score RUN --preset paper --T 4 --K 4 -> T=4
    score RUN --all --score aum -> --all and --score exclude each other
    score RUN --all --T 3 -> --T belongs to `tdds score` without --all and --score
    score RUN --score tdds --beta 0 -> --beta belongs to `tdds score` without --all and --score
    score RUN el2n_epochs=3 -> el2n_epochs=3 is an option of --all and --score KEY
    score RUN --score entropy -> `tdds score RUN --final-pass`
    score RUN --all --out x.npz -> must be a directory
    select RUN --pruning-rate 0.5 --num-strata 20 -> --num-strata does nothing with sampler top
    select RUN --pruning-rate 0.5 --sampler ccs --c-d 2 -> --c-d does nothing with sampler ccs
    select RUN --pruning-rate 0.5 --sampler beta --hard-cutoff-rate 0.1 -> --hard-cutoff-rate does nothing with sampler beta
    select RUN --pruning-rate 0.5 --score ccs --sampler top -> --score ccs means sampler ccs
    select RUN --pruning-rate 0.5 --score dual -> has no score 'dual'; it has tdds, random, entropy
    select RUN --pruning-rate 80 -> 80 % is 0.8
    select RUN --pruning-rate 0.5 --score dual_beta -> use --score dual --sampler beta
    select RUN --pruning-rate 0.5 --score tdds_official_T3 -> --score tdds_official_T3_K2_beta0.9 is the nearest
    select RUN --pruning-rate 0.5 --score el2n -> --all` computes every score
    export RUN --format paths -> paths
    retrain CONFIG --coreset CORESET --strategy E data.train=VAL -> belongs to another dataset
    """),
)
def test_bad_input_is_one_line_and_leaves_nothing(
    finished, finished_run, betons, config_file, tmp_path, capsys, words, said
):
    short = tmp_path / "short.beton"
    short.write_bytes(betons["train"].read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    places = {
        "CONFIG": config_file,
        "FOLDER": tmp_path / "empty",
        "RUN": finished[0],
        "SHORT": short,
        "BIG": betons["big"],
        "VAL": betons["val"],
        "CORESET": finished_run.coreset,
    }
    for name, path in places.items():
        words = re.sub(rf"\b{name}\b", str(path), words)
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(capsys, *words.split())
    assert sorted(tmp_path.rglob("*")) == before


CLUSTER = Path(__file__).parents[2] / "configs/clusters/local.yaml"


@pytest.mark.distributed
def test_what_is_refused_early_does_not_wait_for_torch(config_file, finished, tmp_path):
    """torch takes seconds to load, a missing file is seen at once, and help is given at once."""
    collect, retrain = f"collect {config_file}", f"retrain {config_file} --strategy E --coreset"
    scores = next(RunDir(finished[0]).scores.iterdir())
    said = table(f"""
    collect none.yaml -> does not exist
    {collect} train.lrr=1 -> nearest valid key is 'train.lr'
    {collect} data.val=none.beton -> write it with `tdds write SOURCE none.beton --split val`
    {collect} data.train={tmp_path} -> `tdds write imagefolder:{tmp_path} data/NAME.beton --split train`
    {collect} train.mixup=0.5 -> set score.view=clean
    {collect} 'score.windows=[{{T: 3, K: 5}}]' -> K=5 must lie in [2, 3] for T=3
    {collect} 'score.windows=[{{T: 9, K: 5}}]' -> T=9 is longer than train.epochs=3
    collect {CLUSTER} -> a cluster file, not the config of a run; `tdds submit CONFIG.yaml --cluster {CLUSTER}`
    {retrain} none.npz -> does not exist
    {retrain} {scores} -> expected 'coreset'
    experiment none.yaml -> does not exist
    """)
    commands = [shlex.split(words) for words, _ in said]
    code = (
        "import sys; from tdds_dist.__main__ import COMMANDS, main; from tdds_dist.cli.parser"
        " import build_parser\nbuild_parser(COMMANDS).format_help(); print([main(words) for words"
        f" in {commands}], 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"{[2] * len(said)} False", found.stderr
    for line, (words, part) in zip(found.stderr.splitlines(), said, strict=True):
        assert line.startswith(f"tdds {words.split()[0]}: error: ")
        assert part in line


def test_what_is_hardly_meant_is_said_and_divergence_is_one_line(config_file, capsys):
    settings = ["train.global_batch_size=144", "score.windows=[{T: 3, K: 2}]", "train.lr=1e30"]
    assert main(["collect", str(config_file), *settings]) == 2
    said = capsys.readouterr().err
    assert "warning: train.global_batch_size=144 is larger than the 120 images" in said
    assert "warning: K=2 leaves one loss difference per window" in said
    (line,) = (line for line in said.splitlines() if "error: " in line)
    assert "epoch 2, step 1: the weights are not finite" in line
    assert "Traceback" not in said


def test_an_unfinished_run_says_how_far_it_came(config_file, capsys, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text(config_file.read_text())
    run.metrics_file.write_text('{"epoch": 1}\n')
    line = refused(capsys, *f"select {run.path} --score el2n --pruning-rate 0.5".split())
    assert "has not finished (1 of 3 epochs); start it again" in line


def test_plan_warns_of_a_batch_that_repeats_images(config_file, capsys):
    done(*f"plan {config_file} train.global_batch_size=144 --gpus 2 --json".split())
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "larger than the 120 images" in warning
    assert warning.endswith("train.global_batch_size=120 fits")


def test_words_are_not_guessed_but_suggested(capsys):
    for words, said in (
        (["colect", "x"], "the nearest is collect"),
        (["score", "x", "--al"], "unrecognized arguments: --al"),
        (["export", "x", "--format", "cvs"], "the nearest is csv"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["report", "none"], ["report", "none", "--json"]])
def test_a_pipe_that_nobody_reads_changes_no_exit_code(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tdds_dist", *words]
    left = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert left.returncode == 2
    assert left.stderr.count(b"\n") == 1, left.stderr


def test_an_evaluation_file_may_lack_classes(config_file, tmp_path):
    from tdds_dist.config.run import load_config
    from tdds_dist.data.manifest import manifest_path
    from tdds_dist.data.sources import open_source
    from tdds_dist.data.writer import write_beton
    from tdds_dist.training.build import open_files

    path = tmp_path / "part.beton"
    write_beton(open_source("synthetic:45,9,32"), path, num_workers=1, progress=False)
    manifest_path(path).unlink()
    assert open_files(load_config(config_file, [f"data.val={path}"]))[1].num_samples == 45


def following(capsys, first):
    """Run what each stage says comes next; return the commands up to `collect`."""
    commands = [first]
    while not commands[-1].startswith("collect "):
        assert len(commands) < 6, commands
        assert main([*shlex.split(commands[-1]), "--json"]) == 0, commands
        commands.append(json.loads(capsys.readouterr().out)["next"].removeprefix("tdds "))
    return commands


PIXELS = "--exif ignore --background '#00ff00' --grey-range=-5,300"


@pytest.mark.parametrize(
    ("folders", "spec", "options", "expected"),
    # of the command that is expected, what stands behind `write IMAGES VAL --split val`
    [
        ([""], "", "--quality 80", " --quality 80 --holdout 0.1 --seed 0"),
        (["train"], "", "--holdout 0.2 --seed 7", " --holdout 0.2 --seed 7"),
        (["train", "test"], "", "", ""),
        (["train", "val"], "", PIXELS, f" {PIXELS}"),
        (["Train", "Val"], "", "--split train", ""),
        (["train", "val"], "/train", "", ""),
    ],
)
def test_what_comes_next_writes_two_splits_that_share_no_image(
    tmp_path, capsys, folders, spec, options, expected
):
    for number, folder in enumerate(folders):
        for i in range(20):
            file = tmp_path / "images" / folder / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (120 * number, 12 * i, 0)).save(file)
    images = f"imagefolder:{tmp_path}/images"
    train, val = tmp_path / "my_train.beton", tmp_path / "my_val.beton"
    first, *between, _ = following(capsys, f"write {images}{spec} {train} {options}")
    again = [f"{first} --holdout 0.1 --overwrite"] if folders == [""] else []
    images += "/val" if spec else ""
    assert between == [*again, f"write {images} {val} --split val{expected}"]
    found = [read_manifest(train), read_manifest(val)]
    assert [manifest.split for manifest in found] == ["train", "val"]
    assert {manifest.num_classes for manifest in found} == {2}
    assert not {*found[0].crc32_N.tolist()} & {*found[1].crc32_N.tolist()}
    if len(folders) == 1:
        assert sum(manifest.num_samples for manifest in found) == 20


def test_write_says_the_classes_and_what_it_left_out(tmp_path, capsys):
    for name in "abcdefghijkl":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    (tmp_path / "images/b/notes.txt").touch()
    Image.new("LA", (8, 8), (9, 9)).save(tmp_path / "images/a/1.png")
    words = ["write", f"imagefolder:{tmp_path}/images", str(tmp_path / "out.beton")]
    assert "--strict, but left out 1 file: 1 empty" in refused(capsys, *words, "--strict")
    assert "has folders of classes but no val split" in refused(capsys, *words, "--split", "val")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "12 images, 12 classes, 1 file left out" in said
    assert "classes: a, b, c, ..., l" in said
    assert "pixels: 1 with transparency laid on the background #ffffff" in said
    assert "left out 1 file: 1 empty (such as b/notes.txt)" in said
    assert "no val split here: write another folder" not in said  # one image per class
    (tmp_path / "images/b/notes.txt").unlink()
    assert main([*words, "--strict", "--overwrite"]) == 0
    assert "12 classes, 0 files left out" in capsys.readouterr().out


@pytest.mark.distributed
def test_a_run_directory_is_not_overwritten(finished, capsys):
    folder, config, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(["collect", str(config)]) == 0  # the same again: nothing to do
    assert "is finished already" in capsys.readouterr().err
    line = refused(capsys, "collect", config, "train.lr=0.07", "run.seed=3")
    assert "train.lr was 0.05, now 0.07" in line
    assert "run.seed was 0, now 3" in line
    assert "--fresh --force" in line
    assert "already holds a finished run" in refused(capsys, "collect", config, "--fresh")
    assert "give both, or neither" in refused(capsys, "collect", config, "--force")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_one_rank_sees_the_error_of_another():
    from tests.ranks import run_ranks

    no_room = "cannot read or write (no room); free space, or choose another run.dir"
    texts = ["data.train=/x is missing", no_room]
    for text, *others in zip(texts, *run_ranks(3, _only_rank_one_fails), strict=True):
        elsewhere = ("InputError", f"{text} (found on rank 1)")
        assert others == [elsewhere, ("InputError", text), elsewhere]


def _only_rank_one_fails(rank):
    from tdds_dist.distributed.collectives import together
    from tdds_dist.distributed.world import current_world
    from tdds_dist.errors import InputError
    from tests.ranks import catch

    def check(error):
        with together(current_world("cpu")):
            if rank == 1:
                raise error

    return [
        catch(check, error)
        for error in (InputError("data.train=/x is missing"), OSError("no room"))
    ]


def test_new_labels_and_threshold_samples_are_written(tmp_path, capsys):
    (tmp_path / "d.csv").write_text("index,label,new_label\n1,class_0001,class_0003\n")
    words = ["write", "synthetic:40,4,16", tmp_path / "x.beton", "--num-workers", "1"]
    done(*words, "--relabel", tmp_path / "d.csv", "--threshold-samples", "2", "--seed", "3")
    manifest = make.manifest_of(tmp_path / "x.beton")
    assert manifest.settings["relabel"] == ["d.csv"]
    assert manifest.settings["threshold_samples"] == 2
    assert manifest.true_label_N.tolist() == [0, 3, *(np.arange(2, 40) % 4)]
    assert (manifest.label_N == 4).sum() == 8
    said = capsys.readouterr().out
    assert "1 images relabelled" in said
    assert "--threshold-samples 2" in said, "the other split needs the class too"


# ---- how a stage closes: for people, quietly, as JSON


# words behind the stage, and what is written; {run}, {config}, {coreset}, {out} and {beton} are
# filled in
BETON, MANIFEST = "{out}/x.beton", "{out}/x.manifest.json"
BRIEFLY = "--strategy E --name said retrain.epochs=1"
STAGES = {
    "write": (f"synthetic:40,4,16 {BETON} --num-workers 1", f"{BETON} {MANIFEST}"),
    "check": ("{beton}", ""),
    "plan": ("{config}", None),
    "collect": ("{config}", "{run}/scores/tdds_official_T3_K2_beta0.9.npz {run}/models/final.pt"),
    "score": ("{run} --score aum --out {out}", "{out}/aum.npz"),
    "score --final-pass": ("{run}", "{run}/scores/entropy.npz {run}/scores/moderate.npz"),
    "select": ("{run} --pruning-rate 0.5 --out {out}/half.npz", "{out}/half.npz"),
    "retrain": ("{config} --coreset {coreset} " + BRIEFLY, "{run}/retrain/said"),
    "compare": ("{run} --out {out}/c.csv", "{out}/c.csv"),
    "export": ("{run} --format csv --out {out}/s.csv", "{out}/s.csv"),
    "import": ("{out}/in.csv --key aum --out {out}/back.npz", "{out}/back.npz"),
    "report": ("{run} --out {out}/r.html", "{out}/r.html"),
    "suspects": ("{run} --out {out}/s", "{out}/s/suspects.csv {out}/s/review.html"),
    "submit": ("{config} --cluster {out}/cluster.yaml --dry-run", None),
    "status": ("{run}", None),
    "logs": ("{run}", None),
}
RETRAIN = "retrain {run}/config.yaml --coreset {out}/half.npz --strategy E"
NEXT = {
    "write": "tdds write synthetic:40,4,16",
    "collect": "tdds select {run} --pruning-rate 0.5 0.8",
    "score": "tdds select {out}/aum.npz --pruning-rate 0.5",
    "score --final-pass": "tdds select {run} --pruning-rate 0.5 --score entropy",
    "select": f"torchrun --nproc-per-node 2 -m tdds_dist {RETRAIN}",
    "retrain": "tdds report {run}",
    "import": "tdds select {out}/back.npz",
    "report": "open {out}/r.html",
    "suspects": "open {out}/s/review.html",
    "submit": "tdds status {run}",
}


@pytest.fixture
def stage_words(finished, finished_run, betons, tmp_path):
    folder, config, _ = finished
    (tmp_path / "in.csv").write_text("index,score\n0,0.5\n1,0.25\n")
    (tmp_path / "cluster.yaml").write_text("{executor: local, time_minutes: 5}")
    places = {"run": folder, "config": config, "out": tmp_path, "beton": betons["train"]}
    places["coreset"] = finished_run.coreset
    return lambda stage: (f"{stage} {STAGES[stage][0].format(**places)}".split(), places)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_json_is_one_object_and_all_there_is(finished, stage_words, capfd, stage):
    words, places = stage_words(stage)
    assert main(["--json", *words]) == 0
    data = json.loads(capfd.readouterr().out)  # by descriptor: what libraries print counts too
    wrote = STAGES[stage][1]
    if stage == "plan":
        assert data["run"]["images"] == 120
    elif stage == "status":
        assert data["directory"] == str(places["run"])
    elif stage == "logs":
        assert data["lines"][-1].endswith("finished")
    else:
        assert data["stage"] == words[0]
        assert data["exit_code"] == 0
    if wrote is not None:
        # that run was finished before
        files = data["there"] if stage == "collect" else data["wrote"]
        assert {*wrote.format(**places).split()} <= {file["path"] for file in files}
        assert all(file["bytes"] == size(Path(file["path"])) > 0 for file in files)
        assert bool(data["wrote"]) == (stage not in ("check", "collect"))
    if stage == "select":
        assert [(row["kept"], row["images"]) for row in data["rows"]] == [(60, 120)]
    if stage == "report":
        assert data["rows"][0]["name"] == "collect"
        assert data["rows"][0]["about"] == [str(places["run"])]
    if stage in NEXT:
        assert data["next"].startswith(NEXT[stage].format(**places))
    if stage in ("collect", "retrain"):
        run = places["run"] / "retrain/said" if stage == "retrain" else places["run"]
        result = RunDir(run).read_result()
        assert data["numbers"]["final_top1"] == result["final_top1"]
        assert data["numbers"]["epochs"] == result["epochs"] == (1 if stage == "retrain" else 4)
        assert data["numbers"]["memory_bytes"] > 2**20
        assert (data["numbers"]["scoring_share"] is None) == (stage == "retrain")


def size(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "score --final-pass"])
def test_quiet_stages_say_nothing_but_what_was_asked_for(finished, stage_words, capfd, stage):
    words, _ = stage_words(stage)
    assert main([*words, "--quiet"]) == 0
    captured = capfd.readouterr()
    # submit: its dry run
    assert bool(captured.out) == (stage in ("plan", "submit", "status", "logs"))
    assert [line for line in captured.err.splitlines() if not line.startswith("warning: ")] == []


def test_an_experiment_closes_like_the_others(capsys, monkeypatch, tmp_path, betons):
    def experiment(plan, **_):
        (tmp_path / "table.md").write_text("| a table |\n")
        (tmp_path / "cells.csv").write_text("head\none\ntwo\n")
        return tmp_path / "table.md", failed

    failed = []
    monkeypatch.setattr("tdds_dist.experiments.execute.experiment", experiment)
    file = Path(__file__).parents[2] / "configs/experiments/digits_table1.yaml"
    monkeypatch.chdir(file.parents[2])
    assert main(["experiment", str(file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["numbers"]["retrainings"] == 2
    assert data["next"] == f"tdds report {tmp_path}"
    assert main(["experiment", str(file)]) == 0
    assert "| a table |\n\nwrote " in capsys.readouterr().out
    failed.append("cell 3: no such file")
    assert main(["experiment", str(file), "--json"]) == 2
    assert "1 runs failed (cell 3: no such file)" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.distributed
def test_manner_may_stand_before_or_behind(finished, capsys, tmp_path):
    select = ["select", str(finished[0]), "--pruning-rate", "0.5", "--out", str(tmp_path / "c.npz")]
    done(*select)
    capsys.readouterr()
    printed = []
    for words in (
        ["--json", *select],
        [*select, "--json"],
        [select[0], "--json", *select[1:]],
        ["--quiet", *select, "--json"],
    ):
        assert main(words) == 0
        captured = capsys.readouterr()
        printed.append(captured.out)
        assert json.loads(captured.out)["stage"] == "select"
    assert len(set(printed)) == 1


def test_errors_are_json_too(capsys, monkeypatch, tmp_path, config_file):
    for words in (["collect", "none.yaml"], ["select", str(tmp_path), "--pruning-rate", "2"]):
        assert main([*words, "--json"]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert json.loads(captured.out) == {"error": line, "exit_code": 2}
    with pytest.raises(SystemExit):
        main(["select", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert "are required: RUN|SCORES.npz, --pruning-rate" in error
    monkeypatch.setattr("tdds_dist.config.run.load_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        main(["plan", str(config_file), "--json"])
    defect = {"error": "ZeroDivisionError: division by zero", "exit_code": 1}
    assert json.loads(capsys.readouterr().out) == defect


@pytest.mark.distributed
def test_only_rank_0_speaks(finished, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    words = f"select {finished[0]} --pruning-rate 0.5 --out {tmp_path / 'c.npz'}".split()
    done(*words)
    done(*words, "--json")
    assert capsys.readouterr().out == ""


def test_a_page_of_somebody_else_is_not_overwritten(finished, tmp_path, capsys, monkeypatch):
    undrawn = "<svg></svg>"  # drawing takes most of the time
    monkeypatch.setattr("tdds_dist.report.charts._render", lambda *_, **__: undrawn)
    page = tmp_path / "mine.html"
    for text, code in (("<!doctype html><p>mine", 2), ("", 0), (None, 0)):  # then one of ours
        if text is not None:
            page.write_text(text) if text else page.unlink()
        assert main(["report", str(finished[0]), "--out", str(page)]) == code
    assert "was not written by this stage" in capsys.readouterr().err


@pytest.mark.distributed
def test_an_edited_table_of_suspects_is_moved_aside(finished, tmp_path, capsys):
    words, table = ["suspects", str(finished[0]), "--out", str(tmp_path)], tmp_path / "suspects.csv"
    assert main(words) == 0
    edited = table.read_text() + "mine\n"
    table.write_text(edited)
    assert main(words) == 0
    assert "suspects.csv held something else, which is moved aside" in capsys.readouterr().err
    (aside,) = tmp_path.glob("before-*/suspects.csv")
    assert aside.read_text() == edited
    assert "mine" not in table.read_text()


@pytest.mark.distributed
def test_several_rates_in_one_go(finished, capsys, tmp_path):
    folder, _, _ = finished
    done("select", folder, *"--pruning-rate 0.5 0.8 0.5 --score moderate".split())
    out = capsys.readouterr().out
    for rate, num in (("0.5", 60), ("0.8", 24)):
        assert f"wrote {folder}/coresets/moderate_p{rate}.npz" in out
        assert f"kept at {rate}: {num} of 120 images by moderate" in out
        assert len(load_coreset(folder / f"coresets/moderate_p{rate}.npz").index_M) == num
    assert out.count("wrote ") == 2
    two_rates = f"--pruning-rate 0.5 0.8 --out {tmp_path}/x.npz".split()
    line = refused(capsys, "select", folder, *two_rates)
    assert "names one file, and there are 2 pruning rates" in line
    assert not (tmp_path / "x.npz").exists()
    line = refused(capsys, "select", folder, *"--score random --pruning-rate 0.31 1.0".split())
    assert "must lie in [0, 1)" in line
    # all are made before one is written
    assert not list((folder / "coresets").glob("random*_p0.31.npz"))


@pytest.mark.distributed
def test_another_coreset_is_not_overwritten(finished, capsys, tmp_path):
    out = tmp_path / "c.npz"
    select = ["select", str(finished[0]), "--out", str(out), "--score", "random", "--pruning-rate"]
    assert main([*select, "0.5"]) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert main([*select, "0.5"]) == 0
    captured = capsys.readouterr()
    assert "wrote " not in captured.out
    assert f"there is {out}" in captured.out
    for words, changed in (
        (["0.3"], "pruning_rate was 0.5, now 0.3"),
        (["0.5", "--seed", "1"], "seed was 0, now 1"),
    ):
        line = refused(capsys, *select, *words)
        another = f"{out} holds another coreset, 60 images by random ({changed})"
        assert f"{another}; choose another name with --out, or" in line
    assert out.read_bytes() == before
    assert main([*select, "0.3", "--force"]) == 0
    (aside,) = tmp_path.glob("before-*")
    assert f"it is moved aside to {aside}" in capsys.readouterr().err
    assert (aside / "c.npz").read_bytes() == before
    assert len(load_coreset(out).index_M) == 84
    out.write_bytes(b"half of it")
    assert "is no readable coreset" in refused(capsys, *select, "0.5")


# ---- terminals, and Ctrl-C


def on_a_terminal(*words):
    """What `tdds` shows on a terminal of 100 columns, and its exit code."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (40, 100))
    command = [sys.executable, "-m", "tdds_dist", *map(str, words)]
    env = os.environ | {"TERM": "xterm", "NO_COLOR": ""}
    process = subprocess.Popen(command, stdout=inner, stderr=inner, env=env)
    os.close(inner)
    shown = b""
    with suppress(OSError):  # Linux says so when the other end is closed
        while piece := os.read(outer, 1 << 16):
            shown += piece
    os.close(outer)
    return shown.decode(), process.wait(timeout=60)


@pytest.mark.distributed
def test_bars_and_colours_are_for_terminals(finished, tmp_path):
    words = f"score {finished[0]} --score aum --score forgetting --out {tmp_path}"
    shown, code = on_a_terminal(*words.split())
    assert code == 0
    assert "\x1b[32mwrote\x1b[0m" in shown
    assert "\x1b[1mnext:\x1b[0m tdds select" in shown
    assert "score   0 %|" in shown.split("wrote")[0]
    assert "\x1b" not in shown.split("wrote")[0].removesuffix("\x1b[32m"), "a bar has no colour"
    shown, code = on_a_terminal("score", tmp_path / "none")
    assert code == 2
    assert "\x1b[31merror:\x1b[0m" in shown


def interrupted(words, number, is_time):
    """Send a signal to a process of `tdds --json` when it is time; its exit code and the last line
    it said."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "tdds_dist", *words, "--json"]
    process = subprocess.Popen(command, env=env, **piped)
    deadline = time.monotonic() + 60
    while not is_time():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    data, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    line = said.splitlines()[-1]
    assert json.loads(data) == {"error": line, "exit_code": process.returncode}
    return process.returncode, line


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(config_file, tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    words = ["collect", str(config_file), "train.epochs=300", "score.windows=[{T: 3, K: 2}]"]
    code, line = interrupted(words, signal.SIGINT, lambda: len(run.read_metrics()) > 1)
    assert code == 75
    assert line.startswith("tdds collect: SIGINT: saved at epoch ")
    again = f"tdds collect {config_file} train.epochs=300 'score.windows=[{{T: 3, K: 2}}]' --json"
    assert line.endswith(f"run the same command again to go on: {again}")
    assert list(run.checkpoints.iterdir())
    assert json.loads(run.status_file.read_text())["state"] == "stopped"


@pytest.mark.parametrize(
    ("number", "why", "num_bytes"),
    [
        (signal.SIGTERM, "SIGTERM", 0),
        pytest.param(signal.SIGINT, "interrupted", 2**20, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_write_leaves_nothing_half_written(tmp_path, number, why, num_bytes):
    def is_there():
        return any(file.stat().st_size >= num_bytes for file in tmp_path.iterdir())

    words = f"write synthetic:5000,3,256 {tmp_path}/x.beton"
    code, line = interrupted(words.split(), number, is_there)
    assert code == 128 + number
    left = "nothing half-written was left; the same command starts over"
    assert line == f"tdds write: {why}; {left}: tdds {words} --json"
    assert not list(tmp_path.iterdir())


def test_the_device_is_read_at_log_cadence_only(config_file, monkeypatch):
    """The bar shows what was read anyway: 3 epochs of 5 steps, with log_every=2, are 7 looks and
    one at the end of each."""
    from tdds_dist.training.engine import Trainer

    looks, read = [], Trainer._read_totals

    def look(trainer, *rest):
        looks.append(trainer.step)
        return read(trainer, *rest)

    monkeypatch.setattr(Trainer, "_read_totals", look)
    monkeypatch.setenv("TDDS_PROGRESS_SECONDS", "0")
    done("collect", config_file, "train.log_every=2")
    assert looks == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15]


# ---- help


def printed(capsys, word):
    with pytest.raises(SystemExit) as leaving:
        main([word])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def parsers():
    return build_parser(COMMANDS)._subparsers._group_actions[0].choices


def test_help_lists_every_stage_once_in_the_usual_order(capsys):
    text = printed(capsys, "--help")
    listed = re.findall(r"^  ([a-zA-Z]\S*)", text.split("examples:")[0], re.M)
    assert sorted(listed) == sorted(parsers())
    assert listed[:8] == "write check plan collect score select retrain report".split()
    assert text.index("examples:") > text.index("  logs ")
    assert max(map(len, text.splitlines())) <= 130


def test_the_version(capsys):
    from importlib.metadata import version

    assert printed(capsys, "--version") == f"tdds {version('tdds-dist')}\n"


def test_every_format_of_export_can_be_asked_for():
    """The parser does not import the module that writes them."""
    from tdds_dist.coreset.export import FORMATS

    actions = {action.dest: action for action in parsers()["export"]._actions}
    assert actions["format"].choices == FORMATS


def test_every_stage_explains_itself():
    names = "write check plan doctor collect score select retrain train compare experiment export import report suspects submit status logs"
    assert [*parsers()] == names.split()
    by_their_names = "source out config runs coreset beton".split()
    for name, stage in parsers().items():
        assert stage.description, name
        for action in stage._actions:
            assert action.help or action.dest in by_their_names, (name, action.dest)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_number_of_ranks_changes_scores_no_more_than_the_seed_does(tmp_path):
    """Digits, 6 epochs: batch norm sees other batches on 2 ranks than on 1, so scores differ; less
    than between seeds. Of unrelated scores the rank correlation is below 0.1."""
    from scipy.stats import spearmanr

    for split in ("train", "val"):
        done("write", "digits", tmp_path / f"{split}.beton", "--split", split, "--quiet")
    config = CLUSTER.parents[1] / "digits.yaml"
    data = [f"data.{split}={tmp_path}/{split}.beton" for split in ("train", "val")]
    settings = "run.device=cpu model.name=tiny_network train.epochs=6 train.eval_every=6"
    score = {}
    for ranks, seed in [(1, 0), (2, 0), (2, 1)]:
        run = RunDir(tmp_path / f"run{ranks}{seed}")
        words = ["collect", config, f"run.dir={run.path}", f"run.seed={seed}", *data]
        words += [*settings.split(), "score.windows=[{T: 6, K: 5}]", "score.final_pass=false"]
        codes, said = jobs.run(words, ranks, tmp_path / f"said{ranks}{seed}", deadline=250)
        assert codes == [0] * ranks, said
        score[ranks, seed] = load_scores(run.scores / "tdds_official_T6_K5_beta0.9.npz").score_N
    ranks_differ = spearmanr(score[1, 0], score[2, 0])[0]
    seeds_differ = spearmanr(score[2, 0], score[2, 1])[0]
    print(f"rank correlation: 1 and 2 ranks {ranks_differ:.3f}, two seeds {seeds_differ:.3f}")
    assert ranks_differ >= seeds_differ
    assert ranks_differ > 0.5
