"""Samples ranked by how likely their label is wrong, from what collections recorded.

A wrong label shows in training: the network tells the sample from its given class late, with a low
margin, and at a high loss. Owns the ranking, the cut by threshold samples, and the table; the page
to review it is in `report.review`. What is decided there goes back by `tdds write --relabel`.
"""

# N dataset

import csv
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tdds_dist.config.scores import DEFAULT_SUSPICION, SUSPICIONS
from tdds_dist.data.manifest import read_manifest
from tdds_dist.data.sources import THRESHOLD_CLASS
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Fingerprint, Scores, load_scores, require_same_dataset
from tdds_dist.runs.directory import RunDir
from tdds_dist.scoring import quarantine
from tdds_dist.scoring.offline import score_all

THRESHOLD_PERCENTILE = 99  # of the margins of threshold samples, Pleiss et al., section 3.2
COLUMNS = ("rank", "index", "path", "label", "other", "p_label", "p_other", "suspicion", "wrong")


@dataclass(frozen=True, eq=False)
class Suspects:
    """The samples of a dataset by suspicion; arrays by global index but for `order`."""

    order: np.ndarray  # global indices of those that were judged, the most suspicious first
    suspicion_N: np.ndarray  # float64, mean rank over the runs, in (0, 1]; 0 where not judged
    label_N: np.ndarray  # int64, as given
    class_names: list[str]
    path: list[str]  # empty without a manifest
    wrong_N: np.ndarray | None  # bool, called wrong by threshold samples; None without them
    # of the final network, float32: `p_label`, `other` (likeliest class but the label, a whole
    # number), `p_other`; NaN where unknown, empty where no run has recorded them
    guess: dict[str, np.ndarray]
    fingerprint: Fingerprint  # of the images of the first run

    def row(self, rank: int) -> dict[str, str]:
        """Return the line of the table for the sample at `rank`, from 0."""
        index = int(self.order[rank])
        row = {
            "rank": str(rank + 1),
            "index": str(index),
            "path": self.path[index] if self.path else "",
            "label": self.class_names[self.label_N[index]],
            "suspicion": f"{self.suspicion_N[index]:.6f}",
        }
        known = {key: guess_N[index] for key, guess_N in self.guess.items()}
        row |= {key: f"{value:.4f}" for key, value in known.items() if not np.isnan(value)}
        if "other" in row:
            row["other"] = self.class_names[int(known["other"])]
        if self.wrong_N is not None:
            row["wrong"] = "yes" if self.wrong_N[index] else "no"
        return row

    def table(self) -> str:
        """Return all samples that were judged as CSV with the columns COLUMNS."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(self.row, range(len(self.order))))
        return text.getvalue()


@dataclass(frozen=True, eq=False)
class _Judgement:
    """The judgement of one run; arrays by global index."""

    run: RunDir
    fingerprint: Fingerprint
    label_N: np.ndarray
    class_names: list[str]
    path: list[str]
    judged_N: np.ndarray  # bool: neither threshold samples nor quarantined
    rank_N: np.ndarray  # float64, 0 where not judged
    wrong_N: np.ndarray | None  # bool; None without threshold samples
    guess: dict[str, np.ndarray]  # as in `Suspects`


def find_suspects(runs: Sequence[Path], score: str = DEFAULT_SUSPICION) -> Suspects:
    """Rank the samples of one or several finished collections of the same images by suspicion: by
    `score`, one of SUSPICIONS, computed from what was recorded.

    Where a collection had threshold samples (`tdds write --threshold-samples`), it does not judge
    those, and by AUM it calls wrong what has a margin below their 99th percentile; of several such
    runs the first that judges a sample decides. Quarantined samples are not judged.

    Raises:
        InputError: an unknown score, an unfinished collection, nothing recorded, runs of other
        images or labels.
    """
    if score not in SUSPICIONS:
        raise InputError(f"score={score!r} is unknown here; use one of {', '.join(SUSPICIONS)}")
    found = [_judge(RunDir(run), score) for run in runs]
    first = found[0]
    label_N, num_N = np.full_like(first.label_N, -1), np.zeros(len(first.label_N))
    total_N = np.zeros(len(label_N))
    wrong_N, decided_N = np.zeros(len(label_N), dtype=bool), np.zeros(len(label_N), dtype=bool)
    guess: dict[str, np.ndarray] = {}
    for each in found:
        _require_same_images(each, first, label_N)
        is_new_N = each.judged_N & (label_N < 0)
        label_N[is_new_N] = each.label_N[is_new_N]
        total_N, num_N = total_N + each.rank_N, num_N + each.judged_N
        for key, guess_N in each.guess.items():
            into_N = guess.setdefault(key, np.full(len(label_N), np.nan, dtype=np.float32))
            into_N[is_new_N] = guess_N[is_new_N]
        if each.wrong_N is not None:
            wrong_N |= each.wrong_N & ~decided_N
            decided_N |= each.judged_N
    suspicion_N = total_N / np.maximum(num_N, 1)
    order = np.argsort(-suspicion_N, kind="stable")[: np.count_nonzero(num_N)]
    names = [name for name in first.class_names if name != THRESHOLD_CLASS]
    wrong = wrong_N if decided_N.any() else None
    return Suspects(order, suspicion_N, label_N, names, first.path, wrong, guess, first.fingerprint)


def ranks(value_N: np.ndarray) -> np.ndarray:
    """Return the rank of each value over N, float64 in (0, 1], equal values alike."""
    _, place_N, count = np.unique(value_N, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place_N] / len(value_N)


def _judge(run: RunDir, score: str) -> _Judgement:
    run.read_config()  # is it a run?
    if run.read_result() is None:
        raise InputError(
            f"{run.path}: its collection has not finished; start it again with the same command,"
            " and it goes on"
        )
    scores = _scores(run, score)
    beton = run.train_file()
    manifest = read_manifest(beton) if beton.is_file() else None
    names, path = list(map(str, range(scores.fingerprint.num_classes))), list[str]()
    if manifest is not None:
        require_same_dataset(manifest.fingerprint, scores.fingerprint, str(beton))
        names, path = manifest.class_names, manifest.path
    judged_N = np.zeros(len(scores.score_N), dtype=bool)
    judged_N[quarantine.eligible(scores)] = True
    guess: dict[str, np.ndarray] = {}
    if (file := run.scores / "entropy.npz").is_file():
        guess = dict(load_scores(file).extra)
    wrong_N = None
    if THRESHOLD_CLASS in names:
        threshold = names.index(THRESHOLD_CLASS)
        is_threshold_N = judged_N & (scores.label_N == threshold)
        judged_N &= ~is_threshold_N
        if "other" in guess:  # which is no answer
            known_N = guess["other"] != threshold
            guess |= {key: np.where(known_N, guess[key], np.nan) for key in ("other", "p_other")}
        if score == "aum" and is_threshold_N.any():  # the score is minus the margin
            cut = np.percentile(scores.score_N[is_threshold_N], 100 - THRESHOLD_PERCENTILE)
            wrong_N = judged_N & (scores.score_N > cut)
    rank_N = np.zeros(len(judged_N))
    rank_N[judged_N] = ranks(scores.score_N[judged_N])
    return _Judgement(
        run, scores.fingerprint, scores.label_N, names, path, judged_N, rank_N, wrong_N, guess
    )


def _scores(run: RunDir, score: str) -> Scores:
    """Compute a score in its suspicious direction, into no file of the run."""
    options = ["aum_keep=hardest"] if score == "aum" else []
    with tempfile.TemporaryDirectory() as folder:
        (path,), _ = score_all(run.path, [score], options=options, out=Path(folder))
        return load_scores(path)


def _require_same_images(each: _Judgement, first: _Judgement, label_N: np.ndarray) -> None:
    both = "" if len(each.label_N) == len(first.label_N) else "numbers of images"
    if not both and each.path and first.path and each.path != first.path:
        both = "images"
    if not both and (each.judged_N & (label_N >= 0) & (each.label_N != label_N)).any():
        both = "labels"
    if both:
        raise InputError(
            f"{each.run.path} and {first.run.path} are of different {both}; give runs on the same"
            " images and labels, which may differ in seed, network and threshold samples"
        )
