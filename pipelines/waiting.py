"""Workers that wait for capacity: what they wait for, what the cluster has, and whether any node could ever hold them."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Self

import ray
from ray._private.worker import global_worker
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.experimental.internal_kv import _internal_kv_get

from dis_scale.process.errors import UserError
from pipelines import lines, metrics, stage

LOGGED_AFTER_S = 5.0
"""A worker whose process only has to start is not logged."""
GIVE_UP_AFTER_S = 60.0
"""Time for a node to join that could hold what no node of the cluster can."""
CURE = (
    "start such a node (ray start --num-gpus=..., --resources=..., or the groups of cluster/*.yaml), or change the recipe's "
    "device or workers"
)
Request = dict[str, float]
"""Resources of one worker by name."""


def capacity(request: Request, nodes: Sequence[Request]) -> int:
    """Return how many workers of these resources the nodes hold; one worker's resources are all on one node."""
    return sum(min(int(node.get(name, 0) // amount) for name, amount in request.items()) for node in nodes)


class Wait:
    """One wait for capacity, polled until it ends; as a context it no longer counts as waiting after its block."""

    def __init__(self) -> None:
        self._since_s, self._logged = 0.0, 0
        self._exported: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._export(0)

    def poll(self, count: int, request: Request, together: int = 1) -> str | None:
        """Return a line to log if `count` workers wait and it is news.

        UserError if the cluster can never hold `together` of them.
        """
        self._export(count if request else 0)
        if count == 0 or not request:  # without a request only their processes have to start
            self._since_s, self._logged = 0.0, 0
            return None
        self._since_s = self._since_s or time.monotonic()
        waited_s = time.monotonic() - self._since_s
        if waited_s > GIVE_UP_AFTER_S and hopeless(request, together):
            raise UserError(
                f"no capacity for {together} workers, each with {_listed(request)}, within {waited_s:.0f} s; "
                f"nodes: {_kinds(alive_nodes())}; {CURE}"
            )
        if waited_s < LOGGED_AFTER_S or count == self._logged:
            return None
        self._logged = count
        return words(count, request, alive_nodes(), ray.available_resources(), together)

    def _export(self, count: int) -> None:
        if count != self._exported:
            metrics.gauge("waiting_workers", count)
            self._exported = count

    def log(self, count: int, request: Request, together: int = 1) -> None:
        """Poll and log it, in a stage's job; a stop request ends the wait."""
        if count:
            stage.raise_if_stopped()
        if text := self.poll(count, request, together):
            lines.emit("waiting", workers=count)
            lines.say(text)


def words(count: int, request: Request, nodes: Sequence[Request], free: Request, together: int = 1) -> str:
    """Say what `count` workers wait for, what the cluster has, and what to do if it cannot hold `together` of them."""
    left = ", ".join(f"{free.get(name, 0):g} {name}" for name in request)
    missing = capacity(request, nodes) < together
    lack = "no node has all of that together" if together == 1 else f"the nodes hold {capacity(request, nodes)} of them"
    cure = f"; {lack}, so they wait until one joins: {CURE}" if missing else ""
    return (
        f"waiting for capacity for {count} workers, each with {_listed(request)}; free in the cluster: {left}; "
        f"nodes: {_kinds(nodes)}{cure}"
    )


def hopeless(request: Request, together: int = 1) -> bool:
    """Whether neither the nodes, nor the replacement of a lost one, nor an autoscaler's node can hold `together` such workers.

    Ray does not keep a lost node's resources: after a loss anything may come back.
    """
    nodes = ray.nodes()
    if capacity(request, alive_nodes()) >= together or not all(node["Alive"] for node in nodes):
        return False
    status = GetClusterStatusReply()
    status.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=10))
    scaling = status.autoscaling_state
    if scaling.autoscaler_state_version:
        single = [each.resources_bundle for each in scaling.infeasible_resource_requests]
        gangs = [each for gang in scaling.infeasible_gang_resource_requests for each in gang.requests]
        return any(dict(each) == request for each in [*single, *(each.resources_bundle for each in gangs)])
    return not _scaled()


def _scaled() -> bool:
    """Whether an autoscaler of the first version runs: it names nodes by their types, and does not report what it can add."""
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    types = status.get("autoscaler_report", {}).get("node_type_mapping") or {}
    return any(kind != f"node_{node}" for node, kind in types.items())


def alive_nodes() -> list[Request]:
    """Resources of each node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _listed(resources: Request) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _kinds(nodes: Sequence[Request]) -> str:
    """Say how many nodes have which resources, without memory and the labels that Ray adds."""

    def named(node: Request) -> str:
        return _listed({n: node[n] for n in sorted(node) if "memory" not in n and ":" not in n}) or "nothing"

    return "; ".join(f"{count} with {kind}" for kind, count in Counter(map(named, nodes)).items())
