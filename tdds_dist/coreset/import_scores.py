"""Stage `import`: scores of other tools as score files of ours, from CSV or from the pair that the
authors' code saves.

Owns the checks of what comes from outside: one finite score per sample of the dataset, each exactly
once. What `export` wrote comes back bit by bit.
"""

# N dataset, R rows of a CSV file

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.run import parse_config
from tdds_dist.config.scores import ABLATIONS, Window, window_settings
from tdds_dist.console import log
from tdds_dist.data.manifest import Dataset, manifest_path, read_dataset
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    UNKNOWN_LABEL,
    Scores,
    fingerprint,
    load_scores,
    require_same_dataset,
    save_scores,
)
from tdds_dist.runs.directory import RunDir, any_scores, move_aside

_RESERVED = (
    "index",
    "path",
    "label",
    "true_label",
    "corruption",
    "keep",
    "importance",
    "tdds",
    "random",
    "ccs",
)
_OFFICIAL_WINDOW = re.compile(r"win(\d+)_ep(\d+)")
_OWN_WINDOW = re.compile(
    rf"tdds_(official|paper)_T(\d+)_K(\d+)_beta(\d(?:\.\d+)?(?:e-\d+)?)(?:_({'|'.join(ABLATIONS)}))?"
)


def import_scores(
    source: Path,
    *,
    key: str | None = None,
    column: str | None = None,
    data_mask: Path | None = None,
    beton: Path | None = None,
    run: Path | None = None,
    out: Path | None = None,
) -> Path:
    """Make a score file of a CSV file or of the authors' pair; return its path.

    A CSV file has a column `index` or `path` (as in the manifest), a column of scores (`column`,
    else the one named `key`, else `score`), and may have `label`. Of the authors' pair `source` is
    score_*.npy; `data_mask` defaults to the data_mask_*.npy beside it. `key` defaults to the file's
    name without score_ and suffix. Labels come from `beton`, else from `run` (its data.train or
    scores), else from the column `label`, where the largest one tells the number of classes; else
    they stay unknown, the number of classes is 0, and the scores fit every dataset of N samples.
    The file is `out`, else scores/<key>.npz of the run, else <key>.npz beside the source.

    Raises:
        InputError: anything that is not one finite score per sample of that dataset, higher = keep.
    """
    source = Path(source)
    if source.suffix not in (".csv", ".npy"):
        raise InputError(
            f"{source} must be a .csv file or the score_*.npy of the authors' code; convert it to"
            " CSV with columns index and score"
        )
    if not source.is_file():
        raise InputError(
            f"{source} does not exist; give a CSV file, or the score_*.npy of the authors' code"
        )
    if source.suffix == ".npy" and column is not None:
        raise InputError(f"--column={column} belongs to a CSV file; leave it out")
    if source.suffix == ".csv" and data_mask is not None:
        raise InputError(
            f"data_mask={data_mask} belongs to a score_*.npy, but {source} is a CSV file; leave"
            " it out"
        )
    dataset = _known_dataset(
        None if beton is None else Path(beton), None if run is None else RunDir(run)
    )
    name = re.sub(r"^score_", "", source.stem) if source.suffix == ".npy" else source.stem
    settings: dict[str, Any] = {}
    extra: dict[str, np.ndarray] = {}
    label_N = None
    if source.suffix == ".npy":
        score_N = _read_official(source, None if data_mask is None else Path(data_mask), dataset)
        if match := _OFFICIAL_WINDOW.fullmatch(name):
            K, T = map(int, match.groups())
            settings = {"score": "tdds", "preset": "official", "T": T, "K": K}
    else:
        score_N, label_N, extra = _read_csv(source, column or key, column is not None, dataset)
    key = key or name
    _check_key(key)
    if match := _OWN_WINDOW.fullmatch(key):
        window = Window(int(match[2]), int(match[3]), float(match[4]))
        named = window_settings(window, match[1], match[5] or "kl")
        if wrong := [name for name, value in settings.items() if named[name] != value]:
            raise InputError(
                f"key={key!r} says {wrong[0]}={named[wrong[0]]}, the name of {source} {wrong[0]}="
                f"{settings[wrong[0]]}; leave the key out, or name the score as it is"
            )
        settings = named | settings
    if dataset is not None:
        label_N, found = dataset.label_N, dataset.fingerprint
    else:
        label_N = np.full(len(score_N), UNKNOWN_LABEL) if label_N is None else label_N
        num_classes = 0 if (label_N == UNKNOWN_LABEL).any() else int(label_N.max()) + 1
        found = fingerprint(label_N, num_classes)
    folder = source.parent if run is None else RunDir(run).scores
    path = folder / f"{key}.npz" if out is None else Path(out)
    settings = {"score": key, "source": "imported", "file": source.name} | settings
    if path.exists():
        before = load_scores(path)
        if before.settings.get("source") != "imported":
            raise InputError(
                f"{path} holds scores that were computed here; choose another --key (with --column"
                " for the column of the file) or --out, or move it away"
            )
        if before.settings != settings or not np.array_equal(before.score_N, score_N):
            log.warning(
                f"{path} held other imported scores, which are moved aside to {move_aside(path)}"
            )
    save_scores(path, Scores(key, score_N, label_N, found, settings, extra))
    return path


def _check_key(key: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", key):
        raise InputError(
            f"key={key!r} must start with a letter or digit and go on with those, `.`, `_`, `+` and"
            " `-`; it names a file"
        )
    if key in _RESERVED:
        raise InputError(f"key={key!r} has a meaning of its own; choose another name for the score")


def _known_dataset(beton: Path | None, run: RunDir | None) -> Dataset | None:
    """Return the dataset that imported scores must fit; None when nothing says which."""
    config = None if run is None else parse_config(run.read_config(), str(run.config_file))
    dataset = None if beton is None else read_dataset(beton, config=config)
    if run is None or config is None:
        return dataset
    train = run.train_file()
    if dataset is None and train.is_file():
        dataset = read_dataset(train, config.data.num_classes, config)
    if not any(run.scores.glob("*.npz")):
        if dataset is None:
            raise InputError(
                f"{run.path} holds no scores, and its data.train={train} does not exist here; give"
                " --beton FILE"
            )
        return dataset
    scores = any_scores(run.path)
    if dataset is None:
        return Dataset(run.scores, scores.label_N, scores.fingerprint, None)
    require_same_dataset(dataset.fingerprint, scores.fingerprint, str(dataset.where))
    return dataset


def _read_official(source: Path, data_mask: Path | None, dataset: Dataset | None) -> np.ndarray:
    """Read the score by global index, float32 [N], from the authors' pair: order (an argsort) and
    ascending scores."""
    if data_mask is None:
        if not source.name.startswith("score_"):
            raise InputError(
                f"{source} is not named score_*.npy, so its data_mask_*.npy cannot be found; give"
                " --data-mask"
            )
        data_mask = source.with_name("data_mask_" + source.name.removeprefix("score_"))
    sorted_N, mask_N = _read_array(source), _read_array(data_mask)
    if sorted_N.ndim != 1 or not np.issubdtype(sorted_N.dtype, np.floating) or len(sorted_N) == 0:
        raise InputError(
            f"{source} is {sorted_N.dtype} {list(sorted_N.shape)}, expected floating-point scores"
            " [N]; give the score_*.npy, and the data_mask_*.npy beside it"
        )
    if mask_N.shape != sorted_N.shape or not np.issubdtype(mask_N.dtype, np.integer):
        raise InputError(
            f"{data_mask} is {mask_N.dtype} {list(mask_N.shape)}, expected integers"
            f" [{len(sorted_N)}], one per score in {source.name}; give the two files of one"
            " evaluation"
        )
    _check_size(source, "values", len(sorted_N), dataset)
    if not np.array_equal(np.sort(mask_N), np.arange(len(mask_N))):
        raise InputError(
            f"{data_mask} does not hold every index 0..{len(mask_N) - 1} once; it must be the"
            " argsort of all scores, as importance_evaluation.py writes it"
        )
    score_N = np.empty(len(mask_N), dtype=np.float32)
    with np.errstate(over="ignore"):
        score_N[mask_N] = sorted_N
    if not np.isfinite(score_N).all():
        bad = int(np.flatnonzero(~np.isfinite(score_N))[0])
        raise InputError(
            f"{source} has {score_N[bad]} for index {bad}; scores must be finite float32, evaluate"
            " them again"
        )
    if (drop := np.flatnonzero(np.diff(sorted_N) < 0)).size:
        raise InputError(
            f"{source}: value {drop[0] + 1} is {sorted_N[drop[0] + 1]:g} after"
            f" {sorted_N[drop[0]]:g}, but the authors' scores ascend; write scores by index as CSV"
            " with columns index and score"
        )
    return score_N


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); the authors' code writes score_*.npy and "
            "data_mask_*.npy"
        ) from error
    return array


def _check_size(source: Path, what: str, num: int, dataset: Dataset | None) -> None:
    if dataset is not None and num != dataset.fingerprint.num_samples:
        raise InputError(
            f"{source} has {num} {what}, {dataset.where} {dataset.fingerprint.num_samples} samples;"
            " every sample needs exactly one, give the scores of this dataset"
        )


def _read_csv(
    source: Path, key: str | None, is_column: bool, dataset: Dataset | None
) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """Read score float32 [N], label int64 [N] or None, and the extras of the score, by global
    index."""
    column, line_R, cells = _read_rows(source, key, is_column)
    _check_size(source, "rows", len(line_R), dataset)
    index_R = _indices(source, line_R, cells, dataset)

    def by_index(values_R: np.ndarray) -> np.ndarray:
        values_N = np.empty_like(values_R)
        values_N[index_R] = values_R
        return values_N

    score_N = by_index(_floats(source, line_R, column, cells[column]))
    prefix = f"extra_{column}_"
    extra = {
        name.removeprefix(prefix): by_index(_floats(source, line_R, name, cells[name]))
        for name in cells
        if name.startswith(prefix)
    }
    if "label" not in cells:
        return score_N, None, extra
    label_R = _integers(
        source, line_R, "label", [text or str(UNKNOWN_LABEL) for text in cells["label"]]
    )
    if (bad := np.flatnonzero(label_R < UNKNOWN_LABEL)).size:
        raise InputError(
            f"{source}, line {line_R[bad[0]]}: label={label_R[bad[0]]} must be 0 or more, or empty"
            " where it is not known"
        )
    if dataset is not None:
        need_R = dataset.label_N[index_R]
        differs = np.flatnonzero(
            (label_R != need_R) & (label_R != UNKNOWN_LABEL) & (need_R != UNKNOWN_LABEL)
        )
        if differs.size:
            i = differs[0]
            raise InputError(
                f"{source}, line {line_R[i]}: label={label_R[i]}, but sample {index_R[i]} of"
                f" {dataset.where} has {need_R[i]} ({differs.size} such rows); give the scores of"
                " this dataset"
            )
    return score_N, by_index(label_R), extra


def _read_rows(
    source: Path, key: str | None, is_column: bool
) -> tuple[str, list[int], dict[str, list[str]]]:
    """Return the name of the score's column, the line number of each row [R], and the text [R] of
    each column that is needed.
    """
    line_R: list[int] = []
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            separator = _separator(file.readline())
            file.seek(0)
            reader = csv.reader(file, delimiter=separator)
            header = [name.strip() for name in next(reader, [])]
            column = key if key is not None and (is_column or key in header) else "score"
            _check_header(source, header, column, key)
            cells: dict[str, list[str]] = {
                name: []
                for name in header
                if name in ("index", "path", "label", column) or name.startswith(f"extra_{column}_")
            }
            wanted = [(header.index(name), texts) for name, texts in cells.items()]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{source}, line {reader.line_num} has {len(row)} values for {len(header)}"
                        f" columns; every row needs one per column, separated by {separator!r} as"
                        " the header is"
                    )
                line_R.append(reader.line_num)
                for position, texts in wanted:
                    texts.append(row[position].strip())
        if separator == ";":  # where it separates, the comma is that of decimals
            for name in cells.keys() - {"index", "path", "label"}:
                cells[name] = [text.replace(",", ".") for text in cells[name]]
        if "path" in cells:
            cells["path"] = [text.removeprefix("./") for text in cells["path"]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} is not CSV text in UTF-8 ({error}); write it again") from error
    if not line_R:
        raise InputError(f"{source} holds no rows; it needs a header and one row per sample")
    return column, line_R, cells


def _separator(header: str) -> str:
    """Return what separates the columns of a CSV header: comma, semicolon or tab."""
    for separator in ",;\t":
        names = {name.strip() for name in next(csv.reader([header], delimiter=separator), [])}
        if names & {"index", "path"}:
            return separator
    return ","


def _check_header(source: Path, header: list[str], column: str, key: str | None) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{source} has the column {twice[0]!r} twice; leave one")
    if header and column not in header:
        raise InputError(
            f"{source} has the columns {', '.join(header)}, but none named {key or 'score'}; name"
            " the one with the scores by --column"
        )
    if header and not {"index", "path"} & set(header):
        raise InputError(
            f"{source} has the columns {', '.join(header)}; it needs index, or path and the .beton"
            " with its manifest"
        )


def _indices(
    source: Path, line_R: list[int], cells: dict[str, list[str]], dataset: Dataset | None
) -> np.ndarray:
    """Return the global index of each row, int64 [R]; every index 0..R-1 must be there exactly
    once."""
    path = None if dataset is None or dataset.manifest is None else dataset.manifest.path
    if "index" in cells:
        index_R = _integers(source, line_R, "index", cells["index"])
    else:
        if path is None:
            raise InputError(
                f"{source} has a column path but none named index, and no manifest says which index"
                " a path has; give the .beton that `tdds write` made (--beton), or a column index"
            )
        index_of = {name: i for i, name in enumerate(path)}
        unknown = next((i for i, name in enumerate(cells["path"]) if name not in index_of), None)
        if unknown is not None:
            assert dataset is not None
            raise InputError(
                f"{source}, line {line_R[unknown]}: path={cells['path'][unknown]!r} is not in"
                f" {manifest_path(dataset.where)}; paths are relative to the source, e.g."
                f" {path[0]!r}"
            )
        index_R = np.array([index_of[name] for name in cells["path"]], dtype=np.int64)
    num_rows = len(index_R)
    if (outside := np.flatnonzero((index_R < 0) | (index_R >= num_rows))).size:
        i = outside[0]
        raise InputError(
            f"{source}, line {line_R[i]}: index={index_R[i]} is outside [0, {num_rows}), the number"
            " of rows; every sample of the dataset needs exactly one row"
        )
    first = np.unique(index_R, return_index=True)[1]
    if len(first) < num_rows:
        i = np.setdiff1d(np.arange(num_rows), first)[0]
        missing = np.setdiff1d(np.arange(num_rows), index_R)[0]
        raise InputError(
            f"{source}, line {line_R[i]}: index={index_R[i]} stands there a second time, and index"
            f" {missing} is missing; every sample of the dataset needs exactly one row"
        )
    if "index" in cells and "path" in cells and path is not None:
        for row, (i, name) in enumerate(zip(index_R, cells["path"], strict=True)):
            if name not in ("", path[i]):
                raise InputError(
                    f"{source}, line {line_R[row]}: path={name!r}, but sample {i} is {path[i]!r};"
                    " give the scores of this dataset, or leave one of the columns out"
                )
    return index_R


def _integers(source: Path, line_R: list[int], column: str, text_R: list[str]) -> np.ndarray:
    """Convert to int64 [R]."""
    return _numbers(
        source, line_R, column, text_R, lambda text: np.int64(int(text)), "a whole number"
    ).astype(np.int64)


def _floats(source: Path, line_R: list[int], column: str, text_R: list[str]) -> np.ndarray:
    """Convert to float32 [R], all finite."""
    with np.errstate(over="ignore"):
        value_R = _numbers(source, line_R, column, text_R, float, "a number").astype(np.float32)
    if (bad := np.flatnonzero(~np.isfinite(value_R))).size:
        raise InputError(
            f"{source}, line {line_R[bad[0]]}: {column}={text_R[bad[0]]} must be a finite float32"
            f" ({bad.size} such rows); give every sample a finite score, higher = keep"
        )
    return value_R


def _numbers(
    source: Path,
    line_R: list[int],
    column: str,
    text_R: list[str],
    read: Callable[[str], Any],
    what: str,
) -> np.ndarray:
    values = []
    for line, text in zip(line_R, text_R, strict=True):
        try:
            values.append(read(text))
        except (ValueError, OverflowError):
            raise InputError(
                f"{source}, line {line}: {column}={text!r} must be {what}; correct the row"
            ) from None
    return np.array(values)
