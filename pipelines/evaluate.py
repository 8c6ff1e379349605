"""Evaluate, a Ray job of its own beside training: sees each new published folder, draws, measures, writes metrics and a grid.

Blocks of samples are the unit and are kept, so that an evaluation that was killed goes on where it was. On a small machine its
workers ask for no CPU and run at low priority: one that asked for a CPU first would keep training waiting for ever.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from dis_scale import diffusion, manifest, mirror, vae
from dis_scale.data import shards
from dis_scale.data.latents import Latents
from dis_scale.errors import DisScaleError, Preempted, StorageError, UserError
from dis_scale.evaluation import held_out, measure, reference, results
from dis_scale.evaluation.results import Drawn
from dis_scale.evaluation.sample import COLUMNS, Block, arranged, grid, labels_of, open_studio
from dis_scale.recipe import MAIN, Evaluate, Recipe
from dis_scale.storage import Folder
from pipelines import stage

LOOK_EVERY_S = 2.0
NICE = 19


class Evaluator(stage.Worker):
    """Draws blocks and measures the held-out loss; progress counts blocks."""

    def __init__(self, sweep: Folder, recipe: Recipe, device: str) -> None:
        super().__init__()
        os.nice(NICE)
        torch.set_num_threads(1)
        where = torch.device(device)
        decoder = vae.load(recipe.vae, sweep)
        shards.require_vae(sweep, decoder.identity)
        decoder.net.to(where)
        self.studio = open_studio(recipe, sweep, decoder, where)

    def draw(self, drawn: Drawn, drawing: Evaluate, blocks: list[int]) -> dict[str, float]:
        """Draws and keeps blocks; returns the seconds that each part took, and the samples drawn as `images`."""
        torch.set_num_threads(1)
        studio, folder, images = self.studio, results.folder(self.studio.sweep, drawn), 0
        model, before = studio.model(drawn.model, drawn.images, drawing), dict(studio.seconds)
        for block in blocks:
            if self._wish.is_set():
                break
            made = studio.draw(model, drawing, block)
            folder.write(block_name(block), made.to_bytes())
            self._done, images = self._done + 1, images + len(made.right)
        return {part: seconds - before[part] for part, seconds in studio.seconds.items()} | {"images": images}

    def held_out(self, drawn: Drawn) -> dict[str, float]:
        """The loss on the images that training never saw."""
        torch.set_num_threads(1)
        recipe, settings = self.studio.recipe, self.studio.recipe.evaluate
        latents = Latents(shards.latents_of(self.studio.sweep), recipe.seed, recipe.data.held_out_images)
        model = self.studio.model(drawn.model, drawn.images, settings)
        return held_out.losses(model, diffusion.build(recipe.diffusion), latents, recipe.seed, settings.batch_images)


@dataclass
class Evaluation:
    """One sweep's evaluation: its workers, the references by extractor, and each way to draw by name."""

    sweep: Folder
    recipe: Recipe
    workers: list[Any]
    references: dict[str, reference.Reference]
    drawings: dict[str, Evaluate]
    labels: np.ndarray
    checkpoints: int

    def evaluate(self, drawn: Drawn) -> dict[str, float]:
        """Draws what is missing of one published checkpoint and writes its grid and, last, its metrics; returns them."""
        folder, drawing = results.folder(self.sweep, drawn), self.drawings[drawn.variant]
        left = [b for b in range(_block_count(drawing)) if not _whole(folder, b)]
        share = len(self.workers)
        parts = [w.draw.remote(drawn, drawing, left[i::share]) for i, w in enumerate(self.workers)]
        spent = stage.watch(self.workers, parts, lambda done: self._report(sum(done)))
        values = self._held_out(drawn)
        stage.leave_if_asked()
        began = time.monotonic()
        measured, pictures = self._measure(folder, drawing)
        values |= measured
        folder.write(results.GRID, grid(arranged(pictures, self.labels), COLUMNS))
        notes = measure.notes(self.references, drawing)
        seconds = _seconds(spent) | {"metrics": time.monotonic() - began}
        folder.write_json(
            results.METRICS, _facts(drawn, drawing) | {"notes": notes, "values": values, "seconds": seconds}
        )
        folder.delete(results.DAMAGED)
        mirror.evaluation(self.sweep, drawn)
        return values

    def _held_out(self, drawn: Drawn) -> dict[str, float]:
        """The held-out loss belongs to the checkpoint, however samples are drawn: it stands beside the main ones."""
        if drawn.variant or not self.recipe.data.held_out_images:
            return {}
        (values,) = stage.watch(self.workers, [self.workers[0].held_out.remote(drawn)], lambda _: None)
        return values

    def _measure(self, folder: Folder, drawing: Evaluate) -> tuple[dict[str, float], np.ndarray]:
        """All metrics, and the grid's pictures, with one block in memory at a time."""
        pictures = []

        def blocks() -> Iterator[Block]:
            for b in range(_block_count(drawing)):
                block = _read_block(folder, b)
                pictures.append(block.pictures)
                yield block

        return measure.measure(blocks(), self.references, drawing), np.concatenate(pictures)

    def _report(self, done: int) -> None:
        stage.progress(done, self.checkpoints * sum(map(_block_count, self.drawings.values())), "blocks")


def evaluate(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    """Evaluates each (model, published count) once in each way, until all are done or their training has ended for good."""
    stage.connect()
    device, why = stage.choose_device(recipe)
    stage.say(f"evaluation on {device} ({why})")
    skipped: set[Drawn] = set()
    stage.with_restarts(recipe, "evaluate", lambda: _evaluate_all(sweep, recipe, device, skipped))


def vary(sweep: Folder, recipe: Recipe, arguments: list[str]) -> None:
    """Draws one published checkpoint with other values of one setting, each a variant of its own; finished ones are kept."""
    model, images, setting, *values = arguments
    stage.connect()
    device, _ = stage.choose_device(recipe)
    drawings = results.varied(recipe.evaluate, setting, [float(value) for value in values])
    evaluation = open_evaluation(sweep, recipe, device, drawings, checkpoints=1)
    for variant in drawings:
        drawn = Drawn(model, int(images), variant)
        if not results.folder(sweep, drawn).exists(results.METRICS):
            stage.say(_shown(drawn, evaluation.evaluate(drawn)))


def _evaluate_all(sweep: Folder, recipe: Recipe, device: str, skipped: set[Drawn]) -> None:
    """Takes each new published folder as it comes; what cannot be measured is named, noted in storage and skipped."""
    checkpoints = len(recipe.models) * len(recipe.train.publish_images)
    evaluation = open_evaluation(sweep, recipe, device, recipe.evaluate.drawings, checkpoints)
    for model in recipe.models:
        for variant in recipe.evaluate.drawings:
            for images in results.evaluated_counts(sweep, model, variant):
                mirror.evaluation(sweep, Drawn(model, images, variant))
    news = time.monotonic()
    while True:
        stage.leave_if_asked()
        over = results.nothing_more_to_come(sweep, recipe)  # asked first: what is published meanwhile is still seen
        todo = [drawn for drawn in results.to_do(sweep, recipe) if drawn not in skipped]
        if todo:
            _evaluate_one(evaluation, todo[0], skipped)
            news = time.monotonic()
        elif over:
            return
        elif time.monotonic() - news > recipe.evaluate.give_up_after_s:
            raise DisScaleError(
                f"nothing was published for {recipe.evaluate.give_up_after_s:.0f} s: is training running?"
            )
        else:
            stage.pause(LOOK_EVERY_S)


def open_evaluation(
    sweep: Folder, recipe: Recipe, device: str, drawings: dict[str, Evaluate], checkpoints: int
) -> Evaluation:
    """The evaluation with its workers on Ray."""
    options = _options(recipe, device)
    workers = [stage.spawn(Evaluator, options, sweep, recipe, device) for _ in range(recipe.evaluate.workers)]
    return Evaluation(
        sweep, recipe, workers, reference.load_all(sweep, recipe), drawings, labels_of(sweep, recipe), checkpoints
    )


def _evaluate_one(evaluation: Evaluation, drawn: Drawn, skipped: set[Drawn]) -> None:
    try:
        values = evaluation.evaluate(drawn)
    except (Preempted, UserError):
        raise
    except DisScaleError as error:
        stage.say(f"skipped: {error}")
        results.folder(evaluation.sweep, drawn._replace(variant=MAIN)).write_json(results.DAMAGED, {"why": str(error)})
        skipped.add(drawn)
        return
    stage.say(_shown(drawn, values))


def _shown(drawn: Drawn, values: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)
    variant = f" ({drawn.variant})" if drawn.variant else ""
    return f"{drawn.model} at {drawn.images} images{variant}: {shown}"


def _facts(drawn: Drawn, drawing: Evaluate) -> dict[str, Any]:
    settings = {"samples", "sampler", "steps", "guidance", "guidance_interval", "ema_width", "precision", "metrics"}
    facts = {"format": manifest.FORMAT, "model": drawn.model, "images": drawn.images, "time": time.time()}
    return facts | drawing.model_dump(mode="json", include=settings)


def _seconds(spent: list[dict[str, float]]) -> dict[str, float]:
    """Worker seconds of each part, and samples a second and worker while drawing; nothing where all blocks were there."""
    total = {part: sum(each[part] for each in spent) for part in spent[0]}
    images, sampling = total.pop("images"), total["sampling"]
    return total | {"images_per_s": images / sampling} if images else {}


def _block_count(drawing: Evaluate) -> int:
    return -(-drawing.samples // drawing.block_images)


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


def _whole(folder: Folder, block: int) -> bool:
    """Whether an earlier evaluation left this block whole; a damaged one is named and will be drawn again."""
    try:
        _read_block(folder, block)
    except FileNotFoundError:
        return False
    except StorageError as error:
        stage.say(f"drawn again: {error}")
        return False
    return True


def block_name(block: int) -> str:
    return f"block-{block:05d}.npz"
