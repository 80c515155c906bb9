"""The stages `score` and `select` on recorded outputs: no image, no training, and the authors' numbers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from tdds_dist import score as score_module
from tdds_dist.artifacts import Scores, fingerprint, load_coreset, load_scores, save_scores
from tdds_dist.errors import InputError
from tdds_dist.scalars import SCALARS, log_probabilities, sample_scalars
from tdds_dist.score import score
from tdds_dist.select import select
from tdds_dist.selection import min_max, num_kept
from tdds_dist.tdds import Window
from tdds_dist.trajectory import TrajectoryWriter

GOLDEN = Path(__file__).parent / "golden" / "tdds_official_digits.npz"
GOLDEN_SETTINGS = [(30, 10, 0.9), (20, 10, 0.9), (10, 5, 0.9), (30, 20, 0.85), (12, 10, 0.95)]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.fixture(scope="module")
def dynamics(golden, tmp_path_factory) -> Path:
    """A folder as the authors' code writes it: outputs in visit order, and the index of each row. Never changed."""
    folder = tmp_path_factory.mktemp("dynamics")
    for epoch, (logits_NC, index_N) in enumerate(zip(golden["logits"], golden["index"], strict=True)):
        np.save(folder / f"{epoch}_Output.npy", logits_NC)
        np.save(folder / f"{epoch}_Index.npy", index_N)
    return folder


@pytest.fixture(scope="module")
def trajectory(golden, tmp_path_factory) -> Path:
    """The same outputs as a trajectory of two ranks, with labels. Never changed."""
    folder = tmp_path_factory.mktemp("recorded") / "trajectory"
    writers = [(first, end, TrajectoryWriter(folder, SCALARS, 600, 10, first, end, is_main=first == 0))
               for first, end in ((0, 300), (300, 600))]
    previous = None
    labels = torch.from_numpy(golden["labels"])
    for epoch, (logits_NC, index_N) in enumerate(zip(golden["logits"], golden["index"], strict=True)):
        logits = torch.empty(600, 10)
        logits[torch.from_numpy(index_N)] = torch.from_numpy(logits_NC)
        logp = log_probabilities(logits)
        scalars_FN = sample_scalars(logits, logp, previous, labels).numpy()
        previous = logp
        for first, end, writer in writers:
            if epoch == 0:
                writer.write_labels(golden["labels"][first:end])
            writer.append(epoch, scalars_FN[:, first:end])
    return folder


CONFIG = {
    "run": {"name": "golden"},
    "data": {"train": "a.beton", "val": "b.beton", "num_classes": 10, "image_size": 32, "crop": "pad",
             "mean": [1.0, 1.0, 1.0], "std": [1.0, 1.0, 1.0]},
    "model": {"name": "resnet18"},
    "train": {"epochs": 30, "global_batch_size": 64, "lr": 0.1},
    "score": {"windows": [{"T": 30, "K": 10, "pruning_rates": [0.3]}, {"T": 10, "K": 5, "pruning_rates": [0.9, 0.97]}]},
}


@pytest.fixture
def run(trajectory, tmp_path) -> Path:
    """A run directory with a config and a trajectory, not yet scored."""
    folder = tmp_path / "run"
    shutil.copytree(trajectory, folder / "trajectory")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def golden_score(golden: dict[str, np.ndarray], T: int, K: int, beta: float) -> np.ndarray:
    return golden[f"score_T{T}_K{K}_beta{beta:g}"]


def assert_golden(path: Path, want_N: np.ndarray) -> None:
    np.testing.assert_allclose(load_scores(path).score_N, want_N, rtol=0, atol=1e-5 * float(np.abs(want_N).mean()))


# ---- score: a dynamics folder of the authors' code


@pytest.mark.parametrize(("T", "K", "beta"), GOLDEN_SETTINGS)
def test_dynamics_folder_meets_the_authors_scores(golden, dynamics, tmp_path, T, K, beta):
    out = tmp_path / "score.npz"
    assert score(dynamics, T=T, K=K, beta=beta, out=out) == [out]
    assert_golden(out, golden_score(golden, T, K, beta))
    found = load_scores(out)
    assert found.key == Window(T, K, beta).key("official")
    assert found.settings == {"score": "tdds", "preset": "official", "T": T, "K": K, "beta": beta, "source": "recorded"}


def copied(dynamics: Path, tmp_path: Path, num_epochs: int) -> Path:
    """A copy of the first epochs, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for epoch in range(num_epochs):
        for name in ("Output", "Index"):
            shutil.copy(dynamics / f"{epoch}_{name}.npy", folder)
    return folder


def test_defaults_for_a_dynamics_folder(dynamics, tmp_path):
    """All epochs, K = 10, beta = 0.9, official, beside the outputs."""
    folder = copied(dynamics, tmp_path, 12)
    assert score(folder) == [folder / "tdds_official_T12_K10_beta0.9.npz"]
    assert score(folder, preset="paper") == [folder / "tdds_paper_T12_K10_beta0.9.npz"]
    explicit, = score(folder, T=12, K=10, beta=0.9, preset="official", out=tmp_path / "explicit.npz")
    np.testing.assert_array_equal(load_scores(explicit).score_N,
                                  load_scores(folder / "tdds_official_T12_K10_beta0.9.npz").score_N)


def test_labels_of_a_dynamics_folder_are_unknown(dynamics, tmp_path):
    path, = score(dynamics, T=3, K=2, out=tmp_path / "score.npz")
    found = load_scores(path)
    assert (found.label_N == -1).all()
    assert (found.fingerprint.num_samples, found.fingerprint.num_classes) == (600, 10)
    assert found.fingerprint.labels_sha256 == ""
    with pytest.raises(InputError, match=r"class-balanced selection needs labels.*--beton"):
        select(path, 0.5, class_balanced=True)
    coreset, warnings = select(path, 0.5)
    assert len(load_coreset(coreset).index_M) == 300
    assert warnings == [], "without labels there is no class that could be empty"


@pytest.fixture
def beton(tmp_path, monkeypatch):
    """A function that makes train.beton look as if it held these labels."""
    def holding(label_N: np.ndarray) -> Path:
        path = tmp_path / "train.beton"
        info = SimpleNamespace(path=path, num_samples=len(label_N), label_N=label_N)
        monkeypatch.setattr(score_module, "inspect_beton", {path: info}.__getitem__)
        return path

    return holding


def test_labels_from_a_beton(golden, dynamics, tmp_path, beton):
    path, = score(dynamics, T=3, K=2, beton=beton(golden["labels"]), out=tmp_path / "score.npz")
    found = load_scores(path)
    np.testing.assert_array_equal(found.label_N, golden["labels"])
    assert found.fingerprint == fingerprint(golden["labels"], 10)


def test_beton_of_another_size(golden, dynamics, tmp_path, beton):
    with pytest.raises(InputError, match=r"train\.beton holds 599 samples, the recorded outputs 600"):
        score(dynamics, T=3, K=2, beton=beton(golden["labels"][:599]), out=tmp_path / "score.npz")
    assert not (tmp_path / "score.npz").exists()


def test_beton_with_labels_that_the_outputs_have_no_class_for(golden, dynamics, tmp_path, beton):
    with pytest.raises(InputError, match=r"train\.beton.*10"):
        score(dynamics, T=3, K=2, beton=beton(golden["labels"] + 1), out=tmp_path / "score.npz")


def test_beton_with_other_labels_than_recorded(golden, trajectory, tmp_path, beton):
    """Scores must not get the fingerprint of a dataset that they were not computed from."""
    out = tmp_path / "score.npz"
    assert score(trajectory, T=3, K=2, beton=beton(golden["labels"]), out=out) == [out]
    with pytest.raises(InputError, match=r"train\.beton"):
        score(trajectory, T=3, K=2, beton=beton(golden["labels"][::-1].copy()), out=out)


def test_index_may_be_a_column_of_any_integer_or_float(golden, dynamics, tmp_path):
    """Versions of the authors' code differ in how they stack the indices of batches."""
    folder = copied(dynamics, tmp_path, 4)
    for epoch, dtype in enumerate((np.int32, np.float64, np.uint16, np.int64)):
        path = folder / f"{epoch}_Index.npy"
        np.save(path, np.load(path).astype(dtype)[:, None])
    a, = score(folder, K=2)
    b, = score(dynamics, T=4, K=2, out=tmp_path / "b.npz")
    np.testing.assert_array_equal(load_scores(a).score_N, load_scores(b).score_N)


def test_trajectory_longer_than_the_folder(dynamics, tmp_path):
    with pytest.raises(InputError, match=r"T=31 is longer than the 30 epochs there are"):
        score(dynamics, T=31, out=tmp_path / "score.npz")
    with pytest.raises(InputError, match=r"K=10 must lie in \[2, 5\] for T=5"):
        score(dynamics, T=5, out=tmp_path / "score.npz")


@pytest.mark.parametrize("name", ["Output", "Index"])
def test_missing_epoch(dynamics, tmp_path, name):
    folder = copied(dynamics, tmp_path, 6)
    (folder / f"3_{name}.npy").unlink()
    with pytest.raises(InputError, match=rf"T=6 is longer than the 3 epochs|copy.*3_{name}\.npy"):
        score(folder, T=6, K=2)
    assert not list(folder.glob("*.npz"))


@pytest.mark.parametrize("epoch", [0, 3])
def test_gap_in_the_epochs_is_not_taken_for_the_end(dynamics, tmp_path, epoch):
    """Without T, all epochs are asked for: a missing one must not quietly shorten the trajectory."""
    folder = copied(dynamics, tmp_path, 6)
    (folder / f"{epoch}_Output.npy").unlink()
    with pytest.raises(InputError, match=rf"{epoch}_Output\.npy|epoch {epoch}\b"):
        score(folder, K=2)


def damage_output(folder: Path, epoch: int, change) -> Path:
    path = folder / f"{epoch}_Output.npy"
    np.save(path, change(np.load(path)))
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(golden, dynamics, tmp_path, value):
    def spoil(logits_NC: np.ndarray) -> np.ndarray:
        logits_NC[5, 3] = value
        return logits_NC

    folder = damage_output(copied(dynamics, tmp_path, 4), 2, spoil)
    sample = golden["index"][2, 5]
    with pytest.raises(InputError, match=rf"2_Output\.npy holds NaN or infinite logits \(global ind.* \[{sample}\]\)"):
        score(folder, K=2)
    assert not list(folder.glob("*.npz"))


@pytest.mark.parametrize("change", [
    lambda index_N: np.where(index_N == 7, 8, index_N), lambda index_N: index_N + 1, lambda index_N: index_N[:-1],
    lambda index_N: np.where(index_N == 7, -1, index_N)], ids=["duplicate", "from 1", "short", "negative"])
def test_index_that_does_not_hold_every_sample_once(dynamics, tmp_path, change):
    folder = copied(dynamics, tmp_path, 4)
    path = folder / "2_Index.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(InputError, match=r"2_Index\.npy does not hold every index 0\.\.599 once"):
        score(folder, K=2)


@pytest.mark.parametrize("change", [lambda x: x[:, 0], lambda x: x[None], lambda x: x.argmax(axis=1), lambda x: x > 0],
                         ids=["1-d", "3-d", "classes", "bool"])
def test_outputs_that_are_no_logits(dynamics, tmp_path, change):
    folder = damage_output(copied(dynamics, tmp_path, 4), 2, change)
    with pytest.raises(InputError, match=r"2_Output\.npy is .*expected floating-point logits \[N, C\]"):
        score(folder, K=2)


def test_folder_that_mixes_runs(dynamics, tmp_path):
    folder = damage_output(copied(dynamics, tmp_path, 4), 2, lambda logits_NC: logits_NC[:, :9])
    with pytest.raises(InputError, match=r"epoch 2 has outputs \(600, 9\), the one before \(600, 10\)"):
        score(folder, K=2)


@pytest.mark.parametrize("name", ["Output", "Index"])
def test_damaged_or_pickled_dynamics(dynamics, tmp_path, name):
    folder = copied(dynamics, tmp_path, 4)
    path = folder / f"2_{name}.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=rf"2_{name}\.npy cannot be read"):
        score(folder, K=2)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=rf"2_{name}\.npy cannot be read"):
        score(folder, K=2)


# ---- score: a trajectory, a run


@pytest.mark.parametrize(("T", "K", "beta"), GOLDEN_SETTINGS)
def test_trajectory_meets_the_authors_scores(golden, trajectory, tmp_path, T, K, beta):
    path, = score(trajectory, T=T, K=K, beta=beta, out=tmp_path / "score.npz")
    assert_golden(path, golden_score(golden, T, K, beta))
    np.testing.assert_array_equal(load_scores(path).label_N, golden["labels"])
    assert load_scores(path).fingerprint == fingerprint(golden["labels"], 10)


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_trajectory_and_dynamics_give_the_same_bits(dynamics, trajectory, tmp_path, preset):
    a, = score(dynamics, T=20, K=7, preset=preset, out=tmp_path / "a.npz")
    b, = score(trajectory, T=20, K=7, preset=preset, out=tmp_path / "b.npz")
    np.testing.assert_array_equal(load_scores(a).score_N, load_scores(b).score_N)


def test_run_is_scored_in_every_window_of_its_config(golden, run):
    paths = score(run)
    assert paths == [run / "scores" / f"tdds_official_T{T}_K{K}_beta0.9.npz" for T, K in ((30, 10), (10, 5))]
    for path, setting in zip(paths, ((30, 10, 0.9), (10, 5, 0.9)), strict=True):
        assert_golden(path, golden_score(golden, *setting))


def test_options_go_before_the_config(golden, run):
    path, = score(run, T=30, K=20, beta=0.85)
    assert path == run / "scores" / "tdds_official_T30_K20_beta0.85.npz"
    assert_golden(path, golden_score(golden, 30, 20, 0.85))
    assert [path.name for path in score(run, preset="paper")] == [
        "tdds_paper_T30_K10_beta0.9.npz", "tdds_paper_T10_K5_beta0.9.npz"]
    assert score(run, T=12) == [run / "scores" / "tdds_official_T12_K10_beta0.9.npz"]
    assert score(run, K=7) == [run / "scores" / "tdds_official_T30_K7_beta0.9.npz"]


def test_beta_alone_applies_to_every_window_of_the_config(run):
    assert [path.name for path in score(run, beta=0.5)] == [
        "tdds_official_T30_K10_beta0.5.npz", "tdds_official_T10_K5_beta0.5.npz"]


def test_one_file_for_several_windows(run, tmp_path):
    with pytest.raises(InputError, match=r"--out=.*one\.npz names one file, the run has 2 windows; .*--T and --K"):
        score(run, out=tmp_path / "one.npz")
    assert score(run, T=10, K=5, out=tmp_path / "one.npz") == [tmp_path / "one.npz"]


def test_run_that_stopped_early(run):
    shutil.rmtree(run / "trajectory" / "epoch_0029")
    with pytest.raises(InputError, match=r"T=30 is longer than the 29 epochs there are"):
        score(run)
    assert not (run / "scores").exists(), "no window is written when one cannot be"
    assert len(score(run, T=10, K=5)) == 1


@pytest.mark.parametrize(("options", "match"), [
    ({"preset": "papre"}, r"preset='papre' is unknown; use one of official, paper"),
    ({"beta": 1.5, "T": 10, "K": 5}, r"beta=1\.5 must lie in \[0, 1\]"),
    ({"K": 31}, r"K=31 must lie in \[2, 30\] for T=30"),
    ({"T": 0, "K": 2}, r"K=2 must lie in .* for T=0"),
    ({"K": 30, "preset": "paper"}, r"K=30 must lie in \[1, 29\] for T=30"),
])
@pytest.mark.parametrize("source", ["dynamics", "trajectory", "run"])
def test_settings_that_cannot_be_scored(request, tmp_path, source, options, match):
    with pytest.raises(InputError, match=match):
        score(request.getfixturevalue(source), out=tmp_path / "score.npz", **options)
    assert not (tmp_path / "score.npz").exists()


def test_source_that_holds_nothing(tmp_path):
    with pytest.raises(InputError, match=r"absent is not a directory; give a run directory, a trajectory, or a folder"):
        score(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is not a directory"):
        score(tmp_path / "file")
    with pytest.raises(InputError, match=r"holds no trajectory"):
        score(tmp_path)


# ---- select


def test_selects_with_the_window_that_serves_the_rate(golden, run):
    score(run)
    for rate, setting in ((0.3, (30, 10, 0.9)), (0.9, (10, 5, 0.9))):
        path, warnings = select(run, rate)
        assert warnings == []
        assert path == run / "coresets" / f"{Window(*setting).key('official')}_p{rate:g}.npz"
        coreset = load_coreset(path)
        want_N = golden_score(golden, *setting)
        kept = num_kept(600, rate)
        highest = np.sort(np.argsort(-want_N, kind="stable")[:kept])
        assert len(np.intersect1d(coreset.index_M, highest)) >= kept - 1, "up to the accuracy of float32"
        assert (coreset.score_key, coreset.pruning_rate) == (Window(*setting).key("official"), rate)
        assert coreset.fingerprint == fingerprint(golden["labels"], 10)
    with pytest.raises(InputError, match=r"no window of score\.windows serves pruning_rate=0\.5 \(served: \[0\.3, "):
        select(run, 0.5)


def test_default_paths(run, tmp_path):
    first, second = score(run)
    assert select(run, 0.3, class_balanced=True)[0].name == "tdds_official_T30_K10_beta0.9_balanced_p0.3.npz"
    assert select(run, 0.25, score=second.stem)[0] == run / "coresets" / f"{second.stem}_p0.25.npz"
    assert select(run, 0.5, score="random")[0] == run / "coresets" / "random_s0_p0.5.npz"
    assert select(first, 0.5)[0] == run / "coresets" / f"{first.stem}_p0.5.npz", "of the run that the score is from"
    alone = tmp_path / "alone.npz"
    alone.write_bytes(first.read_bytes())
    assert select(alone, 0.5)[0] == tmp_path / "alone_p0.5.npz", "beside the score file"
    out = tmp_path / "elsewhere" / "mine.npz"
    assert select(run, 0.3, out=out)[0] == out
    assert out.exists()


def test_importance_is_the_score_scaled_over_the_whole_dataset(run):
    first, _ = score(run)
    coreset = load_coreset(select(run, 0.3)[0])
    np.testing.assert_array_equal(coreset.importance_M, min_max(load_scores(first).score_N)[coreset.index_M])
    assert coreset.importance_M.max() == 1.0
    assert coreset.importance_M.min() > 0.0, "0 is the lowest of all N, which was pruned"
    assert coreset.settings["importance"] == "min_max"


def test_importance_in_preset_paper_is_the_score_itself(run):
    path, _ = score(run, preset="paper")
    coreset = load_coreset(select(run, 0.3, score=path.stem)[0])
    np.testing.assert_array_equal(coreset.importance_M, load_scores(path).score_N[coreset.index_M])
    assert coreset.settings["importance"] == "score"


def test_random_coreset_is_uniform_seeded_and_of_the_dataset(golden, run):
    score(run)
    drawn = {}
    for seed in range(4):
        path, _ = select(run, 0.9, score="random", seed=seed)
        coreset = load_coreset(path)
        assert (coreset.importance_M == 1.0).all()
        assert coreset.settings["importance"] == "uniform"
        assert (coreset.settings["seed"], coreset.score_key) == (seed, "random")
        assert coreset.fingerprint == fingerprint(golden["labels"], 10)
        assert len(coreset.index_M) == 60
        drawn[seed] = coreset.index_M.tobytes()
    assert len(set(drawn.values())) == 4
    assert load_coreset(select(run, 0.9, score="random", seed=2)[0]).index_M.tobytes() == drawn[2]
    smaller = load_coreset(select(run, 0.97, score="random", seed=2)[0]).index_M
    assert set(smaller) <= set(np.frombuffer(drawn[2], dtype=np.int64)), "draws of one seed are nested"


def test_class_balanced_keeps_proportions(golden, run):
    score(run)
    path, warnings = select(run, 0.9, class_balanced=True)
    coreset = load_coreset(path)
    assert warnings == []
    assert coreset.settings["class_balanced"] is True
    assert len(coreset.index_M) == 60
    share_C = np.bincount(golden["labels"], minlength=10) / 10
    assert (np.abs(np.bincount(golden["labels"][coreset.index_M], minlength=10) - share_C) < 1).all()


def lopsided(path: Path) -> Path:
    """100 samples of four classes; the scores put class 2 last, and class 3 has one sample."""
    label_N = np.repeat([0, 1, 2, 3], [40, 39, 20, 1])
    score_N = np.where(label_N == 2, 0.0, 1.0 + np.arange(100)).astype(np.float32)
    save_scores(path, Scores("mine", score_N, label_N, fingerprint(label_N, 4), {"score": "tdds"}))
    return path


def test_empty_classes_are_a_warning(tmp_path):
    path, warnings = select(lopsided(tmp_path / "mine.npz"), 0.5)
    assert path == tmp_path / "mine_p0.5.npz"
    assert len(warnings) == 1
    assert warnings[0].startswith("1 of 4 classes keep no sample (first: [2])")
    assert "--class-balanced" in warnings[0]


def test_empty_classes_are_an_error_when_balance_was_asked_for(tmp_path):
    source = lopsided(tmp_path / "mine.npz")
    _, warnings = select(source, 0.1, class_balanced=True)
    assert warnings == []
    with pytest.raises(InputError, match=r"pruning_rate=0\.9: 1 of 4 classes keep no sample \(first: \[3\]\); lower"):
        select(source, 0.9, class_balanced=True, out=tmp_path / "none.npz")
    assert not (tmp_path / "none.npz").exists()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 30, float("nan")])
def test_pruning_rate_is_checked_before_any_file(tmp_path, rate):
    with pytest.raises(InputError, match=rf"pruning_rate={rate} must lie in \[0, 1\)"):
        select(tmp_path / "absent", rate)


def test_pruning_rate_that_keeps_nothing(tmp_path):
    with pytest.raises(InputError, match=r"pruning_rate=0\.999 keeps none of 100 samples"):
        select(lopsided(tmp_path / "mine.npz"), 0.999)


def test_scores_that_are_not_finite(tmp_path):
    label_N = np.zeros(4, dtype=np.int64)
    score_N = np.array([1, np.nan, 2, np.inf], dtype=np.float32)
    save_scores(tmp_path / "bad.npz", Scores("bad", score_N, label_N, fingerprint(label_N, 2), {}))
    with pytest.raises(InputError, match=r"score 'bad' holds 2 values that are not finite"):
        select(tmp_path / "bad.npz", 0.5)


def test_score_that_is_not_there(run, tmp_path):
    with pytest.raises(InputError, match=r"holds no scores; run `tdds collect` or `tdds score` first"):
        select(run, 0.3, score="random")
    with pytest.raises(InputError, match=r"has no score 'tdds_official_T30_K10_beta0\.9'; it has tdds, random"):
        select(run, 0.3)
    score(run)
    with pytest.raises(InputError, match=r"has no score 'el2n'; it has tdds, random, tdds_official_T10_K5_beta0\.9, "):
        select(run, 0.3, score="el2n")
    with pytest.raises(InputError, match=r"absent is not a run directory"):
        select(tmp_path / "absent", 0.3)


def test_naming_a_score_of_a_file_that_holds_another(tmp_path):
    """A file holds one score; asking it for a different one must not be answered with the one it has."""
    source = lopsided(tmp_path / "mine.npz")
    select(source, 0.5, score="mine")
    with pytest.raises(InputError, match=r"mine\.npz.*el2n|el2n.*mine"):
        select(source, 0.5, score="el2n")


def test_files_of_both_stages_hold_no_pickle(run):
    score(run)
    select(run, 0.3)
    files = [*(run / "scores").iterdir(), *(run / "coresets").iterdir()]
    assert len(files) == 3
    for path in files:
        with np.load(path, allow_pickle=False) as file:
            assert json.loads(str(file["meta"]))["settings"]["score"] == "tdds"
            assert all(file[name].dtype != object for name in file)
