"""All evaluations of a sweep as points: model, cost, images seen and measured values."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from dis_scale.process.errors import UserError
from dis_scale.recipe import MAIN, Recipe, Sampling
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import FloorMetrics, LatentsManifest, Metrics, Origin
from dis_scale.weights.ema import start_share

if TYPE_CHECKING:
    from dis_scale.models.cost import Cost
    from dis_scale.planning.plan import Plan

T = TypeVar("T")
ALIKE = 0.1
"""Largest relative difference of costs at which two models of other names count as equally costly."""
SAMPLING_RATE = "sampling_images_per_s"


class Error(NamedTuple):
    """An independent part of a standard error, and the number of values that it is estimated from."""

    size: float
    of: int


@dataclass(frozen=True)
class Change:
    """A difference of two values, and the independent errors in it; no errors if they cannot be known."""

    change: float
    errors: tuple[Error, ...]

    @property
    def error(self) -> float | None:
        """The change's standard error, if it is known."""
        return math.hypot(*(each.size for each in self.errors)) if self.errors else None

    @property
    def significant(self) -> bool:
        """Whether Welch's test refuses, at 5 %, that the change is 0."""
        from dis_scale.report import fits  # here: scipy takes a second

        return abs(self.change) > fits.welch_margin(self.errors)


class Findings(NamedTuple):
    """Findings of a sweep or a study, a line each: `said` has sentences that one may quote, `details` the others."""

    said: list[str]
    details: list[str]


@dataclass(frozen=True)
class Point:
    """One model at one count of images seen, with one sampling."""

    model: str
    kind: str
    """The curve that it belongs to: the model's kind, with options that make it another backbone (`FamilySettings.curve`)."""
    variant: str
    images_seen: int
    cost: "Cost"
    values: dict[str, float]
    evaluation: Metrics
    forked_from: str
    """The run and the count whose training it continues; empty for no fork."""
    sampled_from: str
    """The model whose samples are stored; for a mean over seeds, the first that is measured."""
    group: str
    """The first of the models that differ in their seeds only."""
    trunk: str
    """The model whose training it is: itself, or the one that it branches from."""
    eflops: float
    """10^18 operations of the training so far: two for each multiply-add."""
    unfinished: bool
    """Whether the learning rate was to fall further: such a point is above what its compute could reach."""
    budget: float | None
    """Budget of the study (`isoflop`) that the training ends at, in operations."""
    start_share: float
    """Share of the random start in the exponential average; 0 for a training that began with other weights."""
    seeds: int = 1
    """Number of trainings whose mean this is."""
    spread: float | None = None
    """Standard error of that mean over the trainings, without the noise that their samples share; None for one training."""

    @property
    def gmacs(self) -> float:
        """10^9 multiply-adds of one forward pass for one image."""
        return self.cost.gmacs_forward

    @property
    def worker_hours(self) -> float | None:
        """Time of all workers in the steps that counted; None if it is not known."""
        return self.evaluation.cost.worker_hours

    @property
    def memory_gib(self) -> float | None:
        """Peak memory of a training worker."""
        return self.evaluation.cost.memory_gib

    @property
    def sampling(self) -> Sampling:
        return self.evaluation.sampling

    @property
    def sample_ms(self) -> float | None:
        """Time of one worker for a sample, without decoding; None if all samples were kept from another run."""
        rate = self.evaluation.seconds.get(SAMPLING_RATE)
        return 1000 / rate if rate else None


class Floor(NamedTuple):
    """A distance that no model is expected to undercut, with its standard error, if any."""

    words: str
    distance: float
    error: float | None


@dataclass(frozen=True)
class Report:
    """All points of a sweep under one metric; `failed` and `skipped` hold the reasons for missing points."""

    sweep: str
    metric: str
    points: list[Point]
    failed: dict[str, str]
    skipped: dict[Sampled, str]
    recipe: Recipe
    groups: dict[str, str]
    """The group of each model."""
    vae: str | None
    """Identity of the VAE that made the latents, None without latents."""
    floors: list[Floor]
    """Floors of real images, then of their reconstructions; empty if they are not measured."""
    no_floor: str | None
    """The reason why floors are missing, if known."""
    images: int | None = None
    """Images of the latents, without flips; None if these were deleted."""

    @property
    def quantity(self) -> str:
        """Kind of the metric in words."""
        return "held-out loss" if self.metric == HELD_OUT else "distance"

    @property
    def visible_floors(self) -> list[Floor]:
        """Floors that logarithmic axes can show: the floor of few images may be below 0."""
        return [floor for floor in self.floors if floor.distance > 0]

    @property
    def main(self) -> list[Point]:
        """Points of the curves: the main sampling, with a distance that logarithmic axes can show."""
        return [p for p in self.means if p.variant == MAIN and self.distance(p) > 0]

    @cached_property
    def means(self) -> list[Point]:
        """All points, with the mean over the seeds of a model in place of its trainings."""
        groups = defaultdict[tuple[str, str, int], list[Point]](list)
        for p in self.points:
            groups[p.group, p.variant, p.images_seen].append(p)
        models, variants = list(self.recipe.models), list(self.recipe.evaluate.samplings)
        ordered = sorted(groups, key=lambda key: (models.index(key[0]), variants.index(key[1]), key[2]))
        return [_mean(groups[key], self.metric) for key in ordered]

    @property
    def unique_images(self) -> int | None:
        """Different images that are trained on; None if it is not known."""
        return None if self.images is None else self.images - self.recipe.data.held_out_images

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

    def distance(self, point: Point) -> float:
        return point.values[self.metric]

    def error(self, point: Point) -> float | None:
        """Return the distance's standard error, over seeds if there are several; None if it could not be estimated."""
        return point.values.get(f"{self.metric}_error")

    def family(self, kind: str, images_seen: int) -> list[Point]:
        """Return a family's points at one count of images seen, by rising cost.

        If a model's learning rate has not fallen there, and a branch of it ends there with a fallen rate, the trunk's point is left
        out, whether the branch is measured or not: the trunk is no match.
        """
        recipe, points = self.recipe, [p for p in self.main if (p.kind, p.images_seen) == (kind, images_seen)]
        ending = [name for name in recipe.models if recipe.train_of(name).images == images_seen]
        branches = [(recipe.train_of(name), branch.of) for name in ending if (branch := recipe.models[name].branch)]
        annealed = set[str]()
        for own, of in branches:
            its = recipe.train_of(of)
            if own.decay != "none" if its.decay == "none" else images_seen < its.images:
                annealed.add(self.groups[of])
        return sorted((p for p in points if p.group not in annealed), key=lambda p: p.gmacs)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the items, evenly spaced, with the first and the last."""
    chosen = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in chosen]


def _mean(points: list[Point], metric: str) -> Point:
    """Return the mean of a model's trainings, with its error, which combines the spread over seeds and the error of sampling.

    The latter does not fall with the number of seeds, which share the noise and the labels of their samples. The held-out loss is
    of the same images and noise in all trainings, so its error is over seeds only.
    """
    first = replace(points[0], model=points[0].group)
    if len(points) == 1:
        return first
    names = [name for name in points[0].values if all(name in p.values for p in points)]
    values = {name: statistics.fmean(p.values[name] for p in points) for name in names}
    spread = statistics.stdev(p.values[metric] for p in points) / math.sqrt(len(points))
    if f"{metric}_error" in values:  # else the error is unknown, since a part of it is
        values[f"{metric}_error"] = math.hypot(spread, values[f"{metric}_error"])
    if HELD_OUT in values:
        values[f"{HELD_OUT}_error"] = statistics.stdev(p.values[HELD_OUT] for p in points) / math.sqrt(len(points))
    return replace(first, values=values, seeds=len(points), spread=spread, evaluation=_mean_evaluation(points))


def _mean_evaluation(points: list[Point]) -> Metrics:
    """Return the evaluation of the first point, with the means of all known costs and of the values without each group of samples,
    and the names of all machines.
    """
    first, costs, lists = (points[0].evaluation, [p.evaluation.cost for p in points], [p.evaluation.left_out for p in points])
    common = [name for name in first.left_out if all(name in each for each in lists)]
    cost = first.cost.model_copy(
        update={
            "goodput": _mean_of(cost.goodput for cost in costs),
            "worker_hours": _mean_of(cost.worker_hours for cost in costs),
            "memory_gib": _mean_of(cost.memory_gib for cost in costs),
            "trained_on": tuple(sorted({name for cost in costs for name in cost.trained_on})),
        }
    )
    sample_ms = _mean_of(p.sample_ms for p in points)
    return first.changed(
        cost=cost,
        left_out={name: tuple(map(statistics.fmean, zip(*(each[name] for each in lists), strict=True))) for name in common},
        seconds={SAMPLING_RATE: 1000 / sample_ms} if sample_ms else first.seconds,
        sampled_on=tuple(sorted({name for p in points for name in p.evaluation.sampled_on})),
    )


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def plan_of(sweep: Sweep) -> "Plan":
    """Return the plan of a stored sweep; UserError if it has nothing to report. A hub is asked only if the latents were deleted."""
    latents = state.find_latents(sweep.folder)
    if latents is None and not any(sweep.evaluations(model).list() for model in sweep.recipe.models):
        raise UserError(f"{sweep}: nothing to report yet: its latents are not complete (dis-scale status {sweep})")

    from dis_scale import vae  # here: a mistake is answered without torch
    from dis_scale.planning.plan import price_sweep

    shape = LatentsManifest.require(latents).encoding.latent if latents else None
    return price_sweep(sweep.recipe, shape or vae.latent_shape(sweep.recipe.vae, sweep.recipe.data.resolution))


def collect(sweep: Sweep, plan: "Plan") -> Report:
    """Collect all evaluations of a sweep."""
    recipe, points, groups = sweep.recipe, list[Point](), sweep.recipe.seed_groups()
    skipped, metric = state.skipped(sweep), recipe.evaluate.metric
    budgets, origins = recipe.budgets, state.origins(sweep)
    copied = state.copied_to(sweep, origins)
    for model, cost in plan.costs.items():
        train, branch, group = recipe.train_of(model), recipe.models[model].branch, groups[model]
        trunk = groups[branch.of] if branch else group
        flops, origin = plan.training_flops(model), origins[model]
        for variant in recipe.evaluate.samplings:
            for images_seen, evaluation in state.evaluated(sweep, model, variant).items():
                if images_seen <= copied[model]:
                    continue  # it is the origin's point
                if metric not in evaluation.values:
                    skipped[Sampled(model, images_seen, variant)] = f"it was measured without {metric}: resume the sweep"
                    continue
                kind = recipe.models[model].curve
                point = Point(
                    model=model, kind=kind, variant=variant, images_seen=images_seen, cost=cost,
                    values=evaluation.values, evaluation=evaluation, sampled_from=model, group=group, trunk=trunk,
                    eflops=flops * images_seen / 1e18, unfinished=train.decay != "none" and images_seen < train.images,
                    start_share=_random_share(recipe, model, images_seen, origins), budget=budgets.get(model),
                    forked_from=f"{origin.model} at {origin.images:,} images" if origin else "",
                )  # fmt: skip
                points.append(point)
    failed = {model: why for model in plan.costs if (why := state.ended(sweep, model))}
    (floors, no_floor), latents = _floors(sweep), state.find_latents(sweep.folder)
    return Report(
        sweep=sweep.folder.name, metric=metric, points=points, failed=failed, skipped=skipped, recipe=recipe, groups=groups,
        vae=state.latents_vae(sweep), floors=floors, no_floor=no_floor,
        images=LatentsManifest.require(latents).count if latents else None,
    )  # fmt: skip


def _random_share(recipe: Recipe, model: str, images_seen: int, origins: Mapping[str, Origin | None]) -> float:
    """Return the share of random initial weights in a model's average, through the runs that it was forked or branched from."""
    if recipe.start_of(model):
        return 0.0
    branch = recipe.models[model].branch
    origin = origins[model]
    of, at = (origin.model, origin.images) if origin else (branch.of, branch.at) if branch else ("", 0)
    if of not in origins:  # random from the start, or from a run that is no longer in the recipe
        return start_share(recipe.train_of(model), images_seen)
    since = min(at, images_seen)
    return _random_share(recipe, of, since, origins) * start_share(recipe.train_of(model), images_seen, since)


def _floors(sweep: Sweep) -> tuple[list[Floor], str | None]:
    """Return the floors under the main metric, and the reason if they were tried and cannot be drawn."""
    settings, floor, skipped = sweep.recipe.evaluate, FloorMetrics.find_intact(sweep.floor), state.floor_skipped(sweep)
    if not floor:
        return [], skipped
    outside = settings.reference_of(settings.extractor.name) is not None
    which = "of the source" if outside else f"held out of the reference, scaled to {settings.samples:,}"
    words = {"real": f"{floor.images:,} real images {which}", "reconstructed": "their reconstructions by the VAE"}
    every = [(words[kind], floor.values[kind], settings.metric) for kind in words if kind in floor.values]
    floors = [Floor(text, v[metric], v.get(f"{metric}_error")) for text, v, metric in every if metric in v]
    other = None if floors else f"the floors are those of the distance at {settings.samples:,} samples"
    return floors, skipped or floor.missing.get(settings.metric) or other
