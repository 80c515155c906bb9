"""Training images/s, what scoring costs of them, and which of loader, network and scorer is the
limit.

For each setting (network, image size, rows per rank, classes) and number of ranks, one process
group runs all variants below in turn, again and again, in changing order, after a warm-up of each:
what else the machine does hits all of them alike. A block is one epoch over the same number of
synthetic JPEGs, with what our loop does at an epoch's start and end (DDP, order, totals,
`end_epoch` of the scorer). Ratios are of blocks of the same round; `off` is measured twice in a
round, and the ratio of the two shows what the others can resolve.

Not measured: evaluation, checkpoints, storage that is slower than memory (all images are in the
page cache), several nodes, accuracy. All networks train with SGD here, Swin as well. The compared
loops without our code are in `benchmarks.bare_loops`.

    python -m benchmarks.throughput    # small on the CPU, real sizes on a GPU
    python -m benchmarks.throughput --setting resnet34,224,256,1000,12800 --ranks 1 4
"""

# B rows of a rank and step, C classes, N images of a block, S steps of a block, W ranks

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import files
from benchmarks.paired_loops import VARIANTS, Setting, measure_rank
from benchmarks.ranks import run_on_ranks
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.errors import InputError
from tdds_dist.experiments import needs

# (variant, over which, least wanted on the CPU, a GPU)
RATIOS: dict[str, tuple[str, str, float | None, float | None]] = {
    "TDDS / scoring off": ("tdds", "off", 0.97, 0.995),
    "TDDS and trajectory / scoring off": ("all", "off", 0.97, 0.995),
    "our loop / minimal FFCV + DDP loop": ("off", "minimal", 0.98, 0.98),
    "our loop / ImageFolder loop": ("off", "folder", None, None),
    "our loader / FFCV's": ("loader", "ffcv", None, None),
    "scoring off / itself": ("off again", "off", None, None),
}
LIMITS = {"loader": "loader", "model": "model", "scorer": "scorer"}  # measured alone
MOST_FILES = 1024  # of the ImageFolder, which is read as often as it takes
QUALITY = 90  # of the JPEGs
NOT_HERE = {
    "checkpoint under way",
    "features of the final pass",
    "margin",
    "CUDA, NCCL, workspaces",
    "total",
}


CPU_SETTINGS = (
    Setting("shufflenet_v2_x1_0", 32, 24, 10, 1440, 1, rounds=6),
    Setting("shufflenet_v2_x1_0", 32, 24, 10, 1440, 2, rounds=6),
    Setting("resnet34", 224, 8, 1000, 32, rounds=3),
    Setting("swin_t", 224, 4, 1000, 16, rounds=3),
)  # the first two: the demo
CUDA_SETTINGS = tuple(
    Setting(network, 224, rows, 1000, 12_800)
    for network, rows in (("resnet18", 256), ("resnet34", 256), ("resnet50", 256), ("swin_t", 128))
)


# ---- the images


def write_images(setting: Setting, folder: Path, with_tree: bool = True) -> None:
    """`images.beton`, a small `val.beton`, and class folders of JPEGs of the same images in `tree`
    (`with_tree`)."""
    folder.mkdir()
    source = open_source(setting.source)
    write_beton(source, folder / "images.beton", quality=QUALITY, progress=False)
    write_beton(
        open_source(f"synthetic:2,2,{setting.side}", "val"),
        folder / "val.beton",
        num_workers=1,
        progress=False,
    )
    if not with_tree:
        return
    num_files = next(
        number for number in range(min(MOST_FILES, len(source)), 0, -1) if len(source) % number == 0
    )
    for name in {source.class_names[label] for label in source.label_N[:num_files]}:
        (folder / "tree" / name).mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(
            pool.map(
                _write_jpeg,
                [setting.source] * num_files,
                [folder / "tree"] * num_files,
                range(num_files),
                chunksize=16,
            )
        )


def _write_jpeg(spec: str, tree: Path, index: int) -> None:
    source = open_source(spec)
    path = tree / source.class_names[source.label_N[index]] / f"{index:07d}.jpg"
    Image.fromarray(source.read(index)).save(path, quality=QUALITY)


# ---- what follows from the blocks


def planned_bytes(setting: Setting) -> float:
    """Return what `tdds plan` says a rank takes, without what does not happen or is not counted
    here (NOT_HERE)."""
    nowhere = Path()
    images = needs.Images(setting.num_images, "written for this", setting.side**2)
    case = needs.Case(setting.config(nowhere, nowhere, nowhere), images, setting.num_ranks)
    lines = needs.host_lines(case) if case.is_cpu else needs.memory_lines(case)
    return needs.total([line for line in lines if line.label not in NOT_HERE])


def summarise(setting: Setting, ranks: list[dict[str, Any]], planned: float) -> dict[str, Any]:
    """One row: rates, ratios, shares, the limit and the targets. A block takes as long as its
    slowest rank."""
    seconds: dict[str, dict[int, float]] = {variant: {} for variant in VARIANTS}
    images: dict[str, set[int]] = {variant: set() for variant in VARIANTS}
    waiting = []
    for parts in zip(*(rank["blocks"] for rank in ranks), strict=True):
        variant, number = parts[0]["variant"], parts[0]["round"]
        seconds[variant][number] = max(part["seconds"] for part in parts)
        images[variant].add(sum(part["images"] for part in parts))
        if variant == "off":
            waiting.append(max(part["wait_seconds"] for part in parts) / seconds[variant][number])
    if wrong := {variant: seen for variant, seen in images.items() if seen != {setting.num_images}}:
        raise RuntimeError(f"{setting.label}: blocks of {setting.num_images} images had {wrong}")
    rates = {
        variant: [setting.num_images / value for value in found.values()]
        for variant, found in seconds.items()
    }
    ratios = {
        name: [
            seconds[over][number] / seconds[variant][number]
            for number in seconds[variant]
            if number in seconds[over]
        ]
        for name, (variant, over, _, _) in RATIOS.items()
    }
    model, off, most = (
        statistics.median(seconds[variant].values()) for variant in ("model", "off", "all")
    )
    alone = {name: statistics.median(rates[variant]) for name, variant in LIMITS.items()}
    return {
        "label": setting.label,
        "network": setting.network,
        "size": setting.size,
        "rows": setting.rows,
        "num_classes": setting.num_classes,
        "num_images": setting.num_images,
        "stored_side": setting.side,
        "num_ranks": setting.num_ranks,
        "device": setting.device,
        "compile": setting.compile,
        "rounds": setting.rounds,
        "threads": ranks[0]["threads"],
        "images": {variant: seen.pop() for variant, seen in images.items()},
        "rates": rates,
        "ratios": ratios,
        "shares": {
            "model": model / most,
            "loading": (off - model) / most,
            "scoring": (most - off) / most,
        },
        "waiting": statistics.median(waiting),
        "limit": min(alone, key=lambda name: alone[name]),
        "targets": [
            _target(setting, name, ratios[name])
            for name, rule in RATIOS.items()
            if rule[2] is not None
        ],
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "planned_bytes": planned,
    }


def _target(setting: Setting, name: str, values: list[float]) -> dict[str, Any]:
    _, _, on_cpu, on_gpu = RATIOS[name]
    wanted = on_gpu if setting.device == "cuda" else on_cpu
    found = statistics.median(values)
    assert wanted is not None
    return {"ratio": name, "wanted": wanted, "found": found, "met": found >= wanted}


def metrics_of(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row that `benchmarks.compare` follows."""
    label = row["label"]
    found = {
        f"{label}: {text}, images/s": files.metric(row["rates"][variant], "images/s", "higher")
        for variant, text in VARIANTS.items()
        if variant != "off again"
    }
    found |= {
        f"{label}: {name}": files.metric(values, "ratio", "higher", relative=True)
        for name, values in row["ratios"].items()
        if name != "scoring off / itself"
    }
    return found | {
        f"{label}: peak memory": files.metric([row["peak_bytes"]], "bytes", "lower", relative=True)
    }


# ---- presentation


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    rows = result["rows"]
    text = [
        "# Throughput of training, with and without scoring",
        "",
        *_how(result, rows[0]["device"] == "cuda"),
        "",
        files.table(
            [
                [
                    "setting",
                    "images/s",
                    "TDDS / off",
                    "with trajectory / off",
                    "ours / minimal",
                    "off / off",
                    "limit",
                ],
                *[_summary(row) for row in rows],
            ]
        ),
    ]
    for row in rows:
        limit = row["limit"]
        alone = _rate(statistics.median(row["rates"][LIMITS[limit]]))
        peak, planned = row["peak_bytes"], row["planned_bytes"]
        text += [
            "",
            f"## {row['label']}",
            "",
            (
                f"Blocks of {row['num_images']:,} images stored at {row['stored_side']} pixels;"
                f" {row['rounds']} rounds, every second with the variants of the first three ratios"
                f" only; {row['threads']} thread(s) per rank."
            ),
            "",
            files.table([["", "images/s", "lowest", "highest"], *_rate_lines(row)]),
            "",
            files.table([["", "ratio", "lowest", "highest", "wanted", ""], *_ratio_lines(row)]),
            "",
            (
                f"Of a scored epoch: {_shares(row)}. Alone, the {limit} is slowest, with {alone}"
                f" images/s: **the {limit} is the limit**."
            ),
            "",
            (
                f"Peak memory per rank {peak / 1e6:,.0f} MB, planned {planned / 1e6:,.0f} MB"
                f" ({peak / planned:.2f} of it)."
            ),
        ]
    text += [
        "",
        (
            "Not measured: evaluation, checkpoints, storage slower than memory, several nodes,"
            " accuracy."
        ),
        "",
        files.provenance_line(result),
        "",
    ]
    return "\n".join(text)


def _how(result: dict[str, Any], on_gpu: bool) -> list[str]:
    """Return what the figures mean."""
    what = "torch.cuda.max_memory_allocated" if on_gpu else "resident memory of the process"
    less = (
        "its margin and CUDA's own memory"
        if on_gpu
        else "checkpoints and the final pass, which do not happen here"
    )
    shared = (
        ""
        if on_gpu
        else (
            ', whose threads share the CPUs with the network; "waiting for a batch" is what the'
            " loop without scoring spends in the loader's hands"
        )
    )
    return [
        (
            f"{'bfloat16 autocast' if on_gpu else 'float32'}, SGD for all networks, synthetic JPEGs"
            f" (quality {QUALITY}) in memory. A block is one epoch over the same number of images"
            f" for every variant. {result['warm_up']} Variants take turns in changing order; ratios"
            " are of blocks of one round. Medians, with the range over rounds."
        ),
        "",
        (
            '"TDDS" keeps all nine scalars of the baselines as well (they are always computed),'
            ' "and the trajectory" also writes them to disk every epoch; the whole epoch counts,'
            ' with the scorer\'s `end_epoch`. "Scoring off / itself" compares two equal blocks of a'
            " round: differences from 1 within its range are not resolved."
        ),
        "",
        (
            "Model: our loop on images that are there already. Loading: what it takes longer with"
            f" the loader{shared}. Scoring: what it takes longer with TDDS and trajectory (of"
            " medians; small ones are noise). The limit is the slowest of the three when each runs"
            f" alone. Peak memory: {what}, with TDDS and trajectory; planned is `tdds plan` without"
            f" {less}."
        ),
    ]


def _summary(row: dict[str, Any]) -> list[str]:
    ratios = [
        f"{target['found']:.3f}" + ("" if target["met"] else " (missed)")
        for target in row["targets"]
    ]
    null = row["ratios"]["scoring off / itself"]
    return [
        row["label"],
        _rate(statistics.median(row["rates"]["off"])),
        *ratios,
        f"{min(null):.3f} to {max(null):.3f}",
        row["limit"],
    ]


def _rate_lines(row: dict[str, Any]) -> list[list[str]]:
    return [
        [text, *(_rate(figure(row["rates"][variant])) for figure in (statistics.median, min, max))]
        for variant, text in VARIANTS.items()
    ]


def _ratio_lines(row: dict[str, Any]) -> list[list[str]]:
    targets = {target["ratio"]: target for target in row["targets"]}
    lines = []
    for name, values in row["ratios"].items():
        target = targets.get(name)
        verdict = (
            [f">= {target['wanted']:g}", "met" if target["met"] else "missed"]
            if target
            else ["", ""]
        )
        lines.append(
            [name, *(f"{figure(values):.3f}" for figure in (statistics.median, min, max)), *verdict]
        )
    return lines


def _shares(row: dict[str, Any]) -> str:
    found = [f"{name} {100 * share:.1f} %" for name, share in row["shares"].items()]
    if row["device"] == "cpu":  # on a GPU the host waits for the device there as well
        found.append(f"waiting for a batch {100 * row['waiting']:.1f} %")
    return ", ".join(found)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# ---- the program


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Training images/s.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--setting",
        nargs="+",
        default=[],
        metavar="NETWORK,SIZE,ROWS,CLASSES,IMAGES",
        help=(
            "torchvision network, pixels, rows per rank, classes, images of a block; default: the"
            " demo, ResNet-34 and Swin-T on the CPU, ResNet-18/34/50 and Swin-T on a GPU"
        ),
    )
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=int,
        default=[],
        metavar="W",
        help="numbers of ranks; default: 1, and 2 for the demo; on GPUs 1 and as many as there are",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="R", help="rounds that count; default: 3 to 6, by setting"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: CUDA where there is any",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile of the network, in all loops"
    )
    files.add_options(parser, "throughput")
    return parser


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Return what is to be measured; InputError for what cannot be."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but no CUDA device is visible; use --device cpu")
    if options.rounds is not None and options.rounds < 1:
        raise InputError(f"--rounds {options.rounds} must be at least 1")
    found: list[Setting] = [_parse(text) for text in options.setting]
    ranks = options.ranks or ([1] if device == "cpu" else sorted({1, torch.cuda.device_count()}))
    if not found and device == "cpu" and not options.ranks:
        found = list(CPU_SETTINGS)
    else:
        found = list(
            dict.fromkeys(
                replace(setting, num_ranks=number)
                for setting in found or (CPU_SETTINGS if device == "cpu" else CUDA_SETTINGS)
                for number in ranks
            )
        )
    found = [
        replace(
            setting, device=device, compile=options.compile, rounds=options.rounds or setting.rounds
        )
        for setting in found
    ]
    for setting in found:
        _check(setting)
    return found


def _parse(text: str) -> Setting:
    network, *numbers = text.split(",")
    try:
        size, rows, num_classes, num_images = (int(number) for number in numbers)
    except ValueError as error:
        raise InputError(
            f"--setting {text} must be NETWORK,SIZE,ROWS,CLASSES,IMAGES, e.g."
            " resnet34,224,256,1000,12800"
        ) from error
    return Setting(network, size, rows, num_classes, num_images)


def _check(setting: Setting) -> None:
    least = {
        "SIZE": (setting.size, 8),
        "ROWS": (setting.rows, 2),
        "CLASSES": (setting.num_classes, 2),
        "IMAGES": (setting.num_images, 2),
    }
    for name, (value, bound) in least.items():
        if value < bound:
            raise InputError(
                f"--setting: {name}={value} of {setting.network} must be at least {bound}"
            )
    batch = setting.rows * setting.num_ranks
    if setting.num_ranks < 1:
        raise InputError(f"--ranks {setting.num_ranks} must be at least 1")
    if setting.device == "cuda" and setting.num_ranks > torch.cuda.device_count():
        raise InputError(
            f"--ranks {setting.num_ranks} needs as many GPUs, there are"
            f" {torch.cuda.device_count()}; lower it"
        )
    if setting.num_images % batch:
        nearest = max(1, setting.num_images // batch) * batch
        raise InputError(
            f"--setting: IMAGES={setting.num_images} of {setting.network} must be a multiple of the"
            f" {batch} rows of a step ({setting.rows} on {setting.num_ranks} rank(s)), so that all"
            f" loops see the same images; use {nearest}"
        )
    # runs the network on shapes: one that is unknown, or cannot train so, is said now
    planned_bytes(setting)


def measure(settings: list[Setting]) -> dict[str, Any]:
    """All rows with their provenance."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folders: dict[str, Path] = {}
        for number, setting in enumerate(settings):
            started = time.perf_counter()
            folder = folders.get(setting.source)
            if folder is None:
                folder = folders[setting.source] = Path(name) / f"images{number}"
                write_images(setting, folder)
            run = Path(name) / f"run{number}"
            ranks = run_on_ranks(setting.num_ranks, measure_rank, setting, folder, run)
            rows.append(summarise(setting, ranks, planned_bytes(setting)))
            print(f"{setting.label}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    metrics: dict[str, Any] = {}
    for row in rows:
        metrics |= metrics_of(row)
    most = max(rows, key=lambda row: row["num_ranks"])
    return {
        "benchmark": "throughput",
        "settings": {
            row["label"]: f"{row['num_images']} images, compile={row['compile']}" for row in rows
        },
        "repetitions": min(row["rounds"] for row in rows),
        "warm_up": (
            "One block of each variant is not counted (it compiles and starts workers), and scorers"
            " begin with full windows."
        ),
        "rows": rows,
        "metrics": metrics,
        "provenance": files.provenance(most["num_ranks"], most["device"], rows[0]["threads"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, write both result files; returns the exit code."""
    return files.run(
        "throughput",
        build_parser().parse_args(arguments),
        settings_of,
        lambda options: measure(settings_of(options)),
        as_markdown,
    )


if __name__ == "__main__":
    sys.exit(main())
