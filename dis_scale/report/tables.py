"""The report as tables: for the terminal, and as CSV with every measured value."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dis_scale.report.points import Point, Report

UNFINISHED = " *"
"""Mark of a point taken before its schedule has ended."""
NOTED_START = 0.01
"""Share of the random start in the average from which on it is noted."""
COST = (
    "model", "kind", "variant", "gmacs_forward", "paper_gflops", "parameters", "images", "training_eflops", "goodput",
    "worker_hours", "memory_gib", "sample_ms",
)  # fmt: skip
DIGITS = {"goodput": ".4f"} | dict.fromkeys(
    ("gmacs_forward", "training_eflops", "worker_hours", "memory_gib", "sample_ms"), ".6g"
)
"""Format of the computed and measured costs in the CSV."""
FACTS = (
    "samples", "labels", "sampler", "steps", "guidance", "guidance_interval", "guidance_channels", "ema_width", "precision",
)  # fmt: skip


def table(report: Report) -> Table:
    """Return a table with a row for each point, and below it the footnotes and the missing points."""
    caption = Text("\n".join(notes(report))).append("".join(f"\n{line}" for line in missing(report)), style="red")
    out = Table(
        title=f"{report.sweep}: Gflops against {report.metric}", caption=caption, box=box.SIMPLE_HEAD, padding=0
    )
    for column in columns(report):
        out.add_column(column, justify="left" if column in ("model", "sampling", "sampler") else "right", no_wrap=True)
    for point in report.means:
        out.add_row(*row(report, point))
    return out


def columns(report: Report) -> list[str]:
    """Return the column names, short enough for a terminal of 120 characters."""
    judged = ["class acc."] if _judged(report) else []
    cost = ["parameters", "Gflops", "paper's"] if _papers(report) else ["parameters", "Gflops"]
    sampling = ["sampling"] if len(report.samplings) > 1 else []
    return ["model", *sampling, *cost, "images", "EFLOP", "goodput", report.metric, *judged, "sampler", "guidance"]


def row(report: Report, p: Point) -> list[str]:
    """Return the cells of one point, in the order of `columns`."""
    accuracy = p.values.get("class_accuracy")
    judged = ["" if accuracy is None else f"{accuracy:.1%}"] if _judged(report) else []
    paper = [f"{p.cost.paper.gflops:.3g}" if p.cost.paper.gflops else ""] if _papers(report) else []
    goodput = "" if p.goodput is None else f"{p.goodput:.0%}"
    sampling = [p.variant or "main"] if len(report.samplings) > 1 else []
    name = f"{p.model} ({p.seeds} seeds)" if p.seeds > 1 else p.model
    distance = with_error(report.distance(p), report.error(p)) + (UNFINISHED if p.unfinished else "")
    return [
        name, *sampling, f"{p.cost.parameters:,}", f"{p.gmacs:.3g}", *paper, f"{p.images_seen:,}", f"{p.eflops:.3g}", goodput,
        distance, *judged, f"{p.facts['sampler']} {p.facts['steps']}", f"{p.facts['guidance']:g}",
    ]  # fmt: skip


def with_error(distance: float, error: float | None) -> str:
    """Format a distance and its standard error, if any."""
    return f"{distance:.4g}" + ("" if error is None else f" ± {error:.2g}")


def notes(report: Report) -> list[str]:
    """Return the table's footnotes, a line each."""
    error = (
        "over the seeds where a model has several, with that of sampling, whose noise and labels they share; elsewhere of "
        "sampling alone, without the spread between trainings"
    )
    lines = [f"Gflops are multiply-adds of one forward pass (DiT's convention), ± is one standard error, {error}"]
    if any(p.unfinished for p in report.points):
        lines.append(
            f"{UNFINISHED.strip()} the learning rate was to fall further: not in the hull of what a budget buys"
        )
    for p in report.means:
        if p.seeds < (expected := report.trainings(p)):
            lines.append(f"{p.model} at {p.images_seen:,} images: {p.seeds} of {expected} seeds are measured")
        if p.images_seen and p.start_share > NOTED_START and not p.facts.get("ema_width"):
            lines.append(
                f"{p.model} at {p.images_seen:,} images: {p.start_share:.0%} of the average are the random start "
                "(train.ema_ramp avoids that)"
            )
    lines += [
        f"{model}: began with weights of {start.words}, whose training its images and EFLOP leave out"
        for model in dict.fromkeys(p.model for p in report.points)
        if (start := report.recipe.start_of(model))
    ]
    lines = list(dict.fromkeys(lines))
    for variant, p in report.samplings.items():
        facts = p.facts
        average = f", average of width {facts['ema_width']}" if facts.get("ema_width") else ""
        guided = facts["guidance"] != 1
        within = f" between times {facts['guidance_interval']}" if guided and facts.get("guidance_interval") else ""
        of = f" on {facts['guidance_channels']} channels" if guided and facts.get("guidance_channels") else ""
        drawn = f", {labels} labels" if (labels := facts.get("labels", "balanced")) != "balanced" else ""
        lines.append(
            f"{variant or 'main'}: {facts['samples']:,} samples, {facts['sampler']}, {facts['steps']} steps, "
            f"guidance {facts['guidance']}{of}{within}{average}, {facts['precision']}{drawn}"
        )
    lines += dict.fromkeys(note for p in report.points for note in p.facts.get("notes", ()))
    lines += [f"floor: {text}: {with_error(distance, error)}" for text, distance, error in report.floors]
    lines += [f"floor: not measured: {report.no_floor}"] if report.no_floor else []
    return lines + _of_study(report)


def _of_study(report: Report) -> list[str]:
    if report.recipe.isoflop is None:
        return []
    from dis_scale.report import isoflop  # here: scipy takes a second, and few sweeps are studies

    return isoflop.lines(report)


def missing(report: Report) -> list[str]:
    """Return a line for each model that failed and each checkpoint that could not be evaluated."""
    skipped = [f"{sampled} skipped: {why}" for sampled, why in report.skipped.items()]
    return [f"{model} failed: {why}" for model, why in report.failed.items()] + skipped


def records(report: Report) -> list[dict[str, Any]]:
    """Return a flat record for each point, all with the same fields: its cost, its values and its facts; None if not measured."""
    values = _values(report)
    return [
        {
            "model": p.model, "kind": p.kind, "variant": p.variant, "gmacs_forward": p.gmacs, "paper_gflops": p.cost.paper.gflops,
            "parameters": p.cost.parameters, "images": p.images_seen, "training_eflops": p.eflops, "goodput": p.goodput,
            "worker_hours": p.worker_hours, "memory_gib": p.memory_gib, "sample_ms": p.sample_ms,
            **{name: p.values.get(name) for name in values}, **{name: p.facts.get(name) for name in FACTS},
        }
        for p in report.points
    ]  # fmt: skip


def to_csv(report: Report) -> bytes:
    """Return the records as a CSV."""
    rows = [[_cell(name, value) for name, value in each.items()] for each in records(report)]
    return csv_bytes([*COST, *_values(report), *FACTS], rows)


def _cell(name: str, value: Any) -> Any:
    return format(value, DIGITS[name]) if name in DIGITS and value is not None else value


def _values(report: Report) -> list[str]:
    """Return the names of all measured values."""
    return list(dict.fromkeys(name for p in report.points for name in p.values))


def to_json(report: Report) -> dict[str, Any]:
    """Return the same with plain values, and what is missing."""
    points = [
        {
            "model": p.model, "kind": p.kind, "variant": p.variant, "images": p.images_seen, "parameters": p.cost.parameters,
            "gmacs_forward": p.gmacs, "training_eflops": p.eflops, "goodput": p.goodput, "worker_hours": p.worker_hours,
            "memory_gib": p.memory_gib, "sample_ms": p.sample_ms, "values": p.values,
            "sampling": {name: p.facts.get(name) for name in FACTS},
        }
        for p in report.points
    ]  # fmt: skip
    return {"sweep": report.sweep, "metric": report.metric, "points": points, "missing": missing(report)}


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a CSV in UTF-8 with line feeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _judged(report: Report) -> bool:
    return any("class_accuracy" in p.values for p in report.points)


def _papers(report: Report) -> bool:
    return any(p.cost.paper.gflops for p in report.points)
