"""The points of a report: seeds are one point, a fork is none of them."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dis_scale import report as reports
from dis_scale.recipe import reading
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.report import figures
from dis_scale.sweep import Sampled
from dis_scale.sweep.documents import Origin
from tests.conftest import TINY
from tests.support.evaluations import collect, compared, put, shown, sweep_at


def test_seeds_of_a_model_are_one_point_with_their_error(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["models.dit.seeds=3"]))
    for model, distance in [("dit", 9.0), ("dit-seed-1", 10.0), ("dit-seed-2", 14.0), ("dis", 5.0)]:
        put(made, Sampled(model, 320), distance)
    report = collect(made)
    (mean,) = (p for p in report.main if p.kind == "dit")
    assert (mean.model, mean.seeds, report.distance(mean)) == ("dit", 3, 11.0)
    spread = np.std([9, 10, 14], ddof=1) / np.sqrt(3)
    assert report.error(mean) == pytest.approx(np.hypot(spread, 0.5)), "the seeds share the noise of their samples"
    text = shown(reports.table(report))
    assert "dit (3 seeds)" in text
    assert "11 ± 1.6" in text
    assert "over several seeds also of training" in text
    rows = list(csv.DictReader(io.StringIO(reports.write(made, report)[reports.CSV].decode())))
    assert [row["model"] for row in rows] == ["dis", "dit", "dit-seed-1", "dit-seed-2"]


def test_a_seed_that_is_missing_at_a_count_is_noted(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["models.dit.seeds=2"]))
    for model, images in [("dit", 160), ("dit-seed-1", 160), ("dit-seed-1", 320)]:
        put(made, Sampled(model, images), 9.0)
    report = collect(made)
    assert [(p.model, p.images_seen, p.seeds) for p in report.main] == [("dit", 160, 2), ("dit", 320, 1)]
    assert "dit at 320 images: 1 of 2 seeds are measured" in shown(reports.table(report))
    assert len(figures.distance_images(report).axes[0].containers) == 1
    for model, images, loss in [("dit", 160, 0.9), ("dit-seed-1", 160, 0.8), ("dit", 320, 0.7)]:
        put(made, Sampled(model, images), 9.0, **{HELD_OUT: loss})
    assert figures.compute_loss(collect(made)), "of which one point has an error, and one has none"


def test_points_without_the_curves_metric_are_named_and_not_drawn(tmp_path: Path) -> None:
    """It was added to the recipe later, and chosen; the next run measures it."""
    made = sweep_at(tmp_path, "tiny", reading.load(TINY))
    for images in (160, 320):
        put(made, Sampled("dit", images), 9.0)
    settings = {"metrics": ("distance", "distance_infinity"), "curve": "distance_infinity"}
    later = replace(made, recipe=made.recipe.model_copy(update={"evaluate": made.recipe.evaluate.model_copy(update=settings)}))
    report = collect(later)
    assert report.points == []
    assert "dit at 320 images skipped: it was measured without fd_digits_infinity_80" in " ".join(
        shown(reports.table(report)).split()
    )


def test_branches_of_one_trunk_are_no_seeds(tmp_path: Path) -> None:
    """They share its first part; those of trunks with other seeds are."""
    branch = "{kind: dit, width: 16, depth: 1, heads: 2, patch: 4, branch: {of: %s, at: 160}, train: {publish_images: [320]}%s}"
    how = [f"models.a={branch % ('dit', ', seeds: 3')}", "models.dit.seeds=2", f"models.b={branch % ('dit-seed-1', '')}"]
    groups = reading.load(TINY, how).seed_groups()
    assert (groups["a-seed-1"], groups["a-seed-2"]) == ("a-seed-1", "a-seed-2")
    assert groups["b"] == groups["a"] == "a"


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
