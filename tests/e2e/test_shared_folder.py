"""A storage root on the disk of a cluster of several nodes: used if they share it, refused if one of them has its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import clusters, sweeps

PROBE = (
    "import ray, sys; from pipelines.shared_folder import require_shared\n"
    "ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
    "try: require_shared(sys.argv[2])\n"
    "except Exception as error: print(type(error).__name__, error)\n"
    "else: print('shared')\n"
)
LOST = (
    "import psutil, ray, sys; from pipelines import nodes\n"
    "ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
    "where = ray.remote(num_cpus=0, max_retries=0)(lambda: ray.get_runtime_context().get_node_id())\n"
    "asked, node = [], psutil.Process(int(sys.argv[2]))\n"
    "def ask(alive):\n"
    "    asked.append(len(alive))\n"
    "    for process in [*node.children(recursive=True), node] if len(asked) == 1 else []: process.kill()\n"
    "    return nodes.on_each(alive, where, words=lambda name, why: why)\n"
    "found = nodes.of_living(ask)\n"
    "print(asked[0], len(found), len(asked) > 1)\n"
)
CAN_MOUNT = os.geteuid() == 0 and shutil.which("unshare") is not None


@pytest.fixture(scope="module")
def nodes() -> Iterator[clusters.RayNodes]:
    cluster = clusters.RayNodes(cpus=1)
    yield cluster
    cluster.stop()


def probe(nodes: clusters.RayNodes, newest: clusters.Node, root: Path) -> str:
    return run(PROBE, nodes, newest, str(root))


def run(program: str, nodes: clusters.RayNodes, newest: clusters.Node, argument: str) -> str:
    clusters.wait_for_nodes(nodes, len(nodes.nodes), newest)
    command = [sys.executable, "-c", program, nodes.address, argument]
    done = subprocess.run(command, cwd=sweeps.ROOT, env=os.environ | clusters.ENVIRONMENT, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.faults
def test_nodes_that_share_the_folder_may_use_it_and_one_with_its_own_is_named(nodes: clusters.RayNodes, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert probe(nodes, nodes.node(cpus=1), root).strip() == "shared"
    assert list(root.iterdir()) == []
    if not CAN_MOUNT:
        pytest.skip("only root can give a node a file system of its own")
    own = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {root} && exec "$@"', "sh")
    words = probe(nodes, nodes.node(cpus=1, within=own), root)
    assert words.startswith(f"UserError storage.root: {root} is not one folder for all 3 nodes"), words
    assert list(root.iterdir()) == []


@pytest.mark.faults
def test_a_node_that_dies_while_it_is_asked_is_left_out() -> None:
    """It ended a sweep with exit code 1, which is final on Kubernetes."""
    nodes = clusters.RayNodes(cpus=1)
    try:
        dying = nodes.node(cpus=1)
        words = run(LOST, nodes, dying, str(dying.pid))
        assert words.splitlines()[-1].split() == ["2", "1", "True"], words  # after Ray's lines about the lost node
    finally:
        nodes.stop()
