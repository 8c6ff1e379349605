"""The best size of each compute budget, and its power laws (Hoffmann et al. 2022, approach 2; arXiv 2410.08184 for DiT).

The runs of one budget form a profile: a parabola of the logarithm of a loss or distance over the logarithm of the parameters.
Its minimum is the budget's best size. Power laws in compute are fitted to the minima.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from dis_scale.recipe import MAIN
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.report import loss_law
from dis_scale.report.fits import EXPONENTS, Interval, PowerLaw, bootstrap_tail, lack_of_fit, limited_law, student_margin
from dis_scale.report.loss_law import LossLaw, Runs
from dis_scale.report.points import Error, Findings, Report

LEAST_SIZES = 4
"""Sizes that a parabola needs here: one more than it has coefficients."""
REACH = 4.0
"""Factor between the size of a fitted run and that of the lowest one: profiles are parabolas only near their minimum."""
LEAST_BUDGETS = 3
"""Budgets with a minimum that a law needs."""
LEAST_WITH_LIMIT = 4
"""Budgets with a minimum that a law with a limit needs: one more than it has coefficients."""
RESAMPLES = 2000
NO_LAW = (
    f"no law of all runs: it needs {loss_law.LEAST_RUNS} of them, {loss_law.LEAST_APART} budgets and sizes, and losses that "
    "determine its exponents"
)


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
        """Return the logarithms of the images that the budget gives these sizes, interpolated between neighbouring runs."""
        order = np.argsort(self.sizes)
        images: np.ndarray = np.interp(sizes, self.sizes[order], np.log(self.images[order]))
        return images


@dataclass(frozen=True)
class Laws:
    """Power laws in compute of the best size, its images and its value."""

    parameters: PowerLaw
    images: PowerLaw
    local: list[PowerLaw]
    """Laws of the value between neighbouring budgets: no compute removes a part of a loss, so its exponent falls with compute."""
    value: PowerLaw | None
    """Law of the value with such a limit, for four budgets or more, if they determine it."""
    at_edge: float
    """Share of resamples with a minimum at an end of the sizes."""


def runs_of(report: Report, metric: str) -> dict[str, Runs]:
    """Return the runs of each measured family. Each seed is a run."""
    families, trunks = defaultdict[str, list[list[float]]](list), dict[str, int]()
    for p in report.points:
        if p.variant == MAIN and p.budget is not None and 0 < p.values.get(metric, 0) < np.inf:
            branch = report.recipe.models[p.model].branch
            trunk = trunks.setdefault(branch.of if branch else p.model, len(trunks))
            families[p.kind].append([p.cost.parameters, p.images_seen, p.budget, p.values[metric], trunk])
    columns = {kind: np.array(rows).T for kind, rows in sorted(families.items())}
    return {
        kind: Runs(N, D, budgets, values, report.unique_images, trunk) for kind, (N, D, budgets, values, trunk) in columns.items()
    }


def profiles(report: Report, metric: str) -> dict[str, list[Profile]]:
    """Return the profiles of each measured family, by rising budget, of the budgets with enough sizes."""
    return {kind: profiles_of(runs) for kind, runs in runs_of(report, metric).items()}


def profiles_of(runs: Runs) -> list[Profile]:
    """Return the profiles of one family."""
    budgets = [(float(budget), runs.of(runs.budgets == budget)) for budget in np.unique(runs.budgets)]
    every = [Profile.of(budget, run.parameters, run.images, run.values) for budget, run in budgets]
    return [profile for profile in every if profile]


def laws(family: list[Profile], resamples: int = RESAMPLES) -> Laws | None:
    """Fit power laws to the minima of one family's profiles; None for fewer than three budgets with a minimum.

    Bootstrap: residuals of all parabolas, scaled for the fitted coefficients, are sampled with replacement and added to the
    parabolas. A resampled minimum beyond the sizes counts as the nearest size.
    """
    inner = [profile for profile in family if profile.minimum.inside]
    if len(inner) < LEAST_BUDGETS:
        return None
    freedom, tries = _resampled(inner, resamples)

    def minima(quantity: Callable[[Profile, Minimum], np.ndarray]) -> _Minima:
        logs = [quantity(profile, profile.minimum) for profile in inner]
        resampled = [quantity(profile, minimum) for profile, minimum in zip(inner, tries, strict=True)]
        return _Minima(np.array([profile.budget for profile in inner]), np.array(logs), np.array(resampled), freedom)

    values = minima(lambda _, minimum: minimum.value)
    return Laws(
        parameters=minima(lambda _, minimum: minimum.size).law(),
        images=minima(lambda profile, minimum: profile.images_at(minimum.size)).law(),
        local=[values.neighbours(lower).law() for lower in range(len(inner) - 1)],
        value=values.law_with_limit() if len(inner) >= LEAST_WITH_LIMIT else None,
        at_edge=1 - float(np.all([each.inside for each in tries], axis=0).mean()),
    )


class Lowest(NamedTuple):
    """Logarithm of the lowest value of a budget, and its standard error."""

    log: float
    error: Error


def lowest(family: list[Profile]) -> dict[float, Lowest]:
    """Return the minima of one family by budget, with the error of the runs' spread about all its parabolas."""
    inner = [profile for profile in family if profile.minimum.inside]
    if not inner:
        return {}
    freedom, tries = _resampled(inner, RESAMPLES)
    return {
        profile.budget: Lowest(float(profile.minimum.value), Error(float(minimum.value.std()), freedom + 1))
        for profile, minimum in zip(inner, tries, strict=True)
    }


def _resampled(family: list[Profile], resamples: int) -> tuple[int, list[Minimum]]:
    """Return the degrees of freedom of the parabolas' residuals, and the resampled minima of each profile."""
    residuals = np.concatenate([np.log(p.values / p.at(p.parameters)) for p in family])
    freedom = len(residuals) - 3 * len(family)
    scaled, rng, minima = residuals * np.sqrt(len(residuals) / freedom), np.random.default_rng(0), list[Minimum]()
    for p in family:
        drawn = rng.choice(scaled, (len(p.values), resamples))
        minima.append(p.minimum_of(p.refit(np.log(p.at(p.parameters))[:, None] + drawn)))
    return freedom, minima


@dataclass(frozen=True)
class _Minima:
    """Logarithms of one quantity at the minima (budgets), and of its resamples (budgets, samples), from residuals of `freedom`."""

    budgets: np.ndarray
    logs: np.ndarray
    resampled: np.ndarray
    freedom: int

    def neighbours(self, lower: int) -> Self:
        """Return the minima of two neighbouring budgets."""
        pair = slice(lower, lower + 2)
        return replace(self, budgets=self.budgets[pair], logs=self.logs[pair], resampled=self.resampled[pair])

    def law(self) -> PowerLaw:
        """Fit logarithms by least squares.

        The interval covers two: the bootstrap's, from the runs' spread, and Student's, from the minima's scatter about the law.
        """
        x = np.log(self.budgets)
        exponent, factor = (float(each) for each in np.polyfit(x, self.logs, 1))
        _, low, high = self._interval(np.append(exponent, np.polyfit(x, self.resampled, 1)[0]))
        margin = student_margin(x, self.logs - exponent * x - factor)
        held = Interval(exponent, min(low, exponent - margin), max(high, exponent + margin))
        return PowerLaw(float(np.exp(factor)), held, Interval(0.0, 0.0, 0.0))

    def law_with_limit(self) -> PowerLaw | None:
        """Fit a law that falls to a limit. It has no intervals if its own residuals are larger than the parabolas'.

        None if the values do not determine it: they rise, or its exponent is one of the ends that are tried.
        """
        every = limited_law(self.budgets, np.exp(np.column_stack([self.logs, self.resampled])))
        limit, factor, exponent = every[:, 0].tolist()
        if factor <= 0 or not EXPONENTS[0] < exponent < EXPONENTS[-1]:
            return None
        law = PowerLaw(factor, Interval(-exponent), Interval(limit))
        residuals, variance = self.logs - np.log(law.at(self.budgets)), float(self.resampled.var(1).mean())
        if lack_of_fit(residuals, 3, variance, self.freedom):
            return law
        return replace(law, exponent=self._interval(-every[2]), limit=self._interval(every[0]))

    def _interval(self, samples: np.ndarray) -> Interval:
        """Return the first of the samples, and the interval of the others."""
        tail = bootstrap_tail(self.freedom)
        return Interval(float(samples[0]), *np.quantile(samples[1:], [tail, 1 - tail]).tolist())


def found(report: Report) -> Findings:
    """Return how a study's law misses the budget that was held out, and its best sizes, laws and limits, by loss and distance."""
    missed, out = list[str](), list[str]()
    for metric in dict.fromkeys((HELD_OUT, report.metric)):
        for kind, runs in runs_of(report, metric).items():
            family = profiles_of(runs)
            words = [_minimum_words(profile) for profile in family] + _unfitted_words(report, family)
            out += [f"{metric}, {kind} {line}" for line in words]
            law_missed, words = _laws_words(report, runs, family) if metric == HELD_OUT else ([], _law_words(laws(family), metric))
            missed += [f"{metric}, {kind}: {line}" for line in law_missed]
            out += [f"{metric}, {kind}: {line}" for line in words]
    if report.images is None and report.recipe.isoflop:
        out.append("the laws take each image for a new one: how many there are went with the latents, which were deleted")
    out.append(
        "the intervals hold the spread of runs about the parabolas and of the minima about their law; not what runs share: "
        "the trunk of a size's branches, learning rate, held-out images, a seed's order of images, the range of sizes"
    )
    return Findings(missed, out)


def _laws_words(report: Report, runs: Runs, family: list[Profile]) -> Findings:
    """Return the laws of the held-out loss in words."""
    study, parabolas, law = report.recipe.isoflop, laws(family), loss_law.fit(runs)
    missed = prediction_words(runs, family, study.flops[-1]) if study and study.hold_out == "largest" else []
    words = _law_words(parabolas, HELD_OUT)
    if law is None:
        return Findings(missed, [*words, NO_LAW])
    if parabolas and (why := refuted(law, parabolas)):
        return Findings(missed, [why])
    return Findings(missed, words + loss_law_words(runs, law))


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
    local = ", ".join(law.exponent.words(".2f") for law in fitted.local)
    words = [
        f"best size ~ compute^{fitted.parameters.exponent.words('.2f')}",
        f"its images ~ compute^{fitted.images.exponent.words('.2f')}",
        f"{metric} ~ compute^{local} from budget to budget",
    ]
    if law := fitted.value:
        words.append(f"{metric} = {law.limit.words('.3g')} + {law.factor:.3g} x compute^{law.exponent.words('.2f')}")
    edge = f"{fitted.at_edge:.0%} of the resamples have a minimum at an end of the sizes, which bounds the intervals"
    return [*words, edge] if fitted.at_edge >= 0.005 else words


def loss_law_words(runs: Runs, law: LossLaw) -> list[str]:
    """Return the law of all runs in words."""
    a, b = law.exponents
    size = law.size_exponent
    best = f"best size ~ compute^{size.words('.2f')}" if size else "its best sizes are beyond those of the runs"
    words = [
        f"{law.limit.words('.3g')} + A / parameters^{a.words('.2f')} + B / images^{b.words('.2f')}, one law of {len(runs.values)} "
        f"runs: {best}"
    ]
    if runs.repeated and runs.unique:
        times, most = law.repetition, runs.images.max() / runs.unique
        words.append(
            f"an image seen again is worth 1/e of a new one after {times.words('.0f')} times"
            if np.isfinite(times.value)
            else f"no sign that images seen again are worth less, up to {most:,.0f} times"
        )
    return words


def refuted(law: LossLaw, parabolas: Laws) -> str:
    """Return why neither law of the best size is a result: their intervals exclude each other; empty if they do not."""
    size, other = law.size_exponent, parabolas.parameters.exponent
    if not size or not other.known or (size.low <= other.high and other.low <= size.high):
        return ""
    return (
        f"best size ~ compute^{size.words('.2f')} by one law of all runs, compute^{other.words('.2f')} by the parabolas: they "
        "disagree, so neither is a result"
    )


def prediction_words(runs: Runs, family: list[Profile], budget: float) -> list[str]:
    """Return in words the prediction for a budget by the smaller ones, and the measurement at that budget."""
    if not (law := loss_law.fit(runs.of(runs.budgets < budget))):
        return []
    best, start = law.lowest(budget), f"{budget:g} FLOPs, predicted by the law of the smaller budgets:"
    if best.at_end:
        return [f"{start} the best size is beyond those of the runs: list larger or smaller models"]
    lowest = law.estimate(best.losses)
    words = f"{start} lowest {lowest.words('.4g')} at {law.estimate(best.sizes).words(',.0f')} parameters"
    measured = next((profile.best for profile in family if profile.budget == budget), None)
    if measured is None:
        return [f"{words}; not measured yet, or without a minimum within the sizes"]
    size, _, value = measured
    inside = "inside" if lowest.low <= value <= lowest.high else "outside"
    missed = f"the loss is missed by {lowest.value / value - 1:+.1%}, {inside} its interval"
    return [f"{words}; measured {value:.4g} at {size:,.0f}: {missed}"]
