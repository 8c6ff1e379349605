"""Listings: the entries of a source, in its own order or the mixed one, stored compactly in parts of bounded size.

The first process that needs a declared source (its settings, including `version`) lists it. All later stages, workers and sweeps
of that store read the same listing, part by part. A listing exists when its manifest exists; if two are written, the first counts.
The kinds of source are in kinds.py.
"""

import hashlib
import io
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from dis_scale.data.mixing import order_hash, permutation
from dis_scale.process.errors import Damaged, StorageError, UserError, printable
from dis_scale.process.progress import ReportDone
from dis_scale.process.settings import FORMAT
from dis_scale.process.threads import batched, in_order
from dis_scale.storage import npy
from dis_scale.storage.folder import UNKNOWN, Folder, missing, open_folder
from dis_scale.storage.manifest import Digest
from dis_scale.sweep.documents import LeftOutByReason, ListingManifest

PART = 2**17
"""Entries in a part: about 20 MB in memory while it is read. ImageNet has ten parts."""
PART_BYTES = 2**30
"""Most bytes of an unpacked part. A part of names of 4,096 bytes, the limit of a path, takes half of it."""
CLASS_CHARACTERS = 4096
"""Most characters of a class's name, which the log, the manifests and the weights' facts repeat."""
MOST_REASONS = 20
"""Most reasons to leave a file out that are counted separately."""
REPORT_EVERY = 1000
FILES_AT_ONCE = 8
LISTINGS = "listings"
"""Folder of all listings below a storage root."""
T = TypeVar("T")


class Entry(NamedTuple):
    """An image: its name, its class as the source writes it, and the location of its bytes.

    `file` is empty if `name` is the image's own file. `location` is (byte offset, length) in a tar, (row group, row) in Parquet,
    (line, 0) in a CSV. `version` is the version of `file` (`Folder.version`) when it was listed.
    """

    name: str
    label: int | str
    file: str = ""
    location: tuple[int, int] = (0, 0)
    version: str = ""


HIDDEN, OF_OTHER_KINDS = "hidden", "of other kinds"
"""Reasons that do not tell what the files are."""
WITHOUT_IMAGES = "classes without images"
ABSENT = {"", "#N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
"""Texts that programs write for a missing label: those that pandas reads as missing, except for some of old systems."""


class LeftOut(NamedTuple):
    """Something in a source that is no image of the set, and why."""

    name: str
    why: str


class Contents(NamedTuple):
    """A source's entries in order, its class names if known before listing, and whether to list the entries in the mixed order.

    `entries` also has the files that are left out. `missing` is the message if there are no entries; `where` names the source in
    messages.
    """

    entries: Iterable[Entry | LeftOut]
    label_names: list[str] | None = None
    mixed: bool = False
    missing: str = ""
    where: str = ""
    version: str = ""
    """Version of the file that has the labels, if the images are in other files."""

    def without_images(self, left_out: LeftOutByReason) -> UserError:
        """Return the error for a source without entries; it names the source's other contents."""
        there = f"; there are {words_of(left_out)}" if left_out else ""
        return UserError(f"data.source.url: {self.missing}{there or missing(open_folder(self.where))}")


class Numeral(str):
    """A class that is written as a number. Its text is kept, so that `01` and `1` are not one class by mistake."""


def of_files(
    root: Folder, names: Sequence[str], entries: Callable[[str], Iterator[Entry | LeftOut]], large_bytes: int
) -> Iterator[Entry | LeftOut]:
    """Yield the entries of files in the order of `names`, each with the version that its file has before it is read.

    The first file is read on its own, for callers that need one image only; the others are read several at a time. Files over
    `large_bytes` are streamed. UserError if a store does not state versions.
    """

    def versioned(name: str) -> Iterator[Entry | LeftOut]:
        if (version := root.version(name)).endswith(UNKNOWN):
            raise UserError(
                f"data.source.url: {printable(f'{root}/{name}')}: its server states neither a time nor an ETag, so labels could be "
                "those of other images if it is written again: copy it to a disk or to S3"
            )
        for found in entries(name):
            yield found._replace(version=version) if isinstance(found, Entry) else found

    def of_file(name: str) -> Iterable[Entry | LeftOut]:
        return versioned(name) if root.size(name) > large_bytes else list(versioned(name))

    yield from versioned(names[0])
    for each in in_order(names[1:], of_file, FILES_AT_ONCE):
        yield from each


def number_or_name(text: str) -> str:
    """Parse the text of a class: digits become a `Numeral`, a text in `ABSENT` becomes '', any other text is a name."""
    if (text := text.strip()) in ABSENT:
        return ""
    return Numeral(text) if text.isascii() and text.isdigit() else text


class Listing(Sequence[Entry]):
    """The entries of a source by position, labels as integers. `where` is its location in messages."""

    def __init__(self, manifest: ListingManifest, load: Callable[[int], bytes], where: str) -> None:
        self.manifest, self._load, self.where = manifest, load, where
        self._part = lru_cache(2)(self._unpacked)
        self._final = manifest.final_labels

    def __len__(self) -> int:
        return self.manifest.count

    @overload
    def __getitem__(self, i: int) -> Entry: ...
    @overload
    def __getitem__(self, i: slice) -> list[Entry]: ...
    def __getitem__(self, i: int | slice) -> Entry | list[Entry]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(f"{self.where}: entry {i} of {len(self)}")
        part, row = divmod(i, PART)
        entry = self._part(part)[row]
        return entry if self._final is None else entry._replace(label=self._final[int(entry.label)])

    def labels(self) -> np.ndarray:
        """Return the labels of all entries, int (images)."""
        ids = np.concatenate([self._part(number).labels for number in range(-(-len(self) // PART))]).astype(int)
        return ids if self._final is None else np.array(self._final)[ids]

    def _unpacked(self, number: int) -> "_Part":
        try:
            return _Part.from_bytes(self._load(number))
        except (*npy.MALFORMED, KeyError, OSError) as error:
            raise Damaged(f"{self.where}: part {number}", error) from error


@dataclass(frozen=True)
class Column(Sequence[T], Generic[T]):
    """One field of a listing's entries, by position."""

    listing: Listing
    field: Callable[[Entry], T]

    def __len__(self) -> int:
        return len(self.listing)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        selected = self.listing[i]
        return [self.field(entry) for entry in selected] if isinstance(selected, list) else self.field(selected)


def build(contents: Contents, put: Callable[[int, bytes], None], report: ReportDone) -> ListingManifest:
    """Pass each part's number and bytes to `put`; return a manifest without files. UserError for invalid labels.

    Entries are streamed. For the mixed order, all are held in memory first, in compact form: 75 MB for ImageNet.
    """
    labels, total, count, parts = _Labels(contents.where, contents.label_names), hashlib.sha256(), 0, list[_Part]()
    left_out = LeftOutByReason()
    for number, entries in enumerate(batched(_counted(kept(contents.entries, left_out), report), PART)):
        ids = [labels.id_of(entry) for entry in entries]
        for entry in entries:
            total.update(os.fsencode(f"{entry.name}\t{entry.label}\t{entry.file}\t{entry.location}\t{entry.version}\n"))
        part = _Part.of(entries, ids)
        if contents.mixed:
            parts.append(part)
        else:
            put(number, part.to_bytes())
        count += len(entries)
    if not count:
        raise contents.without_images(left_out)
    names, final, largest = labels.final()
    labels.name_missing(left_out)
    manifest = ListingManifest(
        files={}, count=count, sha256=total.hexdigest(), label_names=names and [printable(name) for name in names],
        final_labels=final, largest=largest, left_out=left_out, version=contents.version,
    )  # fmt: skip
    if contents.mixed:
        order = permutation(count)
        manifest = manifest.changed(order=order_hash(order))
        for number, first in enumerate(range(0, count, PART)):
            report(count)  # it takes minutes for ten million
            entries = [parts[i // PART][i % PART] for i in order[first : first + PART].tolist()]
            put(number, _Part.of(entries, [int(entry.label) for entry in entries]).to_bytes())
    return manifest


def in_memory(contents: Contents, report: ReportDone) -> Listing:
    """Build a listing that is not stored."""
    parts: dict[int, bytes] = {}
    return Listing(build(contents, parts.__setitem__, report), parts.__getitem__, contents.where)


def folder_of(store: Folder, key: Any) -> Folder:
    """Return the folder of the listing of the source that `key` declares, whether it exists or not."""
    return store / LISTINGS / hashlib.sha256(json.dumps([key, FORMAT]).encode()).hexdigest()[:16]


def stored(store: Folder, key: Any, find: Callable[[], Contents], check: Callable[[Listing], None], report: ReportDone) -> Listing:
    """Return the store's listing of the source that `key` declares; if none, build it and store it once `check` accepts it.

    A damaged listing is rebuilt. A damaged part can be rebuilt only if the source and the versions of packages are unchanged.

    If two processes list at once, both use the first manifest. Parts are named by their content, so neither damages the other's.
    """
    target = folder_of(store, key)

    def make() -> None:
        files: dict[str, Digest] = {}

        def put(_: int, data: bytes) -> None:
            name = f"{hashlib.sha256(data).hexdigest()[:16]}.npz"
            target.write(name, data)
            files[name] = Digest.of(data)

        new = build(find(), put, report).changed(source=key, files=files)
        check(_open(target, new, lambda: None))
        new.create(target)

    try:
        known = ListingManifest.find(target)
    except Damaged as error:
        logging.getLogger(__name__).warning("%s; it is made again", error)
        known = None
        target.delete(ListingManifest.NAME)
    if known is None:
        make()
    listing = _open(target, ListingManifest.require(target), make)
    check(listing)
    return listing


def _open(target: Folder, manifest: ListingManifest, make: Callable[[], None]) -> Listing:
    """Return the listing of this manifest. If a part is damaged, `make` rebuilds all: an unchanged source gives equal names."""
    names = list(manifest.files)

    def read(number: int) -> bytes:
        try:
            return manifest.read_file(target, names[number])
        except Damaged as error:
            logging.getLogger(__name__).warning("%s; it is made again", error)
        make()
        try:
            return manifest.read_file(target, names[number])
        except Damaged as error:
            raise StorageError(
                f"{error}; listed again, the source gives other parts: if it has changed, give it another data.source.version "
                "and the sweep another name; if packages have, those of before make the same parts"
            ) from error

    return Listing(manifest, read, str(target))


class _Labels:
    """Classes of the entries. Numbers stay; names get ids in the order of their first entries, and are sorted at the end."""

    def __init__(self, where: str, names: list[str] | None) -> None:
        self._where, self._known = where, names
        self._ids: dict[str, int] = {}
        self._written: dict[int, str] = {}
        self._numbers: set[int] = set()

    def id_of(self, entry: Entry) -> int:
        label = entry.label
        if isinstance(label, Numeral):
            label = self._number(entry, label)
        if isinstance(label, str):
            if not label.strip():
                raise UserError(
                    f"{self._where}: image {printable(entry.name)} has no label: it is empty, or a word for that such as NA or None"
                )
            # 10.0 would be sorted before 2.0; pandas writes floats if a label is missing. Many sets write -1 for a missing one.
            if re.fullmatch(r"[+-]?\d+\.\d*|[+-]\d+", label):
                raise UserError(
                    f"{self._where}: image {printable(entry.name)}: label {label!r:.99}: write whole numbers from 0, or names"
                )
            if not self._numbers:
                return self._ids.setdefault(label, len(self._ids))
        elif not self._ids and 0 <= label < (2**31 if self._known is None else len(self._known)):
            self._numbers.add(label)
            return label
        expected = f"a class from 0 to {len(self._known) - 1}" if self._known else "either a name or a number from 0 in all"
        raise UserError(f"{self._where}: image {printable(entry.name)}: label {entry.label!r:.99}, expected {expected}")

    def _number(self, entry: Entry, written: str) -> int:
        number = int(written) if len(written) < 20 else -1  # Python refuses over 4,300 digits
        if (first := self._written.setdefault(number, written)) != written:
            raise UserError(
                f"{self._where}: image {printable(entry.name)}: label {written!r:.99}, and {first!r:.99} before: write numbers in "
                "one way"
            )
        return number

    def final(self) -> tuple[list[str] | None, list[int] | None, int]:
        """Return the names (None for bare numbers), the final label of each id (None if it is the id) and the largest label."""
        names = sorted(self._ids) or self._known or []
        alike = dict[str, str]()
        for name in names:
            if len(name) > CLASS_CHARACTERS:
                raise UserError(
                    f"{self._where}: a class of {len(name):,} characters, {name!r:.99}: expected at most {CLASS_CHARACTERS:,}"
                )
            if (other := alike.setdefault(unicodedata.normalize("NFC", name), name)) != name:
                raise UserError(
                    f"{self._where}: two classes whose names look the same, {other!a} and {name!a}: in one of them accents are "
                    "letters of their own, as macOS writes them; give both one name"
                )
        if not self._ids:
            return self._known, None, max(self._numbers)
        rank = {name: i for i, name in enumerate(names)}
        return names, [rank[name] for name in self._ids], len(names) - 1

    def name_missing(self, left_out: LeftOutByReason) -> None:
        """Count the classes without images, among the known names or the numbers below the largest."""
        count = len(self._known) if self._known else max(self._numbers, default=-1) + 1
        if self._numbers and (missing := count - len(self._numbers)):
            first = next(number for number in range(count) if number not in self._numbers)
            left_out[WITHOUT_IMAGES] = missing, printable(self._known[first]) if self._known else str(first)


@dataclass(frozen=True)
class _Part:
    """Up to `PART` entries as arrays: concatenated names; for each entry the end of its name, label, file number and location.

    `files` has the name and the version of each file.
    """

    names: bytes
    ends: np.ndarray
    labels: np.ndarray
    files: list[tuple[str, str]]
    file_of: np.ndarray
    locations: np.ndarray

    def __getitem__(self, row: int) -> Entry:
        start = int(self.ends[row - 1]) if row else 0
        name = os.fsdecode(self.names[start : int(self.ends[row])])
        offset, length = self.locations[row].tolist()
        file, version = self.files[self.file_of[row]]
        return Entry(name, int(self.labels[row]), file, (offset, length), version)

    @classmethod
    def of(cls, entries: list[Entry], ids: list[int]) -> "_Part":
        names = [os.fsencode(entry.name) for entry in entries]
        numbers: dict[tuple[str, str], int] = {}
        file_of = [numbers.setdefault((entry.file, entry.version), len(numbers)) for entry in entries]
        ends = np.cumsum([len(name) for name in names], dtype=np.uint32)
        locations = np.array([entry.location for entry in entries], np.int64)
        return cls(b"".join(names), ends, np.array(ids, np.int32), list(numbers), np.array(file_of, np.int32), locations)

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, names=np.frombuffer(self.names, np.uint8), ends=self.ends, labels=self.labels, file_of=self.file_of,
            files=_joined(file for file, _ in self.files), versions=_joined(version for _, version in self.files),
            places=self.locations,
        )  # fmt: skip
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "_Part":
        z = npy.read_all(data, PART_BYTES)
        pairs = list(zip(_split(z["files"]), _split(z["versions"]), strict=True))
        return cls(z["names"].tobytes(), z["ends"], z["labels"], pairs, z["file_of"], z["places"])


def _split(words: np.ndarray) -> list[str]:
    return os.fsdecode(words.tobytes()).split("\0")


def _joined(words: Iterable[str]) -> np.ndarray:
    return np.frombuffer(os.fsencode("\0".join(words)), np.uint8)


def kept(entries: Iterable[Entry | LeftOut], left_out: LeftOutByReason) -> Iterator[Entry]:
    """Yield the entries; count the others in `left_out` by reason, with the first name of each."""
    for entry in entries:
        if isinstance(entry, Entry):
            yield entry
        else:
            why = entry.why if entry.why in left_out or len(left_out) < MOST_REASONS else OF_OTHER_KINDS
            count, first = left_out.get(why, (0, printable(entry.name)))
            left_out[why] = count + 1, first


def words_of(left_out: LeftOutByReason) -> str:
    """Return the other contents of a source in words: the number for each reason, and the first name."""
    one = {why: re.sub(r"^(?:(class)es|([\w-]+)s)\b", r"\1\2", why) for why in left_out}
    return ", ".join(f"{count:,} {one[why] if count == 1 else why} ({first})" for why, (count, first) in left_out.items())


def _counted(entries: Iterable[Entry], report: ReportDone) -> Iterator[Entry]:
    for number, entry in enumerate(entries, 1):
        yield entry
        if number % REPORT_EVERY == 0:
            report(number)
