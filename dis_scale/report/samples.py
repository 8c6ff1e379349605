"""Parts of the sample grids side by side: of a model over its training, and of all models, below the real images.

In all grids of a sweep's main sampling, the pictures at one position have the same label and the same noise.
"""

import io
import json
from collections import defaultdict
from functools import partial
from typing import NamedTuple

from PIL import Image

from dis_scale.evaluation.sampling import COLUMN_NAMES, cell_pixels
from dis_scale.process.errors import StorageError
from dis_scale.process.threads import in_order
from dis_scale.recipe import MAIN
from dis_scale.report.points import Point, Report, evenly
from dis_scale.report.tables import with_error
from dis_scale.storage.folder import Folder
from dis_scale.sweep import GRID, REAL, Sampled, Sweep, state

SHOWN_ROWS = 2
"""Rows of each grid."""
MOST_MODELS, MOST_COUNTS = 12, 8
"""Most models, and most counts of images seen of one."""
CELL = 64
"""Largest picture, in pixels: the page stays small, and samples.png has the picture itself."""
AT_ONCE = 16
"""Pictures that are read at the same time."""
AT_WORK = 2
"""Checkpoints that evaluation works on at a time: one is measured while the next is sampled."""
QUALITY = 90
"""WebP quality of the pictures, from 0 to 100: they take a fifth of a PNG's bytes."""
GAP = 3
"""Pixels between pictures."""


class Picture(NamedTuple):
    """The first rows of a grid as a WebP, with its words and its columns' names, if it has any."""

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
    return _read("real images", sweep.folder, REAL, sweep.recipe.data.resolution)


def of_point(sweep: Sweep, point: Point) -> list[Picture]:
    """Return the samples of a point, if they are stored."""
    return _of(sweep, Sampled(point.sampled_from, point.images_seen), point.model)


def of_unmeasured(sweep: Sweep, report: Report) -> list[Picture]:
    """Return the first samples of a sweep, which are drawn before they are measured."""
    due = [each for each in state.Backlog(sweep).left() if each.variant == MAIN and each not in report.skipped]
    drawn = filter(None, (_of(sweep, sampled, sampled.model, ", not measured yet") for sampled in due[:AT_WORK]))
    return next(drawn, [])


def _of(sweep: Sweep, sampled: Sampled, model: str, more: str = "") -> list[Picture]:
    words = f"{model} after {sampled.images_seen:,} images{more}"
    return _read(words, sweep.evaluation(sampled), GRID, sweep.recipe.data.resolution)


def strips(sweep: Sweep, report: Report) -> list[Strip]:
    """Return the models at their last counts, then each with several counts over its training; evenly chosen if there are many."""
    points = defaultdict[str, list[Point]](list)
    for p in report.main:
        points[p.model].append(p)
    shown = evenly(list(points.values()), MOST_MODELS)
    chosen = [p for of_model in shown for p in evenly(of_model, MOST_COUNTS)]
    trained = defaultdict[str, list[Picture]](list)
    for p, parts in zip(chosen, in_order(chosen, partial(of_point, sweep), AT_ONCE), strict=True):
        words = f"{p.model}, {p.images_seen:,} images, {report.metric} {with_error(report.distance(p), report.error(p))}"
        trained[p.model] += [part._replace(words=words) for part in parts]
    own, last = real(sweep), [parts[-1] for parts in trained.values() if parts]
    title = "All models" if len(shown) == len(points) else f"{len(shown)} of {len(points)} models"
    every = [Strip(title, own + last)] if last else []
    return every + [
        Strip(f"{model} over its training", parts + own, len(parts)) for model, parts in trained.items() if len(parts) > 1
    ]


def _read(words: str, folder: Folder, name: str, resolution: int) -> list[Picture]:
    """Return the first rows of a stored grid; none if it is missing or damaged, since a page shows the others."""
    try:
        image = Image.open(io.BytesIO(folder.read(name)), formats=("PNG",))
        image.load()
    except (OSError, StorageError):
        return []
    return [_part(words, image, cell_pixels(resolution))]


def _part(words: str, image: Image.Image, cell: int) -> Picture:
    """Return the first rows of a grid, in cells of at most `CELL` pixels with gaps between them."""
    header, side = image.height % cell, min(cell, CELL)
    columns, rows = image.width // cell, min(SHOWN_ROWS, image.height // cell)
    sheet = Image.new("RGBA", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP))
    for x in range(columns):
        for y in range(rows):
            left, top = x * cell, header + y * cell
            picture = image.crop((left, top, left + cell, top + cell)).resize((side, side))
            sheet.paste(picture, (x * (side + GAP), y * (side + GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=QUALITY)
    return Picture(words, json.loads(image.info.get(COLUMN_NAMES, "[]")), buffer.getvalue())
