"""Progress of each stage: bars with rate and time left on a terminal, plain lines elsewhere.

Rates are those of the last five minutes: a stage that slows down shows it, and start-up does not count for ever.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from dis_scale.process.errors import losing_lines, printable, shown_below
from dis_scale.process.redaction import redact
from dis_scale.process.threads import repeating

ReportDone = Callable[[int], None]
"""Called with the number done so far."""
ReportShare = Callable[[int, int], None]
"""Called with the number done so far and the total."""

PLAIN_EVERY_S = 7.0
QUIET_S = 9.0
"""Time without output after which a line shows that the work continues."""
STARTS_S = 120.0
"""Time after a stage's start in which this line is repeated. Later the stage may wait for machines, for days."""
LOG_EVERY_S = 5.0
RATE_OVER_S = 300.0
MOST_BAR = 40
"""Length of a bar in characters."""


def rate_words(per_second: float, unit: str) -> str:
    """Return a rate in words: `12.3 images/s`, or `41 s per block` if one unit takes longer than a second.

    Of a unit such as `steps of the judge` only the first word is used.
    """
    unit = unit.partition(" of ")[0]
    if per_second >= 1:
        return f"{per_second:,.1f} {unit}/s"
    return f"{1 / per_second:,.{0 if per_second <= 0.1 else 1}f} s per {unit.removesuffix('s')}"


def time_words(seconds: float) -> str:
    """Return a duration in the unit that suits it: `50 s`, `42 min`, `3.5 h`, `2.1 d`."""
    for unit, length, digits in (("d", 86_400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def some(words: list[str]) -> str:
    """Return the first ten words in one line, as they can be shown, and the number of the others."""
    return ", ".join(map(printable, words[:10])) + (f", ... ({len(words) - 10} more)" if len(words) > 10 else "")


def _words(task: Task) -> tuple[str, str]:
    """Return rate and time left of a stage in words; empty if unknown or if nothing is left."""
    if task.finished or not task.speed:
        return "", ""
    left_s = (task.remaining or 0) / task.speed
    return rate_words(task.speed, task.fields["unit"]), f"{time_words(left_s)} left"


class _RateAndTime(ProgressColumn):
    """Rate and time left, as in plain lines."""

    def render(self, task: Task) -> Text:
        return Text(" ".join(_words(task)).strip(), "cyan")


class Board:
    """Shows stages by name, as bars if `console` is interactive, otherwise as a line from time to time."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self._tasks, self._logged = dict[tuple[str, str], TaskID](), dict[TaskID, tuple[float, str]]()
        self._shown_s, self._began_s = clock(), dict[str, float]()
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(None, table_column=Column(max_width=MOST_BAR)),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}", table_column=Column(no_wrap=True)),
            _RateAndTime(Column(no_wrap=True)),
            console=console, speed_estimate_period=RATE_OVER_S, get_time=clock, disable=not console.is_interactive,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        with losing_lines():
            self.console.print(shown_below(redact(line)), highlight=False, markup=False, soft_wrap=True)
        self._shown_s = self._clock()

    def at_work(self, name: str) -> None:
        """Show that the stage `name` is at work if nothing was shown for a while, as when processes start or in a first step.

        The line is repeated in the stage's first two minutes, in which its first attempt begins; later it is shown once a silence.
        """
        now_s = self._clock()
        began_s = self._began_s.setdefault(name, now_s)
        if now_s > self._shown_s + QUIET_S:
            self.say(f"{name}: at work")
            if now_s > began_s + STARTS_S:
                self._shown_s = math.inf

    @contextmanager
    def working(self, name: str) -> Iterator[None]:
        """Show during the block, whenever nothing else is shown for a while, that `name` is at work, and for how long."""
        began_s = self._shown_s = self._clock()

        def say_so() -> None:
            if (now_s := self._clock()) > self._shown_s + QUIET_S:
                self.say(f"{name}, {time_words(now_s - began_s)} so far")

        with repeating(say_so, 1.0, "working", ends_s=1.0):
            yield

    def update(self, name: str, done: int, total: int, unit: str) -> None:
        """Set the progress of the stage `name`, which never goes back; each unit has its own progress."""
        if (name, unit) not in self._tasks:
            self._tasks[name, unit] = self._bars.add_task(escape(name), start=False, total=total, unit=unit)
        task = self._bars.tasks[self._bars.task_ids.index(self._tasks[name, unit])]
        if done and not task.started:
            self._bars.start_task(task.id)  # the rate leaves out imports, builds and the compilation in a first step
        self._bars.update(task.id, completed=max(done, task.completed), total=total)
        if self.console.is_interactive:
            self._shown_s = self._clock()
        else:
            self._log(name, task)

    def _log(self, name: str, task: Task) -> None:
        now_s, (logged_s, logged) = self._clock(), self._logged.get(task.id, (0.0, ""))
        if not task.finished and now_s < logged_s + PLAIN_EVERY_S:
            return
        count = f"{task.completed:,.0f}/{task.total:,.0f} {task.fields['unit']}"
        if task.finished and count == logged:
            return
        self.say(f"{name}: {', '.join(filter(None, (count, *_words(task))))}")
        self._logged[task.id] = now_s, count


def listing_words(say: Callable[[str], None]) -> ReportDone:
    """Return a function that logs, at most every few seconds, how many images of a source have been listed."""
    logged_s = time.monotonic()

    def report(images: int) -> None:
        nonlocal logged_s
        if time.monotonic() >= logged_s + LOG_EVERY_S:
            logged_s = time.monotonic()
            say(f"listing  {images:,} images so far")

    return report
