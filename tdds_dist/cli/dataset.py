"""`tdds write` and `check`: images to a .beton file, and whether it is sound."""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdds_dist.cli.options import Parsers, expanded_path
from tdds_dist.cli.outcome import EXIT_TERMINATED, Outcome
from tdds_dist.console import log
from tdds_dist.text import command, printable

if TYPE_CHECKING:
    from tdds_dist.data.sources import Source


# ---- write


def add_write(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "write",
        help="images -> .beton and its manifest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write images to an FFCV file (.beton) and a manifest (index -> path, label) beside"
            " it.\n\nSOURCE is one of\n  imagefolder:DIR          DIR/<split>/<class>/<image>, or"
            " DIR/<class>/<image> with --holdout\n  parquet:DIR              Hugging Face image"
            " data sets: DIR/data/train-*.parquet and so on\n  webdataset:SHARDS        tar shards,"
            " such as webdataset:'{train,val}-{000..099}.tar'\n  cifar10:DIR, cifar100:DIR  the"
            " extracted archive of the python version in DIR\n  idx:DIR                  MNIST,"
            " Fashion-MNIST, KMNIST, EMNIST: *-images-idx3-ubyte[.gz] and its labels in DIR\n"
            "  digits                   scikit-learn's digits at 32x32, a fixed stratified 80/20"
            " split\n  synthetic:N,CLASSES,SIZE random images for benchmarks"
        ),
    )
    stage.takes("source SOURCE", _source, "where the images are, see above")
    stage.takes("out OUT.beton", Path, "the file to write")
    stage.choice(
        "--split",
        ("train", "val"),
        "which part of the source (default: train; folders named otherwise, such as Training/,"
        " want it given)",
    )
    stage.takes(
        "--holdout R",
        float,
        "where there is no val split: this share of each class is val, the rest train; give it"
        " with both (default: 0)",
        default=0.0,
    )
    stage.choice(
        "--formats",
        ("pillow", "torchvision"),
        "which files of DIR are images: those that Pillow reads, or those with a suffix of"
        " torchvision's ImageFolder (default: pillow)",
        default="pillow",
    )
    stage.flag("--strict", "refuse DIR when a file in it is left out, or is there twice")
    stage.takes(
        "--image-field NAME",
        str,
        "of parquet: the column of the images; of webdataset: their suffix (default: the only one"
        " there is)",
        default="",
    )
    stage.takes(
        "--label-field NAME",
        str,
        "of parquet: the column of the labels (default: the only one, or label); of webdataset:"
        " their suffix, or the key of .json (default: cls, then the key label)",
        default="",
    )
    stage.takes(
        "--max-resolution N",
        int,
        "shrink images to a longer side of N pixels (default: as they are)",
    )
    stage.choice(
        "--exif",
        ("turn", "ignore"),
        "turn: photos stand upright, as EXIF says and every viewer shows them; ignore: they stay"
        " as stored, as torchvision reads them (default: turn)",
        default="turn",
    )
    stage.takes(
        "--background COLOUR",
        str,
        "under transparent pixels: white, black, #rrggbb, or none, which drops transparency as"
        " torchvision does (default: white)",
        default="white",
    )
    stage.takes(
        "--grey-range LOW,HIGH",
        str,
        "greys of 16 and 32 bits and floats from LOW to HIGH become 0 to 255; write"
        " --grey-range=-1024,3071 where LOW is negative (default: 0,65535, floats 0,1)",
    )
    stage.choice(
        "--write-mode",
        ("jpg", "proportion", "raw"),
        "jpg: all compressed; raw: none, loads faster; proportion: half of them (default: jpg)",
        default="jpg",
    )
    stage.takes("--quality Q", int, "JPEG quality, 1 to 100 (default: 90)", default=90)
    stage.takes("--num-workers W", int, "processes (default: one per CPU, at most 16)")
    stage.takes("--subset N", int, "only N images, classes in proportion (default: all)")
    stage.takes(
        "--label-noise R",
        float,
        "change this share of the labels to another class, for robustness experiments (default: 0)",
        default=0.0,
    )
    stage.takes(
        "--relabel FILE.csv",
        Path,
        "take other labels from this file (again for more, in their order), the decisions of a"
        " review (`tdds suspects`): columns index, label, new_label; the manifest says so",
        action="append",
    )
    stage.choice(
        "--threshold-samples",
        (1, 2),
        "put 1 in C + 1 images into a class of their own, by which `tdds suspects` tells how low"
        " margins of wrong labels are; PART 1 and 2 draw different ones, give it for both splits",
        type=int,
        metavar="PART",
    )
    stage.takes(
        "--corrupt R",
        float,
        "corrupt this share of the images, in equal parts by noise, occlusion, low resolution, fog"
        " and motion blur (default: 0)",
        default=0.0,
    )
    stage.takes(
        "--seed S",
        int,
        "of --holdout, --label-noise, --corrupt and --threshold-samples only; the same for both"
        " parts of the last (default: 0)",
        default=0,
    )
    stage.flag("--overwrite", "replace an existing file")
    stage.set_defaults(run=write)


def _source(text: str) -> str:
    kind, colon, rest = text.partition(":")
    return f"{kind}{colon}{expanded_path(rest) if rest else ''}"


def write(options: argparse.Namespace) -> Outcome:
    from tdds_dist.data.corruptions import KINDS
    from tdds_dist.data.manifest import manifest_path
    from tdds_dist.data.pixels import pixel_rules, summary
    from tdds_dist.data.sources import (
        open_source,
        with_corruption,
        with_label_noise,
        with_new_labels,
        with_threshold_samples,
    )
    from tdds_dist.data.writer import write_beton

    # an exception, so that temporary files go
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    started = time.perf_counter()
    source = open_source(
        options.source,
        options.split,
        options.subset,
        holdout=options.holdout,
        seed=options.seed,
        formats=options.formats,
        strict=options.strict,
        pixels=pixel_rules(options.exif, options.background, options.grey_range),
        image_field=options.image_field,
        label_field=options.label_field,
    )
    source = with_corruption(
        with_label_noise(source, options.label_noise, options.seed), options.corrupt, options.seed
    )
    if options.relabel:
        source = with_new_labels(source, options.relabel)
    if options.threshold_samples is not None:
        source = with_threshold_samples(source, options.threshold_samples, options.seed)
    noisy = options.label_noise > 0 or source.corruption is not None
    if noisy and source.split == "val":
        log.warning(
            "images for evaluation should stay clean; leave out --label-noise and --corrupt with"
            " --split val"
        )
    manifest = write_beton(
        source,
        options.out,
        max_resolution=options.max_resolution,
        write_mode=options.write_mode,
        quality=options.quality,
        num_workers=options.num_workers,
        overwrite=options.overwrite,
    )
    seconds = time.perf_counter() - started
    numbers: dict[str, Any] = {
        "images": manifest.num_samples,
        "classes": manifest.num_classes,
        "left_out": source.num_left_out,
        "seconds": seconds,
        "images_per_second": manifest.num_samples / seconds,
    }
    notes = [
        f"classes: {_first_and_last(manifest.class_names)}",
        *source.notes,
        *summary(source.tally, manifest.settings),
    ]
    if noisy:
        corruption = manifest.corruption or []
        numbers |= {
            "changed_labels": 0 if manifest.noisy_N is None else int(manifest.noisy_N.sum()),
            "corrupted_images": len(corruption) - corruption.count(""),
        }
        by_kind = ", ".join(f"{corruption.count(kind)} {kind}" for kind in KINDS)
        notes.append(
            f"noise (seed {options.seed}): {numbers['changed_labels']} labels changed,"
            f" {numbers['corrupted_images']} images corrupted ({by_kind})"
        )
    if options.relabel:
        numbers["relabelled"] = manifest.settings["relabelled"]
        files = ", ".join(map(str, options.relabel))
        notes.append(f"labels of {numbers['relabelled']} images are those of {files}")
    then, more = _after_write(options, source)
    return Outcome([options.out, manifest_path(options.out)], numbers, then, [*notes, *more])


def _first_and_last(names: list[str]) -> str:
    """List names; of many the first three and the last."""
    shown = [printable(name) for name in names]
    return ", ".join(shown if len(shown) <= 10 else [*shown[:3], "...", shown[-1]])


def _after_write(options: argparse.Namespace, source: "Source") -> tuple[str, list[str]]:
    """Return the command for the other split, or for the collection when both are there; and notes
    about it."""
    other = "val" if source.split == "train" else "train"
    name = options.out.name
    file = options.out.with_name(
        name.replace(source.split, other)
        if source.split in name
        else f"{options.out.stem}_{other}.beton"
    )
    usual = {"max_resolution": None, "write_mode": "jpg", "quality": 90, "formats": "pillow"}
    usual |= {"exif": "turn", "background": "white", "grey_range": None}
    usual |= {"image_field": "", "label_field": "", "threshold_samples": None}
    given = _given(options, usual)
    if file.is_file():
        files = {source.split: options.out, other: file}
        settings = [
            f"data.train={files['train']}",
            f"data.val={files['val']}",
            f"data.num_classes={len(source.class_names)}",
        ]
        return command("collect", "CONFIG.yaml", *settings), [
            "CONFIG.yaml: one of configs/, or a copy of it with your settings"
        ]
    if options.holdout:
        given += ["--holdout", options.holdout, "--seed", options.seed]
    if options.holdout or source.other or other in source.splits:
        spec = source.other or options.source
        return command("write", spec, file, "--split", other, *given), []
    if other == "train":
        return "", [f"no train split here: write the images for training to {file}"]
    if len(source) <= len(source.class_names):
        return "", [f"no val split here: write images for evaluation to {file}"]
    given += _given(options, {"subset": None, "label_noise": 0, "corrupt": 0, "seed": 0})
    return command("write", options.source, options.out, *given, "--holdout", 0.1, "--overwrite"), [
        "no val split here: write another folder with images of the same classes to"
        f" {file}, or hold a part of these out:"
    ]


def _given(options: argparse.Namespace, usual: dict[str, Any]) -> list[Any]:
    """Return the options that are not as usual, as words of a command."""
    words = []
    for name, usual_value in usual.items():
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value != usual_value:
            # argparse takes a word that begins with a dash for an option
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, value]
    return words


# ---- check


def add_check(parsers: Parsers) -> None:
    stage = parsers.add_parser(
        "check",
        help="whether every image of a .beton is sound",
        description=(
            "Check the structure of an FFCV file, its manifest, and every image: that its bytes are"
            " those that were written (CRC-32 in the manifest), and that it decodes. Bad images are"
            " listed: global index, reason (crc, decode, size), path. Exit code 2 when something is"
            " wrong."
        ),
    )
    stage.takes("beton FILE.beton", Path, "its manifest is looked for beside it")
    stage.flag("--quick", "only 256 images, evenly spaced")
    stage.takes("--num-workers W", int, "decoding threads (default: one per CPU)")
    for field, usual in (("image", "the only one"), ("label", "the only int field, or label")):
        stage.takes(
            f"--{field}-field NAME",
            str,
            f"which field holds the {field}s, in a file with several (default: {usual})",
            default="",
        )
    stage.set_defaults(run=check)


def check(options: argparse.Namespace) -> Outcome:
    from tdds_dist.data.check import check as check_file

    result = check_file(
        options.beton,
        quick=options.quick,
        num_workers=options.num_workers,
        image_field=options.image_field,
        label_field=options.label_field,
    )
    show = log.error if options.quiet or options.json else print
    for line in result.fault_lines():
        show(line)
    if result.faults and show is print:
        print(result.summary())
    result.require_sound()
    return Outcome(
        numbers={
            "checked": result.num_checked,
            "seconds": result.seconds,
            "images_per_second": result.num_checked / max(result.seconds, 1e-9),
        },
        text=result.summary(),
        says_all=True,
    )
