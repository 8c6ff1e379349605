"""Logs as JSON, one line for each event: always between a job and its sweep, and at the terminal with `DIS_SCALE_LOG=json`.

Each line has kind, time (UTC), level, sweep with its folder, stage, model, attempt, rank, images seen: null where one is not known.
"""

import io
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TextIO

from dis_scale.process.context import Context
from dis_scale.process.errors import UserError

VARIABLE = "DIS_SCALE_LOG"


def wanted() -> bool:
    """Return whether the terminal gets JSON; UserError for a setting that is neither `json` nor `lines`, the default."""
    setting = os.environ.get(VARIABLE, "lines")
    if setting not in ("json", "lines"):
        raise UserError(f"{VARIABLE}={setting}: expected json, or lines (the default)")
    return setting == "json"


def entry(context: Context, kind: str, level: str, **more: Any) -> str:
    """Return the line of an event; `more` wins over the context."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"kind": kind, "time": now, "level": level} | asdict(context) | more)


class JsonLines(io.StringIO):
    """A text file that writes each line that is not empty as the line of a message."""

    def __init__(self, file: TextIO, context: Context) -> None:
        super().__init__()
        self._file, self._context, self._partial = file, context, ""

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if line.strip():
                print(entry(self._context, "message", "info", message=line.rstrip()), file=self._file)
        return len(text)

    def flush(self) -> None:
        self._file.flush()
