"""A cache of shards on a node's disk: shared by the node's processes, bounded in bytes, least recently used evicted first.

A file is named by its sha256 and checked against it once by each process. Processes map it, so that a node has one copy in memory,
and a worker copies only its own samples from it. If other programs fill the disk, the cache holds what fits. If the disk is broken,
training continues without the cache. But if a disk loses a page of a mapped file, the worker ends (SIGBUS); the next attempt checks
the file again.
"""

import errno
import fcntl
import hashlib
import math
import mmap
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dis_scale.process import counts
from dis_scale.process.errors import FULL
from dis_scale.storage.manifest import Digest

_OURS = re.compile(r"[0-9a-f]{64}(\.part)?")
"""The cache's own files. Other files in its folder are neither counted nor touched."""
MOST_FILES = 2**16
"""Open files of a process with a cache, if the system allows so many."""


def own_folder() -> Path:
    """Return this user's folder in the system's temporary folder.

    PermissionError if another user has created it: that user could change the shards, or add links to files to be overwritten.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"dis-scale-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if {folder.lstat().st_uid, folder.stat().st_uid} != {user}:
        raise PermissionError(errno.EACCES, f"{folder} is another user's")
    return folder / "shards"


def share_read(cached: float) -> float:
    """Return the share of a set that an epoch reads from storage if the cache holds the share `cached` of it.

    Each epoch has its own random order, and the least recently used shard is evicted. Let a shard be at u of one epoch and at v of
    the next, both from 0 to 1. The share of the set that is used in between is 1 - u (1 - v). If that fits, the shard is still
    cached.
    """
    missing = max(0.0, 1 - cached)
    return missing - missing * math.log(missing) if missing else 0.0


class Cache:
    """Shards in `folder`, at most `bound_bytes` together. If it is disabled or its disk is full, `say` gets the reason, once."""

    def __init__(self, folder: Path, bound_bytes: int, say: Callable[[str], None]) -> None:
        self.folder, self.bound_bytes, self._say = folder, bound_bytes, say
        self._disabled = self._said = False
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # a mapped file keeps a descriptor: one for each shard
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))
        self._checked: dict[str, tuple[int, int]] = {}
        """Inode and time of the last change of the files whose bytes this process has checked, by sha256."""

    def get(self, shard: Digest, fetch: Callable[[], bytes]) -> bytes | mmap.mmap:
        """Return the shard with this digest: cached, or by `fetch`, in one process of the node at a time.

        A hit needs no lock: files appear complete, and a mapping outlives its file. Shards that begin with the same three digits
        share a lock.
        """
        cached = self._cached(shard)
        if cached is None:
            with self._locked(f"lock-{shard.sha256[:3]}"):
                cached = self._cached(shard)  # another process may have fetched it
                if cached is None:
                    counts.add(counts.CACHE_MISSES)
                    data = fetch()
                    self._store(shard, data)
                    return self._cached(shard) or data
        counts.add(counts.CACHE_HITS)
        return cached

    def _cached(self, shard: Digest) -> mmap.mmap | None:
        """Map the file and update the time of its last use; None if it is missing or damaged. A damaged file is deleted."""
        path = self.folder / shard.sha256
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                known = stat.st_ino, stat.st_mtime_ns
                right = stat.st_size == shard.size_bytes and (
                    self._checked.get(shard.sha256) == known
                    # read, not mapped: a page that the disk has lost by now raises an error, not a signal
                    or hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
                )
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if right else None
                if data:
                    os.utime(file.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
            if data:
                self._checked[shard.sha256] = known
                data.madvise(mmap.MADV_WILLNEED)  # the kernel reads it while the block before is used
                return data
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._note(error)
        return None

    def _store(self, shard: Digest, data: bytes) -> None:
        """Store the file atomically. Under this lock, any other `.part` file was left by a dead process."""
        if self._disabled or len(data) > self.bound_bytes:
            return
        part = self.folder / f"{shard.sha256}.part"
        with self._locked("lock-capacity") as held:
            bound_bytes = self.bound_bytes
            for _ in range(2):
                if self._disabled or not held:
                    return
                try:
                    # if the first attempt fails, the second fits the new file into the bytes that are in use now
                    bound_bytes = self._evict(len(data), bound_bytes)
                    part.write_bytes(data)
                    stat = part.stat()
                    part.replace(self.folder / shard.sha256)
                    self._checked[shard.sha256] = stat.st_ino, stat.st_mtime_ns
                    return
                except OSError as error:
                    self._note(error)
                    with suppress(OSError):
                        part.unlink(missing_ok=True)

    def _evict(self, size_bytes: int, bound_bytes: int) -> int:
        """Delete the least recently used files until one of this size fits; return the bytes of those that stay."""
        files = list[tuple[os.stat_result, os.DirEntry[str]]]()
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process has deleted it: it was damaged
                if _OURS.fullmatch(entry.name):
                    files.append((entry.stat(), entry))
        used = sum(stat.st_size for stat, _ in files)
        for stat, entry in sorted(files, key=lambda f: (not f[1].name.endswith(".part"), f[0].st_atime_ns)):
            if used + size_bytes <= bound_bytes and not entry.name.endswith(".part"):
                break
            Path(entry.path).unlink(missing_ok=True)
            used -= stat.st_size
        return used

    @contextmanager
    def _locked(self, name: str) -> Iterator[bool]:
        """Hold this node-wide lock and yield True; yield False if the cache is disabled or the lock's file cannot be opened."""
        file = None
        try:
            if not self._disabled:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                file = (self.folder / name).open("ab")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            self._note(error)
        try:
            yield file is not None
        finally:
            if file:
                file.close()

    def _note(self, error: OSError) -> None:
        """Report this error once, and disable the cache, except if the disk is full: space may become free."""
        full = error.errno in FULL
        if not (self._said if full else self._disabled):
            self._said = True
            continues = "with what fits" if full else "without it"
            self._say(f"cache {self.folder}: {error.strerror or error}: training continues {continues}")
        self._disabled = self._disabled or not full
