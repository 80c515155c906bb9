"""Tables of an export: one row per sample, as CSV or Parquet.

Owns their columns (docs/interchange.md). What is kept, and how samples of equal score are ordered,
is decided by `select` and `samplers`; this module only writes it down.
"""

# N dataset, M kept samples

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from tdds_dist.coreset import samplers
from tdds_dist.coreset.export_source import Source, configured_rates, dataset_of, utf8_paths
from tdds_dist.coreset.select import choose
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import UNKNOWN_LABEL, Coreset, Fingerprint

CHUNK_ROWS = 1 << 16  # rows that are turned into Python objects, or into one row group, at a time

Columns = dict[str, np.ndarray | list[str]]  # [N] each; NaN is an empty cell


def sample_table(
    given: Source, rates: Sequence[float], ranks: bool, beton: Path | None, notes: list[str]
) -> tuple[Columns, dict[str, Any]]:
    """Make the table of a source, and what stands beside it in the file."""
    if given.coreset is not None:
        return _coreset_table(given, given.coreset, beton, notes)
    return _score_table(given, rates or configured_rates(given.run), ranks, beton, notes)


def _score_table(
    given: Source, rates: Sequence[float], ranks: bool, beton: Path | None, notes: list[str]
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
    given: Source, coreset: Coreset, beton: Path | None, notes: list[str]
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
    given: Source, beton: Path | None, found: Fingerprint, label_N: np.ndarray, notes: list[str]
) -> Columns:
    """Return the columns index, path, label, true_label and corruption as far as they are known,
    and a note on those left out.
    """
    columns: Columns = {"index": np.arange(found.num_samples)}
    dataset, why = dataset_of(given, beton, found)
    manifest = None if dataset is None else dataset.manifest
    if manifest is None:
        notes.append(f"no column path: {why}")
    else:
        columns["path"] = utf8_paths(manifest.path)
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


def write_csv(columns: Columns, meta: dict[str, Any], file: IO[bytes]) -> None:
    """Write the table alone: CSV has no place for `meta`. A path that spreadsheets would take for a
    formula is written as `./path`, which is the same file."""
    if "path" in columns:
        paths = [f"./{text}" if text[:1] in "=+-@" else text for text in columns["path"]]
        columns = columns | {"path": paths}
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


def write_parquet(columns: Columns, meta: dict[str, Any], file: IO[bytes]) -> None:
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
