"""Row groups of Parquet: each is loaded once however many threads read it, and one of over 2 GiB is read."""

import io
import os
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dis_scale.data.parquet import ParquetReader
from dis_scale.data.sources import open_source
from dis_scale.process.errors import UserError
from dis_scale.process.threads import in_order
from dis_scale.recipe import Data, ParquetSource
from dis_scale.storage.folder import open_folder
from tests.support.labelled_images import parquet, png

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def data_at(root: Path) -> Data:
    return Data(source=ParquetSource(kind="parquet", url=str(root)), resolution=8, num_classes=2)


@pytest.mark.parametrize("rows", [17, 24, 48, 100])
def test_sixteen_threads_load_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A reader that keeps two groups, and lets one thread in at a time, loaded up to 43 % again.

    One thread in seven is late, as on a busy machine.
    """
    open_folder(tmp_path).write("x.parquet", parquet([(png(i % 9), i % 2) for i in range(960)], group=rows))
    loads, read_group = Counter[int](), ParquetReader._read_group

    def load(reader: ParquetReader, root: object, first: object) -> object:
        loads[first.location[0]] += 1  # type: ignore[attr-defined]
        time.sleep(0.002)
        return read_group(reader, root, first)  # type: ignore[arg-type]

    monkeypatch.setattr(ParquetReader, "_read_group", load)
    source = open_source(data_at(tmp_path))

    def decoded(item: tuple[int, range]) -> int:
        time.sleep(0.03 if item[0] % 7 == 3 else 0)
        return len(source.decoded(item[1], 8))

    assert sum(in_order(enumerate(source.read_ranges(range(960), 16)), decoded, 16)) == 960
    assert loads == Counter(range(-(-960 // rows)))


@pytest.mark.parametrize("kind", [pa.list_(pa.uint8()), pa.string()], ids=str)
def test_structs_of_other_things_than_bytes_are_refused(tmp_path: Path, kind: pa.DataType) -> None:
    images = pa.array([{"bytes": [] if pa.types.is_list(kind) else ""}], pa.struct({"bytes": kind}))
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"data.source.image: column 'image' of .* is struct<bytes: .*, expected bytes of images"):
        open_source(data_at(tmp_path))


def test_columns_of_views_are_read(tmp_path: Path) -> None:
    """As newer programs write them."""
    table = pa.table({"image": pa.array([png(0), png(1)], pa.binary_view()), "label": [0, 1]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(data_at(tmp_path))
    assert source.read(source.listing[:2]) == [png(0), png(1)]


@pytest.mark.slow
def test_structs_of_over_two_gibibytes_in_a_row_group_are_read(tmp_path: Path) -> None:
    """Arrow splits the column, and then says of structs that they are not implemented: they were called damaged."""
    large, rows = os.urandom(2**20), 2100
    parts = [pa.table({"image": pa.array([{"bytes": large, "path": ""}] * 100, STRUCT), "label": [0] * 100})] * (rows // 100)
    with pq.ParquetWriter(tmp_path / "x.parquet", parts[0].schema, use_dictionary=False, compression="none") as writer:
        writer.write_table(pa.concat_tables(parts), row_group_size=rows)
    assert pq.ParquetFile(io.BytesIO((tmp_path / "x.parquet").read_bytes())).num_row_groups == 1
    source = open_source(data_at(tmp_path))
    assert source.read(source.listing[rows - 1 : rows]) == [large]
