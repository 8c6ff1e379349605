"""The order of data: which sample is at which position of the endless sequence, for any rank and any start.

Epoch e is a two-level permutation from (seed, e): shards permuted, then samples permuted within blocks of K shards. So each image
is used once an epoch, and a shard is needed in one block only. Memory is bounded by a block; any position is found in O(shards).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dis_scale.data.mixing import BLOCK_SHARDS
from dis_scale.process import seeds
from dis_scale.process.errors import UserError


class Locations(NamedTuple):
    """Locations of samples: for each, its shard's index in the manifest, and its row in the shard."""

    shards: np.ndarray
    rows: np.ndarray


def require_some_to_train(held_out: int, images: int) -> None:
    """UserError if all images are held out."""
    if held_out >= images:
        raise UserError(f"data.held_out_images: {held_out:,} of {images:,} images would leave none to train on")


class Order:
    """The endless sequence of samples, without the held-out ones; position p is in epoch p // `total`.

    `seed` chooses the held-out samples, and also the order unless `order_seed` is given.
    Memory: a few numbers for each shard and held-out sample, and the tables of the last four blocks.
    """

    def __init__(
        self, counts: list[int], seed: int, block_shards: int = BLOCK_SHARDS, held_out: int = 0, order_seed: int | None = None
    ) -> None:  # fmt: skip
        self.seed, self.block_shards = seed, block_shards
        self.order_seed = seed if order_seed is None else order_seed
        self.sizes = np.array(counts)
        self.held_out = self._hold_out(held_out)
        self.counts = self.sizes - np.bincount(self.held_out.shards, minlength=len(counts))
        self.total = int(self.counts.sum())
        self._epoch = lru_cache(2)(self._epoch_shards)
        self._block = lru_cache(4)(self._block_samples)

    def locate(self, positions: np.ndarray) -> Locations:
        """Return the samples at these positions (n)."""
        epochs, inner = np.divmod(positions, self.total)
        shards, rows = np.empty_like(inner), np.empty_like(inner)
        for epoch in np.unique(epochs).tolist():
            starts, _ = self._epoch(epoch)
            blocks = np.where(epochs == epoch, np.searchsorted(starts, inner, side="right") - 1, -1)
            for block in np.unique(blocks[blocks >= 0]).tolist():
                at = blocks == block
                table = self._block(epoch, block)
                shards[at], rows[at] = (column[inner[at] - starts[block]] for column in table)
        return Locations(shards, rows)

    def shards_near(self, first: int, last: int) -> list[int]:
        """Return the shards of the blocks of positions `first` to `last` and of the block after those, in order."""
        near, position = list[int](), first
        while True:
            epoch, inner = divmod(position, self.total)
            starts, shards = self._epoch(epoch)
            block = int(np.searchsorted(starts, inner, side="right")) - 1
            inside = self._shards_of(shards, block)
            near += [shard for shard in inside.tolist() if self.counts[shard] and shard not in near]
            if position > last:
                return near
            position = epoch * self.total + int(starts[block] + self.counts[inside].sum())

    def _hold_out(self, count: int) -> Locations:
        """Choose held-out samples by the seed only: complete shards, each a random sample, and the first rows of the last one."""
        total = int(self.sizes.sum())
        require_some_to_train(count, total)
        shards = seeds.generator("held out shards", self.seed).permutation(len(self.sizes))
        before = np.cumsum(self.sizes[shards]) - self.sizes[shards]
        taken = np.zeros_like(self.sizes)
        taken[shards] = np.clip(count - before, 0, self.sizes[shards])
        return Locations(np.repeat(np.arange(len(taken)), taken), np.concatenate([np.arange(n) for n in taken]))

    def _epoch_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first position of each block, and all shards in the epoch's order."""
        shards = seeds.generator("shards", self.order_seed, epoch).permutation(len(self.counts))
        sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.block_shards))
        return np.cumsum(sizes) - sizes, shards

    def _shards_of(self, shards: np.ndarray, block: int) -> np.ndarray:
        return shards[block * self.block_shards : (block + 1) * self.block_shards]

    def _block_samples(self, epoch: int, block: int) -> Locations:
        """Return the block's samples in the epoch's order."""
        inside = self._shards_of(self._epoch(epoch)[1], block)
        rows = [self._rows_of(shard) for shard in inside]
        order = seeds.generator("samples", self.order_seed, epoch, block).permutation(sum(map(len, rows)))
        return Locations(np.repeat(inside, self.counts[inside])[order], np.concatenate(rows)[order])

    def _rows_of(self, shard: int) -> np.ndarray:
        held = self.held_out.rows[slice(*np.searchsorted(self.held_out.shards, [shard, shard + 1]))]
        return np.setdiff1d(np.arange(self.sizes[shard]), held)
