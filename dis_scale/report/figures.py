"""The figures of a report, and the values that each shows. Read next: drawing.py for their style."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dis_scale.models import families
from dis_scale.recipe import Recipe
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.report import drawing, fits, isoflop
from dis_scale.report.points import Point, Report, evenly
from dis_scale.report.published import IMAGES as PUBLISHED_IMAGES
from dis_scale.report.published import MARKERS as PUBLISHED_MARKERS
from dis_scale.report.published import PUBLISHED, families_alike, published_differences
from dis_scale.tracking.rows import Row

COMPUTE = "training compute (EFLOP, two operations a multiply-add)"
GFLOPS = "Gflops (multiply-adds, DiT's convention)"
COMPUTE_FLOPS = "training FLOPs"
CURVE_POINTS = 200
"""Most points of a curve of training."""
MOST_COUNTS = 6
"""Most image counts of the main figure, each a line for each family."""
IN_A_ROW = 4
"""Budgets in a row of the legend of a study."""
MAIN = "gflops_fid"
"""Name of the curve that a sweep is about."""


def every(report: Report, losses: Mapping[str, Sequence[Row]], *, published: bool = False) -> dict[str, tuple[Figure, str]]:
    """Return the figures of a sweep with their captions, by name: those for which something is measured."""
    loss, what = "Training compute against the loss on images that training never saw; errors are over seeds", report.quantity
    by_sampling = f"Time of a sample against {what}, under each sampling setting"
    shown, every_count = len(drawn_counts(report, published=published)), len(report.counts)
    counts = "each image count" if shown == every_count else f"{shown} of {every_count} image counts"
    at_counts = f"Gflops against {what} at {counts}" + (published_differences(report) if published else "")
    of_points = {
        MAIN: (gflops_distance(report, published=published), at_counts),
        "compute_fid": (compute_distance(report), f"Training compute against {what}, with its lower hull"),
        "fid_images": (distance_images(report), f"{what.capitalize()} over images seen"),
        "compute_loss": (compute_loss(report), loss),
        "hours_fid": (hours_distance(report), f"Training time against {what}"),
        "sample_ms_fid": (sample_distance(report), by_sampling),
        "memory_fid": (memory_distance(report), f"Peak memory of training against {what}"),
    }
    wanted = of_study(report) | of_points if any(p.images_seen for p in report.main) else {}
    wanted["training_loss"] = training_loss(report, losses), "Training loss over images seen"
    return {name: (figure, caption) for name, (figure, caption) in wanted.items() if figure}


def gflops_distance(report: Report, *, published: bool = False, size: tuple[float, float] = drawing.WIDE) -> Figure:
    """Plot Gflops against distance: a line for each family and image count, and a thin line for the fit at the last count."""
    figure, axes = drawing.new_axes(report, GFLOPS, size)
    ends, counts = list[drawing.Name](), drawn_counts(report, published=published)
    for images in counts:
        for kind in report.families:
            if family := report.family(kind, images):
                drawing.draw_line(axes, report, family, "gmacs")
                of_study = report.recipe.isoflop and len(family) == 1  # almost each point of a study has its own count
                if not of_study and (len(family) > 1 or kind == report.families[0]):
                    last = family[-1].gmacs, report.distance(family[-1])
                    ends.append(drawing.Name(f"{images:,} images", *last))
    _fit(axes, report)
    if published:
        _published(axes, families_alike(report))
    drawn = [p for images in counts for kind in report.families for p in report.family(kind, images)]
    return drawing.finish(figure, axes, report, drawing.last_names(report, drawn, "gmacs") + ends)


def drawn_counts(report: Report, *, published: bool = False) -> list[int]:
    """Return the image counts at which the main figure has a line: a few, each training's last, and that of published results.

    For a study, return all counts, since each model has its own.
    """
    lasts = {p.model: p.images_seen for p in sorted(report.main, key=lambda p: p.images_seen)}
    wanted = {*evenly(report.counts, MOST_COUNTS), *lasts.values(), *([PUBLISHED_IMAGES] if published else [])}
    return report.counts if report.recipe.isoflop else sorted(wanted & set(report.counts))


def both(a: Report, b: Report, size: tuple[float, float] = drawing.WIDE) -> Figure:
    """Plot Gflops against distance of two sweeps at the last count of each: one colour per sweep, and the floors that both have."""
    figure, axes = drawing.new_axes(a, GFLOPS, size)
    ends, keys = list[drawing.Name](), []
    for report, colour in ((a, drawing.COLOURS[0]), (b, drawing.COLOURS[1])):
        for kind in report.families if report.counts else []:
            last = report.counts[-1]
            if family := report.family(kind, last):
                drawing.draw_line(axes, report, family, "gmacs", colour)
                keys.append(drawing.key(kind, f"{report.sweep}: {kind} at {last:,}", colour))
                ends += [drawing.Name(p.model, p.gmacs, report.distance(p), colour) for p in family]
    axes.legend(handles=keys, fontsize=8, frameon=False)
    return drawing.finish(figure, axes, replace(a, floors=[floor for floor in a.floors if floor in b.floors]), ends)


def compute_distance(report: Report) -> Figure:
    """Plot training compute against distance: a line for each model and for its cooled-down points, and the lower hull.

    The hull contains only points whose schedule has ended.
    """
    figure, axes = drawing.new_axes(report, COMPUTE)
    trained = [p for p in report.main if p.images_seen]
    names = drawing.draw_lines(axes, report, trained, "eflops")
    if ended := [p for p in trained if not p.unfinished]:
        hull = fits.lower_hull([p.eflops for p in ended], [report.distance(p) for p in ended])
        best = [ended[i] for i in hull]
        axes.plot(
            [p.eflops for p in best], [report.distance(p) for p in best], color=drawing.QUIET, linewidth=6, alpha=0.3, zorder=1,
            label="lower hull", solid_capstyle="round",
        )  # fmt: skip
    return drawing.finish(figure, axes, report, names)


def compute_loss(report: Report) -> Figure | None:
    """Plot training compute against the held-out loss: a line for each model; None if no point has it besides a distance."""
    loss = replace(report, metric=HELD_OUT, points=[p for p in report.points if HELD_OUT in p.values], floors=[])
    trained = [p for p in loss.main if p.images_seen]
    if not trained or report.metric == HELD_OUT:
        return None
    figure, axes = drawing.new_axes(loss, COMPUTE)
    axes.set_ylabel("held-out loss")
    return drawing.finish(figure, axes, loss, drawing.draw_lines(axes, loss, trained, "eflops"))


def training_loss(report: Report, rows: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Plot the loss of training over images seen: a line for each model, the mean of neighbouring rows. None without rows."""
    figure, axes = drawing.new_axes(report, "images seen")
    axes.set_ylabel("training loss")
    ends, colours = list[drawing.Name](), drawing.colours_of(report.recipe)
    for model, known in rows.items():
        if values := [(row.images, row.value) for row in known if row.images and row.value > 0]:
            means = np.array([part.mean(0) for part in np.array_split(values, min(CURVE_POINTS, len(values)))])
            colour, family = colours[model], families.find(report.recipe.models[model].kind)
            axes.plot(*means.T, color=colour, linestyle=family.line, linewidth=1.2)
            images, loss = means[-1].tolist()
            words = f"{model}, {images:,.0f} images: training loss {loss:.3g}"
            axes.plot(images, loss, family.marker, color=colour, markersize=4, url=f"#{words}")
            ends.append(drawing.Name(model, images, loss, colour, family.kind))
    return drawing.finish(figure, axes, replace(report, floors=[]), ends) if ends else None


def of_study(report: Report) -> dict[str, tuple[Figure | None, str]]:
    """Return the figures of a study of budgets with their captions, by name; None for each in any other sweep."""
    metrics = {"isoflop_loss": HELD_OUT} | ({} if report.metric == HELD_OUT else {"isoflop_fid": report.metric})
    words = "parabola of each budget, its best size and its lowest value against compute"
    return {name: (isoflop_profiles(report, metric), f"{metric}: {words}") for name, metric in metrics.items()}


def isoflop_profiles(report: Report, metric: str) -> Figure | None:
    """Plot the parabola of each budget; beside it the best size, with its power law, and the lowest value against compute.

    None for a sweep without a study, or without enough measured sizes.
    """
    measured = isoflop.profiles(report, metric)
    if not any(measured.values()):
        return None
    width, height = drawing.WIDE
    figure = Figure(figsize=(1.4 * width, height), layout="constrained")
    profiles, sizes, lowest = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    drawing.log_axes(profiles, "parameters", metric)
    drawing.log_axes(sizes, COMPUTE_FLOPS, "best size, parameters")
    drawing.log_axes(lowest, COMPUTE_FLOPS, f"lowest {metric}")
    budgets = sorted({profile.budget for family in measured.values() for profile in family})
    shades = dict(zip(budgets, drawing.shades(len(budgets)), strict=True))
    for kind, family in measured.items():
        for profile in family:
            _profile(profiles, profile, kind, shades[profile.budget])
        _minima(sizes, lowest, family, kind)
    drawing.number_axes(profiles)
    for axes in (sizes, lowest):
        drawing.number_axes(axes, decades=1)
    named = [Line2D([], [], color=shade, label=f"{budget:g} FLOPs") for budget, shade in shades.items()]
    above = {"fontsize": 8, "frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    profiles.legend(handles=named, ncols=IN_A_ROW, **above).set_in_layout(False)
    for axes in (sizes, lowest):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(**above).set_in_layout(False)
    rows = max(2, math.ceil(len(named) / IN_A_ROW))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.06 * rows))  # room for the legends
    return figure


def _profile(axes: Axes, profile: isoflop.Profile, kind: str, shade: str) -> None:
    """Plot the runs of a budget, their parabola, and a cross at its minimum; runs that are not fitted are hollow."""
    sizes, family = np.geomspace(*drawing.ends(profile.parameters.tolist()), 100), families.of_curve(kind)
    fitted = [(x, y, shade) for x, y in zip(profile.parameters, profile.values, strict=True)]
    for x, y, face in [*fitted, *((x, y, "white") for x, y in profile.beyond.T)]:
        words = f"{x:,.0f} parameters, {profile.budget:g} FLOPs: {axes.get_ylabel()} {y:.4g}"
        axes.plot(x, y, family.marker, color=shade, markerfacecolor=face, markersize=5, url=f"#{words}")
    axes.plot(sizes, profile.at(sizes), family.line, color=shade, linewidth=1)
    if profile.best:
        parameters, _, value = profile.best
        axes.plot(parameters, value, "x", color=shade, markersize=10, markeredgewidth=2)


def _minima(sizes: Axes, values: Axes, profiles: list[isoflop.Profile], kind: str) -> None:
    """Plot the best sizes and their law as a line, and the lowest values with their errors."""
    best = {profile.budget: profile.best[0] for profile in profiles if profile.best}
    if not best:
        return
    family, law, lowest = families.of_curve(kind), isoflop.laws(profiles), isoflop.lowest(profiles)
    label = kind
    if law:
        exponent, least, most = law.parameters.exponent
        label += f": compute^{exponent:.2f} ({least:.2f} to {most:.2f})"
    sizes.plot(list(best), list(best.values()), family.marker, color="black", label=label)
    if law:
        budgets = np.array(list(best))
        sizes.plot(budgets, law.parameters.at(budgets), family.line, color="black", linewidth=1)
    middle = np.exp([low.log for low in lowest.values()])
    errors = middle * np.array([low.error.size for low in lowest.values()])
    values.errorbar(
        list(lowest), middle, errors, label=kind, marker=family.marker, linestyle=family.line, color="black", capsize=2, linewidth=1
    )


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
    figure, axes = drawing.new_axes(report, xlabel)
    names = drawing.draw_lines(axes, report, sorted(points, key=lambda p: getattr(p, along)), along)
    return drawing.finish(figure, axes, report, names)


def distance_images(report: Report) -> Figure:
    """Plot distance over images seen: a line for each model, without the untrained models."""
    figure, axes = drawing.new_axes(report, "images seen")
    trained = [p for p in report.main if p.images_seen]
    return drawing.finish(figure, axes, report, drawing.draw_lines(axes, report, trained, "images_seen"))


def curve(
    recipe: Recipe, model: str, setting: str, values: Sequence[float], distances: Sequence[float], errors: Sequence[float]
) -> Figure:
    """Plot one model's distance against one sampling setting, in its colour."""
    figure, family = Figure(figsize=drawing.SIZE, layout="constrained"), families.find(recipe.models[model].kind)
    axes, colour = figure.add_subplot(), drawing.colours_of(recipe)[model]
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="black", alpha=0.08)
    axes.errorbar(values, distances, errors, marker=family.marker, linestyle=family.line, capsize=2, color=colour)
    axes.set(xlabel=setting, ylabel=f"{recipe.evaluate.metric} (lower is better)", title=model)
    return figure


def correlations(report: Report) -> list[str]:
    """Return lines with Pearson's r on log Gflops for each drawn count and family of three or more models, then the power laws."""
    lines = []
    for images in drawn_counts(report):
        for kind in report.families:
            points = report.family(kind, images)
            r = fits.pearson([p.gmacs for p in points], [report.distance(p) for p in points])
            if r is not None:
                few = " (few points)" if len(points) <= fits.FEW else ""
                early = " (before the learning rate has fallen)" if any(p.unfinished for p in points) else ""
                lines.append(f"{kind} at {images:,} images: r = {r:.2f} on log Gflops, n = {len(points)}{few}{early}")
    for kind, law in _laws(report):
        floor = f"{law.limit.value:.3g} (floor) + " if law.limit.value else ""
        lines.append(
            f"{kind} at {report.counts[-1]:,} images, over these sizes and not beyond: {report.metric} = {floor}{law.factor:.3g} x "
            f"Gflops^{law.exponent.words('.2f')}" + ("" if floor else ", no floor subtracted")
        )
    return lines


def _laws(report: Report) -> list[tuple[str, fits.PowerLaw]]:
    """Fit each family with enough points at the last count, above the floor of a model without any error, if measured."""
    floor, laws = report.visible_floors[-1].distance if report.visible_floors else 0.0, []
    for kind in report.families if report.counts else []:
        points = report.family(kind, report.counts[-1])
        costs, distances = [p.gmacs for p in points], [report.distance(p) for p in points]
        if law := fits.power_law(costs, distances, floor) or fits.power_law(costs, distances):
            laws.append((kind, law))
    return laws


def _fit(axes: Axes, report: Report) -> None:
    """Plot the power laws as thin lines, labelled as fits."""
    for kind, law in _laws(report):
        costs = np.geomspace(*drawing.ends([p.gmacs for p in report.family(kind, report.counts[-1])]), 50)
        line = families.of_curve(kind).line
        axes.plot(costs, law.at(costs), color="black", linewidth=0.8, linestyle=line, label=f"fit: {kind}")


def _published(axes: Axes, names: list[str]) -> None:
    """Plot the published results of these families as markers without a line."""
    for family in names:
        points = [p for p in PUBLISHED if p.family == family]
        axes.plot(
            [p.gmacs for p in points], [p.fid for p in points], PUBLISHED_MARKERS[family], color="black", markersize=9,
            label=f"{family}, published",
        )  # fmt: skip
