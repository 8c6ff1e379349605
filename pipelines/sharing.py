"""Numbered work shared by independent workers: each takes the next number when it needs one, so none waits for a slow one."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import ray

from dis_scale.process.errors import OutOfMemory
from pipelines import nodes, ray_private, waiting
from pipelines.failures import WorkerFailure, failure_of
from pipelines.stage import StageJob
from pipelines.watching import Report, Watch, watch
from pipelines.worker import Request

Deal = Callable[[], int | None]
"""Returns the next number; None when there are no more."""
SHARED = Watch(independent=True)


class Dealer:
    """Actor that deals the numbers of one piece of shared work after the other. It is kept: its process takes seconds to start."""

    def __init__(self) -> None:
        self._deal, self._left = 0, iter(list[int]())

    def begin(self, numbers: list[int]) -> int:
        """Begin a deal and return its number; the previous deal gives no more numbers."""
        self._deal, self._left = self._deal + 1, iter(numbers)
        return self._deal

    def next(self, deal: int) -> int | None:
        return next(self._left, None) if deal == self._deal else None


class _RemoteDeal:
    """A deal's next number and its end, by remote calls; picklable."""

    def __init__(self, dealer: Any, numbers: list[int]) -> None:
        self._dealer, self._number = dealer, ray.get(dealer.begin.remote(numbers))

    def __call__(self) -> int | None:
        return ray.get(self._dealer.next.remote(self._number))

    def end(self) -> Any:
        """Deal no more; return the call, which is not awaited."""
        return self._dealer.begin.remote([])


def _begin_deal(job: StageJob, numbers: list[int]) -> _RemoteDeal:
    """Begin a deal by the job's dealer, an actor on this driver's node; start a dealer if it is missing or died."""
    if job.dealer is not None:
        with contextlib.suppress(ray.exceptions.RayActorError):
            return _RemoteDeal(job.dealer, numbers)
    here = nodes.only(ray.get_runtime_context().get_node_id())
    job.dealer = ray.remote(num_cpus=0)(Dealer).options(scheduling_strategy=here).remote()
    return _RemoteDeal(job.dealer, numbers)


def capacity(request: Request) -> int:
    """Return how many workers with this request the cluster's resources hold at the same time, at least one."""
    return max(1, waiting.capacity(request.amounts, nodes.alive_nodes()))


class Shared(NamedTuple):
    """The outcome of shared work."""

    workers: list[Any]
    """Workers that have ended their work and can be used again. The others were lost, or had no capacity."""
    results: list[Any]
    """Results of these workers."""
    failure: WorkerFailure | None
    """Failure of a lost worker, if any: another attempt does the work that it had begun, and the numbers that were not dealt."""


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

    When a worker is lost, the others end what they have begun and get no more numbers, so that the caller can replace it soon. A
    worker that has no capacity when the work is done is killed. An error that a retry cannot mend is raised at once, and no further
    numbers are dealt.
    """
    deal = _begin_deal(job, numbers)
    calls = [getattr(worker, work).remote(*arguments, deal) for worker in workers]
    failure = None
    try:
        watch(job, workers, calls, report, replace(policy, on_lost=deal.end))
    except WorkerFailure as error:
        failure, job.placed = error, frozenset(map(nodes.under, filter(ray_private.has_process, workers)))
    except (OutOfMemory, ray.exceptions.RayTaskError):
        ray.get(deal.end())
        raise
    ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
    done = {worker: call for worker, call in zip(workers, calls, strict=True) if call in ended and not failure_of(call)}
    for worker in workers:
        if worker not in done:
            ray.kill(worker)
    return Shared(list(done), ray.get(list(done.values())), failure)
