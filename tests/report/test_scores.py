"""The report's sections on scores: bins, histograms, maps, agreement, classes and noise, against
loops and `tdds compare`."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdds_dist.config.scores import base_key
from tdds_dist.coreset.compare import compare
from tdds_dist.coreset.select import choose, make_coreset
from tdds_dist.data.manifest import Manifest
from tdds_dist.report import charts
from tdds_dist.report.agreement import agreement_section, between_section
from tdds_dist.report.charts import LARGEST_RATIO, Bins, bins_of
from tdds_dist.report.page import build_report
from tdds_dist.report.read import Facts, read_facts
from tdds_dist.report.scores import (
    class_table,
    kept_range,
    main_score,
    noise_table,
    origin,
    score_facts,
)
from tdds_dist.runs.artifacts import Coreset, Scores, load_coreset, save_coreset
from tdds_dist.runs.directory import RunDir
from tests import make
from tests.make import (
    NUM_CLASSES,
    SHORT,
    TDDS,
    Page,
    add_scores,
    csv_rows,
    finish,
    page_of,
    save,
    scores,
    start,
    write_header,
)
from tests.make import coreset as coreset_of

KEYS = (TDDS, SHORT, "random", "forgetting", "el2n", "aum", "moderate", "dual")
NUM_SAMPLES = 400
LABEL_N = np.arange(NUM_SAMPLES) % NUM_CLASSES
Drawn = list[dict[str, Any]]


def scores_of(key: str, seed: int = 0) -> Scores:
    """Scores that agree in part; TDDS is skewed, forgetting counts, dual comes with its mean
    probability."""
    random = np.random.default_rng([seed, len(key), ord(key[0])])
    base_N = np.random.default_rng(1).gamma(1, 1, NUM_SAMPLES)
    base_N += 0.3 * random.normal(size=NUM_SAMPLES)
    base_N = {
        "random": random.normal(size=NUM_SAMPLES),
        "tdds": np.exp(3 * base_N),
        "dual": np.abs(base_N) / 9,
        "forgetting": np.round(np.abs(base_N)),
    }.get(base_key(key), base_N)
    extra = {"p_mean": random.random(NUM_SAMPLES).astype(np.float32)} if key == "dual" else {}
    settings = {"score": base_key(key), "preset": "official", "keep": "hardest"}
    return scores(key, base_N, LABEL_N, settings=settings, **extra)


def with_scores(
    path: Path, keys: tuple[str, ...] = KEYS, seed: int = 0, rates: tuple[float, ...] = (0.5, 0.8)
) -> RunDir:
    run = start(path, score={"windows": []})
    save(run.scores, *(scores_of(key, seed) for key in keys))
    for rate in rates:
        add_coreset(run, keys[0], rate)
    return run


def add_coreset(
    run: RunDir, key: str, rate: float, name: str | None = None, **options: Any
) -> Coreset:
    coreset, _ = make_coreset(scores_of(key), rate, **options)
    save_coreset(run.coresets / f"{name or key}_p{rate:g}.npz", coreset)
    return coreset


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with all KEYS. Never changed."""
    return with_scores(tmp_path_factory.mktemp("full") / "run")


def origins_of(facts: Facts) -> Any:
    return {name: origin(facts, coreset) for name, coreset in facts.coresets.items()}


def slots_of(facts: Facts) -> dict[str, int]:
    return dict.fromkeys(facts.names.values(), 1)


def section_of(run: RunDir) -> dict[str, Any]:
    facts = read_facts(run)
    return agreement_section(facts, main_score(facts, origins_of(facts)), slots_of(facts))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Drawn]]:
    """What the charts are asked to draw."""
    seen: dict[str, Drawn] = {"histogram": [], "density_map": []}

    def spy(name: str, names: str) -> None:
        draw = getattr(charts, name)

        def drawing(*args: Any) -> str:
            seen[name].append(dict(zip(names.split(), args, strict=True)))
            return str(draw(*args))

        monkeypatch.setattr(charts, name, drawing)

    spy("histogram", "count_B bins strips slot x_title alt")
    spy("density_map", "count_YX x y slot alt")
    return seen


# ---- bins


def loop_count(score_N: np.ndarray, bins: Bins) -> list[int]:
    counts = [0] * len(bins)
    for score in score_N:
        ends = enumerate(pairwise(bins.edge))
        inside = [number for number, (low, high) in ends if low <= score < high]
        counts[inside[0] if inside else 0 if score < bins.edge[0] else len(bins) - 1] += 1
    return counts


@pytest.mark.parametrize(
    "kind", ["normal", "skewed", "zeros", "tails", "whole", "never learned", "constant", "two"]
)
def test_every_score_has_a_bin(kind):
    random = np.random.default_rng(0)
    score_N = {
        "normal": random.normal(size=3000),
        "skewed": np.exp(3 * random.normal(size=3000)),
        "zeros": np.maximum(0, np.exp(3 * random.normal(size=3000)) - 1),
        "tails": random.standard_t(1, 3000),
        "whole": random.poisson(3, 3000),
        "never learned": np.append(random.poisson(3, 2999), 200),
        "constant": np.full(5, 0.25),
        "two": np.array([-1.5, 7.25]),
    }[kind].astype(np.float32)
    bins = bins_of(score_N, 60)
    assert 1 <= len(bins) <= 61
    assert (np.diff(bins.edge) > 0).all()
    count_B = np.bincount(bins.place(score_N), minlength=len(bins))
    assert count_B.tolist() == loop_count(score_N, bins)
    assert bins.is_log == (kind in ("skewed", "zeros"))
    assert bins.is_whole == (kind in ("whole", "never learned"))
    below, above = bins.beyond(score_N)
    assert below == sum(score < bins.edge[0] for score in score_N)
    assert above == sum(score > bins.edge[-1] for score in score_N)
    assert above <= 4
    assert below <= {"skewed": 0.05 * 3000, "zeros": 1600}.get(kind, 4)


def test_tails_do_not_take_the_axis():
    random = np.random.default_rng(0)
    wide = random.standard_t(1, 5000)
    bins = bins_of(wide, 80)
    assert bins.edge[-1] - bins.edge[0] < (wide.max() - wide.min()) / 2
    assert sum(bins.beyond(wide)) <= 12
    never = np.append(random.poisson(2, 9999), 200)
    assert bins_of(never, 80).edge[-1] < 20
    for num_tiny in (1, 40):
        small = np.append(np.exp(random.normal(size=2000)), np.full(num_tiny, 1e-12))
        assert bins_of(small, 80).edge[0] > 1e-6, "a few tiny scores do not make twelve decades"
    decades = np.exp(6 * random.normal(size=5000))
    ratio = bins_of(decades, 80).edge[-1] / bins_of(decades, 80).edge[0]
    assert ratio > LARGEST_RATIO, "most of the images must not end up in the first bin"
    assert bins_of(decades, 80).beyond(decades)[0] <= 0.051 * 5000


# ---- histograms


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([4, 5], (3, np.inf)),
        ([2, 4, 5], (2, np.inf)),  # of two equal ones the first
        (range(6), (0, np.inf)),
        ([1, 2, 3], (1, 2)),
        ([1, 2], (1, 2)),
        ([1, 4], None),
        ([0, 1], (0, 1)),
    ],
)
def test_kept_range_by_hand(kept, expected):
    assert kept_range(np.array([0.0, 1, 2, 2, 3, 4], np.float32), np.array(kept)) == expected
    assert kept_range(np.array([np.nan, 1, 2], np.float32), np.array([2])) is None


def test_strips_say_how_much_of_each_bin_a_coreset_keeps(tmp_path, drawn):
    run = with_scores(tmp_path / "run")
    chosen: list[tuple[str, dict[str, Any]]] = [
        ("aum", {"sampler": "ccs"}),
        ("dual", {"sampler": "beta"}),
        ("moderate", {}),
        ("moderate", {"sampler": "top"}),
        ("el2n", {"class_balanced": True}),
        ("forgetting", {}),
    ]
    for key, options in chosen:
        add_coreset(run, key, 0.5, f"{key}_{options.get('sampler', '')}", **options)
    facts = read_facts(run)
    found = {name: score_facts(facts, name, origins_of(facts), 1) for name in facts.scores}
    asked = {re.split(" score", chart["x_title"])[0]: chart for chart in drawn["histogram"]}
    # every score has one, random has none
    assert [*asked] == [name for name in facts.scores if name != "random"]
    assert found["random"]["chart"] is None
    labels = {name: [strip.label for strip in chart["strips"]] for name, chart in asked.items()}
    assert labels == {
        TDDS: ["50 %", "80 %"],
        SHORT: [],
        "forgetting": ["50 %"],
        "el2n": ["balanced 50 %"],
        "aum": ["ccs 50 %"],
        "moderate": ["50 %", "50 %"],
        "dual": ["beta 50 %"],
    }
    for coreset in ("aum_ccs_p0.5", "dual_beta_p0.5", "el2n__p0.5", "forgetting__p0.5"):
        name = coreset.split("_")[0]
        score_N, kept = facts.scores[name].score_N, {*facts.coresets[coreset].index_M.tolist()}
        bins, (strip,) = asked[name]["bins"], asked[name]["strips"]
        count_B = loop_count(score_N, bins)
        assert asked[name]["count_B"].tolist() == count_B
        kept_N = np.array([score for index, score in enumerate(score_N) if index in kept])
        kept_B = loop_count(kept_N, bins)
        expected = [k / n if n else np.nan for k, n in zip(kept_B, count_B, strict=True)]
        np.testing.assert_allclose(strip.share_B, expected)
    cut = facts.scores[TDDS].score_N[facts.coresets[f"{TDDS}_p0.5"].index_M].min()
    assert asked[TDDS]["strips"][0].cuts == [cut]
    centre, top = asked["moderate"]["strips"]
    assert (len(centre.cuts), len(top.cuts)) == (2, 1)
    assert asked["aum"]["strips"][0].cuts == asked["el2n"]["strips"][0].cuts == []
    kept = f"50 % keeps {centre.cuts[0]:.3g} to {centre.cuts[1]:.3g}"
    assert f"{kept}, 50 % removed below {top.cuts[0]:.3g}." in asked["moderate"]["alt"]
    assert [name for name in found if found[name].get("has_draws")] == ["el2n", "aum", "dual"]
    assert asked[TDDS]["bins"].is_log
    assert asked[TDDS]["x_title"].endswith("(higher = keep), log axis")


def test_captions_say_what_is_kept_and_what_is_not_drawn(tmp_path):
    run = with_scores(tmp_path / "run", (TDDS, "moderate"))
    page = build_report([run], tmp_path / "report.html").read_text()
    figure = r'<figure class="chart">\s*(<svg.*?</svg>\s*<figcaption>.*?)</figcaption>'
    figures = re.findall(figure, page.split('id="r0-scores"')[1], re.DOTALL)
    plain, centre = (
        next(text for text in figures if f"<b>{name}</b>" in text) for name in (TDDS, "moderate")
    )
    assert "moderate score (centre of the ranking = keep)" in centre
    assert "Cuts: none. The centre of the ranking is kept by default." in centre  # the alt text
    assert "higher = keep" not in centre
    assert "The centre of the ranking is kept by default" in centre.split("<figcaption>")[1]
    assert "(higher = keep)" in plain
    assert "centre" not in plain
    assert "Each strip below the bars" in page
    assert "no single cut" not in page
    add_coreset(run, "moderate", 0.5, sampler="top", class_balanced=True)
    assert "no single cut" in build_report([run], tmp_path / "report.html").read_text()


def test_captions_say_what_lies_beyond_the_axis(tmp_path):
    run, label_N = start(tmp_path / "run"), np.arange(4000) % NUM_CLASSES
    score_N = np.append(np.linspace(0, 1, 3997), [50, 60, np.inf]).astype(np.float32)
    add_scores(run, "el2n", label_N, score_N=score_N)
    text = build_report([run], tmp_path / "report.html").read_text()
    first, last = r"The first bin also holds \d below .*?", r"The last bin also holds \d above"
    assert re.search(rf"highest 60\. {first} {last} (0\.999|1)\.", text)
    assert "1 images have a score that is not finite" in text


# ---- agreement


def test_matrices_are_those_of_compare(full, tmp_path):
    compare([full.path], pruning_rates=(0.5, 0.8), out=tmp_path / "compare.csv")
    section = section_of(full)
    assert [matrix["rate"] for matrix in section["matrices"]] == [None, 0.5, 0.8]
    assert [matrix["chance"] for matrix in section["matrices"]] == [0, 0.5, 0.2]
    cells = {
        (matrix["rate"], a, b): cell
        for matrix in section["matrices"]
        for a, _, row in matrix["rows"]
        for (b, _, _), cell in zip(matrix["rows"], row, strict=True)
    }
    rows = csv_rows(tmp_path / "compare.csv")
    rows = [row for row in rows if row["table"] in ("spearman", "overlap")]
    assert len(rows) == 28 * 3
    for row in rows:
        rate, value = float(row["pruning_rate"] or 0) or None, float(row["value"])
        rounded = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
        text = rounded if rate is None else f"{100 * value:.0f}"
        chance = 0 if rate is None else 1 - rate
        tint = (value - chance) / (1 - chance if value >= chance else chance or 1)
        for a, b in ((row["score_a"], row["score_b"]), (row["score_b"], row["score_a"])):
            assert cells[rate, a, b] == (text, pytest.approx(tint, abs=0.006))
    assert [key for key, _, _ in section["matrices"][0]["rows"]] == [SHORT, TDDS, *KEYS[2:]]
    assert all(cells[rate, key, key] is None for rate in (None, 0.5, 0.8) for key in KEYS)
    rows = [row for row in rows if row["table"] == "spearman"]
    values = {(row["score_a"], row["score_b"]): float(row["value"]) for row in rows}
    names = {key: name for key, name, _ in section["matrices"][0]["rows"]}
    ends = [end(values, key=values.__getitem__) for end in (max, min)]
    expected = [tuple(names[key] for key in pair) for pair in ends]
    assert [ends[:2] for ends in section["matrices"][0]["ends"]] == expected


def test_matrix_on_the_page(tmp_path):
    run = with_scores(tmp_path / "run")
    infinite_N = np.full(NUM_SAMPLES, np.inf, np.float32)
    save(run.scores, dataclasses.replace(scores_of("own"), score_N=infinite_N))
    page = page_of([run], tmp_path / "report.html")
    rows = [row for row in page.rows if row[0] == "forgetting" and len(row) == 9]
    assert [row[4] for row in rows] == ["1", "100", "100"]  # the diagonal, of each matrix
    text = re.sub("<.?b>", "", page.text)
    assert "By chance two coresets of this size have 20 % in common" in text
    assert "Left out, because they are not finite or of other labels: own." in page.text
    lone = page_of([with_scores(tmp_path / "lone", ("el2n",))], tmp_path / "lone.html")
    assert "one score only" in lone.text
    fresh = page_of([start(tmp_path / "fresh")], tmp_path / "fresh.html")
    assert "agreement" not in fresh.text.split("</style>")[1].split("<script>")[0]


def test_rates_are_those_of_the_coresets_or_the_usual_ones(tmp_path):
    none = with_scores(tmp_path / "none", rates=())
    assert section_of(none)["rates"] == [0.3, 0.5, 0.7, 0.8, 0.9]
    assert section_of(with_scores(tmp_path / "some", rates=(0.8, 0.35)))["rates"] == [0.35, 0.8]
    run, label_N = start(tmp_path / "tiny"), np.arange(4)
    add_scores(run, "el2n", label_N, score_N=np.arange(4, dtype=np.float32))
    assert section_of(run)["rates"] == [0.3, 0.5, 0.7, 0.8], "90 % of 4 images leaves none"


def test_between_runs_is_that_of_compare(tmp_path):
    keys = (TDDS, "forgetting", "el2n")
    runs = [
        with_scores(tmp_path / f"seed{seed}", keys[: 3 - (seed == 2)], seed) for seed in range(3)
    ]
    compare([run.path for run in runs], pruning_rates=(0.5, 0.8), out=tmp_path / "compare.csv")
    (group,) = between_section([(run.path.name, section_of(run)) for run in runs]) or []
    assert group["names"] == ["seed0", "seed1", "seed2"]
    assert group["rates"] == [(0.5, 0.5), (0.8, 0.2)]
    found = [(key, pairs) for key, _, pairs, _ in group["rows"]]
    assert found == [(TDDS, 3), ("forgetting", 3), ("el2n", 1)]
    values_of: dict[tuple[str, ...], list[float]] = {}
    for row in csv_rows(tmp_path / "compare.csv"):
        if row["run_a"] != row["run_b"]:
            of = row["table"], row["score_a"], row["pruning_rate"]
            values_of.setdefault(of, []).append(float(row["value"]))
    for key, _, _, spreads in group["rows"]:
        tables = (("spearman", key, ""), ("overlap", key, "0.5"), ("overlap", key, "0.8"))
        for of, spread in zip(tables, spreads, strict=True):
            values = values_of[of]
            assert spread == pytest.approx((np.mean(values), min(values), max(values)), rel=1e-6)
    text = page_of(runs, tmp_path / "report.html").text
    mean, low, high = (f"{100 * value:.1f}" for value in group["rows"][0][3][1])
    assert re.search(rf">{mean} <small>{low} to {high}</small>", text)


def test_between_runs_of_other_data_or_other_rates(tmp_path):
    first = with_scores(tmp_path / "a", (TDDS, "el2n"))
    second = with_scores(tmp_path / "b", (TDDS, "el2n"), 1, rates=(0.3, 0.8))
    other = start(tmp_path / "other")
    add_scores(other, "el2n", np.arange(9) % 3, ())
    sections = [(run.path.name, section_of(run)) for run in (first, second, other)]
    (group,) = between_section([*sections, ("nothing", None)]) or []
    assert (group["names"], [rate for rate, _ in group["rates"]]) == (["a", "b"], [0.8])
    a, b = (choose(scores_of(TDDS, seed), 0.8) for seed in (0, 1))
    assert group["rows"][0][3][1] == (pytest.approx(len(np.intersect1d(a, b)) / len(a)),) * 3
    assert between_section(sections[1:]) is None
    assert between_section(sections[:1]) is None


# ---- maps


def test_maps_count_every_image_and_cut_where_select_cuts(full, drawn):
    section = section_of(full)
    assert [(of["name"], [chart["y"] for chart in of["maps"]]) for of in section["maps"]] == [
        ("tdds_T2", ["forgetting", "aum"]),
        ("tdds_T3", ["forgetting", "aum"]),
    ]
    x_N, y_N = scores_of(TDDS).score_N, scores_of("forgetting").score_N
    chart = drawn["density_map"][2]
    count_YX = np.zeros(chart["count_YX"].shape, int)
    for x, y in zip(x_N, y_N, strict=True):
        column = chart["x"].bins.place(np.array([x]))[0]
        count_YX[chart["y"].bins.place(np.array([y]))[0], column] += 1
    np.testing.assert_array_equal(chart["count_YX"], count_YX)
    assert count_YX.sum() == NUM_SAMPLES
    assert len({*loop_count(y_N, chart["y"].bins)}) > 1
    both = (scores_of(TDDS), scores_of("forgetting"))
    kept = {rate: [choose(scores, rate) for scores in both] for rate in (0.5, 0.8)}
    assert chart["x"].cuts == [(f"{100 * rate:g} %", x_N[kept[rate][0]].min()) for rate in kept]
    y_cuts = sorted({y_N[kept[rate][1]].min() for rate in kept})
    assert [cut for _, cut in chart["y"].cuts] == y_cuts
    a, b = ({*index_M.tolist()} for index_M in kept[0.8])
    found = section["maps"][1]["maps"][0]["corners"]["corners"]
    corners = {place: num for place, _, num, _, _ in found}
    assert corners == {
        "top right": len(a & b),
        "bottom left": NUM_SAMPLES - len(a | b),
        "top left": len(b - a),
        "bottom right": len(a - b),
    }


def test_maps_need_another_score(tmp_path):
    assert section_of(with_scores(tmp_path / "none", (TDDS, "el2n")))["maps"] == []
    (one,) = section_of(with_scores(tmp_path / "own", ("aum", "forgetting"), rates=()))["maps"]
    assert {one["name"], one["maps"][0]["y"]} == {"aum", "forgetting"}
    (plain,) = section_of(with_scores(tmp_path / "el2n", ("el2n", "aum")))["maps"]
    assert plain["maps"][0]["corners"] is None, "what EL2N says in plain words is not known"


def test_the_map_of_dataset_cartography(tmp_path, monkeypatch):
    """Variability across, confidence upwards, a colour for what is right and one for what is wrong;
    only of the same epochs."""
    run, rng = start(tmp_path / "run"), np.random.default_rng(0)
    p_N, right_N = rng.random(NUM_SAMPLES), rng.integers(0, 5, NUM_SAMPLES)
    of = {"variability": 0.5 * rng.random(NUM_SAMPLES), "confidence": -p_N, "correctness": -right_N}
    label_N = scores_of("aum").label_N
    for key, score_N in of.items():
        settings = {"score": key, "T": 4}
        save(run.scores, make.scores(key, score_N, label_N, NUM_CLASSES, settings))
    asked, draw = [], charts.density_map
    monkeypatch.setattr(charts, "density_map", lambda *a: asked.append(a) or draw(*a))
    found = section_of(run)["cartography"]
    (count_YX, *_, (wrong_YX, _)) = asked[-1]
    assert (count_YX * wrong_YX).sum() == pytest.approx((1 - right_N / 4).sum())
    assert (found["num_epochs"], found["num_low"]) == (4, int((p_N < 0.5).sum()))
    masks = re.findall(r'<mask id="([^"]*)"><image', found["chart"])
    fills = re.findall(r'fill="var\(--s(\d)\)" mask="url\(#([^"]*)\)"', found["chart"])
    assert [name for _, name in fills] == masks
    assert [slot for slot, _ in fills] == ["0", "1"]
    settings = {"score": "confidence", "T": 3}
    save(run.scores, make.scores("confidence", -p_N, label_N, NUM_CLASSES, settings))
    assert section_of(run)["cartography"] is None


# ---- noise


def write_noisy(path: Path, num_wrong: int, num_corrupted: int) -> Manifest:
    """60 images with this many wrong labels and corrupted images."""
    random = np.random.default_rng(0)
    true_label_N, kind_N = np.arange(60) % NUM_CLASSES, np.full(60, "", dtype="<U9")
    label_N = true_label_N.copy()
    label_N[random.permutation(60)[:num_wrong]] += 1
    kinds = np.resize(["fog", "fog", "occlusion"], num_corrupted)
    kind_N[random.permutation(60)[:num_corrupted]] = kinds
    return write_header(path, label_N % NUM_CLASSES, NUM_CLASSES, true_label_N, kind_N.tolist())


@pytest.fixture
def noisy(tmp_path: Path) -> tuple[RunDir, Manifest]:
    """60 images: 12 wrong labels, 18 corrupted."""
    manifest = write_noisy(tmp_path / "noisy.beton", 12, 18)
    run = start(tmp_path / "noisy", tmp_path / "noisy.beton", score={"windows": []})
    add_scores(run, TDDS, manifest.label_N, (0.5, 0.8))
    falling_N = np.round(np.linspace(9, 0, 60)).astype(np.float32)
    add_scores(run, "forgetting", manifest.label_N, (0.5,), falling_N)
    return run, manifest


def test_noise_that_is_kept_by_hand(noisy, tmp_path):
    run, manifest = noisy
    facts = read_facts(run)
    table = noise_table(facts, slots_of(facts))
    kinds = sorted({kind for kind in manifest.corruption if kind})
    columns = ["wrong labels", "corrupted images", *(kind.replace("_", " ") for kind in kinds)]
    assert [kind for kind, *_ in table["columns"]] == columns
    for name, head, rate, expected, kept in table["rows"]:
        index = [*load_coreset(run.coresets / f"{name}.npz").index_M]
        bad = [
            manifest.noisy_N.tolist(),
            [kind != "" for kind in manifest.corruption],
            *([each == kind for each in manifest.corruption] for kind in kinds),
        ]
        for is_bad, (share, part) in zip(bad, kept, strict=True):
            assert share == pytest.approx(sum(is_bad[i] for i in index) / sum(is_bad))
            assert part == pytest.approx(sum(is_bad[i] for i in index) / len(index))
        assert expected == pytest.approx(1 - rate)
        assert head == f"{name.split('_')[0]} {100 * rate:g} %"
    assert len(table["rows"]) == 3
    lines = {line.label: (line.x, line.y) for line in table["charts"][0]["legend"]}
    assert [*lines] == ["tdds", "forgetting", "expected at random"]
    assert lines["expected at random"] == ([50, 80], pytest.approx([50, 20]))
    kept_of_tdds = [100 * kept[0][0] for name, *_, kept in table["rows"] if "tdds" in name]
    assert lines["tdds"][1] == pytest.approx(kept_of_tdds)
    page = page_of([run], tmp_path / "report.html")
    head, row = next(row for row in page.rows if "Of the coreset" in row), page.row("tdds 80 %")
    titles = "Coreset, Removed, At random, Wrong labelsof 12, Of the coreset, Corrupted imagesof 18"
    assert [" ".join(cell.split()) for cell in head[:6]] == titles.split(", ")
    kept = next(kept for name, *_, kept in table["rows"] if name == f"{TDDS}_p0.8")
    assert row[3:5] == [f"{100 * share:.1f} %" for share in kept[0]]
    assert re.search(r"top right \(\d+ with a wrong label\)", page.text)


# ---- classes


def test_classes_that_lose_most_by_hand(tmp_path):
    run = start(tmp_path / "run", "gone.beton", 9)
    # class 7 and 8 have no image
    label_N = np.repeat([0, 1, 2, 3, 4, 5, 6], [10, 10, 10, 10, 10, 10, 4])
    num_kept_C = [0, 1, 8, 0, 5, 10, 3]
    of_class_C = [np.flatnonzero(label_N == label) for label in range(7)]
    index_M = np.concatenate([of_class_C[label][:num] for label, num in enumerate(num_kept_C)])
    add_scores(run, "el2n", label_N, num_classes=9)
    save_coreset(run.coresets / "a.npz", coreset_of("el2n", 0.5, index_M, label_N, 9))
    facts = read_facts(run)
    table = class_table(facts, "el2n", origins_of(facts))
    ((title, coresets, rows),) = table["panels"]
    assert (title, coresets) == ("", [("a", "el2n 50 %")])
    assert [total for _, total, _ in rows] == [10, 10, 10, 10, 10, 10, 4, 0, 0]
    assert [share for _, _, (share,) in rows] == [0, 10, 80, 0, 50, 100, 75, None, None]
    (extremes,) = table["extremes"]
    assert (extremes["num_lost"], extremes["lost"]) == (2, ["class 0", "class 3"])
    assert extremes["least"] == [("class 1", 10), ("class 4", 50), ("class 6", 75)]
    assert extremes["most"] == [("class 5", 100), ("class 2", 80)], "no class at both ends"
    assert (extremes["low"], extremes["middle"], extremes["high"]) == (0, 50, 100)
    assert extremes["kept"] == pytest.approx(100 * 27 / 64)
    page = page_of([run], tmp_path / "report.html")
    assert page.row("el2n 50 %")[5] == "2 class 0, class 3"
    assert page.row("class 7")[2] == "–"


def test_many_coresets_get_a_table_per_rate(tmp_path):
    run = with_scores(tmp_path / "run", rates=(0.3, 0.5, 0.8))
    for key in ("forgetting", "el2n", "aum", "moderate"):
        for rate in (0.5, 0.8):
            add_coreset(run, key, rate)
    facts = read_facts(run)
    table = class_table(facts, TDDS, origins_of(facts))
    panels = [(title, len(coresets)) for title, coresets, _ in table["panels"]]
    assert panels == [("30 %", 1), ("50 %", 5), ("80 %", 5)]
    assert len(table["extremes"]) == 11
    page = page_of([run], tmp_path / "report.html").text
    button = r'<input type="radio" name="r0-classes" id="r0-classes-(\d)"( checked)?>'
    assert re.findall(button, page) == [("0", " checked"), ("1", ""), ("2", "")]


# ---- size


@pytest.mark.filterwarnings("error")
def test_a_large_run_gives_a_small_page(tmp_path):
    """8 scores, 24 coresets and 1,000 classes: nothing is embedded per sample, and classes can be
    searched."""
    label_N = np.arange(100_000) % 1000
    run = start(tmp_path / "large", "gone.beton", 1000)
    finish(run, len(label_N))
    random = np.random.default_rng(0)
    base_N, rates = random.gamma(1, 1, len(label_N)), tuple(np.arange(1, 13) / 16)
    for key in (TDDS, SHORT, "forgetting", "el2n", "aum", "dual", "dyn_unc", "entropy"):
        normal_N, uniform_N = random.normal(size=len(label_N)), random.random(len(label_N))
        score_N = np.exp(base_N + normal_N) if "tdds" in key else base_N + uniform_N
        score_N = (np.round(score_N) if key == "forgetting" else score_N).astype(np.float32)
        score_N[:3] = np.inf if key == "el2n" else score_N[:3]
        add_scores(run, key, label_N, rates if key in (TDDS, "forgetting") else (), score_N, 1000)
    out = build_report([run], tmp_path / "report.html")
    assert out.stat().st_size < 1_500_000
    page = Page(out)
    page.check_references()
    text, svgs = page.text, re.findall(r"<svg.*?</svg>", page.text, re.DOTALL)
    for svg in svgs:  # charts take their colours from the page, also the picture of a map
        ElementTree.fromstring(svg)
        assert not re.search(r"#0c0|font-family|http|<style", svg)
        for name in re.findall(r'<mask id="(\w+)"><image ', svg):
            assert re.search(rf'fill="var\(--s\d\)" mask="url\(#{name}\)"', svg)
    assert "Counts are binned over all 100,000 images" in text
    assert "3 images have a score that is not finite" in text
    assert f"only coresets of {TDDS} are listed" in text
    assert text.count('<mask id="') == 4
    assert max(map(len, svgs)) < 40_000
    search = r'<input type="search"[^>]* aria-controls="r0-class-tables">'
    assert re.search(rf'"class-search" hidden><label>[\w ]+ {search}', text)
    assert '<div class="tabs" id="r0-class-tables">' in text


def test_classes_without_images_are_counted_and_not_all_named(tmp_path):
    run, label_N = start(tmp_path / "run", "gone.beton", 1000), np.arange(3000) % 1000
    add_scores(run, "el2n", label_N, (0.8,), num_classes=1000)
    page = page_of([run], tmp_path / "report.html").text
    assert "400</b>" in page  # 600 images are left, of the classes 400 to 999 one each
    assert "and 392 more" in page
