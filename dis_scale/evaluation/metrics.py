"""Distances between sets of features, in float64, with their errors.

Sums by block are merged in block order, so one worker or eight give the same figure bit for bit.
"""

from dataclasses import dataclass

import numpy as np

from dis_scale.errors import DisScaleError

FOLDS = 20
"""Groups of the jackknife."""


@dataclass(frozen=True)
class Gaussian:
    """Count, mean (d) and covariance (d, d) of a set of features, the covariance with n - 1."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


def fit(features_ND: np.ndarray) -> Gaussian:
    """The Gaussian of some features; DisScaleError where they are too few or not finite."""
    if len(features_ND) < 2:
        raise DisScaleError(f"a covariance needs at least 2 samples, got {len(features_ND)}")
    if not np.isfinite(features_ND).all():
        row = int(np.flatnonzero(~np.isfinite(features_ND).all(1))[0])
        raise DisScaleError(f"features of sample {row} are not finite: the images or the extractor are damaged")
    features_ND = features_ND.astype(np.float64)
    return Gaussian(len(features_ND), features_ND.mean(0), np.cov(features_ND, rowvar=False))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance of two Gaussians: |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) (Heusel et al. 2017, equation 6)."""
    root = _root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    mixed = np.sqrt(np.clip(cross, 0, None)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed)


def frechet_error(features_ND: np.ndarray, reference: Gaussian) -> float:
    """Standard error of `frechet` by the delete-a-group jackknife over `FOLDS` groups of samples (Efron and Tibshirani 1993)."""
    group = np.arange(len(features_ND)) * FOLDS // len(features_ND)
    left_out = np.array([frechet(fit(features_ND[group != g]), reference) for g in range(FOLDS)])
    return float(np.sqrt((FOLDS - 1) / FOLDS * ((left_out - left_out.mean()) ** 2).sum()))


def halves_distance(features_ND: np.ndarray) -> float:
    """The distance between the even and the odd half of a real set: what a perfect model would reach with so many samples."""
    return frechet(fit(features_ND[::2]), fit(features_ND[1::2]))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
