"""The page of all settings, from the recipe's types: name, type, default, whether it may change, meaning."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

from dis_scale.process.settings import Settings
from dis_scale.recipe import Evaluate, ModelTrain, Recipe, Train, Variant
from dis_scale.recipe.identity import as_yaml
from docs.reference.markdown import code, subclasses, table

INTRODUCTION = """# Settings

All settings of a recipe, generated from `dis_scale/recipe/`. A recipe is a YAML file; `--set a.b=value` overrides one setting.
`dis-scale recipe show RECIPE` prints each setting of a recipe with its value, and all numbers that follow.

The column *may change* is about a sweep that has begun. A change that is not allowed is refused with the difference, exit code 2.

| may change | |
|---|---|
| no | part of the sweep's identity: another value needs another `name` |
| yes | may change at each start |
| may grow | more may be added; see [I want to change something](operations.md#i-want-to-change-something) |
| may be added | may be set once, and may not change after that |

A list of sections (`evaluate.also`) is compared as one value. Short forms that a recipe may have: `preset`, `seeds` and
`train.cooldowns`; see [the backbones](models.md#a-models-own-training). `evaluate: none` is short for 40
samples of each checkpoint to look at, in 25 steps of DPM-Solver++ or, of a flow, of Heun, with the loss on
`data.held_out_images`, which must be set, as the curve.
"""
AS_IN: dict[type[Settings], type[Settings]] = {ModelTrain: Train, Variant: Evaluate}
"""Sections whose settings replace those of another section, and mean the same."""
MAY_CHANGE = {None: "no", "runtime": "yes", "extent": "may grow", "pin": "may be added"}


def page() -> str:
    """Return the page in Markdown."""
    return "\n\n".join([INTRODUCTION, *(_section(path, part) for path, part in parts())])


def parts() -> Iterator[tuple[str, type[Settings]]]:
    """Yield each class of settings once, with the key under which a recipe has it; a kind of several is `key (kind)`."""
    yield "", Recipe
    yield from _below("", Recipe, {Recipe.__name__})


def _below(path: str, part: type[Settings], seen: set[str]) -> Iterator[tuple[str, type[Settings]]]:
    classes = {cls.__name__: cls for cls in subclasses(Settings)}
    for name, value in _properties(part).items():
        for inner in _references(value):
            if inner in seen:
                continue
            seen.add(inner)
            key = f"{path}{name}.NAME" if name in ("models", "variants") else f"{path}{name}"
            yield key, classes[inner]
            yield from _below(f"{key}.", classes[inner], seen)


def _properties(part: type[Settings]) -> dict[str, Any]:
    properties: dict[str, Any] = part.model_json_schema(ref_template="{model}")["properties"]
    return properties


def _references(value: Any) -> list[str]:
    """Return the classes that a schema names, in order."""
    if isinstance(value, list):
        return [name for each in value for name in _references(each)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if "$ref" in value else []
    return own + [name for key, each in value.items() if key != "discriminator" for name in _references(each)]


def title(path: str, part: type[Settings]) -> str:
    """Return a section's heading: its key in a recipe, and its kind if there are several."""
    kind = _properties(part).get("kind", {}).get("const")
    return (path or "The recipe") + (f" (kind: {kind})" if kind else "")


def _section(path: str, part: type[Settings]) -> str:
    heading = f"## {title(path, part)} <a id='{part.__name__.lower()}'></a>"
    purpose = inspect.cleandoc(part.__doc__ or "")
    rows = list(_rows(part))
    columns = ("setting", "type", "default", "may change", "meaning")
    return "\n\n".join([heading, purpose, *([table(columns, rows)] if rows else [])])


def _rows(part: type[Settings]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each setting; those of a section that is a setting have their own default and role there."""
    for name, value in _properties(part).items():
        field = part.model_fields[name]
        if name == "kind":
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        references, role = _references(value), value.get("role")
        section = bool(references) and value.get("type") != "array"
        words = "required" if field.is_required() else "" if isinstance(default, Settings) else code(as_yaml(default))
        change = "" if section and not role else MAY_CHANGE[role]
        yield code(name), _type(value), words, change, _words(part, name) or _purpose(references)


def _words(part: type[Settings], name: str) -> str | None:
    """Return a setting's docstring, or that of the setting which it replaces."""
    replaced = AS_IN.get(part, part).model_fields.get(name)
    return part.model_fields[name].description or (replaced and replaced.description)


def _purpose(references: list[str]) -> str:
    """Return what a section is for, if there is only one."""
    classes = {cls.__name__: cls for cls in subclasses(Settings)}
    return inspect.cleandoc(classes[references[0]].__doc__ or "").partition("\n\n")[0] if len(references) == 1 else ""


def _type(value: dict[str, Any]) -> str:
    """Return a schema's type in words."""
    if "$ref" in value:
        return f"[{value['$ref']}](#{value['$ref'].lower()})"
    if "const" in value or "enum" in value:
        return ", ".join(code(json.dumps(each).strip('"')) for each in value.get("enum", [value.get("const")]))
    if kinds := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(each) for each in kinds))
    match value.get("type"):
        case "array" if "prefixItems" in value:
            return f"list of {len(value['prefixItems'])}: {_type(value['prefixItems'][-1])}"
        case "array":
            return f"list of {_type(value['items'])}"
        case "object":
            inner = value.get("patternProperties", {"": value.get("additionalProperties")})
            return f"by name: {_type(next(iter(inner.values())))}"
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case kind:
            return f"{kind}{_limits(value)}"


def _limits(value: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "multipleOf": "multiple of"}
    limits = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value]
    return f" {', '.join(limits)}" if limits else ""
