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
import torch

from dis_scale import vae
from dis_scale.checkpoint import images_name
from dis_scale.errors import DisScaleError, StorageError
from dis_scale.evaluation import metrics, reference, results
from dis_scale.evaluation.features import load_extractor
from dis_scale.evaluation.sample import GRID, Block, Studio, grid
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder
from dis_scale.tracking import Projection, Row
from pipelines import stage

LOOK_EVERY_S = 2.0
NICE = 19


class Evaluator(stage.Worker):
    """Draws blocks; progress counts blocks."""

    def __init__(self, sweep: Folder, recipe: Recipe, device: str) -> None:
        super().__init__()
        os.nice(NICE)
        torch.set_num_threads(1)
        where = torch.device(device)
        decoder = vae.load(recipe.vae, sweep)
        decoder.net.to(where)
        self.studio = Studio(recipe, sweep, decoder, load_extractor(recipe.evaluate.extractor, sweep, where), where)

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
    """One sweep's evaluation: its workers and the reference."""

    sweep: Folder
    recipe: Recipe
    workers: list[Any]
    metric: str
    reference: reference.Reference

    @property
    def blocks(self) -> int:
        return -(-self.recipe.evaluate.samples // self.recipe.evaluate.block_images)

    def evaluate(self, model: str, images: int) -> None:
        """Draws what is missing of one published checkpoint and writes its grid and, last, its metrics."""
        folder = results.folder(self.sweep, model, images)
        there = set(folder.list())
        left = [b for b in range(self.blocks) if block_name(b) not in there]
        share = len(self.workers)
        parts = [w.draw.remote(model, images, left[i::share]) for i, w in enumerate(self.workers)]
        stage.watch(self.workers, parts, lambda done: self._report(sum(done)))
        stage.leave_if_asked()
        blocks = [Block.from_bytes(folder.read(block_name(b)), f"{folder}/{block_name(b)}") for b in range(self.blocks)]
        picture = grid(np.concatenate([b.pictures for b in blocks])[:GRID], self.recipe.data.num_classes)
        values = self._measure(blocks)
        folder.write(results.GRID, picture)
        folder.write_json(results.METRICS, {"format": 1, "model": model, "images": images, **values})
        self._log(model, images, values, picture)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float))
        stage.say(f"{model} at {images} images: {shown}")

    def _measure(self, blocks: list[Block]) -> dict[str, Any]:
        features = np.concatenate([b.features for b in blocks])
        right = np.concatenate([b.right for b in blocks])
        values: dict[str, Any] = {
            self.metric: metrics.frechet(metrics.fit(features), self.reference.gaussian),
            f"{self.metric}_error": metrics.frechet_error(features, self.reference.gaussian),
            f"{self.metric}_floor": self.reference.floor,
        }
        judged = {"class_accuracy": float((right == 1).mean())} if (right >= 0).all() else {}
        settings = self.recipe.evaluate
        drawn = {
            "samples": len(features),
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance": settings.guidance,
        }
        return values | judged | drawn

    def _log(self, model: str, images: int, values: dict[str, Any], picture: bytes) -> None:
        projection, now = Projection(self.sweep, model), time.time()
        projection.send(
            [Row(k, v, images, now) for k, v in values.items() if isinstance(v, float) and not k.endswith("_floor")]
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"samples-{images_name(images)}.png"
            path.write_bytes(picture)
            projection.send_file(path, "samples")

    def _report(self, done: int) -> None:
        wanted = len(self.recipe.models) * len(self.recipe.train.publish_images) * self.blocks
        stage.progress(done, wanted, "blocks")


def evaluate(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    """Evaluates each (model, published count) once, until all are done or their training has ended for good."""
    stage.connect()
    device, why = stage.choose_device(recipe)
    stage.say(f"evaluation on {device} ({why})")
    extractor = load_extractor(recipe.evaluate.extractor, sweep, torch.device("cpu"))
    options = stage.resources("evaluate", device, 0)
    workers = [stage.spawn(Evaluator, options, sweep, recipe, device) for _ in range(recipe.evaluate.workers)]
    real = reference.load(sweep, recipe.data, extractor)
    evaluation = Evaluation(sweep, recipe, workers, extractor.metric, real)
    passed_over: set[tuple[str, int]] = set()
    news = time.monotonic()
    while True:
        stage.leave_if_asked()
        todo = [pair for pair in results.published_but_not_evaluated(sweep, recipe) if pair not in passed_over]
        if not todo and results.nothing_more_to_come(sweep, recipe):
            break
        if not todo:
            if time.monotonic() - news > recipe.evaluate.give_up_after_s:
                raise DisScaleError(
                    f"nothing was published for {recipe.evaluate.give_up_after_s:.0f} s: is training running?"
                )
            stage.pause(LOOK_EVERY_S)
            continue
        news = time.monotonic()
        try:
            evaluation.evaluate(*todo[0])
        except StorageError as error:
            stage.say(f"passed over: {error}")
            passed_over.add(todo[0])
    if passed_over:
        raise DisScaleError(
            f"{len(passed_over)} published checkpoints could not be evaluated: {sorted(passed_over)[:3]}"
        )


def block_name(block: int) -> str:
    return f"block-{block:05d}.npz"
