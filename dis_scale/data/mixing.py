"""The mixed order of a set: shards hold entries of a seeded permutation of the source, so any four are a random sample.

Sources list class by class. Shards in that order would fill a batch with the few classes of one block of shards, whatever the
shuffle within the block. Read next: listing.py and staging.py, which apply the order; order.py, which relies on it.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np

from dis_scale import seeds

BLOCK_SHARDS = 4
"""Shards among which training permutes samples."""
BATCHES = (128, 256, 1024)
"""Batches for which a set's mixing is measured."""


def permutation(count: int) -> np.ndarray:
    """Return the source's entry at each place of the mixed order: a function of their number alone."""
    return seeds.generator("mixed order", count).permutation(count)


def order_hash(entries: np.ndarray) -> str:
    """Return a hash of entries in their order: another NumPy may have another permutation, and a set must not mix two."""
    return hashlib.sha256(entries.astype("<i8").tobytes()).hexdigest()[:16]


class LabelCounts:
    """Images by label: of the set, and of each block of `BLOCK_SHARDS` shards, among which training draws a batch."""

    def __init__(self) -> None:
        self.total = Counter[str]()
        self._block, self._shards = Counter[str](), 0
        self._expected: list[tuple[int, list[float]]] = []
        """Images of each earlier block, and the expected distinct labels of each of `BATCHES`."""

    def add(self, labels: Mapping[str, int]) -> None:
        """Count one shard's images by label, after those of the shards before it."""
        self.total.update(labels)
        self._block.update(labels)
        self._shards += 1
        if self._shards % BLOCK_SHARDS == 0:
            self._end_block()

    def distinct(self) -> dict[str, float]:
        """Return by batch the distinct labels of a batch, relative to those of independent draws: 1 if well mixed."""
        self._end_block()
        counts = np.array(list(self.total.values()))
        shares = counts / max(counts.sum(), 1)
        ratios = [
            [
                distinct / _independent(shares, min(batch, images))
                for batch, distinct in zip(BATCHES, block, strict=True)
            ]
            for images, block in self._expected
        ]
        return {str(batch): round(float(r), 4) for batch, r in zip(BATCHES, np.mean(ratios, axis=0), strict=True)}

    def _end_block(self) -> None:
        if images := self._block.total():
            counts = np.array(list(self._block.values()))
            self._expected.append((images, [_of_block(counts, min(batch, images)) for batch in BATCHES]))
        self._block.clear()


def words(mixing: Mapping[str, float]) -> str:
    """Return the measure in a line."""
    sizes = ", ".join(f"{int(batch):,}" for batch in mixing)
    shares = ", ".join(f"{share:.1%}" for share in mixing.values())
    return f"a batch of {sizes} has {shares} of the distinct labels that independent draws would have"


def _of_block(counts: np.ndarray, batch: int) -> float:
    """Expected number of distinct labels in `batch` images drawn without replacement from these counts."""
    total = int(counts.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    others = total - counts
    left = others - batch
    log_missing = (log_factorial[others] - log_factorial[np.maximum(left, 0)]) - (
        log_factorial[total] - log_factorial[total - batch]
    )
    return float((1 - np.exp(log_missing) * (left >= 0)).sum())  # with fewer others than `batch`, the label is in each


def _independent(shares: np.ndarray, batch: int) -> float:
    """Expected number of distinct labels in `batch` independent draws."""
    return float((1 - (1 - shares) ** batch).sum())
