"""The front door, with what users bring: 100 folders of images, each made from a seed, go through
write, check, collect, select and export.

Every command must end with exit code 0 or with 2 and one line; where one is refused, nothing is left
that the next takes. Which files are images of which class, and what grey each image is, is known from
making the folder. One seed alone, its files kept and every command printed:

    python tests/system/test_front_door.py SEED DIR
"""

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SEEDS, LANES, BATCH, SECONDS_PER_SEED = 100, 2, 25, 60

# --- a folder, and what must become of it ---

TRAIN = ["train", "Train", "training", "train2017", "TRAIN", "train_images", "Training Set"]
VAL = ["val", "Val", "validation", "val2017", "valid", "test", "Testing", "VALIDATION", "eval"]
CLASSES = [
    *(["cat", "dog"], ["0", "1", "10", "2"], ["no", "yes"], ["a b", " c"], ["-x", "--help"]),
    *(
        [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")],
        ["猫", "a|b"],
        ["x" * 200, "y"],
    ),
    *(
        ["train", "bus", "car"],
        ["test", "cat"],
        ["control", "treated"],
        ["Cat", "cat"],
        ["=1+1", "@a"],
    ),
    *(["a,b", 'a"b'], ["~", "$HOME"], ["cat", "cat.jpg"], ["only"], ["{", "'"]),
]
# the first is the usual one
STEMS = [
    "photo",
    "a b",
    "-rf",
    "é",
    "e\u0301",
    "猫",
    "n" * 150,
    "x,y",
    "=1",
    "%d",
    "a'b",
    "1.2",
    ".",
]
TORCHVISION = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass
class Tree:
    """A folder of images. Paths are relative to it."""

    root: Path
    roots: dict[str, str]  # the folder of each split: "" in a flat folder
    class_of: dict[str, str] = field(default_factory=dict)  # of what must be taken
    grey_of: dict[str, int | None] = field(default_factory=dict)  # None: not looked at
    junk: set[str] = field(default_factory=set)  # what must not be taken
    # why write must refuse a split, by its folder; None: any split
    must: list[tuple[str | None, str]] = field(default_factory=list)
    may: list[str] = field(default_factory=list)  # why any command may refuse it

    def wanted(self, split: str) -> dict[str, str]:
        """The class of every image of a split."""
        top = os.path.join(self.roots[split], "")
        return {path: name for path, name in self.class_of.items() if path.startswith(top)}


def save(image: Image.Image, path: Path, format_: str, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format_, **options)


def halves(
    mode: str, size: tuple[int, int], colour: Callable[[int], object], grey: int
) -> Image.Image:
    """One half of the image is the grey, the other its opposite."""
    image = Image.new(mode, size, colour(255 - grey))
    image.paste(colour(grey), (0, 0, -(-size[0] // 2), size[1]))
    return image


def animated(path: Path, grey: int, size: tuple[int, int]) -> None:
    frames = [halves("L", size, int, grey), Image.new("L", size, 128)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def turned(path: Path, grey: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1 + grey % 10  # 9 and 10 do not exist
    save(halves("RGB", size, lambda g: (g, g, g), grey), path, "JPEG", exif=exif)


def plain(mode: str, format_: str, colour: Callable[[int], object]) -> Callable:
    def write(path: Path, grey: int, size: tuple[int, int]) -> None:
        save(halves(mode, size, colour, grey), path, format_)

    return write


def palette(mode: str) -> Callable:
    def write(path: Path, grey: int, size: tuple[int, int]) -> None:
        image = halves("L", size, int, grey).convert("P")
        save(image.convert(mode) if mode != "P" else image, path, "TIFF" if mode == "PA" else "PNG")

    return write


# how a file of one grey is made, and its usual suffixes
KINDS: dict[str, tuple[Callable, list[str]]] = {
    "RGB jpg": (plain("RGB", "JPEG", lambda g: (g, g, g)), [".jpg", ".JPG", ".jpeg", ".jfif"]),
    "RGB png": (plain("RGB", "PNG", lambda g: (g, g, g)), [".png", ".Png"]),
    "L": (plain("L", "PNG", lambda g: g), [".png"]),
    "1": (plain("1", "PNG", lambda g: 255 if g > 127 else 0), [".png"]),
    "P": (palette("P"), [".png"]),
    "PA": (palette("PA"), [".tif"]),
    "LA": (plain("LA", "PNG", lambda g: (g, 255)), [".png"]),
    "RGBA": (plain("RGBA", "PNG", lambda g: (g, g, g, 255)), [".png", ".webp.png"]),
    "CMYK": (plain("CMYK", "TIFF", lambda g: (0, 0, 0, 255 - g)), [".tiff"]),
    "I;16": (plain("I;16", "PNG", lambda g: 257 * g), [".png"]),
    "I": (plain("I", "TIFF", lambda g: 257 * g), [".tif"]),
    "F": (plain("F", "TIFF", lambda g: g / 255), [".tif"]),
    "EXIF": (turned, [".jpg"]),
    "GIF": (animated, [".gif", ".GIF"]),
    "WebP": (plain("RGB", "WEBP", lambda g: (g, g, g)), [".webp"]),
    "BMP": (plain("RGB", "BMP", lambda g: (g, g, g)), [".bmp"]),
}
SIZES = [
    (16, 16),
    (24, 17),
    (9, 40),
    (1, 12),
    (12, 1),
    (1, 1),
    (300, 3),
    (3, 2000),
    (64, 48),
    (900, 700),
]


def make(seed: int, root: Path, draw: random.Random) -> Tree:
    """Make the folder of this seed."""
    layout = draw.choice(["flat", "splits", "splits", "splits", "one split"])
    roots = {"train": ""}
    if layout != "flat":
        roots = {"train": draw.choice(TRAIN)}
        if layout == "splits":
            roots["val"] = draw.choice(VAL)
    tree = Tree(root, roots)
    names = draw.choice(CLASSES) if draw.random() < 0.6 else ["cat", "dog", "emu"]
    if {"train", "test", "control"} & {*names}:
        tree.may.append("a class is called like a split")
    if len(names) == 1:
        tree.may.append("one class")
    size = draw.choice(SIZES[:2]) if draw.random() < 0.6 else None
    for folder in roots.values():
        for name in names:
            for number in range(draw.choice([1, 2, 3, 4, 6])):
                add_image(tree, os.path.join(folder, name), name, number, size, draw)
    for quirk in draw.sample(QUIRKS, draw.choice([0, 0, 0, 1, 1, 2])):
        quirk(tree, draw.choice([*roots.values()]), names, draw)
    return tree


def add_image(
    tree: Tree,
    folder: str,
    label: str,
    number: int,
    size: tuple[int, int] | None,
    draw: random.Random,
) -> None:
    write, suffixes = KINDS[draw.choice([*KINDS]) if draw.random() < 0.5 else "RGB jpg"]
    suffix = (
        draw.choice(suffixes) if draw.random() < 0.8 else draw.choice(["", ".dat", ".png", ".jpg"])
    )
    stem = draw.choice(STEMS[1:]) if draw.random() < 0.15 else STEMS[0]
    below = draw.choice(["sub", "a/b", "train", "fold 1"]) if draw.random() < 0.05 else ""
    path = os.path.join(folder, below, f"{number}{stem}{suffix}")
    size = size or draw.choice(SIZES)
    grey = draw.randrange(4, 120)
    (tree.root / path).parent.mkdir(parents=True, exist_ok=True)
    write(tree.root / path, grey, size)
    tree.class_of[path] = label
    tree.grey_of[path] = 0 if write is KINDS["1"][0] else grey
    if below == "train":
        tree.may.append("a folder in a class is called like a split")


# --- quirks: what else lies in folders ---


def junk(tree: Tree, path: str, content: bytes) -> None:
    (tree.root / path).parent.mkdir(parents=True, exist_ok=True)
    (tree.root / path).write_bytes(content)
    tree.junk.add(path)


def an_image(grey: int = 99, format_: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    file = BytesIO()
    noise = np.random.default_rng(grey).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(noise).save(file, format_)
    return file.getvalue()


def other_files(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    where = os.path.join(top, names[0])
    for name in draw.sample(
        ["a.txt", "Thumbs.db", "0", "b.json", "c.jpg~", ".d.png", "e", "f.dng"], 3
    ):
        junk(tree, os.path.join(where, name), b"" if name == "0" else b"no image")


def hidden_folders(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        junk(tree, os.path.join(top, draw.choice(["", names[0]]), name, "1.png"), an_image())


def broken_image(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    """What is called an image, or begins as one, and is none."""
    format_ = draw.choice(["PNG", "JPEG"])
    whole = an_image(7, format_, (40, 40))
    head = b"\x89PNG\r\n\x1a\n" if format_ == "PNG" else b"\xff\xd8\xff\xe0"
    bad = [
        whole[: len(whole) // 2],
        b"text",
        head + bytes(60),
        b"",
        whole[:30] + bytes(900) + whole[930:],
    ]
    junk(tree, os.path.join(top, names[-1], draw.choice(["bad.png", "bad.jpg"])), draw.choice(bad))
    tree.must.append((top, "a broken image"))


def cut_without_suffix(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    junk(tree, os.path.join(top, names[0], "cut"), an_image()[: draw.choice([3, 20, 60, 300])])
    tree.may.append("a cut file without a suffix")


def links(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    target = draw.choice(
        [".", "..", "../..", f"../{names[-1]}", "nowhere", "/etc/passwd/x", "loop", "loop.jpg"]
    )
    name = draw.choice(["loop", "loop.jpg"])
    link = tree.root / top / names[0] / name
    link.symlink_to(target)
    tree.may.append(f"a link to {target}")
    tree.junk.add(os.path.join(top, names[0], name))


def hard_link(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    """One file twice in its class; in two classes only a warning."""
    old = draw.choice([*tree.class_of])
    new = f"{os.path.dirname(old)}/twice{os.path.splitext(old)[1]}"
    os.link(tree.root / old, tree.root / new)
    for known in (tree.class_of, tree.grey_of):
        known[new] = known[old]
    tree.junk.add("twice")


def not_utf8(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    path = os.path.join(top, names[0], os.fsdecode(b"\xff\xe9.png"))
    Image.new("L", (16, 16), 33).save(tree.root / path)
    tree.class_of[path], tree.grey_of[path] = names[0], 33
    tree.may.append("a name that is no UTF-8")


def line_feed(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    junk(tree, os.path.join(top, draw.choice([names[0], "c\rd"]), "a\nb.png"), an_image())
    tree.must.append((top, "a name with a control character"))
    tree.may.append("a class in one split only")


def empty_class(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    (tree.root / top / "nothing").mkdir(parents=True, exist_ok=True)
    tree.may.append("a class without images")


def folder_beside(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    """A folder of folders: not used beside splits, one more class beside classes."""
    name = draw.choice(["images", "unlabeled", "train_old", "annotations"])
    path = f"{name}/{names[0]}/beside.png"
    junk(tree, path, an_image())
    tree.may.append(f"a folder {name}/ beside")
    if tree.roots["train"] == "":
        tree.junk.remove(path)
        tree.class_of[path], tree.grey_of[path] = name, None


def special_files(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    path = os.path.join(top, names[0], draw.choice(["pipe", "pipe.png"]))
    os.mkfifo(tree.root / path)
    tree.junk.add(path)


def a_class_only_here(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    path = os.path.join(top, "zebra", "1.png")
    (tree.root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 16), 77).save(tree.root / path)
    tree.class_of[path], tree.grey_of[path] = "zebra", 77
    tree.may.append("a class in one split only")


def half_transparent(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    path = os.path.join(top, names[0], "half.png")
    Image.new("RGBA", (16, 16), (10, 20, 30, 128)).save(tree.root / path)
    tree.class_of[path], tree.grey_of[path] = names[0], None


def out_of_range(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    path = os.path.join(top, names[0], "range.tif")
    value = draw.choice([1.5, -1.0, float("nan"), float("inf"), 1e38])
    Image.new("F", (16, 16), value).save(tree.root / path)
    tree.class_of[path], tree.grey_of[path] = names[0], None
    tree.must.append((top, f"a grey of {value}"))


def many_pixels(tree: Tree, top: str, names: list[str], draw: random.Random) -> None:
    path, size = os.path.join(top, names[0], "huge.png"), draw.choice([(4000, 3000), (66000, 2)])
    Image.new("L", size, 50).save(tree.root / path)
    tree.class_of[path], tree.grey_of[path] = names[0], 50
    if max(size) > 65000:
        tree.may.append("a side of 66000 pixels")


QUIRKS = [
    *(other_files, hidden_folders, broken_image, cut_without_suffix, links, hard_link, not_utf8),
    *(empty_class, folder_beside, special_files, a_class_only_here, half_transparent, out_of_range),
    *(many_pixels, line_feed),
]


# --- options and configs ---


def write_options(tree: Tree, draw: random.Random) -> list[str]:
    """Draw options of `tdds write` that both splits share."""
    options = ["--num-workers", draw.choice("112")]
    if draw.random() < 0.5:
        return options
    good = [
        (["--exif", "ignore"], ""),
        (["--background", draw.choice(["black", "none", "#10fF10"])], ""),
        ([f"--grey-range={draw.choice(['0,255', '-5,70000'])}"], "grey"),
        (["--strict"], "strict"),
        (["--formats", "torchvision"], "torchvision"),
        (["--max-resolution", draw.choice(["1", "7", "64", "5000"])], "small"),
        (["--write-mode", draw.choice(["jpg", "proportion", "raw"])], ""),
        (["--quality", draw.choice(["30", "100"])], ""),
        (["--subset", draw.choice(["2", "5", "1000", "0"])], "may"),
        (["--label-noise", draw.choice(["0.2", "0.9"])], "noise"),
        (["--corrupt", "0.5"], "corrupt"),
    ]
    bad = [
        ["--background", draw.choice(["", "blackk", "#12", "-1"])],
        [f"--grey-range={draw.choice(['5', '9,1', '0,nan', 'a,b', '0,inf'])}"],
        ["--max-resolution", draw.choice(["0", "-3", "1.5"])],
        ["--label-noise", draw.choice(["1", "-0.1", "nan"])],
    ]
    chosen = draw.sample(good, draw.choice([1, 1, 2]))
    if draw.random() < 0.15:
        chosen.append((draw.choice(bad), "must"))
    for words, reason in chosen:
        options += words
        if reason == "grey":
            tree.must = [(top, why) for top, why in tree.must if "a grey of" not in why]
        if reason in ("grey", "corrupt", "small"):
            tree.grey_of = dict.fromkeys(tree.grey_of)
        if reason not in ("", "must"):
            tree.may.append(words[0])
        if reason == "must":
            tree.must.append((None, " ".join(words)))
    return options


def holdout_options(tree: Tree, draw: random.Random) -> list[str]:
    """Draw the options that hold out a val split, where there is none."""
    if "val" in tree.roots or draw.random() < 0.3:
        return []
    share = draw.choice(["0.1", "0.3", "0.5", "0.2", "0.9", "1"])
    if float(share) not in (0.1, 0.2, 0.3, 0.5):
        tree.may.append(f"--holdout {share}")
    if len(tree.class_of) < 2 * len({*tree.class_of.values()}):
        tree.may.append("too few images to hold out")
    return ["--holdout", share, "--seed", draw.choice("07")]


def config(
    tree: Tree, folder: Path, train: Path, val: Path, num_classes: int, draw: random.Random
) -> str:
    """Draw a config. Most are plain, and must be taken."""
    plain_one = draw.random() < 0.7

    def pick(usual: object, *others: object) -> object:
        return draw.choice(others) if not plain_one and draw.random() < 0.2 else usual

    if not plain_one:
        tree.may.append("the config")
    text = f"""
run: {{name: front, dir: {json.dumps(str(folder / "run"))}, device: cpu, seed: {pick(0, 5)}}}
data: {{train: {json.dumps(str(train))}, val: {json.dumps(str(val))},
  num_classes: {pick(num_classes, 1, num_classes + 1, '"2"')},
  image_size: {pick(32, 8, 9, 48)}, crop: {pick("resized", "center", "center", "pad")},
  padding: {pick(2, 0, 40)}, flip: {pick("true", "false", "no")}, eval_crop_ratio: {pick(1.0, 0.875, 0.01)},
  scale_min: {pick(0.08, 1, 0.0001)}, num_workers: 1, mean: [100, 100, 100], std: [50, 50, 50]}}
model: {{name: tiny_network}}
train: {{epochs: {pick(2, 1, 3)}, global_batch_size: {pick(4, 2, 3, 7, 64, 1000, 1)},
  accumulation: {pick(1, 2, 3, 7)}, lr: {pick(0.01, 1e-9, "1e-3", 1e9)}}}
score: {{preset: {pick("official", "paper")}, final_pass: {pick("false", "true")},
  windows: [{{T: {pick(2, 1, 3)}, K: {pick(2, 1, 3)}, pruning_rates: [{pick(0.5, 0, 0.99, 1)}, 0.3]}}]}}
checkpoint: {{every_epochs: {pick(0, 1)}}}
"""
    spoil = draw.choice(
        ["train: {}\n", "a\tb: 1\n", "modle: {}\n", "? [\n", "\x00", "é: 1\n", "- 1\n"]
    )
    return text if plain_one or draw.random() < 0.9 else text + spoil


# --- one seed ---


class Wrong(Exception):
    """What a command did that it must not do."""


def call(words: list[str], folder: Path) -> tuple[int, str]:
    """Run one command in this process; return its exit code and the line about it."""
    from tdds_dist.__main__ import main

    kept = [os.dup(1), os.dup(2)]
    files = [(folder / name).open("wb") for name in ("stdout", "stderr")]
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    try:
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as error:
        raise Wrong(f"`tdds {shlex.join(words)}`: {type(error).__name__}: {error}") from error
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, (old, file) in enumerate(zip(kept, files, strict=True), 1):
            os.dup2(old, number)
            os.close(old)
            file.close()
    said, out = ((folder / name).read_text() for name in ("stderr", "stdout"))
    lines = said.splitlines()
    shown = f"`tdds {shlex.join(words)}`: exit code {code}; it said: {said[-3000:]!r}"
    if code not in (0, 2) or "Traceback" in said + out:
        raise Wrong(shown)
    about = [line for line in lines if re.match(r"tdds( \w+)?: error: ", line)]
    if len(about) != (code == 2) or (code == 2 and lines[-1] != about[0]):
        raise Wrong(f"not one last line; {shown}")
    return code, about[0] if about else out


def left_behind(folder: Path, before: set[Path]) -> set[Path]:
    """Return the files that are new in a folder."""
    return {path for path in folder.rglob("*") if path.is_file()} - before


class Visit:
    """One seed: its folder, and the commands it goes through."""

    def __init__(self, seed: int, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        folder.mkdir(parents=True)
        self.draw = random.Random(seed)
        self.refusals: list[str] = []
        self.tree = make(seed, folder / "images", self.draw)

    def run(self) -> str:
        """Return the stage that refused, or "done"."""
        tree, draw, folder = self.tree, self.draw, self.folder
        self.listed = sorted(os.walk(tree.root))
        options = write_options(tree, draw)
        held_out = holdout_options(tree, draw)
        given = {"train": ["--split", "train"] if held_out or tree.roots["train"] else []}
        if held_out or "val" in tree.roots:
            given["val"] = ["--split", "val"]
        written: dict[str, dict] = {}
        for split, words in given.items():
            out = folder / f"{split}.beton"
            words = ["write", f"imagefolder:{tree.root}", str(out), *words, *held_out, *options]
            must = self.why_not(split, options + held_out)
            if self.stage(words, must):
                written[split] = json.loads(out.with_suffix(".manifest.json").read_text())
                self.check_manifest(split, written[split], options, held_out)
            ok = split in written
            if self.stage(["check", str(out), "--num-workers", "1"]) != ok:
                raise Wrong("check and write do not agree")
        if sorted(os.walk(tree.root)) != self.listed:
            raise Wrong("the folder of images was changed")
        if held_out and len(written) == 2:
            self.check_division(written)
        names = written["train"]["class_names"] if "train" in written else ["a", "b"]
        file = folder / "config.yaml"
        val = folder / ("val.beton" if "val" in given else "train.beton")
        file.write_text(config(tree, folder, folder / "train.beton", val, len(names), draw))
        collected = self.stage(
            ["collect", str(file)], [] if len(written) == len(given) else ["no .beton"]
        )
        rate = draw.choice(["0.5", "0.3", "0.3", "0.99"])
        if draw.random() > 0.95:
            rate = draw.choice(["1", "-0.1", "nan", "50", "x"])
        if float("nan" if rate == "x" else rate) not in (0.5, 0.3):
            tree.may.append(f"--pruning-rate {rate}")
        words = [
            "select",
            str(folder / "run"),
            "--pruning-rate",
            rate,
            "--out",
            str(folder / "kept.npz"),
        ]
        selected = self.stage(words, [] if collected else ["no run"])
        table, kept = folder / "all.csv", folder / "kept.txt"
        words = ["export", str(folder / "run"), "--format", "csv", "--out", str(table)]
        exported = self.stage(words, [] if collected else ["no run"])
        beton = ["--beton", str(folder / "train.beton")]
        words = [
            "export",
            str(folder / "kept.npz"),
            "--format",
            "paths",
            *beton,
            "--out",
            str(kept),
        ]
        listed = self.stage(words, [] if selected else ["no coreset"])
        if exported:
            self.check_table(table, written["train"])
        if listed:
            self.check_kept(kept, written["train"], float(rate))
        return "done" if listed else "select" if collected else "collect" if written else "write"

    def why_not(self, split: str, options: list[str]) -> list[str]:
        """Say why `write` must refuse a split."""
        is_all = not {"--subset", "--formats", "--holdout"} & {*options}
        tops = (None, self.tree.roots.get(split)) if is_all else (None,)
        return [why for top, why in self.tree.must if top in tops]

    def stage(self, words: list[str], must: list[str] | None = None) -> bool:
        """Run one command; say whether it was done."""
        before = {path for path in self.folder.rglob("*") if path.is_file()}
        code, said = call(words, self.folder)
        self.say(f"{code} tdds {shlex.join(words)}\n    {said if code else ''}")
        new = left_behind(self.folder, before) - {self.folder / "stdout", self.folder / "stderr"}
        hidden = [path for path in new if path.name.startswith(".") and path.name != ".metadata"]
        if hidden:
            raise Wrong(f"{words[0]} left {hidden}")
        self.refusals += [said] * (code == 2 and not self.refusals)
        # one grey all over, or a wild rate: training has begun, and its run says that it failed
        started = self.tree.may and re.search("NaN|finite", said)
        if code == 2 and new and not started:
            raise Wrong(f"{words} was refused ({said}), and left {new}")
        if code == 0 and must:
            raise Wrong(f"{words} was taken, in spite of {must}")
        if code == 2 and not (must or self.tree.must or self.tree.may):
            raise Wrong(f"nothing is wrong with it, but {words} was refused: {said}")
        return code == 0

    # --- what must be right ---

    def check_manifest(
        self, split: str, manifest: dict, options: list[str], held_out: list[str]
    ) -> None:
        """Every image of the split stands in it once, under its class, and the pixels are its own."""
        tree, columns, names = self.tree, manifest["columns"], manifest["class_names"]
        wanted = tree.wanted("train" if held_out else split)
        if "torchvision" in options:
            wanted = {p: c for p, c in wanted.items() if p.lower().endswith(TORCHVISION)}
        label = columns.get("true_label", columns["label"])
        found = {p: names[k] for p, k in zip(columns["path"], label, strict=True)}
        if len(found) != len(label) or not found.items() <= wanted.items():
            raise Wrong(f"{split}: {[*(found.items() - wanted.items())][:5]} are not of {wanted}")
        if not held_out and "--subset" not in options and len(found) != len(wanted):
            raise Wrong(f"{split}: {[*(wanted.items() - found.items())][:5]} are missing")
        inside = [
            os.path.join(tree.roots[split if split in tree.roots else "train"], name, "")
            for name in names
        ]
        if "--strict" in options and any(path.startswith(tuple(inside)) for path in tree.junk):
            raise Wrong(f"--strict took a folder with {tree.junk}")
        if names != sorted(names):
            raise Wrong(f"{names} are not in order")
        noisy = [a != b for a, b in zip(label, columns["label"], strict=True)]
        share = (
            float(options[options.index("--label-noise") + 1]) if "--label-noise" in options else 0
        )
        if sum(noisy) != round(share * len(label)):
            raise Wrong(f"{sum(noisy)} of {len(label)} labels were changed")
        self.check_greys(split, manifest)

    def check_greys(self, split: str, manifest: dict) -> None:
        """Row i of the .beton is the image of path i, and the label of row i is its label."""
        from tdds_dist.data.beton import inspect_beton

        beton = self.folder / f"{split}.beton"
        info, content = inspect_beton(beton), beton.read_bytes()
        if info.label_N.tolist() != manifest["columns"]["label"]:
            raise Wrong("labels of the file and of its manifest differ")
        for i, path in enumerate(manifest["columns"]["path"]):
            grey, start = self.tree.grey_of[path], int(info.data_ptr_N[i])
            stored = content[start : start + int(info.size_N[i])]
            if stored[:3] == b"\xff\xd8\xff":
                stored = Image.open(BytesIO(stored)).convert("RGB").tobytes()
            seen = np.frombuffer(stored, np.uint8)
            if grey is not None and abs(np.median(np.minimum(seen, 255 - seen)) - grey) > 12:
                raise Wrong(f"{path} is stored with {np.unique(seen)}, not {grey}")

    def check_division(self, written: dict[str, dict]) -> None:
        """No image is in both splits, and without --subset each is in one."""
        train, val = ({*written[split]["columns"]["path"]} for split in ("train", "val"))
        if train & val:
            raise Wrong(f"both in train and val: {train & val}")
        if written["train"]["class_names"] != written["val"]["class_names"]:
            raise Wrong("train and val have other classes")
        sets = written["train"]["settings"]
        if (
            "subset" not in sets
            and "formats" not in sets
            and train | val != {*self.tree.wanted("train")}
        ):
            raise Wrong("held out and left images together are not all")

    def check_table(self, table: Path, manifest: dict) -> None:
        """Every row of the table has the path and the label of its index."""
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [*csv.DictReader(file)]
        columns = manifest["columns"]
        if [int(row["index"]) for row in rows] != [*range(len(columns["path"]))]:
            raise Wrong("rows are missing in the table")
        if [int(row["label"]) for row in rows] != columns["label"]:
            raise Wrong("the labels of the table are not those of the manifest")
        for row, path in zip(rows, columns["path"], strict=True):
            if os.path.normpath(row["path"]) != path:
                raise Wrong(f"{row['path']!r} is not {path!r}")

    def check_kept(self, kept: Path, manifest: dict, rate: float) -> None:
        """As many paths as the rate leaves, each once, each of this dataset."""
        all_of_them = manifest["columns"]["path"]
        paths = os.fsdecode(kept.read_bytes()).removesuffix("\n").split("\n")
        if len({*paths}) != len(paths) or not {*paths} <= {*all_of_them}:
            raise Wrong(f"{paths} are not of the dataset")
        if abs(len(paths) - (1 - rate) * len(all_of_them)) > 1:
            raise Wrong(f"{len(paths)} of {len(all_of_them)} were kept at {rate}")


# --- many seeds ---


def visit(seed: int, folder: Path, say: Callable[[str], None]) -> dict:
    try:
        journey = Visit(seed, folder / str(seed), say)
        how = journey.run()
    except Wrong as wrong:
        return {"seed": seed, "wrong": str(wrong)}
    return {"seed": seed, "ended": how, "refused": journey.refusals}


def child(seeds: list[int], folder: Path, pipe: int) -> None:
    """Visit the seeds, in a process of its own; a line before each and one after it."""
    import traceback

    for seed in seeds:
        signal.alarm(SECONDS_PER_SEED)
        os.write(pipe, json.dumps({"begins": seed}).encode() + b"\n")
        try:
            result = visit(seed, folder, lambda line: None)
        except BaseException:
            result = {"seed": seed, "wrong": traceback.format_exc()}
        os.write(pipe, json.dumps(result).encode() + b"\n")
        if "wrong" not in result:
            shutil.rmtree(folder / str(seed))
    os._exit(0)


def visits(seeds: list[int], folder: Path) -> Iterator[dict]:
    """Visit the seeds in forked processes; a process that dies is the result of its seed."""
    while seeds:
        receiver, sender = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(receiver)
            try:
                child(seeds[:BATCH], folder, sender)
            finally:
                os._exit(1)
        os.close(sender)
        begun = None
        with open(receiver) as lines:
            for line in lines:
                record = json.loads(line)
                if "begins" in record:
                    begun = record["begins"]
                    continue
                yield record
                seeds, begun = seeds[1:], None
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if begun is not None:
            yield {"seed": begun, "wrong": f"the process ended with {code} (-14: it took too long)"}
            seeds = seeds[1:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_comes_is_done_right_or_refused_in_one_line(tmp_path):
    lanes = [
        subprocess.Popen(
            [sys.executable, __file__, "lane", str(first), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        for first in range(LANES)
    ]
    results = [json.loads(line) for lane in lanes for line in lane.communicate()[0].splitlines()]
    wrong = {result["seed"]: result["wrong"] for result in results if "wrong" in result}
    again = f"\nrun one alone: PYTHONPATH=tests/site python {__file__} SEED DIR"
    assert not wrong, "".join(f"\nseed {seed}: {what}" for seed, what in wrong.items()) + again
    ended = [result["ended"] for result in results]
    assert len(ended) == SEEDS
    assert ended.count("done") > SEEDS // 4, {how: ended.count(how) for how in ended}


if __name__ == "__main__":
    # once, before the forks
    import tdds_dist.coreset.export
    import tdds_dist.coreset.select
    import tdds_dist.data.check
    import tdds_dist.data.writer
    import tdds_dist.training.collect  # noqa: F401

    if sys.argv[1] == "lane":
        first, last = int(sys.argv[2]), int(sys.argv[4]) if len(sys.argv) > 4 else SEEDS
        for record in visits([*range(first, last, LANES)], Path(sys.argv[3])):
            print(json.dumps(record))
    else:
        print(json.dumps(visit(int(sys.argv[1]), Path(sys.argv[2]), print), indent=1))
