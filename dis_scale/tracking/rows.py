"""Metric rows in storage: written by one attempt after the other, read as they come, each (name, images) once.

Rows in storage are the truth; MLflow holds a copy. Read next: goodput.py, mlflow.py.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dis_scale.storage.folder import Folder


class Row(NamedTuple):
    """A metric's value, the images seen (`images`, as the stored rows name them), and when it was first known (Unix seconds)."""

    name: str
    value: float
    images: int
    time: float


@dataclass
class RowWriter:
    """Collects one attempt's rows and writes them into `folder`, one file per flush."""

    folder: Folder
    attempt: int
    _rows: list[Row] = field(default_factory=list)
    _files: int = 0

    def add(self, images_seen: int, values: dict[str, float]) -> None:
        now = time.time()
        self._rows += [Row(name, float(value), images_seen, now) for name, value in values.items()]

    def flush(self) -> None:
        if self._rows:
            lines = "".join(json.dumps(row._asdict()) + "\n" for row in self._rows)
            self.folder.write(f"{self.attempt:04d}-{self._files:06d}.jsonl", lines.encode())
            self._rows, self._files = [], self._files + 1


@dataclass
class RowReader:
    """Reads the rows of a run as they come, each (name, images) once: the first attempt that logged it wins."""

    folder: Folder
    _seen_files: set[str] = field(default_factory=set)
    _seen_rows: set[tuple[str, int]] = field(default_factory=set)

    def new(self) -> list[Row]:
        """Return the rows that came since the last call."""
        fresh = list[Row]()
        for name in row_files(self.folder):
            if name not in self._seen_files:
                self._seen_files.add(name)
                fresh += read_rows(self.folder, name)
        return [row for row in fresh if self._first(row)]

    def _first(self, row: Row) -> bool:
        key = (row.name, row.images)
        known = key in self._seen_rows
        self._seen_rows.add(key)
        return not known


def row_files(folder: Folder) -> list[str]:
    """Return the names of the files that hold rows, in the order in which they were written."""
    return [name for name in folder.list() if name.endswith(".jsonl")]


def read_rows(folder: Folder, name: str) -> Iterator[Row]:
    """Yield the rows of one file."""
    return (Row(**json.loads(line)) for line in folder.read(name).splitlines())
