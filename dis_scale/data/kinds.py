"""The kinds of source, and how each lists and reads its images.

Tars, Parquet, the rows of a CSV and the latents of other programs have modules of their own.
"""

import contextlib
import errno
import io
import itertools
import posixpath
import unicodedata
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dis_scale.data import csv_rows, images, layouts, matching, parquet, tars
from dis_scale.data.listing import HIDDEN, Contents, Entry, LeftOut
from dis_scale.process.errors import StorageError, UserError, printable
from dis_scale.process.progress import some
from dis_scale.process.threads import batched, in_order
from dis_scale.recipe import CsvSource, Data, DigitsSource, Files, FolderSource, LatentsSource, ParquetSource, TarSource
from dis_scale.storage.folder import WEB, Folder, open_folder

FOLDERS_AT_ONCE = 4096
"""Images whose folders are listed at the same time."""
NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors of a file system for a path that cannot be a file: it is a folder, it is below a file, or a name is too long."""


class SourceKind(Protocol):
    """A kind of source: how to list and read it."""

    where: str
    """Its location, for messages."""
    missing: str
    """The error message if it has no entries."""
    mixed: bool
    """Whether to list in the mixed order, because reading neighbours together is no cheaper."""

    def find(self) -> Contents: ...
    def version(self) -> str: ...
    def read(self, entries: Sequence[Entry]) -> list[bytes | None]: ...
    def near(self, first: Entry, entry: Entry, /) -> bool: ...


class _OneFileEach(ABC):
    """Base of kinds with a file for each image."""

    mixed = True

    def version(self) -> str:
        """Return the version of the file that has all labels; empty if there is no such file."""
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

    def __init__(self, *, labelled: bool) -> None:
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

    def __init__(self, settings: FolderSource, *, labelled: bool) -> None:
        self._root, self._labelled = open_folder(settings.url), labelled
        self.where = self._root.url
        self.missing = (
            f"no images in class folders below {self._root}; expected {self._root}/<class>/<image>.png"
            if labelled
            else f"no images in {self._root} or its folders ({', '.join(images.SUFFIXES)}); expected {self._root}/<image>.png; "
            "tars, Parquet, a CSV and latents need a recipe with their data.source.kind"
        )

    def find(self) -> Contents:
        """List the images at any depth, as torchvision's ImageFolder does: the first folder of a path is the class."""
        if self._root.local and self._root.local.is_file():
            raise UserError(
                f"data.source.url: {self._root} is a file: give a folder of images (unpack a zip); a tar, Parquet or CSV needs a "
                "recipe with its data.source.kind"
            )
        if not self._labelled:
            return Contents(self._entries(self._root.walk_with_links(), {}))
        classes = [name for name in self._root.folders() if not images.hidden(name)]
        if layouts.has_numbered_folders(self._root, classes):
            raise UserError(
                f"data.source.url: {self._root} has {layouts.LABELS} beside numbered folders, as EDM's tools write them: these are "
                f"no classes; set data.num_classes: none, or write {layouts.LABELS}'s labels as a CSV for data.source.kind csv"
            )
        return Contents(self._entries(self._root.walk_with_links(), {name: label for label, name in enumerate(classes)}), classes)

    def _entries(self, files: Iterable[tuple[str, bool]], labels: Mapping[str, int]) -> Iterator[Entry | LeftOut]:
        linked = self._root.local and _Linked(self._root.local, labelled=self._labelled)
        around, folder_elsewhere = "", ""
        for file, is_link in files:
            folder, slash, _ = file.partition("/")
            if linked and around != (around := file.rpartition("/")[0]):
                folder_elsewhere = linked.other_folder(around)
            if "//" in f"/{file}":  # a key in S3; its folder has another's name
                raise UserError(
                    f"data.source.url: {printable(f'{self._root}/{file}')}: an empty name of a folder (//): rename it or delete it"
                )
            if images.hidden(file):
                yield LeftOut(file, HIDDEN)
            elif not file.lower().endswith(images.SUFFIXES):
                yield LeftOut(file, self._lost_link(file) or images.ending(file))
            elif self._labelled and not slash:
                yield LeftOut(file, "images beside the class folders")
            elif self._labelled and folder not in labels:
                yield LeftOut(file, "images in folders that came while they were listed")
            elif elsewhere := folder_elsewhere or (linked and is_link and linked.other_file(file)):
                self._require_one_class(elsewhere, around if folder_elsewhere else file)
                yield LeftOut(file, "images that a link shows a second time")
            else:
                yield Entry(file, labels[folder] if self._labelled else 0)

    def _require_one_class(self, first: str, second: str) -> None:
        """Raise UserError if a link shows one folder or image in two classes."""
        if self._labelled and first.partition("/")[0] != second.partition("/")[0]:
            paths = itertools.accumulate(second.split("/"), "{}/{}".format)
            link = next(path for path in paths if Path(self._root.local or "", path).is_symlink())
            raise UserError(
                f"data.source.url: {printable(first)} and {printable(second)} in {self._root} show the same, by the link "
                f"{printable(link)}, which would be of two classes: delete that link"
            )

    def _lost_link(self, file: str) -> str:
        """Return why a link is not followed, '' if the file is no such link. UserError for a broken link beside the classes."""
        path = Path(self._root.local or "", file)
        if not self._root.local or not path.is_symlink() or path.is_file():
            return ""
        if path.exists():
            return "links to a folder around them"
        if self._labelled and "/" not in file:
            raise UserError(
                f"data.source.url: {printable(str(path))} is a link that leads nowhere: mount what it leads to, or delete it"
            )
        return "links that lead nowhere"

    def read_one(self, entry: Entry) -> bytes | None:
        try:
            return _read(self._root, entry.name)
        except (FileNotFoundError, StorageError) as error:
            path = Path(self._root.local or "", entry.name)
            if self._root.local and path.is_symlink() and not path.is_file():
                return None
            if isinstance(error, StorageError):
                raise
            raise gone(f"image {entry.name}") from error


class _Linked:
    """Links to folders and images below `root`. Finds the targets that are also listed by another path."""

    def __init__(self, root: Path, *, labelled: bool) -> None:
        self._root, self._labelled, self._first = root.resolve(), labelled, dict[Path, str]()
        self._known = lru_cache(64)(self._real)

    def other_file(self, file: str) -> str:
        """Return the other path by which the target of a link to an image will be listed; empty without one.

        A target outside the root may be listed twice, as copies may: some stores keep equal files once, and links to them.
        """
        if not (path := self._root / file).is_file():  # a link that leads nowhere
            return ""
        inside = self._inside(path.resolve())
        return inside if inside.lower().endswith(images.SUFFIXES) and "/" * self._labelled in inside else ""

    def other_folder(self, folder: str) -> str:
        """Return the path below the root by which this folder was or will be listed; empty if it is this one."""
        if images.hidden(folder) or (real := self._known(folder)) == self._root / folder:
            return ""
        if inside := self._inside(real):
            return inside
        first = self._first.setdefault(real, folder)  # also of a hidden folder, where some programs keep their files
        return first if first != folder else ""

    def _inside(self, real: Path) -> str:
        """Return a path relative to the root; empty if it is outside the root or hidden."""
        inside = str(real.relative_to(self._root)) if real.is_relative_to(self._root) else ""
        return "" if images.hidden(inside) else inside

    def _real(self, folder: str) -> Path:
        """Return a folder's path without links. Uses its parent's from a cache: `Path.resolve` checks every folder of a path."""
        around, _, name = folder.rpartition("/")
        path = (self._known(around) if around else self._root) / name
        return path.resolve() if path.is_symlink() else path


class _Csv(_OneFileEach):
    """A CSV file of paths, and of labels unless the images are unlabelled."""

    def __init__(self, settings: CsvSource, data: Data, *, labelled: bool) -> None:
        self._file, self._outside = open_folder(settings.url), data.csv_outside == "allow"
        if self._file.local and self._file.local.is_dir():
            raise UserError(f"data.source.url: {self._file} is a folder: give the CSV in it; it has {some(self._file.list())}")
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
        return Contents(self._present(self._each_once()) if self._all_there else self._each_once())

    def read_one(self, entry: Entry) -> bytes | None:
        """Read the file that a line names. Checks paths outside the CSV's folder again: they may have been allowed when listed."""
        try:
            return None if "\0" in entry.name else _read(*_place(self._root, self._allowed(entry).name))
        except FileNotFoundError:
            return None
        except StorageError as error:
            if getattr(error.__cause__, "errno", None) in NO_FILE:
                return None
            raise  # also for a missing bucket: a mistyped name would leave out all of its images

    def _each_once(self) -> Iterator[Entry | LeftOut]:
        """Yield the CSV's images; raise UserError at the end if two lines name one. Keeps hashes, for up to a hundred million."""
        names, lines = array("q"), array("q")
        for entry in csv_rows.entries(self._root, self._file.name, self._path, self._label):
            if isinstance(entry, LeftOut):
                yield entry
                continue
            folder, name = _place(self._root, self._allowed(entry).name)
            names.append(hash(posixpath.normpath(f"{folder}/{name}".removeprefix("file://"))))  # ../here/0.png is 0.png
            lines.append(entry.location[0])
            yield entry
        order = np.argsort(hashes := np.asarray(names), kind="stable")
        if len(twice := np.flatnonzero(np.diff(hashes[order]) == 0)):
            first, second = (lines[order[i]] for i in (twice[0], twice[0] + 1))
            raise UserError(
                f"{self.where}: lines {first} and {second} name the same image, of {len(twice):,} such lines: leave one of each, "
                "with the label that is right"
            )

    def _present(self, entries: Iterable[Entry | LeftOut]) -> Iterator[Entry | LeftOut]:
        """Yield the entries; raise UserError at the end with the number of missing files, if any.

        Each folder is listed once, many at the same time: some sets have a folder for each image. Web servers are not asked.
        """
        hashes, missing, first = dict[Folder, Sequence[int]](), list[str](), list[tuple[Folder, str]]()
        for some_entries in batched(entries, FOLDERS_AT_ONCE):
            named = [(entry, *_place(self._root, entry.name)) for entry in some_entries if isinstance(entry, Entry)]
            named = [each for each in named if not each[1].url.startswith(WEB)]  # a read finds missing files
            new = list(dict.fromkeys(folder for _, folder, _ in named if folder not in hashes))
            hashes |= zip(new, in_order(new, _hashes), strict=True)
            for entry, folder, name in named:
                if not _is_in(hashes[folder], hash(name)):
                    first = first or [(folder, name)]
                    missing.append(f"{printable(entry.name)} (line {entry.location[0]})")
            yield from some_entries
        if missing:
            raise UserError(
                f"{self.where}: {len(missing):,} of its images are not there: {some(missing)}{_like(*first[0])}; correct the CSV, "
                "or --set data.undecodable=skip to leave them out"
            )

    def _allowed(self, entry: Entry) -> Entry:
        """Return the entry; UserError if it is outside the CSV's folder: a CSV could name any file of this user or store."""
        path = entry.name
        if not self._outside and (path.startswith("/") or "://" in path or ".." in path.split("/")):
            raise UserError(
                f"{self.where}: image {printable(entry.name)} is outside the CSV's folder; if the CSV is yours, "
                "--set data.csv_outside=allow"
            )
        return entry


class _ManyInAFile:
    """Base of kinds with many images or latents in a file. A file must have the version that it had when it was listed."""

    mixed = False

    def __init__(self, url: str, files: Files, layout: layouts.InFiles, missing: str, *, are_classes: bool = False) -> None:
        self.root, self._names = matching.files_of(folder := open_folder(url), files, layout.suffix, are_classes=are_classes)
        self._is_folder, self.where, self.missing = self.root == folder, self.root.url, f"{missing} {self.root}"
        self._layout, self.near = layout, layout.near

    def version(self) -> str:
        return ""  # each entry has the version of its file

    def find(self) -> Contents:
        """List the images of the files, then the other contents of the folder."""
        contents = self._layout.find(self.root, self._names)
        beside = matching.beside(self.root, self._names) if self._is_folder else ()
        return contents._replace(entries=itertools.chain(contents.entries, beside))

    def read(self, entries: Sequence[Entry]) -> list[bytes | None]:
        try:
            return list(self._layout.read(self.root, entries))
        finally:  # after the read, since the file may be replaced during it
            self.require_unchanged(entries[0])

    def require_unchanged(self, entry: Entry) -> None:
        """Raise StorageError if the entry's file has changed since it was listed."""
        require_version(f"{self.root}/{entry.file}", entry.version, self.root.version(entry.file))


class _Parquet(_ManyInAFile):
    """Parquet files of images, whose reader compares versions when it loads a row group."""

    def __init__(self, settings: ParquetSource, *, labelled: bool) -> None:
        reader = parquet.ParquetReader(settings, self.require_unchanged)
        find = partial(parquet.find, settings=settings, labelled=labelled)
        layout = layouts.InFiles(".parquet", find, reader.read, parquet.near)
        super().__init__(settings.url, settings.files, layout, "no rows in the Parquet files of")

    def read(self, entries: Sequence[Entry]) -> list[bytes | None]:
        return list(self._layout.read(self.root, entries))


class _PackedLatents(_ManyInAFile):
    """Latents of another program, many in a file."""

    def find(self) -> Contents:
        layouts.require_finished(self.root)
        return super().find()


class _LatentFiles(_OneFileEach):
    """Latents of another program, a file each."""

    def __init__(self, settings: LatentsSource, *, labelled: bool) -> None:
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
        return Contents(layouts.find_files(self._root, labelled=self._labelled))

    def read_one(self, entry: Entry) -> bytes:
        try:
            return self._root.read_up_to(entry.name, images.IMAGE_BYTES)
        except FileNotFoundError as error:
            raise gone(f"latent {entry.name}") from error


def open_kind(data: Data) -> SourceKind:
    """Return the kind of a recipe's source. May access the source's location."""
    labelled = data.num_classes is not None
    match data.source:
        case LatentsSource():
            layout = layouts.many_in_a_file(data.source, mirror=data.mirror, labelled=labelled)
            if layout is None:
                return _LatentFiles(data.source, labelled=labelled)
            files = data.source.files or f"*{layout.suffix}"
            return _PackedLatents(data.source.url, files, layout, f"no latents in the files {files} of")
        case DigitsSource():
            return _Digits(labelled=labelled)
        case FolderSource():
            return _ClassFolders(data.source, labelled=labelled)
        case CsvSource():
            return _Csv(data.source, data, labelled=labelled)
        case TarSource():
            find = partial(tars.find, settings=data.source, labelled=labelled)
            layout = layouts.InFiles(".tar", find, tars.read, tars.near)
            missing = f"no images ({', '.join(images.SUFFIXES)}) in the tars of"
            return _ManyInAFile(data.source.url, data.source.files, layout, missing, are_classes=data.source.label == "tar")
        case ParquetSource():
            return _Parquet(data.source, labelled=labelled)


def require_version(what: str, listed: str, now: str) -> None:
    """Raise StorageError if a file's version `now` differs from the `listed` one."""
    if now != listed:
        raise StorageError(
            f"{printable(what)}: it was written again after it was listed ({listed}, now {now}), so labels could be those of other "
            "images; restore it with its time, or change data.source.version and the sweep's name, and the source is listed again"
        )


def gone(what: str) -> StorageError:
    """Return the error for an image whose file was listed and is not there any more."""
    return StorageError(
        f"{printable(what)} is gone: it was there when the source was listed; "
        "restore it, or change data.source.version and the sweep's name, and the source is listed again"
    )


def _hashes(folder: Folder) -> Sequence[int]:
    """Return the sorted hashes of the names of a folder's files: eight bytes each, since there may be millions."""
    return array("q", sorted(map(hash, folder.files())))


def _like(folder: Folder, name: str) -> str:
    """Return a hint for a missing file, or '': the path has Windows' separators, or the folder has a file whose name
    differs only in case, ending, surrounding blanks or Unicode form."""
    if "\\" in name:
        return "; folders are parted by /, and this path has \\"

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold().strip()

    found = next((each for each in folder.files() if folded(name) in (folded(each), folded(each.rpartition(".")[0]))), None)
    return f"; {name!a} is not there, but {found!a} is" if found else ""


def _is_in(ordered: Sequence[int], number: int) -> bool:
    place = bisect_left(ordered, number)
    return place < len(ordered) and ordered[place] == number


def _read(folder: Folder, name: str) -> bytes | None:
    """Return an image's bytes; None for a pipe, from which a read may wait for ever."""
    with contextlib.suppress(OSError):  # reading it gives the reason
        if folder.local and (folder.local / name).is_fifo():
            return None
    return folder.read_up_to(name, images.IMAGE_BYTES)


def _place(root: Folder, path: str) -> tuple[Folder, str]:
    """Return the folder and the file name of a CSV's image. A path is relative to the CSV's folder unless absolute or a URL."""
    path = path.removeprefix("file://")
    if "://" in path:
        parent, _, name = path.rpartition("/")
        return Folder(parent), name
    *folders, name = [part for part in path.split("/") if part not in ("", ".")] or [""]
    return Folder("/".join(["" if path.startswith("/") else root.url, *folders]) or "/"), name


@cache
def _digits() -> tuple[np.ndarray, list[int]]:
    """Return the images, uint8 (1797, 8, 8), and labels: from scikit-learn's file, since its import takes 1.4 s of CPU time."""
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")  # 64 pixels from 0 to 16, and the digit
    return np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), [int(y) for y in rows[:, -1]]
