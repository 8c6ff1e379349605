"""All that was evaluated, as points of model, cost, images seen and measured values."""

from dataclasses import dataclass
from typing import Any

from dis_scale import tracking
from dis_scale.evaluation import results
from dis_scale.evaluation.results import Drawn
from dis_scale.models.cost import Cost
from dis_scale.plan import Plan
from dis_scale.recipe import MAIN
from dis_scale.storage.folder import Folder


@dataclass(frozen=True)
class Point:
    """One model at one image count, drawn in one way.

    `facts` are what stands in its metrics beside the values: samples, sampler, steps, guidance, ...; `goodput` is the share of the
    run's time so far that was spent in steps that counted, where its log tells.
    """

    model: str
    kind: str
    variant: str
    images: int
    cost: Cost
    values: dict[str, float]
    facts: dict[str, Any]
    goodput: float | None

    @property
    def gmacs(self) -> float:
        """Multiply-adds of one forward pass for one image, in 10^9."""
        return self.cost.gmacs_forward

    @property
    def eflops(self) -> float:
        """Operations of the training so far, in 10^18: two a multiply-add."""
        return 2 * self.cost.gmacs_training * self.images / 1e9


@dataclass(frozen=True)
class Report:
    """All points of a sweep under one metric; `failed` and `skipped` say what is missing and why."""

    sweep: str
    metric: str
    points: list[Point]
    failed: dict[str, str]
    skipped: dict[Drawn, str]
    resolution: int
    num_classes: int

    @property
    def main(self) -> list[Point]:
        """The points of the main way to draw that logarithmic axes can show: those of the curves."""
        return [p for p in self.points if p.variant == MAIN and self.distance(p) > 0]

    @property
    def counts(self) -> list[int]:
        """The image counts of the curve, rising; without 0, where nothing was learnt."""
        return sorted({p.images for p in self.main if p.images})

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(p.kind for p in self.main))

    @property
    def samplings(self) -> dict[str, Point]:
        """A point of each way to draw, by its name."""
        return {p.variant: p for p in self.points}

    @property
    def floor(self) -> float | None:
        """The distance between two halves of the real images."""
        return self.points[0].values.get(f"{self.metric}_floor") if self.points else None

    def distance(self, point: Point) -> float:
        return point.values[self.metric]

    def error(self, point: Point) -> float | None:
        """The distance's standard error, where one could be estimated."""
        return point.values.get(f"{self.metric}_error")

    def family(self, kind: str, images: int) -> list[Point]:
        """A family's points at one count, by rising cost."""
        return sorted((p for p in self.main if (p.kind, p.images) == (kind, images)), key=lambda p: p.gmacs)


def collect(sweep: Folder, plan: Plan) -> Report:
    """Everything that was evaluated."""
    recipe, points = plan.recipe, list[Point]()
    for model, cost in plan.costs.items():
        goodput = tracking.goodput(sweep / "runs" / model / "log")
        for variant in recipe.evaluate.samplings:
            for images, found in results.evaluated(sweep, model, variant).items():
                facts = {key: value for key, value in found.items() if key not in ("values", "format")}
                kind = recipe.models[model].kind
                known = max((n for n in goodput if 0 < n <= images), default=None)
                share = None if known is None else goodput[known]
                points.append(Point(model, kind, variant, images, cost, found["values"], facts, share))
    failed = {model: why for model in plan.costs if (why := results.ended(sweep, model))}
    return Report(
        sweep.name,
        recipe.evaluate.metric,
        points,
        failed,
        results.skipped(sweep, recipe),
        recipe.data.resolution,
        recipe.data.num_classes,
    )
