"""Evaluate, a Ray job of its own beside training: sees each new published folder, draws, measures, writes metrics and a grid.

Blocks of samples are the unit and are kept, so that an evaluation that was killed goes on where it was. On a small machine its
workers ask for no CPU and run at low priority: one that asked for a CPU first would keep training waiting for ever.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from dis_scale import vae
from dis_scale.checkpoint import images_name
from dis_scale.data import shards
from dis_scale.errors import DisScaleError, StorageError
from dis_scale.evaluation import reference, results
from dis_scale.evaluation.measure import measure
from dis_scale.evaluation.sample import GRID, Block, grid, open_studio
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder
from dis_scale.tracking import Projection, Row
from pipelines import stage

LOOK_EVERY_S = 2.0
NICE = 19
COLUMNS = 10
"""Of the grid; with ten classes, one a class."""


class Evaluator(stage.Worker):
    """Draws blocks; progress counts blocks."""

    def __init__(self, sweep: Folder, recipe: Recipe, device: str) -> None:
        super().__init__()
        os.nice(NICE)
        torch.set_num_threads(1)
        where = torch.device(device)
        decoder = vae.load(recipe.vae, sweep)
        shards.require_vae(sweep, decoder.identity)
        decoder.net.to(where)
        self.studio = open_studio(recipe, sweep, decoder, where)

    def draw(self, model: str, images: int, blocks: list[int]) -> None:
        torch.set_num_threads(1)
        drawn, folder = self.studio.model(model, images), results.folder(self.studio.sweep, model, images)
        for block in blocks:
            if self._wish.is_set():
                return
            folder.write(block_name(block), self.studio.draw(drawn, block).to_bytes())
            self._done += 1


@dataclass
class Evaluation:
    """One sweep's evaluation: its workers and the references by extractor."""

    sweep: Folder
    recipe: Recipe
    workers: list[Any]
    references: dict[str, reference.Reference]

    @property
    def blocks(self) -> int:
        return -(-self.recipe.evaluate.samples // self.recipe.evaluate.block_images)

    def evaluate(self, model: str, images: int) -> None:
        """Draws what is missing of one published checkpoint and writes its grid and, last, its metrics."""
        folder = results.folder(self.sweep, model, images)
        kept = {b: _whole_block(folder, b) for b in range(self.blocks)}
        left = [b for b, block in kept.items() if block is None]
        share = len(self.workers)
        parts = [w.draw.remote(model, images, left[i::share]) for i, w in enumerate(self.workers)]
        stage.watch(self.workers, parts, lambda done: self._report(sum(done)))
        stage.leave_if_asked()
        blocks = [block or _read_block(folder, b) for b, block in kept.items()]
        measured = self._measure(blocks)
        folder.write(results.GRID, grid(np.concatenate([b.pictures for b in blocks])[:GRID], COLUMNS))
        folder.write_json(results.METRICS, self._facts(model, images) | measured)
        self.log(model, images)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        stage.say(f"{model} at {images} images: {shown}")

    def log(self, model: str, images: int) -> None:
        """Mirrors one evaluation into MLflow, where it is not there yet."""
        folder, projection = results.folder(self.sweep, model, images), Projection(self.sweep, model)
        values, metric = folder.read_json(results.METRICS), self.recipe.evaluate.metric
        names = [name for name in (metric, f"{metric}_error", "class_accuracy") if name in values]
        projection.send([Row(name, values[name], images, values["time"]) for name in names])
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"samples-{images_name(images)}.png"
            path.write_bytes(folder.read(results.GRID))
            projection.send_file(path, "samples")

    def _measure(self, blocks: list[Block]) -> dict[str, float]:
        return measure(blocks, self.references, self.recipe.evaluate)

    def _facts(self, model: str, images: int) -> dict[str, Any]:
        drawn = self.recipe.evaluate.model_dump(include={"samples", "sampler", "steps", "guidance"})
        return {"format": 1, "model": model, "images": images, "time": time.time()} | drawn

    def _report(self, done: int) -> None:
        wanted = len(self.recipe.models) * len(self.recipe.train.publish_images) * self.blocks
        stage.progress(done, wanted, "blocks")


def evaluate(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    """Evaluates each (model, published count) once, until all are done or their training has ended for good."""
    stage.connect()
    device, why = stage.choose_device(recipe)
    stage.say(f"evaluation on {device} ({why})")
    passed_over: set[tuple[str, int]] = set()
    stage.with_restarts(recipe, "evaluate", lambda: _evaluate_all(sweep, recipe, device, passed_over))
    if passed_over:
        raise DisScaleError(
            f"{len(passed_over)} published checkpoints could not be evaluated: {sorted(passed_over)[:3]}"
        )


def _evaluate_all(sweep: Folder, recipe: Recipe, device: str, passed_over: set[tuple[str, int]]) -> None:
    """Takes each new published folder as it comes; a damaged one is named, passed over and noted in `passed_over`."""
    options = _options(recipe, device)
    workers = [stage.spawn(Evaluator, options, sweep, recipe, device) for _ in range(recipe.evaluate.workers)]
    evaluation = Evaluation(sweep, recipe, workers, reference.load_all(sweep, recipe))
    for model in recipe.models:
        for images in results.evaluated_counts(sweep, model):
            evaluation.log(model, images)
    news = time.monotonic()
    while True:
        stage.leave_if_asked()
        over = results.nothing_more_to_come(sweep, recipe)  # asked first: what is published meanwhile is still seen
        todo = [pair for pair in results.published_but_not_evaluated(sweep, recipe) if pair not in passed_over]
        if todo:
            _evaluate_one(evaluation, todo[0], passed_over)
            news = time.monotonic()
        elif over:
            return
        elif time.monotonic() - news > recipe.evaluate.give_up_after_s:
            raise DisScaleError(
                f"nothing was published for {recipe.evaluate.give_up_after_s:.0f} s: is training running?"
            )
        else:
            stage.pause(LOOK_EVERY_S)


def _evaluate_one(evaluation: Evaluation, pair: tuple[str, int], passed_over: set[tuple[str, int]]) -> None:
    try:
        evaluation.evaluate(*pair)
    except StorageError as error:
        stage.say(f"passed over: {error}")
        passed_over.add(pair)


def _options(recipe: Recipe, device: str) -> dict[str, Any]:
    """What an evaluator asks for: a GPU of its own where training leaves one, else a share of one, which Ray is not told."""
    options = stage.resources("evaluate", device, 0)
    spare = int(ray.cluster_resources().get("GPU", 0)) - recipe.train.workers
    if device == "cuda" and spare < recipe.evaluate.workers:
        visible = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
        return options | {"num_gpus": 0, "runtime_env": visible}
    return options


def _read_block(folder: Folder, block: int) -> Block:
    return Block.from_bytes(folder.read(block_name(block)), f"{folder}/{block_name(block)}")


def _whole_block(folder: Folder, block: int) -> Block | None:
    """A block that an earlier evaluation left whole; a damaged one is named and will be drawn again."""
    try:
        return _read_block(folder, block)
    except FileNotFoundError:
        return None
    except StorageError as error:
        stage.say(f"drawn again: {error}")
        return None


def block_name(block: int) -> str:
    return f"block-{block:05d}.npz"
