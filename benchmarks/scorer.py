"""What scoring costs: time, traffic and memory of `ShardedScorer`, from ImageNet's size on one rank
to its share of a step.

Parts (`--only`), each in processes of its own, outputs made in advance, no trajectory on disk:

* imagenet: one rank that owns everything, one process for each way of storing the previous epoch.
* wide: one shard of many, tens of thousands of classes; each pass records the same random share of
  its rows.
* ranks: rows routed between gloo ranks of this machine; settings take turns epoch by epoch in the
  same processes.
* step: forward, backward and SGD of a small network with `record` and without, in alternating
  blocks.
* cuda: the owner update alone by CUDA events, the fused kernel and plain torch in turns. Needs a
  CUDA device.

Scorers start as in the middle of training: every table is written, all windows are full. The pass
before the timed ones is not counted. `moved` are the bytes that one sample cannot do without (its
logits and both rows of log-probabilities once, scalars, label, marks), the copy bandwidth is that
of a large `copy_` in the same process (bytes read and written). Not measured: images, the network
(but in `step`), files, the interconnect of real nodes.

    python -m benchmarks.scorer --only imagenet wide
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import files
from benchmarks.ranks import run_on_ranks
from benchmarks.recording import (
    Setting,
    Stored,
    measure_ranks,
    measure_share,
    measure_table,
    measure_update,
    summarise_ranks,
)
from tdds_dist.distributed.partition import rows_per_shard
from tdds_dist.errors import InputError
from tdds_dist.training.build import build_model

MOST_RESIDENT = {"float32": 8e9, "float16": 4e9}  # bytes that a process may take at ImageNet's size
SPARE_BYTES = 1.5e9  # what a process takes besides its tables


def build_parser() -> argparse.ArgumentParser:
    """Options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scorer",
        description="Time, traffic and memory of scoring.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--only",
        choices=tuple(PARTS),
        nargs="+",
        metavar="PART",
        help=f"of {', '.join(PARTS)}; default all (cuda where there is a device)",
    )
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="rows of a call")
    parser.add_argument(
        "--passes", type=int, default=3, help="timed passes over the samples, after one that is not"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of torch, where there is one rank",
    )
    parser.add_argument(
        "--num-samples", type=int, default=1_281_167, metavar="N", help="imagenet and cuda"
    )
    parser.add_argument(
        "--num-classes", type=int, default=1000, metavar="C", help="imagenet and cuda"
    )
    parser.add_argument(
        "--stored",
        nargs="+",
        default=["float32", "float16"],
        help="all but wide: float32, float16, topk:K or topk:K/float16",
    )
    parser.add_argument("--wide-samples", type=int, default=14_200_000, metavar="N")
    parser.add_argument("--wide-classes", type=int, default=21_841, metavar="C")
    parser.add_argument(
        "--wide-shards", type=int, default=64, metavar="W", help="of which one is measured"
    )
    parser.add_argument(
        "--wide-rows", type=int, default=8192, metavar="R", help="of the shard, in each pass"
    )
    parser.add_argument(
        "--wide-stored",
        nargs="+",
        default=["float32", "float16", "topk:32"],
        help="left out where memory does not suffice",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="W")
    parser.add_argument(
        "--ranks-samples", type=int, default=50_000, metavar="N", help="ranks and step"
    )
    parser.add_argument(
        "--ranks-classes",
        type=int,
        nargs="+",
        default=[100, 1000],
        metavar="C",
        help="ranks and step",
    )
    parser.add_argument(
        "--model", default="shufflenet_v2_x0_5", help="network of the training step"
    )
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS", help="its images")
    parser.add_argument(
        "--pairs", type=int, default=9, help="pairs of blocks with and without record"
    )
    parser.add_argument(
        "--block", type=int, default=8, metavar="STEPS", help="training steps of a block"
    )
    parser.add_argument(
        "--cuda-batches", type=int, nargs="+", default=[256, 1024, 8192], metavar="B"
    )
    parser.add_argument(
        "--cuda-steps", type=int, default=50, metavar="S", help="timed steps of each kind and batch"
    )
    files.add_options(parser, "scorer")
    return parser


def check(options: argparse.Namespace) -> None:
    """InputError for what measures nothing; `only` becomes the parts to run."""
    least = {
        "batch": 1,
        "passes": 1,
        "threads": 1,
        "num_samples": 1,
        "num_classes": 2,
        "wide_samples": 1,
        "wide_classes": 2,
        "wide_shards": 1,
        "wide_rows": 1,
        "ranks": 1,
        "ranks_samples": 1,
        "ranks_classes": 2,
        "image_size": 1,
        "pairs": 1,
        "block": 1,
        "cuda_batches": 1,
        "cuda_steps": 1,
    }
    for name, bound in least.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < bound:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least {bound}")
    has_cuda = torch.cuda.is_available()
    if options.only and "cuda" in options.only and not has_cuda:
        raise InputError("--only cuda needs a CUDA device, and none is visible; leave it out")
    options.only = options.only or [part for part in PARTS if part != "cuda" or has_cuda]
    narrowest = min(
        [options.num_classes] * ("imagenet" in options.only or "cuda" in options.only)
        + options.ranks_classes * ("ranks" in options.only or "step" in options.only)
        + [sys.maxsize]
    )
    for names, num_classes in (
        (options.stored, narrowest),
        (options.wide_stored, options.wide_classes),
    ):
        for stored in map(Stored, names):
            if stored.num_kept is not None and stored.num_kept >= num_classes:
                raise InputError(
                    f"stored as {stored.name} keeps all of {num_classes} classes; lower K"
                )
    if "wide" in options.only and options.wide_rows > (
        shard := rows_per_shard(options.wide_samples, options.wide_shards)
    ):
        raise InputError(
            f"--wide-rows {options.wide_rows} is more than the {shard} samples of a shard; lower it"
        )
    if "cuda" in options.only and options.num_samples < 2 * max(options.cuda_batches):
        raise InputError(
            f"--num-samples {options.num_samples} must hold two batches of"
            f" {max(options.cuda_batches)} for the part cuda; lower --cuda-batches"
        )
    if "step" in options.only:
        if options.ranks_samples < 2 * options.batch:
            raise InputError(
                f"--ranks-samples {options.ranks_samples} must hold two batches of {options.batch}"
                " for the training step; lower --batch, or leave the step out with --only"
            )
        build_model(options.model, 2)  # an unknown name is said now, not after minutes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of all parts, their metrics and provenance."""
    device = "cuda" if "cuda" in options.only else "cpu"
    provenance = files.provenance(1, device, options.threads)  # the load before the first part
    parts: dict[str, Any] = {}
    for name in options.only:
        started = time.perf_counter()
        parts[name] = PARTS[name](options)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "name")}
    return {
        "benchmark": "scorer",
        "settings": settings,
        "warm_up": "one pass, one block of each kind, or one step",
        "repetitions": options.passes,
        "metrics": metrics_of(parts),
        "parts": parts,
        "provenance": provenance,
    }


def _row(setting: Setting, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": setting.name,
        "num_samples": setting.num_samples,
        "num_classes": setting.num_classes,
        "batch": setting.batch,
        "stored": setting.stored.name,
    } | found


def run_imagenet(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way of storing."""
    rows = []
    for stored in map(Stored, options.stored):
        setting = Setting(options.num_samples, options.num_classes, options.batch, stored)
        row = _row(
            setting,
            run_on_ranks(1, measure_table, setting, options.passes, threads=options.threads)[0],
        )
        if limit := MOST_RESIDENT.get(stored.name):
            row |= {
                "resident_limit_bytes": limit,
                "is_within_limit": row["peak_resident_bytes"] < limit,
            }
        rows.append(row)
    return rows


def run_wide(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way of storing; without figures where the shard does not fit into memory."""
    rows = []
    for stored in map(Stored, options.wide_stored):
        shard = rows_per_shard(options.wide_samples, options.wide_shards)
        setting = Setting(shard, options.wide_classes, options.batch, stored)
        needed, available = setting.formula_bytes() + SPARE_BYTES, available_bytes()
        if needed > available:
            rows.append(
                _row(
                    setting,
                    {
                        "left_out": (
                            f"needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
                        )
                    },
                )
            )
            continue
        found = run_on_ranks(
            1, measure_table, setting, options.passes, options.wide_rows, threads=options.threads
        )[0]
        rows.append(_row(setting, found))
    return rows


def run_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of ranks, classes and way of storing."""
    settings = [
        Setting(options.ranks_samples, num_classes, options.batch, Stored(name))
        for num_classes in options.ranks_classes
        for name in options.stored
    ]
    rows = []
    for world_size in options.ranks:
        by_rank = run_on_ranks(world_size, measure_ranks, settings, options.passes)
        rows += [
            _row(
                setting, summarise_ranks(setting, world_size, [found[number] for found in by_rank])
            )
            for number, setting in enumerate(settings)
        ]
    return rows


def run_step(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of classes; stored as the first way says."""
    rows = []
    for num_classes in options.ranks_classes:
        setting = Setting(
            options.ranks_samples, num_classes, options.batch, Stored(options.stored[0])
        )
        arguments = setting, options.model, options.image_size, options.pairs, options.block
        rows.append(
            _row(setting, run_on_ranks(1, measure_share, *arguments, threads=options.threads)[0])
        )
    return rows


def run_cuda(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way of storing, batch and path; as many samples as 60 % of the free memory
    hold."""
    rows = []
    for stored in map(Stored, options.stored):
        row_bytes = Setting(1, options.num_classes, 1, stored).formula_bytes()
        num_samples = min(options.num_samples, int(0.6 * torch.cuda.mem_get_info()[0]) // row_bytes)
        for batch in options.cuda_batches:
            setting = Setting(num_samples, options.num_classes, batch, stored)
            found = run_on_ranks(
                1, measure_update, setting, "cuda", options.cuda_steps, threads=options.threads
            )[0]
            rows += [_row(setting, row) for row in found]
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "imagenet": run_imagenet,
    "wide": run_wide,
    "ranks": run_ranks,
    "step": run_step,
    "cuda": run_cuda,
}


def available_bytes() -> int:
    """Memory that a new process can have without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def metrics_of(parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what `benchmarks.compare` reads. Sizes and shares within a run hold on other machines
    as well."""
    found: dict[str, Any] = {}
    for part in ("imagenet", "wide"):
        for row in parts.get(part, []):
            if "left_out" in row:
                continue
            name = f"{part} {row['name']}"
            found |= {
                f"{name}: record, samples/s": files.metric(
                    [1e6 / value for value in row["record_us_per_sample"]], "samples/s", "higher"
                ),
                f"{name}: share of copy bandwidth": files.metric(
                    row["share_of_copy_bandwidth"], "", "higher", relative=True
                ),
                f"{name}: state": files.metric(
                    [row["state_bytes"]], "bytes", "lower", relative=True
                ),
                f"{name}: peak RSS": files.metric(
                    [row["peak_resident_bytes"]], "bytes", "lower", relative=True
                ),
            }
            if row["end_epoch_ms"]:
                found[f"{name}: end_epoch"] = files.metric(row["end_epoch_ms"], "ms", "lower")
    for row in parts.get("ranks", []):
        name = f"ranks W={row['world_size']} {row['name']}"
        found[f"{name}: time per sample and rank"] = files.metric(
            row["us_per_sample_and_rank"], "us", "lower"
        )
        found[f"{name}: sent per step and rank"] = files.metric(
            [row["bytes_sent_per_step"]], "bytes", "lower", relative=True
        )
    for row in parts.get("step", []):
        name = f"step {row['name']}: with record over without"
        found[name] = files.metric(row["step_ratio"], "", "lower", relative=True)
    for row in parts.get("cuda", []):
        name = f"cuda {row['name']} B={row['batch']} {row['path']}"
        found |= {
            f"{name}: update": files.metric(row["update_us"], "us", "lower"),
            f"{name}: share of copy bandwidth": files.metric(
                row["share_of_copy_bandwidth"], "", "higher", relative=True
            ),
            f"{name}: launches per step": files.metric(
                [row["launches_per_step"]], "", "lower", relative=True
            ),
            f"{name}: peak memory": files.metric(
                [row["peak_memory_bytes"]], "bytes", "lower", relative=True
            ),
        }
    return found


# ---- presentation


def as_markdown(result: dict[str, Any]) -> str:
    """The result page."""
    parts, settings, where = result["parts"], result["settings"], result["provenance"]
    text = ["# Cost of scoring"]
    if rows := parts.get("imagenet"):
        text += [
            "",
            f"## One rank owns all: N = {rows[0]['num_samples']:,}, C = {rows[0]['num_classes']:,}",
            "",
            _table_of(rows),
            "",
            *(_limit(row) for row in rows if "resident_limit_bytes" in row),
            "",
            (
                f"Peak RSS is that of the process, {rows[0]['resident_before_bytes'] / 1e9:.2f} GB"
                " of it before the scorer (torch, the outputs); net is the rest."
            ),
        ]
    if rows := parts.get("wide"):
        measured = [row for row in rows if "left_out" not in row]
        text += [
            "",
            (
                f"## One shard of {settings['wide_shards']}: {settings['wide_samples']:,} samples,"
                f" C = {rows[0]['num_classes']:,}"
            ),
            "",
        ]
        if measured:
            text += [
                _table_of(measured),
                "",
                (
                    f"The shard holds {rows[0]['num_samples']:,} samples, all of its tables are in"
                    f" memory; a pass records the same random {measured[0]['rows_per_pass']:,} of"
                    " them, so no epoch ends here."
                ),
            ]
        text += [
            f"Left out: stored as {row['stored']} ({row['left_out']})."
            for row in rows
            if "left_out" in row
        ]
    if rows := parts.get("ranks"):
        waits = (
            ", so more ranks than that wait for each other"
            if max(settings["ranks"]) > where["num_cpus"]
            else ""
        )
        text += [
            "",
            (
                f"## Rows between gloo ranks: N = {rows[0]['num_samples']:,}, batch"
                f" {rows[0]['batch']} per rank, one thread each"
            ),
            "",
            _ranks_table(rows),
            "",
            (
                "Whole epochs, `end_epoch` included, of the slowest rank; all "
                f"ranks share {where['num_cpus']} CPUs{waits}."
            ),
        ]
    if rows := parts.get("step"):
        text += [
            "",
            (
                f"## Share of a training step: {rows[0]['model']}, {rows[0]['image_size']} pixels,"
                f" batch {rows[0]['batch']}"
            ),
            "",
            _step_table(rows),
            "",
            (
                f"Median over {settings['pairs']} pairs of alternating blocks of"
                f" {rows[0]['steps_per_block']} steps, without data loading and `end_epoch`."
            ),
        ]
    if rows := parts.get("cuda"):
        text += [
            "",
            (
                f"## The owner update on CUDA: N = {rows[0]['num_samples']:,}, C ="
                f" {rows[0]['num_classes']:,}"
            ),
            "",
            _cuda_table(rows),
            "",
            (
                f"Medians of {settings['cuda_steps']} steps by CUDA events while the device is kept"
                " busy, the paths in turns. Launches: kernels and copies of a whole `record` on"
                " one rank, by the profiler."
            ),
        ]
    elif "cuda" not in settings["only"]:
        text += ["", "The part `cuda` was not run."]
    text += [
        "",
        (
            f"Medians of {result['repetitions']} timed passes, range in brackets. `python -m"
            " benchmarks.scorer`; its docstring says what is measured and what is not."
        ),
        "",
        files.provenance_line(result),
        "",
    ]
    return "\n".join(text)


def _span(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _table_of(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            "stored as",
            "record, us/sample",
            "samples/s",
            "moved, B/sample",
            "of copy bandwidth",
            "end_epoch, ms",
            "state, GB",
            "formula, GB",
            "peak RSS, GB",
            "net, GB",
        ]
    ]
    for row in rows:
        taken = statistics.median(row["record_us_per_sample"])
        cells.append(
            [
                row["stored"],
                f"{taken:.1f} ({_span(row['record_us_per_sample'], 1)})",
                f"{1e6 / taken:,.0f}",
                f"{row['moved_bytes_per_sample']:,}",
                (
                    f"{statistics.median(row['share_of_copy_bandwidth']):.1%} of"
                    f" {row['copy_bandwidth'] / 1e9:.1f} GB/s"
                ),
                f"{statistics.median(row['end_epoch_ms']):.0f}" if row["end_epoch_ms"] else "-",
                f"{row['state_bytes'] / 1e9:.3f}",
                f"{row['formula_bytes'] / 1e9:.3f}",
                f"{row['peak_resident_bytes'] / 1e9:.2f}",
                f"{row['net_resident_bytes'] / 1e9:.2f}",
            ]
        )
    return files.table(cells)


def _limit(row: dict[str, Any]) -> str:
    verdict = "stayed under" if row["is_within_limit"] else "DID NOT STAY under"
    return (
        f"Stored as {row['stored']} the process {verdict} {row['resident_limit_bytes'] / 1e9:.0f}"
        f" GB of RSS ({row['peak_resident_bytes'] / 1e9:.2f} GB)."
    )


def _ranks_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            "ranks, classes, stored as",
            "us per sample and rank",
            "range",
            "collectives/step",
            "sent/step and rank, B",
            "of it off the rank, B",
            "B (C x 4 + 16)",
            "ratio",
        ]
    ]
    cells += [
        [
            f"{row['world_size']}, {row['num_classes']}, {row['stored']}",
            f"{statistics.median(row['us_per_sample_and_rank']):.1f}",
            _span(row["us_per_sample_and_rank"], 1),
            f"{row['calls_per_step']:.2f}",
            f"{row['bytes_sent_per_step']:,.0f}",
            f"{row['off_rank_bytes_per_step']:,.0f}",
            f"{row['formula_bytes_per_step']:,}",
            f"{row['bytes_sent_per_step'] / row['formula_bytes_per_step']:.3f}",
        ]
        for row in rows
    ]
    return files.table(cells)


def _step_table(rows: list[dict[str, Any]]) -> str:
    cells = [["classes, stored as", "step, ms", "with record, ms", "ratio", "range"]]
    cells += [
        [
            f"{row['num_classes']}, {row['stored']}",
            f"{statistics.median(row['step_ms_without']):.1f}",
            f"{statistics.median(row['step_ms_with']):.1f}",
            f"{statistics.median(row['step_ratio']):.3f}",
            _span(row["step_ratio"], 3),
        ]
        for row in rows
    ]
    return files.table(cells)


def _cuda_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            "stored as, batch, path",
            "update, us",
            "range",
            "of copy bandwidth",
            "launches/step",
            "peak memory, GB",
            "state, GB",
        ]
    ]
    cells += [
        [
            f"{row['stored']}, {row['batch']}, {row['path']}",
            f"{statistics.median(row['update_us']):.1f}",
            _span(row["update_us"], 1),
            (
                f"{statistics.median(row['share_of_copy_bandwidth']):.1%} of"
                f" {row['copy_bandwidth'] / 1e9:,.0f} GB/s"
            ),
            f"{row['launches_per_step']:.1f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f}",
            f"{row['state_bytes'] / 1e9:.2f}",
        ]
        for row in rows
    ]
    return files.table(cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, write both result files; returns the exit code."""
    return files.run("scorer", build_parser().parse_args(arguments), check, measure, as_markdown)


if __name__ == "__main__":
    sys.exit(main())
