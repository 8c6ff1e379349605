"""Logs of each attempt's processes in storage: readable when the pods that wrote them are gone.

A process copies the files of its standard output and error, which also have the output of C++ libraries and crash handlers.
`<begun>-<process>.log` is one object with their first and last lines, written again when there are new lines.
Errors here never stop a process: writing a log is retried.
"""

import contextlib
import json
import os
import re
import socket
import stat
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dis_scale.process.context import Context
from dis_scale.process.errors import UserError
from dis_scale.process.redaction import redact
from dis_scale.process.threads import in_order
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep

WRITE_EVERY_S = 10.0
CLOSE_S = 10.0
"""Time for the last write when a process ends."""
HEAD_BYTES, TAIL_BYTES = 64 * 2**10, 192 * 2**10
"""Size of the first and of the last lines that are kept of one output file."""
SEARCHED_BYTES = 4 * 2**20
"""Bytes at the end of a file that are searched for these last lines: a driver writes a line of progress every few seconds."""
ATTEMPTS_KEPT = 20
DRIVER = "driver"
_FOR_PROGRAMS = re.compile(
    r':(job_id|actor_name|task_name):|{"kind": "event"|Running entrypoint for job |\S+ \S+\s+INFO job_manager\.py'
)
"""Beginnings of lines that are for programs only, written by Ray and by this project."""


class LogName(NamedTuple):
    """Name of a log: when its attempt began (UTC), and the process; names sort by time."""

    begun: str
    process: str

    def __str__(self) -> str:
        return f"{self.begun}-{self.process}.log"

    @classmethod
    def parse(cls, name: str) -> "LogName | None":
        begun, _, process = name.removesuffix(".log").partition("-")
        return cls(begun, process) if process and name.endswith(".log") else None


def stamp() -> str:
    """Return the time now in the form of the logs' names, for example `20261121T183819`."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S")


def excerpt(path: Path, without: tuple[bytes, ...] = ()) -> str:
    """Return the first and the last lines of an output file, without those that begin with one of `without`."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        head = head[: head.rfind(b"\n") + 1]
        begin = max(len(head), file.seek(0, os.SEEK_END) - SEARCHED_BYTES)
        file.seek(begin)
        rest = file.read(SEARCHED_BYTES)
    if begin > len(head):
        rest = rest.partition(b"\n")[2]
    first, rest = (_lines_without(part, without) for part in (head, rest))
    last = last_lines(rest)
    gap = b"... lines are left out here ...\n" if begin > len(head) or last != rest else b""
    return (first + gap + last).decode(errors="replace")


def last_lines(data: bytes) -> bytes:
    """Return the last complete lines, at most `TAIL_BYTES`: redaction would not recognise a part of a secret."""
    if len(data) <= TAIL_BYTES:
        return data
    return b"".join(data[-TAIL_BYTES:].splitlines(keepends=True)[1:])


def _lines_without(data: bytes, beginnings: tuple[bytes, ...]) -> bytes:
    return b"".join(line for line in data.splitlines(keepends=True) if not line.startswith(beginnings))


def output_files() -> list[Path]:
    """Return the files of this process's standard output and error: none for a terminal or a pipe, one if both are the same."""
    paths = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                paths.append(Path(f"/proc/self/fd/{descriptor}").readlink())
    return list(dict.fromkeys(paths))


class KeptLog:
    """This process's log in storage, written by a thread of its own from now on."""

    def __init__(self, folder: Folder, name: LogName, context: Context, without: tuple[bytes, ...] = ()) -> None:
        self.folder, self.name, self.begun_at = folder, name, time.time()
        self._context, self._without, self._files = context, without, output_files()
        self._over, self._lock = threading.Event(), threading.Lock()
        self._written: list[int | None] = []
        """Sizes of the output files at the last write, and the rank that was written."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="attempt log")
        self._thread.start()

    def write(self) -> None:
        """Write the object again if there is something new."""
        with self._lock, contextlib.suppress(Exception):  # whatever storage or the disk raises: training continues
            seen = [*(path.stat().st_size for path in self._files), self._context.rank]
            if seen != self._written:
                different = len({path.suffix for path in self._files}) == len(self._files)
                names = [path.suffix.strip(".") if different else str(path) for path in self._files]
                excerpts = {name: excerpt(path, self._without) for name, path in zip(names, self._files, strict=True)}
                facts = self._context.known() | {"host": socket.gethostname(), "pid": os.getpid(), "begun_at": self.begun_at}
                self.folder.write(str(self.name), to_bytes(facts, excerpts))
                self._written = seen

    def close(self) -> None:
        """Write the rest, if storage answers in time."""
        self._over.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(WRITE_EVERY_S)
            self.write()


def to_bytes(facts: dict[str, Any], outputs: dict[str, str]) -> bytes:
    """Return a log's content: a line of facts, then each output below its name. Secrets are replaced here and nowhere else."""
    parts = [f"--- {name} ---\n{text}" if len(outputs) > 1 else text for name, text in outputs.items()]
    return redact("\n".join([json.dumps(facts), *parts])).encode()


def in_words(text: str) -> str:
    """Return a stored log for a reader: its facts in words, without Ray's markers and events, which its messages repeat."""
    lines = [line for line in text.expandtabs().splitlines(keepends=True) if not _FOR_PROGRAMS.match(line)]
    with contextlib.suppress(IndexError, ValueError):  # a log without facts
        facts = json.loads(lines[0])
        if isinstance(facts, dict) and "kind" not in facts:
            if "begun_at" in facts:
                facts["begun_at"] = datetime.fromtimestamp(facts["begun_at"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            lines[0] = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()) + "\n"
    return "".join(lines)


def prune(folder: Folder) -> None:
    """Delete the logs of all but the newest attempts and drivers. Errors are ignored: the next call retries."""
    with contextlib.suppress(Exception):
        names = listed(folder)
        drivers = [name for name in names if name.process == DRIVER]
        for logs in (drivers, [name for name in names if name not in drivers]):
            kept = sorted({name.begun for name in logs})[-ATTEMPTS_KEPT:]
            for name in logs:
                if name.begun not in kept:
                    folder.delete(str(name))


def listed(folder: Folder) -> list[LogName]:
    """Return the logs of a job, oldest first."""
    return sorted(name for each in folder.list() if (name := LogName.parse(each)))


def overview(sweep: Sweep) -> list[str]:
    """Return one line for each attempt whose logs are stored."""
    lines = []
    for job in sweep.all_logs.list():
        sizes = (sweep.all_logs / job).sizes()
        names = [name for each in sizes if (name := LogName.parse(each))]
        for begun in sorted({name.begun for name in names}):
            each = sorted(name for name in names if name.begun == begun)
            kib = sum(sizes[str(name)] for name in each) / 1024
            lines.append(f"{job:<24} {begun}  {kib:8.1f} KiB  {' '.join(name.process for name in each)}")
    return lines or [f"no logs in {sweep.all_logs}"]


def read_attempt(folder: Folder, begun: str | None) -> dict[LogName, str]:
    """Return the logs of the attempt that began at `begun`, by default of the newest; UserError without any."""
    names = listed(folder)
    at = begun or max((name.begun for name in names), default="")
    drivers = [name for name in names if name.process == DRIVER and name.begun <= at]  # a driver may have begun earlier
    wanted = drivers[-1:] + [name for name in names if name.begun == at and name.process != DRIVER]
    if not names:
        raise UserError(f"{folder}: no logs yet: no attempt has begun")
    if not wanted:
        known = ", ".join(sorted({name.begun for name in names}))
        raise UserError(f"{folder}: no logs of the attempt {begun or ''}: expected one of: {known}")
    texts = in_order(wanted, lambda name: folder.read(str(name)).decode(errors="replace"), 16)
    return dict(zip(wanted, texts, strict=True))
