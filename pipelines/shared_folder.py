"""A storage root on a file system that several nodes mount (NFS, Lustre): allowed if a probe on each node finds it sound.

Each node lists the folder before the others write, so that a client that keeps old listings for a while is found.
"""

import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.storage.folder import open_folder

TIMEOUT_S = 120.0
BEGUN, WINNER = "begun", "winner"
CURE = "or give an object store, for example --set storage.root=s3://bucket/prefix"


def require_shared(url: str) -> None:
    """UserError unless the cluster's nodes see each other's files in this folder at once, and one of many creators wins."""
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    probe = open_folder(url) / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write(BEGUN, b"")
        first = _on_each(nodes, _create, probe.url)
        _on_each(nodes, _write, probe.url)
        seen = _on_each(nodes, _list, probe.url)
    finally:
        probe.delete()
    expected = sorted({BEGUN, WINNER, *nodes})
    if blind := sorted({nodes[node] for node, names in seen.items() if names != expected}):
        raise UserError(
            f"storage.root: {url} is not one folder for all {len(nodes)} nodes, or old listings of it are kept for a while: "
            f"{', '.join(blind[:5])} did not see at once what the others wrote. Mount one file system everywhere (NFS: actimeo=0), "
            f"{CURE}"
        )
    if sum(first.values()) != 1:
        raise UserError(
            f"storage.root: {url}: {sum(first.values())} of {len(nodes)} nodes were the first to create one file, so two runs "
            f"could overwrite each other. Use a file system whose hard links are atomic across nodes, {CURE}"
        )


def _on_each(nodes: Mapping[str, str], work: Any, probe: str) -> dict[str, Any]:
    """Run the work on each node; return its results by node.

    UserError names a node where it failed or did not end; DisScaleError one that was lost, or had no memory for it.
    """
    calls = {
        node: work.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(probe, node)
        for node in nodes
    }
    results = {}
    for node, call in calls.items():
        try:
            results[node] = ray.get(call, timeout=TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise failure_on(nodes[node], probe, error) from error
    return results


def failure_on(node: str, probe: str, error: Exception) -> DisScaleError:
    """Return the error to raise for a failure on a node of this name: only the folder's own is a user's mistake."""
    why = " ".join(str(getattr(error, "cause", error)).split())[:200]
    if not isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.GetTimeoutError):
        return DisScaleError(f"storage.root: not tried on {node}, run the command again: {why}")
    return UserError(f"storage.root: {probe.rpartition('/')[0]} cannot be used on {node}: {why}; {CURE}")


@ray.remote(num_cpus=0, max_retries=0)
def _create(probe: str, node: str) -> bool:
    """List the folder, and return whether this node is the first to create the file that all nodes create."""
    folder = open_folder(probe)
    folder.list()
    return folder.create(WINNER, node.encode())


@ray.remote(num_cpus=0, max_retries=0)
def _write(probe: str, node: str) -> None:
    open_folder(probe).write(node, b"")


@ray.remote(num_cpus=0, max_retries=0)
def _list(probe: str, _: str) -> list[str]:
    return open_folder(probe).list()
