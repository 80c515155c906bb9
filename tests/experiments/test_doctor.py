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
import triton

from tdds_dist.distributed.board import Board
from tdds_dist.distributed.world import current_world
from tdds_dist.experiments import findings
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


def doctor(num_ranks, *words, of_rank=None, **variables):
    """Exit codes of `tdds doctor --json` by rank, and what rank 0 found, by check; `of_rank`:
    variables of one rank."""
    processes, port = [], free_port()
    for rank in range(num_ranks):
        where = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        told = {"GLOO_SOCKET_IFNAME": "lo"} | (where if num_ranks > 1 else {}) | variables
        told |= (of_rank or {}).get(rank, {})
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tdds_dist", "doctor", *map(str, words), "--json"],
                env=os.environ | {name: str(value) for name, value in told.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=240) for process in processes]
    codes = [process.returncode for process in processes]
    assert "Traceback" not in "".join(err for _, err in said)
    report = json.loads(said[0][0])
    assert report["exit_code"] == codes[0]
    return codes, {check["what"]: check for check in report["checks"]}


def states(checks, *wanted):
    return sorted(name for name, check in checks.items() if check["state"] in wanted)


# ---- what is well


def test_one_rank_that_is_well(config_file, tmp_path):
    codes, checks = doctor(1, config_file)
    assert codes == [0]
    assert states(checks, "FAIL") == [], checks
    assert {"process group", "collectives", "kernel", "run directory", "data.train", "room"} <= set(
        states(checks, "OK")
    )
    for name in ("training", "decoding"):
        assert checks[name]["number"] > 0
    assert not (tmp_path / "run").exists(), "it leaves nothing"
    assert list(tmp_path.iterdir()) == [config_file]


# ---- what is not


@pytest.mark.distributed
def test_a_clock_that_is_ahead_on_one_rank(clock_ahead):
    codes, checks = doctor(2, of_rank={1: {"LD_PRELOAD": clock_ahead}})
    assert codes == [2, 2]
    assert states(checks, "FAIL") == ["clocks"]
    assert f"rank 1 on {os.uname().nodename} is {AHEAD_SECONDS}.0" in checks["clocks"]["found"]
    assert {"collectives", "links", "time limits"} <= set(states(checks, "OK"))


@pytest.mark.distributed
def test_an_interface_a_file_system_and_a_compiler(config_file, read_only, broken_ptxas):
    codes, checks = doctor(
        2,
        config_file,
        f"run.dir={read_only / 'run'}",
        GLOO_SOCKET_IFNAME="no_such0",
        TRITON_PTXAS_PATH=broken_ptxas,
        CC=shutil.which("false"),
    )
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


def test_a_check_that_raises_or_hangs_is_a_finding_and_the_next_one_runs():
    checks = [Check("raises", fails), Check("hangs", hangs, 0.2), Check("fine", fine)]
    found = examine(alone(), checks)
    assert [(finding.what, finding.state) for finding in found] == [
        ("raises", "FAIL"),
        ("hangs", "FAIL"),
        ("fine", "OK"),
    ]
    assert found[0].found == "OSError: [Errno 5] Input/output error"
    assert "no end after 0 s" in found[1].found


def silent_rank(rank, port):
    """Rank 1 does not come to the check; what rank 0 finds."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    visit = Visit(Board(30.0), None, torch.device("cpu"))
    if rank == 1:
        return []
    visit.world = current_world("cpu")
    findings._LATE_SECONDS = 1.0
    return examine(visit, [Check("together", fine, needs="ranks"), Check("fine", fine)])


@pytest.mark.distributed
def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_told():
    found = run_ranks(2, silent_rank, free_port())[0]
    assert [(finding.what, finding.state) for finding in found] == [
        ("together", "SKIP"),
        ("fine", "OK"),
    ]
    assert found[0].found == "not tried: rank 1 did not come"


def test_ranks_that_never_come_are_named_by_rank_0(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }.items():
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
        bad = Finding("CPUs", "WARN", "1 for 2 ranks", "2", "give more")
        return [
            Finding("versions", "OK", "torch 2"),
            speed,
            bad if rank == 1 else Finding("CPUs", "OK", "2 for 2 ranks"),
        ]

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
