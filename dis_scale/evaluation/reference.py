"""The real images' statistics under each extractor, kept in storage by fingerprint; computed once, in the prepare stage.

All that any metric may ask for is kept, so that a recipe's metrics can grow: sums for the distances and up to `KEPT` images'
features for KID and for precision and recall. Read next: adm.py for statistics that somebody else computed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from dis_scale import seeds
from dis_scale.data.sources import Source
from dis_scale.data.threads import in_order
from dis_scale.errors import StorageError, UndecodableImage
from dis_scale.evaluation import features, kernel, npz
from dis_scale.evaluation.adm import open_reference
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor, Features
from dis_scale.evaluation.metrics import Gaussian, Sums, frechet, require_finite, require_infinity, require_samples
from dis_scale.recipe import Data, Recipe
from dis_scale.storage import Folder

FORMAT = 2
STRETCH, DECODERS = 64, 4
"""Images read in one go, and threads that read and decode ahead of the extractors."""
KEPT = 10_000
"""Images whose features are kept: as many as ADM's references hold; drawn by a fixed seed where the source has more."""
Report = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The real images under one extractor, whose weights `identity` names.

    `floor` is the distance between the images' two halves; an ADM reference has none, and lacks what its file lacks.
    """

    identity: str
    gaussian: Gaussian
    spatial: Gaussian | None = None
    kept: np.ndarray | None = None
    """Features (M, d) of up to `KEPT` images, float32."""
    floor: float | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        found: dict[str, Any] = {"kept": self.kept, "floor": self.floor}
        for name, gaussian in (("", self.gaussian), ("_s", self.spatial)):
            if gaussian:
                found |= {
                    f"mu{name}": gaussian.mean,
                    f"sigma{name}": gaussian.covariance,
                    f"count{name}": gaussian.count,
                }
        return {name: np.asarray(value) for name, value in found.items() if value is not None}

    @classmethod
    def from_arrays(cls, z: Mapping[str, np.ndarray]) -> "Reference":
        spatial = Gaussian(int(z["count_s"]), z["mu_s"], z["sigma_s"]) if "mu_s" in z else None
        floor = float(z["floor"]) if "floor" in z else None
        gaussian = Gaussian(int(z["count"]), z["mu"], z["sigma"])
        return cls(str(z["weights"]), gaussian, spatial, z.get("kept"), floor)


def prepare(sweep: Folder, recipe: Recipe, source: Source, extractors: list[Extractor], report: Report) -> None:
    """Computes and stores what is missing, for all extractors in one pass over the images; `report` hears how many."""
    wanted = [e for e in extractors if not sweep.exists(path(recipe, e.name, e.identity))]
    if not wanted:
        return
    if recipe.evaluate.reference:
        found = {wanted[0].name: read_adm(recipe.evaluate.reference, recipe.data.resolution, wanted[0], report)}
    else:
        found = compute(source, recipe.data, wanted, report)
    for extractor in wanted:
        require(extractor.name, found[extractor.name], recipe)
        store(sweep, recipe, extractor.name, found[extractor.name])


def compute(source: Source, data: Data, extractors: list[Extractor], report: Report) -> dict[str, Reference]:
    """Statistics over the whole source in bounded memory; what cannot be decoded is refused or skipped as the recipe says."""
    statistics = {e.name: _Statistics() for e in extractors}
    keep = np.zeros(len(source), bool)
    keep[_kept(len(source))] = True
    for batch in batched(_images(source, data, report), 2 * BATCH_IMAGES):
        pixels, kept = np.stack([image for _, image in batch]), keep[[i for i, _ in batch]]
        for extractor in extractors:
            statistics[extractor.name].add(extractor(pixels), kept)
    return {e.name: statistics[e.name].reference(e.identity) for e in extractors}


class _Statistics:
    """Sums over the even and the odd images, spatial sums, and some images' features."""

    def __init__(self) -> None:
        self._halves, self._spatial, self._kept = (Sums(), Sums()), Sums(), [np.zeros((0, 0), np.float32)]

    def add(self, seen: Features, kept_B: np.ndarray) -> None:
        require_finite(seen.pooled, sum(half.count for half in self._halves))
        for i, half in enumerate(self._halves):
            half.add(seen.pooled[i::2])
        if seen.spatial is not None:
            self._spatial.add(seen.spatial)
        self._kept.append(seen.pooled[kept_B])

    def reference(self, identity: str) -> Reference:
        even, odd = (half.gaussian() for half in self._halves)
        spatial = self._spatial.gaussian() if self._spatial.count else None
        whole = self._halves[0].merge(self._halves[1]).gaussian()
        return Reference(identity, whole, spatial, np.concatenate(self._kept[1:]), frechet(even, odd))


def read_adm(url: str, resolution: int, extractor: Extractor, report: Report) -> Reference:
    """An ADM file's statistics, and the features of its images under Inception; UserError for what does not fit."""
    adm = open_reference(url)
    try:
        pooled, spatial, count = adm.pooled(), adm.spatial(), adm.image_count(resolution)
        if pooled is None:
            raise StorageError(f"{url}: no mu and sigma, which a distance needs: is it an ADM reference?")
        kept = None
        if count:
            chosen, parts, first = set(_kept(count).tolist()), [], 0
            for images in adm.images(BATCH_IMAGES):
                rows = [i for i in range(len(images)) if first + i in chosen]
                parts.append(extractor(images[rows]).pooled if rows else np.zeros((0, len(pooled.mean)), np.float32))
                first += len(images)
                report(first)
            kept = np.concatenate(parts)
        return Reference(extractor.identity, pooled, spatial, kept)
    finally:
        adm.close()


def require(name: str, reference: Reference, recipe: Recipe) -> None:
    """StorageError where the recipe's metrics need what the reference under extractor `name` lacks, before anything is drawn."""
    where, samples = recipe.evaluate.reference or f"reference under {name}", recipe.evaluate.samples
    d, kept = len(reference.gaussian.mean), reference.kept
    require_samples(samples, d)
    if 0 < reference.gaussian.count <= d:  # an ADM file does not say of how many images it is
        raise StorageError(
            f"{where}: {reference.gaussian.count:,} images are too few for the covariance of {d:,} features"
        )
    if "distance_infinity" in recipe.evaluate.metrics:
        require_infinity(samples, d)
    if "kid" in recipe.evaluate.metrics and kept is not None and len(kept) < kernel.SUBSET_IMAGES:
        raise StorageError(
            f"{where}: kid draws subsets of {kernel.SUBSET_IMAGES:,} images, here are {len(kept):,}: "
            "take it off evaluate.metrics"
        )
    for metric in recipe.evaluate.metrics:
        if metric in ("kid", "precision_recall") and kept is None:
            raise StorageError(f"{where}: no images (arr_0), which {metric} needs: take it off evaluate.metrics")
        if metric == "sfid" and name == "inception" and reference.spatial is None:
            raise StorageError(f"{where}: no mu_s and sigma_s, which {metric} needs: take it off evaluate.metrics")


def store(sweep: Folder, recipe: Recipe, name: str, reference: Reference) -> None:
    facts = {key: np.asarray(value) for key, value in _facts(recipe, name, reference.identity).items()}
    sweep.write(path(recipe, name, reference.identity), npz.to_bytes(reference.arrays() | facts))


def load_all(sweep: Folder, recipe: Recipe) -> dict[str, Reference]:
    """The stored statistics by extractor, with all that the recipe's metrics need; StorageError otherwise."""
    found = {e.name: load(sweep, recipe, e.name, features.identity(e, sweep)) for e in recipe.evaluate.extractors}
    for name, reference in found.items():
        require(name, reference, recipe)
    return found


def load(sweep: Folder, recipe: Recipe, name: str, identity: str) -> Reference:
    """One extractor's stored statistics; StorageError where they are missing, damaged, or of other images or features."""
    place, size = path(recipe, name, identity), recipe.data.resolution
    if not sweep.exists(place):
        others = ", though there are others" if sweep.list("reference") else ""
        raise StorageError(
            f"{sweep}/{place}: no statistics of these images at {size} x {size} under extractor {name} "
            f"(weights {identity[:12]}){others}: run prepare"
        )
    arrays = npz.from_bytes(sweep.read(place), f"{sweep}/{place}")
    for key, expected in _facts(recipe, name, identity).items():
        if str(got := arrays[key]) != expected:
            raise StorageError(
                f"{sweep}/{place}: of {key} {got}, this recipe's is {expected}: delete it and run prepare"
            )
    return Reference.from_arrays(arrays)


def stored(sweep: Folder, recipe: Recipe) -> bool:
    """Whether the statistics under every extractor of the recipe are there."""
    extractors = recipe.evaluate.extractors
    return all(sweep.exists(path(recipe, e.name, features.identity(e, sweep))) for e in extractors)


def path(recipe: Recipe, name: str, identity: str) -> str:
    """`reference/<fingerprint>.npz`, by the images' source and size and the extractor's weights."""
    key = json.dumps(_facts(recipe, name, identity), sort_keys=True)
    return f"reference/{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _facts(recipe: Recipe, name: str, identity: str) -> dict[str, str]:
    """What the statistics are a function of; all are written beside them."""
    drawn_from = recipe.data.model_dump(mode="json", include={"source", "undecodable"})
    images = recipe.evaluate.reference or json.dumps(drawn_from, sort_keys=True)
    return {
        "format": str(FORMAT), "extractor": name, "weights": identity, "resolution": str(recipe.data.resolution),
        "images": images,
    }  # fmt: skip


def _kept(count: int) -> np.ndarray:
    return np.sort(seeds.generator("kept reference", count).permutation(count)[:KEPT])


def _images(source: Source, data: Data, report: Report) -> Iterator[tuple[int, np.ndarray]]:
    """Each image with its position, read and decoded ahead in threads."""
    stretches = source.stretches(range(len(source)), STRETCH)
    for positions, images in in_order(stretches, lambda p: (p, source.decoded(p, data.resolution)), DECODERS):
        for position, image in zip(positions, images, strict=True):
            if not isinstance(image, UndecodableImage):
                yield position, image
            elif data.undecodable == "refuse":
                raise image
        report(positions.stop)


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (`itertools.batched` of Python 3.12)."""
    while batch := list(islice(items, size)):
        yield batch
