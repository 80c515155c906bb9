"""Export and import: what each format holds, that scores and coresets survive the way out and back,
the authors' pair."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml

from tdds_dist.config.run import load_config, to_dict
from tdds_dist.coreset import sample_table, samplers
from tdds_dist.coreset.export import export, subset_rate
from tdds_dist.coreset.import_scores import import_scores
from tdds_dist.coreset.select import choose, make_coreset
from tdds_dist.data.beton import inspect_beton
from tdds_dist.data.manifest import read_manifest, write_manifest
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    UNKNOWN_LABEL,
    Coreset,
    Fingerprint,
    Scores,
    fingerprint,
    load_coreset,
    load_scores,
    save_coreset,
    save_scores,
)
from tests.make import SHORT as SECOND
from tests.make import TDDS as FIRST
from tests.make import csv_rows as read_csv
from tests.make import refused, scores, select

N = 120
RATES = (0.0, 0.3, 0.5, 0.8)
# its shortest text, read in double precision and rounded, is its neighbour
AWKWARD = np.float32(7.038531e-26)


def some_scores(label_N: np.ndarray, key: str = FIRST, settings: dict | None = None) -> Scores:
    """Half of the scores in ties, and some whose text is delicate."""
    rng = np.random.default_rng(7)
    score_N = np.append(rng.integers(0, 4, N // 2), rng.exponential(size=N - N // 2))
    score_N = score_N.astype(np.float32)
    score_N[-4:] = [AWKWARD, 0.1, 1e-40, 3e38]
    score_N = rng.permutation(score_N)
    T, K = int(key.split("_T")[1][0]) if "_T" in key else 3, 2
    settings = settings or {"score": "tdds", "preset": "official", "T": T, "K": K, "beta": 0.9}
    return scores(key, score_N, label_N, 10, settings)


@pytest.fixture(scope="session")
def label_N(betons: dict[str, Path]) -> np.ndarray:
    return inspect_beton(betons["train"]).label_N


@pytest.fixture
def score_file(tmp_path: Path, label_N: np.ndarray) -> Path:
    save_scores(tmp_path / "alone" / f"{FIRST}.npz", some_scores(label_N))
    return tmp_path / "alone" / f"{FIRST}.npz"


@pytest.fixture
def run(config_file: Path, tmp_path: Path, label_N: np.ndarray) -> Path:
    """A run with two windows and a coreset of the first; its config serves the rates 0, 0.5 and
    0.8."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(load_config(config_file))))
    first = some_scores(label_N)
    save_scores(path / "scores" / f"{FIRST}.npz", first)
    second = replace(some_scores(label_N, SECOND), score_N=first.score_N[::-1].copy())
    save_scores(path / "scores" / f"{SECOND}.npz", second)
    select(path, 0.5, score=FIRST)
    return path


def write_rows(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def float32_of(cells: Iterable[str]) -> bytes:
    """The bytes of what is printed."""
    return np.array([float(cell) for cell in cells]).astype(np.float32).tobytes()


# ---- tables


def test_csv_of_a_run(run, betons, label_N):
    paths, notes = export(run, "csv")
    assert (paths, notes) == ([run / "export" / "scores.csv"], [])
    rows = read_csv(paths[0])
    keys, rates = (SECOND, FIRST), ("0", "0.5", "0.8")
    flags = {key: [f"keep_{key}_p{rate}" for rate in rates] for key in keys}
    of_scores = [name for key in keys for name in (key, f"rank_{key}", *flags[key])]
    assert list(rows[0]) == ["index", "path", "label", *of_scores]
    assert [int(row["index"]) for row in rows] == list(range(N))
    assert [row["path"] for row in rows] == read_manifest(betons["train"]).path
    assert [int(row["label"]) for row in rows] == label_N.tolist()
    for key in (FIRST, SECOND):
        scores = load_scores(run / "scores" / f"{key}.npz")
        assert float32_of(row[key] for row in rows) == scores.score_N.tobytes()
        rank_N = np.array([int(row[f"rank_{key}"]) for row in rows])
        assert sorted(rank_N) == list(range(1, N + 1))
        for num in range(1, N + 1):
            top_M = samplers.top(scores.score_N, num, 0)
            np.testing.assert_array_equal(np.flatnonzero(rank_N <= num), top_M)
        for name, rate in zip(flags[key], (0.0, 0.5, 0.8), strict=True):
            kept = [i for i in range(N) if rows[i][name] == "True"]
            np.testing.assert_array_equal(kept, choose(scores, rate))


def test_cells_of_csv_are_short_and_exact():
    values = [AWKWARD, 0.1, 1 / 3, -0.0, 1e-45, 3.4028235e38, 16777216, np.nan]
    cells = sample_table._cells(np.array(values, np.float32))
    assert cells[1:] == ["0.1", "0.33333334", "-0.0", "1e-45", "3.4028235e+38", "1.6777216e+07", ""]
    assert float32_of(cells[:-1]) == np.array(values[:-1], np.float32).tobytes()
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits)]
    assert float32_of(sample_table._cells(bits)) == bits.tobytes()


def test_parquet_of_a_run_is_the_csv_with_types_and_settings(run, monkeypatch):
    monkeypatch.setattr(sample_table, "CHUNK_ROWS", 50)
    (path,), notes = export(run, "parquet", pruning_rates=[0.25])
    assert notes == []
    table = pyarrow.parquet.read_table(path)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3
    flag = f"keep_{FIRST}_p0.25"
    names = ("index", "label", f"rank_{FIRST}", "path", FIRST, flag)
    types = [str(table.schema.field(name).type) for name in names]
    assert types == ["int64", "int64", "int64", "string", "float", "bool"]
    scores = load_scores(run / "scores" / f"{FIRST}.npz")
    assert table[FIRST].to_numpy().tobytes() == scores.score_N.tobytes()
    np.testing.assert_array_equal(np.flatnonzero(table[flag].to_numpy()), choose(scores, 0.25))
    meta = json.loads(table.schema.metadata[b"tdds"])
    assert meta["settings"][FIRST] == scores.settings
    assert meta["fingerprint"] == vars(scores.fingerprint)
    assert meta["pruning_rates"] == [0.25]
    (as_csv,), _ = export(run, "csv", pruning_rates=[0.25])
    assert table.column_names == list(read_csv(as_csv)[0])
    assert [str(value) for value in table[flag].to_pylist()] == [
        row[flag] for row in read_csv(as_csv)
    ]
    chunks = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    score = chunks.column(table.column_names.index(FIRST))
    assert score.encodings == ("RLE", "BYTE_STREAM_SPLIT")
    assert score.compression == "ZSTD"
    (small,), _ = export(run, "parquet", pruning_rates=[0.25], ranks=False)
    assert pyarrow.parquet.read_schema(small).names == [
        name for name in table.column_names if not name.startswith("rank_")
    ]


def test_a_score_file_alone_has_no_paths_and_says_so(score_file, betons):
    (path,), notes = export(score_file, "csv")
    assert path == score_file.with_suffix(".csv")
    assert list(read_csv(path)[0])[:3] == ["index", "label", FIRST]
    assert [name for name in read_csv(path)[0] if name.startswith("keep")] == [
        f"keep_{FIRST}_p{rate}" for rate in (0.3, 0.5, 0.7, 0.8, 0.9)
    ]
    assert len(notes) == 1
    assert "no column path" in notes[0]
    assert "give --beton FILE" in notes[0]
    # a folder
    (path,), notes = export(score_file, "csv", betons["train"].parent, beton=betons["train"])
    assert (path, notes) == (betons["train"].parent / f"{FIRST}.csv", [])
    assert "path" in read_csv(path)[0]


def test_unknown_labels_are_left_out(score_file):
    label_N = np.full(N, UNKNOWN_LABEL)
    save_scores(score_file, replace(some_scores(label_N), fingerprint=fingerprint(label_N, 10)))
    (path,), notes = export(score_file, "csv")
    assert list(read_csv(path)[0])[:2] == ["index", FIRST]
    assert [note.split(":")[0] for note in notes] == ["no column path", "no column label"]


def test_a_run_whose_images_are_elsewhere(run, betons):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = "/nowhere/train.beton"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (path,), notes = export(run, "csv")
    assert "path" not in read_csv(path)[0]
    assert "data.train=/nowhere/train.beton" in notes[0]
    with pytest.raises(
        InputError, match=r"paths .* not known: data\.train=/nowhere.*give --beton FILE"
    ):
        export(next((run / "coresets").glob("*.npz")), "paths")
    assert export(run, "csv", run / "with_paths.csv", beton=betons["train"])[1] == []


def test_columns_of_noise_on_purpose(run, betons, tmp_path):
    beton = tmp_path / "noisy.beton"
    beton.write_bytes(betons["train"].read_bytes())
    manifest = read_manifest(betons["train"])
    true_label_N = (manifest.label_N + (np.arange(N) % 3 == 0)) % 10
    kind = ["fog" if i % 5 == 0 else "" for i in range(N)]
    write_manifest(
        tmp_path / "noisy.manifest.json",
        replace(manifest, true_label_N=true_label_N, corruption=kind),
    )
    for kind_of_file in ("csv", "parquet"):
        (path,), _ = export(run, kind_of_file, beton=beton)
        rows = (
            read_csv(path)
            if kind_of_file == "csv"
            else pyarrow.parquet.read_table(path).to_pylist()
        )
        assert [int(row["true_label"]) for row in rows] == true_label_N.tolist()
        assert [row["corruption"] for row in rows] == kind


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table_of_a_coreset(run, kind, label_N):
    source = next((run / "coresets").glob("*.npz"))
    coreset = load_coreset(source)
    (path,), notes = export(source, kind)
    assert (path, notes) == (source.with_suffix(f".{kind}"), [])
    if kind == "csv":
        rows = [{name: text or None for name, text in row.items()} for row in read_csv(path)]
        rows = [row | {"keep": row["keep"] == "True"} for row in rows]
    else:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        meta = json.loads(pyarrow.parquet.read_schema(path).metadata[b"tdds"])
        assert (meta["score_key"], meta["pruning_rate"]) == (FIRST, 0.5)
        assert meta["settings"] == coreset.settings
    assert list(rows[0]) == ["index", "path", "label", "keep", "importance"]
    assert [int(row["label"]) for row in rows] == label_N.tolist()
    assert [i for i in range(N) if rows[i]["keep"]] == coreset.index_M.tolist()
    assert [i for i in range(N) if rows[i]["importance"] is not None] == coreset.index_M.tolist()
    found = float32_of(rows[i]["importance"] for i in coreset.index_M)
    assert found == coreset.importance_M.tobytes()


def test_card_of_a_run(run, tmp_path):
    """Its table is that of the run, its index lists are the coresets, and its example runs."""
    folder = tmp_path / "card"
    paths, _ = export(run, "card", folder, ranks=False)
    assert sorted(paths) == sorted(path for path in folder.rglob("*") if path.is_file())
    (table,), _ = export(run, "parquet", tmp_path / "x.parquet", ranks=False)
    assert (folder / "samples.parquet").read_bytes() == table.read_bytes()
    files = [*(run / "coresets").glob("*.npz")]
    for file in files:
        indices = np.loadtxt(folder / "indices" / f"{file.stem}.txt", dtype=np.int64)
        np.testing.assert_array_equal(indices, load_coreset(file).index_M)
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["configs"][0]["data_files"] == "samples.parquet"
    assert load_coreset(files[0]).fingerprint.labels_sha256 in text
    assert str(tmp_path) not in text
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert front["pretty_name"] == f"Scores and coresets of {config['run']['name']}"
    code = text.split("```python\n")[1].split("```")[0]
    program = f"dataset = range({N})\n{code}\nprint(len(kept), samples.num_rows)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    first = sorted(file.stem for file in files)[0]
    kept = load_coreset(run / "coresets" / f"{first}.npz").index_M
    assert found.stdout.split() == [str(len(kept)), str(N)]


def test_moderate_is_kept_from_the_centre_in_tables(score_file, label_N):
    scores = some_scores(label_N, "moderate", {"score": "moderate"})
    save_scores(score_file, scores)
    rows = read_csv(export(score_file, "csv", pruning_rates=[0.5])[0][0])
    kept = [i for i in range(N) if rows[i]["keep_moderate_p0.5"] == "True"]
    np.testing.assert_array_equal(kept, samplers.centre(scores.score_N, 60))
    assert kept != samplers.top(scores.score_N, 60).tolist()
    centre = "'moderate' does not keep what ranks highest.*give a coreset"
    refused(centre, export, score_file, "official")


@pytest.mark.parametrize("kind", ["csv", "parquet", "paths", "card"])
def test_names_that_no_text_can_hold_are_refused(run, betons, tmp_path, kind):
    beton = tmp_path / "old.beton"
    beton.write_bytes(betons["train"].read_bytes())
    manifest = read_manifest(betons["train"])
    manifest = replace(manifest, path=["caf\udce9", *manifest.path[1:]])
    write_manifest(tmp_path / "old.manifest.json", manifest)
    source = next((run / "coresets").glob("*.npz"))
    message = r"not UTF-8: 1 \(such as 'caf\\xe9'\); rename the images"
    refused(message, export, source, kind, tmp_path / "out", beton=beton)


# ---- kept samples


def test_paths_of_a_coreset_and_of_scores(run, betons):
    path_N = read_manifest(betons["train"]).path
    source = next((run / "coresets").glob("*.npz"))
    coreset = load_coreset(source)
    (path,), notes = export(source, "paths")
    assert (path, notes) == (source.with_suffix(".txt"), [])
    assert path.read_text().splitlines() == [path_N[i] for i in coreset.index_M]
    (path,), _ = export(run / "scores" / f"{FIRST}.npz", "paths", pruning_rates=[0.8])
    assert path == run / "scores" / f"{FIRST}_p0.8.txt"
    kept = choose(load_scores(run / "scores" / f"{FIRST}.npz"), 0.8)
    assert path.read_text().splitlines() == [path_N[i] for i in kept]


def test_torch_subset(run):
    source = next((run / "coresets").glob("*.npz"))
    coreset = load_coreset(source)
    (path,), _ = export(source, "torch-subset")
    assert path == source.with_suffix(".pt")
    found = torch.load(path, weights_only=True)
    assert sorted(found) == ["importance", "index", "num_samples"]
    assert (found["index"].dtype, found["importance"].dtype) == (torch.int64, torch.float32)
    assert found["num_samples"] == N
    assert found["index"].tolist() == coreset.index_M.tolist()
    assert found["importance"].numpy().tobytes() == coreset.importance_M.tobytes()
    dataset = torch.utils.data.TensorDataset(torch.arange(N))
    assert len(torch.utils.data.Subset(dataset, found["index"])) == 60
    (path,), notes = export(run / "scores" / f"{FIRST}.npz", "torch-subset", pruning_rates=[0.9])
    want, warnings = make_coreset(load_scores(run / "scores" / f"{FIRST}.npz"), 0.9)
    assert notes == warnings
    found = torch.load(path, weights_only=True)
    assert found["importance"].numpy().tobytes() == want.importance_M.tobytes()


def test_a_run_with_one_score_goes_to_export(run):
    (run / "scores" / f"{SECOND}.npz").unlink()
    for kind, name in (
        ("paths", f"{FIRST}_p0.5.txt"),
        ("torch-subset", f"{FIRST}_p0.5.pt"),
        ("official", "data_mask_win2_ep3.npy"),
    ):
        assert export(run, kind, pruning_rates=[0.5])[0][0] == run / "export" / name


# ---- the authors' pair


def authors_loader(
    mask: np.ndarray, sorted_score: np.ndarray, rate: float
) -> tuple[np.ndarray, dict[int, float]]:
    """What data_subset.py of the authors trains on: kept indices and the weight of each sample."""
    score = (sorted_score - min(sorted_score)) / (max(sorted_score) - min(sorted_score))
    weight = {i: float(score[np.where(mask == i)].item()) for i in range(len(mask))}
    return mask[int(rate * len(mask)) :], weight


def read_pair(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    mask_N, score_N = (np.load(path, allow_pickle=False) for path in paths)
    assert (mask_N.dtype, score_N.dtype) == (np.int64, np.float32)
    assert (np.diff(score_N) >= 0).all()
    return mask_N, score_N


def rate_in(note: str) -> float:
    return float(note.split()[1])


def test_official_pair_of_scores(score_file):
    scores = load_scores(score_file)
    paths, notes = export(score_file, "official", pruning_rates=RATES)
    assert [path.name for path in paths] == ["data_mask_win2_ep3.npy", "score_win2_ep3.npy"]
    mask_N, score_N = read_pair(paths)
    np.testing.assert_array_equal(score_N, np.sort(scores.score_N))
    np.testing.assert_array_equal(scores.score_N[mask_N], score_N)
    for num in range(1, N + 1):
        top_M = samplers.top(scores.score_N, num, 0)
        np.testing.assert_array_equal(np.sort(mask_N[N - num :]), top_M)
    assert len(notes) == len(RATES)
    for note, rate in zip(notes, RATES, strict=True):
        kept, weight = authors_loader(mask_N, score_N, rate_in(note))
        coreset, _ = make_coreset(scores, rate)
        np.testing.assert_array_equal(np.sort(kept), coreset.index_M)
        weight_M = [weight[i] for i in coreset.index_M]
        np.testing.assert_allclose(weight_M, coreset.importance_M, atol=1e-6)


def test_official_names(score_file, label_N, tmp_path):
    """Only the authors' own computation gets the authors' name."""
    tdds = {"score": "tdds", "preset": "official", "T": 30, "K": 10, "beta": 0.9}
    for key, settings, suffix in (
        ("a", tdds, "win10_ep30"),
        ("el2n", {"score": "el2n"}, "el2n"),
        ("b", tdds | {"preset": "paper"}, "b"),
        ("c", tdds | {"delta": "ce"}, "c"),
    ):
        save_scores(score_file, some_scores(label_N, key, settings))
        names = [path.name for path in export(score_file, "official", tmp_path)[0]]
        assert names == [f"data_mask_{suffix}.npy", f"score_{suffix}.npy"]


@pytest.mark.parametrize(
    "options",
    [{}, {"class_balanced": True}, {"score": "random"}],
    ids=["top", "balanced", "random"],
)
def test_official_pair_of_a_coreset(run, options):
    source, _ = select(run, 0.7, **{"score": FIRST, "class_balanced": False} | options)
    coreset = load_coreset(source)
    paths, notes = export(source, "official")
    assert paths[0] == source.parent / f"data_mask_{source.stem}.npy"
    mask_N, score_N = read_pair(paths)
    kept, weight = authors_loader(mask_N, score_N, rate_in(notes[0]))
    np.testing.assert_array_equal(np.sort(kept), coreset.index_M)
    largest = coreset.importance_M.max()
    weight_M = [weight[i] for i in coreset.index_M]
    np.testing.assert_allclose(weight_M, coreset.importance_M / largest, atol=1e-6)
    assert sum(weight[i] for i in set(range(N)) - set(coreset.index_M.tolist())) == 0
    assert len(notes) == 1 + (largest != 1)


def test_official_pair_of_importances_beyond_one_says_that_they_are_scaled(tmp_path, label_N):
    index_M, importance_M = np.array([3, 5, 90]), np.array([7, 0, 2], dtype=np.float32)
    coreset = Coreset(index_M, importance_M, "x", 0.975, fingerprint(label_N, 10), {})
    save_coreset(tmp_path / "c.npz", coreset)
    paths, notes = export(tmp_path / "c.npz", "official")
    mask_N, score_N = read_pair(paths)
    assert (mask_N[-3:].tolist(), score_N[-3:].tolist()) == ([5, 90, 3], [0, 2, 7])
    assert "0 to 7" in notes[1]
    for importance, message in (
        ([1, -1, 2], "importance -1 is below the 0"),
        ([0, 0, 0], r"all 120 values are 0.*range"),
    ):
        wrong = replace(coreset, importance_M=np.array(importance, dtype=np.float32))
        save_coreset(tmp_path / "c.npz", wrong)
        refused(message, export, tmp_path / "c.npz", "official")


def test_subset_rate_keeps_what_it_should():
    for num_samples in (1, 2, 3, 7, 10, 97, 100, 119, 120, 1000):
        for num_kept in range(1, num_samples + 1):
            rate = subset_rate(num_samples, num_kept)
            assert int(float(repr(rate)) * num_samples) == num_samples - num_kept
    rng = np.random.default_rng(0)
    for num_samples in (50_000, 1_281_167, 2**31 - 1):
        some = rng.integers(1, num_samples, 2000).tolist()
        for num_kept in [1, 2, num_samples - 1, num_samples, *some]:
            assert int(subset_rate(num_samples, num_kept) * num_samples) == num_samples - num_kept
    assert int(0.29 * 100) == 28  # why there is such a function
    for num_kept in (0, 11, -1):
        refused(rf"num_kept={num_kept} must lie in \[1, 10\]", subset_rate, 10, num_kept)


# ---- there and back


def same_coresets(found: Scores, want: Scores, importance: bool = True) -> None:
    assert found.score_N.tobytes() == want.score_N.tobytes()
    for rate in RATES:
        (a, _), (b, _) = make_coreset(found, rate), make_coreset(want, rate)
        np.testing.assert_array_equal(a.index_M, b.index_M)
        if importance:
            assert a.importance_M.tobytes() == b.importance_M.tobytes()


def test_csv_there_and_back(run, tmp_path, betons):
    (table,), _ = export(run, "csv")
    for key in (FIRST, SECOND):
        want = load_scores(run / "scores" / f"{key}.npz")
        for options in ({}, {"beton": betons["train"]}, {"run": run}):
            out = tmp_path / "new" / "file.npz"
            found = load_scores(import_scores(table, key=key, out=out, **options))
            same_coresets(found, want)
            assert found.key == key
            assert found.fingerprint == want.fingerprint
            np.testing.assert_array_equal(found.label_N, want.label_N)
            assert found.settings == want.settings | {"source": "imported", "file": "scores.csv"}


def test_what_a_sampler_needs_beside_the_score_comes_along(score_file, label_N):
    p_mean_N = np.random.default_rng(1).random(N, dtype=np.float32)
    want = replace(some_scores(label_N, "dual", {"score": "dual"}), extra={"p_mean": p_mean_N})
    save_scores(score_file, want)
    (table,), _ = export(score_file, "csv")
    found = load_scores(import_scores(table, key="dual"))
    assert found.extra["p_mean"].tobytes() == p_mean_N.tobytes()
    (table,), _ = export(score_file, "parquet")
    column = pyarrow.parquet.read_table(table)["extra_dual_p_mean"]
    assert column.to_numpy().tobytes() == p_mean_N.tobytes()


def test_official_there_and_back(run, tmp_path):
    source = run / "scores" / f"{FIRST}.npz"
    want = load_scores(source)
    paths, _ = export(source, "official", tmp_path)
    for options in ({}, {"run": run}):
        path = import_scores(paths[1], **options)
        assert path == (run / "scores" if options else tmp_path) / "win2_ep3.npz"
        found = load_scores(path)
        same_coresets(found, want)
        imported = {"source": "imported", "file": "score_win2_ep3.npy"}
        assert found.settings == {"score": "tdds", "preset": "official", "T": 3, "K": 2} | imported
    np.testing.assert_array_equal(found.label_N, want.label_N)
    again, _ = export(path, "official", tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in paths]


def test_coresets_are_made_of_imported_scores(run, tmp_path):
    rows = [f"{i},{(i * 7) % N}" for i in range(N)]
    table = write_rows(tmp_path / "mine.csv", "index,score", *rows)
    assert import_scores(table, run=run) == run / "scores" / "mine.npz"
    path, _ = select(run, 0.9, score="mine")
    assert load_coreset(path).index_M.tolist() == [i for i in range(N) if (i * 7) % N >= 108]


# ---- import, by hand


def test_literal_csv(tmp_path):
    table = tmp_path / "my scores.csv"
    table.write_bytes(
        b'\xef\xbb\xbfnote, index ,score,label\r\n"a,b",2,.5,1\r\n,0,-1e-3, 0\r\n\r\nx,1,7,2\r\n'
    )
    refused(r"key='my scores' must start with a letter or digit", import_scores, table)
    path = import_scores(table, key="mine")
    assert path == tmp_path / "mine.npz"
    found = load_scores(path)
    assert found.score_N.tolist() == np.array([-1e-3, 7, 0.5], dtype=np.float32).tolist()
    assert found.label_N.tolist() == [0, 2, 1]
    assert found.fingerprint == fingerprint(np.array([0, 2, 1]), 3)
    assert found.settings == {"score": "mine", "source": "imported", "file": "my scores.csv"}


@pytest.mark.parametrize("separator", [";", "\t"])
def test_columns_of_spreadsheets(tmp_path, separator):
    """Semicolons come with decimal commas; a path that begins like a formula has `./` before it."""
    rows = [["index", "score", "label"], ["1", "0,5" if separator == ";" else "0.5", "0"]]
    rows.append(["0", "-2", "1"])
    table = write_rows(tmp_path / "s.csv", *(separator.join(row) for row in rows))
    found = load_scores(import_scores(table))
    assert (found.score_N.tolist(), found.label_N.tolist()) == ([-2, 0.5], [1, 0])


def test_no_path_is_a_formula(tmp_path):
    path = ["=cmd|' /C calc'!A0/000.jpg", "-1/a.jpg", "+x", "@x", "plain/=a.jpg"]
    with (tmp_path / "x.csv").open("wb") as file:
        sample_table.write_csv({"index": np.arange(5), "path": path}, {}, file)
    rows = read_csv(tmp_path / "x.csv")
    assert [row["path"] for row in rows] == [*(f"./{name}" for name in path[:4]), path[4]]


def test_without_labels_they_stay_unknown(tmp_path):
    for rows in (["index,score", "0,1", "1,2"], ["index,score,label", "0,1,", "1,2,1"]):
        found = load_scores(import_scores(write_rows(tmp_path / "s.csv", *rows)))
        assert found.label_N[0] == UNKNOWN_LABEL
        assert found.fingerprint == Fingerprint(2, 0, labels_sha256="")


def test_paths_instead_of_indices(run, betons, tmp_path):
    path_N = read_manifest(betons["train"]).path
    order = np.random.default_rng(3).permutation(N)
    rows = [f"./{path_N[i]},{i}" for i in order]
    table = write_rows(tmp_path / "by_path.csv", "path,score", *rows)
    for options in ({"beton": betons["train"]}, {"run": run}):
        assert load_scores(import_scores(table, **options)).score_N.tolist() == list(range(N))
    refused(r"column path but none named index, and no manifest.*--beton", import_scores, table)
    write_rows(table, "path,score", "elsewhere/1.png,0", *(f"{path_N[i]},{i}" for i in range(1, N)))
    unknown = r"by_path\.csv, line 2: path='elsewhere/1\.png' is not in .*manifest\.json"
    refused(unknown, import_scores, table, run=run)
    write_rows(table, "index,path,score", *(f"{i},{path_N[i - i % 2]},{i}" for i in range(N)))
    refused(r"line 3: path=.*, but sample 1 is ", import_scores, table, run=run)


def test_literal_official_pair(tmp_path):
    """Scores 0.5, 0, 2, 0.25 of samples 0 to 3."""
    np.save(tmp_path / "data_mask_win10_ep30.npy", np.array([1, 3, 0, 2]))
    np.save(tmp_path / "score_win10_ep30.npy", np.array([0, 0.25, 0.5, 2]))
    found = load_scores(import_scores(tmp_path / "score_win10_ep30.npy"))
    assert found.score_N.tolist() == [0.5, 0, 2, 0.25]
    assert (found.key, found.settings["T"], found.settings["K"]) == ("win10_ep30", 30, 10)
    (tmp_path / "data_mask_win10_ep30.npy").rename(tmp_path / "order.npy")
    (tmp_path / "score_win10_ep30.npy").rename(tmp_path / "el2n.npy")
    nameless = r"el2n\.npy is not named score_.*give --data-mask"
    refused(nameless, import_scores, tmp_path / "el2n.npy")
    path = import_scores(tmp_path / "el2n.npy", data_mask=tmp_path / "order.npy")
    assert (path.name, load_scores(path).settings["score"]) == ("el2n.npz", "el2n")


# ---- what is refused


TWICE = "line 4: index=0 stands there a second time, and index 1 is missing"
CSV_ERRORS = [
    (["index,score"], r"holds no rows"),
    ([], r"holds no rows"),
    (["index,points", "0,1"], r"columns index, points, but none named score; name"),
    (["number,score", "0,1"], r"columns number, score; it needs index, or path"),
    (["index,score,score", "0,1,1"], r"column 'score' twice"),
    (["index,score", "0,1", "1"], r"line 3 has 1 values for 2 columns"),
    (["index,score", "0,1", "1,high"], r"line 3: score='high' must be a number"),
    (["index,score", "0,1", "1,"], r"line 3: score='' must be a number"),
    (["index,score", "0,1", "1,nan"], r"line 3: score=nan must be a finite float32 \(1 such"),
    (["index,score", "0,1", "1,1e39"], r"line 3: score=1e39 must be a finite float32"),
    (["index,score", "0,1", "1.0,1"], r"line 3: index='1\.0' must be a whole number"),
    (["index,score", "0,1", "9" * 20 + ",1"], r"line 3: index='9+' must be a whole number"),
    (["index,score", "1,1", "2,1"], r"line 3: index=2 is outside \[0, 2\)"),
    (["index,score", "-1,1", "0,1"], r"line 2: index=-1 is outside"),
    (["index,score", "0,1", "2,1", "0,3"], TWICE),
    (["index,score,label", "0,1,-2"], r"line 2: label=-2 must be 0 or more"),
    (["index,score,label", "0,1,cat"], r"line 2: label='cat' must be a whole number"),
]


@pytest.mark.parametrize(("rows", "message"), CSV_ERRORS)
def test_csv_that_is_no_table_of_scores(tmp_path, rows, message):
    refused(r"s\.csv.*" + message, import_scores, write_rows(tmp_path / "s.csv", *rows))
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "s.csv").write_bytes(b"index,score\n0,\xff\n")
    refused(r"s\.csv is not CSV text in UTF-8", import_scores, tmp_path / "s.csv")
    for name, message in (("no.csv", "does not exist"), ("s.parquet", "convert it to CSV")):
        refused(rf"{name}.*{message}", import_scores, tmp_path / name)


def test_scores_of_another_dataset(run, betons, tmp_path, label_N):
    table = write_rows(tmp_path / "s.csv", "index,score", "0,1", "1,2")
    refused(r"s\.csv has 2 rows, .*val.beton 50 samples", import_scores, table, beton=betons["val"])
    refused(r"s\.csv has 2 rows, .*train.beton 120 samples", import_scores, table, run=run)
    rows = [f"{i},{(label_N[i] + (i == 3)) % 10},1" for i in range(N)]
    write_rows(table, "index,label,score", *rows)
    another = r"line 5: label=\d, but sample 3 of .* has \d \(1 such rows\)"
    refused(another, import_scores, table, run=run)
    another = r"raw\.beton belongs to another dataset"
    refused(another, import_scores, table, run=run, beton=betons["raw"])


def test_labels_of_a_run_whose_images_are_elsewhere(run, tmp_path, label_N):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = "/nowhere/train.beton"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    table = write_rows(tmp_path / "s.csv", "index,score", *(f"{i},{i}" for i in range(N)))
    np.testing.assert_array_equal(load_scores(import_scores(table, run=run)).label_N, label_N)
    for path in (run / "scores").iterdir():
        path.unlink()
    nothing = r"holds no scores, and its data\.train=/nowhere.*give --beton FILE"
    refused(nothing, import_scores, table, run=run)


def test_names_that_mean_something_else(run, tmp_path):
    table = write_rows(tmp_path / "s.csv", "index,score", *(f"{i},{i}" for i in range(N)))
    for key in ("tdds", "random", "ccs", "label", "keep"):
        refused(rf"key='{key}' has a meaning of its own", import_scores, table, key=key, run=run)
    for key in ("../x", "a/b", ".hidden", "a b"):
        refused("it names a file", import_scores, table, key=key, run=run)
    ours = rf"{FIRST}\.npz holds scores that were computed here; choose another --key"
    refused(ours, import_scores, table, key=FIRST, run=run)
    # once more is fine
    assert import_scores(table, key="mine", run=run) == import_scores(table, key="mine", run=run)


OFFICIAL_ERRORS = [
    ([0, 1, 1], [1, 2, 3.0], r"data_mask_a\.npy does not hold every index 0\.\.2 once"),
    ([0, 1, 3], [1, 2, 3.0], r"data_mask_a\.npy does not hold every index 0\.\.2 once"),
    ([-1, 0, 1], [1, 2, 3.0], r"data_mask_a\.npy does not hold every index"),
    ([2, 0, 1], [1, 3, 2.0], r"score_a\.npy: value 2 is 2 after 3, but the authors' scores ascend"),
    ([2, 0, 1], [1, 2, np.nan], r"score_a\.npy has nan for index 1"),
    ([2, 0, 1], [1, 2, 1e39], r"score_a\.npy has inf for index 1"),
    ([2, 0], [1, 2, 3.0], r"data_mask_a\.npy is int64 \[2\], expected integers \[3\]"),
    ([2.0, 0.0, 1.0], [1, 2, 3.0], r"data_mask_a\.npy is float64 \[3\], expected integers"),
    ([2, 0, 1], [1, 2, 3], r"score_a\.npy is int64 \[3\], expected floating-point scores"),
    ([2, 0, 1], [[1.0, 2, 3]], r"score_a\.npy is float64 \[1, 3\], expected floating-point scores"),
    ([], np.zeros(0), r"score_a\.npy is float64 \[0\], expected floating-point scores"),
    ([2, 0, 1], [None, 2, 3], r"score_a\.npy cannot be read"),
]


@pytest.mark.parametrize(("mask", "score", "message"), OFFICIAL_ERRORS)
def test_files_that_are_no_pair(tmp_path, mask, score, message):
    np.save(tmp_path / "data_mask_a.npy", np.array(mask))
    np.save(tmp_path / "score_a.npy", np.array(score))
    refused(message, import_scores, tmp_path / "score_a.npy")


def test_a_pair_of_another_size_or_half_of_one(run, tmp_path):
    np.save(tmp_path / "score_a.npy", np.arange(3.0))
    refused(r"data_mask_a\.npy cannot be read", import_scores, tmp_path / "score_a.npy")
    np.save(tmp_path / "data_mask_a.npy", np.arange(3))
    of_another_size = r"score_a\.npy has 3 values, .*train\.beton 120 samples"
    refused(of_another_size, import_scores, tmp_path / "score_a.npy", run=run)
    mask = tmp_path / "data_mask_a.npy"
    refused(r"data_mask_a\.npy is not named score_", import_scores, mask)
    table = write_rows(tmp_path / "s.csv", "index,score", "0,1")
    refused(r"data_mask=.* but .*s\.csv is a CSV file", import_scores, table, data_mask=mask)


def test_exports_that_do_not_fit(run, score_file, betons, tmp_path, label_N):
    coreset = next((run / "coresets").glob("*.npz"))
    half, two_rates = {"pruning_rates": [0.5]}, {"pruning_rates": [0.5, 0.8]}
    two_scores = rf"holds 2 scores \({SECOND}, {FIRST}\), and paths takes one"
    has_a_rate = r"is a coreset, made at pruning_rate=0\.5; leave pruning rates out"
    one_rate = r"pruning_rates=\[0\.5, 0\.8\]: paths .* needs exactly one"
    of_no_run = r"paths .* not known: .* does not lie in a run; give --beton FILE"
    cases = [
        (score_file, "xml", {}, r"kind='xml' is unknown; use one of parquet, csv"),
        (score_file, "csv", {"pruning_rates": [1.0]}, r"pruning_rate=1\.0 must lie in \[0, 1\)"),
        (run, "paths", half, two_scores),
        (run, "official", {}, r"holds 2 scores .* official takes one"),
        (score_file, "torch-subset", {}, r"pruning_rates=\[\]: torch-subset .* needs exactly one"),
        (score_file, "paths", two_rates, one_rate),
        (score_file, "paths", half, of_no_run),
        (coreset, "paths", half, has_a_rate),
        (score_file, "csv", {"beton": betons["val"]}, r"belongs to another dataset"),
        (coreset, "paths", {"beton": betons["raw"]}, r"belongs to another dataset"),
        (score_file.with_name("no.npz"), "csv", {}, r"no\.npz does not exist"),
        (score_file.parent, "csv", {}, r"is not a run directory"),
        (score_file, "official", {"out": score_file}, r"is a file, and official is two of them"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for source, kind, options, message in cases:
        refused(message, export, source, kind, **options)
    assert sorted(tmp_path.rglob("*")) == before
    plain = tmp_path / "plain.beton"
    plain.write_bytes(betons["train"].read_bytes())
    refused(r"plain\.manifest\.json does not exist", export, coreset, "paths", beton=plain)
    scores = some_scores(label_N)
    for value, message in (
        (2, r"all 120 values are 2"),
        (np.nan, r"120 values that are not finite"),
    ):
        save_scores(score_file, replace(scores, score_N=np.full(N, value)))
        refused(message, export, score_file, "official")


def test_a_column_is_never_lost_to_another(run, label_N):
    save_scores(run / "scores" / "label.npz", some_scores(label_N, "label", {"score": "label"}))
    refused(r"score 'label' wants a column 'label'.*under another key", export, run, "csv")


def test_a_folder_without_scores(run):
    for path in (run / "scores").iterdir():
        path.unlink()
    refused(r"holds no scores; run `tdds collect`", export, run, "csv")


def test_a_column_of_an_exported_table_under_a_name_of_its_own(run, tmp_path):
    """The table of a run goes back into it beside what it came from."""
    (table,), _ = export(run, "csv", tmp_path / "table.csv")
    key = next((run / "scores").glob("*.npz")).stem
    path = import_scores(table, key="mine", column=key, run=run)
    assert path == run / "scores" / "mine.npz"
    original = load_scores(run / "scores" / f"{key}.npz")
    assert load_scores(path).score_N.tobytes() == original.score_N.tobytes()
    missing = "none named other; name the one with the scores by --column"
    refused(missing, import_scores, table, key="mine", column="other", run=run)
