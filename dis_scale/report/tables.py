"""The report in rows: for the terminal, and as CSV with every value that was measured."""

import csv
import io

from rich import box
from rich.table import Table
from rich.text import Text

from dis_scale.report.collect import Point, Report

COST = (
    "model", "kind", "variant", "gmacs_forward", "paper_gflops", "parameters", "images", "training_eflops", "goodput",
)  # fmt: skip
FACTS = ("samples", "sampler", "steps", "guidance", "guidance_interval", "ema_width", "precision")


def table(report: Report) -> Table:
    """A row a point; below it what has to be said, and what failed or was damaged."""
    caption = Text("\n".join(notes(report))).append("".join(f"\n{line}" for line in missing(report)), style="red")
    out = Table(
        title=f"{report.sweep}: Gflops against {report.metric}", caption=caption, box=box.SIMPLE_HEAD, padding=0
    )
    for column in columns(report):
        out.add_column(column, justify="left" if column in ("model", "drawn", "sampler") else "right", no_wrap=True)
    for point in report.points:
        out.add_row(*row(report, point))
    return out


def columns(report: Report) -> list[str]:
    """Short enough for a terminal of 120 characters."""
    judged = ["class acc."] if _judged(report) else []
    cost = ["parameters", "Gflops", "paper's"] if _papers(report) else ["parameters", "Gflops"]
    drawn = ["drawn"] if len(report.samplings) > 1 else []
    return ["model", *drawn, *cost, "images", "EFLOP", "goodput", report.metric, *judged, "sampler", "guidance"]


def row(report: Report, p: Point) -> list[str]:
    """The cells of one point, as `columns` names them."""
    accuracy = p.values.get("class_accuracy")
    judged = ["" if accuracy is None else f"{accuracy:.1%}"] if _judged(report) else []
    paper = [f"{p.cost.paper_gflops:.3g}" if p.cost.paper_gflops else ""] if _papers(report) else []
    goodput = "" if p.goodput is None else f"{p.goodput:.0%}"
    drawn = [p.variant or "main"] if len(report.samplings) > 1 else []
    return [
        p.model, *drawn, f"{p.cost.parameters:,}", f"{p.gmacs:.3g}", *paper, f"{p.images:,}", f"{p.eflops:.3g}", goodput,
        with_error(report.distance(p), report.error(p)), *judged, f"{p.facts['sampler']} {p.facts['steps']}",
        f"{p.facts['guidance']:g}",
    ]  # fmt: skip


def with_error(distance: float, error: float | None) -> str:
    """A distance and its standard error, where there is one."""
    return f"{distance:.4g}" + ("" if error is None else f" ± {error:.2g}")


def notes(report: Report) -> list[str]:
    """What has to be said of all rows together."""
    said = ["Gflops are multiply-adds of one forward pass (DiT's convention), ± is one standard error"]
    for variant, p in report.samplings.items():
        how = p.facts
        average = f", average of width {how['ema_width']}" if how.get("ema_width") else ""
        within = f" between times {how['guidance_interval']}" if how.get("guidance_interval") else ""
        said.append(
            f"{variant or 'main'}: {how['samples']:,} samples, {how['sampler']}, {how['steps']} steps, "
            f"guidance {how['guidance']}{within}{average}, {how['precision']}"
        )
    said += dict.fromkeys(note for p in report.points for note in p.facts.get("notes", ()))
    if report.floor is not None:
        said.append(f"floor (two halves of the real images): {report.floor:.4g}")
    return said


def missing(report: Report) -> list[str]:
    """A line for each model that failed and each checkpoint that could not be evaluated."""
    skipped = [f"{drawn} skipped: {why}" for drawn, why in report.skipped.items()]
    return [f"{model} failed: {why}" for model, why in report.failed.items()] + skipped


def to_csv(report: Report) -> bytes:
    """Every point with its cost, its facts and all its values, a column each."""
    values = list(dict.fromkeys(name for p in report.points for name in p.values))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*COST, *values, *FACTS])
    for p in report.points:
        measured = [p.values.get(name, "") for name in values] + [p.facts.get(name, "") for name in FACTS]
        cost = [f"{p.gmacs:.6g}", p.cost.paper_gflops or "", p.cost.parameters, p.images, f"{p.eflops:.6g}"]
        rows.writerow([p.model, p.kind, p.variant, *cost, "" if p.goodput is None else f"{p.goodput:.4f}", *measured])
    return text.getvalue().encode()


def _judged(report: Report) -> bool:
    return any("class_accuracy" in p.values for p in report.points)


def _papers(report: Report) -> bool:
    return any(p.cost.paper_gflops for p in report.points)
