"""Stage `experiment`: a table of retrainings from one collection per seed.

Owns the plan (which runs, in which order, which of them are done) and running it: several at a time in processes of their
own, or one after the other on all ranks of a job. What a run does is `collect`'s and `retrain`'s; what comes out is
`tables`'.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdds_dist.artifacts import Scores, load_scores, save_coreset, write_atomically
from tdds_dist.config import Architecture, Config, Experiment, Method, load_config, parse_config, to_dict
from tdds_dist.console import say
from tdds_dist.distributed import World, session, together
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir
from tdds_dist.score import MODEL_SCORES, score, score_all
from tdds_dist.select import any_scores, find_scores, make_coreset, random_scores
from tdds_dist.tables import Outcome, write_tables
from tdds_dist.tdds import Window

PR_SET_PDEATHSIG = 1  # of Linux's prctl
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


def experiment(plan: Experiment, *, jobs: int = 1, world: World | None = None) -> tuple[Path, list[str]]:
    """Run what is missing of an experiment and write its tables; returns the Markdown file and what failed.

    `jobs` runs go at a time, each alone in a process with its share of the CPUs and GPUs. With a `world` of several ranks
    every rank calls it, and all of them work on one run after the other. What is done already is skipped; a run that was
    stopped half-way is started over.

    Raises:
        InputError: an impossible plan, or results of other settings in its directory; before anything runs.
    """
    started = time.perf_counter()
    is_main = world is None or world.is_main
    collections = {seed: _collection_task(plan, seed) for seed in plan.seeds}
    execute = _on_all_ranks(world) if world is not None and world.world_size > 1 else _in_processes(jobs)
    with _raising_alike(world):
        cells = _cells(plan, collections)
        for task in collections.values():
            _check_same_settings(task)
        waiting = [task for task in collections.values() if not _is_done(task)]
        if is_main:
            say(f"experiment {plan.name}: {len(plan.seeds)} collections ({len(plan.seeds) - len(waiting)} done), {len(cells)} "
                f"retrainings, {jobs if world is None or world.world_size == 1 else 1} at a time")
            plan.directory.mkdir(parents=True, exist_ok=True)
    failed = execute(waiting)
    tasks = []
    with _raising_alike(world):
        if not failed:
            if is_main:
                for seed in plan.seeds:
                    _make_coresets(plan, seed, [cell for cell in cells if cell.seed == seed])
            tasks = [_retrain_task(plan, cell) for cell in cells]
            for task in tasks:
                _check_same_settings(task)
    waiting = sorted((task for task in tasks if not _is_done(task)), key=lambda task: -task.cost)
    if is_main and tasks:
        say(f"{len(tasks) - len(waiting)} of {len(tasks)} retrainings are done already")
    failed += execute(waiting)
    seconds = time.perf_counter() - started
    if is_main:
        _record_time(plan, seconds, len(waiting))
        outcomes = [Outcome(cell.method, cell.pruning_rate, cell.strategy, cell.network, cell.importance, cell.seed,
                            cell.run.read_result()) for cell in cells]
        write_tables(plan, outcomes, {seed: RunDir(task.directory) for seed, task in collections.items()})
    return plan.directory / "table.md", failed


# ---- the plan


def _cells(plan: Experiment, collections: dict[int, Task]) -> list[Cell]:
    """Every retraining, cheapest settings to read first: by seed, network, strategy, rate, method."""
    found = []
    for seed in plan.seeds:
        config = parse_config(collections[seed].config)
        for architecture in plan.architectures or (None,):
            for strategy in plan.strategies:
                for rate in plan.pruning_rates:
                    for method in plan.methods:
                        importance = method.importance or (
                            config.retrain.importance if method.score_key == "tdds" else "none")
                        found.append(Cell(method, rate, strategy, architecture, seed, RunDir(collections[seed].directory),
                                          importance))
                        if method.score_key == "tdds":
                            _window(config, method, rate)  # says so when no window serves the rate
    return found


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
    settings = {"digest": _digest(to_dict(config))}
    return Task(f"collect, seed {seed}", config.run.directory, to_dict(config), settings=settings)


def _retrain_task(plan: Experiment, cell: Cell) -> Task:
    config = to_dict(_config(plan, cell.seed, cell.architecture))
    digest = _digest(config, cell.coreset_file.read_bytes().hex(), cell.strategy, cell.importance)
    what = (f"{cell.method.name} p={cell.pruning_rate:g} {cell.strategy}{' ' + cell.network if cell.network else ''}, "
            f"seed {cell.seed}")
    cost = 1.0 if cell.strategy == "P" else 1.0 - cell.pruning_rate
    return Task(what, cell.run.path, config, cell.coreset_file, cell.strategy, cell.importance, cell.name,
                {"digest": digest, "method": cell.method.name}, cost)


def _digest(config: dict[str, Any], *rest: str) -> str:
    """What decides a run's result, hashed: the config without names and places, and what else is given."""
    config = {section: {key: value for key, value in values.items() if key not in _NOT_A_SETTING.get(section, ())}
              for section, values in config.items()}
    text = json.dumps([config, *rest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_done(task: Task) -> bool:
    return RunDir(task.directory).result_file.is_file()


def _check_same_settings(task: Task) -> None:
    """InputError when a finished run stands there that was asked for something else."""
    run = RunDir(task.directory)
    assert task.settings is not None
    if _is_done(task) and (found := run.read_env().get("digest")) != task.settings["digest"]:
        if found is None:
            raise InputError(f"{run.path} holds a run that this experiment did not start; choose another name or dir")
        raise InputError(f"{run.path} was run with other settings than the experiment now says; choose another name or dir, or "
                         "remove that directory to run it again")


# ---- scores and coresets: seconds, on the main rank


def _make_coresets(plan: Experiment, seed: int, cells: list[Cell]) -> None:
    run = cells[0].collection
    config = parse_config(run.read_config(), str(run.config_file))
    scores: dict[tuple[str, float], Scores] = {}
    made: set[Path] = set()
    for cell in cells:
        method, rate = cell.method, cell.pruning_rate
        key = (method.name, rate if method.score_key == "tdds" else 0.0)
        if key not in scores:
            scores[key] = _scores_of(run, config, method, rate, seed)
        if cell.coreset_file in made:
            continue
        made.add(cell.coreset_file)
        coreset, warnings = make_coreset(scores[key], rate, sampler=method.sampler, class_balanced=method.class_balanced,
                                         seed=seed, **method.selector_options)
        for warning in warnings:
            say(f"warning: {method.name} at p={rate:g}, seed {seed}: {warning}")
        save_coreset(cell.coreset_file, coreset)  # the same bytes every time; other options show in the digest


def _scores_of(run: RunDir, config: Config, method: Method, rate: float, seed: int) -> Scores:
    """The scores a method ranks by, computed from the trajectory where no file holds them yet."""
    key = method.score_key
    if key == "random":
        return random_scores(any_scores(run.path), seed)
    if key == "tdds":
        window, preset = _window(config, method, rate), method.preset or config.score.preset
        path = run.scores / f"{window.key(preset, method.delta)}.npz"
        if not path.is_file():
            path, = score(run.path, preset=preset, T=window.T, K=window.K, beta=window.beta, delta=method.delta, out=path)
        return load_scores(path)
    if key in MODEL_SCORES or ((run.scores / f"{key}.npz").is_file() and not method.options):
        return find_scores(run.path, key, rate)
    (path,), _ = score_all(run.path, [key], options=method.options)
    return load_scores(path)


def _window(config: Config, method: Method, rate: float) -> Window:
    """The TDDS setting of a method at a pruning rate."""
    window = Window(method.T, method.K, config.score.beta) if method.T and method.K else config.window_for(rate)
    return window if method.beta is None else replace(window, beta=method.beta)


# ---- running


def _run_task(task: Task, world: World) -> None:
    """One collection or retraining, from the start; what a stopped one left behind goes."""
    from tdds_dist.collect import collect
    from tdds_dist.retrain import retrain

    with together(world):
        if world.is_main and task.directory.exists():
            if not (task.directory / "config.yaml").is_file() and any(task.directory.iterdir()):
                raise InputError(f"{task.directory} exists and is not a run; move it away")
            shutil.rmtree(task.directory)
    config = parse_config(task.config, task.title)
    if task.coreset_file is None:
        collect(config, world, settings=task.settings)
    else:
        retrain(config, world, task.coreset_file, task.strategy, importance=task.importance, name=task.name,
                settings=task.settings)


def _on_all_ranks(world: World) -> Callable[[list[Task]], list[str]]:
    def execute(tasks: list[Task]) -> list[str]:
        failed = []
        with together(world):
            pass  # nobody starts on files that the main rank is still writing
        for number, task in enumerate(tasks, start=1):
            if world.is_main:
                say(f"[{number}/{len(tasks)}] {task.title}")
            try:
                _run_task(task, world)
            except InputError as error:
                if not error.shared:
                    raise
                failed.append(f"{task.title}: {error}")
        return failed

    return execute


def _in_processes(jobs: int) -> Callable[[list[Task]], list[str]]:
    if jobs < 1:
        raise InputError(f"--jobs={jobs} must be at least 1")

    def execute(tasks: list[Task]) -> list[str]:
        if not tasks:
            return []
        context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
        workers = min(jobs, len(tasks))
        failed, done, started = [], 0.0, time.perf_counter()
        total = sum(task.cost or 1.0 for task in tasks)
        with ProcessPoolExecutor(workers, context, _start_worker, (context.Value("i", 0), workers)) as pool:
            futures = {pool.submit(_work, task): task for task in tasks}
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    task = futures[future]
                    done += task.cost or 1.0
                    error = future.exception()
                    if isinstance(error, InputError):
                        failed.append(f"{task.title}: {error}")
                        outcome = f"FAILED: {error}"
                    elif error is not None:
                        raise error
                    else:
                        outcome = future.result()
                    left = (time.perf_counter() - started) * (total - done) / done
                    say(f"[{number}/{len(tasks)}] {task.title}: {outcome}, {left / 60:.0f} min left")
            except BrokenProcessPool as error:
                raise InputError("a worker process was killed (too little memory is the usual reason); use fewer --jobs, and "
                                 "run the same command again: what is done stays done") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(pool._processes.values()):
                    process.kill()
                raise
        return failed

    return execute


def _start_worker(counter: Any, workers: int) -> None:
    """Give this process its share of CPUs and GPUs; it ends with its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[number % len(cpus)::workers] or cpus)
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or _all_gpus()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def _all_gpus() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]  # does not initialise CUDA


def _work(task: Task) -> str:
    """Run a task in this worker, its lines in the log of the run alone; returns what to say about it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process; log.txt has the lines
    started = time.perf_counter()
    device = task.config["run"]["device"]
    with session(device, task.config["run"]["timeout_seconds"]) as world:
        _run_task(task, world)
    result = RunDir(task.directory).read_result() or {}
    return f"{result['final_top1']:.2f} % in {time.perf_counter() - started:.0f} s"


def _raising_alike(world: World | None) -> AbstractContextManager[None]:
    return nullcontext() if world is None else together(world)


def _record_time(plan: Experiment, seconds: float, num_runs: int) -> None:
    """Add this invocation to times.jsonl, for the provenance of the table."""
    file = plan.directory / "times.jsonl"
    line = json.dumps({"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": seconds, "retrainings": num_runs}) + "\n"
    before = file.read_bytes() if file.is_file() else b""
    write_atomically(file, lambda handle: handle.write(before + line.encode()))
