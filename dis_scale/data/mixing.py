"""The mixed order of a set: shards hold entries of a seeded permutation of the source, so any four are a random sample.

Sources list class by class. Shards in that order would fill a batch with the few classes of one block of shards, whatever the
shuffle within the block. Read next: listing.py and staging.py, which apply the order; order.py, which relies on it.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np

from dis_scale.process import seeds

BLOCK_SHARDS = 4
"""Shards among which training permutes samples."""
BATCHES = (128, 256, 1024)
"""Batches for which a set's mixing is measured."""


def permutation(count: int) -> np.ndarray:
    """Return the source's entry at each place of the mixed order. It depends on the number of entries only."""
    return seeds.generator("mixed order", count).permutation(count)


def order_hash(entries: np.ndarray) -> str:
    """Return a hash of entries in their order: another NumPy may have another permutation, and a set must not mix two."""
    return hashlib.sha256(entries.astype("<i8").tobytes()).hexdigest()[:16]


class LabelCounts:
    """Images by label: of the set, and of each block of `BLOCK_SHARDS` shards, among which training draws a batch.

    A batch that is larger than a block is measured over several blocks; one that is larger than the set, over the set.
    """

    def __init__(self) -> None:
        self.total = Counter[str]()
        self._block, self._shards = Counter[str](), 0
        self._waiting = {batch: Counter[str]() for batch in BATCHES}
        """Images of the earlier blocks that are too few for the batch."""
        self._expected: dict[int, list[tuple[int, float]]] = {batch: [] for batch in BATCHES}
        """Images drawn from each of the earlier blocks, and their expected distinct labels."""

    def add(self, labels: Mapping[str, int]) -> None:
        """Count one shard's images by label, after those of the shards before it."""
        self.total.update(labels)
        self._block.update(labels)
        self._shards += 1
        if self._shards % BLOCK_SHARDS == 0:
            self._end_block(last=False)

    def distinct(self) -> dict[str, float]:
        """Return by batch the distinct labels of a batch, relative to those of independent draws: 1 if well mixed.

        Empty for images of one class, or without classes.
        """
        if len(self.total) < 2:
            return {}
        self._end_block(last=True)
        counts = np.array(list(self.total.values()))
        shares = counts / max(counts.sum(), 1)
        ratios = {
            batch: [distinct / _independent(shares, drawn) for drawn, distinct in expected]
            for batch, expected in self._expected.items()
        }
        return {str(batch): round(float(np.mean(each)), 4) for batch, each in ratios.items()}

    def _end_block(self, *, last: bool) -> None:
        for batch, waiting in self._waiting.items():
            waiting.update(self._block)
            if (images := waiting.total()) >= (1 if last else batch):
                drawn = min(batch, images)
                self._expected[batch].append((drawn, _of_block(np.array(list(waiting.values())), drawn)))
                waiting.clear()
        self._block.clear()


def words(mixing: Mapping[str, float]) -> str:
    """Return the measure in a line."""
    if not mixing:
        return "not measured: it is by labels, and there are no two"
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
