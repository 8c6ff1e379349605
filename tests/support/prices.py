"""Prices of models, each counted once in a process, and settings of training them."""

from functools import cache

from dis_scale.models import families
from dis_scale.models.cost import Cost, price_model
from dis_scale.models.settings import FamilySettings
from dis_scale.recipe import LatentShape, Train

price = cache(price_model)


def preset_settings(name: str) -> FamilySettings:
    sizes = families.preset(name)
    return families.find(sizes["kind"]).settings(**sizes)


def price_of(name: str, size: int = 32, channels: int = 4, num_classes: int | None = 1000) -> Cost:
    """Return the price of a published size."""
    return price(preset_settings(name), LatentShape(channels, size), num_classes)


def train(**settings: object) -> Train:
    """Training of eight workers."""
    fixed = {"publish_images": (1024,), "batch_images": 1024, "lanes": 64, "workers": 8, "precision": "bf16"}
    return Train(**fixed | settings)  # type: ignore[arg-type]
