"""Parts of the sample grids side by side: of a model over its training, and of all models.

In all grids of a sweep's main sampling, the pictures at one position have the same label and the same noise.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dis_scale.evaluation.sampling import cell_pixels
from dis_scale.report.points import Point, Report
from dis_scale.report.tables import with_error
from dis_scale.sweep import GRID, Sampled, Sweep

SHOWN_ROWS = 2
"""Rows of each grid."""
MOST_COUNTS = 8
"""Most counts of images seen of one model."""
CELL = 64
"""Largest picture, in pixels: the page stays small, and samples.png has the picture itself."""


class Strip(NamedTuple):
    """Parts of grids below each other, as PNGs with their words; the columns' names are a PNG, too, if the grids have any."""

    title: str
    names: bytes | None
    parts: list[tuple[str, bytes]]


def strips(sweep: Sweep, report: Report) -> list[Strip]:
    """Return all models at their last counts, then each model with several counts over its training."""
    trained: dict[str, list[Point]] = {}
    for p in report.main:
        if sweep.evaluation(Sampled(p.model, p.images_seen)).exists(GRID):
            trained.setdefault(p.model, []).append(p)
    every = [_strip(sweep, report, "All models", [points[-1] for points in trained.values()])] if trained else []
    return every + [
        _strip(sweep, report, f"{model} over its training", _evenly(points))
        for model, points in trained.items()
        if len(points) > 1
    ]


def _strip(sweep: Sweep, report: Report, title: str, points: Sequence[Point]) -> Strip:
    names, parts = None, list[tuple[str, bytes]]()
    for p in points:
        grid = sweep.evaluation(Sampled(p.model, p.images_seen)).read(GRID)
        names, part = _cut(grid, cell_pixels(report.recipe.data.resolution))
        distance = with_error(report.distance(p), report.error(p))
        parts.append((f"{p.model}, {p.images_seen:,} images, {report.metric} {distance}", part))
    return Strip(title, names, parts)


def _cut(grid: bytes, cell: int) -> tuple[bytes | None, bytes]:
    """Return the names above a grid, None for a grid without, and its first rows; with cells of at most `CELL` pixels."""
    image = Image.open(io.BytesIO(grid))
    header, bottom = image.height % cell, min(image.height, image.height % cell + SHOWN_ROWS * cell)
    share = min(1.0, CELL / cell)
    names = _png(image.crop((0, 0, image.width, header)), share) if header else None
    return names, _png(image.crop((0, header, image.width, bottom)), share)


def _png(image: Image.Image, share: float) -> bytes:
    buffer = io.BytesIO()
    image.resize((round(image.width * share), round(image.height * share))).save(buffer, "PNG")
    return buffer.getvalue()


def _evenly(points: Sequence[Point]) -> list[Point]:
    """Return at most `MOST_COUNTS` points, with the first and the last."""
    chosen = np.linspace(0, len(points) - 1, min(MOST_COUNTS, len(points))).round().astype(int)
    return [points[i] for i in chosen]
