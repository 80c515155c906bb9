"""The trajectory on disk: what several ranks write reads back whole, and what is missing or damaged
is named."""

import json
import re
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed.partition import shard_bounds
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import fingerprint
from tdds_dist.scoring.trajectory import (
    Trajectory,
    TrajectoryWriter,
    require_no_trajectory,
    whole_epochs,
)
from tests.make import refused
from tests.ranks import catch

NAMES = ("first", "second", "third")


def recorded(num_samples: int, num_epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Random scalars [T, F, N], with NaN and infinity as first epochs and accidents leave them, and
    labels [N]."""
    rng = np.random.default_rng(num_samples)
    scalars_TFN = rng.normal(size=(num_epochs, len(NAMES), num_samples)).astype(np.float32)
    scalars_TFN[0, 0] = np.nan
    scalars_TFN[-1, 2, 0] = np.inf
    return scalars_TFN, rng.integers(0, 4, num_samples)


def write(
    folder: Path,
    scalars_TFN: np.ndarray,
    label_N: np.ndarray,
    world_sizes: list[int],
    dtype: str = "float32",
) -> Path:
    """Write epoch t as the ranks of a world of `world_sizes[t]` would; the last rank first."""
    num_samples = len(label_N)

    for epoch, world_size in enumerate(world_sizes):
        for rank in reversed(range(world_size)):
            first, end = shard_bounds(num_samples, world_size, rank)
            is_main = epoch == 0 and rank == 0
            writer = TrajectoryWriter(folder, NAMES, num_samples, 4, first, end, is_main, dtype)
            if epoch == 0:
                writer.write_labels(label_N[first:end], fingerprint(label_N, 4).labels_sha256)
            writer.append(epoch, scalars_TFN[epoch, :, first:end])
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """3 epochs of 10 samples, written by 3 ranks as blocks of 4, 4 and 2."""
    return write(tmp_path / "trajectory", *recorded(10, 3), [3, 3, 3])


# ---- round trips


@pytest.mark.parametrize("num_samples", [1, 2, 5, 19, 20, 21])
@pytest.mark.parametrize("world_sizes", [[1, 1, 1], [8, 8, 8], [4, 1, 3]], ids=str)
def test_blocks_of_any_world_read_back_whole(tmp_path, num_samples, world_sizes):
    scalars_TFN, label_N = recorded(num_samples, 3)
    trajectory = Trajectory(write(tmp_path, scalars_TFN, label_N, world_sizes))
    assert trajectory.scalars == NAMES
    assert (trajectory.num_samples, trajectory.num_classes) == (num_samples, 4)
    assert trajectory.num_epochs == 3
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
    found = sorted(path.name for path in (tmp_path / "epoch_0000").iterdir())
    blocks = ("0000000000-0000000001", "0000000001-0000000002")
    assert found == [f"{block}.{kind}" for block in blocks for kind in ("json", "npy")]


def test_an_epoch_written_again_replaces_the_first_try(folder):
    again = np.ones((3, 4), dtype=np.float32)
    TrajectoryWriter(folder, NAMES, 10, 4, 4, 8, is_main=False).append(1, again)
    np.testing.assert_array_equal(Trajectory(folder).read("first")[1, 4:8], again[0])


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
    writer.write_labels(np.zeros(num_samples, dtype=np.int64), "")
    writer.append(0, np.arange(9.0 * num_samples, dtype=np.float32).reshape(num_samples, 9).T)
    trajectory = Trajectory(tmp_path)
    tracemalloc.start()
    second_TN = trajectory.read("second")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(second_TN[0, :3], [1, 10, 19])
    assert peak < 2 * second_TN.nbytes
    block = tmp_path / "epoch_0000" / "0000000000-0000100000.npy"
    assert np.load(block, mmap_mode="r").flags.c_contiguous


# ---- float16


def test_float16_reads_back_rounded_and_clipped(tmp_path):
    scalars_TFN, label_N = recorded(10, 3)
    scalars_TFN[1, 1, :6] = [1e5, -1e30, 65519.0, -np.inf, 1e-9, np.nan]
    trajectory = Trajectory(write(tmp_path, scalars_TFN, label_N, [4, 1, 3], "float16"))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert trajectory.dtype == meta["dtype"] == "float16"
    for path in tmp_path.glob("epoch_*/*.npy"):
        assert np.load(path).dtype == np.float16
    second_TN = trajectory.read("second")
    assert second_TN.dtype == np.float32
    np.testing.assert_array_equal(second_TN[1, :6], [65504, -65504, 65504, -65504, 0, np.nan])
    assert np.isnan(trajectory.read("first")[0]).all()
    assert trajectory.read("third")[-1, 0] == 65504
    np.testing.assert_allclose(
        trajectory.read("first")[1:], scalars_TFN[1:, 0], rtol=2**-11, atol=2**-25
    )


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", ""])
def test_another_dtype_is_refused(folder, dtype):
    wrong = rf"dtype='{dtype}' must be one of float32, float16"
    refused(wrong, TrajectoryWriter, folder, NAMES, 10, 4, 0, 10, True, dtype)
    change_meta(folder, dtype=dtype)
    wrong = rf"meta\.json has dtype '{dtype}', this version reads float32, float16"
    refused(wrong, Trajectory, folder)


# ---- the fingerprint of the labels


def change_meta(folder: Path, **values: object) -> None:
    """Set keys of meta.json; None removes them."""
    meta = json.loads((folder / "meta.json").read_text()) | values
    meta = {key: value for key, value in meta.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_labels_are_compared_with_their_hash(tmp_path):
    scalars_TFN, label_N = recorded(10, 1)
    want = fingerprint(label_N, 4)
    write(tmp_path, scalars_TFN, label_N, [3])
    assert Trajectory(tmp_path).fingerprint() == want
    label_N[9] = (label_N[9] + 1) % 4
    TrajectoryWriter(tmp_path, NAMES, 10, 4, 8, 10, False).write_labels(label_N[8:], "")
    found = fingerprint(label_N, 4).labels_sha256[:12]
    message = (
        rf"{tmp_path} holds labels of another dataset; they hash to {found}, meta.json says"
        rf" {want.labels_sha256[:12]}; "
    )
    for read in (Trajectory(tmp_path).labels, Trajectory(tmp_path).fingerprint):
        refused(message, read)
    assert Trajectory(tmp_path).read("second").shape == (1, 10), "the scalars are as they were"


# ---- checksums

PLACE = "0000000004-0000000008"
BLOCK, LABELS = f"epoch_0001/{PLACE}.npy", f"labels/{PLACE}.npy"
HEADER = 128  # bytes before the data of a block


def flip(path: Path, position: int) -> None:
    """Change one bit of a byte, another one in the next byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def flips(path: Path) -> Iterator[int]:
    """Every position of a file (every fifth of a header), with one bit of the byte there changed
    while the caller looks."""
    whole = path.read_bytes()
    for position in range(len(whole)):
        if position < HEADER and position % 5 and path.suffix == ".npy":
            continue
        flip(path, position)
        yield position
        path.write_bytes(whole)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sidecars_hold_place_and_checksums(tmp_path, dtype):
    write(tmp_path, *recorded(10, 2), [3, 1], dtype)
    assert json.loads((tmp_path / "meta.json").read_text())["checksums"] is True
    blocks = (("0000000000-0000000004", 0, 4), (PLACE, 4, 8), ("0000000008-0000000010", 8, 10))
    places = {f"epoch_0000/{block}": (0, first, end) for block, first, end in blocks}
    places |= {f"labels/{block}": ("labels", first, end) for block, first, end in blocks}
    places |= {"epoch_0001/0000000000-0000000010": (1, 0, 10)}
    found = {str(path.relative_to(tmp_path))[:-5] for path in tmp_path.glob("*/*.json")}
    assert found == set(places)
    for name, (epoch, first, end) in places.items():
        data = (tmp_path / f"{name}.npy").read_bytes()[HEADER:]
        size = len(data) if epoch == "labels" else len(data) // 3
        rows = [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]
        want = {"epoch": epoch, "first": first, "end": end, "crc32": rows}
        assert json.loads((tmp_path / f"{name}.json").read_text()) == want


def test_a_flipped_bit_in_a_block_is_found_in_the_row_it_is_in(folder):
    want = {name: Trajectory(folder).read(name) for name in NAMES}
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
        name = NAMES[(position - HEADER) // 16]
        message = (
            rf"{BLOCK} is damaged \(CRC-32 of {name} is [0-9a-f]{{8}}, {PLACE}\.json says"
            r" [0-9a-f]{8}\); "
        )
        message += "restore it or collect again"
        refused(message, trajectory.verify)
        refused(message, trajectory.read, name)
        refused(message, trajectory.verify_epoch, 1)
        for other in set(NAMES) - {name}:
            np.testing.assert_array_equal(trajectory.read(other), want[other])
        assert whole_epochs(folder)[0] == 1
    assert position == HEADER + 3 * 16 - 1
    assert whole_epochs(folder) == (3, "")


@pytest.mark.parametrize(
    "name", [LABELS, LABELS.replace("npy", "json"), BLOCK.replace("npy", "json")]
)
def test_a_flipped_bit_in_labels_or_a_sidecar_is_found(folder, name):
    want = Trajectory(folder).labels()
    for position in flips(folder / name):
        error, text = catch(Trajectory(folder).verify)
        if error:
            assert error == "InputError"
            assert name.partition(".")[0] in text
            continue
        assert position < HEADER
        assert name == LABELS, "a blank of the header, say, that became another one"
        np.testing.assert_array_equal(Trajectory(folder).labels(), want)
    assert position == (folder / name).stat().st_size - 1


@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_between_sidecar_and_block(folder, monkeypatch, epoch):
    """While epoch 3 was recorded, or epoch 1 once more: it does not count, and a resume removes
    it."""
    bounds = ((0, 4), (4, 8), (8, 10))
    writers = [TrajectoryWriter(folder, NAMES, 10, 4, *each, False) for each in bounds]
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
    damaged = r"epoch_0001/0000000008-0000000010\.npy is damaged"
    assert re.search("epoch_0003 cover 8 of 10" if epoch == 3 else damaged, reason)
    resume(folder, epoch)
    assert whole_epochs(folder) == (epoch, "")
    np.testing.assert_array_equal(Trajectory(folder).read("second"), recorded(10, 3)[0][:epoch, 1])


# ---- damage: what it is called, how many epochs are whole all the same, and that a resume neither


def put(name: str, content: bytes | None) -> Callable[[Path], object]:
    """Replace a file by other bytes, or remove it."""
    return lambda folder: (
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    )


def array(name: str, value: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, value, allow_pickle=value.dtype == object)


def another_block(first: int, end: int) -> Callable[[Path], object]:
    """One more block of epoch 1."""
    zeros_FN = np.zeros((3, abs(end - first)), np.float32)
    return array(f"epoch_0001/{first:010d}-{end:010d}.npy", zeros_FN)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / name)


def add(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).mkdir()


def flip_in(name: str, position: int, folder: Path) -> None:
    flip(folder / name, position)


def misplaced(of: str, first: int, end: int, place: str) -> str:
    """What is said of a sidecar that belongs elsewhere than to `PLACE`."""
    return rf"\.json is of {of} \[{first}, {end}\), where {place} \[4, 8\) should be"


def cut(length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / BLOCK).write_bytes((folder / BLOCK).read_bytes()[:length])


def longer(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + bytes(length))


def header(where: bytes, by: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = (folder / BLOCK).read_bytes()
        at = data.index(where)
        (folder / BLOCK).write_bytes(data[:at] + by.encode() * 4 + data[at + 4 :])

    return change


def copied(source: str, target: str, *suffixes: str) -> Callable[[Path], object]:
    def copy(folder: Path) -> None:
        for suffix in suffixes:
            shutil.copy(folder / f"{source}{suffix}", folder / f"{target}{suffix}")

    return copy


def as_folder(folder: Path) -> None:
    (folder / BLOCK).unlink()
    (folder / BLOCK).mkdir()


def as_zip(folder: Path) -> None:
    with (folder / BLOCK).open("wb") as file:
        np.savez(file, first=np.zeros((3, 4), np.float32))


def epoch_twice(folder: Path) -> None:
    shutil.rmtree(folder / "epoch_0002")
    shutil.copytree(folder / "epoch_0001", folder / "epoch_0002")


def half_an_epoch(folder: Path) -> None:
    (folder / "epoch_0003").mkdir()
    shutil.copy(folder / "epoch_0002" / "0000000000-0000000004.npy", folder / "epoch_0003")


META = '{{"format": "tdds-trajectory-1", "scalars": {}, "num_samples": {}, "num_classes": {}}}'
SIDECAR = BLOCK.replace("npy", "json")
PLACED = b'{"epoch": 1, "first": 4, "end": 8'
LISTED = b'{"format": "tdds-quarantine-1"'
FLOATS = np.zeros((3, 4), np.float32)
IS_DAMAGED = rf"{PLACE}\.npy is damaged"
FIRST, LAST = "0000000000-0000000004", "0000000008-0000000010"
DAMAGE = [  # (how, epochs that are whole, words of the message)
    *[(cut(length), 1, IS_DAMAGED) for length in (0, 5, 60, 127, 128, 150, -1)],
    (header(b"(3, 4)", "("), 1, IS_DAMAGED),
    *[(header(b"{'descr", by), 1, IS_DAMAGED) for by in ("{", "'", ",", "3")],
    *[
        (longer(name, more), whole, rf"{name} is damaged \({size + more} bytes instead of {size}\)")
        for name, whole, size in ((BLOCK, 1, HEADER + 48), (LABELS, 0, HEADER + 32))
        for more in (1, 4, 48)
    ],
    *[
        (array(BLOCK, value), 1, rf"{PLACE}\.npy holds .*expected float32 \(3, 4\)")
        for value in (
            *(np.zeros((3, 5), np.float32), np.zeros((2, 4), np.float32), FLOATS.T, FLOATS.ravel()),
            *(FLOATS.astype(dtype) for dtype in (np.float64, np.int32, np.float16)),
        )
    ],
    (array(BLOCK, np.array([{}], dtype=object)), 1, IS_DAMAGED),
    (array(LABELS, np.zeros(4, np.int32)), 0, rf"{LABELS} holds int32 .*expected int64 \(4,\)"),
    (as_folder, 1, rf"{IS_DAMAGED} .*[Dd]irectory"),
    (as_zip, 1, IS_DAMAGED),
    # bits and copies, that sidecars find
    *[
        (partial(flip_in, name, position), whole, rf"{where}\.npy is damaged \(CRC-32 {found}")
        for name, position, whole, where, found in (
            (f"epoch_0000/{PLACE}.npy", -1, 0, "epoch_0000/.*", "of third"),
            (f"epoch_0002/{PLACE}.npy", HEADER, 2, "epoch_0002/.*", "of first"),
            (LABELS, -8, 0, LABELS[:-4], "is"),
        )
    ],
    *[
        (
            copied(source, target[:-4], *suffixes),
            whole,
            found if ".json" in suffixes else rf"{target} is damaged \(CRC-32",
        )
        for suffixes in ([".npy"], [".npy", ".json"])
        for source, target, whole, found in (
            (f"epoch_0002/{PLACE}", BLOCK, 1, misplaced("epoch 2", 4, 8, "epoch 1")),
            (f"epoch_0001/{FIRST}", BLOCK, 1, misplaced("epoch 1", 0, 4, "epoch 1")),
            (f"labels/{FIRST}", LABELS, 0, misplaced("labels", 0, 4, "labels")),
        )
    ],
    (epoch_twice, 2, rf"epoch_0002/{FIRST}\.json is of epoch 1 \[0, 4\), where epoch 2"),
    *[
        (
            put(SIDECAR, content),
            1,
            rf"{SIDECAR} is missing or damaged \(.*\), so {PLACE}\.npy cannot be trusted",
        )
        for content in (
            *(None, b"", b"[]", b"7", b'"epoch"', b"null", b"\xff\xfe", PLACED + b"}"),
            *(PLACED + b', "crc32": %s}' % crc for crc in (b"5", b"[1, 2]", b'[1, 2, "3"]')),
        )
    ],
    # blocks and epochs that do not cover the samples
    *[
        (put(f"{where}/{block}.npy", None), whole, rf"{where} {found}")
        for where, whole in (("epoch_0002", 2), ("epoch_0001", 1), ("labels", 0))
        for block, found in (
            (FIRST, "leave a gap at index 0"),
            (PLACE, rf"leave a gap at index 4 .*{LAST}"),
            (LAST, "cover 8 of 10 samples"),
        )
    ],
    (remove("labels"), 0, "labels cover 0 of 10 samples"),
    *[
        (another_block(first, end), 1, r"epoch_0001 overlap at index \d+ ")
        for first, end in ((2, 6), (0, 8), (4, 10), (5, 7), (9, 10), (4, 4), (10, 10), (10, 8))
    ],
    (another_block(10, 12), 1, "epoch_0001 cover 12 of 10 samples; rem"),
    (add("epoch_0003"), 3, "epoch_0003 cover 0 of 10 samples"),
    (half_an_epoch, 3, "epoch_0003 cover 4 of 10 samples"),
    (remove("epoch_0000"), 0, r"holds epochs \["),
    (remove("epoch_0001"), 1, r"holds epochs \["),
    (add("epoch_00001"), 1, r"holds epochs \["),
    # meta.json, quarantine.json
    *[
        (partial(change_meta, num_samples=size), 0, f"cover 10 of {size} samples")
        for size in (9, 12)
    ],
    (partial(change_meta, labels_sha256="abc"), 0, "labels of another dataset"),
    *[
        (partial(change_meta, **{key: value}), 0, r"meta\.json is damaged")
        for key in ("dtype", "labels_sha256")
        for value in (None, 5)
    ],
    *[
        (put("meta.json", content.encode("latin-1")), 0, r"meta\.json")
        for content in (
            *("", "{", "\xff\xfe\x00garbage", "[]", '"tdds-trajectory-1"'),
            *('{"format": "tdds-trajectory-1"}', '{"format": "tdds-trajectory-9"}'),
            META.format('["a"]', '"10"', 4),
            META.format('["a"]', 10, 0),
            META.format(9, 10, 4),
        )
    ],
    (put("meta.json", None), 0, r"no meta\.json"),
    *[
        (put("quarantine.json", content), 0, r"quarantine\.json is damaged \(")
        for content in (
            *(b"", b"{", b"\xff\xfe", b"[]", b"{}", LISTED + b"}"),
            b'{"format": "tdds-quarantine-2", "samples": {"1": 3}}',
            *(
                LISTED + b', "samples": %s}' % samples
                for samples in b"""[1] {"10":3} {"-1":3} {"one":3} {"1":-1} {"1":"3"} {"1":true}""".split()
            ),
        )
    ],
]


@pytest.mark.parametrize(("hurt", "num_whole", "words"), DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_named_and_a_resume_goes_back_before_it(folder, hurt, num_whole, words):
    hurt(folder)
    before = files_of(folder)
    with pytest.raises(InputError, match=words) as caught:
        _ = Trajectory(folder).labels(), Trajectory(folder).verify()
    # the way out
    assert re.search(r"restore|remove|collect|use|this version reads", str(caught.value))
    found, reason = whole_epochs(str(folder))
    assert found == num_whole
    assert re.search(words, reason)
    if num_whole < 3:
        with pytest.raises(InputError):
            resume(folder, num_whole + 1)
    assert files_of(folder) == before
    if num_whole:
        resume(folder, num_whole)
        assert whole_epochs(folder) == (num_whole, "")
        want = recorded(10, 3)[0][:num_whole, 1]
        np.testing.assert_array_equal(Trajectory(folder).read("second"), want)


def test_leftovers_of_a_killed_writer_are_ignored(folder):
    want = Trajectory(folder).read("second")
    for name, content in (
        (f"epoch_0001/.{PLACE}.npy.k3j2.tmp", b"half"),
        ("epoch_0001/notes.txt", b"kept by hand"),
        (f"epoch_0001/old_{PLACE}.npy", b"kept by hand"),
        (".meta.json.x.tmp", b"{"),
    ):
        (folder / name).write_bytes(content)
    (folder / "epoch_0007.tmp").mkdir()
    np.testing.assert_array_equal(Trajectory(folder).read("second"), want)
    assert whole_epochs(folder) == (3, "")


def test_reading_what_was_not_recorded(folder, tmp_path):
    read = Trajectory(folder).read
    refused("no scalar 'fourth'; it has first, second, third", read, "fourth")
    refused("holds 3 epochs, 4 are needed; lower T or collect longer", read, "first", 4)
    gap = r"trajectory holds epochs \[0, 1, 2\], expected 0 to 4 without a gap"
    refused(gap, Trajectory, folder, 5)
    nothing = r"nowhere holds no trajectory \(no meta\.json\); `tdds collect`"
    refused(nothing, Trajectory, tmp_path / "nowhere")
    assert Trajectory(folder, 2).num_epochs == 2


def test_where_nothing_was_recorded_no_epoch_is_whole(tmp_path):
    assert whole_epochs(tmp_path / "nowhere") == (0, "")
    assert whole_epochs(tmp_path) == (0, "")
    (tmp_path / ".meta.json.x.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("by hand")
    assert whole_epochs(tmp_path) == (0, "")
    writer = TrajectoryWriter(tmp_path, NAMES, 10, 4, 0, 10, True)
    label_N = np.zeros(10, dtype=np.int64)
    writer.write_labels(label_N, fingerprint(label_N, 4).labels_sha256)
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
        "format": "tdds-quarantine-1",
        "samples": {"2": 3, "9": 0},
    }
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


@pytest.mark.parametrize(
    ("next_epoch", "left"), [(0, None), (1, {4: 0}), (2, {2: 1, 4: 0}), (3, {2: 1, 4: 0, 7: 2})]
)
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
    refused("already holds a trajectory", require_no_trajectory, tmp_path)
    assert whole_epochs(tmp_path)[0] == 0
    resume(tmp_path, 0)
    require_no_trajectory(tmp_path)


# ---- going on where a run ended


def resume(folder: Path, next_epoch: int, **changes: object) -> None:
    """Go on with the run of the fixture `folder`, or one that differs in `changes`."""
    run = {"scalars": NAMES, "num_samples": 10, "num_classes": 4, "dtype": "float32"} | changes
    labels_sha256 = run.pop("labels_sha256", fingerprint(recorded(10, 3)[1], 4).labels_sha256)
    TrajectoryWriter(folder, first=0, end=10, is_main=True, **run).resume(next_epoch, labels_sha256)


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("next_epoch", "has_hash"), [(1, True), (2, False), (3, True)])
def test_resume_keeps_what_was_finished_and_removes_the_rest(folder, next_epoch, has_hash):
    label_N = recorded(10, 3)[1]
    labels_sha256 = fingerprint(label_N, 4).labels_sha256 if has_hash else None
    if has_hash:
        change_meta(folder, labels_sha256=labels_sha256)
    before = files_of(folder)
    (folder / "epoch_0003").mkdir()
    (folder / "epoch_0003" / ".0000000000-0000000004.npy.x.tmp").write_bytes(b"half")
    (folder / "epoch_0005").mkdir()
    for leftover in (
        "epoch_0000/.0000000004-0000000008.npy.k3_j2abc.tmp",
        "epoch_0000/.0000000000-0000000004.json.x.tmp",
        "labels/.0000000008-0000000010.npy.x.tmp",
        ".meta.json.x.tmp",
        ".quarantine.json.x.tmp",
    ):
        (folder / leftover).write_bytes(b"half")
    (folder / "epoch_0000" / "notes.tmp").write_bytes(b"kept by hand")
    before["epoch_0000/notes.tmp"] = b"kept by hand"
    resume(folder, next_epoch, labels_sha256=labels_sha256)
    lost = {f"epoch_{epoch:04d}" for epoch in range(next_epoch, 3)}
    kept = {name: data for name, data in before.items() if name.split("/")[0] not in lost}
    assert files_of(folder) == kept
    assert not list(folder.glob("epoch_0005"))
    for rank in (0, 1):  # another world size
        first, end = shard_bounds(10, 2, rank)
        values_FN = np.full((3, end - first), 7 + rank, np.float32)
        writer = TrajectoryWriter(folder, NAMES, 10, 4, first, end, rank == 0)
        writer.append(next_epoch, values_FN)
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
    labels = Trajectory(write(folder, scalars_TFN, label_N, [2])).labels()
    np.testing.assert_array_equal(labels, label_N)


OTHER_SCALARS = r"scalars \('first', 'second', 'third'\) instead of \('first', 'second'\)"
OTHER_LABELS = r"labels of another dataset; .* to 0123456789ab; resume with the \.beton"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scalars": NAMES[:2]}, OTHER_SCALARS),
        ({"num_samples": 11}, "num_samples 10 instead of 11"),
        ({"num_classes": 5}, "num_classes 4 instead of 5"),
        ({"dtype": "float16"}, "dtype 'float32' instead of 'float16'"),
        ({"labels_sha256": "0123456789abcdef"}, OTHER_LABELS),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_of_another_run_is_refused_and_removes_nothing(folder, changes, message):
    before = files_of(folder)
    for next_epoch in (2,) if "labels_sha256" in changes else (0, 2):
        refused(rf"{folder} holds .*{message}", resume, folder, next_epoch, **changes)
    assert files_of(folder) == before


# ---- refusing to mix two trajectories


def test_an_existing_trajectory_is_not_written_into(folder):
    words = "trajectory already holds a trajectory; choose another"
    refused(words, require_no_trajectory, folder)
    (folder / "meta.json").unlink()
    refused(words, require_no_trajectory, folder)
    windows = [Window(3, 2)]
    refused(words, ShardedScorer, 10, 4, windows, device="cpu", trajectory=folder)
    assert not (folder / "meta.json").exists()
    for epoch in range(3):
        shutil.rmtree(folder / f"epoch_{epoch:04d}")
    refused(words, require_no_trajectory, folder)
    shutil.rmtree(folder / "labels")
    require_no_trajectory(folder)
