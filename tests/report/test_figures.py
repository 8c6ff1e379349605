"""The figures: each family, each model and both floors, in plain numbers."""

import csv
import io
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from dis_scale import report as reports
from dis_scale.recipe import Recipe, Sampling, reading
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.report import Report, drawing, figures, tables
from dis_scale.report.points import Floor
from dis_scale.report.published import IMAGES, PUBLISHED
from dis_scale.sweep import Sampled, Sweep
from dis_scale.sweep.documents import Metrics, RunCost
from dis_scale.tracking.rows import Row
from tests.conftest import TINY
from tests.support.evaluations import collect, put, shown, sweep_at


def ys(line: Line2D) -> tuple[float, ...]:
    return tuple(np.asarray(line.get_ydata()))


def test_the_figures_show_each_family_each_model_and_both_floors(sweep: Sweep) -> None:
    report = collect(sweep)
    curve = figures.gflops_distance(report).axes[0]
    assert {(9.0, 6.0, 5.0, 4.5), (0.25, 0.25), (0.75, 0.75)} <= {ys(line) for line in curve.lines}
    legend = curve.get_legend()
    assert legend
    assert [text.get_text() for text in legend.get_texts()] == ["fit: dis"]
    assert {"dis", "dis32", "dis64", "dis128", "160 images"} <= {text.get_text() for text in curve.texts}
    compute = figures.compute_distance(report).axes[0]
    hull = next(line for line in compute.lines if line.get_label() == "lower hull")
    assert {9.0, 4.5} <= set(ys(hull)) <= {9.0, 6.0, 5.0, 4.5}
    over_images = figures.distance_images(report).axes[0]
    assert {(9.0,), (6.0,), (5.0,)} <= {ys(line) for line in over_images.lines}


def many(sweep: Sweep, models: int, counts: int) -> Report:
    """A report of many models at many counts, whose distances are within a factor of two."""
    text = sweep.recipe.model_dump(mode="json")
    text["models"] = {f"dis-{i}": text["models"]["dis"] | {"width": 32 * (i + 1)} for i in range(models)}
    report = collect(sweep)
    first, metric = report.points[0], report.metric
    points = [
        replace(
            first, model=name, group=name, trunk=name, images_seen=160 * (n + 1), eflops=(i + 1.0) * (n + 1),
            values={metric: 90 / (1 + i / models + n / counts), f"{metric}_error": 1.0},
            cost=replace(first.cost, parts=(replace(first.cost.parts[0], macs=10**8 + 10**7 * i),)),
        )
        for i, name in enumerate(text["models"]) for n in range(counts)
    ]  # fmt: skip
    recipe = Recipe.model_validate(text, strict=False)
    return replace(report, recipe=recipe, points=points, groups={name: name for name in text["models"]}, floors=[])


def test_many_counts_are_a_few_lines_with_their_names_in_the_axes(sweep: Sweep) -> None:
    """A hundred filled the figure with their names, and a legend of them was wider than the figure."""
    report = many(sweep, 12, 100)
    assert len(figures.drawn_counts(report)) == figures.MOST_COUNTS
    assert figures.every(report, {})[figures.MAIN][1] == "Gflops against distance at 6 of 100 image counts"
    for figure in (
        figures.gflops_distance(report),
        figures.gflops_distance(report, size=drawing.SIZE),
        figures.distance_images(report),
    ):
        figure.canvas.draw()
        axes = figure.axes[0]
        assert axes.texts
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.y0 > axes.bbox.y0
            assert box.y1 < figure.bbox.y1
        legend = axes.get_legend()
        assert not legend or not [text for text in legend.get_texts() if "images" in text.get_text()]
        assert not legend or figure.bbox.x0 <= legend.get_window_extent().x0
    assert all(len(ys(line)) <= drawing.MOST_OF_A_LINE + 1 for line in axes.lines)


def test_every_model_is_in_the_main_figure_at_its_last_count(sweep: Sweep) -> None:
    """Also if each has a length of its own; and published points have the sweep's own at their count beside them."""
    report = many(sweep, 10, 10)
    own = replace(report, points=[p for i, p in enumerate(report.points) if p.images_seen <= 160 * (i // 10 + 1)])
    assert set(figures.drawn_counts(own)) == {160 * (n + 1) for n in range(10)}
    of_published = [replace(p, images_seen=p.images_seen * IMAGES // 640) for p in report.points]
    report = replace(report, points=of_published)
    assert IMAGES not in figures.drawn_counts(report)
    assert IMAGES in figures.drawn_counts(report, published=True)


def test_a_short_axis_has_several_numbers(sweep: Sweep) -> None:
    """An axis of distances from 70 to 98 had one number, 100, and another of costs from 0.1 to 0.12 had none but 0.1."""
    report = many(sweep, 3, 2)
    wide = [replace(p, values={report.metric: report.distance(p) / 4**i}) for i, p in enumerate(report.points)]
    for figure in map(figures.gflops_distance, (report, replace(report, points=wide))):
        figure.canvas.draw()
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            low, high = axis.get_view_interval()
            assert sum(low <= tick <= high for tick in axis.get_majorticklocs()) >= 3


def test_an_error_as_large_as_its_value_is_not_the_whole_axis(sweep: Sweep) -> None:
    report = many(sweep, 1, 2)
    wide = [replace(p, values=p.values | {f"{report.metric}_error": report.distance(p)}) for p in report.points]
    axes = figures.distance_images(replace(report, points=wide)).axes[0]
    assert axes.get_ylim()[0] > min(map(report.distance, wide)) / 3


def test_a_floor_below_0_is_not_drawn_and_not_subtracted(sweep: Sweep) -> None:
    report = collect(sweep)
    below = replace(report, floors=[Floor("real", -0.1, 0.2)])
    assert not [line for line in figures.gflops_distance(below).axes[0].lines if ys(line) == (-0.1, -0.1)]
    assert figures.correlations(below)[1].endswith("no floor subtracted")


def test_captions_of_a_sweep_without_distances_speak_of_its_loss(sweep: Sweep) -> None:
    report = replace(collect(sweep), metric=HELD_OUT, floors=[])
    points = [replace(p, values={HELD_OUT: report.points[0].images_seen + 0.2}) for p in report.points]
    captions = [words for _, words in figures.every(replace(report, points=points), {}).values()]
    assert captions[0].startswith("Gflops against held-out loss")
    assert not [words for words in captions if "distance" in words.lower()]
    assert not [line for line in tables.notes(replace(report, points=points)) if "±" in line]


def test_no_name_is_written_over_another(sweep: Sweep) -> None:
    put(sweep, Sampled("dis32", 160), 8.9)
    report = collect(sweep)
    points = [replace(p, cost=report.points[0].cost) for p in report.points]
    figure = figures.gflops_distance(replace(report, points=points))
    texts = figure.axes[0].texts
    assert {"dis", "dis32", "dis64", "dis128"} <= {text.get_text() for text in texts}
    boxes = [text.get_window_extent() for text in texts]
    assert not [pair for pair in combinations(boxes, 2) if Bbox.intersection(*pair)]


def test_each_loss_ends_at_a_point_and_a_line_without_space_for_its_name_is_in_the_legend(sweep: Sweep) -> None:
    """Twenty lines end at almost one loss."""
    dis = sweep.recipe.models["dis"]
    models = {f"dis-{i}": dis for i in range(20)}
    report = replace(collect(sweep), points=[], recipe=sweep.recipe.model_copy(update={"models": models}))
    report = replace(report, groups={model: model for model in models})
    rows = {
        model: [Row(name="loss", value=0.5 + 0.0001 * i + 10 / images, images=images, time=0.0) for images in (160, 320)]
        for i, model in enumerate(models)
    }
    figure = figures.training_loss(report, rows)
    assert figure is not None
    (axes,) = figure.axes
    assert [line.get_url() for line in axes.lines if line.get_url()][-1] == "#dis-19, 320 images: training loss 0.533"
    beside, legend = [text.get_text() for text in axes.texts], axes.get_legend()
    assert legend is not None
    below = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    assert beside
    assert sorted([*beside, *below]) == sorted(models), "each once"
    assert below.items() <= drawing.colours_of(report.recipe).items()


def test_measured_costs_have_figures_that_name_the_machine(sweep: Sweep) -> None:
    """Of the points that know them; `dis` was sampled in another way, too, with half of the steps."""
    assert figures.hours_distance(collect(sweep)) is None, "no times are known"
    for model, images, hours in (("dis", 160, 3.0), ("dis32", 160, 5.0)):
        spend(sweep, Sampled(model, images), hours)
    spend(sweep, Sampled("dis", 160, "plain"), 3.0, images_per_s=20.0)
    report = collect(sweep)
    hours, memory, times = (getattr(figures, f"{name}_distance")(report).axes[0] for name in ("hours", "memory", "sample"))
    assert [axes.get_xlabel() for axes in (hours, memory, times)] == [
        "training, GPU-hours of NVIDIA H200",
        "peak memory of a worker, GiB, on NVIDIA H200",
        "ms a sample, one worker on AMD EPYC (CPU)",
    ]
    assert _plotted(hours) == {"dis": ([3.0], [9.0]), "dis32": ([5.0], [6.0])}
    assert _plotted(times) == {"dis": ([50.0, 100.0], [12.0, 9.0]), "dis32": ([100.0], [6.0])}
    rows = list(csv.DictReader(io.StringIO(reports.write(sweep, report)[reports.CSV].decode())))
    assert [row["worker_hours"] for row in rows if row["model"] == "dis32"] == ["5"]
    assert sweep.report.exists("hours_fid.svg")


def test_the_numbers_of_a_short_axis_do_not_touch(sweep: Sweep) -> None:
    """Of small costs that hardly differ, in which no power of ten has its 1, 2 or 5."""
    for model, hours in (("dis", 0.00111), ("dis32", 0.0016), ("dis64", 0.00215)):
        spend(sweep, Sampled(model, 160), hours)
    figure = figures.hours_distance(collect(sweep))
    assert figure is not None
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    ticks = [t.label1 for t in figure.axes[0].xaxis.get_major_ticks() if low <= t.get_loc() <= high]
    assert len(ticks) >= 2
    boxes = [label.get_window_extent() for label in ticks]
    assert not [pair for pair in combinations(boxes, 2) if Bbox.intersection(*pair)]


def spend(sweep: Sweep, sampled: Sampled, hours: float, images_per_s: float = 10.0) -> None:
    """Add the measured costs to an evaluation."""
    cost, folder = RunCost(worker_hours=hours, memory_gib=1.5, trained_on=("NVIDIA H200",)), sweep.evaluation(sampled)
    seconds = {"sampling_images_per_s": images_per_s}
    Metrics.read(folder).changed(cost=cost, sampled_on=("AMD EPYC (CPU)",), seconds=seconds).write(folder)


def _plotted(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Return x and y of each model's line."""
    lines = {each.get_label(): each.lines[0] for each in axes.containers}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines.items()}


def test_published_points_are_marked_and_never_in_the_fit(sweep: Sweep) -> None:
    """Those of another sampler are not drawn."""
    report = collect(sweep)
    report = replace(
        report,
        points=[
            replace(p, evaluation=p.evaluation.changed(sampling=Sampling(sampler="ddpm", steps=3, guidance=1.5)))
            for p in report.points
        ],
    )
    ours, with_published = (figures.gflops_distance(report, published=published).axes[0] for published in (False, True))
    legend = with_published.get_legend()
    assert legend
    names = {text.get_text() for text in legend.get_texts()}
    assert {"DiT, published", "DiG, published"} <= names
    added = {ys(line) for line in with_published.lines} - {ys(line) for line in ours.lines}
    assert added == {tuple(p.fid for p in PUBLISHED if p.family == family) for family in ("DiT", "DiG")}
    fitted = {ys(line) for axes in (ours, with_published) for line in axes.lines if line.get_label() == "fit: dis"}
    assert len(fitted) == 1, "the same fit with the published points and without"
    assert figures.correlations(report)[:1] == ["dis at 160 images: r = -0.91 on log Gflops, n = 4 (few points)"]
    assert "over these sizes and not beyond: fd_digits_80 = 0.75 (floor) + " in figures.correlations(report)[1]
    assert figures.correlations(replace(report, floors=[]))[1].endswith("no floor subtracted")


def test_points_before_the_end_of_a_schedule_are_marked_and_not_in_the_hull(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["train.decay=linear"]))
    for images, distance in [(160, 3.0), (320, 2.0)]:
        put(made, Sampled("dit", images), distance)
    report = collect(made)
    text = shown(reports.table(report))
    assert "3 ± 0.5 *" in text
    assert "2 ± 0.5 *" not in text
    assert "*, hollow in figures: measured before the learning rate had fallen to its end; not in the lower hull" in text
    axes = figures.compute_distance(report).axes[0]
    assert ys(next(line for line in axes.lines if line.get_label() == "lower hull")) == (2.0,)
    (hollow,) = (line for line in axes.lines if line.get_markerfacecolor() == "white")
    assert ys(hollow) == (3.0,)
    assert hollow.get_zorder() > max(line.get_zorder() for line in axes.lines if line is not hollow), "or it is hidden"


def test_a_branch_takes_its_trunks_place_in_the_curve(tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["train.cooldowns={images: [160, 320], share: 0.5}", "models.dit.seeds=2"])
    made = sweep_at(tmp_path, "tiny", recipe)
    trunks = [("dit", 160, 9.0), ("dit", 320, 8.0), ("dit-seed-1", 160, 9.0), ("dis", 160, 7.0)]
    branches = [("dit-at-160", 160, 6.0), ("dit-at-320", 320, 4.0), ("dit-seed-1-at-160", 160, 7.0)]
    for model, images, distance in trunks + branches:
        put(made, Sampled(model, images), distance)
    report = collect(made)
    assert [(p.model, report.distance(p)) for p in report.family("dit", 160)] == [("dit-at-160", 6.5)]
    assert report.family("dis", 160) == [], "its branch is not measured yet"
    lines = {line.get_text() for line in figures.compute_distance(report).axes[0].texts}
    assert {"dit", "dit, cooled down", "dis"} <= lines
    named = {text.get_text() for text in figures.gflops_distance(report).axes[0].texts}
    assert "dit, cooled down" in named
    assert "dit" not in named, "its point has no match in this figure"


def test_a_trunk_that_decays_by_itself_keeps_its_place(tmp_path: Path) -> None:
    """Beside a branch of its own to the same count, by another schedule."""
    branch = "{kind: dit, width: 16, depth: 1, heads: 2, patch: 4, branch: {of: dit, at: 160}, train: {publish_images: [320]}}"
    recipe = reading.load(TINY, ["train.decay=linear", f"models.slower={branch}"])
    made = sweep_at(tmp_path, "tiny", recipe)
    for model, distance in (("dit", 8.0), ("slower", 7.0)):
        put(made, Sampled(model, 320), distance)
    assert {p.model for p in collect(made).family("dit", 320)} == {"dit", "slower"}
    longer = reading.load(TINY, ["train.decay=linear", "train.publish_images=[320, 640]", f"models.slower={branch}"])
    made = sweep_at(tmp_path, "longer", longer)
    for model, distance in (("dit", 8.0), ("slower", 7.0)):
        put(made, Sampled(model, 320), distance)
    assert {p.model for p in collect(made).family("dit", 320)} == {"slower"}, "its rate has not fallen there"


def test_the_held_out_loss_is_drawn_where_it_is_measured(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY))
    for images, loss in [(160, 0.5), (320, 0.4)]:
        put_loss(made, Sampled("dit", images), loss)
    put(made, Sampled("dis", 320), 9.0)
    report = collect(made)
    figure = figures.compute_loss(report)
    assert figure
    drawn = figure.axes[0].containers[0]
    assert isinstance(drawn, ErrorbarContainer)
    assert ys(drawn.lines[0]) == (0.5, 0.4)
    assert "compute_loss.png" in reports.write(made, report)


def test_losses_that_hardly_differ_are_told_apart_with_the_errors_of_their_seeds(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["models.dit.seeds=3"]))
    for model, loss in {"dit": 0.231, "dit-seed-1": 0.232, "dit-seed-2": 0.233, "dis": 0.25}.items():
        put_loss(made, Sampled(model, 320), loss)
    figure = figures.compute_loss(collect(made))
    assert figure
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert high < 1.2 * low
    (drawn,) = (each for each in axes.containers if each.get_label() == "dit")
    assert isinstance(drawn, ErrorbarContainer)
    assert [ys(end)[0] for end in drawn.lines[1]] == pytest.approx([0.232 - 0.001 / 3**0.5, 0.232 + 0.001 / 3**0.5])


def put_loss(sweep: Sweep, sampled: Sampled, loss: float) -> None:
    """Write an evaluation with its held-out loss."""
    put(sweep, sampled, 9.0)
    stored = Metrics.read(sweep.evaluation(sampled))
    stored.changed(values=stored.values | {"held_out_loss": loss}).write(sweep.evaluation(sampled))


def test_the_axes_have_plain_numbers(sweep: Sweep) -> None:
    figure = figures.distance_images(collect(sweep))
    figure.canvas.draw()
    words = [label.get_text() for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis) for label in axis.get_ticklabels()]
    assert {"5", "10", "100", "200"} <= set(words)
    assert not [word for word in words if "$" in word or "e" in word]
