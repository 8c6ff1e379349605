"""A machine whose device fails: named after each failure, avoided after two, also by a rerun and for a new pod on it.

The nodes are started as `cluster/rayjob.yaml` has it, by a shell that knows their machine's name. They share one address.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.process import faults
from dis_scale.sweep import state
from tests.support import clusters, pods, stages, sweeps
from tests.support.clusters import Events, Node, RayNodes

SHORT = (f"models={stages.ONE_MODEL}", "train.workers=1..2")
AS_SHIPPED = [f"--{name}={value}" for name, value in pods.nodes("rayjob.yaml")[1].options.items() if "name" in name]
AS_SHIPPED += ["--resources='{\"evaluate\": 1}'"]  # as a shell takes it


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    made = RayNodes(cpus=1, options=AS_SHIPPED, within=pods.SHELL, NODE_NAME="head")
    yield made
    made.stop()


def pod(nodes: RayNodes, machine: str, **environment: str) -> Node:
    """Start a node, as a pod on this machine."""
    return nodes.node(1, options=AS_SHIPPED, within=pods.SHELL, NODE_NAME=machine, **environment)


@pytest.mark.faults  # and the drill bad-gpu-or-node
def test_a_machine_with_two_failures_is_left_out(nodes: RayNodes, tmp_path: Path) -> None:
    """The first by an error; the second hangs, and is found in the time of a step instead of four times as long."""
    plan = tmp_path / "faults"
    plan.write_text("broken at check\nhang at check times=99\n")
    bad = pod(nodes, "bad", **{faults.VARIABLE: str(plan)})
    clusters.wait_for_nodes(nodes, 2, bad)
    sweep = clusters.sweep_to_train(tmp_path, *SHORT, "train.hang_after_s=60")
    events = Events(job := clusters.submit(nodes.cluster(), sweep, "train", "dit"))
    assert sorted(events.wait("placed")["nodes"]) == ["bad", "head"]
    for failures in (1, 2):
        event = events.wait("node_failure")
        assert (event["node"], event["failures"]) == ("bad", failures)
    assert "hanging; all others wait for the workers of node bad" in job.cluster.client.get_job_logs(job.id)
    assert events.wait("node_excluded")["node"] == "bad"
    start = events.wait("start")
    assert (start["workers"], start["attempt"]) == (1, 1), "a failed check takes no lease"
    assert clusters.wait_for_end(job) == "SUCCEEDED", job.reason()
    assert state.node_failures(sweep) == {"bad": 2}
    assert state.last_device(sweep.run("dit")) == "cpu"

    sweeps.kill_all(bad)
    clusters.wait_for_nodes(nodes, 2, pod(nodes, "bad"))
    clusters.wait_for_nodes(nodes, 3, pod(nodes, "healthy"))
    events = Events(clusters.submit(nodes.cluster(), sweep, "train", "dit"))
    assert sorted(events.wait("placed")["nodes"]) == ["head", "healthy"]


@pytest.mark.faults
def test_evaluation_leaves_it_out_too_and_skips_no_checkpoint(nodes: RayNodes, tmp_path: Path) -> None:
    sweep = sweeps.sweep_at(tmp_path / "store", SHORT[0], "evaluate.variants={}", "evaluate.workers=2", "evaluate.block_images=8")
    stages.prepare_and_precompute(sweep, tmp_path / "none")
    stages.train(sweep, "dit", tmp_path)
    (tmp_path / "faults").write_text("broken at check times=99\n")
    clusters.wait_for_nodes(nodes, 2, pod(nodes, "bad", **{faults.VARIABLE: str(tmp_path / "faults")}))
    state.record_node_failure(sweep.failed_nodes("train", "dit"), "bad", "in training")
    events = Events(job := clusters.submit(nodes.cluster(), sweep, "evaluate"))
    event = events.wait("node_failure")
    assert (event["node"], event["failures"]) == ("bad", 2)
    assert events.wait("node_excluded")["node"] == "bad"
    assert clusters.wait_for_end(job) == "SUCCEEDED", job.reason()
    assert state.skipped(sweep) == {}
    assert state.all_evaluated(sweep)
