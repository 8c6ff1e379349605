"""Labelled images of any kind, in one order that the source's content fixes, each opened by its position.

A source is a listing (listing.py) and a way to read its entries. Images become arrays in images.py; tars and Parquet have their
own files. For latents see shards.py and latents.py.
"""

import csv
import io
import itertools
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from dis_scale.data import images, layouts, listing, parquet, tars
from dis_scale.data.listing import Column, Contents, Entry, LeftOut, Listing, number_or_name
from dis_scale.data.mixing import order_hash, permutation
from dis_scale.process.errors import StorageError, UndecodableImage, UserError, nearest, printable
from dis_scale.process.progress import ReportDone, some
from dis_scale.recipe import (
    CsvSource,
    Data,
    DigitsSource,
    FolderSource,
    LatentsSource,
    ParquetSource,
    SourceSettings,
    TarSource,
)
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep.documents import LeftOutByReason

NOT_THERE = "there is no such file; correct the CSV or the link, or --set data.undecodable=skip"
UNLISTED = ("http://", "https://")
"""Beginnings of URLs whose folders cannot be listed: what is not there is found when it is read."""
LINE_CHARACTERS = 2**20
"""Most characters of a CSV's line: paths have up to 4,096, and a field of Python's csv up to 131,072."""


@dataclass(frozen=True)
class Source:
    """Images, or latents; position i of the dataset is `names[i]`, of class `labels[i]`: 0 in all, without `label_names`, if
    unconditional."""

    listing: Listing
    label_names: list[str]
    read: Callable[[Sequence[Entry]], list[bytes | None]]
    """Reads the bytes of entries that are `near` each other; None for a file that a CSV or a link names and that is not there."""
    near: Callable[[Entry, Entry], bool]
    """True if both entries, the second after the first, belong in one call of `read`."""
    mixed: bool
    """Whether positions are in the mixed order; otherwise latents are mixed after encoding (staging.py)."""
    decode: Callable[[bytes, str, int], np.ndarray]
    """Makes an array of a file's bytes, its name and the resolution: an image, or a latent's moments; UndecodableImage."""
    in_flight: images.InFlight

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def order(self) -> str | None:
        """Hash of the mixed order: the listing's, or that of mixing after encoding."""
        return self.listing.manifest.order if self.mixed else order_hash(permutation(len(self)))

    @property
    def left_out(self) -> str:
        """What is beside the images, in words; empty if nothing is."""
        return listing.words_of(self.listing.manifest.left_out)

    @cached_property
    def names(self) -> Sequence[str]:
        return Column(self.listing, lambda entry: entry.name)

    @cached_property
    def labels(self) -> Sequence[int]:
        return Column(self.listing, lambda entry: int(entry.label))

    def pixels(self, i: int, resolution: int) -> np.ndarray:
        """Return image i as uint8 (resolution, resolution, 3), or a latent's moments, float16 (sides, 2C or C, h, w).

        UndecodableImage, or another StorageError if storage fails.
        """
        (image,) = self.decoded(range(i, i + 1), resolution)
        if isinstance(image, UndecodableImage):
            raise image
        return image

    def decoded(self, positions: range, resolution: int) -> list[np.ndarray | UndecodableImage]:
        """Return the images of one of `read_ranges`, by one call of `read`; an undecodable image is replaced by its error."""
        entries = self.listing[positions.start : positions.stop]
        try:
            files = self.read(entries)
        except FileNotFoundError as error:
            raise _gone(entries[0].file) from error
        return [self._decoded(data, entry.name, resolution) for data, entry in zip(files, entries, strict=True)]

    def _decoded(self, data: bytes | None, name: str, resolution: int) -> np.ndarray | UndecodableImage:
        try:
            if data is None:
                return UndecodableImage(f"image {printable(name)}: {NOT_THERE}", NOT_THERE)
            return self.decode(data, name, resolution)
        except UndecodableImage as error:
            return error

    def read_ranges(self, positions: range, most: int) -> Iterator[range]:
        """Split the positions into ranges of one read and at most `most` images each."""
        first = positions.start
        for i in positions:
            if i - first == most or not self.near(self.listing[first], self.listing[i]):
                yield range(first, i)
                first = i
        if first < positions.stop:
            yield range(first, positions.stop)


def select_decodable(
    positions: Iterable[int], images: Iterable[np.ndarray | UndecodableImage], undecodable: Literal["refuse", "skip"]
) -> tuple[list[tuple[int, np.ndarray]], list[int]]:
    """Return (position, image) of the decodable images, and the positions of the others.

    Raises the first UndecodableImage if `undecodable` is "refuse".
    """
    decodable, skipped = [], []
    for position, image in zip(positions, images, strict=True):
        if not isinstance(image, UndecodableImage):
            decodable.append((position, image))
        elif undecodable == "refuse":
            raise image
        else:
            skipped.append(position)
    return decodable, skipped


def open_source(data: Data, store: Folder | None = None, report: ReportDone = lambda _: None) -> Source:
    """Open the recipe's source by the listing in `store`, which is built if missing; without a store it is always built.

    UserError if the source is missing, empty, or has other classes than the recipe says.
    """
    kind = _open_kind(data)
    find = partial(_find, kind)

    def check(opened: Listing) -> None:
        _label_names(opened, data, kind.where)

    if store is None:
        opened = listing.in_memory(find(), report)
    else:
        opened = listing.stored(store, data.declared, find, check, report)
        if opened.manifest.version:
            _require_version(kind.where, opened.manifest.version, kind.version())
    names, in_flight = _label_names(opened, data, kind.where), images.InFlight()

    def decode(file: bytes, name: str, resolution: int) -> np.ndarray:
        if data.given:
            return layouts.moments(data.given, data.mirror, file, name)
        return images.decode(file, name, resolution, data.crop, in_flight)

    return Source(opened, names, kind.read, kind.near, kind.mixed, decode, in_flight)


def lists_mixed(source: SourceSettings) -> bool:
    """Whether a source is listed in the mixed order: each image has a file of its own."""
    many = isinstance(source, TarSource | ParquetSource)
    return not (many or (isinstance(source, LatentsSource) and layouts.many_in_a_file(source, False)))


def require_source(data: Data, store: Folder) -> None:
    """UserError if the recipe's source is missing or empty; nothing is read if the store has its listing."""
    if not listing.folder_of(store, data.declared).exists(manifest.NAME):
        contents, left_out = _find(_open_kind(data)), LeftOutByReason()
        if next(listing.kept(contents.entries, left_out), None) is None:
            raise contents.without_images(left_out)


def require_classes(root: Folder, folders: Sequence[str]) -> None:
    """UserError if some folders are parts of a set, such as train and test, or most are like these, such as test2017."""
    parts = sorted(name for name in folders if name.lower() in tars.SPLITS)
    if len(tars.splits_in(parts)) < 2:
        alike = sorted(name for name in folders if tars.splits_in([name]))
        parts = alike if 2 * len(alike) > len(folders) else []
    if len(tars.splits_in(parts)) > 1:
        raise UserError(
            f"data.source.url: {', '.join(map(printable, parts))} in {root} are parts of a set, not classes: "
            f"give one of them, such as {root}/{printable(parts[0])}"
        )


def _find(kind: "_Kind") -> Contents:
    version = kind.version()  # before the labels are read: a file that is written meanwhile is refused later
    return kind.find()._replace(mixed=kind.mixed, missing=kind.missing, where=kind.where, version=version)


class _Kind(Protocol):
    """A kind of source: how to list and read it."""

    where: str
    """Its location, for messages."""
    missing: str
    """The error message if it has no entries."""
    mixed: bool
    """Whether to list in the mixed order: reading neighbours together is no cheaper."""

    def find(self) -> Contents: ...
    def version(self) -> str: ...
    def read(self, entries: Sequence[Entry]) -> list[bytes | None]: ...
    def near(self, first: Entry, entry: Entry, /) -> bool: ...


class _OneFileEach(ABC):
    """Base of kinds with a file for each image."""

    mixed = True

    def version(self) -> str:
        """Return the version of the one file with all labels; empty if each image has its own."""
        return ""

    def read(self, entries: Sequence[Entry]) -> list[bytes | None]:
        return [self.read_one(entry) for entry in entries]

    def near(self, _: Entry, __: Entry, /) -> bool:
        return True

    @abstractmethod
    def read_one(self, entry: Entry) -> bytes | None: ...


class _Digits(_OneFileEach):
    """scikit-learn's handwritten digits."""

    where, missing = "scikit-learn's digits", ""

    def __init__(self, labelled: bool) -> None:
        self._labelled = labelled

    def find(self) -> Contents:
        labels = _digits()[1]
        entries = (Entry(f"digits/{i:04d}", y * self._labelled, "", (i, 0)) for i, y in enumerate(labels))
        return Contents(entries, list("0123456789") if self._labelled else None)

    def read_one(self, entry: Entry) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(_digits()[0][entry.location[0]]).save(buffer, "PNG")
        return buffer.getvalue()


class _ClassFolders(_OneFileEach):
    """A folder of images for each class; unlabelled images may also be beside these folders."""

    def __init__(self, settings: FolderSource, labelled: bool) -> None:
        self._root, self._labelled = open_folder(settings.url), labelled
        self.where = self._root.url
        self.missing = (
            f"no images in class folders below {self._root}; expected {self._root}/<class>/<image>.png"
            if labelled
            else f"no images in {self._root} or its folders; expected {self._root}/<image>.png"
        )

    def find(self) -> Contents:
        """List the images at any depth, as torchvision's ImageFolder does: the first folder of a path is the class."""
        classes = [name for name in self._root.folders() if not images.hidden(name)]
        require_classes(self._root, classes)
        if not self._labelled:
            return Contents(self._entries(self._root.walk(), {}))
        return Contents(self._entries(self._root.walk(), {name: label for label, name in enumerate(classes)}), classes)

    def _entries(self, files: Iterable[str], labels: Mapping[str, int]) -> Iterator[Entry | LeftOut]:
        for file in files:
            folder, slash, _ = file.partition("/")
            if images.hidden(file):
                yield LeftOut(file, "hidden")
            elif not file.lower().endswith(images.SUFFIXES):
                yield LeftOut(file, images.ending(file))
            elif self._labelled and not slash:
                yield LeftOut(file, "images beside the class folders")
            elif self._labelled and folder not in labels:
                yield LeftOut(file, "images in folders that came while they were listed")
            else:
                yield Entry(file, labels[folder] if self._labelled else 0)

    def read_one(self, entry: Entry) -> bytes | None:
        try:
            return self._root.read_up_to(entry.name, images.IMAGE_BYTES)
        except (FileNotFoundError, StorageError) as error:
            path = Path(self._root.local or "", entry.name)
            if self._root.local and path.is_symlink() and not path.is_file():
                return None
            if isinstance(error, StorageError):
                raise
            raise _gone(f"image {entry.name}") from error


class _Csv(_OneFileEach):
    """A CSV file of paths, and of labels unless the images are unlabelled."""

    def __init__(self, settings: CsvSource, data: Data, labelled: bool) -> None:
        self._file, self._outside = open_folder(settings.url), data.csv_outside == "allow"
        self._path, self._label = settings.path, settings.label if labelled else None
        self._all_there = data.undecodable == "refuse"
        self._root = Folder(self._file.url.rpartition("/")[0])
        self.where, self.missing = self._file.url, f"no lines in {self._file}"

    def version(self) -> str:
        try:
            return self._root.version(self._file.name)
        except FileNotFoundError as error:
            raise UserError(f"data.source.url: no file {self._file}") from error

    def find(self) -> Contents:
        entries = map(self._allowed, self._each_once())
        return Contents(self._present(entries) if self._all_there else entries)

    def read_one(self, entry: Entry) -> bytes | None:
        """Read from the folder of the CSV, or from where its line says. The listing may be of a time when that was allowed."""
        try:
            return _read_anywhere(self._root, self._allowed(entry).name)
        except FileNotFoundError:
            return None

    def _each_once(self) -> Iterator[Entry]:
        """Yield the CSV's images; UserError at the end if two lines name one. Hashes: there may be a hundred million."""
        names, lines = array("q"), array("q")
        for entry in _csv_entries(self._root, self._file.name, self._path, self._label):
            names.append(hash(entry.name))
            lines.append(entry.location[0])
            yield entry
        order = np.argsort(hashes := np.asarray(names), kind="stable")
        if len(twice := np.flatnonzero(np.diff(hashes[order]) == 0)):
            first, second = (lines[order[i]] for i in (twice[0], twice[0] + 1))
            raise UserError(
                f"{self.where}: lines {first} and {second} name the same image, of {len(twice):,} such lines: leave one of each, "
                "with the label that is right"
            )

    def _present(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the entries; UserError at the end that counts all whose file is not there. Each folder is listed once."""
        names = cache(lambda folder: frozenset(folder.list()))
        missing = list[str]()
        for entry in entries:
            folder, name = _place(self._root, entry.name)
            if not folder.url.startswith(UNLISTED) and name not in names(folder):
                missing.append(f"{printable(entry.name)} (line {entry.location[0]})")
            yield entry
        if missing:
            raise UserError(
                f"{self.where}: {len(missing):,} of its images are not there: {some(missing)}; correct the CSV, or "
                "--set data.undecodable=skip to leave them out"
            )

    def _allowed(self, entry: Entry) -> Entry:
        """UserError for a path outside the folder: whoever wrote the CSV could have any file of this user or store read."""
        if not (self._outside or _is_inside(entry.name)):
            raise UserError(
                f"{self.where}: image {printable(entry.name)} is outside the CSV's folder; if the CSV is yours, "
                "--set data.csv_outside=allow"
            )
        return entry


class _ManyInAFile(ABC):
    """Base of kinds with many images in a file, which is compared with its version when it was listed."""

    mixed = False

    def __init__(self, url: str, files: str, suffix: str) -> None:
        self.root, self._names = tars.files_of(folder := open_folder(url), files, suffix)
        self._is_folder, self.where = self.root == folder, self.root.url

    def version(self) -> str:
        return ""  # each entry has that of its file

    def find(self) -> Contents:
        """List the images of the files, then what is beside these."""
        contents = self.listed()
        beside = tars.beside(self.root, self._names) if self._is_folder else ()
        return contents._replace(entries=itertools.chain(contents.entries, beside))

    def read(self, entries: Sequence[Entry]) -> list[bytes | None]:
        try:
            return list(self.read_many(entries))
        finally:  # not before: the file may be written again while it is read
            self.require_unchanged(entries[0])

    def require_unchanged(self, entry: Entry) -> None:
        """StorageError if the entry's file is another one than when it was listed."""
        if entry.version:
            _require_version(f"{self.root}/{entry.file}", entry.version, self.root.version(entry.file))

    @abstractmethod
    def listed(self) -> Contents: ...

    @abstractmethod
    def read_many(self, entries: Sequence[Entry]) -> list[bytes]: ...


class _Tars(_ManyInAFile):
    """Tars of images."""

    def __init__(self, settings: TarSource, labelled: bool) -> None:
        super().__init__(settings.url, settings.files, ".tar")
        self._settings, self._labelled, self.near = settings, labelled, tars.near
        self.missing = f"no images ({', '.join(images.SUFFIXES)}) in the tars of {self.root}"

    def listed(self) -> Contents:
        return tars.find(self.root, self._names, self._settings, self._labelled)

    def read_many(self, entries: Sequence[Entry]) -> list[bytes]:
        return tars.read(self.root, entries)


class _Parquet(_ManyInAFile):
    """Parquet files of images."""

    def __init__(self, settings: ParquetSource, labelled: bool) -> None:
        super().__init__(settings.url, settings.files, ".parquet")
        self._settings, self._labelled, self.near = settings, labelled, parquet.near
        self._reader = parquet.ParquetReader(self.root, settings, self.require_unchanged)
        self.missing = f"no rows in the Parquet files of {self.root}"

    def listed(self) -> Contents:
        return parquet.find(self.root, self._names, self._settings, self._labelled)

    def read(self, entries: Sequence[Entry]) -> list[bytes | None]:
        return list(self.read_many(entries))  # the reader compares when it loads a row group

    def read_many(self, entries: Sequence[Entry]) -> list[bytes]:
        return self._reader.read(entries)


class _LatentFiles(_OneFileEach):
    """Latents of another program, a file each."""

    def __init__(self, settings: LatentsSource, labelled: bool) -> None:
        self._root, self._labelled = layouts.root_of(settings, open_folder(settings.url)), labelled
        self.where = self._root.url
        self.missing = f"no latents in {self._root}; expected {self._root}/{layouts.edm2_file(0)}"

    def version(self) -> str:
        try:
            return self._root.version(layouts.LABELS) if self._labelled else ""
        except FileNotFoundError:
            return ""  # listing says what is missing

    def find(self) -> Contents:
        layouts.require_finished(self._root)
        return Contents(layouts.find_files(self._root, self._labelled))

    def read_one(self, entry: Entry) -> bytes:
        try:
            return self._root.read_up_to(entry.name, images.IMAGE_BYTES)
        except FileNotFoundError as error:
            raise _gone(f"latent {entry.name}") from error


class _LatentsInFiles(_ManyInAFile):
    """Latents of another program, many in a file."""

    def __init__(self, layout: layouts.InFiles, settings: LatentsSource, labelled: bool) -> None:
        pattern = settings.files or f"*{layout.suffix}"
        super().__init__(settings.url, pattern, layout.suffix)
        self._layout, self._labelled, self.near = layout, labelled, layout.near
        self.missing = f"no latents in the files {pattern} of {self.root}"

    def listed(self) -> Contents:
        layouts.require_finished(self.root)
        return self._layout.find(self.root, self._names, labelled=self._labelled)

    def read_many(self, entries: Sequence[Entry]) -> list[bytes]:
        return self._layout.read(self.root, entries)


def _open_kind(data: Data) -> _Kind:
    labelled = data.num_classes is not None
    match data.source:
        case LatentsSource():
            layout = layouts.many_in_a_file(data.source, data.mirror)
            return _LatentsInFiles(layout, data.source, labelled) if layout else _LatentFiles(data.source, labelled)
        case DigitsSource():
            return _Digits(labelled)
        case FolderSource():
            return _ClassFolders(data.source, labelled)
        case CsvSource():
            return _Csv(data.source, data, labelled)
        case TarSource():
            return _Tars(data.source, labelled)
        case ParquetSource():
            return _Parquet(data.source, labelled)


def _label_names(opened: Listing, data: Data, where: str) -> list[str]:
    """Return the classes' names as they can be shown, or their numbers if they have none; empty for unlabelled images.

    UserError if their number is not the recipe's.
    """
    if data.num_classes is None:
        return []
    names, largest = opened.manifest.label_names, opened.manifest.largest
    if names is None and largest >= data.num_classes:
        raise UserError(f"data.num_classes: got {data.num_classes}, but {where} has labels up to {largest}")
    if names is not None and len(names) != data.num_classes:
        shown = ", ".join(map(printable, names[:5]))
        raise UserError(
            f"data.num_classes: got {data.num_classes}, but the source has {len(names)} classes ({shown}, ...)"
        )
    return list(map(printable, names or ())) or [str(i) for i in range(data.num_classes)]


def _require_version(what: str, listed: str, now: str) -> None:
    """StorageError if a file is another one than when it was listed."""
    if now != listed:
        raise StorageError(
            f"{printable(what)}: it was written again after it was listed ({listed}, now {now}), so labels could be those of other "
            "images; restore it with its time, or change data.source.version and the sweep's name, and the source is listed again"
        )


def _gone(what: str) -> StorageError:
    return StorageError(
        f"{printable(what)} is gone: it was there when the source was listed; "
        "restore it, or change data.source.version and the sweep's name, and the source is listed again"
    )


def _csv_entries(root: Folder, name: str, path: str, label: str | None) -> Iterator[Entry]:
    """Yield the images in column `path`, of the classes in column `label` if given."""
    where = printable(f"{root}/{name}")
    try:
        with io.TextIOWrapper(root.open(name), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(_lines(file, where), strict=True)
            if twice := [name for name, count in Counter(rows.fieldnames or []).items() if count > 1]:
                raise UserError(f"{where}: its header names {', '.join(map(repr, twice))} twice")
            for key, column in (("path", path), ("label", label)):
                if column is not None and column not in (rows.fieldnames or []):
                    has = ", ".join(rows.fieldnames or ["nothing"])
                    near = nearest(column, rows.fieldnames or [])
                    raise UserError(f"data.source.{key}: no column {column!r}{near} in {where}; it has {has}")
            for row in rows:
                if not row[path] or None in row or (label is not None and not (row[label] or "").strip()):
                    raise UserError(
                        f"{where}: line {rows.line_num}: expected a path and a label, in quotes if it has a comma, got "
                        f"{list(row.values())}"
                    )
                yield Entry(row[path], 0 if label is None else number_or_name(row[label]), location=(rows.line_num, 0))
    except FileNotFoundError as error:
        raise UserError(f"data.source.url: no file {where}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not a CSV in UTF-8: {error}") from error


def _lines(file: io.TextIOWrapper, where: str) -> Iterator[str]:
    """Yield the lines; UserError for one that is too long to be a path and a label, before it fills the memory."""
    while line := file.readline(LINE_CHARACTERS + 1):
        if len(line) > LINE_CHARACTERS:
            raise UserError(f"{where}: not a CSV of images: a line has over {LINE_CHARACTERS:,} characters")
        yield line


def _is_inside(path: str) -> bool:
    """Whether a CSV's path cannot leave the CSV's folder: not complete, not a URL, no `..`."""
    return not path.startswith("/") and "://" not in path and ".." not in path.split("/")


def _read_anywhere(root: Folder, path: str) -> bytes:
    folder, name = _place(root, path)
    return folder.read_up_to(name, images.IMAGE_BYTES)


def _place(root: Folder, path: str) -> tuple[Folder, str]:
    """Return the folder and the name of a CSV's image, which is relative to the CSV's folder unless it is complete."""
    parent, _, name = path.rpartition("/")
    if "://" in path or path.startswith("/"):
        return Folder(parent), name
    return (root / parent if parent else root), name


@cache
def _digits() -> tuple[np.ndarray, list[int]]:
    """Return the images, uint8 (1797, 8, 8), and labels: from scikit-learn's file, since its import takes 1.4 s of CPU time."""
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")  # 64 pixels from 0 to 16, and the digit
    return np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), [int(y) for y in rows[:, -1]]
