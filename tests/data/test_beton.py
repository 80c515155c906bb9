"""`.beton` files: round trips, what the inspector refuses, and that nothing half-written is
left."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdds_dist.data import beton, pixels
from tdds_dist.data import manifest as manifest_module
from tdds_dist.data.beton import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    IMAGE,
    JPG,
    RAW,
    BetonInfo,
    content_sha256,
    crc32_of_images,
    dataset_fingerprint,
    evenly_spaced,
    inspect_beton,
    local_copy,
    read_images,
    stored_bytes,
)
from tdds_dist.data.check import check, quick_check
from tdds_dist.data.loader import BetonLoader, View
from tdds_dist.data.manifest import (
    check_labels,
    check_paths,
    manifest_path,
    read_manifest,
    write_manifest,
)
from tdds_dist.data.pixels import PixelRules, pixel_rules
from tdds_dist.data.sources import Source, open_source, with_corruption, with_label_noise
from tdds_dist.data.writer import _check_size, write_beton
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import fingerprint
from tests.make import refused, write_several_fields

METADATA = np.dtype([("", IMAGE), ("", "<i8")], align=True)
METADATA_START = HEADER.itemsize + 2 * DESCRIPTOR.itemsize
NOT_WHOLE = r"is not a whole .beton file.*copy it again"


def write(source: Source, out: Path, **settings: object) -> manifest_module.Manifest:
    return write_beton(source, out, **{"progress": False, "num_workers": 2, **settings})  # type: ignore[arg-type]


def noisy(source: Source, share: float, seed: int) -> Source:
    return with_corruption(with_label_noise(source, share, seed), share, seed)


@pytest.fixture
def copy(betons, tmp_path) -> Path:
    """A copy of `train`, 120 digits as JPEG, without its manifest, to be damaged."""
    path = tmp_path / "copy.beton"
    path.write_bytes(betons["train"].read_bytes())
    return path


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def patch(path: Path, offset: int, array: np.ndarray) -> None:
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(offset)
        file.write(array.tobytes())


@contextmanager
def edited(path: Path, part: str) -> Iterator[np.ndarray]:
    """One of the tables of a file, written back after it was changed: `header`, `fields`,
    `metadata` or `allocations`."""
    header = np.fromfile(path, HEADER, 1)[0]
    dtype, count, offset = {
        "header": (HEADER, 1, 0),
        "fields": (DESCRIPTOR, 2, HEADER.itemsize),
        "metadata": (METADATA, int(header["num_samples"]), METADATA_START),
        "allocations": (ALLOCATION, -1, int(header["alloc_table_ptr"])),
    }[part]
    table = np.fromfile(path, dtype, count, offset=offset)
    yield table
    patch(path, offset, table)


def zero_image(info: BetonInfo, i: int) -> None:
    """Zero the stored bytes of an image."""
    patch(info.path, int(info.data_ptr_N[i]), np.zeros(int(info.size_N[i]), np.uint8))


# --- round trips ---


def imagefolder(folder: Path) -> str:
    """40 smooth images of different sizes; the spec of their source."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth.resize((20 + i, 60 - i), Image.Resampling.BICUBIC).save(path)
    return f"imagefolder:{folder}"


@pytest.mark.parametrize(
    ("spec", "write_mode", "modes"),
    [
        ("digits", "jpg", {JPG}),
        ("synthetic:100,7,40", "raw", {RAW}),
        ("imagefolder", "proportion", {JPG, RAW}),
    ],
)
def test_round_trip(tmp_path, monkeypatch, spec, write_mode, modes):
    # several parts, so that threads share the CRCs
    monkeypatch.setattr(beton, "IMAGES_PER_READ", 8)
    spec = imagefolder(tmp_path / "images") if spec == "imagefolder" else spec
    source = open_source(spec, "val" if spec == "digits" else "train", subset=40)
    written = write(source, tmp_path / "new/x.beton", write_mode=write_mode, quality=80)
    assert left_behind(tmp_path / "new") == ["x.beton", "x.manifest.json"]
    info = inspect_beton(tmp_path / "new/x.beton")
    assert set(info.mode_N) == modes
    np.testing.assert_array_equal(info.label_N, source.label_N)
    assert info.label_N.dtype == np.int64
    images = read_images(info.path, range(len(source)))
    for i, image in enumerate(images):
        expected = source.read(i)
        assert (image.shape, image.dtype) == (expected.shape, np.uint8)
        assert image.shape[:2] == (info.height_N[i], info.width_N[i])
        assert np.abs(image.astype(int) - expected).mean() < (14 if info.mode_N[i] == JPG else 1e-9)

    manifest = read_manifest(info.path)
    np.testing.assert_array_equal(manifest.label_N, source.label_N)
    assert vars(replace(manifest, label_N=written.label_N, crc32_N=written.crc32_N)) == vars(
        written
    )
    assert (manifest.path, manifest.class_names, manifest.split) == (
        source.path,
        source.class_names,
        source.split,
    )
    assert manifest.settings == {
        "write_mode": write_mode,
        "quality": 80,
        "max_resolution": None,
        "subset": 40,
        **(PixelRules().settings if spec.startswith("imagefolder") else {}),
    }
    assert manifest.image_size == (
        max(image.shape[0] for image in images),
        max(image.shape[1] for image in images),
    )
    assert manifest.beton_bytes == info.path.stat().st_size
    content = info.path.read_bytes()
    crc_N = [
        zlib.crc32(content[ptr : ptr + size])
        for ptr, size in zip(info.data_ptr_N, info.size_N, strict=True)
    ]
    assert len(set(crc_N)) == 40
    assert manifest.crc32_N.dtype == np.uint32
    for found in (manifest.crc32_N, crc32_of_images(info, 1), crc32_of_images(info, 3)):
        assert found.tolist() == crc_N


def test_ffcvs_own_reader_agrees(betons):
    from ffcv.reader import Reader

    reader, info = Reader(str(betons["train"])), inspect_beton(betons["train"])
    assert reader.metadata_type == METADATA
    assert (reader.num_samples, reader.field_names) == (info.num_samples, info.field_names)
    image_N = reader.metadata["f0"]
    for ours, theirs in (
        (info.label_N, reader.metadata["f1"]),
        (info.width_N, image_N["width"]),
        (info.height_N, image_N["height"]),
        (info.mode_N, image_N["mode"]),
        (info.data_ptr_N, image_N["data_ptr"]),
    ):
        np.testing.assert_array_equal(ours, theirs)
    size = dict(
        zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True)
    )
    assert info.size_N.tolist() == [size[ptr] for ptr in info.data_ptr_N.tolist()]
    assert sorted(reader.alloc_table["sample_id"]) == list(range(120))


@pytest.mark.timeout(60)
def test_ffcvs_own_writer_and_all_its_fields_are_understood(tmp_path):
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Samples:
        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: np.int64) -> tuple[object, ...]:
            i = int(index)
            return (
                0.5,
                {"a": i},
                # an empty one lies at the address of the image that follows
                np.arange(i % 3, dtype=np.uint8),
                np.full((16 + i, 20, 3), 4 * i, np.uint8),
                np.zeros(3, np.float32),
                i,
                7 * i,
            )

    fields = {
        "weight": FloatField(),
        "note": JSONField(),
        "blob": BytesField(),
        "picture": RGBImageField("jpg"),
        "box": NDArrayField(np.dtype("float32"), (3,)),
        "label": IntField(),
        "row": IntField(),
    }
    DatasetWriter(str(tmp_path / "x.beton"), fields, num_workers=1).from_indexed_dataset(
        Samples(), chunksize=10
    )
    info = inspect_beton(tmp_path / "x.beton")
    assert (info.image_field, info.label_field, info.field_names) == (
        "picture",
        "label",
        list(fields),
    )
    assert info.label_N.tolist() == list(range(30))
    (image,) = read_images(info.path, [21], info)
    assert image.shape == (37, 20, 3)
    assert np.abs(image.astype(int) - 84).max() < 4
    assert read_manifest(info.path) is None
    assert check(info.path, progress=False).faults == {}
    loader = BetonLoader(info, 30, View(16))
    (batch,) = loader.batches(epoch_order(30, 30), rank=0, world_size=1, epoch=0)
    assert batch.label.tolist() == batch.index.tolist()
    assert (batch.image[:, 1, 8, 8].int() - 4 * batch.index).abs().max() < 4
    zero_image(info, 19)
    assert check(info.path, progress=False).faults == {19: ["decode"]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("large", "fine"), ""),
        (
            ("", "fine"),
            "has 2 image fields: small, large; say .* data.image_field=small .*--image-field small",
        ),
        (
            ("large", ""),
            "has 2 int fields: row, fine; say .* data.label_field=row .*--label-field row",
        ),
        (("large", "label"), "has no int field 'label'; set data.label_field .* one of row, fine"),
        (("fine", "fine"), "has no image field 'fine'; set data.image_field .* small, large"),
    ],
)
def test_one_of_several_fields_is_named(tmp_path, fields, said):
    path = write_several_fields(tmp_path / "x.beton", 10)
    if said:
        refused(said, inspect_beton, path, *fields)
        return
    info = inspect_beton(path, *fields)
    assert info.label_N.tolist() == [0, 1] * 5
    assert [image[31, 31, 0] for image in read_images(path, [0, 9], info)] == [0, 45]
    loader = BetonLoader(info, 10, View(32))
    (batch,) = loader.batches(epoch_order(10, 10), rank=0, world_size=1, epoch=0)
    index = batch.index.tolist()
    assert sorted(index) == list(range(10))
    assert batch.image[:, 0, 31, 31].tolist() == [5 * i for i in index]
    assert batch.label.tolist() == [i % 2 for i in index]


@pytest.mark.parametrize("write_mode", ["raw", "jpg"])
def test_a_large_image_among_thumbnails_is_written_and_read(tmp_path, write_mode):
    """It takes several pages, whose size fits the others; by several workers, at every place."""
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (1500, 2000, 3), dtype=np.uint8)  # 9 MB; noise, 4 MB as JPEG
    at = {41, 42, 99, 129}
    source = replace(
        open_source("synthetic:130,2,8"),
        reader=lambda i: large if i in at else np.full((9, 9, 3), i, np.uint8),
    )
    for num_workers in (1, 3):
        out = tmp_path / f"{num_workers}.beton"
        assert write(source, out, write_mode=write_mode, num_workers=num_workers).image_size == (
            1500,
            2000,
        )
        info = inspect_beton(out)
        assert np.fromfile(out, HEADER, 1)[0]["page_size"] == 2 << 20
        assert info.num_bytes < (4 * 5 + 4 + num_workers) * (2 << 20)
        for i, image in enumerate(read_images(out, range(130))):
            if i not in at:
                assert np.abs(image.astype(int) - i).max() <= 1
            elif write_mode == "raw":
                np.testing.assert_array_equal(image, large)
        assert check(out, progress=False).faults == {}


@pytest.mark.parametrize(
    ("size", "max_resolution", "scaled"),
    [
        ((200, 150), 100, (100, 75)),
        ((200, 150), 200, (200, 150)),
        ((3000, 3), 256, (256, 1)),
        ((3, 3000), 256, (1, 256)),
        ((1, 1), 1, (1, 1)),
        ((70000, 2), 65500, (65500, 1)),
    ],
)
def test_images_are_scaled_down_to_one_pixel_at_least(tmp_path, size, max_resolution, scaled):
    image = np.full((*size, 3), (250, 120, 3), np.uint8)
    source = replace(open_source("synthetic:2,1,8"), reader=lambda i: image)
    out = tmp_path / "x.beton"
    manifest = write(source, out, max_resolution=max_resolution, quality=100)
    assert (manifest.image_size, manifest.settings["max_resolution"]) == (scaled, max_resolution)
    for written in read_images(out, [0, 1]):
        assert np.abs(written.astype(int) - (250, 120, 3)).max() < 6


@pytest.mark.parametrize(
    ("shape", "write_mode", "way_out"),
    [
        ((65501, 1, 3), "jpg", 65500),
        ((1, 65536, 3), "raw", 65535),
        ((30000, 30000, 3), "raw", 26333),
    ],
)
def test_an_image_too_large_for_a_beton_names_a_size_that_fits(
    tmp_path, shape, write_mode, way_out
):
    image = np.broadcast_to(np.uint8(7), shape)  # no memory behind it
    source = replace(open_source("synthetic:2,1,8"), reader=lambda i: image)
    with pytest.raises(InputError, match=f"too large for {write_mode}.*--max-resolution {way_out}"):
        write(source, tmp_path / "x.beton", write_mode=write_mode)
    assert left_behind(tmp_path) == []
    ratio = way_out / max(shape)
    stored = np.broadcast_to(np.uint8(7), (*(max(int(ratio * side), 1) for side in shape[:2]), 3))
    _check_size(stored, write_mode)
    if stored.size < 1e6:
        write(source, tmp_path / "x.beton", write_mode=write_mode, max_resolution=way_out)


def test_what_was_done_to_pixels_is_counted_over_all_workers_and_recorded(tmp_path):
    folder, exif = tmp_path / "images/a", Image.Exif()
    exif[0x0112] = 6
    folder.mkdir(parents=True)
    for i in range(70):
        drawing = Image.new("RGBA", (4, 2), (0, 0, 0, 51 if i % 7 == 0 else 255))
        drawing.save(folder / f"{i:02}.png", **({"exif": exif} if i % 5 == 0 else {}))
    spec = f"imagefolder:{folder.parent}"
    for rules, counted, sizes, mean in (
        (PixelRules(), {pixels.COMPOSITED: 10, pixels.TURNED: 14}, {(4, 2), (2, 4)}, 204),
        (
            pixel_rules(exif="ignore", background="black"),
            {pixels.COMPOSITED: 10, pixels.NOT_TURNED: 14},
            {(2, 4)},
            0,
        ),
    ):
        source = open_source(spec, pixels=rules)
        out = tmp_path / f"{mean}.beton"
        settings = write(source, out, write_mode="raw", num_workers=3).settings
        assert dict(source.tally) == counted
        assert settings.items() >= rules.settings.items()
        images = read_images(out, range(70))
        assert {image.shape[:2] for image in images} == sizes
        assert [int(image.mean()) for image in images] == [
            mean if i % 7 == 0 else 0 for i in range(70)
        ]
    no_files, rules = "are for files of images, not for digits", pixel_rules(background="black")
    refused(no_files, open_source, "digits", pixels=rules)


def test_the_number_of_workers_changes_no_image_and_noise_survives(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TDDS_PROGRESS_SECONDS", "0")
    clean = open_source("synthetic:200,4,16", subset=130)
    source = noisy(clean, 0.2, 7)

    def read(index: int) -> np.ndarray:
        time.sleep(0.5 if index == 0 else 0)  # one of several workers must not write all
        return source.read(index)

    slow = replace(source, reader=read)
    for name, num_workers in (("one", 1), ("again", 1), ("three", 3)):
        write(
            slow if name == "three" else source,
            tmp_path / f"{name}.beton",
            num_workers=num_workers,
            write_mode="proportion",
            progress=name == "three",
        )
    shown = capfd.readouterr().err
    for part in ("write", "checksums"):
        assert shown.count(f"{part}: 100 %, 130 of 130 images") == 1
    assert "\r" not in shown
    for suffix in ("beton", "manifest.json"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (
            tmp_path / f"again.{suffix}"
        ).read_bytes()
    records = [
        json.loads(manifest_path(tmp_path / name).read_text())
        for name in ("one.beton", "three.beton")
    ]
    for record in records:
        del record["beton_bytes"]  # every worker ends with a partly empty page
    assert records[0] == records[1]
    one, three = (inspect_beton(tmp_path / name) for name in ("one.beton", "three.beton"))
    assert (one.data_ptr_N != three.data_ptr_N).any()
    assert content_sha256(one) == content_sha256(three), "where an image lies is not content"
    for i, (image, same) in enumerate(
        zip(*(read_images(info.path, range(130)) for info in (one, three)), strict=True)
    ):
        np.testing.assert_array_equal(image, same)
        if one.mode_N[i] == RAW:
            np.testing.assert_array_equal(image, source.read(i))
            assert (image != clean.read(i)).any() == bool(source.corruption[i])

    manifest = read_manifest(three.path)
    assert manifest.corruption == source.corruption
    for ours, theirs in (
        (manifest.true_label_N, clean.label_N),
        (manifest.label_N, source.label_N),
        (three.label_N, source.label_N),
        (manifest.noisy_N, source.label_N != clean.label_N),
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert (manifest.noisy_N.dtype, manifest.noisy_N.sum()) == (bool, 26)
    assert (
        manifest.settings.items()
        >= {"subset": 130, "label_noise": 0.2, "corrupt": 0.2, "noise_seed": 7}.items()
    )
    check_labels(three, 4, manifest)
    assert dataset_fingerprint(three, 4) == fingerprint(source.label_N, 4)
    assert manifest.labels_sha256 == fingerprint(source.label_N, 4).labels_sha256
    assert manifest.labels_sha256 != fingerprint(clean.label_N, 4).labels_sha256


def test_importing_beton_does_not_import_ffcv():
    code = "import sys, tdds_dist.data.beton; print({'ffcv', 'numba', 'torch'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


def test_importing_ffcv_compiles_nothing():
    code = (
        "import tdds_dist.data.loader, ffcv.fields.rgb_image as of, numba.typed;"
        " print(type(of.IMAGE_MODES), of.IMAGE_MODES, type(numba.typed.Dict()).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "<class 'dict'> {'jpg': 0, 'raw': 1} numba.typed.typeddict\n"


# --- writing that fails ---


def refused_writing(
    source: Source, folder: Path, match: str, name: str = "x.beton", **settings: object
) -> None:
    """Writing is refused in these words, and leaves nothing behind."""
    before = left_behind(folder)
    refused(match, write, source, folder / name, **settings)
    assert left_behind(folder) == before


def broken(source: Source, bad: dict[int, np.ndarray]) -> Source:
    """A source whose images at these indices are replaced."""
    return replace(source, reader=lambda i: bad[i] if i in bad else source.read(i))


@pytest.mark.timeout(60)
def test_bad_images_are_named(tmp_path):
    (tmp_path / "images/cat").mkdir(parents=True)
    for i in range(70):
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/cat/{i:02d}.png")
    (tmp_path / "images/cat/07.png").write_bytes(b"this is no image")
    os.truncate(tmp_path / "images/cat/40.png", 40)
    source = open_source(f"imagefolder:{tmp_path / 'images'}")
    refused_writing(
        source, tmp_path, r"2 images .*'cat/07.png': Unidentified.*'cat/40.png'.*repair or remove"
    )
    not_encodable = {
        36: np.zeros((4, 4), np.uint8),
        38: np.zeros((4, 4, 3), np.float32),
        39: np.zeros((1, 70000, 3), np.uint8),
    }
    refused_writing(
        broken(open_source("synthetic:40,2,16"), not_encodable),
        tmp_path,
        r"3 images .*train/0000036.*train/0000038.*train/0000039",
        write_mode="raw",
    )
    refused_writing(
        replace(open_source("synthetic:100000,2,16"), reader=lambda i: 1 // 0),
        tmp_path,
        r"1\d\d\+ images .*ZeroDivisionError",
    )  # stops early


@pytest.mark.timeout(60)
def test_a_killed_worker_ends_the_writing(tmp_path):
    source, parent = open_source("synthetic:400,2,16"), os.getpid()

    def read(index: int) -> np.ndarray:
        if index == 100 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return source.read(index)

    refused_writing(replace(source, reader=read), tmp_path, "killed by SIGKILL")


@pytest.mark.timeout(60)
def test_a_killed_parent_takes_its_workers_along(tmp_path):
    started, source = tmp_path / "started", open_source("synthetic:100,2,16")

    def begin() -> None:
        parent = os.getpid()

        def read(index: int) -> np.ndarray:
            if os.getpid() != parent:
                started.write_text(str(os.getpid()))
                os.kill(parent, signal.SIGKILL)
                time.sleep(600)
            return source.read(index)

        write(replace(source, reader=read), tmp_path / "x.beton", num_workers=1)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    process.join(50)
    assert process.exitcode == -signal.SIGKILL
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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a write beyond it fails like one on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, limits[1]))
    try:
        refused_writing(
            open_source("synthetic:400,2,64"),
            tmp_path,
            r"cannot write .*File too large.*free space",
            write_mode="raw",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_existing_file_is_overwritten_only_on_request(tmp_path):
    out = tmp_path / "x.beton"
    write(open_source("synthetic:40,2,16"), out)
    before = out.read_bytes()
    refused_writing(open_source("synthetic:50,2,16"), tmp_path, "exists; remove it")
    assert out.read_bytes() == before
    write(open_source("synthetic:50,2,16"), out, overwrite=True)
    assert read_manifest(out).num_samples == inspect_beton(out).num_samples == 50
    assert left_behind(tmp_path) == ["x.beton", "x.manifest.json"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("x.ffcv", {}, "must end in .beton"),
        ("x.beton", {"write_mode": "png"}, "jpg, proportion, raw"),
        ("x.beton", {"quality": 0}, "quality=0"),
        ("x.beton", {"max_resolution": 0}, "max_resolution=0"),
        ("x.beton", {"num_workers": 0}, "num_workers=0"),
        ("a file/y.beton", {}, "cannot write"),
        ("x.beton", {"path": ["ok", "a\nb"]}, "must be relative.*rename the file"),
        (
            "x.beton",
            {"path": ["\u20ac", "cat/caf\udce9"]},
            r"names that are not UTF-8: 1 \(such as 'cat/caf\\xe9'\).*`convmv -f cp1252",
        ),
    ],
)
def test_impossible_requests_are_refused(tmp_path, name, settings, message):
    (tmp_path / "a file").write_text("where a folder should be")
    source = open_source("synthetic:2,1,8")
    if "path" in settings:
        source, settings = replace(source, path=settings["path"]), {}
    refused_writing(source, tmp_path, message, name, **settings)


# --- inspecting damaged files ---


HALF_TABLE = 60 * ALLOCATION.itemsize
RNG = np.random.default_rng(0)


SHORTENED = (0, 1, 23, 24, 500, METADATA_START + 100, 1 << 20, (2 << 20) + 50)


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda content, keep=keep: content[:keep] for keep in (*SHORTENED, -HALF_TABLE, -24, -1)),
        lambda content: content[:-HALF_TABLE] + bytes(HALF_TABLE),
        lambda content: (
            content[: METADATA_START + 240] + bytes(240) + content[METADATA_START + 480 :]
        ),
        lambda content: content[:2] + RNG.bytes(HEADER.itemsize - 2) + content[HEADER.itemsize :],
        lambda content: RNG.bytes(5000),
    ],
)
def test_a_file_that_is_not_whole_is_refused(copy, damage):
    copy.write_bytes(damage(copy.read_bytes()))
    refused(NOT_WHOLE, inspect_beton, copy)


@pytest.mark.parametrize("name", ["", "missing.beton"])
def test_what_is_no_file_is_refused(tmp_path, name):
    refused("does not exist or is not a file", inspect_beton, tmp_path / name)


@pytest.mark.parametrize(
    ("part", "column", "row", "value", "message"),
    [
        ("header", "version", 0, 3, "format version 3 instead of 2"),
        ("header", "num_samples", 0, 119, "header corrupted"),
        ("header", "num_samples", 0, 0, "0 samples"),
        ("header", "num_samples", 0, 2**64 - 1, "header corrupted"),
        ("header", "num_fields", 0, 0, "0 fields"),
        ("header", "num_fields", 0, 1, "hold no int field"),
        ("header", "num_fields", 0, 3, NOT_WHOLE),
        ("header", "num_fields", 0, 65535, "."),
        ("header", "alloc_table_ptr", 0, 0, "not a finished file"),
        ("header", "alloc_table_ptr", 0, 2**64 - 1, "header corrupted"),
        ("fields", "type_id", 0, 1, "hold no image field"),
        ("fields", "type_id", 0, 0, "hold no image field"),
        ("fields", "type_id", 1, 0, "hold no int field"),
        ("fields", "type_id", 1, 255, "custom type 255"),
        ("fields", "type_id", 1, 77, "custom type 77"),
        ("metadata", "data_ptr", 17, 12345, "1 images, the first of them 17, are not in"),
        ("metadata", "data_ptr", 17, 2**64 - 1, "not in"),
        ("metadata", "width", 3, 0, "image 3"),
        ("metadata", "mode", 119, 7, "image 119"),
        ("metadata", "mode", 5, RAW, "image 5"),
        ("allocations", "ptr", 40, 5, "allocation table"),
        ("allocations", "ptr", 40, 2**64 - 1, "allocation table"),
        ("allocations", "size", 40, 2**63, "allocation table"),
        ("allocations", "size", 40, 0, "allocation table"),
    ],
)
def test_a_corrupted_number_is_refused(copy, part, column, row, value, message):
    with edited(copy, part) as table:
        (table["f0"] if part == "metadata" else table)[column][row] = value
    refused(message, inspect_beton, copy)


def test_two_samples_with_one_image_are_refused(copy):
    with edited(copy, "metadata") as metadata:
        metadata["f0"][9] = metadata["f0"][8]
    refused("two samples share", inspect_beton, copy)


def test_a_damaged_image_is_named_when_it_is_read(copy):
    info = inspect_beton(copy)
    zero_image(info, 11)
    assert len(read_images(copy, [10, 12], info)) == 2
    refused("image 11 cannot be decoded", read_images, copy, [11])
    refused(r"index 120 is outside \[0, 120\)", read_images, copy, [120])


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
    for offset, part in (
        (0, header),
        (HEADER.itemsize, fields),
        (METADATA_START, metadata),
        (int(header["alloc_table_ptr"][0]), table),
    ):
        patch(path, offset, part)
    return num_samples


def test_imagenet_size_takes_seconds(tmp_path):
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
    quick_check(info, None)  # the kernel is loaded
    before = time.process_time()
    quick_check(info, None)
    assert time.process_time() - before < 2  # measured: 0.05 s


# --- labels ---


def test_labels_are_checked_against_the_number_of_classes(copy, betons):
    info, manifest = inspect_beton(betons["train"]), read_manifest(betons["train"])
    assert dataset_fingerprint(info, 10) == fingerprint(
        open_source("digits", subset=120).label_N, 10
    )
    first = int(np.flatnonzero(info.label_N >= 9)[0])
    for known in (manifest, None):
        check_labels(info, 10, known)
        with pytest.raises(
            InputError, match=rf"sample {first} has label 9, outside \[0, 9\).*set data.num_classes"
        ):
            check_labels(info, 9, known)
        with pytest.raises(
            InputError, match=r"data.num_classes=11, but .* has 10 classes; set data.num_classes=10"
        ):
            check_labels(info, 11, known)
    more = replace(
        manifest, num_classes=12, labels_sha256=fingerprint(info.label_N, 12).labels_sha256
    )
    check_labels(info, 12, more)  # classes that the file lacks are known from its manifest
    check_labels(info, 12, None, complete=False)
    with edited(copy, "metadata") as metadata:
        metadata["f1"][5] = -1
    with pytest.raises(InputError, match="sample 5 has label -1"):
        check_labels(inspect_beton(copy), 10)


@pytest.mark.parametrize(
    "change",
    [
        lambda label_N: (label_N + 1) % 10,
        lambda label_N: label_N + (np.arange(120) == 7) * (1 << 40),
    ],
)
def test_labels_of_another_file_are_refused(copy, betons, change):
    """Also where damage makes one label larger than any class: no reason to set another number of
    classes."""
    with edited(copy, "metadata") as metadata:
        metadata["f1"] = change(metadata["f1"])
    with pytest.raises(InputError, match=r"labels are not those of .*manifest.json"):
        check_labels(inspect_beton(copy), 10, read_manifest(betons["train"]))


# --- manifest ---


def test_a_clean_manifest_has_the_keys_it_always_had(betons, copy):
    record = json.loads(manifest_path(betons["train"]).read_text())
    assert (
        list(record)
        == "format source split num_samples num_classes class_names beton_bytes labels_sha256 settings image_size columns".split()
    )
    assert record["format"] == "tdds-manifest-1"
    assert {key: len(column) for key, column in record["columns"].items()} == {
        "path": 120,
        "label": 120,
        "crc32": 120,
    }
    manifest = read_manifest(betons["train"])
    assert (manifest.true_label_N, manifest.corruption, manifest.noisy_N) == (None, None, None)
    write_manifest(manifest_path(copy), replace(manifest, crc32_N=None))  # as older ones
    assert list(json.loads(manifest_path(copy).read_text())["columns"]) == ["path", "label"]
    assert read_manifest(copy).crc32_N is None


@pytest.fixture
def record_of(copy, betons):
    """Writes the manifest of the copy, with all columns there can be and some keys or columns
    changed."""
    whole = json.loads(manifest_path(betons["train"]).read_text())
    columns = whole["columns"] | {
        "true_label": [0] * 120,
        "corruption": ["fog"] * 120,
        "crc32": [0] * 119 + [2**32 - 1],
    }

    def write_record(**changes: object) -> None:
        record = whole | {
            "columns": columns | {key: value for key, value in changes.items() if key in columns}
        }
        record |= {key: value for key, value in changes.items() if key not in columns}
        manifest_path(copy).write_text(json.dumps(record))

    write_record.columns = columns
    write_record()
    read = read_manifest(copy)
    assert (read.corruption, read.crc32_N[-1], read.true_label_N.tolist()) == (
        ["fog"] * 120,
        2**32 - 1,
        [0] * 120,
    )
    return write_record


NOT_WHOLE_MANIFEST = r"is not a whole manifest .*remove it"


DAMAGED_ENTRIES = {
    "path": ["/etc/passwd", "../x.png", 3],
    "label": [10, -1, 1e300, None],
    "true_label": [10, -1],
    "corruption": ["rain", None, []],
    "crc32": [-1, 2**32, 2**70],
}
DAMAGED_KEYS = {  # and columns
    "true_label": [[0] * 119, [0] * 121, [[0]] * 120, ["cat"] * 120, [None] * 120, 3],
    "corruption": [[""] * 119, "f" * 120, 3],
    "crc32": [*([item] * 120 for item in (0.5, "1", None, True, [0])), [0] * 119, [0] * 121, []],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in DAMAGED_ENTRIES.items() for value in values]
)
def test_a_damaged_entry_of_a_manifest_is_refused(copy, record_of, key, value):
    column = record_of.columns[key]
    record_of(**{key: [*column[:2], value, *column[3:]]})
    refused(NOT_WHOLE_MANIFEST, read_manifest, copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"),
        ("num_samples", "120"),
        ("num_classes", 9),
        ("class_names", "0123456789"),
        ("labels_sha256", ""),
        ("image_size", [1]),
        ("columns", []),
        ("settings", []),
        ("surplus", 1),
        *((key, value) for key, values in DAMAGED_KEYS.items() for value in values),
        *(("crc32", value) for value in (3, "crc", {})),
    ],
)
def test_a_damaged_key_or_column_of_a_manifest_is_refused(copy, record_of, key, value):
    record_of(**{key: value})
    refused(NOT_WHOLE_MANIFEST, read_manifest, copy)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"\xff", b'{"format": "tdds-manifest-1"', b"null", b"[" * 100000]
)
def test_a_manifest_that_is_no_record_is_refused(copy, text):
    manifest_path(copy).write_bytes(text)
    refused(NOT_WHOLE_MANIFEST, read_manifest, copy)


def test_a_manifest_of_another_file_is_refused(copy, record_of):
    record_of(beton_bytes=5)
    refused("describes 120 samples in 5 bytes, but", read_manifest, copy)
    copy.unlink()
    refused("does not exist", read_manifest, copy)


GOOD_PATHS = ["a/b.jpg", "a..b/c:d.jpg", "ü/ß 日本.jpg", "a/...jpg", "ab:c", "\x7f"]
BAD_PATHS = ["/a", "C:a", "a\\b", "../a", "a/../b", "a/..", "..", "a\nb", "a\0", "\n", "", "a\n"]


@pytest.mark.parametrize("path", [*GOOD_PATHS, *BAD_PATHS])
def test_every_path_of_many_is_looked_at(path):
    for place in range(3):
        paths = ["x/1.jpg", "y.jpg"]
        paths.insert(place, path)
        if path in GOOD_PATHS:
            check_paths(paths)
        else:
            with pytest.raises(ValueError, match="must be relative"):
                check_paths(paths)


def test_many_paths_are_looked_at_quickly():
    paths = [f"n{index % 1000:08d}/n{index % 1000:08d}_{index}.JPEG" for index in range(200_000)]
    started = time.process_time()
    check_paths(paths)
    assert time.process_time() - started < 0.2  # measured: 0.04 s; one by one: 0.3 s


# --- content ---


def test_the_content_is_every_column_and_the_bytes_of_the_chosen_images(betons, tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(betons["raw"].read_bytes())
    info = inspect_beton(path)
    seen = {content_sha256(info)}
    for column in ("label_N", "width_N", "height_N", "mode_N", "size_N"):
        other = getattr(info, column).copy()
        other[3] ^= 1
        seen.add(content_sha256(replace(info, **{column: other})))
    for i in (0, 50, 96):
        last = int(info.data_ptr_N[i] + info.size_N[i]) - 1
        byte = np.fromfile(path, np.uint8, 1, offset=last)
        patch(path, last, byte ^ 1)
        seen.add(content_sha256(info))
        patch(path, last, byte)
    assert len(seen) == 1 + 5 + 3
    assert content_sha256(info) in seen


def test_evenly_spaced_indices_have_both_ends():
    assert evenly_spaced(10, 256).tolist() == list(range(10))
    assert evenly_spaced(1, 256).tolist() == [0]
    index = evenly_spaced(1_281_167, 256)
    assert (len(index), index[0], index[-1], index.dtype) == (256, 0, 1_281_166, np.int64)
    assert np.ptp(np.diff(index)) <= 1


def test_stored_bytes_of_a_file_that_shrank_is_an_input_error(copy):
    """Under a memory map this ends the process with SIGBUS."""
    info = inspect_beton(copy)
    last = int(np.argmax(info.data_ptr_N))
    os.truncate(copy, int(info.data_ptr_N[last]) + 5)
    with pytest.raises(InputError, match=rf"ends within image {last}, so it has changed"):
        list(stored_bytes(info, [last]))
    copy.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(stored_bytes(info, [last]))


# --- a copy on the node's own disk ---


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """A file of five pieces, a folder for its copy, and the pieces that are written, as they are."""
    source = tmp_path / "a.beton"
    write_beton(open_source("synthetic:6,2,8", "train", None), source, progress=False)
    info = inspect_beton(source)
    monkeypatch.setattr(beton, "_PIECE_BYTES", -(-info.num_bytes // 5))
    written, write = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (write(file), written.append(file)))
    return info, tmp_path / "node" / "cache", written


def test_a_copy_is_made_once_and_again_when_the_file_changes(pieces):
    info, folder, written = pieces
    with ThreadPoolExecutor(4) as pool:
        copies = {each.path for each in pool.map(lambda _: local_copy(info, folder), range(4))}
    assert len(copies) == 1
    assert len(written) == 5
    (copy,) = copies
    assert copy.read_bytes() == info.path.read_bytes()
    os.utime(info.path, ns=(1, 1))
    assert local_copy(info, folder).path != copy
    assert len(written) == 10
    assert {path.suffix for path in folder.iterdir()} == {".beton", ".lock"}
    copy.write_bytes(b"short")
    os.utime(info.path, ns=(1, int(copy.stem.split("-")[-1])))
    assert local_copy(info, folder).path.read_bytes() == info.path.read_bytes()


@pytest.mark.parametrize(("damaged", "again"), [(None, 3), (1, 4), (0, 5)])
def test_a_copy_goes_on_behind_what_is_whole(pieces, monkeypatch, damaged, again):
    """`damaged` is the piece in which a bit flips after the disk was full."""
    info, folder, written = pieces
    pread = os.pread

    def full(file, size, start):
        if start == 2 * beton._PIECE_BYTES:
            raise OSError(28, "No space left on device")
        return pread(file, size, start)

    monkeypatch.setattr(os, "pread", full)
    refused(r"data\.cache=.*No space left on device; give a folder", local_copy, info, folder)
    monkeypatch.setattr(os, "pread", pread)
    (partial,) = folder.glob("*.partial")
    if damaged is not None:
        content = bytearray(partial.read_bytes())
        content[damaged * beton._PIECE_BYTES + 1] ^= 1
        partial.write_bytes(content)
    written.clear()
    assert local_copy(info, folder).path.read_bytes() == info.path.read_bytes()
    assert len(written) == again


def test_a_disk_that_is_too_small_or_lies_and_a_file_that_changes_are_refused(pieces, monkeypatch):
    info, folder, written = pieces
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=349))
        refused(r"takes .*B more, and .*cache has 349 B free", local_copy, info, folder)
    assert written == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda file, size, start: b"\0" * size)
        refused("does not hold what was written", local_copy, info, folder)
    copy_pieces = beton._copy_pieces

    def while_it_changes(path, *names):
        copy_pieces(path, *names)
        path.touch()

    monkeypatch.setattr(beton, "_copy_pieces", while_it_changes)
    refused("changed while it was copied", local_copy, info, folder)
    assert not list(folder.glob("*.beton"))
