"""A dashboard of Ray that loses answers, or accepts connections and does not answer: a sweep goes on, and a stop is obeyed."""

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from ray.job_submission import JobDetails, JobStatus

from dis_scale.process.errors import Preempted, StorageAway
from dis_scale.recipe import Recipe
from pipelines.driver import Driver, run_stage
from pipelines.jobs import SILENT_S, Job, Silence, Unanswered
from pipelines.ray_private import DashboardClient
from tests.support.drivers import cluster, driver_of, logged

LOST: list[Callable[[], Exception]] = [
    lambda: requests.exceptions.ConnectionError("Connection aborted."),
    lambda: requests.exceptions.ReadTimeout("timed out"),
    lambda: RuntimeError("Request failed with status code 500"),
]


class Dashboard:
    """Ray's client; before each answer, as many are lost as `loses` says. The job runs for three questions."""

    def __init__(self, loses: int, lost: Callable[[], Exception]) -> None:
        self.loses, self.lost, self.asked = loses, lost, dict[str, int]()
        self.left = 3

    def _answer(self, what: str) -> None:
        self.asked[what] = self.asked.get(what, 0) + 1
        if self.asked[what] % (self.loses + 1):
            raise self.lost()

    def list_jobs(self) -> list[JobDetails]:
        self._answer("list")
        return []

    def submit_job(self, **_: Any) -> None:
        pass

    def get_job_info(self, name: str) -> JobDetails:
        self._answer("info")
        self.left -= 1
        status = JobStatus.RUNNING if self.left else JobStatus.SUCCEEDED
        return JobDetails(type="SUBMISSION", submission_id=name, status=status, entrypoint="", driver_exit_code=0)

    def get_job_logs(self, _: str) -> str:
        return ""

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield ""

    def stop_job(self, _: str) -> None:
        raise self.lost()


@pytest.fixture
def driver(tiny: Recipe, tmp_path: Path) -> Driver:
    driver = driver_of(tiny, tmp_path)
    driver.poll_every_s = 0.0
    return driver


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("loses", [0, 1, 7])
def test_lost_answers_of_each_call_end_nothing(driver: Driver, loses: int, lost: Callable[[], Exception]) -> None:
    here = cluster("here")
    dashboard = here.client = Dashboard(loses, lost)
    run_stage(driver, here, "prepare")
    assert dashboard.asked == {"list": loses + 1, "info": 3 * (loses + 1)}
    assert logged(driver).count(
        "waiting  Ray's dashboard does not answer; it is asked again for 15 minutes"
    ) == 4 * bool(loses)


def test_a_dashboard_that_stays_away_ends_the_sweep_by_an_error_that_is_tried_again() -> None:
    times_s = iter([0.0, 0.0, 5.0, SILENT_S, SILENT_S + 1])
    silence = Silence(lambda _: None, now_s=lambda: next(times_s))

    def lose() -> None:
        raise OSError("refused")

    for _ in range(3):
        assert silence.ask(lose) is None
    with pytest.raises(Unanswered, match="has not answered for 901 s: refused") as raised:
        silence.ask(lose)
    assert raised.value.exit_code == StorageAway.exit_code


def test_a_stop_is_obeyed_while_the_dashboard_is_silent(driver: Driver) -> None:
    here = cluster("here")
    here.client = Dashboard(10**6, LOST[0])
    threading.Timer(0.2, driver.stop_requested.set).start()
    with pytest.raises(Preempted):
        run_stage(driver, here, "prepare")


class _Silent(BaseHTTPRequestHandler):
    """Answers the question for Ray's version, and accepts all others."""

    def do_GET(self) -> None:
        if self.path == "/api/version":
            body = b'{"version": "4", "ray_version": "2.60.0", "ray_commit": ""}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            time.sleep(30)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def silent() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_dashboard_that_accepts_and_does_not_answer_is_not_waited_for(silent: str) -> None:
    """By Ray's own client this takes until the dashboard ends."""
    client = DashboardClient(silent)
    client.answer_s = 0.3
    here = cluster("here")
    here.client = client
    said = list[str]()
    job = Job(here, "job", True, Silence(said.append))
    assert not job.ended()
    assert job.status == JobStatus.PENDING
    assert len(said) == 1
    with pytest.raises((OSError, socket.timeout)):
        client.list_jobs()
