"""The entry of a stage into its run directory: alone, and new, resumed, or finished already.

Owns that decision: the lock, which checkpoint is used, what a crash left half done. `identity` says
which settings may change, `engine` restores the state itself.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tdds_dist.config.run import Config, to_dict
from tdds_dist.console import LogFile, attached, log
from tdds_dist.distributed import collectives
from tdds_dist.distributed.collectives import together
from tdds_dist.distributed.interruption import Preempted
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import write_atomically
from tdds_dist.runs.checkpoint import Checkpoint, Checkpoints
from tdds_dist.runs.directory import RunDir, complete_steps, environment, move_aside
from tdds_dist.runs.identity import changeable_keys, differences
from tdds_dist.runs.lock import RunLock
from tdds_dist.runs.status import Pulse

_LOOK_AGAIN_SECONDS = 5.0
_PATIENCE = 0.8  # of the time-out of a collective


@dataclass(frozen=True)
class Start:
    """The state in which a stage found its run: `result` when it is finished, `resume` when it goes
    on, neither when it is new.
    """

    checkpoints: Checkpoints
    # raises InputError when the directory is not ours any more; for the main rank, before it writes
    guard: Callable[[], None]
    pulse: Pulse
    # writes the result of the stage, and removes its checkpoints; a collective
    finish: Callable[[dict[str, Any]], None]
    resume: Checkpoint | None = None
    result: dict[str, Any] | None = None


@contextmanager
def entered(
    run: RunDir,
    config: Config,
    setting: dict[str, Any],
    world: World,
    *,
    fresh: bool = False,
    force: bool = False,
    refuse: Callable[[Checkpoint], str] = lambda found: "",
) -> Iterator[Start]:
    """Hold a run directory for one stage. `config` is the resolved one, `setting` what else decides
    the result.

    `refuse` says why training cannot go on from a checkpoint, beyond what is checked here; empty
    when it can. `fresh` starts over; with `force` also where there is a run, which is moved aside.
    All ranks enter and leave; rank 0 does the work.

    Raises:
        InputError: in use, of other settings or data, no usable checkpoint, not writable; on every
        rank.
    """
    if force and not fresh:
        raise InputError(
            "--force belongs to --fresh: it moves the run that is there aside; give both, or"
            " neither",
            shared=True,
        )
    if fresh and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        fresh = force = False  # said to the first start: this one is to go on
    lock = RunLock(run.path)
    pulse = Pulse(run.status_file, setting["stage"], world.world_size, world.is_main)
    log_file = LogFile(run.log_file)
    checkpoints = None

    def mark_complete() -> None:
        """Record that the run has had a checkpoint: it then never starts over because none is left
        (`why_not`)."""
        if not (env := run.read_env()).get("has_checkpoints"):
            run.write_env(env | {"has_checkpoints": True})

    def guard() -> None:
        if lock.lost:
            raise InputError(
                f"{run.path} was taken over by another job while this one did not run; it may not"
                " write there any more"
            )

    def finish(outcome: dict[str, Any]) -> None:
        assert checkpoints is not None
        checkpoints.finish()
        with together(world):
            if world.is_main:
                guard()
                run.write_result(outcome)
                checkpoints.remove_all()

    held = ExitStack()
    try:
        with together(world):
            result, is_resumed = None, False
            if world.is_main:
                held.callback(lock.release)
                message = _acquire(lock, _PATIENCE * config.run.timeout_seconds)
                held.enter_context(attached(log_file))
                if message:
                    log.info(message)
                result, is_resumed = _look(run, config, setting, fresh, force)
        result, is_resumed = collectives.gather_objects((result, is_resumed), world)[0]
        keeping = config.checkpoint
        checkpoints = Checkpoints(
            run.checkpoints,
            world,
            keep=keeping.keep,
            asynchronous=keeping.asynchronous,
            stop_on_error=keeping.on_error == "stop",
            timeout_seconds=config.run.timeout_seconds,
            about={"config": to_dict(config), "data": setting.get("data")},
            guard=guard,
            on_complete=mark_complete,
        )
        if result is not None:
            if world.is_main:
                log.removeHandler(log_file)  # nothing happens to a finished run
                log.info(
                    f"{run.path} is finished already; --fresh --force moves it aside and runs it"
                    " again"
                )
                checkpoints.remove_all()  # a job that was killed before it did so
            yield Start(checkpoints, guard, pulse, finish, result=result)
            checkpoints.close()
            return

        def why_refused(found: Checkpoint) -> str:
            if found.about.get("data") != setting.get("data"):
                return "it was made from other images"
            return refuse(found)

        resume = checkpoints.latest(why_refused) if is_resumed else None
        with together(world):
            if world.is_main:
                _prepare(run, config, setting, world, resume, log_file.lines)
                pulse.beat("starting")
        yield Start(checkpoints, guard, pulse, finish, resume)
        checkpoints.close()
        pulse.beat("finished", eta_seconds=None)
        log.debug("finished")
    except (InputError, Preempted) as error:
        if world.is_main and checkpoints is not None:
            log.debug(f"stopped: {error}")
            pulse.beat(
                "stopped" if isinstance(error, Preempted) else "failed",
                message=str(error),
                eta_seconds=None,
            )
        # all ranks are here: end what is saved
        if isinstance(error, InputError) and checkpoints is not None and error.shared:
            with suppress(InputError):
                checkpoints.close()
        raise
    except BaseException as error:
        if checkpoints is not None:
            pulse.beat("failed", message=f"{type(error).__name__}: {error}", eta_seconds=None)
        raise
    finally:
        held.close()


def _acquire(lock: RunLock, longest_seconds: float) -> str | None:
    """Take the lock. A job that is started again may come before the one that it replaces has
    ended: its launcher says in TDDS_LOCK_WAIT_SECONDS how long that may take (at most
    `longest_seconds`: the other ranks wait in a collective)."""
    text = os.environ.get("TDDS_LOCK_WAIT_SECONDS", "")
    deadline = time.monotonic() + (min(float(text), longest_seconds) if text.isdecimal() else 0.0)
    while True:
        try:
            return lock.acquire()
        except InputError as error:
            if time.monotonic() >= deadline:
                raise
            log.info(f"waiting, because {error}")
        time.sleep(_LOOK_AGAIN_SECONDS)


def _look(
    run: RunDir, config: Config, setting: dict[str, Any], fresh: bool, force: bool
) -> tuple[dict[str, Any] | None, bool]:
    """Return (the result of a finished run, whether there is an unfinished one)."""
    if fresh:
        if _has_run(run) or _has_parts(run):
            finished = run.result_file.is_file()
            if not force:
                what = (
                    "a finished run"
                    if finished
                    else f"an unfinished run of {len(run.read_metrics())} epochs"
                )
                raise InputError(
                    f"{run.path} already holds {what}; --fresh --force moves it aside and starts"
                    " over" + ("" if finished else ", without --fresh it goes on")
                )
            aside = run.set_aside()
            log.info(f"starts over; the run that was there is moved aside to {aside}")
        return None, False
    if problem := why_not(run, config, setting, "run.name or run.dir"):
        raise InputError(
            f"{problem[0]}; {problem[1]}, or start over with --fresh --force, which moves it aside"
        )
    if not _has_run(run):
        return None, False
    if (result := run.read_result()) is not None:
        return result, False
    if complete_steps(run.checkpoints):
        return None, True
    log.info(f"{run.path} was stopped before its first checkpoint; it starts over")
    return None, False


def _has_run(run: RunDir) -> bool:
    return run.config_file.is_file() and run.env_file.is_file()


def _has_parts(run: RunDir) -> bool:
    return (
        bool(run.read_metrics())
        or (run.trajectory / "meta.json").exists()
        or bool(complete_steps(run.checkpoints))
    )


def why_not(
    run: RunDir, config: Config, setting: dict[str, Any], elsewhere: str
) -> tuple[str, str] | None:
    """Say why what is in a directory neither is, nor can become, the result that is asked for, and
    a way out; None if it can.

    `elsewhere` are the keys by which another directory is chosen.
    """
    holds, another = f"{run.path} holds", f"choose another {elsewhere}"
    if not _has_run(run):
        what = f"{holds} parts of a run, but not its config.yaml and env.json"
        return (what, f"restore them, {another}") if _has_parts(run) else None
    try:
        changed = differences(run, config, setting)
    except InputError as error:
        return f"{holds} a run whose config cannot be read ({error})", f"restore it, {another}"
    if changed:
        may_change = f"(only {changeable_keys(setting['stage'])} may change)"
        way_out = f"go on with those it was started with {may_change}, {another}"
        return f"{run.path} holds a run of other settings ({'; '.join(changed)})", way_out
    if run.result_file.is_file() or complete_steps(run.checkpoints):
        return None
    if run.read_env().get("has_checkpoints"):
        num = len(run.read_metrics())
        what = f"{holds} {num} epochs of an unfinished run, and no checkpoint to go on from"
        return what, "restore checkpoints/"
    return None


def _prepare(
    run: RunDir,
    config: Config,
    setting: dict[str, Any],
    world: World,
    resume: Checkpoint | None,
    notes: list[str],
) -> None:
    for folder in (run.path, run.models, run.scores):
        # half-written by a job that was killed; who asks for the lock writes as well
        for left in folder.glob(".[a-z]*.tmp"):
            if not left.name.startswith(".run.lock"):
                left.unlink()
    if resume is None:
        if run.read_metrics():  # epochs of a start that did not come to its first checkpoint
            aside = move_aside(
                run.metrics_file,
                run.val_classes_file,
                run.trajectory,
                run.pruning,
                run.models,
                run.tensorboard,
            )
            log.info(f"the epochs that it had recorded are moved aside to {aside}")
        for folder in (run.trajectory, run.pruning):
            shutil.rmtree(folder, ignore_errors=True)
        run.rewind(0)
        run.start(
            to_dict(config),
            setting | ({"notes": notes[:]} if notes else {}),
            world.world_size,
            str(world.device),
        )
        return
    epoch, step = resume.record["epoch"], resume.step
    was = resume.record["world_size"]
    if epoch >= config.train.epochs or resume.record.get("history", {}).get("stopped"):
        where = "after the last epoch"
    else:
        where = f"at epoch {epoch + 1}, step {step}"
    log.info(
        f"resumes {where}"
        + (f", on {world.world_size} instead of {was} ranks" if was != world.world_size else "")
    )
    before = run.read_env()
    if epoch == 0:  # nothing recorded counts; also where it is damaged
        shutil.rmtree(run.trajectory, ignore_errors=True)
    now = environment(world.world_size, str(world.device))
    started = {key: now[key] for key in ("started", "command", "world_size", "device", "commit")}
    resumes = [
        *before.get("resumes", []),
        started | {"step": step, "epoch": epoch, "notes": notes[:]},
    ]
    run.write_start(to_dict(config), before | {"resumes": resumes})
    run.rewind(epoch)
    if (best := resume.path / "best.pt").is_file():
        write_atomically(run.models / "best.pt", lambda file: file.write(best.read_bytes()))
