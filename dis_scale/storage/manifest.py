"""A thing exists when its manifest does: files first, hashed; one small manifest last.

A folder without a manifest is rubbish that anybody may write over. Read next: storage.py for how one file is put whole.
"""

import hashlib
from typing import Any

from dis_scale.errors import StorageError
from dis_scale.storage.folder import Folder

FORMAT = 2
"""Version of every manifest and sidecar; this code reads FORMAT and FORMAT - 1."""
NAME = "manifest.json"


def digest(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file: its size in bytes and its sha256."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def put(folder: Folder, files: dict[str, bytes], **facts: Any) -> dict[str, Any]:
    """Writes the files and then the manifest that makes them exist; returns the manifest."""
    for name, data in files.items():
        folder.write(name, data)
    return seal(folder, {name: digest(data) for name, data in files.items()}, **facts)


def seal(folder: Folder, files: dict[str, dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Writes the manifest of files that stand already, by name and `digest`; returns it."""
    manifest = {"format": FORMAT, **facts, "files": files}
    folder.write_json(NAME, manifest)
    return manifest


def find(folder: Folder) -> dict[str, Any] | None:
    """The folder's manifest, or None where the thing does not exist (yet)."""
    try:
        manifest = folder.read_json(NAME)
    except FileNotFoundError:
        return None
    require_format(manifest, f"{folder}/{NAME}")
    return manifest


def require(folder: Folder) -> dict[str, Any]:
    """Return the manifest of a folder that must be complete; StorageError if it has none."""
    manifest = find(folder)
    if manifest is None:
        raise StorageError(f"{folder}: no {NAME}: the folder is incomplete or was deleted")
    return manifest


def require_format(value: Any, where: str) -> None:
    """Raises StorageError for a version that this code does not read."""
    version = value.get("format") if isinstance(value, dict) else None
    if version not in (FORMAT, FORMAT - 1):
        raise StorageError(
            f"{where}: format {version!r} is not read by this version (it reads {FORMAT - 1} and {FORMAT})"
        )


def read(folder: Folder, name: str, manifest: dict[str, Any]) -> bytes:
    """One file, held against the manifest; StorageError names a missing, short or damaged one."""
    return verified(folder, name, manifest["files"][name])


def verified(folder: Folder, name: str, expected: dict[str, Any]) -> bytes:
    """One file, held against its `digest`."""
    try:
        data = folder.read(name)
    except FileNotFoundError as error:
        raise StorageError(f"{folder}/{name}: missing, though its manifest names it") from error
    found = digest(data)
    if found["bytes"] != expected["bytes"]:
        raise StorageError(f"{folder}/{name}: damaged: {found['bytes']} bytes, its manifest says {expected['bytes']}")
    if found["sha256"] != expected["sha256"]:
        raise StorageError(f"{folder}/{name}: damaged: its sha256 differs from the manifest's")
    return data
