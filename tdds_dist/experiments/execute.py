"""Stage `experiment`: a table of retrainings from one collection per seed.

Owns running what `grid` plans: several at a time in processes of their own, or one after the other
on all ranks of a job; and the coresets in between. Runs are those of `collect` and `retrain`;
`tables` writes the results.
"""

import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.experiment import Experiment
from tdds_dist.config.grid import Method
from tdds_dist.config.run import Config, load_config, parse_baselines, to_dict
from tdds_dist.console import HEADING, Progress, log
from tdds_dist.coreset.agreement import noise_kept
from tdds_dist.coreset.select import (
    changes,
    find_scores,
    make_coreset,
    put,
    random_scores,
    recall_of,
)
from tdds_dist.data.manifest import Manifest
from tdds_dist.distributed.collectives import gather_objects, together
from tdds_dist.distributed.interruption import Interruption
from tdds_dist.distributed.world import World, current_world, session
from tdds_dist.errors import InputError
from tdds_dist.experiments.grid import (
    Cell,
    Task,
    check_experiment,
    config_of,
    in_the_way,
    retrain_task,
    window_of,
)
from tdds_dist.experiments.processes import run_in_processes
from tdds_dist.experiments.tables import CellResult, manifest_of, write_tables
from tdds_dist.runs.artifacts import Scores, load_coreset, load_scores, write_atomically
from tdds_dist.runs.directory import RunDir, any_scores, copy_run, move_aside
from tdds_dist.runs.lock import RunLock
from tdds_dist.scoring.offline import BASELINES, MODEL_SCORES, file_key, score, score_all
from tdds_dist.text import duration

# runs tasks and returns those that failed, by directory, and why
Execute = Callable[[list[Task]], dict[Path, str]]


def experiment(
    experiment: Experiment,
    *,
    jobs: int = 1,
    force: bool = False,
    world: World | None = None,
    interruption: Interruption | None = None,
) -> tuple[Path, list[str]]:
    """Run what is missing of an experiment and write its tables; return the Markdown file and what
    failed.

    `jobs` runs go at a time, each alone in a process with its share of the CPUs and GPUs. With a
    `world` of several ranks every rank calls it, and all of them work on one run after the other.
    What is done already is skipped; a run that was stopped half-way goes on from its last
    checkpoint. What can do neither, being of other settings, is refused, and with `force` moved
    aside. A run that fails stops only those that need it.

    Raises:
        InputError: what cannot be done, or runs of other settings in its directory; before anything
        runs.
    """
    if jobs < 1:
        raise InputError(f"--jobs={jobs} must be at least 1")
    world = world or current_world("cpu")
    execute: Execute = partial(_in_processes, jobs=jobs)
    if world.world_size > 1:
        execute, jobs = partial(_on_all_ranks, world=world, interruption=interruption), 1
    with ExitStack() as locks:
        with together(world):
            collections, cells = check_experiment(experiment)
            if world.is_main:
                experiment.directory.mkdir(parents=True, exist_ok=True)
                for seed in experiment.seeds:
                    locks.enter_context(_locked(experiment, seed))
        return _experiment(experiment, collections, cells, execute, world, jobs, force)


def _experiment(
    experiment: Experiment,
    collections: dict[int, Task],
    cells: list[Cell],
    execute: Execute,
    world: World,
    jobs: int,
    force: bool,
) -> tuple[Path, list[str]]:
    """Run an experiment. All ranks decide alike without messages: they see the same files and the
    same failures."""
    finish = partial(_finish, experiment, collections, cells, time.perf_counter())
    with together(world):
        if world.is_main:
            _clear_the_way([*collections.values()], force)
            _take_over(experiment, [*collections.values()])
            begun = [cell for cell in cells if cell.run.path.exists()]
            begun = [cell for cell in begun if _is_readable(cell.coreset_file)]
            _clear_the_way([_task(experiment, cell) for cell in begun], force)
    with together(world):
        waiting = [task for task in collections.values() if not task.is_done]
        log.info(
            f"experiment {experiment.name}: {len(experiment.seeds)} collections"
            f" ({len(experiment.seeds) - len(waiting)} done), {len(cells)} retrainings,"
            f" {jobs} at a time",
            extra=HEADING,
        )
    with _tables_if_interrupted(finish, [], world):  # what cells hold is not checked yet
        not_collected = execute(waiting)
    failed = list(not_collected.values())
    with together(world):
        cells_left = [cell for cell in cells if cell.collection.path not in not_collected]
        reasons = _make_coresets(cells_left, collections, force) if world.is_main else {}
    reasons = gather_objects(reasons, world)[0]
    with together(world):  # nobody reads what the main rank is still writing
        coresets = dict.fromkeys(cell.coreset_file for cell in cells_left)
        failed += [f"coreset {file}: {reasons[file]}" for file in coresets if file in reasons]
        cells_left = [cell for cell in cells_left if cell.coreset_file not in reasons]
        tasks = [_task(experiment, cell) for cell in cells_left]
        if world.is_main:
            _clear_the_way(tasks, force)
    with together(world):
        waiting = sorted((task for task in tasks if not task.is_done), key=lambda task: -task.cost)
        if tasks:
            log.info(f"{len(tasks) - len(waiting)} of {len(tasks)} retrainings are done already")
    with _tables_if_interrupted(finish, cells_left, world):
        failed += execute(waiting).values()
    with together(world):
        if world.is_main:
            finish(cells_left)
    return experiment.directory / "table.md", failed


def _task(experiment: Experiment, cell: Cell) -> Task:
    return retrain_task(cell, config_of(experiment, cell.seed, cell.variant))


def _clear_the_way(tasks: list[Task], force: bool) -> None:
    """Raise InputError when a directory holds a run that is not, and cannot become, that of its
    task; with `force` move all such runs aside, when no job works in them."""
    images: dict[Any, Any] = {}
    found = {task.directory: problem for task in tasks if (problem := in_the_way(task, images))}
    for directory, (what, way_out) in found.items():
        if not force:
            raise InputError(f"{what}; {way_out}, or give --force, which moves it aside")
        for run in (RunDir(directory), *RunDir(directory).retrain_runs()):
            with RunLock(run.path):
                pass
    for directory, (what, _) in found.items():
        log.warning(f"{what}; it is moved aside to {move_aside(directory)}")


def _take_over(experiment: Experiment, tasks: list[Task]) -> None:
    """Copy the finished collections of another experiment to where this one has none.

    Raises:
        InputError: one of other settings or images.
    """
    images: dict[Any, Any] = {}
    for task in tasks:
        source = replace(task, directory=Path(experiment.collections) / task.directory.name)
        if not experiment.collections or task.directory.exists():
            continue
        if not source.is_done:
            log.info(f"{source.directory} is no finished collection; {task.title} is run here")
            continue
        if problem := in_the_way(source, images):
            raise InputError(
                f"collections={experiment.collections}: {problem[0]}; keep those settings, or leave"
                " collections out"
            )
        copy_run(RunDir(source.directory), RunDir(task.directory), to_dict(task.config))
        log.info(f"{task.title}: a copy of {source.directory}")


def _is_readable(coreset_file: Path) -> bool:
    try:
        load_coreset(coreset_file)
    except InputError:
        return False
    return True


@contextmanager
def _tables_if_interrupted(
    finish: Callable[[list[Cell]], None], valid: list[Cell], world: World
) -> Iterator[None]:
    """Write tables of what is done when the runs end early; where ranks work together, the launcher
    ends them."""
    try:
        yield
    except BaseException:
        if world.world_size == 1:
            finish(valid)
        raise


def _finish(
    experiment: Experiment,
    collections: dict[int, Task],
    cells: list[Cell],
    started: float,
    valid: list[Cell],
) -> None:
    """Write the tables, and the record of this start. Results of cells that are not `valid` do not
    count."""
    paths = {cell.run.path for cell in valid}
    manifest = manifest_of(load_config(experiment.config, experiment.overrides))
    outcomes = [
        _outcome(cell, cell.run.read_result() if cell.run.path in paths else None, manifest)
        for cell in cells
    ]
    _record_time(experiment, time.perf_counter() - started)
    runs = {seed: RunDir(task.directory) for seed, task in collections.items()}
    write_tables(experiment, outcomes, runs)
    retrained = [run for collection in runs.values() for run in collection.retrain_runs()]
    finished = {run.path for run in retrained if run.result_file.is_file()}
    if others := finished - {cell.run.path for cell in cells}:
        log.info(
            f"{len(others)} finished retrainings in {experiment.directory} are of other methods,"
            " rates or variants, and are not in the table"
        )


def _outcome(cell: Cell, result: dict[str, Any] | None, manifest: Manifest | None) -> CellResult:
    """Return what the table says of a cell, with the noise in its coreset where the manifest, of
    the same labels, knows it."""
    coreset = load_coreset(cell.coreset_file) if cell.coreset_file.is_file() else None
    bad: list[np.ndarray | None] = [None, None]
    if manifest and coreset and manifest.fingerprint == coreset.fingerprint:
        bad = [manifest.noisy_N, manifest.corrupted_N]
    shares = [
        noise_kept(coreset.index_M, bad_N)[0] if coreset and bad_N is not None else None
        for bad_N in bad
    ]
    return CellResult(cell, result, coreset.method if coreset else "", shares[0], shares[1])


@contextmanager
def _locked(experiment: Experiment, seed: int) -> Iterator[None]:
    """Keep other processes from this seed's runs, which they would take for left-overs, until this
    process ends."""
    with (experiment.directory / f".seed{seed}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another `tdds experiment` is at work on seed {seed} in {experiment.directory};"
                " wait for it, or choose another name or dir"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


# ---- scores and coresets: seconds, on the main rank


def _make_coresets(cells: list[Cell], collections: dict[int, Task], force: bool) -> dict[Path, str]:
    """Write the coreset files of the cells; return those that cannot be made, and why.

    One that is right already stays, another one is moved aside; refused without `force` where it
    was trained on. The configs are those of the experiment: what a collection was run with may have
    had other rates and options.
    """
    scores: dict[tuple[Path, str, float], Scores] = {}
    reasons: dict[Path, str] = {}
    for cell in {cell.coreset_file: cell for cell in cells}.values():
        method, rate, run = cell.method, cell.pruning_rate, cell.collection
        key = (run.path, method.name, rate if method.score_key == "tdds" else 0.0)
        try:
            if key not in scores:
                scores[key] = _scores_of(run, collections[cell.seed].config, method, rate)
            recall = {"recall_C": recall_of(run.path)} if method.sampler == "drop" else {}
            coreset, warnings = make_coreset(
                scores[key],
                rate,
                sampler=method.sampler,
                class_balanced=method.class_balanced,
                seed=cell.seed,
                **method.selector_options,
                **recall,
            )
        except InputError as error:
            log.error(f"{cell.coreset_file}: FAILED: {error}")
            reasons[cell.coreset_file] = str(error)
            continue
        for warning in warnings:
            log.warning(f"{method.name} at p={rate:g}, seed {cell.seed}: {warning}")
        # One that cannot be read is made again; `_clear_the_way` compares what was trained on it.
        changed = changes(cell.coreset_file, coreset) if _is_readable(cell.coreset_file) else ""
        for other in cells:
            if (
                changed
                and not force
                and other.coreset_file == cell.coreset_file
                and other.run.config_file.is_file()
            ):
                raise InputError(
                    f"{other.run.path} was trained on {cell.coreset_file}, which {changed}; choose"
                    " another name or dir, or give --force, which moves both aside"
                )
        for notice in put(cell.coreset_file, coreset):
            log.warning(notice)
    return reasons


def _scores_of(run: RunDir, config: Config, method: Method, rate: float) -> Scores:
    """Return the scores a method ranks by, computed from the trajectory where no file holds them
    yet."""
    key = method.score_key
    if key == "random":
        return random_scores(any_scores(run.path), config.run.seed)
    if key in MODEL_SCORES:
        return find_scores(run.path, key, rate)
    if key == "tdds":
        window, preset = window_of(config, method, rate), method.preset or config.score.preset
        path = run.scores / f"{window.key(preset, method.delta)}.npz"
        if not path.is_file():
            setting = asdict(window) | {"preset": preset, "delta": method.delta}
            (path,) = score(run.path, **setting, out=path)
        return load_scores(path)
    options = parse_baselines(config.score.baselines, method.options)
    path = run.scores / f"{file_key(key, options)}.npz"  # the name carries every option
    if not path.is_file():
        values = [f"{name}={getattr(options, name)}" for name in BASELINES[key].options]
        (path,), _ = score_all(run.path, [key], options=values)
    return load_scores(path)


# ---- running


def _run_task(task: Task, world: World, interruption: Interruption | None = None) -> None:
    """Run one collection or retraining, from its last checkpoint where it was stopped."""
    from tdds_dist.training.collect import collect
    from tdds_dist.training.retrain import retrain

    if task.coreset_file is None:
        collect(task.config, world, settings=task.settings, interruption=interruption)
    else:
        retrain(
            task.config,
            world,
            task.coreset_file,
            task.strategy,
            importance=task.importance,
            name=task.directory.name,
            settings=task.settings,
            interruption=interruption,
        )


def _on_all_ranks(
    tasks: list[Task], world: World, interruption: Interruption | None
) -> dict[Path, str]:
    """Run tasks one after the other on all ranks."""
    failed = {}
    for number, task in enumerate(tasks, start=1):
        log.info(f"[{number}/{len(tasks)}] {task.title}")
        try:
            _run_task(task, world, interruption)
        except InputError as error:
            if not error.shared:
                raise
            failed[task.directory] = f"{task.title}: {error}"
            if world.is_main:
                log.error(f"[{number}/{len(tasks)}] {task.title}: FAILED: {error}")
    return failed


def _in_processes(tasks: list[Task], jobs: int) -> dict[Path, str]:
    """Run tasks in `jobs` processes."""
    if not tasks:
        return {}
    failed: dict[Path, str] = {}
    defects: list[Exception] = []
    done, started = 0.0, time.perf_counter()
    total = sum(task.cost or 1.0 for task in tasks)
    with Progress("experiment", len(tasks), "runs", visible=True) as bar:
        for number, (task, outcome) in enumerate(run_in_processes(tasks, _work, jobs), start=1):
            done += task.cost or 1.0
            left = duration((time.perf_counter() - started) * (total - done) / done)
            level, text = logging.INFO, outcome
            if isinstance(outcome, Exception):
                level, text = logging.ERROR, f"FAILED: {outcome or type(outcome).__name__}"
            if isinstance(outcome, InputError):
                failed[task.directory] = f"{task.title}: {outcome}"
            elif isinstance(outcome, Exception):
                defects.append(outcome)
            log.log(level, f"[{number}/{len(tasks)}] {task.title}: {text}, {left} left")
            bar.advance()
    if defects:
        raise defects[0]  # with the worker's traceback
    return failed


def _work(task: Task) -> str:
    """Run a task in this worker, its lines in the log of the run alone; return what to say about
    it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process; log.txt has the lines
    started = time.perf_counter()
    with session(task.config.run.device, task.config.run.timeout_seconds) as world:
        _run_task(task, world)
    result = RunDir(task.directory).read_result() or {}
    return f"{result['final_top1']:.2f} % in {time.perf_counter() - started:.0f} s"


def _record_time(experiment: Experiment, seconds: float) -> None:
    """Add this invocation to times.jsonl, for the provenance of the table."""
    file = experiment.directory / "times.jsonl"
    line = json.dumps({"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": seconds}) + "\n"
    before = file.read_bytes() if file.is_file() else b""
    write_atomically(file, lambda handle: handle.write(before + line.encode()))
