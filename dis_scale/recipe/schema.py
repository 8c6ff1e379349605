"""The recipe's JSON schema, for editors: the types of this folder, with their docstrings, and the short forms of reading.py.

`configs/schema.json` is this schema. It does not check what crosses parts of a recipe: reading one does.
"""

from typing import Any

from dis_scale.models import families
from dis_scale.recipe import Recipe
from dis_scale.recipe.models import model_classes
from dis_scale.recipe.train import Cooldowns

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


def json_schema() -> dict[str, Any]:
    """Return the schema of a recipe as it is written in YAML (JSON Schema, draft 2020-12)."""
    schema = Recipe.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        for value in part["properties"].values():
            _describe(value)
    _add_short_forms(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _add_short_forms(schema: dict[str, Any]) -> None:
    """Allow what reading.py writes out: presets, seeds, cooldowns, `evaluate: none`, and image counts that a study computes."""
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
    parts["Train"]["properties"]["cooldowns"] = Cooldowns.model_json_schema()
    parts["Train"]["required"].remove("publish_images")
    evaluate = schema["properties"]["evaluate"]
    evaluate["anyOf"] = [{"$ref": evaluate.pop("$ref")}, {"const": "none"}]


def _of_any(backbones: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that some backbone has: each is valid if it is for one of them."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for part in backbones:
        for name, value in part["properties"].items():
            if value not in kinds.setdefault(name, []):
                kinds[name].append(value)
    return {name: values[0] if len(values) == 1 else {"anyOf": values} for name, values in kinds.items() if name != "kind"}


def _describe(value: dict[str, Any]) -> None:
    """Add a field's role to the docstring in its schema, and drop its generated title."""
    value.pop("title", None)
    words = " ".join(f"{value.get('description', '')} {ROLES.get(value.pop('role', ''), '')}".split())
    if words:
        value["description"] = words
