"""Data at size: `python -m benchmarks.at_size [--images 200000] [--kind folder|tar] [--root URL] [--listed 1281167]`.

Makes small images in 1,000 classes of unequal size at the root (a local folder or `s3://...`, by default a temporary folder), and
takes them through listing, precompute in pixel space and the reader, one process and one encoder. Prints a JSON line for each
part with its seconds, and the process's peak memory so far. `--listed` first lists that many generated entries.
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
from pathlib import Path

import numpy as np
from PIL import Image

from dis_scale import vae
from dis_scale.data import listing, shards
from dis_scale.data.latents import Latents
from dis_scale.data.listing import Contents, Entry
from dis_scale.data.sources import open_source
from dis_scale.planning.plan import price_sweep
from dis_scale.recipe import Recipe, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from pipelines import precompute
from pipelines.precompute import Encoder
from pipelines.sharing import Dealer
from tests.support.labelled_images import tar

CLASSES, RESOLUTION, BATCH = 1000, 8, 256
RECIPE = Path(__file__).parent.parent / "configs/digits.yaml"


def class_sizes(images: int) -> list[int]:
    """Images by class: from 0.4 to 1.6 times the mean, as unequal as ImageNet's 732 to 1,300, and more."""
    shares = np.linspace(0.4, 1.6, CLASSES)
    sizes = np.floor(images * shares / shares.sum()).astype(int)
    sizes[-1] += images - sizes.sum()
    return sizes.tolist()


def png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_class(root: Folder, kind: str, label: int, count: int) -> None:
    rng = np.random.default_rng(label)
    files = {f"n{label:08d}_{i}.png": png(rng) for i in range(count)}
    if kind == "folder":
        for name, data in files.items():
            root.write(f"n{label:08d}/{name}", data)
        return
    root.write(f"n{label:08d}.tar", tar(files))


@contextmanager
def measured(name: str, images: int) -> Iterator[dict[str, object]]:
    """Print a row with the seconds of the block and what it adds."""
    row: dict[str, object] = {}
    began = time.perf_counter()
    yield row
    seconds = time.perf_counter() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shown = {"seconds": round(seconds, 2), "images_s": round(images / seconds), "peak_mib": round(peak_mib)}
    print(json.dumps({"name": name, "images": images} | shown | row), flush=True)


def generated(count: int) -> Iterator[Entry]:
    return (Entry(f"n{i * CLASSES // count:08d}/n_{i}.JPEG", i * CLASSES // count) for i in range(count))


def list_generated(count: int) -> None:
    for mixed in (False, True):
        with tempfile.TemporaryDirectory() as scratch, measured(f"list generated entries, mixed {mixed}", count):
            contents = Contents(generated(count), mixed=mixed)
            listing.stored(open_folder(scratch), "key", lambda: contents, lambda _: None, lambda _: None)  # noqa: B023


def recipe_of(images: Folder, kind: str) -> Recipe:
    label = ", label: tar" if kind == "tar" else ""
    return reading.load(RECIPE, [
        f"data.source={{kind: {kind}, url: '{images}'{label}}}", f"data.num_classes={CLASSES}", f"data.resolution={RESOLUTION}",
        "vae={kind: none}", "precompute.shard_images=1024", "precompute.encode_images=256", "data.held_out_images=2000",
    ])  # fmt: skip


def take_through(root: Folder, count: int, kind: str) -> None:
    images, store = root / "images", root / "store"
    with measured(f"write the images, {kind}", count), ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda each: write_class(images, kind, *each), enumerate(class_sizes(count))))
    sweep = Sweep.below(store, recipe_of(images, kind))
    with measured("list", count):
        source = open_source(sweep.recipe.data, store)
    with measured("open the listing, plan", count):
        open_source(sweep.recipe.data, store)
        price_sweep(sweep.recipe, vae.latent_shape(sweep.recipe.vae, RESOLUTION))
    encoder = Encoder(sweep, "cpu")
    encoding = encoder.encoding()
    latents = shards.latents_folder(sweep, encoding.vae)

    def encode(left: list[int]) -> None:
        with measured("encode", count):
            encoder.encode(latents, encoding, Dealer(left).next)

    def mix(left: list[int]) -> None:
        with measured("mix", count) as row:
            encoder.mix(latents, encoding, Dealer(left).next)
            row["groups"] = len(left)

    with measured("precompute in all", count):
        precompute.make_latents(sweep.recipe, latents, source, encoding, encode, mix)
    with measured("open the reader, first batch", BATCH) as row:
        reader = Latents(latents, 0, sweep.recipe.data.held_out_images)
        reader.read(np.arange(BATCH), np.zeros(BATCH, np.int64))
        row["mixing"] = manifest.require(latents)["mixing"]
    with measured("read an epoch", reader.order.total) as row:
        distinct = [
            len(set(reader.read(np.arange(first, first + BATCH), np.zeros(BATCH, np.int64))[1].tolist()))
            for first in range(0, reader.order.total - BATCH, BATCH)
        ]
        shares = np.array(class_sizes(count)) / count
        row["labels_a_batch"] = round(float(np.mean(distinct)), 2)
        row["labels_of_independent_draws"] = round(float((1 - (1 - shares) ** BATCH).sum()), 2)
    with measured("read the held-out images", sweep.recipe.data.held_out_images) as row:
        row["labels"] = len({label for _, label in reader.held_out()})
        row["shards"] = len(np.unique(reader.order.held_out.shards))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--kind", choices=("folder", "tar"), default="folder")
    parser.add_argument("--root")
    parser.add_argument("--listed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.listed:
        list_generated(chosen.listed)
    with tempfile.TemporaryDirectory() as scratch:
        take_through(open_folder(chosen.root or scratch), chosen.images, chosen.kind)


if __name__ == "__main__":
    main()
