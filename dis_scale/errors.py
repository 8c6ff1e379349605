"""The error family: what went wrong, where, what was got and expected, what to do; one or two lines, no traceback.

`UserError` is the user's to mend (exit code 2); any other `DisScaleError` is a failure (exit code 1).
"""

import difflib
from collections.abc import Iterable
from typing import Any


class DisScaleError(Exception):
    """A failure with a message for people; ends the command with exit code 1."""

    exit_code = 1


class UserError(DisScaleError):
    """A mistake in what the user gave; ends the command with exit code 2."""

    exit_code = 2


class StorageError(DisScaleError):
    """Storage cannot be reached, read or written, or holds something damaged."""


class StorageAway(StorageError):
    """Storage did not answer, though asked again and again: it may be back later."""


class StorageFull(StorageError):
    """There is no space left to write to: nothing is wrong with what was to be written."""


class Held(DisScaleError):
    """Somebody who is alive has what this process was to write; `holder` is what their lease says."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h

    def __init__(self, words: str, holder: dict[str, Any] | None = None) -> None:
        super().__init__(words)
        self.holder = holder or {}


class UndecodableImage(StorageError):
    """An image that was read but is none, or a damaged one."""


class Preempted(DisScaleError):
    """The stage was asked to stop, saved what it could and can be started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name nearest to `word`, or '' where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
