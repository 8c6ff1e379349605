"""Commands that show, compare and describe recipes; they start nothing."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dis_scale.cli.shared import AsJson, Overrides, SourceImages, load_recipe, show, source_images
from dis_scale.process import tables
from dis_scale.process.errors import DisScaleError, counted

if TYPE_CHECKING:
    from dis_scale.planning.plan import ModelNumbers, Numbers
    from dis_scale.recipe import Recipe

RecipeOrSweep = Annotated[str, typer.Argument(help="A recipe, the name of a shipped one, or a sweep's folder.")]


def show_recipe(
    recipe: RecipeOrSweep, overrides: Overrides = None, images: SourceImages = None, *, as_json: AsJson = False
) -> None:
    """Show every setting with its value, and all numbers that follow."""
    from dis_scale.recipe import flat

    settings = _open(recipe, overrides)
    numbers, unknown = None, ""
    try:
        numbers = _derived(settings, images)
    except DisScaleError as error:
        unknown = str(error)
    words = (f"{each.key}: {each.words}{'' if each.given else '  # default'}" for each in flat.flatten(settings))
    follows = [*_lines(settings, numbers), _table(numbers.models)] if numbers else [f"\nunknown  {unknown}"]
    document = {"settings": settings.model_dump(mode="json"), "derived": numbers and asdict(numbers), "unknown": unknown}
    show(document, *words, *follows, as_json=as_json)


def diff(a: RecipeOrSweep, b: RecipeOrSweep, *, as_json: AsJson = False) -> None:
    """Show the settings in which two recipes differ."""
    from dis_scale.recipe import flat

    found = flat.differences(_open(a), _open(b))
    table = Table("setting", a, b)
    for each in found:
        table.add_row(each.key, *("-" if value is None else value for value in (each.a, each.b)))
    show([each._asdict() for each in found], table if found else "equal    no setting differs", as_json=as_json)


def shipped(*, as_json: AsJson = False) -> None:
    """List the recipes that come with the package; their names are recipes for all commands."""
    from dis_scale.recipe import shipped as recipes

    purposes = {name: recipes.purpose(name) for name in recipes.names()}
    document = [{"name": name, "path": str(recipes.resolve(name)), "purpose": words} for name, words in purposes.items()]
    width = max(map(len, purposes), default=0) + 2
    show(document, *(f"{name:<{width}}{words}" for name, words in purposes.items()), as_json=as_json)


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from dis_scale.recipe.schema import json_schema

    show(as_json=True, document=json_schema())


def _open(url: str, overrides: list[str] | None = None) -> "Recipe":
    """Return the recipe in a file, or that of a sweep's folder; any other folder does not hide a shipped recipe of its name."""
    if "://" not in url and not Path(url).is_dir():
        return load_recipe(url, overrides)

    from dis_scale.recipe import reading
    from dis_scale.recipe import shipped as recipes
    from dis_scale.sweep import RECIPE, Sweep

    if url in recipes.names() and not Path(url, RECIPE).is_file():
        return load_recipe(url, overrides)
    stored = Sweep.open(url)
    return reading.parse(reading.dump(stored.recipe), f"{stored}/{RECIPE}", overrides, stored=True)


def _derived(recipe: "Recipe", images: int | None) -> "Numbers":
    """Return the numbers that follow from a recipe; without epochs if the source cannot be listed."""
    from dis_scale.planning import isoflop
    from dis_scale.planning.plan import derive

    return derive(isoflop.price(recipe), *source_images(recipe, images))


def _lines(recipe: "Recipe", numbers: "Numbers") -> list[str]:
    """Return the numbers that hold for all models, a line each."""
    train, (channels, size) = recipe.train, numbers.latent
    source = numbers.source_unknown
    if numbers.latent_bytes:
        source = f"{numbers.source_images:,} images, {numbers.latent_bytes / 1e9:,.2f} GB of latents"
    sizes = ", ".join(map(str, numbers.world_sizes))
    return [
        "",
        f"latent   {channels}x{size}x{size}",
        f"source   {source}",
        f"batch    {train.batch_images:,} = {counted(train.lanes, 'lane')} x {numbers.lane_images}; world sizes {sizes}",
        f"evaluate {numbers.metric}; {counted(numbers.evaluations, 'evaluation')} of {recipe.evaluate.samples:,} samples in "
        f"{counted(numbers.blocks, 'block')}",
    ]


def _table(models: "dict[str, ModelNumbers]") -> Table:
    table = tables.table("model", "tokens", "parameters", "Gflops", "images", "steps", "epochs", "steps between resume points")
    for name, each in models.items():
        epochs = "" if each.epochs is None else f"{each.epochs:,.4g}"
        table.add_row(
            name, f"{each.tokens:,}", f"{each.parameters:,}", f"{each.gmacs_forward:.4g}", f"{each.images:,}",
            f"{each.steps:,}", epochs, f"{each.steps_between_resume_points:,}",
        )  # fmt: skip
    return table
