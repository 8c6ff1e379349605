"""Price of a sweep before it starts: counts and arithmetic, nothing measured."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from rich.table import Table

from dis_scale import diffusion
from dis_scale.data.cache import share_read
from dis_scale.data.latents import GIB
from dis_scale.data.order import require_some_to_train
from dis_scale.data.shards import sample_bytes
from dis_scale.diffusion.samplers import pass_times
from dis_scale.models import transfer
from dis_scale.models.cost import Cost, price_model
from dis_scale.planning.fleet import MOST_GPUS, Fleet, Forecast, forecast, pass_images
from dis_scale.process.errors import UserError, counted
from dis_scale.process.tables import narrow_table
from dis_scale.recipe import Evaluate, LatentShape, Model, ModelTrain, Recipe
from dis_scale.training.engine import kinds
from dis_scale.training.lanes import largest_share
from dis_scale.training.memory import USABLE, worker_bytes
from dis_scale.vae import has_posterior
from dis_scale.weights import ema


@dataclass(frozen=True)
class Plan:
    """The price of each model, by name, in the recipe's order."""

    recipe: Recipe
    shape: LatentShape
    costs: dict[str, Cost]

    def training_flops(self, model: str) -> float:
        """Return the FLOPs of training on one image, two for each multiply-add, without recomputation."""
        return self.costs[model].training_flops(self.recipe.train_of(model).lane_images)

    def own_flops(self, model: str) -> float:
        """Return the FLOPs of a model's own training: a branch's training begins at its trunk's resume point."""
        branch = self.recipe.models[model].branch
        return self.training_flops(model) * (self.recipe.train_of(model).images - (branch.at if branch else 0))

    def sampling_flops(self, model: str, settings: Evaluate | None = None) -> float:
        """Return the FLOPs of the samples of one evaluation, by default under the main settings. Guidance adds a pass of the model
        or of its guiding model, and some samplers evaluate the model twice a step."""
        settings = settings or self.recipe.evaluate
        times_K = pass_times(diffusion.build(self.recipe.diffusion, self.shape), settings.sampler, settings.steps)
        low, high = settings.guidance_interval or (-math.inf, math.inf)
        guided = ((low <= times_K) & (times_K <= high)).sum() if settings.scale != 1 else 0
        guide = self.costs[settings.guide.by if settings.guide else model].gmacs_forward
        return 2e9 * float(len(times_K) * self.costs[model].gmacs_forward + guided * guide) * settings.samples

    def evaluation_s(self, model: str, fleet: Fleet) -> float:
        """Return the seconds of one GPU for the samples of all evaluations of a model."""
        counts, samplings = len(self.recipe.train_of(model).publish_images), self.recipe.evaluate.samplings.values()
        return counts * sum(self.sampling_flops(model, each) / fleet.flops(each.precision) for each in samplings)

    def stored_bytes(self, model: str) -> int:
        """Return the bytes that a trained model keeps in storage: its resume points and its published averages."""
        train, one = self.recipe.train_of(model), 4 * self.costs[model].parameters
        points = train.keep_resume + train.keep_spaced + len(self.recipe.branches_at(model))
        resume = points * len(kinds(train))
        return one * (resume + len(train.publish_images) * len(ema.names(train)))

    def parameters(self) -> dict[str, dict[str, object]]:
        """Return the parameters of each model's run in MLflow."""
        recipe, settings = self.recipe, {name: self.recipe.train_of(name) for name in self.costs}
        return {
            name: {
                "gmacs_forward": round(c.gmacs_forward, 6), "parameters": c.parameters, "tokens": c.tokens,
                "global_batch": settings[name].batch_images, "seed": recipe.seed_of(name), "kind": recipe.models[name].kind,
                "images": settings[name].images, "metric": recipe.evaluate.metric,
            }
            for name, c in self.costs.items()
        }  # fmt: skip


def price_reading(recipe: Recipe, shape: LatentShape, images: int) -> str:
    """Return a line on the size of the latents, the share that a node's cache holds, and the bytes read in an epoch."""
    settings, set_bytes = recipe.reader, images * _latent_bytes(recipe, shape)
    size = f"{images:,} images, {set_bytes / 1e9:,.2f} GB of latents"
    if settings.memory_gib is not None and set_bytes <= settings.memory_gib * GIB:
        return f"{size}: kept in each worker's memory, and read once"
    cached = min(1.0, settings.cache_gib * GIB / set_bytes)
    if not cached:
        return f"{size}; from an object store each worker reads them all in every epoch, since a node has no cache"
    return (
        f"{size}; from an object store, a node's cache ({settings.cache_gib:g} GiB) holds {cached:.0%} of them, "
        f"and each node reads {share_read(cached) * set_bytes / 1e9:,.2f} GB an epoch after the first"
    )


def _latent_bytes(recipe: Recipe, shape: LatentShape) -> int:
    """Return the bytes of an image's latents in a shard."""
    given = recipe.data.given
    return sample_bytes(shape, posterior=given.posterior if given else has_posterior(recipe.vae), sides=recipe.data.sides)


def price_sweep(recipe: Recipe, shape: LatentShape) -> Plan:
    """Return the plan of a recipe whose latents have this shape; UserError for a model that does not fit them."""
    alike, classes = {"train": ModelTrain(), "seed": None, "branch": None, "start": None}, recipe.data.num_classes
    costs = {name: _price(model.model_copy(update=alike), shape, classes) for name, model in recipe.models.items()}
    return Plan(recipe, shape, costs)


@cache
def _price(alone: Model, shape: LatentShape, num_classes: int | None) -> Cost:
    """Price a model without its training settings, so that a size and all its branches in a study share one cached price."""
    return price_model(alone, shape, num_classes)


@dataclass(frozen=True)
class ModelNumbers:
    """Numbers of one model that follow from a recipe."""

    tokens: int
    parameters: int
    gmacs_forward: float
    images: int
    steps: int
    epochs: float | None
    """None if the source's images are unknown."""
    steps_between_resume_points: int
    training_flops: float
    """FLOPs of the model's own training."""
    sampling_flops: float
    """FLOPs of the samples of one evaluation."""


@dataclass(frozen=True)
class Numbers:
    """All numbers that follow from a recipe."""

    latent: LatentShape
    source_images: int | None
    source_unknown: str
    """Reason why `source_images` is unknown; empty if it is known."""
    latent_bytes: int | None
    lane_images: int
    world_sizes: Sequence[int]
    metric: str
    evaluations: int
    blocks: int
    models: dict[str, ModelNumbers]


def derive(plan: Plan, source_images: int | None, source_unknown: str) -> Numbers:
    """Return all numbers that follow from a recipe; those that need `source_images` are None if it is unknown.

    Raises UserError if all images of the source are held out.
    """
    recipe, shape, models = plan.recipe, plan.shape, dict[str, ModelNumbers]()
    if source_images is not None:
        require_some_to_train(recipe.data.held_out_images, source_images)
    epoch = source_images and source_images - recipe.data.held_out_images
    for name, cost in plan.costs.items():
        train = recipe.train_of(name)
        models[name] = ModelNumbers(
            tokens=cost.tokens, parameters=cost.parameters, gmacs_forward=cost.gmacs_forward, images=train.images,
            steps=train.images // train.batch_images, epochs=epoch and train.images / epoch,
            steps_between_resume_points=-(-train.resume_every_images // train.batch_images),
            training_flops=plan.own_flops(name), sampling_flops=plan.sampling_flops(name),
        )  # fmt: skip
    counts = sum(len(recipe.train_of(name).publish_images) for name in plan.costs)
    return Numbers(
        latent=shape, source_images=source_images, source_unknown=source_unknown,
        latent_bytes=source_images and source_images * _latent_bytes(recipe, shape),
        lane_images=recipe.train.lane_images, world_sizes=recipe.train.world_sizes, metric=recipe.evaluate.metric,
        evaluations=counts * len(recipe.evaluate.samplings),
        blocks=-(-recipe.evaluate.samples // recipe.evaluate.block_images), models=models,
    )  # fmt: skip


FLEETS = (1, 8, 64, 256, MOST_GPUS)
"""Numbers of GPUs that are compared."""


@dataclass(frozen=True)
class Total:
    """A sweep on this number of GPUs. Models train side by side if one leaves GPUs free, but none faster than by itself."""

    gpus: int
    days: float
    gpu_hours: float
    price: float | None
    stored_bytes: int
    fits: bool
    largest_loss: float


@dataclass(frozen=True)
class FleetForecast:
    """A sweep on a fleet by model, and in total for several numbers of GPUs, with equally many preemptions per GPU."""

    assumed: Fleet
    usable_bytes: int
    models: dict[str, Forecast]
    by_gpus: list[Total]


def on_fleet(plan: Plan, fleet: Fleet) -> FleetForecast:
    """Return the sweep's forecast on a fleet; UserError for a number of GPUs that is not from 1 to 1,024."""
    if not 1 <= fleet.count <= MOST_GPUS:
        raise UserError(f"{fleet.count} GPUs: expected 1 to {MOST_GPUS:,}")
    per_gpu = fleet.preemptions_per_day / fleet.count
    others = [replace(fleet, count=count, preemptions_per_day=per_gpu * count) for count in sorted({*FLEETS, fleet.count})]
    return FleetForecast(
        assumed=fleet, usable_bytes=int(USABLE * fleet.gpu_bytes), models=_on_fleet(plan, fleet),
        by_gpus=[_total(plan, other) for other in others],
    )  # fmt: skip


def _on_fleet(plan: Plan, fleet: Fleet) -> dict[str, Forecast]:
    """Return each model's forecast, with its evaluations, files and price."""
    models = {}
    for name, cost in plan.costs.items():
        train, branch = plan.recipe.train_of(name), plan.recipe.models[name].branch
        training = forecast(cost, train, train.images - (branch.at if branch else 0), fleet)
        evaluated = replace(training, evaluation_gpu_hours=plan.evaluation_s(name, fleet) / 3600)
        models[name] = replace(evaluated, price=_price_of(evaluated.gpu_hours, fleet), stored_bytes=plan.stored_bytes(name))
    return models


def _total(plan: Plan, fleet: Fleet) -> Total:
    by_name = _on_fleet(plan, fleet)
    models, hours = by_name.values(), sum(each.gpu_hours for each in by_name.values())
    longest = max((_days_until(plan, by_name, name, plan.recipe.train_of(name).images) for name in by_name), default=0.0)
    return Total(
        gpus=fleet.count, days=max(hours / 24 / fleet.count, longest), gpu_hours=hours,
        price=_price_of(hours, fleet), stored_bytes=sum(each.stored_bytes for each in models),
        fits=all(each.fits for each in models), largest_loss=max(each.loss for each in models),
    )  # fmt: skip


def _days_until(plan: Plan, models: Mapping[str, Forecast], name: str, images: int) -> float:
    """Return the days until a model has seen this many images. A branch begins when its trunk reaches the branch's count."""
    branch = plan.recipe.models[name].branch
    begin = branch.at if branch else 0
    share = (images - begin) / max(1, plan.recipe.train_of(name).images - begin)
    return models[name].expected_days * share + (_days_until(plan, models, branch.of, branch.at) if branch else 0.0)


def _price_of(hours: float, fleet: Fleet) -> float | None:
    return None if fleet.price is None else fleet.price * hours


def table(plan: Plan) -> Table:
    """Return one row per model: its size, the cost of an image, the cost of training, the size of a resume point.

    A GPU needs the stated memory with `micro_images`, by default one lane, in a forward pass. Saving needs host memory: a clone of
    all states, and twice the bytes of one state at a time.
    """
    train = plan.recipe.train
    share = largest_share(train.lanes, train.most_workers)
    caption = (
        f"batch {train.batch_images} = {counted(train.lanes, 'lane')} x {train.lane_images}, up to {share} on each of "
        f"{counted(train.most_workers, 'worker')}; {_lengths(plan.recipe)}; ZeRO stage {train.zero_stage}, "
        f"{train.precision}; Gflops are multiply-adds (DiT's convention); host memory while saving is over all workers"
        + "".join(f"; {line}" for line in _transfers(plan.recipe))
    )
    out = narrow_table(
        "model", "parameters", "tokens", "Gflops", "training\nPFLOP", "GPU", "resume\npoint", "saving\ntakes", caption=caption,
        title=f"plan of {plan.recipe.name}: latents {plan.shape.channels}x{plan.shape.size}x{plan.shape.size}",
    )  # fmt: skip
    out.columns[0].no_wrap = False
    for name, c in plan.costs.items():
        train, kind = plan.recipe.train_of(name), plan.recipe.models[name].kind
        gpu = worker_bytes(c, train, train.most_workers, pass_images(train, train.most_workers))
        state, serialised = c.parameters * 4 * len(kinds(train)), 2 * c.parameters * 4
        out.add_row(
            name if kind in name else f"{name} ({kind})", f"{c.parameters:,}", str(c.tokens), f"{c.gmacs_forward:.4g}",
            f"{plan.own_flops(name) / 1e15:.3g}", f"{gpu / 2**30:.1f} GiB", _size(state), _size(state + serialised),
        )  # fmt: skip
    return out


def _size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _transfers(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each model whose warm-up is longer than its training, and for each with a base width, on its rates."""
    for name, model in recipe.models.items():
        if (train := recipe.train_of(name)).warmup_images > train.images:
            share = train.images / train.warmup_images
            yield f"{name}: its learning rate rises until the end, to {share:.0%} of learning_rate: train.warmup_images is longer"
        if base_width := recipe.train_of(name).base_width:
            yield f"{name}: {transfer.words(model, base_width)}"


def _lengths(recipe: Recipe) -> str:
    """Return images and steps of the trainings, grouped by length; without branches, whose names contain their counts."""
    names = defaultdict[tuple[int, int], list[str]](list)
    for name in [name for name, model in recipe.models.items() if not model.branch]:
        train = recipe.train_of(name)
        names[train.images, train.batch_images].append(name)
    return "; ".join(
        f"{images:,} images = {images // batch:,} steps" + (f" of {batch} ({', '.join(which)})" if len(names) > 1 else "")
        for (images, batch), which in names.items()
    )
