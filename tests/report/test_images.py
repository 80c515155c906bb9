"""The images of the report: which ones are in the page, their thumbnails within a budget, and each
of them once."""

import dataclasses
import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pytest
from PIL import Image

from tdds_dist.data.beton import inspect_beton, read_images
from tdds_dist.data.manifest import manifest_path
from tdds_dist.report.images import Sheet, by_need, score_sheets, sheets, spread, thumbnails
from tdds_dist.report.page import build_report
from tdds_dist.report.read import Facts, read_facts
from tdds_dist.report.scores import Origins, origin
from tdds_dist.runs.artifacts import fingerprint
from tests.make import (
    EVIL_CLASS,
    EVIL_PATH,
    NUM_CLASSES,
    NUM_IMAGES,
    add_scores,
    coreset,
    start,
    write_images,
)

if TYPE_CHECKING:
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16-pixel images, some with wrong labels, some corrupted."""
    return write_images(tmp_path_factory.mktemp("data") / "tiny.beton", 16, 0.2, 0.3)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "large.beton", 256)


def facts_of(
    folder: Path, beton: Path, scores: dict[str, np.ndarray], rates: tuple[float, ...] = ()
) -> tuple[Facts, Origins]:
    """Facts of a run with these scores [N], each with its top as coresets at these pruning
    rates."""
    run = start(folder, beton)
    for key, score_N in scores.items():
        add_scores(run, key, inspect_beton(beton).label_N, rates, score_N)
    facts = read_facts(run)
    return facts, {name: origin(facts, coreset) for name, coreset in facts.coresets.items()}


def rendered(shown: dict[str, Any]) -> str:
    """The section as it stands in the page."""
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("tdds_dist.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page.filters["count"] = lambda value: f"{value:,}"
    return page.get_template("images.html.j2").render(
        s={"sheets": shown, "main": "tdds", "noise": None}, id="r0", h=2
    )


def store_of(text: str) -> dict[str, Any]:
    """What the script finds."""
    found = re.findall(
        r'<script type="application/json" class="image-store">(.*?)</script>', text, re.DOTALL
    )
    assert len(found) == 1
    return json.loads(found[0])


def ranks(score_N: np.ndarray) -> np.ndarray:
    rank_N = np.empty(len(score_N), np.int64)
    rank_N[np.argsort(score_N)] = np.arange(len(score_N))
    return rank_N


# ---- which images


# 144: as many golden steps nearly end where they began
@pytest.mark.parametrize("num_classes", [1, 2, 10, 100, 144])
def test_sample_is_spread_over_classes_and_ranks(num_classes):
    rng = np.random.default_rng(3)
    label_N = rng.permutation(np.repeat(np.arange(num_classes), 500))
    score_N = rng.gamma(1.0, 1.0, len(label_N))
    sample = spread(score_N, label_N)
    assert len(sample) == len(set(sample)) >= 390
    assert set(label_N[sample[:num_classes]]) == set(range(num_classes)), (
        "first one image of every class"
    )
    num_C = np.bincount(label_N[sample], minlength=num_classes)
    assert num_C.min() >= 0.97 * num_C.max() - 1
    for label in range(num_classes):
        members = np.flatnonzero(label_N == label)
        shown = np.isin(members, sample)
        gaps = np.diff([-1, *np.sort(ranks(score_N[members])[shown]), 500])
        assert gaps.max() <= 3 * 500 / (shown.sum() + 1), "no large part of the ranking is left out"
    across = ranks(score_N)[sample[:num_classes]] / len(label_N)
    assert num_classes < 10 or across.std() > 0.2, (
        "the first images of the classes are not all of one rank"
    )


def test_sample_of_uneven_classes_and_odd_scores():
    label_N = np.array([7] * 50 + [2] + [0] * 3)
    score_N = np.full(54, np.nan)
    score_N[:30] = np.inf
    sample = spread(score_N, label_N)
    assert sorted(sample) == list(range(54)), "everything, where there are few"
    assert set(label_N[sample[:3]]) == {0, 2, 7}
    sample = spread(np.arange(9000.0), np.arange(9000) // 2)
    assert len(sample) == 4000
    labels = {index // 2 for index in sample}
    assert len(labels) == 4000
    assert max(labels) > 4400, "of more classes than there is room for, not the first ones"


def test_images_that_say_most_come_first():
    found = [
        Sheet("highest", [9, 8, 7]),
        Sheet("lowest", [0, 1, 2]),
        Sheet("below", [3, 4, 5], 0.5, 6.0),
        Sheet("above", [6, 7], 0.5, 6.0),
    ]
    assert by_need(found) == [9, 0, 5, 6, 8, 1, 4, 7, 2, 3]


def test_sheets_of_every_plain_cut(tiny, tmp_path):
    score_N = np.random.default_rng(0).permutation(NUM_IMAGES).astype(float)
    facts, origins = facts_of(tmp_path / "run", tiny, {"tdds": score_N}, (0.0, 0.3, 0.5, 0.8))
    odd = facts.coresets["odd"] = coreset(
        "tdds", 0.6, np.arange(1, NUM_IMAGES, 2), facts.scores["tdds"].label_N
    )
    found = score_sheets(facts, "tdds", origins | {"odd": origin(facts, odd)}, 6)
    by_score = np.argsort(score_N).tolist()
    assert [(sheet.kind, sheet.rate, sheet.cut) for sheet in found] == [
        ("highest", None, None),
        ("lowest", None, None),
        ("below", 0.8, 48),
        ("above", 0.8, 48),
        # the score's own top, not the other selection that there is
        ("below", 0.6, 36),
        ("above", 0.6, 36),
        ("below", 0.5, 30),
        ("above", 0.5, 30),
        ("below", 0.3, 18),
        ("above", 0.3, 18),
    ]
    assert [sheet.index for sheet in found[:4]] == [
        by_score[:-7:-1],
        by_score[:6],
        by_score[45:48],
        by_score[48:51],
    ]


def test_every_score_is_cut_at_the_rates_of_all_coresets(tiny, tmp_path):
    rng = np.random.default_rng(0)
    scores = {
        key: rng.permutation(NUM_IMAGES).astype(float)
        for key in ("tdds", "el2n", "moderate", "aum")
    }
    scores["aum"][3] = np.nan
    facts, _ = facts_of(tmp_path / "run", tiny, scores)
    facts.coresets["tdds_p0.5"] = coreset("tdds", 0.5, np.arange(30), facts.scores["tdds"].label_N)
    rates = {
        name: [
            (sheet.kind, sheet.rate, sheet.cut) for sheet in score_sheets(facts, name, {}, 6)[2:]
        ]
        for name in scores
    }
    assert rates["el2n"] == [("below", 0.5, 30), ("above", 0.5, 30)]
    assert rates["moderate"] == [], "two cuts"
    assert rates["aum"] == [], "not finite"
    by_score = np.argsort(scores["el2n"]).tolist()
    assert [sheet.index for sheet in score_sheets(facts, "el2n", {}, 6)[2:]] == [
        by_score[27:30],
        by_score[30:33],
    ]


@pytest.mark.browser
def test_a_filter_puts_what_fits_first_and_nan_comes_last(tiny, tmp_path, browser):
    rng = np.random.default_rng(0)
    score_N = rng.permutation(NUM_IMAGES).astype(float)
    score_N[[5, 20, 40]], score_N[[7, 8]] = np.nan, np.inf
    facts, _ = facts_of(tmp_path / "run", tiny, {"tdds": score_N})
    page = browser.new_page()
    page.goto(build_report([facts.run], tmp_path / "report.html", num_thumbnails=2).as_uri())
    section = page.locator("section.images")
    heads = section.locator("h3")
    assert heads.all_inner_texts() == [
        "Highest scores: kept longest",
        "Lowest scores: removed first",
        "A sample of all images",
    ]
    section.locator(".sheet-more").click()
    shown = section.locator(".everything b").all_inner_texts()
    assert shown == [f"{value:.4g}" for value in np.sort(score_N)]  # NumPy puts NaN last as well
    facts_label = facts.scores["tdds"].label_N
    label = int(facts_label[np.argsort(score_N)[NUM_IMAGES // 2]])
    in_class_N = facts_label == label
    section.locator(".filter-class").select_option(str(label))
    texts = heads.all_inner_texts()
    assert texts[0] == f"The {in_class_N.sum()} images in this page that fit, lowest score first"
    assert section.locator(".everything b").all_inner_texts() == [
        f"{value:.4g}" for value in np.sort(score_N[in_class_N])
    ]
    assert len(texts) == 1 + section.locator(".sheets ul").count()
    assert all(each.locator("img").count() for each in section.locator(".sheets ul").all()), (
        "no group is empty"
    )
    section.locator(".filter-low").fill("1000")
    section.locator(".filter-high").fill("1001")
    assert heads.all_inner_texts() == ["No image in this page fits the filters"]
    section.locator(".filter-reset").click()
    assert heads.all_inner_texts()[-1] == "A sample of all images"
    tops = page.evaluate(
        "[...document.querySelectorAll('.choices label')].filter(each => !each.hidden &&"
        " each.offsetParent).map(each => [each.parentNode ==="
        " document.querySelector('.filter-class').closest('p'), each.getBoundingClientRect().top])"
    )
    assert len({top for is_filter, top in tops if is_filter}) == 1
    page.close()


def test_nan_scores_are_in_no_sheet(tiny, tmp_path):
    score_N = np.arange(NUM_IMAGES, dtype=float)
    score_N[[0, 30, 59]], score_N[58] = np.nan, np.inf
    facts, origins = facts_of(tmp_path / "run", tiny, {"tdds": score_N})
    highest, lowest = score_sheets(facts, "tdds", origins, 3)
    assert (highest.index, lowest.index) == ([58, 57, 56], [1, 2, 3])
    text = rendered(sheets(facts, "tdds", origins, 3))
    assert next(image["scores"] for image in store_of(text)["images"] if image["index"] == 58) == [
        "inf"
    ]


# ---- thumbnails


def picture(uri: str) -> Image.Image:
    head, data = uri.split(",")
    found = Image.open(BytesIO(b64decode(data)))
    assert head == f"data:image/{found.format.lower()};base64"
    return found


def test_thumbnails_shrink_until_they_fit(large):
    info = inspect_beton(large)
    sizes = {}
    for side in (224, 112, 80):
        uris, bad = thumbnails(info, range(NUM_IMAGES), 10**9, (side,))
        sizes[side] = sum(map(len, uris.values()))
        assert (len(uris), bad) == (NUM_IMAGES, [])
        assert {max(picture(uri).size) for uri in uris.values()} == {side}
    assert sizes[224] > 1.5 * sizes[112] > 1.5 * sizes[80]
    for side, total in sizes.items():
        uris, _ = thumbnails(info, range(NUM_IMAGES), int(1.1 * total))
        assert len(uris) == NUM_IMAGES
        assert {max(picture(uri).size) for uri in uris.values()} == {side}
    uris, _ = thumbnails(info, range(NUM_IMAGES - 1, -1, -1), sizes[80] // 2)
    assert sizes[80] // 3 < sum(map(len, uris.values())) <= sizes[80] // 2
    assert list(uris) == list(range(NUM_IMAGES - 1, NUM_IMAGES - 1 - len(uris), -1)), (
        "what does not fit is at the end"
    )
    assert thumbnails(info, [], 100) == ({}, [])
    assert thumbnails(info, [3], 0) == ({}, [])


def test_tiny_images_keep_their_pixels(tiny):
    info = inspect_beton(tiny)
    uris, _ = thumbnails(info, [3, 5], 10**6)
    for image, uri in zip(read_images(tiny, [3, 5], info), uris.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(picture(uri)), image)


def test_a_damaged_image_is_left_out(large, tmp_path):
    data, info = bytearray(large.read_bytes()), inspect_beton(large)
    for number in (4, 11):
        start = int(info.data_ptr_N[number])
        data[start : start + 20] = bytes(20)
    beton = tmp_path / "damaged.beton"
    beton.write_bytes(data)
    manifest_path(beton).write_bytes(manifest_path(large).read_bytes())
    uris, bad = thumbnails(inspect_beton(beton), range(NUM_IMAGES), 10**9)
    assert (sorted(uris), bad) == (sorted({*range(NUM_IMAGES)} - {4, 11}), [4, 11])
    facts, origins = facts_of(tmp_path / "run", beton, {"tdds": np.arange(NUM_IMAGES)})
    shown = sheets(facts, "tdds", origins, 6)
    assert (shown["num_images"], shown["num_bad"]) == (NUM_IMAGES - 2, 2)
    text = rendered(shown)
    assert "58 of 60 images are in this page" in text
    assert "2 more cannot be decoded" in text
    assert [image["index"] for image in shown["sheets"][1]["pictures"]] == [0, 1, 2, 3, 5]
    assert shown["sheets"][1]["note"].startswith("5 images")


# ---- the page


def test_every_thumbnail_stands_in_the_page_once(tiny, tmp_path):
    rng = np.random.default_rng(1)
    scores = {
        "tdds": np.arange(NUM_IMAGES),
        "el2n": rng.random(NUM_IMAGES),
        "random": rng.random(NUM_IMAGES),
    }
    facts, origins = facts_of(tmp_path / "run", tiny, scores, (0.5, 0.8))
    text = rendered(sheets(facts, "tdds", origins, 40))
    store = store_of(text)
    uris = re.findall(r'"(data:image/[^"]*)"', text)
    assert len(uris) == NUM_IMAGES == len(store["images"])
    images = re.findall(r'<img src="(data:[^"]*)" data-index="(\d+)"', text)
    assert len(images) == len({index for _, index in images}), (
        "also where two sheets without scripts show it"
    )
    in_store = {image["index"]: image["src"] for image in store["images"] if image["src"]}
    assert {*in_store, *(int(index) for _, index in images)} == set(range(NUM_IMAGES))
    assert not {*in_store} & {int(index) for _, index in images}
    expected, _ = thumbnails(inspect_beton(tiny), range(NUM_IMAGES), 10**9)
    assert in_store | {int(index): uri for uri, index in images} == expected, (
        "each index has its own picture"
    )
    assert text.count("shown above") == 40 + 40 + 20 + 12 - NUM_IMAGES

    assert [score["name"] for score in store["scores"]] == ["tdds", "el2n"], (
        "the order of a random score says nothing"
    )
    for place, score in enumerate(store["scores"]):
        assert [sheet["rate"] for sheet in score["sheets"]] == [
            None,
            None,
            "80 %",
            "80 %",
            "50 %",
            "50 %",
        ]
        for image in store["images"]:
            assert (
                image["scores"][place] == f"{np.float32(scores[score['name']][image['index']]):.4g}"
            )


@pytest.fixture
def plain(tiny: Path, tmp_path: Path) -> tuple[Facts, Origins]:
    """Two scores in the order of the images."""
    return facts_of(
        tmp_path / "run", tiny, dict.fromkeys(("tdds", "moderate"), np.arange(NUM_IMAGES))
    )


def test_names_cannot_leave_the_store(plain):
    facts, origins = plain
    facts.manifest.path[1] = "a\udcff.png"  # of a file whose name is no UTF-8
    text = rendered(sheets(facts, "tdds", origins, 4))
    text.encode()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    store = store_of(text)
    assert next(image["path"] for image in store["images"] if image["index"] == 0) == EVIL_PATH
    assert EVIL_CLASS in {image["class_name"] for image in store["images"]}


def test_known_noise_can_be_chosen_and_the_centre_is_not_called_removed(plain, tmp_path):
    facts, origins = plain
    store = store_of(rendered(sheets(facts, "tdds", origins, 4)))
    assert store["known"] == ["true_class", "corruption"]
    noisy = {image["index"]: image for image in store["images"] if image["true_class"] is not None}
    assert sorted(noisy) == np.flatnonzero(facts.manifest.noisy_N).tolist()
    names = facts.manifest.class_names
    assert all(
        image["true_class"]
        == names[facts.manifest.true_label_N[index]]
        != image["class_name"]
        == names[image["label"]]
        for index, image in noisy.items()
    )
    corrupted = [image["index"] for image in store["images"] if image["corruption"]]
    assert sorted(corrupted) == np.flatnonzero(facts.manifest.corrupted_N).tolist()
    assert [[sheet["head"] for sheet in score["sheets"]] for score in store["scores"]] == [
        ["Highest scores: kept longest", "Lowest scores: removed first"],
        ["Highest scores", "Lowest scores"],
    ]
    facts, origins = facts_of(
        tmp_path / "other", write_images(tmp_path / "clean.beton"), {"tdds": np.arange(NUM_IMAGES)}
    )
    assert store_of(rendered(sheets(facts, "tdds", origins, 4)))["known"] == []


def test_budget_is_kept_and_shared_by_sheets_and_classes(large, tmp_path):
    rng = np.random.default_rng(1)
    facts, origins = facts_of(
        tmp_path / "run",
        large,
        {key: rng.random(NUM_IMAGES) for key in ("tdds", "el2n", "aum")},
        (0.5,),
    )
    uris, _ = thumbnails(inspect_beton(large), range(NUM_IMAGES), 10**9, (112,))
    budget = sum(map(len, uris.values())) * 30 // NUM_IMAGES
    shown = sheets(facts, "tdds", origins, 10, budget)
    text = rendered(shown)
    assert 0.8 * budget < sum(map(len, re.findall(r'"(data:image/[^"]*)"', text))) <= budget
    assert 20 < shown["num_images"] < NUM_IMAGES
    assert f"{shown['num_images']} of 60 images are in this page" in text
    store = store_of(text)
    assert {image["label"] for image in store["images"]} == set(range(NUM_CLASSES))
    sizes = [len(sheet["index"]) for score in store["scores"] for sheet in score["sheets"]]
    assert len(sizes) == 3 * 4
    assert min(sizes) >= 2, "no sheet goes without"
    for score in store["scores"]:
        for sheet in score["sheets"]:
            assert sheet["note"].startswith(f"{len(sheet['index'])} images")
    assert {
        index for score in store["scores"] for sheet in score["sheets"] for index in sheet["index"]
    } <= {image["index"] for image in store["images"]}


def test_runs_share_the_budget_of_the_page(large, tmp_path, monkeypatch):
    facts = [
        facts_of(tmp_path / name, large, {"tdds": np.arange(NUM_IMAGES)})[0] for name in ("a", "b")
    ]
    monkeypatch.setattr("tdds_dist.report.page.BUDGET_BYTES", 500_000)
    sizes = [
        sum(
            map(
                len,
                re.findall(
                    r'"(data:image/[^"]*)"',
                    build_report(runs, tmp_path / "report.html").read_text(),
                ),
            )
        )
        for runs in ([facts[0].run], [facts[0].run, facts[1].run])
    ]
    assert max(sizes) <= 500_000
    assert min(sizes) > 300_000


def test_scores_of_other_labels_are_left_out(plain):
    facts, origins = plain
    found = facts.scores["moderate"]
    other_N = (found.label_N + 1) % NUM_CLASSES
    facts.scores["moderate"] = dataclasses.replace(
        found, label_N=other_N, fingerprint=fingerprint(other_N, NUM_CLASSES)
    )
    assert [score["name"] for score in sheets(facts, "tdds", origins, 4)["store"]["scores"]] == [
        "tdds"
    ]
    assert "another dataset" in sheets(facts, "moderate", origins, 4)["note"]
