"""A recipe as a flat list: every setting by its complete key, such as `train.learning_rate`. Read next: identity.py."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dis_scale.process.settings import Settings
from dis_scale.recipe import Recipe
from dis_scale.recipe.identity import as_yaml


class Setting(NamedTuple):
    """A setting: its key, its value as JSON has it, and whether the recipe gives it; otherwise it is a default."""

    key: str
    value: Any
    given: bool

    @property
    def words(self) -> str:
        """The value as a recipe has it."""
        return as_yaml(self.value)


class Differing(NamedTuple):
    """A setting whose value differs, as a recipe has it; None if a recipe has no such setting."""

    key: str
    a: str | None
    b: str | None


def flatten(recipe: Recipe) -> list[Setting]:
    """Return all settings in the types' order. A model's own training has only those that it gives."""
    return list(_flat(recipe, recipe.model_dump(mode="json"), "", given=True))


def differences(a: Recipe, b: Recipe) -> list[Differing]:
    """Return the settings in which two recipes differ, whether they may change under one name or not."""
    first, second = ({each.key: each for each in flatten(recipe)} for recipe in (a, b))
    keys = dict.fromkeys([*first, *second])
    values = {key: tuple(recipe[key].value if key in recipe else None for recipe in (first, second)) for key in keys}
    return [
        Differing(key, *(recipe[key].words if key in recipe else None for recipe in (first, second)))
        for key in keys
        if (key in first) != (key in second) or values[key][0] != values[key][1]
    ]


def _flat(part: Any, dumped: Any, key: str, *, given: bool) -> Iterator[Setting]:
    """Yield the settings of a part; `dumped` is the part as JSON has it, which leaves out what a part's serializer does."""
    if isinstance(part, Settings):
        inner = {name: getattr(part, name) for name in type(part).model_fields if name in dumped}
        known = part.model_fields_set if given else set()
    elif isinstance(part, dict) and part:
        inner, known = part, set(part) if given else set()
    else:
        yield Setting(key, dumped, given)
        return
    for name, value in inner.items():
        yield from _flat(value, dumped[name], f"{key}.{name}" if key else name, given=name in known)
