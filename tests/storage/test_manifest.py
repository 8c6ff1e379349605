"""A document reads and writes itself; a thing exists when its manifest does, with which its files are compared."""

import logging
from pathlib import Path
from typing import ClassVar

import pytest

from dis_scale.process.errors import Damaged, StorageError
from dis_scale.storage import document
from dis_scale.storage.document import Document
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.manifest import Digest, Manifest
from tests.support.documents import put


class Thing(Manifest):
    images: int


class Note(Document):
    NAME: ClassVar[str] = "note.json"
    text: str
    share: float | None = None


def test_what_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume points whose manifests are too large would be found by none."""
    monkeypatch.setattr(document, "LARGEST_BYTES", 100)
    for write in (Note(text="x" * 100).write, Note(text="x" * 100).create):
        with pytest.raises(StorageError, match=r"note\.json: it would have 130 bytes, and over 100 are not read"):
            write(open_folder(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def thing(tmp_path: Path) -> Folder:
    folder = open_folder(tmp_path / "thing")
    put(Thing(files={}, images=7), folder, {"a": b"alpha", "b": b"beta"})
    return folder


def test_files_are_compared_with_the_manifest(thing: Folder) -> None:
    manifest = Thing.require(thing)
    assert (manifest.images, manifest.read_file(thing, "a")) == (7, b"alpha")
    read: dict[str, bytes] = {}
    manifest.read_files(thing, read.__setitem__)
    assert read == {"a": b"alpha", "b": b"beta"}
    assert manifest.files["a"] == Digest.of(b"alpha")


def test_the_first_of_two_writers_counts_and_neither_writes_over_the_other(tmp_path: Path) -> None:
    """A holder that has lost its lease seals before, between or after its successor's files and manifest."""
    folder = open_folder(tmp_path)
    first = Thing(files={}, images=1).put(folder, {"a": b"first"})
    late = Thing(files={}, images=2).put(folder, {"a": b"other"})
    assert first == late == Thing.require(folder)
    assert late.read_file(folder, "a") == b"first"


def test_a_folder_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    incomplete = open_folder(tmp_path)
    incomplete.write("a", b"alpha")
    assert Thing.find(incomplete) is None
    with pytest.raises(StorageError, match=f"{tmp_path}: damaged: no manifest.json: the folder is incomplete or was deleted"):
        Thing.require(incomplete)


@pytest.mark.parametrize(
    ("damage", "message"), [(b"alphA", "damaged: its sha256 differs"), (b"alph", "damaged: 4 bytes, its manifest says 5")]
)
def test_damage_is_named(thing: Folder, damage: bytes, message: str) -> None:
    thing.write("a", damage)
    with pytest.raises(Damaged, match=f"{thing}/a: {message}"):
        Thing.require(thing).read_file(thing, "a")


def test_a_missing_file_is_named(thing: Folder) -> None:
    manifest = Thing.require(thing)
    thing.delete("b")
    with pytest.raises(Damaged, match="/b: damaged: missing, though its manifest names it"):
        manifest.read_file(thing, "b")


def test_another_format_is_refused_by_name_and_is_no_damage(thing: Folder) -> None:
    thing.write(Thing.NAME, b'{"format": 99, "future": true}')
    with pytest.raises(StorageError, match="format 99 is not read by this version") as raised:
        Thing.find(thing)
    assert not isinstance(raised.value, Damaged)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b'{"format": 1, "te', "JSON"),
        (b"null", "JSON"),
        (b'{"format": 1}', "text"),
        (b'{"format": 1, "text": 3}', "text"),
        (b'{"format": 1, "text": "a", "txet": "b"}', "txet"),
        (b'{"text": "a"}', "it has no format"),
        pytest.param(b"[" * 200_000, "JSON", id="brackets"),
    ],
)
def test_each_damage_of_a_document_is_named_with_its_field(
    tmp_path: Path, data: bytes, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_folder(tmp_path)
    folder.write(Note.NAME, data)
    with pytest.raises(Damaged, match=rf"{tmp_path}/note.json: damaged: {where}"):
        Note.find(folder)
    with caplog.at_level(logging.WARNING):
        assert Note.find_intact(folder) is None
    assert "treated as missing" in caplog.text


def test_a_document_is_written_and_created_once(tmp_path: Path) -> None:
    folder, note = open_folder(tmp_path), Note(text="a")
    assert Note.find(folder) is None
    assert note.create(folder)
    assert not Note(text="b").create(folder)
    assert Note.read(folder) == note
    note.changed(text="b", share=float("nan")).write(folder)
    assert Note.read(folder).text == "b"
    assert Note.exists(folder)
    assert note.to_json() == {"format": 1, "text": "a"}
