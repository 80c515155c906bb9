"""The plan of an experiment: which runs there are, what decides their results, and which of them are done.

Reads configs and what finished runs say of themselves; runs nothing (`execute` does).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdds_dist.config.experiment import Architecture, Experiment
from tdds_dist.config.grid import BUILT_IN_METHODS, Method
from tdds_dist.config.run import Config, load_config, parse_baselines, parse_config, to_dict
from tdds_dist.config.scores import Window, check_window
from tdds_dist.data.beton import content_here
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import load_coreset
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.entry import why_not
from tdds_dist.scoring.offline import BASELINES, MODEL_SCORES, check_options


@dataclass(frozen=True)
class Cell:
    """One retraining of the table."""

    method: Method
    pruning_rate: float
    strategy: str
    architecture: Architecture | None
    seed: int
    collection: RunDir
    importance: str

    @property
    def coreset_file(self) -> Path:
        """Return the path of its coreset, which strategies and architectures share."""
        return self.collection.coresets / f"{self.method.name}_p{self.pruning_rate:g}.npz"

    @property
    def name(self) -> str:
        """Return its folder under retrain/ of the collection."""
        network = f"_{self.architecture.name}" if self.architecture else ""
        return f"{self.method.name}_p{self.pruning_rate:g}_{self.strategy}_{self.importance}{network}_seed{self.seed}"

    @property
    def run(self) -> RunDir:
        """Return the retraining's run directory."""
        return RunDir(self.collection.retrain / self.name)

    @property
    def network(self) -> str:
        """Return the name of the network, empty for that of the collection."""
        return self.architecture.name if self.architecture else ""


@dataclass(frozen=True)
class Task:
    """One run for a worker; plain data, so that it can travel to another process."""

    title: str
    directory: Path
    config: dict[str, Any]
    coreset_file: Path | None = None  # None: a collection
    strategy: str = "E"
    importance: str = "none"
    name: str = ""
    settings: dict[str, Any] | None = None
    cost: float = 0.0  # images to train on, for the order and the time left


def check_plan(plan: Experiment) -> tuple[dict[int, Task], list[Cell]]:
    """Return the collections by seed, and every retraining. Reads configs, but neither images nor results.

    Raises:
        InputError: what can be known to fail in any of them.
    """
    collections = {seed: _collection_task(plan, seed) for seed in plan.seeds}
    return collections, _cells(plan, collections)


def _cells(plan: Experiment, collections: dict[int, Task]) -> list[Cell]:
    """List every retraining, by seed, network, strategy, rate, method."""
    found = []
    for seed in plan.seeds:
        config, run = parse_config(collections[seed].config), RunDir(collections[seed].directory)
        for rate in plan.pruning_rates:
            for method in plan.methods:
                check_method(config, method, rate)
        for architecture in plan.architectures or (None,):
            _config(plan, seed, architecture)  # says so when its overrides do not fit
            for strategy in plan.strategies:
                for rate in plan.pruning_rates:
                    for method in plan.methods:
                        importance = method.importance or (
                            config.retrain.importance if method.score_key == "tdds" else "none")
                        found.append(Cell(method, rate, strategy, architecture, seed, run, importance))
    return found


def check_method(config: Config, method: Method, rate: float) -> None:
    """Raise InputError for a score that the collection will not give."""
    key = method.score_key
    stops = config.collect.stop_after == "last_window"
    num_epochs = max(window.T for window in config.windows()) if stops else config.train.epochs
    try:
        if key == "tdds":
            check_window(window_of(config, method, rate), method.preset or config.score.preset, num_epochs)
        elif key in BASELINES:
            options = parse_baselines(config.score.baselines, method.options)
            check_options(key, options, method.options, num_epochs)
            if method.sampler == "ccs" and key == "aum" and options.aum_keep == "easiest":
                raise InputError("sampler ccs cuts off what ranks first as too hard; leave aum_keep=easiest out")
        elif key not in ("random", *MODEL_SCORES):
            known = ("tdds", "random", *MODEL_SCORES, *BASELINES)
            hint = "; ccs means score: aum, sampler: ccs" if key == "ccs" else ""
            raise InputError(f"score {key!r} is unknown; use one of {', '.join(known)}{hint}")
        elif method.options:
            raise InputError(f"options={list(method.options)} do nothing for score {key}; leave them out")
        if method.sampler == "beta" and key != "dual":
            raise InputError(f"sampler beta needs the mean probability, which score {key} comes without; use score: dual")
        if (method.hard_cutoff_rate or 0.0) > rate:
            raise InputError(f"hard_cutoff_rate={method.hard_cutoff_rate} removes more than pruning_rate={rate} does; lower it")
    except InputError as error:
        raise InputError(f"methods: {method.name}: {error}") from error


def _config(plan: Experiment, seed: int, architecture: Architecture | None = None) -> Config:
    overrides = [*plan.overrides, *(architecture.overrides if architecture else ())]
    directory = plan.directory / f"seed{seed}"
    return load_config(plan.config, [*overrides, f"run.seed={seed}", f"run.name={plan.name}_seed{seed}",
                                     f"run.dir={json.dumps(str(directory))}"])


def _collection_task(plan: Experiment, seed: int) -> Task:
    config = _config(plan, seed)
    config.check_collect()
    needed = {method.score_key for method in plan.methods}
    if needed & set(MODEL_SCORES) and not config.score.final_pass:
        raise InputError(f"methods {sorted(needed & set(MODEL_SCORES))} need score.final_pass=true; switch it on")
    if not config.score.trajectory:
        raise InputError("an experiment scores from the trajectory; set score.trajectory=true")
    return Task(f"collect, seed {seed}", config.run.directory, to_dict(config))


def retrain_task(plan: Experiment, cell: Cell) -> Task:
    """Return the run of a cell whose coreset is made."""
    what = (f"{cell.method.name} p={cell.pruning_rate:g} {cell.strategy}{' ' + cell.network if cell.network else ''}, "
            f"seed {cell.seed}")
    cost = 1.0 if cell.strategy == "P" else 1.0 - cell.pruning_rate
    settings = {"row": cell.method.name} | ({"network": cell.network} if cell.network else {})
    return Task(what, cell.run.path, to_dict(_config(plan, cell.seed, cell.architecture)), cell.coreset_file, cell.strategy,
                cell.importance, cell.name, settings, cost)


def is_done(task: Task) -> bool:
    """Say whether it has a result, whatever it was asked for then (`in_the_way`)."""
    return RunDir(task.directory).result_file.is_file()


def in_the_way(task: Task, images: dict[Any, Any]) -> tuple[str, str] | None:
    """Say why what is in the task's directory neither is, nor can become, its result, and a way out; None if it can.

    `images` remembers the content of files from call to call.
    """
    run, config = RunDir(task.directory), parse_config(task.config, task.title)
    setting: dict[str, Any] = {"stage": "collect"}
    if not run.path.exists():
        return None
    if task.coreset_file is not None:
        from tdds_dist.training.retrain import resolve

        _, config, setting = resolve(config, load_coreset(task.coreset_file), task.coreset_file, task.strategy, task.importance,
                                     task.name)
    files = config.data.train, config.data.val
    if files not in images:
        images[files] = content_here(config)
    return why_not(run, config, setting | images[files], "name or dir")


def window_of(config: Config, method: Method, rate: float) -> Window:
    """Return the TDDS setting of a method at a pruning rate."""
    window = Window(method.T, method.K, config.score.beta) if method.T and method.K else config.window_for(rate)
    return window if method.beta is None else replace(window, beta=method.beta)

FROM_THE_FINAL_MODEL = ("entropy", "moderate")


@dataclass(frozen=True)
class Step:
    """One job."""

    title: str
    commands: tuple[tuple[str, ...], ...]
    directory: str  # the run directory that it works in
    is_done: bool = False
    pruning_rate: float | None = None  # this and what follows: of a retraining
    coreset: Path | None = None
    strategy: str = ""
    importance: str = ""
    seed: int = 0
    method: Method | None = None


@dataclass(frozen=True)
class Stage:
    """Jobs that may run at the same time."""

    name: str  # collect, select, retrain or report
    steps: tuple[Step, ...]

    @property
    def waiting(self) -> tuple[Step, ...]:
        """List the steps that are not done."""
        return tuple(step for step in self.steps if not step.is_done)


def collect_stage(config: Config, frozen: Path) -> Stage:
    """Return the collection of a config; `frozen` is the file that the jobs read it from."""
    config.check_collect()
    run = config.run.directory
    return Stage("collect", (Step("collect", (("collect", str(frozen)),), str(run), _has_result(run)),))


def pipeline_stages(config: Config, frozen: Path) -> list[Stage]:
    """List the stages: collection, selection, an array of retrainings, report; `config.pipeline` says of what."""
    collect = collect_stage(config, frozen)
    methods = _methods(config)
    rates = config.pipeline.pruning_rates or tuple(sorted(
        {rate for window in config.score.windows for rate in window.pruning_rates if rate > 0}))
    if not rates:
        raise InputError("no window of score.windows serves a pruning rate; set pipeline.pruning_rates, e.g. [0.5]")
    _check_methods(config, methods, rates)
    retrain = _retrain_stage(config, frozen, methods, rates)
    has_coresets = not retrain.waiting or all(_has_coreset(config, method, rate) for method in methods for rate in rates)
    select = _select_stage(config, methods, rates, not collect.waiting, has_coresets)
    stages = [collect, select, retrain]
    run = config.run.directory
    is_done = not any(stage.waiting for stage in stages) and (run / "report.html").is_file() and not any(
        _is_older(run / "report.html", Path(step.directory) / "result.json") for step in (*collect.steps, *retrain.steps))
    return [*stages, Stage("report", (Step("report", (("report", str(run)),), str(run), is_done),))]


def _methods(config: Config) -> list[Method]:
    methods = [BUILT_IN_METHODS[name] for name in config.pipeline.scores]
    for method in methods:
        if method.score_key in FROM_THE_FINAL_MODEL and not config.score.final_pass:
            raise InputError(f"pipeline.scores: {method.name} needs score.final_pass=true; switch it on")
        if method.score_key not in ("tdds", "random", *FROM_THE_FINAL_MODEL) and not config.score.trajectory:
            raise InputError(f"pipeline.scores: {method.name} is scored from the trajectory; set score.trajectory=true")
    return methods


def _check_methods(config: Config, methods: Sequence[Method], rates: Sequence[float]) -> None:
    """Raise InputError for a coreset that could not be made after the collection."""

    served = {f"{rate:g}" for window in config.score.windows for rate in window.pruning_rates}
    for method in methods:
        for rate in rates:
            if method.score_key == "tdds" and f"{rate:g}" not in served:
                raise InputError(f"pipeline.pruning_rates has {rate:g}, which no window of score.windows serves; add it to the "
                                 "pruning_rates of one (that may change after the collection)")
            try:
                check_method(config, method, rate)
            except InputError as error:
                raise InputError(f"pipeline.scores: {str(error).removeprefix('methods: ')} (its options are "
                                 "score.baselines.*)") from error


def _options(config: Config, method: Method) -> dict[str, Any]:
    """Return the options that a score of the trajectory is computed with."""
    from tdds_dist.scoring.offline import BASELINES

    names = BASELINES[method.score_key].options if method.score_key in BASELINES else ()
    return {name: getattr(config.score.baselines, name) for name in names}


def _has_coreset(config: Config, method: Method, rate: float) -> bool:
    """Say whether its coreset is there, of this collection and with these options."""
    file = _coreset(config, method, rate)
    if not file.is_file() or _is_older(file, config.run.directory / "result.json"):
        return False
    return not _other_options(config, method, file)


def _other_options(config: Config, method: Method, coreset: Path) -> list[str]:
    from tdds_dist.runs.artifacts import load_coreset

    wanted = _options(config, method)
    try:
        found = load_coreset(coreset).settings if wanted else {}
    except InputError:  # damaged: made again
        return ["damaged"]
    return [f"score.baselines.{name} was {found[name]!r}, now {value!r}" for name, value in wanted.items()
            if name in found and found[name] != value]


def _coreset(config: Config, method: Method, rate: float) -> Path:
    return config.run.directory / "coresets" / f"{method.name}_p{rate:g}.npz"


def _select_stage(config: Config, methods: Sequence[Method], rates: Sequence[float], is_collected: bool,
                  has_coresets: bool) -> Stage:
    """Make one job for all coresets: each takes a second, and every score is computed once.

    A coreset that is there and of another collection or other options is moved aside (`--force`).
    """
    run = config.run.directory
    commands: list[tuple[str, ...]] = []
    files = {"random": "random", **{key: key for key in FROM_THE_FINAL_MODEL}}  # of scores, by their keys
    for method in methods:
        if method.score_key not in (*files, "tdds"):
            from tdds_dist.scoring.offline import file_key

            # Options by name: the run's own config is that of the collection, and may have others.
            options = [f"{name}={value}" for name, value in _options(config, method).items()]
            commands.append(("score", str(run), "--score", method.score_key, *options))
            files[method.score_key] = file_key(method.score_key, config.score.baselines)
    for method in methods:
        for rate in rates:
            # TDDS by the name of its file: the run's own config may be from before this rate was asked for.
            is_tdds = method.score_key == "tdds"
            score = config.window_for(rate).key(config.score.preset) if is_tdds else files[method.score_key]
            sampler = ("--sampler", method.sampler) if method.sampler else ()
            file = _coreset(config, method, rate)
            force = ("--force",) if file.is_file() and not (is_collected and _has_coreset(config, method, rate)) else ()
            commands.append(("select", str(run), "--pruning-rate", f"{rate:g}", "--score", score, *sampler,
                             "--seed", str(config.run.seed), *force, "--out", str(file)))
    num = len(methods) * len(rates)
    return Stage("select", (Step(f"{num} coreset{'s' if num > 1 else ''}", tuple(commands), str(run),
                                 is_collected and has_coresets),))


def _retrain_stage(config: Config, frozen: Path, methods: Sequence[Method], rates: Sequence[float]) -> Stage:
    steps = []
    for seed in config.pipeline.seeds or (config.run.seed,):
        for strategy in config.pipeline.strategies:
            for rate in rates:
                for method in methods:
                    importance = config.retrain.importance if method.score_key == "tdds" else "none"
                    name = f"{method.name}_p{rate:g}_{strategy}_{importance}_seed{seed}"
                    directory = config.run.directory / "retrain" / name
                    coreset = _coreset(config, method, rate)
                    command = ("retrain", str(frozen), "--coreset", str(coreset), "--strategy", strategy,
                               "--importance", importance, "--name", name, f"run.seed={seed}")
                    steps.append(Step(name, (command,), str(directory), _has_result(directory), rate, coreset, strategy,
                                      importance, seed, method))
    return Stage("retrain", tuple(steps))


def check_what_is_done(config: Config, stages: Sequence[Stage]) -> None:
    """Raise InputError when a finished run was asked for something else than now, so that it cannot be skipped."""
    done = [(stage.name, step) for stage in stages for step in stage.steps if step.is_done]
    if not any(name in ("collect", "retrain") for name, _ in done):
        return
    from tdds_dist.data.beton import content_here
    from tdds_dist.runs.artifacts import load_coreset
    from tdds_dist.runs.directory import RunDir
    from tdds_dist.runs.identity import differences
    from tdds_dist.training.retrain import resolve

    data = content_here(config)
    for name, step in done:
        if name == "collect":
            if changed := differences(RunDir(step.directory), config, {"stage": "collect"} | data):
                raise InputError(f"{step.directory} was collected with other settings ({'; '.join(changed)}); keep those, or "
                                 "choose another run.name")
        elif name == "retrain" and step.coreset is not None and step.coreset.is_file():
            if _is_older(Path(step.directory) / "result.json", config.run.directory / "result.json"):
                raise InputError(f"{step.directory} was trained before the collection that is there now had finished; remove "
                                 "it to train it again, or touch its result.json if it belongs to it")
            seeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": step.seed})})
            run, resolved, setting = resolve(seeded, load_coreset(step.coreset), step.coreset, step.strategy, step.importance,
                                             Path(step.directory).name)
            changed = differences(run, resolved, setting | data)
            if step.method is not None:
                changed += _other_options(config, step.method, step.coreset)
            if changed:
                raise InputError(f"{step.directory} was trained with other settings ({'; '.join(changed)}); keep those, remove "
                                 "that folder to train it again, or choose another run.name")


def _has_result(run: Path) -> bool:
    try:
        json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _is_older(file: Path, other: Path) -> bool:
    """Say whether both are there and the first was written before the second."""
    try:
        return file.stat().st_mtime < other.stat().st_mtime
    except OSError:
        return False
