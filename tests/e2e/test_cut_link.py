"""Three machines, as network namespaces on one bridge: Ray's head and two workers; one loses its link and its processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.sweep import state
from ops.drills import network
from ops.drills.network import ip, within
from tests.support import clusters, sweeps
from tests.support.clusters import Events, RayNodes, sweep_to_train, wait_for_end, wait_for_nodes, wait_until
from tests.support.stages import ONE_MODEL

NAMES = ("ds-head", "ds-one", "ds-two")
SETTINGS = (
    f"models={ONE_MODEL}", "train.publish_images=[0, 8000]",
    "train.workers=1..2", "train.resume_every_images=160",
)  # fmt: skip


@pytest.fixture
def links() -> Iterator[dict[str, str]]:
    if missing := network.missing():
        pytest.skip(f"network namespaces want {missing}")
    with network.linked(NAMES) as addresses:
        yield addresses


@pytest.mark.faults
@pytest.mark.usefixtures("whole_machine")
def test_a_node_whose_link_is_cut_costs_an_attempt(links: dict[str, str], tmp_path: Path) -> None:
    sweep = sweep_to_train(tmp_path, *SETTINGS)
    run = sweep.run("dit")
    head, one, two = NAMES
    nodes = RayNodes(0, links[head], within(head))
    try:
        for number, name in enumerate((one, two), 2):
            node = nodes.node(1, links[name], within(name))
            wait_for_nodes(nodes, number, node, within(head))  # one by one: they share a folder, unlike machines
        events = Events(job := clusters.submit(nodes.cluster(), sweep, "train", "dit"))
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
