"""Stage `select`: from a score to a coreset file."""

from pathlib import Path

import numpy as np

from tdds_dist import baselines, selection
from tdds_dist.artifacts import Coreset, Scores, load_scores, save_coreset
from tdds_dist.config import parse_config
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir


def select(source: Path, pruning_rate: float, *, score: str = "tdds", class_balanced: bool = False, seed: int = 0,
           out: Path | None = None) -> tuple[Path, list[str]]:
    """Run the stage; returns the coreset file and warnings.

    `source` is a run directory or a score file. In a run, `score` is `tdds` (the window that its config assigns to the
    pruning rate), `random` (a seeded draw), or the name of a file in `scores/`.

    Raises:
        InputError: no such score, or a pruning rate that keeps nothing.
    """
    source = Path(source)
    selection.num_kept(10**9, pruning_rate)  # the range, before any file is read
    scores = _random(_any_scores(source), seed) if score == "random" else _find(source, score, pruning_rate)
    score_N, label_N = scores.score_N, scores.label_N
    if not np.isfinite(score_N).all():
        raise InputError(f"{source}: score {scores.key!r} holds {int((~np.isfinite(score_N)).sum())} values that are not "
                         "finite; compute it again with `tdds score`")
    num = selection.num_kept(len(score_N), pruning_rate)
    if class_balanced:
        index_M = selection.top_per_class(score_N, label_N, num, seed)
    else:
        index_M = selection.top(score_N, num, seed)
    empty = selection.empty_classes(index_M, label_N)
    warnings = []
    if len(empty):
        message = f"{len(empty)} of {len(np.unique(label_N))} classes keep no sample (first: {empty[:8].tolist()})"
        if class_balanced:
            raise InputError(f"pruning_rate={pruning_rate}: {message}; lower the pruning rate")
        warnings.append(f"{message}; --class-balanced keeps every class")
    settings = scores.settings | {"importance": _importance_kind(scores), "class_balanced": class_balanced, "seed": seed}
    coreset = Coreset(index_M, _importance(scores)[index_M], scores.key, pruning_rate, scores.fingerprint, settings)
    name = f"random_s{seed}" if score == "random" else source.stem if source.is_file() else scores.key
    path = Path(out) if out is not None else _default_path(source, name, pruning_rate, class_balanced)
    save_coreset(path, coreset)
    return path, warnings


def _find(source: Path, score: str, pruning_rate: float) -> Scores:
    if source.is_file():
        scores = load_scores(source)
        if score not in ("tdds", scores.key):
            raise InputError(f"{source} holds the score {scores.key!r}, not {score!r}; leave --score out, or give a run")
        return scores
    run = RunDir(source)
    if score == "tdds":
        config = parse_config(run.read_config(), str(run.config_file))
        score = config.window_for(pruning_rate).key(config.score.preset)
    path = run.scores / f"{score.removesuffix('.npz')}.npz"
    if not path.is_file():
        known = ["tdds", "random", *sorted(path.stem for path in run.scores.glob("*.npz"))]
        raise InputError(f"{run.scores} has no score {score!r}; it has {', '.join(known)}")
    return load_scores(path)


def _any_scores(source: Path) -> Scores:
    """Any score file, for the labels and fingerprint of the dataset."""
    if source.is_file():
        return load_scores(source)
    found = sorted(RunDir(source).scores.glob("*.npz"))
    if not found:
        raise InputError(f"{source} holds no scores; run `tdds collect` or `tdds score` first")
    return load_scores(found[0])


def _random(like: Scores, seed: int) -> Scores:
    score_N = baselines.random(len(like.score_N), seed)
    return Scores("random", score_N, like.label_N, like.fingerprint, {"score": "random"})


def _importance_kind(scores: Scores) -> str:
    if scores.settings.get("score") == "random":
        return "uniform"
    return "score" if scores.settings.get("preset") == "paper" else "min_max"


def _importance(scores: Scores) -> np.ndarray:
    """Importance of all N samples: the score itself in preset `paper` (section 4.3), scaled to [0, 1] over the whole
    dataset in `official`, 1 for a random coreset."""
    kind = _importance_kind(scores)
    if kind == "uniform":
        return np.ones_like(scores.score_N)
    return scores.score_N if kind == "score" else selection.min_max(scores.score_N)


def _default_path(source: Path, name: str, pruning_rate: float, class_balanced: bool) -> Path:
    run = source.parent.parent if source.is_file() and source.parent.name == "scores" else source
    folder = RunDir(run).coresets if run.is_dir() else source.parent
    return folder / f"{name}_p{pruning_rate:g}{'_balanced' if class_balanced else ''}.npz"
