"""How distance depends on cost: correlation, power laws with their intervals, the lower hull."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import fdtri, ndtr, stdtrit

from dis_scale.report.points import Error

CONFIDENCE = 0.95
FEW = 4
"""Most points of a correlation that is marked as `few points`."""
NEGLIGIBLE = 1e-3
"""Relative residual of a law that is never called a lack of fit."""
EXPONENTS = np.geomspace(0.01, 2, 500)
"""Exponents that `limited_law` tries, 1 % apart."""


def pearson(gmacs: Sequence[float], distances: Sequence[float]) -> float | None:
    """Return Pearson's r of distance and log Gflops, as in the DiT and DiS papers; None for fewer than 3 points or no spread."""
    if len(gmacs) < 3 or np.ptp(gmacs) == 0 or np.ptp(distances) == 0:
        return None
    return float(np.corrcoef(np.log(gmacs), distances)[0, 1])


class Interval(NamedTuple):
    """A value of a fit and its interval at 95 %, whose ends are NaN if the values leave the law."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        return not math.isnan(self.low)

    def words(self, form: str) -> str:
        if not self.known:
            return f"{self.value:{form}} (no interval: the values leave the law)"
        high = f"to {self.high:{form}}" if math.isfinite(self.high) else "without an upper end"
        return f"{self.value:{form}} (95 % interval {self.low:{form}} {high})"


@dataclass(frozen=True)
class PowerLaw:
    """value = limit + factor x cost^exponent."""

    factor: float
    exponent: Interval
    limit: Interval

    def at(self, cost: np.ndarray) -> np.ndarray:
        return self.limit.value + self.factor * cost**self.exponent.value


def power_law(costs: Sequence[float], distances: Sequence[float], floor: float = 0.0) -> PowerLaw | None:
    """Fit the logarithms of the distances above the floor by least squares, with Student's interval; without it if they bend.

    The interval is that of the mean slope over these costs: if the models have a limit above the floor, the exponent falls with
    the cost, which few points do not show. Return None for fewer than 4 points, one cost, or a distance not above the floor.
    """
    if len(costs) < 4 or np.ptp(costs) == 0 or min(distances) <= floor:
        return None
    from scipy.stats import linregress  # takes half a second more than scipy.special, and most reports have no fit

    x, y = np.log(costs), np.log(np.subtract(distances, floor))
    fit = linregress(x, y)
    margin = stdtrit(len(costs) - 2, (1 + CONFIDENCE) / 2) * fit.stderr
    slope = Interval(*map(float, (fit.slope, fit.slope - margin, fit.slope + margin)))
    return PowerLaw(float(np.exp(fit.intercept)), Interval(slope.value) if _bends(x, y) else slope, Interval(floor, floor, floor))


def _bends(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether Student's test finds a square term beside the line, at 5 %; False for fewer than three different costs."""
    if len(np.unique(x)) < 3:
        return False
    design = np.stack([np.ones_like(x), x - x.mean(), (x - x.mean()) ** 2], 1)
    inverse = np.linalg.pinv(design)
    bend, residuals = (inverse @ y)[2], y - design @ (inverse @ y)
    freedom = len(x) - 3
    error = max(math.sqrt(float((residuals**2).sum()) / freedom), NEGLIGIBLE) * float(np.linalg.norm(inverse[2]))
    return bool(abs(bend) > stdtrit(freedom, (1 + CONFIDENCE) / 2) * error)


def limited_law(costs_C: np.ndarray, values_CS: np.ndarray) -> np.ndarray:
    """Fit a power law that falls to a limit, which is not negative, by least squares of the relative residuals.

    With a given exponent the law is linear in limit and factor, whose normal equations are solved; the best exponent is taken.
    Returns limit, factor and exponent of limit + factor / cost^exponent, shape (3, samples).
    """
    samples, least = values_CS.shape[1], costs_C.min()
    ones_CS = 1 / values_CS
    best = np.full((4, samples), np.inf)
    for exponent in EXPONENTS:
        powers_CS = (costs_C[:, None] / least) ** -exponent / values_CS
        cross, squares = (ones_CS * powers_CS).sum(0), (powers_CS**2).sum(0)
        determinant = (ones_CS**2).sum(0) * squares - cross**2
        limit = np.maximum((ones_CS.sum(0) * squares - powers_CS.sum(0) * cross) / determinant, 0)
        factor = (powers_CS.sum(0) - limit * cross) / squares
        misfit = ((1 - limit * ones_CS - factor * powers_CS) ** 2).sum(0)
        law = np.stack([misfit, limit, factor * least**exponent, np.full(samples, exponent)])
        best = np.where(misfit < best[0], law, best)
    laws: np.ndarray = best[1:]
    return laws


def lack_of_fit(residuals: np.ndarray, coefficients: int, variance: float, freedom: int) -> bool:
    """Return whether an F test rejects, at 5 %, that a law's relative residuals are noise of this variance.

    The variance is an estimate with `freedom` degrees of freedom. A law always fits as many values as it has coefficients.
    """
    over = len(residuals) - coefficients
    if not over:
        return False
    allowed = max(variance * fdtri(over, freedom, CONFIDENCE), NEGLIGIBLE**2)
    return bool((residuals**2).sum() / over > allowed)


def student_margin(x: np.ndarray, residuals: np.ndarray) -> float:
    """Return half of Student's interval, at 95 %, of the slope of a line with these residuals; 0 for a line through two points."""
    freedom = len(x) - 2
    if not freedom:
        return 0.0
    spread = math.sqrt(float((residuals**2).sum()) / freedom / float(((x - x.mean()) ** 2).sum()))
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * spread


def bootstrap_tail(freedom: int, drawn: int | None = None) -> float:
    """Return the share below the percentile interval's lower end: smaller for few degrees of freedom, for which plain percentiles
    give too narrow an interval (the expanded percentile interval of Hesterberg 2015).

    `drawn` is the number of values if values, not scaled residuals, were drawn with replacement: plain intervals are then narrower.
    """
    return float(ndtr(math.sqrt(drawn / freedom if drawn else 1) * stdtrit(freedom, (1 - CONFIDENCE) / 2)))


def welch_margin(errors: Sequence[Error]) -> float:
    """Return half of Welch's interval, at 95 %, of a change with errors; infinite without an error, or for one from one value."""
    squares = [error.size**2 for error in errors]
    if not sum(squares) or any(error.size and error.of < 2 for error in errors):
        return math.inf
    freedom = sum(squares) ** 2 / sum(square**2 / (error.of - 1) for square, error in zip(squares, errors, strict=True) if square)
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(sum(squares))


def lower_hull(costs: Sequence[float], distances: Sequence[float]) -> list[int]:
    """Return the points of the lower convex hull in logarithms, by rising cost, down to the lowest distance.

    It is the best distance of each budget. Computed by Andrew's monotone chain, and cut off where distance would rise again.
    """
    x, y = np.log(costs), np.log(distances)
    hull: list[int] = []
    for i in np.lexsort((y, x)).tolist():
        if hull and x[hull[-1]] == x[i]:
            continue
        while len(hull) > 1 and not _turns_up(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    best = int(np.argmin([y[i] for i in hull])) if hull else 0
    return hull[: best + 1]


def _turns_up(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Return whether the path from a over b to c bends upwards."""
    return bool((x[b] - x[a]) * (y[c] - y[a]) > (y[b] - y[a]) * (x[c] - x[a]))
