"""Writing a local file: atomic, exclusive where asked, and on the disk when it returns."""

import errno
import os
import uuid
from pathlib import Path

from dis_scale.process.errors import UserError

TEMPORARY = ".part-"
"""Beginning of the end of a name of a file that is being written; 32 hexadecimal digits follow."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems without hard links."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems that sync files only."""


def replace(path: Path, data: bytes) -> None:
    """Write a file, in the place of an older one."""
    part = _temporary(path, data)
    try:
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def create(path: Path, data: bytes) -> None:
    """Write a file; FileExistsError if there is one. A hard link: no other call is atomic and exclusive on every file system."""
    part = _temporary(path, data)
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise UserError(
                f"{path.parent} has no hard links, by which one of several runs comes first (exFAT, SMB, and many file systems in "
                "user space have none): use another disk, NFS or S3"
            ) from error
        raise
    finally:
        part.unlink()
    _sync(path.parent)


def _temporary(path: Path, data: bytes) -> Path:
    """Write the data next to `path` under a name that listings hide, and sync it to the disk; return that path."""
    new = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in new:
        _sync(folder.parent)
    part = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


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
