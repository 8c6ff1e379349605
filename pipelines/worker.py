"""Workers on Ray: the base class of all actors, the resources that they ask for, and how the driver watches them.

Plain actors and a placement group rather than Ray Train: the driver forwards stop requests to its workers (Ray does not), each
attempt may have another world size, and a killed worker is noticed within 60 ms and replaced in seconds, where Ray Train's
controller takes ten.
"""

import faulthandler
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from dis_scale import faults
from dis_scale.errors import DisScaleError, Preempted, StorageAway
from dis_scale.recipe import Recipe
from pipelines import lines, stage

POLL_EVERY_S = 1.0
SETTLE_S = 10.0
"""Time for the other workers to end after one has failed."""
STACKS_S = 10.0
"""Time for a hanging worker to answer with its stacks."""
BROKEN = re.compile(r"gloo|NCCL|Dist(Backend|Network|Store)Error|Socket Timeout|Connection (closed|reset)")
"""Parts of the errors of a process group that lost a member."""


class WorkerFailure(DisScaleError):
    """An attempt ended by an accident that a new attempt may survive: a lost worker, a broken connection, a hang."""

    def __init__(self, words: str, done: int = 0, silent_s: float = 0.0) -> None:
        super().__init__(words)
        self.done, self.silent_s, self.at = done, silent_s, time.time()


class Worker:
    """Base class of all actors: work runs in one thread; `stop`, `poll` and `stacks` are served by others."""

    def __init__(self) -> None:
        self._stop, self._done = threading.Event(), 0
        self._lines: list[str] = []

    # Called by the driver.

    def stop(self) -> None:
        self._stop.set()

    def poll(self) -> tuple[int, list[str]]:
        """Return the progress, and the lines logged since the last poll."""
        new, self._lines = self._lines, []
        return self._done, new

    def stacks(self) -> str:
        """Return the stack of each thread."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()

    # Called by the work.

    def report(self, done: int) -> None:
        """Set the progress."""
        self._done = done

    def log(self, text: str) -> None:
        """Show a message in the sweep."""
        self._lines.append(lines.message(text))

    def emit(self, name: str, **facts: Any) -> None:
        """Log an event."""
        self._lines.append(lines.event(name, **facts))

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def raise_if_stopped(self, left: str) -> None:
        """Raise Preempted if a stop was requested; `left` says what a rerun repeats."""
        if self.stop_requested():
            raise Preempted(f"stopped as requested; {left}")


def spawn(kind: type[Worker], options: dict[str, Any], *arguments: Any) -> Any:
    """Return a worker as a Ray actor; its work, `poll` and `stop` run in threads of their own."""
    return ray.remote(max_concurrency=4)(kind).options(**options).remote(*arguments)


def resources(name: str, device: str, cpus: float) -> dict[str, Any]:
    """Return one worker's request: the stage's named resource if the nodes declare it, a GPU if it computes on one."""
    declared = ray.cluster_resources().get(name)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if device == "cuda" else 0}
    return options | ({"resources": {name: 1}} if declared else {})


def device_of(recipe: Recipe, gpus: int) -> tuple[str, str]:
    """Return (device, reason) on a cluster of `gpus` GPUs: `auto` uses them if the smallest world size gets one a worker."""
    workers = recipe.train.world_sizes[-1]
    if recipe.device != "auto":
        return recipe.device, "the recipe names it"
    reason = f"auto: {gpus} GPUs for {workers} workers"
    return ("cuda" if gpus >= workers else "cpu"), reason


def choose_device(recipe: Recipe) -> tuple[str, str]:
    """Return (device, reason) by the GPUs that the cluster has now."""
    return device_of(recipe, int(ray.cluster_resources().get("GPU", 0)))


def watch(
    workers: Sequence[Any],
    results: Sequence[Any],
    report: Callable[[list[int]], None],
    hang_after_s: float = float("inf"),
    stop_early: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """Wait for all results; pass each worker's progress to `report`; forward a stop request, or one of `stop_early`.

    Raises the first failure at once: WorkerFailure if a new attempt may do better. A hang is one, too: no worker has made progress
    for `hang_after_s`; their stacks are logged.
    """
    try:
        return _watch(workers, results, report, hang_after_s, stop_early)
    except (WorkerFailure, StorageAway):
        # Free the workers' resources for the next attempt now: the exception's traceback would keep the handles alive.
        for worker in workers:
            ray.kill(worker)
        raise


def _watch(
    workers: Sequence[Any],
    results: Sequence[Any],
    report: Callable[[list[int]], None],
    hang_after_s: float,
    stop_early: Callable[[], bool],
) -> list[Any]:
    waiting, stopping = list(results), False
    done, progress_s = 0, time.monotonic()
    while waiting:
        finished, waiting = ray.wait(waiting, timeout=POLL_EVERY_S)
        polls = _poll(workers)
        if sum(polls) > done:
            done, progress_s = sum(polls), time.monotonic()
        silent_s = time.monotonic() - progress_s
        _raise_failure(finished, results, max(polls), silent_s)
        if silent_s > hang_after_s:
            _log_stacks(workers)
            raise WorkerFailure(f"no step ended for {silent_s:.0f} s: hanging", max(polls), silent_s)
        if not stopping and (stage.stop_requested() or stop_early()):
            stopping = True
            for worker in workers:
                worker.stop.remote()
        report(polls)
        faults.at("poll", images=max(polls), path=" ".join(sys.argv[1:2]))
    return ray.get(list(results))


def _raise_failure(finished: Sequence[Any], results: Sequence[Any], done: int, silent_s: float) -> None:
    """Raise the failure, if any; of several the lost worker's, since its peers only report the broken connection."""
    if not any(map(_failure, finished)):
        return
    ended, _ = ray.wait(list(results), num_returns=len(results), timeout=SETTLE_S)
    failures = [failure for failure in map(_failure, ended) if failure]
    worst = next((f for f in failures if isinstance(f, ray.exceptions.RayActorError)), failures[0])
    raise WorkerFailure(describe(worst), done, silent_s) if may_pass(worst) else worst


def _failure(result: Any) -> Exception | None:
    try:
        ray.get(result)
    except ray.exceptions.RayError as error:
        return error
    return None


def may_pass(error: Exception) -> bool:
    """Whether a new attempt may do better: after a lost worker or node, a broken connection, storage that is away."""
    if isinstance(error, ray.exceptions.RayActorError):
        return True
    cause = getattr(error, "cause", None)
    return isinstance(cause, StorageAway) or (
        isinstance(cause, RuntimeError) and bool(BROKEN.search(f"{type(cause).__name__}: {cause}"))
    )


def describe(error: Exception) -> str:
    """Return an error of Ray in one line."""
    if isinstance(error, ray.exceptions.RayActorError):
        return f"a worker was lost ({' '.join(str(error).split())[:200]})"
    return " ".join(str(getattr(error, "cause", error)).split())[:300]


def _poll(workers: Sequence[Any]) -> list[int]:
    """Print the workers' new lines; return the progress of each."""
    polls: list[tuple[int, list[str]]] = [
        poll or (0, []) for poll in _ask([worker.poll.remote() for worker in workers])
    ]
    for line in [line for _, new in polls for line in new]:
        lines.write(line)
    return [done for done, _ in polls]


def _ask(calls: Sequence[Any]) -> list[Any]:
    """Each worker's answer within `STACKS_S`, None if it does not answer."""
    answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=STACKS_S)
    return [ray.get(call) if call in answered and not _failure(call) else None for call in calls]


def _log_stacks(workers: Sequence[Any]) -> None:
    for rank, stacks in enumerate(_ask([worker.stacks.remote() for worker in workers])):
        print(f"stacks of worker {rank}:\n{stacks or 'no answer: the process is gone or does not run'}", flush=True)
