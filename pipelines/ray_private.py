"""All that is used of Ray beyond its public API, for the pinned version. A test calls each function on a real Ray."""

import json
import math
import os
import time
from typing import Any

from ray._private import state, worker
from ray.job_submission import JobSubmissionClient
from ray.util.metrics import Counter

Resources = dict[str, float]


class DashboardClient(JobSubmissionClient):  # type: ignore[misc]
    """A client whose requests end. Ray's own would wait for ever for a dashboard that accepts a connection and does not answer."""

    answer_s, upload_s = 10.0, 60.0
    """Times in which a dashboard must answer: in general, and a request that sends it a job or its files."""

    def _do_request(self, method: str, endpoint: str, **how: Any) -> Any:
        asks = method == "GET" or endpoint.endswith("/stop")
        return super()._do_request(method, endpoint, **({"timeout": self.answer_s if asks else self.upload_s} | how))


def job_facts() -> dict[str, Any] | None:
    """Return the metadata and runtime environment of the Ray job whose driver this process is, None outside one."""
    facts: dict[str, Any] | None = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "null"))
    return facts


def actor_id(worker: Any) -> str:
    """Return the id of an actor, which does not change while it lives."""
    name: str = worker._actor_id.hex()
    return name


def has_process(worker: Any) -> bool:
    """Return whether Ray has started the actor's process, which may have ended since; false while it waits for capacity."""
    return bool(state.actors(actor_id(worker)).get("Pid"))


def node_of(worker: Any) -> str:
    """Return the id of the node that an actor runs on, or ran on last."""
    return str(state.actors(actor_id(worker))["Address"]["NodeID"])


def available_by_node() -> dict[str, Resources]:
    """Return the free resources of each node by its id."""
    available: dict[str, Resources] = state.available_resources_per_node()
    return available


def known_nodes() -> list[Resources]:
    """Return the resources of each node that this Ray has had: of those that live, and of the last 1,000 that are gone."""
    nodes = worker.global_worker.gcs_client.get_all_node_info().values()
    return [dict(node.resources_total) for node in nodes]


def draining_nodes() -> dict[str, float]:
    """Return the seconds until each draining node is taken away, by its id; infinity if Ray does not know the time.

    `ray drain-node`, KubeRay, an autoscaler and a spot notice all appear here.
    """
    at_ms: dict[str, int] = state.state.get_draining_nodes()
    return {node: ms / 1000 - time.time() if ms else math.inf for node, ms in at_ms.items()}


def gpu_bytes_by_node(client: JobSubmissionClient) -> list[list[int]]:
    """Return the memory of each GPU of each node, as its agent reports it. OSError if no answer comes."""
    answer = client._do_request("GET", "/nodes?view=summary")
    answer.raise_for_status()
    return [[gpu["memoryTotal"] * 2**20 for gpu in node.get("gpus") or []] for node in answer.json()["data"]["summary"]]


def count_from_zero(counter: Counter, labels: dict[str, str]) -> None:
    """Export a counter as 0: `inc` refuses 0, and without it Prometheus misses the first increase."""
    counter._record(0, labels)
