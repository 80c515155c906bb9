"""Sources: order, labels, splits, subsets, and what bad input gets."""

import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdds_dist.errors import InputError
from tdds_dist.sources import open_source, stratified_pick


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (9, 7), color: object = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["", "imagenet", "imagefolder:", "cifar10", "digits:x", "synthetic", "synthetic:"])
def test_an_unknown_spec_lists_the_valid_forms(spec):
    forms = "imagefolder:DIR, cifar10:DIR, cifar100:DIR, digits, synthetic:N,CLASSES,SIZE"
    with pytest.raises(InputError, match=forms):
        open_source(spec)


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match=r"split='test'.*train, val"):
        open_source("digits", "test")


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


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install tdds-dist\[digits\]"):
        open_source("digits")


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
    for name in ("train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "val/cat/1.png", "val/dog/1.png"):
        save(tmp_path / name)
    assert open_source(f"imagefolder:{tmp_path}").path == ["train/cat/1.png", "train/dog/1.png", "train/dog/2.png"]
    assert open_source(f"imagefolder:{tmp_path}", "val").path == ["val/cat/1.png", "val/dog/1.png"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_splits_with_different_classes_are_refused(tmp_path, split):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
        save(tmp_path / name)
    with pytest.raises(InputError, match=r"same classes.*dog"):
        open_source(f"imagefolder:{tmp_path}", split)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        open_source(f"imagefolder:{tmp_path}/missing")
    with pytest.raises(InputError, match="no class folders"):
        open_source(f"imagefolder:{tmp_path}")
    save(tmp_path / "cat/1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="dog holds no image"):
        open_source(f"imagefolder:{tmp_path}")


def test_train_is_not_taken_for_a_class_when_val_is_missing(tmp_path):
    save(tmp_path / "train/cat/1.png")
    with pytest.raises(InputError, match="has train/ but no val/"):
        open_source(f"imagefolder:{tmp_path}", "val")


@pytest.mark.parametrize(("mode", "name", "color", "rgb"), [
    ("L", "x.png", 100, (100, 100, 100)), ("P", "x.png", 0, (0, 0, 0)), ("1", "x.png", 1, (255, 255, 255)),
    ("RGBA", "x.png", (10, 20, 30, 0), (10, 20, 30)), ("LA", "x.png", (50, 9), (50, 50, 50)),
    ("CMYK", "x.jpg", (0, 255, 255, 0), (255, 0, 0)), ("I;16", "x.png", 0x8001, (128, 128, 128)),
])
def test_every_pixel_format_becomes_rgb(tmp_path, mode, name, color, rgb):
    save(tmp_path / "a" / name, mode, color=color)
    image = open_source(f"imagefolder:{tmp_path}").read(0)
    assert (image.shape, image.dtype) == ((7, 9, 3), np.uint8)
    assert np.abs(image.astype(int) - rgb).max() <= 3


# --- CIFAR ---


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_a_missing_cifar_archive_says_where_to_get_it(tmp_path, kind):
    with pytest.raises(InputError, match=r"download https://\S+python.tar.gz and unpack it with `tar"):
        open_source(f"{kind}:{tmp_path}")


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
    with pytest.raises(InputError, match="missing or damaged"):
        open_source(f"cifar10:{tmp_path}")


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


@pytest.mark.parametrize("rest", ["10", "10,2", "10,2,x", "0,1,32", "2,3,32", "10,2,4"])
def test_bad_synthetic_numbers_are_refused(rest):
    with pytest.raises(InputError, match="such as synthetic:10000,10,64"):
        open_source(f"synthetic:{rest}")


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


@pytest.mark.parametrize("subset", [0, -1, 361])
def test_an_impossible_subset_is_refused(subset):
    with pytest.raises(InputError, match=rf"subset={subset} .*360"):
        open_source("digits", "val", subset=subset)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 50, 1010, 1109, 1110])
def test_stratified_pick_gives_every_class_its_share(count):
    label_N = np.repeat([0, 1, 3], [1000, 100, 10])
    index = stratified_pick(label_N, count, 0)
    num_C = np.bincount(label_N[index], minlength=4)
    assert len(np.unique(index)) == count
    assert (np.diff(index) > 0).all()
    assert np.abs(num_C - count * np.bincount(label_N) / 1110).max() < 2
    assert count < 3 or (num_C[[0, 1, 3]] > 0).all()
