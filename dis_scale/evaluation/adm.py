"""ADM's `.npz` (openai/guided-diffusion, evaluations). A reference has `mu, sigma, mu_s, sigma_s`; both have images in `arr_0`.

Images are read in parts: 10,000 of 256 x 256 would take 2 GB of memory.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dis_scale.evaluation.metrics import MeanCovariance
from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage import npy
from dis_scale.storage.folder import locate

IMAGES = "arr_0"
ARRAY_BYTES = 256 * 2**20
"""Most bytes of an array of statistics, unpacked; a covariance of Inception's 2,048 features has 32 MiB."""
MOST_SIDE = 2048
"""Most pixels of an image's side. It bounds memory, which holds all images that are measured together."""
MOST_PACKED = 1032
"""Largest compression ratio of `deflate`."""
READ_BYTES = 16 * 2**20
"""Bytes of one request for a file that is not on a disk."""


@dataclass(frozen=True)
class Adm:
    """An open reference file; each part is read on request. The caller closes it."""

    url: str
    file: zipfile.ZipFile

    def statistics(self, mean: str, covariance: str, features: int) -> MeanCovariance | None:
        """Return the statistics under two names, None if missing; UserError for another number of features."""
        mu, sigma = self._array(mean), self._array(covariance)
        if mu is None or sigma is None:
            return None
        if mu.shape != (features,) or sigma.shape != (features, features):
            raise UserError(
                f"{self.url}: {mean} {mu.shape} and {covariance} {sigma.shape} are of other features: "
                f"expected ({features},) and ({features}, {features})"
            )
        if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
            raise UserError(
                f"{self.url}: {mean} and {covariance} are {mu.dtype} and {sigma.dtype}: expected floating-point numbers"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{self.url}: {mean} or {covariance} is not finite: the file is damaged")
        return MeanCovariance(0, mu.astype(np.float64), sigma.astype(np.float64))  # the file lacks the number of images

    def square_images(self) -> tuple[int, int] | None:
        """Return the number of images and their side, None without images; UserError if they are not squares of bytes."""
        if f"{IMAGES}.npy" not in self.file.namelist():
            return None
        with self._intact(), npy.open_member(self.file, f"{IMAGES}.npy") as stream:
            dtype, shape, _, _ = self._header(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise UserError(f"{self.url}: {IMAGES} holds {dtype} of shape {shape}, expected uint8 (N, R, R, 3)")
        if not 1 <= shape[1] <= MOST_SIDE:  # zeros of any size compress to a small file
            raise UserError(f"{self.url}: {IMAGES} holds images of side {shape[1]:,}, expected 1 to {MOST_SIDE:,}")
        info = self.file.getinfo(f"{IMAGES}.npy")
        most_bytes = min(info.file_size, MOST_PACKED * min(info.compress_size, self.file.start_dir))
        if math.prod(shape) > most_bytes:
            raise StorageError(f"{self.url}: {IMAGES} is said to have {shape[0]:,} images, more than its bytes: copy it again")
        return shape[0], shape[1]

    def images(self, at_once: int) -> Iterator[np.ndarray]:
        """Yield the images in order, uint8 (B, R, R, 3)."""
        with self._intact(), npy.open_member(self.file, f"{IMAGES}.npy") as stream:
            count, *shape = self._header(stream).shape
            for first in range(0, count, at_once):
                part = (min(at_once, count - first), *shape)
                yield np.frombuffer(stream.read(int(np.prod(part))), np.uint8).reshape(part)

    def _header(self, stream: IO[bytes]) -> npy.Header:
        """Read the header of the images; the next bytes of the stream are the first image."""
        start = stream.read(10)
        if start[:6] == npy.MAGIC and start[6:8] != b"\x01\x00":  # later versions allow 4 GiB of header
            raise ValueError(f"{IMAGES} is an array of version {tuple(start[6:8])}, expected (1, 0)")
        header = npy.header(start + stream.read(int.from_bytes(start[8:], "little")))
        if header.order == "F":
            raise UserError(f"{self.url}: {IMAGES} is stored by columns: save it with numpy.savez from a C-ordered array")
        return header

    def close(self) -> None:
        self.file.close()

    @contextlib.contextmanager
    def _intact(self) -> Iterator[None]:
        try:
            yield
        except npy.MALFORMED as error:
            raise StorageError(f"{self.url}: cannot be read: {error}; copy it again, or write it again by numpy.savez") from error

    def _array(self, name: str) -> np.ndarray | None:
        if f"{name}.npy" not in self.file.namelist():
            return None
        if (size := self.file.getinfo(f"{name}.npy").file_size) > ARRAY_BYTES:
            raise UserError(f"{self.url}: {name} has {size:,} bytes, and statistics have at most {ARRAY_BYTES:,}")
        with self._intact():
            return npy.read(npy.member(self.file, f"{name}.npy", ARRAY_BYTES))


def open_reference(url: str, what: str = "evaluate.reference") -> Adm:
    """Open the file at a path or URL; UserError that names `what` if it is missing or not an `.npz`."""
    parent, name = locate(url)
    try:
        source = parent.local / name if parent.local else parent.open(name, READ_BYTES)
        return Adm(url, npy.open_zip(source))
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file {url}") from error
    except (*npy.MALFORMED, StorageError) as error:
        raise UserError(f"{what}: {url} cannot be read as an .npz: {error}") from error


def write_samples(path: Path, count: int, batches: Iterable[np.ndarray]) -> None:
    """Write `count` uint8 images for ADM's evaluator, from batches (B, R, R, 3); one batch is in memory at a time.

    The file appears when it is complete.
    """
    incomplete, written = path.with_name(f".{path.name}.part-{os.getpid()}"), 0
    try:
        with zipfile.ZipFile(incomplete, "w") as file, file.open(f"{IMAGES}.npy", "w", force_zip64=True) as stream:
            for batch in batches:
                if not written:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *batch.shape[1:])}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(np.ascontiguousarray(batch).tobytes())
                written += len(batch)
        assert written == count, f"{written} images, the header says {count}"
        incomplete.replace(path)
    finally:
        incomplete.unlink(missing_ok=True)
