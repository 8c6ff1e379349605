"""Stored documents: small JSON files, each of one frozen type that reads and writes itself.

Every document has the number of its format. Formats begin at 1 with the first release; a version that this code does not read is
refused by name. Read next: manifest.py, for files that exist together; sweep/documents.py, for all types of a sweep.
"""

import json
import logging
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dis_scale.process.errors import Damaged, StorageError
from dis_scale.process.settings import FORMAT
from dis_scale.storage.folder import Folder

LARGEST_BYTES = 256 * 2**20
"""Larger files are not read. The manifest of 100 million images in 100,000 shards has about 20 MB."""


class Document(BaseModel):
    """One JSON file. Unknown keys and values of other types count as damage. A field that is None is not written."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    NAME: ClassVar[str] = ""
    """Name of the file in its folder. Documents that can have several names get one when they are read and written."""
    format: Literal[1] = FORMAT

    @classmethod
    def read(cls, folder: Folder, name: str = "") -> Self:
        """Return the document; FileNotFoundError if it is missing, Damaged, or StorageError for another format."""
        name = name or cls.NAME
        data = folder.read_up_to(name, LARGEST_BYTES)
        if len(data) > LARGEST_BYTES:
            raise Damaged(f"{folder}/{name}", f"over {LARGEST_BYTES:,} bytes, which no document of a sweep has")
        return cls.parse(data, f"{folder}/{name}")

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Return the document in a file's bytes; errors as in `read`, which name `where`."""
        try:
            document = cls.model_validate_json(data)
        except ValidationError as error:
            _require_format(data, where)
            first = error.errors(include_url=False)[0]
            raise Damaged(where, f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from error
        if "format" not in document.model_fields_set:
            raise Damaged(where, "it has no format")
        return document

    @classmethod
    def find(cls, folder: Folder, name: str = "") -> Self | None:
        """Return the document, None if it is missing; errors as in `read`."""
        try:
            return cls.read(folder, name)
        except FileNotFoundError:
            return None

    @classmethod
    def find_intact(cls, folder: Folder, name: str = "") -> Self | None:
        """Return the document, None if it is missing or damaged, for documents that may be missing. Damage is logged."""
        try:
            return cls.find(folder, name)
        except Damaged as error:
            logging.getLogger(__name__).warning("%s; treated as missing", error)
            return None

    @classmethod
    def exists(cls, folder: Folder) -> bool:
        return folder.exists(cls.NAME)

    def write(self, folder: Folder, name: str = "") -> None:
        """Write the document; StorageError if it is too large to be read."""
        folder.write(name or self.NAME, self._readable(f"{folder}/{name or self.NAME}"))

    def create(self, folder: Folder, name: str = "") -> bool:
        """Write the document unless it exists; return False if another process was first. Errors as in `write`."""
        return folder.create(name or self.NAME, self._readable(f"{folder}/{name or self.NAME}"))

    def _readable(self, where: str) -> bytes:
        if len(data := self.to_bytes()) > LARGEST_BYTES:
            raise StorageError(f"{where}: it would have {len(data):,} bytes, and over {LARGEST_BYTES:,} are not read")
        return data

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON's types, without those that are None."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    def changed(self, **fields: Any) -> Self:
        """Return a copy with other values of some fields."""
        return self.model_copy(update=fields)


def _require_format(data: bytes, where: str) -> None:
    """Raise StorageError for a file of another format."""
    try:
        version = json.loads(data).get("format")
    except (AttributeError, ValueError, RecursionError):
        return
    if isinstance(version, int) and version != FORMAT:
        raise StorageError(f"{where}: format {version} is not read by this version (it reads {FORMAT})")
