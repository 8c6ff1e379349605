"""What came of a sweep: true Gflops against distance, as table, CSV and figure; always made anew from what was evaluated."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from dis_scale.evaluation import results
from dis_scale.plan import Plan
from dis_scale.storage import Folder

NAME = "gflops_fid"
MARKERS = {"dis": "o", "diffussm": "^", "dit": "s"}


@dataclass(frozen=True)
class Point:
    """One model at one image count."""

    model: str
    kind: str
    gmacs: float
    parameters: int
    images: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """All points of a sweep under one metric; `failed` says why a model's training ended early."""

    sweep: str
    metric: str
    points: list[Point]
    failed: dict[str, str]

    @property
    def floor(self) -> float | None:
        """The distance between two halves of the real images."""
        return self.points[0].values.get(f"{self.metric}_floor") if self.points else None


def collect(sweep: Folder, plan: Plan) -> Report:
    """Everything that was evaluated."""
    metric = plan.recipe.evaluate.metric
    points = [
        Point(name, plan.recipe.models[name].kind, c.gmacs_forward, c.parameters, images, values)
        for name, c in plan.costs.items()
        for images, values in results.evaluated(sweep, name).items()
    ]
    failed = {name: why for name in plan.costs if (why := results.ended(sweep, name))}
    return Report(sweep.name, metric, points, failed)


def table(report: Report) -> Table:
    """A row a point, the failed models marked."""
    caption = "" if report.floor is None else f"floor (two halves of the real images): {report.floor:.4g}"
    out = Table(title=f"{report.sweep}: Gflops against {report.metric}", caption=caption)
    for column in ("model", "Gflops", "images", report.metric, "error", "class accuracy"):
        out.add_column(column, justify="left" if column == "model" else "right")
    for p in report.points:
        accuracy = p.values.get("class_accuracy")
        shown = "" if accuracy is None else f"{accuracy:.1%}"
        error = f"{p.values[f'{report.metric}_error']:.2g}"
        out.add_row(p.model, f"{p.gmacs:.4g}", f"{p.images:,}", f"{p.values[report.metric]:.4g}", error, shown)
    for model, why in report.failed.items():
        out.add_row(model, "", "failed", why[:40], "", "", style="red")
    return out


def to_csv(report: Report) -> bytes:
    columns = [
        report.metric,
        f"{report.metric}_error",
        f"{report.metric}_floor",
        "class_accuracy",
        "samples",
        "sampler",
        "steps",
        "guidance",
    ]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["model", "kind", "gmacs_forward", "parameters", "images", *columns])
    for p in report.points:
        rows.writerow(
            [p.model, p.kind, f"{p.gmacs:.6g}", p.parameters, p.images, *(p.values.get(c, "") for c in columns)]
        )
    return text.getvalue().encode()


def figure(report: Report) -> Figure:
    """Gflops against distance, both logarithmic: for each image count a line through each family's models, a point a model."""
    drawing = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = drawing.add_subplot()
    counts = sorted({p.images for p in report.points if p.images})
    for i, images in enumerate(counts):
        _draw_count(axes, report, images, shade=0.75 * (1 - (i + 1) / len(counts)))
    if report.floor is not None:
        axes.axhline(report.floor, linestyle=":", color="black", linewidth=1)
        axes.annotate(
            "two halves of the real images",
            (0.99, report.floor),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    axes.margins(x=0.12)
    axes.set(xscale="log", yscale="log", xlabel="Gflops (multiply-adds, DiT's convention)", ylabel=report.metric)
    _annotate_models(axes, report, counts)
    if report.points:
        axes.legend(fontsize=8, title="images seen")
    axes.set_title(report.sweep)
    return drawing


def _draw_count(axes: Axes, report: Report, images: int, shade: float) -> None:
    label: str | None = f"{images:,}"
    for kind in dict.fromkeys(p.kind for p in report.points):
        family = sorted((p for p in report.points if p.images == images and p.kind == kind), key=lambda p: p.gmacs)
        if not family:
            continue
        gmacs, distances = [p.gmacs for p in family], [p.values[report.metric] for p in family]
        errors = [p.values[f"{report.metric}_error"] for p in family]
        axes.errorbar(gmacs, distances, errors, marker=MARKERS[kind], capsize=2, color=str(shade), label=label)
        label = None


def _annotate_models(axes: Axes, report: Report, counts: list[int]) -> None:
    """Each model's name beside its last point."""
    for p in report.points:
        if counts and p.images == counts[-1]:
            axes.annotate(
                p.model, (p.gmacs, p.values[report.metric]), xytext=(5, -11), textcoords="offset points", fontsize=8
            )


def write(sweep: Folder, report: Report) -> dict[str, bytes]:
    """Puts PNG, SVG and, last, the CSV below `report/`; returns them by name."""
    files = {}
    drawing = figure(report)
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        drawing.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
        files[f"{NAME}.{kind}"] = buffer.getvalue()
    files[f"{NAME}.csv"] = to_csv(report)
    for name, data in files.items():
        (sweep / "report").write(name, data)
    return files
