"""Progress of each stage: bars with rate and time left on a terminal, plain lines elsewhere.

Rates are those of the last half minute: a stage that slows down shows it, and start-up does not count for ever.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

ReportDone = Callable[[int], None]
"""Called with the number done so far."""
ReportShare = Callable[[int, int], None]
"""Called with the number done so far and the total."""

PLAIN_EVERY_S = 15.0
LOG_EVERY_S = 5.0
RATE_OVER_S = 30.0
LEAST_BAR, MOST_BAR = 10, 40
"""Length of a bar in characters."""
LAYOUTS = (
    ("name", "bar", "count", "rate", "left"),
    ("name", "count", "rate", "left"),
    ("name", "share", "left"),
    ("name", "share"),
)
"""Columns on terminals from wide to narrow: the first that fits is shown."""


@dataclass
class Rate:
    """Units per second over the last `RATE_OVER_S` seconds.

    It counts from the first progress on: imports, a build or the compilation in a first step come once.
    """

    _points: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, now_s: float, done: int) -> None:
        """Record what is done; keeps one point that is older than the window, as its start."""
        if not done:
            return
        self._points.append((now_s, done))
        while len(self._points) > 2 and self._points[1][0] <= now_s - RATE_OVER_S:
            self._points.popleft()

    def per_second(self, now_s: float) -> float | None:
        """Return the rate up to `now_s`; None if nothing was done within the window."""
        if not self._points or now_s <= self._points[0][0] or self._points[-1][1] == self._points[0][1]:
            return None
        return (self._points[-1][1] - self._points[0][1]) / (now_s - self._points[0][0])


def rate_words(per_second: float, unit: str) -> str:
    """Return a rate in words: `12.3 images/s`, or `41 s per block` if one unit takes longer than a second."""
    if per_second >= 1:
        return f"{per_second:,.1f} {unit}/s"
    return f"{1 / per_second:,.{0 if per_second <= 0.1 else 1}f} s per {unit.removesuffix('s')}"


def time_words(seconds: float) -> str:
    """Return a duration in the unit that suits it: `50 s`, `42 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def some(words: list[str]) -> str:
    """Return the first ten words in a list, and how many there are besides."""
    return ", ".join(words[:10]) + (f", ... ({len(words) - 10} more)" if len(words) > 10 else "")


@dataclass
class _Stage:
    name: str
    total: int = 0
    unit: str = ""
    done: int = 0
    rate: Rate = field(default_factory=Rate)
    logged_s: float = 0.0
    finished: bool = False

    def words(self, now_s: float) -> dict[str, str]:
        """Return the words of each column but the bar; rate and time left are empty if unknown or if nothing is left."""
        rate = None if self.done >= self.total else self.rate.per_second(now_s)
        return {
            "name": self.name,
            "count": f"{self.done:,}/{self.total:,} {self.unit}",
            "share": f"{self.done / max(1, self.total):4.0%}",
            "rate": rate_words(rate, self.unit) if rate else "",
            "left": f"{time_words((self.total - self.done) / rate)} left" if rate else "",
        }


class Board:
    """Shows stages by name, as bars if `console` is interactive, otherwise as a line from time to time."""

    def __init__(self, console: Console) -> None:
        self.console, self._stages = console, dict[str, _Stage]()
        self._live = Live(get_renderable=self._bars, console=console) if console.is_interactive else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, name: str, done: int, total: int, unit: str) -> None:
        """Set the progress of the stage `name`; it never goes back."""
        stage, now_s = self._stages.setdefault(name, _Stage(name)), time.monotonic()
        stage.done, stage.total, stage.unit = max(done, stage.done), total, unit
        stage.rate.add(now_s, stage.done)
        if not self._live:
            self._plain(stage, now_s)

    def _bars(self) -> Table:
        """Return all stages as a table in the width that the terminal has now; rates are those of now."""
        stages, now_s = list(self._stages.values()), time.monotonic()
        words = [stage.words(now_s) for stage in stages]
        layout, left = _fitting(words, self.console.width)
        table = Table.grid(padding=(0, 1))
        for column in layout:
            table.add_column(no_wrap=True, style="cyan" if column in ("rate", "left") else None)
        for stage, each in zip(stages, words, strict=True):
            bar = ProgressBar(max(1, stage.total), stage.done, min(MOST_BAR, LEAST_BAR + left))
            table.add_row(*(bar if column == "bar" else each[column] for column in layout))
        return table

    def _plain(self, stage: _Stage, now_s: float) -> None:
        over = stage.done >= stage.total
        if stage.finished or (not over and now_s < stage.logged_s + PLAIN_EVERY_S):
            return
        words = stage.words(now_s)
        self.say(f"{stage.name}: {', '.join(filter(None, (words['count'], words['rate'], words['left'])))}")
        stage.logged_s, stage.finished = now_s, over


def _fitting(words: list[dict[str, str]], width: int) -> tuple[tuple[str, ...], int]:
    """Return the first layout that fits into a width, and the characters that it leaves; the last one if none fits."""
    for layout in LAYOUTS:
        columns = (max((len(each.get(column, " " * LEAST_BAR)) for each in words), default=0) for column in layout)
        left = width + 1 - sum(column + 1 for column in columns)
        if left >= 0:
            return layout, left
    return LAYOUTS[-1], 0


def listing_words(say: Callable[[str], None]) -> Callable[..., None]:
    """Return a function that logs from time to time how many images of a source have been listed."""
    return now_and_then(say, "listing  {:,} images so far")


def now_and_then(say: Callable[[str], None], words: str) -> Callable[..., None]:
    """Return a function that takes numbers and logs `words` filled with them, at most every few seconds."""
    logged_s = time.monotonic()

    def report(*numbers: int) -> None:
        nonlocal logged_s
        if time.monotonic() >= logged_s + LOG_EVERY_S:
            logged_s = time.monotonic()
            say(words.format(*numbers))

    return report
