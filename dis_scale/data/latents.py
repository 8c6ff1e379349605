"""The reader: which images step s takes, and their latents with all the step's random draws.

Epoch e is a two-level permutation from (seed, e): shards permuted, then samples permuted within blocks of K shards. So each image
comes once an epoch, a shard is read about once, memory is bounded by a block, and any position is found in O(shards), whatever
the world size and wherever a run starts.
"""

import threading
from collections.abc import Generator, Iterator
from functools import lru_cache
from queue import Queue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from dis_scale import manifest, seeds
from dis_scale.data.shards import Shard, unpack
from dis_scale.errors import UserError
from dis_scale.recipe import LatentShape
from dis_scale.storage import Folder

BLOCK_SHARDS = 4
T = TypeVar("T")


class Place(NamedTuple):
    """A sample: row of a shard, by the shard's index in the manifest."""

    shard: int
    row: int


class Order:
    """The endless sequence of samples without those held out; position p lies in epoch p // N."""

    def __init__(self, counts: list[int], seed: int, block_shards: int = BLOCK_SHARDS, held_out: int = 0) -> None:
        self.seed, self.block_shards = seed, block_shards
        self.rows = np.array(counts)
        self.held_out = self._hold_out(held_out)
        held = np.bincount([place.shard for place in self.held_out], minlength=len(counts))
        self.counts = self.rows - held
        self.total = int(self.counts.sum())
        self._epoch = lru_cache(2)(self._epoch_blocks)
        self._block = lru_cache(4)(self._block_places)

    def __getitem__(self, position: int) -> Place:
        epoch, place = divmod(position, self.total)
        starts, _ = self._epoch(epoch)
        block = int(np.searchsorted(starts, place, side="right")) - 1
        return Place(*self._block(epoch, block)[place - starts[block]].tolist())

    def _hold_out(self, count: int) -> list[Place]:
        """Samples drawn by the seed alone, in the order of the set."""
        starts, total = np.cumsum(self.rows) - self.rows, int(self.rows.sum())
        if count >= total:
            raise UserError(f"data.held_out_images: {count} of {total} images would leave none to train on")
        chosen = np.sort(seeds.generator("held out", self.seed).choice(total, count, replace=False))
        shards = np.searchsorted(starts, chosen, side="right") - 1
        return [Place(int(shard), int(i - starts[shard])) for shard, i in zip(shards, chosen, strict=True)]

    def _epoch_blocks(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The first position of each block, and the shards in it."""
        shards = seeds.generator("shards", self.seed, epoch).permutation(len(self.counts))
        blocks = [shards[i : i + self.block_shards] for i in range(0, len(shards), self.block_shards)]
        sizes = [int(self.counts[block].sum()) for block in blocks]
        return np.concatenate([[0], np.cumsum(sizes)[:-1]]), blocks

    def _block_places(self, epoch: int, block: int) -> np.ndarray:
        """The block's samples in their order, (n, 2) of shard and row."""
        shards = self._epoch(epoch)[1][block]
        places = np.array([(shard, row) for shard in shards for row in self._rows_of(shard)])
        return seeds.generator("samples", self.seed, epoch, block).permutation(places)

    def _rows_of(self, shard: int) -> np.ndarray:
        held = [place.row for place in self.held_out if place.shard == shard]
        return np.setdiff1d(np.arange(self.rows[shard]), held)


class Latents:
    """A sealed set of latent shards, read by position, each shard verified once and kept while its block lasts."""

    def __init__(self, folder: Folder, seed: int, held_out: int = 0) -> None:
        found = manifest.find(folder)
        assert found is not None, "the caller has checked that the latents exist"
        self.folder, self.manifest = folder, found
        self.shape = LatentShape(*found["latent"])
        self.order = Order([shard["count"] for shard in found["shards"]], seed, held_out=held_out)
        self._shard = lru_cache(2 * BLOCK_SHARDS)(self._read_shard)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Moments, float16 (2, 2C, h, w), and label of the sample at a position of the endless sequence."""
        return self._at(self.order[position])

    def held_out(self) -> Iterator[tuple[np.ndarray, int]]:
        """Moments, float16 (2C, h, w), of the unmirrored image and label of each sample that training never sees."""
        return ((moments[0], label) for moments, label in map(self._at, self.order.held_out))

    def scaled(self, sample: np.ndarray) -> np.ndarray:
        """Latents as the backbone sees them: (z - shift) scale, float32."""
        return (sample - np.float32(self.manifest["shift"])) * np.float32(self.manifest["scale"])

    def _at(self, place: Place) -> tuple[np.ndarray, int]:
        shard = self._shard(place.shard)
        return shard.moments[place.row], int(shard.labels[place.row])

    def _read_shard(self, index: int) -> Shard:
        entry: dict[str, Any] = self.manifest["shards"][index]
        return unpack(manifest.verified(self.folder, entry["name"], entry), f"{self.folder}/{entry['name']}")


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
    first = step * batch + lane * micro
    pairs = [latents[position] for position in range(first, first + micro)]

    def draw(what: str) -> np.random.Generator:
        return seeds.generator(what, seed, step, lane)

    flip = draw("mirror").integers(0, 2, micro) if mirror else np.zeros(micro, np.int64)
    moments = np.stack([pair[0][side] for pair, side in zip(pairs, flip, strict=True)])
    sample = draw_posterior(moments, draw("posterior"))
    labels = np.array([pair[1] for pair in pairs])
    labels[draw("label dropout").random(micro) < label_dropout] = latents.manifest["num_classes"]
    noise = draw("noise").standard_normal(sample.shape, np.float32)
    return Micro(torch.from_numpy(latents.scaled(sample)), torch.from_numpy(labels), torch.from_numpy(noise))


def draw_posterior(moments_BCHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sample (B, C, h, w), float32, of posteriors given as moments (B, 2C, h, w): mean and log-variance."""
    mean, log_variance = np.split(moments_BCHW.astype(np.float32), 2, axis=1)
    return mean + np.exp(0.5 * log_variance) * rng.standard_normal(mean.shape, np.float32)


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
