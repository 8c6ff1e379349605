"""The real images' statistics under an extractor, kept in storage by fingerprint; computed once, in the prepare stage."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from dis_scale.data.sources import Source
from dis_scale.errors import StorageError, UndecodableImage
from dis_scale.evaluation.features import Extractor
from dis_scale.evaluation.metrics import Gaussian, Sums, frechet
from dis_scale.recipe import Data
from dis_scale.storage import Folder

BATCH = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The Gaussian of all real images' features, and the distance between their two halves: the floor of the curve."""

    gaussian: Gaussian
    floor: float


def compute(source: Source, data: Data, extractor: Extractor, report: Callable[[int], None]) -> Reference:
    """Statistics over the whole source in bounded memory; what cannot be decoded is refused or skipped as the recipe says."""
    halves = (Sums(), Sums())
    for batch in batched(_images(source, data, report), 2 * BATCH):
        for half, sums in enumerate(halves):
            if len(batch) > half:
                sums.add(extractor(np.stack(batch[half::2])))
    even, odd = halves
    return Reference(even.merge(odd).gaussian(), frechet(even.gaussian(), odd.gaussian()))


def _images(source: Source, data: Data, report: Callable[[int], None]) -> Iterator[np.ndarray]:
    for i in range(len(source)):
        try:
            yield source.pixels(i, data.resolution)
        except UndecodableImage:
            if data.undecodable == "refuse":
                raise
        report(i + 1)


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (`itertools.batched` of Python 3.12)."""
    while batch := list(islice(items, size)):
        yield batch


def store(sweep: Folder, data: Data, extractor: Extractor, reference: Reference) -> None:
    buffer, g = io.BytesIO(), reference.gaussian
    np.savez(buffer, mu=g.mean, sigma=g.covariance, count=g.count, floor=reference.floor)
    sweep.write(path(data, extractor), buffer.getvalue())


def load(sweep: Folder, data: Data, extractor: Extractor) -> Reference:
    """The stored statistics; StorageError where they are missing or of other features."""
    name = path(data, extractor)
    if not sweep.exists(name):
        raise StorageError(f"{sweep}/{name}: no reference statistics for these images and this extractor: run prepare")
    with np.load(io.BytesIO(sweep.read(name))) as z:
        return Reference(Gaussian(int(z["count"]), z["mu"], z["sigma"]), float(z["floor"]))


def path(data: Data, extractor: Extractor) -> str:
    """`reference/<fingerprint>.npz`, by the images' source and size and the extractor's weights."""
    key = [data.source.model_dump(mode="json"), data.resolution, data.undecodable, extractor.identity]
    return f"reference/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npz"
