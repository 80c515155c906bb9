"""The page on which suspects are reviewed, and the way of its decisions back into a dataset."""

import csv

import numpy as np
import pytest

from tdds_dist.coreset.suspects import find_suspects
from tdds_dist.data.sources import open_source, with_new_labels
from tdds_dist.report.review import write_review
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.trajectory import TrajectoryWriter
from tests import make


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A collection on 60 images, one class of which is markup; the last image is the most
    suspicious."""
    manifest = make.manifest_of(make.write_images(tmp_path / "tr.beton"))
    found = make.start(tmp_path / "run", tmp_path / "tr.beton")
    label_N, order = manifest.label_N, np.arange(make.NUM_IMAGES)
    guess = {"p_label": order / 100, "other": (label_N + 1) % 4, "p_other": order / 200}
    num, digest = len(label_N), make.fingerprint(label_N, 4).labels_sha256
    writer = TrajectoryWriter(found.trajectory, SCALARS, num, 4, 0, num, True)
    writer.write_labels(label_N, digest)
    writer.append(0, np.tile(-np.float32(order), (len(SCALARS), 1)))
    make.finish(found, epochs=1)
    make.save(found.scores, make.scores("entropy", order, label_N, **guess))
    return found


def page(run: RunDir, num: int = 12) -> tuple[str, list[str]]:
    out = run.path / "review.html"
    notes = write_review(find_suspects([run.path]), run, out, num, "aum")
    return out.read_text(), notes


def test_a_card_for_each_of_the_most_suspicious(run):
    text, notes = page(run)
    assert notes == []
    assert [f'data-index="{index}"' in text for index in (48, 47)] == [True, False]
    assert text.count('class="suspect" src="data:image/') == 12
    assert make.EVIL_CLASS not in text
    assert "The 12 of 60 images" in text


def test_a_page_without_pictures_says_why(run):
    found = find_suspects([run.path])
    run.train_file().unlink()
    notes = write_review(found, run, run.path / "review.html", 5, "aum")
    assert len(notes) == 1
    assert notes[0].startswith("the page has no pictures: ")
    assert (run.path / "review.html").read_text().count("no picture</p>") == 5


@pytest.mark.browser
def test_decisions_are_kept_saved_and_written(run, tmp_path, browser):
    """Keep the first, take the network's class for the second, another one for the third, a name
    that is no class for the fourth; a reload changes nothing."""
    page(run)
    opened = browser.new_page(accept_downloads=True)
    faults: list[object] = []
    opened.on("pageerror", lambda fault: faults.append(fault))
    opened.goto((run.path / "review.html").as_uri())
    manifest = make.manifest_of(run.train_file())
    names, label_N = manifest.class_names, manifest.label_N
    cards = opened.query_selector_all(".card")
    cards[0].query_selector("input[value=keep]").check()
    cards[1].query_selector("input[value=other]").check()
    cards[2].query_selector(".as").fill(names[3])
    cards[3].query_selector(".as").fill("no class")
    said = "3 of 12 decided, 2 labels changed"
    assert opened.inner_text(".decided") == said
    opened.reload()
    assert opened.inner_text(".decided") == said
    with opened.expect_download() as download:
        opened.click(".save")
    download.value.save_as(tmp_path / "decisions.csv")
    assert not faults
    with (tmp_path / "decisions.csv").open(newline="") as file:
        rows = {int(row["index"]): row for row in csv.DictReader(file)}
    wanted = {59: names[label_N[59]], 58: names[(label_N[58] + 1) % 4], 57: names[3]}
    assert {index: row["new_label"] for index, row in rows.items()} == wanted
    source = open_source("synthetic:60,4,16")
    source = make.dataclasses.replace(source, class_names=names, path=manifest.path)
    relabelled = with_new_labels(source, [tmp_path / "decisions.csv"])
    assert [names[relabelled.label_N[index]] for index in wanted] == [*wanted.values()]
