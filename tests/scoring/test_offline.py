"""The stages `score` and `select` on recorded outputs: no image, no training, and the authors'
numbers."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from tdds_dist.config.scores import Window
from tdds_dist.coreset import samplers
from tdds_dist.coreset.samplers import num_kept
from tdds_dist.coreset.select import choose, make_coreset
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Scores, fingerprint, load_coreset, load_scores, save_scores
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring import baselines
from tdds_dist.scoring import official_outputs as dynamics_module
from tdds_dist.scoring import offline as score_module
from tdds_dist.scoring import tdds as tdds_module
from tdds_dist.scoring.official_outputs import Dynamics
from tdds_dist.scoring.offline import BASELINES, loss_clusters, score, score_all
from tdds_dist.scoring.sample_stats import SCALARS, log_probabilities, sample_scalars
from tdds_dist.scoring.trajectory import TrajectoryWriter
from tests import make, oracles
from tests.make import refused, select
from tests.scoring.test_scorer import GOLDEN, golden_scores

AUTHORS = golden_scores()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.fixture(scope="module")
def dynamics(golden, tmp_path_factory) -> Path:
    """A folder as the authors' code writes it: outputs in visit order, and the index of each row.
    Never changed."""
    folder = tmp_path_factory.mktemp("dynamics")
    for epoch, (logits_NC, index_N) in enumerate(
        zip(golden["logits"], golden["index"], strict=True)
    ):
        np.save(folder / f"{epoch}_Output.npy", logits_NC)
        np.save(folder / f"{epoch}_Index.npy", index_N)
    return folder


@pytest.fixture(scope="module")
def trajectory(golden, tmp_path_factory) -> Path:
    """The same outputs as a trajectory of two ranks, with labels. Never changed."""
    folder = tmp_path_factory.mktemp("recorded") / "trajectory"
    writers = [
        (first, end, TrajectoryWriter(folder, SCALARS, 600, 10, first, end, is_main=first == 0))
        for first, end in ((0, 300), (300, 600))
    ]
    previous = None
    labels = torch.from_numpy(golden["labels"])
    for epoch, (logits_NC, index_N) in enumerate(
        zip(golden["logits"], golden["index"], strict=True)
    ):
        logits = torch.empty(600, 10)
        logits[torch.from_numpy(index_N)] = torch.from_numpy(logits_NC)
        logp = log_probabilities(logits)
        scalars_FN = sample_scalars(logits, logp, previous, labels).numpy()
        previous = logp
        for first, end, writer in writers:
            if epoch == 0:
                writer.write_labels(
                    golden["labels"][first:end], fingerprint(golden["labels"], 10).labels_sha256
                )
            writer.append(epoch, scalars_FN[:, first:end])
    return folder


CONFIG = make.config(
    data={"num_classes": 10},
    train={"epochs": 30},
    score={
        "windows": [
            {"T": 30, "K": 10, "pruning_rates": [0.3]},
            {"T": 10, "K": 5, "pruning_rates": [0.9, 0.97]},
        ]
    },
)


@pytest.fixture
def run(trajectory, tmp_path) -> Path:
    """A run directory with a config and a trajectory, not yet scored."""
    folder = tmp_path / "run"
    shutil.copytree(trajectory, folder / "trajectory")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def assert_authors(path: Path, window: Window) -> None:
    want_N = AUTHORS[window]
    np.testing.assert_allclose(
        load_scores(path).score_N, want_N, rtol=0, atol=1e-5 * float(np.abs(want_N).mean())
    )


# ---- score: a dynamics folder of the authors' code


@pytest.mark.parametrize("window", AUTHORS, ids=str)
@pytest.mark.parametrize("source", ["dynamics", "trajectory"])
def test_recorded_outputs_meet_the_authors_scores(request, golden, tmp_path, source, window):
    out, T, K, beta = tmp_path / "score.npz", window.T, window.K, window.beta
    assert score(request.getfixturevalue(source), T=T, K=K, beta=beta, out=out) == [out]
    assert_authors(out, window)
    found = load_scores(out)
    assert found.key == window.key("official")
    own = {"score": "tdds", "preset": "official", "T": T, "K": K, "beta": beta}
    assert (own | {"source": "recorded"}).items() <= found.settings.items()
    if source == "trajectory":
        np.testing.assert_array_equal(found.label_N, golden["labels"])
        assert found.fingerprint == fingerprint(golden["labels"], 10)


def copied(dynamics: Path, tmp_path: Path, num_epochs: int) -> Path:
    """A copy of the first epochs, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for epoch in range(num_epochs):
        for name in ("Output", "Index"):
            shutil.copy(dynamics / f"{epoch}_{name}.npy", folder)
    return folder


def change_array(path: Path, change) -> None:
    np.save(path, change(np.load(path)))


def test_defaults_for_a_dynamics_folder(dynamics, tmp_path):
    """All epochs, K = 10, beta = 0.9, official, beside the outputs."""
    folder = copied(dynamics, tmp_path, 12)
    assert score(folder) == [folder / "tdds_official_T12_K10_beta0.9.npz"]
    assert score(folder, preset="paper") == [folder / "tdds_paper_T12_K10_beta0.9.npz"]


def test_labels_of_a_dynamics_folder_are_unknown(dynamics, tmp_path):
    (path,) = score(dynamics, T=3, K=2, out=tmp_path / "score.npz")
    found = load_scores(path)
    assert (found.label_N == -1).all()
    assert (found.fingerprint.num_samples, found.fingerprint.num_classes) == (600, 10)
    assert found.fingerprint.labels_sha256 == ""
    with pytest.raises(InputError, match=r"class-balanced selection needs labels.*--beton"):
        select(path, 0.5, class_balanced=True)
    coreset, warnings = select(path, 0.5)
    assert len(load_coreset(coreset).index_M) == 300
    assert len(warnings) == 1, "without labels there is no class that could be empty"
    assert (
        "all 600 scores of tdds_official_T3_K2_beta0.9 are 0, so the choice is a random draw;"
        " raise K" in warnings[0]
    )


@pytest.fixture
def beton(tmp_path, monkeypatch):
    """A function that makes train.beton look as if it held these labels."""

    def holding(label_N: np.ndarray) -> Path:
        path = tmp_path / "train.beton"
        info = SimpleNamespace(path=path, num_samples=len(label_N), label_N=label_N)
        monkeypatch.setattr(score_module, "inspect_beton", lambda found, *_: {path: info}[found])
        return path

    return holding


@pytest.mark.parametrize(
    ("source", "change", "said"),
    [
        ("dynamics", lambda label_N: label_N[:599], "holds 599 samples, the recorded outputs 600"),
        ("dynamics", lambda label_N: label_N + 1, r"sample \d+ has label 10, outside \[0, 10\)"),
        # scores must not get the fingerprint of a dataset that they were not computed from
        ("trajectory", lambda label_N: label_N[::-1].copy(), "has other labels than those"),
    ],
)
def test_labels_of_another_dataset(request, golden, tmp_path, beton, source, change, said):
    options = {"T": 3, "K": 2, "out": tmp_path / "score.npz"}
    source, other = request.getfixturevalue(source), beton(change(golden["labels"]))
    refused(rf"train\.beton:? {said}", score, source, beton=other, **options)
    assert not (tmp_path / "score.npz").exists()
    score(source, beton=beton(golden["labels"]), **options)
    found = load_scores(tmp_path / "score.npz")
    np.testing.assert_array_equal(found.label_N, golden["labels"])
    assert found.fingerprint == fingerprint(golden["labels"], 10)


def test_index_may_be_a_column_of_any_integer_or_float(golden, dynamics, tmp_path):
    """Versions of the authors' code differ in how they stack the indices of batches."""
    folder = copied(dynamics, tmp_path, 4)
    for epoch, dtype in enumerate((np.int32, np.float64, np.uint16, np.int64)):
        path = folder / f"{epoch}_Index.npy"
        np.save(path, np.load(path).astype(dtype)[:, None])
    (a,) = score(folder, K=2)
    (b,) = score(dynamics, T=4, K=2, out=tmp_path / "b.npz")
    np.testing.assert_array_equal(load_scores(a).score_N, load_scores(b).score_N)


KINDS = ("Output", "Index")


@pytest.mark.parametrize(
    ("name", "T", "said"),
    [
        *(
            (f"3_{kind}", 6, rf"T=6 is longer than the 3 epochs|copy.*3_{kind}\.npy")
            for kind in KINDS
        ),
        *((f"{epoch}_Output", None, rf"{epoch}_Output\.npy|epoch {epoch}\b") for epoch in (0, 3)),
    ],
)
def test_missing_file(dynamics, tmp_path, name, T, said):
    """Also without T, where all epochs are asked for: a gap is not taken for the end."""
    folder = copied(dynamics, tmp_path, 6)
    (folder / f"{name}.npy").unlink()
    refused(said, score, folder, T=T, K=2)
    assert not list(folder.glob("*.npz"))


@pytest.mark.parametrize(
    ("epoch", "rows", "value"),
    [*((2, [5], value) for value in (np.nan, np.inf, -np.inf)), (3, range(20, 320, 15), np.nan)],
)
def test_logits_that_are_not_finite(golden, dynamics, tmp_path, monkeypatch, epoch, rows, value):
    """The first eight of such samples are named, whatever the blocks."""
    monkeypatch.setattr(dynamics_module, "_BLOCK", 10 * 10)
    folder = copied(dynamics, tmp_path, 4)
    logits_NC = np.load(folder / f"{epoch}_Output.npy")
    logits_NC[rows, 3] = value
    np.save(folder / f"{epoch}_Output.npy", logits_NC)
    named = golden["index"][epoch, rows][:8].tolist()
    said = f"{epoch}_Output.npy holds NaN or infinite logits (global indices {named})"
    refused(re.escape(said), score, folder, K=2)
    assert not list(folder.glob("*.npz"))


NOT_ONCE = r"2_Index\.npy does not hold every index 0\.\.599 once"
NO_LOGITS = r"2_Output\.npy is .*expected floating-point logits \[N, C\]"
ANOTHER_RUN = r"epoch 2 has outputs \(600, 9\), the one before \(600, 10\)"
PICKLED = np.array([{}], dtype=object)
DAMAGE = {  # what becomes of an array of epoch 2: its kind, what is said
    "a sample twice": (lambda index_N: np.where(index_N == 7, 8, index_N), "Index", NOT_ONCE),
    "from 1": (lambda index_N: index_N + 1, "Index", NOT_ONCE),
    "short": (lambda index_N: index_N[:-1], "Index", NOT_ONCE),
    "negative": (lambda index_N: np.where(index_N == 7, -1, index_N), "Index", NOT_ONCE),
    "long": (lambda index_N: np.append(index_N, 7), "Index", NOT_ONCE),
    "1-d": (lambda logits_NC: logits_NC[:, 0], "Output", NO_LOGITS),
    "3-d": (lambda logits_NC: logits_NC[None], "Output", NO_LOGITS),
    "classes": (lambda logits_NC: logits_NC.argmax(axis=1), "Output", NO_LOGITS),
    "bool": (lambda logits_NC: logits_NC > 0, "Output", NO_LOGITS),
    "another run": (lambda logits_NC: logits_NC[:, :9], "Output", ANOTHER_RUN),
    "pickled index": (lambda _: PICKLED, "Index", r"2_Index\.npy cannot be read"),
    "pickled logits": (lambda _: PICKLED, "Output", r"2_Output\.npy cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_dynamics(dynamics, tmp_path, damage):
    change, kind, said = DAMAGE[damage]
    folder = copied(dynamics, tmp_path, 4)
    change_array(folder / f"2_{kind}.npy", change)
    refused(said, score, folder, K=2)
    (folder / f"2_{kind}.npy").write_bytes(b"")
    refused(rf"2_{kind}\.npy cannot be read", score, folder, K=2)


# ---- score: a trajectory, a run


def test_options_go_before_the_config(run):
    (path,) = score(run, T=30, K=20, beta=0.85)
    assert path == run / "scores" / "tdds_official_T30_K20_beta0.85.npz"
    assert_authors(path, Window(30, 20, 0.85))
    assert [path.name for path in score(run, preset="paper")] == [
        "tdds_paper_T30_K10_beta0.9.npz",
        "tdds_paper_T10_K5_beta0.9.npz",
    ]
    assert score(run, T=12) == [run / "scores" / "tdds_official_T12_K10_beta0.9.npz"]
    assert score(run, K=7) == [run / "scores" / "tdds_official_T30_K7_beta0.9.npz"]
    assert [path.stem for path in score(run, beta=0.5)] == [
        f"tdds_official_{window}_beta0.5" for window in ("T30_K10", "T10_K5")
    ]


def test_one_file_for_several_windows(run, tmp_path):
    with pytest.raises(
        InputError, match=r"--out=.*one\.npz names one file, the run has 2 windows; .*--T and --K"
    ):
        score(run, out=tmp_path / "one.npz")
    assert score(run, T=10, K=5, out=tmp_path / "one.npz") == [tmp_path / "one.npz"]


def test_run_that_stopped_early(run):
    shutil.rmtree(run / "trajectory" / "epoch_0029")
    refused(r"T=30 is longer than the 29 epochs there are", score, run)
    assert not (run / "scores").exists(), "no window is written when one cannot be"
    assert len(score(run, T=10, K=5)) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"preset": "papre"}, r"preset='papre' is unknown; use one of official, paper"),
        ({"beta": 1.5, "T": 10, "K": 5}, r"beta=1\.5 must lie in \[0, 1\]"),
        ({"K": 31}, r"K=31 must lie in \[2, 30\] for T=30"),
        ({"T": 0, "K": 2}, r"T=0 is too short for a window; use at least 2 epochs"),
        ({"T": 31}, r"T=31 is longer than the 30 epochs there are"),
        ({"T": 5}, r"K=10 must lie in \[2, 5\] for T=5"),
        ({"K": 30, "preset": "paper"}, r"K=30 must lie in \[1, 29\] for T=30"),
        ({"delta": "kl_abs", "T": 10, "K": 5}, "delta='kl_abs' is unknown; use one of kl, kl_s"),
    ],
)
@pytest.mark.parametrize("source", ["dynamics", "trajectory", "run"])
def test_settings_that_cannot_be_scored(request, tmp_path, source, options, match):
    with pytest.raises(InputError, match=match):
        score(request.getfixturevalue(source), out=tmp_path / "score.npz", **options)
    assert not (tmp_path / "score.npz").exists()


def test_source_that_holds_nothing(tmp_path):
    with pytest.raises(
        InputError,
        match=r"absent is not a directory; give a run directory, a trajectory, or a folder",
    ):
        score(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    refused(r"file is not a directory", score, tmp_path / "file")
    refused(r"holds no trajectory", score, tmp_path)


# ---- score_all: every score of a recording


SAMPLES = sorted({*range(0, 600, 13), 298, 299, 300, 301})  # on both ranks' sides of their border


@pytest.fixture(scope="module")
def by_hand(golden) -> list[dict[str, list[float]]]:
    """For each of SAMPLES, what the formulas give by epoch; differences are between an epoch and
    the next."""
    logits_TNC = np.empty((30, 600, 10))
    for epoch in range(30):
        logits_TNC[epoch][golden["index"][epoch]] = golden["logits"][epoch]
    found = []
    for sample in SAMPLES:
        rows, label = logits_TNC[:, sample].tolist(), int(golden["labels"][sample])
        pairs = list(pairwise(rows))
        found.append(
            {
                "correct": [oracles.correct(row, label) for row in rows],
                "el2n": [oracles.el2n(row, label) for row in rows],
                "logit": [oracles.margin(row, label) for row in rows],
                "probability": [oracles.margin(oracles.softmax(row), label) for row in rows],
                "p_label": [oracles.softmax(row)[label] for row in rows],
                "official": [oracles.loss_difference_official(*pair) for pair in pairs],
                "paper": [oracles.loss_difference_paper(*pair) for pair in pairs],
                "ce": [oracles.loss_difference_ce(*pair, label) for pair in pairs],
            }
        )
    return found


# key: what it is of one sample, under default options
ORACLES = {
    "forgetting": lambda s: oracles.forgetting(s["correct"], "inf"),
    "el2n": lambda s: oracles.el2n_early(s["el2n"], 10),
    "aum": lambda s: oracles.aum(s["logit"], "hardest"),
    "dyn_unc": lambda s: oracles.dyn_unc(s["p_label"], 10),
    "dual": lambda s: oracles.dual(s["p_label"], 10),
    "csl": lambda s: oracles.csl(s["p_label"]),
    "confidence": lambda s: -oracles.mean(s["p_label"]),
    "variability": lambda s: oracles.variability(s["p_label"]),
    "correctness": lambda s: -sum(s["correct"]),
    "learning_time": lambda s: oracles.learning_time(s["correct"]),
}


def assert_oracle(path: Path, oracle, by_hand) -> None:
    want = np.array([oracle(sample) for sample in by_hand])
    assert np.ptp(want) > 0
    np.testing.assert_allclose(
        load_scores(path).score_N[SAMPLES], want, rtol=2e-5, atol=2e-5 * np.abs(want).mean()
    )


DEFAULT_SETTINGS = {
    "random": {"score": "random"},
    "forgetting": {"score": "forgetting", "T": 30, "never_learned": "inf"},
    "el2n": {"score": "el2n", "T": 10, "el2n_epochs": 10},
    "aum": {"score": "aum", "T": 30, "aum_of": "logit", "keep": "hardest"},
    "dyn_unc": {"score": "dyn_unc", "T": 30, "J": 10},
    "dual": {"score": "dual", "T": 30, "J": 10},
    **{
        key: {"score": key, "T": 30}
        for key in ("csl", "confidence", "variability", "correctness", "learning_time")
    },
    "s2l": {"score": "s2l", "T": 30, "num_clusters": 100},
}
EXTRA = {"dual": ["p_mean"], "s2l": ["cluster"]}  # what samplers need besides the score


LONG, EARLY = Window(30, 10, 0.9), Window(10, 5, 0.9)  # those of CONFIG


def assert_every_score(
    golden, by_hand, folder: Path, windows, origin: dict, draw_seed: int
) -> None:
    """The folder holds all that can be recorded of the golden run, and nothing else."""
    assert sorted(path.stem for path in folder.glob("*.npz")) == sorted(
        [*DEFAULT_SETTINGS, *(window.key("official") for window in windows)]
    )
    for window in windows:
        assert_authors(folder / f"{window.key('official')}.npz", window)
    for key, oracle in ORACLES.items():
        assert_oracle(folder / f"{key}.npz", oracle, by_hand)
    np.testing.assert_array_equal(
        load_scores(folder / "random.npz").score_N, baselines.random(600, draw_seed)
    )
    p_mean_N = load_scores(folder / "dual.npz").extra["p_mean"]
    np.testing.assert_allclose(
        p_mean_N[SAMPLES], [oracles.mean(sample["p_label"]) for sample in by_hand], rtol=2e-5
    )
    for key, settings in DEFAULT_SETTINGS.items():
        found = load_scores(folder / f"{key}.npz")
        draw = {"draw_seed": draw_seed} if key == "random" else {}
        assert (found.key, found.settings) == (
            key,
            settings | draw | {"source": "recorded"} | origin,
        )
        assert found.fingerprint == fingerprint(golden["labels"], 10)
        np.testing.assert_array_equal(found.label_N, golden["labels"])
        assert sorted(found.extra) == EXTRA.get(key, [])


NOT_RECORDED = [
    "cld: score cld needs the validation loss of each class (val_classes.npz beside the trajectory),"
    " which `tdds collect` records since it knows that score; collect again, or write that file"
    " (docs/own_loop.md)"
]
MODEL_SCORES_MISSING = [
    f"{key}: needs the final model; `tdds score RUN --final-pass` computes it from a run's weights"
    for key in ("entropy", "moderate")
]


def test_every_score_of_a_run(golden, run, by_hand):
    (run / "config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"run": {"name": "golden", "seed": 3}})
    )
    (run / "env.json").write_text(json.dumps({"world_size": 2}))
    paths, skipped = score_all(run)
    assert sorted(paths) == sorted((run / "scores").iterdir())
    assert skipped == NOT_RECORDED + MODEL_SCORES_MISSING
    origin = {"epochs": 30, "seed": 3, "world_size": 2}
    assert_every_score(golden, by_hand, run / "scores", [LONG, EARLY], origin, 3)


def test_cld_is_of_the_epochs_with_validation(run, by_hand, golden):
    """Every third epoch was validated; the last of them is beyond `num_epochs`."""
    rng, directory = np.random.default_rng(5), RunDir(run)
    epochs = range(2, 30, 3)
    val_loss_EC = rng.random((30, 10))
    for epoch in epochs:
        directory.append_val_classes(epoch, val_loss_EC[epoch], np.ones(10))
    (path,), _ = score_all(run, ["cld"], options=["num_epochs=29"])
    used = [epoch for epoch in epochs if epoch < 29]
    want = [
        oracles.cld(
            [sample["p_label"][epoch] for epoch in used],
            val_loss_EC[used, golden["labels"][number]].tolist(),
        )
        for number, sample in zip(SAMPLES, by_hand, strict=True)
    ]
    np.testing.assert_allclose(load_scores(path).score_N[SAMPLES], want, rtol=1e-3, atol=1e-5)
    assert load_scores(path).settings["validations"] == len(used)
    of_run = load_scores(path).score_N
    (run / "config.yaml").unlink()  # the trajectory of a loop of one's own, and its validation
    (path,), _ = score_all(run / "trajectory", ["cld"], out=run, options=["num_epochs=29"])
    assert load_scores(path).score_N.tobytes() == of_run.tobytes()
    (run / "val_classes.npz").unlink()
    directory.append_val_classes(2, np.ones(4), np.ones(4))
    refused("has 4 classes, what was recorded 10", score_all, run / "trajectory", ["cld"], out=run)


def test_clusters_hold_like_trajectories_and_are_the_same_every_time():
    """Four kinds of trajectories, drawn with little noise, of different numbers."""
    rng, num = np.random.default_rng(0), [5, 40, 400, 2000]
    kind_N = rng.permutation(np.repeat(np.arange(4), num))
    level_TN = np.array([[0.9, 0.1, 0.5, 0.9], [0.9, 0.1, 0.9, 0.2]])[:, kind_N]
    p_TN = (level_TN + 0.01 * rng.random(level_TN.shape)).astype(np.float32)
    cluster_N = loss_clusters(p_TN, 4)
    assert len({*zip(kind_N.tolist(), cluster_N.tolist(), strict=True)}) == 4
    np.testing.assert_array_equal(loss_clusters(p_TN, 4), cluster_N)
    refused("num_clusters=4 are more than the 3 samples; lower it", loss_clusters, p_TN[:, :3], 4)


def test_scores_of_the_final_model_are_not_missed_where_they_are(golden, run):
    make.save(run / "scores", make.scores("entropy", np.zeros(600), golden["labels"], 10))
    assert score_all(run)[1] == NOT_RECORDED + MODEL_SCORES_MISSING[1:]


def test_every_score_of_a_dynamics_folder_is_that_of_a_foreign_trajectory(
    golden, dynamics, trajectory, tmp_path, beton, by_hand, monkeypatch
):
    """The folder with labels; both into another folder."""
    read, before = [], sorted(trajectory.iterdir())
    monkeypatch.setattr(
        Dynamics,
        "_read_epoch",
        lambda self, epoch, real=Dynamics._read_epoch: read.append(epoch) or real(self, epoch),
    )
    labels = beton(golden["labels"])
    for folder, source, options, origin in (
        (tmp_path / "a", dynamics, {"beton": labels}, {}),
        (tmp_path / "b", trajectory, {}, {"epochs": 30}),
    ):
        paths, skipped = score_all(source, **options, out=folder)
        assert {path.parent for path in paths} == {folder}
        assert skipped == NOT_RECORDED + MODEL_SCORES_MISSING
        assert_every_score(golden, by_hand, folder, [LONG], origin, 0)
    assert [read.count(epoch) for epoch in range(1, 30)] == [1] * 29, (
        "each file is read once for all scores"
    )
    assert sorted(trajectory.iterdir()) == before
    assert_same_arrays(tmp_path / "a", tmp_path / "b")


def assert_same_arrays(one: Path, other: Path) -> None:
    """The folders hold the same score files, in every bit but for their settings."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names:
        a, b = load_scores(one / name), load_scores(other / name)
        assert a.score_N.tobytes() == b.score_N.tobytes(), name
        for key, values in a.extra.items():
            assert values.tobytes() == b.extra[key].tobytes(), (name, key)


def every_score(source: Path, folder: Path, beton: Path | None = None) -> Path:
    """A folder with all scores, and TDDS in the other preset as well."""
    score_all(source, beton=beton, out=folder)
    score(source, preset="paper", beton=beton, out=folder / "paper.npz")
    return folder


def test_scores_in_blocks(golden, trajectory, dynamics, tmp_path, beton, monkeypatch):
    """600 samples, or rows of a file, in blocks of 7, the last of 5: the same bits in every score,
    and whoever computes them."""
    whole = every_score(trajectory, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(tdds_module, "_COLUMNS", 7)
        patch.setattr(baselines, "_COLUMNS", 7)
        assert_same_arrays(whole, every_score(trajectory, tmp_path / "blocks"))
    labels = beton(golden["labels"])
    whole = every_score(dynamics, tmp_path / "rows", labels)
    monkeypatch.setattr(dynamics_module, "_BLOCK", 7 * 10 + 3)
    num_threads = torch.get_num_threads()
    for workers in (1, 3):
        torch.set_num_threads(workers)
        try:
            blocks = every_score(dynamics, tmp_path / f"blocks{workers}", labels)
            assert torch.get_num_threads() == workers, "as before"
        finally:
            torch.set_num_threads(num_threads)
        assert_same_arrays(whole, blocks)


@pytest.mark.parametrize(
    "names",
    [("delta_official",), ("delta_paper",), ("delta_ce",), ("entropy", "delta_official"), SCALARS],
    ids=str,
)
def test_scalars_of_a_dynamics_folder_are_those_of_training(golden, dynamics, names):
    """Bit by bit, also where one loss difference is computed by itself; `delta_official` then has a
    shorter way of its own."""
    tolerance = 3e-7 if names == ("delta_official",) else 0.0
    read = Dynamics(dynamics, golden["labels"])
    read.prepare(names, 5)
    previous = None
    for epoch in range(5):
        logits = torch.empty(600, 10)
        logits[torch.from_numpy(golden["index"][epoch])] = torch.from_numpy(golden["logits"][epoch])
        logp = log_probabilities(logits)
        want_FN = sample_scalars(logits, logp, previous, torch.from_numpy(golden["labels"])).numpy()
        previous = logp
        for name in names:
            np.testing.assert_allclose(
                read.read(name, 5)[epoch],
                want_FN[SCALARS.index(name)],
                10 * tolerance,
                tolerance,
                err_msg=name,
            )


def test_logits_that_are_certain_or_overflow_a_sum(tmp_path):
    """Probabilities of 0 and 1, and numbers whose sum is no float32 though each is one."""
    logits_NC = np.array(
        [[0, 3e38, 3e38], [-3e38, 3e38, 0], [500, -500, 0], [1, 2, 3]], dtype=np.float32
    )
    for epoch in range(4):
        np.save(
            tmp_path / f"{epoch}_Output.npy", np.roll(logits_NC, epoch, axis=1).astype(np.float64)
        )
        np.save(tmp_path / f"{epoch}_Index.npy", np.arange(4))
    for name in ("delta_official", "delta_paper"):
        found_TN = Dynamics(tmp_path).read(name)
        assert np.isnan(found_TN[0]).all()
        assert np.isfinite(found_TN[1:]).all()
    np.save(
        tmp_path / "2_Output.npy", np.where(logits_NC == 500, 1e39, logits_NC.astype(np.float64))
    )
    with pytest.raises(
        InputError, match=r"2_Output\.npy holds NaN or infinite logits \(global indices \[2\]\)"
    ):
        Dynamics(tmp_path).read("delta_official")


@pytest.mark.parametrize(
    "change",
    [lambda x: x.astype(np.float64), lambda x: np.asfortranarray(x), lambda x: x.astype(">f4")],
    ids=["float64", "fortran", "big-endian"],
)
def test_outputs_of_other_layouts(dynamics, tmp_path, change):
    folder = copied(dynamics, tmp_path, 6)
    (want,) = score(folder, K=3, out=tmp_path / "a.npz")
    for epoch in range(6):
        change_array(folder / f"{epoch}_Output.npy", change)
    (found,) = score(folder, K=3, out=tmp_path / "b.npz")
    assert load_scores(found).score_N.tobytes() == load_scores(want).score_N.tobytes()


def test_dynamics_folder_without_labels_gives_what_needs_none(dynamics, tmp_path):
    paths, skipped = score_all(dynamics, out=tmp_path)
    assert [path.name for path in paths] == ["tdds_official_T30_K10_beta0.9.npz", "random.npz"]
    assert_authors(paths[0], LONG)
    assert [reason.split(":")[0] for reason in skipped] == [*BASELINES, "entropy", "moderate"]
    assert all("holds no labels" in reason and "--beton FILE" in reason for reason in skipped[:-2])
    with pytest.raises(
        InputError,
        match=r"holds no labels, which logit_margin needs; give the dataset with --beton FILE",
    ):
        score_all(dynamics, ["aum"], out=tmp_path)


def test_scores_by_name(run):
    paths, skipped = score_all(run, ["dual", "tdds"])
    assert [
        path.stem for path in paths
    ] == "dual tdds_official_T30_K10_beta0.9 tdds_official_T10_K5_beta0.9".split()
    assert skipped == []
    assert sorted((run / "scores").iterdir()) == sorted(paths), "and no other"


@pytest.mark.parametrize(
    ("options", "name", "settings", "oracle"),
    [
        ("el2n_epochs=20", "el2n_T20", {"T": 20}, lambda s: oracles.el2n_early(s["el2n"], 20)),
        ("score.baselines.el2n_epochs=1", "el2n_T1", {"el2n_epochs": 1}, lambda s: s["el2n"][0]),
        *(
            (
                f"num_epochs=3 never_learned={never}",
                f"forgetting{'_never0' * (never == '0')}_T3",
                {"T": 3, "never_learned": never},
                lambda s, never=never: oracles.forgetting(s["correct"][:3], never),
            )
            for never in ("inf", "0")
        ),
        *(
            (
                f"aum_of={of} aum_keep={keep}" + f" num_epochs={epochs}" * (epochs < 30),
                name,
                {"aum_of": of, "keep": keep, "T": epochs},
                lambda s, of=of, keep=keep, epochs=epochs: oracles.aum(s[of][:epochs], keep),
            )
            for name, of, keep, epochs in (
                ("aum_probability", "probability", "hardest", 30),
                ("aum_easiest", "logit", "easiest", 30),
                ("aum_probability_easiest_T12", "probability", "easiest", 12),
            )
        ),
        *(
            (
                f"uncertainty_window={J}" + f" num_epochs={T}" * (T < 30),
                name,
                {"T": T, "J": J},
                lambda s, T=T, J=J, of=of: of(s["p_label"][:T], J),
            )
            for name, of, J, T in (
                ("dyn_unc_J5", oracles.dyn_unc, 5, 30),
                ("dual_J30", oracles.dual, 30, 30),
                ("dual_J5_T12", oracles.dual, 5, 12),
            )
        ),
    ],
)
def test_options_make_another_file(run, by_hand, options, name, settings, oracle):
    key = next(key for key in ORACLES if name.startswith(key))
    (default,) = score_all(run, [key])[0]
    before = default.read_bytes()
    (path,) = score_all(run, [key], options=options.split())[0]
    assert path == run / "scores" / f"{name}.npz"
    assert default.read_bytes() == before
    assert_oracle(path, oracle, by_hand)
    found = load_scores(path)
    assert found.key == name
    assert settings.items() <= found.settings.items()
    assert not np.array_equal(found.score_N, load_scores(default).score_N)
    if key == "dual":
        want = [oracles.mean(sample["p_label"][: settings["T"]]) for sample in by_hand]
        np.testing.assert_allclose(found.extra["p_mean"][SAMPLES], want, rtol=2e-5)


def test_options_of_the_config_and_before_it(run, by_hand):
    """The config's option holds unless one is given; the file says which it was, also where the
    default is asked for."""
    changed = CONFIG["score"] | {"baselines": {"el2n_epochs": 20, "never_learned": "0"}}
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"score": changed}))
    names = {path.name for path in score_all(run)[0]}
    assert {"el2n_T20.npz", "forgetting_never0.npz", "aum.npz"} <= names
    assert not {"el2n.npz", "forgetting.npz"} & names
    (path,) = score_all(run, ["el2n"], options=["el2n_epochs=10"])[0]
    assert path.name == "el2n.npz"
    assert_oracle(path, ORACLES["el2n"], by_hand)


@pytest.mark.parametrize(
    ("keys", "options", "match"),
    [
        (
            ["el2n"],
            ["el2n_epoch=3"],
            r"unknown key 'el2n_epoch'; the nearest valid key is 'el2n_epochs'",
        ),
        ([], ["el2n_epoch=3"], r"unknown key 'el2n_epoch'"),
        ([], ["aum_of=logits"], r"aum_of='logits'"),
        ([], ["el2n_epochs=0"], r"el2n_epochs=0"),
        ([], ["uncertainty_window=1"], r"uncertainty_window=1"),
        ([], ["el2n_epochs"], r"'el2n_epochs' must look like"),
        (
            ["el2m"],
            [],
            (
                r"score 'el2m' is not computed from recorded epochs; use one of tdds, random,"
                r" forgetting, el2n, aum, "
            ),
        ),
        (
            ["el2n", "entropy"],
            [],
            (
                r"score 'entropy' .* \(they need the final model: `tdds score RUN --final-pass`\);"
                r" use one"
            ),
        ),
        (["moderate"], [], r"score 'moderate' .*--final-pass"),
        (
            ["el2n"],
            ["el2n_epochs=31"],
            r"el2n_epochs=31 is longer than the 30 recorded epochs; lower it, or collect longer",
        ),
        (["aum"], ["num_epochs=31"], r"num_epochs=31 is longer than the 30 recorded epochs"),
        (
            ["dyn_unc"],
            ["uncertainty_window=31"],
            r"uncertainty_window=31 is longer than the 30 epochs there are; lower it",
        ),
        (
            ["dual"],
            ["uncertainty_window=13", "num_epochs=12"],
            r"uncertainty_window=13 is longer than the 12 epochs there are",
        ),
        (["forgetting"], ["num_epochs=1"], r"forgetting needs at least 2 epochs"),
    ],
)
def test_scores_that_cannot_be_computed(run, keys, options, match):
    refused(match, score_all, run, keys, options=options)
    assert not (run / "scores" / "entropy.npz").exists()


def test_short_recording_gives_what_it_can(golden, dynamics, tmp_path, beton):
    """With 5 epochs, windows of 10 do not fit."""
    folder = copied(dynamics, tmp_path, 5)
    paths, skipped = score_all(folder, beton=beton(golden["labels"]))
    short = "random forgetting aum csl confidence variability correctness learning_time s2l"
    assert [path.stem for path in paths] == short.split()
    assert {path.parent for path in paths} == {folder}, "beside the outputs"
    assert [
        reason.split(":")[0] for reason in skipped
    ] == "tdds el2n dyn_unc dual cld entropy moderate".split()
    assert skipped[0].startswith("tdds: K=10 must lie in [2, 5] for T=5")


def test_many_scores_go_into_a_directory(run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "one.npz", tmp_path / "file"):
        refused(rf"--out={out} must be a directory", score_all, run, ["el2n"], out=out)
    assert (tmp_path / "file").read_text() == ""
    assert not (tmp_path / "one.npz").exists()


# ---- ablations of section 5.4, and the plain average


def varying(sample: dict[str, list[float]], delta: str, preset: str) -> list[float]:
    """What varies: entry t belongs to the step from epoch t to the next."""
    if delta == "kl":
        return sample[preset]
    if delta == "kl_signed":
        return sample["paper"]
    if delta == "el2n":
        return sample["el2n"][1:]
    return [abs(d) for d in sample["ce"]] if delta == "ce_absolute" else sample["ce"]


@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize("delta", ["kl", "kl_signed", "ce", "ce_absolute", "el2n"])
def test_ablations(trajectory, tmp_path, by_hand, delta, preset):
    for beta in (0.8, 0.0):
        (path,) = score(
            trajectory,
            T=20,
            K=7,
            beta=beta,
            preset=preset,
            delta=delta,
            out=tmp_path / f"{beta}.npz",
        )
        assert_oracle(
            path,
            lambda s, beta=beta: oracles.score(varying(s, delta, preset), 20, 7, beta, preset),
            by_hand,
        )
        found = load_scores(path)
        suffix = "" if delta == "kl" else f"_{delta}"
        assert found.key == f"tdds_{preset}_T20_K7_beta{beta:g}{suffix}"
        assert found.settings == {
            "score": "tdds",
            "preset": preset,
            "T": 20,
            "K": 7,
            "beta": beta,
            "source": "recorded",
            "epochs": 30,
        } | ({} if delta == "kl" else {"delta": delta})
    a, b = (load_scores(tmp_path / f"{beta}.npz").score_N for beta in (0.8, 0.0))
    assert not np.array_equal(a, b)


def test_ablations_of_a_dynamics_folder(golden, dynamics, trajectory, tmp_path, beton):
    for delta in ("kl_signed", "ce", "ce_absolute", "el2n"):
        (a,) = score(
            dynamics, T=9, K=4, delta=delta, beton=beton(golden["labels"]), out=tmp_path / "a.npz"
        )
        (b,) = score(trajectory, T=9, K=4, delta=delta, out=tmp_path / "b.npz")
        np.testing.assert_array_equal(load_scores(a).score_N, load_scores(b).score_N)
    (signed,) = score(dynamics, T=9, K=4, delta="kl_signed", out=tmp_path / "c.npz")
    assert np.isfinite(load_scores(signed).score_N).all()
    for delta in ("ce", "ce_absolute", "el2n"):
        with pytest.raises(
            InputError, match=r"holds no labels, which (delta_ce|el2n) needs; .*--beton FILE"
        ):
            score(dynamics, T=9, K=4, delta=delta, out=tmp_path / "none.npz")
    assert not (tmp_path / "none.npz").exists()


# ---- select


def test_selects_with_the_window_that_serves_the_rate(golden, run):
    keys = [window.key("official") for window in (LONG, EARLY)]
    assert score(run) == [run / "scores" / f"{key}.npz" for key in keys]
    for key, rate, window in zip(keys, (0.3, 0.9), (LONG, EARLY), strict=True):
        path, warnings = select(run, rate)
        assert warnings == []
        assert path == run / "coresets" / f"{key}_p{rate:g}.npz"
        coreset, want_N = load_coreset(path), AUTHORS[window]
        assert_authors(run / "scores" / f"{key}.npz", window)
        kept = num_kept(600, rate)
        highest = np.sort(np.argsort(-want_N, kind="stable")[:kept])
        assert len(np.intersect1d(coreset.index_M, highest)) >= kept - 1, (
            "up to the accuracy of float32"
        )
        assert (coreset.score_key, coreset.pruning_rate) == (key, rate)
        assert coreset.fingerprint == fingerprint(golden["labels"], 10)
    refused(
        r"no window of score\.windows serves pruning_rate=0\.5 \(served: \[0\.3, ", select, run, 0.5
    )


def test_default_paths(run, tmp_path):
    first, second = score(run)
    assert (
        select(run, 0.3, class_balanced=True)[0].name
        == "tdds_official_T30_K10_beta0.9_balanced_p0.3.npz"
    )
    assert select(run, 0.25, score=second.stem)[0] == run / "coresets" / f"{second.stem}_p0.25.npz"
    assert select(run, 0.5, score="random")[0] == run / "coresets" / "random_s0_p0.5.npz"
    assert select(first, 0.5)[0] == run / "coresets" / f"{first.stem}_p0.5.npz", (
        "of the run that the score is from"
    )
    alone = tmp_path / "alone.npz"
    alone.write_bytes(first.read_bytes())
    assert select(alone, 0.5)[0] == tmp_path / "alone_p0.5.npz", "beside the score file"
    out = tmp_path / "elsewhere" / "mine.npz"
    assert select(run, 0.3, out=out)[0] == out
    assert out.exists()


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
    assert set(smaller) <= set(np.frombuffer(drawn[2], dtype=np.int64)), (
        "draws of one seed are nested"
    )


def lopsided(path: Path) -> Path:
    """100 samples of four classes; the scores put class 2 last, and class 3 has one sample."""
    label_N = np.repeat([0, 1, 2, 3], [40, 39, 20, 1])
    score_N = np.where(label_N == 2, 0.0, 1.0 + np.arange(100))
    save_scores(path, make.scores("mine", score_N, label_N, settings={"score": "tdds"}))
    return path


def test_empty_classes_are_a_warning_or_an_error_when_balance_was_asked_for(tmp_path):
    source = lopsided(tmp_path / "mine.npz")
    path, (warning,) = select(source, 0.5)
    assert path == tmp_path / "mine_p0.5.npz"
    assert warning.startswith("1 of 4 classes keep no sample (first: [2])")
    assert "--class-balanced" in warning
    assert select(source, 0.1, class_balanced=True)[1] == []
    none = tmp_path / "none.npz"
    empty = r"pruning_rate=0\.9: 1 of 4 classes keep no sample \(first: \[3\]\); lower"
    refused(empty, select, source, 0.9, class_balanced=True, out=none)
    assert not none.exists()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 30, float("nan")])
def test_pruning_rate_is_checked_before_any_file(tmp_path, rate):
    refused(rf"pruning_rate={rate} must lie in \[0, 1\)", select, tmp_path / "absent", rate)


def test_score_that_is_not_there(run, tmp_path):
    with pytest.raises(
        InputError, match=r"holds no scores; run `tdds collect` or `tdds score` first"
    ):
        select(run, 0.3, score="random")
    refused(
        r"T30_K10_beta0\.9': its collection has not finished \(0 of 30 epochs\)", select, run, 0.3
    )
    (run / "result.json").write_text("{}")
    refused(r"has no score 'tdds_official_T30_K10_beta0\.9'; it has tdds, random", select, run, 0.3)
    score(run)
    with pytest.raises(
        InputError,
        match=r"has no score 'el2n'; it has tdds, random, tdds_official_T10_K5_beta0\.9, ",
    ):
        select(run, 0.3, score="el2n")
    refused(r"absent does not exist", select, tmp_path / "absent", 0.3)


def test_naming_a_score_of_a_file_that_holds_another(tmp_path):
    """A file holds one score; asking it for a different one must not be answered with the one it
    has."""
    source = lopsided(tmp_path / "mine.npz")
    select(source, 0.5, score="mine")
    refused(r"mine\.npz.*el2n|el2n.*mine", select, source, 0.5, score="el2n")


# ---- select: samplers, importance, names


@pytest.fixture(scope="module")
def scored(golden, trajectory, tmp_path_factory) -> Path:
    """A run directory with every score; `moderate` is made up. Only coresets are added to it."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(trajectory, folder / "trajectory")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rng = np.random.default_rng(2)
    for epoch in range(30):
        RunDir(folder).append_val_classes(epoch, rng.random(10), np.linspace(0.5, 1.0, 10))
    score_all(folder)
    score(folder, preset="paper", T=30, K=10)
    score(folder, delta="ce", T=30, K=10)
    score_all(folder, ["aum"], options=["aum_keep=easiest"])
    score_N = np.random.default_rng(0).gamma(2.0, size=600)
    make.save(folder / "scores", make.scores("moderate", score_N, golden["labels"], 10))
    return folder


def of(scored: Path, key: str) -> Scores:
    return load_scores(scored / "scores" / f"{key}.npz")


TDDS = "tdds_official_T30_K10_beta0.9"
SAMPLER_CASES = [("el2n", "top"), ("moderate", "centre"), ("aum", "ccs"), ("dual", "beta")]


def test_default_samplers(scored):
    """The highest for every score but Moderate, whose centre is kept."""
    for key in (TDDS, "forgetting", "el2n", "aum", "dyn_unc", "dual", "random"):
        scores = of(scored, key)
        kept = np.sort(scores.score_N[choose(scores, 0.7)])
        np.testing.assert_array_equal(kept, np.sort(scores.score_N)[-180:], key)
    moderate = of(scored, "moderate")
    kept = np.sort(moderate.score_N[choose(moderate, 0.7)])
    np.testing.assert_array_equal(kept, np.float32(oracles.centre(moderate.score_N.tolist(), 180)))
    kept = np.sort(moderate.score_N[choose(moderate, 0.7, sampler="top")])
    np.testing.assert_array_equal(kept, np.sort(moderate.score_N)[-180:])


@pytest.mark.parametrize(
    ("rate", "given", "cutoff"),
    [(0.5, None, 0), (0.8, None, 120), (0.9, None, 180), (0.9, 0.1, 60), (0.8, 0.0, 0)],
)
def test_ccs_fills_strata_below_the_cutoff(scored, rate, given, cutoff):
    """`cutoff` of the 600 hardest go; no two margins are equal, so literal counting decides the
    rest."""
    scores = of(scored, "aum")
    kept = scores.score_N[
        choose(scores, rate, sampler="ccs", hard_cutoff_rate=given, num_strata=20)
    ].tolist()
    rest = sorted(scores.score_N.tolist())[: 600 - cutoff]
    counts = oracles.stratum_counts(rest, rest[0], rest[-1], 20)
    want = oracles.stratum_budgets(counts, oracles.num_kept(600, rate))
    assert max(kept) <= rest[-1]
    assert oracles.stratum_counts(kept, rest[0], rest[-1], 20) == want


def test_beta_draw_takes_probabilities_rate_and_exponent_from_where_they_stand(scored):
    scores = of(scored, "dual")
    arguments = (scores.score_N, scores.extra["p_mean"])
    kept = choose(scores, 0.7, sampler="beta", seed=3, c_d=5.5)
    np.testing.assert_array_equal(kept, samplers.beta_sample(*arguments, 180, 0.7, c_d=5.5, seed=3))
    np.testing.assert_array_equal(
        choose(scores, 0.7, sampler="beta"), samplers.beta_sample(*arguments, 180, 0.7, c_d=4.0)
    )
    others = [
        choose(scores, 0.7, sampler="beta", seed=3),
        choose(scores, 0.7, sampler="beta", c_d=5.5),
    ]
    assert all(not np.array_equal(kept, other) for other in others)


@pytest.mark.parametrize(("key", "sampler"), SAMPLER_CASES)
def test_class_balance_with_every_sampler(golden, scored, key, sampler):
    """Quotas in proportion; the highest, or the centre, of each class by itself."""
    scores = of(scored, key)
    kept = choose(scores, 0.85, sampler=sampler, class_balanced=True, seed=1)
    assert len(kept) == 90
    quota_C = np.bincount(golden["labels"][kept], minlength=10)
    assert (np.abs(quota_C - 90 * np.bincount(golden["labels"]) / 600) < 1).all()
    assert not np.array_equal(kept, choose(scores, 0.85, sampler=sampler, seed=1))
    for label in range(10):
        of_class = sorted(scores.score_N[golden["labels"] == label].tolist())
        found = sorted(scores.score_N[kept][golden["labels"][kept] == label].tolist())
        if sampler == "top":
            assert found == of_class[-quota_C[label] :]
        elif sampler == "centre":
            assert found == oracles.centre(of_class, quota_C[label])
        elif sampler == "ccs":
            assert found[-1] <= of_class[len(of_class) - round(0.2 * len(of_class)) - 1], (
                "the hardest of each class go"
            )
        else:
            member = np.flatnonzero(golden["labels"] == label)
            p_mean = scores.extra["p_mean"][member]
            of_its_own = int(np.random.SeedSequence([1, label]).generate_state(1)[0])
            picked = samplers.beta_sample(
                scores.score_N[member], p_mean, int(quota_C[label]), 0.85, seed=of_its_own
            )
            np.testing.assert_array_equal(kept[golden["labels"][kept] == label], member[picked])


def test_cld_is_chosen_class_by_class_unless_told_otherwise(golden, scored):
    scores = of(scored, "cld")
    np.testing.assert_array_equal(
        choose(scores, 0.7), choose(scores, 0.7, sampler="top", class_balanced=True)
    )
    kept = choose(scores, 0.7, class_balanced=False)
    assert np.sort(scores.score_N[kept]).tolist() == np.sort(scores.score_N)[-180:].tolist()


def test_s2l_draws_from_its_clusters_alike(scored):
    scores = of(scored, "s2l")
    cluster_N = scores.extra["cluster"].astype(int)
    sizes = np.bincount(cluster_N)
    assert scores.score_N.tolist() == (-sizes[cluster_N]).tolist()
    kept_C = np.bincount(cluster_N[choose(scores, 0.7)], minlength=len(sizes))
    assert kept_C.tolist() == oracles.stratum_budgets(sizes.tolist(), 180)


def test_drop_keeps_more_of_classes_of_low_recall(golden, scored):
    """Recall is that of the run's last validation, wherever the score lies in it."""
    labels = golden["labels"]
    path, _ = select(scored, 0.7, score="el2n", sampler="drop")
    coreset, scores = load_coreset(path), of(scored, "el2n")
    share_C = oracles.drop_shares(
        np.bincount(labels).tolist(), np.float32(np.linspace(0.5, 1.0, 10)).tolist(), 180
    )
    kept_C = np.bincount(labels[coreset.index_M], minlength=10)
    assert max(abs(kept - share) for kept, share in zip(kept_C, share_C, strict=True)) < 1
    for label, kept in enumerate(kept_C):
        of_class = np.sort(scores.score_N[labels == label])
        found = np.sort(scores.score_N[coreset.index_M[labels[coreset.index_M] == label]])
        assert found.tolist() == of_class[len(of_class) - kept :].tolist()
    of_file, _ = select(scored / "scores" / "el2n.npz", 0.7, sampler="drop")
    assert of_file == path


@pytest.mark.parametrize(("key", "sampler"), SAMPLER_CASES)
def test_the_same_seed_gives_the_same_file(scored, tmp_path, key, sampler):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        select(scored, 0.8, score=key, sampler=sampler, seed=seed, out=tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    same = np.array_equal(
        load_coreset(tmp_path / "a.npz").index_M, load_coreset(tmp_path / "c.npz").index_M
    )
    assert same == (sampler in ("top", "centre")), (
        "no two of these scores are equal, so only draws depend on the seed"
    )


def test_ccs_by_its_name(scored):
    """`--score ccs` is AUM in strata."""
    path, warnings = select(scored, 0.5, score="ccs")
    assert (path, warnings) == (scored / "coresets" / "ccs_aum_s0_p0.5.npz", [])
    coreset = load_coreset(path)
    np.testing.assert_array_equal(coreset.index_M, choose(of(scored, "aum"), 0.5, sampler="ccs"))
    assert coreset.score_key == "aum"
    assert {
        key: coreset.settings[key] for key in ("sampler", "num_strata", "hard_cutoff_rate")
    } == {"sampler": "ccs", "num_strata": 50, "hard_cutoff_rate": 0.0}
    assert "own_hard_cutoff_rate" not in coreset.settings
    for options in ({"score": "ccs", "sampler": "ccs"}, {"score": "aum", "sampler": "ccs"}):
        assert select(scored, 0.5, **options)[0] == path
        np.testing.assert_array_equal(load_coreset(path).index_M, coreset.index_M)
    assert select(scored / "scores" / "aum.npz", 0.5, score="ccs")[0] == path
    assert load_coreset(select(scored, 0.9, score="ccs")[0]).settings["hard_cutoff_rate"] == 0.3
    with pytest.raises(InputError, match=r"--score ccs means sampler ccs on aum, not sampler top"):
        select(scored, 0.5, score="ccs", sampler="top")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"score": "ccs", "hard_cutoff_rate": 0.1}, "ccs_aum_cut0.1_s0_p0.8"),
        ({"score": "ccs", "hard_cutoff_rate": 0.2}, "ccs_aum_cut0.2_s0_p0.8"),
        ({"score": "ccs", "num_strata": 20}, "ccs_aum_strata20_s0_p0.8"),
        ({"score": "ccs", "num_strata": 50}, "ccs_aum_s0_p0.8"),
        (
            {
                "score": "ccs",
                "num_strata": 20,
                "hard_cutoff_rate": 0.1,
                "class_balanced": True,
                "seed": 7,
            },
            "ccs_aum_cut0.1_strata20_balanced_s7_p0.8",
        ),
        ({"score": "el2n", "sampler": "ccs"}, "ccs_el2n_s0_p0.8"),
        ({"score": "el2n", "hard_cutoff_rate": 0.1}, "el2n_cut0.1_p0.8"),
        ({"score": "dual", "sampler": "beta"}, "beta_dual_s0_p0.8"),
        ({"score": "dual", "sampler": "beta", "c_d": 4.0}, "beta_dual_s0_p0.8"),
        (
            {"score": "dual", "sampler": "beta", "c_d": 5.5, "class_balanced": True},
            "beta_dual_cd5.5_balanced_s0_p0.8",
        ),
        ({"score": "dual", "seed": 3}, "dual_p0.8"),
        ({"score": "moderate"}, "moderate_p0.8"),
        ({"score": "moderate", "sampler": "top"}, "top_moderate_p0.8"),
        (
            {"score": "el2n", "sampler": "centre", "class_balanced": True},
            "centre_el2n_balanced_p0.8",
        ),
        ({"score": "random", "class_balanced": True, "seed": 2}, "random_balanced_s2_p0.8"),
        ({"score": "cld"}, "cld_p0.8"),
        ({"score": "cld", "class_balanced": True}, "cld_p0.8"),
        ({"score": "cld", "class_balanced": False}, "cld_unbalanced_p0.8"),
        ({"score": "s2l", "seed": 2}, "s2l_s2_p0.8"),
        ({"score": "s2l", "sampler": "top"}, "top_s2l_p0.8"),
        ({"score": "random", "sampler": "drop"}, "drop_random_s0_p0.8"),
        ({"score": "cld", "sampler": "drop"}, "drop_cld_p0.8"),
    ],
)
def test_names_of_coresets(scored, options, name):
    """Two choices that differ never share a file; what is the default is not in the name."""
    path, _ = select(scored, 0.8, **options)
    assert path == scored / "coresets" / f"{name}.npz"
    method = load_coreset(path).method
    assert method == re.sub(r"(_s\d)?_p0\.8$", "", name)


def test_names_beside_a_score_file(scored, tmp_path):
    """The file's own name stands for its key, except for a random draw, which is none of its
    scores."""
    source = tmp_path / "mine.npz"
    source.write_bytes((scored / "scores" / "aum.npz").read_bytes())
    assert select(source, 0.5, sampler="ccs")[0] == tmp_path / "ccs_mine_s0_p0.5.npz"
    assert select(source, 0.5, score="random")[0] == tmp_path / "random_s0_p0.5.npz"


@pytest.mark.parametrize(
    ("key", "sampler"), [*SAMPLER_CASES, ("random", "top"), ("forgetting", "top")]
)
def test_other_scores_weigh_every_sample_alike(scored, key, sampler):
    coreset, _ = make_coreset(of(scored, key), 0.6, sampler=sampler)
    assert coreset.settings["importance"] == "uniform"
    assert coreset.importance_M.dtype == np.float32
    assert (coreset.importance_M == 1.0).all()


@pytest.mark.parametrize("key", [TDDS, f"{TDDS}_ce", "tdds_paper_T30_K10_beta0.9"])
def test_tdds_is_weighed_by_itself_whatever_the_sampler(scored, key):
    scores = of(scored, key)
    low, high = scores.score_N.min().astype(np.float64), scores.score_N.max().astype(np.float64)
    for sampler in ("top", "centre", "ccs"):
        coreset, _ = make_coreset(scores, 0.6, sampler=sampler)
        found_N = scores.score_N[coreset.index_M]
        want_N = found_N if "paper" in key else (found_N - low) / (high - low)
        np.testing.assert_allclose(coreset.importance_M, want_N, rtol=1e-6)
        assert coreset.settings["importance"] == ("score" if "paper" in key else "min_max")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"score": "el2n", "sampler": "beta"},
            r"score 'el2n' comes without the mean probability .* beta looks at; .*--score dual",
        ),
        ({"score": "dual", "sampler": "beta", "c_d": -1.0}, r"c_d=-1\.0 must be positive"),
        (
            {"score": "aum_easiest", "sampler": "ccs"},
            r"score 'aum_easiest' ranks easy samples first.*aum_keep=hardest",
        ),
        (
            {"score": "el2n", "sampler": "median"},
            r"sampler='median' is unknown; use one of top, ccs, centre, beta, s2l, drop",
        ),
        (
            {"score": "el2n", "sampler": "s2l"},
            r"without the clusters .* draws from; use --score s2l",
        ),
        (
            {"score": "el2n", "sampler": "drop", "class_balanced": True},
            r"drop has quotas of its own for the classes; leave --class-balanced out",
        ),
        (
            {"score": "moderate", "hard_cutoff_rate": 0.1},
            r"hard_cutoff_rate=0\.1 does nothing with sampler centre",
        ),
        (
            {"score": "ccs", "hard_cutoff_rate": 0.6},
            r"hard_cutoff_rate=0\.6 leaves 240 of 600 .* 300 to keep; use at most 0\.5 ",
        ),
        ({"score": "ccs", "num_strata": 0}, r"num_strata=0 must be at least 1"),
        (
            {"score": "ccs", "class_balanced": True, "hard_cutoff_rate": 0.6},
            r"hard_cutoff_rate=0\.6 leaves 20 of 51 samples",
        ),
    ],
)
def test_samplers_that_do_not_fit(scored, tmp_path, options, match):
    with pytest.raises(InputError, match=match) as error:
        select(scored, 0.5, out=tmp_path / "none.npz", **options)
    assert str(error.value).startswith(f"{scored}: ")
    assert not (tmp_path / "none.npz").exists()


def test_a_foreign_trajectory_remembers_what_was_scored_live(golden, trajectory, tmp_path):
    """Without settings, its windows and preset are taken; each can still be changed."""
    folder = tmp_path / "foreign"
    shutil.copytree(trajectory, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["scored"] = {
        "preset": "paper",
        "windows": [{"T": 12, "K": 5, "beta": 0.5}, {"T": 9, "K": 5, "beta": 0.5}],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    assert [path.stem for path in score(folder)] == [
        "tdds_paper_T12_K5_beta0.5",
        "tdds_paper_T9_K5_beta0.5",
    ]
    assert [path.stem for path in score(folder, T=20)] == ["tdds_paper_T20_K5_beta0.5"]
    assert [path.stem for path in score(folder, K=3)] == ["tdds_paper_T30_K3_beta0.5"], (
        "no T that all windows have"
    )
    assert [path.stem for path in score(folder, preset="official", beta=0.9)] == [
        "tdds_official_T12_K5_beta0.9",
        "tdds_official_T9_K5_beta0.9",
    ]


def test_windows_of_a_run_that_agree_are_defaults(run):
    assert [path.stem for path in score(run, T=20, K=10)] == ["tdds_official_T20_K10_beta0.9"]
    assert [path.stem for path in score(run, T=20)] == ["tdds_official_T20_K10_beta0.9"], (
        "10 and 5 do not agree"
    )
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["score"]["windows"] = [{"T": 30, "K": 7}, {"T": 12, "K": 7}]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert [path.stem for path in score(run, T=20)] == ["tdds_official_T20_K7_beta0.9"]


@pytest.mark.parametrize(
    ("keys", "option"),
    [
        (["tdds"], "never_learned=0"),
        (["forgetting"], "el2n_epochs=3"),
        (["el2n"], "num_epochs=5"),
        (["random"], "uncertainty_window=4"),
    ],
)
def test_options_that_no_score_reads_are_refused(run, keys, option):
    with pytest.raises(InputError, match=rf"{option} does nothing for {keys[0]}; leave it out"):
        score_all(run, keys, options=[option])
    assert not (run / "scores").exists()


# ---- quarantined samples


def quarantine(run: Path, samples: dict[int, int]) -> None:
    TrajectoryWriter(run / "trajectory", SCALARS, 600, 10, 0, 300, True).write_quarantine(samples)


def test_quarantined_samples_have_the_lowest_of_every_score(run):
    score_all(run)
    score(run, delta="el2n")
    clean = {path.stem: load_scores(path) for path in (run / "scores").iterdir()}
    assert len(clean) == 16, "two windows, two of an ablation, and twelve others"
    assert all("quarantined" not in scores.settings for scores in clean.values())
    quarantined = sorted({int(np.argmax(scores.score_N)) for scores in clean.values()} | {3, 599})
    assert len(quarantined) > 5
    quarantine(run, dict.fromkeys(quarantined[::-1], 29) | {599: 0})
    score_all(run)
    score(run, delta="el2n")
    others = [i for i in range(600) if i not in quarantined]
    cluster_N = load_scores(run / "scores" / "s2l.npz").extra["cluster"].astype(int)
    sizes = np.bincount(cluster_N[others])
    s2l_N = load_scores(run / "scores" / "s2l.npz").score_N
    assert s2l_N[others].tolist() == (-sizes[cluster_N[others]]).tolist(), "clusters of the others"
    assert s2l_N[quarantined].tolist() == [-sizes.max()] * len(quarantined)
    del clean["s2l"]
    for key, want in clean.items():
        found = load_scores(run / "scores" / f"{key}.npz")
        assert found.settings == want.settings | {"quarantined": quarantined}
        lowest = min(float(want.score_N[i]) for i in others)
        for i in range(600):
            of_quarantined = want.score_N[i] if key == "random" else lowest
            assert found.score_N[i] == (of_quarantined if i in quarantined else want.score_N[i]), (
                key,
                i,
            )
        assert not set(quarantined) & set(choose(found, 0.0).tolist())
        assert {name: values.tobytes() for name, values in found.extra.items()} == {
            name: values.tobytes() for name, values in want.extra.items()
        }


def test_quarantined_samples_of_a_foreign_trajectory(trajectory, tmp_path):
    folder = shutil.copytree(trajectory, tmp_path / "trajectory")
    quarantine(tmp_path, {7: 2})
    [path] = score(folder, T=30, K=10)
    assert load_scores(path).settings["quarantined"] == [7]
    (folder / "quarantine.json").write_text("{}")
    refused(r"quarantine\.json is damaged", score, folder, T=30, K=10)


def test_constant_scores_are_found_also_beside_quarantined_samples(run, caplog):
    for quarantined in ({}, {5: 3}):
        quarantine(run, quarantined)
        caplog.clear()
        score(run, T=12, K=2)
        said = "all scores of tdds_official_T12_K2_beta0.9 are 0; they say nothing, raise K"
        assert said in caplog.text


def test_all_samples_in_quarantine(run):
    quarantine(run, dict.fromkeys(range(600), 3))
    refused(r"all 600 samples are quarantined: .* look for what made training diverge", score, run)
    assert not (run / "scores").exists()


def test_no_random_coreset_holds_a_quarantined_sample(run):
    quarantine(run, {5: 3, 17: 0})
    score(run)
    label_N, found = (
        load_scores(next((run / "scores").iterdir())).label_N,
        fingerprint(np.zeros(600, np.int64), 10),
    )
    save_scores(
        run / "scores" / "a_first.npz",
        Scores("a_first", np.ones(600), label_N, found, {"source": "imported"}),
    )
    path, warnings = select(run, 0.0, score="random")
    coreset = load_coreset(path)
    assert coreset.index_M.tolist() == [i for i in range(600) if i not in (5, 17)]
    assert coreset.settings["quarantined"] == [5, 17]
    assert warnings == ["2 quarantined samples (NaN logits) are in no coreset"]


# ---- files that somebody else made


def test_imported_scores_and_other_files_are_not_overwritten(run, caplog):
    caplog.set_level("INFO", "tdds")
    from tdds_dist.coreset.import_scores import import_scores

    file = run.parent / "el2n.csv"
    file.write_text("index,score\n" + "".join(f"{i},{i}\n" for i in range(600)))
    path = import_scores(file, out=run / "scores" / "el2n.npz")
    before = path.read_bytes()
    refused(r"el2n\.npz holds imported scores", score_all, run, ["el2n"])
    assert path.read_bytes() == before
    file.write_text("index,score\n" + "".join(f"{i},{-i}\n" for i in range(600)))
    import_scores(file, out=path)
    (aside,) = path.parent.glob("before-*")
    assert (aside / "el2n.npz").read_bytes() == before
    assert f"are moved aside to {aside}" in caplog.text
    path.write_bytes(b"mine")
    score_all(run, ["el2n"])
    assert "mine" in [file.read_text(errors="replace") for file in path.parent.glob("before-*/*")]
    refused("computed here", import_scores, file, out=path)


def test_an_export_moves_what_had_its_name_aside(scored, tmp_path):
    """As the table that the scores were imported from, which lies beside them."""
    from tdds_dist.coreset.export import export

    path = select(scored, 0.3, out=tmp_path / "coreset.npz")[0]
    target = tmp_path / "mine.csv"
    target.write_text("index,score\n0,1\n")
    _, notes = export(path, "csv", target)
    (aside,) = tmp_path.glob("before-*")
    assert (aside / "mine.csv").read_text() == "index,score\n0,1\n"
    assert str(aside) in notes[-1]
    written = target.read_bytes()
    assert export(path, "csv", target)[1] == notes[:-1], "the same again"
    assert target.read_bytes() == written
    assert sorted(tmp_path.glob("before-*")) == [aside]
