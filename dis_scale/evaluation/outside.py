"""Any samples against any reference: ADM's evaluator (FID, sFID, Inception Score, precision, recall), without a sweep.

Samples are an `.npz` of ADM's (`arr_0`), a folder of images or a tar; a reference is one of these, or has ADM's statistics.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dis_scale.data import images
from dis_scale.data.mixing import permutation
from dis_scale.data.sources import open_source
from dis_scale.evaluation import measure, parts
from dis_scale.evaluation.adm import open_reference
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor, Features
from dis_scale.evaluation.metrics import require_samples
from dis_scale.evaluation.reference import Reference, read_adm
from dis_scale.evaluation.sampling import SampleBlock
from dis_scale.evaluation.score import Score, adm_splits
from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.process.progress import ReportShare
from dis_scale.process.threads import batched, in_order
from dis_scale.recipe import Data, Evaluate

METRICS = ("distance", "sfid", "inception_score", "precision_recall")
"""Beside the Inception Score as ADM has it."""
READERS = 16
SETTINGS = Evaluate.model_validate(
    {"samples": 50_000, "sampler": "ddpm", "steps": 1, "extractor": {"kind": "inception"}}, strict=False
)
"""Those of a sweep, of which only the number of samples and the metrics matter here."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size: their number, their side in pixels, and a function that yields them all, uint8 (B, R, R, 3)."""

    count: int
    side: int
    batches: Callable[[], Iterator[np.ndarray]]


@contextlib.contextmanager
def opened(where: str) -> Iterator[Pictures]:
    """Open an `.npz`, a folder or a tar of pictures; UserError without pictures, or if they are not squares of one size."""
    if _is_file(where, ".npz"):
        adm = open_reference(where)
        with contextlib.closing(adm):
            count, side = adm.square_images()
            yield Pictures(count, side, lambda: adm.images(BATCH_IMAGES))
        return
    kind = "tar" if _is_file(where, ".tar") else "folder"
    source = open_source(
        Data.model_validate({"source": {"kind": kind, "url": where}, "resolution": 1, "num_classes": "none"})
    )

    def read(i: int) -> np.ndarray:
        (data,), name = source.read([source.listing[i]]), source.names[i]
        return images.exact(data or b"", name, source.in_flight)

    order = sorted(range(len(source)), key=source.names.__getitem__)  # a folder is listed in a mixed order
    first = read(order[0])

    def checked(i: int) -> np.ndarray:
        picture = read(i)
        if picture.shape != first.shape or picture.shape[0] != picture.shape[1]:
            (h, w), (height, width) = picture.shape[:2], first.shape[:2]
            raise UserError(
                f"{where}: {source.names[i]} has {w} x {h} pixels, the first picture {width} x {height}: expected squares of "
                "one size"
            )
        return picture

    def batches() -> Iterator[np.ndarray]:
        return map(np.stack, batched(in_order(order, checked, READERS), BATCH_IMAGES))

    yield Pictures(len(source), first.shape[0], batches)


def measured(samples: str, reference: str, extractor: Extractor, report: ReportShare) -> measure.Measured:
    """Return all of `METRICS` and ADM's Inception Score by name, with errors; `report` gets the samples that are measured.

    Keeps all features, 20 KB a sample: the jackknife's groups are of a mixed order, since samples are often sorted by class. ADM's
    Inception Score is of the samples' own order.
    """
    with opened(samples) as pictures:
        count, real = pictures.count, _reference(reference, pictures.side, extractor)
        require_samples(count, len(real.pooled.mean))
        known = {"sfid": real.spatial is not None, "precision_recall": real.kept is not None}
        metrics = tuple(metric for metric in METRICS if known.get(metric, True))
        parts_of_all, done = list[Features](), 0
        for batch in pictures.batches():
            parts_of_all.append(extractor(batch))
            done += len(batch)
            report(done, count)
    every = [np.concatenate(arrays) for arrays in zip(*map(_arrays, parts_of_all), strict=True)]
    settings = SETTINGS.model_copy(update={"samples": count, "metrics": metrics})
    mixed = Features(extractor.identity, *(array[permutation(count)] for array in every))
    block = SampleBlock({extractor.name: mixed}, np.full(count, -1), np.zeros((0, 1, 1, 3), np.uint8))
    found = measure.measure_blocks([block], {extractor.name: real}, settings)
    in_order_of_samples = Score(adm_splits(count), every[-1].shape[1])
    in_order_of_samples.add(every[-1])
    name = settings.metric_name("is_adm", extractor.name)
    value, error = in_order_of_samples.result()
    return found._replace(values=found.values | {name: value} | ({f"{name}_error": error} if error is not None else {}))


def _arrays(features: Features) -> tuple[np.ndarray, ...]:
    assert features.spatial is not None
    assert features.logits is not None
    return features.pooled, features.spatial, features.logits


def _reference(where: str, side: int, extractor: Extractor) -> Reference:
    """Return a reference from ADM's statistics if the file has them, else from its pictures; UserError for another size."""
    if _is_file(where, ".npz"):
        with contextlib.closing(open_reference(where)) as adm:
            if adm.has_statistics:
                return read_adm(where, side, extractor, lambda _: None)
    with opened(where) as pictures:
        if pictures.side != side:
            raise UserError(f"{where}: {pictures.side} x {pictures.side} pixels, the samples have {side} x {side}")
        statistics, keep, done, d = parts.Statistics(), np.zeros(pictures.count, bool), 0, 0
        keep[parts.choose_kept(pictures.count)] = True
        for batch in pictures.batches():
            features = extractor(batch)
            statistics.add(features, keep[done : done + len(batch)])
            done, d = done + len(batch), features.pooled.shape[1]
        try:
            require_samples(pictures.count, d)
        except DisScaleError as error:
            raise UserError(f"{where}: {pictures.count:,} pictures are too few for a reference: {error}") from error
        return Reference.of(extractor.identity, statistics)


def _is_file(where: str, ending: str) -> bool:
    return where.lower().endswith(ending) and not Path(where).is_dir()
