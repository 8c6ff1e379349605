"""The JSON schema of recipes: that of the types, shipped beside the recipes, and valid for each of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dis_scale.recipe import Recipe, reading
from dis_scale.recipe.schema import json_schema
from tests.support.pages import SNIPPETS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {path.name: path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))} | SNIPPETS
SCHEMA = jsonschema.Draft202012Validator(json_schema())
SHORT_FORMS = """
models:
  a: {preset: DiS-S/2, init: official, seeds: 3, train: {learning_rate: 1e-3}}
  b: {preset: DiffuSSM-S, init: legs}
train: {batch_images: 8, lanes: 2, workers: 2..8, checkpointing: every_2, cooldowns: {images: [64]}}
data: {source: {kind: digits}, resolution: 32, num_classes: none}
evaluate: none
"""


def mistakes(text: str, keys: tuple[str, ...] = ()) -> list[str]:
    """Return the mistakes that the schema finds in YAML text; only those below `keys`, if any are given."""
    data = json.loads(json.dumps(yaml.load(text, reading._Loader)))
    found = SCHEMA.iter_errors(data)
    return [each.message for each in found if not keys or (each.path and each.path[0] in keys)]


def test_the_shipped_schema_is_that_of_the_types() -> None:
    """In a process of its own: families that other tests brought would be in it."""
    printed = subprocess.check_output([sys.executable, "-m", "dis_scale", "recipe", "schema"], text=True)
    assert (CONFIGS / "schema.json").read_text() == printed, "run: dis-scale recipe schema > configs/schema.json"


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_valid(name: str) -> None:
    assert mistakes(RECIPES[name]) == []


def test_each_shipped_recipe_names_the_schema() -> None:
    first = {path.name: path.read_text().splitlines()[0] for path in CONFIGS.glob("*.yaml")}
    assert set(first.values()) == {"# yaml-language-server: $schema=schema.json"}


def test_what_a_sweep_stores_is_valid(tiny: Recipe) -> None:
    assert mistakes(reading.dump(tiny)) == []


def test_short_forms_are_valid() -> None:
    assert mistakes(SHORT_FORMS, ("models", "train", "data", "evaluate")) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("preset: DiS-S/2", "preset: DiS-S"),
        ("seeds: 3", "seeds: 0"),
        ("init: official", "init: nothing"),
        ("learning_rate: 1e-3", "learning_rates: 1e-3"),
        ("workers: 2..8", "workers: many"),
        ("every_2", "every_1"),
        ("num_classes: none", "num_classes: null"),
        ("evaluate: none", "evaluate: nothing"),
        ("kind: digits", "kind: digit"),
        ("lanes: 2, ", ""),
    ],
)
def test_a_mistake_is_found(right: str, wrong: str) -> None:
    assert mistakes(SHORT_FORMS.replace(right, wrong), ("models", "train", "data", "evaluate"))


def described(schema: dict[str, Any], *path: str) -> str:
    for name in path:
        schema = schema[name]
    return str(schema["description"])


def test_docstrings_and_roles_are_the_descriptions() -> None:
    schema = json_schema()
    lanes = described(schema, "$defs", "Train", "properties", "lanes")
    assert lanes.startswith("Parts of equal size that the global batch always splits into")
    assert described(schema, "$defs", "Reader", "properties", "cache_gib").endswith("May change between two starts of a sweep.")
    assert described(schema, "$defs", "Dit", "properties", "seed").startswith("Seed of the initial weights")
