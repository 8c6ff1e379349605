"""Nodes of the cluster: their names, resources and GPUs, and the nodes that placement avoids because their devices failed.

A node is known by its name in Ray: its id changes with each start of Ray. By default that is its address; the files for
Kubernetes set it to the machine's name, since the address of a pod that is gone goes to another.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dis_scale.process.errors import DisScaleError, StorageAway, StorageError, UserError
from dis_scale.recipe import Recipe
from dis_scale.sweep import Sweep, state
from dis_scale.training.devices import device_of
from pipelines import ray_private
from pipelines.failures import cause_of, may_pass
from pipelines.ray_private import Resources
from pipelines.stage import StageJob

ON_EACH_S = 300.0
"""Time for a task that runs on each node: a loaded one has needed more than 120 s to start a worker and load PyTorch."""
ASKED_AGAIN, ASK_AGAIN_S = 4, 15.0
"""How often the living nodes are asked again if one is lost, and after which pause: Ray calls a silent node dead after 30 s."""
T = TypeVar("T")
NODE_ID = "ray.io/node-id"
"""Label that Ray gives each node."""


class Node(NamedTuple):
    """A node that is alive, and its resources by name."""

    id: str
    name: str
    resources: Resources


def living() -> list[Node]:
    """Return the nodes that are alive now."""
    return [Node(node["NodeID"], str(node["NodeName"]), node["Resources"]) for node in ray.nodes() if node["Alive"]]


def alive_nodes() -> list[Resources]:
    """Return the resources of each node that is alive now."""
    return [node.resources for node in living()]


def only(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that runs a worker or a task on this node, or not at all."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


class LostNode(DisScaleError):
    """A node that was to be asked is gone, takes no task, or does not answer in time. A later attempt finds other nodes."""

    exit_code = StorageAway.exit_code


def of_living(
    ask: Callable[[list[Node]], T], known: Callable[[], list[Node]] = living, pause: Callable[[float], None] = time.sleep
) -> T:
    """Return the answer of `ask` for all living nodes. If a node is lost meanwhile, ask the remaining nodes after a pause.

    LostNode if a node is lost each time.
    """
    for _ in range(ASKED_AGAIN):
        try:
            return ask(known())
        except LostNode:
            pause(ASK_AGAIN_S)
    return ask(known())


def on_each(nodes: Sequence[Node], task: Any, *arguments: object, words: Callable[[str, str], str]) -> list[Any]:
    """Run a task on each of these nodes at the same time; return its results in the order of the nodes.

    UserError if a task failed, in the `words` for the node's name and the reason. LostNode if a task was lost with its node, did
    not end in time, or failed for a cause that may pass, such as too little memory or storage that was away.
    """
    calls = [task.options(scheduling_strategy=only(node.id)).remote(*arguments) for node in nodes]
    ray.wait(calls, num_returns=len(calls), timeout=ON_EACH_S)
    results = []
    for node, call in zip(nodes, calls, strict=True):
        try:
            results.append(ray.get(call, timeout=0))
        except ray.exceptions.RayError as error:
            raise error_on(node.name, error, words) from error
    return results


def error_on(name: str, error: Exception, words: Callable[[str, str], str]) -> DisScaleError:
    """Return the error to raise for a node's answer."""
    cause = cause_of(error)
    why = " ".join(str(cause).split())[:200] or type(cause).__name__
    if isinstance(error, ray.exceptions.RayTaskError) and not may_pass(error):
        return UserError(words(name, why))
    return LostNode(f"{words(name, why)}; run the command again")


def choose_device(recipe: Recipe) -> tuple[str, str]:
    """Return (device, reason) by the GPUs that the cluster has had: a job that begins while they are away waits for them."""
    return device_of(recipe, int(sum(node.get("GPU", 0) for node in ray_private.known_nodes())))


def total_gpus() -> int:
    """Return the number of the cluster's GPUs."""
    return int(ray.cluster_resources().get("GPU", 0))


def own_node_drains() -> bool:
    """Return whether the node of this process is being drained."""
    return ray.get_runtime_context().get_node_id() in ray_private.draining_nodes()


def name_of(node_id: str) -> str:
    """Return a node's name; its id if Ray no longer lists it."""
    return next((str(node["NodeName"]) for node in ray.nodes() if node["NodeID"] == node_id), node_id)


def under(worker: Any) -> str:
    """Return the name of the node on which a worker runs, or ran last."""
    return name_of(ray_private.node_of(worker))


def record_failure_of(job: StageJob, node_id: str, why: str) -> None:
    """Do the same as `record_failure` for a node whose id is known."""
    job.failed_ids.add(node_id)
    record_failure(job, name_of(node_id), why)


def record_failure(job: StageJob, name: str, why: str) -> None:
    """Store and log the failure of a node's device; also log if the node is excluded from now on."""
    try:
        state.record_node_failure(job.failed_nodes, name, why)
        failures = state.node_failures(job.sweep)[name]
        job.gauge("failed_nodes", len(state.excluded_nodes(job.sweep)))
    except (StorageError, StorageAway) as error:
        job.say(f"node {name}: the failure of its device is not stored: {error}")
        return
    job.emit("node_failure", node=name, failures=failures)
    job.say(f"node {name}: failure {failures} of its devices: {why}", level="warning")
    if failures >= state.MOST_NODE_FAILURES:
        job.emit("node_excluded", node=name)
        job.say(f"node {name} is excluded after {failures} failures: drain it, or repair it", level="warning")


def failed(sweep: Sweep, nodes: Sequence[Node]) -> dict[str, str]:
    """Return the names of the nodes that had too many failures of their devices, by id."""
    names = state.excluded_nodes(sweep)
    return {node.id: node.name for node in nodes if node.name in names}


def excluded(job: StageJob, nodes: Sequence[Node], enough: Callable[[Collection[str]], bool]) -> list[str]:
    """Return the ids of the nodes to avoid, if the other nodes are `enough`.

    Otherwise log this, and return only those that failed in this job, or none: several pods on one machine have its name.
    """
    bad = failed(job.sweep, nodes)
    job.reuses_excluded = bool(bad) and not enough(bad.keys())
    if not job.reuses_excluded:
        return sorted(bad)
    here = job.failed_ids.intersection(bad)
    avoided = sorted(here) if here and enough(here) else []
    names = sorted({name for node, name in bad.items() if node not in avoided})
    job.emit("exclusion_ignored", nodes=names)
    job.say(f"the other nodes have no capacity: excluded nodes are used again: {', '.join(names)}")
    return avoided


def avoiding(ids: Collection[str]) -> dict[str, str]:
    """Return the label selector of every node but these, of which there is at least one."""
    return {NODE_ID: f"!in({','.join(sorted(ids))})"}
