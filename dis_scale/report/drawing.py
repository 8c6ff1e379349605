"""Draws figures. In all figures, a model has one colour, and a family has one marker and one line style; lines are named at their
ends, or in a legend.

SVGs contain text as text, and everything but the models is black, so that a page can show them in its own font and in dark. Each
point is a link whose target is its words, which a page shows when the point is touched. Read next: figures.py for the figures.
"""

import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from dis_scale.models import families
from dis_scale.recipe import Recipe
from dis_scale.report.points import Point, Report, evenly
from dis_scale.report.tables import with_error

HOLLOW = 3
"""Order of drawing of hollow markers, above lines and filled ones."""
FLOOR_LINES = ":", (0, (5, 3))
"""Lines of the real images and of their reconstructions."""
FLOOR_WORDS = 0.01, 0.2, 0.4, 0.6
"""Shares of the width at which a floor's words may begin."""
QUIET = "grey"
"""Colour of everything but the models: visible on white and on black."""
WIDE, SIZE = SIZES = (9.0, 4.8), (5.0, 3.8)
"""Inches of a figure for a page, and for half a page or a phone."""
COLOURS = (
    "#2d6996", "#d2870f", "#4ba596", "#782dff", "#8787ff", "#875a2d",
    "#fa2875", "#b58b46", "#5c53d8", "#1a7458", "#ee1dba", "#4596d5",
)  # fmt: skip
"""Colours of models: distinct also for colour-blind eyes, the first six most; visible on white and black. More take `shades`."""
LIGHT = 0.13, 0.29
"""Luminance, relative to white, between which a colour has a contrast of 3 with a white and a dark page (WCAG 2.2)."""
LUMINANCE = 0.2126, 0.7152, 0.0722
"""Shares of red, green and blue in the luminance."""
NEAR = 5
"""Pixels around a point that no name covers."""
SEGMENT = 50
"""Points of each segment of a line. A name that would cover more points is in the legend instead, if it names a line."""
LEAST_TICKS = 3
"""Fewest numbers of a logarithmic axis; an axis with fewer is numbered like a linear one."""
MOST_IN_LEGEND, IN_A_COLUMN = 24, 8
"""Most names in a legend, and in one of its columns."""
MOST_OF_A_LINE = 40
"""Most points of a model's line: hundreds cannot be distinguished, and take megabytes of a page."""
LETTER = 7
"""Pixels of a letter of a name."""
BESIDE = [(x, y) for y in (-3, 8, -14, 19, -25, 30, -36) for x in (7, -7)]
"""Positions of a name beside its point in points, the best first; at a negative x it ends there."""
NEAREST = 6
"""Number of these positions that are near enough that a name without a colour cannot seem to belong to another point."""
FORMATS = ("png", "svg")


def new_axes(report: Report, xlabel: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """Return a figure of `size` inches with logarithmic axes, distance upwards."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    log_axes(axes, xlabel, f"{report.metric} (lower is better)")
    return figure, axes


def log_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Make both axes logarithmic, with plain numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="black", alpha=0.08)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.12, y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def number_axes(axes: Axes, decades: float = 2.3) -> None:
    """Number both axes at `LEAST_TICKS` places or more. The numbers of the x axis may be long, and must not touch.

    So the x axis has one number a decade if it has more than `decades` decades.
    """
    for axis, steps in ((axes.xaxis, [(1, 2, 5)]), (axes.yaxis, [(1, 2, 5), range(1, 10)])):
        low, high = axis.get_view_interval()
        powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        locators: list[Locator] = [LogLocator()] if axis is axes.xaxis and high > low * 10**decades else []  # or the numbers touch
        # No logarithmic locator with too few numbers: matplotlib then numbers the axis as a linear one, however long they are.
        locators += [
            LogLocator(subs=each) for each in steps if sum(low <= x <= high for x in np.outer(powers, each).flat) >= LEAST_TICKS
        ]
        axis.set_major_locator([*locators, MaxNLocator(3)][0])


class Name(NamedTuple):
    """Words to write beside a point. With the `kind` of a curve, they are in a legend if the point has no space for them."""

    words: str
    x: float
    y: float
    colour: str = "black"
    kind: str = ""


def finish(figure: Figure, axes: Axes, report: Report, names: Sequence[Name]) -> Figure:
    """Add the floors, the families' markers, other lines' words, and the names of points, each where it covers nothing."""
    floors = report.visible_floors
    _widen(axes, [each.distance for each in floors])
    highest = max((floor.distance for floor in floors), default=0)
    for (text, distance, error), line in zip(floors, FLOOR_LINES, strict=False):
        above = distance == highest  # the words of the lower one of two are below its band
        axes.axhline(distance, linestyle=line, color="black", linewidth=1)
        low, high = max(distance - (error or 0), distance / 2), distance + (error or 0)
        axes.axhspan(low, high, color=QUIET, alpha=0.2, linewidth=0)
        axes.annotate(
            text, (FLOOR_WORDS[0], high if above else low), xytext=(0, 3 if above else -3), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="bottom" if above else "top", fontsize=8,
        )  # fmt: skip
    looks = {families.of_curve(kind).marker: kind for kind in reversed(report.families)}  # curves of one family look alike
    handles: list[Artist] = [key(kind, families.of_curve(kind).kind) for kind in reversed(looks.values()) if len(looks) > 1]
    handles += [line for line in axes.get_legend_handles_labels()[0] if not isinstance(line, ErrorbarContainer)]
    if handles and not axes.get_legend():
        axes.legend(handles=handles, fontsize=8, frameon=False)
    if unwritten := [key(name.kind, name.words, name.colour) for name in _write_names(figure, axes, names) if name.kind]:
        if (left := len(unwritten) - MOST_IN_LEGEND + 1) > 1:
            unwritten[-left:] = [Line2D([], [], ls="", label=f"and {left} more")]
        axes.legend(handles=handles + unwritten, ncols=1 + len(unwritten) // IN_A_COLUMN, fontsize=8, frameon=False)
    return figure


def key(kind: str, label: str = "", colour: str = QUIET) -> Line2D:
    """Return a family's marker and line for a legend."""
    family = families.of_curve(kind)
    return Line2D([], [], color=colour, marker=family.marker, ls=family.line, label=label or kind)


def _write_names(figure: Figure, axes: Axes, names: Sequence[Name]) -> list[Name]:
    """Write each name once, where it covers no point, no other text and as little of the lines as possible; return the rest."""
    low, high = axes.get_xlim()
    longest = max((len(name.words) for name in names), default=0) * LETTER
    axes.set_xlim(low, high * (high / low) ** (longest / axes.bbox.width))  # for the names of the last points
    number_axes(axes)
    if layout := figure.get_layout_engine():
        layout.execute(figure)  # gives everything its place, once: it takes as long as drawing
        figure.set_layout_engine("none")
    points, lines = list[np.ndarray](), [np.empty((0, 2))]
    for line in axes.lines:
        at = line.get_transform().transform(line.get_xydata())  # a floor's reaches from edge to edge
        points += [at[0]] if line.get_url() else []
        lines += [np.linspace(a, b, SEGMENT) for a, b in pairwise(at)]
    along, unwritten = np.concatenate(lines), list[Name]()
    _move_aside(axes, np.concatenate([along, *_bars(axes)]))
    drawn = [*axes.texts, *([legend] if (legend := axes.get_legend()) else [])]
    taken = np.array([each.get_window_extent().extents for each in drawn] + [[*(at - NEAR), *(at + NEAR)] for at in points])
    for name in names:
        text = axes.annotate(
            name.words, (name.x, name.y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=name.colour,
            in_layout=False,
        )  # fmt: skip

        def place(offset: tuple[float, float], text: Annotation = text) -> Bbox:
            text.xyann = offset
            text.set_horizontalalignment("left" if offset[0] > 0 else "right")
            return text.get_window_extent()

        boxes = {offset: place(offset) for offset in (BESIDE[:NEAREST] if name.colour == "black" else BESIDE)}
        free = [
            offset
            for offset, box in boxes.items()
            if axes.bbox.x0 < box.x0
            and box.x1 < figure.bbox.x1
            and axes.bbox.y0 < box.y0
            and box.y1 < figure.bbox.y1
            and not _overlaps(box, taken)
            and not (name.kind and box.count_contains(along) > SEGMENT)
        ]
        if free:
            best = min(free, key=lambda offset: boxes[offset].count_contains(along) + BESIDE.index(offset))
            taken = np.append(taken, [place(best).extents], 0)
        else:
            text.remove()
            unwritten.append(name)
    return unwritten


def _overlaps(box: Bbox, taken: np.ndarray) -> bool:
    """Return whether a box overlaps one of those taken, shape (n, 4)."""
    x0, y0, x1, y1 = taken.T
    return bool(((x0 < box.x1) & (x1 > box.x0) & (y0 < box.y1) & (y1 > box.y0)).any())


def _bars(axes: Axes) -> Iterator[np.ndarray]:
    """Yield the error bars as points (n, 2) in pixels."""
    for lines in axes.collections:
        if isinstance(lines, LineCollection):
            for ends in filter(len, lines.get_segments()):  # a point without an error has none
                begin, end = axes.transData.transform(ends)
                yield np.linspace(begin, end, SEGMENT)


def _move_aside(axes: Axes, drawn: np.ndarray) -> None:
    """Move the floors' words along their bands to where they cover the least of what is drawn, points (n, 2) in pixels."""
    for text in axes.texts:

        def covered(x: float, text: Annotation = text) -> tuple[bool, int]:  # type: ignore[assignment]
            text.xy = (x, text.xy[1])
            box = text.get_window_extent()
            return box.x1 > axes.bbox.x1, box.count_contains(drawn)

        covered(min(FLOOR_WORDS, key=covered))


def _widen(axes: Axes, floors: list[float]) -> None:
    """Widen an axis of almost one value, before anything asks for the view: matplotlib would compute it, with a warning."""
    x, y = ends(axes.xaxis.get_data_interval()), ends([*axes.yaxis.get_data_interval(), *floors])
    if 0 < x[0] <= x[1] < 1.05 * x[0]:
        axes.autoscale(enable=False, axis="x")
        axes.set_xlim(x[0] / 2, x[1] * 2)
    if 0 < y[0] <= y[1] < 1.05 * y[0]:
        axes.autoscale(enable=False, axis="y")
        axes.set_ylim(y[0] / 2, y[1] * 2)


def draw_lines(axes: Axes, report: Report, points: list[Point], along: str) -> list[Name]:
    """Plot a line for each model, and one for the cooled-down points of each trunk; return their names."""
    colours = colours_of(report.recipe)
    for model, line in _by_model(points).items():
        kept = {id(p) for p in (min(line, key=report.distance), *evenly(line, MOST_OF_A_LINE))}
        draw_line(axes, report, [p for p in line if id(p) in kept], along, colours[line[0].trunk], model)
    return last_names(report, points, along)


def draw_line(axes: Axes, report: Report, points: list[Point], along: str, colour: str = "", label: str = "") -> None:
    """Plot points with their errors, if known, as one line, which is grey without a colour of its own.

    Markers of unfinished schedules are hollow. An error bar ends at half of the value at the latest: a longer one fills the axis.
    """
    family, x = families.of_curve(points[0].kind), [getattr(p, along) for p in points]
    colours = {} if colour else colours_of(report.recipe)
    y = [report.distance(p) for p in points]
    errors = [float("nan") if (error := report.error(p)) is None else error for p in points]
    bars = None if np.isnan(errors).all() else np.array([np.minimum(errors, np.array(y) / 2), errors])
    axes.errorbar(x, y, bars, linestyle=family.line, linewidth=1.5, capsize=2, color=colour or QUIET, label=label)
    for p, left, up in zip(points, x, y, strict=True):
        own = colour or colours[p.trunk]
        face, order = ("white", HOLLOW) if p.unfinished else (own, HOLLOW - 0.5)
        axes.plot(left, up, family.marker, color=own, markerfacecolor=face, zorder=order, url=f"#{_words(report, p)}")


def _words(report: Report, p: Point) -> str:
    """Return a point in words."""
    sampling = f" ({p.variant})" if p.variant else ""
    return f"{p.model}{sampling}, {p.images_seen:,} images: {report.metric} {with_error(report.distance(p), report.error(p))}"


def last_names(report: Report, drawn: list[Point], along: str) -> list[Name]:
    """Return each model's name at its last point of those that are drawn."""
    lasts, colours = {name: points[-1] for name, points in _by_model(drawn).items()}, colours_of(report.recipe)
    return [Name(name, getattr(p, along), report.distance(p), colours[p.trunk], p.kind) for name, p in lasts.items()]


def _by_model(points: list[Point]) -> dict[str, list[Point]]:
    """Return each model's points by rising images seen; those of all branches of a trunk together."""
    lines = defaultdict[str, list[Point]](list)
    for p in sorted(points, key=lambda p: p.images_seen):
        lines[_line_of(p)].append(p)
    return {line: lines[line] for line in dict.fromkeys(_line_of(p) for p in points)}


def _line_of(p: Point) -> str:
    return p.model if p.trunk == p.group else f"{p.trunk}, cooled down"


def colours_of(recipe: Recipe) -> dict[str, str]:
    """Return the colour of each model, in the recipe's order; seeds and branches have their model's colour."""
    groups, branches = recipe.seed_groups(), {name: settings.branch for name, settings in recipe.models.items()}
    trunks = {name: groups[branch.of if branch else name] for name, branch in branches.items()}
    order = list(dict.fromkeys(trunks.values()))
    colours = dict(zip(order, COLOURS if len(order) <= len(COLOURS) else shades(len(order)), strict=False))
    return {name: colours[trunk] for name, trunk in trunks.items()}


def shades(count: int) -> list[str]:
    """Return colours that all eyes read as an order: cividis', each as light as `LIGHT` says."""
    hues = colormaps["cividis"](np.linspace(0, 1, count))[:, :3]
    light = np.where(hues <= 0.04045, hues / 12.92, ((hues + 0.055) / 1.055) ** 2.4)  # by sRGB's definition
    light *= (np.linspace(*LIGHT, count) / (light @ LUMINANCE))[:, None]
    return [to_hex(hue.clip(0, 1)) for hue in np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the largest value."""
    return min(values), max(values)


def render(figure: Figure, name: str = "", formats: Sequence[str] = FORMATS) -> dict[str, bytes]:
    """Render PNG and SVG, by file ending; the same figure gives the same bytes. SVGs of different names share no id."""
    files = {}
    with rc_context({"svg.hashsalt": name or "dis-scale", "svg.fonttype": "none"}):
        for ending in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=160, metadata={"Date": None} if ending == "svg" else None)
            figure.set_layout_engine("none")  # all formats share the first one's layout, which takes as long as drawing
            files[ending] = buffer.getvalue()
    return files
