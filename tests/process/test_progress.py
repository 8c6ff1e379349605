"""Bars with rate and time left on a terminal, plain lines elsewhere."""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dis_scale.cli import shared
from dis_scale.process.context import Context
from dis_scale.process.progress import PLAIN_EVERY_S, RATE_OVER_S, Board, rate_words, time_words
from pipelines import lines
from tests.support import waiting


@pytest.fixture
def clock() -> list[float]:
    """Time of a board in seconds; a test sets it."""
    return [0.0]


@pytest.fixture
def console() -> Console:
    """A console that is not a terminal."""
    return Console(file=io.StringIO(), force_terminal=False, width=120, record=True)


def test_plain_lines_show_rate_and_time_left_at_intervals(clock: list[float], console: Console) -> None:
    with Board(console, lambda: clock[0]) as board:
        for seconds, done in [(20, 100), (21, 110), (40, 300), (41, 400), (42, 400)]:
            clock[0] = seconds
            board.update("train dis", done, 400, "images")
        board.say("  dis at 400 images")
    assert console.export_text().splitlines() == [
        "train dis: 100/400 images",
        "train dis: 300/400 images, 10.0 images/s, 10 s left",
        "train dis: 400/400 images",
        "  dis at 400 images",
    ]


def terminal(width: int = 120, **environment: str) -> tuple[Console, io.StringIO]:
    """A console on a terminal, and what it has received."""
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, _environ={"TERM": "xterm"} | environment), out


def plain(text: str) -> str:
    """The text without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_gets_a_bar_for_each_stage() -> None:
    console, out = terminal()
    with Board(console) as board:
        board.update("train dis", 100, 400, "images")
        board.update("evaluate", 1, 4, "blocks")
        board.say("a line above the bars")
    shown = out.getvalue()
    assert all(words in shown for words in ("train dis", "100/400 images", "1/4 blocks", "a line above the bars", "━"))


def frame(width: int, clock: list[float]) -> list[str]:
    """Return the last lines of two stages on a terminal of this width."""
    console, out = terminal(width)
    with Board(console, lambda: clock[0]) as board:
        for seconds, done in [(20, 100), (40, 300)]:
            clock[0] = seconds
            board.update("train dis-m", done, 400, "images")
            board.update("evaluate", done // 100, 64, "blocks")
    return plain(out.getvalue()).splitlines()[-2:]


@pytest.mark.parametrize("width", [120, 100, 60, 40])
def test_each_stage_has_one_line_in_any_width(clock: list[float], width: int) -> None:
    lines = frame(width, clock)
    assert [line.split()[0][:5] for line in lines] == ["train", "evalu"]
    assert max(map(len, lines)) <= width
    if width >= 100:
        assert "300/400 images 10.0 images/s 10 s left" in lines[0]


@pytest.mark.parametrize("settings", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}], ids=["dumb terminal", "asked for lines"])
def test_a_terminal_without_a_cursor_gets_lines(settings: dict[str, Any]) -> None:
    console, out = terminal(**settings)
    with Board(console) as board:
        board.update("train dis", 400, 400, "images")
    assert out.getvalue() == "train dis: 400/400 images\n"


def test_a_full_disk_under_the_log_ends_nothing() -> None:
    """A job whose line cannot be written would count as failed, and so would the next model's."""
    full = Path("/dev/full").open("w")  # noqa: SIM115  # closing it writes what it has kept
    Board(Console(file=full)).say("train dis")
    with contextlib.redirect_stdout(full):
        lines.write("{}")
    with pytest.raises(OSError, match="No space left on device"):
        full.close()


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("command", "codes"), [(["resume", "/none"], (2, 2)), (["recipe", "list"], (120, 70))], ids=["a sweep", "another"]
)
def test_a_full_disk_under_the_log_changes_no_exit_code_of_a_sweep(
    command: list[str], codes: tuple[int, int], unbuffered: str
) -> None:
    """Python would end with 120, which no scheduler tries again. Of another command the output is what it is for."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "dis_scale", *command], stdout=full, stderr=full, check=False, env=environment)
    assert done.returncode == codes[bool(unbuffered)]


@pytest.mark.parametrize("json", [False, True], ids=["lines", "json"])
def test_forced_colours_move_no_cursor_in_a_file(monkeypatch: pytest.MonkeyPatch, json: bool) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("DIS_SCALE_LOG", "json" if json else "lines")
    with contextlib.redirect_stdout(io.StringIO()) as out, Board(shared.driver_console(Context())) as board:
        board.update("train dis", 400, 400, "images")
    assert "\x1b" not in out.getvalue()
    assert "train dis: 400/400 images" in out.getvalue()


CHILD = """
import sys, time
from rich.console import Console
from dis_scale.process.progress import Board
with Board(Console()) as board:
    for done in range(1, 100_000):
        board.update("train dis-m", done, 1_000_000, "images")
        time.sleep(0.02)
"""


def test_a_terminal_that_is_resized_keeps_whole_lines() -> None:
    """On a real terminal, from wide to narrow and back; at the end the cursor is visible again."""
    ours, theirs = pty.openpty()
    environment = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "FORCE_COLOR", "TTY_INTERACTIVE")}
    resize(ours, 100)
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm"}) as child:
        os.close(theirs)
        complete = r"━ \S+ images \S+ images/s +\S+ (s|min|h) left"
        for width, shown in [(100, complete), (40, r"^trai… "), (100, complete)]:
            resize(ours, width)
            child.send_signal(signal.SIGWINCH)
            assert len(read_until(ours, shown)) <= width
        child.send_signal(signal.SIGINT)
        assert "\x1b[?25h" in read_all(ours)


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def read_until(terminal: int, pattern: str) -> str:
    """Read until a complete line matches; return it."""
    text, deadline = "", time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, text
        assert select.select([terminal], [], [], 60)[0], text
        text += os.read(terminal, 1 << 16).decode(errors="ignore")
        *lines, _ = re.split(r"[\r\n]+", plain(text))
        if found := [line for line in lines if re.search(pattern, line)]:
            return found[-1].rstrip()


def read_all(terminal: int) -> str:
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal without a process
        while part := os.read(terminal, 1 << 16):
            text += part
    return text.decode()


def test_a_stage_that_starts_is_said_to_work_each_ten_seconds_for_two_minutes(clock: list[float], console: Console) -> None:
    """It may wait for machines for days, and repeats each ten minutes that it has done nothing yet."""
    board = Board(console, lambda: clock[0])
    board.say("a line")
    for seconds in range(1, 7200):
        clock[0] = float(seconds)
        board.at_work("train dis")
        if seconds % 600 == 0:
            board.update("train dis", 0, 400, "images")
    lines = console.export_text().splitlines()
    assert lines[:14] == ["a line", *["train dis: at work"] * 13]
    assert Counter(lines[14:]) == {"train dis: 0/400 images": 11, "train dis: at work": 11}


def test_two_stages_with_slow_steps_are_said_to_work_once_in_each_silence(clock: list[float], console: Console) -> None:
    """One of them waits for what the other publishes, without progress of its own."""
    board = Board(console, lambda: clock[0])
    for seconds in range(2000):
        clock[0] = float(seconds)
        for name in ("evaluate", "train dis"):
            board.at_work(name)
        if seconds % 50 == 0:
            board.update("train dis", seconds, 4000, "images")
    late = console.export_text().splitlines()[20:]
    assert len(late) > 20
    assert abs(sum(line.endswith("at work") for line in late) - len(late) / 2) <= 1


def test_a_block_that_shows_nothing_is_said_to_work_until_its_end(clock: list[float], console: Console) -> None:
    board = Board(console, lambda: clock[0])
    clock[0] = 1000.0  # what was silent before is not the block
    with board.working("measure"):
        for past_s in (20, 200):
            clock[0] = 1000.0 + past_s
            waiting.wait_until(lambda: f"measure, {time_words(past_s)} so far" in console.export_text(clear=False), 10)  # noqa: B023
    clock[0] = 2000.0
    time.sleep(1.5)
    assert len(console.export_text().splitlines()) == 2


def test_progress_does_not_run_back(clock: list[float], console: Console) -> None:
    board = Board(console, lambda: clock[0])
    for seconds, done in [(20, 300), (40, 100)]:
        clock[0] = seconds
        board.update("train dis", done, 400, "images")
    assert console.export_text().splitlines()[-1] == "train dis: 300/400 images"


def test_a_stage_that_slows_down_shows_its_new_rate_within_half_a_minute(clock: list[float], console: Console) -> None:
    """A hundred images a second for 100 s, then ten a second."""
    board = Board(console, lambda: clock[0])
    for second in range(100 + int(RATE_OVER_S + PLAIN_EVERY_S) + 1):
        clock[0] = second + 1.0
        done = 100 * min(second, 100) + 10 * max(0, second - 100)
        board.update("train dis", done, 20_000, "images")
    rates = [line.split(", ")[1] for line in console.export_text().splitlines() if "images/s" in line]
    assert rates[0] == "100.0 images/s"
    assert rates[-1] == "10.0 images/s"


def test_the_time_before_the_first_progress_does_not_count(clock: list[float], console: Console) -> None:
    """A first step that takes half a minute, then ten a second."""
    board = Board(console, lambda: clock[0])
    for second, done in [(0, 0), (1, 0), (30, 64), (46, 704)]:
        clock[0] = second
        board.update("train dis", done, 10_000, "images")
    assert "40.0 images/s" in console.export_text().splitlines()[-1]


def test_no_rate_is_shown_before_there_are_two_counts(clock: list[float], console: Console) -> None:
    board = Board(console, lambda: clock[0])
    for second in (0.0, 20.0):
        clock[0] = second
        board.update("evaluate", 1, 64, "blocks")
    assert set(console.export_text().splitlines()) == {"evaluate: 1/64 blocks"}


def test_slow_units_are_shown_in_seconds_per_unit(clock: list[float], console: Console) -> None:
    board = Board(console, lambda: clock[0])
    for done in range(4):
        clock[0] = 20 + 41.0 * done
        board.update("evaluate", done, 64, "blocks")
    assert console.export_text().splitlines()[-1] == "evaluate: 3/64 blocks, 41 s per block, 42 min left"


@pytest.mark.parametrize(
    ("per_second", "words"),
    [(1234.5, "1,234.5 images/s"), (1.0, "1.0 images/s"), (0.4, "2.5 s per image"), (1 / 41, "41 s per image")],
)
def test_rates_in_words(per_second: float, words: str) -> None:
    assert rate_words(per_second, "images") == words
    assert rate_words(per_second, "images of noise") == words


@pytest.mark.parametrize(("seconds", "words"), [(50, "50 s"), (119, "119 s"), (2520, "42 min"), (12_600, "3.5 h")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert time_words(seconds) == words


def test_a_finished_stage_is_logged_once(clock: list[float], console: Console) -> None:
    board = Board(console, lambda: clock[0])
    for seconds, done in [(20, 64), (21, 64), (60, 64), (120, 64)]:
        clock[0] = seconds
        board.update("evaluate", done, 64, "blocks")
    assert console.export_text().splitlines() == ["evaluate: 64/64 blocks"]


def test_a_total_that_grows_after_its_end_is_shown_again() -> None:
    """A finished stage was silent for good."""
    console, now = Console(file=io.StringIO(), width=100), [0.0]
    board = Board(console, lambda: now[0])
    for done, total in [(10, 10), (10, 10), (11, 40), (39, 40), (40, 40), (40, 40)]:
        now[0] += 60
        board.update("look", done, total, "images")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[1].rstrip(",") for line in lines] == ["10/10", "11/40", "39/40", "40/40"]
