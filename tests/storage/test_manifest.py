"""A thing exists when its manifest does; its files are compared with the manifest."""

from pathlib import Path

import pytest

from dis_scale.process.errors import StorageError
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder


@pytest.fixture
def thing(tmp_path: Path) -> Folder:
    folder = open_folder(tmp_path / "thing")
    manifest.put(folder, {"a": b"alpha", "b": b"beta"}, images=7)
    return folder


def test_files_are_compared_with_the_manifest(thing: Folder) -> None:
    contents = manifest.require(thing)
    assert (contents["images"], manifest.read(thing, "a", contents)) == (7, b"alpha")


def test_a_folder_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    incomplete = open_folder(tmp_path)
    incomplete.write("a", b"alpha")
    assert manifest.find(incomplete) is None
    with pytest.raises(StorageError, match=f"{tmp_path}: no manifest.json: the folder is incomplete or was deleted"):
        manifest.require(incomplete)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(b"alphA", "damaged: its sha256 differs"), (b"alph", "damaged: 4 bytes, its manifest says 5")],
)
def test_damage_is_named(thing: Folder, damage: bytes, message: str) -> None:
    thing.write("a", damage)
    with pytest.raises(StorageError, match=f"{thing}/a: {message}"):
        manifest.read(thing, "a", manifest.require(thing))


def test_a_missing_file_is_named(thing: Folder) -> None:
    contents = manifest.require(thing)
    thing.delete("b")
    with pytest.raises(StorageError, match="/b: missing, though its manifest names it"):
        manifest.read(thing, "b", contents)


def test_another_format_is_refused_by_name(thing: Folder) -> None:
    thing.write_json(manifest.NAME, {"format": 99})
    with pytest.raises(StorageError, match="format 99 is not read by this version"):
        manifest.find(thing)


def test_a_truncated_manifest_is_reported_as_damaged(thing: Folder) -> None:
    thing.write(manifest.NAME, b'{"format": 1, "fil')
    with pytest.raises(StorageError, match="damaged: not JSON"):
        manifest.find(thing)
