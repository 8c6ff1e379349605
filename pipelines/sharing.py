"""Numbered work shared by independent workers: each takes the next number when it needs one, so none waits for a slow one."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import waiting
from pipelines.failures import WorkerFailure, failure_of
from pipelines.nodes import alive_nodes
from pipelines.stage import StageJob
from pipelines.watching import Report, Watch, watch
from pipelines.worker import amounts

Deal = Callable[[], int | None]
"""Returns the next number; None when there are no more."""
SHARED = Watch(independent=True)


class Dealer:
    """Deals each number to one caller; None when there are no more."""

    def __init__(self, numbers: list[int]) -> None:
        self._left, self._lock = iter(numbers), threading.Lock()

    def next(self) -> int | None:
        with self._lock:
            return next(self._left, None)

    def end(self) -> None:
        """Deal no more numbers."""
        with self._lock:
            self._left = iter(())


class _Deals:
    """One actor deals for all shared work of a driver in turn: its process takes seconds to start."""

    def __init__(self) -> None:
        self._current, self._dealer = 0, Dealer([])

    def begin(self, numbers: list[int]) -> int:
        """Return the new deal's number; the one before deals no more."""
        self._current, self._dealer = self._current + 1, Dealer(numbers)
        return self._current

    def next(self, deal: int) -> int | None:
        return self._dealer.next() if deal == self._current else None

    def end(self, deal: int) -> None:
        if deal == self._current:
            self._dealer.end()


class _RemoteDeal:
    """A deal's next number and its end, by remote calls; picklable."""

    def __init__(self, deals: Any, numbers: list[int]) -> None:
        self._deals, self._number = deals, ray.get(deals.begin.remote(numbers))

    def __call__(self) -> int | None:
        return ray.get(self._deals.next.remote(self._number))

    def end(self) -> Any:
        """Deal no more; return the call, which is not awaited."""
        return self._deals.end.remote(self._number)


def _begin_deal(job: StageJob, numbers: list[int]) -> _RemoteDeal:
    """Begin a deal by the job's dealer, which is on this driver's node; a new one if there is none or if it died."""
    if job.dealer is not None:
        with contextlib.suppress(ray.exceptions.RayActorError):
            return _RemoteDeal(job.dealer, numbers)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    job.dealer = ray.remote(num_cpus=0)(_Deals).options(scheduling_strategy=here).remote()
    return _RemoteDeal(job.dealer, numbers)


def capacity(request: dict[str, Any]) -> int:
    """Return how many workers with this request the cluster's resources hold at the same time, at least one."""
    return max(1, waiting.capacity(amounts(request), alive_nodes()))


class Shared(NamedTuple):
    """The outcome of shared work."""

    workers: list[Any]
    """Those that have ended their work and can be used again. The others were lost, or had no capacity."""
    results: list[Any]
    """What these returned."""
    failure: WorkerFailure | None
    """Why a worker was lost, if one was: another attempt makes what it had begun, and what was not dealt any more."""


def share(
    job: StageJob,
    workers: list[Any],
    work: str,
    arguments: tuple[Any, ...],
    numbers: list[int],
    report: Report = lambda _: None,
    policy: Watch = SHARED,
) -> Shared:
    """Call the method `work` of all workers with `arguments` and a `Deal` of these numbers.

    When a worker is lost, the others end what they have begun and get no more numbers, so that the caller can replace it soon. One
    without capacity when the numbers are dealt is killed. An error that a retry cannot mend is raised at once, and no further
    numbers are dealt.
    """
    deal = _begin_deal(job, numbers)
    calls = [getattr(worker, work).remote(*arguments, deal) for worker in workers]
    failure = None
    try:
        watch(job, workers, calls, report, replace(policy, on_lost=deal.end))
    except WorkerFailure as error:
        failure = error
    except ray.exceptions.RayTaskError:
        ray.get(deal.end())
        raise
    ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
    done = {worker: call for worker, call in zip(workers, calls, strict=True) if call in ended and not failure_of(call)}
    for worker in workers:
        if worker not in done:
            ray.kill(worker)
    return Shared(list(done), ray.get(list(done.values())), failure)
