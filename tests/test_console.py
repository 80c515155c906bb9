"""What people see: lines that are neither too many nor too few, colours on terminals only, and how
a stage closes."""

import io
import json
import logging
import re
import time
from pathlib import Path

import pytest

from tdds_dist import console
from tdds_dist.cli.outcome import Outcome
from tdds_dist.console import HEADING, LogFile, Progress, attached, log, paint, speaking
from tdds_dist.text import command, duration, same_command, size_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves on; `clock[0]` is now."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def lines_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == "", "progress and messages go to standard error"
    return captured.err.splitlines()


def train(clock, epochs, epoch_seconds, log_file, steps=20):
    """Epochs as the training loop shows them."""
    with (
        speaking(),
        attached(LogFile(log_file)),
        Progress("training", epochs * steps, "", visible=True) as progress,
    ):
        for epoch in range(1, epochs + 1):
            progress.note(f"epoch {epoch}/{epochs}")
            for _ in range(steps):
                clock[0] += epoch_seconds / steps
                progress.advance()
            progress.tell(f"epoch {epoch} is over", always=epoch == epochs)


# ---- lines where there is no terminal


def test_short_epochs_are_no_flood_and_the_log_has_all(clock, capsys, tmp_path):
    train(clock, 100, 1.0, tmp_path / "log.txt")
    lines = lines_of(capsys)
    assert lines[0] == "epoch 1 is over"
    assert lines[-1] == "epoch 100 is over"
    assert 10 <= len(lines) <= 13
    assert all(line.endswith("is over") for line in lines), (
        "no other line where these come often enough"
    )
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        f"epoch {epoch} is over" for epoch in range(1, 101)
    ]


def test_long_epochs_are_all_told_with_lines_in_between(clock, capsys, tmp_path):
    train(clock, 3, 60.0, tmp_path / "log.txt")
    lines = lines_of(capsys)
    assert [line for line in lines if "over" in line] == [
        f"epoch {epoch} is over" for epoch in (1, 2, 3)
    ]
    between = [line for line in lines if "over" not in line]
    assert 12 <= len(between) <= 15  # every 10 s, of which the end of an epoch takes one
    assert between[0] == "training: 6 %, epoch 1/3, 2 min 48 s left"  # 4 of 60 steps of 3 s
    assert between[-2].startswith("training: 9")


def test_the_interval_can_be_set(clock, capsys, monkeypatch, tmp_path):
    for text, num in [("0", 40), ("30", 3), ("nonsense", 7), ("-1", 7), ("inf", 7)]:
        monkeypatch.setenv("TDDS_PROGRESS_SECONDS", text)
        with Progress("check", 40, "images", visible=True) as progress:
            for _ in range(40):
                clock[0] += 2.0
                progress.advance()
        assert len(lines_of(capsys)) == pytest.approx(num, abs=1), text


def test_a_line_has_counts_speed_and_the_time_that_is_left(clock, capsys):
    with Progress("check", 40_000, "images", visible=True) as progress:
        clock[0] += 60.0  # of which the speed knows nothing: something was compiled
        progress.advance(5_000)
        clock[0] += 10.0
        progress.advance(5_000)
    assert lines_of(capsys) == [
        "check: 12 %, 5,000 of 40,000 images",
        "check: 25 %, 10,000 of 40,000 images, 500 images/s, 1 min 0 s left",
    ]


def test_a_run_that_goes_on_starts_where_it_is(clock, capsys):
    """What an earlier start did counts in the share, and not in the speed."""
    with Progress("training", 100, "", visible=True, done=80, note="epoch 9/10") as progress:
        progress.advance(5)
        clock[0] += 20.0
        progress.advance(5)
    assert lines_of(capsys) == ["training: 90 %, epoch 9/10, 40 s left"]


def test_others_than_rank_0_and_quiet_ones_are_silent(clock, capsys, tmp_path):
    with Progress("x", 3, "images", visible=False) as hidden:
        clock[0] += 100.0
        hidden.advance()
    with (
        speaking(quiet=True),
        attached(LogFile(tmp_path / "log.txt")),
        Progress("x", 3, "images", visible=True) as silenced,
    ):
        clock[0] += 100.0
        silenced.advance()
        silenced.tell("epoch", always=True)
    assert lines_of(capsys) == []
    assert "epoch" in (tmp_path / "log.txt").read_text()


def test_a_step_costs_next_to_nothing(monkeypatch):
    """The training loop calls it once per step, which takes milliseconds at least."""
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr("sys.stderr", stream)
        with Progress("training", 10**9, "", visible=True) as progress:
            started = time.perf_counter()
            for _ in range(20_000):
                progress.advance(24)
            assert (time.perf_counter() - started) / 20_000 < 20e-6


# ---- a bar on a terminal


def test_the_bar_says_the_same(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with speaking(), Progress("training", 100, "", visible=True, note="epoch 1/4") as progress:
        progress.note("epoch 2/4, 812 images/s, loss 0.412, top-1 97.20 %", now=True)
        log.info("said above it")
    text = stream.getvalue()
    assert "training   0 %|" in text
    assert "| epoch 2/4, 812 images/s, loss 0.412, top-1 97.20 %, " in text
    assert "said above it\n" in text
    assert text.endswith("\r"), "the bar is gone in the end"


def test_a_dumb_terminal_gets_lines(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with Progress("check", 4, "images", visible=True) as progress:
        progress.advance()
        clock[0] += 20.0
        progress.advance()
    assert stream.getvalue() == "check: 50 %, 2 of 4 images, 0.05 images/s, 40 s left\n"


# ---- messages and colours


def test_warnings_are_counted_and_said_even_when_quiet(capsys, tmp_path):
    with speaking(quiet=True) as warnings:
        with attached(LogFile(tmp_path / "log.txt")):
            log.info("collect x: 5 images", extra=HEADING)
            log.warning("the disk is full")
            log.debug("finished, 100 %")
        log.error("run 3: FAILED")
        assert warnings == ["the disk is full"]
    with speaking() as others, attached(LogFile(tmp_path / "no such folder/log.txt")):
        log.info("resumes")
        log.debug("for the log alone, which cannot be written")
    assert others == []
    assert lines_of(capsys) == ["warning: the disk is full", "run 3: FAILED", "resumes"]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == [
        "collect x: 5 images",
        "warning: the disk is full",
        "finished, 100 %",
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line[:20]) for line in lines)


def test_a_program_that_uses_the_package_gets_no_handlers(capsys, caplog):
    with speaking(), attached(LogFile(Path("nowhere"))):
        pass
    assert log.handlers == []
    assert not log.isEnabledFor(logging.INFO)
    log.info("for a program that asks for it")
    log.warning("goes to its own handlers")
    assert caplog.messages == ["goes to its own handlers"]
    assert lines_of(capsys) == []


def test_the_heads_of_messages_are_coloured(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with speaking():
        log.info("collect x: 5 images", extra=HEADING)
        log.warning("late")
    assert stream.getvalue() == "\033[1mcollect x\033[0m: 5 images\n\033[33mwarning:\033[0m late\n"


@pytest.mark.parametrize(
    ("term", "no_color", "stream", "painted"),
    [
        ("xterm", None, Terminal, True),
        ("xterm", None, io.StringIO, False),
        ("xterm", "1", Terminal, False),
        # an empty NO_COLOR means not set
        ("xterm", "", Terminal, True),
        ("dumb", "", Terminal, False),
    ],
)
def test_colours_are_for_terminals(monkeypatch, term, no_color, stream, painted):
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert paint("wrote", "green", stream()) == ("\033[32mwrote\033[0m" if painted else "wrote")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0 s"),
        (4.04, "4 s"),
        (None, "–"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (250, "4 min 10 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (7199, "2 h 0 min"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


# ---- the closing block


def test_sizes_in_words():
    assert [size_text(number) for number in (0, 999, 1000, 640_588_000, 80e9, 2.5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "640.6 MB",
        "80 GB",
        "2.5 TB",
    ]


@pytest.fixture
def closing(tmp_path):
    (tmp_path / "a.npz").write_bytes(bytes(2048))
    (tmp_path / "run/models").mkdir(parents=True)
    (tmp_path / "run/models/final.pt").write_bytes(bytes(3 * 2**20))
    return Outcome(
        [tmp_path / "a.npz", tmp_path / "run"],
        {
            "images": 1281167,
            "epochs": 90,
            "seconds": 250.0,
            "final_top1": 73.456,
            "memory_bytes": 3 * 2**30,
            "scoring_share": None,
        },
        "tdds report run",
        ["noise: none"],
    )


def test_a_closing_block_lists_files_numbers_warnings_and_the_next_command(closing, tmp_path):
    assert closing.as_text(io.StringIO(), num_warnings=2).splitlines() == [
        f"wrote {tmp_path}/a.npz (2.048 kB)",
        f"wrote {tmp_path}/run (3.146 MB)",
        (
            "  1,281,167 images, 90 epochs, 4 min 10 s, final top-1 73.46 %, peak memory 3.221 GB,"
            " 2 warnings, see above"
        ),
        "noise: none",
        "next: tdds report run",
    ]
    data = json.loads(json.dumps(closing.as_data("collect", ["one"])))
    assert data["wrote"][1] == {"path": f"{tmp_path}/run", "bytes": 3 * 2**20}
    assert data["numbers"]["final_top1"] == 73.456
    assert (data["stage"], data["warnings"], data["next"], data["exit_code"]) == (
        "collect",
        ["one"],
        "tdds report run",
        0,
    )


def test_numbers_are_not_torn_from_their_words(closing):
    many = Outcome(
        numbers=dict.fromkeys(
            ("checked", "corrupted_images", "images_per_second", "changed_labels", "final_top1"),
            1_000_000,
        )
        | {"scoring_share": 0.01}
    )
    lines = many.as_text(io.StringIO()).splitlines()
    assert len(lines) > 1
    assert all(line.endswith(",") for line in lines[:-1])
    assert "\xa0" not in "".join(lines)


def test_commands_can_be_typed_as_they_are(monkeypatch):
    assert (
        command("select", "runs/a b", "--pruning-rate", 0.5)
        == "tdds select 'runs/a b' --pruning-rate 0.5"
    )
    assert (
        command("retrain", "x.yaml", ranks=8)
        == "torchrun --nproc-per-node 8 -m tdds_dist retrain x.yaml"
    )
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["collect", "x.yaml", "score.windows=[{T: 3, K: 2}]"]
    assert same_command(words) == "tdds collect x.yaml 'score.windows=[{T: 3, K: 2}]'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert same_command(words) == "the same command on every rank"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert same_command(words) == "the same torchrun command"


def test_a_program_of_ones_own_hears_what_goes_to_the_log_of_a_run(caplog, tmp_path):
    with attached(LogFile(tmp_path / "log.txt")):
        log.warning("a checkpoint failed")
    assert "a checkpoint failed" in caplog.text
