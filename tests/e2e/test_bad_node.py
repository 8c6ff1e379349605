"""A node whose device fails: named after each failure, avoided after two, also by a rerun."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.process import faults
from dis_scale.sweep import state
from pipelines import jobs
from tests.support import clusters, sweeps
from tests.support.clusters import Events, RayNodes

SHORT = ("models={dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}", "train.workers=1..2")


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    made = RayNodes(cpus=1)
    yield made
    made.stop()


@pytest.mark.faults  # and the drill bad-gpu-or-node
def test_a_node_with_two_failures_is_left_out(nodes: RayNodes, tmp_path: Path) -> None:
    plan = tmp_path / "faults"
    plan.write_text("broken at check times=99\n")
    bad = nodes.node(1, options=["--node-name=bad"], **{faults.VARIABLE: str(plan)})
    clusters.wait_for_nodes(nodes, 2, bad)
    sweep = clusters.sweep_to_train(tmp_path, *SHORT)
    events = Events(job := jobs.submit(nodes.cluster(), sweep, "train", "dit"))
    placed = events.wait("placed")["nodes"]
    assert len(placed) == 2
    assert "bad" in placed
    for failures in (1, 2):
        event = events.wait("node_failure")
        assert (event["node"], event["failures"]) == ("bad", failures)
    assert events.wait("node_excluded")["node"] == "bad"
    start = events.wait("start")
    assert (start["workers"], start["attempt"]) == (1, 1), "a failed check takes no lease"
    assert clusters.wait_for_end(job) == "SUCCEEDED", job.reason()
    assert state.node_failures(sweep) == {"bad": 2}
    assert state.last_device(sweep.run("dit")) == "cpu"

    events = Events(jobs.submit(nodes.cluster(), sweep, "train", "dit"))
    assert events.wait("start")["workers"] == 1
    sweeps.kill_all(bad)
