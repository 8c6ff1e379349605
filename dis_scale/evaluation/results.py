"""What was evaluated and what is still to come, as storage tells it."""

from typing import Any

from dis_scale import checkpoint
from dis_scale.checkpoint import images_name
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder

METRICS, GRID, ENDED = "metrics.json", "samples.png", "ended.json"


def folder(sweep: Folder, model: str, images: int) -> Folder:
    return sweep / "evaluation" / model / images_name(images)


def evaluated_counts(sweep: Folder, model: str) -> list[int]:
    """The image counts at which a model is evaluated, rising."""
    counts = [int(name) for name in (sweep / "evaluation" / model).list() if name.isdigit()]
    return [images for images in counts if folder(sweep, model, images).exists(METRICS)]


def evaluated(sweep: Folder, model: str) -> dict[int, dict[str, Any]]:
    """The metrics of a model by images seen."""
    return {images: folder(sweep, model, images).read_json(METRICS) for images in evaluated_counts(sweep, model)}


def published_but_not_evaluated(sweep: Folder, recipe: Recipe) -> list[tuple[str, int]]:
    """(model, images) in the recipe's order, fewest images first."""
    pairs = []
    for model in recipe.models:
        done = evaluated_counts(sweep, model)
        counts = checkpoint.published(sweep / "runs" / model)
        pairs += [(model, n) for n in counts if n in recipe.train.publish_images and n not in done]
    return sorted(pairs, key=lambda pair: pair[1])


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


def finished(sweep: Folder, recipe: Recipe) -> bool:
    """Whether every model is evaluated at every published count."""
    return all(set(recipe.train.publish_images) <= set(evaluated_counts(sweep, model)) for model in recipe.models)
