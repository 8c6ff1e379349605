"""A cache of shards on a node's disk: shared by the processes there, bounded in bytes, least recently used ones leave first.

A file is named by its sha256 and held against it each time it is read, so that whatever happens to the folder, what comes out is
what the manifest names. Nothing here can stop a run: on a full or broken disk it goes on without the cache.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dis_scale.storage import manifest

_OURS = re.compile(r"[0-9a-f]{64}(\.part)?")
"""The cache's own files: whatever else lies in its folder is not counted and not touched."""
_LOCKS = 64
"""Files that shards share as locks, by hash: enough for the few that are fetched at once."""


def default_folder() -> Path:
    """A folder of the user's own in the system's temporary one."""
    return Path(tempfile.gettempdir()) / f"dis-scale-{os.getuid()}" / "shards"


class Cache:
    """Shards in `folder`, of at most `bound_bytes` together; `say` is told once why it is given up, if it is."""

    def __init__(self, folder: Path, bound_bytes: int, say: Callable[[str], None]) -> None:
        self.folder, self.bound_bytes, self._say = folder, bound_bytes, say
        self._given_up = False

    def get(self, entry: dict[str, Any], fetch: Callable[[], bytes]) -> bytes:
        """The shard that the manifest's entry names: as cached, or else by `fetch`, in one process of the node at a time."""
        with self._locked(f"lock-{int(entry['sha256'], 16) % _LOCKS:02d}"):
            data = self._cached(entry)
            if data is None:
                data = fetch()
                self._keep(entry, data)
            return data

    def _cached(self, entry: dict[str, Any]) -> bytes | None:
        """The file, touched; None where there is none, or a damaged one, which is deleted."""
        path = self.folder / entry["sha256"]
        try:
            data = path.read_bytes()
            if manifest.digest(data)["sha256"] == entry["sha256"]:
                with suppress(OSError):  # another process may have evicted it: the bytes are good all the same
                    os.utime(path)
                return data
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            self._give_up(error)
        return None

    def _keep(self, entry: dict[str, Any], data: bytes) -> None:
        """Puts the file whole, under a lock that makes any other half-written file one of a dead writer."""
        if self._given_up or len(data) > self.bound_bytes:
            return
        part = self.folder / f"{entry['sha256']}.part"
        with self._locked("lock-room"):
            try:
                self._make_room(len(data))
                part.write_bytes(data)
                part.replace(self.folder / entry["sha256"])
            except OSError as error:
                part.unlink(missing_ok=True)
                self._give_up(error)

    def _make_room(self, size_bytes: int) -> None:
        found = [(e.stat(), e) for e in os.scandir(self.folder) if _OURS.fullmatch(e.name)]
        used = sum(stat.st_size for stat, _ in found)
        for stat, entry in sorted(found, key=lambda f: (not f[1].name.endswith(".part"), f[0].st_mtime_ns)):
            if used + size_bytes <= self.bound_bytes and not entry.name.endswith(".part"):
                return
            Path(entry.path).unlink(missing_ok=True)
            used -= stat.st_size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Alone on this node under this name, unless the cache has been given up; a lock ends with its process."""
        file = None
        try:
            if not self._given_up:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                file = (self.folder / name).open("ab")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            self._give_up(error)
        try:
            yield
        finally:
            if file:
                file.close()

    def _give_up(self, error: OSError) -> None:
        if not self._given_up:
            self._given_up = True
            self._say(f"cache {self.folder}: {error.strerror or error}: training goes on without it")
