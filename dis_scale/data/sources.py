"""Labelled images of any kind in one order that the source's content fixes, each opened by its position.

A source is a listing (listing.py) and a way to read what it names. Images become arrays in images.py; tars and Parquet have files
of their own. Not for latents: those are shards.py and latents.py.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image

from dis_scale.data import images, listing, parquet, tars
from dis_scale.data.listing import Column, Entry, Found, Listing, Report, number_or_name
from dis_scale.errors import StorageError, UndecodableImage, UserError
from dis_scale.recipe import CsvSource, Data, DigitsSource, FolderSource, ParquetSource, TarSource
from dis_scale.storage.folder import Folder, open_folder


@dataclass(frozen=True)
class Source:
    """Labelled images; position i of the dataset is `names[i]`, of class `labels[i]`."""

    listing: Listing
    label_names: list[str]
    read: Callable[[Sequence[Entry]], list[bytes]]
    """The bytes of entries that are `near` each other."""
    near: Callable[[Entry, Entry], bool]
    """Whether the second entry is read in one go with the first, which stands before it."""

    def __len__(self) -> int:
        return len(self.listing)

    @cached_property
    def names(self) -> Sequence[str]:
        return Column(self.listing, lambda entry: entry.name)

    @cached_property
    def labels(self) -> Sequence[int]:
        return Column(self.listing, lambda entry: int(entry.label))

    def pixels(self, i: int, resolution: int) -> np.ndarray:
        """Image i as uint8 (resolution, resolution, 3).

        UndecodableImage names one that is no image; storage that is away is another StorageError, never a broken image.
        """
        (image,) = self.decoded(range(i, i + 1), resolution)
        if isinstance(image, UndecodableImage):
            raise image
        return image

    def decoded(self, positions: range, resolution: int) -> list[np.ndarray | UndecodableImage]:
        """The images of one of `stretches`, read in one go; in the place of one that is no image, the error that names it."""
        entries = self.listing[positions.start : positions.stop]
        try:
            found = self.read(entries)
        except FileNotFoundError as error:
            raise _gone(entries[0].file) from error
        return [_decoded(data, entry.name, resolution) for data, entry in zip(found, entries, strict=True)]

    def stretches(self, positions: range, most: int) -> Iterator[range]:
        """The positions cut where one read ends and the next begins, and after `most` images."""
        first = positions.start
        for i in positions:
            if i - first == most or not self.near(self.listing[first], self.listing[i]):
                yield range(first, i)
                first = i
        if first < positions.stop:
            yield range(first, positions.stop)


def open_source(data: Data, store: Folder | None = None, report: Report = lambda _: None) -> Source:
    """The recipe's source, by the listing kept in `store`, which is made where there is none.

    `report` gets the number of images listed so far. UserError where the source is missing, empty or has other classes than the
    recipe says. Without a store it is listed anew.
    """
    kind = _open_kind(data.source)

    def find() -> Found:
        found = kind.find()
        return found._replace(entries=_at_least_one(found.entries, kind.missing))

    def check(found: Listing) -> None:
        _label_names(found, data, kind.where)

    if store is None:
        found = listing.in_memory(find(), report, kind.where)
    else:
        found = listing.stored(store, data.source.model_dump(mode="json"), find, check, report)
    return Source(found, _label_names(found, data, kind.where), kind.read, kind.near)


@dataclass(frozen=True)
class _Kind:
    """How a kind of source is listed and read, and what to say where it holds nothing."""

    where: str
    find: Callable[[], Found]
    read: Callable[[Sequence[Entry]], list[bytes]]
    near: Callable[[Entry, Entry], bool]
    missing: str


def _open_kind(settings: DigitsSource | FolderSource | TarSource | ParquetSource | CsvSource) -> _Kind:
    match settings:
        case DigitsSource():
            return _Kind("scikit-learn's digits", _find_digits, _each(_read_digit), _anywhere, "")
        case FolderSource(url=url):
            root = open_folder(url)
            missing = f"no images in class folders below {root}; expected {root}/<class>/<image>.png"
            return _Kind(
                root.url, lambda: _find_class_folders(root), _each(lambda e: root.read(e.name)), _anywhere, missing
            )
        case CsvSource(url=url):
            file = open_folder(url)
            root = Folder(file.url.rpartition("/")[0])
            read = _each(lambda e: _read_anywhere(root, e.name))
            return _Kind(
                file.url, lambda: Found(_csv_entries(root, file.name, settings)), read, _anywhere, f"no lines in {file}"
            )
        case TarSource(url=url):
            root, names = tars.files_of(open_folder(url), settings.files, ".tar")
            missing = f"no images ({', '.join(images.SUFFIXES)}) in the tars of {root}"
            return _Kind(
                root.url, lambda: tars.find(root, names, settings), lambda e: tars.read(root, e), tars.near, missing
            )
        case ParquetSource(url=url):
            root, names = tars.files_of(open_folder(url), settings.files, ".parquet")
            rows = parquet.Rows(root, settings)
            find = lambda: parquet.find(root, names, settings)  # noqa: E731
            return _Kind(root.url, find, rows.read, parquet.near, f"no rows in the Parquet files of {root}")


def _decoded(data: bytes, name: str, resolution: int) -> np.ndarray | UndecodableImage:
    try:
        return images.decode(data, name, resolution)
    except UndecodableImage as error:
        return error


def _label_names(found: Listing, data: Data, where: str) -> list[str]:
    """The classes' names, numbers where they have none; UserError where they are not as many as the recipe says."""
    names, largest = found.facts["label_names"], found.facts["largest"]
    if names is None and largest >= data.num_classes:
        raise UserError(f"data.num_classes: got {data.num_classes}, but {where} has labels up to {largest}")
    if names is not None and len(names) != data.num_classes:
        shown = ", ".join(names[:5])
        raise UserError(
            f"data.num_classes: got {data.num_classes}, but the source has {len(names)} classes ({shown}, ...)"
        )
    return names or [str(i) for i in range(data.num_classes)]


def _at_least_one(entries: Iterable[Entry], missing: str) -> Iterator[Entry]:
    iterator = iter(entries)
    first = next(iterator, None)
    if first is None:
        raise UserError(f"data.source.url: {missing}")
    yield first
    yield from iterator


def _each(read: Callable[[Entry], bytes]) -> Callable[[Sequence[Entry]], list[bytes]]:
    """Reads entries one by one, each from an object of its own."""

    def read_one(entry: Entry) -> bytes:
        try:
            return read(entry)
        except FileNotFoundError as error:
            raise _gone(f"image {entry.name}") from error

    return lambda entries: [read_one(entry) for entry in entries]


def _anywhere(_: Entry, __: Entry) -> bool:
    return True


def _gone(what: str) -> StorageError:
    return StorageError(
        f"{what} is gone: it was there when the source was listed; "
        "bring it back, or give another data.source.version and the sweep another name, and the source is listed anew"
    )


def _find_class_folders(root: Folder) -> Found:
    """Class by class and, in an object store, page by page: a million names are never in memory at once."""
    classes = [name for name in root.folders() if not name.startswith(".")]
    return Found(
        (
            Entry(f"{name}/{file}", label)
            for label, name in enumerate(classes)
            for file in root.files(name)
            if file.lower().endswith(images.SUFFIXES) and not file.startswith(".")
        ),
        classes,
    )


def _csv_entries(root: Folder, name: str, settings: CsvSource) -> Iterator[Entry]:
    where = f"{root}/{name}"
    try:
        with io.TextIOWrapper(root.open(name), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            for key, column in (("path", settings.path), ("label", settings.label)):
                if column not in (rows.fieldnames or []):
                    has = ", ".join(rows.fieldnames or ["nothing"])
                    raise UserError(f"data.source.{key}: no column {column!r} in {where}; it has {has}")
            for row in rows:
                if not row[settings.path] or not row[settings.label]:
                    raise UserError(
                        f"{where}: line {rows.line_num}: expected a path and a label, got {list(row.values())}"
                    )
                yield Entry(row[settings.path], number_or_name(row[settings.label]))
    except FileNotFoundError as error:
        raise UserError(f"data.source.url: no file {where}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not a CSV in UTF-8: {error}") from error


def _read_anywhere(root: Folder, path: str) -> bytes:
    if "://" not in path and not path.startswith("/"):
        return root.read(path)
    parent, _, name = path.rpartition("/")
    return Folder(parent).read(name)


@cache
def _digits() -> tuple[np.ndarray, list[int]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), [int(y) for y in digits.target]


def _find_digits() -> Found:
    labels = _digits()[1]
    return Found((Entry(f"digits/{i:04d}", y, "", (i, 0)) for i, y in enumerate(labels)), list("0123456789"))


def _read_digit(entry: Entry) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_digits()[0][entry.place[0]]).save(buffer, "PNG")
    return buffer.getvalue()
