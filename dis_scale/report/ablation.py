"""Table, figure and CSV of an ablation: one checkpoint's metrics against the values of one sampling setting."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dis_scale.report import figures
from dis_scale.report.tables import csv_bytes, with_error
from dis_scale.sweep import Sampled, Sweep, images_name, state
from dis_scale.sweep.documents import Metrics


def write(
    sweep: Sweep, model: str, images_seen: int, setting: str, values: Sequence[float], console: Console
) -> dict[float, dict[str, float]]:
    """Write the figure and the CSV below `report/`, print the table, return the metrics; all values must be evaluated."""
    variants = state.ablations(sweep.recipe.evaluate, setting, values)
    metrics = [Metrics.read(sweep.evaluation(Sampled(model, images_seen, v))).values for v in variants]
    metric = sweep.recipe.evaluate.metric
    title = f"{model} after {images_seen:,} images: {metric}"
    distances, errors = [m[metric] for m in metrics], [m.get(f"{metric}_error") for m in metrics]
    name = f"{setting.replace('_', '-')}-{model}-{images_name(images_seen)}"
    figure = figures.curve(
        title, metric, setting, values, distances, [float("nan") if error is None else error for error in errors]
    )
    files = {f"{name}.{ending}": data for ending, data in figures.render(figure).items()}
    for file, data in (files | {f"{name}.csv": _csv(setting, values, metrics)}).items():
        sweep.report.write(file, data)
    console.print(title, highlight=False)
    console.print(_table(setting, metric, values, distances, errors))
    console.print(f"figure   {sweep.report}/{name}.png", highlight=False, soft_wrap=True)
    return dict(zip(values, metrics, strict=True))


def _table(
    setting: str, metric: str, values: Sequence[float], distances: list[float], errors: list[float | None]
) -> Table:
    out = Table()
    for column in (setting, metric):
        out.add_column(column, justify="right")
    for value, distance, error in zip(values, distances, errors, strict=True):
        best = "bold" if distance == min(distances) else ""
        out.add_row(f"{value:g}", with_error(distance, error), style=best)
    return out


def _csv(setting: str, values: Sequence[float], metrics: Sequence[dict[str, float]]) -> bytes:
    names = list(dict.fromkeys(name for each in metrics for name in each))
    rows = [[value, *(each.get(name, "") for name in names)] for value, each in zip(values, metrics, strict=True)]
    return csv_bytes([setting, *names], rows)
