"""Workers that wait for capacity: what they wait for, what the cluster has. A wait has no limit: an autoscaler may add nodes."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

import ray

from dis_scale.process.errors import counted
from pipelines.metrics import SetGauge
from pipelines.nodes import alive_nodes
from pipelines.ray_private import Resources
from pipelines.stage import StageJob

LOGGED_AFTER_S, STARTS = 5.0, 3.0
"""Time after which a wait is logged, and factor by which it is longer if the nodes have the capacity: just to start, a worker's
process takes up to 12 s on two slow cores."""
LONG_S = 600.0
"""Length of a wait whose end is exported: it explains why nothing was saved meanwhile."""
CURE = (
    "start such a node (ray start --num-gpus=..., --resources=..., or the groups of cluster/*.yaml), or change the recipe's "
    "device or workers"
)


def capacity(request: Resources, nodes: Sequence[Resources]) -> int:
    """Return how many workers of these resources the nodes hold; one worker's resources are all on one node."""
    return sum(min(int(node.get(name, 0) // amount) for name, amount in request.items()) for node in nodes)


class Wait:
    """One wait for capacity, polled until it ends; as a context manager it ends with its block at the latest."""

    def __init__(
        self,
        gauge: SetGauge,
        logged_after_s: float = LOGGED_AFTER_S,
        long_s: float = LONG_S,
        nodes: Callable[[], Sequence[Resources]] = alive_nodes,
        free: Callable[[], Resources] = ray.available_resources,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now_s = now_s
        self._gauge, self._logged_after_s, self._long_s, self._nodes, self._free = gauge, logged_after_s, long_s, nodes, free
        self._since_s = 0.0
        self._logged: tuple[int, Resources] | None = None
        self._exported: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self._export(0)
        if self._since_s and self._now_s() - self._since_s > self._long_s:
            self._gauge("waited_timestamp_seconds", time.time())
        self._since_s, self._logged = 0.0, None

    def poll(self, count: int, request: Resources, together: int = 1) -> str | None:
        """Return a line if `count` workers wait and this is not logged yet; `together` of them need capacity at the same time."""
        if count == 0 or not request:  # without a request only their processes have to start
            self._end()
            return None
        self._export(count)
        self._since_s = self._since_s or self._now_s()
        waited_s = self._now_s() - self._since_s
        if waited_s < self._logged_after_s or (count, request) == self._logged:
            return None
        nodes = self._nodes()
        if waited_s < STARTS * self._logged_after_s and capacity(request, nodes) >= max(count, together):
            return None
        text = words(count, request, nodes, self._free(), together)
        self._logged = count, request  # after Ray's answer, which may be lost
        return text

    def log(self, job: StageJob, count: int, request: Resources, together: int = 1, *, alone: bool = True) -> None:
        """Poll, and log the line, if any; a stop request ends the wait. `alone`: no other worker has work meanwhile."""
        if count:
            job.raise_if_stopped()
            if alone:
                job.show_idle()
        if text := self.poll(count, request, together):
            job.emit("waiting", workers=count)
            job.say(text)

    def _export(self, count: int) -> None:
        if count != self._exported:
            self._gauge("waiting_workers", count)
            self._exported = count


def words(count: int, request: Resources, nodes: Sequence[Resources], free: Resources, together: int = 1) -> str:
    """Describe what `count` workers wait for, what the cluster has, and what to do if it cannot hold `together` of them."""
    left = _listed({name: free.get(name, 0) for name in request})
    return (
        f"waiting for capacity for {counted(count, 'worker')}, each with {_listed(request)}; free in the cluster: {left}; "
        f"{_held(request, nodes, together)}"
    )


def needs(stage: str, count: int, request: Resources, nodes: Sequence[Resources]) -> str:
    """Describe what the `count` workers of a later stage will wait for, since the cluster cannot hold them yet."""
    return f"{stage} needs {counted(count, 'worker')}, each with {_listed(request)}; {_held(request, nodes, count)}"


def _held(request: Resources, nodes: Sequence[Resources], together: int) -> str:
    held = capacity(request, nodes)
    lack = "no node has all of that together" if together == 1 else f"the nodes hold {held} of them"
    cure = f"; {lack}, so they wait until one joins: {CURE}" if held < together else ""
    return f"nodes: {_kinds(nodes)}{cure}"


def _listed(resources: Resources) -> str:
    shown = ((f"{amount / 2**30:.1f} GiB of" if name == "memory" else f"{amount:g}", name) for name, amount in resources.items())
    return ", ".join(f"{amount} {name}" for amount, name in shown)


def _kinds(nodes: Sequence[Resources]) -> str:
    """Describe how many nodes have which resources, without memory and the labels that Ray adds."""

    def named(node: Resources) -> str:
        return _listed({n: node[n] for n in sorted(node) if "memory" not in n and ":" not in n}) or "nothing"

    return "; ".join(f"{count} with {kind}" for kind, count in Counter(map(named, nodes)).items())
