"""Parquet files with image bytes, as Hugging Face writes them; read by row group. The door to pyarrow.

Images are a column of bytes, or of structs with a field `bytes`. Classes are names or integers; the names of integers come from
the schema's `huggingface` metadata, if any.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from dis_scale.data.listing import Contents, Entry, number_or_name, of_files
from dis_scale.process.errors import Damaged, StorageError, UserError, nearest, printable
from dis_scale.process.progress import some
from dis_scale.recipe import ParquetSource
from dis_scale.storage.folder import Folder

LARGE_BYTES = 2**30
"""A larger file is listed on its own, since it may have a million rows. Hugging Face's files have half of this size."""
BATCH_ROWS, BATCH_BYTES = 4096, 2**28
"""Most rows that are decoded at a time, and most of their bytes if all rows have the same size."""
GROUP_BYTES = 8 * 2**30
"""Most bytes of a row group's column; larger ones are not read. Hugging Face's groups of images have 100 MB to 1 GB."""
KEPT_GROUPS, KEPT_BYTES, LOADED_AT_ONCE = 64, 2**30, 2
"""Most row groups that a reader keeps, most bytes of them if they are more than two, and most groups that it loads at a time."""


def find(root: Folder, names: list[str], settings: ParquetSource, *, labelled: bool = True) -> Contents:
    """List every row of the files, sorted by file name. Reads the label column only; for unlabelled images, no column.

    Several files are listed at once, since each row group's labels are a request; the rows of a large one are streamed.
    """
    with _opened(root, names[0]) as first:
        classes = _class_names(first, settings) if labelled else None
    entries = of_files(root, names, lambda name: _entries(root, name, settings, classes, labelled=labelled), LARGE_BYTES)
    return Contents(entries, classes)


class _Group:
    """A row group's images once they are read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.column: pa.ChunkedArray | None = None

    def nbytes(self) -> int:
        """Return the bytes of the images in memory: 0 before they are read."""
        return 0 if self.column is None else self.column.nbytes


class ParquetReader:
    """Reads images by (row group, row). Each row group is read once if many threads read the groups in order.

    Keeps the groups that were requested last; a thread that waits for another group keeps it itself. Two groups are not enough if
    groups are small: a thread that begins late requests one that others have passed long ago.
    """

    def __init__(self, settings: ParquetSource, require_unchanged: Callable[[Entry], None]) -> None:
        self._settings, self._require_unchanged = settings, require_unchanged
        self._groups, self._asking = dict[tuple[Folder, Entry], _Group](), threading.Lock()
        self._loading = threading.BoundedSemaphore(LOADED_AT_ONCE)

    def read(self, root: Folder, entries: Sequence[Entry]) -> list[bytes]:
        """Return the images' bytes, empty for a null; all entries are in one row group."""
        first = entries[0]._replace(name="", label=0, location=(entries[0].location[0], 0))
        with self._asking:
            group = self._groups[root, first] = self._groups.pop((root, first), _Group())
            while len(self._groups) > 2 and (
                len(self._groups) > KEPT_GROUPS or sum(map(_Group.nbytes, self._groups.values())) > KEPT_BYTES
            ):
                del self._groups[next(iter(self._groups))]
        with group.lock:
            if group.column is None:
                with self._loading:
                    group.column = self._read_group(root, first)
        return [group.column[entry.location[1]].as_py() or b"" for entry in entries]

    def _read_group(self, root: Folder, first: Entry) -> pa.ChunkedArray:
        try:
            with _opened(root, first.file) as file:
                leaf, where = _leaf(file, self._settings), printable(f"{root}/{first.file}")
                return _read(file, first.location[0], leaf, where).flatten().column(0)
        finally:  # not before: the file may be written again while it is read
            self._require_unchanged(first)


def near(first: Entry, entry: Entry) -> bool:
    """Return whether one read returns both `first` and `entry`, which comes after it."""
    return (first.file, first.location[0]) == (entry.file, entry.location[0])


def _entries(root: Folder, name: str, settings: ParquetSource, classes: list[str] | None, *, labelled: bool) -> Iterator[Entry]:
    """Yield a file's rows. UserError if its integers mean other classes than those of the first file."""
    with _opened(root, name) as file:
        where = printable(f"{root}/{name}")
        _require_columns(file, where, settings, labelled=labelled)
        if labelled and (own := _class_names(file, settings)) != classes:
            raise UserError(
                f"{where}: its classes are {some(own or ['without names'])}, those of the first file "
                f"{some(classes or ['without names'])}: the same number would mean two classes; write the files alike"
            )
        row = 0
        for group in range(file.num_row_groups):
            if labelled:
                labels = _listed(_read(file, group, settings.label, where), f"{where}: row group {group}")
            else:
                labels = [0] * file.metadata.row_group(group).num_rows
            for i, label in enumerate(labels):
                if not isinstance(label, int | str):
                    raise UserError(f"{where}: row {row + i}: label {label!r:.99}, expected a number or a name")
                kind = number_or_name(label) if isinstance(label, str) else label
                yield Entry(f"{name}#{row + i}", kind, name, (group, i))
            row += len(labels)


def _listed(labels: pa.Table, where: str) -> list[Any]:
    """Return the values of the only column; StorageError if one is not what its type says, such as text that is not UTF-8."""
    try:
        return list(labels.column(0).to_pylist())
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise StorageError(f"{where}: a label cannot be read: {error}") from error


def _class_names(file: pq.ParquetFile, settings: ParquetSource) -> list[str] | None:
    """Return the ClassLabel's names in Hugging Face's schema, or None."""
    try:
        feature = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"][settings.label]
        return TypeAdapter(list[str]).validate_python(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):  # no such metadata, or another program's
        return None


def _require_columns(file: pq.ParquetFile, where: str, settings: ParquetSource, *, labelled: bool) -> None:
    schema = file.schema_arrow
    columns = {"image": settings.image} | ({"label": settings.label} if labelled else {})
    for key, column in columns.items():
        if schema.names.count(column) > 1:
            raise UserError(f"data.source.{key}: {where} has two columns {column!r}: write it again with one of them")
        if column not in schema.names:
            near = nearest(column, schema.names)
            raise UserError(f"data.source.{key}: no column {column!r}{near} in {where}; it has {some(schema.names)}")
    kind = schema.field(settings.image).type
    inside = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None
    if not (_has_bytes(kind) or (inside is not None and (_has_bytes(inside) or pa.types.is_null(inside)))):
        raise UserError(f"data.source.image: column {settings.image!r} of {where} is {kind}, expected bytes of images")
    if _is_null(file, _leaf(file, settings)):
        raise UserError(
            f"data.source.image: column {settings.image!r} of {where} has no bytes, only paths: write the file again with "
            "its images in it (`Dataset.to_parquet` of datasets does so)"
        )


def _has_bytes(kind: pa.DataType) -> bool:
    return any(known(kind) for known in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _leaf(file: pq.ParquetFile, settings: ParquetSource) -> str:
    """Return the path of the column of bytes."""
    in_structs = pa.types.is_struct(file.schema_arrow.field(settings.image).type)
    return f"{settings.image}.bytes" if in_structs else settings.image


def _is_null(file: pq.ParquetFile, column: str) -> bool:
    """Return whether a column has nulls only, as far as the statistics of its row groups tell."""

    def has_nulls_only(number: int) -> bool:
        group = file.metadata.row_group(number)
        chunks = (group.column(i) for i in range(group.num_columns))
        known = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column and chunk.statistics]
        return any(each.has_null_count and each.null_count == group.num_rows for each in known)

    return file.metadata.num_rows > 0 and all(map(has_nulls_only, range(file.num_row_groups)))


def _read(file: pq.ParquetFile, group: int, column: str, where: str) -> pa.Table:
    """Read a column of a row group; StorageError if its pages are damaged, UserError if they would not fit into memory."""
    group_facts = file.metadata.row_group(group)
    chunks = (group_facts.column(i) for i in range(group_facts.num_columns))
    size = sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}."))
    if size > GROUP_BYTES:
        raise UserError(
            f"{where}: row group {group} has {size:,} bytes in column {column!r}, and {GROUP_BYTES:,} are read at most: "
            "write smaller row groups"
        )
    # In batches: Arrow splits a column of over 2 GiB, and then reads no structs.
    rows = min(BATCH_ROWS, max(1, BATCH_BYTES * group_facts.num_rows // max(size, 1)))
    try:
        batches = list(file.iter_batches(rows, row_groups=[group], columns=[column]))
        return pa.Table.from_batches(batches) if batches else file.read_row_group(group, columns=[column])
    except FileNotFoundError:
        raise
    except pa.ArrowNotImplementedError as error:
        raise UserError(f"{where}: row group {group} cannot be read: {error}: write smaller row groups") from error
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"{where}: row group {group}", " ".join(str(error).split())) from error


def _opened(root: Folder, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(root.open(name), pre_buffer=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{printable(f'{root}/{name}')}: not a complete Parquet file: {' '.join(str(error).split())}") from error
