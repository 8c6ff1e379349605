"""Metrics of two complete sets of features, by torch-fidelity: the Kernel Inception Distance, precision and recall."""

import numpy as np
import torch

from dis_scale.process.errors import DisScaleError
from dis_scale.recipe.evaluate import KID_SUBSET_IMAGES

NEIGHBOURS = 3
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


def precision_recall(generated_ND: np.ndarray, real_MD: np.ndarray) -> tuple[float, float]:
    """Return (share of generated samples within a real one's ball, share of real samples within a generated one's).

    A ball reaches to the third nearest neighbour (Kynkaanniemi et al. 2019). DisScaleError if a set has fewer than four images.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(generated_ND), len(real_MD)) <= NEIGHBOURS:
        raise DisScaleError(
            f"precision_recall: {NEIGHBOURS} neighbours need at least {NEIGHBOURS + 1} images of each set"
        )
    shares = prc_features_to_metric(
        torch.from_numpy(generated_ND), torch.from_numpy(real_MD),
        prc_neighborhood=NEIGHBOURS, prc_batch_size=ROWS, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    return shares["precision"], shares["recall"]
