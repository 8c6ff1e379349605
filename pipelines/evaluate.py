"""Evaluate, a Ray job next to training: samples and measures each new published checkpoint, writes metrics and a grid of samples.

Blocks of samples are the unit of work and are kept, so an evaluation that was killed continues where it was. Its workers are in
evaluators.py. PyTorch is imported where it is used: the driver starts its workers first, and all load it at the same time.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dis_scale.process.errors import DisScaleError, OutOfMemory, Preempted, StorageAway, StorageError, StorageFull
from dis_scale.process.threads import in_order
from dis_scale.recipe import Evaluate
from dis_scale.storage import lease, manifest
from dis_scale.storage.folder import Folder
from dis_scale.sweep import GRID, METRICS, SKIPPED, Sampled, Sweep, state
from dis_scale.tracking import mlflow_copy
from dis_scale.tracking.goodput import GOODPUT, MEMORY, SAMPLED_ON, TRAINED_ON, WORKER_HOURS
from dis_scale.tracking.mlflow import RunCopy
from pipelines import lines, metrics, stage
from pipelines.devices import choose_device, total_gpus
from pipelines.evaluators import RayEvaluators, block_name
from pipelines.places import evaluators_on, own_gpus
from pipelines.restarts import with_restarts
from pipelines.waiting import Wait, alive_nodes
from pipelines.worker import WorkerFailure, amounts, resources

if TYPE_CHECKING:
    from dis_scale.evaluation.reference import Reference
    from dis_scale.evaluation.sampling import SampleBlock

POLL_EVERY_S, LONGEST_POLL_S = 2.0, 30.0
"""Interval of polls for news of training: a twentieth of the wait so far, within these. Each poll costs several requests."""
COSTS = (GOODPUT, WORKER_HOURS, MEMORY, TRAINED_ON)
"""Facts of published weights that the metrics file has, too."""
BACKLOG_EVERY_S = 600.0
"""Interval at which the backlog is counted during an evaluation."""


@dataclass
class Evaluation:
    """The evaluation of one sweep: its evaluators, the references by extractor, and the sampling settings by name."""

    sweep: Sweep
    evaluators: Any
    """Has `sample`, `floor` and `held_out`: `RayEvaluators`."""
    references: dict[str, "Reference"]
    samplings: dict[str, Evaluate]
    labels: np.ndarray

    def evaluate(self, sampled: Sampled) -> dict[str, float]:
        """Sample what is missing of one published checkpoint; write its grid and, last, its metrics; return them."""
        folder, settings = self.sweep.evaluation(sampled), self.samplings[sampled.variant]
        left = [b for b in range(block_count(settings)) if not _kept(folder, b, _parse)]
        spent = self.evaluators.sample(sampled, settings, left)
        stage.raise_if_stopped()
        values = self._held_out(sampled)
        stage.raise_if_stopped()
        from dis_scale.evaluation import measure
        from dis_scale.evaluation.sampling import arrange, column_names, grid, grid_columns

        began_s = time.monotonic()
        measured, pictures = self._measure(folder, settings)
        values |= measured
        names = column_names(self.sweep, self.labels)
        folder.write(GRID, grid(arrange(pictures, self.labels), grid_columns(self.labels), names))
        notes = measure.notes(self.references, settings) + self._average_note(sampled, settings)
        machines, seconds = _machines(spent), _seconds(spent)
        if not seconds and (before := folder.find_json(METRICS, "seconds")):  # all blocks were kept
            machines, seconds = {SAMPLED_ON: before.get(SAMPLED_ON, [])}, before["seconds"]
        seconds |= {"metrics": time.monotonic() - began_s}
        facts = _facts(sampled, settings) | self._training(sampled) | machines
        folder.write_json(METRICS, facts | {"notes": notes, "values": values, "seconds": seconds})
        folder.delete(SKIPPED)
        mlflow_copy.copy_evaluation(self.sweep, sampled)
        return values

    def floor(self) -> None:
        """Measure what is missing of the floor; write its metrics last."""
        from dis_scale.data.sources import open_source
        from dis_scale.evaluation import floor

        recipe, folder = self.sweep.recipe, self.sweep.floor
        source = open_source(recipe.data, self.sweep.store)
        images = len(floor.chosen_images(source, self.labels, recipe.data.num_classes))
        floor.require_enough(images, self.references)
        numbers = range(-(-images // recipe.evaluate.block_images))
        self.evaluators.floor([b for b in numbers if not _kept(folder, b, floor.FloorBlock.from_bytes)])
        stage.raise_if_stopped()
        blocks = (floor.FloorBlock.from_bytes(folder.read(block_name(b)), f"{folder}/{block_name(b)}") for b in numbers)
        values = floor.measure_floor(blocks, self.references, recipe.evaluate, images)
        facts = {"format": manifest.FORMAT, "images": images, "time": time.time(), "metrics": ["distance"]}
        folder.write_json(METRICS, facts | {"values": values})
        folder.delete(SKIPPED)
        lines.say(f"floor: {'; '.join(f'{kind}: {_values(each)}' for kind, each in values.items())}")

    def _held_out(self, sampled: Sampled) -> dict[str, float]:
        """The held-out loss; empty for a variant, since it is measured once per checkpoint, under the main settings."""
        if sampled.variant or not self.sweep.recipe.data.held_out_images:
            return {}
        return self.evaluators.held_out(sampled)

    def _training(self, sampled: Sampled) -> dict[str, Any]:
        """What the run had cost up to this checkpoint; empty at its beginning."""
        known = manifest.require(self.sweep.run(sampled.model).published_at(sampled.images_seen))
        return {name: known[name] for name in COSTS if name in known and sampled.images_seen}

    def _average_note(self, sampled: Sampled, settings: Evaluate) -> list[str]:
        """A note on the error of the rebuilt averaging profile; empty without `ema_width`."""
        from dis_scale.weights import ema
        from dis_scale.weights.published import snapshots

        train = self.sweep.recipe.train_of(sampled.model)
        known = snapshots(self.sweep.run(sampled.model), sampled.images_seen, train)
        if settings.ema_width is None or not known:
            return []
        misfit = ema.misfit(known, ema.Snapshot(sampled.images_seen // train.batch_images, settings.ema_width))
        return [f"{sampled}: the average of width {settings.ema_width:g} was rebuilt to within {misfit:.0%}"]

    def _measure(self, folder: Folder, settings: Evaluate) -> tuple[dict[str, float], np.ndarray]:
        """All metrics, and the grid's pictures. Blocks are read one by one; some metrics keep all features."""
        from dis_scale.evaluation import measure

        pictures = []

        def blocks() -> Iterator["SampleBlock"]:
            for number in range(block_count(settings)):
                block = _read_block(folder, number)
                pictures.append(block.pictures)
                yield block

        metrics = measure.measure_blocks(blocks(), self.references, settings)  # reads all blocks
        return metrics, np.concatenate(pictures)


def evaluate_published(sweep: Sweep, _: list[str]) -> None:
    """Evaluate each published checkpoint under all sampling settings, until training is over and each is evaluated or skipped."""
    stage.connect()
    recipe = sweep.recipe
    device, why = choose_device(recipe)
    lines.say(f"evaluation on {device} ({why})")
    skipped: set[Sampled] = set()
    opened: list[Evaluation] = []  # that of the last attempt, whose evaluators live

    def attempt(_: WorkerFailure | None) -> None:
        over = False
        while not over:
            if not opened:
                gpus = _await_gpus(sweep) if device == "cuda" else 0
                opened.append(open_evaluation(sweep, device, gpus, recipe.evaluate.samplings, checkpoints(sweep)))
            (evaluation,) = opened
            over = evaluate_all(sweep, evaluation, skipped, evaluation.evaluators.move)
            opened.pop().evaluators.end()

    with (
        lease.hold(sweep.lease("evaluate")),
        metrics.refreshing(partial(show_backlog, state.Backlog(sweep, tuple(recipe.models))), BACKLOG_EVERY_S),
    ):
        try:
            with_restarts(recipe, "evaluate", attempt, lambda: stored_blocks(sweep))
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; needs less memory: smaller evaluate.batch_images") from error


def show_backlog(backlog: state.Backlog) -> None:
    metrics.gauge("evaluation_backlog", len(backlog.left()))


def _await_gpus(sweep: Sweep) -> int:
    """Return the number of evaluators with a GPU of their own, once there is one, or a GPU to share if the recipe allows that."""
    shares, own = sweep.recipe.evaluate.gpu_share is not None, 0

    def ready() -> bool:
        nonlocal own
        own = own_gpus(sweep)
        return own > 0 or (shares and total_gpus() > 0)

    if not ready():
        lines.emit("queued")
        lines.say(
            f"evaluation waits until training has ended, which uses all {total_gpus()} GPUs: "
            "evaluate.gpu_share or fewer train.workers would let it run beside training"
        )
        wait_for_training(sweep, lambda: ready() or state.training_over(sweep))
        with Wait() as wait:
            while not ready():
                wait.log(1, amounts(resources("evaluate", "cuda", 0)))
                stage.pause(POLL_EVERY_S)
    return own


def ablate(sweep: Sweep, arguments: list[str]) -> None:
    """Evaluate one published checkpoint with other values of one setting, each a variant of its own; keep finished ones."""
    model, images, setting, *values = arguments
    stage.connect()
    device, _ = choose_device(sweep.recipe)
    samplings = state.ablations(sweep.recipe.evaluate, setting, [float(value) for value in values])
    evaluation = open_evaluation(sweep, device, max(1, evaluators_on(alive_nodes())), samplings, checkpoints=1)
    for variant in samplings:
        sampled = Sampled(model, int(images), variant)
        if not sweep.evaluation(sampled).exists(METRICS):
            lines.say(_shown(sampled, evaluation.evaluate(sampled)))


def checkpoints(sweep: Sweep) -> int:
    """Return the number of checkpoints that the recipe publishes."""
    return sum(len(sweep.recipe.train_of(model).publish_images) for model in sweep.recipe.models)


def stored_blocks(sweep: Sweep) -> int:
    """Return the blocks in storage, with one more for each finished evaluation: the progress of an evaluation."""
    samplings, left = sweep.recipe.evaluate.samplings, state.evaluations_left(sweep)
    finished = [
        (block_count(settings) + 1) * len(state.evaluated_counts(sweep, model, variant))
        for model in sweep.recipe.models
        for variant, settings in samplings.items()
    ]
    names = in_order(left, lambda sampled: sweep.evaluation(sampled).list(), state.AT_ONCE)
    blocks = sum(name.startswith("block-") for each in names for name in each)
    return sum(finished) + blocks + len(sweep.floor.list())


def evaluate_all(
    sweep: Sweep, evaluation: Evaluation, skipped: set[Sampled], moves: Callable[[], bool] = lambda: False
) -> bool:
    """Evaluate each published checkpoint as it comes; what cannot be measured is logged, noted in storage and skipped.

    Returns true when training is over and nothing is left; false before the next checkpoint if the evaluators have to move, as
    `moves` says: then others are to continue.
    """
    for sampled, why in state.outdated(sweep).items():
        lines.say(f"{sampled}: measured again from its blocks: {why}")
        evaluate_one(evaluation, sampled, skipped)
    _copy_earlier(sweep)

    backlog = state.Backlog(sweep, tuple(sweep.recipe.models))
    floor_due = sweep.recipe.evaluate.floor and state.floor(sweep) is None

    def left() -> list[Sampled]:
        return [sampled for sampled in backlog.left() if sampled not in skipped]

    while True:
        stage.raise_if_stopped()
        over = state.training_over(sweep)  # asked before the list, so that the last publication is not missed
        waiting = left()
        metrics.gauge("evaluation_backlog", len(waiting))
        if over and not waiting and not floor_due:
            return True
        if moves():
            return False
        if waiting:
            evaluate_one(evaluation, waiting[0], skipped)
        elif floor_due:
            measure_floor(evaluation)
            floor_due = False
        else:
            wait_for_training(sweep, lambda: bool(left()) or state.training_over(sweep) or moves())


def _copy_earlier(sweep: Sweep) -> None:
    """Copy the earlier evaluations that MLflow lacks; stop at the first copy that fails."""
    for model in sweep.recipe.models:
        copy = RunCopy(sweep, model)
        for sampled in mlflow_copy.evaluations_to_copy(sweep, model, copy):
            stage.raise_if_stopped()
            if not mlflow_copy.copy_evaluation(sweep, sampled, copy):
                return


def wait_for_training(sweep: Sweep, news: Callable[[], bool]) -> None:
    """Wait for `news`; DisScaleError if for `give_up_after_s` nothing is published or saved either."""
    give_up_s = sweep.recipe.evaluate.give_up_after_s
    began_s = since_s = time.monotonic()
    before = None
    while not news():
        stage.raise_if_stopped()
        if time.monotonic() - since_s > give_up_s:
            if before == (now := _signs_of_training(sweep)):
                raise DisScaleError(f"nothing was published or saved for {give_up_s:.0f} s: is training running?")
            since_s, before = time.monotonic(), now
        stage.pause(min(LONGEST_POLL_S, max(POLL_EVERY_S, (time.monotonic() - began_s) / 20)))


def _signs_of_training(sweep: Sweep) -> list[list[str]]:
    """Names of all resume points; they change while training runs."""
    return [sweep.run(model).resume.list() for model in sweep.recipe.models]


def open_evaluation(
    sweep: Sweep, device: str, gpus: int, samplings: dict[str, Evaluate], checkpoints: int
) -> Evaluation:
    """Return the evaluation with its workers on Ray, of which `gpus` at most get a GPU of their own."""
    total = checkpoints * sum(map(block_count, samplings.values()))
    total += 0 if state.floor_settled(sweep) else block_count(sweep.recipe.evaluate)
    evaluators = RayEvaluators(sweep, device, gpus, lambda done: lines.progress(done, total, "blocks"))
    evaluators.spawn()
    from dis_scale.evaluation import reference
    from dis_scale.evaluation.sampling import labels_of

    references, labels = reference.load_all(sweep), labels_of(sweep)
    return Evaluation(sweep, evaluators, references, samplings, labels)


def evaluate_one(evaluation: Evaluation, sampled: Sampled, skipped: set[Sampled]) -> None:
    """Evaluate one checkpoint; if it cannot be measured, log that, note it in storage and add it to `skipped`."""
    try:
        values = evaluation.evaluate(sampled)
    except (OutOfMemory, Preempted, StorageAway, StorageFull, WorkerFailure):
        raise  # the checkpoint is not the cause
    except DisScaleError as error:
        why = str(stage.cause_of(error))
        lines.emit("skip", model=sampled.model, images=sampled.images_seen, variant=sampled.variant)
        lines.say(f"skipped: {sampled}: {why}", level="warning")
        evaluation.sweep.evaluation(sampled).write_json(SKIPPED, {"why": why})
        skipped.add(sampled)
        return
    lines.say(_shown(sampled, values))


def measure_floor(evaluation: Evaluation) -> None:
    """Measure the floor; log and note why if it cannot be measured: no model needs it. A run that evaluates more tries again."""
    try:
        evaluation.floor()
    except (Preempted, StorageFull, WorkerFailure):
        raise
    except DisScaleError as error:  # StorageAway, too: it may be the images' storage
        why = str(stage.cause_of(error))
        lines.say(f"floor: not measured: {why}", level="warning")
        evaluation.sweep.floor.write_json(SKIPPED, {"why": why})


def _shown(sampled: Sampled, values: dict[str, float]) -> str:
    return f"{sampled}: {_values(values)}"


def _values(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)


def _facts(sampled: Sampled, settings: Evaluate) -> dict[str, Any]:
    stored = {
        "samples",
        "labels",
        "sampler",
        "steps",
        "guidance",
        "guidance_interval",
        "guidance_channels",
        "ema_width",
    }
    stored |= {"precision", "metrics"}
    facts = {"format": manifest.FORMAT, "model": sampled.model, "images": sampled.images_seen, "time": time.time()}
    return facts | settings.model_dump(mode="json", include=stored)


def _machines(spent: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The machines that sampled, as a fact; empty if all blocks were kept."""
    names = sorted({each["machine"] for each in spent if each["images"]})
    return {SAMPLED_ON: names} if names else {}


def _seconds(spent: list[dict[str, Any]]) -> dict[str, float]:
    """Worker seconds of each part, and its images per second and worker; empty if all blocks were kept."""
    total = {part: sum(each[part] for each in spent) for part in spent[0] if part != "machine"}
    images = total.pop("images")
    return total | {f"{part}_images_per_s": images / s for part, s in total.items() if s} if images else {}


def block_count(settings: Evaluate) -> int:
    return -(-settings.samples // settings.block_images)


def _read_block(folder: Folder, block: int) -> "SampleBlock":
    return _parse(folder.read(block_name(block)), f"{folder}/{block_name(block)}")


def _parse(data: bytes, where: str) -> "SampleBlock":
    from dis_scale.evaluation.sampling import SampleBlock

    return SampleBlock.from_bytes(data, where)


def _kept(folder: Folder, block: int, parse: Callable[[bytes, str], Any]) -> bool:
    """Whether an earlier evaluation left this block complete; a damaged one is logged and made again."""
    try:
        parse(folder.read(block_name(block)), f"{folder}/{block_name(block)}")
    except FileNotFoundError:
        return False
    except StorageError as error:
        lines.say(f"made again: {error}")
        return False
    return True
