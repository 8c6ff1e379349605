"""One published checkpoint drawn with other values of one setting: guidance, or the average's width, against distance.

Runs as a Ray job, as every stage does; each value is kept as a variant, so that given again it does what is left.
"""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dis_scale import sweep as sweeps
from dis_scale.errors import UserError
from dis_scale.evaluation import results
from dis_scale.evaluation.results import Drawn
from dis_scale.plan import Plan
from dis_scale.progress import Board
from dis_scale.recipe import Recipe
from dis_scale.report import figures
from dis_scale.report.tables import csv_bytes, with_error
from dis_scale.storage.folder import Folder
from dis_scale.training import checkpoint, ema
from dis_scale.training.ema import Snapshot
from pipelines import jobs

GUIDANCE, WIDTH = "guidance", "ema_width"
"""The settings that can be varied, as the recipe calls them."""
MOST_MISFIT = 0.25
"""How far a rebuilt average's profile may be from the one that its width names."""


def vary(
    sweep: Folder, plan: Plan, model: str, images: int | None, setting: str, values: Sequence[float], console: Console
) -> None:
    """Draws what is missing, then puts table and figure below `report/`; UserError for what cannot be drawn."""
    at, values = _published(sweep, plan.recipe, model, images), sorted({float(f"{value:g}") for value in values})
    _require_drawable(sweep, plan.recipe, model, at, setting, values)
    with Board(console) as board:
        running = sweeps.Sweep(plan.recipe, sweep, plan, board)
        with sweeps.obeying_signals(running), jobs.cluster(plan.recipe) as cluster:
            sweeps.run_stage(running, cluster, "vary", model, str(at), setting, *(f"{value:g}" for value in values))
    _report(sweep, plan.recipe, model, at, setting, values, console)


def _published(sweep: Folder, recipe: Recipe, model: str, images: int | None) -> int:
    if model not in recipe.models:
        raise UserError(f"{sweep} has no model {model!r}: it has {', '.join(recipe.models)}")
    counts = checkpoint.published(sweep / "runs" / model)
    if not counts or (images is not None and images not in counts):
        wanted = "anything" if images is None else f"{images:,} images"
        raise UserError(f"{model} has not published {wanted}: published are {', '.join(map(str, counts)) or 'none'}")
    return counts[-1] if images is None else images


def _require_drawable(
    sweep: Folder, recipe: Recipe, model: str, images: int, setting: str, values: Sequence[float]
) -> None:
    known = checkpoint.snapshots(sweep / "runs" / model, images, recipe.train)
    if setting == WIDTH and recipe.train.power_ema is None:
        raise UserError(
            "the sweep tracked no power-function averages: train.power_ema names none, so no width can be rebuilt"
        )
    for value in values:
        if not 0 <= value < math.inf:
            raise UserError(f"{setting} {value:g}: expected 0 or more")
        misfit = (
            ema.misfit(known, Snapshot(images // recipe.train.batch_images, value)) if setting == WIDTH and known else 0
        )
        if misfit > MOST_MISFIT:
            raise UserError(
                f"width {value:g}: from the {len(known)} averages published so far it can be rebuilt to within {misfit:.0%} only "
                f"(expected {MOST_MISFIT:.0%}): choose one nearer to {recipe.train.power_ema}, or publish more often"
            )


def _report(
    sweep: Folder, recipe: Recipe, model: str, images: int, setting: str, values: Sequence[float], console: Console
) -> None:
    metric, found = recipe.evaluate.metric, list[dict[str, float]]()
    for variant in results.varied(recipe.evaluate, setting, values):
        found.append(results.folder(sweep, Drawn(model, images, variant)).read_json(results.METRICS)["values"])
    title = f"{model} after {images:,} images: {metric}"
    distances, errors = [f[metric] for f in found], [f.get(f"{metric}_error") for f in found]
    name = f"{setting.replace('_', '-')}-{model}-{checkpoint.images_name(images)}"
    drawing = figures.curve(title, metric, setting, values, distances, [error or 0.0 for error in errors])
    files = {f"{name}.{ending}": data for ending, data in figures.render(drawing).items()}
    for file, data in (files | {f"{name}.csv": _csv(setting, values, found)}).items():
        (sweep / "report").write(file, data)
    console.print(title, highlight=False)
    out = Table()
    for column in (setting, metric):
        out.add_column(column, justify="right")
    for value, distance, error in zip(values, distances, errors, strict=True):
        best = "bold" if distance == min(distances) else ""
        out.add_row(f"{value:g}", with_error(distance, error), style=best)
    console.print(out)
    console.print(f"figure   {sweep}/report/{name}.png", highlight=False, soft_wrap=True)


def _csv(setting: str, values: Sequence[float], found: Sequence[dict[str, float]]) -> bytes:
    names = list(dict.fromkeys(name for each in found for name in each))
    rows = ([value, *(each.get(name, "") for name in names)] for value, each in zip(values, found, strict=True))
    return csv_bytes([setting, *names], rows)
