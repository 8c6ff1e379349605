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
CAN_MOUNT = os.geteuid() == 0 and shutil.which("unshare") is not None


@pytest.fixture(scope="module")
def nodes() -> Iterator[clusters.RayNodes]:
    cluster = clusters.RayNodes(cpus=1)
    yield cluster
    cluster.stop()


def probe(nodes: clusters.RayNodes, newest: clusters.Node, root: Path) -> str:
    clusters.wait_for_nodes(nodes, len(nodes.nodes), newest)
    command = [sys.executable, "-c", PROBE, nodes.address, str(root)]
    done = subprocess.run(
        command, cwd=sweeps.ROOT, env=os.environ | clusters.ENVIRONMENT, capture_output=True, text=True
    )
    return done.stdout + done.stderr


@pytest.mark.faults
def test_nodes_that_share_the_folder_may_use_it_and_one_with_its_own_is_named(
    nodes: clusters.RayNodes, tmp_path: Path
) -> None:
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
