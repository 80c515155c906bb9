"""What is there already is kept when files of a run are written."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tdds_dist.coreset.select import put
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import load_scores, save_scores
from tdds_dist.runs.directory import RunDir, put_scores
from tests.make import coreset, scores

SCORES = scores("el2n", np.arange(6), np.arange(6) % 2, 2, settings={"source": "live", "T": 3})


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (replace(SCORES, settings={"source": "imported", "T": 3}), "imported"),
        (replace(SCORES, settings={"source": "recorded", "T": 4}), "T was 4, now 3"),
        (scores("el2n", np.arange(6), np.arange(6) % 3, 3, {"source": "live"}), "other images"),
        (b"no scores", "is no readable score file"),
        (replace(SCORES, settings={"source": "recorded", "T": 3, "more": 1}), ""),  # the same ones
    ],
)
def test_other_scores_are_moved_aside(tmp_path, caplog, there, words):
    path = tmp_path / "el2n.npz"
    if isinstance(there, bytes):
        path.write_bytes(there)
    else:
        save_scores(path, there)
    before = path.read_bytes()
    put_scores(path, SCORES)
    assert load_scores(path).settings == SCORES.settings
    aside = [file.read_bytes() for file in tmp_path.glob("before-*/el2n.npz")]
    assert aside == ([before] if words else [])
    assert words in caplog.text


def test_the_images_of_a_run_are_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("tr.beton").touch()
    run = RunDir(Path("run").absolute())
    run.start({"data": {"train": "tr.beton"}}, {}, 1, "cpu")
    assert run.train_file() == Path("tr.beton")
    monkeypatch.chdir(tmp_path)
    assert run.train_file() == tmp_path / "work" / "tr.beton"
    Path("tr.beton").touch()  # here comes first, as the config says
    assert run.train_file() == Path("tr.beton")


def test_the_same_coreset_stays_and_counts_as_made_now(tmp_path, monkeypatch):
    """It is then no older than the collection whose scores it was chosen by."""
    path, kept = tmp_path / "c.npz", coreset("el2n", 0.5, np.arange(3), np.arange(6) % 2, 2)
    assert put(path, kept) == []
    os.utime(path, (0, 0))
    before = path.read_bytes()
    assert put(path, kept) == []
    assert (path.read_bytes(), path.stat().st_mtime > 0) == (before, True)

    def refuse(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(type(path), "touch", refuse)
    assert put(path, kept) == []


def test_validation_by_class_is_rewound_with_the_metrics(tmp_path):
    """Epochs with validation only; one that is done again takes the place of the first try."""
    run = RunDir(tmp_path)
    assert run.read_val_classes() is None
    for epoch in (1, 3, 5, 3):
        run.append_val_classes(epoch, np.array([epoch, np.nan]), np.array([epoch / 8, np.nan]))
    found = run.read_val_classes()
    assert found.epoch_E.tolist() == [1, 3]
    np.testing.assert_array_equal(found.loss_EC, np.float32([[1, np.nan], [3, np.nan]]))
    np.testing.assert_array_equal(found.recall_EC, np.float32([[1 / 8, np.nan], [3 / 8, np.nan]]))
    run.rewind(3)
    assert run.read_val_classes().epoch_E.tolist() == [1]
    run.rewind(0)
    assert run.read_val_classes() is None
    run.val_classes_file.write_bytes(b"no archive")
    with pytest.raises(
        InputError, match=r"val_classes.npz is damaged .*; restore it, or remove it"
    ):
        run.read_val_classes()


@pytest.mark.parametrize(
    ("epoch", "loss", "recall", "words"),
    [
        *[(epoch, (2, 3), (2, 3), "rise, from 0") for epoch in ([-1, 0], [1, 1], [0.0, 1.0], [[0, 1]])],
        *[([0, 1], shape, shape, "a row per epoch and a column") for shape in ((2,), (1, 3))],
        ([0, 1], (2, 3), (2, 4), "of the same epochs and classes"),
        ([0, 1], (2, 3), None, "recall is not a file"),
    ],
)  # fmt: skip
def test_validation_by_class_that_a_user_wrote(tmp_path, epoch, loss, recall, words):
    run = RunDir(tmp_path)
    arrays = {"epoch": np.array(epoch), "loss": np.ones(loss)}
    if recall is not None:
        arrays["recall"] = np.ones(recall)
    np.savez(run.val_classes_file, **arrays)
    with pytest.raises(InputError, match=words):
        run.read_val_classes()
