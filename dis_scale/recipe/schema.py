"""The recipe's JSON schema, for editors: the types of this folder, with their docstrings, and the short forms of reading.py.

`configs/schema.json` is this schema. It does not check what crosses parts of a recipe: reading one does.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dis_scale.models import families
from dis_scale.process.settings import Settings
from dis_scale.recipe import Recipe
from dis_scale.recipe.models import model_classes

ROLES = {
    "runtime": "May change between two starts of a sweep.",
    "extent": "May grow between two starts of a sweep.",
    "pin": "May be added to a sweep, and may not change after that.",
}
"""What a field's role means; a field without a role may not change under one name."""
SEEDS = {
    "type": "integer", "minimum": 1,
    "description": "Number of trainings: this model, and copies with the next seeds, `<name>-seed-1` and so on.",
}  # fmt: skip
COOLDOWNS = {
    "type": "object",
    "description": "A branch of each model for each of these image counts, whose last share is trained at a falling rate.",
    "properties": {
        "images": {"type": "array", "items": {"type": "integer", "minimum": 1}},
        "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "default": 0.2},
    },
    "required": ["images"],
    "additionalProperties": False,
}  # fmt: skip


def json_schema() -> dict[str, Any]:
    """Return the schema of a recipe as it is written in YAML (JSON Schema, draft 2020-12)."""
    schema = Recipe.model_json_schema()
    named = {"Recipe", *schema["$defs"]}
    described = {cls.__name__: dict(docstrings(cls)) for cls in subclasses(Settings) if cls.__name__ in named}
    for name, part in [("Recipe", schema), *schema["$defs"].items()]:
        for field, value in part["properties"].items():
            _describe(value, described[name].get(field, ""))
    _add_short_forms(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _add_short_forms(schema: dict[str, Any]) -> None:
    """Allow what reading.py writes out: presets, seeds, cooldowns, and image counts that a study computes."""
    parts = schema["$defs"]
    backbones = [parts[cls.__name__] for cls in model_classes()]
    for part in backbones:
        part["properties"]["seeds"] = SEEDS
    presets = {"enum": list(families.presets()), "description": "Name of a published size."}
    parts["Preset"] = {
        "type": "object",
        "description": "A published size, and settings that replace or add to those of the size.",
        "properties": {"preset": presets} | _of_any(backbones),
        "required": ["preset"],
        "additionalProperties": False,
    }  # fmt: skip
    models = schema["properties"]["models"]
    ((pattern, kinds),) = models.pop("patternProperties").items()
    kinds.pop("discriminator")
    kinds["oneOf"].append({"$ref": "#/$defs/Preset"})
    models |= {"patternProperties": {pattern: kinds}, "additionalProperties": False}
    parts["Train"]["properties"]["cooldowns"] = COOLDOWNS
    parts["Train"]["required"].remove("publish_images")


def _of_any(backbones: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that some backbone has: each is valid if it is for one of them."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for part in backbones:
        for name, value in part["properties"].items():
            if value not in kinds.setdefault(name, []):
                kinds[name].append(value)
    return {
        name: values[0] if len(values) == 1 else {"anyOf": values} for name, values in kinds.items() if name != "kind"
    }


def _describe(value: dict[str, Any], words: str) -> None:
    """Put a field's docstring and role into its schema, in place of its generated title."""
    value.pop("title", None)
    words = " ".join(f"{words} {ROLES.get(value.pop('role', ''), '')}".split())
    if words:
        value["description"] = words


def docstrings(cls: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield each field that has a docstring, with the docstrings of its base classes."""
    for base in reversed(cls.__mro__):
        if issubclass(base, Settings) and inspect.get_annotations(base):  # a composed class has no source
            try:
                source = inspect.getsource(base)
            except OSError:  # of a family in a file, which is no module that Python can find again
                continue
            (tree,) = ast.parse(textwrap.dedent(source)).body
            assert isinstance(tree, ast.ClassDef)
            for field, after in zip(tree.body, tree.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and (words := _string(after)):
                    yield ast.unparse(field.target), words


def _string(node: ast.stmt) -> str | None:
    """Return the text of a statement that is a string."""
    constant = node.value if isinstance(node, ast.Expr) else None
    return constant.value if isinstance(constant, ast.Constant) and isinstance(constant.value, str) else None


def subclasses(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield all subclasses, at any depth."""
    for inner in cls.__subclasses__():
        yield inner
        yield from subclasses(inner)
