"""Metric rows over weeks: written beside training, read once; and the goodput that needs none of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale.process.errors import StorageAway
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep.documents import RunCost, RunState
from dis_scale.tracking import rows
from dis_scale.tracking.goodput import Goodput, as_branch
from dis_scale.tracking.rows import RowReader, RowWriter
from tests.support import store_requests


def write(writer: RowWriter, images: range) -> None:
    """Write each row by itself."""
    for seen in images:
        writer.add(seen, {"loss": 1.0 / seen, "lr": 0.1})
        writer.settle()


def losses(reader: RowReader) -> list[int]:
    return [row.images for row in reader.new() if row.name == "loss"]


def test_files_grow_to_a_segment_and_a_reader_takes_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three weeks have as many files as segments; a later attempt repeats rows, of which the first count."""
    monkeypatch.setattr(rows, "SEGMENT_BYTES", 1000)
    seen, read = list[int](), list[int]()

    class Counting(Folder):
        def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            read.append(len(data := super().read(path, start, end)))
            return data

    folder, reader = open_folder(tmp_path), RowReader(Counting(str(tmp_path)))
    for attempt, images in ((1, range(1, 61)), (2, range(50, 101))):
        writer = RowWriter(folder, attempt)
        for first in images[::10]:
            before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
            write(writer, range(first, min(first + 10, images.stop)))
            seen += losses(reader)
            assert [path for path, at in before.items() if path.stat().st_mtime_ns != at] in ([], [newest(before, attempt)])
        writer.close()
    sizes = folder.sizes()
    full = [sizes[name] for name in folder.list() if name not in ends(folder)]
    assert len(full) >= 4
    assert all(1000 <= size < 1100 for size in full)
    assert sum(read) == sum(sizes.values())
    assert seen == losses(RowReader(folder)) == list(range(1, 101))


def newest(files: dict[Path, int], attempt: int) -> Path | None:
    return max((path for path in files if path.name.startswith(f"{attempt:04d}-")), default=None)


def ends(folder: Folder) -> set[str]:
    """The last file of each attempt."""
    return set({name[:4]: name for name in folder.list()}.values())


def test_files_that_were_merged_once_are_read(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    write(RowWriter(folder, 1), range(1, 4))
    write(RowWriter(folder, 2), range(4, 6))
    folder.write("0001-000000-000007.jsonl", folder.read("0001-000000.jsonl"))
    assert losses(RowReader(folder)) == [1, 2, 3, 4, 5]
    folder.delete("0001-000000.jsonl")
    assert losses(RowReader(folder)) == [1, 2, 3, 4, 5]


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
    folder, name = open_folder(tmp_path), "0002-000000.jsonl"
    for attempt, images in ((1, range(1, 2)), (2, range(2, 4)), (3, range(4, 5))):
        write(RowWriter(folder, attempt), images)
    folder.write(name, damage(folder.read(name)))
    reader = RowReader(folder)
    assert losses(reader) == left
    assert f"{folder}/{name}: damaged: " in caplog.text
    assert reader.new() == []
    assert rows.newest(folder)["loss"].images == 4


def test_goodput_counts_steps_that_no_later_attempt_repeats() -> None:
    """Attempt 1 is requested at 0 s, steps from 2 s to 10 s, saves at 6 s and is lost; attempt 2 steps from 20 s to 26 s."""
    first = Goodput.begin(None, 1000.0, 1002.0)
    saved = first.spent(4.0)
    assert first.share(4.0) == pytest.approx(4 / 6)
    second = Goodput.begin(saved, 1010.0, 1020.0)
    assert second.share(0.0) == pytest.approx(4 / 20)
    assert second.share(6.0) == pytest.approx((4 + 6) / 26)
    third = Goodput.begin(second.spent(6.0), 1026.0, 1030.0)
    assert third.share(2.0) == pytest.approx((4 + 6 + 2) / 32)
    assert Goodput.begin(saved, 890.0, 900.0).share(1.0) == 1.0, "a clock that was set back between attempts"


def test_worker_hours_are_those_of_lasting_steps_on_each_attempts_workers() -> None:
    """As above, on eight workers and then on four; then a branch leaves, on two."""
    saved = Goodput.begin(None, 1000.0, 1000.0, workers=8).spent(6.0)
    end = Goodput.begin(saved, 1010.0, 1020.0, workers=4)
    assert end.worker_hours(6.0) == pytest.approx((8 * 6 + 4 * 6) / 3600)
    trunk = RunState(model="a", latents="", adam_step=1, at=1026.0, cost=RunCost(goodput=0.5), spent=end.spent(6.0))
    branch = Goodput.begin(as_branch(trunk, 2000.0).spent, 2000.0, 2000.0, workers=2)
    assert branch.worker_hours(10.0) == pytest.approx((8 * 6 + 4 * 6 + 2 * 10) / 3600)
    assert branch.share(10.0) == 1.0, "the trunk's time is not the branch's"
