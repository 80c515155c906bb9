"""Parquet files and tar shards as sources: order, labels, pixels, splits, and what bad input gets."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tdds_dist.__main__ import main
from tdds_dist.data.archives import _expanded, _Rows
from tdds_dist.data.beton import inspect_beton, read_images
from tdds_dist.data.manifest import read_manifest
from tdds_dist.data.pixels import TURNED
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.errors import InputError
from tests.make import refused

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (grey, 0, 0)).save(file, "PNG")
    return file.getvalue()


def jpeg_on_its_side() -> bytes:
    """A photo of 4 x 6 that EXIF turns, and so of 6 x 4."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def write_rows(
    path: Path,
    labels: Sequence[Any],
    first: int = 0,
    names: Sequence[str] = (),
    group: int = 3,
    label_type: Any = None,
    **more: Any,
) -> None:
    """Write a Parquet file as `datasets` does: row i has the grey `first` + i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    columns = {"image": pa.array(images, IMAGE), "label": pa.array(labels, label_type)} | more
    columns = {name: column for name, column in columns.items() if column is not None}
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        meta = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": meta})
    pq.write_table(table, path, row_group_size=group)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def greys(source: Any) -> list[int]:
    return [int(source.read(i)[3, 5, 0]) for i in range(len(source))]


def on_hub(folder: Path) -> None:
    """Two files of train, one of validation, one of test, one of another split."""
    write_rows(folder / "data/train-00000-of-00002.parquet", [1, 0, 1, 0], 10, ("dog", "cat"))
    write_rows(folder / "data/train-00001-of-00002.parquet", [0, 1], 20, ("dog", "cat"))
    write_rows(folder / "data/validation-00000-of-00001.parquet", [1], 30, ("dog", "cat"))
    write_rows(folder / "data/test-00000-of-00001-0123456789abcdef.parquet", [-1], 40, ("a", "b"))
    write_rows(folder / "data/extra-00000-of-00001.parquet", [0], 50, ("dog", "cat"))


# ---- what is read


def test_parquet_of_the_hub(tmp_path):
    on_hub(tmp_path)
    train = open_source(f"parquet:{tmp_path}")
    assert (train.split, train.splits, train.class_names) == (
        "train",
        ("train", "val"),
        ["dog", "cat"],
    )
    assert train.label_N.tolist() == [1, 0, 1, 0, 0, 1]
    assert train.path[3:5] == ["train-00000-of-00002.parquet#3", "train-00001-of-00002.parquet#0"]
    assert greys(train) == [10, 11, 12, 13, 20, 21]
    assert [int(train.read(i)[0, 0, 0]) for i in (5, 3, 0, 2)] == [21, 13, 10, 12]
    assert train.part_end.tolist() == [3, 4, 6]
    assert train.notes == ["splits: train is train*; val is validation*; not used: extra*, test*"]
    val = open_source(f"parquet:{tmp_path}", "val")
    assert (greys(val), val.label_N.tolist()) == ([30], [1])
    part = open_source(f"parquet:{tmp_path}/data/train-*.parquet", "val", holdout=0.5)
    rest = open_source(f"parquet:{tmp_path}/data/train-*.parquet", holdout=0.5)
    assert sorted(greys(part) + greys(rest)) == [10, 11, 12, 13, 20, 21]
    assert part.part_end[-1] == len(part) == 3


@pytest.mark.parametrize(
    ("files", "split", "found"),
    [
        (("train/0000.parquet", "test/0000.parquet"), "val", [1]),
        (("train/0000.parquet",), "train", [0]),
        (("x/train.parquet", "x/dev.parquet", ".cache/train.parquet"), "val", [1]),
        (("cifar-train.parquet", "cifar-test.parquet"), "val", [1]),
        (("0000.parquet", "0001.parquet"), "train", [0, 1]),
        (("part-0.parquet", "part-1.parquet"), None, [0, 1]),
        (("validation.parquet",), None, [0]),
        (("train.parquet", "unsupervised.parquet", "other.parquet"), "train", [0]),
    ],
)
def test_splits_are_told_by_the_names(tmp_path, files, split, found):
    for number, name in enumerate(files):
        write_rows(tmp_path / name, [number], number)
    source = open_source(f"parquet:{tmp_path}", split)
    assert (source.label_N.tolist(), greys(source)) == (found, found)
    assert len(set(source.path)) == len(found)


def test_columns_of_other_data_sets(tmp_path):
    """Plain bytes; two labels, of which one is named; small and unsigned numbers; no names."""
    path = tmp_path / "train.parquet"
    plain = pa.array([png(1), png(2)], pa.large_binary())
    write_rows(path, [4, 0], image=None, label=None, img=plain, coarse=pa.array([1, 1], pa.uint8()),
               fine=pa.array([4, 0], pa.int8()))  # fmt: skip
    write_rows(tmp_path / "test.parquet", [9], label=None, coarse=pa.array([1]), fine=pa.array([9]))
    with pytest.raises(InputError, match=r"may be the label: coarse, fine; .*--label-field coarse"):
        open_source(f"parquet:{tmp_path}")
    source = open_source(f"parquet:{tmp_path}", label_field="fine")
    assert (greys(source), source.label_N.tolist()) == ([1, 2], [4, 0])
    # the labels of both splits are counted
    assert source.class_names == [str(number) for number in range(10)]
    assert source.settings["label_field"] == "fine"


def test_a_row_group_is_read_once_and_never_as_a_whole(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.parquet", [0, 1] * 50, group=100)
    source, reads = open_source(f"parquet:{tmp_path}"), list[int]()
    read = _Rows._read

    def counted(file, group):
        for rows in read(file, group):
            reads.append(len(rows))
            yield rows

    monkeypatch.setattr(_Rows, "_read", staticmethod(counted))
    assert greys(source) == list(range(100))
    assert reads == [16] * 6 + [4]
    assert [int(source.read(i)[0, 0, 0]) for i in (70, 69, 3, 90)] == [70, 69, 3, 90]


def test_shards(tmp_path):
    """Keys end at the first dot; labels are text or JSON; members need not stand together; a
    photo is turned as in a folder."""
    write_tar(
        tmp_path / "s-00.tar",
        {
            "./n1/b.x.png": b"",
            "./n1/b.PNG": png(10),
            "./n1/b.cls": b" 2\n",
            "__meta__.json": b"{}",
            "n1/._b.png": b"",
            "n2/a.json": b'{"label": 0, "id": 7}',
            "n2/c.cls": b"1",
            "n2/a.jpg": jpeg_on_its_side(),
            "n2/c.png": png(12),
        },
    )
    write_tar(tmp_path / "s-01.tar", {"a.png": png(20), "a.cls": b"0"})
    source = open_source(f"webdataset:{tmp_path}/s-{{00..01}}.tar")
    assert source.path == ["s-00.tar/n1/b", "s-00.tar/n2/a", "s-00.tar/n2/c", "s-01.tar/a"]
    assert source.label_N.tolist() == [2, 0, 1, 0]
    assert source.class_names == ["0", "1", "2"]
    images = [source.read(i) for i in (3, 2, 1, 0)]
    assert [image.shape for image in images] == [(4, 6, 3), (4, 6, 3), (6, 4, 3), (4, 6, 3)]
    assert [int(image[0, 0, 0]) for image in images] == [20, 12, 0, 10]
    assert source.tally == {TURNED: 1}
    assert source.notes[1].endswith("2 hidden, 1 .x.png")
    named = open_source(f"webdataset:{tmp_path}/s-01.tar", image_field=".png", label_field="cls")
    assert named.label_N.tolist() == [0]


def test_shards_of_two_splits_have_the_classes_of_both(tmp_path):
    write_tar(tmp_path / "in-train-0.tar", {"a.png": png(1), "a.json": b'{"fine": 1}'})
    write_tar(tmp_path / "in-val-0.tar", {"a.png": png(2), "a.json": b'{"fine": 4}'})
    spec = f"webdataset:{tmp_path}/in-{{train,val}}-{{0..0}}.tar"
    for split, grey in (("train", 1), ("val", 2)):
        source = open_source(spec, split, label_field="fine")
        assert (greys(source), source.class_names[-1]) == ([grey], "4")
    assert open_source(f"webdataset:{tmp_path}", "val", label_field="fine").path == [
        "in-val-0.tar/a"
    ]


def test_braces_as_in_bash():
    assert _expanded("", "a{8..11}b") == ["a8b", "a9b", "a10b", "a11b"]
    assert _expanded("", "{x,y}/{00..01}") == ["x/00", "x/01", "y/00", "y/01"]
    assert _expanded("", "s-{098..100}") == ["s-098", "s-099", "s-100"]


def test_both_are_written_by_several_processes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200).tolist()
    write_rows(tmp_path / "hub/train-0.parquet", labels, names=("a", "b", "c"), group=37)
    write_tar(
        tmp_path / "train-0.tar",
        {
            f"{i:04d}{suffix}": data
            for i, label in enumerate(labels)
            for suffix, data in ((".png", png(i)), (".cls", str(label).encode()))
        },
    )
    for spec, path in (
        ("parquet:hub", "train-0.parquet#199"),
        ("webdataset:train-0.tar", "train-0.tar/0199"),
    ):
        kind, _, rest = spec.partition(":")
        out = tmp_path / f"{kind}.beton"
        words = ["write", f"{kind}:{tmp_path / rest}", str(out), "--num-workers", "3"]
        assert main([*words, "--write-mode", "raw"]) == 0
        info, manifest = inspect_beton(out), read_manifest(out)
        assert info.label_N.tolist() == labels
        assert [int(image[0, 0, 0]) for image in read_images(out, range(200))] == list(range(200))
        assert manifest.path[-1] == path
    said = capsys.readouterr().out
    assert "hold a part of these out" in said
    assert "classes: a, b, c" in said


# ---- what is refused


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({}, {}, "holds no .parquet file"),
        ({"train": {"image": None}}, {}, r"train.parquet has no column for the images.*label \(int"),
        ({"train": {"label": None}}, {}, r"train.parquet has no column for the labels.*image \(str"),
        ({"train": {"label_type": pa.string(), "labels": ["a"]}}, {}, "no column for the labels"),
        ({"train": {"label_type": pa.float32()}}, {"label_field": "label"}, "'label' holds float"),
        ({"train": {}}, {"label_field": "nope"}, "'nope' is not there, .* --label-field label"),
        ({"train": {"labels": [0, None, None]}}, {}, r"train.parquet#1: the label is null, like 2 of 3"),
        ({"train": {"labels": [0, 2, -1]}}, {}, r"train.parquet#2 has label -1.*not known"),
        ({"train": {"labels": [0, 2], "names": ("a", "b")}}, {}, "#1 has label 2, but .* 2 names"),
        ({"train": {"labels": [2**40]}}, {}, "is no number of a class"),
        ({"train": {}}, {"split": "val"}, r"has train\* but no val split; hold out"),
        ({"test": {}}, {"split": "train"}, r"has test\* but no train split; add it"),
        ({"part-0": {}, "part-1": {}}, {"split": "val"}, "say no split; hold out"),
        ({"a/train": {}, "b/train": {}}, {}, "are several data sets, or several splits for train"),
        ({"train-0": {}, "train_small-0": {}}, {}, "several splits for train; name one, such as"),
        ({"cifar10": {}, "cifar100": {}}, {}, "are several data sets; name one"),
        ({"train-0": {}, "train-1": {"names": ("a", "b")}}, {}, "train-1.parquet has other columns or"),
        ({"train": {"labels": [], "label_type": pa.int64()}}, {}, "no row"),
    ],
)  # fmt: skip
def test_parquet_that_is_refused(tmp_path, files, options, said):
    for name, columns in files.items():
        write_rows(tmp_path / f"{name}.parquet", **{"labels": [0, 1]} | columns)
    refused(said, open_source, f"parquet:{tmp_path}", **options)


@pytest.mark.parametrize(
    ("names", "one"),
    [
        (["a/train/0000", "a/test/0000", "b/train/0000", "b/test/0000"], "a"),
        (["a/train-0", "b/train-0"], "a"),
        (["train-0", "train-1", "train_small-0"], "'train-[0-9]*.parquet'"),
        (["cifar10", "cifar100"], "'cifar10.parquet'"),
        (["0000", "0001", "part-0"], "'[0-9]*.parquet'"),
    ],
)
def test_the_way_out_of_several_data_sets_is_one_of_them(tmp_path, names, one):
    for number, name in enumerate(names):
        write_rows(tmp_path / f"{name}.parquet", [number])
    with pytest.raises(InputError, match="such as parquet:") as refusal:
        open_source(f"parquet:{tmp_path}")
    said = str(refusal.value).rpartition("parquet:")[2]
    assert said.replace(f"{tmp_path}/", "") == one
    labels = open_source("parquet:" + said.strip("'")).label_N.tolist()
    assert labels == list(range(2 if names[1].startswith(("train-1", "0001")) else 1))


GOOD = {"a.png": png(1), "a.cls": b"0"}


@pytest.mark.parametrize(
    ("spec", "members", "said"),
    [
        ("a-{000..002}.tar", GOOD, "2 of 3 files are not there: .*a-001.tar"),
        ("a-{0..x}.tar", GOOD, r"\{0..x\} must be a range"),
        ("a-{3..1}.tar", GOOD, r"\{3..1\} must be a range"),
        ("{a-000,a-000}.tar", GOOD, "is named twice"),
        ("a.tar.gz", GOOD, "unpack it first"),
        ("none", GOOD, "none"),
        ("", {"a.png": b"1"}, r"a-000.tar/a has no label .cls or .json, only .png"),
        ("", {"a.cls": b"1"}, r"a-000.tar/a has no image such as .jpg or .png, only .cls"),
        ("", {"a.x.png": b"1", "a.cls": b"1"}, r"no image such .* as --image-field"),
        ("", GOOD | {"a.jpg": b""}, r"a has several images: .*--image-field png"),
        ("", GOOD | {"a.cls": b"cat"}, r"a-000.tar/a: .cls holds 'cat', but a label is a whole"),
        ("", GOOD | {"a.cls": b"-1"}, "holds -1, but"),
        ("", GOOD | {"a.cls": b"1.5"}, "holds '1.5'"),
        ("", {"a.png": b"", "a.json": b'{"label": true}'}, "'label' in .json holds True"),
        ("", {"a.png": b"", "a.json": b'{"label": null}'}, "'label' in .json holds None"),
        ("", {"a.png": b"", "a.json": b'{"id": 1}'}, "has no 'label' in .json; .*--label-field"),
        ("", {"a.png": b"", "a.json": b"{"}, "has no 'label' in .json"),
        ("", {"a.png": b"", "./a.png": b""}, "holds ./a.png twice"),
        ("", {"__meta__.json": b""}, "hold no sample"),
    ],
)
def test_shards_that_are_refused(tmp_path, spec, members, said):
    write_tar(tmp_path / "a-000.tar", members)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    refused(said, open_source, f"webdataset:{tmp_path}/{spec or 'a-000.tar'}")


@pytest.mark.parametrize(
    ("at", "length", "said"),
    [
        (1024, None, "no header at byte 1,024"),  # tarfile takes it for the end
        (3, None, "is not a whole tar file"),
        (None, 1100, "is not a whole tar file"),
        (None, 600, "is not a whole tar file"),
        (None, 0, "is not a whole tar file"),
    ],
)
def test_a_damaged_shard_loses_no_sample_in_silence(tmp_path, at, length, said):
    write_tar(tmp_path / "a.tar", GOOD | {"b.png": png(2), "b.cls": b"1"})
    assert len(open_source(f"webdataset:{tmp_path}")) == 2
    content = bytearray((tmp_path / "a.tar").read_bytes())
    if at is not None:
        content[at] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(content[:length])
    refused(said, open_source, f"webdataset:{tmp_path}")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"no image", "a.parquet#1': 8 bytes that are no image"),
        (png(1)[:48], "a.parquet#1': OSError"),
        (None, "a.parquet#1': it holds no bytes of an image but null"),
    ],
)
def test_a_bad_image_is_named_and_leaves_nothing(tmp_path, bad, said):
    images = [{"bytes": data, "path": "x.png"} for data in (png(0), bad, png(2))]
    write_rows(tmp_path / "in/a.parquet", [0, 1, 0], image=pa.array(images, IMAGE))
    source = open_source(f"parquet:{tmp_path}/in")
    refused(said, write_beton, source, tmp_path / "x.beton", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "in/a.parquet").write_bytes(b"PAR1 nothing")
    refused(r"a.parquet is not a whole Parquet file", open_source, f"parquet:{tmp_path}/in")
