"""The plan of an experiment: which runs there are, what decides their results, and which of them are done.

Reads configs and what finished runs say of themselves; runs nothing (`experiment` does).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdds_dist.artifacts import load_coreset
from tdds_dist.config import Architecture, Config, Experiment, Method, load_config, parse_baselines, parse_config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir
from tdds_dist.score import BASELINES, MODEL_SCORES, check_options
from tdds_dist.start import content_here, why_not
from tdds_dist.tdds import Window, check_window


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
        """Where its coreset lies; shared by strategies and architectures."""
        return self.collection.coresets / f"{self.method.name}_p{self.pruning_rate:g}.npz"

    @property
    def name(self) -> str:
        """Folder under retrain/ of the collection."""
        network = f"_{self.architecture.name}" if self.architecture else ""
        return f"{self.method.name}_p{self.pruning_rate:g}_{self.strategy}_{self.importance}{network}_seed{self.seed}"

    @property
    def run(self) -> RunDir:
        """The retraining's run directory."""
        return RunDir(self.collection.retrain / self.name)

    @property
    def network(self) -> str:
        """Name of the network, empty for that of the collection."""
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
    """The collections by seed, and every retraining. Reads configs, but neither images nor results.

    Raises:
        InputError: what can be known to fail in any of them.
    """
    collections = {seed: _collection_task(plan, seed) for seed in plan.seeds}
    return collections, _cells(plan, collections)


def _cells(plan: Experiment, collections: dict[int, Task]) -> list[Cell]:
    """Every retraining, by seed, network, strategy, rate, method."""
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
    """InputError for a score that the collection will not give."""
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
    """The run of a cell whose coreset is made."""
    what = (f"{cell.method.name} p={cell.pruning_rate:g} {cell.strategy}{' ' + cell.network if cell.network else ''}, "
            f"seed {cell.seed}")
    cost = 1.0 if cell.strategy == "P" else 1.0 - cell.pruning_rate
    settings = {"row": cell.method.name} | ({"network": cell.network} if cell.network else {})
    return Task(what, cell.run.path, to_dict(_config(plan, cell.seed, cell.architecture)), cell.coreset_file, cell.strategy,
                cell.importance, cell.name, settings, cost)


def is_done(task: Task) -> bool:
    """Whether it has a result, whatever it was asked for then (`in_the_way`)."""
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
        from tdds_dist.retrain import resolve

        _, config, setting = resolve(config, load_coreset(task.coreset_file), task.coreset_file, task.strategy, task.importance,
                                     task.name)
    files = config.data.train, config.data.val
    if files not in images:
        images[files] = content_here(config)
    return why_not(run, config, setting | images[files], "name or dir")


def window_of(config: Config, method: Method, rate: float) -> Window:
    """The TDDS setting of a method at a pruning rate."""
    window = Window(method.T, method.K, config.score.beta) if method.T and method.K else config.window_for(rate)
    return window if method.beta is None else replace(window, beta=method.beta)
