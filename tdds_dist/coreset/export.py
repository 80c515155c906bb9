"""Stage `export`: scores and coresets as files of other tools, and the trajectory. The way back is
`import_scores`, for trajectories `scoring.offline`.

Owns the columns of the tables and the conventions of the authors' pair (docs/interchange.md). What
is kept, and how samples of equal score are ordered, is decided by `select` and `samplers`; this
module only writes it down.
"""

# N dataset, M kept samples, R rows of a CSV file

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from tdds_dist.config.run import parse_config
from tdds_dist.coreset import samplers
from tdds_dist.coreset.card import card_text
from tdds_dist.coreset.croissant import croissant_text
from tdds_dist.coreset.select import choose, default_sampler, make_coreset
from tdds_dist.data.manifest import Dataset, manifest_path, not_utf8, read_dataset
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    UNKNOWN_LABEL,
    Coreset,
    Fingerprint,
    Scores,
    load_coreset,
    load_scores,
    require_same_dataset,
)
from tdds_dist.runs.directory import RunDir, write_keeping
from tdds_dist.scoring.official_outputs import is_dynamics
from tdds_dist.scoring.offline import open_recorded
from tdds_dist.scoring.trajectory import Trajectory
from tdds_dist.scoring.trajectory_table import write_table

FORMATS = ("parquet", "csv", "paths", "official", "torch-subset", "card", "trajectory")
DEFAULT_RATES = (0.3, 0.5, 0.7, 0.8, 0.9)  # of the keep flags, where no run says which
CHUNK_ROWS = 1 << 16  # rows that are turned into Python objects, or into one row group, at a time

_SUFFIX = {"parquet": ".parquet", "csv": ".csv", "paths": ".txt", "torch-subset": ".pt"}

Columns = dict[str, np.ndarray | list[str]]  # [N] each; NaN is an empty cell


# ---- export


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
    `pruning_rates` default to those of the run's config, else to DEFAULT_RATES. Without `ranks`
    tables lack them: they follow from the scores, and pack badly. Paths and labels come from
    `beton`, else from the run's data.train.

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
    given = _read_source(source)
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
        columns, meta = _table(given, rates, ranks, beton, notes)
        write = partial(_write_csv if kind == "csv" else _write_parquet, columns, meta)
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


@dataclass(frozen=True)
class _Source:
    """The source of an export: scores by name of their column, or a coreset; and the run it belongs
    to."""

    path: Path
    scores: dict[str, Scores]
    coreset: Coreset | None
    run: RunDir | None


def _read_source(source: Path) -> _Source:
    run: RunDir | None
    if not source.exists():
        raise InputError(
            f"{source} does not exist; give a run directory, a score file or a coreset"
        )
    if source.is_dir():
        run = RunDir(source)
        run.read_config()  # else not a run
        files = sorted(run.scores.glob("*.npz"))
        if not files:
            raise InputError(f"{source} holds no scores; run `tdds collect` or `tdds score` first")
        # by the name that `tdds select --score` takes
        scores = {file.stem: load_scores(file) for file in files}
        first = scores[files[0].stem].fingerprint
        for file in files[1:]:
            require_same_dataset(scores[file.stem].fingerprint, first, str(file))
    else:
        folder = (
            source.parent.parent if source.parent.name in ("scores", "coresets") else source.parent
        )
        run = RunDir(folder) if (folder / "config.yaml").is_file() else None
        if _is_coreset(source):
            return _Source(source, {}, load_coreset(source), run)
        found = load_scores(source)
        scores = {found.key: found}
    for name, found in scores.items():
        if num_bad := int((~np.isfinite(found.score_N)).sum()):
            raise InputError(
                f"{source}: score {name!r} holds {num_bad} values that are not finite; compute it"
                " again with `tdds score`"
            )
    return _Source(source, scores, None, run)


def _is_coreset(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return "index.npy" in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False  # load_scores says what is wrong


def _folder(source: Path) -> Path:
    return source / "export" if source.is_dir() else source.parent


def _configured_rates(run: RunDir | None) -> tuple[float, ...]:
    if run is None:
        return DEFAULT_RATES
    config = parse_config(run.read_config(), str(run.config_file))
    return config.served_rates or DEFAULT_RATES


def _one_scores(given: _Source, kind: str) -> tuple[str, Scores]:
    if len(given.scores) > 1:
        raise InputError(
            f"{given.path} holds {len(given.scores)} scores ({', '.join(given.scores)}), and {kind}"
            " takes one; give a file of its scores/ or coresets/"
        )
    return next(iter(given.scores.items()))


def _one_coreset(
    given: _Source, kind: str, rates: Sequence[float], notes: list[str]
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
    return coreset, f"{name if given.path.is_dir() else given.path.stem}_p{rates[0]:g}"


# ---- tables


def _table(
    given: _Source, rates: Sequence[float], ranks: bool, beton: Path | None, notes: list[str]
) -> tuple[Columns, dict[str, Any]]:
    """Make the table of a source, and what stands beside it in the file."""
    if given.coreset is not None:
        return _coreset_table(given, given.coreset, beton, notes)
    return _score_table(given, rates or _configured_rates(given.run), ranks, beton, notes)


def _score_table(
    given: _Source, rates: Sequence[float], ranks: bool, beton: Path | None, notes: list[str]
) -> tuple[Columns, dict[str, Any]]:
    """Make a table of one row per sample: index, path and labels, then each score with its rank and
    keep flags."""
    any_score = next(iter(given.scores.values()))
    columns = _sample_columns(given, beton, any_score.fingerprint, any_score.label_N, notes)
    for name, scores in given.scores.items():
        own: Columns = {name: scores.score_N}
        num_samples = len(scores.score_N)
        if ranks:
            rank_N = np.empty(num_samples, dtype=np.int64)
            rank_N[samplers.descending(scores.score_N)] = np.arange(1, num_samples + 1)
            own[f"rank_{name}"] = rank_N
        own |= {f"extra_{name}_{extra}": values_N for extra, values_N in scores.extra.items()}
        own |= {
            f"keep_{name}_p{rate:g}": _flags(choose(scores, rate), num_samples) for rate in rates
        }
        if both := sorted(columns.keys() & own.keys()):
            raise InputError(
                f"{given.path}: score {name!r} wants a column {both[0]!r}, which the table has"
                " already; export the scores one by one, or import it under another key"
            )
        columns |= own
    meta = {
        "fingerprint": asdict(any_score.fingerprint),
        "pruning_rates": list(rates),
        "settings": {name: scores.settings for name, scores in given.scores.items()},
    }
    return columns, meta


def _coreset_table(
    given: _Source, coreset: Coreset, beton: Path | None, notes: list[str]
) -> tuple[Columns, dict[str, Any]]:
    """Make a table of one row per sample of the dataset, kept or not; importance is empty where it
    is not kept."""
    num_samples = coreset.fingerprint.num_samples
    columns = _sample_columns(
        given, beton, coreset.fingerprint, np.full(num_samples, UNKNOWN_LABEL), notes
    )
    importance_N = np.full(num_samples, np.nan, dtype=np.float32)
    importance_N[coreset.index_M] = coreset.importance_M
    columns |= {"keep": _flags(coreset.index_M, num_samples), "importance": importance_N}
    meta = {
        "fingerprint": asdict(coreset.fingerprint),
        "score_key": coreset.score_key,
        "pruning_rate": coreset.pruning_rate,
        "settings": coreset.settings,
    }
    return columns, meta


def _sample_columns(
    given: _Source, beton: Path | None, found: Fingerprint, label_N: np.ndarray, notes: list[str]
) -> Columns:
    """Return the columns index, path, label, true_label and corruption as far as they are known,
    and a note on those left out.
    """
    columns: Columns = {"index": np.arange(found.num_samples)}
    dataset, why = _dataset_of(given, beton, found)
    manifest = None if dataset is None else dataset.manifest
    if manifest is None:
        notes.append(f"no column path: {why}")
    else:
        columns["path"] = _as_text(manifest.path)
    if dataset is not None:
        label_N = dataset.label_N
    if (label_N == UNKNOWN_LABEL).all():
        notes.append(f"no column label: the source holds none, and {why}")
    else:
        columns["label"] = label_N
    if manifest is not None and manifest.true_label_N is not None:
        columns["true_label"] = manifest.true_label_N
    if manifest is not None and manifest.corruption is not None:
        columns["corruption"] = manifest.corruption
    return columns


def _flags(index_M: np.ndarray, num_samples: int) -> np.ndarray:
    keep_N = np.zeros(num_samples, dtype=bool)
    keep_N[index_M] = True
    return keep_N


def _write_csv(columns: Columns, meta: dict[str, Any], file: IO[bytes]) -> None:
    """Write the table alone: CSV has no place for `meta`. A path that spreadsheets would take for a
    formula is written as `./path`, which is the same file."""
    columns = {
        name: [f"./{text}" if text[:1] in "=+-@" else text for text in values]
        if name == "path"
        else values
        for name, values in columns.items()
    }
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for first in range(0, len(columns["index"]), CHUNK_ROWS):
        cells = (_cells(values[first : first + CHUNK_ROWS]) for values in columns.values())
        writer.writerows(zip(*cells, strict=True))
    text.detach()  # flushes, and leaves the file open


def _cells(values: np.ndarray | list[str]) -> list[Any]:
    """Write the values of a column as CSV: float32 as the shortest text that gives the same float32
    again."""
    if isinstance(values, list):
        return values
    if values.dtype != np.float32:
        return values.tolist()
    text = values.astype(str)
    # Readers go through double precision, and a few texts (7.038531e-26) are then rounded twice, to
    # the neighbour.
    with np.errstate(over="ignore"):
        lost = text.astype(np.float64).astype(np.float32) != values
    cells = text.tolist()
    for i in np.flatnonzero(lost):
        cells[i] = "" if np.isnan(values[i]) else repr(float(values[i]))
    return cells


_ENCODING = {
    "float": "BYTE_STREAM_SPLIT",
    "int64": "DELTA_BINARY_PACKED",
    "string": "DELTA_BYTE_ARRAY",
}


def _write_parquet(columns: Columns, meta: dict[str, Any], file: IO[bytes]) -> None:
    import pyarrow
    import pyarrow.parquet

    def array(values: np.ndarray | list[str]) -> Any:
        return pyarrow.array(values, from_pandas=True)  # NaN: null

    schema = pyarrow.schema(
        [(name, array(values[:1]).type) for name, values in columns.items()],
        metadata={"tdds": json.dumps(meta, sort_keys=True)},
    )
    # scores and ranks hardly repeat, so that a dictionary of them helps nobody
    encoding = {field.name: _ENCODING.get(str(field.type)) for field in schema}
    with pyarrow.parquet.ParquetWriter(
        file,
        schema,
        compression="zstd",
        use_dictionary=False,
        column_encoding={name: found for name, found in encoding.items() if found},
    ) as writer:
        for first in range(0, len(columns["index"]), CHUNK_ROWS):
            rows = [array(values[first : first + CHUNK_ROWS]) for values in columns.values()]
            writer.write_table(pyarrow.table(rows, schema=schema))


# ---- a folder for a hub


def _export_card(
    given: _Source, out: Path | None, rates: Sequence[float], ranks: bool, beton: Path | None
) -> tuple[list[Path], list[str]]:
    """Write README.md, the table as Parquet, and the indices of each coreset as text, one per
    line: of a run all its coresets, of scores one per pruning rate."""
    folder = Path(out) if out is not None else _folder(given.path) / "card"
    if folder.is_file():
        raise InputError(f"out={folder} is a file, and card is several of them; give a folder")
    notes: list[str] = []
    columns, meta = _table(given, rates, ranks, beton, notes)
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
            for rate in rates or _configured_rates(given.run):
                coresets[f"{name}_p{rate:g}"], warnings = make_coreset(scores, rate)
                notes += warnings
    for name, coreset in coresets.items():
        require_same_dataset(coreset.fingerprint, found, name)
    dataset, _ = _dataset_of(given, beton, found)
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
        folder / "samples.parquet": partial(_write_parquet, columns, meta),
    }
    for name, coreset in coresets.items():
        indices = partial(_write_lines, coreset.index_M.tolist())
        writers[folder / "indices" / f"{name}.txt"] = indices
    for path, write in writers.items():
        notes += write_keeping(path, write)
    return [*writers], notes


def _write_lines(lines: Sequence[object], file: IO[bytes]) -> None:
    file.write("".join(f"{line}\n" for line in lines).encode())


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
    dataset, _ = _dataset_of(_Source(source, {}, None, run), beton, origin.found)
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
    given: _Source, folder: Path, rates: Sequence[float]
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
            for rate in rates or _configured_rates(given.run)
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
    removed = np.flatnonzero(~_flags(coreset.index_M, num_samples))
    by_importance_M = np.argsort(coreset.importance_M, kind="stable")
    score_N = np.zeros(num_samples, dtype=np.float32)
    score_N[len(removed) :] = coreset.importance_M[by_importance_M]
    return np.concatenate([removed, coreset.index_M[by_importance_M]]).astype(np.int64), score_N


def _dataset_of(
    given: _Source, beton: Path | None, found: Fingerprint
) -> tuple[Dataset | None, str]:
    """Return the dataset of an export, and why it, or its manifest, is missing."""
    if beton is None:
        if given.run is None:
            return None, f"{given.path} does not lie in a run; give --beton FILE"
        beton = given.run.train_file()
        if not beton.is_file():
            return (
                None,
                f"data.train={beton} of {given.run.path} does not exist here; give --beton FILE",
            )
    run = given.run
    config = None if run is None else parse_config(run.read_config(), str(run.config_file))
    dataset = read_dataset(Path(beton), found.num_classes, config)
    require_same_dataset(found, dataset.fingerprint, str(given.path))
    return dataset, f"{manifest_path(dataset.where)} does not exist; `tdds write` makes it"


def _paths(given: _Source, beton: Path | None, found: Fingerprint) -> list[str]:
    dataset, why = _dataset_of(given, beton, found)
    if dataset is None or dataset.manifest is None:
        raise InputError(f"the paths of {given.path} are not known: {why}")
    return _as_text(dataset.manifest.path)


def _as_text(path_N: list[str]) -> list[str]:
    """Return the paths; raise InputError for what no UTF-8 file can hold, which `write` refuses."""
    if names := not_utf8(path_N):
        raise InputError(
            f"names that are not UTF-8: {len(names)} (such as {names[0]}); rename the images, write"
            " the .beton again, and give it by --beton FILE"
        )
    return path_N
