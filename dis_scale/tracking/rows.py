"""Metric rows in storage: written by one attempt after the other, read as they come, each (name, images) once.

Rows in storage are the truth; MLflow holds a copy. A file holds what an attempt wrote at once, some seconds; at each resume point
the small files are merged. `<attempt>-<first>-<last>.jsonl` holds what the files from number first to last held. A line holds the
values of one step. Read next: goodput.py, mlflow.py.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from dis_scale.process.errors import StorageAway, StorageError
from dis_scale.process.threads import in_order
from dis_scale.storage.folder import Folder

log = logging.getLogger(__name__)
FLUSH_EVERY_S = 10.0
SEGMENT_BYTES = 4 * 2**20
"""Files of this size are not merged any more."""
AT_ONCE = 16
_TRIES = 10
"""Listings of which a file has gone, before its loss is an error: a merge replaces files at each resume point only."""


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


class _File(NamedTuple):
    """A file of rows; sorts by what it holds, and before all files that hold a part of the same."""

    attempt: int
    first: int
    minus_last: int

    @classmethod
    def parse(cls, name: str) -> "_File | None":
        try:
            numbers = [int(part) for part in name.removesuffix(".jsonl").split("-")]
        except ValueError:
            return None
        return cls(numbers[0], numbers[1], -numbers[-1]) if len(numbers) in (2, 3) else None

    @property
    def last(self) -> int:
        return -self.minus_last

    @property
    def name(self) -> str:
        last = f"-{self.last:06d}" if self.last > self.first else ""
        return f"{self.attempt:04d}-{self.first:06d}{last}.jsonl"


@dataclass
class RowWriter:
    """Collects one attempt's rows and writes them into `folder` from a thread of its own.

    Rows that cannot be written are kept and tried again, so training does not wait for storage before its next resume point.
    """

    folder: Folder
    attempt: int
    writes: bool = True
    """Whether this process writes at all: one rank of a training does."""
    _new: list[str] = field(default_factory=list)
    _waiting: list[str] = field(default_factory=list)
    """Texts of files that are not written yet."""
    _files: int = 0
    _flushed_s: float = field(default_factory=time.monotonic)
    _writing: Future[None] | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rows"))

    def add(self, images_seen: int, values: dict[str, float]) -> None:
        if values and self.writes:
            line = _Line(images=images_seen, time=time.time(), values={n: float(v) for n, v in values.items()})
            self._new.append(json.dumps(line.model_dump()) + "\n")

    def flush_if_due(self) -> None:
        """Start to write what was added, if the last time was `FLUSH_EVERY_S` ago."""
        if time.monotonic() > self._flushed_s + FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Start to write what was added."""
        self._flushed_s = time.monotonic()
        if self._new:
            self._waiting.append("".join(self._new))
            self._new = []
        if self._waiting and (self._writing is None or self._writing.done()):
            self._writing = self._pool.submit(self._write)

    def settle(self) -> None:
        """Write everything that was added; StorageError if that is not possible."""
        self.flush()
        if self._writing:
            wait([self._writing])  # it may have failed, or have begun before the last rows
        if self._waiting:
            self._pool.submit(self._write).result()

    def compact(self) -> None:
        """Start to merge the small files, also those that earlier attempts left; what fails is done at the next time."""
        if self.writes:
            self._writing = self._pool.submit(_compact_if_possible, self.folder)

    def close(self) -> None:
        """Write everything, merge, and end the thread."""
        self.settle()
        self.compact()
        self._pool.shutdown()

    def _write(self) -> None:
        while self._waiting:
            self.folder.write(_File(self.attempt, self._files, -self._files).name, self._waiting[0].encode())
            self._files += 1
            del self._waiting[0]


@dataclass
class RowReader:
    """Reads the rows of a run as they come. Of rows of one name, those of images seen before are repeats and left out.

    So if a later attempt repeats steps of an earlier one, the first one's rows count.
    """

    folder: Folder
    images: dict[str, int] = field(default_factory=dict)
    """By name: the images seen of the last row."""
    _next: dict[int, int] = field(default_factory=dict)
    """By attempt: the number of the next file to read."""
    newest: dict[str, Row] = field(default_factory=dict)
    """By name: the last row that was read, a repeat or not: what the run does now."""

    def new(self) -> list[Row]:
        """Return the rows that came since the last call."""
        return [row for rows in self.batches() for row in rows]

    def batches(self) -> Iterator[list[Row]]:
        """Yield the rows that came since the last call, file by file: those of weeks are many."""
        for _ in range(_TRIES):
            try:
                yield from self._read()
            except FileNotFoundError:
                continue  # merged since it was listed
            return
        raise StorageError(f"{self.folder}: files of rows are listed and cannot be read")

    def _read(self) -> Iterator[list[Row]]:
        left = [file for file in _listed(self.folder) if file.last >= self._next.get(file.attempt, 0)]
        for file, data in zip(left, in_order(left, lambda file: self.folder.read(file.name), AT_ONCE), strict=True):
            yield [row for row in _parse(data, f"{self.folder}/{file.name}") if self._first(row)]
            self._next[file.attempt] = file.last + 1

    def _first(self, row: Row) -> bool:
        self.newest[row.name] = row
        new = row.images > self.images.get(row.name, -1)
        if new:
            self.images[row.name] = row.images
        return new


def _compact_if_possible(folder: Folder) -> None:
    with contextlib.suppress(StorageError, StorageAway, FileNotFoundError):
        compact(folder)


def _parse(data: bytes, where: str) -> list[Row]:
    """Return the rows of a file; damaged lines are left out and logged."""
    rows, damaged = list[Row](), 0
    for line in data.splitlines():
        try:
            parsed = _Line.model_validate_json(line)
        except ValidationError:
            damaged += 1
        else:
            rows += [Row(name, value, parsed.images, parsed.time) for name, value in parsed.values.items()]
    if damaged:
        log.warning("%s: damaged: %d lines are no rows and left out", where, damaged)
    return rows


def newest(folder: Folder) -> dict[str, Row]:
    """Return the last row of each name in the newest file: what a run did last, without reading its history."""
    for _ in range(_TRIES):
        files = _listed(folder)
        if not files:
            return {}
        name = files[-1].name
        with contextlib.suppress(FileNotFoundError):  # merged since it was listed
            return {row.name: row for row in _parse(folder.read(name), f"{folder}/{name}")}
    raise StorageError(f"{folder}: files of rows are listed and cannot be read")


def _listed(folder: Folder) -> list[_File]:
    return sorted(file for name in folder.list() if (file := _File.parse(name)))


def compact(folder: Folder) -> None:
    """Merge each attempt's small files in their order. Only the attempt that owns the run may do so.

    The merged file is written before its parts are deleted, so a reader finds each row at any time.
    """
    sizes = {file: size for name, size in folder.sizes().items() if (file := _File.parse(name))}
    for _, of_attempt in groupby(sorted(sizes), key=lambda file: file.attempt):
        files = list(of_attempt)
        whole = _not_covered(files)
        for group in _groups(whole, sizes):
            parts = in_order(group, lambda file: folder.read(file.name), AT_ONCE)
            data = b"".join(part.rstrip(b"\n") + b"\n" for part in parts)  # one may be cut off
            folder.write(_File(group[0].attempt, group[0].first, group[-1].minus_last).name, data)
            _delete(folder, group)
        _delete(folder, set(files) - set(whole))  # left by a merge that was cut off


def _delete(folder: Folder, files: Iterable[_File]) -> None:
    for _ in in_order(files, lambda file: folder.delete(file.name), AT_ONCE):
        pass


def _not_covered(files: list[_File]) -> list[_File]:
    """Return the files that hold something that none before them holds."""
    whole, end = list[_File](), -1
    for file in files:
        if file.last > end:
            whole.append(file)
            end = file.last
    return whole


def _groups(files: list[_File], sizes: dict[_File, int]) -> Iterator[list[_File]]:
    """Yield neighbours that have at most SEGMENT_BYTES together, at least two."""
    group, group_bytes = list[_File](), 0
    for file in files:
        if group_bytes + sizes[file] > SEGMENT_BYTES:
            if len(group) > 1:
                yield group
            group, group_bytes = [], 0
        group.append(file)
        group_bytes += sizes[file]
    if len(group) > 1:
        yield group
