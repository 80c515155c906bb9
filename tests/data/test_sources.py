"""Sources: order, labels, splits, subsets, noise on purpose, and what bad input gets."""

import gzip
import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdds_dist.data.corruptions import KINDS
from tdds_dist.data.sources import (
    THRESHOLD_CLASS,
    Source,
    open_source,
    stratified_pick,
    with_corruption,
    with_label_noise,
    with_new_labels,
    with_threshold_samples,
)
from tdds_dist.errors import InputError
from tests.make import refused


def save(
    path: Path, mode: str = "RGB", size: tuple[int, int] = (9, 7), color: object = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)  # type: ignore[arg-type]


FORMS = "imagefolder:DIR, .*SHARDS, cifar10:DIR, .*, idx:DIR, digits, synthetic:N"
ARCHIVE = r"download https://\S+python.tar.gz and unpack it with `tar"


@pytest.mark.parametrize(
    ("files", "spec", "options", "match"),
    [
        *(
            ((), form, {}, FORMS)
            for form in ("", "imagenet", "imagefolder:", "cifar10", "digits:x")
        ),
        *(((), form, {}, FORMS) for form in ("synthetic", "synthetic:")),
        *(
            ((), f"synthetic:{rest}", {}, "such as synthetic:10000,10,64")
            for rest in ("10", "10,2", "10,2,x", "0,1,32", "2,3,32", "10,2,4")
        ),
        ((), "digits", {"split": "test"}, r"split='test'.*train, val"),
        *(
            ((), "digits", {"split": "val", "subset": subset}, rf"subset={subset} .*360")
            for subset in (0, -1, 361)
        ),
        ((), "cifar10:DIR", {}, ARCHIVE),
        ((), "cifar100:DIR", {}, ARCHIVE),
        ((), "imagefolder:DIR/missing", {}, "is not a directory"),
        ((), "imagefolder:DIR", {}, "no class folders"),
        (("train/cat/1.png",), "imagefolder:DIR", {"split": "val"}, "has train/ but no val/"),
        ((), "digits", {"formats": "torchvision"}, "formats=torchvision is for imagefolder:DIR"),
        *(
            ((), "digits", {"holdout": 0.1, "split": split}, "has its own; leave --holdout out$")
            for split in ("train", "val")
        ),
        *(
            (("a/1.png", "a/2.png", "b/1.png"), "imagefolder:DIR", {"holdout": share}, said)
            for share, said in (
                (-0.1, "must be a share between 0 and 1; use 0.1"),
                (10, "must be a share between 0 and 1; use 0.1"),
                (float("nan"), "must be a share between 0 and 1; use 0.1"),
                (0.5, "are 2, but each of the 2 classes needs one for training; .* at most 0.333$"),
            )
        ),
        (("a/1.png",), "imagefolder:DIR", {"holdout": 0.1}, "needs one for training; add images"),
        (
            ("Train/a/1.png", "test/a/1.png"),
            "imagefolder:DIR/",
            {"holdout": 0.1},
            "has its own; leave --holdout out, or give imagefolder:[^:]*[^/]/Train$",
        ),
        (("a/1.png",), "imagefolder:DIR", {"holdout": 0.1, "seed": -1}, "seed=-1 of holdout must"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, files, spec, options, match):
    for name in files:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            save(tmp_path / name)
    refused(match, open_source, spec.replace("DIR", str(tmp_path)), **options)


# --- digits ---


def test_the_digits_splits_are_disjoint_stratified_and_complete():
    train, val = open_source("digits", "train"), open_source("digits", "val")
    assert (len(train), len(val)) == (1437, 360)
    assert sorted(train.path + val.path) == [f"digits/{i:04d}" for i in range(1797)]
    assert train.class_names == val.class_names == list("0123456789")
    share = np.bincount(val.label_N) / (np.bincount(val.label_N) + np.bincount(train.label_N))
    assert np.abs(share - 0.2).max() < 0.01
    assert train.label_N.dtype == np.int64


def test_digits_are_32_pixel_rgb_and_show_the_digit():
    from sklearn.datasets import load_digits

    source = open_source("digits", "val")
    image, row = source.read(3), int(source.path[3][-4:])
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert (image == image[:, :, :1]).all()
    small = image[:, :, 0].reshape(8, 4, 8, 4).mean(axis=(1, 3)) * 16 / 255
    assert np.abs(small - load_digits().images[row]).mean() < 1.5


# --- folders ---


def test_an_imagefolder_has_the_order_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b/2.png", "b/10.JPEG", "a/z/1.jpg", "a/y.bmp", "c/0.webp"):
        save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("not an image")
    source, reference = open_source(f"imagefolder:{tmp_path}"), ImageFolder(str(tmp_path))
    assert source.class_names == reference.classes
    assert [str(tmp_path / path) for path in source.path] == [path for path, _ in reference.samples]
    assert source.label_N.tolist() == reference.targets
    assert source.read(0).shape == (7, 9, 3)


def test_a_split_folder_is_used_and_stays_in_the_path(tmp_path):
    train = ["train/cat/1.png", "train/dog/1.png", "train/dog/2.png"]
    val = ["val/cat/1.png", "val/dog/1.png"]
    for name in (*train, *val):
        save(tmp_path / name)
    assert open_source(f"imagefolder:{tmp_path}").path == train
    assert open_source(f"imagefolder:{tmp_path}", "val").path == val


# --- CIFAR ---


def test_cifar_keeps_the_order_of_the_archive(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    content = {
        "data_batch_1": {"data": pixels[:4].reshape(4, -1), "labels": [1, 0, 2, 1]},
        "test_batch": {"data": pixels[4:].reshape(2, -1), "labels": [0, 2]},
        "batches.meta": {"label_names": ["plane", "car", "bird"]},
    }
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    md5 = {}
    for name, record in content.items():
        data = pickle.dumps(record)
        (folder / name).write_bytes(data)
        md5[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    train, val = open_source(f"cifar10:{tmp_path}"), open_source(f"cifar10:{tmp_path}", "val")
    assert train.path == [f"cifar10/train/{i:05d}" for i in range(4)]
    assert (train.label_N.tolist(), val.label_N.tolist()) == ([1, 0, 2, 1], [0, 2])
    assert train.class_names == ["plane", "car", "bird"]
    np.testing.assert_array_equal(val.read(1), pixels[5].transpose(1, 2, 0))
    (folder / "test_batch").write_bytes(b"damaged")
    refused("missing or damaged", open_source, f"cifar10:{tmp_path}")


# --- IDX ---

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


def idx(data: np.ndarray, kind: int = 8) -> bytes:
    """The bytes of an IDX file, here of arrays of up to three dimensions."""
    return bytes([0, 0, kind, data.ndim]) + np.array(data.shape, ">u4").tobytes() + data.tobytes()


def save_idx(
    folder: Path, part: str = "train", labels: object = (2, 0, 1), end: str = ".gz"
) -> np.ndarray:
    """Write random images of 5 x 4 pixels and these labels; return the images."""
    folder.mkdir(parents=True, exist_ok=True)
    label_N = np.array(labels, np.uint8)
    image_N = np.random.default_rng(len(part)).integers(0, 256, (len(label_N), 5, 4), np.uint8)
    for name, data in (("images-idx3", image_N), ("labels-idx1", label_N)):
        content = gzip.compress(idx(data)) if end else idx(data)
        (folder / f"{part}-{name}-ubyte{end}").write_bytes(content)
    return image_N


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_are_read_in_their_order_and_grey_becomes_rgb(tmp_path, end):
    image_N = save_idx(tmp_path, "train", end=end)
    val_N = save_idx(tmp_path, "t10k", [3, 3], end="")
    train, val = (open_source(f"idx:{tmp_path}", split) for split in ("train", "val"))
    assert train.path == [f"train-images-idx3-ubyte#0000{i}" for i in range(3)]
    assert val.path[1] == "t10k-images-idx3-ubyte#00001"
    assert (train.label_N.tolist(), val.label_N.tolist()) == ([2, 0, 1], [3, 3])
    assert train.label_N.dtype == np.int64
    assert train.class_names == val.class_names == ["0", "1", "2", "3"]  # 3 is in val only
    assert train.splits == ("train", "val")
    for channel in range(3):
        np.testing.assert_array_equal(train.read(2)[:, :, channel], image_N[2])
        np.testing.assert_array_equal(val.read(0)[:, :, channel], val_N[0])
    assert both(train, 0.4, 1).settings == {"label_noise": 0.4, "corrupt": 0.4, "noise_seed": 1}


def test_emnist_is_turned_and_its_letters_begin_at_1(tmp_path):
    image_N = save_idx(tmp_path, "emnist-letters-train", [1, 26, 3])
    save_idx(tmp_path, "emnist-letters-test", [2])
    save_idx(tmp_path, "emnist-balanced-train", [0, 46])
    with pytest.raises(InputError, match=rf"name one: idx:{tmp_path}/emnist-balanced, .*-letters$"):
        open_source(f"idx:{tmp_path}")
    train = open_source(f"idx:{tmp_path}/emnist-letters")
    assert train.class_names == list("abcdefghijklmnopqrstuvwxyz")
    assert train.label_N.tolist() == [0, 25, 2]
    np.testing.assert_array_equal(train.read(1)[:, :, 0], image_N[1].T)
    assert open_source(f"idx:{tmp_path}/emnist-letters", "val").label_N.tolist() == [1]
    balanced = open_source(f"idx:{tmp_path}/emnist-balanced")
    assert "".join(balanced.class_names) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"


@pytest.mark.parametrize(
    ("folder", "labels", "last"),
    [
        ("fashion-mnist", [0, 1], "Ankle boot"),
        ("FashionMNIST/raw", [9], "Ankle boot"),
        ("KMNIST", [3], "wo"),
        ("fashion-mnist/copy", [9], "9"),  # another folder may hold anything
        ("fashion-mnist", [10], "10"),  # and this is another data set
        ("mnist", [7], "7"),
    ],
)
def test_classes_are_named_where_the_folder_says_what_they_are(tmp_path, folder, labels, last):
    save_idx(tmp_path / folder, labels=labels)
    source = open_source(f"idx:{tmp_path / folder}")
    assert source.class_names[-1] == last
    assert source.label_N.tolist() == labels


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def packed(numbers: np.ndarray, cut: int | None = None, more: bytes = b"", kind: int = 8) -> bytes:
    return gzip.compress(idx(numbers, kind)[:cut] + more)


GREYS, NUMBERS = np.zeros((3, 5, 4), "u1"), np.zeros(3, "u1")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (LABELS, None, f"{IMAGES} has no labels; put train-labels-idx1-ubyte or .* beside"),
        (IMAGES, None, "no file .*/train-images-idx3-ubyte or .gz; give the folder"),
        ("train-images-idx3-ubyte", b"", "both images of train; move one of them away"),
        ("train-labels-idx1-ubyte", b"", "are both there; move one of them away"),
        (IMAGES, b"\x1f\x8b", "cannot be unpacked .*; get it again"),
        (IMAGES, packed(GREYS)[:-9], "cannot be unpacked"),
        (IMAGES, b"<html>", "cannot be unpacked"),
        (IMAGES, gzip.compress(b""), "begins with nothing, and .* images with 00000803"),
        (IMAGES, packed(NUMBERS), "begins with 00000801, and"),
        (LABELS, packed(np.zeros(3, ">i4"), kind=12), "begins with 00000c01, and"),
        (LABELS, packed(NUMBERS, 7), "its 4 bytes of sizes"),
        (LABELS, packed(NUMBERS, -1), "states 3 bytes, and holds 2"),
        (IMAGES, packed(GREYS, more=b"x"), "3 x 5 x 4 .* 61"),
        (IMAGES, packed(GREYS[:0]), "0 x 5 x 4 .* holds 0"),
        (IMAGES, packed(np.zeros((4, 5, 4), "u1")), "4 images, .* 3 labels"),
    ],
    ids=lambda part: "bytes" if isinstance(part, bytes) else None,  # gzip puts the time into them
)
def test_idx_files_that_are_not_whole_are_refused(tmp_path, name, content, match):
    save_idx(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    refused(match, open_source, f"idx:{tmp_path}")


def test_the_folder_of_idx_files_is_named_where_another_is_given(tmp_path):
    save_idx(tmp_path / "MNIST/raw", labels=[0, 1, 1, 0])
    refused(f"; give idx:{tmp_path}/MNIST/raw$", open_source, f"idx:{tmp_path}/MNIST")
    no_split = f"no val split here, only {IMAGES}; .* or use --holdout"
    refused(no_split, open_source, f"idx:{tmp_path}/MNIST/raw", "val")
    refused("is not a directory; give the folder", open_source, f"idx:{tmp_path}/nowhere/kmnist")
    assert len(open_source(f"idx:{tmp_path}/MNIST/raw", "val", holdout=0.25)) == 1


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs dataset-fashion-mnist of Debian")
def test_fashion_mnist_is_what_was_published():
    train, val = (open_source(f"idx:{FASHION_MNIST}", split) for split in ("train", "val"))
    assert np.bincount(train.label_N).tolist() == [6000] * 10
    assert np.bincount(val.label_N).tolist() == [1000] * 10
    assert train.class_names[train.label_N[0]] == "Ankle boot"
    assert train.read(0).shape == (28, 28, 3)
    grey_N = np.stack([train.read(i)[:, :, 0] for i in range(len(train))])
    assert (round(grey_N.mean(), 1), round(grey_N.std(), 1)) == (72.9, 90.0)  # as in configs/


# --- synthetic ---


def test_synthetic_images_depend_on_split_and_index_only():
    small, large = open_source("synthetic:20,4,24"), open_source("synthetic:40,4,24")
    val = open_source("synthetic:20,4,24", "val")
    np.testing.assert_array_equal(small.read(7), large.read(7))
    assert small.read(7).shape == (24, 24, 3)
    assert (small.read(7) != val.read(7)).any()
    assert (small.read(7) != small.read(11)).any()
    assert np.bincount(small.label_N).tolist() == [5, 5, 5, 5]


def test_synthetic_images_compress_like_photographs():
    import io

    file = io.BytesIO()
    Image.fromarray(open_source("synthetic:1,1,256").read(0)).save(file, "jpeg", quality=90)
    assert 0.2 < len(file.getvalue()) / 256**2 < 0.7  # bytes per pixel; photographs: 0.3 to 0.6


# --- subsets ---


def test_a_subset_is_stratified_repeatable_and_in_source_order():
    whole, part = open_source("synthetic:100,4,8"), open_source("synthetic:100,4,8", subset=10)
    row = [whole.path.index(path) for path in part.path]
    assert row == sorted(row)
    assert part.path == open_source("synthetic:100,4,8", subset=10).path
    assert sorted(np.bincount(part.label_N).tolist()) == [2, 2, 3, 3]
    assert part.settings == {"subset": 10}
    for i in range(10):
        np.testing.assert_array_equal(part.read(i), whole.read(row[i]))
    assert open_source("synthetic:100,4,8", subset=100).path == whole.path


@pytest.mark.parametrize("count", [1, 2, 3, 4, 50, 1010, 1109, 1110])
def test_stratified_pick_gives_every_class_its_share(count):
    label_N = np.repeat([0, 1, 3], [1000, 100, 10])
    index = stratified_pick(label_N, count, 0)
    num_C = np.bincount(label_N[index], minlength=4)
    assert len(np.unique(index)) == count
    assert (np.diff(index) > 0).all()
    assert np.abs(num_C - count * np.bincount(label_N) / 1110).max() < 2
    assert count < 3 or (num_C[[0, 1, 3]] > 0).all()


# --- a part held out ---


@pytest.mark.parametrize("names", ["a", "train"])
def test_a_held_out_part_is_stratified_and_the_rest_is_train(tmp_path, names):
    """Of a flat folder, and of one with a train split only."""
    counts = {"cat": 40, "cow": 3, "dog": 20, "eel": 1}
    prefix = "train/" if names == "train" else ""
    for name, count in counts.items():
        for i in range(count):
            save(tmp_path / f"{prefix}{name}/{i:02d}.png", color=(i, 0, 0))
    spec = f"imagefolder:{tmp_path}"
    whole = open_source(spec)

    def parts(share: float, seed: int) -> list[Source]:
        return [open_source(spec, split, holdout=share, seed=seed) for split in ("train", "val")]

    train, val = parts(0.1, 5)
    assert sorted(train.path + val.path) == whole.path
    assert train.path == [path for path in whole.path if path in set(train.path)]
    assert (train.split, val.split) == ("train", "val")
    expected = whole.settings | {"holdout": 0.1, "holdout_seed": 5}
    assert train.settings == val.settings == expected
    assert np.bincount(val.label_N, minlength=4).tolist() == [3, 1, 2, 0]
    assert (
        "holdout: 6 of 64 images are val (seed 5); classes with too few images to be in it: 1"
        in val.notes[-1]
    )
    for i, path in enumerate(val.path):
        assert val.read(i)[0, 0, 0] == int(path[-6:-4])
        assert path.removeprefix(prefix).startswith(f"{val.class_names[val.label_N[i]]}/")
    assert parts(0.1, 5)[1].path == val.path != parts(0.1, 6)[1].path
    assert {*val.path} < {*parts(0.3, 5)[1].path}
    assert np.bincount(parts(0.9, 5)[0].label_N).tolist() == [3, 1, 1, 1]
    assert len(open_source(spec, "val", 3, holdout=0.1, seed=5)) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 50, 700, 1107])
def test_every_class_keeps_what_is_left_of_it(count):
    label_N = np.repeat([0, 1, 3, 4], [1000, 100, 10, 1])
    index = stratified_pick(label_N, count, 0, leave=1)
    left_C = np.bincount(np.delete(label_N, index), minlength=5)
    assert len(np.unique(index)) == count
    assert (left_C[[0, 1, 3, 4]] > 0).all()
    assert count < 3 or (left_C[[0, 1, 3]] < [1000, 100, 10]).all()


# --- noise on purpose ---


@pytest.mark.parametrize(
    ("rate", "changed"), [(0.2, 200), (0.0004, 0), (0.0006, 1), (0.123, 123), (0.9996, 1000)]
)
def test_label_noise_changes_exactly_its_share_of_the_labels(rate, changed):
    clean = open_source("synthetic:1000,4,8")
    noisy = with_label_noise(clean, rate, 5)
    assert (noisy.label_N != clean.label_N).sum() == changed
    assert (noisy.label_N.min(), noisy.label_N.max(), noisy.label_N.dtype) == (0, 3, np.int64)
    np.testing.assert_array_equal(noisy.true_label_N, clean.label_N)
    assert clean.label_N.tolist() == [i % 4 for i in range(1000)]
    assert noisy.settings == {"label_noise": rate, "noise_seed": 5}
    assert (noisy.path, noisy.corruption) == (clean.path, None)
    np.testing.assert_array_equal(noisy.read(7), clean.read(7))


def test_label_noise_is_symmetric():
    clean = open_source("synthetic:12000,4,8")
    noisy = with_label_noise(clean, 0.5, 0)
    num_CC = np.zeros((4, 4), int)
    np.add.at(num_CC, (clean.label_N, noisy.label_N), 1)
    assert np.abs(np.diag(num_CC) - 1500).max() < 120  # three standard deviations: 82
    assert np.abs(num_CC[~np.eye(4, dtype=bool)] - 500).max() < 80  # 64


@pytest.mark.parametrize(
    ("rate", "counts"),
    [
        (0.2, [40, 40, 40, 40, 40]),
        (0.2031, [41, 41, 41, 40, 40]),
        (0.002, [1, 1, 0, 0, 0]),
        (0.9999, [200] * 5),
        (0.0004, [0] * 5),
    ],
)
def test_corruption_takes_exactly_its_share_in_equal_parts(rate, counts):
    clean = open_source("synthetic:1000,4,8")
    source = with_corruption(clean, rate, 5)
    assert [source.corruption.count(kind) for kind in KINDS] == counts
    assert source.corruption.count("") == 1000 - sum(counts)
    assert source.settings == {"corrupt": rate, "noise_seed": 5}
    assert source.true_label_N is None
    np.testing.assert_array_equal(source.label_N, clean.label_N)


def both(source: Source, rate: float, seed: int) -> Source:
    return with_corruption(with_label_noise(source, rate, seed), rate, seed)


def test_noise_depends_on_seed_and_index_only():
    clean = open_source("synthetic:300,4,16")
    one, again, other = (both(clean, 0.4, seed) for seed in (1, 1, 2))
    assert (one.label_N.tolist(), one.corruption) == (again.label_N.tolist(), again.corruption)
    pairs = enumerate(zip(one.corruption, other.corruption, strict=True))
    # the other kinds have few outcomes at 16 pixels
    shared = [i for i, (kind, same) in pairs if kind == same and kind in ("gaussian_noise", "fog")]
    assert shared
    images = {i: one.read(i) for i in range(300)}
    for i in reversed(range(300)):  # in another order
        np.testing.assert_array_equal(again.read(i), images[i])
    assert (one.label_N != other.label_N).any()
    assert one.corruption != other.corruption
    for i in shared:
        assert (one.read(i) != other.read(i)).any()


def test_two_images_of_one_kind_are_corrupted_differently():
    same = np.full((16, 16, 3), 100, np.uint8)
    source = with_corruption(
        replace(open_source("synthetic:20,2,16"), reader=lambda i: same), 0.5, 0
    )
    for kind in ("gaussian_noise", "occlusion", "fog"):  # a plain image shows no blur
        first, second = (i for i in range(20) if source.corruption[i] == kind)
        assert (source.read(first) != source.read(second)).any()


def test_less_noise_is_part_of_more():
    clean = open_source("synthetic:300,5,8")
    less, more = both(clean, 0.1, 3), both(clean, 0.3, 3)
    changed = less.label_N != clean.label_N
    np.testing.assert_array_equal(less.label_N[changed], more.label_N[changed])
    assert {(i, kind) for i, kind in enumerate(less.corruption) if kind} < set(
        enumerate(more.corruption)
    )


def test_labels_and_images_are_drawn_apart():
    clean = open_source("synthetic:2000,4,8")
    one, other = both(clean, 0.5, 9), with_label_noise(with_corruption(clean, 0.5, 9), 0.5, 9)
    assert (one.corruption, one.settings) == (other.corruption, other.settings)
    np.testing.assert_array_equal(one.label_N, other.label_N)
    np.testing.assert_array_equal(one.true_label_N, other.true_label_N)
    hit = (one.label_N != clean.label_N) & (np.array(one.corruption) != "")
    assert abs(hit.sum() - 500) < 60  # three standard deviations: 34


def test_noise_comes_after_the_subset():
    part = open_source("synthetic:200,4,16", subset=50)
    noisy = both(part, 0.2, 4)
    assert (noisy.label_N != part.label_N).sum() == 10
    assert [noisy.corruption.count(kind) for kind in KINDS] == [2] * 5
    assert noisy.path == part.path
    assert noisy.settings == {"subset": 50, "label_noise": 0.2, "corrupt": 0.2, "noise_seed": 4}
    for i in range(50):
        assert (noisy.read(i) != part.read(i)).any() == bool(noisy.corruption[i])


def test_no_noise_leaves_the_source_alone():
    source = open_source("synthetic:10,1,8")
    assert both(source, 0, 1) is source


@pytest.mark.parametrize("add", [with_label_noise, with_corruption])
@pytest.mark.parametrize(
    ("rate", "seed", "message"),
    [
        (1, 0, r"=1 must be a share in \[0, 1\); use"),
        (-0.1, 0, "=-0.1 must be a share"),
        (float("nan"), 0, "=nan must be"),
        (20, 0, "=20 must be"),
        (0.1, -1, "seed=-1 of .* between 0 and 4294967295; choose"),
        (0.1, 2**32, "seed=4294967296 of"),
    ],
)
def test_impossible_noise_is_refused(add, rate, seed, message):
    refused(message, add, open_source("synthetic:10,2,8"), rate, seed)


def test_noise_that_the_manifest_could_not_describe_is_refused():
    source = open_source("synthetic:10,2,8")
    lone = open_source("synthetic:10,1,8")
    noisy, hazy = with_label_noise(source, 0.2, 1), with_corruption(source, 0.2, 0)
    another = r"label_noise=0.2 needs another class .* has 1; use a source"
    refused(another, with_label_noise, lone, 0.2, 0)
    twice = r"label_noise=0.3 comes on top of label_noise=0.2.*start from the clean"
    refused(twice, with_label_noise, noisy, 0.3, 1)
    refused("corrupt=0.3 comes on top of corrupt=0.2", with_corruption, hazy, 0.3, 0)
    same_seed = r"seed=2 of corrupt must be the noise_seed=1 .*use that seed"
    refused(same_seed, with_corruption, noisy, 0.2, 2)


# --- labels that were decided on ---


def relabelled(folder, text, subset=None):
    (folder / "d.csv").write_text(text)
    return with_new_labels(open_source("digits", "val", subset), [folder / "d.csv"])


def test_decisions_become_labels_and_leave_their_traces(tmp_path):
    clean = open_source("digits", "val")
    old, new = clean.class_names[clean.label_N[3]], clean.class_names[clean.label_N[3] - 1]
    kept = clean.class_names[clean.label_N[5]]
    text = f"index,path,label,new_label\n3,{clean.path[3]},{old},{new}\n5,,{kept},{kept}\n"
    source = relabelled(tmp_path, text.replace("5,,", f"5,{clean.path[5]},"))
    assert np.flatnonzero(source.label_N != clean.label_N).tolist() == [3]
    assert source.class_names[source.label_N[3]] == new
    digest = hashlib.sha256((tmp_path / "d.csv").read_bytes()).hexdigest()
    assert source.settings == {"relabel": ["d.csv"], "relabel_sha256": [digest], "relabelled": 1}
    # a second round is about what the first one left
    (tmp_path / "e.csv").write_text(f"index,label,new_label\n3,{new},{old}\n5,{kept},{new}\n")
    both = with_new_labels(clean, [tmp_path / "d.csv", tmp_path / "e.csv"])
    assert np.flatnonzero(both.label_N != clean.label_N).tolist() == [5]
    assert (both.settings["relabel"], both.settings["relabelled"]) == (["d.csv", "e.csv"], 1)
    # another page of the first round holds a decision again
    (tmp_path / "g.csv").write_text(f"index,label,new_label\n3,{old},{new}\n")
    again = with_new_labels(clean, [tmp_path / "d.csv", tmp_path / "g.csv"])
    assert (again.label_N == source.label_N).all()
    (tmp_path / "f.csv").write_text("index,path,label,new_label\n")  # nothing was decided
    assert with_new_labels(clean, [tmp_path / "f.csv"]).settings["relabelled"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column index, label, new_label"),
        ("index,label\n3,1\n", "has no column new_label"),
        ("index,label,new_label\n360,1,2\n", r"line 2: index '360' is not in \[0, 360\)"),
        ("index,label,new_label\n-1,1,2\n", r"line 2: index '-1' is not in"),
        ("index,path,label,new_label\n0,x.png,1,2\n", r"image 0 is 'digits/\d+' here, not 'x.png'"),
        ("index,label,new_label\n0,ten,2\n", r"image 0 has label '\d' here, not 'ten'"),
        ("index,label,new_label\n0,LABEL,ten\n", "class 'ten' is unknown"),
        ("index,label,new_label\n0,LABEL\n", "class None is unknown"),
        ("label,new_label,index\nLABEL,ten\n", "index None is not in"),
        ("index,label,new_label\n0,LABEL,1\n0,1,2\n", "line 3: image 0 is there twice"),
    ],
)
def test_decisions_about_other_images_are_refused(tmp_path, text, words):
    label = open_source("digits", "val").label_N[0]
    with pytest.raises(InputError, match=words) as error:
        relabelled(tmp_path, text.replace("LABEL", str(label)))
    assert str(error.value).endswith("give decisions of `tdds suspects` on this source")


def test_a_file_of_decisions_that_cannot_be_read(tmp_path):
    digits, no_text = open_source("digits", "val"), tmp_path / "d.csv"
    no_text.write_bytes(b"index,label,new_label\n0,\xff,1\n")
    for path in (tmp_path / "none.csv", tmp_path, no_text):
        refused("cannot be read", with_new_labels, digits, [path])


def test_threshold_samples_have_a_class_of_their_own():
    clean = open_source("digits")
    one, two = (with_threshold_samples(clean, part, 4) for part in (1, 2))
    drawn = [np.flatnonzero(source.label_N == 10) for source in (one, two)]
    assert [len(part) for part in drawn] == [round(1437 / 11)] * 2
    assert not {*drawn[0].tolist()} & {*drawn[1].tolist()}
    others = np.setdiff1d(np.arange(1437), drawn[0])
    assert (one.label_N[others] == clean.label_N[others]).all()
    assert one.class_names == [*clean.class_names, THRESHOLD_CLASS]
    assert (one.true_label_N == clean.label_N).all()
    assert one.settings == {"threshold_samples": 1, "threshold_seed": 4}
    val = with_threshold_samples(open_source("digits", "val"), 1, 4)
    assert val.class_names == one.class_names
    assert val.label_N.max() == 9
    for source, part, words in (
        (clean, 3, "must be 1 or 2"),
        (one, 1, "has a class 'threshold samples' already"),
        (open_source("digits", "train", 3), 1, "takes 1 in 11 images, and digits has 3"),
    ):
        refused(words, with_threshold_samples, source, part, 0)
