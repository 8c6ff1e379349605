"""TorchScript files: loading one runs it, with all rights of the user, so only a file that the recipe names by its hash is read."""

import hashlib

from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage.folder import locate


def read_program(path: str, sha256: str | None, key: str) -> bytes:
    """Return the file at a path or URL; UserError, with its hash, if it is missing or `sha256` is not that of its bytes."""
    if sha256 is None:
        raise UserError(
            f"{key}: {path} is a program, and the recipe has no hash of it; if you trust the file, add beside its path:\n"
            f"  sha256: {hash_of(path, key)}"
        )
    return read_hashed(path, sha256, key)


def read_hashed(path: str, sha256: str, key: str) -> bytes:
    """Return the file at a path or URL, a program or not; UserError if it is missing or has another hash."""
    data = _read(path, key)
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(f"{key}: {path} has sha256 {digest}, the recipe expects {sha256}")
    return data


def hash_of(path: str, key: str) -> str:
    """Return the hash of a file that a user names on the command line, and trusts by that."""
    return hashlib.sha256(_read(path, key)).hexdigest()


def _read(path: str, key: str) -> bytes:
    parent, name = locate(path)
    try:
        return parent.read(name)
    except (FileNotFoundError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, IsADirectoryError):
            raise  # the file may be good
        raise UserError(f"{key}: no file {path}") from error
