"""A stage's program in one process, without Ray: driver and worker in one, entered as a Ray job enters it."""

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

from dis_scale import faults, vae
from dis_scale.data import shards
from dis_scale.data.encode import Setup
from dis_scale.data.sources import open_source
from dis_scale.evaluation import reference
from dis_scale.evaluation.results import Drawn
from dis_scale.evaluation.sampling import labels_of
from dis_scale.recipe import Evaluate, Recipe
from dis_scale.storage.folder import Folder
from pipelines import evaluate, precompute, stage
from pipelines.evaluate import Evaluation, Evaluator
from pipelines.precompute import Dealer, Encoder
from pipelines.prepare import Preparer
from tests.support import ranks

multiprocessing.set_forkserver_preload([*ranks.PRELOAD, __name__])
UNLIKE = (".part-", "/leases/")
"""In the names of files that nobody reads, or that say who wrote when."""


def run(name: str, sweep: Folder, plan: Path) -> tuple[int, str]:
    """The stage in a process of its own that meets the plan's accidents; its exit code and what it said."""
    said = plan.with_name("said")
    process = multiprocessing.get_context("forkserver").Process(target=_enter, args=(name, sweep.url, plan, said))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, said.read_text()


def _enter(name: str, url: str, plan: Path, said: Path) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faults.use(plan)
    stage.main({"prepare": _prepare, "precompute": _precompute, "evaluate": _evaluate}[name], url)


def _prepare(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    def attempt(_: stage.Lost | None) -> None:
        _obeying(Preparer()).prepare(sweep, recipe, "cpu")

    stage.with_restarts(recipe, "prepare", attempt, lambda: 0)


def _precompute(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    def encode(sweep: Folder, latents: Folder, setup: Setup, device: str, left: list[int]) -> None:
        _obeying(Encoder()).encode(sweep, latents, setup.recipe, device, Dealer(left).next)

    encoder = vae.load(recipe.vae, sweep)
    latents = shards.latents_folder(sweep, recipe, encoder.identity)
    setup = Setup(open_source(recipe.data, shards.store_of(sweep)), encoder, recipe)
    precompute.make(sweep, latents, setup, "cpu", encode)
    shards.point_to(sweep, latents, encoder.identity)


class Alone(Evaluation):
    """An evaluation whose one worker is this process."""

    def _draw(self, drawn: Drawn, drawing: Evaluate, blocks: list[int]) -> list[dict[str, float]]:
        return [self.workers[0].draw(drawn, drawing, blocks)]

    def _held_out(self, drawn: Drawn) -> dict[str, float]:
        return {} if drawn.variant else self.workers[0].held_out(drawn)


def _evaluate(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    def alone(
        sweep: Folder, recipe: Recipe, device: str, samplings: dict[str, Evaluate], checkpoints: int
    ) -> Evaluation:
        worker = _obeying(Evaluator(sweep, recipe, device))
        references = reference.load_all(sweep, recipe)
        return Alone(sweep, recipe, [worker], references, samplings, labels_of(sweep, recipe), checkpoints)

    evaluate.open_evaluation = alone
    stage.with_restarts(recipe, "evaluate", lambda _: evaluate._evaluate_all(sweep, recipe, "cpu", set()), lambda: 0)


def _obeying(worker: Any) -> Any:
    """The worker, to whom a wish of the driver is its own."""
    worker._wish = stage.wish
    return worker


def made(root: Path) -> dict[str, Any]:
    """All that lies below a root: each file's hash, of metrics their values."""
    files = {
        str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file() and not any(u in str(p) for u in UNLIKE)
    }
    return {name: _content(path) for name, path in files.items()}


def _content(path: Path) -> Any:
    if path.name == "metrics.json":
        return json.loads(path.read_text())["values"]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def whole(root: Path) -> dict[str, int]:
    """When each thing that stands for good was written: shards with a sidecar, folders with a manifest, blocks, metrics."""
    return {name: (root / name).stat().st_mtime_ns for name in made(root) if _sealed(root / name)}


def _sealed(path: Path) -> bool:
    if path.suffix == ".tar":
        return path.with_suffix(".json").exists()
    return path.suffix == ".npz" or path.name == "metrics.json" or (path.parent / "manifest.json").exists()
