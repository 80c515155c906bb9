"""The trajectory as one table: a Parquet file that pandas and others read, and its way back.

One row per epoch and sample: `epoch`, `index` and `label`, the recorded scalars, and `quarantined`
where any sample is. What is not a row is JSON under `tdds` in the schema metadata. Tables of other
programs need no such text, only the columns, their rows in any order (docs/formats.md).

Neither way holds the trajectory in memory: an epoch is written at a time, and what a score needs is
read in batches of rows.
"""

# F scalars, N dataset, T epochs, n rows of a batch

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from tdds_dist.console import Progress
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import UNKNOWN_LABEL, fingerprint
from tdds_dist.scoring.sample_stats import DELTAS, SCALARS, VISITED
from tdds_dist.scoring.trajectory import Trajectory

FORMAT = "tdds-trajectory-table-1"
KEYS = ("epoch", "index", "label")
QUARANTINED = "quarantined"
_META = b"tdds"
_NOT_SEEN = UNKNOWN_LABEL - 1
_ROWS = 1 << 20  # of a row group, and of a batch that is read; a row group is of one epoch
_ENCODING = {"int64": "DELTA_BINARY_PACKED", "bool": "PLAIN"}  # others: floats


def write_table(trajectory: Trajectory, more: dict[str, Any], file: IO[bytes]) -> None:
    """Write all epochs of a trajectory, in order. NaN becomes an empty cell.

    `more` is what the trajectory does not know, for the metadata: `fingerprint`, `class_names` ([]
    where unknown) and `settings` (provenance for score files).
    """
    import pyarrow
    import pyarrow.parquet

    quarantined, index_N = trajectory.quarantined, np.arange(trajectory.num_samples)
    number = pyarrow.from_numpy_dtype(trajectory.dtype)
    types = dict.fromkeys(KEYS, pyarrow.int64()) | dict.fromkeys(trajectory.scalars, number)
    same = {"index": index_N, "label": trajectory.labels()}  # in all epochs
    if quarantined:
        types[QUARANTINED] = pyarrow.bool_()
        same[QUARANTINED] = np.isin(index_N, [*quarantined])
    meta = {"format": FORMAT, "scored": trajectory.scored, QUARANTINED: quarantined} | more
    schema = pyarrow.schema([*types.items()], {_META: json.dumps(meta, sort_keys=True)})
    with (
        Progress("export", trajectory.num_epochs, "epochs", visible=True) as bar,
        pyarrow.parquet.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding={
                name: _ENCODING.get(str(kind), "BYTE_STREAM_SPLIT") for name, kind in types.items()
            },
            write_page_checksum=True,
        ) as writer,
    ):
        for epoch in range(trajectory.num_epochs):
            columns = same | {"epoch": np.full_like(index_N, epoch)}
            columns |= zip(trajectory.scalars, trajectory.read_epoch(epoch), strict=True)
            arrays = [pyarrow.array(columns[name], from_pandas=True) for name in types]
            writer.write_table(pyarrow.table(arrays, schema=schema), _ROWS)
            bar.advance()


class TrajectoryTable:
    """A table, read by global index as `trajectory.Trajectory` is.

    `num_classes` is the largest label + 1 where the metadata does not say.

    Raises:
        InputError: the file is damaged, or does not hold each sample once per epoch.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet

        self.path = path
        with _readable(path):
            schema = pyarrow.parquet.read_schema(path)
            meta = json.loads((schema.metadata or {}).get(_META, b"{}"))
        if (found := meta.get("format", FORMAT)) != FORMAT:
            raise InputError(f"{path} has format {found!r}, this version reads {FORMAT!r}")
        # -1 also where two columns have the name
        names = [name for name in schema.names if schema.get_field_index(name) >= 0]
        if missing := [name for name in KEYS if name not in names]:
            raise InputError(
                f"{path} has no column {missing[0]}; a trajectory has {', '.join(KEYS)} and"
                f" scalars, this table {', '.join(names)}"
            )
        self.scalars = tuple(name for name in names if name in (*SCALARS, VISITED))
        self.scored: dict[str, Any] | None = meta.get("scored")
        self.settings: dict[str, Any] = meta.get("settings", {})
        self.num_epochs, self.num_samples = self._count()
        self._label_N, is_quarantined_N = self._read_samples(QUARANTINED in names)
        self.quarantined: list[int] = np.flatnonzero(is_quarantined_N).tolist()
        known = meta.get("fingerprint", {})
        self.num_classes: int = known.get("num_classes", max(1, int(self._label_N.max()) + 1))
        self.classes_sha256: str = known.get("classes_sha256", "")
        found = fingerprint(self._label_N, self.num_classes).labels_sha256
        if (recorded := known.get("labels_sha256", found)) != found:
            raise InputError(
                f"{path} holds labels of another dataset; they hash to {found[:12]}, its metadata"
                f" says {recorded[:12]}; export it again, or drop the metadata of a changed table"
            )

    def labels(self) -> np.ndarray:
        """Return the label by global index, int64 [N]."""
        return self._label_N

    def read(self, scalar: str, num_epochs: int | None = None) -> np.ndarray:
        """Return one scalar of the first `num_epochs` epochs (default all), float32 [T, N]."""
        if scalar not in self.scalars:
            raise InputError(
                f"{self.path} has no column {scalar}, which this score needs; it has"
                f" {', '.join(self.scalars) or 'no scalar'}"
            )
        num_epochs = self.num_epochs if num_epochs is None else num_epochs
        if num_epochs > self.num_epochs:
            raise InputError(
                f"{self.path} holds {self.num_epochs} epochs, {num_epochs} are needed; lower T or"
                " collect longer"
            )
        values_TN = np.empty((num_epochs, self.num_samples), dtype=np.float32)
        for epoch_n, index_n, value_n in self._batches("epoch", "index", scalar):
            is_asked_n = epoch_n < num_epochs
            values_TN[epoch_n[is_asked_n], index_n[is_asked_n]] = value_n[is_asked_n]
        is_bad_TN = ~np.isfinite(values_TN)
        is_bad_TN[:, self.quarantined] = False
        if scalar in DELTAS:
            is_bad_TN[0] = False  # no epoch before
        if is_bad_TN.any():
            epoch, index = divmod(int(is_bad_TN.argmax()), self.num_samples)
            raise InputError(
                f"{self.path}: {scalar} of index {index} in epoch {epoch} is"
                f" {values_TN[epoch, index]}, and every sample needs a finite one in every epoch;"
                f" complete the table, or mark such samples in a column {QUARANTINED}"
            )
        return values_TN

    def _count(self) -> tuple[int, int]:
        """Return the numbers of epochs and samples; raise InputError unless all epochs have as many
        rows."""
        rows_of, num_samples = Counter[int](), 0
        for epoch_n, index_n in self._batches("epoch", "index"):
            epochs, counts = np.unique(epoch_n, return_counts=True)
            rows_of.update(dict(zip(epochs.tolist(), counts.tolist(), strict=True)))
            num_samples = max(num_samples, int(index_n.max()) + 1)
        for epoch in range(max(rows_of, default=0) + 1):
            if not rows_of[epoch] == num_samples > 0:
                self._refuse(f"epoch {epoch} has {rows_of[epoch]} rows", num_samples)
        return len(rows_of), num_samples

    def _read_samples(self, with_quarantined: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return label and quarantine by global index, int64 and bool [N]; raise InputError unless
        each sample stands once in each epoch, always with the same label."""
        is_there_TN = np.zeros((self.num_epochs, self.num_samples), dtype=bool)
        label_N = np.full(self.num_samples, _NOT_SEEN)
        is_quarantined_N = np.zeros(self.num_samples, dtype=bool)
        for epoch_n, index_n, label_n, *marks in self._batches(
            *KEYS, *[QUARANTINED] * with_quarantined
        ):
            is_there_TN[epoch_n, index_n] = True
            before_n = label_N[index_n]
            label_N[index_n] = label_n
            is_bad_n = (label_N[index_n] != label_n) | (before_n != _NOT_SEEN) & (
                before_n != label_n
            )
            if is_bad_n.any():
                row = int(is_bad_n.argmax())
                raise InputError(
                    f"{self.path}: index {index_n[row]} has label {label_n[row]} in epoch"
                    f" {epoch_n[row]}, and another elsewhere; a label is the same in every epoch"
                )
            for is_marked_n in marks:
                is_quarantined_N[index_n[is_marked_n]] = True
        if not is_there_TN.all():
            epoch, index = divmod(int(is_there_TN.argmin()), self.num_samples)
            self._refuse(
                f"epoch {epoch} has another row twice and none of {index}", self.num_samples
            )
        return label_N, is_quarantined_N

    def _refuse(self, problem: str, num_samples: int) -> NoReturn:
        raise InputError(
            f"{self.path}: {problem}; every epoch, from 0 on without a gap, needs each index from 0"
            f" to {num_samples - 1} once: complete the table"
        )

    def _batches(self, *names: str) -> Iterator[list[np.ndarray]]:
        """Yield these columns of some rows after others: KEYS as int64, 0 or more, `quarantined` as
        bool, scalars as float32, empty cells of these as NaN."""
        import pyarrow.parquet

        types = dict.fromkeys(KEYS, "int64") | {QUARANTINED: "bool"}
        with (
            _readable(self.path),
            pyarrow.parquet.ParquetFile(self.path, page_checksum_verification=True) as file,
        ):
            for batch in file.iter_batches(_ROWS, columns=[*names]):
                columns = [batch.column(name).cast(types.get(name, "float32")) for name in names]
                found = [column.to_numpy(zero_copy_only=False) for column in columns]
                for name, column, values_n in zip(names, columns, found, strict=True):
                    least = UNKNOWN_LABEL if name == "label" else 0
                    if name in types and (column.null_count or (values_n < least).any()):
                        raise InputError(
                            f"{self.path}: column {name} has empty cells or negative numbers;"
                            " correct the table"
                        )
                if len(batch):
                    yield found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into an InputError."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, json.JSONDecodeError, ArrowException) as error:
        raise InputError(
            f"{path} is no trajectory that can be read ({error}); restore it, or write it again by"
            " `tdds export RUN --format trajectory`"
        ) from error
