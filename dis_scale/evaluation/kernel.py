"""The Kernel Inception Distance: squared MMD under a cubic kernel, averaged over random subsets (Binkowski et al. 2018)."""

import numpy as np

from dis_scale.process.errors import DisScaleError
from dis_scale.recipe.evaluate import KID_SUBSET_IMAGES

SEED, SUBSETS = 2020, 100
"""As in torch-fidelity."""


def kid(
    generated_ND: np.ndarray, real_MD: np.ndarray, subsets: int = SUBSETS, images: int = KID_SUBSET_IMAGES
) -> float:
    """Return the mean over `subsets` random subsets of `images` from each set, chosen as in torch-fidelity; may be slightly < 0.

    Products are computed in the features' float32, the kernel and its sums in float64. There is no standard error, because the
    subsets overlap. DisScaleError if a set is smaller than a subset.
    """
    if min(len(generated_ND), len(real_MD)) < images:
        raise DisScaleError(
            f"kid: subsets of {images:,} from {len(generated_ND):,} generated and {len(real_MD):,} real images: "
            f"expected at least {images:,} of each"
        )
    rng, estimates = np.random.RandomState(SEED), []
    for _ in range(subsets):
        x = generated_ND[rng.choice(len(generated_ND), images, replace=False)]
        y = real_MD[rng.choice(len(real_MD), images, replace=False)]
        estimates.append(_squared_mmd(x, y))
    return float(np.mean(estimates))


def _squared_mmd(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Return the unbiased estimate from two sets of equal size n."""
    n = len(x_ND)
    within = sum(k.sum() - np.trace(k) for k in (_cubic(x_ND, x_ND), _cubic(y_ND, y_ND)))
    return within / (n * (n - 1)) - 2 * _cubic(x_ND, y_ND).mean()


def _cubic(x_ND: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
    base = (x_ND @ y_ND.T).astype(np.float64) / x_ND.shape[1] + 1
    return base * base * base
