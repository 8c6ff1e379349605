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


class Sums:
    """Count, sum and sum of outer products of features, in float64; of bounded size whatever the number of samples."""

    def __init__(self) -> None:
        self.count, self._sum, self._outer = 0, np.zeros(1), np.zeros((1, 1))

    def add(self, features_ND: np.ndarray) -> None:
        """Adds features; DisScaleError names the first sample that is not finite."""
        if not np.isfinite(features_ND).all():
            row = self.count + int(np.flatnonzero(~np.isfinite(features_ND).all(1))[0])
            raise DisScaleError(f"features of sample {row} are not finite: the images or the extractor are damaged")
        features_ND = features_ND.astype(np.float64)
        self.count += len(features_ND)
        self._sum = self._sum + features_ND.sum(0)
        self._outer = self._outer + features_ND.T @ features_ND

    def merge(self, other: "Sums") -> "Sums":
        """The sums of both sets."""
        both = Sums()
        both.count = self.count + other.count
        both._sum, both._outer = self._sum + other._sum, self._outer + other._outer
        return both

    def gaussian(self) -> Gaussian:
        """Mean and covariance; DisScaleError where the samples are too few."""
        if self.count < 2:
            raise DisScaleError(f"a covariance needs at least 2 samples, got {self.count}")
        mean = self._sum / self.count
        covariance = (self._outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(self.count, mean, covariance)


def fit(features_ND: np.ndarray) -> Gaussian:
    """The Gaussian of some features; DisScaleError where they are too few or not finite."""
    sums = Sums()
    sums.add(features_ND)
    return sums.gaussian()


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


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
