"""Which labels are suspicious: the ranking over runs, the cut by threshold samples, the table."""

import csv
import io

import numpy as np
import pytest

from tdds_dist.coreset.suspects import COLUMNS, find_suspects, ranks
from tdds_dist.data.sources import THRESHOLD_CLASS
from tdds_dist.runs.artifacts import fingerprint
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.trajectory import TrajectoryWriter
from tests import make
from tests.make import refused

LABELS = np.arange(12) % 3


def run(folder, name, margin_N, label_N=LABELS, num_classes=3, quarantined=(), **changes):
    """A finished collection of one epoch with these margins, on images of which only the header is
    there."""
    if changes.pop("manifest", True):
        make.write_header(folder / f"{name}.beton", label_N, num_classes, **changes)
    found = make.start(folder / name, folder / f"{name}.beton", num_classes)
    num, labels = len(label_N), fingerprint(label_N, num_classes)
    writer = TrajectoryWriter(found.trajectory, SCALARS, num, num_classes, 0, num, True)
    writer.write_labels(label_N, labels.labels_sha256)
    scalars_FN = np.zeros((len(SCALARS), num), dtype=np.float32)
    scalars_FN[SCALARS.index("logit_margin")] = margin_N
    writer.append(0, scalars_FN)
    if quarantined:
        writer.write_quarantine(dict.fromkeys(quarantined, 0))
    make.finish(found, num, epochs=1)
    return found.path


def test_ranks_are_those_of_scipy():
    from scipy.stats import rankdata

    value_N = np.array([3.0, 1.0, 3.0, -2.0, 3.0, 1.0])
    np.testing.assert_allclose(ranks(value_N), rankdata(value_N) / 6)


def test_the_highest_score_is_the_most_suspicious(tmp_path):
    """Quarantined samples are not judged; what the network takes an image for stands beside it."""
    score_N = np.random.default_rng(0).permutation(12)
    path = run(tmp_path, "a", -score_N, quarantined=[4, 7])
    guess = {"p_label": LABELS / 10, "other": (LABELS + 1) % 3, "p_other": np.full(12, 0.25)}
    make.save(path / "scores", make.scores("entropy", score_N, LABELS, 3, **guess))
    found = find_suspects([path])
    want = [index for index in np.argsort(-score_N).tolist() if index not in (4, 7)]
    assert found.order.tolist() == want
    rows = [*csv.DictReader(io.StringIO(found.table()))]
    assert tuple(rows[0]) == COLUMNS
    for rank, (index, row) in enumerate(zip(want, rows, strict=True)):
        label = LABELS[index]
        assert row == {
            "rank": str(rank + 1),
            "index": str(index),
            "path": f"{index}.png",
            "label": f"class {label}",
            "other": f"class {(label + 1) % 3}",
            "p_label": f"{label / 10:.4f}",
            "p_other": "0.2500",
            "suspicion": f"{1 - rank / 10:.6f}",
            "wrong": "",
        }


def test_ranks_are_averaged_over_runs(tmp_path):
    first_N, second_N = np.arange(12) * 100.0, np.roll(np.arange(12), 5)
    paths = [run(tmp_path, name, -s) for name, s in (("a", first_N), ("b", second_N))]
    found = find_suspects(paths)
    np.testing.assert_allclose(found.suspicion_N, (ranks(first_N) + ranks(second_N)) / 2)


def test_threshold_samples_tell_which_margins_are_those_of_wrong_labels(tmp_path):
    """202 samples; 100 threshold samples of margins 0 to 99 in each run, whose 99th percentile is
    98.01: lower margins are wrong. Another run judges the threshold samples of the first, and says
    what its network takes them for; a plain run decides nothing."""
    labels, paths = np.arange(202) % 3, [run(tmp_path, "plain", np.zeros(202), np.arange(202) % 3)]
    names = [*(f"class {number}" for number in range(3)), THRESHOLD_CLASS]
    for name, first in (("a", 0), ("b", 100)):
        threshold = np.arange(first, first + 100)
        label_N, margin_N = labels.copy(), np.full(202, 98.5)
        label_N[threshold], margin_N[threshold] = 3, np.arange(100)
        margin_N[[200, 150 if name == "a" else 50]] = 97.5
        margin_N[201] = 98.5 if name == "a" else 90.0  # the first run decides
        path = run(tmp_path, name, margin_N, label_N, num_classes=4, class_names=names)
        other_N = np.where(np.arange(202) == 201, 3, (labels + 1) % 3)
        guess = {"other": other_N, "p_label": np.full(202, first / 200), "p_other": other_N / 10}
        make.save(path / "scores", make.scores("entropy", margin_N, label_N, 4, **guess))
        paths.append(path)
    alone, both = find_suspects(paths[1:2]), find_suspects(paths[1:])
    assert sorted(alone.order.tolist()) == [*range(100, 202)]
    assert np.flatnonzero(alone.wrong_N).tolist() == [150, 200]
    assert sorted(both.order.tolist()) == [*range(202)]
    assert np.flatnonzero(both.wrong_N).tolist() == [50, 150, 200]
    assert both.label_N.tolist() == labels.tolist()
    assert both.class_names == names[:3]
    rows = {int(row["index"]): row for row in csv.DictReader(io.StringIO(both.table()))}
    assert {rows[index]["wrong"] for index in (50, 150, 200)} == {"yes"}
    assert [rows[index]["p_label"] for index in (0, 199)] == ["0.5000", "0.0000"]
    assert (rows[4]["label"], rows[4]["other"]) == ("class 1", "class 2")
    assert (rows[201]["other"], rows[201]["p_other"]) == ("", ""), "that is no answer"
    assert np.flatnonzero(find_suspects(paths[:2]).wrong_N).tolist() == [150, 200]
    assert find_suspects(paths[:1]).wrong_N is None


def test_without_a_manifest_classes_are_numbers(tmp_path):
    found = find_suspects([run(tmp_path, "a", -np.arange(12), manifest=False)])
    row = found.row(0)
    assert (row["index"], row["path"], row["label"]) == ("11", "", "2")


@pytest.mark.parametrize(
    ("score", "change", "words"),
    [
        ("tdds", {}, "score='tdds' is unknown here; use one of aum, csl, "),
        ("aum", {"path": [f"{number}.jpg" for number in range(12)]}, "are of different images; "),
        ("aum", {"label_N": (LABELS + 1) % 3}, "are of different labels; "),
        ("aum", {"label_N": np.arange(9) % 3, "margin_N": np.arange(9)}, "numbers of images; "),
    ],
)
def test_refused(tmp_path, score, change, words):
    change = {"margin_N": np.arange(12)} | change
    paths = [run(tmp_path, "a", np.arange(12)), run(tmp_path, "b", **change)]
    refused(words, find_suspects, paths, score)


def test_an_unfinished_collection_is_refused(tmp_path):
    path = run(tmp_path, "a", np.arange(12))
    (path / "result.json").unlink()
    refused("its collection has not finished; start it again", find_suspects, [path])


def test_options_of_the_run_do_not_turn_suspicion_round(tmp_path):
    """Nor do files in scores/, which may be older or somebody else's; nothing is written there."""
    path = run(tmp_path, "a", -np.arange(12))
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(
        text.replace("score:\n", "score:\n  baselines: {aum_keep: easiest}\n", 1)
    )
    assert "easiest" in (path / "config.yaml").read_text()
    make.save(path / "scores", make.scores("aum", -np.arange(12), LABELS, 3))
    before = (path / "scores" / "aum.npz").read_bytes()
    assert find_suspects([path]).order.tolist() == [*range(11, -1, -1)]
    assert (path / "scores" / "aum.npz").read_bytes() == before
    assert len([*(path / "scores").iterdir()]) == 1
