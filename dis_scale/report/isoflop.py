"""The best size of each compute budget, and its power laws (Hoffmann et al. 2022, approach 2; arXiv 2410.08184 for DiT).

The runs of one budget form a profile: a parabola of the logarithm of a loss or distance over the logarithm of the parameters.
Its minimum is the budget's best size. Power laws in compute are fitted to the minima.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from dis_scale.recipe import MAIN
from dis_scale.report.fits import PowerLaw, bootstrap_tail
from dis_scale.report.points import HELD_OUT, Point, Report

LEAST_SIZES = 4
"""Sizes that a parabola needs here: one more than it has coefficients."""
REACH = 4.0
"""Factor between the size of a fitted run and that of the lowest one: profiles are parabolas only near their minimum."""
LEAST_BUDGETS = 3
"""Budgets with a minimum that a law needs."""
RESAMPLES = 2000


class Minimum(NamedTuple):
    """Lowest points of parabolas within the range of the sizes, as logarithms; `inside` is false at the range's ends."""

    size: np.ndarray
    value: np.ndarray
    inside: np.ndarray


@dataclass(frozen=True)
class Profile:
    """Fitted runs of one budget: their parameters, images and measured values; `beyond` has parameters and values of the others."""

    budget: float
    parameters: np.ndarray
    images: np.ndarray
    values: np.ndarray
    beyond: np.ndarray

    @classmethod
    def of(cls, budget: float, parameters: np.ndarray, images: np.ndarray, values: np.ndarray) -> Self | None:
        """Return the profile of the runs near the lowest one, of the nearest four sizes at least; None if fewer are measured."""
        away = np.abs(np.log(parameters / parameters[values.argmin()]))
        nearest = np.sort(away[np.unique(parameters, return_index=True)[1]])
        if len(nearest) < LEAST_SIZES:
            return None
        near = away <= max(np.log(REACH), nearest[LEAST_SIZES - 1])
        return cls(budget, parameters[near], images[near], values[near], np.array([parameters[~near], values[~near]]))

    @property
    def sizes(self) -> np.ndarray:
        logarithms: np.ndarray = np.log(self.parameters)
        return logarithms

    @cached_property
    def parabola(self) -> np.ndarray:
        """Coefficients over `sizes` minus their mean, the highest power first."""
        return self.refit(np.log(self.values))

    @cached_property
    def minimum(self) -> Minimum:
        return self.minimum_of(self.parabola)

    @property
    def best(self) -> tuple[float, float, float] | None:
        """Parameters, images and value at the minimum; None if that is at an end of the range of the sizes."""
        if not self.minimum.inside:
            return None
        size = self.minimum.size
        return float(np.exp(size)), float(np.exp(self.images_at(size))), float(np.exp(self.minimum.value))

    def at(self, parameters: np.ndarray) -> np.ndarray:
        """Return the parabola's values."""
        return np.exp(np.polyval(self.parabola, np.log(parameters) - self.sizes.mean()))

    def refit(self, log_values: np.ndarray) -> np.ndarray:
        """Return the coefficients for other values of the runs, shape (runs,) or (runs, samples)."""
        return np.polyfit(self.sizes - self.sizes.mean(), log_values, 2)

    def minimum_of(self, coefficients: np.ndarray) -> Minimum:
        """Return the minima of parabolas, shape (3,) or (3, samples)."""
        a, b, c = coefficients
        low, high = self.sizes.min() - self.sizes.mean(), self.sizes.max() - self.sizes.mean()
        vertex = -b / np.where(a > 0, 2 * a, np.inf)
        inside = (a > 0) & (low < vertex) & (vertex < high)
        end = np.where(a * low**2 + b * low < a * high**2 + b * high, low, high)
        at = np.where(inside, vertex, end)
        return Minimum(at + self.sizes.mean(), a * at**2 + b * at + c, inside)

    def images_at(self, sizes: np.ndarray) -> np.ndarray:
        """Return the logarithm of the images that the budget gives a size, between its neighbours by interpolation."""
        order = np.argsort(self.sizes)
        images: np.ndarray = np.interp(sizes, self.sizes[order], np.log(self.images[order]))
        return images


@dataclass(frozen=True)
class Laws:
    """Power laws in compute of the best size, its images and its value; `at_edge` is the share of resamples with a minimum at
    an end of the sizes."""

    parameters: PowerLaw
    images: PowerLaw
    value: PowerLaw
    at_edge: float


def profiles(report: Report, metric: str) -> dict[str, list[Profile]]:
    """Return the profiles of each measured family, by rising budget, of the budgets with enough sizes. Each seed is a run."""
    runs = defaultdict[tuple[str, float], list[Point]](list)
    for p in report.points:
        if p.variant == MAIN and p.budget is not None and p.values.get(metric, 0) > 0:
            runs[p.kind, p.budget].append(p)
    families: dict[str, list[Profile]] = {kind: [] for kind, _ in runs}
    for (kind, budget), points in sorted(runs.items()):
        columns = zip(*((p.cost.parameters, p.images_seen, p.values[metric]) for p in points), strict=True)
        if profile := Profile.of(budget, *map(np.array, columns)):
            families[kind].append(profile)
    return families


def laws(family: list[Profile], resamples: int = RESAMPLES) -> Laws | None:
    """Fit power laws to the minima of one family's profiles; None for fewer than three budgets that have one.

    The intervals are percentiles of a bootstrap: residuals of all parabolas, scaled for the fitted coefficients, are sampled with
    replacement and added to the parabolas. A resampled minimum beyond the sizes counts as the nearest size.
    """
    inner = [profile for profile in family if profile.minimum.inside]
    if len(inner) < LEAST_BUDGETS:
        return None
    tail, tries = _resampled(inner, resamples)
    budgets, sizes = np.log([p.budget for p in inner]), [p.minimum.size for p in inner]
    images = (
        [p.images_at(p.minimum.size) for p in inner],
        [p.images_at(t.size) for p, t in zip(inner, tries, strict=True)],
    )
    return Laws(
        _law(budgets, sizes, [each.size for each in tries], tail),
        _law(budgets, *images, tail),
        _law(budgets, [p.minimum.value for p in inner], [each.value for each in tries], tail),
        at_edge=1 - float(np.all([each.inside for each in tries], axis=0).mean()),
    )


def _resampled(family: list[Profile], resamples: int) -> tuple[float, list[Minimum]]:
    """Return the share of resamples to leave out at each end of an interval, and the resampled minima of each profile."""
    residuals = np.concatenate([np.log(p.values / p.at(p.parameters)) for p in family])
    freedom = len(residuals) - 3 * len(family)
    scaled, rng, minima = residuals * np.sqrt(len(residuals) / freedom), np.random.default_rng(0), list[Minimum]()
    for p in family:
        drawn = rng.choice(scaled, (len(p.values), resamples))
        minima.append(p.minimum_of(p.refit(np.log(p.at(p.parameters))[:, None] + drawn)))
    return bootstrap_tail(freedom), minima


def _law(budgets: np.ndarray, logs: list[np.ndarray], resampled: list[np.ndarray], tail: float) -> PowerLaw:
    """Fit logarithms by least squares; the interval of the exponent holds the resampled ones."""
    exponent, factor = np.polyfit(budgets, np.array(logs), 1)
    exponents, _ = np.polyfit(budgets, np.array(resampled), 1)
    low, high = np.quantile(exponents, [tail, 1 - tail])
    return PowerLaw(float(np.exp(factor)), float(exponent), float(low), float(high))


def lines(report: Report) -> list[str]:
    """Return the best size of each budget and the laws, a line each, and what the intervals hold."""
    out = list[str]()
    for metric in dict.fromkeys((HELD_OUT, report.metric)):
        for kind, family in profiles(report, metric).items():
            out += [f"{metric}, {kind} {_minimum_words(profile)}" for profile in family]
            out += [f"{metric}, {kind} {words}" for words in _unfitted_words(report, family)]
            out += [f"{metric}, {kind}: {words}" for words in _law_words(laws(family), metric)]
    return [
        *out,
        "the intervals hold the spread of runs about the parabolas, by a bootstrap of the residuals; not what runs share: "
        "the trunk of a size's branches, learning rate, held-out images, a seed's order of images, the range of sizes",
    ]


def _unfitted_words(report: Report, family: list[Profile]) -> list[str]:
    fitted = {profile.budget for profile in family}
    budgets = report.recipe.isoflop.flops if report.recipe.isoflop else ()
    unfitted = ", ".join(f"{budget:g}" for budget in budgets if budget not in fitted)
    return [f"at {unfitted} FLOPs: fewer than {LEAST_SIZES} measured sizes, so not fitted"] if unfitted else []


def _minimum_words(profile: Profile) -> str:
    where = f"at {profile.budget:g} FLOPs"
    if profile.best is None:
        return f"{where}: no minimum within the sizes, so the budget is not in the laws"
    parameters, images, value = profile.best
    return f"{where}: lowest, {value:.4g}, at {parameters:,.0f} parameters and {images:,.0f} images"


def _law_words(fitted: Laws | None, metric: str) -> list[str]:
    if fitted is None:
        return [f"no law, which needs {LEAST_BUDGETS} budgets with a minimum"]
    quantities = {"best size": fitted.parameters, "its images": fitted.images, metric: fitted.value}
    words = [
        f"{name} ~ compute^{law.exponent:.2f} (95 % interval {law.low:.2f} to {law.high:.2f})"
        for name, law in quantities.items()
    ]
    edge = f"{fitted.at_edge:.0%} of the resamples have a minimum at an end of the sizes, which bounds the intervals"
    return [*words, edge] if fitted.at_edge else words
