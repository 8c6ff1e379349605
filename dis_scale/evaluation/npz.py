"""Checksummed `.npz`: arrays in one file with its sha256 at the end, so that a damaged file is detected and named."""

import hashlib
import io
import zipfile
from collections.abc import Mapping

import numpy as np

from dis_scale.process.errors import Damaged
from dis_scale.storage import npy

_DIGEST_BYTES = 32


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return an `.npz` followed by the 32 bytes of its sha256. NumPy reads it, too."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    data = buffer.getvalue()
    return data + hashlib.sha256(data).digest()


def from_bytes(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Return the arrays; Damaged names the file."""
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise Damaged(f"{where}: damaged: its sha256 differs from the one at its end")
    try:
        return npy.read_all(body, len(body))  # ours are not compressed
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise Damaged(f"{where}: damaged: {error}") from error
