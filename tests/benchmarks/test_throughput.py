"""The throughput benchmark runs all of its loops for real, on the same images, and draws the right
conclusions from blocks."""

import functools
import json
import os
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import paired_loops, throughput
from benchmarks.bare_loops import BareLoop
from benchmarks.paired_loops import PAIRED, VARIANTS, Bench, Setting, measure_rank, order_of

NETWORK, NUM_IMAGES, ROUNDS = "shufflenet_v2_x0_5", 16, 2
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
LOOPS = ("off", "off again", "tdds", "all", "model")  # of ours


def measure_watched(evidence, setting, folder, run):
    """`measure_rank`, with a note of what every block did to weights, scorers and files."""
    bare, timed, init, notes = [], Bench.timed, BareLoop.__init__, []

    def remember(loop, *arguments):
        init(loop, *arguments)
        bare.append(loop)

    def look(bench, variant):
        models = [bench.trainer.model, *(loop._model for loop in bare)]
        closures = [bench.blocks[name].__closure__ for name in ("tdds", "all")]
        held = [[cell.cell_contents for cell in cells] for cells in closures]
        scorers = [next(item.scorer for item in of if hasattr(item, "scorer")) for of in held]

        def weights_of(model):
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

        def state():
            num_files = len(list((run / "trajectory").glob("epoch_*")))
            return [*map(weights_of, models)], [scorer.epoch for scorer in scorers], num_files

        weights, epochs, num_files = state()
        block = timed(bench, variant)
        weights_after, epochs_after, num_files_after = state()
        stayed = map(torch.equal, weights, weights_after)
        notes.append(
            {
                "variant": variant,
                "trained": [not same for same in stayed],
                "finite": all(bool(torch.isfinite(weight).all()) for weight in weights_after),
                "recorded": [b - a for a, b in zip(epochs, epochs_after, strict=True)],
                "files": num_files_after - num_files,
                "resident": bench.tap.is_resident,
                "waited": block["wait_seconds"] > 0,
            }
        )
        return block

    os.environ["TDDS_CPUS_PER_RANK"] = "1"
    BareLoop.__init__, Bench.timed = remember, look
    found = measure_rank(setting, folder, run)
    file = Path(evidence) / f"{setting.num_ranks}_{os.environ['RANK']}.json"
    file.write_text(json.dumps(notes))
    return found


def numbers_and_page(folder, words):
    """Run the benchmark with these options."""
    assert throughput.main([*words.split(), "--out", str(folder), "--name", "tiny"]) == 0
    path = folder / "throughput_tiny.json"
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.fixture(scope="module")
def result(forked_ranks, tmp_path_factory):
    """(numbers, page, notes by ranks and rank) of one run on one rank and one on two."""
    folder = tmp_path_factory.mktemp("throughput")
    watched = functools.partial(measure_watched, str(folder))
    functools.update_wrapper(watched, measure_watched)
    words = f"--setting {NETWORK},32,4,20,{NUM_IMAGES} --ranks 1 2 --rounds {ROUNDS} --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "measure_rank", watched)
        numbers, page = numbers_and_page(folder, words)
    notes = {path.stem: json.loads(path.read_text()) for path in folder.glob("?_?.json")}
    return numbers, page, notes


def test_all_variants_see_the_same_images_in_the_same_rounds(result):
    numbers, _, _ = result
    assert [row["num_ranks"] for row in numbers["rows"]] == [1, 2]
    for row in numbers["rows"]:
        assert row["images"] == dict.fromkeys(VARIANTS, NUM_IMAGES)
        num_rounds = {variant: ROUNDS if variant in PAIRED else 1 for variant in VARIANTS}
        assert {variant: len(rates) for variant, rates in row["rates"].items()} == num_rounds
        assert min(min(rates) for rates in row["rates"].values()) > 0
        assert row["peak_bytes"] > 2e8, "Python, torch and FFCV alone"
        assert 0.2 < row["peak_bytes"] / row["planned_bytes"] < 5


def test_every_block_does_what_its_name_says(result):
    """Weights move in the loops that train, scorers and the trajectory advance where they should,
    and only there."""
    _, _, notes = result
    assert sorted(notes) == ["1_0", "2_0", "2_1"]
    for of_rank in notes.values():
        assert {note["variant"] for note in of_rank} == set(VARIANTS)
        for note in of_rank:
            variant = note["variant"]
            is_of_loop = [variant in LOOPS, variant == "minimal", variant == "folder"]
            assert note["trained"] == is_of_loop, variant
            assert note["recorded"] == [variant == "tdds", variant in ("all", "scorer")], variant
            assert (note["files"] > 0) == (variant in ("all", "scorer")), variant
            assert note["waited"] == (variant in LOOPS), variant
            assert note["finite"]
            if variant in LOOPS:
                assert note["resident"] == (variant == "model"), variant


def test_metrics_and_page(result):
    numbers, page, _ = result
    for row in numbers["rows"]:
        label, metrics = row["label"], numbers["metrics"]
        off = metrics[f"{label}: our loop, scoring off, images/s"]
        assert off["value"] == statistics.median(row["rates"]["off"])
        assert (off["better"], off["relative"]) == ("higher", False)
        ratio = metrics[f"{label}: TDDS and trajectory / scoring off"]
        ratios = sorted(row["ratios"]["TDDS and trajectory / scoring off"])
        assert [ratio["min"], ratio["max"]] == ratios
        assert metrics[f"{label}: peak memory"]["value"] == row["peak_bytes"]
        section = page[page.index(f"## {label}") :]
        assert f"**the {row['limit']} is the limit**" in section
        for target in row["targets"]:
            line = next(line for line in section.splitlines() if target["ratio"] in line)
            assert f"{target['found']:.3f}" in line
            assert ("met" if target["met"] else "missed") in line


# ---- conclusions, from blocks that were made up


SETTING = Setting("resnet18", 32, 4, 5, 8, num_ranks=2, rounds=2)
SECONDS = {"off": 2.0, "off again": 2.0, "tdds": 2.1, "all": 2.5, "minimal": 1.9, "model": 1.0}
SECONDS |= {"folder": 4.0, "loader": 1.5, "ffcv": 1.4, "scorer": 0.4}


def blocks(seconds, images=4):
    alike = {"images": images, "wait_seconds": 0.5}
    return [
        alike | {"variant": name, "round": number, "seconds": seconds[name] * (1 + number)}
        for number in range(2)
        for name in order_of(number)
    ]


def ranks_with(first, second, **options):
    return [
        {"blocks": blocks(seconds, **options), "peak_bytes": peak, "threads": 1}
        for seconds, peak in ((first, 100), (second, 300))
    ]


def test_a_block_takes_as_long_as_its_slowest_rank():
    ranks = ranks_with(SECONDS, SECONDS | {"off": 1.0, "all": 3.0})
    row = throughput.summarise(SETTING, ranks, 200.0)
    assert row["rates"]["off"] == [8 / 2.0, 8 / 4.0]
    assert row["ratios"]["TDDS and trajectory / scoring off"] == pytest.approx([2 / 3, 2 / 3])
    # blocks of round 1 took twice as long, and the model was in round 0 only
    shares = {"model": 1 / 4.5, "loading": 2 / 4.5, "scoring": 1.5 / 4.5}
    assert row["shares"] == pytest.approx(shares)
    assert (row["peak_bytes"], row["planned_bytes"]) == (300, 200.0)
    assert row["waiting"] == pytest.approx((0.5 / 2 + 0.5 / 4) / 2)


@pytest.mark.parametrize("limit", ["loader", "model", "scorer"])
def test_the_slowest_part_alone_is_the_limit(limit):
    seconds = SECONDS | {limit: 1.9}
    assert throughput.summarise(SETTING, ranks_with(seconds, seconds), 1.0)["limit"] == limit


@pytest.mark.parametrize(
    ("device", "met"), [("cpu", [True, False, True]), ("cuda", [False, False, True])]
)
def test_targets_depend_on_the_device(device, met):
    seconds = SECONDS | {"tdds": 2.05, "all": 2.1, "minimal": 1.97}
    setting = Setting("resnet18", 32, 4, 5, 8, num_ranks=2, rounds=2, device=device)
    row = throughput.summarise(setting, ranks_with(seconds, seconds), 1.0)
    assert [target["met"] for target in row["targets"]] == met


def test_other_images_are_no_comparison():
    with pytest.raises(RuntimeError, match="blocks of 8 images had"):
        throughput.summarise(SETTING, ranks_with(SECONDS, SECONDS, images=3), 1.0)


def test_every_round_has_the_pairs_and_they_take_turns():
    rounds = [order_of(number) for number in range(2 * len(PAIRED))]
    assert all(set(PAIRED) <= set(names) and len(names) == len(set(names)) for names in rounds)
    assert [set(names) == set(VARIANTS) for names in rounds] == [True, False] * len(PAIRED)
    for variant in PAIRED:
        places = {[name for name in names if name in PAIRED].index(variant) for names in rounds}
        assert len(places) == len(PAIRED)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    words = "--setting resnet18,96,8,10,64 --ranks 1 --rounds 2"
    numbers, page = numbers_and_page(tmp_path, words)
    (row,) = numbers["rows"]
    assert row["device"] == "cuda"
    assert row["images"] == dict.fromkeys(paired_loops.VARIANTS, 64)
    assert [target["wanted"] for target in row["targets"]] == [0.995, 0.995, 0.98]
    assert 1e7 < row["peak_bytes"] < 4 * row["planned_bytes"]
    assert "max_memory_allocated" in page
    assert "waiting for a batch" not in page
