"""Nodes that come and go under a training job: it shrinks, grows, leaves a drained node without loss, and is preempted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.process.errors import Preempted
from dis_scale.sweep import state
from tests.support import clusters, sweeps
from tests.support.clusters import Events, RayNodes, driver, sweep_to_train, wait_for_end, wait_for_nodes, wait_until
from tests.support.stages import ONE_MODEL

LONG = (
    f"models={ONE_MODEL}", "train.publish_images=[0, 1600000]",
    "train.workers=1..2", "train.grow_after_s=1", "train.resume_every_images=1600", "grace_s=0.001",
)  # fmt: skip
"""A stop request leaves no time to save; growth has all of it, and a drained node as much as its notice."""


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    made = RayNodes(cpus=1)
    yield made
    made.stop()


@pytest.mark.faults
def test_workers_shrink_grow_and_leave_a_drained_node(nodes: RayNodes, tmp_path: Path) -> None:
    sweep = sweep_to_train(tmp_path, *LONG)
    run = sweep.run("dit")
    node = nodes.node(cpus=1)
    wait_for_nodes(nodes, 2, node)
    events = Events(job := clusters.submit(nodes.cluster(), sweep, "train", "dit"))
    start = events.wait("start")
    assert (start["workers"], start["images"]) == (2, 0)
    wait_until(lambda: state.resumable_images(run) > 0, job)

    sweeps.kill_all(node)
    events.wait("restart")
    assert events.wait("start")["workers"] == 1
    node = nodes.node(cpus=1)
    assert events.wait("grow")["to"] == 2
    _moves_without_loss(events, to=2)

    node.terminate()  # as an evicted pod: Ray drains the node
    events.wait("drain")
    _moves_without_loss(events, to=1)
    before = nodes.alive()
    nodes.node(cpus=1)
    assert events.wait("start")["workers"] == 2
    nodes.drain(*(nodes.alive() - before))
    events.wait("drain")
    _moves_without_loss(events, to=1)

    driver(sweep, "train").terminate()
    stopped_at = events.wait("end")["images"]
    assert wait_for_end(job) == "FAILED"
    assert state.resumable_images(run) <= stopped_at
    assert isinstance(job.error("stopped"), Preempted)


def _moves_without_loss(events: Events, to: int) -> None:
    stopped_at = events.wait("end")["images"]
    start = events.wait("start")
    assert (start["workers"], start["images"]) == (to, stopped_at)
