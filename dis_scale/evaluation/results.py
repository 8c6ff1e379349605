"""What was evaluated and what is still to come, as storage tells it.

One evaluation is a folder: `evaluation/<model>/<images>/` of the main way to draw, a folder below it for each variant.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dis_scale.recipe import MAIN, Evaluate, Recipe
from dis_scale.storage.folder import Folder
from dis_scale.training import checkpoint
from dis_scale.training.checkpoint import images_name

METRICS, GRID, ENDED, SKIPPED = "metrics.json", "samples.png", "ended.json", "skipped.json"
VARIED = "vary"
"""Below one evaluation: what `vary.py` drew beside the recipe's variants."""


class Drawn(NamedTuple):
    """One checkpoint drawn in one way: the unit of evaluation."""

    model: str
    images: int
    variant: str = MAIN

    def __str__(self) -> str:
        return f"{self.model} at {self.images:,} images" + (f" ({self.variant})" if self.variant else "")


def varied(main: Evaluate, setting: str, values: Sequence[float]) -> dict[str, Evaluate]:
    """The main way to draw with other values of one setting, by name: `vary/guidance-1.25`."""
    return {f"{VARIED}/{setting.replace('_', '-')}-{v:g}": main.model_copy(update={setting: v}) for v in values}


def varied_there(sweep: Folder, model: str, images: int) -> list[Drawn]:
    """What was drawn of a checkpoint beside the recipe's ways."""
    place = folder(sweep, Drawn(model, images))
    there = [Drawn(model, images, f"{VARIED}/{name}") for name in place.list(VARIED)]
    return [drawn for drawn in there if folder(sweep, drawn).exists(METRICS)]


def folder(sweep: Folder, drawn: Drawn) -> Folder:
    base = sweep / "evaluation" / drawn.model / images_name(drawn.images)
    return base / drawn.variant if drawn.variant else base


def evaluated_counts(sweep: Folder, model: str, variant: str = MAIN) -> list[int]:
    """The image counts at which a model is evaluated, rising."""
    counts = [int(name) for name in (sweep / "evaluation" / model).list() if name.isdigit()]
    return [images for images in counts if folder(sweep, Drawn(model, images, variant)).exists(METRICS)]


def evaluated(sweep: Folder, model: str, variant: str = MAIN) -> dict[int, dict[str, Any]]:
    """What stands in a model's metrics by images seen."""
    counts = evaluated_counts(sweep, model, variant)
    return {images: folder(sweep, Drawn(model, images, variant)).read_json(METRICS) for images in counts}


def to_do(sweep: Folder, recipe: Recipe) -> list[Drawn]:
    """What is published and not evaluated: the main way to draw before the variants, then by images in the recipe's order."""
    left = []
    for model in recipe.models:
        counts = set(checkpoint.published(sweep / "runs" / model)) & set(recipe.train.publish_images)
        for variant in recipe.evaluate.samplings:
            left += [Drawn(model, n, variant) for n in counts - set(evaluated_counts(sweep, model, variant))]
    sign = -1 if recipe.evaluate.order == "newest_first" else 1
    return sorted(left, key=lambda drawn: (drawn.variant != MAIN, sign * drawn.images))


def outdated(sweep: Folder, recipe: Recipe) -> list[Drawn]:
    """Evaluations that lack a metric which the recipe asks for since: to be measured again, from the blocks that are kept."""
    return [
        Drawn(model, images, variant)
        for model in recipe.models
        for variant, drawing in recipe.evaluate.samplings.items()
        for images, found in evaluated(sweep, model, variant).items()
        if not set(drawing.metrics) <= set(found["metrics"])
    ]


def nothing_more_to_come(sweep: Folder, recipe: Recipe) -> bool:
    """Whether each model has published its last count or its training has ended for good."""
    return all(trained(sweep, recipe, model) or ended(sweep, model) for model in recipe.models)


def trained(sweep: Folder, recipe: Recipe, model: str) -> bool:
    """Whether a model has published its last count."""
    return recipe.train.images in checkpoint.published(sweep / "runs" / model)


def ended(sweep: Folder, model: str) -> str | None:
    """Why a model's training ended before its last count, or None while it may go on."""
    run = sweep / "runs" / model
    return run.read_json(ENDED)["why"] if run.exists(ENDED) else None


def skipped(sweep: Folder, recipe: Recipe) -> dict[Drawn, str]:
    """What evaluation had to skip, and why."""
    counts, variants = recipe.train.publish_images, recipe.evaluate.samplings
    every = [Drawn(model, n, variant) for model in recipe.models for n in counts for variant in variants]
    return {one: folder(sweep, one).read_json(SKIPPED)["why"] for one in every if folder(sweep, one).exists(SKIPPED)}


def finished(sweep: Folder, recipe: Recipe) -> bool:
    """Whether every model is evaluated at every published count in every way."""
    wanted = set(recipe.train.publish_images)
    return all(
        wanted <= set(evaluated_counts(sweep, model, variant))
        for model in recipe.models
        for variant in recipe.evaluate.samplings
    )
