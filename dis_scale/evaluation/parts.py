"""Statistics of the real images in parts of fixed size, so that many workers compute them and a lost worker costs one part.

A part is complete when its file exists. Parts are merged in their order, so any number of workers, with or without restarts,
gives bit-equal statistics. Read next: reference.py, which stores the result.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from dis_scale.data.sources import Source, on_this_node
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor, Features
from dis_scale.evaluation.metrics import Sums
from dis_scale.process import seeds
from dis_scale.process.errors import StorageError
from dis_scale.process.progress import ReportDone
from dis_scale.process.threads import batched, in_order
from dis_scale.recipe import Data
from dis_scale.storage import npy
from dis_scale.sweep import Sweep
from dis_scale.sweep.extractors import part_count, part_positions, reference_facts, reference_part

KEPT = 10_000
"""Most images whose features are kept, as many as ADM's references hold; chosen by a fixed seed."""
SPANS = 64, 4
"""Most images of one read, and threads that read and decode ahead, for tars and Parquet. A read is one request for many images."""
FILES = 8, 32
"""The same for images that are files: at 30 ms a request, 32 threads read up to 1,067 images/s, four would read 133."""


@dataclass
class Statistics:
    """Sums over the images, spatial sums, and the features of some images."""

    pooled: Sums = field(default_factory=Sums)
    spatial: Sums = field(default_factory=Sums)
    _kept: list[np.ndarray] = field(default_factory=list)

    @property
    def kept(self) -> np.ndarray:
        """Features (M, d), float32."""
        return np.concatenate(self._kept) if self._kept else np.zeros((0, 0), np.float32)

    def add(self, batch: Features, kept_B: np.ndarray) -> None:
        """Add features of images; also keep the features that `kept_B` marks."""
        self.pooled = self.pooled.plus(batch.pooled)
        if batch.spatial is not None:
            self.spatial = self.spatial.plus(batch.spatial)
        self._kept.append(batch.pooled[kept_B])

    def merge(self, after: "Statistics") -> "Statistics":
        """Return the statistics of both sets; the images of `after` follow this set's."""
        pooled, spatial = self.pooled.merge(after.pooled), self.spatial.merge(after.spatial)
        return Statistics(pooled, spatial, self._kept + after._kept)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all values, under the names of a part's file."""
        sums = {"pooled": self.pooled, "spatial": self.spatial}
        values = {f"{end}_{name}": np.asarray(part) for end, each in sums.items() for name, part in vars(each).items()}
        return values | ({"kept": self.kept} if self._kept else {})

    @classmethod
    def from_arrays(cls, z: Mapping[str, np.ndarray]) -> "Statistics":
        pooled, spatial = (Sums(int(z[f"{end}_count"]), z[f"{end}_sum"], z[f"{end}_outer"]) for end in ("pooled", "spatial"))
        return cls(pooled, spatial, [z["kept"]] if "kept" in z else [])


def merged(
    sweep: Sweep, source: Source, extractors: list[Extractor], report: ReportDone, say: Callable[[str], None]
) -> dict[str, Statistics]:
    """Return the statistics of all images by extractor; parts that are missing or damaged are computed.

    `report` gets the images done, `say` the names of damaged parts.
    """
    total = {e.name: Statistics() for e in extractors}
    for number in range(part_count(len(source))):
        positions = part_positions(number, len(source))
        part = {e.name: _load(sweep, source, e, number, say) for e in extractors}
        left = [e for e in extractors if part[e.name] is None]
        if left:
            part |= make(sweep, source, left, number, _continued(report, positions.start))
        total = {name: total[name].merge(each) for name, each in part.items() if each is not None}
        report(positions.stop)
    return total


def make(sweep: Sweep, source: Source, extractors: list[Extractor], number: int, report: ReportDone) -> dict[str, Statistics]:
    """Compute one part; return its statistics by extractor. Store it unless it is the only part."""
    positions = part_positions(number, len(source))
    images = _images(source, sweep.recipe.data, positions, report)
    part = compute(batched(images, 2 * BATCH_IMAGES), len(source), extractors)
    if len(positions) < len(source):
        for e in extractors:
            facts = {key: np.asarray(value) for key, value in _facts(sweep, source, e, number).items()}
            name = reference_part(sweep, e.name, e.identity, number)
            sweep.reference_parts.write(name, npy.sealed(part[e.name].arrays() | facts))
    return part


def compute(batches: Iterable[list[tuple[int, np.ndarray]]], count: int, extractors: list[Extractor]) -> dict[str, Statistics]:
    """Compute statistics in bounded memory, from batches of (position, image); positions are below `count`."""
    statistics = {e.name: Statistics() for e in extractors}
    keep = np.zeros(count, bool)
    keep[choose_kept(count)] = True
    for batch in batches:
        pixels, chosen = np.stack([image for _, image in batch]), [i for i, _ in batch]
        for extractor in extractors:
            statistics[extractor.name].add(extractor(pixels), keep[chosen])
    return statistics


def choose_kept(count: int) -> np.ndarray:
    """Return the positions, among `count` images, of the images whose features are kept."""
    return np.sort(seeds.generator("kept reference", count).permutation(count)[:KEPT])


def _continued(report: ReportDone, before: int) -> ReportDone:
    return lambda done: report(before + done)


def _load(sweep: Sweep, source: Source, extractor: Extractor, number: int, say: Callable[[str], None]) -> Statistics | None:
    """Return one part's statistics, or None if it is missing, damaged, or of other images."""
    name = reference_part(sweep, extractor.name, extractor.identity, number)
    try:
        data = sweep.reference_parts.read(name)
    except FileNotFoundError:
        return None
    try:
        arrays = npy.unsealed(data, f"{sweep.reference_parts}/{name}")
    except StorageError as error:
        say(f"computed again: {error}")
        return None
    expected = _facts(sweep, source, extractor, number)
    if {key: str(arrays.get(key)) for key in expected} != expected:
        say(f"computed again: {sweep.reference_parts}/{name}: of another listing or version")
        return None
    return Statistics.from_arrays(arrays)


def _facts(sweep: Sweep, source: Source, extractor: Extractor, number: int) -> dict[str, str]:
    """Return the inputs of a part, which are stored with it."""
    positions, listing = part_positions(number, len(source)), source.listing.manifest.sha256
    part = {"listing": listing, "positions": f"{positions.start} to {positions.stop}", "sums": "all images"}
    return reference_facts(sweep, extractor.name, extractor.identity) | part


def _images(source: Source, data: Data, positions: range, report: ReportDone) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each decodable image with its position; others are refused or skipped by the recipe.

    Threads read and decode ahead. `report` gets the images done.
    """
    most, threads = FILES if data.source.kind in ("folder", "csv") else SPANS
    ranges = source.read_ranges(positions, most)
    decoded = in_order(ranges, lambda p: (p, source.decoded(p, data.resolution)), threads)
    for part, images, _ in on_this_node(source, data, decoded, "a part of the reference"):
        yield from images
        report(part[-1] + 1 - positions.start)
