"""How a stage enters its run directory: alone, and new, resumed, or finished already.

Owns that decision: the lock, which settings may change between two starts, which checkpoint is used, what a crash left half
done. `engine` restores the state itself.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tdds_dist import console, distributed
from tdds_dist.artifacts import write_atomically
from tdds_dist.beton import BetonInfo, content_sha256
from tdds_dist.checkpoint import Checkpoint, Checkpoints, published
from tdds_dist.config import Config, parse_config, to_dict
from tdds_dist.console import say
from tdds_dist.distributed import World, together
from tdds_dist.errors import InputError
from tdds_dist.lock import RunLock
from tdds_dist.preemption import Preempted
from tdds_dist.pulse import Pulse
from tdds_dist.rundir import RunDir, environment
from tdds_dist.trajectory import whole_epochs

# What may change between two starts of a run: section -> keys, or all of it.
MAY_CHANGE: dict[str, tuple[str, ...] | None] = {
    "run": ("name", "dir", "device", "timeout_seconds"),
    "data": ("train", "val", "num_workers"),  # the files by name; their content is compared
    "train": ("accumulation", "log_every", "eval_every"),
    "score": ("baselines", "final_pass", "on_nan"),
    "retrain": None, "checkpoint": None, "pipeline": None,
}
_OF_RETRAIN: dict[str, tuple[str, ...] | None] = MAY_CHANGE | {"score": None, "collect": None}  # these decide nothing there
_LOOK_AGAIN_SECONDS = 5.0
_PATIENCE = 0.8  # of the time-out of a collective
_STAGE_KEYS = ("stage", "strategy", "importance", "coreset_sha256")


@dataclass(frozen=True)
class Start:
    """What a stage found: `result` when the run is finished, `resume` when it goes on, neither when it is new."""

    checkpoints: Checkpoints
    guard: Callable[[], None]  # raises InputError when the directory is not ours any more; for the main rank, before it writes
    pulse: Pulse
    resume: Checkpoint | None = None
    result: dict[str, Any] | None = None


@contextmanager
def entered(run: RunDir, config: Config, setting: dict[str, Any], world: World, *, fresh: bool = False,
            force: bool = False) -> Iterator[Start]:
    """Hold a run directory for one stage. `config` is the resolved one, `setting` what else decides the result.

    `fresh` starts over; with `force` also where there is a run. All ranks enter and leave; rank 0 does the work.

    Raises:
        InputError: in use, of other settings or data, no usable checkpoint, not writable; on every rank.
    """
    if force and not fresh:
        raise InputError("--force belongs to --fresh: it removes the run that is there; give both, or neither", shared=True)
    if fresh and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        fresh = force = False  # said to the first start: this one is to go on
    lock = RunLock(run.path)
    pulse = Pulse(run.status_file, setting["stage"], world.world_size, world.is_main)
    notes: list[str] = []
    checkpoints = None

    def tell(message: str) -> None:
        notes.append(message)
        say(message, run.log_file)

    def mark_published() -> None:
        """A run that has had a checkpoint does not start over for want of one (`_look`)."""
        if not (env := run.read_env()).get("has_checkpoints"):
            run.write_env(env | {"has_checkpoints": True})

    def guard() -> None:
        if lock.lost:
            raise InputError(f"{run.path} was taken over by another job while this one did not run; it may not write there any "
                             "more")

    try:
        with together(world):
            result, is_resumed = None, False
            if world.is_main:
                if message := _acquire(lock, _PATIENCE * config.run.timeout_seconds):
                    tell(message)
                result, is_resumed = _look(run, config, setting, fresh, force, tell)
        result, is_resumed = distributed.gather_objects((result, is_resumed), world)[0]
        keeping = config.checkpoint
        checkpoints = Checkpoints(
            run.checkpoints, world, keep=keeping.keep, asynchronous=keeping.asynchronous,
            stop_on_error=keeping.on_error == "stop", timeout_seconds=config.run.timeout_seconds,
            about={"config": to_dict(config), "data": setting.get("data")}, say=tell, guard=guard, published=mark_published,
            note=lambda message: console.note(message, run.log_file))
        if result is not None:
            if world.is_main:
                checkpoints.remove_all()  # a job that was killed before it did so
            yield Start(checkpoints, guard, pulse, result=result)
            checkpoints.close()
            return
        with_trajectory = setting["stage"] == "collect" and config.score.trajectory

        def refuse(found: Checkpoint) -> str:
            if found.about.get("data") != setting.get("data"):
                return "it was made from other images"
            return _lacks(run, found) if with_trajectory else ""

        resume = checkpoints.latest(refuse) if is_resumed else None
        with together(world):
            if world.is_main:
                _prepare(run, config, setting, world, resume, is_resumed, notes, tell)
                pulse.beat("starting")
        yield Start(checkpoints, guard, pulse, resume)
        checkpoints.close()
        pulse.beat("finished", eta_seconds=None)
        if world.is_main:
            console.note("finished", run.log_file)
    except (InputError, Preempted) as error:
        if world.is_main and checkpoints is not None:
            console.note(f"stopped: {error}", run.log_file)
            pulse.beat("stopped" if isinstance(error, Preempted) else "failed", message=str(error), eta_seconds=None)
        if isinstance(error, InputError) and checkpoints is not None and error.shared:  # all ranks are here: end what is saved
            with suppress(InputError):
                checkpoints.close()
        raise
    except BaseException as error:
        if checkpoints is not None:
            pulse.beat("failed", message=f"{type(error).__name__}: {error}", eta_seconds=None)
        raise
    finally:
        if world.is_main:
            lock.release()


def _acquire(lock: RunLock, longest_seconds: float) -> str | None:
    """Take the lock. A job that is started again may come before its predecessor has gone: its launcher says in
    TDDS_LOCK_WAIT_SECONDS how long that may take (at most `longest_seconds`: the other ranks wait in a collective)."""
    text = os.environ.get("TDDS_LOCK_WAIT_SECONDS", "")
    deadline = time.monotonic() + (min(float(text), longest_seconds) if text.isdecimal() else 0.0)
    while True:
        try:
            return lock.acquire(say=say)
        except InputError as error:
            if time.monotonic() >= deadline:
                raise
            say(f"waiting, because {error}")
        time.sleep(_LOOK_AGAIN_SECONDS)


def _look(run: RunDir, config: Config, setting: dict[str, Any], fresh: bool, force: bool,
          tell: Callable[[str], object]) -> tuple[dict[str, Any] | None, bool]:
    """(result of a finished run, whether there is an unfinished one)."""
    num_epochs = len(run.read_metrics())
    has_run = run.config_file.is_file() and run.env_file.is_file()
    leftovers = num_epochs > 0 or (run.trajectory / "meta.json").exists() or bool(published(run.checkpoints))
    if fresh:
        if (has_run or leftovers) and not force:
            finished = run.result_file.is_file()
            what = "a finished run" if finished else f"an unfinished run of {num_epochs} epochs"
            raise InputError(f"{run.path} already holds {what}; --fresh --force removes it and starts over"
                             + ("" if finished else ", without --fresh it goes on"))
        if has_run or leftovers:
            run.clear()
        return None, False
    if not has_run:
        if leftovers:
            raise InputError(f"{run.path} holds parts of a run, but not its config.yaml and env.json; restore them, choose "
                             "another run.name or run.dir, or start over with --fresh --force")
        return None, False
    check_settings(run, config, setting)
    if (result := run.read_result()) is not None:
        say(f"{run.path} is finished already; --fresh --force runs it again", None)
        return result, False
    if published(run.checkpoints):
        return None, True
    is_older = "checkpoint" not in run.read_config()  # of a version that made none
    if run.read_env().get("has_checkpoints") or (is_older and num_epochs):
        raise InputError(f"{run.path} holds {num_epochs} epochs of an unfinished run, and no checkpoint to go on from; restore "
                         "checkpoints/, or start over with --fresh --force")
    tell(f"{run.path} was stopped before its first checkpoint; it starts over")
    return None, False


def check_settings(run: RunDir, config: Config, setting: dict[str, Any]) -> None:
    """InputError when the run that is there was asked for something else; names the keys."""
    if changed := changed_settings(run, config, setting):
        may_change = MAY_CHANGE if setting["stage"] == "collect" else _OF_RETRAIN
        free_keys = ", ".join(f"{section}.*" if keys is None else ", ".join(f"{section}.{key}" for key in keys)
                              for section, keys in may_change.items())
        raise InputError(f"{run.path} holds a run of other settings ({'; '.join(changed)}); go on with those it was started "
                         f"with (only {free_keys} may change), choose another run.name or run.dir, or start over with --fresh "
                         "--force")
    env = run.read_env()
    if (was := env.get("data")) is not None and was != setting["data"]:
        other = ", ".join(f"data.{key}={getattr(config.data, key)}" for key in was if was[key] != setting["data"][key])
        raise InputError(f"{run.path} was started with other images than {other} holds now (the fingerprint of the content "
                         "differs); restore the file, or choose another run.name or run.dir")


def changed_settings(run: RunDir, config: Config, setting: dict[str, Any]) -> list[str]:
    """What the run that is there was asked for otherwise, in words; the content of the images is not looked at."""
    env, before = run.read_env(), to_dict(parse_config(run.read_config(), str(run.config_file)))
    may_change = MAY_CHANGE if setting["stage"] == "collect" else _OF_RETRAIN
    changed = [f"{key} was {env.get(key)!r}, now {setting.get(key)!r}" for key in _STAGE_KEYS
               if env.get(key) != setting.get(key)]
    for section, values in to_dict(config).items():
        free = may_change.get(section, ())
        for key, value in values.items():
            if free is None or key in free:
                continue
            old = before[section].get(key)
            if (section, key) == ("score", "windows"):  # which rates a window serves may change
                old, value = ([{**window, "pruning_rates": ()} for window in windows] for windows in (old, value))
            if (section, key) == ("score", "trajectory") and old and not value:
                continue  # may be given up, not taken up half-way
            if old != value:
                changed.append(f"{section}.{key} was {old!r}, now {value!r}")
    return changed


def _lacks(run: RunDir, found: Checkpoint) -> str:
    """What a checkpoint needs of the trajectory and does not find."""
    num_epochs, reason = whole_epochs(run.trajectory)
    if num_epochs >= found.record["epoch"]:
        return ""
    return (f"the trajectory is whole for {num_epochs} epochs only, not for its {found.record['epoch']} ({reason}); restore "
            "it, or go on without one by score.trajectory=false")


def _prepare(run: RunDir, config: Config, setting: dict[str, Any], world: World, resume: Checkpoint | None, is_resumed: bool,
             notes: list[str], tell: Callable[[str], object]) -> None:
    for folder in (run.path, run.models, run.scores):
        for left in folder.glob(".[a-z]*.tmp"):  # half-written by a job that was killed; who asks for the lock writes as well
            if not left.name.startswith(".run.lock"):
                left.unlink()
    if resume is None:
        shutil.rmtree(run.trajectory, ignore_errors=True)  # of a start that did not come to its first checkpoint
        run.rewind(0)
        run.start(to_dict(config), setting | ({"notes": notes[:]} if notes else {}), world.world_size, str(world.device))
        return
    epoch, step = resume.record["epoch"], resume.step
    was = resume.record["world_size"]
    if epoch >= config.train.epochs or resume.record.get("history", {}).get("stopped"):
        where = "after the last epoch"
    else:
        where = f"at epoch {epoch + 1}, step {step}"
    tell(f"resumes {where}" + (f", on {world.world_size} instead of {was} ranks" if was != world.world_size else ""))
    before = run.read_env()
    if epoch == 0:  # nothing recorded counts; also where it is damaged
        shutil.rmtree(run.trajectory, ignore_errors=True)
    now = environment(world.world_size, str(world.device))
    started = {key: now[key] for key in ("started", "command", "world_size", "device", "commit")}
    resumes = [*before.get("resumes", []), started | {"step": step, "epoch": epoch, "notes": notes[:]}]
    run.write_start(to_dict(config), before | {"resumes": resumes})
    run.rewind(epoch)
    if (best := resume.path / "best.pt").is_file():
        write_atomically(run.models / "best.pt", lambda file: file.write(best.read_bytes()))


def content_of(files: tuple[BetonInfo, BetonInfo]) -> dict[str, str]:
    """What the images of a run are, for `setting["data"]`."""
    return {key: content_sha256(file) for key, file in zip(("train", "val"), files, strict=True)}
