"""Lists of jobs, ends of ranks, and what squeue, sacct and the process table are understood to say.

The outputs are those of SLURM 22.05, taken from a real cluster; squeue and sacct themselves are
stand-ins that print them.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from tdds_dist.launch.job_reasons import explain
from tdds_dist.launch.job_states import JobState, job_states
from tdds_dist.launch.records import (
    EndRecord,
    JobRecord,
    append_end,
    append_job,
    first_cause,
    jobs_of,
    latest_submission,
    log_dir_of,
    log_files,
    read_ends,
    read_jobs,
)
from tests.make import table

SUBMITTED = datetime.fromisoformat("2026-11-21T15:18:41").timestamp()


def job(job_id, **values):
    return JobRecord(**{"id": job_id, "time": SUBMITTED, "name": f"name{job_id}", **values})


def end(kind, **values):
    told = {"host": "n2", "message": "ZeroDivisionError: division by zero"}
    return EndRecord(kind, **told | values)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Puts commands on PATH that print what they are given; None leaves one out."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(squeue="", sacct="", *, script=""):
        for name, text in (("squeue", squeue), ("sacct", sacct)):
            if text is not None:
                (folder / f"{name}.txt").write_text(text)
                body = script or f"exec /bin/cat {folder}/{name}.txt"
                call = f'echo "$0 $@" >> {folder}/calls'
                (folder / name).write_text(f"#!/bin/sh\n{call}\n{body}\n")
                (folder / name).chmod(0o755)

    return put


def queue_line(job_id, state, *, restarts=0, elapsed="0:00", code=0, nodes="", reason="None"):
    """As `squeue --Format=...:64|,...` pads it."""
    return f"{job_id:<64}|{state:<24}|{restarts:<12}|{elapsed:<24}|{code:<12}|{nodes:<256}|{reason:<256}\n"


def account_line(job_id, state, *, submit="15:18:41", elapsed="00:00:00", code="0:0", nodes=""):
    """As sacct prints it; `submit` is a time of that day, or one with its date."""
    submit = submit if "T" in submit else f"2026-11-21T{submit}"
    return f"{job_id}|{state}|{submit}|{elapsed}|{code}|{nodes or 'None assigned'}\n"


# ---- files


def test_jobs_come_back_as_they_were_appended(tmp_path):
    log_dir, first = tmp_path / "jobs", {"id": "123_0", "submission": "20261121-150102"}
    first |= {"time": 1.5, "executor": "slurm", "stage": "retrain", "name": "retrain-tiny"}
    first |= {"title": "tdds_p0.5", "after": ["122"], "num_ranks": 2, "directory": "/runs/x"}
    append_job(log_dir, JobRecord(**first))
    append_job(log_dir, JobRecord(id="124", submission="later"))
    found = read_jobs(log_dir)
    assert found[0] == JobRecord(**first | {"after": ("122",), "host": found[0].host})
    assert found[0].host
    assert found[0].log_dir == log_dir
    assert [job.id for job in latest_submission(found)] == ["124"]
    assert "log_dir" not in (log_dir / "jobs.jsonl").read_text()


def test_damaged_lines_are_left_out_and_do_not_take_the_next_one_along(tmp_path):
    append_job(tmp_path, JobRecord("1"))
    damaged = '[]\nnull\n{"time": 3}\n{"id": 7}\n{"id": ""}\n{"id": "1,\\u0000"}\n{"id": "8", "after": "7"}\n'
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write(damaged + '{"id": "9", "new": 1}\n{"id": "10", "ti')
    append_job(tmp_path, JobRecord("2"))
    assert [job.id for job in read_jobs(tmp_path)] == ["1", "9", "2"]
    assert read_jobs(tmp_path / "none") == []
    assert latest_submission([]) == []


def _append_many(log_dir, writer):
    for number in range(100):
        append_job(log_dir, JobRecord(f"{writer}_{number}", title="x" * 2000))


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len({job.id for job in read_jobs(tmp_path)}) == 400


def test_ends_of_all_ranks_of_one_job_only(tmp_path):
    append_end(tmp_path, "12", EndRecord("lost", 10, time=3.0, restart=1, host="n2", message="m"))
    append_end(tmp_path, "12", end("failed", time=2.0, rank=5))
    append_end(tmp_path, "12_3", end("refused", time=1.0))
    (tmp_path / "12_6_end.jsonl").write_text('{"kind": "fai')
    found = [(each.rank, each.kind) for each in read_ends(tmp_path, "12")]
    assert found == [(5, "failed"), (10, "lost")]
    assert [found.kind for found in read_ends(tmp_path, "12_3")] == ["refused"]
    assert read_ends(tmp_path / "none", "12") == []


@pytest.mark.parametrize(
    ("ends", "cause"),  # when, of which start, what, on which rank
    [
        ("", None),
        ("1.0 0 resume 0, 2.0 0 requeued 1", None),
        ("1.0 0 lost 0, 2.0 0 refused 1, 3.0 0 failed 2, 2.5 0 failed 3", 3),
        ("1.0 0 lost 0, 2.0 0 refused 1", 1),
        ("2.0 0 lost 0, 1.0 0 lost 1", 1),
        ("1.0 0 lost 0, 2.0 0 gave_up 1, 3.0 0 lost 2", 1),
        # what happened before the restart explains nothing
        ("1.0 0 failed 0, 2.0 1 lost 1", 1),
        ("1.0 0 failed 0, 2.0 1 resume 1", None),
    ],
)
def test_first_cause(ends, cause):
    parts = [part.split() for part in ends.split(",") if part]
    found = first_cause(
        EndRecord(kind, int(rank), float(when), int(restart)) for when, restart, kind, rank in parts
    )
    assert (found.rank if found else None) == cause


def test_log_files_by_rank_also_of_arrays(tmp_path):
    others = ("12_0_log.out", "12_3_0_log.err", "112_7_log.err", "12_0_log.err.old")
    logs = {rank: tmp_path / f"12_{rank}_log.err" for rank in (0, 10)}
    for path in (*logs.values(), *map(tmp_path.joinpath, others)):
        path.touch()
    assert log_files(tmp_path, "12", "err") == logs
    assert list(log_files(tmp_path, "12_3", "err")) == [0]
    assert list(log_files(tmp_path, "12", "out")) == [0]


def test_log_folder_is_where_the_pointer_says(tmp_path):
    assert log_dir_of(tmp_path) == tmp_path / "jobs"
    (tmp_path / "jobs.path").write_text(f"{tmp_path}/elsewhere\n")
    assert log_dir_of(tmp_path) == tmp_path / "elsewhere"
    (tmp_path / "jobs.path").write_text("")
    assert log_dir_of(tmp_path) == tmp_path / "jobs"


def test_jobs_of_a_retraining_are_found_with_its_run(tmp_path):
    experiment, run = tmp_path / "exp", tmp_path / "exp" / "seed0"
    retraining = run / "retrain" / "a"
    retraining.mkdir(parents=True)
    for job_id, directory in (("1", run), ("2", retraining), ("3", "")):
        append_job(experiment / "jobs", JobRecord(job_id, directory=str(directory)))
    assert [job.id for job in jobs_of(experiment)[1]] == ["1", "2", "3"]
    assert [job.id for job in jobs_of(run)[1]] == ["1", "2"]
    log_dir, own, listed = jobs_of(retraining)
    assert (log_dir, [job.id for job in own], len(listed)) == (experiment / "jobs", ["2"], 3)
    assert jobs_of(tmp_path) == (None, [], [])


# ---- SLURM


def test_states_of_a_real_cluster(slurm):
    slurm(
        queue_line("2", "FAILED", code=512, nodes="n1", reason="NonZeroExitCode")
        + queue_line("8", "RUNNING", elapsed="1-02:03:04", nodes="n[1-2]")
        + queue_line("10", "PENDING", reason="Dependency"),
        account_line("1", "COMPLETED", elapsed="00:10:02", nodes="n1")
        + account_line("2", "FAILED", code="2:0", nodes="n1")
        + account_line("8", "RUNNING")
        + account_line("14", "CANCELLED by 1000", elapsed="00:00:06", nodes="n1"),
    )
    states = job_states([job(job_id) for job_id in ("1", "2", "8", "10", "14", "15")])
    assert states["1"] == JobState("finished", "", 0, "00:10:02", "n1", 0)
    assert states["2"] == JobState("failed", "NonZeroExitCode", 0, "00:00:00", "n1", 2)
    assert states["8"] == JobState("running", "", 0, "1-02:03:04", "n[1-2]", None)
    assert states["10"] == JobState("pending", "Dependency")
    assert states["14"] == JobState("cancelled", "by 1000", 0, "00:00:06", "n1", 0)
    assert states["15"] == JobState("unknown", "SLURM does not know it any more")


@pytest.mark.parametrize(
    ("queue", "account", "expected"),
    [
        *((0, None, 0), (512, None, 2), (19200, None, 75), (9, None, 137), (4021, None, 181)),
        *((None, "2:0", 2), (None, "75:0", 75), (None, "0:9", 137), (None, "0:53", 181)),
        (None, "", None),
    ],
)
def test_either_alone_knows_exit_codes(slurm, queue, account, expected):
    slurm(
        None if queue is None else queue_line("2", "FAILED", code=queue, elapsed="2:03"),
        None if account is None else account_line("2", "FAILED", code=account, elapsed="00:02:03"),
    )
    assert job_states([job("2")])["2"] == JobState("failed", "", 0, "00:02:03", "", expected)


def test_sacct_alone_knows_what_waits_and_runs(slurm):
    slurm(
        None,
        account_line("9_[2-3%2]", "PENDING")
        + account_line("9_0", "RUNNING", nodes="n1", elapsed="00:01:00"),
    )
    states = job_states([job("9_0"), job("9_2"), job("9_3")])
    assert [states[f"9_{task}"].state for task in (0, 2, 3)] == ["running", "pending", "pending"]
    assert states["9_2"].nodes == ""
    assert states["9_0"].nodes == "n1"


@pytest.mark.parametrize(
    ("shown", "tasks"),
    [
        ("9_[0-3%2]", [0, 1, 2, 3]),
        ("9_[1,3-4]", [1, 3, 4]),
        ("9_[0-6:3]", [0, 3, 6]),
        ("9_[5]", [5]),
        ("9_[1-2,7-...]", [1, 2]),
        ("9_[1-2,7", [1, 2]),
        ("9_4", [4]),
    ],
)
def test_array_ids_in_one_line(slurm, shown, tasks):
    slurm(queue_line(shown, "PENDING", reason="JobArrayTaskLimit"))
    states = job_states([job(f"9_{task}") for task in range(8)])
    assert [task for task in range(8) if states[f"9_{task}"].state == "pending"] == tasks


def test_a_requeued_job_counts_its_restarts_and_shows_the_last_one(slurm):
    before = account_line("13", "REQUEUED", elapsed="00:00:06", nodes="n2")
    again = account_line("13", "NODE_FAIL", submit="15:18:47", elapsed="00:01:00", nodes="n1")
    last = account_line("13", "COMPLETED", submit="15:20:00", elapsed="00:02:00", nodes="n3")
    slurm("", before + last + again)  # in whatever order
    assert job_states([job("13")])["13"] == JobState("finished", "", 2, "00:02:00", "n3", 0)
    waits = account_line("13", "PENDING", submit="15:18:47")
    slurm(queue_line("13", "PENDING", restarts=1, reason="BeginTime"), before + waits)
    state = job_states([job("13")])["13"]
    assert state == JobState("requeued", "BeginTime", 1)
    said, _ = explain(job("13"), [job("13")], {"13": state})
    assert said == "requeued, waiting for its start time (BeginTime)"


def test_restarts_that_accounting_does_not_list_count_too(slurm):
    slurm(queue_line("13", "COMPLETED", restarts=2), account_line("13", "COMPLETED"))
    assert job_states([job("13")])["13"].restarts == 2
    # a job of years ago with the same number is another
    another = account_line("13", "FAILED", submit="2021-01-01T00:00:00", code="1:0")
    slurm("", another + account_line("13", "COMPLETED"))
    assert job_states([job("13")])["13"].restarts == 0


GARBAGE = ["\n\n", "garbage", "|||||||||\n", "13|\n", "13|RUNNING|x|y|z|\n", "\x00\xff" * 5000]
UNREACHABLE = "error: Unable to contact slurm controller"
FAILS = f"echo slurm: warning >&2; echo '{UNREACHABLE}' >&2; exit 1"


@pytest.mark.parametrize(
    ("queue", "account", "script", "reason"),
    [
        *((text, text, "", None) for text in GARBAGE),
        (queue_line("13", "EXPEDITING"), "", "", "EXPEDITING"),  # of a later SLURM
        ("", "", "", "SLURM does not know it any more"),
        (None, None, "", "squeue is not here; sacct is not here"),
        ("", "", FAILS, f"squeue failed: {UNREACHABLE}; sacct failed: {UNREACHABLE}"),
    ],
)
def test_what_slurm_does_not_tell_is_unknown(slurm, queue, account, script, reason):
    slurm(queue, account, script=script)
    state = job_states([job("13")])["13"]
    assert state.state == "unknown" or (state.state == "running" and "RUNNING" in queue)
    assert reason in (None, state.reason)
    assert not state.is_bad


def test_a_job_that_squeue_has_forgotten_is_no_failure_of_squeue(slurm):
    assert job_states([]) == {}
    slurm(script="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    slurm(None, account_line("13", "COMPLETED"))
    assert job_states([job("13")])["13"].state == "finished"
    slurm(None, "")
    assert job_states([job("13")])["13"].reason == "SLURM does not know it any more"
    slurm(script="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    slurm("", None)
    assert job_states([job("13")])["13"].reason == (
        "SLURM does not know it any more; sacct failed: Slurm accounting storage is disabled"
    )


def test_slurm_that_hangs_costs_the_time_out_once_and_leaves_no_process(slurm, tmp_path):
    slurm(script=f"/bin/sleep 61.{os.getpid()} & echo $! >> {tmp_path}/pids; wait")
    started = time.monotonic()
    state = job_states([job("13")], timeout_seconds=1.0)["13"]
    assert time.monotonic() - started < 2.0  # not twice
    assert state.reason == "squeue did not answer within 1 s; sacct did not answer within 1 s"
    deadline = time.monotonic() + 10
    for pid in (tmp_path / "pids").read_text().split():
        file = Path(f"/proc/{pid}/status")
        while file.exists() and "\nState:\tZ" not in file.read_text():
            assert time.monotonic() < deadline, f"{pid} lives"
            time.sleep(0.05)


def test_slurm_is_asked_once_for_all_jobs(slurm, tmp_path):
    slurm(queue_line("1", "RUNNING"))
    job_states([job(str(number)) for number in range(200)])
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert all("--noheader" in call and "--jobs=0,1,10,100," in call for call in calls)


# ---- without SLURM: results, ends, processes


def put_result(log_dir, job_id, rank, result=("success", None)):
    (log_dir / f"{job_id}_{rank}_result.pkl").write_bytes(pickle.dumps(result))


def test_what_the_ranks_left_tells_where_the_scheduler_does_not(slurm, tmp_path):
    jobs = [job(job_id, num_ranks=2, log_dir=tmp_path) for job_id in ("1", "2", "3", "4")]
    for rank in (0, 1):
        put_result(tmp_path, "1", rank)
    put_result(tmp_path, "2", 0)
    append_end(tmp_path, "3", end("refused", time=SUBMITTED + 60))
    append_end(tmp_path, "4", end("requeued", time=SUBMITTED + 60))
    states = job_states(jobs)
    assert [states[job_id].state for job_id in "1234"] == "finished unknown failed unknown".split()
    assert (states["3"].exit_code, states["3"].elapsed) == (2, "00:01:00")


def test_a_result_that_is_removed_meanwhile_is_no_error(tmp_path):
    """A job that is started again removes the results of its start before."""
    put_result(tmp_path, "99999999", 0)
    (tmp_path / "99999999_1_result.pkl").symlink_to(tmp_path / "gone")
    local = job("99999999", executor="local", num_ranks=1, log_dir=tmp_path)
    assert job_states([local])["99999999"].state == "finished"


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_results_are_never_run(tmp_path):
    put_result(tmp_path, "99999999", 0, ("success", Trap(tmp_path / "was_run")))
    local = job("99999999", executor="local", log_dir=tmp_path)
    assert job_states([local])["99999999"].state == "failed"
    assert not (tmp_path / "was_run").exists()
    pickle.loads((tmp_path / "99999999_0_result.pkl").read_bytes())
    assert (tmp_path / "was_run").exists()  # as it would have been


def test_local_job_runs_as_long_as_its_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        local = job(str(process.pid), executor="local", time=time.time() - 5, log_dir=tmp_path)
        assert job_states([local])[local.id].state == "running"
        assert job_states([local])[local.id].elapsed.startswith("00:00:0")
        # that one is gone, another has its number
        earlier = replace(local, time=time.time() - 3600)
        assert job_states([earlier])[local.id].state == "failed"
        waiting = replace(local, after=("1",))
        assert job_states([waiting])[local.id] == JobState("pending", "Dependency")
        (tmp_path / f"{local.id}_0_log.err").touch()
        assert job_states([waiting])[local.id].state == "running"
        elsewhere = job_states([replace(local, host="another")])[local.id]
        assert elsewhere == JobState("unknown", "its process is on another; ask there")
        process.kill()
        deadline = time.monotonic() + 10
        # a zombie until its parent asks: it does not run
        while job_states([local])[local.id].state == "running":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert job_states([local])[local.id].reason == "its process is gone and left no result"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("results", "kinds", "state", "code"),
    [
        ([("success", None)], [], "finished", 0),
        ([("error", "Traceback")], [], "failed", 1),
        ([], ["failed"], "failed", 1),
        ([], ["refused", "lost"], "failed", 2),
        ([], ["resume"], "failed", 75),
        ([], ["lost"], "failed", 1),
    ],
)
def test_local_job_that_ended(tmp_path, results, kinds, state, code):
    for rank, result in enumerate(results):
        put_result(tmp_path, "99999999", rank, result)
    for rank, kind in enumerate(kinds):
        append_end(tmp_path, "99999999", end(kind, rank=rank))
    found = job_states([job("99999999", executor="local", log_dir=tmp_path)])["99999999"]
    assert (found.state, found.exit_code) == (state, code)


# ---- words


@pytest.mark.parametrize(
    ("state", "reason", "exit_code", "text"),
    table("""
    pending -> -> -> waiting
    pending -> Priority -> -> waiting for its turn (Priority)
    pending -> Resources -> -> waiting for free nodes (Resources)
    pending -> BeginTime -> -> waiting for its start time (BeginTime)
    pending -> QOSMaxJobsPerUserLimit -> -> waiting (QOSMaxJobsPerUserLimit)
    pending -> JobHeldUser -> -> held, `scontrol release` frees it (JobHeldUser)
    pending -> Dependency -> -> waiting for others
    pending -> DependencyNeverSatisfied -> -> never starts because a job that it waits for failed (DependencyNeverSatisfied)
    requeued -> -> -> requeued, waiting
    running -> -> -> running
    suspended -> -> -> suspended
    finished -> -> 0 -> finished
    failed -> -> 1 -> failed (exit code 1)
    failed -> -> 2 -> refused its input (exit code 2)
    failed -> -> 75 -> left when it was asked to, its state is saved (exit code 75)
    failed -> -> 137 -> failed (signal 9)
    failed -> -> 181 -> failed (signal 53): its log files could not be written where it ran
    failed -> its process is gone and left no result -> -> failed, its process is gone and left no result
    cancelled -> by 1000 -> -> cancelled by user 1000
    cancelled -> -> -> cancelled
    timeout -> -> -> met its time limit
    node_fail -> -> -> lost a node
    out_of_memory -> -> -> ran out of memory
    preempted -> -> -> was preempted
    unknown -> sacct is not here -> -> unknown (sacct is not here)
    """),
)
def test_every_state_in_words(tmp_path, state, reason, exit_code, text):
    state = JobState(state, reason, exit_code=int(exit_code) if exit_code else None)
    found = job("1", log_dir=tmp_path)
    said, blamed = explain(found, [found], {"1": state})
    assert said == text
    assert (blamed == found) == state.is_bad or state.state == "cancelled"


def test_dependants_name_the_job_that_failed_first(tmp_path):
    waits_for = {"2": "1", "3_0": "2", "3_1": "2", "4": "3", "5": "4"}
    jobs = [job("1", log_dir=tmp_path)]
    jobs += [job(job_id, after=(before,)) for job_id, before in waits_for.items()]
    states = dict.fromkeys(("2", "3_0", "3_1", "4"), JobState("cancelled", "by 0"))
    states["1"] = JobState("failed", exit_code=1)
    states["5"] = JobState("pending", "DependencyNeverSatisfied")
    for found in jobs[1:5]:
        assert explain(found, jobs, states) == ("cancelled because job 1 (name1) failed", jobs[0])
    assert explain(jobs[5], jobs, states) == ("never starts because job 1 (name1) failed", jobs[0])
    states["1"] = JobState("timeout")
    assert explain(jobs[1], jobs, states)[0] == "cancelled because job 1 (name1) met its time limit"
    states["1"] = JobState("cancelled", "by 1000")
    assert explain(jobs[4], jobs, states)[0] == "cancelled because job 1 (name1) was cancelled"


def test_a_parent_that_failed_explains_more_than_one_that_was_cancelled():
    jobs = [job("1"), job("2"), job("3", after=("1", "2"))]
    states = {
        "1": JobState("cancelled", "by 1000"),
        "2": JobState("node_fail"),
        "3": JobState("cancelled"),
    }
    assert explain(jobs[2], jobs, states)[0] == "cancelled because job 2 (name2) lost a node"


def test_dependants_that_wait_name_what_still_runs():
    jobs = [job("1"), job("2"), job("3_0"), job("3_1"), job("4", after=("1", "2", "3"))]
    states = {"1": JobState("finished"), "2": JobState("running"), "3_0": JobState("pending")}
    states |= {"3_1": JobState("running"), "4": JobState("pending", "Dependency")}
    assert explain(jobs[4], jobs, states)[0] == "waiting for 2 (name2), 3 (name3_0)"


def test_jobs_that_wait_for_each_other_are_no_endless_loop():
    jobs = [job("1", after=("2",)), job("2", after=("1",))]
    states = {"1": JobState("cancelled"), "2": JobState("cancelled")}
    assert explain(jobs[0], jobs, states)[0] == "cancelled because job 2 (name2) was cancelled"
