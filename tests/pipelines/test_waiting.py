"""Workers that wait: what they say, and when the wait has no end. A real Ray with nodes of declared resources."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import placement_group, remove_placement_group

from dis_scale.errors import Preempted, UserError
from pipelines import metrics, sweep, train, waiting
from pipelines.driver import Driver
from pipelines.waiting import hopeless, words
from pipelines.worker import Worker, amounts, spawn, watch
from tests.support import sweeps
from tests.support.clusters import RayNodes
from tests.support.events import events

HEAD, NODE = {"CPU": 8.0, "prepare": 1.0}, {"CPU": 8.0, "GPU": 8.0, "memory": 5e9, "node:10.0.0.1": 1.0}
REQUEST = amounts({"num_cpus": 1, "num_gpus": 1, "resources": {"prepare": 1}})


def test_what_waits_says_for_what_what_the_cluster_has_and_what_to_do() -> None:
    text = words(1, REQUEST, [NODE, HEAD], {"CPU": 16.0, "GPU": 8.0, "prepare": 1.0})
    assert text.startswith(
        "waiting for capacity for 1 workers, each with 1 CPU, 1 GPU, 1 prepare; free in the cluster: 16 CPU, 8 GPU, 1 prepare; "
        "nodes: 1 with 8 CPU, 8 GPU; 1 with 8 CPU, 1 prepare; no node has all of that together"
    )
    busy = words(2, amounts({"num_cpus": 1, "num_gpus": 1}), [NODE, NODE], {"CPU": 8.0})
    assert busy.endswith("free in the cluster: 8 CPU, 0 GPU; nodes: 2 with 8 CPU, 8 GPU")
    few = words(9, amounts({"num_gpus": 1}), [NODE, HEAD], {}, together=9)
    assert "; the nodes hold 8 of them, so they wait until one joins: start such a node" in few


def test_workers_no_longer_count_as_waiting_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it ended in an error, or while some still waited."""
    exported: list[float] = []
    monkeypatch.setattr(waiting.metrics, "gauge", lambda _, value: exported.append(value))
    with contextlib.suppress(Preempted), waiting.Wait() as wait:
        wait.poll(2, {"CPU": 1.0})
        raise Preempted("stopped")
    assert exported == [2, 0]


@pytest.mark.faults  # before those on `two_gpus`: a process is a driver of one Ray at a time
def test_the_first_autoscalers_node_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of node that does not exist yet: this autoscaler reports neither its types nor what it can never add."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = _autoscaled(tmp_path)
    try:
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        _wait_until(lambda: not hopeless({"GPU": 2.0}))
    finally:
        ray.shutdown()
        nodes.stop()


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[Cluster]:
    """A head without a GPU that declares `prepare`, and a node with two that does not: the shape of the first cluster files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = {"num_cpus": 2, "num_gpus": 0, "resources": {"prepare": 1}, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=2, num_gpus=2)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


class Idle(Worker):
    def run(self) -> int:
        return 1


def test_what_can_never_be_placed_is_logged_within_ten_seconds_and_ends_with_the_cure(
    two_gpus: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "GIVE_UP_AFTER_S", 8.0)
    other = spawn(Idle, {"num_cpus": 1})
    idle = spawn(Idle, {"num_cpus": 1, "num_gpus": 1, "resources": {"prepare": 1}})
    logged, began_s = list[float](), time.monotonic()
    say = waiting.lines.say
    monkeypatch.setattr(waiting.lines, "say", lambda text: (logged.append(time.monotonic() - began_s), say(text)))
    with pytest.raises(
        UserError, match=r"no capacity for 1 workers, each with 1 CPU, 1 GPU, 1 prepare.*start such a node"
    ):
        watch([other, idle], [other.run.remote(), idle.run.remote()], lambda _: None)
    (event,) = events(capsys.readouterr().out, "waiting")
    assert event["workers"] == 1
    assert logged[0] < 10


def test_a_group_that_is_larger_than_the_cluster_ends_with_the_cure(
    two_gpus: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "GIVE_UP_AFTER_S", 2.0)
    bundle = {"CPU": 1.0, "GPU": 1.0}
    group = placement_group([bundle] * 3)
    with pytest.raises(UserError, match="no capacity for 3 workers, each with 1 CPU, 1 GPU, "):
        train._placed(group, 3, bundle, lambda: 0)
    remove_placement_group(group)


def test_a_sweep_says_at_its_start_which_stage_can_never_be_placed(
    two_gpus: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the days of the stages before it."""
    monkeypatch.setattr(waiting, "LOGGED_AFTER_S", 0.5)
    monkeypatch.setattr(waiting, "GIVE_UP_AFTER_S", 2.0)
    said: list[str] = []
    cluster: Any = SimpleNamespace(gpus=2)
    board: Any = SimpleNamespace(say=said.append)
    driver = Driver(sweeps.sweep_at(tmp_path, "device=cuda", "train.workers=3"), board)
    with pytest.raises(UserError, match="no capacity for 3 workers, each with 1 CPU, 1 GPU, within 2 s; nodes: "):
        sweep._await_nodes(driver, cluster)
    assert [line.partition(",")[0] for line in said] == ["waiting for capacity for 3 workers"]
    driver.stop_requested.set()
    with pytest.raises(Preempted):
        sweep._await_nodes(driver, cluster)
    fitting = Driver(sweeps.sweep_at(tmp_path, "device=cuda", "train.workers=2"), board)
    sweep._await_nodes(fitting, cluster)


def test_the_second_autoscaler_reports_what_it_can_never_add(
    two_gpus: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a reply as it sends it; its provider for tests does not run next to other Rays on one machine."""
    reply = GetClusterStatusReply()
    reply.autoscaling_state.autoscaler_state_version = 7
    reply.autoscaling_state.infeasible_resource_requests.add().resources_bundle.update({"GPU": 64.0})
    gang = reply.autoscaling_state.infeasible_gang_resource_requests.add()
    gang.requests.add().resources_bundle.update({"GPU": 3.0})
    answer = SimpleNamespace(get_cluster_status=lambda timeout_s: reply.SerializeToString())
    monkeypatch.setattr(waiting, "global_worker", SimpleNamespace(gcs_client=answer))
    assert [hopeless({"GPU": count}) for count in (64.0, 3.0, 4.0)] == [True, True, False]


@pytest.mark.faults
def test_after_the_loss_of_a_node_its_replacement_is_awaited(two_gpus: Cluster) -> None:
    """The last test on this cluster: nothing on it is hopeless from then on."""
    assert hopeless({"GPU": 3.0})
    assert not hopeless({"GPU": 2.0})
    two_gpus.remove_node(next(iter(two_gpus.worker_nodes)))
    _wait_until(lambda: len(waiting.alive_nodes()) == 1)
    assert not hopeless({"GPU": 2.0})


def _autoscaled(folder: Path) -> RayNodes:
    """A head whose autoscaler may add one node with two GPUs; Ray's provider for tests would start it on this machine."""
    types = {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    }
    empty = "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands"
    config: dict[str, Any] = {
        name: [] for name in (*empty.split(), "worker_start_ray_commands", "cluster_synced_files")
    }
    config |= {
        "cluster_name": "declared", "max_workers": 1, "head_node_type": "ray.head.default", "available_node_types": types,
        "provider": {"type": "fake_multinode", "head_node_id": FAKE_HEAD_NODE_ID},
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        "upscaling_speed": 1.0, "idle_timeout_minutes": 1,
    }  # fmt: skip
    (folder / "autoscaler.yaml").write_text(json.dumps(config))
    environment = {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    return RayNodes(2, options=[f"--autoscaling-config={folder / 'autoscaler.yaml'}"], **environment)


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_workers_that_wait_are_exported_once_and_so_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, float]] = []
    monkeypatch.setattr(metrics, "gauge", lambda *gauge: shown.append(gauge))
    wait, request = waiting.Wait(), {"GPU": 1.0}
    for count in (3, 3, 2, 0, 0):
        assert wait.poll(count, request) is None
    assert shown == [("waiting_workers", 3), ("waiting_workers", 2), ("waiting_workers", 0)]


def test_workers_that_ask_for_nothing_wait_for_their_processes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOGGED_AFTER_S", 0.0)
    monkeypatch.setattr(waiting, "GIVE_UP_AFTER_S", 0.0)
    wait = waiting.Wait()
    assert [wait.poll(2, {}) for _ in range(2)] == [None, None]
