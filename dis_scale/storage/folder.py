"""The only door to object storage: read, list, write atomically, create only if absent, retry temporary failures.

A sweep's state is files below one URL (a local path, `s3://bucket/prefix`, any fsspec store) and is stored nowhere else. A
write is atomic: on disk by a temporary file and a rename, in an object store by design.

Pitfalls:
* s3fs reads long objects by ranges, ten at once. A range that comes short becomes zeros; only a hash shows it.
* s3fs lists a folder completely in memory, some kB per object.
* fsspec's local `mode="create"` is not atomic, so local files use `os.link`.
* S3 answers 409 to `If-None-Match` while another request for the object is in progress: it is no answer yet, and is retried.
* If an `If-None-Match` race is lost, Ceph's gateway answers 412; s3fs raises OSError(EINVAL), not FileExistsError.
* Ceph ignores `If-None-Match` for a multipart upload, so `create` is for small objects.
* A process with an S3 client must not fork: when a child that reads S3 ends, its parent's next read waits for 60 s.
* An S3 client reads a key from a file or the environment once. After a rotation of keys only a new client has the new one.
"""

import contextlib
import errno
import io
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import has_magic
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from dis_scale.process import faults
from dis_scale.process.errors import DisScaleError, StorageError, UserError, nearest, printable
from dis_scale.process.settings import absolute
from dis_scale.process.threads import in_order
from dis_scale.storage import local, s3
from dis_scale.storage.local import Scanned
from dis_scale.storage.retries import PATIENT_TRIES, TRIES, cause_of, http_status, with_retries

T = TypeVar("T")

ABANDONED_S = 86_400.0
"""Time after which nobody writes an incomplete file any more."""
_INCOMPLETE = re.compile(re.escape(local.TEMPORARY) + "[0-9a-f]{32}$")
"""End of the name of a file that is being written, or that a killed process has left."""
WEB = ("http://", "https://")
"""Beginnings of URLs of web servers, which list no folders."""
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of a path that does not exist, or of a broken link."""
_VERSIONS = (
    "md5Hash", "generation", "Content-MD5", "Digest", "blob_id", "xet_hash", "sha", "hex", "ETag", "etag", "mtime",
    "last_modified", "Last-Modified", "LastModified", "updated", "modificationTime", "modify", "modified",
)  # fmt: skip
"""Keys of an object's hash or time in fsspec's file systems: S3, Google, Azure, Hugging Face, HTTP, GitHub, git, HDFS, FTP.

Hashes of the content come first: Google's `etag` changes with the metadata, and a composed object has no `md5Hash`.
"""
UNKNOWN = "of unknown time"
"""End of the version of an object whose store states neither hash nor time."""
LISTING_CACHES = ("gs://", "gcs://", "az://", "abfs://", "abfss://")
"""Stores beside S3 whose cache of listings is turned off; `require_usable` refuses any store that remembers listings."""


@dataclass(frozen=True)
class Folder:
    """A folder in storage, named by its URL; `folder / "a/b"` is a folder inside it. Methods take paths relative to it.

    Every method raises StorageError with the object and the cause, StorageAway if storage did not answer after all retries, and
    FileNotFoundError for a missing object.
    """

    url: str
    tries: int = field(default=TRIES, compare=False, repr=False)

    def __truediv__(self, name: str) -> "Folder":
        return replace(self, url=f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def patient(self) -> "Folder":
        """The same folder with more retries: about a minute, long enough for a server to restart."""
        return replace(self, tries=PATIENT_TRIES)

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None in an object store."""
        return Path(self.url.removeprefix("file://")) if "://" not in self.url or self.url.startswith("file://") else None

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the object, or its bytes [start, end)."""
        data: bytes = self._do("read", path, lambda fs, full: fs.cat_file(full, start=start, end=end))
        if end is not None and len(data) > end - (start or 0):
            raise StorageError(f"cannot read {self}/{path}: the server ignores byte ranges: copy it to a disk or a store")
        return data

    def read_sized(self, path: str, size_bytes: int) -> bytes:
        """Return an object that should have this size; a longer one may be cut after one byte more.

        A large object is read from S3 by ranges, each with retries of its own: among the 448 ranges of 7 GB there is often one that
        is answered "slow down", and s3fs would begin again with the first.
        """
        if not self.url.startswith("s3://") or size_bytes <= s3.RANGE_BYTES:
            return self.read(path)
        starts = range(0, size_bytes, s3.RANGE_BYTES)
        ranges = [(start, min(start + s3.RANGE_BYTES, size_bytes)) for start in starts]
        ranges[-1] = ranges[-1][0], size_bytes + 1  # no range for this byte only: an object of the right size lacks it
        return b"".join(in_order(ranges, lambda each: self._range(path, *each), s3.RANGES_AT_ONCE))

    def read_up_to(self, path: str, most: int) -> bytes:
        """Return the object, or its first `most` + 1 bytes if it is longer than `most`. One request, without one for the size."""
        if self.local:
            try:
                large = (self.local / path).stat().st_size > most
            except OSError:
                large = False  # reading it gives the reason
            return self.read(path, 0, most + 1) if large else self.read(path)
        return self._range(path, 0, most + 1)

    def _range(self, path: str, start: int, end: int) -> bytes:
        """Return the object's bytes [start, end); none if it ends before `start`."""
        try:
            return self.read(path, start, end)
        except StorageError as error:
            if error.__cause__ and http_status(error.__cause__) == 416:
                return b""
            raise

    def open(self, path: str, buffer_bytes: int = 2**20) -> io.BufferedReader:
        """Open the object as a seekable file that is read by ranges of at least `buffer_bytes`."""
        return io.BufferedReader(_Ranges(self, path), buffer_bytes)

    def size(self, path: str) -> int:
        """Return the object's size in bytes."""
        size = self._do("look up", path, lambda fs, full: fs.size(full))
        if size is None:  # some web servers
            raise StorageError(f"cannot read {self}/{path}: the server tells no size: copy it to a disk or a store")
        return int(size)

    def version(self, path: str) -> str:
        """Return words that change when the object is written again: its size with its ETag or time."""
        facts = self._do("look up", path, lambda fs, full: fs.info(full))
        known = (facts.get(key) for key in _VERSIONS)
        return f"{facts.get('size')} bytes, {next((str(each).strip(chr(34)) for each in known if each), UNKNOWN)}"

    def write(self, path: str, data: bytes) -> None:
        """Write the object atomically; replaces an older one."""
        if self.local:
            self._do("write", path, lambda _, full: local.replace(Path(full), data))
        else:
            self._do("write", path, lambda fs, full: fs.pipe_file(full, data))

    def create(self, path: str, data: bytes) -> bool:
        """Write the object only if it does not exist; return False if another process was first. For small objects."""
        try:
            if self.local:
                self._do("create", path, lambda _, full: local.create(Path(full), data))
            else:
                self._do("create", path, lambda fs, full: fs.pipe_file(full, data, mode="create"))
        except FileExistsError:
            return False
        return True

    def exists(self, path: str) -> bool:
        """Return whether there is an object or a folder.

        This asks `info`: after any error `exists` of most file systems returns false, and a resume point would count as missing. S3
        and web servers are asked by `exists`. That of S3 tells errors apart, and a web server may refuse what does not exist.
        """

        def look(fs: Any, full: str) -> bool:
            try:
                if self.url.startswith(("s3://", *WEB)):
                    return bool(fs.exists(full))
                return bool(Path(full).stat() if self.local else fs.info(full))
            except OSError as error:
                if error.errno in _NOT_THERE or isinstance(error, FileNotFoundError):
                    return False
                raise

        return self._do("look up", path, look)

    def time_s(self) -> float:
        """Return the Unix time by the clock of the store, or of a file system's server, to a second.

        By this machine's clock for a folder that cannot be written, and for a store that reports no times.
        """
        if self.url.startswith("s3://"):
            return self._do("list", "", s3.time_s)
        try:
            return self._do("write", f"time{local.TEMPORARY}{uuid.uuid4().hex}", _time_of_a_write)
        except (StorageError, FileNotFoundError, NotImplementedError):
            return time.time()

    def folders(self, path: str = "") -> list[str]:
        """Return the sorted names of the folders directly below `path`, links to folders included; none if it does not exist."""
        return sorted({name for name, is_folder in self._children(path) if is_folder} - {""})

    def files(self) -> Iterator[str]:
        """Yield the names of the files directly in the folder, links to files and broken links included; none if it is missing."""
        return (name for name, is_folder in self._children("") if not is_folder)

    def _children(self, path: str) -> Iterable[tuple[str, bool]]:
        if self.local:
            try:
                return [(name, identity is not None) for name, identity, _ in self._scan(path)]
            except FileNotFoundError:
                return []
        if self.url.startswith("s3://"):
            return ((_base(key), is_folder) for key, is_folder in s3.children(self._pages(path, Delimiter="/")))
        return ((_base(e["name"]), e["type"] == "directory") for e in self._entries(path, detail=True))

    def abandoned(self) -> list[str]:
        """Return the incomplete files directly in the folder that were not written to for a day: their writers were killed."""
        found = [entry for entry in self._entries("", detail=True) if _INCOMPLETE.search(entry["name"])] if self.local else []
        now_s = self.time_s() if found else 0.0
        return sorted(_base(entry["name"]) for entry in found if now_s - entry["mtime"] > ABANDONED_S)

    def list(self, path: str = "", *, incomplete: bool = False) -> list[str]:
        """Return the sorted names directly below `path`, none if it does not exist; `incomplete` files only if wanted."""
        if self.url.startswith("s3://"):  # names only: s3fs would keep some kB for each
            names = [key for key, _ in s3.children(self._pages(path, Delimiter="/"))]
        else:
            names = self._entries(path, detail=False)
        return sorted({_base(name) for name in names if _shown(name, path, incomplete=incomplete)} - {""})

    def walk(self, path: str = "") -> Iterator[str]:
        """Yield the paths, relative to `path`, of all files at any depth below it, in the order of their UTF-8; links are followed.

        From S3 page by page, so that a million names are never in memory. Broken links are yielded; the error of reading one names
        it. A link to a folder that contains the link is yielded as a file, and not followed.
        """
        return (name for name, _ in self.walk_with_links(path))

    def walk_with_links(self, path: str = "") -> Iterator[tuple[str, bool]]:
        """Yield the paths as `walk`, each with whether it is a link on a local disk, as the listing of its folder shows."""
        if self.local:
            root = self.local / path
            return self._walk_local(path, "", frozenset([local.identity(root.stat())] if root.exists() else ()))
        if self.url.startswith("s3://"):
            return ((name, False) for name in self._walk_pages(path))
        return ((name, False) for name in sorted((self / path if path else self).tree(), key=os.fsencode))

    def _walk_local(self, root: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
        try:
            entries = self._scan(f"{root}/{below}".strip("/"))
        except FileNotFoundError as error:
            if not above:
                return
            gone = "/".join(filter(None, (self.url, root, below)))
            raise StorageError(f"{gone}: it was there, and is gone while it is listed: list it again") from error
        for name, here, is_link in sorted(entries, key=lambda found: os.fsencode(found[0] + "/" * bool(found[1]))):
            if here is None or here in above:
                yield below + name, is_link
            else:
                yield from self._walk_local(root, f"{below}{name}/", above | {here})

    def _walk_pages(self, path: str) -> Iterator[str]:
        last = ""
        for page in self._pages(path):
            for name in (key.removeprefix(page["Prefix"]) for key in s3.keys(page)):
                if name < last:
                    raise StorageError(
                        f"{self.url}/{path}: names are not listed in order ({printable(f'{name} after {last}')}): "
                        "use another bucket"
                    )
                if not name.endswith("/") and name:  # a folder's marker
                    yield name
                last = name

    def _pages(self, path: str, **how: str) -> Iterator[s3.Page]:
        return s3.pages(partial(self._do, "list", path), **how)

    def _scan(self, path: str) -> Sequence[Scanned]:
        return self._do("list", path, lambda _, full: local.scan(full))

    def sizes(self, path: str = "") -> dict[str, int]:
        """Return names as `list`, each with its size in bytes; the size of a folder has no meaning."""
        entries = self._entries(path, detail=True)
        return {_base(entry["name"]): entry.get("size") or 0 for entry in entries if _shown(entry["name"], path)}

    def tree(self, *, behind_links: bool = False) -> dict[str, int]:
        """Return the paths of all files below the folder, incomplete ones included, each with its size in bytes.

        A link counts as one file, unless the files `behind_links` are wanted. Files that are deleted meanwhile are left out.
        """
        if self.local:
            return dict(self._sizes_below("", frozenset(), behind_links=behind_links))
        if self.url.startswith("s3://"):  # by pages: s3fs would keep some kB for each, and begin again after an error
            return {name: size for page in self._pages("") for name, size in s3.sizes(page)}

        def find(fs: Any, full: str) -> dict[str, int]:
            found = fs.find(full, detail=True).values()
            return {entry["name"].removeprefix(f"{full}/"): entry.get("size") or 0 for entry in found}

        return self._do("list", "", find)

    def _sizes_below(self, path: str, above: frozenset[tuple[int, int]], *, behind_links: bool) -> Iterator[tuple[str, int]]:
        """Yield the files below a local folder with their sizes. fsspec and `os.walk` would leave out what they cannot list."""
        try:
            entries = self._scan(path)
        except FileNotFoundError:  # deleted meanwhile
            entries = []
        for name, here, is_link in entries:
            below = f"{path}/{name}".lstrip("/")
            if here is not None and here not in above and (behind_links or not is_link):
                yield from self._sizes_below(below, above | {here}, behind_links=behind_links)
            elif is_link and not Path(f"{self.local}/{below}").exists():  # it leads nowhere, or to itself
                if not behind_links:
                    yield below, 0
            elif here is None or not behind_links:
                with contextlib.suppress(FileNotFoundError):
                    yield below, self.size(below)

    def _entries(self, path: str, *, detail: bool) -> Any:
        try:
            return self._do("list", path, lambda fs, full: fs.ls(full, detail=detail))
        except FileNotFoundError:
            return []

    def delete(self, path: str = "") -> None:
        """Delete an object, or a folder with everything below it, if it exists."""

        def remove(fs: Any, full: str) -> None:
            if self.local or not has_magic(full):
                fs.rm(full, recursive=True)
                return
            for name in fs.find(full):  # `rm` would take `*`, `?` and `[` for a pattern, and delete what others wrote
                fs.rm_file(name)

        with contextlib.suppress(FileNotFoundError):
            if not self.url.startswith("s3://"):
                self._do("delete", path, remove)
                return
            for keys in chain([self._do("list", path, s3.own_key)], map(s3.keys, self._pages(path))):
                if keys:
                    self._do("delete", path, partial(s3.delete, keys=keys))

    def require_usable(self) -> None:
        """Raise UserError if the folder cannot be written and read, returns old listings, or cannot create only if absent.

        StorageAway if it does not answer.
        """
        if self.url.startswith("memory://"):
            raise UserError(f"storage {self.url} is in the memory of one process, and no other sees it: use a local folder")
        probe, data = f".probe-{uuid.uuid4().hex}", b"dis-scale write test\n"
        try:
            self.create(f"{probe}/1", data)  # false if its answer was lost and the retry found what it had written
            second = self.create(f"{probe}/1", data)
            same, before = self.read(f"{probe}/1") == data, self.list(probe)
            self._write_as_another_client(f"{probe}/2", data)
            after = self.list(probe)
            self.delete(probe)
        except (StorageError, UserError, OSError, ValueError, TypeError) as error:
            with contextlib.suppress(DisScaleError, OSError):
                self.delete(probe)
            raise UserError(f"storage {self.url} cannot be used: {cause_of(error)}") from error
        # fsspec's own `create` first checks and then writes, so that two processes may both write.
        own = getattr(_client(self.url)[0].pipe_file, "__func__", None)
        looks_first = self.local is None and own is AbstractFileSystem.pipe_file
        if second or not same or looks_first:
            raise UserError(
                f"storage {self.url} cannot create an object only if absent (If-None-Match), so two runs could overwrite each "
                "other: use a local folder, S3, Ceph or Azure"
            )
        if (before, after) != (["1"], ["1", "2"]):
            raise UserError(
                f"storage {self.url} lists {', '.join(after) or 'nothing'} after another client has written 1 and 2: runs would "
                "not see each other: use a local folder, S3, Ceph or Azure"
            )

    def _write_as_another_client(self, path: str, data: bytes) -> None:
        """Write the object by an instance of fsspec that shares nothing with ours, such as a cache of listings."""
        full = f"{self.url}/{path}"
        fs, inner = fsspec.url_to_fs(full, **_options(full), skip_instance_cache=True)
        write = (lambda: local.replace(Path(inner), data)) if self.local else (lambda: fs.pipe_file(inner, data))
        with_retries(write, f"cannot write {full}", self.tries)

    def _do(self, verb: str, path: str, action: Callable[[Any, str], T]) -> T:
        full = f"{self.url}/{path}" if path else self.url
        store = ("/".join(full.split("/")[:3]), verb)

        def once() -> T:
            fs, base = _client(self.url)
            faults.at(verb, path=full)
            try:
                return action(fs, f"{base}/{path}" if path else base)  # fsspec would expand `*` and `::` in a name
            except NotADirectoryError as error:
                if verb == "list":  # below a file there is nothing
                    raise FileNotFoundError(errno.ENOENT, str(error), full) from error
                raise

        done = with_retries(once, f"cannot {verb} {full}", self.tries, None if self.local else store)
        if verb in ("write", "create"):
            faults.at("written", path=full)
        return done


class _Ranges(AbstractBufferedFile):  # type: ignore[misc]
    """An object read by ranges, each with the folder's retries; buffered by `Folder.open`."""

    def __init__(self, folder: Folder, path: str) -> None:
        self._folder = folder
        super().__init__(None, path, cache_type="none", size=folder.size(path))

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._folder.read(self.path, start, min(end, self.size))

    def seek(self, loc: int, whence: int = io.SEEK_SET) -> int:
        """Seek as in a file, with OSError for a position before the start: `zipfile` seeks there for the end of an empty file."""
        try:
            return int(super().seek(loc, whence))
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error), self.path) from error


def open_folder(url: str | os.PathLike[str]) -> Folder:
    """Return the folder at a URL or local path (made absolute); UserError for an empty one, which would be the current folder."""
    if not (text := os.fspath(url)).strip():
        raise UserError("the path or URL of a folder is empty: is a variable not set?")
    try:
        return Folder(absolute(text))
    except ValueError as error:
        raise UserError(str(error)) from error


def missing(folder: Folder) -> str:
    """Return words on the first missing part of a path or URL, with the nearest name beside it; '' if no part is missing."""
    start, mark, path = folder.url.rpartition("://")
    parts = path.split("/")
    above = [start + mark + ("/".join(parts[:depth]) or "/") for depth in range(1, len(parts) + 1)]  # from the root or bucket on
    for (parent, child), name in zip(pairwise(above), parts[1:], strict=True):
        if not Folder(child).exists(""):
            names = Folder(parent).list()
            return ("" if child == folder.url else f": {child} is missing") + nearest(name, names)
    return ""


def locate(url: str) -> tuple[Folder, str]:
    """Return the folder and the name of one file at a URL or local path."""
    path, mark, query = url.partition("?") if url.startswith(WEB) else (url, "", "")
    parent, slash, name = path.rpartition("/")
    if parent.endswith(":/"):
        raise UserError(f"{url}: expected a file in it, got the name of a bucket or a server")
    return open_folder(parent or slash or "."), name + mark + query


def _base(entry: str) -> str:
    return entry.rstrip("/").rsplit("/", 1)[-1]


def _shown(entry: str, path: str, *, incomplete: bool = False) -> bool:
    """Return whether to list an entry: not the folder's own marker, and an incomplete file only if wanted."""
    return not entry.endswith(f"/{path}/") and (incomplete or not _INCOMPLETE.search(entry))


def _time_of_a_write(fs: Any, full: str) -> float:
    """Return the time that a store gives an object which is written now."""
    fs.pipe_file(full, b"")
    try:
        return float(fs.modified(full).timestamp())
    finally:
        fs.rm_file(full)


def _options(url: str) -> dict[str, Any]:
    """Return the options of fsspec: no cache of listings, since other processes also write."""
    on_s3 = url.startswith("s3://")
    cached = {"use_listings_cache": False} if on_s3 or url.startswith(LISTING_CACHES) else {}
    return cached | (s3.options() if on_s3 else {})


def _client(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path there. UserError for `::`, which fsspec takes for a chain of file systems."""
    if "::" in url:
        raise UserError(f"storage {url}: got '::' in the path of a folder, and it separates two stores: rename the folder")
    if url.startswith("hf://"):
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when its client is imported
    try:
        fs, path = fsspec.url_to_fs(url, **_options(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"storage {url}: {error}; expected a path, s3://bucket/prefix, or another URL that fsspec knows") from error
    if url.startswith("s3://"):
        s3.without_retries(fs)
    return fs, path
