"""Comparison of two recipes under one name: what differs in the sweep's identity."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import TypeAdapter

from dis_scale.process.settings import Settings
from dis_scale.recipe import Isoflop, Recipe, Train

_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def identity_differences(stored: Recipe, given: Recipe) -> list[str]:
    """Return one line for each change that `given` may not make to the sweep `stored`; empty if it may continue."""
    lines = [f"{key}: stored {as_yaml(old)}, given {as_yaml(new)}" for key, old, new in differing(stored, given)]
    lines += _named_differences("models", stored.models, given.models)
    lines += _named_differences("evaluate.variants", stored.evaluate.variants, given.evaluate.variants)
    lines += _published_differences("train", stored.train, given.train)
    lines += _budget_differences(stored.isoflop, given.isoflop)
    for name in stored.models.keys() & given.models.keys():
        extents = {"publish_images", "decay"}
        if extents & (stored.models[name].train.changes.keys() | given.models[name].train.changes.keys()):
            lines += _published_differences(f"models.{name}.train", stored.train_of(name), given.train_of(name))
    return sorted(lines)


def _published_differences(where: str, stored: Train, given: Train) -> list[str]:
    """Return a line if the published counts may not change so.

    New counts come after the last stored one; a list that ends before it is refused, with a decay also one that ends later.
    """
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
    """Return a line for a new budget below the largest stored one: the training of each size may be past it."""
    if stored is None or given is None:
        return []
    passed = [n for n in given.flops if n < stored.flops[-1] and n not in stored.flops]
    return [f"isoflop.flops: {n:g} is below {stored.flops[-1]:g}, whose trunks may have passed it" for n in passed[:1]]


def _named_differences(where: str, stored: Mapping[str, Settings], given: Mapping[str, Settings]) -> list[str]:
    """Return a line for each named part that changes under its name; parts may be added and removed."""
    return [
        f"{key}: stored {as_yaml(old)}, given {as_yaml(new)}"
        for name in stored.keys() & given.keys()
        for key, old, new in differing(stored[name], given[name], f"{where}.{name}.")
    ]


def as_yaml(value: Any) -> str:
    """Format a setting's value as in a recipe."""
    if isinstance(value, tuple | list | dict | Settings):
        return yaml.safe_dump(_ANY.dump_python(value, mode="json"), default_flow_style=True, sort_keys=False, width=1000).strip()
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def differing(stored: Settings, given: Settings, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield key, stored and given value of each setting that may not change: those without a role, and hashes already pinned."""
    if type(stored) is not type(given):  # two alternatives, which their `kind` names
        yield f"{prefix}kind", stored.model_dump()["kind"], given.model_dump()["kind"]
        return
    for name, field in type(stored).model_fields.items():
        old, new = getattr(stored, name), getattr(given, name)
        role = extra.get("role") if isinstance(extra := field.json_schema_extra, Mapping) else None
        if isinstance(old, Settings) and isinstance(new, Settings):
            yield from differing(old, new, f"{prefix}{name}.")
        elif _are_settings(old) and _are_settings(new) and len(old) == len(new):
            for i, (before, now) in enumerate(zip(old, new, strict=True)):
                yield from differing(before, now, f"{prefix}{name}.{i}.")
        elif old != new and (role is None or (role == "pin" and old is not None)):
            yield f"{prefix}{name}", old, new


def _are_settings(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, Settings) for each in value)
