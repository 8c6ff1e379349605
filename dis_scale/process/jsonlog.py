"""Logs as JSON, one line for each event, instead of lines for people: `DIS_SCALE_LOG=json`.

Each line has kind, time (UTC), level, sweep, stage, model, attempt, rank and images seen, null where that is not known.
"""

import io
import json
import os
from datetime import UTC, datetime
from typing import Any, TextIO

from dis_scale.process import context
from dis_scale.process.errors import UserError

VARIABLE = "DIS_SCALE_LOG"
FACTS = ("sweep", "stage", "model", "attempt", "rank", "images")


def wanted() -> bool:
    """Whether logs are to be JSON; UserError for a setting that is neither `json` nor `lines`, the default."""
    setting = os.environ.get(VARIABLE, "lines")
    if setting not in ("json", "lines"):
        raise UserError(f"{VARIABLE}={setting}: expected json, or lines (the default)")
    return setting == "json"


def entry(kind: str, level: str, **more: Any) -> str:
    """Return the line of an event, with the facts of this process where `more` has no others."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    facts = {name: context.facts.get(name) for name in FACTS}
    return json.dumps({"kind": kind, "time": now, "level": level} | facts | more)


class JsonLines(io.StringIO):
    """A text file that writes each line that is not empty as the line of a message."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self._file, self._partial = file, ""

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if line.strip():
                print(entry("message", "info", message=line.rstrip()), file=self._file)
        return len(text)

    def flush(self) -> None:
        self._file.flush()
