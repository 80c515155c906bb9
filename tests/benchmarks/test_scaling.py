"""`benchmarks.scaling`: what it counts is what the formulas say; no time is judged."""

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.ranks import run_on_ranks
from benchmarks.scaling import DTYPES, Assumptions, main, measure_order, model, payload_bytes
from tdds_dist.distributed.partition import PADDING, epoch_order, rows_per_shard
from tdds_dist.scoring.scorer import steps_together

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
RANKS = [1, 2, 3, 4]
TINY = "--ranks 1 2 3 4 --num-classes 10 33 --rows 24 --steps 5 --repetitions 1 --orders 5000 20000 --order-ranks 4"
GIVEN = Assumptions(24, 4, 4, 8, 450.0, 50.0, 130.0, 3.6, 10.0, 35.0)


@pytest.fixture(scope="module")
def result(forked_ranks: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scaling")
    assert main([*TINY.split(), "--out", str(folder), "--name", "tiny"]) == 0
    page = (folder / "scaling_tiny.md").read_text()
    headings = ("Measured: routing", "Measured: the order", "Modelled, not measured")
    places = [page.index(f"## {heading}") for heading in headings]
    assert places == sorted(places)
    for said in ("130 us", "3.6 us", "450 GB/s", "50 GB/s", "35 ms", "gloo", "no source"):
        assert said in page, said
    return json.loads((folder / "scaling_tiny.json").read_text())


def leaving(world_size: int) -> tuple[float, float]:
    """Rows that leave a rank per step, and messages, by a loop over the last epoch: means over
    ranks and steps."""
    num_samples, steps = world_size * 24 * 5 - 1, 5
    order = epoch_order(num_samples, world_size * 24, epoch=1)
    shard, rows, messages = rows_per_shard(num_samples, world_size), 0, 0
    for rank in range(world_size):
        for index_B in order.of_rank(rank, world_size)[1]:
            owners = [int(index) // shard for index in index_B if index != PADDING]
            rows += sum(owner != rank for owner in owners)
            messages += len({owner for owner in owners if owner != rank})
    return rows / (steps * world_size), messages / (steps * world_size)


def test_a_step_moves_what_the_formula_and_the_model_say(result: dict[str, Any]) -> None:
    cases = [(row["world_size"], row["num_classes"], row["logits"]) for row in result["rows"]]
    assert cases == [
        (W, C, dtype) for W in RANKS for C in (10, 33) for dtype in ("float32", "float16")
    ]
    others = "all_reduce all_gather_into_tensor all_gather_object barrier".split()
    for row in result["rows"]:
        W, logit_bytes = row["world_size"], DTYPES[row["logits"]].itemsize
        row_bytes = row["num_classes"] * logit_bytes + 16
        assert row["bytes_per_step"] == row["formula_bytes"] == 24 * row_bytes
        assert row["calls_per_step"] == {"all_to_all_single": 1.0} | dict.fromkeys(others, 0.0)
        assert row["calls_at_epoch_end"]["all_to_all_single"] == 0
        assert row["calls_at_epoch_end"]["all_reduce"] >= 2, "values and coverage are agreed upon"
        rows, messages = leaving(W)
        assert row["sent_bytes"] == pytest.approx(rows * row_bytes)
        assert row["messages"] == pytest.approx(messages)
        assert all(len(values) == 1 and values[0] >= 0 for values in row["seconds"].values())
        assert row["seconds"]["wait"][0] <= row["seconds"]["record"][0]

        case = model(W, W * 24 * 5 - 1, row["num_classes"], replace(GIVEN, logit_bytes=logit_bytes))
        assert (case["step_bytes"], case["steps"]) == (row["bytes_per_step"], row["steps"])
        assert case["sent_bytes"] == pytest.approx(row["sent_bytes"], rel=0.15), (
            "owners are drawn, the model has their mean"
        )
        assert case["messages"] == pytest.approx(row["messages"], rel=0.01)
        one_row_more = 1.0 + 2.0 / (24 * 5)  # the scorer's tables have a row for padding
        assert 1.0 <= row["state_bytes"] / row["modelled_state_bytes"] <= one_row_more


def test_model_by_hand() -> None:
    """16 ranks in two nodes, 24 rows each, 10 classes: 56 bytes a row, 1.5 rows for each rank."""
    case = model(16, 16 * 24 * 10, 10, GIVEN)
    assert payload_bytes(1, 10, 4) == 56
    assert case["steps"] == 10
    assert case["pair_bytes"] == pytest.approx(84.0)
    assert case["sent_bytes"] == pytest.approx(15 * 84.0)
    assert case["network_bytes"] == pytest.approx(8 * 84.0)
    is_sent = 1.0 - (15 / 16) ** 24
    assert case["messages"] == pytest.approx(15 * is_sent)
    seconds = 130e-6 + is_sent * (7 * 3.6e-6 + 8 * 10e-6) + 7 * 84.0 / 450e9 + 8 * 84.0 / 50e9
    assert case["step_seconds"] == pytest.approx(seconds)
    assert case["share_of_step"] == pytest.approx(seconds / 35e-3)
    per_sample = 10 * 4 + 9 * 4 + 8 + 3 * 4 + 9 * 4 + 4
    assert case["state_bytes"] == 240 * per_sample
    assert case["checkpoint_bytes"] == 3840 * per_sample
    together = model(16, 16 * 24 * 10, 10, GIVEN, 4)
    is_sent = 1.0 - (15 / 16) ** 96
    assert together["messages"] == pytest.approx(15 * is_sent / 4)
    assert together["pair_bytes"] == pytest.approx(4 * 84.0)
    assert together["sent_bytes"] == case["sent_bytes"]
    seconds = (130e-6 + is_sent * (7 * 3.6e-6 + 8 * 10e-6)) / 4 + 7 * 84.0 / 450e9 + 8 * 84.0 / 50e9
    assert together["step_seconds"] == pytest.approx(seconds)
    lone = model(1, 1000, 10, GIVEN)
    assert (lone["sent_bytes"], lone["messages"]) == (0.0, 0.0)
    assert lone["step_seconds"] == pytest.approx(130e-6)


@pytest.mark.parametrize("world_size", [8, 16, 64, 256, 512, 1024])
def test_routing_costs_at_most_half_a_percent_of_a_step(world_size: int) -> None:
    """ImageNet's classes, 256 rows, 2-byte logits, 35 ms; at every number of ranks."""
    given = replace(GIVEN, rows=256, logit_bytes=2)
    together = steps_together(world_size, 256, 1000)
    assert model(world_size, 1_281_167, 1000, given, together)["share_of_step"] <= 0.005


def test_an_order_is_timed_from_nothing_and_per_step() -> None:
    # here, memory that earlier tests gave back would be used again; the kernel counts in lots
    (found,) = run_on_ranks(1, measure_order, 4_000_000, 1000, 4)
    assert 4 * 4_000_000 * 0.9 < found.pop("peak_bytes") < 60e6
    assert all(0 < seconds < 10 for seconds in found.values())
