"""Local files: written atomically, exclusively where asked, and on the disk when a write returns; listed with their links."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from dis_scale.process.errors import UserError

TEMPORARY = ".part-"
"""Mark in the name of a file that is being written, after its final name; 32 hexadecimal digits follow."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems without hard links."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems that sync files only."""


class Scanned(NamedTuple):
    """A name in a folder."""

    name: str
    folder: tuple[int, int] | None
    """Device and inode, if it is or leads to a folder."""
    is_link: bool


def scan(path: str) -> list[Scanned]:
    """Return the entries of a folder."""
    return [Scanned(entry.name, _folder(entry), entry.is_symlink()) for entry in os.scandir(path)]


def identity(found: os.stat_result) -> tuple[int, int]:
    """Return device and inode."""
    return found.st_dev, found.st_ino


def _folder(entry: "os.DirEntry[str]") -> tuple[int, int] | None:
    """Return the identity of a folder, or of a link's folder; None for anything else, such as a link to itself."""
    try:
        return identity(entry.stat()) if entry.is_dir() else None
    except FileNotFoundError as error:
        raise OSError(errno.ESTALE, "it was there, and is gone while it is listed", entry.path) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def replace(path: Path, data: bytes) -> None:
    """Write a file, in the place of an older one."""
    with _written(path, data) as part:
        part.replace(path)


def create(path: Path, data: bytes) -> None:
    """Write a file by a hard link; FileExistsError if it exists. No other call is atomic and exclusive on every file system."""
    with _written(path, data) as part:
        try:
            os.link(part, path)
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise UserError(
                    f"{path.parent} has no hard links, by which one of several runs comes first (exFAT, SMB, and many file systems "
                    "in user space have none): use another disk, NFS or S3"
                ) from error
            raise


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """Write the data beside `path` under a name that listings hide, and yield that name; the block gives the file its final name.

    Afterwards the file and the names of its folder are on the disk. If anything fails, nothing is left.
    """
    new = list(takewhile(lambda folder: not folder.exists(), path.parents))
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in new:
        _sync(folder.parent)
    part = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk: what was reported as saved survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
