"""A folder on a disk: atomic writes that a power cut keeps, and errors of a file system that are no absence."""

import errno
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dis_scale.process.errors import StorageAway, StorageError, UserError
from dis_scale.storage.folder import open_folder
from tests.conftest import Scanning


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    with pytest.raises(UserError, match=f"storage {tmp_path} cannot be used: {tmp_path}.* has no hard links"):
        open_folder(tmp_path).require_usable()


def test_a_written_file_and_its_name_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[str]()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())))
    root = open_folder(tmp_path)
    root.write("a", b"")
    root.create("b", b"")
    files, folders = synced[::2], synced[1::2]
    assert [Path(file).name[0] for file in files] == ["a", "b"]
    assert folders == [str(tmp_path)] * 2
    synced.clear()
    root.write("new/folder/c", b"")
    assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new/folder")} < set(synced)


def test_a_folder_that_cannot_be_created_is_a_user_error() -> None:
    with pytest.raises(UserError, match="storage /proc/none cannot be used: there is no such bucket or folder"):
        open_folder("/proc/none").require_usable()


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=f"cannot write {tmp_path}/x: no space left on the device: free some, then run the same command again"
    ):
        open_folder(tmp_path).write("x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_temporary_failures_are_retried(tmp_path: Path, no_pauses: None, inject: Callable[[str], None]) -> None:
    root = open_folder(tmp_path)
    root.write("x", b"data")
    inject("fail at read path=x times=4")
    assert root.read("x") == b"data"
    inject("fail at read path=x times=1000")
    with pytest.raises(StorageAway, match=f"cannot read {tmp_path}/x: ConnectionError: fault: storage is away"):
        root.read("x")


def test_an_error_of_a_disk_is_no_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """A resume point whose manifest could not be looked at once would be taken for an incomplete one, and deleted."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/manifest.json").write_bytes(b"{}")
    errors, stat = [OSError(errno.ESTALE, "Stale file handle")], os.stat

    def failing(path: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/runs") and errors:
            raise errors.pop()
        return stat(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        assert open_folder(tmp_path).exists("runs/manifest.json")
        errors[:] = [OSError(errno.EACCES, "Permission denied")]
        with pytest.raises(StorageError, match=r"cannot look up .*/runs/manifest\.json"):
            open_folder(tmp_path).exists("runs/manifest.json")
    assert not open_folder(tmp_path).exists("runs/manifest.json/x")
    (tmp_path / "gone").symlink_to("/nowhere/unmounted")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert not any(map(open_folder(tmp_path).exists, ("none", "gone", "itself", "x" * 300)))


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, scanning: Callable[[Scanning], None]) -> None:
    """`verify` would report nothing wrong, and `gc` would not see what uses what."""
    for name in ("vae/weights", "runs/a/b"):
        open_folder(tmp_path).write(name, b"1")

    def failing(path: str, real: Callable[[str], Any]) -> Any:
        if path.endswith("runs/a"):
            raise OSError(errno.EACCES, "Permission denied")
        return real(path)

    assert open_folder(tmp_path).tree() == {"vae/weights": 1, "runs/a/b": 1}
    scanning(failing)
    for behind_links in (False, True):
        with pytest.raises(StorageError, match=r"cannot list .*/runs/a"):
            open_folder(tmp_path).tree(behind_links=behind_links)


def test_what_killed_writers_left_is_found_after_a_day(tmp_path: Path) -> None:
    """Others may still write; a preempted encoder leaves up to a whole shard."""
    old, new = (tmp_path / f"{name}.part-{uuid.uuid4().hex}" for name in ("old", "new"))
    for file in (old, new, tmp_path / "done"):
        file.write_bytes(b"half")
    for file in (old, tmp_path / "done"):
        os.utime(file, (time.time() - 90_000,) * 2)
    assert open_folder(tmp_path).abandoned() == [old.name]


def test_an_incomplete_file_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / f"x.part-{uuid.uuid4().hex}").write_bytes(b"half")
    assert open_folder(tmp_path).list() == []


def test_links_to_files_and_folders_are_followed_and_broken_ones_are_files(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write("elsewhere/1.png", b"x")
    folder.write("set/class/2.png", b"x")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/class/1.png").symlink_to(tmp_path / "elsewhere/1.png")
    (tmp_path / "set/class/gone.png").symlink_to(tmp_path / "elsewhere/gone.png")
    (tmp_path / "set/class/above").symlink_to(tmp_path / "set")
    (tmp_path / "set/class/self").symlink_to(tmp_path / "set/class/self")
    assert list((folder / "set").walk()) == [
        "class/1.png",
        "class/2.png",
        "class/above",
        "class/gone.png",
        "class/self",
        "linked/1.png",
    ]
    assert (folder / "set").folders() == ["class", "linked"]
