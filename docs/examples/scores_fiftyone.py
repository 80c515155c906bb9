"""Scores in FiftyOne: each column of `tdds export RUN --format parquet` as a field, matched by path."""

import os

import pyarrow.parquet


def add_scores(dataset, directory: str, table: str, keys: list[str]) -> None:  # fiftyone.Dataset
    """Give each sample of `dataset` the fields `keys` (e.g. "el2n", "rank_el2n"); None where the table has no such path.
    Paths in the table are relative to `directory`. A dot would mean a field in a field, so it becomes `_`."""
    columns = pyarrow.parquet.read_table(table, columns=["path", *keys]).to_pydict()
    row_of = {os.path.realpath(os.path.join(directory, path)): row for row, path in enumerate(columns["path"])}
    rows = [row_of.get(os.path.realpath(path)) for path in dataset.values("filepath")]
    for key in keys:
        dataset.set_values(key.replace(".", "_"), [None if row is None else columns[key][row] for row in rows])
