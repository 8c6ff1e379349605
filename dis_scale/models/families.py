"""The families of backbones that exist, by the `kind` of their settings; the only list of the built-in ones."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from dis_scale.models import diffussm, dis, dit
from dis_scale.models.family import Family
from dis_scale.process.errors import UserError, nearest


@cache
def known() -> Mapping[str, Family]:
    """Return all families by kind, the default one first."""
    return {family.kind: family for family in (dis.FAMILY, diffussm.FAMILY, dit.FAMILY)}


def default() -> Family:
    """Return the family that a first recipe trains."""
    return next(iter(known().values()))


def find(kind: str) -> Family:
    """Return a family; UserError with the nearest name for an unknown one."""
    if kind not in known():
        raise UserError(f"unknown kind of model {kind!r}{nearest(kind, known())}; known: {', '.join(known())}")
    return known()[kind]


def presets() -> dict[str, dict[str, Any]]:
    """Return the settings of each published size, `kind` included."""
    return {name: {"kind": kind, **sizes} for kind, family in known().items() for name, sizes in family.presets.items()}


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a published size; UserError with the nearest name for an unknown one."""
    sizes = presets()
    if name not in sizes:
        raise UserError(f"unknown preset {name!r}{nearest(name, sizes)}; known: {', '.join(sizes)}")
    return sizes[name]
