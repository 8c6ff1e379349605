"""Shards in a worker's memory: those of the block in hand and of the one to come, or all; loaded by threads ahead of their use."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from dis_scale.data.shards import Shard

LOADS_AT_ONCE = 4
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of a container's memory below /sys/fs/cgroup, versions 2 and 1."""


class Shelf:
    """Shards by index, each loaded by a thread of its own as soon as it is wanted. For one reading thread."""

    def __init__(self, load: Callable[[int], Shard], keep_all: bool) -> None:
        self._load, self._keep_all = load, keep_all
        self._room = threading.Semaphore(LOADS_AT_ONCE)
        self._found: dict[int, Future[Shard]] = {}

    def want(self, shards: list[int]) -> None:
        """Begins to load these, in this order, and lets go of all others unless everything is kept."""
        if not self._keep_all:
            for gone in self._found.keys() - set(shards):
                self._found.pop(gone).cancel()
        for shard in shards:
            if shard not in self._found:
                self._found[shard] = self._begin(shard)

    def __getitem__(self, shard: int) -> Shard:
        """A shard that is wanted. One that could not be loaded ahead is tried once more, now that it is needed."""
        found = self._found[shard]
        if found.done() and found.exception():
            found = self._found[shard] = self._begin(shard)
        return found.result()

    def _begin(self, shard: int) -> Future[Shard]:
        future: Future[Shard] = Future()

        def load() -> None:
            with self._room:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(self._load(shard))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=load, daemon=True, name=f"shard {shard}").start()
        return future


def free_memory_bytes() -> int:
    """What this machine or container has free; 0 where it does not say (elsewhere than on Linux)."""
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
