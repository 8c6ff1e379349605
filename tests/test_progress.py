"""Bars with rate and time left on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from dis_scale import progress
from dis_scale.progress import PLAIN_EVERY_S, RATE_OVER_S, Board, Rate, rate_words, time_words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time of the board in seconds; a test sets it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def console() -> Console:
    """A console that is not a terminal."""
    return Console(file=io.StringIO(), force_terminal=False, width=120, record=True)


def test_plain_lines_show_rate_and_time_left_at_intervals(clock: list[float], console: Console) -> None:
    with Board(console) as board:
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


def test_a_terminal_gets_a_bar_for_each_stage() -> None:
    out = io.StringIO()
    with Board(Console(file=out, force_terminal=True, width=120)) as board:
        board.update("train dis", 100, 400, "images")
        board.update("evaluate", 1, 4, "blocks")
        board.say("a line above the bars")
    shown = out.getvalue()
    assert all(words in shown for words in ("train dis", "100/400 images", "1/4 blocks", "a line above the bars", "━"))


def test_a_bar_shows_rate_and_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    with Board(Console(file=out, force_terminal=True, width=120)) as board:
        for seconds, done in [(20, 100), (40, 300)]:
            clock[0] = seconds
            board.update("train dis", done, 400, "images")
    assert "10.0 images/s, 10 s left" in out.getvalue()


def test_progress_does_not_run_back(clock: list[float], console: Console) -> None:
    board = Board(console)
    for seconds, done in [(20, 300), (40, 100)]:
        clock[0] = seconds
        board.update("train dis", done, 400, "images")
    assert console.export_text().splitlines()[-1] == "train dis: 300/400 images"


def test_a_stage_that_slows_down_shows_its_new_rate_within_half_a_minute(clock: list[float], console: Console) -> None:
    """A hundred images a second for 100 s, then ten a second."""
    board = Board(console)
    for second in range(100 + int(RATE_OVER_S + PLAIN_EVERY_S) + 1):
        clock[0] = second + 1.0
        done = 100 * min(second, 100) + 10 * max(0, second - 100)
        board.update("train dis", done, 20_000, "images")
    rates = [line.split(", ")[1] for line in console.export_text().splitlines() if "images/s" in line]
    assert rates[0] == "100.0 images/s"
    assert rates[-1] == "10.0 images/s"


def test_the_rate_is_that_of_the_window() -> None:
    rate = Rate()
    for second in range(101):
        rate.add(second, 100 * second)
    assert rate.per_second(100) == 100
    for second in range(1, int(RATE_OVER_S) + 1):
        rate.add(100 + second, 10_000 + 10 * second)
    assert rate.per_second(100 + RATE_OVER_S) == 10


def test_no_rate_is_shown_before_there_are_two_counts(clock: list[float], console: Console) -> None:
    board = Board(console)
    for second in (0.0, 20.0):
        clock[0] = second
        board.update("evaluate", 1, 64, "blocks")
    assert set(console.export_text().splitlines()) == {"evaluate: 1/64 blocks"}


def test_slow_units_are_shown_in_seconds_per_unit(clock: list[float], console: Console) -> None:
    board = Board(console)
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


@pytest.mark.parametrize(("seconds", "words"), [(50, "50 s"), (119, "119 s"), (2520, "42 min"), (12_600, "3.5 h")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert time_words(seconds) == words


def test_a_finished_stage_is_logged_once(clock: list[float], console: Console) -> None:
    board = Board(console)
    for seconds, done in [(20, 64), (21, 64), (60, 64), (120, 64)]:
        clock[0] = seconds
        board.update("evaluate", done, 64, "blocks")
    assert console.export_text().splitlines() == ["evaluate: 64/64 blocks"]
