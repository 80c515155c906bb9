"""The plan of an experiment: which runs there are, what decides their results, and which of them are done.

Reads configs and what finished runs say of themselves; runs nothing (`experiment` does).
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdds_dist.checkpoint import published
from tdds_dist.config import Architecture, Config, Experiment, Method, load_config, parse_baselines, parse_config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir
from tdds_dist.score import BASELINES, MODEL_SCORES, check_options
from tdds_dist.tdds import Window, check_window

_NOT_A_SETTING = {"run": ("name", "dir", "device", "timeout_seconds"), "data": ("num_workers",)}  # change no result


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
    matters = to_dict(config)
    del matters["retrain"], matters["score"]["baselines"], matters["pipeline"]
    matters["score"]["windows"] = [{**window, "pruning_rates": ()} for window in matters["score"]["windows"]]
    settings = {"digest": _digest(matters)}
    return Task(f"collect, seed {seed}", config.run.directory, to_dict(config), settings=settings)


def retrain_task(plan: Experiment, cell: Cell) -> Task:
    """The run of a cell whose coreset is made."""
    config = to_dict(_config(plan, cell.seed, cell.architecture))
    matters = {section: values for section, values in config.items() if section not in ("score", "collect", "pipeline")}
    digest = _digest(matters, cell.coreset_file.read_bytes().hex(), cell.strategy, cell.importance)
    what = (f"{cell.method.name} p={cell.pruning_rate:g} {cell.strategy}{' ' + cell.network if cell.network else ''}, "
            f"seed {cell.seed}")
    cost = 1.0 if cell.strategy == "P" else 1.0 - cell.pruning_rate
    return Task(what, cell.run.path, config, cell.coreset_file, cell.strategy, cell.importance, cell.name,
                {"digest": digest, "row": cell.method.name} | ({"network": cell.network} if cell.network else {}), cost)


def _digest(config: dict[str, Any], *rest: str) -> str:
    """What decides a run's result, hashed: the config without names and places, and what else is given."""
    config = {section: {key: value for key, value in values.items() if key not in _NOT_A_SETTING.get(section, ())}
              for section, values in config.items()}
    text = json.dumps([config, *rest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_done(task: Task) -> bool:
    """Whether it has a result, whatever it was asked for then (`check_directory`)."""
    return RunDir(task.directory).result_file.is_file()


def check_directory(task: Task) -> None:
    """InputError when the task's directory holds something else, or a finished run that was asked for something else.

    What a stopped run of an experiment left there goes when the task starts.
    """
    run = RunDir(task.directory)
    assert task.settings is not None
    found = run.read_env().get("digest")
    if found is None and task.directory.exists():
        own = task.directory.is_dir() and all(  # all that a start can leave before it says whose run it is
            path.name in (run.config_file.name, run.log_file.name, run.status_file.name) or path.suffix == ".tmp"
            or path.name.startswith(("run.lock", ".run.lock")) for path in task.directory.iterdir())
        if not own:
            raise InputError(f"{run.path} holds something that this experiment did not start; choose another name or dir")
    if is_done(task) and found != task.settings["digest"]:
        idle = ("pipeline", *(("retrain",) if task.coreset_file is None else ("score", "collect")))  # decide nothing here
        raise other_settings(run, {section: values for section, values in task.config.items() if section not in idle})


def can_go_on(task: Task) -> bool:
    """Whether its directory holds the same run, unfinished, with a checkpoint."""
    run = RunDir(task.directory)
    same = run.config_file.is_file() and run.read_env().get("digest") == (task.settings or {})["digest"]
    return same and bool(published(run.checkpoints))


def other_settings(run: RunDir, config: dict[str, Any]) -> InputError:
    """The refusal, with the first key that differs where it is one of the config."""
    then = run.read_config()
    changed = [f" ({section}.{key} was {then[section][key]}, now {value})" for section, values in config.items()
               for key, value in values.items() if key not in _NOT_A_SETTING.get(section, ()) and section in then
               and (section, key) not in (("train", "epochs"), ("train", "global_batch_size")) and key in then[section]
               and then[section][key] != value]
    return InputError(f"{run.path} was run with other settings than the experiment now says{changed[0] if changed else ''}; "
                      "choose another name or dir, or remove that directory to run it again")


def window_of(config: Config, method: Method, rate: float) -> Window:
    """The TDDS setting of a method at a pruning rate."""
    window = Window(method.T, method.K, config.score.beta) if method.T and method.K else config.window_for(rate)
    return window if method.beta is None else replace(window, beta=method.beta)
