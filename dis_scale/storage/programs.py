"""Programs of others: loading one may run it, with all rights of the user, so a recipe names each by its hash."""

import hashlib
from collections.abc import Sequence

from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage.folder import locate


def read_programs(paths: Sequence[str], sha256: str | None, key: str) -> list[bytes]:
    """Return the files at paths or URLs; UserError, with their hash, if one is missing or `sha256` is not that of all in a row."""
    if sha256 is None:
        raise UserError(
            f"{key}: {' and '.join(paths)}: a program, and the recipe has no hash of it; if you trust it, add beside its path:\n"
            f"  sha256: {hash_of(paths, key)}"
        )
    files = [_read(path, key) for path in paths]
    _require_hash(files, sha256, f"{key}: {' and '.join(paths)}")
    return files


def read_hashed(path: str, sha256: str, key: str) -> bytes:
    """Return the file at a path or URL, a program or not; UserError if it is missing or has another hash."""
    data = _read(path, key)
    _require_hash([data], sha256, f"{key}: {path}")
    return data


def hash_of(paths: Sequence[str], key: str) -> str:
    """Return the hash of files that a user names on the command line, and trusts by that."""
    return _hash([_read(path, key) for path in paths])


def _hash(files: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(files)).hexdigest()


def _require_hash(files: Sequence[bytes], sha256: str, what: str) -> None:
    if (digest := _hash(files)) != sha256:
        raise UserError(f"{what} has sha256 {digest}, the recipe expects {sha256}")


def _read(path: str, key: str) -> bytes:
    parent, name = locate(path)
    try:
        return parent.read(name)
    except (FileNotFoundError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, IsADirectoryError):
            raise  # the file may be good
        raise UserError(f"{key}: no file {path}") from error
