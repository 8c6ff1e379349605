"""Measures any samples against any reference like ADM's evaluator (FID, sFID, Inception Score, precision, recall), without a sweep.

Samples are an ADM `.npz` (`arr_0`), a folder of images or a tar. A reference is one of these, or an `.npz` with ADM's statistics.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from dis_scale.data import images
from dis_scale.data.listing import Entry
from dis_scale.data.mixing import permutation
from dis_scale.data.sources import READERS, open_source
from dis_scale.evaluation import measure, parts
from dis_scale.evaluation.adm import IMAGES, Adm, open_reference
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor, Features
from dis_scale.evaluation.inception import CLASSES
from dis_scale.evaluation.metrics import require_samples
from dis_scale.evaluation.reference import Reference, read_adm
from dis_scale.evaluation.sampling import SampleBlock
from dis_scale.evaluation.score import Score, adm_splits, shuffled_splits
from dis_scale.process.errors import UndecodableImage, UserError, printable
from dis_scale.process.progress import ReportShare
from dis_scale.process.threads import batched, in_order
from dis_scale.recipe import Data, Evaluate

METRICS = ("distance", "sfid", "precision_recall")
"""Metrics besides the Inception Scores, whose splits follow the samples' own order."""
SCORES = {"is": shuffled_splits, "is_adm": adm_splits}
NAME = "measure"
ENDINGS = (".npz", ".tar")
SETTINGS = Evaluate.model_validate(
    {"samples": 50_000, "sampler": "ddpm", "steps": 1, "extractor": {"kind": "inception"}}, strict=False
)
"""Settings as of a sweep; only the number of samples and the metrics matter here."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size: their location, their number, their side in pixels, and a function that yields them all, uint8
    (B, R, R, 3).
    """

    where: str
    count: int
    side: int
    batches: Callable[[], Iterator[np.ndarray]]


@contextlib.contextmanager
def opened(where: str) -> Iterator[Pictures]:
    """Open an `.npz`, a folder or a tar of pictures; UserError without pictures, or if they are not squares of one size."""
    if _is_file(where, ".npz"):
        with contextlib.closing(open_reference(where, NAME)) as adm:
            yield _pictures_of(adm)
        return
    if Path(where).is_file() and not where.lower().endswith(ENDINGS):
        raise UserError(f"{NAME}: {where}: expected an .npz, a folder of images or a .tar that is not compressed")
    kind = "tar" if _is_file(where, ".tar") else "folder"
    try:
        source = open_source(Data.model_validate({"source": {"kind": kind, "url": where}, "resolution": 1, "num_classes": "none"}))
    except UserError as error:
        raise UserError(f"{NAME}: {str(error).removeprefix('data.source.url: ')}") from error

    def read(entry: Entry) -> np.ndarray:
        (data,) = source.read([entry])
        try:
            return images.exact(data or b"", entry.name, source.in_flight)
        except UndecodableImage as error:
            raise UserError(
                f"{NAME}: {where}: {printable(entry.name)} cannot be read ({error.why}): repair or remove it"
            ) from error

    # All entries are listed first: a listing has packed parts in a mixed order, and access by name would unpack one per entry.
    entries = sorted(source.listing, key=lambda entry: entry.name)
    first = read(entries[0])

    def checked(entry: Entry) -> np.ndarray:
        picture = read(entry)
        if picture.shape != first.shape or picture.shape[0] != picture.shape[1]:
            (h, w), (height, width) = picture.shape[:2], first.shape[:2]
            raise UserError(
                f"{where}: {printable(entry.name)} has {w} x {h} pixels, the first picture {width} x {height}: expected "
                "squares of one size"
            )
        return picture

    def batches() -> Iterator[np.ndarray]:
        return map(np.stack, batched(in_order(entries, checked, READERS), BATCH_IMAGES))

    yield Pictures(where, len(source), first.shape[0], batches)


def _pictures_of(adm: Adm) -> Pictures:
    if (found := adm.square_images()) is None:
        raise UserError(f"{adm.url}: no images ({IMAGES})")
    return Pictures(adm.url, *found, lambda: adm.images(BATCH_IMAGES))


def measured(
    samples: str, reference: str, load: Callable[[], Extractor], report: ReportShare, say: Callable[[str], None]
) -> measure.Measured:
    """Return the `METRICS` that the reference allows and both Inception Scores by name, with errors.

    The extractor is loaded after samples and reference are opened. Memory holds the features for distances, 16 KB a sample, in a
    mixed order: samples are often sorted by class, and the jackknife needs mixed groups. `report` gets the number of measured
    samples. `say` gets a line before the measurement, and differences from ADM's evaluator.
    """
    with opened(samples) as pictures, _opened_reference(reference, pictures.side) as theirs:
        count, extractor = pictures.count, load()
        dimensions = extractor(np.zeros((1, pictures.side, pictures.side, 3), np.uint8)).pooled.shape[1]
        require_samples(count, dimensions, "pictures", f"{NAME}: {samples}: ", "", UserError)  # the reference may take hours
        say(f"measure: the features of the reference {reference}, then of {count:,} pictures")
        if isinstance(theirs, Adm):
            real = read_adm(theirs, pictures.side, extractor, lambda _: None)
        else:
            real = _reference(theirs, extractor)
            if real.kept is not None and theirs.count > len(real.kept):
                say(f"precision and recall: against {len(real.kept):,} of {theirs.count:,} pictures, where ADM's takes all")
        known = {"sfid": real.spatial is not None, "precision_recall": real.kept is not None}
        metrics = tuple(metric for metric in METRICS if known.get(metric, True))
        mixed, scores = _features(pictures, extractor, report)
    settings = SETTINGS.model_copy(update={"samples": count, "metrics": metrics})
    block = SampleBlock({extractor.name: mixed}, np.full(count, -1), np.zeros((0, 1, 1, 3), np.uint8))
    found = measure.measure_blocks([block], {extractor.name: real}, settings)
    for name, score in scores.items():
        full_name = settings.metric_name(name, extractor.name)
        found.values[full_name], error = score.result()
        if error is not None:
            found.values[f"{full_name}_error"] = error
    return found


def _features(pictures: Pictures, extractor: Extractor, report: ReportShare) -> tuple[Features, dict[str, Score]]:
    """Return the features for distances, in a mixed order, and the scores, in the pictures' own."""
    count, done = pictures.count, 0
    place = np.argsort(permutation(count))
    scores = {name: Score(splits(count), CLASSES) for name, splits in SCORES.items()}
    pooled = spatial = np.empty((0, 0), np.float32)
    for batch in pictures.batches():
        features, rows = extractor(batch), place[done : done + len(batch)]
        assert features.spatial is not None
        assert features.logits is not None
        if not done:
            pooled, spatial = (np.empty((count, each.shape[1]), np.float32) for each in (features.pooled, features.spatial))
        pooled[rows], spatial[rows] = features.pooled, features.spatial
        for score in scores.values():
            score.add(features.logits)
        done += len(batch)
        report(done, count)
    return Features(extractor.identity, pooled, spatial), scores


@contextlib.contextmanager
def _opened_reference(where: str, side: int) -> Iterator[Pictures | Adm]:
    """Open a reference: pictures, or a file with ADM's statistics. UserError if pictures have another side than `side`."""
    with contextlib.ExitStack() as open_files:
        if _is_file(where, ".npz"):
            adm = open_files.enter_context(contextlib.closing(open_reference(where, NAME)))
            if "mu.npy" in adm.file.namelist():
                yield adm
                return
            pictures = _pictures_of(adm)
        else:
            pictures = open_files.enter_context(opened(where))
        if pictures.side != side:
            raise UserError(f"{where}: {pictures.side} x {pictures.side} pixels, the samples have {side} x {side}")
        yield pictures


def _reference(pictures: Pictures, extractor: Extractor) -> Reference:
    every = enumerate(chain.from_iterable(pictures.batches()))
    statistics = parts.compute(batched(every, BATCH_IMAGES), pictures.count, [extractor])[extractor.name]
    features, where = len(statistics.pooled.sum), f"{NAME}: {pictures.where}: "
    require_samples(pictures.count, features, "pictures", where, "", UserError)
    return Reference.of(extractor.identity, statistics)


def _is_file(where: str, ending: str) -> bool:
    return where.lower().endswith(ending) and not Path(where).is_dir()
