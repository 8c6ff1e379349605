"""Events in a job's log."""

from typing import Any

from pipelines import lines


def events(log: str, name: str) -> list[dict[str, Any]]:
    """Return the facts of all events of this name, in order."""
    parsed = [line for line in map(lines.parse, log.splitlines()) if line and line.kind == "event"]
    return [line.facts for line in parsed if line.facts["event"] == name]
