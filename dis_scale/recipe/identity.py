"""Comparison of two recipes under one name: what differs in the sweep's identity."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dis_scale.recipe import Isoflop, Recipe, Train
from dis_scale.recipe.settings import Settings


def identity_differences(stored: Recipe, given: Recipe) -> list[str]:
    """Return one line for each change that `given` may not make to the sweep `stored`; empty if it may continue."""
    lines = [f"{key}: stored {in_recipe(old)}, given {in_recipe(new)}" for key, old, new in differing(stored, given)]
    lines += _named_differences("models", stored.models, given.models)
    lines += _named_differences("evaluate.variants", stored.evaluate.variants, given.evaluate.variants)
    lines += _published_differences("train", stored.train, given.train)
    lines += _budget_differences(stored.isoflop, given.isoflop)
    for name in stored.models.keys() & given.models.keys():
        own = {"publish_images", "decay"}
        if own & (stored.models[name].train.changes.keys() | given.models[name].train.changes.keys()):
            lines += _published_differences(f"models.{name}.train", stored.train_of(name), given.train_of(name))
    return sorted(lines)


def _published_differences(where: str, stored: Train, given: Train) -> list[str]:
    """Published counts may only be added after the last one; with a decay, none at all."""
    before, now = set(stored.publish_images), set(given.publish_images)
    if not before or not now:
        return []  # a study: its models have counts of their own
    last = max(before)
    if stored.decay != "none" and given.images != stored.images:
        return [f"{where}.publish_images: the {stored.decay} decay ends at {last}, given {given.images}"]
    if max(now) < last:
        return [f"{where}.publish_images: stored up to {last}, given only up to {max(now)}"]
    passed = sorted(n for n in now - before if n < last)
    return [f"{where}.publish_images: {passed[0]} is before {last}, which training may have passed"] if passed else []


def _budget_differences(stored: Isoflop | None, given: Isoflop | None) -> list[str]:
    """Budgets may only be added above the largest one: its trunks may have passed the others."""
    if stored is None or given is None:
        return []
    passed = [n for n in given.flops if n < stored.flops[-1] and n not in stored.flops]
    return (
        [f"isoflop.flops: {passed[0]:g} is below {stored.flops[-1]:g}, whose trunks may have passed it"]
        if passed
        else []
    )


def _named_differences(where: str, stored: Mapping[str, Settings], given: Mapping[str, Settings]) -> list[str]:
    """Named parts may be added and removed, but not change under their name."""
    return [
        f"{where}.{name}.{key}: stored {in_recipe(old)}, given {in_recipe(new)}"
        for name in stored.keys() & given.keys()
        for key, old, new in differing(stored[name], given[name])
    ]


def in_recipe(value: Any) -> str:
    """Return a setting's value as a recipe has it."""
    if isinstance(value, tuple | list | dict | Settings):
        return yaml.safe_dump(_plain(value), default_flow_style=True, sort_keys=False, width=1000).strip()
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """Return a value without types of ours."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value.model_dump(mode="json") if isinstance(value, Settings) else value


def differing(stored: Settings, given: Settings, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield key and both values of each setting of identity that differs."""
    if type(stored) is not type(given):
        yield prefix.rstrip("."), stored, given
        return
    for name, field in type(stored).model_fields.items():
        old, new = getattr(stored, name), getattr(given, name)
        role = (field.json_schema_extra or {}).get("role") if isinstance(field.json_schema_extra, Mapping) else None
        if isinstance(old, Settings) and isinstance(new, Settings):
            yield from differing(old, new, f"{prefix}{name}.")
        elif old != new and (role is None or (role == "pin" and old is not None)):
            yield f"{prefix}{name}", old, new
