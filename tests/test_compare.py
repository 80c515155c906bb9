"""Agreement of scores and what coresets are made of: arithmetic against scipy and loops, text and CSV on small runs."""

import csv
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from tdds_dist.agreement import keep_rates, noise_kept, overlap, spearman
from tdds_dist.artifacts import UNKNOWN_LABEL, Scores, fingerprint, save_scores
from tdds_dist.beton import HEADER, VERSION, Manifest, manifest_path, write_manifest
from tdds_dist.compare import AT_RANDOM, COLUMNS, compare
from tdds_dist.config import Config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir
from tdds_dist.select import choose

NUM_SAMPLES, NUM_CLASSES = 90, 4
LABEL_N = np.repeat([0, 1, 2, 3], [60, 20, 9, 1])  # imbalanced; class 3 has one sample
RATES = (0.3, 0.5, 0.9)
T3, T2 = "tdds_official_T3_K2_beta0.9", "tdds_official_T2_K2_beta0.9"
Row = dict[str, str]


def start(path: Path, train: Path | str = "", seed: int = 0, windows: tuple[int, ...] = (3, 2)) -> RunDir:
    run = RunDir(path)
    config = Config.model_validate({
        "run": {"name": "tiny", "seed": seed}, "model": {"name": "resnet18"},
        "data": {"train": str(train), "val": "val.beton", "num_classes": NUM_CLASSES, "image_size": 32, "crop": "pad",
                 "mean": (1.0, 1.0, 1.0), "std": (1.0, 1.0, 1.0)},
        "train": {"epochs": 3, "global_batch_size": 8, "lr": 0.1},
        "score": {"windows": tuple({"T": T, "K": 2, "pruning_rates": (0.1 * T,)} for T in windows)},
    })
    run.start(to_dict(config), {"stage": "collect"}, world_size=2, device="cpu")
    return run


def scores_of(key: str, seed: int = 0, score_N: np.ndarray | None = None, label_N: np.ndarray = LABEL_N) -> Scores:
    """Draws that agree in part between keys and between seeds; `forgetting` is full of ties."""
    if score_N is None:
        score_N = np.random.default_rng([seed, len(key)]).normal(size=len(label_N)) + np.linspace(0, 2, len(label_N))
        score_N = np.round(score_N) if key == "forgetting" else score_N
    return Scores(key, score_N.astype(np.float32), label_N, fingerprint(label_N, NUM_CLASSES), {"score": key.split("_")[0]})


def add(run: RunDir, *keys: str, seed: int = 0) -> RunDir:
    for key in keys:
        save_scores(run.scores / f"{key}.npz", scores_of(key, seed))
    return run


def rows_of(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def values(rows: list[Row], **where: object) -> list[float]:
    return [float(row["value"]) for row in rows if all(row[key] == str(value) for key, value in where.items())]


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Cells by row name of the first table whose heading starts so; a name may hold single spaces."""
    lines = text[text.index(heading):].split("\n\n")[0].splitlines()
    rule = next(position for position, line in enumerate(lines) if line.startswith("---"))
    width = len(lines[rule].split(" ")[0])
    return {line[:width].strip(): line[width:].split() for line in lines[rule + 1:]}


def write_noise(folder: Path, label_N: np.ndarray, true_label_N: np.ndarray | None, corruption: list[str] | None) -> Path:
    """A header with its manifest: all of a .beton that the stage looks at."""
    path = folder / "train.beton"
    header = np.zeros(1, HEADER)
    header["version"], header["num_samples"] = VERSION, len(label_N)
    header.tofile(path)
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    write_manifest(manifest_path(path), Manifest(
        "synthetic", "train", len(label_N), NUM_CLASSES, names, [f"{number}.png" for number in range(len(label_N))], label_N,
        path.stat().st_size, fingerprint(label_N, NUM_CLASSES).labels_sha256, {}, (32, 32), true_label_N, corruption))
    return path


# ---- arithmetic


def loop_spearman(a: list[float], b: list[float]) -> float:
    """Average ranks by counting, then Pearson."""
    def ranks(values: list[float]) -> list[float]:
        found = []
        for value in values:
            lower = sum(1 for other in values if other < value)
            equal = sum(1 for other in values if other == value)
            found.append(lower + (equal + 1) / 2)
        return found

    rank_a, rank_b = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    product = square_a = square_b = 0.0
    for x, y in zip(rank_a, rank_b, strict=True):
        product += (x - mean) * (y - mean)
        square_a += (x - mean) ** 2
        square_b += (y - mean) ** 2
    return product / math.sqrt(square_a * square_b)


@pytest.mark.parametrize("levels", [2, 3, 10, 10**6])
@pytest.mark.parametrize("num", [2, 3, 40, 257])
def test_spearman_is_that_of_scipy_and_of_a_loop(num: int, levels: int) -> None:
    rng = np.random.default_rng([num, levels])
    a_N = rng.integers(0, levels, num).astype(np.float32)
    b_N = a_N + rng.integers(0, levels, num)
    a_N[0], b_N[-1] = -1, -2  # so that neither is constant
    assert spearman(a_N, b_N) == pytest.approx(spearmanr(a_N, b_N).statistic, abs=1e-12)
    assert spearman(a_N, b_N) == pytest.approx(loop_spearman(a_N.tolist(), b_N.tolist()), abs=1e-12)
    assert spearman(b_N, a_N) == spearman(a_N, b_N)


def test_spearman_looks_at_order_alone() -> None:
    a_N = np.array([0.0, -0.0, 1e-38, 1e38, np.inf, -np.inf], np.float32)
    assert spearman(a_N, np.array([1, 1, 2, 3, 4, 0])) == pytest.approx(1)
    assert spearman(a_N, -a_N) == pytest.approx(-1)
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_without_an_answer() -> None:
    assert math.isnan(spearman(np.zeros(5), np.arange(5)))
    assert math.isnan(spearman(np.arange(1), np.arange(1)))
    assert math.isnan(spearman(np.empty(0), np.empty(0)))
    assert math.isnan(spearman(np.array([1, np.nan, 2]), np.arange(3)))
    with pytest.raises(InputError, match=r"shapes \(3,\) and \(4,\)"):
        spearman(np.arange(3), np.arange(4))


def test_overlap_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    for size_a, size_b in [(7, 7), (1, 7), (12, 3), (20, 20)]:
        index_a, index_b = (np.sort(rng.permutation(20)[:size]) for size in (size_a, size_b))
        common = sum(1 for index in index_a if index in index_b.tolist())
        assert overlap(index_a, index_b) == common / max(size_a, size_b)
    assert overlap(np.array([1, 2]), np.array([3, 4])) == 0
    assert math.isnan(overlap(np.empty(0, np.int64), np.empty(0, np.int64)))


def test_keep_rates_by_hand() -> None:
    label_N = np.array([0, 0, 0, 0, 1, 3, 3, UNKNOWN_LABEL])  # class 1 has one sample, class 2 none
    np.testing.assert_array_equal(keep_rates(np.array([0, 2, 3, 5, 7]), label_N, 4), [0.75, 0, np.nan, 0.5])
    np.testing.assert_array_equal(keep_rates(np.array([4]), label_N, 4), [0, 1, np.nan, 0])
    np.testing.assert_array_equal(keep_rates(np.arange(8), label_N, 4), [1, 1, np.nan, 1])
    with pytest.raises(InputError, match=r"label 3 is outside \[0, 3\)"):
        keep_rates(np.array([0]), label_N, 3)


def test_noise_kept_by_hand() -> None:
    noisy_N = np.array([True, False, True, True, False, False, True, False])
    assert noise_kept(np.array([0, 1, 2, 5, 7]), noisy_N) == (2 / 4, 2 / 5)
    assert noise_kept(np.array([1]), noisy_N) == (0, 0)
    kept, share = noise_kept(np.array([1, 2]), np.zeros(8, bool))
    assert math.isnan(kept)
    assert share == 0
    assert all(map(math.isnan, noise_kept(np.empty(0, np.int64), np.zeros(8, bool))))


# ---- one run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return add(start(tmp_path / "one"), "random", "forgetting", "moderate", T2, T3, "my_own")


def test_pairs_of_scores_in_csv_are_those_of_the_pieces(run: RunDir) -> None:
    compare([run.path], pruning_rates=RATES)
    rows = rows_of(run.path / "compare.csv")
    assert tuple(rows[0]) == COLUMNS
    keys = [T3, T2, "random", "forgetting", "moderate", "my_own"]
    pairs = [*combinations(keys, 2)]
    assert [(row["score_a"], row["score_b"]) for row in rows if row["table"] == "spearman"] == pairs
    for a, b in pairs:
        left, right = scores_of(a), scores_of(b)
        where = {"run_a": "one", "score_a": a, "run_b": "one", "score_b": b}
        assert values(rows, table="spearman", **where) == [pytest.approx(spearmanr(left.score_N, right.score_N).statistic)]
        for rate in RATES:  # forgetting has ties at every cut: the draw must be that of `choose`
            expected = overlap(choose(left, rate), choose(right, rate))
            assert values(rows, table="overlap", pruning_rate=rate, **where) == [pytest.approx(expected)]


def test_classes_in_csv_are_those_of_the_pieces(run: RunDir) -> None:
    compare([run.path], pruning_rates=RATES)
    rows = rows_of(run.path / "compare.csv")
    for key in (T3, "random", "forgetting", "moderate"):
        for rate in RATES:
            expected = keep_rates(choose(scores_of(key), rate), LABEL_N, NUM_CLASSES)
            assert values(rows, table="keep_rate", run_a="one", score_a=key, pruning_rate=rate) == pytest.approx(expected)
    where = {"table": "keep_rate", "score_a": "random", "pruning_rate": 0.5}
    assert [row["class"] for row in rows if all(row[name] == str(value) for name, value in where.items())] == list("0123")
    assert len(rows) == 15 * (1 + 3) + 6 * 3 * NUM_CLASSES


def test_text_says_what_the_csv_says(run: RunDir, tmp_path: Path) -> None:
    text = compare([run.path], pruning_rates=RATES, out=tmp_path / "new" / "numbers.csv")
    rows = rows_of(tmp_path / "new" / "numbers.csv")
    assert not (run.path / "compare.csv").exists()
    assert text.splitlines()[:2] == ["90 samples, 4 classes", "A  one  resnet18, seed 0, world size 2, 6 scores"]
    assert f"tdds_T3 = {T3}\ntdds_T2 = {T2}\n" in text
    assert f"wrote {tmp_path / 'new' / 'numbers.csv'} ({len(rows)} rows)" in text
    full = {"tdds_T3": T3, "tdds_T2": T2}

    matrix = table(text, "A: Spearman")
    assert [*matrix] == ["1 tdds_T3", "2 tdds_T2", "3 random", "4 forgetting", "5 moderate", "6 my_own"]
    names = [name.split()[1] for name in matrix]
    for i, j in combinations(range(6), 2):
        pair = {"score_a": full.get(names[i], names[i]), "score_b": full.get(names[j], names[j])}
        cells = [[*matrix.values()][i][j], [*matrix.values()][j][i]]
        assert cells == [f"{values(rows, table='spearman', **pair)[0]:.2f}"] * 2
    assert [cells[i] for i, cells in enumerate(matrix.values())] == ["1.00"] * 6

    common = table(text, "A: percent of the coreset in common with tdds_T3")
    assert common.pop(AT_RANDOM) == ["70.0", "50.0", "10.0"]
    assert [*common] == names[1:]
    for name, cells in common.items():
        shares = values(rows, table="overlap", score_a=T3, score_b=full.get(name, name))
        assert cells == [f"{100 * share:.1f}" for share in shares]

    classes = table(text, "A: percent of a class")
    assert [*classes] == names
    for name, cells in classes.items():
        assert len(cells) == 3 * 4
        for position, rate in enumerate(RATES):
            shares = values(rows, table="keep_rate", score_a=full.get(name, name), pruning_rate=rate)
            found = cells[4 * position:4 * position + 4]
            assert found[:3] == [f"{100 * function(shares):.0f}" for function in (min, np.median, max)]
            assert found[3] == str(shares.count(0))


def test_first_window_of_the_config_is_the_one_compared_with(tmp_path: Path) -> None:
    run = add(start(tmp_path / "turned", windows=(2, 3)), T2, T3, "random")
    assert "in common with tdds_T2," in compare([run.path])
    run = add(start(tmp_path / "foreign"), "tdds_official_T9_K2_beta0.9", "el2n")
    run.config_file.write_text("version: of another time\n")
    assert "in common with tdds," in compare([run.path])
    run = add(start(tmp_path / "none"), "el2n", "aum")
    assert "in common with el2n," in compare([run.path])


def test_one_score_and_a_rate_of_zero(tmp_path: Path) -> None:
    run = add(start(tmp_path / "lone"), "el2n")
    text = compare([run.path], pruning_rates=(0.5, 0, 0.5))
    assert "A: one score only (el2n)" in text
    assert table(text, "A: percent of a class")["el2n"][:4] == ["100", "100", "100", "0"]
    assert {row["pruning_rate"] for row in rows_of(run.path / "compare.csv")} == {"0", "0.5"}


def test_a_class_that_keeps_nothing_is_counted(tmp_path: Path) -> None:
    run = start(tmp_path / "one")
    label_N = np.repeat([0, 1, 2], [996, 3, 1])
    save_scores(run.scores / "el2n.npz", scores_of("el2n", 0, -np.arange(1000.0), label_N))  # keeps the first
    text = compare([run.path], pruning_rates=(0.001, 0.003, 0.5))
    # of 1000 the last 1, 3 and 500 are removed: 996 3 0, 996 1 0 and 500 0 0 are left of 996 3 1; class 3 does not exist
    assert table(text, "A: percent of a class")["el2n"] == ["0", "100", "100", "1", "0", "33", "100", "1", "0", "0", "50", "2"]
    save_scores(run.scores / "el2n.npz", scores_of("el2n", 0, np.arange(1000.0), label_N))  # keeps the last
    assert table(compare([run.path], pruning_rates=(0.001, 0.993)), "A: percent of a class")["el2n"] == [
        ">99", "100", "100", "0", "<1", "100", "100", "0"]


def test_constant_scores_have_no_correlation(tmp_path: Path) -> None:
    run = add(start(tmp_path / "one"), T3, "el2n")
    save_scores(run.scores / "aum.npz", scores_of("aum", 0, np.zeros(NUM_SAMPLES)))
    text = compare([run.path])
    assert table(text, "A: Spearman")["3 aum"] == ["-", "-", "1.00"]
    assert all(map(math.isnan, values(rows_of(run.path / "compare.csv"), table="spearman", score_b="aum")))


def test_rows_fit_the_terminal_and_align(tmp_path: Path) -> None:
    keys = [f"tdds_official_T{T}_K10_beta0.9{ablation}" for T in (30, 60, 90) for ablation in ("", "_entropy", "_el2n")]
    others = ["random", "entropy", "forgetting", "el2n", "aum", "moderate", "dyn_unc", "dual", *(f"own{i}" for i in range(9))]
    runs = [add(start(tmp_path / f"cifar100_resnet18_seed{seed}"), *keys, *others, seed=seed).path for seed in range(2)]
    text = compare(runs, pruning_rates=[0.1 * tenth for tenth in range(10)], out=tmp_path / "out.csv")
    assert "note:" not in text
    lines = text.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 120
    for block in text.split("\n\n"):
        rules = [line for line in block.splitlines() if line.startswith("---")]
        assert len(rules) <= 1
        if rules:
            body = block.splitlines()[block.splitlines().index(rules[0]) + 1:]
            assert {len(line) for line in body} == {len(rules[0])}


# ---- several runs


def test_between_two_runs(tmp_path: Path) -> None:
    runs = [add(start(tmp_path / "a"), T3, "forgetting", "el2n"),
            add(start(tmp_path / "b", seed=1), T3, "forgetting", "aum", seed=1)]
    text = compare([run.path for run in runs], pruning_rates=RATES)
    rows = rows_of(runs[0].path / "compare.csv")
    assert not (runs[1].path / "compare.csv").exists()
    shown = table(text, "Between runs: agreement of the same score\n")
    assert [*shown] == ["tdds", "forgetting"]
    for name, key in (("tdds", T3), ("forgetting", "forgetting")):
        a, b = scores_of(key), scores_of(key, 1)
        pair = {"run_a": "a", "run_b": "b", "score_a": key, "score_b": key}
        correlation = spearmanr(a.score_N, b.score_N).statistic
        common = [overlap(choose(a, rate), choose(b, rate)) for rate in RATES]
        assert values(rows, table="spearman", **pair) == [pytest.approx(correlation)]
        assert values(rows, table="overlap", **pair) == pytest.approx(common)
        assert values(rows, table="spearman_mean", score_a=key) == [pytest.approx(correlation)]
        assert shown[name] == [f"{correlation:.3f}", *(f"{100 * share:.1f}" for share in common)]
    assert text.index("A: Spearman") < text.index("B: Spearman") < text.index("Between runs")
    assert "B  b  resnet18, seed 1," in text


def test_between_three_runs_each_pair_and_the_mean(tmp_path: Path) -> None:
    runs = [add(start(tmp_path / name), T3, *(["el2n"] if seed else ["aum"]), seed=seed).path
            for seed, name in enumerate("abc")]
    text = compare(runs, pruning_rates=RATES)
    rows = rows_of(runs[0] / "compare.csv")
    lines = text[text.index("Between runs"):].split("\n\n")[0].splitlines()[4:]
    assert [line.split()[0] for line in lines] == ["tdds", "A-B", "A-C", "B-C", "el2n", "B-C"]
    numbers = np.array([line.split()[1:] for line in lines], dtype=float)
    assert numbers[0] == pytest.approx(numbers[1:4].mean(axis=0), abs=0.06)
    for column, name in enumerate(("spearman", "overlap", "overlap", "overlap")):
        where = {"pruning_rate": RATES[column - 1]} if column else {}
        by_pair = [values(rows, table=name, run_a=a, score_a=T3, run_b=b, score_b=T3, **where)[0]
                   for a, b in combinations("abc", 2)]
        assert values(rows, table=f"{name}_mean", score_a=T3, **where) == [pytest.approx(np.mean(by_pair))]
        assert numbers[1:4, column] == pytest.approx([value * (100 if column else 1) for value in by_pair], abs=0.051)
    assert values(rows, table="spearman_mean", score_a="aum") == []


def test_between_many_runs_the_extremes(tmp_path: Path) -> None:
    runs = [add(start(tmp_path / f"r{seed}"), T3, seed=seed).path for seed in range(5)]
    shown = table(text := compare(runs, pruning_rates=(0.5,)), "Between runs")
    rows = rows_of(runs[0] / "compare.csv")
    for name, function in (("tdds", np.mean), ("smallest", np.min), ("largest", np.max)):
        expected = function(values(rows, table="spearman")), 100 * function(values(rows, table="overlap"))
        assert shown[name] == [f"{expected[0]:.3f}", f"{expected[1]:.1f}"]
    assert len(values(rows, table="overlap")) == 10
    assert "E: one score only" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [add(start(tmp_path / folder / "run"), folder).path for folder in ("el2n", "aum")]
    text = compare(runs, out=tmp_path / "out.csv")
    assert f"A  {runs[0]}  resnet18" in text
    assert "Between runs: no score is present in two of them" in text
    assert {row["run_a"] for row in rows_of(tmp_path / "out.csv")} == {str(run) for run in runs}


# ---- noise


@pytest.fixture
def noisy(tmp_path: Path) -> RunDir:
    """Ten samples; `el2n` keeps the last of them, `aum` the first. Wrong labels 0 5 8 9, corrupted 1 (fog) 7 8 (occlusion)."""
    label_N = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    true_label_N = label_N.copy()
    true_label_N[[0, 5, 8, 9]] = [1, 2, 3, 0]
    corruption = ["", "fog", "", "", "", "", "", "occlusion", "occlusion", ""]
    run = start(tmp_path / "noisy", write_noise(tmp_path, label_N, true_label_N, corruption))
    save_scores(run.scores / "el2n.npz", scores_of("el2n", 0, np.arange(10.0), label_N))
    save_scores(run.scores / "aum.npz", scores_of("aum", 0, -np.arange(10.0), label_N))
    return run


def test_noise_by_hand(noisy: RunDir) -> None:
    text = compare([noisy.path], pruning_rates=(0.5, 0.7))
    wrong = table(text, "A: samples with a wrong label (4 of 10); kept: percent of them; share: percent of the coreset")
    assert wrong == {"el2n": ["75.0", "60.0", "50.0", "66.7"],  # keeps 5-9, then 7-9
                     "aum": ["25.0", "20.0", "25.0", "33.3"],  # keeps 0-4, then 0-2
                     AT_RANDOM: ["50.0", "40.0", "30.0", "40.0"]}
    corrupted = table(text, "A: corrupted images (3 of 10)")
    assert corrupted == {"el2n": ["66.7", "40.0", "66.7", "66.7"], "aum": ["33.3", "20.0", "33.3", "33.3"],
                         AT_RANDOM: ["50.0", "30.0", "30.0", "30.0"]}
    rows = rows_of(noisy.path / "compare.csv")
    assert values(rows, table="noisy_kept", score_a="el2n") == [0.75, 0.5]
    assert values(rows, table="coreset_noisy", score_a="el2n") == pytest.approx([0.6, 2 / 3])
    assert values(rows, table="noisy_kept", score_a=AT_RANDOM) == [0.5, 0.3]
    for score, kind, kept, share in [("el2n", "", [2 / 3, 2 / 3], [0.4, 2 / 3]), ("el2n", "fog", [0, 0], [0, 0]),
                                     ("el2n", "occlusion", [1, 1], [0.4, 2 / 3]), ("aum", "fog", [1, 1], [0.2, 1 / 3]),
                                     ("aum", "occlusion", [0, 0], [0, 0]), (AT_RANDOM, "fog", [0.5, 0.3], [0.1, 0.1])]:
        where = {"score_a": score, "class": kind}
        assert values(rows, table="corrupted_kept", **where) == pytest.approx(kept)
        assert values(rows, table="coreset_corrupted", **where) == pytest.approx(share)


@pytest.mark.parametrize(("true_label", "corruption"), [(False, None), (True, ["" for _ in LABEL_N])])
def test_clean_data_need_no_table(tmp_path: Path, true_label: bool, corruption: list[str] | None) -> None:
    beton = write_noise(tmp_path, LABEL_N, LABEL_N if true_label else None, corruption)
    text = compare([add(start(tmp_path / "run", beton), "el2n").path])
    assert "wrong label" not in text
    assert "corrupted" not in text
    assert "note:" not in text


def test_noise_that_cannot_be_known_is_said_once(tmp_path: Path) -> None:
    runs = [add(start(tmp_path / name, tmp_path / "train.beton"), "el2n").path for name in ("a", "b")]
    assert f"note: run {runs[0]}: {tmp_path / 'train.beton'} is no longer there" in compare(runs)
    write_noise(tmp_path, np.sort(LABEL_N % 3), LABEL_N, None)
    text = compare(runs)
    assert "train.manifest.json belongs to another dataset" in text
    assert "wrong label" not in text
    manifest_path(tmp_path / "train.beton").write_text("{")
    assert compare(runs).count("is not a whole manifest") == 1


# ---- what cannot be compared


def test_damaged_and_foreign_files_are_said_at_the_end(run: RunDir) -> None:
    (run.scores / "broken.npz").write_bytes(b"PK no")
    save_scores(run.scores / "nan.npz", scores_of("nan", 0, np.where(np.arange(NUM_SAMPLES) < 2, np.nan, 1)))
    save_scores(run.scores / "z_other.npz", scores_of("el2n", 0, None, LABEL_N[::-1].copy()))
    end = compare([run.path]).split("\n\n")[-1].splitlines()
    assert end[0].startswith("wrote ")
    assert end[1].startswith(f"note: {run.scores / 'broken.npz'} is not a scores file of tdds")
    assert end[2] == f"note: {run.scores / 'nan.npz'} holds 2 values that are not finite; compute it again with `tdds score`"
    assert end[3].startswith(f"note: {run.scores / 'z_other.npz'} belongs to another dataset")
    assert len(end) == 4
    known = {row[name] for row in rows_of(run.path / "compare.csv") for name in ("score_a", "score_b")} - {""}
    assert known == {T3, T2, "random", "forgetting", "moderate", "my_own"}


def test_labels_come_from_whichever_file_has_them(tmp_path: Path) -> None:
    run, unknown_N = start(tmp_path / "run"), np.full(NUM_SAMPLES, UNKNOWN_LABEL)
    save_scores(run.scores / "a.npz", scores_of("a", 0, None, unknown_N))
    text = compare([run.path])
    assert "no labels are known" in text
    assert "percent of a class" not in text
    add(run, "el2n")
    assert [*table(compare([run.path]), "A: percent of a class")] == ["el2n", "a"]


def test_refused(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(InputError, match="0 runs"):
        compare([])
    with pytest.raises(InputError, match="0 pruning rates"):
        compare([run.path], pruning_rates=())
    with pytest.raises(InputError, match="nowhere does not exist"):
        compare([run.path, tmp_path / "nowhere"])
    with pytest.raises(InputError, match="is given twice"):
        compare([run.path, run.path / ".." / "one"])
    with pytest.raises(InputError, match=r"pruning_rate=1\.0 must lie in \[0, 1\)"):
        compare([run.path], pruning_rates=(0.5, 1.0))
    with pytest.raises(InputError, match=r"pruning_rate=0\.999 keeps none of 90 samples"):
        compare([run.path], pruning_rates=(0.999,))
    with pytest.raises(InputError, match="cannot write"):
        compare([run.path], out=run.scores)
    empty = start(tmp_path / "empty")
    with pytest.raises(InputError, match=r"empty/scores holds no score; run `tdds collect`, or `tdds score"):
        compare([run.path, empty.path])
    empty.scores.mkdir()
    (empty.scores / "el2n.npz").write_text("nothing")
    with pytest.raises(InputError, match=r"no score that can be used \(.*el2n.npz is not a scores file"):
        compare([empty.path])
    other = start(tmp_path / "other")
    save_scores(other.scores / "el2n.npz", scores_of("el2n", 0, None, LABEL_N[::-1].copy()))
    with pytest.raises(InputError, match=r"run .*other belongs to another dataset"):
        compare([run.path, other.path])
    assert not (run.path / "compare.csv").exists()


def test_distinct_scores_are_sorted_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """`choose` sorts anew for every rate: only another sampler and ties at the cut are worth that."""
    asked = []

    def spy(scores: Scores, rate: float) -> np.ndarray:
        asked.append((scores.key, rate))
        return choose(scores, rate)

    monkeypatch.setattr("tdds_dist.select.choose", spy)
    compare([run.path], pruning_rates=RATES)
    assert asked == [(key, rate) for key in ("forgetting", "moderate") for rate in RATES]
