"""Restarts of failed attempts: how many, how long apart, and the message after the last."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple, TypeVar

import ray

from dis_scale.process import counts
from dis_scale.process.errors import DisScaleError, StorageAway
from dis_scale.sweep import state
from pipelines import nodes
from pipelines.failures import Hang, WorkerFailure, blame, describe, may_pass
from pipelines.stage import STORAGE_AWAY_S, StageJob

T = TypeVar("T")
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 2.0, 60.0
"""Wait before the second consecutive attempt without progress; it doubles from one to the next."""
LONGEST_FOR_DEVICE_S = 1800.0
"""Longest wait after a failed device. An excluded node is used while there is no other node, and its repair may take a weekend,
which 100 attempts outlast."""
WORKED_S = 3600.0
"""Length of an attempt that shows that storage was there: storage that is away ends an attempt within minutes."""
REPLACED_S = 3600.0
"""Time for which failures of an excluded node do not count while another node is gone: attempts fail before a new node starts."""
GONE_WITHIN_S = 120.0
"""Time after a failure in which the next attempt may still get the lost node: Ray calls a silent node dead after 30 s."""
NEAR_STEPS = 2
"""Most steps between crashes at the same place: progress is polled once a second, and a process that dies reports no more."""
HANGS = 2
"""Hangs in a row after which nodes are left out in turn: one GPU that hangs makes all ranks wait."""
DEATHS = 3
"""Attempts in a row after which a node is left out: its processes died at different places (at one place the program is to blame),
or it did not reach storage."""


class Limit(NamedTuple):
    """Crashes in a row, at the same progress and of the same cause, after which a job ends."""

    on_two_sets: int
    """Limit if they were on at least two sets of nodes."""
    on_any: int


CRASH = Limit(5, 10)
WITH_HANGS = Limit(10, 10)
"""Limit with hangs, after which nodes are left out in turn: that the nodes changed says nothing."""
CONNECTIONS = Limit(20, 30)
"""Limit for connections that broke before a first step: a network may be away for a while."""


def with_restarts(job: StageJob, name: str, attempt: Callable[[WorkerFailure | None], T], stored: Callable[[], int]) -> T:
    """Return the attempt's result. After a failure run it again, with that failure, as often as the recipe allows.

    Only consecutive attempts without progress (`stored` has not changed) count towards the limit. The wait between them doubles.
    For an hour two kinds do not count: attempts that ended because storage was away, and devices that failed on an excluded node
    that is used in place of a gone one. DisScaleError after the last attempt, or if the crash is deterministic; StorageAway if
    storage has been away for too long.
    """
    record, before = _Record(job, name, _stored_or(0, stored)), None
    while True:
        began_s, job.placed, job.left_out = job.now_s(), frozenset(), record.suspects
        try:
            done = attempt(before)
            if job.left_out and _stored_or(record.stored, stored) != record.stored:
                record.blame_suspect()
            return done
        except (WorkerFailure, StorageAway, ray.exceptions.RayError) as error:
            if isinstance(error, ray.exceptions.RayError) and not may_pass(error):
                raise
            job.raise_if_stopped()
            failure = error if isinstance(error, WorkerFailure) else WorkerFailure(describe(error), cause=blame(error))
        failure.nodes, before = job.placed, failure
        record.add(failure, _stored_or(record.stored, stored), worked=job.now_s() - began_s > WORKED_S)
        wait_s, left = record.wait_s(failure), job.recipe.train.restarts - len(record.counted)
        counts.add(counts.RESTARTS)
        job.emit("restart", job=name, done=failure.done, left=left)
        job.say(
            f"{name}: {failure}; restart from the stored state in {wait_s:.0f} s, {left} more attempts without progress",
            level="warning",
        )
        job.pause(wait_s)
        job.raise_if_stopped()


@dataclass
class _Record:
    """Failed attempts in a row without progress: those that count, and the times since which others do not count."""

    job: StageJob
    name: str
    stored: int
    counted: list[WorkerFailure] = field(default_factory=list)
    in_a_row: int = 0
    """Number of failed attempts in a row, also of those that do not count."""
    nodes: frozenset[str] = frozenset()
    """Names of the nodes of all attempts, also of those before the last progress."""
    ran: list[tuple[float, frozenset[str]]] = field(default_factory=list)
    """Time of the failure (Unix) and nodes of each attempt without progress, also of those that do not count."""
    away_since_s: float = math.inf
    """Time at which storage went away, if the last attempt ended by that."""
    reused_since_s: float = math.inf
    """Time at which an excluded node was first used in place of a gone one, if the last attempt's device failed on it."""
    away_from: list[str] = field(default_factory=list)
    """Names of the nodes that did not reach storage, one for each of the last attempts that ended by this."""
    suspects: frozenset[str] = frozenset()
    """Names of the nodes that the next attempt does without if it can."""

    def add(self, failure: WorkerFailure, stored: int, *, worked: bool) -> None:
        """Record the failure of an attempt that left this much `stored`; DisScaleError or StorageAway if it was the last.

        `worked`: the attempt ran long enough to show that the storage outage that ended it, if any, is a new one.
        """
        progress = stored != self.stored
        self.stored, self.nodes = stored, self.nodes | failure.nodes
        self.ran.append((failure.at, failure.nodes))
        self._note_gone([*self.counted, failure])
        if progress:
            if not isinstance(failure, Hang):  # a hang without the suspect acquits it
                self.blame_suspect()
            self.counted, self.ran, self.in_a_row = [], [], 0
        if progress or worked:
            self.away_since_s, self.reused_since_s, self.away_from = math.inf, math.inf, []
        self.in_a_row += 1
        self._note_absences(failure)
        model, train = self.job.context.model, self.job.recipe.train
        if model:
            train = self.job.recipe.train_of(model)
        near = NEAR_STEPS * train.batch_images
        if failure.cause != "storage" and not self.awaits_node:
            self.counted.append(failure)
            if len(self.counted) > train.restarts or _deterministic(self.counted, near):
                raise DisScaleError(_last_words(self.name, self.counted, near)) from failure
        self.suspects = _suspects(self.counted, near, min(train.restarts + 1, CRASH.on_any), self._node_failures)
        if self.away_from == DEATHS * self.away_from[:1]:  # a node's own mount or route may be broken
            self.suspects = (self.suspects | {*self.away_from}) - {""}

    def _note_absences(self, failure: WorkerFailure) -> None:
        """Note since when storage is away, or a failed node is used in place of a gone one; StorageAway after too long."""
        now_s, away = self.job.now_s(), failure.cause == "storage"
        reused = failure.cause == "device" and self.job.reuses_excluded and len(self.nodes) > 1
        self.away_since_s = min(self.away_since_s, now_s) if away else math.inf
        self.reused_since_s = min(self.reused_since_s, now_s) if reused else math.inf
        self.away_from = [*self.away_from, failure.node][-DEATHS:] if away else []
        if away and now_s - self.away_since_s > STORAGE_AWAY_S:
            minutes = f"{STORAGE_AWAY_S / 60:.0f} minutes"
            raise StorageAway(f"{self.name}: storage has been away for {minutes}: {failure}") from failure

    def blame_suspect(self) -> None:
        """Count a failed device against the only node that an attempt with progress left out, unless it did not reach storage."""
        if len(self.job.left_out) == 1 and self.job.left_out.isdisjoint(self.away_from):
            (node,) = self.job.left_out
            nodes.record_failure(self.job, node, "attempts with it failed, and one without it made progress")

    def _node_failures(self) -> dict[str, int]:
        return _stored_or({}, lambda: state.node_failures(self.job.sweep))

    @property
    def awaits_node(self) -> bool:
        """Whether an excluded node is used only until another one is there."""
        return self.reused_since_s <= self.job.now_s() < self.reused_since_s + REPLACED_S

    def wait_s(self, failure: WorkerFailure) -> float:
        """Return the seconds before the next attempt: none after the first failure."""
        longest_s = LONGEST_FOR_DEVICE_S if failure.cause == "device" and not self.awaits_node else LONGEST_BACKOFF_S
        return min(longest_s, FIRST_BACKOFF_S * 2.0 ** min(self.in_a_row - 2, 10)) if self.in_a_row > 1 else 0.0

    def _note_gone(self, failures: Sequence[WorkerFailure]) -> None:
        """Note for each failure whether one of its nodes is gone by now; a node on which a later attempt still ran is not."""
        gone = self.job.gone_of(frozenset().union(*(failure.nodes for failure in failures)))
        for failure in failures:
            later = [nodes for at, nodes in self.ran if at - failure.at > GONE_WITHIN_S]
            if later and (isinstance(failure, Hang) or failure.cause == "device"):
                continue  # its nodes are left out, and may be taken away for this reason
            failure.node_gone = failure.node_gone or not gone.isdisjoint(failure.nodes.difference(*later))


def _stored_or(before: T, stored: Callable[[], T]) -> T:
    """Return what is stored now, or `before` if storage does not answer."""
    try:
        return stored()
    except DisScaleError:
        return before


def _deterministic(failures: Sequence[WorkerFailure], near: int) -> bool:
    """Return whether the last attempts crashed at the same place, at most `near` images apart, by the same cause, on any nodes.

    Failed devices are not deterministic as long as one node may have been in all of these attempts. Losses of nodes are left out:
    in a storm of preemptions many attempts in a row end before a step.
    """
    crashes = _crashes(failures)
    if not crashes:
        return False
    last = crashes[-1]

    def same(each: WorkerFailure) -> bool:
        # A process that dies breaks others' connections: which of the two is seen first is chance.
        broken = each.cause == last.cause or {each.cause, last.cause} == {"lost", "connection"}
        return broken and bool(each.done) == bool(last.done) and abs(each.done - last.done) <= near

    alike = list(takewhile(same, reversed(crashes)))
    sets = [failure.nodes for failure in alike if failure.nodes]
    if last.cause == "device":
        return last.done > 0 and len(sets) >= CRASH.on_two_sets and not frozenset.intersection(*sets)
    if any(isinstance(each, Hang) for each in alike):
        limit = WITH_HANGS
    elif last.done == 0 and all(each.cause == "connection" for each in alike):
        limit = CONNECTIONS
    else:
        limit = CRASH
    return len(alike) >= limit.on_any or (len(alike) >= limit.on_two_sets and len(set(sets)) > 1)


def _suspects(failures: Sequence[WorkerFailure], near: int, attempts: int, failed: Callable[[], dict[str, int]]) -> frozenset[str]:
    """Return the nodes that the next attempt should leave out.

    These are nodes on which two processes died before a step, or on which the last three died, more than `near` images apart. After
    two hangs in a row they are all nodes in turn, those that have failed least first: so a stall of something that all nodes share
    excludes none. Of many nodes several are left out at a time, so that each one was before this many `attempts` end the job; half
    of them if only one attempt is left.
    """
    crashes = _crashes(failures)
    deaths = Counter(crash.node for crash in crashes if crash.node and crash.cause == "lost" and not crash.done)
    suspects = {node for node, count in deaths.items() if count >= state.MOST_NODE_FAILURES}
    last = crashes[-DEATHS:]
    died = {crash.node if crash.cause == "lost" else "" for crash in last}
    done = sorted(crash.done for crash in last)
    if len(last) == DEATHS and len(died) == 1 and done[-1] - done[0] > near:
        suspects |= died - {""}
    hangs = list(takewhile(lambda crash: isinstance(crash, Hang), reversed(crashes)))
    if len(hangs) >= HANGS and hangs[-1].nodes:
        times = failed()
        used = sorted(hangs[-1].nodes, key=lambda node: (times.get(node, 0), node))
        at_once = math.ceil(len(used) / max(2, attempts - HANGS))
        first = (len(hangs) - HANGS) * at_once % len(used)
        suspects.update(used[first : first + at_once])
    return frozenset(suspects)


def _crashes(failures: Sequence[WorkerFailure]) -> list[WorkerFailure]:
    """Return the failures that no loss of a node explains."""
    return [failure for failure in failures if not failure.node_gone]


def _last_words(name: str, failures: Sequence[WorkerFailure], near: int) -> str:
    crashes = _crashes(failures)
    points = {crash.done for crash in crashes}
    alike = len(points) == 1 and len(crashes) > 1 and max(points) and failures[-1].cause != "device"
    if alike or _deterministic(failures, near):
        return (
            f"{name}: crashed {len(crashes)} times in a row with {crashes[-1].done} done: this looks deterministic; see this "
            f"job's log, last failure: {crashes[-1]}"
        )
    return f"{name}: {len(failures)} attempts in a row failed without progress: {failures[-1]}"
