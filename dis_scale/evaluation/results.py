"""What was evaluated and what is still to come, as storage tells it."""

from typing import Any

from dis_scale import checkpoint
from dis_scale.checkpoint import images_name
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder

METRICS, GRID, ENDED = "metrics.json", "samples.png", "ended.json"


def folder(sweep: Folder, model: str, images: int) -> Folder:
    return sweep / "evaluation" / model / images_name(images)


def evaluated(sweep: Folder, model: str) -> dict[int, dict[str, Any]]:
    """The metrics of a model by images seen."""
    base = sweep / "evaluation" / model
    found = {int(name): base / name for name in base.list() if name.isdigit()}
    return {images: place.read_json(METRICS) for images, place in sorted(found.items()) if place.exists(METRICS)}


def published_but_not_evaluated(sweep: Folder, recipe: Recipe) -> list[tuple[str, int]]:
    """(model, images) in the recipe's order, fewest images first."""
    pairs = []
    for model in recipe.models:
        done = evaluated(sweep, model)
        counts = checkpoint.published(sweep / "runs" / model)
        pairs += [(model, n) for n in counts if n in recipe.train.publish_images and n not in done]
    return sorted(pairs, key=lambda pair: pair[1])


def nothing_more_to_come(sweep: Folder, recipe: Recipe) -> bool:
    """Whether each model has published its last count or its training has ended for good."""
    return all(
        recipe.train.images in checkpoint.published(sweep / "runs" / model) or ended(sweep, model)
        for model in recipe.models
    )


def ended(sweep: Folder, model: str) -> str | None:
    """Why a model's training ended before its last count, or None while it may go on."""
    run = sweep / "runs" / model
    return run.read_json(ENDED)["why"] if run.exists(ENDED) else None


def finished(sweep: Folder, recipe: Recipe) -> bool:
    """Whether every model is evaluated at every published count."""
    return all(set(recipe.train.publish_images) <= evaluated(sweep, model).keys() for model in recipe.models)
