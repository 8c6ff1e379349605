"""The command that prices a sweep; it starts nothing."""

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from dis_scale.cli.shared import AsJson, Overrides, RecipePath, SourceImages, console, load_recipe, show, source_images, working
from dis_scale.process.errors import UserError, nearest
from dis_scale.process.tables import narrow_table

if TYPE_CHECKING:
    from dis_scale.planning.fleet import Fleet
    from dis_scale.planning.plan import FleetForecast
    from dis_scale.recipe import Recipe

SOURCES = (
    "measured: memory of training steps, on a CPU within 10 %, on one H200 0.93 to 1.03 of this. "
    "Computed: all else, from the GPU's datasheet and what is assumed; one H200 reached a share of the peak of 0.187 with DiS-L/2."
)


def plan(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    images: SourceImages = None,
    gpu: Annotated[str | None, typer.Option(help="Forecast on GPUs: a100-40, a100, h100 or h200.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Number of GPUs; default: the recipe's workers.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a GPU for an hour.")] = None,
    preemptions_per_day: Annotated[float | None, typer.Option(min=0, help="Of these GPUs together.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the GPU's peak that is reached; assumed by default.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show what a sweep will cost, and start nothing."""
    settings = load_recipe(recipe, overrides)
    given = {"count": count, "price": price, "preemptions_per_day": preemptions_per_day, "mfu": mfu}
    fleet = _fleet(settings, gpu, {name: value for name, value in given.items() if value is not None})

    from dis_scale.planning import isoflop
    from dis_scale.planning.plan import derive, on_fleet, price_reading, price_sweep, table

    with working("plan: computing"):
        priced = isoflop.price(settings)
        study = isoflop.cells(price_sweep(settings, priced.shape))
        forecast = on_fleet(priced, fleet) if fleet else None
    if not as_json:
        console().print(table(priced))
    source, unknown = source_images(settings, images)
    numbers = json.dumps(asdict(forecast)) if forecast else "null"
    document = {
        "recipe": settings.name,
        "plan": asdict(derive(priced, source, unknown)),
        "source_unknown": unknown,
        "fleet": json.loads(numbers, parse_constant=lambda _: None),  # JSON has no infinite numbers
        "study": [cell._asdict() for cell in study],
    }
    show(
        document,
        f"data     {price_reading(settings, priced.shape, source)}" if source else f"data     unknown: {unknown}",
        *([isoflop.table(priced, study, source)] if study else []),
        *(_forecast(forecast, priced.recipe) if forecast else []),
        as_json=as_json,
    )


def _fleet(recipe: "Recipe", gpu: str | None, given: dict[str, Any]) -> "Fleet | None":
    """Return the fleet of the options; None without one. UserError for an unknown GPU, or options that need one."""
    if gpu is None:
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} needs a GPU: add --gpu h100, for example")
        return None

    from dis_scale.planning.fleet import GPUS, Fleet

    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: unknown{nearest(gpu, GPUS)}; known: {', '.join(GPUS)}")
    if not 0 < given.get("mfu", 1) <= 1:
        raise UserError(f"--mfu {given['mfu']:g}: expected a share, over 0 and at most 1")
    return replace(Fleet(gpu, recipe.train.most_workers), **given)


def _forecast(forecast: "FleetForecast", recipe: "Recipe") -> list[RenderableType]:
    from dis_scale.planning.fleet import GPUS, GRAPHS_HOST_S, HOST_S, OPTIMIZER_BYTES, STEP_S

    fleet, gpu = forecast.assumed, GPUS[forecast.assumed.gpu]
    assumed = (
        f"\nfleet    {fleet.count:,} x {fleet.gpu}; assumed: MFU {fleet.mfu:.0%}, {gpu.node_gb_s:g} GB/s within a node, "
        f"{gpu.network_gb_s:g} GB/s between nodes, "
        f"{fleet.host_gb_s:g} GB/s to the host, {1e3 * HOST_S:g} ms of Python a block and pass, {1e3 * GRAPHS_HOST_S:g} by graphs, "
        f"{1e3 * STEP_S:g} ms and {OPTIMIZER_BYTES} bytes a parameter for the optimizer, "
        f"{fleet.storage_gb_s:g} GB/s a worker to storage, {fleet.restart_s:g} s to restart, "
        f"{fleet.preemptions_per_day:g} preemptions a day\nfigures  {SOURCES}"
    )
    return [assumed, _memory(forecast, recipe), _training(forecast), _sizes(forecast)]


def _memory(forecast: "FleetForecast", recipe: "Recipe") -> Table:
    from dis_scale.planning.fleet import pass_images

    models, usable = forecast.models, forecast.usable_bytes
    images = {pass_images(recipe.train_of(name), each.gpus) for name, each in models.items()}
    table = narrow_table(
        "model",
        *(each.replace("ZeRO ", "Z").replace(",", "\n") for each in next(iter(models.values())).memory_bytes),
        "most images\nas set",
        title=f"GiB of a worker by ZeRO stage and checkpointing, {' to '.join(map(str, sorted({min(images), max(images)})))} "
        f"images in a forward pass; * is over the usable {usable / 2**30:.1f}",
    )
    for name, each in models.items():
        sizes = (f"{size / 2**30:.1f}{'*' if size > usable else ''}" for size in each.memory_bytes.values())
        table.add_row(name, *sizes, f"{each.micro_images:,}")
    return table


def _training(forecast: "FleetForecast") -> Table:
    table = narrow_table(
        "model", "GPUs", "sent\na step", "steps/s", "days", "GPU hours", "resume\npoint",
        "every,\nimages", "lost", "evaluation\nGPU hours", "stored", "price", title="training, by arithmetic",
    )  # fmt: skip
    for name, each in forecast.models.items():
        every_images = each.resume_every_images
        table.add_row(
            name, f"{each.gpus:,}{'' if each.fits else ' too small'}", f"{each.wire_bytes / 1e9:,.2f} GB",
            f"{each.steps_per_s:.3g}", _number(each.days), _number(each.training_gpu_hours),
            f"{each.resume_bytes / 1e9:,.2f} GB", f"{each.resume_every_s:,.0f} s,\n{every_images:,}" if every_images else "-",
            f"{each.loss:.1%}", _number(each.evaluation_gpu_hours), f"{each.stored_bytes / 1e9:,.1f} GB", _money(each.price),
        )  # fmt: skip
    return table


def _sizes(forecast: "FleetForecast") -> Table:
    sizes = "the sweep, by the number of GPUs"
    table = narrow_table("GPUs", "days", "GPU hours", "largest loss", "price", title=sizes)
    for each in forecast.by_gpus:
        table.add_row(
            f"{each.gpus:,}{'' if each.fits else ' too small'}", _number(each.days), _number(each.gpu_hours),
            f"{each.largest_loss:.1%}", _money(each.price),
        )  # fmt: skip
    return table


def _number(value: float) -> str:
    return "never" if value == math.inf else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _money(price: float | None) -> str:
    return "-" if price in (None, math.inf) else f"{price:,.2f}" if price < 100 else f"{price:,.0f}"
