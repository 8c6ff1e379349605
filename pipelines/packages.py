"""Packages and files of the families that other packages bring: each node must have them before anything is spent."""

from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dis_scale.models import families
from dis_scale.process.errors import DisScaleError, NoFamily, UserError
from dis_scale.recipe import Recipe

TIMEOUT_S = 120.0


def brought(recipe: Recipe) -> dict[str, str]:
    """Return the package and version, or the hash of the file, of each kind of model that is not built-in."""
    return {model.kind: model.needed_code for model in recipe.models.values() if model.needed_code}


def require_on_nodes(recipe: Recipe) -> None:
    """NoFamily names the nodes of this process's cluster that lack a package or a file."""
    if not (codes := brought(recipe)):
        return
    names = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}
    calls = {
        node: _missing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(codes)
        for node in names
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=TIMEOUT_S)
    missing = {node: reason for node, call in calls.items() if (reason := _answer(names[node], call))}
    if missing:
        node, reason = next(iter(missing.items()))
        others = f" (and {len(missing) - 1} other nodes)" if len(missing) > 1 else ""
        raise NoFamily(f"node {names[node]}{others}: {reason}")


def _answer(name: str, call: ray.ObjectRef[str]) -> str:
    """Return a node's answer. DisScaleError if there is none: the node was lost, or takes no task."""
    try:
        return str(ray.get(call, timeout=0))
    except ray.exceptions.RayError as error:
        why = " ".join(str(error).split())[:200]
        raise DisScaleError(f"node {name}: its packages are not checked, run the command again: {why}") from error


def require(codes: Mapping[str, str]) -> None:
    """NoFamily if this machine cannot make models of these kinds."""
    for kind, code in codes.items():
        families.find(kind, code)


@ray.remote(num_cpus=0)
def _missing(codes: dict[str, str]) -> str:
    """Return why this node cannot make models of these kinds; empty if it can."""
    try:
        require(codes)
    except UserError as error:
        return str(error)
    return ""
