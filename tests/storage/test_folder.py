"""What every store keeps: an object's bytes, its name and its time, and one winner of many creators."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from dis_scale.process.errors import Damaged, UserError
from dis_scale.storage.document import Document
from dis_scale.storage.folder import locate, open_folder
from tests.support.clock_store import ClockFileSystem


def test_objects_are_written_read_listed_and_deleted(store_url: str) -> None:
    root = open_folder(store_url) / "root"
    root.write("a/b/c", b"one")
    root.write("a/d", b"two")
    root.write("a/d", b"three")
    assert (root.read("a/b/c"), root.read("a/d")) == (b"one", b"three")
    assert (root.list(), root.list("a"), (root / "a").list(), root.list("none")) == (["a"], ["b", "d"], ["b", "d"], [])
    assert root.exists("a/d")
    assert not root.exists("a/e")
    root.delete("a")
    root.delete("a")
    assert root.list() == []


def test_a_file_in_the_root_is_found_there_and_a_bucket_is_no_file() -> None:
    assert [str(part) for part in locate("/weights.pt")] == ["/", "weights.pt"]
    with pytest.raises(UserError, match="s3://bucket: expected a file in it, got the name of a bucket or a server"):
        locate("s3://bucket")


def test_a_missing_object_is_a_file_not_found(store_url: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_folder(store_url).read("nothing")


def test_no_more_is_read_than_was_asked_for(store_url: str) -> None:
    root = open_folder(store_url)
    for size in (0, 1, 99, 100, 101, 5000):
        root.write("a/b", data := os.urandom(size))
        assert root.read_up_to("a/b", 100) == data[:101]
    with pytest.raises(FileNotFoundError):
        root.read_up_to("a/none", 100)


class Text(Document):
    NAME: ClassVar[str] = "text.json"
    text: str


def test_a_huge_document_is_not_read(tmp_path: Path) -> None:
    """A file of a tebibyte without content: reading it would need as much memory."""
    with (tmp_path / Text.NAME).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Damaged, match=r"text.json: damaged: over 268,435,456 bytes, which no document of a sweep has"):
        Text.read(open_folder(tmp_path))


def test_one_of_many_creators_wins(store_url: str) -> None:
    root = open_folder(store_url)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: root.create("lease", str(i).encode()), range(8)))
    assert sum(won) == 1
    assert root.read("lease") == str(won.index(True)).encode()


def test_a_usable_store_leaves_no_trace_of_the_probe(store_url: str) -> None:
    root = open_folder(store_url) / "new"
    root.require_usable()
    assert root.list() == []


def test_files_are_walked_in_the_order_of_their_paths(store_url: str) -> None:
    """Names like those of our own incomplete files are a user's here. Folders too are listed by their names only."""
    folder, names = (
        open_folder(store_url) / "many",
        ["b.png", "a.png", "c/d.png", "c-1.png", "Z.png", "e\u00e9.png", "x.part-0.png"],
    )
    for name in names:
        folder.write(f"class/{name}", b"x")
    assert list(folder.walk("class")) == sorted(names)
    assert (folder.folders(), folder.folders("class"), list(folder.walk("none"))) == (["class"], ["c"], [])


def test_a_stores_time_is_its_own(
    bucket: str, tmp_path: Path, clock_store: type[ClockFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status compares heartbeats with it: a laptop whose clock is a minute ahead would call each live sweep stopped."""
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 61)
    assert open_folder(bucket).time_s() == pytest.approx(now_s, abs=20)
    assert open_folder(tmp_path).time_s() == pytest.approx(now_s, abs=20), "a file server's"
    assert list(tmp_path.iterdir()) == []
    assert open_folder(tmp_path / "none").time_s() == now_s + 61, "nothing can be written there"
    assert not (tmp_path / "none").exists()
    clock_store.ahead_s = 3600.0
    assert open_folder("clock://bucket/sweep").time_s() == pytest.approx(now_s + 3600, abs=20)
    assert open_folder("clock://bucket").list("sweep") == []
