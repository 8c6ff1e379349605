"""Metric rows in storage: written by one attempt after the other, read as they come, each (name, images) once.

Rows in storage are the truth; MLflow holds a copy. Every few seconds, an attempt writes its newest file again with the new rows,
`<attempt>-<number>.jsonl`, until the file has a segment's size. Files only grow, and earlier files do not change. A line holds the
values of one step. Read next: goodput.py, mlflow.py.
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from dis_scale.process.threads import in_order
from dis_scale.storage.folder import Folder

log = logging.getLogger(__name__)
EVERY_STEPS = 10
"""Steps between two rows of training."""
FLUSH_EVERY_S = 10.0
SEGMENT_BYTES = 2**20
"""Size of a file at which the next rows begin another one: the newest file is written again every ten seconds."""
AT_ONCE = 16
_NAME = re.compile(r"\d+-\d+(?:-\d+)?\.jsonl")
"""Name of a file: attempt and number. Earlier versions also wrote files of several numbers, with the last one in the name."""


class Row(NamedTuple):
    """A metric's value, the images seen (`images`, as the stored rows name them), and when it was first known (Unix seconds)."""

    name: str
    value: float
    images: int
    time: float


class _Line(BaseModel):
    """One line of a file: the values of a step, by name."""

    images: int
    time: float
    values: dict[str, float]


@dataclass
class RowWriter:
    """Collects one attempt's rows and writes them into `folder` from a thread of its own.

    Rows that cannot be written are kept and tried again, so training does not wait for storage before its next resume point.
    """

    folder: Folder
    attempt: int
    writes: bool = True
    """Whether this process writes at all: one rank of a training does."""
    _lines: list[str] = field(default_factory=list)
    """Lines of the newest file, then the lines that are not written yet."""
    _stored: int = 0
    """Number of these lines that are in storage."""
    _files: int = 0
    _flushed_s: float = field(default_factory=time.monotonic)
    _writing: Future[None] | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rows"))

    def add(self, images_seen: int, values: dict[str, float]) -> None:
        if values and self.writes:
            line = _Line(images=images_seen, time=time.time(), values={n: float(v) for n, v in values.items()})
            self._lines.append(json.dumps(line.model_dump()) + "\n")

    def flush_if_due(self) -> None:
        """Start to write what was added, if the last time was `FLUSH_EVERY_S` ago."""
        if time.monotonic() > self._flushed_s + FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Start to write what was added."""
        self._flushed_s = time.monotonic()
        if len(self._lines) > self._stored and (self._writing is None or self._writing.done()):
            self._writing = self._pool.submit(self._write)

    def settle(self) -> None:
        """Write everything that was added; StorageError if that is not possible."""
        self.flush()
        if self._writing:
            wait([self._writing])  # it may have failed, or have begun before the last rows
        if len(self._lines) > self._stored:
            self._pool.submit(self._write).result()

    def close(self) -> None:
        """Write everything, and end the thread."""
        self.settle()
        self._pool.shutdown()

    def _write(self) -> None:
        lines = self._lines[:]
        data = "".join(lines).encode()
        self.folder.write(f"{self.attempt:04d}-{self._files:06d}.jsonl", data)
        self._stored = len(lines)
        if len(data) >= SEGMENT_BYTES:
            del self._lines[: len(lines)]
            self._stored, self._files = 0, self._files + 1


@dataclass
class RowReader:
    """Reads the new rows of a run. Leaves out repeats: rows whose images seen do not exceed those of the last row of their name.

    So if a later attempt repeats steps of an earlier one, the earlier rows count. With `only`, reads only the rows of that name.
    """

    folder: Folder
    images: dict[str, int] = field(default_factory=dict)
    """Images seen of the last row, by name."""
    _read: dict[str, int] = field(default_factory=dict)
    """Bytes that were read of each file, by the file's name."""
    newest: dict[str, Row] = field(default_factory=dict)
    """Last row that was read, by name, repeats included: the present state of the run."""
    only: str = ""

    def new(self) -> list[Row]:
        """Return the rows that came since the last call."""
        return [row for rows in self.batches() for row in rows]

    def batches(self) -> Iterator[list[Row]]:
        """Yield the rows that came since the last call, file by file, since weeks of training write many."""
        grown = [(name, size) for name, size in _sizes(self.folder).items() if size > self._read.get(name, 0)]
        parts = in_order(grown, lambda file: self.folder.read(file[0], self._read.get(file[0], 0), file[1]), AT_ONCE)
        for (name, size), data in zip(grown, parts, strict=True):
            yield [row for row in _parse(data, f"{self.folder}/{name}", self.only) if self._first(row)]
            self._read[name] = size

    def _first(self, row: Row) -> bool:
        self.newest[row.name] = row
        new = row.images > self.images.get(row.name, -1)
        if new:
            self.images[row.name] = row.images
        return new


def _parse(data: bytes, where: str, only: str = "") -> list[Row]:
    """Return the rows of a file, or those of one name; damaged lines are left out and logged."""
    rows, damaged = list[Row](), 0
    for line in data.splitlines():
        try:
            parsed = _Line.model_validate_json(line)
        except ValidationError:
            damaged += 1
        else:
            named = parsed.values.items() if not only else ((only, parsed.values[only]),) if only in parsed.values else ()
            rows += [Row(name, value, parsed.images, parsed.time) for name, value in named]
    if damaged:
        log.warning("%s: damaged: %d lines are no rows and left out", where, damaged)
    return rows


def newest(folder: Folder) -> dict[str, Row]:
    """Return the last row of each name in the newest file: what a run did last, without reading its history."""
    if not (names := [*_sizes(folder)]):
        return {}
    return {row.name: row for row in _parse(folder.read(names[-1]), f"{folder}/{names[-1]}")}


def _sizes(folder: Folder) -> dict[str, int]:
    """Return the size of each file in bytes, in the order of attempts and numbers."""
    sizes = {name: size for name, size in folder.sizes().items() if _NAME.fullmatch(name)}
    return dict(sorted(sizes.items(), key=lambda file: [int(number) for number in re.findall(r"\d+", file[0])]))
