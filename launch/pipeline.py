"""What a submission consists of: stages, their steps, and which of them are done already. Starts nothing.

A step is one job: commands of `tdds` that its ranks run one after the other. A stage is one step, or several that go as an
array; each stage waits for the one before. Names of coresets and retrainings are fixed here, so that jobs can be queued before
the files that they will find exist.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from tdds_dist.config import BUILT_IN_METHODS, Config, Method
from tdds_dist.errors import InputError
from tdds_dist.partition import per_rank_batch
from tdds_dist.schedule import batch_size_factor

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
        """Steps that are not done."""
        return tuple(step for step in self.steps if not step.is_done)


def collect_stage(config: Config, frozen: Path) -> Stage:
    """The collection of a config; `frozen` is the file that the jobs read it from."""
    config.check_collect()
    run = config.run.directory
    return Stage("collect", (Step("collect", (("collect", str(frozen)),), str(run), _has_result(run)),))


def pipeline_stages(config: Config, frozen: Path) -> list[Stage]:
    """Collection, selection, an array of retrainings, report: `config.pipeline` says of what."""
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
    """InputError for a coreset that could not be made after the collection."""
    from tdds_dist.cells import check_method

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
    """What a score of the trajectory is computed with."""
    from tdds_dist.score import BASELINES

    names = BASELINES[method.score_key].options if method.score_key in BASELINES else ()
    return {name: getattr(config.score.baselines, name) for name in names}


def _has_coreset(config: Config, method: Method, rate: float) -> bool:
    """Whether its coreset is there, of this collection and with these options."""
    file = _coreset(config, method, rate)
    if not file.is_file() or _is_older(file, config.run.directory / "result.json"):
        return False
    return not _other_options(config, method, file)


def _other_options(config: Config, method: Method, coreset: Path) -> list[str]:
    from tdds_dist.artifacts import load_coreset

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
    """One job for all coresets: each takes a second, and every score is computed once.

    A coreset that is there and of another collection or other options is moved aside (`--force`).
    """
    run = config.run.directory
    commands: list[tuple[str, ...]] = []
    files = {"random": "random", **{key: key for key in FROM_THE_FINAL_MODEL}}  # of scores, by their keys
    for method in methods:
        if method.score_key not in (*files, "tdds"):
            from tdds_dist.score import file_key

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
    """InputError when a finished run was asked for something else than now, so that it cannot be skipped."""
    done = [(stage.name, step) for stage in stages for step in stage.steps if step.is_done]
    if not any(name in ("collect", "retrain") for name, _ in done):
        return
    from tdds_dist.artifacts import load_coreset
    from tdds_dist.identity import differences
    from tdds_dist.retrain import resolve
    from tdds_dist.rundir import RunDir
    from tdds_dist.start import content_here

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


def check_batch(config: Config, cluster: Cluster, stages: Sequence[Stage]) -> None:
    """InputError when the ranks of a stage cannot share its batch evenly."""
    for stage in stages:
        if stage.name not in ("collect", "retrain"):
            continue
        num_ranks = cluster.for_stage(stage.name).num_ranks
        for rate in sorted({step.pruning_rate or 0.0 for step in stage.steps}):
            factor = batch_size_factor(rate, config.retrain.batch_size_rule) if stage.name == "retrain" else 1.0
            try:
                per_rank_batch(config.train.global_batch_size, num_ranks, config.train.accumulation, factor)
            except InputError as error:
                at = f" at pruning rate {rate:g}" if stage.name == "retrain" else ""
                raise InputError(f"{stage.name}{at} on {num_ranks} ranks: {error}") from error


def _has_result(run: Path) -> bool:
    try:
        json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _is_older(file: Path, other: Path) -> bool:
    """Whether both are there and the first was written before the second."""
    try:
        return file.stat().st_mtime < other.stat().st_mtime
    except OSError:
        return False
