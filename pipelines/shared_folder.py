"""A storage root on a file system that several nodes mount (NFS, Lustre): allowed if a probe on each node finds it sound.

Each node lists the folder before the others write, so that a client that keeps old listings for a while is detected.
"""

import uuid
from functools import partial

import ray

from dis_scale.process.errors import UserError
from dis_scale.storage.folder import open_folder
from pipelines import nodes

BEGUN, WINNER = "begun", "winner"
CURE = "or give an object store, for example --set storage.root=s3://bucket/prefix"


def require_shared(url: str) -> None:
    """Raise UserError unless the cluster's nodes see each other's files in this folder at once, and one of many creators wins."""
    nodes.of_living(partial(_require_shared, url))


def _require_shared(url: str, alive: list[nodes.Node]) -> None:
    probe = open_folder(url) / f".probe-{uuid.uuid4().hex}"

    def words(node: str, why: str) -> str:
        return f"storage.root: {url} cannot be used on {node}: {why}; {CURE}"

    run = partial(nodes.on_each, alive, words=words)
    try:
        probe.write(BEGUN, b"")
        first = run(_create, probe.url)
        run(_write, probe.url)
        seen = run(_list, probe.url)
    finally:
        probe.delete()
    expected = sorted([BEGUN, WINNER, *(node.id for node in alive)])
    if blind := sorted({node.name for node, names in zip(alive, seen, strict=True) if names != expected}):
        raise UserError(
            f"storage.root: {url} is not one folder for all {len(alive)} nodes, or old listings of it are kept for a while: "
            f"{', '.join(blind[:5])} did not see at once what the others wrote. Mount one file system everywhere (NFS: actimeo=0), "
            f"{CURE}"
        )
    if sum(first) != 1:
        raise UserError(
            f"storage.root: {url}: {sum(first)} of {len(alive)} nodes were the first to create one file, so two runs "
            f"could overwrite each other. Use a file system whose hard links are atomic across nodes, {CURE}"
        )


@ray.remote(num_cpus=0, max_retries=0)
def _create(probe: str) -> bool:
    """List the folder, and return whether this node is the first to create the file that all nodes create."""
    folder = open_folder(probe)
    folder.list()
    return folder.create(WINNER, _node_id().encode())


@ray.remote(num_cpus=0, max_retries=0)
def _write(probe: str) -> None:
    open_folder(probe).write(_node_id(), b"")


@ray.remote(num_cpus=0, max_retries=0)
def _list(probe: str) -> list[str]:
    return open_folder(probe).list()


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
