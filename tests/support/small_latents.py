"""A complete set of small latents, and an epoch of it as one rank reads it."""

from pathlib import Path

import numpy as np

from dis_scale.data import shards
from dis_scale.data.cache import Cache
from dis_scale.data.latents import Latents
from dis_scale.data.shards import Sample
from dis_scale.storage.folder import Folder, open_folder
from tests.support.documents import made_from

CLASSES = 5


def samples(first: int, count: int) -> list[Sample]:
    rng = np.random.default_rng(first)
    return [
        Sample(first + i, f"image-{first + i}", (first + i) % CLASSES, rng.standard_normal((2, 4, 3, 3)).astype(np.float16))
        for i in range(count)
    ]


def make(at: Folder, counts: list[int]) -> Folder:
    for number, count in enumerate(counts):
        shards.put_shard(at, number, samples(sum(counts[:number]), count), [])
    source = made_from("v" * 64, (2, 3), scale=0.5, shift=0.25, num_classes=CLASSES)
    shards.write_manifest(at, range(len(counts)), source)
    return at


def read(latents: Latents, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the moments without flips and the labels at positions [first, last)."""
    return latents.read(np.arange(first, last), np.zeros(last - first, np.int64))


def read_epoch(rank: int, world: int, url: str, cache: Path | None, micro: int) -> list[np.ndarray]:
    """Read every `world`-th micro-batch of the first epoch, starting at this rank's, like a training process."""
    if url.startswith("flaky://"):
        import tests.support.flaky_store  # noqa: F401
    latents = Latents(open_folder(url), 0, cache=Cache(cache, 2**30, print) if cache else None)
    firsts = range(rank * micro, latents.order.total, world * micro)
    return [read(latents, first, min(first + micro, latents.order.total))[0] for first in firsts]
