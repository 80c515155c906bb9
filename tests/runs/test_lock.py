"""The lock of a run directory: who is refused, whose lock is taken over, and that of many newcomers
one wins.

Holders are processes of their own, killed for real. Another host is one that gives another name.
"""

import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tdds_dist.errors import InputError
from tdds_dist.runs import lock as lock_module
from tdds_dist.runs.lock import RunLock

BEAT = 0.05  # where nothing beats, or within this process
SLOW_BEAT = 0.3  # where another process must beat in time, on a busy machine
REPO = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")

HOLDER = """
import json, sys
from pathlib import Path
from tdds_dist.runs import lock
from tdds_dist.runs.lock import RunLock

directory, options, before = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
exec(before)
held = RunLock(Path(directory), **options)
print(json.dumps(held.acquire()), flush=True)
for line in sys.stdin:
    if line == "release\\n":
        held.release()
    print(json.dumps(held.lost), flush=True)
"""


class Holder:
    """A process that holds the lock of a directory until told otherwise."""

    def __init__(self, directory: Path, before: str = "", **options: Any):
        command = [sys.executable, "-c", HOLDER, str(directory), json.dumps(options), before]
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = os.environ | {"PYTHONPATH": str(REPO)}
        self.process = subprocess.Popen(command, cwd=REPO, env=env, **piped)
        self.pid = self.process.pid

    def answer(self) -> Any:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 20)[0], "the holder does not answer"
        return json.loads(self.process.stdout.readline())

    def ask(self, word: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told while a lock is watched."""
    lines: list[str] = []
    monkeypatch.setattr(lock_module.log, "info", lines.append)
    return lines


@pytest.fixture
def hold() -> Iterator[Callable[..., Holder]]:
    """Start a holder and wait until it holds the lock."""
    holders = []

    def start(directory: Path, before: str = "", **options: Any) -> Holder:
        holders.append(Holder(directory, before, **options))
        assert holders[-1].answer() is None
        return holders[-1]

    yield start
    for holder in holders:
        holder.end()


def acquire(directory: Path, **options: Any) -> str | None:
    """What `acquire` of a lock that is released at once gives."""
    with RunLock(directory, **options) as message:
        return message


def refused(directory: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        RunLock(directory, **options).acquire()
    message = str(caught.value)
    assert "\n" not in message
    return message


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def content(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.lock").read_text())


def edit(directory: Path, **changes: Any) -> None:
    (directory / "run.lock").write_text(json.dumps(content(directory) | changes))


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def dead_lock(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The lock that a killed process left."""
    directory = tmp_path_factory.mktemp("dead")
    holder = Holder(directory)
    assert holder.answer() is None
    holder.end()
    return (directory / "run.lock").read_bytes()


# ---- one process


def test_taken_and_given_back(tmp_path):
    def beating() -> int:
        return sum(thread.name == "run-lock" for thread in threading.enumerate())

    directory, before = tmp_path / "not" / "there", beating()
    lock = RunLock(directory, heartbeat_seconds=BEAT)
    for _ in range(2):
        assert lock.acquire() is None
        assert files(directory) == ["run.lock"]
        assert beating() == before + 1
        lock.release()
        assert files(directory) == []
        assert beating() == before
        lock.release()
    assert not lock.lost
    with suppress(KeyError), lock:
        record = content(directory)
        raise KeyError
    assert record["pid"] == os.getpid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}", record["since"])
    assert len(record["command"]) <= 60
    assert files(directory) == []


def test_second_lock_of_this_process_is_refused_and_leaves_the_first(tmp_path):
    lock = RunLock(tmp_path, heartbeat_seconds=BEAT)
    lock.acquire()
    before = content(tmp_path)
    assert f"in use by pid {os.getpid()} on " in refused(tmp_path)
    with pytest.raises(InputError):
        lock.acquire()
    assert content(tmp_path) == before
    time.sleep(3 * BEAT)
    assert not lock.lost
    lock.release()
    assert acquire(tmp_path) is None


def test_forked_child_does_not_release(tmp_path):
    with RunLock(tmp_path) as _:
        lock = RunLock(tmp_path / "inner")
        lock.acquire()
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert files(tmp_path / "inner") == ["run.lock"]
        lock.release()


def test_directory_that_cannot_be_one(tmp_path):
    (tmp_path / "file").touch()
    for name in ("dangling", "run.lock"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    for name, words in (("file", "file"), ("dangling", "dangling"), ("", r"run\.lock")):
        with pytest.raises(OSError, match=words):
            RunLock(tmp_path / name).acquire()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e9])
def test_heartbeat_out_of_range(tmp_path, seconds):
    with pytest.raises(ValueError, match="heartbeat_seconds"):
        RunLock(tmp_path, heartbeat_seconds=seconds)


# ---- a holder on this machine


def test_live_holder_is_named(tmp_path, hold, monkeypatch):
    """Also one that is stopped, or that /proc hides: its age cannot be asked, so the way out says
    what to do then."""
    holder = hold(tmp_path, heartbeat_seconds=BEAT)
    holder.process.send_signal(signal.SIGSTOP)
    time.sleep(4 * BEAT)
    record = content(tmp_path)
    os.utime(tmp_path / "run.lock", ns=(0, 0))  # its age says nothing
    start = time.monotonic()
    message = refused(tmp_path)
    assert time.monotonic() - start < 1
    held = f"pid {holder.pid} on {record['host']} since {record['since']}"
    assert message.startswith(f"{tmp_path} is in use by {held} (-c ")
    assert message.endswith("...); wait for it, stop it, or choose another run.dir")
    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "_process", lambda pid: None)
        way_out = f"if that job is certainly dead, remove {tmp_path}/run.lock"
        assert refused(tmp_path).endswith(way_out)
    assert files(tmp_path) == ["run.lock"]
    holder.process.send_signal(signal.SIGCONT)
    assert holder.ask("release") is False
    assert acquire(tmp_path) is None


@pytest.mark.parametrize("is_hidden", [False, True])
def test_killed_holder_is_succeeded_at_once(tmp_path, hold, monkeypatch, is_hidden):
    """A zombie is dead."""
    holder = hold(tmp_path)
    record = content(tmp_path)
    holder.process.kill()
    wait_until(lambda: " Z " in Path(f"/proc/{holder.pid}/stat").read_text())
    if is_hidden:
        holder.end()
        monkeypatch.setattr(lock_module, "_process", lambda pid: None)
    start = time.monotonic()
    with RunLock(tmp_path) as message:
        assert time.monotonic() - start < 1
        dead = f"pid {holder.pid} on {record['host']}, since {record['since']}"
        assert message == f"took over the lock of a job that died ({dead})"
        assert files(tmp_path) == ["run.lock"]
        assert content(tmp_path)["pid"] == os.getpid()
    assert files(tmp_path) == []


def test_pid_that_went_to_another_process(tmp_path):
    with RunLock(tmp_path):
        left = content(tmp_path)
    (tmp_path / "run.lock").write_text(json.dumps(left | {"start_time": left["start_time"] - 1}))
    assert f"(pid {os.getpid()} on " in acquire(tmp_path)
    (tmp_path / "run.lock").write_text(json.dumps(left))
    assert f"pid {os.getpid()} on " in refused(tmp_path)


@pytest.mark.parametrize("key", ["boot_id", "pid_namespace"])
def test_machine_of_the_same_name_is_another_one(tmp_path, hold, said, key):
    """Its processes cannot be seen here: it is watched, though no process of that number is
    here."""
    holder = hold(tmp_path, f"lock._{key} = lambda: 'other'", heartbeat_seconds=SLOW_BEAT)
    edit(tmp_path, pid=2**31 - 1)
    with pytest.raises(InputError, match="in use by pid 2147483647 on "):
        RunLock(tmp_path).acquire()
    assert len(said) == 1
    holder.end()
    edit(tmp_path, heartbeat_seconds=BEAT)
    said.clear()
    lock = RunLock(tmp_path)
    assert "pid 2147483647" in lock.acquire()
    lock.release()
    assert len(said) == 1


# ---- a holder elsewhere


def test_beating_heart_elsewhere(tmp_path, hold, said):
    """Wrong clocks make no difference."""
    path = tmp_path / "run.lock"
    holder = hold(tmp_path, host="node7", heartbeat_seconds=SLOW_BEAT)
    moments = [time.time() + years * 365 * 86400 for years in (-30, 30)]
    for moment in moments:
        os.utime(path, (moment, moment))
        said.clear()
        with pytest.raises(InputError, match=f"in use by pid {holder.pid} on node7 since "):
            RunLock(tmp_path).acquire()
        assert len(said) == 1
        assert said[0].startswith(f"{tmp_path} is locked by pid {holder.pid} on node7 since ")
        assert said[0].endswith("; watching for 0.9 s whether that job still runs")
    holder.end()
    edit(tmp_path, heartbeat_seconds=BEAT)
    left = path.read_bytes()
    for moment in moments:
        path.write_bytes(left)
        os.utime(path, (moment, moment))
        assert acquire(tmp_path).startswith(
            f"took over the lock of a job that died (pid {holder.pid} on node7, since "
        )


def test_watched_for_the_beats_of_the_holder(tmp_path, dead_lock):
    """Not of the newcomer, and for no less than three."""
    (tmp_path / "run.lock").write_bytes(dead_lock)
    edit(tmp_path, host="node7", heartbeat_seconds=0.2)
    start = time.monotonic()
    assert acquire(tmp_path, heartbeat_seconds=0.001) is not None
    assert 0.6 <= time.monotonic() - start < 5


def test_clock_that_stands_still(tmp_path, monkeypatch):
    """Every beat changes the time, also where the file system's clock shows the same again."""
    real, seen = os.utime, []
    monkeypatch.setattr(lock_module.os, "utime", lambda file, ns=(5, 5): real(file, ns=ns))
    with RunLock(tmp_path, heartbeat_seconds=BEAT):
        path = tmp_path / "run.lock"
        seen.append(path.stat().st_mtime_ns)
        for _ in range(4):
            wait_until(lambda: path.stat().st_mtime_ns != seen[-1])
            seen.append(path.stat().st_mtime_ns)
        assert "in use" in refused(tmp_path, host="elsewhere")
    assert len(seen) == 5


def test_holder_that_leaves_while_it_is_watched(tmp_path, hold, monkeypatch):
    holder = hold(tmp_path, host="node7", heartbeat_seconds=SLOW_BEAT)
    lock = RunLock(tmp_path)
    monkeypatch.setattr(lock_module.log, "info", lambda _: holder.ask("release"))
    assert lock.acquire() is None
    lock.release()


def test_heartbeat_survives_a_failing_file_system(tmp_path):
    path, aside, broken = tmp_path / "run.lock", tmp_path / "aside", tmp_path / "broken"
    lock = RunLock(tmp_path, heartbeat_seconds=BEAT)
    lock.acquire()
    os.link(path, aside)
    broken.symlink_to(path)
    os.replace(broken, path)  # a link to itself
    with pytest.raises(OSError, match="symbolic links"):
        path.open()
    time.sleep(5 * BEAT)
    os.replace(aside, path)
    before = path.stat().st_mtime_ns
    wait_until(lambda: path.stat().st_mtime_ns != before)
    assert not lock.lost
    lock.release()
    assert files(tmp_path) == []


# ---- a lock that is lost


def test_frozen_holder_notices_and_leaves_the_other_lock_alone(tmp_path, hold):
    frozen = hold(tmp_path, host="node7", heartbeat_seconds=BEAT)
    assert frozen.ask("lost?") is False
    frozen.process.send_signal(signal.SIGSTOP)
    time.sleep(0.02)
    lock = RunLock(tmp_path, host="node8", heartbeat_seconds=BEAT)
    assert f"(pid {frozen.pid} on node7" in lock.acquire()
    mine = content(tmp_path)
    frozen.process.send_signal(signal.SIGCONT)
    wait_until(lambda: frozen.ask("lost?"))
    assert frozen.ask("release") is True
    assert content(tmp_path) == mine
    time.sleep(2 * BEAT)
    assert not lock.lost
    lock.release()
    assert files(tmp_path) == []


def test_lock_that_is_removed_or_replaced(tmp_path, dead_lock):
    """It is lost, and what stands there now is left alone."""
    lock = RunLock(tmp_path, heartbeat_seconds=BEAT)
    for replacement in (None, dead_lock):
        assert lock.acquire() is None
        assert not lock.lost
        (tmp_path / "run.lock").unlink()
        if replacement is not None:
            (tmp_path / "run.lock").write_bytes(replacement)
        wait_until(lambda: lock.lost)
        lock.release()
    assert (tmp_path / "run.lock").read_bytes() == dead_lock


# ---- damaged files


@pytest.mark.parametrize(
    "damage",
    [
        *("", "half", "\0\u07ff", "[]"),
        *({"token": token} for token in (None, "../../" + "a" * 26)),
        *({"pid": pid} for pid in ("1", -1)),
        *({"heartbeat_seconds": seconds} for seconds in (1e99, float("nan"))),
    ],
    ids=str,
)
def test_damaged_file_is_watched_and_taken_over(tmp_path, monkeypatch, dead_lock, said, damage):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", BEAT)
    path = tmp_path / "run.lock"
    if isinstance(damage, dict):
        record = json.loads(dead_lock) | damage
        damage = json.dumps({key: value for key, value in record.items() if value is not None})
    path.write_text(dead_lock.decode()[:50] if damage == "half" else damage)
    lock = RunLock(tmp_path)
    assert lock.acquire() == f"took over {path}, which was damaged and not in use"
    assert said == [f"{path} is damaged; watching for 0.15 s whether that job still runs"]
    assert files(tmp_path) == ["run.lock"]
    lock.release()


def test_damaged_file_that_changes_is_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", BEAT)
    path = tmp_path / "run.lock"
    path.write_text("")
    lock = RunLock(tmp_path)
    monkeypatch.setattr(lock_module.log, "info", lambda _: os.utime(path, (1, 1)))
    with pytest.raises(InputError, match="is not a lock that tdds can read"):
        lock.acquire()
    assert files(tmp_path) == ["run.lock"]


def test_lock_that_was_half_written_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", BEAT)
    with RunLock(tmp_path):
        whole = (tmp_path / "run.lock").read_text()
        (tmp_path / "run.lock").write_text(whole[:20])
        monkeypatch.setattr(
            lock_module.log, "info", lambda _: (tmp_path / "run.lock").write_text(whole)
        )
        with pytest.raises(InputError, match=f"in use by pid {os.getpid()} on "):
            RunLock(tmp_path).acquire()


def test_text_from_a_lock_stays_on_one_line(tmp_path, hold):
    hold(tmp_path)
    edit(tmp_path, command="a\nb\r\nc", since="then\n")
    assert " since then (a b c); " in refused(tmp_path)


# ---- many newcomers


def race(
    number: int, directories: list[Path], options: dict[str, Any], barrier: Any, results: Any
) -> None:
    """Per directory, what this newcomer gets: ("won", message, whether the file is its own) or
    ("refused", message)."""
    outcomes: list[tuple[Any, ...]] = []
    own = {"host": f"node{number}"} if "host" in options else {}
    for directory in directories:
        lock = RunLock(directory, **options | own)
        barrier.wait(30)
        try:
            message = lock.acquire()
        except InputError as error:
            outcomes.append(("refused", str(error)))
        else:
            outcomes.append(("won", message, content(directory)["pid"] == os.getpid()))
        barrier.wait(30)  # nobody gives up or dies before all have tried
        lock.release()
    results.put(outcomes)


def race_results(
    directories: list[Path], newcomers: int, **options: Any
) -> list[list[tuple[Any, ...]]]:
    """By directory, the outcomes of all newcomers."""
    results, barrier = _context.Queue(), _context.Barrier(newcomers)
    told = (directories, options, barrier, results)
    processes = [
        _context.Process(target=race, args=(number, *told), daemon=True)
        for number in range(newcomers)
    ]
    for process in processes:
        process.start()
    try:
        by_newcomer = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return list(zip(*by_newcomer, strict=True))


def assert_one_won(outcomes: list[tuple[Any, ...]], takeover: bool) -> None:
    won = [outcome for outcome in outcomes if outcome[0] == "won"]
    assert len(won) == 1, outcomes
    assert won[0][2], "the file is not the winner's"
    assert ("took over" in won[0][1]) if takeover else (won[0][1] is None)
    assert all("is in use by pid" in outcome[1] for outcome in outcomes if outcome[0] == "refused")


def test_one_of_many_wins_a_stale_or_free_lock(tmp_path, dead_lock):
    directories = [tmp_path / f"{number}" for number in range(10)]
    stale = set(directories[::2])
    for directory in stale:
        directory.mkdir()
        (directory / "run.lock").write_bytes(dead_lock)
    for directory, outcomes in zip(directories, race_results(directories, 8), strict=True):
        assert_one_won(outcomes, directory in stale)
        assert files(directory) == []


def test_one_of_many_hosts_wins_a_stale_lock(tmp_path, dead_lock):
    """Nobody can look anybody up: the dead one is watched, then the winner."""
    directories = [tmp_path / f"{number}" for number in range(2)]
    for directory in directories:
        directory.mkdir()
        (directory / "run.lock").write_bytes(dead_lock)
        edit(directory, host="gone", heartbeat_seconds=BEAT)
    by_directory = race_results(directories, 4, host="", heartbeat_seconds=0.8)
    for directory, outcomes in zip(directories, by_directory, strict=True):
        assert_one_won(outcomes, True)
        assert files(directory) == []


@pytest.mark.parametrize("stays", [True, False])
def test_newcomer_who_is_too_slow(tmp_path, dead_lock, monkeypatch, stays):
    """It finds the lock dead, and before it acts another one takes over and tidies up, and perhaps
    leaves again."""
    (tmp_path / "run.lock").write_bytes(dead_lock)
    fast, slow = RunLock(tmp_path), RunLock(tmp_path)
    real = lock_module._place

    def overtaken(path: Path, holder: Any) -> bool:
        monkeypatch.setattr(lock_module, "_place", real)
        assert fast.acquire() is not None
        if not stays:
            fast.release()
        assert real(path, holder), "nothing is in the way of the slow one"
        return True

    monkeypatch.setattr(lock_module, "_place", overtaken)
    if stays:
        with pytest.raises(InputError, match=f"in use by pid {os.getpid()}"):
            slow.acquire()
    else:
        assert slow.acquire() is None
    assert files(tmp_path) == ["run.lock"]
    fast.release()
    slow.release()
    assert files(tmp_path) == []


def test_newcomer_killed_in_the_middle_of_a_takeover(tmp_path, dead_lock):
    (tmp_path / "run.lock").write_bytes(dead_lock)
    killed = Holder(
        tmp_path,
        """
import os
real = lock.write_atomically
lock.write_atomically = lambda path, write: os.kill(os.getpid(), 9) if path.name == "run.lock" else real(path, write)
""",
    )
    assert killed.process.wait(20) == -signal.SIGKILL
    killed.end()
    assert (tmp_path / "run.lock").read_bytes() == dead_lock
    assert len(files(tmp_path)) == 2
    with RunLock(tmp_path) as message:
        # the job that ran, not the one that never did
        assert f"(pid {json.loads(dead_lock)['pid']} on " in message
        assert files(tmp_path) == ["run.lock"]
        assert content(tmp_path)["pid"] == os.getpid()


def test_interrupted_newcomer_leaves_nothing(tmp_path, dead_lock, monkeypatch):
    (tmp_path / "run.lock").write_bytes(dead_lock)
    real = lock_module.write_atomically

    def interrupted(path: Path, write: Any) -> None:
        if path.name == "run.lock":
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(lock_module, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunLock(tmp_path).acquire()
    assert files(tmp_path) == ["run.lock"]
    assert (tmp_path / "run.lock").read_bytes() == dead_lock


def test_file_system_without_hard_links(tmp_path, dead_lock, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lock_module.os, "link", refuse)
    with RunLock(tmp_path) as message:
        assert message is None
        assert f"pid {os.getpid()}" in refused(tmp_path)
    (tmp_path / "run.lock").write_bytes(dead_lock)
    with RunLock(tmp_path) as message:
        assert "took over" in message
        assert files(tmp_path) == ["run.lock"]
        assert f"pid {os.getpid()}" in refused(tmp_path)
    assert files(tmp_path) == []
