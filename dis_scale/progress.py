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
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

ReportDone = Callable[[int], None]
"""Called with the number done so far."""
ReportShare = Callable[[int, int], None]
"""Called with the number done so far and the total."""

PLAIN_EVERY_S = 15.0
LOG_EVERY_S = 5.0
RATE_OVER_S = 30.0


@dataclass
class Rate:
    """Units per second over the last `RATE_OVER_S` seconds."""

    _points: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, now_s: float, done: int) -> None:
        """Record what is done; keeps one point that is older than the window, as its start."""
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
    bar: TaskID
    done: int = 0
    rate: Rate = field(default_factory=Rate)
    logged_s: float = 0.0
    finished: bool = False

    def words(self, now_s: float, total: int, unit: str) -> str:
        """`12.3 images/s, 50 s left`; empty if the rate is not known or nothing is left."""
        rate = self.rate.per_second(now_s)
        if rate is None or self.done >= total:
            return ""
        return f"{rate_words(rate, unit)}, {time_words((total - self.done) / rate)} left"


class _RateColumn(ProgressColumn):
    """The rate and the time left of a bar's stage."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["words"], style="cyan")


class Board:
    """Shows stages by name; `console` decides whether as bars or as lines."""

    def __init__(self, console: Console) -> None:
        self.console, self._stages = console, dict[str, _Stage]()
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            _RateColumn(),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, name: str, done: int, total: int, unit: str) -> None:
        """Set the progress of the stage `name`; it never goes back."""
        if name not in self._stages:
            self._stages[name] = _Stage(self._bars.add_task(name, total=total, unit=unit, words=""))
        stage, now_s = self._stages[name], time.monotonic()
        stage.done = max(done, stage.done)
        stage.rate.add(now_s, stage.done)
        words = stage.words(now_s, total, unit)
        self._bars.update(stage.bar, completed=stage.done, total=total, words=words)
        if not self.console.is_terminal:
            self._plain(name, stage, words, total, unit)

    def _plain(self, name: str, stage: _Stage, words: str, total: int, unit: str) -> None:
        now_s, over = time.monotonic(), stage.done >= total
        if stage.finished or (not over and now_s < stage.logged_s + PLAIN_EVERY_S):
            return
        self.say(f"{name}: {stage.done:,}/{total:,} {unit}{f', {words}' if words else ''}")
        stage.logged_s, stage.finished = now_s, over


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
