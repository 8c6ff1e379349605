"""Table, figure and CSV of an ablation: one checkpoint's metrics against the values of one sampling setting."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dis_scale.process import tables
from dis_scale.report import drawing, figures
from dis_scale.report.compare import paired_error
from dis_scale.report.tables import csv_bytes, with_error
from dis_scale.sweep import Sampled, Sweep, images_name, state
from dis_scale.sweep.documents import Metrics

ABOVE = "above_lowest"
"""Difference from the lowest distance; its error is smaller than those of both, since all values share labels and noise."""


def write(
    sweep: Sweep,
    model: str,
    images_seen: int,
    setting: str,
    values: Sequence[float],
    console: Console,
    guide: Sampled | None = None,
) -> dict[float, dict[str, float]]:
    """Write the figure and the CSV below `report/`, print the table, return the metrics; all values must be evaluated."""
    variants = state.ablations(sweep.recipe.evaluate, setting, values, guide)
    metric = sweep.recipe.evaluate.metric
    rows = _rows([Metrics.read(sweep.evaluation(Sampled(model, images_seen, v))) for v in variants], metric)
    by = f", guided by {guide.model} at {guide.images_seen:,}" if guide else ""
    title = f"{model} after {images_seen:,} images{by}: {metric}"
    distances, errors = [row[metric] for row in rows], [row.get(f"{metric}_error", float("nan")) for row in rows]
    name = f"{state.ablation_name(setting, guide)}-{model}-{images_name(images_seen)}"
    figure = figures.curve(sweep.recipe, model, setting, values, distances, errors)
    files = {f"{name}.{ending}": data for ending, data in drawing.render(figure).items()}
    for file, data in (files | {f"{name}.csv": _csv(setting, values, rows)}).items():
        sweep.report.write(file, data)
    console.print(title, highlight=False)
    console.print(_table(setting, metric, values, rows))
    console.print(f"figure   {sweep.report}/{name}.png", highlight=False, soft_wrap=True)
    return dict(zip(values, rows, strict=True))


def _rows(evaluations: list[Metrics], metric: str) -> list[dict[str, float]]:
    """Return the metrics of each value, with the difference from the lowest distance and its error, if any."""
    lowest = min(evaluations, key=lambda each: each.values[metric])
    rows = []
    for each in evaluations:
        error = paired_error(lowest, each, metric)
        above = {ABOVE: each.values[metric] - lowest.values[metric]} | ({} if error is None else {f"{ABOVE}_error": error})
        rows.append(each.values | above)
    return rows


def _table(setting: str, metric: str, values: Sequence[float], rows: list[dict[str, float]]) -> Table:
    out = tables.table(setting, metric, "above the lowest", left=())
    for value, row in zip(values, rows, strict=True):
        cells = [with_error(row[name], row.get(f"{name}_error")) for name in (metric, ABOVE)]
        out.add_row(f"{value:g}", *cells, style="" if row[ABOVE] else "bold")
    return out


def _csv(setting: str, values: Sequence[float], rows: Sequence[dict[str, float]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[value, *(row.get(name, "") for name in names)] for value, row in zip(values, rows, strict=True)]
    return csv_bytes([setting, *names], cells)
