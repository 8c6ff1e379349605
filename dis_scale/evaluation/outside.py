"""Any samples against any reference: ADM's evaluator (FID, sFID, Inception Score, precision, recall), without a sweep.

Samples are an `.npz` of ADM's (`arr_0`), a folder of images or a tar; a reference is one of these, or has ADM's statistics.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dis_scale.data import images
from dis_scale.data.sources import open_source
from dis_scale.evaluation import measure, parts
from dis_scale.evaluation.adm import open_reference
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor
from dis_scale.evaluation.metrics import require_samples
from dis_scale.evaluation.reference import Reference, read_adm
from dis_scale.evaluation.sampling import SampleBlock
from dis_scale.process.errors import UserError
from dis_scale.process.progress import ReportShare
from dis_scale.process.threads import batched, in_order
from dis_scale.recipe import Data, Evaluate

METRICS = ("distance", "sfid", "inception_score", "inception_score_adm", "precision_recall")
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
    """Open an `.npz`, a folder or a tar of pictures; UserError if there are none, or not of one size and square."""
    if where.endswith(".npz"):
        adm = open_reference(where)
        with contextlib.closing(adm):
            count, side = adm.square_images()
            yield Pictures(count, side, lambda: adm.images(BATCH_IMAGES))
        return
    kind = "tar" if where.endswith(".tar") else "folder"
    source = open_source(
        Data.model_validate({"source": {"kind": kind, "url": where}, "resolution": 1, "num_classes": "none"})
    )

    def read(i: int) -> np.ndarray:
        (data,), name = source.read([source.listing[i]]), source.names[i]
        return images.exact(data or b"", name)

    first = read(0)

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
        return map(np.stack, batched(in_order(range(len(source)), checked, READERS), BATCH_IMAGES))

    yield Pictures(len(source), first.shape[0], batches)


def measured(samples: str, reference: str, extractor: Extractor, report: ReportShare) -> measure.Measured:
    """Return all of `METRICS` of the samples, by name and with errors; `report` gets the samples that are measured."""
    with opened(samples) as pictures:
        real = _reference(reference, pictures.side, extractor)
        require_samples(pictures.count, len(real.pooled.mean))
        known = {"sfid": real.spatial is not None, "precision_recall": real.kept is not None}
        metrics = tuple(metric for metric in METRICS if known.get(metric, True))
        settings = SETTINGS.model_copy(update={"samples": pictures.count, "metrics": metrics})

        def blocks() -> Iterator[SampleBlock]:
            done = 0
            for batch in pictures.batches():
                yield SampleBlock({extractor.name: extractor(batch)}, np.full(len(batch), -1), batch[:0])
                done += len(batch)
                report(done, pictures.count)

        return measure.measure_blocks(blocks(), {extractor.name: real}, settings)


def _reference(where: str, side: int, extractor: Extractor) -> Reference:
    """Return a reference from ADM's statistics if the file has them, else from its pictures; UserError for another size."""
    if where.endswith(".npz"):
        with contextlib.closing(open_reference(where)) as adm:
            if adm.has_statistics:
                return read_adm(where, side, extractor, lambda _: None)
    with opened(where) as pictures:
        if pictures.side != side:
            raise UserError(f"{where}: {pictures.side} x {pictures.side} pixels, the samples have {side} x {side}")
        statistics, keep, done = parts.Statistics(), np.zeros(pictures.count, bool), 0
        keep[parts.choose_kept(pictures.count)] = True
        for batch in pictures.batches():
            statistics.add(extractor(batch), keep[done : done + len(batch)])
            done += len(batch)
        return Reference.of(extractor.identity, statistics)
