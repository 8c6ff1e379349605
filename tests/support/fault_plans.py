"""For the tables of faults: train through a fault plan, and compare the result with the undisturbed run's."""

import re
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from dis_scale.process import faults
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Run, state
from dis_scale.sweep.documents import PublishedManifest
from dis_scale.tracking.rows import RowReader
from dis_scale.training import resume
from tests.support import ranks

MODEL = "dit"
TIMED = {"attempt", "images_per_s", "tokens_per_s", "mfu", "memory_gib", "paused", "start_s", "restart_s", "noticed_s", "goodput"}
"""Rows that measure the machine, not the run."""


def run_of(root: Path, recipe: Recipe) -> Run:
    return ranks.sweep_of(root, recipe).run(MODEL)


def done(root: Path, recipe: Recipe) -> bool:
    return recipe.train.images in state.published_counts(run_of(root, recipe))


def train_through(recipe: Recipe, root: Path, plan: str, attempts: int = 8) -> list[str]:
    """Run attempts until everything is published, as reruns of the command do; return what ended each failed one."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "faults").write_text(plan)
    ended: list[str] = []
    for attempt in range(1, attempts + 1):
        try:
            ranks.run(recipe, MODEL, root, attempt, faults=root / "faults")
        except (ProcessRaisedException, ProcessExitedException) as error:
            ended.append(str(error).strip().splitlines()[-1])
        if done(root, recipe):
            return ended
    raise AssertionError(f"not done after {attempts} attempts: {ended}")


def left(root: Path) -> list[str]:
    """Return the faults of the plan that have not happened as often as planned."""
    plan = faults.load(root / "faults")
    marks = [path.name.split(".")[0] for path in plan.spent.glob("*")]
    return [fault.action for number, fault in enumerate(plan.faults) if marks.count(str(number)) != fault.times]


def made(root: Path, recipe: Recipe) -> dict[str, Any]:
    """Return what a run leaves for good: hashes of its published files and of its last state, and its rows."""
    run = run_of(root, recipe)
    last = resume.newest_point(run, print)
    assert last is not None
    rows = [row for row in RowReader(run.log).new() if row.name not in TIMED]
    return {
        "published": {n: published_hashes(run.published_at(n)) for n in state.published_counts(run)},
        "state": (
            last.manifest.images,
            last.manifest.progress.adam_step,
            {name: file.sha256 for name, file in last.manifest.files.items()},
        ),
        "rows": sorted((row.name, row.images, row.value) for row in rows),
    }


def published_hashes(folder: Folder) -> dict[str, str]:
    """Return the hash of each average in a published folder; the number of the attempt in its file's name is left out."""
    files = PublishedManifest.require(folder).files
    return {re.sub(r"-\d{4}(\.safetensors)$", r"\1", name): file.sha256 for name, file in files.items()}
