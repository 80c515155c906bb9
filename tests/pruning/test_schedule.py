"""Sets that do not depend on ranks or interruptions, and what is recorded of them."""

import shutil

import numpy as np
import pytest
import torch

from tdds_dist import Checkpoints, ShardedScorer, Window
from tdds_dist.config.run import Baselines
from tdds_dist.coreset.select import make_coreset
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import ALL, epoch_order
from tdds_dist.pruning.plan import BY_RUN, PruningPlan
from tdds_dist.pruning.schedule import PruningSchedule, record_problem
from tdds_dist.runs.artifacts import load_scores
from tdds_dist.scoring import offline
from tests import make
from tests.ranks import catch, run_ranks
from tests.scoring.test_scorer import random_stream

N, CLASSES, BATCH, EPOCHS = 61, 7, 12, 7
BASELINES = Baselines(el2n_epochs=2, uncertainty_window=2)
WINDOW = Window(EPOCHS, 3, 0.9)
PLANS = {
    "static": {"rate": 0.4, "start": 3, "importance": "sample"},
    "refresh": {"rate": 0.6, "start": 3, "every": 2, "explore": 0.2, "full_last": 1},
    "infobatch": {"rate": 0.5},
    "hard_first": {"threshold": 0.2, "least": BATCH},
    "progressive": {"rate": 0.4, "drawn": 0.8},
}


class Run:
    """A recorded stream and a schedule that says which of its rows come."""

    def __init__(self, method, folder, twin=False, twin_of=None, **more):
        settings = PLANS[method] | more
        self.world = distributed.current_world("cpu")
        self.logits_TNC, self.label_N = random_stream(N, CLASSES, EPOCHS)
        recorded = folder / "trajectory" if "score" in settings else None
        self.scorer = ShardedScorer(
            N, CLASSES, [WINDOW], device="cpu", trajectory=recorded, partial_epochs=True
        )
        plan = PruningPlan(method, N, EPOCHS, seed=4, twin=twin, **settings)
        self.schedule = PruningSchedule(
            plan,
            self.scorer,
            window=WINDOW,
            baselines=BASELINES,
            folder=folder / "sets",
            twin_of=twin_of,
        )
        self.checkpoints = Checkpoints(folder / "checkpoints", self.world, asynchronous=False)
        self.seen = []  # by epoch the set, as bytes
        self.counts = np.zeros((EPOCHS, N), dtype=int)  # own visits of this rank

    def resume(self):
        found = self.checkpoints.latest()
        state = self.scorer.state_dict()
        self.checkpoints.load(found, state)
        self.scorer.load_state_dict(state)
        return self.schedule.recall(self.scorer.epoch, found.record["visits"])

    def go(self, leave_at=None, resume=False):
        """Record until the end, or save and leave before that (epoch, step); then go on there."""
        scorer = self.scorer
        visits = self.resume() if resume else self.schedule.decide(0)
        while True:
            self.note(visits)
            subset_M = visits.subset_M
            size = N if subset_M is None else len(subset_M)
            order = epoch_order(size, BATCH, seed=4, epoch=scorer.epoch, subset=subset_M)
            samples, indices = order.of_rank(self.world.rank, self.world.world_size)
            scorer.expect(order, scorer.step)
            for step in range(scorer.step, order.num_steps):
                if (scorer.epoch, step) == leave_at:
                    self.checkpoints.save(
                        1, scorer.state_dict(), {"visits": visits.digest}, wait=True
                    )
                    return self
                sample_B = torch.from_numpy(samples[step].copy())
                index_B = torch.from_numpy(indices[step].copy())
                self.counts[scorer.epoch] += np.bincount(index_B[index_B >= 0], minlength=N)
                scorer.record(
                    index_B, self.logits_TNC[scorer.epoch][sample_B], self.label_N[sample_B]
                )
            scorer.end_epoch()
            if scorer.epoch == EPOCHS:
                return self
            visits = self.schedule.decide(scorer.epoch)

    def note(self, visits):
        kept = b"" if visits.subset_M is None else visits.subset_M.tobytes()
        weight = b"" if visits.weight_N is None else visits.weight_N.tobytes()
        self.seen.append((self.scorer.epoch, visits.digest, kept, weight))

    def outcome(self):
        return self.seen, self.scorer.gather()[WINDOW].numpy().tobytes()


def kept_in(run, epoch):
    """What an epoch visited, by its bytes."""
    (kept,) = {kept for number, _, kept, _ in run.seen if number == epoch}
    return np.frombuffer(kept, dtype=np.int64) if kept else np.arange(N)


def _on_ranks(rank, folder):
    whole = {}
    for method in PLANS:
        for twin in (False, True):
            own = folder / f"{method}False" / "sets" if twin and method in BY_RUN else None
            run = Run(method, folder / f"{method}{twin}", twin, own).go()
            whole[method, twin] = run.outcome(), run.counts
    return whole


def _left(rank, folder, places):
    for method, place in places.items():
        Run(method, folder / method).go(leave_at=place)


def _gone_on(rank, folder, places):
    return {method: Run(method, folder / method).go(resume=True).outcome() for method in places}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return _on_ranks(0, tmp_path_factory.mktemp("alone"))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_sets_weights_and_scores_are_the_same_bits_on_any_ranks(world_size, alone, tmp_path):
    """And each scheduled sample is handed over once in its epoch, over all ranks, the others not at
    all."""
    found = run_ranks(world_size, _on_ranks, tmp_path)
    for case, (outcome, _) in alone.items():
        assert all(of_rank[case][0] == outcome for of_rank in found), case
        counts_TN = sum(of_rank[case][1] for of_rank in found)
        for epoch, _, kept, _ in outcome[0]:
            expected = np.ones(N, int)
            if kept:
                expected = np.bincount(np.frombuffer(kept, np.int64), minlength=N)
            assert counts_TN[epoch].tolist() == expected.tolist(), (case, epoch)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 3), (3, 2), *(pytest.param(*ranks, marks=pytest.mark.slow) for ranks in ((2, 1), (3, 1)))],
)
def test_a_run_that_goes_on_has_the_same_sets_weights_and_scores(before, after, alone, tmp_path):
    """Stopped at a random (epoch, step), each method at another."""
    draws = np.random.default_rng([before, after])
    places = {method: (int(draws.integers(EPOCHS)), int(draws.integers(2))) for method in PLANS}
    places["hard_first"] = (places["hard_first"][0], 0)  # may have one step only
    run_ranks(before, _left, tmp_path, places)
    for found in run_ranks(after, _gone_on, tmp_path, places):
        for method, (seen, scores) in found.items():
            whole_seen, whole_scores = alone[method, False][0]
            assert seen == whole_seen[places[method][0] :], method
            assert scores == whole_scores, method


def test_static_keeps_what_select_would_of_a_collection(tmp_path):
    run = Run("static", tmp_path).go()
    scorer = ShardedScorer(N, CLASSES, [Window(3, 3, 0.9)], device="cpu")
    for logits_NC in run.logits_TNC[:3]:
        scorer.record(torch.arange(N), logits_NC, run.label_N)
        scorer.end_epoch()
    label_N = run.label_N.numpy()
    settings = {"score": "tdds", "preset": "official"}
    score_N = scorer.gather()[Window(3, 3, 0.9)].numpy()
    scores = make.scores("tdds", score_N, label_N, CLASSES, settings)
    coreset, _ = make_coreset(scores, 0.4, seed=4)
    for epoch in (3, 4, 5, 6):
        assert kept_in(run, epoch).tolist() == coreset.index_M.tolist()
    weight_N = np.frombuffer(run.seen[3][3], dtype=np.float32)
    assert weight_N[coreset.index_M].tolist() == coreset.importance_M.tolist()


OTHERS = {
    "forgetting": {},
    "el2n": {"class_balanced": True},
    "aum": {"sampler": "ccs"},
    "dyn_unc": {"sampler": "centre"},
    "dual": {"sampler": "beta"},
    "csl": {},
}


def _by_others(rank, folder):
    return {
        score: Run("static", folder / score, score=score, **more).go().seen
        for score, more in OTHERS.items()
    }


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return run_ranks(2, _by_others, tmp_path_factory.mktemp("by_two"))


@pytest.mark.distributed
@pytest.mark.parametrize("score", OTHERS)
def test_static_keeps_what_select_would_by_any_score(score, tmp_path, by_two):
    """Of the scores that `tdds score` computes from the epochs up to there; on two ranks too."""
    more = OTHERS[score]
    run = Run("static", tmp_path, score=score, **more).go()
    options = ["el2n_epochs=2", "uncertainty_window=2"]
    reads = [
        option for option in options if option.split("=")[0] in offline.BASELINES[score].options
    ]
    cut = tmp_path / "first_epochs"
    shutil.copytree(tmp_path / "trajectory", cut)
    for epoch in range(3, EPOCHS):
        shutil.rmtree(cut / f"epoch_{epoch:04d}")
    (path,), _ = offline.score_all(cut, [score], options=reads)
    coreset, _ = make_coreset(load_scores(path), 0.4, seed=4, **more)
    assert kept_in(run, 3).tolist() == coreset.index_M.tolist()
    assert all(seen[score] == run.seen for seen in by_two)


def test_refresh_chooses_again_and_explores(tmp_path):
    run = Run("refresh", tmp_path).go()
    sizes = [len(kept_in(run, epoch)) for epoch in range(EPOCHS)]
    assert sizes == [N, N, N, 24, 24, 24, N], "N - round(0.6 N), explored ones among them"
    assert kept_in(run, 3).tolist() == kept_in(run, 4).tolist() != kept_in(run, 5).tolist()
    plain = Run("refresh", tmp_path / "plain", explore=0.0).go()
    assert len(np.intersect1d(kept_in(run, 3), kept_in(plain, 3))) >= 24 - 5, "5 of 24 are drawn"


@pytest.mark.parametrize("method", PLANS)
def test_the_twin_has_as_many_and_others(method, tmp_path, alone):
    """And the weights of the method, also where number and weights follow from the run."""
    own, twin = (alone[method, twin][0][0] for twin in (False, True))
    for (epoch, digest, *of_own), (_, twin_digest, *of_twin) in zip(own, twin, strict=True):
        assert (digest == ALL) == (twin_digest == ALL), epoch
        if digest != ALL:
            (kept, weight), (twin_kept, twin_weight) = of_own, of_twin
            assert kept != twin_kept
            assert len(kept) == len(twin_kept)
            if method in BY_RUN:  # else weights follow from scores, which differ
                assert sorted(np.frombuffer(weight, "f4")) == sorted(
                    np.frombuffer(twin_weight, "f4")
                )


@pytest.mark.parametrize("method", ["static", "infobatch", "progressive"])
def test_a_rate_that_leaves_less_than_a_batch(method, tmp_path):
    run = Run(method, tmp_path, rate=0.999, **({"drawn": 0.1} if method == "progressive" else {}))
    run.go()
    if method != "infobatch":
        assert len(kept_in(run, 3)) == 1
    assert all(digest != ALL for epoch, digest, *_ in run.seen if epoch in (3, 4))


def test_one_class_and_an_empty_one(tmp_path):
    """Classes of which there is no sample, or but one, change nothing for the class-balanced
    choice."""
    for labels in (torch.zeros(N, dtype=torch.int64), torch.arange(N) % 3 + 2):
        run = Run("static", tmp_path / str(int(labels.sum())), class_balanced=True)
        run.label_N = labels
        run.go()
        kept = np.bincount(labels.numpy()[kept_in(run, 4)], minlength=CLASSES)
        exact = np.bincount(labels, minlength=CLASSES) * 37 / N
        assert (np.abs(kept - exact) < 1.0).all()


def test_a_record_that_does_not_fit_is_refused(tmp_path):
    run = Run("infobatch", tmp_path).go(leave_at=(2, 1))
    (_, digest, *_) = run.seen[2]
    folder, path = tmp_path / "sets", tmp_path / "sets/epoch_0002.npz"
    assert record_problem(folder, 2, digest, N) == ""
    assert "is missing" in record_problem(folder, 5, digest, N)
    kind, text = catch(run.schedule.recall, 2, "0" * 64)
    assert kind == "InputError"
    assert "holds another set" in text
    assert "restore it, or start over" in text
    path.write_bytes(path.read_bytes()[:-30])
    assert "is damaged" in record_problem(folder, 2, digest, N)


def test_what_is_refused(tmp_path):
    scorer = ShardedScorer(N, CLASSES, [Window(3, 2, 0.9)], device="cpu", partial_epochs=True)
    plan = PruningPlan("static", N, EPOCHS, rate=0.5, start=3)
    for window in (None, Window(3, 2, 0.9)):
        kind, text = catch(PruningSchedule, plan, scorer, window=window)
        assert kind == "InputError"
        assert f"span all {EPOCHS} epochs" in text
    for window, start, words in (
        (Window(EPOCHS, 2, 0.9), 3, "K=2 leaves one loss difference per window"),
        (Window(EPOCHS, 4, 0.9), 3, "start=3 must be at least 4"),
    ):
        plan = PruningPlan("refresh", N, EPOCHS, rate=0.5, start=start)
        assert words in catch(PruningSchedule, plan, scorer, window=window)[1]
