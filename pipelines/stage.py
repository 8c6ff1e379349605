"""What the stage programs share: the sweep's recipe, the wish to stop, workers on Ray and how they are watched.

Plain actors and a placement group rather than Ray Train: the driver tells its workers to stop (Ray does not), each attempt may have
another world size, and a killed worker is known in 60 ms and replaced in seconds where Ray Train's controller takes ten.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import ray

from dis_scale import recipe as recipes
from dis_scale.errors import DisScaleError, Preempted
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder, folder

T = TypeVar("T")
PROGRESS, SAY = "@progress ", "@say "
"""Begin the lines of a job's log that the sweep shows: how far the stage is, as JSON (done, total, unit), and words for people."""
PROGRESS_EVERY_S = 2.0
SETTLE_S = 10.0
"""How long the other workers have to end when one has failed."""
_told = (-1, -1, 0.0)
wish = threading.Event()
"""Set when somebody asked this job to stop."""


Program = Callable[[Folder, Recipe, list[str]], None]
"""What a stage does, given the sweep's folder, its recipe and further arguments."""


def main(program: Program, url: str, *arguments: str) -> None:
    """Runs a stage's program on the sweep at `url`; errors become one line and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ray").setLevel(logging.ERROR)
    words = logging.StreamHandler(sys.stdout)
    words.setFormatter(logging.Formatter(f"{SAY}%(message)s"))
    logging.getLogger("dis_scale").addHandler(words)
    logging.getLogger("dis_scale").propagate = False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: wish.set())
    sweep = folder(url)
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
    return recipes.parse(sweep.read(recipes.FILE).decode(), f"{sweep}/{recipes.FILE}")


def connect() -> None:
    """Joins the cluster that this job runs on."""
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


def spawn(kind: type[Worker], options: dict[str, Any], *arguments: Any) -> Any:
    """A worker as a Ray actor; its work, `look` and `stop` run in threads of their own."""
    return ray.remote(max_concurrency=4)(kind).options(**options).remote(*arguments)


def resources(name: str, device: str, cpus: float) -> dict[str, Any]:
    """What one worker asks for: the stage's named resource where the nodes declare it, a GPU where it computes on one."""
    declared = ray.cluster_resources().get(name)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if device == "cuda" else 0}
    return options | ({"resources": {name: 1}} if declared else {})


def choose_device(recipe: Recipe) -> tuple[str, str]:
    """(device, reason) by the GPUs that the cluster has now."""
    return recipes.choose_device(recipe, int(ray.cluster_resources().get("GPU", 0)))


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
    workers: Sequence[Any], results: Sequence[Any], report: Callable[[list[int]], None], every_s: float = 1.0
) -> list[Any]:
    """Waits for all results, reporting each worker's progress; hands the wish to stop on. Raises the first failure at once."""
    waiting, told = list(results), False
    while waiting:
        finished, waiting = ray.wait(waiting, timeout=every_s)
        _raise_failure(finished, results)
        if wish.is_set() and not told:
            told = True
            for worker in workers:
                worker.stop.remote()
        report(_progress_of(workers))
    return ray.get(list(results))


def _raise_failure(finished: Sequence[Any], results: Sequence[Any]) -> None:
    """Raises what failed; of several failures the lost worker, since its peers only report the broken connection."""
    if not any(map(_failure, finished)):
        return
    ended, _ = ray.wait(list(results), num_returns=len(results), timeout=SETTLE_S)
    failures = [failure for failure in map(_failure, ended) if failure]
    raise next((f for f in failures if isinstance(f, ray.exceptions.RayActorError)), failures[0])


def _failure(result: Any) -> Exception | None:
    try:
        ray.get(result)
    except ray.exceptions.RayError as error:
        return error
    return None


def _progress_of(workers: Sequence[Any]) -> list[int]:
    asked = [worker.look.remote() for worker in workers]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=10)
    looks = [ray.get(a) if a in answered else (0, []) for a in asked]
    for line in [line for _, lines in looks for line in lines]:
        say(line)
    return [done for done, _ in looks]


def with_restarts(recipe: Recipe, what: str, attempt: Callable[[], T]) -> T:
    """The attempt's result; a lost worker costs an attempt, of which the recipe allows some."""
    for left in range(recipe.train.restarts, -1, -1):
        try:
            return attempt()
        except ray.exceptions.RayActorError as error:
            leave_if_asked()
            lost = " ".join(str(error).split())[:200]
            if not left:
                raise DisScaleError(f"{what}: workers were lost {recipe.train.restarts + 1} times: {lost}") from error
            say(f"{what}: a worker was lost ({lost}); going on from what is stored, {left} attempts left")
    raise AssertionError("unreachable")


def leave_if_asked() -> None:
    if wish.is_set():
        raise Preempted("stopped as asked; give the same command again to go on")


def pause(seconds: float) -> None:
    """Sleeps, but not through a wish to stop."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not wish.is_set():
        time.sleep(0.1)
