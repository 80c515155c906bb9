"""`.beton` files: round trips, what the inspector refuses, and that nothing half-written is left."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdds_dist import beton
from tdds_dist.artifacts import fingerprint
from tdds_dist.beton import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    IMAGE,
    JPG,
    RAW,
    check_labels,
    check_paths,
    content_sha256,
    crc32_of_images,
    dataset_fingerprint,
    evenly_spaced,
    inspect_beton,
    manifest_path,
    read_images,
    read_manifest,
    stored_bytes,
    write_manifest,
)
from tdds_dist.beton_writer import write_beton
from tdds_dist.errors import InputError
from tdds_dist.sources import Source, open_source, with_corruption, with_label_noise

METADATA = np.dtype([("", IMAGE), ("", "<i8")], align=True)
METADATA_START = HEADER.itemsize + 2 * DESCRIPTOR.itemsize


def write(source: Source, out: Path, **settings: object) -> beton.Manifest:
    return write_beton(source, out, progress=False, num_workers=2, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """150 digits written as jpg; never changed by a test."""
    out = tmp_path_factory.mktemp("digits") / "train.beton"
    write(open_source("digits", subset=150), out)
    return out


@pytest.fixture
def copy(digits, tmp_path) -> Path:
    """A copy of `digits`, without its manifest, to be damaged."""
    path = tmp_path / "copy.beton"
    path.write_bytes(digits.read_bytes())
    return path


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- round trips ---


@pytest.mark.parametrize("spec", ["digits", "synthetic:100,7,40", "imagefolder"])
@pytest.mark.parametrize("write_mode", ["jpg", "raw", "proportion"])
def test_round_trip(tmp_path, spec, write_mode):
    if spec == "imagefolder":
        rng = np.random.default_rng(0)
        for i in range(40):
            path = tmp_path / "images" / f"class {i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            smooth.resize((20 + i, 60 - i), Image.Resampling.BICUBIC).save(path)
        spec = f"imagefolder:{tmp_path / 'images'}"
    source = open_source(spec, subset=40)
    manifest = write(source, tmp_path / "new/x.beton", write_mode=write_mode)
    assert left_behind(tmp_path / "new") == ["x.beton", "x.manifest.json"]
    info = inspect_beton(tmp_path / "new/x.beton")
    assert set(info.mode_N) == {"jpg": {JPG}, "raw": {RAW}, "proportion": {JPG, RAW}}[write_mode]
    np.testing.assert_array_equal(info.label_N, source.label_N)
    assert info.label_N.dtype == np.int64
    assert (manifest.path, manifest.class_names) == (source.path, source.class_names)
    assert manifest.settings == {"write_mode": write_mode, "quality": 90, "max_resolution": None, "subset": 40}
    images = read_images(info.path, range(len(source)))
    for i, image in enumerate(images):
        expected = source.read(i)
        assert (image.shape, image.dtype) == (expected.shape, np.uint8)
        assert image.shape[:2] == (info.height_N[i], info.width_N[i])
        error = np.abs(image.astype(int) - expected)
        assert error.mean() < (12 if info.mode_N[i] == JPG else 1e-9)
    assert manifest.image_size == (max(image.shape[0] for image in images), max(image.shape[1] for image in images))


def test_ffcvs_own_reader_agrees(digits):
    from ffcv.reader import Reader

    reader, info = Reader(str(digits)), inspect_beton(digits)
    assert reader.metadata_type == METADATA
    assert (reader.num_samples, reader.field_names) == (info.num_samples, info.field_names)
    image_N = reader.metadata["f0"]
    for ours, theirs in ((info.label_N, reader.metadata["f1"]), (info.width_N, image_N["width"]),
                         (info.height_N, image_N["height"]), (info.mode_N, image_N["mode"]),
                         (info.data_ptr_N, image_N["data_ptr"])):
        np.testing.assert_array_equal(ours, theirs)
    size = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    assert info.size_N.tolist() == [size[ptr] for ptr in info.data_ptr_N.tolist()]
    assert (reader.alloc_table["sample_id"][np.argsort(reader.alloc_table["sample_id"])] == np.arange(150)).all()


@pytest.mark.timeout(60)
def test_ffcvs_own_writer_and_all_its_fields_are_understood(tmp_path):
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Samples:
        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: np.int64) -> tuple[object, ...]:
            i = int(index)
            return (0.5, {"a": i}, np.full((4 + i, 5, 3), i, np.uint8), np.zeros(3, np.float32), i, 7 * i,
                    np.arange(i % 3, dtype=np.uint8))

    fields = {"weight": FloatField(), "note": JSONField(), "picture": RGBImageField("raw"),
              "box": NDArrayField(np.dtype("float32"), (3,)), "label": IntField(), "row": IntField(),
              "blob": BytesField()}
    DatasetWriter(str(tmp_path / "x.beton"), fields, num_workers=1).from_indexed_dataset(Samples(), chunksize=10)
    info = inspect_beton(tmp_path / "x.beton")
    assert (info.image_field, info.label_field, info.field_names) == ("picture", "label", list(fields))
    assert info.label_N.tolist() == list(range(30))
    np.testing.assert_array_equal(read_images(info.path, [21], info)[0], np.full((25, 5, 3), 21, np.uint8))
    assert read_manifest(info.path) is None


def test_large_images_are_scaled_and_fit_their_page(tmp_path):
    image = np.full((2000, 1500, 3), (250, 120, 3), np.uint8)  # 9 MB as raw pixels, more than FFCV's default page
    source = replace(open_source("synthetic:2,1,8"), reader=lambda i: image)
    assert write(source, tmp_path / "raw.beton", write_mode="raw").image_size == (2000, 1500)
    np.testing.assert_array_equal(read_images(tmp_path / "raw.beton", [1])[0], image)
    assert write(source, tmp_path / "small.beton", max_resolution=100).image_size == (100, 75)
    assert np.abs(read_images(tmp_path / "small.beton", [0])[0].astype(int) - (250, 120, 3)).max() < 6


def test_the_number_of_workers_changes_no_image(tmp_path):
    source = open_source("synthetic:130,2,16")
    write_beton(source, tmp_path / "1.beton", num_workers=1, write_mode="proportion", progress=False)
    write_beton(source, tmp_path / "3.beton", num_workers=3, write_mode="proportion", progress=False)
    for one, three in zip(*(read_images(tmp_path / name, range(130)) for name in ("1.beton", "3.beton")), strict=True):
        np.testing.assert_array_equal(one, three)
    one, three = (read_manifest(tmp_path / name) for name in ("1.beton", "3.beton"))
    np.testing.assert_array_equal(one.crc32_N, three.crc32_N)


def test_writing_again_gives_the_same_files(tmp_path):
    source = open_source("synthetic:70,2,16")
    for name in ("a", "b"):
        write_beton(source, tmp_path / f"{name}.beton", num_workers=1, progress=False)
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert (tmp_path / "a.manifest.json").read_bytes() == (tmp_path / "b.manifest.json").read_bytes()


def test_progress_is_plain_lines_away_from_a_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TDDS_PROGRESS_SECONDS", "0")
    write_beton(open_source("synthetic:100,2,16"), tmp_path / "x.beton")
    shown = capfd.readouterr().err
    assert "write: 100 %, 100 of 100 images" in shown
    assert "checksums: 100 %, 100 of 100 images" in shown
    assert "\r" not in shown


def test_importing_beton_does_not_import_ffcv():
    code = "import sys, tdds_dist.beton; print({'ffcv', 'numba', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- writing that fails ---


@pytest.mark.timeout(60)
def test_bad_images_are_named_and_nothing_is_left(tmp_path):
    for i in range(70):
        path = tmp_path / "images" / "cat" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "images/cat/07.png").write_bytes(b"this is no image")
    good = (tmp_path / "images/cat/40.png").read_bytes()
    (tmp_path / "images/cat/40.png").write_bytes(good[:40])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"2 images .*'cat/07.png': Unidentified.*'cat/40.png'.*repair or remove"):
        write(open_source(f"imagefolder:{tmp_path / 'images'}"), tmp_path / "out/x.beton")
    assert left_behind(tmp_path / "out") == []


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
                                   np.zeros((1, 70000, 3), np.uint8)])
def test_what_ffcv_cannot_encode_is_named_too(tmp_path, image):
    source = open_source("synthetic:40,2,16")
    odd = replace(source, reader=lambda i: image if i == 39 else source.read(i))
    with pytest.raises(InputError, match=r"1 images .*synthetic/train/0000039"):
        write(odd, tmp_path / "x.beton", write_mode="raw")
    assert left_behind(tmp_path) == []


@pytest.mark.timeout(60)
def test_a_folder_full_of_bad_images_stops_early(tmp_path):
    source = replace(open_source("synthetic:100000,2,16"), reader=lambda i: 1 // 0)
    with pytest.raises(InputError, match=r"1\d\d\+ images .*ZeroDivisionError"):
        write(source, tmp_path / "x.beton")
    assert left_behind(tmp_path) == []


@pytest.mark.timeout(60)
def test_a_killed_worker_ends_the_writing(tmp_path):
    source = open_source("synthetic:400,2,16")
    parent = os.getpid()

    def read(index: int) -> np.ndarray:
        if index == 100 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return source.read(index)

    with pytest.raises(InputError, match="killed by SIGKILL"):
        write(replace(source, reader=read), tmp_path / "x.beton")
    assert left_behind(tmp_path) == []


@pytest.mark.timeout(60)
def test_a_killed_parent_takes_its_workers_along(tmp_path):
    started = tmp_path / "started"
    code = f"""
import os, signal, time
from dataclasses import replace
from pathlib import Path
from tdds_dist.beton_writer import write_beton
from tdds_dist.sources import open_source
source, parent = open_source("synthetic:100,2,16"), os.getpid()
def read(i):
    if os.getpid() != parent:
        Path({str(started)!r}).write_text(str(os.getpid()))
        os.kill(parent, signal.SIGKILL)
        time.sleep(600)
    return source.read(i)
write_beton(replace(source, reader=read), Path({str(tmp_path)!r}) / "x.beton", num_workers=1, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == -signal.SIGKILL
    worker = Path("/proc") / started.read_text() / "stat"
    for _ in range(100):
        if not worker.exists() or worker.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the worker outlived its parent")
    assert not (tmp_path / "x.beton").exists()


@pytest.mark.timeout(60)
def test_a_full_disk_ends_the_writing(tmp_path):
    source = open_source("synthetic:400,2,64")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, limits[1]))  # a write beyond it fails like one on a full disk
    try:
        with pytest.raises(InputError, match=r"cannot write .*File too large.*free space"):
            write(source, tmp_path / "x.beton", write_mode="raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_behind(tmp_path) == []


def test_an_existing_file_is_overwritten_only_on_request(tmp_path):
    out = tmp_path / "x.beton"
    write(open_source("synthetic:40,2,16"), out)
    before = out.read_bytes()
    with pytest.raises(InputError, match="exists; remove it"):
        write(open_source("synthetic:50,2,16"), out)
    assert out.read_bytes() == before
    write(open_source("synthetic:50,2,16"), out, overwrite=True)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.num_samples == inspect_beton(out).num_samples == 50
    assert left_behind(tmp_path) == ["x.beton", "x.manifest.json"]


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("x.ffcv", {}, "must end in .beton"), ("x.beton", {"write_mode": "png"}, "jpg, proportion, raw"),
    ("x.beton", {"quality": 0}, "quality=0"), ("x.beton", {"max_resolution": 0}, "max_resolution=0"),
    ("x.beton/y.beton", {}, "cannot write"),
])
def test_impossible_requests_are_refused(tmp_path, name, settings, message):
    if "/" in name:
        (tmp_path / "x.beton").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=message):
        write(open_source("synthetic:2,1,8"), tmp_path / name, **settings)


# --- inspecting damaged files ---


@pytest.mark.parametrize("keep", [0, 1, 23, 24, 500, METADATA_START + 100, 1 << 20, (2 << 20) + 50, -24, -1])
def test_a_truncated_file_is_refused(copy, keep):
    data = copy.read_bytes()
    copy.write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"is not a whole .beton file.*copy it again"):
        inspect_beton(copy)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.beton"):
        with pytest.raises(InputError, match="does not exist or is not a file"):
            inspect_beton(path)
    (tmp_path / "noise.beton").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(InputError, match="format version"):
        inspect_beton(tmp_path / "noise.beton")


@pytest.mark.parametrize(("key", "value", "message"), [
    ("version", 3, "format version 3 instead of 2"), ("num_samples", 149, "header corrupted"),
    ("num_samples", 0, "0 samples"), ("num_samples", 2**64 - 1, "header corrupted"), ("num_fields", 0, "0 fields"),
    ("num_fields", 1, "exactly one"), ("num_fields", 3, "is not a whole"), ("num_fields", 65535, "."),
    ("alloc_table_ptr", 0, "not a finished file"), ("alloc_table_ptr", 2**64 - 1, "header corrupted"),
])
def test_a_corrupted_header_is_refused(copy, key, value, message):
    header = np.fromfile(copy, HEADER, 1)
    header[key] = value
    patch(copy, 0, header)
    with pytest.raises(InputError, match=message):
        inspect_beton(copy)


@pytest.mark.parametrize(("column", "row", "value", "message"), [
    ("data_ptr", 17, 12345, "1 images, the first of them 17, are not in"), ("data_ptr", 17, 2**64 - 1, "not in"),
    ("width", 3, 0, "image 3"), ("mode", 149, 7, "image 149"), ("mode", 5, RAW, "image 5"),
])
def test_corrupted_metadata_is_refused(copy, column, row, value, message):
    metadata = np.fromfile(copy, METADATA, 150, offset=METADATA_START)
    metadata["f0"][column][row] = value
    patch(copy, METADATA_START, metadata)
    with pytest.raises(InputError, match=message):
        inspect_beton(copy)


def test_two_samples_with_one_image_are_refused(copy):
    metadata = np.fromfile(copy, METADATA, 150, offset=METADATA_START)
    metadata["f0"][9] = metadata["f0"][8]
    patch(copy, METADATA_START, metadata)
    with pytest.raises(InputError, match="two samples share"):
        inspect_beton(copy)


@pytest.mark.parametrize(("column", "value"), [("ptr", 5), ("ptr", 2**64 - 1), ("size", 2**63), ("size", 0)])
def test_a_corrupted_allocation_table_is_refused(copy, column, value):
    start = int(np.fromfile(copy, HEADER, 1)["alloc_table_ptr"][0])
    table = np.fromfile(copy, ALLOCATION, offset=start)
    table[column][40] = value
    patch(copy, start, table)
    with pytest.raises(InputError, match="allocation table"):
        inspect_beton(copy)


@pytest.mark.parametrize(("types", "names", "message"), [
    ((1, 1), "ab", "exactly one"), ((0, 1), "ab", "exactly one RGB image field"), ((2, 0), "ab", "exactly one int"),
    ((2, 255), "ab", "custom type 255"), ((2, 77), "ab", "custom type 77"),
])
def test_files_without_one_image_and_one_label_are_refused(copy, types, names, message):
    fields = np.fromfile(copy, DESCRIPTOR, 2, offset=HEADER.itemsize)
    fields["type_id"] = types
    fields["name"][:, 0] = list(names.encode())
    patch(copy, HEADER.itemsize, fields)
    with pytest.raises(InputError, match=message):
        inspect_beton(copy)


def test_a_damaged_image_is_named_when_it_is_read(copy):
    info = inspect_beton(copy)
    patch(copy, int(info.data_ptr_N[11]), np.zeros(int(info.size_N[11]), np.uint8))
    assert len(read_images(copy, [10, 12], info)) == 2
    with pytest.raises(InputError, match="image 11 cannot be decoded"):
        read_images(copy, [11])
    with pytest.raises(InputError, match=r"index 150 is outside \[0, 150\)"):
        read_images(copy, [150])


def write_imagenet_sized(path: Path) -> int:
    """A file with as many images as ImageNet, raw and tiny, in random order; returns N."""
    num_samples, image_bytes = 1_281_167, 48
    start = METADATA_START + num_samples * METADATA.itemsize
    header = np.zeros(1, HEADER)
    header["version"], header["num_fields"], header["num_samples"] = 2, 2, num_samples
    header["alloc_table_ptr"] = start + num_samples * image_bytes
    fields = np.zeros(2, DESCRIPTOR)
    fields["type_id"], fields["name"][:, 0] = (2, 1), (105, 108)
    order = np.random.default_rng(0).permutation(num_samples)
    metadata, table = np.zeros(num_samples, METADATA), np.zeros(num_samples, ALLOCATION)
    metadata["f0"]["mode"], metadata["f0"]["width"], metadata["f0"]["height"] = RAW, 4, 4
    metadata["f0"]["data_ptr"] = start + order * image_bytes
    metadata["f1"] = order % 1000
    table["ptr"], table["size"] = metadata["f0"]["data_ptr"], image_bytes
    for offset, part in ((0, header), (HEADER.itemsize, fields), (METADATA_START, metadata),
                         (int(header["alloc_table_ptr"][0]), table)):
        patch(path, offset, part)
    return num_samples


def test_imagenet_size_is_inspected_in_seconds(tmp_path):
    path = tmp_path / "imagenet.beton"
    num_samples = write_imagenet_sized(path)
    before = time.process_time()
    info = inspect_beton(path)
    check_labels(info, 1000)
    assert time.process_time() - before < 5
    assert (info.num_samples, info.image_field, info.label_field) == (num_samples, "i", "l")
    before = time.process_time()
    content_sha256(info)
    assert time.process_time() - before < 2  # measured: 0.1 s


def patch(path: Path, offset: int, array: np.ndarray) -> None:
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(offset)
        file.write(array.tobytes())


# --- labels ---


def test_labels_are_checked_against_the_number_of_classes(copy, digits):
    info, manifest = inspect_beton(digits), read_manifest(digits)
    check_labels(info, 10, manifest)
    check_labels(info, 10, None)
    first = int(np.flatnonzero(info.label_N >= 9)[0])
    for known in (manifest, None):
        with pytest.raises(InputError, match=rf"sample {first} has label 9, outside \[0, 9\).*set data.num_classes"):
            check_labels(info, 9, known)
        with pytest.raises(InputError, match=r"data.num_classes=11, but .* has 10 classes; set data.num_classes=10"):
            check_labels(info, 11, known)
    metadata = np.fromfile(copy, METADATA, 150, offset=METADATA_START)
    metadata["f1"][5] = -1
    patch(copy, METADATA_START, metadata)
    with pytest.raises(InputError, match="sample 5 has label -1"):
        check_labels(inspect_beton(copy), 10)


def test_a_class_missing_from_the_file_is_known_from_the_manifest(tmp_path):
    source = open_source("synthetic:20,20,16", subset=5)
    write(source, tmp_path / "x.beton")
    check_labels(inspect_beton(tmp_path / "x.beton"), 20, read_manifest(tmp_path / "x.beton"))


def test_labels_of_another_file_are_refused(copy, digits):
    metadata = np.fromfile(copy, METADATA, 150, offset=METADATA_START)
    metadata["f1"] = (metadata["f1"] + 1) % 10
    patch(copy, METADATA_START, metadata)
    with pytest.raises(InputError, match=r"labels are not those of .*manifest.json"):
        check_labels(inspect_beton(copy), 10, read_manifest(digits))
    metadata["f1"] = inspect_beton(digits).label_N
    metadata["f1"][7] += 1 << 40  # damage, and no reason to set another number of classes
    patch(copy, METADATA_START, metadata)
    with pytest.raises(InputError, match=r"labels are not those of .*manifest.json"):
        check_labels(inspect_beton(copy), 10, read_manifest(digits))


def test_the_fingerprint_is_that_of_the_labels(digits):
    assert dataset_fingerprint(inspect_beton(digits), 10) == fingerprint(open_source("digits", subset=150).label_N, 10)


# --- manifest ---


def test_the_manifest_comes_back_as_written(tmp_path):
    source = open_source("synthetic:40,4,16", "val", subset=30)
    written = write(source, tmp_path / "x.beton", quality=70, max_resolution=12)
    read = read_manifest(tmp_path / "x.beton")
    assert read is not None
    assert json.loads(manifest_path(tmp_path / "x.beton").read_text())["format"] == "tdds-manifest-1"
    np.testing.assert_array_equal(read.label_N, source.label_N)
    np.testing.assert_array_equal(read.crc32_N, written.crc32_N)
    assert read.crc32_N.dtype == written.crc32_N.dtype == np.uint32
    same = replace(read, label_N=written.label_N, crc32_N=written.crc32_N)
    assert vars(same) == vars(written)
    assert same.settings == {"write_mode": "jpg", "quality": 70, "max_resolution": 12, "subset": 30}
    assert (same.split, same.image_size, same.beton_bytes) == ("val", (12, 12), (tmp_path / "x.beton").stat().st_size)


def change(record: dict, key: str, value: object) -> None:
    if key in record["columns"]:
        record["columns"][key][2] = value
    else:
        record[key] = value


@pytest.mark.parametrize(("key", "value"), [
    ("path", "/etc/passwd"), ("path", "../x.png"), ("path", "a/../../x.png"), ("path", "a/.."), ("path", "C:/x.png"),
    ("path", "a\\b.png"), ("path", "a\nb.png"), ("path", ""), ("path", 3), ("label", 10), ("label", -1),
    ("label", 1e300), ("label", None), ("format", "other"), ("num_samples", "150"), ("num_classes", 9),
    ("class_names", "0123456789"), ("labels_sha256", ""), ("image_size", [1]), ("columns", []), ("settings", []),
    ("surplus", 1),
])
def test_a_damaged_manifest_is_refused(copy, digits, key, value):
    record = json.loads(manifest_path(digits).read_text())
    change(record, key, value)
    manifest_path(copy).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"is not a whole manifest .*remove it"):
        read_manifest(copy)


def test_a_noisy_manifest_comes_back_as_written(tmp_path):
    clean = open_source("synthetic:40,4,16")
    source = with_corruption(with_label_noise(clean, 0.25, 1), 0.25, 1)
    written = write(source, tmp_path / "x.beton")
    read = read_manifest(tmp_path / "x.beton")
    assert read is not None
    assert read.corruption == written.corruption == source.corruption
    np.testing.assert_array_equal(read.true_label_N, clean.label_N)
    np.testing.assert_array_equal(read.noisy_N, source.label_N != clean.label_N)
    assert read.noisy_N.dtype == bool
    info = inspect_beton(tmp_path / "x.beton")
    check_labels(info, 4, read)
    assert dataset_fingerprint(info, 4).labels_sha256 == fingerprint(source.label_N, 4).labels_sha256 == read.labels_sha256
    assert read.labels_sha256 != fingerprint(clean.label_N, 4).labels_sha256


def test_a_clean_manifest_has_the_keys_it_always_had(digits):
    record = json.loads(manifest_path(digits).read_text())
    assert list(record) == ["format", "source", "split", "num_samples", "num_classes", "class_names", "beton_bytes",
                            "labels_sha256", "settings", "image_size", "columns"]
    assert list(record["columns"]) == ["path", "label", "crc32"]
    manifest = read_manifest(digits)
    assert (manifest.true_label_N, manifest.corruption, manifest.noisy_N) == (None, None, None)


@pytest.mark.parametrize(("column", "values"), [
    ("true_label", [0] * 149), ("true_label", [0] * 151), ("true_label", [0] * 149 + [10]), ("true_label", [-1] * 150),
    ("true_label", [[0]] * 150), ("true_label", ["cat"] * 150), ("true_label", [None] * 150), ("true_label", 3),
    ("corruption", [""] * 149), ("corruption", ["rain"] * 150), ("corruption", [None] * 150), ("corruption", [[]] * 150),
    ("corruption", "f" * 150), ("corruption", 3),
])
def test_a_damaged_column_of_noise_is_refused(copy, digits, column, values):
    record = json.loads(manifest_path(digits).read_text())
    record["columns"] |= {"true_label": [0] * 150, "corruption": ["fog"] * 150}
    manifest_path(copy).write_text(json.dumps(record))
    assert read_manifest(copy).corruption == ["fog"] * 150
    record["columns"][column] = values
    manifest_path(copy).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"is not a whole manifest .*remove it"):
        read_manifest(copy)


@pytest.mark.parametrize("write_mode", ["jpg", "raw", "proportion"])
def test_the_crcs_are_those_of_the_stored_bytes(tmp_path, monkeypatch, write_mode):
    monkeypatch.setattr(beton, "IMAGES_PER_READ", 8)
    written = write(open_source("synthetic:100,4,16"), tmp_path / "x.beton", write_mode=write_mode)
    content, info = (tmp_path / "x.beton").read_bytes(), inspect_beton(tmp_path / "x.beton")
    expected = [zlib.crc32(content[ptr : ptr + size])
                for ptr, size in zip(info.data_ptr_N.tolist(), info.size_N.tolist(), strict=True)]
    assert len(set(expected)) == 100
    assert written.crc32_N.tolist() == expected
    for threads in (1, 3):
        assert crc32_of_images(info, threads).tolist() == expected


def test_a_manifest_without_crcs_is_valid(copy, digits):
    manifest = read_manifest(digits)
    assert manifest.crc32_N is not None
    write_manifest(manifest_path(copy), replace(manifest, crc32_N=None))
    record = json.loads(manifest_path(copy).read_text())
    assert list(record["columns"]) == ["path", "label"]
    assert read_manifest(copy).crc32_N is None


@pytest.mark.parametrize("column", [
    [0] * 149, [0] * 151, [], [0] * 149 + [-1], [0] * 149 + [2**32], [0] * 149 + [2**70], [0.5] * 150, ["1"] * 150,
    [None] * 150, [True] * 150, [[0]] * 150, 3, "crc", {},
])
def test_a_damaged_column_of_crcs_is_refused(copy, digits, column):
    record = json.loads(manifest_path(digits).read_text())
    record["columns"]["crc32"] = [0] * 149 + [2**32 - 1]
    manifest_path(copy).write_text(json.dumps(record))
    assert read_manifest(copy).crc32_N[-1] == 2**32 - 1
    record["columns"]["crc32"] = column
    manifest_path(copy).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"is not a whole manifest .*remove it"):
        read_manifest(copy)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'{"format": "tdds-manifest-1"', b"null", b"[" * 100000])
def test_a_manifest_that_is_no_record_is_refused(copy, text):
    manifest_path(copy).write_bytes(text)
    with pytest.raises(InputError, match="is not a whole manifest"):
        read_manifest(copy)


def test_a_manifest_of_another_file_is_refused(copy, digits, tmp_path):
    record = json.loads(manifest_path(digits).read_text())
    manifest_path(copy).write_text(json.dumps(record | {"beton_bytes": 5}))
    with pytest.raises(InputError, match="describes 150 samples in 5 bytes, but"):
        read_manifest(copy)
    copy.unlink()
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(copy)


def test_a_source_with_unsafe_paths_is_refused(tmp_path):
    source = open_source("synthetic:2,1,8")
    with pytest.raises(InputError, match="must be relative"):
        write(replace(source, path=["ok", "a\nb"]), tmp_path / "x.beton")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("path", "is_good"), [
    ("a/b.jpg", True), ("a..b/c:d.jpg", True), ("ü/ß 日本.jpg", True), ("a/...jpg", True), ("ab:c", True), ("\x7f", True),
    ("/a", False), ("C:a", False), ("a\\b", False), ("../a", False), ("a/../b", False), ("a/..", False), ("..", False),
    ("a\nb", False), ("a\0", False), ("\n", False), ("", False), ("a\n", False),
])
def test_every_path_of_many_is_looked_at(path, is_good, place):
    paths = ["x/1.jpg", "y.jpg"]
    paths.insert(place, path)
    if is_good:
        check_paths(paths)
    else:
        with pytest.raises(ValueError, match="must be relative"):
            check_paths(paths)


def test_a_million_paths_are_looked_at_quickly():
    paths = [f"n{index % 1000:08d}/n{index % 1000:08d}_{index}.JPEG" for index in range(1_000_000)]
    started = time.process_time()
    check_paths(paths)
    assert time.process_time() - started < 1.0


# --- content ---


def test_the_content_is_the_same_whoever_wrote_it(tmp_path):
    source = open_source("synthetic:300,2,96")
    for workers in (1, 2):
        write_beton(source, tmp_path / f"{workers}.beton", num_workers=workers, write_mode="raw", progress=False)
    one, two = (inspect_beton(tmp_path / f"{workers}.beton") for workers in (1, 2))
    assert content_sha256(one) == content_sha256(two)


def test_where_an_image_lies_is_not_content(tmp_path):
    write_beton(open_source("synthetic:100,2,16"), tmp_path / "x.beton", num_workers=1, write_mode="raw", progress=False)
    info = inspect_beton(tmp_path / "x.beton")
    before, data = content_sha256(info), dict(stored_bytes(info, [5, 50]))
    ptr_N = info.data_ptr_N.copy()
    ptr_N[[5, 50]] = ptr_N[[50, 5]]
    assert content_sha256(replace(info, data_ptr_N=ptr_N)) != before
    for i in (5, 50):
        patch(info.path, int(ptr_N[i]), np.frombuffer(data[i], np.uint8))
    assert content_sha256(replace(info, data_ptr_N=ptr_N)) == before


def test_other_pixels_are_other_content(tmp_path):
    source = open_source("synthetic:300,2,16")
    chosen = evenly_spaced(300, 256).tolist()
    for name, changed in (("a", None), ("b", 0), ("c", 299), ("d", chosen[100])):
        def read(i, changed=changed):
            image = source.read(i).copy()
            image[-1, -1, -1] ^= i == changed  # one bit, at its end
            return image
        write_beton(replace(source, reader=read), tmp_path / f"{name}.beton", num_workers=1, write_mode="raw", progress=False)
    info = [inspect_beton(tmp_path / f"{name}.beton") for name in "abcd"]
    assert len({part.num_bytes for part in info}) == 1
    assert len({part.label_N.tobytes() for part in info}) == 1
    assert len({content_sha256(part) for part in info}) == 4


@pytest.mark.parametrize("column", ["label_N", "width_N", "height_N", "mode_N"])
def test_other_metadata_is_other_content(digits, column):
    info = inspect_beton(digits)
    other = getattr(info, column).copy()
    other[3] += 1  # an image that is not hashed or is, the column is
    assert content_sha256(replace(info, **{column: other})) != content_sha256(info)


def test_evenly_spaced_indices_have_both_ends():
    assert evenly_spaced(10, 256).tolist() == list(range(10))
    assert evenly_spaced(1, 256).tolist() == [0]
    index = evenly_spaced(1_281_167, 256)
    assert (len(index), index[0], index[-1], index.dtype) == (256, 0, 1_281_166, np.int64)
    assert np.ptp(np.diff(index)) <= 1


def test_stored_bytes_of_a_file_that_shrank_is_an_input_error(copy):
    info = inspect_beton(copy)
    last = int(np.argmax(info.data_ptr_N))
    with copy.open("r+b") as file:
        file.truncate(int(info.data_ptr_N[last]) + 5)
    with pytest.raises(InputError, match=rf"ends within image {last}"):
        list(stored_bytes(info, [last]))
    copy.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(stored_bytes(info, [last]))
