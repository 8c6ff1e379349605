"""The cache is shared, bounded and verified: it returns the manifest's bytes, whatever happens to its folder."""

import errno
import fcntl
import mmap
import os
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dis_scale.data.cache import Cache, own_folder, share_read
from dis_scale.process.errors import StorageError
from dis_scale.storage.manifest import Digest

SHARDS = [bytes([i]) * 1000 for i in range(8)]


class Storage:
    """Counts fetches."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def get(self, cache: Cache, i: int) -> bytes | mmap.mmap:
        def fetch() -> bytes:
            self.fetched.append(i)
            return SHARDS[i]

        return cache.get(Digest.of(SHARDS[i]), fetch)


def test_the_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    """Each mapped shard keeps a descriptor, and a shell's usual limit is 1,024: ImageNet has 1,252 shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        Cache(tmp_path, 10**6, print)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 2**16), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def files(at: Path) -> set[str]:
    return {path.name for path in at.iterdir() if not path.name.startswith("lock-")}


def name(i: int) -> str:
    return Digest.of(SHARDS[i]).sha256


def test_one_of_many_readers_fetches_a_shard(tmp_path: Path) -> None:
    storage = Storage()
    caches = [Cache(tmp_path, 10_000, pytest.fail) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert {bytes(data) for data in pool.map(lambda cache: storage.get(cache, 3), caches)} == {SHARDS[3]}
    assert storage.fetched == [3]
    assert files(tmp_path) == {name(3)}


def test_a_hit_waits_for_no_fetch(tmp_path: Path) -> None:
    """Not even for one of a shard that has the same lock."""
    cache, storage = Cache(tmp_path, 10_000, pytest.fail), Storage()
    storage.get(cache, 3)
    with ThreadPoolExecutor(1) as pool, (tmp_path / f"lock-{name(3)[:3]}").open("rb") as fetching:
        fcntl.flock(fetching, fcntl.LOCK_EX)
        assert bytes(pool.submit(storage.get, cache, 3).result(timeout=30)) == SHARDS[3]


def test_a_process_checks_a_file_once_and_its_replacement_again(tmp_path: Path) -> None:
    cache, storage, file = Cache(tmp_path, 10_000, pytest.fail), Storage(), tmp_path / name(1)
    assert isinstance(storage.get(cache, 1), mmap.mmap), "what was fetched is mapped as well: a node keeps one copy"
    wrong, changed_ns = SHARDS[1][:-1] + b"x", file.stat().st_mtime_ns
    file.write_bytes(wrong)
    os.utime(file, ns=(changed_ns, changed_ns))
    assert bytes(storage.get(cache, 1)) == wrong, "the same inode, and no change that its time tells: it is not hashed again"
    os.utime(file, ns=(changed_ns, changed_ns + 1))  # as a new file that got the number of the old one
    assert bytes(storage.get(cache, 1)) == SHARDS[1]
    file.with_suffix(".new").write_bytes(wrong)
    file.with_suffix(".new").replace(file)
    assert bytes(storage.get(cache, 1)) == SHARDS[1]
    assert storage.fetched == [1, 1, 1]


def test_a_damaged_file_is_fetched_again(tmp_path: Path) -> None:
    cache, storage = Cache(tmp_path, 10_000, pytest.fail), Storage()
    storage.get(cache, 1)
    (tmp_path / name(1)).write_bytes(SHARDS[1][:-1] + b"x")
    assert [bytes(storage.get(cache, 1)) for _ in range(2)] == [SHARDS[1]] * 2
    assert storage.fetched == [1, 1]


def test_the_least_recently_used_are_evicted_within_the_bound(tmp_path: Path) -> None:
    cache, storage = Cache(tmp_path, 3500, pytest.fail), Storage()
    for i in (0, 1, 2, 0, 3, 0, 4):
        storage.get(cache, i)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3500
    assert files(tmp_path) == {name(0), name(3), name(4)}
    assert storage.fetched == [0, 1, 2, 3, 4]


def test_a_shard_larger_than_the_cache_is_not_stored(tmp_path: Path) -> None:
    cache, storage = Cache(tmp_path, 999, pytest.fail), Storage()
    assert storage.get(cache, 0) == SHARDS[0]
    assert files(tmp_path) == set()


def test_partial_files_of_dead_writers_are_deleted(tmp_path: Path) -> None:
    (tmp_path / f"{name(5)}.part").write_bytes(b"half")
    Storage().get(Cache(tmp_path, 10_000, pytest.fail), 0)
    assert files(tmp_path) == {name(0)}


def test_a_disk_that_others_fill_holds_what_fits_and_more_when_they_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, storage, room, write = list[str](), Storage(), [3000], Path.write_bytes
    cache = Cache(tmp_path, 10_000, lines.append)

    def on_a_small_disk(self: Path, data: bytes) -> int:
        write(self, data)
        if sum(path.stat().st_size for path in tmp_path.iterdir()) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", on_a_small_disk)
    assert [bytes(storage.get(cache, i)) for i in range(5)] == SHARDS[:5]
    assert files(tmp_path) == {name(2), name(3), name(4)}
    room[0] = 500
    assert [bytes(storage.get(cache, i)) for i in (5, 5, 6)] == [SHARDS[5], SHARDS[5], SHARDS[6]]
    assert files(tmp_path).isdisjoint({name(5), name(6)})
    room[0] = 5000
    assert [bytes(storage.get(cache, i)) for i in (5, 6, 5, 6)] == [SHARDS[5], SHARDS[6]] * 2
    assert storage.fetched == [0, 1, 2, 3, 4, 5, 5, 6, 5, 6]
    assert lines == [f"cache {tmp_path}: No space left on device: training continues with what fits"]


def test_a_disk_that_turns_read_only_is_logged_once_and_reads_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor can what was half-written be deleted."""
    lines, storage = list[str](), Storage()
    cache = Cache(tmp_path, 10_000, lines.append)
    storage.get(cache, 0)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    assert [bytes(storage.get(cache, i)) for i in (1, 2, 0)] == [SHARDS[1], SHARDS[2], SHARDS[0]]
    assert lines == [f"cache {tmp_path}: Read-only file system: training continues without it"]
    assert storage.fetched == [0, 1, 2]


def test_a_file_that_another_process_deletes_meanwhile_ends_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was damaged for all workers of the node at the same time."""
    storage, cache, listed = Storage(), Cache(tmp_path, 10_000, pytest.fail), os.scandir
    storage.get(cache, 0)

    def scandir(path: Path) -> list[os.DirEntry[str]]:
        entries = list(listed(path))
        for entry in entries:
            Path(entry.path).unlink()
        return entries

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", scandir)
        storage.get(cache, 1)
    storage.get(cache, 1)
    assert storage.fetched == [0, 1]


def test_a_folder_that_cannot_be_created_is_logged_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    lines, storage = list[str](), Storage()
    cache = Cache(tmp_path / "file/cache", 10_000, lines.append)
    assert [storage.get(cache, i) for i in range(3)] == SHARDS[:3]
    assert lines == [f"cache {tmp_path}/file/cache: Not a directory: training continues without it"]


def test_errors_of_storage_pass_through(tmp_path: Path) -> None:
    def fetch() -> Any:
        raise StorageError("there: damaged")

    with pytest.raises(StorageError, match="there: damaged"):
        Cache(tmp_path, 10_000, pytest.fail).get(Digest.of(b"x"), fetch)
    assert files(tmp_path) == set()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is this machine's /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_default_folder_is_this_users_alone(temporary: Path) -> None:
    assert own_folder() == temporary / f"dis-scale-{os.getuid()}" / "shards"
    assert own_folder().parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives a folder away")
@pytest.mark.parametrize("link", [False, True])
def test_a_folder_that_another_user_has_made_is_not_used(temporary: Path, link: bool) -> None:
    (theirs := temporary / f"dis-scale-{os.getuid()}").mkdir()
    if link:
        theirs.rename(temporary / "elsewhere")
        theirs.symlink_to(temporary / "elsewhere")
    assert own_folder().parent == theirs, "a link of one's own to a larger disk"
    os.chown(theirs, 12_345, 12_345, follow_symlinks=False)
    with pytest.raises(PermissionError, match="is another user's"):
        own_folder()


def test_other_files_are_neither_counted_nor_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_bytes(b"x" * 900)
    (tmp_path / "folder").mkdir()
    data = b"y" * 500
    cache = Cache(tmp_path, 600, print)
    assert bytes(cache.get(Digest.of(data), lambda: data)) == data
    assert (tmp_path / "thesis.txt").stat().st_size == 900
    assert bytes(cache.get(Digest.of(data), lambda: b"fetched again")) == data


@pytest.mark.parametrize("cached", [0.0, 0.25, 0.5, 0.9, 1.0, 2.0])
def test_the_share_that_an_epoch_reads_is_that_of_random_orders(cached: float) -> None:
    """Simulated: 400 shards, evicted as the cache does, in a new random order each epoch."""
    random, order, misses = np.random.default_rng(0), list[int](), 0
    for epoch in range(6):
        for shard in random.permutation(400).tolist():
            if shard in order:
                order.remove(shard)
            else:
                misses += epoch > 0
            order.append(shard)
            del order[: -round(400 * cached) or len(order)]
    assert misses / (5 * 400) == pytest.approx(share_read(cached), abs=0.02)
