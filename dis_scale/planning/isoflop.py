"""A study of compute budgets (IsoFLOP): image counts of each size from its cost, and the study's price.

The stored recipe has its trunks and branches written out. Read next: recipe/isoflop.py, report/isoflop.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from dis_scale import vae
from dis_scale.planning.plan import Plan, price_sweep
from dis_scale.process import tables
from dis_scale.process.errors import UserError
from dis_scale.recipe import MODEL_NAME_CHARACTERS, LatentShape, Recipe, reading


class Cell(NamedTuple):
    """One size at one budget; `refusal` gives the reason if it is left out."""

    size: str
    budget: float
    images: int
    steps: int
    refusal: str | None


def cells(plan: Plan) -> list[Cell]:
    """Return each size of a study that is not yet written out, at each budget; none for any other recipe."""
    study = plan.recipe.isoflop
    return [_cell(plan, size, budget) for size in plan.recipe.uncounted for budget in (study.flops if study else ())]


def _cell(plan: Plan, size: str, budget: float) -> Cell:
    """Return one size at one budget, in complete steps."""
    study, train = plan.recipe.isoflop, plan.recipe.train_of(size)
    assert study
    steps = round(budget / plan.training_flops(size) / train.batch_images)
    images, refusal = steps * train.batch_images, None
    if steps < study.least_steps:
        refusal = f"under {study.least_steps:,} steps"
    elif study.most_images is not None and images > study.most_images:
        refusal = f"over {study.most_images:,} images"
    return Cell(size, budget, images, steps, refusal)


def price(recipe: Recipe) -> Plan:
    """Return the plan of a recipe, with its study written out; UserError for one that cannot be trained."""
    shape = vae.planned_shape(recipe.vae, recipe.data.resolution)
    return price_sweep(written_out(recipe, shape), shape)


def written_out(recipe: Recipe, shape: LatentShape) -> Recipe:
    """Return the recipe with a trunk for each size of its study, and a branch for each budget; itself without a study.

    UserError for a size without a budget, and for a budget without a size.
    """
    if recipe.isoflop is None:
        return recipe
    data, share = recipe.model_dump(mode="json"), recipe.isoflop.share
    trained = [cell for cell in cells(price_sweep(recipe, shape)) if not cell.refusal]
    for size in recipe.uncounted:
        counts = [cell.images for cell in trained if cell.size == size]
        if not counts:
            raise UserError(
                f"isoflop: {size} has no budget within its limits: change least_steps ({recipe.isoflop.least_steps:,}), "
                f"most_images ({recipe.isoflop.most_images}) or flops, or remove the model"
            )
        if recipe.train_of(size).warmup_images:
            raise UserError(f"models.{size}: warmup_images follows from isoflop.warmup in a study: remove it")
        warmup = {"warmup_images": round(recipe.isoflop.warmup * min(counts))}
        model = data["models"][size] | {"train": data["models"][size]["train"] | warmup}
        branches = dict(_branch(recipe, cell, model, share) for cell in trained if cell.size == size)
        if len(branches) < len(counts):
            raise UserError(
                f"isoflop.flops: two budgets give {size} the same number of images, one of {sorted(counts)}: they are less than "
                "a step apart"
            )
        if clash := sorted(branches.keys() & data["models"].keys()):
            raise UserError(f"isoflop: models.{clash[0]} is also the name of a branch of {size}: give it another name")
        longest = max(branch["branch"]["at"] for branch in branches.values())
        data["models"][size] = model | {"train": model["train"] | {"publish_images": [longest]}}
        data["models"] |= branches
    complete = reading.parse(reading.written(data), "isoflop")
    _require_every_budget(complete)
    return complete


def _branch(recipe: Recipe, cell: Cell, model: dict[str, Any], share: float) -> tuple[str, dict[str, Any]]:
    """Return name and settings of the branch of a cell; UserError if it has no valid name, or no step before it."""
    batch = recipe.train_of(cell.size).batch_images
    name, branch = reading.cooldown(cell.size, model, cell.images, share, batch)
    if len(name) > MODEL_NAME_CHARACTERS:
        raise UserError(
            f"models.{cell.size}: its branch would be called {name}: expected at most {MODEL_NAME_CHARACTERS} characters: "
            "shorten the model's name"
        )
    if not branch["branch"]["at"]:
        raise UserError(f"isoflop.share: {share:g} leaves {cell.size} no step at the constant rate: set it lower")
    return name, branch | {"branch": branch["branch"] | {"budget": cell.budget}}


def _require_every_budget(recipe: Recipe) -> None:
    study, trained = recipe.isoflop, set(recipe.budgets.values())
    assert study
    if empty := [f"{budget:g}" for budget in study.flops if budget not in trained]:
        raise UserError(
            f"isoflop.flops: no model is trained for {', '.join(empty)}: expected models without publish_images, whose limits "
            "(least_steps, most_images) allow it; a new budget needs the recipe's file, not the stored one"
        )


def table(plan: Plan, study: Sequence[Cell], source_images: int | None) -> Table:
    """Return images, steps and epochs of each size at each budget, and what the cooldowns save.

    `plan` is that of the written-out recipe. Epochs are left out if the number of the source's images is unknown.
    """
    epoch_images = source_images and source_images - plan.recipe.data.held_out_images
    spent = sum(plan.own_flops(name) for name in plan.costs if name in {cell.size for cell in study})
    spent += sum(plan.own_flops(name) for name in plan.recipe.budgets)
    complete = sum(cell.images * plan.training_flops(cell.size) for cell in study if not cell.refusal)
    out = tables.table(
        "size", "parameters", "FLOPs per image", *(f"{budget:g}" for budget in dict.fromkeys(cell.budget for cell in study)),
        left=("size",),
        title=f"study of {plan.recipe.name}: images, steps and epochs at each budget (FLOPs, two for each multiply-add)",
        caption=f"{spent:.3g} FLOPs in all; complete trainings for each budget: {complete:.3g}",
    )  # fmt: skip
    for size in dict.fromkeys(cell.size for cell in study):
        words = [_words(cell, epoch_images) for cell in study if cell.size == size]
        out.add_row(size, f"{plan.costs[size].parameters:,}", f"{plan.training_flops(size):.3g}", *words)
    return out


def _words(cell: Cell, epoch_images: int | None) -> str:
    if cell.refusal:
        return f"left out:\n{cell.refusal}"
    epochs = f"\n{cell.images / epoch_images:.3g} epochs" if epoch_images else ""
    return f"{cell.images:,} images\n{cell.steps:,} steps{epochs}"
