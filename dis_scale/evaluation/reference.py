"""The real images' statistics under each extractor, stored by fingerprint; computed once, in the prepare stage.

They serve every metric, so a recipe can add metrics later: sums for the distances, and the features of up to `KEPT` images for
KID, precision and recall. Read next: parts.py for how they are computed, adm.py for published statistics.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dis_scale.data.sources import Source
from dis_scale.evaluation import parts
from dis_scale.evaluation.adm import IMAGES, Adm, open_reference
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor
from dis_scale.evaluation.inception import FEATURES, SPATIAL
from dis_scale.evaluation.metrics import Frechet, MeanCovariance, require_infinity, require_samples
from dis_scale.process.errors import StorageError, UserError
from dis_scale.process.progress import ReportDone
from dis_scale.recipe import Recipe
from dis_scale.recipe.evaluate import KID_SUBSET_IMAGES
from dis_scale.storage import npy
from dis_scale.sweep import Sweep
from dis_scale.sweep.extractors import reference_facts, reference_file, weights_identity
from dis_scale.sweep.state import references_missing


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images under one extractor; `identity` is the hash of its weights."""

    identity: str
    pooled: MeanCovariance
    spatial: MeanCovariance | None = None
    kept: np.ndarray | None = None
    """Features (M, d) of up to `parts.KEPT` images, float32."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the available statistics, under their names in the stored file."""
        kept = {} if self.kept is None else {"kept": self.kept}
        ends = {"": self.pooled} | ({"_s": self.spatial} if self.spatial else {})
        return kept | {
            f"{name}{end}": np.asarray(value)
            for end, each in ends.items()
            for name, value in (("mu", each.mean), ("sigma", each.covariance), ("count", each.count))
        }

    @cached_property
    def frechet(self) -> Frechet:
        """The distance to the images, built once for all checkpoints: the matrix root takes seconds."""
        return Frechet(self.pooled)

    @cached_property
    def spatial_frechet(self) -> Frechet | None:
        """The same distance for spatial features; None without these."""
        return Frechet(self.spatial) if self.spatial else None

    @classmethod
    def of(cls, identity: str, statistics: parts.Statistics) -> "Reference":
        spatial = statistics.spatial.mean_covariance() if statistics.spatial.count else None
        return cls(identity, statistics.pooled.mean_covariance(), spatial, statistics.kept)

    @classmethod
    def from_arrays(cls, z: Mapping[str, np.ndarray]) -> "Reference":
        spatial = MeanCovariance(int(z["count_s"]), z["mu_s"], z["sigma_s"]) if "mu_s" in z else None
        pooled = MeanCovariance(int(z["count"]), z["mu"], z["sigma"])
        return cls(str(z["weights"]), pooled, spatial, z.get("kept"))


def prepare(
    sweep: Sweep,
    source: Source,
    extractors: list[Extractor],
    report: ReportDone,
    say: Callable[[str], None] = lambda _: None,
    require_held: Callable[[], None] = lambda: None,
) -> None:
    """Store the missing references: compute missing and damaged parts, merge all parts, then delete them.

    All extractors see the images in one pass. `report` gets the number of images done, `say` the names of damaged parts.
    `require_held` is called before each reference is written.
    """
    recipe, left = sweep.recipe, references_missing(sweep)
    missing = [e for e in extractors if e.name in left]
    of_images, references = [e for e in missing if e.name in recipe.evaluate.of_images], dict[str, Reference]()
    for extractor in missing:  # before the images are read, so that a wrong URL fails early
        if url := recipe.evaluate.reference_of(extractor.name):
            with closing(open_reference(url)) as adm:
                references[extractor.name] = read_adm(adm, recipe.data.resolution, extractor, report)
    merged = parts.merged(sweep, source, of_images, report, say) if of_images else {}
    references |= {e.name: Reference.of(e.identity, merged[e.name]) for e in of_images}
    for extractor in missing:
        require(extractor.name, references[extractor.name], recipe)
        require_held()
        store(sweep, extractor.name, references[extractor.name])
    sweep.reference_parts.delete()


def read_adm(adm: Adm, resolution: int, extractor: Extractor, report: ReportDone) -> Reference:
    """Read an ADM file's statistics and compute the features of its images under Inception; UserError if they do not fit."""
    pooled, spatial = adm.statistics("mu", "sigma", FEATURES), adm.statistics("mu_s", "sigma_s", SPATIAL)
    count, side = adm.square_images() or (0, resolution)
    if side != resolution:
        raise UserError(
            f"{adm.url}: {IMAGES} holds images of {side} x {side} pixels, and those that it is for have {resolution} x {resolution}"
        )
    if pooled is None:
        raise StorageError(f"{adm.url}: no mu and sigma, which every distance needs: is it an ADM reference?")
    kept = None
    if count:
        chosen, features, first = set(parts.choose_kept(count).tolist()), [], 0
        for images in adm.images(BATCH_IMAGES):
            rows = [i for i in range(len(images)) if first + i in chosen]
            features.append(extractor(images[rows]).pooled if rows else np.zeros((0, len(pooled.mean)), np.float32))
            first += len(images)
            report(first)
        kept = np.concatenate(features)
    return Reference(extractor.identity, pooled, spatial, kept)


def require(name: str, reference: Reference, recipe: Recipe) -> None:
    """Raise StorageError if the reference under extractor `name` lacks data for the recipe's metrics. Called before sampling."""
    where, samples = recipe.evaluate.reference_of(name) or f"reference under {name}", recipe.evaluate.samples
    d, kept = len(reference.pooled.mean), reference.kept
    require_samples(samples, d)
    if reference.pooled.count:  # an ADM file lacks the number of images
        require_samples(reference.pooled.count, d, "images", f"{where}: ", "", StorageError)
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
    """Write a reference, with the facts that tell whether it fits a recipe."""
    facts = {key: np.asarray(value) for key, value in reference_facts(sweep, name, reference.identity).items()}
    sweep.references.write(reference_file(sweep, name, reference.identity), npy.sealed(reference.arrays() | facts))


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
        others = ", though there are others" if any(name.endswith(".npz") for name in sweep.references.list()) else ""
        raise StorageError(
            f"{sweep.references}/{file}: no statistics of these images at {size} x {size} under extractor {name} "
            f"(weights {identity[:12]}){others}: run prepare"
        )
    arrays = npy.unsealed(sweep.references.read(file), f"{sweep.references}/{file}")
    for key, expected in reference_facts(sweep, name, identity).items():
        if str(got := arrays[key]) != expected:
            raise StorageError(
                f"{sweep.references}/{file}: {key} is {got}, this recipe's is {expected}: delete the file and run prepare"
            )
    return Reference.from_arrays(arrays)
