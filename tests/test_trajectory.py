"""The trajectory on disk: what several ranks write reads back whole, and what is missing or damaged is named."""

import json
import re
import shutil
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from tdds_dist import ShardedScorer, Window, distributed
from tdds_dist.artifacts import fingerprint
from tdds_dist.errors import InputError
from tdds_dist.partition import shard_bounds
from tdds_dist.scalars import SCALARS
from tdds_dist.trajectory import Trajectory, TrajectoryWriter, require_no_trajectory, resume_trajectory, whole_epochs

NAMES = ("first", "second", "third")


def recorded(num_samples: int, num_epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Random scalars [T, F, N], with NaN and infinity as first epochs and accidents leave them, and labels [N]."""
    rng = np.random.default_rng(num_samples)
    scalars_TFN = rng.normal(size=(num_epochs, len(NAMES), num_samples)).astype(np.float32)
    scalars_TFN[0, 0] = np.nan
    scalars_TFN[-1, 2, 0] = np.inf
    return scalars_TFN, rng.integers(0, 4, num_samples)


def write(folder: Path, scalars_TFN: np.ndarray, label_N: np.ndarray, world_sizes: list[int], dtype: str = "float32",
          labels_sha256: str | None = None) -> Path:
    """Write epoch t as the ranks of a world of `world_sizes[t]` would; the last rank first."""
    num_samples = len(label_N)

    def writers(world_size: int, is_first: bool) -> list[tuple[int, int, TrajectoryWriter]]:
        bounds = [shard_bounds(num_samples, world_size, rank) for rank in range(world_size)]
        return [(first, end, TrajectoryWriter(folder, NAMES, num_samples, 4, first, end, is_first and rank == 0, dtype))
                for rank, (first, end) in enumerate(bounds)][::-1]

    for epoch, world_size in enumerate(world_sizes):
        for first, end, writer in writers(world_size, is_first=epoch == 0):
            if epoch == 0:
                writer.write_labels(label_N[first:end], labels_sha256)
            writer.append(epoch, scalars_TFN[epoch, :, first:end])
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """3 epochs of 10 samples, written by 3 ranks as blocks of 4, 4 and 2."""
    return write(tmp_path / "trajectory", *recorded(10, 3), [3, 3, 3])


# ---- round trips


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 19, 20, 21])
@pytest.mark.parametrize("world_sizes", [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4], [8, 8, 8], [4, 1, 3]], ids=str)
def test_blocks_of_any_world_read_back_whole(tmp_path, num_samples, world_sizes):
    scalars_TFN, label_N = recorded(num_samples, 3)
    trajectory = Trajectory(write(tmp_path, scalars_TFN, label_N, world_sizes))
    assert trajectory.scalars == NAMES
    assert (trajectory.num_samples, trajectory.num_classes, trajectory.num_epochs) == (num_samples, 4, 3)
    for row, name in enumerate(NAMES):
        for num_epochs in (1, 2, 3, None):
            values_TN = trajectory.read(name, num_epochs)
            assert values_TN.dtype == np.float32
            np.testing.assert_array_equal(values_TN, scalars_TFN[:num_epochs, row])
    labels = trajectory.labels()
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, label_N)


def test_an_empty_shard_writes_no_block(tmp_path):
    write(tmp_path, *recorded(2, 1), [4])
    assert sorted(path.name for path in (tmp_path / "epoch_0000").iterdir()) == [
        "0000000000-0000000001.json", "0000000000-0000000001.npy", "0000000001-0000000002.json", "0000000001-0000000002.npy"]


def test_a_new_trajectory_has_no_epochs_and_no_files_before_its_labels(tmp_path):
    writer = TrajectoryWriter(tmp_path, NAMES, 10, 4, 0, 10, is_main=True)
    assert not list(tmp_path.iterdir())
    writer.write_labels(np.zeros(10, dtype=np.int64))
    trajectory = Trajectory(tmp_path)
    assert trajectory.num_epochs == 0
    assert trajectory.read("first").shape == (0, 10)


def test_an_epoch_written_again_replaces_the_first_try(folder):
    again = np.ones((3, 4), dtype=np.float32)
    TrajectoryWriter(folder, NAMES, 10, 4, 4, 8, is_main=False).append(1, again)
    np.testing.assert_array_equal(Trajectory(folder).read("first")[1, 4:8], again[0])


def test_files_are_plain_arrays_without_leftovers(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 1 + 2 * 3 + 2 * 9, "meta.json, and a sidecar beside each block"
    for path in files:
        if path.suffix == ".npy":
            assert np.load(path, allow_pickle=False).dtype in (np.float32, np.int64)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["scalars"] == list(NAMES)
    assert meta["checksums"] is True


def test_leftovers_of_a_killed_writer_are_ignored(folder):
    want = Trajectory(folder).read("second")
    (folder / "epoch_0001" / ".0000000004-0000000008.npy.k3j2.tmp").write_bytes(b"half")
    (folder / "epoch_0001" / "notes.txt").write_text("kept by hand")
    (folder / "epoch_0001" / "old_0000000004-0000000008.npy").write_bytes(b"kept by hand")
    (folder / ".meta.json.x.tmp").write_bytes(b"{")
    (folder / "epoch_0007.tmp").mkdir()
    np.testing.assert_array_equal(Trajectory(folder).read("second"), want)


def test_wrong_shape_is_a_defect_of_the_caller(tmp_path):
    writer = TrajectoryWriter(tmp_path, NAMES, 10, 4, 0, 4, is_main=True)
    for shape in ((3, 5), (2, 4), (4, 3)):
        with pytest.raises(AssertionError):
            writer.append(0, np.zeros(shape, dtype=np.float32))
    assert not list(tmp_path.glob("epoch_*"))


def test_a_row_of_a_block_is_read_alone(tmp_path):
    """The order of the array that is written does not matter: on disk a scalar is one stretch."""
    num_samples = 100_000
    writer = TrajectoryWriter(tmp_path, NAMES * 3, num_samples, 4, 0, num_samples, is_main=True)
    writer.write_labels(np.zeros(num_samples, dtype=np.int64))
    writer.append(0, np.arange(9.0 * num_samples, dtype=np.float32).reshape(num_samples, 9).T)
    trajectory = Trajectory(tmp_path)
    tracemalloc.start()
    second_TN = trajectory.read("second")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(second_TN[0, :3], [1, 10, 19])
    assert peak < 2 * second_TN.nbytes
    assert np.load(tmp_path / "epoch_0000" / "0000000000-0000100000.npy", mmap_mode="r").flags.c_contiguous


# ---- float16


@pytest.mark.parametrize("world_sizes", [[1, 1, 1], [3, 3, 3], [4, 1, 3]], ids=str)
def test_float16_reads_back_rounded_and_clipped(tmp_path, world_sizes):
    scalars_TFN, label_N = recorded(10, 3)
    scalars_TFN[1, 1, :6] = [1e5, -1e30, 65519.0, -np.inf, 1e-9, np.nan]
    trajectory = Trajectory(write(tmp_path, scalars_TFN, label_N, world_sizes, "float16"))
    assert trajectory.dtype == json.loads((tmp_path / "meta.json").read_text())["dtype"] == "float16"
    for path in tmp_path.glob("epoch_*/*.npy"):
        assert np.load(path).dtype == np.float16
    second_TN = trajectory.read("second")
    assert second_TN.dtype == np.float32
    np.testing.assert_array_equal(second_TN[1, :6], [65504, -65504, 65504, -65504, 0, np.nan])
    assert np.isnan(trajectory.read("first")[0]).all()
    assert trajectory.read("third")[-1, 0] == 65504
    np.testing.assert_allclose(trajectory.read("first")[1:], scalars_TFN[1:, 0], rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", ""])
def test_another_dtype_is_refused(folder, dtype):
    with pytest.raises(InputError, match=rf"dtype='{dtype}' must be one of float32, float16"):
        TrajectoryWriter(folder, NAMES, 10, 4, 0, 10, True, dtype)
    change_meta(folder, dtype=dtype)
    with pytest.raises(InputError, match=rf"meta\.json has dtype '{dtype}', this version reads float32, float16"):
        Trajectory(folder)


def test_blocks_of_two_dtypes_do_not_mix(folder):
    TrajectoryWriter(folder, NAMES, 10, 4, 4, 8, False, "float16").append(1, np.zeros((3, 4), dtype=np.float32))
    with pytest.raises(InputError, match=r"0000000004-0000000008\.npy holds float16 \(3, 4\), expected float32 \(3, 4\)"):
        Trajectory(folder).read("first")


# ---- the fingerprint of the labels


def change_meta(folder: Path, **values: object) -> None:
    """Set keys of meta.json; None removes them."""
    meta = json.loads((folder / "meta.json").read_text()) | values
    (folder / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


def test_labels_are_compared_with_their_hash(tmp_path):
    scalars_TFN, label_N = recorded(10, 1)
    want = fingerprint(label_N, 4)
    write(tmp_path, scalars_TFN, label_N, [3], labels_sha256=want.labels_sha256)
    assert Trajectory(tmp_path).fingerprint() == want
    label_N[9] = (label_N[9] + 1) % 4
    TrajectoryWriter(tmp_path, NAMES, 10, 4, 8, 10, False).write_labels(label_N[8:])
    found = fingerprint(label_N, 4).labels_sha256[:12]
    message = rf"{tmp_path} holds labels of another dataset; they hash to {found}, meta.json says {want.labels_sha256[:12]}; "
    for read in (Trajectory(tmp_path).labels, Trajectory(tmp_path).fingerprint):
        with pytest.raises(InputError, match=message):
            read()
    assert Trajectory(tmp_path).read("second").shape == (1, 10), "the scalars are as they were"


def test_a_trajectory_of_an_earlier_version_still_loads(folder):
    """Without `labels_sha256` and `checksums`, which came later."""
    scalars_TFN, label_N = recorded(10, 3)
    change_meta(folder, checksums=None)
    for sidecar in folder.glob("*/*.json"):
        sidecar.unlink()
    np.testing.assert_array_equal(Trajectory(folder).read("second"), scalars_TFN[:, 1])
    assert whole_epochs(folder) == (3, "")
    assert "labels_sha256" not in json.loads((folder / "meta.json").read_text())
    np.testing.assert_array_equal(Trajectory(folder).labels(), label_N)
    assert Trajectory(folder).fingerprint() == fingerprint(label_N, 4)
    change_meta(folder, dtype=None)
    assert Trajectory(folder).dtype == "float32"


# ---- checksums

BLOCK = "epoch_0001/0000000004-0000000008.npy"
LABELS = "labels/0000000004-0000000008.npy"
HEADER = 128  # bytes before the data of a block


def flip(path: Path, position: int) -> None:
    """Change one bit of a byte, another one in the next byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def flips(path: Path) -> Iterator[int]:
    """Every position of a file, with one bit of the byte there changed while the caller looks."""
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        yield position
        path.write_bytes(whole)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sidecars_hold_place_and_checksums(tmp_path, dtype):
    write(tmp_path, *recorded(10, 2), [3, 1], dtype)
    places = {f"epoch_0000/{block}": (0, first, end) for block, first, end in (
        ("0000000000-0000000004", 0, 4), ("0000000004-0000000008", 4, 8), ("0000000008-0000000010", 8, 10))}
    places |= {name.replace("epoch_0000", "labels"): ("labels", first, end) for name, (_, first, end) in places.items()}
    places |= {"epoch_0001/0000000000-0000000010": (1, 0, 10)}
    assert {str(path.relative_to(tmp_path))[:-5] for path in tmp_path.glob("*/*.json")} == set(places)
    for name, (epoch, first, end) in places.items():
        data = (tmp_path / f"{name}.npy").read_bytes()[HEADER:]
        size = len(data) if epoch == "labels" else len(data) // 3
        rows = [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]
        want = {"epoch": epoch, "first": first, "end": end, "crc32": rows}
        assert json.loads((tmp_path / f"{name}.json").read_text()) == want


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_flipped_bit_in_a_block_is_found_in_the_row_it_is_in(tmp_path, dtype):
    folder = write(tmp_path, *recorded(10, 2), [3, 3], dtype)
    want = {name: Trajectory(folder).read(name) for name in NAMES}
    size = 4 * np.dtype(dtype).itemsize
    for position in flips(folder / BLOCK):
        trajectory = Trajectory(folder)
        if position < HEADER:
            try:
                trajectory.verify()
            except InputError:
                continue
            for name in NAMES:  # a blank, say, that became another one
                np.testing.assert_array_equal(trajectory.read(name), want[name])
            continue
        name = NAMES[(position - HEADER) // size]
        message = rf"{BLOCK} is damaged \(CRC-32 of {name} is [0-9a-f]{{8}}, 0000000004-0000000008\.json says [0-9a-f]{{8}}\); "
        for read in (trajectory.verify, lambda: trajectory.read(name), lambda: trajectory.verify_epoch(1)):  # noqa: B023
            with pytest.raises(InputError, match=message + "restore it or collect again"):
                read()
        for other in set(NAMES) - {name}:
            np.testing.assert_array_equal(trajectory.read(other), want[other])
        np.testing.assert_array_equal(trajectory.read(name, 1), want[name][:1])
        assert whole_epochs(folder)[0] == 1
    assert position == HEADER + 3 * size - 1
    assert whole_epochs(folder) == (2, "")


def test_a_flipped_bit_in_labels_is_found(folder):
    want = Trajectory(folder).labels()
    for position in flips(folder / LABELS):
        if position < HEADER and not whole_epochs(folder)[1]:  # a blank, say, that became another one
            np.testing.assert_array_equal(Trajectory(folder).labels(), want)
            continue
        assert whole_epochs(folder)[0] == 0
        for read in (Trajectory(folder).labels, Trajectory(folder).verify):
            with pytest.raises(InputError, match=LABELS):
                read()
    assert position == HEADER + 4 * 8 - 1


@pytest.mark.parametrize("block", [BLOCK, LABELS])
def test_a_flipped_bit_in_a_sidecar_is_found(folder, block):
    sidecar = folder / block.replace("npy", "json")
    num_found = 0
    for _ in flips(sidecar):
        with pytest.raises(InputError, match=block[:-4]):
            Trajectory(folder).verify()
        num_found += 1
    assert num_found == sidecar.stat().st_size > 60
    Trajectory(folder).verify()


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b'"epoch"', b"null", b"\xff\xfe", b'{"epoch": 1, "first": 4, "end": 8}',
                                     b'{"epoch": 1, "first": 4, "end": 8, "crc32": 5}',
                                     b'{"epoch": 1, "first": 4, "end": 8, "crc32": [1, 2]}',
                                     b'{"epoch": 1, "first": 4, "end": 8, "crc32": [1, 2, "3"]}', None])
def test_damaged_or_missing_sidecar(folder, content):
    sidecar = (folder / BLOCK).with_suffix(".json")
    if content is None:
        sidecar.unlink()
    else:
        sidecar.write_bytes(content)
    message = rf"{sidecar} is missing or damaged \(.*\), so 0000000004-0000000008\.npy cannot be trusted; restore both or"
    for read in (Trajectory(folder).verify, lambda: Trajectory(folder).read("second")):
        with pytest.raises(InputError, match=message):
            read()
    assert Trajectory(folder).read("second", 1).shape == (1, 10)
    change_meta(folder, checksums=None)
    Trajectory(folder).verify()


@pytest.mark.parametrize("length", [1, 4, 48])
@pytest.mark.parametrize("block", [BLOCK, LABELS])
def test_a_block_that_is_too_long(folder, block, length):
    size = (folder / block).stat().st_size
    with (folder / block).open("ab") as file:
        file.write(bytes(length))
    with pytest.raises(InputError, match=rf"{block} is damaged \({size + length} bytes instead of {size}\); restore it or"):
        Trajectory(folder).verify()


@pytest.mark.parametrize("with_sidecar", [True, False])
@pytest.mark.parametrize(("source", "target", "found"), [
    ("epoch_0002/0000000004-0000000008", BLOCK[:-4], r"epoch 2 \[4, 8\), where epoch 1 \[4, 8\)"),
    ("epoch_0001/0000000000-0000000004", BLOCK[:-4], r"epoch 1 \[0, 4\), where epoch 1 \[4, 8\)"),
    ("labels/0000000000-0000000004", LABELS[:-4], r"labels \[0, 4\), where labels \[4, 8\)")])
def test_a_block_of_another_place_is_found(folder, source, target, found, with_sidecar):
    shutil.copy(folder / f"{source}.npy", folder / f"{target}.npy")
    message = rf"{target}\.npy is damaged \(CRC-32"
    if with_sidecar:
        shutil.copy(folder / f"{source}.json", folder / f"{target}.json")
        message = rf"{target}\.json is of {found} should be; restore it and 0000000004-0000000008\.npy, or collect again"
    with pytest.raises(InputError, match=message):
        Trajectory(folder).verify()
    for read in [Trajectory(folder).labels] if "labels" in target else [lambda: Trajectory(folder).read("second")]:
        with pytest.raises(InputError, match=message):
            read()
    assert whole_epochs(folder)[0] == (0 if "labels" in target else 1)


def test_an_epoch_that_is_a_copy_of_another(folder):
    shutil.rmtree(folder / "epoch_0002")
    shutil.copytree(folder / "epoch_0001", folder / "epoch_0002")
    with pytest.raises(InputError, match=r"epoch_0002/0000000000-0000000004\.json is of epoch 1 \[0, 4\), where epoch 2"):
        Trajectory(folder).read("first")
    num_whole, reason = whole_epochs(folder)
    assert num_whole == 2
    assert "is of epoch 1" in reason


@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_between_sidecar_and_block(folder, monkeypatch, epoch):
    """While epoch 3 was recorded, or epoch 1 once more: it does not count, and a resume removes it."""
    writers = [TrajectoryWriter(folder, NAMES, 10, 4, *bounds, False) for bounds in ((0, 4), (4, 8), (8, 10))]
    again_FN = np.full((3, 10), 7, dtype=np.float32)
    writers[0].append(epoch, again_FN[:, :4])
    writers[1].append(epoch, again_FN[:, 4:8])

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        writers[2].append(epoch, again_FN[:, 8:])
    monkeypatch.undo()
    num_whole, reason = whole_epochs(folder)
    assert num_whole == epoch
    assert re.search(r"epoch_0003 cover 8 of 10" if epoch == 3 else r"epoch_0001/0000000008-0000000010\.npy is damaged", reason)
    resume(folder, epoch)
    assert whole_epochs(folder) == (epoch, "")
    np.testing.assert_array_equal(Trajectory(folder).read("second"), recorded(10, 3)[0][:epoch, 1])


def test_checksums_of_another_kind(folder):
    change_meta(folder, checksums="crc64")
    with pytest.raises(InputError, match=r"meta\.json is damaged .*checksums must be true, false or absent"):
        Trajectory(folder)


# ---- how far a recording can be trusted


@pytest.mark.parametrize(("fault", "num_whole", "reason"), [
    ("none", 3, ""), ("only begun", 3, r"epoch_0003 cover 0 of 10 samples"), ("first", 0, r"epoch_0000/.*\.npy is damaged"),
    ("last", 2, r"epoch_0002/.*\.npy is damaged"), ("gap", 1, r"holds epochs \[0\], expected 0 to 1 without a gap"),
    ("no first", 0, r"holds epochs \[\], expected 0 to 0"), ("two names", 1, r"holds epochs \[0, 1, 1\], expected 0 to 1"),
    ("block", 2, r"epoch_0002 leave a gap at index 4"), ("overlap", 1, r"epoch_0001 overlap"),
    ("labels", 0, r"labels leave a gap"), ("meta", 0, r"meta\.json is damaged"), ("no meta", 0, r"no meta\.json"),
    ("hash", 0, "labels of another dataset"), ("quarantine", 0, r"quarantine\.json is damaged"),
    ("leftovers", 3, ""), ("sidecar", 1, r"epoch_0001/.*\.json is missing"), ("dtype", 1, "holds float16"),
])
def test_whole_epochs(folder, fault, num_whole, reason):
    name = "0000000004-0000000008.npy"
    {"none": lambda: None,
     "only begun": (folder / "epoch_0003").mkdir,
     "first": lambda: flip(folder / "epoch_0000" / name, -1),
     "last": lambda: flip(folder / "epoch_0002" / name, HEADER),
     "gap": lambda: shutil.rmtree(folder / "epoch_0001"),
     "no first": lambda: shutil.rmtree(folder / "epoch_0000"),
     "two names": (folder / "epoch_00001").mkdir,
     "block": (folder / "epoch_0002" / name).unlink,
     "overlap": lambda: shutil.copy(folder / "epoch_0001" / name, folder / "epoch_0001" / "0000000005-0000000009.npy"),
     "labels": (folder / "labels" / name).unlink,
     "meta": lambda: (folder / "meta.json").write_bytes(b"{"),
     "no meta": (folder / "meta.json").unlink,
     "hash": lambda: change_meta(folder, labels_sha256="abc"),
     "quarantine": lambda: (folder / "quarantine.json").write_bytes(b"[]"),
     "leftovers": lambda: (folder / "epoch_0001" / f".{name}.x.tmp").write_bytes(b"half"),
     "sidecar": (folder / "epoch_0001" / name).with_suffix(".json").unlink,
     "dtype": lambda: TrajectoryWriter(folder, NAMES, 10, 4, 4, 8, False, "float16").append(1, np.ones((3, 4), np.float32)),
     }[fault]()
    before = files_of(folder)
    found = whole_epochs(str(folder))
    assert found[0] == num_whole
    assert re.search(reason, found[1]) if reason else found[1] == ""
    assert files_of(folder) == before
    if num_whole:
        resume(folder, num_whole)
        assert whole_epochs(folder) == (num_whole, "")


def test_where_nothing_was_recorded_no_epoch_is_whole(tmp_path):
    assert whole_epochs(tmp_path / "nowhere") == (0, "")
    assert whole_epochs(tmp_path) == (0, "")
    (tmp_path / ".meta.json.x.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("by hand")
    assert whole_epochs(tmp_path) == (0, "")
    writer = TrajectoryWriter(tmp_path, NAMES, 10, 4, 0, 10, True)
    writer.write_labels(np.zeros(10, dtype=np.int64))
    assert whole_epochs(tmp_path) == (0, "")
    writer.append(0, np.zeros((3, 10), dtype=np.float32))
    assert whole_epochs(tmp_path) == (1, "")


# ---- quarantine


def test_quarantine_reads_back(folder):
    writer = TrajectoryWriter(folder, NAMES, 10, 4, 0, 4, True)
    assert Trajectory(folder).quarantined == {}
    writer.write_quarantine({})
    assert not (folder / "quarantine.json").exists()
    writer.write_quarantine({9: 0, 2: 3})
    assert json.loads((folder / "quarantine.json").read_text()) == {
        "format": "tdds-quarantine-1", "samples": {"2": 3, "9": 0}}
    assert list(Trajectory(folder).quarantined.items()) == [(2, 3), (9, 0)]
    assert Trajectory(folder, 2).quarantined == {2: 3, 9: 0}, "also when fewer epochs are looked at"
    assert whole_epochs(folder) == (3, "")
    writer.write_quarantine({np.int64(4): np.int64(1)})
    assert Trajectory(folder).quarantined == {4: 1}
    writer.write_quarantine({})
    assert not (folder / "quarantine.json").exists()
    for wrong in ({10: 0}, {-1: 0}, {1: -1}):
        with pytest.raises(AssertionError):
            writer.write_quarantine(wrong)
    with pytest.raises(AssertionError):
        TrajectoryWriter(folder, NAMES, 10, 4, 4, 8, False).write_quarantine({})


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"format": "tdds-quarantine-1"}',
    b'{"format": "tdds-quarantine-1", "samples": [1]}',
    b'{"format": "tdds-quarantine-1", "samples": {"10": 3}}', b'{"format": "tdds-quarantine-1", "samples": {"-1": 3}}',
    b'{"format": "tdds-quarantine-1", "samples": {"one": 3}}', b'{"format": "tdds-quarantine-1", "samples": {"1": -1}}',
    b'{"format": "tdds-quarantine-1", "samples": {"1": "3"}}', b'{"format": "tdds-quarantine-1", "samples": {"1": true}}',
    b'{"format": "tdds-quarantine-2", "samples": {"1": 3}}'])
def test_damaged_quarantine(folder, content):
    (folder / "quarantine.json").write_bytes(content)
    for read in (lambda: Trajectory(folder).quarantined, Trajectory(folder).verify):
        with pytest.raises(InputError, match=r"trajectory/quarantine\.json is damaged \(.*\); restore it or collect again"):
            read()


@pytest.mark.parametrize(("next_epoch", "left"), [
    (0, None), (1, {4: 0}), (2, {2: 1, 4: 0}), (3, {2: 1, 4: 0, 7: 2})])
def test_resume_frees_samples_quarantined_in_lost_epochs(folder, next_epoch, left):
    writer = TrajectoryWriter(folder, NAMES, 10, 4, 0, 4, True)
    writer.write_quarantine({4: 0, 2: 1, 7: 2, 8: 3})
    resume(folder, next_epoch)
    if left is not None:
        assert Trajectory(folder).quarantined == left
    assert (folder / "quarantine.json").exists() == (left is not None)
    writer.write_quarantine({8: next_epoch})
    resume(folder, next_epoch)
    assert not (folder / "quarantine.json").exists()


def test_a_quarantine_alone_is_a_part_of_a_trajectory(tmp_path):
    TrajectoryWriter(tmp_path, NAMES, 10, 4, 0, 10, True).write_quarantine({3: 0})
    with pytest.raises(InputError, match="already holds a trajectory"):
        require_no_trajectory(tmp_path)
    assert whole_epochs(tmp_path)[0] == 0
    resume(tmp_path, 0)
    require_no_trajectory(tmp_path)


# ---- going on where a run ended


def resume(folder: Path, next_epoch: int, **changes: object) -> None:
    """`resume_trajectory` for the run of the fixture `folder`, or one that differs in `changes`."""
    run = {"scalars": NAMES, "num_samples": 10, "num_classes": 4, "dtype": "float32",
           "labels_sha256": fingerprint(recorded(10, 3)[1], 4).labels_sha256}
    resume_trajectory(folder, **run | changes, next_epoch=next_epoch)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("has_hash", [True, False])
@pytest.mark.parametrize("next_epoch", [1, 2, 3])
def test_resume_keeps_what_was_finished_and_removes_the_rest(folder, next_epoch, has_hash):
    label_N = recorded(10, 3)[1]
    if has_hash:
        change_meta(folder, labels_sha256=fingerprint(label_N, 4).labels_sha256)
    before = files_of(folder)
    (folder / "epoch_0003").mkdir()
    (folder / "epoch_0003" / ".0000000000-0000000004.npy.x.tmp").write_bytes(b"half")
    (folder / "epoch_0005").mkdir()
    for leftover in ("epoch_0000/.0000000004-0000000008.npy.k3_j2abc.tmp", "epoch_0000/.0000000000-0000000004.json.x.tmp",
                     "labels/.0000000008-0000000010.npy.x.tmp", ".meta.json.x.tmp", ".quarantine.json.x.tmp"):
        (folder / leftover).write_bytes(b"half")
    (folder / "epoch_0000" / "notes.tmp").write_bytes(before.setdefault("epoch_0000/notes.tmp", b"kept by hand"))
    resume(folder, next_epoch, labels_sha256=fingerprint(label_N, 4).labels_sha256 if has_hash else None)
    lost = {f"epoch_{epoch:04d}" for epoch in range(next_epoch, 3)}
    assert files_of(folder) == {name: data for name, data in before.items() if name.split("/")[0] not in lost}
    assert not list(folder.glob("epoch_0005"))
    first, end = shard_bounds(10, 2, 1)  # another world size
    TrajectoryWriter(folder, NAMES, 10, 4, 0, first, True).append(next_epoch, np.full((3, first), 7, np.float32))
    TrajectoryWriter(folder, NAMES, 10, 4, first, end, False).append(next_epoch, np.full((3, end - first), 8, np.float32))
    trajectory = Trajectory(folder)
    assert trajectory.num_epochs == next_epoch + 1
    np.testing.assert_array_equal(trajectory.read("third")[-1], [7] * 5 + [8] * 5)
    np.testing.assert_array_equal(trajectory.read("third")[:-1], recorded(10, 3)[0][:next_epoch, 2])
    np.testing.assert_array_equal(trajectory.labels(), label_N)


@pytest.mark.parametrize("has_meta", [True, False])
def test_resume_before_the_first_epoch_starts_over(folder, has_meta):
    """Killed between two labels: those of another world size would overlap with what is left."""
    (folder / "labels" / "0000000004-0000000008.npy").unlink()
    (folder / "labels" / "names.txt").write_text("kept by hand")
    (folder / "labels" / ".0000000004-0000000008.npy.x.tmp").write_bytes(b"half")
    (folder / "quarantine.json").write_bytes(b"damaged")
    if not has_meta:
        (folder / "meta.json").unlink()
    resume(folder, 0)
    assert files_of(folder) == {"labels/names.txt": b"kept by hand"}
    require_no_trajectory(folder)
    scalars_TFN, label_N = recorded(10, 3)
    np.testing.assert_array_equal(Trajectory(write(folder, scalars_TFN, label_N, [2])).labels(), label_N)


@pytest.mark.parametrize(("changes", "message"), [
    ({"scalars": NAMES[:2]}, r"scalars \('first', 'second', 'third'\) instead of \('first', 'second'\)"),
    ({"num_samples": 11}, "num_samples 10 instead of 11"), ({"num_classes": 5}, "num_classes 4 instead of 5"),
    ({"dtype": "float16"}, "dtype 'float32' instead of 'float16'"),
    ({"labels_sha256": "0123456789abcdef"}, r"labels of another dataset; .* to 0123456789ab; resume with the \.beton"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_resume_of_another_run_is_refused_and_removes_nothing(folder, changes, message):
    before = files_of(folder)
    for next_epoch in (2,) if "labels_sha256" in changes else (0, 2):
        with pytest.raises(InputError, match=rf"{folder} holds .*{message}"):
            resume(folder, next_epoch, **changes)
    assert files_of(folder) == before


@pytest.mark.parametrize(("fault", "message"), [
    ("block", r"epoch_0001 leave a gap at index 4"), ("cut", r"epoch_0000/0000000008-0000000010\.npy is damaged"),
    ("epoch", r"holds epochs \[0\], expected 0 to 1 without a gap"), ("labels", r"labels cover 8 of 10 samples"),
    ("meta", r"holds no trajectory"), ("bit", r"epoch_0001/0000000004-0000000008\.npy is damaged \(CRC-32 of third"),
    ("sidecar", r"epoch_0000/0000000008-0000000010\.json is missing or damaged"),
    ("label", r"labels/0000000008-0000000010\.npy is damaged \(CRC-32 is"),
    ("quarantine", r"quarantine\.json is damaged"), ("two names", r"holds epochs \[0, 1, 1\], expected 0 to 1"),
    ("hash", "holds labels of another dataset; .* meta.json says abc")])
def test_resume_needs_whole_epochs_and_removes_nothing(folder, fault, message):
    last_label = folder / "labels" / "0000000008-0000000010.npy"
    cut = folder / "epoch_0000" / "0000000008-0000000010.npy"
    {"block": (folder / "epoch_0001" / "0000000004-0000000008.npy").unlink,
     "cut": lambda: cut.write_bytes(cut.read_bytes()[:-1]),
     "epoch": lambda: shutil.rmtree(folder / "epoch_0001"),
     "labels": last_label.unlink,
     "bit": lambda: flip(folder / "epoch_0001" / "0000000004-0000000008.npy", -1),
     "sidecar": cut.with_suffix(".json").unlink,
     "label": lambda: flip(last_label, -8),
     "quarantine": lambda: (folder / "quarantine.json").write_bytes(b"{}"),
     "meta": (folder / "meta.json").unlink,
     "two names": (folder / "epoch_00001").mkdir,
     "hash": lambda: change_meta(folder, labels_sha256="abc")}[fault]()
    before = files_of(folder)
    with pytest.raises(InputError, match=message):
        resume(folder, 2)
    assert files_of(folder) == before


# ---- real ranks

SIZES = (1, 2, 7)  # samples: with 2 and 3 ranks some shards are empty


def stream(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, N, C] of 4 epochs and labels [N]."""
    generator = torch.Generator().manual_seed(num_samples)
    logits_TNC = torch.randn(4, num_samples, 5, generator=generator) * 4
    return logits_TNC, torch.randint(5, (num_samples,), generator=generator)


def record_epochs(rank: int, world_size: int, scorer: ShardedScorer, epochs: range) -> None:
    logits_TNC, label_N = stream(scorer.num_samples)
    index_B = torch.arange(scorer.num_samples)[rank::world_size]
    for epoch in epochs:
        scorer.record(index_B, logits_TNC[epoch, index_B], label_N[index_B])
        scorer.end_epoch()


def record_all(rank: int, world_size: int, root: Path) -> None:
    """Trajectories of every size in both dtypes, as <root>/<N>_<dtype>."""
    for num_samples in SIZES:
        for dtype in ("float32", "float16"):
            scorer = ShardedScorer(num_samples, 5, [Window(4, 3)], device="cpu", trajectory=root / f"{num_samples}_{dtype}",
                                   trajectory_dtype=getattr(torch, dtype))
            record_epochs(rank, world_size, scorer, range(4))


def record_in_part(rank: int, world_size: int, root: Path) -> None:
    """Two epochs, and a third that lacks the block of the first rank (whole where there is but one block)."""
    for num_samples in SIZES:
        scorer = ShardedScorer(num_samples, 5, [Window(4, 3)], device="cpu", trajectory=root / str(num_samples))
        record_epochs(rank, world_size, scorer, range(3))
        distributed.barrier()
        if rank == 0 and num_samples > 1:
            min((root / str(num_samples) / "epoch_0002").glob("*.npy")).unlink()


def record_the_rest(rank: int, world_size: int, root: Path) -> None:
    """Epochs 2 and 3, after two epochs without a record have brought the scorer to where the run ended."""
    for num_samples in SIZES:
        scorer = ShardedScorer(num_samples, 5, [Window(4, 3)], device="cpu")
        record_epochs(rank, world_size, scorer, range(2))
        folder = root / str(num_samples)
        with distributed.together(scorer.world):
            if rank == 0:
                sha256 = fingerprint(stream(num_samples)[1].numpy(), 5).labels_sha256
                resume_trajectory(folder, SCALARS, num_samples, 5, sha256, 2)
        first, end = distributed.own_shard(num_samples, scorer.world)
        scorer._trajectory = TrajectoryWriter(folder, SCALARS, num_samples, 5, first, end, rank == 0)
        record_epochs(rank, world_size, scorer, range(2, 4))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process records, without a process group."""
    root = tmp_path_factory.mktemp("alone")
    record_all(0, 1, root)
    return root


def assert_same_trajectory(folder: Path, want: Path) -> None:
    found, wanted = Trajectory(folder), Trajectory(want)
    assert (folder / "meta.json").read_bytes() == (want / "meta.json").read_bytes()
    assert found.num_epochs == wanted.num_epochs == 4
    for name in SCALARS:
        assert found.read(name).tobytes() == wanted.read(name).tobytes(), (folder, name)
    np.testing.assert_array_equal(found.labels(), wanted.labels())
    assert found.fingerprint() == wanted.fingerprint()


def test_what_one_process_records(alone):
    for num_samples in SIZES:
        label_N = stream(num_samples)[1].numpy()
        exact, rough = (Trajectory(alone / f"{num_samples}_{dtype}") for dtype in ("float32", "float16"))
        for trajectory in (exact, rough):
            meta = json.loads((trajectory.directory / "meta.json").read_text())
            assert meta["labels_sha256"] == fingerprint(label_N, 5).labels_sha256
            np.testing.assert_array_equal(trajectory.labels(), label_N)
            assert meta["dtype"] == trajectory.dtype == trajectory.directory.name.split("_")[1]
        for name in SCALARS:
            want_TN = exact.read(name)
            np.testing.assert_array_equal(rough.read(name), want_TN.astype(np.float16).astype(np.float32))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_record_what_one_process_does(alone, tmp_path, world_size):
    run_ranks(world_size, record_all, world_size, tmp_path)
    for num_samples in SIZES:
        blocks = sorted((tmp_path / f"{num_samples}_float16" / "epoch_0003").glob("*.npy"))
        bounds = [shard_bounds(num_samples, world_size, rank) for rank in range(world_size)]
        assert len(blocks) == len([end for first, end in bounds if end > first])
        for dtype in ("float32", "float16"):
            assert_same_trajectory(tmp_path / f"{num_samples}_{dtype}", alone / f"{num_samples}_{dtype}")


@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_resume_on_other_ranks_reads_as_one_run(alone, tmp_path, before, after):
    run_ranks(before, record_in_part, before, tmp_path)
    with pytest.raises(InputError, match=r"epoch_0002 leave a gap at index 0"):
        Trajectory(tmp_path / "7").read("el2n")
    run_ranks(after, record_the_rest, after, tmp_path)
    for num_samples in SIZES:
        assert_same_trajectory(tmp_path / str(num_samples), alone / f"{num_samples}_float32")


# ---- refusing to mix two trajectories


def test_an_existing_trajectory_is_not_written_into(folder):
    before = Trajectory(folder).read("first")
    with pytest.raises(InputError, match=r"trajectory already holds a trajectory; choose another"):
        require_no_trajectory(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(InputError, match="already holds a trajectory"):
        require_no_trajectory(folder)
    with pytest.raises(InputError, match="already holds a trajectory"):
        ShardedScorer(10, 4, [Window(3, 2)], device="cpu", trajectory=folder)
    assert not (folder / "meta.json").exists()
    for epoch in range(3):
        shutil.rmtree(folder / f"epoch_{epoch:04d}")
    with pytest.raises(InputError, match="already holds a trajectory"):
        require_no_trajectory(folder)
    shutil.rmtree(folder / "labels")
    require_no_trajectory(folder)
    assert len(before) == 3


# ---- what is missing or damaged


def test_missing_block(folder):
    (folder / "epoch_0001" / "0000000004-0000000008.npy").unlink()
    trajectory = Trajectory(folder)
    assert trajectory.read("first", 1).shape == (1, 10), "epochs before it are whole"
    with pytest.raises(InputError, match=r"epoch_0001 leave a gap at index 4 .*0000000008-0000000010"):
        trajectory.read("first")


@pytest.mark.parametrize(("block", "message"), [
    ("0000000000-0000000004.npy", "leave a gap at index 0"), ("0000000008-0000000010.npy", "cover 8 of 10 samples")])
def test_missing_block_at_an_end(folder, block, message):
    (folder / "epoch_0002" / block).unlink()
    with pytest.raises(InputError, match=rf"epoch_0002 {message}"):
        Trajectory(folder).read("third")


@pytest.mark.parametrize(("first", "end"), [(2, 6), (0, 8), (4, 10), (5, 7), (9, 10), (4, 4), (10, 10), (10, 8)])
def test_overlapping_block(folder, first, end):
    np.save(folder / "epoch_0001" / f"{first:010d}-{end:010d}.npy", np.zeros((3, abs(end - first)), dtype=np.float32))
    with pytest.raises(InputError, match=r"epoch_0001 overlap at index \d+ "):
        Trajectory(folder).read("first")


def test_block_beyond_the_dataset(folder):
    np.save(folder / "epoch_0001" / "0000000010-0000000012.npy", np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(InputError, match=r"epoch_0001 cover 12 of 10 samples; remove what does not belong there or"):
        Trajectory(folder).read("first")


@pytest.mark.parametrize(("num_samples", "message"), [
    (9, r"cover 10 of 9 samples; remove what does not belong there"), (12, r"cover 10 of 12 samples; restore the missing")])
def test_blocks_of_another_size_than_meta(folder, num_samples, message):
    change_meta(folder, num_samples=num_samples)
    with pytest.raises(InputError, match=rf"epoch_0000 {message}"):
        Trajectory(folder).read("first")
    with pytest.raises(InputError, match=rf"labels {message}"):
        Trajectory(folder).labels()


def test_an_epoch_that_was_not_finished(folder):
    """Killed before any rank, or before the last rank, had written its block."""
    (folder / "epoch_0003").mkdir()
    assert Trajectory(folder).num_epochs == 4
    with pytest.raises(InputError, match=r"epoch_0003 cover 0 of 10 samples; restore the missing blocks"):
        Trajectory(folder).read("first")
    shutil.copy(folder / "epoch_0002" / "0000000000-0000000004.npy", folder / "epoch_0003")
    with pytest.raises(InputError, match=r"epoch_0003 cover 4 of 10 samples"):
        Trajectory(folder).verify()
    np.testing.assert_array_equal(Trajectory(folder).read("first", 3), recorded(10, 3)[0][:, 0])
    assert Trajectory(folder, 3).num_epochs == 3
    with pytest.raises(InputError, match=r"trajectory holds epochs \[0, 1, 2, 3\], expected 0 to 4 without a gap"):
        Trajectory(folder, 5)


def test_missing_labels(folder):
    (folder / "labels" / "0000000000-0000000004.npy").unlink()
    with pytest.raises(InputError, match=r"labels leave a gap at index 0"):
        Trajectory(folder).labels()
    shutil.rmtree(folder / "labels")
    with pytest.raises(InputError, match=r"labels cover 0 of 10 samples"):
        Trajectory(folder).labels()


@pytest.mark.parametrize("epoch", [0, 1])
def test_gap_in_epochs(folder, epoch):
    shutil.rmtree(folder / f"epoch_{epoch:04d}")
    with pytest.raises(InputError, match=r"trajectory holds epochs \[\d, 2\], expected 0, 1, 2"):
        Trajectory(folder)


@pytest.mark.parametrize("length", [0, 5, 60, 127, 128, 150, -1])
def test_truncated_block(folder, length):
    path = folder / "epoch_0001" / "0000000004-0000000008.npy"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"0000000004-0000000008\.npy is damaged .*restore it or collect again"):
        Trajectory(folder).read("first")


@pytest.mark.parametrize("where", ["(", "{", "'", ",", "3"])
def test_damaged_header_of_a_block(folder, where):
    path = folder / "epoch_0001" / "0000000004-0000000008.npy"
    data = path.read_bytes()
    at = data.index(b"(3, 4)") if where == "(" else 10
    path.write_bytes(data[:at] + where.encode() * 4 + data[at + 4 :])
    with pytest.raises(InputError, match=r"0000000004-0000000008\.npy is damaged .*restore it or collect again"):
        Trajectory(folder).read("first")


def test_a_block_that_cannot_be_read(folder):
    path = folder / "epoch_0001" / "0000000004-0000000008.npy"
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"0000000004-0000000008\.npy is damaged .*[Dd]irectory"):
        Trajectory(folder).read("first")
    path.rmdir()
    with path.open("wb") as file:
        np.savez(file, first=np.zeros((3, 4), np.float32))  # a zip under the name of an array
    with pytest.raises(InputError, match=r"0000000004-0000000008\.npy is damaged"):
        Trajectory(folder).read("first")


@pytest.mark.parametrize("array", [
    np.zeros((3, 5), np.float32), np.zeros((2, 4), np.float32), np.zeros((4, 3), np.float32), np.zeros(12, np.float32),
    np.zeros((3, 4), np.float64), np.zeros((3, 4), np.int32)], ids=lambda array: f"{array.dtype}{array.shape}")
def test_block_of_another_shape_or_dtype(folder, array):
    np.save(folder / "epoch_0001" / "0000000004-0000000008.npy", array)
    with pytest.raises(InputError, match=r"0000000004-0000000008\.npy holds .*expected float32 \(3, 4\)"):
        Trajectory(folder).read("first")


def test_pickled_block_is_refused(folder):
    np.save(folder / "epoch_0001" / "0000000004-0000000008.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"0000000004-0000000008\.npy is damaged"):
        Trajectory(folder).read("first")


def test_labels_of_another_dtype(folder):
    np.save(folder / "labels" / "0000000004-0000000008.npy", np.zeros(4, dtype=np.int32))
    with pytest.raises(InputError, match=r"labels/0000000004-0000000008\.npy holds int32 .*expected int64 \(4,\)"):
        Trajectory(folder).labels()


def test_missing_meta(folder):
    (folder / "meta.json").unlink()
    with pytest.raises(InputError, match=r"trajectory holds no trajectory \(no meta\.json\); `tdds collect`"):
        Trajectory(folder)
    with pytest.raises(InputError, match=r"nowhere holds no trajectory"):
        Trajectory(folder / "nowhere")


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe\x00garbage", b"[]", b'"tdds-trajectory-1"', b'{"format": "tdds-trajectory-1"}',
    b'{"format": "tdds-trajectory-9"}',
    b'{"format": "tdds-trajectory-1", "scalars": ["a"], "num_samples": "10", "num_classes": 4}',
    b'{"format": "tdds-trajectory-1", "scalars": ["a"], "num_samples": 10, "num_classes": 0}',
    b'{"format": "tdds-trajectory-1", "scalars": 9, "num_samples": 10, "num_classes": 4}'],
    ids=["empty", "cut", "binary", "list", "text", "keys", "newer", "size", "classes", "scalars"])
def test_damaged_meta(folder, content):
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(InputError, match=r"meta\.json"):
        Trajectory(folder)


def test_reading_what_was_not_recorded(folder):
    trajectory = Trajectory(folder)
    with pytest.raises(InputError, match=r"no scalar 'fourth'; it has first, second, third"):
        trajectory.read("fourth")
    with pytest.raises(InputError, match=r"holds 3 epochs, 4 are needed; lower T or collect longer"):
        trajectory.read("first", 4)
