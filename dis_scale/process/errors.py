"""Errors with a message for the user: what, where, got, expected, what to do. One or two lines, no traceback.

`UserError` is a mistake in the input (exit code 2); most other errors are failures (exit code 1).
"""

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from dis_scale.process.redaction import redact

UNFORESEEN = 70
"""Exit code of an error of no class below (EX_SOFTWARE of sysexits.h): a bug, or an accident that nobody thought of. Schedulers
try again, a limited number of times."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk, or of a used up quota."""


@contextlib.contextmanager
def losing_lines() -> Iterator[None]:
    """Ignore errors of prints to a log on a full disk: a process that runs for weeks must not end because of a lost line."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise


def drop_unwritten() -> None:
    """Drop output that a full disk has not taken: otherwise Python would end with 120 instead of the command's exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno in FULL:
                write_nowhere(stream)


def write_nowhere(*streams: TextIO) -> None:
    """Discard what is written to these streams from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class DisScaleError(Exception):
    """A failure with a message for the user; ends the command with exit code 1. Its text has no secrets, whoever prints it."""

    exit_code = 1

    def __str__(self) -> str:
        return shown(redact(super().__str__()))


class UserError(DisScaleError):
    """A mistake in the user's input; ends the command with exit code 2."""

    exit_code = 2


class NoFamily(UserError):
    """The package or the file of a family of backbones is not on this machine, or is another version."""


class StorageError(DisScaleError):
    """An object that storage refuses to read or write, or that is damaged."""


class StorageAway(DisScaleError):
    """Storage did not answer after all retries; no object is at fault. A later attempt may succeed."""

    exit_code = 74  # EX_IOERR of sysexits.h; not that of Held, which Slurm retries less often


class Damaged(StorageError):
    """An object that differs from its manifest, that is missing though its manifest names it, or that is not JSON.

    `where` is its path, `what` the difference.
    """

    def __init__(self, where: object, what: object) -> None:
        super().__init__(str(where), str(what))

    def __str__(self) -> str:
        return ": damaged: ".join(self.args)


class StorageFull(StorageError):
    """No space left in storage; the data to write is not at fault."""


class Held(DisScaleError):
    """Another live process holds the lease: `process`, in words, of a command on the Ray `cluster`."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h

    def __init__(self, words: str, cluster: str = "", process: str = "") -> None:
        super().__init__(words)
        self.cluster, self.process = cluster, process


class OutOfMemory(DisScaleError):
    """A device's memory is too small for the settings; another attempt would fail in the same way.

    Facts of a training: the images done, and the seconds since the last one.
    """

    def __init__(self, words: str, done: int = 0, silent_s: float = 0.0) -> None:
        super().__init__(words)
        self.done, self.silent_s = done, silent_s


class BrokenDevice(DisScaleError):
    """A device fails or computes wrongly; another attempt, on another device, may succeed."""


class NotFinite(DisScaleError):
    """Samples that are not finite: the model's training has diverged, or the device that they were made on fails."""

    block = 0
    """Number of the block that has these samples."""


class WrongKernel(DisScaleError):
    """A kernel fails, or its results are not those of its definition: it is wrong, or the device that it ran on is."""


class UndecodableImage(StorageError):
    """A file that was read but is not an image, or is damaged; `why` has only the reason."""

    def __init__(self, words: str, why: str = "") -> None:
        super().__init__(words)
        self.why = why


class Preempted(DisScaleError):
    """The stage was requested to stop and has saved its state; a rerun continues."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def printable(name: str) -> str:
    """Return a name as it can be shown: control characters, and bytes that are not UTF-8, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def shown(text: str) -> str:
    """Return lines of text as a terminal may get them: no control characters but the ends of lines."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def shown_below(text: str) -> str:
    """Return a message as a terminal may get it, with its further lines indented, so that none looks like another message."""
    return shown(text).replace("\n", "\n  ")


def lines_of(error: BaseException) -> list[str]:
    """Return an error's lines; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' with the known name nearest to `word`, or '' if none is similar, or it is known itself."""
    close = [name for name in difflib.get_close_matches(word, list(known), n=1) if name != word]
    return f" (did you mean {close[0]!r}?)" if close else ""
