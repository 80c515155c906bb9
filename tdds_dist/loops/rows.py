"""Samples with several labels, or sequences of tokens: the scorer takes a row for each label or
token, and `merge_rows` makes samples of what it recorded."""

# R rows, N samples, F scalars, T epochs

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import UNKNOWN_LABEL, fingerprint
from tdds_dist.scoring.baselines import loss
from tdds_dist.scoring.sample_stats import SCALARS, VISITED
from tdds_dist.scoring.trajectory import Trajectory, TrajectoryWriter, require_no_trajectory

HOW = ("sum", "mean")


def merge_rows(rows: Path | str, out: Path | str, sample_R: np.ndarray, how: str = "sum") -> Path:
    """Write the trajectory of samples, of which `tdds score` makes all scores, from that of their
    rows; return its directory.

    `rows` is the trajectory of a `ShardedScorer` whose indices were rows; `sample_R` int64 [R] says
    which of the N samples each belongs to. Every sample has a row or more; ignored labels have
    none.

    `sum`, for several labels per sample: loss differences, loss (p_label is the product) and
    entropy add up, as those of independent labels do; EL2N is the norm over all rows, margins are
    the smallest, and a sample is correct where all rows are. `mean`, for sequences: everything is
    averaged over rows (p_label is the geometric mean), and a sample is correct where more than half
    of its rows are. Samples have no label of their own (-1). A quarantined row takes its sample
    with it.

    Raises:
        InputError: no trajectory, rows that some epochs skipped, samples without a row, or a
        trajectory in `out`.
    """
    recorded, out = Trajectory(rows), Path(out)
    sample_R = np.asarray(sample_R)
    if how not in HOW:
        raise InputError(f"how={how!r} is unknown; use one of {', '.join(HOW)}")
    if VISITED in recorded.scalars:
        raise InputError(
            f"{recorded.directory} was recorded with partial_epochs, and scores of merged samples"
            " need every row in every epoch; record without"
        )
    if sample_R.shape != (recorded.num_samples,) or sample_R.dtype.kind != "i":
        raise InputError(
            f"sample_R is {sample_R.dtype} {sample_R.shape}; give the sample of each of the"
            f" {recorded.num_samples} rows, as integers"
        )
    num_N = np.bincount(sample_R) if sample_R.min() >= 0 else np.zeros(1)
    if not num_N.all():
        raise InputError(
            f"sample {int(np.flatnonzero(num_N == 0)[0])} has no row; number the samples from 0"
            " without a gap, and leave out those that have nothing to score"
        )
    require_no_trajectory(out)
    num_samples = len(num_N)
    label_N = np.full(num_samples, UNKNOWN_LABEL)
    about = fingerprint(label_N, recorded.num_classes)
    writer = TrajectoryWriter(
        out,
        SCALARS,
        num_samples,
        recorded.num_classes,
        0,
        num_samples,
        True,
        "float32",  # sums may be beyond float16
        recorded.scored,
    )
    writer.write_labels(label_N, about.labels_sha256)
    first_epoch: dict[int, int] = {}
    for row, epoch in recorded.quarantined.items():
        sample = int(sample_R[row])
        first_epoch[sample] = min(epoch, first_epoch.get(sample, epoch))
    if first_epoch:
        writer.write_quarantine(first_epoch)
    for epoch in range(recorded.num_epochs):
        value_FR = recorded.read_epoch(epoch)
        of_rows = dict(zip(recorded.scalars, value_FR, strict=True))
        merged = [_merge(name, of_rows[name], sample_R, num_N, how) for name in SCALARS]
        writer.append(epoch, np.stack(merged).astype(np.float32))
    return out


def _merge(
    name: str, value_R: np.ndarray, sample_R: np.ndarray, num_N: np.ndarray, how: str
) -> np.ndarray:
    """Return one scalar of the samples, float64 [N]."""

    def total(of_R: np.ndarray) -> np.ndarray:
        return np.bincount(sample_R, of_R.astype(np.float64))

    if name == "p_label":
        return np.exp(-total(loss(value_R)) / (num_N if how == "mean" else 1))
    if how == "mean":
        mean_N = total(value_R) / num_N
        return mean_N > 0.5 if name == "correct" else mean_N
    merge: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "el2n": lambda of_R: np.sqrt(total(of_R.astype(np.float64) ** 2)),
        "correct": lambda of_R: total(of_R) == num_N,
        "logit_margin": lambda of_R: _smallest(of_R, sample_R, len(num_N)),
        "p_margin": lambda of_R: _smallest(of_R, sample_R, len(num_N)),
    }
    return merge.get(name, total)(value_R)


def _smallest(value_R: np.ndarray, sample_R: np.ndarray, num_samples: int) -> np.ndarray:
    least_N = np.full(num_samples, np.inf)
    np.minimum.at(least_N, sample_R, value_R)
    return least_N
