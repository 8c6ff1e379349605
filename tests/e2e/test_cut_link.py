"""Three machines, as network namespaces on one bridge: Ray's head and two workers; one loses its link and its processes."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.sweep import state
from pipelines import jobs
from tests.support import sweeps
from tests.support.clusters import Events, RayNodes, sweep_to_train, wait_for_end, wait_for_nodes, wait_until

BRIDGE, NAMES, SUBNET = "ds-bridge", ("ds-head", "ds-one", "ds-two"), "10.233.77"
SETTINGS = (
    "models={dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}", "train.publish_images=[0, 8000]",
    "train.workers=1..2", "train.resume_every_images=160",
)  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def links() -> Iterator[dict[str, str]]:
    """The address of each namespace; its end of the link is `eth0` inside and has the namespace's name outside."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces want root and `ip` (apt-get install iproute2)")
    addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(NAMES, 2)}
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in addresses.items():
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", BRIDGE, "up")
            for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                ip("-n", name, *words)
            ip("-n", name, "link", "set", "lo", "up")
        yield addresses
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def within(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


@pytest.mark.faults
def test_a_node_whose_link_is_cut_costs_an_attempt(links: dict[str, str], tmp_path: Path) -> None:
    sweep = sweep_to_train(tmp_path, *SETTINGS)
    run = sweep.run("dit")
    head, one, two = NAMES
    nodes = RayNodes(0, links[head], within(head))
    try:
        for number, name in enumerate((one, two), 2):
            node = nodes.node(1, links[name], within(name))
            wait_for_nodes(nodes, number, node, within(head))  # one by one: they share a folder, unlike machines
        events = Events(job := jobs.submit(nodes.cluster(), sweep, "train", "dit"))
        assert events.wait("start")["workers"] == 2
        wait_until(lambda: state.resumable_images(run) > 0, job)
        ip("link", "set", two, "down")
        sweeps.kill_all(node)
        events.wait("restart")
        start = events.wait("start")
        assert start["workers"] == 1
        assert start["images"] > 0
        assert wait_for_end(job) == "SUCCEEDED"
    finally:
        nodes.stop()
    assert state.published_counts(run) == [0, 8000]
