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
from typing import Any, Literal, get_args

import ray
from ray._private import state as ray_state

from dis_scale.process import faults
from dis_scale.process.errors import BrokenDevice, DisScaleError, OutOfMemory, Preempted, StorageAway
from dis_scale.storage.folder import Folder
from dis_scale.tracking.attempt_logs import LogName
from pipelines import lines, logs, metrics, stage
from pipelines.waiting import Wait

POLL_EVERY_S = 1.0
SETTLE_S = 10.0
"""Time for the others to end after an error that another worker's failure may have caused."""
STACKS_S = 10.0
"""Time for a hanging worker to answer with its stacks."""
MEMORY = re.compile(r"OutOfMemoryError|(CUDA error|Triton Error \[CUDA\]): out of memory|_STATUS_ALLOC_FAILED")
"""Parts of the errors of a GPU whose memory is too small."""
DEVICE = re.compile(
    r"AcceleratorError|CUDA (unknown )?error|Triton Error \[CUDA\]|CUDA driver initialization failed|No CUDA GPUs are available|"
    r"cuDNN error|(CUBLAS|CUDNN|CUSOLVER|CUFFT)_(STATUS_|[A-Z_]*FAILED)"
)
"""Parts of the errors of a GPU that fails: memory with uncorrectable errors, a failed launch, a device that is busy or gone."""
REJECTED = re.compile(
    r"(CUDA error|Triton Error \[CUDA\]): (device-side assert triggered|invalid |no kernel image|device kernel image is invalid)|"
    r"_STATUS_INVALID_VALUE"
)
"""Parts of the errors of a GPU that refuses what a program asks: every device would."""
CONNECTION = re.compile(
    r"gloo|NCCL|Dist(Backend|Network|Store)Error|Socket Timeout|socket has timed out|Connection (closed|reset)"
)
"""Parts of the errors of a process group that lost a member."""
AMBIGUOUS = re.compile(r"illegal memory access|misaligned address|illegal instruction")
"""Parts of the errors of a program or of a device: worth another attempt, but no reason to exclude a node."""
Cause = Literal["device", "lost", "storage", "memory", "mistake", "connection"]
CAUSES = get_args(Cause)
"""In the order of blame: of several failures the first is reported, since broken connections follow from all others."""
LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""Errors of a worker whose process is gone; the second: Ray killed it because its node ran low on memory."""
_requests: dict[str, dict[str, float]] = {}
"""The resources that each worker of this driver asked for, by its actor's id."""
ACCIDENTS = {"device", "lost", "storage", "connection"}
"""Causes after which a new attempt may succeed."""


class WorkerFailure(DisScaleError):
    """An attempt ended by an accident that a new attempt may survive: a lost worker, a broken connection, a hang."""

    def __init__(self, words: str, done: int = 0, silent_s: float = 0.0) -> None:
        super().__init__(words)
        self.done, self.silent_s, self.at = done, silent_s, time.time()


class StorageFailure(WorkerFailure):
    """An attempt ended because storage was away."""


class DeviceFailure(WorkerFailure):
    """An attempt ended by a failed device; `worker` is the number of its worker."""

    def __init__(self, words: str, worker: int, done: int = 0, silent_s: float = 0.0) -> None:
        super().__init__(words, done, silent_s)
        self.worker = worker


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

    def observe(self, folder: Folder, name: LogName) -> None:
        """Keep this process's log in storage, and export its metrics, from now on."""
        logs.keep(folder, name)
        metrics.start()

    def write_log(self) -> None:
        """Write what the log in storage does not have yet."""
        logs.write()

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
    worker = ray.remote(max_concurrency=4)(kind).options(**options).remote(*arguments)
    _requests[worker._actor_id.hex()] = amounts(options)
    return worker


def amounts(request: dict[str, Any]) -> dict[str, float]:
    """Return the resources of a worker's request by name; none of amount 0."""
    every = {"CPU": request.get("num_cpus", 0), "GPU": request.get("num_gpus", 0), **request.get("resources", {})}
    return {name: amount for name, amount in every.items() if amount}


def resources(name: str, device: str, cpus: float) -> dict[str, Any]:
    """Return one worker's request: a GPU if it computes on one, and the stage's named resource if a node for it declares that."""
    gpus = 1 if device == "cuda" else 0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus]
    declared = any(name in node for node in nodes)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    return options | ({"resources": {name: 1}} if declared else {})


def watch(
    workers: Sequence[Any],
    results: Sequence[Any],
    report: Callable[[list[int]], None],
    hang_after_s: float = float("inf"),
    stop_early: Callable[[], bool] = lambda: False,
    independent: bool = False,
    last: float = float("inf"),
    lost: Callable[[], object] = lambda: None,
    keep_logs: bool = True,
) -> list[Any]:
    """Wait for all results; pass each worker's progress to `report`; forward a stop request, or one of `stop_early`.

    Raises the first failure at once: WorkerFailure if a new attempt may do better. A hang is one, too: no worker has made progress
    for `hang_after_s`, and not all have made the progress `last`; their stacks are logged. The accident of one of several
    `independent` workers is raised when the others have ended, whom it does not disturb; `lost` is called at once. When one of
    them has done its work, those without capacity are not waited for: their results are left out. Each worker's log is kept under
    its number from now on, unless `keep_logs` is false: for a call before the order of the workers is final.
    """
    if keep_logs:
        logs.keep_workers(workers)
    try:
        with Wait() as capacity:  # some may still wait when the work is done
            return _watch(workers, results, report, hang_after_s, stop_early, independent, last, lost, capacity)
    except (WorkerFailure, OutOfMemory, StorageAway, ray.exceptions.RayError) as error:
        logs.collect(workers)
        if not isinstance(error, WorkerFailure | StorageAway):
            raise
        # Free the workers' resources for the next attempt now: the exception's traceback would keep the handles alive.
        if not independent or isinstance(error, StorageAway):
            for worker in workers:
                ray.kill(worker)
        raise


def _watch(
    workers: Sequence[Any],
    results: Sequence[Any],
    report: Callable[[list[int]], None],
    hang_after_s: float,
    stop_early: Callable[[], bool],
    independent: bool,
    last: float,
    lost: Callable[[], object],
    capacity: Wait,
) -> list[Any]:
    waiting, stopping, ended = list(results), False, list[Any]()
    asked, done, progress_s = _Polls(workers), 0, time.monotonic()
    while waiting:
        finished, waiting = ray.wait(waiting, timeout=POLL_EVERY_S)
        asked.ask({number for number, result in enumerate(results) if result not in waiting})
        polls, unplaced = asked.done, [n for n in asked.unplaced if results[n] in waiting]
        capacity.log(len(unplaced), _requests.get(workers[unplaced[0]]._actor_id.hex(), {}) if unplaced else {})
        if sum(polls) > done:
            done, progress_s = sum(polls), time.monotonic()
        silent_s = time.monotonic() - progress_s
        ended += finished
        if independent and len(waiting) == len(unplaced) and any(failure_of(result) is None for result in ended):
            waiting = []
        failures = [failure for _, failure in _failures(finished, results)]
        if not (independent and waiting and all(map(may_pass, failures))):
            _raise_failure(ended, results, max(polls), silent_s)
        if failures:
            lost()
        for failure in failures:
            lines.say(
                f"{describe(failure)}; {len(waiting)} others continue, and another attempt makes what it had begun"
            )
        if silent_s > hang_after_s and min(polls) < last:
            _log_stacks(workers)
            raise WorkerFailure(f"no step ended for {silent_s:.0f} s: hanging", max(polls), silent_s)
        if not stopping and (stage.stop_requested() or stop_early()):
            stopping = True
            for worker in workers:
                worker.stop.remote()
        report(polls)
        faults.at("poll", images=max(polls), path=" ".join(sys.argv[1:2]))
    return ray.get([result for result in results if result in ended])


def _raise_failure(finished: Sequence[Any], results: Sequence[Any], done: int, silent_s: float) -> None:
    """Raise the failure, if any; of several the one to blame, since its peers only report the broken connection."""
    failures = _failures(finished, results)
    if not failures:
        return
    if all(blame(failure) in ("connection", "mistake") for _, failure in failures):
        ended, _ = ray.wait(list(results), num_returns=len(results), timeout=SETTLE_S)
        failures = _failures(ended, results)
    worker, worst = min(failures, key=lambda each: CAUSES.index(blame(each[1])))
    match blame(worst):
        case "device":
            raise DeviceFailure(describe(worst), worker, done, silent_s)
        case "memory":
            raise OutOfMemory(describe(worst))
        case "storage":
            raise StorageFailure(describe(worst), done, silent_s)
        case "mistake":
            raise worst
    raise WorkerFailure(describe(worst), done, silent_s)


def _failures(ended: Sequence[Any], results: Sequence[Any]) -> list[tuple[int, Exception]]:
    """Return (number of its worker, failure) of the results that ended in one."""
    return [(n, failure) for n, result in enumerate(results) if result in ended and (failure := failure_of(result))]


def failure_of(result: Any) -> Exception | None:
    try:
        ray.get(result)
    except ray.exceptions.RayError as error:
        return error
    return None


def may_pass(error: Exception) -> bool:
    """Whether a new attempt may do better: after a lost worker, a failed device, a broken connection, storage that is away."""
    return blame(error) in ACCIDENTS


def blame(error: Exception) -> Cause:
    """Return the cause of an error of Ray; an error that is none of an accident's is a mistake."""
    if isinstance(error, LOST):
        return "lost"
    cause = getattr(error, "cause", None)
    if isinstance(cause, StorageAway):
        return "storage"
    if isinstance(cause, BrokenDevice):
        return "device"
    if not isinstance(cause, RuntimeError):
        return "mistake"
    text = f"{type(cause).__name__}: {cause}"
    if MEMORY.search(text):
        return "memory"
    if REJECTED.search(text):
        return "mistake"
    if AMBIGUOUS.search(text):
        return "lost"
    if DEVICE.search(text):
        return "device"
    return "connection" if CONNECTION.search(text) else "mistake"


def describe(error: Exception) -> str:
    """Return an error of Ray in one line."""
    if isinstance(error, LOST):
        return f"a worker was lost ({' '.join(str(error).split())[:200]})"
    return " ".join(str(getattr(error, "cause", error)).split())[:300]


class _Polls:
    """The workers' progress. Each has one call in flight, so that an answer that comes late loses no lines."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers, self.done = workers, [0] * len(workers)
        self.unplaced: list[int] = list(range(len(workers)))
        self._calls: dict[int, Any] = {}
        self._up: set[int] = set()
        """Workers that have answered once: the others are still being constructed, and are not waited for."""

    def ask(self, ended: set[int]) -> None:
        """Print the workers' new lines and note their progress; those whose work has `ended` are asked to the last line."""
        unplaced = _unplaced([self.workers[n] for n in self.unplaced])
        self.unplaced = [n for n in self.unplaced if self.workers[n] in unplaced]
        self._take(self._up | ended)
        for number, worker in enumerate(self.workers):
            if number not in self._calls and number not in self.unplaced:
                self._calls[number] = worker.poll.remote()
        self._take(self._up | ended)

    def _take(self, awaited: set[int]) -> None:
        """Take the answers, those of the `awaited` within `STACKS_S`."""
        calls = [call for number, call in self._calls.items() if number in awaited]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STACKS_S)
        answered, _ = (
            ray.wait([*self._calls.values()], num_returns=len(self._calls), timeout=0) if self._calls else ([], [])
        )
        for number, call in list(self._calls.items()):
            if call in answered:
                del self._calls[number]
                if failure_of(call) is None:
                    self._up.add(number)
                    self.done[number], new = ray.get(call)
                    for line in new:
                        lines.write(line)


def _unplaced(workers: Sequence[Any]) -> list[Any]:
    """Return the workers that have no process yet: Ray has found no capacity for them."""
    return [worker for worker in workers if ray_state.actors(worker._actor_id.hex())["Pid"] == 0]


def _ask(calls: Sequence[Any]) -> list[Any]:
    """Each worker's answer within `STACKS_S`, None if it does not answer."""
    answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=STACKS_S)
    return [ray.get(call) if call in answered and not failure_of(call) else None for call in calls]


def _log_stacks(workers: Sequence[Any]) -> None:
    for rank, stacks in enumerate(_ask([worker.stacks.remote() for worker in workers])):
        print(f"stacks of worker {rank}:\n{stacks or 'no answer: the process is gone or does not run'}", flush=True)
