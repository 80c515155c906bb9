"""`tdds plan --rehearse`: what ranks count is what the plan and the model on paper say, and counts
that are wrong would be seen."""

# B rows per rank and step, C classes, E exchanges, W world size

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling import Assumptions, model, payload_bytes, row_bytes
from tdds_dist.cli.main import main
from tdds_dist.config.run import load_config
from tdds_dist.config.scores import Window
from tdds_dist.distributed import collectives
from tdds_dist.distributed.collectives import fake_session
from tdds_dist.distributed.partition import SplitSizes, rows_per_shard, shard_bounds
from tdds_dist.errors import InputError
from tdds_dist.experiments import memory, rehearsal
from tdds_dist.experiments.needs import Case, Images, network_lines
from tdds_dist.experiments.rehearsal import rehearse
from tdds_dist.scoring.scorer import ShardedScorer, steps_together

C, B = 50, 16
CONFIG = Path(__file__).parents[2] / "configs/imagenet_resnet34.yaml"
SIGMAS = 5  # owners are drawn: the order has a fixed seed, and should not have to be a lucky one


def overrides(world_size):
    words = f"run.device=cuda model.name=resnet18 data.image_size=32 data.num_classes={C}"
    batch, windows = f"train.global_batch_size={B * world_size}", "score.windows=[{T: 30, K: 10}]"
    return [*words.split(), batch, windows]  # windows: those of the model on paper


def case_of(world_size, num_samples):
    config = load_config(CONFIG, overrides(world_size))
    return Case(config, Images(num_samples, "", 1), world_size)


def num_samples_of(world_size):
    """The epoch has 400 steps, and the last shard one row less."""
    return 400 * B * world_size - 1


def check(found, world_size):
    """Compare what was counted with the plan and with the model on paper.

    Exact are calls and state. Of the B x together rows of an exchange each goes to rank r with
    probability 1/W: rows that stay are binomial, and of W - 1 other ranks each gets a message with
    probability p, of which the variance is at most that of W - 1 independent draws (some rank's
    row is not another's). The mean over three ranks and E exchanges is compared.
    """
    case = case_of(world_size, num_samples := num_samples_of(world_size))
    together = steps_together(world_size, B, C)
    paper = model(world_size, num_samples, C, Assumptions(B, 2, 4, 8, 1, 1, 1, 1, 1, 1), together)
    assert found.planned["all_to_alls_per_pass"] == 1 / together
    assert list(found.by_rank) == [0, world_size // 2, world_size - 1]
    num = 3 * found.num_passes / together  # exchanges of all three
    mean = {
        key: sum(numbers[key] for numbers in found.by_rank.values()) / 3
        for key in ("messages_per_pass", "sent_bytes_per_pass")
    }
    p = 1 - (1 - 1 / world_size) ** (B * together)
    deviation = math.sqrt((world_size - 1) * p * (1 - p) / num) / together
    assert mean["messages_per_pass"] == pytest.approx(paper["messages"], abs=SIGMAS * deviation)
    stay = math.sqrt(B * together / world_size * (1 - 1 / world_size) / num) / together
    tolerance = SIGMAS * stay * payload_bytes(1, C, 2)
    assert tolerance < 0.07 * paper["sent_bytes"]
    for expected in (paper["sent_bytes"], found.planned["sent_bytes_per_pass"]):
        assert mean["sent_bytes_per_pass"] == pytest.approx(expected, abs=tolerance + 0.5)
    assert found.planned["sent_bytes_per_pass"] == network_lines(case)[0].value

    network, per_row = case.network, row_bytes(C, 4, Window(30, 10))
    largest = max(p.nbytes for p in memory.build_on_meta("resnet18", C).parameters())
    for rank, numbers in found.by_rank.items():
        assert numbers["all_to_alls_per_pass"] == 1 / together
        assert numbers["others_per_pass"] == 0
        planned = sum(memory.scorer_bytes(case.config, num_samples, world_size, rank).values())
        assert numbers["state_bytes"] == planned - 3 * 8, "the flags are of no sample"
        shorter = rank == world_size - 1
        on_paper = paper["state_bytes"] - shorter * per_row
        assert 0 < numbers["state_bytes"] - on_paper < per_row, "one row is for padding"
        # Of what all hold alike a rank gets nothing at least, and at most the mean and one more
        # tensor.
        share = memory.share_bytes(case.config, network, num_samples, world_size, rank)
        alike = memory._replicated_bytes(case.config, network) // world_size
        assert share - alike <= numbers["checkpoint_bytes"] <= share + largest + 100
        held = numbers["resident_bytes_with_state"] - numbers["resident_bytes_before"]
        assert held < numbers["state_bytes"] + 50e6
        assert numbers["resident_bytes_at_most"] > 0.9 * numbers["resident_bytes_with_state"]
        assert all(0 < numbers[f"{part}_ms"] < 1000 for part in ("order", "split_sizes", "record"))


@pytest.mark.parametrize("world_size", [8, 64, 1024])
def test_counts_are_those_of_the_plan_and_of_the_model_on_paper(world_size):
    config = load_config(CONFIG, overrides(world_size))
    random = torch.get_rng_state()
    found = rehearse(config, world_size, num_samples_of(world_size))
    check(found, world_size)
    assert torch.equal(torch.get_rng_state(), random)
    assert not dist.is_initialized()


def one_more_collective(monkeypatch):
    record = ShardedScorer.record

    def recording(scorer, *arguments):
        collectives.sum_over_ranks(torch.zeros(1))
        record(scorer, *arguments)

    monkeypatch.setattr(ShardedScorer, "record", recording)


def messages_to_all(monkeypatch):
    take = SplitSizes.take

    def taking(sizes, *arguments):
        sends, receives = take(sizes, *arguments)
        return [max(1, rows) for rows in sends], receives

    monkeypatch.setattr(SplitSizes, "take", taking)


def rows_travel_alone(monkeypatch):
    monkeypatch.setattr("tdds_dist.scoring.scorer.steps_together", lambda *_: 1)


def two_exchanges(monkeypatch):
    exchange = collectives.exchange_rows

    def exchanging(rows_BX, sends, receives):
        exchange(rows_BX[:0], [0] * len(sends), [0] * len(sends))
        return exchange(rows_BX, sends, receives)

    monkeypatch.setattr(collectives, "exchange_rows", exchanging)


def more_state(monkeypatch):
    allocate = ShardedScorer._allocate

    def allocating(scorer):
        allocate(scorer)
        scorer._average_AM = torch.cat([scorer._average_AM, scorer._average_AM])

    monkeypatch.setattr(ShardedScorer, "_allocate", allocating)


@pytest.mark.parametrize(
    "fault", [one_more_collective, messages_to_all, rows_travel_alone, two_exchanges, more_state]
)
def test_a_fault_would_be_seen(fault, monkeypatch):
    config = load_config(CONFIG, overrides(64))
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(rehearse(config, 64, num_samples_of(64)), 64)
    assert not dist.is_initialized()


@pytest.mark.parametrize("world_size", [1, 3, 64])
def test_rows_that_arrive_are_those_of_the_shard(world_size):
    """In an epoch that is rehearsed as a whole every sample comes once, also where shards are short
    or empty and the last step is padded."""
    num_samples = 10 * B * world_size - B * world_size // 2 - 1
    case = case_of(world_size, num_samples)
    order = rehearsal._order(case)
    exchanges = rehearsal._exchanges(order.num_steps, case.route_every)
    assert [step for steps in exchanges for step in steps] == [*range(10)]
    arriving = rehearsal._arriving(order, range(world_size), world_size, exchanges)
    for rank in {0, world_size // 2, world_size - 1}:
        with fake_session(rank, world_size) as world:
            _, tensors = rehearsal._rehearse(case, world, order, exchanges, arriving[rank])
            first, end = shard_bounds(num_samples, world_size, rank)
            visits_M = collectives.own_rows(tensors["observer/visits"])
            assert visits_M.tolist() == [1] * (end - first)


def test_three_ranks_write_all_of_a_checkpoint():
    num_samples = num_samples_of(3)
    case = case_of(3, num_samples)
    found = rehearse(case.config, 3, num_samples)
    network, config = case.network, case.config
    own = network.buffers + memory._RANDOM_STATE_BYTES + 3 * 8  # sums of the metrics
    small = 2 * 8 + 4 * 8  # where the scorer is, and its one window
    rows = num_samples * row_bytes(C, 4, Window(30, 10))
    written = sum(numbers["checkpoint_bytes"] for numbers in found.by_rank.values())
    assert written == memory._replicated_bytes(config, network) + rows + 3 * own + small


def test_state_that_does_not_fit_names_ranks_with_which_it_does(monkeypatch):
    num_samples = 40_000
    alone = sum(memory.scorer_bytes(case_of(1, 1).config, num_samples, 2).values())
    monkeypatch.setattr(rehearsal, "available_bytes", lambda: alone)
    with pytest.raises(InputError) as caught:
        rehearse(load_config(CONFIG, overrides(2)), 2, num_samples)
    said = str(caught.value)
    assert "more than the " in said
    ranks, batch = re.search(r"--rehearse (\d+) (train.global_batch_size=\d+):", said).groups()
    config = load_config(CONFIG, [*overrides(2), batch])
    assert len(rehearse(config, int(ranks), num_samples).by_rank) == 3
    monkeypatch.setattr(rehearsal, "available_bytes", lambda: 10)
    with pytest.raises(InputError, match="rehearse on a machine with more memory"):
        rehearse(load_config(CONFIG, overrides(2)), 2, num_samples)


def test_a_process_group_is_left_alone():
    config = load_config(CONFIG, overrides(2))
    with fake_session(0, 5), pytest.raises(InputError, match="there is a process group already"):
        rehearse(config, 2, 1000)
    assert not dist.is_initialized()


def test_the_command(capsys):
    words = ["plan", str(CONFIG), *overrides(8), "--num-samples", "20000", "--rehearse", "8"]
    assert main([*words, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["by_rank"].keys() == {"0", "4", "7"}
    assert main(words) == 0
    printed = capsys.readouterr().out
    state = numbers["by_rank"]["0"]["state_bytes"]
    assert re.search(rf"state of the scorer.* {rehearsal.size(state)} ", printed)
    assert rows_per_shard(20000, 8) * C * 4 < state
    for more, said in (
        (["--disk", "1TB"], "--disk means nothing with --rehearse"),
        (["--from", "RUN"], "--from means nothing with --rehearse"),
        (["data.order=blocks"], "rehearse data.order=random"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert main([*words[:-1], "0"]) == 2
    assert "--rehearse=0 must be at least 1" in capsys.readouterr().err


def test_an_order_of_blocks_is_that_of_the_file(config_file, monkeypatch):
    """Other ranks visit the samples, so each sends other rows."""
    monkeypatch.setattr("tdds_dist.data.loader.BLOCK_BYTES", 1)  # an image is a block
    sent = {}
    for order in ("random", "blocks"):
        found = rehearse(load_config(config_file, [f"data.order={order}"]), 4)
        sent[order] = [numbers["sent_bytes_per_pass"] for numbers in found.by_rank.values()]
    assert sent["random"] != sent["blocks"]
