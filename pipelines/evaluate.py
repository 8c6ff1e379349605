"""Evaluate, a Ray job next to training: samples and measures each new published checkpoint, writes metrics and a grid of samples.

Blocks of samples are the unit of work. They are stored, so a killed evaluation continues with the missing blocks. Its workers are
in evaluators.py. PyTorch is imported where it is used: the driver first starts its workers, and all import it at the same time.
"""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from dis_scale.evaluation.run import Evaluation, stored_blocks, values_in_words
from dis_scale.process.errors import DisScaleError, Held, OutOfMemory, Preempted, StorageAway, StorageFull, WrongKernel
from dis_scale.process.threads import repeating
from dis_scale.recipe import Evaluate
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import FloorMetrics, Metrics, Skipped
from dis_scale.tracking import mlflow_copy
from pipelines.evaluators import NotOpened, RayEvaluators
from pipelines.failures import WorkerFailure, cause_of, describe
from pipelines.metrics import SetGauge
from pipelines.nodes import choose_device, total_gpus
from pipelines.places import Places, own_gpus
from pipelines.restarts import with_restarts
from pipelines.stage import StageJob, insist
from pipelines.waiting import Wait
from pipelines.worker import request_for

POLL_EVERY_S, LONGEST_POLL_S = 2.0, 30.0
"""Shortest and longest interval of polls for news of training: a twentieth of the wait so far. A poll costs several requests."""
MEASURED_POLL_S, MEASURED_S, GIVE_UP_MEASURING_S = 1.0, 3600.0, 4 * 3600.0
"""Poll interval of a measurement, time after which it counts as a hang, and time after which the job ends and another follows."""
ENDS_S = 10.0
"""Time at the end of the grace period in which a stage gives back its lease and stores its logs."""
BACKLOG_EVERY_S = 600.0
"""Interval at which the backlog is counted during an evaluation."""
GIVE_UP_S = 86_400.0
"""Time without a new publication or resume point after which evaluation ends with an error."""


def evaluate_published(job: StageJob) -> None:
    """Evaluate each published checkpoint under all sampling settings, until training is over and each is evaluated or skipped."""
    job.connect()
    device, why = choose_device(job.recipe)
    job.say(f"evaluation on {device} ({why})")
    evaluation = PublishedEvaluation(job, device)
    refresh = partial(show_backlog, state.Backlog(job.sweep), evaluation.skipped, job.gauge)
    with job.hold("evaluate"), repeating(refresh, BACKLOG_EVERY_S, "gauges"):
        evaluation.run()


@dataclass
class PublishedEvaluation:
    """The evaluation of all published checkpoints. Its evaluators live on when an attempt fails, and end when they have to move."""

    job: StageJob
    device: str
    open: Callable[[StageJob, str, int], tuple[Evaluation, RayEvaluators]] = lambda job, device, gpus: open_evaluation(
        job, device, gpus, job.recipe.evaluate.samplings, _images(job.sweep)
    )
    """Opens the evaluation with this many GPUs."""
    skipped: set[Sampled] = field(default_factory=set)
    """Checkpoints that could not be measured."""
    _opened: tuple[Evaluation, RayEvaluators] | None = None

    def run(self) -> None:
        """Evaluate until training is over and nothing is left, with as many restarts as the recipe allows."""
        try:
            with_restarts(self.job, "evaluate", self._attempt, lambda: stored_blocks(self.job.sweep))
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; needs less memory: smaller evaluate.batch_images") from error

    def _attempt(self, _: WorkerFailure | None) -> None:
        over = False
        while not over:
            evaluation, evaluators = self._opened = self._opened or self._open()
            over = evaluate_all(self.job, evaluation, self.skipped, evaluators.move)
            self._opened = None
            evaluators.end()

    def _open(self) -> tuple[Evaluation, RayEvaluators]:
        gpus = 0
        if self.device == "cuda":
            self.job.progress(0, _images(self.job.sweep), "images")  # for the status during the wait
            gpus = await_gpus(self.job, partial(free_gpus, self.job.sweep))
        return self.open(self.job, self.device, gpus)


def show_backlog(backlog: state.Backlog, skipped: Collection[Sampled], gauge: SetGauge) -> None:
    """Set the gauges of checkpoints that are neither evaluated nor skipped yet, and of excluded nodes."""
    gauge("evaluation_backlog", sum(sampled not in skipped for sampled in backlog.left()))
    gauge("failed_nodes", len(state.excluded_nodes(backlog.sweep)))


def free_gpus(sweep: Sweep) -> int | None:
    """Return how many evaluators get a GPU of their own now; None if no evaluator gets or may share a GPU."""
    own = own_gpus(sweep, Places.now(sweep.recipe))
    may_share = sweep.recipe.evaluate.gpu_share is not None and total_gpus() > 0
    return own if own > 0 or may_share else None


def await_gpus(job: StageJob, free: Callable[[], int | None]) -> int:
    """Return the number of evaluators with a GPU of their own, once `free` returns it."""
    if (gpus := free()) is not None:
        return gpus
    job.emit("queued")
    job.say(
        f"evaluation waits until training has ended, which uses all GPUs ({total_gpus()}): "
        "evaluate.gpu_share or fewer train.workers would let it run beside training"
    )
    wait_for_training(job, lambda: free() is not None or state.training_over(job.sweep))
    with Wait(job.gauge) as wait:
        while (gpus := free()) is None:
            wait.log(job, 1, request_for("evaluate", "cuda", 0).amounts)
            job.pause(POLL_EVERY_S)
    return gpus


def ablate(job: StageJob) -> None:
    """Evaluate one published checkpoint with other values of one setting, each as its own variant; skip finished ones."""
    model, images, name, *values = job.arguments
    setting, guide = state.parse_ablation_name(name)
    job.connect()
    device, _ = choose_device(job.recipe)
    samplings = state.ablations(job.recipe.evaluate, setting, [float(value) for value in values], guide)
    gpus = max(1, Places.now(job.recipe).most_evaluators())
    evaluation, _ = open_evaluation(job, device, gpus, samplings, len(samplings) * job.recipe.evaluate.samples)
    every = {Sampled(model, int(images), variant): settings for variant, settings in samplings.items()}

    def attempt(_: WorkerFailure | None) -> None:
        for sampled, settings in every.items():
            if state.outdated_by(Metrics.find_intact(job.sweep.evaluation(sampled)), settings):
                job.say(_shown(sampled, evaluation.evaluate(sampled)))

    with_restarts(job, "ablate", attempt, lambda: sum(len(job.sweep.evaluation(sampled).list()) for sampled in every))


def evaluate_all(job: StageJob, evaluation: Evaluation, skipped: set[Sampled], moves: Callable[[], bool] = lambda: False) -> bool:
    """Evaluate each published checkpoint as it comes. One that cannot be measured is logged, noted in storage and skipped.

    Memory may be too small for a model and a variant, or its kernels may be wrong here. That error is raised after all other
    checkpoints are evaluated and training is over. Returns true when training is over and no checkpoint is left. Returns false
    before the next checkpoint if `moves()`: the evaluators have to move, and new evaluators continue.
    """
    todo = _Todo(job, evaluation, skipped)
    try:
        return _evaluate_all(todo, moves)
    except Held:
        raise
    except Preempted:
        todo.stop()
        raise
    except Exception as error:
        if todo.measured:
            job.say(f"{describe(error)}; what is measured is waited for", level="warning")
        todo.settle()
        raise


def _evaluate_all(todo: "_Todo", moves: Callable[[], bool]) -> bool:
    job, sweep = todo.job, todo.job.sweep
    _measure_again(job, todo.evaluation, todo.skipped)
    mlflow_copy.copy_earlier(sweep, job.raise_if_stopped)
    floor_due = sweep.recipe.evaluate.measures_floor and FloorMetrics.find_intact(sweep.floor) is None
    while True:
        job.raise_if_stopped()
        over = state.training_over(sweep)  # asked before the list, so that the last publication is not missed
        waiting = todo.left()
        job.gauge("evaluation_backlog", len(waiting) + len(todo.measured))
        if over and not waiting and not floor_due and not todo.measured:
            return True
        if moves():
            todo.finish()
            return False
        if now := todo.possible(waiting):
            todo.evaluate(now[0])
        elif todo.measured:
            todo.finish()
        elif floor_due:
            measure_floor(job, todo.evaluation)
            floor_due = False
        elif over:
            raise todo.put_off[waiting[0].model, waiting[0].variant]
        else:
            wait_for_training(job, lambda: bool(todo.possible(todo.left())) or state.training_over(sweep) or moves())


class _Todo:
    """Remaining checkpoints. One is measured in a thread while the next is sampled: 50,000 samples take minutes of CPU time."""

    def __init__(self, job: StageJob, evaluation: Evaluation, skipped: set[Sampled]) -> None:
        self.job, self.evaluation, self.skipped = job, evaluation, skipped
        self.put_off = dict[tuple[str, str], DisScaleError]()
        """Error that prevents sampling here, by model and variant."""
        self.measured = dict[Sampled, Future[dict[str, float]]]()
        """Checkpoints that are being measured, one after the other: each takes gigabytes of memory."""
        self._backlog, self._pool = state.Backlog(job.sweep), ThreadPoolExecutor(1, "measure")

    def left(self) -> list[Sampled]:
        """Return the checkpoints that are neither evaluated nor skipped nor being measured."""
        return [sampled for sampled in self._backlog.left() if sampled not in self.skipped and sampled not in self.measured]

    def possible(self, waiting: list[Sampled]) -> list[Sampled]:
        """Return the `waiting` checkpoints that are not put off."""
        return [sampled for sampled in waiting if (sampled.model, sampled.variant) not in self.put_off]

    def evaluate(self, sampled: Sampled) -> None:
        """Sample a checkpoint and begin to measure it; then wait for the measurement of the one before."""
        before = [*self.measured]
        try:
            with noting(self.job, sampled, self.skipped):
                self.measured[sampled] = self._pool.submit(self.evaluation.sample(sampled))
        except (OutOfMemory, WrongKernel) as error:
            self.put_off[sampled.model, sampled.variant] = error.with_traceback(None)  # it would keep lost evaluators
            self.job.say(f"{sampled}: {describe(error)}; the others are evaluated first", level="warning")
        for each in before:
            self._finish(each)

    def finish(self) -> None:
        """Wait for all measurements; log their values, or note why a checkpoint cannot be measured."""
        for sampled in [*self.measured]:
            self._finish(sampled)

    def _finish(self, sampled: Sampled) -> None:
        began_s = self.job.now_s()
        while not wait([self.measured[sampled]], MEASURED_POLL_S).done:
            self.job.raise_if_stopped()
            waited_s = self.job.now_s() - began_s
            if waited_s > GIVE_UP_MEASURING_S:
                for behind in self.measured.values():
                    behind.cancel()
                self.measured.clear()
                raise DisScaleError(f"{sampled}: it is not measured after {waited_s / 3600:.0f} h: does a read of its blocks hang?")
            if waited_s < MEASURED_S:  # a longer measurement has to show as a hang
                self.job.show_idle()
        self._say(sampled)

    def _say(self, sampled: Sampled) -> None:
        with noting(self.job, sampled, self.skipped):
            self.job.say(_shown(sampled, self.measured.pop(sampled).result()))

    def settle(self) -> None:
        """Finish the measurements after an error, since the next attempt would repeat them. Their own errors are only logged."""
        while self.measured:
            try:
                self.finish()
            except Held:
                raise
            except Preempted:
                return self.stop()
            except Exception as error:
                self.job.say(f"not measured: {describe(error)}", level="warning")

    def stop(self) -> None:
        """Wait for the measurements as long as the grace period allows: only this process knows how long sampling took."""
        done = wait(self.measured.values(), max(0.0, self.job.grace_left_s() - ENDS_S)).done
        for sampled in [sampled for sampled, values in self.measured.items() if values in done and not values.exception()]:
            self._say(sampled)


def _measure_again(job: StageJob, evaluation: Evaluation, skipped: set[Sampled]) -> None:
    """Measure outdated evaluations again from their stored blocks, for example after the recipe has added a metric."""
    for sampled, why in state.outdated(job.sweep).items():
        if sampled not in skipped:
            job.raise_if_stopped()
            job.say(f"{sampled}: measured again from its blocks: {why}")
            evaluate_one(job, evaluation, sampled, skipped)


def wait_for_training(job: StageJob, news: Callable[[], bool]) -> None:
    """Wait until `news` returns true; DisScaleError if nothing is published or saved for a day."""

    def saved() -> list[list[str]]:
        """Return the names of the resume points by model, which change while training runs."""
        return [job.sweep.run(model).resume.list() for model in job.recipe.models]

    began_s = since_s = job.now_s()
    before = saved()
    while not news():
        job.raise_if_stopped()
        job.show_idle()
        if job.now_s() - since_s > GIVE_UP_S:
            if before == (now := saved()):
                raise DisScaleError(f"nothing was published or saved for {GIVE_UP_S / 3600:.0f} h: is training running?")
            since_s, before = job.now_s(), now
        job.pause(min(LONGEST_POLL_S, max(POLL_EVERY_S, (job.now_s() - began_s) / 20)))


def _images(sweep: Sweep) -> int:
    """Return the number of samples of all checkpoints that the recipe publishes, and of the floor if it is due."""
    recipe = sweep.recipe
    copied = state.copied_to(sweep, state.origins(sweep))
    checkpoints = sum(len(state.due_counts(sweep, model, copied[model])) for model in recipe.models)
    floor = 0 if state.floor_settled(sweep) else recipe.evaluate.samples
    return checkpoints * sum(settings.samples for settings in recipe.evaluate.samplings.values()) + floor


def open_evaluation(
    job: StageJob, device: str, gpus: int, samplings: dict[str, Evaluate], total: int
) -> tuple[Evaluation, RayEvaluators]:
    """Return an evaluation of `total` samples and its workers on Ray, of which `gpus` at most get a GPU of their own."""
    sweep = job.sweep
    evaluators = RayEvaluators(job, device, gpus, lambda done: job.progress(min(done, total), total, "images"))
    evaluators.spawn()
    from dis_scale.evaluation import reference
    from dis_scale.evaluation.sampling import labels_of

    references, labels = reference.load_all(sweep), labels_of(sweep)
    held = job.held.require_held if job.held else job.require_held  # also for a thread that outlives the stage's block
    evaluation = Evaluation(sweep, evaluators, references, samplings, labels, job.say, job.raise_if_stopped, held)
    return evaluation, evaluators


def evaluate_one(job: StageJob, evaluation: Evaluation, sampled: Sampled, skipped: set[Sampled]) -> None:
    """Evaluate one checkpoint; if it cannot be measured, log that, note it in storage and add it to `skipped`."""
    with noting(job, sampled, skipped):
        job.say(_shown(sampled, evaluation.evaluate(sampled)))
        job.show_idle()  # a measurement from stored blocks samples nothing


@contextmanager
def noting(job: StageJob, sampled: Sampled, skipped: set[Sampled]) -> Iterator[None]:
    """If the block fails and the checkpoint is the cause, log the error, note it in storage and add the checkpoint to `skipped`."""
    try:
        yield
    except (Held, NotOpened, OutOfMemory, Preempted, StorageAway, StorageFull, WorkerFailure, WrongKernel):
        raise  # the checkpoint is not the cause
    except DisScaleError as error:
        why = str(cause_of(error))
        job.emit("skip", model=sampled.model, images=sampled.images_seen, variant=sampled.variant)
        job.say(f"skipped: {sampled}: {why}", level="warning")
        job.require_held()
        Skipped(why=why).write(job.sweep.evaluation(sampled))
        skipped.add(sampled)


def measure_floor(job: StageJob, evaluation: Evaluation) -> None:
    """Measure the floor. If that fails, log and note the reason: no model needs the floor. A later evaluation job tries again.

    If the storage of the sweep or of the images is away, it is asked again for an hour.
    """

    def pause() -> None:
        job.pause(POLL_EVERY_S)
        job.raise_if_stopped()

    try:
        insist(evaluation.floor, job.say, pause)
    except (Held, NotOpened, Preempted, StorageFull, WorkerFailure):
        raise
    except DisScaleError as error:
        why = str(cause_of(error))
        job.say(f"floor: not measured: {why}", level="warning")
        job.require_held()
        Skipped(why=why).write(job.sweep.floor)


def _shown(sampled: Sampled, values: dict[str, float]) -> str:
    return f"{sampled}: {values_in_words(values)}"
