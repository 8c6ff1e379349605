"""Tars of images, WebDataset's shards among them: an index of the members once, then reads by range.

Listing reads each tar's headers (and its small `.cls` or `.json` members) through a window, several tars at once; what is read
later for a shard's worth of images is their own stretch of the tar, never the whole.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from typing import BinaryIO

from dis_scale.data.images import SUFFIXES
from dis_scale.data.listing import Entry, Found, number_or_name
from dis_scale.data.threads import in_order
from dis_scale.errors import StorageError, UserError
from dis_scale.recipe import TarSource
from dis_scale.storage import Folder

TARS_AT_ONCE = 8
LARGE_BYTES = 8 * 2**30
"""A tar beyond it is indexed by itself."""
SPAN_BYTES = 8 * 2**20
"""Images that lie so close are read in one go."""


def files_of(url: Folder, pattern: str, suffix: str) -> tuple[Folder, list[str]]:
    """The folder and its files by `pattern`, sorted; a URL that ends in `suffix` is one file. UserError where there are none."""
    if url.name.endswith(suffix):
        parent, name = Folder(url.url.rsplit("/", 1)[0]), url.name
        if not parent.exists(name):
            raise UserError(f"data.source.url: no file {url}")
        return parent, [name]
    names = [name for name in url.list() if fnmatch(name, pattern)]
    if not names:
        raise UserError(f"data.source.url: no files {pattern!r} in {url}; expected {url}/<name>{suffix}")
    return url, names


def find(root: Folder, names: list[str], settings: TarSource) -> Found:
    """Every image of the tars, in the order of their names and of their members.

    Several tars are indexed at once, but for large ones, whose members come as they are read: a tar may hold ten million.
    """

    def index(name: str) -> Iterable[Entry]:
        entries = _entries(root, name, settings)
        return entries if root.size(name) > LARGE_BYTES else list(entries)

    return Found(entry for tar in in_order(names, index, TARS_AT_ONCE) for entry in tar)


def read(root: Folder, entries: Sequence[Entry]) -> list[bytes]:
    """The images' bytes, by one range read; all entries lie in one tar, in its order."""
    first, last = entries[0].place[0], sum(entries[-1].place)
    data = root.read(entries[0].file, first, last) if last > first else b""
    return [data[start - first : start - first + length] for start, length in (entry.place for entry in entries)]


def near(first: Entry, entry: Entry) -> bool:
    """Whether `entry` is read in one go with `first`, which stands before it."""
    return first.file == entry.file and sum(entry.place) - first.place[0] <= SPAN_BYTES


def _entries(root: Folder, name: str, settings: TarSource) -> Iterator[Entry]:
    where = f"{root}/{name}"
    try:
        with root.open(name) as file:
            yield from _labelled(_members(file), name, where, settings)
    except (tarfile.TarError, EOFError) as error:
        raise StorageError(f"{where}: not a whole tar: {error}; mend it or take it out of data.source.files") from error


class _Member(tarfile.TarInfo):
    """A tar's member, with its bytes where it may hold a label."""

    data: bytes = b""


def _members(file: BinaryIO) -> Iterator[_Member]:
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
        while (member := _next(tar, file)) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
            if not member.isreg():
                continue
            assert isinstance(member, _Member)
            if member.name.endswith((".cls", ".json")):
                file.seek(member.offset_data)
                member.data = file.read(member.size)
            yield member


def _next(tar: tarfile.TarFile, file: BinaryIO) -> tarfile.TarInfo | None:
    """The next member; ReadError where the tar stops otherwise than with a block of zeros, which `tarfile` takes for its end."""
    member = tar.next()
    if member is None:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut at byte {tar.offset}")
    return member


def _labelled(members: Iterator[_Member], tar: str, where: str, settings: TarSource) -> Iterator[Entry]:
    """The images with their labels; what belongs together lies together, under one key, as in WebDataset."""
    key, images, label = "", list[_Member](), None
    for member in members:
        folder, _, base = member.name.rpartition("/")
        if base.startswith("."):
            continue  # macOS's ._x.jpg
        stem, _, kind = base.partition(".")
        if f"{folder}/{stem}" != key:
            yield from _together(images, label, tar, where, settings)
            key, images, label = f"{folder}/{stem}", [], None
        if kind == settings.image or (settings.image is None and f".{kind.lower()}".endswith(SUFFIXES)):
            images.append(member)
        elif kind == settings.label:
            label = _label(member, f"{where}: {member.name}", settings)
    yield from _together(images, label, tar, where, settings)


def _together(
    images: list[_Member], label: int | str | None, tar: str, where: str, settings: TarSource
) -> Iterator[Entry]:
    if len(images) > 1 and settings.label in ("cls", "json"):
        raise UserError(
            f"{where}: {images[0].name} and {images[1].name} are two images of one sample: "
            f"say which is the image, for example data.source.image = {images[0].name.rpartition('.')[2]}"
        )
    for image in images:
        found = _from_name(image.name, tar, settings) if settings.label in ("folder", "tar") else label
        if found is None or found == "":
            beside = "a folder around it" if settings.label == "folder" else f"a .{settings.label} beside it"
            raise UserError(
                f"{where}: image {image.name} has no label: expected {beside}, "
                "or say where labels stand: data.source.label = cls, json, folder or tar"
            )
        yield Entry(f"{tar}/{image.name}", found, tar, (image.offset_data, image.size))


def _from_name(name: str, tar: str, settings: TarSource) -> str:
    return tar.removesuffix(".tar") if settings.label == "tar" else name.rpartition("/")[0].rpartition("/")[2]


def _label(member: _Member, where: str, settings: TarSource) -> int | str:
    sought = "as text" if settings.label == "cls" else repr(settings.json_key)
    try:
        if settings.label == "cls":
            return number_or_name(member.data.decode())
        found = json.loads(member.data)[settings.json_key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: no label {sought} there: {type(error).__name__}: {error}") from error
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise UserError(f"{where}: label {found!r}, expected a number or a name")
    return found
