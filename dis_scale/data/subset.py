"""Images for the small networks that a sweep trains: its autoencoder and its classifiers."""

from typing import Literal

import numpy as np

from dis_scale.data.sources import Source, select_decodable

MOST_IMAGES = 8192
"""Most images that small networks are trained on, taken evenly from the source."""


def load_subset(source: Source, resolution: int, undecodable: Literal["refuse", "skip"]) -> tuple[np.ndarray, np.ndarray]:
    """Return up to `MOST_IMAGES` images, uint8 (N, R, R, 3), and their labels, int64 (N)."""
    step = -(-len(source) // MOST_IMAGES)
    images, labels = [], []
    for i in range(0, len(source), step):
        one = range(i, i + 1)
        decodable, _ = select_decodable(one, source.decoded(one, resolution), undecodable)
        images += [pixels for _, pixels in decodable]
        labels += [source.labels[position] for position, _ in decodable]
    return np.stack(images), np.array(labels, dtype=np.int64)
