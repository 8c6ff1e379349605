"""How a driver watches its workers: their progress, failures, hangs and stop requests."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from dis_scale.process import faults
from dis_scale.process.errors import OutOfMemory, StorageAway
from pipelines import nodes
from pipelines.failures import Hang, WorkerFailure, blame, describe, failure_of, failure_to_raise, may_pass
from pipelines.ray_private import actor_id, has_process, node_of
from pipelines.stage import StageJob
from pipelines.waiting import LOGGED_AFTER_S, Wait

STAGE_HANGS_AFTER_S = 900.0
"""Time without progress after which a worker of any stage counts as hanging; training's is a setting."""
MEDIANS = 10
"""Longest time of an independent worker between two steps of progress, in medians of its previous times."""
FIRST = 4
"""Factor by which the first progress may take longer: a worker reads a resume point or networks, and compiles kernels."""
Report = Callable[[list[int]], None]
"""Called with each worker's progress, in the order of the workers."""


@dataclass(frozen=True)
class Watch:
    """What counts as a hang, what ends the work early, whose failures disturb whom, and how long answers may take."""

    hang_after_s: float = STAGE_HANGS_AFTER_S
    """Time without progress of any worker that counts as a hang; `FIRST` times as long before the first progress, and for work that
    reports none. Independent workers are watched one by one, and a worker that hangs is killed."""
    last: float = float("inf")
    """Progress of all workers after which they only write. They have at least an hour for this: storage has retries of its own."""
    stop_early: Callable[[], float | None] = lambda: None
    """Returns the seconds that the workers have to save, or None. It is called once a poll: the workers are requested to stop when
    it first returns a number, and again when a number leaves them less time."""
    independent: bool = False
    """Whether the accident of one worker leaves the others undisturbed; it is raised when these have ended.

    Workers without capacity are no longer waited for when the others have ended: their results are left out.
    """
    blame_behind: bool = False
    """Whether a hang counts as a failed device of a node, if only the workers of this node are behind the others."""
    held: Sequence[str] = ()
    """Ids of the nodes on which the workers already have their places, so that none waits for capacity. If processes fail to
    start on exactly one node, this node has failed."""
    on_lost: Callable[[], object] = lambda: None
    """Called at once when one of several independent workers is lost."""
    keep_logs: bool = True
    """Whether each worker's log is kept under its number from now on; not before the order of the workers is final."""
    poll_every_s: float = 1.0
    answer_s: float = 10.0
    """Time for a worker to answer a poll, or to return its stacks when it hangs. Also time for the other workers to end after an
    error that the failure of one of them may have caused."""
    logged_after_s: float = LOGGED_AFTER_S
    """Time for which a wait for capacity is not logged."""


def watch(
    job: StageJob, workers: Sequence[Any], results: Sequence[Any], report: Report = lambda _: None, policy: Watch = Watch()
) -> list[Any]:
    """Wait for the result of each worker and return all; forward a stop request; pass the progress to `report`.

    Raises the first failure at once: WorkerFailure if a new attempt may do better, also after a hang, whose stacks are logged. The
    failure of a device counts against its node.
    """
    if policy.keep_logs:
        job.logs.keep_workers(workers)
    try:
        return _Loop(job, workers, results, report, policy).run()
    except (WorkerFailure, OutOfMemory, StorageAway, ray.exceptions.RayError) as error:
        job.logs.collect(workers)
        if isinstance(error, WorkerFailure) and error.cause == "device" and error.worker is not None:
            nodes.record_failure_of(job, _node(policy, workers, error.worker), str(error))
        if not isinstance(error, WorkerFailure | StorageAway):
            raise
        # Free the workers' resources for the next attempt now: the exception's traceback would keep the handles alive.
        if not policy.independent or isinstance(error, StorageAway):
            for worker in workers:
                ray.kill(worker)
        raise


def _node(policy: Watch, workers: Sequence[Any], number: int) -> str:
    """Return the id of a worker's node."""
    return policy.held[number] if policy.held else node_of(workers[number])


class Pace:
    """Times between two steps of progress, and since the last one: of each independent worker, or of all workers together."""

    def __init__(self, workers: int, policy: Watch) -> None:
        self._policy = policy
        self._done: list[int | None] = [None] * workers
        self._most, self._advanced_s, self._over = -1, 0.0, False
        self._since_s: dict[int, float] = {}
        self._took_s = [deque[float](maxlen=100) for _ in range(workers)]

    def note(self, done: Sequence[int | None], running: Collection[int], unplaced: Collection[int], now_s: float) -> list[int]:
        """Note the progress of all workers; return the numbers of the `running` ones that hang, [0] for all together.

        A worker that waits for capacity does not hang. The progress of a worker is None before its first answer, which may be of
        other work that it has done before.
        """
        working, known = set(running).difference(unplaced), [images for images in done if images is not None]
        total = sum(known) if len(known) == len(done) else None
        if unplaced or self._most < 0 or (total or 0) > self._most:
            self._most, self._advanced_s = total or 0, now_s
        if not self._policy.independent:
            done, working, self._over = [total], set() if unplaced else {0}, total is not None and min(known) >= self._policy.last
        for number, images in enumerate(done):
            before = self._done[number]
            if number not in working:
                self._since_s.pop(number, None)
            elif number not in self._since_s:
                self._since_s[number] = now_s  # its progress so far is of other work
            elif images is not None and before is not None and images > before:
                self._took_s[number].append(now_s - self._since_s[number])
                self._since_s[number] = now_s
        self._done = list(done)
        return [number for number, since_s in self._since_s.items() if now_s - since_s > self.limit_s(number)]

    def limit_s(self, number: int) -> float:
        """Return the time without progress after which a worker counts as hanging."""
        least_s, took_s = self._policy.hang_after_s, self._took_s[number]
        if self._over:
            return FIRST * max(least_s, STAGE_HANGS_AFTER_S)
        if not took_s:
            return FIRST * least_s
        return max(least_s, MEDIANS * statistics.median(took_s)) if self._policy.independent else least_s

    def silent_s(self, now_s: float) -> float:
        """Return the time since any worker has made progress."""
        return now_s - self._advanced_s


class _Loop:
    """The watch of one piece of work from its begin to its end."""

    def __init__(self, job: StageJob, workers: Sequence[Any], results: Sequence[Any], report: Report, policy: Watch) -> None:
        self._job, self._workers, self._results, self._report, self._policy = job, workers, results, report, policy
        self._running, self._ended = list(results), list[Any]()
        self._polls = _Polls(job, workers, policy.answer_s)
        self._pace, self._hanging = Pace(len(workers), policy), list[int]()
        self._killed: set[int] = set()
        self._stop_by: float | None = None
        """Time by which the workers were last requested to stop."""

    def run(self) -> list[Any]:
        with Wait(self._job.gauge, self._policy.logged_after_s) as wait:  # some may still wait when the work is done
            while self._running:
                finished = self._poll(wait)
                self._note_failures(finished)
                self._end_hanging()
                self._report(self._polls.done)
                faults.at("poll", images=max(self._polls.done), path=" ".join(sys.argv[1:2]))
        return ray.get([result for result in self._results if result in self._ended])

    def _poll(self, wait: Wait) -> list[Any]:
        """Wait for results, ask all workers, and log those without capacity; return the results that came."""
        ray.wait(self._running, timeout=self._policy.poll_every_s)
        finished, self._running = ray.wait(self._running, num_returns=len(self._running), timeout=0)
        self._ended += finished
        self._forward_stop()  # before workers that hang are waited for
        self._polls.ask({number for number, result in enumerate(self._results) if result not in self._running})
        unplaced = self._without_capacity(wait)
        running = {n for n, result in enumerate(self._results) if result in self._running} - self._killed
        self._hanging = self._pace.note(self._polls.answers, running, unplaced, time.monotonic())
        return finished

    def _without_capacity(self, wait: Wait) -> list[int]:
        """Return and log the workers that no node holds yet. If only these are left of independent workers, the work is over."""
        unplaced = [n for n in self._polls.unplaced if self._results[n] in self._running and not self._policy.held]
        request = self._job.requests.get(actor_id(self._workers[unplaced[0]]), {}) if unplaced else {}
        alone = len(unplaced) == len(self._running)
        if alone and self._policy.independent and self._ended:
            unplaced = self._running = []  # the others have done all the work, or failed and hold what these wait for
        waits = alone or not self._policy.independent  # beside others that work they join when nodes do, which is no wait
        wait.log(self._job, len(unplaced) if waits else 0, request, alone=alone)
        return unplaced

    def _note_failures(self, finished: Sequence[Any]) -> None:
        """Log accidents of independent workers, and raise them when all workers have ended; raise all other failures at once."""
        failures = [failure for _, failure in self._failures(finished)]
        if not (self._policy.independent and self._running and all(map(may_pass, failures))):
            self._raise_failure()
        if failures:
            self._policy.on_lost()
        for failure in failures:
            others = f"the others ({len(self._running)}) continue, and another attempt makes what it had begun"
            self._job.say(f"{describe(failure)}; {others}")

    def _raise_failure(self) -> None:
        """Raise the failure of the results that have ended, if any; wait for its cause if it looks like a consequence."""
        failures, silent_s = self._failures(self._ended), self._pace.silent_s(time.monotonic())
        if not failures:
            return
        if all(blame(failure) in ("connection", "mistake") for _, failure in failures):
            placed = [result for n, result in enumerate(self._results) if n not in self._polls.unplaced]
            ended, _ = ray.wait(placed, num_returns=len(placed), timeout=self._policy.answer_s)
            failures = self._failures(ended)
        raise failure_to_raise(failures, max(self._polls.done), silent_s)

    def _failures(self, ended: Sequence[Any]) -> list[tuple[int, Exception]]:
        """Return (number of its worker, failure) of the results that ended in one."""
        numbered = [(number, result) for number, result in enumerate(self._results) if result in ended]
        return [(number, failure) for number, result in numbered if (failure := failure_of(result))]

    def _end_hanging(self) -> None:
        """Kill each independent worker that hangs: another attempt does what it had begun. Raise the hang of all other workers."""
        if self._hanging and not self._policy.independent:
            silent_s = self._pace.silent_s(time.monotonic())
            words, done = f"no step ended for {silent_s:.0f} s: hanging", self._polls.done
            self._log_stacks(range(len(self._workers)))
            behind = self._behind()
            if len(names := {nodes.name_of(_node(self._policy, self._workers, number)) for number in behind}) == 1:
                words = f"{words}; all others wait for the workers of node {names.pop()}"
                raise WorkerFailure(words, silent_s=silent_s, cause="device", worker=behind[0])
            raise Hang(words, max(done), silent_s)
        if self._hanging:
            self._log_stacks(self._hanging)
        for number in self._hanging:
            self._job.say(f"worker {number} made no progress for {self._pace.limit_s(number):.0f} s: hanging, it is killed")
            ray.kill(self._workers[number])
            self._killed.add(number)

    def _behind(self) -> list[int]:
        """Return the workers for which all others wait, if the policy blames their nodes."""
        if self._policy.held:
            living, unplaced = {node.id for node in nodes.living()}, self._polls.unplaced
            return unplaced if all(self._policy.held[number] in living for number in unplaced) else []  # else they wait for nodes
        done = self._polls.done
        return [number for number, each in enumerate(done) if each < max(done)] if self._policy.blame_behind else []

    def _log_stacks(self, ranks: Collection[int]) -> None:
        """Print the stacks of these workers."""
        calls = {rank: self._workers[rank].log_stacks.remote() for rank in ranks}
        answered, _ = ray.wait([*calls.values()], num_returns=len(calls), timeout=self._policy.answer_s)
        for rank, call in calls.items():
            answers = call in answered and not failure_of(call)
            stacks = ray.get(call) if answers else "no answer: the process is gone or does not run"
            print(f"stacks of worker {rank}:\n{stacks}", flush=True)

    def _forward_stop(self) -> None:
        """Request the workers to stop; again if a later reason leaves them less time."""
        left_s = self._job.grace_left_s() if self._job.stop_requested() else None
        early_s = self._policy.stop_early()
        known = [seconds for seconds in (left_s, early_s) if seconds is not None]
        if not known:
            return
        stop_by = time.monotonic() + min(known)
        if self._stop_by is None or stop_by < self._stop_by - self._policy.answer_s:
            self._stop_by = stop_by
            for worker in self._workers:
                worker.stop.remote(min(known))


class _Polls:
    """The workers' progress. Each has one call in flight, so that an answer that comes late loses no lines."""

    def __init__(self, job: StageJob, workers: Sequence[Any], answer_s: float) -> None:
        self.workers, self.done = workers, [0] * len(workers)
        self.unplaced: list[int] = list(range(len(workers)))
        """Workers that have no process yet: Ray has found no capacity for them."""
        self._job, self._answer_s = job, answer_s
        self._calls: dict[int, Any] = {}
        self._up: set[int] = set()
        """Workers that have answered once: the others are still being constructed, and are not waited for."""

    @property
    def answers(self) -> list[int | None]:
        """The progress of each worker; None before its first answer."""
        return [done if number in self._up else None for number, done in enumerate(self.done)]

    def ask(self, ended: set[int]) -> None:
        """Log the workers' new lines and note their progress; workers whose work has `ended` are asked to the last line."""
        self.unplaced = [n for n in self.unplaced if not has_process(self.workers[n])]
        self._take(ended)
        for number, worker in enumerate(self.workers):
            if number not in self._calls and number not in self.unplaced:
                self._calls[number] = worker.poll.remote()
        self._take(self._up | ended)

    def _take(self, awaited: set[int]) -> None:
        """Take the answers that have come; wait for those of the `awaited` workers for the time of an answer."""
        calls = [call for number, call in self._calls.items() if number in awaited]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=self._answer_s)
        if not self._calls:
            return  # `ray.wait` refuses an empty list
        answered, _ = ray.wait([*self._calls.values()], num_returns=len(self._calls), timeout=0)
        for number in [number for number, call in self._calls.items() if call in answered]:
            self._note(number, self._calls.pop(number))

    def _note(self, number: int, call: Any) -> None:
        if failure_of(call) is None:
            self._up.add(number)
            self.done[number], new = ray.get(call)
            for line in new:
                self._job.log.write(line)
