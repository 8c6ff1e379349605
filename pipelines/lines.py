"""Lines of a job's log that its sweep reads: progress, messages, events and its error. All other lines are for people only.

Progress drives the bars, messages are shown as they are, events let programs and tests react without reading prose. With
`DIS_SCALE_LOG=json` they are JSON (dis_scale/process/jsonlog.py), otherwise lines that people can read, too.
"""

import contextlib
import json
import time
from typing import Any, Literal, NamedTuple

from dis_scale.process import jsonlog
from dis_scale.process.redaction import redact

PROGRESS_EVERY_S = 2.0
_MARKS = {"progress": "@progress ", "message": "@say ", "event": "@event "}
_ERROR = "error: "
_JSON = '{"kind": "'
PROGRESS = (b"@progress ", b'{"kind": "progress"')
"""Beginnings of the lines of progress, which stored logs leave out."""
_last_progress = (-1, -1, 0.0)


class Line(NamedTuple):
    """A parsed line: `facts` of progress and events, `text` of a message or of the error that ended the job."""

    kind: Literal["progress", "message", "event", "error"]
    text: str = ""
    facts: dict[str, Any] = {}  # noqa: RUF012 (a named tuple's default, never written)


def message(text: str, level: str = "info") -> str:
    return jsonlog.entry("message", level, message=text) if jsonlog.wanted() else _MARKS["message"] + text


def event(name: str, **facts: Any) -> str:
    """Return the line of an event, for example `event("restart", done=640)`; `at` is its time (Unix seconds)."""
    more = {"event": name, "at": time.time(), **facts}
    return jsonlog.entry("event", "info", **more) if jsonlog.wanted() else _MARKS["event"] + json.dumps(more)


def parse(line: str) -> Line | None:
    """Return a line of the protocol, None for any other."""
    if line.startswith(_JSON):
        with contextlib.suppress(ValueError):  # the lines of two threads in one
            return _parse_json(json.loads(line))
    if line.startswith(_ERROR):
        return Line("error", text=line.removeprefix(_ERROR))
    if line.startswith(_MARKS["message"]):
        return Line("message", text=line.removeprefix(_MARKS["message"]))
    for kind in ("progress", "event"):
        if line.startswith(_MARKS[kind]):
            with contextlib.suppress(ValueError):  # the lines of two threads in one
                return Line(kind, facts=json.loads(line.removeprefix(_MARKS[kind])))  # type: ignore[arg-type]
    return None


def _parse_json(entry: dict[str, Any]) -> Line | None:
    match entry["kind"]:
        case "progress":
            return Line("progress", facts={name: entry[name] for name in ("done", "total", "unit")})
        case "message" | "error" as kind:
            return Line(kind, text=entry["message"])
        case "event":
            return Line("event", facts=entry)
    return None


def write(line: str) -> None:
    """Write a line in one call, so that two threads' lines do not mix."""
    print(f"{line}\n", end="", flush=True)


def say(text: str, level: str = "info") -> None:
    """Show a message in the sweep."""
    write(message(text, level))


def fail(text: str) -> None:
    """Log the error that ends the job, without secrets."""
    text = redact(text)
    write(jsonlog.entry("error", "error", message=text) if jsonlog.wanted() else _ERROR + text)


def emit(name: str, **facts: Any) -> None:
    """Log an event."""
    write(event(name, **facts))


def progress(done: int, total: int, unit: str) -> None:
    """Log the progress if it has changed, at most every `PROGRESS_EVERY_S`: the log of a job of days stays small."""
    global _last_progress
    now = time.monotonic()
    if (done, total) == _last_progress[:2] or (done < total and now < _last_progress[2] + PROGRESS_EVERY_S):
        return
    _last_progress = (done, total, now)
    facts = {"done": done, "total": total, "unit": unit}
    write(jsonlog.entry("progress", "info", **facts) if jsonlog.wanted() else _MARKS["progress"] + json.dumps(facts))
