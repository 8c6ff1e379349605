"""A dashboard of Ray that loses answers, or accepts connections and does not answer: a sweep goes on, and a stop is obeyed."""

import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from ray.exceptions import RpcError
from ray.job_submission import JobDetails, JobStatus

from dis_scale.process.errors import Preempted, StorageAway
from dis_scale.recipe import Recipe
from pipelines.cluster import largest_gpu_bytes, reach
from pipelines.driver import Driver, run_stage, stopping_jobs, train_and_evaluate
from pipelines.jobs import Job, end_own_job
from pipelines.ray_private import DashboardClient
from pipelines.silence import SILENT_S, Silence, Unanswered
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
        self._answer("submit")

    def get_job_info(self, name: str) -> JobDetails:
        self._answer("info")
        self.left -= 1
        status = JobStatus.RUNNING if self.left else JobStatus.SUCCEEDED
        return JobDetails(type="SUBMISSION", submission_id=name, status=status, entrypoint="", driver_exit_code=0)

    def get_job_logs(self, _: str) -> str:
        self._answer("logs")
        return ""

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        self._answer("tail")
        yield ""

    def stop_job(self, _: str) -> None:
        self._answer("stop")


@pytest.fixture
def driver(tiny: Recipe, tmp_path: Path) -> Driver:
    driver = driver_of(tiny, tmp_path)
    driver.poll_every_s = 0.0
    return driver


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("loses", [0, 1, 3])
def test_lost_answers_of_each_call_end_nothing(driver: Driver, loses: int, lost: Callable[[], Exception]) -> None:
    here = cluster("here")
    dashboard = here.client = Dashboard(loses, lost)
    run_stage(driver, here, "prepare")
    dashboard.asked.pop("tail", None)
    assert dashboard.asked == {
        "list": (loses + 1) ** 2,  # again before each submission: an earlier one may have been taken
        "submit": loses + 1, "info": 3 * (loses + 1), "logs": loses + 1,
    }  # fmt: skip
    assert logged(driver).count("waiting  Ray's dashboard does not answer; it is asked again for 15 minutes") == 4 * bool(loses)


def test_a_question_to_rays_gcs_that_fails_is_asked_again() -> None:
    answers = iter([RpcError("unavailable"), 3])

    def ask() -> int:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return int(answer)

    assert Silence(lambda _: None, pause_s=0.0).insist(ask, lambda: None) == 3


def test_a_dashboard_that_stays_away_ends_the_sweep_by_an_error_that_is_tried_again() -> None:
    times_s = iter([0.0, 5.0, SILENT_S, SILENT_S + 1])
    silence = Silence(lambda _: None, now_s=lambda: next(times_s))

    def lose() -> None:
        raise OSError("refused")

    for _ in range(3):
        assert silence.ask(lose) is None
    with pytest.raises(Unanswered, match="has not answered for 901 s: refused") as raised:
        silence.ask(lose)
    assert raised.value.exit_code == StorageAway.exit_code


def test_two_answers_that_are_lost_in_a_week_are_no_silence() -> None:
    """Whether another model may begin is not asked while all of them train."""
    times_s = iter([0.0, 10.0, 250_000.0, 500_000.0])
    silence = Silence(lambda _: None, now_s=lambda: next(times_s))

    def lose() -> None:
        raise OSError("refused")

    assert [silence.ask(lose) for _ in range(4)] == [None] * 4


def test_a_stop_is_obeyed_while_the_dashboard_is_silent(driver: Driver) -> None:
    here = cluster("here")
    here.client = Dashboard(10**6, LOST[0])
    threading.Timer(0.2, driver.stop_requested.set).start()
    with pytest.raises(Preempted):
        run_stage(driver, here, "prepare")


class Server(ThreadingHTTPServer):
    """A dashboard as Ray's client meets it: the first answers to each question are lost, by status 500; or it is silent."""

    daemon_threads = True
    loses = 0
    gpus: tuple[Any, ...] = ()
    """Those that the agent of each node reports."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.silent = threading.Event()
        self.asked = dict[str, int]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Print nothing: a client that no longer waits is what these tests are about, and others read what is printed meanwhile."""

    def answers(self) -> dict[str, object]:
        """Return the answers by the ends of the requests' paths."""
        job = {"type": "SUBMISSION", "submission_id": "j", "status": "RUNNING", "entrypoint": "", "driver_exit_code": 0}
        return {
            "version": {"version": "4", "ray_version": "2.60.0", "ray_commit": ""},
            "nodes?view=summary": {"data": {"summary": [{"gpus": gpus} for gpus in self.gpus]}},
            "stop": {"stopped": True},
            "jobs": [],
            "j": job,
        }


class _Request(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.server.silent.is_set():
            time.sleep(60)
        what = self.path.rsplit("/", 2 if self.path.endswith("/") else 1)[1]
        self.server.asked[what] = self.server.asked.get(what, 0) + 1
        lost = self.server.asked[what] <= self.server.loses
        self.send_response(500 if lost else 200)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.answers().get(what)).encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A dashboard that this process's Ray has, which must answer within 0.3 s."""
    monkeypatch.setattr(DashboardClient, "answer_s", 0.3)
    with Server() as served:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", served.url)
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


def go_on() -> None:
    """Nothing ends the waiting."""


def test_a_dashboard_that_accepts_and_does_not_answer_is_not_waited_for(server: Server) -> None:
    """By Ray's own client this takes until the dashboard ends."""
    client = DashboardClient(server.url)
    server.silent.set()
    here = cluster("here")
    here.client = client
    said = list[str]()
    job = Job(here, "job", True, Silence(said.append))
    assert not job.ended()
    assert job.status == JobStatus.PENDING
    assert len(said) == 1
    with pytest.raises((OSError, socket.timeout)):
        client.list_jobs()


@pytest.mark.parametrize(
    ("gpus", "largest"),
    [
        (([], None, [{"memoryTotal": 16_384}, {"memoryTotal": 81_920}], [{"memoryTotal": 24_576}]), 80 * 2**30),
        (([],), None),
        ((), None),
    ],
)
@pytest.mark.parametrize("loses", [0, 1, 7])
def test_a_cluster_is_reached_although_answers_are_lost(
    server: Server, gpus: tuple[Any, ...], largest: int | None, loses: int
) -> None:
    """The memory is that of the largest GPU, as the nodes' agents report it."""
    server.gpus, server.loses = gpus, loses
    silence = Silence(pause_s=0.0)
    client = reach(silence, go_on)
    assert isinstance(client, DashboardClient), "its requests end"
    assert largest_gpu_bytes(client, silence, go_on, gpus=3) == largest
    assert largest_gpu_bytes(client, silence, go_on, gpus=4) is None, "a node has reported none yet"
    assert server.asked["version"] >= loses + 1
    assert server.asked["nodes?view=summary"] == loses + 2


def test_a_stop_is_obeyed_while_a_cluster_is_not_reached(server: Server) -> None:
    client = reach(Silence(), go_on)
    server.silent.set()

    def stopped() -> None:
        raise Preempted("stopped")

    with pytest.raises(Preempted):
        reach(Silence(), stopped)
    with pytest.raises(Preempted):
        largest_gpu_bytes(client, Silence(), stopped, gpus=1)


def test_a_sweep_and_its_job_end_beside_a_dashboard_that_falls_silent(
    server: Server, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop asks Ray to stop the jobs, and waits for them no longer than the grace period."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j"}}')
    here = cluster("here")
    here.client = reach(Silence(), go_on)
    driver.jobs = [Job(here, "j", True, Silence()), Job(here, "k", True, Silence())]
    server.silent.set()
    began_s = time.monotonic()
    threading.Timer(0.5, driver.stop_requested.set).start()
    with pytest.raises(Preempted), stopping_jobs(driver):
        train_and_evaluate(driver, here)
    assert end_own_job(Preempted.exit_code, wait_s=0.0, silent_s=0.0) == 0, "a failed job would be submitted again"
    assert time.monotonic() - began_s < 30
    assert "which may continue; stop each by `ray job stop`: j k" in logged(driver)
