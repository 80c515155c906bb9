"""The command line as a user meets it: the whole flow under torchrun, and one clear line with exit code 2 for bad input."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from tdds_dist.artifacts import load_coreset, load_scores
from tdds_dist.cli import build_parser, main
from tdds_dist.rundir import RunDir
from tdds_dist.selection import min_max, top


def tdds(*arguments, ranks=1, **options):
    """Run `tdds` in processes of its own."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tdds_dist"]
        if ranks > 1
        else ["-m", "tdds_dist"]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        **options,
    )


def refused(capsys, *arguments):
    """The one line that `tdds` prints for bad input."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("tdds ")]
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.fixture(scope="session")
def finished(betons, tmp_path_factory):
    """A collection on 2 ranks through torchrun; its run directory and config."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "config.yaml"
    config.write_text(f"""
run: {{name: tiny, dir: {folder / "run"}, device: cpu}}
data: {{train: {betons["train"]}, val: {betons["val"]}, num_classes: 10, image_size: 32, crop: pad, padding: 2, flip: false,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: shufflenet_v2_x0_5}}
train: {{epochs: 5, global_batch_size: 24, lr: 0.05}}
score: {{windows: [{{T: 3, K: 2, pruning_rates: [0.0, 0.5]}}, {{T: 4, K: 3, pruning_rates: [0.8]}}]}}
collect: {{stop_after: last_window}}
""")
    done = tdds("collect", config, ranks=2)
    assert done.returncode == 0, done.stderr
    return folder / "run", config, done


# ---- the flow


@pytest.mark.distributed
def test_collect_leaves_scores_records_and_the_next_command(finished):
    folder, _, done = finished
    run = RunDir(folder)
    names = ["tdds_official_T3_K2_beta0.9", "tdds_official_T4_K3_beta0.9"]
    assert [path.stem for path in sorted(run.scores.iterdir())] == ["entropy", "moderate", *names]
    for name in names:
        scores = load_scores(run.scores / f"{name}.npz")
        assert scores.score_N.dtype == np.float32
        assert scores.score_N.shape == (120,)
        assert np.isfinite(scores.score_N).all()
        assert scores.key == name
        assert sorted(np.unique(scores.label_N)) == list(range(10))
    assert len(run.read_metrics()) == 4  # ended after the last window, not after the 5 epochs of the schedule
    assert run.read_result()["epochs_planned"] == 5
    assert run.read_env()["world_size"] == 2
    assert "next: tdds select" in done.stdout
    assert "epoch   4/5" in done.stderr
    assert "epoch   4/5" in run.log_file.read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("window", [[], ["--T", "3", "--K", "2"]])
def test_score_recomputes_the_live_scores_bitwise(finished, tmp_path, window):
    folder, _, _ = finished
    out = ["--out", str(tmp_path / "again.npz")] if window else []
    live = {path: load_scores(path).score_N for path in RunDir(folder).scores.glob("tdds*.npz")}
    assert main(["score", str(folder), *window, *out]) == 0
    for path, score_N in live.items():
        again = tmp_path / "again.npz" if window else path
        if not window or "T3_K2" in path.name:
            assert load_scores(again).score_N.tobytes() == score_N.tobytes()
            assert load_scores(again).settings["source"] == "recorded"


@pytest.mark.distributed
def test_score_gives_the_other_preset_from_the_same_run(finished, tmp_path, capsys):
    folder, _, _ = finished
    assert (
        main(
            ["score", str(folder), "--preset", "paper", "--T", "4", "--K", "3", "--beta", "0", "--out", str(tmp_path / "p.npz")]
        )
        == 0
    )
    scores = load_scores(tmp_path / "p.npz")
    assert scores.key == "tdds_paper_T4_K3_beta0"
    assert (scores.score_N >= 0).all()
    assert "T=4" in refused(capsys, "score", folder, "--preset", "paper", "--T", "4", "--K", "4")
    assert "holds 4 epochs, 5 are needed" in refused(capsys, "score", folder, "--T", "5", "--K", "2").replace(
        "T=5 is longer than the 4 epochs there are", "holds 4 epochs, 5 are needed"
    )


@pytest.mark.distributed
def test_select_takes_the_window_of_the_rate(finished, tmp_path):
    folder, _, _ = finished
    for rate, name in [(0.5, "tdds_official_T3_K2_beta0.9"), (0.8, "tdds_official_T4_K3_beta0.9")]:
        out = tmp_path / f"{rate}.npz"
        assert main(["select", str(folder), "--pruning-rate", str(rate), "--out", str(out)]) == 0
        coreset, scores = load_coreset(out), load_scores(RunDir(folder).scores / f"{name}.npz")
        assert coreset.score_key == name
        assert np.array_equal(coreset.index_M, top(scores.score_N, round(120 * (1 - rate))))
        assert np.array_equal(coreset.importance_M, min_max(scores.score_N)[coreset.index_M])


@pytest.mark.distributed
def test_class_balanced_and_random_coresets(finished, tmp_path):
    folder, _, _ = finished
    label_N = load_scores(next(RunDir(folder).scores.iterdir())).label_N
    assert main(["select", str(folder), "--pruning-rate", "0.5", "--class-balanced", "--out", str(tmp_path / "b.npz")]) == 0
    kept = np.bincount(label_N[load_coreset(tmp_path / "b.npz").index_M])
    assert np.abs(kept - np.bincount(label_N) / 2).max() <= 1
    for seed in ("0", "1"):
        assert (
            main(
                [
                    "select",
                    str(folder),
                    "--pruning-rate",
                    "0.5",
                    "--score",
                    "random",
                    "--seed",
                    seed,
                    "--out",
                    str(tmp_path / f"r{seed}.npz"),
                ]
            )
            == 0
        )
    first, second = (load_coreset(tmp_path / f"r{seed}.npz").index_M for seed in "01")
    assert len(first) == 60
    assert not np.array_equal(first, second)


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "epochs", "ranks"), [("E", 5, 2), ("P", 25, 1)])
def test_retrain_on_a_coreset(finished, tmp_path, strategy, epochs, ranks):
    folder, config, _ = finished
    out = tmp_path / "coreset.npz"
    assert main(["select", str(folder), "--pruning-rate", "0.8", "--out", str(out)]) == 0
    done = tdds("retrain", config, "--coreset", out, "--strategy", strategy, "train.eval_every=100", ranks=ranks)
    assert done.returncode == 0, done.stderr
    run = RunDir(folder).retrain / f"coreset_{strategy}_batch_seed0"
    result = RunDir(run).read_result()
    assert (result["num_images"], result["epochs"], result["global_batch_size"], result["importance"]) == (
        24,
        epochs,
        12,
        "batch",
    )
    assert result["steps"] == epochs * 2
    resolved = RunDir(run).read_config()
    assert (resolved["train"]["epochs"], resolved["train"]["global_batch_size"]) == (epochs, 12)


@pytest.mark.distributed
def test_score_all_and_score_key(finished, tmp_path, capsys):
    """What does not fit into 4 epochs is said, and can be had with options; nothing in the run changes."""
    folder, _, _ = finished
    windows = {"tdds_official_T3_K2_beta0.9", "tdds_official_T4_K3_beta0.9"}
    assert main(["score", str(folder), "--all", "--out", str(tmp_path / "all")]) == 0
    captured = capsys.readouterr()
    assert {path.stem for path in (tmp_path / "all").iterdir()} == windows | {"random", "forgetting", "aum"}
    assert "not computed: el2n: el2n_epochs=10 is longer than the 4" in captured.err
    assert f"`tdds score {folder} --all el2n_epochs=4 uncertainty_window=2`" in captured.err
    assert f"next: tdds select {tmp_path}/all/tdds_official_T3_K2_beta0.9.npz --pruning-rate" in captured.out
    assert main(["score", str(folder), "--all", "--json", "--out", str(tmp_path / "all")]) == 0
    assert any(text.startswith("not computed: el2n") for text in json.loads(capsys.readouterr().out)["warnings"])
    options = ["el2n_epochs=3", "uncertainty_window=3"]
    assert main(["score", str(folder), "--all", *options, "--out", str(tmp_path / "more")]) == 0
    assert {path.stem for path in (tmp_path / "more").iterdir()} == windows | {
        "random", "forgetting", "aum", "el2n_T3", "dyn_unc_J3", "dual_J3"}
    assert main(["score", str(folder), "--score", "aum", "--score", "forgetting", "--out", str(tmp_path / "two")]) == 0
    assert {path.stem for path in (tmp_path / "two").iterdir()} == {"aum", "forgetting"}
    for key in ("aum", "forgetting"):
        score_N = load_scores(tmp_path / "two" / f"{key}.npz").score_N
        assert score_N.tobytes() == load_scores(tmp_path / "all" / f"{key}.npz").score_N.tobytes()


@pytest.mark.distributed
def test_export_import_and_compare(finished, tmp_path, capsys):
    """Scores go out as a table and come back bitwise; what is kept goes out as paths."""
    folder, _, _ = finished
    assert main(["export", str(folder), "--format", "csv", "--out", str(tmp_path / "scores.csv")]) == 0
    key = "tdds_official_T3_K2_beta0.9"
    assert main(["import", str(tmp_path / "scores.csv"), "--key", key, "--out", str(tmp_path / "back.npz")]) == 0
    assert "next: tdds select" in capsys.readouterr().out
    scores = load_scores(RunDir(folder).scores / f"{key}.npz")
    assert load_scores(tmp_path / "back.npz").score_N.tobytes() == scores.score_N.tobytes()
    assert main(["select", str(folder), "--pruning-rate", "0.5", "--out", str(tmp_path / "half.npz")]) == 0
    assert main(["export", str(tmp_path / "half.npz"), "--format", "paths", "--beton", str(data_of(folder)),
                 "--out", str(tmp_path / "half.txt")]) == 0
    assert len((tmp_path / "half.txt").read_text().split()) == 60
    capsys.readouterr()
    assert main(["compare", str(folder), "--pruning-rates", "0.5", "--out", str(tmp_path / "compare.csv")]) == 0
    assert "moderate" in capsys.readouterr().out
    assert (tmp_path / "compare.csv").read_text().count("\n") > 3


def data_of(folder):
    """The training file of a run."""
    return RunDir(folder).read_config()["data"]["train"]


@pytest.mark.distributed
def test_report_is_one_page(finished):
    folder, _, _ = finished
    assert main(["select", str(folder), "--pruning-rate", "0.5"]) == 0
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


# ---- bad input: exit code 2, one line, before training


def test_config_errors(config_file, capsys, tmp_path):
    assert "nearest valid key is 'train.lr'" in refused(capsys, "collect", config_file, "train.lrr=1")
    assert "K=5 must lie in [2, 3] for T=3" in refused(capsys, "collect", config_file, "score.windows=[{T: 3, K: 5}]")
    assert "T=9 is longer than train.epochs=3" in refused(capsys, "collect", config_file, "score.windows=[{T: 9, K: 5}]")
    assert "does not exist" in refused(capsys, "collect", tmp_path / "none.yaml")
    assert "set score.view=clean" in refused(capsys, "collect", config_file, "train.mixup=0.5")
    assert "train.accumulation=7; use 21 or 28" in refused(capsys, "collect", config_file, "train.accumulation=7")
    assert not (tmp_path / "run").exists()


def test_dataset_errors(config_file, capsys, tmp_path, betons):
    assert "data.val=" in refused(capsys, "collect", config_file, f"data.val={tmp_path}/none.beton")
    short = tmp_path / "short.beton"
    short.write_bytes(betons["train"].read_bytes()[:-100])
    assert "short.beton" in refused(capsys, "collect", config_file, f"data.train={short}")
    assert "data.num_classes" in refused(capsys, "collect", config_file, "data.num_classes=9")
    assert "data.num_classes" in refused(capsys, "collect", config_file, "data.num_classes=11")
    assert "data.crop=resized" in refused(
        capsys, "collect", config_file, f"data.train={betons['big']}", f"data.val={betons['big']}", "data.num_classes=5"
    )
    assert not RunDir(tmp_path / "run").metrics_file.exists()


def test_what_is_hardly_meant_is_said(config_file, capsys):
    settings = ["train.global_batch_size=144", "score.windows=[{T: 3, K: 2}]"]
    assert main(["collect", str(config_file), *settings]) == 0
    said = capsys.readouterr().err
    assert "warning: train.global_batch_size=144 is larger than the 120 images" in said
    assert "warning: K=2 leaves one loss difference per window" in said


def test_a_typo_is_named_before_the_key_that_it_leaves_missing(config_file, capsys):
    text = config_file.read_text()
    config_file.write_text(text.replace("lr: 0.05", "learning_rate: 0.05"))
    assert "unknown key 'train.learning_rate'; the nearest valid key is 'train.lr'" in refused(capsys, "collect", config_file)


def test_what_is_no_config_or_no_file_of_images_is_named(config_file, capsys, tmp_path):
    assert f"`tdds write imagefolder:{tmp_path} data/NAME.beton --split train`" in refused(
        capsys, "collect", config_file, f"data.train={tmp_path}")
    cluster = Path(__file__).parents[1] / "configs/clusters/local.yaml"
    assert f"is a cluster file, not the config of a run; `tdds submit CONFIG.yaml --cluster {cluster}`" in refused(
        capsys, "collect", cluster)


def test_an_unfinished_run_says_how_far_it_came(config_file, capsys, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text(config_file.read_text())
    run.metrics_file.write_text('{"epoch": 1}\n')
    assert "has not finished (1 of 3 epochs); start it again" in refused(
        capsys, "select", run.path, "--score", "el2n", "--pruning-rate", "0.5")


def test_plan_warns_of_a_batch_that_repeats_images(config_file, capsys):
    assert main(["plan", str(config_file), "train.global_batch_size=144", "--gpus", "2", "--json"]) == 0
    warning, = json.loads(capsys.readouterr().out)["warnings"]
    assert "larger than the 120 images" in warning
    assert warning.endswith("train.global_batch_size=120 fits")


def test_words_are_not_guessed_but_suggested(capsys):
    for words, said in ((["colect", "x"], "the nearest is collect"), (["score", "x", "--al"], "unrecognized arguments: --al"),
                        (["export", "x", "--format", "cvs"], "the nearest is csv")):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["report", "none"], ["report", "none", "--json"], ["check", "none.beton"]])
def test_a_pipe_that_nobody_reads_changes_no_exit_code(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "tdds_dist", *words], stdout=write, stderr=subprocess.PIPE, text=True,
                          timeout=60)
    os.close(write)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_refused_run_leaves_nothing_and_the_corrected_command_runs(config_file, capsys, tmp_path, betons):
    for wrong, words in [
        ("model.name=resnet99", "not a torchvision classifier"),
        ("model.name=vit_b_16", "cannot train on 24 images of 32x32"),
        ("model.name=googlenet", "several outputs"),
        ("model.name=alexnet", "cannot train on 24 images of 32x32"),
        (f"data.train={betons['big']}", "data."),
    ]:
        assert words in refused(capsys, "collect", config_file, wrong)
        assert not (tmp_path / "run").exists()
    assert "cannot train on 1 images" in refused(capsys, "collect", config_file, "train.global_batch_size=1")
    assert main(["collect", str(config_file)]) == 0


def test_an_evaluation_file_may_lack_classes(config_file, tmp_path, betons):
    from dataclasses import replace

    from tdds_dist.beton import manifest_path
    from tdds_dist.beton_writer import write_beton
    from tdds_dist.config import load_config
    from tdds_dist.prepare import open_files
    from tdds_dist.sources import open_source

    source = open_source("digits", "val", 50)
    kept = np.flatnonzero(source.label_N < 9)
    paths = [source.path[i] for i in kept]
    part = replace(source, path=paths, label_N=source.label_N[kept], reader=lambda i: source.read(int(kept[i])))
    path = tmp_path / "part.beton"
    write_beton(part, path, num_workers=1, progress=False)
    manifest_path(path).unlink()
    assert open_files(load_config(config_file, [f"data.val={path}"]))[1].num_samples == len(kept)


def test_a_full_disk_is_one_line_on_every_rank(config_file, tmp_path):
    """A file where the trajectory's folder should be fails like a disk that takes no more."""
    from ranks import run_ranks

    for kind, text in run_ranks(2, _collect_without_room, config_file, tmp_path):
        assert kind == "InputError"
        assert "cannot read or write" in text


def _collect_without_room(rank, config_file, tmp_path):
    from ranks import catch

    from tdds_dist.collect import collect
    from tdds_dist.config import load_config
    from tdds_dist.distributed import current_world

    if rank == 0:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "models").write_text("in the way")
    return catch(collect, load_config(config_file, ["train.epochs=3"]), current_world("cpu"))


def test_a_diverging_run_ends_with_one_line(config_file, capsys):
    line = refused(capsys, "collect", config_file, "train.lr=1e30")
    assert "NaN or infinite logits" in line
    assert "epoch 1, step" in line


@pytest.mark.distributed
def test_the_coreset_of_another_dataset(finished, config_file, capsys, tmp_path, betons):
    folder, config, _ = finished
    out = tmp_path / "coreset.npz"
    assert main(["select", str(folder), "--pruning-rate", "0.5", "--out", str(out)]) == 0
    line = refused(capsys, "retrain", config, "--coreset", out, "--strategy", "E", f"data.train={betons['val']}")
    assert "belongs to another dataset" in line
    assert "does not exist" in refused(capsys, "retrain", config, "--coreset", tmp_path / "no.npz", "--strategy", "E")
    assert "expected 'coreset'" in refused(
        capsys, "retrain", config, "--coreset", next(RunDir(folder).scores.iterdir()), "--strategy", "E"
    )


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


def test_stage_errors(capsys, tmp_path):
    assert "not a directory" in refused(capsys, "score", tmp_path / "none")
    assert "no meta.json" in refused(capsys, "score", tmp_path)
    assert "[0, 1)" in refused(capsys, "select", tmp_path, "--pruning-rate", "1.0")
    assert "not a run directory" in refused(capsys, "select", tmp_path, "--pruning-rate", "0.5")
    assert "not a run directory" in refused(capsys, "report", tmp_path)
    assert "synthetic:N,CLASSES,SIZE" in refused(capsys, "write", "nonsense", tmp_path / "x.beton")


@pytest.mark.parametrize(("arguments", "words"), [
    (["score", "--all", "--score", "aum"], "--all and --score exclude each other"),
    (["score", "--all", "--T", "3"], "--T belongs to `tdds score` without --all and --score"),
    (["score", "--score", "tdds", "--beta", "0"], "--beta belongs to `tdds score` without --all and --score"),
    (["score", "el2n_epochs=3"], "el2n_epochs=3 is an option of --all and --score KEY"),
    (["score", "--score", "entropy"], "`tdds score RUN --final-pass`"),
    (["score", "--score", "nonsense"], "score 'nonsense' is not computed from recorded epochs"),
    (["score", "--all", "el2n_epoch=3"], "the nearest valid key is 'el2n_epochs'"),
    (["score", "--all", "--out", "x.npz"], "must be a directory"),
    (["select", "--pruning-rate", "0.5", "--num-strata", "20"], "--num-strata does nothing with sampler top"),
    (["select", "--pruning-rate", "0.5", "--sampler", "ccs", "--c-d", "2"], "--c-d does nothing with sampler ccs"),
    (["select", "--pruning-rate", "0.5", "--sampler", "beta", "--hard-cutoff-rate", "0.1"],
     "--hard-cutoff-rate does nothing with sampler beta"),
    (["select", "--pruning-rate", "0.5", "--score", "ccs", "--sampler", "top"], "--score ccs means sampler ccs"),
    (["select", "--pruning-rate", "0.5", "--score", "dual"], "has no score 'dual'; it has tdds, random, "),
    (["select", "--pruning-rate", "80"], "80 % is 0.8"),
    (["select", "--pruning-rate", "0.5", "--score", "dual_beta"], "use --score dual --sampler beta"),
    (["select", "--pruning-rate", "0.5", "--score", "tdds_official_T3"], "--score tdds_official_T3_K2_beta0.9 is the nearest"),
    (["select", "--pruning-rate", "0.5", "--score", "el2n"], "--all` computes every score"),
    (["export", "--format", "paths"], "paths"),
    (["compare", "--pruning-rates", "1.5"], "1.5"),
])
@pytest.mark.distributed
def test_options_that_exclude_each_other_or_do_nothing(finished, capsys, arguments, words):
    stage, *options = arguments
    assert words in refused(capsys, stage, finished[0], *options)


@pytest.mark.distributed
def test_ranks_that_do_not_divide_the_batch_say_so_once(config_file):
    done = tdds("collect", config_file, "train.global_batch_size=25", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("train.global_batch_size=25 is not divisible by world_size=2; use 24 or 26") == 1
    assert "tdds_dist/cli.py" not in done.stderr  # no traceback of ours


def test_one_rank_sees_the_error_of_another(tmp_path):
    from ranks import run_ranks

    outcomes = run_ranks(3, _only_rank_one_fails)
    assert outcomes == [
        ("InputError", "data.train=/x is missing (found on rank 1)"),
        ("InputError", "data.train=/x is missing"),
        ("InputError", "data.train=/x is missing (found on rank 1)"),
    ]


def _only_rank_one_fails(rank):
    from ranks import catch

    return catch(_check_together, rank)


def _check_together(rank):
    from tdds_dist.distributed import current_world, together
    from tdds_dist.errors import InputError

    with together(current_world("cpu")):
        if rank == 1:
            raise InputError("data.train=/x is missing")


def test_a_terminated_write_leaves_nothing(tmp_path):
    out = tmp_path / "x.beton"
    process = subprocess.Popen([sys.executable, "-m", "tdds_dist", "write", "synthetic:5000,3,256", str(out), "--json"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == json.loads(said)["exit_code"] == 143
    assert "the same command starts over: tdds write" in json.loads(said)["error"]
    assert not list(tmp_path.iterdir())


# ---- how a stage closes: for people, quietly, as JSON


@pytest.fixture(scope="module")
def coreset(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("coresets") / "small.npz"
    assert main(["select", str(finished[0]), "--pruning-rate", "0.8", "--out", str(path)]) == 0
    return path


STAGES = {  # words behind the stage, and what is written; {run}, {config}, {coreset}, {out} and {beton} are filled in
    "write": ("synthetic:40,4,16 {out}/x.beton --num-workers 1", ["{out}/x.beton", "{out}/x.manifest.json"]),
    "check": ("{beton}", []),
    "plan": ("{config}", None),
    "collect": ("{config}", ["{run}/scores/tdds_official_T3_K2_beta0.9.npz", "{run}/models/final.pt"]),
    "score": ("{run} --score aum --out {out}", ["{out}/aum.npz"]),
    "score --final-pass": ("{run}", ["{run}/scores/entropy.npz", "{run}/scores/moderate.npz"]),
    "select": ("{run} --pruning-rate 0.5 --out {out}/half.npz", ["{out}/half.npz"]),
    "retrain": ("{config} --coreset {coreset} --strategy E --name said retrain.epochs=1", ["{run}/retrain/said"]),
    "compare": ("{run} --out {out}/c.csv", ["{out}/c.csv"]),
    "export": ("{run} --format csv --out {out}/s.csv", ["{out}/s.csv"]),
    "import": ("{out}/in.csv --key aum --out {out}/back.npz", ["{out}/back.npz"]),
    "report": ("{run} --out {out}/r.html", ["{out}/r.html"]),
    "submit": ("{config} --cluster {out}/cluster.yaml --dry-run", None),
    "status": ("{run}", None),
    "logs": ("{run}", None),
}
NEXT = {"write": "tdds write synthetic:40,4,16", "collect": "tdds select {run} --pruning-rate 0.5 0.8",
        "score": "tdds select {out}/aum.npz --pruning-rate 0.5",
        "score --final-pass": "tdds select {run} --pruning-rate 0.5 --score entropy",
        "select": "torchrun --nproc-per-node 2 -m tdds_dist retrain {run}/config.yaml --coreset {out}/half.npz --strategy E",
        "retrain": "tdds report {run}", "import": "tdds select {out}/back.npz", "report": "open {out}/r.html",
        "submit": "tdds status {run}"}


@pytest.fixture
def stage_words(finished, coreset, betons, tmp_path):
    folder, config, _ = finished
    (tmp_path / "in.csv").write_text("index,score\n0,0.5\n1,0.25\n")
    (tmp_path / "cluster.yaml").write_text("{executor: local, time_minutes: 5}")
    places = {"run": folder, "config": config, "coreset": coreset, "out": tmp_path, "beton": betons["train"]}
    return lambda stage: ([*stage.split(), *(word.format(**places) for word in STAGES[stage][0].split())], places)


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
        files = data["there"] if stage == "collect" else data["wrote"]  # that run was finished before
        assert {path.format(**places) for path in wrote} <= {file["path"] for file in files}
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
        result = RunDir(places["run"] / "retrain/said" if stage == "retrain" else places["run"]).read_result()
        assert data["numbers"]["final_top1"] == result["final_top1"]
        assert data["numbers"]["epochs"] == result["epochs"] == (1 if stage == "retrain" else 4)
        assert data["numbers"]["memory_bytes"] > 2**20
        assert (data["numbers"]["scoring_share"] is None) == (stage == "retrain")


def size(path):
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "score --final-pass"])
def test_quiet_stages_say_nothing_but_what_was_asked_for(finished, stage_words, capfd, stage):
    words, _ = stage_words(stage)
    assert main([*words, "--quiet"]) == 0
    captured = capfd.readouterr()
    assert bool(captured.out) == (stage in ("plan", "submit", "status", "logs"))  # submit: its dry run
    assert [line for line in captured.err.splitlines() if not line.startswith("warning: ")] == []


def test_an_experiment_closes_like_the_others(capsys, monkeypatch, tmp_path, betons):
    def experiment(plan, **_):
        (tmp_path / "table.md").write_text("| a table |\n")
        (tmp_path / "cells.csv").write_text("head\none\ntwo\n")
        return tmp_path / "table.md", failed

    failed = []
    monkeypatch.setattr("tdds_dist.experiment.experiment", experiment)
    file = Path(__file__).parents[1] / "configs/experiments/digits_table1.yaml"
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
    printed = []
    for words in (["--json", *select], [*select, "--json"], [select[0], "--json", *select[1:]], ["--quiet", *select, "--json"]):
        assert main(words) == 0
        captured = capsys.readouterr()
        printed.append(captured.out)
        assert json.loads(captured.out)["stage"] == "select"
    assert len(set(printed)) == 1


def test_errors_are_json_too(capsys, monkeypatch, tmp_path, config_file):
    for words in (["collect", "none.yaml"], ["select", str(tmp_path), "--pruning-rate", "2"]):
        assert main([*words, "--json"]) == 2
        captured = capsys.readouterr()
        line, = captured.err.splitlines()
        assert json.loads(captured.out) == {"error": line, "exit_code": 2}
    with pytest.raises(SystemExit):
        main(["select", "--json"])
    assert "are required: RUN|SCORES.npz, --pruning-rate" in json.loads(capsys.readouterr().out)["error"]
    monkeypatch.setattr("tdds_dist.config.load_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        main(["plan", str(config_file), "--json"])
    assert json.loads(capsys.readouterr().out) == {"error": "ZeroDivisionError: division by zero", "exit_code": 1}


@pytest.mark.distributed
def test_only_rank_0_speaks(finished, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    for manner in ([], ["--json"]):
        assert main(["select", str(finished[0]), "--pruning-rate", "0.5", "--out", str(tmp_path / "c.npz"), *manner]) == 0
    assert capsys.readouterr().out == ""
    done = finished[2]
    assert (done.stdout.count("next: "), done.stderr.count("epoch   4/5")) == (1, 1)


@pytest.mark.distributed
def test_several_rates_in_one_go(finished, capsys, tmp_path):
    folder, _, _ = finished
    assert main(["select", str(folder), "--pruning-rate", "0.5", "0.8", "0.5", "--score", "moderate"]) == 0
    out = capsys.readouterr().out
    for rate, num in (("0.5", 60), ("0.8", 24)):
        assert f"wrote {folder}/coresets/moderate_p{rate}.npz" in out
        assert f"kept at {rate}: {num} of 120 images by moderate" in out
        assert len(load_coreset(folder / f"coresets/moderate_p{rate}.npz").index_M) == num
    assert out.count("wrote ") == 2
    line = refused(capsys, "select", folder, "--pruning-rate", "0.5", "0.8", "--out", tmp_path / "x.npz")
    assert "names one file, and there are 2 pruning rates" in line
    assert not (tmp_path / "x.npz").exists()
    assert "must lie in [0, 1)" in refused(capsys, "select", folder, "--score", "random", "--pruning-rate", "0.31", "1.0")
    assert not list((folder / "coresets").glob("random*_p0.31.npz")), "all are made before one is written"


@pytest.mark.distributed
def test_a_coreset_that_is_replaced_is_named(finished, capsys, tmp_path):
    out = tmp_path / "c.npz"
    select = ["select", str(finished[0]), "--out", str(out), "--score", "random", "--pruning-rate"]
    for words, warned in ((["0.5"], ""), (["0.5"], ""), (["0.3"], "held another coreset (60 images by random)"),
                          (["0.3", "--seed", "1"], "held another coreset (84 images by random)")):
        assert main([*select, *words]) == 0
        captured = capsys.readouterr()
        assert warned in captured.err
        assert bool(warned) == ("warning: " in captured.err) == ("1 warning, see above" in captured.out)
    out.write_bytes(b"half of it")
    assert main([*select, "0.5"]) == 0
    assert "no readable coreset; it is replaced" in capsys.readouterr().err
    assert len(load_coreset(out).index_M) == 60


# ---- terminals, and Ctrl-C


def on_a_terminal(*words, **environment):
    """What `tdds` shows on a terminal of 100 columns, and its exit code."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (40, 100))
    process = subprocess.Popen([sys.executable, "-m", "tdds_dist", *map(str, words)], stdout=inner, stderr=inner,
                               env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **environment})
    os.close(inner)
    shown = b""
    while True:
        try:
            piece = os.read(outer, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(outer)
    return shown.decode(), process.wait(timeout=60)


@pytest.mark.distributed
def test_bars_and_colours_are_for_terminals(finished, tmp_path):
    words = ["score", finished[0], "--score", "aum", "--score", "forgetting", "--out", tmp_path]
    shown, code = on_a_terminal(*words)
    assert code == 0
    assert "\x1b[32mwrote\x1b[0m" in shown
    assert "\x1b[1mnext:\x1b[0m tdds select" in shown
    assert "score   0 %|" in shown.split("wrote")[0]
    plain, _ = on_a_terminal(*words, NO_COLOR="1")
    assert "\x1b[" not in plain
    assert "%|" in plain, "a bar is no colour"
    piped = tdds(*words)
    assert "\x1b" not in piped.stdout + piped.stderr
    assert "\r" not in piped.stderr
    assert f"wrote {tmp_path}/aum.npz (" in piped.stdout
    refused_on_terminal, code = on_a_terminal("score", tmp_path / "none")
    assert code == 2
    assert "\x1b[31merror:\x1b[0m" in refused_on_terminal


def interrupted(words, is_time):
    """Send Ctrl-C to a process of `tdds` when it is time; its exit code and the last line it said."""
    process = subprocess.Popen([sys.executable, "-m", "tdds_dist", *map(str, words)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not is_time():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    return process.returncode, said.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(config_file, tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    words = ["collect", str(config_file), "train.epochs=300", "score.windows=[{T: 3, K: 2}]"]
    code, line = interrupted(words, lambda: len(run.read_metrics()) > 1)
    assert code == 75
    assert line.startswith("tdds collect: SIGINT: saved at epoch ")
    assert line.endswith(f"run the same command again to go on: tdds collect {config_file} train.epochs=300 "
                         "'score.windows=[{T: 3, K: 2}]'")
    assert list(run.checkpoints.iterdir())
    assert json.loads(run.status_file.read_text())["state"] == "stopped"


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    words = ["write", "synthetic:5000,3,256", tmp_path / "x.beton", "--num-workers", "1"]
    code, line = interrupted(words, lambda: any(file.stat().st_size > 2**20 for file in tmp_path.iterdir()))
    assert code == 130
    assert line == ("tdds write: interrupted; nothing half-written was left; the same command starts over: tdds write "
                    f"synthetic:5000,3,256 {tmp_path}/x.beton --num-workers 1")
    assert not list(tmp_path.iterdir())


def test_the_device_is_read_at_log_cadence_only(config_file, monkeypatch):
    """The bar shows what was read anyway: 3 epochs of 5 steps, with log_every=2, are 7 looks and one at the end of each."""
    from tdds_dist.engine import Trainer

    looks, read = [], Trainer._read_totals
    monkeypatch.setattr(Trainer, "_read_totals", lambda trainer, *rest: looks.append(trainer.step) or read(trainer, *rest))
    monkeypatch.setenv("TDDS_PROGRESS_SECONDS", "0")
    assert main(["collect", str(config_file), "train.log_every=2"]) == 0
    assert looks == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15]


def test_what_is_refused_early_does_not_wait_for_torch(config_file, finished, tmp_path):
    """torch takes seconds to load, a missing file is seen at once."""
    config = str(config_file)
    commands = [["collect", "none.yaml"], ["collect", config, "train.lrr=1"], ["collect", config, "data.val=none.beton"],
                ["collect", config, "train.mixup=0.5"], ["collect", config, "score.windows=[{T: 3, K: 5}]"],
                ["retrain", config, "--coreset", "none.npz", "--strategy", "E"],
                ["retrain", config, "--coreset", str(next(RunDir(finished[0]).scores.iterdir())), "--strategy", "E"],
                ["experiment", "none.yaml"]]
    code = f"import sys; from tdds_dist.cli import main; print([main(words) for words in {commands}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2] * len(commands)} False", done.stderr


# ---- help


def test_help_lists_every_stage_once_in_the_usual_order(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.split("examples:")[0].splitlines() if line[:2] == "  " and line[2].isalpha()]
    assert sorted(listed) == sorted(build_parser()._subparsers._group_actions[0].choices)
    assert listed[:8] == ["write", "check", "plan", "collect", "score", "select", "retrain", "report"]
    assert text.index("examples:") > text.index("  logs ")
    assert max(map(len, text.splitlines())) <= 130


def test_the_version(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"tdds {version('tdds-dist')}\n"


def test_every_stage_explains_itself():
    stages = build_parser()._subparsers._group_actions[0].choices
    assert list(stages) == ["write", "check", "plan", "collect", "score", "select", "retrain", "compare", "experiment",
                            "export", "import", "report", "submit", "status", "logs"]
    for name, stage in stages.items():
        assert stage.description, name
        for action in stage._actions:
            assert action.help or action.dest in ("source", "out", "config", "runs", "coreset", "beton"), (name, action.dest)


def test_help_does_not_load_torch():
    code = "import sys; from tdds_dist.cli import build_parser; build_parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_module_is_the_command():
    done = tdds("--help", cwd=Path(__file__).parent)
    assert done.returncode == 0
    assert "collect" in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_number_of_ranks_changes_scores_no_more_than_the_seed_does(tmp_path):
    """Digits, 12 epochs: batch norm sees other batches on 2 ranks than on 1, so scores differ; less than between seeds."""
    from scipy.stats import spearmanr

    root = Path(__file__).resolve().parent.parent
    for split in ("train", "val"):
        assert main(["write", "digits", str(tmp_path / f"{split}.beton"), "--split", split]) == 0
    score = {}
    for ranks, seed in [(1, 0), (2, 0), (2, 1)]:
        folder = tmp_path / f"run{ranks}{seed}"
        done = tdds("collect", root / "configs/digits.yaml", f"run.dir={folder}", f"run.seed={seed}", "run.device=cpu",
                    f"data.train={tmp_path}/train.beton", f"data.val={tmp_path}/val.beton", "train.eval_every=9",
                    "train.epochs=12", "score.windows=[{T: 12, K: 10}]", ranks=ranks)  # fmt: skip
        assert done.returncode == 0, done.stderr
        score[ranks, seed] = load_scores(folder / "scores" / "tdds_official_T12_K10_beta0.9.npz").score_N
    ranks_differ = spearmanr(score[1, 0], score[2, 0])[0]
    seeds_differ = spearmanr(score[2, 0], score[2, 1])[0]
    print(f"rank correlation: 1 and 2 ranks {ranks_differ:.3f}, two seeds {seeds_differ:.3f}")
    assert ranks_differ >= seeds_differ
    assert ranks_differ > 0.2
