"""Stages `export` and `import`: scores and coresets as files of other tools, and scores of other tools as ours.

Owns the columns of the tables and the conventions of the authors' pair (docs/interchange.md). What is kept, and how
samples of equal score are ordered, is decided by `select` and `selection`; this module only writes it down.
"""

# N dataset, M kept samples, R rows of a CSV file

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from tdds_dist import selection
from tdds_dist.artifacts import (
    UNKNOWN_LABEL,
    Coreset,
    Fingerprint,
    Scores,
    fingerprint,
    load_coreset,
    load_scores,
    require_same_dataset,
    save_scores,
    write_atomically,
)
from tdds_dist.beton import Manifest, check_labels, dataset_fingerprint, inspect_beton, manifest_path, read_manifest
from tdds_dist.config import parse_config
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir
from tdds_dist.select import any_scores, choose, default_sampler, make_coreset
from tdds_dist.tdds import ABLATIONS, Window, window_settings

FORMATS = ("parquet", "csv", "paths", "official", "torch-subset")
DEFAULT_RATES = (0.3, 0.5, 0.7, 0.8, 0.9)  # of the keep flags, where no run says which
CHUNK_ROWS = 1 << 16  # rows that are turned into Python objects, or into one row group, at a time

_SUFFIX = {"parquet": ".parquet", "csv": ".csv", "paths": ".txt", "torch-subset": ".pt"}
_RESERVED = ("index", "path", "label", "true_label", "corruption", "keep", "importance", "tdds", "random", "ccs")
_OFFICIAL_WINDOW = re.compile(r"win(\d+)_ep(\d+)")
_OWN_WINDOW = re.compile(rf"tdds_(official|paper)_T(\d+)_K(\d+)_beta(\d(?:\.\d+)?(?:e-\d+)?)(?:_({'|'.join(ABLATIONS)}))?")

Columns = dict[str, np.ndarray | list[str]]  # [N] each; NaN is an empty cell


# ---- export


def export(source: Path, kind: str, out: Path | None = None, *, pruning_rates: Sequence[float] = (),
           beton: Path | None = None) -> tuple[list[Path], list[str]]:
    """Write scores or a coreset in a format of another tool; returns the files, and one line each of what to know.

    `source` is a run directory, a score file or a coreset; `kind` one of FORMATS. Files go to RUN/export, or beside the
    file; `out` is the file to write (a folder: the file in it), for `official` the folder. `pruning_rates` default to
    those of the run's config, else to DEFAULT_RATES. Paths and labels come from `beton`, else from the run's data.train.

    Raises:
        InputError: a format that does not fit the source, scores that are not finite, a .beton of another dataset.
    """
    source = Path(source)
    if kind not in FORMATS:
        raise InputError(f"kind={kind!r} is unknown; use one of {', '.join(FORMATS)}")
    rates = tuple(dict.fromkeys(pruning_rates))
    for rate in rates:
        selection.num_kept(10**9, rate)  # the range, before any file is read
    given = _read_source(source)
    if given.coreset is not None and rates:
        raise InputError(f"{source} is a coreset, made at pruning_rate={given.coreset.pruning_rate:g}; leave pruning rates "
                         "out, or give the scores")
    if kind == "official":
        return _export_official(given, _folder(source) if out is None else Path(out), rates)
    notes: list[str] = []
    write: Callable[[IO[bytes]], object]
    if kind in ("csv", "parquet"):
        name = "scores" if source.is_dir() else source.stem
        if given.coreset is not None:
            columns, meta = _coreset_table(given, given.coreset, beton, notes)
        else:
            columns, meta = _score_table(given, rates or _configured_rates(given.run), beton, notes)
        write = partial(_write_csv if kind == "csv" else _write_parquet, columns, meta)
    else:
        coreset, name = _one_coreset(given, kind, rates, notes)
        if kind == "paths":
            write = partial(_write_paths, _paths(given, beton, coreset.fingerprint), coreset.index_M)
        else:
            write = partial(torch.save, {
                "index": torch.from_numpy(coreset.index_M), "importance": torch.from_numpy(coreset.importance_M),
                "num_samples": coreset.fingerprint.num_samples})
    target = _folder(source) / f"{name}{_SUFFIX[kind]}" if out is None else Path(out)
    if target.is_dir():
        target /= f"{name}{_SUFFIX[kind]}"
    write_atomically(target, write)
    return [target], notes


def subset_rate(num_samples: int, num_kept: int) -> float:
    """The `--subset_rate` with which the authors' train_subset.py keeps exactly `num_kept` samples.

    They drop the first int(rate * N) entries, and a rate such as 0.29 loses one: int(0.29 * 100) is 28. Hence half a
    sample more than the pruned share.
    """
    if not 0 < num_kept <= num_samples:
        raise InputError(f"num_kept={num_kept} must lie in [1, {num_samples}], the number of samples")
    return (num_samples - num_kept + 0.5) / num_samples


@dataclass(frozen=True)
class _Source:
    """What an export was given: scores by name of their column, or a coreset; and the run it belongs to."""

    path: Path
    scores: dict[str, Scores]
    coreset: Coreset | None
    run: RunDir | None


def _read_source(source: Path) -> _Source:
    run: RunDir | None
    if source.is_dir():
        run = RunDir(source)
        run.read_config()  # else not a run
        files = sorted(run.scores.glob("*.npz"))
        if not files:
            raise InputError(f"{source} holds no scores; run `tdds collect` or `tdds score` first")
        scores = {file.stem: load_scores(file) for file in files}  # by the name that `tdds select --score` takes
        first = scores[files[0].stem].fingerprint
        for file in files[1:]:
            require_same_dataset(scores[file.stem].fingerprint, first, str(file))
    else:
        folder = source.parent.parent if source.parent.name in ("scores", "coresets") else source.parent
        run = RunDir(folder) if (folder / "config.yaml").is_file() else None
        if _is_coreset(source):
            return _Source(source, {}, load_coreset(source), run)
        found = load_scores(source)
        scores = {found.key: found}
    for name, found in scores.items():
        if num_bad := int((~np.isfinite(found.score_N)).sum()):
            raise InputError(f"{source}: score {name!r} holds {num_bad} values that are not finite; compute it again with "
                             "`tdds score`")
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
    return tuple(sorted({rate for window in config.score.windows for rate in window.pruning_rates})) or DEFAULT_RATES


def _one_scores(given: _Source, kind: str) -> tuple[str, Scores]:
    if len(given.scores) > 1:
        raise InputError(f"{given.path} holds {len(given.scores)} scores ({', '.join(given.scores)}), and {kind} takes one; "
                         "give a file of its scores/ or coresets/")
    return next(iter(given.scores.items()))


def _one_coreset(given: _Source, kind: str, rates: Sequence[float], notes: list[str]) -> tuple[Coreset, str]:
    """The coreset to write and the stem of its file; cut from the scores where the source is no coreset."""
    if given.coreset is not None:
        return given.coreset, given.path.stem
    name, scores = _one_scores(given, kind)
    if len(rates) != 1:
        raise InputError(f"pruning_rates={list(rates)}: {kind} of {given.path} needs exactly one; give one pruning rate, or a "
                         "coreset")
    coreset, warnings = make_coreset(scores, rates[0])
    notes += warnings
    return coreset, f"{name if given.path.is_dir() else given.path.stem}_p{rates[0]:g}"


# ---- tables


def _score_table(given: _Source, rates: Sequence[float], beton: Path | None,
                 notes: list[str]) -> tuple[Columns, dict[str, Any]]:
    """One row per sample: who it is, then each score with its rank and keep flags."""
    any_score = next(iter(given.scores.values()))
    columns = _sample_columns(given, beton, any_score.fingerprint, any_score.label_N, notes)
    for name, scores in given.scores.items():
        rank_N = np.empty(len(scores.score_N), dtype=np.int64)
        rank_N[_first_to_keep(scores.score_N)] = np.arange(1, len(rank_N) + 1)
        own: Columns = {name: scores.score_N, f"rank_{name}": rank_N}
        own |= {f"extra_{name}_{extra}": values_N for extra, values_N in scores.extra.items()}
        own |= {f"keep_{name}_p{rate:g}": _flags(choose(scores, rate), len(rank_N)) for rate in rates}
        if both := sorted(columns.keys() & own.keys()):
            raise InputError(f"{given.path}: score {name!r} wants a column {both[0]!r}, which the table has already; export "
                             "the scores one by one, or import it under another key")
        columns |= own
    meta = {"fingerprint": asdict(any_score.fingerprint), "pruning_rates": list(rates),
            "settings": {name: scores.settings for name, scores in given.scores.items()}}
    return columns, meta


def _coreset_table(given: _Source, coreset: Coreset, beton: Path | None,
                   notes: list[str]) -> tuple[Columns, dict[str, Any]]:
    """One row per sample of the dataset, kept or not; importance is empty where it is not kept."""
    num_samples = coreset.fingerprint.num_samples
    columns = _sample_columns(given, beton, coreset.fingerprint, np.full(num_samples, UNKNOWN_LABEL), notes)
    importance_N = np.full(num_samples, np.nan, dtype=np.float32)
    importance_N[coreset.index_M] = coreset.importance_M
    columns |= {"keep": _flags(coreset.index_M, num_samples), "importance": importance_N}
    meta = {"fingerprint": asdict(coreset.fingerprint), "score_key": coreset.score_key,
            "pruning_rate": coreset.pruning_rate, "settings": coreset.settings}
    return columns, meta


def _sample_columns(given: _Source, beton: Path | None, found: Fingerprint, label_N: np.ndarray,
                    notes: list[str]) -> Columns:
    """index, and path, label, true_label and corruption as far as they are known; a note for what is left out."""
    columns: Columns = {"index": np.arange(found.num_samples)}
    dataset, why = _dataset_of(given, beton, found)
    manifest = None if dataset is None else dataset.manifest
    if manifest is None:
        notes.append(f"no column path: {why}")
    else:
        columns["path"] = manifest.path
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


def _first_to_keep(score_N: np.ndarray) -> np.ndarray:
    """All samples in the order of `selection.top` with seed 0, int64 [N]: its first M are what it keeps, for every M."""
    tie_N = np.random.default_rng([0, 0]).permutation(len(score_N))
    return np.lexsort((tie_N, -score_N)).astype(np.int64)


def _write_csv(columns: Columns, meta: dict[str, Any], file: IO[bytes]) -> None:
    """The table alone: CSV has no place for `meta`."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for first in range(0, len(columns["index"]), CHUNK_ROWS):
        cells = (_cells(values[first : first + CHUNK_ROWS]) for values in columns.values())
        writer.writerows(zip(*cells, strict=True))
    text.detach()  # flushes, and leaves the file open


def _cells(values: np.ndarray | list[str]) -> list[Any]:
    """What stands in a column of CSV: for float32 the shortest text that gives the same float32 again."""
    if isinstance(values, list):
        return values
    if values.dtype != np.float32:
        return values.tolist()
    text = values.astype(str)
    # Readers go through double precision, and a few texts (7.038531e-26) are then rounded twice, to the neighbour.
    with np.errstate(over="ignore"):
        lost = text.astype(np.float64).astype(np.float32) != values
    cells = text.tolist()
    for i in np.flatnonzero(lost):
        cells[i] = "" if np.isnan(values[i]) else repr(float(values[i]))
    return cells


def _write_parquet(columns: Columns, meta: dict[str, Any], file: IO[bytes]) -> None:
    import pyarrow
    import pyarrow.parquet

    def array(values: np.ndarray | list[str]) -> Any:
        return pyarrow.array(values, from_pandas=True)  # NaN: null

    schema = pyarrow.schema([(name, array(values[:1]).type) for name, values in columns.items()],
                            metadata={"tdds": json.dumps(meta, sort_keys=True)})
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for first in range(0, len(columns["index"]), CHUNK_ROWS):
            rows = [array(values[first : first + CHUNK_ROWS]) for values in columns.values()]
            writer.write_table(pyarrow.table(rows, schema=schema))


# ---- the authors' pair


def _export_official(given: _Source, folder: Path, rates: Sequence[float]) -> tuple[list[Path], list[str]]:
    if folder.is_file():
        raise InputError(f"out={folder} is a file, and official is two of them; give a folder")
    if given.coreset is not None:
        suffix, mask_N, score_N = given.path.stem, *_official_coreset(given.path, given.coreset)
        kept = [(given.coreset.pruning_rate, len(given.coreset.index_M))]
    else:
        name, scores = _one_scores(given, "official")
        if default_sampler(scores) != "top":
            raise InputError(f"{given.path}: score {scores.key!r} does not keep what ranks highest, as the authors' loader "
                             "does; give a coreset made by `tdds select`")
        suffix, mask_N = _official_suffix(name, scores), _first_to_keep(scores.score_N)[::-1]
        score_N = scores.score_N[mask_N]
        kept = [(rate, selection.num_kept(len(score_N), rate)) for rate in rates or _configured_rates(given.run)]
    if score_N[0] == score_N[-1]:
        raise InputError(f"{given.path}: all {len(score_N)} values are {score_N[0]:g}, and the authors' loader divides by "
                         "their range; their code can only take values that differ")
    notes = [f"--subset_rate {subset_rate(len(score_N), num)!r} keeps {num} of {len(score_N)} samples (pruning rate {rate:g})"
             for rate, num in kept]
    if given.coreset is not None and (score_N[0], score_N[-1]) != (0.0, 1.0):
        notes.append(f"the authors' loader scales the importances, {score_N[0]:g} to {score_N[-1]:g} (removed samples: 0), to "
                     "[0, 1]")
    paths = [folder / f"data_mask_{suffix}.npy", folder / f"score_{suffix}.npy"]
    for path, values_N in zip(paths, (mask_N, score_N), strict=True):
        write_atomically(path, partial(np.save, arr=np.ascontiguousarray(values_N)))
    return paths, notes


def _official_suffix(name: str, scores: Scores) -> str:
    """`win{K}_ep{T}` where the authors' code computes the same; their name says neither preset nor ablation."""
    window = scores.settings
    theirs = window.get("score") == "tdds" and window.get("preset") == "official" and "delta" not in window
    return f"win{window['K']}_ep{window['T']}" if theirs and {"K", "T"} <= window.keys() else name


def _official_coreset(path: Path, coreset: Coreset) -> tuple[np.ndarray, np.ndarray]:
    """The removed samples with score 0, then the kept ones by importance: int64 [N] and float32 [N], ascending."""
    if (coreset.importance_M < 0).any():
        raise InputError(f"{path}: importance {coreset.importance_M.min():g} is below the 0 of removed samples, which must "
                         "come first in the authors' order; export the scores instead")
    num_samples = coreset.fingerprint.num_samples
    removed = np.flatnonzero(~_flags(coreset.index_M, num_samples))
    by_importance_M = np.argsort(coreset.importance_M, kind="stable")
    score_N = np.zeros(num_samples, dtype=np.float32)
    score_N[len(removed):] = coreset.importance_M[by_importance_M]
    return np.concatenate([removed, coreset.index_M[by_importance_M]]).astype(np.int64), score_N


# ---- datasets


@dataclass(frozen=True, eq=False)
class _Dataset:
    """What is known of the samples, and from which file."""

    where: Path
    label_N: np.ndarray  # int64, UNKNOWN_LABEL where not recorded
    fingerprint: Fingerprint
    manifest: Manifest | None


def _read_dataset(beton: Path, num_classes: int = 0) -> _Dataset:
    """Samples of a .beton. `num_classes`: 0 where nothing but the file can tell."""
    info, manifest = inspect_beton(beton), read_manifest(beton)
    num_classes = manifest.num_classes if manifest is not None else num_classes or int(info.label_N.max()) + 1
    check_labels(info, num_classes, manifest)
    return _Dataset(beton, info.label_N, dataset_fingerprint(info, num_classes), manifest)


def _train_file(run: RunDir) -> Path:
    return Path(parse_config(run.read_config(), str(run.config_file)).data.train)


def _dataset_of(given: _Source, beton: Path | None, found: Fingerprint) -> tuple[_Dataset | None, str]:
    """The dataset of an export, and why it, or its manifest, is missing."""
    if beton is None:
        if given.run is None:
            return None, f"{given.path} does not lie in a run; give the .beton"
        beton = _train_file(given.run)
        if not beton.is_file():
            return None, f"data.train={beton} of {given.run.path} does not exist here; give the .beton"
    dataset = _read_dataset(Path(beton), found.num_classes)
    require_same_dataset(found, dataset.fingerprint, str(given.path))
    return dataset, f"{manifest_path(dataset.where)} does not exist; `tdds write` makes it"


def _write_paths(path: list[str], index_M: np.ndarray, file: IO[bytes]) -> None:
    file.write("".join(f"{path[i]}\n" for i in index_M).encode())


def _paths(given: _Source, beton: Path | None, found: Fingerprint) -> list[str]:
    dataset, why = _dataset_of(given, beton, found)
    if dataset is None or dataset.manifest is None:
        raise InputError(f"the paths of {given.path} are not known: {why}")
    return dataset.manifest.path


# ---- import


def import_scores(source: Path, *, key: str | None = None, data_mask: Path | None = None, beton: Path | None = None,
                  run: Path | None = None, out: Path | None = None) -> Path:
    """Make a score file of a CSV file or of the authors' pair; returns its path.

    A CSV file has a column `index` or `path` (as in the manifest), a column named `key` or `score`, and may have `label`.
    Of the authors' pair `source` is score_*.npy; `data_mask` defaults to the data_mask_*.npy beside it. `key` defaults to
    the file's name without score_ and suffix. Labels come from `beton`, else from `run` (its data.train or scores), else
    from the column `label`, where the largest one tells the number of classes; else they stay unknown, the number of
    classes is 0, and the scores fit every dataset of N samples. The file is `out`, else scores/<key>.npz of the run, else
    <key>.npz beside the source.

    Raises:
        InputError: anything that is not one finite score per sample of that dataset, higher = keep.
    """
    source = Path(source)
    if source.suffix not in (".csv", ".npy"):
        raise InputError(f"{source} must be a .csv file or the score_*.npy of the authors' code; convert it to CSV with "
                         "columns index and score")
    if not source.is_file():
        raise InputError(f"{source} does not exist; give a CSV file, or the score_*.npy of the authors' code")
    if source.suffix == ".csv" and data_mask is not None:
        raise InputError(f"data_mask={data_mask} belongs to a score_*.npy, but {source} is a CSV file; leave it out")
    dataset = _known_dataset(None if beton is None else Path(beton), None if run is None else RunDir(run))
    name = re.sub(r"^score_", "", source.stem) if source.suffix == ".npy" else source.stem
    settings: dict[str, Any] = {}
    extra: dict[str, np.ndarray] = {}
    label_N = None
    if source.suffix == ".npy":
        score_N = _read_official(source, None if data_mask is None else Path(data_mask), dataset)
        if match := _OFFICIAL_WINDOW.fullmatch(name):
            settings = {"score": "tdds", "preset": "official", "T": int(match[2]), "K": int(match[1])}
    else:
        score_N, label_N, extra = _read_csv(source, key, dataset)
    key = key or name
    _check_key(key)
    if match := _OWN_WINDOW.fullmatch(key):
        window = Window(int(match[2]), int(match[3]), float(match[4]))
        settings = window_settings(window, match[1], match[5] or "kl") | settings
    if dataset is not None:
        label_N, found = dataset.label_N, dataset.fingerprint
    else:
        label_N = np.full(len(score_N), UNKNOWN_LABEL) if label_N is None else label_N
        found = fingerprint(label_N, 0 if (label_N == UNKNOWN_LABEL).any() else int(label_N.max()) + 1)
    path = (source.parent if run is None else RunDir(run).scores) / f"{key}.npz" if out is None else Path(out)
    if out is None and path.exists() and load_scores(path).settings.get("source") != "imported":
        raise InputError(f"{path} holds scores that were computed here; choose another key, or remove it")
    settings = {"score": key, "source": "imported", "file": source.name} | settings
    save_scores(path, Scores(key, score_N, label_N, found, settings, extra))
    return path


def _check_key(key: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", key):
        raise InputError(f"key={key!r} must start with a letter or digit and go on with those, `.`, `_`, `+` and `-`; it names "
                         "a file")
    if key in _RESERVED:
        raise InputError(f"key={key!r} has a meaning of its own; choose another name for the score")


def _known_dataset(beton: Path | None, run: RunDir | None) -> _Dataset | None:
    """The dataset that imported scores must fit; None when nothing says which."""
    dataset = None if beton is None else _read_dataset(beton)
    if run is None:
        return dataset
    train, num_classes = _train_file(run), parse_config(run.read_config(), str(run.config_file)).data.num_classes
    if dataset is None and train.is_file():
        dataset = _read_dataset(train, num_classes)
    if not any(run.scores.glob("*.npz")):
        if dataset is None:
            raise InputError(f"{run.path} holds no scores, and its data.train={train} does not exist here; give the .beton")
        return dataset
    scores = any_scores(run.path)
    if dataset is None:
        return _Dataset(run.scores, scores.label_N, scores.fingerprint, None)
    require_same_dataset(dataset.fingerprint, scores.fingerprint, str(dataset.where))
    return dataset


def _read_official(source: Path, data_mask: Path | None, dataset: _Dataset | None) -> np.ndarray:
    """Score by global index, float32 [N], of the authors' pair: order (an argsort) and ascending scores."""
    if data_mask is None:
        if not source.name.startswith("score_"):
            raise InputError(f"{source} is not named score_*.npy, so its data_mask_*.npy cannot be found; give data_mask")
        data_mask = source.with_name("data_mask_" + source.name.removeprefix("score_"))
    sorted_N, mask_N = _read_array(source), _read_array(data_mask)
    if sorted_N.ndim != 1 or not np.issubdtype(sorted_N.dtype, np.floating) or len(sorted_N) == 0:
        raise InputError(f"{source} is {sorted_N.dtype} {list(sorted_N.shape)}, expected floating-point scores [N]; give the "
                         "score_*.npy, and the data_mask_*.npy beside it")
    if mask_N.shape != sorted_N.shape or not np.issubdtype(mask_N.dtype, np.integer):
        raise InputError(f"{data_mask} is {mask_N.dtype} {list(mask_N.shape)}, expected integers [{len(sorted_N)}], one per "
                         f"score in {source.name}; give the two files of one evaluation")
    _check_size(source, "values", len(sorted_N), dataset)
    if not np.array_equal(np.sort(mask_N), np.arange(len(mask_N))):
        raise InputError(f"{data_mask} does not hold every index 0..{len(mask_N) - 1} once; it must be the argsort of all "
                         "scores, as importance_evaluation.py writes it")
    score_N = np.empty(len(mask_N), dtype=np.float32)
    with np.errstate(over="ignore"):
        score_N[mask_N] = sorted_N
    if not np.isfinite(score_N).all():
        bad = int(np.flatnonzero(~np.isfinite(score_N))[0])
        raise InputError(f"{source} has {score_N[bad]} for index {bad}; scores must be finite float32, evaluate them again")
    if (drop := np.flatnonzero(np.diff(sorted_N) < 0)).size:
        raise InputError(f"{source}: value {drop[0] + 1} is {sorted_N[drop[0] + 1]:g} after {sorted_N[drop[0]]:g}, but the "
                         "authors' scores ascend; write scores by index as CSV with columns index and score")
    return score_N


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); the authors' code writes score_*.npy and "
                         "data_mask_*.npy") from error
    return array


def _check_size(source: Path, what: str, num: int, dataset: _Dataset | None) -> None:
    if dataset is not None and num != dataset.fingerprint.num_samples:
        raise InputError(f"{source} has {num} {what}, {dataset.where} {dataset.fingerprint.num_samples} samples; every sample "
                         "needs exactly one, give the scores of this dataset")


def _read_csv(source: Path, key: str | None,
              dataset: _Dataset | None) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """Score float32 [N], label int64 [N] or None, and the extras of the score, by global index."""
    column, line_R, cells = _read_rows(source, key)
    _check_size(source, "rows", len(line_R), dataset)
    index_R = _indices(source, line_R, cells, dataset)

    def by_index(values_R: np.ndarray) -> np.ndarray:
        values_N = np.empty_like(values_R)
        values_N[index_R] = values_R
        return values_N

    score_N = by_index(_floats(source, line_R, column, cells[column]))
    prefix = f"extra_{column}_"
    extra = {name.removeprefix(prefix): by_index(_floats(source, line_R, name, cells[name]))
             for name in cells if name.startswith(prefix)}
    if "label" not in cells:
        return score_N, None, extra
    label_R = _integers(source, line_R, "label", [text or str(UNKNOWN_LABEL) for text in cells["label"]])
    if (bad := np.flatnonzero(label_R < UNKNOWN_LABEL)).size:
        raise InputError(f"{source}, line {line_R[bad[0]]}: label={label_R[bad[0]]} must be 0 or more, or empty where it is "
                         "not known")
    if dataset is not None:
        need_R = dataset.label_N[index_R]
        differs = np.flatnonzero((label_R != need_R) & (label_R != UNKNOWN_LABEL) & (need_R != UNKNOWN_LABEL))
        if differs.size:
            i = differs[0]
            raise InputError(f"{source}, line {line_R[i]}: label={label_R[i]}, but sample {index_R[i]} of {dataset.where} has "
                             f"{need_R[i]} ({differs.size} such rows); give the scores of this dataset")
    return score_N, by_index(label_R), extra


def _read_rows(source: Path, key: str | None) -> tuple[str, list[int], dict[str, list[str]]]:
    """Name of the score's column; line number of each row [R]; text [R] of each column that is needed, not of all."""
    line_R: list[int] = []
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            column = key if key is not None and key in header else "score"
            _check_header(source, header, column, key)
            cells: dict[str, list[str]] = {name: [] for name in header if name in ("index", "path", "label", column)
                                           or name.startswith(f"extra_{column}_")}
            wanted = [(header.index(name), texts) for name, texts in cells.items()]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(f"{source}, line {reader.line_num} has {len(row)} values for {len(header)} columns; every "
                                     "row needs one per column, separated by commas")
                line_R.append(reader.line_num)
                for position, texts in wanted:
                    texts.append(row[position].strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} is not CSV text in UTF-8 ({error}); write it again") from error
    if not line_R:
        raise InputError(f"{source} holds no rows; it needs a header and one row per sample")
    return column, line_R, cells


def _check_header(source: Path, header: list[str], column: str, key: str | None) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{source} has the column {twice[0]!r} twice; leave one")
    if header and column not in header:
        raise InputError(f"{source} has the columns {', '.join(header)}, but none named {key or 'score'}; name the one with "
                         "the scores by its key")
    if header and not {"index", "path"} & set(header):
        raise InputError(f"{source} has the columns {', '.join(header)}; it needs index, or path and the .beton with its "
                         "manifest")


def _indices(source: Path, line_R: list[int], cells: dict[str, list[str]], dataset: _Dataset | None) -> np.ndarray:
    """Global index of each row, int64 [R]; every index 0..R-1 exactly once."""
    path = None if dataset is None or dataset.manifest is None else dataset.manifest.path
    if "index" in cells:
        index_R = _integers(source, line_R, "index", cells["index"])
    else:
        if path is None:
            raise InputError(f"{source} has a column path but none named index, and no manifest says which index a path has; "
                             "give the .beton that `tdds write` made, or a column index")
        index_of = {name: i for i, name in enumerate(path)}
        unknown = next((i for i, name in enumerate(cells["path"]) if name not in index_of), None)
        if unknown is not None:
            assert dataset is not None
            raise InputError(f"{source}, line {line_R[unknown]}: path={cells['path'][unknown]!r} is not in "
                             f"{manifest_path(dataset.where)}; paths are relative to the source, e.g. {path[0]!r}")
        index_R = np.array([index_of[name] for name in cells["path"]], dtype=np.int64)
    num_rows = len(index_R)
    if (outside := np.flatnonzero((index_R < 0) | (index_R >= num_rows))).size:
        i = outside[0]
        raise InputError(f"{source}, line {line_R[i]}: index={index_R[i]} is outside [0, {num_rows}), the number of rows; "
                         "every sample of the dataset needs exactly one row")
    first = np.unique(index_R, return_index=True)[1]
    if len(first) < num_rows:
        i = np.setdiff1d(np.arange(num_rows), first)[0]
        missing = np.setdiff1d(np.arange(num_rows), index_R)[0]
        raise InputError(f"{source}, line {line_R[i]}: index={index_R[i]} stands there a second time, and index {missing} is "
                         "missing; every sample of the dataset needs exactly one row")
    if "index" in cells and "path" in cells and path is not None:
        for row, (i, name) in enumerate(zip(index_R, cells["path"], strict=True)):
            if name not in ("", path[i]):
                raise InputError(f"{source}, line {line_R[row]}: path={name!r}, but sample {i} is {path[i]!r}; give the scores "
                                 "of this dataset, or leave one of the columns out")
    return index_R


def _integers(source: Path, line_R: list[int], column: str, text_R: list[str]) -> np.ndarray:
    """int64 [R]."""
    return _numbers(source, line_R, column, text_R, lambda text: np.int64(int(text)), "a whole number").astype(np.int64)


def _floats(source: Path, line_R: list[int], column: str, text_R: list[str]) -> np.ndarray:
    """float32 [R], finite."""
    with np.errstate(over="ignore"):
        value_R = _numbers(source, line_R, column, text_R, float, "a number").astype(np.float32)
    if (bad := np.flatnonzero(~np.isfinite(value_R))).size:
        raise InputError(f"{source}, line {line_R[bad[0]]}: {column}={text_R[bad[0]]} must be a finite float32 ({bad.size} "
                         "such rows); give every sample a finite score, higher = keep")
    return value_R


def _numbers(source: Path, line_R: list[int], column: str, text_R: list[str], read: Callable[[str], Any],
             what: str) -> np.ndarray:
    values = []
    for line, text in zip(line_R, text_R, strict=True):
        try:
            values.append(read(text))
        except (ValueError, OverflowError):
            raise InputError(f"{source}, line {line}: {column}={text!r} must be {what}; correct the row") from None
    return np.array(values)
