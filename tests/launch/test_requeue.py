"""What a job does around the ranks of `tdds`: how they find each other, what they are told, and
what happens when they end.

No SLURM: its variables are set by hand, the files of the ranks are real.
"""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
from submitit.core.utils import DelayedSubmission, UncompletedJobError, cloudpickle_dump

from tdds_dist.launch import rendezvous, requeue, task
from tdds_dist.launch.cluster import Cluster
from tdds_dist.launch.records import (
    EndRecord,
    JobRecord,
    append_end,
    append_job,
    first_cause,
    read_ends,
)
from tdds_dist.launch.scheduler import REQUEUE, sbatch_text
from tdds_dist.launch.task import StageTask
from tdds_dist.runs.lock import IN_USE

REPOSITORY = Path(__file__).resolve().parents[2]
PLACE = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Job 12 of SLURM, and whatever is set afterwards goes again."""
    before = dict(os.environ)
    for key in before:
        if key in (*PLACE, *INTERFACES) or key.startswith(("SLURM_", "SUBMITIT_", "TDDS_")):
            del os.environ[key]
    os.environ["SLURM_JOB_ID"] = "12"
    yield
    os.environ.clear()
    os.environ.update(before)


def end(folder, kind, *, rank=0, restart=0, job="12", **fields):
    told = {"host": f"node{rank}", "message": f"{kind} it said"} | fields
    append_end(folder, job, EndRecord(kind, rank, time.time(), restart, **told))


def done(folder, *ranks, job="12", outcome="success"):
    """What submitit writes when a rank has returned, or raised."""
    for rank in ranks:
        cloudpickle_dump((outcome, None), folder / f"{job}_{rank}_result.pkl")


def ended(folder, code=1, requeue_failures=3, num_ranks=4):
    return requeue.main([str(folder), str(code), str(num_ranks), str(requeue_failures)])


def failures_in(folder):
    """Those of job 12 that were counted."""
    lines = [path.read_text().splitlines() for path in folder.glob("12_failures.jsonl")]
    return [json.loads(line) for line in chain(*lines)]


class Naps(list):
    """Seconds that passed at once; `then` is called after each nap."""

    then = staticmethod(lambda: None)


@pytest.fixture
def naps(monkeypatch):
    naps = Naps()

    def sleep(seconds):
        naps.append(seconds)
        naps.then()

    clock = {"time": time.time, "monotonic": lambda: sum(naps), "sleep": sleep}
    monkeypatch.setattr(requeue, "time", SimpleNamespace(**clock))
    return naps


# ---- after the ranks


@pytest.mark.parametrize("code", [0, 1, 137])
def test_when_every_rank_is_done_the_job_is_whatever_srun_says(tmp_path, capsys, naps, code):
    """srun leaves with another code when a node's slurmstepd was killed."""
    end(tmp_path, "lost", rank=1)  # of an earlier start
    done(tmp_path, 0, 1, 2, 3)
    assert ended(tmp_path, code) == 0
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.glob("*failures*"))
    assert naps == []


def test_success_that_a_rank_knows_nothing_of_is_none(tmp_path, capsys, naps):
    """srun leaves with 0 when its step was aborted. A file of another node may take a while to be
    seen."""
    done(tmp_path, 0, 1, 3)
    done(tmp_path, 2, job="1")
    assert ended(tmp_path, 0) == REQUEUE
    assert 20 < sum(naps) < 60
    assert "queued again: ranks ended without a word" in capsys.readouterr().err
    end(tmp_path, "failed", rank=2)
    assert ended(tmp_path, 0) == 1
    naps.clear()
    assert ended(tmp_path, 9) == 9
    assert naps == []  # no success to wait for
    naps.then = lambda: done(tmp_path, 2) if sum(naps) >= 5 else None
    assert ended(tmp_path, 0) == 0
    assert 5 <= sum(naps) < 7


def test_a_rank_that_raised_is_not_done(tmp_path, naps):
    done(tmp_path, 0, outcome="error")
    assert ended(tmp_path, 1, num_ranks=1) == 1


@pytest.mark.parametrize(
    ("kinds", "left", "told"),
    [
        # The earliest of the most telling kind, whatever the exit code of srun.
        ("lost0 failed1 refused2", None, "failed on rank 1 (node1): failed it said"),
        ("lost0 refused1", None, "refused on rank 1 (node1): refused it said"),
        ("lost1 lost3 failed2 failed0", None, "failed on rank 2 (node2): failed it said"),
        ("resume0 failed1", None, "failed on rank 1 (node1): failed it said"),
        # What rank 0 has queued again, or only saved, is left alone.
        ("requeued0", None, ""),
        ("lost1 requeued0", None, ""),
        ("failed1 requeued0", None, ""),
        ("resume0", 75, ""),
        ("resume0 resume1", 75, ""),
        ("requeue0", REQUEUE, ""),
        # Ranks that lost each other or said nothing are queued again.
        ("resume0 lost1", REQUEUE, "queued again: rank 1 (node1): lost it said"),
        ("lost0 lost1", REQUEUE, "queued again: rank 0 (node0): lost it said"),
        ("lost1", REQUEUE, "queued again: rank 1 (node1): lost it said"),
        ("", REQUEUE, "queued again: ranks ended without a word (srun: {code})"),
    ],
)
def test_what_becomes_of_a_job_by_what_its_ranks_said(tmp_path, capsys, kinds, left, told):
    for word in kinds.split():
        end(tmp_path, word[:-1], rank=int(word[-1]))
    for code in (1, 2, 137):
        assert ended(tmp_path, code) == (left or code)
        said = told.format(code=code)
        assert capsys.readouterr().err == (f"tdds: job 12 {said}\n" if said else "")
    counted = [failure["what"] for failure in failures_in(tmp_path)]
    assert bool(counted) == told.startswith("queued again: ")
    if counted:
        assert counted[-1] == said.removeprefix("queued again: ")


def test_the_traceback_is_printed_once(tmp_path, capsys):
    for rank in (2, 0, 1):
        error, traceback = f"ZeroDivisionError: {rank}", f"Traceback\n  of rank {rank}\n"
        end(tmp_path, "failed", rank=rank, message=error, traceback=traceback)
    assert ended(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("Traceback") == 1
    assert "ZeroDivisionError: 2\nTraceback\n  of rank 2" in error


def test_only_the_ends_of_this_restart_count(tmp_path, capsys, monkeypatch):
    end(tmp_path, "failed", rank=1, restart=0)
    end(tmp_path, "requeued", rank=0, restart=1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert ended(tmp_path, 9) == REQUEUE
    assert "without a word" in capsys.readouterr().err
    end(tmp_path, "refused", rank=3, restart=2)
    assert ended(tmp_path, 2) == 2
    assert "refused on rank 3" in capsys.readouterr().err


def test_tasks_of_an_array_do_not_read_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    for other in ("12", "12_0", "12_11", "15", "1"):
        end(tmp_path, "refused", job=other)
    assert ended(tmp_path) == REQUEUE
    again = "queued again: ranks ended without a word (srun: 1)"
    assert capsys.readouterr().err == f"tdds: job 12_1 {again}\n"
    assert [path.name for path in tmp_path.glob("*_failures.jsonl")] == ["12_1_failures.jsonl"]
    end(tmp_path, "failed", job="12_1", rank=12)
    assert ended(tmp_path) == 1
    assert "job 12_1 failed on rank 12" in capsys.readouterr().err


def checkpoint(run, step):
    (run / "checkpoints" / f"step_{step:010}").mkdir(parents=True)


@pytest.fixture
def listed(tmp_path):
    """A run that the job is known to work on."""
    run = tmp_path / "run"
    run.mkdir()
    for job_id, directory in (("11", tmp_path / "other"), ("12", run)):
        append_job(tmp_path, JobRecord(job_id, stage="collect", directory=str(directory)))
    return run


def test_failures_in_a_row_without_a_new_checkpoint_are_counted(tmp_path, listed, capsys):
    """Three are forgiven, and again three after each new checkpoint."""
    for step in (None, 5, 10):
        if step:
            checkpoint(listed, step)
        assert [ended(tmp_path) for _ in range(3)] == [REQUEUE] * 3
    assert "gave up" not in capsys.readouterr().err
    assert ended(tmp_path, 137) == 137
    why = "gave up: ranks ended without a word (srun: 137). That is failure 4 in a row without a"
    why += " new checkpoint (requeue_failures=3); submit again to go on"
    assert capsys.readouterr().err == f"tdds: job 12 {why}\n"
    (found,) = read_ends(tmp_path, "12")
    assert (found.kind, found.restart, found.message) == ("gave_up", 0, why)
    progress = [failure["progress"] for failure in failures_in(tmp_path)]
    assert progress == ["", "", "", *["step_0000000005"] * 3, *["step_0000000010"] * 4]


def test_a_job_that_gives_up_does_so_by_the_rank_that_was_lost_first(tmp_path, listed):
    for rank, when in ((0, 3.0), (2, 2.0)):
        append_end(tmp_path, "12", EndRecord("lost", rank, when, host=f"n{rank}", message="gone"))
    assert ended(tmp_path, 1, 0) == 1
    found = first_cause(read_ends(tmp_path, "12"))
    assert (found.kind, found.rank, found.host) == ("gave_up", 2, "n2")
    assert found.message.startswith("gave up: rank 2 (n2): gone. That is failure 1 in a row")


def test_a_job_whose_failures_cannot_be_counted_is_not_queued_again(tmp_path, listed, capsys):
    (tmp_path / "12_failures.jsonl").mkdir()
    assert ended(tmp_path, 137) == 137
    error = capsys.readouterr().err
    assert error.startswith("tdds: job 12 ranks ended without a word (srun: 137); it is not queued")
    cause = f"cannot be written ([Errno 21] Is a directory: '{tmp_path}/12_failures.jsonl')"
    assert error.endswith(f"{cause}; see to that, and submit again to go on\n")


def test_what_is_no_checkpoint_is_no_progress(tmp_path, listed):
    """And how many failures are forgiven is the cluster file's to say."""
    assert ended(tmp_path, 3, 0) == 3
    assert ended(tmp_path, 3, 2) == REQUEUE
    for name in "step_0000000005.damaged step_0000000007.abandoned step_x step_ other".split():
        (listed / "checkpoints" / name).mkdir(parents=True)
    checkpoint(listed.parent / "other", 5)
    assert ended(tmp_path, 3, 2) == 3


def test_a_job_that_is_not_listed_has_no_progress(tmp_path, monkeypatch):
    """Nor does what happens to lie in the working directory count."""
    checkpoint(tmp_path, 5)
    monkeypatch.chdir(tmp_path)
    assert [ended(tmp_path, 1, 1) for _ in range(2)] == [REQUEUE, 1]
    assert failures_in(tmp_path)[0]["progress"] == ""


def test_damaged_lines_of_ranks_and_jobs_are_passed_over(tmp_path, listed, capsys):
    (tmp_path / "12_0_end.jsonl").write_bytes(
        b'\xff\xfe\x00{"kind": "fai\n{"kind": 3}\n[]\nnull\n{"rank": 1}\n{"kind": "lo'
    )
    with (tmp_path / "jobs.jsonl").open("ab") as file:
        file.write(b'{"id": \n\xff\n{"id": 12}\n{"id": "12", "dir')
    (tmp_path / "12_x_end.jsonl").write_text('{"kind": "failed"}\n')
    (tmp_path / "12_3_end.jsonl").mkdir()
    checkpoint(listed, 5)
    assert ended(tmp_path) == REQUEUE
    assert "without a word" in capsys.readouterr().err
    assert [failure["progress"] for failure in failures_in(tmp_path)] == ["step_0000000005"]
    # the writer that was killed had no end of line
    end(tmp_path, "failed", rank=0, message="whole")
    assert ended(tmp_path) == 1
    assert "failed on rank 0 (node0): whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    "left", [b'{"time": 1.0, "progr', b"\xff\xfe\n", b"{}\n", b"[1]\n", b'{"progress": ""}\nnull\n']
)
def test_a_damaged_count_of_failures_does_not_end_the_job(tmp_path, left):
    (tmp_path / "12_failures.jsonl").write_bytes(left)
    assert ended(tmp_path) == REQUEUE


# ---- the end of an sbatch file, as bash runs it


def run_sbatch_file(folder, code, *, shown="", after=None, variables=(), more="", **cluster):
    """Run the file with stand-ins for srun (which does `more`), scontrol and sleep; what it
    returned, and what scontrol was told. With `after`, a stand-in for the requeueing leaves with
    that code."""
    told, log_dir, bin_ = folder / "scontrol.txt", folder / "log dir", folder / "bin"
    told.unlink(missing_ok=True)
    log_dir.mkdir(exist_ok=True)
    bin_.mkdir(exist_ok=True)
    srun = f'echo "srun: TDDS_JOB_STARTED=$TDDS_JOB_STARTED SETUP=$SETUP"; {more} exit {code}'
    for name, body in {
        "srun": srun,
        "scontrol": f'echo "$@" >>{told}; echo "{shown}"',
        "python": f"exit {after}",
        "sleep": "exec /bin/sleep 0.1",
    }.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    venv = None if after is None else str(folder)
    cluster = Cluster(executor="slurm", time_minutes=5, venv=venv, **cluster)
    script = folder / "job.sh"
    script.write_text(sbatch_text(cluster, "name", log_dir, 1))
    if code == 0:
        done(log_dir, *range(cluster.num_ranks))
    env = os.environ | dict(variables) | {"PATH": f"{bin_}:{os.environ['PATH']}"}
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 120}
    left = subprocess.run(["bash", str(script)], env=env, **options)
    return left, told.read_text() if told.exists() else ""


def test_the_sbatch_file_leaves_with_what_the_ranks_left_with(tmp_path):
    cluster = {"setup": ("export SETUP='a b'",), "nodes": 2, "ranks_per_node": 3}
    left, told = run_sbatch_file(tmp_path, 0, **cluster)
    assert (left.returncode, told, left.stderr) == (0, "", "")
    started = float(left.stdout.split()[1].partition("=")[2])
    assert abs(started - time.time()) < 30
    assert left.stdout.endswith("SETUP=a b\n")
    (tmp_path / "log dir" / "12_5_result.pkl").unlink()
    end(tmp_path / "log dir", "refused")
    left, told = run_sbatch_file(tmp_path, 2, **cluster)
    assert (left.returncode, told) == (2, "")
    assert left.stderr == "tdds: job 12 refused on rank 0 (node0): refused it said\n"


@pytest.mark.parametrize(
    ("shown", "queued"),
    [
        ("JobId=12 PreemptTime=2099-01-01T00:00:00 X=1", True),
        ("JobId=12 PreemptTime=2001-01-01T00:00:00 X=1", False),
        ("JobId=12 PreemptTime=None X=1", False),
        ("", False),
    ],
)
def test_a_job_that_left_because_it_was_preempted_in_this_start_is_queued_again(
    tmp_path, shown, queued
):
    left, told = run_sbatch_file(tmp_path, 143, shown=shown, after=75)
    assert ("requeue 12" in told) == queued
    assert left.returncode == (REQUEUE if queued else 75)


def test_the_sbatch_file_queues_itself_again(tmp_path):
    """A task of an array by its own number: that of the array would be all of it."""
    array = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    left, told = run_sbatch_file(tmp_path, 137, variables=array)
    assert told == "requeue 15\n"
    assert left.returncode == REQUEUE
    assert "job 12_3 queued again" in left.stderr


def test_an_srun_that_never_hears_of_a_rank_is_ended(tmp_path):
    ends = tmp_path / "log dir" / "12_0_end.jsonl"
    more = f"""echo '{{"kind": "lost"}}' >>'{ends}'; while :; do /bin/sleep 0.1; done;"""
    for number in (1, 2):  # what an earlier start has left does not count
        left, told = run_sbatch_file(tmp_path, 1, more=more)
        assert (left.returncode, told) == (REQUEUE, "requeue 12\n")
        assert len(ends.read_text().splitlines()) == number
    left, told = run_sbatch_file(tmp_path, 3, more="/bin/sleep 1;", after=3)
    assert (left.returncode, told) == (3, "")


# ---- how ranks find each other


def test_ports_of_neighbours_and_restarts_differ_and_stay_below_those_of_the_system():
    numbers = [*range(1, 400), 12767, 12768, 12769, 67_043_328, 2**32 - 1]
    ports = {key: rendezvous.rendezvous_port(*key) for key in product(numbers, range(40))}
    assert all(20000 <= port < 32768 for port in ports.values())
    for job in numbers:
        assert len({ports[job, restart] for restart in range(40)}) == 40
    for job in range(1, 350):  # jobs that may share a node, started again a few times
        near = [(other, restart) for other in range(job, job + 50) for restart in range(4)]
        assert len({ports[key] for key in near}) == len(near)
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports.values()) < first or first != 32768


@pytest.mark.parametrize("address", ["", "127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_that_somebody_listens_on_is_not_free(address, reuse):
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        holder.bind((address, 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert not rendezvous.is_free(port)
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = holder.accept()
    # first: waits in TIME_WAIT, which keeps nobody from listening who does as torch does
    server.close()
    client.close()
    assert rendezvous.is_free(port) or not reuse


def test_a_port_of_both_protocols_is_not_free():
    """As torch listens."""
    try:
        holder = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError:
        pytest.skip("no IPv6 here")
    with holder:
        assert not rendezvous.is_free(holder.getsockname()[1])


def test_the_interface_that_leads_to_a_host(monkeypatch):
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        assert rendezvous.interface_to(host) == "lo"
    names = {name for _, name in socket.if_nameindex()}
    # for documentation: wherever the default route leads
    assert rendezvous.interface_to("192.0.2.1") in names | {None}
    monkeypatch.setattr(rendezvous, "_RESOLVE_SECONDS", 0.0)
    assert rendezvous.interface_to("no-such-host.invalid") is None


def test_an_unknown_host_is_asked_for_again_and_then_given_up(monkeypatch):
    asked = []

    class Asking(socket.socket):
        def connect(self, address):
            asked.append(address[0])
            if len(asked) < wanted:
                raise socket.gaierror("Name or service not known")
            super().connect(("127.0.0.1", 9))

    monkeypatch.setattr(rendezvous.socket, "socket", Asking)
    naps = []
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: sum(naps))
    monkeypatch.setattr(rendezvous.time, "sleep", naps.append)
    wanted = 1000
    assert rendezvous.interface_to("node7") is None
    assert set(asked) == {"node7"}
    assert 20 < len(asked) < 40  # for a minute
    asked.clear()
    wanted = 4  # a node that starts
    assert rendezvous.interface_to("node7") == "lo"


# ---- what a rank is told


def a_task(folder, commands=(("collect", "x.yaml"),), **options):
    return StageTask(commands, folder, **{"time_minutes": 60, "grace_seconds": 90} | options)


def test_a_task_is_pickled_and_back_without_torch(tmp_path):
    """It is unpickled by submitit before anything else runs; only `__call__` may take its time."""
    path, commands = tmp_path / "task.pkl", (("collect", "a"), ("report", "b"))
    kept = a_task(tmp_path, commands, cpus_per_rank=4, interface="ib0")
    path.write_bytes(cloudpickle.dumps(kept))
    program = (
        "import pickle, sys; task = pickle.load(open(sys.argv[1], 'rb')); import tdds_dist.launch.submit,"
        " tdds_dist.launch.requeue; print(task.__dict__ | {'heavy': sorted({'torch', 'ffcv', 'torchvision'} &"
        " sys.modules.keys())})"
    )
    command = [sys.executable, "-c", program, str(path)]
    options = {"capture_output": True, "text": True, "cwd": REPOSITORY, "timeout": 60}
    said = subprocess.run(command, **options)
    assert said.returncode == 0, said.stderr
    expected = {"commands": [*map(list, commands)], "log_dir": str(tmp_path), "time_minutes": 60}
    expected |= {"grace_seconds": 90, "cpus_per_rank": 4, "interface": "ib0", "heavy": []}
    assert eval(said.stdout) == expected
    assert len(path.read_bytes()) < 2000  # by reference


def slurm_rank(rank, num_ranks=4, nodes=2, job="12", **variables):
    local = num_ranks // nodes
    os.environ.update(
        {
            "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_ID": job,
            "SLURM_NTASKS": str(num_ranks),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NODEID": str(rank // local),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % local),
            "SLURM_JOB_NODELIST": "node[1-2]" if nodes == 2 else "node1",
            **variables,
        }
    )


@pytest.fixture
def described(tmp_path, monkeypatch):
    """A function that describes a rank of SLURM to itself; what hosts are reached by is a
    stand-in."""
    asked = []

    def interface(host):
        asked.append(host)
        return "eth7"

    monkeypatch.setattr(task, "interface_to", interface)

    def describe(*rank, variables=(), **options):
        slurm_rank(*rank, **dict(variables))
        stage = a_task(tmp_path, **options)
        stage._describe_rank()
        return stage

    describe.asked = asked
    return describe


def test_a_rank_knows_its_place(described):
    # of another shell
    os.environ |= {"RANK": "9", "WORLD_SIZE": "9", "MASTER_PORT": "1", "MASTER_ADDR": "elsewhere"}
    stage = described(3, variables={"SLURM_RESTART_COUNT": "2"})
    port = str(rendezvous.rendezvous_port(12, 2))
    assert [os.environ[key] for key in PLACE] == ["3", "4", "1", "2", "node1", port]
    assert (os.environ["TDDS_JOB"], os.environ["TDDS_LOCK_WAIT_SECONDS"]) == ("12", "180")
    assert (stage.job_id, stage.rank, stage.restart, stage.is_slurm) == ("12", 3, 2, True)
    # all of the node's
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"] != "1"
    assert "TDDS_CPUS_PER_RANK" not in os.environ
    described(0, cpus_per_rank=8)
    assert os.environ["TDDS_CPUS_PER_RANK"] == "8"


def test_all_ranks_meet_at_one_port_and_the_next_start_at_another(described):
    for restart, rank in product(range(3), range(4)):
        described(rank, variables={"SLURM_RESTART_COUNT": str(restart)})
        assert os.environ["MASTER_ADDR"] == "node1"
        assert os.environ["MASTER_PORT"] == str(rendezvous.rendezvous_port(12, restart))
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "0"}
    stage = described(1, 4, 2, "15", variables=array)
    assert stage.job_id == os.environ["TDDS_JOB"] == "12_3"
    # a port of its own for a task of an array
    assert os.environ["MASTER_PORT"] == str(rendezvous.rendezvous_port(15, 0))


def test_a_rank_leaves_before_its_time_limit(described):
    """By when the job started, not this rank; without that, from now on."""
    described(0, variables={"TDDS_JOB_STARTED": "1000000"}, time_minutes=60, grace_seconds=90)
    assert float(os.environ["TDDS_LEAVE_AT"]) == 1_000_000 + 3600 - 90 - 10
    for given in ("", None):
        os.environ["TDDS_JOB_STARTED"] = given or ""
        if given is None:
            del os.environ["TDDS_JOB_STARTED"]
        described(0, time_minutes=10, grace_seconds=30)
        assert abs(float(os.environ["TDDS_LEAVE_AT"]) - (time.time() + 560)) < 20


@pytest.mark.parametrize(
    ("rank", "interface", "before", "told", "asked"),
    [
        # this is the first node; NCCL takes names that only begin alike unless told otherwise
        (1, None, {}, ("eth7", "=eth7"), ["node2"]),
        (2, None, {}, ("eth7", "=eth7"), ["node1"]),  # other nodes ask for the way to the first
        (1, None, {"NCCL_SOCKET_IFNAME": "ib"}, ("eth7", "ib"), ["node2"]),
        (1, None, dict.fromkeys(INTERFACES, "x"), ("x", "x"), ["node2"]),
        (1, "ib0", {}, ("ib0", "=ib0"), []),
        (1, "ib0", {"GLOO_SOCKET_IFNAME": "x", "NCCL_SOCKET_IFNAME": "ib"}, ("ib0", "=ib0"), []),
    ],
)
def test_what_is_set_stays_unless_the_cluster_file_says_otherwise(
    described, rank, interface, before, told, asked
):
    described(rank, variables=before, interface=interface)
    assert tuple(os.environ[key] for key in INTERFACES) == told
    assert described.asked == asked


def test_no_interface_is_chosen_where_none_is_known_or_needed(described, monkeypatch):
    described(0, 1, 1)
    assert not set(INTERFACES) & os.environ.keys()
    assert described.asked == []
    described(1, 2, 1)  # one node needs no name service
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert described.asked == ["127.0.0.1"]
    monkeypatch.setattr(task, "interface_to", lambda host: None)
    for key in INTERFACES:
        os.environ.pop(key, None)
    described(1)
    assert not set(INTERFACES) & os.environ.keys()


class Left(BaseException):
    """Instead of the end of the process."""


@pytest.fixture
def leaving(monkeypatch):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(task, "_exit", leave)


def test_rank_0_says_so_when_the_port_is_taken(described, leaving, tmp_path, capsys):
    with socket.socket() as holder:
        port = rendezvous.rendezvous_port(12, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", port))
        except OSError:
            pytest.skip(f"something else listens on port {port}")
        holder.listen()
        described(1)
        described(0, 1, 1)  # alone it meets nobody
        with pytest.raises(Left, match="1"):
            described(0)
    assert f"port {port} of this host" in capsys.readouterr().err
    (found,) = read_ends(tmp_path, "12")
    assert (found.kind, found.rank) == ("lost", 0)


def test_what_a_kill_left_of_a_save_is_cleared_by_rank_0(described, tmp_path):
    kept = ["123_submitted.pkl.save_tmp", "12_submitted.pkl"]
    for name in (*kept, "12_submitted.pkl.save_tmp", "12_0_result.pkl.save_tmp"):
        (tmp_path / name).touch()
    described(1)
    assert len(list(tmp_path.iterdir())) == 4
    described(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_checkpoint_is_the_same_task_and_asks_nobody(tmp_path, monkeypatch):
    """It runs in a signal handler: other ranks may be anywhere."""
    import torch.distributed as dist

    def collective(*_, **__):
        raise AssertionError("a collective in a signal handler")

    names = "barrier all_reduce all_gather all_gather_object broadcast gather_object"
    for name in (*names.split(), "all_to_all_single"):
        monkeypatch.setattr(dist, name, collective)
    slurm_rank(0, 1, 1)
    commands = (("collect", "a", "train.lr=1"), ("report", "b"))
    before = a_task(tmp_path, commands, interface="ib0", cpus_per_rank=2)
    before._describe_rank()
    again = before.checkpoint()
    assert isinstance(again, DelayedSubmission)
    assert (again.args, again.kwargs) == ((), {})
    after_ = pickle.loads(cloudpickle.dumps(again)).function
    assert isinstance(after_, StageTask)
    for key in "commands log_dir time_minutes grace_seconds cpus_per_rank interface".split():
        assert getattr(after_, key) == getattr(before, key)


# ---- how a rank leaves


@pytest.fixture
def outcomes(monkeypatch):
    """What the commands of a task come to, instead of running them; and what was run."""
    from tdds_dist.cli import main

    results, ran = [], []

    def outcome(command, interruption):
        ran.append(command)
        result = results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(main, "outcome", outcome)
    monkeypatch.setattr(task.atexit, "register", lambda *arguments: None)
    outcome.results, outcome.ran = results, ran
    return outcome


def test_commands_run_one_after_the_other(outcomes, leaving, tmp_path):
    slurm_rank(0, 1, 1)
    outcomes.results += [(0, ""), (0, "")]
    assert a_task(tmp_path, (("score", "a"), ("select", "b")))() is None
    assert outcomes.ran == [["score", "a"], ["select", "b"]]
    assert read_ends(tmp_path, "12") == []


@pytest.mark.parametrize(
    ("result", "code", "kind"),
    [
        ((2, "tdds collect: error: bad"), 2, "refused"),
        ((1, "tdds collect: error: lost"), 1, "lost"),
        # which ends some day
        ((2, f"tdds collect: error: runs/a {IN_USE} pid 3 on node7"), 2, "lost"),
        ((130, "tdds collect: interrupted"), 130, "failed"),
        (ZeroDivisionError("x"), 1, "failed"),
        ((2, ""), 2, None),  # rank 0 says it for all
    ],
)
def test_a_command_that_fails_ends_the_rank_and_is_written_down(
    outcomes, leaving, tmp_path, capsys, result, code, kind
):
    slurm_rank(2, SLURM_RESTART_COUNT="3")
    outcomes.results += [(0, ""), result, (0, "")]
    with pytest.raises(Left) as left:
        a_task(tmp_path, (("score", "a"), ("select", "b"), ("select", "c")), interface="lo")()
    assert left.value.args == (code,)
    assert len(outcomes.ran) == 2
    if kind is None:
        assert read_ends(tmp_path, "12") == []
        return
    (found,) = read_ends(tmp_path, "12")
    assert (found.kind, found.rank, found.restart, found.host) == (kind, 2, 3, socket.gethostname())
    if isinstance(result, tuple):
        assert found.message == result[1]
        assert capsys.readouterr().err == f"{result[1]}\n"
        assert found.traceback == ""
    else:
        assert found.message == "ZeroDivisionError: x"
        assert found.traceback.startswith("Traceback")
        assert "ZeroDivisionError: x" in found.traceback


def test_a_log_folder_that_cannot_be_written_changes_no_exit_code(
    outcomes, leaving, tmp_path, capsys
):
    slurm_rank(0, 1, 1)
    (tmp_path / "file").touch()
    outcomes.results += [(2, "bad")]
    with pytest.raises(Left, match="2"):
        a_task(tmp_path / "file" / "folder")()
    assert "cannot write to" in capsys.readouterr().err


@pytest.fixture
def handler(monkeypatch):
    """Instead of submitit's handler of SIGUSR2: it notes that it was asked, and leaves as it is
    told."""
    asked = []

    def handle(number, frame):
        asked.append(number)
        if handle.result is not None:
            raise handle.result

    handle.result, handle.asked = SystemExit(-1), asked
    before = signal.signal(signal.SIGUSR2, handle)
    monkeypatch.setattr(task, "_SECOND_SIGNAL_SECONDS", 0.0)
    yield handle
    signal.signal(signal.SIGUSR2, before)


def test_a_rank_that_left_alone_and_unsaved_counts_as_lost(
    outcomes, leaving, handler, monkeypatch, tmp_path
):
    """srun ends ranks that still start by SIGTERM when another has died: nobody asked for that."""
    slurm_rank(0)
    asked_to_leave(outcomes, monkeypatch, signal.SIGTERM, saved="not saved here")
    with pytest.raises(Left):
        a_task(tmp_path, interface="lo")()
    assert [record.kind for record in read_ends(tmp_path, "12")] == ["lost"]
    assert ended(tmp_path, 137) == REQUEUE


def asked_to_leave(
    outcomes, monkeypatch, *signals, leave_at=None, elsewhere="", saved="saved at epoch 1, step 2"
):
    """By signals here, by the end of its time, or by what another rank was told (the lowest rank
    with a reason says it)."""
    from tdds_dist.cli import main

    def outcome(command, interruption):
        if leave_at is not None:
            interruption.leave_at = leave_at
        with interruption, interruption.watched():
            for number in signals:
                signal.raise_signal(number)
        return 75, f"tdds collect: {interruption.requested or elsewhere}: {saved}"

    monkeypatch.setattr(main, "outcome", outcome)


@pytest.mark.parametrize(
    ("signals", "leave_at", "result", "left", "kind"),
    [
        ((signal.SIGUSR2,), None, SystemExit(-1), -1, "requeued"),
        ((signal.SIGUSR2,), None, SystemExit(144), 144, "requeued"),
        ((signal.SIGTERM, signal.SIGUSR2), None, SystemExit(-1), -1, "requeued"),
        ((), 0.0, SystemExit(-1), -1, "requeued"),
        ((signal.SIGTERM,), None, SystemExit(-1), 75, "resume"),
        ((signal.SIGTERM,), 0.0, SystemExit(-1), 75, "resume"),
        ((signal.SIGUSR2,), None, UncompletedJobError("timed-out too many times"), 75, "resume"),
        ((signal.SIGUSR2,), None, FileNotFoundError("no scontrol in a container"), 75, "requeue"),
        ((signal.SIGINT,), None, SystemExit(-1), 75, "resume"),
        # By another rank: the signal may not have come here yet, and clocks differ.
        ("SIGUSR2", None, SystemExit(-1), -1, "requeued"),
        ("time limit", None, SystemExit(-1), -1, "requeued"),
        ("SIGTERM", None, SystemExit(-1), 75, "resume"),
        ("SIGINT", None, SystemExit(-1), 75, "resume"),
    ],
)
def test_rank_0_has_the_job_queued_again_unless_it_was_cancelled(
    outcomes, leaving, handler, monkeypatch, tmp_path, signals, leave_at, result, left, kind
):
    """SIGTERM alone is `scancel`; SIGUSR2 the time limit or a preemption; the end of its time it
    sees itself."""
    slurm_rank(0, 1, 1)
    handler.result = result
    here, elsewhere = ((), signals) if isinstance(signals, str) else (signals, "")
    asked_to_leave(outcomes, monkeypatch, *here, leave_at=leave_at, elsewhere=elsewhere)
    with pytest.raises(Left) as found:
        a_task(tmp_path)()
    assert found.value.args == (left,)
    is_asked = kind != "resume" or signal.SIGUSR2 in here
    assert handler.asked == [signal.SIGUSR2] * is_asked
    (record,) = read_ends(tmp_path, "12")
    assert record.kind == kind
    assert "saved" in record.message
    gave_up = "not queued again (timed-out too many times)" in record.message
    assert gave_up == isinstance(result, UncompletedJobError)


def test_a_second_signal_while_rank_0_waits_for_it(
    outcomes, leaving, handler, monkeypatch, tmp_path
):
    """Preemption is SIGTERM, and SIGUSR2 a moment later."""
    slurm_rank(0, 1, 1)
    asked_to_leave(outcomes, monkeypatch, signal.SIGTERM)
    monkeypatch.setattr(task.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGUSR2))
    with pytest.raises(Left, match="-1"):
        a_task(tmp_path)()
    assert [record.kind for record in read_ends(tmp_path, "12")] == ["requeued"]


def test_the_other_ranks_leave_in_peace(outcomes, leaving, handler, monkeypatch, tmp_path):
    """srun ends all ranks when one leaves with another code: rank 0 has not queued the job again
    then."""
    slurm_rank(1)
    asked_to_leave(outcomes, monkeypatch, signal.SIGUSR2)
    with pytest.raises(Left, match="0"):
        a_task(tmp_path, interface="lo")()
    assert handler.asked == []
    assert read_ends(tmp_path, "12") == []
