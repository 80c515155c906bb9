"""`tdds` on several ranks as a job that can be killed: real processes, signals and exit codes.

Ranks are forked from a server that has torch and FFCV loaded. `inject` runs in every rank before
the program and may hurt it there: what it wraps is real, what it adds is the fault.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ranks import forkserver

Inject = Callable[[int], None]
EVERYBODY = tuple(range(16))
# a program: the commands in its first argument, a line each, with the options of the others
IN_TURN = """
import shlex, sys
from tdds_dist.__main__ import main
for line in sys.argv[1].strip().splitlines():
    assert main([*shlex.split(line), *sys.argv[2:]]) == 0, line
"""


class Job:
    """Ranks of one `tdds` command, started at once; their output goes to `<folder>/rank<r>.txt`,
    what they train on to `<folder>/steps<r>.txt`."""

    def __init__(
        self,
        arguments: Sequence[object],
        world_size: int,
        folder: Path,
        inject: Inject | None = None,
        port: int | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.world_size = folder, world_size
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(world_size)]
        for path in [*self.outputs, *folder.glob("steps*.txt")]:
            path.unlink(missing_ok=True)
        words = [str(word) for word in arguments]
        port = port or free_port()
        self.started = time.monotonic()
        self.processes = [
            forkserver.Process(
                target=_main, args=(words, rank, world_size, port, str(folder), inject)
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, deadline: float = 90.0) -> list[int]:
        """Exit codes by rank (negative: the signal that ended it); everything is killed at the
        deadline."""
        end = time.monotonic() + deadline
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.processes[rank].kill()
            self.processes[rank].join()
        assert not late, f"ranks {late} still ran after {deadline} s:\n{self.text}"
        return [process.exitcode for process in self.processes]

    def until(self, text: str, deadline: float = 60.0) -> None:
        """Wait until a rank has printed it."""
        end = time.monotonic() + deadline
        while text not in self.text:
            assert time.monotonic() < end, (text, self.text)
            assert any(process.is_alive() for process in self.processes), (text, self.text)
            time.sleep(0.02)

    @property
    def text(self) -> str:
        """What all ranks have printed so far."""
        return "".join(output.read_text() for output in self.outputs if output.exists())

    def steps(self, rank: int = 0) -> dict[int, tuple[float, list[int]]]:
        """Optimizer steps that a rank has done here: seconds after the start, and the global
        indices that it saw."""
        path = self.folder / f"steps{rank}.txt"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return {
            int(step): (float(when) - self.started, [int(word) for word in seen.split(",")])
            for step, when, seen in lines
        }

    def visits(self) -> dict[int, list[int]]:
        """Global indices of each step, in the order of the epoch: row g of a step belongs to rank g
        mod W."""
        by_rank = [self.steps(rank) for rank in range(self.world_size)]
        return {
            step: [
                index
                for row in zip(*(seen[step][1] for seen in by_rank), strict=True)
                for index in row
            ]
            for step in by_rank[0]
        }


def run(
    arguments: Sequence[object],
    world_size: int,
    folder: Path,
    inject: Inject | None = None,
    deadline: float = 90.0,
) -> tuple[list[int], str]:
    """Exit codes and output of a job from start to end."""
    job = Job(arguments, world_size, folder, inject)
    return job.wait(deadline), job.text


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _main(
    words: list[str], rank: int, world_size: int, port: int, folder: str, inject: Inject | None
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    descriptor = os.open(
        Path(folder) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (
        open(1, "w", buffering=1, closefd=False),  # noqa: SIM115
        open(2, "w", buffering=1, closefd=False),  # noqa: SIM115
    )
    begin(words, rank, Path(folder), inject)


def begin(words: Sequence[str], rank: int, folder: Path, inject: Inject | None = None) -> None:
    """Be a rank of `tdds` in this process, whose environment describes the process group. Does not
    return."""
    sys.argv = ["tdds", *words]
    from tdds_dist.cli import main
    from tdds_dist.training import engine

    # threads change the order of sums, and ranks share few cores
    engine.torch_threads = lambda ranks_per_cpu: 1
    _log_steps(folder / f"steps{rank}.txt")
    if inject is not None:
        inject(rank)
    main.run()


def _log_steps(path: Path) -> None:
    from tdds_dist.training.engine import Trainer

    forward_backward, update, seen = Trainer._forward_backward, Trainer._update, []

    def look(trainer: Any, batch: Any, *arguments: Any) -> None:
        seen.extend(batch.index.tolist())
        forward_backward(trainer, batch, *arguments)

    def count(trainer: Any) -> float:
        lr = update(trainer)
        with path.open("a") as file:
            file.write(f"{trainer.step} {time.monotonic()} {','.join(map(str, seen))}\n")
        seen.clear()
        return lr

    Trainer._forward_backward, Trainer._update = look, count


# ---- faults


class _Later:
    """A call that still waits for its first arguments. Unlike a closure it can be sent to another
    process."""

    def __init__(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]):
        self.name, self.arguments, self.options = name, arguments, options

    def __call__(self, *first: Any) -> Any:
        return globals()[self.name].__wrapped__(*first, *self.arguments, **self.options)


def later(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `f(2, 3)` an action that calls `f(2, 3)` when it is called; of `f(rank, 2, 3)` an
    inject."""

    @wraps(function)
    def wait(*arguments: Any, **options: Any) -> _Later:
        return _Later(function.__name__, arguments, options)

    return wait


@later
def all_of(rank: int, *injects: Inject | None) -> None:
    """Several of them, one after the other."""
    for inject in injects:
        if inject is not None:
            inject(rank)


@later
def clock_ahead(rank: int, seconds: float, ranks: Sequence[int]) -> None:
    """Let the wall clock of these ranks be ahead."""
    if rank in ranks:
        own = time.time
        time.time = lambda: own() + seconds


@later
def at_step(
    rank: int, step: int, action: Callable[[], object], ranks: Sequence[int] = EVERYBODY
) -> None:
    """Act just before optimizer step `step` (the first is 1) of this run, counted over restarts."""
    from tdds_dist.training.engine import Trainer

    update = Trainer._update

    def hurt(trainer: Any) -> float:
        if rank in ranks and trainer.step + 1 == step:
            action()
        return update(trainer)

    Trainer._update = hurt


@later
def at_call(
    rank: int,
    target: str,
    call: int,
    action: Callable[[], object],
    ranks: Sequence[int] = EVERYBODY,
    *,
    after: bool = False,
) -> None:
    """Act just before, or `after`, the call of this number (from 1) of
    `package.module:Class.method` in this process."""
    module, _, name = target.partition(":")
    *owners, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function, count = getattr(owner, last), itertools.count(1)

    def hurt(*arguments: Any, **options: Any) -> Any:
        is_now = rank in ranks and next(count) == call
        if is_now and not after:
            action()
        value = function(*arguments, **options)
        if is_now and after:
            action()
        return value

    setattr(owner, last, hurt)


def quick(rank: int) -> None:
    """Lost ranks are counted sooner than after 10 s, no rank waits for a launcher to end it, and
    evaluation makes epochs 1 to 3 the best so far (the network learns too little in these tests)."""
    from tdds_dist.cli import main
    from tdds_dist.distributed import world as distributed
    from tdds_dist.training.engine import Trainer

    distributed._ROLL_CALL_SECONDS, main._MAIN_SPEAKS_SECONDS = 2.0, 0.0
    evaluate = Trainer.evaluate

    def rise(trainer: Any, epoch: int) -> tuple[dict[str, float], Any]:
        record, classes = evaluate(trainer, epoch)
        return record | {"val_top1": 10.0 + epoch if epoch < 3 else 0.0}, classes

    Trainer.evaluate = rise


@later
def in_turn(*actions: Callable[[], object]) -> None:
    for action in actions:
        action()


@later
def pause(seconds: float) -> None:
    time.sleep(seconds)


@later
def signal_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


@later
def nap(flag: Path, seconds: float) -> None:
    """Say in a file that the rank sleeps now, and sleep until the file is gone, but no longer than
    so many seconds."""
    flag.touch()
    end = time.monotonic() + seconds
    while flag.exists() and time.monotonic() < end:
        time.sleep(0.02)


@later
def fail(error: BaseException) -> None:
    raise error


@later
def torn(rank: int, target: str, call: int, ranks: Sequence[int] = EVERYBODY) -> None:
    """Killed in a function that writes to a file object, `f(file, ...)` or `f(..., file)`: some
    bytes are there already."""
    module, _, name = target.partition(":")
    owner = importlib.import_module(module)
    function, count = getattr(owner, name), itertools.count(1)

    def hurt(*arguments: Any, **options: Any) -> Any:
        if rank in ranks and next(count) == call:
            file = next(argument for argument in arguments if hasattr(argument, "write"))
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, hurt)


@later
def nan_logits(rank: int, step: int, indices: Sequence[int]) -> None:
    """The network gives NaN for these samples in one optimizer step (in whose batch they must
    be)."""
    from tdds_dist.training.engine import Trainer

    forward_backward = Trainer._forward_backward

    def hurt(trainer: Any, batch: Any, *arguments: Any) -> None:
        if trainer.step + 1 != step:
            return forward_backward(trainer, batch, *arguments)
        bad_B = torch.isin(batch.index, torch.tensor(indices))
        hook = trainer.model.register_forward_hook(
            lambda _, __, out_BC: torch.where(bad_B[:, None], torch.nan, out_BC)
        )
        try:
            return forward_backward(trainer, batch, *arguments)
        finally:
            hook.remove()

    Trainer._forward_backward = hurt


@later
def limit_file_size(num_bytes: int) -> None:
    """Larger files cannot be written from now on, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@later
def fill_disk(folder: Path) -> None:
    """Fill the file system of a folder, by a file `filler` in it."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass


@later
def program(rank: int, function: Callable[[int], None]) -> None:
    """Instead of a stage, run a function inside `cli.run`."""
    from tdds_dist.cli import main

    main.parse = lambda arguments, extra_commands: argparse.Namespace(
        stage="tiny", run=lambda options: function(rank)
    )


# ---- programs that do nothing but leave, for `program`


def returns(rank: int) -> None:
    with _session():
        pass


def refuses(rank: int) -> None:
    from tdds_dist.distributed.collectives import together
    from tdds_dist.errors import InputError

    with _session() as world, together(world):
        if rank == 1:
            raise InputError("found on one rank")


def leaves(rank: int) -> None:
    from tdds_dist.distributed.interruption import Preempted

    with _session():
        raise Preempted("SIGTERM: saved", agreed=True)


def fails(rank: int, error: type[BaseException] = ZeroDivisionError) -> None:
    from tdds_dist.distributed.collectives import barrier

    with _session():
        barrier()  # a rank that leaves while others still join is one that did not come
        raise error


def is_interrupted(rank: int) -> None:
    fails(rank, KeyboardInterrupt)


def _session() -> Any:
    from tdds_dist.distributed.world import session

    return session("cpu", 30.0)


# ---- what came out


def state_of(run: Path) -> dict[str, np.ndarray]:
    """Everything that must not depend on interruptions: weights, scores, recorded scalars."""
    from tdds_dist.scoring.trajectory import Trajectory

    state = {
        f"{kind}/{name}": value.numpy()
        for kind in ("final", "best")
        for name, value in torch.load(run / "models" / f"{kind}.pt", weights_only=True).items()
    }
    for path in sorted((run / "scores").glob("*.npz")):
        with np.load(path) as file:
            state |= {f"{path.stem}/{name}": file[name] for name in ("score", "label")}
    if (run / "trajectory").is_dir():
        trajectory = Trajectory(run / "trajectory")
        trajectory.verify()
        state |= {f"trajectory/{name}": trajectory.read(name) for name in trajectory.scalars}
    return state


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Names of what is not bitwise the same."""
    return [
        name
        for name in sorted({*a, *b})
        if name not in a or name not in b or a[name].tobytes() != b[name].tobytes()
    ]
