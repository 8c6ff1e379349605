"""The report is made from what was evaluated, and says what failed."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from dis_scale import plan as plans
from dis_scale import report as reports
from dis_scale.evaluation import results
from dis_scale.recipe import LatentShape, Recipe
from dis_scale.storage import Folder, folder


@pytest.fixture
def sweep(tmp_path: Path) -> Folder:
    made = folder(tmp_path) / "sweeps/tiny"
    for model, images, distance in [("dis", 0, 90.0), ("dis", 160, 9.0), ("dit", 160, 7.0)]:
        values = {
            "fd_digits_80": distance,
            "fd_digits_80_error": 0.5,
            "fd_digits_80_floor": 0.25,
            "class_accuracy": 0.5,
            "samples": 80,
        }
        results.folder(made, model, images).write_json(results.METRICS, values)
    (made / "runs/dit").write_json(results.ENDED, {"why": "a worker was lost 4 times"})
    return made


def collect(sweep: Folder, recipe: Recipe) -> reports.Report:
    return reports.collect(sweep, plans.plan(recipe, LatentShape(4, 8)))


def test_points_carry_true_cost_and_distance(sweep: Folder, tiny: Recipe) -> None:
    report = collect(sweep, tiny)
    rows = list(csv.DictReader(io.StringIO(reports.to_csv(report).decode())))
    assert [(r["model"], r["images"], r["fd_digits_80"]) for r in rows] == [
        ("dis", "0", "90.0"),
        ("dis", "160", "9.0"),
        ("dit", "160", "7.0"),
    ]
    assert float(rows[0]["gmacs_forward"]) == pytest.approx(
        plans.plan(tiny, LatentShape(4, 8)).costs["dis"].gmacs_forward, rel=1e-5
    )
    assert report.floor == 0.25


def test_the_figure_has_a_line_for_each_count_a_point_a_model_and_the_floor(sweep: Folder, tiny: Recipe) -> None:
    axes = reports.figure(collect(sweep, tiny)).axes[0]
    drawn = {tuple(line.get_ydata()) for line in axes.lines}
    assert {(9.0,), (7.0,), (0.25, 0.25)} <= drawn
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["160"]
    assert {"dis", "dit"} <= {text.get_text() for text in axes.texts}


def test_files_are_written_and_a_failed_model_is_marked(sweep: Folder, tiny: Recipe) -> None:
    report = collect(sweep, tiny)
    files = reports.write(sweep, report)
    assert sorted(files) == (sweep / "report").list() == ["gflops_fid.csv", "gflops_fid.png", "gflops_fid.svg"]
    console = Console(width=120, record=True, quiet=False, file=io.StringIO())
    console.print(reports.table(report))
    assert "a worker was lost 4 times" in console.export_text()


def test_the_plan_derives_the_batch_and_names_the_price(tiny: Recipe) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plans.table(plans.plan(tiny, LatentShape(4, 8))))
    text = " ".join(console.export_text().split())
    assert "batch 16 = 2 workers x 2 accumulated x 4; 320 images = 20 steps; ZeRO stage 1, fp32" in text
    assert "22,304" in text
