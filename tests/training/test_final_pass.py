"""Entropy and Moderate from a run's final weights, on real ranks, against forward passes of one
image at a time."""

import io
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from tdds_dist.data.beton import read_images
from tdds_dist.data.sources import Source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import fingerprint, load_scores
from tdds_dist.training import final_pass
from tdds_dist.training.build import build_model, classifier_layer
from tests import make, oracles
from tests.ranks import WORLDS, catch, run_ranks

CLASS_SIZES = [9, 17, 1, 8, 9]
NUM_EPOCHS = 2


def random_image(index):
    return np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def make_run(folder, class_sizes, model="shufflenet_v2_x0_5", batch=12):
    """A finished run: raw random images in mixed order, and weights whose features differ between
    images."""
    num_classes = len(class_sizes)
    label_N = np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes), class_sizes))
    names, beton = [f"c{label}" for label in range(num_classes)], folder / "train.beton"
    paths = [f"{i}" for i in range(len(label_N))]
    source = Source("random", "train", names, paths, label_N, random_image)
    write_beton(source, beton, write_mode="raw", num_workers=1, progress=False)
    run = make.start(
        folder / "run",
        beton,
        num_classes,
        run={"seed": 4},
        model={"name": model},
        score={"windows": [{"T": 2, "K": 2}]},
        train={"epochs": NUM_EPOCHS, "global_batch_size": batch},
        data={"val": str(beton), "padding": 2, "mean": [78.0] * 3, "std": [90.0] * 3},
    )
    for epoch in range(NUM_EPOCHS):
        run.append_metrics({"epoch": epoch})
    torch.manual_seed(1)
    network = torchvision.models.get_model(model, weights=None, num_classes=num_classes).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        # statistics of batch norm, without which features would vanish
        network(normalised(beton, len(label_N)))
    run.models.mkdir()
    torch.save(network.state_dict(), run.models / "final.pt")
    return run.path


def normalised(beton, num_samples):
    """Whole images, as evaluation sees them; training would shift and flip."""
    pixels = torch.from_numpy(np.stack(read_images(beton, range(num_samples)))).permute(0, 3, 1, 2)
    return (pixels.float() - 78.0) / 90.0


def by_hand(run_dir, num_samples, num_classes, model="shufflenet_v2_x0_5"):
    """Logits [N, C] and penultimate features [N, D], one image at a time through torchvision's own
    network."""
    network = torchvision.models.get_model(model, weights=None, num_classes=num_classes).eval()
    network.load_state_dict(torch.load(run_dir / "models" / "final.pt", weights_only=True))
    features = []
    if hasattr(network, "fc"):
        network.fc.register_forward_hook(
            lambda module, inputs, output: features.append(inputs[0][0].numpy())
        )
    images = normalised(run_dir.parent / "train.beton", num_samples)
    with torch.no_grad():
        logits = [network(image[None])[0].tolist() for image in images]
    return logits, np.array(features, dtype=np.float64)


def check_scores(found, run_dir, num_classes):
    """Entropy and Moderate, || z - median of the class || with a median for each dimension, are
    those computed by hand."""
    label_N = found["entropy"].label_N
    logits, feature_ND = by_hand(run_dir, len(label_N), num_classes)
    entropy_N = [oracles.entropy(row) for row in logits]
    median_CD = np.array(
        [np.median(feature_ND[label_N == label], axis=0) for label in range(num_classes)]
    )
    moderate_N = np.linalg.norm(feature_ND - median_CD[label_N], axis=1)
    assert np.ptp(entropy_N) > 1e-3, "a test that compares constants shows nothing"
    assert np.ptp(moderate_N[label_N == 1]) > 1e-2
    np.testing.assert_allclose(found["entropy"].score_N, entropy_N, rtol=2e-5)
    guess = found["entropy"].extra
    for index, (row, label) in enumerate(zip(logits, label_N, strict=True)):
        p_C = oracles.softmax(row)
        other = max((c for c in range(num_classes) if c != label), key=lambda c: p_C[c])
        assert guess["other"][index] == other
        found_p = [guess[key][index] for key in ("p_label", "p_other")]
        assert found_p == pytest.approx([p_C[label], p_C[other]], rel=2e-5)
    np.testing.assert_allclose(
        found["moderate"].score_N, moderate_N, rtol=2e-5, atol=1e-5 * moderate_N.max()
    )
    return feature_ND


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """44 images of 5 classes, the smallest with one: 4 steps of 12, the last with 8 real rows.
    Never changed.

    At 3 ranks the last one then sends rows to rank 1 and keeps padding."""
    return make_run(tmp_path_factory.mktemp("five"), CLASS_SIZES)


@pytest.fixture(scope="module")
def alone(run_dir, tmp_path_factory):
    return after_pass(1, run_dir, tmp_path_factory.mktemp("alone"))[0]


def after_pass(world_size, run_dir, folder):
    """Scores by key, and what each rank kept, after a pass over a copy of the run."""
    shutil.copytree(run_dir, folder / "run")
    kept = run_ranks(world_size, watched_pass, folder / "run")
    return {path.stem: load_scores(path) for path in (folder / "run" / "scores").iterdir()}, kept


def watched_pass(rank, folder):
    """The final pass: the names it returns, and the samples and features that this rank kept."""
    made = []

    class Watched(final_pass._ByClass):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    final_pass._ByClass = Watched
    paths = final_pass.final_pass(folder, distributed.current_world("cpu"))
    return (
        [path.relative_to(folder).as_posix() for path in paths],
        made[0].index_M,
        made[0]._feature_MD,
    )


# ---- against the literal computation


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLDS)
def test_scores_against_one_image_at_a_time(world_size, run_dir, alone, tmp_path):
    """Were padding rows counted, entropy would be too high for some samples and features of others
    lost."""
    scores, kept = (alone, []) if world_size == 1 else after_pass(world_size, run_dir, tmp_path)
    assert sorted(scores) == ["entropy", "moderate"]
    label_N = scores["entropy"].label_N
    assert np.bincount(label_N).tolist() == CLASS_SIZES
    feature_ND = check_scores(scores, run_dir, 5)
    assert scores["moderate"].score_N[label_N == 2] == 0, "alone in its class: its own median"
    for key, found in scores.items():
        assert found.key == key
        assert found.settings == {
            "score": key,
            "source": "final_pass",
            "view": "evaluation",
            "epochs": NUM_EPOCHS,
            "seed": 4,
            "world_size": world_size,
        }
        assert found.fingerprint == fingerprint(label_N, 5)
        # rows per rank differ, and with them the order in which a convolution adds up
        np.testing.assert_allclose(found.score_N, alone[key].score_N, rtol=1e-5, atol=1e-5)
    assert not (run_dir / "scores").exists()
    if world_size > 1:
        check_kept(kept, label_N, feature_ND)


def check_kept(kept, label_N, feature_ND):
    """Each rank keeps its classes and no more; no class is divided."""
    np.testing.assert_array_equal(
        np.sort(np.concatenate([index_M for _, index_M, _ in kept])), np.arange(44)
    )
    classes_of_rank = [set(label_N[index_M].tolist()) for _, index_M, _ in kept]
    assert sorted(label for classes in classes_of_rank for label in classes) == [0, 1, 2, 3, 4]
    assert len(kept) != 3 or {38, 41} <= set(kept[1][1].tolist()), (
        "what the last rank sends in the last step"
    )
    for paths, index_M, feature_MD in kept:
        assert paths == ["scores/entropy.npz", "scores/moderate.npz"]
        assert 0 < len(index_M) <= 44 // len(kept) + max(CLASS_SIZES)
        assert len(index_M) < 44
        assert feature_MD.shape == (len(index_M), feature_ND.shape[1])
        np.testing.assert_allclose(feature_MD, feature_ND[index_M], rtol=1e-4, atol=1e-4)


@pytest.mark.distributed
def test_more_ranks_than_classes(tmp_path):
    """The third rank keeps no class and receives nothing in steps without padding; training on 3
    ranks needs another batch."""
    run = make_run(tmp_path, [15, 4], batch=10)
    scores, kept = after_pass(3, run, tmp_path / "copy")
    assert [len(index_M) for _, index_M, _ in kept] == [15, 4, 0]
    check_scores(scores, run, 2)


def test_rows_are_kept_a_step_later_and_padding_is_dropped():
    """One rank without a process group: rows -1 must not land on the first sample, as negative or
    clamped indices would."""
    kept = final_pass._ByClass(np.array([0, 1, 0, 1]), World(0, 0, 1, 1, torch.device("cpu")))
    feature_BD = torch.arange(12.0).reshape(4, 3)
    kept.add(torch.tensor([2, -1, 1, -1]), feature_BD, [4], [4])
    assert kept._feature_MD is None, "the device may still be at work on them"
    kept.add(torch.tensor([-1, 3, -1, 0]), feature_BD, [4], [4])
    np.testing.assert_array_equal(kept._feature_MD, [[0, 0, 0], [6, 7, 8], [0, 1, 2], [0, 0, 0]])
    found_M = kept.distances()
    np.testing.assert_array_equal(kept._feature_MD, [[9, 10, 11], [6, 7, 8], [0, 1, 2], [3, 4, 5]])
    want = [
        oracles.moderate(kept._feature_MD.tolist(), [0, 1, 0, 1], sample) for sample in range(4)
    ]
    np.testing.assert_allclose(found_M, want, rtol=1e-6)


# ---- networks


@pytest.mark.distributed
def test_network_without_a_linear_classifier_has_an_entropy_only(tmp_path):
    folder = make_run(tmp_path, [9, 5], model="squeezenet1_1")
    (paths, said), others = run_ranks(2, pass_and_words, folder)
    assert "squeezenet1_1 does not end in a linear layer, so there is no score `moderate`" in said
    assert (paths, others) == (["entropy.npz"], (["entropy.npz"], "")), "one rank speaks"
    assert [path.name for path in (folder / "scores").iterdir()] == ["entropy.npz"]
    logits, _ = by_hand(folder, 14, 2, model="squeezenet1_1")
    found_N = load_scores(folder / "scores" / "entropy.npz").score_N
    np.testing.assert_allclose(found_N, [oracles.entropy(row) for row in logits], rtol=2e-5)


def pass_and_words(rank, folder):
    with redirect_stderr(io.StringIO()) as said:
        paths = final_pass.final_pass(folder, distributed.current_world("cpu"))
    return [path.name for path in paths], said.getvalue()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "fc"),
        ("swin_t", "head"),
        ("vgg16_bn", "classifier.6"),
        ("mobilenet_v2", "classifier.1"),
        ("densenet121", "classifier"),
        ("vit_b_16", "heads.head"),
        ("convnext_tiny", "classifier.2"),
        ("squeezenet1_1", None),
    ],
)
def test_classifier_of_networks(name, layer):
    with torch.device("meta"):
        model = build_model(name, 7, channels_last=False)
    assert classifier_layer(model, 7) is (None if layer is None else model.get_submodule(layer))
    assert classifier_layer(model, 8) is None


# ---- what cannot be scored


@pytest.mark.distributed
def test_weights_that_do_not_serve_fail_on_every_rank(run_dir, tmp_path):
    weights = torch.load(run_dir / "models" / "final.pt", weights_only=True)
    foreign = torchvision.models.get_model(
        "shufflenet_v2_x0_5", weights=None, num_classes=6
    ).state_dict()
    spoilt = weights | {"fc.weight": torch.full_like(weights["fc.weight"], torch.nan)}
    cases = {  # name: (what to save, words of the message)
        "missing": (None, "models/final.pt does not exist"),
        "foreign": (foreign, "models/final.pt does not fit model.name=shufflenet_v2_x0_5"),
        "incomplete": ({"fc.bias": weights["fc.bias"]}, "models/final.pt does not fit"),
        "list": ([1, 2], "models/final.pt does not fit"),
        "damaged": (b"no weights", "models/final.pt cannot be read"),
        "empty": (b"", "models/final.pt cannot be read"),
        "pickle": (Path, "models/final.pt cannot be read"),
        "nan": (
            spoilt,
            "entropy is not finite for 44 samples (global indices [0, 1, 2, 3, 4, 5, 6, 7])",
        ),
        "on one rank": (weights, "gone on rank 1"),
        "no run": (None, "is not a run directory"),
        "other labels": (weights, "belongs to another dataset"),
    }
    for name, (content, _) in cases.items():
        shutil.copytree(run_dir, tmp_path / name)
        path = tmp_path / name / "models" / "final.pt"
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
    (tmp_path / "no run" / "config.yaml").unlink()
    zeros_N = np.zeros(44, dtype=np.int64)  # of the scores that the run has
    make.save(tmp_path / "other labels" / "scores", make.scores("el2n", zeros_N, zeros_N, 5))
    by_rank = run_ranks(2, failing_passes, tmp_path, list(cases))
    for name, (_, words) in cases.items():
        for outcomes in by_rank:
            kind, text = outcomes[name]
            assert kind == "InputError", (name, text)
            assert words in text, (name, text)
            assert "\n" not in text, name
        assert not list((tmp_path / name).glob("scores/entropy*")), name
    assert "size mismatch" in by_rank[0]["foreign"][1]


def failing_passes(rank, folder, names):
    """What each of the folders raises, one after the other: a rank that went on alone would hang
    the next one."""

    def gone(run):
        raise InputError("gone on rank 1")

    world, read, outcomes = distributed.current_world("cpu"), final_pass._read_weights, {}
    for name in names:
        final_pass._read_weights = gone if name == "on one rank" and rank == 1 else read
        outcomes[name] = catch(final_pass.final_pass, folder / name, world)
    return outcomes
