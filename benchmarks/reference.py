"""Images per second of the reference statistics by workers: `python -m benchmarks.reference [rounds]`.

Prints one JSON line per row, then a table. Every way gets the same JPEGs and the same extractor. A worker is a Ray actor of
`prepare`, on one thread for the extractor; its start is not timed. The baseline is one process that reads nothing ahead. Then
the same reads with 30 ms for each request, as from an object store, by threads that read ahead. The least time of each counts.
"""

import functools
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.precompute import start_ray
from benchmarks.rows import Job, least_times
from dis_scale.data.listing import Entry
from dis_scale.data.sources import Source, open_source
from dis_scale.evaluation import parts
from dis_scale.evaluation.features import BATCH_IMAGES, Extractor, load_extractors
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.programs import hash_of
from dis_scale.sweep import Sweep, extractors
from pipelines.prepare import Preparer
from pipelines.sharing import share
from pipelines.worker import spawn

IMAGES, CLASSES, RESOLUTION, PART = 2400, 2, 64, 200
SIDE = 128
"""Pixels per side of the JPEGs."""
WORKERS = (1, 2, 4)
REQUEST_S, DELAYED = 0.03, 800
"""Time of a delayed request, and images that are read so."""
EMBEDDED = Path(__file__).parent.parent / "configs" / "digits.yaml"


class Net(torch.nn.Module):
    """Two convolutions, then 64 features: about as much work as decoding a small JPEG."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 64, 3, 2), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.float() / 255)


class SmallParts(Preparer):
    """A worker whose parts have `PART` images."""

    def __init__(self) -> None:
        super().__init__()
        extractors.REFERENCE_PART_IMAGES = PART


def photos(root: Folder) -> None:
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        shapes = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        buffer = io.BytesIO()
        shapes.save(buffer, "JPEG", quality=90)
        root.write(f"{'ab'[i * CLASSES // IMAGES]}/{i:05d}.jpg", buffer.getvalue())


def recipe_for(root: Folder) -> Recipe:
    torch.manual_seed(0)
    path = Path(root.url) / "net.pt"
    torch.jit.script(Net().eval()).save(path)
    settings = [
        f"data.source={{kind: folder, url: {root}/photos}}", f"data.num_classes={CLASSES}",
        f"data.resolution={RESOLUTION}",
        f"evaluate.extractor={{kind: torchscript, name: small, path: {path}, sha256: '{hash_of(str(path), 'small')}'}}",
    ]  # fmt: skip
    return reading.load(EMBEDDED, settings)


def by_workers(sweep: Sweep, workers: list[Any]) -> None:
    """Make all parts as `prepare` does."""
    sweep.reference_parts.delete()
    share(workers, "make_parts", (sweep, "cpu"), list(range(IMAGES // PART)), lambda _: None)


def nothing_ahead(source: Source, extractor: Extractor, images: int) -> None:
    statistics = parts.Statistics()
    for first in range(0, images, 2 * BATCH_IMAGES):
        positions = range(first, min(first + 2 * BATCH_IMAGES, images))
        pixels = np.stack([source.pixels(i, RESOLUTION) for i in positions])
        statistics.add(extractor(pixels), np.arange(len(pixels)) % 2 == 1, np.ones(len(pixels), bool))


def delayed(source: Source) -> Source:
    """Return the source with `REQUEST_S` before each request, of which each image needs one."""

    def read(entries: Sequence[Entry]) -> list[bytes]:
        time.sleep(REQUEST_S * len(entries))
        return source.read(entries)

    return replace(source, read=read)


def ahead(source: Source, recipe: Recipe, extractor: Extractor, threads: int) -> None:
    parts.FILES = (parts.FILES[0], threads)
    parts.compute(source, recipe.data, [extractor], range(DELAYED), lambda _: None)


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = open_folder(scratch)
        photos(root / "photos")
        recipe = recipe_for(root)
        sweep = Sweep.below(root / "store", recipe)
        source = open_source(recipe.data, sweep.store)
        (extractor,) = load_extractors(sweep, torch.device("cpu"))
        start_ray()
        workers = [spawn(SmallParts, {"num_cpus": 0.5}) for _ in range(max(WORKERS))]
        slow = delayed(source)
        local: dict[str, Job] = {"one process, nothing ahead": lambda: nothing_ahead(source, extractor, IMAGES)}
        local |= {f"{n} workers (ours)": functools.partial(by_workers, sweep, workers[:n]) for n in WORKERS}
        requests: dict[str, Job] = {
            f"30 ms a request, {n} threads": functools.partial(ahead, slow, recipe, extractor, n)
            for n in (4, 8, 16, 32, 64)
        }
        rates = {name: IMAGES / seconds for name, seconds in least_times(local, rounds).items()}
        rates |= {name: DELAYED / seconds for name, seconds in least_times(requests, rounds).items()}
    show(rates)


def show(rates: dict[str, float]) -> None:
    for name, rate in rates.items():
        print(json.dumps({"name": name, "images_s": rate}))
    print(f"\n{'':30} {'images/s':>9}")
    for name, rate in rates.items():
        print(f"{name:30} {rate:9.0f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
