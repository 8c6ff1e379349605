"""Jobs of a running sweep: one stage until it ends, or all trainings with the evaluation beside them."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from dis_scale.process.errors import DisScaleError, Held, Preempted, StorageAway, UserError
from dis_scale.process.progress import Board
from dis_scale.storage import lease
from dis_scale.sweep import STAGES, Sweep, state
from dis_scale.sweep.documents import Ended, StageProgress
from pipelines import lines
from pipelines.cluster import Cluster, in_ray_job
from pipelines.jobs import Job, stop_jobs, submit
from pipelines.metrics import SetGauge
from pipelines.signals import Stop
from pipelines.silence import RayEnded, Silence, Unanswered
from pipelines.stage import insist

T = TypeVar("T")


class Drained(DisScaleError):
    """The node of the sweep's command is being taken away; the state is saved, and a new attempt continues on another node."""

    exit_code = StorageAway.exit_code


LONGEST_PAUSE_S = 300.0
"""Longest pause before a job that follows a failed one of the same day. The pauses double, so that ten jobs outlast ten minutes."""
PROBE_POLLS = 20
"""Polls between two probes of a storage that answers but takes no writes: each probe makes eight requests."""
MOST_FOLLOWED, FOLLOWED_IN_S = 10, 24 * 3600.0
"""Most jobs in this time, without progress, that follow a job that was killed or was stopped for an earlier command."""
MOST_EVALUATIONS, FIRST_AGAIN_S = 6, 10.0
"""Most evaluation jobs that fail in a row without a new result, once all models are trained; and the first pause between them,
which grows fourfold each time."""
ASK_EVERY_S = 10.0
"""Interval at which storage is asked whether a branch can begin."""


@dataclass
class Driver:
    """A sweep that is running: its board, its jobs and the stop request."""

    sweep: Sweep
    board: Board
    jobs: list[Job] = field(default_factory=list)
    followed_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Times at which another job followed one that was killed, was stopped or had lost storage, by stage and model; under "ray",
    those of another local Ray. The times of a name are cleared when more is `stored`."""
    stored: dict[str, int] = field(default_factory=dict)
    """Amount that was stored when the last of these jobs ended, by the same name, for stages that continue from storage."""
    stop_requested: Stop = field(default_factory=Stop)
    submit: Callable[..., Job] = submit
    poll_every_s: float = 0.5
    evaluate_again_s: float = 600.0
    """Longest pause before an evaluation job that failed is submitted again."""
    failed_shown_s: float = 60.0
    """Time for which a failed evaluation job is exported while the next one runs: metrics are read every 15 s or less often."""
    requests_polled_every_s: float = lease.BEAT_S
    """Interval at which storage is asked for a stop request of another process."""
    as_json: bool = False
    """Whether to print the jobs' lines unchanged, as JSON, instead of their messages."""
    first: bool = True
    """Whether this command holds the sweep's lease. A second command joins the jobs of the first one and follows them."""
    taken_over: bool = False
    """Whether another process on the same Ray runs the sweep now; the jobs then belong to that process."""
    drained: bool = False
    """Whether this process was requested to stop because its node is being drained."""
    stop_shown: bool = False
    """Whether the page of the sweep shows that it has stopped."""
    turned_at: float = field(default_factory=time.time)
    """Unix time of the last iteration of the main thread's loop: other threads still run if that hangs."""
    gauge: SetGauge = lambda *_: None
    """Sets a gauge of the sweep, if its Ray exports metrics."""


@dataclass
class Failures:
    """Failed models by name, the failure of the evaluation job, and single failed evaluations; each with its reason."""

    models: dict[str, str] = field(default_factory=dict)
    evaluation: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    def words(self) -> str:
        """Return all failures in one line, empty if there are none."""
        evaluation = [] if self.evaluation is None else [("evaluate", self.evaluation)]
        failed = [*self.models.items(), *evaluation, *self.skipped.items()]  # a model may also be named evaluate
        return "; ".join(f"{name} failed: {why}" for name, why in failed)


@contextmanager
def stopping_jobs(driver: Driver, *, joined: bool = False) -> Iterator[None]:
    """Stop this command's jobs if the block ends by an error; with `joined` also those of an earlier command that it joined."""
    try:
        yield
    except BaseException as error:
        gone = driver.taken_over or isinstance(error, RayEnded)  # the jobs are another process's, or ended with their Ray
        stopped = [job for job in driver.jobs if (job.ours or joined) and not gone]
        # Wait until the jobs have saved: their Ray may end with this process, and the next command would join jobs that stop. But
        # a Ray job that Ray stops has no time for this: a minute at most.
        no_time = in_ray_job() and isinstance(error, Preempted | KeyboardInterrupt)
        wait_s = 0.0 if no_time else driver.sweep.recipe.grace_s + 5
        if stopped and wait_s and isinstance(error, Preempted):
            driver.board.say(f"stopping the jobs save what they have, within {wait_s:.0f} s; a second signal ends this at once")
        with driver.board.working("stopping"):
            unasked = stop_jobs(stopped, wait_s=wait_s)
        if ids := " ".join(job.id for job in unasked if not job.cluster.ours):  # our own Ray ends with this process
            driver.board.say(f"stopping Ray has not stopped these jobs, which may continue; stop each by `ray job stop`: {ids}")
        raise


def run_stage(driver: Driver, cluster: Cluster, name: str, *arguments: str) -> None:
    """Run one stage to its end; DisScaleError gives the reason if it failed."""
    while True:
        job = _submit(driver, cluster, name, *arguments)
        while not job.ended():
            _poll(driver, job, name)
            time.sleep(driver.poll_every_s)
        _poll(driver, job, name)
        if job.status == "SUCCEEDED" and _knows_recipe(driver, job):
            return
        if job.status != "SUCCEEDED" and not _goes_on_again(driver, job, name):
            raise job.error(f"{name} failed: {job.reason()}")


def train_and_evaluate(driver: Driver, cluster: Cluster) -> Failures:
    """Train models in the recipe's order, as many at a time as the cluster can hold, with the evaluation next to them."""
    sweep, failures = driver.sweep, Failures()
    waiting = _insist(driver, lambda: [model for model in sweep.recipe.models if not state.trained(sweep, model)])
    driver.gauge("models_failed", 0)
    for model in list(waiting):
        if driver.first:
            _insist(driver, partial(sweep.run(model).folder.delete, Ended.NAME))
        elif failed := _insist(driver, partial(Ended.find_intact, sweep.run(model).folder)):
            waiting.remove(model)  # it failed under the command that this one joined
            failures.models[model] = failed.why
    evaluation = _Evaluation(driver, cluster, failures, trained=not waiting)
    training: dict[str, Job] = {}
    evaluated, asked_s = False, float("-inf")
    while waiting or training or not evaluated:
        go_on(driver)
        due = time.monotonic() > asked_s + ASK_EVERY_S
        _begin_waiting(driver, cluster, waiting, training, failures, ask=due)
        asked_s = time.monotonic() if due else asked_s
        time.sleep(driver.poll_every_s)
        evaluated = evaluation.over(trained=not (waiting or training))
        for model, job in list(training.items()):
            ended = job.ended()
            _poll(driver, job, f"train {model}")
            if ended:
                del training[model]
                asked_s = float("-inf")  # a branch may begin now
                if following := _after(driver, cluster, failures, model, job):
                    training[model] = following
    return failures


def _after(driver: Driver, cluster: Cluster, failures: Failures, model: str, job: Job) -> Job | None:
    """Return the job that follows an ended training job; None if the model is trained or has failed."""
    trained = partial(_insist, driver, partial(state.trained, driver.sweep, model))
    if job.status == "SUCCEEDED":
        return None if _knows_recipe(driver, job) or trained() else _submit(driver, cluster, "train", model)
    stored = partial(state.resumable_images, driver.sweep.run(model))
    if not trained() and _goes_on_again(driver, job, f"train {model}", stored):
        return _submit(driver, cluster, "train", model)
    why = _failure(driver, job, model)
    if trained():
        driver.board.say(f"{model} is trained anyway: its last count is published")
    else:
        _fail(driver, failures, model, why)
    return None


def _insist(driver: Driver, ask: Callable[[], T]) -> T:
    """Return the answer of storage. While storage is away it is asked again, for as long as the jobs themselves wait for it."""

    def pause() -> None:
        go_on(driver)
        time.sleep(driver.poll_every_s)

    return insist(ask, lambda words: driver.board.say(f"waiting  {words}"), pause)


class _Evaluation:
    """The evaluation job beside the trainings. After an accident another job is submitted: both may run for weeks."""

    def __init__(self, driver: Driver, cluster: Cluster, failures: Failures, *, trained: bool) -> None:
        self._driver, self._failures = driver, failures
        self._submit = partial(_submit, driver, cluster, "evaluate")
        self._job: Job | None = self._submit()
        driver.gauge("evaluation_failed", 0)
        self._again_s, self._trained, self._over = 0.0, trained, False
        self._failed, self._results = 0, 0
        self._shown_until_s = math.inf
        """Time (monotonic) until which the previous job is exported as failed."""
        self._alone = cluster.ours
        """Whether the cluster is one machine, so that no other node can be away."""

    def over(self, *, trained: bool) -> bool:
        """Show the job's log; return whether evaluation is over. The number of jobs is limited once all models are `trained`."""
        if self._over:
            return True
        if self._job is None:
            if time.monotonic() < self._again_s and trained == self._trained:  # the pause ends when the last training ends
                return False
            if trained and not self._trained:
                self._failed = 0
            self._job, self._trained = self._submit(), trained
            self._shown_until_s = time.monotonic() + self._driver.failed_shown_s
        elif time.monotonic() > self._shown_until_s:
            self._driver.gauge("evaluation_failed", 0)
            self._shown_until_s = math.inf
        ended = self._job.ended()  # asked before the log is read, so that no last line is missed
        _poll(self._driver, self._job, "evaluate")
        if ended and self._job.status == "SUCCEEDED" and not _knows_recipe(self._driver, self._job):
            self._job = None
        elif ended and self._job.status == "SUCCEEDED":
            self._over, self._failures.evaluation = True, None
            self._driver.gauge("evaluation_failed", 0)
        elif ended:
            self._over = not self._goes_on_after(self._job)
        return self._over

    def _goes_on_after(self, job: Job) -> bool:
        """Note why a job failed; return whether another one follows. After a mistake one follows only beside trainings.

        A file that one node lacks looks like a mistake while the other nodes are away, as at the start. On a single machine no node
        can be away, so a mistake before the first result ends evaluation.
        """
        if job.killed:
            self._driver.gauge("evaluation_failed", 1)
        if _goes_on_again(self._driver, job, "evaluate", self._measured):
            self._job = None
            return True
        # The storage that is away may be the hub of evaluation's weights, which training does not need.
        self._failures.evaluation = _failure(self._driver, job, "evaluate", ends_by_away=self._trained)
        self._driver.gauge("evaluation_failed", 1)
        results = _insist(self._driver, self._measured)
        self._failed, self._results = 1 if results > self._results else self._failed + 1, results
        mistaken = isinstance(job.error(""), UserError)
        if (self._trained and (mistaken or self._failed >= MOST_EVALUATIONS)) or (mistaken and self._alone and not results):
            return False
        longest_s = self._driver.evaluate_again_s * (6 if mistaken else 1)
        wait_s = min(longest_s, FIRST_AGAIN_S * 4.0 ** min(self._failed - 1, 9))
        self._driver.board.say(f"another evaluation job follows in {wait_s:.0f} s")
        self._job, self._again_s = None, time.monotonic() + wait_s
        return True

    def _measured(self) -> int:
        sweep = self._driver.sweep
        return sum(len(state.measured(sweep, model)) for model in sweep.recipe.models)


def _begin_waiting(
    driver: Driver, cluster: Cluster, waiting: list[str], training: dict[str, Job], failures: Failures, *, ask: bool
) -> None:
    """Start to train waiting models while the cluster has capacity; branches only if storage may be asked about their trunks."""
    at_once = max(1, cluster.at_once()) if waiting else 0  # one job waits, logs for what, and lets an autoscaler add nodes
    for model in list(waiting):
        branch = driver.sweep.recipe.models[model].branch
        if len(training) >= at_once or (branch and not ask):
            continue
        go_on(driver)  # before each question to storage
        try:
            begins = state.may_begin(driver.sweep, model)
            in_vain = branch and not begins and (
                # a trunk with later resume points has not kept the one where the branch begins
                branch.of not in (*waiting, *training) or state.resumable_images(driver.sweep.run(branch.of)) > branch.at
            )  # fmt: skip
        except StorageAway:
            return  # perhaps only for a while; the running jobs wait for storage by themselves
        if begins:
            waiting.remove(model)
            training[model] = _submit(driver, cluster, "train", model)
        elif in_vain and branch:
            waiting.remove(model)
            why = f"{branch.of} has no resume point at {branch.at} images any more, from which {model} branches"
            _fail(driver, failures, model, why)


def _knows_recipe(driver: Driver, job: Job) -> bool:
    """Return whether a job began with this command's recipe. A job of an earlier command has read the recipe of that command,
    which lacks what was added since."""
    return job.ours or not driver.first


def _fail(driver: Driver, failures: Failures, model: str, why: str) -> None:
    """Note that a model has failed; the others continue."""
    failures.models[model] = why
    driver.gauge("models_failed", len(failures.models))
    _insist(driver, partial(Ended(why=why).write, driver.sweep.run(model).folder))


def _failure(driver: Driver, job: Job, name: str, *, ends_by_away: bool = True) -> str:
    """Return why a job failed. Raise if it was stopped from outside, is held elsewhere or lost storage: these are no failures.

    Without `ends_by_away`, lost storage counts as a failure.
    """
    why = job.reason()
    error = job.error(f"{name}: {why}")
    if isinstance(error, Held) or (ends_by_away and isinstance(error, StorageAway)):
        raise error
    if isinstance(error, Preempted):
        raise Preempted(f"{name} was stopped from outside; {how_to_continue(driver.sweep)}")
    driver.board.say(f"{name} failed: {why}; the other jobs continue")
    return why


def _goes_on_again(driver: Driver, job: Job, name: str, stored: Callable[[], int] = lambda: 0) -> bool:
    """Return whether another job follows one that did not succeed, a limited number of times since more was `stored`.

    Another job follows if the job's process was killed, if it was stopped for an earlier command, or if storage was away. In the
    last case this waits until storage answers again; StorageAway if it is away for longer than jobs wait. If this command joined
    another one, a stopped job was stopped by that command, and no job follows.
    """
    stopped, away = job.status == "STOPPED" and not job.ours and driver.first, isinstance(job.error(""), StorageAway)
    if not (job.killed or stopped or away) or not may_follow(driver, name, _insist(driver, stored)):
        return False
    why = job.reason()[:200]
    what = f"its process was killed, or not started ({why})"
    if stopped:
        what = "it was stopped for an earlier command"
    elif away:
        _insist(driver, partial(_require_usable, driver))
        what = f"storage or a node was away ({why})"
    driver.board.say(f"{name}: {what}, and another job continues")
    pause_before_next(driver, name)
    return True


def _require_usable(driver: Driver) -> None:
    """Raise StorageAway unless storage takes writes: after an outage it may answer, but refuse writes or list wrongly."""
    try:
        driver.sweep.store.require_usable()
    except UserError as error:
        _pause(driver, PROBE_POLLS * driver.poll_every_s)
        raise StorageAway(str(error)) from error


def _pause(driver: Driver, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        go_on(driver)
        time.sleep(driver.poll_every_s)


def pause_before_next(driver: Driver, name: str) -> None:
    """Wait before the next job or Ray, except before the first within a day: a machine may be short of memory for minutes."""
    if len(driver.followed_s[name]) > 1:
        _pause(driver, min(LONGEST_PAUSE_S, driver.poll_every_s * 2 ** len(driver.followed_s[name])))


def may_follow(driver: Driver, name: str, stored: int = 0) -> bool:
    """Note that another job or Ray follows one of this name; return false if too many have followed since more was `stored`."""
    now_s = time.monotonic()
    if stored != driver.stored.get(name, 0):
        driver.stored[name], driver.followed_s[name] = stored, []
    lately = [at_s for at_s in driver.followed_s[name] if now_s - at_s < FOLLOWED_IN_S]
    if len(lately) == MOST_FOLLOWED:
        return False
    driver.followed_s[name] = [*lately, now_s]
    return True


def how_to_continue(sweep: Sweep) -> str:
    return f"to continue: dis-scale resume {sweep}"


def silence_of(driver: Driver, cluster: Cluster) -> Silence:
    """Return a `Silence` for the cluster's Ray that logs to the driver's board."""
    error = RayEnded if cluster.ours else Unanswered
    return Silence(driver.board.say, pause_s=driver.poll_every_s, require_alive=cluster.require_alive, error=error)


def _submit(driver: Driver, cluster: Cluster, stage: str, *arguments: str) -> Job:
    silence = silence_of(driver, cluster)
    submitted = partial(driver.submit, cluster, driver.sweep, stage, *arguments)
    try:
        job: Job = silence.insist(submitted, partial(go_on, driver))
    except BaseException:  # Ray may have accepted a job although its answer was lost
        known = {job.id for job in driver.jobs}
        driver.jobs += [Job(cluster, name, ours=True, silence=silence) for name in cluster.unanswered - known]
        raise
    job.silence = silence
    driver.jobs.append(job)
    joined = "" if job.ours else " (running already: joined)"
    driver.board.say(f"{' '.join([stage, *arguments])}: Ray job {job.id}{joined}")
    return job


def _poll(driver: Driver, job: Job, name: str) -> None:
    """Show what the job logged since the last poll; raise Preempted if this process was asked to stop."""
    progress = None
    for raw in job.lines():
        go_on(driver)  # the log of a joined job may have days of lines
        line = lines.parse(raw)
        if line and line.kind == "progress":
            progress = {part: line.facts[part] for part in ("done", "total", "unit")}
            driver.board.update(name, **progress)
        elif line and driver.as_json:
            lines.write(raw)
        elif line and line.kind == "message":
            driver.board.say(f"  {line.text}")
    go_on(driver)
    if not driver.as_json:
        driver.board.at_work(name)
    if progress and name in STAGES:
        with suppress(DisScaleError):  # only people read it: the sweep's retries would delay a stop request for minutes
            StageProgress(stage=name, at=time.time(), **progress).write(replace(driver.sweep.folder, tries=1))


def go_on(driver: Driver) -> None:
    """Note that the command's loop turns; raise Preempted or Drained if it was requested to stop."""
    driver.turned_at = time.time()
    if driver.drained:
        raise Drained(f"the node of this command is being drained; {how_to_continue(driver.sweep)}")
    if driver.stop_requested.is_set():
        raise Preempted(f"stopped as requested; {how_to_continue(driver.sweep)}")
