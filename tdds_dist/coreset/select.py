"""Stage `select`: from a score to a coreset file.

Owns which sampler a score is meant for, the importance that goes with it, and names; the samplers
are in `samplers`.
"""

# N dataset, M kept samples, n samples that are not quarantined, m those of one class

import difflib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.grid import BUILT_IN_METHODS
from tdds_dist.config.run import parse_config
from tdds_dist.config.scores import CLASS_BALANCED, SAMPLER_OF_SCORE, SAMPLERS
from tdds_dist.coreset import samplers
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Coreset, Scores, load_coreset, load_scores, save_coreset
from tdds_dist.runs.directory import RunDir, any_scores, coreset_name, move_aside
from tdds_dist.scoring import baselines, quarantine

CCS_SCORE = "aum"  # what `--score ccs` cuts into strata, as in its paper
DEFAULT_STRATA = 50
DEFAULT_C_D = 4.0  # exponent of DUAL's authors on CIFAR-100


def default_sampler(scores: Scores) -> str:
    """Return the sampler a score is meant for: the centre of the ranking for Moderate, that of S2L
    for its clusters, else the top."""
    return SAMPLER_OF_SCORE.get(scores.settings.get("score", scores.key), "top")


def is_balanced(scores: Scores, class_balanced: bool | None = None) -> bool:
    """Say whether classes are chosen from by themselves: as asked for, by default for `cld`."""
    if class_balanced is None:
        return scores.settings.get("score", scores.key) in CLASS_BALANCED
    return class_balanced


def choose(
    scores: Scores,
    pruning_rate: float,
    *,
    sampler: str | None = None,
    class_balanced: bool | None = None,
    seed: int = 0,
    num_strata: int = DEFAULT_STRATA,
    hard_cutoff_rate: float | None = None,
    c_d: float = DEFAULT_C_D,
    recall_C: np.ndarray | None = None,
) -> np.ndarray:
    """Return the kept global indices, sorted int64 [M], M = N - round(p N).

    `sampler`: `top` (below `hard_cutoff_rate`, by default 0), `centre` (Moderate), `ccs` (strata;
    `num_strata`, `hard_cutoff_rate`, by default that of the pruning rate), `beta` (DUAL's weighted
    draw; `c_d`), `s2l` (from clusters of loss trajectories), `drop` (the top of each class, more of
    classes with low `recall_C`, float [C]); default the one the score is meant for.
    `class_balanced` applies it to each class by itself; None: for `cld` only. `seed` decides draws
    and ties. Quarantined samples (`settings["quarantined"]`) are never kept: it chooses among the
    others, all of them if they are fewer than M.

    Raises:
        InputError: a sampler that does not fit the score, scores that are not finite, a rate that
        keeps nothing.
    """
    sampler = sampler or default_sampler(scores)
    if sampler not in SAMPLERS:
        raise InputError(f"sampler={sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
    rest_n = quarantine.eligible(scores)
    score_n, label_n = scores.score_N[rest_n], scores.label_N[rest_n]
    if not np.isfinite(score_n).all():
        raise InputError(
            f"score {scores.key!r} holds {int((~np.isfinite(score_n)).sum())} values that are not "
            "finite; compute it again with `tdds score`"
        )
    num = min(samplers.num_kept(len(scores.score_N), pruning_rate), len(rest_n))
    pick: Callable[..., np.ndarray] = samplers.top
    if hard_cutoff_rate is not None and sampler not in ("top", "ccs"):
        raise InputError(
            f"hard_cutoff_rate={hard_cutoff_rate:g} does nothing with sampler {sampler}; leave it"
            " out, or choose sampler top or ccs"
        )
    if (sampler == "ccs" or hard_cutoff_rate) and scores.settings.get("keep") == "easiest":
        raise InputError(
            f"score {scores.key!r} ranks easy samples first, and what ranks first is cut off as too"
            " hard; score again with aum_keep=hardest"
        )
    if sampler == "ccs":
        if hard_cutoff_rate is None:
            hard_cutoff_rate = samplers.default_hard_cutoff(pruning_rate)
        pick = partial(samplers.ccs, num_strata=num_strata, hard_cutoff_rate=hard_cutoff_rate)
    elif sampler == "beta":
        if "p_mean" not in scores.extra:
            raise InputError(
                f"score {scores.key!r} comes without the mean probability that sampler beta looks"
                " at; use --score dual"
            )
        p_mean_n = scores.extra["p_mean"][rest_n]
    elif sampler == "s2l":
        if "cluster" not in scores.extra:
            raise InputError(
                f"score {scores.key!r} comes without the clusters that sampler s2l draws from; use"
                " --score s2l"
            )
        cluster_n = scores.extra["cluster"][rest_n].astype(np.int64)
    elif sampler == "drop":
        if class_balanced:
            raise InputError(
                "sampler drop has quotas of its own for the classes; leave --class-balanced out, or"
                " choose another sampler"
            )
        if (
            recall_C is None
            or len(recall_C) != scores.fingerprint.num_classes
            or not np.isfinite(recall_C[np.unique(label_n)]).any()
        ):
            raise InputError(
                "sampler drop divides by the recall of each class, which a run records at"
                " validation; give a run that `tdds collect` of this version made"
            )
    elif sampler == "centre":
        pick = samplers.centre
    elif hard_cutoff_rate:
        pick = partial(samplers.top, hard_cutoff_rate=hard_cutoff_rate)

    def pick_among(member_m: np.ndarray, quota: int, draw_seed: int) -> np.ndarray:
        if sampler == "beta":
            return samplers.beta_sample(
                score_n[member_m], p_mean_n[member_m], quota, pruning_rate, c_d=c_d, seed=draw_seed
            )
        if sampler == "s2l":
            return samplers.from_strata(cluster_n[member_m], quota, draw_seed)
        return pick(score_n[member_m], quota, seed=draw_seed)

    def pick_of_class(member_m: np.ndarray, quota: int) -> np.ndarray:
        label = int(label_n[member_m[0]])  # every class draws by itself
        return pick_among(
            member_m, quota, int(np.random.SeedSequence([seed, label]).generate_state(1)[0])
        )

    if sampler == "drop" or is_balanced(scores, class_balanced):
        recall_C = recall_C if sampler == "drop" else None
        return rest_n[samplers.per_class(pick_of_class, label_n, num, recall_C)]
    return rest_n[pick_among(np.arange(len(rest_n)), num, seed)]


def make_coreset(
    scores: Scores,
    pruning_rate: float,
    *,
    sampler: str | None = None,
    class_balanced: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Coreset, list[str]]:
    """Return the coreset of `choose` with its importances, and warnings about it.

    Importance: the score scaled to [0, 1] over all N, less the quarantined, for TDDS in preset
    `official`, the score itself in `paper` (section 4.3), 1 for every other score, which its paper
    does not weigh by.
    """
    asked = class_balanced is True
    index_M = choose(
        scores, pruning_rate, sampler=sampler, class_balanced=class_balanced, seed=seed, **options
    )
    class_balanced = is_balanced(scores, class_balanced) and sampler != "drop"
    rest_n = quarantine.eligible(scores)
    score_n, label_n = scores.score_N[rest_n], scores.label_N[rest_n]
    warnings = quarantine.coreset_warnings(scores)
    if scores.key != "random" and score_n.min() == score_n.max():
        warnings.append(
            f"all {len(score_n)} scores of {scores.key} are {score_n[0]:g}, so the choice is "
            "a random draw"
            + ("; raise K, and score again" if scores.settings.get("score") == "tdds" else "")
        )
    kept_M = np.searchsorted(rest_n, index_M)  # positions among the others
    empty = samplers.empty_classes(kept_M, label_n)
    if len(empty):
        message = (
            f"{len(empty)} of {len(np.unique(label_n))} classes keep no sample (first:"
            f" {empty[:8].tolist()})"
        )
        if asked:
            raise InputError(f"pruning_rate={pruning_rate}: {message}; lower the pruning rate")
        if sampler == "drop":
            message += "; drop gives none to a class of which validation got all right"
        elif not class_balanced:
            message += "; --class-balanced keeps the same share of each"
        warnings.append(message)
    sampler = sampler or default_sampler(scores)
    origin = {"collection_seed": scores.settings["seed"]} if "seed" in scores.settings else {}
    settings = (
        scores.settings
        | origin
        | {
            "importance": importance_kind(scores),
            "sampler": sampler,
            "class_balanced": class_balanced,
            "seed": seed,
        }
    )
    own = options.get("hard_cutoff_rate")
    settings |= {} if own is None else {"own_hard_cutoff_rate": own, "hard_cutoff_rate": own}
    if sampler == "ccs":
        settings |= {
            "num_strata": options.get("num_strata", DEFAULT_STRATA),
            "hard_cutoff_rate": samplers.default_hard_cutoff(pruning_rate) if own is None else own,
        }
    if sampler == "beta":
        settings["c_d"] = options.get("c_d", DEFAULT_C_D)
    coreset = Coreset(
        index_M,
        importance_of(scores)[index_M],
        scores.key,
        pruning_rate,
        scores.fingerprint,
        settings,
    )
    return coreset, warnings


def plan_coreset(
    source: Path,
    pruning_rate: float,
    *,
    score: str = "tdds",
    sampler: str | None = None,
    class_balanced: bool | None = None,
    seed: int = 0,
    out: Path | None = None,
    **options: Any,
) -> tuple[Path, Coreset, list[str]]:
    """Run the stage without its last step; return the file to write, the coreset, and warnings.

    `source` is a run directory or a score file. In a run, `score` is `tdds` (the window that its
    config assigns to the pruning rate), `random` (a seeded draw), `ccs` (AUM in strata), or the
    name of a file in `scores/`. Sampler and options as in `choose`.

    Raises:
        InputError: no such score, or what `choose` raises.
    """
    source = Path(source)
    if 1 < pruning_rate <= 100:
        raise InputError(
            f"pruning_rate={pruning_rate:g} must lie in [0, 1): it is the fraction that is removed;"
            f" {pruning_rate:g} % is {pruning_rate / 100:g}"
        )
    samplers.num_kept(10**9, pruning_rate)  # the range, before any file is read
    method = BUILT_IN_METHODS.get(score)
    if method is not None and score not in (method.score_key, "ccs"):
        raise InputError(
            f"--score {score} is a score and a way to choose by it; use --score {method.score_key}"
            f" --sampler {method.sampler}"
        )
    if score == "ccs":
        if sampler not in (None, "ccs"):
            raise InputError(
                f"--score ccs means sampler ccs on {CCS_SCORE}, not sampler {sampler}; name the"
                " score instead"
            )
        score, sampler = CCS_SCORE, "ccs"
    if sampler == "drop":
        options["recall_C"] = recall_of(source)
    scores = (
        random_scores(any_scores(source), seed)
        if score == "random"
        else find_scores(source, score, pruning_rate)
    )
    try:
        coreset, warnings = make_coreset(
            scores,
            pruning_rate,
            sampler=sampler,
            class_balanced=class_balanced,
            seed=seed,
            **options,
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    path = Path(out) if out is not None else _default_path(source, coreset)
    if path.suffix != ".npz":
        raise InputError(f"--out={path} must end in .npz")
    return path, coreset, warnings


def recall_of(source: Path) -> np.ndarray | None:
    """Return the recall of each class at the last validation of a run, or of the run that a score
    file lies in; None where there is none."""
    run = RunDir(source.parent.parent if source.is_file() else source)
    classes = run.read_val_classes()
    return None if classes is None else classes.recall_EC[-1]


def check_place(path: Path, coreset: Coreset, force: bool = False) -> None:
    """Raise InputError where another coreset, or something else, has that name; not with `force`,
    with which `put` moves it aside."""
    if not force and path.exists() and (changed := changes(path, coreset)):
        raise InputError(
            f"{path} {changed}; choose another name with --out, or give --force, which moves it"
            " aside"
        )


def put(path: Path, coreset: Coreset) -> list[str]:
    """Save a coreset unless it is there already; what else has its name is moved aside. Return what
    to say of that."""
    if not path.exists():
        save_coreset(path, coreset)
        return []
    if not (changed := changes(path, coreset)):
        with suppress(OSError):  # a file of somebody else
            path.touch()  # it is that of the scores that are there now, which may be newer
        return []
    aside = move_aside(path)
    save_coreset(path, coreset)
    return [
        f"{path} {changed}; it is moved aside to {aside}, and retrainings on it are not of the"
        " new one"
    ]


def changes(path: Path, coreset: Coreset) -> str:
    """Say what the file holds instead of this coreset, with the settings that differ; "" when it is
    the same one.

    Where and on how many ranks the scores were computed, live or afterwards, makes no difference.
    """
    try:
        before = load_coreset(path)
    except InputError:
        return "is there and is no readable coreset"
    was, now = (
        {"score": each.score_key, "pruning_rate": each.pruning_rate} | each.settings
        for each in (before, coreset)
    )
    changed = [
        f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in dict.fromkeys([*was, *now])
        if key not in ("source", "world_size") and was.get(key) != now.get(key)
    ]
    if before.fingerprint != coreset.fingerprint:
        changed.append("of another dataset")
    if not changed and (
        not np.array_equal(before.index_M, coreset.index_M)
        or not np.array_equal(before.importance_M, coreset.importance_M)
    ):
        changed.append("the scores it was chosen by were others")
    if not changed:
        return ""
    return (
        f"holds another coreset, {len(before.index_M)} images by {before.method}"
        f" ({'; '.join(changed)})"
    )


def find_scores(source: Path, score: str, pruning_rate: float) -> Scores:
    """Load the scores called `score` of a run directory, or those of a score file; raise InputError
    when there are none."""
    if source.is_file():
        scores = load_scores(source)
        if score not in ("tdds", scores.key):
            raise InputError(
                f"{source} holds the score {scores.key!r}, not {score!r}; leave --score out, or"
                " give a run"
            )
        return scores
    run = RunDir(source)
    if score == "tdds":
        config = parse_config(run.read_config(), str(run.config_file))
        score = config.window_for(pruning_rate).key(config.score.preset)
    path = run.scores / f"{score.removesuffix('.npz')}.npz"
    if not path.is_file():
        planned = ((run.read_config() or {}).get("train") or {}).get("epochs")
        if planned and not run.result_file.is_file():
            raise InputError(
                f"{source} has no score {path.stem!r}: its collection has not finished"
                f" ({len(run.read_metrics())} of {planned} epochs); start it again with the same"
                " command, and it goes on"
            )
        there = sorted({path.stem for path in run.scores.glob("*.npz")} - {"random"})
        like = [
            stem for stem in there if stem.startswith(f"{score}_")
        ] or difflib.get_close_matches(score, there, 1)
        way_out = (
            f"--score {like[0]} is the nearest"
            if like
            else f"`tdds score {source} "
            + (
                "--final-pass` computes it"
                if score in ("entropy", "moderate")
                else "--all` computes every score of the run"
            )
        )
        raise InputError(
            f"{run.scores} has no score {score!r}; it has {', '.join(['tdds', 'random', *there])};"
            f" {way_out}"
        )
    return load_scores(path)


def random_scores(like: Scores, seed: int) -> Scores:
    """Return a seeded draw as scores, for the dataset of `like`, with its quarantined samples."""
    score_N = baselines.random(len(like.score_N), seed)
    settings = {"score": "random"} | quarantine.noted(quarantine.noted_in(like.settings))
    return Scores("random", score_N, like.label_N, like.fingerprint, settings)


def importance_kind(scores: Scores) -> str:
    """Name the kind of importance in a coreset of these scores: `min_max`, `score` or `uniform`."""
    if scores.settings.get("score") != "tdds":
        return "uniform"
    return "score" if scores.settings.get("preset") == "paper" else "min_max"


def importance_of(scores: Scores) -> np.ndarray:
    """Return the importance of each sample, float32 [N]; 1 for the quarantined."""
    kind, rest_n = importance_kind(scores), quarantine.eligible(scores)
    importance_N = np.ones(len(scores.score_N), dtype=np.float32)
    if kind != "uniform":
        score_n = scores.score_N[rest_n]
        importance_N[rest_n] = score_n if kind == "score" else samplers.min_max(score_n)
    return importance_N


def _default_path(source: Path, coreset: Coreset) -> Path:
    run = source.parent.parent if source.is_file() and source.parent.name == "scores" else source
    folder = RunDir(run).coresets if run.is_dir() else source.parent
    name = coreset.method
    if source.is_file() and coreset.score_key != "random":
        name = name.replace(coreset.score_key, source.stem)  # two files may hold the same key
    drawn = coreset.score_key == "random" or coreset.settings["sampler"] in ("ccs", "beta", "s2l")
    seed = f"_s{coreset.settings['seed']}" if drawn else ""
    return folder / coreset_name(f"{name}{seed}", coreset.pruning_rate)
