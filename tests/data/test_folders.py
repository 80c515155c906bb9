"""Folders of images: what is a split, a class, an image; links; and what is said or refused."""

import os
import re
from pathlib import Path

import pytest
from PIL import Image

from tdds_dist.data.folders import ImageFiles, read_folder, split_role
from tdds_dist.errors import InputError
from tests.make import refused

_FORMATS = {".png": "PNG", ".gif": "GIF", ".avif": "AVIF", ".tga": "TGA", ".bin": "TGA"}


def make(root: Path, *names: str) -> None:
    """Make `folder/`, `link -> target`, and files: text as .txt, empty as 0*, else images in the
    format of their suffix, or JPEG."""
    for name in names:
        name, _, target = name.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif path.suffix == ".txt":
            path.write_text("GIF, as this text begins, is none")
        elif path.name.startswith("0"):
            path.touch()
        else:
            format_ = _FORMATS.get(path.suffix, "JPEG")
            Image.new("RGB", (4, 3)).save(path, format_)


def read(root: Path, split: str | None = "train", **options) -> ImageFiles:
    return read_folder(f"imagefolder:{root}", root, split, **options)


def cat_and_dog(*folders: str) -> list[str]:
    return [f"{folder}/{name}/1.jpg" for folder in folders for name in ("cat", "dog")]


# --- splits and classes ---


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("train", "train Train TRAINING train2017 training_set TrainImages img_train 1_train trn"),
        ("train", "trainval ILSVRC2012_img_train seg_train train-images Training.Data"),
        ("val", "val Valid VALIDATION val2017 validation-set valid_images dev eval holdout"),
        ("test", "test Testing test2017 test_images tests"),
        (None, "trains freight_train training_wheels bullettrain value device contest cat tester"),
        (None, "evaluate_me 2017 images set valley trained attest development_board"),
    ],
)
def test_splits_are_known_by_their_usual_names(role, names):
    assert {split_role(name) for name in names.split()} == {role}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("train", "val", "others"),
    [
        ("train", "val", ()),
        ("Train", "Val", ()),
        ("training", "validation", ()),
        ("train2017", "val2017", ()),
        ("seg_train", "seg_test", ()),
        ("train", "test", ("annotations/a.txt",)),
        ("train", "valid", cat_and_dog("test")),
        ("train", "val", ("test/1.jpg", "cover.jpg", "unlabeled/1.jpg")),
        ("train", "val", ("train/cover.jpg", "val/cover.jpg", ".git/1.jpg")),
    ],
)
def test_splits_hold_class_folders(tmp_path, train, val, others, split):
    make(tmp_path, *cat_and_dog(train, val), *others)
    found = read(tmp_path, split)
    assert (found.split, found.splits, found.class_names) == (
        split,
        ("train", "val"),
        ["cat", "dog"],
    )
    folder = train if split == "train" else val
    assert found.path == [f"{folder}/cat/1.jpg", f"{folder}/dog/1.jpg"]
    assert found.label_N.tolist() == [0, 1]
    assert found.other == f"imagefolder:{tmp_path}"
    assert f"train is {train}/; val is {val}/" in found.notes[0]
    for name in {name.split("/")[0] for name in others} & {"test", "unlabeled"}:
        assert re.search(rf"not used: .*{name}/", found.notes[0])


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path, "bus/1.jpg", "car/1.jpg", "train/1.jpg")
    found = read(tmp_path)
    assert (found.class_names, found.splits, found.other) == (
        ["bus", "car", "train"],
        ("train",),
        None,
    )
    assert "train/ is a class, since no class folders lie in it" in found.notes[0]


def test_folders_that_are_the_same_in_every_class_are_said(tmp_path):
    make(tmp_path, *cat_and_dog("fold1", "fold2"))
    assert "each holds cat, dog, which are read as one" in read(tmp_path).notes[0]
    make(tmp_path, "fold2/cow/1.jpg")
    assert "each holds" not in read(tmp_path).notes[0]


def test_without_a_split_only_the_plain_names_are_taken(tmp_path):
    make(tmp_path, *cat_and_dog("a/train", "a/Testing", "b/Train", "b/Val", "c"))
    assert read(tmp_path / "a", None).split == read(tmp_path / "c", None).split == "train"
    refused(r"Train/, Val/ look like splits; give --split train or", read, tmp_path / "b", None)


def test_the_folder_of_one_split_knows_the_other(tmp_path):
    make(tmp_path, *cat_and_dog("train", "val", "test"))
    train, val = read(tmp_path / "train"), read(tmp_path / "val")
    assert (train.split, train.splits, train.other) == (
        "train",
        ("train",),
        f"imagefolder:{tmp_path}/val",
    )
    assert (val.split, val.splits, val.other) == ("val", ("val",), f"imagefolder:{tmp_path}/train")
    assert read(tmp_path / "val", "val").path == ["cat/1.jpg", "dog/1.jpg"]
    with pytest.raises(InputError, match=r"the train split only; give imagefolder:\S+/val for val"):
        read(tmp_path / "train", "val")


def test_labels_are_those_of_train_where_val_lacks_a_class(tmp_path):
    make(tmp_path, *cat_and_dog("train"), "val/dog/1.jpg", "val/empty/")
    found = read(tmp_path, "val")
    assert (found.class_names, found.path, found.label_N.tolist()) == (
        ["cat", "dog"],
        ["val/dog/1.jpg"],
        [1],
    )
    assert "classes without an image in val: cat" in found.notes


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (cat_and_dog("train", "training", "val"), None, "train/, training/ can each be the train"),
        (cat_and_dog("train", "Train"), "train", "Train/, train/ can each be the train split; move"),
        (cat_and_dog("train", "val", "valid"), "val", "val/, valid/ can each be the val split"),
        (cat_and_dog("train", "test", "Testing"), "val", "can each be the val split"),
        (cat_and_dog("", ""), "val", "has folders of classes but no val split; hold out .* leave --split out"),
        (cat_and_dog("train"), "val", "has train/ but no val/; hold out .*--holdout 0.1 .* without --split$"),
        ((*cat_and_dog("train"), "val/1.jpg"), "val", "val/ without class folders that hold images"),
        (cat_and_dog("val"), None, "has val/ but no train/; add it, or give .*imagefolder:.*/val$"),
        (("train/cat/", *cat_and_dog("val")), "train", "train/ without class folders that hold"),
        (("bus/1.jpg", "train/steam/1.jpg"), "train", "bus/ beside it holds images too; give .*ren"),
        (cat_and_dog("control", "test"), "train", "test/ is named like a split .*control/ beside"),
        (("train/1.jpg", "val/1.jpg"), "train", "hold images but no class folders.*<class>/, or ren"),
        (("bus/1.jpg", "train/1.jpg", "test/1.jpg"), "train", "hold images but no class folders"),
        (("train/1.jpg",), "train", "train/ hold images but no class folders"),
        (cat_and_dog("train_old", "val_old"), "train", "look like splits; name them train/ and val/"),
        (cat_and_dog("images"), "train", "one folder only, images/, .*give imagefolder:.*/images$"),
        (cat_and_dog("x/train", "x/val"), "train", "one folder only, x/, .*give imagefolder:.*/x$"),
        (cat_and_dog("train/train", "val/val"), "train", "give imagefolder:.*/train/train$"),
        (("a/train/1.jpg", "a/test/1.jpg", "b/1.jpg"), "train", "class folder .*/a holds splits"),
        ((*cat_and_dog("train"), "val -> train"), "train", "are the same folder; remove the link"),
        (("train/cat/1.jpg", *cat_and_dog("val")), "train", "no dog/ which val/ has; put .*move"),
        (("train/cat/1.jpg", *cat_and_dog("val")), "val", "no dog/ which val/ has; put .*move"),
        (("cat/1.jpg", "dog/a.txt", "dog/0"), "train", r"dog holds no image \(left out: .*1 .txt"),
        ((), "train", "no class folders; expected"),
        (("1.jpg",), "train", "no class folders; expected"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, names, split, said):
    make(tmp_path, *(name.lstrip("/") for name in names))
    refused(said, read, tmp_path, split)


@pytest.mark.parametrize("sign", ["\n", "\r", "\x1b", "\x85", "\u2028"])
def test_a_name_with_line_feeds_is_refused_in_one_line(tmp_path, sign):
    make(tmp_path, *cat_and_dog("train", "val"), f"val/a{sign}b/1.jpg")
    with pytest.raises(InputError) as refusal:
        read(tmp_path)
    assert sign not in str(refusal.value)
    assert f"move {tmp_path}/val/a{repr(sign)[1:-1]}b out" in str(refusal.value)


def test_no_way_out_leads_back(tmp_path):
    """A class without training images: each of the two ways out, from either split."""
    make(tmp_path, "train/cat/1.jpg", *cat_and_dog("val"))
    (tmp_path / "train/dog").mkdir()  # "put images of it into", not done
    for split in ("train", "val"):
        refused(r"train/dog holds no image.*together with \S+/val/dog$", read, tmp_path, split)
    make(tmp_path, "train/dog/1.jpg")
    assert len(read(tmp_path).path) == len(read(tmp_path, "val").path) == 2
    for file in ("train/dog/1.jpg", "val/dog/1.jpg"):
        (tmp_path / file).unlink()
        (tmp_path / file).parent.rmdir()
    assert read(tmp_path).class_names == read(tmp_path, "val").class_names == ["cat"]


# --- files ---

MIXED = (
    *("cat/1.jpg", "cat/2.GIF", "cat/3.avif", "cat/photo", "cat/x.tga", "cat/y.dat", "dog/1.jfif"),
    *(
        "cat/a.txt",
        "cat/0",
        "cat/0.json",
        "cat/1.jpg.bak",
        "cat/b.jpg~",
        "dog/raw.dng",
        "cover.png",
    ),
    *(
        "cat/._1.jpg",
        "cat/.ipynb_checkpoints/1-checkpoint.jpg",
        "dog/@eaDir/1.jpg",
        "dog/Thumbs.db",
    ),
    *(".git/1.jpg", "__MACOSX/cat/1.jpg", "dog/gone -> nowhere"),
    "cat/x.bin",  # nothing but its suffix says that a TGA is one
)


def test_an_image_is_what_pillow_opens_and_the_rest_is_counted(tmp_path):
    make(tmp_path, *MIXED)
    os.mkfifo(tmp_path / "dog/pipe")
    os.mkfifo(tmp_path / "dog/pipe.jpg")
    found = read(tmp_path)
    taken = ["cat/1.jpg", "cat/2.GIF", "cat/3.avif", "cat/photo", "cat/x.tga", "cat/y.dat"]
    assert found.class_names == ["cat", "dog"]
    assert found.path == [*taken, "dog/1.jfif"]
    assert found.num_left_out == len(MIXED) - 7 + 2
    left_out, by_content = found.notes[1:]
    for said in (
        "6 hidden",
        "2 empty",
        "2 no file",
        "1 .txt",
        "1 .dng",
        "1 .jpg~",
        "1 broken link",
    ):
        assert said in left_out
    assert "(such as cat/photo, cat/x.tga, cat/y.dat)" in by_content
    refused(
        r"--strict, but left out 17 files: 6 hidden.*leave --strict", read, tmp_path, strict=True
    )
    make(tmp_path / "clean", "cat/1.jpg", "cat/2")
    assert read(tmp_path / "clean", strict=True).path == ["cat/1.jpg", "cat/2"]


def test_the_suffixes_of_torchvision_are_a_switch(tmp_path):
    make(tmp_path, *MIXED)
    refused(r"dog holds no image \(left out: .*1 .jfif", read, tmp_path, formats="torchvision")
    make(tmp_path, "dog/1.png")
    found = read(tmp_path, formats="torchvision")
    assert found.path == ["cat/1.jpg", "dog/1.png"]
    assert "1 .gif" in found.notes[1]


# --- links ---


def test_links_are_followed_once_and_never_up(tmp_path):
    make(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg", "up -> ..")
    make(tmp_path / "store", "3.jpg")
    make(
        tmp_path / "images",
        *(
            "cat/1.jpg",
            "dog/1.jpg",
            "cat/more -> ../../elsewhere",
            "dog/3.jpg -> ../../store/3.jpg",
        ),
        *(
            "cat/loop -> .",
            "cat/a/loop -> ../..",
            "cat/parent -> ../..",
            "all -> ..",
            "cow -> ../store",
        ),
    )
    found = read(tmp_path / "images")
    assert found.path == [
        *("cat/1.jpg", "cat/more/1.jpg", "cat/more/deep/2.jpg"),
        *("cow/3.jpg", "dog/1.jpg", "dog/3.jpg"),
    ]
    said = "\n".join(found.notes)
    assert "5 link to a folder above it" in said
    assert "followed links to folders: 2 (such as cat/more -> ../../elsewhere)" in said
    assert "followed links to files: 1 (such as dog/3.jpg -> ../../store/3.jpg)" in said


@pytest.mark.parametrize(
    "link",
    [
        *("cat/l -> ../dog", "kitty -> cat", "cat/l -> a", "dog/l -> ../cat/a"),
        *("cat/l -> ../../more", "cat/l -> ../../more/deep"),
    ],
)
def test_one_folder_in_two_places_is_refused(tmp_path, link):
    make(tmp_path / "more", "1.jpg", "deep/2.jpg")
    make(tmp_path / "images", "cat/a/1.jpg", "dog/1.jpg", "dog/more -> ../../more", link)
    refused(r"are one folder, by a link.*; remove the link", read, tmp_path / "images")


def test_a_link_from_training_to_evaluation_is_refused(tmp_path):
    make(tmp_path, *cat_and_dog("train", "val"), "train/cat/more -> ../../val/cat")
    refused("are one folder", read, tmp_path)


def test_one_file_in_two_classes_is_said(tmp_path, caplog):
    make(tmp_path, *cat_and_dog("."), "cat/2.jpg -> ../dog/1.jpg", "dog/3.jpg -> 1.jpg")
    os.link(tmp_path / "cat/1.jpg", tmp_path / "cat/4.jpg")
    found = read(tmp_path)
    assert len(found.path) == 5
    assert "twice, by a link: 3 (such as cat/1.jpg and cat/4.jpg)" in "\n".join(found.notes)
    (warning,) = caplog.messages
    assert "one file into two classes, 1 times (such as cat/2.jpg and dog/1.jpg)" in warning
    refused("--strict, but images that are there twice", read, tmp_path, strict=True)


@pytest.mark.parametrize("target", ["gone.jpg", "2.jpg", "1.jpg/2", "x" * 300])
def test_links_that_lead_nowhere_are_refused_where_an_image_was_meant(tmp_path, target):
    make(tmp_path, *cat_and_dog("."), f"cat/2.jpg -> {target}")
    refused(r"not there: cat/2.jpg; bring the files back, or remove", read, tmp_path)
    (tmp_path / "cat/2.jpg").rename(tmp_path / "cat/link")
    make(tmp_path, "loop -> loop", "below -> cat/1.jpg/2")
    if target == "2.jpg":
        (tmp_path / "cat/link").unlink()
        make(tmp_path, "cat/link -> link")
    assert "1 broken link (such as cat/link)" in "\n".join(read(tmp_path).notes)
