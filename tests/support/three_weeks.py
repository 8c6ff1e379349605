"""Three weeks of a sweep on a simulated clock.

Ours are the driver, the restarts, the loop of evaluation, the pace of encoders, the exclusion of nodes and the retries of storage.
Simulated are KubeRay's controller, Ray's jobs, the pods, and what a stage computes.

The controller follows the rules that KubeRay 1.7 documents, and its source at that tag (`rayjob_controller.go`): a RayJob begins
when all pods run; its submitter's pod is replaced until `submitterConfig.backoffLimit`; an unanswered question for the job's status
ends it for good after a time; a FAILED job is repeated on a new cluster, a STOPPED one is complete.
"""

import heapq
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from ray.job_submission import JobDetails, JobStatus

from dis_scale.process import faults
from dis_scale.process.context import Context
from dis_scale.process.errors import BrokenDevice, DisScaleError, StorageFull
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.storage.manifest import NAME
from dis_scale.sweep import Run, Sampled, Sweep, state
from pipelines import cluster as clusters
from pipelines import driver as drivers
from pipelines import evaluate, jobs, nodes
from pipelines.failures import WorkerFailure
from pipelines.lines import Log
from pipelines.restarts import with_restarts
from pipelines.sharing import SHARED
from pipelines.watching import STAGE_HANGS_AFTER_S, Pace
from tests.support.documents import put_metrics, put_published
from tests.support.drivers import driver_of
from tests.support.stage_jobs import RecordedJob

T = TypeVar("T")
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
STEP_S = 40 * MINUTE
POLL_S, ASK_S = 60.0, 60.0
"""Intervals of the driver and of the controller. Really they ask 45 times as often, and one answer in 100,000 is lost."""
LOST_ANSWERS = 45e-5
BAD = "node-1"
"""The machine whose GPU fails half an hour after each start."""
WORLD = 3
"""Nodes of a training."""


class Killed(BaseException):
    """The process was killed."""


class Process(threading.Thread):
    """A simulated process; one runs at a time."""

    def __init__(self, world: "World", body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.world, self.body, self.killed, self.over = world, body, False, False
        self.turn = threading.Semaphore(0)

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.killed:
                self.body()
        except Killed:
            pass
        except BaseException as error:  # of the simulation itself
            self.world.broken = error
        finally:
            self.over = True
            self.world.back.release()

    def kill(self) -> None:
        """End the process at its next turn, which is now."""
        self.killed = True
        self.world.schedule(0, self)


class World:
    """A clock whose time passes only while every process sleeps."""

    def __init__(self) -> None:
        self.now, self.back, self.broken = 0.0, threading.Semaphore(0), None  # type: float, threading.Semaphore, BaseException | None
        self._queue: list[tuple[float, int, Process]] = []
        self._order = itertools.count()
        self._every: list[Process] = []

    def spawn(self, body: Callable[[], None]) -> Process:
        process = Process(self, body)
        process.start()
        self._every.append(process)
        self.schedule(0, process)
        return process

    def schedule(self, seconds: float, process: Process) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), process))

    def sleep(self, seconds: float) -> None:
        process = threading.current_thread()
        assert isinstance(process, Process)
        self.schedule(max(seconds, 1e-3), process)
        self.back.release()
        process.turn.acquire()
        if process.killed:
            raise Killed

    def run(self, until: float, done: Callable[[], bool]) -> None:
        """Let the processes run until the time, or until `done`; then kill all."""
        while self._queue and self._queue[0][0] < until and not done():
            self._turn()
        for process in self._every:
            process.killed = True
        while any(not process.over for process in self._every):
            process = next(process for process in self._every if not process.over)
            process.turn.release()
            self.back.acquire()

    def _turn(self) -> None:
        at, _, process = heapq.heappop(self._queue)
        if not process.over:
            self.now = at
            process.turn.release()
            self.back.acquire()
        if self.broken:
            raise self.broken

    @contextmanager
    def clock(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Give the processes this clock; other threads keep the machine's."""
        real = {name: getattr(time, name) for name in ("sleep", "monotonic", "time")}

        def simulated(name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *a: (ours if isinstance(threading.current_thread(), Process) else real[name])(*a)

        patch.setattr(time, "sleep", simulated("sleep", self.sleep))
        patch.setattr(time, "monotonic", simulated("monotonic", lambda: self.now))
        patch.setattr(time, "time", simulated("time", lambda: self.now))
        yield


@dataclass
class Job:
    """A Ray job: its process, its output, and how it ended."""

    process: Process
    lines: list[str] = field(default_factory=list)
    status: JobStatus = JobStatus.RUNNING
    exit_code: int | None = None


class Ray:
    """The head of a Ray cluster with its jobs, and its client; both are gone while the head is."""

    def __init__(self, weeks: "Weeks") -> None:
        self.weeks, self.up, self.jobs = weeks, True, dict[str, Job]()

    def begin(self, name: str, program: Callable[[Job], int]) -> None:
        """Run a job; its program returns the exit code."""
        job = Job(self.weeks.world.spawn(lambda: self._run(job, program)))
        self.jobs[name] = job

    def _run(self, job: Job, program: Callable[[Job], int]) -> None:
        job.exit_code = program(job)
        if job.status == JobStatus.RUNNING:  # else it was stopped
            job.status = JobStatus.FAILED if job.exit_code else JobStatus.SUCCEEDED

    def lose(self) -> None:
        """The head is gone, and every job with it."""
        self.up = False
        for job in self.jobs.values():
            job.process.kill()
        self.jobs.clear()

    def _answer(self, act: Callable[[], T]) -> T:
        """Do what is asked for; of the answers that are lost, half are of what was done."""
        self.weeks.happened["question"] += 1
        if not self.up:
            self.weeks.happened["head silent"] += 1
            raise ConnectionError("no answer")
        lost = self.weeks.chance.random() < LOST_ANSWERS
        if lost:
            self.weeks.happened["answer lost"] += 1
        if not (lost and self.weeks.happened["answer lost"] % 2):
            answer = act()
        if lost:
            raise ConnectionError("no answer")
        return answer

    def list_jobs(self) -> list[JobDetails]:
        return self._answer(lambda: [self._details(name) for name in self.jobs])

    def submit_job(self, entrypoint: str, submission_id: str, **_: Any) -> None:
        self._answer(lambda: self._submit(entrypoint, submission_id))

    def _submit(self, entrypoint: str, name: str) -> None:
        if name in self.jobs:
            raise RuntimeError(f"Job with submission_id {name} already exists. Please use a different submission_id.")
        self.begin(name, self.weeks.stage(entrypoint.split()))

    def get_job_info(self, name: str) -> JobDetails:
        return self._answer(lambda: self._details(name))

    def _details(self, name: str) -> JobDetails:
        if name not in self.jobs:
            raise RuntimeError(f"status code 404: {name}")
        job = self.jobs[name]
        return JobDetails(type="SUBMISSION", submission_id=name, status=job.status, entrypoint="", driver_exit_code=job.exit_code)

    def get_job_logs(self, name: str) -> str:
        return self._answer(lambda: "".join(f"{line}\n" for line in self.jobs[name].lines))

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield ""

    def stop_job(self, name: str) -> None:
        self._answer(lambda: self._stop(self.jobs[name]))

    def _stop(self, job: Job) -> None:
        job.status = JobStatus.STOPPED
        job.process.kill()


@dataclass(frozen=True)
class Rules:
    """What KubeRay is told by cluster/rayjob.yaml and by its operator's environment."""

    backoff_limit: int
    submitter_limit: int
    status_timeout_s: float
    submitter_follows: bool
    """Whether the submitter's pod asks again when the connection of its log ends; KubeRay's own is then complete."""


@dataclass
class Weeks:
    """A sweep, what runs it, and what happens to it."""

    root: Path
    recipe: Recipe
    rules: Rules
    encoders_hang_after_s: float = STAGE_HANGS_AFTER_S
    world: World = field(default_factory=World)
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    happened: Counter[str] = field(default_factory=Counter)
    deployment: str = "Initializing"
    """The RayJob's `jobDeploymentStatus`."""
    why: str = ""
    clusters: int = 0
    away_at_save: bool = False
    """Whether storage is away from the next save of a training on."""
    storage_away: bool = False
    lost_at: dict[str, float] = field(default_factory=dict)
    """When a node was last lost; it is back at `back_at`."""
    back_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sweep = Sweep.below(open_folder(self.root).patient, self.recipe)
        self.nodes = [f"node-{n}" for n in range(4)]
        self.ray = Ray(self)

    def run(self, patch: pytest.MonkeyPatch) -> None:
        """Simulate the weeks, until the RayJob is over."""
        random.seed(7)
        patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "sweep"}}')
        patch.setenv(jobs.FINAL, "1")
        patch.setattr(faults, "at", self._storage)
        patch.setattr(evaluate, "LONGEST_POLL_S", 10 * MINUTE)
        with self.world.clock(patch):
            for body in (self._kuberay, self._accidents, self._preemptions):
                self.world.spawn(body)
            self.world.run(28 * DAY, lambda: self.deployment in ("Complete", "Failed"))

    @property
    def complete(self) -> bool:
        """Whether every model is trained and evaluated."""
        return all(state.trained(self.sweep, model) for model in self.recipe.models) and state.all_evaluated(self.sweep)

    # What happens.

    def _accidents(self) -> None:
        """Each once or more, at times of their own: the head and storage away, the submitter lost, no capacity."""
        hours = {30: self._head_away, 200: self._head_away, 60: self._away, 250: self._away, 100: self._drought}
        hours |= dict.fromkeys(range(10, 520, 35), self._submitter_lost)
        hours |= dict.fromkeys(range(12, 520, 90), self._log_ends)
        for hour in sorted(hours):
            self.world.sleep(max(hour * HOUR - self.world.now, 0))
            hours[hour]()

    def _head_away(self) -> None:
        self.happened["head away"] += 1
        ray = self.ray
        ray.lose()
        self.world.sleep(10 * MINUTE)
        ray.up = True

    def _away(self) -> None:
        self.happened["storage away"] += 1
        self.away_at_save = True
        while self.away_at_save:
            self.world.sleep(MINUTE)
        self.world.sleep(20 * MINUTE)
        self.storage_away = False

    def _submitter_lost(self) -> None:
        self.happened["submitter lost"] += 1
        self.submitter_up = False

    def _log_ends(self) -> None:
        self.happened["log ended"] += 1
        self.submitter_complete = self.submitter_up and not self.rules.submitter_follows

    def _drought(self) -> None:
        self.happened["drought"] += 1
        for node in self.nodes[1:]:
            self._lose(node, 30 * HOUR)

    def _preemptions(self) -> None:
        """Each node is taken away about every two days, and is back within hours."""
        while True:
            self.world.sleep(self.chance.expovariate(len(self.nodes) / (2 * DAY)))
            self.happened["preemption"] += 1
            self._lose(self.chance.choice(self.nodes), self.chance.uniform(1, 4) * HOUR)

    def _lose(self, node: str, seconds: float) -> None:
        self.lost_at[node] = self.world.now
        self.back_at[node] = max(self.back_at.get(node, 0), self.world.now + seconds)

    def _alive(self) -> list[nodes.Node]:
        return [nodes.Node(name, name, {}) for name in self.nodes if self.back_at.get(name, 0) <= self.world.now]

    def _storage(self, point: str, **_: Any) -> None:
        if self.storage_away and point in ("read", "write", "create", "list", "delete"):
            raise ConnectionError("storage is away")

    # KubeRay's controller.

    def _kuberay(self) -> None:
        for _ in range(1 + self.rules.backoff_limit):
            self.deployment, self.clusters, self.ray = "Initializing", self.clusters + 1, Ray(self)
            self.world.sleep(5 * MINUTE)  # pods are scheduled, and pull the image
            while len(self._alive()) < len(self.nodes):
                self.world.sleep(ASK_S)
            self.deployment, self.why = "Running", ""
            self._follow()
            if self.deployment == "Complete" or self.why == "JobStatusCheckTimeoutExceeded":
                break
            self.ray.lose()
        else:
            self.deployment = "Failed"

    def _follow(self) -> None:
        """Watch one cluster's job until it is over, and replace its submitter's pod."""
        self.submitter_up, losses, again_s, answered_s = False, -1, 0.0, self.world.now
        self.submitter_complete = False
        while True:
            if not self.submitter_up and self.world.now >= again_s:
                losses += 1
                if losses > self.rules.submitter_limit:
                    self.deployment, self.why = "Failed", "SubmissionFailed"
                    return
                again_s = self.world.now + min(10.0 * 2**losses, 6 * MINUTE)  # a Kubernetes Job's back-off
                self.submitter_up = self.ray.up
                if self.ray.up and "sweep" not in self.ray.jobs:
                    self.ray.begin("sweep", self._command)
            self.submitter_up = self.submitter_up and self.ray.up
            try:
                status = self.ray.get_job_info("sweep").status
                answered_s = self.world.now
            except (ConnectionError, RuntimeError):
                status = JobStatus.RUNNING
            if self.world.now - answered_s > self.rules.status_timeout_s:
                self.deployment, self.why = "Failed", "JobStatusCheckTimeoutExceeded"
                return
            if status not in jobs.ENDED and self.submitter_complete:  # for 30 s
                self.deployment, self.why = "Failed", "JobDeploymentStatusTransitionGracePeriodExceeded"
                return
            if status in jobs.ENDED:
                self.deployment = "Failed" if status == JobStatus.FAILED else "Complete"
                self.why = "AppFailed" if status == JobStatus.FAILED else ""
                return
            self.world.sleep(ASK_S)

    # The sweep's command and the programs of its stages.

    def _command(self, job: Job) -> int:
        """The driver's own loops; return the exit code of the command."""
        code, driver = 0, driver_of(self.recipe, self.root)
        driver.sweep, driver.poll_every_s, driver.submit = self.sweep, POLL_S, self._submit
        cluster = clusters.Cluster(self.ray, {}, "", ours=False, at_once=lambda: 1, gpus=lambda: 0, gpu_fault="", id="ray")
        try:
            with drivers.stopping_jobs(driver, joined=True):
                if not self.sweep.folder.exists("encoded"):
                    drivers.run_stage(driver, cluster, "precompute")
                if words := drivers.train_and_evaluate(driver, cluster).words():
                    raise DisScaleError(words)
        except DisScaleError as error:
            code, self.last_words = error.exit_code, str(error)
            code = jobs.end_own_job(code, connect=lambda _: self.ray, wait_s=1.0, silent_s=1.0)
        return code

    def _submit(self, *arguments: Any) -> jobs.Job:
        job = jobs.submit(*arguments)
        job.reconnect_every_s = float("inf")  # no thread to follow an output that is empty
        return job

    def stage(self, words: list[str]) -> Callable[[Job], int]:
        """Return the program of a stage's job."""
        stage, arguments = words[3], words[5:]
        programs: dict[str, Callable[..., None]] = {
            "precompute": self._encode, "train": self._train, "evaluate": self._evaluate
        }  # fmt: skip
        program = programs[stage]

        def run(job: Job) -> int:
            log = Log(Context(stage=stage), job.lines.append)
            try:
                program(_StageJob(self, log), *arguments)
            except DisScaleError as error:
                log.fail(str(error))
                return error.exit_code
            return 0

        return run

    def _encode(self, job: "_StageJob") -> None:
        """Two encoders, a shard each quarter of an hour. In the first attempt the second hangs, until its pace says so."""
        hangs, done, running = not self.happened["encoding"], [0, 0], [0, 1]
        pace = Pace(2, replace(SHARED, hang_after_s=self.encoders_hang_after_s))
        self.happened["encoding"] += 1
        while running:
            self.world.sleep(15 * MINUTE)
            for number in running:
                done[number] += not (hangs and number and done[number] >= 2)
            killed = pace.note(done, running, (), self.world.now)
            self.happened["encoder killed"] += len(killed)
            running = [number for number in running if done[number] < 20 and number not in killed]
        if hangs:
            self._encode(job)  # another attempt makes what the lost one had begun
        self.sweep.folder.write("encoded", b"")
        self.encoded_h = self.world.now / HOUR

    def _train(self, job: "_StageJob", model: str) -> None:
        """Train by attempts on nodes that are not excluded: an image each `STEP_S`, saved with every third."""
        run = self.sweep.run(model)

        def stored() -> int:
            return int(run.folder.read("saved")) if run.folder.exists("saved") else 0

        def attempt(_: WorkerFailure | None) -> None:
            placed = self._place(job)
            began_s, seen, job.placed = self.world.now, stored(), frozenset(placed)
            for step in itertools.count(1):
                for count in self.recipe.train_of(model).publish_images:
                    if count <= seen and not run.published_at(count).exists(NAME):
                        put_published(run.published_at(count), images=count)
                if seen >= self.recipe.train_of(model).images:
                    return
                self.world.sleep(STEP_S)
                if lost := [name for name in placed if self.lost_at.get(name, -1) >= began_s]:
                    raise WorkerFailure(f"a worker was lost ({lost[0]})", seen)
                if BAD in placed:
                    self.happened["GPU failed"] += 1
                    why = str(BrokenDevice("uncorrectable ECC error encountered"))
                    nodes.record_failure(job, BAD, why)
                    raise WorkerFailure(why, seen, cause="device", worker=placed.index(BAD))
                seen += 1
                if step % 3 == 0:
                    self._save(run, seen)

        with_restarts(job, model, attempt, stored)

    def _save(self, run: Run, seen: int) -> None:
        if self.away_at_save:
            self.away_at_save, self.storage_away = False, True
        run.folder.write("saved", str(seen).encode())

    def _place(self, job: "_StageJob") -> list[str]:
        while True:
            alive = self._alive()
            enough = partial(lambda count, bad: count - len(bad) >= WORLD, len(alive))
            avoided = nodes.excluded(job, alive, enough)
            free = [node.name for node in alive if node.id not in avoided]
            if len(free) >= WORLD:
                return free[:WORLD]
            job.pause(5 * MINUTE)

    def _evaluate(self, job: "_StageJob") -> None:
        """The stage's own loop; a checkpoint takes an hour, and once the disk is full."""
        evaluators = SimpleNamespace(move=lambda: False, end=lambda: None)
        evaluation = SimpleNamespace(sample=lambda sampled: partial(dict, self._measure(sampled)))
        evaluate.PublishedEvaluation(job, "cpu", lambda *_: (evaluation, evaluators)).run()  # type: ignore[arg-type]

    def _measure(self, sampled: Sampled) -> dict[str, float]:
        self.world.sleep(HOUR)
        if not self.happened["disk full"]:
            self.happened["disk full"] += 1
            raise StorageFull("no space left on the device")
        return put_metrics(self.sweep.evaluation(sampled), metrics=tuple(self.recipe.evaluate.metrics)).values


class _StageJob(RecordedJob):
    """A stage's job on the simulated clock."""

    def __init__(self, weeks: Weeks, log: Log) -> None:
        super().__init__(weeks.sweep, log=log)
        self._world = weeks.world

    def now_s(self) -> float:
        return self._world.now

    def pause(self, seconds: float) -> None:
        self._world.sleep(seconds)
