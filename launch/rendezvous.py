"""The meeting point of the ranks of a job: the port of rank 0, and the network interface that leads
to it."""

import fcntl
import socket
import struct
import time

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
_FIRST_PORT, _NUM_PORTS = 20000, 12768  # below those that systems hand out by themselves
_NEXT_RESTART = 4001  # prime to the number of ports, and far from the ports of the next jobs
_RESOLVE_SECONDS = 60.0


def rendezvous_port(job_id: int, restart: int) -> int:
    """Compute a port, the same on all ranks; jobs of neighbouring ids get others, and so does the
    same job after a restart, when the port of its last start may still be in use."""
    return _FIRST_PORT + (job_id + _NEXT_RESTART * restart) % _NUM_PORTS


def is_free(port: int) -> bool:
    """Say whether this host can listen on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def interface_to(host: str) -> str | None:
    """Return the interface by which this host reaches another (lo for itself); None when that
    cannot be told.

    A name that is not known yet (a node that has just been started) is asked for again for a
    minute.
    """
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))  # sends nothing
                address = probe.getsockname()[0]
            break
        except socket.gaierror:
            if time.monotonic() >= deadline:
                return None
            time.sleep(2.0)
        except OSError:
            return None
    if address.startswith("127."):
        return "lo"
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def _address_of(interface: str) -> str | None:
    request = struct.pack("256s", interface[:15].encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:  # no address
            return None
