"""Tars of images, such as WebDataset's shards: the members are indexed once, then read by byte range.

Listing reads each tar's headers (and its small `.cls` or `.json` members) through a window, several tars at once. Later reads
fetch only the byte range of the images that are needed.
"""

import json
import posixpath
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from dis_scale.data.images import IMAGE_BYTES, SUFFIXES, ending, hidden
from dis_scale.data.listing import HIDDEN, Contents, Entry, LeftOut, number_or_name, of_files
from dis_scale.process.errors import StorageError, UserError, printable
from dis_scale.recipe import TarSource
from dis_scale.storage.folder import Folder

LARGE_BYTES = 8 * 2**30
"""A larger tar is indexed on its own."""
SPAN_BYTES = 8 * 2**20
"""Most bytes of images that one read returns, unless a single one is larger."""
MOST_ZEROS = 2**20 + 2 * tarfile.BLOCKSIZE
"""Most bytes of zeros at the end of a tar: two blocks, and the padding of a record, which has up to 1 MiB (`tar -b 2048`)."""
FEW_ZEROS = tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
"""Most bytes of zeros at the end of a tar with records of the default size. A download that lacks its last piece has more."""
LONG_END = "tars with over 10 KiB of zeros at the end: was one not downloaded to its end?"
LABEL_BYTES = 16 * 2**20
"""Most bytes of a `.cls` or `.json` member; larger ones are not read. A label has a few, a sample's metadata some kilobytes."""
LABELS_BYTES = 2**30
"""Most bytes of all labels of a tar of up to `LARGE_BYTES`. They are held in memory together, for eight tars at once."""
GLOBAL_BYTES = 64 * 2**10
"""Most bytes of global headers, which `tarfile` applies to every member. Git writes one of 52 bytes, with the commit's hash."""
NAME_CHARACTERS = 4096
"""Most characters of a member's name: the limit of a path."""
JOINED = "files that their tar has again: two sets with the same keys? If so, write the second with other keys"
"""Reason if a tar replaces at least half of its files. Keys of two joined sets may both begin at 0; `tar --update` replaces few."""
BESIDE = ("cls", "json")
"""Endings of the members beside the images that may hold the labels."""
LATENT = "latent"
"""Ending of a latent. A recipe of latents has no settings for a sample's image and label, so errors do not suggest them."""


def find(root: Folder, names: list[str], settings: TarSource, *, labelled: bool = True) -> Contents:
    """List every image of the tars, in the order of the tars' names and their members.

    Several tars are indexed at once. The members of a large tar are streamed instead, since it may hold ten million.
    """
    entries = of_files(root, names, lambda name: _entries(root, name, settings, labelled=labelled), LARGE_BYTES)
    return Contents(_with_classes(entries, root) if labelled and settings.label == "folder" else entries)


def _with_classes(entries: Iterable[Entry | LeftOut], root: Folder) -> Iterator[Entry | LeftOut]:
    """Yield the entries; raise UserError at the end if outer folders may be the classes instead of the images' own folders.

    This is so if one class is below several folders, as in `<class>/images/<image>`, unless these differ in numbers only (`part-0`,
    `part-1`) and there are other classes; and if classes are at two depths: `<class>/<image>` and `<class>/2019/<image>`."""
    first_of, depths, folders, twice = dict[str, str](), dict[int, str](), set[str](), list[str]()
    for entry in entries:
        folder = entry.name.partition("/")[2].rpartition("/")[0] if isinstance(entry, Entry) else ""
        if folder and folder not in folders and not twice:
            folders.add(folder)
            first = first_of.setdefault(folder.rpartition("/")[2], folder)
            depths.setdefault(folder.count("/"), folder)
            if _without_numbers(first) != _without_numbers(folder):
                twice = [first, folder]
        yield entry
    if len(first_of) == 1 < len(folders):
        twice = sorted(folders)[:2]
    if twice or len(depths) > 1:
        both = " and ".join(map(printable, twice or [*depths.values()][:2]))
        raise UserError(
            f"data.source.label: an image's folder is its class, and {both} {'would be one' if twice else 'are of two depths'}: "
            f"write the tars of {root} with one folder a class, or, if the first folders are the classes, unpack them and give "
            "that folder"
        )


def _without_numbers(folder: str) -> str:
    """Return the path of a folder's parent, without digits."""
    return re.sub(r"\d+", "", folder.rpartition("/")[0])


def read(root: Folder, entries: Sequence[Entry]) -> list[bytes]:
    """Return the images' bytes by one range read; all entries must be `near` the first. StorageError if the tar is too short."""
    first, last = entries[0].location[0], max(sum(entry.location) for entry in entries)
    if len(entries) == 1:
        last = min(last, first + IMAGE_BYTES + 1)  # one byte too many, so that decoding refuses it
    data = root.read(entries[0].file, first, last) if last > first else b""
    if len(data) != last - first:
        raise StorageError(
            f"{printable(f'{root}/{entries[0].file}')}: {len(data)} bytes from byte {first} on, expected {last - first}: it "
            "is shorter than it was listed; restore it, or change data.source.version and the sweep's name, and it is listed again"
        )
    return [data[start - first : start - first + length] for start, length in (entry.location for entry in entries)]


def near(first: Entry, entry: Entry) -> bool:
    """Return whether one read returns both entries. `entry` is listed after `first`, but may be before it in the tar."""
    start = first.location[0]
    return first.file == entry.file and start <= entry.location[0] and sum(entry.location) - start <= SPAN_BYTES


def _entries(root: Folder, name: str, settings: TarSource, *, labelled: bool) -> Iterator[Entry | LeftOut]:
    where = printable(f"{root}/{name}")
    masks = settings.image is None and not (labelled and settings.label in BESIDE)  # else two images of a sample are refused
    try:
        with root.open(name) as file:
            members = _members(file, where, settings.label if labelled and settings.label in BESIDE else "")
            if root.size(name) > LARGE_BYTES:
                final = _each_once(members, where, masks=masks)
            else:
                last = _last(members, where)
                final = _without_masks(last, where) if masks else last
            yield from _images(final, name, where, settings, labelled=labelled)
    except (tarfile.TarError, EOFError, RecursionError, ValueError, OverflowError) as error:
        # recursion in a chain of extended headers, values that are no numbers, sizes of 2^63 bytes
        first = root.read(name, 0, max(map(len, COMPRESSED)))
        if unpack := next((program for magic, program in COMPRESSED.items() if first.startswith(magic)), None):
            raise StorageError(f"{where}: it is compressed, and images are read by byte range: {unpack} it") from error
        raise StorageError(f"{where}: not a complete tar: {error}; repair it or remove it from data.source.files") from error


COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of compressed files, and the program that unpacks them."""
EXTENDED = {
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
}  # fmt: skip
"""Types of headers that extend the header of the next member."""


_DIGITS = re.compile(rb"\d{100}")
_LENGTH, _RECORD = re.compile(rb"\d{1,20}"), re.compile(rb"\d{1,20} [^=]+=.*\n", re.DOTALL)


class _Member(tarfile.TarInfo):
    """A member of a tar. Refuses headers that are too long to read."""

    where = ""
    extended_bytes = 0
    """Bytes of extended headers since the last member. Each tar has a subclass of its own to count them."""
    global_bytes = 0
    """Bytes of global headers so far, which `tarfile` keeps for all later members."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the member of a header. ReadError if extended headers would fill the memory. ReadError also for a negative size,
        with which `tarfile` would return to an earlier header for ever."""
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise tarfile.ReadError(f"a member of {member.size:,} bytes")
        if member.type == tarfile.XGLTYPE:
            cls.global_bytes += member.size
        else:
            cls.extended_bytes = cls.extended_bytes + member.size if member.type in EXTENDED else 0
        if (held := cls.extended_bytes + cls.global_bytes) > LABEL_BYTES:
            raise tarfile.ReadError(f"extended headers of {held:,} bytes, and at most {LABEL_BYTES:,} are read")
        if cls.global_bytes > GLOBAL_BYTES:
            raise tarfile.ReadError(f"global headers of {cls.global_bytes:,} bytes, and at most {GLOBAL_BYTES:,} are read")
        return member

    def _proc_pax(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Read an extended header. ReadError for one that costs `tarfile` of Python 3.11 hours or unbounded memory (CVE-2024-6232).
        ReadError also if it gives the next member a negative size."""
        assert tar.fileobj is not None
        first = tar.fileobj.tell()
        header = tar.fileobj.read(self.size)
        if _DIGITS.search(header):
            raise tarfile.ReadError("an extended header of digits")
        _require_records(header)
        tar.fileobj.seek(first)
        member: tarfile.TarInfo = super()._proc_pax(tar)  # type: ignore[misc]
        if member.size < 0:
            raise tarfile.ReadError(f"a member of {member.size:,} bytes")
        return member

    def _refuse_holes(self, of: object = None, *_: object) -> Self:
        """Raise StorageError before `tarfile` reads the map of the holes, whose length has no bound."""
        name = of.name if isinstance(of, tarfile.TarInfo) else self.name
        raise StorageError(f"{self.where}: {printable(name)} has holes that are left out: write it without --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_holes


def _require_records(header: bytes) -> None:
    """Raise ReadError unless each record has the length that it states: `tarfile` takes all up to any later `=` as its name."""
    first = 0
    while first < len(header) and header[first]:  # zeros fill the rest
        length = _LENGTH.match(header, first)
        end = first + int(length[0]) if length else 0
        if end > len(header) or not _RECORD.fullmatch(header, first, end):
            raise tarfile.ReadError("an extended header whose records are not as long as they say")
        first = end


class _InTar(NamedTuple):
    """A member that is no folder: its path when unpacked, the location of its bytes, and the bytes if it may hold a label."""

    name: str
    start: int
    size: int
    data: bytes = b""
    why: str = ""
    """Reason to leave it out; empty for a file."""


def _last(members: Iterable[_InTar], where: str) -> Iterator[_InTar]:
    """Yield the members as if the tar was unpacked: of those with one name the last, in the place of the first.

    The others get a reason to leave them out. StorageError if the labels, which are in memory together, are too large.
    """
    final, replaced, held_bytes = dict[str, _InTar](), list[_InTar](), 0
    for member in members:
        if (held_bytes := held_bytes + len(member.data)) > LABELS_BYTES:
            raise StorageError(
                f"{where}: its labels have over {LABELS_BYTES:,} bytes: split it, or write only what the label needs"
            )
        if earlier := final.get(member.name):
            replaced.append(earlier)
        if member.why:  # unpacked, a link takes the file's place
            final.pop(member.name, None)
            yield member
        else:
            final[member.name] = member
    why = JOINED if 2 * len(replaced) >= len(final) else "files that their tar has again"
    yield from (member._replace(why=why) for member in replaced)
    yield from final.values()


def _each_once(members: Iterable[_InTar], where: str, *, masks: bool) -> Iterator[_InTar]:
    """Yield the members of a large tar as they come; raise UserError at the end if two have one name, or, with `masks`, if two
    images differ in their endings only. Keeps hashes of the names: there may be ten million members."""
    names, roots, images = array("q"), array("q"), array("q")
    for member in members:
        if not member.why:
            names.append(hash(member.name))
            if masks and not hidden(member.name) and member.name.lower().endswith(SUFFIXES):
                root, _, kind = member.name.rpartition(".")
                roots.append(hash(root))
                images.append(hash((root, kind.lower())))
        yield member
    twice = len(names) - len(np.unique(names))
    if not twice and len(np.unique(roots)) < len(np.unique(images)):
        raise UserError(
            f"{where}: images of it differ in their endings only, as 1.jpg and its mask 1.png: say which to train on, for example "
            "data.source.image = jpg, or rename them"
        )
    if twice:
        raise UserError(
            f"{where}: it has a file twice, as tar --update leaves it, and the last one counts; this is found in tars of up to "
            f"{LARGE_BYTES // 2**30} GiB only: unpack it, and write it again"
        )


def _kind(name: str) -> str:
    """Return a file's ending as WebDataset defines it, all after the first dot; in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _members(file: BinaryIO, where: str, label: str) -> Iterator[_InTar]:
    """Yield all members except folders; those with the ending `label`, if it is not empty, with their bytes."""
    with tarfile.open(fileobj=file, mode="r:", tarinfo=type("_Member", (_Member,), {"where": where})) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps all members
            _require_possible(member)
            if member.isdir():
                continue
            if member.issparse():  # in a format that `tarfile` may add later
                member._refuse_holes()  # type: ignore[attr-defined]
            name = posixpath.normpath(member.name)  # ./1.png and 1.cls are one sample
            if member.islnk() and posixpath.normpath(member.linkname) == name:
                continue  # tar was given the file twice
            if not member.isreg():
                links = member.islnk() or member.issym()
                yield _InTar(name, 0, 0, why="links in tars" if links else "members of tars that are no files")
                continue
            data = b""
            if label and _kind(name) == label:
                if member.size > LABEL_BYTES:
                    raise StorageError(f"{where}: {printable(name)} has {member.size:,} bytes, and a label at most {LABEL_BYTES:,}")
                file.seek(member.offset_data)
                data = file.read(member.size)
            yield _InTar(name, member.offset_data, member.size, data)
        if _zeros_at_the_end(tar, file) > FEW_ZEROS:
            yield _InTar("its end", 0, 0, why=LONG_END)


def _require_possible(member: tarfile.TarInfo) -> None:
    """Raise ReadError for an invalid size or name from an extended header, which `tarfile` applies after `frombuf`'s check."""
    if member.size < 0:
        raise tarfile.ReadError(f"a member of {member.size:,} bytes")
    if len(member.name) > NAME_CHARACTERS:
        raise tarfile.ReadError(f"a name of {len(member.name):,} characters, and at most {NAME_CHARACTERS:,} are read")


def _zeros_at_the_end(tar: tarfile.TarFile, file: BinaryIO) -> int:
    """Return the number of zero bytes at the end of the tar. ReadError if there is less than a block of them, or anything else.

    `tarfile` accepts a truncated tar. It stops at the first block of zeros: a hole, or the end of the first of two joined tars.
    """
    file.seek(tar.offset)
    rest = file.read(MOST_ZEROS + 1)
    if not tarfile.BLOCKSIZE <= len(rest) <= MOST_ZEROS or rest.strip(b"\0"):
        raise tarfile.ReadError(
            f"damaged or truncated at byte {tar.offset}, or there is another tar after it; it ends with zeros, of up to 1 MiB"
        )
    return len(rest)


def _images(members: Iterator[_InTar], tar: str, where: str, settings: TarSource, *, labelled: bool) -> Iterator[Entry | LeftOut]:
    """Yield the images, with their labels if `labelled`; the files of one sample are adjacent and share a key, as in WebDataset."""
    key, images, labels = "", list[_InTar](), list[_InTar]()
    wanted = settings.image and settings.image.lower().removeprefix(".")
    for member in members:
        folder, _, base = member.name.rpartition("/")
        if member.why or hidden(member.name):  # such as hard-linked files, and macOS's ._x.jpg
            yield LeftOut(f"{tar}/{member.name}", HIDDEN if hidden(member.name) else member.why)
            continue
        stem, kind = base.partition(".")[0], _kind(base)
        if f"{folder}/{stem}" != key:
            yield from _sample_entries(images, labels, tar, where, settings, labelled=labelled)
            key, images, labels = f"{folder}/{stem}", [], []
        if f".{kind}".endswith(SUFFIXES) if wanted is None else kind == wanted:
            images.append(member)
        elif kind == settings.label and kind in BESIDE:
            labels.append(member)
        else:
            yield LeftOut(f"{tar}/{member.name}", ending(base))
    yield from _sample_entries(images, labels, tar, where, settings, labelled=labelled)


def _sample_entries(
    images: list[_InTar], labels: list[_InTar], tar: str, where: str, settings: TarSource, *, labelled: bool
) -> Iterator[Entry | LeftOut]:
    if not images:
        yield from (LeftOut(f"{tar}/{member.name}", "labels without an image") for member in labels)
        return
    if len({member.data for member in labels}) > 1:
        raise UserError(
            f"{where}: {printable(labels[0].name)} and {printable(labels[-1].name)} are two labels of one sample: write the tar "
            "again with one of them"
        )
    label = _label(labels[-1], f"{where}: {printable(labels[-1].name)}", settings) if labels and labelled else None
    latents = settings.image == LATENT
    if len(images) > 1:
        if latents:
            raise UserError(f"{where}: {printable(images[0].name)} is there twice: write the tar again with one of them")
        _refuse_two(images[:2] if labelled and settings.label in BESIDE else _mask_beside(images), where)
    for image in images:
        if not labelled:
            image_label: int | str | None = 0
        else:
            image_label = _from_name(image.name, tar, settings) if settings.label in ("folder", "tar") else label
        if image_label is None or image_label == "":
            expected = "a folder around it" if settings.label == "folder" else f"a .{settings.label} next to it with one"
            otherwise = "" if latents else ", or where the labels of images are: data.source.label = cls, json, folder or tar"
            raise UserError(
                f"{where}: {printable(image.name)} has no label: expected {expected}; otherwise set data.num_classes: "
                f"none{otherwise}"
            )
        yield Entry(f"{tar}/{image.name}", image_label, tar, (image.start, image.size))


def _refuse_two(pair: Sequence[_InTar] | None, where: str) -> None:
    """UserError for two images of one sample, if any."""
    if pair:
        raise UserError(
            f"{where}: {printable(pair[0].name)} and {printable(pair[1].name)} are two images of one sample: "
            f"a sample's name ends at its first dot; say which is the image, for example data.source.image = "
            f"{printable(pair[0].name.rpartition('/')[2].partition('.')[2])}, or rename them"
        )


def _without_masks(members: Iterable[_InTar], where: str) -> Iterator[_InTar]:
    """Yield the members; raise UserError before the first if one is a mask of an image. Files of a tar are in any order."""
    kept = list(members)
    shown = (each for each in kept if not (each.why or hidden(each.name)))
    _refuse_two(_mask_beside([each for each in shown if each.name.lower().endswith(SUFFIXES)]), where)
    yield from kept


def _mask_beside(images: Sequence[_InTar]) -> tuple[_InTar, _InTar] | None:
    """Return an image and its probable mask: the names differ in an added word or in their endings only. None if there is no mask.

    Masks of 1.jpg are 1.png, 1.mask.jpg or 1.seg.png; not 1.2.jpg, which is another number.
    """
    first = dict[str, tuple[_InTar, str]]()
    named = [(image, root, kind.lower()) for image in images for root, _, kind in [image.name.rpartition(".")]]
    for image, root, kind in named:
        other, of_other = first.setdefault(root, (image, kind))
        if of_other != kind:
            return other, image
    for image, root, kind in named:
        for shorter in accumulate(root.split(".")[:-1], "{}.{}".format):
            whole, of_whole = first.get(shorter, (None, ""))
            if whole and not (of_whole == kind and root[len(shorter) + 1 :].isdigit()):
                return whole, image
    return None


def _from_name(name: str, tar: str, settings: TarSource) -> str:
    return tar.removesuffix(".tar") if settings.label == "tar" else name.rpartition("/")[0].rpartition("/")[2]


def _label(member: _InTar, where: str, settings: TarSource) -> int | str:
    sought = "as text" if settings.label == "cls" else repr(settings.json_key)
    try:
        if settings.label == "cls":
            return number_or_name(member.data.decode("utf-8-sig"))
        label = json.loads(member.data)[settings.json_key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: no label {sought}: {type(error).__name__}: {error}") from error
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise UserError(f"{where}: label {label!r:.99}, expected a number or a name")
    if isinstance(label, int):
        return label
    return number_or_name(label.encode(errors="backslashreplace").decode())  # JSON may have half a surrogate pair
