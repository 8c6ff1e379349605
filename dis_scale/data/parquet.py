"""Parquet files with image bytes, as Hugging Face writes them; read by row group. The door to pyarrow.

The images are a column of bytes, or of structs with a field `bytes`; the classes integers (with names in the schema's
`huggingface` metadata where that is there) or names.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from dis_scale.data.listing import Entry, Found
from dis_scale.errors import StorageError, UserError
from dis_scale.recipe import ParquetSource
from dis_scale.storage.folder import Folder


def find(root: Folder, names: list[str], settings: ParquetSource) -> Found:
    """Every row of the files, in the order of their names; the label column alone is read."""
    return Found(
        (entry for name in names for entry in _entries(root, name, settings)), _class_names(root, names, settings)
    )


class Rows:
    """Reads images by (row group, row); the last row groups are kept, so that a walk reads each once."""

    def __init__(self, root: Folder, settings: ParquetSource) -> None:
        self._root, self._settings, self._one_at_a_time = root, settings, threading.Lock()
        self._group = lru_cache(2)(self._read_group)

    def read(self, entries: Sequence[Entry]) -> list[bytes]:
        """The images' bytes; all entries lie in one row group. Those of a null are empty."""
        with self._one_at_a_time:
            column = self._group(entries[0].file, entries[0].place[0])
        return [column[entry.place[1]].as_py() or b"" for entry in entries]

    def _read_group(self, name: str, group: int) -> pa.ChunkedArray:
        with _opened(self._root, name) as file:
            leaf = self._settings.image if _is_bytes(file, self._settings) else f"{self._settings.image}.bytes"
            return _read(file, group, leaf, f"{self._root}/{name}").flatten().column(0)


def near(first: Entry, entry: Entry) -> bool:
    """Whether `entry` is read in one go with `first`, which stands before it."""
    return (first.file, first.place[0]) == (entry.file, entry.place[0])


def _entries(root: Folder, name: str, settings: ParquetSource) -> Iterator[Entry]:
    with _opened(root, name) as file:
        where = f"{root}/{name}"
        _require_columns(file, where, settings)
        row = 0
        for group in range(file.num_row_groups):
            labels = _read(file, group, settings.label, where).column(0).to_pylist()
            for i, label in enumerate(labels):
                if not isinstance(label, int | str):
                    raise UserError(f"{where}: row {row + i}: label {label!r}, expected a number or a name")
                yield Entry(f"{name}#{row + i}", label, name, (group, i))
            row += len(labels)


def _class_names(root: Folder, names: list[str], settings: ParquetSource) -> list[str] | None:
    """The ClassLabel's names of Hugging Face's schema, where it has them."""
    with _opened(root, names[0]) as file:
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(settings.label, {})
    return list(feature["names"]) if feature.get("_type") == "ClassLabel" and "names" in feature else None


def _require_columns(file: pq.ParquetFile, where: str, settings: ParquetSource) -> None:
    schema = file.schema_arrow
    for key, column in (("image", settings.image), ("label", settings.label)):
        if column not in schema.names:
            raise UserError(f"data.source.{key}: no column {column!r} in {where}; it has {', '.join(schema.names)}")
    if not _is_bytes(file, settings) and not _has_bytes(schema.field(settings.image).type):
        kind = schema.field(settings.image).type
        raise UserError(f"data.source.image: column {settings.image!r} of {where} is {kind}, expected bytes of images")


def _is_bytes(file: pq.ParquetFile, settings: ParquetSource) -> bool:
    kind = file.schema_arrow.field(settings.image).type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _read(file: pq.ParquetFile, group: int, column: str, where: str) -> pa.Table:
    """A column of a row group; StorageError where its pages are damaged."""
    try:
        return file.read_row_group(group, columns=[column])
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{where}: row group {group} is damaged: {' '.join(str(error).split())}") from error


def _opened(root: Folder, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(root.open(name), pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise StorageError(f"{root}/{name}: not a whole Parquet file: {' '.join(str(error).split())}") from error
