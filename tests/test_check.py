"""`tdds check`: every damaged image is found and named by its global index, and nothing ends in a crash."""

import io
import json
import time
from dataclasses import replace

import numba
import numpy as np
import pytest
from PIL import Image
from test_beton import METADATA, METADATA_START, patch, write_imagenet_sized

from tdds_dist import check as check_module
from tdds_dist import imaging
from tdds_dist.beton import ALLOCATION, HEADER, RAW, BetonInfo, inspect_beton, manifest_path, read_manifest, write_manifest
from tdds_dist.beton_writer import write_beton
from tdds_dist.check import check, jpeg_size, quick_check
from tdds_dist.cli import main
from tdds_dist.errors import InputError
from tdds_dist.loader import BetonLoader, View
from tdds_dist.partition import epoch_order
from tdds_dist.sources import open_source


@pytest.fixture
def copy_of(betons, tmp_path):
    """Copies a file of `betons`, with its manifest unless told otherwise, to be damaged; gives its info as it was."""

    def copy(name: str, with_manifest: bool = True) -> BetonInfo:
        path = tmp_path / "copy.beton"
        path.write_bytes(betons[name].read_bytes())
        if with_manifest:
            manifest_path(path).write_bytes(manifest_path(betons[name]).read_bytes())
        return inspect_beton(path)

    return copy


def stored(info: BetonInfo, i: int) -> np.ndarray:
    """The stored bytes of an image, to be changed and patched back."""
    return np.fromfile(info.path, np.uint8, int(info.size_N[i]), offset=int(info.data_ptr_N[i]))


def spoil(info: BetonInfo, index) -> None:
    """Zero the stored bytes of these images."""
    for i in index:
        patch(info.path, int(info.data_ptr_N[i]), np.zeros(int(info.size_N[i]), np.uint8))


def table_of(info: BetonInfo) -> tuple[int, np.ndarray, list[int]]:
    """Where the allocation table lies, the table, and its row of each image."""
    start = int(np.fromfile(info.path, HEADER, 1)["alloc_table_ptr"][0])
    table = np.fromfile(info.path, ALLOCATION, offset=start)
    row = {ptr: row for row, ptr in enumerate(table["ptr"].tolist())}
    return start, table, [row[ptr] for ptr in info.data_ptr_N.tolist()]


def flip_middle(info: BetonInfo, i: int) -> None:
    data = stored(info, i)
    data[len(data) // 2 : len(data) // 2 + 3] ^= 0xFF
    patch(info.path, int(info.data_ptr_N[i]), data)


def zero_region(info: BetonInfo, i: int) -> None:
    data = stored(info, i)
    data[len(data) // 3 :] = 0
    patch(info.path, int(info.data_ptr_N[i]), data)


def truncate_stored(info: BetonInfo, i: int) -> None:
    start, table, row = table_of(info)
    table["size"][row[i]] //= 2
    patch(info.path, start, table)


# ---- sound files


@pytest.mark.parametrize("name", ["train", "val", "raw", "big"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_sound_file_is_said_to_be_sound(copy_of, name, with_manifest, capsys):
    info = copy_of(name, with_manifest)
    num = info.num_samples
    assert main(["check", str(info.path)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert f"{num} of {num} images checked" in printed.out
    assert f"{num} decoded, " in printed.out
    assert "images/s" in printed.out
    crc = f"{num} with the CRC-32 of the manifest" if with_manifest else "no CRC-32 to compare with (no manifest)"
    assert printed.out.rstrip().endswith(crc)
    assert "error" not in printed.err
    quick_check(info.path)


def test_images_of_many_sizes_and_both_modes_are_sound(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*rng.integers(1, 70, 2), 3), dtype=np.uint8) for _ in range(200)]
    source = replace(open_source("synthetic:200,4,16"), reader=lambda i: images[i])
    write_beton(source, tmp_path / "x.beton", write_mode="proportion", num_workers=2, progress=False)
    for images_at_once in (512, 7):
        monkeypatch.setattr(check_module, "CHUNK_IMAGES", images_at_once)
        result = check(tmp_path / "x.beton", progress=False)
        assert (result.faults, result.num_checked, result.has_crc) == ({}, 200, True)


def test_a_file_of_ffcvs_own_writer_is_checked(tmp_path):
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Foreign:
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return 0.5, np.full((16 + i, 20, 3), 10 * i, dtype=np.uint8), i % 3

    path = tmp_path / "foreign.beton"
    fields = {"weight": FloatField(), "picture": RGBImageField(write_mode="jpg"), "target": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Foreign())
    info = inspect_beton(path)
    assert check(path, progress=False).faults == {}
    spoil(info, [19])
    assert check(path, progress=False).faults == {19: ["decode"]}


def test_the_kernel_is_the_one_of_training(betons, monkeypatch):
    """A signature of its own would be compiled for ten seconds at the start of every first run."""
    kernel, signatures = imaging.load_batch, []

    def spy(*arguments):
        signatures.append(tuple(numba.typeof(argument) for argument in arguments))
        kernel(*arguments)

    monkeypatch.setattr(imaging, "load_batch", spy)
    for _ in BetonLoader(betons["big"], 61, View(16, "resized")).batches(epoch_order(61, 61), rank=0, world_size=1, epoch=0):
        pass
    quick_check(betons["big"])
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
    errors = [line for line in printed.err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "1 of 61 images are damaged, at global indices [17] (1 by crc" in errors[0]
    assert "repair these images in the source" in errors[0]
    with pytest.raises(InputError, match=r"1 of 61 images are damaged, at global indices \[17\]"):
        quick_check(info.path)


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
    data = stored(info, 40)
    data[1234] ^= 1
    patch(info.path, int(info.data_ptr_N[40]), data)
    assert check(info.path, progress=False).faults == {40: ["crc"]}
    with pytest.raises(InputError, match=r"1 of 97 images are damaged, at global indices \[40\] \(1 by crc\)"):
        quick_check(info.path)
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
        faults = check(info.path, progress=False).faults
        assert sorted(index for index, reasons in faults.items() if "crc" in reasons) == list(range(61))
        found_by_decoder += sum(len(reasons) > 1 for reasons in faults.values())
    assert 0.1 < found_by_decoder / (20 * 61) < 0.7  # so it takes the CRC


def test_images_that_changed_places_are_found(copy_of):
    info = copy_of("raw")
    metadata = np.fromfile(info.path, METADATA, info.num_samples, offset=METADATA_START)
    metadata["f0"]["data_ptr"][[5, 50]] = metadata["f0"]["data_ptr"][[50, 5]]
    patch(info.path, METADATA_START, metadata)
    assert check(info.path, progress=False).faults == {5: ["crc"], 50: ["crc"]}


@pytest.mark.parametrize(("key", "value"), [("width", 79), ("height", 40), ("width", 65535), ("height", 160)])
def test_metadata_that_gives_a_jpeg_another_size_is_found(copy_of, key, value):
    info = copy_of("big", with_manifest=False)
    metadata = np.fromfile(info.path, METADATA, info.num_samples, offset=METADATA_START)
    metadata["f0"][key][8] = value
    patch(info.path, METADATA_START, metadata)
    assert check(info.path, progress=False).faults == {8: ["size"]}
    with pytest.raises(InputError, match=r"\[8\] \(1 by size\)"):
        quick_check(info.path)


def test_a_jpeg_that_states_another_size_is_found(copy_of):
    info = copy_of("big", with_manifest=False)
    data = stored(info, 30)
    at = bytes(data).index(bytes([0xFF, 0xC0])) + 5
    assert data[at : at + 4].tolist() == [0, 80, 0, 80]
    data[at + 1] = 72
    patch(info.path, int(info.data_ptr_N[30]), data)
    assert check(info.path, progress=False).faults == {30: ["size"]}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_bad_images_are_found_and_fifty_are_listed(copy_of, monkeypatch, num_workers, capsys):
    monkeypatch.setattr(check_module, "CHUNK_IMAGES", 9)
    info = copy_of("train")
    bad = [*range(0, 110, 2), 111, 113, 119]
    spoil(info, bad)
    result = check(info.path, num_workers=num_workers, progress=False)
    assert result.faults == {i: ["crc", "decode"] for i in bad}
    assert main(["check", str(info.path), "--num-workers", str(num_workers)]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [int(line.split("\t")[0]) for line in lines[:50]] == bad[:50]
    assert lines[50] == "... and 8 more"
    assert "62 decoded, 62 with the CRC-32" in lines[51]
    assert "58 of 120 images are damaged, at global indices [0, 2, 4, 6, 8, 10, 12, 14] ..." in printed.err


# ---- manifests and labels


def test_the_manifest_of_another_file_is_told_from_damage(tmp_path, capsys):
    source, path = open_source("synthetic:60,4,16"), tmp_path / "x.beton"
    write_beton(replace(source, reader=lambda i: 255 - source.read(i)), path, write_mode="raw", num_workers=1, progress=False)
    theirs = manifest_path(path).read_bytes()
    write_beton(source, path, write_mode="raw", num_workers=1, progress=False, overwrite=True)
    manifest_path(path).write_bytes(theirs)
    assert main(["check", str(path)]) == 2
    assert "none of 60 images has the CRC-32" in (error := capsys.readouterr().err)
    assert "manifest of another file" in error
    with pytest.raises(InputError, match="manifest of another file"):
        quick_check(path)


def test_a_manifest_that_contradicts_the_file_is_refused(copy_of, betons, capsys):
    info = copy_of("train")
    manifest_path(info.path).write_bytes(manifest_path(betons["big"]).read_bytes())
    assert main(["check", str(info.path)]) == 2
    assert "describes 61 samples" in capsys.readouterr().err
    manifest_path(info.path).write_text("{}")
    assert main(["check", str(info.path)]) == 2
    assert "is not a whole manifest" in capsys.readouterr().err


@pytest.mark.parametrize("label", [3, -1, 1 << 40])
def test_changed_labels_are_refused(copy_of, label):
    info = copy_of("train")
    metadata = np.fromfile(info.path, METADATA, info.num_samples, offset=METADATA_START)
    metadata["f1"][int(np.flatnonzero(info.label_N != 3)[0])] = label
    patch(info.path, METADATA_START, metadata)
    for function in (check, quick_check):
        with pytest.raises(InputError, match="labels are not those of"):
            function(info.path)


def test_negative_labels_are_refused_without_a_manifest(copy_of):
    info = copy_of("train", with_manifest=False)
    metadata = np.fromfile(info.path, METADATA, info.num_samples, offset=METADATA_START)
    metadata["f1"] = -7
    patch(info.path, METADATA_START, metadata)
    with pytest.raises(InputError, match="sample 0 has label -7"):
        check(info.path, progress=False)


# ---- damaged structure: one line and exit code 2, whatever it is


def cut(keep: float):
    def damage(content: bytearray, info: BetonInfo) -> bytes:
        return bytes(content[: int(keep * len(content))])
    return damage


def half_a_table(content: bytearray, info: BetonInfo) -> bytes:
    start = len(content) - info.num_samples * ALLOCATION.itemsize
    return bytes(content[: start + info.num_samples // 2 * ALLOCATION.itemsize])


def zeroed_table(content: bytearray, info: BetonInfo) -> bytes:
    half = info.num_samples // 2 * ALLOCATION.itemsize
    return bytes(content[:-half]) + bytes(half)


def garbage_header(content: bytearray, info: BetonInfo) -> bytes:
    return content[:2] + np.random.default_rng(0).bytes(HEADER.itemsize - 2) + content[HEADER.itemsize :]


def garbage(content: bytearray, info: BetonInfo) -> bytes:
    return np.random.default_rng(0).bytes(len(content))


def zeroed_metadata(content: bytearray, info: BetonInfo) -> bytes:
    content[METADATA_START + 240 : METADATA_START + 480] = bytes(240)
    return bytes(content)


@pytest.mark.parametrize("damage", [cut(0), cut(0.0001), cut(0.01), cut(0.5), cut(0.9999), half_a_table, zeroed_table,
                                    garbage_header, garbage, zeroed_metadata])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_damaged_structure_is_one_line(copy_of, damage, with_manifest, capsys):
    info = copy_of("big", with_manifest)
    info.path.write_bytes(damage(bytearray(info.path.read_bytes()), info))
    assert main(["check", str(info.path)]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("tdds check: error: ")
    assert "is not a whole .beton file" in printed.err
    with pytest.raises(InputError):
        quick_check(info.path)


@pytest.mark.parametrize("name", ["big", "raw"])
def test_every_bit_of_a_record_that_matters_is_guarded(copy_of, name):
    """Each single changed bit in the metadata and in the allocation of one image."""
    info = copy_of(name)
    start, _, row = table_of(info)
    content = info.path.read_bytes()
    record = METADATA_START + 20 * METADATA.itemsize
    unused = range(13, 16)  # padding of the record
    entry = start + row[20] * ALLOCATION.itemsize + 8  # ptr and size; sample_id is not used
    for at in [record + byte for byte in range(24) if byte not in unused] + list(range(entry, entry + 16)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            info.path.write_bytes(damaged)
            with pytest.raises(InputError):
                check(info.path, progress=False).require_sound()


def test_random_damage_never_ends_in_anything_but_an_input_error(copy_of):
    info, rng = copy_of("big", with_manifest=False), np.random.default_rng(0)
    content, said = info.path.read_bytes(), []
    table = len(content) - info.num_samples * ALLOCATION.itemsize
    regions = [(0, 24), (24, METADATA_START), (METADATA_START, METADATA_START + 61 * 24), (table, len(content)),
               (int(info.data_ptr_N.min()), int((info.data_ptr_N + info.size_N).max()))]
    for round_number in range(300):
        first, end = regions[round_number % len(regions)]
        at = int(rng.integers(first, end))
        length = int(rng.integers(1, min(end - at, 2000) + 1))
        filler = [rng.bytes(length), bytes(length), b"\xff" * length][rng.integers(3)]
        info.path.write_bytes(content[:at] + filler + content[at + length :])
        try:
            check(info.path, progress=False).require_sound()
        except InputError as error:
            said.append(str(error))
    assert len(said) > 200
    assert not any("\n" in text for text in said)


def test_a_file_that_shrinks_meanwhile_is_an_input_error(copy_of):
    """Under a memory map this ends the process with SIGBUS."""
    info = copy_of("big", with_manifest=False)
    with info.path.open("r+b") as file:
        file.truncate(int(info.data_ptr_N.max()) + 3)
    with pytest.raises(InputError, match=r"ends within image \d+, so it has changed"):
        quick_check(info.path, info)


@pytest.mark.parametrize("num_workers", ["0", "-3"])
def test_an_impossible_number_of_workers_is_refused(betons, num_workers, capsys):
    assert main(["check", str(betons["raw"]), "--num-workers", num_workers]) == 2
    assert f"num_workers={num_workers} must be at least 1" in capsys.readouterr().err


def test_a_missing_file_is_said_to_be_missing(tmp_path, capsys):
    assert main(["check", str(tmp_path / "none.beton")]) == 2
    assert "does not exist" in capsys.readouterr().err


# ---- the quick one


def test_the_quick_check_takes_the_first_the_last_and_some_between(copy_of, monkeypatch):
    info = copy_of("train")
    for index in (0, 119):
        copy_of("train")
        spoil(info, [index])
        with pytest.raises(InputError, match=rf"1 of 2 checked images are damaged, at global indices \[{index}\].*names all"):
            quick_check(info.path, num=1)
    copy_of("train")
    spoil(info, range(1, 119))
    quick_check(info.path, num=2)
    with pytest.raises(InputError, match=r"1 of 3 checked images .*\[59\]"):
        quick_check(info.path, num=3)
    monkeypatch.setattr(check_module, "QUICK_IMAGES", 3)
    result = check(info.path, quick=True, progress=False)
    assert (result.num_checked, list(result.faults)) == (3, [59])
    assert len(check(info.path, progress=False).faults) == 118


def test_the_quick_option_of_the_command(copy_of, monkeypatch, capsys):
    monkeypatch.setattr(check_module, "QUICK_IMAGES", 5)
    info = copy_of("train")
    spoil(info, [1])
    assert main(["check", str(info.path), "--quick"]) == 0
    assert "5 of 120 images checked" in capsys.readouterr().out


def test_what_the_caller_has_read_is_not_read_again(betons, monkeypatch):
    info, manifest = inspect_beton(betons["raw"]), read_manifest(betons["raw"])

    def fail(path):
        raise AssertionError("read again")

    monkeypatch.setattr(check_module, "inspect_beton", fail)
    monkeypatch.setattr(check_module, "read_manifest", fail)
    quick_check(betons["raw"], info, manifest)
    wrong = replace(manifest, crc32_N=manifest.crc32_N ^ np.uint32(1))
    with pytest.raises(InputError, match="none of 97"):
        quick_check(betons["raw"], info, wrong)


def test_the_quick_check_is_quick_at_imagenet_size(tmp_path):
    path = tmp_path / "imagenet.beton"
    write_imagenet_sized(path)
    info = inspect_beton(path)
    assert set(info.mode_N.tolist()) == {RAW}
    quick_check(path, info)  # the kernel is loaded
    before = time.perf_counter()
    quick_check(path, info)
    assert time.perf_counter() - before < 2  # measured: 0.05 s


# ---- the header of a JPEG


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 500}, {"exif": b"Exif\0\0" + bytes(90)},
                                     {"quality": 1, "subsampling": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_stated_size_is_that_of_pillow(options, mode):
    buffer = io.BytesIO()
    Image.new(mode, (37, 300)).save(buffer, "JPEG", **options)
    data = buffer.getvalue()
    assert jpeg_size(data) == (300, 37)
    assert jpeg_size(data[:2] + b"\xff" + data[2:]) == (300, 37)  # a fill byte
    for marker in (0xC4, 0xC8, 0xCC):  # among those of frames, but none
        assert jpeg_size(data[:2] + bytes([0xFF, marker, 0, 9]) + b"\x08\0\1\0\1xx" + data[2:]) == (300, 37)
    assert all(jpeg_size(data[:end]) in (None, (300, 37)) for end in range(len(data)))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(50), bytes(100),
                                  b"\xff\xd8" + b"\xff\xe0\0\0" * 30, b"\xff\xd8" + b"\xff" * 100, b"\xff" * 100])
def test_what_is_no_jpeg_has_no_size(data):
    assert jpeg_size(data) is None


def test_the_manifest_names_the_column_crc32(betons):
    columns = json.loads(manifest_path(betons["raw"]).read_text())["columns"]
    assert len(columns["crc32"]) == 97
