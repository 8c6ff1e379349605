"""Bars with rate and time left on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from dis_scale import progress
from dis_scale.progress import Board


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the plain lines are timed with."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_say_rate_and_time_left_now_and_then(clock: list[float]) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=120, record=True)
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


def test_progress_does_not_run_back(clock: list[float]) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=120, record=True)
    board = Board(console)
    for seconds, done in [(20, 300), (40, 100)]:
        clock[0] = seconds
        board.update("train dis", done, 400, "images")
    assert console.export_text().splitlines()[-1] == "train dis: 300/400 images"
