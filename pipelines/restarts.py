"""Restarts of failed attempts: how many, how long apart, and the message after the last."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TypeVar

import ray

from dis_scale.process import counts
from dis_scale.process.errors import DisScaleError, StorageAway
from pipelines.failures import WorkerFailure, blame, describe, may_pass
from pipelines.stage import STORAGE_AWAY_S, StageJob

T = TypeVar("T")
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 2.0, 60.0
"""Wait before the second consecutive attempt without progress; it doubles from one to the next."""
LONGEST_FOR_DEVICE_S = 1800.0
"""The longest after a failed device: a node that is excluded is used while there is no other, and its repair may take a week-end,
which 100 attempts outlast."""
WORKED_S = 3600.0
"""Time of an attempt after which storage was there in it: one that is away ends an attempt within minutes."""
REPLACED_S = 3600.0
"""Time for which failures of an excluded node do not count while another is gone: a new one starts later than attempts fail."""
NEAR_STEPS = 2
"""Most steps between crashes at the same place: progress is asked for each second, and a process that dies tells no more."""
SAME, ALWAYS = 5, 10
"""Crashes in a row with as much done and of one cause after which a job ends: on at least two sets of nodes, or on any.

Before an attempt's first step much fails that passes, such as connections: there twice and three times `ALWAYS`.
"""


def with_restarts(job: StageJob, name: str, attempt: Callable[[WorkerFailure | None], T], stored: Callable[[], int]) -> T:
    """Return the attempt's result. After a failure run it again with that failure, as often as the recipe allows.

    Only consecutive attempts without progress (`stored` has not grown) count towards the limit; of an hour neither those that ended
    because storage was away, nor those of a device on an excluded node that is used in place of one that is gone. The wait between
    them doubles. DisScaleError after the last, or when the crash is deterministic; StorageAway when storage has been away for too
    long.
    """
    failures, seen = list[WorkerFailure](), frozenset[str]()
    before, away_since_s, reused_since_s, in_a_row = _stored_or(0, stored), float("inf"), float("inf"), 0
    near = NEAR_STEPS * job.recipe.train.batch_images
    while True:
        began_s, job.placed = job.now_s(), frozenset()
        try:
            return attempt(failures[-1] if failures else None)
        except (WorkerFailure, StorageAway, ray.exceptions.RayError) as error:
            if isinstance(error, ray.exceptions.RayError) and not may_pass(error):
                raise
            job.raise_if_stopped()
            failure = error if isinstance(error, WorkerFailure) else WorkerFailure(describe(error), cause=blame(error))
        failure.nodes, seen = job.placed, seen | job.placed
        so_far = [*failures, failure]  # also of earlier ones: Ray calls a silent node dead after 30 s
        gone = job.gone_of(frozenset().union(*(each.nodes for each in so_far)))
        for each in so_far:
            each.node_gone = each.node_gone or not gone.isdisjoint(each.nodes)
        now = _stored_or(before, stored)
        failures, in_a_row = (failures, in_a_row + 1) if now == before else ([], 1)
        if now != before or job.now_s() - began_s > WORKED_S:
            away_since_s = reused_since_s = float("inf")  # it was there meanwhile: this is another outage
        before = now
        reused = failure.cause == "device" and job.reuses_excluded and len(seen) > 1
        reused_since_s = min(reused_since_s, job.now_s()) if reused else float("inf")
        awaits_node = reused and job.now_s() - reused_since_s < REPLACED_S
        if failure.cause == "storage":
            away_since_s = min(away_since_s, job.now_s())
            if job.now_s() - away_since_s > STORAGE_AWAY_S:
                raise StorageAway(f"{name}: storage has been away for {STORAGE_AWAY_S / 60:.0f} minutes: {failure}") from failure
        elif awaits_node:
            away_since_s = float("inf")
        else:
            failures, away_since_s = [*failures, failure], float("inf")
            if len(failures) > job.recipe.train.restarts or _deterministic(failures, near):
                raise DisScaleError(_last_words(name, failures, near)) from failure
        longest_s = LONGEST_FOR_DEVICE_S if failure.cause == "device" and not awaits_node else LONGEST_BACKOFF_S
        wait_s = min(longest_s, FIRST_BACKOFF_S * 2.0 ** min(in_a_row - 2, 10)) if in_a_row > 1 else 0.0
        left = job.recipe.train.restarts - len(failures)
        counts.add(counts.RESTARTS)
        job.emit("restart", job=name, done=failure.done, left=left)
        job.say(
            f"{name}: {failure}; restart from the stored state in {wait_s:.0f} s, {left} more attempts without progress",
            level="warning",
        )
        job.pause(wait_s)
        job.raise_if_stopped()


def _stored_or(before: int, stored: Callable[[], int]) -> int:
    """Return the number that is stored now, or `before` if storage does not answer."""
    try:
        return stored()
    except DisScaleError:
        return before


def _deterministic(failures: Sequence[WorkerFailure], near: int) -> bool:
    """Whether the last attempts crashed at the same place, `near` images apart at most, by the same cause, wherever they ran.

    Devices that failed do not, as long as one node may have been in all of these attempts. Losses of nodes are left out: in a
    storm of preemptions many attempts in a row end before a step.
    """
    crashes = _crashes(failures)
    if not crashes:
        return False
    last = crashes[-1]

    def same(each: WorkerFailure) -> bool:
        # A process that dies breaks others' connections: which of both is seen first is chance.
        broken = each.cause == last.cause or {each.cause, last.cause} == {"lost", "connection"}
        return broken and bool(each.done) == bool(last.done) and abs(each.done - last.done) <= near

    alike = list(takewhile(same, reversed(crashes)))
    sets = [failure.nodes for failure in alike if failure.nodes]
    if last.cause == "device":
        return last.done > 0 and len(sets) >= SAME and not frozenset.intersection(*sets)
    on_two, on_any = (2 * ALWAYS, 3 * ALWAYS) if last.done == 0 else (SAME, ALWAYS)
    return len(alike) >= on_any or (len(alike) >= on_two and len(set(sets)) > 1)


def _crashes(failures: Sequence[WorkerFailure]) -> list[WorkerFailure]:
    """Return the failures that no loss of a node explains."""
    return [failure for failure in failures if not failure.node_gone]


def _last_words(name: str, failures: Sequence[WorkerFailure], near: int) -> str:
    crashes = _crashes(failures)
    points = {crash.done for crash in crashes}
    alike = len(points) == 1 and len(crashes) > 1 and max(points) and failures[-1].cause != "device"
    if alike or _deterministic(failures, near):
        return (
            f"{name}: crashed {len(failures)} times in a row with {failures[-1].done} done: this looks deterministic; see this "
            f"job's log, last failure: {failures[-1]}"
        )
    return f"{name}: {len(failures)} attempts in a row failed without progress: {failures[-1]}"
