"""The report's files: a table, figures, and one page that is self-contained."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dis_scale import report as reports
from dis_scale.planning.plan import price_sweep
from dis_scale.process.errors import UserError
from dis_scale.recipe import Recipe, Sampling
from dis_scale.sweep import Sampled, Sweep
from tests.support.commands import answer
from tests.support.evaluations import SHAPE, collect, put, sweep_at


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
    assert float(rows[1]["thop_gflops"]) == cost.thop_gflops
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
    assert (difference["a"]["model"], difference["change"], difference["error"]) == ("dis32", 1.5, pytest.approx(0.5**0.5))


def test_the_files_of_a_report_are_the_figures_the_pages_and_the_csv(sweep: Sweep) -> None:
    text = reports.write(sweep, collect(sweep))[reports.PAGE].decode()
    assert "dit failed" in text
    assert "n = 4 (few points)" in text
    assert sorted(sweep.report.list()) == sorted(
        [reports.CSV, reports.PAGE, "samples.html"]
        + [f"{name}.{ending}" for name in ("gflops_fid", "compute_fid", "fid_images") for ending in ("png", "svg")]
    )


def test_a_sweep_without_evaluations_has_a_report(tmp_path: Path, recipe: Recipe) -> None:
    empty = sweep_at(tmp_path, "tiny", recipe)
    assert sorted(reports.write(empty, collect(empty))) == [reports.CSV, reports.PAGE]


def imagenet(report: reports.Report, changes: dict[str, Any], **sampling: Any) -> reports.Report:
    """Return the report as if it were of ImageNet with the published points' protocol, except for the changes."""
    recipe = report.recipe
    data = recipe.data.model_copy(update={"resolution": 256, "num_classes": 1000})
    settings = recipe.evaluate.model_copy(update={"reference": "https://host/VIRTUAL_imagenet256_labeled.npz"} | changes)
    made = Sampling(**(dict[str, Any](sampler="ddpm", steps=250, guidance=1.0) | sampling))
    points = [
        replace(
            p, values={"fid": 20.0}, images_seen=102_400_000, evaluation=p.evaluation.changed(sampling=made, labels="uniform")
        )
        for p in report.points if p.images_seen and not p.variant
    ]  # fmt: skip
    return replace(report, metric="fid", recipe=recipe.model_copy(update={"data": data, "evaluate": settings}), points=points)


def test_published_points_are_drawn_beside_the_same_images_reference_and_samples_only(sweep: Sweep) -> None:
    report = collect(sweep)
    page = reports.write(sweep, imagenet(report, {}), published=True)[reports.PAGE].decode()
    assert "ADM&#x27;s reference; published points have batch 256, here it is 16<" in page
    digits = replace(report, metric="fid", points=[replace(p, values={"fid": 20.0}) for p in report.points])
    for unlike, words in (
        (
            digits,
            "32 pixels and 10 classes, reference of its own images, no point at 102,400,000 images, guidance 1.5, 3 steps, ddim",
        ),
        (imagenet(report, {"reference": None}), "reference of its own images:"),
        (imagenet(report, {"reference": "VIRTUAL_lsun_bedroom256.npz"}), "reference VIRTUAL_lsun_bedroom256.npz:"),
        (imagenet(report, {}, guidance=1.5), "guidance 1.5:"),
        (imagenet(report, {}, sampler="ddim", steps=50), "50 steps, ddim:"),
    ):
        with pytest.raises(UserError, match=f"tiny has {words}"):
            reports.write(sweep, unlike, published=True)
