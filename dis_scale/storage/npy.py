"""Arrays in NumPy's format, read by threads.

`numpy.load` parses their headers by `ast`. In Python 3.11.7 this sometimes fails while another thread parses: "AST constructor
recursion depth mismatch" (python/cpython issue 106905).
"""

import hashlib
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from mmap import mmap
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from dis_scale.process.errors import Damaged, printable

MAGIC = b"\x93NUMPY"
_TYPE = re.compile(rb"'descr': *'([<>|][biufU]\d+)'")
_SHAPE = re.compile(rb"'shape': *\(([\d, ]*)\)")
_BY_COLUMNS = re.compile(rb"'fortran_order': *True")
_DIGEST_BYTES = 32
MALFORMED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, RuntimeError)
"""What `zipfile` raises for a file that is no zip, is damaged, or is of a version, a method or a name that it cannot read."""


class Header(NamedTuple):
    """Type, shape and order of an array, and the bytes before its values."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    first: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.first + math.prod(self.shape) * self.dtype.itemsize


def header(data: bytes | memoryview | mmap) -> Header:
    """Return the header of an array's file; ValueError for another file, or for an array of neither numbers nor text."""
    start = bytes(data[:12])
    if len(start) < 8 or start[:6] != MAGIC:
        raise ValueError("not an array in NumPy's format" if start else "it is empty (0 bytes)")
    version, width = start[6], 2 if start[6] == 1 else 4
    first = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    text = bytes(data[8 + width : first])
    dtype, shape = _TYPE.search(text), _SHAPE.search(text)
    if version not in (1, 2, 3) or not (dtype and shape):
        raise ValueError(f"an array of version {version}, {text[:100]!r}; expected numbers or text")
    sizes = tuple(int(size) for size in shape[1].split(b",") if size.strip())
    try:
        kind = np.dtype(dtype[1].decode())
    except TypeError as error:  # such as f9
        raise ValueError(f"an array of type {dtype[1].decode()}, which NumPy does not have") from error
    return Header(kind, sizes, "F" if _BY_COLUMNS.search(text) else "C", first)


def to_bytes(array: np.ndarray) -> bytes:
    """Return the file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read(data: bytes | memoryview) -> np.ndarray:
    """Return the array of a file, as a read-only view of it; ValueError as `header`, or if its length is wrong."""
    dtype, shape, order, first = header(data)
    return np.frombuffer(data, dtype, offset=first).reshape(shape, order=order)


def read_all(data: bytes, most_bytes: int) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` by name; ValueError as `read`, or if they have more bytes than `most_bytes`."""
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        if (size := sum(member.file_size for member in z.infolist())) > most_bytes:
            raise ValueError(f"unpacked it has {size:,} bytes, and at most {most_bytes:,} are read")
        return {name.removesuffix(".npy"): read(member(z, name, most_bytes)).copy() for name in z.namelist()}


def member(file: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    """Return a file of a zip; ValueError if it has more bytes than `most_bytes`, KeyError if there is none.

    `ZipFile.read` unpacks up to 2 GiB before it compares them with the size that the zip states, which may be false.
    """
    if (size := file.getinfo(name).file_size) > most_bytes:
        raise ValueError(f"{name}: unpacked it has {size:,} bytes, and at most {most_bytes:,} are read")
    with open_member(file, name) as stream:
        return stream.read(size)


def open_zip(file: Any) -> zipfile.ZipFile:
    """Open a zip; one of `MALFORMED` if it is invalid, or lists files outside of it, as a zip without its first bytes does."""
    opened = zipfile.ZipFile(file)
    if outside := next((m for m in opened.infolist() if not 0 <= m.header_offset < opened.start_dir), None):
        raise zipfile.BadZipFile(f"{printable(outside.filename)} would begin outside of it")
    return opened


def open_member(file: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open a file of a zip; ValueError if it is packed by a method of which `read` unpacks more than it was asked for."""
    info = file.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name}: packed by a method that is not read: expected stored or deflated")
    return file.open(info)


def sealed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return an `.npz` followed by the 32 bytes of its sha256, so that a damaged file is detected. NumPy can also read it."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    data = buffer.getvalue()
    return data + hashlib.sha256(data).digest()


def unsealed(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Return the arrays of a sealed `.npz`; Damaged names the file."""
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise Damaged(where, "its sha256 differs from the one at its end")
    try:
        return read_all(body, len(body))  # ours are not compressed
    except (*MALFORMED, OSError) as error:
        raise Damaged(where, error) from error
