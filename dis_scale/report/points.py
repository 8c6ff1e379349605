"""All evaluations of a sweep as points: model, cost, images seen and measured values."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dis_scale.recipe import MAIN
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.tracking.goodput import GOODPUT

if TYPE_CHECKING:
    from dis_scale.models.cost import Cost
    from dis_scale.plan import Plan


@dataclass(frozen=True)
class Point:
    """One model at one count of images seen, with one sampling.

    `facts` are the other fields of its metrics file: samples, sampler, steps, guidance, ... `goodput` is the share of the run's
    time so far that was spent in steps that counted; None if its log has no row for it.
    """

    model: str
    kind: str
    variant: str
    images_seen: int
    cost: "Cost"
    values: dict[str, float]
    facts: dict[str, Any]
    goodput: float | None

    @property
    def gmacs(self) -> float:
        """10^9 multiply-adds of one forward pass for one image."""
        return self.cost.gmacs_forward

    @property
    def eflops(self) -> float:
        """10^18 operations of the training so far: two for each multiply-add."""
        return 2 * self.cost.gmacs_training * self.images_seen / 1e9


@dataclass(frozen=True)
class Report:
    """All points of a sweep under one metric; `failed` and `skipped` hold the reasons for missing points."""

    sweep: str
    metric: str
    points: list[Point]
    failed: dict[str, str]
    skipped: dict[Sampled, str]
    resolution: int
    num_classes: int
    normalise: str
    """`data.normalise` of the recipe."""
    vae: str | None
    """Identity of the VAE that made the latents, None without latents."""

    @property
    def main(self) -> list[Point]:
        """Points of the curves: the main sampling, with a distance that logarithmic axes can show."""
        return [p for p in self.points if p.variant == MAIN and self.distance(p) > 0]

    @property
    def counts(self) -> list[int]:
        """Rising counts of images seen of the curves, without 0 (untrained)."""
        return sorted({p.images_seen for p in self.main if p.images_seen})

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(p.kind for p in self.main))

    @property
    def samplings(self) -> dict[str, Point]:
        """One point of each sampling, by the variant's name."""
        return {p.variant: p for p in self.points}

    @property
    def floor(self) -> float | None:
        """Distance between two halves of the real images; None if unknown."""
        return self.points[0].values.get(f"{self.metric}_floor") if self.points else None

    def distance(self, point: Point) -> float:
        return point.values[self.metric]

    def error(self, point: Point) -> float | None:
        """Return the distance's standard error, None if it could not be estimated."""
        return point.values.get(f"{self.metric}_error")

    def family(self, kind: str, images_seen: int) -> list[Point]:
        """Return a family's points at one count of images seen, by rising cost."""
        return sorted((p for p in self.main if (p.kind, p.images_seen) == (kind, images_seen)), key=lambda p: p.gmacs)


def collect(sweep: Sweep, plan: "Plan") -> Report:
    """Collect all evaluations of a sweep."""
    recipe, points = sweep.recipe, list[Point]()
    for model, cost in plan.costs.items():
        for variant in recipe.evaluate.samplings:
            for images_seen, evaluation in state.evaluated(sweep, model, variant).items():
                facts = {key: value for key, value in evaluation.items() if key not in ("values", "format")}
                kind = recipe.models[model].kind
                point = Point(
                    model=model, kind=kind, variant=variant, images_seen=images_seen, cost=cost,
                    values=evaluation["values"], facts=facts, goodput=facts.pop(GOODPUT, None),
                )  # fmt: skip
                points.append(point)
    failed = {model: why for model in plan.costs if (why := state.ended(sweep, model))}
    return Report(
        sweep=sweep.folder.name, metric=recipe.evaluate.metric, points=points, failed=failed,
        skipped=state.skipped(sweep), resolution=recipe.data.resolution, num_classes=recipe.data.num_classes,
        normalise=recipe.data.normalise, vae=state.latents_vae(sweep),
    )  # fmt: skip
