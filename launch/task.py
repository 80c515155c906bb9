"""What a job runs on each of its ranks: one stage, through the same command line that a person uses.

It is pickled at submission and unpickled on the nodes, so it holds the arguments and nothing else.
"""

import atexit
import os
import sys
from collections.abc import Sequence


class StageFailedError(RuntimeError):
    """A stage left with a code other than 0; its own message stands in the rank's standard error."""


class StageTask:
    """Runs `tdds` with these arguments as one rank of a job."""

    def __init__(self, arguments: Sequence[str]):
        self.arguments = list(arguments)

    def __call__(self) -> None:
        """Describe this rank in the env:// variables, then run the stage.

        Raises:
            StageFailedError: the stage found bad input. Anything else that it raises passes through.
        """
        from submitit.helpers import TorchDistributedEnvironment

        # A rank finds its GPU by LOCAL_RANK among all of the node, hence no narrowing; and the scheduler knows better
        # than variables that came along from the shell which submitted the job.
        ranks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if ranks.local_world_size == ranks.world_size:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # one node needs no name service
        from tdds_dist.cli import main
        from tdds_dist.preemption import EXIT_RESUME

        code = main(self.arguments)
        if code == EXIT_RESUME:
            raise StageFailedError(f"tdds {self.arguments[0]} was asked to leave and has saved its state; submit it again, and "
                                   "it goes on")
        if code != 0:
            raise StageFailedError(f"tdds {self.arguments[0]} left with code {code}")
        # After the result is written: no interpreter teardown, for the reason that stands in `tdds_dist.cli.run`.
        atexit.register(_leave)

    def checkpoint(self) -> None:
        """Asked by submitit when the job is about to be ended. None, so that it is not queued again.

        The stage saves its state and leaves by itself; it goes on when it is submitted again.
        """


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
