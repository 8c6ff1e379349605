"""ADM's reference `.npz` (openai/guided-diffusion, evaluations): `mu, sigma, mu_s, sigma_s` and, in `arr_0`, the images.

Images are read in parts: 10,000 of 256 x 256 would take 2 GB of memory.
"""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from dis_scale.errors import StorageError, UserError
from dis_scale.evaluation.inception import FEATURES, SPATIAL
from dis_scale.evaluation.metrics import MeanCovariance
from dis_scale.storage.folder import locate

IMAGES = "arr_0"


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
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{self.url}: {mean} or {covariance} is not finite: the file is damaged")
        return MeanCovariance(0, mu.astype(np.float64), sigma.astype(np.float64))  # the file lacks the number of images

    def pooled(self) -> MeanCovariance | None:
        return self.statistics("mu", "sigma", FEATURES)

    def spatial(self) -> MeanCovariance | None:
        return self.statistics("mu_s", "sigma_s", SPATIAL)

    def image_count(self, resolution: int) -> int:
        """Return the number of images in the file; UserError if they are not of `resolution`."""
        if f"{IMAGES}.npy" not in self.file.namelist():
            return 0
        with self.file.open(f"{IMAGES}.npy") as stream:
            shape, dtype = _header(stream)
        if dtype != np.uint8 or shape[1:] != (resolution, resolution, 3):
            raise UserError(
                f"{self.url}: {IMAGES} holds {dtype} images of shape {shape[1:]}, the recipe's data.resolution expects "
                f"uint8 ({resolution}, {resolution}, 3)"
            )
        return shape[0]

    def images(self, at_once: int) -> Iterator[np.ndarray]:
        """Yield the images in order, uint8 (B, R, R, 3)."""
        with self.file.open(f"{IMAGES}.npy") as stream:
            (count, *shape), _ = _header(stream)
            for first in range(0, count, at_once):
                part = (min(at_once, count - first), *shape)
                yield np.frombuffer(stream.read(int(np.prod(part))), np.uint8).reshape(part)

    def close(self) -> None:
        self.file.close()

    def _array(self, name: str) -> np.ndarray | None:
        if f"{name}.npy" not in self.file.namelist():
            return None
        return np.lib.format.read_array(io.BytesIO(self.file.read(f"{name}.npy")), allow_pickle=False)


def open_reference(url: str) -> Adm:
    """Open the file at a path or URL; UserError if it is missing or not an `.npz`."""
    parent, name = locate(url)
    try:
        source = parent.local / name if parent.local else io.BytesIO(parent.read(name))
        return Adm(url, zipfile.ZipFile(source))
    except FileNotFoundError as error:
        raise UserError(f"evaluate.reference: no file {url}") from error
    except (zipfile.BadZipFile, StorageError) as error:
        raise UserError(f"evaluate.reference: {url} is not an ADM reference .npz: {error}") from error


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read(stream)
    if column_major:
        raise UserError(f"{IMAGES} is stored by columns: save it with numpy.savez from a C-ordered array")
    return shape, dtype
