"""Sweeps with evaluations, for the tests of this folder."""

from pathlib import Path

import pytest

from dis_scale.recipe import Recipe
from dis_scale.sweep import Sampled, Sweep
from dis_scale.sweep.documents import Ended, FloorMetrics, Skipped
from tests.support.evaluations import put, sweep_at


@pytest.fixture
def recipe(tiny: Recipe) -> Recipe:
    """The tiny recipe with three sizes of DiS, and a variant."""
    text = tiny.model_dump(mode="json")
    text["models"] |= {f"dis{width}": text["models"]["dis"] | {"width": width} for width in (32, 64, 128)}
    text["evaluate"]["variants"] = {"plain": {"guidance": 1.0}}
    return Recipe.model_validate(text, strict=False)


@pytest.fixture
def sweep(tmp_path: Path, recipe: Recipe) -> Sweep:
    made = sweep_at(tmp_path, "tiny", recipe)
    for model, images, distance in [
        ("dis", 0, 90.0),
        ("dis", 160, 9.0),
        ("dis32", 160, 6.0),
        ("dis64", 160, 5.0),
        ("dis128", 160, 4.5),
    ]:
        put(made, Sampled(model, images), distance)
    put(made, Sampled("dis", 160, "plain"), 12.0)
    Ended(why="a worker was lost 4 times").write(made.run("dit").folder)
    floor = {kind: {recipe.evaluate.metric: value} for kind, value in (("reconstructed", 0.75), ("real", 0.25))}
    FloorMetrics(images=60, values=floor).write(made.floor)
    Skipped(why="weights.safetensors: damaged").write(made.evaluation(Sampled("dis", 320)))
    return made
