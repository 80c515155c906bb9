"""Checks that need no config: programs and devices of this host, and what is between the hosts."""

# W ranks

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch

from tdds_dist.data.loader import default_workers, has_tbb, torch_threads
from tdds_dist.distributed import collectives
from tdds_dist.distributed.world import (
    World,
    current_world,
    gpus_are_hidden,
    ranks_per_cpu,
    session,
)
from tdds_dist.errors import InputError
from tdds_dist.experiments.findings import Finding, State, Visit, words_of
from tdds_dist.text import size_text

COMING_SECONDS = 120.0  # that ranks have to start, each on a node that may be slow at first
MEETING_SECONDS = 20.0  # that ranks which are there have to meet, and a collective to end
_ANSWER_SECONDS = 30.0  # for other ranks to come to the same check
_BROKEN_SECONDS = 2.0  # time limit of the collective that is broken on purpose
_WARN_SKEW, _FAIL_SKEW = 1.0, 10.0  # seconds
_SHARED_MEMORY_BYTES = 256e6  # per rank of a node; NCCL and the workers of `tdds write` use it
_PINNED_BYTES = 64 << 20
_LINK_BYTES = 4 << 20  # that one rank sends to another when the speed is measured
_LINK_ROUNDS = 3
_LINKS_SECONDS = 10.0  # after which no further pair is measured
_VERSIONS = ("torch", "torchvision", "triton", "ffcv", "numba", "numpy", "tdds-dist")


# ---- programs and devices


def versions(visit: Visit) -> Iterator[Finding]:
    """Compare versions with those of rank 0, and the driver with what torch was built for."""
    mine = {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS}
    everyones = visit.board.share("versions", mine, _ANSWER_SECONDS)
    first = everyones.get(0, mine)
    other = [
        f"{name} {mine[name]}, not {first[name]}" for name in mine if mine[name] != first[name]
    ]
    shown = ", ".join(f"{name} {mine[name]}" for name in ("python", "torch", "triton", "ffcv"))
    yield Finding(
        "versions",
        "FAIL" if other else "OK",
        ", ".join(other) or shown,
        "the same on all ranks",
        "install the same environment on every node, e.g. one on a shared file system",
    )
    wanted = visit.config.run.device if visit.config else "auto"
    driver = _nvidia_smi("--query-gpu=driver_version")
    unused = ""
    if wanted == "cpu":
        unused = "run.device=cpu"
    elif gpus_are_hidden():
        unused = "CUDA_VISIBLE_DEVICES shows no GPU"
    elif not torch.version.cuda:
        unused = f"torch {torch.__version__} is built without CUDA"
    if unused:
        yield Finding("driver", "SKIP", f"{unused}; all is checked on the CPU")
    elif torch.cuda.is_available():
        yield Finding("driver", "OK", f"{driver[0] if driver else '?'}, CUDA {torch.version.cuda}")
    elif driver:
        yield Finding(
            "driver",
            "FAIL" if wanted == "cuda" else "WARN",
            f"{driver[0]}, with which torch {torch.__version__} finds no device",
            f"a driver for CUDA {torch.version.cuda}",
            "update the driver, install a torch built for an older CUDA, or set run.device=cpu;"
            " see CUDA_VISIBLE_DEVICES as well",
        )
    else:
        yield Finding("driver", "SKIP", "no NVIDIA driver here; all is checked on the CPU")


def devices(visit: Visit) -> Iterator[Finding]:
    """Check the device of this rank, and that no other rank has the same."""
    wanted = visit.config.run.device if visit.config else "auto"
    if visit.device.type != "cuda":
        missing = wanted == "cuda"
        yield Finding(
            "device",
            "FAIL" if missing else "OK",
            "no CUDA device visible" if missing else "the CPU",
            f"run.device={wanted}",
            "ask for GPUs, or set run.device=cpu",
        )
        return
    number = visit.device.index or 0
    properties = torch.cuda.get_device_properties(number)
    mine = [socket.gethostname(), str(getattr(properties, "uuid", number))]
    everyones = visit.board.share("device", mine, _ANSWER_SECONDS)
    same = [rank for rank, theirs in everyones.items() if theirs == mine and rank != visit.rank]
    yield Finding(
        "device",
        "FAIL" if same else "OK",
        f"{properties.name}, {size_text(properties.total_memory)}"
        + (f", as rank {same[0]} has it too" if same else ""),
        "one of its own for every rank",
        "start as many ranks per node as there are GPUs",
    )


def contexts(visit: Visit) -> Iterator[Finding]:
    """Check that each process holds a context on one GPU only, and that nobody else is on it."""
    if visit.device.type != "cuda":
        return
    torch.ones(1, device=visit.device).item()  # makes the context of this rank
    pids = visit.board.share("pid", [socket.gethostname(), os.getpid()], _ANSWER_SECONDS)
    lines = _nvidia_smi("--query-compute-apps=pid,gpu_uuid")
    if not lines:
        yield Finding("contexts", "SKIP", "nvidia-smi lists no processes here")
        return
    ours = {pid for host, pid in pids.values() if host == socket.gethostname()}
    held = _held(lines)
    if not ours & held.keys():
        yield Finding(
            "contexts", "SKIP", "nvidia-smi counts processes otherwise here (a container)"
        )
        return
    several = [pid for pid, uuids in held.items() if pid in ours and len(uuids) > 1]
    foreign = sorted(held.keys() - ours)
    problem = ""
    if several:
        problem = f"process {several[0]} on {len(held[several[0]])} GPUs"
    elif foreign:
        problem = f"processes of others: {', '.join(map(str, foreign[:4]))}"
    yield Finding(
        "contexts",
        "WARN" if problem else "OK",
        problem or "one GPU for each rank",
        "one GPU for each rank, and nobody else",
        "they take memory of the GPU (nvidia-smi)",
    )


def _held(lines: list[str]) -> dict[int, set[str]]:
    """Return the GPUs of each process, from lines "pid, uuid"; a pid that is hidden ("[N/A]") is
    left out."""
    held: dict[int, set[str]] = {}
    for line in lines:
        pid, _, uuid = line.partition(",")
        if pid.strip().isdecimal():
            held.setdefault(int(pid), set()).add(uuid.strip())
    return held


def processors(visit: Visit) -> Iterator[Finding]:
    """Check the CPUs of this rank, and the library that decodes on them."""
    place = {"host": socket.gethostname(), "cpus": sorted(os.sched_getaffinity(0))}
    places = visit.board.share("CPUs", place, _ANSWER_SECONDS)
    num_cpus, sharing = len(place["cpus"]), ranks_per_cpu(place, [*places.values()])
    data = visit.config.data if visit.config else None
    workers = (data.num_workers if data else 0) or default_workers(sharing)
    visit.left |= {"workers": workers, "torch_threads": torch_threads(sharing)}
    few = num_cpus < sharing
    yield Finding(
        "CPUs",
        "WARN" if few else "OK",
        f"{num_cpus} for {sharing} rank{'s' * (sharing > 1)}, {workers} decoding thread"
        f"{'s' * (workers > 1)} each",
        "a CPU or more for every rank",
        "raise cpus_per_rank of the cluster file (--cpus-per-task)",
        number=workers,
    )
    layer = os.environ.get("NUMBA_THREADING_LAYER", "")
    found = has_tbb()
    yield Finding(
        "TBB",
        "OK" if found or layer != "tbb" else "FAIL",
        f"NUMBA_THREADING_LAYER={layer}, TBB " + ("there" if found else "not found"),
        "libtbb.so.12",
        "install Debian's libtbb12, or `pip install tbb`",
    )


def compiler(visit: Visit) -> Iterator[Finding]:
    """Build a module of Python with the compiler that Triton takes for the code which starts a
    kernel."""
    name = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    wanted = "on CUDA: one that builds for this Python"
    bad: State = "FAIL" if visit.device.type == "cuda" else "WARN"
    way_out = "install gcc and the headers of Python (python3-dev), or set CC"
    if name is None:
        yield Finding("C compiler", bad, "none (no CC, gcc or clang)", wanted, way_out)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "module.c"
        source.write_text("#include <Python.h>\nvoid *nothing(void) { return PyList_New(0); }\n")
        include = f"-I{sysconfig.get_paths()['include']}"
        built = source.with_suffix(".so")
        done = subprocess.run(
            [name, str(source), "-shared", "-fPIC", include, "-o", str(built)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        works = done.returncode == 0 and built.is_file()
    said = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
    found = name if works else f"{name}: {said}"
    yield Finding("C compiler", "OK" if works else bad, found, wanted, way_out)


def host_memory(visit: Visit) -> Iterator[Finding]:
    """Check /dev/shm, and that memory can be pinned."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, wanted = shutil.disk_usage("/dev/shm").free, _SHARED_MEMORY_BYTES * local
    yield Finding(
        "/dev/shm",
        "OK" if free >= wanted else "WARN",
        f"{size_text(free)} free",
        f"{size_text(wanted)} for {local} rank{'s' * (local > 1)}",
        "in a container: --shm-size=8g (docker), or mount the host's",
    )
    if visit.device.type != "cuda":
        return
    started = time.perf_counter()
    torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    seconds = time.perf_counter() - started
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limit = "unlimited" if locked == resource.RLIM_INFINITY else size_text(locked)
    yield Finding(
        "pinned memory", "OK", f"{size_text(_PINNED_BYTES)} in {seconds:.2f} s, memlock {limit}"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _nvidia_smi(query: str) -> list[str]:
    """Return the lines of an answer; none where there is no nvidia-smi, or it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [line.strip() for line in lines if line.strip()]


# ---- between the ranks


def interface(visit: Visit) -> Iterator[Finding]:
    """Check that the interfaces which gloo and NCCL are told to take are there."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        told = os.environ.get(variable, "")
        if not told or (variable.startswith("NCCL") and visit.device.type != "cuda"):
            continue
        # NCCL takes names as beginnings of names, unless = stands before them; ^ excludes
        listed = "" if told.startswith("^") else told.lstrip("=")
        is_prefix = variable.startswith("NCCL") and not told.startswith("=")
        missing = [
            name
            for name in (part.split(":")[0] for part in listed.split(",") if part)
            if not any(other.startswith(name) if is_prefix else other == name for other in here)
        ]
        yield Finding(
            "interface",
            "FAIL" if missing else "OK",
            f"{variable}={told}" + (f", and no interface {missing[0]}" if missing else ""),
            f"one of {', '.join(here)}",
            f"unset {variable}, or set the one that leads to the other hosts (`interface` of the"
            " cluster file)",
        )


def meeting(visit: Visit) -> Iterator[Finding]:
    """Make the process group, as a training does."""
    num_ranks = visit.board.world_size
    started = time.perf_counter()
    if visit.device.type == "cuda":
        # an error, not the end of the process, when an exchange does not end in time
        os.environ |= {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    try:
        if visit.board.problem:
            raise InputError(visit.board.problem)
        visit.world = visit.stack.enter_context(session(visit.device.type, MEETING_SECONDS))
    except Exception as error:
        yield Finding(
            "process group",
            "FAIL",
            words_of(error),
            f"{num_ranks} rank{'s' * (num_ranks > 1)} that reach each other",
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (`interface` of the cluster file) to an"
            " interface that leads from host to host; open its ports to the hosts",
        )
        return
    visit.device, seconds = visit.world.device, time.perf_counter() - started
    yield Finding(
        "process group",
        "OK",
        f"{num_ranks} rank{'s' * (num_ranks > 1)} met in {seconds:.1f} s"
        f" ({'NCCL' if visit.device.type == 'cuda' else 'gloo'})",
    )


def exchanges(visit: Visit) -> Iterator[Finding]:
    """Check the collectives of a step: sums, and rows to their owners, uneven and to some none."""
    world = current_world(visit.device)
    W, rank = world.world_size, world.rank
    total = collectives.sum_over_ranks(torch.full((1000,), rank + 1.0, device=world.device))
    if not bool((total == W * (W + 1) / 2).all()):
        yield _wrong("all_reduce", f"{total[0].item():g}", f"{W * (W + 1) / 2:g}")
        return
    for name, num_rows in (("uneven", lambda a, b: (a + 2 * b) % 3 + 1), ("empty", _mostly_none)):
        sends = [num_rows(rank, to) for to in range(W)]
        receives = [num_rows(sender, rank) for sender in range(W)]
        rows = [torch.full((sends[to], 7), 100 * rank + to) for to in range(W)]
        got = collectives.exchange_rows(torch.cat(rows).to(world.device), sends, receives).wait()
        expected = torch.cat([torch.full((receives[by], 7), 100 * by + rank) for by in range(W)])
        if not torch.equal(got.cpu(), expected):
            yield _wrong(f"all_to_all_single, {name}", "other rows", "those that were sent")
            return
    yield Finding("collectives", "OK", "all_reduce, all_to_all_single (uneven, empty) are right")


def _mostly_none(sender: int, receiver: int) -> int:
    return int(sender == 0 or receiver == sender + 1)


def _wrong(what: str, found: str, wanted: str) -> Finding:
    return Finding(
        "collectives",
        "FAIL",
        f"{what} gives {found}",
        wanted,
        "another version of NCCL or its driver; try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1",
    )


def links(visit: Visit) -> Iterator[Finding]:
    """Measure every pair of nodes (of ranks, on one node) by the exchange that a step makes."""
    world = current_world(visit.device)
    firsts = [rank for rank, host in enumerate(visit.hosts) if host not in visit.hosts[:rank]]
    over_nodes = len(firsts) > 1
    ends = firsts if over_nodes else list(range(world.world_size))
    if len(ends) < 2:
        yield Finding("links", "SKIP", "one rank, nothing to send")
        return
    speeds: dict[tuple[int, int], float] = {}
    deadline = time.monotonic() + _LINKS_SECONDS
    for pair in combinations(ends, 2):
        speeds[pair] = _speed(world, pair)
        # all leave at the same pair
        late = torch.tensor([float(time.monotonic() > deadline)], device=world.device)
        if collectives.sum_over_ranks(late).item():
            break
    slowest, speed = min(speeds.items(), key=lambda item: item[1])
    visit.left["link"] = speed
    names = [visit.hosts[rank] if over_nodes else f"rank {rank}" for rank in slowest]
    median = sorted(speeds.values())[len(speeds) // 2]
    is_odd = speed < median / 3
    num_pairs = len(ends) * (len(ends) - 1) // 2
    of_all = f"{len(speeds)} of " if len(speeds) < num_pairs else ""
    pairs = f"{num_pairs} pair{'s' * (num_pairs > 1)} of {'nodes' if over_nodes else 'ranks'}"
    yield Finding(
        "links",
        "WARN" if is_odd else "OK",
        f"{size_text(speed)}/s each way between {names[0]} and {names[1]}, the slowest of"
        f" {of_all}{pairs}" + (f" ({_LINKS_SECONDS:g} s were over)" if of_all else ""),
        f"about as fast as the others ({size_text(median)}/s)" if len(speeds) > 1 else "",
        "look at the network of these two",
        number=speed,
    )


def _speed(world: World, pair: tuple[int, int]) -> float:
    """Return bytes per second each way between two ranks; the others take part with nothing."""
    other = {pair[0]: pair[1], pair[1]: pair[0]}.get(world.rank)
    num_rows = _LINK_BYTES // 4096
    splits = [num_rows * (rank == other) for rank in range(world.world_size)]
    rows = torch.zeros(sum(splits), 1024, device=world.device)
    times = []
    for _ in range(_LINK_ROUNDS + 1):
        collectives.barrier()
        started = time.perf_counter()
        collectives.exchange_rows(rows, splits, splits).wait()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    slower = torch.tensor([-min(times[1:])], dtype=torch.float64, device=world.device)
    return _LINK_BYTES / -float(collectives.min_over_ranks(slower))


def time_limits(visit: Visit) -> Iterator[Finding]:
    """Check that a collective of gloo which a rank does not join ends by its time limit."""
    world = current_world(visit.device)
    if world.world_size == 1:
        yield Finding("time limits", "SKIP", "one rank, nobody to wait for")
        return
    group = collectives.control_group(MEETING_SECONDS)
    if not world.is_main:
        time.sleep(_BROKEN_SECONDS + 0.5)
        return
    started = time.perf_counter()
    ended = collectives.ends_in_time(group, _BROKEN_SECONDS)
    seconds = time.perf_counter() - started
    yield Finding(
        "time limits",
        "OK" if ended else "FAIL",
        f"gloo's, without the other ranks: an error after {seconds:.1f} s (NCCL's is not tried)"
        if ended
        else "gloo's: a collective without the other ranks came to an end",
        f"an error after {_BROKEN_SECONDS:g} s",
        "another version of torch",
    )


def clocks(visit: Visit) -> Iterator[Finding]:
    """Compare the clocks of the hosts with that of rank 0."""
    offsets = visit.board.clock_offsets(_ANSWER_SECONDS)
    if visit.rank != 0:
        return
    if len(offsets) == 1:
        alone = visit.board.world_size == 1
        yield Finding("clocks", "SKIP", "one rank, one clock" if alone else "no other rank came")
        return
    worst = max(offsets, key=lambda rank: abs(offsets[rank][0]))
    offset, around = offsets[worst]
    state: State = (
        "OK" if abs(offset) < _WARN_SKEW else "WARN" if abs(offset) < _FAIL_SKEW else "FAIL"
    )
    where = f"rank {worst} on {visit.hosts[worst]}"
    yield Finding(
        "clocks",
        state,
        f"{where} is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} rank 0"
        f" (give or take {around:.3f} s)",
        f"less than {_WARN_SKEW:g} s; {_FAIL_SKEW:g} s upset the leave before a time limit",
        "set the clock of that host by NTP (`chronyc tracking`)",
    )
