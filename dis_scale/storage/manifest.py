"""A thing exists when its manifest does: files first, hashed; one small manifest last.

A folder without a manifest is incomplete: it may be overwritten or deleted. Read next: folder.py, for atomic writes.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from dis_scale.process.errors import Damaged
from dis_scale.process.threads import in_order
from dis_scale.storage.document import Document
from dis_scale.storage.folder import Folder

NAME = "manifest.json"
READING_THREADS = 4
"""Files that are read and hashed at once; each is in memory meanwhile."""


@dataclass(frozen=True)
class Digest:
    """Size and hash of a stored file."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "Digest":
        return cls(len(data), hashlib.sha256(data).hexdigest())


def read_verified(folder: Folder, name: str, expected: Digest, *, hashed: bool = True) -> bytes:
    """Return one file after comparing it with its digest; Damaged names a missing, short or damaged one.

    With `hashed=False`, for a file that was verified before, only its size is compared.
    """
    try:
        data = folder.read_sized(name, expected.size_bytes)
    except FileNotFoundError as error:
        raise Damaged(f"{folder}/{name}", "missing, though its manifest names it") from error
    if len(data) != expected.size_bytes:
        raise Damaged(f"{folder}/{name}", f"{len(data)} bytes, its manifest says {expected.size_bytes}")
    if hashed and Digest.of(data).sha256 != expected.sha256:
        raise Damaged(f"{folder}/{name}", "its sha256 differs from the manifest's")
    return data


class Sealed(Document):
    """A document without which its folder does not exist."""

    NAME: ClassVar[str] = NAME

    @classmethod
    def require(cls, folder: Folder) -> Self:
        """Return the manifest of a folder that must be complete; Damaged if it has none."""
        manifest = cls.find(folder)
        if manifest is None:
            raise Damaged(folder, f"no {cls.NAME}: the folder is incomplete or was deleted")
        return manifest


class Manifest(Sealed):
    """The files of a folder, by name; subclasses add facts about them."""

    files: dict[str, Digest]
    below: str | None = None
    """Folder of the files within that of the manifest; None if they are beside it."""

    def put(self, folder: Folder, files: Mapping[str, bytes]) -> Self:
        """Write the files, then this manifest unless one exists; return the manifest that counts, which is the first.

        The files are in a folder named by the hash of their contents: a writer without its lease never overwrites another's files.
        """
        digests = {name: Digest.of(data) for name, data in sorted(files.items())}
        contents = "".join(name + digest.sha256 for name, digest in digests.items())
        below = hashlib.sha256(contents.encode()).hexdigest()[:16]
        for name, data in files.items():
            folder.write(f"{below}/{name}", data)
        sealed = self.changed(files=digests, below=below)
        return sealed if sealed.create(folder) else self.require(folder)

    def read_file(self, folder: Folder, name: str) -> bytes:
        """Return one file after comparing it with its digest; Damaged names a missing, short or damaged one."""
        return read_verified(folder / self.below if self.below else folder, name, self.files[name])

    def read_files(self, folder: Folder, use: Callable[[str, bytes], None] = lambda *_: None) -> None:
        """Read all files, some at once, and pass each to `use`; Damaged names one that differs from the manifest."""
        for _ in in_order(self.files, lambda name: use(name, self.read_file(folder, name)), READING_THREADS):
            pass
