"""How far each stage is: bars with rate and time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

ReportDone = Callable[[int], None]
"""Called with the number done so far."""
ReportShare = Callable[[int, int], None]
"""Called with the number done so far and the total."""

PLAIN_EVERY_S = 15.0
SAID_EVERY_S = 5.0


class _Rate(ProgressColumn):
    """Units done a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="cyan")


@dataclass
class _Stage:
    bar: TaskID
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    first: int | None = None
    said: float = 0.0


class Board:
    """Shows stages by name; `console` decides whether bars can be drawn."""

    def __init__(self, console: Console) -> None:
        self.console, self._stages = console, dict[str, _Stage]()
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(),
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
        """The stage `name` has done so much."""
        if name not in self._stages:
            self._stages[name] = _Stage(self._bars.add_task(name, total=total, unit=unit))
        stage = self._stages[name]
        stage.done = max(done, stage.done)
        self._bars.update(stage.bar, completed=stage.done, total=total)
        if not self.console.is_terminal:
            self._plain(name, stage, total, unit)

    def _plain(self, name: str, stage: _Stage, total: int, unit: str) -> None:
        now = time.monotonic()
        if stage.first is None:
            stage.first, stage.began = stage.done, now
        if stage.done < total and now < stage.said + PLAIN_EVERY_S:
            return
        if stage.done >= total and stage.said == float("inf"):
            return
        rate = (stage.done - stage.first) / (now - stage.began) if now > stage.began else 0.0
        left = (
            f", {rate:,.1f} {unit}/s, {(total - stage.done) / rate:.0f} s left"
            if rate > 0 and stage.done < total
            else ""
        )
        self.say(f"{name}: {stage.done:,}/{total:,} {unit}{left}")
        stage.said = float("inf") if stage.done >= total else now


def listing_words(say: Callable[[str], None]) -> Callable[..., None]:
    """Says now and then how many images of a source have been listed."""
    return now_and_then(say, "listing  {:,} images so far")


def now_and_then(say: Callable[[str], None], words: str) -> Callable[..., None]:
    """Takes numbers and says `words` filled with them every few seconds; what is done sooner passes in silence."""
    said = time.monotonic()

    def report(*numbers: int) -> None:
        nonlocal said
        if time.monotonic() >= said + SAID_EVERY_S:
            said = time.monotonic()
            say(words.format(*numbers))

    return report
