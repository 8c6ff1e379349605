"""Evaluate, a Ray job next to training: samples and measures each new published checkpoint, writes metrics and a grid of samples.

Blocks of samples are the unit of work and are kept, so an evaluation that was killed continues where it was. Its workers are in
evaluators.py. PyTorch is imported where it is used: the driver starts its workers first, and all load it at the same time.
"""

import time
from collections.abc import Callable
from functools import partial

from dis_scale.evaluation.run import Evaluation, block_count, stored_blocks, values_in_words
from dis_scale.process.errors import DisScaleError, OutOfMemory, Preempted, StorageAway, StorageFull
from dis_scale.recipe import Evaluate
from dis_scale.storage import lease
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Metrics, Skipped
from dis_scale.tracking import mlflow_copy
from dis_scale.tracking.mlflow import RunCopy
from pipelines import lines, metrics, stage
from pipelines.devices import choose_device, total_gpus
from pipelines.evaluators import RayEvaluators
from pipelines.places import evaluators_on, own_gpus
from pipelines.restarts import with_restarts
from pipelines.waiting import Wait, alive_nodes
from pipelines.worker import WorkerFailure, amounts, resources

POLL_EVERY_S, LONGEST_POLL_S = 2.0, 30.0
"""Interval of polls for news of training: a twentieth of the wait so far, within these. Each poll costs several requests."""
BACKLOG_EVERY_S = 600.0
"""Interval at which the backlog is counted during an evaluation."""


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
            over = evaluate_all(sweep, evaluation, skipped, evaluation.evaluators.move)  # type: ignore[attr-defined]
            opened.pop().evaluators.end()  # type: ignore[attr-defined]

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
        if not sweep.evaluation(sampled).exists(Metrics.NAME):
            lines.say(_shown(sampled, evaluation.evaluate(sampled)))


def checkpoints(sweep: Sweep) -> int:
    """Return the number of checkpoints that the recipe publishes."""
    return sum(len(sweep.recipe.train_of(model).publish_images) for model in sweep.recipe.models)


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
    return Evaluation(sweep, evaluators, references, samplings, labels, lines.say, stage.raise_if_stopped)


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
        Skipped(why=why).write(evaluation.sweep.evaluation(sampled))
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
        Skipped(why=why).write(evaluation.sweep.floor)


def _shown(sampled: Sampled, values: dict[str, float]) -> str:
    return f"{sampled}: {values_in_words(values)}"
