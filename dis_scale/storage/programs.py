"""Programs of others: loading one may run it, with all rights of the user, so a recipe names each by its hash."""

import hashlib
from collections.abc import Sequence

from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage.folder import locate


def read_programs(paths: Sequence[str], sha256: str | None, key: str) -> list[bytes]:
    """Return the files at paths or URLs; UserError if one is missing, or if `sha256` is not the hash of all in a row."""
    files = [_read(path, key) for path in paths]
    what, digest = f"{key}: {' and '.join(paths)}", _hash(files)
    if sha256 is None:
        raise UserError(
            f"{what}: a program, and the recipe has no hash of it; if you trust it, add beside its path:\n  sha256: {digest}"
        )
    if digest != sha256:
        raise UserError(f"{what} has sha256 {digest}, the recipe expects {sha256}")
    return files


def hash_of(paths: Sequence[str], key: str) -> str:
    """Return the hash of files that a user names on the command line, and thereby trusts."""
    return _hash([_read(path, key) for path in paths])


def _hash(files: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(files)).hexdigest()


def _read(path: str, key: str) -> bytes:
    parent, name = locate(path)
    try:
        return parent.read(name)
    except (FileNotFoundError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, IsADirectoryError):
            raise  # the file may be good
        raise UserError(f"{key}: no file {path}") from error
