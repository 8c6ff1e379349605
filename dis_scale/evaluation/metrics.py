"""The Frechet distance between sets of features, in float64, with its standard error and its limit for infinite samples.

Sums over groups of samples are merged in a fixed order, so one worker or eight give bit-equal metrics.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dis_scale.process import seeds
from dis_scale.process.errors import DisScaleError
from dis_scale.recipe.evaluate import INFINITY_SAMPLES_PER_FEATURE

FOLDS = 20
"""Groups in the jackknife."""
INFINITY_POINTS = 15
"""Points of the regression, as in Chong and Forsyth."""
INFINITY_SHARE, INFINITY_RATIO = 0.1, INFINITY_SAMPLES_PER_FEATURE / 2
"""Size of the regression's smallest subset: the larger of a tenth of the samples and 2.5 times the features. Chong and Forsyth take
5,000 of 50,000 under Inception."""


@dataclass(frozen=True)
class MeanCovariance:
    """Count, mean (d) and covariance (d, d; divided by n - 1) of a set of features."""

    count: float
    mean: np.ndarray
    covariance: np.ndarray


class Estimate(NamedTuple):
    """A value, its standard error, and its values (FOLDS) without each group of samples; None if they cannot be estimated."""

    value: float
    error: float | None = None
    left_out: np.ndarray | None = None


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of outer products of features, in float64. The size does not depend on the number of samples.

    The count is the sum of the weights, if there are any.
    """

    count: float = 0
    sum: np.ndarray = field(default_factory=lambda: np.zeros(1))
    outer: np.ndarray = field(default_factory=lambda: np.zeros((1, 1)))

    def plus(self, features_ND: np.ndarray, weights_N: np.ndarray | None = None) -> "Sums":
        """Return the sums with more features, weighted if given; DisScaleError names the first sample that is not finite."""
        require_finite(features_ND, int(self.count) + np.arange(len(features_ND)))
        features_ND = features_ND.astype(np.float64)
        weighted_ND = features_ND if weights_N is None else features_ND * weights_N[:, None]
        count = len(features_ND) if weights_N is None else float(weights_N.sum())
        return self.merge(Sums(count, weighted_ND.sum(0), weighted_ND.T @ features_ND))

    def merge(self, other: "Sums") -> "Sums":
        """Return the sums of both sets."""
        return Sums(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def without(self, other: "Sums") -> "Sums":
        """Return the sums of this set without one of its parts."""
        return Sums(self.count - other.count, self.sum - other.sum, self.outer - other.outer)

    @classmethod
    def of(cls, statistics: MeanCovariance) -> "Sums":
        """Return the sums that have this mean and covariance."""
        n, mean = statistics.count, statistics.mean
        return cls(n, n * mean, (n - 1) * statistics.covariance + n * np.outer(mean, mean))

    def mean_covariance(self) -> MeanCovariance:
        """Return mean and covariance; DisScaleError if there are too few samples."""
        if self.count < 2:
            raise DisScaleError(f"a covariance needs at least 2 samples, got {self.count}")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return MeanCovariance(self.count, mean, covariance)


class Frechet:
    """Frechet distance to one reference: |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) (Heusel et al. 2017, equation 6).

    The root S^1/2 is computed once, because standard errors need many distances.
    """

    def __init__(self, reference: MeanCovariance) -> None:
        self._reference, self._root = reference, _root(reference.covariance)

    def __call__(self, other: MeanCovariance) -> float:
        mine = self._reference
        cross = np.linalg.eigvalsh(self._root @ other.covariance @ self._root)
        mixed = np.sqrt(np.clip(cross, 0, None)).sum()
        traces = np.trace(mine.covariance) + np.trace(other.covariance)
        return float(((mine.mean - other.mean) ** 2).sum() + traces - 2 * mixed)


class Groups:
    """`Sums` over `FOLDS` even groups of consecutive samples, `samples` in all, for the jackknife."""

    def __init__(self, samples: int) -> None:
        self.samples, self._seen = samples, 0
        self._groups = [Sums() for _ in range(FOLDS)]

    def add(self, features_ND: np.ndarray, numbers_N: np.ndarray | None = None, weights_N: np.ndarray | None = None) -> None:
        """Add samples with the given numbers, by default the next ones; DisScaleError names the first that is not finite."""
        numbers_N = self._seen + np.arange(len(features_ND)) if numbers_N is None else numbers_N
        require_finite(features_ND, numbers_N)
        group = numbers_N * FOLDS // self.samples
        for g in np.unique(group):
            weights = None if weights_N is None else weights_N[group == g]
            self._groups[g] = self._groups[g].plus(features_ND[group == g], weights)
        self._seen += len(features_ND)

    def total(self) -> Sums:
        return functools.reduce(Sums.merge, self._groups)

    def distance(self, frechet: Frechet) -> Estimate:
        """Return the distance and its standard error by the delete-a-group jackknife.

        There is no error if a set without a group has no more samples than features: its covariance is singular.
        """
        total = self.total()
        statistics = total.mean_covariance()
        require_samples(statistics.count, len(statistics.mean))
        if not has_error(statistics.count, len(statistics.mean)):
            return Estimate(frechet(statistics))
        left_out = np.array([frechet(total.without(group).mean_covariance()) for group in self._groups])
        return Estimate(frechet(statistics), jackknife_error(left_out), left_out)


def jackknife_error(left_out: np.ndarray) -> float:
    """Return the standard error of a value from its values without each group (Efron and Tibshirani 1993, chapter 11).

    For the difference of two values, pass the differences of their lists, if the groups of both share their noise.
    """
    return float(np.sqrt((FOLDS - 1) / FOLDS * ((left_out - left_out.mean()) ** 2).sum()))


def require_finite(features_ND: np.ndarray, numbers_N: np.ndarray) -> None:
    """Raise DisScaleError if a sample is not finite; it names the first by its number in `numbers_N`."""
    bad = np.flatnonzero(~np.isfinite(features_ND).all(1))
    if len(bad):
        raise DisScaleError(f"features of sample {numbers_N[bad[0]]} are not finite: the images or the extractor are damaged")


def require_samples(
    count: float, features: int, noun: str = "samples", where: str = "", cure: str = "; raise evaluate.samples",
    kind: type[DisScaleError] = DisScaleError,
) -> None:  # fmt: skip
    """Raise an error of class `kind` if `count` samples are too few for a covariance of this many features."""
    if count <= features:
        raise kind(
            f"{where}{count:,.0f} {noun} are too few for the covariance of {features:,} features: expected at least "
            f"{features + 1:,}{cure}"
        )


def has_error(samples: float, features: int) -> bool:
    """Return whether each set of the jackknife has more samples than features."""
    return samples - -(-samples // FOLDS) > features


def infinity(features_ND: np.ndarray, frechet: Frechet, seed: int) -> Estimate:
    """Return FID-infinity, the intercept of the distance over 1/N (Chong and Forsyth 2020), with its jackknife.

    Least squares over `INFINITY_POINTS` subsets of rising size, without replacement. Each subset is spread evenly over the samples,
    so with balanced labels it has nearly the class shares of all samples. With random subsets the intercept would be too low.
    Subsets overlap, so the residuals of the line give no error: the jackknife leaves each group out of all subsets.
    Raises DisScaleError if there are too few samples.
    """
    samples, d = features_ND.shape
    sizes = np.linspace(require_infinity(samples, d), samples, INFINITY_POINTS).astype(int)
    distances = []
    for size in sizes:
        groups = Groups(samples)
        start = seeds.generator("fid infinity", seed, int(size)).random()
        numbers = np.sort(np.argsort((start + np.arange(samples) * math.sqrt(2)) % 1)[:size])
        groups.add(features_ND[numbers], numbers)
        value, _, left_out = groups.distance(frechet)
        assert left_out is not None, "a subset has over twice as many samples as features"
        distances.append([value, *left_out])
    _, (limit, *without) = np.polyfit(1 / sizes, np.array(distances), 1)  # the scale of 1/N does not move the intercept
    return Estimate(float(limit), jackknife_error(np.array(without)), np.array(without))


def require_infinity(samples: int, features: int) -> int:
    """Return the size of the smallest subset of `infinity`; DisScaleError if there are too few samples for it."""
    least = int(np.ceil(max(INFINITY_SHARE * samples, INFINITY_RATIO * features)))
    if samples < 2 * least:
        raise DisScaleError(
            f"distance_infinity: {samples:,} samples are too few for {features:,} features: expected at least "
            f"{int(np.ceil(2 * INFINITY_RATIO * features)):,}; raise evaluate.samples"
        )
    return least


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
