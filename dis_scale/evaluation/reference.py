"""The real images' statistics under an extractor, kept in storage by fingerprint; computed once, in the prepare stage."""

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np

from dis_scale.data.sources import Source
from dis_scale.errors import StorageError
from dis_scale.evaluation.features import Extractor
from dis_scale.evaluation.metrics import Gaussian, fit, halves_distance
from dis_scale.recipe import Data
from dis_scale.storage import Folder

BATCH = 64


@dataclass(frozen=True)
class Reference:
    """The Gaussian of all real images' features, and the distance between their two halves: the floor of the curve."""

    gaussian: Gaussian
    floor: float


def compute(source: Source, data: Data, extractor: Extractor) -> Reference:
    """Statistics over the whole source; images that cannot be decoded are refused or skipped as the recipe says."""
    features, batch = [], []
    for i in range(len(source)):
        try:
            batch.append(source.pixels(i, data.resolution))
        except StorageError:
            if data.undecodable == "refuse":
                raise
        if batch and (len(batch) == BATCH or i == len(source) - 1):
            features.append(extractor(np.stack(batch)))
            batch = []
    features_ND = np.concatenate(features)
    return Reference(fit(features_ND), halves_distance(features_ND))


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
    key = [data.source.model_dump(mode="json"), data.resolution, data.undecodable, extractor.metric, extractor.identity]
    return f"reference/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npz"
