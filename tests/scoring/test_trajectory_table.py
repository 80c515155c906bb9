"""The trajectory as a Parquet table: the same bits in every score, tables of other programs, and what
is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
import torch

from tdds_dist import ShardedScorer, Window
from tdds_dist.cli.main import main
from tdds_dist.coreset.export import export
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.runs.artifacts import load_scores
from tdds_dist.scoring import trajectory_table
from tdds_dist.scoring.offline import score, score_all
from tdds_dist.scoring.trajectory import Trajectory
from tests.make import refused, table
from tests.scoring.test_scorer import random_stream

N, CLASSES, EPOCHS = 210, 5, 6
SHORT = ["el2n_epochs=3", "uncertainty_window=3"]
BAD = {17: 2, 100: 4}  # index: epoch of its NaN


def record(folder: Path, kind: str = "float32") -> Path:
    """A trajectory of the scorer: `kind` is its dtype, or what happens in it."""
    options = {
        "float16": {"trajectory_dtype": torch.float16},
        "quarantined": {"on_nan": "quarantine"},
        "partial": {"partial_epochs": True},
    }.get(kind, {})
    scorer = ShardedScorer(
        N, CLASSES, [Window(6, 3), Window(5, 3)], device="cpu", trajectory=folder, **options
    )
    logits, label_N = random_stream(N, CLASSES, EPOCHS)
    for epoch in range(EPOCHS):
        is_partial = kind == "partial" and epoch > 2
        subset = np.arange(epoch, N, 2) if is_partial else None
        size = N if subset is None else len(subset)
        order = epoch_order(size, 32, seed=1, epoch=epoch, subset=subset)
        samples, indices = order.of_rank(0, 1)
        scorer.expect(order)
        for sample_B, index_B in zip(samples, indices, strict=True):
            logits_BC = logits[epoch][torch.from_numpy(sample_B.copy())]
            for index in [
                i for i, first in BAD.items() if kind == "quarantined" and epoch == first
            ]:
                logits_BC[torch.from_numpy(index_B == index)] = torch.nan
            scorer.record(
                torch.from_numpy(index_B.copy()),
                logits_BC,
                label_N[torch.from_numpy(sample_B.copy())],
            )
        scorer.end_epoch()
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Never changed."""
    return record(tmp_path_factory.mktemp("recorded") / "trajectory")


def assert_same_scores(one: Path, other: Path) -> None:
    """The folders hold the same score files, in every bit."""
    names = sorted(path.name for path in one.glob("*.npz"))
    assert names == sorted(path.name for path in other.glob("*.npz")) != []
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["float32", "float16", "quarantined", "partial"])
def test_scores_of_the_table_are_those_of_the_trajectory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory_table, "_ROWS", 100)
    folder = record(tmp_path / "trajectory", kind)
    (path, _), _ = export(folder, "trajectory", tmp_path)
    for source, out in ((folder, "one"), (path, "other")):
        paths, _ = score_all(source, options=SHORT, out=tmp_path / out)
        assert len(paths) >= (4 if kind == "partial" else 12)
    assert_same_scores(tmp_path / "one", tmp_path / "other")
    file = pyarrow.parquet.ParquetFile(path)
    assert file.num_row_groups == 3 * EPOCHS
    rows, trajectory = file.read(), Trajectory(folder)
    scalars = ("visited",) * (kind == "partial") + ("quarantined",) * (kind == "quarantined")
    assert rows.column_names == ["epoch", "index", "label", *trajectory.scalars[:9], *scalars]
    assert rows["epoch"].to_pylist() == np.repeat(np.arange(EPOCHS), N).tolist()
    assert rows["index"].to_pylist() == [*range(N)] * EPOCHS
    assert str(rows.schema.field("el2n").type) == {"float16": "halffloat"}.get(kind, "float")
    assert rows["delta_ce"].null_count == N
    if kind == "quarantined":
        assert rows["quarantined"].to_pylist() == [i in BAD for i in range(N)] * EPOCHS
        meta = json.loads(file.schema_arrow.metadata[b"tdds"])
        assert meta["quarantined"] == {str(index): epoch for index, epoch in BAD.items()}


def test_a_run_and_its_table_give_the_same_files(finished_run, tmp_path):
    """By the commands; with seed, class names and windows from the metadata."""
    words = ["export", finished_run.run, "--format", "trajectory", "--out", tmp_path]
    assert main([*map(str, words), "--quiet"]) == 0
    words = ["score", tmp_path / "trajectory.parquet", "--all", *SHORT]
    assert main([*map(str, words), "--quiet"]) == 0
    needs_more = {"entropy.npz", "moderate.npz", "cld.npz"}  # than the trajectory
    files = [*(finished_run.run / "scores").glob("*.npz")]
    for path in [path for path in files if path.name not in needs_more]:
        ours, theirs = load_scores(path), load_scores(tmp_path / path.name)
        assert theirs.score_N.tobytes() == ours.score_N.tobytes()
        assert theirs.fingerprint.classes_sha256 == ours.fingerprint.classes_sha256 != ""
        assert theirs.settings | {"source": ""} == ours.settings | {"source": ""}
    schema = pyarrow.parquet.read_schema(tmp_path / "trajectory.parquet")
    assert json.loads(schema.metadata[b"tdds"])["class_names"] == [*"0123456789"]


def test_a_table_of_another_program(recorded, tmp_path):
    """Rows and columns in any order, other types, columns of its own, only the scalars of two
    scores."""
    (path, _), _ = export(recorded, "trajectory", tmp_path)
    rows = pyarrow.parquet.read_table(path)
    rows = rows.take(np.random.default_rng(0).permutation(len(rows)))
    foreign = pyarrow.table(
        {
            "p_label": rows["p_label"].cast("double"),
            "note": ["x"] * len(rows),
            "label": rows["label"].cast("uint8"),
            "correct": rows["correct"].cast("bool"),
            "index": rows["index"].cast("int32"),
            "epoch": rows["epoch"].cast("double"),
        }
    )
    pyarrow.parquet.write_table(foreign, tmp_path / "foreign.parquet", row_group_size=100)
    paths, skipped = score_all(tmp_path / "foreign.parquet", options=SHORT, out=tmp_path / "other")
    keys = {path.stem for path in paths}
    assert keys >= {"csl", "correctness", "forgetting", "random"}
    assert any(
        "foreign.parquet has no column el2n, which this score needs" in why for why in skipped
    )
    score_all(recorded, sorted(keys - {"dyn_unc_J3", "dual_J3"}), out=tmp_path / "one")
    score_all(recorded, ["dyn_unc", "dual"], options=SHORT[1:], out=tmp_path / "one")
    assert_same_scores(tmp_path / "one", tmp_path / "other")


def changed(rows: pyarrow.Table, name: str, row: int, value: object) -> pyarrow.Table:
    """The table with another cell."""
    values = rows[name].to_pylist()
    values[row] = value
    place = rows.schema.get_field_index(name)
    return rows.set_column(place, name, pyarrow.array(values, rows.schema.field(name).type))


ROW = 3 * N + 4
CHANGES = {
    "no row": lambda rows: rows.slice(0, 0),
    "no epoch 2": lambda rows: rows.filter(pyarrow.compute.field("epoch") != 2),
    "rows twice": lambda rows: pyarrow.concat_tables([rows, rows.slice(N + 5, 3)]),
    "one for another": lambda rows: pyarrow.concat_tables(
        [rows.slice(0, ROW), rows.slice(ROW + 1), rows.slice(ROW + 1, 1)]
    ),
    "negative": lambda rows: changed(rows, "index", ROW, -1),
    "empty key": lambda rows: changed(rows, "epoch", ROW, None),
    "NaN": lambda rows: changed(rows, "delta_official", ROW, float("nan")),
    "empty": lambda rows: changed(rows, "delta_official", ROW, None),
    "label": lambda rows: changed(rows, "label", ROW, 9),
    "all labels": lambda rows: rows.set_column(2, "label", pyarrow.array([1] * len(rows))),
    "no label": lambda rows: rows.drop_columns("label"),
    "names": lambda rows: rows.set_column(2, "label", pyarrow.array(["cat"] * len(rows))),
    "newer": lambda rows: rows.replace_schema_metadata({"tdds": '{"format": "new"}'}),
    "no JSON": lambda rows: rows.replace_schema_metadata({"tdds": "x"}),
}


@pytest.mark.parametrize(
    ("change", "message"),
    table(r"""
        no row          -> epoch 0 has 0 rows
        no epoch 2      -> epoch 2 has 0 rows; every epoch, from 0 on without a gap, needs each index from 0 to 209 once: comp
        rows twice      -> epoch 1 has 213 rows; every epoch
        one for another -> epoch 3 has another row twice and none of 4; every epoch
        negative        -> column index has empty cells or negative numbers; correct
        empty key       -> column epoch has empty cells
        NaN             -> delta_official of index 4 in epoch 3 is nan, .* finite one .*; complete the table, or mark
        empty           -> delta_official of index 4 in epoch 3 is nan
        label           -> index 4 has label 9 in epoch 3, and another elsewhere; a label is the same
        all labels      -> holds labels of another dataset; .* export it again, or drop the metadata
        no label        -> has no column label; a trajectory has epoch, index, label .*, this table epoch, index, delta
        names           -> no trajectory that can be read \(Failed to parse string: 'cat'
        newer           -> has format 'new', this version reads 'tdds-trajectory-table-1'
        no JSON         -> no trajectory that can be read \(Expecting value
    """),
)
def test_tables_that_are_refused(change, message, recorded, tmp_path):
    (path, _), _ = export(recorded, "trajectory", tmp_path)
    pyarrow.parquet.write_table(CHANGES[change](pyarrow.parquet.read_table(path)), path)
    refused(message, score, path)
    assert not [*tmp_path.glob("*.npz")]


def test_damaged_files(recorded, tmp_path):
    (path, _), _ = export(recorded, "trajectory", tmp_path)
    content = path.read_bytes()
    column = pyarrow.parquet.read_metadata(path).row_group(4).column(3)  # delta_official
    middle = column.data_page_offset + column.total_compressed_size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (b"", content[:-100], flipped):
        path.write_bytes(damaged)
        refused(r"no trajectory that can be read \(.*restore it, or write", score, path)
    refused(r"gone\.parquet is no trajectory that can be read", score, tmp_path / "gone.parquet")


def test_a_quarantined_sample_needs_no_number(recorded, tmp_path):
    (path, _), _ = export(recorded, "trajectory", tmp_path)
    rows = changed(pyarrow.parquet.read_table(path), "delta_official", ROW, None)
    rows = rows.append_column("quarantined", pyarrow.array([i == 4 for i in range(N)] * EPOCHS))
    pyarrow.parquet.write_table(rows, path)
    found = load_scores(score(path, T=6, K=3)[0])
    assert found.settings["quarantined"] == [4]
    assert found.score_N[4] == np.delete(found.score_N, 4).min()
