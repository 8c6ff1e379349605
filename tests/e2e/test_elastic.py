"""Nodes that come and go under a training job: it shrinks, grows, leaves a drained node with nothing lost, and is preempted."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.errors import Preempted
from dis_scale.storage.folder import Folder
from pipelines import jobs
from tests.support import sweeps
from tests.support.clusters import Rays, Said, driver, sweep_to_train

FOR_LONG = (
    "models={dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}", "train.publish_images=[0, 1600000]",
    "train.workers=1..2", "train.grow_after_s=1", "train.resume_every_images=1600",
)  # fmt: skip


@pytest.fixture
def rays() -> Iterator[Rays]:
    made = Rays(cpus=1)
    yield made
    made.stop()


def began(line: str) -> tuple[int, str]:
    """Workers, and where they began."""
    found = re.search(r"(\d) workers, from (.*?)(,|$)", line)
    assert found, line
    return int(found[1]), found[2]


def newest(sweep: Folder) -> int:
    return max(int(name.split("-")[0]) for name in (sweep / "runs/dit/resume").list())


@pytest.mark.faults
def test_workers_shrink_grow_and_leave_a_drained_node(rays: Rays, tmp_path: Path) -> None:
    sweep, recipe = sweep_to_train(tmp_path, *FOR_LONG)
    node = rays.node(cpus=1)
    while len(rays.alive()) < 2:
        assert node.poll() is None
    said = Said(job := jobs.submit(rays.cluster(), recipe, sweep, "train", "dit"))
    assert began(said.wait("workers, from")) == (2, "the beginning")
    while newest(sweep) == 0:
        assert not job.ended(), job.why()

    sweeps.kill_all(node)
    said.wait("a worker was lost")
    assert began(said.wait("workers, from"))[0] == 1
    node = rays.node(cpus=1)
    said.wait("there is room for 2 workers: 1 stop at a resume point")
    workers, _ = began(said.wait("workers, from"))
    assert workers == 2

    node.terminate()  # as an evicted pod: Ray drains the node
    _leaves_with_all_its_steps(said)
    before = rays.alive()
    rays.node(cpus=1)
    assert began(said.wait("workers, from"))[0] == 2
    rays.drain(*(rays.alive() - before))
    _leaves_with_all_its_steps(said)

    driver(sweep, "train").terminate()
    stopped_at = int(said.wait(" images; training stood still").split("dit: ")[1].split()[0])
    while not job.ended():
        pass
    assert newest(sweep) == stopped_at
    assert isinstance(job.error("stopped"), Preempted)


def _leaves_with_all_its_steps(said: Said) -> None:
    said.wait("a node of its workers is being drained: they stop at a resume point")
    stopped_at = int(said.wait(" images; training stood still").split("dit: ")[1].split()[0])
    workers, where = began(said.wait("workers, from"))
    assert (workers, int(where.split("-")[0])) == (1, stopped_at)
