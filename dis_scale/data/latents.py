"""The reader: latents, labels and noise of each step, which depend neither on the world size nor on where a run starts.

Threads load the next block's shards while the current block is read. Latents in an object store pass through the node's cache.
Each shard is checked against the manifest's hash before its first use. Read next: order.py, cache.py and memory.py.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from dis_scale.data import mixing
from dis_scale.data.cache import Cache, own_folder
from dis_scale.data.memory import MemoryBuffer, free_memory_bytes
from dis_scale.data.mixing import BLOCK_SHARDS
from dis_scale.data.order import Locations, Order
from dis_scale.data.shards import Shard, require_allowed, unpack
from dis_scale.process import seeds
from dis_scale.process.errors import UserError, counted
from dis_scale.process.threads import in_order
from dis_scale.recipe import Normalise, Reader, Recipe
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import read_verified
from dis_scale.sweep.documents import LatentsManifest
from dis_scale.vae.interface import NO_VARIANCE
from dis_scale.vae.scaling import Scaling

GIB = 2**30
_NOISE = ThreadPoolExecutor(1, "noise")
"""Thread that makes the noise while the calling thread makes the rest of a micro-batch; numpy releases the GIL."""
T = TypeVar("T")
_END: Any = object()
SWITCH_S = 5e-4
"""Seconds after which a thread that waits for Python's lock requests it; Python's default is 5 ms. A batch needs several turns."""


class Latents:
    """A complete set of mixed latent shards, read by position by one thread. Unless `keep_all`, memory holds two blocks only."""

    def __init__(
        self, folder: Folder, seed: int, held_out: int = 0, *, normalise: Normalise = "vae", cache: Cache | None = None,
        keep_all: bool = False, order_seed: int | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.manifest = folder.patient, LatentsManifest.require(folder)
        self.shape = self.manifest.encoding.latent
        self.scaling = Scaling.of(self.manifest, normalise)
        counts = [shard.count for shard in self.manifest.shards]
        self.order = Order(counts, seed, held_out=held_out, order_seed=order_seed)
        self._cache, self._buffer = cache, MemoryBuffer(self._load, keep_all=keep_all)
        # An evicted file keeps its space on the disk while it is mapped.
        self._copy = keep_all and cache is not None and cache.bound_bytes < self.manifest.size_bytes
        self._checked: set[str] = set()
        """Hashes of the files on a local path that this process has checked."""

    @property
    def identity(self) -> str:
        """Hash of all that decides the latent at each position: listing, mixed order, autoencoder, the shards' counts."""
        made_from, counts = self.manifest.made_from, [shard.count for shard in self.manifest.shards]
        facts = [made_from.listing, made_from.order, made_from.encoding.identity, counts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def read(self, positions: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return moments, float16 (n, 2C, h, w), and labels (n) at rising positions; side 0 is the image, 1 its horizontal flip."""
        self._buffer.request(self.order.shards_near(int(positions[0]), int(positions[-1])))
        return self._gather(self.order.locate(positions), sides)

    def held_out(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield moments, float16 (2C, h, w), of the unflipped image and the label of each sample that training never sees."""
        shards, rows = self.order.held_out
        touched = np.unique(shards).tolist()
        for i, shard in enumerate(touched):
            self._buffer.request(touched[i : i + BLOCK_SHARDS])
            inside = rows[shards == shard]
            moments, labels = self._gather(Locations(np.full_like(inside, shard), inside), np.zeros_like(inside))
            yield from zip(moments, labels.tolist(), strict=True)

    def _gather(self, locations: Locations, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        channels, size = self.shape
        moments = np.empty((len(sides), 2 * channels, size, size), np.float16)
        stored = channels * (1 + self.manifest.encoding.posterior)
        moments[:, stored:] = NO_VARIANCE
        labels = np.empty(len(sides), np.int64)
        for index in np.unique(locations.shards).tolist():
            at, shard = locations.shards == index, self._buffer[index]
            moments[at, :stored] = shard.moments[locations.rows[at], sides[at]]
            labels[at] = shard.labels[locations.rows[at]]
        return moments, labels

    def _load(self, index: int) -> Shard:
        shard = self.manifest.shards[index]

        def fetch() -> bytes:
            data = read_verified(self.folder, shard.name, shard.digest, hashed=shard.digest.sha256 not in self._checked)
            if self.folder.local:
                self._checked.add(shard.digest.sha256)
            return data

        data = self._cache.get(shard.digest, fetch) if self._cache else fetch()
        return unpack(bytes(data) if self._copy else data, f"{self.folder}/{shard.name}")


def open_latents(
    folder: Folder, recipe: Recipe, workers: int, say: Callable[[str], None], order_seed: int | None = None
) -> tuple[Latents, list[str]]:
    """Return the reader for one of `workers`, and lines about its reading and mixing; `say` is called if its cache fails.

    `order_seed` is the seed of a model that has its own. The held-out images are always those of the sweep's seed.
    """
    manifest = LatentsManifest.require(folder)
    require_allowed(folder, recipe.data)
    if (theirs := manifest.made_from.num_classes) != recipe.data.num_classes:
        raise UserError(f"{folder}: latents of {theirs} classes, data.num_classes is {recipe.data.num_classes}: use another root")
    keep_all, how = fits_in_memory(recipe.reader, manifest.size_bytes, workers, len(recipe.models), free_memory_bytes())
    cache = None
    if folder.local is None and recipe.reader.cache_gib:
        where = recipe.reader.cache_folder
        try:
            cache = Cache(Path(where).expanduser() if where else own_folder(), int(recipe.reader.cache_gib * GIB), say)
            how += f"; cache {cache.folder}, up to {recipe.reader.cache_gib:g} GiB"
        except OSError as error:
            say(f"cache: {error.strerror or error}: training continues without it")
    data = recipe.data
    latents = Latents(
        folder, recipe.seed, data.held_out_images, normalise=data.normalise, cache=cache, keep_all=keep_all,
        order_seed=order_seed,
    )  # fmt: skip
    return latents, [how, mixing.words(manifest.mixing)]


def fits_in_memory(reader: Reader, set_bytes: int, workers: int, models: int, free_bytes: int) -> tuple[bool, str]:
    """Return whether a worker keeps the complete set in memory, and a line with the choice and its reason.

    `free_bytes` is the node's free memory. Other models of the sweep may train there as well, and fill their share later.
    """
    if reader.memory_gib is None:
        limit = free_bytes // 2 // (workers * models)
        source = f"auto: half of the free memory by {counted(workers, 'worker')} and {counted(models, 'model')}"
    else:
        limit, source = int(reader.memory_gib * GIB), "reader.memory_gib"
    keep = set_bytes <= limit
    way = "kept in memory" if keep else f"read by blocks of {BLOCK_SHARDS} shards"
    return keep, f"latents {way}: {set_bytes / GIB:.3g} GiB, limit {limit / GIB:.3g} GiB a worker ({source})"


class Micro(NamedTuple):
    """One lane of a step: scaled latents (B, C, h, w), labels (B; dropped ones are the null label) and noise (B, C, h, w).

    Labels are None for unconditional models.
    """

    x_BCHW: torch.Tensor
    y_B: torch.Tensor | None
    noise_BCHW: torch.Tensor


def micro_batch(
    latents: Latents, step: int, lane: int, *, batch: int, lanes: int, seed: int, flip: bool, label_dropout: float
) -> Micro:
    """Return the micro-batch at positions [step B + lane m, step B + (lane + 1) m), m = B / lanes.

    Its random numbers are made on the CPU. Times and drop-path masks are made in training/inputs.py.
    """
    micro = batch // lanes
    positions = np.arange(micro) + step * batch + lane * micro

    def generator(purpose: str) -> np.random.Generator:
        return seeds.generator(purpose, seed, step, lane)

    channels, size = latents.shape
    noise = _NOISE.submit(generator("noise").standard_normal, (micro, channels, size, size), np.float32)
    sides = generator("mirror").integers(0, 2, micro) if flip else np.zeros(micro, np.int64)
    moments, labels = latents.read(positions, sides)
    sample = sample_posterior(moments, generator("posterior"))
    y_B = None
    if (null := latents.manifest.made_from.num_classes) is not None:
        labels[generator("label dropout").random(micro) < label_dropout] = null
        y_B = torch.from_numpy(labels)
    return Micro(torch.from_numpy(latents.scaling.apply(sample)), y_B, torch.from_numpy(noise.result()))


def sample_posterior(moments_BCHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sample (B, C, h, w), float32, from posteriors given as moments (B, 2C, h, w): mean and log-variance."""
    moments = torch.from_numpy(moments_BCHW).float().numpy()  # exact, and many times as fast as numpy's conversion
    mean, deviation = np.split(moments, 2, axis=1)
    deviation *= 0.5
    np.exp(deviation, out=deviation)
    sample = rng.standard_normal(mean.shape, np.float32)
    sample *= deviation
    sample += mean
    return sample


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the same items, made by a thread up to two ahead. An exception of the thread is raised in its item's place.

    Sets the switch interval of this process's threads to `SWITCH_S`: a step launches kernels in Python, and hardly lets others run.
    """
    sys.setswitchinterval(SWITCH_S)
    ahead = in_order(repeat(items), lambda each: next(each, _END), threads=1)
    yield from takewhile(lambda item: item is not _END, ahead)
