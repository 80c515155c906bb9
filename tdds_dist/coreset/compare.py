"""Stage `compare`: how much scores agree, within a run and between runs, and what their coresets
are made of.

Owns the questions (rank correlation, overlap of coresets, share of each class and of the noise that
is kept), the text and the CSV file; which samples a score keeps is `select`'s. Of a score file only
ranks and one bit per sample and pruning rate stay in memory. A damaged or foreign score file
becomes a sentence at the end of the text instead of an exception.
"""

# N dataset, M kept samples, P pruning rates, B bytes of N bits, C classes

import csv
import io
import itertools
import string
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.scores import DEFAULT_RATES, base_key
from tdds_dist.coreset.agreement import (
    Ranked,
    between_runs,
    in_order,
    keep_rates,
    noise_kept,
    over_pairs,
    rank,
    short_names,
    within_run,
)
from tdds_dist.coreset.samplers import num_kept
from tdds_dist.data.manifest import Manifest, manifest_path, read_manifest
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    Fingerprint,
    load_scores,
    require_same_dataset,
    write_atomically,
)
from tdds_dist.runs.directory import RunDir
from tdds_dist.text import count, decimal, percent, table

COLUMNS = ("table", "run_a", "score_a", "run_b", "score_b", "pruning_rate", "class", "value")
AT_RANDOM = "at random"  # what a uniform draw of the same size is expected to give
WIDTH = 120  # of the text, characters
ALIKE = 0.9  # Spearman, up or down, from which on two scores say the same
MAX_PAIRS = 6  # of runs that the text lists; of more it gives the extremes


def compare(
    runs: Sequence[Path],
    *,
    pruning_rates: Sequence[float] = DEFAULT_RATES,
    out: Path | None = None,
) -> str:
    """Run the stage; return the text to print and write every number as CSV (default: compare.csv
    in the first run).

    Each file in `scores/` is compared as it is at every pruning rate, with the sampler its score is
    meant for; the TDDS windows of a config are not tied to their rates here. Text: shares in
    percent, overlaps with the run's first TDDS window. CSV: one row per number, shares in [0, 1],
    with the columns COLUMNS. Its tables:

    * `spearman`, `overlap`: each pair of scores of a run (run_a = run_b), each score in each pair
      of runs (score_a = score_b); `spearman_mean`, `overlap_mean`: the mean over the pairs of runs;
    * `keep_rate`: share of a class that is kept; `class` is its number; classes without a sample
      are left out;
    * `noisy_kept`, `coreset_noisy` where the manifest knows the true labels: share of the noisy
      samples that is kept, of the coreset that is noisy; `corrupted_kept`, `coreset_corrupted`
      likewise, `class` the kind of corruption or empty for all; score_a `at random` is the
      expectation of a uniform draw.

    Raises:
        InputError: no run, a run without scores, runs of different datasets, a rate out of range, a
            file that cannot be written.
    """
    runs, rates = [Path(run) for run in runs], sorted(set(pruning_rates))
    if not runs or not rates:
        raise InputError(
            f"{len(runs)} runs and {len(rates)} pruning rates are nothing to compare; give one of"
            " each or more"
        )
    places = [run.resolve() for run in runs]
    if twice := [run for run, place in zip(runs, places, strict=True) if places.count(place) > 1]:
        raise InputError(f"{twice[-1]} is given twice; name each run once")
    for rate in rates:
        num_kept(10**9, rate)  # the range, before any file is read
    found = _Findings(rates)
    letters = [*string.ascii_uppercase, *(f"R{number}" for number in range(27, len(runs) + 1))]
    read = [
        _read_run(run, name, letter, found)
        for run, name, letter in zip(runs, _names(runs), letters, strict=False)
    ]
    for other in read[1:]:
        require_same_dataset(other.fingerprint, read[0].fingerprint, f"run {other.run.path}")
    found.short = short_names([key for run in read for key in run.ranked])
    label_N = next((run.label_N for run in read if run.fingerprint.labels_sha256), read[0].label_N)
    manifest_of = cache(read_manifest)
    for run in read:
        _add_agreement(run, found)
        _add_classes(run, label_N, found)
        _add_noise(run, manifest_of, found)
    _add_between(read, found)
    path = runs[0] / "compare.csv" if out is None else Path(out)
    _write_csv(path, found.rows)
    return _page(read, found, path)


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run:
    """One run as it was read; `ranked` is by file name, the first TDDS window of the config
    first."""

    run: RunDir
    name: str
    letter: str
    config: dict[str, Any]
    ranked: dict[str, Ranked]
    fingerprint: Fingerprint
    label_N: np.ndarray


class _Findings:
    """The results: `rows` of the CSV, `parts` of the text, `problems` at its end, `short` names of
    the scores."""

    def __init__(self, rates: list[float]):
        self.rates = rates
        self.rows: list[tuple[Any, ...]] = []
        self.parts: list[str] = []
        self.problems: list[str] = []
        self.short: dict[str, str] = {}

    def row(
        self,
        table: str,
        value: float,
        run_a: str = "",
        score_a: str = "",
        run_b: str = "",
        score_b: str = "",
        rate: float | str = "",
        group: int | str = "",
    ) -> None:
        self.rows.append((table, run_a, score_a, run_b, score_b, rate, group, f"{value:.9g}"))

    def part(
        self, title: str, names: list[str] | None = None, groups: Sequence[list[str]] = ()
    ) -> None:
        """Add a part of the text: a title, and a table of scores in rows and groups of columns."""
        self.parts.append(f"{title}\n{_blocks(names, [*groups])}" if names else title)

    def agreement(
        self,
        values: Sequence[float],
        run_a: str,
        score_a: str,
        run_b: str,
        score_b: str,
        of: str = "",
    ) -> None:
        """Add a rank correlation and the overlap at each rate."""
        self.row(f"spearman{of}", values[0], run_a, score_a, run_b, score_b)
        for rate, share in zip(self.rates, values[1:], strict=True):
            self.row(f"overlap{of}", share, run_a, score_a, run_b, score_b, rate)


def _read_run(path: Path, name: str, letter: str, found: _Findings) -> _Run:
    run = RunDir(path)
    config = run.read_config()
    ranked: dict[str, Ranked] = {}
    dataset, label_N, unusable = None, np.empty(0, np.int64), []
    for file in sorted(run.scores.glob("*.npz")):
        try:
            scores = load_scores(file)
            if dataset is not None:
                require_same_dataset(scores.fingerprint, dataset, str(file))
            if bad := int(np.count_nonzero(~np.isfinite(scores.score_N))):
                raise InputError(
                    f"{file} holds {bad} values that are not finite; compute it again with `tdds"
                    " score`"
                )
        except InputError as error:
            unusable.append(str(error))
            continue
        ranked[file.stem] = rank(scores, found.rates)
        if dataset is None or not dataset.labels_sha256:
            dataset, label_N = scores.fingerprint, scores.label_N
    if dataset is None:
        because = f" that can be used ({unusable[0]})" if unusable else ""
        raise InputError(
            f"{run.scores} holds no score{because}; run `tdds collect`, or `tdds score {path}`"
        )
    found.problems += unusable
    return _Run(run, name, letter, config, in_order(ranked, config), dataset, label_N)


# --------------------------------------------------------------------------------------------------


def _add_agreement(run: _Run, found: _Findings) -> None:
    """Add rank correlation and overlap of all pairs of scores of one run."""
    keys = [*run.ranked]
    if len(keys) == 1:
        found.part(f"{run.letter}: one score only ({keys[0]}), nothing to correlate it with")
        return
    correlation = {(key, key): 1.0 for key in keys}
    common: dict[str, list[float]] = {}
    for (a, b), values in within_run(run.ranked).items():
        correlation[a, b] = correlation[b, a] = values[0]
        found.agreement(values, run.name, a, run.name, b)
        if a == keys[0]:
            common[b] = values[1:]
    numbered = [
        f"{position:>{len(str(len(keys)))}} {found.short[key]}"
        for position, key in enumerate(keys, 1)
    ]
    found.part(
        f"{run.letter}: Spearman rank correlation of the scores",
        numbered,
        [
            _group(str(position), [[decimal(correlation[row, column])] for row in keys])
            for position, column in enumerate(keys, 1)
        ],
    )
    found.part(
        f"{run.letter}: which scores carry information of their own\n" + _own(found, correlation)
    )
    num_samples = run.fingerprint.num_samples
    found.part(
        f"{run.letter}: percent of the coreset in common with {found.short[keys[0]]}, by pruning"
        " rate",
        [*(found.short[key] for key in common), AT_RANDOM],
        [
            _group(
                percent(rate),
                [[_percent(shares[p])] for shares in common.values()]
                + [[_percent(num_kept(num_samples, rate) / num_samples)]],
            )
            for p, rate in enumerate(found.rates)
        ],
    )


def _own(found: _Findings, correlation: dict[tuple[str, str], float]) -> str:
    """Say which scores rank alike, and how near each of the others comes to any: by the size of the
    rank correlation, as a ranking turned over says the same."""
    keys = [
        key
        for key in dict.fromkeys(a for a, _ in correlation)
        if base_key(key) != "random"
        and not all(np.isnan(value) for (a, b), value in correlation.items() if a == key != b)
    ]
    if len(keys) < 2:
        return "fewer than two scores are neither random nor constant"
    near = {(a, b): abs(correlation[a, b]) for a, b in itertools.product(keys, keys) if a != b}
    groups = [{key} for key in keys]
    for (a, b), size in near.items():
        of_a, of_b = (next(group for group in groups if key in group) for key in (a, b))
        if size >= ALIKE and of_a is not of_b:
            of_a |= of_b
            groups = [group for group in groups if group is not of_b]
    lines, alone = [], []
    for group in groups:
        members = [key for key in keys if key in group]
        if len(members) > 1:
            lines.append("rank alike: " + ", ".join(found.short[key] for key in members))
            continue
        other = max((key for key in keys if key != members[0]), key=lambda k: near[members[0], k])
        nearest = f"{found.short[other]} {decimal(correlation[members[0], other])}"
        alone.append(f"{found.short[members[0]]} (nearest: {nearest})")
    if alone:
        lines.append("on their own: " + ", ".join(alone))
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def _add_between(runs: list[_Run], found: _Findings) -> None:
    """Add rank correlation and overlap of the same score in each pair of runs, and their means."""
    names: list[str] = []
    lines: list[list[float]] = []  # Spearman, then the overlap at each rate
    most = 0
    for key, pairs in between_runs([run.ranked for run in runs]).items():
        for (a, b), values in pairs.items():
            found.agreement(values, runs[a].name, key, runs[b].name, key)
        of_pair = [*pairs.values()]
        mean = over_pairs(np.mean, of_pair)
        found.agreement(mean, "", key, "", key, of="_mean")
        most = max(most, len(pairs))
        names.append(found.short[key])
        lines.append(mean)
        if len(pairs) > MAX_PAIRS:
            names += ["  smallest", "  largest"]
            lines += [over_pairs(np.min, of_pair), over_pairs(np.max, of_pair)]
        elif len(runs) > 2:
            names += [f"  {runs[a].letter}-{runs[b].letter}" for a, b in pairs]
            lines += of_pair
    if not names:
        if len(runs) > 1:
            found.part("Between runs: no score is present in two of them")
        return
    mean_of = (
        ""
        if most < 2
        else ", mean over pairs" + ("" if most > MAX_PAIRS else " and each pair") + " of runs"
    )
    found.part(
        f"Between runs: agreement of the same score{mean_of}",
        names,
        [
            _group("Spearman", [[decimal(line[0], 3)] for line in lines]),
            _group(
                "percent of the coreset in common",
                [[*map(_percent, line[1:])] for line in lines],
                [percent(rate) for rate in found.rates],
            ),
        ],
    )


def _add_classes(run: _Run, label_N: np.ndarray, found: _Findings) -> None:
    """Add the share of every class that each score keeps."""
    num_classes = run.fingerprint.num_classes
    if not (label_N >= 0).any():
        found.problems.append(
            f"{run.run.scores}: no labels are known, so nothing is said on classes; score again"
            " with --beton FILE to take labels from the dataset"
        )
        return
    by_rate: list[list[list[str]]] = [[] for _ in found.rates]
    for key, ranked in run.ranked.items():
        for position, rate in enumerate(found.rates):
            share_C = keep_rates(ranked.index(position), label_N, num_classes)
            present = np.flatnonzero(~np.isnan(share_C))
            for class_id in present.tolist():
                found.row("keep_rate", share_C[class_id], run.name, key, rate=rate, group=class_id)
            share = share_C[present]
            by_rate[position].append(
                [
                    *(_whole_percent(function(share)) for function in (np.min, np.median, np.max)),
                    str(int(np.count_nonzero(share == 0))),
                ]
            )
    found.part(
        f"{run.letter}: percent of a class that is kept (smallest, median, largest), and how many"
        " classes keep none",
        [found.short[key] for key in run.ranked],
        [
            _group(percent(rate), cells, ["min", "med", "max", "none"])
            for rate, cells in zip(found.rates, by_rate, strict=True)
        ],
    )


def _add_noise(run: _Run, manifest_of: Callable[[Path], Manifest | None], found: _Findings) -> None:
    """Add the share of wrong labels and of corrupted images that each score keeps, where the
    manifest knows them."""
    if not (run.config.get("data") or {}).get("train"):
        return
    try:
        path = run.run.train_file()
        if not path.is_file():
            raise InputError(
                f"run {run.run.path}: {path} is no longer there, so whether labels are noisy is not"
                " known"
            )
        manifest = manifest_of(path)
        if manifest is None or (manifest.noisy_N is None and manifest.corruption is None):
            return
        require_same_dataset(manifest.fingerprint, run.fingerprint, str(manifest_path(path)))
    except InputError as error:
        found.problems.append(str(error))
        return
    if manifest.noisy_N is not None:
        _add_kept("noisy", "samples with a wrong label", run, {"": manifest.noisy_N}, found)
    if manifest.corrupted_N is not None:
        kinds = {"": manifest.corrupted_N} | manifest.corruption_kinds
        _add_kept("corrupted", "corrupted images", run, kinds, found)


def _add_kept(
    word: str, what: str, run: _Run, kinds: dict[str, np.ndarray], found: _Findings
) -> None:
    """Add one kind of noise; `kinds` maps a part of it, "" for all, to its samples (bool [N])."""
    num_samples, num_noisy = run.fingerprint.num_samples, int(np.count_nonzero(kinds[""]))
    if num_noisy == 0:
        return
    by_rate: list[list[list[str]]] = [[] for _ in found.rates]
    for key in [*run.ranked, AT_RANDOM]:
        for position, rate in enumerate(found.rates):
            index_M = run.ranked[key].index(position) if key in run.ranked else None
            for kind, noisy_N in kinds.items():
                if index_M is not None:
                    kept, of_coreset = noise_kept(index_M, noisy_N)
                else:
                    kept = num_kept(num_samples, rate) / num_samples
                    of_coreset = float(noisy_N.mean())
                found.row(f"{word}_kept", kept, run.name, key, rate=rate, group=kind)
                found.row(f"coreset_{word}", of_coreset, run.name, key, rate=rate, group=kind)
                if kind == "":
                    by_rate[position].append([_percent(kept), _percent(of_coreset)])
    found.part(
        f"{run.letter}: {what} ({count(num_noisy)} of {count(num_samples)}); kept: percent of them;"
        " share: percent of the coreset",
        [*(found.short[key] for key in run.ranked), AT_RANDOM],
        [
            _group(percent(rate), cells, ["kept", "share"])
            for rate, cells in zip(found.rates, by_rate, strict=True)
        ],
    )


# --------------------------------------------------------------------------------------------------


def _group(title: str, cells: list[list[str]], subtitles: list[str] | None = None) -> list[str]:
    """Put columns under one title: lines of equal width, of which the first two are heads."""
    rows = table([*([subtitles] if subtitles else []), *cells], range(len(cells[0])), gap=" ")
    width = max(len(title), *map(len, rows))
    return [
        *([title.center(width)] if subtitles else ["", title.rjust(width)]),
        *(row.rjust(width) for row in rows),
    ]


def _blocks(names: list[str], groups: list[list[str]]) -> str:
    """Put groups of columns side by side; those that do not fit into WIDTH follow below with the
    names repeated."""
    blocks: list[list[list[str]]] = []
    used = WIDTH
    for group in groups:
        if used + 2 + len(group[1]) > WIDTH:
            blocks.append([])
            used = max(map(len, ["score", *names]))
        blocks[-1].append(group)
        used += 2 + len(group[1])
    text = []
    for block in blocks:
        lines = [*zip(["", "score", *names], *block, strict=True)]
        lines = lines if any(lines[0]) else lines[1:]
        text.append("\n".join(table(lines, num_heads=len(lines) - len(names))))
    return "\n\n".join(text)


def _page(runs: list[_Run], found: _Findings, path: Path) -> str:
    """Return the whole text: what was compared, the tables, where the CSV is, what was left out."""
    dataset = runs[0].fingerprint
    head = [f"{count(dataset.num_samples)} samples, {count(dataset.num_classes)} classes"]
    lines = []
    for run in runs:
        facts = [
            ("", (run.config.get("model") or {}).get("name")),
            ("seed ", (run.config.get("run") or {}).get("seed")),
            ("world size ", run.run.read_env().get("world_size")),
        ]
        said = [f"{word}{value}" for word, value in facts if value is not None]
        lines.append([run.letter, run.name, ", ".join([*said, f"{len(run.ranked)} scores"])])
    head += table(lines)
    names = table(
        [[short, f"= {key}"] for key, short in found.short.items() if short != key], gap=" "
    )
    end = [
        f"wrote {path} ({count(len(found.rows))} rows)",
        *(f"note: {problem}" for problem in dict.fromkeys(found.problems)),
    ]
    return "\n\n".join(
        ["\n".join(head), *(["\n".join(names)] if names else []), *found.parts, "\n".join(end)]
    )


def _names(runs: list[Path]) -> list[str]:
    """Return the folder names, or the whole paths where two have the same name."""
    names = [run.resolve().name for run in runs]
    return [
        str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)
    ]


def _percent(share: float) -> str:
    return decimal(100 * share, 1)


def _whole_percent(share: float) -> str:
    """Write a share in whole percent; a small share does not become 0, nor a large one 100."""
    return "<1" if 0 < share < 0.005 else ">99" if 0.995 <= share < 1 else f"{100 * share:.0f}"


def _write_csv(path: Path, rows: list[tuple[Any, ...]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    try:
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error}); choose another file with --out"
        ) from error
