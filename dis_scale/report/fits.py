"""How distance depends on cost: correlation, a power law with its interval, the lower hull."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

CONFIDENCE = 0.95
FEW = 4
"""Most points of a correlation that is marked as `few points`."""


def pearson(gmacs: Sequence[float], distances: Sequence[float]) -> float | None:
    """Return Pearson's r of distance and log Gflops, as in the DiT and DiS papers; None for fewer than 3 points or no spread."""
    if len(gmacs) < 3 or np.ptp(gmacs) == 0 or np.ptp(distances) == 0:
        return None
    return float(np.corrcoef(np.log(gmacs), distances)[0, 1])


@dataclass(frozen=True)
class PowerLaw:
    """distance = factor x cost^exponent, fitted to logarithms; `low` and `high` bound the exponent at 95 %."""

    factor: float
    exponent: float
    low: float
    high: float

    def at(self, cost: np.ndarray) -> np.ndarray:
        return self.factor * cost**self.exponent


def power_law(costs: Sequence[float], distances: Sequence[float]) -> PowerLaw | None:
    """Fit logarithms by least squares, with Student's interval; None for fewer than 4 points, one cost, or a distance <= 0."""
    if len(costs) < 4 or np.ptp(costs) == 0 or min(distances) <= 0:
        return None
    from scipy.stats import linregress  # takes half a second more than scipy.special, and most reports have no fit

    fit = linregress(np.log(costs), np.log(distances))
    margin = stdtrit(len(costs) - 2, (1 + CONFIDENCE) / 2) * fit.stderr
    return PowerLaw(
        float(np.exp(fit.intercept)), float(fit.slope), float(fit.slope - margin), float(fit.slope + margin)
    )


def bootstrap_tail(freedom: int) -> float:
    """Return the share below the percentile interval's lower end, smaller for few degrees of freedom, where plain percentiles are
    too narrow (the expanded percentile interval of Hesterberg 2015).
    """
    return float(ndtr(stdtrit(freedom, (1 - CONFIDENCE) / 2)))


def differ(change: float, errors: Sequence[float], counts: Sequence[int]) -> bool:
    """Whether Welch's test refuses, at 5 %, that two means are equal; each has a standard error from so many values."""
    squares = [error**2 for error in errors]
    freedom = sum(squares) ** 2 / sum(square**2 / (n - 1) for square, n in zip(squares, counts, strict=True))
    return bool(abs(change) > stdtrit(freedom, (1 + CONFIDENCE) / 2) * math.sqrt(sum(squares)))


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
