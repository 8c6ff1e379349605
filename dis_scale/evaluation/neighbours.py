"""Improved precision and recall, by k-nearest-neighbour balls around the samples (Kynkaanniemi et al. 2019)."""

import numpy as np
import torch
from torch import Tensor

from dis_scale.process.errors import DisScaleError

NEIGHBOURS = 3
ROWS = 1000
"""Rows of distances in memory at a time, never an N x N matrix."""


def precision_recall(generated_ND: np.ndarray, real_MD: np.ndarray) -> tuple[float, float]:
    """Return (share of generated samples within a real one's ball, share of real samples within a generated one's).

    Compared in float32, as in torch-fidelity. DisScaleError if a set has fewer than `NEIGHBOURS` + 1 images.
    """
    if min(len(generated_ND), len(real_MD)) <= NEIGHBOURS:
        raise DisScaleError(
            f"precision_recall: {NEIGHBOURS} neighbours need at least {NEIGHBOURS + 1} images of each set"
        )
    generated, real = torch.from_numpy(generated_ND), torch.from_numpy(real_MD)
    radii_N, radii_M = _radii(generated), _radii(real)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool)
    for rows, radii in zip(generated.split(ROWS), radii_N.split(ROWS), strict=True):
        distances = torch.cdist(rows, real)
        precise.append((distances <= radii_M).any(1))
        recalled |= (distances <= radii[:, None]).any(0)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _radii(x_ND: Tensor) -> Tensor:
    """Return distances (N) to the `NEIGHBOURS`-th nearest other sample; the nearest sample is itself, at distance 0."""
    nearest = [torch.cdist(rows, x_ND).topk(NEIGHBOURS + 1, largest=False).values[:, -1] for rows in x_ND.split(ROWS)]
    return torch.cat(nearest)
