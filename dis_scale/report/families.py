"""One family of backbones against another at equal cost, in one sweep.

The points of one family are compared with the curve of the other: a line through its sizes in logarithms of cost and value. The
points' mean distance from the curve is a sum of logarithms with known factors. Its error has three sources: the jackknife of that
sum, in which noise that all samples share cancels; the spread over the seeds, if there are several; and the scatter of each
family's sizes about its line, which is assumed to be alike in both. The scatter contains the other two sources as far as they
differ between the sizes of a family, so only the rest of them is added. Each size is a training of its own, so the scatter contains
the spread between trainings also with one seed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from dis_scale.evaluation.metrics import FOLDS
from dis_scale.process import tables
from dis_scale.process.errors import UserError
from dis_scale.process.progress import some
from dis_scale.recipe import MAIN
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.report.points import ALIKE, Change, Error, Point, Report

HOURS = "worker hours"
COSTS: dict[str, Callable[[Point], float | None]] = {
    "Gflops": lambda p: p.gmacs,
    "training compute": lambda p: p.eflops,
    HOURS: lambda p: p.worker_hours,
}
LEAST_SIZES = 3
"""Sizes of a curve: one more than a line has coefficients."""


class Size(NamedTuple):
    """One size of a family: its cost, the value of each of its trainings, and their mean without each group of samples if known."""

    point: Point
    cost: float
    values: tuple[float, ...]
    left_out: tuple[float, ...]

    @property
    def log(self) -> float:
        """Mean of the logarithms of the values."""
        return float(np.log(self.values).mean())


@dataclass(frozen=True)
class Gap(Change):
    """The mean of log(value / curve) over sizes of one family within the costs of the other."""

    sizes: list[Size]
    curve: np.ndarray
    """Value of the other family's curve at the cost of each size."""
    over_seeds: bool
    """Whether the errors hold the spread between trainings."""


def gap(ours: list[Size], theirs: list[Size]) -> Gap | None:
    """Return the mean gap of our sizes to their curve; None if it has too few sizes, or none of our sizes is within its costs."""
    costs = np.array([size.cost for size in theirs])
    if len(theirs) < LEAST_SIZES or np.ptp(costs) == 0:
        return None
    inside = [costs.min() / (1 + ALIKE) <= size.cost <= costs.max() * (1 + ALIKE) for size in ours]
    if not any(inside):
        return None
    sizes, share = [*ours, *theirs], np.array(inside) / sum(inside)
    on_curve = _line(ours) @ np.linalg.pinv(_line(theirs))  # (ours, theirs): the curve's factors
    factors, logs = np.append(share, -share @ on_curve), np.array([size.log for size in sizes])
    return Gap(
        float(factors @ logs), _errors(sizes, factors, _off_lines(ours, theirs)),
        [size for size, chosen in zip(ours, inside, strict=True) if chosen], np.exp(on_curve[inside] @ logs[len(ours) :]),
        any(len(size.values) > 1 for size in sizes),
    )  # fmt: skip


def _line(sizes: list[Size]) -> np.ndarray:
    """Return the design of a line in the logarithm of the cost (sizes, 2)."""
    x = np.log([size.cost for size in sizes])
    return np.stack([np.ones_like(x), x], 1)


def _off_lines(ours: list[Size], theirs: list[Size]) -> np.ndarray:
    """Return the projection of all logarithms on the residuals from each family's line; zeros for a family of too few sizes."""
    projection = np.zeros((len(ours) + len(theirs),) * 2)
    for family, first in ((ours, 0), (theirs, len(ours))):
        part, design = slice(first, first + len(family)), _line(family)
        if len(family) >= LEAST_SIZES:
            projection[part, part] = np.eye(len(family)) - design @ np.linalg.pinv(design)
    return projection


def _errors(sizes: list[Size], factors: np.ndarray, off_line: np.ndarray) -> tuple[Error, ...]:
    """Return the errors of a sum of logarithms: the scatter about the lines, and the part of known errors outside the scatter.

    Known are the error of sampling, if all sizes have it, and that over the seeds, if a size has several. The spread over the seeds
    is assumed to be equal for all sizes, and is estimated from those with several. If neither is known, no error is returned.
    """
    logs, trainings, freedom = np.array([s.log for s in sizes]), np.array([len(s.values) for s in sizes]), np.trace(off_line)
    each, known = float(factors @ factors / freedom), list[tuple[np.ndarray, int]]()
    if all(size.left_out for size in sizes):
        known.append(((FOLDS - 1) ** 2 / FOLDS * np.cov(np.log([size.left_out for size in sizes])), FOLDS))
    if over := int((trainings - 1).sum()):
        squares = sum(float(((np.log(size.values) - size.log) ** 2).sum()) for size in sizes)
        known.append((np.diag(squares / over / trainings), over + 1))
    beside = [(factors @ covariance @ factors - each * np.trace(off_line @ covariance), of) for covariance, of in known]
    errors = [Error(math.sqrt(max(float(square), 0)), of) for square, of in beside]
    return (*errors, Error(math.sqrt(max(each * float(logs @ off_line @ logs), 0)), round(freedom) + 1)) if known else ()


def _apart(change: float) -> str:
    """Return how far a value is from another one, whose logarithm differs by `change`."""
    return f"{abs(math.expm1(change)):.1%} {'above' if change > 0 else 'below'}"


def _around(found: Change) -> str:
    """Return the error of the ratio that `_apart` states, from the logarithm's error, to first order."""
    return f"± {math.exp(found.change) * (found.error or 0):.1%}"


def _verdict(*, significant: bool) -> str:
    return "a difference at 5 %" if significant else "no difference at 5 %"


@dataclass(frozen=True)
class Comparison:
    """One family against another by one metric at equal cost of one kind, at one count of images seen."""

    metric: str
    cost: str
    ours: str
    theirs: str
    images: int
    found: Gap | None
    unknown: str = ""
    """Reason why nothing is found, or a note on trainings that are left out because a value is not known."""

    @property
    def sentence(self) -> str:
        """Result in words, or the reason why there is no result."""
        start = f"{self.metric} at equal {self.cost}"
        if self.found is None:
            return f"{start}: {self.ours} and {self.theirs} cannot be compared: {self.unknown}"
        error = self.found.error
        words = f"{self.ours} is {_apart(self.found.change)} a straight line through the sizes of {self.theirs}"
        words += f", mean of {len(self.found.sizes)} sizes at {self.images:,} images" if len(self.found.sizes) > 1 else ""
        words += f" ({self.unknown})" if self.unknown else ""
        if error is None:
            return f"{start}: {words}; its error is not known"
        spread = "over seeds" if self.found.over_seeds else "of sampling"
        verdict = _verdict(significant=self.found.significant)
        return f"{start}: {words}, {_around(self.found)} ({spread}, and of sizes about their lines): {verdict}"

    def rows(self) -> Iterator[list[str]]:
        """Yield a row of the table for each size, with every seed beside the other family's curve."""
        for size, curve in zip(self.found.sizes, self.found.curve, strict=True) if self.found else ():
            seeds = ", ".join(f"{value:.4g}" for value in size.values)
            change = f"{math.expm1(size.log - math.log(curve)):+.1%}"
            yield [self.metric, self.cost, size.point.model, f"{size.cost:.4g}", seeds, f"{curve:.4g}", change]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison with plain values."""
        plain = {"metric": self.metric, "cost": self.cost, "images": self.images, "sentence": self.sentence}
        if self.found is None:
            return plain
        sizes = [
            {"model": s.point.model, "cost": s.cost, "values": s.values, "curve": float(curve)}
            for s, curve in zip(self.found.sizes, self.found.curve, strict=True)
        ]
        found = {"log_ratio": self.found.change, "error": self.found.error, "significant": self.found.significant}
        return plain | found | {"sizes": sizes}


@dataclass(frozen=True)
class AtBudget(Change):
    """Logarithm of the lowest value of one family over that of another, each at its own best size, in a study's budget (FLOPs)."""

    metric: str
    budget: float
    ours: str
    theirs: str
    lowest: tuple[float, float]
    """Logarithms of both values."""
    sizes: dict[str, tuple[float, ...]]
    """Values of all seeds, by model, for every size of both families at the budget."""

    @property
    def sentence(self) -> str:
        words = f"the best {self.ours} is {_apart(self.change)} the best {self.theirs}"
        spread = f"{_around(self)} (runs about their parabolas)"
        return f"{self.metric} at {self.budget:g} FLOPs: {words}, {spread}: {_verdict(significant=self.significant)}"

    def rows(self) -> Iterator[list[str]]:
        """Yield the table's rows: the best sizes, then every seed of each size."""
        ours, theirs = (f"{math.exp(each):.4g}" for each in self.lowest)
        start = [self.metric, "budget"]
        yield [*start, "best size", f"{self.budget:g}", ours, theirs, f"{math.expm1(self.change):+.1%}"]
        for model, values in self.sizes.items():
            yield [*start, model, f"{self.budget:g}", ", ".join(f"{value:.4g}" for value in values), "", ""]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison with plain values."""
        found = {"log_ratio": self.change, "error": self.error, "significant": self.significant}
        return {"metric": self.metric, "budget": self.budget, "sentence": self.sentence, "sizes": self.sizes} | found


def comparisons(report: Report, ours: str, theirs: str) -> Sequence[Comparison | AtBudget]:
    """Return one family against another by loss and distance, at equal cost of each kind or at each budget of a study.

    UserError for one family twice or without points, and for a study in which no budget has a minimum of both.
    """
    if ours == theirs:
        raise UserError(f"--families: {ours} twice: name two families")
    for family in (ours, theirs):
        if family not in report.families:
            raise UserError(f"--families: {report.sweep} has no points of {family}: it has {', '.join(report.families)}")
    measured = {name for p in report.main for name in p.values}
    metrics = [metric for metric in dict.fromkeys((report.metric, HELD_OUT)) if metric in measured]
    if report.recipe.isoflop is None:
        return [_comparison(report, metric, cost, ours, theirs) for metric in metrics for cost in COSTS]
    if studied := [each for metric in metrics for each in _at_budgets(report, metric, ours, theirs)]:
        return studied
    raise UserError(f"--families: no budget of {report.sweep} has a minimum of both {ours} and {theirs}")


def left_out(report: Report, ours: str, theirs: str) -> list[str]:
    """Return a line on the budgets of a study at which two families' losses cannot be compared; none if all can."""
    if report.recipe.isoflop is None:
        return []
    compared = {each.budget for each in _at_budgets(report, HELD_OUT, ours, theirs)}
    budgets = ", ".join(f"{budget:g}" for budget in report.recipe.isoflop.flops if budget not in compared)
    why = f"where not both have a lowest {HELD_OUT} within their sizes"
    return [f"{ours} and {theirs} are not compared at {budgets} FLOPs, {why}"] if budgets else []


def _at_budgets(report: Report, metric: str, ours: str, theirs: str) -> list[AtBudget]:
    from dis_scale.report import isoflop  # here: scipy takes a second

    profiles = isoflop.profiles(report, metric)
    mine, other = (isoflop.lowest(profiles.get(kind, [])) for kind in (ours, theirs))
    found = []
    for budget, a in mine.items():
        if b := other.get(budget):
            sizes, lowest = _seeds(report, metric, budget, (ours, theirs)), (a.log, b.log)
            found.append(AtBudget(a.log - b.log, (a.error, b.error), metric, budget, ours, theirs, lowest, sizes))
    return found


def _seeds(report: Report, metric: str, budget: float, kinds: tuple[str, str]) -> dict[str, tuple[float, ...]]:
    """Return the values of all seeds, by model, for the models of these families at a study's budget."""
    found = defaultdict[str, tuple[float, ...]](tuple)
    for kind in kinds:
        for p in report.points:
            if (p.kind, p.budget, p.variant) == (kind, budget, MAIN) and metric in p.values:
                found[p.group] += (p.values[metric],)
    return dict(found)


def _comparison(report: Report, metric: str, cost: str, ours: str, theirs: str) -> Comparison:
    counts = [n for n in report.counts if report.family(ours, n) and report.family(theirs, n)]
    if not counts:
        return Comparison(metric, cost, ours, theirs, 0, None, "they have no count of images in common")
    enough = [n for n in counts if len(report.family(theirs, n)) >= LEAST_SIZES]
    count = (enough or counts)[-1]
    (mine, unknown), (other, unknown_too) = (_sizes(report, kind, count, metric, COSTS[cost]) for kind in (ours, theirs))
    without = f"{cost} or {metric} of {some(missing)} are not known" if (missing := unknown + unknown_too) else ""
    if not mine or not other:
        return Comparison(metric, cost, ours, theirs, count, None, without)
    machines = sorted({machine for size in (*mine, *other) for machine in size.point.evaluation.cost.trained_on})
    if cost == HOURS and len(machines) > 1:
        return Comparison(metric, cost, ours, theirs, count, None, f"their {HOURS} are of {' and '.join(machines)}")
    found = gap(mine, other)
    why = f"{theirs} has {len(other)} of the {LEAST_SIZES} sizes that a curve needs"
    if len(other) >= LEAST_SIZES:
        why = f"no size of {ours} is within the costs of {theirs}, or these are all equal"
    return Comparison(metric, cost, ours, theirs, count, found, without if found else why)


def _sizes(
    report: Report, kind: str, images: int, metric: str, cost: Callable[[Point], float | None]
) -> tuple[list[Size], list[str]]:
    """Return a family's sizes at one count, each with its trainings, and the trainings whose cost or value is not known."""
    sizes, unknown = list[Size](), list[str]()
    for point in report.family(kind, images):
        key, price = (point.group, MAIN, images), cost(point)
        trainings = [p for p in report.points if (p.group, p.variant, p.images_seen) == key]
        values = {p.model: p.values[metric] for p in trainings if price and 0 < p.values.get(metric, 0) < math.inf}
        unknown += [p.model for p in trainings if p.model not in values]
        if price and values:
            left_out = point.evaluation.left_out.get(metric, ())
            sizes.append(Size(point, price, tuple(values.values()), left_out if min(left_out, default=0) > 0 else ()))
    return sizes, unknown


def sentences(report: Report) -> list[str]:
    """Return a sentence for each other family against the first one of the recipe, by the main metric at equal Gflops; in a
    study, by the held-out loss at its largest budget with a minimum of both.
    """
    first, *others = report.families or [""]
    if report.recipe.isoflop:
        said = [found[-1].sentence for other in others if (found := _at_budgets(report, HELD_OUT, first, other))]
        return said + [line for other in others for line in left_out(report, first, other)]
    return [_either_way(report, first, other).sentence for other in others]


def _either_way(report: Report, first: str, other: str) -> Comparison:
    """Return the first family against the other's curve; if only the first has a curve, return the other against it."""
    ours, theirs = (_comparison(report, report.metric, "Gflops", *pair) for pair in ((first, other), (other, first)))
    return theirs if ours.found is None and theirs.found else ours


def table(sweep: str, found: Sequence[Comparison | AtBudget]) -> Table:
    """Return a table with every size and seed beside the other family's curve; the sentences are its caption."""
    ours, theirs = found[0].ours, found[0].theirs
    out = tables.table(
        "metric", "at equal", "model", "cost", "each seed", f"line of {theirs}", "difference", left=("metric", "at equal", "model"),
        title=f"{sweep}: {ours} against {theirs}", caption="\n".join(each.sentence for each in found),
    )  # fmt: skip
    for each in found:
        for row in each.rows():
            out.add_row(*row)
    return out
