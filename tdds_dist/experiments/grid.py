"""The grid of an experiment or a pipeline: which runs there are, what decides their results, and
which of them are done.

Reads configs and what finished runs say of themselves; runs nothing (`execute` and `launch` do).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from tdds_dist.config.experiment import Experiment, Variant
from tdds_dist.config.grid import BUILT_IN_METHODS, Method
from tdds_dist.config.run import Config, load_config, parse_baselines
from tdds_dist.config.scores import Window, check_window
from tdds_dist.data.beton import content_here
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import load_coreset
from tdds_dist.runs.directory import RunDir, coreset_name, retrain_name
from tdds_dist.runs.entry import why_not
from tdds_dist.runs.identity import differences
from tdds_dist.scoring.offline import BASELINES, MODEL_SCORES, check_options, file_key


@dataclass(frozen=True)
class Cell:
    """One retraining of the grid."""

    method: Method
    pruning_rate: float
    strategy: str
    variant: Variant | None
    seed: int
    collection: RunDir
    importance: str

    @property
    def coreset_file(self) -> Path:
        """Return the path of its coreset, shared by strategies, variants and seeds of one
        collection."""
        return self.collection.coresets / coreset_name(self.method.name, self.pruning_rate)

    @property
    def name(self) -> str:
        """Return its folder under retrain/ of the collection."""
        return retrain_name(
            self.coreset_file, self.strategy, self.importance, self.seed, self.variant_name
        )

    @property
    def run(self) -> RunDir:
        """Return the retraining's run directory."""
        return RunDir(self.collection.retrain / self.name)

    @property
    def variant_name(self) -> str:
        """Return the name of the variant, empty for the config's way to retrain."""
        return self.variant.name if self.variant else ""


@dataclass(frozen=True)
class Task:
    """One run for a worker: a collection, or a retraining on a coreset. Can be pickled."""

    title: str
    directory: Path
    config: Config
    coreset_file: Path | None = None  # None: a run of its own, of this stage
    strategy: str = "E"
    importance: str = "none"
    pruning_rate: float = 0.0
    method: Method | None = None  # that chose the coreset, where it is known
    settings: dict[str, Any] | None = None
    stage: str = "collect"

    @property
    def cost(self) -> float:
        """Return the share of images that a retraining trains on, for the order and the time
        left."""
        if self.coreset_file is None:
            return 0.0
        return 1.0 if self.strategy == "P" else 1.0 - self.pruning_rate

    @property
    def is_done(self) -> bool:
        """Say whether it has a result, whatever it was asked for then (`in_the_way`,
        `check_what_is_done`)."""
        try:
            json.loads(RunDir(self.directory).result_file.read_text())
        except (OSError, ValueError):
            return False
        return True


def list_cells(
    config: Config,
    run: RunDir,
    methods: Sequence[Method],
    rates: Sequence[float],
    strategies: Sequence[str],
    seeds: Sequence[int],
    variants: Sequence[Variant | None] = (None,),
) -> list[Cell]:
    """List every retraining of a collection, by seed, variant, strategy, rate, method; a method
    with rates of its own is in the grid at those."""
    usual = {"tdds": config.retrain.importance}
    weights = {
        method: method.importance or usual.get(method.score_key, "none") for method in methods
    }
    return [
        Cell(method, rate, strategy, variant, seed, run, weights[method])
        for seed, variant, strategy, rate, method in product(
            seeds, variants, strategies, rates, methods
        )
        if method.is_at(rate)
    ]


def pipeline_cells(config: Config, strategies: Sequence[str] | None = None) -> list[Cell]:
    """List every retraining that `config.pipeline` asks for; of other strategies where they are
    given."""
    wanted = config.pipeline
    return list_cells(
        config,
        RunDir(config.run.directory),
        [BUILT_IN_METHODS[name] for name in wanted.scores],
        wanted.pruning_rates or [rate for rate in config.served_rates if rate],
        wanted.strategies if strategies is None else strategies,
        wanted.seeds or (config.run.seed,),
    )


def retrain_task(cell: Cell, config: Config) -> Task:
    """Return the run of a cell, `config` having its seed and variant."""
    what = (
        f"{cell.method.name} p={cell.pruning_rate:g}"
        f" {cell.strategy}{' ' + cell.variant_name if cell.variant else ''}, seed {cell.seed}"
    )
    settings = {"row": cell.method.name} | ({"variant": cell.variant_name} if cell.variant else {})
    return Task(
        what,
        cell.run.path,
        config,
        cell.coreset_file,
        cell.strategy,
        cell.importance,
        cell.pruning_rate,
        cell.method,
        settings,
    )


# ---- experiments


def check_experiment(experiment: Experiment) -> tuple[dict[int, Task], list[Cell]]:
    """Return the collections by seed, and every retraining. Reads configs, but neither images nor
    results.

    Raises:
        InputError: what can be known to fail in any of them.
    """
    collections = {seed: _collection_task(experiment, seed) for seed in experiment.seeds}
    cells = []
    for seed, task in collections.items():
        for rate, method in product(experiment.pruning_rates, experiment.methods):
            if method.is_at(rate):
                check_method(task.config, method, rate)
        for variant in experiment.variants:
            config_of(experiment, seed, variant)  # says so when its overrides do not fit
        cells += list_cells(
            task.config,
            RunDir(task.directory),
            experiment.methods,
            experiment.pruning_rates,
            experiment.strategies,
            (seed,),
            experiment.variants or (None,),
        )
    return collections, cells


def check_method(config: Config, method: Method, rate: float) -> None:
    """Raise InputError for a score that the collection will not give."""
    key = method.score_key
    stops = config.collect.stop_after == "last_window"
    num_epochs = max(window.T for window in config.windows()) if stops else config.train.epochs
    try:
        if key == "tdds":
            check_window(
                window_of(config, method, rate), method.preset or config.score.preset, num_epochs
            )
        elif key in BASELINES:
            options = parse_baselines(config.score.baselines, method.options)
            looked_at = check_options(key, options, method.options, num_epochs)
            every = config.train.eval_every
            num_val = looked_at // every + (looked_at == num_epochs and looked_at % every > 0)
            if key == "cld" and num_val < 3:
                raise InputError(
                    f"cld correlates changes between validations, and {num_val} in"
                    f" {looked_at} epochs are too few; lower train.eval_every={every}"
                )
            if method.sampler == "ccs" and key == "aum" and options.aum_keep == "easiest":
                raise InputError(
                    "sampler ccs cuts off what ranks first as too hard; leave aum_keep=easiest out"
                )
        elif key not in ("random", *MODEL_SCORES):
            known = ("tdds", "random", *MODEL_SCORES, *BASELINES)
            hint = "; ccs means score: aum, sampler: ccs" if key == "ccs" else ""
            raise InputError(f"score {key!r} is unknown; use one of {', '.join(known)}{hint}")
        elif method.options:
            raise InputError(
                f"options={list(method.options)} do nothing for score {key}; leave them out"
            )
        if method.sampler == "beta" and key != "dual":
            raise InputError(
                f"sampler beta needs the mean probability, which score {key} comes without; use"
                " score: dual"
            )
        if method.sampler == "s2l" and key != "s2l":
            raise InputError(
                f"sampler s2l draws from clusters, which score {key} comes without; use score: s2l"
            )
        if method.sampler == "drop" and method.class_balanced:
            raise InputError(
                "sampler drop has quotas of its own for the classes; leave class_balanced out"
            )
        if (method.hard_cutoff_rate or 0.0) > rate:
            raise InputError(
                f"hard_cutoff_rate={method.hard_cutoff_rate} removes more than pruning_rate={rate}"
                " does; lower it"
            )
    except InputError as error:
        raise InputError(f"methods: {method.name}: {error}") from error


def config_of(experiment: Experiment, seed: int, variant: Variant | None = None) -> Config:
    """Return the config of a run of the experiment."""
    directory = json.dumps(str(experiment.directory / f"seed{seed}"))
    overrides = [*experiment.overrides, *(variant.overrides if variant else ()), f"run.seed={seed}"]
    overrides += [f"run.name={experiment.name}_seed{seed}", f"run.dir={directory}"]
    return load_config(experiment.config, overrides)


def _collection_task(experiment: Experiment, seed: int) -> Task:
    config = config_of(experiment, seed)
    config.check_collect()
    needed = {method.score_key for method in experiment.methods}
    if needed & set(MODEL_SCORES) and not config.score.final_pass:
        raise InputError(
            f"methods {sorted(needed & set(MODEL_SCORES))} need score.final_pass=true; switch it on"
        )
    if not config.score.trajectory:
        raise InputError("an experiment scores from the trajectory; set score.trajectory=true")
    return Task(f"collect, seed {seed}", config.run.directory, config)


def _resolved(task: Task) -> tuple[RunDir, Config, dict[str, Any]]:
    """Return where a task runs, its config in full, and what else decides its result but for the
    images."""
    if task.coreset_file is None:
        return RunDir(task.directory), task.config, {"stage": task.stage}
    from tdds_dist.training.retrain import resolve

    return resolve(
        task.config,
        load_coreset(task.coreset_file),
        task.coreset_file,
        task.strategy,
        task.importance,
        task.directory.name,
    )


def in_the_way(task: Task, images: dict[Any, Any]) -> tuple[str, str] | None:
    """Say why what is in the task's directory neither is, nor can become, its result, and a way
    out; None if it can.

    `images` remembers the content of files from call to call.
    """
    if not task.directory.exists():
        return None
    run, config, setting = _resolved(task)
    files = config.data.train, config.data.val
    if files not in images:
        images[files] = content_here(config)
    return why_not(run, config, setting | images[files], "name or dir")


def window_of(config: Config, method: Method, rate: float) -> Window:
    """Return the TDDS setting of a method at a pruning rate."""
    window = (
        Window(method.T, method.K, config.score.beta)
        if method.T and method.K
        else config.window_for(rate)
    )
    return window if method.beta is None else replace(window, beta=method.beta)


# ---- pipelines, as stages of jobs


@dataclass(frozen=True)
class PlannedJob:
    """A job to be submitted."""

    title: str
    commands: tuple[tuple[str, ...], ...]
    directory: str  # the run directory that it works in
    is_done: bool = False
    task: Task | None = None  # of a collection or retraining


@dataclass(frozen=True)
class PlannedStage:
    """The jobs of one stage; they may run at the same time."""

    name: str  # collect, select, retrain, report, train or doctor
    jobs: tuple[PlannedJob, ...]

    @property
    def waiting(self) -> tuple[PlannedJob, ...]:
        """List the jobs that are not done."""
        return tuple(job for job in self.jobs if not job.is_done)

    @property
    def num_done(self) -> int:
        """Return the number of jobs that are done."""
        return len(self.jobs) - len(self.waiting)


def one_run(stage: str, config: Config, frozen: Path) -> PlannedStage:
    """Return the stage `collect` or `train` of a config; `frozen` is the file that the jobs read it
    from."""
    if stage == "collect":
        config.check_collect()
    else:
        config.check_train()
    task = Task(stage, config.run.directory, config, stage=stage)
    command = (stage, str(frozen))
    return PlannedStage(
        stage, (PlannedJob(stage, (command,), str(task.directory), task.is_done, task),)
    )


def retrain_job(task: Task, frozen: Path, *overrides: str) -> PlannedJob:
    """Return the job of a retraining."""
    name = task.directory.name
    words = ["retrain", str(frozen), "--coreset", str(task.coreset_file)]
    words += ["--strategy", task.strategy, "--importance", task.importance, "--name", name]
    return PlannedJob(name, ((*words, *overrides),), str(task.directory), task.is_done, task)


def pipeline_stages(config: Config, frozen: Path) -> list[PlannedStage]:
    """List the stages: collection, selection, an array of retrainings, report; `config.pipeline`
    says of what."""
    collect, cells = one_run("collect", config, frozen), pipeline_cells(config)
    if not cells:
        raise InputError(
            "no window of score.windows serves a pruning rate; set pipeline.pruning_rates, e.g."
            " [0.5]"
        )
    coresets = list({cell.coreset_file: cell for cell in cells}.values())
    for cell in coresets:
        _check_coreset(config, cell.method, cell.pruning_rate)
    retrain = PlannedStage(
        "retrain",
        tuple(
            retrain_job(
                retrain_task(cell, config.changed("run", seed=cell.seed)),
                frozen,
                f"run.seed={cell.seed}",
            )
            for cell in cells
        ),
    )
    has_coresets = not retrain.waiting or all(_has_coreset(config, cell) for cell in coresets)
    stages = [collect, _select_stage(config, coresets, not collect.waiting, has_coresets), retrain]
    run = config.run.directory
    is_done = (
        not any(stage.waiting for stage in stages)
        and (run / "report.html").is_file()
        and not any(
            _is_older(run / "report.html", Path(job.directory) / "result.json")
            for job in (*collect.jobs, *retrain.jobs)
        )
    )
    return [
        *stages,
        PlannedStage("report", (PlannedJob("report", (("report", str(run)),), str(run), is_done),)),
    ]


def _check_coreset(config: Config, method: Method, rate: float) -> None:
    """Raise InputError for a coreset that could not be made after the collection."""
    if method.score_key in MODEL_SCORES and not config.score.final_pass:
        raise InputError(
            f"pipeline.scores: {method.name} needs score.final_pass=true; switch it on"
        )
    if method.score_key in BASELINES and not config.score.trajectory:
        raise InputError(
            f"pipeline.scores: {method.name} is scored from the trajectory; set"
            " score.trajectory=true"
        )
    needs_classes = method.score_key == "cld" or method.sampler == "drop"
    run = RunDir(config.run.directory)
    if needs_classes and run.result_file.is_file() and not run.val_classes_file.is_file():
        raise InputError(
            f"pipeline.scores: {method.name} looks at validation by class, which the collection in"
            f" {run.path} has not recorded; leave it out, or collect anew in another run.dir"
        )
    if method.score_key == "tdds" and f"{rate:g}" not in {
        f"{served:g}" for served in config.served_rates
    }:
        raise InputError(
            f"pipeline.pruning_rates has {rate:g}, which no window of score.windows serves; add it"
            " to the pruning_rates of one (that may change after the collection)"
        )
    try:
        check_method(config, method, rate)
    except InputError as error:
        raise InputError(
            f"pipeline.scores: {str(error).removeprefix('methods: ')} (its options are "
            "score.baselines.*)"
        ) from error


def _options(config: Config, method: Method) -> dict[str, Any]:
    """Return the options that a score of the trajectory is computed with."""
    names = BASELINES[method.score_key].options if method.score_key in BASELINES else ()
    return {name: getattr(config.score.baselines, name) for name in names}


def _has_coreset(config: Config, cell: Cell) -> bool:
    """Say whether its coreset is there, of this collection and with these options."""
    return (
        cell.coreset_file.is_file()
        and not _is_older(cell.coreset_file, cell.collection.result_file)
        and not _other_options(config, cell.method, cell.coreset_file)
    )


def _other_options(config: Config, method: Method, coreset: Path) -> list[str]:
    wanted = _options(config, method)
    try:
        found = load_coreset(coreset).settings if wanted else {}
    except InputError:  # damaged: made again
        return ["damaged"]
    return [
        f"score.baselines.{name} was {found[name]!r}, now {value!r}"
        for name, value in wanted.items()
        if name in found and found[name] != value
    ]


def _select_stage(
    config: Config, coresets: Sequence[Cell], is_collected: bool, has_coresets: bool
) -> PlannedStage:
    """Make one job for all coresets: each takes a second, and every score is computed once.

    A coreset that is there and of another collection or other options is moved aside (`--force`).
    """
    run = str(config.run.directory)
    commands: dict[tuple[str, ...], None] = {}  # a score is computed once
    for cell in coresets:
        method = cell.method
        if method.score_key in BASELINES:
            # Options by name: the run's own config is that of the collection, and may have others.
            options = [f"{name}={value}" for name, value in _options(config, method).items()]
            commands["score", run, "--score", method.score_key, *options] = None
    for cell in coresets:
        method, rate, file = cell.method, cell.pruning_rate, cell.coreset_file
        # TDDS by the name of its file: the run's own config may be from before this rate was asked
        # for.
        score = method.score_key
        if score == "tdds":
            score = config.window_for(rate).key(config.score.preset)
        elif score in BASELINES:
            score = file_key(score, config.score.baselines)
        words = ["select", run, "--pruning-rate", f"{rate:g}", "--score", score]
        words += ["--sampler", method.sampler] if method.sampler else []
        words += ["--seed", str(config.run.seed)]
        if file.is_file() and not (is_collected and _has_coreset(config, cell)):
            words.append("--force")
        commands[*words, "--out", str(file)] = None
    title = f"{len(coresets)} coreset{'s' if len(coresets) > 1 else ''}"
    return PlannedStage(
        "select", (PlannedJob(title, tuple(commands), run, is_collected and has_coresets),)
    )


def check_what_is_done(config: Config, stages: Iterable[PlannedStage]) -> None:
    """Raise InputError when a finished run was asked for something else than now, so that it cannot
    be skipped."""
    done = [
        job.task for stage in stages for job in stage.jobs if job.task is not None and job.is_done
    ]
    data = content_here(config) if done else {}
    for task in done:
        how = "collected" if task.stage == "collect" else "trained"
        way_out, changed = "keep those", list[str]()
        if (coreset := task.coreset_file) is not None:
            if not coreset.is_file():
                continue
            if _is_older(task.directory / "result.json", config.run.directory / "result.json"):
                raise InputError(
                    f"{task.directory} was trained before the collection that is there now had"
                    " finished; remove it to train it again, or touch its result.json if it"
                    " belongs to it"
                )
            how, way_out = "trained", "keep those, remove that folder to train it again"
            changed = (
                _other_options(config, task.method, coreset) if task.method is not None else []
            )
        run, resolved, setting = _resolved(task)
        if changed := differences(run, resolved, setting | data) + changed:
            raise InputError(
                f"{task.directory} was {how} with other settings ({'; '.join(changed)}); {way_out},"
                " or choose another run.name"
            )


def _is_older(file: Path, other: Path) -> bool:
    """Say whether both are there and the first was written before the second."""
    try:
        return file.stat().st_mtime < other.stat().st_mtime
    except OSError:
        return False
