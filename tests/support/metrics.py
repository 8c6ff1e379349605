"""Distances of features at once, which the product computes of sums that grow by batches."""

import numpy as np

from dis_scale.evaluation.metrics import Frechet, MeanCovariance, Sums


def fit(features_ND: np.ndarray) -> MeanCovariance:
    """Return mean and covariance of features."""
    return Sums().plus(features_ND).mean_covariance()


def frechet(a: MeanCovariance, b: MeanCovariance) -> float:
    """Return the Frechet distance of two Gaussians."""
    return Frechet(a)(b)
