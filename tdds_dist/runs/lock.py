"""The lock of a run directory: a directory that a live job uses is refused, a dead job's lock is
taken over.

Owns `run.lock` and nothing else. A holder on this machine is looked up among its processes; one on
another machine cannot be asked, so it touches its file every few seconds and a newcomer watches
whether the file changes. Only changes count: no time stamp is ever compared with a clock.
"""

# How a lock changes hands. Neither of two newcomers may remove what the other has just put up, on
# file systems whose locks (flock) are missing or hold within one node only, as on many clusters. So
# nobody removes a dead job's file. Every lock has a token that never comes back, and whoever finds
# the lock T dead creates the file `.run.lock.after-T`, which only one can. The holder is the end of
# this chain: run.lock, the successor of its token, the successor of that one.
# * Who created a successor starts again from run.lock and has won only if the chain ends in it. If
#   it does, run.lock still held T after the creation, so no earlier successor of T had been tidied
#   away, and this is the first. If not, the newcomer was slow, its file is out of everyone's reach,
#   and it removes that. (On NFS the creation also makes the client look run.lock up anew.)
# * The winner renames a copy of its lock over run.lock, and only then removes the links that led
#   there. Killed in between, it is the dead end of the chain and is succeeded in its turn.
# What no file can prevent: a holder that is frozen for 3 heartbeats between looking at its lock and
# removing or renaming it hits its successor's. The successor sees that (`lost`).

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tdds_dist.console import log
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import sync, write_atomically

HEARTBEAT_SECONDS = 10.0
IN_USE = "is in use by"  # stands in the refusal, for launchers: that may pass
MISSED_BEATS = 3  # so many heartbeats without a change mean that the holder is dead
_LOOKS_PER_BEAT = 5
_LONGEST_HEARTBEAT = 60.0
_SIZE_LIMIT = 1 << 16  # bytes; a lock file has a few hundred
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class _Holder:
    """The content of a lock file. "" and 0 stand for values that the system did not give."""

    host: str
    pid: int
    # of the process, in ticks since boot: tells it from a later one with its number
    start_time: int
    boot_id: str
    # a process number means nothing outside of it (containers that share a host name)
    pid_namespace: str
    token: str
    since: str
    command: str
    heartbeat_seconds: float

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since} ({self.command})"


@dataclass(frozen=True)
class _Link:
    """One file of the chain."""

    path: Path
    identity: str  # the token; of a damaged file, a digest
    mtime_ns: int
    holder: _Holder | None  # None when damaged

    @property
    def heartbeat_seconds(self) -> float:
        return HEARTBEAT_SECONDS if self.holder is None else self.holder.heartbeat_seconds


class RunLock:
    """One job's hold on a directory, from `acquire` to `release` or the end of the process.

    A forked child does not hold it: its `release` does nothing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        host: str | None = None,
    ):
        if not 0 < heartbeat_seconds <= _LONGEST_HEARTBEAT:
            raise ValueError(
                f"heartbeat_seconds={heartbeat_seconds} must be within (0, {_LONGEST_HEARTBEAT:g}]"
            )
        self.path = Path(directory) / "run.lock"
        self._heartbeat_seconds = float(heartbeat_seconds)
        self._host = socket.gethostname() if host is None else host
        self._held: _Holder | None = None
        # another job has taken the lock over, or someone removed it, since `acquire` (while this
        # host was frozen)
        self.lost = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> str | None:
        """Take the lock; return a message when it was that of a dead job.

        Raises:
            InputError: a live job holds it.
            OSError: the directory cannot be made, read or written.
        """
        me, stop = self._describe(), threading.Event()
        placed = self.path
        try:
            while True:
                chain = _chain(self.path)
                if chain and chain[-1].identity == me.token:
                    break
                if placed != self.path:
                    _remove(placed, me.token)  # too slow: the lock had changed hands
                if chain and (alive := self._is_alive(chain[-1], me)) is not False:
                    if alive:
                        raise InputError(self._refusal(chain[-1], me))
                    continue
                placed = _successor(chain[-1]) if chain else self.path
                if not _place(placed, me):
                    time.sleep(0.01)
            if len(chain) > 1:
                write_atomically(self.path, lambda file: file.write(_content(me)))
                for link in chain[:-1]:
                    _successor(link).unlink(missing_ok=True)
            thread = threading.Thread(
                target=self._beat, args=(me.token, stop), name="run-lock", daemon=True
            )
            self.lost = False
            thread.start()
            self._held, self._stop, self._thread = me, stop, thread
        except BaseException:
            stop.set()
            with contextlib.suppress(OSError):
                _remove(self.path, me.token)
                _remove(placed, me.token)
            raise
        if len(chain) == 1:
            return None
        died = chain[0].holder
        if died is None:
            return f"took over {self.path}, which was damaged and not in use"
        return (
            f"took over the lock of a job that died (pid {died.pid} on {died.host}, since"
            f" {died.since})"
        )

    def release(self) -> None:
        """Give the lock up; removes the file only when it is still ours. Twice is no error."""
        held = self._held
        if held is None or held.pid != os.getpid():
            return
        self._held = None
        self._stop.set()  # before the file goes, or the thread would take that for a loss
        with contextlib.suppress(OSError):  # a lock that stays is a dead job's to the next one
            _remove(self.path, held.token)
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def __enter__(self) -> str | None:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _describe(self) -> _Holder:
        process = _process(os.getpid())
        command = " ".join([Path(sys.argv[0]).name.replace("__main__.py", "tdds"), *sys.argv[1:]])
        command = " ".join(command.encode(errors="replace").decode().split())
        return _Holder(
            host=self._host,
            pid=os.getpid(),
            start_time=process[1] if process else 0,
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            token=secrets.token_hex(16),
            since=time.strftime("%Y-%m-%d %H:%M:%S%z"),
            command=command if len(command) <= 60 else command[:57] + "...",
            heartbeat_seconds=self._heartbeat_seconds,
        )

    def _is_alive(self, link: _Link, me: _Holder) -> bool | None:
        """Say whether the holder of a link lives; None when the file has been replaced meanwhile,
        so that it must be read again."""
        holder = link.holder
        if holder is not None and _same_machine(holder, me):
            return _is_running(holder)
        who = (
            f"{link.path} is damaged"
            if holder is None
            else f"{self.path.parent} is locked by {holder}"
        )
        log.info(
            f"{who}; watching for {MISSED_BEATS * link.heartbeat_seconds:g} s whether that job"
            " still runs"
        )
        # Counted in naps, not by a clock: if this host is frozen meanwhile, perhaps with the other,
        # that is no missed beat.
        for _ in range(MISSED_BEATS * _LOOKS_PER_BEAT):
            time.sleep(link.heartbeat_seconds / _LOOKS_PER_BEAT)
            now = _read(link.path)
            if now is None or (now.holder and now.holder.token) != (holder and holder.token):
                return None
            if now.mtime_ns != link.mtime_ns:
                return True
        return False

    def _refusal(self, link: _Link, me: _Holder) -> str:
        if link.holder is None:
            return (
                f"{link.path} is not a lock that tdds can read, and something keeps writing it; "
                "stop what does, remove the file, or choose another run.dir"
            )
        way_out = "wait for it, stop it, or choose another run.dir"
        # hidden: who has the number is not known
        if _same_machine(link.holder, me) and _process(link.holder.pid) is None:
            way_out += f"; if that job is certainly dead, remove {link.path}"
        return f"{self.path.parent} {IN_USE} {link.holder}; {way_out}"

    def _beat(self, token: str, stop: threading.Event) -> None:
        """Touch the file until told to stop or until it is no longer ours."""
        while not stop.wait(self._heartbeat_seconds):
            try:
                with _open(self.path) as file:
                    link = _parse(self.path, file)
                    if link.identity == token:
                        _touch(file.fileno(), link.mtime_ns)
                        continue
            except FileNotFoundError:
                pass
            except OSError:
                continue  # a server that does not answer: the next beat may pass
            if not stop.is_set():
                self.lost = True
            return


def holder_of(directory: Path, silent_seconds: float) -> tuple[str, bool, bool]:
    """Return the holder of a directory (empty: none), whether that job lives, and whether this is
    certain. Does not take the lock.

    Of a job on another machine only the heartbeat is seen. To take a lock over, no clock is
    trusted; to show its state, one is enough: a job counts as dead after `silent_seconds` without a
    beat.
    """
    try:
        chain = _chain(Path(directory) / "run.lock")
        if not chain:
            return "", False, True
        link = chain[-1]
        is_beating = time.time() - link.mtime_ns / 1e9 < silent_seconds
        if link.holder is None:
            return "a job with a damaged lock", is_beating, False
        who = f"pid {link.holder.pid} on {link.holder.host}"
        if _same_machine(link.holder, RunLock(directory)._describe()):
            return who, _is_running(link.holder), True
        return who, is_beating, False
    except OSError:
        return "", False, False


# ---- files


def _content(holder: _Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=2) + "\n").encode()


def _parse(path: Path, file: IO[bytes]) -> _Link:
    content = file.read(_SIZE_LIMIT)
    mtime_ns = os.fstat(file.fileno()).st_mtime_ns
    holder = _holder(content)
    if holder is not None:
        return _Link(path, holder.token, mtime_ns, holder)
    # with the time: every empty file is the same
    digest = hashlib.sha256(content + str(mtime_ns).encode()).hexdigest()
    return _Link(path, f"damaged-{digest[:32]}", mtime_ns, None)


def _holder(content: bytes) -> _Holder | None:
    """Return the holder that a file names, or None when it is damaged."""
    try:
        record: dict[str, Any] = json.loads(content)
        found = {name: record[name] for name in _Holder.__dataclass_fields__}
        for name, kind in _Holder.__annotations__.items():
            if type(found[name]) is not kind:
                return None
        for name in ("host", "since", "command"):
            found[name] = " ".join(found[name].split())  # they go into one line
        holder = _Holder(**found)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    sound = (
        re.fullmatch("[0-9a-f]{32}", holder.token)
        and 0 < holder.pid < 1 << 31
        and 0 < holder.heartbeat_seconds <= _LONGEST_HEARTBEAT
    )
    return holder if sound else None


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


def _read(path: Path, tries: int = 3) -> _Link | None:
    """Read a link; None when there is no such file. It is opened, not only asked for its time,
    which NFS caches until an open.
    """
    try:
        with _open(path) as file:
            return _parse(path, file)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE or tries == 1:
            raise
    return _read(path, tries - 1)  # replaced on an NFS server between open and read


def _successor(link: _Link) -> Path:
    return link.path.with_name(f".run.lock.after-{link.identity}")


def _chain(path: Path) -> list[_Link]:
    """List `run.lock` and its successors; the last one holds the lock. Empty when it is free."""
    chain: list[_Link] = []
    link = _read(path)
    while link is not None:
        chain.append(link)
        link = _read(_successor(link))
    return chain


def _place(path: Path, holder: _Holder) -> bool:
    """Create a file that no program sees half written; return False when there is one already."""
    aside = path.with_name(f".run.lock.{holder.token}")
    write_atomically(aside, lambda file: file.write(_content(holder)))
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _write_new(path, _content(holder))
    finally:
        aside.unlink(missing_ok=True)
    return True


def _write_new(path: Path, content: bytes) -> bool:
    """Do as `_place` without hard links. A half-written file counts as damaged, and is watched
    before it is taken over."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
            sync(file)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _remove(path: Path, token: str) -> None:
    """Remove a file if it is the one with this token."""
    link = _read(path)
    if link is not None and link.identity == token:
        path.unlink(missing_ok=True)


def _touch(descriptor: int, before_ns: int) -> None:
    """Change a file's time to now; by two seconds where a coarse or reset clock shows the same time
    again."""
    os.utime(descriptor)
    if os.fstat(descriptor).st_mtime_ns == before_ns:
        os.utime(descriptor, ns=(before_ns + 2_000_000_000, before_ns + 2_000_000_000))


# ---- processes of this machine


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _same_machine(one: _Holder, other: _Holder) -> bool:
    """Say whether the process ids of both have one meaning. Host names do not tell: containers may
    share them."""
    keys = [(holder.host, holder.boot_id, holder.pid_namespace) for holder in (one, other)]
    return keys[0] == keys[1] and one.boot_id != ""


def _process(pid: int) -> tuple[str, int] | None:
    """Return state and start time of a process; None when /proc does not show it."""
    try:
        # a name may hold spaces and brackets
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])  # the third and the 22nd, as proc(5) counts
    except (OSError, IndexError):
        return None


def _is_running(holder: _Holder) -> bool:
    found = _process(holder.pid)
    if found is not None:
        state, start_time = found
        return state not in ("Z", "X") and holder.start_time in (start_time, 0)
    try:
        os.kill(holder.pid, 0)
    except OSError as error:  # not permitted: another user's, which /proc may hide
        return not isinstance(error, ProcessLookupError)
    return True
