"""The learning rate over a training."""

import math

from dis_scale.process.errors import UserError
from dis_scale.recipe import Branch, Recipe, Train


def learning_rate(settings: Train, images_seen: int) -> float:
    """Return the learning rate of the step that begins at `images_seen`: warm-up, plateau, decay to zero."""
    warm = min(1.0, (images_seen + settings.batch_images) / settings.warmup_images) if settings.warmup_images else 1.0
    first = settings.decay_from * settings.images
    done = min(1.0, max(0.0, (images_seen - first) / (settings.images - first))) if settings.images else 0.0
    match settings.decay:
        case "none":
            left = 1.0
        case "linear":
            left = 1 - done
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * warm * left


def require_no_rise(recipe: Recipe, name: str, branch: Branch) -> None:
    """Raise UserError if the rate of a branch begins above its trunk's rate, which has decayed by then."""
    own, trunks = (learning_rate(train, branch.at) / train.learning_rate for train in map(recipe.train_of, (name, branch.of)))
    if own > trunks * 1.001:
        raise UserError(
            f"models.{name}.branch: at {branch.at} images the rate of {branch.of} has decayed to {trunks:.0%}, and this one would "
            f"begin at {own:.0%}: train {branch.of} at a constant rate (train.decay none), or begin earlier"
        )
