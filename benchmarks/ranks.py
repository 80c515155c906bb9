"""Runs a function on W ranks of this machine, each a process of its own, as torchrun would start
them."""

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, threads: int = 1
) -> list[Any]:
    """Return what `function(*arguments)` returns on each rank, by rank. The function joins the
    process group itself (`distributed.world.session`). Also with one rank it runs in a process of
    its own, so that memory peaks are its own.

    `function` must be importable, arguments and results must pickle. RuntimeError when a rank fails
    or dies.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: Any = context.Queue()
    ranks = [
        context.Process(
            target=_main, args=(rank, world_size, port, threads, function, arguments, results)
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            try:
                rank, value, error = results.get(timeout=1.0)
            except queue.Empty:
                if any(process.exitcode not in (None, 0) for process in ranks) and results.empty():
                    raise RuntimeError(
                        f"a rank of {function.__name__} died; see what it printed above"
                    ) from None
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank} of {function.__name__} failed:\n{error}")
            found[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=10.0)
            process.kill()
    return [found[rank] for rank in range(world_size)]


def _main(
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    # what the rank starts, and locks of progress bars, as in a program
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(threads)
    try:
        value, error = function(*arguments), None
    except BaseException:
        value, error = None, traceback.format_exc()
    results.put((rank, value, error))
    results.close()
    results.join_thread()
    os._exit(0 if error is None else 1)
