"""Images for the small networks that a sweep trains: its autoencoder and its classifiers."""

from typing import Literal

import numpy as np

from dis_scale.data.sources import READERS, Source, select_decodable
from dis_scale.process.errors import UserError
from dis_scale.process.threads import in_order

MOST_IMAGES = 8192
"""Most images that small networks are trained on, taken evenly from the source."""


def load_subset(source: Source, resolution: int, undecodable: Literal["refuse", "skip"]) -> tuple[np.ndarray, np.ndarray]:
    """Return up to `MOST_IMAGES` images, uint8 (N, R, R, 3), and their labels, int64 (N)."""
    positions = range(0, len(source), -(-len(source) // MOST_IMAGES))
    images = in_order(positions, lambda i: source.decoded(range(i, i + 1), resolution)[0], READERS)
    decodable, _ = select_decodable(positions, images, undecodable)
    if not decodable:
        raise UserError(f"{source.listing.where}: none of {len(positions):,} images can be decoded")
    return np.stack([pixels for _, pixels in decodable]), np.array([source.labels[i] for i, _ in decodable], dtype=np.int64)
