"""`tdds doctor`: what it says of ranks that are well, and that planted faults are found and named.

Faults are real ones: an interface that is not there, a file system mounted to be read, a clock that
runs ahead (a library before libc's), a compiler that fails.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import triton

from tdds_dist.config.run import load_config
from tdds_dist.distributed.board import Board
from tdds_dist.distributed.world import current_world
from tdds_dist.errors import InputError
from tdds_dist.experiments import doctor as stage
from tdds_dist.experiments import doctor_machine, doctor_run, findings
from tdds_dist.experiments.doctor import CHECKS
from tdds_dist.experiments.findings import Check, Finding, Visit, as_table, examine, merge
from tests.jobs import free_port
from tests.ranks import run_ranks

AHEAD_SECONDS = 30
CLOCK = f"""
#define _GNU_SOURCE
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>
int clock_gettime(clockid_t id, struct timespec *now) {{
    int code = syscall(SYS_clock_gettime, id, now);
    if (code == 0 && id == CLOCK_REALTIME) now->tv_sec += {AHEAD_SECONDS};
    return code;
}}
"""


@pytest.fixture(scope="module")
def clock_ahead(tmp_path_factory):
    """A library to preload, with which a process has its clock ahead."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    build = ["cc", "-shared", "-fPIC", "-o", f"{folder}/clock.so", f"{folder}/clock.c"]
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    subprocess.run(build, check=True)
    return str(folder / "clock.so")


@pytest.fixture
def read_only(tmp_path):
    """A folder that nobody can write to, not even root."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    for options in (("--bind", folder), ("-o", "remount,bind,ro")):
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def broken_ptxas(tmp_path):
    """An assembler that knows its version and assembles nothing."""
    path = tmp_path / "ptxas"
    path.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exec {triton.knobs.nvidia.ptxas.path} --version
echo planted >&2; exit 1
""")
    path.chmod(0o755)
    return path


def place(rank, world_size, port):
    """Variables by which a rank finds the others."""
    where = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in (where | {"MASTER_PORT": port}).items()}


def doctor(num_ranks, *words, of_rank=None, **variables):
    """Exit codes of `tdds doctor --json` by rank, and what rank 0 found, by check; `of_rank`:
    variables of one rank."""
    processes, port = [], free_port()
    command = [sys.executable, "-m", "tdds_dist", "doctor", *map(str, words), "--json"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for rank in range(num_ranks):
        told = {"GLOO_SOCKET_IFNAME": "lo"} | variables | (of_rank or {}).get(rank, {})
        if num_ranks > 1:
            told |= place(rank, num_ranks, port)
            told |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
        env = os.environ | {name: str(value) for name, value in told.items()}
        processes.append(subprocess.Popen(command, env=env, **piped))
    said = [process.communicate(timeout=240) for process in processes]
    codes = [process.returncode for process in processes]
    assert "Traceback" not in "".join(err for _, err in said)
    report = json.loads(said[0][0])
    assert report["exit_code"] == codes[0]
    return codes, {check["what"]: check for check in report["checks"]}


def states(checks, *wanted):
    return sorted(name for name, check in checks.items() if check["state"] in wanted)


# ---- what is well


@pytest.mark.slow
def test_one_rank_that_is_well(config_file, tmp_path):
    codes, checks = doctor(1, config_file)
    assert codes == [0]
    assert states(checks, "FAIL") == [], checks
    well = {"process group", "collectives", "kernel", "run directory", "data.train", "room"}
    assert well <= set(states(checks, "OK"))
    for name in ("training", "decoding"):
        assert checks[name]["number"] > 0
    assert not (tmp_path / "run").exists(), "it leaves nothing"
    assert list(tmp_path.iterdir()) == [config_file]


# ---- what is not


@pytest.mark.slow
@pytest.mark.distributed
def test_a_clock_that_is_ahead_on_one_rank(clock_ahead):
    codes, checks = doctor(2, of_rank={1: {"LD_PRELOAD": clock_ahead}})
    assert codes == [2, 2]
    assert states(checks, "FAIL") == ["clocks"]
    assert f"rank 1 on {os.uname().nodename} is {AHEAD_SECONDS}.0" in checks["clocks"]["found"]
    assert {"collectives", "links", "time limits"} <= set(states(checks, "OK"))


@pytest.mark.slow
@pytest.mark.distributed
def test_an_interface_a_file_system_and_a_compiler(config_file, read_only, broken_ptxas):
    faults = {"TRITON_PTXAS_PATH": broken_ptxas, "CC": shutil.which("false")}
    faults |= {"GLOO_SOCKET_IFNAME": "no_such0"}
    codes, checks = doctor(2, config_file, f"run.dir={read_only / 'run'}", **faults)
    assert codes == [2, 2]
    assert states(checks, "FAIL") == ["interface", "process group", "run directory"]
    assert "no_such0" in checks["interface"]["found"]
    assert "GLOO_SOCKET_IFNAME" in checks["interface"]["way_out"]
    assert "Read-only file system" in checks["run directory"]["found"]
    # what a run on the CPU can do without
    assert states(checks, "WARN") == ["C compiler", "kernel"]
    assert "planted" in checks["kernel"]["found"]
    assert {"collectives", "links", "time limits"} <= set(states(checks, "SKIP"))
    assert {"data.train", "decoding", "clocks"} <= set(states(checks, "OK")), "others still ran"


# ---- one check


def alone(seconds=5.0):
    return Visit(Board(seconds), None, torch.device("cpu"))


def fails(visit):
    raise OSError(5, "Input/output error")


def hangs(visit):
    time.sleep(60)
    return []


def fine(visit):
    return [Finding("fine", "OK", "all")]


def in_short(found):
    return [f"{finding.what} {finding.state}" for finding in found]


def test_a_check_that_raises_or_hangs_is_a_finding_and_the_next_one_runs():
    checks = [Check("raises", fails), Check("hangs", hangs, 0.2), Check("fine", fine)]
    found = examine(alone(), checks)
    assert in_short(found) == ["raises FAIL", "hangs FAIL", "fine OK"]
    assert found[0].found == "OSError: [Errno 5] Input/output error"
    assert "no end after 0 s" in found[1].found


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (dist.DistNetworkError("no route to host"), "open all ports between the hosts"),
        (RuntimeError("Gloo: Connection reset by peer"), "open all ports between the hosts"),
        (RuntimeError("CUDA out of memory"), "mend on this rank what the message says"),
        (OSError(28, "No space left on device"), "mend on this rank what the message says"),
    ],
)
def test_only_what_the_network_does_is_mended_by_open_ports(error, way_out):
    def fails_so(visit):
        raise error

    visit = alone()
    visit.world = current_world("cpu")
    (found,) = examine(visit, [Check("together", fails_so, needs="ranks")])
    assert found.state == "FAIL"
    assert found.way_out.startswith(way_out)


@pytest.mark.parametrize(
    ("wanted", "visible", "cuda", "state"),
    [
        ("cpu", "0", "13.0", "SKIP"),
        ("cuda", "", "13.0", "SKIP"),
        ("auto", "0", None, "SKIP"),
        ("auto", "0", "13.0", "WARN"),
        ("cuda", "0", "13.0", "FAIL"),
    ],
)
def test_a_driver_that_torch_cannot_use(
    wanted, visible, cuda, state, config_file, tmp_path, monkeypatch
):
    if torch.cuda.is_available():
        pytest.skip("torch can use the driver here")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 450.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    visit = alone()
    visit.config = load_config(config_file, [f"run.device={wanted}"])
    (driver,) = (line for line in doctor_machine.versions(visit) if line.what == "driver")
    assert driver.state == state


def test_processes_that_nvidia_smi_hides_are_left_out():
    lines = ["12, GPU-a", "[N/A], GPU-b", "12, GPU-c"]
    assert doctor_machine._held(lines) == {12: {"GPU-a", "GPU-c"}}


def test_the_speed_is_that_of_the_eager_network_with_its_precision(config_file, monkeypatch):
    monkeypatch.setattr(doctor_run, "_MEASURE_SECONDS", 0.0)
    visit, usual = alone(), torch.get_float32_matmul_precision()
    visit.left["torch_threads"] = torch.get_num_threads()
    changes = ["model.compile=true", "train.matmul_precision=medium"]
    visit.config = load_config(config_file, changes)
    try:
        (speed,) = doctor_run.network_speed(visit)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(usual)
    assert speed.state == "WARN"
    assert "tiny_network, eager" in speed.found


# ---- ranks that are late, or do not come


def silent_rank(rank, port):
    """Rank 1 does not come to the check; what rank 0 finds."""
    os.environ |= place(rank, 2, port)
    visit = Visit(Board(30.0), None, torch.device("cpu"))
    if rank == 1:
        return []
    visit.world = current_world("cpu")
    findings._LATE_SECONDS = 1.0
    return examine(visit, [Check("together", fine, needs="ranks"), Check("fine", fine)])


def lost_store(rank, port):
    """Rank 0 leaves with the store; what rank 1 finds."""
    os.environ |= place(rank, 2, port)
    visit = Visit(Board(30.0), None, torch.device("cpu"), current_world("cpu"))
    dist.barrier()
    if rank == 0:
        del visit
    dist.barrier()
    if rank == 0:
        return []
    return examine(visit, [Check("together", fine, needs="ranks"), Check("fine", fine)])


@pytest.mark.distributed
@pytest.mark.parametrize(("function", "rank"), [(silent_rank, 0), (lost_store, 1)])
def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_told(function, rank):
    found = run_ranks(2, function, free_port())[rank]
    assert in_short(found) == ["together SKIP", "fine OK"]
    assert found[0].found == f"not tried: rank {1 - rank} did not come"


def late_rank(rank, port):
    """Rank 1 is late, and there is time for one pair only; what rank 0 finds."""
    os.environ |= place(rank, 3, port)
    visit = Visit(Board(30.0), None, torch.device("cpu"), current_world("cpu"))
    visit.left["hosts"] = dict.fromkeys(range(3), "here")
    doctor_machine._LINKS_SECONDS = 0.0
    links = [*doctor_machine.links(visit)]
    time.sleep(3.0 * (rank == 1))
    return [*links, *doctor_machine.time_limits(visit)]


@pytest.mark.distributed
def test_pairs_that_are_not_measured_and_a_rank_that_is_late():
    links, limits = run_ranks(3, late_rank, free_port())[0]
    assert "the slowest of 1 of 3 pairs of ranks (0 s were over)" in links.found
    assert limits.state == "OK", limits


def test_a_rank_without_the_store_stays_for_the_table_of_rank_0(monkeypatch, caplog):
    for name, value in place(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor_machine, "COMING_SECONDS", 1.0)
    monkeypatch.setattr(stage, "_STAY_SECONDS", 2.0)
    started = time.monotonic()
    with pytest.raises(InputError, match="not all 2 ranks came"):
        stage.doctor(None)
    assert time.monotonic() - started > 3.0
    assert f"rank 1 on {os.uname().nodename}: not all" in caplog.text


def test_ranks_that_never_come_are_named_by_rank_0(monkeypatch):
    for name, value in place(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    board = Board(1.0)
    assert "not all 2 ranks came to 127.0.0.1:" in board.problem
    started = time.monotonic()
    assert board.share("topic", "mine", 30.0) == {0: "mine"}
    assert time.monotonic() - started < 10, "it is not waited for again"
    (meeting,) = (check for check in CHECKS if check.name == "process group")
    failed, _ = examine(Visit(board, None, torch.device("cpu")), [meeting, Check("fine", fine)])
    assert (failed.what, failed.state, failed.found) == ("process group", "FAIL", board.problem)


# ---- the table


def test_the_table_has_a_line_per_check_and_names_the_ranks_that_differ():
    def of_rank(rank):
        speed = Finding("links", "OK", f"{9 - rank} GB/s", number=9.0 - rank)
        good = Finding("CPUs", "OK", "2 for 2 ranks")
        bad = Finding("CPUs", "WARN", "1 for 2 ranks", "2", "give more")
        return [Finding("versions", "OK", "torch 2"), speed, bad if rank == 1 else good]

    rows = merge({0: of_rank(0), 1: of_rank(1)}, 3)
    lines = [line.split("  ") for line in as_table(rows, ["a", "b", "c"]).splitlines()]
    words = [[word.strip() for word in line if word.strip()] for line in lines]
    assert words == [
        ["check", "found", "wanted", "way out"],
        words[1],
        ["versions", "torch 2", "OK"],
        ["links", "rank 1 on b: 8 GB/s", "OK"],
        ["CPUs", "rank 1 on b: 1 for 2 ranks", "2", "WARN", "give more"],
        ["ranks", "rank 2 did not report", "a report of all 3", "FAIL", words[-1][-1]],
    ]
