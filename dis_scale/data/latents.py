"""The reader: the latents of step s with all the step's random draws, the same at any world size and from wherever a run starts.

Shards of the block to come are loaded by threads while this one is read, through the node's cache where latents are in an object
store; each is held against the manifest's hash before it is looked at. Read next: order.py, cache.py and memory.py for the parts.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from dis_scale import manifest, seeds
from dis_scale.data.cache import Cache, default_folder
from dis_scale.data.memory import Shelf, free_memory_bytes
from dis_scale.data.order import BLOCK_SHARDS, Order, Places
from dis_scale.data.shards import Shard, unpack
from dis_scale.errors import UserError
from dis_scale.recipe import LatentShape, Reader, Recipe
from dis_scale.storage import Folder

GIB = 2**30
_DRAWING = ThreadPoolExecutor(1, "noise")
"""Draws the noise beside what else makes a micro-batch; a thread of its own, since numpy leaves Python's lock meanwhile."""
T = TypeVar("T")


class Latents:
    """A sealed set of latent shards, read by position; those not kept stay only while their block lasts. For one thread."""

    def __init__(
        self, folder: Folder, seed: int, held_out: int = 0, *, cache: Cache | None = None, keep_all: bool = False
    ) -> None:
        found = manifest.find(folder)
        assert found is not None, "the caller has checked that the latents exist"
        self.folder, self.manifest = folder.patient, found
        self.shape = LatentShape(*found["latent"])
        self.order = Order([shard["count"] for shard in found["shards"]], seed, held_out=held_out)
        self._cache, self._shelf = cache, Shelf(self._load, keep_all)

    def read(self, positions: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moments, float16 (n, 2C, h, w), and labels (n) at positions in rising order; side 0 is the image, 1 its mirror image."""
        self._shelf.want(self.order.shards_near(int(positions[0]), int(positions[-1])))
        return self._gather(self.order.places(positions), sides)

    def held_out(self) -> Iterator[tuple[np.ndarray, int]]:
        """Moments, float16 (2C, h, w), of the unmirrored image and label of each sample that training never sees."""
        shards, rows = self.order.held_out
        touched = np.unique(shards).tolist()
        for i, shard in enumerate(touched):
            self._shelf.want(touched[i : i + BLOCK_SHARDS])
            inside = rows[shards == shard]
            found = self._gather(Places(np.full_like(inside, shard), inside), np.zeros_like(inside))
            yield from zip(found[0], found[1].tolist(), strict=True)

    def scaled(self, sample: np.ndarray) -> np.ndarray:
        """Latents as the backbone sees them, in the sample's own memory: (z - shift) scale, float32."""
        sample -= np.float32(self.manifest["shift"])
        sample *= np.float32(self.manifest["scale"])
        return sample

    def _gather(self, places: Places, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        channels, size = self.shape
        moments = np.empty((len(sides), 2 * channels, size, size), np.float16)
        labels = np.empty(len(sides), np.int64)
        for index in np.unique(places.shards).tolist():
            at, shard = places.shards == index, self._shelf[index]
            moments[at] = shard.moments[places.rows[at], sides[at]]
            labels[at] = shard.labels[places.rows[at]]
        return moments, labels

    def _load(self, index: int) -> Shard:
        entry: dict[str, Any] = self.manifest["shards"][index]

        def fetch() -> bytes:
            return manifest.verified(self.folder, entry["name"], entry)

        data = self._cache.get(entry, fetch) if self._cache else fetch()
        return unpack(data, f"{self.folder}/{entry['name']}")


def open_latents(folder: Folder, recipe: Recipe, workers: int, say: Callable[[str], None]) -> tuple[Latents, str]:
    """The reader as the recipe has it, one of `workers`, and how it reads in a line; `say` is told if its cache fails."""
    found = manifest.find(folder)
    assert found is not None, "the caller has checked that the latents exist"
    set_bytes = sum(shard["bytes"] for shard in found["shards"])
    if (theirs := found["num_classes"]) != recipe.data.num_classes:
        raise UserError(
            f"{folder}: latents of {theirs} classes, data.num_classes is {recipe.data.num_classes}: use another root"
        )
    keep_all, how = choose_keeping(recipe.reader, set_bytes, workers)
    cache = None
    if folder.local is None and recipe.reader.cache_gib:
        where = recipe.reader.cache_folder
        cache = Cache(Path(where).expanduser() if where else default_folder(), int(recipe.reader.cache_gib * GIB), say)
        how += f"; cache {cache.folder}, up to {recipe.reader.cache_gib:g} GiB"
    return Latents(folder, recipe.seed, recipe.data.held_out_images, cache=cache, keep_all=keep_all), how


def choose_keeping(reader: Reader, set_bytes: int, workers: int) -> tuple[bool, str]:
    """Whether a worker keeps the whole set in memory, and the choice with its reason."""
    if reader.memory_gib is None:
        room, source = free_memory_bytes() // 2 // workers, f"auto: half of the free memory by {workers} workers"
    else:
        room, source = int(reader.memory_gib * GIB), "reader.memory_gib"
    keep = set_bytes <= room
    way = "kept in memory" if keep else f"read by blocks of {BLOCK_SHARDS} shards"
    return keep, f"latents {way}: {set_bytes / GIB:.3g} GiB, room for {room / GIB:.3g} a worker ({source})"


class Micro(NamedTuple):
    """One lane of a step: scaled latents (B, C, h, w), labels with the dropped ones null (B), and their positions' noise."""

    x_BCHW: torch.Tensor
    y_B: torch.Tensor
    noise_BCHW: torch.Tensor


def micro_batch(
    latents: Latents, step: int, lane: int, *, batch: int, lanes: int, seed: int, mirror: bool, label_dropout: float
) -> Micro:
    """Lane `lane` of step `step`: positions [step B + lane m, ... + m), m = B / lanes; every draw is made here, on the CPU."""
    micro = batch // lanes
    positions = np.arange(micro) + step * batch + lane * micro

    def draw(what: str) -> np.random.Generator:
        return seeds.generator(what, seed, step, lane)

    channels, size = latents.shape
    noise = _DRAWING.submit(draw("noise").standard_normal, (micro, channels, size, size), np.float32)
    flip = draw("mirror").integers(0, 2, micro) if mirror else np.zeros(micro, np.int64)
    moments, labels = latents.read(positions, flip)
    sample = draw_posterior(moments, draw("posterior"))
    labels[draw("label dropout").random(micro) < label_dropout] = latents.manifest["num_classes"]
    return Micro(torch.from_numpy(latents.scaled(sample)), torch.from_numpy(labels), torch.from_numpy(noise.result()))


def draw_posterior(moments_BCHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sample (B, C, h, w), float32, of posteriors given as moments (B, 2C, h, w): mean and log-variance."""
    moments = torch.from_numpy(moments_BCHW).float().numpy()  # exact, and many times as fast as numpy's conversion
    mean, deviation = np.split(moments, 2, axis=1)
    deviation *= 0.5
    np.exp(deviation, out=deviation)
    sample = rng.standard_normal(mean.shape, np.float32)
    sample *= deviation
    sample += mean
    return sample


def prefetch(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made by a thread that stays up to `depth` ahead; its exception is raised where the item would have come."""
    queue: Queue[Any] = Queue(depth)
    closed = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                queue.put((item, None))
                if closed.is_set():
                    return
            queue.put((None, StopIteration()))
        except BaseException as error:
            queue.put((None, error))

    threading.Thread(target=fill, daemon=True, name="prefetch").start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        while not queue.empty():
            queue.get_nowait()
