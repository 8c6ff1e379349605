"""The report as tables: for the terminal, and as CSV with every measured value."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from dis_scale.report.points import Findings, Point, Report

WIDTH = 78
"""Characters of the table, which fits a terminal of 80."""
UNFINISHED = " *"
"""Mark of a point taken before its schedule has ended."""
NOTED_START = 0.01
"""Share of the random start in the average above which a footnote names it."""


class TableColumn(NamedTuple):
    """A column of the CSV and a field of the JSON; `digits` is the format of a computed or measured number in the CSV."""

    name: str
    value: Callable[[Point], Any]
    digits: str = ""


COST = (
    TableColumn("model", lambda p: p.model),
    TableColumn("kind", lambda p: p.kind),
    TableColumn("variant", lambda p: p.variant),
    TableColumn("gmacs_forward", lambda p: p.gmacs, ".6g"),
    TableColumn("thop_gflops", lambda p: p.cost.thop_gflops),
    TableColumn("parameters", lambda p: p.cost.parameters),
    TableColumn("images", lambda p: p.images_seen),
    TableColumn("training_eflops", lambda p: p.eflops, ".6g"),
    TableColumn("goodput", lambda p: p.evaluation.cost.goodput, ".4f"),
    TableColumn("worker_hours", lambda p: p.worker_hours, ".6g"),
    TableColumn("memory_gib", lambda p: p.memory_gib, ".6g"),
    TableColumn("sample_ms", lambda p: p.sample_ms, ".6g"),
)
SAMPLING = (
    TableColumn("samples", lambda p: p.evaluation.samples),
    TableColumn("labels", lambda p: p.evaluation.labels),
    TableColumn("sampler", lambda p: p.sampling.sampler),
    TableColumn("steps", lambda p: p.sampling.steps),
    TableColumn("guidance", lambda p: p.sampling.scale),
    TableColumn("guided_by", lambda p: p.sampling.guide and f"{p.sampling.guide.by} at {p.sampling.guide.images}"),
    TableColumn("guidance_interval", lambda p: p.sampling.guidance_interval),
    TableColumn("guidance_channels", lambda p: p.sampling.guidance_channels),
    TableColumn("ema_width", lambda p: p.evaluation.ema_width),
    TableColumn("sampling_precision", lambda p: p.evaluation.precision),
)


def table(report: Report) -> Table:
    """Return a table with a row for each point, and below it the footnotes and the missing points."""
    out, found = points_table(report), findings(report)
    lines, wrong = [*found.said, *notes(report), *found.details], "".join(f"\n{line}" for line in missing(report))
    out.caption = Text("\n".join(lines)).append(wrong, style="red")
    return out


def points_table(report: Report) -> Table:
    """Return a table with a row for each point."""
    out = Table(
        title=f"{report.sweep}: Gflops against {report.metric}", box=box.SIMPLE_HEAD, padding=0, min_width=WIDTH,
        caption_justify="left",
    )  # fmt: skip
    shown = columns(report)
    for name in shown:
        named = name in ("model", "sampling")  # long ones take several lines, so that no number is cut
        out.add_column(name, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for point in report.means:
        out.add_row(*(cell(point) for cell in shown.values()))
    return out


def columns(report: Report) -> dict[str, Callable[[Point], str]]:
    """Return the cell of a point in each column, by names that fit a terminal of 80 characters; the CSV has every value."""
    judged = any("class_accuracy" in p.values for p in report.points)
    shown: dict[str, Callable[[Point], str] | None] = {
        "model": lambda p: f"{p.model} ({p.seeds} seeds)" if p.seeds > 1 else p.model,
        "sampling": (lambda p: p.variant or "main") if len(report.samplings) > 1 else None,
        "images": lambda p: f"{p.images_seen:,}",
        "Gflops": lambda p: f"{p.gmacs:.3g}",
        report.metric: lambda p: with_error(report.distance(p), report.error(p)) + (UNFINISHED if p.unfinished else ""),
        "class acc.": _accuracy if judged else None,
    }
    return {name: cell for name, cell in shown.items() if cell}


def _accuracy(p: Point) -> str:
    accuracy = p.values.get("class_accuracy")
    return "" if accuracy is None else f"{accuracy:.1%}"


def with_error(value: float, error: float | None, digits: str = ".4g") -> str:
    """Format a distance, or a difference of two, and its standard error, if any."""
    return f"{value:{digits}}" + ("" if error is None else f" ± {error:.2g}")


def notes(report: Report) -> list[str]:
    """Return the table's footnotes, a line each."""
    lines = ["Gflops are multiply-adds of one forward pass (DiT's convention)"]
    if any(report.error(p) is not None for p in report.means):
        lines.append(
            "± is one standard error of sampling; over several seeds also of training, whose spread one seed does not show"
        )
    if any("class_accuracy" in p.values for p in report.means):
        lines.append("class acc. is the share of samples that another classifier takes for the class they were requested of")
    if any(p.unfinished for p in report.points):
        lines.append(
            f"{UNFINISHED.strip()}, hollow in figures: measured before the learning rate had fallen to its end; not in the lower "
            "hull"
        )
    for p in report.means:
        if p.seeds < (expected := list(report.groups.values()).count(p.group)):
            lines.append(f"{p.model} at {p.images_seen:,} images: {p.seeds} of {expected} seeds are measured")
        if p.images_seen and p.start_share > NOTED_START and not p.evaluation.ema_width:
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
        made = p.evaluation
        average = f", average of width {made.ema_width}" if made.ema_width else ""
        labels = f", {made.labels} labels" if made.labels != "balanced" else ""
        lines.append(f"{variant or 'main'}: {made.samples:,} samples, {made.sampling}{average}, {made.precision}{labels}")
    lines += dict.fromkeys(note for p in report.points for note in p.evaluation.notes)
    lines += [f"floor: {text}: {with_error(distance, error)}" for text, distance, error in report.floors]
    lines += [f"floor: not measured: {report.no_floor}"] if report.no_floor else []
    return lines


def findings(report: Report) -> Findings:
    """Return how the families differ, and for a study how its law misses the budget that was held out, its best sizes and laws."""
    from dis_scale.report import families, isoflop  # here: scipy takes a second

    said = families.sentences(report) if len(report.families) > 1 else []
    study = isoflop.found(report) if report.recipe.isoflop else Findings([], [])
    return Findings(study.said + said, study.details)


def missing(report: Report) -> list[str]:
    """Return a line for each model that failed and each checkpoint that could not be evaluated."""
    skipped = [f"{sampled} skipped: {why}" for sampled, why in report.skipped.items()]
    return [f"{model} failed: {why}" for model, why in report.failed.items()] + skipped


def records(report: Report) -> list[dict[str, Any]]:
    """Return a flat record for each point, all with the same fields: its cost, its values, its sampling; None if not measured."""
    values = _values(report)
    return [_fields(COST, p) | {name: p.values.get(name) for name in values} | _fields(SAMPLING, p) for p in report.points]


def to_csv(report: Report) -> bytes:
    """Return the records as a CSV."""
    digits = {column.name: column.digits for column in COST}
    rows = [
        [value if value is None else format(value, digits[name]) if digits.get(name) else value for name, value in r.items()]
        for r in records(report)
    ]
    return csv_bytes([*(c.name for c in COST), *_values(report), *(c.name for c in SAMPLING)], rows)


def to_json(report: Report) -> dict[str, Any]:
    """Return the records with nested values and sampling settings, and the lines on missing points."""
    points = [_fields(COST, p) | {"values": p.values, "sampling": _fields(SAMPLING, p)} for p in report.points]
    return {"sweep": report.sweep, "metric": report.metric, "points": points, "missing": missing(report)}


def _fields(columns: Sequence[TableColumn], point: Point) -> dict[str, Any]:
    return {column.name: column.value(point) for column in columns}


def _values(report: Report) -> list[str]:
    """Return the names of all measured values."""
    return list(dict.fromkeys(name for p in report.points for name in p.values))


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a CSV in UTF-8 with line feeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
