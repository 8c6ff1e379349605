"""Metric rows over weeks: written beside training, merged at resume points, read once; and the goodput that needs none of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale.process.errors import StorageAway, StorageError
from dis_scale.storage.folder import open_folder
from dis_scale.sweep.documents import RunCost, RunState
from dis_scale.tracking import rows
from dis_scale.tracking.goodput import Goodput, as_branch
from dis_scale.tracking.rows import RowReader, RowWriter, compact
from tests.support import store_requests


def write(writer: RowWriter, images: range) -> None:
    """Write each row into a file of its own."""
    for seen in images:
        writer.add(seen, {"loss": 1.0 / seen, "lr": 0.1})
        writer.settle()


def losses(reader: RowReader) -> list[int]:
    return [row.images for row in reader.new() if row.name == "loss"]


def test_small_files_are_merged_and_a_reader_sees_each_row_once(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    writer, reader, seen = RowWriter(folder, 1), RowReader(folder), list[int]()
    for first in range(1, 100, 10):
        write(writer, range(first, first + 5))
        seen += losses(reader)
        write(writer, range(first + 5, first + 10))
        compact(folder)
        seen += losses(reader)
        assert len(folder.list()) == 1
    assert seen == losses(RowReader(folder)) == list(range(1, 101))


def test_files_of_a_segments_size_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SEGMENT_BYTES", 1000)
    folder, writer = open_folder(tmp_path), RowWriter(open_folder(tmp_path), 1)
    for first in range(1, 201, 20):
        write(writer, range(first, first + 20))
        compact(folder)
    sizes = folder.sizes()
    assert all(size <= 1000 for size in sizes.values())
    assert sum(sizes.values()) / len(sizes) > 800
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in sorted(sizes)[:-1]}
    write(writer, range(201, 221))
    compact(folder)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("verb", ["read", "write", "delete"])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_merge_that_is_cut_off_loses_nothing_and_is_made_up_for(verb: str, nth: int, tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for attempt, images in ((1, range(1, 10)), (2, range(6, 15))):
        write(RowWriter(folder, attempt), images)
    calls = 0

    def fail(at: str, _: str) -> None:
        nonlocal calls
        calls += at == verb
        if at == verb and calls >= nth:
            raise ValueError("cut off")

    if verb != "write" or nth == 1:
        with store_requests.before_each(fail), pytest.raises(StorageError, match="cut off"):
            compact(folder)
    assert losses(RowReader(folder)) == list(range(1, 15))
    compact(folder)
    assert folder.list() == ["0001-000000-000008.jsonl", "0002-000000-000008.jsonl"]
    assert losses(RowReader(folder)) == list(range(1, 15))


def test_a_file_that_is_merged_while_it_is_read_is_found_again(tmp_path: Path) -> None:
    folder, other = open_folder(tmp_path), open_folder(tmp_path)
    write(RowWriter(folder, 1), range(1, 6))
    reader, merged = RowReader(folder), False

    def merge(verb: str, path: str) -> None:
        nonlocal merged
        if verb == "read" and "000003" in path and not merged:
            merged = True
            compact(other)

    with store_requests.before_each(merge):
        assert losses(reader) == [1, 2, 3, 4, 5]
    assert merged


def test_rows_wait_while_storage_is_away(tmp_path: Path, no_pauses: None) -> None:
    """Training continues; only what must be stored, before a resume point, is waited for."""
    writer = RowWriter(open_folder(tmp_path), 1)
    with store_requests.failing(ConnectionError("away")):
        for images in range(1, 6):
            writer.add(images, {"loss": 1.0})
            writer.flush()
        with pytest.raises(StorageAway, match="away"):
            writer.settle()
    writer.add(6, {"loss": 1.0})
    writer.settle()
    assert losses(RowReader(open_folder(tmp_path))) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data[:-30], [1, 2, 4]),
        (lambda _: b"\x00" * 64, [1, 4]),
        (lambda data: data.replace(b'"images"', b'"imager"', 1), [1, 3, 4]),
        (lambda _: b'null\n["loss"]\n', [1, 4]),
    ],
    ids=["cut off", "zeros", "a flipped byte", "other JSON"],
)
def test_damaged_rows_are_named_and_left_out(
    damage: Callable[[bytes], bytes], left: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, writer = open_folder(tmp_path), RowWriter(open_folder(tmp_path), 1)
    write(writer, range(1, 2))
    for seen in (2, 3):
        writer.add(seen, {"loss": 1.0 / seen, "lr": 0.1})
    writer.settle()
    write(writer, range(4, 5))
    name = "0001-000001.jsonl"
    folder.write(name, damage(folder.read(name)))
    reader = RowReader(folder)
    assert losses(reader) == left
    assert f"{folder}/{name}: damaged: " in caplog.text
    assert reader.new() == []
    compact(folder)
    assert losses(RowReader(folder)) == left
    assert rows.newest(folder)["loss"].images == 4


def test_goodput_counts_steps_that_no_later_attempt_repeats() -> None:
    """Attempt 1 is requested at 0 s, steps from 2 s to 10 s, saves at 6 s and is lost; attempt 2 steps from 20 s to 26 s."""
    first = Goodput.begin(None, 1000.0, 1002.0)
    saved = first.spent(1006.0)
    assert first.share(1006.0) == pytest.approx(4 / 6)
    second = Goodput.begin(saved, 1010.0, 1020.0)
    assert second.share(1020.0) == pytest.approx(4 / 20)
    assert second.share(1026.0) == pytest.approx((4 + 6) / 26)
    third = Goodput.begin(second.spent(1026.0), 1026.0, 1030.0)
    assert third.share(1032.0) == pytest.approx((4 + 6 + 2) / 32)
    assert Goodput.begin(saved, 890.0, 900.0).share(800.0) in (0.0, 1.0), "a clock that was set back"


def test_worker_hours_are_those_of_lasting_steps_on_each_attempts_workers() -> None:
    """As above, on eight workers and then on four; then a branch leaves, on two."""
    saved = Goodput.begin(None, 1000.0, 1000.0, workers=8).spent(1006.0)
    end = Goodput.begin(saved, 1010.0, 1020.0, workers=4)
    assert end.worker_hours(1026.0) == pytest.approx((8 * 6 + 4 * 6) / 3600)
    trunk = RunState(model="a", latents="", adam_step=1, at=1026.0, cost=RunCost(goodput=0.5), spent=end.spent(1026.0))
    branch = Goodput.begin(as_branch(trunk, 2000.0).spent, 2000.0, 2000.0, workers=2)
    assert branch.worker_hours(2010.0) == pytest.approx((8 * 6 + 4 * 6 + 2 * 10) / 3600)
    assert branch.share(2010.0) == 1.0, "the trunk's time is not the branch's"
