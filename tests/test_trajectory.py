"""The trajectory on disk: what several ranks write reads back whole, and what is missing or damaged is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tdds_dist import ShardedScorer, Window
from tdds_dist.errors import InputError
from tdds_dist.partition import shard_bounds
from tdds_dist.trajectory import Trajectory, TrajectoryWriter, require_no_trajectory

NAMES = ("first", "second", "third")


def recorded(num_samples: int, num_epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Random scalars [T, F, N], with NaN and infinity as first epochs and accidents leave them, and labels [N]."""
    rng = np.random.default_rng(num_samples)
    scalars_TFN = rng.normal(size=(num_epochs, len(NAMES), num_samples)).astype(np.float32)
    scalars_TFN[0, 0] = np.nan
    scalars_TFN[-1, 2, 0] = np.inf
    return scalars_TFN, rng.integers(0, 4, num_samples)


def write(folder: Path, scalars_TFN: np.ndarray, label_N: np.ndarray, world_sizes: list[int]) -> Path:
    """Write epoch t as the ranks of a world of `world_sizes[t]` would; the last rank first."""
    num_samples = len(label_N)

    def writers(world_size: int, is_first: bool) -> list[tuple[int, int, TrajectoryWriter]]:
        bounds = [shard_bounds(num_samples, world_size, rank) for rank in range(world_size)]
        return [(first, end, TrajectoryWriter(folder, NAMES, num_samples, 4, first, end, is_first and rank == 0))
                for rank, (first, end) in enumerate(bounds)][::-1]

    for epoch, world_size in enumerate(world_sizes):
        for first, end, writer in writers(world_size, is_first=epoch == 0):
            if epoch == 0:
                writer.write_labels(label_N[first:end])
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
        "0000000000-0000000001.npy", "0000000001-0000000002.npy"]


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
    assert len(files) == 1 + 3 + 9
    for path in files:
        if path.suffix == ".npy":
            assert np.load(path, allow_pickle=False).dtype in (np.float32, np.int64)
    assert json.loads((folder / "meta.json").read_text())["scalars"] == list(NAMES)


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


@pytest.mark.parametrize(("first", "end"), [(2, 6), (0, 8), (4, 10), (5, 7), (9, 10)])
def test_overlapping_block(folder, first, end):
    np.save(folder / "epoch_0001" / f"{first:010d}-{end:010d}.npy", np.zeros((3, end - first), dtype=np.float32))
    with pytest.raises(InputError, match=r"epoch_0001 overlap at index \d+ "):
        Trajectory(folder).read("first")


def test_block_beyond_the_dataset(folder):
    np.save(folder / "epoch_0001" / "0000000010-0000000012.npy", np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(InputError, match=r"epoch_0001 cover 12 of 10 samples"):
        Trajectory(folder).read("first")


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
    b'{"format": "tdds-trajectory-9"}'], ids=["empty", "cut", "binary", "list", "text", "keys", "newer"])
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
