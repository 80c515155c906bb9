"""Quarantine: samples that gave NaN or infinite logits are scored lowest, and stand in no coreset.

Owns that rule, the entry `quarantined` in the settings of scores and coresets and in results,
quarantine.json of a trajectory, and the words of the warnings.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Scores, write_atomically

FILE, FORMAT = "quarantine.json", "tdds-quarantine-1"
_KEY = "quarantined"
_NUM_NAMED, _NUM_NAMED_CLASSES = 20, 8


# ---- scores


def set_lowest(score_N: np.ndarray, quarantined: Collection[int]) -> np.ndarray:
    """Return a copy in which `quarantined` samples (global indices) have the lowest score of all
    others.

    Whatever they had before, finite or not; a ranking then prunes them first.

    Raises:
        InputError: an index outside [0, N), or no other samples.
    """
    score_N = score_N.copy()
    rest_n = not_quarantined(len(score_N), quarantined)
    if len(rest_n) < len(score_N):
        score_N[list(quarantined)] = score_N[rest_n].min()
    return score_N


def not_quarantined(num_samples: int, quarantined: Collection[int]) -> np.ndarray:
    """Return the other samples' global indices, int64 [n], sorted; raise InputError as
    `set_lowest`."""
    if outside := [index for index in quarantined if not 0 <= index < num_samples]:
        raise InputError(
            f"quarantined sample {outside[0]} is not in [0, {num_samples}); the list is of another"
            " dataset, score again"
        )
    is_left_N = np.ones(num_samples, dtype=bool)
    is_left_N[list(quarantined)] = False
    if not is_left_N.any():
        raise InputError(
            f"all {num_samples} samples are quarantined: each gave logits that are not finite, so"
            " no score says anything; look for what made training diverge"
        )
    return np.flatnonzero(is_left_N)


def eligible(scores: Scores) -> np.ndarray:
    """Return the global indices of the samples that a coreset may keep, int64 [n], sorted; raise
    InputError as `set_lowest`."""
    return not_quarantined(len(scores.score_N), noted_in(scores.settings))


# ---- the entry in settings and results


def noted(quarantined: Collection[int]) -> dict[str, list[int]]:
    """Return the entry, sorted; nothing when no sample is quarantined."""
    return {_KEY: sorted(quarantined)} if quarantined else {}


def noted_in(record: Mapping[str, Any]) -> list[int]:
    """Return the global indices that settings or a result name."""
    return record.get(_KEY, [])


# ---- warnings


def warning(quarantined: Collection[int]) -> list[str]:
    """Say which samples of a collection are in quarantine, if any."""
    if not quarantined:
        return []
    more = " ..." if len(quarantined) > _NUM_NAMED else ""
    return [
        f"{len(quarantined)} samples are in quarantine (NaN or infinite logits), scored lowest:"
        f" global indices {sorted(quarantined)[:_NUM_NAMED]}{more}"
    ]


def coreset_warnings(scores: Scores) -> list[str]:
    """Say how many samples a coreset leaves out, and which classes lose all of theirs."""
    rest_n, label_N = eligible(scores), scores.label_N
    num = len(scores.score_N) - len(rest_n)
    if not num:
        return []
    samples, are = ("samples", "are") if num > 1 else ("sample", "is")
    warnings = [f"{num} quarantined {samples} (NaN logits) {are} in no coreset"]
    if len(gone := np.setdiff1d(label_N[label_N >= 0], label_N[rest_n])):
        warnings.append(
            f"all samples of {len(gone)} classes are quarantined (first:"
            f" {gone[:_NUM_NAMED_CLASSES].tolist()})"
        )
    return warnings


# ---- quarantine.json


def read(directory: Path, num_samples: int) -> dict[int, int]:
    """Return the samples that a trajectory keeps out of scores: global index -> first epoch in
    which its logits were not finite, by index. Raise InputError when the file is damaged."""
    path = directory / FILE
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} instead of {FORMAT!r}")
        found = {int(index): epoch for index, epoch in content["samples"].items()}
        if any(type(epoch) is not int or epoch < 0 for epoch in found.values()):
            raise ValueError("epochs must be integers from 0 on")
        if outside := [index for index in found if not 0 <= index < num_samples]:
            raise ValueError(f"sample {outside[0]} is not in [0, {num_samples})")
    # not text, not JSON, not of this form
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); restore it or collect again") from error
    return dict(sorted(found.items()))


def write(directory: Path, epoch_of_index: Mapping[int, int]) -> None:
    """Write what `read` returns; an empty list leaves no file."""
    if not epoch_of_index:
        (directory / FILE).unlink(missing_ok=True)
        return
    samples = {str(int(index)): int(epoch) for index, epoch in sorted(epoch_of_index.items())}
    text = json.dumps({"format": FORMAT, "samples": samples})
    write_atomically(directory / FILE, lambda file: file.write(text.encode()))
