"""`tdds status` and `tdds logs`: a run, its retrainings and its jobs on one screen, and the log
that matters.

Owns how these are put together and printed. What a run directory says, `tdds_dist.runs.status`
reads; what became of jobs, `job_states`, and why, `job_reasons`; which log it is, `logs`. Imports
no torch, and answers even where the scheduler does not.
"""

import argparse
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tdds_dist.errors import InputError
from tdds_dist.runs.directory import RunDir, read_objects
from tdds_dist.runs.status import RunStatus, find_runs, read_status
from tdds_dist.text import command, duration, table

from .job_reasons import explain
from .job_states import JobState, job_states
from .logs import choose_log, follow, print_tail
from .records import (
    EndRecord,
    JobRecord,
    first_cause,
    jobs_of,
    latest_submission,
    read_ends,
)

if TYPE_CHECKING:
    from tdds_dist.cli.options import Parsers

_WATCH_SECONDS = 30.0  # schedulers do not like to be asked more often
_MOST_JOBS = 30  # in the table; above, those that are done or wait are counted only


def add_status(stages: "Parsers") -> None:
    """Add the subcommand `status`."""
    stage = stages.add_parser(
        "status",
        help="where a run, its retrainings and its jobs are",
        description=(
            "Where a run or an experiment is: state, progress, last checkpoint, why it stopped; its"
            " retrainings; the jobs of the latest submission, and what to do next. Works while it"
            " runs, and when SLURM does not answer."
        ),
    )
    stage.takes("directory RUN", Path, "directory of a run, a retraining or an experiment")
    stage.flag("--json", "the same as data, on one line")
    stage.takes(
        "--watch SECONDS",
        float,
        f"again and again, until nothing runs any more (default: every {_WATCH_SECONDS:g} s)",
        nargs="?",
        const=_WATCH_SECONDS,
    )
    stage.set_defaults(run=_status, prints_itself=True)


def add_logs(stages: "Parsers") -> None:
    """Add the subcommand `logs`."""
    stage = stages.add_parser(
        "logs",
        help="the log of a job of a run",
        description=(
            "The end of the log of the newest job: of one that runs, else of the one that wrote"
            " last. Of a job that failed, the rank that failed first. A run without jobs has"
            " log.txt."
        ),
    )
    stage.takes("directory RUN", Path, "directory of a run, a retraining or an experiment")
    stage.takes("--job ID", str, "another job than the newest, as `tdds status` lists them")
    stage.takes("--rank R", int, "default: the one that failed first, else 0")
    stream = stage.add_mutually_exclusive_group()
    for word, what in (("out", "standard output"), ("err", "standard error (the default)")):
        stream.add_argument(f"--{word}", dest="stream", action="store_const", const=word, help=what)
    stage.takes("--lines N", int, "how many, 0 for all (default: 50)", default=50)
    stage.flag("--follow", "go on as it grows, until Ctrl-C")
    stage.flag("--json", "path and lines as data, on one line")
    stage.set_defaults(run=_logs, stream="err", prints_itself=True)


# ---- status


@dataclass(frozen=True)
class JobRow:
    """A job as it is shown."""

    job: JobRecord
    state: JobState
    text: str  # the state in words
    blamed: JobRecord | None  # the job whose end explains it
    cause: EndRecord | None  # how that ended


@dataclass(frozen=True)
class Status:
    """All that `tdds status` knows."""

    directory: Path
    runs: list[RunStatus]
    log_dir: Path | None
    rows: list[JobRow]  # of the latest submission
    num_waiting: int  # retrainings that were submitted and have no directory yet

    @property
    def is_active(self) -> bool:
        """Say whether anything waits or runs."""
        runs = [*self.runs, *self.retrainings]
        return any(run.is_active for run in runs) or any(row.state.is_active for row in self.rows)

    @property
    def retrainings(self) -> list[RunStatus]:
        """Return the retrainings of all runs."""
        return [retraining for run in self.runs for retraining in run.retrainings]


def gather(directory: Path) -> Status:
    """Look at the files, then ask the scheduler.

    Raises:
        InputError: it is the directory of neither a run nor an experiment.
    """
    runs = [read_status(path) for path in find_runs(directory)]
    log_dir, jobs, every_job = jobs_of(directory)
    latest = latest_submission(jobs)
    wanted = {job.id: job for job in latest}
    parents = {parent for job in latest for parent in job.after}
    # what they waited for, also of submissions before; the newest where a number came again
    for job in reversed(every_job):
        if parents & {job.id, job.id.partition("_")[0]}:
            wanted.setdefault(job.id, job)
            parents.update(job.after)
    states = job_states(wanted.values())
    rows = []
    for job in latest:
        text, blamed = explain(job, wanted.values(), states)
        rows.append(JobRow(job, states[job.id], text, blamed, _cause(blamed) if blamed else None))
    seen = {Path(status.directory).resolve() for run in runs for status in (run, *run.retrainings)}
    waiting = {
        path
        for row in rows
        if row.job.stage == "retrain"
        and row.state.is_active
        and row.job.directory
        and (path := Path(row.job.directory).resolve()) not in seen
    }
    return Status(directory, runs, log_dir, rows, len(waiting))


def _cause(job: JobRecord) -> EndRecord | None:
    """Say why a job failed, by its ranks; where they had no time to write it, by what was written
    when they had ended."""
    if (found := first_cause(read_ends(job.log_dir, job.id))) is not None:
        return found
    after = [
        line
        for line in read_objects(job.log_dir / f"{job.id}_failures.jsonl")
        if isinstance(line.get("what"), str)
    ]
    return EndRecord("lost", -1, message=" ".join(after[-1]["what"].split())) if after else None


def _status(options: argparse.Namespace) -> None:
    if options.watch is not None and not 1 <= options.watch <= 86400:
        raise InputError(
            f"--watch {options.watch:g} must be between 1 and 86400 seconds; leave the number out"
            f" for {_WATCH_SECONDS:g}"
        )
    if options.json and options.watch is not None:
        raise InputError(
            "--json is one object, and --watch prints one again and again; leave one out"
        )
    clear = "\033[H\033[2J" if sys.stdout.isatty() and not options.json else ""
    while True:
        status = gather(options.directory)
        text = json.dumps(as_data(status)) if options.json else "\n".join(as_lines(status))
        print(clear * (options.watch is not None) + text, flush=True)
        if options.watch is None or not status.is_active:
            return
        if not clear:
            print(flush=True)
        time.sleep(options.watch)


def as_data(status: Status) -> dict[str, Any]:
    """Return what `--json` prints."""
    rows = [
        row.job.as_data()
        | {
            "state": asdict(row.state),
            "text": row.text,
            "because_of": row.blamed and row.blamed.id,
            "cause": row.cause and asdict(row.cause),
        }
        for row in status.rows
    ]
    data = {
        "directory": str(status.directory),
        "runs": [asdict(run) for run in status.runs],
        "log_dir": status.log_dir and str(status.log_dir),
        "jobs": rows,
        "retrainings_not_started": status.num_waiting,
        "next": next_step(status),
    }
    return json.loads(json.dumps(data))  # tuples are lists, as they are read


def as_lines(status: Status) -> list[str]:
    """Return the lines that a person reads."""
    lines = [line for run in status.runs for line in run_lines(run)]
    lines += retraining_lines(status.retrainings, status.num_waiting)
    if status.rows:
        first = time.localtime(min(row.job.time for row in status.rows))
        submitted = time.strftime("%Y-%m-%d %H:%M:%S", first)
        lines += [f"jobs of {submitted} (logs in {status.log_dir}):", *_job_lines(status)]
    return [*lines, f"next: {next_step(status)}"]


# of states that are no words for people
_WORDS = {
    "new": "not started",
    "lost": "ended without a word",
    "copying": "copying to data.cache",
}


def run_lines(status: RunStatus) -> list[str]:
    """Describe the run itself in a few lines; the first has no indent."""
    lines = [
        f"{status.directory}:"
        f" {', '.join(filter(None, (status.stage, _WORDS.get(status.state, status.state))))}"
    ]
    if progress := progress_text(status):
        lines.append(f"  {progress}")
    seconds = status.updated_seconds_ago
    facts = (
        _count(status.world_size, "rank"),
        f"on {status.host}" if status.host else "",
        f"job {status.job}" if status.job else "",
        f"resumed {_count(status.num_resumes, 'time')}" if status.num_resumes else "",
        f"last update {duration(seconds)} ago" if seconds is not None else "",
    )
    if any(facts):
        lines.append("  " + ", ".join(filter(None, facts)))
    if last := status.checkpoint:
        epoch = f"epoch {last.epoch}, " if last.epoch is not None else ""
        lines.append(
            f"  last checkpoint: {epoch}step {last.step:,}, {duration(last.age_seconds)} ago"
        )
    if status.why:
        lines.append(f"  why: {status.why}")
    return lines + [f"  warning: {warning}" for warning in status.warnings]


def progress_text(status: RunStatus) -> str:
    """Say in one line how far a run is."""
    if status.state == "finished":
        top1 = (
            f"final top-1 {status.final_top1:.2f} %" if status.final_top1 is not None else "",
            f"best {status.best_top1:.2f} %" if status.best_top1 is not None else "",
        )
        return ", ".join(filter(None, (f"{status.epochs} epochs" if status.epochs else "", *top1)))
    of_epochs = f" of {status.epochs}" if status.epochs else ""
    of_steps = (
        f" of {status.steps:,} ({100 * (status.step or 0) // status.steps} %)"
        if status.steps
        else ""
    )
    parts = (
        f"epoch {status.epoch}{of_epochs} done" if status.epoch or status.epochs else "",
        (
            f"step {status.step:,}{of_steps}"
            if status.step is not None and (status.step or status.steps)
            else ""
        ),
        f"{status.images_per_second:,.0f} images/s" if status.images_per_second else "",
        f"about {duration(status.eta_seconds)} left" if status.eta_seconds else "",
    )
    return ", ".join(filter(None, parts))


def retraining_lines(found: Sequence[RunStatus], num_waiting: int = 0) -> list[str]:
    """Count the retrainings that finished, and give a line to each of the others."""
    if not found and not num_waiting:
        return []
    finished = [status for status in found if status.state == "finished"]
    top1 = sorted(
        (status.final_top1, status.best_top1)
        for status in finished
        if status.final_top1 is not None and status.best_top1 is not None
    )
    text = f"{len(finished)} of {len(found) + num_waiting} finished"
    if top1:
        text += (
            f" (final top-1 {top1[0][0]:.2f} to {top1[-1][0]:.2f} %, best epoch"
            f" {max(best for _, best in top1):.2f} %)"
        )
    counts = [
        (sum(status.is_active for status in found), "running"),
        (sum(status.state in ("failed", "stopped", "lost") for status in found), "stopped"),
        (num_waiting + sum(status.state == "new" for status in found), "not started"),
    ]
    lines = [
        "retrainings: " + ", ".join([text, *(f"{count} {word}" for count, word in counts if count)])
    ]
    width = max((len(status.name) for status in found if status.state != "finished"), default=0)
    for status in found:
        if status.state != "finished":
            said = "; ".join(filter(None, (progress_text(status), status.why, *status.warnings)))
            state = _WORDS.get(status.state, status.state)
            lines.append(f"  {status.name:<{width}}  {state}: {said}".rstrip(" :"))
    return lines


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}" if number else ""


def _job_lines(status: Status) -> list[str]:
    """Put the jobs into a table, with the cause below a job that failed."""
    shown, hidden = status.rows, Counter[str]()
    if len(shown) > _MOST_JOBS:
        shown = [
            row
            for row in status.rows
            if row.state.state not in ("finished", "pending") or row.blamed
        ]
        hidden.update(row.state.state for row in status.rows if row not in shown)
    cells = [("id", "name", "title", "state", "restarts", "elapsed", "nodes")]
    cells += [
        (
            row.job.id,
            row.job.name,
            row.job.title if row.job.title != row.job.name else "",
            row.text,
            str(row.state.restarts or ""),
            row.state.elapsed,
            row.state.nodes,
        )
        for row in shown
    ]
    used = [column for column in range(len(cells[0])) if any(line[column] for line in cells[1:])]
    texts = [f"  {line}" for line in table([[line[column] for column in used] for line in cells])]
    lines, told = texts[:1] if shown else [], set()
    for row, text in zip(shown, texts[1:], strict=True):
        lines.append(text)
        if row.blamed and row.cause and row.blamed.id not in told:
            told.add(row.blamed.id)
            words = ["logs", status.directory, "--job", row.blamed.id]
            what, who = " ".join(row.cause.message.split()), ""
            if row.cause.rank >= 0:
                host = f" on {row.cause.host}" if row.cause.host else ""
                who = f"rank {row.cause.rank}{host}: "
                words += ["--rank", row.cause.rank]
            lines += [f"      {who}{what}", f"      more: {command(*words)}"]
    if hidden:
        counts = ", ".join(f"{count} {word}" for word, count in hidden.items())
        lines.append(f"  and {counts}")
    return lines


_NEVER = (
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "BadConstraints",
    "AccountNotAllowed",
    "QOSNotAllowed",
    "InvalidAccount",
    "InvalidQOS",
    "DependencyNeverSatisfied",
)  # reasons that waiting does not mend


def next_step(status: Status) -> str:
    """Say in one line what a person would do now."""
    bad = [row for row in status.rows if row.state.is_bad]
    runs = [*status.runs, *status.retrainings]
    logs = command("logs", status.directory)
    never = [
        row
        for row in status.rows
        if row.state.state == "pending" and row.state.reason.startswith(_NEVER)
    ]
    if never:
        active = [row.job.id.partition("_")[0] for row in status.rows if row.state.is_active]
        ids = " ".join(dict.fromkeys(active))
        return (
            f"job {never[0].job.id} will not start as it is ({never[0].state.reason}); scancel"
            f" {ids}, adapt the cluster file and submit again"
        )
    if status.is_active:
        if bad:
            return (
                f"when the others are over, see to the {len(bad)} that failed and submit again;"
                " what is done is skipped"
            )
        if status.rows:
            return f"nothing to do; `{logs} --follow` shows what it says"
        return "nothing to do"
    if any(row.cause and row.cause.kind == "refused" for row in bad):
        return "correct what was refused and submit again; what is done is skipped"
    if any(row.cause and row.cause.kind == "failed" for row in bad):
        return (
            f"`{logs}` shows the traceback; correct the cause and submit again, what is done is"
            " skipped"
        )
    if bad:
        return "submit again; what is done is skipped, the rest goes on from its last checkpoint"
    if unfinished := [run for run in runs if run.state != "finished"]:
        again = "submit again" if status.rows else "start the same command again"
        has_checkpoint = any(run.checkpoint for run in unfinished)
        from_where = "goes on from its last checkpoint" if has_checkpoint else "starts over"
        known = "" if status.rows or len(unfinished) > 1 else _started_by(unfinished[0])
        return (
            f"{again}; {'it' if len(unfinished) == 1 else 'each'}"
            f" {from_where}{known and f': {known}'}"
        )
    if len(status.runs) > 1 or status.directory.joinpath("table.md").is_file():
        return (
            f"the table is in {status.directory / 'table.md'}; the same `tdds experiment` again"
            " makes it anew"
        )
    run = status.runs[0]
    if run.stage == "train":
        return f"the weights are in {status.directory / 'models' / 'final.pt'}; nothing is left"
    if run.stage == "retrain":
        return _report_or_page(status.directory.parent.parent, runs)
    if status.retrainings:
        return _report_or_page(status.directory, runs)
    coresets = sorted(RunDir(status.directory).coresets.glob("*.npz"))
    if coresets:
        config = status.directory / "config.yaml"
        return command("retrain", config, "--coreset", coresets[0], "--strategy", "E")
    return _select(status.directory)


def _started_by(run: RunStatus) -> str:
    """Return the command that started a run; empty where it does not say so itself."""
    if len(run.command) < 2 or run.command[0] != "tdds":
        return ""
    return command(*run.command[1:], ranks=run.world_size or 1)


def _report_or_page(directory: Path, runs: list[RunStatus]) -> str:
    """Return the page, where one was written after the last of `runs` had finished."""
    page = directory / "report.html"
    try:
        if page.stat().st_mtime >= max(
            (Path(run.directory) / "result.json").stat().st_mtime for run in runs
        ):
            return f"open {page} in a browser"
    except OSError:  # there is none
        pass
    return command("report", directory)


def _select(directory: Path) -> str:
    """Return the command that the collection itself ends with; a plain one where its config cannot
    be read."""
    from tdds_dist.cli.scores import select_command
    from tdds_dist.config.run import parse_config

    try:
        return select_command(parse_config(RunDir(directory).read_config()), directory)
    except (OSError, ValueError, TypeError, RecursionError, InputError, yaml.YAMLError):
        return f"`{command('select', directory, '--pruning-rate', 'P')}` makes a coreset"


# ---- logs


def _logs(options: argparse.Namespace) -> None:
    if options.lines < 0:
        raise InputError(f"--lines {options.lines} must be at least 0 (0 shows all)")
    if options.json and options.follow:
        raise InputError("--json is one object at the end, and --follow has none; leave one out")
    path, choice = choose_log(options.directory, options.job, options.rank, options.stream)
    if options.json:
        text = io.StringIO()
        print_tail(path, options.lines, text)
        print(
            json.dumps({"stage": "logs", "path": str(path), "lines": text.getvalue().splitlines()}),
            flush=True,
        )
        return
    print(f"==> {path}{choice}{'' if path.stat().st_size else ' is empty'}", flush=True)
    end = print_tail(path, options.lines, sys.stdout)
    if options.follow:
        try:
            follow(path, end, sys.stdout)
        except KeyboardInterrupt:  # the way to end it, no failure
            print(flush=True)
