"""Shards in a worker's memory: those of the current block and the next, or all of them. Threads load them ahead of use."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from dis_scale.data.shards import Shard

LOADS_AT_ONCE = 4
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of a container's memory below /sys/fs/cgroup, versions 2 and 1."""


class MemoryBuffer:
    """Shards by index. Each is loaded by a thread of its own as soon as it is requested. For one reading thread."""

    def __init__(self, load: Callable[[int], Shard], keep_all: bool) -> None:
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
        """Return a requested shard. If its load failed, load it again now that it is needed."""
        future = self._loads[shard]
        if future.done() and future.exception():
            future = self._loads[shard] = self._start(shard)
        return future.result()

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


def free_memory_bytes() -> int:
    """Return the free memory of this machine or container; 0 if unknown (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for limit, used in _CGROUPS:
        try:
            limit_bytes, used_bytes = ((Path("/sys/fs/cgroup") / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if limit_bytes.isdigit():
            free.append(max(0, int(limit_bytes) - int(used_bytes)))
    return min(free, default=0)
