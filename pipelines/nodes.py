"""Nodes of the cluster: their names, and the nodes that placement avoids because their devices failed.

A node is known by its name in Ray, by default its address: its id changes with each start of Ray.
"""

from collections.abc import Callable, Collection

import ray

from dis_scale.sweep import Sweep, state
from pipelines import lines

MOST_FAILURES = 2
"""Failures of a node's devices in one sweep after which its training avoids the node."""
NODE_ID = "ray.io/node-id"
"""Label that Ray gives each node."""


def name_of(node_id: str) -> str:
    """Return a node's name; its id if Ray no longer lists it."""
    return next((str(node["NodeName"]) for node in ray.nodes() if node["NodeID"] == node_id), node_id)


def record_failure(sweep: Sweep, model: str, node_id: str, why: str) -> None:
    """Store the failure of a node's device; log it, and that the node is avoided from now on."""
    name = name_of(node_id)
    state.record_node_failure(sweep.run(model), name, why)
    failures = state.node_failures(sweep)[name]
    lines.emit("node_failure", model=model, node=name, failures=failures)
    lines.say(f"{model}: node {name}: failure {failures} of its devices: {why}", level="warning")
    if failures >= MOST_FAILURES:
        lines.emit("node_excluded", model=model, node=name)
        lines.say(
            f"{model}: node {name} is excluded after {failures} failures: drain it, or repair it", level="warning"
        )


def failed(sweep: Sweep) -> list[str]:
    """Return the names of the nodes that had so many failures that placement avoids them, whether they are alive or not."""
    return sorted(name for name, failures in state.node_failures(sweep).items() if failures >= MOST_FAILURES)


def excluded(sweep: Sweep, enough: Callable[[Collection[str]], bool]) -> list[str]:
    """Return the ids of the nodes to avoid; none, with a line, unless the other nodes are `enough` without them."""
    failures = state.node_failures(sweep)
    bad = {
        node["NodeID"]: str(node["NodeName"])
        for node in ray.nodes()
        if node["Alive"] and failures[node["NodeName"]] >= MOST_FAILURES
    }
    if bad and not enough(bad.keys()):
        lines.emit("exclusion_ignored", nodes=sorted(bad.values()))
        lines.say(f"the other nodes have no capacity: excluded nodes are used again: {', '.join(sorted(bad.values()))}")
        return []
    return sorted(bad)


def avoiding(ids: Collection[str]) -> dict[str, str]:
    """Return the label selector of every node but these, of which there is at least one."""
    return {NODE_ID: f"!in({','.join(sorted(ids))})"}
