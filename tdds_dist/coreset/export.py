"""Stage `export`: scores and coresets as files of other tools, and the trajectory. The way back is
`import_scores`, for trajectories `scoring.offline`.

Owns which files each format has, and the conventions of the authors' pair (docs/interchange.md).
What they are made from is read by `export_source`; the tables are made by `sample_table`.
"""

# N dataset, M kept samples

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch

from tdds_dist.coreset import samplers
from tdds_dist.coreset.card import card_text
from tdds_dist.coreset.croissant import croissant_text
from tdds_dist.coreset.export_source import (
    Source,
    configured_rates,
    dataset_of,
    read_source,
    utf8_paths,
)
from tdds_dist.coreset.sample_table import sample_table, write_csv, write_parquet
from tdds_dist.coreset.select import default_sampler, make_coreset
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    Coreset,
    Fingerprint,
    Scores,
    load_coreset,
    require_same_dataset,
)
from tdds_dist.runs.directory import RunDir, coreset_name, write_keeping
from tdds_dist.scoring.official_outputs import is_dynamics
from tdds_dist.scoring.offline import open_recorded
from tdds_dist.scoring.trajectory import Trajectory
from tdds_dist.scoring.trajectory_table import write_table

FORMATS = ("parquet", "csv", "paths", "official", "torch-subset", "card", "trajectory")

_SUFFIX = {"parquet": ".parquet", "csv": ".csv", "paths": ".txt", "torch-subset": ".pt"}


def export(
    source: Path,
    kind: str,
    out: Path | None = None,
    *,
    pruning_rates: Sequence[float] = (),
    ranks: bool = True,
    beton: Path | None = None,
) -> tuple[list[Path], list[str]]:
    """Write scores, a coreset or a trajectory in a format of another tool; return the files, and
    one line each of what to know.

    `source` is a run directory, a score file or a coreset, for `trajectory` a run or a trajectory
    directory; `kind` one of FORMATS. Files go to RUN/export, or beside the file; `out` is the file
    to write (a folder: the file in it), for `official`, `card` and `trajectory` the folder.
    `pruning_rates` default to those of the run's config, else to DEFAULT_RATES of `config.scores`.
    Without `ranks` tables lack them: they follow from the scores, and pack badly. Paths and labels
    come from `beton`, else from the run's data.train.

    Raises:
        InputError: a format that does not fit the source, scores that are not finite, a .beton of
        another dataset.
    """
    source = Path(source)
    if kind not in FORMATS:
        raise InputError(f"kind={kind!r} is unknown; use one of {', '.join(FORMATS)}")
    rates = tuple(dict.fromkeys(pruning_rates))
    for rate in rates:
        samplers.num_kept(10**9, rate)  # the range, before any file is read
    if kind == "trajectory":
        if rates or not ranks:
            raise InputError(
                "a trajectory holds no scores, so pruning rates and ranks say nothing; leave both"
                " out"
            )
        return _export_trajectory(source, out, beton)
    given = read_source(source)
    if given.coreset is not None and rates:
        raise InputError(
            f"{source} is a coreset, made at pruning_rate={given.coreset.pruning_rate:g}; leave"
            " pruning rates out, or give the scores"
        )
    if kind == "official":
        return _export_official(given, _folder(source) if out is None else Path(out), rates)
    if kind == "card":
        return _export_card(given, out, rates, ranks, beton)
    notes: list[str] = []
    write: Callable[[IO[bytes]], object]
    if kind in ("csv", "parquet"):
        name = "scores" if source.is_dir() else source.stem
        columns, meta = sample_table(given, rates, ranks, beton, notes)
        write = partial(write_csv if kind == "csv" else write_parquet, columns, meta)
    else:
        coreset, name = _one_coreset(given, kind, rates, notes)
        if kind == "paths":
            path = _paths(given, beton, coreset.fingerprint)
            write = partial(_write_lines, [path[i] for i in coreset.index_M])
        else:
            write = partial(
                torch.save,
                {
                    "index": torch.from_numpy(coreset.index_M),
                    "importance": torch.from_numpy(coreset.importance_M),
                    "num_samples": coreset.fingerprint.num_samples,
                },
            )
    target = _folder(source) / f"{name}{_SUFFIX[kind]}" if out is None else Path(out)
    if target.is_dir():
        target /= f"{name}{_SUFFIX[kind]}"
    return [target], notes + write_keeping(target, write)


def _folder(source: Path) -> Path:
    return source / "export" if source.is_dir() else source.parent


def _one_scores(given: Source, kind: str) -> tuple[str, Scores]:
    if len(given.scores) > 1:
        raise InputError(
            f"{given.path} holds {len(given.scores)} scores ({', '.join(given.scores)}), and {kind}"
            " takes one; give a file of its scores/ or coresets/"
        )
    return next(iter(given.scores.items()))


def _one_coreset(
    given: Source, kind: str, rates: Sequence[float], notes: list[str]
) -> tuple[Coreset, str]:
    """Return the coreset to write and the stem of its file; cut from the scores where the source is
    no coreset."""
    if given.coreset is not None:
        return given.coreset, given.path.stem
    name, scores = _one_scores(given, kind)
    if len(rates) != 1:
        raise InputError(
            f"pruning_rates={list(rates)}: {kind} of {given.path} needs exactly one; give one"
            " pruning rate, or a coreset"
        )
    coreset, warnings = make_coreset(scores, rates[0])
    notes += warnings
    method = name if given.path.is_dir() else given.path.stem
    return coreset, Path(coreset_name(method, rates[0])).stem


def _paths(given: Source, beton: Path | None, found: Fingerprint) -> list[str]:
    dataset, why = dataset_of(given, beton, found)
    if dataset is None or dataset.manifest is None:
        raise InputError(f"the paths of {given.path} are not known: {why}")
    return utf8_paths(dataset.manifest.path)


def _write_lines(lines: Sequence[object], file: IO[bytes]) -> None:
    file.write("".join(f"{line}\n" for line in lines).encode())


# ---- a folder for a hub


def _export_card(
    given: Source, out: Path | None, rates: Sequence[float], ranks: bool, beton: Path | None
) -> tuple[list[Path], list[str]]:
    """Write README.md, the table as Parquet, and the indices of each coreset as text, one per
    line: of a run all its coresets, of scores one per pruning rate."""
    folder = Path(out) if out is not None else _folder(given.path) / "card"
    if folder.is_file():
        raise InputError(f"out={folder} is a file, and card is several of them; give a folder")
    notes: list[str] = []
    columns, meta = sample_table(given, rates, ranks, beton, notes)
    if given.coreset is not None:
        coresets = {given.path.stem: given.coreset}
        settings = {given.coreset.score_key: given.coreset.settings}
        found = given.coreset.fingerprint
    else:
        settings, coresets = meta["settings"], {}
        found = next(iter(given.scores.values())).fingerprint
        if given.path.is_dir():
            for file in sorted(RunDir(given.path).coresets.glob("*.npz")):
                coresets[file.stem] = load_coreset(file)
        else:
            name, scores = _one_scores(given, "card")
            for rate in rates or configured_rates(given.run):
                title = Path(coreset_name(name, rate)).stem
                coresets[title], warnings = make_coreset(scores, rate)
                notes += warnings
    for name, coreset in coresets.items():
        require_same_dataset(coreset.fingerprint, found, name)
    dataset, _ = dataset_of(given, beton, found)
    text = card_text(
        given.run.read_config()["run"]["name"] if given.run is not None else given.path.stem,
        "samples.parquet",
        found,
        None if dataset is None else dataset.manifest,
        settings,
        coresets,
    )
    writers: dict[Path, Callable[[IO[bytes]], object]] = {
        folder / "README.md": lambda file: file.write(text.encode()),
        folder / "samples.parquet": partial(write_parquet, columns, meta),
    }
    for name, coreset in coresets.items():
        indices = partial(_write_lines, coreset.index_M.tolist())
        writers[folder / "indices" / f"{name}.txt"] = indices
    for path, write in writers.items():
        notes += write_keeping(path, write)
    return [*writers], notes


# ---- the trajectory


def _export_trajectory(
    source: Path, out: Path | None, beton: Path | None
) -> tuple[list[Path], list[str]]:
    """Write trajectory.parquet, and croissant.json which describes it."""
    import pyarrow.parquet

    folder = Path(out) if out is not None else source / "export" / "trajectory"
    if folder.is_file():
        raise InputError(f"out={folder} is a file, and trajectory is two of them; give a folder")
    if not source.is_dir() or is_dynamics(source):
        raise InputError(
            f"{source} is no trajectory of our own; give a run directory, or the folder that"
            " ShardedScorer(trajectory=...) wrote"
        )
    origin = open_recorded(source, beton)
    assert isinstance(origin.recorded, Trajectory)
    run = None if origin.config is None else RunDir(source)
    dataset, _ = dataset_of(Source(source, {}, None, run), beton, origin.found)
    names = [] if dataset is None or dataset.manifest is None else dataset.manifest.class_names
    found = dataset.fingerprint if dataset is not None and names else origin.found
    more = {
        "fingerprint": asdict(found),
        "class_names": names,
        "settings": {key: origin.settings[key] for key in ("seed", "world_size") if run},
    }
    table, text = folder / "trajectory.parquet", folder / "croissant.json"
    notes = write_keeping(table, partial(write_table, origin.recorded, more))
    with table.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    types = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(table)}
    name = source.name if run is None else run.read_config()["run"]["name"]
    described = croissant_text(name, table, sha256, types, origin.recorded.num_epochs, found)
    notes += write_keeping(text, lambda file: file.write(described.encode()))
    return [table, text], notes


# ---- the authors' pair


def _export_official(
    given: Source, folder: Path, rates: Sequence[float]
) -> tuple[list[Path], list[str]]:
    if folder.is_file():
        raise InputError(f"out={folder} is a file, and official is two of them; give a folder")
    if given.coreset is not None:
        suffix, mask_N, score_N = given.path.stem, *_official_coreset(given.path, given.coreset)
        kept = [(given.coreset.pruning_rate, len(given.coreset.index_M))]
    else:
        name, scores = _one_scores(given, "official")
        if default_sampler(scores) != "top":
            raise InputError(
                f"{given.path}: score {scores.key!r} does not keep what ranks highest, as the"
                " authors' loader does; give a coreset made by `tdds select`"
            )
        suffix, mask_N = _official_suffix(name, scores), samplers.descending(scores.score_N)[::-1]
        score_N = scores.score_N[mask_N]
        kept = [
            (rate, samplers.num_kept(len(score_N), rate))
            for rate in rates or configured_rates(given.run)
        ]
    if score_N[0] == score_N[-1]:
        raise InputError(
            f"{given.path}: all {len(score_N)} values are {score_N[0]:g}, and the authors' loader"
            " divides by their range; their code can only take values that differ"
        )
    notes = [
        f"--subset_rate {subset_rate(len(score_N), num)!r} keeps {num} of {len(score_N)} samples"
        f" (pruning rate {rate:g})"
        for rate, num in kept
    ]
    if given.coreset is not None and (score_N[0], score_N[-1]) != (0.0, 1.0):
        notes.append(
            f"the authors' loader scales the importances, {score_N[0]:g} to {score_N[-1]:g}"
            " (removed samples: 0), to [0, 1]"
        )
    paths = [folder / f"data_mask_{suffix}.npy", folder / f"score_{suffix}.npy"]
    for path, values_N in zip(paths, (mask_N, score_N), strict=True):
        notes += write_keeping(path, partial(np.save, arr=np.ascontiguousarray(values_N)))
    return paths, notes


def subset_rate(num_samples: int, num_kept: int) -> float:
    """Return the `--subset_rate` with which the authors' train_subset.py keeps exactly `num_kept`
    samples.

    They drop the first int(rate * N) entries, and a rate such as 0.29 loses one: int(0.29 * 100) is
    28. Hence half a sample more than the pruned share.
    """
    if not 0 < num_kept <= num_samples:
        raise InputError(
            f"num_kept={num_kept} must lie in [1, {num_samples}], the number of samples"
        )
    return (num_samples - num_kept + 0.5) / num_samples


def _official_suffix(name: str, scores: Scores) -> str:
    """Return `win{K}_ep{T}` where the authors' code computes the same; their name says neither
    preset, ablation nor beta."""
    window = scores.settings
    theirs = (
        window.get("score") == "tdds"
        and window.get("preset") == "official"
        and "delta" not in window
        and window.get("beta", 0.9) == 0.9
    )
    return f"win{window['K']}_ep{window['T']}" if theirs and {"K", "T"} <= window.keys() else name


def _official_coreset(path: Path, coreset: Coreset) -> tuple[np.ndarray, np.ndarray]:
    """Return the removed samples with score 0, then the kept ones by importance: int64 [N] and
    float32 [N], ascending."""
    if (coreset.importance_M < 0).any():
        raise InputError(
            f"{path}: importance {coreset.importance_M.min():g} is below the 0 of removed samples,"
            " which must come first in the authors' order; export the scores instead"
        )
    num_samples = coreset.fingerprint.num_samples
    removed = np.delete(np.arange(num_samples), coreset.index_M)
    by_importance_M = np.argsort(coreset.importance_M, kind="stable")
    score_N = np.zeros(num_samples, dtype=np.float32)
    score_N[len(removed) :] = coreset.importance_M[by_importance_M]
    return np.concatenate([removed, coreset.index_M[by_importance_M]]).astype(np.int64), score_N
