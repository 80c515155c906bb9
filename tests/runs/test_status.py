"""`tdds status` and `tdds logs`: what is told of run directories in every condition, and which log
is shown."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdds_dist.cli.options import Parser
from tdds_dist.errors import InputError
from tdds_dist.launch.logs import choose_log, follow, print_tail
from tdds_dist.launch.records import EndRecord, JobRecord, append_end, append_job
from tdds_dist.launch.status import add_logs, add_status, as_data, as_lines, gather
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.lock import RunLock
from tdds_dist.runs.status import Pulse, find_runs, read_status

PROGRESS = {"epoch": 3, "epochs": 10, "step": 1234, "steps": 4000}
PROGRESS |= {"images_per_second": 812.3, "eta_seconds": 700.0}
RESULT = {"stage": "collect", "epochs": 10, "final_top1": 93.06, "best_top1": 94.5}
RETRAINED = {"epochs": 10, "final_top1": 93.06, "best_top1": 95.0}


@pytest.fixture(autouse=True)
def slurm(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], None]:
    """No SLURM, until the test says what squeue and sacct print."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder))

    def put(squeue: str, sacct: str) -> None:
        for name, text in (("squeue", squeue), ("sacct", sacct)):
            (folder / f"{name}.txt").write_text(text)
            (folder / name).write_text(f"#!/bin/sh\nexec /bin/cat {folder}/{name}.txt\n")
            (folder / name).chmod(0o755)

    return put


def start(path: Path) -> RunDir:
    """A collection that has started."""
    run, started = RunDir(path), "2026-11-21T15:00:00+0000"
    env = {"stage": "collect", "world_size": 2, "started": started}
    run.write_start({"train": {"epochs": 10}}, env)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return start(tmp_path / "runs" / "tiny")


def beat(run: RunDir, state: str = "training", *, seconds_ago: float = 0.0, **fields: Any) -> None:
    """Write status.json as the engine does."""
    pulse = Pulse(run.status_file, "collect", 2, True)
    pulse.beat(state, **{**PROGRESS, **fields})
    if seconds_ago:
        record = json.loads(run.status_file.read_text())
        run.status_file.write_text(json.dumps(record | {"updated": time.time() - seconds_ago}))


def put_checkpoint(
    run: RunDir, step: int, record: dict[str, Any] | None = None, *, seconds_ago: float = 0.0
) -> None:
    folder = run.checkpoints / f"step_{step:010d}"
    folder.mkdir(parents=True)
    if record is not None:
        (folder / "checkpoint.json").write_text(json.dumps({"step": step, "record": record}))
        os.utime(folder / "checkpoint.json", (time.time() - seconds_ago,) * 2)


def put_dead_lock(run: RunDir, *, host: str | None = None) -> None:
    """The lock of a job that was killed."""
    program = (
        "import os, sys; from pathlib import Path; from tdds_dist.runs.lock import RunLock; "
        f"RunLock(Path(sys.argv[1]), host={host!r}).acquire(); os._exit(9)"
    )
    command = [sys.executable, "-c", program, str(run.path)]
    subprocess.run(command, check=False, timeout=60, cwd=Path(__file__).parents[2])
    assert (run.path / "run.lock").exists()


def put_job(run: RunDir, job_id: str, **values: Any) -> Path:
    """A job of the run, in its list."""
    log_dir = run.path / "jobs"
    job = {"id": job_id, "time": time.time(), "submission": "20261121-150102", "num_ranks": 2}
    job |= {"executor": "slurm", "stage": "collect", "name": "collect-tiny"}
    append_job(log_dir, JobRecord(**job | {"directory": str(run.path)} | values))
    return log_dir


def put_log(
    log_dir: Path, job_id: str, rank: int, text: str, stream: str = "err", seconds_ago: float = 0.0
) -> Path:
    path = log_dir / f"{job_id}_{rank}_log.{stream}"
    path.write_text(text)
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def shown(run: RunDir | Path) -> str:
    return "\n".join(as_lines(gather(run.path if isinstance(run, RunDir) else run)))


def command(*words: object) -> int | None:
    """The subcommand as the command line runs it."""
    parser = Parser()
    stages = parser.add_subparsers(dest="stage", required=True)
    add_status(stages)
    add_logs(stages)
    options = parser.parse_args([str(word) for word in words])
    return options.run(options)


def squeue_line(job_id: str, state: str, reason: str = "None", nodes: str = "n[1-2]") -> str:
    restarts, begin = f"{0:<12}|{'10:02':<24}", f"{0:<12}"
    return f"{job_id:<64}|{state:<24}|{restarts}|{begin}|{nodes:<256}|{reason:<256}\n"


def sacct_line(job_id: str, state: str, code: str = "0:0") -> str:
    return f"{job_id}|{state}|Unknown|00:10:02|{code}|n[1-2]\n"


# ---- the run


def test_a_run_that_trains(run):
    beat(run, job="12", host="n1")
    put_checkpoint(run, 1100, {"epoch": 2, "step": 1100})
    put_checkpoint(run, 1200, {"epoch": 3, "step": 1200}, seconds_ago=130)
    run.write_env(run.read_env() | {"resumes": [{"world_size": 2}]})
    with RunLock(run.path):
        lines = re.sub(r"[\d.]+ s ago", "S s ago", shown(run)).splitlines()
    assert lines == [
        f"{run.path}: collect, training",
        "  epoch 3 of 10 done, step 1,234 of 4,000 (30 %), 812 images/s, about 11 min 40 s left",
        "  2 ranks, on n1, job 12, resumed 1 time, last update S s ago",
        "  last checkpoint: epoch 3, step 1,200, 2 min S s ago",
        "next: nothing to do",
    ]


def test_a_run_that_was_killed_on_this_machine_is_known_at_once(run):
    beat(run)
    put_dead_lock(run)
    status = read_status(run.path)
    assert status.state == "lost"
    assert status.images_per_second is None
    silent = r"says training, but its last update came [\d.]+ s ago and pid "
    assert re.search(silent, status.warnings[0])
    assert status.warnings[0].endswith(" is dead")
    put_checkpoint(run, 1200, {"epoch": 3})
    again = "start the same command again; it goes on from its last checkpoint"
    assert shown(run).splitlines()[-1] == f"next: {again}"
    command = ["tdds", "collect", "my.yaml", "run.name=a b"]
    run.env_file.write_text(json.dumps({"command": command, "world_size": 2}))
    words = "torchrun --nproc-per-node 2 -m tdds_dist collect my.yaml 'run.name=a b'"
    assert shown(run).endswith(f"from its last checkpoint: {words}")


@pytest.mark.parametrize(
    ("update", "touched", "state", "num_warnings"),
    [
        (5, 5, "training", 0),
        (5, 300, "training", 0),
        (300, 5, "training", 1),
        (300, 300, "lost", 1),
    ],
)
def test_a_run_on_another_machine_lives_by_its_updates_or_its_lock(
    run, update, touched, state, num_warnings
):
    beat(run, seconds_ago=update)
    put_dead_lock(run, host="another")
    os.utime(run.path / "run.lock", (time.time() - touched,) * 2)
    status = read_status(run.path)
    assert (status.state, len(status.warnings)) == (state, num_warnings)
    if state == "training" and num_warnings:
        assert status.warnings[0].startswith("no update for 5 min")


def test_without_a_lock_the_age_of_the_update_decides(run):
    beat(run, seconds_ago=30)
    assert read_status(run.path).state == "training"
    beat(run, seconds_ago=300)
    assert "warning: " in shown(run)
    assert re.search(r"last update came 5 min \d s ago and no job holds it", shown(run))
    assert f"{run.path}: collect, ended without a word" in shown(run)


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_why_it_stopped_is_told(run, state):
    beat(run, state, message="loss is NaN\nat step 7")
    assert f"{run.path}: collect, {state}" in shown(run)
    assert "  why: loss is NaN at step 7" in shown(run)
    assert "images/s" not in shown(run)
    with RunLock(run.path):
        assert read_status(run.path).state == "starting"  # again


def test_a_run_without_status_json(run):
    run.append_metrics({"epoch": 0})
    run.append_metrics({"epoch": 1})
    status = read_status(run.path)
    assert (status.state, status.epoch, status.epochs, status.step) == ("lost", 2, 10, None)
    stopped = "2026-11-21 15:00:00 stopped: asked to leave\n"
    run.log_file.write_text(f"{stopped}2026-11-21 15:01:00 resumes at epoch 2, step 3\n")
    assert read_status(run.path).why == ""
    run.log_file.write_text(run.log_file.read_text() + "2026-11-21 15:02:00 stopped: disk full\n")
    assert (read_status(run.path).state, read_status(run.path).why) == ("stopped", "disk full")


def test_a_finished_run_says_what_comes_next(run):
    beat(run, "finished")
    run.write_result(RESULT)
    assert shown(run).splitlines()[:2] == [
        f"{run.path}: collect, finished",
        "  10 epochs, final top-1 93.06 %, best 94.50 %",
    ]
    # its config is no whole one
    assert shown(run).endswith(f"next: `tdds select {run.path} --pruning-rate P` makes a coreset")
    config = Path(__file__).parents[2] / "configs/digits.yaml"
    run.config_file.write_text(config.read_text().replace("0.3", "0.35"))
    assert shown(run).endswith(f"next: tdds select {run.path} --pruning-rate 0.35 0.5 0.7 0.8 0.9")
    run.coresets.mkdir()
    (run.coresets / "a.npz").touch()
    retrain = f"{run.path}/config.yaml --coreset {run.path}/coresets/a.npz --strategy E"
    assert shown(run).endswith(f"next: tdds retrain {retrain}")


def test_a_command_that_comes_next_can_be_typed_whatever_the_folder_is_called(tmp_path):
    run = start(tmp_path / "my runs" / "tiny")
    beat(run, "finished")
    run.write_result(RESULT)
    assert f"`tdds select '{run.path}' --pruning-rate P`" in shown(run)
    run.coresets.mkdir()
    (run.coresets / "a.npz").touch()
    coreset = f"'{run.path}/coresets/a.npz'"
    retrain = f"tdds retrain '{run.path}/config.yaml' --coreset {coreset} --strategy E"
    assert shown(run).endswith(f"next: {retrain}")


RECORDS = """status.json env.json result.json metrics.jsonl config.yaml run.lock log.txt jobs.path
    jobs/jobs.jsonl checkpoints/step_0000000007/checkpoint.json""".split()


@pytest.mark.parametrize(
    "damage",
    [
        *(None, "", "{", '{"state": "trai', "[]", "null", "3"),
        '{"state": 3, "epoch": "x", "updated": NaN}',
        "{train: {epochs: .inf}}",
        '{"state": "training", "updated": 1e12, "images_per_second": NaN, "eta_seconds": 1e999}',
        '{"updated": 1e999, "steps": -1, "eta_seconds": true}',
        *("\udcff\x00", "a\x00b", "[" * 20_000),
    ],
)
def test_no_file_is_so_damaged_or_missing_that_nothing_is_told(tmp_path, damage):
    for number, name in enumerate(RECORDS):
        run = start(tmp_path / str(number))
        beat(run)
        put_job(run, "12")
        put_checkpoint(run, 7, {"epoch": 1})
        if damage is None:
            (run.path / name).unlink(missing_ok=True)
        else:
            (run.path / name).write_bytes(damage.encode(errors="surrogateescape"))
        for _ in range(2):
            status = gather(run.path)
            assert str(run.path) in as_lines(status)[0], name
            json.dumps(as_data(status), allow_nan=False)
            run.status_file.unlink(missing_ok=True)  # then the others are asked for more


def test_damage_is_said(run):
    run.status_file.write_text('{"state": "trai')
    run.append_metrics({"epoch": 0})
    assert f"warning: {run.status_file} is damaged" in shown(run)
    assert "epoch 1 of 10 done" in shown(run)


def test_checkpoints_without_record_or_that_are_not_whole(run):
    put_checkpoint(run, 7)
    (run.checkpoints / ".unfinished_step_0000000009").mkdir()
    (run.checkpoints / "step_0000000008.damaged").mkdir()
    (run.checkpoints / "step_x").mkdir()
    assert read_status(run.path).checkpoint is None  # its record went while we looked
    (run.checkpoints / "step_0000000007" / "checkpoint.json").write_text("{")
    found = read_status(run.path).checkpoint
    assert (found.step, found.epoch) == (7, None)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (None, "does not exist"),
        ("", "holds neither a run (no config.yaml, env.json or jobs) nor an experiment"),
        ("seed0", "holds neither a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, folder, message):
    if folder is not None:
        (tmp_path / "x" / folder).mkdir(parents=True)
    (tmp_path / "file").touch()
    for stage in ("status", "logs"):
        for name, said in (("x", message), ("file", "is a file")):
            with pytest.raises(InputError, match=re.escape(said)):
                command(stage, tmp_path / name)


def test_a_run_that_was_only_submitted(tmp_path, slurm):
    run = RunDir(tmp_path / "new")
    put_job(run, "12")
    slurm(squeue_line("12", "PENDING", "Priority", ""), "")
    assert f"{run.path}: not started" in shown(run)
    assert "waiting for its turn (Priority)" in shown(run)


# ---- retrainings and experiments


def put_retraining(run: RunDir, name: str, *, result: dict[str, Any] | None = None) -> RunDir:
    inner = RunDir(run.retrain / name)
    inner.write_start({"train": {"epochs": 10}}, {"stage": "retrain", "world_size": 2})
    if result is not None:
        inner.write_result(result)
    return inner


def test_retrainings_are_counted_and_unfinished_ones_listed(run, slurm):
    run.write_result(RESULT)
    put_retraining(run, "a", result=RETRAINED)
    put_retraining(run, "b", result={"epochs": 10, "final_top1": 98.24, "best_top1": 98.3})
    beat(put_retraining(run, "running_one"), seconds_ago=3)
    beat(put_retraining(run, "failed_one"), "failed", message="ZeroDivisionError: division by zero")
    put_job(run, "20", stage="retrain", directory=str(run.retrain / "waits"))
    put_job(run, "21", stage="retrain", directory=str(run.retrain / "a"))
    slurm(squeue_line("20", "PENDING", "Priority") + squeue_line("21", "PENDING", "Priority"), "")
    lines = shown(run).splitlines()
    finished = "2 of 5 finished (final top-1 93.06 to 98.24 %, best epoch 98.30 %)"
    at = lines.index(f"retrainings: {finished}, 1 running, 1 stopped, 1 not started")
    so_far = "epoch 3 of 10 done, step 1,234 of 4,000 (30 %)"
    assert lines[at + 1].startswith(f"  failed_one   failed: {so_far}; ZeroDivisionErr")
    assert lines[at + 2].startswith(f"  running_one  training: {so_far}, 812 images/s, ")
    assert as_data(gather(run.path))["retrainings_not_started"] == 1


def test_when_all_are_finished_the_report_comes(run):
    run.write_result(RESULT)
    inner = put_retraining(run, "a", result=RETRAINED)
    assert shown(run).endswith(f"next: tdds report {run.path}")
    assert shown(inner).endswith(f"next: tdds report {run.path}")
    (run.path / "report.html").touch()
    for place in (run, inner):
        assert shown(place).endswith(f"next: open {run.path}/report.html in a browser")
    os.utime(run.path / "report.html", (0, 0))  # of before the retraining
    assert shown(run).endswith(f"next: tdds report {run.path}")


def test_an_experiment_shows_its_seeds_and_all_retrainings(tmp_path):
    for seed in (0, 1, 10, 2):
        run = RunDir(tmp_path / "exp" / f"seed{seed}")
        run.write_start({}, {"stage": "collect"})
        run.write_result(RESULT)
        result = {"epochs": 10, "final_top1": 90.0 + seed, "best_top1": 99.0}
        put_retraining(run, "a", result=result)
    assert [path.name for path in find_runs(tmp_path / "exp")] == "seed0 seed1 seed2 seed10".split()
    text = shown(tmp_path / "exp")
    assert "seed10: collect, finished" in text
    top1 = "final top-1 90.00 to 100.00 %, best epoch 99.00 %"
    assert f"retrainings: 4 of 4 finished ({top1})" in text
    anew = "the same `tdds experiment` again makes it anew"
    assert text.endswith(f"next: the table is in {tmp_path}/exp/table.md; {anew}")


# ---- jobs


def fail_on_rank_5(run: RunDir) -> Path:
    log_dir = put_job(run, "12", num_ranks=8)
    put_job(run, "13", name="select-tiny", stage="select", after=["12"])
    put_job(run, "14", name="retrain-tiny", stage="retrain", after=["13"])
    for rank in range(8):
        put_log(log_dir, "12", rank, f"this is rank {rank}\n")
        end = {"rank": rank, "time": 100.0 - rank, "host": "n2", "traceback": "Traceback"}
        end |= {"message": "ZeroDivisionError: division by zero"}
        append_end(log_dir, "12", EndRecord(**end, kind="failed" if rank == 5 else "lost"))
    return log_dir


FAILED = (
    sacct_line("12", "FAILED", "1:0")
    + sacct_line("13", "CANCELLED by 0")
    + sacct_line("14", "CANCELLED by 0")
)


def test_a_failed_job_its_cause_and_its_dependants(run, slurm):
    beat(run, "failed", message="gone")
    fail_on_rank_5(run)
    slurm("", FAILED)
    lines = shown(run).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("jobs of 20"))
    assert lines[at].endswith(f"(logs in {run.path}/jobs):")
    assert lines[at + 1].split() == ["id", "name", "state", "elapsed", "nodes"]
    assert lines[at + 2].split("  ")[1:3] == ["12", "collect-tiny"]
    assert "failed (exit code 1)" in lines[at + 2]
    assert lines[at + 2].endswith("00:10:02  n[1-2]")
    assert lines[at + 3] == "      rank 5 on n2: ZeroDivisionError: division by zero"
    assert lines[at + 4] == f"      more: tdds logs {run.path} --job 12 --rank 5"
    assert [line.split("  ")[1] for line in lines[at + 5 : at + 7]] == ["13", "14"]
    because = "cancelled because job 12 (collect-tiny) failed"
    assert all(because in line for line in lines[at + 5 : at + 7])
    again = "correct the cause and submit again, what is done is skipped"
    assert lines[-1] == f"next: `tdds logs {run.path}` shows the traceback; {again}"


def test_a_refused_job_wants_its_input_corrected(run, slurm):
    log_dir = put_job(run, "12")
    append_end(log_dir, "12", EndRecord("refused", message="tdds collect: error: x"))
    slurm("", sacct_line("12", "FAILED", "2:0"))
    assert "refused its input (exit code 2)" in shown(run)
    again = "correct what was refused and submit again; what is done is skipped"
    assert shown(run).endswith(f"next: {again}")


def test_a_job_whose_ranks_could_not_speak_is_explained_by_what_was_seen_after_them(run, slurm):
    log_dir = put_job(run, "12")
    seen = '{"what": "ranks ended without a word (srun: 137)"}\n'
    (log_dir / "12_failures.jsonl").write_text(seen)
    slurm("", sacct_line("12", "OUT_OF_MEMORY", "0:125"))
    lines = shown(run).splitlines()
    assert "ran out of memory" in lines[-4]
    assert lines[-3:] == [
        "      ranks ended without a word (srun: 137)",
        f"      more: tdds logs {run.path} --job 12",
        "next: submit again; what is done is skipped, the rest goes on from its last checkpoint",
    ]


def test_only_the_latest_submission_is_listed_but_earlier_ones_explain(run, slurm):
    put_job(run, "12", submission="first")
    put_job(run, "15", submission="first", name="other", after=["12"])
    put_job(run, "16", submission="second", after=["15"], name="later")
    cancelled = sacct_line("15", "CANCELLED by 0") + sacct_line("16", "CANCELLED by 0")
    slurm("", sacct_line("12", "TIMEOUT") + cancelled)
    assert "cancelled because job 12 (collect-tiny) met its time limit" in shown(run)
    assert [job["id"] for job in as_data(gather(run.path))["jobs"]] == ["16"]


def test_long_arrays_are_counted(run, slurm):
    for task in range(100):
        put_job(run, f"9_{task}", stage="retrain", title=f"cell {task}")
    states = ["RUNNING"] * 4 + ["PENDING"] * 56
    queue = [squeue_line(f"9_{task}", state) for task, state in enumerate(states)]
    over = [sacct_line(f"9_{task}", "COMPLETED") for task in range(60, 99)]
    slurm("".join(queue), "".join(over) + sacct_line("9_99", "FAILED", "1:0"))
    lines = shown(run).splitlines()
    assert "  and 56 pending, 39 finished" in lines
    assert sum(" running " in line for line in lines) == 4
    assert any("cell 99" in line and "failed" in line for line in lines)
    again = "see to the 1 that failed and submit again; what is done is skipped"
    assert lines[-1] == f"next: when the others are over, {again}"
    assert len(as_data(gather(run.path))["jobs"]) == 100


def test_status_without_a_scheduler_and_of_jobs_that_lie_elsewhere(run, tmp_path):
    beat(run)
    put_job(run, "12")
    assert "training" in shown(run)
    assert "unknown (squeue is not here; sacct is not here)" in shown(run)
    append_job(tmp_path / "elsewhere", JobRecord("77", name="there"))
    (run.path / "jobs.path").write_text(f"{tmp_path}/elsewhere\n")
    assert f"(logs in {tmp_path}/elsewhere):" in shown(run)
    assert " 77 " in shown(run)


def test_json_is_the_same_as_data(run, slurm, capsys):
    beat(run, "failed", message="gone", job="12")
    put_checkpoint(run, 1200, {"epoch": 3})
    put_retraining(run, "a", result=RETRAINED)
    fail_on_rank_5(run)
    slurm("", FAILED)
    command("status", run.path, "--json")
    data = json.loads(capsys.readouterr().out)
    assert data["next"] == as_lines(gather(run.path))[-1].removeprefix("next: ")
    (found,) = data["runs"]
    expected = {"state": "failed", "why": "gone", "job": "12", "world_size": 2}
    expected |= {"epoch": 3, "epochs": 10, "step": 1234, "steps": 4000}
    assert {key: found[key] for key in expected} == expected
    assert found["checkpoint"]["step"] == 1200
    assert [retraining["final_top1"] for retraining in found["retrainings"]] == [93.06]
    first, second, _ = data["jobs"]
    assert first["id"] == first["because_of"] == second["because_of"] == "12"
    assert (first["cause"]["rank"], first["state"]["exit_code"]) == (5, 1)
    assert (second["after"], second["state"]["state"]) == (["12"], "cancelled")


def test_watch_ends_when_nothing_runs(run, capsys):
    beat(run)
    timer = threading.Timer(0.5, lambda: run.write_result(RESULT))
    timer.start()
    command("status", run.path, "--watch", "1")
    timer.join()
    out = capsys.readouterr().out
    assert out.index("collect, training") < out.index("collect, finished")
    assert out.count("next:") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((f"--watch={seconds}", "--watch") for seconds in ("0", "-1", "nan", "inf", "1e9")),
        (
            "--watch --json",
            "--json is one object, and --watch prints one again and again; leave one out",
        ),
    ],
)
def test_watching_is_for_people_and_needs_a_sensible_pause(run, words, message):
    with pytest.raises(InputError, match=message):
        command("status", run.path, *words.split())


# ---- logs


def test_the_log_of_the_rank_that_failed_first(run, slurm, capsys):
    fail_on_rank_5(run)
    slurm("", FAILED)
    command("logs", run.path)
    why = "rank 5 failed first: ZeroDivisionError: division by zero"
    head = f"==> {run.path}/jobs/12_5_log.err (job 12 collect-tiny, {why})"
    assert capsys.readouterr().out == f"{head}\nthis is rank 5\n"
    assert choose_log(run.path, None, 3, "err")[0].name == "12_3_log.err"
    assert choose_log(run.path, "12", None, "err")[0].name == "12_5_log.err"


def test_a_job_that_runs_again_is_not_judged_by_what_it_died_of_before(run, slurm):
    fail_on_rank_5(run)
    slurm(squeue_line("12", "RUNNING"), "")
    path, said = choose_log(run.path, None, None, "err")
    assert path.name == "12_0_log.err"
    assert said == " (job 12 collect-tiny, rank 0 of ranks 0-7)"


def test_the_newest_log_or_that_of_a_job_that_runs(run, slurm):
    log_dir = put_job(run, "12")
    put_job(run, "13_0")
    put_job(run, "13_1")
    put_job(run, "14")  # has not started
    put_log(log_dir, "12", 0, "old", seconds_ago=100)
    put_log(log_dir, "13_0", 0, "newest", seconds_ago=10)
    put_log(log_dir, "13_1", 0, "new", seconds_ago=50)
    assert choose_log(run.path, None, None, "err")[0].name == "13_0_0_log.err"
    slurm(squeue_line("12", "RUNNING") + squeue_line("14", "PENDING"), "")
    assert choose_log(run.path, None, None, "err")[0].name == "12_0_log.err"


def test_what_cannot_be_shown_is_named(run):
    def refused(words: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            command("logs", run.path, *words.split())

    refused("", "log.txt does not exist")
    run.log_file.touch()
    refused("--rank 1", "--rank 1: .* has no jobs, and log.txt is written by rank 0 alone")
    refused("--job 1", "--job 1: .* has no jobs")
    log_dir = put_job(run, "12")
    refused("", "no job of .* has written a log yet; `tdds status .*` says what they wait for")
    for rank in (0, 1, 2, 5):
        put_log(log_dir, "12", rank, "x")
    others = "which has .err of ranks 0-2, 5; choose among these"
    refused("--rank 7", f"--rank 7 is none of job 12, {others}")
    refused("--job 12 --out", "--rank 0 is none of job 12, which has written no .out")
    refused("--job 99", "--job 99 is no job of .*; the latest are 12")
    refused("--lines=-1", "--lines -1 must be at least 0")


def test_standard_output_on_request_and_the_log_of_a_run_without_jobs(run, capsys):
    def printed(*words: str) -> str:
        command("logs", run.path, *words)
        return capsys.readouterr().out

    run.log_file.touch()
    assert printed() == f"==> {run.log_file} is empty\n"
    run.log_file.write_text("a\nb\n")
    assert printed("--lines", "1") == f"==> {run.log_file}\nb\n"
    log_dir = put_job(run, "12")
    put_log(log_dir, "12", 0, "errors\n")
    put_log(log_dir, "12", 0, "results\n", stream="out")
    head = "12_0_log.out (job 12 collect-tiny, rank 0 of ranks 0)"
    assert printed("--out").endswith(f"{head}\nresults\n")


def test_an_experiment_without_jobs_has_no_log_of_its_own(tmp_path):
    RunDir(tmp_path / "exp" / "seed0").write_start({}, {})
    with pytest.raises(InputError, match=r"give one of its runs, e.g. .*seed0"):
        command("logs", tmp_path / "exp")


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "a", "a\n", "a\nb", "a\n\nb\n"),
        *("é\r\n" * 40_000, "x" * 200_000, "\n" * 70_000, f"{'x' * 40_000}\n" * 5),
    ],
)
@pytest.mark.parametrize("num_lines", [0, 1, 2, 50])
def test_the_last_lines(tmp_path, text, num_lines):
    (tmp_path / "log").write_bytes(text.encode())
    out = io.StringIO()
    assert print_tail(tmp_path / "log", num_lines, out) == len(text.encode())
    lines = re.findall(r"[^\n]*\n|[^\n]+$", text)
    assert out.getvalue() == "".join(lines[-num_lines:])  # 0: all of them


def test_following_a_log(tmp_path):
    path = tmp_path / "log"
    path.write_text("before\n")
    position = print_tail(path, 0, io.StringIO())
    half, rest = (
        lambda: path.open("ab").write(b"one \xc3"),
        lambda: path.open("ab").write(b"\xa9\n"),
    )
    steps = iter([half, rest, lambda: path.write_text("new\n"), path.unlink, lambda: None])
    seen = io.StringIO()

    def is_over() -> bool:
        step = next(steps, None)
        if step is not None:
            step()
        return step is None

    follow(path, position, seen, is_over)
    assert seen.getvalue() == "one é\nnew\n"


# ---- cost


def test_status_answers_at_once_and_without_torch(run):
    beat(run)
    for number in range(150):
        put_retraining(run, f"cell{number}", result=RETRAINED)
    put_job(run, "12")
    program = (
        "import sys; from tdds_dist.launch.status import as_lines, gather; from pathlib import Path;"
        " print(*as_lines(gather(Path(sys.argv[1]))), sep='\\n'); print({'torch', 'submitit',"
        " 'torchvision', 'ffcv', 'numba', 'pydantic'} & sys.modules.keys())"
    )
    started = time.perf_counter()
    command, cwd = [sys.executable, "-c", program, str(run.path)], Path(__file__).parents[2]
    told = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    done = subprocess.run(command, cwd=cwd, **told)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "retrainings: 150 of 150 finished" in done.stdout
    assert time.perf_counter() - started < 5  # 0.3 s on an idle machine; tests share theirs
