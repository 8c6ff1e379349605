"""Logs of each attempt's processes in storage: readable when the pods that wrote them are gone.

A process copies the output files of its own, standard output and error, so what C++ libraries and crash handlers write is
there, too. `<begun>-<process>.log` is one object, written again when there is something new: its first and its last lines.
Nothing here ever stops a process: a log that cannot be written is tried again.
"""

import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
LINE_BYTES = 16 * 2**10
"""Longer lines are kept and left out in pieces."""
ATTEMPTS_KEPT = 20
DRIVER = "driver"
_READ_BYTES = 2**20


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


@dataclass
class Excerpt:
    """The first and the last lines of an output. Lines that begin with one of `without` are left out."""

    without: tuple[bytes, ...] = ()
    _head: bytearray = field(default_factory=bytearray)
    _tail: deque[bytes] = field(default_factory=deque)
    _tail_bytes: int = 0
    _dropped_bytes: int = 0
    _partial: bytes = b""

    def add(self, data: bytes) -> None:
        *lines, partial = (self._partial + data).split(b"\n")
        for line in lines:
            for piece in _pieces(line + b"\n"):
                self._keep(piece)
        *pieces, self._partial = _pieces(partial)
        for piece in pieces:
            self._keep(piece)

    def _keep(self, line: bytes) -> None:
        if self.without and line.startswith(self.without):
            return
        if not self._tail and len(self._head) + len(line) <= HEAD_BYTES:
            self._head += line
            return
        self._tail.append(line)
        self._tail_bytes += len(line)
        while self._tail_bytes > TAIL_BYTES:
            dropped = len(self._tail.popleft())
            self._tail_bytes -= dropped
            self._dropped_bytes += dropped

    def text(self) -> str:
        gap = f"... {self._dropped_bytes:,} bytes are left out here ...\n" if self._dropped_bytes else ""
        parts = [bytes(self._head).decode(errors="replace"), gap, b"".join(self._tail).decode(errors="replace")]
        return "".join(parts) + self._partial.decode(errors="replace")


def _pieces(line: bytes) -> Iterator[bytes]:
    """Cut a line between words if possible. Nothing is added at a cut, so that no secret gets another spelling there."""
    while len(line) > LINE_BYTES:
        end = line.rfind(b" ", 0, LINE_BYTES) + 1 or LINE_BYTES
        yield line[:end]
        line = line[end:]
    yield line


@dataclass
class OutputFile:
    """An output file of a process, and the excerpt of what was read so far."""

    path: Path
    excerpt: Excerpt
    _offset: int = 0

    def read(self) -> bool:
        """Read what was added; return whether there was anything."""
        before = self._offset
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while data := file.read(_READ_BYTES):
                self.excerpt.add(data)
                self._offset += len(data)
        return self._offset > before


def output_files() -> list[Path]:
    """Return the files that this process's standard output and error go to: none for a terminal or a pipe, one if they are one."""
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
        self._context = context
        self._files = [OutputFile(path, Excerpt(without)) for path in output_files()]
        self._over, self._lock, self._unwritten = threading.Event(), threading.Lock(), True
        self._thread = threading.Thread(target=self._run, daemon=True, name="attempt log")
        self._thread.start()

    def write(self) -> None:
        """Write the object again if there is something new."""
        with self._lock, contextlib.suppress(Exception):  # whatever storage or the disk raises: training continues
            news = [file.read() for file in self._files]
            self._unwritten = self._unwritten or any(news)
            if self._unwritten:
                excerpts = {file.path.suffix.strip("."): file.excerpt.text() for file in self._files}
                self.folder.write(str(self.name), to_bytes(self._facts(), excerpts))
                self._unwritten = False

    def close(self) -> None:
        """Write the rest, if storage answers in time."""
        self._over.set()
        self._thread.join(CLOSE_S)

    def _facts(self) -> dict[str, Any]:
        return self._context.known() | {"host": socket.gethostname(), "pid": os.getpid(), "begun_at": self.begun_at}

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(WRITE_EVERY_S)
            self.write()


def to_bytes(facts: dict[str, Any], outputs: dict[str, str]) -> bytes:
    """Return a log's content: a line of facts, then each output below its name. Secrets are replaced here and nowhere else."""
    parts = [f"--- {name} ---\n{text}" if len(outputs) > 1 else text for name, text in outputs.items()]
    return redact("\n".join([json.dumps(facts), *parts])).encode()


def prune(folder: Folder, keep: int = ATTEMPTS_KEPT) -> None:
    """Delete the logs of all but the newest attempts and drivers; what fails is done at the next time."""
    with contextlib.suppress(Exception):
        names = listed(folder)
        drivers = {name.begun for name in names if name.process == DRIVER}
        attempts = {name.begun for name in names if name.process != DRIVER}
        kept = {DRIVER: sorted(drivers)[-keep:], "": sorted(attempts)[-keep:]}
        for name in names:
            if name.begun not in kept[DRIVER if name.process == DRIVER else ""]:
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
    """Return the texts of the logs of the attempt that began then, by default of the newest; UserError if none."""
    names = listed(folder)
    wanted = of_attempt(names, begun or max((name.begun for name in names), default=""))
    if not wanted:
        known = ", ".join(sorted({name.begun for name in names})) or "none"
        raise UserError(f"{folder}: no logs of the attempt {begun or ''}: expected one of: {known}")
    texts = in_order(wanted, lambda name: folder.read(str(name)).decode(errors="replace"), 16)
    return dict(zip(wanted, texts, strict=True))


def of_attempt(names: Sequence[LogName], begun: str) -> list[LogName]:
    """Return the logs of the attempt that began then: its driver's, which may have begun before, and those of its workers."""
    drivers = [name for name in names if name.process == DRIVER and name.begun <= begun]
    return drivers[-1:] + [name for name in names if name.begun == begun and name.process != DRIVER]
