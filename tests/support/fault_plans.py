"""What the tables of faults share: train on through accidents, and ask whether all is as in the undisturbed run."""

from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from dis_scale import faults
from dis_scale.recipe import Recipe
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.tracking import Rows
from dis_scale.training import checkpoint
from tests.support import ranks

MODEL = "dit"
TIMED = {
    "attempt",
    "images_per_s",
    "tokens_per_s",
    "mfu",
    "memory_gib",
    "paused",
    "start_s",
    "restart_s",
    "noticed_s",
    "goodput",
}
"""Rows that measure the machine, not the run."""


def run_folder(root: Path) -> Folder:
    return open_folder(root) / "sweep/runs" / MODEL


def done(root: Path, recipe: Recipe) -> bool:
    return recipe.train.images in checkpoint.published(run_folder(root))


def train_through(recipe: Recipe, root: Path, plan: str, attempts: int = 8) -> list[str]:
    """Attempt after attempt until all is published, as the command given again does; what ended each that failed."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "faults").write_text(plan)
    ended: list[str] = []
    for attempt in range(1, attempts + 1):
        try:
            ranks.run(recipe, MODEL, root, attempt, faults=root / "faults")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            ended.append(str(error).strip().splitlines()[-1])
        if done(root, recipe):
            return ended
    raise AssertionError(f"not done after {attempts} attempts: {ended}")


def left(root: Path) -> list[str]:
    """The faults of the plan that have not struck as often as they were to."""
    plan = faults.load(root / "faults")
    marks = [path.name.split(".")[0] for path in plan.spent.glob("*")]
    return [fault.what for number, fault in enumerate(plan.faults) if marks.count(str(number)) != fault.times]


def made(root: Path, recipe: Recipe) -> dict[str, Any]:
    """All that a run leaves for good: hashes of what it published and of its last state, and its rows."""
    run = run_folder(root)
    last = checkpoint.newest(run, print)
    assert last is not None
    rows = [row for row in Rows(run / "log").new() if row.name not in TIMED]
    return {
        "published": {n: _hashes(run / "published" / checkpoint.images_name(n)) for n in checkpoint.published(run)},
        "state": (last.images, last.adam_step, {name: file["sha256"] for name, file in last.manifest["files"].items()}),
        "rows": sorted((row.name, row.images, row.value) for row in rows),
    }


def _hashes(place: Folder) -> dict[str, str]:
    found = manifest.find(place)
    assert found is not None
    return {name: file["sha256"] for name, file in found["files"].items()}
