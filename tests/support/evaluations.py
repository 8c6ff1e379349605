"""Sweeps with stored evaluations, and the settings of evaluations."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dis_scale import report as reports
from dis_scale.evaluation.sampling import grid
from dis_scale.planning.plan import price_sweep
from dis_scale.recipe import Evaluate, LatentShape, Recipe, Sampling, reading
from dis_scale.report import compare
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import GRID, Sampled, Sweep
from tests.conftest import TINY
from tests.support.documents import put_metrics

SHAPE = LatentShape(4, 8)


def put(sweep: Sweep, sampled: Sampled, distance: float, error: float = 0.5, **others: float) -> None:
    """Store the metrics and the grid of one evaluation."""
    metric = sweep.recipe.evaluate.metric
    values = {metric: distance, f"{metric}_error": error, "class_accuracy": 0.5} | others
    folder, sampling = sweep.evaluation(sampled), Sampling(sampler="ddim", steps=3, guidance=1.5)
    put_metrics(folder, values, samples=60, sampling=sampling, notes=["fid_60: not verified against published tables"])
    folder.write(GRID, grid(np.zeros((2, 8, 8, 3), np.uint8), 2))


def sweep_at(root: Path, name: str, recipe: Recipe) -> Sweep:
    return Sweep(open_folder(root) / "sweeps" / name, recipe)


def two_with_seeds(root: Path) -> list[Sweep]:
    """Two sweeps: the second one's `dit` is better over its three seeds, and both have the same `dis`."""
    sweeps = []
    for name, distances in (("a", [9.0, 9.2, 9.4]), ("b", [5.0, 5.2, 5.1])):
        made = sweep_at(root, name, reading.load(TINY, ["models.dit.seeds=3"]))
        for model, distance in zip(("dit", "dit-seed-1", "dit-seed-2"), distances, strict=True):
            put(made, Sampled(model, 320), distance)
        put(made, Sampled("dis", 320), distances[0])
        made.save_recipe()
        sweeps.append(made)
    return sweeps


def collect(sweep: Sweep) -> reports.Report:
    return reports.collect(sweep, price_sweep(sweep.recipe, SHAPE))


def evaluate(**changed: Any) -> Evaluate:
    """Change the tiny recipe's settings without validation: metrics of fewer samples than Inception has features."""
    base = reading.load(TINY).evaluate
    return base.model_copy(update=changed)


def shown(table: Table) -> str:
    """Return a table as text, with single spaces."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def compared(a: reports.Report, b: reports.Report, pairs: dict[str, str] | None = None) -> str:
    """Return the comparison of two sweeps as text; the models are paired by name unless given."""
    return shown(compare.comparison_table(a, b, compare.differences(a, b, compare.by_name(a, b) if pairs is None else pairs)))
