"""Which labels are suspicious: the ranking over runs, the cut by threshold samples, the table."""

import csv
import dataclasses
import io

import numpy as np
import pytest

from tdds_dist.coreset.suspects import COLUMNS, find_suspects, ranks
from tdds_dist.data.sources import THRESHOLD_CLASS
from tdds_dist.errors import InputError
from tests import make

LABELS = np.arange(12) % 3


def run(folder, name, score_N, label_N=LABELS, key="aum", num_classes=3, settings=None, **changes):
    """A collection with these scores, on images of which only the header is there."""
    if changes.pop("manifest", True):
        make.write_header(folder / f"{name}.beton", label_N, num_classes, **changes)
    found = make.start(folder / name, folder / f"{name}.beton", num_classes)
    settings = {"score": key} | (settings or {})
    scores = make.scores(key, np.array(score_N), label_N, num_classes, settings)
    names = changes.get("class_names") or [f"class {number}" for number in range(num_classes)]
    if (folder / f"{name}.beton").exists():
        scores = dataclasses.replace(
            scores, fingerprint=make.fingerprint(label_N, num_classes, names)
        )
    make.save(found.scores, scores)
    return found.path


def test_ranks_are_those_of_scipy():
    from scipy.stats import rankdata

    value_N = np.array([3.0, 1.0, 3.0, -2.0, 3.0, 1.0])
    np.testing.assert_allclose(ranks(value_N), rankdata(value_N) / 6)


def test_the_highest_score_is_the_most_suspicious(tmp_path):
    """Quarantined samples are not judged; what the network takes an image for stands beside it."""
    score_N = np.random.default_rng(0).permutation(12)
    path = run(tmp_path, "a", score_N, settings={"quarantined": [4, 7]})
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
    paths = [run(tmp_path, name, s) for name, s in (("a", first_N), ("b", second_N))]
    found = find_suspects(paths)
    np.testing.assert_allclose(found.suspicion_N, (ranks(first_N) + ranks(second_N)) / 2)


def test_threshold_samples_tell_which_margins_are_those_of_wrong_labels(tmp_path):
    """202 samples; 100 threshold samples of margins 0 to 99 in each run, whose 99th percentile is
    98.01: lower margins are wrong. Another run judges the threshold samples of the first."""
    labels, paths = np.arange(202) % 3, []
    names = [*(f"class {number}" for number in range(3)), THRESHOLD_CLASS]
    for name, first in (("a", 0), ("b", 100)):
        threshold = np.arange(first, first + 100)
        label_N, margin_N = labels.copy(), np.full(202, 98.5)
        label_N[threshold], margin_N[threshold] = 3, np.arange(100)
        margin_N[[200, 150 if name == "a" else 50]] = 97.5
        paths.append(run(tmp_path, name, -margin_N, label_N, num_classes=4, class_names=names))
    alone, both = find_suspects(paths[:1]), find_suspects(paths)
    assert sorted(alone.order.tolist()) == [*range(100, 202)]
    assert np.flatnonzero(alone.wrong_N).tolist() == [150, 200]
    assert sorted(both.order.tolist()) == [*range(202)]
    assert np.flatnonzero(both.wrong_N).tolist() == [50, 150, 200]
    assert both.label_N.tolist() == labels.tolist()
    assert both.class_names == names[:3]
    assert {both.row(rank)["wrong"] for rank in range(3)} == {"yes"}


def test_without_a_manifest_classes_are_numbers(tmp_path):
    found = find_suspects([run(tmp_path, "a", np.arange(12), manifest=False)])
    row = found.row(0)
    assert (row["index"], row["path"], row["label"]) == ("11", "", "2")


@pytest.mark.parametrize(
    ("score", "change", "words"),
    [
        ("tdds", {}, "score='tdds' is unknown here; use one of aum, csl, "),
        ("aum", {"path": [f"{number}.jpg" for number in range(12)]}, "are of different images; "),
        ("aum", {"label_N": (LABELS + 1) % 3}, "are of different labels; "),
        ("aum", {"label_N": np.arange(9) % 3, "score_N": np.arange(9)}, "numbers of images; "),
        ("csl", {}, "holds no trajectory"),
    ],
)
def test_refused(tmp_path, score, change, words):
    change = {"score_N": np.arange(12)} | change
    paths = [run(tmp_path, "a", np.arange(12)), run(tmp_path, "b", **change)]
    with pytest.raises(InputError, match=words):
        find_suspects(paths, score)
