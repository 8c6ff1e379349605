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
from typing import Any

import ray

from dis_scale import recipe as recipes
from dis_scale.errors import DisScaleError, Preempted
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder, folder

PROGRESS = "@progress "
"""Begins a line of a job's log that says how far the stage is, as JSON: done, total, unit."""
wish = threading.Event()
"""Set when somebody asked this job to stop."""


def main(program: Callable[[Folder, Recipe, list[str]], None]) -> None:
    """Runs a stage's program with (sweep, recipe, further arguments); errors become one line and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ray").setLevel(logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: wish.set())
    sweep, arguments = folder(sys.argv[1]), sys.argv[2:]
    try:
        program(sweep, load_recipe(sweep), arguments)
    except DisScaleError as error:
        print(f"error: {error}", flush=True)
        os._exit(error.exit_code)
    except ray.exceptions.RayTaskError as error:
        cause = error.as_instanceof_cause()
        ours = isinstance(cause, DisScaleError)
        if not ours:
            print(error, flush=True)
        print(f"error: {str(error.cause) if ours else str(cause).strip().splitlines()[-1]}", flush=True)
        os._exit(1)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        os._exit(1)


def load_recipe(sweep: Folder) -> Recipe:
    """The recipe as the sweep stored it."""
    return recipes.parse(sweep.read("recipe.yaml").decode(), f"{sweep}/recipe.yaml")


def connect() -> None:
    """Joins the cluster that this job runs on."""
    ray.init(log_to_driver=True, logging_level="ERROR")


class Worker:
    """An actor's common part: its progress can be asked and its wish to stop be set while its work runs in another thread."""

    def __init__(self) -> None:
        self._wish, self._done = threading.Event(), 0

    def stop(self) -> None:
        self._wish.set()

    def done(self) -> int:
        return self._done

    def ready(self) -> bool:
        return True


def resources(name: str, device: str, cpus: float) -> dict[str, Any]:
    """What one worker asks for: the stage's named resource where the nodes declare it, a GPU where it computes on one."""
    declared = ray.cluster_resources().get(name)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if device == "cuda" else 0}
    return options | ({"resources": {name: 1}} if declared else {})


def choose_device(recipe: Recipe) -> tuple[str, str]:
    """(device, reason): `auto` takes GPUs where the cluster has enough of them for one worker each."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if recipe.device != "auto":
        return recipe.device, "the recipe names it"
    if gpus >= recipe.train.workers:
        return "cuda", f"auto: the cluster has {gpus} GPUs"
    return "cpu", f"auto: the cluster has {gpus} GPUs, training asks for {recipe.train.workers}"


def progress(done: int, total: int, unit: str) -> None:
    print(PROGRESS + json.dumps({"done": done, "total": total, "unit": unit}), flush=True)


def watch(
    workers: Sequence[Any], results: Sequence[Any], report: Callable[[list[int]], None], every_s: float = 1.0
) -> list[Any]:
    """Waits for all results, reporting each worker's progress; hands the wish to stop on. Raises the first failure at once."""
    waiting, told = list(results), False
    while waiting:
        finished, waiting = ray.wait(waiting, timeout=every_s)
        ray.get(finished)
        if wish.is_set() and not told:
            told = True
            for worker in workers:
                worker.stop.remote()
        report(_progress_of(workers))
    return ray.get(list(results))


def _progress_of(workers: Sequence[Any]) -> list[int]:
    asked = [worker.done.remote() for worker in workers]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=1)
    return [ray.get(a) if a in answered else 0 for a in asked]


def leave_if_asked() -> None:
    if wish.is_set():
        raise Preempted("stopped as asked; give the same command again to go on")


def pause(seconds: float) -> None:
    """Sleeps, but not through a wish to stop."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not wish.is_set():
        time.sleep(0.1)
