"""Two sweeps side by side: the differences of their models, with errors, and everything else in which the sweeps differ."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from dis_scale.errors import UserError
from dis_scale.recipe.identity import differing
from dis_scale.report.points import Point, Report
from dis_scale.report.tables import FACTS

ALIKE = 0.1
"""Largest relative difference of multiply-adds at which two models of other names count as equally costly."""


class Difference(NamedTuple):
    """One model at one count in both sweeps: b - a, and its standard error if both have one."""

    a: Point
    b: Point
    change: float
    error: float | None

    @property
    def over_seeds(self) -> bool:
        """Whether the error holds the spread between trainings on both sides."""
        return min(self.a.seeds, self.b.seeds) > 1

    @property
    def significant(self) -> bool:
        return self.over_seeds and self.error is not None and abs(self.change) > 2 * self.error


def by_name(a: Report, b: Report) -> dict[str, str]:
    """Return the pairs of models that have one name."""
    theirs = {p.group for p in b.points}
    return {p.group: p.group for p in a.points if p.group in theirs}


def by_cost(a: Report, b: Report) -> dict[str, str]:
    """Return, for each model of `a`, that of `b` nearest in multiply-adds, if it is within `ALIKE`."""
    costs = {p.group: p.gmacs for p in b.points}
    nearest = {p.group: min(costs, key=lambda name: abs(costs[name] - p.gmacs)) for p in a.points if costs}
    own = {p.group: p.gmacs for p in a.points}
    return {name: other for name, other in nearest.items() if abs(costs[other] - own[name]) <= ALIKE * own[name]}


def differences(a: Report, b: Report, pairs: Mapping[str, str]) -> list[Difference]:
    """Return the points of both sweeps, of the pairs of their models' names.

    UserError if what they measure differs, or if they have no common point.
    """
    _require_comparable(a, b)
    for name, report in [(x, a) for x in pairs] + [(y, b) for y in pairs.values()]:
        if name not in report.recipe.models:
            raise UserError(f"{report.sweep} has no model {name!r}: it has {', '.join(report.recipe.models)}")
    theirs = {(p.group, p.variant, p.images_seen): p for p in b.means}
    keys = ((p, (pairs.get(p.group, ""), p.variant, p.images_seen)) for p in a.means)
    found = [(p, theirs[key]) for p, key in keys if key in theirs]
    if not found:
        raise UserError(
            f"{a.sweep} and {b.sweep} have no model at one image count in common: name pairs (--pair NAME=NAME), or pair models "
            "of about one cost (--by-cost)"
        )
    return [Difference(p, q, b.distance(q) - a.distance(p), _error(a.error(p), b.error(q))) for p, q in found]


def _require_comparable(a: Report, b: Report) -> None:
    """UserError if a distance of one sweep is another quantity than that of the other."""
    if a.metric != b.metric:
        raise UserError(f"{a.sweep} was measured by {a.metric}, {b.sweep} by {b.metric}: these cannot be compared")
    for what, x, y in (
        ("data.resolution", a.recipe.data.resolution, b.recipe.data.resolution),
        ("data.num_classes", a.recipe.data.num_classes, b.recipe.data.num_classes),
        ("evaluate.reference", a.recipe.evaluate.reference, b.recipe.evaluate.reference),
        *(
            (f"evaluate.extractor.{key}", x, y)
            for key, x, y in differing(a.recipe.evaluate.extractor, b.recipe.evaluate.extractor)
        ),
    ):
        if x != y:
            raise UserError(f"{what}: {a.sweep} has {x}, {b.sweep} has {y}: their distances cannot be compared")


def _error(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else math.hypot(a, b)


def comparison_table(a: Report, b: Report, pairs: Mapping[str, str]) -> Table:
    """Return a table with a row for each common point, bold if the difference is beyond twice its error over seeds."""
    found = differences(a, b, pairs)
    out = Table(title=f"{a.sweep} against {b.sweep}: {a.metric}", caption=Text("\n".join(_notes(a, b, found))))
    for column in ("model", "sampling", "images", a.sweep, b.sweep, "difference", "in errors"):
        out.add_column(column, justify="left" if column in ("model", "sampling") else "right")
    for difference in found:
        p, q, change, error = difference
        name = p.model if p.model == q.model else f"{p.model} = {q.model}"
        out.add_row(
            name, p.variant or "main", f"{p.images_seen:,}", f"{a.distance(p):.4g}", f"{b.distance(q):.4g}",
            f"{change:+.3g}" + (f" ± {error:.2g}" if error else ""), f"{change / error:+.1f}" if error else "",
            style="bold" if difference.significant else "",
        )  # fmt: skip
    return out


def _notes(a: Report, b: Report, found: list[Difference]) -> list[str]:
    """Return the table's footnotes: what the errors hold, points of one sweep only, and all other differences."""
    lines = []
    if any(each.over_seeds for each in found):
        lines.append("bold: beyond two standard errors over seeds")
    if not all(each.over_seeds for each in found):
        lines.append(
            "models with one seed: the error is of sampling alone. Trainings of other seeds usually differ by more (seeds: 3), "
            "and both sweeps share their noise"
        )
    if alone := len(a.means) + len(b.means) - 2 * len(found):
        lines.append(f"{alone} points are in one sweep only")
    if a.vae and b.vae and a.vae != b.vae:
        lines.append(f"VAE differs: {a.vae[:12]} and {b.vae[:12]}")
    unlike = {line for difference in found for line in _unlike(a, b, difference)}
    return lines + [f"{key} differs: {x} and {y}" for key, x, y in sorted(unlike)]


def _unlike(a: Report, b: Report, pair: Difference) -> Iterator[tuple[str, str, str]]:
    """Yield key and values of each setting of data, diffusion, training and sampling that differs."""
    x, y = a.recipe, b.recipe
    settings = (
        ("data", x.data, y.data),
        ("diffusion", x.diffusion, y.diffusion),
        ("train", x.train_of(pair.a.model), y.train_of(pair.b.model)),
    )
    for part, mine, theirs in settings:
        for key, one, other in differing(mine, theirs):
            yield f"{part}.{key}" if key else part, str(one), str(other)
    for key in FACTS:
        if (one := str(pair.a.facts.get(key))) != (other := str(pair.b.facts.get(key))):
            yield key, one, other
