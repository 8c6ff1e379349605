"""What the stage programs share: the sweep's recipe, the wish to stop, workers on Ray and how they are watched.

Plain actors and a placement group rather than Ray Train: the driver tells its workers to stop (Ray does not), each attempt may have
another world size, and a killed worker is known in 60 ms and replaced in seconds where Ray Train's controller takes ten.
"""

import faulthandler
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import ray

from dis_scale import faults
from dis_scale.errors import DisScaleError, Preempted, StorageAway
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from pipelines import jobs
from pipelines.jobs import keeping_handlers

T = TypeVar("T")
PROGRESS, SAY = "@progress ", "@say "
"""Begin the lines of a job's log that the sweep shows: how far the stage is, as JSON (done, total, unit), and words for people."""
PROGRESS_EVERY_S = 2.0
LOOK_EVERY_S = 1.0
SETTLE_S = 10.0
"""How long the other workers have to end when one has failed."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 2.0, 60.0
"""Between two attempts of which the first brought nothing: doubled from one to the next."""
STACKS_S = 10.0
"""How long a worker that hangs has to show its stacks."""
BROKEN = re.compile(r"gloo|NCCL|Dist(Backend|Network|Store)Error|Socket Timeout|Connection (closed|reset)")
"""In the errors of a process group that lost a member."""
_told = (-1, -1, 0.0)
wish = threading.Event()
"""Set when somebody asked this job to stop."""


class Lost(DisScaleError):
    """An attempt ended by an accident, which another one may survive: a lost worker, a broken connection, a hang."""

    def __init__(self, words: str, done: int = 0, silent_s: float = 0.0) -> None:
        super().__init__(words)
        self.done, self.silent_s, self.at = done, silent_s, time.time()


Program = Callable[[Folder, Recipe, list[str]], None]
"""What a stage does, given the sweep's folder, its recipe and further arguments."""


def main(program: Program, url: str, *arguments: str) -> None:
    """Runs a stage's program on the sweep at `url`, patient with storage; errors become one line and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ray").setLevel(logging.ERROR)
    words = logging.StreamHandler(sys.stdout)
    words.setFormatter(logging.Formatter(f"{SAY}%(message)s"))
    logging.getLogger("dis_scale").addHandler(words)
    logging.getLogger("dis_scale").propagate = False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: wish.set())
    sweep = open_folder(url).patient
    try:
        program(sweep, load_recipe(sweep), list(arguments))
    except Exception as error:
        _end_with(cause_of(error), error)


def _end_with(cause: BaseException, error: BaseException) -> NoReturn:
    """Ends this job with the cause's line; with the whole traceback before it where the cause is not one of ours."""
    if isinstance(cause, DisScaleError):
        print(f"error: {cause}", flush=True)
        os._exit(cause.exit_code)
    traceback.print_exception(error, file=sys.stdout)
    print(f"error: {type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:300]}", flush=True)
    os._exit(1)


def cause_of(error: BaseException) -> BaseException:
    """What a worker raised, without the traceback and the addresses that Ray puts around it."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error


def load_recipe(sweep: Folder) -> Recipe:
    """The recipe as the sweep stored it."""
    return reading.parse(sweep.read(reading.FILE).decode(), f"{sweep}/{reading.FILE}")


def connect() -> None:
    """Joins the cluster that this job runs on."""
    with keeping_handlers():
        ray.init(log_to_driver=False, logging_level="ERROR")


class Worker:
    """An actor's common part: while its work runs in one thread, others tell it to stop and ask how far it is."""

    def __init__(self) -> None:
        self._wish, self._done = threading.Event(), 0
        self._said: list[str] = []

    def stop(self) -> None:
        self._wish.set()

    def look(self) -> tuple[int, list[str]]:
        """What is done, and the lines said since the last look."""
        said, self._said = self._said, []
        return self._done, said

    def stacks(self) -> str:
        """Where each thread of this worker stands."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()


def spawn(kind: type[Worker], options: dict[str, Any], *arguments: Any) -> Any:
    """A worker as a Ray actor; its work, `look` and `stop` run in threads of their own."""
    return ray.remote(max_concurrency=4)(kind).options(**options).remote(*arguments)


def resources(name: str, device: str, cpus: float) -> dict[str, Any]:
    """What one worker asks for: the stage's named resource where the nodes declare it, a GPU where it computes on one."""
    declared = ray.cluster_resources().get(name)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if device == "cuda" else 0}
    return options | ({"resources": {name: 1}} if declared else {})


def nodes_that_stay(by_node: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    """Of resources by node those of nodes that are not being drained: Ray goes on to count these, and places nothing there."""
    going = draining()
    return [resources for node, resources in by_node.items() if node not in going]


def draining() -> set[str]:
    """The nodes that will be taken away: by `ray drain-node`, KubeRay, an autoscaler or a spot notice, which end here alike."""
    return set(ray._private.state.state.get_draining_nodes())


def choose_device(recipe: Recipe) -> tuple[str, str]:
    """(device, reason) by the GPUs that the cluster has now."""
    return jobs.choose_device(recipe, int(ray.cluster_resources().get("GPU", 0)))


def progress(done: int, total: int, unit: str) -> None:
    """Tells the sweep how far the stage is, where that has changed and not too often: the log of a job of days stays small."""
    global _told
    now = time.monotonic()
    if (done, total) == _told[:2] or (done < total and now < _told[2] + PROGRESS_EVERY_S):
        return
    _told = (done, total, now)
    print(PROGRESS + json.dumps({"done": done, "total": total, "unit": unit}), flush=True)


def say(line: str) -> None:
    print(SAY + line, flush=True)


def watch(
    workers: Sequence[Any],
    results: Sequence[Any],
    report: Callable[[list[int]], None],
    hang_after_s: float = float("inf"),
    enough: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """Waits for all results, reporting each worker's progress; hands on the wish to stop, or that it is `enough`.

    Raises the first failure at once, `Lost` where another attempt may do better: as for a hang, when no worker has got on for
    `hang_after_s`, whose stacks are shown.
    """
    try:
        return _watch(workers, results, report, hang_after_s, enough)
    except Lost:
        for worker in workers:  # the next attempt needs their room, and a trace may keep their handles for long
            ray.kill(worker)
        raise


def _watch(
    workers: Sequence[Any],
    results: Sequence[Any],
    report: Callable[[list[int]], None],
    hang_after_s: float,
    enough: Callable[[], bool],
) -> list[Any]:
    waiting, told = list(results), False
    done, moved = 0, time.monotonic()
    while waiting:
        finished, waiting = ray.wait(waiting, timeout=LOOK_EVERY_S)
        looks = _progress_of(workers)
        if sum(looks) > done:
            done, moved = sum(looks), time.monotonic()
        silent_s = time.monotonic() - moved
        _raise_failure(finished, results, max(looks), silent_s)
        if silent_s > hang_after_s:
            _show_stacks(workers)
            raise Lost(f"no step ended for {silent_s:.0f} s: hanging", max(looks), silent_s)
        if not told and (wish.is_set() or enough()):
            told = True
            for worker in workers:
                worker.stop.remote()
        report(looks)
        faults.at("look", images=max(looks), path=" ".join(sys.argv[1:2]))
    return ray.get(list(results))


def _raise_failure(finished: Sequence[Any], results: Sequence[Any], done: int, silent_s: float) -> None:
    """Raises what failed; of several failures the lost worker, since its peers only report the broken connection."""
    if not any(map(_failure, finished)):
        return
    ended, _ = ray.wait(list(results), num_returns=len(results), timeout=SETTLE_S)
    failures = [failure for failure in map(_failure, ended) if failure]
    worst = next((f for f in failures if isinstance(f, ray.exceptions.RayActorError)), failures[0])
    raise Lost(_words(worst), done, silent_s) if _may_pass(worst) else worst


def _failure(result: Any) -> Exception | None:
    try:
        ray.get(result)
    except ray.exceptions.RayError as error:
        return error
    return None


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may do better: a lost worker or node, a connection that broke with one, storage that is away."""
    if isinstance(error, ray.exceptions.RayActorError):
        return True
    cause = getattr(error, "cause", None)
    return isinstance(cause, StorageAway) or (
        isinstance(cause, RuntimeError) and bool(BROKEN.search(f"{type(cause).__name__}: {cause}"))
    )


def _words(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        return f"a worker was lost ({' '.join(str(error).split())[:200]})"
    return " ".join(str(getattr(error, "cause", error)).split())[:300]


def _progress_of(workers: Sequence[Any]) -> list[int]:
    looks: list[tuple[int, list[str]]] = [
        found or (0, []) for found in _ask([worker.look.remote() for worker in workers])
    ]
    for line in [line for _, lines in looks for line in lines]:
        say(line)
    return [done for done, _ in looks]


def _ask(asked: Sequence[Any]) -> list[Any]:
    """What each worker answers within `STACKS_S`, None where it does not."""
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=STACKS_S)
    return [ray.get(a) if a in answered and not _failure(a) else None for a in asked]


def _show_stacks(workers: Sequence[Any]) -> None:
    """Prints each worker's stacks into the job's log."""
    for rank, stacks in enumerate(_ask([worker.stacks.remote() for worker in workers])):
        print(f"stacks of worker {rank}:\n{stacks or 'no answer: the process is gone or stands still'}", flush=True)


def with_restarts(recipe: Recipe, what: str, attempt: Callable[[Lost | None], T], kept: Callable[[], int]) -> T:
    """The attempt's result. One that is lost is followed by another, which is given the loss, as often as the recipe allows.

    Attempts that leave more behind than those before (`kept`) count as nothing: only those in a row that do not are counted,
    and wait for each other, longer each time.
    """
    lost: list[Lost] = []
    before = _kept_or(0, kept)
    while True:
        try:
            return attempt(lost[-1] if lost else None)
        except (Lost, StorageAway, ray.exceptions.RayError) as error:
            if isinstance(error, ray.exceptions.RayError) and not _may_pass(error):
                raise
            leave_if_asked()
            found = error if isinstance(error, Lost) else Lost(_words(error))
        now = _kept_or(before, kept)
        lost, before = ([found] if now > before else [*lost, found]), now
        if len(lost) > recipe.train.restarts:
            raise DisScaleError(_gave_up(what, lost)) from found
        wait_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (len(lost) - 2)) if len(lost) > 1 else 0.0
        left = recipe.train.restarts - len(lost)
        say(f"{what}: {found}; going on from what is stored in {wait_s:.0f} s, {left} more attempts without progress")
        pause(wait_s)
        leave_if_asked()


def _kept_or(before: int, kept: Callable[[], int]) -> int:
    """What is kept now; as before where storage does not say."""
    try:
        return kept()
    except DisScaleError:
        return before


def _gave_up(what: str, lost: Sequence[Lost]) -> str:
    places = {each.done for each in lost}
    if len(places) == 1 and len(lost) > 1 and (place := places.pop()):
        return (
            f"{what}: crashed {len(lost)} times at the same place, {place} done, which is no accident; see this job's log, "
            f"the last time: {lost[-1]}"
        )
    return f"{what}: {len(lost)} attempts in a row were lost without progress: {lost[-1]}"


def leave_if_asked() -> None:
    if wish.is_set():
        raise Preempted("stopped as asked; give the same command again to go on")


def pause(seconds: float) -> None:
    """Sleeps, but not through a wish to stop."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not wish.is_set():
        time.sleep(0.1)
