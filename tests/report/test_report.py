"""The report is built from the evaluations, names missing points, and is self-contained."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from scipy import stats

from dis_scale import report as reports
from dis_scale.planning import plan as plans
from dis_scale.planning.plan import price_sweep
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, Recipe, Sampling, reading
from dis_scale.report import compare, figures
from dis_scale.report.published import PUBLISHED
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Ended, FloorMetrics, Metrics, Origin, RunCost, Skipped
from tests.conftest import TINY
from tests.support.commands import answer
from tests.support.evaluations import SHAPE, collect, put, sweep_at


@pytest.fixture
def recipe(tiny: Recipe) -> Recipe:
    """The tiny recipe with three sizes of DiS, and a variant."""
    text = tiny.model_dump(mode="json")
    text["models"] |= {f"dis{width}": text["models"]["dis"] | {"width": width} for width in (32, 64, 128)}
    text["evaluate"]["variants"] = {"plain": {"guidance": 1.0}}
    return Recipe.model_validate(text, strict=False)


@pytest.fixture
def sweep(tmp_path: Path, recipe: Recipe) -> Sweep:
    made = sweep_at(tmp_path, "tiny", recipe)
    for model, images, distance in [
        ("dis", 0, 90.0),
        ("dis", 160, 9.0),
        ("dis32", 160, 6.0),
        ("dis64", 160, 5.0),
        ("dis128", 160, 4.5),
    ]:
        put(made, Sampled(model, images), distance)
    put(made, Sampled("dis", 160, "plain"), 12.0)
    Ended(why="a worker was lost 4 times").write(made.run("dit").folder)
    floor = {kind: {recipe.evaluate.metric: value} for kind, value in (("real", 0.25), ("reconstructed", 0.75))}
    FloorMetrics(images=60, values=floor).write(made.floor)
    Skipped(why="weights.safetensors: damaged").write(made.evaluation(Sampled("dis", 320)))
    return made


def shown(table: Table) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_csv_has_each_point_with_its_cost_facts_and_values(sweep: Sweep) -> None:
    files = reports.write(sweep, collect(sweep))
    rows = list(csv.DictReader(io.StringIO(files[reports.CSV].decode())))
    metric = sweep.recipe.evaluate.metric
    assert [(r["model"], r["variant"], r["images"], r[metric]) for r in rows] == [
        ("dis", "", "0", "90.0"),
        ("dis", "", "160", "9.0"),
        ("dis", "plain", "160", "12.0"),
        ("dis32", "", "160", "6.0"),
        ("dis64", "", "160", "5.0"),
        ("dis128", "", "160", "4.5"),
    ]
    cost = price_sweep(sweep.recipe, SHAPE).costs["dis"]
    assert float(rows[1]["gmacs_forward"]) == pytest.approx(cost.gmacs_forward, rel=1e-5)
    assert float(rows[1]["training_eflops"]) == pytest.approx(2 * cost.gmacs_training * 160 / 1e9, rel=1e-5)
    assert float(rows[1]["paper_gflops"]) == cost.paper.gflops
    assert (rows[1]["sampler"], rows[1]["guidance"]) == ("ddim", "1.5")


def test_the_points_and_differences_are_json_for_programs(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    sweep.save_recipe()
    found = answer("report", str(sweep), "--json")
    points = {(p["model"], p["images"]): p for p in found["points"] if not p["variant"]}
    assert points["dis32", 160]["values"][found["metric"]] == 6.0
    assert points["dis32", 160]["sampling"]["steps"] == 3
    assert found["page"] == f"{sweep.report}/index.html"
    other = sweep_at(tmp_path / "other", "tiny", recipe)
    other.save_recipe()
    put(other, Sampled("dis32", 160), 7.5)
    (difference,) = answer("compare", str(sweep), str(other), "--json")
    assert (difference["a"]["model"], difference["change"], difference["error"]) == (
        "dis32",
        1.5,
        pytest.approx(0.5**0.5),
    )


def test_the_figures_show_each_family_each_model_and_both_floors(sweep: Sweep) -> None:
    report = collect(sweep)
    curve = figures.gflops_distance(report).axes[0]
    assert {(9.0, 6.0, 5.0, 4.5), (0.25, 0.25), (0.75, 0.75)} <= {tuple(line.get_ydata()) for line in curve.lines}
    assert [text.get_text() for text in curve.get_legend().get_texts()] == ["fit: dis", "dis at 160"]
    assert {"dis", "dis32", "dis64"} <= {text.get_text() for text in curve.texts}
    compute = figures.compute_distance(report).axes[0]
    hull = next(line for line in compute.lines if line.get_label() == "lower hull")
    assert {9.0, 4.5} <= set(hull.get_ydata()) <= {9.0, 6.0, 5.0, 4.5}
    over_images = figures.distance_images(report).axes[0]
    assert {(9.0,), (6.0,), (5.0,)} <= {tuple(line.get_ydata()) for line in over_images.lines}


def test_no_name_is_written_over_another(sweep: Sweep) -> None:
    put(sweep, Sampled("dis32", 160), 8.9)
    report = collect(sweep)
    points = [replace(p, cost=report.points[0].cost) for p in report.points]
    axes = figures.gflops_distance(replace(report, points=points)).axes[0]
    names = {text.get_text() for text in axes.texts}
    assert "dis" in names
    assert "dis32" not in names
    assert "dis64" in names


def test_measured_costs_have_figures_that_name_the_machine(sweep: Sweep) -> None:
    """Of the points that know them; `dis` was sampled in another way, too, with half of the steps."""
    assert figures.hours_distance(collect(sweep)) is None, "no times are known"
    for model, images, hours in (("dis", 160, 3.0), ("dis32", 160, 5.0)):
        spend(sweep, Sampled(model, images), hours)
    spend(sweep, Sampled("dis", 160, "plain"), 3.0, images_per_s=20.0)
    report = collect(sweep)
    hours, memory, times = (
        getattr(figures, f"{name}_distance")(report).axes[0] for name in ("hours", "memory", "sample")
    )
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


def spend(sweep: Sweep, sampled: Sampled, hours: float, images_per_s: float = 10.0) -> None:
    """Add the measured costs to an evaluation."""
    cost, folder = RunCost(worker_hours=hours, memory_gib=1.5, trained_on=("NVIDIA H200",)), sweep.evaluation(sampled)
    seconds = {"sampling_images_per_s": images_per_s}
    Metrics.read(folder).changed(cost=cost, sampled_on=("AMD EPYC (CPU)",), seconds=seconds).write(folder)


def _plotted(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Return x and y of each model's line."""
    return {each.get_label(): tuple(map(list, each.lines[0].get_data())) for each in axes.containers}


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
    ours, with_published = (figures.gflops_distance(report, published).axes[0] for published in (False, True))
    names = {text.get_text() for text in with_published.get_legend().get_texts()}
    words = "published (ImageNet 256, 102.4M images, no guidance, uniform labels, ADM's reference)"
    assert {f"DiT, {words}", f"DiG, {words}"} <= names
    added = {tuple(line.get_ydata()) for line in with_published.lines} - {
        tuple(line.get_ydata()) for line in ours.lines
    }
    assert added == {tuple(p.fid for p in PUBLISHED if p.family == family) for family in ("DiT", "DiG")}
    fitted = {
        tuple(line.get_ydata())
        for axes in (ours, with_published)
        for line in axes.lines
        if line.get_label() == "fit: dis"
    }
    assert len(fitted) == 1, "the same fit with the published points and without"
    assert figures.correlations(report)[:1] == ["dis at 160 images: r = -0.91 on log Gflops, n = 4 (few points)"]
    assert "fitted power law fd_digits_80 = " in figures.correlations(report)[1]


def test_seeds_of_a_model_are_one_point_with_their_error(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["models.dit.seeds=3"]))
    for model, distance in [("dit", 9.0), ("dit-seed-1", 10.0), ("dit-seed-2", 14.0), ("dis", 5.0)]:
        put(made, Sampled(model, 320), distance)
    report = collect(made)
    (mean,) = (p for p in report.main if p.kind == "dit")
    assert (mean.model, mean.seeds, report.distance(mean)) == ("dit", 3, 11.0)
    spread = np.std([9, 10, 14], ddof=1) / np.sqrt(3)
    assert report.error(mean) == pytest.approx(np.hypot(spread, 0.5)), "the seeds share the noise of their samples"
    text = " ".join(shown(reports.table(report)).split())
    assert "dit (3 seeds)" in text
    assert "11 ± 1.6" in text
    assert "over the seeds where a model has several, with that of sampling" in text
    rows = list(csv.DictReader(io.StringIO(reports.write(made, report)[reports.CSV].decode())))
    assert [row["model"] for row in rows] == ["dis", "dit", "dit-seed-1", "dit-seed-2"]


def test_points_before_the_end_of_a_schedule_are_marked_and_not_in_the_hull(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["train.decay=linear"]))
    for images, distance in [(160, 3.0), (320, 2.0)]:
        put(made, Sampled("dit", images), distance)
    report = collect(made)
    text = " ".join(shown(reports.table(report)).split())
    assert "3 ± 0.5 *" in text
    assert "2 ± 0.5 *" not in text
    assert "* the learning rate was to fall further: not in the hull" in text
    axes = figures.compute_distance(report).axes[0]
    assert tuple(next(line for line in axes.lines if line.get_label() == "lower hull").get_ydata()) == (2.0,)
    (hollow,) = (line for line in axes.lines if line.get_markerfacecolor() == "white")
    assert tuple(hollow.get_ydata()) == (3.0,)
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
    lines = {line.get_text() for line in figures.compute_distance(report).axes[0].get_legend().get_texts()}
    assert {"dit", "dit, cooled down", "dis", "lower hull"} <= lines
    named = {text.get_text() for text in figures.gflops_distance(report).axes[0].texts}
    assert "dit, cooled down" in named
    assert "dit" not in named, "its point has no match in this figure"


def test_the_held_out_loss_is_drawn_where_it_is_measured(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY))
    for images, loss in [(160, 0.5), (320, 0.4)]:
        put(made, Sampled("dit", images), 9.0)
        folder = made.evaluation(Sampled("dit", images))
        stored = Metrics.read(folder)
        stored.changed(values=stored.values | {"held_out_loss": loss}).write(folder)
    put(made, Sampled("dis", 320), 9.0)
    report = collect(made)
    assert (figure := figures.compute_loss(report))
    assert [tuple(line.get_ydata()) for line in figure.axes[0].lines] == [(0.5, 0.4)]
    assert "compute_loss.png" in reports.write(made, report)


def test_the_axes_have_plain_numbers(sweep: Sweep) -> None:
    figure = figures.distance_images(collect(sweep))
    figure.canvas.draw()
    words = [
        label.get_text() for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis) for label in axis.get_ticklabels()
    ]
    assert {"5", "10", "100", "200"} <= set(words)
    assert not [word for word in words if "$" in word or "e" in word]


def test_an_average_of_the_random_start_is_noted(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["train.ema=0.99", "train.ema_ramp=null"]))
    put(made, Sampled("dit", 320), 9.0)
    assert "dit at 320 images: 82% of the average are the random start (train.ema_ramp" in shown(
        reports.table(collect(made))
    )
    ramped = sweep_at(tmp_path, "ramped", reading.load(TINY, ["train.ema=0.99"]))
    put(ramped, Sampled("dit", 320), 9.0)
    assert "random start" not in shown(reports.table(collect(ramped)))


def test_a_start_from_other_weights_is_noted_and_not_called_random(tmp_path: Path) -> None:
    start = "models.dit.start={kind: sweep, url: s3://b/sweeps/small, model: h, images: 1600}"
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["train.ema=0.99", "train.ema_ramp=null", start]))
    put(made, Sampled("dit", 320), 9.0)
    text = " ".join(shown(reports.table(collect(made))).split())
    assert "random start" not in text
    assert "dit: began with weights of h at 1,600 images of s3://b/sweeps/small, whose training its images and" in text


def test_published_points_are_refused_beside_guided_ones(sweep: Sweep) -> None:
    data = sweep.recipe.data.model_copy(update={"resolution": 256, "num_classes": 1000})
    report = replace(collect(sweep), metric="fid", recipe=sweep.recipe.model_copy(update={"data": data}))
    points = [replace(p, values=p.values | {"fid": report.points[0].values["fd_digits_80"]}) for p in report.points]
    with pytest.raises(UserError, match=r"tiny's main sampling has guidance 1.5, 3 steps, ddim, balanced labels:"):
        reports.write(sweep, replace(report, points=points), published=True)


def test_missing_points_are_named(sweep: Sweep) -> None:
    text = shown(reports.table(collect(sweep)))
    assert "dit failed: a worker was lost 4 times" in text
    assert "dis at 320 images skipped: weights.safetensors: damaged" in text
    assert "9 ± 0.5" in text
    assert "main: 60 samples, ddim, 3 steps, guidance 1.5, fp32" in text
    assert text.count("not verified against published tables") == 1


def test_published_ways_of_sampling_are_named(tmp_path: Path, recipe: Recipe) -> None:
    made, plain = (sweep_at(tmp_path, name, recipe) for name in ("published", "plain"))
    for each in (made, plain):
        put(each, Sampled("dis", 160), 9.0)
    folder = made.evaluation(Sampled("dis", 160))
    stored = Metrics.read(folder)
    sampling = stored.sampling.model_copy(update={"guidance_channels": 3})
    stored.changed(labels="random", sampling=sampling).write(folder)
    text = " ".join(shown(reports.table(collect(made))).split())
    assert "main: 60 samples, ddim, 3 steps, guidance 1.5 on 3 channels, fp32, random labels" in text
    words = compared(collect(plain), collect(made))
    assert "labels differs: balanced and random" in words
    assert "guidance_channels differs: null and 3" in words


def test_the_page_is_self_contained(sweep: Sweep) -> None:
    text = reports.write(sweep, collect(sweep))[reports.PAGE].decode()
    assert text.count("data:image/svg+xml;base64,") == 3
    assert text.count("data:image/png;base64,") == 4
    assert "n = 4 (few points)" in text
    assert "dit failed" in text
    assert [link for link in re.findall(r"(?:src|href)=['\"]([^'\"#]+)", text) if not link.startswith("data:")] == [
        "samples.html"
    ]
    assert sorted(sweep.report.list()) == sorted(
        [reports.CSV, reports.PAGE, "samples.html"]
        + [f"{name}.{ending}" for name in ("gflops_fid", "compute_fid", "fid_images") for ending in ("png", "svg")]
    )


def test_a_sweep_without_evaluations_has_a_report(tmp_path: Path, recipe: Recipe) -> None:
    empty = sweep_at(tmp_path, "tiny", recipe)
    assert len(reports.write(empty, collect(empty))) == 8


def compared(a: reports.Report, b: reports.Report, pairs: dict[str, str] | None = None) -> str:
    table = compare.comparison_table(a, b, compare.by_name(a, b) if pairs is None else pairs)
    return " ".join(shown(table).split())


def test_differences_of_two_sweeps_have_errors(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    other = sweep_at(tmp_path, "other", recipe)
    put(other, Sampled("dis", 160), 4.0, error=1.2)
    put(other, Sampled("dis64", 160), 5.5, error=1.2)
    a, b = collect(sweep), collect(other)
    found = compare.differences(a, b, compare.by_name(a, b))
    assert [(d.a.model, d.change, d.error, d.significant) for d in found] == [
        ("dis", -5.0, pytest.approx(1.3), False),
        ("dis64", 0.5, pytest.approx(1.3), False),
    ]
    text = compared(a, b)
    assert "-5 ± 1.3" in text
    assert "-3.8" in text
    assert "models with one seed: the error is of sampling alone" in text
    assert "4 points are in one sweep only" in text


def test_only_a_difference_over_seeds_is_significant(tmp_path: Path) -> None:
    sweeps = []
    for name, distances in (("a", [9.0, 9.2, 9.4]), ("b", [5.0, 5.2, 5.1])):
        made = sweep_at(tmp_path, name, reading.load(TINY, ["models.dit.seeds=3"]))
        for model, distance in zip(("dit", "dit-seed-1", "dit-seed-2"), distances, strict=True):
            put(made, Sampled(model, 320), distance)
        put(made, Sampled("dis", 320), distances[0])
        sweeps.append(collect(made))
    found = {d.a.model: d for d in compare.differences(*sweeps, compare.by_name(*sweeps))}
    assert {model: d.significant for model, d in found.items()} == {"dit": True, "dis": False}
    assert "bold: Welch's test refuses at 5 %" in compared(*sweeps)
    over_seeds = np.hypot(np.std([9, 9.2, 9.4], ddof=1), np.std([5, 5.2, 5.1], ddof=1)) / np.sqrt(3)
    assert found["dit"].error == pytest.approx(np.sqrt(over_seeds**2 + 2 * 0.5**2)), "and that of sampling, of both"


def test_a_comparison_names_all_that_differs(sweep: Sweep, tmp_path: Path) -> None:
    text = sweep.recipe.model_dump(mode="json")
    text["data"]["normalise"] = "channels"
    text["models"]["dis"]["drop_path"] = 0.3
    text["train"] |= {"batch_images": 32, "learning_rate": 2e-3, "resume_every_images": 77}
    other = sweep_at(tmp_path, "other", Recipe.model_validate(text, strict=False))
    put(other, Sampled("dis", 160), 4.0)
    for each, vae in ((sweep, "a" * 64), (other, "b" * 64)):
        state.use_latents(each, each.store / "latents/0", vae)
    a, b = collect(sweep), collect(other)
    words = compared(a, b)
    assert f"VAE differs: {'a' * 12} and {'b' * 12}" in words
    assert "data.normalise differs: vae and channels" in words
    assert "train.batch_images differs: 16 and 32" in words
    assert "train.learning_rate differs: 0.001 and 0.002" in words
    assert "resume_every_images" not in words
    assert "models.dis.drop_path differs: 0.1 and 0.3" in words
    assert "differs" not in compared(a, a)


def test_three_seeds_need_more_than_two_standard_errors() -> None:
    """Welch's test as scipy has it for the values themselves."""
    for shift in (0.6, 0.9):
        mine, theirs = np.array([9.0, 9.4, 9.8]), np.array([9.0, 9.3, 9.6]) - shift
        points = [SimpleNamespace(seeds=3) for _ in range(2)]
        errors = [float(np.std(values, ddof=1) / np.sqrt(3)) for values in (mine, theirs)]
        made = compare.Difference(*points, float(theirs.mean() - mine.mean()), *errors)
        assert made.significant == (stats.ttest_ind(mine, theirs, equal_var=False).pvalue < 0.05)
        assert abs(made.change) > 2 * (made.error or 0)


def test_a_seed_that_is_missing_at_a_count_is_noted(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["models.dit.seeds=2"]))
    for model, images in [("dit", 160), ("dit-seed-1", 160), ("dit-seed-1", 320)]:
        put(made, Sampled(model, images), 9.0)
    report = collect(made)
    assert [(p.model, p.images_seen, p.seeds) for p in report.main] == [("dit", 160, 2), ("dit", 320, 1)]
    assert "dit at 320 images: 1 of 2 seeds are measured" in " ".join(shown(reports.table(report)).split())
    assert len(figures.distance_images(report).axes[0].get_legend().get_texts()) == 1


def test_a_fork_is_no_other_seed(tmp_path: Path) -> None:
    recipe = reading.with_model(reading.load(TINY), "again", reading.load(TINY).models["dit"])
    made = sweep_at(tmp_path, "tiny", recipe)
    for model in ("dit", "again"):
        put(made, Sampled(model, 320), 9.0)
    assert [(p.model, p.seeds) for p in collect(made).main] == [("dit", 1), ("again", 1)]


def test_a_forks_past_is_that_of_its_origin(tmp_path: Path) -> None:
    """Its copied points are left out, its random start is the origin's, and a comparison names where it began."""
    recipe = reading.load(TINY, ["train.ema=0.9999", "train.ema_ramp=null", "train.decay=linear"])
    model = recipe.models["dit"]
    settings = model.train.model_copy(update={"ema": 0.5, "decay": "none"})
    made, plain = (
        sweep_at(tmp_path, name, reading.with_model(recipe, "again", model.model_copy(update={"train": settings})))
        for name in ("forked", "plain")
    )
    for each in (made, plain):
        for name, images in (("dit", 160), ("again", 160), ("again", 176)):
            put(each, Sampled(name, images), 9.0)
    Origin(model="dit", images=160).write(made.run("again").folder)
    points = {(p.model, p.images_seen): p for p in collect(made).points}
    assert list(points) == [("dit", 160), ("again", 176)]
    assert points["again", 176].start_share == pytest.approx(0.9999**10 * 0.5)
    assert "forked_from differs: null and dit at 160 images" in compared(collect(plain), collect(made))


def test_branches_are_paired_with_branches(tmp_path: Path) -> None:
    sweeps = []
    for name in ("a", "b"):
        made = sweep_at(tmp_path, name, reading.load(TINY, ["train.cooldowns={images: [160, 320], share: 0.5}"]))
        for model, images in [("dit", 320), ("dit-at-160", 160), ("dit-at-320", 320)]:
            put(made, Sampled(model, images), 9.0)
        sweeps.append(collect(made))
    assert compare.by_cost(*sweeps) == {name: name for name in ("dit", "dit-at-160", "dit-at-320")}


def test_models_of_other_names_are_compared_by_pairs_or_by_cost(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    text = recipe.model_dump(mode="json")
    text["models"] = {"large": text["models"]["dis64"], "other": text["models"]["dis"] | {"width": 256}}
    made = sweep_at(tmp_path, "renamed", Recipe.model_validate(text, strict=False))
    put(made, Sampled("large", 160), 4.0)
    put(made, Sampled("other", 160), 3.0)
    a, b = collect(sweep), collect(made)
    assert compare.by_cost(a, b) == {"dis64": "large"}
    (difference,) = compare.differences(a, b, compare.by_cost(a, b))
    assert difference.change == -1.0
    assert "dis64 = other" in compared(a, b, {"dis64": "other"})
    with pytest.raises(UserError, match=r"renamed has no model 'dis': it has large, other"):
        compare.differences(a, b, {"dis": "dis"})
    lines = [line.get_text() for line in figures.both(a, b).axes[0].get_legend().get_texts()]
    assert lines == ["tiny: dis at 160", "renamed: dis at 160"]


def test_sweeps_that_cannot_be_compared_are_refused(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    a, empty = collect(sweep), collect(sweep_at(tmp_path, "empty", recipe))
    with pytest.raises(UserError, match="tiny and empty have no model at one image count in common: name pairs"):
        compare.differences(a, empty, {})
    for changes, words in (
        ({"evaluate": {"samples": 81}}, "tiny was measured by fd_digits_80, tiny by fd_digits_81: these cannot"),
        (
            {"data": {"crop": (0, 0, 8)}},
            r"data.crop: tiny has null, tiny has \[0, 0, 8\]: their distances cannot be compared",
        ),
        ({"data": {"resolution": 64}}, "data.resolution: tiny has 32, tiny has 64: their distances cannot be compared"),
    ):
        parts = {part: getattr(recipe, part).model_copy(update=change) for part, change in changes.items()}
        other = sweep_at(tmp_path, "tiny", recipe.model_copy(update=parts))
        with pytest.raises(UserError, match=words):
            compare.differences(a, collect(other), {})


def test_the_plan_derives_the_batch_and_names_the_price(tiny: Recipe) -> None:
    text = " ".join(shown(plans.table(price_sweep(tiny, SHAPE))).split())
    assert (
        "batch 16 = 4 lanes x 4, up to 2 lanes on each of 2 workers; 320 images = 20 steps; ZeRO stage 1, fp32" in text
    )
    assert "22,304" in text


def test_the_plan_names_the_rates_of_a_base_width() -> None:
    recipe = reading.load(TINY, ["models.dit.train.base_width=8"])
    text = " ".join(shown(plans.table(price_sweep(recipe, SHAPE))).split())
    assert "dit: learning rate of sums over the width x 0.5 (width 16, base_width 8)" in text
    assert "dis: learning rate" not in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "a node's cache (20 GiB) holds 48% of them, and each node reads 38.32 GB an epoch after the first"),
        (["reader.cache_gib=60"], "holds 100% of them, and each node reads 0.00 GB an epoch after the first"),
        (["reader.cache_gib=0"], "each worker reads them all in every epoch, since a node has no cache"),
        (["reader.memory_gib=50"], "kept in each worker's memory, and read once"),
    ],
)
def test_the_plan_names_what_is_read_in_an_epoch(settings: list[str], words: str) -> None:
    priced = plans.price_reading(reading.load(TINY, settings), LatentShape(4, 32), 1_281_167)
    assert priced.startswith("1,281,167 images, ")
    assert priced.endswith(words)
