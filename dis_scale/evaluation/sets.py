"""Metrics of two complete sets of features: Kernel Inception Distance, precision and recall by torch-fidelity; copies."""

import numpy as np
import torch
from torch import Tensor

from dis_scale.process.errors import DisScaleError
from dis_scale.recipe.evaluate import KID_SUBSET_IMAGES

NEIGHBOURS = 3
COPY_RATIO = 1 / 3
"""A copy is nearer than this share of the second nearest image's distance (Yoon et al. 2023; Gu et al., arXiv 2310.02664)."""
ROWS = 1000
"""Rows of distances in memory at a time, never an N x N matrix."""


def kid(generated_ND: np.ndarray, real_MD: np.ndarray, images: int = KID_SUBSET_IMAGES) -> float:
    """Return the mean squared MMD over 100 random subsets of `images` from each set (Binkowski et al. 2018); may be < 0.

    There is no standard error, because the subsets overlap. DisScaleError if a set is smaller than a subset.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    if min(len(generated_ND), len(real_MD)) < images:
        raise DisScaleError(
            f"kid: subsets of {images:,} from {len(generated_ND):,} generated and {len(real_MD):,} real images: "
            f"expected at least {images:,} of each"
        )
    sets = torch.from_numpy(generated_ND), torch.from_numpy(real_MD)
    return float(kid_features_to_metric(*sets, kid_subset_size=images, verbose=False)["kernel_inception_distance_mean"])


def precision_recall(generated_ND: np.ndarray, real_MD: np.ndarray, rows: int = ROWS) -> tuple[float, float]:
    """Return (share of generated samples within a real one's ball, share of real samples within a generated one's).

    A ball reaches to the third nearest neighbour (Kynkaanniemi et al. 2019). DisScaleError if a set has fewer than four images.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(generated_ND), len(real_MD)) <= NEIGHBOURS:
        raise DisScaleError(f"precision_recall: {NEIGHBOURS} neighbours need at least {NEIGHBOURS + 1} images of each set")
    shares = prc_features_to_metric(
        torch.from_numpy(generated_ND), torch.from_numpy(real_MD),
        prc_neighborhood=NEIGHBOURS, prc_batch_size=rows, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    return shares["precision"], shares["recall"]


def nearest_ratios(generated_ND: np.ndarray, real_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (N) distances to the nearest real image over those to the second nearest, and (N) the numbers of the nearest.

    A ratio of 0 is a copy. Both images are found by products, and their distances are computed by differences, since products
    lose the distance of a copy to rounding.
    """
    centre, ratios, nearest = real_MD.mean(0, dtype=np.float64).astype(np.float32), list[Tensor](), list[Tensor]()
    real = torch.from_numpy(real_MD - centre)
    for rows in torch.from_numpy(generated_ND - centre).split(ROWS):
        two = torch.cdist(rows, real).topk(2, largest=False).indices
        distances, order = (rows[:, None] - real[two]).double().norm(dim=2).sort(1)
        first, second = distances.unbind(1)
        nearest.append(two.gather(1, order)[:, 0])
        ratios.append(first / second.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.cat(ratios).numpy(), torch.cat(nearest).numpy()


def copy_rate(ratios_N: np.ndarray, nearest_N: np.ndarray, known: int, images: float) -> tuple[float, float]:
    """Return the share of samples that copy one of `images` training images, of which `known` were compared; and its error.

    A copied image is among the compared ones with probability known / images, and all its copies are found with it. So the error
    is that of the number of copied images found, each weighted by its copies. With no copy found, it is the error of one.
    """
    scale = images / known / len(ratios_N)
    _, copies = np.unique(nearest_N[ratios_N < COPY_RATIO], return_counts=True)
    return min(1.0, float(copies.sum()) * scale), max(float(np.square(copies).sum()), 1.0) ** 0.5 * scale
