"""The reader: each node reads a shard about once an epoch, ahead of use; it retries or names faults and never trains on them."""

import mmap
import multiprocessing
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from dis_scale.data.cache import Cache
from dis_scale.data.latents import Latents, fits_in_memory, open_latents
from dis_scale.data.memory import MemoryBuffer, free_memory_bytes
from dis_scale.data.mixing import BLOCK_SHARDS
from dis_scale.data.shards import Shard
from dis_scale.process.errors import StorageAway, StorageError, UserError
from dis_scale.recipe import Reader, Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep.documents import LatentsManifest
from ops.drills import object_store
from tests.support.flaky_store import FlakyFileSystem, busy, bytes_read, reads
from tests.support.small_latents import CLASSES, make, read, read_epoch
from tests.support.waiting import wait_until

COUNTS = [6, 5, 7, 6, 0, 6, 6, 3, 6, 6, 6]
FULL = [count for count in COUNTS if count]


@pytest.fixture
def at(tmp_path: Path, no_pauses: None) -> Path:
    """A set in flaky storage, without faults yet."""
    make(open_folder(tmp_path / "set"), COUNTS)
    return tmp_path / "set"


def flaky(at: Path) -> str:
    return f"flaky://{at}"


def test_two_processes_of_a_node_read_each_shard_once_an_epoch(at: Path, tmp_path: Path) -> None:
    work = [(rank, 2, flaky(at), tmp_path / "cache", 4) for rank in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.starmap(read_epoch, work)
    assert sorted(reads(at).values()) == [1] * len(FULL)
    assert bytes_read(at) == sum(path.stat().st_size for path in at.glob("*.tar")) - (at / "000004.tar").stat().st_size
    alone = read_epoch(0, 1, str(at), None, 4)
    np.testing.assert_array_equal(
        np.concatenate(alone), np.concatenate([m for step in range(len(alone)) for m in parts[step % 2][step // 2 :][:1]])
    )


def test_one_process_without_a_cache_reads_each_shard_once_and_the_next_epochs_first_block(at: Path) -> None:
    read_epoch(0, 1, flaky(at), None, 4)
    assert reads(at).keys() == {f"{n:06d}.tar" for n, count in enumerate(COUNTS) if count}
    assert len(FULL) <= sum(reads(at).values()) <= len(FULL) + BLOCK_SHARDS


def test_a_set_kept_in_memory_is_read_once(at: Path) -> None:
    latents = Latents(open_folder(flaky(at)), 0, keep_all=True)
    for first in range(0, 3 * sum(COUNTS), 8):
        read(latents, first, first + 8)
    assert sorted(reads(at).values()) == [1] * len(FULL)


def test_after_the_first_step_training_does_not_wait(at: Path, flaky_store: type[FlakyFileSystem]) -> None:
    """Reads take 0.2 s, steps longer: without read-ahead, each block would cost at least 0.2 s."""
    flaky_store.latency_s = 0.2
    latents, waited_s = Latents(open_folder(flaky(at)), 0), []
    for first in range(0, sum(COUNTS), 3):
        began = time.monotonic()
        read(latents, first, first + 3)
        waited_s.append(time.monotonic() - began)
        time.sleep(0.06)
    assert waited_s[0] >= 0.2
    assert sum(waited_s[1:]) < 0.2 * len(FULL) / 2, "one by one, the reads would take twice as long"


def test_memory_holds_the_current_block_and_the_next(at: Path) -> None:
    many = make(open_folder(at) / "many", [2] * 8 * BLOCK_SHARDS)
    latents = Latents(many, 0)
    for first in range(0, 2 * 16 * BLOCK_SHARDS, 2):
        read(latents, first, first + 2)
        assert len(latents._buffer._loads) <= 3 * BLOCK_SHARDS  # a micro-batch may be in two blocks


@pytest.mark.parametrize(
    "faults",
    [[busy(503), busy(500)], [TimeoutError("slow"), ConnectionError("away")], [busy(429)] * 8],
    ids=["500s", "timeouts", "long rate limit"],
)
def test_transient_faults_are_retried(at: Path, faults: list[Exception], flaky_store: type[FlakyFileSystem]) -> None:
    expected = read(Latents(open_folder(at), 0), 0, 8)
    flaky_store.faults = list(faults)
    for got, wanted in zip(read(Latents(open_folder(flaky(at)), 0), 0, 8), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert flaky_store.faults == []


def test_lasting_faults_are_named(at: Path, flaky_store: type[FlakyFileSystem]) -> None:
    flaky_store.faults = [busy(503)] * 1000
    with pytest.raises(StorageAway, match=rf"cannot read flaky://{at}/0000\d\d.tar: OSError: .*Please reduce your request rate"):
        read(Latents(open_folder(flaky(at)), 0), 0, 8)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-512])
    else:
        data[1700] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "000006.tar: damaged: missing, though its manifest names it"),
        ("short", r"000006.tar: damaged: \d+ bytes, its manifest says \d+"),
        ("flipped", "000006.tar: damaged: its sha256 differs from the manifest's"),
    ],
)
def test_a_damaged_shard_stops_training_only_when_it_is_needed(at: Path, how: str, words: str) -> None:
    damage(at / "000006.tar", how)
    latents = Latents(open_folder(flaky(at)), 0)
    reached = next(p for p in range(sum(COUNTS)) if latents.order.locate(np.arange(p, p + 1)).shards[0] == 6)
    for position in range(reached):
        read(latents, position, position + 1)
    with pytest.raises(StorageError, match=words):
        read(latents, reached, reached + 1)


def test_a_file_on_a_local_path_is_hashed_once_by_each_process(at: Path) -> None:
    """As one in the cache: hashing takes longer than reading. What is cut or deleted later is still found."""
    latents, images = Latents(open_folder(at), 0), sum(COUNTS)
    epoch = [read(latents, first, first + 1) for first in range(images)]
    for path in at.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b'{"label": 1,', b'{"label": 7,'))
    again = [read(latents, first, first + 1) for first in range(images, 2 * images)]
    assert {int(label) for _, labels in again for label in labels} - {int(label) for _, labels in epoch for label in labels} == {7}
    for path in at.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(StorageError, match="damaged"):
        read(latents, 2 * images, 3 * images)
    for path in at.glob("*.tar"):
        path.unlink()
    with pytest.raises(StorageError, match="missing, though its manifest names it"):
        read(latents, 3 * images, 4 * images)


def test_a_set_that_the_cache_holds_is_kept_once_for_all_workers_of_a_node(at: Path, tmp_path: Path) -> None:
    """Mapped; what the cache may evict is copied."""
    for bound, copied in ((10**9, False), (10**5, True)):
        cache = Cache(tmp_path / f"cache-{bound}", bound, pytest.fail)
        latents = Latents(open_folder(flaky(at)), 0, cache=cache, keep_all=True)
        read(latents, 0, sum(COUNTS))
        moments = latents._buffer[0].moments
        while isinstance(moments.base, np.ndarray):
            moments = moments.base
        mapped = isinstance(getattr(moments.base, "obj", moments.base), mmap.mmap)
        assert mapped != copied


def test_a_failed_read_ahead_is_retried_when_needed() -> None:
    loaded, shard = list[int](), Shard(np.zeros(1), np.zeros(1))

    def load(index: int) -> Shard:
        loaded.append(index)
        if len(loaded) == 1:
            raise StorageError("away")
        return shard

    buffer = MemoryBuffer(load, keep_all=False)
    buffer.request([3])
    wait_until(lambda: buffer._loads[3].done())
    assert buffer[3] is shard
    assert loaded == [3, 3]


def test_at_most_a_few_shards_are_loaded_at_once() -> None:
    busy_now, most, gate = set[int](), list[int](), threading.Event()

    def load(index: int) -> Shard:
        busy_now.add(index)
        most.append(len(busy_now))
        gate.wait(0.02)
        busy_now.discard(index)
        return Shard(np.zeros(1), np.full(1, index))

    buffer = MemoryBuffer(load, keep_all=True)
    buffer.request(list(range(12)))
    assert [int(buffer[i].labels[0]) for i in range(12)] == list(range(12))
    assert max(most) <= 4


def test_the_choice_is_logged_with_its_reason(tiny: Recipe, at: Path) -> None:
    of_64_gib = partial(fits_in_memory, free_bytes=64 * 2**30)
    reason = "4 GiB, limit 4 GiB a worker (auto: half of the free memory by 4 workers and 2 models)"
    assert of_64_gib(Reader(), 4 * 2**30, 4, 2) == (True, f"latents kept in memory: {reason}")
    assert of_64_gib(Reader(), 4 * 2**30 + 1, 4, 2) == (False, f"latents read by blocks of 4 shards: {reason}")
    assert of_64_gib(Reader(memory_gib=0), 1, 1, 1)[1].endswith("limit 0 GiB a worker (reader.memory_gib)")
    data = tiny.data.model_copy(update={"num_classes": CLASSES})
    settings = Reader(memory_gib=0, cache_gib=1.5, cache_folder="/data/cache")
    small = tiny.model_copy(update={"reader": settings, "data": data})
    how, mixed = open_latents(open_folder(flaky(at)), small, 2, print)[1]
    assert how.endswith("; cache /data/cache, up to 1.5 GiB")
    assert mixed == "a batch of 128, 256, 1,024 has 100.0%, 100.0%, 100.0% of the distinct labels that independent draws would have"
    assert "cache" not in open_latents(open_folder(at), small, 2, print)[1][0]
    with pytest.raises(UserError, match=r"latents of 5 classes, data\.num_classes is 10: use another root"):
        open_latents(open_folder(at), tiny, 2, print)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is known on Linux only")
def test_free_memory_is_no_more_than_the_machine_has() -> None:
    total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < free_memory_bytes() < 1024 * total_kib


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is known on Linux only")
@pytest.mark.parametrize(
    ("below", "limit", "used", "stat"),
    [
        ("", "max", "current", "anon 20000\nfile 70000\ninactive_file 40000\nactive_file 20000\n"),
        ("memory", "limit_in_bytes", "usage_in_bytes", "active_file 5\ntotal_inactive_file 40000\ntotal_active_file 20000\n"),
    ],
    ids=["version 2", "version 1"],
)
def test_what_a_container_keeps_of_files_is_free(tmp_path: Path, below: str, limit: str, used: str, stat: str) -> None:
    """Otherwise a warm cache of shards would be taken for memory in use. Version 1 counts the groups within one apart."""
    (folder := tmp_path / below).mkdir(exist_ok=True)
    (folder / f"memory.{limit}").write_text("100000\n")
    (folder / f"memory.{used}").write_text("90000\n")
    (folder / "memory.stat").write_text(stat)
    assert free_memory_bytes(tmp_path) == 70_000


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is known on Linux only")
@pytest.mark.parametrize("version", [1, 2])
def test_the_least_limit_of_the_groups_around_a_job_holds(tmp_path: Path, version: int) -> None:
    """Slurm's and systemd's jobs have groups of their own, within others: half of a node's memory was taken in a job of 64 GiB."""
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    for path, limit in (("job_7/step_0", "max"), ("job_7", "9000"), ("", "80000")):
        (folder := tmp_path / ("memory" if version == 1 else "") / path).mkdir(parents=True, exist_ok=True)
        for name, text in zip((*(f"memory.{each}" for each in names), "memory.stat"), (limit, "2000", "file 1\n"), strict=True):
            (folder / name).write_text(text)
    lines = {1: "5:cpu,cpuacct:/other\n4:memory:/job_7/step_0\n", 2: "0::/job_7/step_0\n"}
    (own := tmp_path / "cgroup").write_text(lines[version])
    assert free_memory_bytes(tmp_path, own) == 7000


def test_a_load_that_fails_while_it_is_waited_for_is_repeated() -> None:
    """Only one that had failed before was: whether storage's hiccup ended an attempt was luck of timing."""
    asked, loads = threading.Event(), list[int]()

    def load(shard: int) -> Shard:
        loads.append(shard)
        if len(loads) == 1:
            asked.wait(10)
            raise StorageAway("503")
        return cast(Shard, "loaded")

    buffer = MemoryBuffer(load, keep_all=False)
    buffer.request([3])
    threading.Timer(0.2, asked.set).start()
    assert cast(str, buffer[3]) == "loaded"
    assert loads == [3, 3]


def test_a_wrong_key_stops_with_object_and_cause(bucket: str, no_pauses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    latents = Latents(make(open_folder(bucket), [3]), 0)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    words = rf"cannot read {bucket}/000000.tar: refused, but allowed \d+ s ago: .*; permission denied: check the key"
    with pytest.raises(StorageAway, match=words):
        read(latents, 0, 3)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def restartable(monkeypatch: pytest.MonkeyPatch) -> Iterator[object_store.ObjectStore]:
    """A store for this test, on disk. s3fs caches connections by arguments, which are equal for all stores."""
    import s3fs

    if object_store.missing():
        pytest.skip("Ceph's gateway is not installed")
    store = object_store.ObjectStore(on_disk=True).start()
    for key, value in store.environment.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield store
    s3fs.S3FileSystem.clear_instance_cache()
    store.stop()


def test_a_restarted_server_is_waited_for(
    restartable: object_store.ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dis_scale.storage.folder.PATIENT_TRIES", 11)  # on a busy machine its start takes over a minute
    at = make(open_folder(object_store.make_bucket(restartable, "restarted")), COUNTS)
    make(open_folder(tmp_path), COUNTS)
    expected = read(Latents(open_folder(tmp_path), 0), 0, sum(COUNTS))
    latents = Latents(at, 0)
    got = [read(latents, 0, 6)]
    restartable.kill()
    began = time.monotonic()

    def resume() -> None:
        time.sleep(1.0)
        restartable.resume()

    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(resume)
        for first in range(6, sum(COUNTS), 3):
            got.append(read(latents, first, first + 3))
            before_the_end = time.monotonic()
        back.result()
    assert before_the_end > began + 1.0, "the read-ahead was enough for the complete epoch"
    for column, wanted in zip(zip(*got, strict=True), expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(column), wanted)


def test_a_set_deleted_during_a_run_is_named(at: Path) -> None:
    latents = Latents(open_folder(at), 0)
    assert LatentsManifest.exists(open_folder(at))
    shutil.rmtree(at)
    with pytest.raises(StorageError, match="missing, though its manifest names it"):
        read(latents, 0, 1)
