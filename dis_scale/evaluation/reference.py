"""The real images' statistics under each extractor, stored by fingerprint; computed once, in the prepare stage.

They serve every metric, so a recipe can add metrics later: sums for the distances, and the features of up to `KEPT` images for
KID, precision and recall. Read next: adm.py for published statistics.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dis_scale import seeds
from dis_scale.data.sources import Source, select_decodable
from dis_scale.data.threads import batched, in_order
from dis_scale.errors import StorageError
from dis_scale.evaluation import npz
from dis_scale.evaluation.adm import open_reference
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor, Features
from dis_scale.evaluation.metrics import (
    MeanCovariance,
    Sums,
    frechet,
    require_finite,
    require_infinity,
    require_samples,
)
from dis_scale.progress import ReportDone
from dis_scale.recipe import Data, Recipe
from dis_scale.recipe.evaluate import KID_SUBSET_IMAGES
from dis_scale.sweep import Sweep
from dis_scale.sweep.extractors import reference_facts, reference_file, weights_identity
from dis_scale.sweep.state import references_missing

READ_IMAGES, DECODERS = 64, 4
"""Most images of one read, and threads that read and decode ahead of the extractors."""
KEPT = 10_000
"""Most images whose features are kept, as many as ADM's references hold; chosen by a fixed seed."""


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images under one extractor; `identity` is the hash of its weights.

    `floor` is the distance between two halves of the images; an ADM reference has none.
    """

    identity: str
    pooled: MeanCovariance
    spatial: MeanCovariance | None = None
    kept: np.ndarray | None = None
    """Features (M, d) of up to `KEPT` images, float32."""
    floor: float | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is known, under the names of the stored file."""
        values: dict[str, Any] = {"kept": self.kept, "floor": self.floor}
        for end, statistics in (("", self.pooled), ("_s", self.spatial)):
            if statistics:
                values |= {
                    f"mu{end}": statistics.mean,
                    f"sigma{end}": statistics.covariance,
                    f"count{end}": statistics.count,
                }
        return {name: np.asarray(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_arrays(cls, z: Mapping[str, np.ndarray]) -> "Reference":
        spatial = MeanCovariance(int(z["count_s"]), z["mu_s"], z["sigma_s"]) if "mu_s" in z else None
        floor = float(z["floor"]) if "floor" in z else None
        pooled = MeanCovariance(int(z["count"]), z["mu"], z["sigma"])
        return cls(str(z["weights"]), pooled, spatial, z.get("kept"), floor)


def prepare(sweep: Sweep, source: Source, extractors: list[Extractor], report: ReportDone) -> None:
    """Compute and store the missing references, for all extractors in one pass; `report` gets the images done."""
    recipe, left = sweep.recipe, references_missing(sweep)
    missing = [e for e in extractors if e.name in left]
    if not missing:
        return
    if recipe.evaluate.reference:
        references = {missing[0].name: read_adm(recipe.evaluate.reference, recipe.data.resolution, missing[0], report)}
    else:
        references = compute(source, recipe.data, missing, report)
    for extractor in missing:
        require(extractor.name, references[extractor.name], recipe)
        store(sweep, extractor.name, references[extractor.name])


def compute(source: Source, data: Data, extractors: list[Extractor], report: ReportDone) -> dict[str, Reference]:
    """Compute statistics over the complete source in bounded memory; undecodable images are refused or skipped by the recipe."""
    statistics = {e.name: _Statistics() for e in extractors}
    keep = np.zeros(len(source), bool)
    keep[_choose_kept(len(source))] = True
    for batch in batched(_images(source, data, report), 2 * BATCH_IMAGES):
        pixels, kept = np.stack([image for _, image in batch]), keep[[i for i, _ in batch]]
        for extractor in extractors:
            statistics[extractor.name].add(extractor(pixels), kept)
    return {e.name: statistics[e.name].reference(e.identity) for e in extractors}


class _Statistics:
    """Sums over the even and the odd images, spatial sums, and the features of some images."""

    def __init__(self) -> None:
        self._halves, self._spatial, self._kept = (Sums(), Sums()), Sums(), [np.zeros((0, 0), np.float32)]

    def add(self, batch: Features, kept_B: np.ndarray) -> None:
        require_finite(batch.pooled, sum(half.count for half in self._halves))
        for i, half in enumerate(self._halves):
            half.add(batch.pooled[i::2])
        if batch.spatial is not None:
            self._spatial.add(batch.spatial)
        self._kept.append(batch.pooled[kept_B])

    def reference(self, identity: str) -> Reference:
        even, odd = (half.mean_covariance() for half in self._halves)
        spatial = self._spatial.mean_covariance() if self._spatial.count else None
        pooled = self._halves[0].merge(self._halves[1]).mean_covariance()
        return Reference(identity, pooled, spatial, np.concatenate(self._kept[1:]), frechet(even, odd))


def read_adm(url: str, resolution: int, extractor: Extractor, report: ReportDone) -> Reference:
    """Read an ADM file's statistics and compute the features of its images under Inception; UserError if they do not fit."""
    adm = open_reference(url)
    try:
        pooled, spatial, count = adm.pooled(), adm.spatial(), adm.image_count(resolution)
        if pooled is None:
            raise StorageError(f"{url}: no mu and sigma, which every distance needs: is it an ADM reference?")
        kept = None
        if count:
            chosen, parts, first = set(_choose_kept(count).tolist()), [], 0
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
    """StorageError if the reference under extractor `name` lacks what the recipe's metrics need; called before sampling."""
    where, samples = recipe.evaluate.reference or f"reference under {name}", recipe.evaluate.samples
    d, kept = len(reference.pooled.mean), reference.kept
    require_samples(samples, d)
    if 0 < reference.pooled.count <= d:  # an ADM file lacks the number of images
        raise StorageError(
            f"{where}: {reference.pooled.count:,} images are too few for the covariance of {d:,} features"
        )
    if "distance_infinity" in recipe.evaluate.metrics:
        require_infinity(samples, d)
    if "kid" in recipe.evaluate.metrics and kept is not None and len(kept) < KID_SUBSET_IMAGES:
        raise StorageError(
            f"{where}: kid needs {KID_SUBSET_IMAGES:,} images, here are {len(kept):,}: remove it from evaluate.metrics"
        )
    for metric in recipe.evaluate.metrics:
        if metric in ("kid", "precision_recall") and kept is None:
            raise StorageError(f"{where}: no images (arr_0), which {metric} needs: remove it from evaluate.metrics")
        if metric == "sfid" and name == "inception" and reference.spatial is None:
            raise StorageError(f"{where}: no mu_s and sigma_s, which {metric} needs: remove it from evaluate.metrics")


def store(sweep: Sweep, name: str, reference: Reference) -> None:
    facts = {key: np.asarray(value) for key, value in reference_facts(sweep, name, reference.identity).items()}
    sweep.references.write(reference_file(sweep, name, reference.identity), npz.to_bytes(reference.arrays() | facts))


def load_all(sweep: Sweep) -> dict[str, Reference]:
    """Load the stored statistics by extractor; StorageError if they lack what the recipe's metrics need."""
    references = {e.name: load(sweep, e.name, weights_identity(sweep, e)) for e in sweep.recipe.evaluate.extractors}
    for name, reference in references.items():
        require(name, reference, sweep.recipe)
    return references


def load(sweep: Sweep, name: str, identity: str) -> Reference:
    """Load one extractor's statistics; StorageError if they are missing, damaged, or of other images or features."""
    file, size = reference_file(sweep, name, identity), sweep.recipe.data.resolution
    if not sweep.references.exists(file):
        others = ", though there are others" if sweep.references.list() else ""
        raise StorageError(
            f"{sweep.references}/{file}: no statistics of these images at {size} x {size} under extractor {name} "
            f"(weights {identity[:12]}){others}: run prepare"
        )
    arrays = npz.from_bytes(sweep.references.read(file), f"{sweep.references}/{file}")
    for key, expected in reference_facts(sweep, name, identity).items():
        if str(got := arrays[key]) != expected:
            raise StorageError(
                f"{sweep.references}/{file}: {key} is {got}, this recipe's is {expected}: delete the file and run prepare"
            )
    return Reference.from_arrays(arrays)


def _choose_kept(count: int) -> np.ndarray:
    return np.sort(seeds.generator("kept reference", count).permutation(count)[:KEPT])


def _images(source: Source, data: Data, report: ReportDone) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each decodable image with its position; threads read and decode ahead."""
    ranges = source.read_ranges(range(len(source)), READ_IMAGES)
    for positions, images in in_order(ranges, lambda p: (p, source.decoded(p, data.resolution)), DECODERS):
        yield from select_decodable(positions, images, data.undecodable)[0]
        report(positions.stop)
