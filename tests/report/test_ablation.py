"""An ablation's differences have the errors that labels and noise in common leave."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from dis_scale.recipe import Recipe
from dis_scale.report import ablation, drawing
from dis_scale.sweep import Sampled, state
from tests.support.documents import put_metrics
from tests.support.evaluations import sweep_at


def test_differences_from_the_lowest_have_the_paired_error(tmp_path: Path, tiny: Recipe) -> None:
    sweep, metric, scales = sweep_at(tmp_path, "tiny", tiny), tiny.evaluate.metric, [1.0, 1.5, 2.0]
    for variant, distance in zip(state.ablations(tiny.evaluate, "guidance", scales), (9.0, 7.0, 8.0), strict=True):
        values, lists = {metric: distance, f"{metric}_error": 2.0}, {metric: tuple(distance + i % 4 for i in range(20))}
        put_metrics(sweep.evaluation(Sampled("dis", 160, variant)), values, left_out=lists)
    console = Console(width=100, record=True, file=io.StringIO())
    found = ablation.write(sweep, "dis", 160, "guidance", scales, console)
    assert [(row["above_lowest"], row["above_lowest_error"]) for row in found.values()] == [(2, 0), (0, 0), (1, 0)]
    assert "9 ± 2" in (text := console.export_text())
    assert "2 ± 0" in text
    (name,) = (name for name in sweep.report.list() if name.endswith(".csv"))
    svg = sweep.report.read(name.replace(".csv", ".svg")).decode()
    assert drawing.colours_of(sweep.recipe)["dis"] in svg, "the model's own colour"
    rows = list(csv.DictReader(io.StringIO(sweep.report.read(name).decode())))
    assert [float(row["above_lowest"]) for row in rows] == pytest.approx([2, 0, 1])
