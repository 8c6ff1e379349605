"""The floor of a sweep's distances: the distance of real images outside the reference, and of their reconstructions.

As many real images as samples are removed from the reference, since a distance falls with the number of images. The distance is
then scaled to the complete reference. The images are weighted to the class shares of the samples' labels, because these shares are
a part of a perfect model's distance. Blocks as in sampling.py.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from dis_scale.data.latents import sample_posterior
from dis_scale.data.sources import Source, on_this_node
from dis_scale.evaluation.features import Features
from dis_scale.evaluation.metrics import Frechet, Groups, MeanCovariance, Sums, jackknife_error, require_samples
from dis_scale.evaluation.reference import Reference
from dis_scale.evaluation.sampling import BlockSampler
from dis_scale.process import seeds
from dis_scale.process.errors import DisScaleError, StorageError
from dis_scale.process.threads import in_order
from dis_scale.recipe import Evaluate
from dis_scale.storage import npy
from dis_scale.vae import PixelVae, Vae

COUNTED = 2
"""Least effective number of weighted images per feature. With fewer, their covariance is too uncertain."""
EVEN = 0.9
"""Least effective share of its images for a weighted set to count as well as an unweighted one."""
HALF = ", which are half of the source's images and evaluate.samples at most"
LOST = 0.01
"""Largest share of samples whose classes have no chosen image. Their part of the distance is missing."""
REAL, RECONSTRUCTED = "real", "reconstructed"
READERS, PARQUET_READERS = 32, 2
"""Threads that read and decode images: at 30 ms a request, about 1,000 images/s. Parquet's reader keeps two row groups."""


class FloorBlock(NamedTuple):
    """One block of real images: their numbers among the chosen images (N), and their features by kind and extractor."""

    numbers: np.ndarray
    features: Mapping[str, Mapping[str, Features]]

    def to_bytes(self) -> bytes:
        """Return the block as an npz."""
        every = [(kind, name, each) for kind, by_name in self.features.items() for name, each in by_name.items()]
        arrays = {f"{kind}.{name}": each.pooled for kind, name, each in every}
        identities = {f"identity.{name}": np.asarray(each.identity) for _, name, each in every}
        return npy.sealed({"numbers": self.numbers} | arrays | identities)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "FloorBlock":
        """Read a block; StorageError names a damaged one."""
        arrays = npy.unsealed(data, where)
        features: dict[str, dict[str, Features]] = {}
        for key in arrays:
            kind, _, name = key.partition(".")
            if key != "numbers" and kind != "identity":
                features.setdefault(kind, {})[name] = Features(str(arrays[f"identity.{name}"]), arrays[key])
        return cls(arrays["numbers"], features)


def chosen_images(labels_M: np.ndarray, samples: int) -> np.ndarray:
    """Return the positions of random images: as many as samples, but at most half of all M. Each class has its share.

    The remaining images have the same class shares, so the reference without the chosen images is like the complete one.
    """
    images = len(labels_M)
    order = seeds.generator("floor", images).permutation(images)
    classes = labels_M[order]
    place = (_occurrence(classes) + 0.5) / np.bincount(classes)[classes]
    chosen: np.ndarray = order[np.argsort(place, kind="stable")[: min(samples, images // 2)]]
    return chosen


def sample_weights(classes_N: np.ndarray, labels_S: np.ndarray) -> np.ndarray:
    """Return the weights (N) that give the classes of the chosen images their shares of the samples' labels; 1 on average.

    Raises DisScaleError if over `LOST` of the samples are of classes without a chosen image. Without classes all labels are 0.
    """
    wanted = np.bincount(labels_S, minlength=classes_N.max() + 1)
    lacking = np.bincount(classes_N, minlength=len(wanted)) == 0
    if wanted[lacking].sum() > LOST * len(labels_S):
        raise DisScaleError(
            f"{wanted[lacking].sum():,} of {len(labels_S):,} samples are of classes without an image among the {len(classes_N):,} "
            f"of a floor, such as {int((lacking & (wanted > 0)).nonzero()[0][0])}: add images of these classes"
        )
    weights_N: np.ndarray = wanted[classes_N] / np.bincount(classes_N)[classes_N]
    weights_N /= weights_N.mean()
    return weights_N


def _occurrence(labels_S: np.ndarray) -> np.ndarray:
    """Return, for each label, the number of its earlier occurrences."""
    order = np.argsort(labels_S, kind="stable")
    occurrence = np.empty_like(order)
    occurrence[order] = np.arange(len(order)) - np.searchsorted(labels_S[order], labels_S[order])
    return occurrence


def require_enough(images: int, references: Mapping[str, Reference]) -> None:
    """Raise DisScaleError if the images are too few for a covariance under every extractor."""
    features = min((len(reference.pooled.mean) for reference in references.values()), default=0)
    require_samples(images, features, "images", cure=HALF)


def make_block(sampler: BlockSampler, source: Source, chosen: np.ndarray, number: int) -> FloorBlock:
    """Read one block of the chosen images; return their features and the features of their reconstructions.

    Blocks follow the source's order, so that images that are stored together are read together.
    """
    settings, data = sampler.recipe.evaluate, sampler.recipe.data
    numbers = np.argsort(chosen)[number * settings.block_images : (number + 1) * settings.block_images]
    positions = chosen[numbers].tolist()
    threads = PARQUET_READERS if data.source.kind == "parquet" else READERS
    images = list(in_order(positions, lambda i: source.decoded(range(i, i + 1), data.resolution)[0], threads))
    ((_, decodable, refused),) = on_this_node(source, data, [(positions, images)], "a floor's block")
    numbers = numbers[~np.isin(positions, refused)]
    if not decodable:
        return FloorBlock(numbers, {})
    kinds = {REAL: np.stack([image for _, image in decodable])}
    if not isinstance(sampler.vae, PixelVae):
        kinds[RECONSTRUCTED] = _reconstruct(sampler.vae, kinds[REAL], settings.batch_images, number)
    return FloorBlock(numbers, {kind: {e.name: e(pixels) for e in sampler.extractors} for kind, pixels in kinds.items()})


def _reconstruct(vae: Vae, pixels_NHWC: np.ndarray, batch: int, block: int) -> np.ndarray:
    """Return the decoded samples of the images' posteriors: the output of a model without any error."""
    parts = []
    for first in range(0, len(pixels_NHWC), batch):
        moments = vae.encode(pixels_NHWC[first : first + batch]).half().cpu().numpy()
        rng = seeds.generator("reconstruction", block, first)
        latents = sample_posterior(moments, rng) if vae.posterior else moments.astype(np.float32)
        parts.append(vae.decode(torch.from_numpy(vae.scaling.apply(latents)).to(vae.device)))
    return np.concatenate(parts)


def measure_floor(
    blocks: Iterable[FloorBlock], references: Mapping[str, Reference], settings: Evaluate, weights_N: np.ndarray
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Return the distances of the N chosen images by kind and metric, and the reason for each metric without a distance.

    Each distance has its `<metric>_error` if it can be estimated. Raises StorageError if a block has features of other weights than
    the reference, and DisScaleError if the images are too few under every extractor.
    """
    images = len(weights_N)
    groups: dict[str, dict[str, Groups]] = {}
    unweighted: dict[str, Groups] = {name: Groups(images) for name in references}
    for number, block in enumerate(blocks):
        for kind, by_name in block.features.items():
            for name, features in by_name.items():
                if features.identity != references[name].identity:
                    raise StorageError(f"floor/block-{number:05d}.npz has features of another {name}: delete it and rerun")
                weighted = groups.setdefault(name, {}).setdefault(kind, Groups(images))
                weighted.add(features.pooled, block.numbers, weights_N[block.numbers])
                if kind == REAL:
                    unweighted[name].add(features.pooled, block.numbers)
    found, missing = dict[str, dict[str, float]](), dict[str, str]()
    counted = float(weights_N.sum() ** 2 / np.square(weights_N).sum())
    for name, by_kind in groups.items():
        metric = settings.metric_name("fid", name)
        try:
            every = _distances(by_kind, unweighted[name], references[name].pooled, settings, name, counted)
        except DisScaleError as refusal:
            missing[metric] = str(refusal)
            continue
        for kind, (value, error) in every.items():
            known = {metric: value} | ({} if error is None else {f"{metric}_error": error})
            found[kind] = found.get(kind, {}) | known
    if missing and not found:
        raise DisScaleError("; ".join(missing.values()))
    return found, missing


def _distances(
    by_kind: Mapping[str, Groups], chosen: Groups, reference: MeanCovariance, settings: Evaluate, extractor: str, counted: float
) -> dict[str, tuple[float, float | None]]:
    """Return each kind's distance and standard error, scaled to the number of samples and to the complete reference.

    The part of a distance that comes from finite sets is proportional to 1/n + 1/m for n and m images (Chong and Forsyth 2020).
    The distance of the chosen images without weights has no other part. With weights they have the noise of only `counted` images
    (Kish 1965, section 11.7). Images cannot be removed from an ADM reference: the distance is then scaled to the number of chosen
    images. An unknown number of images of the reference counts as infinite. If the number of chosen images is far below the
    reference's, the error is up to 1.4 times too large.
    """
    real, d = chosen.total(), len(reference.mean)
    require_samples(real.count, d, "images", cure=HALF)
    rest, samples = reference, real.count
    if settings.reference_of(extractor) is None:
        left = Sums.of(reference).without(real)
        require_samples(left.count, d)
        rest, samples = left.mean_covariance(), settings.samples
    if counted < min(COUNTED * d, EVEN * real.count):
        cure = "" if settings.labels == "balanced" else "set evaluate.labels: balanced, or "
        raise DisScaleError(
            f"{real.count:,} real images, weighted to the classes of the samples, are worth {counted:,.0f}, and a floor of {d:,} "
            f"features takes {COUNTED * d:,}: {cure}add images of the rare classes"
        )
    per_rest, per_reference = (1 / count if count else 0.0 for count in (rest.count, reference.count))
    excess = (1 / counted + per_rest - 1 / samples - per_reference) / (1 / real.count + per_rest)
    frechet = Frechet(rest)
    measured = {kind: groups.distance(frechet) for kind, groups in by_kind.items()}
    least, _, least_without = chosen.distance(frechet)
    scaled: dict[str, tuple[float, float | None]] = {}
    for kind, (value, _, without) in measured.items():
        error = None
        if without is not None and least_without is not None:
            error = jackknife_error(without - excess * least_without)
        scaled[kind] = value - excess * least, error
    return scaled
