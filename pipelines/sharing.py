"""Numbered work shared by independent workers: each takes the next number when it needs one, so none waits for a slow one."""

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import waiting
from pipelines.worker import amounts, watch

Deal = Callable[[], int | None]
"""Returns the next number; None when there are no more."""


class Dealer:
    """Deals each number to one caller; None when there are no more."""

    def __init__(self, numbers: list[int]) -> None:
        self._left, self._lock = iter(numbers), threading.Lock()

    def next(self) -> int | None:
        with self._lock:
            return next(self._left, None)


class _RemoteDealer:
    """A remote call for the dealer's next number; picklable."""

    def __init__(self, dealer: Any) -> None:
        self._dealer = dealer

    def __call__(self) -> int | None:
        return ray.get(self._dealer.next.remote())


def capacity(request: dict[str, Any]) -> int:
    """Return how many workers with this request the cluster's resources hold at the same time, at least one."""
    return max(1, waiting.capacity(amounts(request), waiting.alive_nodes()))


def share(
    workers: list[Any], work: str, arguments: tuple[Any, ...], numbers: list[int], report: Callable[[list[int]], None]
) -> list[Any]:
    """Call the method `work` of all workers with `arguments` and a `Deal` of these numbers; return the workers that had capacity.

    The others continue without a lost worker. One that has no capacity when the numbers are dealt is killed. WorkerFailure at the
    end if a worker was lost: another attempt makes what it had begun.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    dealer = ray.remote(num_cpus=0)(Dealer).options(scheduling_strategy=here).remote(numbers)
    results = [getattr(worker, work).remote(*arguments, _RemoteDealer(dealer)) for worker in workers]
    watch(workers, results, report, independent=True)
    ended, _ = ray.wait(results, num_returns=len(results), timeout=0)
    for each, result in zip(workers, results, strict=True):
        if result not in ended:
            ray.kill(each)
    return [each for each, result in zip(workers, results, strict=True) if result in ended]
