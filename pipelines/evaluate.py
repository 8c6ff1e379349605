"""Evaluate, a Ray job of its own beside training: sees each new published folder, draws, measures, writes metrics and a grid.

Blocks of samples are the unit and are kept, so that an evaluation that was killed goes on where it was. On a small machine its
workers ask for no CPU and run at low priority: one that asked for a CPU first would keep training waiting for ever.
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import ray
import torch

from dis_scale import diffusion, mirror, vae
from dis_scale.data import shards
from dis_scale.data.encode import compute_exactly
from dis_scale.data.latents import Latents
from dis_scale.errors import DisScaleError, Preempted, StorageAway, StorageError, StorageFull
from dis_scale.evaluation import held_out, measure, reference, results
from dis_scale.evaluation.results import Drawn
from dis_scale.evaluation.sampling import SampleBlock, arrange, grid, grid_columns, labels_of, open_sampler
from dis_scale.recipe import Evaluate, Recipe
from dis_scale.storage.folder import Folder, lease, manifest
from dis_scale.training import checkpoint, ema
from dis_scale.training.ema import Snapshot
from pipelines import stage

LOOK_EVERY_S = 2.0
NICE = 19


class Evaluator(stage.Worker):
    """Draws blocks and measures the held-out loss; progress counts blocks."""

    def __init__(self, sweep: Folder, recipe: Recipe, device: str) -> None:
        super().__init__()
        os.nice(NICE)
        compute_exactly()
        self._drawing, self._cancelled = threading.Lock(), threading.Event()
        where = torch.device(device)
        decoder = vae.load(recipe.vae, sweep)
        shards.require_vae(sweep, decoder.identity)
        decoder.net.to(where)
        self.studio = open_sampler(recipe, sweep, decoder, where)

    def draw(self, drawn: Drawn, drawing: Evaluate, blocks: list[int]) -> dict[str, float]:
        """Draws and keeps blocks; returns the seconds that each part took, and the samples drawn as `images`."""
        with self._drawing:  # one that was cancelled may still be at its last block
            self._cancelled.clear()
            compute_exactly()  # threads are a thread's own setting
            studio, folder, images = self.studio, results.folder(self.studio.sweep, drawn), 0
            before = dict(studio.seconds)
            model = cache(lambda: studio.model(drawn.model, drawn.images, drawing))  # none where all blocks are kept
            for block in blocks:
                if self._wish.is_set() or self._cancelled.is_set():
                    break
                made = studio.sample(model(), drawing, block)
                folder.write(block_name(block), made.to_bytes())
                self._done, images = self._done + 1, images + len(made.right)
            return {part: seconds - before[part] for part, seconds in studio.seconds.items()} | {"images": images}

    def cancel(self) -> None:
        """Ends the drawing under way after its block: another worker has failed at the same checkpoint."""
        self._cancelled.set()

    def held_out(self, drawn: Drawn) -> dict[str, float]:
        """The loss on the images that training never saw."""
        with self._drawing:
            compute_exactly()
            recipe, settings = self.studio.recipe, self.studio.recipe.evaluate
            latents = Latents(shards.latents_of(self.studio.sweep), recipe.seed, recipe.data.held_out_images)
            model, process = self.studio.model(drawn.model, drawn.images, settings), diffusion.build(recipe.diffusion)
            return held_out.losses(model, process, latents, recipe.seed, settings.batch_images)


@dataclass
class Evaluation:
    """One sweep's evaluation: its workers, the references by extractor, and each way to draw by name."""

    sweep: Folder
    recipe: Recipe
    workers: list[Any]
    references: dict[str, reference.Reference]
    samplings: dict[str, Evaluate]
    labels: np.ndarray
    checkpoints: int

    def evaluate(self, drawn: Drawn) -> dict[str, float]:
        """Draws what is missing of one published checkpoint and writes its grid and, last, its metrics; returns them."""
        folder, drawing = results.folder(self.sweep, drawn), self.samplings[drawn.variant]
        left = [b for b in range(_block_count(drawing)) if not _whole(folder, b)]
        spent = self._draw(drawn, drawing, left)
        stage.leave_if_asked()
        values = self._held_out(drawn)
        stage.leave_if_asked()
        began = time.monotonic()
        measured, pictures = self._measure(folder, drawing)
        values |= measured
        folder.write(results.GRID, grid(arrange(pictures, self.labels), grid_columns(self.labels)))
        notes = measure.notes(self.references, drawing) + self._average_note(drawn, drawing)
        seconds = _seconds(spent) | {"metrics": time.monotonic() - began}
        folder.write_json(
            results.METRICS, _facts(drawn, drawing) | {"notes": notes, "values": values, "seconds": seconds}
        )
        folder.delete(results.SKIPPED)
        mirror.evaluation(self.sweep, drawn)
        return values

    def _draw(self, drawn: Drawn, drawing: Evaluate, blocks: list[int]) -> list[dict[str, float]]:
        """The blocks by all workers; where one fails, the others end their block and leave before its failure is raised."""
        share = len(self.workers)
        parts = [w.draw.remote(drawn, drawing, blocks[i::share]) for i, w in enumerate(self.workers)]
        try:
            return stage.watch(self.workers, parts, lambda done: self._report(sum(done)))
        except ray.exceptions.RayTaskError:
            ray.get([w.cancel.remote() for w in self.workers])
            raise

    def _average_note(self, drawn: Drawn, drawing: Evaluate) -> list[str]:
        """How well an average that was not tracked could be rebuilt."""
        train = self.recipe.train
        known = checkpoint.snapshots(self.sweep / "runs" / drawn.model, drawn.images, train)
        if drawing.ema_width is None or not known:
            return []
        misfit = ema.misfit(known, Snapshot(drawn.images // train.batch_images, drawing.ema_width))
        return [f"{drawn}: the average of width {drawing.ema_width:g} was rebuilt to within {misfit:.0%}"]

    def _held_out(self, drawn: Drawn) -> dict[str, float]:
        """The held-out loss belongs to the checkpoint, however samples are drawn: it stands beside the main ones."""
        if drawn.variant or not self.recipe.data.held_out_images:
            return {}
        (values,) = stage.watch(self.workers, [self.workers[0].held_out.remote(drawn)], lambda _: None)
        return values

    def _measure(self, folder: Folder, drawing: Evaluate) -> tuple[dict[str, float], np.ndarray]:
        """All metrics, and the grid's pictures, with one block in memory at a time."""
        pictures = []

        def blocks() -> Iterator[SampleBlock]:
            for b in range(_block_count(drawing)):
                block = _read_block(folder, b)
                pictures.append(block.pictures)
                yield block

        return measure.measure_blocks(blocks(), self.references, drawing), np.concatenate(pictures)

    def _report(self, done: int) -> None:
        stage.progress(done, self.checkpoints * sum(map(_block_count, self.samplings.values())), "blocks")


def evaluate(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    """Evaluates each (model, published count) once in each way, until all are done or their training has ended for good."""
    stage.connect()
    device, why = stage.choose_device(recipe)
    stage.say(f"evaluation on {device} ({why})")
    skipped: set[Drawn] = set()
    with lease.hold(sweep / lease.FOLDER / "evaluate"):
        stage.with_restarts(
            recipe, "evaluate", lambda _: _evaluate_all(sweep, recipe, device, skipped),
            lambda: sum(len(results.evaluated_counts(sweep, model)) for model in recipe.models),
        )  # fmt: skip


def vary(sweep: Folder, recipe: Recipe, arguments: list[str]) -> None:
    """Draws one published checkpoint with other values of one setting, each a variant of its own; finished ones are kept."""
    model, images, setting, *values = arguments
    stage.connect()
    device, _ = stage.choose_device(recipe)
    samplings = results.varied(recipe.evaluate, setting, [float(value) for value in values])
    evaluation = open_evaluation(sweep, recipe, device, samplings, checkpoints=1)
    for variant in samplings:
        drawn = Drawn(model, int(images), variant)
        if not results.folder(sweep, drawn).exists(results.METRICS):
            stage.say(_shown(drawn, evaluation.evaluate(drawn)))


def _evaluate_all(sweep: Folder, recipe: Recipe, device: str, skipped: set[Drawn]) -> None:
    """Takes each new published folder as it comes; what cannot be measured is named, noted in storage and skipped."""
    checkpoints = len(recipe.models) * len(recipe.train.publish_images)
    evaluation = open_evaluation(sweep, recipe, device, recipe.evaluate.samplings, checkpoints)
    _mirror_what_is_there(sweep, recipe)
    for drawn in results.outdated(sweep, recipe):
        _evaluate_one(evaluation, drawn, skipped)
    news, before = time.monotonic(), None
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
            if before == (now := _traces(sweep, recipe)):
                raise DisScaleError(
                    f"nothing was published or saved for {recipe.evaluate.give_up_after_s:.0f} s: is training running?"
                )
            news, before = time.monotonic(), now
        else:
            stage.pause(LOOK_EVERY_S)


def _mirror_what_is_there(sweep: Folder, recipe: Recipe) -> None:
    """Sends earlier evaluations that MLflow may have missed; where it is away, once is enough to know."""
    for model in recipe.models:
        for variant in recipe.evaluate.samplings:
            for images in results.evaluated_counts(sweep, model, variant):
                stage.leave_if_asked()
                if not mirror.evaluation(sweep, Drawn(model, images, variant)):
                    return


def _traces(sweep: Folder, recipe: Recipe) -> list[list[str]]:
    """What training leaves as it goes on."""
    return [(sweep / "runs" / model).list("resume") for model in recipe.models]


def open_evaluation(
    sweep: Folder, recipe: Recipe, device: str, samplings: dict[str, Evaluate], checkpoints: int
) -> Evaluation:
    """The evaluation with its workers on Ray."""
    options = _options(recipe, device)
    workers = [stage.spawn(Evaluator, options, sweep, recipe, device) for _ in range(recipe.evaluate.workers)]
    return Evaluation(
        sweep, recipe, workers, reference.load_all(sweep, recipe), samplings, labels_of(sweep, recipe), checkpoints
    )


def _evaluate_one(evaluation: Evaluation, drawn: Drawn, skipped: set[Drawn]) -> None:
    try:
        values = evaluation.evaluate(drawn)
    except (Preempted, StorageAway, StorageFull, stage.Lost):
        raise  # nothing is wrong with the checkpoint
    except DisScaleError as error:
        why = str(stage.cause_of(error))
        stage.say(f"skipped: {drawn}: {why}")
        results.folder(evaluation.sweep, drawn).write_json(results.SKIPPED, {"why": why})
        skipped.add(drawn)
        return
    stage.say(_shown(drawn, values))


def _shown(drawn: Drawn, values: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)
    return f"{drawn}: {shown}"


def _facts(drawn: Drawn, drawing: Evaluate) -> dict[str, Any]:
    settings = {"samples", "sampler", "steps", "guidance", "guidance_interval", "ema_width", "precision", "metrics"}
    facts = {"format": manifest.FORMAT, "model": drawn.model, "images": drawn.images, "time": time.time()}
    return facts | drawing.model_dump(mode="json", include=settings)


def _seconds(spent: list[dict[str, float]]) -> dict[str, float]:
    """Worker seconds of each part, and its images a second and worker; nothing where all blocks were there."""
    total = {part: sum(each[part] for each in spent) for part in spent[0]}
    images = total.pop("images")
    return total | {f"{part}_images_per_s": images / s for part, s in total.items() if s} if images else {}


def _block_count(drawing: Evaluate) -> int:
    return -(-drawing.samples // drawing.block_images)


def _options(recipe: Recipe, device: str) -> dict[str, Any]:
    """What an evaluator asks for: a GPU of its own where training leaves one, else a share of one, which Ray is not told."""
    options = stage.resources("evaluate", device, 0)
    spare = int(ray.cluster_resources().get("GPU", 0)) - recipe.train.most_workers
    if device == "cuda" and spare < recipe.evaluate.workers:
        visible = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
        return options | {"num_gpus": 0, "runtime_env": visible}
    return options


def _read_block(folder: Folder, block: int) -> SampleBlock:
    return SampleBlock.from_bytes(folder.read(block_name(block)), f"{folder}/{block_name(block)}")


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
