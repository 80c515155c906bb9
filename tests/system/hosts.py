"""Hosts on one machine: network namespaces with a name and an address each, and a network between
them that delays, loses and cuts.

A host has its own network, host name and /etc/hosts, and shares CPUs, files and clock with the
others. Its interface `eth0` (10.77.0.<number>) is a TUN device, and a thread carries the packets
from one to the other: kernels of small machines often lack `tc netem`, and a cable of one's own can
be cut in one direction. Needs root, `ip` and /dev/net/tun; everything goes with the processes.
"""

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import jobs

MTU = 9000
_QUEUE_SECONDS = 0.05  # a full queue drops packets, as that of a switch
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_FLAGS = {"mnt": 0x00020000, "uts": 0x04000000, "net": 0x40000000}  # of setns
_UNSHARE = ["unshare", "--net", "--uts", "--mount", "--propagation", "private"]
_BE_HOST = 'mount --bind "$1" /etc/hosts; hostname "$2"; echo; exec sleep infinity'
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Cable:
    """One direction between two hosts."""

    is_cut: bool = False
    delay_seconds: float = 0.0
    loss: float = 0.0  # share of packets
    bytes_per_second: float = float("inf")
    _free_at: float = 0.0

    def arrival(self, size: int) -> float | None:
        """Return when a packet that is sent now arrives; None when it does not."""
        now = time.monotonic()
        if self.is_cut or random.random() < self.loss or self._free_at > now + _QUEUE_SECONDS:
            return None
        self._free_at = max(now, self._free_at) + size / self.bytes_per_second
        return self._free_at + self.delay_seconds


@dataclass
class Host:
    """A host, while its process `holder` lives."""

    number: int
    holder: subprocess.Popen[bytes]
    files: Path

    @property
    def name(self) -> str:
        return f"host{self.number}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    def command(self, *words: object) -> list[str]:
        """Return the command that runs another one on this host."""
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-u", "-n", *map(str, words)]

    def run(self, *words: object) -> None:
        subprocess.run(self.command(*words), check=True, capture_output=True)

    def add_dead_interface(self) -> str:
        """Add the interface `eth1`, which leads nowhere; return its address."""
        address = f"10.88.0.{self.number}"
        self.run("ip", "tuntap", "add", "mode", "tun", "eth1")
        self.run("ip", "address", "add", f"{address}/24", "dev", "eth1")
        self.run("ip", "link", "set", "eth1", "up")
        return address

    def know(self, names: dict[str, str]) -> None:
        """Make these the only names (with their addresses) that this host can resolve."""
        lines = [f"{address} {name}\n" for name, address in names.items()]
        self.files.write_text("127.0.0.1 localhost\n" + "".join(lines))


@dataclass
class Hosts:
    """The hosts of a test, and the cables from each to each by (sender, receiver)."""

    all: list[Host]
    cables: dict[tuple[int, int], Cable] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Host:
        return self.all[number - 1]

    def set(self, **properties: Any) -> None:
        """Change properties of all cables."""
        for cable in self.cables.values():
            for name, value in properties.items():
                setattr(cable, name, value)

    def enters(self, *numbers: int, **environment: str) -> jobs.Inject:
        """Return an inject that puts rank r on the host of the r-th number (by default one on each),
        with this environment."""
        numbers = numbers or tuple(host.number for host in self.all)
        pids = [self[number].holder.pid for number in numbers]
        return _Enters(pids, {"MASTER_ADDR": self[numbers[0]].name} | environment)


@dataclass
class _Enters:
    pids: Sequence[int]
    environment: dict[str, str]

    def __call__(self, rank: int) -> None:
        here = self.pids[rank]
        enter(here)
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        os.environ |= {
            "LOCAL_RANK": str(self.pids[:rank].count(here)),
            "LOCAL_WORLD_SIZE": str(self.pids.count(here)),
        } | self.environment


def enter(pid: int, kinds: Sequence[str] = ("net", "uts", "mnt")) -> None:
    """Move this thread to the host of a process (to its files only while it is the only one)."""
    folder = os.getcwd()
    for kind in kinds:
        with open(f"/proc/{pid}/ns/{kind}") as namespace:
            if _libc.setns(namespace.fileno(), _FLAGS[kind]):
                raise OSError(ctypes.get_errno(), f"setns to {kind} of {pid}")
    if "mnt" in kinds:
        os.chdir(folder)


def why_not() -> str:
    """Return why there can be no hosts on this machine; empty when there can."""
    if not shutil.which("ip") or not shutil.which("nsenter"):
        return "needs `ip` (Debian's iproute2) and `nsenter`"
    if not os.access("/dev/net/tun", os.W_OK):
        return "needs root and /dev/net/tun"
    done = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip()


@contextlib.contextmanager
def hosts(number: int, folder: Path) -> Iterator[Hosts]:
    """Make host1, host2, ..., which know each other by name; remove them at the end."""
    made, devices = Hosts([]), {}
    stop, over = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, stop)
        for each in range(1, number + 1):
            files = folder / f"hosts{each}"
            files.write_text("")
            holder = subprocess.Popen(
                [*_UNSHARE, "sh", "-ec", _BE_HOST, "sh", files, f"host{each}"],
                stdout=subprocess.PIPE,
            )
            stack.callback(_end, holder)
            assert holder.stdout is not None
            assert holder.stdout.readline()
            host = Host(each, holder, files)
            made.all.append(host)
            devices[each] = _tun(host)
            stack.callback(os.close, devices[each])
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "mtu", str(MTU), "up")
        for host in made.all:
            host.know({other.name: other.address for other in made.all})
        made.cables.update({pair: Cable() for pair in itertools.permutations(devices, 2)})
        network = threading.Thread(target=_carry, args=(devices, made.cables, stop))
        network.start()
        stack.callback(network.join)
        stack.callback(os.close, over)
        yield made


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _tun(host: Host) -> int:
    """Return the machine's end of a new device `eth0` of this host."""
    found: list[int] = []

    def make() -> None:
        enter(host.holder.pid, ["net"])
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"eth0", _TUN_WITHOUT_HEADER))
        found.append(device)

    thread = threading.Thread(target=make)  # which belongs to that network until it ends
    thread.start()
    thread.join()
    return found[0]


def _carry(devices: dict[int, int], cables: dict[tuple[int, int], Cable], stop: int) -> None:
    """Carry packets between the devices until the other end of `stop` is closed."""
    sender = {device: number for number, device in devices.items()}
    under_way: list[tuple[float, int, int, bytes]] = []
    count = itertools.count()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([stop, *sender], [], [], wait)
        if stop in ready:
            return
        for device in ready:
            packet = os.read(device, MTU)
            # IPv4 only; the receiver's address ends with its number
            pair = (sender[device], packet[19] if packet[0] >> 4 == 4 else 0)
            if pair in cables and (arrival := cables[pair].arrival(len(packet))) is not None:
                heapq.heappush(under_way, (arrival, next(count), devices[pair[1]], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(under_way)
            with contextlib.suppress(BlockingIOError):
                os.write(device, packet)
