"""Workers that wait: what they say, and when the wait has no end. tests/e2e/test_gpu_places.py has it on a real Ray."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from dis_scale.process.errors import Preempted
from pipelines import metrics, waiting
from pipelines.waiting import hopeless, words
from pipelines.worker import amounts
from tests.support.clusters import RayNodes

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


@pytest.mark.faults
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
