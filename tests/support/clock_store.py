"""A store in this process's memory whose clock is another machine's, at `clock://`."""

import time
from datetime import UTC, datetime
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

_BEGAN_AT, _BEGAN_S = time.time(), time.monotonic()


class ClockFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Its clock goes `ahead_s` before this machine's, and is not set where a test sets this machine's."""

    protocol = "clock"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    ahead_s: ClassVar[float] = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("clock://", "memory://")))

    def modified(self, path: str) -> datetime:
        assert self.exists(path)
        return datetime.fromtimestamp(_BEGAN_AT + time.monotonic() - _BEGAN_S + self.ahead_s, UTC)


fsspec.register_implementation("clock", ClockFileSystem, clobber=True)
