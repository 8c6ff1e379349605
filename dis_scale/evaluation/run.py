"""Evaluates one sweep: samples the missing blocks of a published checkpoint, measures all blocks, writes grid and metrics.

Blocks of samples are the unit of work and are stored, so a killed evaluation continues where it was. The caller passes the
evaluators, which make blocks. PyTorch is imported where it is used: evaluators start first, and all load it at the same time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dis_scale.process.errors import DisScaleError, StorageError
from dis_scale.process.threads import in_order
from dis_scale.recipe import Evaluate
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.storage.folder import Folder
from dis_scale.sweep import GRID, Sampled, Sweep, state
from dis_scale.sweep.documents import FloorMetrics, Metrics, PublishedManifest, RunCost, Skipped
from dis_scale.tracking import mlflow_copy

if TYPE_CHECKING:
    from dis_scale.evaluation.measure import Measured
    from dis_scale.evaluation.reference import Reference
    from dis_scale.evaluation.sampling import SampleBlock


AT_ONCE = 4
"""Blocks that are read at the same time."""


class Spent(NamedTuple):
    """Work of one evaluator: images that it sampled, its machine, and its seconds by part."""

    images: int
    machine: str
    seconds: dict[str, float]


class Evaluators(Protocol):
    """Make blocks of samples and of real images, and measure the held-out loss."""

    def sample(self, sampled: Sampled, settings: Evaluate, blocks: list[int]) -> list[Spent]: ...
    def floor(self, blocks: list[int]) -> None: ...
    def held_out(self, sampled: Sampled) -> dict[str, float]: ...


@dataclass
class Evaluation:
    """One sweep's evaluation: its evaluators, the references by extractor, and the sampling settings by name."""

    sweep: Sweep
    evaluators: Evaluators
    references: dict[str, "Reference"]
    samplings: dict[str, Evaluate]
    labels: np.ndarray
    say: Callable[[str], None]
    raise_if_stopped: Callable[[], None]
    """Called between long steps; it may raise."""
    require_held: Callable[[], None] = lambda: None
    """Called before metrics are written; raises Held if another process has taken over the evaluation."""
    _drawn: bool = False

    def evaluate(self, sampled: Sampled) -> dict[str, float]:
        """Sample the missing blocks of one published checkpoint, and measure it; return the metrics."""
        return self.sample(sampled)()

    def sample(self, sampled: Sampled) -> Callable[[], dict[str, float]]:
        """Sample the missing blocks of one published checkpoint; return a function that measures it without evaluators.

        The function writes the grid, then the metrics, and returns the metrics. It may run in a thread while the next checkpoint is
        sampled.
        """
        settings = self.samplings[sampled.variant]
        spent = self._sample(sampled, settings)
        values = self._held_out(sampled)
        self.raise_if_stopped()
        return partial(self._finish, sampled, settings, spent, values)

    def _finish(self, sampled: Sampled, settings: Evaluate, spent: list[Spent], values: dict[str, float]) -> dict[str, float]:
        from dis_scale.evaluation import measure

        folder, began_s = self.sweep.evaluation(sampled), time.monotonic()
        measured, pictures = self._measure(folder, settings)
        self._draw(folder, pictures)
        sampled_on, seconds = cost_of_samples(spent, folder)
        metrics = Metrics(
            model=sampled.model, images=sampled.images_seen, time=time.time(), samples=settings.samples, labels=settings.labels,
            sampling=settings.sampling, ema_width=settings.ema_width, precision=settings.precision, metrics=settings.metrics,
            values=values | measured.values, left_out=measured.left_out, sampled_on=sampled_on,
            weights={name: reference.identity for name, reference in self.references.items()},
            seconds=seconds | {"metrics": time.monotonic() - began_s},
            notes=(*measure.notes(self.references, settings), *self._average_note(sampled, settings)),
            cost=self._cost_of_training(sampled),
        )  # fmt: skip
        self.require_held()
        folder.delete(Skipped.NAME)  # before the metrics: a process may be killed in between
        metrics.write(folder)
        with suppress(DisScaleError, OSError):  # the metrics are stored; at the next start all are copied
            mlflow_copy.copy_evaluation(self.sweep, sampled)
        return metrics.values

    def _sample(self, sampled: Sampled, settings: Evaluate) -> list[Spent]:
        """Sample the missing blocks. The first call samples the grid's blocks first, so that a grid is available early."""
        from dis_scale.evaluation.sampling import grid_numbers

        folder, spent = self.sweep.evaluation(sampled), list[Spent]()
        missing = self._missing(folder, block_count(settings), parse_block)
        if not self._drawn:
            shown = int(grid_numbers(self.labels).max()) // settings.block_images + 1
            spent = self.evaluators.sample(sampled, settings, [number for number in missing if number < shown])
            self.raise_if_stopped()
            self._draw(folder, [block.pictures for block in self._blocks(folder, shown)])
            self.say(f"samples  {folder}/{GRID}")
            missing, self._drawn = [number for number in missing if number >= shown], True
        spent += self.evaluators.sample(sampled, settings, missing)
        self.raise_if_stopped()
        return spent

    def _draw(self, folder: Folder, pictures: list[np.ndarray]) -> None:
        """Write the grid from the pictures of its blocks."""
        from dis_scale.evaluation.sampling import arrange, column_names, grid, grid_numbers

        arranged = arrange(np.concatenate(pictures), self.labels)
        folder.write(GRID, grid(arranged, grid_numbers(self.labels).shape[1], column_names(self.sweep, self.labels)))

    def floor(self) -> None:
        """Compute the missing blocks of the floor, and measure it; write its metrics last."""
        from dis_scale.data.sources import open_source
        from dis_scale.evaluation import floor

        recipe, folder = self.sweep.recipe, self.sweep.floor
        source = open_source(recipe.data, self.sweep.store)
        every = source.listing.labels()
        classes = every[floor.chosen_images(every, recipe.evaluate.samples)]
        images = len(classes)
        floor.require_enough(images, self.references)
        labels = self.labels if recipe.data.num_classes else np.zeros_like(self.labels)
        weights = floor.sample_weights(classes, labels)
        count = -(-images // recipe.evaluate.block_images)
        self.evaluators.floor(self._missing(folder, count, floor.FloorBlock.from_bytes))
        self.raise_if_stopped()

        def blocks() -> Iterator[floor.FloorBlock]:
            return (floor.FloorBlock.from_bytes(folder.read(name), f"{folder}/{name}") for name in map(block_name, range(count)))

        if recipe.data.undecodable == "skip":  # blocks may lack images, of some classes more than of others
            decoded = np.concatenate([block.numbers for block in blocks()])
            weights, images = np.zeros(images), len(decoded)
            weights[decoded] = floor.sample_weights(classes[decoded], labels)
        values, missing = floor.measure_floor(blocks(), self.references, recipe.evaluate, weights)
        self.require_held()
        folder.delete(Skipped.NAME)
        FloorMetrics(images=images, time=time.time(), values=values, missing=missing).write(folder)
        lacking = (f"no {metric}: {why}" for metric, why in missing.items())
        self.say(f"floor: {'; '.join([*(f'{kind}: {values_in_words(each)}' for kind, each in values.items()), *lacking])}")

    def _missing(self, folder: Folder, count: int, parse: Callable[[bytes, str], Any]) -> list[int]:
        """Return the numbers of the blocks that are missing or damaged in storage; log the damaged ones."""
        there = set(folder.list())
        names = [block_name(number) for number in range(count)]
        return [n for n, name in enumerate(names) if name not in there or not self._kept(folder, name, parse)]

    def _kept(self, folder: Folder, name: str, parse: Callable[[bytes, str], Any]) -> bool:
        try:
            data = folder.read(name)  # other errors of storage are raised: the block may be intact
        except FileNotFoundError:
            return False
        try:
            parse(data, f"{folder}/{name}")
        except StorageError as error:
            self.say(f"made again: {error}")
            return False
        return True

    def _held_out(self, sampled: Sampled) -> dict[str, float]:
        """Return the held-out loss; empty for a variant, since it is measured once per checkpoint, under the main settings.

        If an earlier evaluation has stored the loss, it is returned without loading the weights.
        """
        if sampled.variant or not self.sweep.recipe.data.held_out_images:
            return {}
        before = Metrics.find_intact(self.sweep.evaluation(sampled))
        kept = {name: value for name, value in before.values.items() if name.startswith(HELD_OUT)} if before else {}
        return kept or self.evaluators.held_out(sampled)

    def _cost_of_training(self, sampled: Sampled) -> RunCost:
        """Return the cost of the run up to this checkpoint; empty at its beginning."""
        published = PublishedManifest.require(self.sweep.run(sampled.model).published_at(sampled.images_seen))
        return published.cost if sampled.images_seen else RunCost()

    def _average_note(self, sampled: Sampled, settings: Evaluate) -> list[str]:
        """Return a note on the error of the rebuilt averaging profile; empty without `ema_width`."""
        from dis_scale.weights import ema
        from dis_scale.weights.published import snapshots

        train = self.sweep.recipe.train_of(sampled.model)
        if settings.ema_width is None or not (known := snapshots(self.sweep.run(sampled.model), sampled.images_seen, train)):
            return []
        misfit = ema.misfit(known, ema.Snapshot(sampled.images_seen, settings.ema_width))
        return [f"{sampled}: the average of width {settings.ema_width:g} was rebuilt to within {misfit:.0%}"]

    def _measure(self, folder: Folder, settings: Evaluate) -> tuple["Measured", list[np.ndarray]]:
        """Return all metrics, and each block's pictures for the grid. Some metrics hold all features in memory."""
        from dis_scale.evaluation import measure

        pictures = list[np.ndarray]()

        def seen(block: "SampleBlock") -> "SampleBlock":
            pictures.append(block.pictures)
            return block

        blocks = map(seen, self._blocks(folder, block_count(settings)))
        return measure.measure_blocks(blocks, self.references, settings), pictures  # reads all blocks

    def _blocks(self, folder: Folder, count: int) -> Iterator["SampleBlock"]:
        """Yield the first `count` blocks; memory holds a few at a time."""
        return in_order(range(count), lambda n: parse_block(folder.read(name := block_name(n)), f"{folder}/{name}"), AT_ONCE)


def stored_blocks(sweep: Sweep) -> int:
    """Return the progress of the evaluation: the number of stored blocks, plus one for each finished checkpoint."""
    samplings, left = sweep.recipe.evaluate.samplings, state.Backlog(sweep).left()
    finished = [
        (block_count(settings) + 1) * len(state.evaluated_counts(sweep, model, variant))
        for model in sweep.recipe.models
        for variant, settings in samplings.items()
    ]
    names = in_order(left, lambda sampled: sweep.evaluation(sampled).list())
    blocks = sum(name.startswith("block-") for each in names for name in each)
    return sum(finished) + blocks + len(sweep.floor.list())


def block_name(block: int) -> str:
    """Return the name of a block's file."""
    return f"block-{block:05d}.npz"


def block_count(settings: Evaluate) -> int:
    """Return the number of blocks of an evaluation; the last may be smaller."""
    return -(-settings.samples // settings.block_images)


def parse_block(data: bytes, where: str) -> "SampleBlock":
    """Return a block of samples; StorageError if it is damaged."""
    from dis_scale.evaluation.sampling import SampleBlock

    return SampleBlock.from_bytes(data, where)


def values_in_words(values: dict[str, float]) -> str:
    """Return the metrics for a log line, each with its error, without the losses of single noise levels."""
    named = {name: value for name, value in values.items() if "/" not in name and not name.endswith("_error")}
    errors = {name: f" ± {values[f'{name}_error']:.2g}" for name in named if f"{name}_error" in values}
    return ", ".join(f"{name} {value:.4g}{errors.get(name, '')}" for name, value in named.items())


def cost_of_samples(spent: list[Spent], folder: Folder) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return the machines that sampled, and their seconds and rates; those of the last evaluation if nothing was sampled."""
    images = sum(each.images for each in spent)
    if not images:
        before = Metrics.find_intact(folder)
        return (before.sampled_on, before.seconds) if before else ((), {})
    seconds = {part: sum(each.seconds[part] for each in spent) for part in spent[0].seconds}
    rates = {f"{part}_images_per_s": images / s for part, s in seconds.items() if s}
    return tuple(sorted({each.machine for each in spent if each.images})), seconds | rates
