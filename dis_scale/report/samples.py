"""Parts of the sample grids side by side: of a model over its training, and of all models, below the real images.

In all grids of a sweep's main sampling, the pictures at one position have the same label and the same noise.
"""

import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dis_scale.evaluation.sampling import COLUMN_NAMES, cell_pixels
from dis_scale.report.points import Point, Report
from dis_scale.report.tables import with_error
from dis_scale.sweep import GRID, REAL, Sampled, Sweep

SHOWN_ROWS = 2
"""Rows of each grid."""
MOST_COUNTS = 8
"""Most counts of images seen of one model."""
CELL = 64
"""Largest picture, in pixels: the page stays small, and samples.png has the picture itself."""
GAP = 3
"""Pixels between pictures."""


class Picture(NamedTuple):
    """The first rows of a grid as a PNG, with its words and its columns' names, if it has any."""

    words: str
    names: list[str]
    picture: bytes


class Strip(NamedTuple):
    """Parts of grids, with the real images if they are kept; the first `turning` are of one model over its training."""

    title: str
    parts: list[Picture]
    turning: int = 0


def real(sweep: Sweep) -> list[Picture]:
    """Return the real images; none for a sweep that was begun before they were kept."""
    if not sweep.folder.exists(REAL):
        return []
    return [_part("real images", sweep.folder.read(REAL), sweep.recipe.data.resolution)]


def of_point(sweep: Sweep, point: Point) -> list[Picture]:
    """Return the samples of a point, if they are stored."""
    folder = sweep.evaluation(Sampled(point.model, point.images_seen))
    words = f"{point.model} after {point.images_seen:,} images"
    return [_part(words, folder.read(GRID), sweep.recipe.data.resolution)] if folder.exists(GRID) else []


def strips(sweep: Sweep, report: Report) -> list[Strip]:
    """Return all models at their last counts, then each model with several counts over its training."""
    trained: dict[str, list[Picture]] = {}
    for p in report.main:
        words = (
            f"{p.model}, {p.images_seen:,} images, {report.metric} {with_error(report.distance(p), report.error(p))}"
        )
        trained.setdefault(p.model, []).extend(part._replace(words=words) for part in of_point(sweep, p))
    trained = {model: parts for model, parts in trained.items() if parts}
    every = [Strip("All models", real(sweep) + [parts[-1] for parts in trained.values()])] if trained else []
    return every + [
        Strip(f"{model} over its training", chosen + real(sweep), len(chosen))
        for model, parts in trained.items()
        if len(chosen := _evenly(parts)) > 1
    ]


def _part(words: str, grid: bytes, resolution: int) -> Picture:
    """Return the first rows of a grid, in cells of at most `CELL` pixels with gaps between them."""
    image, cell = Image.open(io.BytesIO(grid)), cell_pixels(resolution)
    header, side = image.height % cell, min(cell, CELL)
    columns, rows = image.width // cell, min(SHOWN_ROWS, image.height // cell)
    sheet = Image.new("RGBA", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP))
    for x in range(columns):
        for y in range(rows):
            left, top = x * cell, header + y * cell
            picture = image.crop((left, top, left + cell, top + cell)).resize((side, side))
            sheet.paste(picture, (x * (side + GAP), y * (side + GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return Picture(words, json.loads(image.info.get(COLUMN_NAMES, "[]")), buffer.getvalue())


def _evenly(parts: Sequence[Picture]) -> list[Picture]:
    """Return at most `MOST_COUNTS` parts, with the first and the last."""
    chosen = np.linspace(0, len(parts) - 1, min(MOST_COUNTS, len(parts))).round().astype(int)
    return [parts[i] for i in chosen]
