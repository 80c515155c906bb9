"""A SLURM cluster of two nodes on this machine, for tests: real daemons, nothing shared, nothing
left behind.

Everything lies in one directory: configuration, state, logs, the sockets of an own munge and an own
MariaDB. Commands find the cluster by SLURM_CONF alone, so a SLURM that is installed here does not
notice. Nodes are named 127.0.0.1 and 127.0.0.2: names that resolve anywhere, so no file of the
system is changed. They may also be hosts with a network of their own (`tests/system/hosts.py`).

A process of its own, the keeper, starts the daemons and adopts whatever they leave without a parent
(slurmstepd, tasks of jobs). When it is told to stop, or the process that asked for the cluster has
died, it kills all that descends from it and removes the directory. Should the keeper itself be
killed, the next start cleans up.

    python -m tests.system.slurm.cluster start DIR                  by hand, until stopped
    eval "$(python -m tests.system.slurm.cluster shell-env DIR)"    then sbatch, squeue, ... in this shell mean that cluster
    python -m tests.system.slurm.cluster stop DIR
"""

import contextlib
import ctypes
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch")
# SLURM does not start these again
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY")
# of the directory: names of sockets in it stay below the 107 characters that the kernel allows
LONGEST_PATH = 60
# so long a requeued job waits before it starts again; SLURM takes less than 5 for an error, and 120
CREDENTIAL_SECONDS = 5

_PREFIX = "tdds-slurm-"
_KEEPER = "keeper"  # file with the keeper's pid and start time; it marks a directory as ours
_PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)
_DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")

_SLURM_CONF = """\
ClusterName=throwaway
SlurmctldHost={host}({head})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock,cred_expire={credential_seconds}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={head}
AccountingStoragePort={ports[1]}
AccountingStoragePass={directory}/munge.sock
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# more CPUs and memory than there are: jobs of several tasks run at once
SlurmdParameters=config_overrides
# what takes minutes on a cluster takes seconds here
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=10
# not more than a requeued job waits: slurmd would take its new steps for what is left of the old ones, and kill them
KillWait=5
InactiveLimit=0
MinJobAge=300
# ids decide ports of jobs: those of clusters side by side differ
FirstJobId={first_job_id}
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=scavenger Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=3
"""

_SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
DbdHost={host}
DbdAddr={head}
DbdPort={ports[1]}
SlurmUser={user}
LogFile={directory}/log/slurmdbd.log
PidFile={directory}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=throwaway
"""


class SlurmError(RuntimeError):
    """A daemon did not start, or a command of SLURM failed."""


def missing_programs() -> list[str]:
    """What is not installed of what a cluster is made of; `tests/system/slurm/install.sh` installs
    it."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


class SlurmCluster:
    """The cluster, from `start` to `stop`. A test gets one as the fixture `slurm`."""

    def __init__(
        self, directory: Path | None = None, nodes: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Nodes other than two of this machine: names that resolve on each of them, with the words
        that run a command there. All that is not a slurmd is on the first."""
        self.directory = directory or _new_directory()
        self._enter = nodes or dict.fromkeys(NODES, ())
        self.nodes = tuple(self._enter)
        self._keeper: subprocess.Popen[str] | None = None

    def __enter__(self) -> "SlurmCluster":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What commands of SLURM, and submitit, need in their environment."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def start(self, outlives_this_process: bool = False) -> None:
        """Returns when all nodes are idle."""
        if missing := missing_programs():
            raise SlurmError(
                f"{', '.join(missing)} not found; tests/system/slurm/install.sh installs what a"
                " cluster needs"
            )
        if len(str(self.directory)) > LONGEST_PATH:
            raise SlurmError(
                f"{self.directory} has more than {LONGEST_PATH} characters, sockets in it would not"
                " work"
            )
        remove_stale(self.directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(self.directory.iterdir()):
            raise SlurmError(
                f"{self.directory} is not empty, or the cluster in it runs; name a new directory"
            )
        owner = 0 if outlives_this_process else os.getpid()
        keep = ["keep", str(self.directory), str(owner), json.dumps(self._enter)]
        self._keeper = subprocess.Popen(
            self.command(sys.executable, "-I", __file__, *keep),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=_bare_environment(self.directory),
            cwd="/",
        )
        try:
            assert self._keeper.stdout is not None
            # until the keeper closes it: it is ready, or it has given up
            answer = self._keeper.stdout.read()
            if answer != "ready":
                raise SlurmError(answer or "the keeper of the cluster died")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kills everything and removes the directory; also after a start that failed, and a second
        time."""
        pid = _keeper_of(self.directory)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        elif self._keeper is not None:
            self._keeper.terminate()
        with contextlib.suppress(SlurmError):
            _until(lambda: self._has_ended(pid), 60, "the keeper stops")
        if self._keeper is not None and self._keeper.poll() is None:
            self._keeper.kill()
            self._keeper.wait()
        _remove(self.directory)  # the keeper has done so, if it lived

    def _has_ended(self, pid: int | None) -> bool:
        if self._keeper is not None:
            return self._keeper.poll() is not None
        return pid is None or not _is_alive(pid)

    # ---- commands

    def command(self, *words: str) -> list[str]:
        """The command that runs another one where the cluster's commands work: on the first
        node."""
        return [*self._enter[self.nodes[0]], *words]

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Standard output of a command, which sees this cluster and no variable of a job that this
        process may be in."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        done = subprocess.run(
            self.command(*command),
            env=environment | self.environment,
            timeout=timeout,
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        if check and done.returncode:
            raise SlurmError(
                f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout.strip()

    def state(self, job_id: str | int) -> str:
        """State of a job in a word; UNKNOWN when SLURM knows no such job.

        The controller says it, and the accounting once the controller has forgotten the job.
        `sacct`, which submitit asks, is up to 5 s behind.
        """
        accounted = partial(
            self.run, "sacct", "-n", "-P", "-X", "-j", str(job_id), "-o", "State", check=False
        )
        return self._shown(job_id).get("JobState") or (accounted().split() or ["UNKNOWN"])[0]

    def restarts(self, job_id: str | int) -> int:
        """How many times a job has been started again."""
        return int(self._shown(job_id).get("Restarts", 0))

    def wait_for(
        self, job_id: str | int, states: str | Collection[str], deadline: float = 180
    ) -> str:
        """Waits until the job is in one of the states and returns that; fails when it no longer can
        be, or is too late."""
        wanted = {states} if isinstance(states, str) else set(states)
        begin = time.monotonic()
        while (state := self.state(job_id)) not in wanted:
            seconds = time.monotonic() - begin
            if state in FINAL or seconds > deadline:
                raise AssertionError(
                    f"job {job_id} is {state} after {seconds:.0f} s instead of"
                    f" {' or '.join(sorted(wanted))}\n{self.story(job_id)}\n{self.logs()}"
                )
            time.sleep(0.2)
        return state

    def story(self, job_id: str | int) -> str:
        """All that SLURM has to say about a job, with the end of its output."""
        columns = "JobID,State,ExitCode,Start,End,NodeList"
        shown = self._shown(job_id)
        parts = [
            self.run("sacct", "-D", "-P", "-j", str(job_id), "-o", columns, check=False),
            self.run("scontrol", "show", "job", str(job_id), check=False),
            *(
                f"==> {shown[key]} <==\n{_tail(Path(shown[key]))}"
                for key in ("StdOut", "StdErr")
                if key in shown
            ),
        ]
        return "\n".join(parts)

    def cancel_all(self, deadline: float = 120) -> None:
        """Cancels every job, kills what jobs left running, mends the nodes; returns when all are
        idle."""
        if jobs := self.run("squeue", "-h", "-o", "%A").split():
            self.run("scancel", *set(jobs), check=False)
        for node in self.nodes:
            if self.slurmd_pid(node) is None:
                self.start_slurmd(node)
        _until(lambda: not self.run("squeue", "-h"), deadline, "all jobs are gone", self.logs)
        for pid in _job_processes(self.directory):
            _kill(pid)

        def are_idle() -> bool:
            states = dict(
                line.split()
                for line in self.run("sinfo", "-h", "-N", "-o", "%N %T", "-p", "main").splitlines()
            )
            for node, state in states.items():
                if state.rstrip("*").startswith("drain") or state == "down":
                    self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return list(states.values()) == ["idle"] * len(self.nodes)

        _until(are_idle, deadline, "all nodes are idle", self.logs)

    def _shown(self, job_id: str | int) -> dict[str, str]:
        lines = self.run("scontrol", "show", "job", "-o", str(job_id), check=False).splitlines()
        words = lines[0].split() if lines else []
        return dict(word.split("=", 1) for word in words if "=" in word)

    # ---- processes

    def slurmd_pid(self, node: str) -> int | None:
        """Process of a node's daemon; None when it does not run."""
        return _read_process(self.directory / f"slurmd-{node}.process")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to a node's daemon: the node is lost, as far as SLURM can tell. Its jobs run
        on."""
        pid = self.slurmd_pid(node)
        assert pid is not None, f"slurmd of {node} does not run\n{self.logs()}"
        os.kill(pid, signal.SIGKILL)
        _until(lambda: self.slurmd_pid(node) is None, 60, f"slurmd of {node} is gone")

    def lose_node(self, node: str) -> None:
        """SIGKILL to all that runs on a node, as when the machine loses power. SLURM notices within
        half a minute."""
        self.kill_slurmd(node)
        for pid in self._stepd_pids(node, ""):
            _kill(pid)
        for pid in _job_processes(self.directory):
            if f"SLURMD_NODENAME={node}" in _environment(pid):
                _kill(pid)

    def start_slurmd(self, node: str) -> None:
        """Starts a node's daemon again."""
        assert self.slurmd_pid(node) is None, f"slurmd of {node} runs already"
        (self.directory / f"slurmd-{node}.wanted").touch()
        _until(lambda: self.slurmd_pid(node) is not None, 60, f"slurmd of {node} starts", self.logs)

    def _stepd_pids(self, node: str, job_id: str | int, step: str = "0") -> list[int]:
        """Processes that look after a step of a job on a node ("0", "batch"), or of all jobs
        ("")."""
        log = str(self.directory / "log" / f"slurmd-{node}.log")
        name = f"slurmstepd: [{job_id}.{step}]" if job_id else "slurmstepd: ["
        return [
            pid
            for pid in _processes()
            if _name(pid) == "slurmstepd"
            and _command(pid).startswith(name)
            and log in _open_files(pid)
        ]

    def kill_stepd(self, node: str, job_id: str | int, deadline: float = 60) -> None:
        """SIGKILL to the processes that look after a job's ranks on a node, once there are any."""
        _until(
            lambda: bool(self._stepd_pids(node, job_id)),
            deadline,
            f"step {job_id}.0 runs on {node}",
            self.logs,
        )
        for pid in self._stepd_pids(node, job_id):
            _kill(pid)

    def task_pids(self, node: str, job_id: str | int) -> list[int]:
        """A job's ranks on a node."""
        keepers = self._stepd_pids(node, job_id)
        return [
            pid
            for pid, (parent, _) in _processes().items()
            if parent in keepers and _name(pid) != "slurmstepd"
        ]

    def logs(self, lines: int = 25) -> str:
        """The end of every daemon's log."""
        return _logs(self.directory, lines)


def remove_stale(directory: Path | None = None) -> None:
    """Cleans up after clusters whose keeper was killed: those that tests started, and
    `directory`."""
    for path in [*_parent().glob(f"{_PREFIX}*"), *([directory] if directory else [])]:
        with contextlib.suppress(FileNotFoundError):
            is_new = not (path / _KEEPER).exists() and time.time() - path.stat().st_mtime < 60
            if path.stat().st_uid == os.getuid() and not is_new and _keeper_of(path) is None:
                _remove(path)


def _new_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_parent()))


def _parent() -> Path:
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) + len(_PREFIX) + 10 <= LONGEST_PATH else Path("/tmp")


def _bare_environment(directory: Path) -> dict[str, str]:
    """What the daemons see: nothing of the caller's, who may be in a SLURM job."""
    kept = {key: os.environ[key] for key in ("HOME", "TZ") if key in os.environ}
    return kept | {
        "PATH": _PATH,
        "LC_ALL": "C",
        "TMPDIR": str(directory),
        "SLURM_CONF": str(directory / "slurm.conf"),
        "MYSQL_UNIX_PORT": str(directory / "mariadb.sock"),
    }


def _until(
    is_true: Callable[[], bool], deadline: float, what: str, logs: Callable[[], str] = str
) -> None:
    end = time.monotonic() + deadline
    while not is_true():
        if time.monotonic() > end:
            raise SlurmError(f"waited {deadline:.0f} s in vain until {what}\n{logs()}")
        time.sleep(0.05)


def _tail(path: Path, lines: int = 25) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return str(error)


def _logs(directory: Path, lines: int = 25, names: Collection[str] | None = None) -> str:
    parts = []
    # what came before a daemon opened its log, or all of it
    for output in sorted((directory / "log").glob("*.out")):
        log = output.with_suffix(".log")
        shown = log if log.exists() and log.stat().st_size else output
        if names is None or output.stem in names:
            parts.append(f"==> {shown.name} <==\n{_tail(shown, lines)}")
    return "\n".join(parts)


# ---- processes, as /proc shows them


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and start time of every process by its id, without those that have ended but are not
    yet waited for."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                words = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                if words[0] not in "ZX":
                    table[int(entry)] = int(words[1]), words[19]
    return table


def _is_alive(pid: int, start: str | None = None) -> bool:
    entry = _processes().get(pid)
    return entry is not None and start in (None, entry[1])


def _write_process(path: Path, pid: int) -> None:
    draft = path.with_name(path.name + ".new")
    draft.write_text(f"{pid} {_processes().get(pid, (0, '?'))[1]}")
    draft.replace(path)


def _read_process(path: Path) -> int | None:
    """The process that a file names, when it lives; its start time tells it from a later one with
    the same id."""
    try:
        pid, start = path.read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if _is_alive(int(pid), start) else None


def _keeper_of(directory: Path) -> int | None:
    return _read_process(directory / _KEEPER)


def _read(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    return ""


def _name(pid: int) -> str:
    return _read(pid, "comm").strip()


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ").strip()


def _environment(pid: int) -> list[str]:
    return _read(pid, "environ").split("\0")


def _open_files(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(descriptor))
    return found


def _job_processes(directory: Path) -> list[int]:
    """Processes of jobs: SLURM has put a job's number and this cluster's file into their
    environment."""

    def is_ours(variables: list[str]) -> bool:
        return f"SLURM_CONF={directory}/slurm.conf" in variables and any(
            v.startswith("SLURM_JOB_ID=") for v in variables
        )

    return [
        pid
        for pid in _processes()
        if is_ours(_environment(pid)) and pid != os.getpid() and _name(pid) != "slurmstepd"
    ]


def _daemons(directory: Path) -> list[int]:
    """Daemons of this cluster, by what they were started with or have open."""
    inside = f"{directory}/"
    candidates = [pid for pid in _processes() if _name(pid) in _DAEMONS]
    return [
        pid
        for pid in candidates
        if any(inside in text for text in (_command(pid), *_open_files(pid)))
    ]


def _descendants(pid: int) -> list[int]:
    table = _processes()
    found: list[int] = []
    generation = {pid}
    while generation:
        generation = {child for child, (parent, _) in table.items() if parent in generation}
        found += generation
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _remove(directory: Path) -> None:
    """Kills what belongs to a cluster whose keeper is gone, and removes its directory."""
    if not directory.exists():
        return
    if any(directory.iterdir()) and not (directory / _KEEPER).exists():
        return  # not ours

    def is_clear() -> bool:
        pids = _daemons(directory) + _job_processes(directory)
        for pid in pids:
            _kill(pid)
        return not pids

    _until(is_clear, 60, f"the processes of {directory} are gone")
    shutil.rmtree(directory)


# ---- the keeper


class _Keeper:
    """Starts the daemons, starts a slurmd again on demand, and ends everything."""

    def __init__(self, directory: Path, nodes: Mapping[str, Sequence[str]]) -> None:
        self.directory = directory
        self.nodes = nodes
        self.reserved = [_reserve_port() for _ in range(2 + len(nodes))]
        ports = [reserved.getsockname()[1] for reserved in self.reserved]
        host = socket.gethostname().split(".")[0]
        self.values = {
            "directory": directory,
            "nodes": "\n".join(
                # a slurmd of this machine listens where its host name leads to, whatever its node
                f"NodeName={node} NodeHostname={node if words else host}"
                f" NodeAddr={node if words else '127.0.0.1'} Port={port} CPUs=4 RealMemory=64000"
                for (node, words), port in zip(nodes.items(), ports[2:], strict=True)
            ),
            "host": host,
            "head": next(iter(nodes)),
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "credential_seconds": CREDENTIAL_SECONDS,
            "first_job_id": 1000 * secrets.randbelow(60) + 1,
            "ports": ports,
        }

    def start(self) -> None:
        for name in ("log", "state", "mariadb", *(f"spool-{node}" for node in self.nodes)):
            (self.directory / name).mkdir()
        self.write("slurm.conf", _SLURM_CONF.format_map(self.values))
        self.write("slurmdbd.conf", _SLURMDBD_CONF.format_map(self.values), 0o600)
        self.write("munge.key", os.urandom(512), 0o400)
        conf, user = str(self.directory / "slurm.conf"), str(self.values["user"])

        munge = str(self.directory / "munge.sock")
        munged = self.daemon(
            *f"munged --foreground --force --socket={munge}".split(),
            *(
                f"--{key}={self.directory}/{name}"
                for key, name in {
                    "key-file": "munge.key",
                    "pid-file": "munged.pid",
                    "log-file": "log/munged.log",
                    "seed-file": "munged.seed",
                }.items()
            ),
        )
        database = f"--user={user} --datadir={self.directory}/mariadb --tmpdir={self.directory} --innodb-log-file-size=8M".split()
        installed = self.daemon(
            "mariadb-install-db",
            "--no-defaults",
            "--skip-test-db",
            *database,
            "--auth-root-authentication-method=normal",
        )
        if installed.wait():
            raise SlurmError(
                "mariadb-install-db ended with"
                f" {installed.returncode}\n{self.logs('mariadb-install-db')}"
            )
        # No password and no network: whoever may enter the directory's socket is the one user that
        # the database has.
        mariadb = str(self.directory / "mariadb.sock")
        mariadbd = self.daemon(
            "mariadbd",
            "--no-defaults",
            *database,
            f"--socket={mariadb}",
            "--skip-networking",
            "--skip-grant-tables",
            f"--pid-file={self.directory}/mariadbd.pid",
            "--skip-log-bin",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=32M",
        )
        self.until("munged", munged, lambda: _answers(munge))
        self.until("mariadbd", mariadbd, lambda: _answers(mariadb))
        self.until(
            "slurmdbd",
            self.daemon("slurmdbd", "-D"),
            partial(self.prints, "", "sacctmgr", "-n", "show", "cluster"),
        )
        slurmctld = self.daemon("slurmctld", "-D", "-f", conf)
        self.until("slurmctld", slurmctld, partial(self.prints, "UP", "scontrol", "ping"))
        for node, slurmd in [(node, self.slurmd(node)) for node in self.nodes]:
            shown = ["sinfo", "-h", "-n", node, "-p", "main", "-o", "%T"]
            self.until(f"slurmd-{node}", slurmd, partial(self.prints, "idle", *shown))
        # sacct knows jobs once slurmctld has told slurmdbd where it listens
        clusters = ["sacctmgr", "-n", "-P", "show", "cluster", "format=ControlHost"]
        address = socket.gethostbyname(str(self.values["head"]))
        self.until("slurmctld", slurmctld, partial(self.prints, address, *clusters))

    def serve(self, owner: int) -> None:
        """Until the owner has died (0: for ever), or a signal raises SystemExit."""
        while owner in (0, os.getppid()):
            self.reap()
            for node in self.nodes:
                wanted = self.directory / f"slurmd-{node}.wanted"
                if wanted.exists():
                    wanted.unlink()
                    self.slurmd(node)
            time.sleep(0.1)

    def stop(self) -> None:
        def is_clear() -> bool:
            self.reap()
            pids = _descendants(os.getpid())
            for pid in pids:
                _kill(pid)
            return not pids

        _until(is_clear, 45, "all processes are gone")
        _remove(self.directory)

    def reap(self) -> None:
        """Wait for what has ended, also of what was adopted."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def write(self, name: str, content: str | bytes, mode: int = 0o644) -> None:
        path = self.directory / name
        path.touch(mode=mode)
        path.chmod(mode | 0o200)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)

    def slurmd(self, node: str) -> "subprocess.Popen[bytes]":
        process = self.daemon(
            *self.nodes[node],
            "slurmd",
            "-D",
            "-N",
            node,
            "-f",
            str(self.directory / "slurm.conf"),
            name=f"slurmd-{node}",
        )
        _write_process(self.directory / f"slurmd-{node}.process", process.pid)
        return process

    def daemon(self, *command: str, name: str = "") -> "subprocess.Popen[bytes]":
        with (self.directory / "log" / f"{name or command[0]}.out").open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.directory
            )

    def logs(self, *names: str) -> str:
        return _logs(self.directory, 25, names)

    def prints(self, text: str, *command: str) -> bool:
        """Whether a command succeeds, with this text in its output."""
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return not done.returncode and text in done.stdout

    def until(
        self, name: str, process: "subprocess.Popen[bytes]", is_ready: Callable[[], bool]
    ) -> None:
        def is_over() -> bool:
            if process.poll() is not None:
                raise SlurmError(
                    f"{name} ended with {process.returncode} at its start\n{self.logs(name)}"
                )
            return is_ready()

        _until(is_over, 120, f"{name} answers", partial(self.logs, name, "slurmctld"))


def _reserve_port() -> socket.socket:
    """A socket that keeps others off a port of its own, but not one that sets SO_REUSEADDR, as the
    daemons of SLURM do."""
    reserved = socket.socket()
    reserved.bind(("", 0))
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reserved


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return True


def _keep(directory: Path, owner: int, nodes: Mapping[str, Sequence[str]]) -> NoReturn:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    adopt_orphans = 36  # PR_SET_CHILD_SUBREAPER
    ctypes.CDLL(None, use_errno=True).prctl(adopt_orphans, 1, 0, 0, 0)
    _write_process(directory / _KEEPER, os.getpid())
    keeper = _Keeper(directory, nodes)
    answer = ""
    try:
        try:
            keeper.start()
            answer = "ready"
        except (SlurmError, OSError, subprocess.SubprocessError) as error:
            answer = f"{error}"
            raise SystemExit(1) from None
        finally:
            os.write(1, answer.encode())
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
        keeper.serve(owner)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        keeper.stop()
    raise SystemExit(0)


def main(arguments: list[str]) -> None:
    """What people type; `keep` is what `start` runs."""
    match arguments:
        case ["keep", directory, owner, nodes]:
            _keep(Path(directory), int(owner), json.loads(nodes))
        case ["start", directory]:
            SlurmCluster(Path(directory).resolve()).start(outlives_this_process=True)
        case ["stop", directory]:
            SlurmCluster(Path(directory).resolve()).stop()
        case ["shell-env", directory]:
            for key, value in SlurmCluster(Path(directory).resolve()).environment.items():
                print(f"export {key}={shlex.quote(value)}")
        case _:
            raise SystemExit((__doc__ or "").partition("\n\n    ")[2].join(["usage:\n    ", ""]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SlurmError as error:
        raise SystemExit(str(error)) from None
