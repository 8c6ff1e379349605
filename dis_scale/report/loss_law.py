"""One law of all runs of a study: loss = E + A / N^a + B / D^b for N parameters and D images (Hoffmann et al. 2022, approach 3).

A parabola knows its own budget only. This law has the same coefficients at each, so it can be tested where it was not fitted: it is
fitted without the largest budget, whose lowest loss and best size it then predicts.

Images that were seen before are worth less: D counts the effective ones (Muennighoff et al. 2023, arXiv 2305.16264, equation 5).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
from scipy.special import huber

from dis_scale.report.fits import Interval, bootstrap_tail

LEAST_RUNS = 10
"""Runs that a fit needs: two for each coefficient."""
LEAST_APART = 3
"""Number of different budgets, and of different sizes, that a fit needs."""
REPEATS = np.array([np.inf, *2.0 ** np.arange(9)])
"""Constants of repetition that are tried: the repetitions after which a further one is worth 1/e of a new image."""
HALF_APART = 2**0.5
"""Half the distance between neighbouring constants, as a factor."""
ROBUST = 1.345
"""Residuals beyond this many standard deviations count less (Huber's loss, with 95 % of the efficiency of least squares)."""
OF_TRUNKS = 3
"""Coefficients that runs of one trunk do not determine between them: E, A and a."""
RESAMPLES = 400
STEPS = 60
"""Steps of the descent; most fits take about 20."""
LEAST_COEFFICIENTS, MOST_COEFFICIENTS = np.array([-30, -30, -30, 0.01, 0.01]), np.array([30, 30, 30, 3, 3])
NOTHING = 1e-6
"""A smaller limit is zero: the term of the sum has vanished."""
TINY = 1e-12


@dataclass(frozen=True)
class Runs:
    """Runs of one family: parameters, images seen, budgets and values, each of the shape (runs,); `unique` counts different images.

    `trunks` has a number for each trunk, which its branches share; by default each run is a training of its own.
    """

    parameters: np.ndarray
    images: np.ndarray
    budgets: np.ndarray
    values: np.ndarray
    unique: int | None = None
    trunks: np.ndarray | None = None

    def of(self, chosen: np.ndarray) -> Self:
        """Return some of the runs."""
        columns = {name: getattr(self, name)[chosen] for name in ("parameters", "images", "budgets", "values")}
        return replace(self, **columns, trunks=None if self.trunks is None else self.trunks[chosen])

    @property
    def independent(self) -> np.ndarray:
        """Number of each run's trunk, from 0."""
        runs: np.ndarray = np.arange(len(self.values))
        return runs if self.trunks is None else np.unique(self.trunks, return_inverse=True)[1]

    @property
    def repeated(self) -> bool:
        return self.unique is not None and bool(self.images.max() > self.unique)

    def images_at(self, sizes: np.ndarray, budget: float) -> np.ndarray:
        """Return the images that a budget gives these sizes; operations per image are interpolated between the runs."""
        order = np.argsort(self.parameters)
        flops = np.log(self.budgets / self.images)[order]
        images: np.ndarray = budget / np.exp(np.interp(np.log(sizes), np.log(self.parameters)[order], flops))
        return images


@dataclass(frozen=True)
class LossLaw:
    """A fit and its resamples, in this order along the first axis.

    `coefficients`, shape (samples, 5): the logarithms of E, A and B, the latter two at the `centre` of the runs' log N and log D,
    and the exponents a and b; `repeats`, shape (samples,), is infinite where a repeated image is worth as much as a new one.
    """

    coefficients: np.ndarray
    repeats: np.ndarray
    centre: np.ndarray
    runs: Runs

    def at(self, parameters: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the losses of runs, shape (samples, runs)."""
        worth = np.log(_effective(images, self.runs.unique, self.repeats[:, None]))
        logs = _model(self.coefficients, np.log(parameters) - self.centre[0], worth - self.centre[1])[0]
        losses: np.ndarray = np.exp(logs)
        return losses

    def estimate(self, samples: np.ndarray) -> Interval:
        """Return the first of the samples, and the interval of the others, which holds the first."""
        drawn, runs = int(self.runs.independent.max()) + 1, len(self.runs.values)
        tail = bootstrap_tail(drawn - (OF_TRUNKS if drawn < runs else 5 + self.runs.repeated), drawn)
        low, high = np.quantile(samples[1:], [tail, 1 - tail], method="nearest").tolist()
        first = float(samples[0])
        return Interval(first, min(low, first), max(high, first))

    @property
    def limit(self) -> Interval:
        """E, the loss that neither size nor images remove."""
        limits = np.exp(self.coefficients[:, 0])
        return self.estimate(np.where(limits < NOTHING, 0, limits))

    @property
    def exponents(self) -> tuple[Interval, Interval]:
        """a of the parameters, and b of the images."""
        return self._exponent(3), self._exponent(4)

    def _exponent(self, k: int) -> Interval:
        """Return an exponent. A resample at a limit of the tried exponents may be any value beyond that limit."""
        sample, least, most = self.coefficients[:, k], LEAST_COEFFICIENTS[k], MOST_COEFFICIENTS[k]
        return self.estimate(np.where(sample >= most, np.inf, np.where(sample <= least, 0, sample)))

    @property
    def repetition(self) -> Interval:
        """The times that an image is seen again until a further one is worth 1/e of a new image."""
        value, low, high = self.estimate(self.repeats)
        return Interval(value, low / HALF_APART, high * HALF_APART)

    def lowest(self, budget: float) -> "Best":
        """Return the best size of a budget within the sizes of the runs."""
        sizes = np.geomspace(self.runs.parameters.min(), self.runs.parameters.max(), 200)
        losses = self.at(sizes, self.runs.images_at(sizes, budget))
        best = losses.argmin(1)
        lowest = np.take_along_axis(losses, best[:, None], 1)[:, 0]
        return Best(sizes[best], lowest, bool(best[0] in (0, len(sizes) - 1)))

    @property
    def size_exponent(self) -> Interval | None:
        """Exponent of compute in the best size, from the smallest to the largest budget; None if one is at an end of the sizes."""
        ends = np.array([self.runs.budgets.min(), self.runs.budgets.max()])
        low, high = (self.lowest(budget) for budget in ends)
        if low.at_end or high.at_end:
            return None
        return self.estimate(np.log(high.sizes / low.sizes) / np.log(ends[1] / ends[0]))


class Best(NamedTuple):
    """Best sizes of a budget and their losses, each of the shape (samples,), and whether the fit's is at an end of the sizes."""

    sizes: np.ndarray
    losses: np.ndarray
    at_end: bool


def fit(runs: Runs, resamples: int = RESAMPLES) -> LossLaw | None:
    """Fit the law by Huber's loss of log losses, from 27 starts, and again to trunks drawn with replacement, with all their runs.

    None for too few runs, budgets, sizes or trunks, and if the runs do not determine it: an exponent is at a limit of those tried.
    """
    apart = min(len(np.unique(runs.budgets)), len(np.unique(runs.parameters)))
    trunks = int(runs.independent.max(initial=-1)) + 1
    if len(runs.values) < LEAST_RUNS or apart < LEAST_APART or trunks <= OF_TRUNKS:
        return None
    count, tried = len(runs.values), REPEATS if runs.repeated else REPEATS[:1]
    x, logs = np.log(runs.parameters), np.log(runs.values)
    y = np.log(_effective(runs.images, runs.unique, tried[:, None]))  # (tried, runs)
    centre = np.array([x.mean(), np.log(runs.images).mean()])
    data, each = (x - centre[0], y - centre[1], logs), np.arange(len(tried))
    starts, ones = np.repeat(_starts(logs)[:, None], len(tried), 1), np.ones(count)
    found, misfits = _descend(starts, *data, ones, np.inf)
    found = found[misfits.argmin(0), each]  # the best start of each constant
    residuals = _model(found, *data[:2])[0][misfits.min(0).argmin()] - logs
    spread = 1.4826 * float(np.median(np.abs(residuals))) * np.sqrt(count / (count - found.shape[1]))
    width = max(ROBUST * spread, 1e-9)
    found, misfits = _descend(found[None], *data, ones, width)
    best = found[0, misfits[0].argmin()]
    if not ((best > LEAST_COEFFICIENTS)[3:] & (best < MOST_COEFFICIENTS)[3:]).all():
        return None
    drawn = np.random.default_rng(0).multinomial(trunks, np.ones(trunks) / trunks, size=resamples)[:, runs.independent]
    again, again_misfits = _descend(np.repeat(found, resamples, 0), *data, drawn[:, None], width)
    chosen = np.append(misfits, again_misfits, 0).argmin(1)  # the best constant of each
    return LossLaw(np.append(found, again, 0)[np.arange(resamples + 1), chosen], tried[chosen], centre, runs)


def _starts(logs: np.ndarray) -> np.ndarray:
    """Return coefficients to begin from, shape (27, 5): shares of E in the lowest loss, and exponents."""
    shares, a, b = (each.ravel() for each in np.meshgrid((0.1, 0.5, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))
    rest = logs.min() + np.log((1 - shares) / 2)
    return np.stack([logs.min() + np.log(shares), rest, rest, a, b], 1)


def _effective(images: np.ndarray, unique: int | None, repeats: np.ndarray) -> np.ndarray:
    """Return how many new images the images seen are worth, if `unique` of them are different."""
    again = np.maximum(images / (unique or np.inf) - 1, 0)
    finite = np.where(np.isinf(repeats), 1, repeats)
    lost = np.where(np.isinf(repeats), 0, again + finite * np.expm1(-again / finite))
    worth: np.ndarray = images - lost * (unique or 0)
    return worth


def _model(coefficients: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log losses (..., runs) at log N and log D, and the shares of the law's three terms in each, (..., runs, 3)."""
    limit, size, images, a, b = (coefficients[..., k, None] for k in range(5))
    terms = np.stack(np.broadcast_arrays(limit, size - a * x, images - b * y), -1)
    top = terms.max(-1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(-1, keepdims=True)
    return (top + np.log(total))[..., 0], shares / total


def _descend(
    coefficients: np.ndarray, x: np.ndarray, y: np.ndarray, logs: np.ndarray, weights: np.ndarray, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return coefficients at minima of Huber's loss, and the losses: steps of Levenberg and Marquardt from all starts at once.

    Shapes: coefficients (samples, tried, 5), x and logs (runs,), y (tried, runs), weights of runs (samples, 1, runs) or (runs,).
    """
    damping, losses = np.full(coefficients.shape[:-1], 1e-2), np.full(coefficients.shape[:-1], np.inf)
    for _ in range(STEPS):
        values, shares = _model(coefficients, x, y)
        residuals = values - logs
        losses = (weights * huber(width, residuals)).sum(-1)
        slopes = shares[..., [0, 1, 2, 1, 2]] * np.stack(np.broadcast_arrays(1.0, 1.0, 1.0, -x, -y), -1)
        weighted = slopes * (weights * np.minimum(1, width / np.maximum(np.abs(residuals), TINY)))[..., None]
        curvature = np.swapaxes(weighted, -1, -2) @ slopes
        diagonal = np.einsum("...ii->...i", curvature) + TINY
        curvature[..., range(5), range(5)] += damping[..., None] * diagonal
        gradient = (weighted * residuals[..., None]).sum(-2)
        moved = coefficients - np.linalg.solve(curvature, gradient[..., None])[..., 0]
        moved = np.clip(moved, LEAST_COEFFICIENTS, MOST_COEFFICIENTS)
        better = (weights * huber(width, _model(moved, x, y)[0] - logs)).sum(-1) < losses
        coefficients = np.where(better[..., None], moved, coefficients)
        damping = np.clip(np.where(better, damping / 3, damping * 5), 1e-9, 1e9)
    return coefficients, losses
