"""`tdds check`: every damaged image is found and named by its global index, and nothing ends in a
crash."""

import io
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from PIL import Image

from tdds_dist.cli.main import main
from tdds_dist.data import check as check_module
from tdds_dist.data import decode
from tdds_dist.data.beton import ALLOCATION, HEADER, BetonInfo, inspect_beton
from tdds_dist.data.check import check, jpeg_size, quick_check
from tdds_dist.data.loader import BetonLoader, View
from tdds_dist.data.manifest import manifest_path, read_manifest, write_manifest
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.errors import InputError
from tests.data.test_beton import METADATA, METADATA_START, edited, patch, zero_image
from tests.make import refused


@pytest.fixture
def copy_of(betons, tmp_path):
    """Copies a file of `betons`, with its manifest unless told otherwise, to be damaged; gives its
    info as it was."""

    def copy(name: str, with_manifest: bool = True) -> BetonInfo:
        path = tmp_path / "copy.beton"
        path.write_bytes(betons[name].read_bytes())
        if with_manifest:
            manifest_path(path).write_bytes(manifest_path(betons[name]).read_bytes())
        return inspect_beton(path)

    return copy


def quick(path: Path) -> None:
    quick_check(inspect_beton(path), read_manifest(path))


def faults(info: BetonInfo) -> dict[int, list[str]]:
    return check(info.path, progress=False).faults


def spoil(info: BetonInfo, index: Iterable[int]) -> None:
    for i in index:
        zero_image(info, i)


def flip_middle(info: BetonInfo, i: int) -> None:
    at = int(info.data_ptr_N[i]) + int(info.size_N[i]) // 2
    patch(info.path, at, ~np.fromfile(info.path, np.uint8, 3, offset=at))


def zero_region(info: BetonInfo, i: int) -> None:
    size = int(info.size_N[i])
    patch(info.path, int(info.data_ptr_N[i]) + size // 3, np.zeros(size - size // 3, np.uint8))


def truncate_stored(info: BetonInfo, i: int) -> None:
    with edited(info.path, "allocations") as table:
        table["size"][table["ptr"] == info.data_ptr_N[i]] //= 2


# ---- sound files


@pytest.mark.parametrize(("name", "with_manifest"), [("big", True), ("big", False), ("raw", True)])
def test_a_sound_file_is_said_to_be_sound(copy_of, name, with_manifest, capsys):
    info = copy_of(name, with_manifest)
    num = info.num_samples
    assert main(["check", str(info.path)]) == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert f"{num} of {num} images checked" in line
    assert "images/s" in line
    crc = (
        f"{num} with the CRC-32 of the manifest"
        if with_manifest
        else "no CRC-32 to compare with (no manifest)"
    )
    assert line.endswith(f": {num} decoded, {crc}")
    assert "error" not in printed.err
    quick(info.path)


def test_images_of_many_sizes_and_both_modes_are_sound(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (*rng.integers(1, 70, 2), 3), dtype=np.uint8) for _ in range(200)
    ]
    source = replace(open_source("synthetic:200,4,16"), reader=lambda i: images[i])
    write_beton(
        source, tmp_path / "x.beton", write_mode="proportion", num_workers=2, progress=False
    )
    for images_at_once in (512, 7):
        monkeypatch.setattr(check_module, "CHUNK_IMAGES", images_at_once)
        result = check(tmp_path / "x.beton", progress=False)
        assert (result.faults, result.num_checked, result.has_crc) == ({}, 200, True)


def test_the_kernel_is_the_one_of_training(betons, monkeypatch):
    """A signature of its own would be compiled for ten seconds at the start of every first run."""
    kernel, signatures = decode.load_batch, []

    def spy(*arguments):
        signatures.append(tuple(numba.typeof(argument) for argument in arguments))
        kernel(*arguments)

    monkeypatch.setattr(decode, "load_batch", spy)
    loader = BetonLoader(inspect_beton(betons["big"]), 61, View(16, "resized"))
    for _ in loader.batches(epoch_order(61, 61), rank=0, world_size=1, epoch=0):
        pass
    quick(betons["big"])
    assert len(signatures) == 2
    assert signatures[0] == signatures[1]


# ---- damaged images


@pytest.mark.parametrize("damage", [flip_middle, zero_region, truncate_stored])
def test_a_damaged_jpeg_is_named(copy_of, damage, capsys):
    info = copy_of("big")
    damage(info, 17)
    assert main(["check", str(info.path)]) == 2
    printed = capsys.readouterr()
    line, summary = printed.out.splitlines()
    index, reasons, path = line.split("\t")
    assert (index, path) == ("17", read_manifest(info.path).path[17])
    assert "crc" in reasons.split(",")
    assert "61 of 61 images checked" in summary
    assert "60 with the CRC-32" in summary
    (error,) = (line for line in printed.err.splitlines() if "error" in line)
    assert "1 of 61 images are damaged, at global indices [17] (1 by crc" in error
    assert "repair these images in the source" in error
    refused(r"1 of 61 images are damaged, at global indices \[17\]", quick, info.path)


@pytest.mark.parametrize("damage", [zero_region, truncate_stored])
def test_without_a_manifest_the_decoder_finds_what_cannot_be_read(copy_of, damage, capsys):
    info = copy_of("big", with_manifest=False)
    for i in (60, 3):
        damage(info, i)
    assert main(["check", str(info.path)]) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["3\tdecode\t-", "60\tdecode\t-"]
    assert "59 decoded, no CRC-32 to compare with (no manifest)" in printed[2]


def test_a_changed_raw_pixel_is_found_by_its_crc_alone(copy_of):
    info = copy_of("raw")
    patch(info.path, int(info.data_ptr_N[40]) + 1234, np.zeros(1, np.uint8))
    assert faults(info) == {40: ["crc"]}
    refused(r"1 of 97 images are damaged, at global indices \[40\] \(1 by crc\)", quick, info.path)
    write_manifest(manifest_path(info.path), replace(read_manifest(info.path), crc32_N=None))
    result = check(info.path, progress=False)
    assert result.faults == {}
    assert result.summary().endswith("no CRC-32 to compare with (older manifest)")


def test_crc_finds_every_single_changed_byte_of_a_jpeg(copy_of):
    info, rng, found_by_decoder = copy_of("big"), np.random.default_rng(0), 0
    whole = np.fromfile(info.path, np.uint8)
    for _ in range(20):
        data = whole.copy()
        at = info.data_ptr_N.astype(np.int64) + rng.integers(0, info.size_N.astype(np.int64))
        data[at] ^= rng.integers(1, 256, len(at)).astype(np.uint8)
        data.tofile(info.path)
        found = faults(info)
        assert sorted(index for index, reasons in found.items() if "crc" in reasons) == list(
            range(61)
        )
        found_by_decoder += sum(len(reasons) > 1 for reasons in found.values())
    assert 0.1 < found_by_decoder / (20 * 61) < 0.7  # so it takes the CRC


def test_images_that_changed_places_are_found(copy_of):
    info = copy_of("raw")
    with edited(info.path, "metadata") as metadata:
        metadata["f0"]["data_ptr"][[5, 50]] = metadata["f0"]["data_ptr"][[50, 5]]
    assert faults(info) == {5: ["crc"], 50: ["crc"]}


@pytest.mark.parametrize(
    ("key", "value"), [("width", 79), ("height", 40), ("width", 65535), ("height", 160), (None, 72)]
)
def test_a_jpeg_of_another_size_than_its_metadata_says_is_found(copy_of, key, value):
    info = copy_of("big", with_manifest=False)
    if key is None:  # the JPEG itself states another height
        data = np.fromfile(
            info.path, np.uint8, int(info.size_N[8]), offset=int(info.data_ptr_N[8])
        ).tobytes()
        at = data.index(b"\xff\xc0") + 5
        assert data[at : at + 4] == bytes([0, 80, 0, 80])
        patch(info.path, int(info.data_ptr_N[8]) + at + 1, np.full(1, value, np.uint8))
    else:
        with edited(info.path, "metadata") as metadata:
            metadata["f0"][key][8] = value
    assert faults(info) == {8: ["size"]}
    refused(r"\[8\] \(1 by size\)", quick, info.path)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_bad_images_are_found_and_fifty_are_listed(copy_of, monkeypatch, num_workers, capsys):
    monkeypatch.setattr(check_module, "CHUNK_IMAGES", 9)
    info, bad = copy_of("train"), [*range(0, 110, 2), 111, 113, 119]
    spoil(info, bad)
    assert check(info.path, num_workers=num_workers, progress=False).faults == {
        i: ["crc", "decode"] for i in bad
    }
    assert main(["check", str(info.path), "--num-workers", str(num_workers)]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [int(line.split("\t")[0]) for line in lines[:50]] == bad[:50]
    assert lines[50] == "... and 8 more"
    assert "62 decoded, 62 with the CRC-32" in lines[51]
    assert (
        "58 of 120 images are damaged, at global indices [0, 2, 4, 6, 8, 10, 12, 14] ..."
        in printed.err
    )


# ---- anything else that is wrong: one line and exit code 2


def other_crcs(info: BetonInfo) -> None:
    manifest = read_manifest(info.path)
    write_manifest(
        manifest_path(info.path), replace(manifest, crc32_N=manifest.crc32_N ^ np.uint32(1))
    )


def other_manifest(info: BetonInfo) -> None:
    manifest = read_manifest(info.path)
    write_manifest(
        manifest_path(info.path), replace(manifest, beton_bytes=manifest.beton_bytes + 1)
    )


def other_label(info: BetonInfo) -> None:
    with edited(info.path, "metadata") as metadata:
        metadata["f1"][3] += 1


def negative_labels(info: BetonInfo) -> None:
    manifest_path(info.path).unlink()
    with edited(info.path, "metadata") as metadata:
        metadata["f1"] = -7


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_crcs, "none of 97 images has the CRC-32"),
        (other_crcs, "manifest of another file"),
        (other_manifest, "describes 97 samples"),
        (other_label, "labels are not those of"),
        (negative_labels, "sample 0 has label -7"),
        (lambda info: info.path.unlink(), "does not exist"),
        (lambda info: os.truncate(info.path, info.num_bytes // 2), "is not a whole .beton file"),
    ],
)
def test_what_else_is_wrong_is_one_line(copy_of, damage, words, capsys):
    info = copy_of("raw")
    damage(info)
    assert main(["check", str(info.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tdds check: error: ")
    assert words in line
    refused(words, quick, info.path)


@pytest.mark.parametrize("num_workers", [0, -3])
def test_an_impossible_number_of_workers_is_refused(betons, num_workers):
    with pytest.raises(InputError, match=f"num_workers={num_workers} must be at least 1"):
        check(betons["raw"], num_workers=num_workers)


@pytest.mark.parametrize("name", ["big", "raw"])
def test_every_bit_of_a_record_that_matters_is_guarded(copy_of, name):
    """Each single changed bit in the metadata and in the allocation of one image."""
    info = copy_of(name)
    record = METADATA_START + 20 * METADATA.itemsize
    unused = range(13, 16)  # padding of the record
    table_start = int(np.fromfile(info.path, HEADER, 1)["alloc_table_ptr"][0])
    row = (
        np.fromfile(info.path, ALLOCATION, offset=table_start)["ptr"]
        .tolist()
        .index(info.data_ptr_N[20])
    )
    entry = table_start + row * ALLOCATION.itemsize + 8  # ptr and size; sample_id is not used
    for at in [record + byte for byte in range(24) if byte not in unused] + list(
        range(entry, entry + 16)
    ):
        before = np.fromfile(info.path, np.uint8, 1, offset=at)
        for bit in range(8):
            patch(info.path, at, before ^ np.uint8(1 << bit))
            with pytest.raises(InputError):
                check(info.path, progress=False).require_sound()
        patch(info.path, at, before)
    check(info.path, progress=False).require_sound()


def test_random_damage_never_ends_in_anything_but_an_input_error(copy_of):
    info, rng = copy_of("big", with_manifest=False), np.random.default_rng(0)
    content, said = info.path.read_bytes(), []
    table = len(content) - info.num_samples * ALLOCATION.itemsize
    regions = [
        (0, 24),
        (24, METADATA_START),
        (METADATA_START, METADATA_START + 61 * 24),
        (table, len(content)),
        (int(info.data_ptr_N.min()), int((info.data_ptr_N + info.size_N).max())),
    ]
    for round_number in range(150):
        first, end = regions[round_number % len(regions)]
        at = int(rng.integers(first, end))
        length = int(rng.integers(1, min(end - at, 2000) + 1))
        filler = [rng.bytes(length), bytes(length), b"\xff" * length][rng.integers(3)]
        patch(info.path, at, np.frombuffer(filler, np.uint8))
        try:
            check(info.path, progress=False).require_sound()
        except InputError as error:
            said.append(str(error))
        patch(info.path, at, np.frombuffer(content[at : at + length], np.uint8))
    assert len(said) > 100
    assert not any("\n" in text for text in said)


# ---- the quick one


def test_the_quick_check_takes_the_first_the_last_and_some_between(copy_of, monkeypatch, capsys):
    monkeypatch.setattr(check_module, "QUICK_IMAGES", 2)
    for index in (0, 119):
        info = copy_of("train")
        spoil(info, [index])
        with pytest.raises(
            InputError,
            match=rf"1 of 2 checked images are damaged, at global indices \[{index}\].*names all",
        ):
            quick(info.path)
    info = copy_of("train")
    spoil(info, range(1, 119))
    quick(info.path)
    monkeypatch.setattr(check_module, "QUICK_IMAGES", 3)
    refused(r"1 of 3 checked images .*\[59\]", quick, info.path)
    assert main(["check", str(info.path), "--quick"]) == 2
    assert capsys.readouterr().out.startswith("59\t")
    monkeypatch.setattr(check_module, "QUICK_IMAGES", 2)
    assert main(["check", str(info.path), "--quick"]) == 0
    assert "2 of 120 images checked" in capsys.readouterr().out


def test_the_quick_check_looks_at_the_file_as_it_is_now(copy_of):
    info = copy_of("raw")
    manifest = read_manifest(info.path)
    quick_check(info, manifest)
    with pytest.raises(InputError, match="none of 97"):
        quick_check(info, replace(manifest, crc32_N=manifest.crc32_N ^ np.uint32(1)))
    os.truncate(info.path, int(info.data_ptr_N.max()) + 3)
    refused(r"ends within image \d+, so it has changed", quick_check, info, manifest)


# ---- the header of a JPEG


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"comment": b"x" * 500},
        {"exif": b"Exif\0\0" + bytes(90)},
        {"quality": 1, "subsampling": 2},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_stated_size_is_that_of_pillow(options, mode):
    buffer = io.BytesIO()
    Image.new(mode, (37, 300)).save(buffer, "JPEG", **options)
    data = buffer.getvalue()
    assert jpeg_size(data) == (300, 37)
    assert jpeg_size(data[:2] + b"\xff" + data[2:]) == (300, 37)  # a fill byte
    for marker in (0xC4, 0xC8, 0xCC):  # among those of frames, but none
        assert jpeg_size(data[:2] + bytes([0xFF, marker, 0, 9]) + b"\x08\0\1\0\1xx" + data[2:]) == (
            300,
            37,
        )
    assert all(jpeg_size(data[:end]) in (None, (300, 37)) for end in range(len(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        bytes(100),
        b"\xff\xd8" + b"\xff\xe0\0\0" * 30,
        b"\xff\xd8" + b"\xff" * 100,
        b"\xff" * 100,
    ],
)
def test_what_is_no_jpeg_has_no_size(data):
    assert jpeg_size(data) is None
