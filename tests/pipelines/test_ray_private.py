"""What is used of Ray beyond its public API, on a real Ray: these tests fail when another version changes it."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobSubmissionClient
from ray.util.metrics import Counter

from pipelines import ray_private, stage
from tests.support.exporters import scrape_all
from tests.support.waiting import wait_until


class Identified:
    def id(self) -> str:
        return str(ray.get_runtime_context().get_actor_id())


Actor = ray.remote(num_cpus=1)(Identified)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    """A Ray of this process with two CPUs and a dashboard."""
    with pytest.MonkeyPatch.context() as patch, stage.keeping_handlers():
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=True, dashboard_port=0, log_to_driver=False)
        ray.shutdown()


@pytest.fixture
def node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def test_an_actor_has_its_id_a_process_and_a_node_once_it_is_placed(node: str) -> None:
    actor = Actor.remote()
    assert ray.get(actor.id.remote()) == ray_private.actor_id(actor)
    assert ray_private.has_process(actor)
    ray.kill(actor)
    wait_until(lambda: ray.available_resources().get("CPU") == 2)
    assert ray_private.node_of(actor) == node, "also after its end"


def test_an_actor_without_capacity_has_no_process() -> None:
    waiting = Actor.options(num_gpus=1).remote()
    time.sleep(1)
    assert not ray_private.has_process(waiting)
    ray.kill(waiting)


def test_a_nodes_free_resources_are_those_that_no_actor_has(node: str) -> None:
    actor = Actor.remote()
    ray.get(actor.id.remote())
    wait_until(lambda: ray_private.available_by_node()[node].get("CPU") == 1)
    ray.kill(actor)


def test_a_node_is_known_with_its_resources() -> None:
    """tests/e2e/test_gpu_places.py asks after one is gone."""
    (known,) = ray_private.known_nodes()
    assert known == ray.nodes()[0]["Resources"]


def test_no_node_drains_until_one_does() -> None:
    """tests/e2e/test_elastic.py drains one."""
    assert ray_private.draining_nodes() == {}


def test_the_dashboard_lists_each_nodes_gpus(cluster: Any) -> None:
    client = JobSubmissionClient(f"http://{cluster.dashboard_url}")
    wait_until(lambda: ray_private.gpu_bytes_by_node(client) == [[]])


def test_a_jobs_driver_finds_its_id_and_its_environment(cluster: Any) -> None:
    client = JobSubmissionClient(f"http://{cluster.dashboard_url}")
    program = "import json; from pipelines.ray_private import job_facts; print('facts', json.dumps(job_facts()))"
    given = {"env_vars": {"OF_THE_TEST": "1"}}
    client.submit_job(entrypoint=f'{sys.executable} -c "{program}"', submission_id="its-id", runtime_env=given)
    wait_until(lambda: client.get_job_status("its-id").is_terminal())
    (line,) = (line for line in client.get_job_logs("its-id").splitlines() if line.startswith("facts "))
    facts = json.loads(line.removeprefix("facts "))
    assert (facts["metadata"]["job_submission_id"], facts["runtime_env"]["env_vars"]["OF_THE_TEST"]) == ("its-id", "1")
    assert ray_private.job_facts() is None


def test_a_counter_is_exported_as_0(cluster: Any) -> None:
    counter = Counter("tested_total", "A counter of this test.", ("sweep",))
    ray_private.count_from_zero(counter, {"sweep": "tiny"})
    folder = Path(cluster.address_info["session_dir"]).parent
    lines = list[str]()

    def exported() -> bool:
        with contextlib.suppress(OSError):  # an agent of a busy machine hangs up now and then
            lines[:] = [line for line in scrape_all(folder).splitlines() if line.startswith("ray_tested_total{")]
        return bool(lines)

    wait_until(exported)
    (line,) = lines
    assert 'sweep="tiny"' in line
    assert line.endswith(" 0.0")
