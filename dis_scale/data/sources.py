"""Labelled images of any kind, in one order that the source's content fixes, each opened by its position.

A source is a listing (listing.py) and a way to read its entries (kinds.py). Images become arrays in images.py. For latents see
shards.py and latents.py.
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Literal

import numpy as np

from dis_scale.data import images, layouts, listing
from dis_scale.data.kinds import SourceKind, gone, open_kind, require_version
from dis_scale.data.listing import Column, Contents, Entry, Listing
from dis_scale.data.mixing import order_hash, permutation
from dis_scale.data.parts import of_one_set
from dis_scale.process.errors import BrokenDevice, UndecodableImage, UserError, counted, printable
from dis_scale.process.progress import ReportDone, some
from dis_scale.process.threads import in_order
from dis_scale.recipe import Data, LatentsSource, ParquetSource, SourceSettings, TarSource
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.sweep.documents import LeftOutByReason

NOT_THERE = "there is no such file; correct the link or the CSV that names it, or --set data.undecodable=skip"
FEW = 8
"""Most images of a shard, or of another group that is read together, that may be missing whatever their share."""
LOOKED_AT = 32
"""Further reads, of several images each, after the first missing image: they show whether many are missing."""
READERS = 16
"""Threads that read and decode images one by one: more than cores, since each waits for its reads."""
MOST_IMAGES = 8192
"""Most images that a sweep's small networks, its autoencoder and its classifiers, are trained on: evenly from the source, or at
random if it is not in the mixed order."""


@dataclass(frozen=True)
class Source:
    """Images, or latents, by position: the one at position i is `names[i]`, of class `labels[i]`.

    If unconditional, all labels are 0, and `label_names` is empty."""

    listing: Listing
    label_names: list[str]
    read: Callable[[Sequence[Entry]], list[bytes | None]]
    """Reads the bytes of entries that are `near` each other; None for a missing file that a CSV or a link names."""
    near: Callable[[Entry, Entry], bool]
    """True if both entries, the second after the first, belong in one call of `read`."""
    mixed: bool
    """Whether positions are in the mixed order; otherwise latents are mixed after encoding (staging.py)."""
    decode: Callable[[bytes, str, int], np.ndarray]
    """Decodes a file, given its bytes, its name and the resolution, to an image or a latent's moments; UndecodableImage."""
    in_flight: images.InFlight

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def order(self) -> str | None:
        """Hash of the mixed order: the listing's, or that of mixing after encoding."""
        return self.listing.manifest.order if self.mixed else order_hash(permutation(len(self)))

    @property
    def left_out(self) -> str:
        """Other contents of the source in words, and the number of classes without images; empty if there are neither."""
        manifest = self.listing.manifest
        beyond = range(manifest.largest + 1, len(self.label_names) if manifest.label_names is None else 0)
        above: LeftOutByReason = {f"{listing.WITHOUT_IMAGES}, above the largest": (len(beyond), str(beyond[0]))} if beyond else {}
        return listing.words_of(manifest.left_out | above)

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
        """Return the images of a range of `read_ranges`, by one call of `read`; an undecodable image is replaced by its error."""
        entries = self.listing[positions.start : positions.stop]
        try:
            files = self.read(entries)
        except FileNotFoundError as error:
            raise gone(entries[0].file) from error
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
            if i > first and (i - first == most or not self.near(self.listing[first], self.listing[i])):
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


def on_this_node(
    source: Source, data: Data, ranges: Iterable[tuple[Sequence[int], Sequence[np.ndarray | UndecodableImage]]], what: str
) -> Iterator[tuple[Sequence[int], list[tuple[int, np.ndarray]], list[int]]]:
    """Yield for each range its positions, and its decodable images and skipped positions as of `select_decodable`.

    BrokenDevice, at the end or at the first missing image, if more than half of the images are missing: this node lacks the targets
    of their links or lines. Images that are missing at a URL do not count, since no node has them.
    """
    count, lost, folder, ranges = 0, 0, getattr(data.source, "url", ""), iter(ranges)

    def is_here(position: int) -> bool:
        path = source.names[position]
        return "://" not in (path if "://" in path or path.startswith("/") else folder).removeprefix("file://")

    def look(positions: Sequence[int], read: Sequence[np.ndarray | UndecodableImage]) -> None:
        nonlocal count, lost
        count += len(read)
        missing = (n for n, image in zip(positions, read, strict=True) if getattr(image, "why", "") == NOT_THERE)
        lost += sum(map(is_here, missing))

    def require() -> None:
        if lost > max(count // 2, FEW):
            raise BrokenDevice(
                f"{lost} of {count} images of {what} are not there on {socket.gethostname()}: mount what the links or the CSV "
                "name; if they are gone for good, remove these links or lines"
            )

    for positions, read in ranges:
        look(positions, read)
        try:
            yield (positions, *select_decodable(positions, read, data.undecodable))
        except UndecodableImage as error:
            if error.why == NOT_THERE and lost:  # see whether many are missing
                for rest in islice(ranges, LOOKED_AT):
                    look(*rest)
                require()
            raise
    require()


def load_subset(source: Source, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return up to `MOST_IMAGES` images, uint8 (N, R, R, 3), and their labels, int64 (N). Their order does not depend on the
    source's own, so a caller may hold out every sixth."""
    if source.mixed:
        order: Sequence[int] = range(0, len(source), -(-len(source) // MOST_IMAGES))
    else:
        order = permutation(len(source))[:MOST_IMAGES].tolist()
    positions = sorted(order)  # as they are stored
    images = list(in_order(positions, lambda i: source.decoded(range(i, i + 1), data.resolution)[0], READERS))
    ((_, decodable, _),) = on_this_node(source, data, [(positions, images)], "the sample for the small networks")
    if not decodable:
        raise UserError(f"{source.listing.where}: none of {len(positions):,} images can be decoded")
    found = dict(decodable)
    kept = [position for position in order if position in found]
    return np.stack([found[n] for n in kept]), np.array([source.labels[n] for n in kept], dtype=np.int64)


def open_source(data: Data, store: Folder | None = None, report: ReportDone = lambda _: None) -> Source:
    """Open the recipe's source by the listing in `store`, which is built if missing; without a store it is always built.

    UserError if the source is missing, empty, or has other classes than the recipe says.
    """
    kind = open_kind(data)
    find = partial(_find, kind)

    def check(opened: Listing) -> None:
        _label_names(opened, data, kind.where)

    if store is None:
        opened = listing.in_memory(find(), report)
    else:
        opened = listing.stored(store, data.declared, find, check, report)
        if opened.manifest.version:
            require_version(kind.where, opened.manifest.version, kind.version())
    names, in_flight = _label_names(opened, data, kind.where), images.InFlight()

    def decode(file: bytes, name: str, resolution: int) -> np.ndarray:
        if data.given:
            return layouts.moments(data.given, file, name, mirror=data.mirror)
        return images.decode(file, name, resolution, data.crop, in_flight)

    return Source(opened, names, kind.read, kind.near, kind.mixed, decode, in_flight)


def lists_mixed(source: SourceSettings) -> bool:
    """Whether a source is listed in the mixed order: each image has a file of its own."""
    many = isinstance(source, TarSource | ParquetSource)
    return not (many or (isinstance(source, LatentsSource) and layouts.many_in_a_file(source, mirror=False, labelled=False)))


def require_source(data: Data, store: Folder) -> None:
    """Raise UserError if the recipe's source is missing or empty; nothing is read if the store has its listing.

    If files hold many images each, only checks that there are files: the first image of a tar needs a read of the complete tar.
    """
    if not listing.folder_of(store, data.declared).exists(manifest.NAME):
        kind, left_out = open_kind(data), LeftOutByReason()
        contents = _find(kind)
        if kind.mixed and next(listing.kept(contents.entries, left_out), None) is None:
            raise contents.without_images(left_out)


def _find(kind: SourceKind) -> Contents:
    version = kind.version()  # before the labels are read: a file that is written meanwhile is refused later
    found = kind.find()
    entries = of_one_set(found.entries, kind.where)
    return found._replace(entries=entries, mixed=kind.mixed, missing=kind.missing, where=kind.where, version=version)


def _label_names(opened: Listing, data: Data, where: str) -> list[str]:
    """Return the classes' names, or their numbers if they have none; empty for unlabelled images.

    UserError if their number is not the recipe's.
    """
    if data.num_classes is None:
        return []
    names, largest = opened.manifest.label_names, opened.manifest.largest
    if names is None and largest >= data.num_classes:
        from_one = "; labels count from 0: do these begin at 1?" if largest == data.num_classes else ""
        raise UserError(f"data.num_classes: got {data.num_classes}, but {where} has labels up to {largest}{from_one}")
    if names is not None and len(names) != data.num_classes:
        shown = [printable(name) for name in names]
        only = len(names) == 1 and data.source.kind == "folder"
        within = f"; if the folders in {shown[0]} are the classes, give that one as data.source.url" * only
        found = f"the source has {counted(len(names), 'class')} ({some(shown)}){within}"
        raise UserError(f"data.num_classes: got {data.num_classes}, but {found}")
    return list(names or ()) or [str(i) for i in range(data.num_classes)]
