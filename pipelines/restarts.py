"""Restarts of failed attempts: how many, how long apart, and the message after the last."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import ray

from dis_scale.process import counts
from dis_scale.process.errors import DisScaleError, StorageAway
from pipelines.failures import StorageFailure, WorkerFailure, blame, describe, may_pass
from pipelines.stage import StageJob

T = TypeVar("T")
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 2.0, 60.0
"""Wait before the second consecutive attempt without progress; it doubles from one to the next."""


def with_restarts(
    job: StageJob, name: str, attempt: Callable[[WorkerFailure | None], T], stored: Callable[[], int]
) -> T:
    """Return the attempt's result. After a failure run it again with that failure, as often as the recipe allows.

    Only consecutive attempts without progress (`stored` has not grown) count towards the limit. The wait between them doubles.
    DisScaleError after the last; StorageAway if storage was away in it.
    """
    failures: list[WorkerFailure] = []
    before = _stored_or(0, stored)
    while True:
        try:
            return attempt(failures[-1] if failures else None)
        except (WorkerFailure, StorageAway, ray.exceptions.RayError) as error:
            if isinstance(error, ray.exceptions.RayError) and not may_pass(error):
                raise
            job.raise_if_stopped()
            failure = error if isinstance(error, WorkerFailure) else _failure(error)
        now = _stored_or(before, stored)
        failures, before = ([failure] if now > before else [*failures, failure]), now
        if len(failures) > job.recipe.train.restarts:
            kind = StorageAway if isinstance(failure, StorageFailure) else DisScaleError
            raise kind(_last_words(name, failures)) from failure
        wait_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (len(failures) - 2)) if len(failures) > 1 else 0.0
        left = job.recipe.train.restarts - len(failures)
        counts.add(counts.RESTARTS)
        job.emit("restart", job=name, done=failure.done, left=left)
        job.say(
            f"{name}: {failure}; restart from the stored state in {wait_s:.0f} s, {left} more attempts without progress",
            level="warning",
        )
        job.pause(wait_s)
        job.raise_if_stopped()


def _failure(error: Exception) -> WorkerFailure:
    away = isinstance(error, StorageAway) or blame(error) == "storage"
    return (StorageFailure if away else WorkerFailure)(describe(error))


def _stored_or(before: int, stored: Callable[[], int]) -> int:
    """Return the number that is stored now, or `before` if storage does not answer."""
    try:
        return stored()
    except DisScaleError:
        return before


def _last_words(name: str, failures: Sequence[WorkerFailure]) -> str:
    points = {failure.done for failure in failures}
    if len(points) == 1 and len(failures) > 1 and (point := points.pop()):
        return (
            f"{name}: crashed {len(failures)} times in a row with {point} done: this looks deterministic; see this job's log, "
            f"last failure: {failures[-1]}"
        )
    return f"{name}: {len(failures)} attempts in a row failed without progress: {failures[-1]}"
