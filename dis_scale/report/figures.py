"""The figures. Families differ by marker and line, image counts by grey, so figures are readable in black and white."""

import io
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from dis_scale.models import families
from dis_scale.report import fits, isoflop
from dis_scale.report.points import HELD_OUT, Point, Report
from dis_scale.report.published import MARKERS as PUBLISHED_MARKERS
from dis_scale.report.published import PUBLISHED, families_alike

MOST_LINES = 8
"""Most lines below a figure."""
HOLLOW = 3
"""Above the filled markers, which error bars draw at 2.1."""
FLOOR_LINES = ":", (0, (5, 3))
"""Lines of the real images and of their reconstructions."""
COMPUTE = "training compute (EFLOP, two operations a multiply-add)"
GFLOPS = "Gflops (multiply-adds, DiT's convention)"
COMPUTE_FLOPS = "training compute (FLOPs, two a multiply-add)"
SIZE = (7.2, 4.8)
WIDE = (11.0, 4.8)
FORMATS = ("png", "svg")


def gflops_distance(report: Report, published: bool = False) -> Figure:
    """Plot Gflops against distance: a line for each family and image count, and a thin line for the fit at the last count."""
    figure, axes = _axes(report, GFLOPS)
    shades = np.linspace(0.7, 0.0, len(report.counts)) if len(report.counts) > 1 else [0.0]
    for images, shade in zip(report.counts, shades, strict=False):
        for kind in report.families:
            family = report.family(kind, images)
            unnamed = report.recipe.isoflop and len(family) == 1  # in a study almost each point has a count of its own
            _line(axes, report, family, kind, str(shade), "" if unnamed else f"{kind} at {images:,}", "gmacs")
    _fit(axes, report)
    if published:
        _published(axes, families_alike(report))
    drawn = [p for images in report.counts for kind in report.families for p in report.family(kind, images)]
    _name_last(axes, report, drawn)
    return _remove_overlapping(_finish(figure, axes, report), axes)


def both(a: Report, b: Report, unlike: Sequence[str] = ()) -> Figure:
    """Plot Gflops against distance of two sweeps at the last count of each: the second's lines are grey.

    What is `unlike` is written below, since figures leave their tables. A floor is drawn if it is that of both.
    """
    figure, axes = _axes(a, GFLOPS)
    axes.set_title(f"{a.sweep} and {b.sweep}")
    for report, shade in ((a, "0.0"), (b, "0.6")):
        for kind in report.families if report.counts else []:
            last = report.counts[-1]
            _line(axes, report, report.family(kind, last), kind, shade, f"{report.sweep}: {kind} at {last:,}", "gmacs")
    more = [f"and {len(unlike) - MOST_LINES} more: dis-scale compare"] if len(unlike) > MOST_LINES else []
    lines = [textwrap.shorten(line, 120, placeholder=" ...") for line in unlike[:MOST_LINES]] + more
    figure.supxlabel("\n".join(lines), fontsize=7)
    return _finish(figure, axes, replace(a, floors=[floor for floor in a.floors if floor in b.floors]))


def compute_distance(report: Report) -> Figure:
    """Plot training compute against distance: a line for each model and for its cooled-down points, and the lower hull.

    The hull has the points alone whose schedule has ended.
    """
    figure, axes = _axes(report, COMPUTE)
    trained = [p for p in report.main if p.images_seen]
    _lines(axes, report, trained, "eflops")
    if ended := [p for p in trained if not p.unfinished]:
        hull = fits.lower_hull([p.eflops for p in ended], [report.distance(p) for p in ended])
        best = [ended[i] for i in hull]
        axes.plot(
            [p.eflops for p in best], [report.distance(p) for p in best], color="black", linewidth=4, alpha=0.25,
            label="lower hull", solid_capstyle="round",
        )  # fmt: skip
    return _finish(figure, axes, report)


def compute_loss(report: Report) -> Figure | None:
    """Plot training compute against the held-out loss: a line for each model; None for a sweep that does not measure it."""
    loss = replace(report, metric=HELD_OUT, points=[p for p in report.points if HELD_OUT in p.values], floors=[])
    trained = [p for p in loss.main if p.images_seen]
    if not trained:
        return None
    figure, axes = _axes(loss, COMPUTE)
    axes.set_ylabel("held-out loss")
    _lines(axes, loss, trained, "eflops")
    return _finish(figure, axes, loss)


def of_study(report: Report) -> dict[str, tuple[Figure | None, str]]:
    """Return the figures of a study of budgets with their captions, by name; None for each in any other sweep."""
    metrics = {"isoflop_loss": HELD_OUT, "isoflop_fid": report.metric}
    words = "parabola of each budget, and its minimum against compute"
    return {name: (isoflop_profiles(report, metric), f"{metric}: {words}") for name, metric in metrics.items()}


def isoflop_profiles(report: Report, metric: str) -> Figure | None:
    """Plot the parabola of each budget, and beside it size and images of the minima against compute, with their power laws.

    None for a sweep without a study, or without enough measured sizes.
    """
    families = isoflop.profiles(report, metric)
    if not any(families.values()):
        return None
    figure = Figure(figsize=WIDE, layout="constrained")
    profiles, minima = figure.subplots(1, 2)
    figure.suptitle(report.sweep)
    _log_axes(profiles, "parameters", metric)
    profiles.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))  # losses span less than a decade
    _log_axes(minima, COMPUTE_FLOPS, "at the minimum")
    for kind, family in families.items():
        for profile, shade in zip(family, np.linspace(0.7, 0.0, len(family)), strict=True):
            _profile(profiles, profile, kind, str(shade))
        _minima(minima, [profile for profile in family if profile.best], isoflop.laws(family), kind)
    for axes in (profiles, minima):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def _profile(axes: Axes, profile: isoflop.Profile, kind: str, shade: str) -> None:
    """Plot the runs of a budget, their parabola, and a cross at its minimum; runs that are not fitted are hollow."""
    sizes, family = np.geomspace(*_ends(profile.parameters.tolist()), 100), families.find(kind)
    label = f"{kind}, {profile.budget:g} FLOPs"
    axes.plot(*profile.beyond, family.marker, color=shade, markerfacecolor="white")
    axes.plot(profile.parameters, profile.values, family.marker, color=shade, label=label)
    axes.plot(sizes, profile.at(sizes), family.line, color=shade, linewidth=1)
    if profile.best:
        parameters, _, value = profile.best
        axes.plot(parameters, value, "x", color=shade, markersize=10, markeredgewidth=2)


def _minima(axes: Axes, found: list[isoflop.Profile], fitted: isoflop.Laws | None, kind: str) -> None:
    """Plot the best sizes (filled) and their images (hollow), and the laws as lines."""
    budgets, best = [profile.budget for profile in found], [profile.best for profile in found if profile.best]
    family = families.find(kind)
    for column, (name, face) in enumerate({"parameters": "black", "images": "white"}.items()):
        law = fitted and (fitted.parameters, fitted.images)[column]
        words = f": compute^{law.exponent_words}" if law else ""
        axes.plot(
            budgets,
            [each[column] for each in best],
            family.marker,
            color="black",
            markerfacecolor=face,
            label=f"{kind}, {name}{words}",
        )
        if law:
            axes.plot(budgets, law.at(np.array(budgets)), family.line, color="black", linewidth=1)


def hours_distance(report: Report) -> Figure | None:
    """Plot the workers' training time against distance: a line for each model. None if no point knows its time."""
    known = [p for p in report.main if p.images_seen and p.worker_hours]
    machines = _machines(p.evaluation.cost.trained_on for p in known)
    unit = "worker-hours" if "(CPU)" in machines else "GPU-hours"
    return _measured(report, known, "worker_hours", f"training, {unit} of {machines}")


def memory_distance(report: Report) -> Figure | None:
    """Plot a training worker's peak memory against distance, at each model's last count."""
    known = [p for p in _last(report.main) if p.images_seen and p.memory_gib]
    machines = _machines(p.evaluation.cost.trained_on for p in known)
    return _measured(report, known, "memory_gib", f"peak memory of a worker, GiB, on {machines}")


def sample_distance(report: Report) -> Figure | None:
    """Plot the time of a sample against distance, at each model's last count: a line for each model through its samplings."""
    known = [p for p in _last(report.means) if p.images_seen and p.sample_ms and report.distance(p) > 0]
    machines = _machines(p.evaluation.sampled_on for p in known)
    return _measured(report, known, "sample_ms", f"ms a sample, one worker on {machines}")


def _last(points: list[Point]) -> list[Point]:
    """Return the points of each model at its last count."""
    counts = {p.model: p.images_seen for p in sorted(points, key=lambda p: p.images_seen)}
    return [p for p in points if p.images_seen == counts[p.model]]


def _machines(names: Iterable[Sequence[str]]) -> str:
    """Return the machines of all points in words."""
    return " and ".join(sorted({name for of_point in names for name in of_point or ["an unknown machine"]}))


def _measured(report: Report, points: list[Point], along: str, xlabel: str) -> Figure | None:
    """Plot a measured value against distance: a line for each model, in the value's order; None without points."""
    if not points:
        return None
    figure, axes = _axes(report, xlabel)
    _lines(axes, report, sorted(points, key=lambda p: getattr(p, along)), along)
    return _finish(figure, axes, report)


def distance_images(report: Report) -> Figure:
    """Plot distance over images seen: a line for each model, without the untrained models."""
    figure, axes = _axes(report, "images seen")
    trained = [p for p in report.main if p.images_seen]
    _lines(axes, report, trained, "images_seen")
    return _finish(figure, axes, report)


def curve(
    title: str, metric: str, setting: str, values: Sequence[float], distances: Sequence[float], errors: Sequence[float]
) -> Figure:
    """Plot one model's distance against one sampling setting."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(values, distances, errors, marker="o", capsize=2, color="black")
    axes.set(xlabel=setting, ylabel=metric, title=title)
    return figure


def render(figure: Figure) -> dict[str, bytes]:
    """Render PNG and SVG, by file ending; the same figure gives the same bytes."""
    files = {}
    with rc_context({"svg.hashsalt": "dis-scale"}):
        for ending in FORMATS:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=160, metadata={"Date": None} if ending == "svg" else None)
            figure.set_layout_engine("none")  # all formats share the first one's layout, which takes as long as drawing
            files[ending] = buffer.getvalue()
    return files


def correlations(report: Report) -> list[str]:
    """Return lines with Pearson's r on log Gflops for each image count and family of three or more models, then the power laws."""
    lines = []
    for images in report.counts:
        for kind in report.families:
            points = report.family(kind, images)
            r = fits.pearson([p.gmacs for p in points], [report.distance(p) for p in points])
            if r is not None:
                few = " (few points)" if len(points) <= fits.FEW else ""
                lines.append(f"{kind} at {images:,} images: r = {r:.2f} on log Gflops, n = {len(points)}{few}")
    for kind, law in _laws(report):
        floor = f"{law.limit:.3g} (floor) + " if law.limit else ""
        lines.append(
            f"{kind} at {report.counts[-1]:,} images: fitted power law {report.metric} = {floor}{law.factor:.3g} x "
            f"Gflops^{law.exponent_words}" + ("" if floor else ", no floor subtracted")
        )
    return lines


def _laws(report: Report) -> list[tuple[str, fits.PowerLaw]]:
    """Fit each family with enough points at the last count, above what a model without any error has, if that is measured."""
    floor, laws = report.floors[-1].distance if report.floors else 0.0, []
    for kind in report.families if report.counts else []:
        points = report.family(kind, report.counts[-1])
        costs, distances = [p.gmacs for p in points], [report.distance(p) for p in points]
        if law := fits.power_law(costs, distances, floor) or fits.power_law(costs, distances):
            laws.append((kind, law))
    return laws


def _axes(report: Report, xlabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(title=report.sweep)
    _log_axes(axes, xlabel, report.metric)
    return figure, axes


def _log_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.margins(x=0.12)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, axes: Axes, report: Report) -> Figure:
    """Add the limits, the floors and the legend."""
    _widen(axes, [each.distance for each in report.floors])
    for (text, distance, error), line, side in zip(report.floors, FLOOR_LINES, ("top", "bottom"), strict=False):
        axes.axhline(distance, linestyle=line, color="black", linewidth=1)
        if error is not None:
            axes.axhspan(max(distance - error, distance / 2), distance + error, color="black", alpha=0.12, linewidth=0)
        axes.annotate(text, (0.99, distance), xycoords=("axes fraction", "data"), ha="right", va=side, fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


def _remove_overlapping(figure: Figure, axes: Axes) -> Figure:
    """Remove each text that overlaps one before it: a study has more models than a figure has room for names."""
    figure.draw_without_rendering()  # gives the texts their places
    kept: list[Bbox] = []
    for text in list(axes.texts):
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            text.remove()
        else:
            kept.append(box)
    return figure


def _widen(axes: Axes, floors: list[float]) -> None:
    """Widen an axis of almost one value, before anything asks for the view: matplotlib would compute it, with a warning."""
    x, y = _ends(axes.xaxis.get_data_interval()), _ends([*axes.yaxis.get_data_interval(), *floors])
    if 0 < x[0] <= x[1] < 1.5 * x[0]:
        axes.autoscale(enable=False, axis="x")
        axes.set_xlim(x[0] / 2, x[1] * 2)
    if 0 < y[0] <= y[1] < 1.5 * y[0]:
        axes.autoscale(enable=False, axis="y")
        axes.set_ylim(y[0] / 2, y[1] * 2)


def _lines(axes: Axes, report: Report, points: list[Point], along: str) -> None:
    """Plot a line for each model, and one for the cooled-down points of each trunk."""
    for model, line in _by_model(points).items():
        _line(axes, report, line, line[0].kind, _shade(report, line[0].model), model, along)


def _line(axes: Axes, report: Report, points: list[Point], kind: str, shade: str, label: str, along: str) -> None:
    """Plot points with their errors, if known, as one line; hollow markers for schedules that have not ended."""
    if points:
        known = [report.error(p) for p in points]
        errors = [float("nan") if error is None else error for error in known] if any(known) else None
        x, y = [getattr(p, along) for p in points], [report.distance(p) for p in points]
        axes.errorbar(
            x,
            y,
            errors,
            marker=families.find(kind).marker,
            linestyle=families.find(kind).line,
            capsize=2,
            color=shade,
            label=label,
        )
        if hollow := [i for i, p in enumerate(points) if p.unfinished]:
            axes.plot(
                [x[i] for i in hollow], [y[i] for i in hollow], families.find(kind).marker, color=shade, markerfacecolor="white",
                zorder=HOLLOW,
            )  # fmt: skip


def _fit(axes: Axes, report: Report) -> None:
    """Plot the power laws as thin lines, labelled as fits."""
    for kind, law in _laws(report):
        costs = np.geomspace(*_ends([p.gmacs for p in report.family(kind, report.counts[-1])]), 50)
        axes.plot(costs, law.at(costs), color="black", linewidth=0.8, linestyle=(0, (1, 3)), label=f"fit: {kind}")


def _published(axes: Axes, names: list[str]) -> None:
    """Plot the published results of these families as markers without a line."""
    for family in names:
        points = [p for p in PUBLISHED if p.family == family]
        axes.plot(
            [p.gmacs for p in points], [p.fid for p in points], PUBLISHED_MARKERS[family], color="black", markersize=9,
            label=f"{family}, published (ImageNet 256, 102.4M images, no guidance, uniform labels, ADM's reference)",
        )  # fmt: skip


def _name_last(axes: Axes, report: Report, drawn: list[Point]) -> None:
    """Write each model's name next to its last point of those that are drawn."""
    for name, points in _by_model(drawn).items():
        last = points[-1]
        axes.annotate(
            name, (last.gmacs, report.distance(last)), xytext=(5, -11), textcoords="offset points", fontsize=8
        )


def _by_model(points: list[Point]) -> dict[str, list[Point]]:
    """Return each model's points by rising images seen; those of all branches of a trunk together."""
    lines = defaultdict[str, list[Point]](list)
    for p in sorted(points, key=lambda p: p.images_seen):
        lines[_line_of(p)].append(p)
    return {line: lines[line] for line in dict.fromkeys(_line_of(p) for p in points)}


def _line_of(p: Point) -> str:
    return p.model if p.trunk == p.group else f"{p.trunk}, cooled down"


def _shade(report: Report, model: str) -> str:
    """Return a grey, darker for a costlier model."""
    costs = {p.model: p.gmacs for p in report.main}
    rank = sorted(costs, key=lambda name: costs[name]).index(model)
    return str(0.7 * (1 - (rank + 1) / len(costs)))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
