"""The description of an exported trajectory says what is in the files, and mlcroissant reads them by
it."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from tdds_dist.coreset.export import export
from tests.make import refused
from tests.scoring.test_trajectory_table import record


@pytest.fixture(params=["float16", "quarantined", "partial"])
def files(request, tmp_path) -> tuple[Path, Path]:
    (table, text), notes = export(record(tmp_path / "trajectory", request.param), "trajectory")
    assert (table.parent, notes) == (tmp_path / "trajectory" / "export" / "trajectory", [])
    return table, text


def test_every_column_and_the_file_are_described(files):
    table, text = files
    described = json.loads(text.read_text())
    (file,) = described["distribution"]
    assert file["contentUrl"] == table.name
    assert file["contentSize"] == f"{table.stat().st_size} B"
    assert file["sha256"] == hashlib.sha256(table.read_bytes()).hexdigest()
    (rows,) = described["recordSet"]
    kinds = {"int64": "sc:Integer", "bool": "sc:Boolean"}
    assert [
        (field["source"]["extract"]["column"], field["dataType"]) for field in rows["field"]
    ] == [
        (column.name, kinds.get(str(column.type), "sc:Float"))
        for column in pyarrow.parquet.read_schema(table)
    ]


@pytest.mark.loops
def test_mlcroissant_reads_the_rows(files):
    mlcroissant = pytest.importorskip("mlcroissant")
    table, text = files
    dataset = mlcroissant.Dataset(text)
    assert not dataset.metadata.ctx.issues.errors
    found = [*dataset.records("rows")]
    want = pyarrow.parquet.read_table(table).to_pylist()
    assert len(found) == len(want)
    assert {name.removeprefix("rows/"): value for name, value in found[-1].items()} == want[-1]


def test_what_is_there_is_moved_aside_and_what_does_not_fit_is_refused(tmp_path):
    folder = record(tmp_path / "trajectory")
    (table, _), _ = export(folder, "trajectory", tmp_path)
    assert export(folder, "trajectory", tmp_path)[1] == []
    table.write_bytes(b"mine")
    (said,) = export(folder, "trajectory", tmp_path)[1]
    assert "trajectory.parquet held something else, which is moved aside to" in said
    assert [path.read_bytes() for path in tmp_path.glob("before-*/*")] == [b"mine"]
    refused("holds no scores, so .* leave both out", export, folder, "trajectory", ranks=False)
    refused("is a file, and trajectory is two", export, folder, "trajectory", table)
    refused("is no trajectory of our own; give a run", export, table, "trajectory", tmp_path)
