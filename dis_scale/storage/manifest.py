"""A thing exists when its manifest does: files first, hashed; one small manifest last.

A folder without a manifest is incomplete: it may be overwritten or deleted. Read next: folder.py, for atomic writes.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from dis_scale.process.errors import Damaged, StorageError
from dis_scale.process.threads import in_order
from dis_scale.storage.folder import Folder

FORMAT = 3
"""Version of every manifest and sidecar; this code reads FORMAT and FORMAT - 1."""
NAME = "manifest.json"
READING_THREADS = 4
"""Files that are read and hashed at once; each is in memory meanwhile."""


def digest(data: bytes) -> dict[str, Any]:
    """Return a file's entry in a manifest: its size in bytes and its sha256."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def put(folder: Folder, files: dict[str, bytes], **facts: Any) -> dict[str, Any]:
    """Write the files, then the manifest that makes them exist; return the manifest."""
    for name, data in files.items():
        folder.write(name, data)
    return seal(folder, {name: digest(data) for name, data in files.items()}, **facts)


def seal(folder: Folder, files: dict[str, dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Write the manifest of files that are already written, by name and `digest`; return it."""
    manifest = {"format": FORMAT, **facts, "files": files}
    folder.write_json(NAME, manifest)
    return manifest


def seal_once(folder: Folder, files: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Write the manifest as `seal`, unless the folder has one: of two writers the first counts."""
    manifest = {"format": FORMAT, **facts, "files": files}
    folder.create(NAME, (json.dumps(manifest, indent=1) + "\n").encode())


def find(folder: Folder, *keys: str) -> dict[str, Any] | None:
    """Return the folder's manifest, or None if the folder is incomplete or does not exist; Damaged if it lacks `keys`."""
    try:
        manifest = folder.read_json(NAME)
    except FileNotFoundError:
        return None
    require_format(manifest, f"{folder}/{NAME}")
    if not set(keys) <= manifest.keys():
        raise Damaged(f"{folder}/{NAME}: damaged: expected a mapping with {', '.join(keys)}")
    return manifest


def require(folder: Folder, *keys: str) -> dict[str, Any]:
    """Return the manifest of a folder that must be complete; StorageError if it has none, or one without `keys`."""
    manifest = find(folder, *keys)
    if manifest is None:
        raise StorageError(f"{folder}: no {NAME}: the folder is incomplete or was deleted")
    return manifest


def require_format(value: Any, where: str) -> None:
    """StorageError for a format version that this code does not read; Damaged if there is none."""
    version = value.get("format") if isinstance(value, dict) else None
    if version not in (FORMAT, FORMAT - 1):
        raise (Damaged if version is None else StorageError)(
            f"{where}: format {version!r} is not read by this version (it reads {FORMAT - 1} and {FORMAT})"
        )


def read(folder: Folder, name: str, manifest: dict[str, Any]) -> bytes:
    """Return one file after comparing it with the manifest; StorageError names a missing, short or damaged one."""
    return verified(folder, name, manifest["files"][name])


def read_all(folder: Folder, manifest: dict[str, Any], use: Callable[[str, bytes], None] = lambda *_: None) -> None:
    """Read all files, some at once, and give each with its name to `use`; StorageError names one that differs from the manifest."""
    for _ in in_order(manifest["files"], lambda name: use(name, read(folder, name, manifest)), READING_THREADS):
        pass


def write_sidecar(folder: Folder, name: str, facts: dict[str, Any]) -> None:
    """Write the facts of one file of a set, with their own hash: no manifest has it before the set is complete."""
    folder.write_json(name, facts | {"facts_sha256": _facts_hash(facts)})


def read_sidecar(folder: Folder, name: str) -> dict[str, Any]:
    """Return the facts; Damaged if they differ from their hash. Those of an earlier version have none."""
    facts: dict[str, Any] = folder.read_json(name, "format")
    if facts.pop("facts_sha256", None) not in (None, _facts_hash(facts)):
        raise Damaged(f"{folder}/{name}: damaged: its facts have another sha256 than it says")
    return facts


def _facts_hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def verified(folder: Folder, name: str, expected: dict[str, Any]) -> bytes:
    """Return one file after comparing it with its `digest`; Damaged names a missing, short or damaged one."""
    try:
        data = folder.read(name)
    except FileNotFoundError as error:
        raise Damaged(f"{folder}/{name}: missing, though its manifest names it") from error
    actual = digest(data)
    if actual["bytes"] != expected["bytes"]:
        raise Damaged(f"{folder}/{name}: damaged: {actual['bytes']} bytes, its manifest says {expected['bytes']}")
    if actual["sha256"] != expected["sha256"]:
        raise Damaged(f"{folder}/{name}: damaged: its sha256 differs from the manifest's")
    return data
