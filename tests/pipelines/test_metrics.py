"""Metrics: what is counted where, and which rows set which gauge. That Ray exports them: tests/e2e/test_lost_workers.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale.data.cache import Cache
from dis_scale.process import counts
from dis_scale.process.errors import StorageAway
from dis_scale.recipe import Recipe
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from dis_scale.storage.manifest import Digest
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.tracking.rows import Row, RowReader, RowWriter
from pipelines import evaluate, metrics
from tests.support.alone import in_its_own_process
from tests.support.documents import put_metrics, put_published


def counted(name: str, before: dict[str, float]) -> float:
    return counts.totals()[name] - before[name]


@in_its_own_process
def test_retries_and_the_time_away_are_counted(tmp_path: Path, inject: Callable[[str], None]) -> None:
    """In its own process: a thread of a test with a simulated clock may end its wait meanwhile, weeks before it began."""
    inject("fail at write times=5")
    before = counts.totals()
    with pytest.raises(StorageAway):
        open_folder(tmp_path).write("x", b"")
    assert counted(counts.STORAGE_RETRIES, before) == 4
    assert counted(counts.STORAGE_AWAY_S, before) > 0.2 * 15 * 0.5


def test_hits_and_misses_of_the_cache_are_counted(tmp_path: Path) -> None:
    before, cache = counts.totals(), Cache(tmp_path, 2**20, print)
    entry = Digest.of(b"shard")
    for _ in range(3):
        assert bytes(cache.get(entry, lambda: b"shard")) == b"shard"
    assert (counted(counts.CACHE_MISSES, before), counted(counts.CACHE_HITS, before)) == (1, 2)


def test_a_lease_that_was_not_ended_is_counted_as_taken_over(tmp_path: Path) -> None:
    folder, before = open_folder(tmp_path), counts.totals()
    for _ in range(2):
        with lease.hold(folder):
            pass
    assert counted(counts.TAKEOVERS, before) == 0
    folder.delete("0002.end")
    lease.Holder.read(folder, "0002").changed(pid=2**22 + 1).write(folder, "0002")  # a process that has ended
    with lease.hold(folder):
        pass
    assert counted(counts.TAKEOVERS, before) == 1


def test_rows_of_an_earlier_driver_set_no_gauge(tiny: Recipe) -> None:
    shown: dict[str, float] = {}
    rows = [Row("loss", 0.5, 160, 90.0), Row("images_per_s", 32.0, 320, 110.0), Row("goodput", 0.9, 320, 110.0)]
    metrics.show_rows(rows, tiny.train, 100.0, shown.__setitem__)
    assert shown == {
        "images_seen": 320, "row_timestamp_seconds": 110.0, "images_per_second": 32.0, "step_seconds": 0.5,
        "resume_interval_seconds": 2.5,
    }  # fmt: skip


def test_steps_that_are_repeated_after_a_restart_set_the_gauges(tmp_path: Path, tiny: Recipe) -> None:
    """MLflow gets each row once; an operator sees what the run does now."""
    shown: dict[str, float] = {}
    for attempt, losses in ((1, {0: 9.0, 160: 5.0, 320: 4.0}), (2, {0: 9.0, 160: 6.0})):
        writer = RowWriter(open_folder(tmp_path), attempt)
        for images, loss in losses.items():
            writer.add(images, {"loss": loss} | ({"attempt": attempt} if images == 0 else {}))
        writer.close()
    reader = RowReader(open_folder(tmp_path))
    assert [row.value for row in reader.new() if row.name == "loss"] == [9.0, 5.0, 4.0]
    metrics.show_rows(reader.newest.values(), tiny.train, 0.0, shown.__setitem__)
    assert (shown["attempts"], shown["loss"], shown["images_seen"]) == (2, 6.0, 160)


def test_the_backlog_counts_what_is_published_and_not_evaluated(tmp_path: Path, tiny: Recipe) -> None:
    shown: dict[str, float] = {}
    sweep = Sweep(open_folder(tmp_path), tiny)
    for images in (0, 160):
        put_published(sweep.run("dit").published_at(images))
    put_metrics(sweep.evaluation(Sampled("dit", 0)))
    for _ in range(state.MOST_NODE_FAILURES):
        state.record_node_failure(sweep.failed_nodes("evaluate"), "node", "CUDA error: unknown error")
    evaluate.show_backlog(state.Backlog(sweep), (), shown.__setitem__)
    assert shown == {"evaluation_backlog": 3, "failed_nodes": 1}, "two checkpoints under two settings, less one"
    evaluate.show_backlog(state.Backlog(sweep), {Sampled("dit", 160)}, shown.__setitem__)
    assert shown["evaluation_backlog"] == 2, "what is skipped is not due: for hours the loop, which waits, says the same"
