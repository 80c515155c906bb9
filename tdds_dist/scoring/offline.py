"""Stage `score`: compute scores from what was recorded, without touching an image.

Reads our trajectory, the same as a Parquet table, or a dynamics folder of the authors' code.
`score` gives TDDS in any setting, `score_all` every score that needs no final model; `final_pass`
makes the two that do. Quarantined samples get the lowest score of the others.
"""

# T epochs, N dataset

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.run import Baselines, Config, parse_baselines, parse_config
from tdds_dist.config.scores import Window, check_window, delta_scalar, window_settings
from tdds_dist.console import Progress, log
from tdds_dist.data.beton import dataset_fingerprint, inspect_beton
from tdds_dist.data.manifest import check_labels, read_manifest
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    UNKNOWN_LABEL,
    Fingerprint,
    Scores,
    fingerprint,
    load_scores,
)
from tdds_dist.runs.directory import RunDir, any_scores, put_scores
from tdds_dist.scoring import baselines, quarantine
from tdds_dist.scoring.official_outputs import Dynamics, is_dynamics
from tdds_dist.scoring.sample_stats import VISITED
from tdds_dist.scoring.tdds import score_trajectory
from tdds_dist.scoring.trajectory import Trajectory
from tdds_dist.scoring.trajectory_table import TrajectoryTable
from tdds_dist.text import command

Recorded = Trajectory | TrajectoryTable | Dynamics
MODEL_SCORES = ("entropy", "moderate")  # need the final model; see `final_pass`


# scores [N], and what samplers need [N]
Computed = tuple[np.ndarray, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Baseline:
    """A score that is computed from one recorded scalar."""

    recorded: str  # the scalar
    options: tuple[str, ...]  # keys of score.baselines that it reads
    # from the scalar, [T, N], and options; of one that looks at classes, also from labels and val
    # losses
    compute: Callable[..., Computed]
    of_classes: bool = False

    def scalar(self, options: Baselines) -> str:
        """Return the name of the scalar; a margin may be of logits or of probabilities."""
        is_of_p = "aum_of" in self.options and options.aum_of == "probability"
        return "p_margin" if is_of_p else self.recorded

    def settings(self, options: Baselines) -> dict[str, Any]:
        """Return what score files say of the options; of the epochs they say T."""
        names = [name for name in self.options if name != "num_epochs"]
        return {_IN_SETTINGS.get(name, name): getattr(options, name) for name in names}


_WINDOW, _EPOCHS = ("uncertainty_window", "num_epochs"), ("num_epochs",)
BASELINES = {
    "forgetting": Baseline(
        "correct",
        ("never_learned", "num_epochs"),
        lambda v, o: (baselines.forgetting(v, o.never_learned), {}),
    ),
    "el2n": Baseline("el2n", ("el2n_epochs",), lambda v, o: (baselines.el2n(v, o.el2n_epochs), {})),
    "aum": Baseline(
        "logit_margin",
        ("aum_of", "aum_keep", "num_epochs"),
        lambda v, o: (baselines.aum(v, o.aum_keep), {}),
    ),
    "dyn_unc": Baseline(
        "p_label", _WINDOW, lambda v, o: (baselines.dyn_unc(v, o.uncertainty_window), {})
    ),
    "dual": Baseline(
        "p_label",
        _WINDOW,
        lambda v, o: (
            baselines.dual(v, o.uncertainty_window),
            {"p_mean": baselines.mean_probability(v)},
        ),
    ),
    "csl": Baseline("p_label", _EPOCHS, lambda v, o: (baselines.csl(v), {})),
    "confidence": Baseline("p_label", _EPOCHS, lambda v, o: (baselines.confidence(v), {})),
    "variability": Baseline("p_label", _EPOCHS, lambda v, o: (baselines.variability(v), {})),
    "correctness": Baseline("correct", _EPOCHS, lambda v, o: (baselines.correctness(v), {})),
    "learning_time": Baseline("correct", _EPOCHS, lambda v, o: (baselines.learning_time(v), {})),
    "cld": Baseline(
        "p_label",
        _EPOCHS,
        lambda v, o, label_N, val_loss_EC: (baselines.cld(v, label_N, val_loss_EC), {}),
        of_classes=True,
    ),
    "s2l": Baseline(
        "p_label",
        ("num_clusters", "num_epochs"),
        lambda v, o: _by_cluster(loss_clusters(v, o.num_clusters)),
    ),
}
_IN_SETTINGS = {"aum_keep": "keep", "uncertainty_window": "J"}  # others as they are
_IN_NAMES = {
    "never_learned": "never{}",
    "el2n_epochs": "T{}",
    "num_epochs": "T{}",
    "aum_of": "{}",
    "aum_keep": "{}",
    "uncertainty_window": "J{}",
    "num_clusters": "C{}",
}
_POINTS_PER_CLUSTER = 256  # of the samples that clusters are found from, as in S2L's code by faiss
_CLUSTER_ROUNDS = 20  # likewise


def loss_clusters(p_label_TN: np.ndarray, num_clusters: int) -> np.ndarray:
    """Cluster loss trajectories by k-means, as S2L does (Yang et al., NeurIPS 2024, arXiv
    2403.07384); int64 [N], clusters from 0.

    Centres are found from 256 samples per cluster, drawn with a fixed seed, in 20 rounds at most.

    Raises:
        InputError: more clusters than samples.
    """
    from sklearn.cluster import KMeans  # half a second
    from threadpoolctl import threadpool_limits

    num_samples = p_label_TN.shape[1]
    if num_clusters > num_samples:
        raise InputError(
            f"num_clusters={num_clusters} are more than the {num_samples} samples; lower it"
        )
    loss_NT = np.stack([baselines.loss(p_N).astype(np.float32) for p_N in p_label_TN], axis=1)
    drawn = np.random.default_rng(0).permutation(num_samples)[: _POINTS_PER_CLUSTER * num_clusters]
    means = KMeans(num_clusters, n_init=1, max_iter=_CLUSTER_ROUNDS, random_state=0)
    # one thread: several add up in an order of their own
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer distinct trajectories than clusters
        return means.fit(loss_NT[drawn]).predict(loss_NT).astype(np.int64)


def _by_cluster(cluster_N: np.ndarray) -> Computed:
    """Rank samples of small clusters first."""
    size_N = np.bincount(cluster_N)[cluster_N]
    return -size_N.astype(np.float32), {"cluster": cluster_N}


def file_key(key: str, options: Baselines) -> str:
    """Return the name of a score's file: the key, and every option that it reads and that is not
    the default."""
    default = Baselines()
    changed = [
        name for name in BASELINES[key].options if getattr(options, name) != getattr(default, name)
    ]
    return "_".join([key, *(_IN_NAMES[name].format(getattr(options, name)) for name in changed)])


def check_options(key: str, options: Baselines, given: Sequence[str], num_epochs: int) -> int:
    """Return the number of epochs that a score uses; raise InputError when an option is longer than
    the `num_epochs` there are, or when the score does not read one of the `given` (`key=value`)."""
    reads = BASELINES[key].options if key in BASELINES else ()
    for option in given:
        name = option.partition("=")[0].removeprefix("score.baselines.")
        if name not in reads:
            what = f"it reads {', '.join(reads)}" if reads else "it has no options"
            raise InputError(f"{option} does nothing for score {key}: {what}; leave it out")
    for name in ("el2n_epochs", "num_epochs"):
        if name in reads and getattr(options, name) > num_epochs:
            raise InputError(
                f"{name}={getattr(options, name)} is longer than the {num_epochs} recorded epochs;"
                " lower it, or collect longer"
            )
    looked_at = options.el2n_epochs if key == "el2n" else options.num_epochs or num_epochs
    if key == "forgetting" and looked_at < 2:
        raise InputError(
            f"forgetting needs at least 2 epochs to compare, and there are {looked_at}; use more"
        )
    if "uncertainty_window" in reads and options.uncertainty_window > looked_at:
        raise InputError(
            f"uncertainty_window={options.uncertainty_window} is longer than the {looked_at} epochs"
            " there are; lower it, or collect longer"
        )
    return looked_at


def score(
    source: Path,
    *,
    preset: str | None = None,
    T: int | None = None,
    K: int | None = None,
    beta: float | None = None,
    delta: str = "kl",
    beton: Path | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Compute TDDS from what was recorded; return the score files.

    `source` is a run directory, a trajectory directory or table, or a dynamics folder. T, K, beta
    and preset default to those that were scored live, where all windows agree; else T defaults to
    all epochs, K to 10, beta to 0.9, preset to `official`. Without T and K, every window that was
    scored live.
    `delta` chooses an ablation of section 5.4 (`ABLATIONS` in `config.scores`). `beton` supplies
    labels where the source has none.

    Raises:
        InputError: nothing recorded there, epochs missing, settings that do not fit.
    """
    origin = open_recorded(Path(source), beton)
    windows, preset = origin.windows(preset, T, K, beta)
    if out is not None and Path(out).suffix != ".npz":
        raise InputError(f"--out={out} must end in .npz: it names the one score file")
    if out is not None and len(windows) > 1:
        raise InputError(
            f"--out={out} names one file, the run has {len(windows)} windows; choose one with --T"
            " and --K"
        )
    return _score_windows(origin, windows, preset, delta, None if out is None else Path(out))


def score_all(
    source: Path,
    keys: Sequence[str] = (),
    *,
    options: Sequence[str] = (),
    beton: Path | None = None,
    out: Path | None = None,
) -> tuple[list[Path], list[str]]:
    """Compute every score that needs no final model, or those called `keys`; return the files and
    what could not be computed.

    `options` are `key=value` for the config section score.baselines. `out` is a directory, by
    default scores/ of the run, or the source itself. Files of scores under other than default
    options carry them in their names.

    Raises:
        InputError: as `score`; a key that was asked for by name and cannot be computed.
    """
    origin = open_recorded(Path(source), beton)
    known = ("tdds", "random", *BASELINES)
    if unknown := [key for key in keys if key not in known]:
        hint = ""
        if set(unknown) <= set(MODEL_SCORES):
            hint = " (they need the final model: `tdds score RUN --final-pass`)"
        elif unknown[0] == "ccs":
            hint = " (it is a way to choose: `tdds select --score ccs`)"
        raise InputError(
            f"score {unknown[0]!r} is not computed from recorded epochs{hint}; use one of"
            f" {', '.join(known)}"
        )
    settings = parse_baselines(
        origin.config.score.baselines if origin.config else Baselines(), options
    )
    read = {name for key in keys or known if key in BASELINES for name in BASELINES[key].options}
    for option in options:
        if (name := option.partition("=")[0].removeprefix("score.baselines.")) not in read:
            raise InputError(
                f"{option} does nothing for {', '.join(keys or known)}; leave it out, or add the"
                f" score that reads {name}"
            )
    folder = Path(out) if out is not None else origin.folder
    if folder.suffix == ".npz" or folder.is_file():
        raise InputError(f"--out={folder} must be a directory: one file per score goes there")
    _read_once(origin, keys or known, settings)
    paths: list[Path] = []
    skipped: list[str] = []
    with Progress("score", len(keys or known), "scores", visible=True) as bar:
        for key in keys or known:
            bar.note(key, now=True)
            try:
                paths += _score_one(origin, key, settings, folder)
            except InputError as error:
                if keys:
                    raise
                fitting = list[str]()
                if "is longer than" in str(error):
                    fitting = _fitting(settings, options, origin.recorded.num_epochs)
                way_out = f": `{command('score', source, '--all', *fitting)}`" if fitting else ""
                skipped.append(f"{key}: {error}{way_out}")
            bar.advance()
    for key in MODEL_SCORES if not keys else ():
        if not (folder / f"{key}.npz").is_file():
            skipped.append(
                f"{key}: needs the final model; `tdds score RUN --final-pass` computes it from a"
                " run's weights"
            )
    return paths, skipped


def _fitting(settings: Baselines, options: Sequence[str], num_epochs: int) -> list[str]:
    """Lower the options that are longer than what was recorded to what fits; return [] where none
    does."""
    lowered = {
        name: num_epochs
        for name in ("el2n_epochs", "num_epochs")
        if getattr(settings, name) > num_epochs
    }
    looked_at = lowered.get("num_epochs", settings.num_epochs) or num_epochs
    if looked_at < settings.uncertainty_window:
        lowered["uncertainty_window"] = max(2, looked_at // 2)
    kept = [
        option
        for option in options
        if option.partition("=")[0].removeprefix("score.baselines.") not in lowered
    ]
    return [*kept, *(f"{name}={value}" for name, value in lowered.items())] if looked_at > 1 else []


@dataclass(frozen=True)
class _Origin:
    """The recording that is scored, and the place where results go."""

    recorded: Recorded
    config: Config | None
    label_N: np.ndarray
    found: Fingerprint
    folder: Path
    settings: dict[str, Any]  # provenance for score files, and `quarantined`
    run: RunDir | None = None  # or where a trajectory of another training loop lies

    def validated(self, num_epochs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epochs with validation among the first so many, int64 [E], and their losses by
        class, float32 [E, C]."""
        if self.run is None or (classes := self.run.read_val_classes()) is None:
            raise InputError(
                "score cld needs the validation loss of each class (val_classes.npz beside the"
                " trajectory), which `tdds collect` records since it knows that score; collect"
                " again, or write that file (docs/own_loop.md)"
            )
        if (num_classes := classes.loss_EC.shape[1]) != self.found.num_classes:
            raise InputError(
                f"{self.run.val_classes_file} has {num_classes} classes, what was recorded"
                f" {self.found.num_classes}; give the validation of this training"
            )
        classes = classes.before(num_epochs)
        return classes.epoch_E, classes.loss_EC

    def windows(
        self, preset: str | None, T: int | None, K: int | None, beta: float | None
    ) -> tuple[list[Window], str]:
        """Return the windows to score and their preset, checked against what was recorded."""
        live, live_preset = self._scored_live()
        preset, num_epochs = preset or live_preset, self.recorded.num_epochs
        asked = {"T": T, "K": K, "beta": beta}
        given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        if live and T is None and K is None:
            windows = [replace(window, **given) for window in live]
        else:
            usual: dict[str, Any] = {"T": num_epochs, "K": 10, "beta": 0.9}
            for name in ("T", "K"):
                if len(values := {getattr(window, name) for window in live}) == 1:
                    usual[name] = values.pop()
            if live:
                usual["beta"] = self.config.score.beta if self.config else live[0].beta
            windows = [Window(**usual | given)]
        for window in windows:
            check_window(window, preset, num_epochs)
        return list(dict.fromkeys(windows)), preset

    def _scored_live(self) -> tuple[list[Window], str]:
        """Return windows and preset of the run's config, or of the scorer that another training
        loop had."""
        scored = None if isinstance(self.recorded, Dynamics) else self.recorded.scored
        is_partial = VISITED in getattr(self.recorded, "scalars", ())  # one window over all epochs
        if self.config is not None and not is_partial:
            return self.config.windows(), self.config.score.preset
        if scored is None:
            return [], "official"
        return [
            Window(window["T"], window["K"], window["beta"]) for window in scored["windows"]
        ], scored["preset"]

    def quarantine(self, score_N: np.ndarray) -> np.ndarray:
        """Return the scores, those of quarantined samples set to the lowest of the others."""
        return quarantine.set_lowest(score_N, quarantine.noted_in(self.settings))

    def save(
        self,
        folder_or_file: Path,
        key: str,
        score_N: np.ndarray,
        settings: dict[str, Any],
        extra: dict[str, np.ndarray] | None = None,
    ) -> Path:
        path = folder_or_file if folder_or_file.suffix == ".npz" else folder_or_file / f"{key}.npz"
        if path.exists():
            try:
                is_imported = load_scores(path).settings.get("source") == "imported"
            except InputError:
                is_imported = False
            if is_imported:
                raise InputError(
                    f"{path} holds imported scores; import them under another --key, or move that"
                    " file away"
                )
        settings = settings | {"source": "recorded"} | self.settings
        put_scores(path, Scores(key, score_N, self.label_N, self.found, settings, extra or {}))
        return path


def open_recorded(source: Path, beton: Path | None) -> _Origin:
    """Open what was recorded, of any kind that `score` takes; raise InputError as it does."""
    if source.suffix == ".parquet" and not source.is_dir():
        table = TrajectoryTable(source)
        label_N, found = _labels(table.labels(), table.num_classes, beton)
        found = replace(found, classes_sha256=found.classes_sha256 or table.classes_sha256)
        noted = {"epochs": table.num_epochs} | quarantine.noted(table.quarantined)
        beside = RunDir(source.parent)
        return _Origin(table, None, label_N, found, source.parent, noted | table.settings, beside)
    if not source.is_dir():
        raise InputError(
            f"{source} is not a directory; give a run directory, a trajectory, or a folder of"
            " *_Output.npy, or a trajectory as FILE.parquet"
        )
    if is_dynamics(source):
        dynamics = Dynamics(source)
        label_N, found = _labels(dynamics.labels(), dynamics.num_classes, beton)
        return _Origin(Dynamics(source, label_N), None, label_N, found, source, {})
    run = RunDir(source)
    is_run = run.config_file.is_file()
    trajectory = Trajectory(run.trajectory if is_run else source)
    if is_run and (epochs := (run.read_result() or {}).get("epochs", 0)) > trajectory.num_epochs:
        raise InputError(
            f"{trajectory.directory} holds {trajectory.num_epochs} of the {epochs} epochs of this"
            " run, which gave it up (score.trajectory=false); its live scores are whole, others"
            " need another collection"
        )
    config = parse_config(run.read_config(), str(run.config_file)) if is_run else None
    label_N, found = _labels(trajectory.labels(), trajectory.num_classes, beton, config)
    settings: dict[str, Any] = {"epochs": trajectory.num_epochs} | quarantine.noted(
        trajectory.quarantined
    )
    if config is None:
        beside = RunDir(Path(os.path.abspath(source)).parent)
        return _Origin(trajectory, None, label_N, found, source, settings, beside)
    settings |= {"seed": config.run.seed, "world_size": run.read_env().get("world_size")}
    with suppress(InputError):  # a trajectory does not know the names of the classes
        known = any_scores(run.path).fingerprint.classes_sha256
        found = replace(found, classes_sha256=found.classes_sha256 or known)
    return _Origin(trajectory, config, label_N, found, run.scores, settings, run)


def _read_once(origin: _Origin, keys: Sequence[str], options: Baselines) -> None:
    """Make the scalars of several scores in one pass over a dynamics folder, whose epochs are
    large; else do nothing."""
    if isinstance(origin.recorded, Dynamics) and (origin.label_N != UNKNOWN_LABEL).all():
        scalars = [
            (
                BASELINES[key].scalar(options)
                if key in BASELINES
                else delta_scalar("kl", "official")[0]
            )
            for key in keys
            if key != "random"
        ]
        if len(set(scalars)) > 1:
            origin.recorded.prepare(tuple(dict.fromkeys(scalars)), origin.recorded.num_epochs)


def _score_windows(
    origin: _Origin, windows: list[Window], preset: str, delta: str, out: Path | None
) -> list[Path]:
    scalar, absolute = delta_scalar(delta, preset)
    delta_TN = origin.recorded.read(scalar, max(window.T for window in windows))
    delta_TN = np.abs(delta_TN) if absolute else delta_TN
    visited_TN = _visited(origin.recorded, len(delta_TN))
    paths = []
    for window in windows:
        key = window.key(preset, delta)
        score_N = origin.quarantine(score_trajectory(delta_TN, window, preset, visited_TN))
        if score_N.min() == score_N.max():
            log.warning(f"all scores of {key} are {score_N[0]:g}; they say nothing, raise K")
        settings = window_settings(window, preset, delta)
        if visited_TN is not None:
            settings["visits"] = "partial"
        paths.append(origin.save(out or origin.folder, key, score_N, settings))
    return paths


def _visited(recorded: Recorded, num_epochs: int) -> np.ndarray | None:
    """Return where samples were visited, float32 [T, N]; None where all were in all epochs."""
    if VISITED not in getattr(recorded, "scalars", ()):
        return None
    visited_TN = recorded.read(VISITED, num_epochs)
    return None if visited_TN.all() else visited_TN


def _score_one(origin: _Origin, key: str, options: Baselines, folder: Path) -> list[Path]:
    if key == "tdds":
        windows, preset = origin.windows(None, None, None, None)
        return _score_windows(origin, windows, preset, "kl", folder)
    if key == "random":
        seed = origin.settings.get("seed", 0)
        score_N = baselines.random(origin.recorded.num_samples, seed)
        return [origin.save(folder, key, score_N, {"score": key, "draw_seed": seed})]
    baseline = BASELINES[key]
    num_epochs = check_options(key, options, (), origin.recorded.num_epochs)
    if (visited_TN := _visited(origin.recorded, num_epochs)) is not None:
        whole = int(visited_TN.all(axis=1).argmin())
        way_out = (
            f"lower it to {whole} by num_epochs or el2n_epochs" if whole > 1 else "collect instead"
        )
        raise InputError(
            f"score {key} looks at {num_epochs} epochs, and from epoch {whole + 1} on samples were"
            f" skipped; {way_out}"
        )
    values_TN = origin.recorded.read(baseline.scalar(options), num_epochs)
    classes: tuple[np.ndarray, ...] = ()
    if baseline.of_classes:
        epoch_E, val_loss_EC = origin.validated(num_epochs)
        values_TN, classes = values_TN[epoch_E], (origin.label_N, val_loss_EC)
    quarantined = quarantine.noted_in(origin.settings)
    if key == "s2l" and quarantined:  # clusters are of what was recorded
        rest_n = quarantine.not_quarantined(len(origin.label_N), quarantined)
        score_n, extra_n = baseline.compute(values_TN[:, rest_n], options)
        score_N, cluster_N = np.zeros((2, len(origin.label_N)), dtype=np.float32)
        score_N[rest_n], cluster_N[rest_n] = score_n, extra_n["cluster"]
        extra = {"cluster": cluster_N}
    else:
        score_N, extra = baseline.compute(values_TN, options, *classes)
    setting = {"score": key, "T": num_epochs} | baseline.settings(options)
    if baseline.of_classes:
        setting["validations"] = len(values_TN)
    return [origin.save(folder, file_key(key, options), origin.quarantine(score_N), setting, extra)]


def _labels(
    label_N: np.ndarray, num_classes: int, beton: Path | None, config: Config | None = None
) -> tuple[np.ndarray, Fingerprint]:
    if beton is None:
        return label_N, fingerprint(label_N, num_classes)
    fields = ("", "") if config is None else (config.data.image_field, config.data.label_field)
    info = inspect_beton(Path(beton), *fields)
    if info.num_samples != len(label_N):
        raise InputError(
            f"--beton={beton} holds {info.num_samples} samples, the recorded outputs"
            f" {len(label_N)}; give the file that was trained on"
        )
    manifest = read_manifest(Path(beton))
    check_labels(info, num_classes, manifest, complete=False)
    if ((label_N != UNKNOWN_LABEL) & (label_N != info.label_N)).any():
        raise InputError(
            f"--beton={beton} has other labels than those recorded; give the file that was"
            " trained on"
        )
    names = () if manifest is None else manifest.class_names
    return info.label_N, dataset_fingerprint(info, num_classes, names)
