"""The work of a job on each of its ranks: its commands, through the command line that a
person uses.

It is pickled at submission and unpickled on the nodes, also after a requeue: it holds what to do
and nothing of how far that is. State is on disk, found by the command itself.

How a rank leaves. Done: by returning. Asked to leave (exit code 75): all ranks have saved at the
same step; then rank 0 hands over to submitit, whose handler has waited below ours, by sending
itself the signal that it waits for. That queues the job again if there is a time limit or a
preemption behind it; `scancel`, which sends SIGTERM alone, stays a cancellation. Anything else: a
line in the job's end file says why, for `requeue`, `tdds status` and people, and the exit
code is the command's.
"""

import atexit
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .records import EndRecord, append_end
from .rendezvous import interface_to, is_free, rendezvous_port

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

    from tdds_dist.distributed.interruption import Interruption

# that a job may still hold its run directory after the scheduler has started it elsewhere
PREDECESSOR_SECONDS = 180
_EARLIER_SECONDS = 10.0  # than the scheduler's signal a run looks at its time limit itself
_SECOND_SIGNAL_SECONDS = 5.0  # preemption is SIGTERM and then the signal of submitit
_FAILED, _BAD_INPUT, _LOST = 1, 2, 1


class StageTask:
    """Runs `tdds` with each of these lists of arguments in turn, as one rank of a job."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        log_dir: Path,
        *,
        time_minutes: int,
        grace_seconds: int,
        cpus_per_rank: int = 0,
        interface: str | None = None,
    ):
        self.commands = [list(command) for command in commands]
        self.log_dir = str(log_dir)
        self.time_minutes, self.grace_seconds = time_minutes, grace_seconds
        self.cpus_per_rank = cpus_per_rank  # 0: the machine's are shared
        self.interface = interface

    def __call__(self) -> None:
        """Describe this rank in the env:// variables, then run the commands. Return only when all
        are done."""
        self._describe_rank()
        if self.rank != 0:
            # submitit ignores it until training listens; a rank that does not queue the job again
            # need not outlive the others.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from tdds_dist.cli.main import outcome
        from tdds_dist.distributed.interruption import EXIT_RESUME, Interruption
        from tdds_dist.runs.lock import IN_USE

        for command in self.commands:
            interruption = Interruption()
            try:
                code, message = outcome(command, interruption)
            except SystemExit as leaving:
                if leaving.code != _BAD_INPUT:
                    raise  # submitit's handler, which has queued the job again
                code = _BAD_INPUT  # argparse
                message = f"tdds {command[0]}: error: bad arguments {command[1:]}; see the log"
            except Exception as error:
                traceback.print_exc()
                message = f"{type(error).__name__}: {error}"
                self._leave(_FAILED, "failed", message, traceback.format_exc())
            if message:
                print(message, file=sys.stderr, flush=True)
            if code == EXIT_RESUME:
                self._hand_over(interruption, message)
            if code:
                # An earlier start that still holds the run, on a node that is cut off and not dead,
                # will end at some time.
                kind = {_BAD_INPUT: "refused", _LOST: "lost"}.get(code, "failed")
                self._leave(code, "lost" if IN_USE in message else kind, message)
        # After the result is written: no interpreter teardown, for the reason that stands in
        # `tdds_dist.cli.main.run`.
        atexit.register(_exit, 0)

    def checkpoint(self) -> "DelayedSubmission":
        """Return the same task when the job is to be queued again. submitit calls it in a signal
        handler: no collective in here."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)

    # ---- coming

    def _describe_rank(self) -> None:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job = JobEnvironment()
        self.job_id, self.rank, self.is_slurm = job.job_id, job.global_rank, job.cluster == "slurm"
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0")) if self.is_slurm else 0
        port = rendezvous_port(int(job.raw_job_id), self.restart)
        os.environ["MASTER_PORT"] = str(port)
        # A rank finds its GPU by LOCAL_RANK among all of the node, hence no narrowing; and the
        # scheduler knows better than variables that came along from the shell which submitted the
        # job.
        ranks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if ranks.local_world_size == ranks.world_size:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # one node needs no name service
        os.environ |= {
            "TDDS_JOB": self.job_id,
            "TDDS_LOCK_WAIT_SECONDS": str(PREDECESSOR_SECONDS),
            "TDDS_LEAVE_AT": str(self._leave_at()),
        }
        os.environ.pop("TDDS_CPUS_PER_RANK", None)
        if self.cpus_per_rank:
            os.environ["TDDS_CPUS_PER_RANK"] = str(self.cpus_per_rank)
        # the first node knows itself by another address than others know it by
        if ranks.world_size > 1:
            hosts = job.hostnames
            self._choose_interface(
                hosts[-1] if job.node == 0 and len(hosts) > 1 else os.environ["MASTER_ADDR"]
            )
        if self.rank == 0:
            # submitit fails on files that a kill left behind, and a rank that was done when others
            # were lost is run again.
            for pattern in (f"{self.job_id}_*.save_tmp", f"{self.job_id}_*_result.pkl"):
                for left in Path(self.log_dir).glob(pattern):
                    left.unlink(missing_ok=True)
            if ranks.world_size > 1 and not is_free(port):
                message = (
                    f"port {port} of this host, where the ranks were to meet, is in use; the next"
                    " start takes another"
                )
                print(f"tdds: error: {message}", file=sys.stderr, flush=True)
                self._leave(_LOST, "lost", message)

    def _leave_at(self) -> float:
        # a local job may be started inside of another
        told = os.environ.get("TDDS_JOB_STARTED") if self.is_slurm else None
        started = float(told or time.time())
        return started + 60 * self.time_minutes - self.grace_seconds - _EARLIER_SECONDS

    def _choose_interface(self, peer: str) -> None:
        found = self.interface or interface_to(peer)
        if found:
            # without the sign NCCL takes every interface whose name begins like that
            told = {"GLOO_SOCKET_IFNAME": found, "NCCL_SOCKET_IFNAME": f"={found}"}
            for variable, value in told.items():
                if self.interface or variable not in os.environ:
                    os.environ[variable] = value

    # ---- leaving

    def _hand_over(self, interruption: "Interruption", message: str) -> NoReturn:
        """Hand over to submitit. All ranks are here, or leave on their own; the state is on
        disk."""
        from submitit.core.utils import UncompletedJobError

        from tdds_dist.distributed.interruption import EXIT_RESUME, NOT_SAVED, TIME_LIMIT

        if self.rank != 0:
            _exit(0)  # another code would let srun end rank 0 before it has queued the job again
        reasons = [*interruption.received, message]  # the message has what another rank was told
        # Of SIGTERM alone. Where all have saved somebody asked for that. A single rank may have it
        # from srun, because of another rank that died; had it come from scancel, the batch shell
        # would be gone too, and nobody reads this.
        code, kind = EXIT_RESUME, "lost" if NOT_SAVED in message else "resume"
        try:
            if any(reason in text for reason in ("SIGUSR2", TIME_LIMIT) for text in reasons):
                signal.raise_signal(signal.SIGUSR2)  # submitit's handler leaves by SystemExit
            time.sleep(_SECOND_SIGNAL_SECONDS)  # it takes over as well should its signal come now
        except SystemExit as leaving:  # queued again
            code = leaving.code if isinstance(leaving.code, int) else EXIT_RESUME
            kind = "requeued"
        except UncompletedJobError as error:  # too many time limits
            kind = "resume"
            message += f"; not queued again ({' '.join(str(error).split())})"
        # no scontrol in this container, or it failed: `requeue` asks for it from outside
        except Exception as error:
            kind = "requeue"
            message += f"; to be queued again from outside ({' '.join(str(error).split())})"
        self._leave(code, kind, message)

    def _leave(self, code: int, kind: str, message: str, trace: str = "") -> NoReturn:
        if message:
            host = socket.gethostname()
            end = EndRecord(kind, self.rank, time.time(), self.restart, host, message, trace)
            try:
                append_end(Path(self.log_dir), self.job_id, end)
            except OSError as error:
                print(f"cannot write to {self.log_dir} ({error})", file=sys.stderr)
        _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)
