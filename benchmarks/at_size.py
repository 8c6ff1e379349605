"""Data at size, from images to batches: `python -m benchmarks.at_size [--images 200000] [--kind folder|tar] [--root URL]`.

Makes small images of 1,000 classes of unequal size at the root (by default a temporary folder), and takes them through listing,
precompute in pixel space and the reader, in one process. Prints a line of JSON for each part: seconds, and most memory so far.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from dis_scale.data.latents import Latents
from dis_scale.data.sources import Source, open_source
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import Encoding
from tests.support.labelled_images import tar
from tests.support.stages import OneEncoder, make_latents

CLASSES, RESOLUTION, BATCH, HELD_OUT = 1000, 8, 256, 2000


def class_sizes(images: int) -> list[int]:
    """Images by class: from 0.4 to 1.6 times the mean, less equal than ImageNet's 732 to 1,300."""
    shares = np.linspace(0.4, 1.6, CLASSES)
    sizes = np.floor(images * shares / shares.sum()).astype(int)
    sizes[-1] += images - sizes.sum()
    return [int(size) for size in sizes]


def png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_class(root: Folder, kind: str, label: int, count: int) -> None:
    rng = np.random.default_rng(label)
    files = {f"n{label:08d}_{i}.png": png(rng) for i in range(count)}
    if kind == "tar":
        root.write(f"n{label:08d}.tar", tar(files))
        return
    for name, data in files.items():
        root.write(f"n{label:08d}/{name}", data)


@contextmanager
def measured(name: str, images: int) -> Iterator[dict[str, Any]]:
    """Print a row with the seconds of the block and what it adds."""
    row, began_s = dict[str, Any](), time.perf_counter()
    yield row
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = round(time.perf_counter() - began_s, 2)
    print(json.dumps({"name": name, "images": images, "seconds": seconds, "peak_gib": round(peak_gib, 2)} | row), flush=True)


class MeasuredEncoder(OneEncoder):
    def encode(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
        with measured("encode", len(source)):
            super().encode(latents, encoding, source, left)

    def mix(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
        with measured("mix", len(source)):
            super().mix(latents, encoding, source, left)


def recipe_of(images: Folder, root: Folder, kind: str) -> Recipe:
    label = ", label: tar" if kind == "tar" else ""
    return reading.load("digits", [
        f"data.source={{kind: {kind}, url: '{images}'{label}}}", f"data.num_classes={CLASSES}", f"data.resolution={RESOLUTION}",
        "vae={kind: none}", "precompute={shard_images: 1024, encode_images: 256, workers: 1}", f"storage.root={root}",
        f"data.held_out_images={HELD_OUT}", "diffusion={kind: flow}", "evaluate.sampler=heun", "evaluate.variants={}",
    ])  # fmt: skip


def take_through(root: Folder, count: int, kind: str) -> None:
    images, store = root / "images", root / "store"
    with measured("write the images", count), ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda each: write_class(images, kind, *each), enumerate(class_sizes(count))))
    sweep = Sweep.below(store, recipe_of(images, store, kind))
    sweep.save_recipe()
    with measured("list", count):
        open_source(sweep.recipe.data, store)
    with measured("open the listing", count):
        open_source(sweep.recipe.data, store)
    with measured("precompute in all", count):
        latents = make_latents(sweep, MeasuredEncoder)
    noise = np.zeros(BATCH, np.int64)
    with measured("open the reader, first batch", BATCH):
        reader = Latents(latents, 0, HELD_OUT)
        reader.read(np.arange(BATCH), noise)
    with measured("read an epoch", reader.order.total) as row:
        starts = range(0, reader.order.total - BATCH, BATCH)
        distinct = [len(set(reader.read(np.arange(i, i + BATCH), noise)[1].tolist())) for i in starts]
        shares = np.array(class_sizes(count)) / count
        row["labels_a_batch"] = round(float(np.mean(distinct)), 2)
        row["labels_of_independent_draws"] = round(float((1 - (1 - shares) ** BATCH).sum()), 2)
    with measured("read the held-out images", HELD_OUT) as row:
        row["labels"] = len({label for _, label in reader.held_out()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--kind", choices=("folder", "tar"), default="folder")
    parser.add_argument("--root")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        take_through(open_folder(chosen.root or scratch), chosen.images, chosen.kind)


if __name__ == "__main__":
    main()
