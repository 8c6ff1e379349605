"""Two sweeps side by side: the differences, also in units of their standard errors."""

import math
from typing import NamedTuple

from rich.table import Table

from dis_scale.errors import UserError
from dis_scale.report.points import Point, Report
from dis_scale.report.tables import FACTS


class Difference(NamedTuple):
    """One model at one count in both sweeps: b - a, and its standard error if both have one."""

    a: Point
    b: Point
    change: float
    error: float | None


def differences(a: Report, b: Report) -> list[Difference]:
    """Return the points of both sweeps; UserError if their metrics differ or they have no common point."""
    if a.metric != b.metric:
        raise UserError(f"{a.sweep} was measured by {a.metric}, {b.sweep} by {b.metric}: these cannot be compared")
    theirs = {(p.model, p.variant, p.images_seen): p for p in b.points}
    pairs = [(p, theirs[key]) for p in a.points if (key := (p.model, p.variant, p.images_seen)) in theirs]
    if not pairs:
        raise UserError(f"{a.sweep} and {b.sweep} have no model at one image count in common")
    return [Difference(p, q, b.distance(q) - a.distance(p), _error(a.error(p), b.error(q))) for p, q in pairs]


def _error(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else math.hypot(a, b)


def comparison_table(a: Report, b: Report) -> Table:
    """Return a table with a row for each common point, bold if the difference is beyond twice its error."""
    pairs = differences(a, b)
    out = Table(title=f"{a.sweep} against {b.sweep}: {a.metric}", caption="\n".join(_notes(a, b, pairs)))
    for column in ("model", "sampling", "images", a.sweep, b.sweep, "difference", "in errors"):
        out.add_column(column, justify="left" if column in ("model", "sampling") else "right")
    for p, q, change, error in pairs:
        beyond = f"{change / error:+.1f}" if error else ""
        out.add_row(
            p.model, p.variant or "main", f"{p.images_seen:,}", f"{a.distance(p):.4g}", f"{b.distance(q):.4g}",
            f"{change:+.3g}" + (f" ± {error:.2g}" if error else ""), beyond,
            style="bold" if error and abs(change) > 2 * error else "",
        )  # fmt: skip
    return out


def _notes(a: Report, b: Report, pairs: list[Difference]) -> list[str]:
    """Return the table's footnotes: points of one sweep only, other latents, and different sampling settings."""
    lines = ["bold: beyond two standard errors"]
    if alone := len(a.points) + len(b.points) - 2 * len(pairs):
        lines.append(f"{alone} points are in one sweep only")
    if a.vae and b.vae and a.vae != b.vae:
        lines.append(f"VAE differs: {a.vae[:12]} and {b.vae[:12]}")
    if a.normalise != b.normalise:
        lines.append(f"data.normalise differs: {a.normalise} and {b.normalise}")
    unlike = {(key, str(p.facts.get(key)), str(q.facts.get(key))) for p, q, *_ in pairs for key in FACTS}
    return lines + [f"{key} differs: {x} and {y}" for key, x, y in sorted(unlike) if x != y]
