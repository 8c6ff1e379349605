"""Two sweeps side by side: what differs, and by how many of its own errors."""

import math
from typing import NamedTuple

from rich.table import Table

from dis_scale.errors import UserError
from dis_scale.report.collect import Point, Report


class Difference(NamedTuple):
    """One model at one count in both sweeps: b - a, and the standard error of that."""

    a: Point
    b: Point
    change: float
    error: float


def differences(a: Report, b: Report) -> list[Difference]:
    """What both sweeps have; UserError where their distances are not the same measure or nothing is common."""
    if a.metric != b.metric:
        raise UserError(f"{a.sweep} was measured by {a.metric}, {b.sweep} by {b.metric}: these cannot be compared")
    theirs = {(p.model, p.variant, p.images): p for p in b.points}
    pairs = [(p, theirs[key]) for p in a.points if (key := (p.model, p.variant, p.images)) in theirs]
    if not pairs:
        raise UserError(f"{a.sweep} and {b.sweep} have no model at one image count in common")
    return [
        Difference(p, q, b.distance(q) - a.distance(p), math.hypot(a.error(p), b.error(q))) for p, q in pairs
    ]  # fmt: skip


def table(a: Report, b: Report) -> Table:
    """A row a common point; bold where the difference is beyond twice its error."""
    found = differences(a, b)
    out = Table(title=f"{a.sweep} against {b.sweep}: {a.metric}", caption=_left_out(a, b, len(found)))
    for column in ("model", "drawn", "images", a.sweep, b.sweep, "difference", "in errors"):
        out.add_column(column, justify="left" if column in ("model", "drawn") else "right")
    for p, q, change, error in found:
        beyond = f"{change / error:+.1f}" if error else ""
        out.add_row(
            p.model, p.variant or "main", f"{p.images:,}", f"{a.distance(p):.4g}", f"{b.distance(q):.4g}",
            f"{change:+.3g} ± {error:.2g}", beyond, style="bold" if error and abs(change) > 2 * error else "",
        )  # fmt: skip
    return out


def _left_out(a: Report, b: Report, common: int) -> str:
    alone = len(a.points) + len(b.points) - 2 * common
    return "bold: beyond two standard errors" + (f"; {alone} points stand in one sweep alone" if alone else "")
