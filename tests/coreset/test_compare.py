"""Agreement of scores and what coresets are made of: arithmetic against scipy and loops, text and
CSV on small runs."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from tdds_dist.coreset.agreement import (
    centred_ranks,
    keep_rates,
    noise_kept,
    rank,
    rank_correlation,
)
from tdds_dist.coreset.compare import AT_RANDOM, COLUMNS, compare
from tdds_dist.coreset.select import choose
from tdds_dist.data.manifest import manifest_path
from tdds_dist.runs.artifacts import UNKNOWN_LABEL, Scores
from tdds_dist.runs.directory import RunDir
from tests import make
from tests.make import NUM_CLASSES, csv_rows, refused, save, write_header

NUM_SAMPLES = 90
LABEL_N = np.repeat([0, 1, 2, 3], [60, 20, 9, 1])  # imbalanced; class 3 has one sample
RATES = (0.3, 0.5, 0.9)
T3, T2 = make.TDDS, make.SHORT
Row = dict[str, str]


def start(
    path: Path, train: Path | str = "", seed: int = 0, windows: tuple[int, ...] = (3, 2)
) -> RunDir:
    return make.start(
        path,
        train,
        run={"name": "tiny", "seed": seed},
        score={"windows": [{"T": T, "K": 2, "pruning_rates": [0.1 * T]} for T in windows]},
    )


def scores_of(
    key: str, seed: int = 0, score_N: np.ndarray | None = None, label_N: np.ndarray = LABEL_N
) -> Scores:
    """Draws that agree in part between keys and between seeds; `forgetting` is full of ties."""
    if score_N is None:
        score_N = np.random.default_rng([seed, len(key)]).normal(size=len(label_N)) + np.linspace(
            0, 2, len(label_N)
        )
        score_N = np.round(score_N) if key == "forgetting" else score_N
    return make.scores(key, score_N, label_N)


def add(run: RunDir, *keys: str, seed: int = 0) -> RunDir:
    save(run.scores, *(scores_of(key, seed) for key in keys))
    return run


def values(rows: list[Row], **where: object) -> list[float]:
    return [
        float(row["value"])
        for row in rows
        if all(row[key] == str(value) for key, value in where.items())
    ]


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Cells by row name of the first table whose heading starts so; a name may hold single
    spaces."""
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()
    rule = next(position for position, line in enumerate(lines) if line.startswith("---"))
    width = len(lines[rule].split(" ")[0])
    return {line[:width].strip(): line[width:].split() for line in lines[rule + 1 :]}


# ---- arithmetic


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    return rank_correlation(
        *(centred_ranks(score_N, np.argsort(score_N)) for score_N in (a_N, b_N))
    )


@pytest.mark.parametrize("levels", [2, 3, 10, 10**6])
@pytest.mark.parametrize("num", [2, 3, 40, 257])
def test_spearman_is_that_of_scipy(num, levels):
    rng = np.random.default_rng([num, levels])
    a_N = rng.integers(0, levels, num).astype(np.float32)
    b_N = a_N + rng.integers(0, levels, num)
    a_N[0], b_N[-1] = -1, -2  # so that neither is constant
    assert spearman(a_N, b_N) == pytest.approx(spearmanr(a_N, b_N).statistic, abs=1e-12)
    assert spearman(b_N, a_N) == spearman(a_N, b_N)


def test_spearman_looks_at_order_alone():
    a_N = np.array([0.0, -0.0, 1e-38, 1e38, np.inf, -np.inf], np.float32)
    assert spearman(a_N, np.array([1, 1, 2, 3, 4, 0])) == pytest.approx(1)
    assert spearman(a_N, -a_N) == pytest.approx(-1)
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    assert math.isnan(spearman(np.zeros(5), np.arange(5)))


def test_keep_rates_by_hand():
    label_N = np.array([0, 0, 0, 0, 1, 3, 3, UNKNOWN_LABEL])  # class 1 has one sample, class 2 none
    np.testing.assert_array_equal(
        keep_rates(np.array([0, 2, 3, 5, 7]), label_N, 4), [0.75, 0, np.nan, 0.5]
    )
    np.testing.assert_array_equal(keep_rates(np.array([4]), label_N, 4), [0, 1, np.nan, 0])
    np.testing.assert_array_equal(keep_rates(np.arange(8), label_N, 4), [1, 1, np.nan, 1])
    refused(r"label 3 is outside \[0, 3\)", keep_rates, np.array([0]), label_N, 3)


def test_noise_kept_by_hand():
    noisy_N = np.array([True, False, True, True, False, False, True, False])
    assert noise_kept(np.array([0, 1, 2, 5, 7]), noisy_N) == (2 / 4, 2 / 5)
    assert noise_kept(np.array([1]), noisy_N) == (0, 0)
    kept, share = noise_kept(np.array([1, 2]), np.zeros(8, bool))
    assert math.isnan(kept)
    assert share == 0
    assert all(map(math.isnan, noise_kept(np.empty(0, np.int64), np.zeros(8, bool))))


# ---- one run


def overlap(a: Scores, b: Scores, rate: float) -> float:
    """Share of its coreset that each score has in common with the other."""
    index_M = choose(a, rate)
    return len({*index_M} & {*choose(b, rate)}) / len(index_M)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return add(start(tmp_path / "one"), "random", "forgetting", "moderate", T2, T3, "my_own")


def test_csv_holds_what_the_pieces_say(run):
    compare([run.path], pruning_rates=RATES)
    rows = csv_rows(run.path / "compare.csv")
    assert tuple(rows[0]) == COLUMNS
    keys = [T3, T2, "random", "forgetting", "moderate", "my_own"]
    pairs = [*combinations(keys, 2)]
    assert [(row["score_a"], row["score_b"]) for row in rows if row["table"] == "spearman"] == pairs
    for a, b in pairs:
        left, right = scores_of(a), scores_of(b)
        where = {"run_a": "one", "score_a": a, "run_b": "one", "score_b": b}
        assert values(rows, table="spearman", **where) == [
            pytest.approx(spearmanr(left.score_N, right.score_N).statistic)
        ]
        for rate in RATES:  # forgetting has ties at every cut: the draw must be that of `choose`
            assert values(rows, table="overlap", pruning_rate=rate, **where) == [
                pytest.approx(overlap(left, right, rate))
            ]
    for key in keys:
        for rate in RATES:
            expected = keep_rates(choose(scores_of(key), rate), LABEL_N, NUM_CLASSES)
            assert values(
                rows, table="keep_rate", run_a="one", score_a=key, pruning_rate=rate
            ) == pytest.approx(expected)
    where = {"table": "keep_rate", "score_a": "random", "pruning_rate": 0.5}
    assert [
        row["class"]
        for row in rows
        if all(row[name] == str(value) for name, value in where.items())
    ] == list("0123")
    assert len(rows) == 15 * (1 + 3) + 6 * 3 * NUM_CLASSES


def test_text_says_what_the_csv_says(run, tmp_path):
    text = compare([run.path], pruning_rates=RATES, out=tmp_path / "new" / "numbers.csv")
    rows = csv_rows(tmp_path / "new" / "numbers.csv")
    assert not (run.path / "compare.csv").exists()
    assert text.splitlines()[:2] == [
        "90 samples, 4 classes",
        "A  one  resnet18, seed 0, world size 2, 6 scores",
    ]
    assert f"tdds_T3 = {T3}\ntdds_T2 = {T2}\n" in text
    assert f"wrote {tmp_path / 'new' / 'numbers.csv'} ({len(rows)} rows)" in text
    full = {"tdds_T3": T3, "tdds_T2": T2}

    matrix = table(text, "A: Spearman")
    names = ["tdds_T3", "tdds_T2", "random", "forgetting", "moderate", "my_own"]
    assert [*matrix] == [f"{number} {name}" for number, name in enumerate(names, 1)]
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
            shares = values(
                rows, table="keep_rate", score_a=full.get(name, name), pruning_rate=rate
            )
            found = cells[4 * position : 4 * position + 4]
            assert found[:3] == [
                f"{100 * function(shares):.0f}" for function in (min, np.median, max)
            ]
            assert found[3] == str(shares.count(0))


def test_first_window_of_the_config_is_the_one_compared_with(tmp_path):
    run = add(start(tmp_path / "turned", windows=(2, 3)), T2, T3, "random")
    assert "in common with tdds_T2," in compare([run.path])
    run = add(start(tmp_path / "foreign"), "tdds_official_T9_K2_beta0.9", "el2n")
    run.config_file.write_text("version: of another time\n")
    assert "in common with tdds," in compare([run.path])
    run = add(start(tmp_path / "none"), "el2n", "aum")
    assert "in common with el2n," in compare([run.path])


def test_one_score_and_a_rate_of_zero(tmp_path):
    run = add(start(tmp_path / "lone"), "el2n")
    text = compare([run.path], pruning_rates=(0.5, 0, 0.5))
    assert "A: one score only (el2n)" in text
    assert table(text, "A: percent of a class")["el2n"][:4] == ["100", "100", "100", "0"]
    assert {row["pruning_rate"] for row in csv_rows(run.path / "compare.csv")} == {"0", "0.5"}


def test_a_class_that_keeps_nothing_is_counted(tmp_path):
    run = start(tmp_path / "one")
    label_N = np.repeat([0, 1, 2], [996, 3, 1])
    save(run.scores, scores_of("el2n", 0, -np.arange(1000.0), label_N))  # keeps the first
    text = compare([run.path], pruning_rates=(0.001, 0.003, 0.5))
    # of 1000 the last 1, 3 and 500 are removed: 996 3 0, 996 1 0 and 500 0 0 are left of 996 3 1;
    # class 3 does not exist
    cells = table(text, "A: percent of a class")["el2n"]
    assert cells == "0 100 100 1 0 33 100 1 0 0 50 2".split()
    save(run.scores, scores_of("el2n", 0, np.arange(1000.0), label_N))  # keeps the last
    text = compare([run.path], pruning_rates=(0.001, 0.993))
    cells = table(text, "A: percent of a class")["el2n"]
    assert cells == ">99 100 100 0 <1 100 100 0".split()


def test_scores_that_rank_alike_are_named_and_those_on_their_own(tmp_path):
    """One ranking, the same turned over, and a third near the one; another that is like none;
    random and constant scores say nothing."""
    run, rng = start(tmp_path / "one"), np.random.default_rng(1)
    rank_N, other_N = rng.permutation(NUM_SAMPLES), rng.permutation(NUM_SAMPLES)
    near_N, flat_N = rank_N + rng.normal(0, 2, NUM_SAMPLES), np.zeros(NUM_SAMPLES)
    of = {"aum": rank_N, "el2n": -rank_N, "csl": near_N, "dual": other_N, "random": rank_N}
    for key, score_N in (of | {"forgetting": flat_N}).items():
        save(run.scores, scores_of(key, 0, score_N))
    text = compare([run.path])
    said = text[text.index("information of their own") :].split("\n\n")[0].splitlines()[1:]
    assert said[0] == "rank alike: el2n, aum, csl"
    near = {
        key: spearman(np.float32(other_N), np.float32(of[key])) for key in ("el2n", "aum", "csl")
    }
    nearest = max(near, key=lambda key: abs(near[key]))
    assert said[1:] == [f"on their own: dual (nearest: {nearest} {near[nearest]:.2f})"]


@pytest.mark.parametrize("key", ["cld", "moderate", "el2n"])
def test_what_is_compared_is_what_select_keeps(key):
    """Class by class, the centre, or the top."""
    scores = scores_of(key, 3)
    for position, rate in enumerate((0.3, 0.7)):
        found = rank(scores, [0.3, 0.7]).index(position)
        np.testing.assert_array_equal(found, choose(scores, rate))


def test_constant_scores_have_no_correlation(tmp_path):
    run = add(start(tmp_path / "one"), T3, "el2n")
    save(run.scores, scores_of("aum", 0, np.zeros(NUM_SAMPLES)))
    text = compare([run.path])
    assert table(text, "A: Spearman")["3 aum"] == ["–", "–", "1.00"]
    assert all(
        map(math.isnan, values(csv_rows(run.path / "compare.csv"), table="spearman", score_b="aum"))
    )


def test_rows_fit_the_terminal_and_align(tmp_path):
    keys = [
        f"tdds_official_T{T}_K10_beta0.9{ablation}"
        for T in (30, 60, 90)
        for ablation in ("", "_entropy", "_el2n")
    ]
    others = "random entropy forgetting el2n aum moderate dyn_unc dual".split()
    others += [f"own{i}" for i in range(9)]
    runs = [
        add(start(tmp_path / f"cifar100_resnet18_seed{seed}"), *keys, *others, seed=seed).path
        for seed in range(2)
    ]
    text = compare(
        runs, pruning_rates=[0.1 * tenth for tenth in range(10)], out=tmp_path / "out.csv"
    )
    assert "note:" not in text
    lines = text.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 120
    for block in text.split("\n\n"):
        rules = [line for line in block.splitlines() if line.startswith("---")]
        assert len(rules) <= 1
        if rules:
            body = block.splitlines()[block.splitlines().index(rules[0]) + 1 :]
            assert {len(line) for line in body} == {len(rules[0])}


# ---- several runs


def test_between_three_runs_each_pair_and_the_mean(tmp_path):
    runs = [
        add(
            start(tmp_path / name, seed=seed),
            T3,
            "forgetting",
            "el2n" if seed else "aum",
            seed=seed,
        )
        for seed, name in enumerate("abc")
    ]
    text = compare([run.path for run in runs], pruning_rates=RATES)
    rows = csv_rows(runs[0].path / "compare.csv")
    assert not (runs[1].path / "compare.csv").exists()
    assert text.index("A: Spearman") < text.index("B: Spearman") < text.index("Between runs")
    assert "B  b  resnet18, seed 1," in text
    lines = text[text.index("Between runs") :].split("\n\n")[0].splitlines()[4:]
    shown = ["A-B", "A-C", "B-C"]
    starts = ["tdds", *shown, "forgetting", *shown, "el2n", "B-C"]
    assert [line.split()[0] for line in lines] == starts
    numbers = np.array([line.split()[1:] for line in lines], dtype=float)
    for first, key in ((0, T3), (4, "forgetting")):
        found = []
        for (i, a), (j, b) in combinations(enumerate("abc"), 2):
            left, right = scores_of(key, i), scores_of(key, j)
            found.append(
                [
                    spearmanr(left.score_N, right.score_N).statistic,
                    *(overlap(left, right, rate) for rate in RATES),
                ]
            )
            pair = {"run_a": a, "run_b": b, "score_a": key, "score_b": key}
            assert values(rows, table="spearman", **pair) + values(
                rows, table="overlap", **pair
            ) == pytest.approx(found[-1])
        means = values(rows, table="spearman_mean", score_a=key) + values(
            rows, table="overlap_mean", score_a=key
        )
        assert means == pytest.approx(np.mean(found, axis=0))
        percent = np.array([means, *found]) * [1, 100, 100, 100]
        np.testing.assert_allclose(numbers[first : first + 4], percent, atol=0.051)
    assert values(rows, table="spearman_mean", score_a="aum") == []
    two = table(
        compare([run.path for run in runs[:2]], pruning_rates=RATES),
        "Between runs: agreement of the same score\n",
    )
    assert [*two] == ["tdds", "forgetting"]
    assert two["forgetting"] == [
        f"{found[0][0]:.3f}",
        *(f"{100 * share:.1f}" for share in found[0][1:]),
    ]


def test_between_many_runs_the_extremes(tmp_path):
    runs = [add(start(tmp_path / f"r{seed}"), T3, seed=seed).path for seed in range(5)]
    shown = table(text := compare(runs, pruning_rates=(0.5,)), "Between runs")
    rows = csv_rows(runs[0] / "compare.csv")
    for name, function in (("tdds", np.mean), ("smallest", np.min), ("largest", np.max)):
        expected = (
            function(values(rows, table="spearman")),
            100 * function(values(rows, table="overlap")),
        )
        assert shown[name] == [f"{expected[0]:.3f}", f"{expected[1]:.1f}"]
    assert len(values(rows, table="overlap")) == 10
    assert "E: one score only" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [add(start(tmp_path / folder / "run"), folder).path for folder in ("el2n", "aum")]
    text = compare(runs, out=tmp_path / "out.csv")
    assert f"A  {runs[0]}  resnet18" in text
    assert "Between runs: no score is present in two of them" in text
    assert {row["run_a"] for row in csv_rows(tmp_path / "out.csv")} == {str(run) for run in runs}


# ---- noise


@pytest.fixture
def noisy(tmp_path: Path) -> RunDir:
    """Ten samples; `el2n` keeps the last of them, `aum` the first. Wrong labels 0 5 8 9, corrupted
    1 (fog) 7 8 (occlusion)."""
    label_N = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    true_label_N = label_N.copy()
    true_label_N[[0, 5, 8, 9]] = [1, 2, 3, 0]
    corruption = ["", "fog", "", "", "", "", "", "occlusion", "occlusion", ""]
    write_header(tmp_path / "train.beton", label_N, NUM_CLASSES, true_label_N, corruption)
    run = start(tmp_path / "noisy", tmp_path / "train.beton")
    save(
        run.scores,
        scores_of("el2n", 0, np.arange(10.0), label_N),
        scores_of("aum", 0, -np.arange(10.0), label_N),
    )
    return run


def test_noise_by_hand(noisy):
    text = compare([noisy.path], pruning_rates=(0.5, 0.7))
    shares = "kept: percent of them; share: percent of the coreset"
    wrong = table(text, f"A: samples with a wrong label (4 of 10); {shares}")
    assert wrong == {
        "el2n": ["75.0", "60.0", "50.0", "66.7"],  # keeps 5-9, then 7-9
        "aum": ["25.0", "20.0", "25.0", "33.3"],  # keeps 0-4, then 0-2
        AT_RANDOM: ["50.0", "40.0", "30.0", "40.0"],
    }
    corrupted = table(text, "A: corrupted images (3 of 10)")
    assert corrupted == {
        "el2n": ["66.7", "40.0", "66.7", "66.7"],
        "aum": ["33.3", "20.0", "33.3", "33.3"],
        AT_RANDOM: ["50.0", "30.0", "30.0", "30.0"],
    }
    rows = csv_rows(noisy.path / "compare.csv")
    assert values(rows, table="noisy_kept", score_a="el2n") == [0.75, 0.5]
    assert values(rows, table="coreset_noisy", score_a="el2n") == pytest.approx([0.6, 2 / 3])
    assert values(rows, table="noisy_kept", score_a=AT_RANDOM) == [0.5, 0.3]
    for score, kind, kept, share in [
        ("el2n", "", [2 / 3, 2 / 3], [0.4, 2 / 3]),
        ("el2n", "fog", [0, 0], [0, 0]),
        ("el2n", "occlusion", [1, 1], [0.4, 2 / 3]),
        ("aum", "fog", [1, 1], [0.2, 1 / 3]),
        ("aum", "occlusion", [0, 0], [0, 0]),
        (AT_RANDOM, "fog", [0.5, 0.3], [0.1, 0.1]),
    ]:
        where = {"score_a": score, "class": kind}
        assert values(rows, table="corrupted_kept", **where) == pytest.approx(kept)
        assert values(rows, table="coreset_corrupted", **where) == pytest.approx(share)


@pytest.mark.parametrize(
    ("true_label", "corruption"), [(False, None), (True, ["" for _ in LABEL_N])]
)
def test_clean_data_need_no_table(tmp_path, true_label, corruption):
    write_header(
        tmp_path / "train.beton", LABEL_N, NUM_CLASSES, LABEL_N if true_label else None, corruption
    )
    text = compare([add(start(tmp_path / "run", tmp_path / "train.beton"), "el2n").path])
    assert "wrong label" not in text
    assert "corrupted" not in text
    assert "note:" not in text


def test_noise_that_cannot_be_known_is_said_once(tmp_path):
    runs = [
        add(start(tmp_path / name, tmp_path / "train.beton"), "el2n").path for name in ("a", "b")
    ]
    assert f"note: run {runs[0]}: {tmp_path / 'train.beton'} is no longer there" in compare(runs)
    write_header(tmp_path / "train.beton", np.sort(LABEL_N % 3), NUM_CLASSES, LABEL_N)
    text = compare(runs)
    assert "train.manifest.json belongs to another dataset" in text
    assert "wrong label" not in text
    manifest_path(tmp_path / "train.beton").write_text("{")
    assert compare(runs).count("is not a whole manifest") == 1


# ---- what cannot be compared


def test_damaged_and_foreign_files_are_said_at_the_end(run):
    (run.scores / "broken.npz").write_bytes(b"PK no")
    save(run.scores, scores_of("nan", 0, np.where(np.arange(NUM_SAMPLES) < 2, np.nan, 1)))
    save(run.scores, scores_of("z_other", 0, None, LABEL_N[::-1].copy()))
    end = compare([run.path]).split("\n\n")[-1].splitlines()
    assert end[0].startswith("wrote ")
    assert end[1].startswith(f"note: {run.scores / 'broken.npz'} is not a scores file of tdds")
    assert (
        end[2]
        == f"note: {run.scores / 'nan.npz'} holds 2 values that are not finite; compute it again"
        " with `tdds score`"
    )
    assert end[3].startswith(f"note: {run.scores / 'z_other.npz'} belongs to another dataset")
    assert len(end) == 4
    known = {
        row[name] for row in csv_rows(run.path / "compare.csv") for name in ("score_a", "score_b")
    } - {""}
    assert known == {T3, T2, "random", "forgetting", "moderate", "my_own"}


def test_labels_come_from_whichever_file_has_them(tmp_path):
    run, unknown_N = start(tmp_path / "run"), np.full(NUM_SAMPLES, UNKNOWN_LABEL)
    save(run.scores, scores_of("a", 0, None, unknown_N))
    text = compare([run.path])
    assert "no labels are known" in text
    assert "percent of a class" not in text
    add(run, "el2n")
    assert [*table(compare([run.path]), "A: percent of a class")] == ["el2n", "a"]


def test_refused(tmp_path, run):
    empty, broken, other = (start(tmp_path / name) for name in ("empty", "broken", "other"))
    broken.scores.mkdir()
    (broken.scores / "el2n.npz").write_text("nothing")
    save(other.scores, scores_of("el2n", 0, None, LABEL_N[::-1].copy()))
    for runs, options, message in (
        ([], {}, "0 runs"),
        ([run], {"pruning_rates": ()}, "0 pruning rates"),
        ([run, RunDir(tmp_path / "nowhere")], {}, "nowhere does not exist"),
        ([run, RunDir(run.path / ".." / "one")], {}, "is given twice"),
        ([run], {"pruning_rates": (0.5, 1.0)}, r"pruning_rate=1\.0 must lie in \[0, 1\)"),
        ([run], {"pruning_rates": (0.999,)}, r"pruning_rate=0\.999 keeps none of 90 samples"),
        ([run], {"out": run.scores}, "cannot write"),
        ([run, empty], {}, r"empty/scores holds no score; run `tdds collect`, or `tdds score"),
        ([broken], {}, r"no score that can be used \(.*el2n.npz is not a scores file"),
        ([run, other], {}, r"run .*other belongs to another dataset"),
    ):
        refused(message, compare, [each.path for each in runs], **options)
    assert not (run.path / "compare.csv").exists()


def test_distinct_scores_are_sorted_once(run, monkeypatch):
    """`choose` sorts anew for every rate: only another sampler and ties at the cut are worth
    that."""
    asked = []

    def spy(scores: Scores, rate: float) -> np.ndarray:
        asked.append((scores.key, rate))
        return choose(scores, rate)

    monkeypatch.setattr("tdds_dist.coreset.agreement.choose", spy)
    compare([run.path], pruning_rates=RATES)
    assert asked == [(key, rate) for key in ("forgetting", "moderate") for rate in RATES]
