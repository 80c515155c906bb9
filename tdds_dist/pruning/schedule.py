"""`PruningSchedule`: the samples that each epoch visits, decided from what the scorer holds, on all
ranks alike, and recorded.

    <folder>/epoch_0007.npz    kept and weighed: a bit per sample; weight: float32, where not 1

An epoch without a file visits all samples, each with weight 1. A decision is a function of the
scorer's numbers and of (seed, epoch): the same stream gives the same sets at every world size, and
a run that goes on reads the set of its epoch back.
"""

# C classes, M visited samples, N dataset

import hashlib
from pathlib import Path

import numpy as np

from tdds_dist.config.run import Baselines
from tdds_dist.config.scores import Window, differences_per_window, window_settings
from tdds_dist.distributed.collectives import gather_objects, together
from tdds_dist.distributed.partition import ALL, Visits
from tdds_dist.errors import InputError
from tdds_dist.pruning import rules
from tdds_dist.pruning.plan import BY_RUN, BY_SCORE, PruningPlan
from tdds_dist.runs.artifacts import Scores, fingerprint, write_atomically
from tdds_dist.scoring.offline import BASELINES, check_options
from tdds_dist.scoring.scorer import ShardedScorer


class PruningSchedule:
    """Says which samples an epoch visits, for this package's training loop or any other.

    Args:
        plan: what is pruned when.
        scorer: sees every forward pass, and has `partial_epochs`.
        window: of the scorer's windows, the one whose score so far static and refresh prune by; its
            T is that of the whole training.
        baselines: options of the other scores that static may prune by, from the trajectory of the
            scorer.
        folder: where decisions are recorded; None keeps no record.
        twin_of: `folder` of the method's own training, for the random control of infobatch and
            hard_first, which takes its numbers and weights from there.

    Protocol: before each epoch all ranks call `decide`, between `end_epoch` of the scorer and its
    next `expect`; a run that goes on calls `recall` instead for the epoch that it is in.
    """

    def __init__(
        self,
        plan: PruningPlan,
        scorer: ShardedScorer,
        *,
        window: Window | None = None,
        baselines: Baselines | None = None,
        folder: Path | None = None,
        twin_of: Path | None = None,
    ):
        self._baselines = Baselines() if baselines is None else baselines
        check_score(plan, window, scorer.preset, self._baselines)
        if plan.method == "static" and not plan.is_by_tdds and not scorer.has_trajectory:
            raise InputError(
                f"score={plan.score} comes from the trajectory; give the scorer trajectory=DIR"
            )
        if plan.takes_numbers != (twin_of is not None):
            raise InputError(
                f"twin_of={twin_of} must be the folder of the decisions that a random control of"
                f" {' or '.join(BY_RUN)} takes its numbers from, and None for all else"
            )
        self.plan, self._scorer, self._window, self._folder = plan, scorer, window, folder
        self._twin_of = twin_of
        self._visits = Visits()

    def decide(self, epoch: int) -> Visits:
        """Return the samples of the epoch that comes next, and record them. A collective.

        Raises:
            InputError: the ranks do not agree (another NumPy or processor rounds otherwise), or
            the record of `twin_of` is damaged; on every rank.
        """
        if self.plan.is_full(epoch):
            self._visits = Visits()
        elif self.plan.is_decided_anew(epoch):
            if self._twin_of is None:
                kept_N, weight_N = self._apply_rule([self.plan.seed, epoch])
            else:
                with together(self._scorer.world):
                    kept_N, weight_N = _read(self._twin_of, epoch, self.plan.num_samples)
            if self.plan.twin:
                kept_N, weight_N = rules.twin(kept_N, weight_N, [self.plan.seed, epoch])
            self._visits = visits_of(kept_N, weight_N)
        world, digest = self._scorer.world, self._visits.digest
        if len(set(found := gather_objects(digest, world))) > 1:
            raise InputError(
                f"epoch {epoch + 1}: the ranks chose other samples than each other (digests"
                f" {', '.join(text[:8] for text in found)}); start them with the same NumPy on the"
                " same kind of processor",
                shared=True,
            )
        if self._folder is not None:
            with together(world):
                if world.is_main:
                    _write(self._folder, epoch, self._visits, self.plan.num_samples)
        return self._visits

    def recall(self, epoch: int, digest: str) -> Visits:
        """Return the samples of an epoch as they were recorded, to go on in the middle of it; the
        digest is that of what `decide` returned. A collective.

        Raises:
            InputError: no record, or another one; on every rank.
        """
        with together(self._scorer.world):
            assert self._folder is not None
            if problem := record_problem(self._folder, epoch, digest, self.plan.num_samples):
                raise InputError(f"{problem}; restore it, or start over")
            self._visits = visits_of(*_read(self._folder, epoch, self.plan.num_samples))
        return self._visits

    def most_images(self, epoch: int) -> int:
        """Return the number of samples of an epoch, or the most that it can be."""
        return self.plan.most_images(epoch)

    def _apply_rule(self, key: list[int]) -> rules.Kept:
        plan = self.plan
        if plan.method in BY_SCORE:
            return self._by_score(key)
        p_label_N = self._scorer.gather_last("p_label")[:, 0].numpy()
        if plan.method == "infobatch":
            return rules.infobatch(p_label_N, plan.rate, key)
        if plan.method == "hard_first":
            return rules.hard_first(p_label_N, plan.threshold, plan.least, key)
        return rules.progressive(p_label_N, plan.rate, plan.drawn, key)

    def _by_score(self, key: list[int]) -> rules.Kept:
        """Choose as `tdds select` does by the score so far; of the number that is visited, refresh
        takes a share at random from what this leaves."""
        from tdds_dist.coreset.select import choose, importance_of  # reads configs

        plan = self.plan
        num = plan.num_images(key[1])
        assert num is not None
        num_explored = 0
        if plan.method == "refresh":
            num_explored = min(round(plan.explore * num), num - 1)
        scores = self._scores_so_far(key[1])
        kept_N = np.zeros(plan.num_samples, dtype=bool)
        kept_N[
            choose(
                scores,
                1.0 - (num - num_explored) / plan.num_samples,
                sampler=plan.sampler,
                class_balanced=plan.class_balanced,
                seed=plan.seed,
            )
        ] = True
        weight_N = np.ones(plan.num_samples, dtype=np.float32)
        if plan.importance != "none":
            weight_N = importance_of(scores)
        return rules.explored(kept_N, num_explored, key), weight_N

    def _scores_so_far(self, num_epochs: int) -> Scores:
        plan, scorer = self.plan, self._scorer
        label_N = scorer.gather_labels().numpy()
        of_data = label_N, fingerprint(label_N, scorer.num_classes)
        if plan.is_by_tdds:
            assert self._window is not None
            score_N = scorer.gather_so_far(self._window).numpy()
            settings = window_settings(self._window, scorer.preset)
            return Scores("tdds", score_N, *of_data, settings)
        baseline, options, extra = BASELINES[plan.score], self._baselines, list[str]()

        def compute(values_TM: np.ndarray) -> np.ndarray:
            score_M, extra_M = baseline.compute(values_TM, options)
            extra.extend(extra_M)
            return np.stack([score_M, *extra_M.values()], axis=1)

        looked_at = check_options(plan.score, options, (), num_epochs)
        found_NX = scorer.gather_recorded(baseline.scalar(options), looked_at, compute).numpy()
        columns = dict(zip(extra, found_NX[:, 1:].T, strict=True))
        settings = {"score": plan.score} | baseline.settings(options)
        return Scores(plan.score, found_NX[:, 0].copy(), *of_data, settings, columns)


def check_score(
    plan: PruningPlan, window: Window | None, preset: str, baselines: Baselines
) -> None:
    """Raise InputError when the method prunes by score, and the window does not span the training,
    or the score tells no samples apart by its start."""
    if not plan.is_by_tdds:
        if plan.method == "static":
            try:
                check_options(plan.score, baselines, (), plan.first_pruned)
            except InputError as error:
                raise InputError(
                    f"score={plan.score}, of the {plan.first_pruned} epochs before start:"
                    f" {str(error).partition('; ')[0]}; lower that in score.baselines, or raise"
                    " start"
                ) from None
            if plan.score == "aum" and (plan.sampler, baselines.aum_keep) == ("ccs", "easiest"):
                raise InputError(
                    "sampler=ccs cuts off what ranks first as too hard, and"
                    " score.baselines.aum_keep=easiest ranks easy samples first; set it to hardest"
                )
        return
    if window is None or plan.epochs > window.T:
        raise InputError(
            f"window={window} must be one of the scorer's and span all {plan.epochs} epochs:"
            f" {plan.method} prunes by its score; give Window(T={plan.epochs}, K, beta)"
        )
    num_differences = differences_per_window(window, preset)
    if num_differences == 1:
        raise InputError(
            f"K={window.K} leaves one loss difference per window in preset {preset}, so all scores"
            f" are 0, and {plan.method} prunes by them; raise K"
        )
    if plan.first_pruned <= num_differences:
        raise InputError(
            f"start={plan.first_pruned} must be at least {num_differences + 1}, the epochs of a"
            f" window of K={window.K}: no sample has a score before; raise it, or lower K"
        )


def visits_of(kept_N: np.ndarray, weight_N: np.ndarray) -> Visits:
    """Return kept (bool [N]) and weight (float32 [N]) as what an epoch visits; weights of samples
    that are not kept count as 1."""
    weight_N = np.where(kept_N, weight_N, np.float32(1.0)).astype(np.float32)
    is_weighed_N = weight_N != 1.0
    if kept_N.all() and not is_weighed_N.any():
        return Visits()
    parts = np.packbits(kept_N), np.packbits(is_weighed_N), weight_N[is_weighed_N]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return Visits(
        None if kept_N.all() else np.flatnonzero(kept_N),
        weight_N if is_weighed_N.any() else None,
        digest,
    )


def _file(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:04d}.npz"


def _write(folder: Path, epoch: int, visits: Visits, num_samples: int) -> None:
    path = _file(folder, epoch)
    if visits.digest == ALL:
        path.unlink(missing_ok=True)  # of a start before
        return
    kept_N = np.ones(num_samples, dtype=bool)
    if visits.subset_M is not None:
        kept_N[:] = False
        kept_N[visits.subset_M] = True
    weight_N = np.ones(num_samples, np.float32) if visits.weight_N is None else visits.weight_N
    is_weighed_N = weight_N != 1.0
    arrays = {
        "kept": np.packbits(kept_N),
        "weighed": np.packbits(is_weighed_N),
        "weight": weight_N[is_weighed_N],
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def _read(folder: Path, epoch: int, num_samples: int) -> rules.Kept:
    path = _file(folder, epoch)
    if not path.is_file():
        return rules.everyone(num_samples)
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["kept"].shape != (-(-num_samples // 8),):
                raise ValueError(f"not of {num_samples} samples")
            kept_N, is_weighed_N = (
                np.unpackbits(file[name], count=num_samples).astype(bool)
                for name in ("kept", "weighed")
            )
            weight_N = np.ones(num_samples, dtype=np.float32)
            weight_N[is_weighed_N] = file["weight"]
    except Exception as error:  # of zip, zlib, NumPy: whatever a damaged file makes of them
        raise InputError(f"{path} is damaged ({error}); restore it, or start over") from error
    return kept_N, weight_N


def images_in(folder: Path, epochs: int, num_samples: int) -> int:
    """Return the images that all epochs together visit, by their records; an epoch without one
    visits all. Raise InputError for a damaged one."""
    return sum(int(_read(folder, epoch, num_samples)[0].sum()) for epoch in range(epochs))


def record_problem(folder: Path, epoch: int, digest: str, num_samples: int) -> str:
    """Say why the record of an epoch is not the one of this digest; "" when it is."""
    try:
        found = visits_of(*_read(folder, epoch, num_samples)).digest
    except InputError as error:
        return str(error)
    if found == digest:
        return ""
    path = _file(folder, epoch)
    what = f"holds another set ({found[:8]})" if path.is_file() else "is missing"
    return f"{path} {what}, where that of epoch {epoch + 1} should be ({digest[:8]})"
