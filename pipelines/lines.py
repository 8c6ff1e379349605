"""The protocol between a job and its sweep: JSON lines (dis_scale/process/jsonlog.py) in the job's output.

Progress drives the bars, messages are shown, events let programs and tests react without reading prose, an error is the reason why
a job ended. All other lines, such as those of libraries, are for people only.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dis_scale.process import jsonlog
from dis_scale.process.context import Context
from dis_scale.process.errors import losing_lines, shown, shown_below
from dis_scale.process.redaction import redact

PROGRESS_EVERY_S, IDLE_EVERY_S = 8.0, 600.0
"""Least interval of progress lines, and interval at which an idle stage logs its progress again."""
PROGRESS = (b'{"kind": "progress"',)
"""Beginning of the lines of progress, which stored logs leave out."""
Kind = Literal["progress", "message", "event", "error"]
_OF_EVERY_LINE = {"kind", "time", "level", *Context.__annotations__}
_OF_KIND: dict[str, dict[str, type]] = {
    "progress": {"done": int, "total": int, "unit": str},
    "message": {"message": str},
    "event": {"event": str},
    "error": {"message": str},
}
"""Further facts of a line, by its kind, with their types. A line that lacks one, or has another type, is a library's."""


class Line(NamedTuple):
    """A parsed line: `text` of a message or of the error that ended the job, and all its `facts`."""

    kind: Kind
    text: str
    facts: dict[str, Any]


def parse(line: str) -> Line | None:
    """Return a line of the protocol, None for any other."""
    if not line.startswith('{"kind": "'):
        return None
    with contextlib.suppress(ValueError):  # no JSON: two threads' lines in one, or the first part of a long line
        facts = json.loads(line)
        own = _OF_KIND.get(facts["kind"], {})
        if own and facts.keys() >= _OF_EVERY_LINE and all(isinstance(facts.get(name), own[name]) for name in own):
            return Line(facts["kind"], facts.get("message", ""), facts)
    return None


def readable(text: str) -> str:
    """Return a log as a terminal may get it, with each line of the protocol in words."""
    return "".join(_readable(line) for line in text.splitlines(keepends=True))


def _readable(raw: str) -> str:
    line = parse(raw)
    if line is None:
        return shown(raw)
    facts = line.facts
    rank = "" if facts["rank"] is None else f"rank {facts['rank']}: "
    words = shown_below(_words(line))
    level = f"{facts['level']}: " if facts["level"] != "info" else ""
    return f"{facts['time'][11:19]}  {level}{rank}{words}\n"


def _words(line: Line) -> str:
    match line.kind:
        case "progress":
            return f"{line.facts['done']} of {line.facts['total']} {line.facts['unit']}"
        case "event":
            own = {name: value for name, value in line.facts.items() if name not in _OF_EVERY_LINE | {"event", "at"}}
            return " ".join([line.facts["event"], *(f"{name}={value}" for name, value in own.items())])
    return line.text


def write(line: str) -> None:
    """Write a line to the output in one call, so that two threads' lines do not mix."""
    with losing_lines():
        print(f"{line}\n", end="", flush=True)


@dataclass
class Log:
    """Writes the lines of one process."""

    context: Context
    write: Callable[[str], None] = write
    now_s: Callable[[], float] = time.monotonic
    _progress: tuple[int, int, str] | None = None
    _progress_s: float = float("-inf")

    def say(self, text: str, level: str = "info") -> None:
        """Show a message in the sweep, without secrets."""
        self.write(jsonlog.entry(self.context, "message", level, message=redact(text)))

    def emit(self, name: str, **facts: Any) -> None:
        """Log an event, for example `emit("restart", done=640)`; `at` is its time (Unix seconds)."""
        self.write(jsonlog.entry(self.context, "event", "info", event=name, at=time.time(), **facts))

    def fail(self, text: str) -> None:
        """Log the error that ends the job, without secrets."""
        self.write(jsonlog.entry(self.context, "error", "error", message=redact(text)))

    def repeat_progress(self, every_s: float = IDLE_EVERY_S) -> None:
        """Log the last progress again while there is no work, so that readers see that the process does not hang."""
        if self._progress and self.now_s() >= self._progress_s + every_s:
            self._log_progress(*self._progress)

    def progress(self, done: int, total: int, unit: str) -> None:
        """Log the progress if it has changed, at most every `PROGRESS_EVERY_S`: 40 MB of lines in two weeks."""
        now_s = self.now_s()
        if (done, total, unit) == self._progress or (done < total and now_s < self._progress_s + PROGRESS_EVERY_S):
            return
        self._log_progress(done, total, unit)

    def _log_progress(self, done: int, total: int, unit: str) -> None:
        self._progress, self._progress_s = (done, total, unit), self.now_s()
        self.write(jsonlog.entry(self.context, "progress", "info", done=done, total=total, unit=unit))
