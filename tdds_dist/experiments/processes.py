"""Several runs at a time on one machine: processes of their own, each with its share of the CPUs
and GPUs.

Knows nothing of what it runs. Processes are spawned (threads and CUDA do not survive a fork) and
end with their parent, however that ends.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tdds_dist.errors import InputError

PR_SET_PDEATHSIG = 1  # of Linux's prctl
# a worker is a world of one
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_processes(
    items: Sequence[Item], work: Callable[[Item], Result], jobs: int
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield every item with what `work` gave, or raised, for it; as they end, `jobs` at a time.
    Items and `work` must pickle.

    A process has the same share of the machine however few items there are, so that results do not
    depend on how many others were left to do. Leaving the iteration early kills what runs.

    Raises:
        InputError: a process was killed; what had ended before stays.
    """
    context = multiprocessing.get_context("spawn")
    # Python's resource tracker warns of semaphores that a program leaves behind without teardown
    # (`run` in `cli.main`).
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    with ProcessPoolExecutor(
        min(jobs, len(items)), context, _start, (context.Value("i", 0), jobs)
    ) as pool:
        try:
            futures = {pool.submit(work, item): item for item in items}
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                assert error is None or isinstance(error, Exception)
                yield futures[future], future.result() if error is None else error
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed (too little memory is the usual reason); use fewer"
                " --jobs, and run the same command again: what is done stays done"
            ) from error
        # Ctrl-C and the like: without this the pool would first finish everything
        except BaseException:
            for process in list(pool._processes.values()):
                process.kill()
            raise


def _start(counter: Any, jobs: int) -> None:
    """Give this process its share of CPUs and GPUs, and let it end with its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it ended while this process was starting
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    cpus = sorted(os.sched_getaffinity(0))
    share = max(1, len(cpus) // jobs)  # of equal size: what is left over stays idle
    first = number * share % (len(cpus) // share * share)
    os.sched_setaffinity(0, cpus[first : first + share])
    gpus = [
        gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu
    ] or _all_gpus()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    for name in _LAUNCHER_VARIABLES:
        os.environ.pop(name, None)


def _all_gpus() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]  # does not initialise CUDA
