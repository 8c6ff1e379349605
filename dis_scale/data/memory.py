"""Shards in a worker's memory: those of the current block and the next, or all of them. Threads load them ahead of use."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import psutil

from dis_scale.data.shards import Shard

LOADS_AT_ONCE = 4
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}
"""Files with a control group's memory limit, its use and the parts of the use, by folder below `CGROUPS`: versions 2 and 1."""

_FILES = {"": r"^(?:active|inactive)_file (\d+)$", "memory": r"^total_(?:active|inactive)_file (\d+)$"}
"""Lines with the bytes of cached files in a group and its sub-groups, which its use includes."""


class MemoryBuffer:
    """Shards by index. Each is loaded by a thread of its own as soon as it is requested. For one reading thread."""

    def __init__(self, load: Callable[[int], Shard], *, keep_all: bool) -> None:
        self._load, self._keep_all = load, keep_all
        self._slots = threading.Semaphore(LOADS_AT_ONCE)
        self._loads: dict[int, Future[Shard]] = {}

    def request(self, shards: list[int]) -> None:
        """Start to load these shards, in this order. Drop all others unless everything is kept."""
        if not self._keep_all:
            for dropped in self._loads.keys() - set(shards):
                self._loads.pop(dropped).cancel()
        for shard in shards:
            if shard not in self._loads:
                self._loads[shard] = self._start(shard)

    def __getitem__(self, shard: int) -> Shard:
        """Return a requested shard. If its load fails, load it again now that it is needed."""
        try:
            return self._loads[shard].result()
        except Exception:
            self._loads[shard] = self._start(shard)
        return self._loads[shard].result()

    def _start(self, shard: int) -> Future[Shard]:
        future: Future[Shard] = Future()

        def load() -> None:
            with self._slots:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(self._load(shard))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=load, daemon=True, name=f"shard {shard}").start()
        return future


def free_memory_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Return the free memory of this machine, container or job. Files that the kernel caches count as free.

    A job of Slurm or systemd has a control group within others, and the least of their limits holds.
    """
    free = [int(psutil.virtual_memory().available)]
    for kind, path in _own_groups(own):
        for group in (path, *path.parents):
            try:
                limit, used, stat = ((cgroups / kind / group / name).read_text() for name in _LIMITS[kind])
            except OSError:
                continue
            if limit.strip().isdigit():
                files = sum(map(int, re.findall(_FILES[kind], stat, re.MULTILINE)))
                free.append(max(0, int(limit) - int(used) + files))
    return min(free)


def _own_groups(own: Path) -> list[tuple[str, Path]]:
    """Return this process's control groups, each a key of `_LIMITS` and a path; also the root, for containers without a path."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # a kernel or a sandbox without control groups
        lines = []
    found = [(kind, Path(path.lstrip("/"))) for _, kinds, path in lines for kind in _LIMITS if kind in kinds.split(",")]
    return found + [(kind, Path()) for kind in _LIMITS]
