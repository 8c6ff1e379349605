"""A thing exists when its manifest does, and what it names is held against it."""

from pathlib import Path

import pytest

from dis_scale.errors import StorageError
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder


@pytest.fixture
def thing(tmp_path: Path) -> Folder:
    made = open_folder(tmp_path / "thing")
    manifest.put(made, {"a": b"alpha", "b": b"beta"}, images=7)
    return made


def test_files_are_read_back_against_the_manifest(thing: Folder) -> None:
    found = manifest.find(thing)
    assert found is not None
    assert (found["images"], manifest.read(thing, "a", found)) == (7, b"alpha")


def test_without_a_manifest_there_is_nothing(tmp_path: Path) -> None:
    torn = open_folder(tmp_path)
    torn.write("a", b"alpha")
    assert manifest.find(torn) is None
    with pytest.raises(StorageError, match=f"{tmp_path}: no manifest.json: the folder is incomplete or was deleted"):
        manifest.require(torn)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(b"alphA", "damaged: its sha256 differs"), (b"alph", "damaged: 4 bytes, its manifest says 5")],
)
def test_damage_is_named(thing: Folder, damage: bytes, said: str) -> None:
    thing.write("a", damage)
    found = manifest.find(thing)
    assert found is not None
    with pytest.raises(StorageError, match=f"{thing}/a: {said}"):
        manifest.read(thing, "a", found)


def test_a_missing_file_is_named(thing: Folder) -> None:
    found = manifest.find(thing)
    assert found is not None
    thing.delete("b")
    with pytest.raises(StorageError, match="/b: missing, though its manifest names it"):
        manifest.read(thing, "b", found)


def test_another_format_is_refused_by_name(thing: Folder) -> None:
    thing.write_json(manifest.NAME, {"format": 99})
    with pytest.raises(StorageError, match="format 99 is not read by this version"):
        manifest.find(thing)


def test_a_torn_manifest_is_damage(thing: Folder) -> None:
    thing.write(manifest.NAME, b'{"format": 1, "fil')
    with pytest.raises(StorageError, match="damaged: not JSON"):
        manifest.find(thing)
