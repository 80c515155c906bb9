"""Score files and coresets: round trips, what is refused and how, and that a file under its name is
a whole file."""

import errno
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    UNKNOWN_LABEL,
    Coreset,
    Fingerprint,
    Scores,
    fingerprint,
    load_coreset,
    load_scores,
    require_same_dataset,
    save_coreset,
    save_scores,
    write_atomically,
)
from tests.make import refused

LABEL_N = np.array([0, 2, 1, 1, 0, 2, 0])
FINGERPRINT = fingerprint(LABEL_N, 3)
SETTINGS = {"score": "tdds", "T": 30, "K": 10, "beta": 0.9, "rates": [0.3, 0.5]}
SETTINGS |= {"nested": {"note": 'µ "q"\n'}}


def some_scores() -> Scores:
    score_N = np.array([0.5, -1.25, 3e-30, 7, 0, 1e30, 0.1], dtype=np.float32)
    return Scores("tdds_official_T30_K10_beta0.9", score_N, LABEL_N, FINGERPRINT, SETTINGS)


def some_coreset() -> Coreset:
    importance_M = np.array([0.0, 0.25, 1.0], dtype=np.float32)
    return Coreset(np.array([0, 3, 6]), importance_M, "random", 0.6, FINGERPRINT, SETTINGS)


def save(path: Path, value: Scores | Coreset) -> Path:
    save_scores(path, value) if isinstance(value, Scores) else save_coreset(path, value)
    return path


KINDS = [(some_scores, load_scores), (some_coreset, load_coreset)]
each_kind = pytest.mark.parametrize(("make", "load"), KINDS, ids=["scores", "coreset"])


def assert_same(found: Scores | Coreset, want: Scores | Coreset) -> None:
    for name, value in vars(want).items():
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value


# ---- round trips


@each_kind
def test_round_trip(tmp_path, make, load):
    path = save(tmp_path / "new" / "folder" / "file.npz", make())
    assert_same(load(path), make())


def test_dtypes_on_disk_are_fixed(tmp_path):
    scores = replace(some_scores(), score_N=np.arange(7.0), label_N=LABEL_N.astype(np.int16))
    found = load_scores(save(tmp_path / "scores.npz", scores))
    assert (found.score_N.dtype, found.label_N.dtype) == (np.float32, np.int64)
    index_M = np.array([1, 2], dtype=np.int32)
    coreset = replace(some_coreset(), index_M=index_M, importance_M=np.ones(2))
    found = load_coreset(save(tmp_path / "coreset.npz", coreset))
    assert (found.index_M.dtype, found.importance_M.dtype) == (np.int64, np.float32)


@each_kind
def test_everything_is_readable_without_pickle(tmp_path, make, load):
    path = save(tmp_path / "file.npz", make())
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    assert all(array.dtype != object for array in arrays.values())
    meta = json.loads(str(arrays["meta"]))
    assert meta["settings"] == SETTINGS
    assert meta["fingerprint"]["num_samples"] == 7


# ---- what is refused


@each_kind
def test_missing_file_names_the_stage_that_writes_it(tmp_path, make, load):
    stage = "select" if load is load_coreset else "score"
    refused(rf"absent\.npz does not exist; `tdds {stage}`", load, tmp_path / "absent.npz")
    refused("does not exist", load, tmp_path)  # a folder


def test_one_kind_is_not_taken_for_the_other(tmp_path):
    scores = save(tmp_path / "s.npz", some_scores())
    coreset = save(tmp_path / "c.npz", some_coreset())
    refused(r"s\.npz holds 'scores', expected 'coreset'", load_coreset, scores)
    refused(r"c\.npz holds 'coreset', expected 'scores'", load_scores, coreset)


ARRAYS = {"score": np.zeros(7), "label": LABEL_N, "index": np.arange(7), "importance": np.ones(7)}
META = ["[]", "3", "null", "{}", '{"kind": "scores"}', '{"kind": "coreset"}', '{"kind": ']
# bytes of no such file; an array, as the authors' `score_*.npy` are; archives that lack something
OTHER_FILES = [b"", b"PK", b"not a zip file at all", b"\x80\x04K\x01.", os.urandom(500)]
OTHER_FILES += [np.zeros(7, dtype=np.float32), {"other": np.zeros(3)}]
OTHER_FILES += [ARRAYS | {"meta": np.array(meta)} for meta in META]


@each_kind
def test_other_files_are_refused(tmp_path, make, load):
    path = tmp_path / "file.npz"
    for content in OTHER_FILES:
        with path.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            elif isinstance(content, dict):
                np.savez(file, **content)
            else:
                np.save(file, content)
        more = " is not a .* file of tdds" if isinstance(content, bytes) else ""
        refused(rf"file\.npz{more}", load, path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@each_kind
def test_pickled_objects_are_refused_and_not_executed(tmp_path, make, load):
    sprung, path = tmp_path / "sprung", tmp_path / "file.npz"
    with np.load(save(tmp_path / "good.npz", make()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    for name in arrays:
        np.savez(path, **arrays | {name: np.array([Trap(sprung)], dtype=object)})
        refused(r"file\.npz", load, path)
        assert not sprung.exists()


@each_kind
def test_truncated_files_are_refused(tmp_path, make, load):
    path = save(tmp_path / "file.npz", make())
    for length in reversed(range(0, path.stat().st_size, 7)):
        os.truncate(path, length)
        refused(r"file\.npz", load, path)


@each_kind
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, make, load):
    """Wherever it falls: a wrong value must not come through, nor any exception but InputError."""
    path = save(tmp_path / "file.npz", make())
    whole = path.read_bytes()
    escaped = {}
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            file.seek(position)
            file.write(bytes([byte ^ 1 << position % 8]))
            try:
                assert_same(load(path), make())
            except InputError:
                pass
            except Exception as error:
                escaped[position] = repr(error)[:80]
            file.seek(position)
            file.write(bytes([byte]))
    assert path.read_bytes() == whole
    assert not escaped


def test_a_flipped_bit_in_an_array_is_refused(tmp_path):
    """Everywhere in its data; arrays of several reads each."""
    noise_N = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    label_N, found = np.arange(200_000) % 7, Fingerprint(200_000, 7, "")
    scores = Scores("dual", noise_N, label_N, found, {}, {"p_mean": noise_N + 1})
    path = save(tmp_path / "file.npz", scores)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name].tobytes() for name in file}
    assert len(arrays) == 4
    for name, data in arrays.items():
        start, size = whole.index(data), len(data)
        offsets = (0, 1, size // 3, size // 2, 2**18, 2**18 + 1, size - 2, size - 1)
        for bit, offset in enumerate(offsets):
            hurt = bytearray(whole)
            hurt[start + offset % size] ^= 1 << bit
            path.write_bytes(hurt)
            damage = rf"file\.npz is not a scores file .*CRC-32 for file '{name}\.npy'"
            refused(damage, load_scores, path)


WRONG_SCORES = [
    {"score_N": np.zeros(6, np.float32)},
    {"score_N": np.zeros((7, 1), np.float32)},
    {"label_N": LABEL_N[:6]},
    {"fingerprint": Fingerprint(8, 3, "")},
]
WRONG_INDEX = [[3, 0, 6], [0, 3, 3], [0, 3, 7], [-1, 3, 6], [6, 3, 0], []]
WRONG_CORESETS = [
    {"index_M": np.array(index, np.int64), "importance_M": np.ones(len(index), np.float32)}
    for index in WRONG_INDEX
]
SIZES = r"file\.npz: .* must all be \[[78]\].*tdds score"
ORDER = r"file\.npz: index .* strictly increasing within \[0, 7\).*tdds select"
WRONG = [(load_scores, replace(some_scores(), **wrong), SIZES) for wrong in WRONG_SCORES]
WRONG += [(load_coreset, replace(some_coreset(), **wrong), ORDER) for wrong in WRONG_CORESETS]
longer = replace(some_coreset(), importance_M=np.ones(4, dtype=np.float32))
WRONG.append((load_coreset, longer, r"file\.npz: .*as long as importance"))


@pytest.mark.parametrize(("load", "value", "words"), WRONG, ids=range(len(WRONG)))
def test_lengths_and_indices_that_do_not_fit_are_refused(tmp_path, load, value, words):
    refused(words, load, save(tmp_path / "file.npz", value))


# ---- which dataset


def test_fingerprint_depends_on_every_label():
    found = FINGERPRINT
    assert (found.num_samples, found.num_classes) == (7, 3)
    assert found == fingerprint(LABEL_N.astype(np.int32), 3)
    apart = np.stack([LABEL_N, LABEL_N], axis=1)[:, 0]
    assert found == fingerprint(apart, 3), "also when not contiguous"
    for n in range(7):
        other = LABEL_N.copy()
        other[n] = (other[n] + 1) % 3
        assert fingerprint(other, 3) != found
    assert fingerprint(LABEL_N[::-1], 3) != found


def test_another_dataset_is_refused():
    mine = FINGERPRINT
    require_same_dataset(mine, fingerprint(LABEL_N.copy(), 3), "a.npz")
    for other, what in (
        (fingerprint(LABEL_N[:6], 3), "num_samples 7 instead of 6"),
        (fingerprint(LABEL_N, 4), "num_classes 3 instead of 4"),
        (fingerprint(LABEL_N[::-1], 3), f"labels_sha256 '{mine.labels_sha256[:12]}' instead of"),
    ):
        another = rf"a\.npz belongs to another dataset \(.*{what}.*\); use"
        refused(another, require_same_dataset, mine, other, "a.npz")


def test_other_class_names_are_refused_where_both_are_known():
    known, swapped = (fingerprint(LABEL_N, 3, tuple(names)) for names in ("abc", "acb"))
    require_same_dataset(known, FINGERPRINT, "a.npz")
    another = r"a\.npz belongs to another .*other class names"
    refused(another, require_same_dataset, known, swapped, "a.npz")


def test_unknown_labels_are_compared_by_size():
    mine = FINGERPRINT
    for unknown_N in (np.full(7, UNKNOWN_LABEL), np.array([0, 2, 1, 1, 0, 2, UNKNOWN_LABEL])):
        unknown = fingerprint(unknown_N, 10)
        assert unknown.labels_sha256 == ""
        require_same_dataset(unknown, mine, "a.npz")
        require_same_dataset(mine, unknown, "a.npz")
        require_same_dataset(unknown, unknown, "a.npz")
    shorter = fingerprint(np.full(6, UNKNOWN_LABEL), 3)
    for have, need in ((shorter, mine), (mine, shorter)):
        refused("num_samples", require_same_dataset, have, need, "a.npz")


# ---- atomic writing


class Broken(Exception):
    pass


@pytest.mark.parametrize("interruption", [Broken, OSError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_keeps_the_old_file(tmp_path, interruption):
    def write_half(file) -> None:
        file.write(b"half of the new cont")
        file.flush()
        raise interruption("in the middle")

    path = tmp_path / "file.bin"
    with pytest.raises(interruption):
        write_atomically(path, write_half)
    assert list(tmp_path.iterdir()) == [], "nothing half-written under any name"
    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(interruption):
        write_atomically(path, write_half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_visible_before_the_write_is_done(tmp_path):
    path = tmp_path / "file.bin"

    def write(file) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, lambda file: file.write(b"old"))
    write_atomically(path, write)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_that_are_no_json_leave_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save_scores(tmp_path / "file.npz", replace(some_scores(), settings={"window": object()}))
    assert list(tmp_path.iterdir()) == []


# --- file systems and permissions


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["EINVAL", "EPERM", "ENOTSUP", "EIO", "ENOSPC"])
def test_a_file_system_without_fsync_or_chmod_is_written_to_and_a_failed_write_is_said(
    tmp_path, monkeypatch, name
):
    number, is_written = getattr(errno, name), name not in ("EIO", "ENOSPC")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    for call in ("fsync", "chmod", "fchmod"):
        monkeypatch.setattr(os, call, refuse)
    with nullcontext() if is_written else pytest.raises(OSError, match=os.strerror(number)):
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"] * is_written
