"""Run a function on several ranks with gloo, each in its own process, under a deadline.

Processes are forked from a server that has loaded what they need (a fresh interpreter per rank would
import it each time). There is one server for a session, also for `tests.jobs`.
"""

import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist

# many ranks share few cores here
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
# to parametrize with
WORLDS = [1, 3, *(pytest.param(world_size, marks=pytest.mark.slow) for world_size in (2, 4))]
NOT_MET = 111  # exit code of a rank that found no process group
forkserver = multiprocessing.get_context("forkserver")
# also what torch loads late: for the first optimizer, the first sharded tensor, the first event file
forkserver.set_forkserver_preload(
    "tdds_dist.cli.main tdds_dist.training.collect tdds_dist.training.retrain torch._dynamo torch.distributed.tensor torch.utils.tensorboard tests.preloaded".split()
)


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, deadline: float = 120.0
) -> list[Any]:
    """Return the results of `function(rank, *arguments)` by rank; AssertionError when a rank
    raises, dies or hangs."""
    results: Any = forkserver.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(world_size, folder, function, arguments, results)
        by_rank: dict[int, Any] = {}
        end = time.monotonic() + deadline
        try:
            while len(by_rank) < world_size:
                try:
                    rank, kind, value = results.get(timeout=0.5)
                except queue.Empty:
                    dead = [
                        rank
                        for rank, process in enumerate(processes)
                        if not process.is_alive() and rank not in by_rank
                    ]
                    if time.monotonic() > end or (dead and results.empty()):
                        raise AssertionError(
                            f"ranks {dead or 'all'} died or hung for {deadline} s"
                        ) from None
                    continue
                assert kind == "done", f"rank {rank} failed:\n{value}"
                by_rank[rank] = value
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
    return [by_rank[rank] for rank in range(world_size)]


def exit_codes(
    world_size: int, function: Callable[..., Any], *arguments: Any, patience: float = 5.0
) -> list[int | None]:
    """Exit codes by rank of `function(rank, *arguments)`, which may kill its process: 0 it
    returned, 1 it raised.

    When one rank has ended badly, the others get `patience` seconds before they are killed. Ranks
    that do not even meet (gloo loses a connection now and then on a busy machine) are started
    again.
    """
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            processes = _start(world_size, folder, function, arguments, None)
            end = time.monotonic() + 120.0
            is_over = False
            while any(process.is_alive() for process in processes) and time.monotonic() < end:
                if not is_over and any(process.exitcode for process in processes):
                    is_over, end = True, time.monotonic() + patience
                time.sleep(0.01)
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        if NOT_MET not in codes:
            break
    return codes


def catch(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, str]:
    """Name and text of the exception that a call raises, or ("", "")."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _start(
    world_size: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> list[BaseProcess]:
    processes = [
        forkserver.Process(
            target=_main,
            args=(rank, world_size, f"{folder}/store", function, arguments, results),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _main(
    rank: int,
    world_size: int,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    """Join the group, call the function, and put (rank, "done" or "crash", result or traceback)
    where results are wanted."""
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    code = NOT_MET
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        code = 1
        value = function(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        outcome, code = (rank, "done", value), 0
    except BaseException:
        outcome = (rank, "crash", traceback.format_exc())
        if results is None:
            print(outcome[2], file=sys.stderr)
    if results is not None:
        results.put(outcome)
        results.close()
        results.join_thread()
    os._exit(code)
