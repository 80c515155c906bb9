"""A score that is interrupted, wherever and however often, and resumed on any number of ranks, is
bitwise the score of a run that was not; its trajectory too."""

import functools
import json
import os
import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tdds_dist import ShardedScorer, Window
from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.errors import InputError
from tdds_dist.runs.checkpoint import Checkpoint, Checkpoints
from tdds_dist.scoring.trajectory import Trajectory
from tests.ranks import catch, exit_codes, run_ranks
from tests.scoring.test_scorer import random_stream


@dataclass(frozen=True)
class Case:
    """A stream of random logits and how it is scored. Position p of it: p actions (a step, or the
    end of an epoch) are done."""

    num_samples: int = 23
    num_classes: int = 5
    global_batch: int = 6
    epochs: int = 4
    windows: tuple[Window, ...] = (Window(4, 3, 0.9), Window(3, 2, 0.0), Window(4, 2, 0.4))
    preset: str = "official"
    known: bool = True
    with_trajectory: bool = True
    dtype: torch.dtype = torch.float32
    bad: tuple[tuple[int, int, float], ...] = ()  # (epoch, sample, value that its logits hold)
    options: dict = field(default_factory=dict, hash=False)
    block_rows: int | None = None

    def order(self, epoch):
        return epoch_order(
            self.num_samples, self.global_batch, seed=3, epoch=epoch, block_rows=self.block_rows
        )

    @property
    def num_actions(self):
        return self.epochs * self.actions_per_epoch

    @property
    def actions_per_epoch(self):
        return -(-self.num_samples // self.global_batch) + 1


@functools.cache
def stream(num_samples, num_classes, epochs, dtype, bad):
    logits_TNC, label_N = random_stream(num_samples, num_classes, epochs, dtype)
    for epoch, sample, value in bad:
        logits_TNC[epoch][sample, sample % num_classes] = value
    return logits_TNC, label_N


class Run:
    """A scorer that is fed a case action by action."""

    def __init__(self, case, directory, resume=True):
        self.case, self.directory = case, directory
        self.logits_TNC, self.label_N = stream(
            case.num_samples, case.num_classes, case.epochs, case.dtype, case.bad
        )
        options = case.options | (
            {"trajectory": directory, "resume": resume} if case.with_trajectory else {}
        )
        self.world = distributed.current_world("cpu")
        self.scorer = ShardedScorer(
            case.num_samples,
            case.num_classes,
            case.windows,
            case.preset,
            "cpu",
            route_every=self.world.world_size,  # so a life on other ranks has another
            **options,
        )
        self.announced = -1

    @property
    def position(self):
        return self.scorer.epoch * self.case.actions_per_epoch + self.scorer.step

    def act(self):
        scorer, case = self.scorer, self.case
        order = case.order(scorer.epoch)
        if case.known and self.announced != scorer.epoch:
            scorer.expect(order, first_step=scorer.step)
            self.announced = scorer.epoch
        if scorer.step == order.num_steps:
            scorer.end_epoch()
            return
        sample_SB, index_SB = order.of_rank(self.world.rank, self.world.world_size)
        sample_B = torch.from_numpy(sample_SB[scorer.step].copy())
        index_B = torch.from_numpy(index_SB[scorer.step].copy())
        scorer.record(index_B, self.logits_TNC[scorer.epoch][sample_B], self.label_N[sample_B])

    def finish(self):
        while self.scorer.epoch < self.case.epochs:
            self.act()
        return self.outcome()

    def outcome(self):
        """Everything that must not depend on interruptions, as bytes by name."""
        found = {
            str(window): score_N.numpy().tobytes()
            for window, score_N in self.scorer.gather().items()
        }
        found |= {
            "labels": self.scorer.gather_labels().numpy().tobytes(),
            "quarantined": str(self.scorer.quarantined()).encode(),
        }
        return found | (self.recorded() if self.case.with_trajectory else {})

    def recorded(self):
        trajectory = Trajectory(self.directory, self.case.epochs)
        trajectory.verify()
        assert len(list(Path(self.directory).glob("epoch_*"))) == self.case.epochs
        found = {
            f"trajectory of {name}": trajectory.read(name).tobytes() for name in trajectory.scalars
        }
        return found | {
            "trajectory of labels": trajectory.labels().tobytes(),
            "trajectory of quarantine": str(trajectory.quarantined).encode(),
            "trajectory, what it is": (Path(self.directory) / "meta.json").read_bytes(),
        }


def uninterrupted(case, tmp_path):
    """Outcome of a run in one process without a process group."""
    return Run(replace(case, known=True), tmp_path / "uninterrupted", resume=False).finish()


def differing(found, expected):
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


CASES = {
    "official": Case(),
    "paper, counts exchanged": Case(
        preset="paper", known=False, windows=(Window(4, 3, 0.9), Window(3, 2, 0.2))
    ),
    "float16, no trajectory": Case(
        preset="paper",
        known=False,
        windows=(Window(4, 3, 0.9), Window(3, 2, 0.2)),
        with_trajectory=False,
        dtype=torch.float16,
        options={"logp_dtype": torch.float16},
    ),
    "as many as ranks": Case(num_samples=3, global_batch=2),
    "float16 trajectory": Case(known=False, options={"trajectory_dtype": torch.float16}),
    "two samples": Case(num_samples=2, global_batch=2),
    "quarantine, blocks": Case(
        num_samples=300,
        global_batch=75,
        block_rows=7,
        bad=((0, 7, torch.inf), (2, 123, torch.nan), (3, 7, torch.nan)),
        options={"on_nan": "quarantine"},
    ),
}


# ---- every position, every change of ranks


def _save_everywhere(rank, case, folder):
    world = distributed.current_world("cpu")
    folder = folder / f"by{world.world_size}"
    run = Run(case, folder / "trajectory", resume=False)
    checkpoints = Checkpoints(folder / "checkpoints", world, keep=1000, asynchronous=False)
    while run.position < case.num_actions:
        checkpoints.save(run.position, run.scorer.state_dict(), {})
        run.act()
    checkpoints.close()


def _resume_everywhere(rank, case, folder, expected, saved_by_each, positions, thin):
    """From where it goes wrong: (ranks that saved, position, names of what differs). Takes every
    `thin`-th, in turns."""
    world = distributed.current_world("cpu")
    wrong = []
    checkpoints = Checkpoints(folder, world)
    for saved_by in saved_by_each:
        for position in (p for p in positions if (p + saved_by + world.world_size) % thin == 0):
            directory = folder / f"resumed by {world.world_size} {saved_by} {position}"
            # with all epochs: those that come after the checkpoint are lost
            if case.with_trajectory and world.is_main:
                shutil.copytree(folder / f"by{saved_by}" / "trajectory", directory)
            collectives.barrier()
            run = Run(case, directory)
            found = Checkpoint(
                folder / f"by{saved_by}" / "checkpoints" / f"step_{position:010d}", position, {}
            )
            state = run.scorer.state_dict()
            checkpoints.load(found, state)
            run.scorer.load_state_dict(state)
            assert run.position == position
            if names := differing(run.finish(), expected):
                wrong.append((saved_by, position, names))
    checkpoints.close()
    return wrong


def _interrupt_and_resume(case, tmp_path, world_sizes, positions, thin):
    expected = uninterrupted(case, tmp_path)
    for world_size in world_sizes:
        run_ranks(world_size, _save_everywhere, case, tmp_path)
    for world_size in world_sizes:
        wrong = run_ranks(
            world_size, _resume_everywhere, case, tmp_path, expected, world_sizes, positions, thin
        )
        assert wrong == [[]] * world_size


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "positions"), [("official", (3, *range(10, 13))), ("float16, no trajectory", (7, 11))]
)
def test_resumed_within_an_epoch_on_any_number_of_ranks(tmp_path, name, positions):
    _interrupt_and_resume(CASES[name], tmp_path, (1, 3), positions, thin=1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_resumed_anywhere_on_any_number_of_ranks(tmp_path, name):
    world_sizes = (2, 3, 4) if name == "official" else (2, 3)
    _interrupt_and_resume(
        CASES[name], tmp_path, world_sizes, range(CASES[name].num_actions), thin=3
    )


# ---- torture


def _die_before_metadata(*_, **__):
    os._exit(9)


def _segment(rank, case, folder, plan, outcome_file):
    """One life of the run: resumes where the checkpoints say, saves and ends as planned."""
    world = distributed.current_world("cpu")
    checkpoints = Checkpoints(folder / "checkpoints", world)
    found = checkpoints.latest()
    if found is None and world.is_main:  # what was recorded before the first save is lost
        shutil.rmtree(folder / "trajectory", ignore_errors=True)
    collectives.barrier()
    run = Run(case, folder / "trajectory")
    if found is not None:
        state = run.scorer.state_dict()
        checkpoints.load(found, state)
        run.scorer.load_state_dict(state)
        assert run.position == found.step == found.record["position"]
    kind, num_actions, saves = plan
    if kind == "to the end":
        outcome = run.finish()
        checkpoints.close()
        if world.is_main:
            torch.save(outcome, outcome_file)
        return
    for offset in range(min(num_actions, case.num_actions - 1 - run.position)):
        run.act()
        if offset in saves:
            checkpoints.save(
                run.position,
                run.scorer.state_dict(),
                {"position": run.position},
                wait=saves[offset],
            )
    if kind == "graceful":
        checkpoints.save(
            run.position, run.scorer.state_dict(), {"position": run.position}, wait=True
        )
        checkpoints.close()
        return
    checkpoints.finish()
    if kind == "while writing":
        dcp.FileSystemWriter.finish = _die_before_metadata
        checkpoints.save(run.position, run.scorer.state_dict(), {"position": run.position})
        catch(checkpoints.finish)
    os._exit(9)


def _plans(seed, num_interruptions):
    """World size of every life, and (how it ends, after how many actions, saves on the way: offset
    -> whether it waits)."""
    draw = random.Random(seed)
    plans = []
    for _ in range(num_interruptions):
        num_actions = draw.randint(0, 5)
        saves = {
            offset: draw.random() < 0.4 for offset in range(num_actions) if draw.random() < 0.35
        }
        plans.append(
            (
                draw.randint(1, 3),
                (draw.choice(["graceful", "crash", "while writing"]), num_actions, saves),
            )
        )
    return [*plans, (draw.randint(1, 3), ("to the end", 0, {}))]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("seed", "name", "num_interruptions"),
    [
        (1, "official", 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, "paper", 20), (3, "quarantine, blocks", 20), (4, "official", 20))
        ),
    ],
)
def test_interrupted_many_times(tmp_path, seed, name, num_interruptions):
    """The same for the same seed: every life ends where it is told to, and its checkpoint is there
    or not for sure."""
    case = Case(num_samples=29, epochs=7, windows=(Window(7, 3, 0.9), Window(5, 4, 0.0)))
    if name == "paper":
        case = replace(case, preset="paper", known=False, options={"logp_dtype": torch.float16})
    if name == "quarantine, blocks":
        case = replace(
            case,
            num_samples=301,
            global_batch=75,
            options={"on_nan": "quarantine"},
            bad=((0, 7, torch.inf), (2, 300, torch.nan), (4, 7, torch.nan)),
        )
    expected = uninterrupted(case, tmp_path)
    told = []
    for world_size, plan in _plans(seed, num_interruptions):
        codes = exit_codes(
            world_size, _segment, case, tmp_path, plan, tmp_path / "outcome.pt", patience=10.0
        )
        told.append((world_size, plan))
        assert set(codes) <= ({0} if plan[0] in ("graceful", "to the end") else {9}), (
            seed,
            told,
            codes,
        )
    found = torch.load(tmp_path / "outcome.pt", weights_only=True)
    assert differing(found, expected) == [], (seed, told)


# ---- what is refused


def _at(case, position, directory=None):
    run = Run(case, directory, resume=False)
    while run.position < position:
        run.act()
    return run


PLAIN = Case(with_trajectory=False)


OTHER = {  # settings, and words of the refusal with Checkpoints, with a state from anywhere
    "windows": (
        replace(PLAIN, windows=(*PLAIN.windows[:2], Window(4, 2, 0.5))),
        "windows",
        "windows",
    ),
    "order of windows": (replace(PLAIN, windows=PLAIN.windows[::-1]), "windows", "windows"),
    "preset": (replace(PLAIN, preset="paper"), "delta", "preset"),
    "fewer windows": (replace(PLAIN, windows=PLAIN.windows[:2]), "average", "windows"),
    "samples": (replace(PLAIN, num_samples=24), "(23,", "num_samples"),
    "classes": (replace(PLAIN, num_classes=6), "(23, 5)", "num_classes"),
    "logp": (replace(PLAIN, options={"logp_dtype": torch.float16}), "float16", "logp_dtype"),
}


def _other_settings(rank, folder):
    world = distributed.current_world("cpu")
    checkpoints = Checkpoints(folder, world, asynchronous=False)
    checkpoints.save(7, _at(PLAIN, 7).scorer.state_dict(), {})
    found = checkpoints.latest()

    def resume(scorer):
        state = scorer.state_dict()
        checkpoints.load(found, state)
        scorer.load_state_dict(state)

    outcomes = {name: catch(resume, Run(case, None).scorer) for name, (case, *_) in OTHER.items()}
    checkpoints.close()
    return outcomes


@pytest.mark.distributed
def test_the_state_of_other_settings_is_refused_on_every_rank(tmp_path):
    for found in run_ranks(3, _other_settings, tmp_path):
        for name, (_, words, _) in OTHER.items():
            assert found[name][0] == "InputError", (name, found[name])
            assert words in found[name][1], (name, found[name])
            assert "resume with the" in found[name][1]


def test_the_state_of_other_settings_is_refused_in_a_foreign_loop():
    state = {name: tensor.clone() for name, tensor in _at(PLAIN, 7).scorer.state_dict().items()}
    for name, (case, _, words) in OTHER.items():
        run = Run(case, None)
        before = {key: tensor.clone() for key, tensor in run.scorer.state_dict().items()}
        error, text = catch(run.scorer.load_state_dict, state)
        assert error == "InputError", (name, error, text)
        assert words in text, (name, text)
        assert all(
            torch.equal(tensor, before[key]) for key, tensor in run.scorer.state_dict().items()
        ), "nothing is taken"
    for lost in state:
        error, text = catch(
            Run(PLAIN, None).scorer.load_state_dict, {k: v for k, v in state.items() if k != lost}
        )
        assert error == "InputError", (lost, error, text)
        assert repr(lost) in text


@pytest.mark.parametrize("position", [0, 4, 8, 12])
def test_a_foreign_loop_keeps_the_state_by_torch_save(tmp_path, position):
    case = CASES["official"]
    torch.save(_at(case, position, tmp_path / "t").scorer.state_dict(), tmp_path / "state.pt")
    run = Run(case, tmp_path / "t")
    run.scorer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run.position == position
    assert differing(run.finish(), uninterrupted(case, tmp_path)) == []


def _own_checkpointing(rank, case, folder, expected, position):
    """torch.distributed.checkpoint alone."""
    if expected is None:
        dcp.save(
            _at(case, position, folder / "t").scorer.state_dict(), checkpoint_id=folder / "own"
        )
        return []
    run = Run(case, folder / "t")
    state = run.scorer.state_dict()
    dcp.load(state, checkpoint_id=folder / "own")
    run.scorer.load_state_dict(state)
    assert run.position == position
    return differing(run.finish(), expected)


@pytest.mark.distributed
def test_a_loop_with_checkpoints_of_its_own(tmp_path):
    case = CASES["official"]
    expected = uninterrupted(case, tmp_path)
    run_ranks(2, _own_checkpointing, case, tmp_path, None, 7)
    assert run_ranks(3, _own_checkpointing, case, tmp_path, expected, 7) == [[]] * 3


def test_a_state_shares_memory_and_may_be_taken_at_any_time():
    """Taking it changes nothing, at no step."""
    run = Run(PLAIN, None)
    first = run.scorer.state_dict()
    while run.scorer.epoch < PLAIN.epochs:
        run.act()
        state = run.scorer.state_dict()
        assert all(
            state[name].data_ptr() == first[name].data_ptr()
            for name in first
            if name not in ("position", "settings")
        )
        assert state["position"].tolist() == [run.scorer.epoch, run.scorer.step]
    assert differing(run.outcome(), _at(PLAIN, PLAIN.num_actions).outcome()) == []


def test_the_same_scorer_may_go_back_and_forget_the_order_it_was_told():
    case = PLAIN
    run = _at(case, 7)
    state = {name: tensor.clone() for name, tensor in run.scorer.state_dict().items()}
    for _ in range(2):
        run.act()
    run.scorer.load_state_dict(state)
    assert run.position == 7
    order = case.order(1)
    rest = torch.from_numpy(order.of_rank(0, 1, 2)[0].reshape(-1)[: case.num_samples - 12].copy())
    run.scorer.record(rest, run.logits_TNC[1][rest], run.label_N[rest])
    run.scorer.end_epoch()
    assert differing(run.finish(), _at(case, case.num_actions).outcome()) == []


def test_a_trajectory_that_does_not_fit_is_refused_and_kept(tmp_path):
    case = CASES["official"]
    run = _at(case, 12, tmp_path / "t")
    state = {name: tensor.clone() for name, tensor in run.scorer.state_dict().items()}
    other = dict(state) | {"label": (state["label"] + 1) % case.num_classes}
    before = {path: path.read_bytes() for path in (tmp_path / "t").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="labels of another dataset"):
        Run(case, tmp_path / "t").scorer.load_state_dict(other)
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "t").rglob("*") if path.is_file()
    }
    shutil.rmtree(tmp_path / "t" / "epoch_0001")
    with pytest.raises(InputError, match="expected 0 to 1 without a gap"):
        Run(case, tmp_path / "t").scorer.load_state_dict(state)


# ---- bad values


def _nan_before_save(rank, folder):
    world = distributed.current_world("cpu")
    case = replace(PLAIN, bad=((1, 22, torch.nan),))
    run = Run(case, None)
    checkpoints = Checkpoints(folder, world)
    outcomes = []

    def save():
        checkpoints.save(run.position, run.scorer.state_dict(), {}, wait=True)

    while run.position < 2 * case.actions_per_epoch - 1:
        run.act()
        outcomes.append(catch(save))
    assert outcomes[0] == ("", "")
    found = checkpoints.latest()
    kept = Run(case, None).scorer.state_dict()
    checkpoints.load(found, kept)
    finite = bool(torch.isfinite(collectives.own_rows(kept["logp"])).all())
    nonfinite = int(collectives.own_rows(kept["nonfinite"]).sum())
    checkpoints.close()
    return outcomes, found.step, finite, nonfinite


@pytest.mark.distributed
def test_what_is_not_finite_is_never_kept(tmp_path):
    order = epoch_order(23, 6, seed=3, epoch=1)
    step = next(step for step, index_G in enumerate(order.of_rank(0, 1)[1]) if 22 in index_G)
    for outcomes, newest, finite, nonfinite in run_ranks(3, _nan_before_save, tmp_path):
        bad = [number for number, (error, _) in enumerate(outcomes) if error]
        assert bad == list(range(5 + step, 9))
        assert newest == 5 + step
        assert (finite, nonfinite) == (True, 0)
        for number in bad:
            assert outcomes[number][0] == "NonFiniteLogitsError"
            last = min(step + 2, number - 5)  # rows of three steps travel together
            steps = f"step {step}" if last == step else f"steps {step} to {last}"
            assert (
                f"epoch 2, {steps}: NaN or infinite logits for 1 samples (global indices 22)"
                in outcomes[number][1]
            )


# ---- quarantine

FINITE = Case(
    num_samples=300, num_classes=4, global_batch=50, windows=(Window(4, 3, 0.9), Window(3, 2, 0.5))
)
BAD = ((0, 7, torch.inf), (2, 123, torch.nan), (3, 123, -torch.inf))
QUARANTINE = replace(FINITE, bad=BAD, options={"on_nan": "quarantine"})


def _quarantine_rank(rank, case, folder):
    run = Run(case, folder, resume=False)
    outcome = run.finish()
    scores = {window: score_N.numpy() for window, score_N in run.scorer.gather().items()}
    return outcome, scores, run.scorer.quarantined()


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_quarantined_samples_leave_all_others_as_they_are(tmp_path, preset):
    finite = replace(FINITE, preset=preset, windows=(Window(4, 3, 0.9), Window(3, 2, 0.5)))
    plain = Run(finite, tmp_path / "finite", resume=False)
    plain.finish()
    unchanged = Run(
        replace(finite, options={"on_nan": "quarantine"}), tmp_path / "unchanged", resume=False
    )
    assert differing(unchanged.finish(), plain.outcome()) == [], "without bad values it is the same"
    assert not (tmp_path / "unchanged" / "quarantine.json").exists()
    expected = {window: score_N.numpy() for window, score_N in plain.scorer.gather().items()}
    case = replace(QUARANTINE, preset=preset, windows=finite.windows)
    others = [index for index in range(300) if index not in (7, 123)]
    outcomes = []
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        for outcome, scores, quarantined in run_ranks(world_size, _quarantine_rank, case, folder):
            outcomes.append(outcome)
            assert quarantined == {7: 0, 123: 2}
            for window, score_N in scores.items():
                assert score_N[others].tobytes() == expected[window][others].tobytes()
                assert score_N[[7, 123]].tolist() == [score_N[others].min()] * 2
        content = json.loads((folder / "quarantine.json").read_text())
        assert content == {"format": "tdds-quarantine-1", "samples": {"7": 0, "123": 2}}
        found, finite_one = Trajectory(folder), Trajectory(tmp_path / "finite")
        assert found.quarantined == {7: 0, 123: 2}
        for name in found.scalars:
            values_TN, expected_TN = found.read(name), finite_one.read(name)
            assert values_TN[:, others].tobytes() == expected_TN[:, others].tobytes()
            assert values_TN[:2, 123].tobytes() == expected_TN[:2, 123].tobytes()
            assert not values_TN[2:, 123].any()
            assert not values_TN[:, 7].any()
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_a_sample_quarantined_after_the_checkpoint_is_free_again(tmp_path):
    """Should it stay finite this time."""
    run = _at(QUARANTINE, 9, tmp_path / "t")
    state = {name: tensor.clone() for name, tensor in run.scorer.state_dict().items()}
    run.finish()
    assert Trajectory(tmp_path / "t").quarantined == {7: 0, 123: 2}
    case = replace(QUARANTINE, bad=BAD[:1])
    resumed = Run(case, tmp_path / "t")
    resumed.scorer.load_state_dict(state)
    assert Trajectory(tmp_path / "t").quarantined == {7: 0}
    assert differing(resumed.finish(), uninterrupted(case, tmp_path)) == []


def _diverge_rank(rank, case):
    run = Run(case, None)
    while run.scorer.epoch < case.epochs:
        error, text = catch(run.act)
        if error:
            return error, text, run.scorer.epoch
    return "", str(sorted(run.scorer.quarantined())), run.scorer.epoch


THREE = [(1, index, torch.nan) for index in (5, 100, 299)]
DIVERGED = (  # bad values, options, epoch that ends it, words
    ((*THREE, (2, 5, torch.nan)), {"on_nan": "quarantine"}, 4, ["[5, 100, 299]"]),
    (
        (*THREE, (1, 250, torch.inf)),
        {"on_nan": "quarantine"},
        1,
        ["4 samples", "more than 1%", "5, 100, 250, 299"],
    ),
    ((*THREE, (3, 250, torch.inf)), {"on_nan": "quarantine"}, 3, ["more than 1%", "250"]),
    (BAD, {}, 0, ["for 1 samples (global indices 7); lower the learning rate"]),
)


def _diverge_ranks(rank):
    return [
        _diverge_rank(rank, replace(FINITE, with_trajectory=False, bad=bad, options=options))
        for bad, options, _, _ in DIVERGED
    ]


@pytest.mark.distributed
def test_more_than_one_percent_is_no_quarantine_and_without_it_one_sample_stops_the_run():
    """300 samples: three may be out, all epochs together."""
    for outcomes in run_ranks(3, _diverge_ranks):
        for (error, text, epoch), (_, _, last, words) in zip(outcomes, DIVERGED, strict=True):
            assert (error, epoch) == ("" if last == FINITE.epochs else "NonFiniteLogitsError", last)
            assert all(word in text for word in words), text


def test_a_state_with_quarantine_needs_a_scorer_that_knows_it():
    state = _at(replace(QUARANTINE, with_trajectory=False), 9).scorer.state_dict()
    scorer = Run(replace(FINITE, with_trajectory=False), None).scorer
    error, text = catch(scorer.load_state_dict, state)
    assert error == "InputError", (error, text)
    assert "on_nan" in text
